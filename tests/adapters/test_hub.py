"""Adapters on a stand-in for the Hugging Face hub, and how it fails without network."""

from __future__ import annotations

import fnmatch
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml

from irdscale import load_adapter, pull_adapter, push_adapter, save_adapter, sparsify, switch_adapter
from irdscale.adapters.hub import FILES
from irdscale.errors import InputError, RunError
from irdscale.sparse import sparse_state
from irdscale.utils import hub as hub_access_module
from tests.sparse.oracle import random_mask
from tests.tiny_models import collate, samples, tiny


class Hub:
    """Repositories as folders; the calls that irdscale makes, and no others."""

    def __init__(self, root: Path) -> None:
        self.root, self.private = root, {}
        self.messages: list[str] = []

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> str:
        assert exist_ok
        if not (self.root / repo_id).exists():
            (self.root / repo_id).mkdir(parents=True)
            self.private[repo_id] = private
        return f"https://hub.example/{repo_id}"

    def upload_folder(self, *, repo_id: str, folder_path: Any, allow_patterns: list[str], commit_message: str) -> None:
        self.messages.append(commit_message)
        for file in Path(folder_path).iterdir():
            if any(fnmatch.fnmatch(file.name, pattern) for pattern in allow_patterns):
                shutil.copy(file, self.root / repo_id / file.name)

    def snapshot_download(
        self, repo_id: str, *, revision: str | None, local_dir: Any, allow_patterns: list[str]
    ) -> str:
        if not (self.root / repo_id).is_dir():
            raise FileNotFoundError(f"404: no repository {repo_id}\nat all")
        self.revision = revision
        if local_dir is None:
            return str(self.root / repo_id)
        shutil.copytree(self.root / repo_id, local_dir, dirs_exist_ok=True)
        return str(local_dir)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    stand_in = Hub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: stand_in)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", stand_in.snapshot_download)
    monkeypatch.setattr(hub_access_module, "_answers", lambda: True)
    return stand_in


def save_trained(folder: Path, name: str = "", seed: int = 0, **options: Any) -> Any:
    model = tiny("bert")
    model.config._name_or_path = name
    sparsify(model, random_mask(model, 0.1, seed, ("classifier.weight", "classifier.bias")), [r"^classifier\."])
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    save_adapter(model, folder, **options)
    return model


def logits(model: Any) -> torch.Tensor:
    return model(**collate(samples())).logits.detach()


def test_push_pull_and_load_by_name(hub: Hub, tmp_path: Path) -> None:
    model = save_trained(tmp_path / "adapter")
    (tmp_path / "adapter/notes.txt").write_text("not for others")
    assert push_adapter(tmp_path / "adapter", "me/sparse") == "https://hub.example/me/sparse"
    assert hub.private == {"me/sparse": True}
    assert sorted(p.name for p in (hub.root / "me/sparse").iterdir()) == sorted(FILES)
    folder = pull_adapter("me/sparse", tmp_path / "pulled", revision="main")
    assert (folder, hub.revision) == (tmp_path / "pulled", "main")
    for name in FILES:
        assert (folder / name).read_bytes() == (tmp_path / "adapter" / name).read_bytes()
    assert torch.equal(logits(load_adapter(tiny("bert"), folder)), logits(model))
    loaded = load_adapter(tiny("bert"), "me/sparse")
    assert torch.equal(logits(loaded), logits(model))
    other = save_trained(tmp_path / "other", seed=1)
    push_adapter(tmp_path / "other", "me/other", private=False)
    assert hub.private["me/other"] is False
    assert torch.equal(logits(switch_adapter(loaded, "me/other")), logits(other))


def test_pushing_again_replaces(hub: Hub, tmp_path: Path) -> None:
    for seed in (0, 1):
        model = save_trained(tmp_path / "adapter", seed=seed)
        push_adapter(tmp_path / "adapter", "me/sparse", private=seed == 0)
    assert hub.private == {"me/sparse": True}
    assert torch.equal(logits(load_adapter(tiny("bert"), "me/sparse")), logits(model))


