"""Ridge regression from a stream: a linear map with a bias, from sums alone.

Samples are never kept. What a least-squares fit needs of them, and what the error of *any* linear map on them needs, are
the means and the centred second moments, which are of one size however many samples there were, and which add up
(Chan, Golub & LeVeque 1983, "Algorithms for computing the sample variance"). Samples of a held-out set are kept as sums of
their own. Sums are float64: squares of float32 features lose half their digits, and neighbouring features are nearly
collinear.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch


logger = logging.getLogger(__name__)

#: Penalties that are tried, as multiples of the mean variance of the features.
REGULARISATIONS = tuple(10.0 ** (exponent / 2) for exponent in range(-16, 7))
#: The time of a solve grows with the cube of the width; from here on it is told.
_WIDE = 4096


class RidgeSums:
    """Means and centred second moments of samples `x` `(n, in_features)` and `y` `(n, out_features)`.

    Args:
        in_features: Width of `x`.
        out_features: Width of `y`.
        device: Where the sums are kept. A device without float64 (mps) leaves them on the CPU.

    Attributes:
        weight: Sum of the samples' weights; their number where none were given.
        mean_x, mean_y: `(in_features,)`, `(out_features,)`.
        xx: `(in_features, in_features)`, sum of products of centred `x`.
        xy: `(in_features, out_features)`.
        yy: `(out_features,)`, sum of squares of centred `y`.
    """

    def __init__(self, in_features: int, out_features: int, device: torch.device | str = "cpu"):
        device = torch.device(device)
        options = {"dtype": torch.float64, "device": "cpu" if device.type == "mps" else device}
        self.weight = 0.0
        self.mean_x, self.mean_y = torch.zeros(in_features, **options), torch.zeros(out_features, **options)
        self.xx = torch.zeros(in_features, in_features, **options)
        self.xy = torch.zeros(in_features, out_features, **options)
        self.yy = torch.zeros(out_features, **options)

    @torch.no_grad()
    def update(self, x: torch.Tensor, y: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Add samples.

        Args:
            x: `(n, in_features)`, any floating dtype and device.
            y: `(n, out_features)`.
            weights: `(n,)`, at least 0; a sample of weight 2 counts as two. Default: 1.

        Raises:
            ValueError: shapes that do not fit, values that are not finite, or a negative weight.
        """
        if x.ndim != 2 or y.ndim != 2 or len(x) != len(y):
            raise ValueError(f"x and y must be (n, features) with one n, got {tuple(x.shape)} and {tuple(y.shape)}.")
        if (x.shape[1], y.shape[1]) != tuple(self.xy.shape):
            raise ValueError(f"These sums are of widths {tuple(self.xy.shape)}, got {x.shape[1]} and {y.shape[1]}.")
        if len(x) == 0:
            return
        # float64 is made on the sums' device: the samples' may have none.
        x, y = (part.to(self.xx.device).to(torch.float64) for part in (x, y))
        if not (torch.isfinite(x).all() and torch.isfinite(y).all()):
            raise ValueError(
                "Features are not finite (NaN or infinite). Look at the vision tower: in float16 large activations "
                "overflow; load it in float32 or bfloat16."
            )
        if weights is None:
            total = float(len(x))
            mean_x, mean_y = x.mean(0), y.mean(0)
            x, y = x - mean_x, y - mean_y
        else:
            weights = weights.to(self.xx.device).to(torch.float64)
            if weights.shape != (len(x),) or not bool((weights >= 0).all()):
                raise ValueError("weights must be (n,) and at least 0.")
            total = float(weights.sum())
            if total == 0:
                return
            mean_x, mean_y = weights @ x / total, weights @ y / total
            root = weights.sqrt().unsqueeze(1)
            x, y = (x - mean_x) * root, (y - mean_y) * root
        self._shift(total, mean_x, mean_y)
        self.xx.addmm_(x.T, x)
        self.xy.addmm_(x.T, y)
        self.yy += y.square().sum(0)

    def _shift(self, weight: float, mean_x: torch.Tensor, mean_y: torch.Tensor) -> None:
        """Move the means towards those of other samples, and add what the distance of the means adds to the moments."""
        combined = self.weight + weight
        step_x, step_y = mean_x - self.mean_x, mean_y - self.mean_y
        factor = self.weight * weight / combined
        self.xx.addr_(step_x, step_x, alpha=factor)
        self.xy.addr_(step_x, step_y, alpha=factor)
        self.yy.add_(step_y.square(), alpha=factor)
        self.mean_x += step_x * (weight / combined)
        self.mean_y += step_y * (weight / combined)
        self.weight = combined

    def add_(self, other: "RidgeSums") -> "RidgeSums":
        """Add the samples of other sums of the same widths; returns itself."""
        if other.weight:
            self._shift(other.weight, other.mean_x, other.mean_y)
            self.xx += other.xx
            self.xy += other.xy
            self.yy += other.yy
        return self

    def __add__(self, other: "RidgeSums") -> "RidgeSums":
        """The sums of both sets of samples."""
        return RidgeSums(*self.xy.shape, device=self.xx.device).add_(self).add_(other)

    def minus_map(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> "RidgeSums":
        """The sums of the same samples with `y` less what a linear map makes of `x`."""
        weight, bias = self._float64(weight, bias)
        left = RidgeSums(*self.xy.shape, device=self.xx.device)
        mapped = self.xx @ weight.T
        left.weight, left.mean_x, left.xx = self.weight, self.mean_x.clone(), self.xx.clone()
        left.mean_y = self.mean_y - weight @ self.mean_x - bias
        left.xy = self.xy - mapped
        left.yy = (self.yy - 2 * (weight.T * self.xy).sum(0) + (weight.T * mapped).sum(0)).clamp(min=0)
        return left

    def mapped(self, weight: torch.Tensor, of_mapped: "RidgeSums") -> "RidgeSums":
        """The sums of the same samples with `y` mapped linearly.

        Args:
            weight: `(new out_features, out_features)`.
            of_mapped: Sums with no `x` of the mapped `y` (a bias included), which say what a map alone does not.
        """
        weight = weight.to(self.xx.device).to(torch.float64)
        mapped = RidgeSums(0, 0, device=self.xx.device)
        mapped.weight, mapped.mean_x, mapped.xx, mapped.xy = self.weight, self.mean_x, self.xx, self.xy @ weight.T
        mapped.mean_y, mapped.yy = of_mapped.mean_y, of_mapped.yy
        return mapped

    def squared_error(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> float:
        """Sum over samples and outputs of `(weight @ x + bias - y) ** 2`, of the samples that were added."""
        left = self.minus_map(weight, bias)
        return float(left.yy.sum() + left.weight * left.mean_y.square().sum())

    def explained_variance(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> float:
        """Share of the variance of `y` about its own mean that the map predicts, over all outputs; below 0 if the mean
        would do better."""
        return self._share(self.squared_error(weight, bias))

    def _share(self, squared_error: float) -> float:
        scatter = float(self.yy.sum())
        if scatter <= 0:
            return 1.0 if squared_error <= 0 else float("-inf")
        return 1.0 - squared_error / scatter

    def _float64(self, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        weight = weight.to(self.xx.device).to(torch.float64)
        bias = torch.zeros_like(self.mean_y) if bias is None else bias.to(self.xx.device).to(torch.float64)
        return weight, bias


@dataclass
class RidgeSolution:
    """A linear map.

    Args:
        weight: `(out_features, in_features)`, float64.
        bias: `(out_features,)`, float64.
        regularisation: The chosen penalty, as a multiple of the mean variance of the features.
        explained_variance: Of this penalty on held-out samples, before the held-out samples were added to the fit.
        candidates: `{"regularisation", "explained_variance"}` of each penalty that was tried.
        path: The maps fitted without the first fold.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    regularisation: float
    explained_variance: float
    candidates: list[dict] = field(default_factory=list)
    path: "RidgePath | None" = None


def penalty(sums: RidgeSums, regularisation: float) -> float:
    """The ridge penalty that a multiple of the features' mean variance is: what scikit-learn calls `alpha`."""
    return regularisation * float(sums.xx.diagonal().mean())


def fit(
    sums: RidgeSums, regularisation: float, prior: tuple[torch.Tensor, torch.Tensor] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight `(out_features, in_features)` and bias `(out_features,)` for one penalty; infinity gives `prior`.

    Args:
        prior: Weight and bias towards which the map is drawn. Only the weight is penalised. Default: zero.
    """
    left = sums if prior is None else sums.minus_map(*prior)
    if regularisation == float("inf") or not bool((sums.xx.diagonal() > 0).any()):
        weight = torch.zeros_like(sums.xy).T
    else:
        matrix = sums.xx.clone()
        matrix.diagonal().add_(penalty(sums, regularisation))
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if bool(failed):  # no penalty, or nearly none, and fewer samples than features
            values, vectors = torch.linalg.eigh(matrix)
            floor = float(values[-1]) * len(values) * torch.finfo(values.dtype).eps
            inverse = torch.where(values > floor, 1 / values.clamp(min=floor), 0)
            weight = (vectors @ (inverse.unsqueeze(1) * (vectors.T @ left.xy))).T
        else:
            weight = torch.cholesky_solve(left.xy, factor).T
    bias = left.mean_y - weight @ left.mean_x
    return _added(weight, bias, prior)


class RidgePath:
    """The maps of all penalties for the same samples, of one eigendecomposition (about 2 s for 2,048 features).

    With `xx = Q diag(e) Q'` a map is `Q diag(1 / (e + alpha)) Q' xy`, and its error on other samples a quadratic form in
    `1 / (e + alpha)`.

    Args:
        sums: The samples.
        prior: As for `fit`.
    """

    def __init__(self, sums: RidgeSums, prior: tuple[torch.Tensor, torch.Tensor] | None = None):
        self.prior = prior
        self.sums = sums if prior is None else sums.minus_map(*prior)
        values, self.vectors = torch.linalg.eigh(self.sums.xx)
        self.values = values.clamp(min=0)
        self.turned = self.vectors.T @ self.sums.xy
        largest = max(float(self.values[-1]), torch.finfo(values.dtype).tiny)
        self.floor = largest * len(values) * torch.finfo(values.dtype).eps

    def _inverse(self, regularisation: float) -> torch.Tensor:
        if regularisation == float("inf"):
            return torch.zeros_like(self.values)
        return 1 / (self.values + max(penalty(self.sums, regularisation), self.floor))

    def map(self, regularisation: float) -> tuple[torch.Tensor, torch.Tensor]:
        """As `fit`."""
        weight = (self.vectors @ (self._inverse(regularisation).unsqueeze(1) * self.turned)).T
        bias = self.sums.mean_y - weight @ self.sums.mean_x
        return _added(weight, bias, self.prior)

    def squared_errors(self, held_out: RidgeSums, regularisations: Sequence[float]) -> torch.Tensor:
        """Of other samples, summed over these and the outputs, for each penalty: `(len(regularisations),)`."""
        held_out = held_out if self.prior is None else held_out.minus_map(*self.prior)
        # Moments about the mean of the samples fitted to: the bias follows from that.
        step_x, step_y = held_out.mean_x - self.sums.mean_x, held_out.mean_y - self.sums.mean_y
        step = self.vectors.T @ step_x
        turned_xx = self.vectors.T @ held_out.xx @ self.vectors + held_out.weight * torch.outer(step, step)
        turned_xy = self.vectors.T @ held_out.xy + held_out.weight * torch.outer(step, step_y)
        of_mean = held_out.yy.sum() + held_out.weight * step_y.square().sum()
        linear = (self.turned * turned_xy).sum(1)
        quadratic = (self.turned @ self.turned.T) * turned_xx
        errors = []
        for regularisation in regularisations:
            inverse = self._inverse(regularisation)
            errors.append(of_mean - 2 * (inverse @ linear) + inverse @ (quadratic @ inverse))
        return torch.stack(errors).clamp(min=0)


def _added(weight: torch.Tensor, bias: torch.Tensor, prior: tuple | None) -> tuple[torch.Tensor, torch.Tensor]:
    return (weight, bias) if prior is None else (prior[0].to(weight) + weight, prior[1].to(bias) + bias)


def solve(
    folds: Sequence[RidgeSums],
    regularisations: Sequence[float] = REGULARISATIONS,
    prior: tuple[torch.Tensor, torch.Tensor] | None = None,
    validated: int | None = None,
) -> RidgeSolution:
    """Choose the penalty by samples that were held out, then fit to all of them.

    Args:
        folds: Sums of disjoint sets of samples, at least two. Tokens of one picture belong into one set.
        regularisations: Penalties to try, as multiples of the features' mean variance (the scale of the features, and how
            many samples there are, then make no difference to what a number means).
        prior: Weight and bias towards which the map is drawn; an infinite penalty keeps them. Default: zero.
        validated: How many folds are held out, one after the other, each for an eigendecomposition (about 2 s for 2,048
            features). Default: all up to 1,024 features, else the first.

    Raises:
        ValueError: fewer than two folds with samples.
    """
    folds = [sums for sums in folds if sums.weight > 0]
    if len(folds) < 2:
        raise ValueError("Nothing can be held out of fewer than two sets of samples. Give more pictures.")
    if validated is None:
        validated = len(folds) if len(folds[0].xx) <= 1024 else 1
    width = len(folds[0].xx)
    if width > _WIDE:
        seconds = 3 * validated * (width / 2048) ** 3
        logger.warning("Solving for a map of %d features takes about %.0f minutes of one core.", width, seconds / 60)
    errors, scatter, first = torch.zeros(len(regularisations), dtype=torch.float64), 0.0, None
    for index in range(min(validated, len(folds))):
        train = total(folds[:index] + folds[index + 1 :])
        path = RidgePath(train, prior)
        errors += path.squared_errors(folds[index], regularisations).cpu()
        scatter += float(folds[index].yy.sum())
        first = first or path
    shares = [1 - float(error) / scatter if scatter > 0 else 0.0 for error in errors]
    best = max(range(len(shares)), key=shares.__getitem__)
    weight, bias = fit(total(folds), regularisations[best], prior)
    candidates = [
        {"regularisation": value, "explained_variance": share} for value, share in zip(regularisations, shares)
    ]
    return RidgeSolution(weight, bias, regularisations[best], shares[best], candidates, first)


def total(folds: Sequence[RidgeSums]) -> RidgeSums:
    """The sums of the samples of all folds."""
    together = RidgeSums(*folds[0].xy.shape, device=folds[0].xx.device)
    for sums in folds:
        together.add_(sums)
    return together
