"""The code that travels inside every checkpoint.

A checkpoint must load where ``anyvlm`` is not installed, and a copy saved from there must load again. Three facts of
``transformers.dynamic_module_utils`` shape this module:

* it follows relative imports by file name in *one* folder, so the package is written flat;
* it keys a local module by the entry file and what that file imports, so separate entries for config, model and
  processor would give separate, incompatible classes: every ``auto_map`` value points at one entry module;
* it finds imports with a regular expression, so imports are rewritten with ``ast`` and never by text.

Only the standard library is used here.
"""

import ast
import os
from pathlib import Path


ENTRY_MODULE = "anyvlm_checkpoint"

#: Sub-packages of ``anyvlm`` whose modules travel. Their module names are unique across the three.
TRAVELLING_PACKAGES = ("configuration", "modeling", "processing")

#: What the Auto classes of transformers find in a checkpoint.
AUTO_MAP = {
    "AutoConfig": f"{ENTRY_MODULE}.AnyVlmConfig",
    "AutoModel": f"{ENTRY_MODULE}.AnyVlmForConditionalGeneration",
    "AutoModelForCausalLM": f"{ENTRY_MODULE}.AnyVlmForConditionalGeneration",
    "AutoModelForImageTextToText": f"{ENTRY_MODULE}.AnyVlmForConditionalGeneration",
    "AutoModelForMultimodalLM": f"{ENTRY_MODULE}.AnyVlmForConditionalGeneration",
    "AutoProcessor": f"{ENTRY_MODULE}.AnyVlmProcessor",
}

_ENTRY_SOURCE = '''"""Entry module of the code in this checkpoint: every `auto_map` value of its configs points here."""

from .configuration_anyvlm import AnyVlmConfig
from .modeling_anyvlm import AnyVlmForConditionalGeneration, AnyVlmModel
from .processing_anyvlm import AnyVlmProcessor


__all__ = ["AnyVlmConfig", "AnyVlmForConditionalGeneration", "AnyVlmModel", "AnyVlmProcessor"]
'''


def checkpoint_sources() -> dict[str, str]:
    """File name -> source of every module a checkpoint needs, flat.

    Works from the installed package (whose folders are flattened) and from a checkpoint's own copy of the code
    (which is flat already and is returned as it stands).
    """
    here = Path(__file__).resolve().parent
    if (here / f"{ENTRY_MODULE}.py").is_file():
        # A copy from the Hub shares its folder with nothing but the modules that the entry module imports.
        files = [path for path in sorted(here.glob("*.py")) if path.name != "__init__.py"]
        return {path.name: path.read_text(encoding="utf-8") for path in files}
    sources = {f"{ENTRY_MODULE}.py": _ENTRY_SOURCE}
    for package in TRAVELLING_PACKAGES:
        for path in sorted((here.parent / package).glob("*.py")):
            if path.name == "__init__.py":
                continue
            if path.name in sources:
                raise ValueError(f"Two travelling modules are called {path.name}; their names must be unique.")
            sources[path.name] = flatten_relative_imports(path.read_text(encoding="utf-8"), path.name)
    return sources


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


def write_checkpoint_code(directory: str | os.PathLike) -> list[Path]:
    """Write the code into ``directory`` (made if missing), each file aside first and then renamed; returns the paths."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for name, source in checkpoint_sources().items():
        path = directory / name
        aside = directory / f".{name}.{os.getpid()}.tmp"
        aside.write_text(source, encoding="utf-8")
        os.replace(aside, path)
        written.append(path)
    return written
