"""Pictures are opened while training: what cannot be read is skipped and counted, and a resumed run sees the same."""

import io
import json
import socket
import struct

import numpy as np
import pytest
import torch
from model_tester import picture
from PIL import Image
from tiny_parts import text_config, tiny_tokenizer, vision_config
from transformers import Trainer, TrainingArguments

import anyvlm
from anyvlm.training.data import (
    Augmentation,
    TooManyUnreadablePictures,
    UnreadablePicture,
    load_training_data,
    open_pictures,
    read_picture,
    readable,
)
from anyvlm.training.data.samples import opened_in
from anyvlm.training.domains import MixedDomains
from anyvlm.training.feature_cache import refuse_augmented
from anyvlm.training.text_replay import mix_text_replay


NUM_SAMPLES = 24


@pytest.fixture
def rows(tmp_path):
    """Twenty-four samples in a file; the pictures of 3 and 7 are no pictures, that of 11 is not there."""
    return write_rows(tmp_path, broken=(3, 7), missing=(11,))


def write_rows(folder, broken=(), missing=(), number=NUM_SAMPLES):
    lines = []
    for index in range(number):
        if index in broken:
            (folder / f"{index}.png").write_bytes(b"no picture")
        elif index not in missing:
            picture(index).save(folder / f"{index}.png")
        messages = [{"role": "user", "content": "<image> w5 ?"}, {"role": "assistant", "content": f"w{index % 3}"}]
        lines.append(json.dumps({"messages": messages, "images": [f"{index}.png"], "index": index}))
    (folder / "rows.jsonl").write_text("\n".join(lines))
    return {"path": str(folder / "rows.jsonl"), "max_unreadable": 0.5}


def png(image, **kwargs):
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **kwargs)
    return buffer.getvalue()


