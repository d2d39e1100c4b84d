"""The entry point of the `irdscale` command.

Exit codes: 0 done, 1 failed, 2 bad input, 130 interrupted. Results go to stdout; progress, logs and errors to stderr.
"""

from __future__ import annotations

import sys
from typing import Any, NoReturn

import typer

# Add the verbs to `app`.
import irdscale.cli.verbs
import irdscale.cli.verbs_of_samples
import irdscale.cli.verbs_of_start  # noqa: F401
from irdscale.cli.app import app, verbs
from irdscale.cli.ending import complain
from irdscale.distributed.process_group import leave
from irdscale.utils.suggestions import nearest

# The base class of all usage errors, in a typer that depends on click and in one that brings its own copy.
UsageError: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")


def main() -> NoReturn:
    """Run the command line of this process and exit with its code."""
    leave(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run `irdscale ARGUMENTS` in this process and return its exit code."""
    verb = next((argument for argument in arguments if not argument.startswith("-")), None)
    if verb is not None and verb not in verbs():
        return complain(f"found verb {verb!r}{nearest(verb, verbs())}; expected one of {', '.join(verbs())}", 2)
    command = typer.main.get_command(app)
    try:
        code = command.main(args=arguments or ["--help"], prog_name="irdscale", standalone_mode=False)
    except UsageError as error:
        return complain(error.format_message(), 2)
    except typer.Abort:
        return complain("interrupted", 130)
    if not arguments:
        return 2
    return code if isinstance(code, int) else 0
