"""Helpers of any program: files, interrupts, progress bars, the Hugging Face hub, suggestions."""
