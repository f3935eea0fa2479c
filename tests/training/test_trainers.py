"""Properties of the training loop: what the gradient depends on, what is evaluated, when it logs, saves and stops."""

import json
import os
import shutil
from dataclasses import replace

import pytest
import torch
from helpers import DATA, MINI, PREFERENCE, QUIET, TIMES, compose, logs_of, run, weights_of
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM

from tdpo.losses import get_objective
from tdpo.models.adapters import OwnReference, attach
from tdpo.scoring import distributions
from tdpo.scoring.scorer import Scorer
from tdpo.training.strategies import SingleDevice, prepare_blocks
from tdpo.utils import RunError
from trainers import BasicTrainer


def test_the_gradient_does_not_depend_on_the_cut_of_the_batch(tmp_path):
    """One SGD step with 1, 4 and 8 microbatches; in float64, so that rounding cannot hide a wrong weight of an example."""
    options = [
        *PREFERENCE,
        "optimizer=SGD",
        "lr=0.1",
        "warmup_steps=0",
        "model.policy_dtype=float64",
        "n_examples=8",
        "do_first_eval=false",
    ]
    runs = [run(*options, f"gradient_accumulation_steps={n}", f"local_run_dir={tmp_path}/{n}") for n in (1, 4, 8)]
    first, *others = (weights_of(run_dir) for run_dir in runs)
    start = torch.load(MINI / "sft_policy.pt", weights_only=True)["state"]
    for weights in others:
        for name, tensor in weights.items():
            torch.testing.assert_close(tensor, first[name], rtol=0, atol=1e-12)
    assert max((first[name] - start[name]).abs().max() for name in first) > 1e-3


def test_a_smaller_last_batch_counts_its_own_examples(tmp_path):
    """96 train examples in a batch of 96, and in an incomplete batch of 100: the same gradient, hence the same SGD step."""
    options = [*PREFERENCE, "optimizer=SGD", "lr=0.1", "warmup_steps=0", "model.policy_dtype=float64", "n_epochs=1", "do_first_eval=false"]
    whole = run(*options, "batch_size=96", f"local_run_dir={tmp_path}/whole")
    smaller = run(*options, "batch_size=100", "drop_last=false", f"local_run_dir={tmp_path}/smaller")
    for name, tensor in weights_of(whole).items():
        torch.testing.assert_close(weights_of(smaller)[name], tensor, rtol=0, atol=1e-12)


def test_evals_and_checkpoints_after_a_smaller_last_batch(tmp_path):
    """Two epochs of 40, 40 and 16 examples: an eval after each step that reaches or passes a multiple of 40."""
    options = [*PREFERENCE, "drop_last=false", "batch_size=40", "n_epochs=2", "n_eval_examples=4", "eval_every=40"]
    run_dir = run(*options, f"local_run_dir={tmp_path}/run")
    assert [log["counters/examples"] for log in logs_of(run_dir, "train")] == [40, 80, 96, 136, 176, 192]
    assert [log["counters/examples"] for log in logs_of(run_dir, "eval")] == [0, 40, 80, 136, 176, 192]
    steps = {name for name in os.listdir(run_dir) if name.startswith("step-")}
    assert steps == {"step-40", "step-80", "step-136", "step-176", "step-192"}


def test_the_seed_determines_the_run(tmp_path):
    runs = [run(*PREFERENCE, f"seed={seed}", f"local_run_dir={tmp_path}/{i}", "n_examples=24") for i, seed in enumerate((0, 0, 1))]
    first, again, other = (weights_of(run_dir) for run_dir in runs)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])
    evals = [logs_of(run_dir, "eval")[0] for run_dir in runs]
    assert evals[0] == evals[1] == evals[2]  # the eval order does not depend on the seed


