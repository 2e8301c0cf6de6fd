"""Features of a frozen tower, computed once, kept on disk, and given to the model in place of pixels ever after."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import ProcessorMixin, TrainerCallback

from ..configuration.image_views import depends_on_pictures
from .data.samples import OpenedSamples, OpenedStream, opened_in
from .feature_filling import fill_shards
from .feature_keys import facts_hash, file_key, picture_key, tower_facts
from .feature_shards import FeatureShards


#: Tells people what the features of a folder were made by.
_FACTS_NAME = "tower.json"


class FeatureCache:
    """Features of pictures by a frozen vision tower, before the projector.

    ```python
    cache = anyvlm.FeatureCache("features", model, processor)
    collator = anyvlm.AnyVlmDataCollator(processor, feature_cache=cache)
    cache.fill(dataset, model)
    ```

    `AnyVlmTrainer` fills it by itself before the first step; for a plain `Trainer`, `callbacks=[cache.callback(dataset)]`
    does. A picture that is in the cache is neither decoded (if it is a file) nor resized, and the tower does not run for it;
    one that is not, and every video, goes the ordinary way, also within the same batch. Losses are the same either way.

    Features are kept under a key of all they depend on: the tower's weights and config, the layers that are read, the image
    processor's settings, how pictures are cut into views, and the content of the picture. A tower that was trained has
    another key, so stale features are never found.

    Args:
        directory: Where features are kept. Several towers may share it.
        model: The composed model; only its key is kept, not the model.
        processor: Its processor.
        autocast_dtype: The dtype in which the training autocasts: `torch.bfloat16` for `TrainingArguments(bf16=True)`.
        dtype: Features are kept in this dtype. Default: as the tower gives them, so that nothing is lost.
        max_bytes: Stop filling when the features take so much; pictures beyond go the ordinary way.
        shard_bytes: Size of a file; so much is kept in memory while filling.

    Raises:
        ValueError: a parameter of the vision tower requires a gradient.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        model: nn.Module,
        processor: ProcessorMixin,
        autocast_dtype: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        max_bytes: int | None = None,
        shard_bytes: int = 128 * 2**20,
    ):
        check_frozen(model)
        self.directory = Path(directory)
        self.processor = processor
        self.autocast_dtype, self.dtype = autocast_dtype, dtype
        self.max_bytes, self.shard_bytes = max_bytes, shard_bytes
        self._facts = self._facts_of(model)
        self.key = facts_hash(self._facts)
        self.shards = FeatureShards(self.directory / self.key)

    def __len__(self) -> int:
        """Pictures whose features are kept."""
        return len(self.shards)

    def size(self) -> int:
        """Bytes on disk that the features of this tower take."""
        return self.shards.nbytes

    def clear(self, only_stale: bool = False) -> None:
        """Remove the features of all towers from the directory.

        Args:
            only_stale: Keep those of this tower.
        """
        for facts in self.directory.glob(f"*/{_FACTS_NAME}"):
            if facts.parent.name != self.key:
                shutil.rmtree(facts.parent)
        if not only_stale:
            self.shards.clear()
            shutil.rmtree(self.shards.directory, ignore_errors=True)

    def seen(self, pictures: Sequence[Any]) -> list[Any]:
        """The pictures of one text, those that are known as what the processor takes in their place."""
        found = []
        for picture in pictures:
            key, picture = self.key_of(picture, len(pictures))
            if key in self.shards:
                features, facts = self.shards[key]
                picture = {**facts, "tower_features": features}
            found.append(picture)
        return found

    def knows_file(self, picture: Any, in_text: int) -> bool:
        """Whether a picture in a text with so many is a file, or its bytes, whose features are kept."""
        key = file_key(picture)
        return key is not None and self._in_text(key, in_text) in self.shards

    def check(self, model: nn.Module) -> None:
        """
        Raises:
            ValueError: the model's vision tower is trained, or is not the one whose features these are.
        """
        check_frozen(model)
        facts = self._facts_of(model)
        differ = [name for name in facts if facts[name] != self._facts[name]]
        if differ:
            raise ValueError(
                f"The vision tower is not the one that this feature cache was made for: {', '.join(differ)} differ"
                f"{'s' if len(differ) == 1 else ''}. Make a new one: FeatureCache(directory, model, processor)."
            )

    def fill(
        self,
        dataset: Dataset,
        model: nn.Module,
        batch_size: int = 8,
        num_workers: int = 0,
        progress: bool = True,
    ) -> int:
        """Compute the features of all pictures of a data set that are not known yet; returns how many these were.

        What was computed stays if this is interrupted. In a run of several processes whose group is set up (it is once there
        are `TrainingArguments`), each computes its share.

        Args:
            dataset: Samples as the collator takes them.
            model: The model, on the device where the tower is to run.
            batch_size: Samples at a time.
            num_workers: Processes that read and resize pictures.
            progress: Show a bar, and before it what the features will take on disk, on standard error.

        Raises:
            ValueError: as `check`; the data set gives other pictures each time (its `augments` is true).
            OSError: the disk has not enough room.
        """
        self.check(model)
        refuse_augmented(dataset)
        return fill_shards(self, dataset, model, batch_size, num_workers, progress)

    def callback(self, dataset: Dataset, batch_size: int = 8, num_workers: int | None = None) -> TrainerCallback:
        """Checks at the beginning of a training that the cache goes with the model, and fills it.

        Args:
            num_workers: Default: the training's `dataloader_num_workers`.
        """
        return FeatureCacheCallback(self, dataset, batch_size, num_workers)

    def _facts_of(self, model: nn.Module) -> dict[str, Any]:
        return tower_facts(
            model, self.processor, autocast_dtype=str(self.autocast_dtype), dtype=str(self.dtype or "as computed")
        )

    def key_of(self, picture: Any, in_text: int) -> tuple[str, Any]:
        """The key of a picture in a text with so many, and the picture: decoded, if that was needed to know it."""
        key, picture = picture_key(picture)
        return self._in_text(key, in_text), picture

    def _in_text(self, key: str, in_text: int) -> str:
        # Some models cut pictures in another way where a text has several.
        return f"{key}-{in_text}" if depends_on_pictures(self.processor.image_views) else key

    def describe(self) -> None:
        """Write beside the features what they are made by, for people."""
        folder = self.shards.directory
        folder.mkdir(parents=True, exist_ok=True)
        aside = folder / f".{_FACTS_NAME}.{os.getpid()}"
        aside.write_text(json.dumps(self._facts, indent=2) + "\n", encoding="utf-8")
        os.replace(aside, folder / _FACTS_NAME)


