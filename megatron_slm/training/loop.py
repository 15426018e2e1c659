"""A whole run: build, resume, step after step, validate, save, stop.

Every rank runs the same loop. The losses live on the last pipeline stage; the last rank of the world, which is there,
writes the metrics.
"""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_slm.checkpoint.folder import complete_checkpoints
from megatron_slm.checkpoint.retention import Retention
from megatron_slm.checkpoint.store import CheckpointStore
from megatron_slm.checkpoint.weights import load_weights
from megatron_slm.config.load import to_yaml
from megatron_slm.config.schema import Config
from megatron_slm.model.build import build_model
from megatron_slm.model.context_parallel import on_this_rank
from megatron_slm.model.optimizer import (
    build_optimizer,
    loss_scale,
    wrap_data_parallel,
)
from megatron_slm.model.router import summarise_routing
from megatron_slm.monitoring import (
    LossSpikes,
    Metrics,
    Throughput,
    wandb_run_id,
)
from megatron_slm.parallel import Groups
from megatron_slm.selection import TrainingProgress
from megatron_slm.selection.alarms import zero_gradient
from megatron_slm.selection.diagnostics import summarise
from megatron_slm.training import resume, setup
from megatron_slm.training.busy_time import SlowRankReport
from megatron_slm.training.data_fault import DataFault
from megatron_slm.training.ending import NotSaved
from megatron_slm.training.evaluate import losses_in, nothing_counted, validate
from megatron_slm.training.instruments import make_throughput, make_tools, make_watchdog
from megatron_slm.training.learning_rate import learning_rate
from megatron_slm.training.loaders import training_loader, validation_loaders
from megatron_slm.training.non_finite import NonFiniteSteps
from megatron_slm.training.outside_parts import OutsideParts
from megatron_slm.training.outside_validation import ValidationRun, measure_outside
from megatron_slm.training.probe import Probe
from megatron_slm.training.rank_batches import ValidationOnThisRank
from megatron_slm.training.reference import load_reference
from megatron_slm.training.reporter import Reporter
from megatron_slm.training.run_length import Done, RunLength
from megatron_slm.training.saved_state import restore, save
from megatron_slm.training.signals import EXIT_RESUME, StopRequest
from megatron_slm.training.spike_data import SpikeData
from megatron_slm.training.step import StepReport, train_step
from megatron_slm.training.stop_signals import StopSignals
from megatron_slm.training.stored_data import StoredDataCheck
from megatron_slm.training.token_selector import TokenSelector
from megatron_slm.training.trainer import Trainer
from megatron_slm.training.versions import write_versions


