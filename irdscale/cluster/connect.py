"""The Ray cluster of a search: find or start it, and check its nodes."""

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

# Settings of this process and the cluster that it starts; values that the user has set stay.
QUIET = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
    "RAY_DEDUP_LOGS": "0",
    # Tune writes no files per trial and leaves SIGINT to this package.
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    # A trial that failed has no metric.
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_WARN_INSUFFICENT_RESOURCE_THRESHOLD_S": "1000000",
    # A search resumes from its ledger, not from a Tune experiment.
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000",
}
LOCAL = "local"
ANSWER_S = 10.0
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cluster:
    """The cluster to which this process is connected.

    Attributes:
        supervisor: actor handle of the search's supervisor.
        own: whether this process started the cluster, and stops it.
    """

    supervisor: Any
    own: bool


@contextmanager
def connected() -> Iterator[Cluster]:
    """Connect to the cluster of RAY_ADDRESS or on this host; otherwise start one on this host alone.

    Raises:
        InputError: the cluster cannot be reached.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        raise InputError("found a connection to Ray in this process", "none (ray.shutdown())", key="search.runner")
    address = find_address()
    where = f"RAY_ADDRESS: found {address}; " if "RAY_ADDRESS" in os.environ else f"the Ray cluster at {address}: "
    try:
        # A cluster that lives as long as the search needs no dashboard.
        own: dict[str, Any] = {"include_dashboard": False} if address == LOCAL else {}
        with _sigterm_kept():
            ray.init(address=address, log_to_driver=False, logging_level="ERROR", **own)
    except Exception as error:  # Ray raises ConnectionError, RuntimeError, ValueError and its own
        raise InputError(f"{where}cannot connect: {str(error).splitlines()[0]}") from error
    try:
        # Tune would print the traceback of every failed trial; the ledger holds its error.
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
        # A lost supervisor restarts without its jobs; trials that follow a job then start it again.
        lives = {"max_restarts": -1, "max_task_retries": -1}
        options = {"num_cpus": 0, "max_concurrency": 10_000, "resources": beside(), **lives}
        supervisor = ray.remote(**options)(Supervisor).remote()
        yield Cluster(supervisor, own=address == LOCAL)
    finally:
        ray.shutdown()


@contextmanager
def _sigterm_kept() -> Iterator[None]:
    """Restore the handler of SIGTERM: Ray's ends the process before trials have saved their state."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if callable(before) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def find_address() -> str:
    """Address of the cluster: RAY_ADDRESS, else that of `ray start` on this host, else "local".

    Raises:
        InputError: RAY_ADDRESS is malformed or does not answer; Ray itself would retry for many minutes.
    """
    asked = os.environ.get("RAY_ADDRESS", "")
    if asked not in ("", LOCAL, "auto"):
        host, colon, port = asked.rpartition(":")
        if not colon or not port.isdigit() or "/" in host:
            raise InputError(f"found {asked}", "HOST:PORT, as ray start --head prints it", key="RAY_ADDRESS")
        if not _answers(host, int(port)):
            raise InputError(f"found {asked}, which does not answer", "a running Ray cluster", key="RAY_ADDRESS")
        return asked
    # ray start leaves its address in this file.
    note = Path(os.environ.get("RAY_TMPDIR", tempfile.gettempdir())) / "ray" / "ray_current_cluster"
    found = note.read_text().strip() if asked != LOCAL and note.is_file() else ""
    host, _, port = found.rpartition(":")
    if found and port.isdigit() and _answers(host, int(port)):
        return found
    if asked == "auto":
        fault = "found auto, but no Ray cluster on this host"
        raise InputError(fault, "a running one (ray start --head)", key="RAY_ADDRESS")
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
    """The result of an actor's method; raises its own error, without Ray's wrapper."""
    import ray

    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError as error:
        raise cause_of(error) from None


def beside() -> dict[str, float]:
    """The resource that keeps the supervisor and trials on the head node."""
    import ray

    head = "node:__internal_head__"
    return {head: 0.0001} if head in ray.cluster_resources() else {}


def nodes() -> list[dict[str, Any]]:
    """Live nodes: Ray's id, host and resources ("has")."""
    import ray

    return [
        {"id": node["NodeID"], "host": node["NodeManagerHostname"], "has": node["Resources"]}
        for node in ray.nodes()
        if node["Alive"]
    ]


def fitting(rank_group: RankGroup) -> int:
    """How many such groups fit on the empty cluster at once."""
    return (
        sum(min(_times(node["has"], *wanted) for wanted in rank_group.bundle.items()) for node in nodes())
        // rank_group.size
    )


def _times(has: dict[str, float], name: str, amount: float) -> int:
    """How many times this amount of a resource fits on a node."""
    if name == "GPU" and is_share(amount):
        # A share must lie on one GPU.
        return int(has.get(name, 0.0)) * jobs_a_gpu(amount)
    return int(has.get(name, 0.0) // amount)


def has_gpus() -> bool:
    """Whether any node has a GPU."""
    return any(node["has"].get("GPU", 0) for node in nodes())


def check_nodes(output: Path) -> None:
    """Check that every node has this version of irdscale and of Python, and can write the output folder.

    Raises:
        InputError: a node does not (names the node).
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
                fault = f"cannot run irdscale: {' '.join(str(error).split())[-200:]}"
                raise InputError(fault, where=who) from None
            if found["error"] is not None:
                raise InputError(f"{who}: {found['error']}", "a folder that all nodes share", key="output")
            back = folder / found["wrote"]
            if not back.exists():
                fault = f"{folder} is another folder on {who} than here"
                raise InputError(fault, "a folder that all nodes share", key="output")
            for what, own in (("irdscale", __version__), ("Python", platform.python_version())):
                if found[what] != own:
                    raise InputError(f"found {what} {found[what]}", f"{own}, as here", where=who)
    finally:
        for file in folder.glob(f".shared-{token}*"):
            file.unlink(missing_ok=True)
        if not existed and not any(folder.iterdir()):
            folder.rmdir()


def _probe(folder: str, token: str) -> dict[str, Any]:
    """A node's view of the output folder, and its versions."""
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
        what = "missing, or another folder" if isinstance(error, FileNotFoundError) else f"{error.strerror}"
        found["error"] = f"{folder}: {what}"
    return found
