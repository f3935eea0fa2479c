"""experiments/smollm/credit.py: on which words token rewards land, by hand, and its command line."""

import json
import sys
from pathlib import Path

import pytest
from helpers import ROOT

sys.path.insert(0, str(ROOT))

from experiments.smollm import credit  # noqa: E402

PAGE = {
    "runs": [{"name": "a run", "beta": 0.5}],
    "scale": {"reward": 1.0, "kl": 1.0},
    "pairs": [
        {
            "tokens": {"chosen": [" A", " won", "derful", " film", "."], "rejected": [" dull", None, "."]},
            "values": [
                {
                    "chosen": {"logps": [-1.0, -1.0, -1.0, -2.0, -1.0], "reference": [-1.0, -2.0, -4.0, -1.0, -1.0], "kl": [0.0] * 5},
                    "rejected": {"logps": [-5.0, -1.0, -1.0], "reference": [-3.0, -1.0, -3.0], "kl": [0.5] * 3},
                }
            ],
        }
    ],
}


def test_words_of_tokens():
    assert credit.words_of([" A", " won", "derful", " film", ".", "\n", "Good", "!"]) == [
        "a",
        *["wonderful"] * 2,
        "film",
        "",
        "",
        "good",
        "",
    ]
    assert credit.words_of([" na", "ï", "ve", " caf", None, " x"]) == ["naïve"] * 3 + ["caf", "caf", "x"] and credit.words_of([]) == []


def test_credit_of_tokens_by_hand():
    """Chosen: 0, 0.5, 1.5, -0.5, 0; rejected: -1, 0, 1. The margin is 1.5 - 0, of which wonderful and dull have 2 + 1."""
    found = credit.credit_of(PAGE, 0, {"wonderful", "dull"})
    assert found["rated_tokens"] == 4 / 8 and found["seqkl"] == pytest.approx(0.75)
    assert found["margin"] == pytest.approx(1.5) and found["rated_margin"] == pytest.approx(3 / 1.5)
    assert found["margin_of_rated"] == pytest.approx(3)
    assert found["last"] == pytest.approx((0 + 1) / 2)
    assert found["size_of_rated"] == pytest.approx((0.5 + 1.5 + 1 + 0) / 4) and found["size_of_others"] == pytest.approx(
        (0 + 0.5 + 0 + 1) / 4
    )


def test_credit_of_several_seeds_and_its_words():
    """With four pages a word has to occur on each of them four times; the second seed's margin is three times that of the others."""
    pages = [json.loads(json.dumps(PAGE)) for _ in range(4)]
    pages[1]["runs"][0]["beta"] = 1.5
    for page in pages:
        page["pairs"] *= 2  # each of the two tokens of a word then occurs twice
        page["runs"] *= 2
        again = json.loads(json.dumps(page["pairs"][0]["values"][0]))
        again["chosen"]["logps"][1] += 2  # of won in wonderful
        for pair in page["pairs"]:
            pair["values"] = [pair["values"][0], again]
    both = credit.credit_of_methods(pages, ["A", "B"], {"dull"})
    found, minus = both["methods"]["A"], both["minus_first"]["B"]
    assert found["margin"]["mean"] == pytest.approx((1.5 * 3 + 4.5) / 4) and found["margin"]["n"] == 4
    assert minus["margin"]["mean"] == pytest.approx((1.0 * 3 + 3.0) / 4) and list(both["minus_first"]) == ["B"]
    assert minus["last"]["mean"] == 0 and found["last"]["mean"] == pytest.approx((0.5 * 3 + 1.5) / 4)  # 0 and 1; in the second seed 0 and 3
    assert [word for word, _, _ in found["highest"]] == ["wonderful", "dull"] and found["lowest"][0] == ["dull", -0.75, 16]


def run_credit(monkeypatch, *arguments) -> None:
    """Start credit.py with a command line."""
    monkeypatch.setattr(sys, "argv", ["credit.py", *map(str, arguments)])
    credit.main()


def page_of(content: dict, file: Path) -> Path:
    """Write numbers as a page of token_report.py has them."""
    file.write_text(f'<html><script id="data" type="application/json">{json.dumps(content)}</script></html>')
    return file


def test_credit_is_written_from_pages(tmp_path, monkeypatch):
    pytest.importorskip("vaderSentiment")
    pages = [page_of(PAGE, tmp_path / f"tokens{seed}.html") for seed in (0, 1)]
    out, drawn = tmp_path / "credit.json", tmp_path / "pair.svg"
    run_credit(monkeypatch, *pages, "--names", "DPO", "--out", out, "--picture", drawn)
    content = json.loads(out.read_text())
    found = content["methods"]["DPO"]
    assert content["minus_first"] == {}
    assert found["rated_margin"]["n"] == 2 and found["margin"]["mean"] == pytest.approx(1.5)
    assert found["rated_margin"]["mean"] == pytest.approx(2)  # VADER rates wonderful and dull
    assert drawn.read_text() == credit.picture(PAGE, [0], ["DPO"])


def test_errors_of_credit_name_what_is_there(tmp_path, monkeypatch):
    file = page_of(PAGE, tmp_path / "tokens.html")
    for arguments, message in (
        ((tmp_path / "none.html", "--names", "DPO"), "none.html' is no page of token_report.py"),
        ((file, "--names", "DPO,TDPO2"), "tokens.html' has another number of runs than --names=DPO,TDPO2"),
        ((file, "--names", "DPO", "--pairs", "1,2"), "there is no pair 2, '.*tokens.html' has 1 to 1"),
        ((file, "--names", "DPO", "--pairs", "0"), "there is no pair 0"),
    ):
        with pytest.raises(SystemExit, match=f"error: .*{message}"):
            run_credit(monkeypatch, *arguments)
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    with pytest.raises(SystemExit, match="pip install vaderSentiment"):
        run_credit(monkeypatch, file, "--names", "DPO")


def test_credit_of_an_untrained_policy_is_zero():
    page = json.loads(json.dumps(PAGE))
    for values in page["pairs"][0]["values"][0].values():
        values["logps"] = values["reference"]
    found = credit.credit_of(page, 0, {"dull"})
    assert (found["margin"], found["rated_margin"], found["size_of_rated"]) == (0, 0, 0)


def test_a_picture_of_pairs_and_an_error(tmp_path, monkeypatch):
    from xml.etree import ElementTree

    root = ElementTree.fromstring(credit.picture(PAGE, [0], ["a run"]))
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert texts[0] == "a run, chosen: reward 1.50, SeqKL 0.00 nats" and texts[1:6] == PAGE["pairs"][0]["tokens"]["chosen"]
    boxes = [(box.get("fill"), box.get("fill-opacity")) for box in root.iter("{http://www.w3.org/2000/svg}rect")][1:]
    assert boxes[2] == ("#1f77b4", "0.75") and boxes[3] == ("#d66012", "0.38")  # 1.5, more than the scale; -0.5
    (tmp_path / "page.html").write_text("<html></html>")
    with pytest.raises(SystemExit, match="is no page of token_report.py"):
        credit.read_page(tmp_path / "page.html")
