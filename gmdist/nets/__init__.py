"""Networks: torch only."""
