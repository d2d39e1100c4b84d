"""The shipped metric modules against scikit-learn and SciPy, offline."""

from __future__ import annotations

from pathlib import Path

import evaluate
import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from irdscale.config.kinds import METRICS
from irdscale.errors import InputError, RunError
from irdscale.tasks.metrics import compute, fitting_metrics, load_metric
from irdscale.tasks.metrics.errors import of_counts, of_ratio, standard_errors


@pytest.mark.parametrize("classes", [2, 4])
def test_classification_matches_scikit_learn(classes: int) -> None:
    rng = np.random.default_rng(classes)
    logits = rng.normal(size=(50, classes))
    labels = rng.integers(0, classes, size=50)
    found = compute(METRICS["sequence-classification"], "sequence-classification", classes, logits, labels)
    predictions = logits.argmax(axis=1)
    assert found == {
        "accuracy": pytest.approx(accuracy_score(labels, predictions)),
        "f1": pytest.approx(f1_score(labels, predictions, average="binary" if classes == 2 else "macro")),
        "matthews_correlation": pytest.approx(matthews_corrcoef(labels, predictions)),
    }


@pytest.mark.parametrize("shape", [(40,), (40, 1)])
def test_regression_matches_scipy(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=shape), rng.normal(size=40).astype(np.float32)
    found = compute(METRICS["regression"], "regression", 1, logits, labels)
    assert found["pearson"] == pytest.approx(pearsonr(logits.ravel(), labels.astype(float)).statistic, abs=1e-9)
    assert found["spearman"] == pytest.approx(spearmanr(logits.ravel(), labels).statistic, abs=1e-9)


def test_by_hand() -> None:
    logits = np.array([[0.0, 1.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    found = compute(("accuracy", "f1"), "sequence-classification", 2, logits, np.array([1, 0, 1, 1]))
    assert found == {"accuracy": 0.5, "f1": pytest.approx(2 / 3)}


def test_constant_predictions_score_zero_and_not_nan() -> None:
    labels = np.arange(5.0)
    assert compute(METRICS["regression"], "regression", 1, np.ones(5), labels) == {"pearson": 0.0, "spearman": 0.0}
    logits = np.tile([1.0, 0.0], (4, 1))
    classes = np.array([0, 1, 0, 1])
    found = compute(("f1", "matthews_correlation"), "sequence-classification", 2, logits, classes)
    assert found == {"f1": 0.0, "matthews_correlation": 0.0}


@pytest.mark.parametrize("classes", [2, 3])
def test_standard_errors_of_classes_are_those_of_other_draws(classes: int) -> None:
    """Against the spread of the metrics over many test sets from the same population."""
    rng = np.random.default_rng(classes)

    def drawn() -> tuple[np.ndarray, np.ndarray]:
        labels = rng.integers(0, classes, size=400)
        return np.eye(classes)[labels] + rng.normal(scale=0.8, size=(400, classes)), labels

    names, kind = METRICS["sequence-classification"], "sequence-classification"
    found = standard_errors(names, kind, classes, *drawn())
    many = [compute(names, kind, classes, *drawn()) for _ in range(60)]
    for name in names:
        # The spread of 60 values has an error of 9 % of it.
        assert found[name] == pytest.approx(np.std([one[name] for one in many], ddof=1), rel=0.3), name


@pytest.mark.parametrize("classes", [2, 3])
def test_metrics_of_counts_are_scikit_learns(classes: int) -> None:
    """Also where one class alone is predicted, or another is not there."""
    rng = np.random.default_rng(classes)
    for most in (classes, 1, classes - 1):
        labels, predictions = rng.integers(0, classes, size=30), rng.integers(0, most, size=30)
        for truth, found in ((labels, predictions), (predictions, labels), (predictions, predictions)):
            counts = np.zeros((1, classes, classes), dtype=int)
            np.add.at(counts[0], (truth, found), 1)
            average = "binary" if classes == 2 else "macro"
            expected = f1_score(truth, found, average=average, zero_division=0)
            assert of_counts("f1", counts) == pytest.approx(expected)
            assert of_counts("matthews_correlation", counts) == pytest.approx(matthews_corrcoef(truth, found))


def test_standard_errors_of_accuracy_by_hand() -> None:
    logits, labels = np.tile([0.0, 1.0], (400, 1)), np.array([1] * 300 + [0] * 100)
    found = standard_errors(("accuracy",), "sequence-classification", 2, logits, labels)
    assert found == {"accuracy": pytest.approx((0.75 * 0.25 / 400) ** 0.5)}


def test_standard_errors_of_correlations() -> None:
    rng = np.random.default_rng(3)
    pairs = rng.multivariate_normal([0, 0], [[1, 0.6], [0.6, 1]], size=400)
    found = standard_errors(METRICS["regression"], "regression", 1, pairs[:, 0], pairs[:, 1])
    # Of a normal population: (1 - r^2) / sqrt(n - 1), and some 6 % more of ranks.
    assert found["pearson"] == pytest.approx((1 - 0.36) / 399**0.5, rel=0.15)
    assert found["spearman"] == pytest.approx(found["pearson"], rel=0.25)
    constant = standard_errors(METRICS["regression"], "regression", 1, np.ones(9), np.arange(9.0))
    assert constant == {"pearson": 0.0, "spearman": 0.0}


def test_standard_error_of_a_ratio() -> None:
    """Of a mean over tokens, whose samples have more or fewer of them; against many draws."""
    rng = np.random.default_rng(0)

    def drawn() -> tuple[np.ndarray, np.ndarray]:
        tokens = rng.integers(1, 40, size=300)
        return rng.normal(3.0, 1.0, size=300) * tokens, tokens

    many = [loss.sum() / tokens.sum() for loss, tokens in (drawn() for _ in range(400))]
    assert of_ratio(*drawn()) == pytest.approx(np.std(many, ddof=1), rel=0.2)
    same = rng.normal(size=50)
    assert of_ratio(same, np.ones(50)) == pytest.approx(np.std(same, ddof=1) / 50**0.5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_an_error(bad: float) -> None:
    logits = np.zeros((4, 2))
    logits[2, 1] = bad
    with pytest.raises(RunError, match="output for sample 2 is not finite"):
        compute(("accuracy",), "sequence-classification", 2, logits, np.zeros(4, dtype=int))


def test_they_are_evaluate_metrics_and_loaded_once() -> None:
    for name in (*METRICS["sequence-classification"], *METRICS["regression"]):
        assert isinstance(load_metric(name), evaluate.Metric)
        assert load_metric(name) is load_metric(name)


def test_offline_with_an_empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", str(tmp_path / "empty"))
    load_metric.cache_clear()
    assert compute(("pearson",), "regression", 1, np.arange(3), np.arange(3)) == {"pearson": pytest.approx(1.0)}
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", str(tmp_path / "file"))
    load_metric.cache_clear()
    with pytest.raises(RunError, match=r"cannot load the metric f1: .*\(HF_HOME must be a writable folder"):
        load_metric("f1")


def test_main_metric_comes_first_and_must_fit() -> None:
    valid = METRICS["sequence-classification"]
    assert fitting_metrics("sequence-classification", None, ("f1", "accuracy"), valid) == ("f1", "accuracy")
    assert fitting_metrics("sequence-classification", "accuracy", ("f1", "accuracy"), valid) == ("accuracy", "f1")
    assert fitting_metrics("sequence-classification", "f1", ("accuracy",), valid) == ("f1", "accuracy")
    with pytest.raises(InputError, match=r"task\.metric: found 'pearson' with kind 'sequence-classification'"):
        fitting_metrics("sequence-classification", "pearson", ("accuracy",), valid)
