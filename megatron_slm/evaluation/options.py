"""The settings of python -m megatron_slm.evaluate. No torch."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Literal

from megatron_slm.config import load
from megatron_slm.config.ranges import Count, Range, Size, out_of_range
from megatron_slm.config.schema import CorpusConfig, ParallelConfig
from megatron_slm.scoring.options import ScoreDevice, forward_only_problems, parse_program

RESERVED_SETS = frozenset(
    {"loss", "perplexity", "tokens", "bytes", "bits_per_byte", "unknown_tokens"}
)
"""Names that metrics of a whole corpus have."""
USAGE = "--checkpoint RUN [--corpora '[{name: N, corpus: PREFIX}]'] [options]"
RESULT_FILE = load.PrintedPath("print_output", lambda options: options.output)
TopFraction = Annotated[float, Range(above=0, at_most=1, note="0.6 takes 60 % of the tokens")]


@dataclass
class TokenSetConfig:
    """A frozen set of a corpus's tokens, whose loss is measured apart."""

    name: str = ""
    """Name in the metrics: validation/<corpus>/<name>/loss."""
    corpus: str = ""
    """Name of the corpus, as in `corpora`."""
    tokens: str = ""
    """A .npy file with one true or false per token of the corpus."""
    scores: str = ""
    """In place of `tokens`: a score store of the corpus, of which the highest values are taken."""
    column: str = "loss"
    """Its column."""
    minus: str = ""
    """A second score store of the corpus, whose column is subtracted: the loss of a base model
    minus the loss of a reference gives the tokens that selective training would choose.
    """
    top_fraction: TopFraction = 0.6
    """Share of the tokens with a score that is taken, the highest values first."""


@dataclass
class EvaluateOptions:
    """Settings of python -m megatron_slm.evaluate."""

    checkpoint: str = ""
    """A run folder (its newest checkpoint), or one step_* folder."""
    huggingface: str = ""
    """In place of `checkpoint`: the local folder of any causal model that transformers opens."""
    corpora: list[CorpusConfig] = field(default_factory=list)
    """Corpora to measure, each {name, corpus}; empty = the validation corpora of the run that
    `checkpoint` belongs to.
    """
    token_sets: list[TokenSetConfig] = field(default_factory=list)
    """Frozen sets of tokens, each {name, corpus, tokens} or {name, corpus, scores, minus,
    top_fraction}.
    """
    tokenizer: str = ""
    """Gives the bytes of each token; empty = the file that the corpora were made with."""
    sequence_length: Count = 0
    """Tokens that are read at once; 0 = the length the checkpoint was trained with (huggingface: it
    has to be given).
    """
    document_policy: Literal["as_trained", "packed", "isolated"] = "as_trained"
    """packed = attention runs across the documents of a sequence; isolated = no token sees another
    document; as_trained = that of the run, packed where it is not known.
    """
    sequences: Count = 0
    """Sequences that are read of each corpus, from all over it; 0 = all of them. Validation in
    training reads the same first monitoring.validation_batches x data.global_batch_size.
    """
    micro_batch_size: Size = 8
    """Sequences per forward pass."""
    output: str = ""
    """JSON file for the results. Those of a run's checkpoint are also added to the run folder's
    evaluations.jsonl, which the report reads.
    """
    wandb: bool = False
    """Log the results to the run's W&B run, where training has logged."""
    index_cache: str = ""
    """Folder that keeps the sample indices of large corpora; empty = they are made anew."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How the model is spread; the other processes are data-parallel."""
    device: ScoreDevice = field(default_factory=ScoreDevice)
    """What it computes on."""


def parse(argv: list[str], description: str) -> EvaluateOptions:
    """The settings of evaluate, as `parse_program` reads them."""
    return parse_program(
        "evaluate", argv, description, EvaluateOptions, USAGE, RESULT_FILE, option_problems
    )


def option_problems(options: EvaluateOptions) -> Iterator[str]:
    """What is wrong with the options alone, one sentence each."""
    yield from (sentence for _, sentence in out_of_range(options))
    if bool(options.checkpoint) == bool(options.huggingface):
        yield "give one of checkpoint (a run of ours) and huggingface (a folder of transformers)"
    elif options.huggingface:
        yield from _of_huggingface(options)
    yield from _of_corpora(options)
    for token_set in options.token_sets:
        yield from _of_token_set(token_set)
    names = [(token_set.corpus, token_set.name) for token_set in options.token_sets]
    for (corpus, name), count in Counter(names).items():
        if count > 1:
            yield f"token_sets: {count} sets of corpus {corpus!r} are named {name!r}; rename one"
    if options.device.fp8 != "none":
        yield (
            f"device.fp8: got {options.device.fp8}; fp8 losses are not those of the checkpoint: "
            "leave it at none"
        )
    yield from forward_only_problems(options.parallel, options.device, "evaluation")


def _of_huggingface(options: EvaluateOptions) -> Iterator[str]:
    if not options.corpora:
        yield "corpora: got none; name what the Hugging Face model is to be measured on"
    if not options.sequence_length:
        yield "sequence_length: got 0; name the tokens that the Hugging Face model reads at once"
    if options.wandb:
        yield "wandb: got true; a Hugging Face folder has no W&B run, leave it out"
    if options.parallel != ParallelConfig():
        yield (
            "parallel: a Hugging Face model is whole in every process, and all processes are "
            "data-parallel; leave it out, or import the model with megatron_slm.import_hf"
        )
    if options.device.layers != "auto":
        yield f"device.layers: got {options.device.layers}; a Hugging Face model has its own layers"


def _of_corpora(options: EvaluateOptions) -> Iterator[str]:
    for corpus in options.corpora:
        if not corpus.corpus:
            yield f"corpora {corpus.name}: names no corpus; expected {{name: N, corpus: PREFIX}}"
        if not corpus.name or "/" in corpus.name:
            yield f"corpora: got the name {corpus.name!r}; expected some text without a /"
    for name, count in Counter(corpus.name for corpus in options.corpora).items():
        if count > 1:
            yield f"corpora: {count} are named {name!r}; their results would be one"


def _of_token_set(token_set: TokenSetConfig) -> Iterator[str]:
    where = f"token_sets {token_set.name}"
    if not token_set.name or "/" in token_set.name or token_set.name in RESERVED_SETS:
        yield (
            f"token_sets: got the name {token_set.name!r}; expected some text without a / that is "
            f"none of {', '.join(sorted(RESERVED_SETS))}"
        )
    if bool(token_set.tokens) == bool(token_set.scores):
        yield f"{where}: give one of tokens (a .npy file) and scores (a score store)"
    plain = TokenSetConfig()
    for name in ("column", "minus", "top_fraction"):
        if token_set.tokens and getattr(token_set, name) != getattr(plain, name):
            yield f"{where}: {name} goes with scores only, leave it out"
