"""The run configuration: its sections, and what their values may be, checked before anything is loaded.

`irdscale.config.loader` reads it from a YAML file and `key=value` overrides.
"""

from __future__ import annotations

import difflib
import math
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Kind = Literal["sequence-classification", "regression", "causal-lm", "sft", "multiple-choice"]
Direction = Literal["ird", "reverse", "random"]
RankBy = Literal["trace", "length", "loss"]
Score = Literal["fisher", "gradient", "saliency", "magnitude", "random"]
Scope = Literal["global", "layerwise"]
# Whose samples are texts that a language model goes on with.
LANGUAGE_KINDS = ("causal-lm", "sft", "multiple-choice")
METRICS: dict[str, tuple[str, ...]] = {
    "sequence-classification": ("accuracy", "f1", "matthews_correlation"),
    "regression": ("pearson", "spearman"),
    "causal-lm": ("perplexity", "token_accuracy"),
    "sft": ("perplexity", "token_accuracy", "exact_match"),
    "multiple-choice": ("accuracy", "accuracy_norm"),
}
KNOWN_METRICS = tuple(dict.fromkeys(name for names in METRICS.values() for name in names))
LOWER_IS_BETTER = ("perplexity",)
# Keys of `train` that say how a training is done, which changes its result by no more than rounding.
HOW_TO_TRAIN = ("deepspeed", "save_minutes", "gradient_checkpointing", "gradient_accumulation", "eval_batch_size")
# The smallest and the largest value of each metric.
METRIC_RANGES = {
    **dict.fromkeys(KNOWN_METRICS, (0.0, 1.0)),
    **dict.fromkeys(("matthews_correlation", "pearson", "spearman"), (-1.0, 1.0)),
    "perplexity": (1.0, float("inf")),
}
# The ways to name a data set's columns, by kind of task.
COLUMNS: dict[str, tuple[tuple[str, ...], ...]] = {
    "sequence-classification": (("text", "label"),),
    "regression": (("text", "label"),),
    "causal-lm": (("text",),),
    "sft": (("prompt", "completion"), ("messages",)),
    "multiple-choice": (("prompt", "choices", "label"), ("prompt", "choices", "choice_labels", "label")),
}


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class ModelConfig(Section):
    path: str = Field(
        min_length=1,
        description="Local folder, hub id, or `package:NAME/FOLDER` for a model inside an installed Python package.",
    )
    dtype: Literal["float32", "bfloat16", "float64"] = Field("float32", description="Data type of the base weights.")
    quantize: Literal["nf4", "int8"] | None = Field(
        None,
        description="Quantised linear layers of the base (bitsandbytes): 4 bits as in QLoRA (nf4), or 8 (int8); "
        "`dtype` is that of their products.",
    )
    trust_remote_code: bool = Field(False, description="Permission to run Python code that comes with the model.")

    @model_validator(mode="after")
    def _quantizes_a_float(self) -> ModelConfig:
        if self.quantize is not None and self.dtype == "float64":
            raise ValueError(
                f"quantize: found {self.quantize!r} with dtype 'float64'; expected dtype 'bfloat16' or 'float32'"
            )
        return self


class ColumnsConfig(Section):
    text: list[str] | None = Field(
        None, min_length=1, max_length=2, description="Text column, or two for pairs of texts."
    )
    label: str | None = Field(
        None, description="Label column: class numbers, class names, a number (regression) or the right choice."
    )
    prompt: str | None = Field(None, description="Column of the text before a completion or a choice.")
    completion: str | None = Field(None, description="Column of the answer that the model learns for a prompt.")
    messages: str | None = Field(None, description="Column of chats: lists of {role, content}.")
    choices: list[str] | None = Field(None, min_length=1, description="Column of lists, or one for each choice.")
    choice_labels: str | list[str] | None = Field(
        None,
        min_length=1,
        description="Names that `label` uses for the choices, where it does not count from 0: a column of lists, a "
        "field of one (choices.label by default), or a column for each choice.",
    )

    def named(self) -> dict[str, list[str]]:
        """key -> the columns that it names, of the keys that are given."""
        given = self.model_dump(exclude_none=True)
        return {key: [value] if isinstance(value, str) else value for key, value in given.items()}


class LimitConfig(Section):
    train: int | None = Field(None, ge=1, description="Number of train samples that are kept, drawn with `split_seed`.")
    selection: int | None = Field(None, ge=1, description="Number of selection samples that are kept.")
    test: int | None = Field(None, ge=1, description="Number of test samples that are kept.")


Share = Annotated[float, Field(gt=0, lt=1)]


