"""Training with every loss: fast and plain scoring, one and two ranks, stopped and resumed; moving references; self-play."""

import importlib.util
import os
import signal

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import (
    ARCHIVE,
    DATA,
    MINI,
    QUIET,
    ROOT,
    SEGMENTS,
    SHARDED,
    Command,
    assert_close_logs,
    compose,
    has_steps,
    logs_of,
    run,
    turn,
    wait_for,
    weights_of,
    write_lines,
)
from transformers import AutoModelForCausalLM

import eval as eval_tool
import sample
import token_report
from preference_datasets import default_options, get_dataset, load_split
from tdpo.checkpointing.training_state import read_progress
from tdpo.data.batching import BatchStream
from tdpo.data.contract import COMPLETIONS, PAIRS
from tdpo.data.sources import Place, read_rows
from tdpo.losses import OBJECTIVES, LossOutput, Objective

LENGTH = ["n_examples=40", "n_eval_examples=13", "eval_batch_size=5", "eval_every=24"]


@pytest.fixture(scope="module")
def files(tmp_path_factory, chat_tokenizer):
    """Data files in the forms that some losses need, and a tokenizer: {name: path}."""
    folder = tmp_path_factory.mktemp("data")
    rows = [row.fields for row in read_rows(Place(str(MINI / "data")), "train")][:48]
    cut = [(row["chosen"].rpartition("\n\nAssistant:"), row["rejected"].rpartition("\n\nAssistant:")) for row in rows]
    scored = [
        {"prompt": w[0] + w[1], "completion": text, "score": score + i % 5}
        for i, (w, r) in enumerate(cut)
        for text, score in ((w[2], 0.7 + i / 7), (r[2], 0.5))
        if w[0] == r[0] and text.strip()
    ]
    chats = []
    for i in range(1, 31):
        start = [turn("user", "hi" * i), *SEGMENTS["chosen"][1:3]]
        chosen = [*start, turn("assistant", f"bc{i}", True), turn("user", "d"), turn("assistant", "e" * i, True)]
        chats.append(
            {"chosen": chosen, "rejected": [*start, turn("assistant", "no", True), turn("user", "gh"), turn("assistant", "ij", True)]}
        )
    chat_tokenizer.save_pretrained(folder / "tokenizer")
    return {
        "scored": write_lines(folder / "scored.jsonl", scored),
        "segments": write_lines(folder / "segments.jsonl", chats),
        "tokenizer": str(folder / "tokenizer"),
    }


def options_of(name: str, files: dict[str, str]) -> list[str]:
    if name == "odpo":
        rows = ["datasets=[jsonl]", f"datasets.jsonl.path={files['scored']}", "datasets.jsonl.rows=scored"]
        return [*(x for x in DATA if not x.startswith("datasets")), *rows, ARCHIVE, "loss=odpo", "loss.kl_weight=0.01"]
    if name == "sdpo_segment":
        model = ["model=tiny", f"model.tokenizer_name_or_path={files['tokenizer']}", "model.from_config.hidden_size=32"]
        rows = ["datasets=[jsonl]", f"datasets.jsonl.path={files['segments']}", "datasets.jsonl.rows=segments"]
        return [
            *model,
            *rows,
            "model.from_config.max_position_embeddings=256",
            "loss=sdpo_segment",
            "max_length=200",
            "max_prompt_length=64",
            "batch_size=4",
            "lr=5e-4",
        ]
    more = {
        "kto": ["datasets.hh.unpair=true"],
        "sdpo_stepwise": ["loss.parts=2", "n_epochs=1"],
        "trdpo": ["reference.update_every=2", "log_kl=true"],
    }
    return [*DATA, ARCHIVE, f"loss={'dpo' if name == 'trdpo' else name}", *more.get(name, [])]


NAMES = ["rdpo", "dpop", "simpo", "slic", "odpo", "kto", "sdpo_stepwise", "sdpo_segment", "trdpo"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, files, ranks):
    """Run folders by (name, scoring, number of ranks)."""
    folder = tmp_path_factory.mktemp("runs")
    found = {}
    for name in NAMES:
        for scoring in ("fast", "plain"):
            common = [*options_of(name, files), *LENGTH, f"scoring={scoring}"]
            found[name, scoring, 1] = run(*common, "gradient_accumulation_steps=2", f"local_run_dir={folder}/{name}-{scoring}")
            found[name, scoring, 2] = ranks(2).run(*common, *SHARDED, f"local_run_dir={folder}/{name}-{scoring}-2")
    return found


