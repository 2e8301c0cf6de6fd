"""A vision tower, a projector and a causal language model, as one transformers model without a loss."""

from dataclasses import fields
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import can_return_tuple

from ..configuration.configuration_anyvlm import AnyVlmConfig
from ..configuration.image_views import has_newline
from ..configuration.part_exchange import load_exchanged
from .bottleneck_adapters import BottleneckAdapter, attach_bottleneck_adapters
from .cross_attention import TanhGate
from .fused_vision_towers import build_vision_part
from .fusion import FusionMixin, build_fusion, cached_length
from .image_attention import image_attention_masks
from .image_features import ImageFeaturesMixin
from .image_positions import positions_on_axes
from .language_models import (
    LanguageModelInterface,
    base_language_model,
    build_language_model,
    default_position_ids,
    resize_vocabulary,
)
from .norms import RmsNorm
from .packed_samples import packed_attention_masks, packed_samples
from .parts import restore_computed_tensors, trusted_config
from .picture_inputs import IMAGE_INPUTS
from .picture_states import PictureStates
from .projectors import build_projector


class AnyVlmModel(ImageFeaturesMixin, FusionMixin, PreTrainedModel):
    """The parts and how they are joined, without loss and generation. `forward` returns the last hidden states.

    The causal LM is held whole, at top level: its head, loss, caches and tied weights stay its own, and its weights
    keep their standard names under `language_model.`, as the tower's do under `vision_tower.`.
    """

    config_class = AnyVlmConfig
    config: AnyVlmConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _no_split_modules = ("CrossAttentionLayer",)

    def __init__(self, config: AnyVlmConfig):
        super().__init__(config)
        if config.vision_tower_spec is None or config.projector_config is None:
            raise ValueError(
                "This AnyVlmConfig does not say how its vision tower is read (vision_tower_spec, projector_config). "
                "Make the model with anyvlm.compose(vision=…, text=…), which measures it."
            )
        self.vision_tower = build_vision_part(config.vision_config)
        self.multi_modal_projector = build_projector(config.projector_config)
        if has_newline(config.image_views):
            self.image_newline = nn.Parameter(torch.empty(config.projector_config["out_features"]))
        self.language_model = build_language_model(config.text_config)
        self.fusion = build_fusion(config.fusion, config.image_fusion_config)
        self.attach_fusion()
        attach_bottleneck_adapters(self, config.bottleneck_adapters)
        self._check_widths()
        self.language_model_interface = LanguageModelInterface(self.language_model, config.language_model_spec)
        self.supports_gradient_checkpointing = (
            self.vision_tower.supports_gradient_checkpointing or self.language_model.supports_gradient_checkpointing
        )
        # Generation asks the outermost model whether the cache can be rolled back.
        self._is_stateful = self.language_model._is_stateful
        self.post_init()
        # `post_init` collects these from every child, used or not; FSDP fails on a class that no module has.
        present = {type(module).__name__ for module in self.modules()}
        self._no_split_modules = {name for name in self._no_split_modules if name in present}

    def _init_weights(self, module: nn.Module) -> None:
        """Only the projector, the newline and the fusion are ours; the parts initialise themselves."""
        if module is self and has_newline(self.config.image_views):
            nn.init.normal_(self.image_newline, std=len(self.image_newline) ** -0.5)
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, (nn.Conv2d, nn.LayerNorm, RmsNorm, TanhGate, BottleneckAdapter)):
            module.reset_parameters()

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """As transformers', and before it models that hold no tensor themselves but compute buffers of their layers
        (falcon_h1): in a model with code of its own, transformers takes those for done and leaves the buffers empty."""
        for part in self.modules():
            if isinstance(part, PreTrainedModel) and part is not self:
                own = (*part.parameters(recurse=False), *part.buffers(recurse=False))
                if not own and not all(getattr(buffer, "_is_hf_initialized", False) for buffer in part.buffers()):
                    part._init_weights(part)
        super().initialize_weights()

    def _check_widths(self) -> None:
        spec, projector_config = self.config.vision_tower_spec, self.config.projector_config
        if projector_config["in_features"] != spec["hidden_size"]:
            raise ValueError(
                f"The projector takes features of width {projector_config['in_features']}, but the vision tower gives "
                f"{spec['hidden_size']}. Set projector_config['in_features'] to {spec['hidden_size']}, or compose "
                "again and leave it out: it is measured."
            )
        if self.fusion is not None:
            expected = self.config.image_fusion_config["image_features"]
            if projector_config["out_features"] != expected:
                raise ValueError(
                    f"The projector gives tokens of width {projector_config['out_features']}, but the fusion takes "
                    f"{expected}. Set image_fusion_config['image_features'] to the same as projector_config['out_features']."
                )
            return
        embedding_width = getattr(self.get_input_embeddings(), "embedding_dim", None)
        if embedding_width is not None and projector_config["out_features"] != embedding_width:
            raise ValueError(
                f"The projector gives tokens of width {projector_config['out_features']}, but the language model's "
                f"embeddings are {embedding_width} wide. Set projector_config['out_features'] to {embedding_width}, "
                "or compose again and leave it out: it is measured."
            )

    # The language model answers for everything that concerns text.

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module | None:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.language_model.set_output_embeddings(new_embeddings)

    def get_decoder(self) -> nn.Module:
        return self.language_model.get_decoder()

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args, **kwargs) -> nn.Module:
        """As transformers'. Left to the language model, some of which keep the vocabulary's size in several places."""
        embeddings = resize_vocabulary(self.language_model, new_num_tokens, *args, **kwargs)
        # Some families build from a copy of the config they are given.
        self.config.text_config = self.language_model.config
        return embeddings

    def enable_input_require_grads(self) -> None:
        """For gradient checkpointing and adapters. Only the text's embeddings need it: transformers' version would also
        hook the tower's patch embedding, which for some towers (swin, hiera) does not return a tensor. Nor is it needed
        with cross-attention, whose checkpointing is never reentrant; some embeddings (git) are added to in place, which
        hooked ones refuse."""
        if self.fusion is None or self.fusion.changes_embeddings:
            self.language_model.enable_input_require_grads()

    def disable_input_require_grads(self) -> None:
        if self.fusion is None or self.fusion.changes_embeddings:
            self.language_model.disable_input_require_grads()

    def learn_about_language_model(self, learnt: dict[str, Any]) -> None:
        """Add to what is known about the language model (`language_model_spec`), here and in the config."""
        self.config.language_model_spec = {**(self.config.language_model_spec or {}), **learnt}
        self.language_model_interface = LanguageModelInterface(self.language_model, self.config.language_model_spec)

    def _language_model_inputs(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        pixel_values: torch.Tensor | None,
        attention_mask: Any,
        position_ids: torch.Tensor | None,
        past_key_values: Cache | None,
        mm_encoder_outputs: dict[str, Any] | None,
        picture_states: PictureStates | None = None,
        **kwargs,
    ) -> tuple[dict[str, Any], torch.Tensor | None, PictureStates | None]:
        """Arguments for the language model, the image tokens, and, for a fusion other than `embed`, whose they are.

        Without pictures the language model gets the ids or embeddings as they came: text alone is its own affair.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of input_ids and inputs_embeds.")
        processor_outputs = {key: kwargs.pop(key) for key in IMAGE_INPUTS if key in kwargs}
        encoded = self._encoded_pictures(pixel_values, mm_encoder_outputs, processor_outputs)
        pictures = [] if encoded is None else list(encoded.pooler_output)
        image_tokens = torch.cat(pictures) if pictures else None
        sequence = input_ids if inputs_embeds is None else inputs_embeds
        batch_size, sequence_length = sequence.shape[:2]
        extra, image_mask = {}, None
        samples = packed_samples(position_ids, attention_mask, past_key_values)
        self._check_picture_states(picture_states, past_key_values, sequence)
        if self.fusion is not None and picture_states is None:
            picture_states = self._picture_states(input_ids, inputs_embeds, pictures, samples)
        if picture_states is not None:
            if self.fusion.changes_embeddings:
                # The placeholder is an ordinary token here, with rows of its own in every table.
                extra = self.language_model_interface.embedding_arguments(self.language_model, input_ids)
                if inputs_embeds is None:
                    inputs_embeds = self.get_input_embeddings()(input_ids)
                inputs_embeds = self.fusion(inputs_embeds, picture_states, self._text_attention)
                input_ids = None
        elif image_tokens is not None:
            image_mask = self._image_mask(input_ids, inputs_embeds)
            num_placeholders = int(image_mask.sum())
            if num_placeholders != len(image_tokens):
                raise ValueError(
                    f"The pictures give {len(image_tokens)} image tokens, but the text has {num_placeholders} "
                    f"placeholders (token id {self.config.image_token_id}). Make pixel_values and input_ids in one "
                    "call of the processor, with one image token in the text for each picture."
                )
            if inputs_embeds is None:
                inputs_embeds = self.get_input_embeddings()(input_ids)
            extra = self.language_model_interface.embedding_arguments(
                self.language_model, input_ids, image_mask, self.config.text_config.pad_token_id or 0
            )
            inputs_embeds = inputs_embeds.masked_scatter(
                image_mask.unsqueeze(-1), image_tokens.to(inputs_embeds.device, inputs_embeds.dtype)
            )
            input_ids = None
        elif sequence_length > 1:
            self._refuse_missing_pictures(input_ids)
        self.language_model_interface.check_padding(attention_mask)
        if position_ids is None:
            past_length = cached_length(past_key_values) or 0
            position_ids = default_position_ids(attention_mask, past_length, sequence_length, sequence.device)
        picture_lengths = [] if image_mask is None else [len(tokens) for tokens in pictures]
        if self.config.image_attention != "causal":
            attention_mask = image_attention_masks(
                self.language_model,
                self.config.image_attention,
                sequence.shape[:2],
                attention_mask,
                position_ids,
                past_key_values,
                image_mask,
                picture_lengths,
                kwargs.pop("token_type_ids", None),
                samples,
            )
        if samples is not None:
            # With a cache, even an empty one, transformers takes a row for one sample.
            kwargs["use_cache"] = False
            attention_mask = self._packed_attention_mask(position_ids) if attention_mask is None else attention_mask
        if self.language_model_interface.spec["position_axes"] > 1:
            if past_key_values is None and image_mask is not None and not self.training and kwargs.get("use_cache"):
                past_key_values = DynamicCache(config=self.language_model.config)
            grids = None if encoded is None or image_mask is None else encoded.get("token_grids")
            position_ids = positions_on_axes(
                position_ids, past_key_values, image_mask, grids, picture_lengths, samples
            )
        arguments = self.language_model_interface.arguments(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **extra,
            **kwargs,
        )
        return arguments, image_tokens, picture_states

    def _packed_attention_mask(self, position_ids: torch.Tensor) -> Any:
        """The mask for samples packed in a row, if the language model must be given one.

        Raises:
            ValueError: its samples would not stay apart.
        """
        packing = self.language_model_interface.spec.get("packing")
        if packing is False:
            raise ValueError(
                "Samples packed in one row would change one another in this language model. Pass one sample in each row."
            )
        return packed_attention_masks(self.language_model, position_ids) if packing == "masks" else None

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | dict | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        picture_states: PictureStates | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Last hidden states `(batch, sequence, hidden_size)`. Arguments as in `AnyVlmForConditionalGeneration`."""
        arguments, _, picture_states = self._language_model_inputs(
            input_ids,
            inputs_embeds,
            pixel_values,
            attention_mask,
            position_ids,
            past_key_values,
            mm_encoder_outputs,
            picture_states=picture_states,
            **kwargs,
        )
        outputs = self._call_language_model(base_language_model(self.language_model), arguments, picture_states)
        known = {field.name: outputs.get(field.name) for field in fields(BaseModelOutputWithPast)}
        result = BaseModelOutputWithPast(**known)
        for name in outputs.keys() - known.keys():  # router logits
            result[name] = outputs[name]
        return result

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, output_loading_info: bool = False, **kwargs):
        """As transformers', but a weight that the checkpoint lacks is an error, never a random weight.

        Args:
            vision_tower, language_model: Another part, as `anyvlm.swap` takes it, in place of the checkpoint's own; takes
                the package. The processor is loaded with the same arguments.

        Raises:
            ValueError: the checkpoint lacks weights; the message names them. Or a part has code of its own, and
                `trust_remote_code=True` was not passed.
        """
        exchanged = load_exchanged("model", cls.from_pretrained, pretrained_model_name_or_path, kwargs)
        if exchanged is not None:
            # What was loaded of a checkpoint tells nothing about parts that came from elsewhere.
            return (exchanged, {}) if output_loading_info else exchanged
        kwargs = trusted_config(cls.config_class, pretrained_model_name_or_path, kwargs)
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
        )
        missing = sorted(info["missing_keys"])
        if missing:
            named = ", ".join(missing[:8]) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
            raise ValueError(
                f"{pretrained_model_name_or_path} lacks {len(missing)} weights of the model: {named}. They would be "
                "random, so nothing is loaded. Save the checkpoint again with save_pretrained, whole."
            )
        for part in (model.vision_tower, model.language_model):
            restore_computed_tensors(part)
        return (model, info) if output_loading_info else model

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoModel") -> None:
        """Nothing to do: Auto classes call this at every remote load, and the config writes `auto_map`."""
