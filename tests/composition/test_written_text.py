"""compose(image_text=…): what is written around pictures is what the tokenizer knows, or is refused."""

import pytest
from model_tester import picture
from tiny_parts import compose

import anyvlm
from anyvlm.compatibility.native_cases import case_tokenizer


DYNAMIC = {"type": "tiles", "layout": "dynamic", "max_tiles": 4}


def _ids(processor, text: str, size: tuple[int, int]) -> list[str]:
    inputs = processor(text=[text], images=[picture(0, size)], add_special_tokens=False)
    return processor.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])


def test_text_stands_around_views_and_only_the_repeated_token_is_new():
    tokenizer = case_tokenizer("<img>", "</img>", "<tile>")
    before = len(tokenizer)
    image_text = {"token": "<patch>", "start": "<img>", "end": "</img>", "tile": "<tile>w{index}{tokens}"}
    model, processor = compose(
        projector={"type": "avg_pool", "tokens_per_side": 1}, views=DYNAMIC, image_text=image_text, tokenizer=tokenizer
    )
    assert len(processor.tokenizer) == before + 1 == model.get_input_embeddings().weight.shape[0]
    assert model.config.image_token_id == processor.tokenizer.convert_tokens_to_ids("<patch>")
    found = _ids(processor, "w5 <image> w6", (32, 64))
    tiles = ["<tile>", "w1", "<patch>", "<tile>", "w2", "<patch>"]
    assert found == ["w5", "<img>", *tiles, "<patch>", "</img>", "w6"]


@pytest.mark.parametrize(
    ("image_text", "settings", "words"),
    [
        ({"begin": "w1"}, {}, "Unknown keys in image_text: begin"),
        ({"start": None}, {}, "must be a text, not None"),
        ({"tile": "w1"}, {}, "must have {tokens}"),
        ({"start": "<img>"}, {}, r"writes '<img>', which .* does not know.*add_special_tokens"),
        ({"tile": "w{index}{tokens}"}, {"views": {**DYNAMIC, "max_tiles": 90}}, "writes 'w80', which"),
        ({"start": "<image>"}, {}, "stands for the tokens of a picture"),
        ({"row_end": "w1"}, {"views": "tiles"}, "joins into one map"),
        ({"row_end": "w1"}, {"views": DYNAMIC, "fusion": "gated"}, "one token in the text"),
    ],
)
def test_what_cannot_be_written_is_refused(image_text, settings, words):
    with pytest.raises(anyvlm.CompositionError, match=words):
        compose(image_text=image_text, **settings)
