"""Find out how a language model is called and what it cannot do, before anything is built around it.

Everything is found by running it on a few tokens, against the model itself: its ids, its whole forward pass, a sample
alone. What can be told to the composed model is written into `language_model_spec`; the rest is refused.
"""

import contextlib
import itertools
from collections.abc import Iterator

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from ..modeling.image_positions import NUM_AXES
from ..modeling.language_models import LanguageModelInterface, default_position_ids
from .errors import CompositionError
from .running import in_mode


_NEAREST = "the nearest that works: a decoder such as llama, qwen3 or gpt2."

#: Two lengths, neither a multiple of the other, so that a model that only runs on multiples of a chunk is found.
_LENGTH = 8
_PADDING = 3

_SHORT_WINDOW = 64

#: Steps of rounding between two runs that should agree: of the same shapes, and of others (padded, with a cache).
_SAME_SHAPES, _OTHER_SHAPES = 4, 16


@torch.no_grad()
def probe_language_model(language_model: PreTrainedModel) -> dict:
    """Run the model on eight tokens, about ten times; returns the `language_model_spec`.

    Raises:
        CompositionError: it cannot be run or trained as a causal LM of text, it sees later tokens (an encoder), it
            cannot be given embeddings, or embeddings give other logits than the ids they were looked up from.
    """
    name = type(language_model).__name__
    interface = LanguageModelInterface(language_model)
    if "inputs_embeds" not in interface.argument_names:
        raise CompositionError(f"{name} takes no inputs_embeds, so image features cannot reach it; {_NEAREST}")
    with in_mode(language_model), _refusing(f"{name} cannot be run on a short plain text"):
        probe = _Probe(language_model)
        if not probe.is_finite():
            raise CompositionError(f"{name} gives logits that are not finite for plain text. Are its weights loaded?")
        if probe.sees_later_tokens():
            raise CompositionError(
                f"{name} is no causal decoder: each token sees the tokens after it, so it cannot generate text. If its "
                f"family has a decoder form, pass a config with is_decoder=True; {_NEAREST}"
            )
        if probe.depends_on_length():
            raise CompositionError(
                f"{name} gives the start of a text other logits when more text follows, so what it generates step by "
                f"step is not what it was trained on; {_NEAREST}"
            )
        spec = {"position_offset": probe.position_offset()}
        spec["position_axes"] = probe.position_axes(spec)
        spec["embedding_scale"] = probe.embedding_scale(spec)
        spec |= probe.padding(spec)
        spec["own_loss"] = probe.loss_is_shifted_cross_entropy(spec)
    with in_mode(language_model, training=True), _refusing(f"{name} cannot be trained on texts of any length"):
        probe.run(interface, probe.input_ids)
    return spec


@torch.no_grad()
def probe_generation(model: PreTrainedModel) -> dict:
    """Decode three tokens with the composed model, with its cache and without; returns `{"use_cache": …}`, and
    `"left_padding"` where padding spoils generation only.

    The oracle is one forward pass over the whole text. The model's vocabulary is what it will be, so a vocabulary
    that was resized is tried here too.

    Raises:
        CompositionError: generation differs from the forward pass even without a cache.
    """
    language_model = model.language_model
    name = type(language_model).__name__
    with in_mode(model), _causal(model), _refusing(f"{name} cannot generate text inside a composed model"):
        padded = model.language_model_interface.spec["left_padding"]
        for use_cache in (True, False):
            if _decodes(model, use_cache, padded):
                return {"use_cache": use_cache, "left_padding": padded}
            if padded and _decodes(model, use_cache, padded=False):
                return {"use_cache": use_cache, "left_padding": False}
    raise CompositionError(
        f"{name} generates by another rule than its forward pass follows (it adds tokens of its own, or predicts another "
        f"position than the next), so what it learns would not be what it says; {_NEAREST}"
    )


def sees_later_tokens(language_model: PreTrainedModel) -> bool:
    """Whether a change of the last token changes the logits before it, as in an encoder."""
    with torch.no_grad(), in_mode(language_model):
        return _Probe(language_model).sees_later_tokens()


