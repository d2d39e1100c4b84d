"""The verbs that show samples: `data` before training, `predict` after it. Each calls one function."""

from __future__ import annotations

from pathlib import Path

import typer

from irdscale.cli.app import verb
from irdscale.cli.arguments import Config, Json, Overrides, load_arguments
from irdscale.cli.console import show
from irdscale.cli.ending import complain, ending
from irdscale.cli.keys import ADAPTER, INPUT, TEXT, TO_FILE
from irdscale.cli.ranks import launched_ranks
from irdscale.cli.samples import print_data, print_prediction, print_predictions
from irdscale.distributed.process_group import alone
from irdscale.training.targets import check_predict
from irdscale.utils.files import check_writable
from irdscale.utils.formats import counted


@verb("irdscale data configs/quickstart.yaml")
def data(config: Config, overrides: Overrides = None, as_json: Json = False) -> None:
    """Show the learned tokens: samples of each split, classes, token lengths, and refused rows.

    Learned tokens are coloured on a terminal, and in brackets elsewhere. Loads no weights. With refused rows, the exit
    code is 2.
    """
    with ending():
        alone("data")
        settings, _ = load_arguments("data", config, overrides)
        from irdscale.tasks.preview import run_data

        result = run_data(settings)
    show(result, as_json, lambda: print_data(result))
    if result["refused"]["rows"]:
        first = result["refused"]["first"][0]
        raise typer.Exit(complain(f"{counted(result['refused']['rows'], 'row')} refused; the first: {first['why']}", 2))


@verb("irdscale predict configs/quickstart.yaml adapter=runs/a/adapter to=out.jsonl", ADAPTER, INPUT, TEXT, TO_FILE)
def predict(config: Config, overrides: Overrides = None, as_json: Json = False) -> None:
    """Predict classes, numbers, choices or completions with an adapter.

    The samples are the task's test split, those of input=FILE, or text=TEXT. Writes JSON lines in the order of the rows
    to stdout, or to=FILE. Without adapter=, the base model predicts, unless its head is new. Under torchrun, all ranks
    share the samples.
    """
    with ending():
        settings, given = load_arguments("predict", config, overrides)
        check_predict(given.get("input"), given.get("text"), given.get("to"))
        if "to" in given:
            check_writable(Path(given["to"]).parent, "to")
        with launched_ranks(settings, train=False):
            from irdscale.training.predict import run_predict

            result = run_predict(settings, **given, progress=True)
    if "to" in given:
        show(result, as_json)
    elif "text" in given:
        show(result, as_json, lambda: print_prediction(result["predictions"][0]))
    else:
        show(result, as_json, lambda: print_predictions(result["predictions"]))
