"""Mixtures: the part of a dataset that an epoch takes, and the metrics of each dataset."""

import itertools
import shutil
from collections import Counter

import pytest
from helpers import DATA, MINI, PREFERENCE, assert_same_run, compose, logs_of, losses_of, pair, run, write_lines
from omegaconf import OmegaConf

import preference_datasets
from tdpo.cli.check_config import check_config
from tdpo.data.batching import BatchStream
from tdpo.data.contract import PAIRS, Take
from tdpo.data.split import TokenizedSplit
from tdpo.models.tokenizer import load_tokenizer
from tdpo.utils import UserError


@pytest.fixture(scope="module")
def split_of(tmp_path_factory):
    """Return a function that makes a split of two datasets: a of 40 prompts with two pairs each, b of 30 with one."""
    folder = tmp_path_factory.mktemp("rows")
    rows = {
        "a": [pair(f"P{i} ", f"good {k}", f"bad {k}") for i in range(40) for k in range(2)],
        "b": [pair(f"Q{i} ", "good", "bad") for i in range(30)],
    }
    paths = {name: write_lines(folder / f"{name}.jsonl", some) for name, some in rows.items()}
    tokenizer = load_tokenizer(compose("exp_name=x", "model=blank_model", f"model.name_or_path={MINI}/model").model, None)

    def make(split="train", **takes) -> TokenizedSplit:
        node = preference_datasets.default_options("jsonl")
        options = {name: {**node, "path": path, "eval_path": path, **takes.get(name, {})} for name, path in paths.items()}
        return preference_datasets.load_split(options, split, tokenizer, 64, 32, PAIRS, silent=True)

    return make


def counts(split: TokenizedSplit, examples) -> Counter:
    return Counter(split.names[i] for i in split.dataset_of(examples))


def test_every_epoch_takes_the_share_drawn_anew_by_the_seed(split_of):
    split = split_of(a={"share": 0.25}, b={"n_examples": 12})
    assert len(split) == 110 and split.epoch_size == 32 and split.is_mixed
    epochs = list(itertools.islice(split.train_epochs(3), 4))
    for examples in epochs:
        assert counts(split, examples) == {"a": 20, "b": 12} and len(set(examples)) == 32
    assert len({frozenset(examples) for examples in epochs}) == 4
    assert epochs == list(itertools.islice(split.train_epochs(3), 4)) != list(itertools.islice(split.train_epochs(4), 4))
    assert {example for examples in itertools.islice(split.train_epochs(3), 60) for example in examples} == set(next(split.epochs(0)))


def test_the_order_of_what_is_taken_is_the_published_one(split_of):
    """A share leaves examples out; it does not move the others."""
    split = split_of(a={"share": 0.5})
    for whole, taken in zip(itertools.islice(split.epochs(0), 3), split.train_epochs(0)):
        kept = set(taken)
        assert taken == [example for example in whole if example in kept]
    plain = split_of()
    assert not plain.is_mixed and next(plain.train_epochs(7)) == next(plain.epochs(7))


