"""Arguments that verbs share: the configuration file, `key=value` changes, and options."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from irdscale.cli.app import VERB_KEYS
from irdscale.cli.completion import complete_change
from irdscale.cli.made_by_runs import find_made
from irdscale.errors import InputError
from irdscale.utils.suggestions import nearest

if TYPE_CHECKING:
    from irdscale.cli.early_checks import Reads
    from irdscale.config.schema import RunConfig

Config = Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file, such as configs/quickstart.yaml.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Changes to the configuration, such as search.ratio=0.01; `irdscale help` lists the keys.",
        autocompletion=complete_change,
    ),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Delete what irdscale wrote to the output folder before, and start again.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else, on stdout.")]


def load_arguments(
    verb: str, config: str, overrides: list[str] | None, reads: Reads = "data"
) -> tuple[RunConfig, dict[str, str]]:
    """Read the configuration and the verb's own `key=value` arguments, and check what needs no data and no weights.

    Args:
        reads: inputs of the verb, which must be where the configuration says.

    Raises:
        InputError: an argument is missing, empty, unknown or given twice; or as `irdscale.config.loader.load_config`
            and `irdscale.cli.early_checks.check_early`.
    """
    given, rest = _own_arguments(verb, overrides or [])
    from irdscale.cli.early_checks import check_early
    from irdscale.config.loader import load_config, refuse_repeated

    _refuse_unknown(verb, rest)
    refuse_repeated(rest, "command line")
    for key in VERB_KEYS[verb]:
        if key.required and key.name not in given:
            raise InputError("missing", f"{key.usage} among the arguments", key.name)
    settings = load_config(config, rest)
    check_early(settings, reads)
    for key in VERB_KEYS[verb]:
        if key.made_by_run is not None and key.name in given:
            given[key.name] = find_made(key.made_by_run, given[key.name])
    return settings, given


def _own_arguments(verb: str, overrides: list[str]) -> tuple[dict[str, str], list[str]]:
    """The verb's own arguments, and the others, which change the configuration."""
    own = {key.name: key for key in VERB_KEYS[verb]}
    given: dict[str, str] = {}
    rest: list[str] = []
    for override in overrides:
        name, _, value = override.partition("=")
        if name not in own:
            rest.append(override)
        elif not value:
            raise InputError(f"found no {own[name].what}", own[name].expected, name)
        elif name in given:
            raise InputError("given twice", key=name)
        elif "|" in own[name].value and value not in own[name].choices:
            raise InputError(
                f"found {value!r}{nearest(value, own[name].choices)}", " or ".join(own[name].choices), name
            )
        elif own[name].value == "N" and not (value.isdecimal() and int(value) >= 1):
            raise InputError(f"found {value!r}", "a number of at least 1", name)
        else:
            given[name] = value
    return given, rest


def _refuse_unknown(verb: str, overrides: list[str]) -> None:
    """Refuse a `key=value` whose key is neither the verb's nor the configuration's; the error names the nearest."""
    from irdscale.config.keys import key_ending_in
    from irdscale.config.schema import RunConfig

    own = [key.name for key in VERB_KEYS[verb]]
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or not key or key.partition(".")[0] in RunConfig.model_fields:
            continue
        takers = [name for name, keys in VERB_KEYS.items() if any(key == each.name for each in keys)]
        if takers:
            taken = f"(irdscale {' and irdscale '.join(takers)} {'takes' if len(takers) == 1 else 'take'} it)"
            raise InputError(f"unknown key of irdscale {verb} {taken}", key=key, where="command line")
        inside = key_ending_in(key)
        near = inside or nearest(key.partition(".")[0], [*own, *_sections()])
        if inside or own:
            expected = "" if near else f"one of {', '.join([*own, *_sections()])}"
            raise InputError(f"unknown key{near}", expected, key, "command line")


def _sections() -> list[str]:
    from irdscale.config.schema import RunConfig

    return list(RunConfig.model_fields)
