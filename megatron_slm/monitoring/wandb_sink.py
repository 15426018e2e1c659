"""Weights & Biases as a sink: imported only when used, one run per training run, and never able to stop training.

The API key is read by wandb itself, from WANDB_API_KEY or the netrc file; it is no setting and is written nowhere.
"""

import math
import netrc
import os
import secrets
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from megatron_slm.config.schema import WandbConfig

RUN_ID_FILE = "wandb_run_id"
X_AXIS = "tokens/processed"
STATE = "run/state"
"""Name in the run's summary: running, done, stopped or failed. W&B's own state knows no stop that is to be continued."""
_CONNECT_SECONDS = 45
_FINISH_SECONDS = 60


class WandbSink:
    """Logs to one W&B run, against tokens/processed, whatever happens to the network.

    A failure of W&B is reported once through `warn` and the sink is silent from then on. Where the server cannot be
    reached at the start, the run is written offline. Steps repeated after a resume are logged again with the same x value.
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
        """config: the resolved config and parallel sizes, as nested dicts. warn: where the one warning goes."""
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
            config=dict(config),
            project=settings.project,
            entity=settings.entity or None,
            group=settings.group or None,
            tags=settings.tags or None,
        )
        if not self._attempt(_import_wandb, last=True):
            return
        if (
            not self._attempt(lambda: self._open(options), last=self.mode == "offline")
            and self.mode == "online"
        ):
            self.mode = "offline"
            self._warn(
                "W&B could not be reached, this run is written offline; `wandb sync` uploads it later"
            )
            self._attempt(lambda: self._open(options), last=True)

    @property
    def location(self) -> str:
        """Where the W&B run is: its address, or the folder of an offline run and how to upload it."""
        if self._run is None:
            return "off"
        if self.mode == "offline":
            return f"offline; upload it with: wandb sync {shlex.quote(str(Path(self._run.dir).parent))}"
        return self._run.url

    def log(self, record: Mapping[str, Any], step: int) -> None:
        if self._run is not None:
            self._attempt(lambda: self._run.log({"step": step} | _for_wandb(record)), last=True)

    def message(self, text: str, level: str = "info") -> None:
        if self._run is not None and level != "info":
            self._attempt(lambda: self._run.alert(title=level, text=text), last=True)

    def close(self, state: str = "done", exit_code: int = 0) -> None:
        """Finish the W&B run: crossed out there after a failure; a stop on request is an end in good order."""
        if self._run is not None:
            self._attempt(lambda: self._finish(state, exit_code), last=True)
            self._run = None

    def _finish(self, state: str, exit_code: int) -> None:
        self._run.summary[STATE] = state
        self._run.finish(exit_code=exit_code if state == "failed" else 0)

    def _open(self, options: dict[str, Any]) -> None:
        wandb = _import_wandb()
        settings = wandb.Settings(
            silent=True,
            console="off",
            init_timeout=_CONNECT_SECONDS,
            finish_timeout=_FINISH_SECONDS,
        )
        self._run = wandb.init(
            mode=self.mode,
            resume="allow",
            reinit="finish_previous",
            save_code=False,
            settings=settings,
            **options,
        )
        self._run.define_metric(X_AXIS)
        self._run.define_metric("*", step_metric=X_AXIS)
        self._run.summary[STATE] = "running"

    def _attempt(self, action: Callable[[], Any], last: bool) -> bool:
        try:
            action()
        except Exception as error:  # any: W&B is a convenience, the run is not
            if last:
                self._run = None
                self._warn(
                    f"W&B failed and is off for the rest of this run: {type(error).__name__}: {error}"
                )
            return False
        return True


def _import_wandb() -> Any:
    import wandb

    return wandb


def choose_mode(mode: str, environment: Mapping[str, str] | None = None) -> str:
    """auto = WANDB_MODE where it is set, else online when there is an API key (WANDB_API_KEY or netrc), else offline."""
    environment = os.environ if environment is None else environment
    if mode != "auto":
        return mode
    if environment.get("WANDB_MODE") in ("online", "offline", "disabled"):
        return environment["WANDB_MODE"]
    return "online" if _has_api_key(environment) else "offline"


def _has_api_key(environment: Mapping[str, str]) -> bool:
    if environment.get("WANDB_API_KEY"):
        return True
    host = urlsplit(environment.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname
    candidates = (
        [environment["NETRC"]]
        if environment.get("NETRC")
        else [Path.home() / ".netrc", Path.home() / "_netrc"]
    )
    for path in candidates:
        try:
            if host and netrc.netrc(str(path)).authenticators(host):
                return True
        except (
            OSError,
            netrc.NetrcParseError,
        ):  # absent, unreadable or malformed: as good as no key
            continue
    return False


def wandb_run_id(run_folder: str | Path, checkpointed_id: str | None = None) -> str:
    """The W&B run id of a run folder: the checkpoint's, else the folder's, else a new one; kept in run_folder/wandb_run_id.

    With it a preempted run continues its W&B run instead of starting another.
    """
    path = Path(run_folder) / RUN_ID_FILE
    written = path.read_text().strip() if path.exists() else ""
    run_id = checkpointed_id or written or secrets.token_hex(4)
    if run_id != written:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(run_id + "\n")
    return run_id


def _for_wandb(record: Mapping[str, Any]) -> dict[str, Any]:
    """Scalars as they are; a list with NAME_edges... beside it as a histogram over those edges, other lists over 0..n."""
    values: dict[str, Any] = {}
    for name, value in record.items():
        if isinstance(value, (list, tuple)):
            if "_edges" not in name:
                values[name] = _histogram(record, name, value)
        elif value is not None:
            values[name] = value
    return values


def _histogram(record: Mapping[str, Any], name: str, heights: Any) -> Any:
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
    return _import_wandb().Histogram(
        np_histogram=(
            np.array(heights),
            np.array(edges if usable else range(len(heights) + 1), dtype=float),
        )
    )
