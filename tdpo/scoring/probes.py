"""Trials of a model before it is trained: whether it predicts each token from earlier ones only, and whether fast scoring fits it."""

from typing import Optional, Union

import torch
import torch.nn.functional as F
from torch import nn

from tdpo.microbatches import Packing, attention_cost
from tdpo.scoring.head import unsupported_head
from tdpo.scoring.prefix_sharing import block_mask, row_multiple, shared_prefix_batch, unsupported_attention
from tdpo.utils import UserError, get_logger, reason_of

log = get_logger(__name__)

PROBED = 24  # tokens compared per response when fast scoring is tested
# Errors that say nothing about the model: no memory, a lost process, a GPU that can no longer be used.
UNRELATED = (torch.OutOfMemoryError, torch.distributed.DistError, torch.AcceleratorError)
LONG = 1024  # tokens of prompt and response from which FlexAttention is tried: of shorter ones attention is a few percent of a step
SHORT_TRIAL = 256  # tokens of the texts by which FlexAttention's gradient is tested
SHORT = 16  # tokens of the texts by which a model is tested for what it sees


def check_predictions(scorer: nn.Module, max_length: int) -> None:
    """Test what the policy's predictions depend on; warn if two forward passes differ. Must be called on all ranks, without gradient.

    Args:
        scorer: a Scorer on its device, whose policy is in the mode in which it is trained.
        max_length: tokens of prompt and response.

    Raises:
        UserError: the model cannot compute, or a prediction depends on later tokens, so that the loss would be that of a model that has
            read the answer.
    """
    name = type(scorer.policy).__name__
    vocabulary = scorer.policy.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (1, min(SHORT, max_length)), generator=torch.Generator().manual_seed(1)).to(scorer.policy.device)
    other = ids.clone()
    later = max(1, ids.shape[1] // 2)
    other[0, later:] = (ids[0, later:] + 1) % vocabulary
    try:
        first, again, changed = (scorer.logits_of_all(x)[0, :later] for x in (ids, ids, other))
    except UNRELATED:
        raise
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:  # models that are no plain language models
        raise UserError(f"{name} cannot compute a text of {ids.shape[1]} tokens: {reason_of(error, 120)}") from None
    # Equal up to rounding; both are compared with the spread of logits over tokens, which is far larger.
    rounding = torch.finfo(first.dtype).eps
    first, again, changed = (logits.float().log_softmax(-1) for logits in (first, again, changed))
    tolerance = max(1e-4, 4 * rounding) * first.std().item() + 1e-6
    if _most(again - first) > tolerance:
        log.warning(f"{name} draws random numbers in every forward pass: policy and reference never agree, and no two runs do")
        return
    if _most(changed - first) > tolerance:
        raise UserError(
            f"{name} is no causal language model: its predictions depend on later tokens, so that the loss would be "
            "meaningless. If its config.json has is_decoder, set that to true; else give another model"
        )


def fast_scoring_problem(scorer: nn.Module, max_length: int) -> Optional[str]:
    """Test whether fast scoring gives the policy's own log-probabilities. Must be called on all ranks, without gradient.

    A model may compute more than its config says: scale its logits, ignore the mask, or have its own attention window. Therefore both ways
    are compared on a prompt with two responses of random tokens, each filling max_length: shorter texts would not reveal a window that the
    mask lacks, or one that counts places in the row instead of positions.

    Args:
        scorer: a Scorer on its device.
        max_length: tokens of prompt and response.

    Returns:
        the reason why the policy must be scored plain, as a clause; None if fast scoring can be used.
    """
    config = scorer.policy.config
    if problem := unsupported_attention(config) or unsupported_head(scorer.policy):
        return problem
    return _difference(scorer, max_length)


def _difference(scorer: nn.Module, max_length: int, packed: bool = False) -> Optional[str]:
    """Return how the policy's log-probabilities in rows differ from its own, or why it has none there, as a clause; None if they agree.

    Args:
        scorer, max_length: see fast_scoring_problem.
        packed: with another prompt and its responses before them in the row.
    """
    try:
        fast, plain, dtype = scorer.both_ways(*_random_texts(scorer, max_length), PROBED, packed)
    except UNRELATED:
        raise
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:  # models reject unknown masks in their own ways
        getattr(scorer, "reset_iter_state", lambda: None)()  # FSDP's, which the error has left in the midst of a pass
        return f"it cannot compute several responses in one row: {reason_of(error, 120)}"
    # The tolerance is relative to the spread of log-probabilities over random tokens, which is far larger than rounding errors.
    difference, spread = (fast - plain).square().mean().sqrt().item(), plain.std().item()
    rounding = 2**-10 if dtype == torch.float32 and torch.cuda.is_available() else torch.finfo(dtype).eps  # TF32 on a GPU
    tolerance = max(1e-3, 16 * rounding) * spread + 1e-6
    return None if difference <= tolerance else f"its log-probabilities would differ by {difference:.2g} nats per token"


def packing_problem(scorer: nn.Module, max_length: int) -> Optional[str]:
    """Test whether a row may hold several prompts. Must be called on all ranks, without gradient.

    Args:
        scorer: a Scorer on its device, for which fast_scoring_problem returns None.
        max_length: tokens of prompt and response. Texts are half as long, so that the row is as long as in the test of fast scoring.

    Returns:
        the reason why it may not, as a clause; None if it may.
    """
    return _difference(scorer, max(2, max_length // 2), packed=True)


def scoring_of(scorer: nn.Module, max_length: int) -> Union[bool, Packing]:
    """Return how a model can be scored, as `token_statistics` takes it. Must be called without gradient.

    Args:
        scorer: a Scorer on its device.
        max_length: tokens of prompt and response.
    """
    fast = fast_scoring_problem(scorer, max_length) is None
    return packing_of(hidden_size(scorer), max_length) if fast and packing_problem(scorer, max_length) is None else fast


def hidden_size(scorer: nn.Module) -> int:
    """Return the width of the policy."""
    return scorer.policy.get_input_embeddings().weight.shape[-1]


def packing_of(hidden: int, max_length: int) -> Packing:
    """Return how rows are filled for a model for which packing_problem returns None: no wider than the rows of the trials.

    Args:
        hidden: width of the model.
        max_length: tokens of prompt and response.
    """

    def tried(length: int) -> int:
        """Return the tokens of a prompt with two responses of a trial, without the last token of each response."""
        prompt = max(1, length // 8)
        return prompt + 2 * (length - prompt - 1)

    return Packing(attention_cost(hidden), max(1, min(tried(max_length), 2 * tried(max(2, max_length // 2)))))


def _random_texts(scorer: nn.Module, max_length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a prompt and two responses, (P,) and (2, n), of random tokens; prompt and response have max_length tokens."""
    prompt = max(1, max_length // 8)
    vocabulary = scorer.policy.config.get_text_config().vocab_size
    tokens = torch.randint(vocabulary, (2 * max_length - prompt,), generator=torch.Generator().manual_seed(0)).to(scorer.policy.device)
    return tokens[:prompt], tokens[prompt:].view(2, max_length - prompt)


def head_size(text) -> int:
    """Return the numbers of an attention head, of a Transformers config of a text model; 0 if it names no heads."""
    heads = getattr(text, "num_attention_heads", None)
    return getattr(text, "head_dim", None) or (text.hidden_size // heads if heads else 0)


def flex_attention_suits(config, max_length: int) -> bool:
    """Whether FlexAttention can be faster than a mask. It skips blocks of 128 positions that see nothing of each other; short rows have few
    such blocks. It pads heads to a power of two.

    Args:
        config: the model's.
        max_length: tokens of prompt and response.
    """
    text = config.get_text_config()
    size = head_size(text)
    return max_length >= LONG and size >= 16 and size & (size - 1) == 0


def set_attention(scorer: nn.Module, implementation: str) -> None:
    """Give policy and reference another attention implementation of Transformers."""
    for model in (scorer.policy, scorer.reference):
        if hasattr(model, "set_attn_implementation"):
            model.set_attn_implementation(implementation)


def flex_attention_problem(scorer: nn.Module, max_length: int, dtype: torch.dtype) -> Optional[str]:
    """Test FlexAttention alone, with the model's heads and a mask as fast scoring has, forward and backward, against attention with a mask.

    The model's own weights and FSDP have no part in it: if the compiler fails, nothing of them has changed.

    Args:
        scorer: a Scorer on its device.
        max_length: tokens of prompt and response.
        dtype: in which the policy computes.

    Returns:
        the problem, as a clause; None if there is none.
    """
    from torch.nn.attention.flex_attention import flex_attention  # imported here, because that takes a second

    text = scorer.policy.config.get_text_config()
    heads, size = text.num_attention_heads, head_size(text)
    groups = heads // (getattr(text, "num_key_value_heads", None) or heads)
    device = scorer.policy.device
    prompt, responses = _random_texts(scorer, min(SHORT_TRIAL, max_length))
    rows = shared_prefix_batch([(prompt.tolist(), responses.tolist())], row_multiple(device)).to(device)
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, heads, rows.input_ids.shape[1], size)] + [(1, heads // groups, rows.input_ids.shape[1], size)] * 2
    inputs = [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]
    try:
        flex = torch.compile(flex_attention, dynamic=True)
        found = flex(*inputs, block_mask=block_mask(rows, None), enable_gqa=groups > 1)
        masked = F.scaled_dot_product_attention(*inputs, attn_mask=rows.visible().unsqueeze(1), enable_gqa=groups > 1)
        weights = torch.randn(found.shape, generator=generator).to(device, dtype)
        pairs = [(found, masked), *zip(*(torch.autograd.grad((x * weights).sum(), inputs) for x in (found, masked)))]
        tolerance = 16 * max(torch.finfo(dtype).eps, 2**-10)
        differences = [((a - b).norm() / b.norm()).item() for a, b in pairs]
    except UNRELATED:
        raise
    except Exception as error:  # PyTorch's compiler may fail in any way
        return reason_of(error, 120)
    if all(difference <= tolerance for difference in differences):  # not their maximum, which may pass over NaN
        return None
    return f"attention or its gradients would differ by {', '.join(f'{difference:.1g}' for difference in differences)}"


def _most(differences: torch.Tensor) -> float:
    """Return the largest root mean square over tokens, of differences (T, V)."""
    return differences.square().mean(-1).sqrt().max().item()
