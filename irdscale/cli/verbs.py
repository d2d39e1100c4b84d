"""The verbs. Each reads its arguments and calls one function, which Python users can call too.

Heavy packages are imported after the arguments are checked, so that errors and `--help` come quickly.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Annotated, Any

import typer

from irdscale.cli.app import verb
from irdscale.cli.arguments import Config, Json, Overrides, Overwrite, load_arguments
from irdscale.cli.console import print_bench, print_search, print_train, show
from irdscale.cli.ending import ending
from irdscale.cli.keys import FORMAT, MASK, NEEDED_ADAPTER, PLAN_KEYS, TO, TO_FILE
from irdscale.cli.ranks import candidate_ranks, launched_ranks
from irdscale.cli.show_doctor import print_doctor
from irdscale.distributed.process_group import alone, launched
from irdscale.errors import InputError
from irdscale.training.targets import HUB, check_export, check_target
from irdscale.utils.files import check_writable
from irdscale.utils.suggestions import nearest

if TYPE_CHECKING:
    from irdscale.config.schema import RunConfig

BENCH_PARTS = ("fisher", "train", "search", "gpu", "all")


@contextmanager
def _saving(
    verb: str, config: str, overrides: list[str] | None, resumes: str = "the same command goes on from there"
) -> Iterator[tuple[RunConfig, dict[str, str]]]:
    """Run the body of a verb that saves its state in the output folder; yields the result of `load_arguments`."""
    with ending(resumes):
        settings, given = load_arguments(verb, config, overrides)
        check_writable(settings.output, "output")
        yield settings, given


@verb("irdscale search configs/quickstart.yaml output=runs/short")
def search(config: Config, overrides: Overrides = None, overwrite: Overwrite = False, as_json: Json = False) -> None:
    """Search for the best samples and parameters, train the winner, write the report.

    After an interrupt, the same command resumes. Under torchrun or deepspeed, all ranks share the Fisher passes and
    train each candidate together; with search.runner=ray, candidates run side by side on a Ray cluster.
    """
    with _saving("search", config, overrides) as (settings, _), candidate_ranks(settings):
        from irdscale.report import write_report
        from irdscale.search.run import run_search

        result = run_search(settings, progress=True, overwrite=overwrite)
        if launched()[0] == 0:
            write_report(Path(settings.output))
    show(result, as_json, lambda: print_search(result, Path(settings.output)))


@verb("irdscale fisher configs/quickstart.yaml output=runs/fisher search.ratio=0.001")
def fisher(config: Config, overrides: Overrides = None, overwrite: Overwrite = False, as_json: Json = False) -> None:
    """Measure the Fisher information and write the mask of the largest entries.

    After an interrupt, the same command resumes. Under torchrun, all ranks share the samples.
    """
    with (
        _saving("fisher", config, overrides) as (settings, _),
        launched_ranks(settings, train=settings.fisher.head_warmup > 0),
    ):
        from irdscale.training.one_mask import run_fisher

        result = run_fisher(settings, progress=True, overwrite=overwrite)
    show(result, as_json)


@verb("irdscale train configs/quickstart.yaml output=runs/train mask=runs/fisher/mask", MASK)
def train(config: Config, overrides: Overrides = None, overwrite: Overwrite = False, as_json: Json = False) -> None:
    """Train one mask and save the adapter: mask=DIR, or a mask made with search.ratio.

    After an interrupt, the same command resumes from the last saved state. Under torchrun or deepspeed, all ranks train
    together.
    """
    resumes = "the same command goes on from the state saved last"
    with _saving("train", config, overrides, resumes) as (settings, given), launched_ranks(settings):
        from irdscale.training.one_mask import run_train

        result = run_train(settings, mask=given.get("mask"), progress=True, overwrite=overwrite)
    show(result, as_json, lambda: print_train(result))


@verb("irdscale evaluate configs/quickstart.yaml adapter=runs/quickstart/adapter", NEEDED_ADAPTER, TO_FILE)
def evaluate(config: Config, overrides: Overrides = None, as_json: Json = False) -> None:
    """Measure a trained adapter. With to=FILE, also write its predictions for the test split."""
    with ending():
        settings, given = load_arguments("evaluate", config, overrides)
        check_target(given.get("to"))
        if "to" in given:
            check_writable(Path(given["to"]).parent, "to")
        with launched_ranks(settings, train=False):
            from irdscale.training.one_mask import run_evaluate

            result = run_evaluate(settings, **given, progress=True)
    show(result, as_json)


@verb("irdscale export configs/quickstart.yaml adapter=runs/a/adapter to=merged", NEEDED_ADAPTER, TO, FORMAT)
def export(config: Config, overrides: Overrides = None, as_json: Json = False) -> None:
    """Write an adapter for others to load: adapter=DIR to=DIR.

    The default is a plain Hugging Face checkpoint with the adapter merged in; format=shira writes an adapter for PEFT's
    SHiRA.

    With to=hub:OWNER/NAME, upload the adapter unchanged to the Hugging Face hub. A new repository there is private.
    """
    with ending():
        alone("export")
        settings, given = load_arguments("export", config, overrides)
        if not given["to"].startswith(HUB):
            check_writable(given["to"], "to")
        check_export(given["to"], given.get("format"))
        from irdscale.training.one_mask import run_export

        result = run_export(settings, **given)
    show(result, as_json)


@verb("irdscale compare configs/studies/lm_mixed.yaml")
def compare(
    config: Config,
    overrides: Overrides = None,
    minutes: Annotated[
        float | None,
        typer.Option(
            "--minutes",
            metavar="N",
            help="Start only what is expected to end within N minutes, seed after seed, and report the seeds that are "
            "complete for all methods. The same command goes on.",
            show_default=False,
        ),
    ] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Compare ways to fine-tune, over seeds: IRD, FISH, other masks, LoRA, BitFit, full fine-tuning; write the report.

    Every method gets as many learning rates and trainings; all choices use the selection split, and the test
    split measures the chosen. After an interrupt, the same command resumes; it also does with methods, seeds or
    learning rates added.
    """
    started = monotonic()
    with _saving("compare", config, overrides) as (settings, _), candidate_ranks(settings):
        from irdscale.compare.method_specs import check_comparison

        check_comparison(settings)
        from irdscale.compare import write_comparison
        from irdscale.compare.budget import Budget
        from irdscale.compare.run import run_compare

        budget = None if minutes is None else Budget(minutes, started)
        result = run_compare(settings, progress=True, overwrite=overwrite, budget=budget)
        if launched()[0] == 0 and result.get("seeds") != []:
            write_comparison(Path(settings.output))
    from irdscale.compare.show import print_comparison

    show(result, as_json, lambda: print_comparison(result, Path(settings.output)))


