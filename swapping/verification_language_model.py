"""Step "language model": alone, and inside the composed model without a picture, it gives its source's logits."""

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from ..composition.language_model_probe import probe_generation, probe_language_model
from ..modeling.language_models import DEFAULT_SPEC
from .verification_checks import (
    OTHER_SHAPES,
    SAME_SHAPES,
    Check,
    CheckFailed,
    Finding,
    NotChecked,
    Subject,
    agree,
    agree_unless_trained,
    compare_weights,
    report_weights,
)


#: Words, numbers, code, other scripts.
TEXTS = (
    "The cat sat on the mat, and nobody minded.",
    "Was kostet das? 12,50 € – zu viel!",
    "def area(r):\n    return 3.14 * r ** 2",
    "猫は猫である。 Привет, мир! 🙂",
)

_LONGEST = 32


def text_ids(subject: Subject) -> list[torch.Tensor]:
    """Ids `(1, length)` of several texts of different lengths, and of words from all over the vocabulary.

    Only ids that the language model has a row for: what the tokenizer knows beyond them is found in its own step.
    """
    config, rows = subject.config, subject.model.get_input_embeddings().weight.shape[0]
    rows = min(rows, config.text_config.vocab_size)
    named = {value for value in config.text_config.to_dict().values() if isinstance(value, int)}
    texts = [subject.processor.tokenizer(text).input_ids[:_LONGEST] for text in TEXTS]
    texts += [[index * rows // 12 for index in range(1, 12)], list(range(rows // 2, min(rows // 2 + 7, rows)))]
    avoided = [set(), set(), set(), set(), named, named]
    kept = [
        [token for token in text if token < rows and token not in not_these and token != config.image_token_id]
        for text, not_these in zip(texts, avoided)
    ]
    return [torch.tensor([text], device=subject.device) for text in kept if len(text) > 1]


@torch.no_grad()
def logits_of(model: PreTrainedModel, input_ids: torch.Tensor, **arguments) -> torch.Tensor:
    arguments.setdefault("attention_mask", torch.ones_like(input_ids))
    return model(input_ids=input_ids, **arguments).logits.float()


def composed_logits(subject: Subject, input_ids: torch.Tensor, **arguments) -> torch.Tensor:
    """Logits of the whole model for text alone."""
    return logits_of(subject.model, input_ids, **_as_answer(subject, input_ids), **arguments)


def _as_answer(subject: Subject, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """What says that a text is all answer, which is causal, where prompts are not."""
    return {"token_type_ids": torch.ones_like(input_ids)} if subject.config.image_attention == "prefix" else {}


def check_rules(subject: Subject) -> Finding:
    """What the config says about the language model is what running it shows."""
    stated = {**DEFAULT_SPEC, **(subject.config.language_model_spec or {})}
    measured = probe_language_model(subject.model.language_model)
    wrong = {}
    for key, value in measured.items():
        if isinstance(value, bool):  # more may be known than these runs show: padding that spoils generation only
            differs = stated[key] and not value
        elif isinstance(value, float):
            differs = abs(stated[key] - value) > 1e-3 * abs(value)
        else:
            differs = stated[key] != value
        if differs:
            wrong[key] = [stated[key], value]
    if wrong:
        named = ", ".join(f"{key} is {found!r} and the config says {said!r}" for key, (said, found) in wrong.items())
        raise CheckFailed(f"language_model_spec is of another model: {named}.", wrong)
    return Finding("How it counts positions, scales embeddings and takes padding is as the config says.", measured)


def check_weights(subject: Subject) -> Finding:
    source = subject.source_language_model()
    comparison = compare_weights(subject.model.language_model, source)
    return report_weights(comparison, subject.sources.text.name, "language_model" in subject.trained)


def check_logits(subject: Subject) -> Finding:
    """The language model, taken out of the composed one, against its source."""
    source, name = subject.source_language_model(), subject.sources.text.name
    rows = source.get_input_embeddings().weight.shape[0]
    texts = [ids[ids < rows].unsqueeze(0) for ids in text_ids(subject)]
    found = [logits_of(subject.model.language_model, ids)[0] for ids in texts]

    def agreement(logits_of_source: Callable[[torch.Tensor], torch.Tensor], than: str) -> Finding:
        expected = [logits_of_source(ids)[0] for ids in texts]
        rows = min(found[0].shape[-1], expected[0].shape[-1])
        both = (torch.cat([logits[:, :rows] for logits in each]) for each in (found, expected))
        return agree_unless_trained(subject, "language_model", *both, "Logits", than)

    try:
        return agreement(lambda ids: logits_of(source, ids), name)
    except CheckFailed:
        # A model imported from another class gives what that class gives, which may be without a scale or a cap of logits.
        whole = subject.sources.whole_of_language_model(source.dtype, subject.device)
        if whole is None:
            raise
        return agreement(lambda ids: logits_of(whole, ids, **_as_answer(subject, ids)), f"{name} as a whole")


def check_composed(subject: Subject) -> Finding:
    """The whole model, given text alone, against its language model."""
    texts = text_ids(subject)
    found = torch.cat([composed_logits(subject, ids)[0] for ids in texts])
    expected = torch.cat([logits_of(subject.model.language_model, ids)[0] for ids in texts])
    return agree(
        found, expected, subject.model.dtype, SAME_SHAPES, "Logits of the whole for text alone", "its language model"
    )


def check_padding(subject: Subject) -> Finding:
    """Texts of different lengths in one batch, padded on either side, against the language model with each text alone."""
    spec = subject.model.language_model_interface.spec
    sides = [side for side in ("left", "right") if spec[f"{side}_padding"]]
    if not sides:
        raise NotChecked("this language model takes no padding, as the config says")
    texts = text_ids(subject)
    longest = max(ids.shape[1] for ids in texts)
    found, expected = [], []
    for side in sides:
        batch = texts[0].new_full((len(texts), longest), subject.processor.tokenizer.pad_token_id or 0)
        batch = batch.clamp(max=subject.model.get_input_embeddings().weight.shape[0] - 1)
        mask = torch.zeros_like(batch)
        for row, ids in enumerate(texts):
            columns = slice(longest - ids.shape[1], None) if side == "left" else slice(0, ids.shape[1])
            batch[row, columns], mask[row, columns] = ids[0], 1
        logits = composed_logits(subject, batch, attention_mask=mask)
        found += [logits[row][mask[row].bool()] for row in range(len(texts))]
        expected += [logits_of(subject.model.language_model, ids)[0] for ids in texts]
    what = f"Logits of texts padded on the {' and the '.join(sides)}"
    return agree(
        torch.cat(found),
        torch.cat(expected),
        subject.model.dtype,
        OTHER_SHAPES,
        what,
        "the language model with each alone",
    )


def check_cache(subject: Subject) -> Finding:
    """Three steps of decoding with the cache, against one forward pass over the whole text."""
    if not subject.model.language_model_interface.spec["use_cache"]:
        raise NotChecked("this language model is used without its cache, as the config says")
    if not probe_generation(subject.model)["use_cache"]:
        raise CheckFailed("Decoding with the cache gives other logits than one forward pass over the same text.")
    return Finding("Decoding with the cache gives the logits of one forward pass.")


CHECKS = (
    Check(
        "weights",
        check_weights,
        "If it was trained on purpose, say so (--trained language_model). Otherwise it was trained or changed by "
        "mistake, or this is not its source: put the source's weights back (anyvlm.swap(…, text=SOURCE)), and freeze "
        "it while training.",
    ),
    Check(
        "logits",
        check_logits,
        "The weights are the source's, so the config is not: compare text_config with the source's config.json, and "
        "the versions of transformers.",
    ),
    Check(
        "rules",
        check_rules,
        "Put this language model in with anyvlm.swap or anyvlm.compose, which measure it, not by assigning the "
        "module.",
    ),
    Check(
        "text in the whole",
        check_composed,
        "What lies around the language model changes text without pictures: load the checkpoint again, and look for "
        "hooks and adapters on model.language_model.",
    ),
    Check("padding", check_padding, "Ask one text at a time, and compose again: padding is measured then."),
    Check("cache", check_cache, "Generate with use_cache=False, and compose again: the cache is measured then."),
)