class LabelSkewConfig(Section):
    label: int | str = Field(description="Number or name of a class.")
    share: Share = Field(description="Share of this class in the population.")

    @field_validator("label", mode="before")
    @classmethod
    def _number_or_name(cls, value: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, (int, str)):
            raise ValueError(f"found {value!r}; expected the number or the name of a class")
        return value


class LengthSkewConfig(Section):
    keep: Literal["shortest", "longest"] = Field(description="Quarter of the train split, by length in tokens.")
    share: Share = Field(description="Share of this quarter in the population; the rest comes from the other quarters.")


class CopiesConfig(Section):
    of: int = Field(ge=1, description="Number of copied samples of the train split: those with the fewest tokens.")
    share: Share = Field(
        description="Share of the added copies in the population, spread evenly over the copied samples."
    )


class MixedWithConfig(Section):
    dataset: str = Field(
        min_length=1, description="Second data set, as `task.dataset`, with samples of the same kind and classes."
    )
    subset: str | None = Field(None, description="Subset of the second data set, as `task.subset`.")
    columns: ColumnsConfig | None = Field(
        None, description="Columns of the second data set; `task.columns` if unset (GLUE tasks have their own)."
    )
    share: Share = Field(description="Share of the second data set in the population.")


class PoolConfig(Section):
    """The population, shaped in one way: as many samples as the train split (and the other data set) allow."""

    label_skew: LabelSkewConfig | None = Field(None, description="Population of mostly one class (classification).")
    length_skew: LengthSkewConfig | None = Field(None, description="Population of mostly short or mostly long samples.")
    copies: CopiesConfig | None = Field(None, description="Population of the train split and copies of short samples.")
    mixed_with: MixedWithConfig | None = Field(None, description="Population mixed with samples of another data set.")
    label_noise: Share | None = Field(
        None,
        description="Share of the train split with a false label: another class, or another sample's number.",
    )

    @model_validator(mode="after")
    def _one_way(self) -> PoolConfig:
        given = [name for name in PoolConfig.model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"found {' and '.join(given) or 'none'}; expected one of {', '.join(PoolConfig.model_fields)}"
            )
        return self


def default_scope(kind: str | None) -> Scope:
    """What `fisher.scope` is if unset: the kind of task decides."""
    return "layerwise" if kind in LANGUAGE_KINDS else "global"


def check_pool(kind: Kind, pool: PoolConfig) -> None:
    """Refuse a way to shape the population that does not fit samples of this kind.

    Raises:
        ValueError: begins with the whole key.
    """
    labelled = {"label_skew": ("sequence-classification",), "label_noise": ("sequence-classification", "regression")}
    for name, kinds in labelled.items():
        if getattr(pool, name) is not None and kind not in kinds:
            raise ValueError(
                f"task.pool.{name}: found with kind {kind!r}; expected kind {' or '.join(map(repr, kinds))}"
            )
    if pool.mixed_with is not None and pool.mixed_with.columns is not None:
        check_columns(kind, pool.mixed_with.columns, "task.pool.mixed_with.columns")


class TaskConfig(Section):
    dataset: str = Field(
        min_length=1,
        description="GLUE task (`glue/NAME`), hub id, or local file or folder of parquet, JSONL or CSV files.",
    )
    kind: Kind | None = Field(None, description="Kind of task; required except for GLUE tasks.")
    subset: str | None = Field(None, description="Configuration of a hub data set, or folder inside a local one.")
    columns: ColumnsConfig | None = Field(None, description="Columns of the data set; required except for GLUE tasks.")
    metric: str | None = Field(None, description=f"Metric: {', '.join(KNOWN_METRICS)}; the task's own if unset.")
    max_length: int = Field(
        128, ge=4, description="Tokens of a sample; longer ones are truncated, cut in pieces (causal-lm) or refused."
    )
    truncate: Literal["left"] | None = Field(
        None, description="Side from which long prompts are cut (sft, multiple-choice); they are refused if unset."
    )
    packing: bool = Field(
        False, description="Packed training of causal-lm: texts joined to max_length; Fisher samples stay single texts."
    )
    max_new_tokens: int = Field(256, ge=1, description="Largest number of tokens generated for exact_match.")
    limit: LimitConfig = Field(default_factory=lambda: LimitConfig())
    split_seed: int = Field(0, ge=0, description="Seed of every split and draw of samples.")
    pool: PoolConfig | None = Field(
        None,
        description="Change to the samples that masks are computed from; all other data stay as they are.",
    )

    @field_validator("metric")
    @classmethod
    def _known_metric(cls, value: str | None) -> str | None:
        if value is not None and value not in KNOWN_METRICS:
            near = nearest(value, KNOWN_METRICS)
            raise ValueError(f"found {value!r}{near}; expected one of {', '.join(KNOWN_METRICS)}")
        return value

    @model_validator(mode="after")
    def _fits_kind(self) -> TaskConfig:
        if self.kind is None:
            return self
        expected = METRICS[self.kind]
        if self.metric is not None and self.metric not in expected:
            raise ValueError(
                f"metric: found {self.metric!r} with kind {self.kind!r}; expected one of {', '.join(expected)}"
            )
        if self.packing and self.kind != "causal-lm":
            raise ValueError(f"packing: found true with kind {self.kind!r}; expected false (only causal-lm packs)")
        if self.truncate is not None and self.kind not in ("sft", "multiple-choice"):
            raise ValueError(f"truncate: found {self.truncate!r} with kind {self.kind!r}; expected none")
        if self.columns is not None:
            check_columns(self.kind, self.columns)
        if self.pool is not None:
            check_pool(self.kind, self.pool)
        return self


