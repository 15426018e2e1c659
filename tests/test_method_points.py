"""Every point that a correct implementation must get right, and tests that fail when it is broken.

docs/method.md explains the points; POINTS is their index: number -> (its sentence there, tests).
Tests named test_point_NN_... must stand under their own numbers. What no other file covers is
tested below.
"""

import ast
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_slm.checkpoint.folder import CheckpointInfo
from megatron_slm.config.schema import Config, ModelConfig
from megatron_slm.data.manifest import CorpusManifest
from megatron_slm.ops import linear_cross_entropy
from megatron_slm.scoring.options import ScoreOptions
from megatron_slm.scoring.reference import open_reference, scoring_config
from megatron_slm.selection import select_top
from megatron_slm.testing.corpora import (
    random_documents,
    score_manifest,
    write_corpus,
    write_scores,
)

TESTS = Path(__file__).parent
SELECT = "unit/selection/test_select.py"
SCORERS = "unit/selection/test_scorers.py"
SUMS = "unit/selection/test_diagnostics.py"
RANKS = "distributed/test_selection.py"
LAYOUTS = "distributed/test_layouts.py"
TRAINING = "distributed/test_scorers_in_training.py"
MODEL = "distributed/test_method_points.py"
LOADER = "unit/data/test_loader.py"
DATA = "unit/data/test_scored_dataset.py"
STORE = "unit/data/test_score_store.py"
HERE = "test_method_points.py"

