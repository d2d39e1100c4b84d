"""The words of a comparison claim what its intervals show, and no more."""

from __future__ import annotations

import pytest

from irdscale.compare.claims import claims_of
from irdscale.compare.grid import wider_grid
from irdscale.compare.table import rows
from irdscale.compare.verdict import cost_and_gain, failures, notes, side
from tests.compare.fake import around, study

# Differences to IRD at turns 0 and 1 vary by seed, so that intervals have a width: 0.0086 on each side.
IRD = around(0.70)
FAR, NEAR = around(0.65, turn=1), around(0.699, turn=1)
UNKNOWN = "Without the baseline of equal budget it is unknown whether the gain over one FISH mask comes from ranking"
NOTHING = "Nothing shows that the gain over one FISH mask comes from ranking samples: choosing among several masks may"


@pytest.mark.parametrize(
    ("fish", "best", "verdicts", "expected"),
    [
        (FAR, FAR, ["holds", "holds"], None),
        (FAR, NEAR, ["holds", "not told apart"], NOTHING),
        (FAR, around(0.75, turn=1), ["holds", "contradicted"], NOTHING),
        (NEAR, NEAR, ["not told apart"] * 2, None),
        (NEAR, FAR, ["not told apart", "holds"], None),
        (around(0.75, turn=1), FAR, ["contradicted", "holds"], None),
        (FAR, None, ["holds"], UNKNOWN),
        (NEAR, None, ["not told apart"], None),
        (None, FAR, ["holds"], None),
        (None, NEAR, ["not told apart"], None),
        (FAR, [None] * 5, ["holds", "too few seeds"], UNKNOWN),
        ([None] * 5, [None] * 5, ["too few seeds"] * 2, None),
    ],
)
def test_where_a_gain_comes_from(
    fish: list[float] | None, best: list[float] | None, verdicts: list[str], expected: str | None
) -> None:
    tests = {"ird": IRD, "fish_best": best, "fish": fish}
    compared = study({name: values for name, values in tests.items() if values is not None})
    assert [claim["verdict"] for claim in claims_of(compared)] == verdicts
    text = cost_and_gain(compared)
    assert [said for said in (UNKNOWN, NOTHING) if said in text] == ([expected] if expected else [])
    assert "hint" not in text


def test_a_lower_loss_is_a_gain() -> None:
    losses = {"ird": around(3.38), "fish_best": around(3.42, turn=1), "fish": around(3.45, turn=2)}
    lower = study(losses, True)
    assert [claim["verdict"] for claim in claims_of(lower)] == ["holds", "holds"]
    assert [f"{claim['mean']:+.4f}" for claim in claims_of(lower)] == ["+0.0700", "+0.0400"]
    assert any("lower is better" in note for note in notes(lower))
    higher = study(losses)
    assert [claim["verdict"] for claim in claims_of(higher)] == ["contradicted", "contradicted"]


def test_the_cost() -> None:
    changes = {"ird": {"fine_tunings": 7.4}, "fish": {"fine_tunings": 1.12, "evaluations": 3.0}}
    text = cost_and_gain(study({"ird": IRD, "fish": FAR}, changes=changes))
    assert text.startswith(
        "A seed of IRD cost 7.4 fine-tunings, one FISH mask 1.12. One training of one candidate is 1"
    )
    changes["fish"]["evaluations"] = 9.0
    text = cost_and_gain(study({"ird": IRD, "fish": FAR}, changes=changes))
    assert "one FISH mask 1.12 (retrained with other seeds for the same budget, the best kept)." in text
    alone = cost_and_gain(study({"ird": IRD, "full": FAR}, changes={"ird": {"fine_tunings": 7.4}}))
    assert "FISH" not in alone
    assert "gain" not in alone.lower()


