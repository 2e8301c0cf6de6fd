"""Config of several vision towers that look at the same pictures (`modeling/fused_vision_towers.py`).

Checkpoints may not register types with `AutoConfig`, so `AnyVlmConfig` builds this config itself.
"""

from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig


VISION_FUSIONS = ("channel", "token")


class FusedVisionTowersConfig(PreTrainedConfig):
    """Several towers, their configs under the names `tower_0`, `tower_1`, …

    Args:
        tower_specs: `vision_tower_spec` of each tower.
        tower_channels: Channels of each tower's pictures, which stand one after another in those of the whole.
        vision_feature_layers: `vision_feature_layer` of each tower.
        vision_fusion: `"channel"` or `"token"`, see `modeling/fused_vision_towers.py`.
        tower_0, …: Config of each tower.
    """

    model_type = "anyvlm_vision_towers"
    base_model_fsdp_plan: ClassVar[dict[Any, str]] = {}

    tower_specs: list[dict] | None = None
    tower_channels: list[int] | None = None
    vision_feature_layers: list | None = None
    vision_fusion: str = "channel"

    def __post_init__(self, **kwargs):
        if self.vision_fusion not in VISION_FUSIONS:
            raise ValueError(
                f"vision_fusion={self.vision_fusion!r} is not known. Choose one of: "
                f"{', '.join(map(repr, VISION_FUSIONS))}."
            )
        for key in self._tower_names():
            tower = kwargs.pop(key)
            setattr(self, key, AutoConfig.for_model(**tower) if isinstance(tower, dict) else tower)
        super().__post_init__(**kwargs)

    def _tower_names(self) -> list[str]:
        return [f"tower_{index}" for index in range(len(self.tower_specs or ()))]

    @property
    def sub_configs(self) -> dict[str, type[PreTrainedConfig]]:
        """The number of towers is that of the instance, and so are the sub-configs that transformers asks for."""
        return {key: type(getattr(self, key)) for key in self._tower_names()}

    @property
    def towers(self) -> list[PreTrainedConfig]:
        return [getattr(self, key) for key in self._tower_names()]

    @property
    def num_channels(self) -> int:
        return sum(self.tower_channels)

    def to_dict(self) -> dict[str, Any]:
        """As transformers', without the local paths and the foreign `auto_map` that towers may carry."""
        output = super().to_dict()
        for key in self._tower_names():
            output[key].pop("_name_or_path", None)
            output[key].pop("auto_map", None)
        return output


__all__ = ["FusedVisionTowersConfig"]
