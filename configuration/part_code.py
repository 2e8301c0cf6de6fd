"""Parts whose classes are in the checkpoint itself (remote code), not in transformers.

Such a part's code is in the bundle as `<module>.py`, which imports what the part needs from `<module>_<name>.py`; the
modules are those of `PART_MODULES`. The part's sub-config says so in its `part_code`:

| key | meaning |
|---|---|
| `classes` | Auto class -> `"<module>.<class>"`, as in transformers' `auto_map` |
| `sha256` | of all the part's files: another content is never run in their place |
| `origin`, `revision` | where the code was copied from, `None` if that is not known |
| `package` | where the code was imported from; in memory only |

Where this file runs from the checkpoint's bundle, the part's code is its neighbour and was trusted together with it.
Where the installed package's classes win over the checkpoint's, a sub-config stays a `DeferredPartConfig`, and nothing of
the part runs, until a model is loaded with `trust_remote_code=True`.
"""

import copy
import hashlib
import importlib
import os
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.dynamic_module_utils import get_cached_module_file
from transformers.utils import HF_MODULES_CACHE

from .checkpoint_code import PART_MODULES, part_files


class DeferredPartConfig(PreTrainedConfig):
    """The values of a part's config whose class is code in the checkpoint that nobody has allowed to run yet."""

    def __init__(self, **values):
        super().__init__(**{key: copy.deepcopy(value) for key, value in values.items() if key != "model_type"})
        self.values = values

    def to_dict(self) -> dict[str, Any]:
        defaults = super().to_dict()
        del defaults["values"]
        return {**defaults, **copy.deepcopy(self.values)}


def part_config(key: str, values: dict[str, Any], package: str) -> PreTrainedConfig:
    """Config of a part from its values in `config.json`, with the class in `package` if the part's code is there.

    Args:
        key: Name of the sub-config, one of `PART_MODULES`.
        values: The sub-config, with its `part_code`.
        package: Package that may hold the part's code.

    Returns:
        A config of the part's own class, or a `DeferredPartConfig` if `package` has not that very code.
    """
    _check_references(key, values["part_code"])
    folder = Path(importlib.import_module(package).__file__).parent
    if code_hash(part_files(folder, PART_MODULES[key])) != values["part_code"]["sha256"]:
        return DeferredPartConfig(**values)
    return _build(values, package)


def load_part_config(key: str, deferred: DeferredPartConfig, source: str, **hub_kwargs) -> PreTrainedConfig:
    """Copy the part's code from the checkpoint as transformers does, compare it with the config, and run it.

    Only for callers that were told `trust_remote_code=True`.

    Args:
        key: Name of the sub-config, one of `PART_MODULES`.
        deferred: What was read from `config.json`.
        source: Folder or Hub id of the checkpoint.
        hub_kwargs: `revision`, `token`, `cache_dir` and the like.

    Raises:
        ValueError: the code is not that which was saved.
    """
    module = PART_MODULES[key]
    copied = get_cached_module_file(source, f"{module}.py", **hub_kwargs)
    if code_hash(part_files(Path(HF_MODULES_CACHE, copied).parent, module)) != deferred.part_code["sha256"]:
        raise ValueError(
            f"{module}*.py in {source} are not the files that config.json was saved with: they were changed, or some "
            "are missing. They are not run. Fetch the checkpoint again, whole."
        )
    config = _build(deferred.values, os.path.dirname(copied).replace(os.sep, "."))
    config._attn_implementation = deferred._attn_implementation
    return config


def part_class(config: PreTrainedConfig, auto_class: str) -> type | None:
    """The class that an Auto class stands for in this part's own code; `None` if the part has no code of its own.

    Raises:
        ValueError: the code was not allowed to run.
    """
    if isinstance(config, DeferredPartConfig):
        raise ValueError(untrusted_message("this model", config))
    part_code = getattr(config, "part_code", None)
    if part_code is None:
        return None
    return _import(part_code["package"], part_code["classes"][auto_class])


def part_config_class(part_code: dict[str, Any]) -> type[PreTrainedConfig]:
    """The config class in a part's own code."""
    return _import(part_code["package"], part_code["classes"]["AutoConfig"])


def part_sources(config: PreTrainedConfig) -> dict[str, str] | None:
    """File name -> source of the part's own code; `None` if it has none.

    Raises:
        ValueError: the code was not allowed to run, so that only the checkpoint it came from has it.
    """
    if isinstance(config, DeferredPartConfig):
        raise ValueError(untrusted_message("this model", config))
    part_code = getattr(config, "part_code", None)
    if part_code is None:
        return None
    module = part_code["classes"]["AutoConfig"].split(".")[0]
    return part_files(Path(importlib.import_module(part_code["package"]).__file__).parent, module)


def code_hash(sources: dict[str, str]) -> str:
    """SHA-256 of names and contents."""
    digest = hashlib.sha256()
    for name, source in sorted(sources.items()):
        digest.update(f"{name}\0{source}\0".encode())
    return digest.hexdigest()


def untrusted_message(source: str, config: DeferredPartConfig) -> str:
    module = config.part_code["classes"]["AutoConfig"].split(".")[0]
    return (
        f"A part of {source} has code of its own, in {module}*.py of the checkpoint, and it was not run. Read those files; "
        "if you trust them, load the model with from_pretrained(…, trust_remote_code=True)."
    )


def _build(values: dict[str, Any], package: str) -> PreTrainedConfig:
    """Old config classes may not take keys that they do not know, so `part_code` is set afterwards."""
    part_code = values["part_code"]
    config_class = _import(package, part_code["classes"]["AutoConfig"])
    config = config_class.from_dict({key: copy.deepcopy(value) for key, value in values.items() if key != "part_code"})
    config.part_code = {**part_code, "package": package}
    return config


def _import(package: str, reference: str) -> type:
    module, _, name = reference.partition(".")
    return getattr(importlib.import_module(f"{package}.{module}"), name)


def _check_references(key: str, part_code: dict[str, Any]) -> None:
    for reference in part_code["classes"].values():
        module, _, name = reference.partition(".")
        if module != PART_MODULES.get(key) or not name.isidentifier():
            raise ValueError(f"part_code of {key} names {reference!r}, which is not in {PART_MODULES.get(key)}.py.")
