"""Every setting of a run: type, range, default, and its help text (the string under the field).

The sections `device`, `model` and `parallel` are in model_settings.py, `monitoring` is in
monitoring_settings.py. Sizes carry their unit in the name. Nothing here imports torch: launchers
and data programs read it too. Rules between settings live in check.py, reading and overriding in
load.py.
"""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from megatron_slm.config.model_settings import DeviceConfig, ModelConfig, ParallelConfig
from megatron_slm.config.monitoring_settings import MonitoringConfig
from megatron_slm.config.ranges import (
    BelowOne,
    Count,
    Fraction,
    NotNegative,
    Positive,
    Range,
    Size,
)

KeepFraction = Annotated[float, Range(above=0, at_most=1, note="0.6 keeps 60 % of the tokens")]
Weight = Annotated[
    float, Range(above=0, at_most=1e18, note="to leave a corpus out, remove it from data.train")
]


@dataclass
class RunConfig:
    """Where a run writes, and the seed of everything random."""

    folder: str = "runs/run"
    """Run folder: config.yaml, versions.txt, metrics.jsonl, checkpoints/, wandb/.

    A folder with a checkpoint is resumed."""
    name: str = ""
    """Name shown in W&B and reports; empty = the folder's name."""
    seed: Annotated[int, Range(at_least=0, at_most=2**32 - 1)] = 1234
    """Seed of initial weights, data order and random selectors.

    The same seed gives the same weights in every parallel layout."""


@dataclass
class CorpusConfig:
    """One named validation corpus."""

    name: str = "validation"
    """Name in the metrics: validation/<name>/loss."""
    corpus: str = ""
    """Prefix of the corpus: PREFIX.bin, PREFIX.idx, PREFIX.manifest.json."""


@dataclass
class DataConfig:
    """What is read and how it is batched."""

    tokenizer: str = ""
    """SentencePiece .model or Hugging Face tokenizer.json the corpora were made with."""
    train: list[str] = field(default_factory=list)
    """Corpus prefixes to train on (data_tools.preprocess makes them)."""
    weights: list[Weight] = field(default_factory=list)
    """Share of each corpus in the blend, any positive scale; empty = by size in tokens."""
    validation: list[CorpusConfig] = field(default_factory=list)
    """Validation corpora, each {name, corpus}; each is reported apart, always by plain loss."""
    sequence_length: Size = 256
    """Tokens per training sequence."""
    document_policy: Literal["packed", "isolated"] = "packed"
    """packed = attention runs across the documents of a sequence; isolated = no token sees another
    document, positions restart with each."""
    micro_batch_size: Size = 4
    """Sequences per forward pass of one data-parallel rank."""
    global_batch_size: Size = 8
    """Sequences per optimizer step, over all ranks."""
    index_cache: str = ""
    """Folder of the sample indices; empty = index_cache/ in the run folder.

    Keyed by corpus content."""
    check_interval_seconds: Count = 60
    """While the run trains, each node reads a part of its data again every so often; 0 = never.

    One block of every corpus and one shard of every score store are compared with their checksums.
    Damage ends the run with exit code 3 and a checkpoint."""


@dataclass
class ReferenceConfig:
    """Where the reference loss of each token comes from: stored scores or a model run in the same
    step.
    """

    scores: list[str] = field(default_factory=list)
    """Score-store folders, one per training corpus in the same order (python -m megatron_slm.score
    makes them)."""
    allow_missing_scores: bool = False
    """Train although a score store is incomplete; tokens without a score are never selected."""
    checkpoint: str | None = None
    """Checkpoint folder of a frozen reference model that is run forward-only in every step (costs
    about a third more)."""


@dataclass
class SelectionConfig:
    """Which tokens are trained on."""

    scorer: str = "none"
    """none = plain CLM; excess_loss = Rho-1's loss minus reference loss; random, reference_loss,
    ... see docs/selection.md; PATH.py:NAME = a scorer in a file of your own, whose code is then
    run: it has to be named on the command line."""
    scorer_options: dict[str, Any] = field(default_factory=dict)
    """Options of the scorer, for example {of: own_loss, skip_fraction: 0.1} for band; see
    docs/selection.md."""
    keep_fraction: KeepFraction | dict[str, Any] = 0.6
    """Share of the competing tokens that is kept (0..1], or a schedule such as {style: linear,
    start: 1.0, end: 0.6, tokens: 1000000}."""
    clm_weight: Fraction | dict[str, Any] = 0.0
    """lambda of lambda * CLM + (1 - lambda) * SLM: weight of the plain loss beside the selective
    one, 0 = selective only."""
    scope: Literal[
        "sequence", "micro_batch", "data_parallel", "global_batch", "running_threshold"
    ] = "data_parallel"
    """Which tokens compete: those of one sequence, of this rank's micro-batch, of all ranks'
    current micro-batch, of the whole step."""
    head_rows: Literal["auto", "all", "selected"] = "auto"
    """Tokens the loss head computes in the training pass. selected needs a choice known before the
    head (a static scorer, or scope global_batch), and saves its products for the others; auto =
    selected where a forward pass has given every token's loss anyway, else all; see docs/head.md.
    """
    backward_rows: Literal["all", "last_layer", "every_layer_approximate"] = "all"
    """Tokens whose gradients the layers' backward products compute. last_layer: the last layer
    leaves out unselected tokens, the gradient stays exact; every_layer_approximate: every layer
    drops their gradient, which CHANGES the gradient; see docs/head.md."""
    end_when_overtaken: bool = False
    """End the selection at the first log line in which the model has overtaken its reference
    (loss/all at or below loss/reference): every token is trained on from there, as with scorer
    none. false = that is a warning only."""
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    """The reference losses."""