@pytest.mark.parametrize("name", NAMES)
def test_fast_plain_and_sharded_runs_have_the_same_logs(name, runs):
    for scoring, ranks in (("plain", 1), ("fast", 2), ("plain", 2)):
        assert_close_logs(logs_of(runs[name, "fast", 1]), logs_of(runs[name, scoring, ranks]))
    first, last = logs_of(runs[name, "fast", 1], "train")[0], logs_of(runs[name, "fast", 1], "train")[-1]
    assert len(logs_of(runs[name, "fast", 1], "train")) >= 5 and last["loss/train"] != first["loss/train"]


@pytest.mark.parametrize("name", ["kto", "odpo", "sdpo_segment", "trdpo"])
def test_a_resumed_run_ends_with_the_same_weights(name, runs, files, tmp_path):
    options = [*options_of(name, files), *LENGTH, "gradient_accumulation_steps=2", "scoring=fast"]
    first = run(*options, "n_examples=24", f"local_run_dir={tmp_path}/run")
    run(*options, f"resume={first}")
    for key, tensor in weights_of(runs[name, "fast", 1]).items():
        assert torch.equal(weights_of(first)[key], tensor)


def test_a_loss_without_beta_trains_and_logs(tmp_path, monkeypatch):
    """An entry in OBJECTIVES is all that a new loss needs; no other code knows its hyperparameters."""

    def hinge(scores, margin: float):
        logits = scores["chosen"].log_ratio - scores["rejected"].log_ratio
        rewards = {role: score.log_ratio.detach() for role, score in scores.items()}
        return LossOutput(torch.relu(margin - logits), rewards, logits.detach())

    monkeypatch.setitem(OBJECTIVES, "hinge", Objective("hinge", hinge))
    run_dir = run(
        *DATA,
        ARCHIVE,
        "loss=dpo",
        "loss.name=hinge",
        "~loss.beta",
        "~loss.label_smoothing",
        "~loss.reference_free",
        "+loss.margin=2.0",
        "n_examples=16",
        f"local_run_dir={tmp_path}/run",
    )
    assert logs_of(run_dir, "train")[0]["loss/train"] == pytest.approx(2.0)
    page = tmp_path / "report.html"
    token_report.run(compose(f"run={run_dir}", "n_pairs=2", f"out={page}", name="token_report"))
    assert page.stat().st_size > 1000


# --- evaluation of finished runs ---


def evaluated(run_dir, *overrides):
    (measures,) = eval_tool.run(compose(f"run={run_dir}", "n_prompts=0", "n_pairs=13", *overrides, name="eval")).values()
    return measures


def test_eval_of_segments_equals_the_eval_of_training(files, tmp_path):
    """Both count the turns of the segment only."""
    options = [*options_of("sdpo_segment", files), "n_examples=4", "n_eval_examples=13", "log_kl=true"]
    start = run(*options, f"local_run_dir={tmp_path}/start")
    archive = f"{start}/LATEST/policy.pt"
    trained = run(*options, f"model.archive={archive}", "lr=1e-2", f"local_run_dir={tmp_path}/run")
    (last,) = logs_of(trained, "eval")[-1:]
    found = evaluated(trained)
    assert last["kl_eval/chosen"] > 0.01
    assert found["seqkl/chosen"].mean == pytest.approx(last["kl_eval/chosen"], rel=1e-4)
    assert found["accuracy/logit"].mean == pytest.approx(last["logits_eval/accuracies"])
    page = tmp_path / "report.html"
    token_report.run(compose(f"run={trained}", "n_pairs=3", f"out={page}", name="token_report"))
    assert page.stat().st_size > 1000


@pytest.mark.parametrize("name", ["simpo", "slic"])
def test_a_run_without_a_reference_is_compared_with_its_starting_weights(name, runs):
    found = evaluated(runs[name, "fast", 1])
    assert found["seqkl/chosen"].mean > 1e-4
    if name == "simpo":
        assert found["accuracy/logit"].mean == pytest.approx(logs_of(runs[name, "fast", 1], "eval")[-1]["logits_eval/accuracies"], abs=0.01)


def test_eval_warns_that_the_reference_has_moved(runs, capsys):
    evaluated(runs["trdpo", "fast", 1])
    assert "its reference was updated during training" in capsys.readouterr().out


# --- kto ---


