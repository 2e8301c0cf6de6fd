"""Another part while a checkpoint is loaded: `from_pretrained(path, vision_tower=…, language_model=…)`.

What is read here from a new part was measured when the model was composed, and only the package can measure; a checkpoint's
own code can not. So the package registers how it is done, and without the package the arguments are refused.
"""

from collections.abc import Callable
from typing import Any


#: Argument of `from_pretrained` -> the same of `anyvlm.swap`.
EXCHANGEABLE = {"vision_tower": "vision", "language_model": "text"}

_registered: dict[str, Callable[..., Any]] = {}


def register_exchange(**functions: Callable[..., Any]) -> None:
    """Say how it is done, for `"model"` and for `"processor"`: `(from_pretrained, source, parts, kwargs)` to what is
    loaded, where `from_pretrained(source, **kwargs)` loads it with the parts that it has."""
    _registered.update(functions)


def load_exchanged(kind: str, from_pretrained: Callable[..., Any], source: Any, kwargs: dict[str, Any]) -> Any:
    """Load with other parts, if `kwargs` names any, which are taken out of it; else `None`.

    Args:
        kind: `"model"` or `"processor"`.

    Raises:
        ImportError: parts are named, and the package is not imported.
    """
    named = {key: kwargs.pop(key) for key in EXCHANGEABLE if key in kwargs}
    parts = {EXCHANGEABLE[key]: part for key, part in named.items() if part is not None}
    if not parts:
        return None
    if kind not in _registered:
        raise ImportError(
            f"{' and '.join(f'{name}=…' for name in named)} exchange a part while loading, which takes the package beside "
            "the checkpoint's own code. Install anyvlm, and `import anyvlm` first."
        )
    return _registered[kind](from_pretrained, source, parts, kwargs)
