import json
import os
import signal

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models

from megatron_slm.data.score_store import ScoreStore
from megatron_slm.scoring import importers
from megatron_slm.scoring.corpus import TokenStream, rescore, score_corpus
from megatron_slm.scoring.foreign_model import huggingface_fingerprint, transformers_runner
from megatron_slm.scoring.importers import (
    import_arrays,
    import_jsonl,
    read_array,
)
from megatron_slm.testing.corpora import random_documents, score_manifest, write_corpus
from megatron_slm.training.stop_signals import STOP_SIGNALS

VOCABULARY = 50


@pytest.fixture
def data(tmp_path):
    documents = random_documents(9, 15, vocabulary_size=VOCABULARY, seed=3)
    corpus = write_corpus(tmp_path / "c", documents, vocabulary_size=VOCABULARY)
    return tmp_path, documents, corpus


def expected(documents, value):
    """value(offset) as fp32, NaN at the first token of each document."""
    total = sum(map(len, documents))
    made = value(np.arange(total)).astype(np.float32)
    made[np.cumsum([0] + [len(document) for document in documents[:-1]])] = np.nan
    return made


@pytest.mark.parametrize(
    "suffix, save",
    [
        (".npy", lambda path, array: np.save(path, array)),
        (".npy", lambda path, array: np.save(path, array.astype(np.float16))),
        (".bin", lambda path, array: array.astype("<f4").tofile(path)),
        (".bin", lambda path, array: array.astype("<f2").tofile(path)),
    ],
)
def test_arrays(data, suffix, save):
    folder, documents, corpus = data
    path = folder / f"scores{suffix}"
    save(path, np.arange(corpus.tokens) / 4)
    store = ScoreStore.create(
        folder / "s", score_manifest(corpus, columns=("prior", "conditional"), dtype="fp16")
    )
    array = read_array(path, corpus.tokens)
    import_arrays(store, TokenStream(str(folder / "c")), {"prior": array, "conditional": array})
    assert store.finish()
    for column in store.columns:
        np.testing.assert_array_equal(
            ScoreStore.open(folder / "s").read(column, 0, corpus.tokens),
            expected(documents, lambda i: i / 4),
        )


def test_arrays_of_another_length_are_a_sentence(data):
    folder, _, corpus = data
    np.save(folder / "a.npy", np.zeros(corpus.tokens - 1))
    with pytest.raises(ValueError, match=f"each of the corpus's {corpus.tokens} tokens"):
        read_array(folder / "a.npy", corpus.tokens)
    (folder / "a.bin").write_bytes(b"123")
    with pytest.raises(ValueError, match="3 bytes; the corpus has"):
        read_array(folder / "a.bin", corpus.tokens)


def write_jsonl(path, documents, change=lambda number, record: record):
    offset = 0
    lines = []
    for number, document in enumerate(documents):
        logprobs = (-np.arange(offset, offset + len(document)) / 4).tolist()
        logprobs[0] = None
        lines.append(
            json.dumps(change(number, {"logprobs": logprobs, "token_ids": document.tolist()}))
        )
        offset += len(document)
    path.write_text("\n".join(lines) + "\n")


def test_jsonl_of_log_probabilities(data):
    folder, documents, corpus = data
    write_jsonl(folder / "l.jsonl", documents)
    store = ScoreStore.create(folder / "s", score_manifest(corpus))
    store.write_shard(1, {"loss": np.full(64, 5.0)})  # a finished shard is kept
    import_jsonl(store, TokenStream(str(folder / "c")), folder / "l.jsonl")
    assert store.finish()
    read = store.read("loss", 0, corpus.tokens)
    np.testing.assert_array_equal(read[64:128], 5.0)
    np.testing.assert_array_equal(
        np.delete(read, np.s_[64:128]),
        np.delete(expected(documents, lambda i: i / 4), np.s_[64:128]),
    )


@pytest.mark.parametrize(
    "change, sentence",
    [
        (
            lambda n, r: {**r, "logprobs": r["logprobs"][:-1]} if n == 4 else r,
            r"line 5 \(document 4\): .* log-probabilities for",
        ),
        (
            lambda n, r: {**r, "token_ids": [9] * len(r["token_ids"])} if n == 2 else r,
            r"document 2\): its token_ids",
        ),
        (
            lambda n, r: {"logprobs": [1.0] * len(r["logprobs"])}
            if n == 0 and len(r["logprobs"]) > 1
            else r,
            "above 0",
        ),
        (lambda n, r: {"x": 1} if n == 3 else r, "document 3.*expected"),
    ],
)
def test_jsonl_that_does_not_fit_names_the_document(data, change, sentence):
    folder, documents, corpus = data
    write_jsonl(folder / "l.jsonl", documents, change)
    store = ScoreStore.create(folder / "s", score_manifest(corpus))
    with pytest.raises(ValueError, match=sentence):
        import_jsonl(store, TokenStream(str(folder / "c")), folder / "l.jsonl")
    assert not store.finish()


