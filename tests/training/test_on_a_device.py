"""What a step asks of a GPU, held without one: on the meta device nothing is computed, and every operation can be looked at.

A GPU works through a queue that Python fills. Reading a number from it, or a copy that is not asynchronous, empties the queue: the device
then waits for Python. benchmarks/gpu.py counts the same on a card.
"""

import sys
from collections import Counter
from functools import partial

import pytest
import torch
import transformers
from helpers import PREFERENCE, QUIET, compose
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train
from tdpo.distributed import launch
from tdpo.distributed.world import World
from tdpo.losses import get_objective
from tdpo.microbatches import Packing, attention_cost
from tdpo.scoring.chunked_loss import ReferenceStates, loss_of_rows
from tdpo.scoring.head import Head
from tdpo.scoring.mixed_precision import cast_parameters
from tdpo.scoring.prefix_sharing import row_multiple, shared_prefix_batch
from tdpo.scoring.scorer import Scorer
from trainers import BasicTrainer

META = torch.device("meta")
PACKING = Packing(attention_cost(64), 1024)
KERNELS = 950  # see test_kernels_of_a_step
ANSWERED = ("_local_scalar_dense", "is_nonzero", "equal")  # operations that return a number of Python
READING = (*ANSWERED, "nonzero", "masked_select", "_unique2")
# Operations whose CUDA kernels add with atomics, in any order.
UNORDERED = {"index_add", "index_add_", "scatter_add", "scatter_add_", "scatter_reduce", "index_reduce", "bincount", "histc"}


def tensors_of(*nested) -> list[torch.Tensor]:
    return [x for x in tree_leaves(nested) if isinstance(x, torch.Tensor)]


class Waits(TorchDispatchMode):
    """Counts what the host would wait for, by the line that asks for it, answers reads with zeros, and notes unordered sums.

    A tensor of the CPU beside one of the device, other than a scalar, is an error, as it is on a GPU.
    """

    def __init__(self, answer=0):
        super().__init__()
        self.found, self.unordered, self.answer = Counter(), Counter(), answer

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        keywords = keywords or {}
        name = function._schema.name.removeprefix("aten::")
        tensors = tensors_of(arguments, keywords)
        devices = {x.device.type for x in tensors}
        if name in UNORDERED:
            self.unordered[f"{name} at {self.where()}"] += 1
        if name in READING and "meta" in devices:
            self.found[f"{name} at {self.where()}"] += 1
            if name in ANSWERED:
                return self.answer
        elif name in ("_to_copy", "copy_"):
            source, to = (arguments[0], keywords.get("device")) if name == "_to_copy" else (arguments[1], arguments[0].device)
            to = source.device.type if to is None else torch.device(to).type
            if {source.device.type, to} == {"cpu", "meta"}:
                asynchronous = keywords.get("non_blocking") or (name == "copy_" and len(arguments) > 2 and arguments[2])
                if to == "cpu" or not asynchronous:
                    self.found[f"copy to {to} at {self.where()}"] += 1
                if to == "cpu":
                    return torch.full(source.shape, self.answer, dtype=keywords.get("dtype") or source.dtype)
        elif "meta" in devices and any(x.device.type == "cpu" and x.dim() > 0 for x in tensors):
            raise AssertionError(f"{function} is given tensors of two devices")
        return function(*arguments, **keywords)

    @staticmethod
    def where() -> str:
        frame = sys._getframe(2)
        while frame is not None and ("/torch/" in frame.f_code.co_filename or frame.f_code.co_filename == __file__):
            frame = frame.f_back
        return "?" if frame is None else f"{frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_code.co_name}"


def waits_of_steps(monkeypatch, tmp_path, *options) -> tuple[list[Waits], list[Waits]]:
    """Make a run of 16 examples on the meta device. Returns what each of its steps, and each of its logs, waits for."""
    monkeypatch.setattr(launch, "World", partial(World, device=META))
    steps, logs = [], []

    def counted(method, found, answer):
        def call(*arguments):
            with Waits(answer) as waits:
                found.append(waits)
                return method(*arguments)

        return call

    monkeypatch.setattr(BasicTrainer, "train_step", counted(BasicTrainer.train_step, steps, 0))
    monkeypatch.setattr(BasicTrainer, "log_train", counted(BasicTrainer.log_train, logs, 1))
    monkeypatch.setattr(BasicTrainer, "evaluate", lambda self: None)
    monkeypatch.setattr("tdpo.training.guards.Guards.choose_scoring", lambda self, scorer: (self.config.scoring != "plain", PACKING))
    monkeypatch.setattr("tdpo.training.guards.Guards.check_last_eval", lambda *_: None)
    monkeypatch.setattr("tdpo.training.strategies.fingerprint", lambda model: "")
    options = [
        *QUIET,
        "debug=true",
        "do_first_eval=false",
        "n_examples=16",
        "eval_every=1000000",
        *options,
        f"local_run_dir={tmp_path}/run",
    ]
    train.run(compose(*options), options)
    assert steps and logs
    return steps, logs


MORE = [
    [],
    ["gradient_accumulation_steps=4"],
    ["model.fsdp_policy_mp=bfloat16"],
    ["activation_checkpointing=true"],
    ["optimizer=RMSprop"],
    ["adapter.rank=4"],
]


