"""anyvlm: any vision tower and any causal language model of transformers, as one real Hugging Face model."""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

from .composition.check import check
from .composition.compatibility_report import CompatibilityReport
from .composition.compose import compose
from .composition.errors import CompositionError
from .composition.native import from_native, to_native
from .configuration.configuration_anyvlm import CODE_VERSION as __version__
from .configuration.configuration_anyvlm import AnyVlmConfig
from .configuration.fused_vision_towers_config import FusedVisionTowersConfig
from .modeling.modeling_anyvlm import AnyVlmForConditionalGeneration, AnyVlmModel
from .processing.fused_image_processor import FusedImageProcessor
from .processing.processing_anyvlm import AnyVlmProcessor
from .swapping.report import SwapReport
from .swapping.swap import swap
from .swapping.verification import verify
from .swapping.verification_report import VerificationReport
from .swapping.while_loading import load_swapped_model as _load_swapped_model  # noqa: F401 - registers itself
from .training.collator import AnyVlmDataCollator
from .training.feature_cache import FeatureCache
from .training.trainer import AnyVlmTrainer


AutoConfig.register(AnyVlmConfig.model_type, AnyVlmConfig)
# All or none: with some of them, a checkpoint's classes and the package's would be mixed.
for _auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM):
    _auto_class.register(AnyVlmConfig, AnyVlmForConditionalGeneration)
AutoProcessor.register(AnyVlmConfig, AnyVlmProcessor)
# Found by its name; the config is only what transformers lists it under.
AutoImageProcessor.register(FusedVisionTowersConfig, image_processor_classes={"pil": FusedImageProcessor})

__all__ = [
    "AnyVlmConfig",
    "AnyVlmDataCollator",
    "AnyVlmForConditionalGeneration",
    "AnyVlmModel",
    "AnyVlmProcessor",
    "AnyVlmTrainer",
    "CompatibilityReport",
    "CompositionError",
    "FeatureCache",
    "SwapReport",
    "VerificationReport",
    "__version__",
    "check",
    "compose",
    "from_native",
    "swap",
    "to_native",
    "verify",
]
