"""The checks of a model before a pass, on models that pass them and on models that do not."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from irdscale import accumulate_fisher, top_k
from irdscale.errors import InputError
from irdscale.fisher import SampleGradients, scored_parameters
from irdscale.fisher.losses import sample_losses
from irdscale.models.checks import loss_differs, padding_matters, require_causal, uneven_rows
from tests.fisher.oracle import brute_force
from tests.tiny_models import BERT_LIKE, LLAMA_LIKE, collate, samples, tiny

WIDE = {"initializer_range": 0.2, "num_labels": 3}


def left(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """`collate`, but with padding on the left."""
    batch = collate(rows)
    for place, row in enumerate(rows):
        shift = batch["input_ids"].shape[1] - len(row["input_ids"])
        for value in batch.values():
            if value.dim() == 2:
                value[place] = value[place].roll(shift)
    return batch


def mixing(name: str) -> Any:
    """A classifier that sees padding."""
    torch.manual_seed(0)
    t, sizes = transformers, {**BERT_LIKE, **WIDE}
    heads = sizes.pop("num_attention_heads")
    if name == "FNet":
        return t.FNetForSequenceClassification(t.FNetConfig(**sizes)).eval()
    if name == "Nystromformer":
        return t.NystromformerForSequenceClassification(
            t.NystromformerConfig(**sizes, num_attention_heads=heads)
        ).eval()
    if name == "ConvBERT":
        config = t.ConvBertConfig(**sizes, num_attention_heads=heads, embedding_size=12, conv_kernel_size=3)
        return t.ConvBertForSequenceClassification(config).eval()
    return tiny("gpt2").float()


SEEING = [("FNet", collate), ("Nystromformer", collate), ("ConvBERT", collate), ("GPT-2", left)]


@pytest.mark.parametrize(("name", "pad"), SEEING)
def test_a_sample_contributes_the_same_in_any_batch(name: str, pad: Any, caplog: pytest.LogCaptureFixture) -> None:
    model, rows = mixing(name), samples(count=9)
    with caplog.at_level(logging.WARNING):
        one, many = (accumulate_fisher(model, rows, collate_fn=pad, batch_size=b) for b in (1, 4))
    said = [r.getMessage() for r in caplog.records]
    # ConvBERT's convolutions have no rule to begin with.
    assert len(said) == (2 if name == "ConvBERT" else 1)
    assert name == "ConvBERT" or "depends on how far its batch is padded" in said[0]
    assert padding_matters(model, pad, uneven_rows(rows, pad)) is True
    torch.testing.assert_close(many.sample_trace, one.sample_trace, rtol=1e-5, atol=0)
    assert top_k(many, 100).hash == top_k(one, 100).hash
    scored = scored_parameters(model)
    taken = SampleGradients(model, rows, pad, scored, batch_size=4)
    losses = taken.label_losses([len(row["input_ids"]) for row in rows])
    alone = SampleGradients(model, rows, pad, scored, batch_size=1).label_losses([1] * len(rows))
    torch.testing.assert_close(losses, alone)
    traces = torch.zeros(len(rows), dtype=torch.float64)
    taken.add_traces(range(len(rows)), traces)
    torch.testing.assert_close(traces, one.sample_trace, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2", "llama", "deberta", "albert"])
def test_models_that_mask_padding_take_batches(family: str, dtype: torch.dtype) -> None:
    model = tiny(family).to(dtype)
    rows = uneven_rows(samples(count=9), collate)
    assert len(rows[0]["input_ids"]) < len(rows[-1]["input_ids"])
    assert padding_matters(model, collate, rows) is False
    if family == "llama":
        assert padding_matters(model, left, rows) is False
    if family == "gpt2":
        assert padding_matters(model, left, rows) is True


def test_a_first_token_behind_padding_is_a_target_of_its_batch_alone() -> None:
    model, rows = tiny("llama", "lm"), samples("lm")
    one, many = (accumulate_fisher(model, rows, collate_fn=left, batch_size=b, include="layers") for b in (1, 4))
    torch.testing.assert_close(many.sample_trace, one.sample_trace, rtol=1e-6, atol=0)


def test_a_model_that_pads_by_itself() -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = BERT_LIKE | WIDE | {"max_position_embeddings": 60, "attention_window": 4, "sep_token_id": 2}
    model, rows = (
        transformers.LongformerForSequenceClassification(transformers.LongformerConfig(**sizes)).eval(),
        samples(),
    )
    _, expected = brute_force(model, rows)
    for size in (1, 4):
        found = accumulate_fisher(model, rows, collate_fn=collate, batch_size=size).sample_trace
        torch.testing.assert_close(found, expected.double(), rtol=1e-5, atol=0)


def test_what_shows_nothing_of_padding() -> None:
    rows = samples(count=5)
    assert uneven_rows([rows[0]] * 3, collate) == []
    # A collate that pads all to one length pads a sample alone, too.
    fixed = lambda some: {k: v[: len(some)] for k, v in collate([*some, rows[0]]).items()}  # noqa: E731
    assert padding_matters(mixing("FNet"), fixed, uneven_rows(rows, fixed)) is None
    # One whose samples are others each time cannot be compared.
    drawn = lambda some: {k: torch.randint(2, 40, v.shape) if k == "input_ids" else v for k, v in collate(some).items()}  # noqa: E731
    assert padding_matters(mixing("FNet"), drawn, uneven_rows(rows, collate)) is None


def test_the_one_long_sample_of_many_is_found() -> None:
    rows = [{"input_ids": [5, 6, 7], "labels": 0}] * 100
    rows[41] = {"input_ids": [5, 6, 7, 8, 9], "labels": 0}
    assert [len(row["input_ids"]) for row in uneven_rows(rows, collate)] == [3, 3, 3, 5]


def masked_language_model(**more: Any) -> Any:
    torch.manual_seed(0)
    return transformers.BertLMHeadModel(transformers.BertConfig(**BERT_LIKE, **more)).eval()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_an_encoder_as_a_language_model_is_refused(dtype: torch.dtype) -> None:
    rows = samples("lm")
    with pytest.raises(InputError, match="BertLMHeadModel: found logits of a token that change with later tokens"):
        accumulate_fisher(masked_language_model().to(dtype), rows, collate_fn=collate)
    accumulate_fisher(masked_language_model(is_decoder=True).to(dtype), rows, collate_fn=collate)


@pytest.mark.parametrize("name", ["xlnet", "roberta", "electra"])
def test_other_encoders_are_refused(name: str) -> None:
    torch.manual_seed(0)
    t = transformers
    model: Any = {
        "xlnet": lambda: t.XLNetLMHeadModel(t.XLNetConfig(vocab_size=40, d_model=12, n_layer=2, n_head=2, d_inner=20)),
        "roberta": lambda: t.RobertaForCausalLM(t.RobertaConfig(**BERT_LIKE | {"max_position_embeddings": 26})),
        "electra": lambda: t.ElectraForCausalLM(t.ElectraConfig(**BERT_LIKE, embedding_size=8)),
    }[name]()
    model.eval()
    with pytest.raises(InputError, match="change with later tokens"):
        require_causal(model, collate(samples("lm")[:1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_causal_models_are_not_refused(dtype: torch.dtype) -> None:
    t = transformers
    mamba = t.MambaForCausalLM(t.MambaConfig(vocab_size=40, hidden_size=12, num_hidden_layers=2, state_size=4))
    mixtral = t.MixtralForCausalLM(t.MixtralConfig(**LLAMA_LIKE, num_local_experts=4))
    for model in (tiny("gpt2", "lm"), tiny("llama", "lm"), mamba, mixtral):
        require_causal(model.to(dtype).eval(), collate(samples("lm")))
        # Too short to say anything.
        require_causal(masked_language_model(), collate([{"input_ids": [5], "labels": [5]}]))


class Weighted(transformers.BertForSequenceClassification):
    """The second class counts nine times."""

    def forward(self, *args: Any, labels: Tensor | None = None, **inputs: Any) -> Any:
        output = super().forward(*args, **inputs)
        if labels is not None:
            weights = torch.tensor([1.0, 9.0, 1.0], dtype=output.logits.dtype)
            output.loss = nn.functional.cross_entropy(output.logits, labels, weight=weights, reduction="sum")
        return output


class Doubled(transformers.LlamaForCausalLM):
    """Token 7 counts five times."""

    def forward(self, *args: Any, labels: Tensor | None = None, **inputs: Any) -> Any:
        output = super().forward(*args, **inputs)
        if labels is not None:
            weights = torch.ones(40, dtype=output.logits.dtype)
            weights[7] = 5.0
            logits, targets = output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
            output.loss = nn.functional.cross_entropy(logits, targets, weight=weights, reduction="sum") / len(targets)
        return output


def with_own_loss(name: str) -> tuple[Any, str]:
    torch.manual_seed(0)
    if name == "class weights":
        return Weighted(transformers.BertConfig(**BERT_LIKE, num_labels=3)).eval(), "classification"
    if name == "token weights":
        return Doubled(transformers.LlamaConfig(**LLAMA_LIKE)).eval(), "lm"
    if name == "half of a squared error":
        model = tiny("bert", "regression").float()
        model.register_forward_hook(halved)
        return model, "regression"
    config = transformers.MixtralConfig(**LLAMA_LIKE, num_local_experts=4, output_router_logits=True)
    return transformers.MixtralForCausalLM(config).eval(), "lm"


def halved(_module: Any, _args: Any, output: Any) -> None:
    if output.loss is not None:
        output.loss = output.loss / 2


OWN = ["class weights", "token weights", "half of a squared error", "router"]


@pytest.mark.parametrize("name", OWN)
def test_a_loss_of_the_models_own_is_taken(name: str, caplog: pytest.LogCaptureFixture) -> None:
    model, head = with_own_loss(name)
    rows = samples(head, count=6)
    for row in rows:
        if head == "regression":
            row["labels"] = torch.tensor(row["labels"]).float()
    pad = lambda some: {k: v.float() if v.is_floating_point() else v for k, v in collate(some).items()}  # noqa: E731
    expected = []
    for row in rows:
        model.zero_grad()
        loss = model(**pad([row])).loss
        loss.backward()
        expected.append(sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None))
    model.zero_grad()
    include = r"self_attn|attention" if head != "lm" else None
    with caplog.at_level(logging.WARNING):
        found = accumulate_fisher(model, rows, collate_fn=pad, batch_size=3)
    said = [r.getMessage() for r in caplog.records if "own loss" in r.getMessage()]
    assert len(said) == 1
    torch.testing.assert_close(found.sample_trace, torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=0)
    # A head that is not scored is no way round it.
    taken = SampleGradients(model, rows, pad, scored_parameters(model, include), batch_size=3)
    losses = taken.label_losses([len(row["input_ids"]) for row in rows])
    with torch.no_grad():
        own = torch.stack([model(**pad([row])).loss.double() for row in rows])
    torch.testing.assert_close(losses, own, rtol=1e-5, atol=1e-7)


def test_objectives_of_the_models_distribution_leave_its_own_loss_out(caplog: pytest.LogCaptureFixture) -> None:
    model, _ = with_own_loss("class weights")
    plain = transformers.BertForSequenceClassification(model.config).eval()
    plain.load_state_dict(model.state_dict())
    for objective in ("sampled", "expected"):
        options: Any = {"collate_fn": collate, "batch_size": 3, "objective": objective}
        with caplog.at_level(logging.WARNING):
            found = accumulate_fisher(model, samples(), **options)
        assert f"'{objective}' takes the likelihood of the logits of Weighted" in caplog.text
        torch.testing.assert_close(found.sample_trace, accumulate_fisher(plain, samples(), **options).sample_trace)


def test_a_sum_of_tokens_and_a_loss_of_the_models_own_exclude_each_other() -> None:
    model, _ = with_own_loss("router")
    with pytest.raises(
        InputError, match=r"fisher.token_reduction: found 'sum'; expected 'mean' for MixtralForCausalLM"
    ):
        accumulate_fisher(model, samples("lm"), collate_fn=collate, token_reduction="sum")


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("head", ["classification", "regression", "lm"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_plain_losses_do_not_differ(family: str, head: str, dtype: torch.dtype) -> None:
    if (family, head) == ("bert", "lm"):
        return
    model, batch = tiny(family, head).to(dtype), collate(samples(head)[:1])
    kind = {"lm": "causal-lm"}.get(head, head)
    ours = lambda logits, labels: sample_losses(kind, logits, labels)  # noqa: E731
    assert not loss_differs(model, batch, ours)
    assert loss_differs(model, batch, lambda logits, labels: 1.1 * ours(logits, labels))


class Own(nn.Module):
    """Logits, and a loss that asks for other labels, or none."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(40, 6), nn.Linear(6, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Any = None) -> Any:
        if labels is not None:
            raise ValueError("expected one-hot labels")
        return self.head((self.embedding(input_ids) * attention_mask.unsqueeze(2)).sum(1))


def test_models_that_want_other_labels_go_on(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        accumulate_fisher(Own(), samples(), collate_fn=collate, batch_size=3)
    assert not caplog.records
