# syntax=docker/dockerfile:1.7
# megatron-slm on CUDA: NVIDIA's PyTorch image, NVIDIA's apex from its source, Transformer Engine as the image brings it, and this
# project installed around them without replacing any of the three. See docs/docker.md.
#
#   docker build -t megatron-slm .
#   docker build -t megatron-slm:core-0.16.1 --build-arg BASE_IMAGE=nvcr.io/nvidia/pytorch:25.11-py3 \
#       --build-arg MEGATRON_CORE=0.16.1 --build-arg APEX_COMMIT=87868b0e3a39c5f4364ac2d8131a7e63fce0f1a4 .
#   docker run --rm --gpus all --ipc=host --ulimit memlock=-1 -v "$PWD/runs:/work/runs" megatron-slm python -c "import torch; print(torch.cuda.is_available())"

# The image that megatron-core 0.19's own continuous integration is built on (its docker/.ngc_version.dev); that of 0.16.1 is 25.11.
ARG BASE_IMAGE=nvcr.io/nvidia/pytorch:26.06-py3
FROM ${BASE_IMAGE}

SHELL ["/bin/bash", "-euo", "pipefail", "-c"]

# The image's own /etc/pip/constraint.txt pins several hundred packages, some to other versions than ours; what must not move is
# recorded below and is our constraint instead.
ENV PIP_CONSTRAINT="" \
    PIP_BREAK_SYSTEM_PACKAGES=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1

# --- NVIDIA apex -------------------------------------------------------------------------------------------------------------------
# The last commit before the image was made. APEX_CPP_EXT and APEX_CUDA_EXT are its --cpp_ext and --cuda_ext: they build amp_C (fused optimizers,
# gradient clipping) and fused_weight_gradient_mlp_cuda (gradients accumulated straight into fp32 main gradients). `apex` on PyPI is
# another project and never asked for.
ARG APEX_COMMIT=becbb77cea4cb54f2929f7c938a0a6f7dd1fdc39
# Named unlike TORCH_CUDA_ARCH_LIST, which the base image sets: its ENV would win over an ARG of the same name.
ARG CUDA_ARCHITECTURES="8.0;9.0;10.0"
ARG BUILD_JOBS=8
RUN pip uninstall --yes apex \
    && git init --quiet /tmp/apex && cd /tmp/apex \
    && git fetch --quiet --depth 1 https://github.com/NVIDIA/apex.git "${APEX_COMMIT}" && git checkout --quiet FETCH_HEAD \
    && test "$(git rev-parse HEAD)" = "${APEX_COMMIT}" \
    && APEX_CPP_EXT=1 APEX_CUDA_EXT=1 TORCH_CUDA_ARCH_LIST="${CUDA_ARCHITECTURES}" APEX_PARALLEL_BUILD="${BUILD_JOBS}" MAX_JOBS="${BUILD_JOBS}" \
       pip install --verbose --no-deps --no-build-isolation . \
    && rm -rf /tmp/apex

# --- What pip must leave alone ------------------------------------------------------------------------------------------------------
COPY <<'EOF' /opt/slm/image_packages.py
"""Keeps pip away from the packages that the image compiled together: record them, install around them, check that nothing moved.

    record FOLDER CORE             constraints.txt and fingerprints.json of the packages below, as they are now; fails when
                                   Transformer Engine is not one that megatron-core CORE takes
    requirements FILE FOLDER CORE  FILE without the lines that name one of them, and with megatron-core CORE, for pip install -r
    check FOLDER                   fails, naming them, when versions or files differ from the record; then imports them
"""
import hashlib
import importlib
import importlib.metadata
import json
import re
import sys
from pathlib import Path

PROTECTED = re.compile(r"torch|torchvision|torchaudio|torchao|triton|pytorch[-_]triton|apex|transformer[-_]engine.*|flash[-_]attn.*|numpy|nvidia[-_].*")
REQUIRED = ("torch", "apex", "transformer-engine", "numpy")
MODULES = ("torch", "apex", "apex.optimizers", "apex.normalization", "amp_C", "fused_weight_gradient_mlp_cuda", "transformer_engine.pytorch")
# By megatron-core: the range in 0.16.1's own metadata. That of 0.19.2 states none (Megatron-LM's lock file for 0.19.0 has 2.17.1), so
# megatron-core itself is asked below whether it can import the image's.
TRANSFORMER_ENGINE = {"0.16.1": ((2, 9), (2, 12)), "0.19.2": ((2, 9), (3, 0))}


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def protected():
    found = {normal(d.metadata["Name"]): d for d in importlib.metadata.distributions() if d.metadata["Name"]}
    return {name: d for name, d in sorted(found.items()) if PROTECTED.fullmatch(name)}


