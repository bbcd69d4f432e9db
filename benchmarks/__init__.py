"""What we claim about speed, beside the peers, in one process."""