class TestReadPicture:
    def test_orientation_of_a_camera(self):
        tag = Image.Exif()
        tag[0x0112] = 6  # to be turned clockwise
        original, buffer = picture(0, (40, 20)), io.BytesIO()
        original.save(buffer, "PNG", exif=tag)
        turned = read_picture(buffer.getvalue())
        assert np.array_equal(np.asarray(turned), np.rot90(np.asarray(original), -1))

    @pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK", "RGBA", "LA", "RGB"])
    def test_modes(self, mode):
        original = picture(0).convert("RGB")
        converted = original.convert("L").convert("LA") if mode == "LA" else original.convert(mode)
        read = read_picture(converted)
        assert read.mode == "RGB" and read.size == original.size
        assert np.array_equal(np.asarray(read), np.asarray(converted.convert("RGB")))

    def test_transparent_is_white(self):
        clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
        assert np.asarray(read_picture(png(clear))).min() == 255

    def test_more_bits_need_a_range(self):
        deep = png(Image.fromarray(np.array([[0, 1000], [2000, 65535]], dtype=np.uint16)))
        with pytest.raises(UnreadablePicture, match="more than 8 bits"):
            read_picture(deep)
        assert np.asarray(read_picture(deep, (0, 2000)))[..., 0].tolist() == [[0, 128], [255, 255]]
        same = png(picture(0))
        assert np.array_equal(np.asarray(read_picture(same, (0, 2000))), np.asarray(picture(0)))

    def test_what_cannot_be_read(self, tmp_path, monkeypatch):
        whole = png(picture(0, (64, 64)))
        (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
        (tmp_path / "text.jpg").write_text("no picture")
        header = struct.pack(">II5B", 60_000, 60_000, 8, 2, 0, 0, 0)
        at = whole.index(b"IHDR") + 4
        (tmp_path / "bomb.png").write_bytes(whole[:at] + header + whole[at + 13 :])
        for name in ("cut.png", "text.jpg", "bomb.png", "gone.png"):
            with pytest.raises(UnreadablePicture, match=name):
                read_picture({"bytes": None, "path": str(tmp_path / name)})
        for broken in (b"", {"bytes": b"123", "path": "in/a/table.png"}, "http://localhost:9/x.png"):
            with pytest.raises(UnreadablePicture):
                read_picture(broken)

    def test_a_server_that_does_not_answer(self, monkeypatch):
        monkeypatch.setattr(readable, "_URL_TIMEOUT", 0.2)
        with socket.create_server(("localhost", 0)) as server:
            address = f"http://localhost:{server.getsockname()[1]}/x.png"
            with pytest.raises(UnreadablePicture, match="Timeout"):
                read_picture(address)


class TestSkipping:
    def test_another_sample_takes_the_place(self, rows, tmp_path):
        data = open_pictures(
            load_training_data(rows), max_unreadable=0.5, report=tmp_path / "out" / "unreadable_pictures.jsonl"
        )
        taken = [data[index]["index"] for index in range(NUM_SAMPLES)]
        assert [index for index in range(NUM_SAMPLES) if taken[index] != index] == [3, 7, 11]
        again = open_pictures(load_training_data(rows), max_unreadable=0.5)
        assert [again[index]["index"] for index in range(NUM_SAMPLES)] == taken
        again.set_epoch(1)
        assert [again[index]["index"] for index in (3, 7, 11)] != [taken[index] for index in (3, 7, 11)]
        lines = [json.loads(line) for line in (tmp_path / "out" / "unreadable_pictures.jsonl").open()]
        assert sorted(line["picture"] for line in lines) == [str(tmp_path / f"{index}.png") for index in (11, 3, 7)]
        assert "there is no such file" in next(line["reason"] for line in lines if "11.png" in line["picture"])

    def test_stream_goes_on_with_the_next(self, rows):
        stream = load_training_data({**rows, "streaming": True, "shuffle_buffer": 0})
        data = open_pictures(stream, max_unreadable=0.5, repeat=False)
        assert [sample["index"] for sample in data] == [
            index for index in range(NUM_SAMPLES) if index not in (3, 7, 11)
        ]
        assert data.log.num_read == NUM_SAMPLES and data.log.num_unreadable == 3

    def test_workers_without_a_part_of_the_stream(self, rows):
        data = open_pictures(load_training_data({**rows, "streaming": True}), max_unreadable=0.5)
        batches = iter(torch.utils.data.DataLoader(data, 4, num_workers=2, collate_fn=list))
        found = [sample["index"] for _ in range(12) for sample in next(batches)]
        assert len(found) == 48 and len(set(found)) == NUM_SAMPLES - 3

    def test_stream_begins_again_in_another_order(self, rows):
        data = iter(open_pictures(load_training_data({**rows, "streaming": True}), max_unreadable=0.5))
        first, second = ([next(data)["index"] for _ in range(NUM_SAMPLES - 3)] for _ in range(2))
        assert sorted(first) == sorted(second) and first != second

    @pytest.mark.parametrize("workers", [0, 2])
    def test_workers_count_together(self, rows, workers):
        data = open_pictures(load_training_data(rows), max_unreadable=0.5)
        batches = list(torch.utils.data.DataLoader(data, 4, num_workers=workers, collate_fn=list))
        assert [len(batch) for batch in batches] == [4] * 6
        assert data.log.num_unreadable >= 3
        assert data.log.num_read == NUM_SAMPLES + data.log.num_unreadable
        assert len(data.log.summary()["pictures"]) == 3

    def test_too_many_stop_the_run(self, rows):
        data = open_pictures(load_training_data(rows), max_unreadable=0.05, judge_after=12)
        batches = iter(torch.utils.data.DataLoader(data, 4, num_workers=1, collate_fn=list))
        with pytest.raises(TooManyUnreadablePictures, match="allowed are 5.0%(.|\n)*unreadable_pictures.jsonl"):
            list(batches)

    def test_few_are_not_judged_yet(self, tmp_path):
        data = open_pictures(load_training_data(write_rows(tmp_path, broken=(0,))), max_unreadable=0.05)
        assert data[0]["index"] != 0
        assert [data[index]["index"] for index in range(1, NUM_SAMPLES)] == list(range(1, NUM_SAMPLES))

    def test_nothing_can_be_read(self, tmp_path):
        rows = {**write_rows(tmp_path, broken=range(4), number=4), "max_unreadable": 1.0}
        with pytest.raises(UnreadablePicture, match="none of 100 others"):
            open_pictures(load_training_data(rows), max_unreadable=1.0)[0]
        with pytest.raises(ValueError, match="no sample that can be used"):
            next(iter(open_pictures(load_training_data({**rows, "streaming": True}), max_unreadable=1.0)))


def test_found_in_what_is_put_around_it(rows):
    data = open_pictures(load_training_data(rows), max_unreadable=0.5, augmentation=Augmentation())
    around = torch.utils.data.ConcatDataset([torch.utils.data.Subset(data, range(3)), MixedDomains(data, {"b": data})])
    assert [one is data for one in opened_in(around)] == [True] * 3
    for dataset in (mix_text_replay(data, ["w1"]), around):
        with pytest.raises(ValueError, match="augments its pictures"):
            refuse_augmented(dataset)
    assert opened_in(load_training_data(rows)) == [] and opened_in([{"messages": []}]) == []


def new_trainer(folder, data, max_steps, trainer_class=Trainer, save_strategy="no", **options):
    model, processor = anyvlm.compose(
        vision=vision_config("clip_vision_model"), text=text_config("llama"), tokenizer=tiny_tokenizer()
    )
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=max_steps,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy=save_strategy,
        report_to=[],
        remove_unused_columns=False,
        disable_tqdm=True,
        use_cpu=True,
        **options,
    )
    return trainer_class(
        model=model,
        args=arguments,
        train_dataset=data,
        data_collator=anyvlm.AnyVlmDataCollator(processor),
        processing_class=processor,
        callbacks=data.callbacks() if trainer_class is Trainer else None,
    )


