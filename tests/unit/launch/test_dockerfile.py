"""The Dockerfile as text, and its helper as a program: no Docker engine is needed to see that
nothing can replace the image's packages.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_slm.core_versions import SUPPORTED
from tests.megatron_core import INSTALLED

ROOT = Path(__file__).parents[3]
TEXT = (ROOT / "Dockerfile").read_text()
HEREDOC = re.search(r"COPY <<'EOF' /opt/slm/image_packages\.py\n(.*?)\nEOF\n", TEXT, re.DOTALL)


def instructions() -> list[tuple[str, str]]:
    """(instruction, arguments) in order, comments and the helper's text left out, continued lines
    joined.
    """
    text = TEXT.replace(HEREDOC[1], "")
    lines = (
        "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
        .replace("\\\n", " ")
        .splitlines()
    )
    found = [line.split(None, 1) for line in lines if re.match(r"[A-Z]+ ", line)]
    return [(name, " ".join(arguments.split())) for name, arguments in found]


def position(fragment: str) -> int:
    [index] = [i for i, (_, arguments) in enumerate(instructions()) if fragment in arguments]
    return index


def test_everything_fetched_is_pinned():
    assert instructions()[1] == ("FROM", "${BASE_IMAGE}")
    name, base = instructions()[0]
    assert name == "ARG"
    assert re.fullmatch(r"BASE_IMAGE=nvcr\.io/nvidia/pytorch:\d\d\.\d\d-py3", base)
    assert re.search(r"ARG APEX_COMMIT=[0-9a-f]{40}\n", TEXT)
    assert TEXT.count("git fetch") == 1
    assert 'https://github.com/NVIDIA/apex.git "${APEX_COMMIT}"' in TEXT
    assert 'test "$(git rev-parse HEAD)" = "${APEX_COMMIT}"' in TEXT
    assert "latest" not in base
    assert not [name for name, _ in instructions() if name == "ADD"]


def test_apex_is_nvidias_with_its_cuda_extensions():
    run = instructions()[position("pip uninstall --yes apex")][1]
    assert "APEX_CPP_EXT=1 APEX_CUDA_EXT=1" in run
    assert "--no-build-isolation" in run
    assert "ARG TORCH_CUDA_ARCH_LIST" not in TEXT  # the base image's ENV of that name would win
    # pip is never asked for the name `apex`, which on PyPI is another project.
    assert not re.search(
        r"pip install[^&]*\sapex\b", " ".join(arguments for _, arguments in instructions())
    )


def test_order_record_install_check():
    order = [
        position("pip uninstall --yes apex"),
        position("image_packages.py record"),
        position("--constraint /opt/slm/constraints.txt"),
        position("--editable /opt/megatron-slm"),
    ]
    assert order == sorted(order)
    for step in order[2:]:
        assert "image_packages.py check /opt/slm" in instructions()[step][1]
    assert "--no-deps" in instructions()[order[3]][1]


def test_no_install_escapes_the_constraint():
    for name, arguments in instructions():
        for command in re.findall(r"pip install[^&]*", arguments) if name == "RUN" else []:
            assert "--no-deps" in command or "--constraint" in command, command
            assert "--upgrade" not in command
            assert "--ignore-installed" not in command
            assert "--force" not in command


def test_the_container_does_not_run_as_root():
    users = [arguments for name, arguments in instructions() if name == "USER"]
    assert users == ["slm"]
    after = [name for name, _ in instructions()[position("useradd") :]]
    assert after == ["RUN", "USER", "WORKDIR", "CMD"]


def test_shell_steps_stop_at_the_first_failure():
    assert ("SHELL", '["/bin/bash", "-euo", "pipefail", "-c"]') in instructions()
    for name, arguments in instructions():
        if name == "RUN":
            subprocess.run(["bash", "-n", "-c", arguments], check=True)


@pytest.fixture
def helper(tmp_path):
    path = tmp_path / "image_packages.py"
    path.write_text(HEREDOC[1])
    return path


def call(helper: Path, *arguments, site: Path | None = None) -> subprocess.CompletedProcess:
    """With `site` the helper sees only the packages there."""
    start = [sys.executable, "-I", helper]
    if site is not None:
        code = (
            "import sys, runpy; sys.path[:] = [p for p in sys.path if 'site-packages' not in p] "
            f"+ [{str(site)!r}]; sys.argv = {['x', *map(str, arguments)]!r}; "
            f"runpy.run_path({str(helper)!r}, run_name='__main__')"
        )
        return subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True)
    return subprocess.run([*start, *map(str, arguments)], capture_output=True, text=True)


def install(site: Path, name: str, version: str, files: dict[str, str]) -> None:
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    for path, content in files.items():
        (site / path).parent.mkdir(parents=True, exist_ok=True)
        (site / path).write_text(content)
    (info / "RECORD").write_text("".join(f"{path},,\n" for path in files))


@pytest.fixture
def image(tmp_path) -> Path:
    """A site-packages that looks like the base image's after apex was built."""
    site = tmp_path / "site"
    install(site, "torch", "2.10.0a0+b558c98", {"torch/__init__.py": "compiled = 1\n"})
    install(site, "numpy", "1.26.4", {"numpy/__init__.py": ""})
    install(
        site,
        "apex",
        "0.1",
        {
            "apex/__init__.py": "",
            "apex/optimizers/__init__.py": "",
            "apex/normalization/__init__.py": "",
            "amp_C.py": "",
            "fused_weight_gradient_mlp_cuda.py": "",
        },
    )
    install(
        site,
        "transformer_engine",
        "2.9.0+70f5366",
        {"transformer_engine/__init__.py": "", "transformer_engine/pytorch/__init__.py": ""},
    )
    install(site, "nvidia-nccl-cu13", "2.28.8", {"nvidia_nccl.py": ""})
    install(site, "requests", "2.0", {"requests.py": ""})
    return site


