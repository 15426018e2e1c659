"""A configuration is held against the checkpoint it starts from, or takes its model from one."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from megatron_slm.checkpoint.architecture import (
    allowed_differences,
    differing_settings,
    take_architecture,
)
from megatron_slm.checkpoint.folder import describe_model, read_checkpoint_info
from megatron_slm.config.load import ConfigError, load_yaml, parse_config, to_yaml
from megatron_slm.config.schema import Config, ModelConfig


def tokenizer(fingerprint: str = "sha256:ours", vocabulary_size: int = 300) -> SimpleNamespace:
    return SimpleNamespace(
        path="our.model", vocabulary_size=vocabulary_size, entry={"fingerprint": fingerprint}
    )


OURS = tokenizer()
BASE = dict(layers=2, attention_heads=8, query_groups=2, qkv_bias=True, rope_base=5000.0)


def checkpoint(folder, step: int = 1, vocabulary_size: int = 300, **model) -> str:
    """A run folder with the description of a checkpoint and nothing else."""
    made = folder / "checkpoints" / f"step_{step:08d}"
    made.mkdir(parents=True)
    described = {
        "model": describe_model(ModelConfig(**model), vocabulary_size),
        "sequence_length": 16,
        "step": step,
        "tokens_processed": 1,
        "tokenizer": {"path": "our.model", "fingerprint": "sha256:ours"},
    }
    (made / "model.json").write_text(json.dumps(described))
    (made / "checksums.json").write_text("{}")
    return str(folder)


@pytest.fixture
def base(tmp_path) -> str:
    return checkpoint(tmp_path / "base", **BASE)


def starting(base: str, folder, **model) -> Config:
    made = Config(model=ModelConfig(**model))
    made.run.folder = str(folder / "run")
    made.checkpoint.initialize_from = base
    return made


def read(*argv) -> Config:
    return parse_config([str(word) for word in argv], "test", "a test", fill=take_architecture)


def test_the_same_model_may_start_whatever_the_run_chooses(base, tmp_path):
    config = starting(base, tmp_path, **BASE, recompute="full", pad_vocabulary_to_multiple_of=64)
    assert not differing_settings(config, 300, OURS)


def test_every_difference_is_listed_with_both_values_and_what_to_change(base, tmp_path):
    config = starting(base, tmp_path, layers=2, tied_embeddings=True)
    said = differing_settings(config, 310, tokenizer("sha256:other"))
    for part in (
        "model.attention_heads 8, this configuration 4; set model.attention_heads to 8",
        "model.query_groups 2, this configuration 4; set model.query_groups to 2",
        "model.vocabulary_size 300, this configuration 310 (the tokenizer has so many)",
        "model.rope_base 5000.0, this configuration 10000.0; set model.rope_base to 5000.0",
        "model.tied_embeddings false, this configuration true; set model.tied_embeddings to false",
        "model.qkv_bias true, this configuration false; set model.qkv_bias to true",
        "the tokenizer our.model, data.tokenizer is our.model: "
        "fingerprint sha256:ours and sha256:other",
    ):
        assert any(part in problem for problem in said), part
    assert len(said) == 7
    assert all(problem.startswith(f"checkpoint.initialize_from {base}") for problem in said)
    assert f"model.from_checkpoint: {base}" in said[0], "the one setting that repairs them all"


def test_rows_that_no_tokenizer_names_must_be_named(tmp_path):
    """Published embeddings often have more rows than ids; without them probabilities change."""
    config = starting(checkpoint(tmp_path / "wide", vocabulary_size=320), tmp_path)
    (problem,) = differing_settings(config, 300, OURS)
    assert "set model.vocabulary_size to 320" in problem
    assert not differing_settings(config, 320, OURS)


def test_a_larger_tokenizer_is_not_answered_with_a_size_that_is_refused(base, tmp_path):
    config = starting(base, tmp_path, **BASE)
    (problem,) = differing_settings(config, 310, tokenizer(vocabulary_size=310))
    assert "our.model has 310 ids: use the tokenizer of the checkpoint" in problem


def test_a_resumed_run_is_held_against_its_own_checkpoint(base, tmp_path):
    config = starting(base, tmp_path, **BASE)
    checkpoint(tmp_path / "run", **{**BASE, "rope_base": 10000.0})
    (problem,) = differing_settings(config, 300, OURS)
    assert problem.startswith(f"the checkpoint that run.folder {config.run.folder} resumes from")
    assert "set model.rope_base to 10000.0, or give another run.folder" in problem


def test_another_rotary_embedding_may_be_meant_and_is_then_said(base, tmp_path):
    """Longer sequences are learned so. Nothing else may differ with it, nor a resumed run."""
    stretched = {**BASE, "rope_base": 80000.0, "rope_scaling": "linear"}
    config = starting(base, tmp_path, **stretched, tied_embeddings=True)
    assert len(differing_settings(config, 300, OURS)) == 3
    config.checkpoint.allow_other_rope = True
    (problem,) = differing_settings(config, 300, OURS)
    assert "model.tied_embeddings" in problem
    assert allowed_differences(config) == [
        f"model.rope_base 80000.0, in {base} 5000.0",
        f"model.rope_scaling linear, in {base} none",
    ]
    checkpoint(tmp_path / "run", **BASE, tied_embeddings=True)
    assert len(differing_settings(config, 300, OURS)) == 2
    assert not allowed_differences(config), "a resumed run starts from nothing else"


def test_layers_without_a_window_may_be_stretched_alone(tmp_path):
    """As OLMo 3's: the others have a base of their own from there on, the one of before."""
    windowed = {**BASE, "attention_window_tokens": 8, "full_attention_layers": [1]}
    start = checkpoint(tmp_path / "windowed", **windowed)
    config = starting(
        start, tmp_path, **windowed, rope_scaling="yarn", rope_base_windowed=BASE["rope_base"]
    )
    assert "on purpose: checkpoint.allow_other_rope" in differing_settings(config, 300, OURS)[0]
    config.checkpoint.allow_other_rope = True
    assert not differing_settings(config, 300, OURS)
    assert f"model.rope_base_windowed 5000.0, in {start} 0.0" in allowed_differences(config)


