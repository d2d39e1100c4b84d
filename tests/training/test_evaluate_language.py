"""What language models are measured by, against the slow obvious way."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from irdscale.config.schema import RunConfig
from irdscale.errors import TrainingError
from irdscale.models import chunked_losses
from irdscale.models.build import build_model
from irdscale.models.chunked_losses import IGNORED
from irdscale.tasks import Task, load_task
from irdscale.tasks.answers import same_answer
from irdscale.training.evaluate import evaluate_model
from tests.helpers import tiny_model

WORDS = ["the", "man", "dog", "good", "bad", "film", "is", "not", "said", "he", "she", "it"]


def texts(count: int, seed: int) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 9, (count,), generator=generator).tolist()
    return [" ".join(WORDS[i] for i in torch.randint(0, len(WORDS), (n,), generator=generator)) for n in lengths]


def made(folder: Path, family: Any, rows: list[dict[str, Any]], **task: Any) -> tuple[Any, Task]:
    tiny_model(family, folder / "model", causal=True, initializer_range=0.5)
    for split in ("train", "validation", "test"):
        (folder / f"{split}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    config = RunConfig.model_validate(
        {
            "model": {"path": str(folder / "model"), "dtype": "float64"},
            "task": {"dataset": str(folder), "max_length": 32, **task},
            "fisher": {"samples": 1},
            "search": {"min_samples": 1},
        }
    )
    task_of = load_task(config)
    return build_model(config, task_of, 0)[0], task_of


def one_by_one(model: Any, ids: list[int], labels: list[int]) -> tuple[float, int, int]:
    """Loss, targets and right tokens of a text, by its own forward pass."""
    with torch.no_grad():
        log_p = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    places = [i for i in range(1, len(ids)) if labels[i] != IGNORED]
    loss = -sum(float(log_p[i - 1, labels[i]]) for i in places)
    return loss, len(places), sum(int(log_p[i - 1].argmax()) == labels[i] for i in places)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("entries", [50, 2**24])
def test_perplexity_and_token_accuracy(
    family: str, entries: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"q": q, "a": a} for q, a in zip(texts(13, 0), texts(13, 1), strict=True)]
    model, task = made(tmp_path, family, rows, kind="sft", columns={"prompt": "q", "completion": "a"})
    monkeypatch.setattr(chunked_losses, "ENTRIES", entries)
    found = evaluate_model(model, task, task.test, 4)
    loss, count, right = map(sum, zip(*(one_by_one(model, s["input_ids"], s["labels"]) for s in task.test)))
    assert found == pytest.approx({"perplexity": math.exp(loss / count), "token_accuracy": right / count}, rel=1e-9)
    assert count < sum(map(len, task.test["input_ids"])) - 13
    assert evaluate_model(model, task, task.test, 64) == pytest.approx(found, rel=1e-12)


def test_the_likeliest_choice(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    rows = [
        {"q": q, "c": texts(3, i), "y": int(torch.randint(0, 3, (1,), generator=generator))}
        for i, q in enumerate(texts(30, 2))
    ]
    columns = {"prompt": "q", "choices": ["c"], "label": "y"}
    model, task = made(tmp_path, "llama", rows, kind="multiple-choice", columns=columns)
    right, right_norm = 0, 0
    for sample, row in zip(task.test, rows, strict=True):
        scores = []
        for ids, prompt in zip(sample["choices"], sample["choice_prompts"], strict=True):
            loss, count, _ = one_by_one(model, ids, [IGNORED] * prompt + ids[prompt:])
            scores.append((loss, loss / count))
        right += min(range(3), key=lambda i: scores[i][0]) == row["y"]
        right_norm += min(range(3), key=lambda i: scores[i][1]) == row["y"]
    found = evaluate_model(model, task, task.test, 5)
    assert found == {"accuracy": right / 30, "accuracy_norm": right_norm / 30}
    assert 0 < right < 30
    assert right != right_norm, "the two metrics should differ here"


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_exact_match_of_generated_answers(family: str, tmp_path: Path) -> None:
    """Greedy answers to a batch of prompts, padded, are those to each prompt alone."""
    questions = texts(6, 4)
    kinds: dict[str, Any] = {"kind": "sft", "columns": {"prompt": "q", "completion": "a"}, "metric": "exact_match"}
    model, task = made(tmp_path, family, [{"q": q, "a": "good"} for q in questions], **kinds, max_new_tokens=5)
    answers = []
    for sample in task.test:
        ids = sample["input_ids"][: sample["prompt_length"]]
        for _ in range(5):
            with torch.no_grad():
                ids = [*ids, int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())]
            if ids[-1] == task.tokenizer.eos_token_id:
                break
        answers.append(task.tokenizer.decode(ids[sample["prompt_length"] :], skip_special_tokens=True))
    # Every other one is right.
    rows = [{"q": q, "a": a if i % 2 else f"not {a}"} for i, (q, a) in enumerate(zip(questions, answers, strict=True))]
    model, task = made(tmp_path / "again", family, rows, **kinds, max_new_tokens=5)
    found = evaluate_model(model, task, task.test, 4)
    assert list(found) == ["exact_match", "perplexity", "token_accuracy"]
    assert found["exact_match"] == sum(same_answer(a, row["a"]) for a, row in zip(answers, rows, strict=True)) / 6
    assert 0 < found["exact_match"] < 1


@pytest.mark.parametrize(
    ("found", "expected", "same"),
    [
        ("She has 3 + 4 = 7 apples.\n#### 7", "#### 7", True),
        ("#### 7\nQuestion: next 12", "so #### 7", True),
        ("the answer is 1,234.0", "#### 1234", True),
        ("the answer is 12 of 13", "#### 12", False),
        ("no number", "#### 12", False),
        ("-3", "#### 3", False),
        ("it costs $5.", "#### 5", True),
        (" a  dog\n", "a dog", True),
        ("a dog", "the dog", False),
        ("#### x", "#### 7", False),
    ],
)
def test_answers(found: str, expected: str, same: bool) -> None:
    assert same_answer(found, expected) is same


def test_a_loss_that_is_no_number_is_an_error(tmp_path: Path) -> None:
    model, task = made(
        tmp_path, "llama", [{"text": t} for t in texts(3, 5)], kind="causal-lm", columns={"text": ["text"]}
    )
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    with pytest.raises(TrainingError, match=r"the model's loss of text 0 is not finite \(3 of 3 texts\)"):
        evaluate_model(model, task, task.test, 2)