POINTS = {
    # Normalisation
    1: (
        "The gradient is one sum over the step's selected tokens, divided once by their number.",
        [(LAYOUTS, "test_layout_equals_plain_torch")],
    ),
    2: (
        "Soft weights have a divisor of their own, in floating point.",
        [
            (SCORERS, "test_point_02_soft_weights_have_their_own_float_divisor"),
            (TRAINING, "test_every_scorer_and_scope_in_every_layout"),
        ],
    ),
    3: (
        "A rank, a micro-batch or a step in which nothing is selected is legal.",
        [
            (SELECT, "test_point_03_nothing_to_select_is_legal"),
            (MODEL, "test_point_03_a_rank_or_step_with_nothing_selected_is_legal"),
        ],
    ),
    4: (
        "Logged ratios are formed after the sums of all ranks and micro-batches are added.",
        [
            (SUMS, "test_point_04_ratios_are_formed_after_the_sums_are_added"),
            (LAYOUTS, "test_layout_equals_plain_torch"),
        ],
    ),
    # Selection
    5: (
        "Exactly ⌈k·n − 1e-9⌉ of n competing tokens are kept, by score, then by global token id.",
        [
            (SELECT, "test_point_05_exact_k_is_the_brute_force_choice"),
            (SELECT, "test_point_05_exact_k_rounds_as_stated"),
            (SELECT, "test_point_05_ties_are_broken_by_token_id_not_by_place"),
            (RANKS, "test_point_05_exact_k_over_ranks_ragged_and_empty"),
            (
                "distributed/test_selection_properties.py",
                "test_point_05_every_scope_is_the_brute_force_choice_in_every_layout",
            ),
            (LOADER, "test_the_global_batch_does_not_depend_on_the_layout"),
        ],
    ),
    6: (
        "Tokens that are masked or have no finite score neither compete nor count.",
        [
            (SELECT, "test_point_06_ineligible_tokens_are_outside_the_mask_and_the_count"),
            (SELECT, "test_point_06_non_finite_scores_do_not_compete"),
        ],
    ),
    7: (
        "The choice of a whole step is made before its backward pass, or from earlier steps.",
        [
            (TRAINING, "test_global_batch_is_one_set_whatever_the_layout"),
            (LAYOUTS, "test_layout_equals_plain_torch"),
        ],
    ),
    8: (
        "The choice under `global_batch` does not depend on the number of data-parallel ranks.",
        [
            (RANKS, "test_point_08_and_09_scopes_and_scorers_do_not_depend_on_the_layout"),
            (TRAINING, "test_global_batch_is_one_set_whatever_the_layout"),
        ],
    ),
    9: (
        "Data × context-parallel ranks of the last stage compete, never the tensor group.",
        [
            (RANKS, "test_point_08_and_09_scopes_and_scorers_do_not_depend_on_the_layout"),
            (LAYOUTS, "test_tensor_ranks_choose_identical_tokens"),
        ],
    ),
    10: (
        "A random choice depends on the seed, the step and the global token id, never on the rank.",
        [
            (SCORERS, "test_point_10_random_depends_on_step_and_token_id_only"),
            (TRAINING, "test_every_scorer_and_scope_in_every_layout"),
        ],
    ),
    # Alignment
    11: (
        "A score is stored under the token it is the score of.",
        [
            (DATA, "test_score_and_label_are_the_same_slice"),
            ("distributed/test_scoring.py", "test_scores_equal_plain_torch_in_every_layout"),
        ],
    ),
    12: (
        "Scores are keyed by offset in the corpus, and bound to it and its tokenizer.",
        [
            (DATA, "test_scores_belong_to_their_tokens_whatever_the_length_seed_and_blend"),
            (DATA, "test_changed_corpus_or_tokenizer_is_refused"),
            (STORE, "test_scores_of_another_corpus_or_tokenizer_are_refused"),
            (STORE, "test_a_changed_byte_is_found_at_opening"),
        ],
    ),
    13: (
        "The context of scoring is recorded, and training in another one is warned of.",
        [
            (STORE, "test_another_training_context_is_said"),
            (HERE, "test_point_13_a_run_begins_with_a_warning_of_another_context"),
        ],
    ),
    14: (
        "The first token of a document is never selected.",
        [
            (DATA, "test_first_token_of_a_document_is_not_eligible"),
            ("unit/scoring/test_windows.py", "test_first_tokens_of_a_range"),
        ],
    ),
    15: (
        "Context-parallel ranks cut tokens, labels, masks, ids and scores in the same way.",
        [
            (LOADER, "test_context_parallel_slices_apply_to_every_tensor_alike"),
            (LOADER, "test_slices_are_megatron_cores"),
            (LAYOUTS, "test_layout_equals_plain_torch"),
        ],
    ),
    # Numerics
    16: (
        "Losses are fp32 from logits accumulated in fp32; scores are stored as fp16 or fp32.",
        [
            (HERE, "test_point_16_a_bf16_head_selects_what_exact_logits_select"),
            (HERE, "test_point_16_scores_are_stored_as_fp16_and_never_coarser"),
            (MODEL, "test_point_16_losses_are_fp32_from_fp32_logits_in_a_bf16_model"),
        ],
    ),
    17: (
        "Padded columns of the vocabulary have no part in the losses and entropies "
        "of either model.",
        [
            (HERE, "test_point_17_padding_has_no_share_in_loss_and_entropy"),
            (MODEL, "test_point_17_padded_vocabulary_columns_are_minus_infinity_in_both_models"),
        ],
    ),
    18: (
        "Forward-only passes run without dropout, and so does training unless asked.",
        [
            (HERE, "test_point_18_no_dropout_by_default_and_none_in_a_reference"),
            (MODEL, "test_point_18_forward_only_passes_are_without_dropout"),
        ],
    ),
    19: (
        "A reference that equals the model is noticed and reported.",
        [
            (
                "unit/selection/test_alarms.py",
                "test_point_19_reference_equal_to_the_model_is_noticed_through_fp16_storage",
            )
        ],
    ),
}


