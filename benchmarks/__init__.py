"""Our claims about speed, measured against peers in one process."""
