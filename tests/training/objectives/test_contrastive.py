"""Losses against those of CLIP and SigLIP in transformers; pictures and texts that are embedded apart."""

import math

import pytest
import torch
from model_tester import picture
from tiny_parts import text_config, tiny_tokenizer, vision_config
from torch.nn import functional
from transformers import Qwen2VLImageProcessorPil, SiglipConfig, SiglipModel
from transformers.models.clip.modeling_clip import image_text_contrastive_loss

import anyvlm
from anyvlm.compatibility import tiny_configs
from anyvlm.training.objectives.base import ObjectiveBatch
from anyvlm.training.objectives.contrastive import ContrastiveObjective, sigmoid_loss


CAPTIONS = ["w1 w2", "w3", "w4 w5 w6 w7", "w8 w9"]


def composed(text="llama", **kwargs):
    model, processor = anyvlm.compose(
        vision=vision_config("clip_vision_model"), text=text_config(text), tokenizer=tiny_tokenizer(), **kwargs
    )
    return model.eval(), processor


def samples(captions=CAPTIONS, **columns):
    return [
        {
            "messages": [{"role": "user", "content": "w20 ?"}, {"role": "assistant", "content": caption}],
            "images": [picture(index)],
            **columns,
        }
        for index, caption in enumerate(captions)
    ]


def batch_for(model, processor, objective, given) -> ObjectiveBatch:
    inputs = anyvlm.AnyVlmDataCollator(processor, objectives={"near": objective})(given)
    extra = inputs.pop("objective_inputs")["near"]
    return ObjectiveBatch(model, inputs, model(**inputs, output_image_features=True), extra, 0.5)


@pytest.mark.parametrize(
    "text, text_pooling",
    # States of another width than the config's, recurrent ones, and several versions of each.
    [("llama", "last"), ("llama", "mean"), ("opt", "last"), ("mamba", "last"), ("gemma3n_text", "last")],
)
def test_softmax_loss_is_clips(text, text_pooling):
    model, processor = composed(text)
    objective = ContrastiveObjective(model, embedding_size=8, text_pooling=text_pooling)
    loss = objective(batch_for(model, processor, objective, samples()))
    pictures = objective.embed_pictures(model, processor, [picture(i) for i in range(4)], batch_size=3)
    texts = objective.embed_texts(model, processor, CAPTIONS, batch_size=1)
    assert torch.allclose(pictures.norm(dim=1), torch.ones(4))
    expected = image_text_contrastive_loss(texts @ pictures.T / 0.07)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-4)


def test_sigmoid_loss_is_siglips():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = SiglipConfig(
        text_config={**sizes, "vocab_size": 50, "max_position_embeddings": 8, "projection_size": 16},
        vision_config={**sizes, "image_size": 16, "patch_size": 8},
    )
    siglip = SiglipModel(config).eval()
    outputs = siglip(input_ids=torch.randint(3, 50, (5, 8)), pixel_values=torch.randn(5, 3, 16, 16), return_loss=True)
    others = ~torch.eye(5, dtype=torch.bool)
    assert sigmoid_loss(outputs.logits_per_image, others).item() == pytest.approx(outputs.loss.item(), rel=1e-6)


def test_sigmoid_objective_begins_as_siglip_does():
    model, processor = composed()
    objective = ContrastiveObjective(model, embedding_size=8, loss="sigmoid")
    loss = objective(batch_for(model, processor, objective, samples()))
    pictures = objective.embed_pictures(model, processor, [picture(i) for i in range(4)])
    logits = objective.embed_texts(model, processor, CAPTIONS) @ pictures.T * 10 - 10
    signs = 2 * torch.eye(4) - 1
    assert loss.item() == pytest.approx(-functional.logsigmoid(signs * logits).sum(-1).mean().item(), rel=1e-4)


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_equal_captions_are_no_negatives_of_one_another(loss):
    model, processor = composed()
    objective = ContrastiveObjective(model, embedding_size=8, loss=loss)
    captions = ["w1 w2", "w3", "W1  w2", "w8"]
    value = objective(batch_for(model, processor, objective, samples(captions)))
    pictures = objective.embed_pictures(model, processor, [picture(i) for i in range(4)])
    texts = objective.embed_texts(model, processor, captions)
    similarity = objective.logit_scale.exp().detach() * pictures @ texts.T
    if loss == "softmax":
        rows = []
        for one in (similarity, similarity.T):
            for row in range(4):
                kept = [column for column in range(4) if {row, column} != {0, 2}]
                target = torch.tensor([kept.index(row)])
                rows.append(functional.cross_entropy(one[row, kept][None], target))
        expected = sum(rows) / 8
    else:
        similarity = similarity + objective.logit_bias.detach()
        signs = 2 * torch.eye(4) - 1
        terms = -functional.logsigmoid(signs * similarity)
        expected = (terms.sum() - terms[0, 2] - terms[2, 0]) / 4
    assert value.item() == pytest.approx(expected.item(), rel=1e-4)


