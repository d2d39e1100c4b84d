"""Samples of language models: what is a prompt, what is learnt, what is cut and what is refused."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

from irdscale.config.schema import RunConfig
from irdscale.errors import InputError
from irdscale.models import build
from irdscale.models.build import build_model, decoder_linears
from irdscale.models.chunked_losses import IGNORED
from irdscale.tasks import Task, load_task
from tests.helpers import tiny_model

SHIPPED = Path(__file__).resolve().parents[2] / "configs"
STORIES = SHIPPED / "models" / "stories260K"
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# Renders the assistant's last message only.
FORGETFUL = (
    "{% for m in messages %}{% if m.role == 'user' or loop.last %}<{{ m.role }}>{{ m.content }}{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("llama"), causal=True)


def config(model: Path, folder: Path, rows: list[dict[str, Any]], **task: Any) -> RunConfig:
    """A task of these rows, in all three splits."""
    for split in ("train", "validation", "test"):
        (folder / f"{split}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    values = {"model": {"path": str(model)}, "task": {"dataset": str(folder), "max_length": 64, **task}}
    return RunConfig.model_validate({**values, "fisher": {"samples": 1}, "search": {"min_samples": 1}})


def text(task: Task, ids: list[int]) -> str:
    return str(task.tokenizer.decode([i for i in ids if i != IGNORED])).replace(" </s>", "</s>")


def refused(match: str, *args: Any, **task: Any) -> None:
    with pytest.raises(InputError, match=match) as caught:
        load_task(config(*args, **task))
    assert "\n" not in str(caught.value)


TEXTS: dict[str, Any] = {"kind": "causal-lm", "columns": {"text": ["text"]}}
PAIRS: dict[str, Any] = {"kind": "sft", "columns": {"prompt": "q", "completion": "a"}}
CHATS: dict[str, Any] = {"kind": "sft", "columns": {"messages": "chat"}}
CHOICES: dict[str, Any] = {"kind": "multiple-choice", "columns": {"prompt": "q", "choices": ["c"], "label": "y"}}


def test_texts_are_cut_in_pieces_and_none_is_lost(model: Path, tmp_path: Path) -> None:
    long = " ".join(["good", "film", "bad"] * 5)
    rows = [{"text": "the man"}, {"text": "  "}, {"text": long}]
    task = load_task(config(model, tmp_path, rows, **TEXTS, max_length=7))
    bos, eos = task.tokenizer.bos_token_id, task.tokenizer.eos_token_id
    assert task.train["row"] == [0, 2, 2, 2]
    assert [*chain(*task.train["input_ids"][1:])] == [
        bos,
        *task.tokenizer(long, add_special_tokens=False)["input_ids"],
        eos,
    ]
    assert [len(ids) for ids in task.train["input_ids"]] == [4, 7, 7, 3]
    for sample in task.train:
        assert sample["labels"] == [IGNORED, *sample["input_ids"][1:]]
    assert task.metrics == ("perplexity", "token_accuracy")
    assert task.lower_is_better
    assert task.trained is task.train


def test_packed_texts_are_trained_on_but_not_scored(model: Path, tmp_path: Path) -> None:
    rows = [{"text": "good film"} for _ in range(10)]
    task = load_task(config(model, tmp_path, rows, **TEXTS, max_length=8, packing=True))
    # Beginning, two words and an end: 40 tokens.
    assert len(task.train) == 10
    assert len(task.trained) == 5
    assert [*chain(*task.trained["input_ids"])] == [*chain(*task.train["input_ids"])]
    assert all(labels[0] == IGNORED and labels[1:] == ids[1:] for ids, labels in zip(*task.trained[:].values()))
    refused("task.packing: found 40 tokens of text to train on; expected 41", model, tmp_path, rows, **TEXTS,
            max_length=41, packing=True)  # fmt: skip


def test_completions_alone_are_learnt(model: Path, tmp_path: Path) -> None:
    rows = [{"q": "is it good?", "a": "not bad"}, {"q": "and: ", "a": "bad"}, {"q": "", "a": "the dog"}]
    task = load_task(config(model, tmp_path, rows, **PAIRS))
    eos = task.tokenizer.eos_token_id
    assert [text(task, labels) for labels in task.train["labels"]] == ["not bad</s>", "bad</s>", "the dog</s>"]
    assert all(ids[-1] == eos for ids in task.train["input_ids"])
    prompts = [text(task, s["input_ids"][: s["prompt_length"]]) for s in task.train]
    assert prompts == ["<s> is it good ?", "<s> and :", "<s>"]
    assert task.train["answer"] == ["not bad", "bad", "the dog"]
    assert task.metrics == ("perplexity", "token_accuracy")


def test_where_a_completion_begins_does_not_depend_on_how_it_is_tokenised(tmp_path: Path) -> None:
    """A tokenizer whose tokens take the space before them, and may reach over line breaks."""
    rows = [{"q": "Once upon a time", "a": "there was a cat."}, {"q": "Tim said: ", "a": "no"}]
    task = load_task(config(STORIES, tmp_path, rows, **PAIRS))
    assert [text(task, labels).strip() for labels in task.train["labels"]] == ["there was a cat.</s>", "no</s>"]
    for sample, row in zip(task.train, rows, strict=True):
        joint = "" if row["q"].endswith(" ") else "\n"
        expected = task.tokenizer(row["q"] + joint + row["a"])["input_ids"]
        assert sample["input_ids"][:-1] == expected


def test_prompts_that_do_not_fit(model: Path, tmp_path: Path) -> None:
    rows = [{"q": "good", "a": "bad"}, {"q": "the man said it is a good film", "a": "not bad"}]
    refused(
        r"task\.columns\.prompt: .*train\.jsonl, row 1: found 12 tokens with what follows the prompt; expected at most "
        r"8 \(task\.max_length\), or task\.truncate=left",
        model, tmp_path, rows, **PAIRS, max_length=8,
    )  # fmt: skip
    task = load_task(config(model, tmp_path, rows, **PAIRS, max_length=8, truncate="left"))
    cut = task.train[1]
    assert text(task, cut["input_ids"]) == "<s> is a good film not bad</s>"
    assert text(task, cut["input_ids"][: cut["prompt_length"]]) == "<s> is a good film"
    assert text(task, cut["labels"]) == "not bad</s>"
    rows = [{"q": "good", "a": " ".join(["bad"] * 9)}]
    refused("row 0: found 10 tokens behind the prompt; expected at most 6, so that some of the prompt is left",
            model, tmp_path, rows, **PAIRS, max_length=8, truncate="left")  # fmt: skip


def test_an_empty_completion_is_refused(model: Path, tmp_path: Path) -> None:
    rows = [{"q": "good", "a": "bad"}, {"q": "good", "a": " "}]
    refused("row 1: found no text; expected some, to learn from", model, tmp_path, rows, **PAIRS)


@pytest.fixture(scope="module")
def talking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer has a chat template."""
    folder = tiny_model("llama", tmp_path_factory.mktemp("talking"), causal=True)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def chat(*contents: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"chat": [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]}


