"""What a GPU does in a training step: FLOPs, bytes, kernels and collectives, counted from the sizes of model and batch (see step_time.py).

Units: FLOP (a multiplication and an addition are two), bytes, seconds, tokens. H: hidden size, V: vocabulary entries.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Optional

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import transformers  # noqa: E402

from tdpo.models.memory import ModelShape  # noqa: E402
from tdpo.scoring.distributions import CHUNK  # noqa: E402


@dataclass(frozen=True)
class Card:
    """Rates of a GPU; the defaults are for an H100 with 80 GB."""

    matmul: float = 650e12  # FLOP/s of bfloat16 matrix products
    attention: float = 120e12  # FLOP/s of PyTorch's memory-efficient attention with a mask, counted over all pairs of positions
    bandwidth: float = 2.9e12  # bytes/s, read and written by element-wise kernels
    memory: float = 80e9  # bytes
    launch: float = 10e-6  # seconds of the host per kernel in eager PyTorch: Python, autograd, launch


@dataclass(frozen=True)
class Link:
    """Rates of the links between GPUs; the defaults are for nodes of 8 GPUs with NVLink, and a network card of 400 Gbit/s per GPU."""

    bus: float = 370e9  # bytes/s of each GPU in an all-gather or reduce-scatter within a node
    network: float = 45e9  # bytes/s of each GPU's network card
    gpus: int = 8  # GPUs per node
    start: float = 8.4e-6  # seconds per collective; these three are what NCCL's tuning assumes for a ring with its protocol Simple
    hop: float = 3.4e-6  # seconds per step of a ring within a node
    network_hop: float = 14e-6  # seconds per step of a ring between nodes
    host: float = 0.3e-3  # seconds of the host per collective: FSDP's hooks, copies and streams

    def sharded(self, size: float, shards: int) -> float:
        """Return the seconds of an all-gather or reduce-scatter of tensors with `size` bytes when whole.

        A ring over several nodes enters each node once, and all network cards of the node share what enters.
        """
        nodes = -(-shards // self.gpus)
        rate = self.bus if nodes == 1 else min(self.bus, self.gpus * self.network)
        steps = (shards - nodes) * self.hop + (nodes - 1) * self.network_hop
        return self.start + steps + size * (shards - 1) / shards / rate

    def replicated(self, size: float, replicas: int) -> float:
        """Return the seconds of an all-reduce of `size` bytes on each GPU, over replicas on different nodes."""
        return self.start + 2 * (replicas - 1) * (self.network_hop + size / replicas / self.network)


@dataclass(frozen=True)
class Options:
    """Options of a run that determine its work.

    Args:
        needs_kl, needs_reference: see Objective.
        activation_checkpointing: blocks compute their forward pass again in the backward pass.
        rank: of LoRA on all linear layers; 0: all weights are trained.
        reduce_once: parallel.reduce_once_a_step.
    """

    needs_kl: bool = True
    needs_reference: bool = True
    activation_checkpointing: bool = False
    rank: int = 0
    reduce_once: bool = True


@dataclass(frozen=True)
class Batch:
    """What one GPU computes in a step.

    Args:
        tokens: positions of all rows, padding included.
        squares: sum over rows of the row's positions squared.
        positions: response tokens.
        microbatches: number of forward and backward passes.
        largest: (tokens, positions) of the largest microbatch.
        unique: tokens of all GPUs' pairs, a prompt counted once, without padding.
    """

    tokens: int
    squares: int
    positions: int
    microbatches: int = 1
    largest: tuple[int, int] = (0, 0)
    unique: int = 0


class Matrix(NamedTuple):
    """A linear layer of a block. `first`: its input is the block's input, after a norm."""

    rows: int
    columns: int
    first: bool


class Passes(NamedTuple):
    """Bytes per token of a block's element-wise passes, as multiples of widths, and kernels (products and attention included).

    A pass that reads a bfloat16 number and writes one is 4 bytes. The numbers are sums over the operations of Transformers' blocks.
    """

    hidden: int
    kv: int  # width of all keys
    inner: int
    norm: int  # one norm, of the hidden size; the block's own norms are in `hidden`
    kernels: int


