"""A made-up vision tower: a CLS token and patches, with fixed sine positions in a buffer that no checkpoint holds."""

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .block import Block
from .configuration_part import PartConfig


class MadeUpTower(PreTrainedModel):
    config_class = PartConfig
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]

    def __init__(self, config):
        super().__init__(config)
        self.gradient_checkpointing = False
        self.patch_embed = nn.Conv2d(3, config.width, kernel_size=config.patch, stride=config.patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        places = torch.arange((config.image_size // config.patch) ** 2 + 1).float()
        frequencies = 1 / 100 ** (torch.arange(config.width // 2).float() / config.width)
        angles = places[:, None] * frequencies
        positions = torch.empty(len(places), config.width)
        positions[:, 0::2], positions[:, 1::2] = angles.sin(), angles.cos()
        self.register_buffer("positions", positions, persistent=False)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.depth)])
        self.post_init()

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.weight.data.normal_(mean=0.0, std=0.1)

    def forward(self, pixel_values, output_hidden_states=False, return_dict=True):
        patches = self.patch_embed(pixel_values).flatten(2).transpose(1, 2)
        hidden_states = torch.cat((self.cls_token.expand(len(patches), -1, -1), patches), dim=1) + self.positions
        all_hidden_states = [hidden_states]
        for block in self.blocks:
            if self.gradient_checkpointing and self.training:
                hidden_states = self._gradient_checkpointing_func(block.__call__, hidden_states)
            else:
                hidden_states = block(hidden_states)
            all_hidden_states.append(hidden_states)
        return BaseModelOutputWithPooling(
            last_hidden_state=hidden_states,
            pooler_output=hidden_states[:, 0],
            hidden_states=tuple(all_hidden_states) if output_hidden_states else None,
        )
