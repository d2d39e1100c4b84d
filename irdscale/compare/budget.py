"""The time of one call of a comparison: `--minutes N` starts only what is expected to end in time."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from irdscale.config.schema import RunConfig
from irdscale.distributed.ranks import broadcast_flag, broadcast_json, failing_together, rank_and_world, write_json_once
from irdscale.errors import InputError
from irdscale.search.candidates import Candidate, candidate_adapter
from irdscale.search.ledger import Ledger
from irdscale.search.runner import AskingEngine, WorkItem
from irdscale.utils.files import read_json

T = TypeVar("T")
# Seconds kept for the report, but no more than this share of the time.
REPORT_S, REPORT_SHARE = 15.0, 0.1
# Seconds of an evaluation beside those in the ledger, such as the start of its process on Ray; the last measured.
BESIDE = "beside_evaluation"


class OutOfTime(Exception):  # noqa: N818 - no error: the call ends with what there is
    """The next evaluation or pass is expected to end after the deadline; raised on every rank.

    Attributes:
        what: the next evaluation or pass, in words.
        seconds: its expected seconds.
        left: seconds to the deadline, on this rank's clock.
    """

    def __init__(self, what: str, seconds: float, left: float) -> None:
        super().__init__(what)
        self.what, self.seconds, self.left = what, seconds, left


class Budget:
    """The deadline of this process. Rank 0 decides for all ranks.

    Args:
        minutes: minutes from `started` to the end of the process.
        started: start of the process on `clock`.
        clock: seconds that only grow.

    Raises:
        InputError: `minutes` is not above 0.
    """

    def __init__(
        self, minutes: float, started: float | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        if not 0 < minutes < float("inf"):
            raise InputError(f"found {minutes:g}", "minutes above 0", key="--minutes")
        self.clock = clock
        seconds = 60 * minutes
        begin = clock() if started is None else started
        self._deadline = begin + seconds - min(REPORT_S, REPORT_SHARE * seconds)

    def left(self) -> float:
        """Seconds to the deadline, which leaves time for the report."""
        return self._deadline - self.clock()

    def ask(self, seconds: float, what: str) -> None:
        """Ask for so many seconds. Collective.

        Raises:
            OutOfTime: fewer are left.
        """
        left = self.left()
        if not broadcast_flag(left > 0 and left >= seconds):
            raise OutOfTime(what, seconds, left)


class TimedEngine:
    """An engine that asks a budget before each evaluation and each pass starts, also where several run side by side.

    The expected seconds of an evaluation are the longest in the ledger of its kind of method, else of any, and those of
    its start. Those of a pass are the longest of its kind in OUTPUT/fisher/seconds.json. What was never measured is
    started. After a refusal nothing more starts, and what runs ends.

    Args:
        kinds: method -> its kind.
    """

    def __init__(
        self,
        engine: AskingEngine,
        budget: Budget,
        ledger: Ledger,
        config: RunConfig,
        kinds: Mapping[str, str],
    ) -> None:
        self._engine, self._budget, self._ledger, self._config, self._kinds = engine, budget, ledger, config, kinds
        self._output = Path(config.output)
        self._measured = _read_seconds(_file(self._output))
        self._failed: set[str] = set()

    def call(self, work: Callable[..., T], *args: Any) -> T:
        """See `Engine.call`."""
        kind = _kind(work)
        self._budget.ask(self._longest(kind), kind)
        started = self._budget.clock()
        result = self._engine.call(work, *args)
        self._keep(kind, started)
        return result

    def call_all(
        self, calls: Sequence[WorkItem], ended: Callable[[int, Any], None] = lambda place, result: None
    ) -> list[Any]:
        """See `Engine.call_all`."""
        started = dict[int, float]()

        def starting(place: int) -> None:
            call = calls[place]
            kind = _kind(call.work)
            if call.light:
                self._ask_test(kind, call.args[0][0][0])
            elif _name(call) not in self._measured:
                words = next(one for one in call.args if isinstance(one, str))
                self._budget.ask(self._longest(kind), f"masks of {words}")
            started[place] = self._budget.clock()

        def keep(place: int, result: Any) -> None:
            kind = _kind(calls[place].work)
            self._keep(kind if calls[place].light else _name(calls[place]), started[place])
            ended(place, result)

        return self._engine.call_all(calls, keep, starting)

    def evaluate(self, candidates: Sequence[Candidate], ended: Callable[[dict[str, Any]], None]) -> None:
        """See `Engine.evaluate`; what failed in this process is not tried again by it."""
        started = dict[str, float]()

        def starting(candidate: Candidate) -> None:
            self._budget.ask(self._evaluation(candidate), f"{candidate.direction}, seed {candidate.seed}")
            started[candidate.key(self._config)] = self._budget.clock()

        def keep(record: dict[str, Any]) -> None:
            if record["status"] == "failed":
                self._failed.add(record["key"])
            else:
                self._measured.pop(BESIDE, None)
                self._keep(BESIDE, started[record["key"]] + record["seconds"])
            ended(record)

        wanted = [candidate for candidate in candidates if candidate.key(self._config) not in self._failed]
        if wanted:
            self._engine.evaluate(wanted, keep, starting)

    def _ask_test(self, kind: str, candidate: Candidate) -> None:
        """Ask for a test score; without its adapter, the candidate is trained again."""
        seconds = self._longest(kind)
        if not candidate_adapter(self._output, candidate.key(self._config)).exists():
            seconds += self._evaluation(candidate)
        self._budget.ask(seconds, f"the test metric of {candidate.direction}, seed {candidate.seed}")

    def _evaluation(self, candidate: Candidate) -> float:
        """Expected seconds of an evaluation."""
        kind = self._kinds.get(candidate.direction)
        of_kind = [record["seconds"] for record in self._ledger.records if self._kinds.get(record["direction"]) == kind]
        longest = max(of_kind or [record["seconds"] for record in self._ledger.records], default=0.0)
        return float(longest) + self._longest(BESIDE)

    def _longest(self, kind: str) -> float:
        """Longest seconds of a pass of this kind; 0 if none was measured."""
        return max((seconds for name, seconds in self._measured.items() if name.split()[0] == kind), default=0.0)

    def _keep(self, name: str, started: float) -> None:
        """Write a pass's seconds to disk; a pass that only read its masks keeps the earlier number."""
        seconds = max(0.0, round(self._budget.clock() - started, 3))
        # Each rank has its own clock, and all must write together.
        if broadcast_flag(seconds <= self._measured.get(name, -1.0)):
            return
        self._measured[name] = seconds
        write_json_once(_file(self._output), self._measured)


def _file(output: Path) -> Path:
    return output / "fisher" / "seconds.json"


def _read_seconds(file: Path) -> dict[str, float]:
    """Rank 0's measured seconds, on every rank.

    Raises:
        InputError: the file is damaged.
    """
    stored: dict[str, float] = {}
    with failing_together():
        if rank_and_world()[0] == 0 and file.exists():
            found = read_json(file, "list of seconds")
            if not isinstance(found, dict) or not all(isinstance(value, int | float) for value in found.values()):
                raise InputError("not a list of seconds", "this file deleted", where=file)
            stored = found
    read: dict[str, float] = broadcast_json(stored)
    return read


def _kind(work: Callable[..., Any]) -> str:
    return getattr(work, "__name__", "work")


def _name(call: WorkItem) -> str:
    """A pass's kind and arguments; the names of rankings and draws have the method and the seed."""
    return " ".join([_kind(call.work), *(str(one) for one in call.args if not isinstance(one, bool))])
