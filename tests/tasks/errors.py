"""A check of errors whose key is the same in many cases."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from irdscale.errors import InputError


@contextmanager
def refused(match: str, key: str = "task.columns.label") -> Iterator[None]:
    """The body raises an error of one line about `key`; `match` fits the line without the key."""
    with pytest.raises(InputError) as caught:
        yield
    error = caught.value
    assert "\n" not in str(error)
    assert error.key == key
    assert re.search(match, str(InputError(error.found, error.expected, where=error.where)))
