"""README.md of an export says what the checkpoint and its run say, and nothing else."""

import json

import yaml

from megatron_slm.checkpoint.folder import CheckpointInfo
from megatron_slm.convert.model_card import model_card


def card(tmp_path, trainer=None, settings=None, **described) -> str:
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000500"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer.json").write_text(json.dumps(trainer or {}))
    if settings:
        (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(settings))
    info = CheckpointInfo(
        **{"model": {}, "sequence_length": 8, "tokenizer": {}, "step": 500, "tokens_processed": 0}
        | described
    )
    return model_card(checkpoint, info, "slm", "LlamaForCausalLM")


def test_everything_that_is_known_is_said(tmp_path):
    text = card(
        tmp_path,
        trainer={
            "tokens_selected": 60_000,
            "data": {"corpora": [{"prefix": "/data/math", "fingerprint": "sha256:aa"}]},
            "inputs": {"selection.reference.scores": {"/data/scores": "sha256:bb"}},
        },
        settings={
            "selection": {"scorer": "excess_loss", "keep_fraction": 0.6},
            "optimizer": {"learning_rate": 1e-4},
            "checkpoint": {"initialize_from": "runs/base"},
        },
        tokens_processed=100_000,
        tokenizer={"vocabulary_size": 32000, "fingerprint": "sha256:cc"},
        validation_loss={"held_out": 1.23456},
    )
    for part in (
        "A `LlamaForCausalLM` exported by megatron-slm from step 500",
        "started from the weights of `runs/base`",
        "100,000 tokens processed in 500 steps",
        "60,000 of them trained on (60.0%)",
        "token scorer: excess_loss (`selection.scorer`)",
        "keep fraction: 0.6",
        "learning rate: 0.0001",
        "`math`, sha256:aa",
        "tokenizer of 32,000 ids, sha256:cc",
        "scores `scores`, sha256:bb",
        "held_out: 1.2346",
        'from_pretrained("slm")',
    ):
        assert part in text, part


def test_the_licence_is_left_to_the_user(tmp_path):
    head = card(tmp_path).split("---")[1]
    assert yaml.safe_load(head)["library_name"] == "transformers"
    assert "license" not in yaml.safe_load(head)
    assert "# license: state it here" in head


def test_what_is_not_known_has_no_heading(tmp_path):
    text = card(tmp_path)
    for heading in ("Recipe", "Data", "Reference", "Plain loss", "Training"):
        assert f"## {heading}" not in text


def test_a_tokenizer_may_have_a_fingerprint_alone(tmp_path):
    assert "- tokenizer sha256:cc\n" in card(tmp_path, tokenizer={"fingerprint": "sha256:cc"})
