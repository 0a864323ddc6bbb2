"""Voxels and their formats; no learning."""
