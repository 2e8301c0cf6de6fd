"""Compute the features of the pictures of a data set that a feature cache has not yet."""

import contextlib
import copy
import itertools
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset
from transformers.utils import logging

from ..configuration.image_views import depends_on_pictures
from ..processing.pictures import to_rgb_picture
from ..swapping.picture_paths import PicturePath
from ..swapping.training_state import training_bar
from .collator import place_media, single_samples
from .data.readable import UnreadablePicture, read_picture
from .data.samples import OpenedSamples, OpenedStream
from .feature_keys import file_key


if TYPE_CHECKING:
    from .feature_cache import FeatureCache

logger = logging.get_logger(__name__)


def fill_shards(
    cache: "FeatureCache", dataset: Dataset, model: nn.Module, batch_size: int, num_workers: int, progress: bool
) -> int:
    """What `FeatureCache.fill` does; returns how many pictures were computed."""
    dataset = _once(dataset, cache)
    total = None if isinstance(dataset, IterableDataset) else len(dataset)
    loader = DataLoader(
        _own_share(dataset),
        batch_size,
        num_workers=num_workers,
        collate_fn=_Unknown(cache),
        generator=torch.Generator(),  # not the global one, which the training goes on with
    )
    path, estimate = PicturePath(model, cache.processor), _Estimate(cache, total)
    room = float("inf") if cache.max_bytes is None else (cache.max_bytes - cache.size()) / _processes()[1]
    pending: dict[str, tuple[torch.Tensor, dict]] = {}
    pending_bytes = count = 0

    def write() -> None:
        if pending:
            cache.shards.write(pending)
            pending.clear()

    cache.describe()
    with training_bar(progress) as bar:
        task = bar.add_task("features", total=None if total is None else len(loader), note="")
        try:
            for batch in loader:
                bar.advance(task)
                entries = [] if batch.inputs is None else _compute(cache, path, batch)
                if told := estimate.tell(batch, entries):
                    (bar.console.print if progress else logger.info)(told)
                for key, features, facts in entries:
                    if key not in pending and key not in cache.shards:
                        pending[key] = features, facts
                        pending_bytes += features.nbytes
                        room -= features.nbytes
                        count += 1
                bar.update(task, note=f"{count:,} pictures")
                if room <= 0:
                    logger.warning("The feature cache is full (max_bytes); other pictures go through the tower.")
                    break
                if pending_bytes >= cache.shard_bytes:
                    write()
                    pending_bytes = 0
        finally:
            write()
    if _processes()[1] > 1:
        torch.distributed.barrier()
    cache.shards.refresh()
    return count


@torch.no_grad()
def _compute(
    cache: "FeatureCache", path: PicturePath, batch: "_UnknownPictures"
) -> list[tuple[str, torch.Tensor, dict]]:
    device = path.model.device
    inputs = {name: value.to(device) for name, value in batch.inputs.items()}
    autocast = contextlib.nullcontext()
    if cache.autocast_dtype is not None:
        autocast = torch.autocast(device.type, cache.autocast_dtype)
    with autocast:
        pictures = path.by_picture(inputs, len(batch.keys))
    entries = []
    for key, (height, width), (views, grids, _) in zip(batch.keys, batch.sizes, pictures, strict=True):
        # A copy: a slice would keep the whole batch's hidden states.
        features = torch.cat(views).to("cpu", cache.dtype, copy=True)
        entries.append((key, features, {"height": height, "width": width, "grids": [list(grid) for grid in grids]}))
    return entries


@dataclass
class _UnknownPictures:
    """Pictures of some samples, made ready for the tower, and what is known about the samples.

    Args:
        keys, sizes: Of each picture.
        inputs: What the processor made of them; `None` without any.
        samples, pictures: How many of the data set's there were, known ones included.
    """

    keys: list[str]
    sizes: list[tuple[int, int]]
    inputs: Mapping[str, torch.Tensor] | None
    samples: int
    pictures: int


