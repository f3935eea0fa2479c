"""Tries every class of causal language model that Transformers has, and writes the table of docs/models.md: python tests/families.py

Each class is built small, from random weights, and goes through SFT and TDPO2 as a user's model does. What is tried is in `check`. Each
has a process of its own, so that none disturbs another. A quarter of an hour on two cores; `make test` checks some classes only.
"""

import argparse
import collections
import datetime
import multiprocessing
import os
import re
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")
TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS.parent), str(TESTS), str(TESTS / "workers")]

import torch  # noqa: E402
import transformers  # noqa: E402
from helpers import assert_close_logs, bpe_tokenizer, logs_of, run, turn, write_lines  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from small_models import MORE, small_config  # noqa: E402
from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoConfig, AutoModelForCausalLM  # noqa: E402
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES  # noqa: E402

from tdpo.utils import RunError, UserError  # noqa: E402

LENGTH = 64  # tokens of prompt and response
AS_TEXT = "yes, as a model of text alone"
NEEDS_DECODER = {key for key, fields in MORE.items() if "is_decoder" in fields}
PLAIN = {
    "its log-probabilities would differ": "it scales or masks in its own way",
    "it cannot compute several responses in one row": "it takes no mask",
}
HEAD = """# Models: which language models can be trained?

```
python -u train.py model=blank_model model.name_or_path=Qwen/Qwen3-0.6B datasets=[hh] loss=sft exp_name=sft_qwen3
```

[Adding a model](adding_a_model.md) explains the keys; this page is the list.

Every class of causal language model in Transformers was built small, from random weights, saved, and trained as a user's model is. "yes"
means that all of this holds:

- two steps of SFT, then two of TDPO2 from their weights;
- TDPO2 starts with loss ln 2 and KL 0: policy and reference agree, nothing random is left;
- one example at a time, scored plain, gives the logs of the whole batch: loss and gradient do not depend on how the batch is cut;
- the exported folder has the tensor names of the model's own, and Transformers reloads it with equal weights. Where the class of a
  model for images is one of text alone, as of Llama 4 and Qwen 3.5, so is the export; a warning counts the tensors that are left out.

{passed} of {all} do, with {versions} on a CPU ({date}). Otherwise the cell has the message. Fast scoring
needs a model that takes a mask by which the responses of a prompt are kept apart; the others are scored plain, several times slower.

Written by `python tests/families.py`; `make test` tries some of them again.

| class (model type) | trained | scoring |
|---|---|---|
"""


