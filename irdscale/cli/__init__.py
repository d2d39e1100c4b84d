"""The command line."""

from irdscale.cli.command_line import main

__all__ = ["main"]