def test_few_seeds_are_a_hint() -> None:
    three = study({"ird": IRD[:3], "fish_best": FAR[:3], "fish": FAR[:3]})
    assert [claim["verdict"] for claim in claims_of(three)] == ["holds", "holds"]
    assert "3 seeds give wide intervals: these results are a hint, not a proof; use 5 or more." in notes(three)
    assert not any("hint" in note for note in notes(study({"ird": IRD, "fish": FAR})))


@pytest.mark.parametrize(("kept", "masks"), [(5, True), (2, False), (0, False)])
def test_a_search_that_dropped_no_sample_proves_no_ranking(kept: int, masks: bool) -> None:
    found = study({"ird": IRD, "fish_best": NEAR, "fish": FAR})
    for place, one in enumerate(found["methods"][0]["seeds"]):
        one |= {"pool": 64, "samples": 64 if place < kept else 32}
    said = cost_and_gain(found)
    assert (NOTHING in said) != masks
    assert ("its masks are FISH masks, so that a difference comes from their number of parameters" in said) == masks
    expected = f"IRD dropped no sample for {kept} of 5 seeds: its mask there is a FISH mask."
    assert (expected in notes(found)) == (kept > 0)


def test_the_error_of_the_test_set_is_told() -> None:
    found = study({"ird": IRD, "fish": FAR}, changes={"ird": {"test_error": 0.0219}, "fish": {"test_error": 0.0228}})
    expected = "The 437 samples of the test split give each test metric a standard error of 0.0219 to 0.0228"
    assert any(note.startswith(expected) for note in notes(found))
    assert [row[-1] for row in rows(found)] == ["0.0219", "0.0228"]


def test_one_seed_says_nothing() -> None:
    one = study({"ird": [0.7], "fish_best": [0.6], "fish": [0.6]})
    assert [claim["verdict"] for claim in claims_of(one)] == ["too few seeds"] * 2
    assert not any(said in cost_and_gain(one) for said in (UNKNOWN, NOTHING))
    assert any(note.startswith("One seed gives no intervals") for note in notes(one))


def test_failures_are_told() -> None:
    found = study({"ird": [0.7, None, 0.71], "fish": [0.6, 0.61, 0.6], "full": [None] * 3})
    assert failures(found) == [
        "IRD, seed 1: TrainingError: the loss is nan <b>",
        *(f"full fine-tuning, seed {seed}: TrainingError: the loss is nan <b>" for seed in range(3)),
    ]
    assert [claim["verdict"] for claim in claims_of(found)] == ["too few seeds"]
    assert "interval" not in cost_and_gain(found)


def test_a_reference_that_failed() -> None:
    found = study({"ird": [None] * 5, "fish": FAR})
    assert cost_and_gain(found) == "IRD failed for every seed, so there is no comparison."


def test_another_reference() -> None:
    text = cost_and_gain(study({"ird": IRD, "fish_best": NEAR, "fish": FAR}, reference="fish"))
    assert text.startswith("A seed of FISH cost 8.4 fine-tunings. ")
    assert "the gain over one FISH mask" not in text


def test_rates_at_the_ends_of_the_grid() -> None:
    changes = {"ird": {"learning_rate": 0.01}, "fish": {"learning_rate": 0.001}, "full": {"learning_rate": 0.01}}
    found = notes(study({"ird": IRD, "fish": FAR, "full": FAR, "lora": FAR}, changes=changes))
    assert (
        "The largest learning rate of the grid was chosen for IRD, full fine-tuning: the grid may be too narrow."
        in (found)
    )
    assert "The smallest learning rate of the grid was chosen for FISH: the grid may be too narrow." in found
    widest = wider_grid(study({"ird": IRD, "fish": FAR, "full": FAR, "lora": FAR}, changes=changes))
    assert widest == "compare.learning_rates=[0.0003,0.001,0.003,0.01,0.03]"
    assert [row[9] for row in rows(study({"ird": IRD, "fish": FAR, "full": FAR, "lora": FAR}, changes=changes))] == [
        "0.01 (largest)",
        "0.001 (smallest)",
        "0.01 (largest)",
        "0.003",
    ]
    one = {"learning_rate": 0.01, "grid": [{"learning_rate": 0.01, "selection": 0.7}]}
    single = study({"ird": IRD, "fish": FAR}, changes={"ird": one, "fish": one})
    single["learning_rates"] = [0.01]
    assert not any("narrow" in note for note in notes(single))
    assert "One learning rate for all methods: 0.01." in notes(single)


