"""Sources of pictures."""

import logging

import numpy as np
import pytest
from PIL import Image

from anyvlm.swapping.pictures import Pictures, variants


def _picture(value: int, size=(12, 8)) -> Image.Image:
    return Image.new("RGB", size, (value, value, value))


def _values(pictures: Pictures) -> list[int]:
    return [picture.getpixel((0, 0))[0] for _, picture in pictures]


class Rows:
    """A dataset without a length."""

    def __init__(self, number: int):
        self.number = number

    def __iter__(self):
        return ({"image": _picture(value), "label": 3} for value in range(self.number))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "b" / "deep").mkdir(parents=True)
    _picture(2).save(tmp_path / "b" / "deep" / "x.png")
    _picture(1).save(tmp_path / "a.PNG")
    _picture(9).save(tmp_path / ".hidden.png")
    (tmp_path / "notes.txt").write_text("no picture")
    return tmp_path


def test_folder(folder):
    pictures = Pictures(folder)
    assert pictures.num_pictures == 2
    assert _values(pictures) == _values(Pictures(str(folder))) == [1, 2]
    assert _values(pictures) == [1, 2]  # again


def test_lists_rows_and_indexable_sources(folder):
    mixed = [str(folder / "a.PNG"), _picture(7), folder / "b" / "deep" / "x.png", np.full((4, 4), 5, np.uint8)]
    assert _values(Pictures(mixed)) == [1, 7, 2, 5]
    assert Pictures(Rows(3)).num_pictures is None
    assert _values(Pictures(Rows(3))) == [0, 1, 2]
    assert _values(Pictures([{"image": {"bytes": (folder / "a.PNG").read_bytes(), "path": None}}])) == [1]

    class Indexed:
        def __len__(self):
            return 3

        def __getitem__(self, index):
            return {"image": _picture(10 * index)}

    assert _values(Pictures(Indexed())) == [0, 10, 20]
    assert len(_values(Pictures(Indexed(), limit=2))) == 2


def test_dataset_of_the_datasets_library():
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_dict(
        {"image": [_picture(3), _picture(4)]}, features=datasets.Features({"image": datasets.Image()})
    )
    pictures = Pictures(dataset)
    assert pictures.num_pictures == 2
    assert _values(pictures) == _values(pictures) == [3, 4]


def test_sample():
    source = [_picture(value) for value in range(50)]
    sample = _values(Pictures(source, limit=10, seed=1))
    assert sample == _values(Pictures(source, limit=10, seed=1)) == sorted(set(sample))
    assert len(sample) == 10
    assert sample != _values(Pictures(source, limit=10, seed=2))
    assert Pictures(source, limit=10).num_pictures == 10
    assert _values(Pictures(Rows(50), limit=3)) == [0, 1, 2]


def test_batches_are_lazy():
    opened = []

    class Source:
        def __iter__(self):
            for value in range(7):
                opened.append(value)
                yield _picture(value)

    batches = Pictures(Source()).batches(3)
    assert [index for index, _ in next(batches)] == [0, 1, 2]
    assert opened == [0, 1, 2]
    assert [len(batch) for batch in batches] == [3, 1]


def test_unreadable_pictures(tmp_path, caplog):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not a picture")
    good = [_picture(value) for value in range(19)]
    pictures = Pictures([*good[:5], broken, *good[5:]])
    with caplog.at_level(logging.WARNING):
        numbers = [index for index, _ in pictures]
    assert numbers == [0, 1, 2, 3, 4, *range(6, 20)]  # a number stays that of its place in the source
    assert pictures.unreadable == 1
    assert "1 of 20 pictures" in caplog.text and "broken.png" in caplog.text
    with pytest.raises(ValueError, match="2 of the first 4 pictures cannot be read.*nothing.png"):
        list(Pictures([good[0], "nothing.png", good[1], broken, *good[:12]]))

    class Source:
        def __iter__(self):
            return iter([None, broken])

    with pytest.raises(ValueError, match="2 of the first 2"):
        list(Pictures(Source()))


def test_bad_sources(tmp_path):
    with pytest.raises(TypeError, match="only once"):
        Pictures(iter([_picture(1)]))
    with pytest.raises(TypeError, match="no source"):
        Pictures(_picture(1))
    with pytest.raises(TypeError, match="no source"):
        Pictures(3)
    with pytest.raises(FileNotFoundError, match="no folder"):
        Pictures(tmp_path / "none")
    with pytest.raises(ValueError, match="no pictures"):
        Pictures(tmp_path)
    with pytest.raises(ValueError, match="empty"):
        Pictures([])
    with pytest.raises(ValueError, match="empty"):
        list(Pictures(Rows(0)))
    with pytest.raises(KeyError, match="Rename the column"):
        list(Pictures([{"picture": _picture(1)}]))
    with pytest.raises(ValueError, match="limit"):
        Pictures([_picture(1)], limit=0)


def test_variants():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    made = list(variants(picture, 8, seed=3))
    assert len(made) == 8 and made[0] is picture
    again = list(variants(picture, 8, seed=3))
    assert all(np.array_equal(a, b) for a, b in zip(made, again))
    assert any(not np.array_equal(a, b) for a, b in zip(made, variants(picture, 8, seed=4)))
    assert len({part.tobytes() for part in made}) == 8
    assert len({part.size for part in made}) <= 3
    plain, flipped = made[1], list(variants(picture, 2, seed=3, flips=True))[1]
    assert np.array_equal(np.asarray(flipped), np.asarray(plain)[:, ::-1])
    pairs = list(Pictures([picture, picture], num_variants=3))
    assert [index for index, _ in pairs] == [0, 0, 0, 1, 1, 1]
    assert not np.array_equal(pairs[1][1], pairs[4][1])
