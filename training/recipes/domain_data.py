"""Pictures of other kinds, without answers, beside those that are learnt from: `domains` in a recipe's `data`."""

from collections.abc import Iterable, Mapping
from typing import Any

from .unlabelled_data import is_picture_folder, picture_folder_errors


#: Keys of `data` that are about other kinds of pictures.
DOMAIN_KEYS = ("domains", "source_domain")
#: What the pictures that have answers are called, where a recipe does not say.
SOURCE_DOMAIN = "source"
#: The loss that they are for.
LOSS = "domain_adversarial"


def domain_names(data: Mapping[str, Any]) -> list[str]:
    return [data.get("source_domain") or SOURCE_DOMAIN, *(data.get("domains") or {})]


def with_domains(losses: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """A stage's losses; the one against domains is told their names, where a recipe does not."""
    losses = dict(losses)
    if LOSS in losses and isinstance(data.get("domains"), dict):
        written = losses[LOSS]
        settings = dict(written) if isinstance(written, dict) else {"weight": written}
        losses[LOSS] = {"domains": domain_names(data), **settings}
    return losses


def domain_errors(data: Mapping[str, Any], losses: Iterable[str]) -> list[tuple[tuple, str]]:
    """What is wrong with `domains`: `(keys that lead there, sentence)`."""
    domains = data.get("domains")
    if domains is None:
        return []
    if not isinstance(domains, Mapping) or not domains:
        return [(("domains",), "write a name for each other kind of pictures, and where they are")]
    errors: list[tuple[tuple, str]] = []
    if LOSS not in losses:
        message = f"no loss of this stage is about them; add {LOSS} to its `losses`, or leave them out"
        errors.append((("domains",), message))
    own = domain_names(data)[0]
    if own in domains:
        errors.append((("domains",), f"one is called {own!r}, as the pictures with answers are; set `source_domain`"))
    for name, source in domains.items():
        if is_picture_folder(source):
            errors += [(("domains", name, *keys), text) for keys, text in picture_folder_errors(source)]
    return errors