def test_grids_of_methods_are_widened_to_one_length() -> None:
    grid = [{"learning_rate": rate, "selection": 0.7} for rate in (0.01, 0.1)]
    compared = study({"ird": IRD, "lora": FAR}, changes={"lora": {"learning_rate": 0.01, "grid": grid[::-1]}})
    compared["methods"][0]["grid"] = compared["methods"][0]["grid"][:2]
    compared["methods"][0]["learning_rate"] = None
    compared["config"]["compare"] |= {"learning_rates": {"ird": [0.001, 0.003], "lora": [0.1, 0.01]}}
    found = "\n".join(notes(compared))
    assert "Learning rate of each method: the best mean on the selection split of its own 2; all are 0.001" in found
    assert wider_grid(compared) == 'compare.learning_rates={"ird": [0.001,0.003,0.009],"lora": [0.003,0.01,0.1]}'
    for method in compared["methods"]:
        method["learning_rate"] = None
    assert wider_grid(compared) is None


def test_intervals_are_not_corrected_and_the_reader_knows() -> None:
    assert any(
        "not corrected for the number of comparisons (2)" in n
        for n in notes(study(dict.fromkeys(("ird", "fish", "full"), IRD)))
    )


def test_the_base_model() -> None:
    found = study({"ird": IRD, "fish": FAR}) | {"base": {"selection": 0.52, "test": 0.5123}}
    assert "The base model: accuracy 0.5123 on the test split." in notes(found)
    assert not any("base model" in note for note in notes(study({"ird": IRD})))


def test_sides() -> None:
    assert side({"mean": 1, "low": 0.5, "high": 1.5, "n": 5}) == 1
    assert side({"mean": -1, "low": -1.5, "high": -0.5, "n": 5}) == -1
    assert side({"mean": 0, "low": 0, "high": 0, "n": 5}) == side({"mean": 1, "low": None, "high": None, "n": 1}) == 0


# The cost of one mask and of a search, and the samples of the former.
COSTS = {"ird": {"fine_tunings": 7.4}, "top_samples": {"fine_tunings": 1.5}}
BETTER = around(0.75, turn=1)


@pytest.mark.parametrize(
    ("tests", "expected"),
    [
        (
            {"top_samples": FAR},
            " The search gained +0.0500, 95 % interval +0.0414 to +0.0586, over one mask of the 64 samples that rank "
            "first (largest traces), for 7.4 fine-tunings instead of 1.5.",
        ),
        (
            {"top_samples": NEAR},
            " One mask of the 64 samples that rank first (largest traces) does as well as the search, as far as 5 "
            "seeds can show (gain of the search +0.0010, 95 % interval -0.0076 to +0.0096), for 1.5 fine-tunings "
            "instead of 7.4.",
        ),
        # Worse than random samples, or as good: nothing says that their rank is what pays.
        ({"top_samples": NEAR, "fish_small": BETTER}, "instead of 7.4."),
        ({"top_samples": NEAR, "fish_small": around(0.70, turn=2), "fish": FAR}, "instead of 7.4."),
        (
            {"top_samples": NEAR, "fish_small": around(0.65, turn=2), "fish": BETTER},
            "instead of 7.4; over one mask of as many random samples it gained +0.0490, 95 % interval +0.0404 to "
            "+0.0576: the ranking pays, and nothing shows that the search adds to it.",
        ),
        (
            {"top_samples": BETTER, "fish": NEAR},
            " One mask of the 64 samples that rank first (largest traces) does better than the search (gain of "
            "the search -0.0500, 95 % interval -0.0586 to -0.0414), for 1.5 fine-tunings instead of 7.4; over one mask "
            "of all samples it gained +0.0510, 95 % interval +0.0510 to +0.0510: the choice of samples is what pays, "
            "not the search.",
        ),
    ],
)
def test_whether_one_mask_would_do(tests: dict[str, list[float]], expected: str) -> None:
    text = cost_and_gain(study({"ird": IRD, **tests}, changes=COSTS))
    assert text.endswith(expected)


