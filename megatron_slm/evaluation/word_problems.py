"""Math word problems as the authors of Rho-1 asked them: what the task files in tasks/ call.

Questions are put together and answers compared as in math-evaluation-harness (ZubinGou, revision
db77bc6), from whose data/ folder the files come; the eight worked examples are those of
chain-of-thought prompting (arXiv 2201.11903), which lm_eval keeps in its task gsm8k_cot.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_slm.config.yaml_text import read_yaml

TOLERANCE = 1e-3
NUMBER = re.compile(r"-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
Document = Mapping[str, Any]
Problem = dict[str, str]
"""The "question" and its "target", the right answer."""


def worked_examples() -> list[Problem]:
    """Eight questions with their solution as "target", from the installed lm_eval."""
    import lm_eval

    path = Path(lm_eval.__file__).parent / "tasks" / "gsm8k" / "gsm8k-cot.yaml"
    return read_yaml(path.read_text(encoding="utf-8"))["fewshot_config"]["samples"]


def svamp_problem(document: Document) -> Problem:
    """From {Body, Question, Answer}."""
    body = document["Body"].strip()
    question = f"{body.removesuffix('.')}. {document['Question'].strip()}"
    return {"question": question, "target": str(document["Answer"])}


def asdiv_problem(document: Document) -> Problem:
    """From {body, question, answer}; the unit in the answer, "9 (apples)", is left out."""
    question = f"{document['body'].strip()} {document['question'].strip()}"
    return {"question": question, "target": re.sub(r"\(.*?\)", "", document["answer"]).strip()}


def mawps_problem(document: Document) -> Problem:
    """From {input, target}."""
    return {"question": document["input"].strip(), "target": str(document["target"])}


def tabmwp_problem(document: Document) -> Problem:
    """From {table_title, table, question, choices, answer, ans_type}. Answers that are numbers may
    be written as a fraction or in percent.
    """
    title = f'regarding "{document["table_title"]}" ' if document["table_title"] else ""
    question = (
        f"Read the following table {title}and answer a question:\n"
        f"{document['table']}\n{document['question']}"
    )
    if document["choices"]:
        question += f" Please select from the following options: {document['choices']}"
    target = str(document["answer"])
    if document["ans_type"] in ("integer_number", "decimal_number"):
        target = str(_value(target))
    return {"question": question, "target": target}


def sat_problem(document: Document) -> Problem:
    """From {question, options, Answer}, "Answer" being a letter."""
    options = re.sub(r"(^|\s)([A-D])\) ", r"\1(\2) ", document["options"].strip())
    question = f"{document['question'].strip()}\n{options}"
    return {"question": question, "target": document["Answer"]}


def svamp_problems(dataset: Any) -> Any:
    return _problems(dataset, svamp_problem)


def asdiv_problems(dataset: Any) -> Any:
    """Without the problems that have several answers, "2; 3"."""
    return _problems(dataset.filter(lambda each: ";" not in each["answer"]), asdiv_problem)


def mawps_problems(dataset: Any) -> Any:
    return _problems(dataset, mawps_problem)


def tabmwp_problems(dataset: Any) -> Any:
    return _problems(dataset, tabmwp_problem)


def sat_problems(dataset: Any) -> Any:
    return _problems(dataset, sat_problem)


def _problems(dataset: Any, problem: Callable[[Document], Problem]) -> Any:
    """A datasets.Dataset of problems, for lm_eval's process_docs."""
    return dataset.map(problem, remove_columns=dataset.column_names)


def accuracy(problem: Document, answers: Sequence[str]) -> dict[str, float]:
    """{"acc": 1.0 where the written answer is right}, for lm_eval's process_results."""
    # A datasets.Dataset keeps the type of a column of the same name: MAWPS' target is a float.
    return {"acc": float(is_right(answers[0], str(problem["target"])))}


def is_right(written: str, target: str) -> bool:
    """Whether a written solution ends in `target`.

    A number is right within 1e-3, also in percent of it or a hundredth (the paper's rule); any
    other answer is compared word by word, in any case.
    """
    said = _after_the_answer_is(written)
    wanted = _value(target)
    if wanted is None:
        return said is not None and _words(said) == _words(target)
    numbers = NUMBER.findall(written if said is None else said)
    if not numbers:
        return False
    got = _value(numbers[-1] if said is None else numbers[0])
    scales = (0.01, 1.0, 100.0)
    return got is not None and any(
        math.isclose(got, wanted * scale, rel_tol=0, abs_tol=TOLERANCE) for scale in scales
    )


def _after_the_answer_is(written: str) -> str | None:
    _, found, said = written.rpartition("he answer is")
    return said.strip().partition("\n")[0] if found else None


def _value(text: str) -> float | None:
    """The number in "1,234", "3/4" or "25%"; None where the text is none."""
    plain = text.strip().replace(",", "").replace("$", "")
    above, is_fraction, below = plain.partition("/")
    try:
        if is_fraction:
            return float(above) / float(below)
        return float(plain.removesuffix("%")) / (100 if plain.endswith("%") else 1)
    except (ValueError, ZeroDivisionError):
        return None


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())
