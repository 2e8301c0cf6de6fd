"""One ordered partition of a part's parameters, used for freezing and for layer-wise decay alike.

As open_clip's and timm's `layer_groups`: what comes before the layers (embeddings, a stem), the layers from first to
last (of a convolutional or hierarchical network its stages), what comes after them (final norm, pooler, head). Every
parameter is in exactly one group.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from ...modeling.fused_vision_towers import FusedVisionTowers


#: What a group is.
EMBEDDINGS, LAYER, HEAD, UNREAD = "embeddings", "layer", "head", "unread"

#: Modules run in the order in which they are registered. Of all language models and towers of transformers these do
#: not: what gemma3n, gemma4 and cpmant compute from embeddings for every layer; norms of embeddings (BART, ProphetNet)
#: and of patches (glm4v);
_RUN_BEFORE = frozenset(
    (
        "per_layer_model_projection",
        "per_layer_projection_norm",
        "altup_projections",
        "position_bias",
        "layernorm_embedding",
        "embeddings_layer_norm",
        "post_conv_layernorm",
    )
)
#: the end of OPT's decoder, and of the towers of llama4 and mllama.
_RUN_BEHIND = frozenset(("final_layer_norm", "project_out", "layernorm_post", "post_tile_positional_embedding"))


@dataclass(frozen=True)
class LayerGroup:
    """A step of the partition.

    Args:
        name: The layer's own name in the part, such as `encoder.layer.3`; its kind for the others.
        kind: `embeddings`, `layer`, `head`, or `unread`: what runs behind the layer whose features are read.
        parameters: Names as in `part.named_parameters()`; those of tied weights once, at the first of their places. May be
            empty at the ends.
        modules: Names of the modules that make up a layer; more than one where several towers or lists go side by side.
    """

    name: str
    kind: str
    parameters: tuple[str, ...]
    modules: tuple[str, ...] = ()


def layer_groups(part: nn.Module, feature_layer: int | Sequence[int] | None = None) -> list[LayerGroup]:
    """The partition of a part: `embeddings`, a group for each of its layers, `head`; or `unread` instead of `head`.

    Layers are those of the outermost list of modules with most parameters, embeddings not counted, and of any other list of
    the same kind of layers: layers of a transformer, stages of a convolutional network. A part
    without layers is one group of kind `layer`, named `""`. Several towers in one are put together from the top: the last
    layers of all are one group, and so on down; what comes before the layers of any is in `embeddings`.

    Args:
        feature_layer: Of a tower, the index into its hidden states that is read (`vision_feature_layer`), or several. What
            runs behind the last of them gets no gradient, so it is no layer to be counted: it is in `unread`.
    """
    if isinstance(part, FusedVisionTowers):
        read = part.config.vision_feature_layers
        return _side_by_side(
            [(f"towers.{index}.", layer_groups(tower, read[index])) for index, tower in enumerate(part.towers)]
        )
    layers = _layers(part)
    names = [name for name, _ in part.named_parameters()]
    if not layers:
        return [LayerGroup("", LAYER, tuple(names))]
    found: dict[int, list[str]] = {index: [] for index in range(-1, len(layers) + 1)}
    place = {f"{prefix}.": index for index, prefixes in enumerate(layers) for prefix in prefixes}
    embeddings = {id(module.weight) for module in part.modules() if isinstance(module, nn.Embedding)}
    first_layer = min(index for index, name in enumerate(names) if name.startswith(tuple(place)))
    # What a causal language model has outside of its base model is its head.
    is_language_model = isinstance(part, PreTrainedModel) and part.get_output_embeddings() is not None
    base = f"{part.base_model_prefix}." if is_language_model else ""
    base = base if layers[0][0].startswith(base) else ""
    for number, (name, parameter) in enumerate(part.named_parameters()):
        layer = next((index for prefix, index in place.items() if name.startswith(prefix)), None)
        if layer is None:
            modules = set(name.split("."))
            is_before = number < first_layer and name.startswith(base)
            is_before = is_before or id(parameter) in embeddings or modules & _RUN_BEFORE
            layer = -1 if is_before and not modules & _RUN_BEHIND else len(layers)
        found[layer].append(name)
    groups = [
        LayerGroup(EMBEDDINGS, EMBEDDINGS, tuple(found[-1])),
        *(
            LayerGroup(prefixes[0], LAYER, tuple(found[index]), tuple(prefixes))
            for index, prefixes in enumerate(layers)
        ),
        LayerGroup(HEAD, HEAD, tuple(found[len(layers)])),
    ]
    return groups if feature_layer is None else _until(groups, feature_layer)


def _until(groups: list[LayerGroup], feature_layer: int | Sequence[int]) -> list[LayerGroup]:
    """Hidden states are what goes into the first layer, and what comes out of each."""
    last = len(groups) - 2
    indices = [feature_layer] if isinstance(feature_layer, int) else feature_layer
    read = max(index if index >= 0 else last + 1 + index for index in indices)
    behind = tuple(name for group in groups[read + 1 :] for name in group.parameters)
    return [*groups[: read + 1], LayerGroup(UNREAD, UNREAD, behind)]


def _layers(part: nn.Module) -> list[list[str]]:
    """For each layer the names of its modules: of the layer itself, and of what has the same number in a list of the same
    length beside it, as in a segformer, which has lists of embeddings, blocks and norms of its stages."""
    lists = dict(_outermost_lists(part))
    if not lists:
        return []
    main = max(lists, key=lambda name: (len(lists[name]) > 1, _parameters(lists[name])))
    if not any(True for _ in lists[main].parameters()):
        return []
    layers: list[list[str]] = []
    kinds = {type(layer) for layer in lists[main]}
    for name, modules in lists.items():
        if name == main or (len(kinds) == 1 and {type(layer) for layer in modules} == kinds):
            layers += [[f"{name}.{index}"] for index in range(len(modules))]
    parent = main.rpartition(".")[0]
    beside = [
        name
        for name, modules in lists.items()
        if name.rpartition(".")[0] == parent and len(modules) == len(layers) and layers[0] != [f"{name}.0"]
    ]
    return [[own, *(f"{name}.{index}" for name in beside)] for index, (own,) in enumerate(layers)]


def _outermost_lists(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.ModuleList | nn.Sequential]]:
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList) or (isinstance(child, nn.Sequential) and len(child) > 1):
            yield f"{prefix}{name}", child
        else:
            yield from _outermost_lists(child, f"{prefix}{name}.")


def _parameters(module: nn.Module) -> int:
    embeddings = {id(p) for child in module.modules() if isinstance(child, nn.Embedding) for p in child.parameters()}
    return sum(parameter.numel() for parameter in module.parameters() if id(parameter) not in embeddings)


def _side_by_side(towers: list[tuple[str, list[LayerGroup]]]) -> list[LayerGroup]:
    merged: dict[int, list[LayerGroup]] = {}
    highest = 1 + max(sum(group.kind == LAYER for group in groups) for _, groups in towers)
    for prefix, groups in towers:
        layers = [group for group in groups if group.kind == LAYER]
        for group in groups:
            # Layers count from the top.
            place = {EMBEDDINGS: 0, HEAD: highest, UNREAD: highest + 1}.get(group.kind)
            place = highest - len(layers) + layers.index(group) if place is None else place
            modules = tuple(f"{prefix}{name}".rstrip(".") for name in group.modules or (group.name,))
            parameters = tuple(f"{prefix}{name}" for name in group.parameters)
            merged.setdefault(place, []).append(LayerGroup(group.name, group.kind, parameters, modules))
    result = []
    for _, groups in sorted(merged.items()):
        modules = tuple(name for group in groups for name in group.modules)
        name = modules[0] if groups[0].kind == LAYER else groups[0].name
        parameters = tuple(name for group in groups for name in group.parameters)
        result.append(LayerGroup(name, groups[0].kind, parameters, modules if groups[0].kind == LAYER else ()))
    return result
