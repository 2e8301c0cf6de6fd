"""What a recipe says about a source of training data, and all that is wrong with it at once."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any


FORMATS = ("messages", "llava", "captions", "classes", "questions", "text")
STOPPING = ("first_exhausted", "all_exhausted", "all_exhausted_without_replacement")


@dataclass
class Source:
    """One source of samples, as a recipe writes it.

    Args:
        path: A file (`.jsonl`, `.json`, `.parquet`, `.csv`, `.arrow`; `.txt`: a text in each line) or several, a folder
            (saved by `datasets`, of such files, or of pictures), or a Hub id.
        name: Which of the configurations of a Hub data set.
        split: Of it; `train[:10%]` works.
        revision: Of it.
        format: What the rows are: `messages` (conversations, also LLaVA's: `llava`), `captions`, `classes` (folders named
            for what is in their pictures), `questions` (a question and an answer) or `text` (no pictures). Default: seen
            from the columns.
        messages: Column of the conversation. Default: `messages`, then `conversations`.
        images: Column of the picture or pictures. Default: `images`, then `image`.
        image_folder: What the names of pictures are relative to. Default: the folder of the file.
        caption: Column of the caption. Default: `caption`, `captions`, then `text`.
        label: Column of the class. Default: `label`.
        text: Column of plain text. Default: `text`.
        question, answer: Columns of these. Default: `question`; `answer`, then `answers`.
        questions: What captions and class names are answers to; each sample gets one of them.
        classes: Name of a class in the data -> what the answer calls it. Default: the name, `_` as a space.
        share: Part of the mixture's samples that come from here, from 0 to 1.
        weight: The same, relative to the other sources.
        max_samples: At most so many, drawn at random (streamed: the first).
        skip_bad_rows: Leave out rows that cannot be used, and say how many, where they would be an error.
        needs_answers: Whether a conversation without an answer cannot be used; such are for semi-supervised training.
        max_unreadable: Share of missing pictures from which on it is an error.
        streaming: Read while training.
        shuffle_buffer: How many samples are shuffled together if streamed; 0 for the order of the files.
    """

    path: str | list[str] = ""
    name: str | None = None
    split: str | None = None
    revision: str | None = None
    format: str | None = None
    messages: str | None = None
    images: str | None = None
    image_folder: str | None = None
    caption: str | None = None
    label: str | None = None
    text: str | None = None
    question: str | None = None
    answer: str | None = None
    questions: list[str] = field(default_factory=list)
    classes: dict[str, str] = field(default_factory=dict)
    share: float | None = None
    weight: float | None = None
    max_samples: int | None = None
    skip_bad_rows: bool = False
    needs_answers: bool = True
    max_unreadable: float = 0.01
    streaming: bool = False
    shuffle_buffer: int = 1000

    @property
    def paths(self) -> list[str]:
        return [self.path] if isinstance(self.path, (str, os.PathLike)) else list(self.path)

    @property
    def is_local(self) -> bool:
        return os.path.exists(self.paths[0])


#: Beside `mix` in a mixture; what a source may have too is the default of all of them.
_MIX_KEYS = {"mix", "stopping_strategy"}
_KNOWN = [entry.name for entry in fields(Source)]
_TYPES = {
    **dict.fromkeys(("share", "weight", "max_unreadable"), (int, float)),
    **dict.fromkeys(("max_samples", "shuffle_buffer"), int),
    **dict.fromkeys(("streaming", "skip_bad_rows", "needs_answers"), bool),
    "questions": (list, tuple),
    "classes": Mapping,
    "path": (str, os.PathLike, list, tuple),
}


def spec_errors(spec: Any) -> list[tuple[tuple, str]]:
    """All that is wrong with a specification of data, without reading any: `(keys that lead there, sentence)`."""
    if isinstance(spec, (str, os.PathLike)):
        spec = {"path": spec}
    if is_mixture(spec):
        return _mixture_errors(spec)
    if not isinstance(spec, Mapping):
        return [((), f"data is a path, a mapping with `path`, or a list of these, not {type(spec).__name__}")]
    errors = []
    for key, value in spec.items():
        expected = _TYPES.get(key, str)
        if key not in _KNOWN:
            errors.append(((key,), f"{key!r} is not a setting of a data source; these are: {', '.join(_KNOWN)}, mix"))
        elif value is not None and (not isinstance(value, expected) or (expected is int and isinstance(value, bool))):
            errors.append(((key,), f"{key} is {value!r}, which should be {_named(expected)}"))
    if errors:
        return errors
    if not spec.get("path"):
        errors.append(((), "a data source needs a `path`: files, a folder or a Hub id"))
    if spec.get("format") not in (None, *FORMATS):
        errors.append((("format",), f"the format {spec['format']!r} is unknown; known are {', '.join(FORMATS)}"))
    if spec.get("share") is not None and not 0 < spec["share"] <= 1:
        errors.append((("share",), f"a share is above 0 and at most 1, not {spec['share']}"))
    if spec.get("weight") is not None and spec["weight"] <= 0:
        errors.append((("weight",), f"a weight is above 0, not {spec['weight']}"))
    for path in Source(path=spec.get("path") or ()).paths:
        if not os.path.exists(path) and _looks_local(os.fspath(path)):
            errors.append((("path",), f"there is no file or folder {path}"))
    if spec.get("image_folder") and not os.path.isdir(spec["image_folder"]):
        errors.append((("image_folder",), f"there is no folder {spec['image_folder']}"))
    return errors


def is_mixture(spec: Any) -> bool:
    return isinstance(spec, (list, tuple)) or (isinstance(spec, Mapping) and "mix" in spec)


def sources_of(spec: Any) -> tuple[dict[str, Source], str]:
    """The sources by name, and when a mixture of them ends.

    Raises:
        ValueError: with everything that is wrong.
    """
    errors = spec_errors(spec)
    if errors:
        listed = "\n".join(f"- {'.'.join(map(str, keys)) + ': ' if keys else ''}{text}" for keys, text in errors)
        raise ValueError(f"The training data cannot be read as it is described:\n{listed}")
    if not is_mixture(spec):
        source = Source(**({"path": spec} if not isinstance(spec, Mapping) else spec))
        return {os.path.basename(str(source.paths[0]).rstrip("/")): source}, STOPPING[1]
    mixture = {"mix": spec} if isinstance(spec, (list, tuple)) else spec
    shared = {key: value for key, value in mixture.items() if key not in _MIX_KEYS}
    named = {}
    for name, entry in _entries(mixture["mix"]):
        source = Source(**{**shared, **(entry if isinstance(entry, Mapping) else {"path": entry})})
        name = name if isinstance(name, str) else os.path.basename(str(source.paths[0]).rstrip("/"))
        named[name if name not in named else f"{name} ({len(named) + 1})"] = source
    return named, mixture.get("stopping_strategy", STOPPING[1])


def shares_of(sources: Sequence[Source]) -> list[float] | None:
    """Probabilities of the sources, or `None` where nothing is said about them."""
    given = [source.share if source.share is not None else source.weight for source in sources]
    if all(value is None for value in given):
        return None
    return [value / sum(given) for value in given]


def _mixture_errors(spec: Any) -> list[tuple[tuple, str]]:
    mixture = {"mix": spec} if isinstance(spec, (list, tuple)) else spec
    if not isinstance(mixture["mix"], (list, tuple, Mapping)) or not mixture["mix"]:
        return [(("mix",), "a mixture is a list of sources, or a mapping from their names to them")]
    shared = {key: value for key, value in mixture.items() if key not in _MIX_KEYS}
    before = () if isinstance(spec, (list, tuple)) else ("mix",)
    errors, shares, weights, streams = [], [], [], set()
    for name, entry in _entries(mixture["mix"]):
        entry = {"path": entry} if isinstance(entry, (str, os.PathLike)) else entry
        if not isinstance(entry, Mapping):
            errors.append(((*before, name), "a source is a path or a mapping with `path`"))
            continue
        errors += [((*before, name, *keys), text) for keys, text in spec_errors({**shared, **entry})]
        shares.append(entry.get("share"))
        weights.append(entry.get("weight"))
        streams.add(bool({**shared, **entry}.get("streaming")))
    if mixture.get("stopping_strategy", STOPPING[1]) not in STOPPING:
        errors.append((("stopping_strategy",), f"stopping_strategy is one of {', '.join(STOPPING)}"))
    if errors:
        return errors
    if len(streams) > 1:
        errors.append((before, "of a mixture, all sources are streamed or none: set `streaming` beside `mix`"))
    for key, values in (("share", shares), ("weight", weights)):
        if 0 < sum(value is not None for value in values) < len(values):
            errors.append((before, f"some sources have a {key} and others do not; give all of them one, or none"))
    if all(value is not None for value in shares) and abs(sum(shares) - 1) > 1e-6:
        errors.append((before, f"the shares sum to {sum(shares):g}, not to 1 (a `weight` is relative to the others)"))
    if any(value is not None for value in shares) and any(value is not None for value in weights):
        errors.append((before, "there are shares and weights; use one of them"))
    return errors


def _entries(mix: Any) -> list[tuple[Any, Any]]:
    return list(mix.items()) if isinstance(mix, Mapping) else list(enumerate(mix))


def _looks_local(path: str) -> bool:
    """Whether it cannot be a Hub id, which is `owner/name` or `name`."""
    return path.startswith(("/", ".", "~")) or path.count("/") > 1 or os.path.splitext(path)[1] in SUFFIXES


#: Of files -> what `datasets` reads them with.
SUFFIXES = {
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
    ".arrow": "arrow",
    ".txt": "text",
}


def _named(expected: Any) -> str:
    names = {str: "a text", int: "a whole number", bool: "true or false", Mapping: "a mapping"}
    if expected in names:
        return names[expected]
    return "a number" if float in expected else "a path or a list" if str in expected else "a list"
