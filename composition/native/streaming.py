"""Checkpoints converted file by file, without ever loading the model."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoProcessor, GenerationConfig, PreTrainedConfig, PreTrainedModel, ProcessorMixin
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange

from ...configuration.configuration_anyvlm import AnyVlmConfig
from ...modeling.modeling_anyvlm import AnyVlmForConditionalGeneration
from ...publishing.written_aside import written_aside
from ..errors import CompositionError
from ..small_copies import build_on_meta
from .checkpoint_keys import Loaded, as_saved, loading_plan
from .exporting import processor_to_native
from .families import family_of
from .family import NativeFamily
from .importing import our_config, picture_size, processor_from_native, read_pieces
from .keys import NATIVE, OURS, Rule, Step, plan
from .shard_files import ShardReader, ShardWriter
from .weightless import choose_family, measure_language_model, measure_tower
from .weights import check_complete, language_model_rules


#: Called with bytes done, all bytes, and what is being done.
Progress = Callable[[int, int, str], None]

#: Bytes of a file of weights, if nothing else is asked for: whoever has a model in one file may not have its memory.
LARGEST_FILE = 5 * 10**9

#: Files of a checkpoint that are read; others (weights in other formats) need not be downloaded.
_FILES = ["*.json", "*.jinja", "*.safetensors", "*.model", "*.txt", "*.tiktoken", "*.py"]


def convert_checkpoint(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    to_native: bool = False,
    max_shard_size: int | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    processor: ProcessorMixin | None = None,
    on_progress: Progress | None = None,
) -> str:
    """Convert a native checkpoint to ours, or with `to_native` one of ours to its native class.

    The weights are read and written one after another, in their own dtype; about one file's worth is in memory at a
    time. Every key is accounted for before the first weight is read. The result is written beside `destination` and
    renamed when it is whole, so that an interruption leaves nothing behind.

    Args:
        source: Folder or Hub id. Old checkpoints, whose keys transformers renames when it loads them, will do.
        destination: Folder for the result.
        max_shard_size: Most bytes of one file of weights. Default: the source's largest file, at most `LARGEST_FILE`.
        overwrite: Take the place of a folder that holds files.
        processor: In place of the source's own, where that cannot be loaded.
        on_progress: Told what is going on.

    Returns:
        Name of the model class of the result.

    Raises:
        CompositionError: the family cannot be converted, or weights are left over or missing; the message names them.
        OSError: the source cannot be had, or the destination holds files.
    """
    report = on_progress or (lambda done, total, what: None)
    destination = Path(destination)
    if destination.exists() and not destination.is_dir():
        raise FileExistsError(f"{destination} is a file. Choose a folder.")
    if destination.is_dir() and any(destination.iterdir()) and not overwrite:
        raise FileExistsError(f"{destination} is not empty. Choose another folder, or overwrite it.")
    report(0, 0, f"Reading configs of {source}")
    folder = Path(source) if os.path.isdir(source) else Path(snapshot_download(str(source), allow_patterns=_FILES))
    conversion = _to_native if to_native else _from_native
    with ShardReader(folder) as reader:
        job = conversion(folder, str(source), reader, trust_remote_code, processor)
        report(0, 0, "Accounting for every weight")
        units = _units(job, reader)
        with written_aside(destination) as partial:
            job.save_files(partial)
            writer = ShardWriter(partial, max_shard_size or min(reader.largest_file, LARGEST_FILE))
            for unit in units:
                report(reader.bytes_read, reader.total_bytes, f"Converting {reader.paths[unit.position[0]].name}")
                if writer.write(unit.run(reader.read, job)):
                    reader.close()  # with it go the pages of its file
            writer.finish()
            report(reader.total_bytes, reader.total_bytes, "Done")
    return type(job.target).__name__


@dataclass
class _Job:
    """A conversion: models without weights on both sides, the rules between them, and the rest of the result."""

    source: PreTrainedModel
    target: PreTrainedModel
    rules: list[Rule]
    direction: str
    save_files: Callable[[Path], None]


def _from_native(
    folder: Path,
    name: str,
    reader: ShardReader,
    trust_remote_code: bool,
    native_processor: ProcessorMixin | None,
) -> _Job:
    native_config = AutoConfig.from_pretrained(folder)
    family = family_of(native_config)
    if native_processor is None:
        _require_packages(family)
        native_processor = AutoProcessor.from_pretrained(folder)
        # Where the files of one are missing, transformers gives a part of it.
        if not isinstance(native_processor, ProcessorMixin):
            raise CompositionError(
                f"{name} has no processor of pictures with text, but a {type(native_processor).__name__}. Put the files of "
                f"a {family.processor_class} beside the weights (its save_pretrained writes them)."
            )
    dtype = _dtype(native_config, reader)
    native = build_on_meta(getattr(transformers, family.model_class), native_config, dtype)
    pieces = read_pieces(family, native.config, native_processor, dtype)
    size = picture_size(pieces, native_processor)
    spec, tower = measure_tower(
        pieces["vision_config"],
        size,
        pieces.get("vision_feature_layer"),
        pieces.get("vision_feature_select_strategy", "default"),
    )
    width = native.get_input_embeddings().weight.shape[1]  # Idefics' embeddings do not run on the meta device
    config = our_config(
        family,
        native.config,
        pieces,
        spec,
        measure_language_model(pieces["text_config"], spec, tower, family),
        width,
        dtype,
        None if os.path.isdir(name) else name,
    )
    target = build_on_meta(AnyVlmForConditionalGeneration, config, dtype)
    processor = processor_from_native(family, native_processor, target.config)

    def save_files(destination: Path) -> None:
        target.config.save_pretrained(destination)
        processor.save_pretrained(destination)
        _save_generation_config(folder, native_config, destination)

    rules = [*family.rules(native.config), *language_model_rules(family, target.language_model)]
    return _Job(native, target, rules, OURS, save_files)


def _to_native(
    folder: Path, name: str, reader: ShardReader, trust_remote_code: bool, processor: ProcessorMixin | None
) -> _Job:
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    if not isinstance(config, AnyVlmConfig):
        raise CompositionError(f"{name} is a {config.model_type!r} checkpoint, not one of anyvlm.")
    processor = processor or AutoProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)
    source = build_on_meta(AnyVlmForConditionalGeneration, config, _dtype(config, reader))
    family, target = choose_family(source)
    _require_packages(family)
    native_processor = processor_to_native(family, processor, target.config, config)

    def save_files(destination: Path) -> None:
        target.config.architectures = [type(target).__name__]
        target.config.save_pretrained(destination)
        native_processor.save_pretrained(destination)
        _save_generation_config(folder, config, destination)

    rules = [*family.rules(target.config), *language_model_rules(family, source.language_model)]
    return _Job(source, target, rules, NATIVE, save_files)


def _require_packages(family: NativeFamily) -> None:
    if missing := family.missing_packages():
        raise CompositionError(
            f"transformers makes a {family.processor_class} only where {' and '.join(missing)} are installed: "
            f"pip install {' '.join(missing)}."
        )


def _dtype(config: PreTrainedConfig, reader: ShardReader) -> torch.dtype:
    """As `from_pretrained` chooses it: what the config says, or else the dtype of the weights.

    Raises:
        CompositionError: the weights are quantized.
    """
    if getattr(config, "quantization_config", None) is not None:
        raise CompositionError("The weights are quantized. Convert the checkpoint that they were made of.")
    if config.dtype is not None:
        return config.dtype
    names = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    return next((names[name] for name in reader.dtypes.values() if name in names), torch.float32)


def _save_generation_config(folder: Path, config: PreTrainedConfig, destination: Path) -> None:
    stated = (folder / transformers.utils.GENERATION_CONFIG_NAME).is_file()
    generation_config = (
        GenerationConfig.from_pretrained(folder) if stated else GenerationConfig.from_model_config(config)
    )
    generation_config.save_pretrained(destination)


@dataclass
class _Unit:
    """Weights that must be in memory together: mostly one, several where an operation joins or splits them."""

    loaded: list[Loaded]
    steps: list[Step]
    position: tuple[int, str]

    def run(self, read: Callable[[str], torch.Tensor], job: _Job) -> dict[str, torch.Tensor]:
        """Keys and tensors for the result's files."""
        tensors: dict[str, torch.Tensor] = {}
        for loaded in self.loaded:
            tensors.update(loaded.run({key: read(key) for key in loaded.sources}, job.source))
        made: dict[str, torch.Tensor] = {}
        for step in self.steps:
            made.update(step.run(tensors))
        return as_saved(job.target, _without_tied_twins(job.target, made))


