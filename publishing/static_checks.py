"""What the files of a checkpoint tell without loading it."""

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import get_relative_imports

from ..configuration.checkpoint_code import AUTO_MAP, PART_MODULES, part_files
from ..configuration.part_code import code_hash
from .errors import PublishingError
from .files import files_to_publish


_PROCESSOR_CLASSES = ("AutoProcessor",)
_CONFIG_CLASSES = tuple(name for name in AUTO_MAP if name not in _PROCESSOR_CLASSES)
_CONFIGS = ("config.json", "processor_config.json", "tokenizer_config.json")
_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "*.model", "*.tiktoken")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_NAME_KEYS = ("_name_or_path", "name_or_path")

# Two folders deep at least, so that tokens such as "/no_think" and "</s>" are no paths.
_ABSOLUTE_PATH = re.compile(r"(file://|~[/\\]|[A-Za-z]:[\\/]|\\\\\w|/[^/\n<>{}]+/[^/\n<>{}])")


def check_files(checkpoint: str | os.PathLike) -> None:
    """Check that a folder holds a whole checkpoint: configs, code, weights, tokenizer, and nothing local or pickled.

    Raises:
        PublishingError: with everything that is wrong.
    """
    checkpoint = Path(checkpoint)
    configs, problems = _loading_problems(checkpoint)
    for name, config in configs.items():
        for where, value in _local_paths(config):
            problems.append(f"{name} names a folder of this machine: {where} is {value!r}")
    published, _ = files_to_publish(checkpoint)
    pickles = [name for name in published if name.endswith(_PICKLES)]
    if pickles:
        problems.append(f"pickle files can run code when they are loaded: move {', '.join(pickles)} elsewhere")
    if problems:
        raise PublishingError(f"{checkpoint} cannot be published: {'; '.join(problems)}.")


def loading_problems(checkpoint: str | os.PathLike) -> list[str]:
    """What is missing in a folder, or does not belong together, so that it could not be loaded.

    Raises:
        PublishingError: it is no folder of a whole model.
    """
    return _loading_problems(Path(checkpoint))[1]


def _loading_problems(checkpoint: Path) -> tuple[dict[str, dict], list[str]]:
    """The configs that can be read, and the problems."""
    if not checkpoint.is_dir():
        raise PublishingError(f"{checkpoint} is not a folder. Pass the one that save_pretrained wrote.")
    if not (checkpoint / "config.json").is_file() and (checkpoint / "adapter_config.json").is_file():
        raise PublishingError(
            f"{checkpoint} holds an adapter only. Merge it first (model.merge_and_unload()) and save the whole model."
        )
    configs, problems = {}, []
    for name in _CONFIGS:
        try:
            configs[name] = read_json(checkpoint / name)
        except PublishingError as error:
            problems.append(str(error))
    problems += _auto_map_problems(checkpoint, configs)
    problems += _part_code_problems(checkpoint, configs.get("config.json", {}))
    problems += _weight_problems(checkpoint)
    # A tokenizer with code of its own may call its vocabulary as it likes; the fresh process loads it.
    own_tokenizer = "AutoTokenizer" in (configs.get("tokenizer_config.json", {}).get("auto_map") or {})
    if not own_tokenizer and not any(path for pattern in _VOCABULARIES for path in checkpoint.glob(pattern)):
        problems.append("the tokenizer's vocabulary is missing (tokenizer.json or another): save the processor too")
    return configs, problems


def code_files(checkpoint: str | os.PathLike) -> set[str]:
    """Names of the Python files that the checkpoint's `auto_map` entries lead to, missing ones included.

    Raises:
        PublishingError: a config is missing or cannot be read.
    """
    checkpoint = Path(checkpoint)
    return _code_files(checkpoint, [read_json(checkpoint / name) for name in _CONFIGS])


def _code_files(checkpoint: Path, configs: Iterable[dict]) -> set[str]:
    values = [value for config in configs for value in _auto_map_values(config) if "--" not in value]
    entries = {value.rsplit(".", 1)[0] for value in values}
    found, pending = set(), {f"{entry}.py" for entry in entries}
    while pending:
        name = pending.pop()
        found.add(name)
        if (checkpoint / name).is_file():
            # The same reading as transformers', which decides what is copied when a checkpoint is loaded.
            pending |= {f"{module}.py" for module in get_relative_imports(checkpoint / name)} - found
    return found