def test_z0_by_hand_however_the_batch_is_cut(tmp_path, mini_tokenizer):
    """z0 of the second batch, and of an eval over all its examples, computed from a checkpoint by Transformers' own forward pass."""
    options = [*options_of("kto", {}), "n_examples=16", "lr=1e-2", "warmup_steps=0", "save_every=8", "loss.beta=1", "n_eval_examples=10"]
    # Start from a model without SFT: all responses become more likely, so z0 is not 0.
    options = [option for option in [*options, "loss.undesirable_weight=0"] if option != ARCHIVE]
    options += ["model.policy_dtype=float64", "eval_every=8", "do_first_eval=false"]
    whole = run(*options, f"local_run_dir={tmp_path}/whole")
    parts = run(*options, "gradient_accumulation_steps=8", "eval_batch_size=3", "scoring=plain", f"local_run_dir={tmp_path}/parts")
    assert_close_logs(logs_of(whole), logs_of(parts), rel=1e-9, abs=1e-12)

    data = {"hh": {**default_options("hh"), "path": str(MINI / "data"), "unpair": True}}
    split, held_out = (load_split(data, name, mini_tokenizer, 64, 32, COMPLETIONS, silent=True) for name in ("train", "test"))
    models = [AutoModelForCausalLM.from_pretrained(MINI / "model").double().eval() for _ in range(2)]
    models[0].load_state_dict(torch.load(whole / "step-8" / "policy.pt", weights_only=True)["state"])

    def ratio(example) -> float:
        prompt, (response,), *_ = split_of_example.example(example._replace(mismatched=True))
        ids = torch.tensor([prompt + response])
        logps = [model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1) for model in models]
        return sum((logps[0] - logps[1])[range(len(response)), response].tolist())

    split_of_example = split
    batch = list(BatchStream(split, 8, seed=0, n_epochs=1))[1]
    with torch.no_grad():
        z0 = max(0.0, sum(map(ratio, batch)) / len(batch))
        assert all(example.partner[0] != example.prompt for example in batch)
        second = logs_of(whole, "train")[1]
        assert z0 > 0.1 and second["kl_train/baseline"] == pytest.approx(z0, rel=1e-6, abs=1e-9)
        split_of_example = held_out
        examples = next(held_out.epochs(0))[:10]
        z0 = max(0.0, sum(map(ratio, examples)) / len(examples))
    assert z0 > 0.1 and logs_of(whole, "eval")[0]["kl_eval/baseline"] == pytest.approx(z0, rel=1e-6, abs=1e-9)


def test_kto_without_z0_and_with_a_weight_of_0(tmp_path):
    """Without z0 no baseline is logged; a weight of 0 takes one kind of response out of the loss."""
    options = [*options_of("kto", {}), "n_examples=8", "loss.z0=0", "loss.undesirable_weight=0"]
    log = logs_of(run(*options, f"local_run_dir={tmp_path}/run"), "train")[0]
    assert "kl_train/baseline" not in log and log["loss/train"] == pytest.approx(0.25)  # half of them desirable: 0.5 sigmoid(0)


# --- moving references ---


def reference_in(folder) -> dict[str, torch.Tensor]:
    """Return the reference's weights in a checkpoint's state."""
    state = AutoModelForCausalLM.from_pretrained(MINI / "model").state_dict()
    for tensor in state.values():
        tensor.fill_(7)
    dcp.load({"reference": state}, storage_reader=dcp.FileSystemReader(folder / "state"), no_dist=True)
    return state


def test_a_moving_reference_by_hand(tmp_path):
    """After steps 2 and 4 it is 0.3 times the policy plus 0.7 times the reference before."""
    options = [*DATA, ARCHIVE, "loss=dpo", "reference.update_every=2", "reference.mixup=0.3", "save_every=8", "n_examples=40"]
    run_dir = run(*options, f"local_run_dir={tmp_path}/run")
    expected = torch.load(MINI / "sft_policy.pt", weights_only=True)["state"]
    for step in (1, 2, 3, 4, 5):
        if step % 2 == 0:
            policy = torch.load(run_dir / f"step-{8 * step}" / "policy.pt", weights_only=True)["state"]
            expected = {name: 0.3 * policy[name] + 0.7 * tensor for name, tensor in expected.items()}
        found = reference_in(run_dir / f"step-{8 * step}")
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-7)


def test_stepwise_replaces_the_reference_after_each_stage(tmp_path, mini_tokenizer):
    """96 pairs in three stages of four batches, easiest first: policy and reference are equal at the first step of each stage."""
    options = [*DATA, ARCHIVE, "loss=sdpo_stepwise", "loss.order=easy_to_hard", "n_epochs=1", "eval_batch_size=7", "log_kl=true"]
    run_dir = run(*options, f"local_run_dir={tmp_path}/run")
    logs = logs_of(run_dir, "train")
    same = [i for i, log in enumerate(logs) if abs(log["loss/train"] - 0.693147) < 1e-5 and log["kl_train/chosen"] < 1e-6]
    assert same == [0, 4, 8] and len(logs) == 12

    data = {"hh": {**default_options("hh"), "path": str(MINI / "data")}}
    split = load_split(data, "train", mini_tokenizer, 64, 32, PAIRS, silent=True)
    model = AutoModelForCausalLM.from_pretrained(MINI / "model").eval()
    model.load_state_dict(torch.load(MINI / "sft_policy.pt", weights_only=True)["state"])

    @torch.no_grad()
    def margin(example) -> float:
        prompt, responses, *_ = split.example(example)
        logits = [model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1) for ids in responses]
        chosen, rejected = (x[range(len(ids)), ids].sum().item() for x, ids in zip(logits, responses))
        return chosen - rejected

    order = read_progress(str(run_dir / "LATEST")).hooks["Stages"]["order"]
    examples = next(split.epochs(0, shuffle=False))
    margins = [margin(examples[i]) for i in order]
    assert sorted(order) == list(range(96)) and all(b <= a + 1e-4 for a, b in zip(margins, margins[1:]))


