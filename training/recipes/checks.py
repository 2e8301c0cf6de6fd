"""What is wrong with values, against the keys that may stand there: with places, and with what to write instead."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from .schema import Key
from .yaml_file import KeyPath, Problem, YamlFile, dotted


_KINDS = {
    "text": lambda value: isinstance(value, str),
    "number": lambda value: isinstance(value, (int, float)) and not isinstance(value, bool),
    "integer": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "yes or no": lambda value: isinstance(value, bool),
    "mapping": lambda value: isinstance(value, dict),
    "list": lambda value: isinstance(value, list),
}
_IN_WORDS = {
    "text": "text",
    "number": "a number",
    "integer": "a whole number",
    "yes or no": "true or false",
    "mapping": "keys with values below it",
    "list": "a list",
}


class Findings:
    """The problems of one file, gathered."""

    def __init__(self, file: YamlFile):
        self.file = file
        #: Keys that were surely meant by misspelt ones, and so are not missing.
        self.meant: set[KeyPath] = set()
        self._found: list[tuple[tuple[int, int], Problem]] = [((0, 0), problem) for problem in file.problems]

    def add(self, path: KeyPath, message: str) -> None:
        name = dotted(path)
        problem = Problem(self.file.where(path), f"{name}: {message}" if name else message)
        if all(problem != other for _, other in self._found):
            self._found.append((self.file.order(path), problem))

    def under(self, path: KeyPath) -> bool:
        """Whether anything was found at or below a path."""
        prefix = dotted(path)
        return any(problem.message.startswith(prefix) for _, problem in self._found)

    @property
    def problems(self) -> list[Problem]:
        return [problem for _, problem in sorted(self._found, key=lambda entry: entry[0])]


def check_mapping(values: Any, keys: Mapping[str, Key], path: KeyPath, findings: Findings) -> bool:
    """Check a mapping's keys and values; whether it is one."""
    if not isinstance(values, dict):
        findings.add(path, f"{_show(values)} stands where keys with values should: {', '.join(keys)}.")
        return False
    for key, value in values.items():
        if key not in keys:
            findings.add((*path, key), unknown(key, keys, "key"))
            findings.meant.update((*path, near) for near in nearest(key, keys))
        elif value is not None or keys[key].required:
            check_value(value, keys[key], (*path, key), findings)
    for key, rule in keys.items():
        if rule.required and key not in values and (*path, key) not in findings.meant:
            findings.add(path, f"`{key}` is missing: {rule.about}.")
    return True


def check_value(value: Any, rule: Key, path: KeyPath, findings: Findings) -> None:
    kinds = [kind for kind in _KINDS if kind in rule.kind]
    if not any(_KINDS[kind](value) for kind in kinds):
        wanted = " or ".join(_IN_WORDS[kind] for kind in kinds)
        findings.add(path, f"{_show(value)} is not {wanted} ({rule.about}).")
        return
    if rule.choices and value not in rule.choices:
        findings.add(path, unknown(value, rule.choices, "choice"))
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return
    if rule.above is not None and not value > rule.above:
        findings.add(path, f"{value} must be more than {rule.above:g} ({rule.about}).")
    if rule.least is not None and value < rule.least:
        findings.add(path, f"{value} must be at least {rule.least:g} ({rule.about}).")
    if rule.most is not None and value > rule.most:
        findings.add(path, f"{value} must be at most {rule.most:g} ({rule.about}).")


def nearest(name: Any, known: Iterable[str]) -> list[str]:
    """The name that was probably meant, if any is near."""
    return difflib.get_close_matches(str(name), list(known), n=1)


def unknown(name: Any, known: Iterable[str], what: str) -> str:
    """`"no such key. Did you mean …?"`, or what there is."""
    known = list(known)
    near = nearest(name, known)
    if near:
        return f"there is no such {what}; did you mean `{near[0]}`?"
    if len(known) > 20:
        return f"there is no such {what}."
    return f"there is no such {what}; there are {', '.join(known)}."


def _show(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}…"
