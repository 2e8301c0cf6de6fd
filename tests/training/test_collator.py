"""Only the assistant's words are supervised, whatever the chat template."""

import pytest
import torch
from model_tester import picture
from tiny_parts import text_config, tiny_tokenizer, vision_config
from transformers import AutoTokenizer

import anyvlm


PLAIN = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }} {{ eos_token }} {% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ m.role }} : {% if m.role == 'assistant' %}{% generation %}{{ m.content }} {{ eos_token }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %} . {% endfor %}"
)
REWRITES = "{% for m in messages %}{% if loop.last %}[{{ m.role }}] {% endif %}{{ m.content }} {% endfor %}"


def processor_with(template=None, **kwargs):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return anyvlm.compose(
        vision=vision_config("clip_vision_model"), text=text_config("llama"), tokenizer=tokenizer, **kwargs
    )[1]


def turn(role, content):
    return {"role": role, "content": content}


def supervised(processor, samples, **kwargs) -> list[str]:
    batch = anyvlm.AnyVlmDataCollator(processor, **kwargs)(samples)
    assert batch["labels"].shape == batch["input_ids"].shape
    kept = batch["labels"] != -100
    assert torch.equal(batch["labels"][kept], batch["input_ids"][kept])
    return [processor.tokenizer.decode(labels[labels != -100]) for labels in batch["labels"]]


