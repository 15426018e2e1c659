"""The description of a whole pipeline: every setting with its type, default and help.

Entries of one kind stand under names of your own; entries refer to each other by these names. A
reference with a slash in it is the path of something that exists already.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_slm.config.ranges import BelowOne, Count, Fraction, Size


@dataclass
class Resources:
    """What the jobs of a stage ask SLURM for."""

    nodes: Count = 0
    """Nodes of one job; 0 = what the section slurm says for stages of its kind, and there 1."""
    processes_per_node: Count = 0
    """Processes of training or scoring on every node: one per GPU. 0 = as above, and there 1."""
    sbatch: dict[str, Any] = field(default_factory=dict)
    """Further options of sbatch by their long names: {partition: gpu, gpus_per_node: 8, time:
    "04:00:00"}. true = without a value."""


@dataclass
class Text:
    """A program that makes the text, where it has to be made."""

    command: list[str] = field(default_factory=list)
    """Words of its command line; it writes below {folder}/text. Empty = the text is there. {folder}
    stands for the pipeline's folder."""


@dataclass
class TokenizerStage:
    """The vocabulary: one that exists, or one that is trained."""

    path: str = ""
    """A SentencePiece .model or a tokenizer.json that exists; empty = train one on `input`."""
    input: list[str] = field(default_factory=list)
    """Text to train it on: files, folders or globs."""
    vocabulary_size: Count = 0
    """Ids of the vocabulary to train, the 256 bytes and the special ones included."""
    model_type: Literal["bpe", "unigram"] = "bpe"
    """Kind of the SentencePiece model."""
    sample_bytes: Count = 200_000_000
    """Train on a random sample of documents of about this size; 0 = on everything."""
    text_key: list[str] = field(default_factory=lambda: ["text"])
    """Where a record keeps its text; several keys are joined."""
    include: list[str] = field(default_factory=list)
    """Of folders, only file names like *.py."""
    special_tokens: list[str] = field(default_factory=list)
    """Further control tokens."""


@dataclass
class CorpusStage:
    """Text to a corpus; with held_out_fraction also NAME_train and NAME_held_out."""

    input: list[str] = field(default_factory=list)
    """Text, in the order of the documents: files, folders or globs."""
    jobs: Size = 1
    """Array jobs that make a part of it each; the parts are joined afterwards. One machine makes it
    in one run, to the same bytes."""
    workers: Size = 1
    """Processes of each job, and the cores it asks SLURM for."""
    format: Literal["auto", "jsonl", "parquet", "text"] = "auto"
    """auto goes by the names of the files."""
    include: list[str] = field(default_factory=list)
    """Of folders, only file names like *.py."""
    text_key: list[str] = field(default_factory=lambda: ["text"])
    """Where a record keeps its text; several keys are joined."""
    append_eod: bool = True
    """Close every document with the end-of-document token."""
    prepend_bos: bool = False
    """Begin every document with the begin-of-sequence token."""
    max_bad_fraction: Fraction = 0.05
    """Fail when more of the records, or of the bytes, is broken."""
    min_characters: Count = 0
    """Leave out shorter documents."""
    max_characters: Count = 0
    """Leave out longer documents; 0 = none."""
    drop_duplicates: bool = False
    """Keep the first of documents with the same text; only with one job."""
    keep_if: str = ""
    """FILE.py:FUNCTION; keep documents where FUNCTION(text, record) is true."""
    held_out_fraction: BelowOne = 0.0
    """Share of the documents that NAME_held_out gets, chosen by their content; NAME_train gets the
    others."""
    held_out_seed: Count = 0
    """Another seed makes another choice of held-out documents."""
    verify: bool = False
    """Read the whole corpus once more, and go on only when it is sound."""


@dataclass
class ImportedModel:
    """A Hugging Face model to start from."""

    input: str = ""
    """Its folder: config.json, safetensors, tokenizer."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Precision of the stored weights."""


