"""The line of an error, its fields, and its way through a pickle, as Ray sends it."""

import pickle

import pytest

from irdscale.errors import InputError


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (InputError("the data set is empty"), "the data set is empty"),
        (InputError("found 3", "1 or 2", "train.steps"), "train.steps: found 3; expected 1 or 2"),
        (InputError("the file is empty", key="task.dataset", where="a.csv"), "a.csv: task.dataset: the file is empty"),
        (InputError("no such folder", where="runs/a"), "runs/a: no such folder"),
        (InputError("found 3", "1 or 2", "train.steps", "a.yaml:7"), "a.yaml:7: train.steps: found 3; expected 1 or 2"),
    ],
)
def test_an_error_is_one_line_and_keeps_its_fields_in_a_pickle(error: InputError, line: str) -> None:
    assert str(error) == line
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert str(again) == line
    assert (again.found, again.expected, again.key, again.where) == error.args
