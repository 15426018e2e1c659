"""Parts of a plan as people read them: numbers with their units, and sentences about the job."""

from megatron_slm.config.schema import Config
from megatron_slm.planning.job import Job

BACKWARD_ROWS_MEASURED = {"last_layer": 1.006, "every_layer_approximate": 1.121}
"""Step time with selection.backward_rows over that with all rows: TinyLlama-1.1B (hidden size
2048), 8 x 2048 tokens, k = 0.6, one H200, revision 8855768. Gathering was unfused then."""
BACKWARD_ROWS_MEASURED_HIDDEN_SIZE = 2048


def describe_selection(job: Job) -> str:
    """The scorer, and the share of the tokens whose backward is counted."""
    scorer = job.rules.scorer
    if scorer.name == "none":
        return "none"
    if not scorer.uses_keep_fraction:
        return f"{scorer.name}, which decides alone: every token is counted as trained on"
    at_most = "" if scorer.kind == "score" else "at most "
    return f"{scorer.name}, {at_most}{job.trained_fraction:.0%} of the tokens trained on"


def backward_rows_on_a_gpu(config: Config) -> str:
    """Whether leaving rows out of the layers' backward pays on a GPU, as far as it was measured;
    "" where all rows are computed.
    """
    ratio = BACKWARD_ROWS_MEASURED.get(config.selection.backward_rows)
    if ratio is None:
        return ""
    measured = (
        f"at {BACKWARD_ROWS_MEASURED_HIDDEN_SIZE} a step on an H200 took {ratio} of the time of "
        "one with all rows; how rows are gathered has changed since and was not measured again"
    )
    if config.model.hidden_size <= BACKWARD_ROWS_MEASURED_HIDDEN_SIZE:
        return f"does not pay at hidden size {config.model.hidden_size}: {measured}"
    return f"not measured at hidden size {config.model.hidden_size}: {measured}"


def describe_data(job: Job) -> str:
    """Size of the training corpora, and how often the run passes over them."""
    if job.epochs is None:
        return "size not known: data.train is not on this machine; give --corpus-tokens"
    return f"{in_words(job.corpus_tokens)} tokens: {job.epochs:,.3g} epochs"


def describe_layout(job: Job) -> str:
    """tensor 8 + sequence, pipeline 4 x 2 chunks, context 2."""
    parallel = job.config.parallel
    parts = [
        f"tensor {parallel.tensor}{' + sequence' if parallel.sequence else ''}",
        f"pipeline {parallel.pipeline}",
    ]
    if parallel.virtual_pipeline > 1:
        parts[1] += f" x {parallel.virtual_pipeline} chunks"
    if parallel.context > 1:
        parts.append(f"context {parallel.context}")
    if job.config.model.experts:
        parts.append(f"expert {parallel.expert} (each over {job.expert_tensor})")
    return ", ".join(parts)


def gib(value: float) -> str:
    return f"{value / 2**30:,.2f}"


def _scaled(value: float, units: tuple[tuple[float, str], ...]) -> str:
    size, unit = next(((size, unit) for size, unit in units if value >= size), (1, ""))
    digits = ",.3g" if value / size < 1000 else ",.0f"
    return f"{value / size:{digits}}{unit}"


def in_words(value: float) -> str:
    return _scaled(value, ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")))


def flops_in_words(value: float) -> str:
    return _scaled(value, ((1e18, " E"), (1e15, " P"), (1e12, " T"), (1e9, " G"), (1e6, " M")))


def bytes_in_words(value: float) -> str:
    return _scaled(value, ((1e12, " TB"), (1e9, " GB"), (1e6, " MB"), (1e3, " KB")))
