"""Weights & Biases as a sink: imported only when used, one run per training run, and never able to
stop training.

The API key is read by wandb itself, from WANDB_API_KEY or the netrc file; it is no setting and is
written nowhere.
"""

import contextlib
import math
import secrets
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_slm.config.monitoring_settings import WandbConfig
from megatron_slm.files.redact import redacted_values
from megatron_slm.monitoring import wandb_loading
from megatron_slm.monitoring.wandb_server import choose_mode, unreachable

RUN_ID_FILE = "wandb_run_id"
X_AXIS = "tokens/processed"
STATE = "run/state"
"""Name in the run's summary: running, done, stopped or failed. W&B's own state knows no stop that
is to be continued.
"""
_CONNECT_SECONDS = 10
"""For wandb's own start, once something answers at the server's address. Until then no step is
trained.
"""
_FINISH_SECONDS = 60
_FLUSH_SECONDS = 1.0
"""How much of the run's local file a kill may take; wandb's own 15 s would be many log lines."""


class WandbSink:
    """Logs to one W&B run, against tokens/processed, whatever happens to the network.

    A failure of W&B is reported once through `warn` and the sink is silent from then on. Where the
    server does not answer at the start, the run is written offline; where it stops answering later,
    what it has not taken stays in the run's folder, and a message at the end of the run explains
    how to upload it. Steps repeated after a resume are logged again with the same x value.
    """

    def __init__(
        self,
        settings: WandbConfig,
        *,
        run_folder: str | Path,
        name: str,
        config: Mapping[str, Any],
        run_id: str,
        warn: Callable[[str], None],
    ) -> None:
        """config: the resolved config and parallel sizes, as nested dicts. warn: where the one
        warning goes.
        """
        self._warn = warn
        self._run: Any = None
        self.run_id = run_id
        self.mode = choose_mode(settings.mode)
        if self.mode == "disabled":
            return
        options = dict(
            dir=str(run_folder),
            id=run_id,
            name=name,
            config=redacted_values(config),
            project=settings.project,
            entity=settings.entity or None,
            group=settings.group or None,
            tags=settings.tags or None,
        )
        if not self._attempt(self._load):
            return
        if self.mode == "online" and (reason := self._not_online(options)):
            self.mode = "offline"
            self._warn(
                f"W&B cannot be used online ({reason}): this run is written offline; `wandb sync` "
                "uploads it later"
            )
        if self.mode == "offline":
            self._attempt(lambda: self._open(options))

    def _load(self) -> None:
        self._temporary = wandb_loading.TemporaryFiles()
        with self._temporary.used():
            self._wandb = wandb_loading.load_wandb()

    def _not_online(self, options: dict[str, Any]) -> str:
        """Open the run online; returns why that failed, or ""."""
        try:
            with self._temporary.used():
                known = self._wandb.setup(settings=self._settings()).settings
            found = {"http": known.http_proxy, "https": known.https_proxy}
            proxies = {scheme: proxy for scheme, proxy in found.items() if proxy}
            reason = unreachable(known.base_url, proxies)
            if not reason:
                self._open(options)
        except Exception as error:  # any: W&B is a convenience, the run is not
            reason = f"{type(error).__name__}: {error}"
        if reason:
            with contextlib.suppress(Exception):
                # wandb's service keeps retrying under the run's id, and would refuse this id to the
                # offline run.
                self._wandb.teardown()
        return reason

    @property
    def location(self) -> str:
        """Where the W&B run is: its address, or an offline run's folder and how to upload it."""
        if self._run is None:
            return "off"
        if self.mode == "offline":
            return f"offline; upload it with: wandb sync {_folder_of(self._run)}"
        return self._run.url

    def log(self, record: Mapping[str, Any], step: int) -> None:
        if self._run is not None:
            self._attempt(lambda: self._run.log({"step": step} | self._values(record)))

    def message(self, text: str, level: str = "info") -> None:
        if self._run is not None and level != "info":
            self._attempt(lambda: self._run.alert(title=level, text=text))

    def close(self, state: str = "done", exit_code: int = 0) -> None:
        """Finish the W&B run: marked as failed after a failure; a stop on request counts as
        success.
        """
        if self._run is not None:
            run, self._run = self._run, None
            try:
                self._finish(run, state, exit_code)
            except Exception as error:
                self._warn(
                    "W&B has not taken everything at the end of the run "
                    f"({type(error).__name__}: {error}); upload the rest with: "
                    f"wandb sync {_folder_of(run)}"
                )

    def _finish(self, run: Any, state: str, exit_code: int) -> None:
        try:
            run.summary[STATE] = state
            run.finish(exit_code=exit_code if state == "failed" else 0)
        finally:
            # Its service ends, and has written all it holds to the run's folder.
            self._wandb.teardown()

    def _open(self, options: dict[str, Any]) -> None:
        with self._temporary.used(), _redacted_command():
            self._run = self._wandb.init(
                mode=self.mode,
                resume="allow",
                reinit="finish_previous",
                save_code=False,
                settings=self._settings(),
                **options,
            )
        self._run.define_metric(X_AXIS)
        self._run.define_metric("*", step_metric=X_AXIS)
        self._run.summary[STATE] = "running"

    def _settings(self) -> Any:
        """Those of the wanted settings that this version of wandb knows."""
        wanted = dict(
            silent=True,
            console="off",
            init_timeout=_CONNECT_SECONDS,
            finish_timeout=_FINISH_SECONDS,
            finish_timeout_raises=True,
            x_transaction_log_flush_interval=_FLUSH_SECONDS,
        )
        known = self._wandb.Settings.model_fields
        return self._wandb.Settings(
            **{name: value for name, value in wanted.items() if name in known}
        )

    def _values(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Scalars as they are; a list with NAME_edges... beside it as a histogram over those edges,
        other lists over 0..n.
        """
        values = {}
        for name, value in record.items():
            if isinstance(value, (list, tuple)):
                if "_edges" not in name:
                    histogram = _histogram(record, name, value)
                    values[name] = self._wandb.Histogram(np_histogram=histogram)
            elif value is not None:
                values[name] = value
        return values

    def _attempt(self, action: Callable[[], Any]) -> bool:
        try:
            action()
        except Exception as error:  # any: W&B is a convenience, the run is not
            self._run = None
            self._warn(
                f"W&B failed and is off for the rest of this run: {type(error).__name__}: {error}"
            )
            return False
        return True


@contextlib.contextmanager
def _redacted_command() -> Iterator[None]:
    """wandb sends the command line with the run."""
    command = sys.argv
    sys.argv = redacted_values(command)
    try:
        yield
    finally:
        sys.argv = command


def _folder_of(run: Any) -> str:
    return shlex.quote(str(Path(run.dir).parent))


def wandb_run_id(run_folder: str | Path, checkpointed_id: str | None = None) -> str:
    """The W&B run id of a run folder: the checkpoint's, else the folder's, else a new one; kept in
    run_folder/wandb_run_id.

    With it a preempted run continues its W&B run instead of starting another.
    """
    path = Path(run_folder) / RUN_ID_FILE
    written = path.read_text().strip() if path.exists() else ""
    run_id = checkpointed_id or written or secrets.token_hex(4)
    if run_id != written:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(run_id + "\n")
    return run_id


def _histogram(record: Mapping[str, Any], name: str, heights: Any) -> tuple[Any, Any]:
    """Heights and edges, as numpy arrays; n heights have n + 1 edges."""
    import numpy as np

    edges = next((record[other] for other in record if other.startswith(name + "_edges")), None)
    usable = (
        edges is not None
        and len(edges) == len(heights) + 1
        and all(edge is not None and math.isfinite(edge) for edge in edges)
    )
    heights = [
        height if height is not None and math.isfinite(height) else 0.0 for height in heights
    ]
    return np.array(heights), np.array(edges if usable else range(len(heights) + 1), dtype=float)
