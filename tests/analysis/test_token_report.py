"""token_report.py: its numbers, and the page in a real browser (skipped if Chromium and its driver are not installed)."""

import json
import re
import shutil

import pytest
import torch
from helpers import DATA, PREFERENCE, compose, run

import token_report
from tdpo.analysis.trained_models import find_trained, load_compared
from tdpo.scoring.token_statistics import token_statistics
from tdpo.utils import UserError

HOSTILE = "</script><script>throw 1</script> <b>&amp;"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two runs on 16 pairs each, whose policies differ from their reference."""
    folder = tmp_path_factory.mktemp("trained")
    options = [*PREFERENCE, "n_examples=16", "do_first_eval=false", "lr=5e-3", "warmup_steps=0"]
    return [run(*options, f"loss={loss}", f"local_run_dir={folder}/{loss}") for loss in ("dpo", "tdpo2")]


@pytest.fixture(scope="module")
def page(trained, tmp_path_factory):
    return written(tmp_path_factory.mktemp("page") / "report.html", trained)


def written(out, runs, *overrides) -> str:
    return token_report.run(compose(f"run=[{','.join(map(str, runs))}]", f"out={out}", *overrides, name="token_report"))


def data_of(page: str) -> dict:
    with open(page) as file:
        return json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', file.read(), re.S).group(1))


def test_numbers(page, trained, mini_tokenizer):
    data = data_of(page)
    assert [found["name"] for found in data["runs"]] == [str(path) for path in trained] and len(data["pairs"]) == 20
    policy, reference, _, fast = load_compared(find_trained(str(trained[1])), None, torch.device("cpu"), 64)
    assert fast
    for pair in data["pairs"][:3]:
        prompt = mini_tokenizer(pair["prompt"], add_special_tokens=False)["input_ids"]
        for role, values in pair["values"][1].items():
            ids = mini_tokenizer("".join(pair["tokens"][role]), add_special_tokens=False)["input_ids"]
            statistics = token_statistics(policy, reference, [(prompt, [ids])], fast=False)
            assert values["logps"] == pytest.approx(statistics.logps.tolist(), abs=1e-3)
            assert values["reference"] == pytest.approx(statistics.reference_logps.tolist(), abs=1e-3)
            assert values["kl"] == pytest.approx(statistics.kl.tolist(), abs=1e-3) and sum(values["kl"]) > 0.01


def test_pieces_join_to_the_text(mini_tokenizer):
    """Also if the tokenizer writes spaces only between tokens."""
    from tdpo.models.tokenizer import embedded_tokenizer

    for tokenizer, text in ((mini_tokenizer, "Human: what is it?"), (embedded_tokenizer(), "was very good . i loved it")):
        before, *ids = tokenizer(f"the {text}", add_special_tokens=False)["input_ids"]
        pieces = token_report.pieces_of(tokenizer, before, ids)
        assert len(pieces) == len(ids) and tokenizer.decode([before]) + "".join(pieces) == tokenizer.decode([before, *ids])


@pytest.mark.parametrize("text", ["naïve 日本 🙂", "🙂🙂", "a\ufffdb\ufffd", "नमस्ते", "שלום", "👩‍👩‍👧", "é" * 3])
def test_a_character_of_several_tokens_is_the_text_of_the_first(text, mini_tokenizer):
    before, *ids = mini_tokenizer("x" + text, add_special_tokens=False)["input_ids"]
    pieces = token_report.pieces_of(mini_tokenizer, before, ids)
    shown = [piece for piece in pieces if piece is not None]
    assert len(pieces) == len(ids) and pieces[0] is not None and "".join(shown) == text
    assert None in pieces  # characters of several bytes, of which the tokenizer merges few
    assert all("\ufffd" not in piece for piece in shown) or "\ufffd" in text
    cut = token_report.pieces_of(mini_tokenizer, before, ids[:-1])  # within the last character, as after truncation
    assert len(cut) == len(ids) - 1


def test_page_is_self_contained(page):
    with open(page) as file:
        text = file.read()
    assert len(text) < 2e6 and not re.search(r"https?://|@import|<link (?!rel=\"icon\" href=\"data:)|src=", text)


def test_models_without_a_reference_are_rejected(trained, tmp_path):
    with pytest.raises(UserError, match="no reference is known"):
        written(tmp_path / "x.html", [trained[0] / "LATEST" / "hf"], "datasets=[reviews]", "max_length=128", "max_prompt_length=64")
    sft = run(*DATA, "model.archive=null", "n_examples=8", "do_first_eval=false", f"local_run_dir={tmp_path}/sft")
    with pytest.raises(UserError, match="no reference is known"):
        written(tmp_path / "x.html", [sft])


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium, chromedriver = (shutil.which(name) for name in ("chromium", "chromedriver"))
    if chromium is None or chromedriver is None:
        pytest.skip("no Chromium with its driver (Debian: apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("headless", "no-sandbox", "disable-gpu", "no-first-run", "disable-background-networking", "window-size=1300,900"):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(chromedriver))
    yield driver
    driver.quit()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_in_a_browser(scheme, browser, page, tmp_path):
    from selenium.webdriver import ActionChains

    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
    browser.get(f"file://{page}")
    data = data_of(page)
    tokens = browser.find_elements("css selector", ".token")
    assert len(tokens) == 2 * sum(len(ids) for pair in data["pairs"] for ids in pair["tokens"].values())
    ActionChains(browser).move_to_element(tokens[2]).perform()
    tip = browser.find_element("id", "tip")
    first = data["pairs"][0]["values"][0]["chosen"]
    reward = data["runs"][0]["beta"] * (first["logps"][2] - first["reference"][2])
    assert tip.is_displayed() and f"{reward:.3f}" in tip.text and f"{first['kl'][2]:.3f} nats" in tip.text
    sums = browser.find_element("css selector", ".sums").text
    total = sum(data["runs"][0]["beta"] * (a - b) for a, b in zip(first["logps"], first["reference"]))
    assert f"reward {total:.3f}" in sums and f"{len(first['kl'])} tokens" in sums
    # The text is readable (WCAG contrast ratio of at least 4.5), also on the strongest colour.
    contrast = browser.execute_script(CONTRAST)
    assert contrast["page"] > 7 and contrast["gain"] > 4.5 and contrast["loss"] > 4.5, contrast
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    assert browser.save_screenshot(str(tmp_path / f"{scheme}.png"))
    assert browser.get_log("browser") == []


CONTRAST = """
const style = getComputedStyle(document.documentElement);
const numbers = (text) => text.match(/[\\d.]+/g).map(Number);
const hex = (name) => [1, 3, 5].map((i) => parseInt(style.getPropertyValue(name).trim().slice(i, i + 2), 16));
const luminance = (rgb) => rgb.map((c) => c / 255).map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
  .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
