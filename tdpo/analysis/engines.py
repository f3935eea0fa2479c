"""What draws continuations for sample.py: Transformers' `generate` with the model in this process, or vLLM."""

import functools
from collections.abc import Sequence
from typing import Any, Optional, Union

import torch
import transformers
from omegaconf import DictConfig

from tdpo.analysis.trained_models import Trained, load_trained
from tdpo.distributed.sharding import fingerprint
from tdpo.models.sampling import Draw, continuations, mixed_seed, own_distribution
from tdpo.models.vllm_engine import VllmEngine


class TransformersEngine:
    """A model in this process. `identity` says which weights they are, and where they are.

    Args:
        model: a causal language model of Transformers, on its device.
    """

    def __init__(self, model: torch.nn.Module):
        self.model = model
        self.identity = {"device": model.device.type, "weights": fingerprint(model)}

    def draw(
        self,
        prompts: Sequence[Sequence[int]],
        n: int,
        settings: transformers.GenerationConfig,
        max_new_tokens: Optional[int],
        seed: Sequence[int],
    ) -> list[list[list[int]]]:
        """Sample n continuations of each prompt, see `sampling.continuations`; the random numbers depend only on the numbers in `seed`."""
        torch.manual_seed(mixed_seed(*seed))
        return continuations(self.model, prompts, n, settings, max_new_tokens)


Engine = Union[TransformersEngine, VllmEngine]


def load_engine(trained: Trained, served: Optional[str], device: torch.device, max_length: int, tokenizer: Any) -> Engine:
    """Load a model into the engine that draws from it.

    Args:
        trained: the model.
        served: what vLLM serves (`check_vllm`); None: Transformers is the engine.
        device: where the model runs under Transformers.
        max_length: tokens of prompt and continuation that it must accept.
        tokenizer: of the model.

    Raises:
        UserError: weights are missing, do not fit, or vLLM cannot load them.
    """
    if served is not None:
        return VllmEngine(served, max_length, tokenizer, trained.cache_dir())
    return TransformersEngine(load_trained(trained, device, max_length, tokenizer)[0])


def drawing(engine: Engine, config: DictConfig, tokenizer: Any, max_length: int) -> Draw:
    """Return the function that draws continuations: by beam search if num_beams > 1, greedily at temperature 0, else by sampling.

    Args:
        engine: with the model.
        config: see config/sample.yaml.
        tokenizer: of the model.
        max_length: tokens of prompt and continuation.
    """

    @functools.cache
    def settings(temperature: float) -> transformers.GenerationConfig:
        if config.num_beams > 1:
            return own_distribution(tokenizer, max_length, num_beams=config.num_beams, do_sample=False)
        if temperature == 0:
            return own_distribution(tokenizer, max_length, do_sample=False)
        return own_distribution(tokenizer, max_length, temperature=temperature, top_p=config.top_p, top_k=config.top_k)

    def draw(prompts: Sequence[list[int]], temperature: float, seed: Sequence[int]) -> list[list[list[int]]]:
        return engine.draw(prompts, config.n, settings(temperature), config.max_new_tokens, (config.seed, *seed))

    return draw
