"""What a network is compressed to, by name, and how that is done after training."""
