"""torchrun on one of several nodes, with failures as one line.

    python -m irdscale.distributed.multinode OPTIONS -m irdscale VERB ...

The options are torchrun's; launch/torchrun_multinode.sh sets them. Ranks use this node's address on the network of the
first node, whatever the hosts' names resolve to.

Exit codes: those of `irdscale`; 1 also if nodes do not join or are lost.
"""

from __future__ import annotations

import os
import socket
import sys

from irdscale.distributed.process_group import interfaces
from irdscale.errors import InputError, RunError


def own_address(head: str) -> str:
    """This host's address on the network of the first node.

    Raises:
        InputError: the first node's name cannot be resolved, or there is no route to it.
    """
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            # Sends nothing; the kernel chooses the route.
            probe.connect((head, 1))
            return str(probe.getsockname()[0])
    except OSError as error:
        raise InputError(f"found {head}: {error.strerror or error}", "a name or an IPv4 address", key="HEAD") from error


def start(arguments: list[str]) -> int:
    """Run torchrun with these arguments; returns the exit code of the first failed rank, or 0.

    Raises:
        InputError: see `own_address`.
        RunError: the first node does not answer, others do not join, a rank was killed, or a node was lost.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import (
        RendezvousClosedError,
        RendezvousConnectionError,
        RendezvousTimeoutError,
    )
    from torch.distributed.run import parse_args, run

    options = parse_args(arguments)
    place = options.rdzv_endpoint
    head = place.partition(":")[0]
    options.local_addr = own = own_address(head)
    # torchrun would resolve the host's name, which may be unknown, or the loopback's.
    if "is_host" not in options.rdzv_conf:
        options.rdzv_conf += f",is_host={int(own == socket.gethostbyname(head))}"
    # gloo would use the interface of the host's name, which may be the loopback.
    for interface in interfaces(own):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    try:
        run(options)
        return 0
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            raise RunError(f"rank {rank} was killed by signal {-failure.exitcode}; the same command goes on") from None
        return failure.exitcode
    except SignalException as signal:
        return 128 + int(signal.sigval)
    except RendezvousTimeoutError:
        raise RunError(
            f"fewer than {options.nnodes} nodes (NODES) met at {place} in time (WAIT); expected the same command there"
        ) from None
    except (RendezvousClosedError, RendezvousConnectionError):
        raise RunError(
            f"HEAD: the connection to {place} failed: that node does not answer, or its run has ended; "
            f"the same command on all nodes goes on"
        ) from None


def main() -> None:
    """Run the command line of this process and exit with its code."""
    try:
        code = start(sys.argv[1:])
    except (InputError, RunError) as error:
        print(f"irdscale.distributed.multinode: {error}", file=sys.stderr, flush=True)
        code = 2 if isinstance(error, InputError) else 1
    sys.exit(code)


if __name__ == "__main__":
    main()