# Forward; backward; backward with frozen weights (LoRA). The casts of weights' gradients are in _gradients. For example, forward of
# GPT-NeoX: two norms 8, rotation of a quarter of queries and keys 10, joining them with the rest 8, residuals 12; GELU 4. Of Llama:
# two norms of six float32 passes each 72, rotation of queries and of keys 20, repetition of keys and values 4 + 4, residuals 12; SiLU
# and product 10.
PASSES = {
    "gpt_neox": (Passes(38, 0, 4, 4, 25), Passes(96, 0, 8, 6, 40), Passes(86, 0, 6, 6, 32)),
    "llama": (Passes(108, 24, 10, 36, 43), Passes(254, 24, 18, 92, 74), Passes(238, 24, 18, 92, 63)),
}
TENSORS = {"gpt_neox": (12, 4), "llama": (9, 3)}  # weights of a block, and of the rest
# Bytes per weight of clipping (norm 4, scaling 8) and of RMSprop (8 + 12 + 8 + 8 + 16).
CLIP, RMSPROP = 12, 52
# Starts of kernels per weight in the optimizer: one GPU takes large weights one at a time, in 6 operations; shards are taken many at once,
# which costs the host 19 microseconds a weight (DTensors of 384 weights on a CPU).
STARTS, SHARDED_STARTS = 6, 2


@dataclass(frozen=True)
class Model:
    """Sizes of a model of the families in PASSES.

    Args:
        family: model_type of its config.
        shape: parameters by purpose.
        matrices: of one block.
        queries, keys: width of all heads' queries, and of all keys.
    """

    family: str
    shape: ModelShape
    matrices: tuple[Matrix, ...]
    queries: int
    keys: int

    @classmethod
    def of(cls, config: transformers.PreTrainedConfig) -> "Model":
        """Return the sizes of a Transformers config's model.

        Raises:
            KeyError: there is no count of its family's element-wise passes.
        """
        PASSES[config.model_type]
        hidden, inner, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
        queries = (getattr(config, "head_dim", None) or hidden // heads) * heads
        if config.model_type == "gpt_neox":  # attention and feed-forward layer both read the block's input
            matrices = [(3 * queries, hidden, True), (hidden, queries, False), (inner, hidden, True), (hidden, inner, False)]
            keys = queries
        else:
            keys = queries * config.num_key_value_heads // heads
            matrices = [(queries, hidden, True), *[(keys, hidden, True)] * 2, (hidden, queries, False)]
            matrices += [*[(inner, hidden, False)] * 2, (hidden, inner, False)]
        return cls(config.model_type, ModelShape.of(config), tuple(Matrix(*each) for each in matrices), queries, keys)

    def adapters(self, rank: int) -> int:
        """Return the number of parameters of LoRA on all matrices."""
        return self.shape.blocks * rank * sum(each.rows + each.columns for each in self.matrices)

    @property
    def useful(self) -> int:
        """Number of parameters without input embeddings, which take no products."""
        return self.shape.parameters - self.shape.vocabulary * self.shape.hidden


@dataclass(frozen=True)
class Cost:
    """Work of a GPU: FLOPs of matrix products and of attention, bytes of element-wise passes, kernels started by the host."""

    matmul: float = 0
    attention: float = 0
    bytes: float = 0
    kernels: float = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*(getattr(self, name) + getattr(other, name) for name in ("matmul", "attention", "bytes", "kernels")))

    def seconds(self, card: Card) -> float:
        """Return the device's seconds, if the host is fast enough."""
        return self.matmul / card.matmul + self.attention / card.attention + self.bytes / card.bandwidth


class Collective(NamedTuple):
    """Collectives of one kind in a phase of a step."""

    phase: str  # forward, reference or backward
    kind: str  # gather or reduce (over shards), all-reduce (over replicas)
    unit: str  # block or root (embeddings, final norm, head)
    count: int  # per step
    bytes: float  # of each: of the whole unit; for all-reduce of a GPU's shard


@dataclass(frozen=True)
class Work:
    """A step of one GPU: its cost by part (forward, reference, head, backward, gradients, optimizer) and its collectives."""

    parts: dict[str, Cost]
    collectives: tuple[Collective, ...]
    microbatches: int
    shards: int
    replicas: int
    reduces_once: bool

    @property
    def total(self) -> Cost:
        return sum(self.parts.values(), Cost())


