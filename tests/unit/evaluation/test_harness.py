"""lm-evaluation-harness on a checkpoint gives what its model `hf` gives on the export."""

import ast
import importlib.util
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from megatron_slm.config.load import ConfigError
from megatron_slm.config.schema import Config
from megatron_slm.evaluation.harness_settings import read_settings, refuse_long_rotation
from tests.source_tree import PACKAGE, ROOT, tree

needs_harness = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("lm_eval", "accelerate"))),
    reason="lm-evaluation-harness and its model hf are not installed (pip install 'lm_eval[hf]')",
)
TASKS = {
    "local_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{label}}",
        "doc_to_choice": "{{choices}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "local_rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
    "local_greedy": {
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["ab"], "max_gen_toks": 5},
        "metric_list": [{"metric": "exact_match"}],
    },
}


def test_settings_are_read_or_refused_by_name():
    read = read_settings(
        {"checkpoint": "run", "device": "cuda:0", "add_bos_token": True, "max_batch_size": None}
    )
    assert read.device == "cuda"
    assert read.add_bos_token == "true"
    assert read.batch_size == 1
    with pytest.raises(ConfigError) as refused:
        read_settings({"checkpoint": "run", "batch_size": "auto", "tensr": 2, "device": "mps"})
    for text in ("sizes are not tried out", "did you mean tensor?", "mps"):
        assert text in str(refused.value)


def test_a_rotation_by_length_is_refused_beyond_the_models_own_length():
    config = Config()
    config.model.rope_scaling = "dynamic"
    config.model.rope_original_sequence_length = config.data.sequence_length = 16
    refuse_long_rotation(config)
    config.data.sequence_length = 17
    with pytest.raises(ConfigError, match="max_length: got 17 .* give max_length=16"):
        refuse_long_rotation(config)


def test_the_adapter_is_imported_without_megatron_core():
    """Which asks for CUDA when it is imported: on a machine without, choose_device comes first."""
    ours = [
        node.module
        for node in tree(PACKAGE / "evaluation" / "harness.py").body
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("megatron_slm")
    ]
    assert "megatron_slm.evaluation.text_requests" in ours
    program = f"import sys, {', '.join(ours)}; sys.exit('megatron.core' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tokenizer, a checkpoint with it, its export and three tasks on local files."""
    from megatron_slm.testing.spawn import run_on_cpu
    from tests.end_to_end.warm_programs import run_program

    folder = tmp_path_factory.mktemp("harness")
    random = np.random.default_rng(0)
    words = ["".join(random.choice(list("abcdefgh"), 4)) for _ in range(60)]
    texts = [" ".join(random.choice(words, 30)) for _ in range(60)]
    byte_level_vocabulary(texts).save(str(folder / "tokenizer.json"))
    run_on_cpu(save_checkpoint, str(folder))
    run_program(
        "megatron_slm.export_hf",
        *("--checkpoint", folder / "run", "--output", folder / "exported"),
    )
    documents = []
    for number, text in enumerate(texts[:6]):
        choices = [f" {word}" for word in random.choice(words, 3)]
        first_words = " ".join(text.split()[: 3 + 4 * number])
        documents.append({"text": first_words, "choices": choices, "label": number % 3})
    lines = [json.dumps(document) + "\n" for document in documents]
    (folder / "documents.jsonl").write_text("".join(lines))
    (folder / "tasks").mkdir()
    for name, task in TASKS.items():
        data = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(folder / "documents.jsonl")}},
            "test_split": "test",
        }
        (folder / "tasks" / f"{name}.yaml").write_text(json.dumps(data | task))
    return folder


def byte_level_vocabulary(texts) -> tokenizers.Tokenizer:
    """As Llama-3 has. (SentencePiece and its export write bytes that are no UTF-8 differently, and
    an untrained model gives many.)
    """
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320,
        show_progress=False,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator(texts, trainer)
    return backend


def save_checkpoint(groups, folder: str) -> None:
    from megatron_slm.checkpoint.folder import CheckpointInfo
    from megatron_slm.checkpoint.store import CheckpointStore, trainer_state
    from megatron_slm.config.schema import Config, DataConfig, ModelConfig
    from megatron_slm.model.build import build_model
    from megatron_slm.tokenization import load_tokenizer

    tokenizer = load_tokenizer(f"{folder}/tokenizer.json")
    size = tokenizer.vocabulary_size
    model = ModelConfig(
        layers=2,
        hidden_size=32,
        ffn_hidden_size=48,
        attention_heads=4,
        vocabulary_size=size,
        initialization_std=0.3,
    )
    info = CheckpointInfo(
        model=asdict(model),
        sequence_length=32,
        tokenizer={**tokenizer.entry, "prepend_bos": False},
        step=3,
        tokens_processed=300,
    )
    config = Config(model=model, data=DataConfig(sequence_length=32))
    CheckpointStore(f"{folder}/run", groups).save(
        build_model(config, size, groups), None, info, trainer_state(None, groups)
    )


