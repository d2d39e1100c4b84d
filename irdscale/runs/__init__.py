"""A run's folder: whose it is, what it has finished, and what it read."""
