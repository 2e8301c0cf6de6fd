"""A head for text models that transformers has without one.

Of some vision-language models the text part is a model by itself (`Qwen2VLTextModel`), but the head belongs to the whole
(`Qwen2VLForConditionalGeneration`), so that `AutoModel` builds the part and `AutoModelForCausalLM` does not. With the head
of such a whole, a linear map, it is a causal LM like any other. Only for models that take text alone, embeddings and a
cache; whether one is causal is found by running it (`composition/language_model_probe.py`).
"""

import inspect

import torch
from torch import nn
from transformers import MODEL_MAPPING, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple


def text_model_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The model without a head that `AutoModel` builds of this config, if a head is all it lacks."""
    if config.is_encoder_decoder or type(config) not in MODEL_MAPPING or getattr(config, "vocab_size", None) is None:
        return None
    model_class = MODEL_MAPPING[type(config)]
    if isinstance(model_class, (tuple, list)) or not isinstance(model_class, type):
        return None
    modalities = model_class.input_modalities
    arguments = inspect.signature(model_class.forward).parameters
    text_alone = modalities == "text" or tuple(modalities) == ("text",)
    return model_class if text_alone and {"inputs_embeds", "past_key_values"} <= arguments.keys() else None


class TextModelForCausalLM(PreTrainedModel, GenerationMixin):
    """`model`, a text model of transformers, and `lm_head`, a linear map without bias."""

    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    # What the text model itself cannot do, it says when it is built, which is before these are asked.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: PreTrainedConfig):
        model = text_model_class(config)(config)
        super().__init__(config)
        self.model = model
        self.supports_gradient_checkpointing = model.supports_gradient_checkpointing
        embeddings = model.get_input_embeddings()
        self.lm_head = nn.Linear(embeddings.embedding_dim, config.vocab_size, bias=False)
        name = next(name for name, module in self.named_modules() if module is embeddings)
        self._tied_weights_keys = {"lm_head.weight": f"{name}.weight"}
        self.post_init()

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """transformers looks for experts in the source of this module; they are in the text model's."""
        return True

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """As the causal LMs of transformers; `logits_to_keep` also takes positions `(batch, K)` of each sample."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def slice_logits_to_keep(hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """The hidden states `(batch, K, width)` whose logits are wanted, as transformers 5.23 has it; 0 for all."""
    if isinstance(logits_to_keep, int):
        return hidden_states[:, -logits_to_keep:] if logits_to_keep else hidden_states
    if logits_to_keep.ndim == 2:
        return hidden_states.gather(1, logits_to_keep.unsqueeze(-1).expand(-1, -1, hidden_states.shape[-1]))
    return hidden_states[:, logits_to_keep]
