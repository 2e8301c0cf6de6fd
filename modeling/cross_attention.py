"""Tanh-gated cross-attention before decoder layers of any language model (Flamingo, Alayrac et al. 2022).

The layers are ours; the language model's modules, and with them the names of its weights, stay as they are. A forward
pre-hook on each of its decoder layers runs the cross-attention layer that belongs there on the hidden states. What it needs
beside them is in a context variable while the language model runs: calls and threads know nothing of one another,
and without it (the language model called by itself) the hooks do nothing.
"""

import contextlib
import functools
import inspect
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from .norms import build_norm
from .picture_attention import PictureAttention, Visibility
from .picture_states import SEE, PictureStates


class TanhGate(nn.Module):
    """`tanh(gate) * x` with a learned gate, one number or one per channel, zero at the start."""

    def __init__(self, features: int = 1):
        super().__init__()
        self.gate = nn.Parameter(torch.empty(features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.gate)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.gate) * hidden_states


class PlainMlp(nn.Module):
    """Two linear maps (Flamingo)."""

    def __init__(self, hidden_size: int, intermediate_size: int, hidden_act: str):
        super().__init__()
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)
        self.act = ACT2FN[hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act(self.up_proj(hidden_states)))


class GatedMlp(PlainMlp):
    """With a gated linear unit, as in Llama (Idefics)."""

    def __init__(self, hidden_size: int, intermediate_size: int, hidden_act: str):
        super().__init__(hidden_size, intermediate_size, hidden_act)
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


MLPS: dict[str, type[nn.Module]] = {"plain": PlainMlp, "gated": GatedMlp}
GATES = ("scalar", "vector")


