"""A description small enough to be run in a test, on a little real text, with every kind of stage.

Training takes two nodes of one process on SLURM, and one process here.
"""

import json
import sysconfig
from pathlib import Path

import yaml

MODULES = ("argparse.py", "ast.py", "cmd.py", "configparser.py", "csv.py", "difflib.py")


def write_description(folder: Path, reference_steps: int = 4) -> Path:
    """Write text and pipeline.yaml into `folder`; everything is made in folder/out.

    reference_steps: how long the reference trains, with a checkpoint after each step.
    """
    library = Path(sysconfig.get_path("stdlib"))
    texts = [(library / name).read_text() for name in MODULES]
    for name, part in (("corpus", texts), ("curated", texts[-3:])):
        lines = [json.dumps({"text": text[:20_000]}) for text in part]
        (folder / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines))
    description = {
        "folder": str(folder / "out"),
        "tokenizer": {"input": [str(folder / "corpus.jsonl")], "vocabulary_size": 400},
        "corpora": {
            "corpus": {"input": [str(folder / "corpus.jsonl")], "jobs": 2},
            "curated": {"input": [str(folder / "curated.jsonl")]},
        },
        "training": {
            "settings": {
                "model": {
                    "layers": 2,
                    "hidden_size": 32,
                    "ffn_hidden_size": 64,
                    "attention_heads": 4,
                    "query_groups": 2,
                },
                "data": {"sequence_length": 64, "micro_batch_size": 2, "global_batch_size": 8},
                "schedule": {"train_steps": 4},
                "checkpoint": {"interval_steps": 1},
                "monitoring": {"log_interval_steps": 1, "wandb": {"mode": "disabled"}},
            },
            "validation": {"target": "curated"},
        },
        "runs": {
            "reference": {
                "train": ["curated"],
                "settings": {"schedule": {"train_steps": reference_steps}},
            },
            "slm": {
                "train": ["corpus"],
                "scores": ["scores"],
                "settings": {"selection": {"scorer": "excess_loss", "keep_fraction": 0.6}},
            },
        },
        "scores": {"scores": {"reference": "reference", "corpus": "corpus", "jobs": 2}},
        "exports": {"exported": {"run": "slm"}},
        "report": {"runs": ["slm"]},
        "slurm": {
            "sbatch": {"time": "10"},
            "preprocess": {"sbatch": {"mem_per_cpu": 0}},
            "train": {"nodes": 2, "processes_per_node": 1},
            "score": {"processes_per_node": 1},
        },
        "local": {"processes": 1},
    }
    path = folder / "pipeline.yaml"
    path.write_text(yaml.safe_dump(description, sort_keys=False))
    return path