def test_every_message_of_the_assistant_is_learnt(talking: Path, tmp_path: Path) -> None:
    rows = [chat("is it good?", "not bad", "and this?", "good", "he said"), chat("the film", "was a film")]
    task = load_task(config(talking, tmp_path, rows, **CHATS))
    first = task.train[0]
    assert text(task, first["labels"]) == "not bad</s> good</s>"
    assert text(task, first["input_ids"]).endswith("good</s>")
    assert text(task, first["input_ids"][: first["prompt_length"]]).endswith(
        "and this ?</s> < as ##s ##i ##s ##t ##a ##n ##t >"
    )
    assert task.train["answer"] == ["good", "was a film"]
    # Cut from the left, the last message stays.
    task = load_task(config(talking, tmp_path, rows, **CHATS, max_length=12, truncate="left"))
    assert text(task, task.train[0]["labels"]) == "good</s>"
    assert len(task.train[0]["input_ids"]) == 12


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ({"chat": []}, "row 0: found list; expected a list of"),
        ({"chat": [{"role": "user", "content": "good"}]}, "row 0: found no message of the role assistant"),
        ({"chat": [{"role": "user"}]}, "row 0: message 0: found .*; expected a role and a content"),
    ],
)
def test_chats_that_are_none(row: dict[str, Any], match: str, talking: Path, tmp_path: Path) -> None:
    refused(match, talking, tmp_path, [row], **CHATS)