def test_every_eval_example_counts_once(tmp_path):
    """All 32 eval pairs in batches of 5, compared with each pair scored alone."""
    run_dir = run(*PREFERENCE, "n_eval_examples=null", "eval_batch_size=5", "n_examples=8", f"local_run_dir={tmp_path}/run")
    (first, _) = logs_of(run_dir, "eval")

    from preference_datasets import default_options, get_batch_iterator

    options = {"hh": {**default_options("hh"), "path": str(MINI / "data")}}
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MINI / "model")
    model = AutoModelForCausalLM.from_pretrained(MINI / "model", dtype=torch.float32)
    model.load_state_dict(torch.load(MINI / "sft_policy.pt", weights_only=True)["state"])
    scorer = Scorer(model, model, get_objective("dpo", beta=0.1))
    batches = get_batch_iterator(options, tokenizer, "test", 1, max_length=64, max_prompt_length=32, n_epochs=1, shuffle=False, silent=True)
    with torch.no_grad():
        logps = [scorer(batch).scores["chosen"].logps.item() for batch in batches]
    assert len(logps) == 32 and first["logps_eval/chosen"] == pytest.approx(sum(logps) / 32, rel=1e-5)


def test_schedule(tmp_path):
    """Evals, checkpoints and logs as the config schedules them; one eval and one checkpoint with hf/ at the end."""
    options = [*PREFERENCE, "n_examples=64", "eval_every=32", "save_every=24", "do_first_eval=false", f"local_run_dir={tmp_path}/run"]
    run_dir = run(*options)
    assert [log["counters/examples"] for log in logs_of(run_dir, "eval")] == [32, 64]
    assert [log["counters/examples"] for log in logs_of(run_dir, "train")] == list(range(8, 65, 8))
    assert {name for name in os.listdir(run_dir) if name.startswith("step-")} == {"step-24", "step-48", "step-64"}
    files = ["manifest.json", "policy.pt", "state"]
    assert sorted(os.listdir(run_dir / "step-24")) == files and sorted(os.listdir(run_dir / "LATEST")) == ["hf", *files]
    rates = [log["lr"] for log in logs_of(run_dir, "train")]
    assert rates == pytest.approx([5e-4 * min(1, (step + 1) / 4) for step in range(8)])  # linear warm-up, as published


def test_logs_are_not_more_frequent_than_configured(tmp_path):
    run_dir = run(*PREFERENCE, "n_examples=64", "minimum_log_interval_secs=3600", f"local_run_dir={tmp_path}/run")
    assert [log["counters/examples"] for log in logs_of(run_dir, "train")] == [8]


def test_a_train_log_covers_one_batch_and_has_the_published_names(tmp_path):
    run_dir = run(*PREFERENCE, "n_examples=8", f"local_run_dir={tmp_path}/run")
    (log,) = logs_of(run_dir, "train")
    published = {f"rewards_train/{x}" for x in ("chosen", "rejected", "accuracies", "margins")}
    published |= {f"kl_train/{x}" for x in ("chosen", "rejected", "margin")} | {f"logps_train/{x}" for x in ("chosen", "rejected")}
    published |= {"loss/train", "grad_norm", *TIMES, "counters/examples", "counters/updates"}
    ours = {"logits_train/margins", "logits_train/accuracies", "logratio_train/accuracies", "lr", "split"}
    assert set(log) == published | ours
    assert log["loss/train"] == pytest.approx(0.693147, abs=1e-6)  # policy equals reference at the first step


def test_debug_writes_no_checkpoint(tmp_path):
    run_dir = run(*PREFERENCE, "n_examples=8", "debug=true", f"local_run_dir={tmp_path}/run")
    assert sorted(os.listdir(run_dir)) == ["config.yaml", "metrics.jsonl"]


