"""Samples with open pictures, ready for the collator: read, augmented, with examples before them if so wanted."""

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import TrainerCallback

from .augmentation import Augmentation
from .few_shot import FewShot
from .readable import JUDGE_AFTER, UnreadableLog, UnreadablePicture, read_picture


if TYPE_CHECKING:
    pass

#: Other samples that are tried in place of one whose pictures cannot be read.
_TRIES = 100


def open_pictures(
    dataset: Any,
    *,
    augmentation: Augmentation | None = None,
    few_shot: FewShot | None = None,
    max_unreadable: float = 0.01,
    judge_after: int = JUDGE_AFTER,
    report: str | os.PathLike | None = None,
    value_range: tuple[float, float] | None = None,
    seed: int = 0,
    repeat: bool = True,
) -> "OpenedSamples | OpenedStream":
    """The data set with its pictures opened as RGB whenever a sample is taken, in the workers of the data loader.

    A sample with a picture that cannot be read gives its place to another one, drawn by seed, epoch and index alone: batches
    stay full, and a resumed run sees what an uninterrupted one would. In a stream the next sample follows.

    Args:
        dataset: Rows of `messages` and `images`: of `load_training_data`, any sequence of them, or an iterable data set.
        augmentation: Changes the pictures, each time in another way.
        few_shot: Puts examples in front of the messages.
        max_unreadable: Share of pictures read above which the run fails.
        judge_after: Pictures that are read before that is judged; of fewer samples, as many as there are.
        report: Where `unreadable_pictures.jsonl` is to be written.
        value_range: For pictures of more than 8 bits a channel, see `read_picture`.
        seed: Of everything drawn.
        repeat: Whether a stream begins again when it is through, as training needs it; not for evaluation.

    Returns:
        A data set for `Trainer`. Its `callbacks()` go to a plain `Trainer`, too (`AnyVlmTrainer` takes them by itself);
        its `log` says what could not be read.
    """
    is_stream = isinstance(dataset, torch.utils.data.IterableDataset) or not hasattr(dataset, "__getitem__")
    if not is_stream:
        if len(dataset) == 0:
            raise ValueError("The data set has no rows.")
        judge_after = min(judge_after, len(dataset))
    log = UnreadableLog(report, max_unreadable, judge_after)
    arguments = (dataset, log, augmentation, few_shot, value_range, seed)
    return OpenedStream(*arguments, repeat=repeat) if is_stream else OpenedSamples(*arguments)


class _Opened:
    """What both kinds have in common."""

    def __init__(
        self,
        rows: Any,
        log: UnreadableLog,
        augmentation: Augmentation | None,
        few_shot: FewShot | None,
        value_range: tuple[float, float] | None,
        seed: int,
    ):
        self.rows, self.log, self.seed = rows, log, seed
        self.augmentation, self.few_shot, self.value_range = augmentation, few_shot, value_range
        #: Given a picture and how many its sample has, whether it may stay unopened: a feature cache sets this.
        self.stays_unopened: Callable[[Any, int], bool] | None = None
        # Shared, for workers that live longer than an epoch.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    @property
    def augments(self) -> bool:
        """Whether pictures are others in each epoch: then features of them cannot be kept."""
        return self.augmentation is not None

    @property
    def column_names(self) -> list[str]:
        return list(self.rows.column_names)

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(int(epoch))

    def callbacks(self) -> list[TrainerCallback]:
        """For a plain `Trainer`: says which epoch it is, and at the end what could not be read."""
        return [_OpenedCallback(self)]

    def _opened(self, row: Mapping[str, Any], key: tuple[int, ...]) -> dict[str, Any]:
        """
        Raises:
            UnreadablePicture: one of the sample's.
        """
        sample = dict(row)
        if self.few_shot is not None:
            sample = self.few_shot(sample, key)
        pictures, sources = [], sample.get("images") or []
        for picture in sources:
            self.log.count()
            unopened = self.stays_unopened is not None and self.stays_unopened(picture, len(sources))
            pictures.append(picture if unopened else read_picture(picture, self.value_range))
        if self.augmentation is not None:
            pictures = [self.augmentation(picture, (*key, number)) for number, picture in enumerate(pictures)]
        return {**sample, "images": pictures}


class OpenedSamples(_Opened, torch.utils.data.Dataset):
    """`open_pictures` of rows with indices."""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(len(self.rows))[index]
        key = (self.seed, int(self._epoch), index)
        others = np.random.default_rng(key)
        for attempt in range(_TRIES + 1):
            try:
                return self._opened(self.rows[index if attempt == 0 else int(others.integers(len(self.rows)))], key)
            except UnreadablePicture as error:
                self.log.add(error)
        raise UnreadablePicture(
            f"sample {index}",
            f"none of {_TRIES} others drawn in its place can be read either. {self.log.summary_text()}",
        )


class OpenedStream(_Opened, torch.utils.data.IterableDataset):
    """`open_pictures` of a stream, which begins again when it is through: `Trainer` sees one long epoch (`max_steps`), and
    resumes by going through what it has seen."""

    def __init__(self, *arguments, repeat: bool = True):
        super().__init__(*arguments)
        self.repeat = repeat

    def set_epoch(self, epoch: int) -> None:
        """Nothing: the stream counts how often it has begun."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = torch.utils.data.get_worker_info()
        worker = 0 if info is None else info.id
        epoch = 0
        while True:
            if hasattr(self.rows, "set_epoch"):  # those of `datasets` shuffle anew
                self.rows.set_epoch(epoch)
            found = 0
            for number, row in enumerate(self.rows):
                try:
                    sample = self._opened(row, (self.seed, epoch, worker, number))
                except UnreadablePicture as error:
                    self.log.add(error)
                    continue
                found += 1
                yield sample
            if found == 0:
                # A worker without a part of the stream; alone, there is nothing to train on.
                if info is not None and info.num_workers > 1:
                    return
                raise ValueError(f"The stream has no sample that can be used. {self.log.summary_text()}")
            if not self.repeat:
                return
            epoch += 1


def opened_in(dataset: Any) -> list[OpenedSamples | OpenedStream]:
    """The data sets of `open_pictures` in one that was put around them: `torch`'s `ConcatDataset` and `Subset`, mixtures
    with text or with other domains."""
    if isinstance(dataset, (OpenedSamples, OpenedStream)):
        return [dataset]
    if isinstance(dataset, Mapping):
        return [one for value in dataset.values() for one in opened_in(value)]
    if isinstance(dataset, (list, tuple)):
        # Of rows in a list, not each.
        return [one for value in dataset if isinstance(value, torch.utils.data.Dataset) for one in opened_in(value)]
    return opened_in(vars(dataset)) if isinstance(dataset, torch.utils.data.Dataset) else []


class _OpenedCallback(TrainerCallback):
    def __init__(self, dataset: _Opened):
        self.dataset = dataset

    def on_epoch_begin(self, args, state, control, **kwargs):
        # `accelerate` tells a data set its epoch, but not where a sampler has one too: in several processes, and when a run
        # is resumed within an epoch.
        self.dataset.set_epoch(int((state.epoch or 0) + 1e-6))

    def on_train_end(self, args, state, control, **kwargs):
        log = self.dataset.log
        if log.num_unreadable:
            state.log_history.append({"step": state.global_step, "unreadable_pictures": log.num_unreadable})
            # A warning, so that it is in the summary of a recipe.
            warnings.warn(log.summary_text(), UserWarning, stacklevel=1)