def test_a_rotary_embedding_beside_an_architecture_that_is_taken(base):
    given = ("--model.from_checkpoint", base, "--model.rope_base", "8e4")
    with pytest.raises(ConfigError, match="model.rope_base: got 80000.0"):
        read(*given)
    config = read(*given, "--checkpoint.allow_other_rope", "true")
    assert (config.model.rope_base, config.model.qkv_bias) == (80000.0, True)
    assert not differing_settings(config, 300, OURS)


def test_the_plan_of_a_start_leaves_what_the_run_folder_holds_alone(base, tmp_path):
    config = starting(base, tmp_path, **BASE)
    checkpoint(tmp_path / "run", layers=7)
    assert differing_settings(config, 300, OURS)
    assert not differing_settings(config, 300, OURS, resumable=False)


def test_a_damaged_newest_checkpoint_is_passed_over_as_resuming_does(base, tmp_path):
    config = starting(base, tmp_path, **BASE)
    checkpoint(tmp_path / "run", **BASE)
    checkpoint(tmp_path / "run", step=2, **{**BASE, "layers": 3})
    newest = tmp_path / "run" / "checkpoints" / "step_00000002"
    (newest / "checksums.json").write_text(json.dumps({"model.json": "0" * 64}))
    assert not differing_settings(config, 300, OURS)
    with pytest.raises(ValueError, match="model.json differs from its checksum"):
        read_checkpoint_info(newest)


def test_a_model_that_this_version_cannot_build_is_refused(base, tmp_path):
    path = tmp_path / "base" / "checkpoints" / "step_00000001" / "model.json"
    described = json.loads(path.read_text())
    described["model"]["sliding_window"] = 512
    path.write_text(json.dumps(described))
    with pytest.raises(ValueError, match="model.sliding_window: unknown field"):
        read_checkpoint_info(base).reference_model()
    with pytest.raises(ValueError, match="initialize_from.*sliding_window"):
        differing_settings(starting(base, tmp_path), 300, OURS)


def test_the_architecture_is_taken_from_a_checkpoint(base):
    config = read("--model.from_checkpoint", base, "--model.recompute", "full")
    expected = ModelConfig(**BASE, from_checkpoint=base, vocabulary_size=300, recompute="full")
    assert config.model == expected


def test_the_configuration_that_is_written_is_complete(base, tmp_path):
    config = read("--model.from_checkpoint", base)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_yaml(tmp_path / "config.yaml") == config
    assert read("--config", tmp_path / "config.yaml") == config


def test_a_setting_given_twice_must_say_the_same(base, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: {layers: 2, rope_base: 5e3, query_groups: 4, vocabulary_size: 0}\n")
    given = ("--config", recipe, "--model.from_checkpoint", base)
    with pytest.raises(ConfigError) as caught:
        read(*given, "--model.hidden_size", "many", "--model.norm_epsilon", "1e-6")
    said = "\n".join(caught.value.problems)
    assert "model.query_groups: got 4, but model.from_checkpoint" in said
    assert "has 2;" in said
    assert "model.norm_epsilon: got 1e-06" in said
    assert "model.hidden_size: got 'many'" in said
    assert len(caught.value.problems) == 3, "the same value again is no problem"


def test_a_resumed_run_no_longer_needs_the_checkpoint_its_architecture_came_from(tmp_path):
    gone = str(tmp_path / "gone")
    given = ("--run.folder", tmp_path / "run", "--model.from_checkpoint", gone)
    with pytest.raises(ConfigError, match="model.from_checkpoint: .*gone: no such checkpoint"):
        read(*given)
    checkpoint(tmp_path / "run", **BASE)
    config = read(*given)
    assert config.model.rope_base == 5000.0
    assert not differing_settings(config, 300, OURS)


def test_an_architecture_that_was_not_taken_is_not_ignored(base):
    """A configuration made in code passes no parser."""
    config = Config(model=ModelConfig(from_checkpoint=base))
    config.run.folder = "nowhere"
    said = "\n".join(differing_settings(config, 300, OURS))
    assert f"model.from_checkpoint {base} has model.layers 2, this configuration 4" in said


def test_what_a_checkpoint_says_of_its_model_names_no_other_checkpoint():
    described = describe_model(replace(ModelConfig(), from_checkpoint="runs/base"), 300)
    assert "from_checkpoint" not in described
    assert described["vocabulary_size"] == 300
