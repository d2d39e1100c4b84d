import importlib.metadata
import json
import types

import pytest

from irdscale.cli import doctor


@pytest.fixture(autouse=True)
def _no_cluster(monkeypatch):
    """Another test's cluster is not looked for."""
    monkeypatch.setattr(doctor, "running_cluster", lambda: None)


@pytest.fixture(scope="module")
def healthy():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(doctor, "running_cluster", lambda: None)
        return doctor.diagnose()


def test_this_machine_can_search(healthy):
    assert healthy["ok"], healthy["problems"]
    assert healthy["torch"]["devices"]["cpu"] == {"float32": True, "float64": True, "bfloat16": True}
    assert healthy["torch"]["threads"] >= 1
    assert healthy["free_memory_gib"] > 0
    assert healthy["free_disk_gib"] > 0


def test_result_is_json(healthy):
    assert json.loads(json.dumps(healthy, allow_nan=False)) == healthy


def test_runtime_packages_are_listed_and_development_tools_are_not(healthy):
    assert {"torch", "transformers", "datasets", "pydantic", "peft"} <= set(healthy["packages"])
    assert not {"pytest", "ruff", "mypy"} & set(healthy["packages"])
    assert healthy["packages"]["numpy"]["found"] == importlib.metadata.version("numpy")


def test_missing_and_old_packages_are_problems_that_name_them(monkeypatch):
    monkeypatch.setattr(
        doctor,
        "requirements",
        lambda: ["torch>=2.8", "no-such-package>=1", "numpy>=999", "nor-this>=2; extra == 'bench'"],
    )
    result = doctor.diagnose()
    assert not result["ok"]
    assert result["packages"]["no-such-package"] == {"found": None, "needs": ">=1", "ok": False}
    blocking = [problem["why"] for problem in result["problems"] if problem["blocks_search"]]
    version = importlib.metadata.version("numpy")
    assert blocking == [
        "no-such-package is missing; it needs no-such-package>=1",
        f"numpy is {version}; it needs numpy>=999",
    ]
    optional = [problem for problem in result["problems"] if problem["cannot"] == "run irdscale bench"]
    assert [problem["why"] for problem in optional] == ["nor-this is missing; it needs nor-this>=2"]


def test_without_the_minilm_package_only_the_quickstart_is_out(monkeypatch):
    monkeypatch.setattr(doctor, "MINILM", "no_such_module")
    result = doctor.diagnose()
    assert result["ok"]
    assert result["minilm"] is None
    cannot = [problem["cannot"] for problem in result["problems"]]
    assert [what for what in cannot if "deepspeed" not in what and "ray" not in what] == ["run configs/quickstart.yaml"]


def test_what_deepspeed_lacks_is_said_and_blocks_no_search(monkeypatch):
    monkeypatch.setattr(doctor, "_packages", lambda problems: {"torch": {"found": None}})
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.19")
    result = doctor.diagnose()
    assert result["ok"]
    assert result["deepspeed"] == "0.19"
    assert not any("deepspeed" in problem["why"] for problem in result["problems"])

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    result = doctor.diagnose()
    assert result["deepspeed"] is None
    assert "deepspeed is missing; run: pip install" in result["problems"][-2]["why"]
    assert result["problems"][-1]["why"] == "ray is missing; run: pip install 'ray[tune]' tensorboardX"
    assert result["ray"] == {"version": None, "cluster": None}


def test_a_tracker_without_its_package_is_a_problem(monkeypatch):
    import transformers

    train = types.SimpleNamespace(report_to=["tensorboard", "wandb"])
    monkeypatch.setattr(transformers.integrations, "is_tensorboard_available", lambda: True)
    monkeypatch.setattr(transformers.integrations, "is_wandb_available", lambda: False)
    problems = []
    doctor._trackers(problems, types.SimpleNamespace(train=train))
    why = "wandb is missing; run: pip install wandb"
    assert problems == [{"cannot": "train with train.report_to=[wandb]", "why": why, "blocks_search": True}]


def test_requirements_fall_back_to_the_checkout(monkeypatch):
    def not_installed(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", not_installed)
    found = doctor.requirements()
    assert any(need.startswith("torch>=") for need in found)
    assert "peft>=0.17; extra == 'bench'" in found


@pytest.mark.parametrize(("value", "offline"), [("1", True), ("true", True), ("0", False), (None, False)])
def test_hub_state(monkeypatch, value, offline):
    if value is None:
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    else:
        monkeypatch.setenv("HF_HUB_OFFLINE", value)
    assert doctor._offline() is offline


def test_a_type_that_does_not_work_is_a_problem():
    import torch

    class Broken:
        float64 = torch.float64
        float32 = torch.float32
        bfloat16 = torch.bfloat16

        @staticmethod
        def ones(*shape, dtype, **kwargs):
            if dtype is torch.bfloat16:
                raise RuntimeError("not implemented for 'BFloat16'\nmore")
            return torch.ones(*shape, dtype=dtype, **kwargs)

    problems = []
    assert doctor._device(Broken, "cpu", problems) == {"float32": True, "float64": True, "bfloat16": False}
    why = "bfloat16 matrix products fail on cpu: not implemented for 'BFloat16'"
    assert problems == [{"cannot": "use model.dtype=bfloat16", "why": why, "blocks_search": False}]


def test_a_gpu_is_listed_with_its_memory():
    import torch

    cuda = types.SimpleNamespace(
        mem_get_info=lambda device: (3 * 2**30, 8 * 2**30), get_device_name=lambda device: f"Card of {device}"
    )
    fake = types.SimpleNamespace(float32=torch.float32, float64=torch.float64, bfloat16=torch.bfloat16, cuda=cuda)
    fake.ones = lambda *shape, device, **kwargs: torch.ones(*shape, **kwargs)
    problems = []
    facts = doctor._device(fake, "cuda:1", problems)
    assert facts["name"] == "Card of cuda:1"
    assert (facts["free_memory_gib"], facts["memory_gib"]) == (3.0, 8.0)
    assert problems == []
