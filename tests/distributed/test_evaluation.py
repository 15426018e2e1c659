"""An evaluation measures what validation in training measures, in every layout, and what plain
torch gives; a Hugging Face folder gives the same numbers.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_slm.config.load import to_yaml
from megatron_slm.config.schema import Config, CorpusConfig, DataConfig
from megatron_slm.testing.corpora import random_documents, write_corpus, write_scores
from megatron_slm.testing.spawn import parallel_config, run_layouts_on_cpu, run_on_cpu
from tests.distributed.bench import save_reference
from tests.distributed.test_scoring import MODEL, VOCABULARY, WINDOW
from tests.end_to_end.warm_programs import run_program

LAYOUTS = {
    "one": {},
    "dp2": {"dp": 2},
    "tp2": {"tp": 2, "sequence_parallel": True},
    "pp2": {"pp": 2},
    "cp2": {"cp": 2},
}
POLICIES = ("packed", "isolated")
TOLERANCE_NATS = 2e-5


def set_settings(folder: str) -> list:
    from megatron_slm.evaluation.options import TokenSetConfig

    return [
        TokenSetConfig("odd", "held_out", tokens=f"{folder}/odd.npy"),
        TokenSetConfig("top", "held_out", scores=f"{folder}/scores", top_fraction=0.3),
    ]


def rows_of_ids() -> list[list[int]]:
    """Sequences of 2 to WINDOW + 1 ids, in no order of length."""
    random = np.random.default_rng(2)
    lengths = random.permutation(np.arange(2, WINDOW + 2))
    return [random.integers(0, VOCABULARY, length).tolist() for length in lengths]


def answer(groups, layout: str, folder: str) -> dict:
    """What a TextModel says of `rows_of_ids` in this layout."""
    from megatron_slm.config.schema import DeviceConfig
    from megatron_slm.evaluation.text_model import TextModel
    from megatron_slm.evaluation.text_requests import Row, greedy, sampler
    from megatron_slm.scoring.reference import load_scoring_model, open_reference, scoring_config

    reference = open_reference(f"{folder}/run", None)
    config = scoring_config(reference, WINDOW, parallel_config(LAYOUTS[layout]), DeviceConfig())
    models = load_scoring_model(reference, config, groups)
    text_model = TextModel(models, groups, VOCABULARY, batch_size=3)
    rows = [Row(ids, max(1, len(ids) // 2)) for ids in rows_of_ids()]
    prompts = [ids[:8] for ids in rows_of_ids()]
    return {
        "log_probabilities": text_model.log_probabilities(rows),
        "continued": text_model.continued(prompts, 6, greedy, lambda ids: ids[-1] % 7 == 0),
        "drawn": text_model.continued(prompts, 6, sampler(2.0, 0, 1.0), lambda ids: False),
    }


def measure(groups, layout: str, folder: str) -> dict:
    """{policy: (an evaluation's metrics, validation's)} in this layout."""
    from megatron_slm.data.corpora import open_corpora
    from megatron_slm.evaluation.job import prepare
    from megatron_slm.evaluation.measure import measure_corpora
    from megatron_slm.evaluation.models import load_losses
    from megatron_slm.evaluation.options import EvaluateOptions
    from megatron_slm.scoring.reference import load_scoring_model
    from megatron_slm.training.evaluate import validate
    from megatron_slm.training.loaders import validation_loaders
    from megatron_slm.training.rank_batches import ValidationOnThisRank
    from megatron_slm.training.setup import RunInputs

    parallel = parallel_config(LAYOUTS[layout])
    [corpus] = open_corpora([f"{folder}/corpus"])
    measured = {}
    for policy in POLICIES:
        options = EvaluateOptions(
            checkpoint=f"{folder}/run",
            document_policy=policy,
            micro_batch_size=2,
            parallel=parallel,
            token_sets=set_settings(folder),
        )
        job = prepare(options, groups.world_size)
        metrics, _ = measure_corpora(job, load_losses(job, groups), groups)
        config = replace(job.config, run=replace(job.config.run, folder=f"{folder}/run"))
        inputs = RunInputs(None, [], {"held_out": corpus}, VOCABULARY)
        loaders = {
            name: ValidationOnThisRank(loader, groups)
            for name, loader in validation_loaders(config, inputs, groups).items()
        }
        models = load_scoring_model(job.checkpoint, config, groups)
        measured[policy] = (metrics, validate(models, loaders, groups))
    return measured


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A run with a checkpoint and a validation corpus, its export, and two token sets."""
    folder = tmp_path_factory.mktemp("evaluation")
    documents = random_documents(14, 14, vocabulary_size=VOCABULARY, seed=4)
    corpus = write_corpus(folder / "corpus", documents, vocabulary_size=VOCABULARY)
    write_scores(folder / "scores", folder / "corpus", lambda offsets: (offsets * 7919) % 13)
    np.save(folder / "odd.npy", np.arange(corpus.tokens) % 2 == 1)
    run_on_cpu(save_reference, str(folder / "run"), MODEL, WINDOW)
    data = DataConfig(
        validation=[CorpusConfig("held_out", str(folder / "corpus"))], sequence_length=WINDOW
    )
    (folder / "run" / "config.yaml").write_text(to_yaml(Config(model=MODEL, data=data)))
    run_program(
        "megatron_slm.export_hf",
        *("--checkpoint", folder / "run", "--output", folder / "exported", "--tokenizer", "none"),
    )
    return folder


