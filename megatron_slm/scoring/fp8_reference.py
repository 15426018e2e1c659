"""Before a corpus is scored in fp8: how much of the selection that changes, printed and stored."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Literal, cast

import torch.distributed as dist
from torch.nn import Module

from megatron_slm.data.score_store import ScoreStore
from megatron_slm.files.atomic import write_json_atomically
from megatron_slm.parallel import Groups
from megatron_slm.scoring.corpus import ReferenceRunner, TokenStream
from megatron_slm.scoring.fp8_change import choice_change, losses_of, sampled_ranges
from megatron_slm.scoring.model import megatron_runner
from megatron_slm.scoring.options import ScoringJob
from megatron_slm.scoring.reference import Reference, load_scoring_model, scoring_config
from megatron_slm.scoring.windows import WindowPlan

Precision = Literal["fp32", "bf16", "fp16"]
FP8_CHANGE = "fp8_change.json"


def state_fp8_change(
    job: ScoringJob,
    model: Reference,
    store: ScoreStore,
    groups: Groups,
    stream: TokenStream,
    plan: WindowPlan,
) -> None:
    """Measure the change on some windows, print it, and write STORE/fp8_change.json.

    model: that to be trained. Every rank calls it. Measured once: a run that continues a store
    finds the file.
    """
    path = store.folder / FP8_CHANGE
    exists = [path.exists()]
    dist.broadcast_object_list(exists, src=0)  # ranks that looked apart would wait for each other
    if exists[0]:
        return

    def runner_of(models: list[Module]) -> ReferenceRunner:
        return megatron_runner(
            models, groups, stream, plan, ("loss",), job.options.micro_batch_size
        )

    ranges = sampled_ranges(plan.tokens, plan.window_tokens, job.options.fp8_windows)
    losses = {
        name: losses_of(load, runner_of, ranges)
        for name, load in _loaders(job, model, groups).items()
    }
    model_loss_N = losses.pop("model")
    if model_loss_N is None or groups.dp_rank != 0:
        return
    references = {name: values for name, values in losses.items() if values is not None}
    change = choice_change(model_loss_N, references, job.options.fp8_keep_fraction)
    write_json_atomically(path, change.as_json())
    print(f"{job.options.output}: {change}", flush=True)


def _loaders(
    job: ScoringJob, model: Reference, groups: Groups
) -> dict[str, Callable[[], list[Module]]]:
    """What loads the model to be trained, and the reference in each precision."""
    bf16 = dataclasses.replace(job.config.device, fp8="none")
    fp32 = dataclasses.replace(bf16, precision="fp32")
    trained_with = cast(Precision, model.info.precision)  # a DeviceConfig had it when it was saved
    own = dataclasses.replace(bf16, precision=trained_with)
    window_tokens, parallel = job.manifest.window_tokens, job.config.parallel
    return {
        name: partial(
            load_scoring_model,
            reference,
            scoring_config(reference, window_tokens, parallel, device),
            groups,
        )
        for name, reference, device in (
            ("model", model, own),
            ("fp32", job.reference, fp32),
            ("bf16", job.reference, bf16),
            ("fp8", job.reference, job.config.device),
        )
    }