def test_what_has_no_picture_or_no_caption_is_left_out():
    model, processor = composed()
    objective = ContrastiveObjective(model, embedding_size=8)
    whole = samples()
    text_only = {"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]}
    no_caption = {"messages": [{"role": "user", "content": "w1"}], "images": [picture(7)] * 2}
    given = [text_only, whole[0], no_caption, whole[1], whole[2], text_only, whole[3]]
    mixed, alone = (objective(batch_for(model, processor, objective, part)) for part in (given, whole))
    assert mixed.item() == pytest.approx(alone.item(), abs=1e-5)
    batch = batch_for(model, processor, objective, [text_only, whole[0], no_caption])
    assert objective(batch) is None
    assert objective(batch_for(model, processor, objective, [text_only, text_only])) is None


def test_a_column_is_the_caption_where_there_is_one():
    model, processor = composed()
    objective = ContrastiveObjective(model, embedding_size=8)
    answers = [{**sample, "caption": caption} for sample, caption in zip(samples(["w9"] * 4), CAPTIONS)]
    values = [objective(batch_for(model, processor, objective, part)) for part in (answers, samples())]
    assert values[0].item() == pytest.approx(values[1].item(), abs=1e-5)


def test_tower_features_of_pictures_of_several_sizes():
    model, processor = anyvlm.compose(
        vision=tiny_configs.vision_config("qwen2_5_vl_vision"),
        text=text_config("llama"),
        tokenizer=tiny_tokenizer(),
        image_processor=Qwen2VLImageProcessorPil(patch_size=8, min_pixels=16 * 16, max_pixels=64 * 64),
    )
    model.eval()
    objective = ContrastiveObjective(model, embedding_size=8, pictures="tower")
    given = samples()
    for sample, size in zip(given, [(70, 90), (200, 64), (40, 40), (33, 120)]):
        sample["images"] = [image.resize(size) for image in sample["images"]]
    loss = objective(batch_for(model, processor, objective, given))
    alone = []
    for sample in given:
        inputs = processor(text=["<image>"], images=sample["images"], return_tensors="pt")
        features = model.get_image_features(inputs["pixel_values"], image_grid_thw=inputs["image_grid_thw"])
        alone.append(features.last_hidden_state.flatten(0, -2).mean(0))
    pictures = functional.normalize(objective.picture_head(torch.stack(alone)), dim=-1)
    texts = objective.embed_texts(model, processor, CAPTIONS)
    expected = image_text_contrastive_loss(texts @ pictures.T / 0.07)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-4)


def test_the_temperature_is_bounded_and_comes_back():
    model, processor = composed()
    objective = ContrastiveObjective(model, embedding_size=8)
    with torch.no_grad():
        objective.logit_scale.fill_(9.0)
    objective(batch_for(model, processor, objective, samples())).backward()
    assert objective.logit_scale.item() == pytest.approx(math.log(100))
    assert objective.logit_scale.grad.abs() > 0


def test_clear_errors():
    model, processor = composed()
    with pytest.raises(ValueError, match="softmax, sigmoid, not 'triplet'"):
        ContrastiveObjective(model, loss="triplet")
    objective = ContrastiveObjective(model)
    inputs = anyvlm.AnyVlmDataCollator(processor)(samples())
    outputs = model(**inputs, output_image_features=True)
    with pytest.raises(ValueError, match="collator"):
        objective(ObjectiveBatch(model, inputs, outputs, {}, 0.0))
    given = [{**samples()[0], "videos": [[picture(0), picture(1)]]}]
    with pytest.raises(ValueError, match="videos"):
        objective.collate(given, {}, processor)