def test_stepwise_resumed_has_the_order_and_the_reference(tmp_path):
    options = [*DATA, ARCHIVE, "loss=sdpo_stepwise", "loss.order=easy_to_hard", "loss.parts=3", "n_epochs=1"]
    straight = run(*options, f"local_run_dir={tmp_path}/straight")
    for stop in (32, 56):  # at the end of a stage, and within one
        first = run(*options, f"n_examples={stop}", f"resume={tmp_path}/run" if stop > 32 else f"local_run_dir={tmp_path}/run")
    run(*options, f"resume={first}")
    for name, tensor in weights_of(straight).items():
        assert torch.equal(weights_of(first)[name], tensor)


# --- self-play ---

FEW = ["datasets.reviews.n_train=512", "datasets.reviews.n_test=16"]


def test_self_play(tmp_path, monkeypatch):
    """Two iterations, each against samples of the model before. An interrupted loop is resumed by the same command."""
    spec = importlib.util.spec_from_file_location("spin", ROOT / "experiments" / "spin.py")
    spin = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(spin)
    sft = run("model=tiny", "n_examples=512", "batch_size=64", *FEW, f"local_run_dir={tmp_path}/sft")
    own = {**spin.OWN, "run": str(sft), "out": str(tmp_path / "spin"), "iterations": "2", "n_prompts": "32"}
    overrides = ["model=tiny", "batch_size=8", "lr=5e-4", "warmup_steps=0", "n_eval_examples=16"]
    called = []

    def in_this_process(script, *arguments):
        """Run the script in this process; the fifth call (the second iteration's test prompts) raises KeyboardInterrupt."""
        called.append(script)
        if len(called) == 5:
            raise KeyboardInterrupt
        if script == "train.py":
            run(*arguments)
        else:
            sample.run(compose(*arguments, name="sample"))

    monkeypatch.setattr(spin, "call", in_this_process)
    with pytest.raises(KeyboardInterrupt):
        spin.spin(own, overrides)
    spin.spin(own, overrides)
    assert called == [*(one := ["sample.py", "sample.py", "train.py"]), *one[:2], *one, *one]
    for k in (1, 2):
        folder = tmp_path / "spin" / f"iteration-{k}"
        pairs = get_dataset("jsonl", "train", True, options={**default_options("jsonl"), "path": str(folder / "pairs"), "eval_path": "x"})
        samples = {row.fields["prompt"]: row.fields["completion"] for row in read_rows(Place(str(folder / "samples-train.jsonl")), "train")}
        targets = get_dataset("reviews", "train", True)
        assert 24 < len(pairs) <= 32
        assert all(entry["responses"] == [targets[prompt]["sft_target"], samples[prompt]] for prompt, entry in pairs.items())
        logs = logs_of(folder / "run", "eval")
        assert abs(logs[0]["rewards_eval/margins"]) < 1e-6 and logs[-1]["rewards_eval/margins"] > 0.01
    from_first = torch.load(tmp_path / "spin/iteration-1/run/LATEST/policy.pt", weights_only=True)["state"]
    second = read_progress(str(tmp_path / "spin/iteration-2/run/LATEST"))
    assert second.reference["archive"].startswith(os.path.realpath(tmp_path / "spin/iteration-1/run"))
    assert any(not torch.equal(tensor, weights_of(tmp_path / "spin/iteration-2/run")[name]) for name, tensor in from_first.items())


@pytest.mark.processes
def test_a_signal_is_forwarded_to_the_training_of_self_play(tmp_path):
    """The training run saves a checkpoint, and the loop ends with the signal's exit code."""
    sft = run("model=tiny", "n_examples=64", "batch_size=32", *FEW, f"local_run_dir={tmp_path}/sft")
    options = [f"run={sft}", f"out={tmp_path}/spin", "iterations=1", "n_prompts=32"]
    train = [*QUIET[1:], "model=tiny", "batch_size=8", "n_epochs=2000", "eval_every=1000000"]
    process = Command("tests/workers/self_play.py", *options, *train)
    wait_for(lambda: has_steps(tmp_path / "spin/iteration-1/run", 3))
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in output, output[-2000:]
    assert (tmp_path / "spin/iteration-1/run/LATEST/policy.pt").exists()
