"""Stages that measure time and memory: ceilings of the machine, the head, whole steps, the ways to compute them, and Llama's blocks."""

import copy
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, Optional

import torch
import torch.nn.functional as F
import transformers

from benchmarks import loss as head_benchmark
from benchmarks.gpu_stages.bench import Bench, Result, drawn
from benchmarks.gpu_stages.rows import Measurement, Row, Sizes, Skip, attempted, judged, largest, limit_graphs, missing, skipped, unjudged
from benchmarks.step import MODELS, TRL_MODES, matmul_rate, measure, synchronize
from tdpo.distributed.sharding import find_blocks
from tdpo.scoring.distributions import CHUNK
from tdpo.utils import DTYPES

LLAMA = {"hidden_size": 4_096, "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14_336}
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
LAYERS = 32  # of Llama-3-8B
# Of the relative error of a loss and of a gradient's norm, whose log-probabilities are rounded, on a GPU by TF32 too.
TOLERANCES = {torch.float32: 5e-3, torch.bfloat16: 2e-2}
BETWEEN_DTYPES = BETWEEN_WAYS = 3e-2


def pythia(sizes: Sizes) -> transformers.PreTrainedConfig:
    """Return the config of Pythia-2.8B, or of a small model of its kind."""
    fields = {"vocab_size": 512, **SMALL} if sizes.is_small else {"vocab_size": 50_304, **MODELS["pythia28"]}
    return transformers.GPTNeoXConfig(max_position_embeddings=2048, **fields)


def llama(sizes: Sizes, layers: int) -> transformers.PreTrainedConfig:
    """Return the config of Llama-3-8B with a number of layers, or of a small model of its kind."""
    fields = {"vocab_size": 512, **SMALL, "num_key_value_heads": 2} if sizes.is_small else {"vocab_size": 128_256, **LLAMA}
    return transformers.LlamaConfig(max_position_embeddings=8192, **{**fields, "num_hidden_layers": layers})


def seconds_of(function: Callable[[], object], device: torch.device, calls: int) -> float:
    """Return the seconds of a call, after a warm-up, from many that are queued."""
    function()
    synchronize(device)
    started = time.perf_counter()
    for _ in range(calls):
        function()
    synchronize(device)
    return (time.perf_counter() - started) / calls


def ceilings_stage(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """Measure what the device does at best: copies, matrix products of Pythia's and of square shape, and the start of kernels."""
    source = torch.empty(sizes.copied // 2, dtype=torch.bfloat16, device=device)
    to = torch.empty_like(source)
    rate = 2 * sizes.copied / seconds_of(lambda: to.copy_(source), device, 20)
    yield Measurement("ceilings", {"what": "copy, read and written", "value": f"{rate / 1e12:.3g} TB/s"})
    for dtype in (torch.bfloat16, torch.float32):
        kind = str(dtype).removeprefix("torch.")
        rate = matmul_rate(device, dtype, sizes.product)
        yield Measurement("ceilings", {"what": f"product {kind}, {sizes.product} squared", "value": f"{rate / 1e12:.3g} TFLOP/s"})
    config, tokens = pythia(sizes), sizes.product // 2
    hidden, inner = config.hidden_size, config.intermediate_size
    shapes = {"queries, keys, values": (hidden, 3 * hidden), "attention out": (hidden, hidden)}
    shapes |= {"up": (hidden, inner), "down": (inner, hidden), "head": (hidden, config.vocab_size)}
    for name, (a, b) in shapes.items():
        left, right = (torch.randn(n, a, device=device, dtype=torch.bfloat16) for n in (tokens, b))
        elapsed = seconds_of(lambda left=left, right=right: F.linear(left, right), device, 10)
        values = f"{2 * tokens * a * b / elapsed / 1e12:.3g} TFLOP/s"
        yield Measurement("ceilings", {"what": f"{name}, {tokens} x {a} x {b}", "value": values})
    one = torch.zeros(1, device=device)
    rate = 1 / seconds_of(lambda: one.add_(1), device, 2000)
    yield Measurement("ceilings", {"what": "kernels started", "value": f"{rate:,.0f} a second"})


@contextmanager
def chunks_of(positions: int, device: torch.device) -> Iterator[None]:
    """Within the block, compute the head in chunks of that many positions."""
    before = CHUNK[device.type]
    CHUNK[device.type] = positions
    try:
        yield
    finally:
        CHUNK[device.type] = before


def head_stage(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """Measure head and loss with gradients over their four matrix products: by vocabulary, chunk, and compiled or not."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def rows(vocabulary: int, chunk: int, compiled: bool) -> Iterator[Row]:
        with chunks_of(chunk, device):
            given = sizes.head_hidden, vocabulary, sizes.positions, device, dtype, compiled, 3, True
            elapsed, products, peak = head_benchmark.measured(*given)
        times = {"ms": round(1e3 * elapsed, 2), "products, ms": round(1e3 * products, 2), "ratio": round(elapsed / products, 2)}
        case = {"vocabulary": vocabulary, "chunk": chunk, "compiled": "yes" if compiled else "no"}
        yield Measurement("head and loss", {**case, **times, "peak MB": round(peak / 1e6)})

    for vocabulary in sizes.head_vocabularies:
        for chunk in sizes.chunks:
            for compiled in (False, True) if device.type == "cuda" else (False,):
                yield from attempted(f"head, V {vocabulary:,}, chunks of {chunk}", lambda given=(vocabulary, chunk, compiled): rows(*given))
    if device.type != "cuda":
        yield skipped("head, compiled")


class Variant(NamedTuple):
    """A way to run the step."""

    name: str
    microbatch: int  # pairs
    within: Callable  # of the bench: a context in which its steps run
    options: dict[str, Any] = {}  # of the optimizer
    cuda: bool = False  # needs a GPU
    compiles: bool = False  # new shapes
    judged: bool = True  # whether an error or other results fail the stage
    tolerance: Optional[float] = None  # of losses and gradient norms; None: that of the dtype


@contextmanager
def as_it_is(bench: Bench) -> Iterator[None]:
    """Change nothing."""
    yield


@contextmanager
def in_float32(bench: Bench) -> Iterator[None]:
    """Compute in float32. The reference's weights are those of before, in which nothing is lost."""
    before = bench.dtype
    bench.reference.to(torch.float32)
    bench.dtype = torch.float32
    try:
        yield
    finally:
        bench.reference.to(before)
        bench.dtype = before


@contextmanager
def one_a_row(bench: Bench) -> Iterator[None]:
    """Put one pair into each row."""
    bench.packed = False
    try:
        yield
    finally:
        bench.packed = True


@contextmanager
def with_cudnn(bench: Bench) -> Iterator[None]:
    """Let PyTorch take cuDNN's attention."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(False)


@contextmanager
def with_flex(bench: Bench) -> Iterator[None]:
    """Let the models use FlexAttention."""
    for model in (bench.policy, bench.reference):
        model.set_attn_implementation("flex_attention")
    try:
        yield
    finally:
        for model in (bench.policy, bench.reference):
            model.set_attn_implementation("sdpa")


@contextmanager
def with_compiler(bench: Bench) -> Iterator[None]:
    """Compile the models' blocks and the operations on logits."""
    blocks = [block for model in (bench.policy, bench.reference) for block in find_blocks(model, None)]
    limit_graphs()
    torch._dynamo.reset()
    for block in blocks:
        block.compile(dynamic=True)
    bench.compiled = True
    try:
        yield
    finally:
        bench.compiled = False
        for block in blocks:
            block._compiled_call_impl = None


def variants(sizes: Sizes) -> list[Variant]:
    """Return the ways to run the step: by microbatch, then others, the safe ones first. cuDNN's is the last, because a gradient that is NaN
    stays in the weights."""
    kind, *others = sizes.dtypes
    usual, smallest = sizes.microbatches[-2:]
    return [
        *(Variant(f"microbatches of {n}, {kind}", n, as_it_is) for n in sizes.microbatches),
        Variant(f"one pair a row, {kind}", usual, one_a_row),
        Variant(f"RMSprop, foreach=True, {kind}", usual, as_it_is, {"foreach": True}),
        Variant(f"AdamW, {kind}", usual, as_it_is, {"name": "AdamW"}),
        *(Variant(f"microbatches of {smallest}, {other}", smallest, in_float32, tolerance=BETWEEN_DTYPES) for other in others),
        Variant(f"compiled, {kind}", usual, with_compiler, cuda=True, compiles=True),
        Variant(f"cuDNN's attention, {kind}", usual, with_cudnn, cuda=True, judged=False),
    ]


def apart(values: Iterable[float], expected: Iterable[float]) -> float:
    """Return the largest relative difference of numbers."""
    return largest(abs(a - b) / max(abs(b), 1e-9) for a, b in zip(values, expected))


def results_check(name: str, results: list[Result], expected: list[Result], tolerance: float) -> Row:
    """Return a check that a way gives the same losses and gradient norms of the same batches."""
    losses, norms = (apart(*columns) for columns in zip(zip(*results), zip(*expected)))
    detail = f"losses {losses:.1e} and gradient norms {norms:.1e} apart; at most {tolerance:.0e}"
    return judged(f"{name}: same losses and gradient norms", largest([losses, norms]) <= tolerance, detail)


def variant_rows(variant: Variant, bench: Bench, expected: list[Result]) -> Iterator[Row]:
    """Measure a variant. `expected`: the results of the first one, which fills the list."""
    with variant.within(bench):
        dtype = bench.dtype
        measured = bench.measured(variant.microbatch, dict(variant.options), variant.compiles)
    expected[:] = expected or measured.results
    yield Measurement("step", {"what": variant.name, **measured.columns})
    yield results_check(f"step, {variant.name}", measured.results, expected, variant.tolerance or TOLERANCES[dtype])
    if measured.estimate_ratio is not None:
        good = 0.7 <= measured.estimate_ratio <= 1.15
        yield judged(f"step, {variant.name}: memory as estimated", good, f"measured / estimate {measured.estimate_ratio:.2f}")


def step_stage(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """Measure steps of Pythia-2.8B, drawn on the device: microbatches, a profile of one, optimizers, dtypes, compiled, attention."""
    torch.backends.cuda.matmul.allow_tf32 = True  # as train.py does
    dtype = DTYPES[sizes.dtypes[0]]
    bench, expected = Bench(*drawn(pythia(sizes), dtype, device), dtype, device, sizes), []
    cuda, profile = device.type == "cuda", "step, kernels by kind"
    for i, variant in enumerate(variants(sizes)):
        if i == len(sizes.microbatches):
            yield from attempted(profile, partial(bench.profiled, sizes.microbatches[-2])) if cuda else [skipped(profile)]
        name = f"step, {variant.name}"
        rows = attempted(name, partial(variant_rows, variant, bench, expected)) if cuda or not variant.cuda else [skipped(name)]
        yield from rows if variant.judged else unjudged("step", "what", rows)


def ways_stage(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """Compare the published, plain and fast ways, and TRL's DPO if it is installed, on few pairs."""
    dtype = DTYPES[sizes.dtypes[0]]
    bench = Bench(*drawn(pythia(sizes), dtype, device), dtype, device, sizes)
    pairs, microbatch = bench.batches[0][: sizes.few], max(1, sizes.few // 4)

    def compared(loss: str, ways: tuple[str, ...], others: dict[str, Callable[[], float]]) -> Iterator[Row]:
        steps = {way: bench.step(way, pairs, microbatch, loss) for way in ways} | others
        found = measure(steps, sizes.rounds, device)
        unique = sum(len(prompt) + sum(map(len, responses)) for prompt, responses in pairs)
        for way, (times, peaks, losses) in found.items():
            elapsed = statistics.median(times)
            values = {"s a step": round(elapsed, 4), "tokens/s": round(unique / elapsed), "peak GiB": round(peaks[0] / 2**30, 2)}
            yield Measurement("ways", {"way": f"{loss}: {way}", **values, "loss": ", ".join(sorted(losses))})
        values = [float(value) for way in found.values() for value in sorted(way.losses)]
        near = apart(values, values[:1] * len(values)) <= BETWEEN_WAYS
        yield judged(f"{loss}: all ways have the same loss", near, ", ".join(dict.fromkeys(f"{value:.4f}" for value in values)))

    yield from attempted("tdpo2: ways", lambda: compared("tdpo2", ("published", "plain", "fast"), {}))
    if reason := missing("trl", "datasets", "accelerate"):
        yield skipped("dpo: TRL", reason)
        return

    def against_trl() -> Iterator[Row]:
        from benchmarks.trl_step import TrlStep  # here, because TRL is optional

        setting = bench.setting(pairs, microbatch, "dpo")
        given = [(f"TRL{name}", copy.deepcopy(bench.policy), mode) for name, mode in TRL_MODES.items()]
        steps = {name: TrlStep(setting, policy, bench.reference, dtype, **mode) for name, policy, mode in given}
        yield from compared("dpo", ("fast",), steps)

    yield from attempted("dpo: TRL", against_trl)


def lora_stage(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """Measure steps of Llama-3-8B with LoRA of rank 16, drawn on the device in the dtype in which it computes."""
    if reason := missing("peft", "accelerate", "omegaconf"):
        raise Skip(reason)
    from omegaconf import OmegaConf  # here, because these packages may be missing

    from tdpo.models.adapters import OwnReference, attach

    dtype, config = DTYPES[sizes.dtypes[0]], llama(sizes, sizes.layers[0] if sizes.is_small else LAYERS)
    with device:
        policy = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    adapter = {"rank": 16, "alpha": 32, "targets": "all-linear", "rslora": False, "init": "uniform"}
    attach(policy, OmegaConf.create(adapter), torch.float32, 0)
    bench = Bench(policy.eval(), OwnReference(policy), dtype, device, sizes)
    for microbatch in sizes.microbatches[-2:]:

        def rows(microbatch: int = microbatch) -> Iterator[Row]:
            measured = bench.measured(microbatch, {})
            yield Measurement("step", {"what": f"Llama-3-8B, LoRA, microbatches of {microbatch}", **measured.columns})
            away = largest(abs(result.loss - math.log(2)) for result in measured.results)
            yield judged(f"LoRA, microbatches of {microbatch}: ln 2", away < 1e-5, f"{away:.1e} away")

        yield from attempted(f"LoRA, microbatches of {microbatch}", rows)


def blocks_stage(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """Measure steps of Llama-3-8B's shapes with few layers and weights in half precision, with a mask and with FlexAttention; scale their
    difference to all layers."""
    dtype, usual = DTYPES[sizes.dtypes[0]], sizes.microbatches[-1]
    ways = [Variant("mask", usual, as_it_is), Variant("FlexAttention", usual, with_flex, cuda=True, compiles=True)]
    times: dict[str, list[float]] = {way.name: [] for way in ways}

    def rows(way: Variant, layers: int, bench: Bench, expected: list[Result]) -> Iterator[Row]:
        with way.within(bench):
            measured = bench.measured(way.microbatch, {}, way.compiles)
        expected[:] = expected or measured.results
        times[way.name].append(measured.seconds)
        name = f"Llama-3-8B, {layers} layers, {sizes.dtypes[0]} weights, {way.name}"
        yield Measurement("step", {"what": name, **measured.columns})
        yield results_check(name, measured.results, expected, TOLERANCES[dtype])

    for layers in sizes.layers:
        policy, reference = drawn(llama(sizes, layers), dtype, device)
        bench, expected = Bench(policy.to(dtype), reference, dtype, device, sizes), []
        del policy, reference
        for way in ways:
            name = f"Llama-3-8B, {layers} layers, {way.name}"
            yield from (
                [skipped(name)] if way.cuda and device.type != "cuda" else attempted(name, partial(rows, way, layers, bench, expected))
            )
        bench.free()
    fewer, more = sizes.layers
    for name, measured in times.items():
        if len(measured) == 2:
            layer = (measured[1] - measured[0]) / (more - fewer)
            whole = measured[0] + (LAYERS - fewer) * layer
            values = {"ms a layer": round(1e3 * layer, 2), f"s a step of {LAYERS} layers": round(whole, 3)}
            yield Measurement("Llama-3-8B by layers", {"attention": name, **values})
