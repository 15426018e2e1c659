"""Math word problems: questions put together from the published fields, and answers compared."""

import importlib.util
import json

import pytest

from megatron_slm.evaluation.word_problems import (
    asdiv_problem,
    is_right,
    mawps_problem,
    sat_problem,
    svamp_problem,
    tabmwp_problem,
)

TABLE = {
    "table_title": "Coins",
    "table": "Name | Coins\nA | 2\nB | 4",
    "question": "What is the mean?",
    "choices": None,
    "answer": "3",
    "ans_type": "integer_number",
}
FILES = {
    "svamp": {"Body": "A has 9 figs", "Question": "How many figs?", "Answer": 9.0, "ID": "chal-1"},
    "mawps": {"input": "A has 2 figs and B 3 . How many ?", "target": 5.0, "type": "addsub"},
    "tabmwp": TABLE,
    "sat_math": {"question": "2x = 4?", "options": "A) 1 B) 2 C) 3 D) 4", "Answer": "B"},
}


def test_questions_are_those_of_the_published_fields():
    assert svamp_problem(FILES["svamp"]) == {
        "question": "A has 9 figs. How many figs?",
        "target": "9.0",
    }
    with_stop = FILES["svamp"] | {"Body": "A has 9 figs."}
    assert svamp_problem(with_stop) == svamp_problem(FILES["svamp"])
    assert mawps_problem(FILES["mawps"])["target"] == "5.0"
    asdiv = {"body": "A has 9 figs.", "question": "How many?", "answer": "9 (figs)"}
    assert asdiv_problem(asdiv) == {"question": "A has 9 figs. How many?", "target": "9"}
    assert sat_problem(FILES["sat_math"]) == {
        "question": "2x = 4?\n(A) 1 (B) 2 (C) 3 (D) 4",
        "target": "B",
    }


def test_a_table_is_read_with_its_title_and_choices():
    assert tabmwp_problem(TABLE)["question"] == (
        'Read the following table regarding "Coins" and answer a question:\n'
        "Name | Coins\nA | 2\nB | 4\nWhat is the mean?"
    )
    chosen = TABLE | {"table_title": "", "choices": ["grew", "shrank"], "ans_type": "other_text"}
    problem = tabmwp_problem(chosen | {"answer": "shrank"})
    assert problem["question"].startswith("Read the following table and answer a question:\n")
    assert problem["question"].endswith("following options: ['grew', 'shrank']")
    assert problem["target"] == "shrank"
    for written, value in {"1,234": 1234.0, "3/4": 0.75, "25%": 0.25}.items():
        assert float(tabmwp_problem(TABLE | {"answer": written})["target"]) == value


@pytest.mark.parametrize(
    "written, target, right",
    [
        ("5 + 4 = 9. The answer is 9.", "9", True),
        ("5 + 4 = 9. The answer is $9.00 for all 3.", "9.0", True),
        ("The answer is 1,234.", "1234", True),
        ("The answer is 9. So the answer is 8.", "9", False),
        ("There are 3, then 4, so 12", "12", True),
        ("There are 12, then 4", "12", False),
        ("The answer is -2", "2", False),
        ("The answer is 50%", "0.5", True),
        ("The answer is 2.0009", "2", True),
        ("The answer is 2.01", "2", False),
        ("The answer is Shrank.", "shrank", True),
        ("It shrank.", "shrank", False),
        ("no number", "3", False),
    ],
)
def test_an_answer_is_compared_as_the_paper_does(written, target, right):
    assert is_right(written, target) == right


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs pip install lm_eval")
def test_the_harness_reads_the_local_files(tmp_path, monkeypatch):
    from lm_eval.tasks import TaskManager

    from megatron_slm.harness import TASKS

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for name, record in FILES.items():
        (tmp_path / "task_data" / name).mkdir(parents=True)
        path = tmp_path / "task_data" / name / "test.jsonl"
        path.write_text(2 * (json.dumps(record) + "\n"))
    known = TaskManager(include_path=str(TASKS))
    targets = {"svamp": "9.0", "mawps": "5.0", "tabmwp": "3.0", "sat_math": 1}
    for name, target in targets.items():
        task = known.load(f"slm_{name}")["tasks"][f"slm_{name}"]
        [first, _] = list(task.eval_docs)
        assert task.doc_to_target(first) == target
        if name != "sat_math":
            prompt = task.fewshot_context(first, 8)
            assert prompt.count("The answer is") == 8
            assert prompt.endswith(f"\n\n\nQuestion: {first['question']}\nAnswer:")
            assert task.process_results(first, [f"The answer is {target}"]) == {"acc": 1.0}
