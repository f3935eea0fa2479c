"""Trials of a model before it is trained: whether it predicts each token from earlier ones only, and whether fast scoring fits it."""

from typing import Optional

import torch
from torch import nn

from tdpo.scoring.chunked_loss import unsupported_head
from tdpo.scoring.prefix_sharing import unsupported_attention
from tdpo.utils import UserError, get_logger, reason_of

log = get_logger(__name__)

PROBED = 24  # tokens compared per response when fast scoring is tested
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
    except (torch.OutOfMemoryError, torch.distributed.DistError):
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
    prompt = max(1, max_length // 8)
    response = max_length - prompt
    generator = torch.Generator().manual_seed(0)
    vocabulary = config.get_text_config().vocab_size
    tokens = torch.randint(vocabulary, (prompt + 2 * response,), generator=generator).to(scorer.policy.device)
    try:
        fast, plain, dtype = scorer.both_ways(tokens[:prompt], tokens[prompt:].view(2, response), PROBED)
    except (torch.OutOfMemoryError, torch.distributed.DistError):
        raise
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:  # models reject unknown masks in their own ways
        return f"it cannot compute several responses in one row: {reason_of(error, 120)}"
    # The tolerance is relative to the spread of log-probabilities over random tokens, which is far larger than rounding errors.
    difference, spread = (fast - plain).square().mean().sqrt().item(), plain.std().item()
    rounding = 2**-10 if dtype == torch.float32 and torch.cuda.is_available() else torch.finfo(dtype).eps  # TF32 on a GPU
    tolerance = max(1e-3, 16 * rounding) * spread + 1e-6
    return None if difference <= tolerance else f"its log-probabilities would differ by {difference:.2g} nats per token"


def _most(differences: torch.Tensor) -> float:
    """Return the largest root mean square over tokens, of differences (T, V)."""
    return differences.square().mean(-1).sqrt().max().item()
