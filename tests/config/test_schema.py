"""The configuration: values that are refused, alone or beside others."""

from __future__ import annotations

import pytest

from irdscale.config.compare import CompareConfig
from irdscale.config.loader import changed_config, dump_config, same_search
from irdscale.config.schema import RunConfig
from irdscale.errors import InputError

CONFIG = RunConfig.model_validate({"model": {"path": "a"}, "task": {"dataset": "glue/rte"}})


def message(*overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        changed_config(CONFIG, list(overrides), "here")
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "compare.variants={x: [irt]}",
            "x: found 'irt' (did you mean \"ird\"?); expected a method first: ird, reverse",
        ),
        ("compare.variants={ird: [ird]}", "found 'ird', a method's name; expected a new name"),
        (
            "compare.variants={x: [ird, train.steps=3]}",
            "x: found 'train.steps=3'; expected key=value with a key of fisher",
        ),
        (
            "compare.methods=[ird, lorra]",
            "compare.methods: found 'lorra' (did you mean \"lora\"?); expected one of ird",
        ),
        ("compare.lora.rank=0", "compare.lora.rank: found 0; expected an integer >= 1, or auto"),
        ("compare.learning_rates=[1e-3, -1]", "compare.learning_rates.1: found -1; expected a number > 0"),
        (
            "compare.learning_rates={ird: [1e-3], lora: [1e-4, 1e-3]}",
            "compare.learning_rates: found 1 of ird, 2 of lora; expected as many learning rates for each method",
        ),
        (
            "compare={methods: [ird, lora], learning_rates: {ird: [1e-3]}}",
            "compare.learning_rates: found none for lora; expected a list for it, or for default",
        ),
        (
            "compare.learning_rates={irdd: [1e-3], default: [1e-2]}",
            "compare.learning_rates: found 'irdd' (did you mean \"ird\"?); expected default or one of ird",
        ),
        ("compare={methods: [fish], reference: ird}", "compare.reference: found 'ird'; expected one of methods: fish"),
        ("compare.seeds=[1, 1]", "compare.seeds: found [1, 1]; expected distinct values"),
        ("train.always_train=['(']", "train.always_train: found '('; expected a regular expression"),
        ("fisher.include=['(']", "fisher.include: found '('; expected a regular expression"),
        ("search.seeds=[0, 0]", "search.seeds: found [0, 0]; expected distinct values"),
        ("search.min_ratio=0.1", "search.min_ratio: found 0.1; expected at most ratio (0.005)"),
        *(
            (
                f"search.ray.gpus_per_rank={found}",
                f"search.ray.gpus_per_rank: found {shown}; expected 0, 1, auto, or a share of",
            )
            for found, shown in (("2", "2"), ("1.5", "1.5"), ("-0.5", "-0.5"), ("0.00009", "9e-05"), ("true", "True"))
        ),
        (
            "search.ray.gpus_per_rank=half",
            "search.ray.gpus_per_rank: found 'half'; expected 0, 1, auto, or a share of a GPU",
        ),
        ("search.ray={gpus_per_rank: auto, ranks: 2}", "search.ray.gpus_per_rank: found auto with ranks 2; expected"),
        (
            "search.ray={gpus_per_rank: 0.5, ranks: 2}",
            "search.ray.gpus_per_rank: found 0.5 with ranks 2; expected 0 or 1: ranks of one candidate communicate by",
        ),
        ("search.min_samples=1000", "search.min_samples: found 1000; expected at most fisher.samples (256)"),
        (
            "search={direction: random, rank_by: loss}",
            "search.rank_by: found loss with direction 'random'; expected trace",
        ),
        (
            "fisher={score: saliency, objective: expected}",
            "fisher.score: found 'saliency' with objective 'expected', whose mean gradient is 0; expected objective",
        ),
        ("fisher={score: gem, objective: expected}", "fisher.score: found 'gem' with objective 'expected', whose mean"),
        ("task.metric=acuracy", "task.metric: found 'acuracy' (did you mean \"accuracy\"?); expected one of accuracy"),
        ("task={dataset: x, kind: regression, metric: f1}", "task.metric: found 'f1' with kind 'regression'"),
        ("train={steps: 1, epochs: 2}", "train: found both steps and epochs; expected one of them"),
    ],
)
def test_values_that_are_refused(override: str, expected: str) -> None:
    text = message(override)
    assert text.startswith("here: ")
    assert expected in text


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["task={kind: causal-lm, dataset: a, columns: {label: b}}"], "task.columns.text: missing; expected text"),
        (["task={kind: causal-lm, dataset: a, columns: {text: [a, b]}}"], "task.columns.text: found ['a', 'b']"),
        (
            ["task={kind: sft, dataset: a, columns: {prompt: b}}"],
            "task.columns.completion: missing; expected prompt and completion, or messages, or messages and tools, or "
            "system and prompt and completion, or instruction and output, or instruction and input and output, for "
            "kind 'sft'",
        ),
        (
            ["task={kind: sft, dataset: a, columns: {messages: b, label: c}}"],
            "task.columns.label: found with kind 'sft'; expected prompt and completion, or messages",
        ),
        (
            ["task={kind: sft, dataset: a, columns: {system: b, prompt: c}}"],
            "task.columns.completion: missing; expected prompt and completion, or messages",
        ),
        (["task={kind: sft, dataset: a, columns: {tools: b}}"], "task.columns.messages: missing; expected prompt and"),
        (["task={kind: sft, dataset: a, columns: {input: b, output: c}}"], "task.columns.instruction: missing; expec"),
        (
            ["task={kind: causal-lm, dataset: a, train_on: last}"],
            "task.train_on: found without chats; expected kind 'sft' with columns of chats",
        ),
        (
            ["task={kind: sft, dataset: a, columns: {prompt: b, completion: c}, chat_template: x}"],
            "task.chat_template: found without chats; expected kind 'sft' with columns of chats",
        ),
        (["task={kind: sft, dataset: a, train_on: first}"], "task.train_on: found 'first'; expected 'last'"),
        (["task={kind: multiple-choice, dataset: a, columns: {prompt: b}}"], "task.columns.choices: missing"),
        (["task={kind: sft, dataset: a, packing: true}"], "task.packing: found true with kind 'sft'"),
        (["task={kind: causal-lm, dataset: a, truncate: left}"], "task.truncate: found 'left' with kind 'causal-lm'"),
        (["task={kind: sft, dataset: a, metric: accuracy}"], "task.metric: found 'accuracy' with kind 'sft'"),
        (
            ["task={kind: sft, dataset: a}", "search.count_head=true"],
            "search.count_head: found true with task.kind 'sft'; expected false: a language model has no new head",
        ),
        (
            ["task={kind: sft, dataset: a}", "fisher.head_warmup=5"],
            "fisher.head_warmup: found 5 with task.kind 'sft'; expected 0: a language model has no new head",
        ),
        (
            ["fisher.objective=expected", "search.rank_by=loss"],
            "search.rank_by: found 'loss' with fisher.objective 'expected'; expected objective 'label'",
        ),
        (
            ["task={kind: sft, dataset: a}", "fisher.objective=expected"],
            "fisher.objective: found 'expected' with task.kind 'sft'; expected 'label' or 'sampled'",
        ),
        (
            ["task={kind: regression, dataset: a}", "fisher.token_reduction=sum"],
            "fisher.token_reduction: found 'sum' with task.kind 'regression'",
        ),
    ],
)
def test_language_tasks_that_contradict_themselves(overrides: list[str], expected: str) -> None:
    assert expected in message(*overrides)


