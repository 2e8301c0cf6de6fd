"""What a recipe says of its data, without reading any of it."""

import os
from dataclasses import fields
from typing import Any

from ..data import OPENING_KEYS, Source, opening_errors, spec_errors
from .checks import Findings, unknown
from .domain_data import DOMAIN_KEYS, domain_errors
from .stage_data import SPLITS, described, source_of, unlabelled_source
from .unlabelled_data import LOSS, UNLABELLED_KEYS, is_picture_folder, unlabelled_errors
from .yaml_file import KeyPath


_KEYS = (
    *SPLITS,
    *(entry.name for entry in fields(Source) if entry.name not in ("path", "needs_answers")),
    "stopping_strategy",
    *OPENING_KEYS,
    *DOMAIN_KEYS,
    *UNLABELLED_KEYS,
)


def check_stage_data(values: dict[str, Any], index: int, findings: Findings) -> None:
    """The data of a stage: its own keys, and the recipe's for the rest.

    Args:
        values: The recipe.
        index: Of the stage.
    """
    stage = values["stages"][index]
    holders: list[tuple[KeyPath, dict[str, Any]]] = [
        (path, holder["data"])
        for path, holder in ((("stages", index, "data"), stage), (("data",), values))
        if isinstance(holder.get("data"), dict)
    ]
    if not holders:
        if "data" not in stage and "data" not in values:
            findings.add(("stages", index), "there is no `data`, neither here nor at the top of the recipe.")
        return
    data = {key: value for _, holder in reversed(holders) for key, value in holder.items()}
    unknown_keys = [(*path, key) for path, holder in holders for key in holder if key not in _KEYS]
    for path in unknown_keys:
        findings.add(path, unknown(path[-1], _KEYS, "setting of data"))
    if not data.get("train"):
        findings.add(holders[0][0], "`train` is missing: a file, a folder, a Hub id, or several.")
    if unknown_keys:
        return
    losses = stage["losses"] if isinstance(stage.get("losses"), dict) else {}
    if LOSS in losses and not data.get("unlabelled"):
        findings.add(
            ("stages", index, "losses", LOSS), "there are no pictures without answers; write `unlabelled` in `data`."
        )
    for keys, message in [*opening_errors(data), *domain_errors(data, losses), *unlabelled_errors(data, losses)]:
        findings.add((*next(path for path, holder in holders if keys[0] in holder), *keys), f"{message}.")
    entries = data["train"] if isinstance(data.get("train"), list) else [data.get("train")]
    streams = [data, *(entry for entry in entries if isinstance(entry, dict))]
    if stage.get("epochs") is not None and any(entry.get("streaming") is True for entry in streams):
        findings.add(("stages", index, "epochs"), "streamed data has no length; write `max_steps`.")
    for split in SPLITS:
        source = source_of(data, split)
        here = next(path for path, holder in holders if split in holder or path == holders[-1][0])
        for name in _names(data.get(split)):
            if " " in name and not os.path.exists(name):
                findings.add((*here, split), f"there is no file or folder {name!r}; write where your data is.")
        for keys, message in [] if source is None else spec_errors(source):
            written = _as_written(keys, data, split)
            here = next(path for path, holder in holders if not written or written[0] in holder or path == ("data",))
            findings.add((*here, *written), f"{message}.")

    for name, source in (data.get("domains") if isinstance(data.get("domains"), dict) else {}).items():
        here = next(path for path, holder in holders if "domains" in holder)
        for keys, message in [] if is_picture_folder(source) else spec_errors(described(source, data)):
            inside = isinstance(source, dict) and keys and keys[0] in source
            findings.add((*here, "domains", name, *(keys if inside else ())), f"{message}.")

    source = data.get("unlabelled")
    if source is not None and not is_picture_folder(source):
        here = next(path for path, holder in holders if "unlabelled" in holder)
        for keys, message in spec_errors(unlabelled_source(data)):
            inside = isinstance(source, dict) and keys and keys[0] in source
            findings.add((*here, "unlabelled", *(keys if inside else ())), f"{message}.")


def _as_written(keys: KeyPath, data: dict[str, Any], split: str) -> KeyPath:
    """Keys of the source that `load_training_data` gets, as keys of the recipe's `data`."""
    written = data[split]
    if keys[:1] == ("mix",) and isinstance(written, list):
        index, *rest = keys[1:] or (None,)
        if index is None:
            return (split,)
        inside = isinstance(written[index], dict) and rest and rest[0] in written[index]
        return (split, index, *(rest if inside else ())) if inside or not rest or rest[0] == "path" else (rest[0],)
    if isinstance(written, dict):
        return (split, *keys) if not keys or keys[0] in written or keys[0] not in data else keys
    return (split,) if not keys or keys[0] == "path" else keys


def _names(written: Any) -> list[str]:
    """Paths and ids among what a recipe says of a split."""
    entries = written if isinstance(written, list) else [written]
    return [entry for entry in entries if isinstance(entry, str)]
