"""Build and load parts, with those whose classes are in the checkpoint itself (`configuration/part_code.py`)."""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig
from transformers.models.auto.auto_factory import add_generation_mixin_to_remote_model

from ..configuration.configuration_anyvlm import AnyVlmConfig
from ..configuration.part_code import DeferredPartConfig, load_part_config, part_class, untrusted_message


_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "token")


def own_model_class(auto_class: type, config: PreTrainedConfig) -> type | None:
    """The model class in the part's own code, prepared as Auto classes do with remote code; `None` if it has none."""
    model_class = part_class(config, auto_class.__name__)
    if model_class is None:
        return None
    model_class.register_for_auto_class(auto_class)
    return add_generation_mixin_to_remote_model(model_class)


def trusted_config(config_class: type[AnyVlmConfig], source: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `from_pretrained` in which no part's config is deferred any more.

    Raises:
        ValueError: a part has code of its own, and `kwargs` has not `trust_remote_code=True`.
    """
    hub_kwargs = {name: kwargs[name] for name in _HUB_ARGUMENTS if name in kwargs}
    config = kwargs.get("config")
    if not isinstance(config, PreTrainedConfig):
        subfolder = {"subfolder": kwargs["subfolder"]} if kwargs.get("subfolder") else {}
        config = config_class.from_pretrained(source if config is None else config, **hub_kwargs, **subfolder)
    deferred = {
        key: part for key in config.sub_configs if isinstance(part := getattr(config, key), DeferredPartConfig)
    }
    if not deferred:
        return kwargs
    config = copy.deepcopy(config)
    for key, part in deferred.items():
        if not kwargs.get("trust_remote_code"):
            raise ValueError(untrusted_message(source, part))
        setattr(config, key, load_part_config(key, part, source, **hub_kwargs))
    return {**kwargs, "config": config}


@torch.no_grad()
def restore_computed_tensors(part: nn.Module) -> list[str]:
    """Give a part with code of its own what its `__init__` computes and no checkpoint holds, such as rotary frequencies.

    transformers 5 builds on the meta device. It leaves such buffers uninitialised, unless `_init_weights` fills them,
    which code older than that does not, and tensors that are plain attributes without values. They are computed once
    more, with the weights on the meta device.

    Returns:
        Names of the tensors that were different.
    """
    if getattr(part.config, "part_code", None) is None:
        return []
    computed = _compute(part, _EmptyOnMeta())
    if any(value.is_meta for value in computed.values()):  # allocated as weights are, and filled afterwards
        computed = _compute(part, contextlib.nullcontext())
    changed = []
    for name, tensor in _computed_tensors(part):
        value = computed.get(name)
        if value is None:  # made later than in `__init__`
            continue
        if tensor.is_meta or value.shape != tensor.shape or not torch.equal(value.to(tensor), tensor):
            changed.append(name)
            owner, _, attribute = name.rpartition(".")
            device = part.device if tensor.is_meta else tensor.device
            setattr(part.get_submodule(owner), attribute, value.to(device))
    return changed


def _compute(part: nn.Module, mode: contextlib.AbstractContextManager) -> dict[str, torch.Tensor]:
    with mode, torch.random.fork_rng(devices=[]):
        return dict(_computed_tensors(type(part)._from_config(copy.deepcopy(part.config))))


def _computed_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and value of every buffer that is not saved, and of every plain tensor attribute."""
    for prefix, child in module.named_modules():
        names = [
            *child._non_persistent_buffers_set,
            *(k for k, v in vars(child).items() if isinstance(v, torch.Tensor)),
        ]
        for name in names:
            if (value := getattr(child, name)) is not None:
                yield f"{prefix}.{name}" if prefix else name, value


class _EmptyOnMeta(TorchFunctionMode):
    """Weights, which modules allocate with `torch.empty`, take no memory; whatever is computed gets its values."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)
