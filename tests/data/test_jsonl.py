"""Fields of the jsonl dataset's rows: their names, numbers as databases export them, and what is not read."""

import decimal

import pyarrow
import pyarrow.parquet
import pytest
from helpers import bpe_tokenizer, elements_of, pair, turn

from tdpo.data.contract import COMPLETIONS, PAIRS, SFT, Form
from tdpo.data.jsonl import number_of
from tdpo.utils import UserError

RATED = Form(PAIRS.roles, rated=True)
ORCA = [{"system": "Be terse." if i else "", "question": f"q{i}", "chosen": " a", "rejected": " b", "id": i} for i in range(3)]


def test_fields_have_other_names(tmp_path, capsys):
    rows = [{"q": "p", "good": " a", "bad": " b", "g": 2, "b": 1}]
    columns = {"prompt": "q", "chosen": "good", "rejected": "bad", "chosen_score": "g", "rejected_score": "b"}
    (element,) = elements_of(rows, tmp_path, bpe_tokenizer(), RATED, columns=columns)
    assert (element["prompt"], element["chosen"], element["rejected"]) == ("p", "p a", "p b")
    assert (element["chosen_annotation"], element["rejected_annotation"]) == (2.0, 1.0)
    assert "not read" not in capsys.readouterr().out


def test_the_system_text_comes_first(tmp_path, capsys):
    """In a conversation as its first message; before plain text with an empty line between."""
    columns = {"prompt": "question", "system": "system"}
    found = elements_of(ORCA, tmp_path, bpe_tokenizer(), columns=columns)
    assert [element["prompt"] for element in found] == ["q0", "Be terse.\n\nq1", "Be terse.\n\nq2"]
    assert "fields not read: id\n" in capsys.readouterr().out
    elements_of([{**row, "tools": []} for row in ORCA], tmp_path, bpe_tokenizer(), columns=columns)
    assert "fields not read: id, tools\n" in capsys.readouterr().out  # text does not pass through the template
    chat = [{**row, "question": [turn("user", row["question"])]} for row in ORCA]
    first, second, _ = elements_of(chat, tmp_path, bpe_tokenizer(), columns=columns)
    assert first["prompt"].startswith("<|im_start|>user\nq0") and second["prompt"].startswith("<|im_start|>system\nBe terse.<|im_end|>\n")
    both = {**chat[1], "question": [turn("system", "x"), turn("user", "q")]}
    with pytest.raises(UserError, match="a system message and another one in the field 'system': .*row 1"):
        elements_of([both], tmp_path, bpe_tokenizer(), columns=columns)


def test_fields_that_are_not_read_are_named_once(tmp_path, capsys):
    elements_of([pair("p", source="x"), pair("q", system="y")], tmp_path, bpe_tokenizer())
    assert capsys.readouterr().out.count("fields not read: source, system") == 1


@pytest.mark.parametrize("key", ["system", "chosen_score", "tools"])
def test_a_name_that_no_row_has_is_an_error(key, tmp_path):
    with pytest.raises(UserError, match=rf"columns.{key}=sytem: no row has such a field; they have chosen, prompt, rejected"):
        elements_of([pair("p")], tmp_path, bpe_tokenizer(), columns={key: "sytem"})


@pytest.mark.parametrize(
    "value,number",
    [
        (3, 3),
        (2.5, 2.5),
        (2**63, 2**63),
        (-(10**200), -(10**200)),
        (decimal.Decimal("2.50"), 2.5),
        (decimal.Decimal("12345678901234567890"), 12345678901234567890),
        (10**400, None),
        (decimal.Decimal("1E+400"), None),
        (decimal.Decimal("NaN"), None),
        (decimal.Decimal("-Infinity"), None),
        (float("nan"), None),
        (True, None),
        ("3", None),
        (None, None),
        ([1], None),
    ],
)
def test_numbers(value, number):
    found = number_of(value)
    assert found == number and (number is None) == (found is None)


@pytest.mark.parametrize("scores", [(decimal.Decimal("4.5"), decimal.Decimal("4.25")), (2**53 + 1, 2**53), (2.0, 1), (10**30, 10**29)])
def test_scores_as_databases_export_them(scores, tmp_path):
    """Also integers that are equal once they are floats."""
    rows = [{"prompt": "p", "completion": text, "score": score} for text, score in zip((" a", " b"), scores)]
    if isinstance(scores[0], decimal.Decimal):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
        rows = str(tmp_path / "rows.parquet")
    (element,) = elements_of(rows, tmp_path, bpe_tokenizer(), RATED, rows="scored")
    assert element["chosen"] == "p a" and element["chosen_annotation"] == float(scores[0])


@pytest.mark.parametrize("labels", [(True, False), (1, 0), (1.0, 0.0), (decimal.Decimal("1"), decimal.Decimal("0"))])
def test_labels_as_databases_export_them(labels, tmp_path):
    rows = [{"prompt": "p", "completion": text, "label": label} for text, label in zip((" a", " b"), labels)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    found = elements_of(str(tmp_path / "rows.parquet"), tmp_path, bpe_tokenizer(), COMPLETIONS, rows="labelled")
    assert [element["completion_annotation"] for element in found] == [1.0, 0.0]
    rows[0]["label"] = 0.5 if isinstance(labels[0], float) else 2
    with pytest.raises(UserError, match="'label' must be true or false: .*row 1"):
        elements_of([{**row, "label": float(row["label"])} for row in rows], tmp_path, bpe_tokenizer(), COMPLETIONS, rows="labelled")


@pytest.mark.parametrize("separator,text", [("\\n", "\n"), ("\\n\\t", "\n\t"), (" ", " "), ("\n", "\n")])
def test_a_separator_may_be_written_with_backslashes(separator, text, tmp_path):
    rows = [{"prompt": "p", "completion": "a", "score": 1}]
    (element,) = elements_of(rows, tmp_path, bpe_tokenizer(), SFT, rows="scored", separator=separator)
    assert element["chosen"] == f"p{text}a"


def test_a_remedy_that_would_drop_every_row_is_not_named(tmp_path):
    with pytest.raises(UserError) as error:
        elements_of([pair("p", chosen=" x", rejected=" x")], tmp_path, bpe_tokenizer())
    assert "invalid_rows=skip" not in str(error.value)
    with pytest.raises(UserError, match="invalid_rows=skip drops such rows"):
        elements_of([pair("p", chosen=" x", rejected=" x"), pair("q")], tmp_path, bpe_tokenizer())
