"""Generation that can only give one of a few answers."""

from collections.abc import Sequence

import torch
from transformers import ProcessorMixin

from .collator import AnyVlmDataCollator


class FixedAnswers:
    """The answers as the tokens by which a model is taught them, in a tree.

    Given to `generate` as `prefix_allowed_tokens_fn`, with greedy decoding. The product of the probabilities that the
    chosen tokens have among the allowed ones is the probability of that answer among all. Where it is over a half, no
    other answer is more probable: each of its beginnings then has more than half of the probability, so that the greedy
    choice follows it.

    Args:
        processor: Its chat template says how an answer begins and ends.
        answers: All that are possible.
        end_tokens: Ids that end generation, the usual one first.

    Raises:
        ValueError: fewer than two answers, or two that are the same tokens; or the tokens in front of an answer are others
            when the answer is asked for than when it is learnt.
    """

    def __init__(self, processor: ProcessorMixin, answers: Sequence[str], end_tokens: Sequence[int]):
        if len(answers) < 2:
            raise ValueError(
                f"answers={list(answers)}: name all answers that there are, two or more, or leave it out."
            )
        self.end_tokens = list(end_tokens)
        self.answers: dict[tuple[int, ...], str] = {}
        for answer in answers:
            tokens = self._tokens(processor, answer)
            if tokens in self.answers:
                raise ValueError(f"The answers {self.answers[tokens]!r} and {answer!r} are the same tokens.")
            self.answers[tokens] = answer
        self._next: dict[tuple[int, ...], list[int]] = {}
        for tokens in self.answers:
            for place, token in enumerate(tokens):
                allowed = self._next.setdefault(tokens[:place], [])
                if token not in allowed:
                    allowed.append(token)

    @property
    def max_new_tokens(self) -> int:
        """Of the longest answer, with its end."""
        return max(map(len, self.answers))

    def _tokens(self, processor: ProcessorMixin, answer: str) -> tuple[int, ...]:
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
        row = AnyVlmDataCollator(processor)([{"messages": messages}])
        labels = row["labels"][0]
        tokens = labels[labels != -100].tolist()
        prompt = processor.apply_chat_template(messages[:1], add_generation_prompt=True, tokenize=False)
        bos = processor.tokenizer.bos_token
        asked = processor(text=[prompt], add_special_tokens=not (bos and prompt.startswith(bos)))["input_ids"][0]
        if row["input_ids"][0].tolist()[: len(asked)] != list(asked) or bool((labels[: len(asked)] != -100).any()):
            raise ValueError(
                f"The chat template's prompt for an answer ends otherwise than what stands before {answer!r} in a "
                "conversation, so the model would be asked for another beginning than it learns. Mend the template."
            )
        ends = [place for place, token in enumerate(tokens) if token in self.end_tokens]
        return (*tokens[: ends[0]], tokens[ends[0]]) if ends else (*tokens, self.end_tokens[0])

    def allowed(self, prompt_length: int):
        """`prefix_allowed_tokens_fn` for prompts padded to this length."""

        def allowed_tokens(batch_id: int, input_ids: torch.Tensor) -> list[int]:
            # What follows an end is padding, and whichever token is allowed there does not matter.
            return self._next.get(tuple(input_ids[prompt_length:].tolist()), self.end_tokens[:1])

        return allowed_tokens
