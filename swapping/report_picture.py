"""The report of a swap as one picture: what became of the parts, how well they fit, and where image tokens are."""

import math
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..composition.compatibility_report import count


if TYPE_CHECKING:
    from .report import SwapReport


#: Of the Okabe-Ito palette, which most people can tell apart.
COLOURS = {
    "kept": "#009E73",
    "replaced": "#0072B2",
    "resized": "#CC79A7",
    "solved": "#56B4E9",
    "trained": "#E69F00",
    "initialised": "#D55E00",
}
_BEFORE, _AFTER, _TEXT, _GREY = "#0072B2", "#D55E00", "#999999", "#555555"
_MOST_PARTS = 12
_TARGETS = {"features": "the old tower's features", "tokens": "the old projected tokens"}


def draw_report(report: "SwapReport", path: str | Path) -> None:
    """Draw a report to a PNG file.

    Raises:
        ModuleNotFoundError: matplotlib is not installed; it is in the extra `demo`.
    """
    report_figure(report).savefig(path, dpi=110, format="png")


def report_figure(report: "SwapReport") -> Any:
    """The report as a matplotlib `Figure`. Without pictures there is no alignment to show, and its place says so."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # A figure of its own, without pyplot: the caller's figures and backend are left alone.
    figure = Figure(figsize=(15, 6), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.1)
    rows, columns = (2, 3) if report.distillation and report.distillation.get("losses") else (1, 3)
    grid = figure.add_gridspec(rows, columns, width_ratios=[1.15, 1, 1], wspace=0.03, hspace=0.05)
    _draw_parts(figure.add_subplot(grid[:, 0]), report.parts)
    _draw_alignment(figure.add_subplot(grid[:, 1]), report.alignment)
    _draw_gap(figure, grid[0, 2], report.modality_gap)
    if rows == 2:
        _draw_distillation(figure.add_subplot(grid[1, 2]), report.distillation)
    old, new = (_cut(name or "unknown", 50) for name in (report.old, report.new))
    figure.suptitle(f"Swapped: {old}  →  {new}{_tokens(report.tokens_per_picture)}", fontsize=12)
    return figure


def _tokens(tokens: dict[str, int] | None) -> str:
    if tokens is None:
        return ""
    before, after = tokens["before"], tokens["after"]
    return f"     ({after} tokens a picture{'' if before == after else f', before {before}'})"


def _draw_parts(axes: Any, parts: list[dict]) -> None:
    """A bar for each part, as long as the logarithm of its parameters, with its name above."""
    axes.set_title("Parts of the new model", loc="left", fontsize=11, fontweight="bold")
    shown = _shown(parts)
    lengths = [math.log10(max(part["parameters"], 1)) + 0.5 for part in shown]
    longest = max(lengths, default=1)
    for row, (part, length) in enumerate(zip(shown, lengths)):
        axes.barh(row, length, height=0.42, color=COLOURS[part["what"]])
        axes.text(0, row - 0.27, _shortened(part["name"], 48), va="bottom", fontsize=9)
        axes.text(
            length + 0.02 * longest,
            row,
            f"{count(part['parameters'])}  {part['what']}",
            va="center",
            fontsize=9,
            color=COLOURS[part["what"]],
            fontweight="bold",
        )
    # Room for the words to the right of the longest bar, and no bar thicker than a line of text where they are few.
    axes.set_xlim(0, longest * 1.5)
    axes.set_ylim(max(len(shown), 5) - 0.4, -0.75)
    axes.set_axis_off()
    totals = {what: sum(part["parameters"] for part in parts if part["what"] == what) for what in COLOURS}
    lines = [f"{count(number)} {what}" for what, number in totals.items() if number]
    axes.text(
        0, -0.01, textwrap.fill("in all: " + ", ".join(lines), 62), transform=axes.transAxes, va="top", fontsize=9
    )
    axes.text(
        1, 1.0, "length: log of parameters", transform=axes.transAxes, ha="right", va="bottom", fontsize=8, color=_GREY
    )


def _shown(parts: list[dict]) -> list[dict]:
    """The parts, the smallest of which are taken together by what became of them if there are many."""
    if len(parts) <= _MOST_PARTS:
        return parts
    ranks = sorted(range(len(parts)), key=lambda index: -parts[index]["parameters"])
    large = set(ranks[: _MOST_PARTS - len(COLOURS)])
    shown = [part for index, part in enumerate(parts) if index in large]
    for what in COLOURS:
        rest = [part for index, part in enumerate(parts) if index not in large and part["what"] == what]
        if rest:
            parameters = sum(part["parameters"] for part in rest)
            shown.append({"name": f"{len(rest)} further parts", "what": what, "parameters": parameters})
    return shown


def _cut(words: str, width: int) -> str:
    return words if len(words) <= width else f"{words[: width - 1].rstrip()}…"


def _shortened(name: str, width: int) -> str:
    return name if len(name) <= width else f"…{name[-(width - 1) :].lstrip('.')}"


def _draw_alignment(axes: Any, alignment: dict | None) -> None:
    axes.set_title("Explained variance on held-out pictures", loc="left", fontsize=11, fontweight="bold")
    if alignment is None:
        _say(axes, "No pictures were given,\nso nothing was solved for.\n\nimages=… (unlabelled) aligns old and new.")
        return
    candidates = [entry for entry in alignment.get("candidates") or [] if entry.get("explained_variance") is not None]
    explained = alignment.get("explained_variance")
    if not candidates and explained is None:
        _say(axes, "not measured")
        return
    values = [entry["explained_variance"] for entry in candidates] + ([] if explained is None else [explained])
    # A candidate may be worse than the mean by any amount; how much worse does not matter, so it stands at the edge.
    lowest = max(min(*values, 0.0, 1.0), -0.25)
    positive = [entry for entry in candidates if (entry.get("regularisation") or 0) > 0]
    curves: dict[str, list] = {}
    for entry in positive:
        curves.setdefault(_way(entry), []).append((entry["regularisation"], max(entry["explained_variance"], lowest)))
    if candidates and len(curves) in (0, len(positive)):
        _draw_ways(axes, candidates, alignment, lowest)
        return
    for (way, points), marker, style in zip(curves.items(), "os^Dvp", ("-", "--", ":", "-.", "-", "--")):
        axes.plot(*zip(*sorted(points)), marker=marker, linestyle=style, markersize=4.5, label=way)
    chosen = alignment.get("regularisation")
    if explained is not None:
        label = f"chosen: {100 * explained:.1f} %"
        if chosen and positive:
            place = [chosen], [max(explained, lowest)]
            axes.plot(*place, "*", markersize=17, color=_AFTER, markeredgecolor="white", label=label)
        else:
            axes.axhline(explained, color=_AFTER, label=label)
    if positive:
        axes.set_xscale("log")
    axes.set_ylim(lowest - 0.05, 1.05)
    axes.axhline(0, color=_GREY, linewidth=0.8)
    axes.set_xlabel("regularisation")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8.5, title=f"{_pictures(alignment)}; fitted to:", title_fontsize=8.5)


def _draw_ways(axes: Any, candidates: list[dict], alignment: dict, lowest: float) -> None:
    """A bar for each way that was tried, where each has one regularisation."""
    ways = sorted(candidates, key=lambda entry: -entry["explained_variance"])[:_MOST_PARTS]
    for row, entry in enumerate(ways):
        explained = entry["explained_variance"]
        chosen = explained == alignment.get("explained_variance")
        colour = _AFTER if chosen else _BEFORE
        axes.barh(row, max(explained, lowest), height=0.35, color=colour)
        regularisation = entry.get("regularisation")
        axes.text(0.01, row - 0.23, _cut(_way(entry), 58), va="bottom", fontsize=9)
        number = f"{100 * explained:.1f} %{'  chosen' if chosen else ''}"
        number += "" if regularisation is None else f"  (λ {regularisation:.3g})"
        # Beside the bar, or in it where there is no room.
        inside = explained > 0.7
        place = {"ha": "right", "color": "white"} if inside else {"ha": "left", "color": colour}
        axes.text(max(explained, 0) + (-0.02 if inside else 0.02), row, number, va="center", fontsize=9, **place)
    axes.set_ylim(max(len(ways), 4) - 0.4, -0.8)
    axes.set_xlim(lowest, 1)
    axes.axvline(0, color=_GREY, linewidth=0.8)
    axes.set_yticks([])
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.set_xlabel(f"{_pictures(alignment)}; λ: regularisation")


def _way(entry: dict) -> str:
    """What was fitted, to what, and how."""
    drawn_to = entry.get("drawn_to")
    return f"to {_TARGETS.get(entry.get('target'), entry.get('target'))}" + (
        f", drawn to {drawn_to}" if drawn_to else ""
    )


def _pictures(alignment: dict) -> str:
    return f"{alignment.get('pictures', 'no')} pictures, {alignment.get('held_out_pictures', 'none')} held out"


def _draw_gap(figure: Any, place: Any, gap: dict | None) -> None:
    """Tokens in two dimensions: before and after together among the same text embeddings, else side by side."""
    title = {"label": "Image tokens among text embeddings", "loc": "left", "fontsize": 11, "fontweight": "bold"}
    points = (gap or {}).get("points")
    if not gap or not points:
        axes = figure.add_subplot(place)
        axes.set_title(**title)
        numbers = [
            f"{when}: distance {gap[when]['distance']:.2f}" for when in ("before", "after") if (gap or {}).get(when)
        ]
        _say(axes, "\n".join(numbers) or "not measured")
        return
    same_text = points["before"]["text"] == points["after"]["text"]
    panels = [figure.add_subplot(cell) for cell in place.subgridspec(1, 1 if same_text else 2)]
    panels[0].set_title(**title)
    for index, (when, colour, marker) in enumerate((("before", _BEFORE, "o"), ("after", _AFTER, "^"))):
        axes = panels[0 if same_text else index]
        if index == 0 or not same_text:
            axes.scatter(*_columns(points[when]["text"]), s=14, marker=".", color=_TEXT, alpha=0.6, label="text")
        label = f"image, {when}: gap {gap[when]['distance']:.2f}, RMS ×{gap[when]['rms_ratio']:.2f}"
        image = _columns(points[when]["image"])
        axes.scatter(*image, s=22, marker=marker, color=colour, alpha=0.65, linewidths=0, label=label)
    for axes in panels:
        axes.set_xticks([])
        axes.set_yticks([])
    if same_text:
        panels[0].legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 0), frameon=False, handletextpad=0.2)
    else:
        for axes, when in zip(panels, ("before", "after")):
            numbers = f"gap {gap[when]['distance']:.2f}, RMS ×{gap[when]['rms_ratio']:.2f}"
            axes.set_xlabel(f"image tokens {when}:\n{numbers}\n(grey: text)", fontsize=8.5)


def _columns(points: list) -> tuple[list, list]:
    return [point[0] for point in points], [point[1] for point in points]


def _draw_distillation(axes: Any, distillation: dict) -> None:
    axes.set_title("Distillation, without labels", loc="left", fontsize=11, fontweight="bold")
    losses = [(step, value) for step, value in distillation["losses"] if value is not None]
    axes.plot(*zip(*losses), color=_AFTER, linewidth=1.5)
    if min(value for _, value in losses) > 0:
        axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.3)
    agreement = distillation.get("agreement") or {}
    if agreement.get("after") is not None:
        before = "" if agreement.get("before") is None else f"{100 * agreement['before']:.0f} % → "
        text = f"agreement with the old model: {before}{100 * agreement['after']:.0f} %"
        axes.text(0.98, 0.94, text, transform=axes.transAxes, ha="right", va="top", fontsize=8.5)


def _say(axes: Any, text: str) -> None:
    """Words in the place of a drawing."""
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", fontsize=10, color=_GREY)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color("#DDDDDD")
