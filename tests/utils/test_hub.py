"""The hub is asked once, briefly, and only when it is needed."""

from __future__ import annotations

import time
from collections.abc import Iterator

import datasets
import pytest
from huggingface_hub import constants, is_offline_mode
from transformers.utils import logging as transformers_logging

from irdscale.utils import hub


@pytest.fixture
def _online(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    answers = hub._answers
    answers.cache_clear()
    yield
    answers.cache_clear()


@pytest.mark.usefixtures("_online")
def test_an_unreachable_hub_is_given_up_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    start = time.monotonic()
    with hub.hub_access():
        assert is_offline_mode()
        assert datasets.config.HF_HUB_OFFLINE
    assert time.monotonic() - start < hub.SECONDS + 1
    assert not is_offline_mode()
    assert not datasets.config.HF_HUB_OFFLINE


@pytest.mark.usefixtures("_online")
def test_a_hub_that_answers_is_used_and_local_files_never_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(hub, "_answers", lambda: calls.append(1) or True)
    with hub.hub_access(needed=False):
        assert is_offline_mode()
    assert not calls
    with hub.hub_access():
        assert not is_offline_mode()
    assert calls


def test_offline_setting_is_kept() -> None:
    with hub.hub_access():
        assert is_offline_mode()
    assert is_offline_mode()


def test_quiet_is_undone_after_an_error() -> None:
    before = transformers_logging.get_verbosity()
    with pytest.raises(ValueError, match="x"), hub.quiet():
        raise ValueError("x")
    assert transformers_logging.get_verbosity() == before
    assert transformers_logging.is_progress_bar_enabled()


def test_one_line() -> None:
    assert hub.one_line(ValueError("\n first\nsecond")) == "first"
    assert hub.one_line(ValueError()) == "ValueError"
    assert len(hub.one_line(ValueError("x" * 500))) == 200


@pytest.mark.parametrize(("name", "is_id"), [("bert-base", True), ("a/b.c", True), ("a/b/c", False), ("./a", False)])
def test_hub_ids(name: str, is_id: bool) -> None:
    assert hub.is_hub_id(name) == is_id