def test_one_mask_of_a_lower_loss() -> None:
    tests = {"ird": around(3.40), "top_samples": around(3.38, turn=1), "fish_small": around(3.42, turn=2)}
    text = cost_and_gain(study(tests, True))
    assert (
        "(largest traces) does better than the search (gain of the search -0.0200, 95 % interval -0.0286 to -0.0114)"
        in text
    )
    assert "it gained +0.0400, 95 % interval +0.0314 to +0.0486: the ranking is what pays, not the search." in text


def test_one_mask_where_nothing_can_be_said() -> None:
    for tests, reference in (
        ({"ird": [0.7], "top_samples": [0.6]}, "ird"),
        ({"ird": IRD, "top_samples": [None] * 5}, "ird"),
        ({"ird": IRD, "top_samples": [0.7, None, None, None, None]}, "ird"),
        ({"reverse": IRD, "top_samples": FAR}, "reverse"),
    ):
        assert "rank first" not in cost_and_gain(study(tests, reference=reference)), tests
    unknown = study({"ird": IRD, "top_samples": FAR}, changes={"ird": {"fine_tunings": None}})
    assert cost_and_gain(unknown).endswith("rank first (largest traces).")


def test_one_mask_and_few_seeds() -> None:
    hint = " With 3 seeds that is a hint, not a proof."
    alone = cost_and_gain(study({"ird": IRD[:3], "top_samples": FAR[:3]}))
    assert alone.endswith(f"instead of 8.4.{hint}")
    assert cost_and_gain(study({"ird": IRD[:3], "top_samples": FAR[:3], "fish": FAR[:3]})).count(hint) == 1


def test_one_mask_is_of_the_ranking_that_was_searched() -> None:
    variants = {
        "brief": ["ird", "search.max_rounds=1", "search.patience=1"],
        "by length": ["ird", "search.rank_by=length", "search.patience=3"],
        "long": ["top_samples", "search.rank_by=length"],
    }

    def found(*names: str) -> str:
        compared = study({"ird": IRD, "top_samples": FAR})
        methods = [one | {"name": name, "label": name} for one, name in zip(compared["methods"], names, strict=True)]
        named = {"methods": methods, "reference": names[0], "config": {"compare": {"variants": variants}}}
        return cost_and_gain(compared | named)

    assert "rank first (top_samples)" in found("brief", "top_samples")
    assert "rank first (long)" in found("by length", "long")
    assert "rank first" not in found("by length", "top_samples")
    assert "rank first" not in found("ird", "long")


@pytest.mark.parametrize(("fewest", "said"), [(128, True), (64, False), (None, False)])
def test_samples_that_no_search_comes_to_are_told(fewest: int | None, said: bool) -> None:
    found = study({"ird": IRD, "top_samples": FAR, "fish_small": NEAR}) | {"fewest": fewest}
    expected = (
        "In so few rounds a search reaches 128 samples at the least, not the 64 of largest traces, "
        "FISH, fewest samples; increase search.max_rounds to allow it."
    )
    assert (expected in notes(found)) == said
    assert any("so few rounds" in note for note in notes(found)) == said
    assert not any("so few rounds" in note for note in notes(study({"ird": IRD, "fish": FAR}) | {"fewest": fewest}))
