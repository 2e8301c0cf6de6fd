"""Every form of data becomes the same samples: those of the collator on what was written, and of `datasets`' own loaders."""

import json

import datasets
import pytest
import torch
from model_tester import picture
from tiny_parts import text_config, tiny_tokenizer, vision_config

import anyvlm
from anyvlm.training.data import load_training_data, spec_errors


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory):
    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    datasets.disable_progress_bars()
    yield
    datasets.config.HF_DATASETS_CACHE = before


@pytest.fixture(scope="module")
def collator():
    return anyvlm.AnyVlmDataCollator(
        anyvlm.compose(
            vision=vision_config("clip_vision_model"), text=text_config("llama"), tokenizer=tiny_tokenizer()
        )[1]
    )


@pytest.fixture
def pictures(tmp_path):
    for index in range(4):
        picture(index).save(tmp_path / f"{index}.png")
    return tmp_path


def turn(role, content):
    return {"role": role, "content": content}


#: As people write them, pictures as names: one picture, none, two with words between, pictures in the blocks.
SAMPLES = [
    {"messages": [turn("user", "<image> w5 ?"), turn("assistant", "w1")], "images": ["0.png"], "id": 7},
    {"messages": [turn("user", "w6"), turn("assistant", "42")]},
    {
        "messages": [turn("system", "w9"), turn("user", "w5 <image> w7 <image>"), turn("assistant", "true")],
        "images": ["1.png", "2.png"],
    },
    {
        "messages": [
            turn("user", [{"type": "image", "image": "3.png"}, {"type": "text", "text": "w5"}]),
            turn("assistant", [{"type": "text", "text": "w2"}]),
        ],
    },
    {"messages": [turn("user", "w5 w6"), turn("assistant", "w1")], "images": ["2.png"]},
]


def write(path, rows, lines=True):
    path.write_text("\n".join(map(json.dumps, rows)) if lines else json.dumps(rows, indent=1))
    return str(path)


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


class TestBadRows:
    ROWS = [
        SAMPLES[0],
        {"messages": [turn("user", "<image> w5"), turn("assistant", "w1")]},
        {"messages": [turn("user", "w5"), turn("model", "w1")]},
        {"messages": [turn("user", "w5")]},
        {"messages": "w5"},
        SAMPLES[1],
    ]

    def test_all_are_counted_and_the_first_shown(self, pictures):
        path = write(pictures / "rows.jsonl", self.ROWS)
        with pytest.raises(ValueError) as error:
            load_training_data(path)
        text = str(error.value)
        assert "4 of 6 rows" in text
        assert "row 2: the messages place 1 pictures, but the row has 0" in text
        assert "row 3: a message has the role 'model'" in text and "row 4: there is no answer" in text

    def test_left_out_if_asked(self, pictures):
        path = write(pictures / "rows.jsonl", self.ROWS)
        for streaming in (False, True):
            rows = load_training_data({"path": path, "skip_bad_rows": True, "streaming": streaming})
            assert len(list(rows)) == 2

    def test_streamed_they_stop_the_run(self, pictures):
        path = write(pictures / "rows.jsonl", self.ROWS)
        with pytest.raises(Exception, match="row 2: the messages place 1 pictures"):
            load_training_data({"path": path, "streaming": True})

    def test_missing_pictures(self, pictures):
        rows = [{**SAMPLES[0], "images": [f"{index}.png"]} for index in (0, 1, 2, 3, 8, 9)]
        path = write(pictures / "rows.jsonl", rows)
        for streaming in (False, True):
            with pytest.raises(ValueError, match="2 of 6 pictures are missing(.|\n)*8.png(.|\n)*image_folder"):
                load_training_data({"path": path, "streaming": streaming})
        assert len(load_training_data({"path": path, "max_unreadable": 0.4})) == 6

    def test_not_json(self, pictures):
        (pictures / "rows.jsonl").write_text('{"messages": []}\n{"messages"')
        with pytest.raises(ValueError, match="Line 2 of .*rows.jsonl is not JSON"):
            load_training_data(str(pictures / "rows.jsonl"))
        (pictures / "rows.json").write_text('[{"messages": []}, {"messages"')
        with pytest.raises(ValueError, match="element 2 of its list"):
            load_training_data(str(pictures / "rows.json"))


class TestMixtures:
    @pytest.fixture
    def two(self, pictures):
        for name, word, number in (("a", "w1", 40), ("b", "w2", 10)):
            rows = [
                {"messages": [turn("user", "w5"), turn("assistant", f"{word} {i}")], name: i} for i in range(number)
            ]
            write(pictures / f"{name}.jsonl", rows)
        return str(pictures / "a.jsonl"), str(pictures / "b.jsonl")

    def test_one_after_the_other(self, two):
        data = load_training_data(list(two))
        assert data["source"][:] == ["a.jsonl"] * 40 + ["b.jsonl"] * 10
        assert data["a"][45] is None and data["b"][45] == 5

    def test_shares_as_interleave_datasets(self, two):
        mix = {"big": {"path": two[0], "share": 0.75}, "small": {"path": two[1], "share": 0.25}}
        data = load_training_data({"mix": mix}, seed=3)
        alone = [load_training_data(path) for path in two]
        oracle = datasets.interleave_datasets(
            alone, probabilities=[0.75, 0.25], seed=3, stopping_strategy="all_exhausted"
        )
        assert data["messages"][:] == oracle["messages"][:]
        weighted = load_training_data([{"path": two[0], "weight": 3}, {"path": two[1], "weight": 1}], seed=3)
        assert weighted["messages"][:] == oracle["messages"][:]
        assert abs(data["source"][:].count("small") / len(data) - 0.25) < 0.1

    def test_streamed(self, two):
        settings = {"stopping_strategy": "first_exhausted", "shuffle_buffer": 0}
        mix = {"mix": [{"path": two[0], "share": 0.5}, {"path": two[1], "share": 0.5}], **settings}
        read, streamed = (load_training_data({**mix, "streaming": on}) for on in (False, True))
        assert list(read) == list(streamed)

    def test_columns_of_different_types_are_text(self, pictures, two):
        path = write(pictures / "c.jsonl", [{**SAMPLES[1], "a": "word"}])
        data = load_training_data([two[0], path])
        assert data["a"][39:] == ["39", "word"]


def test_what_is_wrong_with_a_specification_is_said_at_once(pictures):
    path = write(pictures / "rows.jsonl", SAMPLES)
    spec = {
        "mix": [
            {"path": path, "formt": "llava", "share": "0.5"},
            {"path": "./gone.jsonl", "format": "pictures", "share": 0.5},
        ],
        "stopping_strategy": "never",
    }
    errors = {".".join(map(str, keys)): text for keys, text in spec_errors(spec)}
    assert set(errors) == {
        "mix.0.formt",
        "mix.0.share",
        "mix.1.path",
        "mix.1.format",
        "stopping_strategy",
    }
    with pytest.raises(ValueError) as error:
        load_training_data(spec)
    assert all(text in str(error.value) for text in errors.values())
    assert not spec_errors(path) and not spec_errors("owner/data")
    assert spec_errors([{"path": path, "share": 0.5}, {"path": path, "share": 0.6}])
    assert spec_errors(3) and spec_errors({}) and spec_errors([])
