"""Some classes of the table in docs/models.md, each of which needs something that others do not."""

import re

import families
import pytest
import transformers
from helpers import ROOT
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

KINDS = {
    "deepseek_v3": "fast",  # latent attention, experts that have a tensor each in the files
    "gemma4_text": "fast",  # two sets of rotary frequencies
    "gpt_oss": "fast",  # attention sinks
    "qwen3_next": "plain: it has layers of linear_attention",
    "bloom": "plain",  # positions follow from the attention mask
    "gemma3": "fast",  # text and images
    "qwen3_5": "plain: it has layers of linear_attention",  # the same, but its class for language models is one of text alone
}


@pytest.mark.parametrize("model_type", KINDS)
def test_a_class_is_trained_and_exported(model_type, tmp_path, capfd):
    found = families.check(model_type, tmp_path)
    assert found and set(found.values()) <= {"yes", families.AS_TEXT}, found
    assert (found["exported"] == families.AS_TEXT) == (model_type == "qwen3_5")
    scoring = families.scoring_in(capfd.readouterr().out)
    assert scoring.startswith(KINDS[model_type])


def test_the_table_names_every_class():
    text = (ROOT / "docs" / "models.md").read_text()
    if f"Transformers {transformers.__version__} " not in text:
        pytest.skip("docs/models.md was written with another version of Transformers")
    assert set(re.findall(r"^\| \w+ \(([\w-]+)\) \|", text, re.MULTILINE)) == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
