"""Memory of a rank in each phase of a run, from the model's config.json alone; no weights are loaded.

The model is built on the meta device, where tensors have shapes and no bytes. A few of its layers run there and their
bytes are counted; everything else is arithmetic.
"""