def test_jsonl_with_too_few_or_too_many_documents(data):
    folder, documents, corpus = data
    stream = TokenStream(str(folder / "c"))
    for records, sentence in (
        (documents[:-1], "ends before the corpus does"),
        ([*documents, documents[0]], "more records than"),
    ):
        write_jsonl(folder / "l.jsonl", records)
        store = ScoreStore.create(folder / f"s{len(records)}", score_manifest(corpus))
        with pytest.raises(ValueError, match=sentence):
            import_jsonl(store, stream, folder / "l.jsonl")


def test_a_huggingface_model_gives_what_plain_torch_gives(data):
    from transformers import LlamaConfig, LlamaForCausalLM

    folder, documents, corpus = data
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.4,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder / "model")
    stream = TokenStream(str(folder / "c"))
    manifest = score_manifest(
        corpus,
        columns=("loss", "entropy"),
        document_policy="isolated",
        window_tokens=64,
        stride_tokens=64,
        reference_fingerprint=huggingface_fingerprint(folder / "model"),
    )
    store = ScoreStore.create(folder / "s", manifest)
    runner = transformers_runner(
        folder / "model",
        stream,
        stream.plan(manifest),
        manifest.columns,
        micro_batch_size=3,
        vocabulary_size=VOCABULARY,
    )
    report = score_corpus(runner, store)
    assert report.shards_written == manifest.shard_count
    assert report.without_score == {"loss": 0, "entropy": 0}
    assert store.finish()
    offset = 0
    for document in documents:
        with torch.no_grad():
            # All 64 rows, although the tokenizer has fewer ids: it is the softmax the model was
            # trained with, and the one of our scorer once the model is imported.
            logits = model(torch.from_numpy(document[None])).logits[0].double()
            assert logits.shape[-1] > VOCABULARY
        log_p = logits.log_softmax(-1)[:-1]
        losses = -log_p[torch.arange(len(document) - 1), torch.from_numpy(document[1:])]
        read = store.read("loss", offset, len(document))
        assert np.isnan(read[0])
        np.testing.assert_allclose(read[1:], losses, atol=1e-4)
        np.testing.assert_allclose(
            store.read("entropy", offset, len(document))[1:],
            -(log_p.exp() * log_p).sum(-1),
            atol=1e-4,
        )
        offset += len(document)
    assert rescore(runner, store, 4)["loss"] < 1e-5
    wrong = ScoreStore.create(folder / "wrong", manifest)
    for shard in range(manifest.shard_count):
        start, end = manifest.shard_range(shard)
        wrong.write_shard(
            shard,
            {
                "loss": store.read("loss", start, end - start) + 1,
                "entropy": store.read("entropy", start, end - start),
            },
        )
    assert rescore(runner, wrong, 4)["loss"] == pytest.approx(1, abs=1e-4)
    with pytest.raises(ValueError, match="knows 64 tokens"):
        transformers_runner(
            folder / "model", stream, stream.plan(manifest), ("loss",), vocabulary_size=65
        )


def test_a_folder_without_a_model_is_a_sentence(tmp_path):
    with pytest.raises(ValueError, match="no local Hugging Face model"):
        huggingface_fingerprint(tmp_path)


