"""The picture of a swap: every part by name, no words over words, with and without pictures."""

import itertools

import pytest
import torch
from matplotlib.text import Text
from test_report import a_report

from anyvlm.swapping.modality_gap import modality_gap_change
from anyvlm.swapping.report import CHANGES
from anyvlm.swapping.report_picture import COLOURS, report_figure


def tokens(number, width, offset):
    return torch.randn(number, width) + offset


def gap(after_width):
    text = tokens(60, 8, 0)
    after = (tokens(40, 8, 2), text) if after_width == 8 else (tokens(40, after_width, 2), tokens(60, after_width, 0))
    return modality_gap_change((tokens(40, 8, 1), text), after)


def many_parts():
    return [
        {
            "name": f"multi_modal_projector.layers.{i}.with.a.long.name",
            "what": what,
            "parameters": 10 ** (i % 7),
            "note": "",
        }
        for i, what in zip(range(30), itertools.cycle(CHANGES))
    ]


def two_ways(best=0.37):
    """As `align` gives them."""
    ways = [
        ("features", "zero", 0.01, 0.086),
        ("tokens", "the last layer", 0.032, best),
        ("tokens", "zero", 1e-6, -8.0),
    ]
    keys = ("target", "drawn_to", "regularisation", "explained_variance")
    return {
        "pictures": 60,
        "held_out_pictures": 12,
        "explained_variance": best,
        "candidates": [dict(zip(keys, way)) for way in ways],
    }


CASES = {
    "all": lambda: a_report(modality_gap=gap(8)),
    "no pictures": lambda: a_report(alignment=None, distillation=None),
    "another language model": lambda: a_report(
        swapped="text", modality_gap=gap(12), distillation=None, alignment=None
    ),
    "distilled into another": lambda: a_report(swapped="text", modality_gap=gap(12)),
    "many parts": lambda: a_report(parts=many_parts()),
    "one candidate, very bad": lambda: a_report(alignment={"explained_variance": -9.0, "regularisation": 0.1}),
    "one regularisation for each way": lambda: a_report(alignment=two_ways()),
    "two good ways": lambda: a_report(alignment=two_ways(0.99)),
    "long names": lambda: a_report(old="Old" * 60, new="New " * 60, distillation=None),
}


def drawn(report):
    figure = report_figure(report)
    figure.canvas.draw()
    # Labels of ticks are matplotlib's own affair; some exist that are not drawn.
    axis = [which for axes in figure.axes for which in (axes.xaxis, axes.yaxis)]
    ticks = {text for which in axis for text in which.findobj(Text) if text is not which.label}
    texts = [artist for artist in figure.findobj(Text) if artist.get_visible() and artist not in ticks]
    return figure, [text for text in texts if text.get_text().strip()]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_words_are_inside_and_apart(case):
    figure, texts = drawn(case())
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts]
    width, height = figure.bbox.width, figure.bbox.height
    for words, box in boxes:
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height, f"{words!r} leaves the picture"
    for (words, box), (other, other_box) in itertools.combinations(boxes, 2):
        apart = min(box.x1, other_box.x1) - max(box.x0, other_box.x0) < 2
        apart |= min(box.y1, other_box.y1) - max(box.y0, other_box.y0) < 2
        assert apart, f"{words!r} over {other!r}"


def test_it_names_every_part_and_what_became_of_it():
    report = a_report()
    words = " ".join(text.get_text() for text in drawn(report)[1])
    for part in report.parts:
        assert part["name"] in words and part["what"] in words
    for figure in ("71.3 %", "20 held out", "71 % → 93 %", "16 tokens"):
        assert figure in words


def test_many_parts_are_taken_together_and_none_is_lost():
    words = " ".join(text.get_text() for text in drawn(a_report(parts=many_parts()))[1])
    assert words.count("further parts") == len(CHANGES)


def test_without_pictures_it_says_so():
    words = " ".join(text.get_text() for text in drawn(a_report(alignment=None))[1])
    assert "No pictures were given" in words


def test_the_way_that_was_chosen_is_marked_among_those_tried():
    words = [text.get_text() for text in drawn(a_report(alignment=two_ways()))[1]]
    assert {"37.0 %  chosen  (λ 0.032)", "8.6 %  (λ 0.01)", "-800.0 %  (λ 1e-06)"} <= set(words)
    assert any(word.startswith("to the old tower's features, drawn to zero") for word in words)


def test_every_change_has_a_colour_of_its_own():
    assert COLOURS.keys() == CHANGES.keys() and len(set(COLOURS.values())) == len(CHANGES)