def fingerprint(distribution):
    """sha256 over every installed file's path and content; compiled Python is made anew on import and left out."""
    total = hashlib.sha256()
    for path in sorted(distribution.files or [], key=str):
        located = Path(distribution.locate_file(path))
        if path.suffix != ".pyc" and located.is_file():
            total.update(str(path).encode() + b"\0" + hashlib.sha256(located.read_bytes()).digest())
    return total.hexdigest()


def record(folder, core):
    core = str(core)
    if core not in TRANSFORMER_ENGINE:
        sys.exit(f"MEGATRON_CORE is {core!r}; it can be {' or '.join(TRANSFORMER_ENGINE)}")
    lowest, above = TRANSFORMER_ENGINE[core]
    there = protected()
    missing = [name for name in REQUIRED if name not in there]
    if missing:
        sys.exit(f"the image lacks {', '.join(missing)}")
    engine = tuple(int(part) for part in re.findall(r"\d+", there["transformer-engine"].version)[:2])
    if not lowest <= engine < above:
        accepted = ">={}.{},<{}.{}".format(*lowest, *above)
        sys.exit(f"Transformer Engine {there['transformer-engine'].version} is outside {accepted}, which goes with megatron-core {core}; take another base image")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "constraints.txt").write_text("".join(f"{name}=={d.version}\n" for name, d in there.items()))
    (folder / "fingerprints.json").write_text(json.dumps({name: [d.version, fingerprint(d)] for name, d in there.items()}, indent=1))
    print((folder / "constraints.txt").read_text(), end="")


def requirements(source, folder, core):
    """Our pins without the image's packages: `torch==...` would contradict the constraint, and pip would stop."""
    kept = [f"megatron-core=={core}"]
    for line in source.read_text().splitlines():
        name = re.match(r"[A-Za-z0-9._-]+", line)
        if not (name and (normal(name[0]) == "megatron-core" or PROTECTED.fullmatch(normal(name[0])))):
            kept.append(line)
    (folder / "requirements.txt").write_text("\n".join(kept) + "\n")


def check(folder):
    recorded = json.loads((folder / "fingerprints.json").read_text())
    now = protected()
    moved = [f"{name} {version} -> {now[name].version if name in now else 'gone'}" for name, (version, _) in recorded.items()
             if name not in now or now[name].version != version]
    changed = [name for name, (_, digest) in recorded.items() if name in now and fingerprint(now[name]) != digest]
    if moved or changed:
        sys.exit(f"the installation replaced packages of the image: versions {moved}, files {changed}")
    for module in MODULES:
        importlib.import_module(module)
    print("unchanged and importable:", ", ".join(f"{name} {version}" for name, (version, _) in recorded.items() if name in REQUIRED))


if __name__ == "__main__":
    command, *paths = sys.argv[1:]
    {"record": record, "requirements": requirements, "check": check}[command](*map(Path, paths))
EOF
# Which megatron-core is installed: 0.19.2 or 0.16.1.
ARG MEGATRON_CORE=0.19.2
RUN python /opt/slm/image_packages.py record /opt/slm "${MEGATRON_CORE}"

# --- This project -------------------------------------------------------------------------------------------------------------------
# Dependencies first: their layer is kept while only our own code changes.
COPY constraints.txt requirements/ /opt/slm/wanted/
RUN cat /opt/slm/wanted/*.txt > /opt/slm/wanted.txt \
    && python /opt/slm/image_packages.py requirements /opt/slm/wanted.txt /opt/slm "${MEGATRON_CORE}" \
    && pip install --requirement /opt/slm/requirements.txt --constraint /opt/slm/constraints.txt \
    && python /opt/slm/image_packages.py check /opt/slm

COPY . /opt/megatron-slm
RUN pip install --no-deps --editable /opt/megatron-slm \
    && python /opt/slm/image_packages.py check /opt/slm \
    && cd / && python -c "import megatron_slm; from megatron_slm.accelerations import apex_state; assert apex_state() == 'nvidia', apex_state()" \
    && python -c "from megatron.core.extensions.transformer_engine import HAVE_TE; assert HAVE_TE, 'megatron-core cannot use this Transformer Engine'" \
    && slm-train --help > /dev/null

# tokenizer/ and data_tools/ are run from the checkout, not installed.
ENV PYTHONPATH=/opt/megatron-slm \
    CUDA_DEVICE_MAX_CONNECTIONS=1

ARG USER_ID=10001
RUN useradd --create-home --uid "${USER_ID}" --shell /bin/bash slm && install --directory --owner=slm /work
USER slm
WORKDIR /work
CMD ["bash"]
