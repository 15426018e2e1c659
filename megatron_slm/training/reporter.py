"""What a run reports: the start table, metrics to every sink, and warnings computed from them.

At the end it also writes a page of text with the tokens that the model would select.
"""

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_slm.checkpoint.begin_token import begin_token_warnings
from megatron_slm.config.load import to_mapping
from megatron_slm.config.schema import Config
from megatron_slm.files.atomic import write_text_atomically
from megatron_slm.model.build import resolve_layers
from megatron_slm.monitoring import (
    ConsoleSink,
    JsonlSink,
    MultiSink,
    NullSink,
    Sink,
    WandbSink,
    peak_flops_per_second,
    run_status,
)
from megatron_slm.monitoring.console import lines_of_table
from megatron_slm.parallel import Groups
from megatron_slm.selection import Scorer, build_schedule
from megatron_slm.selection.alarms import ranks_tokens, smallest_population, warnings_of
from megatron_slm.selection.populations import population_sequences
from megatron_slm.training.closing import closing_lines
from megatron_slm.training.run_length import RunLength
from megatron_slm.training.scorer_settings import choice_rules
from megatron_slm.training.setup import RunInputs
from megatron_slm.training.start_table import start_table

BY_CORPUS = "selection/rate_by_corpus"


def rates_of_corpora(prefixes: list[str], rates: list[float]) -> dict[str, float]:
    """The rate of each corpus under its name.

    A corpus without a token in the interval has none: its rate is not a number.
    """
    named = {}
    for index, (prefix, rate) in enumerate(zip(prefixes, rates, strict=True)):
        before = prefixes[:index].count(prefix)  # a corpus may be in the blend twice
        if math.isfinite(rate):
            named[f"{BY_CORPUS}/{prefix}" + (f" ({before + 1})" if before else "")] = rate
    return named


