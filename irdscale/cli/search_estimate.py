"""Estimate how long a search will take, on this machine and on a Ray cluster."""

from __future__ import annotations

import os
from dataclasses import asdict
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from irdscale.errors import InputError, RunError

if TYPE_CHECKING:
    from irdscale.config.schema import RunConfig
    from irdscale.plan.measured_costs import Costs, Size


class CapacityError(Exception):
    """The cluster cannot run the trials of a search.

    Attributes:
        what: work that cannot run
        why: fault and expectation, in one line
    """

    def __init__(self, what: str, why: str) -> None:
        super().__init__(what, why)
        self.what, self.why = what, why


def running_cluster() -> dict[str, Any] | None:
    """The cluster that RAY_ADDRESS names or that runs on this host, or None; starts none.

    Raises:
        InputError: it cannot be reached, or Ray cannot be used.
    """
    from irdscale.cluster.connect import LOCAL, QUIET, find_address

    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    try:
        import ray

        address = find_address()
        if address == LOCAL:
            return None
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except InputError:
        raise
    except Exception as error:  # Ray raises ConnectionError, RuntimeError, ValueError and its own
        raise InputError(f"cannot use Ray: {' '.join(str(error).split())}") from error
    try:
        return _connected_cluster()
    finally:
        ray.shutdown()


def _connected_cluster() -> dict[str, Any]:
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


def estimate(config: RunConfig, ray: dict[str, Any]) -> dict[str, Any]:
    """Estimate the duration of a search with each runner; sets `ray["cluster"]` with `search.runner: ray`.

    Returns:
        {"at_most", "local", "ray"}. "at_most" has the largest numbers of rounds, evaluations and steps of the search.
        "local" and "ray" have {"at_once", "seconds", "costs"}: number of evaluations side by side, an upper bound of
        the search in seconds, and seconds of its parts. "ray" is None unless it is the configuration's runner, and
        "local" is None if only the cluster has GPUs. "ray" also has "sharing": None, or, if trials share GPUs
        (`search.ray.gpus_per_rank`), the facts of `irdscale.memory.gpu_sharing.Sharing` and "said", the same as text.

    Raises:
        InputError: the configuration does not fit the data, the model or the cluster, or the cluster cannot be reached.
        CapacityError: no trial fits on the cluster, or the trials that share a GPU do not.
    """
    from irdscale.plan.measured_costs import measured

    if config.search.runner == "local":
        costs, size = measured(config)
        return {"at_most": _at_most(size), "local": _runner_facts(config, costs, size), "ray": None}
    from irdscale.cluster import require_ray

    require_ray()
    import torch

    from irdscale.cluster.connect import check_nodes, connected, fitting, has_gpus
    from irdscale.memory.gpu_sharing import describe
    from irdscale.search.ray_engine import rank_group_of, sharing
    from irdscale.tasks import load_task

    with connected() as cluster:
        ray["cluster"] = {**_connected_cluster(), "started_here": cluster.own}
        check_nodes(Path(config.output))
        try:
            config, shared = sharing(config, load_task(config)) if config.search.ray.shares_gpus else (config, None)
        except InputError as error:
            raise CapacityError("run trials that share a GPU", str(error)) from None
        asked, rank_group = config.search.ray, rank_group_of(config, config.search.ray.ranks)
        trials = fitting(rank_group)
        if trials == 0:
            asks = f"{rank_group.size} x {rank_group.cpus} CPUs and {rank_group.gpus:g} GPUs (search.ray)"
            raise CapacityError("run a trial", f"{asks} do not fit on the cluster")
        costs, size = _on_cluster(config, rank_group)
        at_once = min(trials, asked.concurrent or trials)
        per_gpu = 1 if shared is None else shared.trials
        on_ray = _runner_facts(config, costs, size, at_once, asked.fisher_ranks or rank_group.size, per_gpu)
        on_ray["sharing"] = None if shared is None else asdict(shared) | {"said": describe(shared)}
        # If only the cluster has GPUs, the model need not fit into this machine's memory.
        remote = has_gpus() and not torch.cuda.is_available()
        local = None if remote else _runner_facts(config, measured(config)[0], size)
    return {"at_most": _at_most(size), "local": local, "ray": on_ray}


def _at_most(size: Size) -> dict[str, int]:
    return {**asdict(size), "training_steps": size.evaluations * size.steps}


def _runner_facts(
    config: RunConfig, costs: Costs, size: Size, at_once: int = 1, fisher_ranks: int = 1, trials_a_gpu: int = 1
) -> dict[str, Any]:
    from irdscale.plan.measured_costs import search_seconds

    seconds = round(search_seconds(config, costs, size, at_once, fisher_ranks, trials_a_gpu), 1)
    return {"at_once": at_once, "seconds": seconds, "costs": {k: round(v, 6) for k, v in asdict(costs).items()}}


def _on_cluster(config: RunConfig, rank_group: Any) -> tuple[Costs, Size]:
    """Measure one rank of a trial on a node of the cluster.

    Raises:
        InputError: as the measurement there.
        RunError: the node cannot run it.
    """
    import ray

    from irdscale.plan.measured_costs import measured

    # The costs are measured on a GPU that is not shared, as the Fisher passes have.
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