@dataclass
class TrainingDefaults:
    """What all training runs share."""

    config: str = ""
    """A recipe (YAML of megatron_slm.train) that every run begins from."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings over the recipe's, as sections or dotted: {schedule.train_steps: 100}."""
    validation: dict[str, Any] = field(default_factory=dict)
    """Corpora to measure the loss on, {name in the metrics: corpus}."""


@dataclass
class RunStage:
    """One training run: a base model, a reference, or an arm of the comparison."""

    config: str = ""
    """Its own recipe; empty = the one in the section training."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings over those of the section training."""
    train: list[str] = field(default_factory=list)
    """Corpora it reads."""
    validation: dict[str, Any] = field(default_factory=dict)
    """Instead of the section training's."""
    start_from: str = ""
    """The run or imported model whose weights it begins with; empty = what the recipe says."""
    scores: list[str] = field(default_factory=list)
    """Entries of the section scores, one per corpus in `train`; empty = what the recipe says."""
    reference: str = ""
    """A run whose model scores the tokens while training, instead of stored scores."""
    slurm: Resources = field(default_factory=Resources)
    """Where it differs from slurm.train."""


@dataclass
class ScoreStage:
    """The reference's loss of every token of a corpus."""

    reference: str = ""
    """The run or imported model that scores the tokens."""
    corpus: str = ""
    """The corpus to score."""
    jobs: Size = 1
    """Array jobs that share the work. One machine does it in one run."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Options of megatron_slm.score: {window_tokens: 2048, micro_batch_size: 32}."""
    slurm: Resources = field(default_factory=Resources)
    """Where it differs from slurm.score."""


@dataclass
class Export:
    """A run as a Hugging Face folder."""

    run: str = ""
    """The run whose newest checkpoint is exported."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Precision of the exported weights."""
    check_on: str = ""
    """A corpus on which the export's logits are compared with ours; empty = no comparison."""


@dataclass
class Report:
    """report.html: the runs beside each other."""

    runs: list[str] = field(default_factory=list)
    """Runs to compare, in the order they are shown; empty = no report."""
    corpus: str = ""
    """Validation corpus to compare on, by its name in the metrics; empty = the first that all runs
    share."""


@dataclass
class Slurm:
    """What jobs ask SLURM for, by the kind of their stage."""

    sbatch: dict[str, Any] = field(default_factory=dict)
    """Options of every job, by their long names: {account: lab, partition: cpu}."""
    program: Resources = field(default_factory=Resources)
    """Text, tokenizer, corpora in one job, merge, split, verify, import, export, report."""
    preprocess: Resources = field(default_factory=Resources)
    """Array jobs that make the parts of a corpus."""
    train: Resources = field(default_factory=Resources)
    """Training."""
    score: Resources = field(default_factory=Resources)
    """Scoring."""


@dataclass
class Local:
    """How the same description runs on one machine."""

    processes: Size = 1
    """Processes of training and scoring."""


@dataclass
class Pipeline:
    """From text to trained, exported and compared models."""

    folder: str
    """The pipeline's folder: everything is written below it.

    On a cluster, on a file system that all nodes share."""
    text: Text = field(default_factory=Text)
    """A program that makes the text."""
    tokenizer: TokenizerStage = field(default_factory=TokenizerStage)
    """The vocabulary."""
    corpora: dict[str, CorpusStage] = field(default_factory=dict)
    """Corpora to make from text."""
    imports: dict[str, ImportedModel] = field(default_factory=dict)
    """Hugging Face models to start from."""
    training: TrainingDefaults = field(default_factory=TrainingDefaults)
    """What all runs share."""
    runs: dict[str, RunStage] = field(default_factory=dict)
    """Training runs."""
    scores: dict[str, ScoreStage] = field(default_factory=dict)
    """Score stores to make."""
    exports: dict[str, Export] = field(default_factory=dict)
    """Hugging Face folders to write."""
    report: Report = field(default_factory=Report)
    """The comparison of runs."""
    slurm: Slurm = field(default_factory=Slurm)
    """What jobs ask SLURM for."""
    local: Local = field(default_factory=Local)
    """How it runs on one machine."""
