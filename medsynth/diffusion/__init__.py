"""Noise schedules, objective and sampling."""
