"""A model below its head, for trainers that apply the head themselves."""

from collections.abc import Callable
from typing import Any

from transformers.modeling_outputs import BaseModelOutputWithPast


class BelowHead:
    """What `model.base_model` is: called with the model's inputs, it returns the last hidden states.

    TRL's trainers call it and apply the head to pieces of the result, so that the logits never are in memory all at once.
    It is no module, so that every weight keeps its one name; whatever else transformers asks a base model is the model's.
    """

    def __init__(self, model):
        self._model = model

    def __call__(self, *args, **kwargs) -> BaseModelOutputWithPast:
        """As `AnyVlmModel.forward`.

        Raises:
            ValueError: tokens of the prompt see later ones, and nothing says where the answer begins.
        """
        prefix = self._model.config.image_attention == "prefix"
        if prefix and self._model.training and kwargs.get("token_type_ids") is None:
            raise ValueError(
                'With image_attention="prefix" the answer begins where the labels do, which this trainer keeps to itself: '
                "all would count as prompt, and the answer be seen before it is predicted. Train with AnyVlmTrainer or "
                "transformers' Trainer and anyvlm.AnyVlmDataCollator, or compose with another image_attention."
            )
        return self._model.forward_below_head(*args, **kwargs)

    @property
    def get_image_features(self) -> Callable[..., Any]:
        return self._model.get_image_features

    @property
    def _tp_plan(self) -> dict[str, str]:
        return self._model._tp_plan

    @property
    def _pp_plan(self) -> dict[str, Any]:
        return self._model._pp_plan
