"""The samples of a stage."""

from pathlib import Path
from typing import Any

from transformers import ProcessorMixin

from ..data import load_training_data
from .schema import Stage


#: Keys of `data` that name sources; all others describe them.
SPLITS = ("train", "eval")


def source_of(data: dict[str, Any], split: str) -> Any:
    """What `load_training_data` takes, of a recipe's `data`: the keys beside `train` and `eval` describe both."""
    source = data.get(split)
    if source is None:
        return None
    shared = {key: value for key, value in data.items() if key not in SPLITS}
    if isinstance(source, dict):
        return {**shared, **source}
    if isinstance(source, list) and not all(isinstance(entry, str) for entry in source):
        return {**shared, "mix": source}
    return {**shared, "path": source}


def stage_dataset(stage: Stage, seed: int, processor: ProcessorMixin) -> tuple[Any, Any]:
    """Data sets to train and to evaluate on; the latter may be `None`."""
    train, held_out = (source_of(stage.data, split) for split in SPLITS)
    return load_training_data(train, seed=seed), None if held_out is None else load_training_data(held_out, seed=seed)


def held_out_texts(texts: str | list[str]) -> list[str]:
    """Texts of a file, one in a line, or as they are."""
    if isinstance(texts, list):
        return [str(text) for text in texts]
    lines = Path(texts).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.strip()]
