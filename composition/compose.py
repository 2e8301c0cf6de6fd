"""Join a vision tower and a language model."""

import contextlib
import copy
import logging
import os
from collections.abc import Sequence

import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, RepositoryNotFoundError
from torch import nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.image_processing_utils import BaseImageProcessor

from ..configuration.configuration_anyvlm import FUSIONS, IMAGE_ATTENTIONS, AnyVlmConfig
from ..configuration.image_tokens import num_tokens_of_grid
from ..configuration.image_views import has_newline
from ..modeling.fusion import build_fusion
from ..modeling.modeling_anyvlm import AnyVlmForConditionalGeneration
from ..modeling.picture_states import PictureStates
from ..modeling.projectors import build_projector
from ..processing.prepared_views import grids_of_sizes, makes_one_size
from ..processing.processing_anyvlm import AnyVlmProcessor
from .chat_templates import chat_template_with_images
from .decoder_layers import complete_fusion_config
from .errors import CompositionError
from .image_attention_probe import probe_image_attention
from .image_processors import load_image_processor
from .language_model_probe import plain_words, probe_generation, probe_language_model
from .model_sizes import num_positions
from .native_views import fit_to_budget
from .parts import PartSource, load_language_model, load_vision_tower, pretrained_name, source_name
from .probe import probe_features
from .projector_grid import check_projector_arguments, check_projector_grid, check_projector_widths
from .tokenizers import (
    add_image_token,
    load_instruction_tokenizer,
    load_tokenizer,
    normalise_special_tokens,
)
from .views import Measured, complete_video_frames, complete_views, fewest_and_most_tokens, views_settings
from .vision_part import check_vision_fusion, examine_vision_part, vision_sources


logger = logging.getLogger(__name__)