def test_samples_are_a_function_of_seed_and_step(tmp_path):
    """They do not depend on earlier evals, and drawing them does not change training."""
    options = [*PREFERENCE, "n_examples=16", "sample_during_eval=true", "n_eval_model_samples=6"]
    runs = [run(*options, f"eval_every={every}", f"local_run_dir={tmp_path}/{every}") for every in (8, 16)]
    often, seldom = ([json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()] for run_dir in runs)
    assert [row["counters/examples"] for row in often] == [0] * 6 + [8] * 6 + [16] * 6
    assert [row for row in often if row["counters/examples"] == 16] == [row for row in seldom if row["counters/examples"] == 16]
    assert all(row["policy"] and row["reference"] and row["prompt"].endswith("Assistant:") for row in often)
    weights = [weights_of(run_dir) for run_dir in runs]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("mp", ["null", "bfloat16"])
def test_policy_equals_reference_before_the_first_step(mp, tmp_path, capsys):
    """Exactly equal, in whatever dtype the policy computes (the published reference was float16)."""
    sampled = ["sample_during_eval=true", "n_eval_model_samples=2"]
    run_dir = run(*PREFERENCE, *sampled, "n_examples=8", f"model.fsdp_policy_mp={mp}", f"local_run_dir={tmp_path}/run")
    first = logs_of(run_dir, "eval")[0]
    for name in ("kl_eval/chosen", "kl_eval/rejected", "rewards_eval/chosen", "rewards_eval/rejected", "logits_eval/margins"):
        assert first[name] == 0
    assert "differ before the first step" not in capsys.readouterr().out
    assert all(tensor.dtype == torch.float32 for tensor in weights_of(run_dir).values())


def test_a_reference_of_another_dtype_is_noticed(tmp_path, capsys):
    run(*PREFERENCE, "n_examples=8", "model.reference_dtype=bfloat16", f"local_run_dir={tmp_path}/run")
    assert "policy and reference differ before the first step" in capsys.readouterr().out


def test_activation_checkpointing_changes_no_number(tmp_path, monkeypatch):
    """Also if the policy computes in another dtype than that of its weights: backward computes the blocks again."""
    forward, enabled = Scorer.forward, set()

    def recorded(self, batch, *arguments):
        name = "is_activation_checkpointing" if hasattr(self.policy, "is_activation_checkpointing") else "is_gradient_checkpointing"
        enabled.add(getattr(self.policy, name))
        return forward(self, batch, *arguments)

    monkeypatch.setattr(Scorer, "forward", recorded)
    for mp in ("null", "bfloat16"):
        options = [*PREFERENCE, "n_examples=16", f"model.fsdp_policy_mp={mp}"]
        runs = [run(*options, f"activation_checkpointing={x}", f"local_run_dir={tmp_path}/{mp}{x}") for x in ("false", "true")]
        plain, again = (weights_of(run_dir) for run_dir in runs)
        assert all(torch.equal(plain[name], again[name]) for name in plain)
    assert enabled == {False, True}


@pytest.mark.processes  # PyTorch's compiler starts one per core, and C++ compilers
def test_compiled_blocks_and_chunks_compute_the_same(tmp_path, monkeypatch):
    """The model has more layers than PyTorch's limit of recompilations: if each layer needed its own graph, PyTorch would give up.

    The graphs run uncompiled (aot_eager): PyTorch's code generator for CPUs takes a minute, and is not what is tested here.
    """
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiler(function, **options, backend="aot_eager"))
    distributions._compiled.cache_clear()
    options = [*QUIET, "model.from_config.num_hidden_layers=10", "loss=tdpo2", "loss.beta=0.5", "n_examples=16", "batch_size=8"]
    options += ["n_eval_examples=8", "eval_every=16", "gradient_accumulation_steps=2"]
    options += ["sample_during_eval=true", "n_eval_model_samples=2"]  # sampling, with its many lengths, is not compiled
    logs = []
    for compiled in ("false", "true"):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        logs.append(logs_of(run(*options, f"compile={compiled}", f"local_run_dir={tmp_path}/{compiled}")))
    for log, expected in zip(logs[1], logs[0], strict=True):
        for key in expected.keys() - {"split", *TIMES}:
            assert log[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-5), key
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert 5 <= graphs <= 12 and not torch._dynamo.utils.counters["graph_break"]


