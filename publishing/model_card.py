"""The model card of a checkpoint, from what its files and the fresh process say. Nothing is guessed."""

import hashlib
import json
import math
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData, get_local_safetensors_metadata

from ..configuration.checkpoint_code import PART_MODULES, checkpoint_sources, part_files
from .errors import PublishingError
from .fresh_process import FreshCheck
from .static_checks import code_files, read_json


CARD_NAME = "README.md"

#: First part of the weights' names -> what it is, its sub-config, and its name in `composed_from`.
_PARTS = {
    "vision_tower": ("Vision tower", "vision_config", "vision"),
    "audio_tower": ("Audio tower", "audio_config", "audio"),
    "multi_modal_projector": ("Projector", "projector_config", None),
    "language_model": ("Language model", "text_config", "text"),
}
#: Licences that are values on the Hub, but say nothing that two parts could have in common.
_UNSPECIFIC_LICENSES = ("other", "unknown")
_MARK = "<!-- anyvlm: generated, sha256 "

_SNIPPET = """\
from PIL import Image
from transformers import AutoModelForCausalLM, AutoProcessor

repo_id = "{repo_id}"
processor = AutoProcessor.from_pretrained(repo_id, trust_remote_code=True{revision})
model = AutoModelForCausalLM.from_pretrained(repo_id, trust_remote_code=True{revision})

image = Image.new("RGB", (640, 480), "orange")  # or Image.open("picture.jpg")
content = [{{"type": "image", "image": image}}, {{"type": "text", "text": "What is in this picture?"}}]
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": content}}],
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
).to(model.device)
generated = model.generate(**inputs, max_new_tokens=64)
print(processor.decode(generated[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))"""


@dataclass(frozen=True)
class PartFacts:
    """What is known about one part of the model.

    Args:
        title: What it is, in words.
        model_type: Its type in transformers, or the projector's.
        hub_id: Where it came from, `None` if that is not recorded.
        license: Its licence, `None` if that is not recorded.
        parameters: Number of values in its weights.
        dtypes: Their dtypes, the most frequent one first.
        is_pretrained: Whether it was made elsewhere and so has a licence of its own.
    """

    title: str
    model_type: str
    hub_id: str | None
    license: str | None
    parameters: int
    dtypes: tuple[str, ...]
    is_pretrained: bool


def read_parts(checkpoint: str | os.PathLike) -> list[PartFacts]:
    """Facts about every part, from the config and the headers of the weights; no weight is loaded."""
    checkpoint = Path(checkpoint)
    config = read_json(checkpoint / "config.json")
    counts: dict[str, Counter] = {}
    for file in get_local_safetensors_metadata(checkpoint).files_metadata.values():
        for name, tensor in file.tensors.items():
            counts.setdefault(_part_of(name), Counter())[tensor.dtype] += tensor.parameter_count
    parts = []
    for prefix in sorted(counts, key=_order):
        name, _, index = prefix.partition(".towers.")
        title, config_key, origin_key = _PARTS.get(name, (name, "", None))
        part_config = config.get(config_key) or {}
        origin = (config.get("composed_from") or {}).get(origin_key) or {}
        if index:
            title = f"{title} {int(index) + 1}"
            part_config = part_config.get(f"tower_{index}") or {}
            origin = origin[int(index)] if isinstance(origin, list) else {}
        license = origin.get("license")
        parts.append(
            PartFacts(
                title=title,
                model_type=part_config.get("model_type") or part_config.get("type") or "not recorded",
                hub_id=origin.get("id"),
                license=", ".join(license) if isinstance(license, list) else license,
                parameters=counts[prefix].total(),
                dtypes=tuple(dtype for dtype, _ in counts[prefix].most_common()),
                is_pretrained=origin_key is not None,
            )
        )
    return parts


def _part_of(weight: str) -> str:
    """The sub-module that a weight belongs to; of several vision towers, which of them."""
    steps = weight.split(".")
    return ".".join(steps[:3]) if steps[:2] == ["vision_tower", "towers"] else steps[0]


def _order(prefix: str) -> tuple[int, str]:
    name = prefix.split(".")[0]
    return (list(_PARTS).index(name) if name in _PARTS else len(_PARTS), prefix)


def common_license(parts: list[PartFacts]) -> str | None:
    """The licence if every pretrained part is known to have that one, else `None`."""
    licenses = {part.license for part in parts if part.is_pretrained}
    return licenses.pop() if len(licenses) == 1 and not licenses & {None, *_UNSPECIFIC_LICENSES} else None


