"""One layer of the made-up tower."""

from torch import nn

from .functions import gelu


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width)
        self.attention = nn.MultiheadAttention(config.width, config.heads, batch_first=True)
        self.norm2 = nn.LayerNorm(config.width)
        self.up = nn.Linear(config.width, 2 * config.width)
        self.down = nn.Linear(2 * config.width, config.width)

    def forward(self, hidden_states):
        normed = self.norm1(hidden_states)
        hidden_states = hidden_states + self.attention(normed, normed, normed, need_weights=False)[0]
        return hidden_states + self.down(gelu(self.up(self.norm2(hidden_states))))
