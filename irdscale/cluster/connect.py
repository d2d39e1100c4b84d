"""The Ray cluster of a search: found or started, checked, and left as it was."""

from __future__ import annotations

import logging
import os
import platform
import secrets
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from irdscale.cluster.share import is_share, jobs_a_gpu
from irdscale.cluster.supervisor import Supervisor, cause_of
from irdscale.cluster.worker import RankGroup
from irdscale.errors import InputError

# Only for what this process and the cluster that it starts do; none is set where the user has set it.
QUIET = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
    "RAY_DEDUP_LOGS": "0",
    # No files of Tune's own for each trial, and an interrupt comes through to us.
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    # A trial that failed has no metric.
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_WARN_INSUFFICENT_RESOURCE_THRESHOLD_S": "1000000",
    # Nobody restores an experiment of Tune's: the ledger is what a search goes on from.
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000",
}
LOCAL = "local"
ANSWER_S = 10.0
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cluster:
    """A cluster that this process is connected to.

    Attributes:
        supervisor: the handle of the search's supervisor.
        own: whether this process started it, and ends it.
    """

    supervisor: Any
    own: bool


@contextmanager
def connected() -> Iterator[Cluster]:
    """Connect to the cluster that RAY_ADDRESS names or that runs on this host, else start one of this host alone.

    Raises:
        InputError: the cluster cannot be reached.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        raise InputError("search.runner: found a connection to Ray in this process; expected none (ray.shutdown())")
    address = find_address()
    where = f"RAY_ADDRESS: found {address}; " if "RAY_ADDRESS" in os.environ else f"the Ray cluster at {address}: "
    try:
        # Of a cluster of our own nobody looks at the dashboard.
        own: dict[str, Any] = {"include_dashboard": False} if address == LOCAL else {}
        with _sigterm_kept():
            ray.init(address=address, log_to_driver=False, logging_level="ERROR", **own)
    except Exception as error:  # Ray raises ConnectionError, RuntimeError, ValueError and its own
        raise InputError(f"{where}cannot connect: {str(error).splitlines()[0]}") from error
    try:
        # Tune prints the traceback of every failed trial; the ledger has its reason.
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
        # Lost, it starts anew without its jobs, which end with it; whoever follows them then starts them again.
        lives = {"max_restarts": -1, "max_task_retries": -1}
        options = {"num_cpus": 0, "max_concurrency": 10_000, "resources": beside(), **lives}
        supervisor = ray.remote(**options)(Supervisor).remote()
        yield Cluster(supervisor, own=address == LOCAL)
    finally:
        ray.shutdown()


@contextmanager
def _sigterm_kept() -> Iterator[None]:
    """Give SIGTERM back to who takes it: Ray ends the process at once with it, before trials have saved their state."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if callable(before) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def find_address() -> str:
    """Where the cluster is: as RAY_ADDRESS says, else that of `ray start` on this host, else nowhere yet.

    Raises:
        InputError: RAY_ADDRESS is none, or nobody answers there; Ray itself would try for many minutes.
    """
    asked = os.environ.get("RAY_ADDRESS", "")
    if asked not in ("", LOCAL, "auto"):
        host, colon, port = asked.rpartition(":")
        if not colon or not port.isdigit() or "/" in host:
            raise InputError(f"RAY_ADDRESS: found {asked}; expected HOST:PORT, as ray start --head says it")
        if not _answers(host, int(port)):
            raise InputError(f"RAY_ADDRESS: found {asked}, where nobody answers; expected a running Ray cluster")
        return asked
    # What ray start leaves for programs on its host.
    note = Path(os.environ.get("RAY_TMPDIR", tempfile.gettempdir())) / "ray" / "ray_current_cluster"
    found = note.read_text().strip() if asked != LOCAL and note.is_file() else ""
    host, _, port = found.rpartition(":")
    if found and port.isdigit() and _answers(host, int(port)):
        return found
    if asked == "auto":
        raise InputError("RAY_ADDRESS: found auto, but no Ray cluster on this host; expected one (ray start --head)")
    if found:
        log.warning("%s names a Ray cluster at %s that does not answer; starting one here", note, found)
    return LOCAL


