"""What a swap did to a model, as fields, as JSON, as text and as one picture."""

import json
import math
import os
import tempfile
import warnings
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..composition.compatibility_report import count


#: What can happen to a part, and what that means.
CHANGES = {
    "kept": "the tensors are those of the old model, bit for bit",
    "replaced": "another part, with weights of its own",
    "resized": "the old tensor, interpolated or resampled for another size",
    "solved": "computed in closed form from unlabelled pictures",
    "trained": "changed by gradient steps",
    "initialised": "new, and not yet fitted to anything",
}

JSON_NAME = "swap_report.json"
TEXT_NAME = "swap_report.txt"
PICTURE_NAME = "swap_report.png"
RECIPE_NAME = "swap_recipe.yaml"

NO_MATPLOTLIB = "not drawn, as matplotlib is not installed; pip install 'anyvlm[demo]'"


@dataclass
class SwapReport:
    """What was swapped, what that cost and kept, and what to train next. Every field is of JSON's types.

    Args:
        swapped: Which part: `"vision"`, `"text"` or `"audio"`.
        old: What was taken out, in words: a class, and where it came from if that is known.
        new: What was put in, likewise.
        parts: Every part of the new model: `{"name", "what", "parameters", "note"}`, with `what` one of `CHANGES`.
            `part_changes.compare_parts` makes them by comparing tensors.
        tokens_per_picture: `{"before", "after"}`: image tokens of a picture of the size that the model was made for.
        alignment: `None` without pictures. `{"pictures", "held_out_pictures", "target" ("features" | "tokens"),
            "explained_variance", "regularisation", "candidates": [{"target", "regularisation", "explained_variance"}],
            "seconds"}`; explained variance is on held-out pictures, 1 is perfect.
        layers: Layers of the new tower that were tried on the pictures: `[{"layer", "explained_variance"}, …]`, `None` for
            the last; the best one is read.
        modality_gap: `{"before", "after"}`, each `{"distance", "rms_ratio"}` (`modality_gap.modality_gap`), and for
            the picture `"points"`: `{"before", "after"}`, each `{"image": [[x, y], …], "text": [[x, y], …]}`.
        distillation: `None` without. `{"steps", "seconds", "losses": [[step, value], …], "agreement": {"before",
            "after"}}`; agreement is on held-out pictures, 1 is perfect.
        next_steps: Stages to train, in order; the recipe's.
        warnings: What the user should know before relying on the model.
        recipe: What `recipe.recipe_after` gave: the stages with data and output, ready to be written.
        seconds: How long the swap took.

    Raises:
        ValueError: a part whose `what` is unknown.
    """

    swapped: str
    old: str | None = None
    new: str | None = None
    parts: list[dict[str, Any]] = field(default_factory=list)
    tokens_per_picture: dict[str, int] | None = None
    alignment: dict[str, Any] | None = None
    layers: list[dict[str, Any]] | None = None
    modality_gap: dict[str, Any] | None = None
    distillation: dict[str, Any] | None = None
    next_steps: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    recipe: dict[str, Any] | None = None
    seconds: float = 0.0

    def __post_init__(self):
        for part in self.parts:
            if part.get("what") not in CHANGES:
                raise ValueError(
                    f"{part.get('name')} is said to be {part.get('what')!r}. Say one of: {', '.join(CHANGES)}."
                )

    def parameters(self, what: str) -> int:
        """Parameters of all parts that were `what`: `"kept"`, `"replaced"`, `"solved"`, `"trained"`, `"initialised"`."""
        return sum(part["parameters"] for part in self.parts if part["what"] == what)

    def to_dict(self) -> dict[str, Any]:
        """All fields, of JSON's types. A number that is not finite is `None`, as JSON has none such."""
        return _jsonable(asdict(self))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "SwapReport":
        """The report that `to_dict` gave these values."""
        known = {entry.name for entry in fields(cls)}
        if "swapped" not in values or not values.keys() <= known:
            raise ValueError("This is no report of a swap. One is written by SwapReport.save and by anyvlm swap.")
        return cls(**values)

    def save(self, folder: str | Path) -> list[Path]:
        """Write the report into a folder: JSON, text, the picture if matplotlib is there, and the recipe if there is one.

        Each file is written aside and then takes its name, so that none is ever half there.

        Returns:
            The files written.
        """
        from .recipe import recipe_yaml

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".swap_report-", dir=folder) as aside:
            aside = Path(aside)
            picture_note = self._draw(aside / PICTURE_NAME)
            (aside / JSON_NAME).write_text(json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n", "utf-8")
            note = [] if picture_note is None else [_line("picture", picture_note)]
            (aside / TEXT_NAME).write_text("\n".join([str(self), *note]) + "\n", "utf-8")
            if self.recipe is not None:
                (aside / RECIPE_NAME).write_text(recipe_yaml(_jsonable(self.recipe)), "utf-8")
            written = []
            for path in sorted(aside.iterdir()):
                written.append(folder / path.name)
                os.replace(path, written[-1])
        return written

    def _draw(self, path: Path) -> str | None:
        """Draw the picture, or say why it is not there."""
        from .report_picture import draw_report

        try:
            draw_report(self, path)
        except ModuleNotFoundError as error:
            if (error.name or "").split(".")[0] != "matplotlib":
                raise
            warnings.warn(f"The picture of the swap is {NO_MATPLOTLIB}.", stacklevel=3)
            return NO_MATPLOTLIB
        return None

    @classmethod
    def load(cls, path: str | Path) -> "SwapReport":
        """The report in a folder, or in its JSON file.

        Raises:
            OSError: there is none.
            ValueError: the file is no report.
        """
        path = Path(path)
        file = path / JSON_NAME if path.is_dir() else path
        values = json.loads(file.read_text("utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"{file} is no report of a swap.")
        return cls.from_dict(values)

    def __str__(self) -> str:
        return "\n".join(_line(name, value) for name, value in self.lines())

    def lines(self) -> list[tuple[str, str]]:
        """Name and value of every line of the report as text. A name of "" continues the line above."""
        lines = [("swapped", self._what_was_swapped())]
        lines += _several("parts", self._part_lines())
        lines += self.result_lines()
        return lines

    def result_lines(self) -> list[tuple[str, str]]:
        """The lines without those of the parts, for a reader who has them as a table."""
        tokens = self.tokens_per_picture
        return [
            *([] if tokens is None else [("picture", _tokens_line(tokens))]),
            (
                "alignment",
                "none: no pictures were given" if self.alignment is None else _alignment_line(self.alignment),
            ),
            *([] if self.layers is None else [("layers tried", _layers_line(self.layers))]),
            *([] if self.modality_gap is None else _several("modality gap", _gap_lines(self.modality_gap))),
            *([] if self.distillation is None else _several("distillation", _distillation_lines(self.distillation))),
            *_several("train next", [stage_line(number, stage) for number, stage in enumerate(self.next_steps, 1)]),
            *_several("warning", self.warnings),
            *([("time", f"{self.seconds:.1f} s")] if self.seconds else []),
        ]

    def _what_was_swapped(self) -> str:
        return f"{self.swapped}: {self.old or 'unknown'} -> {self.new or 'unknown'}"

    def _part_lines(self) -> list[str]:
        names = max((len(part["name"]) for part in self.parts), default=0)
        lines = []
        for part in self.parts:
            note = f"  {part['note']}" if part.get("note") else ""
            lines.append(f"{part['name']:<{names}}  {part['what']:<11}  {count(part['parameters']):>7}{note}")
        totals = [f"{count(self.parameters(what))} {what}" for what in CHANGES if self.parameters(what)]
        return [*lines, "in all: " + ", ".join(totals)] if lines else []


def stage_line(number: int, stage: dict[str, Any]) -> str:
    """A stage of the recipe in one line."""
    parts = []
    for name, how in stage.get("parts", {}).items():
        which = "" if how.get("train", "all") == "all" else f" ({how['train']})"
        parts.append(f"{name}{which} at {how['learning_rate']:.0e}")
    return f"{number}. {stage.get('name', 'stage')}: " + (", ".join(parts) or str(stage.get("why", "")))


def percent(share: float | None) -> str:
    return "unknown" if share is None else f"{100 * share:.1f} %"


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3g}"


def _tokens_line(tokens: dict[str, int]) -> str:
    before, after = tokens["before"], tokens["after"]
    same = "as before" if before == after else f"before the swap {before}"
    return f"{after} tokens of a picture, {same}"


def _alignment_line(alignment: dict[str, Any]) -> str:
    target = {"features": "the old tower's features", "tokens": "the old projected tokens"}
    return (
        f"{percent(alignment.get('explained_variance'))} of the variance explained on "
        f"{alignment.get('held_out_pictures', 'no')} held-out pictures; fitted on {alignment.get('pictures', 'no')} to "
        f"{target.get(alignment.get('target'), alignment.get('target'))}, regularisation "
        f"{_number(alignment.get('regularisation'))}, {_number(alignment.get('seconds'))} s"
    )


def _layers_line(layers: list[dict[str, Any]]) -> str:
    def told(entry: dict[str, Any]) -> str:
        name = "last" if entry["layer"] is None else entry["layer"]
        return f"{name}: " + ("refused" if "refused" in entry else percent(entry["explained_variance"]))

    return ", ".join(told(entry) for entry in layers) + " of the variance explained on held-out pictures"


def _gap_lines(gap: dict[str, Any]) -> list[str]:
    return [
        f"{when}: image tokens' mean {_number(gap[when]['distance'])} from the text embeddings' (1 is a text embedding's "
        f"length), {_number(gap[when]['rms_ratio'])} times their RMS"
        for when in ("before", "after")
        if gap.get(when)
    ]


def _distillation_lines(distillation: dict[str, Any]) -> list[str]:
    losses = distillation.get("losses") or []
    fall = f": loss {_number(losses[0][1])} -> {_number(losses[-1][1])}" if losses else ""
    ended = ", interrupted" if distillation.get("interrupted") else ""
    lines = [f"{distillation.get('steps')} steps{ended}, {_number(distillation.get('seconds'))} s, no labels{fall}"]
    agreement = distillation.get("agreement") or {}
    # What another language model starts from may be better than what the swap left.
    told = [percent(agreement[when]) for when in ("before", "started", "after") if agreement.get(when) is not None]
    if told:
        lines.append(f"agreement with the old model on held-out pictures {' -> '.join(told)}")
    return lines


def _line(name: str, value: str) -> str:
    return f"{name + ':' if name else '':<15}{value}".rstrip()


def _several(name: str, values: list[str]) -> list[tuple[str, str]]:
    return [(name if index == 0 else "", value) for index, value in enumerate(values)]


def _jsonable(value: Any) -> Any:
    """Numbers of numpy and torch to Python's, paths to text, and numbers that are not finite to `None`."""
    if isinstance(value, dict):
        return {str(key): _jsonable(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(entry) for entry in value]
    if value is None or isinstance(value, (bool, str, int)):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    # Tensors and arrays of any shape, and their scalars.
    return _jsonable(value.tolist())
