"""Step "whole": pictures reach the answer, samples do not disturb each other, and what is saved is what was verified."""

import tempfile
from pathlib import Path

import torch

from ..composition.language_model_probe import relative_error, rounding
from ..modeling.cross_attention import TanhGate
from ..publishing.errors import PublishingError
from ..publishing.fresh_process import logits_in_fresh_process
from ..publishing.fresh_worker import NEW_TOKENS, PICTURE_SIZES, greedy_tokens, model_inputs, picture
from .verification_checks import OTHER_SHAPES, Check, CheckFailed, Finding, NotChecked, Subject, agree


#: A picture that changes the logits by less than this many roundings cannot be told from none.
_LEAST_ROUNDINGS = 10


@torch.no_grad()
def check_picture_changes_logits(subject: Subject) -> Finding:
    """Another picture changes the logits behind it, and none before it."""
    if not _open(subject):
        raise NotChecked("the gates of the cross-attention are closed, as before any training")
    dtype = subject.model.dtype
    first, other = subject.pictures[:2]
    inputs = model_inputs(subject.processor, first).to(subject.device)
    changed = model_inputs(subject.processor, other.resize(first.size)).to(subject.device)
    logits, others = (subject.model(**each).logits[0].float() for each in (inputs, changed))
    if not bool(torch.isfinite(logits).all()):
        raise CheckFailed("Logits for a picture and a question are not finite.")
    positions = (inputs["input_ids"][0] == subject.config.image_token_id).nonzero().flatten()
    if not len(positions):
        raise CheckFailed("A message with a picture has no image token: the chat template leaves it out.")
    start, end = int(positions[0]), int(positions[-1]) + 1
    effect = relative_error(others[end:], logits[end:])
    least = _LEAST_ROUNDINGS * torch.finfo(dtype).eps
    figures, reason = {"effect": effect}, f"{_LEAST_ROUNDINGS} roundings of {str(dtype).removeprefix('torch.')}"
    if not effect > least:
        raise CheckFailed(
            f"Another picture changes the logits behind it by {effect:.1g} only.", figures, least, reason
        )
    if subject.config.image_attention != "prefix" and start > 0:
        leak = figures["leak"] = relative_error(others[:start], logits[:start])
        limit = rounding(dtype, OTHER_SHAPES)
        if not leak <= limit:
            raise CheckFailed(
                f"Text before the picture sees it: its logits change by {leak:.2g}.", figures, limit, reason
            )
    return Finding(f"Another picture changes the logits behind it by {effect:.2g}.", figures, least, reason)


@torch.no_grad()
def check_batch(subject: Subject) -> Finding:
    """A padded batch of one picture, none and two: each sample's logits are those it has alone."""
    spec = subject.model.language_model_interface.spec
    arguments = {"return_tensors": "pt", "padding": True}
    if not spec["left_padding"]:  # the processor pads on the left by itself
        arguments["padding_side"] = "right"
        if not spec["right_padding"]:
            raise NotChecked("this language model takes no padding, as the config says")
    token = subject.processor.image_token
    first, second = subject.pictures[:2]
    samples = [(f"{token} What is this?", [first]), (f"{token} A word or two, please.", [second])]
    if not subject.processor.pictures_first:  # else every text must have as many
        samples += [("The cat sat on the mat.", []), (f"{token} or {token}?", [second, first])]
    batch = subject.processor(
        text=[text for text, _ in samples], images=[pictures for _, pictures in samples], **arguments
    ).to(subject.device)
    mask = batch["attention_mask"].bool()
    logits = subject.model(**batch).logits
    found, expected = [], []
    for row, (text, pictures) in enumerate(samples):
        alone = subject.processor(text=[text], images=[pictures] if pictures else None, **arguments).to(subject.device)
        expected.append(subject.model(**alone).logits[0])
        found.append(logits[row][mask[row]])
    rows = {"Logits of pictures in a batch": [row for row, (_, pictures) in enumerate(samples) if pictures]}
    rows["Logits of text alone in a batch with pictures"] = [row for row, (_, each) in enumerate(samples) if not each]
    findings = [
        agree(
            torch.cat([found[row] for row in own]),
            torch.cat([expected[row] for row in own]),
            subject.model.dtype,
            OTHER_SHAPES,
            what,
            "each sample alone",
        )
        for what, own in rows.items()
        if own
    ]
    first = findings[0]
    return Finding(" ".join(each.detail for each in findings), first.figures, first.tolerance, first.tolerance_reason)


