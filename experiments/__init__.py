"""What people run: models, data, training and evaluation with cram_jax."""
