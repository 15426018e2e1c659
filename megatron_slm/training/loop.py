"""A whole run: start or resume, step after step, validate, save, stop.

Every rank runs the same loop. The losses live on the last pipeline stage; the last rank of the
world, which is in that stage, writes the metrics.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_slm.config.schema import Config
from megatron_slm.data.position import DataPosition
from megatron_slm.model.context_parallel import on_this_rank
from megatron_slm.model.optimizer import loss_scale
from megatron_slm.monitoring import LossSpikes, Metrics, Throughput
from megatron_slm.parallel import Groups
from megatron_slm.selection import TrainingProgress
from megatron_slm.selection.alarms import zero_gradient
from megatron_slm.training import resume, setup
from megatron_slm.training.busy_time import SlowRankReport
from megatron_slm.training.data_fault import DataFault
from megatron_slm.training.evaluate import losses_in, nothing_counted, validate
from megatron_slm.training.instruments import make_throughput, make_tools, make_watchdog
from megatron_slm.training.learning_rate import learning_rate
from megatron_slm.training.loaders import training_loader, validation_loaders
from megatron_slm.training.non_finite import NonFiniteSteps
from megatron_slm.training.outside_parts import OutsideParts
from megatron_slm.training.outside_validation import ValidationRun, measure_outside
from megatron_slm.training.probe import Probe
from megatron_slm.training.rank_batches import ValidationOnThisRank
from megatron_slm.training.reporter import Reporter
from megatron_slm.training.run_end import exit_code_of_end, refuse_failing_saves
from megatron_slm.training.run_length import Done, RunLength
from megatron_slm.training.run_metrics import count_step, log_interval, step_metrics
from megatron_slm.training.run_start import (
    agreed_wandb_id,
    make_store,
    make_trainer,
    take_weights,
    write_settings,
)
from megatron_slm.training.saved_state import save
from megatron_slm.training.signals import StopRequest
from megatron_slm.training.spike_data import SpikeData
from megatron_slm.training.step import train_step
from megatron_slm.training.stop_signals import StopSignals
from megatron_slm.training.stored_data import StoredDataCheck

if TYPE_CHECKING:
    from megatron_slm.checkpoint.store import CheckpointStore
    from megatron_slm.data.loader import TrainingLoader
    from megatron_slm.training.resume import Fingerprints
    from megatron_slm.training.tools import TrainingTools
    from megatron_slm.training.watchdog import Watchdog


class TrainingRun:
    """One run folder being trained.

    signals: requests to stop that reach this process as signals; None = only the stop file counts.
    notes: (text, level) of messages that are reported once the sinks are open. parts: what the
    settings take from outside the library; None = nothing.
    """

    # Made by `start`:
    store: CheckpointStore
    position: DataPosition
    fingerprints: Fingerprints
    length: RunLength
    steps: int
    loader: TrainingLoader
    reporter: Reporter
    # Made by `run`:
    slow_ranks: SlowRankReport
    stored_data: StoredDataCheck
    watchdog: Watchdog
    tools: TrainingTools

    def __init__(
        self,
        config: Config,
        groups: Groups,
        run_inputs: setup.RunInputs,
        signals: StopSignals | None = None,
        notes: Sequence[tuple[str, str]] = (),
        parts: OutsideParts | None = None,
    ):
        self.config = config
        self.groups = groups
        self.run_inputs = run_inputs
        self.signals = signals
        self.notes = notes
        self.parts = parts or OutsideParts()
        self.folder = Path(config.run.folder)
        self.done = Done()
        self.trainer = make_trainer(config, groups, run_inputs, self.parts)
        self.validation = {
            name: ValidationOnThisRank(loader, groups)
            for name, loader in validation_loaders(config, run_inputs, groups).items()
        }
        self.probe = Probe(config, run_inputs, self.trainer)
        self.metrics = Metrics(groups.device)
        self.loss_spikes = LossSpikes()
        self.spike_data = SpikeData(self)
        self.non_finite = NonFiniteSteps(self)
        # Step and loss of each corpus, and tokens up to the last log line: both are known on
        # last-stage ranks.
        self.validated: tuple[int, dict[str, float]] = (0, {})
        self.tokens_selected = 0
        self.skipped_steps = 0  # fp16 overflows
        self.wandb_id = ""

    @property
    def step(self) -> int:
        """Finished steps."""
        return self.done.steps

    def start(self) -> None:
        """Resume from the newest good checkpoint, or take initial weights; then open the sinks."""
        config = self.config
        messages: list[tuple[str, str]] = list(self.notes)
        self.store = make_store(self, lambda text, level: messages.append((text, level)))
        self.position = resume.wanted_position(config, self.run_inputs.corpora)
        self.fingerprints = resume.fingerprints_of(
            config, self.run_inputs.corpora, self.run_inputs.validation
        )
        resumed, resume_messages = take_weights(self)
        messages += resume_messages
        self.length = RunLength(config, self.done)
        self.steps = self.length.steps
        self.loader = training_loader(
            config, self.run_inputs, self.groups, self.position, self.length.remaining_samples
        )
        messages += write_settings(self, resumed=resumed)
        self.wandb_id = agreed_wandb_id(self)
        # Importing rich draws from Python's random generator, whose state would then depend on the
        # number of earlier starts.
        random_state = random.getstate()
        self.reporter = Reporter(
            config,
            self.groups,
            self.run_inputs,
            resume_step=self.step if resumed else None,
            wandb_id=self.wandb_id,
            length=self.length,
            outside_sinks=self.parts.sinks,
        )
        random.setstate(random_state)
        self.store.report = self.reporter.message
        for text, level in messages:
            self.reporter.message(text, level)

    def run(self) -> int:
        """Train to the last step.

        Exit code: 0 done, 85 stopped on request with a checkpoint to resume from.
        NotSaved: the checkpoint of the step it ended with could not be written. DataFault: a rank
        cannot read the next step, or a validation corpus; the steps before are in a checkpoint.
        """
        stop = StopRequest(self.folder, self.groups.device, self.signals)
        throughput = make_throughput(self)
        self.slow_ranks = SlowRankReport(self)
        every_seconds = self.config.data.check_interval_seconds
        self.stored_data = StoredDataCheck(self.run_inputs.every_corpus, every_seconds)
        with (
            make_watchdog(self) as self.watchdog,
            make_tools(self) as self.tools,
            self.slow_ranks,
            self.stored_data,
        ):
            stopping = self._train(stop, throughput)
            with self.watchdog.phase("finishing"), self.tools.patient():
                self.store.close()
                self.loader.close()
        if stop.fault is not None:
            raise stop.fault
        stopped = stopping and self.step < self.steps
        if not stopped:
            self.reporter.write_token_view(self.probe.view(self._progress()))
        return exit_code_of_end(self, stop, stopped=stopped)

    def _train(self, stop: StopRequest, throughput: Throughput) -> bool:
        """Train to the last step, or until all ranks agree to stop; returns whether they did."""
        if self.step == 0:
            self._validate()
        stopping = False
        if self.step < self.steps:
            stop.agreed(self.loader.fault())
            stopping = stop.fault is not None
        throughput.start_interval()
        while self.step < self.steps and not stopping:
            self.slow_ranks.step_begins()
            with throughput.waiting_for_data():
                batches = on_this_rank(self.loader.next_step(), self.groups)
            after = self.length.after(self.done)
            rate = learning_rate(self.config, *self.length.clock(after), self.parts.schedule_shape)
            scale = loss_scale(self.trainer.optimizer)
            report = train_step(self.trainer, batches, self._progress(), rate)
            self.done = after
            count_step(self, report, of_use=not self.non_finite.is_fault(report, scale))
            throughput.step_done(self.length.step_tokens)
            self.non_finite.check(report, batches, scale)
            if report.grad_norm == 0.0:
                self.reporter.warn_once("zero_gradient", zero_gradient(self.step))
            if stop.is_due(last_step=self.step == self.steps):
                with throughput.waiting_for_data():
                    fault = self.loader.fault() if self.step < self.steps else None
                stopping = stop.agreed(fault or self.stored_data.fault(), self.loader.ready_steps)
            metrics = step_metrics(self, report, rate)
            log_due = _due(self.step, self.config.monitoring.log_interval_steps)
            if self.step == self.steps or log_due:
                metrics = log_interval(self, metrics, throughput)
            with throughput.paused():
                self._after_step(stopping)
                self.tools.after_step(self.step, metrics)
            self.watchdog.step_done(self.step)
        return stopping

    def _progress(self) -> TrainingProgress:
        return TrainingProgress(self.done.steps, self.done.tokens)

    def _after_step(self, stopping: bool) -> None:
        """Validate and save if they are due after this step."""
        done = self.step == self.steps
        kept = self.config.checkpoint
        scheduled = done or _due(self.step, kept.interval_steps)
        validation_due = _due(self.step, self.config.monitoring.validation_interval_steps)
        if done or validation_due or (scheduled and kept.keep_best):
            try:
                with self.watchdog.phase("validation"), self.tools.patient():
                    self._validate()
            except DataFault:  # of a validation corpus: no trained step is lost for it
                with self.watchdog.phase("saving a checkpoint"), self.tools.patient():
                    save(self, with_optimizer=True)
                    self.store.close()
                raise
        # On a stop request validation is skipped (the checkpoint then cannot become `best`), but
        # the optimizer's state is always saved.
        if scheduled or stopping:
            with self.watchdog.phase("saving a checkpoint"), self.tools.patient():
                save(self, with_optimizer=kept.save_optimizer or (stopping and not done))
        self.store.finish_pending()
        if not (done or stopping):
            refuse_failing_saves(self)

    def _validate(self) -> None:
        if not self.validation:
            return
        record = {
            **validate(self.trainer.models, self.validation, self.groups),
            **self.probe.compare(self._progress()),
            **measure_outside(
                self.parts.validations,
                ValidationRun(self.step, self.trainer.models, self.validation, self.groups),
            ),
        }
        losses = losses_in(record, self.validation)
        self.validated = (self.step, losses)
        if sentence := nothing_counted(self.validation, losses):
            self.reporter.warn_once("validation_of_nothing", sentence)
        self.reporter.log(
            {"kind": "validation", "tokens/processed": self.done.tokens, **record}, self.step
        )


def _due(step: int, interval_steps: int) -> bool:
    return bool(interval_steps) and step % interval_steps == 0
