"""Weights and configs of other projects, read and written."""