@pytest.fixture(scope="module")
def truth(folder) -> dict[str, dict[str, float]]:
    """The metrics by plain torch, one sample and document at a time."""
    from transformers import AutoModelForCausalLM

    from megatron_slm.data.indexed import open_tokens, read_index

    model = AutoModelForCausalLM.from_pretrained(folder / "exported").eval()
    index = read_index(folder / "corpus.idx")
    tokens = np.array(open_tokens(folder / "corpus", index)[:]).astype(np.int64)
    starts = set(index.non_empty_starts_tokens().tolist())
    order = (np.arange(len(tokens)) * 7919) % 13
    order = np.where([offset in starts for offset in range(len(tokens))], -1, order)
    top = np.lexsort((np.arange(len(tokens)), -order))
    top = set(top[: int(np.ceil(0.3 * (len(tokens) - len(starts))))].tolist())
    found = {}
    for policy in POLICIES:
        losses = {}
        for offset in range(1, len(tokens)):
            first = (offset - 1) // WINDOW * WINDOW
            if policy == "isolated":
                first = max(first, max(start for start in starts if start < offset))
            if offset not in starts:
                with torch.no_grad():
                    logits = model(torch.tensor(tokens[None, first:offset])).logits[0, -1].double()
                losses[offset] = -float(logits.log_softmax(-1)[tokens[offset]])
        chosen = {"": losses, "odd/": {i for i in losses if i % 2}, "top/": top & losses.keys()}
        found[policy] = {}
        for name, of_set in chosen.items():
            of_tokens = [losses[offset] for offset in of_set]
            found[policy][f"validation/held_out/{name}loss"] = np.mean(of_tokens)
            found[policy][f"validation/held_out/{name}tokens"] = len(of_set)
    return found


def test_every_layout_measures_what_training_does_and_plain_torch(folder, truth):
    results = run_layouts_on_cpu(measure, LAYOUTS, str(folder))
    for layout, ranks in results.items():
        for policy, (metrics, validated) in ranks[-1].items():
            for name, expected in truth[policy].items():
                got = metrics[name]
                assert got == pytest.approx(expected, abs=TOLERANCE_NATS), (layout, policy, name)
            for name, expected in validated.items():
                assert metrics[name] == pytest.approx(expected, rel=1e-6), (layout, policy, name)
    assert truth["packed"] != truth["isolated"]


