"""The files of public benchmarks: their questions, and answers in the form that their judges read.

The forms are those of alpaca_eval, of FastChat's llm_judge (MT-Bench) and of arena-hard-auto.
"""

import hashlib
import json
import os
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Optional

from tdpo.data.rows import Row
from tdpo.data.sources import Place, read_rows
from tdpo.files import reason_of, replaced_whole
from tdpo.utils import RunError, UserError, some_of

# The temperature that FastChat samples at, by category of MT-Bench; 0 is greedy. It takes 0.7 for any other category.
MT_BENCH_TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}
MT_BENCH_TEMPERATURES |= dict.fromkeys(("extraction", "math", "coding", "reasoning"), 0.0)


class Question(NamedTuple):
    """One question of a benchmark."""

    key: Any  # by which the judge finds its answer
    turns: list[str]  # what the user says; the model answers each before the next is asked
    fields: Mapping[str, Any]  # its row in the benchmark's file
    temperature: float = 1.0  # unless the command gives one


class Form(NamedTuple):
    """The files of one benchmark."""

    shape: str  # of a row of its questions, for error messages
    question: Callable[[Mapping[str, Any]], Optional[Question]]  # from a row; None: it is not of this form
    answer: Callable[[Question, Sequence[str], str], dict]  # a row of the judge's file, from the question, the answers and the model's name
    is_list: bool  # whether the judge's file is one JSON array; False: JSON lines
    unique: bool = True  # whether two questions may not have the same key


def _alpaca_question(fields: Mapping[str, Any]) -> Optional[Question]:
    instruction = fields.get("instruction")
    return Question(instruction, [instruction], fields) if _is_text(instruction) else None


def _alpaca_answer(question: Question, answers: Sequence[str], model: str) -> dict:
    dataset = {"dataset": question.fields["dataset"]} if "dataset" in question.fields else {}
    return {"instruction": question.key, "output": answers[0], "generator": model, **dataset}


def _mt_bench_question(fields: Mapping[str, Any]) -> Optional[Question]:
    key, turns, category = fields.get("question_id"), fields.get("turns"), fields.get("category")
    if not isinstance(key, (int, str)) or not isinstance(category, str) or not _are_texts(turns):
        return None
    return Question(key, list(turns), fields, MT_BENCH_TEMPERATURES.get(category, 0.7))


def _mt_bench_answer(question: Question, answers: Sequence[str], model: str) -> dict:
    return _choices_answer(question, list(answers), model)


def _arena_question(fields: Mapping[str, Any]) -> Optional[Question]:
    """Return the question of a row: {uid, prompt}, as the benchmark has them now, or {question_id, turns: [{content}]}, as it began."""
    if isinstance(fields.get("uid"), str):
        return Question(fields["uid"], [fields["prompt"]], fields) if _is_text(fields.get("prompt")) else None
    key, turns = fields.get("question_id"), fields.get("turns")
    contents = [turn.get("content") if isinstance(turn, Mapping) else None for turn in turns] if isinstance(turns, list) else []
    return Question(key, contents, fields) if isinstance(key, (int, str)) and _are_texts(contents) else None


def _arena_answer(question: Question, answers: Sequence[str], model: str) -> dict:
    if "uid" not in question.fields:
        return _choices_answer(question, [{"content": answer} for answer in answers], model)
    said = [{"role": "user", "content": question.turns[0]}, {"role": "assistant", "content": {"answer": answers[0]}}]
    known = {"uid": question.key, "ans_id": _answer_id(question, answers, model), "model": model}
    return {**known, "messages": said, "tstamp": time.time()}


def _choices_answer(question: Question, turns: Sequence[Any], model: str) -> dict:
    """Return an answer in FastChat's form, with one choice."""
    known = {"question_id": question.key, "answer_id": _answer_id(question, turns, model), "model_id": model}
    return {**known, "choices": [{"index": 0, "turns": list(turns)}], "tstamp": time.time()}


