"""Sampling by vLLM, of a Hugging Face folder, in place of Transformers' `generate`. vLLM is imported only where it is asked for."""

import importlib.util
import json
import os
from collections.abc import Sequence
from typing import Optional

import transformers

from tdpo.files import entries_of, reason_of
from tdpo.models.generation import ids_of
from tdpo.models.places import find_file
from tdpo.models.sampling import mixed_seed, up_to_end
from tdpo.utils import UserError

ALL_TOKENS = -1  # vLLM's top_k; newer versions take 0 too, as it is here


def check_vllm(run: str, checkpoint: str, n_processes: int) -> str:
    """Return what vLLM can serve: the folder hf/ of a checkpoint, a Hugging Face folder, or a name on the hub.

    Args:
        run: the run or model, as it was given.
        checkpoint: its folder; "" for a model that is not of a run.
        n_processes: that run this program together.

    Raises:
        UserError: vLLM is not installed or cannot serve it.
    """
    if importlib.util.find_spec("vllm") is None:
        raise UserError("engine=vllm needs vllm: pip install vllm, or leave engine=transformers")
    if n_processes > 1:
        raise UserError(f"engine=vllm runs in one process, not in {n_processes}: start sample.py with python, without torchrun or srun")
    if run.endswith(".gguf"):
        raise UserError(f"run={run}: engine=vllm takes a run, a Hugging Face folder or a name on the hub, not a GGUF file")
    if not checkpoint:
        return run
    folder = os.path.join(checkpoint, "hf")
    if not os.path.isfile(os.path.join(folder, "config.json")):
        remedy = f"python export.py run='{checkpoint}' out=<folder>, then run=<folder>"
        raise UserError(f"'{checkpoint}' has no folder hf/, which engine=vllm serves: {remedy}")
    return folder


class VllmEngine:
    """A model served by vLLM in this process. `identity` says which weights they are.

    Args:
        place: see `check_vllm`.
        max_length: tokens of prompt and continuation that it must accept.
        tokenizer: knows the ids of tokens that the model's settings name by text.
        cache_dir: of downloads.

    Raises:
        UserError: vLLM cannot load the model.
    """

    def __init__(self, place: str, max_length: int, tokenizer, cache_dir: Optional[str]):
        import vllm  # takes long, and is there only where it was installed

        self.identity = {"weights": _weights_of(place)}
        self.sampling_params = vllm.SamplingParams
        self.ends = _own_ends(place, tokenizer, cache_dir)
        try:
            self.model = vllm.LLM(model=place, max_model_len=max_length)
        except (ValueError, RuntimeError, OSError) as error:
            raise UserError(f"vLLM cannot load '{place}' with max_length={max_length}: {reason_of(error)}") from None

    def draw(
        self,
        prompts: Sequence[Sequence[int]],
        n: int,
        settings: transformers.GenerationConfig,
        max_new_tokens: Optional[int],
        seed: Sequence[int],
    ) -> list[list[list[int]]]:
        """Sample n continuations of each prompt.

        Args:
            prompts: token ids.
            n: continuations per prompt.
            settings: temperature, top_p, top_k, the tokens that end a text, and max_length, which here limits each prompt and its own
                continuation.
            max_new_tokens: limit for a continuation, if lower; None: no other limit.
            seed: numbers that the random numbers depend on.

        Returns:
            per prompt n lists of token ids, with the token that ends the text if the model generated one.
        """
        ends = sorted({*self.ends, *settings.eos_token_id})
        shared = {"n": n, "temperature": settings.temperature if settings.do_sample else 0.0, "stop_token_ids": ends}
        if settings.do_sample:
            shared |= {"top_p": settings.top_p, "top_k": settings.top_k or ALL_TOKENS}
        asked = [
            self.sampling_params(
                **shared,
                max_tokens=min(settings.max_length - len(prompt), max_new_tokens or settings.max_length),
                seed=mixed_seed(*seed, i),  # one for each prompt: with the same one, equal prompts would get equal continuations
            )
            for i, prompt in enumerate(prompts)
        ]
        served = self.model.generate([{"prompt_token_ids": list(prompt)} for prompt in prompts], sampling_params=asked, use_tqdm=False)
        return [[up_to_end(output.token_ids, ends) for output in request.outputs] for request in served]


def _own_ends(place: str, tokenizer, cache_dir: Optional[str]) -> list[int]:
    """Return the ids of the tokens that end a text by the model's own generation settings."""
    path = find_file(place, "generation_config.json", cache_dir)
    if path is None:
        return []
    with open(path, encoding="utf-8") as file:
        return ids_of(json.load(file).get("eos_token_id"), tokenizer)


def _weights_of(place: str) -> object:
    """Return what identifies the weights: the hashes of a folder's files; of a model on the hub only its name."""
    if not os.path.isdir(place):
        return place
    files = sorted(file for file in os.listdir(place) if file.endswith((".safetensors", ".bin", "config.json")))
    return {file: entry and entry["sha256"] for file, entry in entries_of(place, files, "Hashing weights").items()}
