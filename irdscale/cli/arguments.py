"""Arguments that verbs share: the configuration file, `key=value` changes, and options."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from irdscale.errors import InputError

if TYPE_CHECKING:
    from irdscale.config.schema import RunConfig

Config = Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file, such as configs/quickstart.yaml.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Changes to the configuration, such as search.ratio=0.01."),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Delete what irdscale wrote to the output folder before, and start again.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else, on stdout.")]


# Argument that names no folder -> what its value is, and how to give it.
_VALUES = {
    "format": ("value", "format=merged or format=shira"),
    "input": ("file", "input=FILE"),
    "text": ("text", "text=TEXT"),
}


def load_arguments(
    config: str,
    overrides: list[str] | None,
    takes: tuple[str, ...] = (),
    needs: tuple[str, ...] = (),
    files: tuple[str, ...] = (),
) -> tuple[RunConfig, dict[str, str]]:
    """Read the configuration and the verb's own `key=value` arguments.

    Args:
        takes: keys of the verb's own arguments.
        needs: keys of `takes` that are required.
        files: keys of `takes` that name a file, not a folder.

    Raises:
        InputError: an argument is missing, empty or given twice; or as `irdscale.config.loader.load_config`.
    """
    given: dict[str, str] = {}
    rest: list[str] = []
    for override in overrides or ():
        key, _, value = override.partition("=")
        if key not in takes:
            rest.append(override)
        elif not value:
            what, expected = _VALUES.get(key, ("file", f"{key}=FILE") if key in files else ("folder", f"{key}=DIR"))
            raise InputError(f"found no {what}", expected, key)
        elif key in given:
            raise InputError("given twice", key=key)
        else:
            given[key] = value
    for key in needs:
        if key not in given:
            raise InputError("missing", f"{key}=DIR among the arguments", key)
    from irdscale.config.loader import load_config

    return load_config(config, rest), given