@pytest.mark.parametrize(
    ("given", "kept", "dumped"),
    [
        ("null", None, "null"),
        ("0", 0, "0"),
        ("0.0", 0, "0"),
        ("1", 1, "1"),
        ("1.0", 1, "1"),
        ("0.25", 0.25, "0.25"),
        ("0.0001", 0.0001, "0.0001"),
        ("auto", "auto", "auto"),
    ],
)
def test_gpus_of_a_rank_are_kept_as_they_were(given: str, kept: float | str | None, dumped: str) -> None:
    """Whole ones as integers, for configurations that were dumped before there were shares."""
    config = changed_config(CONFIG, [f"search.ray.gpus_per_rank={given}"], "here")
    found = config.search.ray.gpus_per_rank
    assert (found, type(found)) == (kept, type(kept))
    assert config.search.ray.shares_gpus is isinstance(kept, float | str)
    assert f"\n    gpus_per_rank: {dumped}\n" in dump_config(config)
    assert changed_config(config, [], "here") == config
    # It is another way to run the same search.
    assert same_search(config.model_dump(mode="json")) == same_search(CONFIG.model_dump(mode="json"))


def test_fisher_passes_of_several_ranks_go_with_shares() -> None:
    """Their ranks have whole GPUs."""
    asked = changed_config(CONFIG, ["search.ray={gpus_per_rank: 0.5, fisher_ranks: 4}"], "here").search.ray
    assert asked.shares_gpus


def test_bad_ways_to_talk_are_named() -> None:
    assert message("distributed.backend=mpi").startswith("here: distributed.backend: found 'mpi'; expected 'auto'")
    assert "distributed.timeout_minutes: found 0; expected greater than 0" in message("distributed.timeout_minutes=0")
    assert "distributed.silent_seconds: found 5; expected" in message("distributed.silent_seconds=5")


@pytest.mark.parametrize(
    ("task", "expected"), [({}, "global"), ({"kind": "regression"}, "global"), ({"kind": "sft"}, "layerwise")]
)
def test_the_scope_of_a_mask_goes_by_the_kind_of_task_unless_said(task: dict[str, str], expected: str) -> None:
    for given, found in ((None, expected), ("global", "global"), ("layerwise", "layerwise")):
        config = {"model": {"path": "a"}, "task": {"dataset": "a", **task}, "fisher": {"scope": given}}
        assert RunConfig.model_validate(config).scope == found


def test_learning_rates_of_a_method_are_those_of_what_it_varies() -> None:
    rates = {"ird": [1e-2], "lora": [1e-3], "big": [1e-4], "default": [1e-1]}
    variants = {"big": ["lora", "compare.lora.rank=64"], "small": ["rslora", "compare.lora.rank=1"]}
    found = CompareConfig.model_validate({"learning_rates": rates, "variants": variants})
    names = ("ird", "lora", "rslora", "big", "small", "full")
    assert [found.rates_of(name) for name in names] == [[1e-2], [1e-3], [1e-3], [1e-4], [1e-3], [1e-1]]
    assert CompareConfig.model_validate({"learning_rates": [1, 0.5]}).rates_of("ird") == [1, 0.5]
