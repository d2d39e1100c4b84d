"""How a verb ends: with its result, or with one line on stderr and an exit code."""

from __future__ import annotations

import errno
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress

import typer

from irdscale.cli.logs import log_to_stderr, quiet_libraries
from irdscale.cli.ranks import rank_of_this_process
from irdscale.distributed.process_group import tell_others
from irdscale.errors import InputError, RunError
from irdscale.utils.interrupts import terminable
from irdscale.utils.progress import say


@contextmanager
def ending(resumes: str = "") -> Iterator[None]:
    """Run a verb's body with stdout kept for the result, and turn expected errors into one line and an exit code.

    A bug still shows its traceback.

    Args:
        resumes: message on how to resume after an interrupt, left out if nothing was saved; SIGTERM then interrupts the
            verb as Ctrl-C does. Empty for verbs that save nothing.

    Raises:
        typer.Exit: the body failed.
    """
    quiet_libraries()
    log_to_stderr()
    try:
        with redirect_stdout(sys.stderr), warnings.catch_warnings(), terminable(enabled=bool(resumes)):
            if not sys.warnoptions:
                # Meant for authors of libraries; nobody who runs a verb can act on it.
                warnings.simplefilter("ignore", FutureWarning)
            yield
    except InputError as error:
        with suppress(InputError):
            tell_others(str(error))
        raise typer.Exit(complain(str(error), 2)) from None
    except RunError as error:
        raise typer.Exit(complain(str(error), 1)) from None
    except KeyboardInterrupt as interrupt:
        saved = resumes and getattr(interrupt, "saved", True)
        raise typer.Exit(complain(f"interrupted; {resumes}" if saved else "interrupted", 130)) from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise
        where = f"{error.filename}: " if error.filename else ""
        raise typer.Exit(complain(f"{where}{error.strerror}", 1)) from None


def complain(message: str, code: int) -> int:
    """Print one line on stderr and return the exit code."""
    rank, local_rank, _ = rank_of_this_process()
    # Ranks fail together; one line from each host is enough.
    if local_rank == 0:
        who = "irdscale" if rank == 0 else f"irdscale: rank {rank}"
        say(f"{who}: {' '.join(message.split())}")
    return code