def _without_tied_twins(model: PreTrainedModel, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Leave out what is tied to another weight that is here too, and equal; alone, it goes by the other's name.

    Both are kept where they differ: then transformers does not tie them when it loads them.
    """
    for target, source in model.all_tied_weights_keys.items():
        if target not in tensors:
            continue
        if source not in tensors:
            tensors[source] = tensors.pop(target)
        elif tensors[source].is_meta or torch.equal(tensors[source], tensors[target]):
            tensors.pop(target)
    return tensors


def _units(job: _Job, reader: ShardReader) -> list[_Unit]:
    """Everything to be done, in the order of the source's files; nothing is read for it but headers.

    Raises:
        CompositionError: weights are left over or missing on either side.
    """
    # Once, and not for each weight: which renamings `save_pretrained` would make.
    job.target._weight_conversions = [
        transform
        for transform in get_model_conversion_mapping(job.target, add_legacy=False)
        if not isinstance(transform, PrefixChange)
    ]
    shapes = reader.shapes
    loaded = loading_plan(job.source, reader.file_of, shapes)
    makes = {id(item): _targets(item, shapes, job.source) for item in loaded}
    maker = {key: item for item in loaded for key in makes[id(item)]}
    steps = plan(job.rules, maker, job.direction)
    twins = job.target.all_tied_weights_keys

    groups = _Groups()
    for item in loaded:
        groups.join(id(item))
    for step in steps:
        for key in step.sources:
            groups.join(id(maker[key]), ("step", step.targets))
        for key in step.targets:
            groups.join(("step", step.targets), ("tied", twins.get(key, key)))
    units: dict[int, _Unit] = {}
    for item in loaded:
        first = min((reader.file_of[key], key) for key in item.sources)
        unit = units.setdefault(groups.root(id(item)), _Unit([], [], first))
        unit.loaded.append(item)
        unit.position = min(unit.position, first)
    for step in steps:
        units[groups.root(("step", step.targets))].steps.append(step)
    _check_result(job, units.values(), shapes)
    return sorted(units.values(), key=lambda unit: unit.position)


def _targets(item: Loaded, shapes: Mapping[str, tuple[int, ...]], model: PreTrainedModel) -> list[str]:
    if item.converter is None:
        return [item.target]
    return list(item.run({key: torch.empty(shapes[key], device="meta") for key in item.sources}, model))


def _check_result(job: _Job, units, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Run everything on the meta device: the result must have exactly the keys that `save_pretrained` would write."""
    found: list[str] = []
    for unit in units:
        found += unit.run(lambda key: torch.empty(shapes[key], device="meta"), job)
    expected = as_saved(job.target, _without_tied_twins(job.target, dict(job.target.state_dict())))
    check_complete(expected, found, type(job.target).__name__)


class _Groups:
    """Things that belong together, directly or through others (union-find)."""

    def __init__(self):
        self._parent: dict = {}

    def root(self, item):
        self._parent.setdefault(item, item)
        while self._parent[item] != item:
            item = self._parent[item]
        return item

    def join(self, *items) -> None:
        roots = [self.root(item) for item in items]
        for other in roots[1:]:
            self._parent[other] = roots[0]
