"""The configuration: its keys, and how a YAML file with changes becomes one."""

from irdscale.config.schema import RunConfig

__all__ = ["RunConfig"]
