"""The report says what the numbers say, stands alone, and escapes what it is given."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import yaml

from megatron_slm import report
from megatron_slm.analysis import captions
from megatron_slm.analysis.report_page import build_report
from megatron_slm.analysis.run_folder import read_run, read_runs
from megatron_slm.selection.alarms import reference_overtaken


def write_run(
    folder,
    *,
    scorer,
    losses,
    name="",
    rejected=(2.0, 2.5),
    ahead=(1.0, 0.5),
    keep=0.6,
    settings=None,
):
    """A run of len(losses) - 1 intervals of 1000 tokens; `ahead`: model loss minus reference loss
    at start and end; `settings`: more of its config.yaml, by section.
    """
    folder.mkdir(parents=True)
    config = {
        "run": {"folder": str(folder), "name": name},
        "optimizer": {"clip_grad_norm": 1.0},
        "data": {"train": ["a/web", "b/code"]},
        "selection": {"scorer": scorer, "keep_fraction": keep},
        "schedule": {"train_steps": 10 * (len(losses) - 1)},
    }
    for section, values in (settings or {}).items():
        config[section] = config.get(section, {}) | values
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "versions.txt").write_text("torch 2.13.0 <cpu>\n")
    records = []
    for i, loss in enumerate(losses):
        at = {"step": i * 10, "tokens/processed": i * 1000}
        records.append(at | {"kind": "validation", "validation/curated/loss": loss})
        if i:
            record = at | trained_record(i)
            if scorer != "none":
                share = (i - 1) / max(len(losses) - 2, 1)
                record |= selected_record(i, keep) | {
                    "loss/rejected": float(np.interp(share, [0, 1], rejected)),
                    "loss/reference": 4.0 - float(np.interp(share, [0, 1], ahead)),
                }
            records.append(record)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def trained_record(i):
    """What every run logs in its interval `i`."""
    return {
        "kind": "train",
        "loss/all": 4.0,
        "optimizer/grad_norm": 0.5 + i,
        "optimizer/learning_rate": 1e-4,
        "throughput/tokens_per_second": 1234.0,
        "throughput/step_seconds": 0.5,
    }


def selected_record(i, keep):
    """What a run that selects logs beside it."""
    return {
        "tokens/selected": int(i * 1000 * keep),
        "loss/selected": 5.0,
        "selection/kept_fraction": keep,
        "selection/threshold_nats": 0.3 - 0.1 * i,
        "selection/rate_by_reference_loss": [0.2, 0.9, None, 0.5],
        "selection/rate_by_reference_loss_edges_nats": [0.0, 0.5, 1.0, 2.0, 9.0],
        "selection/rate_by_position": [0.5, 0.7],
        "selection/rate_by_corpus": [0.55, 0.65],
    }


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("runs")
    plain = write_run(tmp_path / "plain", scorer="none", losses=[4.0, 3.6, 3.4])
    slm = write_run(
        tmp_path / "slm", scorer="excess_loss", losses=[4.0, 3.5, 3.3], name="slm <0.6>"
    )
    random = write_run(tmp_path / "random", scorer="random", losses=[4.0, 3.7, 3.55])
    view = {
        "corpus": "web",
        "first_token": 77,
        "documents": [[1010, 0]],
        "tokens": ["for", " x<y", "\n"],
        "loss": [1.0, 2.0, 3.0],
        "reference_loss": [None, 1.0, 2.5],
        "selected": [False, True, False],
    }
    (slm / "token_view.jsonl").write_text(json.dumps(view) + "\n")
    (slm / "warnings.jsonl").write_text(
        json.dumps({"step": 1, "level": "warning", "text": "beware of <i>"}) + "\n"
    )
    return [plain, slm, random]


@pytest.fixture(scope="module")
def pages(folders, tmp_path_factory):
    """The report of the three runs, written twice."""
    outputs = [tmp_path_factory.mktemp("out") / "new folder" / "report.html" for _ in range(2)]
    for output in outputs:
        assert report.main(["--runs", *map(str, folders), "--output", str(output)]) == 0
        assert [path.name for path in output.parent.iterdir()] == ["report.html"]
    return [output.read_text() for output in outputs]


def cells(page):
    """The summary table's rows as text."""
    body = re.search(r"<tbody>(.*?)</tbody>", page, re.DOTALL).group(1)
    table = []
    for row in re.findall(r"<tr>.*?</tr>", body, re.DOTALL):
        table.append([re.sub(r"<[^>]*>", "", cell) for cell in re.findall(r"<td.*?</td>", row)])
    return table