def _forward(model: Model, batch: Batch, rank: int) -> Cost:
    """Return the cost of the body's forward passes, without the head."""
    shape, passes = model.shape, PASSES[model.family][0]
    products = sum(each.rows * each.columns + rank * (each.rows + each.columns) for each in model.matrices)
    adapted = 10 * sum(each.rows for each in model.matrices) if rank else 0  # scale and add what the adapters give
    within = passes.hidden * shape.hidden + passes.kv * model.keys + passes.inner * shape.inner + adapted
    around = batch.tokens * shape.hidden * (4 + passes.norm) + 4 * batch.positions * shape.hidden  # embeddings, norm, choice of positions
    kernels = shape.blocks * (passes.kernels + 4 * bool(rank) * len(model.matrices)) + 15
    return Cost(
        2 * batch.tokens * products * shape.blocks,
        4 * batch.squares * model.queries * shape.blocks,
        shape.blocks * (batch.tokens * within + 3 * batch.squares) + around,  # 3: the mask becomes a bias in every block
        batch.microbatches * kernels,
    )


def _backward(model: Model, batch: Batch, options: Options) -> Cost:
    """Return the cost of the body's backward passes, with what activation checkpointing computes again."""
    rank = options.rank
    shape, passes = model.shape, PASSES[model.family][2 if rank else 1]
    sizes = [each.rows * each.columns for each in model.matrices]
    products = shape.blocks * sum(sizes) * (1 if rank else 2)  # frozen matrices have no gradient of their own
    adapters = shape.blocks * rank * sum(each.rows + each.columns for each in model.matrices)
    if rank and not options.activation_checkpointing:  # the first block's input has no gradient, because embeddings are frozen.
        # With checkpointing Transformers lets it have one.
        products -= sum(size for size, each in zip(sizes, model.matrices) if each.first)
        adapters -= sum(rank * each.columns for each in model.matrices if each.first) / 2
    adapted = sum(4 * each.rows + 6 * each.columns for each in model.matrices) if rank else 0
    within = passes.hidden * shape.hidden + passes.kv * model.keys + passes.inner * shape.inner + adapted
    around = batch.tokens * shape.hidden * (6 + passes.norm)  # hidden states' gradient into the rows, norm
    # The gradient of the embeddings; that of the head is scaled and cast.
    around += 0 if rank else shape.hidden * (16 * batch.microbatches * shape.vocabulary + 2 * batch.tokens)
    kernels = shape.blocks * (passes.kernels + 6 * bool(rank) * len(model.matrices)) + 12
    cost = Cost(
        2 * batch.tokens * (products + 2 * adapters),
        10 * batch.squares * model.queries * shape.blocks,  # queries times keys once more, and four products of gradients
        shape.blocks * batch.tokens * within + around,
        batch.microbatches * kernels,
    )
    return cost + _again(model, batch, rank) if options.activation_checkpointing else cost


def _again(model: Model, batch: Batch, rank: int) -> Cost:
    """Return the cost of the blocks' second forward pass, which ends before the last product: only its inputs are needed."""
    shape, forward, last = model.shape, _forward(model, batch, rank), model.matrices[-1]
    product = last.rows * (rank or last.columns)
    after = 6 * shape.hidden + 10 * last.rows * bool(rank)  # bytes per token of residual and adapter
    each = batch.tokens * shape.blocks
    return forward + Cost(-2 * each * product, 0, -each * after, -batch.microbatches * shape.blocks * (4 if rank else 2))


