"""Access to the Hugging Face hub without long retries and without its log lines."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager

SECONDS = 5.0


def is_hub_id(name: str) -> bool:
    """Whether `name` can be `NAME` or `OWNER/NAME` on the hub."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


@functools.cache
def _answers() -> bool:
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=SECONDS)
    except Exception:  # the type of error depends on the HTTP client
        return False
    return True


@contextmanager
def hub_access(needed: bool = True) -> Iterator[None]:
    """In the body, use the hub if it answers within 5 seconds, else only its cache.

    Without this, a machine without network waits about 25 s for each file that is not cached.

    Args:
        needed: whether the body may need the hub; False sends no request.
    """
    import datasets
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    offline = before[0] or before[1] or not needed or not _answers()
    constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = offline, offline
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the progress bars, warnings and load reports of transformers off the terminal."""
    from transformers.utils import logging as transformers_logging

    verbosity, bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bar:
            transformers_logging.enable_progress_bar()


def one_line(error: BaseException) -> str:
    """The first line of a library's error, at most 200 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."
