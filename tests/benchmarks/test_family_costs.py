"""The rows of native families: models of the size that was asked for, and a report. Nothing here depends on speed."""

import json

import parity
import pytest
import torch
import transformers
import typer
from family_costs import COSTS, QUICK_SCALE, Scale, family_cases, scaled_config
from typer.testing import CliRunner

from anyvlm.composition.native import family_of


def test_widths_and_depths_are_multiplied():
    case = family_cases(["qwen2_vl"])["qwen2_vl"]
    small = case.config(case.ties[0])
    large = scaled_config(small, Scale(width=4, depth=3))
    assert large.text_config.hidden_size == 4 * small.text_config.hidden_size == large.vision_config.hidden_size
    assert large.text_config.num_hidden_layers == 3 * small.text_config.num_hidden_layers
    assert large.vision_config.depth == 3 * small.vision_config.depth
    assert len(large.text_config.layer_types) == large.text_config.num_hidden_layers
    assert large.text_config.vocab_size == small.text_config.vocab_size


@pytest.mark.parametrize("name", sorted(family_cases()))
def test_every_family_can_be_scaled(name):
    """Parts still fit one another: the model is built."""
    case = family_cases([name])[name]
    config = scaled_config(case.config(case.ties[0]), Scale(width=2, depth=2))
    with torch.device("meta"):
        model = getattr(transformers, family_of(config).model_class)(config)
        small = type(model)(case.config(case.ties[0]))
    assert sum(p.numel() for p in model.parameters()) > 3 * sum(p.numel() for p in small.parameters())


def test_report(tmp_path):
    app = typer.Typer()
    app.command()(parity.main)
    output = tmp_path / "families.json"
    result = CliRunner().invoke(app, ["--families", "--quick", "--family", "llava", "--output", str(output)])
    assert result.exit_code == 0, result.output
    assert "llava" in result.output
    report = json.loads(output.read_text())
    assert report["scale"]["width"] == QUICK_SCALE.width
    for lines in report["families"].values():
        assert [line["name"] for line in lines] == list(COSTS)
        assert all(line["pairs"] == 3 and line["ours"] > 0 and line["native"] > 0 for line in lines)


def test_unknown_family():
    app = typer.Typer()
    app.command()(parity.main)
    result = CliRunner().invoke(app, ["--families", "--family", "nothing"])
    assert result.exit_code == 2 and "No native family nothing" in " ".join(result.output.split())
