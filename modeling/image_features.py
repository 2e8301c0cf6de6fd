"""From pixels to image tokens: the tower, the projector, and the views of each picture joined."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import can_return_tuple

from ..configuration.image_tokens import Grid, image_grids
from ..configuration.image_views import has_newline, has_several_views
from ..configuration.instructions import instruction_arguments
from ..configuration.tile_layouts import PictureViews
from ..configuration.video_frames import video_settings
from .video_tokens import check_frames, join_frames
from .view_joining import check_views, join_views
from .vision_towers import call_vision_tower, graph_if_trained, read_features


@dataclass
class AnyVlmImageFeatures(BaseModelOutputWithPooling):
    """What `get_image_features` returns.

    Args:
        token_grids: Rows and columns of each picture's tokens; `None` for a picture whose tokens are no grid.
    """

    token_grids: list[tuple[int, int] | None] | None = None


class ImageFeaturesMixin:
    """What a model does with pictures before they meet the text."""

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        spatial_shapes: torch.Tensor | None = None,
        pixel_attention_mask: torch.Tensor | None = None,
        target_sizes: torch.Tensor | None = None,
        image_position_ids: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        qformer_input_ids: torch.Tensor | None = None,
        qformer_attention_mask: torch.Tensor | None = None,
        original_sizes: torch.Tensor | None = None,
        num_video_frames: torch.Tensor | None = None,
        tower_features: torch.Tensor | None = None,
        tower_grids: torch.Tensor | None = None,
        **kwargs,
    ) -> AnyVlmImageFeatures:
        """Features and projected tokens of pictures and videos.

        A tower none of whose parameters require a gradient is frozen: it runs in `eval()` and without a graph.

        Args:
            pixel_values: Plain pictures `(num_images, channels, height, width)`, or all views of all pictures; clips
                `(num_images, frames, channels, height, width)` for a tower of video; or patches, as the tower's own
                image processor makes them, with what it gives beside them:
            image_grid_thw: `(num_images, 3)`, frames, rows and columns of packed patches.
            spatial_shapes: `(num_images, 2)`, rows and columns of padded patches.
            pixel_attention_mask: `(num_images, num_patches)` or `(num_images, height, width)`, 0 at padding.
            target_sizes: `(num_images, 2)`, rows and columns of patches in a strip.
            image_position_ids: `(num_images, num_patches, 2)`, column and row of each patch, -1 at padding.
            image_sizes: `(num_images, 2)`, height and width of each picture in pixels, without what pads it.
            qformer_input_ids, qformer_attention_mask: `(num_images, length)`, the instruction for each picture, for a
                projector that reads it.
            original_sizes: `(num_images, 2)`, height and width of each picture before it was cut into views; needed where
                the config's `image_views` cut pictures. Or `(num_images, 3)`, and how many pictures its text has, where its
                views depend on that.
            num_video_frames: `(num_images + num_videos,)`, where there are videos: the frames (or clips) of each, which
                are views among the pictures', and 0 for a picture.
            tower_features: `(all features, hidden_size)`, what `get_tower_features` gave for views of pictures, one view
                after another, in place of their pixels: the tower does not run for them. It must be frozen.
            tower_grids: `(num_views, 2)`, goes along: rows and columns of features of each view of the batch; 0 and 0 for a
                view that is among `pixel_values`, which then hold those views alone.

        Returns:
            `last_hidden_state`: the tower's features `(num_images, num_features, hidden_size)`, or
            `(all features, hidden_size)` of pictures of several sizes; `pooler_output`: a list with the tokens
            `(num_tokens, embedding width)` of each picture, and of each frame of a video, or with a fusion other than
            `embed` of each video; `token_grids`: a list with the rows and columns of these.

        Raises:
            ValueError: pictures of another size or shape than the tower was composed for; features of another tower, or of
                one that is being trained.
        """
        processor_outputs = {
            "image_grid_thw": image_grid_thw,
            "spatial_shapes": spatial_shapes,
            "pixel_attention_mask": pixel_attention_mask,
            "target_sizes": target_sizes,
            "image_position_ids": image_position_ids,
            "image_sizes": image_sizes,
        }
        features, grids = [], []
        if pixel_values is not None:
            features, grids = self.get_tower_features(pixel_values, **processor_outputs)
        if tower_features is not None or tower_grids is not None:
            features, grids = self._with_given_features(features, grids, tower_features, tower_grids)
        instructions = {"qformer_input_ids": qformer_input_ids, "qformer_attention_mask": qformer_attention_mask}
        instructions = instruction_arguments(self.config.projector_config, instructions)
        plans = self._plans(original_sizes, num_video_frames, len(features))
        views = check_frames(num_video_frames, [len(plan.views) for plan in plans], len(features))
        if instructions and max(views) > 1:
            counts = torch.tensor(views, device=features[0].device)
            instructions = {key: value.repeat_interleave(counts, dim=0) for key, value in instructions.items()}
        tokens, token_grids = self._project(features, grids, instructions)
        if num_video_frames is None:
            tokens, token_grids = self._join_views(tokens, token_grids, plans, original_sizes)
        else:
            tokens, token_grids = join_frames(
                tokens,
                token_grids,
                views,
                num_video_frames,
                video_settings(self.config),
                lambda tokens, grids: self._join_views(tokens, grids, plans, original_sizes),
                as_one=self.fusion is not None,
            )
        one_size = len(set(grids)) == 1
        return AnyVlmImageFeatures(
            last_hidden_state=torch.stack(features) if one_size else torch.cat(features),
            pooler_output=tokens,
            token_grids=token_grids,
        )

    def get_tower_features(
        self, pixel_values: torch.Tensor, **processor_outputs: torch.Tensor | None
    ) -> tuple[list[torch.Tensor], list[Grid]]:
        """What the projector gets: features `(rows * columns, hidden_size)` of each view, and their rows and columns.

        Concatenated and stored, they are what `get_image_features` takes as `tower_features`, and the grids `tower_grids`.

        Args:
            pixel_values: As for `get_image_features`.
            processor_outputs: `image_grid_thw`, …, `image_sizes`, likewise.
        """
        spec = self.config.vision_tower_spec
        processor_outputs = {key: value for key, value in processor_outputs.items() if value is not None}
        dimensions = (4, 5) if spec["inputs"] == "frames" else (4,)
        if not processor_outputs and pixel_values.ndim not in dimensions:
            raise ValueError(
                f"pixel_values must be (num_images, channels, height, width), got shape {tuple(pixel_values.shape)}."
            )
        grids = image_grids(spec, pixel_values, processor_outputs)
        with graph_if_trained(self.vision_tower):
            raw_features = call_vision_tower(
                self.vision_tower,
                spec,
                pixel_values.to(self.vision_tower.dtype),
                self.config.vision_feature_layer,
                processor_outputs,
            )
            return read_features(raw_features, spec, grids), grids

    def _with_given_features(
        self,
        features: list[torch.Tensor],
        grids: list[Grid],
        tower_features: torch.Tensor | None,
        tower_grids: torch.Tensor | None,
    ) -> tuple[list[torch.Tensor], list[Grid]]:
        """Those that the tower gave now, and those that it gave before, in the order of the views."""
        if tower_features is None or tower_grids is None:
            raise ValueError("tower_features and tower_grids go together. Pass both: model(**inputs).")
        if self.training and any(parameter.requires_grad for parameter in self.vision_tower.parameters()):
            raise ValueError(
                "The vision tower is being trained, so features that it gave before (tower_features) are not its features "
                "any more. Freeze it (model.vision_tower.requires_grad_(False)), or pass pixel_values: train without a "
                "feature cache."
            )
        width = self.config.vision_tower_spec["hidden_size"]
        all_grids = [tuple(grid) for grid in tower_grids.tolist()]
        given = [grid for grid in all_grids if any(grid)]
        if tower_features.ndim != 2 or tower_features.shape[1] != width:
            raise ValueError(
                f"tower_features must be (all features, {width}) for this vision tower, got {tuple(tower_features.shape)}."
            )
        places = [rows * columns for rows, columns in given]
        if len(all_grids) - len(given) != len(features) or sum(places) != len(tower_features):
            raise ValueError(
                f"tower_grids stands for {sum(places)} features and for {len(all_grids) - len(given)} views in "
                f"pixel_values, but there are {len(tower_features)} and {len(features)}. Pass everything that the processor "
                "returned in one call: model(**inputs)."
            )
        computed, known = iter(zip(features, grids)), iter(zip(tower_features.split(places), given))
        merged = [next(known if any(grid) else computed) for grid in all_grids]
        return [view for view, _ in merged], [grid for _, grid in merged]

    def _plans(
        self, original_sizes: torch.Tensor | None, num_video_frames: torch.Tensor | None, num_views: int
    ) -> list[PictureViews]:
        """The views of each picture, if the model cuts pictures; else empty."""
        if not has_several_views(self.config.image_views):
            return []
        if num_video_frames is not None:
            if bool((num_video_frames > 0).all()):
                return []
            num_views -= int(num_video_frames.sum())
        if original_sizes is None:
            raise ValueError(
                "The pictures of this model are cut into views, and original_sizes says which views belong to which "
                "picture. Pass everything that the processor returned: model(**inputs)."
            )
        return check_views(self.config.image_views, original_sizes, num_views)

    def _join_views(
        self,
        tokens: list[torch.Tensor],
        token_grids: list[Grid],
        plans: list[PictureViews],
        original_sizes: torch.Tensor | None,
    ) -> tuple[list[torch.Tensor], list[Grid | None]]:
        """Tokens of each picture, of those of all views of all pictures, and their grids."""
        if not plans:
            return tokens, token_grids
        newline = self.image_newline if has_newline(self.config.image_views) else None
        tokens = join_views(tokens, token_grids, self.config.image_views, plans, original_sizes.tolist(), newline)
        # A picture of several views, joined, is no grid.
        return tokens, [None] * len(tokens)

    def _project(
        self, features: list[torch.Tensor], grids: list[tuple[int, int]], instructions: dict[str, torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[tuple[int, int]]]:
        """Tokens of each view and their grids; the projector runs once for all views of one grid."""
        output_layer = self.multi_modal_projector.output_layer
        dtype = features[0].dtype if output_layer is None else output_layer.weight.dtype
        tokens: list = [None] * len(features)
        token_grids: list = [None] * len(features)
        for grid in dict.fromkeys(grids):
            indices = [index for index, other in enumerate(grids) if other == grid]
            batch = torch.stack([features[index] for index in indices]).to(dtype)
            # Most batches have one grid, and need no copy of theirs.
            own = instructions if len(indices) == len(features) else {k: v[indices] for k, v in instructions.items()}
            projected, projected_grid = self.multi_modal_projector(batch, grid, **own)
            for index, sample in zip(indices, projected):
                tokens[index], token_grids[index] = sample, projected_grid
        return tokens, token_grids

    def _encoded_pictures(
        self,
        pixel_values: torch.Tensor | None,
        mm_encoder_outputs: dict[str, Any] | None,
        processor_outputs: dict[str, torch.Tensor],
    ) -> BaseModelOutputWithPooling | None:
        """What `get_image_features` returns for the pictures of the batch, in order, or `None` without pictures."""
        encoded = (mm_encoder_outputs or {}).get("image")
        has_pictures = pixel_values is not None or processor_outputs.get("tower_features") is not None
        if encoded is not None and has_pictures:
            raise ValueError("Pass pixel_values, tower_features or mm_encoder_outputs['image'], not two of them.")
        if encoded is None and has_pictures:
            encoded = self.get_image_features(pixel_values, **processor_outputs, return_dict=True)
        return encoded

    def _refuse_missing_pictures(self, input_ids: torch.Tensor | None) -> None:
        if input_ids is not None and bool((input_ids == self.config.image_token_id).any()):
            raise ValueError(
                "The text has image tokens, but no pixel_values came with it. Pass what the processor returned whole: "
                "model(**inputs), model.generate(**inputs)."
            )

    def _image_mask(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
        """Boolean `(batch, sequence)`, true where an image token stands."""
        return self._token_mask(self.config.image_token_id, input_ids, inputs_embeds)

    def _token_mask(
        self, token_id: int, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None
    ) -> torch.Tensor:
        """Boolean `(batch, sequence)`, true where this token stands, or its embedding."""
        if input_ids is not None:
            return input_ids == token_id
        embedding = self.get_input_embeddings()(torch.tensor([token_id], device=inputs_embeds.device))
        return (inputs_embeds == embedding.to(inputs_embeds.dtype)).all(-1)
