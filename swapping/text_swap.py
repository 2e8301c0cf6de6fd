"""Another language model in a model: what can stay stays, without asking it anything."""

import copy
import logging

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..composition.assembly import assemble, cast_as_loaded
from ..composition.chat_templates import chat_template_with_images
from ..composition.decoder_layers import complete_fusion_config
from ..composition.errors import CompositionError
from ..composition.image_attention_probe import probe_image_attention
from ..composition.language_model_probe import probe_generation, probe_language_model
from ..composition.model_sizes import embedding_width
from ..composition.native.projector_arguments import projector_arguments
from ..composition.part_origins import part_origin
from ..composition.parts import PartSource, load_language_model
from ..composition.picture_plan import check_context, counted_plan
from ..composition.probe import probe_features
from ..composition.projector_grid import check_projector_arguments, check_projector_grid, complete_projector
from ..composition.starting_scale import match_embedding_scale
from ..composition.tokenizers import add_image_token, load_tokenizer, normalise_special_tokens
from ..composition.views import Measured, complete_video_frames
from ..composition.written_text import check_written, repeated_token
from ..modeling.modeling_anyvlm import AnyVlmForConditionalGeneration
from ..modeling.query_projectors import ResamplerProjector
from ..processing.processing_anyvlm import AnyVlmProcessor
from .feature_maps import core_projector
from .vision_swap import carried_video_frames, processor_with


logger = logging.getLogger(__name__)

#: What the fusion learned about the language model; the rest of its config was chosen.
_MEASURED = ("image_features", "hidden_size", "decoder_layers", "num_decoder_layers", "num_heads")
#: Mean cosine between the embeddings of shared tokens from which on two language models read the same embeddings. That of
#: unrelated ones is about 0, that of a tuned one to what it was tuned from nearly 1.
_SAME_EMBEDDINGS = 0.5


def swap_language_model(
    model: AnyVlmForConditionalGeneration,
    processor: AnyVlmProcessor,
    text: PartSource,
    *,
    tokenizer: PreTrainedTokenizerBase | str | None = None,
    projector: dict | None = None,
    trust_remote_code: bool = False,
    seed: int = 0,
) -> tuple[AnyVlmForConditionalGeneration, AnyVlmProcessor]:
    """A model with another language model, and its processor. Arguments as for `swap`; `projector` with its `type`.

    The new model holds the old one's vision tower itself, and a copy of its projector but for the last layer, which gives
    tokens for other embeddings; that stays too where the embeddings are those of the same language model, tuned.
    Tokenizer, special tokens, chat template and generation defaults are the new language model's.

    Raises:
        CompositionError: the language model cannot be used in this model; the message says why and what would.
    """
    config = copy.deepcopy(model.config)
    config.dtype = model.dtype  # saving writes its name there
    fusion_name, image_views = config.fusion, config.image_views
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        if projector is not None:
            check_projector_arguments(projector)
        language_model = load_language_model(text, model.dtype, trust_remote_code)
        text_tokenizer = copy.deepcopy(load_tokenizer(tokenizer, text, trust_remote_code))
        origin = part_origin(text)
        cast_as_loaded(language_model, model.dtype)
        language_model.to(model.language_model.device)
        config.language_model_spec = probe_language_model(language_model)
        normalise_special_tokens(text_tokenizer, language_model)
        image_text = processor.image_text
        config.image_token_id = add_image_token(
            text_tokenizer, language_model, repeated_token(image_text, processor.image_token)
        )
        try:
            check_written(image_text, processor.image_token, text_tokenizer, image_views, fusion_name)
        except CompositionError as error:
            image_text = {"token": image_text["token"]} if "token" in image_text else None
            logger.warning("Nothing is written around the tokens of a picture any more: %s", error)

        width = embedding_width(language_model)
        config.projector_config = _projector_config(model, projector, width)
        spec = config.vision_tower_spec
        check_projector_grid(config.projector_config, spec, any_grid=spec["any_size"] and image_views is None)
        config.video_frames = complete_video_frames(
            carried_video_frames(model.config, spec, config.projector_config),
            spec,
            config.projector_config,
            fusion_name,
        )
        measured = Measured(spec, config.projector_config, image_views, config.video_frames, fusion_name)
        plan = counted_plan(processor.image_processor, measured, tuple(spec["image_size"]))
        check_context(language_model.config, plan, spec)
        if fusion_name != "embed":
            arguments = {k: v for k, v in config.image_fusion_config.items() if k not in _MEASURED}
            if arguments.get("forget_after") is not None:
                arguments["forget_after"] = _same_token(arguments["forget_after"], processor.tokenizer, text_tokenizer)
            widths = (width, config.projector_config["out_features"])
            config.image_fusion_config = complete_fusion_config(fusion_name, arguments, language_model, widths)
        config.text_config = copy.deepcopy(language_model.config)
        config.composed_from = {**(config.composed_from or {}), "text": origin}
        if "native" in config.composed_from:  # what its language model did to logits is no more
            native = config.composed_from["native"].items()
            config.composed_from["native"] = {key: value for key, value in native if key != "text_scales"}
        language_model.config.dtype, language_model.config.name_or_path = model.dtype, ""
        config.image_attention = "causal"
        swapped = assemble(config, model.vision_tower, language_model)
        swapped.learn_about_language_model(probe_generation(swapped))
        swapped.config.image_attention = model.config.image_attention
        try:
            probe_image_attention(swapped)
        except CompositionError as error:
            raise CompositionError(
                f'{error} To swap nevertheless, set model.config.image_attention = "causal" beforehand; what was trained '
                "with the other masks will then have to be trained anew."
            ) from error
        same = projector is None and _same_embeddings(model, processor, language_model, text_tokenizer)
        _fill_projector(swapped, model, keep_output=same, is_new=projector is not None)
    new_processor = processor_with(
        processor,
        tokenizer=text_tokenizer,
        chat_template=chat_template_with_images(text_tokenizer, processor.image_token, processor.video_token),
        projector_config=swapped.config.projector_config,
        video_frames=swapped.config.video_frames,
        image_text=image_text,
        # How prompts are written was the old language model's habit.
        pictures_first=False,
        prompt_form=None,
    )
    return swapped.train(model.training), new_processor


