"""The length of a sample is that of its row in the collator's batch."""

import io

import datasets
import pytest
import torch
from model_tester import picture
from PIL import Image
from tiny_parts import text_config, tiny_tokenizer, vision_config
from transformers import Qwen2VLImageProcessorPil, Trainer, TrainingArguments

import anyvlm
from anyvlm.compatibility import tiny_configs
from anyvlm.training.data import add_lengths, open_pictures, sample_length


def samples():
    tag, buffer = Image.Exif(), io.BytesIO()
    tag[0x0112] = 6
    picture(1, (90, 40)).save(buffer, "PNG", exif=tag)
    sizes = [(32, 32), (70, 90), (200, 64), (33, 120)]
    rows = [
        {"messages": [{"role": "user", "content": "w5 " * (index + 1)}, {"role": "assistant", "content": "w1"}]}
        for index in range(5)
    ]
    for index, size in enumerate(sizes):
        rows[index]["images"] = [picture(index, size)] * (1 + index % 2)
    rows[4]["images"] = [{"bytes": buffer.getvalue(), "path": None}]
    return [*rows, {"text": "w1 w2 w3"}]


@pytest.mark.parametrize("kind", ["one size", "own size", "tiles", "cross attention"])
def test_equals_the_collators(kind):
    settings = {"vision": vision_config("clip_vision_model")}
    if kind == "own size":
        processor = Qwen2VLImageProcessorPil(patch_size=8, min_pixels=16 * 16, max_pixels=64 * 64)
        settings = {"vision": tiny_configs.vision_config("qwen2_5_vl_vision"), "image_processor": processor}
    elif kind == "tiles":
        settings["views"] = {"type": "tiles", "layout": "dynamic", "max_tiles": 4}
    elif kind == "cross attention":
        settings["fusion"] = "cross_attention"
    _, processor = anyvlm.compose(text=text_config("llama"), tokenizer=tiny_tokenizer(), **settings)
    collator = anyvlm.AnyVlmDataCollator(processor)
    for sample in samples():
        assert sample_length(sample, processor) == int(collator([sample])["attention_mask"].sum())


def test_batches_of_equal_lengths(tmp_path):
    """`Trainer` groups by the column, also behind pictures that are opened while training."""
    model, processor = anyvlm.compose(
        vision=vision_config("clip_vision_model"), text=text_config("llama"), tokenizer=tiny_tokenizer()
    )
    turns = [{"role": "user", "content": "w5"}, {"role": "assistant", "content": "w1"}]
    rows = [{"messages": [{**turns[0], "content": "w5 " * (1 + 7 * index % 40)}, turns[1]]} for index in range(320)]
    data = add_lengths(datasets.Dataset.from_list(rows), processor)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        train_sampling_strategy="group_by_length",
        remove_unused_columns=False,
        use_cpu=True,
        report_to=[],
    )

    def batches(trainer_class, dataset):
        trainer = trainer_class(
            model=model,
            args=arguments,
            train_dataset=dataset,
            data_collator=anyvlm.AnyVlmDataCollator(processor),
            processing_class=processor,
        )
        torch.manual_seed(0)
        order = list(trainer._get_train_sampler())
        return [order[start : start + 4] for start in range(0, len(order), 4)]

    plain, own = batches(Trainer, data), batches(anyvlm.AnyVlmTrainer, open_pictures(data))
    assert plain == own
    lengths = data["length"][:]
    assert sum(max(lengths[i] for i in batch) - min(lengths[i] for i in batch) for batch in own) / len(own) < 4
