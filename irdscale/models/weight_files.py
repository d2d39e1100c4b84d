"""Names of the files that hold a checkpoint's weights."""

# In the order of transformers, which loads the first that exists.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
