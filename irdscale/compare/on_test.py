"""The test step of a comparison: each score is measured once and kept in OUTPUT/test_scores.json."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from irdscale.compare.state import Study
from irdscale.distributed.ranks import broadcast_json, failing_together, rank_and_world, write_json_once
from irdscale.search.candidates import Candidate, score_base, score_on_test
from irdscale.search.runner import WorkItem
from irdscale.utils.files import read_json
from irdscale.utils.progress import bar

SCORES = "test_scores.json"


def scores_on_test(study: Study, chosen: Sequence[Candidate]) -> dict[str, tuple[float, float]]:
    """Key -> test metric of a chosen candidate and its standard error; each is written to disk at once."""
    by_key = {candidate.key(study.config): candidate for candidate in chosen}
    study.runner.drop({one.key(study.config) for tried in study.tried.values() for one in tried} - by_key.keys())
    stored = _stored_scores(study)
    known: dict[str, tuple[float, float]] = {key: tuple(stored[key]) for key in by_key if key in stored}
    missing = [key for key in by_key if key not in known]

    items = [WorkItem(score_on_test, ([(by_key[key], False)],), light=True) for key in missing]
    shown = study.progress and bool(missing) and rank_and_world()[0] == 0
    with bar("Test scores", len(by_key), enabled=shown) as advance:
        advance(len(known), earlier=True)

        def keep(place: int, scores: list[tuple[float, float]]) -> None:
            (known[missing[place]],) = scores
            write_json_once(study.output / SCORES, stored | known)
            advance(note=str(by_key[missing[place]]))

        study.engine.call_all(items, keep)
    return known


def _stored_scores(study: Study) -> dict[str, Any]:
    """Test scores of earlier calls by key, and under "base" those of the base model."""
    file, found = study.output / SCORES, {}
    with failing_together():
        if rank_and_world()[0] == 0 and file.exists():
            found = read_json(file, "list of test scores")
    stored: dict[str, Any] = broadcast_json(found)
    return stored


def base_scores(study: Study) -> list[float]:
    """The base model's selection metric, test metric and standard error on test; measured once for a folder."""
    stored = _stored_scores(study)
    if "base" not in stored:
        stored["base"] = list(study.engine.call(score_base))
        write_json_once(study.output / SCORES, stored)
    base: list[float] = stored["base"]
    return base
