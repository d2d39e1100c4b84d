"""Start this node's ranks with torchrun when all nodes have met: `python -m irdscale.nodes VERB CONFIG ...`

The same command on each node, with the same environment:

    NODES      how many there are
    HEAD       name or address of the first, which the others reach; HOST:PORT for another port than 29500
    RANKS      of this node; one a GPU, or 1, if unset
    NODE_RANK  0 on the first node; if unset, a node finds out by HEAD whether it is the first
    WAIT       seconds that nodes wait for each other; 600 if unset

Exit codes: those of `irdscale`; 1 also where nodes do not come, or are lost.
"""

from __future__ import annotations

import errno
import os
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass

from irdscale.errors import InputError, RunError
from irdscale.launched import interfaces

PORT, WAIT_S = 29500, 600
_RETRY_S = 1.0


@dataclass(frozen=True)
class Meeting:
    """Where and with whom this node meets.

    Attributes:
        address: of the first node, in numbers.
        ranks: of this node; one a GPU if None.
        first: whether this is the first node; None if unsaid.
        wait: seconds.
    """

    nodes: int
    head: str
    address: str
    port: int
    ranks: int | None
    first: bool | None
    wait: int


def meeting(environment: Mapping[str, str]) -> Meeting:
    """Read NODES, HEAD, RANKS, NODE_RANK and WAIT.

    Raises:
        InputError: one is missing, or no such number, or nobody knows the first node's name.
    """
    nodes = _number(environment, "NODES", 1)
    if nodes is None:
        raise InputError("NODES: missing; expected the number of nodes")
    rank = _number(environment, "NODE_RANK", 0)
    if rank is not None and rank >= nodes:
        raise InputError(f"NODE_RANK: found {rank} with NODES={nodes}; expected 0 to {nodes - 1}")
    head = environment.get("HEAD", "")
    host, colon, port = head.partition(":")
    if not host or (colon and not (port.isdigit() and 0 < int(port) < 2**16)):
        raise InputError(f"HEAD: found {head or 'nothing'}; expected the first node's HOST or HOST:PORT")
    try:
        address = str(socket.getaddrinfo(host, None, socket.AF_INET, socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        raise InputError(
            f"HEAD: found {host}: {error.strerror or error}; expected a name or an IPv4 address"
        ) from error
    wait = _number(environment, "WAIT", 1) or WAIT_S
    ranks = _number(environment, "RANKS", 1)
    return Meeting(nodes, host, address, int(port or PORT), ranks, None if rank is None else rank == 0, wait)


def _number(environment: Mapping[str, str], name: str, least: int) -> int | None:
    found = environment.get(name, "")
    if not found:
        return None
    if not found.isdigit() or int(found) < least:
        raise InputError(f"{name}: found {found!r}; expected a whole number of at least {least}")
    return int(found)


def hosts_the_meeting(at: Meeting) -> bool:
    """Whether the others come to this node.

    Raises:
        InputError: NODE_RANK says so, but HEAD is another host, or its port is taken.
    """
    if at.first is False:
        return False
    with socket.socket() as probe:
        # As torch listens: what a run before left behind in the kernel does no harm.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((at.address, at.port))
        except OSError as error:
            if not at.first:
                return False
            expected = "a free port" if error.errno == errno.EADDRINUSE else "the address of this node, NODE_RANK 0"
            raise InputError(f"HEAD: found {at.head}:{at.port}: {error.strerror}; expected {expected}") from error
    return True


def wait_for_head(at: Meeting, deadline: float) -> None:
    """Wait until the first node listens.

    Args:
        deadline: by time.monotonic().

    Raises:
        RunError: it does not.
    """
    while True:
        try:
            socket.create_connection((at.address, at.port), timeout=max(_RETRY_S, deadline - time.monotonic())).close()
            return
        except OSError as error:
            if time.monotonic() + _RETRY_S > deadline:
                raise RunError(
                    f"HEAD: {at.head}:{at.port} does not answer for {at.wait} seconds ({error.strerror or error}); "
                    f"expected the same command there, and no firewall"
                ) from error
        time.sleep(_RETRY_S)


def own_address(at: Meeting) -> str:
    """This host's address on the network on which the first node is."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        # Nothing is sent; the kernel chooses the route.
        probe.connect((at.address, at.port))
        return str(probe.getsockname()[0])


def start(at: Meeting, arguments: list[str]) -> int:
    """Run `irdscale ARGUMENTS` on this node's ranks when all nodes are there; the exit code.

    Raises:
        InputError: see `hosts_the_meeting`.
        RunError: the first node does not answer, others do not come, or a node was lost.
    """
    deadline = time.monotonic() + at.wait
    hosts = hosts_the_meeting(at)
    if not hosts:
        wait_for_head(at, deadline)
    own = own_address(at)
    # gloo would take the interface of the host's name, which may be the loopback.
    for interface in interfaces(own):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    # What the first node's end breaks, torch would tell with the addresses of its code.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import (
        RendezvousClosedError,
        RendezvousConnectionError,
        RendezvousTimeoutError,
    )
    from torch.distributed.run import parse_args, run

    while True:
        left = max(1, round(deadline - time.monotonic()))
        command = [f"--nnodes={at.nodes}", f"--nproc-per-node={at.ranks or _gpus()}"]
        command += ["--rdzv-backend=c10d", "--rdzv-id=irdscale", f"--rdzv-endpoint={at.address}:{at.port}"]
        command += [f"--rdzv-conf=join_timeout={left},is_host={int(hosts)}", f"--local-addr={own}"]
        try:
            run(parse_args([*command, "--module", "irdscale", *arguments]))
            return 0
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            if failure.exitcode < 0:
                raise RunError(
                    f"rank {rank} was killed by signal {-failure.exitcode}; the same command goes on"
                ) from None
            return failure.exitcode
        except SignalException as signal:
            return 128 + int(signal.sigval)
        except RendezvousTimeoutError:
            raise RunError(
                f"fewer than {at.nodes} nodes (NODES) met at {at.head}:{at.port} within {at.wait} seconds; "
                f"expected the same command on each"
            ) from None
        except RendezvousClosedError:
            # The run before this one is about to end.
            if hosts or time.monotonic() > deadline:
                raise RunError(f"HEAD: the run at {at.head}:{at.port} has ended; start all nodes again") from None
            time.sleep(_RETRY_S)
            wait_for_head(at, deadline)
        except RendezvousConnectionError:
            raise RunError(
                f"HEAD: the connection to {at.head}:{at.port} broke: that node has ended or is gone; "
                f"the same command on all nodes goes on"
            ) from None


def _gpus() -> int:
    import torch

    return max(1, torch.cuda.device_count())


def main() -> None:
    """Run the command line of this process and exit with its code."""
    try:
        code = start(meeting(os.environ), sys.argv[1:])
    except (InputError, RunError) as error:
        print(f"irdscale.nodes: {error}", file=sys.stderr, flush=True)
        code = 2 if isinstance(error, InputError) else 1
    sys.exit(code)


if __name__ == "__main__":
    main()