def test_a_text_model_answers_as_transformers_in_every_layout(folder):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "exported").eval()
    expected = []
    continued = []
    for ids in rows_of_ids():
        with torch.no_grad():
            log_p_SV = model(torch.tensor([ids[:-1]])).logits[0].double().log_softmax(-1)
        asked = max(1, len(ids) // 2)
        of_asked_S = log_p_SV[torch.arange(len(ids) - 1), torch.tensor(ids[1:])][-asked:]
        greedy = log_p_SV.argmax(-1)[-asked:].tolist() == ids[-asked:]
        expected.append((float(of_asked_S.sum()), greedy))
        text = ids[:8]
        while len(text) < min(len(ids), 8) + 6 and (text == ids[:8] or text[-1] % 7):
            with torch.no_grad():
                text = [*text, int(model(torch.tensor([text])).logits[0, -1].argmax())]
        continued.append(text[len(ids[:8]) :])
    for layout, ranks in run_layouts_on_cpu(answer, LAYOUTS, str(folder)).items():
        for said in ranks:
            for got, wanted in zip(said["log_probabilities"], expected, strict=True):
                assert got[0] == pytest.approx(wanted[0], abs=1e-4), layout
                assert got[1] == wanted[1], layout
            assert said["continued"] == continued, layout
            assert said["drawn"] == ranks[0]["drawn"], layout
    assert len({len(text) for text in continued}) > 1  # some stop, some reach the limit


def evaluate(folder: Path, *words, processes: int = 1, exit_code: int = 0):
    sets = f"[{{name: odd, corpus: held_out, tokens: {folder}/odd.npy}}]"
    return run_program(
        "megatron_slm.evaluate",
        *("--output", folder / "result.json", "--token-sets", sets, "--device.kind", "cpu"),
        *words,
        processes=processes,
        exit_code=exit_code,
    )


@pytest.mark.parametrize("policy", POLICIES)
def test_a_huggingface_folder_gives_the_same_numbers_on_two_processes(folder, truth, policy):
    corpora = f"[{{name: held_out, corpus: {folder}/corpus}}]"
    evaluate(
        folder,
        *("--huggingface", folder / "exported", "--sequence-length", WINDOW),
        *("--corpora", corpora, "--document-policy", policy, "--micro-batch-size", 3),
        processes=2,
    )
    metrics = json.loads((folder / "result.json").read_text())["metrics"]
    for name, expected in truth[policy].items():
        if "/top/" not in name:
            assert metrics[name] == pytest.approx(expected, abs=TOLERANCE_NATS), name


def test_the_program_keeps_the_results_in_the_run_and_says_what_it_left_out(folder, truth):
    done = evaluate(folder, "--checkpoint", folder / "run", "--sequences", 0)
    assert "bits per byte are left out" in done.stderr
    assert "held_out" in done.stdout
    assert f"results: {folder / 'run' / 'evaluations.jsonl'}" in done.stdout
    [line] = (folder / "run" / "evaluations.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert record == json.loads((folder / "result.json").read_text())
    assert record["step"] == 3
    assert record["metrics"] == pytest.approx(
        {name: value for name, value in truth["packed"].items() if "/top/" not in name}
        | {"validation/held_out/perplexity": np.exp(truth["packed"]["validation/held_out/loss"])},
        rel=1e-5,
    )
    assert set(record["token_sets"]) == {"held_out/odd"}


def test_a_part_of_a_corpus_is_the_same_part_in_every_batch_size(folder):
    found = []
    for words in (("--micro-batch-size", 1), ("--micro-batch-size", 5)):
        evaluate(folder, "--checkpoint", folder / "run", "--sequences", 3, *words)
        found.append(json.loads((folder / "result.json").read_text())["metrics"])
    assert found[0]["validation/held_out/tokens"] <= 3 * WINDOW
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_data_of_something_else_is_refused_before_a_model_is_loaded(folder, capfd):
    from megatron_slm import evaluate as program

    write_corpus(folder / "other", random_documents(3, 9), tokenizer_fingerprint="sha256:other")
    np.save(folder / "short.npy", np.zeros(3, bool))
    words = ["--checkpoint", str(folder / "run")]
    corpora = f"[{{name: a, corpus: {folder}/other}}, {{name: b, corpus: {folder}/nowhere}}]"
    sets = (
        f"[{{name: s, corpus: held_out, tokens: {folder}/short.npy}}, "
        "{name: t, corpus: unheard, tokens: x.npy}]"
    )
    assert program.main([*words, "--corpora", corpora]) == 3
    printed = capfd.readouterr().err
    assert "was trained with the tokenizer" in printed
    assert "no such corpus" in printed
    assert program.main([*words, "--token-sets", sets]) == 3
    printed = capfd.readouterr().err
    assert "expected one bool for each" in printed
    assert "expected one of held_out" in printed
    assert program.main([*words, "--wandb", "true"]) == 2
    assert "has no W&B run" in capfd.readouterr().err