@pytest.mark.parametrize("template", [None, PLAIN, MARKED], ids=["default", "plain", "marked"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_assistants_words_and_the_end_of_its_turns(template, side):
    processor = processor_with(template)
    samples = [
        {
            "messages": [
                turn("system", "w30 w31"),
                turn("user", "<image> w5 w6"),
                turn("assistant", "w1 w2"),
                turn("user", "w5 <image>"),
                turn("assistant", "w3"),
            ],
            "images": [picture(0), picture(1)],
        },
        {"messages": [turn("user", "w7"), turn("assistant", "w8 w9")]},
    ]
    assert supervised(processor, samples, padding_side=side) == ["w1 w2 </s> w3 </s>", "w8 w9 </s>"]


def test_real_template_with_thinking(trained_models):
    """Qwen3's own template, which marks nothing and drops earlier thoughts."""
    tokenizer = AutoTokenizer.from_pretrained(f"{trained_models}/qwen3-tokenizer")
    config = text_config("qwen3")
    config.vocab_size = 151936
    _, processor = anyvlm.compose(vision=vision_config("dinov2"), text=config, tokenizer=tokenizer)
    sample = {
        "messages": [turn("user", "What is it?"), turn("assistant", "A grey cat."), turn("user", "And the colour?")]
        + [turn("assistant", "Grey, of course.")],
        "images": [picture(0)],
    }
    (text,) = supervised(processor, [{"messages": sample["messages"][:2], "images": sample["images"]}])
    assert text.endswith("A grey cat.<|im_end|>\n")
    assert "What is it" not in text and "assistant" not in text


def test_pictures_in_content_and_beside_it_agree():
    processor = processor_with()
    image = picture(0)
    question = {"type": "text", "text": " w5 ?"}
    forms = [
        {"messages": [turn("user", [{"type": "image", "image": image}, question]), turn("assistant", "w1")]},
        {"messages": [turn("user", [{"type": "image"}, question]), turn("assistant", "w1")], "images": [image]},
        {"messages": [turn("user", "<image> w5 ?"), turn("assistant", "w1")], "images": image},
        {"messages": [turn("user", [question]), turn("assistant", "w1")], "images": [image]},
        {"messages": [turn("user", " w5 ?"), turn("assistant", "w1")], "images": [image]},
    ]
    collate = anyvlm.AnyVlmDataCollator(processor)
    expected = collate([forms[0]])
    for form in forms[1:]:
        found = collate([form])
        for key in expected:
            assert torch.equal(found[key], expected[key])


def test_samples_are_not_changed():
    sample = {"messages": [turn("user", "w5"), turn("assistant", "w1")], "images": [picture(0)]}
    anyvlm.AnyVlmDataCollator(processor_with())([sample])
    assert sample["messages"] == [turn("user", "w5"), turn("assistant", "w1")]


def test_batch_of_text_alone():
    batch = anyvlm.AnyVlmDataCollator(processor_with())([{"messages": [turn("user", "w5"), turn("assistant", "w1")]}])
    assert set(batch) == {"input_ids", "attention_mask", "labels"}


class TestRefusals:
    @pytest.mark.parametrize(
        "messages",
        [
            [turn("user", "w5")],
            [turn("user", "w5"), turn("bot", "w1")],
            [turn("human", "w5"), turn("gpt", "w1")],
        ],
    )
    def test_nothing_supervised(self, messages):
        with pytest.raises(ValueError, match="No token of this batch is supervised.*'assistant'"):
            anyvlm.AnyVlmDataCollator(processor_with())([{"messages": messages}])

    def test_model_refuses_labels_without_a_label(self):
        model, processor = anyvlm.compose(
            vision=vision_config("clip_vision_model"), text=text_config("llama"), tokenizer=tiny_tokenizer()
        )
        ids = torch.arange(10, 16).unsqueeze(0)
        with pytest.raises(ValueError, match="No token of this batch is supervised"):
            model(input_ids=ids, labels=torch.full_like(ids, -100))

    def test_template_that_rewrites_earlier_turns(self):
        messages = [turn("user", "w5"), turn("assistant", "w1"), turn("user", "w6"), turn("assistant", "w2")]
        with pytest.raises(ValueError, match="generation"):
            anyvlm.AnyVlmDataCollator(processor_with(REWRITES))([{"messages": messages}])

    def test_too_long(self):
        sample = {"messages": [turn("user", "w5 w6"), turn("assistant", "w1")], "images": [picture(0)]}
        with pytest.raises(ValueError, match="more than max_length=10"):
            anyvlm.AnyVlmDataCollator(processor_with(), max_length=10)([sample])

    def test_pictures_in_two_places(self):
        content = [{"type": "image", "image": picture(0)}]
        sample = {"messages": [turn("user", content), turn("assistant", "w1")], "images": [picture(1)]}
        with pytest.raises(ValueError, match="one place"):
            anyvlm.AnyVlmDataCollator(processor_with())([sample])


@pytest.mark.parametrize("inline", [True, False])
def test_videos_in_samples(inline):
    """In the messages or beside them; the answer after them is what is supervised."""
    video = [picture(index) for index in range(3)]
    block = {"type": "video", "video": video} if inline else {"type": "video"}
    messages = [turn("user", [block, {"type": "text", "text": " w5 "}, {"type": "image"}]), turn("assistant", "w1 w2")]
    sample = {"messages": messages, "images": [picture(9)], **({} if inline else {"videos": [video]})}
    processor = processor_with()
    batch = anyvlm.AnyVlmDataCollator(processor)([sample, {"messages": [turn("user", "w7"), turn("assistant", "w8")]}])
    assert batch["num_video_frames"].tolist() == [3, 0] and len(batch["pixel_values"]) == 4
    kept = batch["labels"][0][batch["labels"][0] != -100]
    assert processor.tokenizer.decode(kept) == "w1 w2 </s>"


def test_videos_without_a_place_come_first():
    sample = {
        "messages": [turn("user", "w5"), turn("assistant", "w1")],
        "videos": [[picture(0)]],
        "images": [picture(1)],
    }
    batch = anyvlm.AnyVlmDataCollator(processor_with())([sample])
    assert sorted(batch["num_video_frames"].tolist()) == [0, 1]


@pytest.mark.parametrize("template", [None, PLAIN, "{{ bos_token }}" + PLAIN], ids=["default", "plain", "with bos"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_plain_text_is_supervised_whole(template, side):
    """Beside a conversation with a picture, or alone; what predicts nothing, or stands before the text, has no label."""
    processor = processor_with(template)
    conversation = {"messages": [turn("user", "<image> w5"), turn("assistant", "w1")], "images": [picture(0)]}
    # A table that mixes both kinds has all columns in each row.
    plain = {"text": "w8 w9 w10", "messages": None, "images": None}
    assert supervised(processor, [plain, conversation], padding_side=side) == [
        "w9 w10 </s>" if template != "{{ bos_token }}" + PLAIN else "w8 w9 w10 </s>",
        "w1 </s>",
    ]
    assert supervised(processor, [plain], padding_side=side) == ["w9 w10 </s>"]


def test_plain_text_has_the_loss_of_the_bare_language_model():
    model, processor = anyvlm.compose(
        vision=vision_config("clip_vision_model"), text=text_config("llama"), tokenizer=tiny_tokenizer()
    )
    texts = ["w8 w9 w10 w11", "w5 w6"]
    batch = anyvlm.AnyVlmDataCollator(processor)([{"text": text} for text in texts])
    rows = processor.tokenizer(
        [text + " </s>" for text in texts], padding=True, padding_side="right", return_tensors="pt"
    )
    labels = rows["input_ids"].masked_fill(rows["attention_mask"] == 0, -100)
    with torch.no_grad():
        expected = model.language_model(**rows, labels=labels).loss
        assert model(**batch).loss == pytest.approx(float(expected), abs=1e-6)


def test_a_sample_of_neither_kind_is_refused():
    collator = anyvlm.AnyVlmDataCollator(processor_with())
    with pytest.raises(ValueError, match="neither messages nor text, only caption"):
        collator([{"caption": "w1"}])
    with pytest.raises(ValueError, match="write `messages`"):
        collator([{"text": "w1 w2", "images": [picture(0)]}])