def names_in(path: Path) -> set[str]:
    return {
        node.name
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def test_every_point_names_tests_that_exist():
    assert sorted(POINTS) == list(range(1, 20))
    for point, (_, tests) in POINTS.items():
        assert tests, f"point {point} has no test"
        for file, name in tests:
            assert name in names_in(TESTS / file), f"point {point}: {file} has no test {name}"


def test_numbered_tests_stand_under_their_numbers():
    for path in TESTS.rglob("test_*.py"):
        for name in names_in(path):
            if numbers := re.match(r"test_point_(\d\d(?:_and_\d\d)*)", name):
                for number in map(int, numbers[1].split("_and_")):
                    assert (str(path.relative_to(TESTS)), name) in POINTS[number][1], (
                        f"{name} is missing under point {number}"
                    )


def test_the_guide_explains_every_point_in_the_same_sentence_and_names_its_tests():
    page = (TESTS.parent / "docs" / "method.md").read_text(encoding="utf-8")
    sections = dict(
        re.findall(r'^(\d+)\. <a id="point-\1"></a>(.*?)(?=^\d+\. <a|^#)', page, re.M | re.S)
    )
    assert sorted(sections, key=int) == [str(point) for point in POINTS]
    for point, (sentence, tests) in POINTS.items():
        words = " ".join(sections[str(point)].split())
        assert words.startswith(f"**{sentence}**"), f"point {point}: docs/method.md says otherwise"
        for file, name in tests:
            assert f"`{name}`" in words, f"point {point}: docs/method.md does not name {name}"
            assert f"`tests/{file}`" in words, f"point {point}: docs/method.md does not name {file}"


# ---- 13: scores made in another context ----


def started_reporter(monkeypatch, config, corpora, **sizes):
    """What a run says before its first step: the sentences that reach the sinks."""
    from megatron_slm.training import reporter

    said = []
    monkeypatch.setattr(reporter.Reporter, "_show_start_table", lambda *_: None)
    monkeypatch.setattr(reporter.Reporter, "message", lambda self, text, level: said.append(text))
    groups = SimpleNamespace(
        is_logger=True, device=torch.device("cpu"), dp_size=sizes.get("dp_size", 1)
    )
    reporter.Reporter(
        config, groups, SimpleNamespace(corpora=corpora), resume_step=None, wandb_id=""
    ).close("done", 0)
    return " ".join(said)


def config_of_a_run(tmp_path, **selection) -> Config:
    config = Config()
    config.run.folder = str(tmp_path / "run")
    config.schedule.train_steps = 1
    config.monitoring.wandb.mode = "disabled"
    for name, value in {"scorer": "excess_loss", **selection}.items():
        setattr(config.selection, name, value)
    (tmp_path / "run").mkdir(exist_ok=True)
    return config


def test_point_13_a_run_begins_with_a_warning_of_another_context(tmp_path, monkeypatch):
    write_corpus(tmp_path / "corpus", random_documents(9, 30))
    store = write_scores(tmp_path / "scores", tmp_path / "corpus", window_tokens=16)
    config = config_of_a_run(tmp_path)
    config.selection.reference.scores = [str(tmp_path / "scores")]
    config.data.sequence_length = 64
    manifest = SimpleNamespace(prepend_bos=False)
    corpora = [SimpleNamespace(prefix="corpus", manifest=manifest, scores=store)]
    said = started_reporter(monkeypatch, config, corpora)
    assert "windows of 16 tokens" in said
    assert "sequences of 64" in said
    config.data.sequence_length = 16
    assert "windows of" not in started_reporter(monkeypatch, config, corpora)


def test_a_run_begins_with_a_warning_of_a_keep_fraction_that_can_never_be_met(
    tmp_path, monkeypatch
):
    config = config_of_a_run(tmp_path, scope="sequence", keep_fraction=0.05)
    config.selection.reference.scores = ["scores"]
    config.data.sequence_length = 16
    config.data.micro_batch_size = 4
    config.data.global_batch_size = 64
    assert "cannot be met" in started_reporter(monkeypatch, config, [])
    config.selection.scope = "global_batch"
    assert "cannot be met" not in started_reporter(monkeypatch, config, [])
    config.selection.scope = "sequence"
    config.selection.keep_fraction = {"style": "warmup", "end": 0.05, "tokens": 100}
    assert "cannot be met" in started_reporter(monkeypatch, config, []), (
        "a schedule ends at a fraction, too"
    )
    config.selection.scorer = "stored_mask"
    config.selection.scorer_options = {"column": "quality"}
    assert "cannot be met" not in started_reporter(monkeypatch, config, []), (
        "a mask has no use for keep_fraction"
    )


# ---- 16: precision ----


def head_problem(tokens=2048, hidden=64, columns=512):
    """Hidden states and an output matrix as a bf16 model has them, confident as a trained one."""
    generator = torch.Generator().manual_seed(0)
    hidden_NH = torch.randn(tokens, hidden, generator=generator).bfloat16()
    weight_VH = (torch.randn(columns, hidden, generator=generator) * 0.5).bfloat16()
    return hidden_NH, weight_VH, torch.randint(0, columns, (tokens,), generator=generator)


def test_point_16_a_bf16_head_selects_what_exact_logits_select():
    """Against fp64 logits of the same bf16 numbers; logits rounded to bf16 select other tokens."""
    hidden_NH, weight_VH, target_N = head_problem()
    exact_NV = hidden_NH.double() @ weight_VH.double().T
    exact_N, rounded_N = (
        torch.nn.functional.cross_entropy(logits, target_N, reduction="none")
        for logits in (exact_NV, exact_NV.bfloat16().double())
    )
    loss_N = linear_cross_entropy(hidden_NH, weight_VH, target_N)
    reference_N = (
        exact_N.float()
        + torch.randn(exact_N.shape, generator=torch.Generator().manual_seed(1)) * 0.2
    )
    masks = [
        select_top(
            value_N.float() - reference_N, torch.ones_like(target_N, dtype=torch.bool), 0.6
        ).mask
        for value_N in (exact_N, loss_N, rounded_N)
    ]
    assert loss_N.dtype == torch.float32
    torch.testing.assert_close(loss_N.double(), exact_N, rtol=1e-5, atol=1e-5)
    assert int((masks[0] ^ masks[1]).sum()) == 0 < int((masks[0] ^ masks[2]).sum())


def test_point_16_scores_are_stored_as_fp16_and_never_coarser(tmp_path):
    assert ScoreOptions("c", "p", "o").dtype == "fp16"
    corpus = write_corpus(tmp_path / "corpus", random_documents(3, 9))
    for dtype in ("bf16", "int8", "fp8"):
        with pytest.raises(ValueError, match="fp16 or fp32"):
            score_manifest(corpus, dtype=dtype)


# ---- 17: padded vocabulary ----


def test_point_17_padding_has_no_share_in_loss_and_entropy():
    hidden_NH, weight_VH, target_N = head_problem(columns=500)
    padded_VH = torch.cat(
        [weight_VH, torch.full((12, weight_VH.shape[1]), 50.0, dtype=weight_VH.dtype)]
    )
    loss_N, extras = linear_cross_entropy(
        hidden_NH, padded_VH, target_N, vocabulary_size=500, extras=("entropy",)
    )
    logits_NV = hidden_NH.double() @ weight_VH.double().T
    probability_NV = logits_NV.softmax(1)
    torch.testing.assert_close(
        loss_N.double(),
        torch.nn.functional.cross_entropy(logits_NV, target_N, reduction="none"),
        rtol=1e-5,
        atol=1e-5,
    )
    torch.testing.assert_close(
        extras["entropy"].double(),
        -(probability_NV * logits_NV.log_softmax(1)).sum(1),
        rtol=1e-4,
        atol=1e-4,
    )


# ---- 18: dropout ----


def test_point_18_no_dropout_by_default_and_none_in_a_reference(tmp_path, monkeypatch):
    from megatron_slm.scoring import reference as room

    assert ModelConfig().dropout == 0.0
    corpus = write_corpus(tmp_path / "corpus", random_documents(3, 9))
    info = CheckpointInfo(
        model={**ModelConfig(dropout=0.3, recompute="full").__dict__},
        sequence_length=16,
        tokenizer=corpus.tokenizer,
        step=1,
        tokens_processed=1,
    )
    monkeypatch.setattr(room, "resolve_checkpoint", lambda path: path)
    monkeypatch.setattr(room, "read_checkpoint_info", lambda path: info)
    opened = open_reference("somewhere", CorpusManifest.read(tmp_path / "corpus"))
    from megatron_slm.config.schema import DeviceConfig, ParallelConfig

    assert scoring_config(opened, 16, ParallelConfig(), DeviceConfig()).model.dropout == 0.0
