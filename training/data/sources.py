"""`load_training_data`: samples of `messages` and `images` from whatever people have, by `datasets`."""

import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from transformers.utils import logging

from .checks import check_pictures, drop_bad_rows
from .conversations import BadRow
from .formats import Rows, recognise, sample_of
from .json_rows import file_versions, json_rows
from .reading import files_of, read_table
from .source_settings import Source, shares_of, sources_of


if TYPE_CHECKING:
    from datasets import Dataset, Features, IterableDataset

logger = logging.get_logger(__name__)

#: Rows from which the types of other columns are seen, and that are checked before a stream begins.
FIRST_ROWS = 1000
#: Column that says why a row cannot be used, while the data is made.
PROBLEM = "problem"


def load_training_data(spec: Any, *, seed: int = 0, split: str = "train") -> "Dataset | IterableDataset":
    """Samples for `AnyVlmDataCollator`, from a recipe's `data.train`.

    Args:
        spec: A path or Hub id; a mapping with `path` and further settings of `Source`; or a mixture: a list of these, or
            `{"mix": [...], "stopping_strategy": …}`, with a `share` or `weight` for each source (without: one after the
            other).
        seed: Of everything drawn: questions, mixtures, shuffling of streams.
        split: Of data sets that have several, unless the source says.

    Returns:
        Rows of `messages` (each content a list of `{"type", "text"}`), `images` (`datasets.Image(decode=False)`: pictures
        stay where they are until they are needed) and all other columns; `source` is the name of the source in a mixture. A
        `datasets.Dataset`, or a shuffled `IterableDataset` where `streaming` is set.

    Raises:
        ValueError: settings that do not fit (all of them at once); rows that cannot be used (how many, and the first);
            more missing pictures than `max_unreadable`. Of a stream the first rows are checked, and others when they come.
        ImportError: without `datasets` (the extra `train`).
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError("Reading training data needs datasets: pip install 'anyvlm[train]'") from error
    sources, stopping = sources_of(spec)
    parts = [_load(source, seed, split) for source in sources.values()]
    if len(parts) == 1:
        mixed = parts[0]
    else:
        parts = _alike([_with_source(part, name) for name, part in zip(sources, parts)])
        shares = shares_of(list(sources.values()))
        if shares is None:
            mixed = datasets.concatenate_datasets(parts)
        else:
            mixed = datasets.interleave_datasets(parts, probabilities=shares, seed=seed, stopping_strategy=stopping)
    buffer = max(source.shuffle_buffer for source in sources.values())
    if isinstance(mixed, datasets.IterableDataset) and buffer:
        mixed = mixed.shuffle(seed=seed, buffer_size=buffer)
    return mixed


def _load(source: Source, seed: int, split: str) -> "Dataset | IterableDataset":
    import datasets

    files = files_of(source, split, "json")
    dataset = _from_json(source, files, seed) if files else _from_table(source, seed, split)
    if isinstance(dataset, datasets.IterableDataset):
        if source.skip_bad_rows:
            dataset = dataset.filter(lambda problem: problem is None, input_columns=[PROBLEM])
        first = list(dataset.take(100))
        check_pictures((row["images"] for row in first), source)
        # In a list: of a name alone, streams drop every column whose name is a part of it.
        dataset = dataset.remove_columns([PROBLEM])
        return dataset if source.max_samples is None else dataset.take(source.max_samples)
    dataset = drop_bad_rows(dataset, source, PROBLEM)
    if source.max_samples is not None and source.max_samples < len(dataset):
        dataset = dataset.shuffle(seed=seed).select(range(source.max_samples))
    check_pictures(dataset.select_columns("images").with_format("arrow"), source)
    return dataset


def _from_json(source: Source, files: list[str], seed: int) -> "Dataset | IterableDataset":
    import datasets

    first = [row for _, (_, _, row) in zip(range(FIRST_ROWS), json_rows(files)) if isinstance(row, Mapping)]
    if not first:
        raise ValueError(f'{source.path}: there are no rows in it that are objects (`{{"messages": …}}`).')
    columns = list(dict.fromkeys(name for row in first for name in row))
    rows = recognise(columns, source, os.path.dirname(os.path.abspath(files[0])))
    kept = _types_of({name: [row.get(name) for row in first] for name in columns if name not in _replaced(rows)})
    arguments = {"files": files, "versions": file_versions(files), "rows": rows, "source": source}
    arguments |= {"seed": seed, "kept": kept}
    make = datasets.IterableDataset if source.streaming else datasets.Dataset
    return make.from_generator(_json_samples, features=_features(kept, rows), gen_kwargs=arguments)


def _json_samples(files, versions, rows: Rows, source: Source, seed: int, kept: "Features") -> Iterator[dict]:
    for name, number, row in json_rows(files):
        yield _converted(row, f"{name}, row {number}", rows, source, seed, kept)


def _from_table(source: Source, seed: int, split: str) -> "Dataset | IterableDataset":
    import datasets

    table, folder = read_table(source, split)
    if table.features is None:
        first = list(table.take(100))
        columns = list(dict.fromkeys(name for row in first for name in row))
        features = _types_of({name: [row.get(name) for row in first] for name in columns})
    else:
        features = table.features
    label = features.get(source.label or "label")
    names = label.names if isinstance(label, datasets.ClassLabel) else None
    rows = recognise(list(features), source, folder, names)
    kept = datasets.Features({name: kind for name, kind in features.items() if name not in _replaced(rows)})
    arguments = {"rows": rows, "source": source, "seed": seed, "kept": kept}
    return table.map(
        _table_sample,
        with_indices=True,
        fn_kwargs=arguments,
        remove_columns=list(features),
        features=_features(kept, rows),
        **({} if source.streaming else {"desc": f"Samples of {os.path.basename(str(source.paths[0]))}"}),
    )


def _table_sample(row: Mapping, index: int, rows: Rows, source: Source, seed: int, kept: "Features") -> dict:
    return _converted(row, f"row {index}", rows, source, seed, kept)


def _converted(row: Any, place: str, rows: Rows, source: Source, seed: int, kept: "Features") -> dict[str, Any]:
    """A sample with the columns kept; or an empty one with the problem; in a stream a problem is an error at once."""
    import datasets

    try:
        if not isinstance(row, Mapping):
            raise BadRow(f"it is {type(row).__name__}, not an object")
        others = {name: row.get(name) for name in kept}
        for name, value in others.items():
            if value is not None and kept[name] == datasets.Value("string") and not isinstance(value, str):
                others[name] = str(value)
        return {**sample_of(row, rows, source, seed), **others, PROBLEM: None}
    except BadRow as error:
        if source.streaming and not source.skip_bad_rows:
            raise ValueError(
                f"{source.path}, {place}: {error}. (`skip_bad_rows: true` leaves such rows out.)"
            ) from error
        text = {"text": None} if rows.format == "text" else {}
        return {"messages": [], "images": [], **text, **dict.fromkeys(kept), PROBLEM: f"{place}: {error}"}


def _replaced(rows: Rows) -> set[str]:
    return {*rows.used, "messages", "images", PROBLEM, *(["text"] if rows.format == "text" else [])}


def _features(kept: "Features", rows: Rows) -> "Features":
    from datasets import Features, Image, List, Value

    block = {"type": Value("string"), "text": Value("string")}
    messages = List({"role": Value("string"), "content": List(block)})
    text = {"text": Value("string")} if rows.format == "text" else {}
    return Features(
        {"messages": messages, "images": List(Image(decode=False)), **text, **kept, PROBLEM: Value("string")}
    )


def _types_of(columns: Mapping[str, list]) -> "Features":
    """The types of columns by their first values; text where these differ."""
    import pyarrow
    from datasets import Features

    types = {}
    for name, values in columns.items():
        try:
            types[name] = pyarrow.infer_type(values)
        except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError):
            types[name] = pyarrow.string()
        if pyarrow.types.is_null(types[name]):
            types[name] = pyarrow.string()
    return Features.from_arrow_schema(pyarrow.schema(list(types.items())))


def _with_source(dataset: "Dataset | IterableDataset", name: str) -> "Dataset | IterableDataset":
    import datasets

    if isinstance(dataset, datasets.IterableDataset):
        features = datasets.Features({**dataset.features, "source": datasets.Value("string")})
        return dataset.map(_named_source, fn_kwargs={"name": name}, features=features)
    dataset = dataset.remove_columns("source") if "source" in dataset.column_names else dataset
    return dataset.add_column("source", [name] * len(dataset), feature=datasets.Value("string"))


def _named_source(row: Mapping, name: str) -> dict:
    return {**row, "source": name}


def _alike(parts: list) -> list:
    """Columns of one name have one type: text, where they differ. Streams have all columns, as mixed data sets do."""
    from datasets import Features, IterableDataset, Value

    kinds: dict[str, list] = {}
    for part in parts:
        for name, kind in part.features.items():
            kinds.setdefault(name, []).append(kind)
    differing = [name for name, found in kinds.items() if any(kind != found[0] for kind in found)]
    for name in differing:
        logger.warning(f"The column {name!r} is not of one type in all sources; it is read as text.")
        parts = [part.cast_column(name, Value("string")) if name in part.features else part for part in parts]
    every = Features({name: kind for part in parts for name, kind in part.features.items()})
    return [
        part.map(_filled, fn_kwargs={"columns": list(every)}, features=every)
        if isinstance(part, IterableDataset)
        else part
        for part in parts
    ]


def _filled(row: Mapping, columns: list[str]) -> dict:
    return {name: row.get(name) for name in columns}
