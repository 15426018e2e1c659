"""Every call that could run code out of a file, in all our programs: each stands in the one place
that takes the code out, or is none.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("megatron_slm", "data_tools", "tokenizer", "launch")

DOORS = {
    "pickle.load": set(),
    "pickle.loads": set(),
    "pickle.Unpickler": {"megatron_slm/files/inert_pickle.py"},
    "yaml.load": set(),
    "yaml.safe_load": set(),
    "yaml.full_load": set(),
    "yaml.unsafe_load": set(),
    "yaml.SafeLoader": {"megatron_slm/config/yaml_text.py"},
    "dcp.FileSystemReader": {"megatron_slm/checkpoint/plain_reader.py"},
    "dcp.load": set(),
    "dcp.load_state_dict": {"megatron_slm/checkpoint/loading.py"},
    "dist_checkpointing.load": set(),
    "get_default_load_sharded_strategy": set(),
    "torch.jit.load": set(),
    "torch.hub.load": set(),
    "specification.loader.exec_module": {
        "megatron_slm/selection/scorer_files.py",  # a scorer named on the command line
        "megatron_slm/config/extension_points.py",  # any other part named there
        "data_tools/encoding/filters.py",  # a filter named on the command line
    },
    "eval": set(),
    "exec": set(),
}
"""Name as it is written -> the files that may use it."""
NEEDS = {
    "torch.load": ("weights_only", True, {"megatron_slm/testing/spawn.py"}),  # its own processes
    "from_pretrained": ("trust_remote_code", False, set()),
}
"""Name (or its end) -> the argument that every call must give, and files that need not."""


def used() -> dict[str, list[tuple[str, ast.AST]]]:
    """Dotted names -> (file, call or other use of it)."""
    found: dict[str, list] = {}
    for path in sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        where = path.relative_to(ROOT).as_posix()
        called = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute | ast.Name):
                name = ast.unparse(node)
                found.setdefault(name, []).append((where, called.get(id(node), node)))
    return found


USED = used()


@pytest.mark.parametrize("name", DOORS)
def test_it_stands_where_it_may(name):
    assert {where for where, _ in USED.get(name, [])} == DOORS[name]


@pytest.mark.parametrize("name", NEEDS)
def test_every_call_says_that_no_code_is_run(name):
    argument, value, exempt = NEEDS[name]
    calls = [
        (where, node)
        for full_name, places in USED.items()
        if full_name == name or full_name.endswith(f".{name}")
        for where, node in places
        if isinstance(node, ast.Call) and where not in exempt
    ]
    assert calls, "the test looks for what nobody calls"
    for where, call in calls:
        given = {keyword.arg: keyword.value for keyword in call.keywords}
        assert argument in given, f"{where}:{call.lineno}"
        assert ast.literal_eval(given[argument]) is value, f"{where}:{call.lineno}"


def test_no_array_is_unpickled():
    for name in ("np.load", "numpy.load"):
        for where, call in USED.get(name, []):
            assert "allow_pickle" not in ast.unparse(call), where