def test_blocks_of_a_policy_that_is_also_the_reference_are_compiled_once():
    config = compose("exp_name=x", "compile=true", "activation_checkpointing=true")
    policy = AutoModelForCausalLM.from_pretrained(MINI / "model")
    attach(policy, OmegaConf.merge(config.adapter, {"rank": 2}), torch.float32, seed=0)
    prepare_blocks(config, policy, OwnReference(policy))
    assert all(block._compiled_call_impl is not None for block in policy.gpt_neox.layers)


def test_deterministic_turns_on_pytorchs_deterministic_algorithms(tmp_path):
    try:
        run(*PREFERENCE, "n_examples=8", "deterministic=true", f"local_run_dir={tmp_path}/run")
        assert torch.are_deterministic_algorithms_enabled() and not torch.utils.deterministic.fill_uninitialized_memory
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = True


def test_samples_are_drawn_from_the_models_own_distribution(tmp_path, monkeypatch):
    """Temperature 1, no top-k or top-p, no penalty, up to max_length, whatever settings the model comes with."""
    greedy = tmp_path / "model"
    shutil.copytree(MINI / "model", greedy)
    settings = {"max_new_tokens": 2, "repetition_penalty": 5.0, "temperature": 0.01, "top_k": 1, "do_sample": True}
    (greedy / "generation_config.json").write_text(json.dumps(settings))
    options = [*DATA, f"model.name_or_path={greedy}", "n_examples=8", "sample_during_eval=true", "n_eval_model_samples=8", "debug=true"]
    options += ["max_length=40", "max_prompt_length=8"]
    seen = []
    generate = BasicTrainer.generate

    def recorded(self, model, batch):
        own = model.generation_config
        monkeypatch.setattr(model, "_prepare_generation_config", spy(model._prepare_generation_config, seen))
        texts = generate(self, model, batch)
        assert model.generation_config is own
        return texts

    monkeypatch.setattr(BasicTrainer, "generate", recorded)
    run(*options, f"local_run_dir={tmp_path}/run")
    for used in seen:
        assert (used.do_sample, used.temperature, used.top_k, used.top_p) == (True, 1.0, 0, 1.0)
        assert used.repetition_penalty in (None, 1.0) and used.max_new_tokens is None and used.max_length == 40
    assert seen


def spy(function, seen: list):
    """Return the function, wrapped so that it appends the first value it returns (a generation config) to `seen`."""

    def called(*arguments, **keywords):
        output = function(*arguments, **keywords)
        seen.append(output[0])
        return output

    return called


def poison(monkeypatch, at_step: int, where: str):
    """Make the loss or the gradient (`where`) of one step NaN."""
    score, clip = BasicTrainer.score, SingleDevice.clip_gradient
    steps = {"clip": 0}

    def poisoned_score(self, microbatch, sums, split):
        scored = score(self, microbatch, sums, split)
        if split == "train" and where == "loss" and self.progress.updates + self.progress.skipped_steps == at_step:
            losses = scored.output.losses * torch.tensor([float("nan")] + [1.0] * (len(microbatch.examples) - 1))
            sums.add({"loss/train": losses})
            return scored._replace(loss=scored.loss * float("nan"), output=replace(scored.output, losses=losses))
        return scored

    def poisoned_clip(self, max_norm):
        norm = clip(self, max_norm)
        steps["clip"] += 1
        if where == "gradient" and steps["clip"] == at_step + 1:
            for parameter in self.scorer.policy.parameters():
                parameter.grad *= float("nan")
            return norm * float("nan")
        return norm

    monkeypatch.setattr(BasicTrainer, "score", poisoned_score)
    monkeypatch.setattr(SingleDevice, "clip_gradient", poisoned_clip)


