"""Continue prompts with a trained model and write the continuations to a file of JSON lines.

    python sample.py run=runs/tdpo2 n=4 out=samples.jsonl
    torchrun --standalone --nproc-per-node=8 sample.py run=runs/tdpo2 prompts=prompts.jsonl num_beams=5

Every key is in config/sample.yaml. The same command resumes an unfinished file; the result is the same as without the interruption.
"""

import hashlib
import json
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from typing import Optional

import torch
import tqdm
import transformers
from omegaconf import DictConfig

from preference_datasets import Prompt, load_prompts
from tdpo.analysis.resumable import ResumableJsonl
from tdpo.analysis.trained_models import find_trained, load_trained
from tdpo.cli.command_line import run_command
from tdpo.cli.schema import Sample, check_tool_config
from tdpo.distributed.launch import is_rank, process_group
from tdpo.distributed.sharding import fingerprint
from tdpo.distributed.world import World
from tdpo.models.places import prepare_hub
from tdpo.models.sampling import own_distribution, sample_batch
from tdpo.utils import batched, plural, rank0_print, silenced

STEP_TIMEOUT = 600  # seconds; loading and sampling may take longer, World waits for them with its long_timeout_group


def run(config: DictConfig, overrides: Sequence[str] = (), world: Optional[World] = None) -> str:
    """Write the continuations and return the file's path.

    Args:
        config: see config/sample.yaml.
        world: an initialized process group; None: the ranks of the launcher, or this process alone.

    Raises:
        UserError: the config, the model, the prompts or the output file cannot be used.
    """
    check_tool_config(config, Sample)
    launched = world is None and is_rank()
    with process_group(STEP_TIMEOUT) if launched else nullcontext(world or World()) as world, silenced(not world.is_first):
        with world.agreed():
            trained = find_trained(config.run)
            max_length, max_prompt_length = trained.lengths(config.max_length, config.max_prompt_length)
            data = {} if config.prompts else trained.datasets(config.get("datasets"))
            prepare_hub([*trained.on_hub(), config.prompts, *(options.get("path") for options in data.values())])
            model, tokenizer = load_trained(trained, world.device, max_length)
        source = data, config.split, tokenizer, max_prompt_length, trained.model.add_bos, trained.cache_dir(), config.prompts
        prompts = world.from_first(lambda: load_prompts(*source))[: config.n_prompts]
        settings = generation_settings(config, tokenizer, max_length)
        batches = batched(prompts, config.batch_size)
        identity = sampling_settings(config, model, max_length, prompts)
        with ExitStack() as stack:
            file = ResumableJsonl(config.out, identity, [config.n * len(batch) for _, batch in batches])
            done = world.from_first(lambda: stack.enter_context(file).done)
            what = f"{plural(len(prompts), 'prompt')}, {plural(config.n, 'continuation')} each"
            rank0_print(f"{what}; {done} of {len(batches)} batches already done")
            rounds = batched(batches[done:], world.size)
            for _, some in tqdm.tqdm(rounds, "Sampling", unit=" rounds", disable=None if world.is_first else True):
                rows = []
                with world.agreed(), torch.inference_mode():
                    if world.rank < len(some):
                        first, own = some[world.rank]
                        rows = sample_batch(model, tokenizer, own, first, config.n, settings, config.seed, config.max_new_tokens)
                by_rank = world.gather(rows)
                world.from_first(lambda rows=by_rank: file.append([row for part in rows for row in part]))
    rank0_print(f"done: {config.out}")
    return config.out


def sampling_settings(config: DictConfig, model: torch.nn.Module, max_length: int, prompts: Sequence[Prompt]) -> dict:
    """Return everything that determines the rows. A file is resumed only if all of it is unchanged."""
    drawn = {key: config[key] for key in ("n", "temperature", "top_p", "top_k", "num_beams", "max_new_tokens", "batch_size", "seed")}
    digest = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()
    return {**drawn, "max_length": max_length, "device": model.device.type, "weights": fingerprint(model), "prompts": digest}


def generation_settings(config: DictConfig, tokenizer, max_length: int) -> transformers.GenerationConfig:
    """Return the settings for Transformers' `generate`: beam search if num_beams > 1, else sampling."""
    beams = {"num_beams": config.num_beams, "do_sample": False} if config.num_beams > 1 else {}
    drawn = {} if beams else {"temperature": config.temperature, "top_p": config.top_p, "top_k": config.top_k}
    return own_distribution(tokenizer, max_length, **beams, **drawn)


def main() -> None:
    """Run the command line."""
    run_command("sample", run)


if __name__ == "__main__":
    main()
