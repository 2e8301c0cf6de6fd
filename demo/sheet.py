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
        figure = Figure(figsize=(16, 1 + 2.0 * len(kinds)))
        figure.suptitle(title, x=0.02, y=0.975, ha="left", fontsize=15, fontweight="bold")
        subtitle = f"Held-out pictures: the first {PER_KIND} questions of each kind, right (green) or wrong (red)"
        figure.text(0.02, 0.915, subtitle, color=FAINT, fontsize=10.5)
        sheet = figure.add_gridspec(len(kinds), PER_KIND, left=0.02, right=0.66, bottom=0.06, top=0.87, hspace=0.75)
        for row, kind in enumerate(kinds):
            of_kind = [(question, answer) for question, answer in zip(questions, answers) if question.kind == kind]
            for column, (question, answer) in enumerate(of_kind[:PER_KIND]):
                _draw_question(figure.add_subplot(sheet[row, column]), question, answer)
        charts = figure.add_gridspec(2, 1, left=0.745, right=0.985, bottom=0.1, top=0.89, hspace=0.32)
        loss_axis, score_axis = (figure.add_subplot(cell) for cell in charts)
        _draw_losses(loss_axis, losses)
        _draw_scores(score_axis, scores)
        figure.savefig(path, dpi=110, format="png")


def _draw_question(axis, question: Question, answer: str) -> None:
    colour = RIGHT if answer == question.answer else WRONG
    # Enlarged without smoothing, as the model is given them.
    picture = question.picture.resize(
        (question.picture.width * 4, question.picture.height * 4), Image.Resampling.NEAREST
    )
    axis.imshow(picture)
    width, height = picture.size
    edge = matplotlib.patches.Rectangle(
        (0, 0), width, height, fill=False, edgecolor=colour, linewidth=2, clip_on=False
    )
    axis.add_patch(edge)
    axis.set_axis_off()
    axis.set_title(question.text, fontsize=9, pad=6)
    shown = " ".join(answer.split())
    shown = shown if len(shown) <= 16 else shown[:15] + "…"
    below = {"ha": "center", "va": "top", "xycoords": "axes fraction", "textcoords": "offset points"}
    below["parse_math"] = False  # a model may well answer with dollar signs
    text = f"answer: {shown or '(nothing)'}"
    axis.annotate(text, (0.5, 0), (0, -5), color=colour, fontsize=11, fontweight="bold", **below)
    axis.annotate(f"truth: {question.answer}", (0.5, 0), (0, -21), color=FAINT, fontsize=10, **below)


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
        ("own picture", EXACT_COLOUR, [entry.exact for entry in scores]),
        ("shuffled picture", SHUFFLED_COLOUR, [entry.shuffled for entry in scores]),
        ("chance (most common answer)", CHANCE_COLOUR, [entry.chance for entry in scores]),
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
