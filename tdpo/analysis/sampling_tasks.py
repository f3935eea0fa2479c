"""What sample.py asks a model for: continuations of prompts, or answers to the questions of a public benchmark."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Optional

from tdpo.analysis.benchmark_forms import Question, check_unwritten, rows_path, write_answers
from tdpo.models.sampling import Draw, rows_of
from tdpo.utils import UserError, batched, plural

Prompts = Sequence[tuple[str, list[int]]]  # (text, token ids) each


class PromptTask:
    """Prompts, each of which is continued n times.

    Args:
        prompts: in the order of the data.
        n: continuations of each.
        batch_size: prompts per batch.
        temperature: of sampling; None: 1.
        tokenizer: decodes the continuations.
        out: the file of their rows.
    """

    def __init__(self, prompts: Prompts, n: int, batch_size: int, temperature: Optional[float], tokenizer, out: str):
        self.identity = {"prompts": prompts, "temperature": 1.0 if temperature is None else temperature}
        self.batches = batched(prompts, batch_size)
        self.rows_of_batch = [n * len(batch) for _, batch in self.batches]
        self.file, self.tokenizer = out, tokenizer
        self.name = f"{plural(len(prompts), 'prompt')}, {plural(n, 'continuation')} each"

    def start(self, complete: bool) -> None:
        """Do nothing: the rows' file is what was asked for."""

    def rows(self, first: int, prompts: Prompts, draw: Draw) -> list[dict]:
        """Return the rows of a batch, see `sampling.rows_of`; `first` is the index of its first prompt."""
        drawn = draw([ids for _, ids in prompts], self.identity["temperature"], (first,))
        return rows_of(self.tokenizer, prompts, drawn, range(first, first + len(prompts)))

    def finish(self) -> None:
        """Do nothing: the rows' file is what was asked for."""


class BenchmarkTask:
    """Questions of a benchmark. The model answers each turn of a question before the next is asked; all rows done, the judge's file is
    written from them.

    Args:
        form: name of the benchmark's form.
        questions: in the order of its file.
        render: makes prompts of conversations, up to where a reply begins.
        batch_size: questions per batch, all of one temperature.
        max_new_tokens: of each answer.
        max_length: of a whole dialogue, tokens.
        tokenizer: decodes the answers.
        out: the judge's file; the rows are in a file beside it.

    Raises:
        UserError: max_length is too small for a question and its answers, or the chat template cannot render it.
    """

    def __init__(
        self,
        form: str,
        questions: Sequence[Question],
        render: Callable[[Sequence[Sequence[Mapping]]], Prompts],
        batch_size: int,
        max_new_tokens: int,
        max_length: int,
        tokenizer,
        out: str,
    ):
        self.form, self.questions, self.render, self.tokenizer, self.out = form, questions, render, tokenizer, out
        asked = self._asked_within(max_new_tokens, max_length)
        self.identity = {"prompts": [questions, asked], "temperature": sorted({question.temperature for question in questions})}
        self.batches = _batches_of(questions, batch_size)
        self.rows_of_batch = [sum(len(question.turns) for question in batch) for _, batch in self.batches]
        self.file = rows_path(out)
        self.name = f"{plural(len(questions), 'question')} of {form}"

    def start(self, complete: bool) -> None:
        """Raise UserError if there is a judge's file although its rows are not `complete`."""
        check_unwritten(self.out, complete)

    def rows(self, first: int, questions: Sequence[Question], draw: Draw) -> list[dict]:
        """Return the rows of a batch, as `sampling.rows_of` makes them, with `turn`, from 0; those of all first turns come first."""
        said: list[list[dict]] = [[] for _ in questions]
        rows = []
        for turn in range(max(len(question.turns) for question in questions)):
            asked = [i for i, question in enumerate(questions) if turn < len(question.turns)]
            for i in asked:
                said[i].append({"role": "user", "content": questions[i].turns[turn]})
            prompts = self.render([said[i] for i in asked])
            drawn = draw([ids for _, ids in prompts], questions[0].temperature, (first, turn))
            answers = rows_of(self.tokenizer, prompts, drawn, [first + i for i in asked])
            for i, row in zip(asked, answers):
                said[i].append({"role": "assistant", "content": row["completion"].strip()})
            rows += [{**row, "turn": turn} for row in answers]
        return rows

    def finish(self) -> None:
        """Write the judge's file."""
        write_answers(self.form, self.questions, self.out)

    def _asked_within(self, max_new_tokens: int, max_length: int) -> Prompts:
        """Return the questions with all their turns as they are rendered, after a check that none of them will have to be cut."""
        answered = {"role": "assistant", "content": "."}
        chats: list[list[Any]] = [
            [message for turn in question.turns for message in ({"role": "user", "content": turn}, answered)][:-1]
            for question in self.questions
        ]
        prompts = self.render(chats)
        needed = max(len(ids) + len(question.turns) * max_new_tokens for question, (_, ids) in zip(self.questions, prompts))
        if needed > max_length:
            raise UserError(
                f"max_length={max_length} is too small: the longest question and its answers of max_new_tokens={max_new_tokens} may take "
                f"{needed} tokens: give max_length={needed}, or a smaller max_new_tokens"
            )
        return prompts


def _batches_of(questions: Sequence[Question], size: int) -> list[tuple[int, Sequence[Question]]]:
    """Return (index of the first question, questions) for each batch: neighbours of the same temperature, at most `size`."""
    batches, first = [], 0
    for _, group in itertools.groupby(questions, key=lambda question: question.temperature):
        same = list(group)
        batches += [(first + start, some) for start, some in batched(same, size)]
        first += len(same)
    return batches