const ratio = (a, b) => { const [x, y] = [luminance(a), luminance(b)].sort((p, q) => q - p); return (x + 0.05) / (y + 0.05); };
const page = hex("--page"), text = hex("--text");
const over = (name) => numbers(style.getPropertyValue(name)).map((c, i) => 0.75 * c + 0.25 * page[i]);
return { page: ratio(page, text), gain: ratio(over("--gain"), text), loss: ratio(over("--loss"), text) };
"""


def test_a_character_of_several_tokens_is_shown_once_over_them(trained, browser, tmp_path):
    row = {"prompt": "Say it.", "chosen": " 日本 🙂", "rejected": " नमस्ते"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    data = ["datasets=[jsonl]", f"datasets.jsonl.path={tmp_path}/pairs.jsonl", f"datasets.jsonl.eval_path={tmp_path}/pairs.jsonl"]
    page = written(tmp_path / "report.html", trained[:1], *data, "max_length=128", "max_prompt_length=64")
    browser.get(f"file://{page}")
    tokens = data_of(page)["pairs"][0]["tokens"]
    assert len(browser.find_elements("css selector", ".token")) == sum(map(len, tokens.values()))
    texts = browser.execute_script("return [...document.querySelectorAll('.response')].map((line) => line.textContent)")
    assert texts == ["".join(filter(None, tokens[role])) for role in ("chosen", "rejected")] and "日本 🙂" in texts[0]
    boxes = browser.execute_script(
        "return [...document.querySelectorAll('.character')].map((c) => [c.getBoundingClientRect().width, "
        "[...c.querySelectorAll('.token')].reduce((sum, t) => sum + t.getBoundingClientRect().width, 0)])"
    )
    assert boxes and all(whole > 3 and parts == pytest.approx(whole, rel=0.05) for whole, parts in boxes)
    assert browser.save_screenshot(str(tmp_path / "characters.png"))
    assert browser.get_log("browser") == []


def test_markup_in_texts_is_escaped(trained, browser, tmp_path):
    """A prompt that looks like HTML is shown as text."""
    row = {"prompt": HOSTILE, "chosen": " <i>good</i>", "rejected": " </script>"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    data = ["datasets=[jsonl]", f"datasets.jsonl.path={tmp_path}/pairs.jsonl", f"datasets.jsonl.eval_path={tmp_path}/pairs.jsonl"]
    page = written(tmp_path / "report.html", trained[:1], *data, "max_length=128", "max_prompt_length=64")
    browser.get(f"file://{page}")
    assert browser.find_element("css selector", ".prompt").text == HOSTILE
    assert "".join(token.text for token in browser.find_elements("css selector", ".token")).startswith(" <i>good</i>")
    assert browser.get_log("browser") == []
