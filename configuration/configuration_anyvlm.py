"""Configuration of a composed vision-language model."""

import os
from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec
from transformers.utils import CONFIG_NAME, logging

from .checkpoint_code import AUTO_MAP, PART_MODULES, write_checkpoint_code
from .fused_vision_towers_config import FusedVisionTowersConfig
from .image_views import check_image_views
from .part_code import part_config, part_sources
from .video_frames import resolve_video_frames


logger = logging.get_logger(__name__)

#: Version of the code in this folder, written into every checkpoint. The package's version is the same number.
CODE_VERSION = "0.1.0"

FUSIONS = ("embed", "cross_attention", "gated")
IMAGE_ATTENTIONS = ("causal", "bidirectional", "prefix")
FEATURE_SELECT_STRATEGIES = ("default", "full")


class AnyVlmConfig(PreTrainedConfig):
    """Config of `AnyVlmForConditionalGeneration`. Made by `anyvlm.compose`; seldom written by hand.

    Args:
        vision_config: Config of the vision tower, of any type that `AutoModel` builds; or a `FusedVisionTowersConfig`.
        text_config: Config of the language model, of any type that `AutoModelForCausalLM` builds.
        vision_tower_spec: What the probe measured about the tower (`composition/probe.py`): how to call it, where its
            patches are, their width and their grid for one picture.
        language_model_spec: What the probe measured about the language model (`modeling/language_models.py`): what it
            cannot do (padding, cache) and by which conventions it is called. `None`: the usual ones.
        projector_config: `{"type": …, "in_features": …, "out_features": …, …}`, see `modeling/projectors.py`.
        fusion: How image features reach the language model. `"embed"`: they replace the embeddings of placeholders.
            `"cross_attention"`: tanh-gated layers before every k-th decoder layer (`modeling/cross_attention.py`).
            `"gated"`: a sigmoid gate mixes them into each text embedding (`modeling/gated_fusion.py`). With the last two
            a picture has one placeholder in the text.
        image_fusion_config: Arguments of the fusion's class; `None` for `"embed"`. (A config's `fusion_config` is
            transformers' own, for fused kernels.)
        image_token_id: The one token that holds the place of image features in `input_ids`.
        vision_feature_layer: `None` for the tower's `last_hidden_state`, an index into its `hidden_states`, or a list
            of such indices whose features are concatenated by channel (LLaVA's convention).
        vision_feature_select_strategy: `"default"` keeps the patches; `"full"` keeps every token of the tower, CLS
            and register tokens included.
        image_views: How a picture becomes views for the tower, see `configuration/image_views.py`. `None`: one view.
        image_attention: `"causal"`: image tokens attend as text tokens do. `"bidirectional"`: they also see the rest of
            their picture. `"prefix"`: the whole prompt sees itself, and the answer is causal
            (`modeling/image_attention.py`).
        bottleneck_adapters: Adapters behind layers (`modeling/bottleneck_adapters.py`), by name of the part.
        composed_from: Where the parts came from, for the model card: `{"vision": {"id": …, "license": …}, …}`.
        code_version: Version of the code that wrote the checkpoint. Another one than that in use is warned about.
    """

    model_type = "anyvlm"
    sub_configs_defaults: ClassVar[dict[str, Any]] = {
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="clip_vision_model"),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
    }
    #: What Trainer leaves out of predictions: of another length for every batch, or no tensors at all.
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "cache_params", "image_hidden_states"]
    # The inherited plan names the layers of a flat decoder, which this model does not have.
    base_model_fsdp_plan: ClassVar[dict[Any, str]] = {}

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    vision_tower_spec: dict | None = None
    language_model_spec: dict | None = None
    projector_config: dict | None = None
    fusion: str = "embed"
    image_fusion_config: dict | None = None
    image_token_id: int | None = None
    vision_feature_layer: int | list[int] | None = None
    vision_feature_select_strategy: str = "default"
    image_views: dict | None = None
    video_frames: dict | None = None
    image_attention: str = "causal"
    bottleneck_adapters: dict | None = None
    composed_from: dict | None = None
    code_version: str | None = None

    def __post_init__(self, **kwargs):
        for key in PART_MODULES:
            values = getattr(self, key)
            if isinstance(values, dict) and values.get("part_code"):
                setattr(self, key, part_config(key, values, __package__))
        if (
            isinstance(self.vision_config, dict)
            and self.vision_config.get("model_type") == FusedVisionTowersConfig.model_type
        ):
            self.vision_config = FusedVisionTowersConfig(**self.vision_config)
        super().__post_init__(**kwargs)
        _check_choice("fusion", self.fusion, FUSIONS)
        _check_choice("image_attention", self.image_attention, IMAGE_ATTENTIONS)
        if self.image_attention != "causal" and self.fusion != "embed":
            raise ValueError(
                f"image_attention={self.image_attention!r} is about image tokens in the text, and with "
                f'fusion={self.fusion!r} there are none. Use image_attention="causal".'
            )
        _check_choice("vision_feature_select_strategy", self.vision_feature_select_strategy, FEATURE_SELECT_STRATEGIES)
        check_image_views(self.image_views)
        resolve_video_frames(self.video_frames)
        if self.code_version is None:
            self.code_version = CODE_VERSION
        elif self.code_version != CODE_VERSION:
            logger.warning(
                f"This checkpoint was written by anyvlm {self.code_version}, and the code in use is anyvlm "
                f"{CODE_VERSION}. When `anyvlm` is imported its classes are used instead of the checkpoint's own; for "
                f"the exact code of the checkpoint, load it in a process that does not import `anyvlm`, or install "
                f"anyvlm=={self.code_version}."
            )

    def to_dict(self) -> dict[str, Any]:
        """As transformers', without the local paths and the foreign `auto_map` that sub-configs may carry."""
        output = super().to_dict()
        for key in self.sub_configs:
            if isinstance(output.get(key), dict):
                output[key].pop("_name_or_path", None)
                output[key].pop("auto_map", None)
                if output[key].get("part_code"):
                    output[key]["part_code"].pop("package", None)
        return output

    def to_json_file(self, json_file_path: str | os.PathLike, use_diff: bool = True) -> None:
        """Write the config and, beside a `config.json`, the code of the model.

        `save_pretrained` of the config and of the model, Trainer checkpoints and `push_to_hub` all come by here.
        """
        if os.path.basename(json_file_path) == CONFIG_NAME:
            self.auto_map = dict(AUTO_MAP)
            self.code_version = CODE_VERSION
            parts = {module: part_sources(getattr(self, key)) for key, module in PART_MODULES.items()}
            write_checkpoint_code(os.path.dirname(os.path.abspath(json_file_path)), parts)
        super().to_json_file(json_file_path, use_diff=use_diff)

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoConfig") -> None:
        """Nothing to do: Auto classes call this at every remote load, and `auto_map` is written by `to_json_file`."""


def _check_choice(name: str, value, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not known. Choose one of: {', '.join(map(repr, choices))}.")


__all__ = ["AnyVlmConfig"]
