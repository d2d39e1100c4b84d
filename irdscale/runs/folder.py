"""The output folder of a run: the configuration, data and model it belongs to, and its lock.

A folder belongs to one configuration and to the data and model that were read. The same call goes on or returns the
result; any other call is refused without --overwrite. OUTPUT/fisher/run.json is the folder's record.

A folder has parts, which verbs share: `mask` (fisher, and train without a mask), `training` (train) and `search`
(search and compare). Settings that do not change results (ranks, batches of a pass, paths) belong to no part.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from irdscale.config.loader import config_changes, same_search, without_paths
from irdscale.config.schema import HOW_TO_TRAIN, RunConfig, result_settings
from irdscale.distributed.deepspeed import zero_file
from irdscale.distributed.ranks import broadcast_json, failing_together, rank_and_world
from irdscale.errors import InputError, RunError
from irdscale.runs.identity import data_digests, model_changes, model_digests
from irdscale.runs.lock import locked
from irdscale.utils.files import read_json, write_json
from irdscale.utils.interrupts import Interrupted

if TYPE_CHECKING:
    from irdscale.tasks import Task

log = logging.getLogger(__name__)
FORMAT, VERSION = "irdscale-run", 1
DO = "the same command, another folder (output=...), or --overwrite"
# Keys of `fisher` that change a result by no more than rounding.
HOW_TO_PASS = {"batch_size", "save_minutes", "layout", "offload", "passes"}
_ADAPTER = ("adapter/adapter.json", "adapter/adapter.safetensors", "adapter/README.md")
_FIGURES = ("metric", "path", "density", "traces", "overlap")
_COMPARED = ("scores", "parameters", "differences", "rates")
# Files of each part. In a folder without a record, the first `SHOWING` of them show that there was a run.
WRITTEN = {
    "mask": (
        "mask/mask.json",
        "traces.json",
        "mask/mask.safetensors",
        "fisher/mask.json",
        "fisher/state-mask*/**/*.json",
        "fisher/state-mask*/**/*.safetensors",
    ),
    "training": (
        *_ADAPTER,
        "training/state.json",
        "training/numbers.safetensors",
        "result.json",
        "metrics.jsonl",
        "tensorboard/events.out.tfevents.*",
    ),
    "search": (
        "ledger.jsonl",
        "config.yaml",
        "result.json",
        "compare.json",
        *_ADAPTER,
        "test_scores.json",
        *(f"{name}.{kind}" for name in ("report", "compare") for kind in ("md", "html")),
        "scores.csv",
        *(f"figures/{name}.png" for name in (*_FIGURES, *_COMPARED)),
        "masks/*/mask.json",
        "masks/*/mask.safetensors",
        *(f"candidates/*/{file.partition('/')[2]}" for file in _ADAPTER),
        "candidates/*/state.json",
        "candidates/*/numbers.safetensors",
        "fisher/**/*.json",
        "fisher/**/*.safetensors",
        "trainings/*/metrics.jsonl",
        "tensorboard/**/events.out.tfevents.*",
    ),
}
# Files of a failed run that the next one may replace: a record of what happened, not work.
LOGS = {"metrics.jsonl", "tensorboard/events.out.tfevents.*"}
SHOWING = {"mask": 2, "training": 1, "search": 5}
# Files from which an interrupted run resumes.
SAVED = {
    "mask": ("fisher/mask.json", "fisher/state-mask*/state.json"),
    "training": ("training/state.json",),
    "search": ("ledger.jsonl", "fisher/**/masks.json", "fisher/**/state.json", "candidates/state-*/state.json"),
}
# Parts that both write OUTPUT/adapter.
CLASHING = {"training": "search", "search": "training"}


def mask_part(config: RunConfig) -> dict[str, Any]:
    """What a mask of `fisher.samples` samples depends on, besides data and model."""
    counted = {"count_head": True} if config.search.count_head else {}
    found: dict[str, Any] = {
        "fisher": config.fisher.model_dump(mode="json", exclude=HOW_TO_PASS) | {"scope": config.scope},
        "search": {"ratio": config.search.ratio, "seeds[0]": config.search.seeds[0], **counted},
    }
    if config.fisher.head_warmup:
        # The head's warm-up has no evaluations.
        found["train"] = config.train.model_dump(mode="json", exclude={*HOW_TO_TRAIN, "eval_steps", "keep"})
    return found


def training_part(config: RunConfig, mask: str | None) -> dict[str, Any]:
    """What a training depends on, besides data and model.

    Args:
        mask: hash of its mask; None for the folder's own.
    """
    train = result_settings(config.train.model_dump(mode="json"))
    train = {key: value for key, value in train.items() if key not in HOW_TO_TRAIN}
    return {"train": train, "search": {"seeds[0]": config.search.seeds[0]}, "mask": mask or "by search.ratio"}


def search_part(config: RunConfig) -> dict[str, Any]:
    """What a search or a comparison depends on, besides data and model."""
    found = same_search(config.model_dump(mode="json"))
    zero = {"deepspeed": zero_file(config)} if config.train.deepspeed else {}
    return {"fisher": found["fisher"], "search": found["search"], "train": found["train"] | zero}


class RunFolder:
    """An output folder locked by this run. Its methods are collective; rank 0 reads and writes."""

    def __init__(self, config: RunConfig, overwrite: bool) -> None:
        self._config, self._overwrite = config, overwrite
        self.output = Path(config.output)
        self._record: dict[str, Any] = {}
        self._claimed: list[str] = []
        self._new: list[str] = []

    def claim(self, task: Task | Callable[[], Task], parts: dict[str, dict[str, Any]], mask: str | None = None) -> None:
        """Claim parts of the folder for this run, or continue them.

        Args:
            task: the task, or a function that loads it, which only rank 0 calls.
            parts: name -> what the part depends on.
            mask: mask folder that the run reads and must not remove.

        Raises:
            InputError: the folder belongs to another configuration, other data or another model (names it).
        """
        with failing_together():
            if rank_and_world()[0] == 0:
                self._claim(task() if callable(task) else task, json.loads(json.dumps(parts)), mask)
        self._claimed = list(parts)

    def _claim(self, task: Task, parts: dict[str, dict[str, Any]], mask: str | None) -> None:
        before = read_record(self.output)
        base = _input(self._config, task, before)
        other = [] if before is None else _changes(before, base)
        known: dict[str, Any] = {} if before is None else before["parts"]
        found, clashing = list(other), [CLASHING[part] for part in parts if CLASHING.get(part) in known]
        for part, depends in parts.items():
            if part in known:
                # Another task or model implies these changes.
                found += [] if other else config_changes(known[part]["of"], depends)
            elif not clashing:
                self._refuse_unknown(part)
        found += [f"a {part}, whose adapter this would replace" for part in clashing]
        if self._overwrite:
            cleared = [part for part in known if other or part in parts or part in clashing]
            self._clear(cleared, mask)
            known = {part: kept for part, kept in known.items() if part not in cleared}
        elif found:
            raise InputError(f"{self.output} holds other work ({'; '.join(found)})", DO, key="output")
        self._new = [part for part in parts if part not in known]
        held = {part: known.get(part, {"of": depends}) for part, depends in parts.items()}
        self._record = {"format": FORMAT, "version": VERSION, **base, "parts": {**known, **held}}
        if self._record != before:
            write_json(record_file(self.output), self._record)

    def _refuse_unknown(self, part: str) -> None:
        """Refuse files without a record, which may be another program's or the user's."""
        there = [name for name in WRITTEN[part][: SHOWING[part]] if (self.output / name).exists()]
        if there:
            fault = f"{self.output} holds {', '.join(there)} without a record ({record_file(self.output)})"
            raise InputError(fault, "another folder (output=...), or these files moved away", key="output")

    def _clear(self, parts: list[str], mask: str | None) -> None:
        files = [file for part in parts for file in self._written(part)]
        if mask is not None and any(file.resolve().is_relative_to(Path(mask).resolve()) for file in files):
            raise InputError(f"{mask} is in a folder that --overwrite removes", "a copy elsewhere", key="mask")
        folders = {above for file in files for above in file.parents if above.is_relative_to(self.output)}
        record = record_file(self.output)
        for file in files:
            if file != record:
                file.unlink(missing_ok=True)
        for folder in sorted(folders - {self.output}, key=lambda path: -len(path.parts)):
            with suppress(OSError):
                folder.rmdir()

    def result(self, part: str, needs: str) -> dict[str, Any] | None:
        """The result of this part from a finished run; None if there is none or the file `needs` is missing."""
        kept = self._record.get("parts", {}).get(part, {}).get("result") if (self.output / needs).exists() else None
        found: dict[str, Any] | None = broadcast_json(kept)
        if found is not None:
            log.info("%s holds this work, finished; --overwrite runs it again", self.output)
        return found

    def keep(self, part: str, result: dict[str, Any]) -> None:
        """Record the part as finished, with its result."""
        with failing_together():
            if rank_and_world()[0] == 0:
                self._record["parts"][part]["result"] = result
                write_json(record_file(self.output), self._record)

    def withdraw(self) -> None:
        """Give up new parts of which nothing was written."""
        record = record_file(self.output)
        logs = {file for name in LOGS for file in self.output.glob(name)}
        unused = [part for part in self._new if set(self._written(part)) <= {record, *logs}]
        if not unused:
            return
        for part in unused:
            del self._record["parts"][part]
        if self._record["parts"]:
            write_json(record, self._record)
            return
        record.unlink(missing_ok=True)
        with suppress(OSError):
            record.parent.rmdir()

    def _written(self, part: str) -> list[Path]:
        return [file for name in WRITTEN[part] for file in self.output.glob(name)]

    def saved(self) -> bool:
        """Whether there is a saved state from which the same call resumes."""
        names = [name for part in self._claimed for name in SAVED[part]]
        return any(file.stat().st_size for name in names for file in self.output.glob(name))


@contextmanager
def held(config: RunConfig, overwrite: bool = False) -> Iterator[RunFolder]:
    """Lock the output folder of a run; collective, rank 0 holds the lock.

    Args:
        overwrite: whether to remove files of earlier work.

    Raises:
        InputError: another process holds the lock (names its host and process).
        Interrupted: the body was interrupted; says whether the same call resumes.
    """
    folder = RunFolder(config, overwrite)
    with ExitStack() as stack:
        with failing_together():
            if rank_and_world()[0] == 0:
                stack.enter_context(locked(folder.output, "output"))
        try:
            yield folder
        except KeyboardInterrupt as interrupt:
            saved = folder.saved()
            folder.withdraw()
            raise Interrupted(saved) from interrupt
        except Exception:
            with suppress(OSError, RunError):
                folder.withdraw()
            raise


def refuse_other_input(config: RunConfig, task: Task) -> None:
    """Check that data and model are those of the folder's results; writes nothing.

    Raises:
        InputError: the data or the model differ (names them).
    """
    before = read_record(Path(config.output))
    if before is not None:
        found = _changes(before, _input(config, task, before))
        if found:
            raise InputError(f"{config.output} holds other work ({'; '.join(found)})", "the same input", key="output")


def record_file(output: Path) -> Path:
    """File with the folder's record."""
    return output / "fisher" / "run.json"


