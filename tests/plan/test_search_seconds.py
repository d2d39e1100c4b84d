"""The estimate of a search's time from the costs of its parts."""

import dataclasses

import pytest

from irdscale.config.loader import load_config
from irdscale.errors import InputError
from irdscale.plan.measured_costs import Costs, Size, measured, search_seconds
from irdscale.tasks import load_task
from tests.search.toy import write_config


@pytest.fixture
def toy(tmp_path):
    return load_config(write_config(tmp_path, search__min_ratio=0.02, search__min_samples=8))


def test_the_time_of_a_search_is_the_sum_of_its_parts(toy):
    splits = {"samples": 100, "selection": 20, "test": 30}
    size = Size(rounds=2, candidates=3, evaluations=18, steps=10, rankings=3, **splits)
    costs = Costs(trace=1.0, gradient=100.0, ranking=1e4, begin=1e6, step=1e9, prediction=1e13, load=10.0)
    # Waves of (start, two rounds, baselines) at two seeds: 2 + 6 + 6 + 4 one by one, 1 + 2 + 2 + 1 four at once.
    for at_once, ranks, waves in ((1, 1, 18), (4, 1, 6), (4, 2, 6)):
        only = {
            "trace": 100 / ranks,
            "gradient": 2 * 100 * 100 / ranks,
            "ranking": 4e4,
            "begin": (waves + 6) * 1e6,
            "step": waves * 10 * 1e9,
            "prediction": (100 / ranks + waves * 20 + 6 * 30) * 1e13,
            # The passes' process, and those of the evaluations where they are others.
            "load": 10.0 if at_once == 1 else 20.0,
        }
        for name, expected in only.items():
            zero = {field.name: 0.0 for field in dataclasses.fields(costs)}
            part = Costs(**zero | {name: getattr(costs, name)})
            assert search_seconds(toy, part, size, at_once, ranks) == pytest.approx(expected)
        total = search_seconds(toy, costs, size, at_once, ranks)
        assert total == pytest.approx(sum(only.values()), rel=1e-12)
    warm = toy.model_copy(update={"fisher": toy.fisher.model_copy(update={"head_warmup": 7})})
    for at_once, ranks in ((1, 1), (4, 2)):
        head = search_seconds(warm, costs, size, at_once, ranks) - search_seconds(toy, costs, size, at_once, ranks)
        assert head == pytest.approx(2 * (costs.begin + 7 * costs.step), rel=1e-4)
    shuffled = toy.model_copy(update={"search": toy.search.model_copy(update={"direction": "random"})})
    assert search_seconds(toy, costs, size) - search_seconds(shuffled, costs, size) == pytest.approx(100.0, rel=0.5)
    more = dataclasses.replace(size, rankings=7)
    assert search_seconds(toy, costs, more) - search_seconds(toy, costs, size) == pytest.approx(4e4, abs=20)


@pytest.mark.parametrize(("every", "inside"), [(4, 3), (5, 2), (10, 1), (100, 1)])
def test_evaluations_inside_a_training_take_time(toy, every, inside):
    """Every so many of its 10 steps, and at the last one."""
    size = Size(rounds=2, candidates=3, evaluations=18, steps=10, rankings=3, samples=0, selection=20, test=0)
    costs = Costs(trace=0.0, gradient=0.0, ranking=0.0, begin=0.0, step=0.0, prediction=1.0)
    looking = toy.model_copy(update={"train": toy.train.model_copy(update={"eval_steps": every})})
    assert search_seconds(toy, costs, size) == 18 * 20
    assert search_seconds(looking, costs, size) == (1 + inside) * 18 * 20


def test_the_time_of_evaluations_that_share_a_gpu(toy):
    splits = {"samples": 100, "selection": 20, "test": 30}
    size = Size(rounds=2, candidates=3, evaluations=18, steps=10, rankings=3, **splits)
    steps = Costs(trace=0.0, gradient=0.0, ranking=0.0, begin=0.0, step=0.1, prediction=0.0)
    begins = Costs(trace=0.0, gradient=0.0, ranking=0.0, begin=1.0, step=0.0, prediction=0.0)
    # Of 2, 6, 6 and 4 evaluations four at once share one GPU: no step is saved, but the waiting for models is.
    assert search_seconds(toy, steps, size, 4, 1, 4) == search_seconds(toy, steps, size) == pytest.approx(18)
    assert search_seconds(toy, begins, size, 4, 1, 4) == search_seconds(toy, begins, size, 4) == 6 + 6
    # Of two GPUs with four each, the first is filled before the second.
    assert search_seconds(toy, steps, size, 8, 1, 4) == pytest.approx(2 + 4 + 4 + 4)


def test_the_longest_sample_is_of_what_is_trained_on_and_of_selection(toy):
    task = load_task(toy)
    assert task.longest == max(len(ids) for split in (task.train, task.selection) for ids in split["input_ids"])


def test_ranks_that_cannot_share_a_batch_are_refused(toy):
    with pytest.raises(InputError, match=r"^train.batch_size: found 8; expected a multiple of 3"):
        measured(toy, ranks=3)