def _answer_id(question: Question, turns: Sequence[Any], model: str) -> str:
    """Return an id that is the same for the same answer of the same model."""
    return hashlib.sha256(json.dumps([question.key, list(turns), model]).encode()).hexdigest()[:22]


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _are_texts(values: Any) -> bool:
    return isinstance(values, list) and bool(values) and all(map(_is_text, values))


FORMS = {
    "alpaca_eval": Form("a JSON array of {instruction, ...}", _alpaca_question, _alpaca_answer, is_list=True, unique=False),
    "mt_bench": Form("JSON lines {question_id, category, turns: [text, ...]}", _mt_bench_question, _mt_bench_answer, is_list=False),
    "arena_hard": Form("JSON lines {uid, prompt} or {question_id, turns: [{content}]}", _arena_question, _arena_answer, is_list=False),
}


def read_questions(name: str, path: str, n: Optional[int], temperature: Optional[float]) -> list[Question]:
    """Read the questions of a benchmark's file.

    Args:
        name: of the form.
        path: of the file.
        n: number of questions, from the start; None: all.
        temperature: for all questions; None: the benchmark's own.

    Raises:
        UserError: the file is missing or not of that form.
    """
    form = FORMS[name]
    if not os.path.isfile(path):
        raise UserError(f"prompts={path}: no such file; form={name} takes the benchmark's own file, {form.shape}")
    questions = []
    for row in read_rows(Place(path), "test"):
        question = form.question(row.fields) if row.fields is not None else None
        if question is None:
            raise UserError(f"prompts={path} is not of form={name}, {form.shape}: row {row.number} {_what_it_is(row)}")
        questions.append(question if temperature is None else question._replace(temperature=temperature))
    keys = [question.key for question in questions]
    if form.unique and len(set(keys)) < len(keys):
        twice = sorted({str(key) for key in keys if keys.count(key) > 1})
        raise UserError(
            f"prompts={path} has several questions with the id {some_of(twice)}: the judge would read one answer for all of them"
        )
    return questions[:n]


def _what_it_is(row: Row) -> str:
    return f"is {row.defect}" if row.fields is None else f"has {', '.join(map(repr, row.fields)) or 'nothing'}"


def model_name(out: str) -> str:
    """Return the name by which the judge will know the model: that of its file, as FastChat and arena-hard-auto take it."""
    return os.path.splitext(os.path.basename(out))[0]


def rows_path(out: str) -> str:
    """Return where the rows are kept from which `out` is written. Its ending is none that the judges look for in the folder."""
    return f"{out}.rows"


def check_unwritten(out: str, complete: bool) -> None:
    """Raise UserError if `out` exists before its rows are complete: it is another command's."""
    if not complete and os.path.lexists(out):
        raise UserError(f"out={out} exists, and its rows in '{rows_path(out)}' are not complete: give out=<another file>")


def write_answers(name: str, questions: Sequence[Question], out: str) -> None:
    """Write the judge's file from the complete rows beside it; a file that was written already is kept.

    Args:
        name: of the form.
        questions: in the order of the rows' index.
        out: the file.

    Raises:
        RunError: it cannot be written.
    """
    if os.path.lexists(out):
        return
    form, answers = FORMS[name], defaultdict(list)
    with open(rows_path(out), encoding="utf-8") as file:
        for row in map(json.loads, file):  # of each question in the order of its turns
            answers[row["index"]].append(row["completion"].strip())
    written = [form.answer(question, answers[i], model_name(out)) for i, question in enumerate(questions)]
    try:
        with replaced_whole(out) as file:
            if form.is_list:
                json.dump(written, file, indent=2)
            else:
                file.writelines(json.dumps(answer) + "\n" for answer in written)
    except OSError as error:
        raise RunError(f"out={out} cannot be written: {reason_of(error)}; run the same command again") from None
