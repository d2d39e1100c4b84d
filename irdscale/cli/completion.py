"""Shell completion of `key=value` arguments."""

from __future__ import annotations

from typing import Any


def complete_change(ctx: Any, incomplete: str) -> list[tuple[str, str]]:
    """Keys that begin with the text so far, each with an equals sign and its description."""
    from irdscale.cli.app import VERB_KEYS
    from irdscale.config.keys import config_keys

    own = [(f"{key.name}=", key.meaning) for key in VERB_KEYS.get(str(ctx.info_name), ())]
    keys = [(f"{key.name}=", key.text) for key in config_keys() if not key.is_section]
    return [(name, text) for name, text in [*own, *keys] if name.startswith(incomplete)]


def complete_key(incomplete: str) -> list[tuple[str, str]]:
    """Sections and keys that begin with the text so far, with their descriptions."""
    from irdscale.config.keys import config_keys

    return [(key.name, key.text) for key in config_keys() if key.name.startswith(incomplete)]


def complete_kind(incomplete: str) -> list[str]:
    """Kinds of task that begin with the text so far."""
    from irdscale.config.kinds import METRICS

    return [kind for kind in METRICS if kind.startswith(incomplete)]
