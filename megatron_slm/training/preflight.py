"""What is found out about a job before it trains: pure comparisons of the facts of its processes.

This module queries no machine and needs no torch: preflight_files.py looks at files and disks,
preflight_job.py at the devices and the network of the processes that have joined.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

FINE = "ok"
WARNING = "warning"
BAD_SETTINGS = "settings"
BAD_DATA = "data"
"""States of a finding. The last two end the run before it begins, with exit codes 2 and 3."""
MUST_AGREE = (
    "megatron-slm",
    "torch",
    "megatron-core",
    "transformer-engine",
    "CUDA",
    "NCCL",
    "settings",
)
"""Processes that differ in one of these compute different things, or cannot talk to each other."""
CLOCK_SECONDS = 2.0
"""How far clocks may be apart: the times of logs, locks and the watchdog's files are compared."""
FOREIGN_FRACTION = 0.1
"""Of a GPU's memory that is taken before the run allocates anything; a CUDA context takes less."""
SLOW_FRACTION = 0.5
"""A group is slow if its bandwidth is below this fraction of the other groups' of its kind."""
HOSTS_SHOWN = 4


@dataclass(frozen=True)
class Finding:
    """One line of the page: what was checked, its state, and the result or the advice."""

    check: str
    state: str
    sentence: str


class PreflightFailed(ValueError):
    """The job cannot run as it is; every process raises this at the same place."""

    def __init__(self, findings: Sequence[Finding]):
        fatal = [each for each in findings if each.state in (BAD_SETTINGS, BAD_DATA)]
        self.exit_code = 2 if any(each.state == BAD_SETTINGS for each in fatal) else 3
        count = f"{len(fatal)} problems" if len(fatal) > 1 else "1 problem"
        super().__init__(
            f"{count} found before the start:\n"
            + "\n".join(f"  - {each.check}: {each.sentence}" for each in fatal)
        )


@dataclass(frozen=True)
class Facts:
    """What one process knows of itself and its machine."""

    rank: int
    host: str
    device: str
    """Kind and name: "cpu", "cuda NVIDIA H100 80GB HBM3"."""
    device_id: str
    """Which device of its host: two processes must not share a GPU. Empty for a CPU."""
    device_bytes: int
    """Memory of the device; for a CPU, this process's share of the machine's."""
    taken_bytes: int
    """Of it, what is taken before the run allocates anything."""
    clock_seconds: float
    """Seconds since 1970 by its host's clock, read by all processes at one moment."""
    versions: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, int] = field(default_factory=dict)
    """Bytes of the files that every host must see, -1 = missing; looked up once per host."""
    sees_run_folder: bool = True
    """Whether a file that rank 0 has just written into the run folder is there."""


def raise_if_fatal(findings: Sequence[Finding]) -> None:
    """PreflightFailed where one of the findings is fatal."""
    if any(each.state in (BAD_SETTINGS, BAD_DATA) for each in findings):
        raise PreflightFailed(findings)


def warning_messages(findings: Sequence[Finding]) -> list[tuple[str, str]]:
    """The findings that go to every sink, as (text, level)."""
    return [
        (f"preflight, {each.check}: {each.sentence}", "warning")
        for each in findings
        if each.state == WARNING
    ]


def compare(everyone: Sequence[Facts]) -> list[Finding]:
    """The findings from the facts of all processes, which are in the order of their ranks."""
    return [*_versions(everyone), *_devices(everyone), _clocks(everyone), *_files(everyone)]


def slow_groups(measured: Mapping[str, Mapping[tuple[int, ...], float]]) -> list[Finding]:
    """One finding per kind of group. measured: bytes per second of each group, by its ranks."""
    findings = []
    for kind, rates in measured.items():
        usual = median(rates.values())
        ranks, slowest = min(rates.items(), key=lambda each: each[1])
        state = FINE
        sentence = f"{len(rates)} x {len(ranks)} processes, {usual / 1e9:.3g} GB/s"
        if slowest < SLOW_FRACTION * usual:
            state = WARNING
            sentence += (
                f" in the middle, but ranks {list(ranks)} have {slowest / 1e9:.3g} GB/s: the whole "
                "job waits for them. Look at the links of their nodes, or leave those out"
            )
        findings.append(Finding(f"group {kind}", state, sentence))
    return findings


