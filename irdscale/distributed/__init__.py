"""Ranks: process groups, the watchdog, DeepSpeed's settings and partitions."""
