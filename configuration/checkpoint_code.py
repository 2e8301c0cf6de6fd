"""The code that travels inside every checkpoint.

A checkpoint must load where ``anyvlm`` is not installed, and a copy saved from there must load again. Three facts of
``transformers.dynamic_module_utils`` shape this module:

* it follows relative imports by file name in *one* folder, so the package is written flat;
* it keys a local module by the entry file and what that file imports, so separate entries for config, model and
  processor would give separate, incompatible classes: every ``auto_map`` value points at one entry module;
* it finds imports with a regular expression, so imports are rewritten with ``ast`` and never by text.

Parts with code of their own (``part_code.py``) add files under names that begin with their module's name. The config knows
which parts those are and writes them; the processor, saved before or after, leaves them alone. The entry module names
them without importing them, so that transformers copies them; a part's code is run when its config is built.

Only the standard library is used here.
"""

import ast
import functools
import os
from collections.abc import Mapping
from pathlib import Path


ENTRY_MODULE = "anyvlm_checkpoint"

#: Sub-packages of ``anyvlm`` whose modules travel. Their module names are unique across the three.
TRAVELLING_PACKAGES = ("configuration", "modeling", "processing")

#: Sub-config of a part -> module of the part's own code, if it has any, and beginning of its files' names.
PART_MODULES = {"vision_config": "vision_tower_code", "text_config": "language_model_code"}

#: What the Auto classes of transformers find in a checkpoint.
AUTO_MAP = {
    "AutoConfig": f"{ENTRY_MODULE}.AnyVlmConfig",
    "AutoModel": f"{ENTRY_MODULE}.AnyVlmForConditionalGeneration",
    "AutoModelForCausalLM": f"{ENTRY_MODULE}.AnyVlmForConditionalGeneration",
    "AutoModelForImageTextToText": f"{ENTRY_MODULE}.AnyVlmForConditionalGeneration",
    "AutoModelForMultimodalLM": f"{ENTRY_MODULE}.AnyVlmForConditionalGeneration",
    "AutoProcessor": f"{ENTRY_MODULE}.AnyVlmProcessor",
}

#: The same for the image processor of several towers, the only one of ours; it goes into the image processor's own settings.
FUSED_IMAGE_PROCESSOR_AUTO_MAP = {"AutoImageProcessor": f"{ENTRY_MODULE}.FusedImageProcessor"}

_ENTRY_SOURCE = '''"""Entry module of the code in this checkpoint: every `auto_map` value of its configs points here."""

from .configuration_anyvlm import AnyVlmConfig
from .fused_image_processor import FusedImageProcessor
from .modeling_anyvlm import AnyVlmForConditionalGeneration, AnyVlmModel
from .processing_anyvlm import AnyVlmProcessor


__all__ = ["AnyVlmConfig", "AnyVlmForConditionalGeneration", "AnyVlmModel", "AnyVlmProcessor", "FusedImageProcessor"]
'''

_PART_CODE_SOURCE = """
from typing import TYPE_CHECKING


if TYPE_CHECKING:  # a part's own code: imported when its config is built, named here so that transformers copies it
"""


def checkpoint_sources() -> dict[str, str]:
    """File name -> source of every module of ours that a checkpoint needs, flat; without the parts' own code.

    Works from the installed package (whose folders are flattened) and from a checkpoint's own copy of the code
    (which is flat already).
    """
    here = Path(__file__).resolve().parent
    sources = {f"{ENTRY_MODULE}.py": _ENTRY_SOURCE}
    if (here / f"{ENTRY_MODULE}.py").is_file():
        # A copy from the Hub shares its folder with other code of the repository, such as a tokenizer's.
        pending = _neighbours(_ENTRY_SOURCE)
        while pending:
            name = pending.pop()
            if name not in sources:
                sources[name] = (here / name).read_text(encoding="utf-8")
                pending |= _neighbours(sources[name])
        return dict(sorted(sources.items()))
    for package in TRAVELLING_PACKAGES:
        for path in sorted((here.parent / package).glob("*.py")):
            if path.name == "__init__.py":
                continue
            if path.name in sources:
                raise ValueError(f"Two travelling modules are called {path.name}; their names must be unique.")
            sources[path.name] = flatten_relative_imports(path.read_text(encoding="utf-8"), path.name)
    return sources


@functools.lru_cache(
    maxsize=256
)  # a training saves the same code over and over, and parsing it takes longer than writing
def flatten_relative_imports(source: str, file_name: str = "<source>") -> str:
    """Rewrite ``from ..package.module import x`` to ``from .module import x``; everything else stays byte for byte.

    Raises:
        ValueError: for ``from . import x`` (transformers would not copy ``x``).
    """
    lines = source.splitlines(keepends=True)
    for node in ast.walk(ast.parse(source, file_name)):
        if not isinstance(node, ast.ImportFrom) or node.level == 0:
            continue
        if not node.module:
            raise ValueError(f"{file_name}:{node.lineno}: write `from .module import name`, not `from . import name`.")
        written = "." * node.level + node.module
        flat = "." + node.module.rsplit(".", 1)[-1]
        line = lines[node.lineno - 1]
        lines[node.lineno - 1] = line.replace(f"from {written} import", f"from {flat} import", 1)
    return "".join(lines)


def part_files(directory: str | os.PathLike, module: str) -> dict[str, str]:
    """File name -> source of the code of a part, as far as it is in ``directory``."""
    names = [
        path for path in Path(directory).glob(f"{module}*.py") if path.stem == module or path.stem[len(module)] == "_"
    ]
    return {path.name: path.read_text(encoding="utf-8") for path in sorted(names)}


def write_checkpoint_code(
    directory: str | os.PathLike, parts: Mapping[str, dict[str, str] | None] | None = None
) -> list[Path]:
    """Write the code into ``directory`` (made if missing), each file aside first and then renamed; returns the paths.

    Args:
        directory: Folder of the checkpoint.
        parts: Module of ``PART_MODULES`` -> its files, for parts with code of their own. With ``None``, the files that
            are in ``directory`` stay; otherwise those of another model are removed.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    sources = checkpoint_sources()
    modules = [module for module in PART_MODULES.values() if (directory / f"{module}.py").is_file()]
    stale = set()
    if parts is not None:
        modules = [module for module in PART_MODULES.values() if parts.get(module)]
        for module in PART_MODULES.values():
            sources.update(parts.get(module) or {})
            stale |= part_files(directory, module).keys()
    if modules:
        sources[f"{ENTRY_MODULE}.py"] += _PART_CODE_SOURCE + "".join(
            f"    from .{module} import *  # noqa: F403\n" for module in modules
        )
    written = []
    for name, source in sources.items():
        path = directory / name
        aside = directory / f".{name}.{os.getpid()}.tmp"
        aside.write_text(source, encoding="utf-8")
        os.replace(aside, path)
        written.append(path)
    for name in stale - sources.keys():
        (directory / name).unlink()
    return written


def _neighbours(source: str) -> set[str]:
    """Files that flat code imports from its own folder."""
    imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
    return {f"{node.module}.py" for node in imports if node.level == 1 and node.module}