def compose(
    vision: PartSource | Sequence[PartSource],
    text: PartSource,
    audio: PartSource | None = None,
    *,
    projector: str | dict = "mlp",
    fusion: str | dict = "embed",
    image_attention: str = "causal",
    views: str | dict | None = None,
    video_frames: dict | None = None,
    tokenizer: PreTrainedTokenizerBase | str | None = None,
    image_processor: BaseImageProcessor | str | Sequence | None = None,
    feature_extractor: object | None = None,
    qformer_tokenizer: PreTrainedTokenizerBase | str | None = None,
    image_size: int | tuple[int, int] | None = None,
    image_token: str = "<image>",
    video_token: str = "<video>",
    vision_feature_layer: int | Sequence | None = None,
    vision_feature_select_strategy: str | Sequence[str] = "default",
    vision_fusion: str = "channel",
    dtype: torch.dtype | str | None = None,
    trust_remote_code: bool = False,
    seed: int = 0,
) -> tuple[AnyVlmForConditionalGeneration, AnyVlmProcessor]:
    """Join a vision tower and a causal language model into one model, with the processor that goes with it.

    The parts keep their weights; the projector between them is new, and so is the image token's row in the embeddings
    if there was no spare one. Instances are taken over, not copied.

    Args:
        vision: The tower: a Hub id, a local path, a config (random weights) or a model instance; or a tuple of
            several, which all see the same pictures.
        text: The language model, likewise.
        audio: Not supported yet; anything but `None` is refused.
        projector: `"linear"`, `"mlp"`, `"pixel_shuffle"`, `"avg_pool"`, `"patch_merger"`, `"conv"`, `"resampler"`,
            `"qformer"`, `"identity"`, or a dict with `type` and arguments (`modeling/projectors.py`).
        fusion: `"embed"`: image tokens take the place of placeholders in the language model's input.
            `"cross_attention"`: text attends to them in layers before every 4th decoder layer. `"gated"`: each text
            embedding attends to them. Or a dict with `type` and arguments (`modeling/fusion.py`).
        image_attention: `"causal"`: image tokens see what comes before them, as text does. `"bidirectional"`: also the rest
            of their picture. `"prefix"`: all of the prompt sees all of it; only the answer is causal.
        views: How a picture is shown to the tower: `"resize"`, whole and in one size (or in its own, if the image
            processor keeps it); `"tiles"`, cut into tiles; `"slices"`, adaptively sliced; `"native"`, whole and in its own
            proportions within a budget of tokens; or a dict with `type` and settings (`configuration/image_views.py`), such
            as `{"type": "tiles", "layout": "dynamic", "max_tiles": 6}` or `{"type": "native", "max_tokens": 256}`. What is
            left out follows from the tower.
        video_frames: Which frames of a video are looked at, and how many tokens they take
            (`configuration/video_frames.py`), such as `{"num_frames": 16, "frame_pool": 2}`.
        tokenizer: Instance, path or Hub id. Default: the language model's.
        image_processor: Instance, path or Hub id; a list of one for each of several towers. Default: the tower's, or a
            plain one for a config.
        feature_extractor: Goes with `audio`.
        qformer_tokenizer: For a projector that reads the instruction beside the picture (`"reads_text": True`): instance,
            path or Hub id. Default: the language model's, and a vocabulary of its size.
        image_size: Pixels, one edge or `(height, width)`. Default: what the image processor makes.
        image_token: Text that stands for a picture. Added to the tokenizer as one token if it has none.
        video_token: Text that stands for a video; image tokens take its place, so it need not be a token.
        vision_feature_layer: `None` for the tower's last hidden state; an index or indices into its hidden states. With
            several towers a list has an entry for each, which may be a list.
        vision_feature_select_strategy: `"default"` for the patches, `"full"` for every token of the tower; or a list
            with one for each of several towers.
        vision_fusion: How the features of several towers are joined: `"channel"`, each place gets those of all;
            `"token"`, one tower's after another's (`modeling/fused_vision_towers.py`).
        dtype: One dtype for the whole model. Default: the language model's.
        trust_remote_code: Allow parts whose code is in their own checkpoint. That code is run, and a copy of it is saved
            with the model.
        seed: For what is random: the projector, new embedding rows, and parts given as configs.

    Returns:
        The model, in eval mode, and its processor.

    Raises:
        CompositionError: the parts cannot work together; the message says why and what would.
    """
    if audio is not None or feature_extractor is not None:
        raise CompositionError("Audio towers are not supported yet. Leave out audio=… and feature_extractor=….")
    fusion_arguments = {"type": fusion} if isinstance(fusion, str) else dict(fusion)
    fusion = fusion_arguments.pop("type", None)
    if fusion not in FUSIONS:
        raise CompositionError(f"Unknown fusion {fusion!r}. Choose one of: {', '.join(FUSIONS)}.")
    if image_attention not in IMAGE_ATTENTIONS:
        raise CompositionError(
            f"Unknown image_attention {image_attention!r}. Choose one of: {', '.join(IMAGE_ATTENTIONS)}."
        )
    if image_attention != "causal" and fusion != "embed":
        raise CompositionError(
            f"With fusion={fusion!r} there are no image tokens in the text, so image_attention={image_attention!r} has "
            'nothing to act on. Use image_attention="causal".'
        )
    if fusion == "embed" and fusion_arguments:
        raise CompositionError(f"fusion 'embed' takes no arguments, but got {fusion_arguments}.")
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype)
    projector_config = {"type": projector} if isinstance(projector, str) else dict(projector)
    sources = vision_sources(vision)
    check_vision_fusion(vision_fusion)
    settings = views_settings(views)

    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        # Cheap mistakes first: an unknown projector is found before a gigabyte is read.
        check_projector_arguments(projector_config)
        language_model = load_language_model(text, dtype, trust_remote_code)
        dtype = dtype or language_model.dtype
        towers = [load_vision_tower(source, dtype, trust_remote_code) for source in sources]
        text_tokenizer = load_tokenizer(tokenizer, text, trust_remote_code)
        composed_from = {
            "vision": _origin(vision, "vision")
            if len(sources) == 1
            else [_origin(source, "vision") for source in sources],
            "text": _origin(text, "text"),
        }
        for loaded in (*towers, language_model):
            _cast(loaded, dtype)

        language_model_spec = probe_language_model(language_model)
        normalise_special_tokens(text_tokenizer, language_model)
        instruction_tokenizer, projector_config = load_instruction_tokenizer(
            qformer_tokenizer, text_tokenizer, projector_config, trust_remote_code
        )
        image_token_id = add_image_token(text_tokenizer, language_model, image_token)

        part = examine_vision_part(
            sources,
            towers,
            image_processor=image_processor,
            image_size=image_size,
            layer=vision_feature_layer,
            select_strategy=vision_feature_select_strategy,
            vision_fusion=vision_fusion,
            trust_remote_code=trust_remote_code,
        )
        vision_tower, spec = part.tower, part.spec
        is_trained = not all(isinstance(source, PreTrainedConfig) for source in sources)
        features = probe_features(vision_tower, spec, part.layer, is_trained=is_trained)

        check_projector_grid(projector_config, spec, any_grid=spec["any_size"] and settings is None)
        image_views = complete_views(settings, spec, projector_config, part.image_processor, part.size)
        if image_views and image_views["type"] == "native":
            if image_size is not None:
                raise CompositionError(
                    'image_size brings every picture to one size, and views="native" keeps their own. Leave out either.'
                )
            part.image_processor, image_views = fit_to_budget(
                image_views, spec, vision_tower, part.image_processor, part.layer
            )
        frames = complete_video_frames(video_frames, spec, projector_config, fusion)
        view_size = (image_views or {}).get("view_size")
        if view_size and not makes_one_size(part.image_processor, spec):
            part.image_processor, part.size = load_image_processor(
                image_processor, sources[0], vision_tower, tuple(view_size), trust_remote_code
            )
        if fusion != "embed":
            fewest = most = 1
        elif image_views is None:
            grid = grids_of_sizes(part.image_processor, spec, [part.size])[0]
            fewest = most = num_tokens_of_grid(projector_config, grid)
        else:
            fewest, most = fewest_and_most_tokens(Measured(spec, projector_config, image_views))
        _check_context(language_model, spec, fewest, most)
        embedding_width = _embedding_width(language_model)
        keeps_features = projector_config["type"] == "identity"
        projector_config = {
            "in_features": spec["hidden_size"],
            # Only a fusion takes features of the tower's own width.
            "out_features": spec["hidden_size"] if keeps_features and fusion != "embed" else embedding_width,
            **projector_config,
        }
        check_projector_widths(projector_config)
        image_fusion_config = None
        if fusion != "embed":
            widths = (embedding_width, projector_config["out_features"])
            image_fusion_config = complete_fusion_config(fusion, fusion_arguments, language_model, widths)
        for config in (*(tower.config for tower in towers), vision_tower.config, language_model.config):
            config.dtype = dtype
            config.name_or_path = ""
        config = AnyVlmConfig(
            # Copies: a composite config unsets the attention implementation of its sub-configs, which the parts read.
            vision_config=copy.deepcopy(vision_tower.config),
            text_config=copy.deepcopy(language_model.config),
            vision_tower_spec=spec,
            language_model_spec=language_model_spec,
            projector_config=projector_config,
            fusion=fusion,
            image_fusion_config=image_fusion_config,
            image_views=image_views,
            video_frames=frames,
            image_token_id=image_token_id,
            vision_feature_layer=part.layer,
            vision_feature_select_strategy=part.select_strategy,
            composed_from=composed_from,
            architectures=["AnyVlmForConditionalGeneration"],
            dtype=dtype,
        )
        model = _assemble(config, vision_tower, language_model)
        model.learn_about_language_model(probe_generation(model))
        model.config.image_attention = image_attention
        probe_image_attention(model)
        _match_embedding_scale(model, features)

    processor = AnyVlmProcessor(
        image_processor=part.image_processor,
        tokenizer=text_tokenizer,
        qformer_tokenizer=instruction_tokenizer,
        chat_template=chat_template_with_images(text_tokenizer, image_token, video_token),
        image_token=image_token,
        vision_tower_spec=spec,
        projector_config=projector_config,
        image_views=image_views,
        video_token=video_token,
        video_frames=frames,
        fusion=fusion,
    )
    return model.eval(), processor


