"""What a projector can be filled with: the candidates of an alignment, fitted to sums over all pictures."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn

from ..modeling.modeling_anyvlm import AnyVlmForConditionalGeneration
from ..modeling.projectors import LinearProjector, build_projector
from ..processing.processing_anyvlm import AnyVlmProcessor
from .feature_maps import core_projector, foldable_layer, mapped_config, mapped_projector, set_projector
from .kept_views import KeptViews, explained_variance, last_layer_sums
from .paired_features import AlignmentError, PairedFeatures, PairedView
from .ridge import REGULARISATIONS, RidgeSolution, RidgeSums, fit, solve, total


#: Every fifth picture is held out; each fifth in its turn, where sums of all five fit into the memory below.
FOLDS = 5
_MAX_SUMS_BYTES = 2**30
#: A last layer of at most so many inputs is solved for several times.
_SMALL_LAYER = 1024


@dataclass
class Candidate:
    """One way to fill the projector.

    Args:
        target: `"features"` or `"tokens"`.
        regularisation: The chosen penalty.
        build: Of what was fitted without the held-out pictures (false) or with all (true), a float32 module from features
            of the new tower on the core's grid, and this grid, to tokens.
        explained_variance: Of held-out tokens; of held-out features where tokens cannot be compared.
        notes: More for the report.
    """

    target: str
    regularisation: float
    build: Callable[[bool], nn.Module]
    explained_variance: float
    notes: dict = field(default_factory=dict)

    def described(self) -> dict:
        return {
            "target": self.target,
            "regularisation": self.regularisation,
            "explained_variance": self.explained_variance,
            **self.notes,
        }


def best_nearby(value: Callable[[int], float], start: int, number: int) -> tuple[int, float]:
    """The index, and its value, where a function of `0 … number - 1` is largest, going both ways from `start` until it fell
    twice: for a function with one hill and little noise, which is costly to ask."""
    best, largest = start, value(start)
    for step in (-1, 1):
        index, falls = start + step, 0
        while 0 <= index < number and falls < 2:
            found = value(index)
            if found > largest:
                best, largest, falls = index, found, 0
            else:
                falls += 1
            index += step
    return best, largest


class FeatureFit:
    """The old projector behind a linear map from the new tower's features to the old one's; then its last layer anew.

    Args:
        pairs: Gives what is to be added.
        new_model: For the width of its features.
    """

    def __init__(self, pairs: PairedFeatures, new_model: AnyVlmForConditionalGeneration):
        self.core, self.config = pairs.old_core, pairs.old_config
        self.new_width = new_model.config.vision_tower_spec["hidden_size"]
        widths = self.new_width, self.config["in_features"]
        size = 8 * widths[0] * sum(widths)
        # Two sets are enough for one choice; more memory buys the mean of five.
        number = FOLDS if FOLDS * size <= _MAX_SUMS_BYTES else 2
        self.folds = [RidgeSums(*widths, device=new_model.device) for _ in range(number)]
        # Of a linear projector the sums with tokens follow from those with features, but for the tokens' variance.
        self.is_linear = isinstance(self.core, LinearProjector) and foldable_layer(self.core) is not None
        self.token_folds = [RidgeSums(0, self.config["out_features"], device=new_model.device) for _ in self.folds]
        self.kept = KeptViews(FOLDS)

    def add(self, number: int, view: PairedView) -> None:
        """Add a view of the picture with this number in the stream."""
        fold = number % FOLDS if len(self.folds) == FOLDS else min(number % FOLDS, 1)
        old = view.old[view.reached]
        self.folds[fold].update(view.new[view.reached], old)
        if self.is_linear:
            self.token_folds[fold].update(old[:, :0], self.core.linear(old))
        self.kept.add(number, view)

    def candidates(self) -> list[Candidate]:
        maps = [_FeatureMaps(self, None)]
        if self.new_width == self.config["in_features"]:
            # A tower that was tuned further differs little from what it was: drawn to leaving features as they are.
            identity = torch.eye(self.new_width, dtype=torch.float64), torch.zeros(self.new_width, dtype=torch.float64)
            maps.append(_FeatureMaps(self, tuple(part.to(self.folds[0].xx.device) for part in identity)))
        found = [self._features(entry) for entry in maps]
        if self.is_linear:
            found.append(self._tokens_of_linear())
        else:
            best = max(range(len(found)), key=lambda index: found[index].explained_variance)
            last = self._last_layer(maps[best], found[best].regularisation)
            found += [] if last is None else [last]
        return found

    def _features(self, maps: "_FeatureMaps") -> Candidate:
        """The map to the old features. Its penalty is the one that gives the best tokens: what is good for the features,
        most of which the projector hardly looks at, is too large for these (measured: ten times)."""
        held_out, chosen = self.kept.held_out(), maps.best
        share = maps.shares[chosen]
        if held_out:
            chosen, share = best_nearby(
                lambda index: explained_variance(maps.projector(index, False), held_out), chosen, len(maps.penalties)
            )
        notes = {"explained_variance_of_features": maps.shares[chosen], "drawn_to": maps.drawn_to}
        return Candidate("features", maps.penalties[chosen], partial(maps.projector, chosen), share, notes)

    def _tokens_of_linear(self) -> Candidate:
        layer = self.core.linear
        folds = [sums.mapped(layer.weight, tokens) for sums, tokens in zip(self.folds, self.token_folds)]
        solution = solve(folds)

        def build(with_held_out: bool) -> nn.Module:
            weight, bias = solution.weight, solution.bias
            if not with_held_out:
                weight, bias = solution.path.map(solution.regularisation)
            projector = build_projector(mapped_config(self.core, self.config, self.new_width, None)).to(layer.weight)
            projector.linear.weight.copy_(weight)
            projector.linear.bias.copy_(bias)
            return projector.eval()

        held_out = self.kept.held_out()
        share = explained_variance(build(False), held_out) if held_out else solution.explained_variance
        return Candidate("tokens", solution.regularisation, build, share, {"drawn_to": "zero"})

    def _last_layer(self, maps: "_FeatureMaps", regularisation: float) -> Candidate | None:
        """The last layer solved for behind a map of features, drawn to what it is. It makes up for a larger penalty in front
        of it, so that this is chosen again, where that is cheap."""
        layer = self.core.output_layer
        if not isinstance(layer, nn.Linear) or layer.bias is None:
            return None
        prior = layer.weight.double(), layer.bias.double()
        solutions: dict[int, RidgeSolution | None] = {}

        def share(index: int) -> float:
            module = maps.projector(index, False)
            views = self.kept.held_out(), self.kept.others()
            sums = [last_layer_sums(module, core_projector(module).output_layer, part) for part in views]
            usable = all(part is not None and part.weight > 0 for part in sums)
            # The map in front was fitted to the others: only what was held out from it says anything.
            penalties = (*REGULARISATIONS, float("inf"))
            solutions[index] = solve(sums, penalties, prior, validated=1) if usable else None
            return solutions[index].explained_variance if usable else -float("inf")

        start = maps.penalties.index(regularisation)
        if layer.in_features <= _SMALL_LAYER and share(start) > -float("inf"):
            chosen, explained = best_nearby(share, start, len(maps.penalties))
        else:
            chosen, explained = start, share(start)
        solution = solutions[chosen]
        if solution is None:
            return None

        def build(with_held_out: bool) -> nn.Module:
            module = maps.projector(chosen, with_held_out)
            inner = core_projector(module).output_layer
            weight, bias = solution.path.map(solution.regularisation)
            if with_held_out:
                weight, bias = fit(last_layer_sums(module, inner, self.kept.views), solution.regularisation, prior)
            inner.weight.copy_(weight)
            inner.bias.copy_(bias)
            return module

        notes = {
            "drawn_to": "the last layer",
            "behind": {"drawn_to": maps.drawn_to, "regularisation": maps.penalties[chosen]},
        }
        return Candidate("tokens", solution.regularisation, build, explained, notes)

    def write(self, module: nn.Module, model: AnyVlmForConditionalGeneration, processor: AnyVlmProcessor) -> None:
        """Put what a candidate built into a model, in its dtype, on the grid that its projector brings features to."""
        grid = model.config.projector_config.get("aligned_grid")
        config = mapped_config(self.core, self.config, self.new_width, grid)
        before = next(model.multi_modal_projector.parameters(), next(model.parameters()))
        projector = build_projector(config).to(before.device, before.dtype)
        core_projector(projector).load_state_dict(core_projector(module).state_dict())
        if "aligned_features" in config:
            projector.alignment.linear.load_state_dict(module.alignment.linear.state_dict())
        set_projector(model, processor, projector.train(model.multi_modal_projector.training), config)


class _FeatureMaps:
    """An old projector behind a linear map to its features, for each penalty.

    Args:
        of: What was summed up, and the projector.
        prior: What the map is drawn to; `None` for zero.
    """

    def __init__(self, of: FeatureFit, prior: tuple[torch.Tensor, torch.Tensor] | None):
        self.core, self.config, self.folds, self.prior = of.core, of.config, of.folds, prior
        self.penalties = REGULARISATIONS if prior is None else (*REGULARISATIONS, float("inf"))
        self.drawn_to = "zero" if prior is None else "identity"
        solution = solve(self.folds, self.penalties, prior)
        self.path, self.best = solution.path, self.penalties.index(solution.regularisation)
        self.shares = [entry["explained_variance"] for entry in solution.candidates]

    def projector(self, index: int, with_held_out: bool) -> nn.Module:
        """float32, from new features on the core's grid to tokens."""
        penalty = self.penalties[index]
        weight, bias = fit(total(self.folds), penalty, self.prior) if with_held_out else self.path.map(penalty)
        return mapped_projector(self.core, self.config, weight.float(), bias.float(), None)[0].eval()


