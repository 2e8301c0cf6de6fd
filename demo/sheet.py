"""One picture of the run: held-out pictures with question, answer and truth; the loss; the scores."""

import os
from collections.abc import Sequence

import matplotlib
from matplotlib.figure import Figure
from PIL import Image

from .data import Question
from .scores import Score


RIGHT, WRONG, FAINT = "#1a7f37", "#c1121f", "#6b7280"
EXACT_COLOUR, SHUFFLED_COLOUR, CHANCE_COLOUR = "#1d4ed8", "#f59e0b", "#9ca3af"
#: Held-out questions shown of each kind.
PER_KIND = 5


def draw_sheet(
    path: str | os.PathLike,
    questions: Sequence[Question],
    answers: Sequence[str],
    scores: Sequence[Score],
    losses: Sequence[tuple[int, float]],
    title: str,
) -> None:
    """Write the sheet as a PNG file.

    Args:
        questions: Held-out questions; the first `PER_KIND` of each kind are shown, right or wrong.
        answers: The model's answer to each.
        scores: As `score` gives them.
        losses: `(step, loss)` of the training.
        title: One line above it all.
    """
    kinds = list(dict.fromkeys(question.kind for question in questions))
    with matplotlib.rc_context({"font.family": "DejaVu Sans", "font.size": 9}):
        figure = Figure(figsize=(15, 1.2 + 1.75 * len(kinds)), layout="constrained")
        figure.suptitle(title, fontsize=13, fontweight="bold")
        sheet, charts = figure.subfigures(1, 2, width_ratios=(PER_KIND * 1.9, 5), wspace=0.03)
        axes = sheet.subplots(len(kinds), PER_KIND, squeeze=False)
        for row, kind in zip(axes, kinds):
            of_kind = [(question, answer) for question, answer in zip(questions, answers) if question.kind == kind]
            for place, axis in enumerate(row):
                axis.set_axis_off()
                if place < len(of_kind):
                    _draw_question(axis, *of_kind[place])
        sheet.suptitle("Held-out pictures: the first of each kind, right or wrong", fontsize=10, color=FAINT)
        loss_axis, score_axis = charts.subplots(2, 1, height_ratios=(1, 1.15))
        _draw_losses(loss_axis, losses)
        _draw_scores(score_axis, scores)
        figure.savefig(path, dpi=110, format="png")


def _draw_question(axis, question: Question, answer: str) -> None:
    right = answer == question.answer
    colour = RIGHT if right else WRONG
    # Enlarged without smoothing, as the model is given them.
    picture = question.picture.resize(
        (question.picture.width * 4, question.picture.height * 4), Image.Resampling.NEAREST
    )
    axis.imshow(picture)
    width, height = picture.size
    frame = matplotlib.patches.Rectangle((0, 0), width, height, fill=False, edgecolor=colour, linewidth=2)
    axis.add_patch(frame)
    axis.set_title(question.text, fontsize=8.5, pad=4)
    shown = answer if len(answer) <= 24 else answer[:23] + "…"
    text = f"answer {shown or '(nothing)'}" + (" ✓" if right else f"   truth {question.answer} ✗")
    axis.text(width / 2, height + 6, text, ha="center", va="top", color=colour, fontsize=10, fontweight="bold")


def _draw_losses(axis, losses: Sequence[tuple[int, float]]) -> None:
    axis.plot(*zip(*losses), color=EXACT_COLOUR, linewidth=1.6)
    axis.set(title="Training loss", xlabel="step", yscale="log")
    axis.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    axis.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def _draw_scores(axis, scores: Sequence[Score]) -> None:
    thickness = 0.27
    bars = (
        ("with the picture", EXACT_COLOUR, [entry.exact for entry in scores]),
        ("pictures shuffled", SHUFFLED_COLOUR, [entry.shuffled for entry in scores]),
        ("chance: most common answer", CHANCE_COLOUR, [entry.chance for entry in scores]),
    )
    for place, (label, colour, shares) in enumerate(bars):
        positions = [row + (place - 1) * thickness for row in range(len(scores))]
        drawn = axis.barh(positions, [100 * share for share in shares], thickness, color=colour, label=label)
        axis.bar_label(drawn, fmt="%.0f", padding=2, fontsize=8, color=FAINT)
    axis.set_yticks(range(len(scores)), [entry.kind for entry in scores])
    axis.invert_yaxis()
    axis.set(title="Exact answers, held out (%)", xlim=(0, 108))
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(loc="upper center", bbox_to_anchor=(0.45, -0.1), ncols=3, frameon=False, fontsize=8, columnspacing=1)
