"""The run configuration: its sections, and what their values may be, checked before anything is loaded.

`irdscale.config_file` reads it from a YAML file and `key=value` overrides.
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
        description="Folder, hub id, or `package:NAME/FOLDER` for a model inside an installed Python package.",
    )
    dtype: Literal["float32", "bfloat16", "float64"] = Field("float32", description="Data type of the base weights.")
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the model.")


class ColumnsConfig(Section):
    text: list[str] | None = Field(None, min_length=1, max_length=2, description="One text column, or two for pairs.")
    label: str | None = Field(
        None, description="Label column: class numbers, class names, a number for regression, or the right choice."
    )
    prompt: str | None = Field(None, description="What stands before a completion or a choice.")
    completion: str | None = Field(None, description="What the model learns to answer to a prompt.")
    messages: str | None = Field(None, description="Chats: lists of {role, content}.")
    choices: list[str] | None = Field(None, min_length=1, description="A column of lists, or one for each choice.")
    choice_labels: str | list[str] | None = Field(
        None,
        min_length=1,
        description="What `label` calls the choices, if it does not count them from 0: a column of lists, a field of "
        "one (such as choices.label, which is the default), or a column for each choice.",
    )

    def named(self) -> dict[str, list[str]]:
        """key -> the columns that it names, of the keys that are given."""
        given = self.model_dump(exclude_none=True)
        return {key: [value] if isinstance(value, str) else value for key, value in given.items()}


class LimitConfig(Section):
    train: int | None = Field(None, ge=1, description="Samples kept of the train split, drawn with `split_seed`.")
    selection: int | None = Field(None, ge=1, description="Samples kept of the selection split.")
    test: int | None = Field(None, ge=1, description="Samples kept of the test split.")


Share = Annotated[float, Field(gt=0, lt=1)]


class LabelSkewConfig(Section):
    label: int | str = Field(description="Number or name of a class.")
    share: Share = Field(description="Share of the population that is of this class.")

    @field_validator("label", mode="before")
    @classmethod
    def _number_or_name(cls, value: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, (int, str)):
            raise ValueError(f"found {value!r}; expected the number or the name of a class")
        return value


class LengthSkewConfig(Section):
    keep: Literal["shortest", "longest"] = Field(description="Which quarter of the train split, by length in tokens.")
    share: Share = Field(description="Share of the population that is of this quarter; the rest is of the others.")


class CopiesConfig(Section):
    of: int = Field(ge=1, description="So many samples of the train split are copied, those with the fewest tokens.")
    share: Share = Field(
        description="Share of the population that are additional copies, of each as many to within one."
    )


class MixedWithConfig(Section):
    dataset: str = Field(
        min_length=1, description="As `task.dataset`; its train split has samples of the same kind, and classes."
    )
    subset: str | None = Field(None, description="As `task.subset`.")
    columns: ColumnsConfig | None = Field(None, description="Those of `task.columns` if unset, but for GLUE tasks.")
    share: Share = Field(description="Share of the population that is of the other data set.")


class PoolConfig(Section):
    """The population, shaped in one way: as many samples as the train split (and the other data set) allow."""

    label_skew: LabelSkewConfig | None = Field(None, description="Of sequence-classification: mostly one class.")
    length_skew: LengthSkewConfig | None = Field(None, description="Mostly short samples, or mostly long ones.")
    copies: CopiesConfig | None = Field(None, description="The train split and copies of a few short samples.")
    mixed_with: MixedWithConfig | None = Field(None, description="Samples of another data set among those of train.")
    label_noise: Share | None = Field(
        None,
        description="Of sequence-classification and regression: the train split, so large a share of it with a false "
        "label: another class, or another sample's number.",
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
        description="`glue/NAME`, a hub id, or a local file or folder of parquet, JSONL or CSV files.",
    )
    kind: Kind | None = Field(None, description="Inferred for GLUE tasks, required for others.")
    subset: str | None = Field(None, description="Configuration of a hub data set, or a folder inside a local one.")
    columns: ColumnsConfig | None = Field(None, description="Inferred for GLUE tasks, required for others.")
    metric: str | None = Field(None, description=f"One of {', '.join(KNOWN_METRICS)}; the task's own if unset.")
    max_length: int = Field(
        128, ge=4, description="Tokens; longer texts are truncated, of causal-lm cut in pieces, of other kinds refused."
    )
    truncate: Literal["left"] | None = Field(
        None, description="Of sft and multiple-choice: cut prompts that do not fit from the left, instead."
    )
    packing: bool = Field(
        False, description="Of causal-lm: train on texts joined to max_length; Fisher samples stay single texts."
    )
    max_new_tokens: int = Field(256, ge=1, description="Tokens that are generated for exact_match, at most.")
    limit: LimitConfig = Field(default_factory=lambda: LimitConfig())
    split_seed: int = Field(0, ge=0, description="Seed of every split and draw of samples.")
    pool: PoolConfig | None = Field(
        None,
        description="Shapes the population, which all samples that masks are made from are drawn from; the train split "
        "if unset. What is trained on stays the train split; selection and test stay as they are.",
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
    samples: int = Field(256, ge=1, description="N: the samples of the population that the search starts from.")
    batch_size: int = Field(8, ge=1, description="Samples a pass; changes speed and memory, not the result.")
    objective: Literal["label", "sampled", "expected"] = Field(
        "label", description="Labels of the data, drawn from the model, or the expectation over the model's classes."
    )
    score: Score = Field(
        "fisher", description="Fisher information, |mean gradient|, |weight x mean gradient|, |weight|, or a draw."
    )
    scope: Scope | None = Field(
        None,
        description="A mask's entries are the largest of the whole model (global, as in the papers), or of each "
        "parameter in proportion to its size; if unset, layerwise for language models and global for others.",
    )
    head_warmup: int = Field(
        0,
        ge=0,
        description="Steps of a new head alone before the passes; by an untrained head traces are labels in disguise.",
    )
    include: list[str] | None = Field(None, description="Regular expressions; score only parameters that match one.")
    exclude: list[str] | None = Field(None, description="Regular expressions; do not score parameters that match.")
    dtype: Literal["float32", "float64"] = Field("float32", description="Data type of the accumulated sums.")
    layout: Literal["replicated", "sharded"] = Field(
        "replicated", description="Every rank holds all sums, or 1 / world size of them; one process holds all."
    )
    offload: bool = Field(False, description="Keep the sums in main memory where the model is on a GPU.")
    token_reduction: Literal["mean", "sum"] = Field(
        "mean", description="A text's loss: the mean over its target tokens, or their sum."
    )
    seed: int | None = Field(None, ge=0, description="Seed of the draws of samples; `task.split_seed` if unset.")
    save_minutes: float = Field(
        10.0, ge=0, description="How often a Fisher pass saves its state, from which the same command goes on."
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
    cpus_per_rank: int = Field(1, ge=1, description="Processors of a rank, and its threads.")
    gpus_per_rank: Annotated[int | float, Field(ge=0, le=1)] | None = Field(
        None,
        description="GPUs of a rank; one where the cluster has any, if unset. A share, such as 0.25: so many trials "
        "share a GPU and its memory; Fisher passes take whole ones.",
    )
    placement: Literal["pack", "spread"] = Field(
        "pack", description="Ranks, and candidates, on as few nodes as they fit on, or on as many as there are."
    )
    fisher_ranks: int | None = Field(None, ge=1, description="Ranks that share a Fisher pass; `ranks` if unset.")
    concurrent: int | None = Field(
        None, ge=1, description="Trials, or passes of a comparison, at once; as many as fit if unset."
    )
    max_failures: int = Field(2, ge=0, description="How often a trial starts again whose process or node was lost.")
    trial_minutes: float | None = Field(None, gt=0, description="A trial that takes longer is ended, and starts again.")
    silent_minutes: float = Field(
        10.0, gt=0, description="A trial whose process shows no progress for so long is ended, and starts again."
    )
    early_stopping: bool = Field(
        False, description="Stop candidates of a round that fall behind the others (ASHA, on the selection metric)."
    )
    grace_ratio: float = Field(0.25, gt=0, lt=1, description="Share of the steps before a candidate may be stopped.")
    reduction_factor: int = Field(2, ge=2, description="Of so many candidates at a rung, one goes on.")

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
    ratio: float = Field(0.005, gt=0, le=1, description="K / parameters of the model: where the search starts.")
    min_ratio: float | None = Field(None, gt=0, le=1, description="Never fewer parameters; ratio / 8 if unset.")
    min_samples: int = Field(8, ge=1, description="Never fewer samples.")
    max_rounds: int = Field(8, ge=1, description="Rounds after the start.")
    patience: int = Field(2, ge=1, description="Stop after so many rounds without a new best.")
    direction: Direction = Field(
        "ird", description="Keep the samples with the larger traces, the smaller, or a seeded shuffle."
    )
    rank_by: RankBy = Field(
        "trace",
        description="Rank by trace, trace x tokens (a longer mean's is smaller), or trace / loss (residuals cancel).",
    )
    seeds: list[Annotated[int, Field(ge=0, lt=2**31)]] = Field(
        default=[0, 1], min_length=1, description="Every candidate is trained once for each seed."
    )
    runner: Literal["local", "ray"] = Field(
        "local", description="Where candidates run: this process and its ranks, or trials on a Ray cluster."
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
    steps: int | None = Field(None, ge=1, description="Optimizer steps; give this or `epochs`.")
    epochs: float | None = Field(None, gt=0, description="Passes over the train split.")
    batch_size: int = Field(16, ge=1, description="Samples a step, of all ranks and accumulated passes together.")
    gradient_accumulation: int = Field(1, ge=1, description="Passes whose gradients are added up to a step.")
    eval_batch_size: int = Field(64, ge=1, description="Samples a forward pass when a metric is measured.")
    learning_rate: float = Field(1e-3, gt=0, description="Of AdamW, for the masked entries and the head.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decoupled decay.")
    decay: Literal["delta", "weight"] = Field(
        "delta", description="Decay pulls towards the pretrained weight (delta) or towards zero (weight)."
    )
    warmup_ratio: float = Field(0.1, ge=0, lt=1, description="Share of the steps with a rising learning rate.")
    schedule: Literal["linear", "cosine", "constant_with_warmup"] = Field(
        "linear", description="Learning rate after the warm-up."
    )
    max_grad_norm: float = Field(1.0, gt=0, description="Gradient clipping over the trained entries.")
    always_train: Literal["auto"] | list[str] = Field(
        "auto",
        description="Parameters trained densely, as regular expressions; `auto`: those the checkpoint does not hold.",
    )

    gradient_checkpointing: bool = Field(
        False, description="Keep only the inputs of layers, and run these again in the backward pass."
    )
    deepspeed: str | None = Field(None, min_length=1, description="DeepSpeed's JSON file, for ZeRO 0-3.")
    adapter_dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="Data type of the stored deltas: 8 bytes an entry with its place, or 6."
    )
    save_minutes: float = Field(
        10.0, ge=0, description="How often training saves its state, from which the same command goes on."
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
        description="Name -> a method and what it changes of fisher and search, such as [ird, search.max_rounds=2].",
    )
    reference: str | None = Field(
        None, description="The method whose differences to all others are reported; the first if unset."
    )
    learning_rates: list[Annotated[float, Field(gt=0)]] | None = Field(
        None, min_length=1, description="Every method is tried with each; `train.learning_rate` alone if unset."
    )
    seeds: list[Annotated[int, Field(ge=0, lt=10**6)]] = Field(
        default=[0, 1, 2, 3, 4],
        min_length=1,
        description="Repetitions of the whole: draws of samples and entries, new heads, and the order of training.",
    )
    equal_budget: bool = Field(
        True,
        description="Methods without a search draw or start anew as often as IRD evaluates; the best one counts.",
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
        "auto", description="What ranks talk with; `auto`: NCCL where there are GPUs, gloo without."
    )
    timeout_minutes: float = Field(
        360.0,
        gt=0,
        description="How long a rank waits for the others, such as while one reads data or writes a result.",
    )
    silent_seconds: float = Field(
        60.0, ge=10, description="A rank that stands still for so long is lost, and ends the others."
    )


class RunConfig(Section):
    """Everything a run needs. `load_config` of `irdscale.config_file` reads it; Python users may build it directly."""

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
