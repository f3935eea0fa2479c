"""The findings of plot.py about runs, with values on either side of each threshold."""

import pytest

from plot import curve, write_curves
from tdpo.analysis.findings import findings


def logs(examples: list[int], split: str = "eval", **curves: list[float]) -> list[dict]:
    names = {name: name.replace("__", "/").replace("_s/", f"_{split}/") for name in curves}
    columns = {names[name]: values for name, values in curves.items()}
    return [
        {"split": split, "counters/examples": x, **{name: values[i] for name, values in columns.items()}} for i, x in enumerate(examples)
    ]


def said(some: list[dict]) -> dict[str, bool]:
    """Return the beginning of each finding, and whether it is a concern."""
    return {answer.text.split(" (")[0].split(":")[0]: answer.concern for answer in findings(some)}


@pytest.mark.parametrize(
    "chosen,rejected,expected",
    [
        ([-20, -20.9], [-20, -30], {"Chosen responses did not become less likely": False}),
        ([-20, -21.1], [-20, -30], {"Chosen responses became less likely, but rejected ones fell further": False}),
        ([-20, -25], [-20, -24], {"Chosen responses became less likely, and rejected ones did not fall further": True}),
    ],
)
def test_chosen(chosen, rejected, expected):
    assert said(logs([0, 64], logps_s__chosen=chosen, logps_s__rejected=rejected)) == expected


@pytest.mark.parametrize(
    "accuracies,margins,expected",
    [
        ([0.5, 0.8, 0.74], [0.0, 1.0, 2.0], {"Sign of over-optimization": True}),
        ([0.5, 0.8, 0.76], [0.0, 1.0, 2.0], {"No sign of over-optimization": False}),
        ([0.5, 0.8, 0.7], [0.0, 1.0, 0.9], {"No sign of over-optimization": False}),  # both fall
    ],
)
def test_reward_and_accuracy(accuracies, margins, expected):
    assert said(logs([0, 64, 128], rewards_s__accuracies=accuracies, rewards_s__margins=margins)) == expected


@pytest.mark.parametrize(
    "kl,expected",
    [
        ([0, 4, 8, 9, 20], {"SeqKL rose sharply": True}),
        ([0, 4, 8, 15, 20], {"SeqKL did not rise sharply": False}),  # grows, but not sharply at the end
        ([0, 1, 2, 3, 9], {"SeqKL did not rise sharply": False}),  # grows sharply, but stays low
    ],
)
def test_kl(kl, expected):
    assert said(logs([0, 100, 200, 300, 400], kl_s__chosen=[x / 2 for x in kl], kl_s__rejected=kl)) == expected


def test_the_start():
    start = {"split": "train", "counters/examples": 64, "counters/updates": 1, "rewards_train/chosen": 0.0, "rewards_train/rejected": 0.0}
    assert said([start]) == {"At the start, rewards and SeqKL are 0": False}
    assert said([{**start, "kl_train/chosen": 0.02, "kl_train/rejected": 0.0}])["At the start, rewards or SeqKL reach 0.02 instead of 0"]
    assert said([{**start, "counters/updates": 2, "rewards_train/chosen": 1.0}]) == {}  # not the first step


def test_fewer_than_two_evals_give_no_findings():
    train = logs([64, 128], "train", logps_s__chosen=[-20, -60], logps_s__rejected=[-20, -20])
    assert findings(train) == findings([]) == findings([*logs([0], logps_s__chosen=[-90], logps_s__rejected=[-10]), *train]) == []


def test_non_finite_values_are_a_concern():
    start = {"split": "train", "counters/examples": 64, "counters/updates": 1, "rewards_train/chosen": None, "rewards_train/rejected": None}
    first, second = findings([start, {"split": "train", "counters/examples": 128, "loss/train": None}])
    assert first == (True, "3 logged values are NaN or infinite, first rewards_train/chosen after 64 examples; curves omit them.")
    assert second == (True, "At the start, rewards or SeqKL are NaN or infinite: check weights and dtype of policy and reference.")
    assert curve([start], "train", "rewards_{s}/chosen") == ([], [])


def test_page_of_curves(tmp_path):
    some = logs([0, 100, 200, 300, 400], kl_s__chosen=[0, 0, 0, 0, 1], kl_s__rejected=[0, 4, 8, 9, 20])
    panels = write_curves([("<run>", some)], {"<run>": findings(some)}, str(tmp_path / "curves.html"))
    page = (tmp_path / "curves.html").read_text()
    assert panels == ["SeqKL of chosen", "SeqKL of rejected"] and page.count("data:image/png;base64,") == 2
    assert '<li class="look">SeqKL rose sharply (rejected responses: 9.0 nats' in page and "<h2>&lt;run&gt;</h2>" in page
