"""Generation that can only give one of a few answers."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from transformers import LogitsProcessor, ProcessorMixin

from .collator import AnyVlmDataCollator


#: How much of the running mean stays with each batch.
_MOMENTUM = 0.95


class FixedAnswers(nn.Module):
    """The answers as the tokens by which a model is taught them, in a tree.

    `chooser(prompt_length)` goes to `generate`, with greedy decoding. The product of the probabilities that the chosen
    tokens have among those that some answer has there is the answer's among all. Where it is over a half, no other answer is
    more probable: each of its beginnings then has more than half of the probability, so that the greedy choice follows it.

    With `shares`, the probabilities are aligned with them (ReMixMatch, Berthelot et al. 2020): each is divided by its
    running mean over the pictures seen and multiplied by the expected one. Without that, a model that learns its own answers
    comes to give the most frequent of them more and more often.

    Args:
        processor: Its chat template says how an answer begins and ends.
        answers: All that are possible.
        end_tokens: Ids that end generation, the usual one first.
        shares: How often each answer is right: `"equal"`, or a number for each. Default: nothing is known of that.

    Raises:
        ValueError: fewer than two answers, or two that are the same tokens; or the tokens in front of an answer are others
            when the answer is asked for than when it is learnt; or shares that are not one positive number for each.
    """

    def __init__(
        self,
        processor: ProcessorMixin,
        answers: Sequence[str],
        end_tokens: Sequence[int],
        shares: str | Mapping[str, float] | None = None,
    ):
        super().__init__()
        if len(answers) < 2:
            raise ValueError(
                f"answers={list(answers)}: name all answers that there are, two or more, or leave it out."
            )
        weights = dict.fromkeys(answers, 1.0) if shares in (None, "equal") else shares
        if not isinstance(weights, Mapping) or set(weights) != set(answers) or min(weights.values()) <= 0:
            raise ValueError(f'shares={shares!r} is "equal", or a number above 0 for each of {", ".join(answers)}.')
        self.aligned = shares is not None
        self.end_tokens = list(end_tokens)
        self.answers: dict[tuple[int, ...], str] = {}
        for answer in answers:
            tokens = self._tokens(processor, answer)
            if tokens in self.answers:
                raise ValueError(f"The answers {self.answers[tokens]!r} and {answer!r} are the same tokens.")
            self.answers[tokens] = answer
        # What can follow each beginning, and how often it should.
        following: dict[tuple[int, ...], dict[int, float]] = {}
        for tokens, answer in self.answers.items():
            for place, token in enumerate(tokens):
                children = following.setdefault(tokens[:place], {})
                children[token] = children.get(token, 0.0) + weights[answer]
        self._place = {beginning: place for place, beginning in enumerate(following)}
        # One place more, for what is written behind an end, which does not matter.
        width = max(map(len, following.values()))
        tokens = torch.full((len(following) + 1, width), -1)
        expected = torch.ones(len(following) + 1, width)
        tokens[-1, 0] = self.end_tokens[0]
        for place, children in enumerate(following.values()):
            tokens[place, : len(children)] = torch.tensor(list(children))
            expected[place, : len(children)] = torch.tensor(list(children.values())) / sum(children.values())
        self.register_buffer("tokens", tokens, persistent=False)
        self.register_buffer("expected", expected, persistent=False)
        self.register_buffer("means", expected.clone())

    @property
    def max_new_tokens(self) -> int:
        """Of the longest answer, with its end."""
        return max(map(len, self.answers))

    def chooser(self, prompt_length: int) -> "AnswerChooser":
        """For one call of `generate`, with prompts padded to this length."""
        return AnswerChooser(self, prompt_length)

    def places(self, written: torch.Tensor) -> torch.Tensor:
        """Where in the tree rows of tokens `(batch, length)` lead, `(batch,)`."""
        behind = len(self._place)
        places = [self._place.get(tuple(row), behind) for row in written.tolist()]
        return torch.tensor(places, device=written.device)

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


class AnswerChooser(LogitsProcessor):
    """Leaves only tokens that some answer has next, and aligns their probabilities if the answers have shares."""

    def __init__(self, answers: FixedAnswers, prompt_length: int):
        self.answers, self.prompt_length = answers, prompt_length
        self._seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        places = self.answers.places(input_ids[:, self.prompt_length :])
        tokens = self.answers.tokens[places]
        allowed = tokens >= 0
        logs = scores.float().gather(1, tokens.clamp(min=0)).masked_fill(~allowed, -float("inf")).log_softmax(-1)
        if self.answers.aligned:
            self._seen.append((places, logs.exp()))
            logs = logs + (self.answers.expected / self.answers.means.clamp(min=1e-6)).log()[places]
        rows, columns = allowed.nonzero(as_tuple=True)
        chosen = torch.full_like(scores, -float("inf"))
        chosen[rows, tokens[rows, columns]] = logs[rows, columns].to(scores.dtype)
        return chosen

    def learn(self) -> None:
        """Take what was seen into the running means."""
        behind = len(self.answers.tokens) - 1
        for places, probabilities in self._seen:
            for place in places.unique().tolist():
                if place != behind:
                    mean = probabilities[places == place].mean(0)
                    self.answers.means[place].lerp_(mean, 1 - _MOMENTUM)
        self._seen.clear()