class _Probe:
    """The runs. `input_ids` (1, 8) are words: none of the ids that the config names, which some families treat apart."""

    def __init__(self, language_model: PreTrainedModel):
        self.language_model = language_model
        self.embeddings = language_model.get_input_embeddings()
        self.device = self.embeddings.weight.device
        words = plain_words(language_model, _LENGTH + 1)
        self.input_ids, self.other_word = words[:, :-1], words[:, -1]
        self.plain = LanguageModelInterface(language_model, {"position_offset": None})
        self.expected = self.run(self.plain, self.input_ids)

    def run(self, interface: LanguageModelInterface, input_ids: torch.Tensor | None = None, **inputs) -> torch.Tensor:
        """Logits `(1, sequence, vocabulary)` in fp32."""
        sequence = input_ids if input_ids is not None else inputs["inputs_embeds"]
        inputs.setdefault("position_ids", torch.arange(sequence.shape[1], device=self.device).unsqueeze(0))
        arguments = interface.arguments(input_ids=input_ids, use_cache=False, **inputs)
        return self.language_model(**arguments, return_dict=True).logits.float()

    def agrees(self, found: torch.Tensor, expected: torch.Tensor, steps: int) -> bool:
        return relative_error(found, expected) <= rounding(self.language_model.dtype, steps)

    def is_finite(self) -> bool:
        return bool(torch.isfinite(self.expected).all())

    def sees_later_tokens(self) -> bool:
        other_end = self.input_ids.clone()
        other_end[:, -1] = self.other_word
        return not self.agrees(self.run(self.plain, other_end)[:, :-1], self.expected[:, :-1], _SAME_SHAPES)

    def depends_on_length(self) -> bool:
        start = self.run(self.plain, self.input_ids[:, :5])
        return relative_error(start, self.expected[:, :5]) > max(
            1e-4, rounding(self.language_model.dtype, _SAME_SHAPES)
        )

    def position_offset(self) -> int | None:
        """Roberta-likes count from `pad_token_id + 1`, yet their `generate` counts from 0."""
        if "position_ids" not in self.plain.argument_names:
            return None
        for offset in dict.fromkeys((0, (getattr(self.language_model.config, "pad_token_id", None) or 0) + 1, 1, 2)):
            interface = LanguageModelInterface(self.language_model, {"position_offset": offset})
            if self.agrees(self.run(interface, self.input_ids), self.expected, _SAME_SHAPES):
                return offset
        return None

    def position_axes(self, spec: dict) -> int:
        """3 where positions `(3, batch, sequence)` are taken, equal ones are the usual ones, and each axis matters."""
        if spec["position_offset"] is None:
            return 1
        interface = LanguageModelInterface(self.language_model, spec)
        usual = torch.arange(_LENGTH, device=self.device).expand(NUM_AXES, 1, -1)
        try:
            equal = self.run(interface, self.input_ids, position_ids=usual)
            if equal.shape != self.expected.shape or not self.agrees(equal, self.expected, _SAME_SHAPES):
                return 1
            for axis in range(NUM_AXES):
                moved = usual.clone()
                moved[axis, :, 1:] *= 2
                if torch.equal(self.run(interface, self.input_ids, position_ids=moved), equal):
                    return 1
        except Exception:  # noqa: BLE001 - positions of another shape than it takes fail in any way
            return 1
        return NUM_AXES

    def embedding_scale(self, spec: dict) -> float:
        """1, or the factor that the model puts on the embeddings of ids only (falcon_h1).

        Raises:
            CompositionError: no factor makes embeddings equal to their ids.
        """
        embedded = self.embeddings(self.input_ids)
        if self._embeddings_are_ids(embedded, {**spec, "embedding_scale": 1.0}):
            return 1.0
        outputs = self.language_model(input_ids=self.input_ids, output_hidden_states=True, return_dict=True)
        if outputs.hidden_states and outputs.hidden_states[0].shape == embedded.shape:
            ratio = float((outputs.hidden_states[0].float() / embedded.float()).nanmedian())
            # The config states the factor more exactly than a ratio of rounded numbers does.
            values = self.language_model.config.to_dict().values()
            stated = [float(value) for value in values if isinstance(value, (int, float))]
            scale = min([*stated, ratio], key=lambda value: (abs(value - ratio) > 0.01 * abs(ratio), value == ratio))
            if self._embeddings_are_ids(embedded, {**spec, "embedding_scale": scale}):
                return scale
        raise CompositionError(
            f"{type(self.language_model).__name__} gives other logits for the embeddings of a text than for its ids, so "
            f"image features would not reach it as text does; {_NEAREST}"
        )

    def _embeddings_are_ids(self, embedded: torch.Tensor, spec: dict) -> bool:
        interface = LanguageModelInterface(self.language_model, spec)
        no_image = torch.zeros_like(self.input_ids, dtype=torch.bool)
        extra = interface.embedding_arguments(self.language_model, self.input_ids, no_image, pad_token_id=0)
        return self.agrees(self.run(interface, inputs_embeds=embedded, **extra), self.expected, _SAME_SHAPES)

    def padding(self, spec: dict) -> dict[str, bool]:
        interface = LanguageModelInterface(self.language_model, spec)
        filler = self.other_word.expand(1, _PADDING)
        ones, zeros = torch.ones_like(self.input_ids), torch.zeros_like(filler)
        errors = {}
        for side in ("right", "left"):
            pair = (lambda a, b: [b, a]) if side == "left" else (lambda a, b: [a, b])
            attention_mask = torch.cat(pair(ones, zeros), dim=1)
            logits = self.run(
                interface,
                torch.cat(pair(self.input_ids, filler), dim=1),
                attention_mask=attention_mask,
                position_ids=default_position_ids(attention_mask, 0, attention_mask.shape[1], self.device),
            )
            errors[side] = relative_error(logits[attention_mask.bool()], self.expected[0])
        dtype = self.language_model.dtype
        most = rounding(dtype, _OTHER_SHAPES)
        # In bf16 an error may hide among what rounding could do at most; what it does is seen on the other side.
        usual = min(most, max(rounding(dtype, 2), 8 * errors["right"]))
        return {"left_padding": errors["left"] <= usual, "right_padding": errors["right"] <= most}

    def loss_is_shifted_cross_entropy(self, spec: dict) -> bool:
        """Compares what other labels and another `num_items_in_batch` do to the loss: auxiliary losses do not count."""
        interface = LanguageModelInterface(self.language_model, spec)
        losses = []
        for labels, count in ((self.input_ids, 1), (self.input_ids, 2), (self.input_ids.flip(1), 1)):
            labels = labels.clone()
            labels[:, :3] = -100
            given = {"labels": labels, "num_items_in_batch": torch.tensor(count, device=self.device)}
            try:
                arguments = interface.arguments(input_ids=self.input_ids, use_cache=False, **given)
                loss = self.language_model(**arguments, return_dict=True).loss
            except Exception:  # noqa: BLE001 - whatever its loss wants, it is not what a causal LM's loss wants
                return False
            if loss is None or loss.numel() != 1:
                return False
            expected = ForCausalLMLoss(self.expected, vocab_size=self.expected.shape[-1], **given)
            losses.append(torch.stack([loss.float().reshape(()), expected.reshape(())]))
        own, expected = torch.stack([losses[0] - other for other in losses[1:]], dim=1)
        tolerance = rounding(self.language_model.dtype, _OTHER_SHAPES) * losses[0][1]
        return bool(((own - expected).abs() <= tolerance).all())


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square of the difference over that of what is expected: rounding is spread over all logits evenly, and
    an error of a rule is far above it."""
    return float((found - expected).square().mean().sqrt() / expected.square().mean().sqrt())


def rounding(dtype: torch.dtype, steps: int) -> float:
    """Relative error that `steps` roundings may make; in fp32 a floor, for sums in another order."""
    return max(steps * torch.finfo(dtype).eps, 1e-5 if steps <= _SAME_SHAPES else 1e-4)


def plain_words(language_model: PreTrainedModel, number: int, avoid: int | None = None) -> torch.Tensor:
    """Ids `(1, number)` from the middle of the vocabulary, without those that the config names and without `avoid`;
    repeated if they are few."""
    weight = language_model.get_input_embeddings().weight
    named = {value for value in language_model.config.to_dict().values() if isinstance(value, int)} | {avoid}
    middle, num_rows = weight.shape[0] // 2, weight.shape[0]
    ids = [index for index in range(middle, min(middle + number + len(named), num_rows)) if index not in named]
    if len(ids) < 2:  # a vocabulary of a few words only
        ids = [index for index in range(num_rows) if index != avoid]
    return torch.tensor([list(itertools.islice(itertools.cycle(ids), number))], device=weight.device)


def _decodes(model: PreTrainedModel, use_cache: bool, padded: bool) -> bool:
    """Whether three forced decoding steps give the logits of the whole text, also for a shorter sample beside it."""
    # A short attention window is passed too: there a cache that forgets must agree with the forward pass.
    window = getattr(model.language_model.config, "sliding_window", None) or 0
    length = _LENGTH + (window if window <= _SHORT_WINDOW else 0)
    words = plain_words(model.language_model, length, avoid=model.config.image_token_id)
    prompt = words.shape[1] - 3
    expected = [model(input_ids=words).logits.float()]
    attention_mask = torch.ones(1 + padded, prompt, dtype=torch.long, device=words.device)
    input_ids = words[:, :prompt].repeat(1 + padded, 1)
    if padded:
        attention_mask[1, :2] = 0
        expected.append(model(input_ids=words[:, 2:]).logits.float())
    forced = words[0].tolist()
    given, model.generation_config = model.generation_config, GenerationConfig()
    try:
        steps = model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            max_new_tokens=3,
            do_sample=False,
            use_cache=use_cache,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
            prefix_allowed_tokens_fn=lambda _, ids: [forced[len(ids)]],
        ).logits
    finally:
        model.generation_config = given
    found = torch.stack(steps, dim=1).float()  # (batch, 3, vocabulary)
    tolerance = rounding(model.language_model.dtype, _OTHER_SHAPES)
    return all(relative_error(found[row], logits[0, -4:-1]) <= tolerance for row, logits in enumerate(expected))


@contextlib.contextmanager
def _causal(model: PreTrainedModel) -> Iterator[None]:
    """The text that is tried here is all answer; `image_attention` has a probe of its own."""
    given, model.config.image_attention = model.config.image_attention, "causal"
    try:
        yield
    finally:
        model.config.image_attention = given


@contextlib.contextmanager
def _refusing(what: str) -> Iterator[None]:
    """Whatever a model raises on a plain text is a reason not to compose it."""
    try:
        yield
    except CompositionError:
        raise
    except Exception as error:
        raise CompositionError(f"{what} ({type(error).__name__}: {error}); {_NEAREST}") from error
