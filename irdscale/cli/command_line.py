"""The `irdscale` command. Each verb is thin: it reads its arguments and calls one function that Python users can call.

Exit codes: 0 done, 1 failed, 2 bad input, 130 interrupted. Results go to stdout; progress, logs and errors to stderr.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from irdscale.cli.console import print_bench, print_doctor, print_search, readable
from irdscale.distributed.process_group import alone, in_process_group, launched, leave, tell_others
from irdscale.errors import InputError, RunError

if TYPE_CHECKING:
    from irdscale.config.schema import RunConfig

BENCH_PARTS = ("fisher", "train", "search", "gpu", "all")
# Defaults only: someone who looks for a fault in these libraries can still turn their messages on.
QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
    "EVALUATE_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}

app = typer.Typer(
    name="irdscale",
    help="Find the few parameters worth training and the samples that tell which, then train just those.",
    epilog="Start with:\n\nirdscale search configs/quickstart.yaml",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

Config = Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file, such as configs/quickstart.yaml.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Changes to the configuration, such as search.ratio=0.01."),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Remove what irdscale wrote to the output folder before, and begin anew.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else, on stdout.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        from irdscale import __version__

        typer.echo(f"irdscale {__version__}")
        raise typer.Exit


@app.callback()
def _irdscale(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    # The deepspeed launcher passes it to every program; the environment says the same.
    local_rank: Annotated[int, typer.Option("--local_rank", hidden=True)] = 0,
) -> None:
    pass


@app.command(epilog="Example:\n\nirdscale search configs/quickstart.yaml output=runs/short")
def search(config: Config, overrides: Overrides = None, overwrite: Overwrite = False, as_json: Json = False) -> None:
    """Search for the best samples and parameters, train the winner, write the report.

    Interrupted, the same command goes on from there. Under torchrun or deepspeed, all ranks share the Fisher passes and
    train each candidate together; with search.runner=ray, candidates run side by side on a Ray cluster.
    """
    with _ending(saves=True) as ending:
        settings, _ = _load(config, overrides)
        check_writable(settings.output, "output")
        with _ranks(settings) if settings.search.runner == "local" else _cluster(settings):
            from irdscale.report import write_report
            from irdscale.search.run import run_search

            ending.promise = "the same command goes on from there"
            result = run_search(settings, progress=True, **_anew(overwrite))
            if launched()[0] == 0:
                write_report(Path(settings.output))
    _show(result, as_json, lambda: print_search(result, Path(settings.output)))


@app.command(epilog="Example:\n\nirdscale fisher configs/quickstart.yaml output=runs/fisher search.ratio=0.001")
def fisher(config: Config, overrides: Overrides = None, overwrite: Overwrite = False, as_json: Json = False) -> None:
    """Measure the Fisher information and write the mask of the largest entries.

    Interrupted, the same command goes on from there. Under torchrun, all ranks share the samples.
    """
    with _ending(saves=True) as ending:
        settings, _ = _load(config, overrides)
        check_writable(settings.output, "output")
        with _ranks(settings, train=settings.fisher.head_warmup > 0):
            from irdscale.training.one_mask import run_fisher

            ending.promise = "the same command goes on from there"
            result = run_fisher(settings, progress=True, **_anew(overwrite))
    _show(result, as_json)


@app.command(epilog="Example:\n\nirdscale train configs/quickstart.yaml output=runs/train mask=runs/fisher/mask")
def train(config: Config, overrides: Overrides = None, overwrite: Overwrite = False, as_json: Json = False) -> None:
    """Train one mask and save the adapter: mask=DIR, or a mask made with search.ratio.

    Interrupted, the same command goes on from the state saved last. Under torchrun or deepspeed, all ranks train
    together.
    """
    with _ending(saves=True) as ending:
        settings, given = _load(config, overrides, takes=("mask",))
        check_writable(settings.output, "output")
        with _ranks(settings):
            from irdscale.training.one_mask import run_train

            ending.promise = "the same command goes on from the state saved last"
            result = run_train(settings, mask=given.get("mask"), progress=True, **_anew(overwrite))
    _show(result, as_json)


@app.command(epilog="Example:\n\nirdscale evaluate configs/quickstart.yaml adapter=runs/quickstart/adapter")
def evaluate(config: Config, overrides: Overrides = None, as_json: Json = False) -> None:
    """Measure a trained adapter: adapter=DIR."""
    with _ending():
        settings, given = _load(config, overrides, takes=("adapter",), needs=("adapter",))
        with _ranks(settings, train=False):
            from irdscale.training.one_mask import run_evaluate

            result = run_evaluate(settings, adapter=given["adapter"], progress=True)
    _show(result, as_json)


@app.command(epilog="Example:\n\nirdscale export configs/quickstart.yaml adapter=runs/a/adapter to=merged")
def export(config: Config, overrides: Overrides = None, as_json: Json = False) -> None:
    """Write an adapter for others to load: adapter=DIR to=DIR.

    A plain Hugging Face checkpoint with the adapter merged in; with format=shira, an adapter for PEFT's SHiRA.

    With to=hub:OWNER/NAME, upload the adapter as it is to the Hugging Face hub. A new repository there is private.
    """
    with _ending():
        alone("export")
        settings, given = _load(config, overrides, takes=("adapter", "to", "format"), needs=("adapter", "to"))
        if not given["to"].startswith("hub:"):
            check_writable(given["to"], "to")
        from irdscale.training.one_mask import run_export

        result = run_export(settings, **given)
    _show(result, as_json)


@app.command(epilog="Example:\n\nirdscale compare configs/studies/lm_mixed.yaml")
def compare(config: Config, overrides: Overrides = None, overwrite: Overwrite = False, as_json: Json = False) -> None:
    """Compare ways to fine-tune, over seeds: IRD, FISH, other masks, LoRA, BitFit, full fine-tuning; write the report.

    Every method has the same learning rates and number of trainings; choices are made on the selection split, and what
    was chosen is measured on the test split. Interrupted, the same command goes on from there; so it does with more
    methods, seeds or learning rates.
    """
    with _ending(saves=True) as ending:
        settings, _ = _load(config, overrides)
        check_writable(settings.output, "output")
        with _ranks(settings) if settings.search.runner == "local" else _cluster(settings):
            from irdscale.compare import write_comparison
            from irdscale.compare.run import run_compare

            ending.promise = "the same command goes on from there"
            result = run_compare(settings, progress=True, **_anew(overwrite))
            if launched()[0] == 0:
                write_comparison(Path(settings.output))
    from irdscale.compare.show import print_comparison

    _show(result, as_json, lambda: print_comparison(result, Path(settings.output)))


@app.command(epilog="Example:\n\nirdscale report runs/quickstart")
def report(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file, or the output folder of a search.")],
    overrides: Overrides = None,
    samples: Annotated[
        bool,
        typer.Option(
            "--samples",
            help="Also measure which samples drive the winner's mask: one backward pass for each of its samples; "
            "loads the model.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Write the report of a search or a comparison again, from what is in its output folder."""
    with _ending():
        if samples:
            alone("report --samples")
        if Path(config).is_dir():
            if overrides:
                raise InputError(f"{overrides[0]}: found a folder and a key=value; expected the folder alone")
            output = Path(config)
        else:
            output = Path(_load(config, overrides)[0].output)
        if not output.is_dir():
            raise InputError(f"{output}: no such folder; expected the output of irdscale search or compare")
        check_writable(output, "output")
        if (output / "compare.json").exists():
            if samples:
                raise InputError(f"--samples: {output}: found a comparison; expected the output of a search")
            from irdscale.compare import write_comparison

            result = write_comparison(output)
        else:
            from irdscale.report import write_report

            result = write_report(output, samples=samples, progress=True)
    _show(result, as_json)