def read_record(output: Path) -> dict[str, Any] | None:
    """The folder's record; None if there is none.

    Raises:
        InputError: it is damaged.
    """
    file = record_file(output)
    if not file.exists():
        return None
    found = read_json(file, "record of a run")
    if not isinstance(found, dict) or found.get("format") != FORMAT or found.get("version") != VERSION:
        raise InputError("not the record of a run", DO.removeprefix("the same command, "), where=file)
    return found


def _input(config: RunConfig, task: Task, before: dict[str, Any] | None) -> dict[str, Any]:
    """The part of a record on configuration, data and model."""
    dumped = config.model_dump(mode="json", include={"model", "task"})
    places = {"model.path": config.model.path, "task.dataset": config.task.dataset}
    model = model_digests(config.model, None if before is None else before["model"])
    return {"config": without_paths(dumped), "places": places, "data": data_digests(task), "model": model}


def _changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Lines on the differences between a record and what is read now."""
    places = {key: f"{before['places'].get(key)} -> {now['places'][key]}" for key in now["places"]}
    changed = {key: words for key, words in places.items() if before["places"].get(key) != now["places"][key]}
    found = config_changes(before["config"], now["config"])
    files = model_changes(before["model"], now["model"])
    if files:
        place = changed.get("model.path", now["places"]["model.path"])
        found.append(f"model.path: {place}: other contents of {', '.join(files)}")
    splits = [name for name in {**before["data"], **now["data"]} if before["data"].get(name) != now["data"].get(name)]
    # Another task or tokenizer implies other samples.
    if splits and not found:
        place = changed.get("task.dataset", now["places"]["task.dataset"])
        found.append(f"task.dataset: {place}: other samples in {', '.join(splits)}")
    return found
