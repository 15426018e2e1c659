"""A description is refused with all its problems at once; its settings reach the programs."""

import shlex

import pytest
import yaml

from megatron_slm.config.schema import Config, SelectionConfig
from megatron_slm.pipeline.models import named_code
from megatron_slm.pipeline.names import Names
from megatron_slm.training.setup import RunInputError


def refused(cluster, capsys, *words: str, code: int = 2) -> str:
    assert cluster.submit(*words) == code
    assert cluster.submitted() == []
    assert not (cluster.folder / "out").exists()
    return capsys.readouterr().err


def test_every_problem_of_every_stage_is_said_at_once(cluster, capsys):
    cluster.values["corpora"]["corpus"]["worker"] = 2
    cluster.values["runs"]["slm"]["settings"]["selection"]["scorer"] = "exces_loss"
    cluster.values["runs"]["plain"]["train"] = ["corpsu"]
    cluster.values["scores"]["scores"]["settings"] = {"window_token": 3}
    cluster.values["report"]["runs"] = ["plain", "smm"]
    said = refused(cluster, capsys)
    assert (
        "corpora.corpus.worker: unknown field (got 2); did you mean corpora.corpus.workers?" in said
    )
    del cluster.values["corpora"]["corpus"]["worker"]
    said = refused(cluster, capsys)
    assert "5 problems" not in said
    assert "4 problems" in said
    assert "runs.slm: selection.scorer: " in said or "runs.slm: " in said
    assert "runs.plain.train: got 'corpsu'; did you mean corpus?" in said
    assert "scores.scores.settings: window_token: unknown field" in said
    assert "report.runs: got 'smm'; did you mean slm?" in said


def test_settings_of_the_layout_are_held_against_the_processes_of_each_place(cluster, capsys):
    cluster.values["training"]["settings"]["parallel"] = {"tensor": 4}
    cluster.values["training"]["settings"]["model"] = {
        **cluster.values["training"]["settings"]["model"],
        "query_groups": 4,
        "attention_heads": 4,
    }
    assert cluster.assembled()  # 2 nodes of 2 processes
    said = refused(cluster, capsys, "--local", "--local.processes", "2")
    assert "runs.slm: parallel: tensor 4 x pipeline 1" in said


def test_the_layout_of_a_scoring_is_checked_before_there_is_a_reference(cluster, capsys):
    cluster.values["scores"]["scores"]["settings"] = {"parallel.pipeline": 2}
    said = refused(cluster, capsys)
    assert "scores.scores.settings: parallel: tensor 1 x pipeline 2" in said


def test_what_the_pipeline_sets_cannot_be_set_beside_it(cluster, capsys):
    cluster.values["runs"]["slm"]["settings"]["run"] = {"folder": "elsewhere"}
    cluster.values["runs"]["slm"]["settings"]["data.train"] = ["data/other"]
    cluster.values["slurm"]["sbatch"] = {"dependency": "singleton", "time": 14400, "expor": "NONE"}
    cluster.values["slurm"]["train"]["sbatch"] = {"export-file": "theirs"}
    said = refused(cluster, capsys)
    assert "runs.slm.settings.run.folder: is set by the pipeline" in said
    assert "runs.slm.settings.data.train: is set by the pipeline; name the corpora" in said
    assert "slurm.sbatch.dependency: dependencies follow from the description" in said
    assert "slurm.sbatch.time: got 14400; write it in quotes" in said
    assert "slurm.sbatch.expor: jobs get the environment" in said
    assert "slurm.train.sbatch.export-file: an environment can name code" in said


def test_a_setting_given_in_its_section_and_dotted_is_refused(cluster, capsys):
    cluster.values["training"]["settings"]["schedule"] = {"train_steps": 9}
    said = refused(cluster, capsys)
    assert "training.settings.schedule.train_steps: is given twice" in said


def test_stages_that_wait_for_each_other_are_refused(cluster, capsys):
    cluster.values["runs"]["reference"]["start_from"] = "slm"
    said = refused(cluster, capsys)
    assert "wait for each other in a circle" in said
    assert "slm needs" in said


