"""Join a vision tower and a language model."""

import copy
from collections.abc import Sequence

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.image_processing_utils import BaseImageProcessor

from ..configuration.configuration_anyvlm import AnyVlmConfig
from ..modeling.modeling_anyvlm import AnyVlmForConditionalGeneration
from ..processing.processing_anyvlm import AnyVlmProcessor
from .arguments import fusion_and_arguments, typed
from .assembly import assemble, cast_as_loaded
from .chat_templates import chat_template_with_images
from .decoder_layers import complete_fusion_config
from .errors import CompositionError
from .image_attention_probe import probe_image_attention
from .language_model_probe import probe_generation, probe_language_model
from .model_sizes import embedding_width
from .part_origins import part_origin
from .parts import PartSource, load_language_model, load_vision_tower
from .picture_plan import check_context, plan_pictures
from .probe import probe_features
from .projector_grid import check_projector_arguments, complete_projector
from .starting_scale import match_embedding_scale
from .tokenizers import add_image_token, load_instruction_tokenizer, load_tokenizer, normalise_special_tokens
from .views import views_settings
from .vision_part import check_vision_fusion, examine_vision_part, vision_sources
from .written_text import check_settings, check_written, repeated_token


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
    image_text: dict | None = None,
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
        image_text: What is written around the tokens of a picture and between those of its views, such as
            `{"start": "<img>", "end": "</img>"}` (`processing/image_text.py`), so that a language model, or a native class
            (`to_native`), finds the format that it knows. Its `token` takes the place of `image_token` as the one that is
            repeated and added. The tokenizer must know the rest.
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
    fusion, fusion_arguments = fusion_and_arguments(fusion, image_attention)
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype)
    projector_config = typed(projector)
    sources = vision_sources(vision)
    check_vision_fusion(vision_fusion)
    settings = views_settings(views)
    check_settings(image_text)

    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        # Cheap mistakes first: an unknown projector is found before a gigabyte is read.
        check_projector_arguments(projector_config)
        language_model = load_language_model(text, dtype, trust_remote_code)
        dtype = dtype or language_model.dtype
        towers = [load_vision_tower(source, dtype, trust_remote_code) for source in sources]
        text_tokenizer = load_tokenizer(tokenizer, text, trust_remote_code)
        composed_from = {
            "vision": part_origin(sources[0]) if len(sources) == 1 else [part_origin(source) for source in sources],
            "text": part_origin(text),
        }
        for loaded in (*towers, language_model):
            cast_as_loaded(loaded, dtype)

        language_model_spec = probe_language_model(language_model)
        normalise_special_tokens(text_tokenizer, language_model)
        instruction_tokenizer, projector_config = load_instruction_tokenizer(
            qformer_tokenizer, text_tokenizer, projector_config, trust_remote_code
        )
        image_token_id = add_image_token(text_tokenizer, language_model, repeated_token(image_text, image_token))

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

        plan = plan_pictures(
            part,
            sources[0],
            settings=settings,
            projector_config=projector_config,
            fusion=fusion,
            video_frames=video_frames,
            image_processor=image_processor,
            image_size=image_size,
            trust_remote_code=trust_remote_code,
        )
        spec, image_views = part.spec, plan.measured.image_views
        check_written(image_text, image_token, text_tokenizer, image_views, fusion)
        check_context(language_model.config, plan, spec)
        width = embedding_width(language_model)
        projector_config = complete_projector(projector_config, spec["hidden_size"], width, fusion)
        image_fusion_config = None
        if fusion != "embed":
            widths = (width, projector_config["out_features"])
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
            video_frames=plan.measured.video_frames,
            image_token_id=image_token_id,
            vision_feature_layer=part.layer,
            vision_feature_select_strategy=part.select_strategy,
            composed_from=composed_from,
            architectures=["AnyVlmForConditionalGeneration"],
            dtype=dtype,
        )
        model = assemble(config, vision_tower, language_model)
        model.learn_about_language_model(probe_generation(model))
        model.config.image_attention = image_attention
        probe_image_attention(model)
        match_embedding_scale(model, features)

    processor = AnyVlmProcessor(
        image_processor=plan.image_processor,
        tokenizer=text_tokenizer,
        qformer_tokenizer=instruction_tokenizer,
        chat_template=chat_template_with_images(text_tokenizer, image_token, video_token),
        image_token=image_token,
        vision_tower_spec=spec,
        projector_config=projector_config,
        image_views=image_views,
        image_text=image_text,
        video_token=video_token,
        video_frames=plan.measured.video_frames,
        fusion=fusion,
    )
    return model.eval(), processor