def build_model_card(
    checkpoint: str | os.PathLike,
    repo_id: str,
    check: FreshCheck,
    *,
    license: str | None = None,
    results: dict[str, dict[str, float]] | None = None,
    revision: str | None = None,
) -> ModelCard:
    """The card of a checkpoint.

    Args:
        checkpoint: The folder.
        repo_id: Where it will be on the Hub; the snippet names it.
        check: What the fresh process found out.
        license: Licence of the whole. Default: that of the parts if they have the same one, else `other`.
        results: `{data set: {metric: value}}`, as `read_results` gives them. Left out of the card by default.
        revision: Branch it will be on, if not the main one.
    """
    checkpoint = Path(checkpoint)
    config = read_json(checkpoint / "config.json")
    parts = read_parts(checkpoint)
    base_models = list(dict.fromkeys(part.hub_id for part in parts if part.hub_id))
    license = license or common_license(parts)
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=["anyvlm", "custom_code"],
        base_model=base_models or None,
        license=license or "other",
    )
    snippet = _SNIPPET.format(repo_id=repo_id, revision=f", revision={json.dumps(revision)}" if revision else "")
    sections = [
        f"# {repo_id.split('/')[-1]}\n\n{_description(parts)}",
        f"## Parts\n\n{_parts_table(parts)}\n\n{_numbers_table(config, parts, check)}",
        "## Load it and ask\n\nThe model's code is in this repository: it needs `transformers`, `torch` and `pillow`, "
        "and no other package. Read the code before you trust it; `revision=` pins it to a commit. While the "
        f"repository is private, log in first with `hf auth login`.\n\n```python\n{snippet}\n```",
        *([f"## Code of others\n\n{others}"] if (others := _code_of_others(checkpoint, config)) else []),
        *([f"## Results\n\nAs reported by the author.\n\n{_results_table(results)}"] if results else []),
        f"## How it was checked\n\n{_how_it_was_checked(check)}",
        f"## Limitations\n\n{_limitations(config, check, results)}",
        f"## Licence\n\n{_license_text(license, parts)}",
    ]
    body = "\n\n".join(sections)
    return ModelCard(_with_mark(f"---\n{data.to_yaml()}\n---\n\n{body}\n\n"))


def read_results(path: str | os.PathLike) -> dict[str, dict[str, float]]:
    """Evaluation results from a JSON file, `{"data set": {"metric": 0.5}}`.

    Raises:
        PublishingError: the file is not like that.
    """
    path = Path(path)
    results = read_json(path)
    for metrics in results.values():
        numbers = metrics.values() if isinstance(metrics, dict) and metrics else [None]
        if not all(isinstance(value, (int, float)) and math.isfinite(value) for value in numbers):
            raise PublishingError(
                f'{path.name} must look like {{"data set": {{"metric": 0.5}}}}, with at least one number for each.'
            )
    return results


def is_hand_written(card: Path) -> bool:
    """Whether a card was not written here, or was edited since."""
    text = card.read_text(encoding="utf-8")
    return _with_mark(text[: text.rfind(_MARK)] if _MARK in text else text) != text


def _with_mark(text: str) -> str:
    """The text and, invisible, its checksum, by which a card that nobody edited is recognised later."""
    return f"{text}{_MARK}{hashlib.sha256(text.encode()).hexdigest()} -->\n"


def _description(parts: list[PartFacts]) -> str:
    names = {part.title: f"`{part.hub_id or part.model_type}`" for part in parts}
    towers = [name for title, name in names.items() if title.startswith("Vision tower")]
    text = (
        f"A vision-language model: the vision tower{'s' * (len(towers) > 1)} {' and '.join(towers) or '(not recorded)'} "
        f"and the language model {names.get('Language model', '(not recorded)')}, joined by a projector with anyvlm. It "
        "reads pictures and text, and writes text."
    )
    known = {title for title, _, _ in _PARTS.values()}
    others = [part.title for part in parts if part.title not in known and not part.title.startswith("Vision tower ")]
    return text + (f" It also has weights under {', '.join(f'`{name}`' for name in others)}." if others else "")


def _parts_table(parts: list[PartFacts]) -> str:
    rows = []
    for part in parts:
        if part.is_pretrained:
            origin = f"[{part.hub_id}](https://huggingface.co/{part.hub_id})" if part.hub_id else "not recorded"
            license = part.license or "unknown"
        else:
            origin, license = "part of this model", "that of this model"
        rows.append([part.title, f"`{part.model_type}`", origin, license, readable_count(part.parameters)])
    return _table(["Part", "Type", "From", "Licence", "Parameters"], rows)


