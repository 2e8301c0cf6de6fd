"""Every form of data becomes the same samples: those of the collator on what was written, and of `datasets`' own loaders."""

import json

import datasets
import pytest
import torch
from data_samples import SAMPLES, turn, write
from model_tester import picture

import anyvlm
from anyvlm.training.data import load_training_data


def opened(sample, folder):
    """What a user without any loader passes to the collator."""
    messages = json.loads(json.dumps(sample["messages"]))
    for message in messages:
        for block in message["content"] if isinstance(message["content"], list) else []:
            if "image" in block:
                block["image"] = folder / block["image"]
    return {"messages": messages, "images": [folder / name for name in sample.get("images", [])]}


def same(first, second):
    assert first.keys() == second.keys()
    for key in first:
        assert torch.equal(first[key], second[key]), key


@pytest.mark.parametrize("streaming", [False, True], ids=["read", "streamed"])
@pytest.mark.parametrize("lines", [True, False], ids=["lines", "list"])
def test_conversations_give_the_batch_of_what_was_written(pictures, collator, lines, streaming):
    path = write(pictures / "rows.json", SAMPLES, lines)
    data = load_training_data({"path": path, "streaming": streaming, "shuffle_buffer": 0})
    assert isinstance(data, datasets.IterableDataset if streaming else datasets.Dataset)
    rows = list(data)
    assert [row["id"] for row in rows] == [7, None, None, None, None]
    assert rows[1]["messages"][1]["content"] == [{"type": "text", "text": "42"}]
    assert rows[2]["messages"][2]["content"] == [{"type": "text", "text": "true"}]
    for row, sample in zip(rows, SAMPLES):
        same(collator([row]), collator([opened(sample, pictures)]))


LLAVA = [
    {
        "id": "000",
        "image": "0.png",
        "conversations": [{"from": "human", "value": "<image>\nw5"}, {"from": "gpt", "value": "w1"}],
    },
    {
        "id": 5,
        "image": ["1.png", "2.png"],
        "conversations": [{"from": "human", "value": "<image><image>\nw6"}, {"from": "gpt", "value": "3"}],
    },
    {"id": "text", "conversations": [{"from": "human", "value": "w7"}, {"from": "gpt", "value": "w8"}], "model": ""},
]