def test_names_that_would_share_files_are_refused(cluster, capsys):
    cluster.values["runs"]["curated_train"] = {"train": ["corpus"]}
    cluster.values["runs"]["report"] = {"train": ["corpus"]}
    cluster.values["runs"]["a/b"] = {"train": ["corpus"]}
    said = refused(cluster, capsys)
    assert "runs.curated_train: the name is taken" in said
    assert "runs.report: the name is taken" in said
    assert "runs.a/b: a name has letters" in said


def test_missing_files_alone_are_bad_data(cluster, capsys):
    cluster.values["corpora"]["corpus"]["input"] = ["text/*.parquet"]
    cluster.values["runs"]["plain"]["start_from"] = "runs/nowhere"
    said = refused(cluster, capsys, code=3)
    assert "text/*.parquet: no such file or folder, and no file matches it" in said
    assert "runs.plain.start_from: " in said
    assert "runs/nowhere: no such checkpoint" in said
    with pytest.raises(RunInputError):
        cluster.assembled()


def test_text_that_a_stage_makes_need_not_be_there(cluster):
    cluster.values["text"] = {"command": ["python", "write.py", "{folder}/text"]}
    cluster.values["corpora"]["corpus"]["input"] = ["{folder}/text/corpus.jsonl"]
    stages = {stage.name: stage for stage in cluster.assembled().stages}
    assert "text" in stages["corpus"].after
    assert "text" not in stages["curated"].after
    assert stages["text"].command[-1] == f"{cluster.folder}/out/text"


def test_spaces_that_the_batch_script_would_split_at_are_refused(cluster, capsys):
    (cluster.folder / "text" / "my corpus.jsonl").touch()
    cluster.values["corpora"]["corpus"]["input"] = ["text/my corpus.jsonl"]
    said = refused(cluster, capsys)
    assert "'text/my corpus.jsonl' has spaces" in said
    assert cluster.assembled(local=True)