def _answers(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=ANSWER_S):
            return True
    except OSError:
        return False


def answer(ref: Any) -> Any:
    """What an actor's method returns, or what it raised, without what Ray puts around it."""
    import ray

    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError as error:
        raise cause_of(error) from None


def beside() -> dict[str, float]:
    """The resource that keeps the search's small helpers on the head node, off the nodes that compute."""
    import ray

    head = "node:__internal_head__"
    return {head: 0.0001} if head in ray.cluster_resources() else {}


def nodes() -> list[dict[str, Any]]:
    """The nodes that are alive: id, host, and what each has, as Ray says."""
    import ray

    return [
        {"id": node["NodeID"], "host": node["NodeManagerHostname"], "has": node["Resources"]}
        for node in ray.nodes()
        if node["Alive"]
    ]


def fitting(rank_group: RankGroup) -> int:
    """How many such gangs the cluster has room for at once, when nothing else runs."""
    return (
        sum(min(_times(node["has"], *wanted) for wanted in rank_group.bundle.items()) for node in nodes())
        // rank_group.size
    )


def _times(has: dict[str, float], name: str, amount: float) -> int:
    """How often a node has so much of a resource."""
    if name == "GPU" and is_share(amount):
        # Of one GPU: what is left of two makes no third.
        return int(has.get(name, 0.0)) * jobs_a_gpu(amount)
    return int(has.get(name, 0.0) // amount)


def has_gpus() -> bool:
    """Whether any node has a GPU."""
    return any(node["has"].get("GPU", 0) for node in nodes())


def check_nodes(output: Path) -> None:
    """Check that every node has this version of irdscale, and sees and can write the output folder.

    Raises:
        InputError: a node does not; names the node, what was found and what was expected.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from irdscale import __version__

    token = secrets.token_hex(8)
    folder = output.absolute()
    existed = folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    mark = folder / f".shared-{token}"
    mark.write_text(token)
    probe = ray.remote(num_cpus=0, max_retries=1)(_probe)
    try:
        asked = []
        for node in nodes():
            there = NodeAffinitySchedulingStrategy(node["id"], soft=False)
            asked.append((f"node {node['host']}", probe.options(scheduling_strategy=there).remote(str(folder), token)))
        for who, ref in asked:
            try:
                found = ray.get(ref, timeout=120)
            except ray.exceptions.RayError as error:
                raise InputError(f"{who}: cannot run irdscale: {' '.join(str(error).split())[-200:]}") from None
            if found["error"] is not None:
                raise InputError(f"output: {who}: {found['error']}; expected a folder that all nodes share")
            back = folder / found["wrote"]
            if not back.exists():
                raise InputError(
                    f"output: {folder} is another folder on {who} than here; expected one that all nodes share"
                )
            for what, own in (("irdscale", __version__), ("Python", platform.python_version())):
                if found[what] != own:
                    raise InputError(f"{who}: found {what} {found[what]}; expected {own}, as here")
    finally:
        for file in folder.glob(f".shared-{token}*"):
            file.unlink(missing_ok=True)
        if not existed and not any(folder.iterdir()):
            folder.rmdir()


def _probe(folder: str, token: str) -> dict[str, Any]:
    """What a node sees of the output folder, and its versions."""
    from irdscale import __version__

    found: dict[str, Any] = {"error": None, "irdscale": __version__, "Python": platform.python_version()}
    mark = Path(folder) / f".shared-{token}"
    found["wrote"] = f"{mark.name}-{secrets.token_hex(4)}"
    try:
        if mark.read_text() != token:
            found["error"] = f"{folder} holds other files than here"
        else:
            (Path(folder) / found["wrote"]).write_text(token)
    except OSError as error:
        what = "is not there, or is another folder" if isinstance(error, FileNotFoundError) else f"{error.strerror}"
        found["error"] = f"{folder}: {what}"
    return found
