"""experiments/smollm: its prompts, VADER's reward, and its pipeline, from chat prompts to tables, with a small model for SmolLM2."""

import json
import math
import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from helpers import CHATML, ROOT, forked_script
from omegaconf import OmegaConf
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GPTJConfig, GPTJForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(ROOT))

from experiments import jobs  # noqa: E402
from experiments.frontier import measure, pairs, report, tables  # noqa: E402
from experiments.frontier import run as frontier  # noqa: E402
from experiments.smollm import checks, prepare  # noqa: E402
from preference_datasets import default_options, load_prompts, load_split  # noqa: E402
from tdpo.analysis.rewards import Reward, reward_model  # noqa: E402
from tdpo.utils import UserError  # noqa: E402

HERE = ROOT / "experiments" / "smollm"
WORDS = [f" {word}" for word in "film was good bad great awful dull lovely it the".split()]
PARTS = ["<unk>", "<|im_start|>", "<|im_end|>", "user", "assistant", "\n", *WORDS]


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A chat tokenizer with a token per word and the space before it, so that every sequence of words is tokenized as it was sampled."""
    inner = Tokenizer(models.WordLevel({part: i for i, part in enumerate(PARTS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n| ?[^ \n]+"), "isolated")
    inner.decoder = decoders.Fuse()
    special = {"unk_token": "<unk>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>", "extra_special_tokens": ["<|im_start|>"]}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, **special)
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """The folder of a model with random weights that writes words and ends its replies."""
    folder = tmp_path_factory.mktemp("model") / "model"
    tokenizer = word_tokenizer()
    torch.manual_seed(0)
    sizes = {"vocab_size": len(tokenizer), "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 128, "rotary_dim": 4}
    built = GPTJForCausalLM(GPTJConfig(**sizes, bos_token_id=None, eos_token_id=2, pad_token_id=2))
    with torch.no_grad():
        built.lm_head.bias[:] = torch.tensor([0.0 if part in [*WORDS, "<|im_end|>"] else -20.0 for part in PARTS])
    built.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# --- prompts ---


def texts() -> list[str]:
    """Everything of which prompts are made, apart from the request."""
    lists = [prepare.lines_of(HERE / f"{name}.txt") for name in ("titles", "openings")]
    return [prepare.SYSTEM, prepare.ANSWER, *prepare.EXAMPLE.values(), *lists[0], *lists[1]]


def test_prompts_are_chat_messages_and_the_splits_share_no_title(tmp_path, chat_tokenizer):
    prepare.write_prompts(tmp_path)
    titles, openings = (prepare.lines_of(HERE / f"{name}.txt") for name in ("titles", "openings"))
    assert len(titles) >= 400 and 20 <= len(openings) <= 30 and len({title.lower() for title in titles}) == len(titles)
    found = {}
    for split in ("train", "test"):
        rows = [json.loads(line)["prompt"] for line in (tmp_path / f"{split}.jsonl").read_text().splitlines()]
        assert {tuple(message["role"] for message in messages) for messages in rows} == {("system", "user", "assistant", "user")}
        loaded = load_prompts({}, split, chat_tokenizer, 500, path=str(tmp_path / f"{split}.jsonl"))
        assert len(loaded) == len(rows) and all(prompt.text.endswith("<|start|>assistant\n") for prompt in loaded)
        requests = [messages[-1]["content"] for messages in rows]
        found[split] = [request.split('the film "')[1].split('"? ')[0] for request in requests]
        used = Counter(request.split('Begin with "')[1].removesuffix('".') for request in requests)
        assert set(used) == set(openings) and max(used.values()) - min(used.values()) <= 1
    assert sorted(found["train"] + found["test"]) == sorted(titles) and len(found["test"]) == prepare.HELD_OUT
    assert prepare.prompts() == prepare.prompts()


def test_titles_and_openings_have_no_word_that_vader_rates():
    """A response that repeats the title or the opening as asked has no reward from it."""
    analyzer = pytest.importorskip("vaderSentiment.vaderSentiment").SentimentIntensityAnalyzer()
    assert [line for line in texts() if analyzer.polarity_scores(line)["compound"] != 0] == []
    assert [line for line in texts() if any(word.strip(".,:?!").lower() in analyzer.lexicon for word in line.split())] == []


# --- rewards ---


def compound(*valences: float) -> float:
    """VADER's score of a text from the valences of its words (Hutto and Gilbert, 2014), mapped to [0, 1]."""
    total = sum(valences)
    return (1 + total / math.sqrt(total * total + 15)) / 2