class _Unknown:
    """Collates samples to those of their pictures that a cache has not; runs in workers."""

    def __init__(self, cache: "FeatureCache"):
        self.cache = cache

    def __call__(self, samples: Sequence[Mapping[str, Any] | Sequence[Mapping[str, Any]]]) -> _UnknownPictures:
        num_samples = len(samples)
        samples = single_samples(samples)
        groups, keys, total = [], [], 0
        whole = depends_on_pictures(self.cache.processor.image_views)
        for sample in samples:
            # Plain text has no messages.
            pictures = [] if sample.get("messages") is None else place_media(sample)[1]["image"]
            total += len(pictures)
            found = [self.cache.key_of(picture, len(pictures)) for picture in pictures]
            unknown = [(key, picture) for key, picture in found if key not in self.cache.shards and key not in keys]
            if unknown and whole:  # how a picture is cut depends on its text's other ones
                unknown = found
            keys += [key for key, _ in unknown]
            new = [to_rgb_picture(picture) for _, picture in unknown]
            groups += ([new] if new else []) if whole else [[picture] for picture in new]
        if not groups:
            return _UnknownPictures([], [], None, num_samples, total)
        sizes = [(picture.height, picture.width) for group in groups for picture in group]
        inputs = PicturePath.inputs_of(self.cache.processor, groups)
        return _UnknownPictures(keys, sizes, inputs, num_samples, total)


class _Estimate:
    """Tells once, when the first features are there, what all of them will take on disk."""

    def __init__(self, cache: "FeatureCache", total: int | None):
        self.cache, self.total = cache, total
        self.samples = self.pictures = 0
        self.told = False

    def tell(self, batch: _UnknownPictures, entries: list[tuple[str, torch.Tensor, dict]]) -> str | None:
        self.samples += batch.samples
        self.pictures += batch.pictures
        if self.told or not entries:
            return None
        self.told = True
        each = sum(features.nbytes for _, features, _ in entries) / len(entries)
        free = shutil.disk_usage(self.cache.directory).free
        if self.total is None:
            return f"Features take {_readable(each)} for each picture, in {self.cache.directory} ({_readable(free)} free)."
        pictures = round(self.total * self.pictures / self.samples)
        needed = pictures * each
        most = self.cache.max_bytes
        if min(needed, needed if most is None else most) - self.cache.size() > free:
            raise OSError(
                f"Features of about {pictures:,} pictures would take {_readable(needed)}, but {self.cache.directory} has "
                f"{_readable(free)} free. Choose another directory, set max_bytes=…, or keep them in "
                "dtype=torch.bfloat16."
            )
        limit = "" if most is None else f", of which at most {_readable(most)} are kept"
        return (
            f"Features of about {pictures:,} pictures take about {_readable(needed)} in {self.cache.directory}{limit} "
            f"({_readable(free)} free)."
        )


def _once(dataset: Dataset, cache: "FeatureCache") -> Dataset:
    """One pass over a data set. Files that it opens come as files, under whose keys they are looked for while training."""
    if isinstance(dataset, (OpenedSamples, OpenedStream)):
        dataset = copy.copy(dataset)
        dataset.stays_unopened = _KnownOrSound(cache) if dataset.value_range is None else None
    if isinstance(dataset, OpenedStream):
        dataset.repeat = False
    return dataset


class _KnownOrSound:
    """Whether a picture is a file that a cache knows, or that can be read."""

    def __init__(self, cache: "FeatureCache"):
        self.cache = cache

    def __call__(self, picture: Any, in_text: int) -> bool:
        if file_key(picture) is None:
            return False
        try:
            return self.cache.knows_file(picture, in_text) or read_picture(picture) is not None
        except UnreadablePicture:
            return False


def _readable(number: float) -> str:
    for unit in ("B", "KB", "MB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:,.1f} GB"


def _processes() -> tuple[int, int]:
    """The number of this process, and how many there are."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def _own_share(dataset: Dataset) -> Dataset:
    """The samples of this process."""
    rank, world = _processes()
    if world == 1:
        return dataset
    if isinstance(dataset, IterableDataset):
        return _EveryNth(dataset, rank, world)
    return Subset(dataset, range(rank, len(dataset), world))


class _EveryNth(IterableDataset):
    def __init__(self, dataset: IterableDataset, first: int, step: int):
        self.dataset, self.first, self.step = dataset, first, step

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(iter(self.dataset), self.first, None, self.step)
