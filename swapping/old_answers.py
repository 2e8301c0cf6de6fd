"""What the old path makes of unlabelled pictures: its image tokens, its own answers, and how sure it is of each word."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from transformers import BatchFeature

from ..configuration.image_tokens import Grid
from ..modeling.image_features import AnyVlmImageFeatures
from .picture_paths import PicturePath


#: Asked where no questions are given.
QUESTIONS = ("What is this?", "What is in the picture?", "Describe the picture.")
#: Words whose probabilities are kept one by one; the others are one event together. Of a vocabulary of 150,000 words that
#: is a thousandth of the memory, and the rest has hardly any probability where a model knows what it says.
KEPT_WORDS = 64


@dataclass
class WordProbabilities:
    """Distributions over the next word, of which the most probable words are kept.

    Args:
        words: `(positions, kept)`, token ids, the most probable first.
        log_probabilities: `(positions, kept)`, float32.
        log_rest: `(positions,)`, of all other words together; `-inf` if there are none.
    """

    words: torch.Tensor
    log_probabilities: torch.Tensor
    log_rest: torch.Tensor

    @classmethod
    def of(cls, logits: torch.Tensor, kept: int = KEPT_WORDS) -> "WordProbabilities":
        """From logits `(positions, vocabulary)` of any dtype."""
        log_probabilities = logits.float().log_softmax(-1)
        values, words = log_probabilities.topk(min(kept, logits.shape[-1]), dim=-1)
        return cls(words, values, _log_rest(values))

    def divergence(self, logits: torch.Tensor) -> torch.Tensor:
        """Kullback-Leibler divergence of the distributions that `logits` `(positions, vocabulary)` give from these,
        `(positions,)`: exact in the kept words, with the others as one event, so never more than the whole one."""
        values = logits.float().log_softmax(-1).gather(-1, self.words)
        terms = (self.log_probabilities.exp() * (self.log_probabilities - values)).sum(-1)
        rest = self.log_rest.exp()
        # Where all words are kept there is no rest, and 0 log 0 is 0.
        other = torch.where(rest > 0, self.log_rest.clamp(min=-80) - _log_rest(values).clamp(min=-80), 0)
        return terms + rest * other


def _log_rest(log_probabilities: torch.Tensor) -> torch.Tensor:
    """Log of what is left to 1, from logs of probabilities in the last dimension."""
    total = log_probabilities.double().logsumexp(-1).clamp(max=0)
    return torch.log((-torch.expm1(total)).clamp(min=1e-35)).to(log_probabilities.dtype)


@dataclass
class Example:
    """One picture with one question, and what the old path makes of it.

    Args:
        picture: Number of the picture in its source; variants have the number of theirs.
        image: In RGB.
        prompt: The question as a prompt, with the placeholder of the picture.
        answer: `(words,)`, the token ids that the old path generated, with the end if it came to one.
        probabilities: Of each word of `answer`.
        tokens: `(num_tokens, width)`, the old image tokens.
        token_grid: Their rows and columns, `None` if they are no grid.
        prompt_ids: `(prompt,)`, token ids of the prompt for the new path, with its placeholders.
        features: `(places, width)`, the new tower's features, where they can be kept; else `None`.
        grid: Their rows and columns.
    """

    picture: int
    image: Image.Image
    prompt: str
    answer: torch.Tensor
    probabilities: WordProbabilities
    tokens: torch.Tensor
    token_grid: Grid | None
    prompt_ids: torch.Tensor | None = None
    features: torch.Tensor | None = None
    grid: Grid | None = None


def prompts_of(processor, questions: Sequence[str] | None) -> list[str]:
    """The questions as prompts about one picture, by the processor's chat template.

    Raises:
        ValueError: an empty list, or something that is no text.
    """
    questions = QUESTIONS if questions is None else questions
    if isinstance(questions, str) or not questions or not all(isinstance(question, str) for question in questions):
        raise ValueError(
            "texts must be a list of questions, at least one, each a string. Leave it out for some plain ones."
        )
    conversations = [
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        for question in questions
    ]
    return [
        processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        for messages in conversations
    ]


def question_inputs(processor, prompts: Sequence[str], pictures: Sequence[Image.Image]) -> BatchFeature:
    """A batch of prompts with one picture each, padded on the left."""
    bos = processor.tokenizer.bos_token
    return processor(
        text=list(prompts),
        images=[[picture] for picture in pictures],
        padding=True,
        padding_side="left",
        # Some chat templates write it themselves.
        add_special_tokens=not (bos and prompts[0].startswith(bos)),
        return_tensors="pt",
    )


@torch.no_grad()
def ask(
    old: PicturePath,
    pictures: Sequence[tuple[int, Image.Image]],
    prompts: Sequence[str],
    max_new_tokens: int,
    seed: int = 0,
) -> list[Example]:
    """Let the old path look at pictures and answer one of the questions about each, greedily.

    Args:
        pictures: Each with its number. One picture gets another question each time it comes with another `seed`.
        prompts: From `prompts_of`.
    """
    model, processor = old.model, old.processor
    chosen = [prompts[(number + seed) % len(prompts)] for number, _ in pictures]
    inputs = question_inputs(processor, chosen, [picture for _, picture in pictures]).to(model.device)
    text = {name: inputs.pop(name) for name in ("input_ids", "attention_mask")}
    encoded = model.get_image_features(**inputs, return_dict=True)
    # Generating rearranges what it is given.
    given = AnyVlmImageFeatures(pooler_output=list(encoded.pooler_output), token_grids=encoded.token_grids)
    generated = model.generate(
        **text,
        mm_encoder_outputs={"image": given},
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        return_dict_in_generate=True,
        output_logits=True,
    )
    words = generated.sequences[:, text["input_ids"].shape[1] :]
    logits = torch.stack(generated.logits, dim=1)
    ends = model.generation_config.eos_token_id
    ends = torch.tensor(ends if isinstance(ends, list) else [-1 if ends is None else ends], device=words.device)
    examples = []
    for index, (number, picture) in enumerate(pictures):
        stops = torch.isin(words[index], ends).nonzero()
        length = int(stops[0]) + 1 if len(stops) else words.shape[1]
        examples.append(
            Example(
                number,
                picture,
                chosen[index],
                words[index, :length].clone(),
                WordProbabilities.of(logits[index, :length]),
                encoded.pooler_output[index].clone(),
                None if encoded.token_grids is None else encoded.token_grids[index],
            )
        )
    return examples


def in_batches(values: Sequence, size: int) -> Iterator[Sequence]:
    """`size` at a time."""
    for start in range(0, len(values), size):
        yield values[start : start + size]