def check_columns(kind: Kind, columns: ColumnsConfig, section: str = "task.columns") -> None:
    """Refuse columns that do not make samples of this kind.

    Args:
        section: the key that they stand under.

    Raises:
        ValueError: begins with the whole key.
    """
    found, ways = set(columns.named()), COLUMNS[kind]
    expected = ", or ".join(" and ".join(way) for way in ways)
    for way in ways:
        if found == set(way):
            break
    else:
        best = max(ways, key=lambda way: len(found & set(way)))
        for key in (*best, *found):
            if key in best and key not in found:
                raise ValueError(f"{section}.{key}: missing; expected {expected}, for kind {kind!r}")
            if key not in best:
                raise ValueError(f"{section}.{key}: found with kind {kind!r}; expected {expected}")
    if kind == "causal-lm" and len(columns.text or ()) != 1:
        raise ValueError(f"{section}.text: found {columns.text}; expected 1 column, for kind 'causal-lm'")


class FisherConfig(Section):
    samples: int = Field(256, ge=1, description="Samples at the start of the search (N), drawn from the population.")
    batch_size: int = Field(8, ge=1, description="Samples in one pass; changes speed and memory, not the result.")
    objective: Literal["label", "sampled", "expected"] = Field(
        "label", description="Labels of the loss: the data's, drawn from the model, or expected over its classes."
    )
    score: Score = Field(
        "fisher", description="Score: squared gradient, |mean gradient|, |weight x mean gradient|, |weight| or random."
    )
    scope: Scope | None = Field(
        None,
        description="Scope of the top-k: the whole model (global, as in the papers), or each parameter in "
        "proportion to its size (layerwise); if unset, layerwise for language models and global for others.",
    )
    head_warmup: int = Field(
        0,
        ge=0,
        description="Training steps of a new head alone, before the Fisher passes.",
    )
    include: list[str] | None = Field(None, description="Regular expressions of the parameters to score; all if unset.")
    exclude: list[str] | None = Field(None, description="Regular expressions of the parameters not to score.")
    dtype: Literal["float32", "float64"] = Field("float32", description="Data type of the accumulated sums.")
    layout: Literal["replicated", "sharded"] = Field(
        "replicated", description="Storage of the sums: all on every rank, or 1 / world size on each (sharded)."
    )
    offload: bool = Field(False, description="Storage of the sums in main memory, while the model is on a GPU.")
    passes: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        1,
        description="Passes over the samples for the masks, each with the sums of some layers alone; as few as memory "
        "has room for with `auto`. Masks are the same.",
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
        if self.objective == "expected" and self.score in ("gradient", "saliency"):
            raise ValueError(
                f"score: found {self.score!r} with objective 'expected', whose mean gradient is 0; "
                f"expected objective 'label' or 'sampled'"
            )
        return self

    @field_validator("include", "exclude")
    @classmethod
    def _expressions(cls, value: list[str] | None) -> list[str] | None:
        return _compiles(value)


# Ray counts GPUs in ten-thousandths.
LEAST_SHARE = 0.0001


