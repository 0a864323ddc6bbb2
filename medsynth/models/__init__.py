"""Neural networks and other generators; no training loops."""
