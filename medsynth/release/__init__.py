"""What leaves the hospital, and its proof."""
