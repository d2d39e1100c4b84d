"""The `key=value` arguments that verbs take beside the configuration's keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class VerbKey:
    """An argument of a verb.

    Attributes:
        name: text before the equals sign.
        value: placeholder of the value, in capitals, or the allowed values themselves.
        meaning: description for `--help` and `irdscale help`.
        made_by_run: whether the value is an adapter or a mask, which an output folder of a run contains.
        required: whether the verb needs it.
    """

    name: str
    value: str
    meaning: str
    made_by_run: Literal["adapter", "mask"] | None = None
    required: bool = False

    @property
    def usage(self) -> str:
        """The argument as a user writes it."""
        return f"{self.name}={self.value}"

    @property
    def what(self) -> str:
        """What the value is, for errors."""
        return {"DIR": "folder", "FILE": "file"}.get(self.value, "value")

    @property
    def expected(self) -> str:
        """How to give the argument, for errors."""
        return " or ".join(f"{self.name}={value}" for value in self.choices)

    @property
    def choices(self) -> list[str]:
        """The values that `value` allows, where it names them."""
        return self.value.split("|")


_ADAPTER = "Adapter folder, output folder of a run that has one, or OWNER/NAME on the hub"
ADAPTER = VerbKey("adapter", "DIR", f"{_ADAPTER}.", "adapter")
NEEDED_ADAPTER = VerbKey("adapter", "DIR", f"{_ADAPTER}.", "adapter", required=True)
MASK = VerbKey(
    "mask", "DIR", "Mask folder, or output folder of a run that has one mask; if missing, a mask is made.", "mask"
)
TO = VerbKey("to", "DIR", "New folder for the checkpoint, or hub:OWNER/NAME to upload the adapter.", required=True)
TO_FILE = VerbKey("to", "FILE", "File for the predictions, as JSON lines.")
FORMAT = VerbKey(
    "format", "merged|shira", "Format: a plain Hugging Face checkpoint (merged, the default), or an adapter for PEFT."
)
INPUT = VerbKey("input", "FILE", "File of samples, with the task's columns; labels and answers may be missing.")
TEXT = VerbKey("text", "TEXT", "One text to predict.")
PLAN_KEYS = (
    VerbKey("nodes", "N", "Number of nodes; 1 if missing."),
    VerbKey("gpus_per_node", "N", "Number of GPUs of a node; 1 if missing."),
    VerbKey("gpu", "NAME", "Name of the GPU; h100-80gb if missing."),
    VerbKey("tokens", "N", "Tokens of the longest sample; task.max_length if missing."),
    VerbKey("train_samples", "N", "Samples of the train split; needed if train.steps is unset."),
)