@torch.no_grad()
def check_generation(subject: Subject) -> Finding:
    """Greedy decoding with the cache gives the tokens of decoding without it."""
    inputs = model_inputs(subject.processor, subject.pictures[0]).to(subject.device)
    arguments = {
        "max_new_tokens": NEW_TOKENS,
        "min_new_tokens": NEW_TOKENS,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    if not subject.model.language_model_interface.spec["use_cache"]:
        subject.model.generate(**inputs, **arguments)
        raise NotChecked("answers are generated, without a cache, as the config says")
    cached, uncached = (subject.model.generate(**inputs, **arguments, use_cache=use) for use in (True, False))
    start = inputs["input_ids"].shape[1]
    tokens = [each.sequences[0, start:].tolist() for each in (cached, uncached)]
    tolerance = rounding(subject.model.dtype, OTHER_SHAPES)
    reason = f"{OTHER_SHAPES} roundings; where they may turn the choice between two tokens, it is no failure"
    largest = 0.0
    for step, (mine, theirs) in enumerate(zip(cached.logits, uncached.logits)):
        difference = relative_error(mine.float(), theirs.float())
        largest = max(largest, difference)
        if not difference <= tolerance:
            raise CheckFailed(
                f"At token {step + 1} of the answer, logits with the cache differ from those without by "
                f"{difference:.2g}.",
                {"with_cache": tokens[0], "without": tokens[1], "relative_difference": difference},
                tolerance,
                reason,
            )
        if tokens[0][step] != tokens[1][step]:
            break
    text = subject.processor.decode(tokens[0], skip_special_tokens=True)
    figures = {"tokens": tokens[0], "text": text, "relative_difference": largest}
    return Finding(
        f"{len(tokens[0])} tokens are generated, the same with the cache as without.", figures, tolerance, reason
    )


@torch.no_grad()
def check_fresh_process(subject: Subject) -> Finding:
    """A process without `anyvlm` loads what is saved, and gives the same logits."""
    if subject.timeout is None:
        raise NotChecked("left out, as was asked")
    if not _open(subject):
        raise NotChecked("the gates of the cross-attention are closed, so the logits would not show the picture")
    inputs = model_inputs(subject.processor, picture(0, PICTURE_SIZES[0])).to(subject.device)
    expected = subject.model(**inputs).logits.cpu()
    tokens = greedy_tokens(subject.model, inputs).cpu()
    try:
        with tempfile.TemporaryDirectory(prefix="anyvlm-verify-") as folder:
            checkpoint = subject.checkpoint
            if checkpoint is None:
                checkpoint = Path(folder, "checkpoint")
                subject.model.save_pretrained(checkpoint)
                subject.processor.save_pretrained(checkpoint)
            found = logits_in_fresh_process(checkpoint, timeout=subject.timeout)
    except PublishingError as error:
        raise CheckFailed(str(error).splitlines()[0]) from error
    finding = agree(
        found["logits"], expected, subject.model.dtype, OTHER_SHAPES, "Logits in a fresh process", "this one"
    )
    finding.figures["same_tokens"] = torch.equal(found["tokens"], tokens)
    return finding


def _open(subject: Subject) -> bool:
    """Whether a picture can reach the logits at all: new cross-attention is closed."""
    gates = [module.gate for module in subject.model.modules() if isinstance(module, TanhGate)]
    return not gates or any(bool((gate != 0).any()) for gate in gates)


CHECKS = (
    Check(
        "picture",
        check_picture_changes_logits,
        "All steps before passed, so features reach the projector: look at config.fusion, at image_attention and at "
        "what the language model does with inputs_embeds.",
    ),
    Check(
        "batch",
        check_batch,
        "Ask one sample at a time; and compose or swap again, which measures on which side the language model takes "
        "padding.",
    ),
    Check(
        "generation",
        check_generation,
        "Generate with use_cache=False, and compose or swap again: the cache is measured then.",
    ),
    Check(
        "fresh process",
        check_fresh_process,
        "Save model and processor again, both into the same folder. If numbers differ, see whether something was "
        "changed after loading that no file holds.",
    ),
)
