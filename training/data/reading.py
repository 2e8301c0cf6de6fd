"""Tables as `datasets` reads them: files, folders of pictures, data sets on disk and on the Hub; pictures are not opened."""

import os
from typing import TYPE_CHECKING, Any

from .source_settings import SUFFIXES, Source


if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

#: Files that say what is in pictures beside them, as `datasets`' imagefolder has them.
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_ON_DISK = ("dataset_dict.json", "state.json")
_STREAM_SHARDS = 16


def files_of(source: Source, split: str, reader: str | None = None) -> list[str]:
    """Local files of rows that a source names, all of one kind; with `reader` only if that reads them.

    Of a folder, those of a split, told by their names as `datasets` does (`train.jsonl`, `test/…`).

    Raises:
        ValueError: files of several kinds; no such split.
    """
    paths = [os.fspath(path) for path in source.paths]
    files = [path for path in paths if os.path.isfile(path) and os.path.basename(path) not in METADATA]
    if len(paths) == 1 and os.path.isdir(paths[0]) and not _is_saved(paths[0]) and not _metadata(paths[0]):
        files = _files_of_split(paths[0], source.split or split)
    kinds = {SUFFIXES.get(os.path.splitext(name)[1].lower()) for name in files}
    if len(kinds) > 1 or None in kinds:
        raise ValueError(
            f"{source.path}: files of one kind are read together ({', '.join(SUFFIXES)}), not "
            f"{', '.join(os.path.basename(name) for name in files[:5])}. Make a `mix` of several sources."
        )
    return files if reader is None or kinds == {reader} else []


def _files_of_split(folder: str, split: str) -> list[str]:
    from datasets.data_files import DataFilesDict, get_data_patterns

    # Texts in a folder are captions, and what is in deeper folders belongs to pictures.
    suffixes = set(SUFFIXES) - {".txt"}
    if not any(os.path.splitext(name)[1].lower() in suffixes for name in os.listdir(folder)):
        return []
    found = {
        str(name): [file for file in files if os.path.splitext(file)[1].lower() in suffixes]
        for name, files in DataFilesDict.from_patterns(get_data_patterns(folder), base_path=folder).items()
    }
    if split not in found:
        raise ValueError(f"{folder} has no split {split!r}; it has {', '.join(found)}. Set `split`.")
    return sorted(found[split])


def read_table(source: Source, split: str) -> tuple["Dataset | IterableDataset", str | None]:
    """The rows of a source with pictures unopened, and the folder that names of pictures are relative to."""
    import datasets

    path, split = os.fspath(source.paths[0]), source.split or split
    files, folder = files_of(source, split), None
    if files:
        folder = os.path.dirname(os.path.abspath(files[0]))
        reader = SUFFIXES[os.path.splitext(files[0])[1].lower()]
        settings = {"sep": "\t"} if files[0].lower().endswith(".tsv") else {}
        table = datasets.load_dataset(reader, data_files=files, split="train", streaming=source.streaming, **settings)
        if reader == "text":
            table = table.filter(lambda text: bool(text.strip()), input_columns=["text"])
    elif not os.path.isdir(path):
        table = datasets.load_dataset(
            path, source.name, split=split, revision=source.revision, streaming=source.streaming
        )
    elif _is_saved(path):
        table = datasets.load_from_disk(path)
        if isinstance(table, datasets.DatasetDict):
            if split not in table:
                raise ValueError(f"{path} has no split {split!r}; it has {', '.join(table)}. Set `split`.")
            table = table[split]
    else:
        table = _folder(path, source, split)
    if source.streaming and isinstance(table, datasets.Dataset):
        table = table.to_iterable_dataset(num_shards=min(_STREAM_SHARDS, max(len(table), 1)))
    return _undecoded(table), folder


def _folder(path: str, source: Source, split: str) -> "Dataset | IterableDataset":
    import datasets
    from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

    if _metadata(path):
        return datasets.load_dataset("imagefolder", data_dir=path, split=split, streaming=source.streaming)
    found = [os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names]
    pictures = sorted(name for name in found if os.path.splitext(name)[1].lower() in ImageFolder.EXTENSIONS)
    if not pictures:  # a copy of a repository of the Hub
        return datasets.load_dataset(path, source.name, split=split, streaming=source.streaming)
    texts = {os.path.splitext(name)[0] for name in found if name.endswith(".txt")}
    captioned = [name for name in pictures if os.path.splitext(name)[0] in texts]
    if captioned:
        if len(captioned) < len(pictures) and not source.skip_bad_rows:
            first = next(name for name in pictures if name not in set(captioned))
            raise ValueError(
                f"{path}: {len(pictures) - len(captioned)} of {len(pictures)} pictures have no caption beside them; {first} "
                "needs a file of the same name that ends in .txt. (`skip_bad_rows: true` leaves such pictures out.)"
            )
        rows = {"image": captioned, "caption": [_text(os.path.splitext(name)[0] + ".txt") for name in captioned]}
        return datasets.Dataset.from_dict(rows)
    if all(os.path.dirname(name) == os.path.normpath(path) for name in pictures):
        raise ValueError(
            f"{path}: {len(pictures)} pictures, but nothing says what is in them. Put captions beside them (x.jpg and "
            f"x.txt), or a {METADATA[1]} with `file_name` and a caption or messages, or the pictures "
            "into folders named by class."
        )
    return datasets.load_dataset("imagefolder", data_dir=path, split=split, streaming=source.streaming)


def _undecoded(table: "Dataset | IterableDataset") -> "Dataset | IterableDataset":
    """The same rows, with pictures as `{"bytes", "path"}`."""
    from datasets import Image

    def without(feature: Any) -> Any:
        if isinstance(feature, Image):
            return Image(decode=False)
        if isinstance(feature, dict):
            return {name: without(entry) for name, entry in feature.items()}
        inner = getattr(feature, "feature", None)
        return type(feature)(without(inner)) if inner is not None else feature

    for name, feature in (table.features or {}).items():
        if (plain := without(feature)) != feature:
            table = table.cast_column(name, plain)
    return table


def _is_saved(path: str) -> bool:
    return any(os.path.isfile(os.path.join(path, name)) for name in _ON_DISK)


def _metadata(path: str) -> bool:
    """Whether it is in the folder or below it."""
    return any(name in METADATA for _, _, names in os.walk(path) for name in names)


def _text(name: str) -> str:
    with open(name, encoding="utf-8") as file:
        return file.read().strip()
