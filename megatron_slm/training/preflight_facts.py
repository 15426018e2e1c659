"""What a process knows of itself and its machine, for the comparisons of preflight.py."""

import hashlib
import importlib.metadata
import os
import platform
import re
import socket
import time
from pathlib import Path

import torch

import megatron_slm
from megatron_slm.config.load import to_yaml
from megatron_slm.config.schema import Config
from megatron_slm.parallel import Groups
from megatron_slm.training.preflight import Facts
from megatron_slm.training.preflight_files import size_of

SEEN_SECONDS = 10.0
"""How long a new file may stay unseen on another node: NFS caches a folder for some seconds."""


def facts(config: Config, groups: Groups, paths: list[str], new_file: str) -> Facts:
    """What this process knows of itself and its machine.

    paths: files to look for. new_file: what rank 0 has just written ("" = nothing).
    """
    device, device_id, total_bytes, taken_bytes = _device(groups.device)
    digest = hashlib.sha256(to_yaml(config).encode()).hexdigest()[:12]
    return Facts(
        groups.world_rank,
        socket.gethostname(),
        device,
        device_id,
        total_bytes,
        taken_bytes,
        time.time(),
        versions(groups.device) | {"settings": digest},
        {path: size_of(path) for path in paths},
        not new_file or _appears(Path(new_file)),
    )


def versions(device: torch.device) -> dict[str, str]:
    """Versions of what must or should be the same on all nodes."""
    found = {
        "megatron-slm": f"{megatron_slm.__version__}, {_source_digest()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": importlib.metadata.version("numpy"),
    }
    for package in ("megatron-core", "transformer-engine"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    if device.type == "cuda":
        found["CUDA"] = str(torch.version.cuda)
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
        found["driver"] = _driver()
    return found


def _appears(path: Path) -> bool:
    until = time.monotonic() + SEEN_SECONDS
    while not path.exists() and time.monotonic() < until:
        time.sleep(0.2)
    return path.exists()


def _device(device: torch.device) -> tuple[str, str, int, int]:
    """Kind and name, which one of its host, its bytes, and those taken."""
    if device.type == "cuda":
        free_bytes, total_bytes = torch.cuda.mem_get_info(device)
        properties = torch.cuda.get_device_properties(device)
        device_id = str(getattr(properties, "uuid", device.index))
        taken_bytes = total_bytes - free_bytes
        return f"cuda {properties.name}", device_id, total_bytes, taken_bytes
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return "cpu", "", _machine_bytes() // processes, 0


def _machine_bytes() -> int:
    """Memory of this machine, or what its control group allows."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        return min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no such control group, or "max"
        return total


def _driver() -> str:
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return "unknown"
    found = re.search(r"Kernel Module\s+(?:for \S+\s+)?([\d.]+)", text)
    return found[1] if found else "unknown"


def _source_digest() -> str:
    """Of the names and sizes of the library's files: another checkout has another digest."""
    root = Path(megatron_slm.__file__).parent
    files = sorted(
        (str(path.relative_to(root)), path.stat().st_size) for path in root.rglob("*.py")
    )
    return "source " + hashlib.sha256(repr(files).encode()).hexdigest()[:12]
