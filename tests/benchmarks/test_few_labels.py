"""The benchmarks of few labels and of forgetting run, and write their figures and tables."""

import json

import few_labels
import forgetting
import pytest
from typer.testing import CliRunner


def run(script, folder, *arguments) -> dict:
    cli = script.typer.Typer()
    cli.command()(script.main)
    page = folder / "page.md"
    page.write_text(f"before\n{script.BEGIN}\nold\n{script.END}\nafter\n")
    result = CliRunner().invoke(
        cli, ["--quick", "--output", str(folder / "found.json"), "--docs", str(page), *arguments]
    )
    assert result.exit_code == 0, result.output
    assert page.read_text().startswith("before") and "after" in page.read_text() and "old" not in page.read_text()
    return json.loads((folder / "found.json").read_text())


def test_few_labels(tmp_path):
    found = run(few_labels, tmp_path, "--seeds", "1")
    assert [result["arm"] for result in found["results"]] == ["labels", "semi_supervised"]
    assert "unlabelled/confidence" in found["results"][1]["log"][-1]
    assert "| gain, points | +0.0 |" in (tmp_path / "page.md").read_text()


def test_forgetting(tmp_path):
    found = run(forgetting, tmp_path, "--seeds", "2", "--arms", "plain,kl")
    assert [(result["arm"], result["seed"]) for result in found["results"]] == [
        ("plain", 0),
        ("kl", 0),
        ("plain", 1),
        ("kl", 1),
    ]
    for result in found["results"]:
        assert result["change"] == pytest.approx(result["after"] / result["before"] - 1)
    assert "| plain tuning | mean |" in (tmp_path / "page.md").read_text()


def test_models_are_asked_for(tmp_path):
    cli = few_labels.typer.Typer()
    cli.command()(few_labels.main)
    result = CliRunner().invoke(cli, ["--output", str(tmp_path / "found.json")])
    assert result.exit_code == 2 and "--models" in result.output
