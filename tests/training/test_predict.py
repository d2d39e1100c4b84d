"""Predictions of an adapter, against plain transformers code on the exported model."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from irdscale import save_adapter, sparsify
from irdscale.cli import command_line
from irdscale.config.loader import load_config
from irdscale.config.schema import RunConfig
from irdscale.distributed.ranks import end_rank
from irdscale.errors import InputError
from irdscale.models.build import build_model
from irdscale.tasks import load_task
from irdscale.tasks.inputs import file_samples, text_samples
from irdscale.training import predict
from irdscale.training.one_mask import run_evaluate, run_export
from irdscale.training.predict import predictions, run_predict
from irdscale.training.targets import check_target
from tests.helpers import tiny_model
from tests.sparse.oracle import random_mask
from tests.spawned import run_ranks
from tests.training_ranks import group

WORDS = ["the", "man", "dog", "good", "bad", "film", "is", "not", "said", "he", "she", "it"]
TEMPLATE = (
    "{% for m in messages %}{{ m.role }} : {{ m.content }} </s>{% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)
PAIRS = {"prompt": "q", "completion": "a"}


def texts(count: int, seed: int, longest: int = 9) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest, (count,), generator=generator).tolist()
    return [" ".join(WORDS[i] for i in torch.randint(0, len(WORDS), (n,), generator=generator)) for n in lengths]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def made(folder: Path, family: Any, rows: list[dict[str, Any]], **task: Any) -> tuple[RunConfig, str]:
    """A configuration, with a tiny model and these rows as every split, and an adapter with random deltas."""
    causal = task["kind"] not in ("sequence-classification", "regression")
    tiny_model(family, folder / "model", causal=causal, initializer_range=0.5)
    if causal:
        tokenizer = AutoTokenizer.from_pretrained(folder / "model")
        tokenizer.chat_template = TEMPLATE
        tokenizer.save_pretrained(folder / "model")
    (folder / "data").mkdir()
    for split in ("train", "validation", "test"):
        write_rows(folder / f"data/{split}.jsonl", rows)
    values = {
        "model": {"path": str(folder / "model")},
        "task": {"dataset": str(folder / "data"), "max_length": 32, "max_new_tokens": 6, **task},
        "fisher": {"samples": 1},
        "search": {"min_samples": 1},
        "train": {"eval_batch_size": 4},
        "output": str(folder / "out"),
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    config = load_config(folder / "run.yaml")
    model, new = build_model(config, load_task(config), 0)
    sparsify(model, random_mask(model, 0.2, leave=tuple(new)), always_train=[f"^{re.escape(name)}$" for name in new])
    with torch.no_grad():
        for number, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)), alpha=0.1)
    save_adapter(model, folder / "adapter", {"seed": 0})
    return config, str(folder / "adapter")


def exported(config: RunConfig, adapter: str, folder: Path, loader: Any) -> tuple[Any, Any]:
    run_export(config, adapter, str(folder))
    return loader.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def lines(file: Path | str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


def test_classes_and_probabilities(tmp_path: Path) -> None:
    rows = [{"text": t, "y": ("bad", "good", "so so")[i % 3]} for i, t in enumerate(texts(31, 0, 20))]
    columns = {"text": ["text"], "label": "y"}
    config, adapter = made(tmp_path, "bert", rows, kind="sequence-classification", columns=columns)
    with (tmp_path / "in.csv").open("w") as stream:
        csv.writer(stream).writerows([["number", "text"], *([i, row["text"]] for i, row in enumerate(rows))])
    to = str(tmp_path / "out.jsonl")
    result = run_predict(config, adapter, input=str(tmp_path / "in.csv"), to=to, progress=False)
    assert result == {"adapter": adapter, "kind": "sequence-classification", "samples": 31, "to": to}
    model, tokenizer = exported(config, adapter, tmp_path / "plain", AutoModelForSequenceClassification)
    found = lines(to)
    assert [each["row"] for each in found] == list(range(31))
    for row, each in zip(rows, found, strict=True):
        with torch.no_grad():
            shares = model(**tokenizer(row["text"], return_tensors="pt")).logits[0].softmax(-1)
        names = [model.config.id2label[i] for i in range(3)]
        assert each["probabilities"] == pytest.approx(dict(zip(names, shares.tolist())), abs=1e-5)
        assert each["class"] == names[int(shares.argmax())]
        assert list(each) == ["row", "class", "probabilities"]
    assert len({each["class"] for each in found}) > 1
    own = run_predict(config, adapter, progress=False)["predictions"]
    assert [each["expected"] for each in own] == [row["y"] for row in rows]
    assert [each["class"] for each in own] == [each["class"] for each in found]
    one = run_predict(config, adapter, text=rows[3]["text"], progress=False)["predictions"]
    assert one == [{**found[3], "row": 0, "probabilities": pytest.approx(found[3]["probabilities"], abs=1e-6)}]


def test_numbers_of_pairs(tmp_path: Path) -> None:
    pairs = list(zip(texts(9, 1, 20), texts(9, 2), strict=True))
    rows = [{"a": a, "b": b, "y": i / 2} for i, (a, b) in enumerate(pairs)]
    columns = {"text": ["a", "b"], "label": "y"}
    config, adapter = made(tmp_path, "roberta", rows, kind="regression", columns=columns)
    given = write_rows(tmp_path / "in.jsonl", [{"a": a, "b": b} for a, b in pairs])
    found = run_predict(config, adapter, input=given, progress=False)["predictions"]
    model, tokenizer = exported(config, adapter, tmp_path / "plain", AutoModelForSequenceClassification)
    for (first, second), each in zip(pairs, found, strict=True):
        with torch.no_grad():
            logits = model(**tokenizer(first, second, return_tensors="pt")).logits
        assert each["value"] == pytest.approx(float(logits), abs=1e-5)
    with pytest.raises(InputError, match="text: found one text; expected input=FILE"):
        run_predict(config, adapter, text="good", progress=False)


def plain_answer(model: Any, ids: list[int], count: int, ends: set[int]) -> list[int]:
    """The likeliest tokens, one forward pass each, without a cache."""
    new: list[int] = []
    while len(new) < count and not (new and new[-1] in ends):
        with torch.no_grad():
            new.append(int(model(input_ids=torch.tensor([[*ids, *new]])).logits[0, -1].argmax()))
    return new


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_completions_token_for_token(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    questions = texts(11, 3, 15)
    rows = [{"q": q, "a": a} for q, a in zip(questions, texts(11, 4), strict=True)]
    config, adapter = made(tmp_path, family, rows, kind="sft", columns=PAIRS)
    given = write_rows(tmp_path / "in.jsonl", [{"q": q} for q in questions])
    kept: list[list[list[int]]] = []
    real = predict.generate_greedily
    monkeypatch.setattr(predict, "generate_greedily", lambda *a: kept.append(real(*a)) or kept[-1])
    found = run_predict(config, adapter, input=given, progress=False)["predictions"]
    model, tokenizer = exported(config, adapter, tmp_path / "plain", AutoModelForCausalLM)
    end = tokenizer.eos_token_id
    for question, tokens, each in zip(questions, kept[0], found, strict=True):
        expected = plain_answer(model, tokenizer(f"{question}\n")["input_ids"], 6, {end})
        assert tokens == expected
        assert each["completion"] == tokenizer.decode(expected, skip_special_tokens=True).strip()
        assert each["ended"] == (expected[-1] == end)
    own = run_predict(config, adapter, progress=False)["predictions"]
    assert kept[1] == kept[0]
    assert own == [{**each, "expected": row["a"]} for each, row in zip(found, rows, strict=True)]
    one = run_predict(config, adapter, text=questions[5], progress=False)["predictions"]
    assert one == [{**found[5], "row": 0}]


def test_texts_are_gone_on_with(tmp_path: Path) -> None:
    rows = [{"text": t} for t in texts(7, 5, 12)]
    config, adapter = made(tmp_path, "llama", rows, kind="causal-lm", columns={"text": ["text"]})
    found = run_predict(config, adapter, input=write_rows(tmp_path / "in.jsonl", rows), progress=False)["predictions"]
    assert run_predict(config, adapter, progress=False)["predictions"] == found
    model, tokenizer = exported(config, adapter, tmp_path / "plain", AutoModelForCausalLM)
    end = tokenizer.eos_token_id
    for row, each in zip(rows, found, strict=True):
        new = plain_answer(model, tokenizer(row["text"])["input_ids"], 6, {end})
        assert each["completion"] == tokenizer.decode(new, skip_special_tokens=True)
        assert each["ended"] == (new[-1] == end)


def test_long_texts_are_gone_on_with_from_their_end(tmp_path: Path) -> None:
    long = " ".join(["the", "dog", "said"] * 7 + ["good"])
    columns = {"text": ["text"]}
    config, adapter = made(tmp_path, "llama", [{"text": long}] * 3, kind="causal-lm", columns=columns, max_length=8)
    task = load_task(config)
    assert len(task.test) > 3
    tokens = task.tokenizer(long)["input_ids"]
    samples = file_samples(config, task, write_rows(tmp_path / "in.jsonl", [{"text": long}]))
    assert samples["input_ids"][:] == [[tokens[0], *tokens[-7:]]]
    assert len(run_predict(config, adapter, progress=False)["predictions"]) == 3


@pytest.mark.parametrize("metric", ["accuracy", "accuracy_norm"])
def test_choices_with_their_scores(metric: str, tmp_path: Path) -> None:
    rows = [{"q": q, "c": texts(3, i), "y": i % 3} for i, q in enumerate(texts(9, 6))]
    columns = {"prompt": "q", "choices": ["c"], "label": "y"}
    config, adapter = made(tmp_path, "llama", rows, kind="multiple-choice", columns=columns, metric=metric)
    given = write_rows(tmp_path / "in.jsonl", [{key: row[key] for key in "qc"} for row in rows])
    found = run_predict(config, adapter, input=given, progress=False)["predictions"]
    model, tokenizer = exported(config, adapter, tmp_path / "plain", AutoModelForCausalLM)
    for row, each in zip(rows, found, strict=True):
        scores = []
        for choice in row["c"]:
            prompt, ids = tokenizer(row["q"])["input_ids"], tokenizer(f"{row['q']} {choice}")["input_ids"]
            with torch.no_grad():
                log_p = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            own = [float(log_p[i - 1, ids[i]]) for i in range(len(prompt), len(ids))]
            scores.append(sum(own) / (len(own) if metric == "accuracy_norm" else 1))
        assert each["scores"] == pytest.approx(scores, rel=1e-5)
        assert each["choice"] == max(range(3), key=scores.__getitem__)
        assert each["text"] == row["c"][each["choice"]]
    result = run_evaluate(config, adapter, progress=False, to=str(tmp_path / "test.jsonl"))
    own = lines(tmp_path / "test.jsonl")
    assert own == [{**each, "expected": i % 3} for i, each in enumerate(found)]
    assert result["test"][metric] == sum(each["choice"] == each["expected"] for each in own) / 9


def test_choices_of_named_labels_and_of_columns(tmp_path: Path) -> None:
    rows = [{"choices": f"{q} ?", "one": a, "two": b} for q, a, b in zip(texts(3, 1), texts(3, 2), texts(3, 3))]
    columns = {"prompt": "choices", "choices": ["one", "two"], "label": "y"}
    labelled = [{**row, "y": "two"} for row in rows]
    config, _ = made(tmp_path, "llama", labelled, kind="multiple-choice", columns=columns)
    task = load_task(config)
    samples = file_samples(config, task, write_rows(tmp_path / "in.jsonl", rows))
    for name in ("choices", "choice_prompts", "row"):
        assert samples[name][:] == task.test[name][:]


def test_chats_are_asked_for_their_next_or_last_answer(tmp_path: Path) -> None:
    asked = [[{"role": "user", "content": q}] for q in texts(5, 7)]
    rows = [{"m": [*chat, {"role": "assistant", "content": "good dog"}]} for chat in asked]
    config, adapter = made(tmp_path, "llama", rows, kind="sft", columns={"messages": "m"}, max_length=48)
    longer = {"m": [*rows[0]["m"], {"role": "user", "content": "is it bad"}]}
    given = write_rows(tmp_path / "in.jsonl", [*({"m": chat} for chat in asked), longer, rows[1]])
    task = load_task(config)
    samples = file_samples(config, task, given)
    prompts = [ids[:count] for ids, count in zip(samples["input_ids"], samples["prompt_length"], strict=True)]
    render = task.tokenizer.apply_chat_template
    for chat, prompt in zip([*asked, longer["m"], asked[1]], prompts, strict=True):
        text = render(chat, tokenize=False, add_generation_prompt=True)
        assert prompt == task.tokenizer(text, add_special_tokens=False)["input_ids"]
    found = run_predict(config, adapter, input=given, progress=False)["predictions"]
    assert found[6] == {**found[1], "row": 6}
    assert [each["row"] for each in found] == list(range(7))
    one = run_predict(config, adapter, text=asked[2][0]["content"], progress=False)["predictions"]
    assert one == [{**found[2], "row": 0}]


def test_evaluate_generates_once_and_writes_what_predict_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"q": q, "a": a} for q, a in zip(texts(6, 3), texts(6, 4), strict=True)]
    config, adapter = made(tmp_path, "llama", rows, kind="sft", columns=PAIRS, metric="exact_match")
    own = run_predict(config, adapter, progress=False)["predictions"]
    plain = run_evaluate(config, adapter, progress=False)
    monkeypatch.setattr(predict, "generate_greedily", lambda *a: pytest.fail("generated twice"))
    to = str(tmp_path / "made" / "test.jsonl")
    result = run_evaluate(config, adapter, progress=False, to=to)
    assert result == {**plain, "predictions": to}
    assert lines(to) == own


@pytest.fixture(scope="module")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunConfig, str]:
    folder = tmp_path_factory.mktemp("reviews")
    rows = [{"text": t, "y": i % 2} for i, t in enumerate(texts(12, 0))]
    columns = {"text": ["text"], "label": "y"}
    return folder, *made(folder, "bert", rows, kind="sequence-classification", columns=columns)


@pytest.mark.parametrize(
    ("name", "rows", "said"),
    [
        ("in.jsonl", '{"txt": "good"}\n', ["task.columns.text", "in.jsonl", "'text'", 'did you mean "txt"?']),
        ("in.jsonl", '{"text": "good"}\n{"text": null}\n', ["task.columns.text", "in.jsonl", "row 1", "found no text"]),
        ("in.jsonl", '{"text": "good"}\n{"text"', ["in.jsonl:2", "not JSON"]),
        ("in.jsonl", "", ["in.jsonl", "empty"]),
        ("in.txt", "good", ["in.txt", "'.txt'", ".jsonl"]),
        (None, "", ["input", "none.jsonl", "no such file"]),
    ],
)
def test_bad_input_is_one_line(
    reviews: tuple[Path, RunConfig, str],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    name: str | None,
    rows: str,
    said: list[str],
) -> None:
    folder, _, adapter = reviews
    if name is not None:
        (tmp_path / name).write_text(rows)
    given = f"input={tmp_path / (name or 'none.jsonl')}"
    to = tmp_path / "out.jsonl"
    assert command_line.run(["predict", str(folder / "run.yaml"), f"adapter={adapter}", given, f"to={to}"]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert [word for word in said if word not in err] == []
    assert not to.exists()


def test_a_prompt_that_does_not_fit_names_its_row(tmp_path: Path) -> None:
    config, adapter = made(tmp_path, "llama", [{"q": "the dog", "a": "bad"}] * 3, kind="sft", columns=PAIRS)
    given = write_rows(tmp_path / "in.jsonl", [{"q": "the"}, {"q": "the dog " * 20}])
    with pytest.raises(InputError, match=r"in.jsonl, row 1: found 4\d tokens.*task.truncate=left"):
        run_predict(config, adapter, input=given, progress=False)
    far = config.model_copy(update={"task": config.task.model_copy(update={"max_new_tokens": 62})})
    given = write_rows(tmp_path / "in.jsonl", [{"q": "the"}, {"q": "the dog"}])
    with pytest.raises(InputError, match=r"max_new_tokens: found 62 after a prompt of 3 tokens \(row 1\)"):
        run_predict(far, adapter, input=given, progress=False)


@pytest.mark.parametrize("held", ["a poem\n", '{"row": 1, "text": "mine"}\n', "[]\n", "\n\n"])
def test_only_predictions_are_replaced(reviews: tuple[Path, RunConfig, str], tmp_path: Path, held: str) -> None:
    _, config, adapter = reviews
    to = tmp_path / "out.jsonl"
    to.write_text(held)
    with pytest.raises(InputError, match=r"^to: .*out.jsonl exists.*expected a new file, or one of predictions"):
        run_predict(config, adapter, to=str(to), progress=False)
    with pytest.raises(InputError, match="expected a new file, or one of predictions"):
        run_evaluate(config, adapter, progress=False, to=str(to))
    assert to.read_text() == held
    with pytest.raises(InputError, match="is a folder"):
        check_target(str(tmp_path))
    with pytest.raises(InputError, match=r"to: found .*, which is input=; expected another file"):
        run_predict(config, adapter, input=str(to), to=str(to), progress=False)
    to.write_text("")
    run_predict(config, adapter, to=str(to), progress=False)
    first = to.read_bytes()
    run_predict(config, adapter, to=str(to), progress=False)
    assert to.read_bytes() == first
    assert list(tmp_path.iterdir()) == [to]


@pytest.mark.parametrize("verb", ["predict", "evaluate"])
def test_an_interrupt_leaves_what_was_there(
    reviews: tuple[Path, RunConfig, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    verb: str,
) -> None:
    folder, _, adapter = reviews
    to = tmp_path / "out.jsonl"
    call = [verb, str(folder / "run.yaml"), f"adapter={adapter}", f"to={to}"]
    assert command_line.run(call) == 0
    before = to.read_bytes()

    def interrupted(*arguments: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    capfd.readouterr()
    monkeypatch.setattr("irdscale.models.batches.LateRows.add", interrupted)
    assert command_line.run(call) == 130
    assert capfd.readouterr() == ("", "irdscale: interrupted\n")
    assert to.read_bytes() == before
    assert list(tmp_path.iterdir()) == [to]


def test_the_base_model_predicts_only_with_a_head_of_its_own(
    reviews: tuple[Path, RunConfig, str], tmp_path: Path
) -> None:
    _, config, _ = reviews
    with pytest.raises(InputError, match=r"adapter: missing, and .* has no head for this task.*expected adapter=DIR"):
        run_predict(config, progress=False)
    config, adapter = made(tmp_path, "gpt2", [{"q": "the", "a": "dog"}] * 3, kind="sft", columns=PAIRS)
    (found,) = run_predict(config, text="he said", progress=False)["predictions"]
    task = load_task(config)
    (expected,) = predictions(config, build_model(config, task, 0)[0], task, text_samples(config, task, "he said"))
    assert found == expected
    run_export(config, adapter, str(tmp_path / "merged"))
    merged = config.model_copy(update={"model": config.model.model_copy(update={"path": str(tmp_path / "merged")})})
    assert (
        run_predict(merged, text="he said", progress=False)["predictions"]
        == run_predict(config, adapter, text="he said", progress=False)["predictions"]
    )


@pytest.mark.parametrize(
    ("more", "out"),
    [
        (["text=good film"], ["0  0.", "1  0."]),
        (["text=good film", "--json"], ['"predictions": [', '"probabilities"']),
        ([], ['{"row": 0, "class": "', '{"row": 11, "class": "']),
        (["to=TMP/out.jsonl"], ["samples  12", "to "]),
    ],
)
def test_what_the_verb_prints(
    reviews: tuple[Path, RunConfig, str],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    more: list[str],
    out: list[str],
) -> None:
    folder, _, adapter = reviews
    more = [word.replace("TMP", str(tmp_path)) for word in more]
    assert command_line.run(["predict", str(folder / "run.yaml"), f"adapter={adapter}", *more]) == 0
    printed = capfd.readouterr().out
    assert [words for words in out if words not in printed] == []


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["input="], "input: found no file; expected input=FILE"),
        (["to="], "to: found no file; expected to=FILE"),
        (["text="], "text: found no value; expected text=TEXT"),
        (["text=a", "input=b"], "text: found text= beside input=; expected one of them"),
    ],
)
def test_wrong_arguments(
    reviews: tuple[Path, RunConfig, str], capfd: pytest.CaptureFixture[str], more: list[str], said: str
) -> None:
    assert command_line.run(["predict", str(reviews[0] / "run.yaml"), *more]) == 2
    assert capfd.readouterr().err == f"irdscale: {said}\n"


def _on_rank(rank: int, world: int, folder: str) -> None:
    with group(rank, world, folder):
        for name in ("classes", "answers"):
            config = load_config(Path(folder) / name / "run.yaml")
            to = str(Path(folder) / f"{name}.jsonl")
            run_predict(config, str(Path(folder) / name / "adapter"), to=to, progress=False)
        end_rank()


def test_ranks_share_the_samples(tmp_path: Path) -> None:
    for name in ("classes", "answers"):
        (tmp_path / name).mkdir()
    rows = [{"text": t, "y": i % 2} for i, t in enumerate(texts(7, 0))]
    columns = {"text": ["text"], "label": "y"}
    alone = {"classes": made(tmp_path / "classes", "bert", rows, kind="sequence-classification", columns=columns)}
    rows = [{"q": q, "a": "good"} for q in texts(7, 3)]
    alone["answers"] = made(tmp_path / "answers", "llama", rows, kind="sft", columns=PAIRS)
    run_ranks(_on_rank, 2, str(tmp_path))
    for name, (config, adapter) in alone.items():
        expected = run_predict(config, adapter, progress=False)["predictions"]
        for found, each in zip(lines(tmp_path / f"{name}.jsonl"), expected, strict=True):
            shares = {key: pytest.approx(each[key]) for key in each if key == "probabilities"}
            assert found == {**each, **shares}
