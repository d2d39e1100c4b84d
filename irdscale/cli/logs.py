"""What the command logs, and what the libraries below it are kept from logging."""

from __future__ import annotations

import logging
import os

from irdscale.cli.ranks import rank_of_this_process

# Defaults only: whoever debugs these libraries can still turn their messages on.
QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
    "EVALUATE_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}


class _Handler(logging.Handler):
    """Prints log lines through the progress console, so that they do not break the bars."""

    def emit(self, record: logging.LogRecord) -> None:
        from irdscale.utils.progress import say

        if rank_of_this_process()[0] == 0:
            say(f"irdscale: {self.format(record)}")


def quiet_libraries() -> None:
    """Turn off the warnings and progress bars of libraries, unless the environment turns them on."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    # DeepSpeed, which transformers imports where it is installed, warns on every machine without a GPU.
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())


def log_to_stderr() -> None:
    """Print the log lines of this package, from INFO up, on stderr."""
    logger = logging.getLogger("irdscale")
    if not any(isinstance(handler, _Handler) for handler in logger.handlers):
        logger.addHandler(_Handler())
        logger.setLevel(logging.INFO)
        logger.propagate = False
