"""Overlap, agreement, fidelity and memorisation."""