def losses(trainer):
    return np.array([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


@pytest.mark.parametrize("workers, trainer_class", [(0, Trainer), (2, anyvlm.AnyVlmTrainer)], ids=["plain", "own"])
def test_resumed_within_an_epoch_equals_uninterrupted(rows, tmp_path, workers, trainer_class):
    """Six batches an epoch; the run is resumed in the middle of the second, where accelerate does not say which it is."""

    def data():
        return open_pictures(load_training_data(rows), max_unreadable=0.5, augmentation=Augmentation(), seed=1)

    options = {"dataloader_num_workers": workers, "trainer_class": trainer_class}
    whole = new_trainer(tmp_path / "whole", data(), 11, **options)
    with pytest.warns(UserWarning, match="pictures .* could not be read"):
        whole.train()
    new_trainer(tmp_path / "parts", data(), 8, save_strategy="steps", save_steps=8, **options).train()
    second = new_trainer(tmp_path / "parts", data(), 11, **options)
    second.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-8"))
    assert len(losses(whole)) == 11
    assert np.array_equal(losses(second), losses(whole))
    assert any(entry.get("unreadable_pictures", 0) >= 3 for entry in whole.state.log_history)


def test_workers_change_nothing(rows, tmp_path):
    found = []
    for workers, persistent in ((0, False), (2, False), (2, True)):
        data = open_pictures(load_training_data(rows), max_unreadable=0.5, augmentation=Augmentation())
        options = {"dataloader_num_workers": workers, "dataloader_persistent_workers": persistent}
        trainer = new_trainer(tmp_path, data, 8, **options)
        trainer.train()
        found.append(losses(trainer))
    assert np.array_equal(found[0], found[1]) and np.array_equal(found[0], found[2])


def test_stream_resumed_after_it_began_again(rows, tmp_path):
    def data():
        stream = load_training_data({**rows, "streaming": True})
        return open_pictures(stream, max_unreadable=0.5, augmentation=Augmentation())

    whole = new_trainer(tmp_path / "whole", data(), 9)
    whole.train()
    new_trainer(tmp_path / "parts", data(), 7, save_strategy="steps", save_steps=7).train()
    second = new_trainer(tmp_path / "parts", data(), 9)
    second.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-7"))
    assert np.array_equal(losses(second), losses(whole))