def _head(model: Model, batch: Batch, options: Options) -> Cost:
    """Return the cost of head and loss with their gradients (tdpo/scoring/chunked_loss.py)."""
    shape, logits = model.shape, batch.positions * model.shape.vocabulary
    products = 1 + options.needs_reference + 1 + (not options.rank)  # two forward, gradient of hidden states, of the weight
    # Bytes per logit: cast and log-softmax 14 a model; exp, sub, mul, nansum 36; exp, mul, cast, and addcmul.
    per_logit = 14 * (1 + options.needs_reference) + 36 * options.needs_kl + 22 + 12 * options.needs_kl
    chunks = batch.microbatches * -(-batch.positions // (batch.microbatches * CHUNK["cuda"]))
    # The weight's gradient: set to 0; each chunk's product is added.
    table = 0 if options.rank else shape.vocabulary * shape.hidden * (4 * batch.microbatches + 10 * chunks)
    kernels = (17 + 33 * options.needs_reference) * batch.microbatches + (15 + 5 * options.needs_reference + 6 * options.needs_kl) * chunks
    return Cost(2 * logits * shape.hidden * products, 0, logits * per_logit + table, kernels)


def _gradients(model: Model, batch: Batch, options: Options, shards: int) -> Cost:
    """Return the cost of casting the weights' gradients to float32 and of adding those of several microbatches.

    On one GPU one kernel casts and adds. A shard's gradient is cast when it is reduced (see `_copies`), unless whole gradients are summed
    first.
    """
    trained, tensors, times = model.adapters(options.rank) or model.shape.parameters, _tensors(model, options), batch.microbatches
    if shards == 1:
        return Cost(bytes=trained * (6 + 10 * (times - 1)), kernels=tensors * times)
    whole = options.reduce_once and times > 1
    passes = 6 * times * whole + 12 * (times - 1) / (1 if whole else shards)
    return Cost(bytes=trained * passes, kernels=tensors * (times * whole + times - 1))


def _tensors(model: Model, options: Options) -> int:
    """Return the number of trained weights."""
    block, rest = TENSORS[model.family]
    return 2 * len(model.matrices) * model.shape.blocks if options.rank else block * model.shape.blocks + rest


def _optimizer(model: Model, options: Options, shards: int) -> Cost:
    """Return the cost of casting the weights once a step (on one GPU), clipping, and RMSprop."""
    trained = model.adapters(options.rank) or model.shape.parameters
    tensors, cast = _tensors(model, options), 6 if shards == 1 else 0
    starts = STARTS + 1 if shards == 1 else SHARDED_STARTS
    return Cost(bytes=trained * (cast + (CLIP + RMSPROP) / shards), kernels=tensors * starts)


def _collectives(model: Model, batch: Batch, shards: int, replicas: int, options: Options) -> Iterator[Collective]:
    """Yield the collectives of a step (tdpo/distributed/sharding.py).

    The policy's root stays gathered from forward to backward; blocks are gathered for each. Policy and reference are gathered in bfloat16,
    gradients are reduced in float32. With LoRA the reference is the policy, and only adapters are reduced.
    """
    shape, times = model.shape, batch.microbatches
    extra = model.adapters(options.rank) / shape.blocks
    block, root = 2 * (shape.block + extra), 2 * shape.rest
    yield Collective("forward", "gather", "root", times, root)
    yield Collective("forward", "gather", "block", times * shape.blocks, block)
    if options.needs_reference:
        if not options.rank:
            yield Collective("reference", "gather", "root", times, root)
        yield Collective("reference", "gather", "block", times * shape.blocks, block)
    yield Collective("backward", "gather", "block", times * shape.blocks, block)
    reductions = 1 if options.reduce_once else times
    units = [("block", shape.blocks, 4 * (extra or shape.block))] + [("root", 1, 4 * shape.rest)] * (not options.rank)
    for unit, count, size in units:
        yield Collective("backward", "reduce", unit, reductions * count, size)
        if replicas > 1:
            yield Collective("backward", "all-reduce", unit, reductions * count, size / shards)


def _copies(collectives: tuple[Collective, ...], phase: str, shards: int) -> Cost:
    """Return the cost of FSDP's copies around collectives: into one buffer and out of it, with a cast where dtypes differ."""
    own = [each for each in collectives if each.phase == phase]
    gathered = sum(each.count * each.bytes for each in own if each.kind == "gather")
    reduced = sum(each.count * each.bytes for each in own if each.kind == "reduce")
    return Cost(bytes=gathered * (2 + 3 / shards) + 1.5 * reduced, kernels=4 * sum(each.count for each in own))


def step_work(model: Model, batch: Batch, gpus: int = 1, replicas: int = 1, options: Optional[Options] = None) -> Work:
    """Count the work of one GPU in a step.

    Args:
        model: sizes of policy and reference.
        batch: what this GPU computes.
        gpus: GPUs that train together; each model is sharded over gpus / replicas of them.
        replicas: parallel.replicas.
        options: None: TDPO2, all weights trained.

    Returns:
        the counts; communication is empty on one GPU.
    """
    options, shards = options or Options(), gpus // replicas
    collectives = tuple(_collectives(model, batch, shards, replicas, options)) if shards > 1 else ()
    parts = {
        "forward": _forward(model, batch, options.rank) + _copies(collectives, "forward", shards),
        "reference": _copies(collectives, "reference", shards),
        "head": _head(model, batch, options),
        "backward": _backward(model, batch, options) + _copies(collectives, "backward", shards),
        "gradients": _gradients(model, batch, options, shards),
        "optimizer": _optimizer(model, options, shards),
    }
    if options.needs_reference:
        parts["reference"] += _forward(model, batch, 0)
    return Work(parts, collectives, batch.microbatches, shards, replicas, options.reduce_once)
