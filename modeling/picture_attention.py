"""Attention from text to tokens of pictures, by transformers' own attention functions."""

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from .norms import build_norm
from .picture_states import PictureStates


class PictureAttention(nn.Module):
    """Multi-head attention whose queries are text and whose keys and values are tokens of pictures.

    Args:
        hidden_size: Width of the text.
        image_features: Width of the pictures' tokens.
        num_heads: Heads; `head_dim` is `hidden_size // num_heads` unless it is given.
        image_norm: Normalise the tokens first: their scale is that of the text's embeddings, which may be tiny.
        qk_norm: Normalise queries and keys of each head (Idefics).
        norm, norm_eps: Kind of norm and its epsilon (`modeling/norms.py`).
        attention_dropout: Dropout of the attention's weights.
    """

    num_key_value_groups = 1
    is_causal = False

    def __init__(
        self,
        hidden_size: int,
        image_features: int,
        num_heads: int,
        head_dim: int | None = None,
        image_norm: bool = True,
        qk_norm: bool = False,
        norm: str = "layer_norm",
        norm_eps: float | None = None,
        attention_dropout: float = 0.0,
    ):
        super().__init__()
        if head_dim is None and hidden_size % num_heads:
            raise ValueError(
                f"num_heads={num_heads} does not divide the text's width {hidden_size}. Pass head_dim too."
            )
        self.head_dim = head_dim or hidden_size // num_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = attention_dropout
        width = num_heads * self.head_dim
        self.q_proj = nn.Linear(hidden_size, width, bias=False)
        self.k_proj = nn.Linear(image_features, width, bias=False)
        self.v_proj = nn.Linear(image_features, width, bias=False)
        self.o_proj = nn.Linear(width, hidden_size, bias=False)
        self.image_norm = build_norm(norm, image_features, norm_eps) if image_norm else None
        self.q_norm = build_norm(norm, self.head_dim, norm_eps) if qk_norm else None
        self.k_norm = build_norm(norm, self.head_dim, norm_eps) if qk_norm else None

    def keys_values(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens `(batch, num_tokens, image_features)` -> keys and values `(batch, heads, num_tokens, head_dim)`."""
        tokens = tokens.to(self.k_proj.weight.device, self.k_proj.weight.dtype)
        if self.image_norm is not None:
            tokens = self.image_norm(tokens)
        keys, values = self._heads(self.k_proj(tokens)), self._heads(self.v_proj(tokens))
        return (keys if self.k_norm is None else self.k_norm(keys)), values

    def attend(
        self, text: torch.Tensor, keys_values: tuple[torch.Tensor, torch.Tensor], visibility: "Visibility"
    ) -> torch.Tensor:
        """What the heads gather, side by side: `(batch, sequence, heads * head_dim)`, zero where nothing is seen.

        Args:
            text: Queries `(batch, sequence, hidden_size)`.
        """
        queries = self._heads(self.q_proj(text))
        if self.q_norm is not None:
            queries = self.q_norm(queries)
        keys, values = (each.to(queries.device) for each in keys_values)
        eager = visibility.attention == "eager"
        attention = eager_attention_forward if eager else ALL_ATTENTION_FUNCTIONS["sdpa"]
        gathered, _ = attention(
            self,
            queries,
            keys,
            values,
            visibility.additive_mask(queries) if eager else visibility.mask.to(queries.device),
            scaling=self.scaling,
            dropout=self.attention_dropout if self.training else 0.0,
        )
        return visibility.keep_seeing(gathered.flatten(2))

    def forward(
        self, text: torch.Tensor, keys_values: tuple[torch.Tensor, torch.Tensor], visibility: "Visibility"
    ) -> torch.Tensor:
        """As `attend`, mapped back to `(batch, sequence, hidden_size)`."""
        return self.o_proj(self.attend(text, keys_values, visibility))

    def _heads(self, states: torch.Tensor) -> torch.Tensor:
        return states.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class Visibility:
    """Which tokens of pictures each position of the text sees, as attention functions want it.

    Args:
        states: The pictures.
        see: Of `SEE`.
        attention: The language model's attention implementation. Flash and flex kernels take no mask of this kind, so
            that all but `"eager"` run `"sdpa"` here.
    """

    def __init__(self, states: PictureStates, see: str, attention: str | None):
        visible = states.visible(see)
        #: Boolean `(batch, sequence, 1)`: the position sees anything at all.
        self.seeing = visible.any(-1, keepdim=True)
        # Softmax over nothing has no value: such a position attends to everything, and what it gathers is not used.
        self.mask = (visible | ~self.seeing).unsqueeze(1)
        self.attention = "eager" if attention == "eager" else "sdpa"

    def additive_mask(self, queries: torch.Tensor) -> torch.Tensor:
        mask = self.mask.to(queries.device)
        zeros = torch.zeros(mask.shape, dtype=queries.dtype, device=queries.device)
        return zeros.masked_fill(~mask, torch.finfo(queries.dtype).min)

    def keep_seeing(self, values: torch.Tensor) -> torch.Tensor:
        """`values (batch, sequence, width)`, exactly zero at positions that see no picture."""
        return values.masked_fill(~self.seeing.to(values.device), 0)
