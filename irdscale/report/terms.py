"""The terms of a report, explained in sentences. A term is in square brackets where it is explained."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from markupsafe import Markup, escape

METRICS = {
    "accuracy": "the share of right answers",
    "accuracy_norm": "the share of right answers, with the loss of each choice divided by its length",
    "f1": "the harmonic mean of precision and recall",
    "matthews_correlation": "the correlation of predicted and true classes",
    "pearson": "the correlation of predicted and true numbers",
    "spearman": "the correlation of the ranks of predicted and true numbers",
    "perplexity": "the exponential of the mean loss per token",
    "token_accuracy": "the share of tokens that the model ranks first",
    "exact_match": "the share of generated answers that equal the expected ones",
}
_KEPT = {
    "ird": "the samples with the larger traces",
    "reverse": "the samples with the smaller traces",
    "random": "random samples",
}
STANDARD_ERROR = "The [standard error] of a metric is its expected change for another draw of as many samples."
_TERM = re.compile(r"\[([^\]]+)\]")


def of_masks(samples: str) -> list[str]:
    """What masks, Fisher information and traces are."""
    return [
        "A [mask] is the set of parameters that are trained; all others keep their values.",
        f"It holds the parameters with the largest [Fisher information]: squared gradients, averaged over {samples}.",
        "The [Fisher trace] of a sample is the sum of its squared gradients over all scored parameters.",
    ]


def of_metric(task: Mapping[str, Any]) -> str:
    """What the metric is, and which side is better."""
    name = str(task["metric"])
    words = METRICS.get(name, "the measure of the task")
    return f"The metric is [{name}], {words}; {'smaller' if task['lower_is_better'] else 'larger'} is better."


def of_search(result: Mapping[str, Any], pool: int) -> list[str]:
    """The terms of a search's report."""
    first, head = result["path"][0], result["model"]["head"]
    sentences = [
        *of_masks("some samples"),
        f"The search ([IRD], iterative range decreasing) begins with a [pool] of {pool:,} random samples and a mask of "
        f"{first['params']:,} parameters.",
        f"Each [round] halves the samples, the parameters, or both, and keeps {_KEPT[result['direction']]}.",
        "A [candidate] is the mask of one number of samples s and of parameters p.",
        "It is trained once for each [seed], the start of all random numbers, and measured on the [selection split].",
        "The [test split] is measured once, at the end.",
        "[FISH] is a mask of the same s and p, but of random samples.",
    ]
    if head:
        sentences.append(
            f"The [head] is the model's last layer, new for this task and always trained; the [linear probe] trains it "
            f"alone ({head:,} parameters)."
        )
    else:
        sentences.append("The [base model] is the model before training.")
    sentences.append(of_metric(result["task"]))
    if result["best"]["test_error"] is not None:
        sentences.append(STANDARD_ERROR)
    return sentences


def of_comparison(study: Mapping[str, Any]) -> list[str]:
    """The terms of a comparison's report."""
    errors = any(method["test_error"] is not None for method in study["methods"])
    return [
        *of_masks("some training samples"),
        "[FISH] is a mask of random samples; [IRD], iterative range decreasing, is a search among masks of fewer "
        "samples and parameters.",
        "Each method is trained once for each [seed], the start of all random numbers and of its draw of samples.",
        "Learning rates and masks are chosen on the [selection split]; the [test split] is measured once, at the end.",
        "The [reference] is the method that all others are compared with.",
        "A [95 % interval] is the t interval of a mean over the seeds.",
        of_metric(study["task"]),
        *([STANDARD_ERROR] if errors else []),
    ]


# Text in a relation's measure -> its explanation.
RELATIONS = {
    "Spearman": "A [Spearman] correlation compares two orders: 1 if equal, -1 if opposite, 0 without a relation.",
    "eta squared": "[Eta squared] is the share of the variance of the ranks that the classes explain.",
    "AUC": "The [AUC] is the probability that an altered sample has a larger trace than another.",
}


def as_html(sentence: str) -> Markup:
    """A sentence whose terms are HTML definitions."""
    return Markup(_TERM.sub(r"<dfn>\1</dfn>", str(escape(sentence))))


def as_markdown(sentence: str) -> str:
    """A sentence whose terms are bold."""
    return _TERM.sub(lambda found: f"**{found[1]}**", sentence).replace("_", "\\_")
