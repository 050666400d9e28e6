"""Scaling laws: fits, plans, sweeps and their reports."""
