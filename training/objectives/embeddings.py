"""What the model makes of a text alone, or of a picture alone, as one vector."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def run_again(model: nn.Module, **inputs) -> torch.Tensor:
    """The language model's last hidden states `(batch, sequence, width)`, in a further pass of the same step, with graph.

    Args:
        model: As the trainer calls it.
        **inputs: Of the model, without labels.
    """
    if isinstance(model, DistributedDataParallel):
        # Its forward decides anew, from this pass, which weights get no gradient; those of the first pass would be lost.
        model = model.module
    outputs = model(**inputs, output_hidden_states=True, use_cache=False, logits_to_keep=1)
    hidden_states = outputs.hidden_states[-1]
    # gemma3n keeps several versions of each state, `(versions, batch, sequence, width)`; its layers work on the first.
    return hidden_states[0] if hidden_states.ndim == 4 else hidden_states


def hidden_size(model: nn.Module) -> int:
    """Width of the hidden states that `run_again` returns, found by running one token: configs name it in several ways."""
    device = model.get_input_embeddings().weight.device
    with torch.no_grad():
        return run_again(model, input_ids=torch.zeros(1, 1, dtype=torch.long, device=device)).shape[-1]


def pool_last(hidden_states: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """`(batch, width)`: at the last token of each, padding being on the right."""
    last = attention_mask.sum(1) - 1
    return hidden_states[torch.arange(len(last), device=last.device), last]


def pool_mean(hidden_states: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """`(batch, width)`: the mean over the tokens of each."""
    mask = attention_mask.unsqueeze(-1).to(hidden_states.dtype)
    return (hidden_states * mask).sum(1) / mask.sum(1)


def split_by_sample(pictures: Sequence[torch.Tensor], counts: Sequence[int]) -> list[list[torch.Tensor]]:
    """What is there for each picture, as a list for each sample. Signs of `counts` do not matter."""
    found, start = [], 0
    for count in counts:
        found.append(list(pictures[start : start + abs(count)]))
        start += abs(count)
    return found


@contextlib.contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Modules in `eval()` for a while."""
    training = [module for module in modules if module.training]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for module in training:
            module.train()
