"""The configuration: its keys, and how it is read from a YAML file and overrides."""

from irdscale.config.schema import RunConfig

__all__ = ["RunConfig"]
