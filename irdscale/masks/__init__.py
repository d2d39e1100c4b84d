"""Masks: which entries are trained, and the exact top k of a Fisher diagonal."""
