"""megatron_slm.submit with stand-ins for sbatch and squeue: dependencies, and every resume."""

import json

EVERYTHING = {
    "tokenizer",
    "corpus",
    "corpus.merge",
    "curated",
    "curated.split",
    "reference",
    "plain",
    "scores",
    "slm",
    "exported",
    "exported.check",
    "report",
}
DATA = ("tokenizer", "corpus", "corpus.merge", "curated", "curated.split")


def jobs_of(folder) -> dict[str, str]:
    lines = (folder / "out" / "pipeline" / "jobs.jsonl").read_text().splitlines()
    return {note["stage"]: note["job"] for note in map(json.loads, lines)}


def dependencies(line: str, jobs: dict[str, str]) -> set[str]:
    names = {job: name for name, job in jobs.items()}
    words = [word for word in line.split() if word.startswith("--dependency=afterok:")]
    return {names[job] for word in words for job in word.split(":")[1:]}


def test_every_stage_is_a_job_after_those_it_reads_from(cluster):
    assert cluster.submit() == 0
    assert set(cluster.submitted()) == EVERYTHING
    jobs = jobs_of(cluster.folder)
    found = {name: dependencies(line, jobs) for name, line in cluster.lines.items()}
    assert found == {
        "tokenizer": set(),
        "corpus": {"tokenizer"},
        "corpus.merge": {"corpus"},
        "curated": {"tokenizer"},
        "curated.split": {"curated"},
        "reference": {"tokenizer", "curated.split"},
        "plain": {"tokenizer", "corpus.merge", "curated.split"},
        "scores": {"reference", "corpus.merge"},
        "slm": {"tokenizer", "corpus.merge", "curated.split", "scores"},
        "exported": {"tokenizer", "slm"},
        "exported.check": {"exported", "curated.split"},
        "report": {"plain", "slm"},
    }


def test_each_kind_goes_through_its_script_with_its_resources(cluster):
    cluster.submit()
    cluster.submitted()
    lines, out = cluster.lines, cluster.folder / "out"
    assert "launch/preprocess.sbatch" in lines["corpus"]
    assert f"SLM_INPUT={cluster.folder}/text/corpus.jsonl SLM_MERGE= " in lines["corpus"]
    assert "--array=0-1 " in lines["corpus"]
    assert "--cpus-per-task=2 " in lines["corpus"]
    assert " SLM_MERGE=1 " in lines["corpus.merge"]
    assert "--array" not in lines["corpus.merge"]
    assert "processes=2 " in lines["slm"]
    assert "--nodes=2 " in lines["slm"]
    assert "--gpus-per-node=2 " in lines["slm"]
    assert lines["slm"].endswith(f"launch/train.sbatch --config {out}/pipeline/configs/slm.yaml")
    assert "launch/score.sbatch" in lines["scores"]
    assert "--array=0-2 " in lines["scores"]
    assert "launch/program.sbatch python -m megatron_slm.export_hf" in lines["exported"]
    assert all("--partition=all " in line for line in lines.values())
    assert all("--kill-on-invalid-dep=yes " in line for line in lines.values())


def test_the_folder_holds_the_description_the_settings_and_the_lines(cluster):
    cluster.submit("--report.corpus", "target")
    own = cluster.folder / "out" / "pipeline"
    assert "corpus: target" in (own / "description.yaml").read_text()
    config = (own / "configs" / "slm.yaml").read_text()
    assert f"- {cluster.folder}/out/scores" in config
    assert "keep_fraction: 0.6" in config
    assert "micro_batch_size" in (own / "configs" / "scores.yaml").read_text()
    script = (own / "submit.sh").read_text()
    assert "job_corpus_merge=$(SLM_ROOT=" in script
    assert "--dependency=afterok:${job_corpus}" in script


def test_a_dry_run_prints_every_line_and_changes_nothing(cluster, capsys):
    assert cluster.submit("--dry-run") == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == len(EVERYTHING)
    assert all("sbatch --parsable" in each for each in printed)
    assert cluster.submitted() == []
    assert not (cluster.folder / "out").exists()


