"""What the wrapper must know about a language model to call it with embeddings. Read from its code, never its name.

What only running it can tell was measured when the model was composed (`composition/language_model_probe.py`) and is
read here from `language_model_spec`:

| key | meaning | default |
|---|---|---|
| `position_offset` | what the model counts its first position as; `null`: it makes its positions itself | 0 |
| `embedding_scale` | factor it puts on the embeddings of ids, and leaves to the caller for `inputs_embeds` | 1 |
| `left_padding`, `right_padding` | whether padding on that side leaves a sample's logits as they are | true |
| `use_cache` | whether decoding with its cache gives what a whole forward pass gives | true |
| `position_axes` | numbers that the position of a token has: 3 with multi-axis rotary positions (`image_positions.py`) | 1 |
| `packing` | how samples are kept apart that are packed in one row (`packed_samples.py`) | not measured until it is wanted |
| `own_loss` | whether its loss is the shifted cross-entropy of causal LMs (with auxiliary losses or without) | true |
"""

import inspect
import sys
from typing import Any

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from .parts import own_model_class
from .text_models import TextModelForCausalLM, text_model_class


DEFAULT_SPEC = {
    "position_offset": 0,
    "position_axes": 1,
    "embedding_scale": 1.0,
    "left_padding": True,
    "right_padding": True,
    "use_cache": True,
    "own_loss": True,
}


