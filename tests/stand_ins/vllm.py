"""A stand-in for vLLM, with its names as far as tdpo/models/vllm_engine.py uses them: greedy texts of the model, one token at a time.

The names and meanings are those of vllm/sampling_params.py, vllm/entrypoints/llm.py and vllm/outputs.py; older versions refuse top_k=0.
"""

from dataclasses import dataclass
from typing import Optional

import torch
import transformers

MADE = []  # the arguments of every LLM
ASKED = []  # the sampling parameters of every prompt


@dataclass
class SamplingParams:
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    seed: Optional[int] = None
    stop_token_ids: Optional[list[int]] = None
    max_tokens: Optional[int] = 16

    def __post_init__(self):
        if self.top_k == 0 or self.max_tokens < 1 or not 0 < self.top_p <= 1 or (self.temperature == 0 and self.n > 1):
            raise ValueError(self)


@dataclass
class CompletionOutput:
    index: int
    text: str
    token_ids: tuple[int, ...]


@dataclass
class RequestOutput:
    outputs: list[CompletionOutput]


class LLM:
    def __init__(self, model: str, *, max_model_len: Optional[int] = None):
        self.model = transformers.AutoModelForCausalLM.from_pretrained(model).eval()
        if max_model_len > self.model.config.max_position_embeddings:
            raise ValueError(f"max_model_len ({max_model_len}) is greater than the derived max_model_len")
        MADE.append({"model": model, "max_model_len": max_model_len})

    def generate(self, prompts, sampling_params=None, *, use_tqdm=True):
        ASKED.extend(sampling_params)
        return [RequestOutput(self._outputs(x["prompt_token_ids"], asked)) for x, asked in zip(prompts, sampling_params, strict=True)]

    def _outputs(self, prompt, asked):
        ids = list(prompt)
        while len(ids) - len(prompt) < asked.max_tokens:
            with torch.no_grad():
                ids.append(int(self.model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] in asked.stop_token_ids:
                break
        return [CompletionOutput(i, "", tuple(ids[len(prompt) :])) for i in range(asked.n)]