def samples(folder: Path, module: str, name: str, *words, processes: int = 1) -> dict:
    """{task: the answers to each document} of one run of the harness."""
    from tests.end_to_end.warm_programs import run_program

    run_program(
        module,
        *("--tasks", ",".join(TASKS), "--include_path", folder / "tasks", "--log_samples"),
        *("--output_path", folder / name, "--batch_size", 2, "--device", "cpu", *words),
        processes=processes,
    )
    found = {}
    for task in TASKS:
        [path] = (folder / name).rglob(f"samples_{task}_*.jsonl")
        records = map(json.loads, path.read_text().splitlines())
        found[task] = [
            record["filtered_resps"]
            for record in sorted(records, key=lambda record: record["doc_id"])
        ]
    return found


@pytest.fixture(scope="module")
def of_export(folder) -> dict:
    model = f"pretrained={folder}/exported,dtype=float32,max_length=32"
    return samples(folder, "lm_eval", "of_export", "--model", "hf", "--model_args", model)


@needs_harness
@pytest.mark.parametrize("layout", ["one", "data", "tensor", "pipeline", "context"])
def test_a_checkpoint_and_its_export_have_the_same_answers(folder, of_export, layout):
    model = f"checkpoint={folder}/run" + ("" if layout in ("one", "data") else f",{layout}=2")
    words = ("--model", "megatron_slm", "--model_args", model)
    processes = 1 if layout == "one" else 2
    ours = samples(folder, "megatron_slm.harness", layout, *words, processes=processes)
    for task in ("local_choice", "local_rolling"):
        expected = list(map(float, flat(of_export[task])))
        assert list(map(float, flat(ours[task]))) == pytest.approx(expected, abs=1e-3), task
    assert ours["local_greedy"] == of_export["local_greedy"]
    assert any(text for [text] in ours["local_greedy"])


def flat(*values):
    """The numbers and truth values in nested lists; texts of them, as the harness writes them."""
    for value in values:
        if isinstance(value, list):
            yield from flat(*value)
        else:
            yield {"True": 1.0, "False": 0.0}.get(str(value), value)


@needs_harness
def test_the_task_lists_name_tasks_that_the_harness_has():
    import yaml
    from lm_eval.tasks import TaskManager

    from megatron_slm.harness import TASKS as FOLDER

    known = TaskManager(include_path=str(FOLDER))
    for path in FOLDER.glob("*.yaml"):
        written = yaml.load(path.read_text(), yaml.BaseLoader)  # !function is the harness' own tag
        if "group" in written:
            assert written["group"] in known.all_groups
            assert not set(written["task"]) - set(known.all_tasks), path
        else:
            assert written["task"] in known.all_tasks


@needs_harness
def test_bad_arguments_are_sentences(folder, capsys):
    from tests.end_to_end.warm_programs import run_program

    for model_args, code, sentence in (
        ("checkpoint=nowhere", 3, "no such checkpoint"),
        (f"checkpoint={folder}/run,tensor=3", 2, "parallel.tensor"),
        (f"checkpoint={folder}/run,add_bos=1", 2, "add_bos"),
    ):
        words = ("--model", "megatron_slm", "--model_args", model_args, "--device", "cpu")
        tasks = ("--tasks", "local_choice", "--include_path", folder / "tasks")
        done = run_program("megatron_slm.harness", *words, *tasks, exit_code=code)
        assert sentence in done.stderr
        assert "Traceback" not in done.stderr


@needs_harness
@pytest.mark.parametrize(
    "model_args, option, value, code, sentence",
    [
        (",tensor=2", "--use_cache", "answers", 2, "processes that compute together"),
        ("", "--limit", "1", 3, "a document for each data-parallel process"),
    ],
)
def test_what_would_leave_processes_waiting_is_refused(
    folder, tmp_path, model_args, option, value, code, sentence
):
    from tests.end_to_end.warm_programs import run_program

    words = (option, tmp_path / value if option == "--use_cache" else value)
    model = ("--model", "megatron_slm", "--model_args", f"checkpoint={folder}/run{model_args}")
    tasks = ("--tasks", "local_choice", "--include_path", folder / "tasks", "--device", "cpu")
    done = run_program("megatron_slm.harness", *model, *tasks, *words, processes=2, exit_code=None)
    assert done.returncode == code, done.stderr
    assert sentence in done.stderr
    if option != "--limit":  # where the others are in a collective of lm_eval's, which then fails
        assert "Traceback" not in done.stderr