def test_record_and_check_accept_an_untouched_image(helper, image, tmp_path):
    recorded = call(helper, "record", tmp_path / "slm", "0.16.1", site=image)
    assert recorded.returncode == 0, recorded.stderr
    assert (tmp_path / "slm" / "constraints.txt").read_text().splitlines() == [
        "apex==0.1",
        "numpy==1.26.4",
        "nvidia-nccl-cu13==2.28.8",
        "torch==2.10.0a0+b558c98",
        "transformer-engine==2.9.0+70f5366",
    ]
    checked = call(helper, "check", tmp_path / "slm", site=image)
    assert checked.returncode == 0, checked.stderr
    assert "torch 2.10.0a0+b558c98" in checked.stdout


def test_check_names_what_was_replaced(helper, image, tmp_path):
    call(helper, "record", tmp_path / "slm", "0.16.1", site=image)
    (image / "torch/__init__.py").write_text("compiled = 2\n")  # the same version, other files
    changed = call(helper, "check", tmp_path / "slm", site=image)
    assert changed.returncode != 0
    assert "files ['torch']" in changed.stderr
    (image / "torch/__init__.py").write_text("compiled = 1\n")
    (image / "apex-0.1.dist-info/METADATA").write_text(
        "Metadata-Version: 2.1\nName: apex\nVersion: 0.9.10.dev0\n"
    )
    moved = call(helper, "check", tmp_path / "slm", site=image)
    assert moved.returncode != 0
    assert "apex 0.1 -> 0.9.10.dev0" in moved.stderr


def test_check_needs_the_extensions(helper, image, tmp_path):
    (image / "fused_weight_gradient_mlp_cuda.py").unlink()
    call(helper, "record", tmp_path / "slm", "0.16.1", site=image)
    result = call(helper, "check", tmp_path / "slm", site=image)
    assert result.returncode != 0
    assert "fused_weight_gradient_mlp_cuda" in result.stderr


@pytest.mark.parametrize(
    ("core", "version", "accepted"),
    [
        ("0.16.1", "2.8.0", ">=2.9,<2.12"),
        ("0.16.1", "2.11.3", ""),
        ("0.16.1", "2.12.0+5671fd3", ">=2.9,<2.12"),
        ("0.19.2", "2.8.0", ">=2.9,<3.0"),
        ("0.19.2", "2.17.1+4329ff84", ""),
        ("0.19.2", "2.20.2", ""),
    ],
)
def test_the_range_of_transformer_engine_follows_megatron_core(
    helper, tmp_path, core, version, accepted
):
    site = tmp_path / "site"
    for name in ("torch", "apex", "numpy"):
        install(site, name, "1.0", {f"{name}.py": ""})
    install(site, "transformer_engine", version, {"transformer_engine/__init__.py": ""})
    result = call(helper, "record", tmp_path / "slm", core, site=site)
    assert (result.returncode != 0) == bool(accepted)
    if accepted:
        assert f"outside {accepted}, which goes with megatron-core {core};" in result.stderr


def test_another_megatron_core_is_refused_by_name(helper, image, tmp_path):
    result = call(helper, "record", tmp_path / "slm", "0.17.1", site=image)
    assert result.returncode != 0
    assert "MEGATRON_CORE is '0.17.1'; it can be 0.16.1 or 0.19.2" in result.stderr


def test_the_ranges_are_those_that_megatron_core_states():
    from importlib.metadata import requires

    stated = [line for line in requires("megatron-core") if line.startswith("transformer-engine")]
    if INSTALLED == "0.16.1":
        assert "<2.12.0" in stated[0]
        assert ">=2.9.0a0" in stated[0]
    else:
        assert stated == ['transformer-engine[core_cu13,pytorch]; extra == "te"']


def test_the_image_takes_the_versions_that_the_library_supports():
    ranges = ast.literal_eval(re.search(r"^TRANSFORMER_ENGINE = (\{.*\})$", TEXT, re.MULTILINE)[1])
    assert tuple(ranges) == SUPPORTED
    assert f"ARG MEGATRON_CORE={SUPPORTED[-1]}\n" in TEXT


def test_requirements_without_the_images_packages(helper, tmp_path):
    wanted = tmp_path / "wanted.txt"
    wanted.write_text(
        "# why\ntorch==2.13.0  # the "
        'framework\nmegatron-core==0.16.1 ; python_version < "3.12"\nnumpy>=2\n'
        "torchmetrics==1.0\nsentencepiece==0.2.3\n"
    )
    assert call(helper, "requirements", wanted, tmp_path, "0.19.2").returncode == 0
    assert (tmp_path / "requirements.txt").read_text().splitlines() == [
        "megatron-core==0.19.2",
        "# why",
        "torchmetrics==1.0",
        "sentencepiece==0.2.3",
    ]


def test_secrets_and_bulk_stay_out_of_the_image():
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert {".git", ".venv*", "runs", "wandb", ".env", "**/.netrc"} <= set(ignored)
    assert not re.search(r"(API_KEY|TOKEN|PASSWORD)\s*=", TEXT)
