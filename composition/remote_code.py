"""Take the code of a part out of the checkpoint that it lives in, ready to travel inside ours.

The files that a part's classes need are collected by following their relative imports, renamed so that nothing collides
(`modeling_x.py` of a language model becomes `language_model_code_modeling_x.py`), and only their imports are rewritten.
The part is then built from this copy, so that what is composed is what will be loaded.
"""

import ast
import os
import re
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import check_imports, get_cached_module_file
from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME, cached_file, extract_commit_hash

from ..configuration.checkpoint_code import PART_MODULES
from ..configuration.part_code import code_hash
from .errors import CompositionError


#: What transformers takes for a relative import, wherever it stands in a file.
_READS_AS_IMPORT = re.compile(r"^(\s*)(from\s+\.\S+\s+import|import\s+\.\S+\s*$)")

#: Path of a module below the folder of the code, without ".py".
ModulePath = tuple[str, ...]


@dataclass(frozen=True)
class RemoteCode:
    """Where the code of a part is.

    Args:
        classes: Auto class -> `"module.class"`, as in `auto_map`.
        read: Source of a module, `None` if there is no such file.
        origin: Hub id of the repository, `None` for a local folder.
        revision: Commit of the repository, `None` if that is not known.
    """

    classes: dict[str, str]
    read: Callable[[ModulePath], str | None]
    origin: str | None = None
    revision: str | None = None


def find_remote_code(
    source: str | os.PathLike | PreTrainedConfig | PreTrainedModel, auto_class: str, trust_remote_code: bool
) -> RemoteCode | None:
    """Where the code of a part is; `None` if the part is of a type that transformers has. Runs nothing.

    Args:
        source: Hub id, path, config or model.
        auto_class: Auto class for its model, `"AutoModel"` or `"AutoModelForCausalLM"`.
        trust_remote_code: As in transformers: without it, a type that transformers has too is built from its class.

    Raises:
        CompositionError: the part needs its own code, and that is not allowed or is not there.
    """
    if isinstance(source, PreTrainedModel):
        if not is_remote(type(source)):
            return None
        _require_trust(trust_remote_code, type(source).__name__)
        classes = {"AutoConfig": _reference(type(source.config)), auto_class: _reference(type(source))}
        if not is_remote(type(source.config)):
            raise CompositionError(_only_one_class(type(source).__name__))
        model_file = Path(sys.modules[type(source).__module__].__file__)
        config_file = Path(sys.modules[type(source.config).__module__].__file__)
        return RemoteCode(
            classes,
            _folders_reader(model_file.parent, config_file.parent),
            origin=_hub_id(source.name_or_path),
            revision=model_file.parent.name if re.fullmatch("[0-9a-f]{40}", model_file.parent.name) else None,
        )
    if isinstance(source, PreTrainedConfig):
        if not is_remote(type(source)):
            return None
        auto_map, name, repository = (
            getattr(source, "auto_map", None) or {},
            type(source).__name__,
            source.name_or_path,
        )
        if not repository:
            raise CompositionError(
                f"A {name} is code of a checkpoint, and it does not say of which. Pass the checkpoint's path or Hub id, "
                "or a config loaded from there with AutoConfig.from_pretrained(…, trust_remote_code=True)."
            )
    else:
        name = repository = os.fspath(source)
        config_dict, _ = PreTrainedConfig.get_config_dict(repository)
        auto_map = config_dict.get("auto_map") or {}
        is_native = config_dict.get("model_type") in CONFIG_MAPPING
        if not auto_map.keys() & {"AutoConfig", auto_class} or (is_native and not trust_remote_code):
            return None
    _require_trust(trust_remote_code, name)
    classes = {key: auto_map.get(key) for key in ("AutoConfig", auto_class)}
    if None in classes.values():
        raise CompositionError(_only_one_class(name))
    repositories = {reference.split("--")[0] if "--" in reference else repository for reference in classes.values()}
    if len(repositories) > 1:
        raise CompositionError(
            f"The classes of {name} are in several repositories: {', '.join(sorted(repositories))}. Copy their code into "
            "one folder with the weights, and pass that."
        )
    repository = repositories.pop()
    read, revision = _repository_reader(repository)
    classes = {key: reference.split("--")[-1] for key, reference in classes.items()}
    return RemoteCode(classes, read, origin=_hub_id(repository), revision=revision)


