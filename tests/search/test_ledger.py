"""The ledger survives whatever kills its writer."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from irdscale.errors import InputError, RunError
from irdscale.search.ledger import FIELDS, Ledger, evaluation_key, read_ledger


def record(key: str = "a", status: str = "ok", **more: Any) -> dict[str, Any]:
    values = {"round": 0, "samples": 8, "params": 4, "seed": 0, "direction": "ird", "mask": "m", "metric": 0.5}
    return {**values, "status": status, "error": None, "seconds": 1.0, "key": key, **more}


def test_what_is_appended_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "out/ledger.jsonl"
    failed = record("b", "failed", metric=None, error='RunError: a "quote" }\n and a line')
    with Ledger(path) as ledger:
        ledger.append(record("a"))
        ledger.append(failed)
        ledger.append(record("b"))
    assert read_ledger(path) == [record("a"), failed, record("b")]
    with Ledger(path) as again:
        assert set(again.finished) == {"a", "b"}
    assert tuple(json.loads(path.read_text().split("\n")[1])) == FIELDS
    assert read_ledger(tmp_path / "none.jsonl") == []


def test_torn_at_any_byte(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "ledger.jsonl"
    with Ledger(path) as ledger:
        ledger.append(record("a"))
        whole = path.stat().st_size
        ledger.append(record("b", error='a } \\ quote" in it'))
    data = path.read_bytes()
    for end in range(whole, len(data)):
        path.write_bytes(data[:end])
        with Ledger(path) as ledger:
            known = {"a", "b"} if end == len(data) - 1 else {"a"}
            assert set(ledger.finished) == known, end
            ledger.append(record("c"))
        assert {r["key"] for r in read_ledger(path)} == known | {"c"}, end
    assert "skipped a record torn by a crash" in caplog.text


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("hello", "2: found invalid JSON; expected a ledger record"),
        ('{"round": 1}', "2: found other JSON; expected a ledger record with round, samples"),
        ("[1]", "2: found other JSON; expected a ledger record"),
        (f"{json.dumps(record('a'))}\n{json.dumps(record('a'))}", "3: found key a twice"),
    ],
)
def test_damaged_ledgers_name_the_row(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    path.write_text(f"\n{line}\n")
    with pytest.raises(InputError, match=f"ledger.jsonl:{message}"):
        Ledger(path)
    path.write_text("")
    Ledger(path).__exit__()


def test_what_must_not_be_written(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        ledger.append(record("a"))
        for bad in (record("a"), record("b", metric=float("nan")), record("b", metric=None)):
            with pytest.raises(ValueError, match="ledger"):
                ledger.append(bad)
        without = record("b")
        del without["seed"]
        with pytest.raises(ValueError, match="lacks seed"):
            ledger.append(without)
        assert [r["key"] for r in ledger.records] == ["a"]
    assert len(read_ledger(tmp_path / "ledger.jsonl")) == 1


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot write"):
        Ledger(tmp_path / "file/ledger.jsonl")


def test_killed_writer(tmp_path: Path) -> None:
    """SIGKILL a process that appends as fast as it can: every append that returned is there."""
    path = tmp_path / "ledger.jsonl"
    code = (
        "import sys, json\nfrom irdscale.search.ledger import Ledger\n"
        f"record = json.loads({json.dumps(record())!r})\n"
        "with Ledger(sys.argv[1]) as ledger:\n"
        "    for i in range(10**6):\n"
        "        key = f'{sys.argv[2]}-{i}'\n"
        "        ledger.append({**record, 'key': key})\n"
        "        print(key, flush=True)\n"
    )
    acknowledged: list[str] = []
    for attempt in range(3):
        command = [sys.executable, "-c", code, str(path), str(attempt)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            acknowledged.append(process.stdout.readline().strip())
            time.sleep(0.05)
            os.kill(process.pid, signal.SIGKILL)
            acknowledged += process.stdout.read().split()
    keys = [r["key"] for r in read_ledger(path)]
    assert set(acknowledged) <= set(keys)
    assert len(keys) == len(set(keys)) <= len(acknowledged) + 3
    assert len(acknowledged) > 3


def test_key_tells_evaluations_apart() -> None:
    keys = {evaluation_key(m, {"lr": lr}, s) for m in ("a", "b") for lr in (1, 2) for s in (0, 1)}
    assert len(keys) == 8
    assert evaluation_key("a", {"x": 1, "y": 2}, 0) == evaluation_key("a", {"y": 2, "x": 1}, 0)


def test_half_a_record_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "ledger.jsonl"
    path.write_text('\n{"round": 0, "sam')
    with caplog.at_level(logging.WARNING):
        assert read_ledger(path) == []
    assert "ledger.jsonl:2: skipped a record torn by a crash" in caplog.text
