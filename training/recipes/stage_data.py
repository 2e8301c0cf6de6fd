"""The samples of a stage."""

import itertools
import os
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import ProcessorMixin

from ..data import OPENING_KEYS, augmentation_sheet, open_pictures, open_training_data
from ..data.readable import REPORT_NAME
from ..domains import MixedDomains
from ..semi_supervised import WithUnlabelled
from ..text_replay import cut_texts, mix_text_replay, put_texts_beside
from .domain_data import DOMAIN_KEYS, domain_names
from .schema import Stage
from .unlabelled_data import PER_SAMPLE, UNLABELLED_KEYS, is_picture_folder, picture_rows


#: Keys of `data` that name sources; all others describe them.
SPLITS = ("train", "eval")


def source_of(data: dict[str, Any], split: str) -> Any:
    """What `load_training_data` takes, of a recipe's `data`: the keys beside `train` and `eval` describe both."""
    return described(data.get(split), data)


def described(source: Any, data: dict[str, Any]) -> Any:
    """A source with what `data` says of all of them; `None` stays."""
    if source is None:
        return None
    others = (*SPLITS, *OPENING_KEYS, *DOMAIN_KEYS, *UNLABELLED_KEYS)
    shared = {key: value for key, value in data.items() if key not in others}
    if isinstance(source, dict):
        return {**shared, **source}
    if isinstance(source, list) and not all(isinstance(entry, str) for entry in source):
        return {**shared, "mix": source}
    return {**shared, "path": source}


def stage_dataset(
    stage: Stage, seed: int, processor: ProcessorMixin, folder: str | os.PathLike | None = None
) -> tuple[Any, Any]:
    """Data sets to train and to evaluate on; the latter may be `None`.

    Args:
        folder: Of the stage: the pictures that cannot be read are listed there, and a sheet shows what augmentation does.
    """
    strategy = stage.training_arguments.get("train_sampling_strategy", "random")
    opened = []
    for split in SPLITS:
        source = source_of(stage.data, split)
        report = None if folder is None else os.path.join(folder, f"{split}_{REPORT_NAME}")
        opened.append(
            None
            if source is None
            else open_training_data(
                source,
                stage.data,
                seed=seed,
                report=report,
                training=split == "train",
                lengths_for=processor if strategy in ("group_by_length", "batch_rebalance") else None,
            )
        )
    if folder is not None and opened[0].augmentation is not None and PartialState().is_main_process:
        pictures = [picture for row in itertools.islice(iter(opened[0].rows), 24) for picture in row["images"][:1]]
        if pictures:
            sheet = os.path.join(folder, "augmentation.png")
            augmentation_sheet(pictures[:8], opened[0].augmentation, sheet, seed=seed)
    train, held_out = opened
    if stage.data.get("domains"):
        targets = {
            name: open_pictures(picture_rows(source), seed=seed)
            if is_picture_folder(source)
            else open_training_data(described(source, stage.data), stage.data, seed=seed)
            for name, source in stage.data["domains"].items()
        }
        if not hasattr(train, "__len__"):
            raise ValueError(
                "domains: streamed data cannot be mixed with other kinds of pictures. Leave out `streaming`."
            )
        train = MixedDomains(train, targets, source_domain=domain_names(stage.data)[0], seed=seed)
    if stage.data.get("unlabelled"):
        train = _with_unlabelled(train, stage.data, seed, folder)
    replay = stage.text_replay
    if replay.get("texts"):
        max_length = replay.get("max_length") or stage.max_length or 512
        texts = cut_texts(held_out_texts(replay["texts"]), processor, max_length)
        if not replay.get("beside"):
            train = mix_text_replay(train, texts, replay.get("share", 0.2), seed)
        elif "text_kl" in stage.losses:
            if not hasattr(train, "__len__"):
                raise ValueError("text_replay: texts cannot be put beside streamed data. Write `share`, not `beside`.")
            train = put_texts_beside(train, texts, replay["beside"], seed)
    return train, held_out


def _with_unlabelled(train: Any, data: dict[str, Any], seed: int, folder: str | os.PathLike | None) -> WithUnlabelled:
    """Each sample brings some of the pictures without answers."""
    source = data["unlabelled"]
    report = None if folder is None else os.path.join(folder, f"unlabelled_{REPORT_NAME}")
    if is_picture_folder(source):
        unlabelled = open_pictures(picture_rows(source), seed=seed, report=report)
    else:
        # They are changed by the loss itself, for those who ask and for those who learn each in another way.
        unlabelled = open_training_data(unlabelled_source(data), data, seed=seed, report=report, training=False)
    if not (hasattr(train, "__len__") and hasattr(unlabelled, "__len__")):
        raise ValueError(
            "unlabelled: streamed data cannot be paired with pictures without answers. Leave out `streaming`."
        )
    return WithUnlabelled(train, unlabelled, data.get("unlabelled_per_sample") or PER_SAMPLE, seed)


def unlabelled_source(data: dict[str, Any]) -> Any:
    """What `load_training_data` takes, of pictures of which some or all have no answer."""
    return {"needs_answers": False, **described(data["unlabelled"], data)}


def first_samples(dataset: Any, number: int = 4) -> list[Any]:
    """The first samples, also of a stream."""
    return list(itertools.islice(iter(dataset), number))


def held_out_texts(texts: str | list[str]) -> list[str]:
    """Texts of a file, one in a line, or as they are."""
    if isinstance(texts, list):
        return [str(text) for text in texts]
    lines = Path(texts).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.strip()]