def test_llava(pictures, collator, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("json")
    path = write(elsewhere / "llava.json", LLAVA, lines=False)
    rows = load_training_data({"path": path, "format": "llava", "image_folder": str(pictures)})
    roles = {"human": "user", "gpt": "assistant"}
    for row, sample in zip(rows, LLAVA):
        images = sample.get("image", [])
        written = {
            "messages": [turn(roles[entry["from"]], entry["value"]) for entry in sample["conversations"]],
            "images": [images] if isinstance(images, str) else images,
        }
        same(collator([row]), collator([opened(written, pictures)]))
    assert rows["id"][:] == ["000", "5", "text"]


@pytest.mark.parametrize("streaming", [False, True], ids=["read", "streamed"])
def test_plain_texts(tmp_path, collator, streaming):
    """As the collator takes them: without messages, supervised whole; also beside conversations."""
    (tmp_path / "texts.txt").write_text("w1 w2\n\nw3 w4 w5\n")
    talk = write(tmp_path / "talk.jsonl", SAMPLES[1:2])
    mix = [{"path": str(tmp_path / "texts.txt")}, {"path": talk}]
    rows = list(load_training_data({"mix": mix, "streaming": streaming, "shuffle_buffer": 0}))
    written = [{"text": "w1 w2"}, {"text": "w3 w4 w5"}, SAMPLES[1]]
    assert [row["source"] for row in rows] == ["texts.txt", "texts.txt", "talk.jsonl"]
    same(collator(rows), collator(written))


def test_splits_of_a_folder(tmp_path):
    for split, number in (("train", 3), ("test", 2)):
        write(tmp_path / f"{split}.jsonl", [SAMPLES[1]] * number)
    assert len(load_training_data(str(tmp_path))) == 3
    assert len(load_training_data(str(tmp_path), split="test")) == 2
    with pytest.raises(ValueError, match="no split 'validation'; it has train, test"):
        load_training_data({"path": str(tmp_path), "split": "validation"})


def test_a_changed_file_is_read_again(pictures):
    path = write(pictures / "rows.jsonl", SAMPLES)
    assert len(load_training_data(path)) == 5
    write(pictures / "rows.jsonl", SAMPLES[:2])
    assert len(load_training_data(path)) == 2


def test_other_columns_and_names_of_columns(pictures):
    rows = [
        {"dialogue": SAMPLES[0]["messages"], "picture": "0.png", "domain": "a", "box": [0.5, 1.0]},
        {"dialogue": SAMPLES[0]["messages"], "picture": "1.png", "domain": "b", "box": [0.0, 2.0]},
    ]
    path = write(pictures / "rows.jsonl", rows)
    data = load_training_data({"path": path, "messages": "dialogue", "images": "picture"})
    assert data.column_names == ["messages", "images", "domain", "box"]
    assert data["box"][:] == [[0.5, 1.0], [0.0, 2.0]]
    with pytest.raises(ValueError, match="dialogue, picture, domain, box.*Say which column"):
        load_training_data(path)


@pytest.mark.parametrize("form", ["parquet", "csv", "disk"])
def test_tables_equal_json(pictures, form):
    rows = [
        {"image": str(pictures / f"{index}.png"), "question": f"w{index}", "answer": str(index)} for index in range(4)
    ]
    expected = load_training_data(write(pictures / "rows.jsonl", rows))
    table = datasets.Dataset.from_list(rows)
    path = str(pictures / f"table.{form}")
    if form == "disk":
        table.cast_column("image", datasets.Image()).save_to_disk(path)
    else:
        getattr(table, f"to_{form}")(path)
    found, streamed = (
        load_training_data({"path": path, "streaming": on, "shuffle_buffer": 0}) for on in (False, True)
    )
    columns = ["messages", "images", "question"]
    for row, other, wanted in zip(found, streamed, expected, strict=True):
        assert row["messages"] == other["messages"] == wanted["messages"]
        assert row == other
        if form != "disk":
            assert [row[name] for name in columns] == [wanted[name] for name in columns]
        assert anyvlm.processing.pictures.to_rgb_picture(row["images"][0]).size == picture(0).size


@pytest.mark.parametrize("streaming", [False, True], ids=["read", "streamed"])
def test_as_on_the_hub(pictures, collator, streaming):
    """Blocks with the keys of all, as Arrow has them, and the pictures' bytes in the table; TRL takes the rows too."""
    rows = []
    for index in range(2):
        image = {"type": "image", "text": None, "index": 0}
        text = {"type": "text", "text": f"w{index}", "index": None}
        messages = [turn("user", [image, text, image]), turn("assistant", [text])]
        rows.append({"messages": messages, "images": [picture(index), picture(index + 1)]})
    features = datasets.Features(
        {
            "messages": datasets.List(
                {
                    "role": datasets.Value("string"),
                    "content": datasets.List(
                        {
                            "type": datasets.Value("string"),
                            "text": datasets.Value("string"),
                            "index": datasets.Value("int64"),
                        }
                    ),
                }
            ),
            "images": datasets.List(datasets.Image()),
        }
    )
    datasets.Dataset.from_list(rows, features=features).to_parquet(str(pictures / "hub.parquet"))
    data = load_training_data({"path": str(pictures / "hub.parquet"), "streaming": streaming, "shuffle_buffer": 0})
    for row, written in zip(data, rows, strict=True):
        assert all(isinstance(image["bytes"], bytes) for image in row["images"])
        same(collator([row]), collator([written]))
    trl = pytest.importorskip("trl.data_utils", reason="trl is for tests only")
    opened = data.cast_column("images", datasets.List(datasets.Image()))
    for row, written in zip(opened, rows, strict=True):
        prepared = trl.prepare_multimodal_messages(row["messages"], row["images"])
        placed = [block["image"] for block in prepared[0]["content"] if block["type"] == "image"]
        assert [list(image.getdata()) for image in placed] == [list(image.getdata()) for image in written["images"]]


class TestFoldersOfPictures:
    def test_classes_as_imagefolder(self, tmp_path):
        for index, name in enumerate(["grey_cat", "dog", "dog", "grey_cat"]):
            (tmp_path / name).mkdir(exist_ok=True)
            picture(index).save(tmp_path / name / f"{index}.png")
        oracle = datasets.load_dataset("imagefolder", data_dir=str(tmp_path), split="train")
        names = oracle.features["label"].names
        for streaming in (False, True):
            settings = {"path": str(tmp_path), "streaming": streaming, "shuffle_buffer": 0}
            rows = list(load_training_data({**settings, "questions": ["w5 ?"], "classes": {"dog": "w3"}}))
            assert [row["label"] for row in rows] == oracle["label"][:]
            for row, wanted in zip(rows, oracle, strict=True):
                answer = {"dog": "w3", "grey_cat": "grey cat"}[names[wanted["label"]]]
                assert row["messages"] == [
                    turn("user", [{"type": "image", "text": None}, {"type": "text", "text": "w5 ?"}]),
                    turn("assistant", [{"type": "text", "text": answer}]),
                ]
                assert row["images"][0]["path"] == wanted["image"].filename

    @pytest.mark.parametrize("form", ["jsonl", "csv"])
    def test_metadata_as_imagefolder(self, pictures, form):
        table = datasets.Dataset.from_dict(
            {"file_name": ["1.png", "3.png"], "text": ["w1 w2", "w3"], "domain": ["a", "b"]}
        )
        getattr(table, "to_json" if form == "jsonl" else "to_csv")(str(pictures / f"metadata.{form}"))
        oracle = datasets.load_dataset("imagefolder", data_dir=str(pictures), split="train")
        rows = load_training_data(str(pictures))
        assert [row["images"][0]["path"] for row in rows] == [row["image"].filename for row in oracle]
        assert [row["messages"][1]["content"][0]["text"] for row in rows] == oracle["text"][:]
        assert rows["domain"][:] == oracle["domain"][:]

    def test_captions_beside_them(self, pictures):
        for index in range(3):
            (pictures / f"{index}.txt").write_text(f" w{index}\n")
        with pytest.raises(ValueError, match="1 of 4 pictures have no caption.*3.png"):
            load_training_data(str(pictures))
        settings = {"path": str(pictures), "skip_bad_rows": True}
        rows = load_training_data(settings)
        assert rows["caption"][:] == ["w0", "w1", "w2"]
        assert [row["messages"][1]["content"][0]["text"] for row in rows] == ["w0", "w1", "w2"]
        streamed = load_training_data({**settings, "streaming": True, "shuffle_buffer": 0})
        assert list(streamed) == list(rows)
        others = load_training_data(settings, seed=1)
        asked = [[row["messages"][0]["content"][1]["text"] for row in data] for data in (rows, others)]
        assert asked[0] != asked[1]

    def test_nothing_says_what_they_show(self, pictures):
        with pytest.raises(ValueError, match="4 pictures, but nothing says what is in them"):
            load_training_data(str(pictures))
