"""A made-up language model in the style of Qwen-7B's code: `transformer.wte`, rotary frequencies in a buffer and a table
of log n in an attribute, which no checkpoint holds, one projection for query, key and value, arguments of the old kind."""

import math

import torch
from torch import nn
from torch.nn import CrossEntropyLoss
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_part import (
    OldStyleConfig,
)
from .functions import apply_rotary


try:
    from flash_attn_of_a_made_up_version import fused_attention  # installed nowhere
except ImportError:
    fused_attention = None


class RotaryEmbedding(nn.Module):
    def __init__(self, dim, base):
        super().__init__()
        inv_freq = 1.0 / (base ** (torch.arange(0, dim, 2).float() / dim))
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    def forward(self, position_ids):
        frequencies = position_ids[..., None].float() * self.inv_freq.float()
        angles = torch.cat((frequencies, frequencies), dim=-1)
        return angles.cos()[:, None], angles.sin()[:, None]


class Attention(nn.Module):
    def __init__(self, config, layer_number):
        super().__init__()
        self.layer_number = layer_number
        self.num_heads = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.use_logn_attn = config.use_logn_attn
        logn = [math.log(i, 8) if i > 8 else 1 for i in range(1, config.seq_length + 1)]
        self.logn_tensor = torch.tensor(logn)

    def forward(self, hidden_states, rotary, position_ids, mask, layer_past):
        batch, length, width = hidden_states.shape
        query, key, value = (
            part.view(batch, length, self.num_heads, -1).transpose(1, 2)
            for part in self.c_attn(hidden_states).split(width, dim=2)
        )
        query, key = apply_rotary(query, *rotary), apply_rotary(key, *rotary)
        if self.use_logn_attn:
            query = query * self.logn_tensor.to(query.device)[position_ids][:, None, :, None].to(query.dtype)
        if layer_past is not None:
            key, value = layer_past.update(key, value, self.layer_number)
        weights = (query @ key.transpose(2, 3)) / math.sqrt(key.shape[-1])
        weights = (weights + mask).softmax(-1, dtype=torch.float32).to(query.dtype)
        return self.c_proj((weights @ value).transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    def __init__(self, config, layer_number):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = Attention(config, layer_number)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.w1 = nn.Linear(config.n_embd, config.n_inner, bias=False)
        self.w2 = nn.Linear(config.n_embd, config.n_inner, bias=False)
        self.c_proj = nn.Linear(config.n_inner, config.n_embd, bias=False)

    def forward(self, hidden_states, *args):
        hidden_states = hidden_states + self.attn(self.ln_1(hidden_states), *args)
        normed = self.ln_2(hidden_states)
        return hidden_states + self.c_proj(self.w1(normed) * nn.functional.silu(self.w2(normed)))


class OldStylePreTrainedModel(PreTrainedModel):
    config_class = OldStyleConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            module.weight.data.normal_(mean=0.0, std=0.02)


class OldStyleModel(OldStylePreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.gradient_checkpointing = False
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.rotary_emb = RotaryEmbedding(config.n_embd // config.n_head, config.rotary_emb_base)
        self.h = nn.ModuleList([Block(config, i) for i in range(config.n_layer)])
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.post_init()

    def get_input_embeddings(self):
        return self.wte

    def set_input_embeddings(self, new_embeddings):
        self.wte = new_embeddings

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        past_key_values=None,
        attention_mask: torch.FloatTensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        head_mask: torch.FloatTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ):
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You have to specify either input_ids or inputs_embeds")
        hidden_states = self.wte(input_ids) if inputs_embeds is None else inputs_embeds
        batch, length = hidden_states.shape[:2]
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        if position_ids is None:
            position_ids = torch.arange(past, past + length, device=hidden_states.device)[None]
        position_ids = position_ids.expand(batch, -1)
        places = torch.arange(past + length, device=hidden_states.device)
        allowed = (places[None] <= places[past:, None])[None, None].expand(batch, 1, -1, -1)
        if attention_mask is not None:
            allowed = allowed & attention_mask[:, None, None].bool()
        mask = torch.zeros(allowed.shape, dtype=hidden_states.dtype, device=hidden_states.device)
        mask = mask.masked_fill(~allowed, torch.finfo(hidden_states.dtype).min)
        rotary = tuple(table.to(hidden_states.dtype) for table in self.rotary_emb(position_ids))
        all_hidden_states = ()
        for block in self.h:
            all_hidden_states += (hidden_states,)
            if self.gradient_checkpointing and self.training:
                hidden_states = self._gradient_checkpointing_func(
                    block.__call__, hidden_states, rotary, position_ids, mask, None
                )
            else:
                hidden_states = block(hidden_states, rotary, position_ids, mask, past_key_values)
        hidden_states = self.ln_f(hidden_states)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states,
            past_key_values=past_key_values,
            hidden_states=(*all_hidden_states, hidden_states) if output_hidden_states else None,
        )


class OldStyleLMHeadModel(OldStylePreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.transformer = OldStyleModel(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, new_embeddings):
        self.lm_head = new_embeddings

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        # The usual cache asks the config for `num_hidden_layers`, which this one does not have.
        if generation_config.use_cache is not False and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = DynamicCache()

    def prepare_inputs_for_generation(self, input_ids, past_key_values=None, inputs_embeds=None, **kwargs):
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        attention_mask = kwargs.get("attention_mask")
        position_ids = None
        if attention_mask is not None:
            position_ids = (attention_mask.long().cumsum(-1) - 1).masked_fill(attention_mask == 0, 1)
        if inputs_embeds is not None and past == 0:
            model_inputs = {"inputs_embeds": inputs_embeds}
        else:
            model_inputs = {"input_ids": input_ids[:, past:]}
        if position_ids is not None:
            position_ids = position_ids[:, past:]
        return {
            **model_inputs,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "use_cache": kwargs.get("use_cache"),
            "attention_mask": attention_mask,
        }

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        past_key_values=None,
        attention_mask: torch.FloatTensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        head_mask: torch.FloatTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ):
        outputs = self.transformer(
            input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
        )
        lm_logits = self.lm_head(outputs[0])
        loss = None
        if labels is not None:
            shift_logits = lm_logits[..., :-1, :].contiguous()
            shift_labels = labels[..., 1:].contiguous()
            loss = CrossEntropyLoss()(shift_logits.view(-1, shift_logits.size(-1)), shift_labels.view(-1))
        return CausalLMOutputWithPast(
            loss=loss,
            logits=lm_logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )

    def chat(self, query):
        from .generation_utils import make_context

        return make_context(query)