@app.command(epilog="Example:\n\nirdscale doctor configs/quickstart.yaml search.runner=ray")
def doctor(
    config: Annotated[
        str | None, typer.Argument(metavar="[CONFIG]", help="A YAML file whose search to estimate.")
    ] = None,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Say what this machine can run, and what it cannot and why; with CONFIG, how long its search will take.

    For that, a few of its steps are measured; with search.runner=ray, on the cluster too.
    """
    with _ending():
        settings = None
        if config is not None:
            alone("doctor")
            settings, _ = _load(config, overrides)
        from irdscale.cli.doctor import diagnose

        result = diagnose(settings)
    _show(result, as_json, lambda: print_doctor(result))
    if not result["ok"]:
        raise typer.Exit(1)


@app.command(epilog="Example:\n\nirdscale plan configs/quickstart.yaml gpus_per_node=8 gpu=h100-80gb")
def plan(config: Config, overrides: Overrides = None, as_json: Json = False) -> None:
    """Say what a run will take: memory a rank, traffic, operations and hours, and which layout fits. Loads no weights.

    For nodes=N gpus_per_node=N gpu=NAME: h100-80gb, h200-141gb, b200-180gb, a100-40gb, a100-80gb, l40s-48gb,
    rtx4090-24gb, or cpu. tokens=N and train_samples=N stand for what only the data say.
    """
    with _ending():
        alone("plan")
        from irdscale.plan import run_plan
        from irdscale.plan.options import split_options

        given, rest = split_options(overrides or [])
        result = run_plan(_load(config, rest)[0], **given)
    from irdscale.plan.show import print_plan

    _show(result, as_json, lambda: print_plan(result))


@app.command(epilog="Example:\n\nirdscale bench fisher")
def bench(
    part: Annotated[str, typer.Argument(metavar="PART", help="fisher, train, search, gpu, or all.")] = "all",
    as_json: Json = False,
) -> None:
    """Time this machine: Fisher passes, sparse training steps and searches on Ray against the usual ways.

    The part gpu needs one: its kernels, and models of 1B and 8B parameters. All has it where there is a GPU.
    """
    with _ending():
        if part not in BENCH_PARTS:
            from irdscale.config.schema import nearest

            raise InputError(f"part: found {part!r}{nearest(part, BENCH_PARTS)}; expected {', '.join(BENCH_PARTS)}")
        from irdscale.bench import run_bench

        result = run_bench(part, progress=True)
    _show(result, as_json, lambda: print_bench(result))
    if result["failed"]:
        raise typer.Exit(1)


@contextmanager
def _ranks(settings: RunConfig, train: bool = True) -> Iterator[None]:
    """Run with all ranks that a launcher started, once the configuration is known to suit so many."""
    from irdscale.distributed.deepspeed import micro_batch, zero_settings

    world = launched()[2]
    if train:
        micro_batch(settings, world)
    zero = zero_settings(settings, world if train else None)
    with in_process_group(settings.distributed, always=zero is not None):
        if world > 1:
            from irdscale.config.loader import settings_of_ranks
            from irdscale.distributed.ranks import same_on_every_rank

            same_on_every_rank(settings_of_ranks(settings, zero))
        yield


@contextmanager
def _cluster(settings: RunConfig) -> Iterator[None]:
    """Run a search whose ranks are Ray's to start, once the configuration is known to suit so many."""
    from irdscale.distributed.deepspeed import micro_batch, zero_settings

    world = launched()[2]
    if world > 1:
        raise InputError(f"search.runner: found ray and {world} ranks (WORLD_SIZE); expected no launcher, or local")
    asked = settings.search.ray
    training = [asked.ranks]
    if settings.fisher.head_warmup and asked.fisher_ranks is not None:
        training.append(asked.fisher_ranks)
    for ranks in training:
        micro_batch(settings, ranks)
        zero_settings(settings, ranks)
    yield


def main() -> NoReturn:
    """Run the command line of this process and exit with its code."""
    leave(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run `irdscale ARGUMENTS` in this process and return its exit code."""
    command = typer.main.get_command(app)
    verbs = [info.name or getattr(info.callback, "__name__", "") for info in app.registered_commands]
    verb = next((argument for argument in arguments if not argument.startswith("-")), None)
    if verb is not None and verb not in verbs:
        from irdscale.config.schema import nearest

        return _complain(f"found verb {verb!r}{nearest(verb, verbs)}; expected one of {', '.join(verbs)}", 2)
    try:
        code = command.main(args=arguments or ["--help"], prog_name="irdscale", standalone_mode=False)
    except UsageError as error:
        return _complain(error.format_message(), 2)
    except typer.Abort:
        return _complain("interrupted", 130)
    if not arguments:
        return 2
    return code if isinstance(code, int) else 0


def check_writable(folder: str | Path, key: str) -> None:
    """Check that `folder`, or the nearest folder above it that exists, can be written, and leave nothing behind.

    Raises:
        InputError: it is a file, read-only, or its disk is full; `key` is the setting that named it.
    """
    folder = Path(folder).absolute()
    existing = folder
    try:
        while not existing.exists():
            existing = existing.parent
        if not existing.is_dir():
            raise InputError(f"{key}: found {folder}, but {existing} is a file; expected a folder that can be written")
        with tempfile.TemporaryFile(dir=existing) as probe:
            probe.write(bytes(65536))
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        raise InputError(
            f"{key}: cannot write to {existing}: {error.strerror or error}; expected a folder that can be written"
        ) from error


class _Handler(logging.Handler):
    """Log lines go through the progress console, so that they do not tear the bars."""

    def emit(self, record: logging.LogRecord) -> None:
        from irdscale.utils.progress import say

        if _rank_of_this_process()[0] == 0:
            say(f"irdscale: {self.format(record)}")


# The base class of every usage error, in a typer that stands on click and in one that brings its own copy.
UsageError: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")


def _anew(overwrite: bool) -> dict[str, bool]:
    return {"overwrite": True} if overwrite else {}


class _Ending:
    """How a verb ends.

    Attributes:
        promise: words that an interrupt says from now on, unless the verb says that nothing is saved.
    """

    promise = ""


@contextmanager
def _ending(saves: bool = False) -> Iterator[_Ending]:
    """Run a verb's body quietly, stdout kept for the result, and end the ways a user expects with one line.

    A bug still shows its traceback.

    Args:
        saves: the verb saves its state when it is interrupted.
    """
    ending = _Ending()
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    # DeepSpeed, which transformers imports where it is installed, warns of every machine without a GPU.
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())
    logger = logging.getLogger("irdscale")
    if not any(isinstance(handler, _Handler) for handler in logger.handlers):
        logger.addHandler(_Handler())
        logger.setLevel(logging.INFO)
        logger.propagate = False
    try:
        with redirect_stdout(sys.stderr), warnings.catch_warnings(), _terminable(saves):
            if not sys.warnoptions:
                # Meant for those who write libraries; nobody who runs a verb can act on it.
                warnings.simplefilter("ignore", FutureWarning)
            yield ending
    except InputError as error:
        with suppress(InputError):
            tell_others(str(error))
        raise typer.Exit(_complain(str(error), 2)) from None
    except RunError as error:
        raise typer.Exit(_complain(str(error), 1)) from None
    except KeyboardInterrupt as interrupt:
        promise = ending.promise if getattr(interrupt, "saved", True) else ""
        raise typer.Exit(_complain("interrupted" + (promise and f"; {promise}"), 130)) from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise
        place = f"{error.filename}: " if error.filename else ""
        raise typer.Exit(_complain(f"{place}{error.strerror}", 1)) from None


@contextmanager
def _terminable(enabled: bool) -> Iterator[None]:
    """Take SIGTERM, with which schedulers make room, for Ctrl-C."""
    if not enabled or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _complain(message: str, code: int) -> int:
    rank, local_rank, _ = _rank_of_this_process()
    # Ranks fail together; one line from each host is enough.
    if local_rank == 0:
        who = "irdscale" if rank == 0 else f"irdscale: rank {rank}"
        print(f"{who}: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return code


def _rank_of_this_process() -> tuple[int, int, int]:
    try:
        return launched()
    except InputError:
        return 0, 0, 1


def _load(
    config: str, overrides: list[str] | None, takes: tuple[str, ...] = (), needs: tuple[str, ...] = ()
) -> tuple[RunConfig, dict[str, str]]:
    """The configuration, and those key=value arguments that are the verb's own."""
    given: dict[str, str] = {}
    rest: list[str] = []
    for override in overrides or ():
        key, equals, value = override.partition("=")
        if key not in takes:
            rest.append(override)
        elif not equals or not value:
            what = "value; expected format=merged or format=shira" if key == "format" else f"folder; expected {key}=DIR"
            raise InputError(f"{key}: found no {what}")
        elif key in given:
            raise InputError(f"{key}: given twice")
        else:
            given[key] = value
    for key in needs:
        if key not in given:
            raise InputError(f"{key}: missing; expected {key}=DIR among the arguments")
    from irdscale.config.loader import load_config

    return load_config(config, rest), given


def _show(result: dict[str, Any], as_json: bool, summary: Callable[[], None] | None = None) -> None:
    if _rank_of_this_process()[0] > 0:
        return
    if as_json:
        print(json.dumps(result, indent=2, allow_nan=False))
    elif summary is not None:
        summary()
    else:
        from irdscale.config.loader import leaves

        for key, value in leaves({key: value for key, value in result.items() if value != []}):
            print(f"{key:24} {readable(value)}")
    sys.stdout.flush()
