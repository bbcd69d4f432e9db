"""A run: its directory, configuration and checkpoints, and what it reports."""
