"""Sweeps: which trials there are, and how far each trains, as functions of what has been found out."""
