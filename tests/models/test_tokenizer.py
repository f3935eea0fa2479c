"""Loading of tokenizers: what is missing is named."""

import importlib.util
import json

import pytest
from helpers import bpe_tokenizer
from omegaconf import OmegaConf
from transformers import AutoConfig

from tdpo.models.tokenizer import adds_bos, load_tokenizer, with_bos
from tdpo.utils import UserError

PROTOCOL_BUFFER = b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02"  # how a SentencePiece model begins


def loaded(folder):
    return load_tokenizer(OmegaConf.create({"name_or_path": str(folder), "tokenizer_name_or_path": None, "add_bos": False}), None)


@pytest.mark.parametrize(
    "file,content,kind,reason",
    [
        (
            "tokenizer.model",
            PROTOCOL_BUFFER,
            "LlamaTokenizer",
            "reading its tokenizer.model needs sentencepiece: pip install sentencepiece",
        ),
        ("spiece.model", PROTOCOL_BUFFER, "T5Tokenizer", "reading its spiece.model needs sentencepiece: pip install sentencepiece"),
        ("tokenizer.model", b"IQ== 0\nIg== 1\n", "LlamaTokenizer", "reading its tokenizer.model needs tiktoken: pip install tiktoken"),
        ("tekken.json", b"{}", None, "reading its tekken.json needs mistral_common: pip install mistral_common"),
        ("vocab.json", b"{}", "XLMTokenizer", "sacremoses"),  # Transformers names it
        ("notes.txt", b"", None, "there are no files of a tokenizer: give model.tokenizer_name_or_path"),
    ],
)
def test_what_a_tokenizer_lacks_is_named(file, content, kind, reason, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    absent = ("sentencepiece", "tiktoken", "mistral_common", "sacremoses")
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *more: None if name in absent else find(name, *more))
    AutoConfig.for_model("llama").save_pretrained(tmp_path)
    (tmp_path / file).write_bytes(content)
    if kind is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
    with pytest.raises(UserError) as error:
        loaded(tmp_path)
    assert f"tokenizer '{tmp_path}' cannot be loaded" in str(error.value) and reason in str(error.value)


def test_a_damaged_file_is_no_missing_library(tmp_path):
    bpe_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="cannot be loaded: (?!reading|there)"):
        loaded(tmp_path)


@pytest.mark.parametrize("add_bos", [True, False])
def test_a_tokenizer_that_begins_texts_as_told(add_bos):
    tokenizer = bpe_tokenizer()
    changed = with_bos(tokenizer, add_bos)
    assert adds_bos(changed) == add_bos and not adds_bos(tokenizer)
    assert with_bos(changed, add_bos) is changed and not adds_bos(with_bos(changed, False))
