"""With closed gates cross-attention leaves the language model's logits as they are, to the last bit, in family after family.

The whole table is in `docs/fusion.md`; here are families of every make.
"""

import re
from pathlib import Path

import pytest
import transformers

from anyvlm.compatibility import tiny_configs
from anyvlm.compatibility.cross_attention import check_cross_attention


FAMILIES = [
    "llama",
    "gpt2",
    "opt",
    "bloom",
    "gpt_neox",
    "phi",
    "gemma3_text",
    "falcon",
    "mixtral",
    "qwen3_moe",
    "mamba",
    "jamba",
    "bamba",
    "falcon_h1",
    "zamba2",
    "qwen3_next",
    "rwkv",
    "bart",
]
REFUSED = {"gemma3n_text": "states of shape", "mllama": "not once each", "xlm": "do not each take"}


@pytest.mark.parametrize("text_type", FAMILIES)
def test_closed_gates_change_nothing(text_type):
    found = check_cross_attention(tiny_configs.text_config(text_type))
    assert (found.status, found.reason, found.difference) == ("works", "", 0.0)


@pytest.mark.parametrize("text_type", REFUSED)
def test_what_has_no_list_of_layers_is_refused(text_type):
    found = check_cross_attention(tiny_configs.text_config(text_type))
    assert found.status == "refused" and REFUSED[text_type] in found.reason


def test_the_committed_table_knows_every_type():
    document = (Path(__file__).parents[2] / "docs" / "fusion.md").read_text(encoding="utf-8")
    if f"transformers {transformers.__version__}," not in document:
        pytest.skip("the table was computed with another version of transformers")
    listed = re.findall(r"^\| (\S+) \| ", document, flags=re.MULTILINE)
    assert set(tiny_configs.text_types()) <= set(listed)
    assert "| fails |" not in document
