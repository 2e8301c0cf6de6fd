"""The table of native families: complete, without a difference, and written whole or not at all."""

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from anyvlm.compatibility import architectures
from anyvlm.compatibility.native_cases import native_cases
from anyvlm.compatibility.native_checks import KINDS, CaseResult
from anyvlm.composition.native import native_families


DOCS = Path(architectures.__file__).parent.parent / "docs"


def test_the_committed_table_has_every_case_and_nothing_differs():
    table = json.loads((DOCS / "architectures.json").read_text())
    assert [case["name"] for case in table["cases"]] == [case.name for case in native_cases()]
    assert {case["class"] for case in table["cases"]} == {family.model_class for family in native_families()}
    for case in table["cases"]:
        assert case["problems"] == [] and case["greedy"] and case["processor"] and case["to_native"], case["name"]
        assert max(value for value in case["differences"].values() if value is not None) <= table["tolerance"]
    text = (DOCS / "architectures.md").read_text()
    assert all(line in text for line in architectures._lines(table))


def test_only_the_table_of_a_document_is_replaced(tmp_path):
    found = CaseResult(
        "some family", "SomeClass", dict.fromkeys(KINDS, 0.0), greedy=False, problems=["greedy differs"]
    )
    document = tmp_path / architectures.MARKDOWN_NAME
    document.write_text(f"# By hand\n\n{architectures._BEGIN}\nold\n{architectures._END}\n\nAlso by hand.\n")
    for _ in range(2):
        architectures.write_table(architectures.make_table([("a note", found)]), tmp_path)
    text = document.read_text()
    assert text.startswith("# By hand\n") and text.endswith("\nAlso by hand.\n") and "\nold\n" not in text
    assert "| some family (a note) | `SomeClass` | 0 | 0 | 0 | 0 | **no** | yes | yes |" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["architectures.json", "architectures.md"]
    document.write_text("# Without marks\n")
    with pytest.raises(ValueError, match="has not the lines"):
        architectures.write_table(architectures.make_table([]), tmp_path)


def test_one_family_can_be_looked_at_without_writing(tmp_path):
    app = typer.Typer()
    app.command()(architectures.main)
    result = CliRunner().invoke(app, ["--only", "vipllava, one layer", "--output", str(tmp_path)])
    assert result.exit_code == 0 and "VipLlavaForConditionalGeneration" in result.output
    assert list(tmp_path.iterdir()) == []
    assert CliRunner().invoke(app, ["--only", "no such family"]).exit_code == 2
