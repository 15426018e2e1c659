"""The preflight over real groups: every kind answers, and what one process differs in ends all of
them.
"""

import threading
from dataclasses import replace
from types import SimpleNamespace

import torch

from megatron_slm.testing.corpora import random_documents, write_corpus
from megatron_slm.testing.spawn import run_on_cpu
from tests.distributed.test_resume import CASES, VOCABULARY, Tokenizer, make_config


def look(groups, folder, other_torch: bool):
    """All findings as (check, state), the exit code where the job is refused, and the rank's own
    sentence.
    """
    from megatron_slm.data.corpora import open_corpora
    from megatron_slm.training import preflight, preflight_files, preflight_job
    from megatron_slm.training.setup import RunInputs

    config = make_config(folder, "run", CASES["fp32, own loss"], groups.dp_size)
    run_inputs = None
    found = []
    if groups.world_rank == 0:
        corpora = open_corpora([str(folder / "train")])
        run_inputs = RunInputs(Tokenizer(), corpora, {}, VOCABULARY)
        found = preflight_files.check_files(config, run_inputs, groups.world_size)
    if other_torch and groups.world_rank == 1:
        honest = preflight_job.facts

        def facts(*arguments):
            mine = honest(*arguments)
            return replace(mine, host="other", versions={**mine.versions, "torch": "1.0"})

        preflight_job.facts = facts
    findings = preflight_job.check_job(config, groups, run_inputs, found, thorough=not other_torch)
    try:
        preflight.raise_if_fatal(findings)
    except preflight.PreflightFailed as unfit:
        return [(each.check, each.state) for each in findings], unfit.exit_code, str(unfit)
    return [(each.check, each.state) for each in findings], 0, ""


def write_text(folder):
    documents = random_documents(40, 30, vocabulary_size=VOCABULARY)
    write_corpus(folder / "train", documents, vocabulary_size=VOCABULARY)


def test_every_kind_of_group_answers_and_is_timed(tmp_path):
    write_text(tmp_path)
    results = run_on_cpu(look, tmp_path, False, tp=2, pp=1, dp=2)
    assert [exit_code for _, exit_code, _ in results] == [0] * 4
    assert all(result == results[0] for result in results)
    states = dict(results[0][0])
    assert set(states.values()) <= {"ok", "warning"}  # a busy machine makes one group slow
    assert {"disk", "corpora", "versions", "memory", "groups", "group tp", "group dp"} <= set(
        states
    )
    assert (tmp_path / "run" / "preflight.txt").read_text().count("ok ") >= 7
    assert not list((tmp_path / "run").glob(".preflight*"))


def test_one_process_with_another_torch_ends_all_with_one_sentence(tmp_path):
    write_text(tmp_path)
    results = run_on_cpu(look, tmp_path, True, dp=2)
    assert results[0] == results[1]
    _, exit_code, sentence = results[0]
    assert exit_code == 2
    assert "version of torch: differs between nodes" in sentence
    assert "1.0 on other" in sentence


def test_groups_that_do_not_answer_in_time_are_told(capsys, monkeypatch):
    from megatron_slm.training import preflight_job

    monkeypatch.setattr(preflight_job.dist, "get_process_group_ranks", lambda group: group)
    groups = SimpleNamespace(
        tp=[0, 1], pp=[0], dp=[0, 2], cp=[0], ep=[0], device=torch.device("cpu")
    )
    ended = threading.Event()
    codes = []

    def end(code):
        codes.append(code)
        ended.set()

    with preflight_job.Deadline(0.01, "rank 0 on here", groups, end):
        assert ended.wait(60)
    assert codes == [2]
    said = capsys.readouterr().err
    assert "rank 0 on here: the processes of its groups (tp: [0, 1]; dp: [0, 2])" in said
    assert "GLOO_SOCKET_IFNAME" in said


def test_a_wrong_sum_over_a_group_refuses_the_job():
    from megatron_slm.training.preflight_job import groups_that_answer

    everyone = [SimpleNamespace(host=f"node{rank}") for rank in range(2)]
    right = {"dp": ([0, 1], True)}
    (fine,) = groups_that_answer([right, {}], everyone)
    assert (fine.state, fine.sentence) == ("ok", "dp of 2 answer")
    (wrong,) = groups_that_answer([right, {"dp": ([0, 1], False)}], everyone)
    assert wrong.state == "settings"
    assert "dp of ranks [0, 1] (node1)" in wrong.sentence
