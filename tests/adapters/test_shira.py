"""Adapters for SHiRA, loaded by stock PEFT: the same logits, bit for bit, or a line that says why not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from irdscale import Mask, export_shira, load_adapter, save_adapter, sparsify
from irdscale.errors import InputError
from irdscale.sparse import entries_of
from tests.tiny_models import collate, samples, tiny

peft = pytest.importorskip("peft", reason="PEFT is not installed: pip install peft")

FAMILIES = ("bert", "roberta", "distilbert", "llama", "albert")
TYPES = (torch.float32, torch.bfloat16, torch.float64)
HEAD = ("classifier", "score")
# Wide enough for a sparse matrix to be smaller than the weight.
WIDE = {"hidden_size": 48, "intermediate_size": 80}
DISTILBERT = {"dim": 48, "hidden_dim": 80}


def inputs() -> dict[str, Tensor]:
    return {name: tensor for name, tensor in collate(samples()).items() if name != "labels"}


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(**inputs()).logits


def linear_weights(model: nn.Module, head: bool = False) -> list[str]:
    names = [f"{name}.weight" for name, module in model.named_modules() if type(module) is nn.Linear]
    return [name for name in names if head or not name.startswith(HEAD)]


def mask_of(model: nn.Module, counts: dict[str, int], seed: int = 0) -> Mask:
    """So many entries of each parameter, drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    indices, shapes = {}, {}
    for name, count in counts.items():
        shape = model.get_parameter(name).shape
        indices[name] = torch.randperm(shape.numel(), generator=generator)[:count].sort().values.to(torch.int32)
        shapes[name] = tuple(shape)
    return Mask(indices, shapes)


def train(model: Any, mask: Mask, always_train: tuple[str, ...] = ()) -> Any:
    sparsify(model, mask, always_train=always_train)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    return model


def loaded(base: nn.Module, folder: Path, **options: Any) -> Any:
    return peft.PeftModel.from_pretrained(base, str(folder), **options).eval()