@pytest.mark.parametrize("loss", ["tdpo", "dpo", "ipo", "simpo", "rdpo", "f_dpo"])
@pytest.mark.parametrize("more", MORE, ids=str)
def test_a_step_waits_for_the_device_once(loss, more, monkeypatch, tmp_path):
    """Whether loss and gradient are finite, whatever the number of microbatches. A log waits three times."""
    if "adapter.rank=4" in more:
        pytest.importorskip("peft")
    options = [option for option in PREFERENCE if not option.startswith("loss=")]
    steps, logs = waits_of_steps(monkeypatch, tmp_path, *options, f"loss={loss}", "optimizer=AdamW", *more)
    for step in steps:
        assert list(step.found.values()) == [1], step.found
        assert "guards.py:may_take_step" in next(iter(step.found))
        assert not step.unordered
    assert all(sum(log.found.values()) <= 3 for log in logs), logs[0].found


def test_plain_scoring_waits_only_where_transformers_does(monkeypatch, tmp_path):
    """Transformers asks of every mask, in every forward pass of both models, whether it hides anything."""
    steps, _ = waits_of_steps(monkeypatch, tmp_path, *PREFERENCE, "scoring=plain", "gradient_accumulation_steps=2", "optimizer=AdamW")
    for step in steps:
        own = {where: n for where, n in step.found.items() if "masking_utils" not in where}
        assert list(own.values()) == [1] and "guards.py:may_take_step" in next(iter(own)), own


class Traffic(TorchDispatchMode):
    """Counts operations, and the bytes of large tensors that they read and write.

    Args:
        numel: tensors with this many numbers count; None: all.
    """

    def __init__(self, numel=None):
        super().__init__()
        self.numel, self.bytes, self.kernels, self.strides, self.in_place = numel, 0, 0, [], 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        name = function._schema.name.removeprefix("aten::")
        if function.is_view or name in ("empty", "empty_strided", "empty_like", "detach", "_reshape_alias", "_unsafe_view", "new_empty"):
            return result
        self.kernels += 1
        if "log_softmax" in name:
            self.in_place += arguments[0].untyped_storage()._cdata == tensors_of(result)[0].untyped_storage()._cdata
        written = {id(x): x for x in tensors_of(result)}
        overwritten = name in ("copy_", "zero_", "fill_") or bool((keywords or {}).get("out") is not None)
        read = {id(x): x for x in tensors_of(arguments) if not (overwritten and id(x) in written)}
        if name in ("gather", "index", "index_put_"):  # they touch a few numbers of a tensor
            return result
        moved = [x for x in [*read.values(), *written.values()] if self.numel in (None, x.numel())]
        self.bytes += sum(x.numel() * x.element_size() for x in moved)
        if name in ("mm", "addmm", "addmm_"):
            self.strides += [max(x.stride()) * x.element_size() for x in [*tensors_of(arguments), result] if x.dim() == 2]
        return result


def head_traffic(loss: str, dtype: torch.dtype, vocabulary: int = 50_304, responses: int = 8) -> Traffic:
    """Return what the head and the loss of 2,048 positions move, of tensors of positions x vocabulary."""
    hidden, side = 64, 2048 // responses
    rows = shared_prefix_batch([([1], [[2] * side, [3] * side])] * (responses // 2)).to(META)
    states = torch.empty(2048, hidden, dtype=dtype, device=META, requires_grad=True)
    weights = [torch.empty(vocabulary, hidden, dtype=dtype, device=META, requires_grad=i == 0) for i in range(2)]
    objective = get_objective(loss, **({} if loss == "sft" else {"beta": 0.1}))
    reference = ReferenceStates(states.detach(), Head(weights[1], None)) if objective.needs_reference else None
    with Traffic(2048 * vocabulary) as traffic:
        loss_of_rows(states, Head(weights[0], None), reference, rows, objective, len(rows.counts))[0].backward()
    return traffic


@pytest.mark.parametrize("loss,most", [("tdpo2", 106), ("dpo", 58), ("sft", 42)])
def test_bytes_that_a_logit_moves(loss, most):
    """A ratchet: it may fall as passes over the logits are joined. Two passes in bfloat16 would be 18."""
    traffic = head_traffic(loss, torch.bfloat16)
    assert traffic.bytes / (2048 * 50_304) <= most
    assert not traffic.in_place  # log_softmax into its own input is sound on a CPU only


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_rows_of_logits_are_aligned_for_matrix_products(dtype):
    """GPT-2 has 50,257 entries: rows that follow each other without a gap would begin at odd addresses, which cuBLAS multiplies slowly."""
    traffic = head_traffic("tdpo2", dtype, vocabulary=50_257)
    assert len(traffic.strides) >= 8 and all(stride % 16 == 0 for stride in traffic.strides)
    assert any(stride >= 50_257 * dtype.itemsize for stride in traffic.strides)


def test_kernels_of_a_step():
    """A ratchet on what Python has to launch for a microbatch of a small Llama with 4 layers, in bfloat16, without the optimizer."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128}
    config = transformers.LlamaConfig(vocab_size=1024, **sizes)
    with META:
        policy, reference = (transformers.AutoModelForCausalLM.from_config(config).to(dtype) for dtype in (torch.float32, torch.bfloat16))
    scorer = Scorer(policy, reference, get_objective("tdpo2", beta=0.1))
    rows = shared_prefix_batch([([1] * 20, [[2] * 30, [3] * 31])] * 4, row_multiple(META)).to(META)
    with Traffic() as traffic, cast_parameters(policy, torch.bfloat16):
        scorer(rows).loss.backward()
    assert rows.input_ids.shape[1] % 8 == 0
    assert traffic.kernels <= KERNELS, traffic.kernels
