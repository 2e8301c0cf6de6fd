"""A YAML file as plain values, and where in it each of them stands."""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


#: Keys and indices that lead to a value: `("stages", 0, "epochs")`.
KeyPath = tuple[str | int, ...]


@dataclass(frozen=True)
class Problem:
    """What is wrong with a recipe, where, and what to write instead."""

    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"


class RecipeError(ValueError):
    """Everything that is wrong with a recipe, at once: `problems`, in the order of the file."""

    def __init__(self, problems: list[Problem]):
        self.problems = problems
        super().__init__("\n".join(map(str, problems)))


@dataclass
class YamlFile:
    """Values of a file, and the place of each.

    Args:
        name: As it is shown in messages.
        values: Plain dicts, lists, strings, numbers.
        places: Of each key and each entry of a list: line and column, both from 1; or the option that gave it.
        problems: What the reading found already, such as a key that stands twice.
    """

    name: str
    values: Any
    places: dict[KeyPath, tuple[int, int] | str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def where(self, path: KeyPath) -> str:
        """`"recipe.yaml:12:5"`: where a value stands, or else what it would stand in."""
        place = next(self.places[path[:end]] for end in range(len(path), -1, -1) if path[:end] in self.places)
        return place if isinstance(place, str) else f"{self.name}:{place[0]}:{place[1]}"

    def order(self, path: KeyPath) -> tuple[int, int]:
        place = next(self.places[path[:end]] for end in range(len(path), -1, -1) if path[:end] in self.places)
        return (0, 0) if isinstance(place, str) else place

    def override(self, assignment: str) -> None:
        """Set one value: `"stages.0.epochs=2"`; the value is YAML. What it goes into must be there, the key itself need not.

        Raises:
            RecipeError: it is no assignment, or leads nowhere.
        """
        where = f"--set {assignment}"
        keys, equals, text = assignment.partition("=")
        if not equals or not keys:
            raise RecipeError([Problem(where, "write a path and a value, such as stages.0.epochs=2.")])
        path = tuple(int(key) if key.isdecimal() else key for key in keys.split("."))
        holder = self.values
        for depth, key in enumerate(path):
            there = (
                isinstance(holder, dict) if isinstance(key, str) else isinstance(holder, list) and key < len(holder)
            )
            if not there or (depth + 1 < len(path) and isinstance(holder, dict) and key not in holder):
                raise RecipeError([Problem(where, f"there is no {dotted(path[: depth + 1])}{_choices(holder)}.")])
            if depth + 1 < len(path):
                holder = holder[key]
        read = parse_yaml(text or "null", where)
        holder[path[-1]] = read.values
        for below in [known for known in self.places if known[: len(path)] == path]:
            del self.places[below]
        self.places[path] = where


def dotted(path: KeyPath) -> str:
    """`"stages[0].epochs"`."""
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path).lstrip(".")


def read_yaml(path: str | os.PathLike) -> YamlFile:
    """Read a file.

    Raises:
        RecipeError: it is not YAML.
        OSError: it cannot be read.
        ImportError: PyYAML is not installed.
    """
    return parse_yaml(Path(path).read_text(encoding="utf-8"), str(path))


def parse_yaml(text: str, name: str) -> YamlFile:
    """As `read_yaml`, of a text. `1e-3` is a number, as everywhere but in YAML 1.1."""
    try:
        import yaml
    except ImportError as error:
        raise ImportError("Recipes are YAML files, which PyYAML reads: pip install 'anyvlm[train]'.") from error

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )
    loader = Loader(text)
    try:
        root = loader.get_single_node()
        found = YamlFile(name, None, {(): (1, 1)})
        found.values = {} if root is None else _value(loader, root, (), found, ())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        message = " ".join(part for part in (error.context, error.problem) if part)
        raise RecipeError([Problem(place, f"this is not YAML: {message}. {_hint(message)}")]) from error
    except yaml.YAMLError as error:
        raise RecipeError([Problem(name, f"this is not YAML: {error}.")]) from error
    finally:
        loader.dispose()
    return found


def _value(loader: Any, node: Any, path: KeyPath, found: YamlFile, above: tuple[Any, ...]) -> Any:
    import yaml

    if any(node is other for other in above):
        found.problems.append(Problem(found.where(path), "this refers to itself."))
        return None
    above = (*above, node)
    if isinstance(node, yaml.MappingNode):
        written = [pair for pair in node.value if pair[0].tag != "tag:yaml.org,2002:merge"]
        seen: set[Any] = set()
        for key_node, _ in written:
            key = loader.construct_object(key_node, deep=True)
            if key in seen:
                place = f"{found.name}:{key_node.start_mark.line + 1}:{key_node.start_mark.column + 1}"
                found.problems.append(Problem(place, f"`{key}` stands here twice; keep one."))
            seen.add(key)
        loader.flatten_mapping(node)
        values = {}
        for key_node, value_node in node.value:
            key = str(loader.construct_object(key_node, deep=True))
            found.places[(*path, key)] = _start(key_node)
            values[key] = _value(loader, value_node, (*path, key), found, above)
        return values
    if isinstance(node, yaml.SequenceNode):
        values = []
        for index, entry in enumerate(node.value):
            found.places[(*path, index)] = _start(entry)
            values.append(_value(loader, entry, (*path, index), found, above))
        return values
    return loader.construct_object(node, deep=True)


def _start(node: Any) -> tuple[int, int]:
    return node.start_mark.line + 1, node.start_mark.column + 1


def _hint(message: str) -> str:
    if "'\\t'" in message:
        return "Indent with spaces; a tab is none."
    return "Check the indentation and the brackets here and on the line before; text with : # ? or { in it goes in quotes."


def _choices(holder: Any) -> str:
    if isinstance(holder, dict):
        return f"; there are {', '.join(map(str, holder))}"
    if isinstance(holder, list):
        return f"; the list has {len(holder)} entries, counted from 0"
    return ""
