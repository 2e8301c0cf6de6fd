"""What is matched is what the model reads of a picture and a caption; negatives are others', the similar ones first."""

import pytest
import torch
from model_tester import picture
from test_contrastive import CAPTIONS, batch_for, composed, samples
from tiny_parts import text_config, tiny_tokenizer
from transformers import Qwen2VLImageProcessorPil

import anyvlm
from anyvlm.compatibility import tiny_configs
from anyvlm.training.objectives.matching import MatchingObjective


def probability_alone(model, processor, objective, sample, caption) -> float:
    """By an ordinary call of the model on one picture and one text."""
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "w20 ?"}]}],
        add_generation_prompt=True,
        tokenize=False,
    )
    inputs = processor(text=[prompt + caption + "</s>"], images=sample["images"], return_tensors="pt")
    hidden_states = model(**inputs, output_hidden_states=True).hidden_states[-1]
    return objective.head(hidden_states[0, -1]).softmax(-1)[1].item()


def several_sizes():
    model, processor = anyvlm.compose(
        vision=tiny_configs.vision_config("qwen2_5_vl_vision"),
        text=text_config("llama"),
        tokenizer=tiny_tokenizer(),
        image_processor=Qwen2VLImageProcessorPil(patch_size=8, min_pixels=16 * 16, max_pixels=64 * 64),
    )
    given = samples()
    for sample, size in zip(given, [(70, 90), (200, 64), (40, 40), (33, 120)]):
        sample["images"] = [image.resize(size) for image in sample["images"]]
    return model.eval(), processor, given


@pytest.mark.parametrize("kind", ["one size", "several sizes", "cross-attention"])
def test_equals_the_model_on_each_pair_alone(kind):
    if kind == "several sizes":
        model, processor, given = several_sizes()
    else:
        options = {"fusion": "cross_attention"} if kind == "cross-attention" else {}
        (model, processor), given = composed(**options), samples()
    objective = MatchingObjective(model)
    pairs = [(0, 0), (0, 2), (3, 1), (2, 0)]
    found = objective.match(model, processor, given, pairs, batch_size=3)
    with torch.no_grad():
        expected = [probability_alone(model, processor, objective, given[i], CAPTIONS[j]) for i, j in pairs]
    assert found.tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_loss_of_two_samples_is_of_all_their_pairs(padding_side):
    model, processor = composed()
    objective = MatchingObjective(model, negatives="text")
    given = [samples()[0], samples()[2]]
    given[1]["messages"][0]["content"] = "w20 w21 w22 ?"
    inputs = anyvlm.AnyVlmDataCollator(processor, padding_side=padding_side, objectives={"m": objective})(given)
    extra = inputs.pop("objective_inputs")["m"]
    batch = batch_for(model, processor, objective, given)
    batch.inputs, batch.extra = inputs, extra
    batch.outputs = model(**inputs, output_image_features=True)
    right = objective.match(model, processor, given, [(0, 0), (1, 1)])
    wrong = objective.match(model, processor, given, [(0, 1), (1, 0)])
    expected = -torch.cat([right.log(), (1 - wrong).log()]).mean()
    assert objective(batch).item() == pytest.approx(expected.item(), abs=1e-5)


def test_negatives_have_other_captions_and_similar_ones_come_first():
    model, processor = composed()
    objective = MatchingObjective(model)
    batch = batch_for(model, processor, objective, samples(["w1", "w1", "w3", "w4"]))
    torch.manual_seed(0)
    drawn = torch.cat([objective._draw(batch) for _ in range(200)])
    keys = batch.extra["keys"]
    assert (keys[drawn[:, 0]] != keys[drawn[:, 1]]).all()
    counts = torch.bincount(drawn[drawn[:, 0] == 2][:, 1], minlength=4)
    assert counts[2] == 0 and counts[[0, 1, 3]].min() > 100
    batch.shared["similarities"] = 20 * torch.tensor(
        [[9.0, 9.0, 1.0, 0.0], [9.0, 9.0, 0.0, 1.0], [0.0, 0.0, 9.0, 1.0], [0.0, 1.0, 0.0, 9.0]]
    )
    # Of each picture (rows), the text that is most similar and not its own.
    hard = [tuple(pair) for _ in range(50) for pair in objective._draw(batch)[:4].tolist()]
    assert set(hard) <= {(0, 2), (1, 3), (2, 3), (3, 1), (0, 3), (1, 2)}
    assert sum(pair in {(0, 2), (1, 3), (2, 3), (3, 1)} for pair in hard) >= 198


def test_nothing_to_match():
    model, processor = composed()
    objective = MatchingObjective(model)
    assert objective(batch_for(model, processor, objective, samples(["w1", "w1", "W1"]))) is None
    assert objective(batch_for(model, processor, objective, samples(["w1"]))) is None
    text_only = {"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]}
    assert objective(batch_for(model, processor, objective, [text_only, samples()[1]])) is None


def test_the_tower_runs_once_and_the_projector_learns():
    model, processor = composed()
    calls = []
    model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    objective = MatchingObjective(model)
    objective(batch_for(model, processor, objective, samples())).backward()
    assert len(calls) == 1
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.multi_modal_projector.parameters())


def test_clear_errors():
    model, processor = composed()
    with pytest.raises(ValueError, match="both, text, picture, not 'hard'"):
        MatchingObjective(model, negatives="hard")
    with pytest.raises(ValueError, match="cannot be matched"):
        without = {"messages": [{"role": "user", "content": "w1"}], "images": [picture(0)]}
        MatchingObjective(model).match(model, processor, [samples()[0], without], [(0, 1)])
