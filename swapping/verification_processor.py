"""Step "processor": the text has as many placeholders as the model makes tokens, and the tokenizer, the chat template and
the ends of answers are the language model's."""

from collections.abc import Iterable
from typing import Any

import torch

from ..configuration.image_views import has_planned_views
from ..processing.prepared_views import patch_keys
from ..publishing.fresh_worker import PICTURE_SIZES, picture
from .verification_checks import QUESTION, Check, CheckFailed, Finding, NotChecked, Subject
from .verification_language_model import TEXTS


#: Fields that the model's config and the processor both have, and that must be the same: both count tokens by them.
_SHARED = ("vision_tower_spec", "projector_config", "image_views", "fusion", "video_frames")

_ANSWER = "A small brown dog."


def check_tokenizer(subject: Subject) -> Finding:
    """Texts become the ids that the language model's own tokenizer makes."""
    expected = subject.sources.source_tokenizer()
    if expected is None:
        raise NotChecked("no source came with a tokenizer that can be loaded")
    tokenizer = subject.processor.tokenizer
    own = tokenizer.get_vocab()
    moved = [word for word, token in expected.get_vocab().items() if own.get(word) != token]
    if moved:
        ids = {word: [own.get(word), expected.get_vocab()[word]] for word in moved[:5]}
        raise CheckFailed(
            f"{len(moved)} tokens of the source's tokenizer are missing or have other ids: "
            f"{', '.join(f'{word!r} is {mine}, there {theirs}' for word, (mine, theirs) in ids.items())}.",
            ids,
        )
    for text in TEXTS:
        found, wanted = tokenizer(text).input_ids, expected(text).input_ids
        if found != wanted:
            raise CheckFailed(
                f"{text!r} becomes {_start(found)}, and with the source's tokenizer {_start(wanted)}.",
                {"ids": found, "source_ids": wanted},
            )
    return Finding(f"The vocabulary and the ids of {len(TEXTS)} texts are those of the source's tokenizer.")


def check_image_token(subject: Subject) -> Finding:
    processor, config = subject.processor, subject.config
    token, rows = processor.repeated_token, subject.model.get_input_embeddings().weight.shape[0]
    ids = processor.tokenizer.encode(token, add_special_tokens=False)
    figures = {"token": token, "ids": ids, "config_image_token_id": config.image_token_id, "rows": rows}
    if len(ids) != 1:
        raise CheckFailed(f"The image token {token!r} is {len(ids)} tokens to the tokenizer.", figures)
    if ids[0] != config.image_token_id:
        raise CheckFailed(
            f"The image token {token!r} has the id {ids[0]}, and config.image_token_id is {config.image_token_id}.",
            figures,
        )
    if ids[0] >= rows:
        raise CheckFailed(
            f"The image token {token!r} has the id {ids[0]}, and the language model has {rows} embeddings.", figures
        )
    return Finding(f"{token!r} is one token, {ids[0]}, of {rows}.", figures)


def check_vocabulary(subject: Subject) -> Finding:
    rows, words = subject.model.get_input_embeddings().weight.shape[0], len(subject.processor.tokenizer)
    figures = {"rows": rows, "tokens": words, "config_vocab_size": subject.config.text_config.vocab_size}
    if words > rows:
        raise CheckFailed(f"The tokenizer has {words} tokens, and the language model {rows} embeddings.", figures)
    return Finding(f"The tokenizer's {words} tokens have rows among {rows}.", figures)


def check_settings(subject: Subject) -> Finding:
    for key in _SHARED:
        own, other = getattr(subject.processor, key, None), getattr(subject.config, key, None)
        if own != other:
            raise CheckFailed(f"{key} of the processor and of config.json differ: {_difference(own, other)}.")
    return Finding(f"The processor and config.json agree on {', '.join(_SHARED)}.")


