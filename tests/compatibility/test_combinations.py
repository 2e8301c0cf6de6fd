"""The command that tries combinations, with checks that are made up, so quick."""

import json

import pytest
import typer
from typer.testing import CliRunner

from anyvlm.compatibility import combinations as command
from anyvlm.compatibility.combinations import combination_names, compose_arguments, draw_pairs
from anyvlm.compatibility.pair_checks import PairResult
from anyvlm.configuration.configuration_anyvlm import FUSIONS
from anyvlm.configuration.image_views import VIEWS
from anyvlm.modeling.projectors import PROJECTORS


TABLE = {
    "vision": {name: {"status": "refused" if name == "t9" else "works"} for name in (f"t{n}" for n in range(10))},
    "text": {f"l{n}": {"status": "works"} for n in range(5)},
}


@pytest.fixture
def invoke(monkeypatch, tmp_path):
    """Run the command on made-up pairs; returns the outcome and the folder of the table."""

    def made_up_check(vision, text, combination, seed):
        result = PairResult(vision, text, combination)
        if combination.startswith("resampler"):
            result.status, result.reason = "refused", "It has no grid."
        if combination == "mlp / gated / resize" and vision == "t1":
            result.status, result.reason, result.failed = "fails", "cache: other", {"cache": "other"}
        return result.to_dict()

    monkeypatch.setattr(command, "check_combination", made_up_check)
    # A process for each pair: some combinations will do.
    names = [f"{p} / {f} / resize" for p in ("resampler", "mlp") for f in ("embed", "gated")] + [
        "mlp / embed / slices"
    ]
    monkeypatch.setattr(command, "combination_names", lambda: names)
    (tmp_path / "compatibility.json").write_text(json.dumps(TABLE))
    app = typer.Typer()
    app.command()(command.main)

    def run(*arguments):
        paths = ["--output", str(tmp_path), "--journal", str(tmp_path / "journal.jsonl"), "--workers", "2"]
        return CliRunner().invoke(app, [*paths, *arguments]), tmp_path

    return run


def test_everything_there_is_is_combined():
    arguments = [compose_arguments(name) for name in combination_names()]

    def types(key):
        return {value if isinstance(value, str) else value["type"] for value in (each[key] for each in arguments)}

    # `identity` joins only parts of one width, which random parts never are.
    assert types("projector") == set(PROJECTORS) - {"identity"}
    assert types("fusion") == set(FUSIONS)
    assert types("views") == set(VIEWS)


def test_pairs_are_drawn_of_what_works():
    names = combination_names()
    drawn = draw_pairs(TABLE, names, 10, seed=0)
    assert len(set(drawn)) == 10 * len(names)
    assert not [pair for pair in drawn if pair[0] == "t9"]
    assert drawn == draw_pairs(TABLE, names, 10, seed=0)
    assert drawn != draw_pairs(TABLE, names, 10, seed=1)
    assert draw_pairs(TABLE, names[3:4], 10, seed=0) == drawn[30:40], "alone the same pairs as among others"


def test_the_command_writes_the_table(invoke):
    outcome, folder = invoke("--pairs", "20")
    assert outcome.exit_code == 1, "a pair fails"
    assert "100 pairs in 5 combinations: " in outcome.output
    table = json.loads((folder / "combinations.json").read_text())
    each = table["combinations"]
    assert len(each) == 5
    assert each["resampler / embed / resize"]["counts"] == {"works": 0, "refused": 20, "not tried": 0, "fails": 0}
    assert each["mlp / embed / resize"]["counts"] == {"works": 20, "refused": 0, "not tried": 0, "fails": 0}
    assert each["mlp / gated / resize"]["counts"]["fails"] >= 1
    text = (folder / "combinations.md").read_text()
    assert "refused: It has no grid." in text
    assert "20/20" in text
    assert "(mlp / gated / resize): fails" in outcome.output


def test_only_some(invoke):
    outcome, folder = invoke("--only", "mlp / embed / slices", "--pairs", "2")
    assert outcome.exit_code == 0
    assert outcome.output.count("(mlp / embed / slices): works") == 2
    assert not (folder / "combinations.json").exists()
    outcome, _ = invoke("--only", "perceiver")
    assert outcome.exit_code == 2
