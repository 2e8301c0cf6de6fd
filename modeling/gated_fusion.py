"""Gated fusion at the language model's input (Zhang et al. 2023, Multimodal-CoT; Li et al. 2022).

Each text embedding attends to the pictures it sees, and a learned gate mixes what it gathers with the embedding. Nothing is
added inside the language model, so this fits every one of them.
"""

import torch
from torch import nn

from .norms import build_norm
from .picture_attention import PictureAttention, Visibility
from .picture_states import SEE, PictureStates


GATES = ("token", "channel")


class GatedFusion(nn.Module):
    """`(1 - g) * embedding + g * gathered`, `g = sigmoid(gate([embedding, gathered]))`; `g` is 0 where no picture is seen.

    Args:
        hidden_size: Width of the language model's embeddings.
        image_features: Width of the pictures' tokens.
        num_heads: Heads of the attention.
        see: `"latest"`: each token sees the picture that was shown last; `"all"`: all that were shown.
        gate: One number per `"token"`, or one per token and `"channel"`.
        gate_offset: Added before the sigmoid. Below zero, so that a fresh gate leaves the text most of its meaning.
        head_dim, image_norm, qk_norm, norm, norm_eps, attention_dropout: See `PictureAttention`.
    """

    #: The language model's input is changed, so it is given embeddings.
    changes_embeddings = True
    needs_pictures = True
    forget_after = None

    def __init__(
        self,
        hidden_size: int,
        image_features: int,
        num_heads: int,
        see: str = "latest",
        gate: str = "token",
        gate_offset: float = -2.0,
        norm: str = "layer_norm",
        norm_eps: float | None = None,
        **attention,
    ):
        super().__init__()
        if see not in SEE:
            raise ValueError(f"see={see!r} is not known. Choose one of: {', '.join(SEE)}.")
        if gate not in GATES:
            raise ValueError(f"gate={gate!r} is not known. Choose one of: {', '.join(GATES)}.")
        self.see, self.gate_offset = see, gate_offset
        self.attention = PictureAttention(
            hidden_size, image_features, num_heads, norm=norm, norm_eps=norm_eps, **attention
        )
        self.text_norm = build_norm(norm, hidden_size, norm_eps)
        gathered = self.attention.o_proj.in_features
        self.gate = nn.Linear(hidden_size + gathered, hidden_size if gate == "channel" else 1)

    @property
    def output_layer(self) -> nn.Linear:
        """Gives what is gathered its scale, which is to be that of the text's embeddings."""
        return self.attention.o_proj

    def forward(self, embeddings: torch.Tensor, states: PictureStates, attention: str | None) -> torch.Tensor:
        """Embeddings `(batch, sequence, hidden_size)` of the text, mixed with the pictures that each position sees.

        Args:
            attention: The language model's attention implementation, see `Visibility`.
        """
        gathered, gate = self.gather(embeddings, states, attention)
        return embeddings + (gate * (gathered - embeddings.to(gathered))).to(embeddings)

    def gather(
        self, embeddings: torch.Tensor, states: PictureStates, attention: str | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What each position gathers `(batch, sequence, hidden_size)`, and its gate."""
        visibility = Visibility(states, self.see, attention)
        known = states.keys_values.get(0)
        if known is None or torch.is_grad_enabled():
            known = self.attention.keys_values(states.tokens)
        if not torch.is_grad_enabled():
            states.keys_values[0] = known
        weight = self.gate.weight
        text = self.text_norm(embeddings.to(weight.device, weight.dtype))
        heads = self.attention.attend(text, known, visibility)
        gate = torch.sigmoid(self.gate(torch.cat([text, heads], dim=-1)) + self.gate_offset)
        return self.attention.o_proj(heads), visibility.keep_seeing(gate)
