"""SPIN, self-play fine-tuning (https://arxiv.org/abs/2401.01335): repeated DPO that prefers the human response to the model's own.

    python -u experiments/spin.py run=runs/sft out=runs/spin iterations=3 model=tiny n_epochs=2 lr=1e-4

run= is the folder of an SFT run, out= the folder of the iterations, iterations= their number. Optional: n_prompts= number of train prompts
(default: all), sample_batch_size= prompts at a time while sampling (64), temperature= of sampling (1). All other keys are train.py's.

In each iteration the current model continues the SFT prompts. Its continuations are the rejected responses, the SFT targets the chosen
ones. The model is then trained on these pairs with loss=dpo and with itself as the reference; the result is the model of the next
iteration. The same command resumes an interrupted run.
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import datasets  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402

from experiments.scripts import run_script, send_to_scripts  # noqa: E402
from preference_datasets import load_split  # noqa: E402
from tdpo.analysis.trained_models import Trained, find_trained  # noqa: E402
from tdpo.cli.command_line import override  # noqa: E402
from tdpo.data.contract import SFT  # noqa: E402
from tdpo.data.sources import Place, read_rows  # noqa: E402
from tdpo.data.tokenization import special_token_strings  # noqa: E402
from tdpo.distributed.signals import forwarded  # noqa: E402
from tdpo.files import replaced_whole  # noqa: E402
from tdpo.models.places import prepare_hub  # noqa: E402
from tdpo.models.tokenizer import load_tokenizer  # noqa: E402
from tdpo.utils import UserError, flat_keys, lenient_console, plural  # noqa: E402

OWN = {"run": None, "out": None, "iterations": None, "n_prompts": "null", "sample_batch_size": "64", "temperature": "1.0"}


def main() -> None:
    given = [argument.partition("=") for argument in sys.argv[1:]]
    own = {**OWN, **{key: value for key, _, value in given if key in OWN}}
    missing = [f"{key}=..." for key, value in own.items() if value is None]
    try:
        if missing:
            raise UserError(f"missing: {', '.join(missing)}")
        if not own["iterations"].isdigit() or own["iterations"] == "0":
            raise UserError(f"iterations={own['iterations']} is not an integer above 0: give, for example, iterations=3")
        spin(own, ["".join(parts) for parts in given if parts[0] not in OWN])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def spin(own: dict[str, str], overrides: list[str]) -> None:
    """Run all iterations.

    Args:
        own: values of the keys in OWN.
        overrides: further arguments, for train.py.

    Raises:
        UserError: `run` is not a run folder, or its prompts are chat messages.
    """
    first = find_trained(own["run"])
    if first.config is None:
        raise UserError(f"run={own['run']} is not a run folder, so its datasets are unknown: give the folder of an SFT run")
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
            call("sample.py", override("run", present), f"split={split}", override("out", str(samples)), *keys)
            write_pairs(table, split, samples, folder / "pairs" / f"{split}.jsonl")
        pairs = {"path": "train", "eval_path": "test"}
        data = [override(f"datasets.jsonl.{key}", f"{folder}/pairs/{file}.jsonl") for key, file in pairs.items()]
        archive = override("model.archive", present)
        where = [override("local_run_dir", f"{folder}/run"), "resume=auto", f"exp_name=spin_{k}"]
        call("train.py", "loss=dpo", *overrides, "datasets=[jsonl]", *data, archive, *where)
        present = f"{folder}/run"
    print(f"--- SPIN finished: the model of iteration {own['iterations']} is in {present}")


def data_of(trained: Trained) -> list[str]:
    """Return the SFT run's datasets as overrides for sample.py, which would otherwise use those of the model that it samples."""
    data = trained.datasets(None)
    keys = [(key, OmegaConf.select(trained.config.datasets, key)) for key in flat_keys(data)]
    given = [override(f"datasets.{key}", value) if isinstance(value, str) else f"datasets.{key}={json.dumps(value)}" for key, value in keys]
    return [f"datasets=[{','.join(data)}]", *given]


def table_of(trained: Trained, split: str) -> datasets.Dataset:
    """Return a table with one row per prompt; column `texts` holds its SFT target.

    Args:
        trained: the SFT run.
        split: train or test.

    Raises:
        UserError: a chat template has rendered the prompts; as plain text, which the pairs are, they would be tokenized differently.
    """
    config, tokenizer = trained.config, load_tokenizer(trained.model, trained.cache_dir())
    lengths = config.max_length, config.max_prompt_length
    table = load_split(trained.datasets(None), split, tokenizer, *lengths, SFT, config.model.add_bos, True, trained.cache_dir()).prompts
    special = special_token_strings(tokenizer)
    if any(token in text for text in table["prompt"] for token in special):
        raise UserError(f"run={trained.name} was trained on chat messages: give an SFT run on plain-text prompts")
    return table


def write_pairs(table: datasets.Dataset, split: str, samples: Path, file: Path) -> None:
    """Write rows {prompt, chosen, rejected}: chosen is the SFT target, rejected the current model's continuation.

    Args:
        table: the prompts and targets of the split, see `table_of`.
        split: train or test.
        samples: output of sample.py on these prompts.
        file: the file of pairs; it is replaced as a whole, so it is never incomplete.
    """
    targets, left_out = table["texts"], 0
    file.parent.mkdir(parents=True, exist_ok=True)
    with replaced_whole(str(file)) as handle:
        for row in read_rows(Place(str(samples)), split):
            target, own = targets[row.fields["index"]][0], row.fields["completion"]
            if not own.strip() or own == target:
                left_out += 1
                continue
            handle.write(json.dumps({"prompt": row.fields["prompt"], "chosen": target, "rejected": own}) + "\n")
    print(f"{split} pairs: {file}; skipped {plural(left_out, 'prompt')} whose sample is empty or equals the target", flush=True)


def call(script: str, *arguments: str) -> None:
    """Run a script of the repository; end the program if the script fails or a stop signal came, which is forwarded to it."""
    with forwarded(send_to_scripts) as received:
        code = run_script(script, *arguments)
    if received or code:
        sys.exit(code or 128 + received[0])  # a script that had just finished exits with 0 although the loop was told to stop


if __name__ == "__main__":
    with lenient_console():
        main()
