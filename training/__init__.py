"""Training: the collator, `AnyVlmTrainer`, and what both take. See docs/training.md."""

from .collator import AnyVlmDataCollator
from .data.augmentation import Augmentation
from .data.few_shot import FewShot, few_shot_messages
from .data.opening import open_training_data
from .data.samples import open_pictures
from .data.sources import load_training_data
from .domains import MixedDomains, without_answers
from .feature_cache import FeatureCache
from .finite_loss import FiniteLossGuard
from .forgetting import ForgettingCallback, text_perplexity
from .objectives.base import Objective, ObjectiveBatch
from .objectives.contrastive import ContrastiveObjective
from .objectives.domain_adversarial import DomainAdversarialObjective
from .objectives.feature_distillation import FeatureDistillationObjective
from .objectives.heads import load_heads
from .objectives.matching import MatchingObjective
from .objectives.registry import build_losses
from .objectives.text_kl import TextKLObjective
from .objectives.weights import UncertaintyMixing, loss_weight
from .packing import enable_packing
from .parts.adapters import add_adapters
from .parts.bottleneck import add_bottleneck_adapters
from .parts.merging import merge_adapters
from .parts.trained_parts import TrainedParts, train_parts
from .safe_checkpoints import SafeCheckpointsMixin, last_complete_checkpoint
from .semi_supervised import SemiSupervisedObjective, WithUnlabelled
from .text_replay import cut_texts, mix_text_replay, put_texts_beside
from .trainer import AnyVlmTrainer


__all__ = [
    "AnyVlmDataCollator",
    "AnyVlmTrainer",
    "Augmentation",
    "ContrastiveObjective",
    "DomainAdversarialObjective",
    "FeatureCache",
    "FeatureDistillationObjective",
    "FewShot",
    "FiniteLossGuard",
    "ForgettingCallback",
    "MatchingObjective",
    "MixedDomains",
    "Objective",
    "ObjectiveBatch",
    "SafeCheckpointsMixin",
    "SemiSupervisedObjective",
    "TextKLObjective",
    "TrainedParts",
    "UncertaintyMixing",
    "WithUnlabelled",
    "add_adapters",
    "add_bottleneck_adapters",
    "build_losses",
    "cut_texts",
    "enable_packing",
    "few_shot_messages",
    "last_complete_checkpoint",
    "load_heads",
    "load_training_data",
    "loss_weight",
    "merge_adapters",
    "mix_text_replay",
    "open_pictures",
    "open_training_data",
    "put_texts_beside",
    "text_perplexity",
    "train_parts",
    "without_answers",
]
