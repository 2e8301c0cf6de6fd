"""The projector of a new tower in closed form, from pictures without labels.

Two linear maps are solved for, by ridge regression on sums over all pictures (`ridge.py`):

* from the new tower's features to the old tower's at the same places (stitching: Lenc & Vedaldi 2015, Bansal et al. 2021),
  so that the old projector goes on behind it;
* from what the projector's last layer gets behind this map to the tokens that the old path gave, drawn to the weights that
  the layer has. Of a projector that is linear altogether, this is one map from features to tokens.

What predicts the old tokens of held-out pictures better is kept. Ridge regression of several outputs is one for each output,
so that for a linear projector both targets give the same map where the penalty is the same; they differ in which is chosen.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text
from torch import nn

from ..modeling.modeling_anyvlm import AnyVlmForConditionalGeneration
from ..processing.processing_anyvlm import AnyVlmProcessor
from .kept_views import KeptViews, through
from .modality_gap import modality_gap_change
from .paired_features import AlignmentError, PairedFeatures
from .picture_paths import PicturePath
from .pictures import Pictures
from .projector_fit import FOLDS, FeatureFit, LastLayerFit


#: Rows of each kind that the modality gap is measured with.
_GAP_ROWS = 2048


@torch.no_grad()
def align(
    old_model: AnyVlmForConditionalGeneration,
    old_processor: AnyVlmProcessor,
    new_model: AnyVlmForConditionalGeneration,
    new_processor: AnyVlmProcessor,
    images: Any,
    *,
    limit: int | None = None,
    num_variants: int = 1,
    batch_size: int = 16,
    is_replaced: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """Solve for the projector of a model with another tower, so that pictures give the tokens that they gave before.

    The projector of the new model, and its config there and in the processor, are exchanged at the very end; nothing else
    is changed, and nothing at all if this is interrupted. Memory does not grow with the number of pictures.

    Args:
        old_model, old_processor: As they were.
        new_model, new_processor: As `swap_vision_tower` gave them.
        images: A source of pictures, or `Pictures` (to which `limit`, `num_variants` and `seed` then belong).
        limit: At most so many pictures.
        num_variants: How often each picture is looked at, slightly changed but for the first time.
        batch_size: Pictures that both towers see at once.
        is_replaced: The new projector is another one than the old; then its last layer alone is solved for.
        seed: For the sample of pictures and the changes.
        progress: Show a bar.

    Returns:
        `pictures`, `held_out_pictures`, `unreadable_pictures`; `target`, `"features"` or `"tokens"`; `explained_variance`
        of the old tokens of held-out pictures (of the features, where tokens cannot be compared), before these were added
        to the fit; `regularisation`; `candidates`, one dict for each way that was tried; `seconds`; `modality_gap` as
        `modality_gap_change` gives it, or `None`.

    Raises:
        AlignmentError: features of the towers cannot be compared place by place, or one picture alone.
        ValueError: no pictures, or too many that cannot be read.
    """
    started = time.monotonic()
    pairs = PairedFeatures(
        PicturePath(old_model, old_processor), PicturePath(new_model, new_processor), is_replaced=is_replaced
    )
    if not isinstance(images, Pictures):
        images = Pictures(images, limit=limit, seed=seed, num_variants=num_variants)
    projector_fit = (LastLayerFit if is_replaced else FeatureFit)(pairs, new_model)
    with _progress(images.num_pictures, progress) as (advance, say):
        number, last = -1, None
        for batch in images.batches(batch_size):
            before, numbers = number, []
            for index, _ in batch:
                number += index != last
                last = index
                numbers.append(number)
            for view in pairs([picture for _, picture in batch]):
                projector_fit.add(numbers[view.picture], view)
            advance(number - before)
        say("solving")
        if number < 1:
            raise AlignmentError("One picture is not enough, as some are held out. Give ten, or better a hundred.")
        candidates = projector_fit.candidates()
        best = max(candidates, key=lambda candidate: candidate.explained_variance)
        module = best.build(True)
        gap = _modality_gap(new_model, projector_fit.kept, module)
    projector_fit.write(module, new_model, new_processor)
    return {
        "pictures": number + 1,
        "held_out_pictures": -(-(number + 1) // FOLDS),
        "unreadable_pictures": images.unreadable,
        **best.described(),
        "candidates": [candidate.described() for candidate in candidates],
        "seconds": time.monotonic() - started,
        "modality_gap": gap,
    }


def _modality_gap(model: AnyVlmForConditionalGeneration, kept: KeptViews, module: nn.Module) -> dict[str, Any] | None:
    """How far image tokens are from text embeddings, by the old path and by the new one, on pictures that were kept."""
    old, new, rows = [], [], 0
    for tokens, wanted, _ in through(module, kept.views):
        old.append(wanted)
        new.append(tokens)
        rows += len(tokens)
        if rows >= _GAP_ROWS:
            break
    embeddings = model.get_input_embeddings()
    ids = torch.linspace(0, embeddings.weight.shape[0] - 1, _GAP_ROWS).long().unique()
    texts = embeddings(ids.to(embeddings.weight.device).unsqueeze(0))[0].float()
    # Tokens of a fusion have a width of their own.
    if rows == 0 or old[0].shape[1] != texts.shape[1]:
        return None
    return modality_gap_change((torch.cat(old)[:_GAP_ROWS], texts), (torch.cat(new)[:_GAP_ROWS], texts))


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:.1f} pictures/s")


@contextmanager
def _progress(number: int | None, shown: bool) -> Iterator:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate())
    times = (TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, *times, console=Console(stderr=True), disable=not shown) as progress:
        task = progress.add_task("aligning", total=number)
        yield partial(progress.advance, task), lambda what: progress.update(task, description=what)


__all__ = ["AlignmentError", "align"]
