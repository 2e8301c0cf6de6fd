"""A tokenizer of 90 words, and weights that show what goes astray: what every tiny model here is used with."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


VOCABULARY = ["<unk>", "<s>", "</s>", "<pad>", "User", "Assistant", ":", "?", ".", ","] + [f"w{i}" for i in range(80)]


def tiny_tokenizer(**special_tokens) -> PreTrainedTokenizerFast:
    """One token per word of `VOCABULARY`. `special_tokens` override; `None` leaves one out."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    tokens = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", **special_tokens}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **{name: token for name, token in tokens.items() if token is not None}
    )


def make_sensitive(model: torch.nn.Module, seed: int = 1) -> None:
    """Larger random weights, so that a token or picture that goes astray shows in the logits; deterministic.

    Rows of embeddings that stand for padding stay as they were: zero, as a trained model has them. (Some classes of
    transformers put the zeros back when they load a checkpoint.)
    """
    generator = torch.Generator().manual_seed(seed)
    embeddings = [
        module
        for module in model.modules()
        if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None
    ]
    padding = [module.weight[module.padding_idx].detach().clone() for module in embeddings]
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters(), key=lambda item: item[0]):
            if parameter.is_floating_point():
                scale = 0.15 if parameter.ndim >= 2 else 0.05
                if parameter.ndim == 4:  # convolutions of few channels, after which norms would see next to nothing
                    scale = max(scale, parameter[0].numel() ** -0.5)
                parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
        for module, row in zip(embeddings, padding):
            module.weight[module.padding_idx] = row