@pytest.mark.parametrize(
    "where,message", [("loss", "the loss is not finite; examples hh:"), ("gradient", "the gradient norm is not finite")]
)
def test_a_step_that_is_not_finite_stops_the_run_before_it_is_taken(where, message, tmp_path, monkeypatch):
    poison(monkeypatch, at_step=2, where=where)
    with pytest.raises(RunError, match=f"step 3: {message}"):
        run(*PREFERENCE, "n_examples=64", "eval_every=16", f"local_run_dir={tmp_path}/run")
    assert all(tensor.isfinite().all() for tensor in weights_of(tmp_path / "run").values())
    assert [log["counters/examples"] for log in logs_of(tmp_path / "run", "train")] == [8, 16]


def test_steps_that_are_not_finite_can_be_skipped(tmp_path, monkeypatch):
    poison(monkeypatch, at_step=2, where="gradient")
    run_dir = run(*PREFERENCE, "n_examples=64", "max_skipped_steps=1", f"local_run_dir={tmp_path}/run")
    log = logs_of(run_dir, "train")[-1]
    assert (log["counters/examples"], log["counters/updates"]) == (64, 7)
    rates = [log["lr"] for log in logs_of(run_dir, "train")]
    assert rates[2] == rates[3] < rates[4]  # a skipped step does not advance the schedule
    assert logs_of(run_dir, "train")[2]["grad_norm"] is None  # JSON has no NaN
    assert all(tensor.isfinite().all() for tensor in weights_of(run_dir).values())


@pytest.mark.parametrize(
    "owner, method, message",
    [
        (Scorer, "both_ways", r"two sequences of max_length=64 tokens \(the trial of fast scoring\)\ntry more devices"),
        (Scorer, "_fast", r"8 train examples, the longest of \d+ tokens, in step 1\ntry a smaller tokens_per_microbatch"),
        (torch.Tensor, "backward", r"8 train examples, the longest of \d+ tokens, in step 1\ntry a smaller tokens_per_microbatch"),
    ],
)
def test_out_of_memory_names_the_keys_to_change(owner, method, message, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(owner, method, fail)
    with pytest.raises(RunError, match=message):
        run(*PREFERENCE, "do_first_eval=false", "n_examples=8", f"local_run_dir={tmp_path}/run")


def test_other_optimizers_train(tmp_path):
    for optimizer in ("AdamW", "SGD"):
        run_dir = run(*PREFERENCE, f"optimizer={optimizer}", "n_examples=8", f"local_run_dir={tmp_path}/{optimizer}")
        assert logs_of(run_dir, "eval")[-1]["loss/eval"] != logs_of(run_dir, "eval")[0]["loss/eval"]


def test_dropout_is_off(tmp_path):
    """Both modules and the probabilities that attention layers keep as floats: two passes in train mode over the same data agree."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    from tdpo.utils import disable_dropout

    torch.manual_seed(0)
    sizes = {"vocab_size": 11, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, attention_dropout=0.5, hidden_dropout=0.5)).train()
    ids = torch.tensor([[1, 2, 3, 4]])
    assert not torch.equal(model(ids).logits, model(ids).logits)
    disable_dropout(model)
    assert torch.equal(model(ids).logits, model(ids).logits)
    from transformers import Starcoder2Config, Starcoder2ForCausalLM

    rates = {"residual_dropout": 0.5, "embedding_dropout": 0.5, "attention_dropout": 0.5}
    model = Starcoder2ForCausalLM(Starcoder2Config(**sizes, num_key_value_heads=1, **rates)).train()
    disable_dropout(model)
    assert torch.equal(model(ids).logits, model(ids).logits)


def test_a_fork_that_overrides_a_method_nothing_calls_is_refused():
    with pytest.raises(TypeError, match="Mine overrides get_batch_metrics, which this training loop never calls: see docs/forks.md"):
        type("Mine", (BasicTrainer,), {"get_batch_metrics": lambda self: None})
    type("Mine", (BasicTrainer,), {"log_train": lambda self: None})