def test_a_pipeline_that_was_submitted_is_not_submitted_again(cluster, capsys):
    cluster.submit()
    cluster.submitted()
    assert cluster.submit() == 2
    assert "--resume" in capsys.readouterr().err
    assert cluster.submit("--resume") == 0
    assert cluster.submitted() == []


def test_resume_submits_what_failed_and_what_waited_for_it(cluster):
    cluster.submit()
    cluster.finishes(*DATA, "reference", "plain")
    # scores failed, and SLURM cancelled what depended on it
    cluster.ends("scores", "slm", "exported", "exported.check", "report")
    cluster.submitted()
    assert cluster.submit("--resume") == 0
    assert cluster.submitted() == ["scores", "slm", "exported", "report", "exported.check"]
    assert dependencies(cluster.lines["scores"], jobs_of(cluster.folder)) == set()
    assert dependencies(cluster.lines["slm"], jobs_of(cluster.folder)) == {"scores"}


def test_resume_waits_for_jobs_that_still_run(cluster):
    cluster.submit()
    cluster.finishes(*DATA)
    cluster.ends("scores", "slm", "exported", "exported.check", "report")
    before = jobs_of(cluster.folder)
    cluster.submitted()
    cluster.submit("--resume")
    assert "reference" not in cluster.submitted()
    assert f"--dependency=afterok:{before['reference']} " in cluster.lines["scores"]


def test_a_job_that_can_never_start_is_cancelled_and_submitted_again(cluster):
    cluster.submit()
    cluster.finishes(*DATA, "reference", "plain")
    queue = cluster.folder / "queue"
    cluster.ends("scores")
    queue.write_text(queue.read_text().replace("Dependency", "DependencyNeverSatisfied"))
    before = jobs_of(cluster.folder)
    cluster.submitted()
    cluster.submit("--resume")
    assert cluster.submitted() == ["scores", "slm", "exported", "report", "exported.check"]
    cancelled = set((cluster.folder / "scancel.log").read_text().split())
    assert cancelled == {before[name] for name in ("slm", "exported", "report", "exported.check")}


def test_a_training_run_is_finished_with_its_last_step_alone(cluster):
    cluster.submit()
    cluster.finishes(*DATA, "reference", "scores")
    cluster.ends("plain", "slm", "exported", "exported.check", "report")
    for step in (2, 4):
        (cluster.folder / f"out/plain/checkpoints/step_{step:08d}").mkdir(parents=True)
    (cluster.folder / "out/slm/checkpoints/step_00000002").mkdir(parents=True)
    cluster.submitted()
    cluster.submit("--resume")
    assert cluster.submitted() == ["slm", "exported", "report", "exported.check"]
    assert (cluster.folder / "out/slm/checkpoints/step_00000002").is_dir()


def test_a_part_of_a_corpus_that_is_missing_is_made_again(cluster):
    cluster.submit()
    cluster.finishes("tokenizer", "curated", "curated.split", "reference")
    cluster.ends("corpus", "corpus.merge", "plain", "scores", "slm", "exported")
    cluster.ends("exported.check", "report")
    (cluster.folder / "out/corpus.shard-00000-of-00002.manifest.json").touch()
    cluster.submitted()
    cluster.submit("--resume")
    assert cluster.submitted()[:2] == ["corpus", "corpus.merge"]


def test_parts_that_were_joined_may_go(cluster):
    cluster.submit()
    cluster.finishes(*EVERYTHING)
    for path in (cluster.folder / "out").glob("corpus.shard-*"):
        path.unlink()
    cluster.submitted()
    assert cluster.submit("--resume") == 0
    assert cluster.submitted() == []


def test_a_program_that_left_files_and_failed_is_not_finished(cluster):
    cluster.submit()
    cluster.finishes(*DATA, "reference", "plain", "scores", "slm")
    cluster.ends("exported", "exported.check", "report")
    (cluster.folder / "out/exported").mkdir()
    (cluster.folder / "out/exported/config.json").touch()
    cluster.submitted()
    cluster.submit("--resume")
    assert cluster.submitted() == ["exported", "report", "exported.check"]


