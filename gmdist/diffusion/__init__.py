"""Diffusion as mathematics: schedules, predictions, samplers."""