def memory(state_bytes: int, peak_bytes: int, everyone: Sequence[Facts]) -> Finding:
    """Whether the plan fits the smallest device.

    state_bytes: weights, gradients and optimizer, which are known exactly. peak_bytes: those, and
    activations and buffers, which are predicted.
    """
    smallest = min(everyone, key=lambda facts: facts.device_bytes)
    sizes = (
        f"{describe_size(peak_bytes)} at the peak of the fullest process "
        f"({describe_size(state_bytes)} of it weights, gradients and optimizer), and the device of "
        f"rank {smallest.rank} on {smallest.host} has {describe_size(smallest.device_bytes)}"
    )
    layouts = "python -m megatron_slm.plan with the same settings shows layouts that fit"
    if state_bytes > smallest.device_bytes:
        return Finding("memory", BAD_SETTINGS, f"{sizes}: this cannot fit; {layouts}")
    if peak_bytes > smallest.device_bytes:
        return Finding("memory", WARNING, f"{sizes}: it will probably not fit; {layouts}")
    return Finding("memory", FINE, sizes)


def _versions(everyone: Sequence[Facts]) -> list[Finding]:
    differing = []
    same = []
    names = dict.fromkeys(name for facts in everyone for name in facts.versions)
    of_hosts = [(facts.host, facts.versions) for facts in everyone if facts.versions]
    for name in names:
        hosts = _hosts_by((host, versions.get(name, "not there")) for host, versions in of_hosts)
        if len(hosts) > 1:
            differing.append(_differing_version(name, hosts))
        elif name != "settings":
            same.append(f"{name} {next(iter(hosts))}")
    nodes = len({facts.host for facts in everyone})
    where = f" on {nodes} nodes" if nodes > 1 else ""
    agreement = Finding("versions", FINE, f"{', '.join(same) or 'none in common'}{where}")
    return [agreement, *differing]


def _differing_version(name: str, hosts: Mapping[str, Sequence[str]]) -> Finding:
    state = WARNING
    advice = "This is known to work mostly; the same on all is better"
    if name in MUST_AGREE:
        state = BAD_SETTINGS
        advice = (
            "Start all from one installation and one configuration file on a shared file system"
        )
    check = name if name == "settings" else f"version of {name}"
    return Finding(check, state, f"differs between nodes: {_by_host(hosts)}. {advice}")


def _devices(everyone: Sequence[Facts]) -> list[Finding]:
    return [_kinds_of_devices(everyone), *_shared_devices(everyone), *_taken_devices(everyone)]


def _kinds_of_devices(everyone: Sequence[Facts]) -> Finding:
    hosts = _hosts_by((facts.host, facts.device) for facts in everyone)
    if len({name.split()[0] for name in hosts}) > 1:
        return Finding(
            "devices",
            BAD_SETTINGS,
            f"some processes have a GPU and others none: {_by_host(hosts)}. Look at the driver "
            "there, or set device.kind to cpu",
        )
    if len(hosts) > 1:
        different = f"the nodes have different ones: {_by_host(hosts)}; the slowest sets the pace"
        return Finding("devices", WARNING, different)
    return Finding("devices", FINE, f"{len(everyone)} x {next(iter(hosts))}")


def _shared_devices(everyone: Sequence[Facts]) -> list[Finding]:
    """One finding for each GPU that several processes have."""
    owners = defaultdict(list)
    for facts in everyone:
        if facts.device_id:
            owners[facts.host, facts.device_id].append(facts.rank)
    return [
        Finding(
            "devices",
            BAD_SETTINGS,
            f"ranks {ranks} on {host} share GPU {device_id}: start one process per GPU, and look "
            "at CUDA_VISIBLE_DEVICES and at srun's --gpu-bind",
        )
        for (host, device_id), ranks in owners.items()
        if len(ranks) > 1
    ]


