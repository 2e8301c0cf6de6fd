"""Whether rows can be used and pictures are there, said once for all of them."""

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from transformers.utils import logging

from .source_settings import Source


if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.get_logger(__name__)

_SHOWN = 5
_EXPECTED = (
    "Expected are rows with `messages` ([{'role': 'user', 'content': '<image> …'}, {'role': 'assistant', 'content': …}]) "
    "and `images` (one for each <image>), LLaVA's `conversations` and `image`, or pictures with a caption, class or "
    "question."
)


def drop_bad_rows(dataset: "Dataset", source: Source, problem: str) -> "Dataset":
    """Without the rows that have a `problem`, and without that column.

    Raises:
        ValueError: there are such rows, and `skip_bad_rows` is not set; or no others.
    """
    problems = dataset[problem]
    bad = [index for index, text in enumerate(problems) if text is not None]
    dataset = dataset.remove_columns(problem)
    if not bad and len(dataset):
        return dataset
    listed = "".join(f"\n- {problems[index]}" for index in bad[:_SHOWN])
    message = f"{source.path}: {len(bad):,} of {len(dataset):,} rows cannot be used. The first:{listed}"
    if not source.skip_bad_rows or len(bad) == len(dataset):
        raise ValueError(f"{message}\n{_EXPECTED} (`skip_bad_rows: true` leaves such rows out.)")
    logger.warning(f"{message}\nThey are left out.")
    dropped = set(bad)
    return dataset.select([index for index in range(len(dataset)) if index not in dropped])


def check_pictures(images: Iterable[Any], source: Source) -> int:
    """Whether the files of pictures are there; they are not opened.

    Args:
        images: Rows of pictures: lists of `{"bytes", "path"}`, or a data set of them in Arrow's format.

    Returns:
        How many are missing.

    Raises:
        ValueError: a share above `max_unreadable`.
    """
    known: dict[str, bool] = {}
    count, missing = 0, []
    for row in _rows(images):
        for picture in row:
            count += 1
            path = picture["path"]
            if picture["bytes"] is not None or path is None or "://" in path or path.startswith("data:"):
                continue
            if path not in known:
                known[path] = os.path.isfile(path)
            if not known[path]:
                missing.append(path)
    if not missing:
        return 0
    listed = "".join(f"\n- {path}" for path in dict.fromkeys(missing[:_SHOWN]))
    message = f"{source.path}: {len(missing):,} of {count:,} pictures are missing. The first:{listed}"
    if len(missing) > source.max_unreadable * count:
        raise ValueError(
            f"{message}\nThat is more than max_unreadable={source.max_unreadable:g}. Names are relative to the file of "
            "rows, or to `image_folder`."
        )
    logger.warning(f"{message}\nTheir samples are skipped.")
    return len(missing)


def _rows(images: Iterable[Any]) -> Iterable[list[dict]]:
    import pyarrow.compute
    from datasets import Dataset

    if not isinstance(images, Dataset):
        yield from images
        return
    for table in images.iter(1000):
        column = table["images"].combine_chunks()
        values = column.flatten()
        paths = values.field("path")
        has_bytes = pyarrow.compute.is_valid(values.field("bytes")).to_pylist()
        # The bytes of pictures that are in the table stay there.
        yield [{"path": path, "bytes": b"" if inside else None} for path, inside in zip(paths.to_pylist(), has_bytes)]