@dataclass
class OptimizerConfig:
    """AdamW (Transformer Engine's or apex's fused one where installed, else torch's)."""

    kind: str = "adamw"
    """adamw, the name of an optimizer that an installed package offers, or PATH.py:NAME, a function
    in a file of your own: see docs/extending.md."""
    learning_rate: Positive = 3e-4
    """Peak learning rate."""
    min_learning_rate: NotNegative = 3e-5
    """Learning rate at the end of the schedule."""
    weight_decay: NotNegative = 0.1
    """Decoupled weight decay; biases and norm weights are not decayed."""
    beta1: BelowOne = 0.9
    """Adam's first moment decay."""
    beta2: BelowOne = 0.95
    """Adam's second moment decay."""
    epsilon: Positive = 1e-8
    """Adam's epsilon."""
    clip_grad_norm: NotNegative = 1.0
    """Global gradient norm is clipped to this; 0 = never."""
    max_non_finite_steps: Count = 0
    """So many steps in a row may have a gradient that is not finite: each is skipped (weights and
    moments stay), reported with its data, and training goes on. One more ends the run."""
    initial_loss_scale: Positive = 4096.0
    """fp16 only: what losses are multiplied with before backward, at first.

    A token's gradient is not yet divided by the tokens of a step, so this is small."""
    min_loss_scale: Positive = 1.0
    """fp16 only: the scale is never halved below this; gradients that overflow even there end the
    run as diverged."""
    loss_scale_window_steps: Size = 1000
    """fp16 only: steps without overflow after which the scale doubles."""
    loss_scale_hysteresis_steps: Size = 2
    """fp16 only: overflowing steps it takes until each further one halves the scale; counted anew
    when the scale doubles."""


@dataclass
class ScheduleConfig:
    """How long the run is and how the learning rate moves."""

    train_steps: Count = 0
    """Optimizer steps of the run; give this or train_tokens."""
    train_tokens: Count = 0
    """Processed tokens of the run (rounded up to whole steps); give this or train_steps."""
    style: str = "cosine"
    """Shape after warm-up: constant, linear, cosine, or wsd = constant, then a decay over
    decay_fraction of the run. Also the name of a shape that an installed package offers, or
    PATH.py:NAME, a function in a file of your own: see docs/extending.md."""
    warmup_fraction: Fraction = 0.02
    """Share of the run with linear warm-up."""
    decay_fraction: Fraction = 0.2
    """Share of the run that decays at its end (wsd only)."""


@dataclass
class CheckpointConfig:
    """Saving and loading."""

    interval_steps: Count = 0
    """Save every so many steps; 0 = only at the end."""
    keep_last: Count = 3
    """Checkpoints kept; older ones are removed after a newer one is complete. 0 = keep all."""
    keep_every_steps: Count = 0
    """Checkpoints at multiples of this are kept for good; 0 = none."""
    keep_best: Count = 0
    """Checkpoints kept for their low validation loss, beside the newest; 0 = none.

    Every scheduled checkpoint is then validated; the file checkpoints/best names the best."""
    best_validation: str = ""
    """Name of the validation corpus whose loss decides what is best; empty = the first of
    data.validation."""
    initialize_from: str = ""
    """Checkpoint whose weights (only) start this run, as for continual pretraining; ignored when
    the run folder has its own checkpoint. A model or tokenizer that differs from the checkpoint's
    is refused; model.from_checkpoint takes the model from it."""
    allow_other_rope: bool = False
    """Start although rope_base, rope_base_windowed or rope_scaling (model.rope_*) is not
    initialize_from's, as for longer sequences; what differs is said when the run starts. Everything
    else must be the same."""
    save_optimizer: bool = True
    """Save optimizer state; without it a checkpoint cannot be resumed, only used as weights.

    One made because the run is asked to stop always has it."""
    asynchronous: bool = False
    """Write checkpoints in the background while training goes on."""
    max_failed_saves: Size = 3
    """So many checkpoints in a row that cannot be written end the run with exit code 4. Fewer are
    reported, and training goes on: a full disk may be noticed and freed."""


@dataclass
class Config:
    """A whole run."""

    run: RunConfig = field(default_factory=RunConfig)
    """Where a run writes, and its seed."""
    device: DeviceConfig = field(default_factory=DeviceConfig)
    """What the run computes on."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The model."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How the model is spread."""
    data: DataConfig = field(default_factory=DataConfig)
    """What is read."""
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    """Which tokens are trained on."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """Length and learning rate."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Saving and loading."""
    monitoring: MonitoringConfig = field(default_factory=MonitoringConfig)
    """Metrics."""