class RayConfig(Section):
    ranks: int = Field(1, ge=1, description="Ranks that train one candidate together.")
    cpus_per_rank: int = Field(1, ge=1, description="CPU cores of one rank, and its threads.")
    gpus_per_rank: Annotated[int | float, Field(ge=0, le=1)] | None = Field(
        None,
        description="GPUs of one rank; one where the cluster has any, if unset. With a fraction such as 0.25, four "
        "trials share a GPU; Fisher passes take whole GPUs.",
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
        if value is None:
            return None
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not (value == 0 or LEAST_SHARE <= value <= 1):
            raise ValueError(
                f"found {value!r}; expected 0, 1, or a share of a GPU from {LEAST_SHARE} on, such as 0.25 for 4 trials"
            )
        # 1.0 is 1, also where the configuration is dumped.
        return int(value) if value in (0, 1) else value

    @model_validator(mode="after")
    def _shared_by_trials(self) -> RayConfig:
        if self.shares_gpus and self.ranks > 1:
            raise ValueError(
                f"gpus_per_rank: found {self.gpus_per_rank} with ranks {self.ranks}; expected 0 or 1: ranks of one "
                f"candidate talk by NCCL, which refuses two on a GPU"
            )
        return self

    @property
    def shares_gpus(self) -> bool:
        """Whether several trials may share a GPU."""
        return self.gpus_per_rank is not None and 0 < self.gpus_per_rank < 1


class SearchConfig(Section):
    ratio: float = Field(0.005, gt=0, le=1, description="Share of the parameters at the start (K / parameters).")
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
    seeds: list[Annotated[int, Field(ge=0, lt=2**31)]] = Field(
        default=[0, 1], min_length=1, description="Seeds of the trainings; every candidate is trained once for each."
    )
    runner: Literal["local", "ray"] = Field(
        "local", description="Place where candidates run: this process and its ranks, or trials on a Ray cluster."
    )
    ray: RayConfig = Field(default_factory=lambda: RayConfig())

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, value: list[int]) -> list[int]:
        if len(set(value)) != len(value):
            raise ValueError(f"found {value}; expected distinct seeds")
        return value

    @model_validator(mode="after")
    def _ratios(self) -> SearchConfig:
        if self.min_ratio is not None and self.min_ratio > self.ratio:
            raise ValueError(f"min_ratio: found {self.min_ratio}; expected at most ratio ({self.ratio})")
        return self

    @model_validator(mode="after")
    def _ranked(self) -> SearchConfig:
        if self.direction == "random" and self.rank_by != "trace":
            raise ValueError(
                f"rank_by: found {self.rank_by} with direction 'random'; expected trace: a shuffle ranks nothing"
            )
        return self


class TrainConfig(Section):
    steps: int | None = Field(None, ge=1, description="Optimizer steps of one training; give this or `epochs`.")
    epochs: float | None = Field(None, gt=0, description="Passes of one training over the train split.")
    batch_size: int = Field(16, ge=1, description="Samples of one optimizer step, over ranks and accumulated passes.")
    gradient_accumulation: int = Field(1, ge=1, description="Passes whose gradients are added up for one step.")
    eval_batch_size: int = Field(64, ge=1, description="Samples in one forward pass of an evaluation.")
    learning_rate: float = Field(1e-3, gt=0, description="Peak learning rate of AdamW, for masked entries and head.")
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

    @field_validator("always_train")
    @classmethod
    def _expressions(cls, value: Any) -> Any:
        return value if value == "auto" else _compiles(value)

    @model_validator(mode="after")
    def _one_length(self) -> TrainConfig:
        if self.steps is not None and self.epochs is not None:
            raise ValueError("found both steps and epochs; expected one of them")
        return self


# What `irdscale compare` can compare; irdscale/compare/methods.py says what each one is.
METHODS = (
    "ird",
    "reverse",
    "fish_best",
    "fish",
    "fish_small",
    "top_samples",
    "bottom_samples",
    "random_mask",
    "magnitude_mask",
    "lora",
    "bitfit",
    "linear_probe",
    "full",
)
VARIED_SECTIONS = ("fisher", "search")


