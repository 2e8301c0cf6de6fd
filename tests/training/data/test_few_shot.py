"""Examples before a question: the batch is that of the same conversation written by hand."""

import pytest
import torch
from model_tester import picture
from tiny_parts import text_config, tiny_tokenizer, vision_config

import anyvlm
from anyvlm.training.data import FewShot, few_shot_messages, nearest_examples, picture_features
from anyvlm.training.domains import MixedDomains  # noqa: F401 - what is put around these samples elsewhere


@pytest.fixture(scope="module")
def parts():
    return anyvlm.compose(
        vision=vision_config("clip_vision_model"), text=text_config("llama"), tokenizer=tiny_tokenizer()
    )


def turn(role, content):
    return {"role": role, "content": content}


def sample(index, label="a", content="<image> w5 ?"):
    messages = [turn("user", content), turn("assistant", f"w{index}")]
    return {"messages": messages, "images": [picture(index)], "label": label}


EXAMPLES = [sample(index, label) for index, label in enumerate("aaaabbbbcccc")]


def same(first, second):
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_equals_the_conversation_written_by_hand(parts):
    collator = anyvlm.AnyVlmDataCollator(parts[1])
    asked = {**sample(30, content="w7 ?"), "domain": "x"}  # its picture is placed by nothing
    asked["messages"] = [turn("system", "w20"), *asked["messages"]]
    found = FewShot(EXAMPLES, shots=2)(asked, (0, 1))
    assert found["domain"] == "x" and len(found["images"]) == 3
    chosen = [next(i for i, one in enumerate(EXAMPLES) if one["images"][0] == image) for image in found["images"][:2]]
    written = [turn("system", "w20")]
    for index in chosen:
        written += EXAMPLES[index]["messages"]
    written += [turn("user", "<image>w7 ?"), turn("assistant", "w30")]
    images = [EXAMPLES[index]["images"][0] for index in chosen] + asked["images"]
    same(collator([found]), collator([{"messages": written, "images": images}]))


def test_by_key_within_the_range_and_never_itself():
    few_shot = FewShot(EXAMPLES, shots=(0, 3))
    numbers = []
    for index, one in enumerate(EXAMPLES):
        for epoch in range(10):
            found = few_shot(one, (epoch, index))
            assert found == FewShot(EXAMPLES, shots=(0, 3))(one, (epoch, index))
            numbers.append(len(found["images"]) - 1)
            assert sum(image == one["images"][0] for image in found["images"]) == 1
    assert set(numbers) == {0, 1, 2, 3}
    assert few_shot(EXAMPLES[0], (1, 0)) != few_shot(EXAMPLES[0], (2, 0))


def test_one_of_each_class():
    for epoch in range(10):
        images = FewShot(EXAMPLES, shots=6, choose="classes")(sample(40), (epoch,))["images"][:-1]
        labels = [next(one["label"] for one in EXAMPLES if one["images"][0] == image) for image in images]
        assert sorted(labels) == list("aabbcc")


def test_nearest_is_last():
    features = torch.eye(12)
    query = torch.tensor([0.1, 0.9, 0.3, 0.5, *[0.0] * 8])
    assert nearest_examples(features, query, 3) == [2, 3, 1]
    few_shot = FewShot(EXAMPLES, shots=2, choose="nearest", features=features, features_of=lambda sample: query)
    assert few_shot(sample(40))["images"][:2] == [EXAMPLES[3]["images"][0], EXAMPLES[1]["images"][0]]
    # The nearest is the sample itself, which is left out.
    assert few_shot(EXAMPLES[1])["images"][:2] == [EXAMPLES[2]["images"][0], EXAMPLES[3]["images"][0]]


def test_features_are_the_means_of_the_towers(parts):
    model, processor = parts
    pictures = [picture(index) for index in range(5)]
    found = picture_features(model, processor, pictures, batch_size=2)
    with torch.no_grad():
        pixels = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
        oracle = model.vision_tower(pixels).last_hidden_state[:, 1:].mean(1)
        hidden = model.vision_tower(pixels, output_hidden_states=True).hidden_states
    layers = [layer[:, 1:].mean(1) for layer in hidden] + [oracle]
    assert any(torch.allclose(found, layer, atol=1e-5) for layer in layers)
    assert not torch.allclose(found[0], found[1], atol=1e-3)


def test_asking(parts):
    model, processor = parts
    messages = few_shot_messages(EXAMPLES[:2], "w9 ?", picture(9))
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    text = (
        "".join(f"User: <image> w5 ?\nAssistant: w{index}</s>\n" for index in range(2))
        + "User: <image>w9 ?\nAssistant:"
    )
    images = [EXAMPLES[0]["images"][0], EXAMPLES[1]["images"][0], picture(9)]
    oracle = processor(text=[text], images=[images], return_tensors="pt")
    assert torch.equal(inputs["input_ids"], oracle["input_ids"])
    assert torch.equal(inputs["pixel_values"], oracle["pixel_values"])
    assert few_shot_messages([], "w9 ?") == [turn("user", [{"type": "text", "text": "w9 ?"}])]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"shots": 12}, "no sample is its own"),
        ({"shots": (3, 1)}, "the least and the most"),
        ({"choose": "best"}, "random, classes, nearest"),
        ({"choose": "classes", "label": "kind"}, "column 'kind'"),
        ({"choose": "nearest"}, "need features"),
    ],
)
def test_what_is_missing_is_said(settings, message):
    with pytest.raises(ValueError, match=message):
        FewShot(EXAMPLES, **settings)
