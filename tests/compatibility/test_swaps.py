"""The command that tries swaps, with checks that are made up, so quick; and the checks on a few swaps."""

import ast
import json

import pytest
import torch
import typer
from typer.testing import CliRunner

from anyvlm.compatibility import swap_checks
from anyvlm.compatibility import swaps as command
from anyvlm.compatibility.journal import ROOT
from anyvlm.compatibility.pair_checks import PairResult
from anyvlm.compatibility.swap_checks import check_swap, joined_models
from anyvlm.compatibility.swap_table import swaps_to_markdown
from anyvlm.compatibility.swaps import SWAP_CODE, draw_swaps


TABLE = {
    "vision": {name: {"status": "refused" if name == "t9" else "works"} for name in (f"t{n}" for n in range(10))},
    "text": {f"l{n}": {"status": "works"} for n in range(5)},
}
USUAL = "mlp / embed / resize"
#: Parts of the command that measure nothing.
WRITERS = ("journal", "plan", "progress", "table", "combination_table")


@pytest.fixture
def invoke(monkeypatch, tmp_path):
    """Run the command on made-up types; returns the outcome and the folder of the table."""

    def made_up_check(vision, text, combination, seed, fresh):
        result = PairResult(vision, text, combination)
        new, join = combination.split(" / ", 1)
        result.details = {"join": join, "tokens": [4, 4], "projector": "kept", "fresh": fresh}
        if new == "t1":
            result.status, result.reason = "refused", 'Pass views="resize".'
            result.details = {"join": join, "works_with": {"views": "resize"}}
        if vision == "t2" and new == "t3":
            result.status, result.reason, result.failed = "fails", "old: other", {"old": "other"}
        return result.to_dict() | {"seconds": 0.0}

    class MadeUp:
        def __init__(self, *arguments):
            self.arguments = arguments

        def to_dict(self):
            return made_up_check(*self.arguments)

    monkeypatch.setattr(command, "check_swap", MadeUp)
    (tmp_path / "compatibility.json").write_text(json.dumps(TABLE))
    app = typer.Typer()
    app.command()(command.main)

    def run(*arguments):
        paths = ["--output", str(tmp_path), "--journal", str(tmp_path / "journal.jsonl"), "--workers", "2"]
        return CliRunner().invoke(app, [*paths, *arguments]), tmp_path

    return run


def test_swaps_are_drawn_of_what_works():
    drawn = draw_swaps(TABLE, 60, seed=0)
    pairs = [(old, combination.split(" / ")[0]) for old, _, combination in drawn]
    assert len(set(pairs)) == 60
    assert not [pair for pair in pairs if "t9" in pair or pair[0] == pair[1]]
    joins = [combination.split(" / ", 1)[1] for _, _, combination in drawn]
    assert set(joins[::2]) == {USUAL}
    assert set(joins) <= set(joined_models())
    assert len(set(joins[1::2])) > 20
    assert drawn == draw_swaps(TABLE, 60, seed=0)
    assert drawn != draw_swaps(TABLE, 60, seed=1)


def test_the_command_writes_the_table(invoke):
    outcome, folder = invoke("--pairs", "72")
    assert outcome.exit_code == 1, "a swap fails"
    table = json.loads((folder / "swaps.json").read_text())
    assert table["counts"] == {"works": 63, "refused": 8, "not tried": 0, "fails": 1}
    assert sum(row.get("fresh", False) for row in table["swaps"]) in (2, 3)
    text = (folder / "swaps.md").read_text()
    assert text == swaps_to_markdown(table)
    assert "**63 work, 8 are refused**" in text
    assert "| refused: Pass views=\"resize\". | `views='resize'` | 8 |" in text
    assert "t2 + l" in outcome.output and "fails" in outcome.output


def test_only_some(invoke):
    outcome, folder = invoke("--only", "t1", "--pairs", "72")
    assert outcome.exit_code == 0
    assert outcome.output.count("refused") >= 8
    assert not (folder / "swaps.json").exists()
    outcome, _ = invoke("--only", "t9")
    assert outcome.exit_code == 2


def test_the_hash_is_of_all_that_measures():
    """What the checks of a swap import from their own folder, and what that imports."""
    found, remaining = set(), ["swap_checks"]
    while remaining:
        name = remaining.pop()
        found.add(name)
        tree = ast.parse((ROOT / "compatibility" / f"{name}.py").read_text(encoding="utf-8"))
        imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 1]
        names = {node.module or alias.name for node in imports for alias in node.names}
        remaining += names - found - set(remaining) - {*WRITERS}
    assert {f"compatibility/{name}.py" for name in found} <= set(SWAP_CODE)
    assert {"swapping", "modeling", "composition"} <= set(SWAP_CODE)


def test_a_swap_that_works():
    result = check_swap("clip_vision_model", "llama", f"resnet / {USUAL}")
    assert result.status == "works", result.failed
    assert result.details["tokens"] == [16, 16]
    assert result.details["projector"] == "first layer new"
    result = check_swap("resnet", "gpt2", "dinov2 / resampler / cross_attention / tiles (anyres)")
    assert result.status == "works", result.failed
    assert result.details["projector"] == "kept"


def test_a_refused_swap_names_what_works():
    result = check_swap("siglip2_vision_model", "llama", "hiera / mlp / embed / native")
    assert result.status == "refused"
    assert result.details["works_with"] == {"views": "resize"}
    assert 'views="' in result.reason
    # Whole pictures, and then a projector that does not look at neighbours.
    result = check_swap("siglip2_vision_model", "llama", "detr / conv / embed / native")
    assert result.status == "refused", result.failed
    assert result.details["works_with"] == {"views": "resize", "projector": {"type": "mlp"}}


def test_what_goes_astray_is_seen(monkeypatch):
    """Each check fails where what it is about is broken."""
    right = swap_checks.swap_vision_tower

    def broken(model, processor, *arguments, **keywords):
        swapped, new_processor = right(model, processor, *arguments, **keywords)
        with torch.no_grad():
            model.language_model.get_output_embeddings().weight.mul_(1.5)
            swapped.multi_modal_projector.output_layer.bias.add_(0.1)
        new_processor.vision_tower_spec = {**new_processor.vision_tower_spec, "grid": [3, 4]}
        return swapped, new_processor

    monkeypatch.setattr(swap_checks, "swap_vision_tower", broken)
    result = check_swap("clip_vision_model", "llama", f"dinov2 / {USUAL}")
    assert result.status == "fails"
    assert {"kept", "tokens", "text", "old"} <= result.failed.keys()
