"""A run's output folder: its owner, its finished parts, and digests of what it read."""
