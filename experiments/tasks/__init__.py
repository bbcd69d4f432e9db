"""Tasks: what a network is trained on and how it is judged."""