def _projector_config(model: AnyVlmForConditionalGeneration, projector: dict | None, width: int) -> dict:
    """Raises `CompositionError` if the projector cannot be built for embeddings of this width."""
    old, fusion = model.config.projector_config, model.config.fusion
    if projector is not None:
        return complete_projector(projector, model.config.vision_tower_spec["hidden_size"], width, fusion)
    if old["out_features"] == width or (old["type"] == "identity" and fusion != "embed"):
        return dict(old)
    config = {**old, "out_features": width}
    # Widths between the layers that were left out followed from the old embeddings.
    core = core_projector(model.multi_modal_projector)
    if isinstance(core, ResamplerProjector) and core.output_projection is not None:
        config["hidden_features"] = core.queries.shape[-1]
    elif "hidden_features" in (found := projector_arguments(old)) and isinstance(found["hidden_features"], list):
        config["hidden_features"] = found["hidden_features"]
    return complete_projector(config, config["in_features"], width, fusion)


def _same_token(token_id: int, tokenizer: PreTrainedTokenizerBase, new: PreTrainedTokenizerBase) -> int | None:
    """What a token of one tokenizer is in another: its own end of a text, or what is spelled alike."""
    if token_id == tokenizer.eos_token_id:
        return new.eos_token_id
    return new.get_vocab().get(tokenizer.convert_ids_to_tokens(token_id))


def _same_embeddings(
    model: AnyVlmForConditionalGeneration,
    processor: AnyVlmProcessor,
    language_model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
) -> bool:
    """Whether tokens that both know have nearly the same embeddings."""
    if embedding_width(model.language_model) != embedding_width(language_model):
        return False
    old_vocabulary, vocabulary = processor.tokenizer.get_vocab(), tokenizer.get_vocab()
    shared = sorted(old_vocabulary.keys() & vocabulary.keys())[:4096]
    if not shared:
        return False
    device = language_model.device
    rows = [
        embeddings(torch.tensor([[found[token] for token in shared]], device=device))[0].float()
        for embeddings, found in (
            (model.get_input_embeddings(), old_vocabulary),
            (language_model.get_input_embeddings(), vocabulary),
        )
    ]
    return float(nn.functional.cosine_similarity(*rows).mean()) > _SAME_EMBEDDINGS


def _fill_projector(
    swapped: AnyVlmForConditionalGeneration, model: AnyVlmForConditionalGeneration, keep_output: bool, is_new: bool
) -> None:
    """Copy what fits of the old projector, newline and fusion; a new last layer gives tokens of the size of embeddings."""
    spec = swapped.config.vision_tower_spec
    output_layer = swapped.multi_modal_projector.output_layer
    output = {id(parameter) for parameter in output_layer.parameters()} if output_layer is not None else set()
    if not is_new:
        old = model.multi_modal_projector.state_dict()
        for name, tensor in swapped.multi_modal_projector.state_dict(keep_vars=True).items():
            if tensor.shape == old[name].shape and (keep_output or id(tensor) not in output):
                tensor.copy_(old[name])
    if keep_output:
        newline = getattr(model, "image_newline", None)
        if newline is not None:
            swapped.image_newline.copy_(newline)
        if model.fusion is not None and swapped.config.image_fusion_config == model.config.image_fusion_config:
            swapped.fusion.load_state_dict(model.fusion.state_dict())
        return
    features = probe_features(model.vision_tower, spec, swapped.config.vision_feature_layer, is_trained=False)
    match_embedding_scale(swapped, features)
