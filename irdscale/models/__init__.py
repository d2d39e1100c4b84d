"""Base models: loading, checks of what they compute, LoRA, losses in chunks."""
