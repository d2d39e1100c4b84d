"""Helpers of any package: files, interrupts, progress bars, the hub, suggestions, groups, quantised weights."""
