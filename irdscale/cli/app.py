"""The `irdscale` command, to which `irdscale.cli.verbs` adds its verbs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, TypeVar

import typer

Verb = TypeVar("Verb", bound=Callable[..., None])

app = typer.Typer(
    name="irdscale",
    help="Find the few parameters worth training and the samples that tell which, then train just those.",
    epilog="Start with:\n\nirdscale search configs/quickstart.yaml",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def verb(example: str) -> Callable[[Verb], Verb]:
    """Add a function to the command as a verb of its name, with this example in its help."""
    return app.command(epilog=f"Example:\n\n{example}")


def verbs() -> list[str]:
    """The names of all verbs, in the order of the help."""
    return [str(info.name or getattr(info.callback, "__name__", "")) for info in app.registered_commands]


def _print_version(wanted: bool) -> None:
    if wanted:
        from irdscale import __version__

        typer.echo(f"irdscale {__version__}")
        raise typer.Exit


@app.callback()
def _irdscale(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    # The deepspeed launcher passes it to every program; the environment says the same.
    local_rank: Annotated[int, typer.Option("--local_rank", hidden=True)] = 0,
) -> None:
    pass