def test_the_program_joins_columns_of_two_stores(data, capsys, monkeypatch):
    from megatron_slm import import_scores

    folder, documents, corpus = data
    common = ["--corpus", str(folder / "c"), "--window-tokens", "16", "--dtype", "fp32"]
    np.save(folder / "a.npy", np.arange(corpus.tokens) / 2)
    write_jsonl(folder / "l.jsonl", documents)
    assert (
        import_scores.main(
            [*common, "--output", str(folder / "first"), "--column", f"loss={folder}/a.npy"]
        )
        == 0
    )
    assert (
        import_scores.main(
            [*common, "--output", str(folder / "second"), "--jsonl", f"{folder}/l.jsonl"]
        )
        == 0
    )
    assert (
        import_scores.main(
            [
                *common,
                "--output",
                str(folder / "both"),
                "--column",
                f"prior={folder}/first/loss.bin",
                "--column",
                f"conditional={folder}/second/loss.bin",
                "--description",
                "two references",
            ]
        )
        == 0
    )
    store = ScoreStore.open(folder / "both")
    assert store.manifest.complete
    assert store.manifest.reference_description == "two references"
    assert "mean prior" in capsys.readouterr().out
    monkeypatch.setattr(importers, "import_job", lambda *_: pytest.fail("filled again"))
    first = [*common, "--output", str(folder / "first"), "--column", f"loss={folder}/a.npy"]
    assert import_scores.main(first) == 0
    assert "done before, complete" in capsys.readouterr().out
    np.testing.assert_array_equal(
        store.read("prior", 0, corpus.tokens), expected(documents, lambda i: i / 2)
    )
    np.testing.assert_array_equal(
        store.read("conditional", 0, corpus.tokens), expected(documents, lambda i: i / 4)
    )


def test_ctrl_c_ends_an_import_with_its_finished_shards(data, capfd, monkeypatch):
    from megatron_slm import import_scores

    folder, _, corpus = data
    np.save(folder / "a.npy", np.arange(corpus.tokens) / 2)
    monkeypatch.setattr(importers, "import_job", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a test run in the background ignores it
    command = ["--corpus", str(folder / "c"), "--window-tokens", "16"]
    try:
        with pytest.raises(SystemExit) as left:
            import_scores.main(
                [*command, "--output", str(folder / "s"), "--column", f"loss={folder}/a.npy"]
            )
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert left.value.code == 85
    assert "finished shards are kept, and the same command continues" in capfd.readouterr().err


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ([], "exactly one source"),
        (["--jsonl", "a", "--column", "b=c"], "exactly one source"),
        (["--column", "b"], "NAME=FILE"),
        (["--huggingface", "x", "--columns", "margin"], "loss,entropy"),
        (["--huggingface", "a", "--shard", "2/2"], "i from 0 to n - 1"),
        (
            ["--jsonl", "a", "--shard", "0/2", "--precision", "bf16"],
            "--precision goes with --huggingface only, leave it out; --shard goes with",
        ),
        (["--column", "loss=a", "--key", "lp"], "--key goes with --jsonl only"),
    ],
)
def test_bad_usage_is_a_sentence(tmp_path, capsys, arguments, sentence):
    from megatron_slm import import_scores

    assert (
        import_scores.main(
            ["--corpus", "c", "--output", str(tmp_path / "s"), "--window-tokens", "8", *arguments]
        )
        == 2
    )
    assert sentence in capsys.readouterr().err


def test_bad_data_is_a_sentence_and_leaves_nothing(data, capsys):
    from megatron_slm import import_scores

    folder, _, _ = data
    assert (
        import_scores.main(
            [
                "--corpus",
                str(folder / "c"),
                "--output",
                str(folder / "s"),
                "--window-tokens",
                "8",
                "--column",
                f"loss={folder}/none.npy",
            ]
        )
        == 3
    )
    assert "none.npy" in capsys.readouterr().err
    assert not (folder / "s").exists()


def test_a_model_with_another_tokenizer_is_refused_before_it_is_loaded(data, capsys):
    from megatron_slm import import_scores

    folder, _, _ = data
    model = folder / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"")
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1}, unk_token="<unk>"))
    backend.save(str(model / "tokenizer.json"))
    words = ["--corpus", str(folder / "c"), "--output", str(folder / "s"), "--window-tokens", "16"]
    assert import_scores.main([*words, "--huggingface", str(model)]) == 3
    assert "has another tokenizer than" in capsys.readouterr().err
    assert not (folder / "s").exists()


@pytest.mark.parametrize(
    "source, sentence",
    [
        (("--jsonl", "l.jsonl"), "start it without torchrun"),
        (("--huggingface", "m", "--device", "cuda:0"), "would share this GPU"),
    ],
)
def test_processes_that_would_have_no_work_are_refused(source, sentence, capsys, monkeypatch):
    from megatron_slm import import_scores

    monkeypatch.setenv("WORLD_SIZE", "2")
    words = ["--corpus", "c", "--output", "s", "--window-tokens", "16", *source]
    assert import_scores.main(words) == 2
    assert sentence in capsys.readouterr().err