class Reporter:
    """Writes on one rank, the last of the world; elsewhere every call is a no-op."""

    def __init__(
        self,
        config: Config,
        groups: Groups,
        run_inputs: RunInputs,
        *,
        resume_step: int | None,
        wandb_id: str,
        length: RunLength | None = None,
        outside_sinks: Mapping[str, Callable[..., Any]] | None = None,
    ):
        """length: None = that of a run which starts anew. outside_sinks: functions of
        monitoring.sinks by their names.
        """
        self.config = config
        self.groups = groups
        self.run_inputs = run_inputs
        self.folder = Path(config.run.folder)
        self.length = length or RunLength(config)
        self.warned: set[str] = set()
        self.started_at = time.monotonic()
        self.resume_step = resume_step
        self.newest: dict[str, dict] = {}
        """The newest record of this start, by its kind."""
        self.peak_flops_per_second: float | None = None
        if groups.device.type == "cuda":
            self.peak_flops_per_second = peak_flops_per_second(
                torch.cuda.get_device_name(), config.device.precision
            )
        self.sink: Sink = NullSink()
        if groups.is_logger:
            self._open_sinks(wandb_id, outside_sinks or {})

    def _open_sinks(self, wandb_id: str, outside_sinks: Mapping[str, Callable[..., Any]]) -> None:
        """Open every sink, show the start table, and send the messages of the start."""
        console = ConsoleSink(
            total_steps=self.length.steps, start_step=self.resume_step or 0, title=self.name
        )
        sinks = MultiSink(
            [JsonlSink(self.folder / "metrics.jsonl", resume_step=self.resume_step), console]
        )
        self.sink = sinks
        self._show_start_table(console, self._open_wandb(sinks, wandb_id))
        for sink_name, make in outside_sinks.items():
            self._add_outside_sink(sinks, sink_name, make)
        if self.resume_step is not None:
            self.message(f"resumed after step {self.resume_step}", "info")
        self._warn_of_scoring_context()
        for sentence in begin_token_warnings(
            self.config, self.run_inputs.corpora, resumed=self.resume_step is not None
        ):
            self.message(sentence, "warning")
        if choice_rules(self.config.selection).scorer.uses_keep_fraction:
            self._warn_of_small_population()

    def _warn_of_scoring_context(self) -> None:
        """Warn if tokens were scored in another context than they are trained in."""
        if self.config.selection.scorer == "none":
            return
        data = self.config.data
        for corpus in self.run_inputs.corpora:
            if corpus.scores is not None:
                for sentence in corpus.scores.context_warnings(
                    data.sequence_length, data.document_policy
                ):
                    self.message(sentence, "warning")

    def _open_wandb(self, sinks: MultiSink, run_id: str) -> str:
        """Open the W&B run, where one is wanted; returns where it is, for the start table."""
        if self.config.monitoring.wandb.mode == "disabled":
            return "off (monitoring.wandb.mode is disabled)"
        wandb = WandbSink(
            self.config.monitoring.wandb,
            run_folder=self.folder,
            name=self.name,
            config={**to_mapping(self.config), "layout": self._layout()},
            run_id=run_id,
            warn=lambda text: self.message(text, "warning"),
        )
        sinks.add(wandb)
        return wandb.location

    def _add_outside_sink(self, sinks: MultiSink, name: str, make: Callable[..., Any]) -> None:
        """Logging cannot stop training: a sink that cannot be made costs a warning."""
        try:
            sink = make(str(self.folder), to_mapping(self.config))
            missing = [
                method for method in ("log", "message", "close") if not hasattr(sink, method)
            ]
            if missing:
                raise TypeError(f"a {type(sink).__name__} has no {', '.join(missing)}")
        except Exception as error:  # the user's code: it may raise anything
            self.message(
                f"monitoring.sinks: {name} cannot be used, training goes on without it: "
                f"{type(error).__name__}: {error}",
                "warning",
            )
            return
        sinks.add(sink)

    def _warn_of_small_population(self) -> None:
        data = self.config.data
        keep_fraction = build_schedule(self.config.selection.keep_fraction)
        # Schedules are monotone, so the smallest fraction is at one of the ends.
        keep = min(keep_fraction(self.length.start.tokens), keep_fraction(self.length.tokens))
        sequences = population_sequences(
            self.config.selection.scope,
            micro_batch_size=data.micro_batch_size,
            data_parallel_size=self.groups.dp_size,
            global_batch_size=data.global_batch_size,
        )
        tokens = sequences * data.sequence_length
        if tokens < smallest_population(keep):
            self.message(
                f"selection.keep_fraction {keep} of a population of {tokens} tokens cannot be met "
                f"closely: ceil({keep} x {tokens}) keeps too many. Use a wider selection.scope, a "
                "larger batch or longer sequences",
                "warning",
            )

    @property
    def name(self) -> str:
        return self.config.run.name or self.folder.name

    def message(self, text: str, level: str) -> None:
        self.sink.message(text, level)

    def log(self, record: dict, step: int) -> None:
        """Write one line of metrics, and in status.json how far the run is.

        The last rank of the world writes the first, rank 0 the second. Rates of the corpora go
        under the corpora's names.
        """
        record = dict(record)
        if rates := record.pop(BY_CORPUS, None):
            prefixes = [corpus.prefix for corpus in self.run_inputs.corpora]
            record |= rates_of_corpora(prefixes, rates)
        self.newest[record.get("kind", "train")] = record | {"step": step}
        self.sink.log(record, step)
        if self.groups.world_rank == 0:
            run_status.progress(self.folder, step)

    def emit_warnings(self, summary: dict, keep_fraction: float, scorer: Scorer) -> dict[str, str]:
        """Report each alarm that this interval's metrics raise, once per start of the run.

        scorer: what chose the tokens of the interval. Returns all alarms raised, by their names.
        """
        own_count = scorer.uses_keep_fraction and scorer.name not in ("union", "intersection")
        alarms = warnings_of(
            summary,
            keep_fraction if own_count else None,
            ranked=scorer.name != "none"
            and ranks_tokens(self.config.selection.scorer, keep_fraction),
        )
        for name, sentence in alarms.items():
            self.warn_once(name, sentence)
        return alarms

    def warn_once(self, name: str, sentence: str) -> None:
        """A warning of the kind `name`, unless this start of the run has had one."""
        if name not in self.warned:
            self.warned.add(name)
            self.message(sentence, "warning")

    def close(self, state: str, exit_code: int) -> None:
        """Close the sinks of a run that is done, stopped or failed.

        One that is done says where everything is.
        """
        if state == "done" and self.groups.is_logger:
            seconds = time.monotonic() - self.started_at
            for line in closing_lines(
                self.folder, self.name, self.newest, seconds, self.resume_step
            ):
                self.message(line, "info")
        self.sink.close(state, exit_code)

    def write_token_view(self, lines: list[dict]) -> None:
        """token_view.jsonl: real text with what the model would select from it now.

        A disk that cannot take it costs a warning.
        """
        if self.groups.is_logger and lines:
            path = self.folder / "token_view.jsonl"
            try:
                write_text_atomically(path, "".join(json.dumps(line) + "\n" for line in lines))
            except OSError as error:
                self.message(f"{path} could not be written ({error})", "warning")

    def _layout(self) -> dict:
        groups = self.groups
        return {
            "processes": groups.world_size,
            "tensor": groups.tp_size,
            "pipeline": groups.pp_size,
            "virtual_pipeline": groups.virtual_chunks,
            "context": groups.cp_size,
            "data": groups.dp_size,
            "expert": groups.ep_size,
            "sequence_parallel": self.config.parallel.sequence,
            "distributed_optimizer": self.config.parallel.distributed_optimizer,
        }

    def _show_start_table(self, console: ConsoleSink, wandb: str) -> None:
        """The short table on the console, the full one in the run folder."""
        layers = resolve_layers(self.config, self.groups.device.type == "cuda")
        table = start_table(self.config, self.groups, self.run_inputs, layers, wandb, self.length)
        path = self.folder / "start_table.txt"
        console.table(f"megatron-slm  {self.name}", table.short(path))
        try:
            write_text_atomically(path, "\n".join(lines_of_table(table.full())) + "\n")
        except OSError as error:
            self.message(f"{path} could not be written ({error})", "warning")
