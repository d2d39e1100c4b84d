"""Masks of the entries to train, and the exact top k of a Fisher diagonal."""