def test_chat_templates_that_cannot_be_used(model: Path, talking: Path, tmp_path: Path) -> None:
    rows = [chat("good", "bad", "the", "man")]
    refused("task.columns.messages: found 'chat', but the model's tokenizer has no chat template",
            model, tmp_path, rows, **CHATS)  # fmt: skip
    template = talking / "chat_template.jinja"
    template.write_text(FORGETFUL)
    try:
        refused("row 0: message 1: the chat template renders it in another way", talking, tmp_path, rows, **CHATS)
        template.write_text("{{ raise_exception('roles must alternate') }}")
        refused("row 0: the chat template refuses it: roles must alternate", talking, tmp_path, rows, **CHATS)
    finally:
        template.write_text(TEMPLATE)


def test_choices(model: Path, tmp_path: Path) -> None:
    rows = [
        {"q": "the film is", "c": ["good", "not good", "bad"], "y": 1},
        {"q": "he said", "c": ["to", "of"], "y": 0},
    ]
    task = load_task(config(model, tmp_path, rows, **CHOICES))
    assert [text(task, labels) for labels in task.train["labels"]] == ["not good", "to"]
    texts = [[text(task, ids) for ids in sample] for sample in task.train["choices"]]
    assert texts[0] == ["<s> the film is good", "<s> the film is not good", "<s> the film is bad"]
    assert task.train["choice_prompts"] == [[4, 4, 4], [3, 3]]
    assert task.train["answer"] == [1, 0]
    assert task.metrics == ("accuracy", "accuracy_norm")
    by_columns = [{"q": r["q"], "a": r["c"][0], "b": r["c"][1], "y": 0} for r in rows]
    columns = {"prompt": "q", "choices": ["a", "b"], "label": "y"}
    other = load_task(config(model, tmp_path, by_columns, kind="multiple-choice", columns=columns))
    assert other.train["choices"][0] == task.train["choices"][0][:2]


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ({"q": "a", "c": ["good"], "y": 0}, "row 0: found .*; expected two texts or more"),
        ({"q": "a", "c": ["good", " "], "y": 0}, "row 0: found .*; expected two texts or more"),
        (
            {"q": "a", "c": ["good", "bad"], "y": 2},
            "row 0: task.columns.label: found 2; expected the right choice's number, 0 to 1",
        ),
        ({"q": "a", "c": "good", "y": 0}, "row 0: task.columns.choices: found str; expected a list of texts"),
    ],
)
def test_choices_that_are_none(row: dict[str, Any], match: str, model: Path, tmp_path: Path) -> None:
    refused(match, model, tmp_path, [row], **CHOICES)


def test_a_test_split_without_answers_is_as_good_as_none(model: Path, tmp_path: Path) -> None:
    rows = [{"q": "the film is", "c": ["good", "bad"], "y": i % 2} for i in range(8)]
    run = config(model, tmp_path, rows, **CHOICES)
    (tmp_path / "test.jsonl").write_text(json.dumps({"q": "he", "c": ["a", "b"], "y": -1}))
    task = load_task(run)
    assert task.origin["test"] == "half of validation"


def test_more_fisher_samples_than_texts(model: Path, tmp_path: Path) -> None:
    values = config(model, tmp_path, [{"text": "good"}, {"text": ""}], **TEXTS).model_dump()
    values["fisher"]["samples"] = 2
    with pytest.raises(
        InputError, match=r"fisher\.samples: found 2; expected at most 1, the samples of the train split"
    ):
        load_task(RunConfig.model_validate(values))


def test_models_for_texts(model: Path, tmp_path: Path) -> None:
    run = config(model, tmp_path, [{"text": "good film"}], **TEXTS)
    task = load_task(run)
    built, new = build_model(run, task, 0)
    assert type(built).__name__ == "LlamaForCausalLM"
    assert new == []
    names = decoder_linears(built)
    assert len(names) == 2 * 7
    assert all(".layers." in name and "norm" not in name for name in names)
    headless = tiny_model("gpt2", tmp_path / "gpt2", tie_word_embeddings=False)
    run = config(headless, tmp_path, [{"text": "good film"}], **TEXTS)
    with pytest.raises(InputError, match=r"the checkpoint lacks 1 pretrained parameters, such as lm_head\.weight"):
        build_model(run, load_task(run), 0)


