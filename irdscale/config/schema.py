"""The run configuration: its sections and their valid values, checked before anything is loaded.

`irdscale.config.loader` reads it from a YAML file and `key=value` overrides.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from irdscale.config.compare import CompareConfig
from irdscale.config.kinds import LANGUAGE_KINDS
from irdscale.config.section import Section, check_distinct, check_expressions
from irdscale.config.task import TaskConfig
from irdscale.errors import InputError

Direction = Literal["ird", "reverse", "random"]
RankBy = Literal["trace", "length", "loss"]
Score = Literal[
    "fisher",
    "gradient",
    "saliency",
    "gem",
    "gallop",
    "activation",
    "mean_activation",
    "magnitude",
    "small_magnitude",
    "random",
]
# Scores by the mean gradient, which is 0 in expectation over the model's own labels.
BY_MEAN_GRADIENT = ("gradient", "saliency", "gem", "gallop")
Scope = Literal["global", "layerwise"]
Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio"]
Expressions = Annotated[list[str] | None, AfterValidator(check_expressions)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
# Keys of `train` that say how a training is done; they change its result by rounding at most.
HOW_TO_TRAIN = (
    "deepspeed",
    "save_minutes",
    "gradient_checkpointing",
    "gradient_accumulation",
    "eval_batch_size",
    "report_to",
)


class ModelConfig(Section):
    path: str = Field(
        min_length=1,
        description="Local folder, hub id, or `package:NAME/FOLDER` for a model inside an installed Python package; or "
        "a GGUF file: local, `OWNER/NAME/FILE.gguf` of a hub id, or `package:NAME/FILE.gguf`.",
    )
    dtype: Literal["float32", "bfloat16", "float64"] = Field("float32", description="Data type of the base weights.")
    quantize: Literal["nf4", "int8"] | None = Field(
        None,
        description="Quantisation of the base's linear layers by bitsandbytes: 4 bits as in QLoRA (nf4), or 8 bits "
        "(int8); none if unset. `dtype` is then that of the dequantised weights.",
    )
    trust_remote_code: bool = Field(False, description="Permission to run Python code that comes with the model.")

    @model_validator(mode="after")
    def _dtype_fits_quantize(self) -> ModelConfig:
        if self.quantize is not None and self.dtype == "float64":
            fault = f"found {self.quantize!r} with dtype 'float64'"
            raise InputError(fault, "dtype 'bfloat16' or 'float32'", "quantize")
        return self


class FisherConfig(Section):
    samples: int = Field(256, ge=1, description="Samples at the start of the search (N), drawn from the population.")
    batch_size: int = Field(8, ge=1, description="Samples in one pass; changes speed and memory, not the result.")
    objective: Literal["label", "sampled", "expected"] = Field(
        "label", description="Labels of the loss: the data's, drawn from the model, or expected over its classes."
    )
    score: Score = Field(
        "fisher",
        description="Score: squared gradient, |mean gradient|, |weight x mean gradient|, |mean gradient / weight| "
        "(gem), |mean gradient| of small weights (gallop), |weight| x norm of its input (activation) or x mean |input| "
        "(mean_activation), |weight|, |weight| with the smallest first (small_magnitude), or random.",
    )
    scope: Scope | None = Field(
        None,
        description="Scope of the top-k: the whole model (global, as in the papers), or each parameter in "
        "proportion to its size (layerwise); if unset, layerwise for language models and global for others.",
    )
    head_warmup: int = Field(
        0,
        ge=0,
        description="Steps that train a new head alone, before the Fisher passes.",
    )
    include: Expressions = Field(None, description="Regular expressions of the parameters to score; all if unset.")
    exclude: Expressions = Field(None, description="Regular expressions of the parameters not to score.")
    dtype: Literal["float32", "float64"] = Field("float32", description="Data type of the accumulated sums.")
    layout: Literal["replicated", "sharded"] = Field(
        "replicated", description="Storage of the sums: all on every rank, or 1 / world size on each (sharded)."
    )
    offload: bool = Field(False, description="Storage of the sums in main memory, while the model is on a GPU.")
    passes: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        1,
        description="Passes over the samples for the masks, each with the sums of some layers; `auto` takes the fewest "
        "that fit in memory. The masks are the same.",
    )
    token_reduction: Literal["mean", "sum"] = Field(
        "mean", description="Reduction of a text's loss: mean or sum over its target tokens."
    )
    seed: int | None = Field(None, ge=0, description="Seed of the draws of samples; `task.split_seed` if unset.")
    save_minutes: float = Field(
        10.0, ge=0, description="Minutes between saved states of a Fisher pass; a killed one continues from the last."
    )

    @model_validator(mode="after")
    def _score_fits_objective(self) -> FisherConfig:
        if self.objective == "expected" and self.score in BY_MEAN_GRADIENT:
            fault = f"found {self.score!r} with objective 'expected', whose mean gradient is 0"
            raise InputError(fault, "objective 'label' or 'sampled'", "score")
        return self


# Ray counts GPUs in ten-thousandths.
LEAST_SHARE = 0.0001


class RayConfig(Section):
    ranks: int = Field(1, ge=1, description="Ranks that train one candidate together.")
    cpus_per_rank: int = Field(1, ge=1, description="CPU cores of one rank, and its threads.")
    gpus_per_rank: Annotated[int | float, Field(ge=0, le=1)] | Literal["auto"] | None = Field(
        None,
        description="GPUs of one rank; one where the cluster has any, if unset. With a fraction such as 0.25, four "
        "trials share a GPU; with `auto` as many as its memory holds, 8 at most. Fisher passes take whole GPUs.",
    )
    placement: Literal["pack", "spread"] = Field(
        "pack", description="Placement of ranks and candidates: on few nodes (pack), or on many (spread)."
    )
    fisher_ranks: int | None = Field(None, ge=1, description="Ranks that share a Fisher pass; `ranks` if unset.")
    concurrent: int | None = Field(
        None, ge=1, description="Largest number of trials, or passes of a comparison, at once; as many as fit if unset."
    )
    max_failures: int = Field(2, ge=0, description="Restarts of a trial whose process or node was lost.")
    trial_minutes: float | None = Field(None, gt=0, description="Minutes after which a trial is ended and restarted.")
    silent_minutes: float = Field(
        10.0, gt=0, description="Minutes without progress after which a trial is ended and restarted."
    )
    early_stopping: bool = Field(
        False, description="Early stopping (ASHA) of candidates that fall behind in their round."
    )
    grace_ratio: float = Field(0.25, gt=0, lt=1, description="Share of the steps before a candidate may be stopped.")
    reduction_factor: int = Field(2, ge=2, description="Candidates at a rung of ASHA, of which one continues.")

    @field_validator("gpus_per_rank", mode="before")
    @classmethod
    def _share(cls, value: Any) -> Any:
        if value is None or value == "auto":
            return value
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not (value == 0 or LEAST_SHARE <= value <= 1):
            expected = f"0, 1, auto, or a share of a GPU from {LEAST_SHARE} up, such as 0.25 for 4 trials"
            raise InputError(f"found {value!r}", expected)
        # 1.0 is 1, also where the configuration is dumped.
        return int(value) if value in (0, 1) else value

    @model_validator(mode="after")
    def _shared_by_trials(self) -> RayConfig:
        if self.shares_gpus and self.ranks > 1:
            fault = f"found {self.gpus_per_rank} with ranks {self.ranks}"
            expected = "0 or 1: ranks of one candidate communicate by NCCL, which refuses two on a GPU"
            raise InputError(fault, expected, "gpus_per_rank")
        return self

    @property
    def shares_gpus(self) -> bool:
        """Whether several trials may share a GPU."""
        return self.gpus_per_rank == "auto" or isinstance(self.gpus_per_rank, float)


class SearchConfig(Section):
    ratio: float = Field(0.005, gt=0, le=1, description="Share of the parameters at the start (K / parameters).")
    count_head: bool = Field(
        False,
        description="Count of a new head inside the share `ratio`, as in FISH's script: K has so many entries less.",
    )
    min_ratio: float | None = Field(None, gt=0, le=1, description="Smallest share of parameters; ratio / 8 if unset.")
    min_samples: int = Field(8, ge=1, description="Smallest number of samples of a candidate.")
    max_rounds: int = Field(8, ge=1, description="Largest number of rounds after the start.")
    patience: int = Field(2, ge=1, description="Rounds without a new best after which the search stops.")
    direction: Direction = Field(
        "ird", description="Samples that are kept: larger traces (ird), smaller ones (reverse), or a seeded shuffle."
    )
    rank_by: RankBy = Field(
        "trace",
        description="Ranking of the samples: trace, trace x tokens (length), or trace / loss (loss).",
    )
    seeds: Annotated[list[Seed], AfterValidator(check_distinct)] = Field(
        default=[0, 1], min_length=1, description="Seeds of the trainings; every candidate is trained once for each."
    )
    runner: Literal["local", "ray"] = Field(
        "local", description="Place where candidates run: this process and its ranks, or trials on a Ray cluster."
    )
    ray: RayConfig = Field(default_factory=lambda: RayConfig())

    @model_validator(mode="after")
    def _consistent(self) -> SearchConfig:
        if self.min_ratio is not None and self.min_ratio > self.ratio:
            raise InputError(f"found {self.min_ratio}", f"at most ratio ({self.ratio})", "min_ratio")
        if self.direction == "random" and self.rank_by != "trace":
            fault = f"found {self.rank_by} with direction 'random'"
            raise InputError(fault, "trace: a shuffle ranks nothing", "rank_by")
        return self


class TrainConfig(Section):
    steps: int | None = Field(None, ge=1, description="Optimizer steps of one training; give this or `epochs`.")
    epochs: float | None = Field(None, gt=0, description="Passes of one training over the train split.")
    batch_size: int = Field(16, ge=1, description="Samples of one optimizer step, over ranks and accumulated passes.")
    gradient_accumulation: int = Field(1, ge=1, description="Passes whose gradients are added up for one step.")
    eval_batch_size: int = Field(64, ge=1, description="Samples in one forward pass of an evaluation.")
    learning_rate: float = Field(1e-3, gt=0, description="Peak learning rate of AdamW, for masked entries and head.")
    max_head_rate: float | None = Field(
        None,
        gt=0,
        description="Largest peak learning rate of parameters trained densely beside a mask, such as a new head; no "
        "limit but `learning_rate` if unset.",
    )
    weight_decay: float = Field(0.0, ge=0, description="Weight decay of AdamW (decoupled).")
    decay: Literal["delta", "weight"] = Field(
        "delta", description="Target of the weight decay: the pretrained weight (delta) or zero (weight)."
    )
    warmup_ratio: float = Field(0.1, ge=0, lt=1, description="Share of the steps in which the learning rate rises.")
    schedule: Literal["linear", "cosine", "constant_with_warmup"] = Field(
        "linear", description="Schedule of the learning rate after the warm-up."
    )
    max_grad_norm: float = Field(1.0, gt=0, description="Largest gradient norm over the trained entries (clipping).")
    always_train: Literal["auto"] | list[str] = Field(
        "auto",
        description="Parameters trained densely, as regular expressions; `auto`: those that the checkpoint lacks.",
    )

    gradient_checkpointing: bool = Field(
        False, description="Gradient checkpointing: layers keep their inputs, and run again in the backward pass."
    )
    deepspeed: str | None = Field(None, min_length=1, description="DeepSpeed JSON file, for ZeRO 0-3.")
    adapter_dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="Data type of the saved deltas: 8 bytes per trained parameter (6 in bfloat16)."
    )
    save_minutes: float = Field(
        10.0, ge=0, description="Minutes between saved states of a training; a killed one continues from the last."
    )
    eval_steps: int | None = Field(
        None,
        ge=1,
        description="Optimizer steps between evaluations on the selection split, with one more after the last step; no "
        "evaluation during a training if unset.",
    )
    keep: Literal["last", "best"] = Field(
        "last", description="Deltas that a training keeps: those of the last step, or of the best evaluation."
    )
    report_to: Annotated[list[Tracker], AfterValidator(check_distinct)] = Field(
        [], description="Trackers that get the metrics of every step: tensorboard, wandb, mlflow, trackio."
    )

    @field_validator("always_train")
    @classmethod
    def _expressions(cls, value: Any) -> Any:
        return value if value == "auto" else check_expressions(value)

    @model_validator(mode="after")
    def _one_length(self) -> TrainConfig:
        if self.steps is not None and self.epochs is not None:
            raise InputError("found both steps and epochs", "one of them")
        if self.keep == "best" and self.eval_steps is None:
            raise InputError("found 'best' without eval_steps", "eval_steps too: its evaluations are compared", "keep")
        return self


class DistributedConfig(Section):
    backend: Literal["auto", "nccl", "gloo"] = Field(
        "auto", description="Backend of the communication between ranks; `auto`: NCCL on GPUs, gloo without."
    )
    timeout_minutes: float = Field(
        360.0,
        gt=0,
        description="Minutes that a rank waits for the others at most.",
    )
    silent_seconds: float = Field(
        60.0, ge=10, description="Seconds without progress after which a rank counts as lost and ends the others."
    )


def default_scope(kind: str | None) -> Scope:
    """The default of `fisher.scope` for a kind of task."""
    return "layerwise" if kind in LANGUAGE_KINDS else "global"


class RunConfig(Section):
    """Everything a run needs. `irdscale.config.loader.load_config` reads it; Python users may build it directly."""

    model: ModelConfig
    task: TaskConfig
    fisher: FisherConfig = Field(default_factory=lambda: FisherConfig())
    search: SearchConfig = Field(default_factory=lambda: SearchConfig())
    train: TrainConfig = Field(default_factory=lambda: TrainConfig())
    distributed: DistributedConfig = Field(default_factory=lambda: DistributedConfig())
    compare: CompareConfig = Field(default_factory=lambda: CompareConfig())
    output: str = Field("runs/irdscale", min_length=1, description="Folder for everything the run writes.")

    @property
    def traced(self) -> bool:
        """Whether a search begins with a pass for the Fisher traces of the samples."""
        return self.search.direction != "random"

    @property
    def scope(self) -> Scope:
        """`fisher.scope`, or its default for the kind of task."""
        return self.fisher.scope or default_scope(self.task.kind)

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        kind = self.task.kind
        if kind in LANGUAGE_KINDS and self.fisher.objective == "expected":
            fault = f"found 'expected' with task.kind {kind!r}"
            why = "the expectation takes a backward pass for each token of the vocabulary at each position"
            raise InputError(fault, f"'label' or 'sampled': {why}", "fisher.objective")
        if kind is not None and kind not in LANGUAGE_KINDS and self.fisher.token_reduction != "mean":
            fault = f"found {self.fisher.token_reduction!r} with task.kind {kind!r}"
            raise InputError(fault, "'mean': only texts have target tokens", "fisher.token_reduction")
        if kind in LANGUAGE_KINDS and self.fisher.head_warmup:
            fault = f"found {self.fisher.head_warmup} with task.kind {kind!r}"
            raise InputError(fault, "0: a language model has no new head", "fisher.head_warmup")
        if kind in LANGUAGE_KINDS and self.search.count_head:
            fault = f"found true with task.kind {kind!r}"
            raise InputError(fault, "false: a language model has no new head", "search.count_head")
        if self.search.rank_by == "loss" and self.fisher.objective != "label":
            fault = f"found 'loss' with fisher.objective {self.fisher.objective!r}"
            expected = "objective 'label': traces are divided by the losses of the labels"
            raise InputError(fault, expected, "search.rank_by")
        if self.search.min_samples > self.fisher.samples:
            expected = f"at most fisher.samples ({self.fisher.samples})"
            raise InputError(f"found {self.search.min_samples}", expected, "search.min_samples")
        return self


def result_settings(train: dict[str, Any]) -> dict[str, Any]:
    """A dumped section `train` without keys that change no result, such as evaluations of which none is kept."""
    idle = {"report_to"} if train["keep"] == "best" else {"report_to", "eval_steps", "keep"}
    if (train.get("max_head_rate") or math.inf) >= train["learning_rate"]:
        idle.add("max_head_rate")
    return {key: value for key, value in train.items() if key not in idle}


def short_training(config: TrainConfig, steps: int) -> TrainConfig:
    """A training of so many steps with the same settings, without evaluations on the way."""
    return config.model_copy(update={"steps": steps, "epochs": None, "eval_steps": None, "keep": "last"})


def training_steps(config: TrainConfig, samples: int) -> int:
    """Optimizer steps of one candidate; one epoch unless `steps` or `epochs` say otherwise."""
    if config.steps is not None:
        return config.steps
    return math.ceil((config.epochs or 1.0) * math.ceil(samples / config.batch_size))
