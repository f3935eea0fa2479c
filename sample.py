"""Continue prompts with a trained model, into a file of JSON lines.

    python sample.py run=runs/tdpo2 n=4 out=samples.jsonl
    torchrun --standalone --nproc-per-node=8 sample.py run=runs/tdpo2 prompts=prompts.jsonl num_beams=5

Every key is in config/sample.yaml. The same command goes on with a file that it has begun, and gives what it would have given at once.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from typing import Optional

import torch
import tqdm
import transformers
from omegaconf import DictConfig

from preference_datasets import Prompt, load_prompts
from tdpo.analysis.trained import check_writable, find_trained, load_trained
from tdpo.cli.command_line import run_command
from tdpo.cli.schema import Sample, check_tool_config
from tdpo.distributed.launch import is_rank, process_group
from tdpo.distributed.sharding import fingerprint
from tdpo.distributed.world import World
from tdpo.models.build import prepare_hub
from tdpo.models.sampling import own_distribution, sample_batch
from tdpo.utils import RunError, UserError, batched, plural, rank0_print, silenced

STEP_TIMEOUT = 600  # seconds; what takes long here, reading and sampling, is waited for by World's group with a long time-out


def run(config: DictConfig, overrides: Sequence[str] = (), world: Optional[World] = None) -> str:
    """Write the file; its path.

    Args:
        config: see config/sample.yaml.
        world: processes that have met already; None: those that a launcher has started, or this one alone.

    Raises:
        UserError: see utils.py.
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
        settings = settings_of(config, tokenizer, max_length)
        batches = batched(prompts, config.batch_size)
        identity = identity_of(config, model, max_length, prompts)
        with ExitStack() as stack:
            done = world.from_first(lambda: go_on(stack, config.out, identity, [config.n * len(batch) for _, batch in batches]))
            what = f"{plural(len(prompts), 'prompt')}, {plural(config.n, 'continuation')} of each"
            rank0_print(f"{what}; {done} of {len(batches)} batches were done before")
            rounds = batched(batches[done:], world.size)
            for _, some in tqdm.tqdm(rounds, "Sampling", unit=" rounds", disable=None if world.is_first else True):
                rows = []
                with world.agreed(), torch.inference_mode():
                    if world.rank < len(some):
                        first, own = some[world.rank]
                        rows = sample_batch(model, tokenizer, own, first, config.n, settings, config.seed, config.max_new_tokens)
                by_rank = world.gather(rows)
                world.from_first(lambda rows=by_rank: append(config.out, [row for part in rows for row in part]))
    rank0_print(f"done: {config.out}")
    return config.out


def identity_of(config: DictConfig, model: torch.nn.Module, max_length: int, prompts: Sequence[Prompt]) -> dict:
    """What the rows depend on."""
    drawn = {key: config[key] for key in ("n", "temperature", "top_p", "top_k", "num_beams", "max_new_tokens", "batch_size", "seed")}
    digest = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()
    return {**drawn, "max_length": max_length, "device": model.device.type, "weights": fingerprint(model), "prompts": digest}


def settings_of(config: DictConfig, tokenizer, max_length: int) -> transformers.GenerationConfig:
    """Of Transformers' generation."""
    beams = {"num_beams": config.num_beams, "do_sample": False} if config.num_beams > 1 else {}
    drawn = {} if beams else {"temperature": config.temperature, "top_p": config.top_p, "top_k": config.top_k}
    return own_distribution(tokenizer, max_length, **beams, **drawn)


def append(out: str, rows: Sequence[Mapping]) -> None:
    """Write rows behind those that are there."""
    try:
        with open(out, "a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    except OSError as error:
        raise RunError(f"out={out} cannot be written: {error}; the same command goes on from here") from None


def go_on(stack: ExitStack, out: str, identity: Mapping, rows_of_batch: Sequence[int]) -> int:
    """Batches whose rows are whole in the file, which is cut back to them; 0 where there is no file.

    What the rows depend on is kept beside the file, in <out>.settings.json.

    Args:
        stack: keeps other processes from the file until it is left.
        identity: what the rows depend on.
        rows_of_batch: how many rows each batch has.

    Raises:
        UserError: the file is of other settings, or of none; another process writes it; or it cannot be written.
    """
    beside = f"{out}.settings.json"
    check_writable(beside)
    if os.path.exists(out) and os.path.getsize(out) and not os.path.getsize(beside):
        os.remove(beside)
        raise UserError(f"out={out} exists, and is none that sample.py has begun: choose another file")
    lock = stack.enter_context(open(beside, "r+"))  # noqa: SIM115 (the stack closes it)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"out={out}: another process writes it: wait for it, or choose another file") from None
    check_writable(out)
    if not os.path.getsize(out):
        lock.truncate(0)
        json.dump(identity, lock, indent=1)
        lock.flush()
        return 0
    try:
        before = json.load(lock)
    except ValueError:
        raise UserError(f"{beside} cannot be read, so what {out} depends on is not known: choose another file") from None
    if differing := sorted(key for key in {*before, *identity} if before.get(key) != identity.get(key)):
        raise UserError(f"out={out} was begun with another {', '.join(differing)}: choose another file")
    with open(out, "rb+") as file:
        ends = [end for end, whole in _lines(file) if whole]
        done = rows = 0
        while done < len(rows_of_batch) and rows + rows_of_batch[done] <= len(ends):
            rows, done = rows + rows_of_batch[done], done + 1
        file.truncate(ends[rows - 1] if rows else 0)
    return done


def _lines(file) -> Iterator[tuple[int, bool]]:
    """Where each line ends, in bytes, and whether it does."""
    end = 0
    for line in file:
        end += len(line)
        yield end, line.endswith(b"\n")


def main() -> None:
    """The command line."""
    run_command("sample", run)


if __name__ == "__main__":
    main()