@verb("irdscale report runs/quickstart")
def report(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file, or the output folder of a search.")],
    overrides: Overrides = None,
    samples: Annotated[
        bool,
        typer.Option(
            "--samples",
            help="Also measure which samples drive the winner's mask: one backward pass per sample; loads the model.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Write the report of a search or a comparison again, from the files in its output folder."""
    with ending():
        if samples:
            alone("report --samples")
        if not Path(config).is_dir():
            output = Path(load_arguments("report", config, overrides, "nothing")[0].output)
        elif overrides:
            raise InputError("found a folder and a key=value", "the folder alone", overrides[0])
        else:
            output = Path(config)
        if not output.is_dir():
            raise InputError("no such folder", "the output of irdscale search or compare", where=output)
        check_writable(output, "output")
        if (output / "compare.json").exists():
            if samples:
                raise InputError(f"found {output}, a comparison", "the output of a search", "--samples")
            from irdscale.compare import write_comparison

            result = write_comparison(output)
        else:
            from irdscale.report import write_report

            result = write_report(output, samples=samples, progress=True)
    show(result, as_json)


@verb("irdscale doctor configs/quickstart.yaml search.runner=ray")
def doctor(
    config: Annotated[
        str | None, typer.Argument(metavar="[CONFIG]", help="A YAML file whose search to estimate.")
    ] = None,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Show what this machine can run, and why not the rest; with CONFIG, also how long its search will take.

    The estimate measures a few steps of the search, with search.runner=ray on the cluster too.
    """
    with ending():
        settings = None
        if config is not None:
            alone("doctor")
            settings, _ = load_arguments("doctor", config, overrides)
        from irdscale.cli.doctor import diagnose

        result = diagnose(settings)
    show(result, as_json, lambda: print_doctor(result))
    if not result["ok"]:
        raise typer.Exit(1)


@verb("irdscale plan configs/quickstart.yaml gpus_per_node=8 gpu=h100-80gb", *PLAN_KEYS)
def plan(config: Config, overrides: Overrides = None, as_json: Json = False) -> None:
    """Estimate a run: memory per rank, traffic, operations and hours, and which layout fits. Loads no weights.

    GPUs: h100-80gb, h200-141gb, b200-180gb, a100-40gb, a100-80gb, l40s-48gb, rtx4090-24gb, l4-24gb, a10g-24gb, or
    cpu. tokens= and train_samples= replace what only the data can tell.
    """
    with ending():
        alone("plan")
        settings, given = load_arguments("plan", config, overrides, "model")
        from irdscale.plan import run_plan

        options: dict[str, Any] = {name: int(value) if value.isdecimal() else value for name, value in given.items()}
        result = run_plan(settings, **options)
    from irdscale.plan.show import print_plan

    show(result, as_json, lambda: print_plan(result))


@verb("irdscale bench fisher")
def bench(
    part: Annotated[str, typer.Argument(metavar="PART", help="fisher, train, search, gpu, or all.")] = "all",
    as_json: Json = False,
) -> None:
    """Time Fisher passes, sparse training steps and searches on Ray on this machine, against the usual ways.

    The part gpu needs a GPU: its kernels, and models of 1B and 8B parameters. The part all includes it where there is a
    GPU.
    """
    with ending():
        if part not in BENCH_PARTS:
            raise InputError(f"found {part!r}{nearest(part, BENCH_PARTS)}", ", ".join(BENCH_PARTS), "part")
        from irdscale.bench import run_bench

        result = run_bench(part, progress=True)
    show(result, as_json, lambda: print_bench(result))
    if result["failed"]:
        raise typer.Exit(1)
