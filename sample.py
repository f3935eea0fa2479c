"""Continue prompts with a trained model and write the continuations to a file of JSON lines.

    python sample.py run=runs/tdpo2 n=4 out=samples.jsonl
    torchrun --standalone --nproc-per-node=8 sample.py run=runs/tdpo2 prompts=prompts.jsonl num_beams=5
    python sample.py run=runs/chat form=mt_bench prompts=question.jsonl max_new_tokens=1024 max_length=4096 out=chat.jsonl

Every key is in config/sample.yaml. The same command resumes an unfinished file; the result is the same as without the interruption.
"""

import functools
import hashlib
import json
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from typing import Optional, Union

import torch
import tqdm
from omegaconf import DictConfig

from preference_datasets import chat_prompts, load_prompts
from tdpo.analysis.benchmark_forms import read_questions
from tdpo.analysis.engines import Engine, drawing, load_engine
from tdpo.analysis.resumable import ResumableJsonl
from tdpo.analysis.sampling_tasks import BenchmarkTask, PromptTask
from tdpo.analysis.trained_models import find_trained
from tdpo.cli.check_config import check_tool_config
from tdpo.cli.command_line import run_command
from tdpo.cli.schema import Sample
from tdpo.distributed.launch import is_rank, process_group
from tdpo.distributed.world import World
from tdpo.models.places import prepare_hub
from tdpo.models.tokenizer import load_tokenizer
from tdpo.models.vllm_engine import check_vllm
from tdpo.utils import UserError, batched, rank0_print, silenced

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
            served = check_vllm(trained.name, trained.checkpoint, world.size) if config.engine == "vllm" else None
            max_length, max_prompt_length = trained.length("max_length", config.max_length), None  # questions of a form are not cut
            if not config.form:
                max_length, max_prompt_length = trained.lengths(config.max_length, config.max_prompt_length)
            data = {} if config.prompts else trained.datasets(config.get("datasets"))
            prepare_hub([*trained.on_hub(), config.prompts, *(options.get("path") for options in data.values())])
            tokenizer = load_tokenizer(trained.model, trained.cache_dir())
        if config.form:
            task = load_benchmark(config, tokenizer, max_length, trained.model.add_bos, world)
        else:
            source = data, config.split, tokenizer, max_prompt_length, trained.model.add_bos, trained.cache_dir(), config.prompts
            prompts = world.from_first(lambda: load_prompts(*source))[: config.n_prompts]
            task = PromptTask(prompts, config.n, config.batch_size, config.temperature, tokenizer, config.out)
        with world.agreed():
            engine = load_engine(trained, served, world.device, max_length, tokenizer)
        draw = drawing(engine, config, tokenizer, max_length)
        identity = sampling_settings(config, engine, max_length, task)
        with ExitStack() as stack:
            file = ResumableJsonl(task.file, identity, task.rows_of_batch)
            done = world.from_first(lambda: stack.enter_context(file).done)
            world.from_first(lambda: task.start(done == len(task.batches)))
            rank0_print(f"{task.name}; {done} of {len(task.batches)} batches already done")
            rounds = batched(task.batches[done:], world.size)
            for _, some in tqdm.tqdm(rounds, "Sampling", unit=" rounds", disable=None if world.is_first else True):
                rows = []
                with world.agreed(), torch.inference_mode():
                    if world.rank < len(some):
                        rows = task.rows(*some[world.rank], draw)
                by_rank = world.gather(rows)
                world.from_first(lambda rows=by_rank: file.append([row for part in rows for row in part]))
            world.from_first(task.finish)
    rank0_print(f"done: {config.out}")
    return config.out


def load_benchmark(config: DictConfig, tokenizer, max_length: int, add_bos: bool, world: World) -> BenchmarkTask:
    """Return the questions of config.prompts as a task.

    Raises:
        UserError: the file is not of config.form, the tokenizer has no chat template, or max_length is too small.
    """
    questions = world.from_first(lambda: read_questions(config.form, config.prompts, config.n_prompts, config.temperature))
    with world.agreed():
        if not tokenizer.chat_template:
            raise UserError(
                f"form={config.form} asks questions as chat messages, and run={config.run} has no chat template: train with "
                "model.chat_template=<file>, or put a chat_template.jinja into the Hugging Face folder"
            )
        render = functools.partial(chat_prompts, tokenizer=tokenizer, add_bos=add_bos)
        lengths = config.batch_size, config.max_new_tokens, max_length
        return BenchmarkTask(config.form, questions, render, *lengths, tokenizer, config.out)


def sampling_settings(config: DictConfig, engine: Engine, max_length: int, task: Union[PromptTask, BenchmarkTask]) -> dict:
    """Return everything that determines the rows. A file is resumed only if all of it is unchanged."""
    drawn = {key: config[key] for key in ("form", "engine", "n", "top_p", "top_k", "num_beams", "max_new_tokens", "batch_size", "seed")}
    digest = hashlib.sha256(json.dumps(task.identity["prompts"]).encode()).hexdigest()
    return {**drawn, "max_length": max_length, **engine.identity, **task.identity, "prompts": digest}


def main() -> None:
    """Run the command line."""
    run_command("sample", run)


if __name__ == "__main__":
    main()
