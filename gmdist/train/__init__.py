"""The step, the loop, and what they stand on."""