def _taken_devices(everyone: Sequence[Facts]) -> list[Finding]:
    """One finding for each device on which other processes hold much of the memory."""
    return [
        Finding(
            "devices",
            WARNING,
            f"{describe_size(facts.taken_bytes)} of {describe_size(facts.device_bytes)} on the "
            f"device of rank {facts.rank} ({facts.host}) are taken by somebody else (nvidia-smi "
            "shows by whom)",
        )
        for facts in everyone
        if facts.taken_bytes > FOREIGN_FRACTION * facts.device_bytes
    ]


def _clocks(everyone: Sequence[Facts]) -> Finding:
    earliest = min(everyone, key=lambda facts: facts.clock_seconds)
    latest = max(everyone, key=lambda facts: facts.clock_seconds)
    apart = latest.clock_seconds - earliest.clock_seconds
    if apart <= CLOCK_SECONDS:
        return Finding("clocks", FINE, f"at most {apart:.2g} s apart")
    return Finding(
        "clocks",
        WARNING,
        f"that of {latest.host} is {apart:.1f} s ahead of that of {earliest.host}: times in logs "
        "and of files cannot be compared. Set the clocks (chrony or ntpd)",
    )


def _files(everyone: Sequence[Facts]) -> list[Finding]:
    findings = []
    if blind := list(dict.fromkeys(facts.host for facts in everyone if not facts.sees_run_folder)):
        findings.append(
            Finding(
                "run folder",
                BAD_SETTINGS,
                f"what {everyone[0].host} writes there is not seen on {_some(blind)}: give a "
                "run.folder on a file system that all nodes share",
            )
        )
    looked = [facts for facts in everyone if facts.files]
    if looked:
        findings += _differing_files(looked[0], looked[1:])
    if findings or not looked:
        return findings
    nodes = len({facts.host for facts in looked})
    count = f"{len(looked[0].files)} files are the same size on {nodes} node{'s' * (nodes > 1)}"
    return [Finding("files on every node", FINE, count)]


def _differing_files(first: Facts, other_facts: Sequence[Facts]) -> list[Finding]:
    """One finding for each file that another node sees in another size, or not at all."""
    findings = []
    for path, size in first.files.items():
        sizes = [(facts.host, facts.files.get(path, -1)) for facts in other_facts]
        hosts = _hosts_by((host, _exact_size(seen)) for host, seen in sizes if seen != size)
        if hosts:
            findings.append(
                Finding(
                    "files on every node",
                    BAD_DATA,
                    f"{path} is {_exact_size(size)} on {first.host}, but {_by_host(hosts)}. Put it "
                    "on a file system that all nodes share",
                )
            )
    return findings


def _hosts_by(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """The hosts of each value, from (host, value) pairs of processes."""
    hosts: dict[str, list[str]] = defaultdict(list)
    for host, value in pairs:
        if host not in hosts[value]:
            hosts[value].append(host)
    return dict(hosts)


def _by_host(hosts: Mapping[str, Sequence[str]]) -> str:
    return "; ".join(f"{value} on {_some(names)}" for value, names in hosts.items())


def _some(hosts: Sequence[str]) -> str:
    more = len(hosts) - HOSTS_SHOWN
    return ", ".join(hosts[:HOSTS_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _exact_size(size_bytes: int) -> str:
    return "not there" if size_bytes < 0 else f"{size_bytes} bytes"


def describe_size(size_bytes: float) -> str:
    """The size for a person: 12.3 GB."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if size_bytes >= size:
            return f"{size_bytes / size:.3g} {unit}"
    return f"{size_bytes / 1e3:.3g} kB"
