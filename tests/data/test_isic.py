"""The loader of skin lesions, on tiny folders in the layouts that one downloads."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedsim.config import DataConfig, Named
from fedsim.core.errors import DataError
from fedsim.data import RawData, load
from fedsim.data.arguments import call

SEVEN = ["akiec", "bcc", "bkl", "df", "mel", "nv", "vasc"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path / "cache"))


def picture(file: Path, colour: tuple[int, int, int], shape: tuple[int, int] = (12, 9)) -> None:
    """One colour in the middle square, black stripes beside it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    width, height = shape
    image = Image.new("RGB", shape)
    side = min(shape)
    box = ((width - side) // 2, (height - side) // 2)
    image.paste(colour, (*box, box[0] + side, box[1] + side))
    image.save(file, quality=95)


def ham(folder: Path, count: int = 28) -> Path:
    """HAM10000: images in two parts, metadata; every second image shows the lesion before it."""
    lines = ["lesion_id,image_id,dx,dx_type,age,sex,localization,dataset"]
    for i in range(count):
        name = f"ISIC_{i:07d}"
        picture(folder / f"HAM10000_images_part_{1 + i % 2}" / f"{name}.jpg", (30 * (i % 7), 90, 0))
        site = "rosendahl" if i % 3 else "vidir_modern"
        lines.append(f"HAM_{i // 2},{name},{SEVEN[i % 7]},histo,50,male,back,{site}")
    (folder / "HAM10000_metadata.csv").write_text("\n".join(lines) + "\n")
    (folder / "hmnist_8_8_L.csv").write_text("pixel0000,label\n3,1\n")  # lies beside it, too
    return folder


def challenge(folder: Path, unused: bool = True) -> Path:
    """A challenge: one folder of images, ground truth with a column per class."""
    heads = ["MEL", "NV", "BCC", "AKIEC", "BKL", "DF", "VASC"] + ["UNK"] * unused
    lines = ["image," + ",".join(heads)]
    for i, name in enumerate(SEVEN * 2):
        file = f"ISIC_{i:07d}"
        picture(folder / "Training_Input" / f"{file}.png", (0, 0, 30 * (i % 7)), (8, 10))
        lines.append(file + "," + ",".join("1.0" if h.lower() == name else "0.0" for h in heads))
    (folder / "GroundTruth.csv").write_text("\n".join(lines) + "\n")
    return folder


def read(path: Path, **params: object) -> RawData:
    return call("datasets", "isic", "data.dataset", {"path": str(path), **params}).check()


def test_ham10000(tmp_path: Path) -> None:
    raw = read(ham(tmp_path), size=5)
    assert raw.fields["x"].shape == (28, 3, 5, 5)
    assert raw.fields["x"].dtype == np.uint8
    assert raw.meta["labels"] == SEVEN
    np.testing.assert_array_equal(raw.fields["y"], np.arange(28) % 7)
    red = raw.fields["x"][:, 0].mean((1, 2))  # the stripes are cut off, the colours are there
    np.testing.assert_allclose(red, 30 * (np.arange(28) % 7), atol=8)
    assert raw.num_outputs == 7


def test_a_challenge_has_the_same_numbers_for_the_same_classes(tmp_path: Path) -> None:
    raw = read(challenge(tmp_path), size=4)
    assert raw.meta["labels"] == SEVEN
    np.testing.assert_array_equal(raw.fields["y"], np.arange(14) % 7)
    np.testing.assert_array_equal(raw.fields["x"][:, 2, 0, 0], 30 * (np.arange(14) % 7))


def test_natural_clients_and_single_lesions(tmp_path: Path) -> None:
    raw = read(ham(tmp_path), size=4, client="dataset", one_per_lesion=True)
    assert len(raw) == 14
    np.testing.assert_array_equal(raw.fields["y"], np.arange(0, 28, 2) % 7)
    assert raw.client_names == ("rosendahl", "vidir_modern")
    assert raw.clients is not None
    assert [raw.client_names[c] for c in raw.clients[:3]] == [
        "vidir_modern",
        "rosendahl",
        "rosendahl",
    ]


def test_it_is_dealt_like_any_dataset(tmp_path: Path) -> None:
    table = {"path": str(ham(tmp_path, 140)), "size": 4}
    partition = Named(name="two_labels", params={"package": 5})
    data = load(
        DataConfig(
            dataset=Named(name="isic", params=table), partition=partition, central_test_fraction=0.1
        ),
        0,
    )
    assert data.input_shape == (3, 4, 4)
    for client in range(data.num_clients):
        assert len(data.train[client]) == 8
        assert len(np.unique(data.fields["y"][data.train[client]])) == 2


def test_decoded_images_are_kept_and_changed_ones_read_again(tmp_path: Path) -> None:
    folder = ham(tmp_path)
    before = read(folder, size=4).fields["x"]
    file = folder / "HAM10000_images_part_1" / "ISIC_0000000.jpg"
    picture(file, (0, 0, 250))
    os.utime(file, ns=(1, 1))
    after = read(folder, size=4).fields["x"]
    assert (before[0] != after[0]).any()
    np.testing.assert_array_equal(before[1:], after[1:])
    assert len(list((tmp_path / "cache").glob("*.npz"))) == 2


def test_what_is_wrong_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such folder"):
        read(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"found: none; name it as data.dataset.csv"):
        read(tmp_path / "empty")
    folder = ham(tmp_path / "ham")
    with pytest.raises(
        DataError, match=r"csv = 'hmnist_8_8_L.csv' is missing, empty or of another"
    ):
        read(folder, csv="hmnist_8_8_L.csv")
    with pytest.raises(DataError, match=r"no column 'datasets'.*dataset"):
        read(folder, client="datasets")
    with pytest.raises(DataError, match=r"size = 0"):
        read(folder, size=0)
    (folder / "copy.csv").write_text((folder / "HAM10000_metadata.csv").read_text())
    with pytest.raises(DataError, match=r"found: HAM10000_metadata.csv, copy.csv"):
        read(folder)


def test_missing_and_damaged_images(tmp_path: Path) -> None:
    folder = ham(tmp_path)
    (folder / "HAM10000_images_part_1" / "ISIC_0000000.jpg").unlink()
    with pytest.raises(DataError, match=r"1 of the 28 images .* ISIC_0000000; .*partial = true"):
        read(folder)
    assert len(read(folder, size=4, partial=True)) == 27
    (folder / "HAM10000_images_part_2" / "ISIC_0000001.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"ISIC_0000001.jpg cannot be read"):
        read(folder, partial=True)


def test_a_ragged_table_is_told(tmp_path: Path) -> None:
    folder = ham(tmp_path)
    table = folder / "HAM10000_metadata.csv"
    table.write_text(table.read_text() + "HAM_0,ISIC_0000001\n")
    with pytest.raises(DataError, match=r"ISIC_0000001.* is of no class"):
        read(folder)


def test_an_image_has_exactly_one_class(tmp_path: Path) -> None:
    folder = challenge(tmp_path)
    table = folder / "GroundTruth.csv"
    table.write_text(table.read_text().replace("1.0", "0.0", 1))
    with pytest.raises(DataError, match=r"row 2 is of 0 classes"):
        read(folder)
