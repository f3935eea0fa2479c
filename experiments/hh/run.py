"""Repeat the paper's experiment on Anthropic HH (Table 1): SFT, then DPO, f-DPO, IPO, KTO, TDPO1, TDPO2; accuracy, KL, diversity.

    python experiments/hh/run.py data=<folder> model.name_or_path=<SmolLM2>     SmolLM2-135M, on CPU cores
    python experiments/hh/run.py data=<folder> model=pythia160m                 another model of config/model
    python experiments/hh/run.py size=paper                                     the paper's size, on GPUs

The folder holds train.jsonl[.gz] and test.jsonl[.gz] with rows {chosen, rejected}. All keys are in hh.yaml. Results are written after every
run. The same command resumes after an interruption, skips what is finished, and retries what failed.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

import hydra  # noqa: E402
from hydra.core.global_hydra import GlobalHydra  # noqa: E402
from hydra.errors import HydraException  # noqa: E402
from omegaconf import DictConfig, OmegaConf  # noqa: E402
from omegaconf.errors import OmegaConfBaseException  # noqa: E402

from experiments.jobs import Step, run_jobs, slug  # noqa: E402
from experiments.scripts import run_script  # noqa: E402
from preference_datasets import default_options, get_dataset  # noqa: E402
from tdpo.checkpointing.logs import read_metrics  # noqa: E402
from tdpo.cli.check_config import check_config  # noqa: E402
from tdpo.cli.command_line import explain_composition_error, known_keys, override  # noqa: E402
from tdpo.distributed.world import World  # noqa: E402
from tdpo.files import replaced_whole  # noqa: E402
from tdpo.models.build import compute_dtype  # noqa: E402
from tdpo.scoring.mixed_precision import slow_dtype  # noqa: E402
from tdpo.utils import CONFIG_DIR, UserError, lenient_console, nearest, plural  # noqa: E402

SFT = "SFT"  # name of the runs from whose weights the methods start
UNPAIRED = "datasets.hh.unpair=true"  # in the overrides of a method: it trains on single responses, two of each pair
MAY_CHANGE = ("methods", "seeds", "out")  # keys with which a folder may be continued


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", metavar="key=value", help="keys of hh.yaml, model=<file of config/model> and model.<key>=")
    try:
        task = task_of(parser.parse_args().settings)
        check(task)
        begin(task)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    run_all(task)


def run_all(task: DictConfig) -> None:
    """Run what is not finished, and exit with the names of the steps that failed."""
    out, began = Path(task.out), time.monotonic()
    progress = (lambda: progress_of(task)), total_of(task)
    failed = run_jobs("SFT", [job(task, SFT, seed) for seed in task.seeds], 1, out, *progress)
    if missing := [seed for seed in task.seeds if not is_trained(folder_of(task, SFT, seed))]:
        sys.exit(f"error: SFT failed, without which no method can be trained:\n{told(out, [step_name(SFT, missing[0], 'train')])}")
    failed += run_jobs("Methods", [job(task, name, seed) for seed in task.seeds for name in task.methods], 1, out, *progress)
    run_script("experiments/hh/report.py", str(out))  # once more, so that what failed is named in the table
    print(f"{(time.monotonic() - began) / 60:.1f} minutes; results in '{out}'")
    if failed:
        sys.exit(f"error: {plural(len(failed), 'step')} failed; run the same command again to retry\n{told(out, failed)}")


def told(out: Path, steps: Sequence[str]) -> str:
    """Return the last lines of the logs of steps."""
    return "\n".join(line for step in steps for line in [f"{step}:", *(out / "logs" / f"{step}.log").read_text().splitlines()[-3:]])


def task_of(settings: Sequence[str]) -> DictConfig:
    """Return the keys of hh.yaml, with those of the size and of the command line; paths are absolute.

    Args:
        settings: key=value, see hh.yaml.

    Raises:
        UserError: a key, a size or a method is unknown, or a value is of another kind.
    """
    task = OmegaConf.load(HERE / "hh.yaml")
    model = [setting for setting in settings if setting.startswith(("model=", "model."))]
    given = OmegaConf.from_dotlist([setting for setting in settings if setting not in model])
    sizes = task.pop("sizes")
    if given.get("size", task.size) not in sizes:
        raise UserError(f"size={given.size} is unknown: the sizes are {', '.join(sizes)}")
    task = OmegaConf.merge(task, sizes[given.get("size", task.size)])
    if unknown := sorted(set(given) - set(task)):
        raise UserError(f"unknown key {unknown[0]}{nearest(unknown[0], list(task))}; the keys are {', '.join(task)}")
    if (chosen := given.pop("methods", None)) is not None:
        if not OmegaConf.is_list(chosen) or (unknown := sorted(set(chosen) - set(task.methods))):
            raise UserError(f"methods={chosen}: give a list of some of {', '.join(task.methods)}, such as methods=[DPO,TDPO2]")
        task.methods = {name: overrides for name, overrides in task.methods.items() if name in chosen}
    for key, value in given.items():
        if OmegaConf.is_list(task[key]) and not OmegaConf.is_list(value):
            raise UserError(f"{key}={value}: give a list, as in {key}=[{value}]")
        if isinstance(task[key], int) and not isinstance(value, (int, type(None))):
            raise UserError(f"{key}={value}: give an integer, as in {key}={task[key]}")
    task = OmegaConf.merge(task, given)
    other = [setting for setting in model if setting.startswith("model=")]
    task.model = [*(other or task.model), *(setting for setting in model if setting not in other)]
    task.out = str(Path(task.out or f"runs/hh-{task.size}").resolve())
    task.data = task.data and str(Path(task.data).expanduser().resolve())
    return task


def check(task: DictConfig) -> None:
    """Check the data and the command lines of all runs, before the first of them starts. Says so if they would be slow on this processor.

    Raises:
        UserError: rows cannot be read, or a command line cannot be composed.
    """
    if task.data is None and task.size == "small":
        raise UserError("missing: data=<folder with train.jsonl and test.jsonl, or .jsonl.gz, of rows {chosen, rejected}>")
    for split in ("train", "test") if task.data else ():
        get_dataset("hh", split, silent=True, options={**default_options("hh"), "path": task.data})
    for name in [SFT, *task.methods]:
        overrides = overrides_of(task, name, task.seeds[0])
        try:
            GlobalHydra.instance().clear()
            with hydra.initialize_config_dir(CONFIG_DIR, version_base=None):
                config = hydra.compose("config", overrides)
                check_config(config, overrides)
        except (HydraException, OmegaConfBaseException) as error:
            raise UserError(f"{name}: {explain_composition_error(error, CONFIG_DIR, known_keys('config'))}") from None
        if name == SFT and (slow := slow_dtype(World().device, compute_dtype(config.model))):
            print(f"warning: {slow}, and another out= than that of a run which has begun", file=sys.stderr)


def begin(task: DictConfig) -> None:
    """Make the experiment's folder with task.yaml, which names the methods and seeds of all commands so far.

    Raises:
        UserError: its runs were begun with other settings, with which new ones must not be compared.
    """
    out = Path(task.out)
    if (out / "task.yaml").exists():
        before = OmegaConf.load(out / "task.yaml")
        if different := [key for key in task if key not in MAY_CHANGE and before.get(key) != task[key]]:
            key = different[0]
            raise UserError(f"'{out}' was begun with {key}={before.get(key)}, which is {task[key]} here: give that value, or another out=")
        if other := [name for name in task.methods if before.methods.get(name, task.methods[name]) != task.methods[name]]:
            raise UserError(
                f"'{out}' was begun with {other[0]} as '{before.methods[other[0]]}': give another out=, or the method another name"
            )
        methods, seeds = {**before.methods, **task.methods}, sorted({*before.seeds, *task.seeds})
    else:
        methods, seeds = task.methods, task.seeds
    (out / "logs").mkdir(parents=True, exist_ok=True)
    with replaced_whole(str(out / "task.yaml")) as file:
        file.write(OmegaConf.to_yaml({**task, "methods": methods, "seeds": seeds}))


def folder_of(task: DictConfig, name: str, seed: int) -> Path:
    """Return the folder of a run."""
    return Path(task.out) / f"seed{seed}" / slug(name)


def step_name(name: str, seed: int, kind: str) -> str:
    """Return the name of a step of a run, which is also that of its log."""
    return f"seed{seed}_{slug(name)}_{kind}"


def is_trained(run: Path) -> bool:
    """Whether a run is at its end: only its last checkpoint has a Hugging Face folder."""
    return (run / "LATEST" / "hf").exists()


def is_written(file: Path) -> bool:
    """Whether a command has written its file; one that was interrupted leaves an empty one."""
    return file.exists() and file.stat().st_size > 0


def job(task: DictConfig, name: str, seed: int) -> list[Step]:
    """Return the steps of a run that are not finished: train, measure, write the page of its tokens, and update the results."""
    run, steps = folder_of(task, name, seed), []
    of_run = [override("run", str(run)), f"batch_size={task.measure_batch_size}"]
    if not is_trained(run):
        steps.append(Step(step_name(name, seed, "train"), ["train.py", *overrides_of(task, name, seed)], required=True))
    if not is_written(run / "eval.json"):
        pairs = "null" if task.n_pairs is None else task.n_pairs
        sizes = [f"n_pairs={pairs}", f"n_prompts={task.n_prompts}", f"n={task.n}", f"seed={seed}"]
        steps.append(Step(step_name(name, seed, "eval"), ["eval.py", *of_run, override("out", str(run / "eval.json")), *sizes]))
    if name != SFT and not is_written(run / "tokens.html"):
        page = [override("out", str(run / "tokens.html")), f"n_pairs={task.token_pairs}"]
        steps.append(Step(step_name(name, seed, "tokens"), ["token_report.py", *of_run, *page]))
    return [*steps, Step("report", ["experiments/hh/report.py", task.out])] if steps else []


def overrides_of(task: DictConfig, name: str, seed: int) -> list[str]:
    """Return the command line of train.py for a run."""
    method = ["loss=sft"] if name == SFT else task.methods[name].split()
    responses = 2 if UNPAIRED in method else 1  # examples of a pair
    examples = task.sft_examples if name == SFT else task.examples
    length = [] if examples is None else ["n_epochs=null", f"n_examples={examples * responses}"]
    counts = {"batch_size": task.batch_size, "n_eval_examples": task.eval_examples, "eval_every": task.eval_every}
    sizes = [f"{key}={count * responses}" for key, count in counts.items()]
    data = ["datasets=[hh]", *([override("datasets.hh.path", task.data)] if task.data else [])]
    common = [*task.model, *data, "sample_during_eval=false", "wandb.enabled=false", "minimum_log_interval_secs=0", *task.common]
    archive = [] if name == SFT else [override("model.archive", str(folder_of(task, SFT, seed)))]
    where = [override("local_run_dir", str(folder_of(task, name, seed))), "resume=auto", "exp_name=hh", f"seed={seed}", "save_policy=never"]
    return [*common, *(task.sft if name == SFT else task.preference), *method, *sizes, *length, *archive, *where]


def runs_of(task: DictConfig) -> list[tuple[str, int]]:
    """Return (name, seed) of every run."""
    return [(name, seed) for seed in task.seeds for name in (SFT, *task.methods)]


def total_of(task: DictConfig) -> int:
    """Return the examples of the whole experiment: pairs that are trained on and measured, and texts that are sampled."""
    trained = {name: task.sft_examples if name == SFT else task.examples for name, _ in runs_of(task)}
    return sum((trained[name] or 1) + measured_of(task) for name, _ in runs_of(task))


def measured_of(task: DictConfig) -> int:
    """Return the pairs and texts that are measured of a run."""
    return (task.n_pairs or 1) + task.n_prompts * task.n


def progress_of(task: DictConfig) -> int:
    """Return how many examples of `total_of` are done."""
    done = 0
    for name, seed in runs_of(task):
        run = folder_of(task, name, seed)
        wanted = task.sft_examples if name == SFT else task.examples
        done += measured_of(task) if is_written(run / "eval.json") else 0
        if wanted is None or is_trained(run):
            done += (wanted or 1) if is_trained(run) else 0
        elif (run / "metrics.jsonl").exists():
            examples = max((log["counters/examples"] for log in read_metrics(str(run / "metrics.jsonl"))[0]), default=0)
            done += min(wanted, examples // (1 if name == SFT or UNPAIRED not in task.methods[name] else 2))
    return int(done)


if __name__ == "__main__":
    with lenient_console():
        main()
