"""What limits the quality of a run, from figures that its folders already hold."""