def test_a_folder_goes_before_the_hub(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = save_trained(Path("runs/adapter"))
    assert torch.equal(logits(load_adapter(tiny("bert"), "runs/adapter")), logits(model))


def test_damaged_adapters_are_not_pushed(hub: Hub, tmp_path: Path) -> None:
    save_trained(tmp_path / "adapter")
    file = tmp_path / "adapter/adapter.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(InputError, match="damaged adapter"):
        push_adapter(tmp_path / "adapter", "me/sparse")
    with pytest.raises(InputError, match=r"nowhere: no such folder; expected an adapter"):
        push_adapter(tmp_path / "nowhere", "me/sparse")
    with pytest.raises(InputError, match=r"me/sparse: no such folder; expected an adapter"):
        push_adapter("me/sparse", "me/other")
    assert not hub.root.exists()


@pytest.mark.parametrize("name", ["sparse", "me/sparse/more", "https://hub.example/me", "me/..", "-/ x", ""])
def test_names_that_no_repository_has(hub: Hub, tmp_path: Path, name: str) -> None:
    save_trained(tmp_path / "adapter")
    for attempt in (lambda: push_adapter(tmp_path / "adapter", name), lambda: pull_adapter(name)):
        with pytest.raises(InputError, match="found no name on the hub; expected OWNER/NAME"):
            attempt()


def test_what_the_hub_does_not_have(hub: Hub) -> None:
    with pytest.raises(InputError, match=r"^me/none: no adapter loaded from the hub: 404: no repository me/none$"):
        pull_adapter("me/none")
    with pytest.raises(
        InputError,
        match=r"^me/none: no such folder here, and no adapter loaded from the hub: 404: no repository me/none$",
    ):
        load_adapter(tiny("bert"), "me/none")
    (hub.root / "me/empty").mkdir(parents=True)
    with pytest.raises(InputError, match=r"adapter.json: cannot read the adapter"):
        load_adapter(tiny("bert"), "me/empty")


def test_without_network(tmp_path: Path) -> None:
    """The real client, offline as all tests are: one line each."""
    save_trained(tmp_path / "adapter")
    with pytest.raises(RunError, match=r"adapter: cannot push to me/sparse on the hub: .*offline") as push:
        push_adapter(tmp_path / "adapter", "me/sparse")
    with pytest.raises(InputError, match=r"^me/sparse: no adapter loaded from the hub: ") as pull:
        pull_adapter("me/sparse")
    model = tiny("bert")
    with pytest.raises(
        InputError, match=r"^me/sparse: no such folder here, and no adapter loaded from the hub: "
    ) as load:
        load_adapter(model, "me/sparse")
    assert not any("\n" in str(found.value) for found in (push, pull, load))


def card(folder: Path) -> tuple[dict[str, Any], str]:
    _, header, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(header), text


def test_the_model_card_of_a_base_on_the_hub(tmp_path: Path) -> None:
    state = sparse_state(save_trained(tmp_path, "google/bert-tiny"))
    header, text = card(tmp_path)
    assert header == {
        "library_name": "irdscale",
        "base_model": "google/bert-tiny",
        "tags": ["irdscale", "sparse-fine-tuning", "adapter"],
    }
    assert 'BertForSequenceClassification.from_pretrained("google/bert-tiny", num_labels=3)' in text
    assert f"{state.k:,} entries" in text
    assert "all 39 parameters of classifier.weight, classifier.bias" in text
    assert f"`{state.mask.hash}`" in text


def test_the_model_card_of_a_local_base_tells_no_path(tmp_path: Path) -> None:
    (tmp_path / "secret/base").mkdir(parents=True)
    save_trained(tmp_path / "adapter", str(tmp_path / "secret/base"))
    header, text = card(tmp_path / "adapter")
    assert "base_model" not in header
    assert 'from_pretrained("base", num_labels=3)' in text
    assert "secret" not in text


def test_the_example_of_the_card_runs(tmp_path: Path, hub: Hub) -> None:
    base = tiny("bert")
    base.save_pretrained(tmp_path / "base")
    model = save_trained(tmp_path / "adapter", str(tmp_path / "base"))
    push_adapter(tmp_path / "adapter", "me/sparse")
    code = card(tmp_path / "adapter")[1].split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {}
    exec(code.replace('"base", ', f'"{tmp_path}/base", ').replace("OWNER/NAME", "me/sparse"), names)
    assert torch.equal(logits(names["model"].eval()), logits(model))
