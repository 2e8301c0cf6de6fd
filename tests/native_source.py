"""Functions of transformers' modules that cannot be imported here, because they import torchvision."""

import ast
import importlib.util
import math
from functools import lru_cache, reduce
from pathlib import Path
from types import SimpleNamespace

import numpy as np


def native_functions(module: str, *names: str) -> SimpleNamespace:
    """Functions and methods of a module of transformers, run from its source without the rest of it.

    Args:
        module: Name below `transformers.models`, such as `"perception_lm.image_processing_perception_lm"`.
        names: Functions, or methods of any class; static methods lose their decorator.
    """
    root = Path(importlib.util.find_spec("transformers").origin).parent / "models"
    tree = ast.parse((root / f"{module.replace('.', '/')}.py").read_text())
    found = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name in names]
    assert {node.name for node in found} == set(names)
    for node in found:
        node.decorator_list = []
    scope = {"math": math, "np": np, "reduce": reduce, "lru_cache": lru_cache}
    exec(compile(ast.Module(found, []), module, "exec"), scope)
    return SimpleNamespace(**{name: scope[name] for name in names})