def test_the_slowest_rank_is_told_where_there_are_several(tmp_path):
    folder = write_run(tmp_path / "run", scorer="none", losses=[4.0, 3.6, 3.5, 3.4])
    assert "slowest" not in captions.throughput(read_runs([folder]))
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    training = [each for each in records if each["kind"] == "train"]
    for record, rank, excess in zip(training, (2, 0, 2), (0.5, 0.1, 0.25), strict=True):
        record["throughput/slowest_rank"] = rank
        record["throughput/slowest_rank_excess_seconds"] = excess
    (folder / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    assert captions.throughput(read_runs([folder])).endswith(
        "The slowest rank of run was most often rank 2, in 2 of 3 log intervals; it worked 0.38 s "
        "per step longer than the others (median)."
    )


def test_the_program_writes_one_file_with_the_numbers(pages):
    page = pages[0]
    # 3.4 is crossed between 3.5 at 1000 and 3.3 at 2000 tokens: at 1500, 0.75 of the plain run's
    # 2000.
    assert cells(page) == [
        ["plain", "done by its metrics", "3.400", "2k", "2k", "1.23k", "2k"],
        ["slm &lt;0.6&gt;", "done by its metrics", "3.300", "2k", "1.2k", "1.23k", "1.5k (0.75×)"],
        ["random", "done by its metrics", "3.550", "2k", "1.2k", "1.23k", "not reached"],
    ]
    assert (
        "slm &lt;0.6&gt; has the lowest loss on curated, 3.300 nats per token; plain is 0.100 "
        "higher; random is 0.250 higher" in page
    )
    assert "selection.scorer" in page
    assert "torch 2.13.0 &lt;cpu&gt;" in page
    assert "beware of &lt;i&gt;" in page
    assert page.count("<figure>") == 9
    assert " x&lt;y" in page
    assert "<b>web</b>, document 1010, from token 77 of the corpus: 1 of 3 tokens selected" in page


def test_it_stands_alone(pages):
    page = pages[0]
    assert not re.search(r"(src|href)=\"(?!data:|#)", page)
    assert "<script" not in page
    assert "@import" not in page
    assert "url(" not in page
    assert "<0.6>" not in page
    assert "<i>" not in page


def test_the_same_runs_give_the_same_file(pages):
    assert pages[0] == pages[1]


def test_words_follow_the_numbers(tmp_path):
    plain = write_run(tmp_path / "plain", scorer="none", losses=[4.0, 3.4, 3.0])
    worse = write_run(
        tmp_path / "slm",
        scorer="excess_loss",
        losses=[4.0, 3.6, 3.2],
        rejected=(2.5, 2.0),
        ahead=(0.5, -0.25),
    )
    level = write_run(tmp_path / "same", scorer="random", losses=[4.0, 3.4, 3.002])
    runs = read_runs([plain, worse, level])
    text = captions.validation(runs, "curated")
    assert "plain and same are level on curated at 3.000" in text
    assert "slm is 0.200 higher" in text
    assert "lowest" not in text
    assert f"slm: {reference_overtaken(4.0, 4.25)}" in captions.training(runs)
    assert "The model has overtaken the reference: 4.000 against 4.250" in captions.training(runs)
    assert "expected" not in captions.training(runs[:2]), "rejected loss fell"
    rising = read_run(
        write_run(
            tmp_path / "rising", scorer="excess_loss", losses=[4.0, 3.6, 3.2], rejected=(2.0, 2.5)
        )
    )
    assert "went from 2.00 to 2.50 nats (a rise is expected" in captions.training([rising])
    outcome = captions.outcomes(runs, "curated")
    assert [line.tokens_to_baseline for line in outcome] == [2000.0, None, None]
    assert "90% of class 2" in captions.by_reference_loss(runs)
    assert "20% of class 1" in captions.by_reference_loss(runs)


def test_a_run_whose_selection_ended_is_not_told_to_end_it(tmp_path):
    settings = {"selection": {"end_when_overtaken": True}}
    folder = write_run(
        tmp_path / "ended",
        scorer="excess_loss",
        losses=[4.0, 3.6, 3.4, 3.2],
        ahead=(0.5, -0.25),
        settings=settings,
    )
    assert "overtaken" in captions.training([read_run(folder)])
    path = folder / "metrics.jsonl"
    *before, last = path.read_text().splitlines()
    record = json.loads(last) | {"selection/kept_fraction": 1.0}
    record.pop("loss/reference")  # an online one, which is let go
    path.write_text("\n".join([*before, json.dumps(record)]) + "\n")
    text = captions.training([read_run(folder)])
    assert "nats ahead of the model when its loss was last computed" in text
    assert "overtaken" not in text


def test_a_random_choice_is_not_told_to_change_its_reference(tmp_path):
    folder = write_run(tmp_path / "random", scorer="random", losses=[4.0, 3.5], ahead=(0.5, -0.25))
    text = captions.training([read_run(folder)])
    assert "on all tokens the reference is" in text
    assert "overtaken" not in text


def test_runs_of_unequal_length_are_compared_where_both_have_been(tmp_path):
    long = write_run(tmp_path / "long", scorer="none", losses=[4.0, 3.5, 3.0, 2.5])
    short = write_run(tmp_path / "short", scorer="excess_loss", losses=[4.0, 3.25])
    assert captions.validation(read_runs([long, short]), "curated").startswith(
        "After 1k processed tokens short has the lowest loss on curated, 3.250 nats per token; "
        "long is 0.250 higher"
    )


def test_a_report_of_one_unfinished_run_without_validation(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text(
        '{"step": 1, "kind": "train", "tokens/processed": 10, "loss/all": 3.0}\n'
    )
    assert report.main(["--runs", str(folder)]) == 0
    assert "No run was validated" in (folder / "report.html").read_text()


def test_bad_usage_and_bad_folders(folders, tmp_path, capsys):
    assert (
        report.main(
            [
                "--runs",
                str(tmp_path / "absent"),
                str(folders[0]),
                "--output",
                str(tmp_path / "r.html"),
            ]
        )
        == 3
    )
    assert "absent: no such folder" in capsys.readouterr().err
    assert report.main(["--runs", str(folders[0]), "--corpus", "nope"]) == 2
    assert "validation corpora of these runs: curated" in capsys.readouterr().err
    assert not (tmp_path / "r.html").exists()


def test_help_and_imports_stay_light():
    code = (
        "import sys\nfrom megatron_slm import report\ntry:\n    report.main(['--help'])\nexcept "
        "SystemExit as stop:\n    assert stop.code == 0\nassert 'torch' not in sys.modules and "
        "'matplotlib' not in sys.modules\nimport megatron_slm.analysis.report_page\nassert "
        "'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "example:" in done.stdout
    assert "--runs" in done.stdout


def evaluation(step, loss, **settings):
    metrics = {"tokens": 90, "loss": loss, "perplexity": 2.5, "bits_per_byte": 1.25}
    metrics |= {"worth/tokens": 54, "worth/loss": loss + 1}
    return {
        "step": step,
        "settings": {
            "sequence_length": 64,
            "document_policy": "packed",
            "sequences": 0,
            "precision": "fp32",
            **settings,
        },
        "corpora": {"<code>": {"corpus": "data/code", "fingerprint": "sha256:1"}},
        "token_sets": {"<code>/worth": "sha256:2"},
        "metrics": {f"validation/<code>/{name}": value for name, value in metrics.items()},
    }


def test_evaluations_of_the_newest_checkpoint_are_a_table(tmp_path):
    folder = write_run(tmp_path / "slm", scorer="none", losses=[4.0, 3.0])
    run = read_run(folder)
    assert "Evaluation" not in build_report([run], None, "t")
    records = [evaluation(9, 7.7771, sequences=5), evaluation(10, 6.6661), evaluation(10, 5.5551)]
    records.append(evaluation(10, 4.4441, document_policy="isolated"))
    lines = "".join(json.dumps(record) + "\n" for record in records) + '{"step": 11, "torn'
    strange = [evaluation(12, 1.5), evaluation("13", 1.5), {"step": 14, "metrics": []}]
    strange[0]["metrics"]["validation/<code>/loss"] = "text"
    lines = "".join(json.dumps(record) + "\n" for record in strange) + lines
    (folder / "evaluations.jsonl").write_text(lines)
    page = build_report([read_run(folder)], None, "t")
    for shown in ("&lt;code&gt;", "5.5551", "6.5551", "1.2500", "4.4441", "isolated", "worth"):
        assert shown in page, shown
    assert "7.7771" not in page  # of an older checkpoint
    assert "6.6661" not in page  # measured again since
    assert "<code>" not in page.split("Evaluation</h2>")[1].split("</section>")[0]