class CompareConfig(Section):
    methods: list[str] | None = Field(
        None, min_length=1, description="Methods, and names of `variants`; all methods that suit the model if unset."
    )
    variants: dict[str, list[str]] = Field(
        default_factory=dict,
        description="Variants: a name, and a method with what it changes, such as [ird, search.max_rounds=2].",
    )
    reference: str | None = Field(None, description="Method that all others are compared with; the first if unset.")
    learning_rates: list[Annotated[float, Field(gt=0)]] | None = Field(
        None, min_length=1, description="Learning rates that every method tries; `train.learning_rate` alone if unset."
    )
    seeds: list[Annotated[int, Field(ge=0, lt=10**6)]] = Field(
        default=[0, 1, 2, 3, 4],
        min_length=1,
        description="Seeds of the repetitions; each has its own draws, new heads and order of training.",
    )
    equal_budget: bool = Field(
        True,
        description="Equal number of trainings: the best of as many draws or starts as IRD evaluates counts.",
    )
    lora_rank: int = Field(8, ge=1, description="Rank of the LoRA matrices, in every linear layer but the head.")

    @field_validator("seeds", "learning_rates", "methods")
    @classmethod
    def _distinct(cls, value: list[Any] | None) -> list[Any] | None:
        if value is not None and len(set(value)) != len(value):
            raise ValueError(f"found {value}; expected distinct ones")
        return value

    @model_validator(mode="after")
    def _known(self) -> CompareConfig:
        for name, changed in self.variants.items():
            if name in METHODS:
                raise ValueError(f"variants: found {name!r}, a method's name; expected a new name")
            if not changed or changed[0] not in METHODS:
                found = changed[0] if changed else "nothing"
                raise ValueError(
                    f"variants: {name}: found {found!r}{nearest(found, METHODS)}; expected a method first: "
                    f"{', '.join(METHODS)}"
                )
            for change in changed[1:]:
                if not re.match(rf"({'|'.join(VARIED_SECTIONS)})\.[a-z_]+=", change):
                    raise ValueError(
                        f"variants: {name}: found {change!r}; expected key=value with a key of fisher or search, "
                        f"such as fisher.samples=64"
                    )
        known = (*METHODS, *self.variants)
        for name in self.methods or ():
            if name not in known:
                raise ValueError(f"methods: found {name!r}{nearest(name, known)}; expected of {', '.join(known)}")
        if self.methods is not None and self.reference is not None and self.reference not in self.methods:
            raise ValueError(f"reference: found {self.reference!r}; expected one of methods: {', '.join(self.methods)}")
        return self


def training_steps(config: TrainConfig, samples: int) -> int:
    """Optimizer steps of one candidate; one epoch unless `steps` or `epochs` say otherwise."""
    if config.steps is not None:
        return config.steps
    return math.ceil((config.epochs or 1.0) * math.ceil(samples / config.batch_size))


class DistributedConfig(Section):
    backend: Literal["auto", "nccl", "gloo"] = Field(
        "auto", description="Backend of the communication between ranks; `auto`: NCCL on GPUs, gloo without."
    )
    timeout_minutes: float = Field(
        360.0,
        gt=0,
        description="Longest wait of a rank for the others, in minutes.",
    )
    silent_seconds: float = Field(
        60.0, ge=10, description="Seconds without progress after which a rank counts as lost and ends the others."
    )


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
        """Whether a search begins with a pass for the samples' traces."""
        return self.search.direction != "random"

    @property
    def scope(self) -> Scope:
        """`fisher.scope`, as it is if unset."""
        return self.fisher.scope or default_scope(self.task.kind)

    @model_validator(mode="after")
    def _language(self) -> RunConfig:
        kind = self.task.kind
        if kind in LANGUAGE_KINDS and self.fisher.objective == "expected":
            raise ValueError(
                f"fisher.objective: found 'expected' with task.kind {kind!r}; expected 'label' or 'sampled': "
                f"the expectation takes a backward pass for each token of the vocabulary at each place"
            )
        if kind is not None and kind not in LANGUAGE_KINDS and self.fisher.token_reduction != "mean":
            raise ValueError(
                f"fisher.token_reduction: found {self.fisher.token_reduction!r} with task.kind {kind!r}; "
                f"expected 'mean': only texts have target tokens"
            )
        if kind in LANGUAGE_KINDS and self.fisher.head_warmup:
            raise ValueError(
                f"fisher.head_warmup: found {self.fisher.head_warmup} with task.kind {kind!r}; "
                f"expected 0: a language model has no new head"
            )
        if self.search.rank_by == "loss" and self.fisher.objective != "label":
            raise ValueError(
                f"search.rank_by: found 'loss' with fisher.objective {self.fisher.objective!r}; expected objective "
                f"'label': traces are divided by the losses of the labels"
            )
        return self

    @model_validator(mode="after")
    def _samples(self) -> RunConfig:
        if self.search.min_samples > self.fisher.samples:
            raise ValueError(
                f"search.min_samples: found {self.search.min_samples}; "
                f"expected at most fisher.samples ({self.fisher.samples})"
            )
        return self


def _compiles(patterns: list[str] | None) -> list[str] | None:
    for pattern in patterns or ():
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"found {pattern!r}; expected a regular expression ({error})") from None
    return patterns


def nearest(word: str, known: Any) -> str:
    """` (did you mean "..."?)` for a misspelt word, or nothing."""
    close = difflib.get_close_matches(str(word), [str(k) for k in known], n=1, cutoff=0.5)
    return f' (did you mean "{close[0]}"?)' if close else ""