def forget_head(model: Any) -> Any:
    """A new head is drawn at each load of a checkpoint without one."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(HEAD):
                parameter.normal_()
    return model


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_stock_peft_gives_the_same_logits(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """No tolerance: PEFT adds the same numbers in the same type, and rounds to the weight's type where we do."""

    def fresh() -> Any:
        return tiny(family, **(DISTILBERT if family == "distilbert" else WIDE)).to(dtype)

    model = fresh()
    sizes = torch.randint(1, 250, (len(linear_weights(model)),), generator=torch.Generator().manual_seed(1)).tolist()
    counts = dict(zip(linear_weights(model), sizes, strict=True))
    train(model, mask_of(model, counts), (rf"^({'|'.join(HEAD)})\.",))
    expected = logits(model)
    facts = export_shira(model, tmp_path / "shira")
    assert torch.equal(logits(model), expected), "the model stays as it is"
    assert sorted(p.name for p in (tmp_path / "shira").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    base = forget_head(fresh())
    assert not torch.equal(logits(base), expected)
    found = loaded(base, tmp_path / "shira")
    assert torch.equal(logits(found), expected)
    layers = {name: module for name, module in found.named_modules() if hasattr(module, "shira_indices")}
    whole = [name for name in counts if name.removesuffix(".weight") in facts["whole"]]
    assert len(layers) == facts["layers"] == len(counts) - len(whole) > len(counts) / 2
    assert facts["stored"] == sum(module.shira_weight["default"].numel() for module in layers.values())
    assert torch.equal(logits(found.merge_and_unload()), expected)


def test_a_language_model_with_a_tied_head(tmp_path: Path) -> None:
    model = tiny("llama", "lm", tie_word_embeddings=True).float()
    train(model, mask_of(model, {name: 9 for name in linear_weights(model) if "layers" in name}))
    export_shira(model, tmp_path / "shira")
    found = loaded(tiny("llama", "lm", tie_word_embeddings=True).float(), tmp_path / "shira")
    assert torch.equal(logits(found), logits(model))


def test_places_are_distinct_and_padding_is_zero_outside_the_mask(tmp_path: Path) -> None:
    model = tiny("bert", **WIDE).float()
    names = linear_weights(model)
    counts = dict.fromkeys(names, 130) | {names[0]: 0, names[1]: 1, names[2]: 192}
    # Three layers that need r = 3, so that it is worth the padding of the others.
    counts |= {names[3]: 193, names[7]: 288, names[8]: 250}
    mask = mask_of(model, counts)
    # The first places are taken, so the padding has to go around them.
    mask.indices[names[4]].copy_(torch.arange(130, dtype=torch.int32))
    train(model, mask)
    facts = export_shira(model, tmp_path / "shira")
    assert facts == {"r": 3, "layers": len(names) - 1, "stored": 3 * (8 * 96 + 4 * 128), "whole": []}
    tensors = load_file(tmp_path / "shira/adapter_model.safetensors")
    assert len(tensors) == 2 * facts["layers"]
    for name in names[1:]:
        key = "base_model.model." + name.removesuffix(".weight")
        places, values = tensors[f"{key}.shira_indices"], tensors[f"{key}.shira_weight"]
        rows, columns = mask.shapes[name]
        assert (places.dtype, values.dtype) == (torch.int32, torch.float32)
        assert places.shape == (2, 3 * (rows + columns))
        flat = places[0].long() * columns + places[1]
        assert bool((flat[1:] > flat[:-1]).all())
        assert bool((places >= 0).all() and (places[0] < rows).all() and (places[1] < columns).all())
        held = torch.isin(flat, mask.indices[name].long())
        assert int(held.sum()) == counts[name]
        assert torch.equal(flat[held], mask.indices[name].long())
        assert torch.equal(values[held], entries_of(model)[name].values.detach())
        assert not values[~held].any()


def test_the_configuration_is_what_peft_reads(tmp_path: Path) -> None:
    model = tiny("llama")
    model.config._name_or_path = "me/base"
    train(model, mask_of(model, dict.fromkeys(linear_weights(model)[:2], 5)), ("^score",))
    export_shira(model, tmp_path / "shira")
    config = peft.PeftConfig.from_pretrained(tmp_path / "shira")
    assert type(config) is peft.ShiraConfig
    assert (config.r, config.base_model_name_or_path, config.modules_to_save) == (1, "me/base", ["score"])
    raw = json.loads((tmp_path / "shira/adapter_config.json").read_text())
    assert set(raw) <= set(vars(config)), "no key that PEFT does not know"


BIG, MIDDLE, SMALL = "bert.encoder.layer.0.intermediate.dense.weight", "bert.pooler.dense.weight", "classifier.weight"


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        # r = 3 from 257 entries of 80 x 48; the classifier has 3 x 48 places, and r = 3 would be 153.
        ({BIG: 257, MIDDLE: 1, SMALL: 3}, {"r": 3, "layers": 2, "stored": 3 * (128 + 96), "whole": ["classifier"]}),
        # The classifier alone with r = 2.
        ({SMALL: 52}, {"r": 2, "layers": 1, "stored": 102, "whole": []}),
        # r = 20 of the pooler is 23,040 bytes, and its weight is 9,216.
        ({BIG: 1, MIDDLE: 1920}, {"r": 1, "layers": 1, "stored": 128, "whole": ["bert.pooler.dense"]}),
        # r = 30 is the last that 80 x 48 places have room for.
        ({BIG: 3841 - 1, MIDDLE: 97}, {"r": 2, "layers": 1, "stored": 192, "whole": [BIG.removesuffix(".weight")]}),
    ],
)
def test_r_makes_the_file_smallest_and_what_it_does_not_fit_is_stored_whole(
    counts: dict[str, int], expected: dict[str, Any], tmp_path: Path
) -> None:
    model = tiny("bert", **WIDE).float()
    train(model, mask_of(model, counts))
    assert export_shira(model, tmp_path / "shira") == expected
    assert torch.equal(logits(loaded(tiny("bert", **WIDE).float(), tmp_path / "shira")), logits(model))


def test_a_partly_trained_head_takes_its_other_numbers_along(tmp_path: Path) -> None:
    """One module: a bias trained whole, a weight with masked entries."""
    model = tiny("bert")
    train(model, mask_of(model, {"bert.pooler.dense.weight": 20, "classifier.weight": 4}), (r"^classifier\.bias$",))
    assert export_shira(model, tmp_path / "shira")["whole"] == ["classifier"]
    assert torch.equal(logits(loaded(tiny("bert"), tmp_path / "shira")), logits(model))


def test_a_head_that_the_checkpoint_does_not_hold_goes_along(tmp_path: Path) -> None:
    model = train(tiny("bert"), mask_of(tiny("bert"), {"bert.pooler.dense.weight": 20}))
    new = ["classifier.weight", "classifier.bias"]
    assert export_shira(model, tmp_path / "shira", also=new)["whole"] == ["classifier"]
    assert torch.equal(logits(loaded(forget_head(tiny("bert")), tmp_path / "shira")), logits(model))