def test_vaders_reward_by_hand():
    pytest.importorskip("vaderSentiment")
    reward = reward_model("vader", torch.device("cpu"), None)
    texts = ["The film was good.", "The film was bad.", "The film was not good.", "It is a film.", "good and bad"]
    expected = [compound(1.9), compound(-2.5), compound(-0.74 * 1.9), 0.5, compound(1.9, -2.5)]
    assert reward(texts) == pytest.approx(expected, abs=1e-4)
    assert reward.of([{"prompt": "an awful", "completion": " good film"}]) == reward([" good film"])


def test_other_rewards_see_the_prompt_unless_it_is_chat():
    length = Reward(lambda texts: [float(len(text)) for text in texts])
    row = {"prompt": "four", "completion": " five"}
    assert length.of([row]) == pairs.reward_of_rows(length, [row], None) == [9.0]
    assert pairs.reward_of_rows(length, [row], [[{"role": "user", "content": "four"}]]) == [5.0]


def test_without_its_package_vader_names_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    with pytest.raises(UserError, match="^reward=vader needs the package vaderSentiment: pip install vaderSentiment$"):
        reward_model("vader", torch.device("cpu"), None)


# --- pairs ---


def test_completions_that_training_would_see_otherwise_are_left_out(tmp_path, model):
    """One that has no end, and one that was sampled as other tokens than its text gives."""
    tokenizer = word_tokenizer()
    good, film, user, assistant, end = tokenizer.convert_tokens_to_ids([" good", " film", "user", "assistant", "<|im_end|>"])
    messages = [{"role": "user", "content": " film"}]
    prompt = tokenizer.encode("<|im_start|>user\n film<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False)
    rows = []
    for ids in ([good, film, end], [good, film, film], [good, end], [user, assistant, end]):
        completion = [pairs.reply({"completion": tokenizer.decode(ids, skip_special_tokens=True)})]
        rows.append({"prompt": messages, "completion": completion, "prompt_ids": prompt, "completion_ids": ids})
    kept = pairs.trained_as_sampled(rows, tmp_path / "candidates.jsonl", str(model))
    assert kept == [rows[0], rows[2]]
    with pytest.raises(UserError, match="raise max_new_tokens"):
        pairs.trained_as_sampled([rows[1]], tmp_path / "candidates.jsonl", str(model))


# --- the pipeline ---


def short_of(preference: list[str]) -> list[str]:
    """The task's own overrides of training, without those that are made smaller."""
    return [given for given in preference if not given.startswith(("adapter.rank", "warmup_steps"))]


@pytest.fixture(scope="module")
def task(model, tmp_path_factory) -> Path:
    """The experiment's own task at a small size."""
    folder = tmp_path_factory.mktemp("task")
    for split, n in (("train", 40), ("test", 12)):
        rows = [{"prompt": [{"role": "user", "content": " the film" + " it" * (i % 7) + " was" * (i // 7)}]} for i in range(n)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = OmegaConf.load(HERE / "smollm.yaml")
    short = ["model=blank_model", "eval_batch_size=16", "n_eval_examples=8", "sample_during_eval=false", "wandb.enabled=false"]
    task.update(
        common=[*short, "max_length=64", "max_prompt_length=48", f"local_dirs=['{folder}/local']"],
        preference=[*short_of(task.preference), "adapter.rank=4", "warmup_steps=1"],
        model=str(model),
        prompts={split: str(folder / f"{split}.jsonl") for split in ("train", "test")},
        examples=64,
        max_new_tokens=10,
        completion_batch_size=40,
        seeds=[0, 1],
        lrs=[0.03],
        methods={"DPO": "loss=dpo", "TDPO2 0.5": "loss=tdpo2 loss.alpha=0.5"},
        checkpoints=2,
        n_prompts=10,
        n=4,
        levels=[0.55, 0.6],
        shown={"beta": 0.1, "lr": 0.03},
    )
    OmegaConf.save(task, folder / "small.yaml")
    return folder / "small.yaml"


@pytest.fixture(scope="module")
def experiment(task, tmp_path_factory) -> Path:
    """The folder of the experiment after one start."""
    out = tmp_path_factory.mktemp("experiment")
    start(task, out)
    return out


def start(task: Path, out: Path) -> list[dict]:
    """Start the experiment. Return the arguments of its progress bars."""
    bars = []

    class Bar(jobs.tqdm.tqdm):
        def __init__(self, **settings):
            bars.append(settings)
            super().__init__(**{**settings, "disable": True})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["run.py", "--task", str(task), "--out", str(out)])
        patch.setattr(frontier, "run_script", forked_script)
        patch.setattr(jobs, "run_script", forked_script)
        patch.setattr(jobs.tqdm, "tqdm", Bar)
        frontier.main()
    return bars


def lines_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.processes
def test_training_sees_the_sampled_tokens(experiment, model):
    """The ids of each pair's prompt and of both responses, with the end, are those of a completion of that prompt."""
    pytest.importorskip("vaderSentiment")
    sampled = {
        (*row["prompt_ids"], None, *row["completion_ids"]): row for row in lines_of(experiment / "seed0" / "completions-train.jsonl")
    }
    file = str(experiment / "seed0" / "pairs" / "train.jsonl")
    options = {"jsonl": {**default_options("jsonl"), "path": file, "eval_path": file}}
    split = load_split(options, "train", word_tokenizer(), 64, 48, silent=True)
    assert len(split) >= 10
    reward = reward_model("vader", torch.device("cpu"), None)
    for example, pair in zip(next(split.epochs(0, shuffle=False)), lines_of(Path(file)), strict=True):
        tokens = split.example(example)
        rows = [sampled[(*tokens.prompt, None, *response)] for response in tokens.responses]
        assert [response[-1] for response in tokens.responses] == [2, 2]  # <|im_end|>
        assert [row["completion"] for row in rows] == [pair[role][0]["content"] for role in ("chosen", "rejected")]
        scores = [pair["chosen_score"], pair["rejected_score"]]
        assert reward([row["completion"] for row in rows]) == scores and scores[0] - scores[1] >= 0.1
    assert not (experiment / "seed1" / "pairs").exists()  # completions are shared


@pytest.mark.processes
def test_runs_are_measured_against_the_model_itself(experiment):
    pytest.importorskip("vaderSentiment")
    gains = []
    for file in (file for method in ("dpo", "tdpo2_0.5") for file in experiment.glob(f"{method}/*/measured.json")):
        points = json.loads(file.read_text())["points"]
        assert [point["examples"] for point in points] == [0, 32, 64]
        assert points[0]["samples/kl"] == pytest.approx(0, abs=1e-6) and points[-1]["samples/kl"] > 0.02
        assert points[-1]["samples/tokens"] <= 10
        rows = lines_of(file.parent / "final_samples.jsonl")
        assert len(rows) == 40 and sum(row["reward"] for row in rows) / 40 == pytest.approx(points[-1]["samples/reward"])
        assert not list(file.parent.glob("step-*/policy.pt"))
        gains.append(points[-1]["samples/reward"] - points[0]["samples/reward"])
    assert len(gains) == 4 and sum(gains) / 4 > 0.03
    starts = [json.loads((experiment / "start" / f"seed{seed}.json").read_text())["measures"] for seed in (0, 1)]
    assert starts[0] != starts[1] and starts[0]["samples/reference_nll"] == pytest.approx(starts[0]["samples/entropy"], rel=0.1)


@pytest.mark.processes
def test_tables_are_those_of_the_results(experiment):
    """table.md is made of results.json alone, whose means and intervals are those of the runs."""
    pytest.importorskip("vaderSentiment")
    results = json.loads((experiment / "results.json").read_text())
    assert (experiment / "table.md").read_text() == "\n\n".join(tables.tables(results)) + "\n"
    ends = [json.loads((experiment / f"dpo/beta0.1_lr0.03_seed{seed}/measured.json").read_text())["points"][-1] for seed in (0, 1)]
    for name in ("samples/reward", "samples/kl", "samples/distinct_2"):
        a, b = (end[name] for end in ends)
        half = 12.7062 * abs(a - b) / 2  # Student's t with one degree of freedom
        found = results["end"]["DPO"][name]
        assert found["n"] == 2 and found["seeds"] == [0, 1] and found["mean"] == pytest.approx((a + b) / 2)
        assert (found["low"], found["high"]) == pytest.approx((found["mean"] - half, found["mean"] + half), rel=1e-4, abs=1e-6)
    perplexity = results["end"]["DPO"]["samples/reference_perplexity"]["mean"]
    assert perplexity == pytest.approx(sum(math.exp(end["samples/reference_nll"]) for end in ends) / 2)
    assert f"| DPO | {results['end']['DPO']['samples/reward']['mean']:.3f} [" in (experiment / "table.md").read_text()
    assert (experiment / "frontier.png").stat().st_size > 20_000
    text = (experiment / "samples.md").read_text()
    listed = text.split("## DPO: highest rewards of 80\n")[1].split("##")[0].strip().splitlines()
    rewards = [float(line.split()[1]) for line in listed]
    assert len(listed) == 20 and rewards == sorted(rewards, reverse=True) and rewards[0] > float(text.rsplit("\n- ", 1)[1].split()[0])


@pytest.mark.processes
def test_a_second_start_does_what_is_missing(experiment, task, tmp_path):
    """One run is lost, another one is not measured and has a checkpoint of an interruption: the others stay as they are, and the results
    are the same."""
    pytest.importorskip("vaderSentiment")
    out = shutil.copytree(experiment, tmp_path / "copy", symlinks=True)
    before = (out / "results.json").read_text()
    lost, unmeasured = out / "dpo" / "beta0.1_lr0.03_seed1", out / "tdpo2_0.5" / "beta0.1_lr0.03_seed0"
    shutil.rmtree(lost)
    (unmeasured / "measured.json").unlink()
    shutil.copytree(unmeasured / "step-32", unmeasured / "step-40")
    kept = {
        file: file.stat().st_mtime_ns for file in out.rglob("*") if file.is_file() and "step-" in str(file) or file.name == "measured.json"
    }
    bars = start(task, out)
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    assert (out / "results.json").read_text() == before
    assert (lost / "measured.json").exists() and (unmeasured / "measured.json").exists()
    assert [(bar["initial"], bar["total"]) for bar in bars] == [(1, 1), (2.5, 4)]  # runs, each trained and measured


def test_errors_of_a_task_name_the_remedy(task, tmp_path):
    with pytest.raises(UserError, match="--task nowhere: no such task or file; the tasks are imdb, reviews"):
        frontier.load_task("nowhere", [], None)
    with pytest.raises(UserError, match="unknown key bogus: the keys of small.yaml are common"):
        frontier.load_task(str(task), ["bogus=1"], None)
    with pytest.raises(UserError, match="sft: null, so it needs a model, prompts and a reward"):
        frontier.load_task(str(task), ["prompts=null"], None)
    with pytest.raises(UserError, match="prompts.test=.*gone.jsonl does not exist"):
        frontier.load_task(str(task), ["prompts.test=gone.jsonl"], None)
    with pytest.raises(UserError, match="every seed has its own SFT model"):
        frontier.load_task("reviews", ["share_completions=true"], None)
    (tmp_path / "old.yaml").write_text("common: []\n")
    with pytest.raises(UserError, match="lacks the keys batch_size, betas"):
        frontier.load_task(str(tmp_path / "old.yaml"), [], None)


def test_means_and_intervals_over_seeds_by_hand():
    found = report.over_seeds({0: 1.0, 1: 2.0, 2: 3.0, 3: None})
    assert (found["seeds"], found["n"], found["of"], found["mean"], found["deviation"]) == ([0, 1, 2], 3, 4, 2.0, 1.0)
    assert found["high"] - 2 == pytest.approx(4.302653 / 3**0.5) == 2 - found["low"]
    alone = report.over_seeds({0: 1.0, 1: None})
    assert (alone["mean"], alone["low"], alone["n"]) == (1.0, None, 1) and report.over_seeds({0: None})["mean"] is None
    assert tables.with_interval(alone) == "1.000"
    assert tables.with_interval(report.over_seeds({0: None})) == tables.with_interval(None) == "-"


def test_differences_from_dpo_are_of_the_same_seed_and_ties_are_named():
    """A method is 0.1, 0.2 and 0.3 above DPO, whose own rewards differ by more than that; its KL is once above and twice below."""
    dpo = {0: (0.2, 1.0), 1: (0.5, 2.0), 2: (0.8, 3.0), 3: (0.9, 4.0)}  # seed -> reward, KL; the method has no run with seed 3
    own = {0: (0.3, 1.2), 1: (0.7, 1.9), 2: (1.1, 2.9)}
    runs = [
        report.Run(method, seed, 0.1, 1e-4, [{"examples": n, tables.REWARD: x, tables.KL: y} for n in (0, 8)])
        for method, by_seed in (("DPO", dpo), ("TDPO2", own))
        for seed, (x, y) in by_seed.items()
    ]
    ends = {method: report.at_point([run for run in runs if run.method == method], -1) for method in ("DPO", "TDPO2")}
    found = report.differences(ends["TDPO2"], ends["DPO"])
    assert list(found) == [tables.REWARD, tables.KL] and found[tables.REWARD]["seeds"] == [0, 1, 2]
    half = 4.302653 * 0.1 / 3**0.5
    assert [found[tables.REWARD][key] for key in ("mean", "low", "high")] == pytest.approx([0.2, 0.2 - half, 0.2 + half], rel=1e-4)
    assert found[tables.KL]["mean"] == pytest.approx(0, abs=1e-9)
    assert [tables.is_tie(found[name]) for name in (tables.REWARD, tables.KL)] == [True, True]  # 0.2 - 0.248 is below 0
    assert not tables.is_tie({**found[tables.REWARD], "low": 0.01}) and not tables.is_tie(None)
    start = report.differences(ends["DPO"], report.at_point(runs[:4], 0))
    assert start[tables.REWARD]["mean"] == 0 and start[tables.REWARD]["n"] == 4
    (row,) = (line for line in tables.difference_table({"TDPO2": found}, "DPO's").splitlines() if line.startswith("| TDPO2"))
    assert row.startswith("| TDPO2 | 0.200 [-0.048, 0.448], tie |")


def test_ends_of_every_setting_of_the_grid():
    points = {tables.REWARD: 0.5, tables.KL: 1.0, "samples/distinct_2": 0.75, "examples": 8}
    runs = [report.Run("DPO", seed, 0.1, 1e-4, [points, {**points, tables.REWARD: 0.6 + 0.1 * seed}]) for seed in (0, 1)]
    runs.append(report.Run("TDPO1", 0, 0.5, 1e-4, [points]))
    table = tables.grid_table({"grid": report.grid_of(runs, ["DPO", "TDPO1"]), "end": {"DPO": {}, "TDPO1": {}}}).splitlines()
    assert table[-2:] == ["| 0.1, 0.0001 | 0.650 at 1.00, 0.750 | - |", "| 0.5, 0.0001 | - | 0.500 at 1.00, 0.750 |"]


def test_repetition_by_hand():
    found = measure.repetition(["so good so Good", "so good film", ""])
    assert found["texts/distinct_2"] == pytest.approx(3 / 5)  # so good, good so, good film
    assert found["texts/repeated_words"] == pytest.approx((1 / 2 + 0 + 0) / 3)


def test_checks_of_a_reward_by_hand():
    """The reward counts the word good: of a response of 12 words after the eighth one."""
    texts = ["Thank you, good", "the film was good", "the film was what it was and then " + "good good good ok"]
    reward = Reward(lambda some: [float(text.split().count("good")) for text in some], of_completion=False)
    found = checks.measures_of([{"prompt": "good", "completion": text} for text in texts], reward)
    assert (found["reward"], found["reward_of_first_8_words"], found["words"]) == (5 / 3, 2 / 3, pytest.approx(19 / 3))
    assert found["addressed"] == pytest.approx(1 / 3)
    deviations = [[-2 / 3, -2 / 3, 4 / 3], [3 - 19 / 3, 4 - 19 / 3, 12 - 19 / 3]]
    products = [sum(x * y for x, y in zip(a, b)) for a, b in ((deviations[0], deviations[1]), (deviations[0],) * 2, (deviations[1],) * 2)]
    assert found["correlation_with_words"] == pytest.approx(products[0] / math.sqrt(products[1] * products[2]))


@pytest.mark.processes
def test_checks_of_an_experiment(experiment):
    pytest.importorskip("vaderSentiment")
    both = checks.checks_of(experiment)
    found, minus = both["end"], both["minus_dpo"]["TDPO2 0.5"]
    assert list(found) == ["reference", "DPO", "TDPO2 0.5"] and found["DPO"]["words"]["seeds"] == [0, 1]
    assert minus["words"]["mean"] == pytest.approx(found["TDPO2 0.5"]["words"]["mean"] - found["DPO"]["words"]["mean"])
    ends = json.loads((experiment / "results.json").read_text())["end"]
    for method, measures in ends.items():
        assert found[method]["reward"]["mean"] == pytest.approx(measures["samples/reward"]["mean"])


def test_checks_of_no_experiment_or_of_a_gold_reward_say_so(tmp_path, monkeypatch):
    for folder, reward, message in (("none", None, "none/task.yaml"), ("gold", "reward: null\n", "gold' has the gold reward of its data")):
        if reward:
            (tmp_path / folder).mkdir()
            (tmp_path / folder / "task.yaml").write_text(reward)
        monkeypatch.setattr(sys, "argv", ["checks.py", str(tmp_path / folder)])
        with pytest.raises(SystemExit, match=f"error: .*{message}"):
            checks.main()
