"""Find the decoder layers of a language model by watching it run; what a fusion needs to know about its language model."""

import inspect
import math

import torch
from torch import nn
from transformers import PreTrainedModel

from ..modeling.fusion import FUSION_CLASSES
from ..modeling.language_models import LanguageModelInterface
from .errors import CompositionError
from .language_model_probe import plain_words
from .running import in_mode


_BATCH, _LENGTH = 2, 5


class _Watch:
    """Which layers of a list were called, in what order, with hidden states of what shape, and whether each got what
    the one before it gave."""

    def __init__(self, layers: nn.ModuleList):
        self.layers = layers
        self.order: list[int] = []
        self.shapes: set[tuple[int, ...]] = set()
        self.is_chain = True
        self.last_output: torch.Tensor | None = None
        self.handles = []
        for number, layer in enumerate(layers):
            self.handles.append(layer.register_forward_pre_hook(self._record_input(number), with_kwargs=True))
            self.handles.append(layer.register_forward_hook(self._record_output))

    def _record_input(self, number: int):
        def record(layer: nn.Module, args: tuple, kwargs: dict) -> None:
            first = args[0] if args else kwargs.get(next(iter(inspect.signature(layer.forward).parameters), None))
            is_tensor = isinstance(first, torch.Tensor)
            if self.order and not (
                is_tensor and self.last_output is not None and torch.equal(first, self.last_output)
            ):
                self.is_chain = False
            self.order.append(number)
            self.shapes.add(tuple(first.shape) if is_tensor else ())

        return record

    def _record_output(self, layer: nn.Module, args: tuple, output) -> None:
        output = output[0] if isinstance(output, (tuple, list)) and output else output
        self.last_output = output if isinstance(output, torch.Tensor) else None

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


@torch.no_grad()
def find_decoder_layers(language_model: PreTrainedModel) -> tuple[str, int, int]:
    """Where the decoder layers are, as `get_submodule` takes it; how many; and the width of the states between them.

    They are the longest `nn.ModuleList` whose modules all run, once each and in order, each on the hidden states
    `(batch, sequence, width)` that the one before it gave; of several as long as one another, the outermost.

    Raises:
        CompositionError: there is no such list; the message says what the likeliest one does instead.
    """
    name = type(language_model).__name__
    watches = {
        path: _Watch(module)
        for path, module in language_model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module)
    }
    ids = plain_words(language_model, _BATCH * _LENGTH).view(_BATCH, _LENGTH)
    arguments = LanguageModelInterface(language_model, {"position_offset": None}).arguments(
        input_ids=ids, use_cache=False
    )
    try:
        with in_mode(language_model):
            language_model(**arguments, return_dict=True)
    finally:
        for watch in watches.values():
            watch.remove()
    found = {path: watch for path, watch in watches.items() if _is_decoder(watch)}
    if found:
        path = max(found, key=lambda path: (len(found[path].layers), -path.count(".")))
        ((*_, width),) = found[path].shapes
        return path, len(found[path].layers), width
    raise CompositionError(
        f"{name} has no list of decoder layers that cross-attention could go before: {_why_not(watches)}. Take "
        'fusion="gated" or fusion="embed", which need none, or a decoder such as llama, qwen3 or gpt2.'
    )


def _is_decoder(watch: _Watch) -> bool:
    if watch.order != list(range(len(watch.layers))) or len(watch.shapes) != 1 or not watch.is_chain:
        return False
    (shape,) = watch.shapes
    return len(shape) == 3 and shape[:2] == (_BATCH, _LENGTH)


def _why_not(watches: dict[str, _Watch]) -> str:
    called = {path: watch for path, watch in watches.items() if watch.order}
    if not called:
        return "none of its lists of modules are called as modules"
    # Outermost first, then the longest run.
    path = min(called, key=lambda path: (path.count("."), -len(called[path].order)))
    watch = called[path]
    if watch.order != list(range(len(watch.layers))):
        return f"the {len(watch.layers)} modules of {path!r} run as numbers {watch.order[:12]}, not once each and in order"
    shapes = ", ".join(str(shape) for shape in sorted(watch.shapes))
    if watch.shapes == {(_BATCH, _LENGTH, shape[-1]) for shape in watch.shapes}:
        return f"the modules of {path!r} do not each take what the one before it gives"
    return f"the modules of {path!r} get states of shape {shapes}, not ({_BATCH}, {_LENGTH}, width) for that text"


def complete_fusion_config(
    fusion: str,
    arguments: dict,
    language_model: PreTrainedModel,
    widths: tuple[int, int],
    layers: tuple[str, int, int] | None = None,
) -> dict:
    """The whole `image_fusion_config`: what is given, and what the language model says about the rest.

    Args:
        arguments: Given by the user.
        widths: Of the language model's embeddings and of the pictures' tokens.
        layers: What `find_decoder_layers` finds, where that is known and the language model cannot be run.

    Raises:
        CompositionError: the language model has no list of decoder layers, or an argument is unknown.
    """
    embedding_width, image_features = widths
    found = {"image_features": image_features}
    if FUSION_CLASSES[fusion].changes_embeddings:
        found["hidden_size"] = embedding_width
    else:
        path, number, width = layers or find_decoder_layers(language_model)
        found |= {"decoder_layers": path, "num_decoder_layers": number, "hidden_size": width}
    if "num_heads" not in arguments and "head_dim" not in arguments:
        found["num_heads"] = _num_heads(found["hidden_size"], language_model)
    config = {**found, **arguments}
    try:
        with torch.device("meta"):
            FUSION_CLASSES[fusion](**config)
    except (TypeError, ValueError, KeyError) as error:
        raise CompositionError(f"fusion {fusion!r} with {arguments} cannot be built: {error}.") from error
    return config


def _num_heads(width: int, language_model: PreTrainedModel) -> int:
    """As many heads as the language model's own attention has, if they divide the width; else heads of 64."""
    own = getattr(language_model.config, "num_attention_heads", None)
    if isinstance(own, int) and own > 0 and width % own == 0:
        return own
    return math.gcd(width, max(1, width // 64))
