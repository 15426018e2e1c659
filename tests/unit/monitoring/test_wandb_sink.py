"""An offline W&B run is really written; a broken W&B is one warning."""

from types import MappingProxyType, SimpleNamespace

import pytest

from megatron_slm.config.monitoring_settings import WandbConfig
from megatron_slm.monitoring import WandbSink, wandb_loading, wandb_run_id, wandb_sink
from megatron_slm.monitoring.wandb_server import choose_mode


@pytest.fixture(autouse=True)
def quiet_wandb(tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_RUN_ID", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb_config"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")


def test_an_offline_run_is_written_and_a_resumed_one_has_the_same_id(tmp_path, capfd):
    folder = tmp_path / "run"
    warnings = []
    for _ in range(2):
        sink = WandbSink(
            WandbConfig(mode="offline"),
            run_folder=folder,
            name="arm",
            run_id=wandb_run_id(folder),
            warn=warnings.append,
            config={"selection": {"keep_fraction": 0.6}, "layout": {"data": 2}},
        )
        sink.log(
            {
                "kind": "train",
                "tokens/processed": 128,
                "loss/all": 3.5,
                "missing": None,
                "selection/rate_by_reference_loss": [0.5, float("nan")],
                "selection/rate_by_reference_loss_edges_nats": [0.0, 1.0, 2.0],
            },
            2,
        )
        sink.close()
    records = list((folder / "wandb").glob("offline-run-*/*.wandb"))
    assert {path.stem for path in records} == {f"run-{wandb_run_id(folder)}"}
    content = b"".join(path.read_bytes() for path in records)
    assert b"loss/all" in content
    assert b"keep_fraction" in content
    assert b"tokens/processed" in content
    assert warnings == []
    output = capfd.readouterr()
    assert "wandb" not in output.out + output.err


class FakeRun:
    url, dir = "https://wandb.example.org/arm", "runs/my run/wandb/offline-run-1/files"

    def __init__(self):
        self.calls, self.summary, self.finished_with = 0, {}, None

    def define_metric(self, *args, **kwargs):
        pass

    def log(self, values):
        self.calls += 1
        raise ConnectionError("server gone")

    def finish(self, exit_code):
        self.finished_with = exit_code


class Settings(SimpleNamespace):
    """As of a version of wandb that knows none of the newer settings."""

    model_fields = MappingProxyType({"silent": None, "console": None})


class FakeWandb:
    """The part of wandb that the sink calls, failing as told; something answers at its address."""

    Settings = Settings

    def __init__(self, online_fails=False):
        self.run, self.modes, self.online_fails = FakeRun(), [], online_fails
        self.busy = False

    def setup(self, settings):
        known = SimpleNamespace(base_url="http://localhost", http_proxy=None, https_proxy=None)
        return SimpleNamespace(settings=known)

    def teardown(self):
        self.busy = False

    def init(self, *, mode, **options):
        self.modes.append(mode)
        assert not self.busy, "run ID abc is in use"
        if mode == "online" and self.online_fails:
            self.busy = True
            raise TimeoutError("no route")
        return self.run


@pytest.fixture
def use(monkeypatch):
    """Put a FakeWandb in wandb's place."""

    def used(fake):
        monkeypatch.setattr(wandb_loading, "load_wandb", lambda: fake)
        monkeypatch.setattr(wandb_sink, "unreachable", lambda *_: "")
        return fake

    return used


def open_sink(tmp_path, warnings, mode="online"):
    return WandbSink(
        WandbConfig(mode=mode),
        run_folder=tmp_path,
        name="arm",
        config={},
        run_id="abc",
        warn=warnings.append,
    )


def test_a_failure_while_logging_is_one_warning_then_silence(tmp_path, use):
    fake, warnings = use(FakeWandb()), []
    sink = open_sink(tmp_path, warnings)
    for step in range(3):
        sink.log({"loss/all": 1.0}, step)
    sink.message("x", "warning")
    sink.close()
    assert len(warnings) == 1
    assert "server gone" in warnings[0]
    assert fake.run.calls == 1


def test_where_the_run_is(tmp_path, use):
    fake = use(FakeWandb())
    assert open_sink(tmp_path, []).location == "https://wandb.example.org/arm"
    offline = open_sink(tmp_path, [], mode="offline").location
    assert offline == f"offline; upload it with: wandb sync '{fake.run.dir.removesuffix('/files')}'"
    use(None)
    assert open_sink(tmp_path, []).location == "off"


@pytest.mark.parametrize(
    ("state", "exit_code", "finished_with"), [("done", 0, 0), ("stopped", 85, 0), ("failed", 4, 4)]
)
def test_the_end_of_the_run_is_told(state, exit_code, finished_with, tmp_path, use):
    fake = use(FakeWandb())
    sink = open_sink(tmp_path, [])
    assert fake.run.summary == {"run/state": "running"}
    sink.close(state, exit_code)
    assert fake.run.summary == {"run/state": state}
    assert fake.run.finished_with == finished_with


def test_an_unreachable_server_falls_back_to_offline(tmp_path, use):
    fake, warnings = use(FakeWandb(online_fails=True)), []
    sink = open_sink(tmp_path, warnings)
    assert fake.modes == ["online", "offline"]
    assert sink.mode == "offline"
    assert len(warnings) == 1
    assert "wandb sync" in warnings[0]


def _not_installed():
    raise ModuleNotFoundError("No module named 'wandb'")


def test_wandb_not_installed_is_one_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(wandb_loading, "load_wandb", _not_installed)
    warnings = []
    open_sink(tmp_path, warnings).log({"loss/all": 1.0}, 1)
    assert len(warnings) == 1
    assert open_sink(tmp_path, warnings, mode="disabled")
    assert len(warnings) == 1, "disabled does not import wandb"


def test_mode(tmp_path, monkeypatch):
    netrc_file = tmp_path / "some_netrc"
    environment = {"NETRC": str(netrc_file)}
    assert choose_mode("auto", environment) == "offline"
    assert choose_mode("auto", environment | {"WANDB_API_KEY": "k"}) == "online"
    assert (
        choose_mode("auto", environment | {"WANDB_API_KEY": "k", "WANDB_MODE": "offline"})
        == "offline"
    )
    assert choose_mode("online", environment | {"WANDB_MODE": "offline"}) == "online"
    netrc_file.write_text("machine api.wandb.ai login user password secret\n")
    netrc_file.chmod(0o600)
    assert choose_mode("auto", environment) == "online"
    assert (
        choose_mode("auto", environment | {"WANDB_BASE_URL": "https://wandb.example.org"})
        == "offline"
    )


def test_run_id_is_kept_and_the_checkpoint_wins(tmp_path):
    first = wandb_run_id(tmp_path)
    assert wandb_run_id(tmp_path) == first
    assert wandb_run_id(tmp_path, checkpointed_id="fromckpt") == "fromckpt"
    assert wandb_run_id(tmp_path) == "fromckpt"
