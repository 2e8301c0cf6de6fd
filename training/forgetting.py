"""Is the language model still as good at text alone as it was before it learnt about pictures?"""

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase, ProcessorMixin, Trainer, TrainerCallback


#: Under this name it is logged.
TEXT_PERPLEXITY = "text_perplexity"


@dataclass
class Forgetting:
    """What a training did to the perplexity on held-out text.

    Args:
        before: Perplexity before the first step.
        history: `(step, perplexity)` of each measurement, the first one included.
    """

    before: float
    history: list[tuple[int, float]] = field(default_factory=list)

    @property
    def after(self) -> float:
        """The last measurement."""
        return self.history[-1][1]

    @property
    def change(self) -> float:
        """Relative: 0.1 is a perplexity 10 % higher than before, which is worse."""
        return self.after / self.before - 1


@torch.no_grad()
def text_perplexity(
    model: nn.Module,
    processing_class: ProcessorMixin | PreTrainedTokenizerBase,
    texts: Sequence[str],
    batch_size: int = 8,
    max_length: int | None = None,
    stride: int | None = None,
) -> float:
    """Perplexity of a language model on texts: `exp` of the mean negative log-likelihood of all their tokens.

    Each token counts once, with as much of its text before it as the window has: texts longer than `max_length` are read
    in overlapping windows, and a window counts only what the one before has not (as transformers' page on perplexity
    does). The first token of a text, which nothing predicts, does not count.

    Args:
        model: A composed model, a bare causal language model, or one of them with adapters. It is left in the mode,
            training or evaluation, in which it was.
        processing_class: Its processor or tokenizer.
        texts: Held-out texts, without pictures.
        batch_size: Windows per forward pass.
        max_length: Tokens of a window. Default: 512, or what the language model takes if that is less.
        stride: Tokens from one window to the next. Default: half of `max_length`.

    Raises:
        ValueError: there are no texts, or none with two tokens; `stride` is larger than `max_length`.
    """
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    if max_length is None:
        max_length = min(getattr(model.config.get_text_config(), "max_position_embeddings", None) or 512, 512)
    stride = max(max_length // 2, 1) if stride is None else stride
    if not 0 < stride < max_length:
        raise ValueError(f"stride={stride} must be between 1 and max_length - 1 = {max_length - 1}.")
    tokens = [tokenizer(text).input_ids for text in texts]
    # Windows of like lengths in one batch: little padding, and none for texts of one length.
    windows = sorted(
        (w for ids in tokens for w in _windows(ids, max_length, stride)), key=lambda window: len(window[0])
    )
    if not windows:
        raise ValueError("Perplexity needs texts of at least two tokens. Pass some held-out text.")
    was_training = model.training
    model.eval()
    try:
        total, count = 0.0, 0
        for start in range(0, len(windows), batch_size):
            loss, number = _negative_log_likelihood(model, windows[start : start + batch_size])
            total, count = total + loss, count + number
    finally:
        model.train(was_training)
    return math.exp(total / count)


def _windows(ids: list[int], max_length: int, stride: int) -> Iterator[tuple[list[int], int]]:
    """Windows of a text, each with the place in it from which on its tokens count."""
    counted = 1
    for begin in range(0, len(ids), stride):
        window = ids[begin : begin + max_length]
        if begin + len(window) > counted:
            yield window, counted - begin
            counted = begin + len(window)
        if counted == len(ids):
            return


def _negative_log_likelihood(model: nn.Module, windows: list[tuple[list[int], int]]) -> tuple[float, int]:
    """Sum over the tokens that count, and their number."""
    device = next(model.parameters()).device
    lengths = [len(ids) for ids, _ in windows]
    input_ids = torch.zeros(len(windows), max(lengths), dtype=torch.long, device=device)
    attention_mask = torch.zeros_like(input_ids)
    for row, (ids, _) in enumerate(windows):
        input_ids[row, : len(ids)] = torch.tensor(ids, device=device)
        attention_mask[row, : len(ids)] = 1
    padding = {"attention_mask": attention_mask} if len(set(lengths)) > 1 else {}
    logits = model(input_ids=input_ids, use_cache=False, **padding).logits
    total, number = 0.0, 0
    for row, (ids, first) in enumerate(windows):
        targets = input_ids[row, first : len(ids)]
        # One row at a time in single precision: a batch of them would be the largest tensor of all.
        own = logits[row, first - 1 : len(ids) - 1].float()
        total += nn.functional.cross_entropy(own, targets, reduction="sum").double().item()
        number += len(targets)
    return total, number


class ForgettingCallback(TrainerCallback):
    """Perplexity on held-out text before and after a training, and on the way, in the trainer's log.

    ```python
    callback = ForgettingCallback(trainer, held_out_texts)
    trainer.add_callback(callback)
    trainer.train()
    callback.result.change  # 0.03: 3 % higher than before
    ```

    A resumed training compares with what was measured before its first step, which the checkpoint's log holds.

    Args:
        trainer: The trainer to which it is added; it logs `text_perplexity`.
        texts: Held-out texts like those that the language model is for. There are none by default, and none are fetched.
        every_n_steps: Measure also every so many steps.
        warn_above: Warn at the end if the perplexity has risen by more than this share; `None` for never.
        batch_size, max_length, stride: As for `text_perplexity`.

    Raises:
        ValueError: no texts.

    Attributes:
        result: The `Forgetting` of the training, from its beginning on.
    """

    def __init__(
        self,
        trainer: Trainer,
        texts: Sequence[str],
        every_n_steps: int | None = None,
        warn_above: float | None = 0.05,
        batch_size: int = 8,
        max_length: int | None = None,
        stride: int | None = None,
    ):
        if isinstance(texts, str) or not texts:
            raise ValueError(
                "Forgetting is measured on text that is not trained on: pass a list of some dozens of texts such as the "
                "language model was made for. Nothing is taken by default."
            )
        self.trainer, self.texts = trainer, list(texts)
        self.every_n_steps, self.warn_above = every_n_steps, warn_above
        self.options = {"batch_size": batch_size, "max_length": max_length, "stride": stride}
        self.result: Forgetting | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        known = [(entry["step"], entry[TEXT_PERPLEXITY]) for entry in state.log_history if TEXT_PERPLEXITY in entry]
        if known and state.global_step > 0:
            self.result = Forgetting(known[0][1], known)
        else:
            self.result = Forgetting(math.nan)
            self._measure(state)
            self.result.before = self.result.after

    def on_step_end(self, args, state, control, **kwargs):
        # The last step's is measured here while the writers of logs are still open.
        due = self.every_n_steps is not None and state.global_step % self.every_n_steps == 0
        if due or control.should_training_stop:
            # `Trainer` takes any log for the one that is due.
            should_log = control.should_log
            self._measure(state)
            control.should_log = should_log

    def on_train_end(self, args, state, control, **kwargs):
        if self.result.history[-1][0] != state.global_step:
            self._measure(state)
        if self.warn_above is not None and self.result.change > self.warn_above:
            warnings.warn(
                f"Perplexity on held-out text rose from {self.result.before:.2f} to {self.result.after:.2f}, by "
                f"{self.result.change:.1%}, more than {self.warn_above:.1%}: the language model forgets. Mix text into the "
                "training (text replay), add a KL term to the language model as it was (TextKLObjective), train adapters "
                "(LoRA) in place of all its weights, or lower its learning rate.",
                stacklevel=2,
            )

    def _measure(self, state) -> None:
        model = self.trainer.model
        perplexity = text_perplexity(model, self.trainer.processing_class, self.texts, **self.options)
        self.result.history.append((state.global_step, perplexity))
        self.trainer.log({TEXT_PERPLEXITY: perplexity})
