"""Training: the optimiser, the step and the loop."""
