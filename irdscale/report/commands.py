"""Commands and Python code that can be pasted into a shell as they are."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from irdscale.config.kinds import LANGUAGE_KINDS
from irdscale.errors import InputError
from irdscale.models.places import is_gguf, resolve_model_path


def command(verb: str, config: Path, *arguments: str) -> str:
    """A command line of irdscale, with absolute paths and quotes where a shell needs them."""
    found = shutil.which("irdscale")
    program = ["irdscale"] if found else [sys.executable, "-m", "irdscale"]
    return shlex.join([*program, verb, str(config.absolute()), *arguments])


def use_commands(result: Mapping[str, Any], output: Path) -> list[tuple[str, str]]:
    """What each command does with the winner's adapter, and the command."""
    config, adapter = output / "config.yaml", f"adapter={(output / result['best']['adapter']).absolute()}"
    found = [
        ("measure it on the test split", command("evaluate", config, adapter)),
        (
            "predict the test split",
            command("predict", config, adapter, f"to={output.absolute() / 'predictions.jsonl'}"),
        ),
    ]
    text = "Once upon a time" if result["task"]["kind"] in LANGUAGE_KINDS else "A text of your own"
    columns = result["config"].get("task", {}).get("columns") or {}
    if len(columns.get("text") or ()) < 2 and not columns.get("choices"):
        found.append(("predict a text of your own", command("predict", config, adapter, f"text={text}")))
    merged = f"to={output.absolute() / 'merged'}"
    return [*found, ("write a plain Hugging Face checkpoint", command("export", config, adapter, merged))]


def use_python(result: Mapping[str, Any], output: Path) -> str | None:
    """Python code that loads the base model and the winner's adapter; None for a base that takes more options."""
    model, path = result["config"].get("model", {}), result["model"]["path"]
    if model.get("quantize") or is_gguf(path):
        return None
    try:
        place = resolve_model_path(path)
    except InputError:
        # The model is gone, or on another machine.
        place = path
    place = str(Path(place).absolute()) if Path(place).is_dir() else place
    task = result["task"]
    auto = "AutoModelForCausalLM" if task["kind"] in LANGUAGE_KINDS else "AutoModelForSequenceClassification"
    options = [repr(place), f"dtype={model.get('dtype', 'float32')!r}"]
    options += [f"num_labels={task['num_labels']}"] if task["num_labels"] else []
    options += ["trust_remote_code=True"] if model.get("trust_remote_code") else []
    return (
        f"import irdscale\nfrom transformers import {auto}\n\n"
        f"model = {auto}.from_pretrained({', '.join(options)})\n"
        f"irdscale.load_adapter(model, {str((output / result['best']['adapter']).absolute())!r})"
    )
