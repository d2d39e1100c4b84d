"""The model card of an adapter folder, for the Hugging Face hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from irdscale.models.places import is_gguf
from irdscale.utils.hub import is_hub_id

TAGS = ("irdscale", "sparse-fine-tuning", "adapter")


def model_card(model: nn.Module, meta: dict[str, Any]) -> str:
    """Markdown with the hub's YAML header.

    Args:
        model: the sparse model.
        meta: contents of adapter.json.
    """
    from huggingface_hub import ModelCardData

    named = str(meta["base_model"])
    # Of a GGUF file transformers wants the folder, or the hub id, and the name.
    base, _, gguf = named.rpartition("/") if is_gguf(named) else (named, "", "")
    on_hub = is_hub_id(base) and not Path(base).exists()
    # The path of a local folder is private, and of no use to others.
    shown = base if on_hub else Path(base.removeprefix("package:")).name or "the base model"
    header = ModelCardData(library_name="irdscale", base_model=base if on_hub else None, tags=list(TAGS))
    kind = getattr(type(model), "_original", type(model)).__name__
    labels = getattr(getattr(model, "config", None), "num_labels", None)
    options = f", gguf_file={json.dumps(gguf)}" if gguf else ""
    options += f", num_labels={labels}" if kind.endswith("ForSequenceClassification") and labels else ""
    dense = f", and all {meta['dense_parameters']:,} parameters of {', '.join(meta['dense'])}" if meta["dense"] else ""
    return f"""---
{header}
---

# Sparse adapter for {gguf or shown}

Trains {meta["k"]:,} entries of the model's weights{dense}; all other weights equal the base's, bit for bit.

```python
import irdscale
from transformers import {kind}

model = {kind}.from_pretrained({json.dumps(shown)}{options})
irdscale.load_adapter(model, "OWNER/NAME")  # this repository, or a folder; refuses another base
```

`irdscale.merge(model)` gives a plain Hugging Face model, `irdscale.unload(model)` the base model again.

| | |
|---|---|
| trained entries (k) | {meta["k"]:,} |
| densely trained parameters | {meta["dense_parameters"]:,} |
| mask | `{meta["mask_hash"]}` |
| base weights (SHA-256) | `{meta["base_hash"]}` |
"""
