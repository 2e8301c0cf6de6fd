"""Rows that cannot be used, mixtures of sources, and what is wrong with how they are described."""

import datasets
import pytest
from data_samples import SAMPLES, turn, write

from anyvlm.training.data import load_training_data, spec_errors


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