def test_settings_come_in_layers_over_the_recipe(cluster):
    recipe = {"schedule": {"train_steps": 99, "style": "cosine"}, "run": {"seed": 5}}
    (cluster.folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    cluster.values["training"]["config"] = "recipe.yaml"
    cluster.values["runs"]["slm"]["settings"]["schedule.warmup_fraction"] = 0.5
    config = yaml.safe_load(cluster.assembled().configs["slm"])
    assert config["run"]["seed"] == 5
    assert config["schedule"]["train_steps"] == 4
    assert config["schedule"]["warmup_fraction"] == 0.5
    assert config["schedule"]["style"] == "cosine"
    assert config["data"]["validation"] == [
        {"name": "target", "corpus": f"{cluster.folder}/out/curated_held_out"}
    ]


def test_every_option_of_a_corpus_reaches_its_program(cluster):
    from data_tools.preprocess import build_parser, settings_of

    (cluster.folder / "keep.py").write_text("def keep(text, record):\n    return True\n")
    cluster.values["corpora"]["curated"] |= {
        "format": "jsonl",
        "include": ["*.jsonl"],
        "text_key": ["title", "text"],
        "append_eod": False,
        "prepend_bos": True,
        "max_bad_fraction": 0.1,
        "min_characters": 3,
        "max_characters": 9,
        "drop_duplicates": True,
        "keep_if": "keep.py:keep",
        "workers": 3,
    }
    [stage] = [each for each in cluster.assembled().stages if each.name == "curated"]
    settings = settings_of(build_parser().parse_args(stage.command[3:]))
    assert (settings.file_format, settings.include, settings.workers) == ("jsonl", ("*.jsonl",), 3)
    assert (settings.encode.keys, settings.encode.append_eod) == (("title", "text"), False)
    assert (settings.encode.prepend_bos, settings.max_bad_fraction) == (True, 0.1)
    filters = settings.encode.filters
    assert (filters.min_characters, filters.max_characters) == (3, 9)
    assert filters.drop_duplicates
    assert filters.keep_if.endswith("keep.py:keep")


def test_every_option_of_the_tokenizer_reaches_its_program(cluster):
    from tokenizer.train import build_parser

    cluster.values["tokenizer"] |= {
        "model_type": "unigram",
        "sample_bytes": 7,
        "text_key": ["title", "text"],
        "include": ["*.py"],
        "special_tokens": ["<|a|>", "<|b|>"],
    }
    [stage] = [each for each in cluster.assembled().stages if each.name == "tokenizer"]
    options = build_parser().parse_args(stage.command[3:])
    assert (options.model_type, options.sample_bytes, options.vocab_size) == ("unigram", 7, 600)
    assert (options.text_key, options.include) == (["title", "text"], ["*.py"])
    assert options.special_token == ["<|a|>", "<|b|>"]


def test_a_path_stands_for_what_exists(cluster, capsys):
    from megatron_slm.config.load import from_mapping
    from megatron_slm.pipeline.description import Pipeline

    description, _ = from_mapping(cluster.values, Pipeline)
    names = Names(description)
    assert names.corpus("corpus", "x").after == ("corpus.merge",)
    assert names.corpus("curated_train", "x").after == ("curated.split",)
    assert names.corpus("data/elsewhere", "x").after == ()
    assert names.data
    assert not names.settings


def test_a_description_alone_runs_no_code_from_elsewhere(cluster, capsys):
    (cluster.folder / "mine.py").write_text(
        "raise SystemExit('the code of a description was run')\n"
    )
    cluster.values["text"] = {"command": ["python", "mine.py", "{folder}/text"]}
    cluster.values["corpora"]["corpus"]["keep_if"] = "mine.py:keep"
    cluster.values["runs"]["slm"]["settings"]["selection"]["scorer"] = "mine.py:score"
    said = refused(cluster, capsys)
    assert "text.command: the description names python" in said
    assert "corpora.corpus.keep_if: the description names mine.py:keep" in said
    assert "runs.slm.settings.selection.scorer: the description names mine.py:score" in said
    cluster.values["text"]["command"] = ["python", f"{cluster.folder}/../../../etc/x.py"]
    assert "text.command" in refused(cluster, capsys)


def test_a_recipe_alone_runs_no_code(cluster, capsys):
    (cluster.folder / "mine.py").write_text("raise SystemExit('the code of a recipe was run')\n")
    (cluster.folder / "recipe.yaml").write_text("selection: {scorer: 'mine.py:score'}\n")
    cluster.values["training"]["config"] = "recipe.yaml"
    assert "recipe.yaml names mine.py:score" in refused(cluster, capsys)


def test_code_that_the_command_line_names_is_named_to_the_programs_too(cluster):
    (cluster.folder / "mine.py").touch()
    words = ["--corpora.corpus.keep_if", "mine.py:keep", "--text.command", "[bash, mine.sh]"]
    assert cluster.submit(*words) == 0
    text = (cluster.folder / "out" / "pipeline" / "submit.sh").read_text()
    assert f"--keep-if {cluster.folder}/mine.py:keep" in text
    selection = SelectionConfig(scorer="/x/mine.py:a", scorer_options={"of": ["/x/mine.py:b"]})
    assert named_code(Config(selection=selection)) == [
        "--selection.scorer",
        "/x/mine.py:a",
        "--selection.scorer_options",
        "{of: ['/x/mine.py:b']}",
    ]


def test_parts_in_files_are_named_to_the_jobs_with_their_whole_paths(cluster):
    (cluster.folder / "mine.py").write_text("raise SystemExit('the code of a part was run')\n")
    words = ["--runs.slm.settings.optimizer.kind", "mine.py:lion"]
    assert cluster.submit(*words, "--runs.slm.settings.monitoring.sinks", "[mine.py:Sink]") == 0
    text = (cluster.folder / "out" / "pipeline" / "submit.sh").read_text()
    assert f"--optimizer.kind {cluster.folder}/mine.py:lion" in text
    sinks = f"['{cluster.folder}/mine.py:Sink']"
    assert f"--monitoring.sinks {shlex.quote(sinks)}" in text
