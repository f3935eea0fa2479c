"""SPIN, self-play fine-tuning (https://arxiv.org/abs/2401.01335): DPO of the human response against the model's own, repeated.

    python -u experiments/spin.py run=runs/sft out=runs/spin iterations=3 model=tiny n_epochs=2 lr=1e-4

run= is the folder of an SFT run, out= where the iterations go, iterations= how many. Optional: n_prompts= so many train prompts (all),
sample_batch_size= prompts at a time while sampling (64), temperature= (1). Every other key is train.py's.

In iteration k the present model continues the SFT prompts; these are the rejected responses, the SFT targets the chosen ones; the model is
the reference, and trained against it (loss=dpo) it is that of iteration k + 1. The same command goes on where it was interrupted.
"""

import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import datasets  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402

from experiments.scripts import run_script, send_to_scripts  # noqa: E402
from preference_datasets import load_split  # noqa: E402
from tdpo.analysis.trained_models import Trained, find_trained  # noqa: E402
from tdpo.data.contract import SFT  # noqa: E402
from tdpo.data.rows import read_rows  # noqa: E402
from tdpo.data.tokenization import special_token_strings  # noqa: E402
from tdpo.distributed.signals import forwarded  # noqa: E402
from tdpo.models.build import load_tokenizer, prepare_hub  # noqa: E402
from tdpo.utils import UserError, flat_keys, plural  # noqa: E402

OWN = {"run": None, "out": None, "iterations": None, "n_prompts": "null", "sample_batch_size": "64", "temperature": "1.0"}


def main() -> None:
    given = [argument.partition("=") for argument in sys.argv[1:]]
    own = {**OWN, **{key: value for key, _, value in given if key in OWN}}
    missing = [f"{key}=..." for key, value in own.items() if value is None]
    try:
        if missing:
            raise UserError(f"missing: {', '.join(missing)}")
        if not own["iterations"].isdigit() or own["iterations"] == "0":
            raise UserError(f"iterations={own['iterations']}: a number above 0")
        spin(own, ["".join(parts) for parts in given if parts[0] not in OWN])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def spin(own: dict[str, str], overrides: list[str]) -> None:
    """All iterations.

    Raises:
        UserError: `run` is no run's folder.
    """
    first = find_trained(own["run"])
    if first.config is None:
        raise UserError(f"run={own['run']} is no run's folder, which would name its data")
    prepare_hub(first.on_hub())
    tables = {split: table_of(first, split) for split in ("train", "test")}
    present, out = own["run"], Path(own["out"])
    for k in range(1, int(own["iterations"]) + 1):
        folder = out / f"iteration-{k}"
        print(f"--- SPIN iteration {k} of {own['iterations']}: {folder}", flush=True)
        for split, table in tables.items():
            samples = folder / f"samples-{split}.jsonl"
            keys = data_of(first) + ([f"n_prompts={own['n_prompts']}"] if split == "train" else [])
            keys += [f"batch_size={own['sample_batch_size']}", f"temperature={own['temperature']}", f"seed={k}"]
            call("sample.py", f"run={present}", f"split={split}", f"out={samples}", *keys)
            write_pairs(table, split, samples, folder / "pairs" / f"{split}.jsonl")
        data = [f"datasets.jsonl.path={folder}/pairs/train.jsonl", f"datasets.jsonl.eval_path={folder}/pairs/test.jsonl"]
        archive = f"model.archive={present}/LATEST/policy.pt"
        where = [f"local_run_dir={folder}/run", "resume=auto", f"exp_name=spin_{k}"]
        call("train.py", "loss=dpo", *overrides, "datasets=[jsonl]", *data, archive, *where)
        present = f"{folder}/run"
    print(f"--- SPIN is done: the model of iteration {own['iterations']} is {present}")


def data_of(trained: Trained) -> list[str]:
    """The run's datasets as overrides of sample.py, whose own default are those of the model that it is given."""
    data = trained.datasets(None)
    keys = [(key, OmegaConf.select(trained.config.datasets, key)) for key in flat_keys(data)]
    return [f"datasets=[{','.join(data)}]", *(f"datasets.{key}={json.dumps(value)}" for key, value in keys)]


def table_of(trained: Trained, split: str) -> datasets.Dataset:
    """A row a prompt, with its target in `texts`.

    Raises:
        UserError: a chat template has rendered them: as plain text, which pairs are, its tokens would be others.
    """
    config, tokenizer = trained.config, load_tokenizer(trained.model, trained.cache_dir())
    lengths = config.max_length, config.max_prompt_length
    table = load_split(trained.datasets(None), split, tokenizer, *lengths, SFT, config.model.add_bos, True, trained.cache_dir()).prompts
    special = special_token_strings(tokenizer)
    if any(token in text for text in table["prompt"] for token in special):
        raise UserError(f"run={trained.name} was trained on chat messages; self-play takes prompts of plain text")
    return table


def write_pairs(table: datasets.Dataset, split: str, samples: Path, file: Path) -> None:
    """Rows {prompt, chosen, rejected}: of each SFT prompt its target, and what the present model made of it.

    Args:
        table: of the split, see `table_of`.
        samples: of sample.py, on the prompts of the split.
    """
    targets, left_out = table["texts"], 0
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_suffix(".new")
    with open(new, "w") as handle:
        for row in read_rows(str(samples), split, None, None):
            target, own = targets[row.fields["index"]][0], row.fields["completion"]
            if not own.strip() or own == target:
                left_out += 1
                continue
            handle.write(json.dumps({"prompt": row.fields["prompt"], "chosen": target, "rejected": own}) + "\n")
    os.replace(new, file)
    print(f"{split} pairs: {file}; {plural(left_out, 'prompt')} left out, whose sample is empty or the target", flush=True)


def call(script: str, *arguments: str) -> None:
    """Run a script of the repository; ends the program where that ends badly, or a signal came, which goes on to it."""
    with forwarded(send_to_scripts):
        if code := run_script(script, *arguments):
            sys.exit(code)


if __name__ == "__main__":
    main()
