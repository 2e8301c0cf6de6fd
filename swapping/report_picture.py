"""The report of a swap as one picture."""

from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from .report import SwapReport


def draw_report(report: "SwapReport", path: str | Path) -> None:
    """Draw what was kept, solved and new to a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3))
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.barh([f"{part['name']} ({part['what']})" for part in report.parts], [p["parameters"] for p in report.parts])
    figure.savefig(path)