def test_where_a_language_model_is_loaded_to(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = config(model, tmp_path, [{"text": "good film"}], **TEXTS)
    assert build._straight_to_gpu(run) == {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert build._straight_to_gpu(run) == {"device_map": {"": 3}}
    monkeypatch.setattr(build, "zero_stage", lambda _config: 3)
    assert build._straight_to_gpu(run) == {}


def test_the_shipped_texts(tmp_path: Path) -> None:
    values = {
        "model": {"path": str(STORIES)},
        "task": {"dataset": str(SHIPPED / "data/lm/shakespeare"), "max_length": 128, **TEXTS},
    }
    task = load_task(RunConfig.model_validate(values))
    assert (len(set(task.train["row"])), len(set(task.selection["row"])), len(set(task.test["row"]))) == (
        6499,
        361,
        362,
    )


def spaced(folder: Path, tokenizer: Any) -> Path:
    """A model with another tokenizer, which has no token for the beginning of a text."""
    tiny_model("llama", folder, causal=True, vocab_size=len(tokenizer))
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)
    return folder


def test_completions_that_a_token_joins_with_the_prompt(tmp_path: Path) -> None:
    """Byte-level BPE joins any one white space with the word behind it, and line breaks with each other."""
    from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers import models as parts
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(parts.BPE())
    raw.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [
            pre_tokenizers.Split(Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\s*[\r\n]+|\s+|[^\s\p{L}]"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    raw.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    texts = ["Where?\tParis\n\nIs it? Paris\n\n?\u00a0Paris"] * 50
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=["</s>", "<pad>"], initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", pad_token="<pad>")
    model = spaced(tmp_path / "model", tokenizer)
    prompts = ["Where?\t", "Where? ", "Where?\u00a0", "Where?\n", "Where?"]
    rows = [{"q": prompt, "a": "Paris"} for prompt in prompts] + [{"q": "Where?\n", "a": "\nParis"}]
    task = load_task(config(model, tmp_path, rows, **PAIRS))
    found = [tokenizer.decode([i for i in labels if i != IGNORED]) for labels in task.train["labels"]]
    assert found == ["\tParis</s>", " Paris</s>", "\u00a0Paris</s>", "Paris</s>", "Paris</s>", "\n\nParis</s>"]
    rows = [{"q": "Where", "a": "Paris"}, {"q": "", "a": "Paris"}, {"q": "", "c": ["Paris", "Is"], "a": "x", "y": 0}]
    task = load_task(config(model, tmp_path, rows, **PAIRS))
    assert task.train["prompt_length"] == [2, 0, 0]
    rows = [{"q": "Where", "c": ["Paris", "Is"], "y": 0}, {"q": "", "c": ["Paris", "Is"], "y": 0}]
    refused("task.columns.prompt: .*row 1: found a prompt without tokens", model, tmp_path, rows, **CHOICES)


def test_completions_without_a_token_of_their_own(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, normalizers, pre_tokenizers
    from tokenizers import models as parts
    from transformers import PreTrainedTokenizerFast

    words = ["</s>", "[UNK]", "is", "it", "bad"]
    raw = Tokenizer(parts.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))  # type: ignore[call-arg]
    raw.normalizer = normalizers.Replace("#", "")  # type: ignore[assignment]
    raw.pre_tokenizer = pre_tokenizers.Split(" ", "removed")  # type: ignore[assignment]
    model = spaced(
        tmp_path / "model", PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", unk_token="[UNK]")
    )
    rows = [{"q": "is it ", "a": "bad"}, {"q": "is it", "a": "bad"}]
    refused("row 1: found no token of the completion alone; the tokenizer drops it, or joins it with the prompt",
            model, tmp_path, rows, **PAIRS)  # fmt: skip
    refused("row 0: found no token of the completion alone", model, tmp_path, [{"q": "is ", "a": "#"}], **PAIRS)
    refused("row 0: found '#', without tokens; expected some text",
            model, tmp_path, [{"q": "is ", "c": ["bad", "#"], "y": 0}], **CHOICES)  # fmt: skip