def _assemble(config: AnyVlmConfig, vision_tower: nn.Module, language_model: nn.Module):
    """The model around the parts as they are, without a second copy of their weights."""
    with torch.device("meta"):
        model = AnyVlmForConditionalGeneration(config)
    model.vision_tower, model.config.vision_config = vision_tower, vision_tower.config
    model.language_model, model.config.text_config = language_model, language_model.config
    projector = build_projector(config.projector_config)
    fusion = build_fusion(config.fusion, config.image_fusion_config)
    for part in (projector, fusion):
        for module in part.modules() if part is not None else ():
            model._init_weights(module)
    model.multi_modal_projector = projector.to(language_model.device, config.dtype)
    if fusion is not None:
        model.fusion = fusion.to(language_model.device, config.dtype)
        model.attach_fusion()
    if has_newline(config.image_views):
        model.image_newline = nn.Parameter(
            model.image_newline.new_empty(len(model.image_newline), dtype=config.dtype, device=language_model.device)
        )
        model._init_weights(model)
    model.generation_config = language_model.generation_config
    return model


def _match_embedding_scale(model: AnyVlmForConditionalGeneration, features: torch.Tensor) -> None:
    """Scale the projector's output layer so that image tokens start with the RMS of the text's embeddings.

    Far larger or smaller tokens than a language model ever saw are a common cause of NaN after a swap.

    Args:
        features: Of some pictures, `(num_pictures, num_features, hidden_size)`, fp32.
    """
    projector = model.multi_modal_projector
    tokens, _ = projector.float()(features.to(model.device), tuple(model.config.vision_tower_spec["grid"]))
    rms = embedding_rms(model.language_model)
    if has_newline(model.config.image_views):
        model.image_newline.normal_(std=float(rms))
    if projector.output_layer is not None:
        scale = rms / tokens.square().mean().sqrt().clamp(min=1e-12)
        projector.output_layer.weight.mul_(scale)
        tokens = tokens * scale
    projector.to(model.config.dtype)
    if model.fusion is not None and model.fusion.changes_embeddings:
        _match_gathered_scale(model, tokens)


