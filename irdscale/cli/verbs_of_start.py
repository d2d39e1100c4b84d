"""The verbs for a start: `init` writes a configuration, `help` and `schema` describe its keys."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from irdscale.cli.app import verb
from irdscale.cli.arguments import Json, Overrides
from irdscale.cli.completion import complete_key, complete_kind
from irdscale.cli.console import show
from irdscale.cli.ending import ending


@verb("irdscale init --data my.jsonl --model ./llama")
def init(
    overrides: Overrides = None,
    data: Annotated[
        str, typer.Option("--data", metavar="FILE", help="Data: a file, or a folder of splits; needed.")
    ] = "",
    model: Annotated[
        str, typer.Option("--model", metavar="PATH", help="Model: a local folder, a hub id or a GGUF file.")
    ] = "",
    task: Annotated[
        str,
        typer.Option(
            "--task", metavar="KIND", help="Kind of task, if the data allow several.", autocompletion=complete_kind
        ),
    ] = "",
    as_json: Json = False,
) -> None:
    """Look at your data and write a commented configuration for them to stdout.

    What was assumed goes to stderr. Where the data allow two kinds of task or two choices of columns, both are listed
    with the option that decides, and nothing is written: exit code 2. A key=value, such as task.columns.label=stars,
    decides what it says.
    """
    with ending():
        from irdscale.cli.init import run_init

        result = run_init(data, model or None, task or None, overrides or [], tell=not as_json)
    show(result, as_json, lambda: print(result["yaml"], end=""))


@verb("irdscale help train.learning_rate")
def help_(
    key: Annotated[
        str | None,
        typer.Argument(metavar="[KEY]", help="A key, a section or an argument.", autocompletion=complete_key),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show type, default, values and meaning of a key, of the keys of a section, or of all keys."""
    with ending():
        from irdscale.cli.key_help import describe, print_help

        result = describe(key)
    show(result, as_json, lambda: print_help(result))


@verb("irdscale schema > irdscale.schema.json")
def schema(as_json: Json = False) -> None:
    """Print the JSON schema of a configuration, for editors.

    Editors with a YAML language server complete and check a file that begins with the line `# yaml-language-server:
    $schema=irdscale.schema.json`.
    """
    with ending():
        from irdscale.config.keys import editor_schema

        result = editor_schema()
    print(json.dumps(result, indent=2))