def test_changed_settings_redo_what_depends_on_them_and_keep_what_was_made(cluster, capsys):
    cluster.submit()
    cluster.finishes(*EVERYTHING)
    cluster.submitted()
    cluster.values["runs"]["slm"]["settings"]["selection"]["keep_fraction"] = 0.5
    assert cluster.submit("--resume") == 0
    assert cluster.submitted() == ["slm", "exported", "report", "exported.check"]
    assert "slm: its inputs or options have changed" in capsys.readouterr().out
    assert (cluster.folder / "out/earlier_1/slm/checkpoints/step_00000004").is_dir()
    assert not (cluster.folder / "out/slm").exists()


def test_changed_text_redoes_everything_made_from_it(cluster):
    cluster.submit()
    cluster.finishes(*EVERYTHING)
    cluster.submitted()
    (cluster.folder / "text/curated.jsonl").write_text('{"text": "better"}\n')
    cluster.submit("--resume")
    assert set(cluster.submitted()) == EVERYTHING - {"tokenizer", "corpus", "corpus.merge"}


def test_how_a_run_is_watched_and_laid_out_is_no_reason_to_train_again(cluster):
    cluster.submit()
    cluster.finishes(*EVERYTHING)
    cluster.submitted()
    cluster.values["training"]["settings"]["monitoring"] = {"log_interval_steps": 5}
    cluster.values["training"]["settings"]["parallel"] = {"tensor": 2}
    cluster.values["slurm"]["train"]["nodes"] = 4
    assert cluster.submit("--resume") == 0
    assert cluster.submitted() == []


def test_a_job_of_an_earlier_description_is_not_run_into(cluster, capsys):
    cluster.submit()
    cluster.finishes(*DATA)
    cluster.submitted()
    cluster.values["runs"]["plain"]["settings"] = {"run.seed": 7}
    assert cluster.submit("--resume") == 2
    assert "plain: job" in capsys.readouterr().err
    assert cluster.submitted() == []


def test_what_sbatch_refuses_is_said_before_anything_is_submitted(cluster, capsys):
    (cluster.folder / "refuse").write_text("invalid partition specified: all")
    assert cluster.submit() == 2
    assert "invalid partition specified" in capsys.readouterr().err
    assert cluster.submitted() == []
    assert not (cluster.folder / "out").exists()


def test_when_slurm_fails_in_between_the_rest_is_submitted_later(cluster, capsys):
    (cluster.folder / "fail_at").write_text("104")
    assert cluster.submit() == 4
    assert "slurmctld is away" in capsys.readouterr().err
    first = cluster.submitted()
    (cluster.folder / "fail_at").unlink()
    assert len(first) == 3
    assert cluster.submit("--resume") == 0
    assert set(cluster.submitted()) == EVERYTHING - set(first)


def test_status_says_where_each_stage_stands(cluster, capsys):
    cluster.submit()
    cluster.finishes(*DATA, "plain")
    cluster.ends("scores")
    capsys.readouterr()
    assert cluster.submit("--status") == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    jobs = jobs_of(cluster.folder)
    assert lines["plain"].split()[1:] == ["done", "4", "steps"]
    assert lines["reference"].split()[1:3] == ["pending", "job"]
    assert "unfinished" in lines["scores"]
    assert f"scores-{jobs['scores']}" in lines["scores"]
    assert set(lines) == EVERYTHING


def test_what_slurm_finished_is_finished_here_too(cluster, capsys):
    cluster.submit()
    cluster.finishes(*EVERYTHING)
    assert cluster.submit("--local") == 0
    done = [line for line in capsys.readouterr().out.splitlines() if "done before: " in line]
    assert {line.removeprefix("done before: ") for line in done} == EVERYTHING - {"corpus.merge"}


def test_beside_jobs_in_the_queue_nothing_runs_here(cluster, capsys):
    cluster.submit()
    assert cluster.submit("--local") == 2
    assert "jobs of this pipeline are in the queue; scancel 101 " in capsys.readouterr().err