def _match_gathered_scale(model: AnyVlmForConditionalGeneration, tokens: torch.Tensor) -> None:
    """The same for what text gathers from pictures, where that is mixed into the embeddings.

    Args:
        tokens: Of some pictures, `(num_pictures, num_tokens, width)`.
    """
    num_pictures = len(tokens)
    words = plain_words(model.language_model, 8 * num_pictures).view(num_pictures, 8)
    states = PictureStates.from_pictures(list(tokens), torch.arange(8, device=words.device).expand_as(words) == 0)
    gathered, _ = model.fusion.gather(model.get_input_embeddings()(words), states, "sdpa")
    rms = gathered.float().square().mean().sqrt().clamp(min=1e-12)
    model.fusion.output_layer.weight.mul_(embedding_rms(model.language_model) / rms)


def _cast(part: nn.Module, dtype: torch.dtype) -> None:
    """Cast weights as loading them in `dtype` would: buffers that are computed (rotary frequencies) and modules that
    the part keeps in fp32 stay as they are. `Module.to` would round them, and a reloaded model would differ."""
    kept = set(part._keep_in_fp32_modules_strict or ())
    if dtype == torch.float16:
        kept |= set(part._keep_in_fp32_modules or ())
    for name, tensor in part.state_dict(keep_vars=True).items():
        if tensor.is_floating_point() and not kept.intersection(name.split(".")):
            tensor.data = tensor.data.to(dtype)


def embedding_rms(language_model: nn.Module, max_rows: int = 4096) -> torch.Tensor:
    """RMS of the language model's token embeddings as its embedding module gives them, scale included (gemma)."""
    embeddings = language_model.get_input_embeddings()
    num_rows = embeddings.weight.shape[0]
    ids = torch.arange(0, num_rows, max(1, num_rows // max_rows), device=embeddings.weight.device)
    values = embeddings(ids.unsqueeze(0))[0].float()
    used = values.abs().sum(-1) > 0  # rows that pad the vocabulary are zero
    return values[used].square().mean().sqrt()


def _check_context(language_model: nn.Module, spec: dict, fewest: int, most: int) -> None:
    """Warn where a picture, which takes `fewest` to `most` tokens, leaves a text less room than it takes itself.

    Raises:
        CompositionError: one picture alone takes all positions. (Not where pictures keep their own sizes.)
    """
    positions = num_positions(language_model.config)
    if positions and fewest >= positions and not spec["any_size"]:
        height, width = spec["image_size"]
        picture = f"One picture of {height}x{width} pixels" if fewest == most else "Even a small picture"
        fewer_tiles = "" if fewest == most else ", fewer tiles (views=…)"
        raise CompositionError(
            f"{picture} takes {fewest} tokens, and the language "
            f"model has {positions} positions, so no text would fit beside it. Pass a smaller image_size=…{fewer_tiles}, or "
            "a tower with larger patches."
        )
    if positions and 2 * most > positions:
        logger.warning(
            "One picture takes %s%d of the %d positions that the language model was made for. Pass a smaller image_size=…%s "
            "for fewer tokens.",
            "up to " if most > fewest else "",
            most,
            positions,
            " or fewer tiles (views=…)" if most > fewest else "",
        )


def _embedding_width(language_model: nn.Module) -> int:
    embeddings = language_model.get_input_embeddings()
    return embeddings(torch.zeros(1, 1, dtype=torch.long, device=embeddings.weight.device)).shape[-1]


def _origin(source: PartSource, part: str) -> dict[str, str | None]:
    """Hub id and licence of a part, as far as they are known here, for the model card."""
    origin = {"id": source_name(source), "license": None}
    path = pretrained_name(source)
    card = os.path.join(path, "README.md") if path else None
    if card and os.path.isfile(card):
        origin["license"] = ModelCard.load(card, ignore_metadata_errors=True).data.license
    elif origin["id"]:
        # Without a card, or without network, the licence stays unknown, and the model card says so.
        with contextlib.suppress(EntryNotFoundError, HFValidationError, RepositoryNotFoundError, OSError, ValueError):
            origin["license"] = ModelCard.load(origin["id"]).data.license
    return origin
