"""Ray: the cluster that a search runs on, and the groups of ranks that work on it."""
