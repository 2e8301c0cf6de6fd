"""The partition against the order in which a model runs: what a layer's output depends on, by autograd's own graph."""

import pytest
import torch
from tiny_parts import LANGUAGE_MODELS, TOWERS, compose, text_config, vision_config
from torch import nn

from anyvlm.modeling.language_models import build_language_model
from anyvlm.modeling.vision_towers import build_vision_tower
from anyvlm.training.parts.layer_groups import EMBEDDINGS, HEAD, LAYER, layer_groups


def tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    values = value.values() if hasattr(value, "values") else value if isinstance(value, (list, tuple)) else ()
    return [tensor for one in values for tensor in tensors(one)]


def parameters_before(value) -> set[int]:
    """What the tensors were computed from."""
    nodes, seen, found = [tensor.grad_fn for tensor in tensors(value)], {None}, set()
    while nodes:
        node = nodes.pop()
        if node not in seen:
            seen.add(node)
            found |= {id(node.variable)} if hasattr(node, "variable") else set()
            nodes += [following for following, _ in node.next_functions]
    return found


def called(module: nn.Module, last: bool) -> nn.Module:
    """A list is not called itself, but what is in it."""
    while isinstance(module, nn.ModuleList):
        module = module[-1 if last else 0]
    return module


def depths(part: nn.Module, run) -> dict[str, int]:
    """0 for what the first layer's input depends on, 1 for the first layer, …; of the parameters that are used."""
    layers = [group.modules for group in layer_groups(part) if group.kind == LAYER]
    reached = {}

    def before(module, args, kwargs):
        reached.setdefault(0, parameters_before([*args, *kwargs.values()]))

    def after(number):
        return lambda module, args, output: reached.update({number: parameters_before(output)})

    hooks = []
    for index, names in enumerate(layers):
        for module in map(part.get_submodule, names):
            hooks.append(called(module, last=True).register_forward_hook(after(1 + index)))
            if index == 0:
                hooks.append(called(module, last=False).register_forward_pre_hook(before, with_kwargs=True))
    reached_at_end = parameters_before(run())
    for hook in hooks:
        hook.remove()
    reached[len(layers) + 1] = reached_at_end
    assert set(reached) == set(range(len(layers) + 2))
    return {
        name: min(number for number, found in reached.items() if id(parameter) in found)
        for name, parameter in part.named_parameters()
        if id(parameter) in reached_at_end
    }


def check(part: nn.Module, run) -> None:
    groups = layer_groups(part)
    assert [group.kind for group in groups] == [EMBEDDINGS, *[LAYER] * (len(groups) - 2), HEAD]
    listed = [name for group in groups for name in group.parameters]
    assert sorted(listed) == sorted(name for name, _ in part.named_parameters())
    found = {name: number for number, group in enumerate(groups) for name in group.parameters}
    expected = depths(part.eval(), run)
    assert len(expected) > len(found) / 2
    assert {name: found[name] for name in expected} == expected


#: Places between the patches of YOLOS' deeper layers are kept in one tensor beside the layers.
BESIDE = {"yolos"}


@pytest.mark.parametrize("model_type", sorted(TOWERS.keys() - BESIDE))
def test_towers(model_type):
    tower = build_vision_tower(vision_config(model_type))
    size = TOWERS[model_type][0]
    check(tower, lambda: tower(pixel_values=torch.randn(1, 3, size, size), return_dict=True))


@pytest.mark.parametrize("model_type", LANGUAGE_MODELS)
def test_language_models(model_type):
    model = build_language_model(text_config(model_type))
    check(model, lambda: model(input_ids=torch.tensor([[4, 5, 6, 7, 8]]), use_cache=False, return_dict=True))


def test_layers_of_several_towers_count_from_the_top():
    configs = [vision_config("clip_vision_model"), vision_config("dinov2")]
    configs[1].num_hidden_layers = 3
    model, _ = compose(vision=tuple(configs))
    groups = layer_groups(model.vision_tower)
    assert [group.modules for group in groups if group.kind == LAYER] == [
        ("towers.1.encoder.layer.0",),
        ("towers.0.encoder.layers.0", "towers.1.encoder.layer.1"),
        ("towers.0.encoder.layers.1", "towers.1.encoder.layer.2"),
    ]
    listed = [name for group in groups for name in group.parameters]
    assert sorted(listed) == sorted(name for name, _ in model.vision_tower.named_parameters())
    for group in groups:
        prefixes = tuple(f"{name}." for name in group.modules)
        assert all(name.startswith(prefixes) for name in group.parameters if group.kind == LAYER)


def test_without_layers():
    (group,) = layer_groups(nn.Linear(2, 2))
    assert group.parameters == ("weight", "bias") and group.kind == LAYER
