"""What a trained network is worth when it is compressed."""
