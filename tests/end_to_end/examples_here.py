"""The files of examples/, loaded as modules whose choices of tokens are written down."""

import importlib.util
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).resolve().parents[2] / "examples"


def example(name: str) -> ModuleType:
    """examples/NAME.py, imported."""
    spec = importlib.util.spec_from_file_location(f"examples_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def note_choices(module: ModuleType) -> list[dict]:
    """A list that every later call of the example's select_top is added to."""
    notes = []
    choose = module.select_top

    def choose_and_note(*arguments, **named):
        chosen = choose(*arguments, **named)
        notes.append({"mask": chosen.mask.tolist(), "threshold": chosen.threshold})
        return chosen

    module.select_top = choose_and_note
    return notes