def test_a_loaded_adapter_exports_like_the_trained_one(tmp_path: Path) -> None:
    model = tiny("bert").float()
    train(model, mask_of(model, dict.fromkeys(linear_weights(model), 9)), (r"^classifier\.",))
    save_adapter(model, tmp_path / "adapter")
    export_shira(model, tmp_path / "a")
    export_shira(load_adapter(tiny("bert").float(), tmp_path / "adapter"), tmp_path / "b")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_peft_goes_on_training_the_places_of_the_mask(tmp_path: Path) -> None:
    model = tiny("bert").float()
    names = linear_weights(model)
    train(model, mask_of(model, dict.fromkeys(names, 20)), (r"^classifier\.",))
    export_shira(model, tmp_path / "shira")
    found = loaded(tiny("bert").float(), tmp_path / "shira", is_trainable=True)
    found(**inputs(), labels=torch.zeros(8, dtype=torch.long)).loss.backward()
    gradients = [p.grad for n, p in found.named_parameters() if "shira_weight" in n]
    assert len(gradients) == len(names)
    assert all(bool(g.any()) for g in gradients)


def test_a_fresh_process_without_irdscale(tmp_path: Path) -> None:
    tiny("llama").float().save_pretrained(tmp_path / "base")
    model = tiny("llama").float()
    train(model, mask_of(model, dict.fromkeys(linear_weights(model), 9)), (r"^score\.",))
    export_shira(model, tmp_path / "shira")
    code = (
        "import sys, torch\n"
        # To import it takes as long as all the rest.
        "sys.modules['bitsandbytes'] = None\n"
        "from peft import PeftModel; from transformers import AutoModelForSequenceClassification\n"
        "base, adapter, out = sys.argv[1:]\n"
        "model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3, dtype='float32')\n"
        "model = PeftModel.from_pretrained(model, adapter).eval()\n"
        "assert 'irdscale' not in sys.modules\n"
        "from safetensors.torch import load_file, save_file\n"
        "save_file({'logits': model(**load_file(base + '/inputs')).logits.detach()}, out)\n"
    )
    from safetensors.torch import save_file

    save_file(inputs(), tmp_path / "base/inputs")
    places = [str(tmp_path / name) for name in ("base", "shira", "out")]
    subprocess.run([sys.executable, "-c", code, *places], check=True, cwd=tmp_path, timeout=300, capture_output=True)
    assert torch.equal(load_file(tmp_path / "out")["logits"], logits(model))


REST = "outside untied nn.Linear weights; expected entries in those alone (see fisher.include), or format=merged"


@pytest.mark.parametrize(
    ("family", "head", "counts", "always_train", "message"),
    [
        (
            "bert",
            "classification",
            {
                "bert.embeddings.word_embeddings.weight": 7,
                "bert.pooler.dense.weight": 5,
                "bert.encoder.layer.0.output.LayerNorm.weight": 2,
                "bert.encoder.layer.1.output.dense.bias": 1,
            },
            (),
            "bert.embeddings.word_embeddings.weight: found 7 entries in the weight of a Embedding, and "
            f"10 of the mask's 15 {REST}",
        ),
        (
            "gpt2",
            "classification",
            {"transformer.h.0.attn.c_attn.weight": 7},
            (),
            "transformer.h.0.attn.c_attn.weight: found 7 entries in the weight of a Conv1D, and 7 of "
            f"the mask's 7 {REST}",
        ),
        (
            "llama",
            "lm",
            {"model.layers.0.mlp.up_proj.weight": 3, "model.embed_tokens.weight": 4},
            (),
            f"model.embed_tokens.weight: found 4 entries in a tied parameter, and 4 of the mask's 7 {REST}",
        ),
        (
            "llama",
            "lm",
            {"model.layers.0.mlp.up_proj.weight": 3},
            (r"^model\.embed_tokens",),
            "model.embed_tokens.weight: must be stored in full and is tied (model.embed_tokens, lm_head), which PEFT "
            "would untie; expected format=merged",
        ),
        ("bert", "classification", {}, (r"^classifier\.",), "found no linear weights that it can hold; expected some"),
    ],
)
def test_what_shira_cannot_say_is_refused(
    family: str, head: str, counts: dict[str, int], always_train: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    model = tiny(family, head, tie_word_embeddings=True)
    train(model, mask_of(model, counts), always_train)
    with pytest.raises(InputError) as refusal:
        export_shira(model, tmp_path / "shira")
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "shira").exists()


def test_parameters_of_the_root_and_of_other_linears_are_refused(tmp_path: Path) -> None:
    class Doubling(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))
            self.layer, self.other = nn.Linear(4, 5), Doubling(4, 5)

    model = train(Root(), mask_of(Root(), {"layer.weight": 2}), ("^scale$",))
    with pytest.raises(InputError, match=r"scale: must be stored in full and is in no submodule"):
        export_shira(model, tmp_path / "shira")
    model = train(Root(), mask_of(Root(), {"other.weight": 2}))
    with pytest.raises(InputError, match=r"other.weight: found 2 entries in the weight of a Doubling"):
        export_shira(model, tmp_path / "shira")
    with pytest.raises(InputError, match="not a sparse model"):
        export_shira(Root(), tmp_path / "shira")
    assert not (tmp_path / "shira").exists()
