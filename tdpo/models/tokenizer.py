"""The tokenizer of a config's `model`."""

import copy
import importlib.util
import os
from typing import Optional

import tokenizers
import transformers
from omegaconf import DictConfig

from tdpo.data import reviews
from tdpo.models.chat_template import set_chat_template
from tdpo.models.places import EMBEDDED_TOKENIZER, find_file, place_of
from tdpo.utils import UserError, get_logger, looks_local, reason_of

log = get_logger(__name__)

# Files of tokenizers that other programs read; Transformers writes tokenizer.json only.
SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
TOKENIZER_FILES = (*SENTENCEPIECE, "vocab.json", "merges.txt", "vocab.txt", "tekken.json")


def load_tokenizer(model: DictConfig, cache_dir: Optional[str]):
    """Return the tokenizer of a config's `model`. It has a padding token (end-of-sequence, if it had none).

    Raises:
        UserError: it cannot be loaded, or lacks the end-of-sequence token, a required beginning-of-sequence token, or the chat template
            that `model` names.
    """
    name = model.tokenizer_name_or_path or model.name_or_path
    tokenizer = embedded_tokenizer() if name == EMBEDDED_TOKENIZER else _load_tokenizer(name, model.add_bos, cache_dir)
    set_chat_template(tokenizer, model.get("chat_template"), model.get("chat_template_kwargs") or {})
    return tokenizer


def _load_tokenizer(name: str, add_bos: bool, cache_dir: Optional[str]):
    if looks_local(name) and not os.path.exists(name):
        raise UserError(f"model or tokenizer '{name}' does not exist; give a local path, or owner/name for one on the hub")
    try:
        place, gguf = place_of(name)
        tokenizer = transformers.AutoTokenizer.from_pretrained(place, cache_dir=cache_dir, trust_remote_code=False, **gguf)
    except UserError:
        raise
    except Exception as error:  # the Rust library raises plain Exception for a damaged file
        why = _missing(name, cache_dir) or reason_of(error)
        raise UserError(f"tokenizer '{name}' cannot be loaded: {why}") from None
    if tokenizer.eos_token_id is None:
        raise UserError(f"tokenizer '{name}' has no end-of-sequence token: give another model.tokenizer_name_or_path")
    if add_bos and tokenizer.bos_token_id is None:
        raise UserError(f"model.add_bos=true: tokenizer '{name}' has no beginning-of-sequence token; use model.add_bos=false")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token_id = tokenizer.eos_token_id
    return tokenizer


def _missing(name: str, cache_dir: Optional[str]) -> Optional[str]:
    """Return what a tokenizer lacks that cannot be loaded: a library, or its files; None if that is not the reason.

    Transformers names the wrong library where it has tried one after the other.
    """
    needed: dict[str, list[str]] = {}  # file -> packages
    for file in SENTENCEPIECE:
        if path := find_file(name, file, cache_dir):
            with open(path, "rb") as handle:  # a protocol buffer begins with the tag of its first field; tiktoken's files are text
                needed[file] = ["sentencepiece"] if handle.read(1) == b"\n" else ["tiktoken"]
    if find_file(name, "tekken.json", cache_dir):
        needed["tekken.json"] = ["mistral_common"]
    for file, packages in needed.items():
        if missing := [package for package in packages if importlib.util.find_spec(package) is None]:
            return f"reading its {file} needs {' and '.join(missing)}: pip install {' '.join(missing)}"
    if not needed and not any(find_file(name, file, cache_dir) for file in ("tokenizer.json", "tokenizer_config.json", *TOKENIZER_FILES)):
        return "there are no files of a tokenizer: give model.tokenizer_name_or_path"
    return None


def adds_bos(tokenizer) -> bool:
    """Return whether a tokenizer lets a text begin with the beginning-of-sequence token of its own accord."""
    return tokenizer.bos_token_id is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]


def with_bos(tokenizer, add_bos: bool):
    """Return a tokenizer, a copy if it has to be changed, that adds the beginning-of-sequence token to a text or does not."""
    if adds_bos(tokenizer) == add_bos:
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_bos_token = add_bos
    if adds_bos(tokenizer) != add_bos:
        log.info(f"the exported tokenizer adds a beginning-of-sequence token of its own accord: {not add_bos}; in training: {add_bos}")
    return tokenizer


def embedded_tokenizer():
    """Return the tokenizer of the embedded film reviews: one token per word."""
    special = ["<|endoftext|>", "<|padding|>", "<|unknown|>"]
    vocabulary = {word: i for i, word in enumerate(special + reviews.vocabulary())}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=special[2]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=special[0], bos_token=special[0], pad_token=special[1], unk_token=special[2]
    )
