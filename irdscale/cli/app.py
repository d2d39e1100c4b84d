"""The `irdscale` command, to which `irdscale.cli.verbs` adds its verbs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Annotated, Any, TypeVar

import typer
from typer.core import TyperCommand

from irdscale.cli.keys import VerbKey

Verb = TypeVar("Verb", bound=Callable[..., None])
# Verb -> the `key=value` arguments that it takes beside the configuration's keys.
VERB_KEYS: dict[str, tuple[VerbKey, ...]] = {}

app = typer.Typer(
    name="irdscale",
    help="Find the few parameters worth training and the samples that tell which, then train just those.",
    epilog="Start with:\n\nirdscale search configs/quickstart.yaml\n\n"
    "Your own data:\n\nirdscale init --data my.jsonl --model ./llama > my.yaml",
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


class _Documented(TyperCommand):
    """A verb whose help lists its own `key=value` arguments as arguments."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        parsed = self.params
        # Click parses none of them: they come in any order among the other changes of the configuration.
        place = next((i for i, each in enumerate(parsed) if each.name == "overrides"), len(parsed))
        self.params = [*parsed[:place], *_as_arguments(VERB_KEYS.get(str(self.name), ())), *parsed[place:]]
        try:
            super().format_help(ctx, formatter)
        finally:
            self.params = parsed


def _as_arguments(keys: Iterable[VerbKey]) -> list[Any]:
    """The keys as typer's arguments, made as typer makes those of a function, in every version of it."""

    def function() -> None:
        pass

    parameters = []
    for key in keys:
        shown = Annotated[str, typer.Argument(metavar=key.usage, help=key.meaning, show_default=False)]
        default = inspect.Parameter.empty if key.required else ""
        parameters.append(
            inspect.Parameter(key.name, inspect.Parameter.KEYWORD_ONLY, annotation=shown, default=default)
        )
    function.__annotations__ = {each.name: each.annotation for each in parameters}
    function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    made = typer.Typer(add_completion=False)
    made.command()(function)
    return [each for each in typer.main.get_command(made).params if each.name in function.__annotations__]


def verb(example: str, *keys: VerbKey) -> Callable[[Verb], Verb]:
    """Add a function to the command as a verb of its name, with this example in its help.

    Args:
        keys: the verb's own `key=value` arguments.
    """

    def add(function: Verb) -> Verb:
        name = function.__name__.rstrip("_")
        VERB_KEYS[name] = keys
        return app.command(name, cls=_Documented, epilog=f"Example:\n\n{example}")(function)

    return add


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