class LastLayerFit:
    """The last layer of a projector that is new altogether: random features in front of a ridge regression (Rahimi & Recht
    2008), or all of it, if it is linear.

    Args:
        pairs: Gives what is to be added.
        new_model: Has the new projector.
    """

    def __init__(self, pairs: PairedFeatures, new_model: AnyVlmForConditionalGeneration):
        self.kept = KeptViews(FOLDS)
        self.core = copy.deepcopy(core_projector(new_model.multi_modal_projector)).float().eval()
        layer = self.core.output_layer
        if not isinstance(layer, nn.Linear) or layer.bias is None:
            raise AlignmentError(
                f"A new projector of type {pairs.new_config['type']!r} does not end in a linear layer with a bias, so "
                "nothing of it can be solved for. Leave out projector=…, which keeps the old one, or train it."
            )
        self.folds: list[RidgeSums] = [
            RidgeSums(layer.in_features, layer.out_features, device=new_model.device) for _ in range(2)
        ]

    def add(self, number: int, view: PairedView) -> None:
        if view.tokens is not None and not view.tokens_reached.any():
            return
        one = KeptViews(FOLDS)
        one.add(0, view)
        sums = last_layer_sums(self.core, self.core.output_layer, one.views)
        if sums is None:
            raise AlignmentError(
                "The tokens of the new projector have no counterparts among the old ones, or are not what its last layer "
                "gives. Leave out projector=…, which keeps the old one, or train it."
            )
        self.folds[min(number % FOLDS, 1)].add_(sums)
        self.kept.add(number, view)

    def candidates(self) -> list[Candidate]:
        solution = solve(self.folds)

        def build(with_held_out: bool) -> nn.Module:
            weight, bias = solution.weight, solution.bias
            if not with_held_out:
                weight, bias = solution.path.map(solution.regularisation)
            module = copy.deepcopy(self.core)
            module.output_layer.weight.copy_(weight)
            module.output_layer.bias.copy_(bias)
            return module

        share = explained_variance(build(False), self.kept.held_out())
        return [Candidate("tokens", solution.regularisation, build, share, {"drawn_to": "zero"})]

    def write(self, module: nn.Module, model: AnyVlmForConditionalGeneration, processor: AnyVlmProcessor) -> None:
        """Put the last layer that was solved for into a model."""
        core_projector(model.multi_modal_projector).output_layer.load_state_dict(module.output_layer.state_dict())
