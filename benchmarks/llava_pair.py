"""The same vision-language model twice, with equal weights: composed by anyvlm, and as transformers' own LLaVA."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

import anyvlm


#: Ids below this one are special tokens of the small tokenizer, the image token among them.
FIRST_WORD_ID = 16

#: Where LLaVA keeps what is under the key in our model. The order matters: the first prefix that fits is used.
NATIVE_PREFIXES = {
    "vision_tower.": "model.vision_tower.",
    "multi_modal_projector.layers.0.": "model.multi_modal_projector.linear_1.",
    "multi_modal_projector.layers.1.": "model.multi_modal_projector.linear_2.",
    "language_model.model.": "model.language_model.",
    "language_model.lm_head.": "lm_head.",
}


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model and of what it is given.

    Args:
        hidden_size: Width of the language model and of the tower.
        num_layers: Layers of each.
        num_heads: Attention heads of each.
        image_size: Pixels, one edge.
        patch_size: Pixels, one edge.
        prompt_tokens: Text tokens of a prompt, beside its image tokens.
        answer_tokens: Supervised tokens of a training sample.
        batch_size: Samples of a training step.
        new_tokens: Tokens that are generated.
        tie_word_embeddings: One matrix for the embeddings and the head, as small models with large vocabularies have.
    """

    hidden_size: int = 512
    num_layers: int = 8
    num_heads: int = 8
    image_size: int = 224
    patch_size: int = 14
    prompt_tokens: int = 48
    answer_tokens: int = 16
    batch_size: int = 4
    new_tokens: int = 32
    tie_word_embeddings: bool = True

    @property
    def image_tokens(self) -> int:
        """Tokens of one picture: its patches."""
        return (self.image_size // self.patch_size) ** 2


QUICK_SIZES = Sizes(
    hidden_size=32,
    num_layers=2,
    num_heads=2,
    image_size=56,
    prompt_tokens=6,
    answer_tokens=4,
    batch_size=2,
    new_tokens=8,
)


def small_tokenizer(words: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """A tokenizer of a few words, or none: models that are given ids only need to know what the special ones are."""
    vocabulary = {word: index for index, word in enumerate(("<unk>", "<s>", "</s>", "<pad>", *words))}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def compose_ours(sizes: Sizes, vocab_size: int, dtype: torch.dtype, seed: int):
    """LLaVA-1.5's architecture, by `anyvlm.compose`, with random weights."""
    return compose_with_processor(sizes, vocab_size, dtype, seed)[0]


def compose_with_processor(
    sizes: Sizes, vocab_size: int, dtype: torch.dtype, seed: int, tokenizer: PreTrainedTokenizerFast | None = None
):
    """The same, and its processor."""
    vision_config = CLIPVisionConfig(
        hidden_size=sizes.hidden_size,
        intermediate_size=4 * sizes.hidden_size,
        num_hidden_layers=sizes.num_layers,
        num_attention_heads=sizes.num_heads,
        image_size=sizes.image_size,
        patch_size=sizes.patch_size,
    )
    text_config = LlamaConfig(
        hidden_size=sizes.hidden_size,
        # llama's proportion of 8/3, in whole steps of 64
        intermediate_size=-(-sizes.hidden_size * 8 // 3 // 64) * 64,
        num_hidden_layers=sizes.num_layers,
        num_attention_heads=sizes.num_heads,
        num_key_value_heads=sizes.num_heads,
        max_position_embeddings=4096,
        vocab_size=vocab_size,
        tie_word_embeddings=sizes.tie_word_embeddings,
    )
    return anyvlm.compose(
        vision=vision_config,
        text=text_config,
        tokenizer=tokenizer or small_tokenizer(),
        projector="mlp",
        image_size=sizes.image_size,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        dtype=dtype,
        seed=seed,
    )


def native_config(config: anyvlm.AnyVlmConfig) -> LlavaConfig:
    """LLaVA's config for the parts as they are after composing: their vocabulary may have grown by the image token."""
    return LlavaConfig(
        vision_config=copy.deepcopy(config.vision_config),
        text_config=copy.deepcopy(config.text_config),
        image_token_index=config.image_token_id,
        vision_feature_layer=config.vision_feature_layer,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        projector_hidden_act="gelu",
        tie_word_embeddings=config.text_config.tie_word_embeddings,
    )


def build_native(config: anyvlm.AnyVlmConfig, dtype: torch.dtype) -> LlavaForConditionalGeneration:
    """LLaVA with random weights of its own."""
    return AutoModelForImageTextToText.from_config(native_config(config), dtype=dtype)


def build_ours(config: anyvlm.AnyVlmConfig, dtype: torch.dtype) -> nn.Module:
    """Our model with random weights, straight from the config, as LLaVA is built."""
    return AutoModelForImageTextToText.from_config(config, dtype=dtype)


def native_name(name: str) -> str:
    """What a parameter of ours is called in LLaVA.

    Raises:
        KeyError: LLaVA has nothing like it.
    """
    for ours, native in NATIVE_PREFIXES.items():
        if name.startswith(ours):
            return native + name[len(ours) :]
    raise KeyError(f"No place in LLaVA is known for {name}.")


def copy_weights(ours: nn.Module, native: nn.Module) -> int:
    """Copy every weight and buffer of ours into LLaVA; returns how many parameters there are.

    Raises:
        ValueError: a tensor of either side has no counterpart, or differs after copying. Both sides' tensors are
            counted by name, so nothing can stay random unseen.
    """
    sources = {native_name(name): tensor for name, tensor in _all_tensors(ours).items()}
    targets = _all_tensors(native)
    if sources.keys() != targets.keys():
        raise ValueError(
            f"Without a counterpart: ours {sorted(sources.keys() - targets.keys())}, "
            f"LLaVA's {sorted(targets.keys() - sources.keys())}."
        )
    with torch.no_grad():
        for name, target in targets.items():
            if sources[name].shape != target.shape or sources[name].dtype != target.dtype:
                raise ValueError(
                    f"{name} is {target.shape}, {target.dtype} in LLaVA, and {sources[name].shape} in ours."
                )
            target.copy_(sources[name])
    different = [name for name, target in _all_tensors(native).items() if not torch.equal(target, sources[name])]
    ours_count, native_count = (sum(p.numel() for p in model.parameters()) for model in (ours, native))
    if different or ours_count != native_count:
        raise ValueError(f"Not copied: {different}; {ours_count} parameters against {native_count}.")
    return ours_count


def _all_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers, those that are not saved (rotary frequencies) included; tied ones under both names."""
    tensors = dict(model.named_parameters(remove_duplicate=False))
    tensors.update(model.named_buffers(remove_duplicate=False))
    return tensors


def build_pair(sizes: Sizes, vocab_size: int, dtype: torch.dtype, device: torch.device, seed: int):
    """Ours and LLaVA with the same weights, in eval mode."""
    ours = compose_ours(sizes, vocab_size, dtype, seed)
    native = build_native(ours.config, dtype).to(device)
    ours.to(device)
    copy_weights(ours, native)
    # Fresh memory, by turns. Decoding reads every weight for each token, and where pages happen to lie is worth more
    # than a percent: the side that was built second would win.
    native_parameters = dict(native.named_parameters())
    for name, parameter in ours.named_parameters():
        for moved in (parameter, native_parameters[native_name(name)]):
            moved.data = moved.data.clone()
    for model in (ours, native):
        model.eval()
        # Generation to the full length whatever comes out of random weights: no token ends it.
        model.generation_config = GenerationConfig(pad_token_id=ours.config.text_config.pad_token_id, do_sample=False)
    return ours, native


def make_inputs(
    config: anyvlm.AnyVlmConfig,
    sizes: Sizes,
    pictures: list[int],
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
    answer_tokens: int = 0,
) -> dict[str, torch.Tensor]:
    """A batch as the processor would make it, padded on the left.

    Args:
        pictures: Number of pictures of each sample. Samples with different numbers have different lengths.
        answer_tokens: Tokens at the end that `labels` names; without any, there are no labels.
    """
    generator = torch.Generator().manual_seed(seed)
    vocab_size, pad_token_id = config.text_config.vocab_size, config.text_config.pad_token_id
    words = sizes.prompt_tokens + answer_tokens
    length = max(pictures) * sizes.image_tokens + words
    input_ids = torch.full((len(pictures), length), pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    for row, count in enumerate(pictures):
        text = torch.randint(FIRST_WORD_ID, vocab_size, (words,), generator=generator)
        image = torch.full((sizes.image_tokens,), config.image_token_id)
        # Pictures stand apart, a word before each.
        blocks = [part for number in range(count) for part in (text[number : number + 1], image)]
        sample = torch.cat([*blocks, text[count:]])
        input_ids[row, -len(sample) :] = sample
        attention_mask[row, -len(sample) :] = 1
    edge = sizes.image_size
    inputs = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "pixel_values": torch.randn(sum(pictures), 3, edge, edge, generator=generator).to(dtype),
    }
    if answer_tokens:
        inputs["labels"] = torch.full_like(input_ids, -100)
        inputs["labels"][:, -answer_tokens:] = input_ids[:, -answer_tokens:]
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def training_step(model: nn.Module, inputs: dict[str, torch.Tensor]) -> Callable[[], None]:
    """One step of full training: forward, backward and AdamW, the optimizer that `Trainer` uses unless told otherwise.

    The learning rate is tiny, so that timing many steps keeps the weights where they are.
    """
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-7, fused=True)

    def step() -> None:
        model(**inputs).loss.backward()
        optimizer.step()
        # Last, as `Trainer` does: between steps there are weights and the optimizer's state, and no gradients.
        optimizer.zero_grad(set_to_none=True)

    return step
