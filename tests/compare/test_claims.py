"""Claims of a comparison: which methods they are on, their evidence, and verdicts that both sides can lose."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from typing import Any

import pytest
from scipy.stats import ttest_rel

from irdscale.compare.claims import claim_rows, claims_of, how_to_read
from irdscale.report.statistics import holm
from tests.compare.fake import ALL, around, everything, study

# At turn 1 the differences to IRD vary by seed.
IRD = around(0.70)
FAR, NEAR, BETTER = around(0.65, turn=1), around(0.699, turn=1), around(0.75, turn=1)


def verdicts(compared: dict[str, Any]) -> dict[str, str | None]:
    return {claim["claim"]: claim["verdict"] for claim in claims_of(compared)}


def renamed(compared: dict[str, Any], names: dict[str, str], variants: dict[str, list[str]]) -> dict[str, Any]:
    """A study whose methods have other names, of presets or variants."""
    methods = [
        one | {"name": names[one["name"]], "label": names[one["name"]]} if one["name"] in names else one
        for one in compared["methods"]
    ]
    return compared | {"methods": methods, "config": {"compare": {"variants": variants}}}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        # Sorted: 3 x 0.01, 2 x 0.02, 1 x 0.04.
        ([0.04, 0.01, 0.02], [0.04, 0.03, 0.04]),
        # 4 x 0.01 = 0.04; 3 x 0.03 = 0.09, which is also the least of the later ones; 2 x 0.04 = 0.08; 1 x 0.05.
        ([0.01, 0.04, 0.03, 0.05], [0.04, 0.09, 0.09, 0.09]),
        ([0.4, 0.9], [0.8, 0.9]),
        ([0.6, 0.9], [1.0, 1.0]),
        ([0.02, 0.02], [0.04, 0.04]),
        ([0.03], [0.03]),
        ([], []),
    ],
)
def test_holm_by_hand(values: list[float], expected: list[float]) -> None:
    assert holm(values) == pytest.approx(expected)


def test_claims_are_in_order_and_only_on_what_was_compared() -> None:
    assert [claim["claim"] for claim in claims_of(everything())] == [
        "IRD over FISH",
        "IRD over reverse IRD",
        "IRD over FISH, best of draws",
        "FISH over random mask",
        "FISH over magnitude mask",
        "FISH over LoRA, equal parameters",
    ]
    some = study({"magnitude_mask": FAR, "fish": IRD, "full": FAR}, reference="fish")
    assert [(claim["better"], claim["than"]) for claim in claims_of(some)] == [("fish", "magnitude_mask")]
    assert claims_of(study({"ird": IRD, "full": FAR, "bitfit": FAR})) == []


@pytest.mark.parametrize(
    ("fish", "verdict"),
    [
        (FAR, "holds"),
        (BETTER, "contradicted"),
        (NEAR, "not told apart"),
        (IRD, "not told apart"),
        ([*FAR[:2], None, None, None], "too few seeds"),
        ([None] * 5, "too few seeds"),
        ([*FAR[:3], None, None], "holds"),
    ],
)
def test_verdicts(fish: list[float | None], verdict: str) -> None:
    assert verdicts(study({"ird": IRD, "fish": fish})) == {"IRD over FISH": verdict}


def test_a_metric_that_is_not_finite_is_a_failed_seed() -> None:
    compared = study({"ird": IRD, "fish": FAR})
    for place, value in enumerate((math.nan, math.inf)):
        compared["methods"][1]["seeds"][place]["test"] = value
    (claim,) = claims_of(compared)
    assert (claim["n"], claim["wins"], claim["verdict"]) == (3, 3, "holds")
    compared["methods"][0]["seeds"][2]["test"] = math.nan
    (claim,) = claims_of(compared)
    assert (claim["n"], claim["p"], claim["verdict"]) == (2, None, "too few seeds")


def test_evidence_is_the_paired_difference() -> None:
    (claim,) = claims_of(study({"ird": IRD, "fish": NEAR}))
    expected = ttest_rel(IRD, NEAR)
    limits = expected.confidence_interval(0.95)
    assert claim["p"] == claim["p_holm"] == pytest.approx(expected.pvalue)
    assert [claim[key] for key in ("mean", "low", "high")] == pytest.approx([0.001, limits.low, limits.high])
    assert claim["wins"] == sum(a > b for a, b in zip(IRD, NEAR, strict=True))
    assert (claim["n"], claim["trainings"], claim["params"]) == (5, [10.0, 10.0], [520.0, 520.0])


def test_a_lower_metric_that_is_better_is_a_positive_gain() -> None:
    losses = {"ird": around(3.38), "fish": around(3.42, turn=1), "reverse": around(3.30, turn=1)}
    over_fish, over_reverse = claims_of(study(losses, lower_is_better=True))
    assert over_fish["mean"] == pytest.approx(0.04)
    assert 0 < over_fish["low"] < over_fish["mean"] < over_fish["high"]
    assert (over_fish["wins"], over_fish["losses"], over_fish["verdict"]) == (5, 0, "holds")
    assert over_reverse["high"] < 0
    assert (over_reverse["wins"], over_reverse["losses"], over_reverse["verdict"]) == (0, 5, "contradicted")
    assert "positive if the first method is better (lower loss)" in how_to_read(study(losses, True), [over_fish])
    assert verdicts(study(losses)) == {"IRD over FISH": "contradicted", "IRD over reverse IRD": "holds"}


def test_claims_are_corrected_for_their_number() -> None:
    # The t-test of this one gives p = 0.043.
    close = around(0.691, turn=1)
    (alone,) = claims_of(study({"ird": IRD, "fish": close}))
    assert 0.04 < alone["p"] == alone["p_holm"] < 0.045
    assert alone["verdict"] == "holds"
    among = claims_of(study({"ird": IRD, "reverse": NEAR, "fish_best": [None] * 5, "fish": close}))
    assert [claim["verdict"] for claim in among] == ["not told apart", "not told apart", "too few seeds"]
    assert among[0]["p"] == alone["p"]
    # Two claims have a p; that of too few seeds is none of them.
    assert among[0]["p_holm"] == pytest.approx(2 * alone["p"])
    assert among[2]["p"] is among[2]["p_holm"] is None


@pytest.mark.parametrize(("seeds", "verdict", "p"), [(5, "not told apart", 1 / 16), (6, "holds", 1 / 32)])
def test_equal_differences_are_tested_by_their_signs(seeds: int, verdict: str, p: float) -> None:
    compared = study({"ird": [0.75] * seeds, "fish": [0.5] * seeds})
    (claim,) = claims_of(compared)
    assert (claim["verdict"], claim["p"], claim["low"], claim["high"]) == (verdict, p, 0.25, 0.25)
    assert "p is of the sign test" in how_to_read(compared, [claim])
    (same,) = claims_of(study({"ird": [0.75] * 6, "fish": [0.75] * 6}))
    assert (same["verdict"], same["p"]) == ("not told apart", 1.0)
    assert "sign test" not in how_to_read(compared, claims_of(study({"ird": IRD, "fish": FAR})))


@pytest.mark.parametrize(("size", "fits"), [(520, True), (546, True), (494, True), (547, False), (8192, False)])
def test_lora_is_compared_at_equal_parameters(size: int, fits: bool) -> None:
    compared = study({"fish": IRD, "lora": BETTER}, reference="fish", changes={"lora": {"params": size}})
    (claim,) = claims_of(compared)
    assert claim["claim"] == "FISH over LoRA, equal parameters"
    assert claim["verdict"] == ("contradicted" if fits else None)
    assert (claim["p"] is None) == (claim["p_holm"] is None) == (not fits)
    shown = claim_rows([claim])[0][-1]
    assert shown == ("contradicted" if fits else f"none: sizes differ (520 and {size:,} parameters)")


def test_lora_of_equal_size_comes_before_a_plain_one() -> None:
    compared = study({"fish": IRD, "lora": FAR, "bitfit": FAR}, reference="fish", changes={"bitfit": {"params": 530.0}})
    (claim,) = claims_of(renamed(compared, {"bitfit": "fitted"}, {"fitted": ["lora", "compare.lora.rank=auto"]}))
    assert (claim["than"], claim["params"], claim["verdict"]) == ("fitted", [520, 530], "holds")
    compared["methods"][1]["params"] = 540.0
    (claim,) = claims_of(renamed(compared, {"bitfit": "fitted"}, {"fitted": ["lora", "compare.lora.rank=auto"]}))
    assert claim["than"] == "lora"


def test_lora_without_a_verdict_is_not_counted_by_holm() -> None:
    over_fish, over_lora = claims_of(study({"ird": IRD, "fish": NEAR, "lora": FAR}))
    assert over_fish["p_holm"] == over_fish["p"]
    assert over_lora["verdict"] is None


def test_the_methods_of_a_claim_are_told_by_kind() -> None:
    plain = study({"ird": IRD, "reverse": FAR, "fish": FAR, "fish_small": FAR})
    variants = {"brief": ["ird", "search.max_rounds=1"]}
    assert list(verdicts(renamed(plain, {"ird": "brief"}, variants))) == ["brief over FISH", "brief over reverse IRD"]
    # A plain method comes before a variant, in whatever order they are.
    assert list(verdicts(renamed(plain, {"fish_small": "fish_layerwise"}, {}))) == [
        "IRD over FISH",
        "IRD over reverse IRD",
    ]
    assert list(verdicts(renamed(plain, {"reverse": "ird", "ird": "brief"}, variants))) == ["ird over FISH"]
    # Masks with one scope come before a plain method.
    layerwise = {"reverse": "ird_layerwise", "fish": "fish_layerwise"}
    assert list(verdicts(renamed(plain, layerwise, {}))) == ["ird_layerwise over fish_layerwise"]


@pytest.mark.parametrize(
    "other",
    [
        {"magnitude_mask": "supertuning_bottom"},
        {"lora": "shira"},
        {"fish": "smallest"},
    ],
)
def test_a_variant_that_is_another_method_proves_nothing(other: dict[str, str]) -> None:
    compared = study({"fish": IRD, **{name: FAR for name in other if name != "fish"}}, reference="fish")
    if "fish" in other:
        compared = study({"fish": IRD, "random_mask": FAR}, reference="fish")
    assert claims_of(compared)
    variants = {"smallest": ["fish", "fisher.score=small_magnitude"]}
    assert claims_of(renamed(compared, other, variants)) == []


def test_the_fisher_mask_of_as_many_trainings_is_compared() -> None:
    tests = {"ird": IRD, "fish_best": IRD, "fish": IRD, "random_mask": FAR}
    trainings = {"fish": {"evaluations": 3.0}, "random_mask": {"evaluations": 10.0}}
    unequal = study(tests, changes=trainings)
    claim = claims_of(unequal)[-1]
    assert "more trainings has an advantage" in how_to_read(unequal, claims_of(unequal))
    assert "advantage" not in how_to_read(unequal, [claim])
    assert (claim["better"], claim["than"], claim["trainings"]) == ("fish_best", "random_mask", [10.0, 10.0])
    once = claims_of(study(tests, changes=trainings | {"random_mask": {"evaluations": 3.0}}))[-1]
    assert once["better"] == "fish"
    (without,) = claims_of(study({"ird": IRD, "random_mask": FAR}))
    assert without["claim"] == "IRD over random mask"


def test_rows_show_the_evidence() -> None:
    compared = study({"ird": IRD, "reverse": [None] * 5, "fish": FAR}, changes={"fish": {"evaluations": 3.0}})
    over_fish, over_reverse = claim_rows(claims_of(compared))
    interval = "+0.0414 to +0.0586"
    assert over_fish == ["IRD over FISH", "+0.0500", interval, "5 of 5", "<0.001", "<0.001", "10, 3", "holds"]
    assert over_reverse == ["IRD over reverse IRD", "-", "-", "0 of 0", "-", "-", "10, 10", "too few seeds"]


def test_claims_are_json_and_need_no_torch() -> None:
    compared = study(dict.fromkeys(ALL, FAR), changes={"ird": {"params": None}})
    assert json.loads(json.dumps(claims_of(compared), allow_nan=False)) == claims_of(compared)
    code = "import sys, irdscale.compare.claims; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
