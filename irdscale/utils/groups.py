"""Parameters in groups, for passes that take one group after another."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod


def divided(shapes: Mapping[str, tuple[int, ...]], passes: int) -> list[list[str]]:
    """The names in order, in at most `passes` groups with similar numbers of entries."""
    sizes = {name: prod(shape) for name, shape in shapes.items()}
    total, before, groups = sum(sizes.values()), 0, [list[str]() for _ in range(passes)]
    for name, size in sizes.items():
        groups[min(passes - 1, (2 * before + size) * passes // (2 * max(1, total)))].append(name)
        before += size
    return [group for group in groups if group]
