"""lm-evaluation-harness (arXiv 2405.14782) on a checkpoint, without an export.

Importing this file registers the model `megatron_slm` with the harness; it needs the package
lm_eval. `python -m megatron_slm.harness` does that and starts the harness; in a program of your
own: `import megatron_slm.evaluation.harness`, then `lm_eval.simple_evaluate("megatron_slm", ...)`.

Requests are answered as the harness' own model `hf` answers them, so a checkpoint and its export
have the same results: same truncation from the left, same windows of long texts, same prefix token.
"""

import os
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from lm_eval.api.model import CacheHook, TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from megatron_slm.config.load import ConfigError
from megatron_slm.device import choose_device, set_threads
from megatron_slm.evaluation.harness_settings import MODEL_NAME, HarnessJob, prepare
from megatron_slm.evaluation.text_requests import Choose, Row, greedy, sampler
from megatron_slm.parallel import Groups, join_job
from megatron_slm.scoring.reference import load_scoring_model

Encoded = tuple[tuple[str, str] | None, list[int], list[int]]
"""(texts, ids of the context, ids of the continuation); the texts are None for a part of a text."""


@register_model(MODEL_NAME)
class CheckpointLM(TemplateLM):
    """A checkpoint as the harness asks for it. Its keyword arguments are HarnessSettings."""

    def __init__(self, **arguments: Any):
        super().__init__()
        self.job: HarnessJob = prepare(arguments)
        config = self.job.config
        device = choose_device(config.device.kind)
        set_threads(config.device.threads_per_process)
        # It imports megatron.core, which is told of the device before.
        from megatron_slm.evaluation.text_model import TextModel

        self.groups: Groups = join_job(config.parallel, device, config.run.seed)
        # The harness lets LOCAL_RANK 0 print and write, on each node; one process is enough.
        os.environ["LOCAL_RANK"] = str(self.groups.world_rank)
        self._rank = self.groups.dp_rank
        self._world_size = self.groups.dp_size
        self._device = self.groups.device
        self.batch_size = self.job.settings.batch_size
        self.max_length = config.data.sequence_length
        info = self.job.checkpoint.info
        self.text_model = TextModel(
            load_scoring_model(self.job.checkpoint, config, self.groups),
            self.groups,
            info.model["vocabulary_size"],
            self.batch_size,
        )

    @property
    def eot_token_id(self) -> int:
        return self.job.tokenizer.eod_id

    @property
    def prefix_token_id(self) -> int:
        given = self.job.settings.prefix_token_id
        if given is not None:
            return given
        begin = self.job.tokenizer.bos_id
        return self.eot_token_id if begin is None else begin

    @property
    def tokenizer_name(self) -> str:
        """What the harness' caches of requests tell tokenizers apart by."""
        content = self.job.tokenizer.fingerprint.removeprefix("sha256:")[:16]
        return f"{content}-begin-{self.job.begins_texts}"

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes beside its results."""
        info = self.job.checkpoint.info
        return {
            "model_checkpoint": self.job.checkpoint.folder,
            "model_sha": info.fingerprint,
            "model_step": info.step,
            "model_tokens_processed": info.tokens_processed,
            "model_dtype": self.job.config.device.precision,
        }

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **unused: Any
    ) -> list[int]:
        begins = self.job.begins_texts if add_special_tokens is None else add_special_tokens
        ids = self.job.tokenizer.encode(string)
        begin = self.job.tokenizer.bos_id
        return [begin, *ids] if begins and begin is not None else ids

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        windows: list[Encoded] = []
        counts = []
        for request in requests:
            parts = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            made = [(None, *make_disjoint_window(part)) for part in parts]
            windows += made
            counts.append(len(made))
        answers = iter(self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm))
        totals = []
        for request, count in zip(requests, counts, strict=True):
            totals.append(sum(next(answers)[0] for _ in range(count)))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, totals[-1])
        return totals

    def set_cache_hook(self, cache_hook: CacheHook) -> None:
        """Called with --use_cache: each process then has a file of its own, under the harness' rank
        or LOCAL_RANK, and asks the model for the rest alone.
        """
        if self.groups.world_size > self.groups.dp_size or self.text_model.asks_together:
            raise ConfigError(
                [
                    f"--use_cache: got it on {self.groups.world_size} processes that compute "
                    "together; one that finds an answer in its file would leave the others "
                    "waiting. Leave it out, or use data parallelism alone"
                ]
            )
        super().set_cache_hook(cache_hook)

    def _loglikelihood_tokens(
        self, requests: Sequence[Encoded], disable_tqdm: bool = False, **unused: Any
    ) -> list[tuple[float, bool]]:
        rows = [self._row(context, continuation) for _, context, continuation in requests]
        bar = tqdm(
            total=len(rows), disable=disable_tqdm or self.rank != 0, desc="log-probabilities"
        )
        with bar:
            answers = self.text_model.log_probabilities(rows, bar.update)
            self.text_model.finish()
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def _row(self, context: list[int], continuation: list[int]) -> Row:
        if not 0 < len(continuation) <= self.max_length:
            raise ValueError(
                f"a continuation has {len(continuation)} tokens; expected 1 to {self.max_length}, "
                "which is max_length"
            )
        return Row([*context, *continuation][-(self.max_length + 1) :], len(continuation))

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        """Greedy, or sampled where the task asks for it (do_sample, temperature, top_k, top_p)."""
        by_settings: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            by_settings.setdefault(repr(request.args[1]), []).append(number)
        found = [""] * len(requests)
        bar = tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="generating")
        for numbers in by_settings.values():
            numbers.sort(key=lambda number: -len(requests[number].args[0]))
            for first in range(0, len(numbers), self.batch_size):
                members = numbers[first : first + self.batch_size]
                contexts = [requests[number].args[0] for number in members]
                settings = requests[members[0]].args[1]
                texts = self._generate(contexts, dict(settings))
                for number, text in zip(members, texts, strict=True):
                    found[number] = text
                    self.cache_hook.add_partial("generate_until", requests[number].args, text)
                bar.update(len(members))
        self.text_model.finish()
        bar.close()
        return found

    def _generate(self, contexts: list[str], settings: dict[str, Any]) -> list[str]:
        named = normalize_gen_kwargs(settings, self.job.settings.max_gen_toks)
        until = handle_stop_sequences(named.pop("until", None), eos=None)
        maximum_tokens = named.pop("max_gen_toks")
        choose = _choice(named)
        longest = self.max_length - maximum_tokens
        if longest < 1:
            raise ValueError(
                f"max_gen_toks: got {maximum_tokens}; expected below max_length, {self.max_length}"
            )
        prompts = [
            (self.tok_encode(context) or [self.prefix_token_id])[-longest:] for context in contexts
        ]
        finished = partial(self._is_finished, until)
        continued = self.text_model.continued(prompts, maximum_tokens, choose, finished)
        return [
            postprocess_generated_text(self.job.tokenizer.decode(ids), until, None)
            for ids in continued
        ]

    def _is_finished(self, until: list[str], ids: Sequence[int]) -> bool:
        if ids[-1] == self.eot_token_id:
            return True
        text = self.job.tokenizer.decode(ids)
        return any(stop and stop in text for stop in until)

    # What the harness' evaluator synchronises data-parallel processes with.

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.world_size == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(parts, tensor, group=self.groups.dp)
        return torch.stack(parts)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        parts: list[Any] = [None] * self.world_size
        dist.all_gather_object(parts, obj, group=self.groups.dp)
        return parts if self.rank == dst else None

    def barrier(self) -> None:
        dist.barrier(group=self.groups.dp)


def _choice(named: dict[str, Any]) -> Choose:
    """How the next token is chosen. ValueError names settings that are not known here."""
    named = dict(named)
    do_sample = named.pop("do_sample", False)
    temperature = float(named.pop("temperature", None) or 0.0)
    top_k = int(named.pop("top_k", None) or 0)
    top_p = float(named.pop("top_p", None) or 1.0)
    if named:
        raise ValueError(
            f"generation settings {', '.join(sorted(named))} are not supported; known are until, "
            "max_gen_toks, do_sample, temperature, top_k and top_p. Export the checkpoint and use "
            "the harness' model hf"
        )
    if not do_sample or temperature == 0.0:
        return greedy
    return sampler(temperature, top_k, top_p)