@torch.no_grad()
def check_counts(subject: Subject) -> Finding:
    """Pictures of several sizes: placeholders that the processor writes, and tokens that the model makes."""
    processor, model = subject.processor, subject.model
    token_id, counts, refused = subject.config.image_token_id, {}, {}
    sizes = PICTURE_SIZES
    if subject.config.vision_tower_spec["any_size"] and not has_planned_views(subject.config.image_views):
        sizes = [(width // 2, height // 2) for width, height in sizes]  # what is shown in its own size takes long
    for width, height in (*sizes, (517, 33)):
        shown, name = picture(0, (width, height)), f"{width}x{height}"
        try:
            inputs = processor(text=[processor.image_token], images=[shown], return_tensors="pt")
        except ValueError as error:  # not every tower and projector takes pictures of all proportions
            refused[name] = str(error)
            continue
        placeholders = int((inputs["input_ids"] == token_id).sum())
        names = ("pixel_values", *patch_keys(subject.config.vision_tower_spec), "original_sizes")
        given = {key: inputs[key].to(subject.device) for key in names if key in inputs}
        given |= {key: value for key, value in subject.image_inputs_of([shown]).items() if key.startswith("qformer_")}
        tokens = len(model.get_image_features(**given).pooler_output[0])
        tokens = tokens if model.fusion is None else 1  # beside the text, a picture has one placeholder
        counts[name] = [placeholders, tokens]
        if placeholders != tokens:
            raise CheckFailed(
                f"A picture of {name} pixels gets {placeholders} placeholders, and the model makes {tokens} tokens.",
                {"placeholders_and_tokens": counts},
            )
    if not counts:
        raise CheckFailed(f"Pictures of every size are refused: {next(iter(refused.values()))}", {"refused": refused})
    figures = {"placeholders_and_tokens": counts, **({"refused": refused} if refused else {})}
    most, least = (function(count for count, _ in counts.values()) for function in (max, min))
    return Finding(
        f"{len(counts)} sizes of pictures take {least if least == most else f'{least} to {most}'} tokens each, in "
        "text and model." + (f" Pictures of {' and '.join(refused)} are refused." if refused else ""),
        figures,
    )


def check_chat_template(subject: Subject) -> Finding:
    """Two pictures in a message stand where they belong, between the words."""
    content = [
        {"type": "text", "text": "first"},
        {"type": "image"},
        {"type": "text", "text": "second"},
        {"type": "image"},
        {"type": "text", "text": "third"},
    ]
    if subject.processor.pictures_first:
        raise NotChecked("pictures come before the text here, whatever the text says")
    token = subject.processor.image_token
    rendered = _rendered(subject, [{"role": "user", "content": content}])
    pieces = rendered.split(token)
    if len(pieces) != 3:
        raise CheckFailed(
            f"Of two pictures in a message the chat template writes {len(pieces) - 1}: {rendered!r}.",
            {"rendered": rendered},
        )
    if not ("first" in pieces[0] and "second" in pieces[1] and "third" in pieces[2]):
        raise CheckFailed(
            f"The chat template does not put pictures where they stand: {rendered!r}.", {"rendered": rendered}
        )
    return Finding("The chat template puts each picture where it stands.", {"rendered": rendered})


def check_chat_format(subject: Subject) -> Finding:
    """Without pictures, the chat template writes what the language model's own does."""
    tokenizer = subject.sources.source_tokenizer()
    if tokenizer is None or not tokenizer.chat_template:
        raise NotChecked("no source came with a chat template")
    plain = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": _ANSWER},
        {"role": "user", "content": "?"},
    ]
    try:
        expected = tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template raises what it likes
        raise NotChecked(f"the source's chat template does not take a plain conversation ({error})") from error
    found = _rendered(subject, plain)
    if found != expected:
        raise CheckFailed(
            f"A conversation is written as {found!r}, and by the source's chat template as {expected!r}.",
            {"rendered": found, "source_rendered": expected},
        )
    return Finding("The chat template writes conversations as the source's does.")


def check_special_tokens(subject: Subject) -> Finding:
    """eos, bos and pad of the tokenizer, the language model's config and the generation config."""
    tokenizer, generation = subject.processor.tokenizer, subject.model.generation_config
    text_config = subject.config.text_config
    ends = _ids(generation.eos_token_id)
    figures = {
        "eos": [tokenizer.eos_token_id, text_config.eos_token_id, generation.eos_token_id],
        "bos": [tokenizer.bos_token_id, text_config.bos_token_id, generation.bos_token_id],
        "pad": [tokenizer.pad_token_id, text_config.pad_token_id, generation.pad_token_id],
        "order": ["tokenizer", "text_config", "generation_config"],
    }
    if tokenizer.eos_token_id not in ends:
        raise CheckFailed(
            f"Generation ends at {generation.eos_token_id}, and the tokenizer's eos is {tokenizer.eos_token_id} "
            f"({tokenizer.eos_token!r}).",
            figures,
        )
    foreign = set(_ids(text_config.eos_token_id)) - set(ends)
    if foreign:
        raise CheckFailed(
            f"text_config.eos_token_id has {sorted(foreign)}, at which generation does not end.", figures
        )
    starts = {value for value in figures["bos"] if value is not None}
    if len(starts) > 1:
        raise CheckFailed(
            f"The bos token is {tokenizer.bos_token_id} to the tokenizer, but {sorted(starts)} in all.", figures
        )
    # Any token will do that is left out when an answer is read; the config's may be another still, as some families take
    # their table of positions from it.
    if generation.pad_token_id not in (None, tokenizer.pad_token_id, *tokenizer.all_special_ids):
        raise CheckFailed(
            f"Answers are padded with {generation.pad_token_id}, which is a word to the tokenizer; its pad token is "
            f"{tokenizer.pad_token_id}.",
            figures,
        )
    if subject.sources.generation_config is not None:
        lost = set(_ids(subject.sources.generation_config.eos_token_id)) - set(ends)
        if lost:
            raise CheckFailed(
                f"The source's answers also end at {sorted(lost)}, at which generation does not end here.", figures
            )
    return Finding("Tokenizer, config and generation config agree on eos, bos and pad.", figures)


def check_end_of_answer(subject: Subject) -> Finding:
    """What the chat template writes behind an answer ends generation."""
    tokenizer, ends = subject.processor.tokenizer, _ids(subject.model.generation_config.eos_token_id)
    rendered = _rendered(
        subject,
        [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": _ANSWER}],
        add_generation_prompt=False,
    )
    position = rendered.rfind(_ANSWER)
    if position < 0:
        raise NotChecked("the chat template changes what the assistant says")
    behind = tokenizer.encode(rendered[position + len(_ANSWER) :], add_special_tokens=False)
    marks = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    first = next((token for token in behind if token in marks), None)
    if first is None:
        raise NotChecked(
            "the chat template ends an answer with plain text, and answers end where the model was taught to"
        )
    name = tokenizer.convert_ids_to_tokens(first)
    if first not in ends:
        raise CheckFailed(
            f"The chat template ends an answer with {name!r} ({first}), and generation ends at {ends} only.",
            {"end_of_answer": first, "eos": ends},
        )
    return Finding(f"Answers end with {name!r}, which ends generation.", {"end_of_answer": first, "eos": ends})


def _rendered(subject: Subject, conversation: list[dict], add_generation_prompt: bool = True) -> str:
    return subject.processor.apply_chat_template(
        conversation, tokenize=False, add_generation_prompt=add_generation_prompt
    )


def _ids(value: Any) -> list[int]:
    if value is None:
        return []
    return list(value) if isinstance(value, Iterable) else [value]


def _start(ids: list[int]) -> str:
    return f"{ids[:8]}{' …' if len(ids) > 8 else ''}"


def _difference(own: Any, other: Any) -> str:
    if isinstance(own, dict) and isinstance(other, dict):
        keys = [key for key in own | other if own.get(key) != other.get(key)]
        return "; ".join(f"{key} is {own.get(key)!r} and {other.get(key)!r}" for key in keys[:3])
    return f"{own!r} and {other!r}"


_SAVE_TOKENIZER = (
    "Give the processor the language model's tokenizer, with the image token, and save it with the model: anyvlm.swap "
    "and anyvlm.compose do it."
)

CHECKS = (
    Check("tokenizer", check_tokenizer, _SAVE_TOKENIZER),
    Check(
        "image token", check_image_token, _SAVE_TOKENIZER + " Where only the id differs, set config.image_token_id."
    ),
    Check(
        "vocabulary",
        check_vocabulary,
        "Give every token a row: model.resize_token_embeddings(len(processor.tokenizer)), and train the new rows.",
    ),
    Check(
        "settings",
        check_settings,
        "Model and processor are of different checkpoints: load both from the same folder, and save both into it.",
    ),
    Check(
        "token counts",
        check_counts,
        "Load model and processor from the same folder. If they are, compose or swap again: what a picture takes is "
        "counted then.",
    ),
    Check(
        "pictures in the chat template",
        check_chat_template,
        "Set processor.chat_template to one that writes the image token for each picture; anyvlm.compose makes one of "
        "the tokenizer's own.",
    ),
    Check(
        "chat template",
        check_chat_format,
        "The language model knows its own format best: leave out chat_template when swapping, and the new one's is "
        "taken.",
    ),
    Check(
        "special tokens",
        check_special_tokens,
        "Set model.generation_config (eos_token_id may be a list), model.config.text_config and the tokenizer to the "
        "language model's own, and save both.",
    ),
    Check(
        "end of an answer",
        check_end_of_answer,
        "Add that token to model.generation_config.eos_token_id, or answers go on to the limit of their length.",
    ),
)