def bundle_remote_code(code: RemoteCode, key: str) -> dict:
    """Copy, rewrite and import the code of a part.

    Args:
        code: Where it is.
        key: The part's sub-config, one of `PART_MODULES`.

    Returns:
        The `part_code` for the part's config (`configuration/part_code.py`), whose classes can be imported now.

    Raises:
        CompositionError: a file is missing, or its imports cannot be followed.
        ImportError: a package that the code needs is not installed; transformers' own message.
    """
    module = PART_MODULES[key]
    sources = rewrite_part_code(code, module)
    with tempfile.TemporaryDirectory() as folder:
        # transformers names the package after the folder and a hash of the code: equal code is imported once.
        directory = Path(folder, f"anyvlm_{module}")
        directory.mkdir()
        for name, text in sources.items():
            (directory / name).write_text(text, encoding="utf-8")
        for name in sources:
            check_imports(directory / name)
        copied = get_cached_module_file(str(directory), f"{module}.py")
    return {
        "classes": {auto_class: f"{module}.{ref.rpartition('.')[2]}" for auto_class, ref in code.classes.items()},
        "sha256": code_hash(sources),
        "origin": code.origin,
        "revision": code.revision,
        "package": os.path.dirname(copied).replace(os.sep, "."),
    }


def rewrite_part_code(code: RemoteCode, module: str) -> dict[str, str]:
    """File name -> source of everything the classes need, flat, under names that begin with `module`."""
    entries = {tuple(reference.split(".")[:-1]) for reference in code.classes.values()}
    rewritten: dict[str, str] = {}
    paths: dict[str, ModulePath] = {}
    pending = sorted(entries)
    while pending:
        path = pending.pop()
        name = _flat_name(module, path)
        if paths.setdefault(name, path) != path:
            raise CompositionError(f"{'/'.join(path)}.py and {'/'.join(paths[name])}.py would both become {name}.py.")
        if f"{name}.py" in rewritten:
            continue
        source = code.read(path)
        if source is None:
            raise CompositionError(f"The part's code is not whole: {'/'.join(path)}.py is missing.")
        rewriter = _ImportRewriter(source, path, module, code.read)
        rewritten[f"{name}.py"] = rewriter.rewrite()
        pending += rewriter.needed
    rewritten[f"{module}.py"] = _entry_source(code, module, sorted(name[:-3] for name in rewritten))
    return rewritten


def _entry_source(code: RemoteCode, module: str, names: list[str]) -> str:
    where = f"{code.origin} at revision {code.revision or 'unknown'}" if code.origin else "a local folder"
    references = [reference.rpartition(".") for reference in code.classes.values()]
    imports = [f"from .{_flat_name(module, tuple(path.split('.')))} import {name}" for path, _, name in references]
    others = "".join(f"    from .{name} import *  # noqa: F403\n" for name in names)
    return (
        f'"""Code of a part, copied from {where} when the model was composed; only imports were rewritten."""\n\n'
        "from typing import TYPE_CHECKING\n\n" + "\n".join(imports) + "\n\n\n"
        "if TYPE_CHECKING:  # everything the part needs, named here so that transformers copies it\n"
        f"{others}\n\n__all__ = {sorted(name for _, _, name in references)!r}\n"
    )


def _flat_name(module: str, path: ModulePath) -> str:
    return "_".join((module, *(step for step in path if step != "__init__")))