def check_frozen(model: nn.Module) -> None:
    """
    Raises:
        ValueError: a parameter of the vision tower requires a gradient.
    """
    trained = [name for name, parameter in model.vision_tower.named_parameters() if parameter.requires_grad]
    if trained:
        raise ValueError(
            f"{len(trained)} parameters of the vision tower require a gradient ({trained[0]}, …), so its features "
            "change while it is trained and cannot be kept. Freeze it (model.vision_tower.requires_grad_(False)), or train "
            "without a feature cache."
        )


def refuse_augmented(dataset: Any) -> None:
    """
    Raises:
        ValueError: the data set says that it augments, so that a picture is never the same twice.
    """
    if getattr(dataset, "augments", False) or any(opened.augments for opened in opened_in(dataset)):
        raise ValueError(
            "This data set augments its pictures, so each epoch has other ones and no feature would be used twice. Switch "
            "the augmentation off, or train without a feature cache."
        )


class FeatureCacheCallback(TrainerCallback):
    """Checks at the beginning of a training that a feature cache goes with the model, and fills it. A data set that opens
    files (`open_pictures`) leaves those alone from then on that are known."""

    def __init__(self, cache: FeatureCache, dataset: Dataset, batch_size: int = 8, num_workers: int | None = None):
        self.cache, self.dataset = cache, dataset
        self.batch_size, self.num_workers = batch_size, num_workers

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        expected = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
        if expected != self.cache.autocast_dtype:
            raise ValueError(
                f"The training autocasts to {expected}, but the feature cache was made for {self.cache.autocast_dtype}, in "
                f"which features differ a little. Make it with FeatureCache(…, autocast_dtype={expected})."
            )
        self.cache.fill(
            self.dataset,
            model,
            self.batch_size,
            args.dataloader_num_workers if self.num_workers is None else self.num_workers,
            progress=state.is_world_process_zero and not args.disable_tqdm,
        )
        if isinstance(self.dataset, (OpenedSamples, OpenedStream)) and self.dataset.value_range is None:
            self.dataset.stays_unopened = self.cache.knows_file