def save_base(model_type: str, folder: Path) -> None:
    """Save a small model of a type, with random weights, and a chat tokenizer."""
    tokenizer = bpe_tokenizer()
    config = small_config(model_type)
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 1, tokenizer.eos_token_id, 3
    torch.manual_seed(0)
    whole = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(type(config), None)  # what such a model's folder holds, text and images
    model = AutoModelForCausalLM.from_config(config) if whole is None else whole(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def options(folder: Path, base: Path) -> list[str]:
    """Return the options of a run on eight pairs of different lengths."""
    rows = [{"prompt": [turn("user", "a" * i)], "chosen": "yes " * (i % 4 + 1), "rejected": "no"} for i in range(1, 9)]
    path = write_lines(folder / "rows.jsonl", rows)
    data = ["datasets=[jsonl]", f"datasets.jsonl.path={path}", f"datasets.jsonl.eval_path={path}"]
    size = [f"max_length={LENGTH}", "max_prompt_length=32", "batch_size=4", "n_examples=8", "n_eval_examples=2", "eval_batch_size=2"]
    return ["model=blank_model", f"model.name_or_path={base}", *data, *size, "lr=1e-3", "warmup_steps=0", "seed=1"]


@dataclass
class Tried:
    """What was found of a class: by what was tried, "yes" or the reason why not."""

    model_type: str
    name: str
    found: dict[str, str] = field(default_factory=dict)


@contextmanager
def printed_into(path: Path) -> Iterator[None]:
    """Within the block, write what this process prints into a file."""
    kept = [os.dup(1), os.dup(2)]
    with open(path, "w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for stream, saved in zip((1, 2), kept):
                os.dup2(saved, stream)
                os.close(saved)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def check(model_type: str, folder: Path) -> dict[str, str]:
    """Try a class: build, two steps of SFT, two of TDPO2 from them, again with the batch cut and scored plain, and the export.

    Args:
        model_type: of Transformers' configs.
        folder: an empty one.

    Returns:
        by what was tried "yes", "fast", or what is otherwise.
    """
    found: dict[str, str] = {}

    def attempt(what: str, function: Callable[[], Optional[str]]) -> bool:
        try:
            found[what] = function() or "yes"
        except (UserError, RunError) as error:
            found[what] = f"refused: {error}"
        except AssertionError as error:
            found[what] = f"no: {' '.join(str(error).split())[:150]}"
        except Exception as error:
            traceback.print_exc()
            found[what] = f"no: {type(error).__name__}: {' '.join(str(error).split())[:150]}"
        return found[what] == "yes"

    base = folder / "base"
    if not attempt("built", lambda: save_base(model_type, base)):
        return found
    common = options(folder, base)
    if not attempt("SFT", lambda: run(*common, "loss=sft", f"local_run_dir={folder}/sft") and None):
        return found
    tdpo = [*common, "loss=tdpo2", f"model.archive={folder}/sft/LATEST/policy.pt", "log_kl=true"]
    if not attempt("TDPO2", lambda: run(*tdpo, f"local_run_dir={folder}/whole") and None):
        return found

    def starts_equal() -> None:
        first = logs_of(folder / "whole", "train")[0]
        assert abs(first["loss/train"] - 0.693147) < 1e-5 and abs(first["kl_train/chosen"]) < 1e-5, (
            f"loss {first['loss/train']:.4f}, KL {first['kl_train/chosen']:.2g}"
        )

    def cut() -> None:
        run(*tdpo, "gradient_accumulation_steps=4", "scoring=plain", f"local_run_dir={folder}/cut")
        assert_close_logs(*(logs_of(folder / name) for name in ("whole", "cut")))

    def exported() -> Optional[str]:
        hf, trained = folder / "whole" / "LATEST" / "hf", torch.load(folder / "whole" / "LATEST" / "policy.pt", weights_only=True)["state"]
        of_text = AutoConfig.from_pretrained(hf).model_type != AutoConfig.from_pretrained(base).model_type
        names = set() if of_text else set(tensors_of(base)) ^ set(tensors_of(hf))
        assert not names, f"other names than the base model's: {sorted(names)[:4]}"
        loaded = AutoModelForCausalLM.from_pretrained(hf).state_dict()
        wrong = [name for name, tensor in trained.items() if not torch.equal(tensor, loaded[name])]
        assert not wrong, f"other tensors after reloading: {wrong[:4]}"
        return AS_TEXT if of_text else None

    attempt("starts at ln 2", starts_equal)
    attempt("any cut", cut)
    attempt("exported", exported)
    return found


def scoring_in(printed: str) -> str:
    """Return how the last run that tried fast scoring scored: "fast", or "plain: reason"."""
    return re.sub(r", several times slower, because of \w+", "", re.findall(r"scoring: (fast|plain, .*)", printed)[-1])


def try_class(model_type: str, name: str, folder: Path, send) -> None:
    """Try a class in a process of its own, and send what was found."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    folder.mkdir()
    with printed_into(folder / "printed.txt"):
        found = check(model_type, folder)
    if found.get("TDPO2") == "yes":
        found["scoring"] = scoring_in((folder / "printed.txt").read_text())
    send.send(Tried(model_type, name, found))


def try_all(types: list[tuple[str, str]], folder: Path, patience: float) -> list[Tried]:
    """Try classes, two at a time; one that takes more than `patience` seconds is ended."""
    context = multiprocessing.get_context("fork")
    waiting, running, done = collections.deque(types), [], {}
    while waiting or running:
        while waiting and len(running) < 2:
            model_type, name = waiting.popleft()
            receive, send = context.Pipe(duplex=False)
            process = context.Process(target=try_class, args=(model_type, name, folder / model_type, send))
            process.start()
            send.close()
            running.append((process, receive, model_type, name))
        process, receive, model_type, name = running.pop(0)
        tried = Tried(model_type, name, {"built": f"no: no answer in {patience:.0f} s"})
        try:
            if receive.poll(patience):
                tried = receive.recv()
        except EOFError:
            tried.found["built"] = "no: its process ended"
        process.kill()
        process.join()
        done[model_type] = tried
        print(model_type, tried.found, flush=True)
    return [done[model_type] for model_type, _ in types]


def row_of(tried: Tried) -> str:
    """Return a class's row of the table."""
    found = dict(tried.found)
    scoring = found.pop("scoring", "")
    for reason, short in PLAIN.items():
        scoring = re.sub(f"plain: {reason}.*", f"plain: {short}", scoring)
    failed = [f"{what}: {result.removeprefix('no: ')}" for what, result in found.items() if not result.startswith("yes")]
    result = "; ".join(failed) or max(found.values(), key=len)
    result = re.sub(r"StrictDataclassClassValidationError: Class validation error for validator '\w+': ", "", result)
    if failed and failed[0].startswith("built"):
        result = f"not built: {result.removeprefix('built: ')}"
    elif failed and "refused: " in failed[0]:
        result = result[result.index("refused: ") :]
    result = _short(result)
    if tried.model_type in NEEDS_DECODER:
        result += ", with is_decoder=true in its config.json"
    return "| " + " | ".join(cell.replace("|", "/") for cell in (f"{tried.name} ({tried.model_type})", result, scoring)) + " |"


def _short(text: str, most: int = 130) -> str:
    return text if len(text) <= most else f"{text[:most].rpartition(' ')[0]} ..."


def table_of(tried: list[Tried]) -> str:
    """Return the text of docs/models.md."""
    rows = [row_of(each) for each in tried]
    passed = sum("| yes" in row for row in rows)
    versions = f"Transformers {transformers.__version__} and PyTorch {torch.__version__.split('+')[0]}"
    return HEAD.format(passed=passed, all=len(rows), versions=versions, date=datetime.date.today()) + "\n".join(rows) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("types", nargs="*", help="model types to try, which are printed; none: all, and docs/models.md is written")
    arguments = parser.parse_args()
    types = [(key, name) for key, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items() if not arguments.types or key in arguments.types]
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        tried = try_all(types, Path(folder), 240.0)
    if not arguments.types:
        (TESTS.parent / "docs" / "models.md").write_text(table_of(tried))


if __name__ == "__main__":
    main()
