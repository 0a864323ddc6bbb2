"""medsynth: differentially private synthesis of medical image and segmentation pairs."""

__version__ = "0.1.0"
