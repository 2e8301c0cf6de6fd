"""The composed model with loss and generation."""

from dataclasses import dataclass, fields
from typing import Any

import torch
from transformers import GenerationMixin, LogitsProcessor, LogitsProcessorList
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling
from transformers.utils import ModelOutput, can_return_tuple

from .base_model import AnyVlmModel
from .below_head import BelowHead
from .fusion import cached_length
from .image_attention import answer_token_types
from .image_features import AnyVlmImageFeatures
from .language_models import labelled_positions
from .packed_samples import packed_samples
from .picture_inputs import IMAGE_INPUTS
from .picture_states import PictureStates


@dataclass
class AnyVlmCausalLMOutput(ModelOutput):
    """Output of `AnyVlmForConditionalGeneration`.

    What the language model returns beyond these fields (router logits, another kind of cache) is kept under its own
    name.

    Args:
        loss: The language model's own loss, scalar, with its auxiliary loss where it has one.
        logits: `(batch, positions, vocab_size)`. With `labels`, only the positions that predict a label.
        past_key_values: The language model's cache.
        hidden_states: Hidden states of the language model, if asked for.
        attentions: Attentions of the language model, if asked for.
        image_hidden_states: Projected image features, `(all image tokens of the batch, width)`.
        image_features: What `get_image_features` gave, if asked for.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    image_hidden_states: torch.Tensor | None = None
    image_features: AnyVlmImageFeatures | None = None


class ImageTokenSuppressor(LogitsProcessor):
    """Keeps placeholders out of what is generated.

    transformers' `SuppressTokensLogitsProcessor` compares the whole vocabulary with the token at every step, which was
    3-4 % of decoding with 32,000 tokens; this touches one column.
    """

    def __init__(self, token_id: int):
        self.token_id = token_id

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if self.token_id >= scores.shape[-1]:  # mllama's image token has an embedding, but no row in the head
            return scores
        index = torch.tensor([self.token_id], device=scores.device)
        return scores.index_fill(-1, index, -float("inf"))


class AnyVlmForConditionalGeneration(AnyVlmModel, GenerationMixin):
    """The composed model with loss and generation."""

    # Trainer divides by the number of labels in all accumulated batches; the LM's loss takes that number.
    accepts_loss_kwargs = True

    @property
    def base_model(self) -> BelowHead:
        """The model below its head."""
        return BelowHead(self)

    def forward_below_head(self, *args, **kwargs) -> BaseModelOutputWithPast:
        """As `AnyVlmModel.forward`."""
        return super().forward(*args, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | dict | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        picture_states: PictureStates | None = None,
        image_grid_thw: torch.Tensor | None = None,
        spatial_shapes: torch.Tensor | None = None,
        pixel_attention_mask: torch.Tensor | None = None,
        target_sizes: torch.Tensor | None = None,
        image_position_ids: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        qformer_input_ids: torch.Tensor | None = None,
        qformer_attention_mask: torch.Tensor | None = None,
        original_sizes: torch.Tensor | None = None,
        num_video_frames: torch.Tensor | None = None,
        tower_features: torch.Tensor | None = None,
        tower_grids: torch.Tensor | None = None,
        output_image_features: bool = False,
        **kwargs,
    ) -> AnyVlmCausalLMOutput:
        """Run the model.

        Args:
            input_ids: `(batch, sequence)`. Image tokens stand where picture features go, in the pictures' order.
            pixel_values: `(num_images in the whole batch, channels, height, width)`, or all views of all pictures; left out
                for text alone.
            attention_mask: `(batch, sequence)`, 0 at padding on either side; or a mask the language model takes.
            position_ids: `(batch, sequence)`. Default: padding is not counted.
            inputs_embeds: `(batch, sequence, width)` in place of `input_ids`.
            labels: `(batch, sequence)`, -100 where nothing is to be predicted. Shifted inside, as in any causal LM.
            logits_to_keep: Positions whose logits are wanted, as in transformers; 0 for all. Default: all without
                labels, and with labels only where there is one, so that pictures and prompts cost no row of the
                vocabulary's size.
            mm_encoder_outputs: `{"image": …}`, what `get_image_features` returned, in place of `pixel_values`.
            picture_states: For a fusion other than `embed`, what `encode_pictures` returned, in place of both.
            image_grid_thw, spatial_shapes, pixel_attention_mask, target_sizes, image_position_ids, image_sizes: What the
                tower's own image processor gives beside `pixel_values`, see `get_image_features`.
            original_sizes: `(num_images, 2)`, height and width of each picture, where pictures are cut into views.
            num_video_frames: `(num_images + num_videos,)`, where there are videos: the frames of each, 0 for a picture.
            tower_features, tower_grids: What a frozen tower gave for these pictures before, in place of their pixels, see
                `get_image_features`.
            token_type_ids: `(batch, sequence)`, for `image_attention="prefix"`: 0 in the prompt, 1 in the answer. Default:
                the answer begins with the first label; without labels all is prompt.
            qformer_input_ids, qformer_attention_mask: `(num_images, length)`, the instruction for each picture, for a
                projector that reads it.
            output_image_features: Return the tower's features and each picture's tokens too, with their graph, for losses
                on them.
            **kwargs: Handed to the language model (`num_items_in_batch`, `output_hidden_states`, …).

        Raises:
            ValueError: placeholders and pictures do not agree; nothing is supervised.
        """
        interface = self.language_model_interface
        if labels is not None and self.config.image_attention == "prefix" and kwargs.get("token_type_ids") is None:
            samples = packed_samples(position_ids, attention_mask, past_key_values)
            kwargs["token_type_ids"] = answer_token_types(labels, samples)
        if labels is not None and logits_to_keep is None and interface.takes_logits_to_keep:
            logits_to_keep, labels = labelled_positions(labels, interface.keeps_logits_per_sample)
        processor_outputs = {
            "image_grid_thw": image_grid_thw,
            "spatial_shapes": spatial_shapes,
            "pixel_attention_mask": pixel_attention_mask,
            "target_sizes": target_sizes,
            "image_position_ids": image_position_ids,
            "image_sizes": image_sizes,
            "qformer_input_ids": qformer_input_ids,
            "qformer_attention_mask": qformer_attention_mask,
            "original_sizes": original_sizes,
            "num_video_frames": num_video_frames,
            "tower_features": tower_features,
            "tower_grids": tower_grids,
        }
        if output_image_features:
            encoded = self._encoded_pictures(pixel_values, mm_encoder_outputs, processor_outputs)
            mm_encoder_outputs, pixel_values = None if encoded is None else {"image": encoded}, None
            processor_outputs = {}
        own_loss = interface.spec["own_loss"]
        num_items_in_batch = kwargs.pop("num_items_in_batch", None)
        arguments, image_tokens, picture_states = self._language_model_inputs(
            input_ids,
            inputs_embeds,
            pixel_values,
            attention_mask,
            position_ids,
            past_key_values,
            mm_encoder_outputs,
            picture_states=picture_states,
            labels=labels if own_loss else None,
            num_items_in_batch=num_items_in_batch if own_loss else None,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **processor_outputs,
            **kwargs,
        )
        outputs = self._call_language_model(self.language_model, arguments, picture_states)
        known = {field.name: outputs.get(field.name) for field in fields(AnyVlmCausalLMOutput)}
        known["image_hidden_states"] = image_tokens
        if output_image_features:
            known["image_features"] = (mm_encoder_outputs or {}).get("image")
        if labels is not None and not own_loss:
            # Decoders of encoder-decoder models expect labels that are shifted already, and no count of them.
            known["loss"] = self.loss_function(
                outputs.logits, labels, outputs.logits.shape[-1], num_items_in_batch=num_items_in_batch
            )
        result = AnyVlmCausalLMOutput(**known)
        for name in outputs.keys() - known.keys():
            result[name] = outputs[name]
        return result

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        picture_states: PictureStates | None = None,
        is_first_iteration: bool | None = False,
        use_cache: bool | None = None,
        prompt_length: int | None = None,
        **kwargs,
    ) -> dict[str, Any]:
        """The language model prepares its inputs by its own rules; pictures go along while the prompt is not cached, and
        with a fusion other than `embed` always.

        Args:
            prompt_length: With `image_attention="prefix"`: how many of `input_ids` are the prompt.
        """
        processor_outputs = {key: kwargs.pop(key) for key in IMAGE_INPUTS if key in kwargs}
        model_inputs = self.language_model.prepare_inputs_for_generation(
            input_ids,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            use_cache=use_cache,
            **kwargs,
        )
        # An assistant model's prompt is never its "first iteration", but its cache is empty then.
        past_key_values = kwargs.get("past_key_values")
        prompt_is_cached = past_key_values is None or past_key_values.get_seq_length() > 0
        if is_first_iteration or not use_cache or not prompt_is_cached:
            model_inputs["pixel_values"] = pixel_values
            model_inputs["mm_encoder_outputs"] = mm_encoder_outputs
            model_inputs.update(processor_outputs)
            if self.config.image_attention != "causal":
                # Made already for a static cache, but without blocks.
                model_inputs["attention_mask"] = kwargs.get("attention_mask")
            if prompt_length is not None:
                sequence = model_inputs.get("inputs_embeds")
                sequence = model_inputs["input_ids"] if sequence is None else sequence
                is_answer = torch.arange(sequence.shape[1], device=sequence.device) >= prompt_length
                model_inputs["token_type_ids"] = is_answer.long().expand(sequence.shape[:2])
        if picture_states is not None:
            given = model_inputs.get("input_ids")
            length = (model_inputs["inputs_embeds"] if given is None else given).shape[1]
            start = cached_length(past_key_values)
            if start is None:  # no cache, or a recurrent state, whose prompt is read in one piece
                start = 0 if is_first_iteration or not use_cache else picture_states.pictures_shown.shape[1]
            model_inputs["picture_states"] = picture_states.window(start, length)
        return model_inputs

    def _expand_multimodal_outputs(self, input_ids, mm_encoder_output: dict, *args, **kwargs) -> dict:
        """As transformers', which repeats a sample's pictures for its beams; their grids go along."""
        encoded = mm_encoder_output.get("image")
        grids = None if encoded is None else encoded.get("token_grids")
        if grids is not None:
            numbers = [torch.full((len(tokens), 1), index) for index, tokens in enumerate(encoded.pooler_output)]
            numbered = {"image": BaseModelOutputWithPooling(pooler_output=numbers)}
            order = super()._expand_multimodal_outputs(input_ids, numbered, *args, **kwargs)["image"].pooler_output
            encoded.token_grids = [grids[int(number[0])] for number in order]
        return super()._expand_multimodal_outputs(input_ids, mm_encoder_output, *args, **kwargs)

    def _maybe_prepare_encoder_kwargs_for_generation(
        self, inputs_tensor: torch.Tensor, model_kwargs: dict[str, Any], *args, **kwargs
    ) -> dict[str, Any]:
        """Pictures are encoded once, before the prompt. For a fusion other than `embed` they stay for every step."""
        if model_kwargs.get("tower_features") is not None and model_kwargs.get("pixel_values") is None:
            # transformers encodes pictures that come as pixels alone, and drops whatever else they came as.
            given = {key: model_kwargs.pop(key) for key in IMAGE_INPUTS if key in model_kwargs}
            model_kwargs["mm_encoder_outputs"] = {"image": self.get_image_features(**given, return_dict=True)}
        model_kwargs = super()._maybe_prepare_encoder_kwargs_for_generation(
            inputs_tensor, model_kwargs, *args, **kwargs
        )
        if self.fusion is not None and model_kwargs.get("picture_states") is None:
            is_embedded = inputs_tensor.ndim == 3
            model_kwargs["picture_states"] = self.encode_pictures(
                input_ids=None if is_embedded else inputs_tensor,
                inputs_embeds=inputs_tensor if is_embedded else None,
                mm_encoder_outputs=model_kwargs.pop("mm_encoder_outputs", None),
            )
        return model_kwargs

    def _expand_inputs_for_generation(self, expand_size: int = 1, **kwargs) -> tuple[torch.Tensor, dict[str, Any]]:
        """As transformers', for beams and several answers; samples keep their pictures."""
        if expand_size > 1 and kwargs.get("picture_states") is not None:
            kwargs["picture_states"] = kwargs["picture_states"].expand(expand_size)
        return super()._expand_inputs_for_generation(expand_size=expand_size, **kwargs)

    def _prepare_cache_for_generation(self, *args, **kwargs) -> None:
        """The kind of cache is the language model's choice (state-space models have one of their own)."""
        self.language_model._prepare_cache_for_generation(*args, **kwargs)

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config=None,
        logits_processor: LogitsProcessorList | None = None,
        *args,
        **kwargs,
    ):
        """As transformers' `generate`; the image token is never generated."""
        interface = self.language_model_interface
        interface.check_padding(kwargs.get("attention_mask"), generating=True)
        if not interface.spec["use_cache"]:
            kwargs["use_cache"] = False
        if self.config.image_attention != "causal":
            self._check_whole_prefill(generation_config, kwargs)
        if self.config.image_attention == "prefix":
            given = (inputs, kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
            kwargs["prompt_length"] = max((tensor.shape[1] for tensor in given if tensor is not None), default=0)
        processors = LogitsProcessorList(logits_processor or [])
        if self.config.image_token_id is not None:
            processors.append(ImageTokenSuppressor(self.config.image_token_id))
        return super().generate(inputs, generation_config, processors, *args, **kwargs)

    def _check_whole_prefill(self, generation_config, arguments: dict[str, Any]) -> None:
        """Raises `ValueError` if the prompt is to be read in chunks, whose tokens would not see the later ones."""
        config = self.generation_config if generation_config is None else generation_config
        if arguments.get("prefill_chunk_size") or getattr(config, "prefill_chunk_size", None):
            raise ValueError(
                f"With image_attention={self.config.image_attention!r} tokens of the prompt see later ones, so it cannot "
                "be read in chunks. Leave out prefill_chunk_size."
            )


__all__ = ["AnyVlmForConditionalGeneration", "AnyVlmModel"]
