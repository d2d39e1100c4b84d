"""Tiny GGUF files, written by the package gguf, and the weights that they stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

HIDDEN, INNER, LAYERS, HEADS, KEY_HEADS = 32, 64, 2, 2, 1
_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_CHAT = "{% for message in messages %}{{ message['content'] }}<|end|>{% endfor %}"


def tiny_gguf(
    file: Path, *, quantized: str = "Q8_0", architecture: str = "llama", seed: int = 0, without: str = "", **values: Any
) -> dict[str, np.ndarray]:
    """Write a random Llama of two layers, width 32 and byte tokens; returns its weights under transformers' names.

    Args:
        quantized: GGML type of the matrices; norms are float32.
        without: name of a GGUF tensor that is left out.
        values: more keys of the file, dots as double underscores, such as `split__count`.
    """
    import gguf

    tokens, merges = _vocabulary()
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_name("tiny")
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges(merges)
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(0)
    writer.add_chat_template(_CHAT)
    for key, value in values.items():
        writer.add_uint32(key.replace("__", "."), value)
    kind = getattr(gguf.GGMLQuantizationType, quantized)
    found = {}
    for name, weight in _weights(len(tokens), seed).items():
        stored, is_matrix = _stored(name, weight), weight.ndim > 1
        blocks = gguf.quantize(stored, kind) if is_matrix else stored
        if name != without:
            writer.add_tensor(name, blocks, raw_dtype=kind if is_matrix else None)
        whole = gguf.dequantize(blocks, kind) if is_matrix else stored
        found[_name_of(name)] = _unstored(name, whole)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return found


def _vocabulary() -> tuple[list[str], list[str]]:
    """An end token, the bytes as GPT-2 writes them, and a few pairs."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    merges = ["t h", "th e", "Ġ the", "i n"]
    return ["<|end|>", *bytes_to_unicode().values(), *(pair.replace(" ", "") for pair in merges)], merges


def _weights(tokens: int, seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    keys = HIDDEN // HEADS * KEY_HEADS
    shapes = {"token_embd.weight": (tokens, HIDDEN), "output_norm.weight": (HIDDEN,)}
    for layer in range(LAYERS):
        shapes |= {
            f"blk.{layer}.attn_q.weight": (HIDDEN, HIDDEN),
            f"blk.{layer}.attn_k.weight": (keys, HIDDEN),
            f"blk.{layer}.attn_v.weight": (keys, HIDDEN),
            f"blk.{layer}.attn_output.weight": (HIDDEN, HIDDEN),
            f"blk.{layer}.ffn_gate.weight": (INNER, HIDDEN),
            f"blk.{layer}.ffn_up.weight": (INNER, HIDDEN),
            f"blk.{layer}.ffn_down.weight": (HIDDEN, INNER),
            f"blk.{layer}.attn_norm.weight": (HIDDEN,),
            f"blk.{layer}.ffn_norm.weight": (HIDDEN,),
        }
    return {name: (random.normal(size=shape) * 0.1 + (len(shape) == 1)).astype("f4") for name, shape in shapes.items()}


def _heads(name: str) -> int | None:
    return HEADS if "attn_q." in name else KEY_HEADS if "attn_k." in name else None


def _stored(name: str, weight: np.ndarray) -> np.ndarray:
    """llama.cpp's order of the rows of queries and keys: pairs of a rotation lie side by side."""
    heads = _heads(name)
    if heads is None:
        return weight
    return np.ascontiguousarray(weight.reshape(heads, 2, -1, HIDDEN).swapaxes(1, 2).reshape(weight.shape))


def _unstored(name: str, weight: np.ndarray) -> np.ndarray:
    heads = _heads(name)
    return weight if heads is None else weight.reshape(heads, -1, 2, HIDDEN).swapaxes(1, 2).reshape(weight.shape)


def _name_of(name: str) -> str:
    whole = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    if name in whole:
        return whole[name]
    _, layer, part, _ = name.split(".")
    return f"model.layers.{layer}.{_NAMES[part]}.weight"
