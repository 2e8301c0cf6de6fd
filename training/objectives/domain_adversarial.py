"""Features by which the kinds of pictures cannot be told apart: Ganin & Lempitsky 2015; Ganin et al. 2016 (JMLR 17:59)."""

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import ProcessorMixin

from .base import Objective, ObjectiveBatch
from .picture_features import (
    composed_model,
    media_of,
    pooled_features,
    trained_features,
    view_features,
    views_of_pictures,
)


class _Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features: torch.Tensor, strength: float) -> torch.Tensor:
        ctx.strength = strength
        return features.view_as(features)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return -ctx.strength * gradient, None


def reverse_gradient(features: torch.Tensor, strength: float) -> torch.Tensor:
    """The features as they are; their gradient is multiplied by `-strength`."""
    return _Reversal.apply(features, strength)


def reversal_strength(progress: float, slope: float = 10.0) -> float:
    """From 0 at the beginning of the training to almost 1: a classifier that knows nothing yet should move nothing.

    Args:
        progress: From 0 to 1.
        slope: How fast it rises; 10 in the paper.
    """
    return 2 / (1 + math.exp(-slope * progress)) - 1


def classifier_gradient_penalty(classifier: nn.Module, features: torch.Tensor, domains: torch.Tensor) -> torch.Tensor:
    """Squared length of the gradient, by each picture's features, of how far the score of its domain is above the mean of
    the others'; mean over pictures, a scalar with graph to the classifier. Mescheder et al. 2018 (R1), who show that without
    it two that learn against each other may circle for ever.

    Args:
        features: `(num_pictures, hidden_size)`; their graph is not followed.
        domains: `(num_pictures,)`, int64.
    """
    features = features.detach().requires_grad_()
    with torch.enable_grad():
        scores = classifier(features)
        own = scores.gather(1, domains[:, None])[:, 0]
        margins = own - (scores.sum(1) - own) / (scores.shape[1] - 1)
        (gradient,) = torch.autograd.grad(margins.sum(), features, create_graph=True)
    return gradient.square().sum(1).mean()


class DomainAdversarialObjective(Objective):
    """A classifier learns to tell from the tower's pooled features of a picture of which domain it is; the gradient by which
    it learns reaches the tower reversed, so that the tower learns features that do not tell.

    Every sample with a picture names its domain in a column. Pictures of a domain for which there are no answers come in
    samples with a user's turn alone, in the same batches (`training.domains.MixedDomains`).

    Logs `accuracy`, the classifier's on the batch before each step, and `gradient_penalty`, where there is one. The former
    is a moving target: whether domains can still be told apart says only a new classifier
    (`benchmarks/domain_adaptation.py`).

    Args:
        model: What is trained; the width of its tower's features is read.
        domains: What stands in the column, two or more.
        column: Of a sample.
        hidden_features: Width of the classifier's two hidden layers.
        strength: Of the reversed gradient at the end of the training.
        slope: Of the ramp up to it.
        gradient_penalty: Of the classifier's squared gradient by the features (`classifier_gradient_penalty`), which keeps
            the two from circling; 0 in the paper. With 0.3 the classifier may learn ten times as fast as the tower.
        learning_rate: Of the classifier. Default: the trainer's.

    Raises:
        ValueError: fewer than two domains, or one twice; a negative penalty.
    """

    def __init__(
        self,
        model: nn.Module,
        domains: Sequence[Hashable],
        column: str = "domain",
        hidden_features: int = 256,
        strength: float = 1.0,
        slope: float = 10.0,
        gradient_penalty: float = 0.0,
        learning_rate: float | None = None,
    ):
        super().__init__(learning_rate)
        self.domains = list(domains)
        if len(self.domains) < 2 or len(set(self.domains)) < len(self.domains):
            raise ValueError(f"domains must name two or more different domains, got {self.domains}.")
        if gradient_penalty < 0:
            raise ValueError(f"gradient_penalty must be 0 or more, got {gradient_penalty}.")
        self.column = column
        self.gradient_penalty = gradient_penalty
        self.strength, self.slope = strength, slope
        in_features = composed_model(model).config.vision_tower_spec["hidden_size"]
        self.classifier = nn.Sequential(
            nn.Linear(in_features, hidden_features),
            nn.ReLU(),
            nn.Linear(hidden_features, hidden_features),
            nn.ReLU(),
            nn.Linear(hidden_features, len(self.domains)),
        )

    def collate(
        self, samples: Sequence[Mapping[str, Any]], batch: Mapping[str, Any], processor: ProcessorMixin
    ) -> dict[str, Any]:
        """`domains`: `(num_pictures + num_videos,)`, int64, the place in `domains` of each picture's.

        Raises:
            ValueError: a sample with a picture does not say its domain, or names an unknown one.
        """
        of_pictures = []
        for index, sample in enumerate(samples):
            number = sum(map(len, media_of(sample).values()))
            domain = sample.get(self.column)
            if number and domain not in self.domains:
                raise ValueError(
                    f"Sample {index} of the batch has {domain!r} in its column {self.column!r}, but the domains are "
                    f"{', '.join(map(repr, self.domains))}. Every sample with a picture needs one of these there."
                )
            of_pictures += [self.domains.index(domain)] * number if number else []
        return {"domains": torch.tensor(of_pictures)} if of_pictures else {}

    def forward(self, batch: ObjectiveBatch) -> torch.Tensor | None:
        """Cross-entropy of the classifier, mean over the pictures of the batch, and its penalty.

        Raises:
            ValueError: the tower is frozen.
        """
        features = trained_features(batch, "its features cannot come closer to each other")
        if features is None:
            return None
        config = composed_model(batch.model).config
        views, _ = view_features(config, batch.inputs, features)
        pooled = pooled_features(views, views_of_pictures(config, batch.inputs, len(views)))
        strength = self.strength * reversal_strength(batch.progress, self.slope)
        logits = self.classifier(reverse_gradient(pooled, strength))
        domains = batch.extra["domains"]
        batch.metrics["accuracy"] = (logits.detach().argmax(-1) == domains).float().mean()
        loss = nn.functional.cross_entropy(logits, domains)
        if self.gradient_penalty:
            # Of the classifier alone: the tower gets the reversed gradient and nothing else.
            penalty = classifier_gradient_penalty(self.classifier, pooled, domains)
            batch.metrics["gradient_penalty"] = penalty.detach()
            loss = loss + self.gradient_penalty * penalty
        return loss