def _code_of_others(checkpoint: Path, config: dict) -> str:
    """Where the code comes from that is run with this model and is neither transformers' nor anyvlm's."""
    points, known = [], set(checkpoint_sources())
    for title, key, _ in _PARTS.values():
        part_code = (config.get(key) or {}).get("part_code")
        if part_code:
            module = PART_MODULES[key]
            known |= part_files(checkpoint, module).keys()
            origin = part_code.get("origin")
            where = f"[{origin}](https://huggingface.co/{origin})" if origin else "a place that is not recorded"
            commit = part_code.get("revision")
            revision = f"commit `{commit}`" if commit else "a version that is not recorded"
            points.append(
                f"{title}: `{module}*.py`, copied from {where}, {revision}. Only imports were rewritten. SHA-256 of the "
                f"files: `{part_code['sha256']}`; other files are not run in their place."
            )
    for name in sorted(code_files(checkpoint) - known):
        points.append(f"`{name}`: of the tokenizer or the image processor, as it was where those came from.")
    if not points:
        return ""
    return (
        "These files came with the parts, and `trust_remote_code=True` runs them. The licence of the part is theirs too.\n\n"
        + "\n".join(f"- {point}" for point in points)
    )


def _numbers_table(config: dict, parts: list[PartFacts], check: FreshCheck) -> str:
    dtypes = Counter()
    for part in parts:
        dtypes[", ".join(part.dtypes)] += part.parameters
    rows = [["Parameters", readable_count(sum(part.parameters for part in parts))]]
    rows.append(["Stored as", "; ".join(dtype for dtype, _ in dtypes.most_common())])
    rows.append(["Tokens per picture", _tokens_per_picture(check)])
    size = (config.get("vision_tower_spec") or {}).get("image_size")
    if size:
        rows.append(["Size of a picture for the tower", f"{size[1]} x {size[0]} pixels (width x height)"])
    if config.get("fusion"):
        rows.append(["Fusion", f"`{config['fusion']}`"])
    rows.append(["Version of the code", f"anyvlm {config.get('code_version') or 'not recorded'}"])
    return _table(["", ""], rows)


def _tokens_per_picture(check: FreshCheck) -> str:
    counts = {tokens for _, _, tokens in check.image_tokens}
    if len(counts) == 1:
        return str(counts.pop())
    return ", ".join(f"{tokens} for {width} x {height} pixels" for width, height, tokens in check.image_tokens)


def _results_table(results: dict[str, dict[str, float]]) -> str:
    rows = [[name, metric, f"{value:g}"] for name, metrics in results.items() for metric, value in metrics.items()]
    return _table(["Data set", "Metric", "Value"], rows)


def _how_it_was_checked(check: FreshCheck) -> str:
    versions = f"transformers {check.transformers_version}, torch {check.torch_version}, Python {check.python_version}"
    classes = ", ".join(f"`{name}`" for name in check.classes)
    same = " Every class gave the same logits and the same greedy tokens." if len(check.classes) > 1 else ""
    again = (
        "A copy saved from that process has the same code, and in another fresh process it gave equal logits."
        if check.saved_again
        else "Saving a copy and loading it again was not checked."
    )
    return (
        f"Loaded offline in a fresh process in which `anyvlm` could not be imported ({versions}), with {classes}. "
        f"The logits were finite and changed with the picture.{same} {again}"
    )


def _limitations(config: dict, check: FreshCheck, results: dict | None) -> str:
    points = []
    size = (config.get("vision_tower_spec") or {}).get("image_size")
    if size and len({tokens for _, _, tokens in check.image_tokens}) == 1:
        points.append(f"The tower sees every picture at {size[1]} x {size[0]} pixels; finer detail is lost.")
    text_config = config.get("text_config") or {}
    context = text_config.get("max_position_embeddings")
    if isinstance(context, int):
        most = max(tokens for _, _, tokens in check.image_tokens)
        points.append(f"The language model was made for {context} positions, of which one picture took {most}.")
    if not config.get("audio_config"):
        points.append("It takes pictures and text; sound is not supported.")
    points.append("How it was trained is not recorded in the checkpoint, so this card cannot say it.")
    if not results:
        points.append("No evaluation results were given for this card.")
    return "\n".join(f"- {point}" for point in points)


def _license_text(license: str | None, parts: list[PartFacts]) -> str:
    named = "; ".join(
        f"{part.title.lower()}: {part.license or 'unknown (not recorded when the model was composed)'}"
        for part in parts
        if part.is_pretrained
    )
    whole = f"`{license}`" if license else "not stated for the whole, because the parts do not share one known licence"
    return f"Of the model: {whole}. Of the parts: {named}. Make sure that your use agrees with all of them."


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def readable_count(number: int) -> str:
    """`1234567` -> `"1.23 M"`."""
    for limit, unit in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= limit:
            return f"{number / limit:.2f} {unit}"
    return str(number)