class TrainingRun:
    """One run folder being trained.

    signals: what this process hears of requests to stop; None = only the stop file counts.
    notes: (text, level) of what is to be said when there are sinks to say it to.
    parts: those that the settings take from outside the library; None = none.
    """

    def __init__(
        self,
        config: Config,
        groups: Groups,
        run_inputs: setup.RunInputs,
        signals: StopSignals | None = None,
        notes: Sequence[tuple[str, str]] = (),
        parts: OutsideParts | None = None,
    ):
        self.signals, self.notes = signals, notes
        self.parts = parts or OutsideParts()
        self.config, self.groups, self.run_inputs = config, groups, run_inputs
        self.folder = Path(config.run.folder)
        self.done = Done()
        models = wrap_data_parallel(build_model(config, run_inputs.vocabulary_size, groups), config)
        selector = TokenSelector(
            config.selection,
            groups,
            sequence_length=config.data.sequence_length,
            corpora=len(run_inputs.corpora),
        )
        self.trainer = Trainer(
            models,
            build_optimizer(models, config, self.parts.make_optimizer),
            selector,
            groups,
            load_reference(config, groups),
        )
        self.validation = {
            name: ValidationOnThisRank(loader, groups)
            for name, loader in validation_loaders(config, run_inputs, groups).items()
        }
        self.probe = Probe(config, run_inputs, self.trainer)
        self.metrics = Metrics(groups.device)
        self.loss_spikes = LossSpikes()
        self.spike_data = SpikeData(self)
        self.non_finite = NonFiniteSteps(self)
        self.validated: tuple[int, dict[str, float]] = (
            0,
            {},
        )  # step and loss of each corpus; known on last-stage ranks
        self.tokens_selected = 0  # up to the last log line; known on last-stage ranks
        self.skipped_steps = 0  # fp16 overflows
        self.wandb_id = ""
        self.reporter: Reporter | None = None

    @property
    def step(self) -> int:
        return self.done.steps

    def start(self) -> None:
        """Resume from the newest good checkpoint, or take initial weights; then open the sinks."""
        messages: list[tuple[str, str]] = list(self.notes)
        kept = self.config.checkpoint
        retention = Retention(
            kept.keep_last,
            kept.keep_every_steps,
            kept.keep_best,
            kept.best_validation or next(iter(self.validation), ""),
        )
        self.store = CheckpointStore(
            self.folder,
            self.groups,
            retention=retention,
            asynchronous=kept.asynchronous,
            report=lambda text, level: messages.append((text, level)),
        )
        self.position = resume.wanted_position(self.config, self.run_inputs.corpora)
        self.fingerprints = resume.fingerprints_of(
            self.config, self.run_inputs.corpora, self.run_inputs.validation
        )
        state = self.store.load_latest(self.trainer.models, self.trainer.optimizer)
        if state is not None:
            messages += restore(self, state)
        elif complete_checkpoints(self.store.checkpoints):
            raise ValueError(
                f"{self.store.checkpoints}: every checkpoint is damaged; move them away to start anew, or restore one from a backup"
            )
        elif self.config.checkpoint.initialize_from:
            info = load_weights(
                self.trainer.models, self.config.checkpoint.initialize_from, self.groups
            )
            self.trainer.optimizer.reload_model_params()
            messages.append(
                (f"weights of {self.config.checkpoint.initialize_from}, step {info.step}", "info")
            )
        self.length = RunLength(self.config, self.done)
        self.steps = self.length.steps
        self.loader = training_loader(
            self.config, self.run_inputs, self.groups, self.position, self.length.remaining_samples
        )
        messages += self._write_settings(resumed=state is not None)
        # Importing rich draws from Python's generator: the state would depend on the starts before.
        random_state = random.getstate()
        self.reporter = Reporter(
            self.config,
            self.groups,
            self.run_inputs,
            resume_step=self.step if state is not None else None,
            wandb_id=self._agreed_wandb_id(),
            length=self.length,
            outside_sinks=self.parts.sinks,
        )
        random.setstate(random_state)
        self.store.report = self.reporter.message
        for text, level in messages:
            self.reporter.message(text, level)

    def _write_settings(self, resumed: bool) -> list[tuple[str, str]]:
        """config.yaml and versions.txt, by rank 0; what has changed since the start before, on
        every rank: another one writes the log.
        """
        told = [[]]
        if self.groups.world_rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            if resumed:
                told = [resume.changed_settings(self.folder, self.config)]
            (self.folder / "config.yaml").write_text(to_yaml(self.config))
            write_versions(self.folder)
        dist.broadcast_object_list(told, src=0)
        return told[0]

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
        return self._end(stopped=stopping and self.step < self.steps, stop=stop)

    def _train(self, stop: StopRequest, throughput: Throughput) -> bool:
        """Step after step to the last one, or until all ranks agree to stop; whether they did."""
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
            self._count(report, of_use=not self.non_finite.is_fault(report, scale))
            throughput.step_done(self.length.step_tokens)
            self.non_finite.check(report, batches, scale)
            if report.grad_norm == 0.0:
                self.reporter.warn_once("zero_gradient", zero_gradient(self.step))
            if stop.is_due(last_step=self.step == self.steps):
                with throughput.waiting_for_data():
                    fault = self.loader.fault() if self.step < self.steps else None
                stopping = stop.agreed(fault or self.stored_data.fault(), self.loader.ready_steps)
            metrics = self._step_metrics(report, rate)
            if self.step == self.steps or _due(
                self.step, self.config.monitoring.log_interval_steps
            ):
                metrics = self._log(metrics, throughput)
            with throughput.paused():
                self._after_step(stopping)
                self.tools.after_step(self.step, metrics)
            self.watchdog.step_done(self.step)
        return stopping

    def _count(self, report: StepReport, of_use: bool) -> None:
        """Add a step's sums to the interval's; those of a faulty step may not be finite and would hide the others."""
        self.skipped_steps += not report.updated
        if of_use:
            self.spike_data.step_done(report.measured)
        if of_use and report.selected_tokens is not None:
            self.metrics.add_all(report.measured)
            self.metrics.add_sum("tokens/selected", report.selected_tokens)

    def _end(self, stopped: bool, stop: StopRequest) -> int:
        """Say how the run ended; its exit code.

        NotSaved: there is no checkpoint of the last step.
        """
        saved = self.store.saved_step == self.step
        if stopped:
            if problem := stop.clear():
                self.reporter.message(problem, "warning")
            if saved:
                self.reporter.message(
                    f"stopped on request after step {self.step} of {self.steps}; start the same command again to continue",
                    "warning",
                )
        else:
            self.reporter.write_token_view(self.probe.view(self._progress()))
        if not saved:
            reached = (
                f"the run stopped on request after step {self.step} of {self.steps}"
                if stopped
                else f"the run reached its last step {self.steps}"
            )
            raise NotSaved(
                f"{reached}, but the checkpoint of that step could not be saved (see the errors above); {self._way_on()}"
            )
        return EXIT_RESUME if stopped else 0

    def _way_on(self) -> str:
        return (
            f"free space or fix {self.store.checkpoints}, then start the same command again: it goes "
            f"on from step {self.store.saved_step or 0}"
        )

    def _progress(self) -> TrainingProgress:
        return TrainingProgress(self.done.steps, self.done.tokens)

    def _after_step(self, stopping: bool) -> None:
        done, kept = self.step == self.steps, self.config.checkpoint
        scheduled = done or _due(self.step, kept.interval_steps)
        if (
            done
            or _due(self.step, self.config.monitoring.validation_interval_steps)
            or (scheduled and kept.keep_best)
        ):
            try:
                with self.watchdog.phase("validation"), self.tools.patient():
                    self._validate()
            except DataFault:  # of a validation corpus: no trained step is lost for it
                save(self, with_optimizer=True)
                self.store.close()
                raise
        if (
            scheduled or stopping
        ):  # a stop has no time to validate: its checkpoint is nobody's best; but it must be one to resume from
            with self.watchdog.phase("saving a checkpoint"), self.tools.patient():
                save(self, with_optimizer=kept.save_optimizer or (stopping and not done))
        self.store.finish_pending()
        if self.store.failed_saves >= kept.max_failed_saves and not (done or stopping):
            raise NotSaved(
                f"{self.store.failed_saves} checkpoints in a row could not be saved, the last one at step "
                f"{self.step} (checkpoint.max_failed_saves); {self._way_on()}"
            )

    def _step_metrics(self, report: StepReport, rate: float) -> dict[str, Any]:
        """What is known of every step without waiting for the device."""
        norm = {"optimizer/grad_norm": report.grad_norm} if report.updated else {}
        return {"tokens/processed": self.done.tokens, **norm, "optimizer/learning_rate": rate}

    def _log(self, step_metrics: dict[str, Any], throughput: Throughput) -> dict[str, Any]:
        """Write the interval's metrics; returns the line."""
        summary = self.metrics.reduce(self.groups.dp_cp, summarise=self._summarise)
        self.tokens_selected += int(summary.pop("tokens/selected", 0))
        scale = loss_scale(self.trainer.optimizer)
        fp16 = {} if scale is None else {"optimizer/loss_scale": scale}
        if scale is not None or self.skipped_steps:
            fp16["optimizer/skipped_steps"] = self.skipped_steps
        record = {
            "kind": "train",
            "tokens/processed": self.done.tokens,
            "tokens/selected": self.tokens_selected,
            **summary,
            **step_metrics,
            **fp16,
            **throughput.interval(self.done.tokens),
            **self.slow_ranks.interval(),
        }
        self.reporter.log(record, self.step)
        keep_fraction = self.trainer.selector.keep_fraction(
            self.done.tokens - self.length.step_tokens
        )
        self.reporter.emit_warnings(summary, keep_fraction, self.trainer.selector.scorer)
        self.spike_data.end_interval(self.loss_spikes.look(summary, keep_fraction, self.step))
        return record

    def _summarise(self, reduced: dict) -> dict:
        return {
            **summarise(reduced),
            **summarise_routing(reduced, self.config.model.layers, self.config.model.experts),
        }

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
            {"kind": "validation", "tokens/processed": self.done.tokens, **record},
            self.step,
        )

    def _agreed_wandb_id(self) -> str:
        ids = [
            wandb_run_id(self.folder, self.wandb_id or None)
            if self.groups.world_rank == 0
            else None
        ]
        dist.broadcast_object_list(ids, src=0)
        self.wandb_id = ids[0]
        return self.wandb_id


def _due(step: int, interval_steps: int) -> bool:
    return bool(interval_steps) and step % interval_steps == 0
