"""What the wrapper must know about a language model to call it with embeddings. Read from its code, never its name."""

import inspect
import sys

import torch
from torch import nn


class LanguageModelInterface:
    """How one causal language model wants to be called. Stateless: it reads signatures once and holds no weights.

    Args:
        language_model: The whole causal LM.
    """

    def __init__(self, language_model: nn.Module):
        parameters = inspect.signature(language_model.forward).parameters
        self.argument_names = frozenset(parameters)
        self.takes_any_argument = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        base_parameters = inspect.signature(language_model.base_model.forward).parameters
        #: gemma3n and gemma4 look up a second embedding per layer from the ids, which `inputs_embeds` do not carry.
        self.has_per_layer_inputs = "per_layer_inputs" in base_parameters
        self.takes_logits_to_keep = "logits_to_keep" in parameters
        #: transformers >= 5.23 lets each sample keep its own positions; older code keeps the same ones for all.
        self.keeps_logits_per_sample = hasattr(sys.modules[type(language_model).__module__], "slice_logits_to_keep")

    def arguments(self, **kwargs) -> dict:
        """Those of `kwargs` that are given and that the language model takes.

        `position_ids` and `token_type_ids` go only where they are named: a model without positions (mamba, bloom) may
        have a catch-all for other arguments, which must not see them.
        """
        return {
            name: value
            for name, value in kwargs.items()
            if value is not None
            and (
                name in self.argument_names
                or (self.takes_any_argument and name not in ("position_ids", "token_type_ids"))
            )
        }

    def embedding_arguments(
        self, language_model: nn.Module, input_ids: torch.Tensor | None, image_mask: torch.Tensor, pad_token_id: int
    ) -> dict:
        """What must go along with `inputs_embeds` so that the text in them is treated as its ids would be.

        Args:
            input_ids: `(batch, sequence)`, or `None` if only embeddings are known.
            image_mask: Boolean `(batch, sequence)`, true at image tokens.
            pad_token_id: Stands in for image tokens, which have no row in a per-layer table.
        """
        if not self.has_per_layer_inputs:
            return {}
        if input_ids is None:
            raise ValueError(
                "This language model looks up per-layer embeddings from token ids, so it cannot be given "
                "`inputs_embeds` alone. Pass `input_ids`."
            )
        text_ids = input_ids.masked_fill(image_mask, pad_token_id)
        return {"per_layer_inputs": language_model.base_model.get_per_layer_inputs(text_ids)}


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