class _ImportRewriter(ast.NodeVisitor):
    """Point the relative imports of one file at flat names; everything else stays byte for byte.

    Args:
        source: Text of the file.
        path: Its place below the folder of the code.
        module: What flat names begin with.
        read: Source of a module, `None` if there is no such file.

    `needed` holds the modules that were found to be imported.
    """

    def __init__(self, source: str, path: ModulePath, module: str, read: Callable[[ModulePath], str | None]):
        self.source, self.path, self.module, self.read = source, path, module, read
        self.needed: list[ModulePath] = []
        self._replacements: list[tuple[ast.stmt, str]] = []
        self._guards: list[ast.AST] = []

    def rewrite(self) -> str:
        self.visit(ast.parse(self.source, f"{'/'.join(self.path)}.py"))
        lines = [line.encode() for line in _lines(self.source)]
        for node, text in sorted(self._replacements, key=lambda item: (-item[0].lineno, -item[0].col_offset)):
            first, last = node.lineno - 1, node.end_lineno - 1
            lines[first : last + 1] = [
                lines[first][: node.col_offset] + text.encode() + lines[last][node.end_col_offset :]
            ]
        return _hide_from_transformers(b"".join(lines).decode())

    def visit(self, node: ast.AST) -> None:
        is_guard = isinstance(node, (ast.Try, ast.If, ast.FunctionDef, ast.AsyncFunctionDef))
        if is_guard:
            self._guards.append(node)
        super().visit(node)
        if is_guard:
            self._guards.pop()

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.level:
            self._replacements.append((node, self._rewritten(node)))

    def visit_Call(self, node: ast.Call) -> None:
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
        argument = node.args[0] if node.args else None
        if name == "import_module" and isinstance(argument, ast.Constant) and str(argument.value).startswith("."):
            raise CompositionError(
                f"{self._where(node)} imports {argument.value!r} with import_module, which cannot be followed. Write it as "
                "an import statement."
            )
        self.generic_visit(node)

    def _rewritten(self, node: ast.ImportFrom) -> str:
        package = self.path[:-1]
        above = node.level - 1
        target = (*package[: len(package) - above], *(node.module.split(".") if node.module else ()))
        if above > len(package):
            return self._missing(node)
        if node.module and self.read(target) is not None:
            return self._import_names(target, node.names)
        statements, names = [], []
        for alias in node.names:
            if self.read((*target, alias.name)) is not None:
                self.needed.append((*target, alias.name))
                flat = _flat_name(self.module, (*target, alias.name))
                statements.append(f"from . import {flat} as {alias.asname or alias.name}")
            else:
                names.append(alias)
        if names:
            if self.read((*target, "__init__")) is None:
                return self._missing(node)
            statements.append(self._import_names((*target, "__init__"), names))
        return "; ".join(statements)

    def _import_names(self, path: ModulePath, names: list[ast.alias]) -> str:
        self.needed.append(path)
        return ast.unparse(ast.ImportFrom(module=_flat_name(self.module, path), names=names, level=1))

    def _missing(self, node: ast.ImportFrom) -> str:
        """What stands for an import that fails anyway: it fails in the same place and way, if it is reached at all."""
        statement = ast.unparse(node)
        if any(isinstance(guard, ast.If) and "TYPE_CHECKING" in ast.unparse(guard.test) for guard in self._guards):
            return "pass"
        if self._guards:
            return f"raise ImportError({f'{statement}: there was no such file when the model was composed'!r})"
        raise CompositionError(f"{self._where(node)} says `{statement}`, and there is no such file beside it.")

    def _where(self, node: ast.AST) -> str:
        return f"{'/'.join(self.path)}.py:{node.lineno}"


def _lines(source: str) -> list[str]:
    """Lines as Python counts them; `str.splitlines` also ends lines at form feeds and other separators."""
    return re.findall(r"[^\n]*\n|[^\n]+", source)


def _hide_from_transformers(source: str) -> str:
    """Comment out lines inside strings that transformers would take for imports, of files that are not there."""
    real = {node.lineno for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom) and node.level}
    lines = _lines(source)
    for index, line in enumerate(lines):
        if index + 1 not in real and _READS_AS_IMPORT.match(line):
            lines[index] = _READS_AS_IMPORT.sub(r"\1# \2", line)
    return "".join(lines)


def _folders_reader(*folders: Path) -> Callable[[ModulePath], str | None]:
    def read(path: ModulePath) -> str | None:
        for folder in folders:
            file = folder.joinpath(*path[:-1], f"{path[-1]}.py")
            if file.is_file():
                return file.read_text(encoding="utf-8")
        return None

    return read


def _repository_reader(repository: str) -> tuple[Callable[[ModulePath], str | None], str | None]:
    """Reads modules of a local folder or a Hub repository, and the commit they are read from."""
    if os.path.isdir(repository):
        return _folders_reader(Path(repository)), None
    config_file = cached_file(repository, "config.json", _raise_exceptions_for_missing_entries=False)
    revision = extract_commit_hash(config_file, None)

    def read(path: ModulePath) -> str | None:
        file = cached_file(
            repository, "/".join(path) + ".py", revision=revision, _raise_exceptions_for_missing_entries=False
        )
        return None if file is None else Path(file).read_text(encoding="utf-8")

    return read, revision


def is_remote(part_class: type) -> bool:
    in_cache = part_class.__module__.split(".")[0] == TRANSFORMERS_DYNAMIC_MODULE_NAME
    return in_cache or part_class._auto_class is not None


def _reference(part_class: type) -> str:
    return f"{part_class.__module__.rpartition('.')[2]}.{part_class.__name__}"


def _hub_id(name: str | None) -> str | None:
    return None if not name or os.path.exists(name) else name


def _require_trust(trust_remote_code: bool, name: str) -> None:
    if not trust_remote_code:
        raise CompositionError(
            f"{name} has code of its own, which would be run and saved with the model. Read it; if you trust it, pass "
            "trust_remote_code=True."
        )


def _only_one_class(name: str) -> str:
    return (
        f"{name} must bring both a config class and a model class of its own, for the task it is used for (auto_map with "
        "AutoConfig and AutoModelForCausalLM for a language model, AutoModel for a tower); it does not."
    )