def read_json(path: Path) -> dict[str, Any]:
    """Content of a JSON file that holds an object.

    Raises:
        PublishingError: there is none, or it cannot be read.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PublishingError(f"{path.name} is missing") from None
    except (OSError, ValueError) as error:
        raise PublishingError(f"{path.name} cannot be read ({error})") from None
    if not isinstance(content, dict):
        raise PublishingError(f"{path.name} does not hold a JSON object")
    return content


def _auto_map_values(config: dict[str, Any]) -> list[str]:
    """The classes it names; tokenizers name a slow and a fast one, of which one may be null. An image processor's own
    are in its part of the processor's config."""
    auto_maps = [config.get("auto_map"), (config.get("image_processor") or {}).get("auto_map")]
    values = [value for auto_map in auto_maps if isinstance(auto_map, dict) for value in auto_map.values()]
    flat = [item for value in values for item in (value if isinstance(value, list) else [value])]
    return [value for value in flat if isinstance(value, str)]


def _auto_map_problems(checkpoint: Path, configs: dict[str, dict]) -> list[str]:
    problems = []
    for name, classes in (("config.json", _CONFIG_CLASSES), ("processor_config.json", _PROCESSOR_CLASSES)):
        if name not in configs:
            continue
        auto_map = configs[name].get("auto_map") or {}
        lacking = [class_name for class_name in classes if class_name not in auto_map]
        if lacking:
            problems.append(
                f"auto_map of {name} lacks {', '.join(lacking)}: save model and processor again with anyvlm"
            )
    for name, config in configs.items():
        elsewhere = [value for value in _auto_map_values(config) if "--" in value]
        if elsewhere:
            problems.append(f"auto_map of {name} needs code of another repository: {', '.join(elsewhere)}")
    missing = sorted(name for name in _code_files(checkpoint, configs.values()) if not (checkpoint / name).is_file())
    if missing:
        problems.append(f"code that auto_map leads to is missing: {', '.join(missing)}")
    return problems


def _part_code_problems(checkpoint: Path, config: dict) -> list[str]:
    """Parts' own code that is not the one that `config.json` was saved with."""
    problems = []
    for key, module in PART_MODULES.items():
        part_code = (config.get(key) or {}).get("part_code")
        if part_code and code_hash(part_files(checkpoint, module)) != part_code.get("sha256"):
            problems.append(
                f"{module}*.py are not the files that config.json was saved with, so the model would not load: save it again"
            )
    return problems


def _weight_problems(checkpoint: Path) -> list[str]:
    index = checkpoint / "model.safetensors.index.json"
    if (checkpoint / "model.safetensors").is_file():
        if index.is_file():
            return ["both model.safetensors and model.safetensors.index.json are there: delete the older one"]
        return []
    if not index.is_file():
        return ["the weights are missing: there is no model.safetensors and no model.safetensors.index.json"]
    try:
        shards = set(read_json(index).get("weight_map", {}).values())
    except PublishingError as error:
        return [str(error)]
    if not shards:
        return [f"{index.name} names no weights"]
    missing = sorted(name for name in shards if not (checkpoint / name).is_file())
    return [f"weights that {index.name} names are missing: {', '.join(missing)}"] if missing else []


def _local_paths(value: Any, where: str = "") -> list[tuple[str, str]]:
    """Keys, dotted, and values of strings that are paths of this machine."""
    if isinstance(value, dict):
        return [hit for key, item in value.items() for hit in _local_paths(item, f"{where}.{key}".lstrip("."))]
    if isinstance(value, list):
        return [hit for index, item in enumerate(value) for hit in _local_paths(item, f"{where}[{index}]")]
    if not isinstance(value, str):
        return []
    is_name = where.rsplit(".", 1)[-1] in _NAME_KEYS and value.startswith(("/", ".", "~"))
    return [(where, value)] if is_name or _ABSOLUTE_PATH.match(value) else []
