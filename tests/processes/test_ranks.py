"""Several ranks have the same trajectory as one process. The ranks live for the whole test run (helpers.Ranks)."""

import json

import pytest
import torch
from helpers import DATA, PREFERENCE, SHARDED, TENSOR, TIMES, assert_recorded_logs, logs_of, recorded, run, weights_of

from tdpo.utils import RunError

LOW_PRECISION = [*PREFERENCE, "n_examples=8", "model.fsdp_policy_mp=bfloat16"]
EXACT = [*PREFERENCE, "optimizer=SGD", "lr=0.1", "warmup_steps=0", "model.policy_dtype=float64", "do_first_eval=false"]
EXACT += ["batch_size=40", "drop_last=false", "gradient_accumulation_steps=5", "n_eval_examples=3"]
SAMPLING = [*PREFERENCE, "n_examples=8", "sample_during_eval=true", "n_eval_model_samples=6", "eval_batch_size=5"]


@pytest.mark.parametrize(
    "name,options",
    [
        ("sft", SHARDED),
        ("tdpo2", [*SHARDED, "tokens_per_microbatch=300", "activation_checkpointing=true"]),
        ("tdpo2", [*TENSOR, "reference_cache=true"]),
    ],
    ids=["sft", "tdpo2, checkpointed activations", "tdpo2, split matrices"],
)
def test_two_ranks_repeat_the_recorded_runs(name, options, ranks, tmp_path):
    golden, arguments = recorded(name)
    assert_recorded_logs(golden, ranks(2).run(*arguments, *options, f"local_run_dir={tmp_path}/run", f"local_dirs=[{tmp_path}]"))


def test_four_ranks_repeat_the_recorded_run(ranks, tmp_path):
    """Two replicas of two shards. With five eval pairs per batch, some ranks have no example in some passes, but must take part."""
    golden, arguments = recorded("tdpo2")
    hybrid = [*SHARDED, "eval_batch_size=5", "parallel.replicas=2", "parallel.reduce_once_a_step=false", "reference_cache=true"]
    assert_recorded_logs(golden, ranks(4).run(*arguments, *hybrid, f"local_run_dir={tmp_path}/run", f"local_dirs=[{tmp_path}]"))


def test_one_sharded_process_repeats_the_recorded_run(tmp_path):
    golden, arguments = recorded("tdpo2")
    assert_recorded_logs(golden, run(*arguments, *SHARDED, "nproc_per_node=1", f"local_run_dir={tmp_path}/run"))


def test_sharded_gradients_of_every_family_are_those_of_the_whole_model(ranks):
    """In float64, for shards, replicas, and tensor parallelism where Transformers has a plan."""
    lines = ranks(2).call("check_families", "shard", "hybrid", "tensor")[0]
    assert sum(line.startswith("equal") for line in lines) == 7 + 7 + 5, lines
    for family, model in (("gpt2", "GPT2LMHeadModel"), ("gptj", "GPTJForCausalLM")):
        refusal = f"refused {family} trainer=TensorParallelTrainer: Transformers has no plan that splits the layers of {model}"
        assert any(line.startswith(refusal) for line in lines)


def test_weights_do_not_depend_on_the_number_of_ranks(ranks, tmp_path):
    """Batches of 40, 40 and 16 pairs, the last in 20 microbatches of which four are empty. SGD in float64 hides no difference."""
    one, four = run(*EXACT, f"local_run_dir={tmp_path}/one"), ranks(4).run(*EXACT, *SHARDED, f"local_run_dir={tmp_path}/four")
    assert weights_of(four).keys() == weights_of(one).keys()
    for name, tensor in weights_of(one).items():
        torch.testing.assert_close(weights_of(four)[name], tensor, rtol=0, atol=1e-12)
    for ours, theirs in zip(logs_of(one), logs_of(four), strict=True):
        numbers = {name: value for name, value in ours.items() if name not in ("split", *TIMES)}
        assert {name: theirs[name] for name in numbers} == pytest.approx(numbers, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("whole", [True, False])
def test_mixed_precision_is_that_of_one_device(whole, ranks, tmp_path):
    """bfloat16 copies compute, float32 weights are trained, and gradients are summed in float32.

    With the same microbatches and number of threads (on which the rounding of bfloat16 kernels depends), the gradient norm is the same to
    float32 rounding; a sum in bfloat16 would be off by 1e-5.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        one = run(*LOW_PRECISION, "gradient_accumulation_steps=8", f"local_run_dir={tmp_path}/one")
    finally:
        torch.set_num_threads(threads)
    options = [*SHARDED, "gradient_accumulation_steps=4", f"parallel.reduce_once_a_step={whole}"]
    two = ranks(2).run(*LOW_PRECISION, *options, f"local_run_dir={tmp_path}/two")
    assert logs_of(two, "eval")[0]["kl_eval/chosen"] == 0 and all(tensor.dtype == torch.float32 for tensor in weights_of(two).values())
    ours, theirs = (logs_of(folder, "train")[0]["grad_norm"] for folder in (one, two))
    assert theirs == pytest.approx(ours, rel=1e-6)


def test_tensor_parallelism_computes_in_bfloat16_and_samples(ranks, tmp_path):
    sampled = ["sample_during_eval=true", "n_eval_model_samples=3"]
    run_dir = ranks(2).run(*LOW_PRECISION, *TENSOR, *sampled, f"local_run_dir={tmp_path}/run")
    assert logs_of(run_dir, "eval")[0]["kl_eval/chosen"] == 0
    rows = [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]
    assert len(rows) == 6 and len({row["prompt"] for row in rows}) == 3 and all(row["policy"] for row in rows)


def test_a_step_that_is_not_finite_names_examples_and_ranks(ranks, tmp_path):
    options = [*DATA, *SHARDED, "optimizer=SGD", "lr=1e30", "warmup_steps=0", "max_grad_norm=1e30"]
    with pytest.raises(RunError) as error:
        ranks(2).run(*options, "n_examples=32", f"local_run_dir={tmp_path}/run")
    line = str(error.value).splitlines()[0]
    assert line.startswith("step 2: the loss is not finite; examples hh:")
    assert "(rank 0); hh:" in line and line.endswith("(rank 1)") and line.count("hh:") == 8
    assert [log["counters/examples"] for log in logs_of(tmp_path / "run", "train")] == [8]


def test_several_ranks_sample_each_prompt_once(ranks, tmp_path):
    """Prompts stay in order, although some batches leave a rank without a prompt; ranks wait for the longest text of a batch."""
    one, two = run(*SAMPLING, f"local_run_dir={tmp_path}/one"), ranks(2).run(*SAMPLING, *SHARDED, f"local_run_dir={tmp_path}/two")
    ours, theirs = ([json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()] for folder in (one, two))
    assert [row["prompt"] for row in ours] == [row["prompt"] for row in theirs] and len(ours) == 12
    texts = [row["policy"].removeprefix(row["prompt"]) for row in theirs]
    assert len(set(texts)) == len(texts) and len({len(text.split()) for text in texts}) > 3
