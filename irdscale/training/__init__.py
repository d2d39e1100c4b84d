"""Training and evaluation of sparse models."""
