"""The Q-Former: a small transformer whose learned queries become a fixed number of tokens of any picture."""

import torch
from torch import nn
from transformers import (
    Blip2QFormerConfig,
    Blip2QFormerModel,
    InstructBlipQFormerConfig,
    InstructBlipQFormerModel,
    PreTrainedModel,
)

from ..configuration.token_grids import Grid
from .query_projectors import check_counts


class QFormerProjector(nn.Module):
    """BLIP-2's querying transformer (Li et al. 2023), which is transformers' own, and a linear map.

    With `reads_text` it is InstructBLIP's (Dai et al. 2023), which reads the instruction beside the picture; then every
    picture comes with `qformer_input_ids`.

    Args:
        in_features: Width of the features.
        out_features: Width of the language model's embeddings.
        num_queries: Number of tokens of a picture.
        qformer_config: What differs from the defaults of transformers' `Blip2QFormerConfig` (`InstructBlipQFormerConfig`
            with `reads_text`): twelve layers of width 768. Without `encoder_hidden_size`, which is `in_features`.
        reads_text: See above.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_queries: int = 32,
        qformer_config: dict | None = None,
        reads_text: bool = False,
    ):
        super().__init__()
        check_counts(num_queries=num_queries)
        self.reads_text = reads_text
        self.qformer = _build_qformer(qformer_config or {}, in_features, reads_text)
        self.query_tokens = nn.Parameter(torch.empty(1, num_queries, self.qformer.config.hidden_size))
        self.language_projection = nn.Linear(self.qformer.config.hidden_size, out_features)
        nn.init.trunc_normal_(self.query_tokens, std=0.02)

    @property
    def output_layer(self) -> nn.Linear:
        return self.language_projection

    def forward(
        self,
        features: torch.Tensor,
        grid: Grid,
        qformer_input_ids: torch.Tensor | None = None,
        qformer_attention_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, Grid]:
        """
        Args:
            qformer_input_ids: `(num_images, length)`, the instruction for each picture; without it the queries see the
                picture alone.
            qformer_attention_mask: The same shape, 0 at padding.
        """
        num_queries = self.query_tokens.shape[1]
        arguments = {}
        if qformer_input_ids is not None:
            if qformer_attention_mask is None:
                qformer_attention_mask = torch.ones_like(qformer_input_ids)
            queries = qformer_attention_mask.new_ones(len(features), num_queries)
            arguments = {
                "input_ids": qformer_input_ids,
                "attention_mask": torch.cat([queries, qformer_attention_mask], dim=1),
            }
        elif self.reads_text:
            arguments = {"input_ids": None}
        # BLIP-2's checkpoints keep the Q-Former in fp32.
        outputs = self.qformer(
            query_embeds=self.query_tokens.expand(len(features), -1, -1),
            encoder_hidden_states=features.to(self.qformer.dtype),
            return_dict=True,
            **arguments,
        )
        seen = outputs.last_hidden_state[:, :num_queries].to(self.language_projection.weight.dtype)
        return self.language_projection(seen), (1, num_queries)


def _build_qformer(qformer_config: dict, in_features: int, reads_text: bool) -> PreTrainedModel:
    model_class, config_class = (
        (InstructBlipQFormerModel, InstructBlipQFormerConfig)
        if reads_text
        else (Blip2QFormerModel, Blip2QFormerConfig)
    )
    unknown = sorted(qformer_config.keys() - config_class.__dataclass_fields__.keys() - {"model_type"})
    if unknown:
        raise ValueError(f"qformer_config has {', '.join(unknown)}, which {config_class.__name__} does not know.")
    if "encoder_hidden_size" in qformer_config:
        raise ValueError("qformer_config has encoder_hidden_size. Leave it out: it is the width of the features.")
    settings = {key: value for key, value in qformer_config.items() if key != "model_type"}
    return model_class._from_config(config_class(**{**settings, "encoder_hidden_size": in_features}))
