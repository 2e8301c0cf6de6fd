"""What came out of a run: a table for people, JSON for programs, a picture of the losses."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from .run_folder import write_json


@dataclass
class StageResult:
    """What came out of one stage.

    Args:
        name: Its folder, such as `1-projector`.
        steps: Optimizer steps.
        seconds: Of training, over all runs if it was interrupted.
        trained_parameters: How many numbers were trained.
        losses: Name -> `{"first", "last"}` as logged: means over the first and the last few steps.
        eval_loss: On held-out samples after the stage.
        text_perplexity: `{"before", "after"}`, on held-out text.
        warnings: Sentences.
        history: The trainer's log.
    """

    name: str
    steps: int
    seconds: float
    trained_parameters: int
    losses: dict[str, dict[str, float]] = field(default_factory=dict)
    eval_loss: float | None = None
    text_perplexity: dict[str, float] | None = None
    warnings: list[str] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)


def losses_of(history: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """First and last of each loss in a trainer's log."""
    found: dict[str, dict[str, float]] = {}
    for entry in history:
        for key, value in entry.items():
            if key == "loss" or key.startswith("loss/"):
                found.setdefault(key.removeprefix("loss/"), {"first": value})["last"] = value
    return found


_COLUMNS = ("stage", "steps", "seconds", "trained", "measured", "first → last")


def table_of(results: list[StageResult]) -> Table:
    """For people: a row for each thing that was measured in each stage."""
    table = Table(title="What was trained")
    for column in _COLUMNS:
        table.add_column(column, justify="right" if column in _COLUMNS[1:4] else "left")
    for result in results:
        for row in _rows(result):
            table.add_row(*row)
        table.add_section()
    return table


def write_summary(folder: Path, results: list[StageResult], recipe: dict[str, Any]) -> None:
    """`summary.md`, `summary.png` where matplotlib is installed, and last `summary.json`."""
    lines = ["# What was trained", "", _markdown(_COLUMNS), _markdown(["---"] * len(_COLUMNS))]
    lines += [_markdown(row) for result in results for row in _rows(result)]
    warnings = [f"- {result.name}: {warning}" for result in results for warning in result.warnings]
    if warnings:
        lines += ["", "## Warnings", "", *warnings]
    (folder / "summary.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    _draw(folder / "summary.png", results)
    write_json(folder / "summary.json", {"stages": [asdict(result) for result in results], "recipe": recipe})


def _rows(result: StageResult) -> list[tuple[str, ...]]:
    measured = [
        ("loss" if name == "loss" else f"loss, {name}", f"{loss['first']:.3f} → {loss['last']:.3f}")
        for name, loss in result.losses.items()
    ]
    if result.eval_loss is not None:
        measured.append(("loss, held out", f"{result.eval_loss:.3f}"))
    if result.text_perplexity is not None:
        before, after = result.text_perplexity["before"], result.text_perplexity["after"]
        measured.append(("text perplexity", f"{before:.2f} → {after:.2f} ({after / before - 1:+.1%})"))
    of_stage = (result.name, f"{result.steps:,}", f"{result.seconds:,.0f}", f"{result.trained_parameters:,}")
    rows = [("",) * len(of_stage) + pair for pair in measured or [("", "")]]
    return [of_stage + rows[0][len(of_stage) :], *rows[1:]]


def _markdown(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"


def _draw(path: Path, results: list[StageResult]) -> None:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    curves: dict[str, tuple[list[float], list[float]]] = {}
    begin = 0
    for result in results:
        for entry in result.history:
            for key, value in entry.items():
                if key == "loss" or key.startswith("loss/") or key == "eval_loss":
                    steps, values = curves.setdefault(key, ([], []))
                    steps.append(begin + entry["step"])
                    values.append(value)
        begin += result.steps
        axes.axvline(begin, color="0.8", linewidth=1)
        axes.text(begin - result.steps / 2, 1.01, result.name, transform=axes.get_xaxis_transform(), ha="center")
    for name, (steps, values) in curves.items():
        axes.plot(steps, values, label=name, marker="o" if name == "eval_loss" else None)
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel("loss")
    axes.set_xlim(0, max(begin, 1))
    if curves:
        axes.legend()
    figure.savefig(path, dpi=120)
