"""How pictures reach the language model, other than in the place of tokens (`embed`): one table of the fusions.

A fusion is a module `model.fusion`. In the text each picture has one placeholder, an ordinary token with an embedding of its
own; the pictures' tokens go beside the text as `PictureStates`.
"""

import contextlib
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache

from .cross_attention import CrossAttentionFusion, checkpoint_with_pictures
from .gated_fusion import GatedFusion
from .language_models import base_language_model
from .picture_inputs import IMAGE_INPUTS
from .picture_states import PictureStates


FUSION_CLASSES: dict[str, type[nn.Module]] = {"cross_attention": CrossAttentionFusion, "gated": GatedFusion}


def build_fusion(fusion: str, image_fusion_config: dict | None) -> nn.Module | None:
    """The fusion's module; `None` for `"embed"`, which needs none.

    Raises:
        ValueError: an argument that the fusion does not take, or lacks.
    """
    if fusion == "embed":
        return None
    try:
        return FUSION_CLASSES[fusion](**(image_fusion_config or {}))
    except TypeError as error:
        raise ValueError(f"Fusion {fusion!r} cannot be built from {image_fusion_config}: {error}.") from error


def cached_length(cache: Any) -> int | None:
    """How many tokens a cache holds; `None` where it cannot tell, as a recurrent state cannot."""
    if not isinstance(cache, Cache):
        return None
    try:
        return int(cache.get_seq_length())
    except ValueError:  # how a cache of recurrent layers alone answers
        return None


class FusionMixin:
    """What a model does for its fusion; nothing where that is `embed`."""

    def attach_fusion(self) -> None:
        """Give the fusion its places in the language model; again after the language model was exchanged."""
        if self.fusion is not None and not self.fusion.changes_embeddings:
            self.fusion.attach(self.language_model)

    def _set_gradient_checkpointing(self, enable: bool = True, gradient_checkpointing_func=checkpoint, **kwargs):
        """As transformers'; layers that are computed again see the pictures that they saw first."""
        if enable and self.fusion is not None and not self.fusion.changes_embeddings:
            gradient_checkpointing_func = checkpoint_with_pictures(gradient_checkpointing_func)
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, **kwargs)

    def encode_pictures(
        self,
        input_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        **processor_outputs,
    ) -> PictureStates | None:
        """The `picture_states` of a batch, for a fusion other than `embed`; `None` without pictures.

        `generate` does this by itself. Whoever writes a decoding loop with a cache passes
        `picture_states=states.window(start, length)` with every call, for the `length` tokens from `start` on.
        """
        processor_outputs = {key: value for key, value in processor_outputs.items() if key in IMAGE_INPUTS}
        encoded = self._encoded_pictures(pixel_values, mm_encoder_outputs, processor_outputs)
        pictures = [] if encoded is None else list(encoded.pooler_output)
        return self._picture_states(input_ids, inputs_embeds, pictures)

    def _picture_states(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        pictures: list[torch.Tensor],
        samples: torch.Tensor | None = None,
    ) -> PictureStates | None:
        if pictures:
            end = self.fusion.forget_after
            ends = None if end is None else self._token_mask(end, input_ids, inputs_embeds)
            return PictureStates.from_pictures(pictures, self._image_mask(input_ids, inputs_embeds), ends, samples)
        self._refuse_missing_pictures(input_ids)
        if self.fusion.needs_pictures:
            return None
        return PictureStates.without_pictures(
            input_ids if inputs_embeds is None else inputs_embeds, self.config.image_fusion_config["image_features"]
        )

    def _call_language_model(
        self, language_model: nn.Module, arguments: dict[str, Any], picture_states: PictureStates | None
    ):
        """Run the language model, or the model below its head, with what `_language_model_inputs` returned."""
        if picture_states is None or self.fusion.changes_embeddings:
            fusing = contextlib.nullcontext()
        else:
            fusing = self.fusion.running(picture_states, self._text_attention)
        with fusing:
            outputs = language_model(**arguments, return_dict=True)
        cache = outputs.get("past_key_values")
        if picture_states is not None and picture_states.tokens.shape[1] and isinstance(cache, Cache):
            cache.follows_pictures = True
        return outputs

    @property
    def _text_attention(self) -> str | None:
        return base_language_model(self.language_model).config._attn_implementation

    def _check_picture_states(self, picture_states: PictureStates | None, cache: Any, input_ids: torch.Tensor) -> None:
        """Raises:
        ValueError: states of another text, or none although the cached text had pictures.
        """
        if picture_states is None:
            if getattr(cache, "follows_pictures", False):
                raise ValueError(
                    "The cached text has pictures, which the next tokens are to see too. Pass "
                    "picture_states=states.window(start, length) for the tokens passed, with "
                    "states = model.encode_pictures(**inputs) of the prompt; generate does so by itself."
                )
            return
        if self.fusion is None:
            raise ValueError("picture_states go with a fusion other than 'embed'. Pass pixel_values.")
        expected, found = tuple(input_ids.shape[:2]), tuple(picture_states.pictures_shown.shape)
        if expected != found:
            raise ValueError(
                f"picture_states are for {found} tokens (batch, sequence), but {expected} were passed. Take the part that "
                "belongs to them: states.window(start, length)."
            )
