"""Experts that are spread over data-parallel ranks with unequal work: the ranks stay in step, and
scores, log-probabilities and generated tokens are those of one process.
"""

import numpy as np
import pytest

from megatron_slm.config.schema import DeviceConfig, ModelConfig
from megatron_slm.data.score_store import ScoreStore
from megatron_slm.testing.corpora import TOKENIZER_FINGERPRINT, random_documents, write_corpus
from megatron_slm.testing.spawn import parallel_config, run_layouts_on_cpu
from tests.distributed.bench import save_reference

VOCABULARY = 97
WINDOW = 16
SHARDS = 3
MODEL = ModelConfig(
    layers=2,
    hidden_size=32,
    ffn_hidden_size=48,
    attention_heads=4,
    experts=4,
    vocabulary_size=VOCABULARY,
    initialization_std=0.3,
)
LAYOUTS: dict[str, dict] = {"one": {}, "dp2_ep2": {"dp": 2, "ep": 2}}
TOLERANCE_NATS = 1e-4


def rows_of_rank(dp_rank: int) -> list[list[int]]:
    """Seven sequences of ids for the first rank, two for the second."""
    random = np.random.default_rng(5)
    rows = [random.integers(0, VOCABULARY, length).tolist() for length in range(3, WINDOW - 6)]
    return [rows, rows[:2]][dp_rank]


def work(groups, layout: str, folder: str) -> tuple[list, list]:
    """Score the corpus, of whose three shards the second rank has one; then answer questions."""
    from megatron_slm.data.manifest import CorpusManifest
    from megatron_slm.data.score_manifest import ScoreManifest
    from megatron_slm.evaluation.text_model import TextModel
    from megatron_slm.evaluation.text_requests import Row, greedy
    from megatron_slm.scoring.corpus import TokenStream, score_corpus
    from megatron_slm.scoring.model import megatron_runner
    from megatron_slm.scoring.reference import load_scoring_model, open_reference, scoring_config

    if layout == "one":
        save_reference(groups, f"{folder}/run", MODEL, WINDOW)
    corpus = CorpusManifest.read(f"{folder}/corpus")
    reference = open_reference(f"{folder}/run", corpus)
    parallel = parallel_config(LAYOUTS[layout])
    config = scoring_config(reference, WINDOW, parallel, DeviceConfig())
    models = load_scoring_model(reference, config, groups)
    manifest = ScoreManifest(
        corpus.fingerprint,
        corpus.tokens,
        corpus.documents,
        TOKENIZER_FINGERPRINT,
        reference.fingerprint,
        "test",
        WINDOW,
        WINDOW,
        "packed",
        shard_tokens=-(-corpus.tokens // SHARDS),
        dtype="fp32",
        columns=("loss",),
    )
    stream = TokenStream(f"{folder}/corpus")
    store = ScoreStore.create(f"{folder}/{layout}", manifest)
    runner = megatron_runner(models, groups, stream, stream.plan(manifest), ("loss",), 2)
    score_corpus(runner, store, dp_rank=groups.dp_rank, dp_size=groups.dp_size)
    if groups.world_rank == 0:
        assert store.finish()
    text_model = TextModel(models, groups, VOCABULARY, batch_size=2)
    rows = rows_of_rank(groups.dp_rank)
    answers = text_model.log_probabilities([Row(ids, 2) for ids in rows])
    text_model.finish()
    continued = text_model.continued(rows, 5, greedy, lambda ids: ids[-1] % 5 == 0)
    text_model.finish()
    return answers, continued


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared_experts")
    documents = random_documents(8, 14, vocabulary_size=VOCABULARY, seed=4)
    write_corpus(folder / "corpus", documents, vocabulary_size=VOCABULARY)
    return folder, run_layouts_on_cpu(work, LAYOUTS, str(folder))


def test_scores_are_those_of_one_process(results):
    folder, _ = results
    of_one, of_two = (ScoreStore.open(folder / layout) for layout in LAYOUTS)
    tokens = of_one.manifest.corpus_tokens
    assert of_one.manifest.shard_count == SHARDS
    expected = of_one.read("loss", 0, tokens)
    assert np.isfinite(expected).sum() > tokens / 2
    np.testing.assert_allclose(of_two.read("loss", 0, tokens), expected, atol=TOLERANCE_NATS)


def test_answers_are_those_of_one_process(results):
    _, said = results
    [(answers, continued)] = said["one"]
    for rank, (of_rank, tokens_of_rank) in enumerate(said["dp2_ep2"]):
        count = len(rows_of_rank(rank))
        for (got, is_greedy), (expected, expected_greedy) in zip(
            of_rank, answers[:count], strict=True
        ):
            assert got == pytest.approx(expected, abs=TOLERANCE_NATS)
            assert is_greedy == expected_greedy
        assert tokens_of_rank == continued[:count]
    assert len({len(tokens) for tokens in continued}) > 1  # some stop early