def causal_lm_class(text_config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The causal LM that is built from this config, or `None`.

    Some families list only their composite config with `AutoModelForCausalLM` (mllama, emu3); the class that takes
    their text config stands beside the composite's. Others have no causal LM of their text model at all (qwen2_vl), which
    is given a head here.
    """
    if type(text_config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return MODEL_FOR_CAUSAL_LM_MAPPING[type(text_config)]
    family = type(text_config).__module__.rpartition(".")[0]
    for config_class in MODEL_FOR_CAUSAL_LM_MAPPING:
        if config_class.__module__.rpartition(".")[0] == family:
            model_class = MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
            if model_class.config_class is type(text_config):
                return model_class
    return None if text_model_class(text_config) is None else TextModelForCausalLM


def build_language_model(text_config: PreTrainedConfig, **kwargs) -> PreTrainedModel:
    """The whole causal LM, with random weights. `kwargs` as for `AutoModelForCausalLM.from_config`."""
    own_class = own_model_class(AutoModelForCausalLM, text_config)
    if own_class is not None:
        kwargs.pop("trust_remote_code", None)
        return own_class._from_config(text_config, **kwargs)
    model_class = None if type(text_config) in MODEL_FOR_CAUSAL_LM_MAPPING else causal_lm_class(text_config)
    if model_class is None:
        return AutoModelForCausalLM.from_config(text_config, **kwargs)
    kwargs.pop("trust_remote_code", None)
    return model_class._from_config(text_config, **kwargs)


def base_language_model(language_model: PreTrainedModel) -> nn.Module:
    """The model below the head. Where the declared prefix leads nowhere (mllama), it is the model inside the model."""
    if language_model.base_model is not language_model:
        return language_model.base_model
    return next((part for part in language_model.children() if isinstance(part, PreTrainedModel)), language_model)


def resize_vocabulary(language_model: PreTrainedModel, new_num_tokens: int | None, *args, **kwargs) -> nn.Module:
    """`resize_token_embeddings` of the language model, in a way that its config can build again.

    Raises:
        ValueError: its config builds more embeddings than it states (moshi and mllama add rows of their own), so that
            no vocabulary of another size can be saved.
    """
    config, num_rows = language_model.config, language_model.get_input_embeddings().weight.shape[0]
    if new_num_tokens not in (None, num_rows) and num_rows != config.vocab_size:
        raise ValueError(
            f"{type(language_model).__name__} has {num_rows} embeddings for a vocabulary of {config.vocab_size}, and "
            f"transformers cannot save it with {new_num_tokens}. Keep to its tokenizer: the image token must be one of "
            f"its {num_rows} ids."
        )
    embeddings = language_model.resize_token_embeddings(new_num_tokens, *args, **kwargs)
    if getattr(config, "decoder_vocab_size", None) == num_rows:  # marian states it twice
        config.decoder_vocab_size = config.vocab_size
    return embeddings


class LanguageModelInterface:
    """How one causal language model wants to be called. Stateless: it reads signatures once and holds no weights.

    Args:
        language_model: The whole causal LM.
        spec: What was measured (table above); what it lacks has the default.
    """

    def __init__(self, language_model: nn.Module, spec: dict[str, Any] | None = None):
        parameters = inspect.signature(language_model.forward).parameters
        self.spec = {**DEFAULT_SPEC, **(spec or {})}
        self.argument_names = frozenset(parameters)
        self.takes_any_argument = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        base_parameters = inspect.signature(base_language_model(language_model).forward).parameters
        #: gemma3n and gemma4 look up a second embedding per layer from the ids, which `inputs_embeds` do not carry;
        #: a gemma4 of width 0 has the argument but no such table.
        self.has_per_layer_inputs = "per_layer_inputs" in base_parameters and bool(
            language_model.config.hidden_size_per_layer_input
        )
        self.takes_logits_to_keep = "logits_to_keep" in parameters
        #: Sides on which padding changes a sample's numbers; asked at every step of decoding, and empty for most.
        self.refused_sides = [side for side in ("left", "right") if not self.spec[f"{side}_padding"]]
        #: transformers >= 5.23 lets each sample keep its own positions; older code keeps the same ones for all.
        self.keeps_logits_per_sample = hasattr(sys.modules[type(language_model).__module__], "slice_logits_to_keep")

    def arguments(
        self,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs,
    ) -> dict[str, Any]:
        """Those of the arguments that are given and that the language model takes, by its own conventions.

        `position_ids` count from 0 for every model. They and `token_type_ids` go only where they are named: a model
        without positions (mamba, bloom) may have a catch-all for other arguments, which must not see them.
        `inputs_embeds` are what the embedding module gives, for every model.
        """
        offset, scale = self.spec["position_offset"], self.spec["embedding_scale"]
        if position_ids is not None:
            kwargs["position_ids"] = None if offset is None else position_ids + offset if offset else position_ids
        if inputs_embeds is not None:
            kwargs["inputs_embeds"] = inputs_embeds if scale == 1 else inputs_embeds * scale
        return {
            name: value
            for name, value in kwargs.items()
            if value is not None
            and (
                name in self.argument_names
                or (self.takes_any_argument and name not in ("position_ids", "token_type_ids"))
            )
        }

    def check_padding(self, attention_mask: Any, generating: bool = False) -> None:
        """Refuse padding that would change a sample's numbers; the bare language model has the same limit.

        Raises:
            ValueError: padding on a side that the language model cannot take; any padding while `generating` with a
                model that cannot take it on the left.
        """
        sides = self.refused_sides
        if not sides or not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim != 2:
            return
        if generating and "left" in sides and not bool(attention_mask.all()):
            raise ValueError(
                "This language model gives other results for padded text than for the text alone, so samples of "
                "different lengths cannot be generated in one batch. Generate one sample at a time."
            )
        for side in sides:
            if not bool(attention_mask[:, 0 if side == "left" else -1].all()):
                other = "right" if side == "left" else "left"
                advice = (
                    f"pass padding_side={other!r}" if self.spec[f"{other}_padding"] else "use batches of one sample"
                )
                raise ValueError(
                    f"This language model gives other results for text padded on the {side} than for the text alone; "
                    f"{advice}."
                )

    def embedding_arguments(
        self,
        language_model: nn.Module,
        input_ids: torch.Tensor | None,
        image_mask: torch.Tensor | None = None,
        pad_token_id: int = 0,
    ) -> dict:
        """What must go along with `inputs_embeds` so that the text in them is treated as its ids would be.

        Args:
            input_ids: `(batch, sequence)`, or `None` if only embeddings are known.
            image_mask: Boolean `(batch, sequence)`, true at image tokens; `None` if every id is that of a word.
            pad_token_id: Stands in for image tokens, which have no row in a per-layer table.
        """
        if not self.has_per_layer_inputs:
            return {}
        if input_ids is None:
            raise ValueError(
                "This language model looks up per-layer embeddings from token ids, so it cannot be given "
                "`inputs_embeds` alone. Pass `input_ids`."
            )
        text_ids = input_ids if image_mask is None else input_ids.masked_fill(image_mask, pad_token_id)
        get_per_layer_inputs = base_language_model(language_model).get_per_layer_inputs
        # gemma4 asks for embeddings too, to guess ids from where there are none; before transformers 5.23 always.
        asks = "inputs_embeds" in inspect.signature(get_per_layer_inputs).parameters
        return {"per_layer_inputs": get_per_layer_inputs(text_ids, **({"inputs_embeds": None} if asks else {}))}


def default_position_ids(
    attention_mask: torch.Tensor | None, past_length: int, sequence_length: int, device: torch.device
) -> torch.Tensor:
    """Positions that do not count padding, `(batch or 1, sequence)`: the rule that `generate` uses.

    Without them ten families of language models give other results for a left-padded sample than for the sample alone.
    """
    if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
        position_ids = (attention_mask.long().cumsum(-1) - 1).masked_fill(attention_mask == 0, 0)
        return position_ids[:, -sequence_length:]
    return torch.arange(past_length, past_length + sequence_length, device=device).unsqueeze(0)


def labelled_positions(labels: torch.Tensor, per_sample: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Where logits are needed for `labels` (batch, sequence), and the labels for those logits.

    Returns `(logits_to_keep, kept_labels)`. `logits_to_keep` holds K positions, `(K,)` or with `per_sample`
    `(batch, K)`: each position that predicts a label, then at least once the last position, which predicts nothing.
    `kept_labels` `(batch, K)` is arranged so that a model which shifts labels by one, as every causal LM of
    transformers does, pairs each kept logit with its label. The LM computes its own loss on them and never knows that
    positions are missing.

    Raises:
        ValueError: no label to predict in the whole batch.
    """
    next_labels = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    is_labelled = next_labels != -100
    if per_sample:
        counts = is_labelled.sum(1)
        num_kept = int(counts.max()) + 1
        # A stable sort puts each sample's labelled positions first and in order; what follows them is unlabelled.
        positions = torch.argsort((~is_labelled).byte(), dim=1, stable=True)[:, :num_kept]
        beyond = torch.arange(num_kept, device=labels.device) >= counts[:, None]
        positions = positions.masked_fill(beyond, labels.shape[1] - 1)
        kept_next = next_labels.gather(1, positions)
    else:
        positions = is_labelled.any(0).nonzero().squeeze(1)
        positions = torch.cat([positions, positions.new_tensor([labels.shape[1] - 1])])
        num_kept = len(positions)
        kept_next = next_labels[:, positions]
    if num_kept == 1:
        raise ValueError(
            "No token of this batch is supervised: every label is -100, or the only label is the first token. Check "
            "that the labels mark the assistant's words (the data collator of anyvlm does, from the chat template)."
        )
    kept_labels = torch.nn.functional.pad(kept_next[:, :-1], (1, 0), value=-100)
    return positions, kept_labels
