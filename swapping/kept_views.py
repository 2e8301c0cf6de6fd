"""A sample of a stream of paired views, of a bounded size, for what sums cannot answer: errors behind a projector."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from ..configuration.image_tokens import Grid
from .paired_features import PairedView
from .ridge import RidgeSums


#: Views that go through a projector at once.
_BATCH = 16
_MAX_HELD_OUT = 64


@dataclass
class KeptView:
    """On the CPU, float32: what the projector gets, and the tokens that are wanted.

    Args:
        number: Of its picture in the stream.
        grid: Rows and columns of `new`.
        new: `(rows * columns, new width)`.
        tokens: `(tokens, token width)`.
        reached: `(tokens,)`, false where the old path did not look.
    """

    number: int
    grid: Grid
    new: torch.Tensor
    tokens: torch.Tensor
    reached: torch.Tensor


class KeptViews:
    """Views of every picture at first, of every second one when the memory is full, then of every fourth, and so on: spread
    evenly over a stream of unknown length.

    Args:
        held_out_every: Pictures whose number is a multiple of this are held out. Odd, so that halving takes from both.
        max_views: At most so many.
        max_bytes: Of all tensors.
    """

    def __init__(self, held_out_every: int, max_views: int = 2048, max_bytes: int = 2**29):
        self.held_out_every, self.max_views, self.max_bytes = held_out_every, max_views, max_bytes
        self.stride, self.bytes = 1, 0
        self.views: list[KeptView] = []

    def add(self, number: int, view: PairedView) -> None:
        if view.tokens is None or number % self.stride or not view.tokens_reached.any():
            return
        # Copies: a view of a batch's tensor would keep all of it.
        parts = (view.new, view.tokens, view.tokens_reached)
        kept = KeptView(number, view.grid, *(part.to("cpu", copy=True) for part in parts))
        self.views.append(kept)
        self.bytes += _bytes(kept)
        while self._is_full() and len({view.number for view in self.views}) > 2 * self.held_out_every:
            self.stride *= 2
            self.views = [view for view in self.views if view.number % self.stride == 0]
            self.bytes = sum(map(_bytes, self.views))

    def _is_full(self) -> bool:
        return self.bytes > self.max_bytes or len(self.views) > self.max_views

    def held_out(self) -> list[KeptView]:
        """Those of pictures that are held out; at most so many that a projector is quickly tried on them, evenly chosen."""
        views = [view for view in self.views if view.number % self.held_out_every == 0]
        return views[:: -(-len(views) // _MAX_HELD_OUT)] if views else []

    def others(self) -> list[KeptView]:
        return [view for view in self.views if view.number % self.held_out_every]


def _bytes(view: KeptView) -> int:
    return sum(part.nbytes for part in (view.new, view.tokens, view.reached))


def through(
    projector: nn.Module, views: Iterable[KeptView]
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Tokens `(n, width)` that a projector makes of views, the tokens wanted `(n, width)`, and `(n,)` which of all tokens of
    these views they are: those that the old path reached."""
    device = next(projector.parameters()).device
    batch: list[KeptView] = []
    for view in [*views, None]:
        if batch and (view is None or view.grid != batch[0].grid or len(batch) == _BATCH):
            tokens, _ = projector(torch.stack([kept.new for kept in batch]).to(device), batch[0].grid)
            reached = torch.cat([kept.reached for kept in batch]).to(device)
            wanted = torch.cat([kept.tokens for kept in batch]).to(device)
            yield tokens.flatten(0, 1)[reached], wanted[reached], reached
            batch = []
        batch.append(view)


@torch.no_grad()
def explained_variance(projector: nn.Module, views: Iterable[KeptView]) -> float:
    """Share of the variance of the wanted tokens about their mean that a projector predicts, over all outputs."""
    error, scatter = 0.0, None
    for tokens, wanted, _ in through(projector, views):
        scatter = scatter or RidgeSums(0, wanted.shape[1], wanted.device)
        scatter.update(wanted[:, :0], wanted)
        error += float((tokens.double() - wanted.double()).square().sum())
    total = 0.0 if scatter is None else float(scatter.yy.sum())
    return 1 - error / total if total > 0 else -float("inf")


@contextmanager
def last_layer_inputs(layer: nn.Linear) -> Iterator[list[torch.Tensor]]:
    """The inputs of a layer, `(..., in_features)`, while a projector runs."""
    captured: list[torch.Tensor] = []
    handle = layer.register_forward_pre_hook(lambda module, arguments: captured.append(arguments[0]))
    try:
        yield captured
    finally:
        handle.remove()


@torch.no_grad()
def last_layer_sums(projector: nn.Module, layer: nn.Linear, views: Iterable[KeptView]) -> RidgeSums | None:
    """Sums of the inputs of a projector's last layer and of the tokens wanted; `None` if the layer's outputs are not the
    tokens (they are pooled afterwards), or there are no views."""
    sums = None
    with last_layer_inputs(layer) as captured:
        for tokens, wanted, reached in through(projector, views):
            inputs = captured.pop().flatten(0, -2)
            if len(inputs) != len(reached) or not torch.allclose(layer(inputs[reached]), tokens, rtol=1e-3, atol=1e-4):
                return None
            captured.clear()  # of the check
            sums = sums or RidgeSums(layer.in_features, layer.out_features, wanted.device)
            sums.update(inputs[reached], wanted)
    return sums