def test_what_is_taken_is_spread_over_the_epoch(split_of):
    split = split_of(a={"share": 0.25})
    halves = [counts(split, examples[: len(examples) // 2])["a"] for examples in itertools.islice(split.train_epochs(0), 50)]
    assert 8 < sum(halves) / 50 < 12  # of 20


def test_a_stream_begun_anew_continues_with_the_same_batches(split_of):
    split = split_of(a={"share": 0.3}, b={"share": 0.5})
    stream = BatchStream(split, 8, seed=1, n_epochs=3)
    batches = list(stream)
    assert len(batches) == len(stream) == 3 * (39 // 8) and stream.dropped == 39 % 8
    for n in range(len(batches)):
        assert list(stream.after(n)) == batches[n:]


def test_evals_take_all(split_of):
    assert split_of("test", a={"share": 0.25}).epoch_size == 110


@pytest.mark.parametrize("share,size,taken", [(1.0, 7, 7), (0.5, 7, 4), (0.001, 7, 1), (None, 7, 7)])
def test_shares_are_rounded_and_take_at_least_one(share, size, taken):
    assert Take(share).of("a", size) == taken


@pytest.mark.parametrize(
    "given,message",
    [
        ("datasets.hh.share=1.1", "datasets.hh.share=1.1: must be less than or equal to 1"),
        ("datasets.hh.share=0", "datasets.hh.share=0: must be greater than 0"),
        ("datasets.hh.share=abc", "datasets.hh.share=abc: must be a valid number"),
        ("datasets.hh.n_examples=0", "datasets.hh.n_examples=0: must be greater than 0"),
        ("datasets.hh.share=0.5 datasets.hh.n_examples=3", "datasets.hh.share and datasets.hh.n_examples exclude each other"),
    ],
)
def test_shares_that_are_none_are_refused(given, message):
    with pytest.raises(UserError, match=message) as refused:
        check_config(compose("exp_name=x", *DATA, *given.split()))
    assert len(str(refused.value).splitlines()) == 1


def test_more_than_there_is_is_refused(split_of, tmp_path):
    with pytest.raises(UserError, match=r"datasets.b.n_examples=31: it has 30 train examples; use at most that number"):
        split_of(b={"n_examples": 31})
    with pytest.raises(UserError, match="1 train example, fewer than batch_size=8"):
        run(*DATA, "datasets.hh.n_examples=1", f"local_run_dir={tmp_path}/run")


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> list[str]:
    """Options of a run on two datasets, of which an epoch takes 30 and 10 pairs."""
    path = write_lines(
        tmp_path_factory.mktemp("rows") / "rows.jsonl",
        [pair(f"\n\nHuman: say {i}\n\nAssistant:", f" {i} yes", f" no {i}") for i in range(40)],
    )
    mix = [
        "datasets=[hh,jsonl]",
        f"datasets.jsonl.path={path}",
        f"datasets.jsonl.eval_path={path}",
        "datasets.jsonl.share=0.25",
        "datasets.hh.n_examples=30",
    ]
    return [*PREFERENCE, *mix, "n_epochs=2", "save_every=16", "eval_every=40", "n_eval_examples=30"]


def test_a_mixture_is_resumed_bit_for_bit(mixed, tmp_path, capsys):
    straight = run(*mixed, f"local_run_dir={tmp_path}/straight")
    printed = capsys.readouterr().out
    assert "an epoch takes 30 of hh's " in printed and "an epoch takes 10 of jsonl's " in printed
    run_dir = run(*mixed, f"local_run_dir={tmp_path}/run")
    for folder in run_dir.glob("step-*"):
        if int(folder.name[5:]) > 16:
            shutil.rmtree(folder)
    assert_same_run(run(*mixed, f"resume={run_dir}"), straight)
    with pytest.raises(UserError, match=r"another config: datasets.jsonl.share=0.5 \(was 0.25\)"):
        run(*mixed, "datasets.jsonl.share=0.5", f"resume={run_dir}")


def test_evals_have_metrics_of_each_dataset(mixed, tmp_path):
    """The mean over all is that of the datasets' means, weighted with their numbers of examples; one dataset alone has no such metrics."""
    log = logs_of(run(*mixed, "n_examples=8", "n_eval_examples=null", f"local_run_dir={tmp_path}/run"), "eval")[-1]
    names = {name for name in log if "eval_" in name}
    assert names == {name.replace(old, f"{old}_{data}") for data in ("hh", "jsonl") for name, old in of_evals(log)}
    part = 32 / (32 + 40)  # test pairs of hh, of both
    for name, old in of_evals(log):
        hh, jsonl = (log[name.replace(old, f"{old}_{data}")] for data in ("hh", "jsonl"))
        assert log[name] == pytest.approx(part * hh + (1 - part) * jsonl, rel=1e-9, abs=1e-9)
    single = logs_of(run(*PREFERENCE, "n_examples=8", f"local_run_dir={tmp_path}/single"), "eval")[-1]
    assert not any("eval_" in name for name in single)


def of_evals(log: dict) -> list[tuple[str, str]]:
    """Names of the metrics over all datasets, and the part of them that names the split."""
    return [(name, "eval") for name in log if name.endswith("/eval") or "_eval/" in name]


def test_ranks_train_on_the_same_mixture(mixed, ranks, tmp_path):
    one = run(*mixed, f"local_run_dir={tmp_path}/one")
    two = ranks(2).run(*mixed, "trainer=FSDPTrainer", f"local_run_dir={tmp_path}/two")
    for ours, theirs in zip(losses_of(one), losses_of(two), strict=True):
        assert ours.keys() == theirs.keys()
        assert {k: theirs[k] for k in ours if k != "split" and "accuracies" not in k} == pytest.approx(
            {k: v for k, v in ours.items() if k != "split" and "accuracies" not in k}, rel=1e-4, abs=1e-5
        )


def test_kto_stages_and_cached_references_take_the_same_part(mixed, tmp_path):
    """A loss that pairs an example with the next one, one that trains in stages, and states computed before training."""
    kto = [*mixed, "loss=kto", "datasets.hh.unpair=true", "datasets.jsonl.unpair=true", "datasets.hh.n_examples=30"]
    assert logs_of(run(*kto, "n_epochs=1", f"local_run_dir={tmp_path}/kto"), "train")[-1]["counters/examples"] == (30 + 20) // 8 * 8
    staged = [*mixed, "loss=sdpo_stepwise", "loss.parts=2", "loss.order=easy_to_hard", "n_epochs=1"]
    assert logs_of(run(*staged, f"local_run_dir={tmp_path}/staged"), "train")[-1]["counters/examples"] == 32
    live = run(*mixed, f"local_run_dir={tmp_path}/live")
    cached = run(*mixed, "reference_cache=true", f"local_dirs=[{tmp_path}/cache]", f"local_run_dir={tmp_path}/cached")
    for ours, theirs in zip(logs_of(cached), logs_of(live), strict=True):
        assert ours["loss/" + ours["split"]] == pytest.approx(theirs["loss/" + ours["split"]], rel=1e-5)


def test_a_share_does_not_make_the_tokens_anew(tmp_path, monkeypatch):
    made = []
    original = preference_datasets.cache_key
    monkeypatch.setattr(preference_datasets, "cache_key", lambda *given: made.append(original(*given)) or made[-1])
    for share in ("null", "0.5"):
        run(*DATA, f"datasets.hh.share={share}", "n_examples=8", f"local_run_dir={tmp_path}/{share}")
    assert made[:2] == made[2:]


def test_a_user_made_dataset_needs_no_such_keys():
    config = compose("exp_name=x", *DATA)
    del_keys = OmegaConf.to_container(config.datasets.hh)
    for key in ("share", "n_examples"):
        del del_keys[key]
    config.datasets = {"hh": del_keys}
    check_config(config)