class CrossAttentionLayer(GradientCheckpointingLayer):
    """Gated cross-attention and a gated MLP, each added to the hidden states.

    Arguments as those of `CrossAttentionFusion`.
    """

    def __init__(
        self,
        hidden_size: int,
        mlp: str = "plain",
        mlp_ratio: float = 4,
        intermediate_size: int | None = None,
        hidden_act: str = "gelu",
        mlp_everywhere: bool = False,
        gate: str = "scalar",
        dropout: float = 0.0,
        norm: str = "layer_norm",
        norm_eps: float | None = None,
        **attention,
    ):
        super().__init__()
        if mlp not in MLPS:
            raise ValueError(f"mlp={mlp!r} is not known. Choose one of: {', '.join(MLPS)}.")
        if gate not in GATES:
            raise ValueError(f"gate={gate!r} is not known. Choose one of: {', '.join(GATES)}.")
        self.attention = PictureAttention(hidden_size, norm=norm, norm_eps=norm_eps, **attention)
        self.attention_norm = build_norm(norm, hidden_size, norm_eps)
        self.attention_gate = TanhGate(hidden_size if gate == "vector" else 1)
        self.mlp = MLPS[mlp](hidden_size, intermediate_size or int(mlp_ratio * hidden_size), hidden_act)
        self.mlp_norm = build_norm(norm, hidden_size, norm_eps)
        self.mlp_gate = TanhGate(hidden_size if gate == "vector" else 1)
        self.mlp_everywhere = mlp_everywhere
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        tokens: torch.Tensor,
        visibility: Visibility,
        keys_values: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Hidden states `(batch, sequence, hidden_size)` of any dtype and device, which they keep.

        Args:
            tokens: Of the pictures, `(batch, num_tokens, image_features)`; none at all are taken too.
            keys_values: Those of `tokens`, if they are known.
        """
        weight = self.attention.q_proj.weight
        if tokens.shape[1]:
            text = self.attention_norm(hidden_states.to(weight.device, weight.dtype))
            keys_values = self.attention.keys_values(tokens) if keys_values is None else keys_values
            gathered = self.dropout(self.attention(text, keys_values, visibility))
            hidden_states = hidden_states + self.attention_gate(gathered).to(hidden_states)
        text = self.mlp(self.mlp_norm(hidden_states.to(weight.device, weight.dtype)))
        text = self.dropout(text if self.mlp_everywhere else visibility.keep_seeing(text))
        return hidden_states + self.mlp_gate(text).to(hidden_states)


class CrossAttentionFusion(nn.Module):
    """The cross-attention layers of a model, and their places in its language model.

    Args:
        decoder_layers: Where the list of decoder layers is in the language model, such as `"model.layers"`; found when the
            model is composed (`composition/decoder_layers.py`).
        num_decoder_layers: Their number.
        hidden_size: Width of the hidden states between them.
        image_features: Width of the pictures' tokens.
        num_heads: Heads of the attention.
        every: There is a layer before each `every`-th decoder layer,
        first: from this one on.
        see: `"latest"`: each token of the text sees the picture that was shown last; `"all"`: all that were shown.
        forget_after: A token, such as the end of a text, after which the pictures shown so far are not seen any more
            (Idefics, whose training texts were packed). What is generated sees what the prompt's last token saw.
        head_dim, image_norm, qk_norm, attention_dropout: See `PictureAttention`.
        mlp: `"plain"` or `"gated"` (GLU); `intermediate_size` wide, by default `mlp_ratio * hidden_size`.
        mlp_everywhere: The MLP also runs on tokens that see no picture (Idefics). By default text without pictures is
            the language model's own affair, even after training.
        gate: One number (`"scalar"`) or one per channel (`"vector"`).
        norm, norm_eps: Kind of norm and its epsilon (`modeling/norms.py`).
        dropout: Of what is added to the hidden states.
    """

    #: The hidden states are changed between the layers, so the language model is given its input as it is.
    changes_embeddings = False

    def __init__(
        self,
        decoder_layers: str,
        num_decoder_layers: int,
        hidden_size: int,
        image_features: int,
        num_heads: int,
        every: int = 4,
        first: int = 0,
        see: str = "latest",
        forget_after: int | None = None,
        **layer,
    ):
        super().__init__()
        if see not in SEE:
            raise ValueError(f"see={see!r} is not known. Choose one of: {', '.join(SEE)}.")
        if every < 1 or not 0 <= first < num_decoder_layers:
            raise ValueError(
                f"every={every}, first={first} names none of {num_decoder_layers} decoder layers. Pass every >= 1 and "
                f"first from 0 to {num_decoder_layers - 1}."
            )
        self.decoder_layers, self.num_decoder_layers, self.see = decoder_layers, num_decoder_layers, see
        self.forget_after = forget_after
        #: Number of a decoder layer -> number of the cross-attention layer before it.
        self.places = {number: index for index, number in enumerate(range(first, num_decoder_layers, every))}
        self.layers = nn.ModuleList(
            CrossAttentionLayer(hidden_size=hidden_size, image_features=image_features, num_heads=num_heads, **layer)
            for _ in self.places
        )

    @property
    def needs_pictures(self) -> bool:
        """Without pictures there is nothing to run."""
        return not any(layer.mlp_everywhere for layer in self.layers)

    def attach(self, language_model: nn.Module) -> None:
        """Hook the decoder layers, each once, however often this is called.

        Raises:
            ValueError: the language model has no such list of layers.
        """
        try:
            layers = language_model.get_submodule(self.decoder_layers)
        except AttributeError:
            layers = None
        if not isinstance(layers, nn.ModuleList) or len(layers) != self.num_decoder_layers:
            raise ValueError(
                f"{type(language_model).__name__} has no list of {self.num_decoder_layers} decoder layers at "
                f"{self.decoder_layers!r}, where cross-attention was composed for. Compose again with this language model."
            )
        for number, layer in enumerate(layers):
            if not any(isinstance(hook, LayerHook) for hook in layer._forward_pre_hooks.values()):
                layer.register_forward_pre_hook(LayerHook(number), with_kwargs=True)

    @contextlib.contextmanager
    def running(self, states: PictureStates, attention: str | None) -> Iterator[None]:
        """While this holds, the decoder layers see the pictures.

        Raises:
            RuntimeError: a cross-attention layer was left out, because hooks were removed or the layers exchanged.
        """
        run = Run(self, states, attention)
        reset = _RUN.set(run)
        try:
            yield
        finally:
            _RUN.reset(reset)
        left_out = sorted(self.places.keys() - run.done)
        if left_out:
            raise RuntimeError(
                f"Cross-attention before decoder layers {left_out} did not run: the language model was exchanged or its "
                "hooks were removed. Call model.fusion.attach(model.language_model)."
            )


class Run:
    """One run of the language model with pictures."""

    def __init__(self, fusion: CrossAttentionFusion, states: PictureStates, attention: str | None):
        self.fusion, self.states = fusion, states
        self.visibility = Visibility(states, fusion.see, attention)
        self.done: set[int] = set()

    def before_layer(self, number: int, hidden_states: torch.Tensor) -> torch.Tensor:
        """The hidden states that decoder layer `number` is to get."""
        layer = self.fusion.layers[self.fusion.places[number]]
        known = self.states.keys_values
        if number not in known and not torch.is_grad_enabled() and self.states.tokens.shape[1]:
            known[number] = layer.attention.keys_values(self.states.tokens)
        self.done.add(number)
        keys_values = None if torch.is_grad_enabled() else known.get(number)
        return layer(hidden_states, tokens=self.states.tokens, visibility=self.visibility, keys_values=keys_values)


_RUN: ContextVar[Run | None] = ContextVar("anyvlm_cross_attention", default=None)


class LayerHook:
    """Forward pre-hook of decoder layer `number`. It holds nothing of the model, so that copies and replicas of the
    model each use their own layers."""

    def __init__(self, number: int):
        self.number = number

    def __call__(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        run = _RUN.get()
        if run is None or self.number not in run.fusion.places:
            return None
        if args:
            return (run.before_layer(self.number, args[0]), *args[1:]), kwargs
        name = next(iter(inspect.signature(layer.forward).parameters))
        return args, {**kwargs, name: run.before_layer(self.number, kwargs[name])}


def checkpoint_with_pictures(checkpoint):
    """A gradient checkpointing function that gives the recomputation what the first computation had.

    The recomputation comes with the backward pass, when the language model no longer runs and other batches may have
    run since.

    Args:
        checkpoint: `torch.utils.checkpoint.checkpoint`, with its settings as `functools.partial`.

    Raises:
        ValueError: reentrant checkpointing, which would go through the graph of the pictures once for each layer.
    """
    settings = getattr(checkpoint, "keywords", {})
    if settings.get("use_reentrant"):
        raise ValueError(
            "Cross-attention needs gradient checkpointing that is not reentrant: "
            'gradient_checkpointing_kwargs={"use_reentrant": False}.'
        )
    if "use_reentrant" not in settings:  # torch's own default is the other one
        checkpoint = functools.partial(checkpoint, use_reentrant=False)
    return functools.partial(_checkpoint_run, checkpoint)


def _checkpoint_run(checkpoint, function, *args, **kwargs):
    run = _RUN.get()
    return checkpoint(function if run is None else functools.partial(_in_run, run, function), *args, **kwargs)


def _in_run(run: Run, function, *args, **kwargs):
    reset = _RUN.set(run)
    try:
        return function(*args, **kwargs)
    finally:
        _RUN.reset(reset)
