"""Loaders, label corruption and augmentation."""

import os
import pickle
import shutil
import struct
import sys
import time
import unicodedata
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import digits
from PIL import Image

import pipeline
import train

# ---- Loaders -------------------------------------------------------------------------------------


@pytest.fixture
def tiny_cifar(cifar_archive, monkeypatch):
    """The tiny archive, with its own checksums in torchvision's class."""
    root, checksums = cifar_archive
    batches = [[f"data_batch_{i}", checksums[f"data_batch_{i}"]] for i in range(1, 6)]
    monkeypatch.setattr("torchvision.datasets.CIFAR10.train_list", batches)
    monkeypatch.setattr(
        "torchvision.datasets.CIFAR10.test_list", [["test_batch", checksums["test_batch"]]]
    )
    meta = {"filename": "batches.meta", "key": "label_names", "md5": checksums["batches.meta"]}
    monkeypatch.setattr("torchvision.datasets.CIFAR10.meta", meta)
    return root


def test_cifar10_has_the_archives_pixels_in_order(tiny_cifar):
    data = pipeline.load_data("cifar10", tiny_cifar, "train")
    first = pickle.loads((tiny_cifar / "cifar-10-batches-py" / "data_batch_1").read_bytes())
    assert data.images.shape == (20, 3, 32, 32) and data.images.dtype == torch.uint8
    assert np.array_equal(data.images[:4].numpy().reshape(4, 3072), first["data"])
    assert data.labels[:4].tolist() == first["labels"]
    assert data.class_names[3] == "class 3" and data.paths == [""] * 20


def test_one_downloads_cifar10_and_the_others_wait(tmp_path, tiny_cifar, monkeypatch):
    downloads = []

    def download(self):
        if not self._check_integrity():
            downloads.append("started")
            time.sleep(0.2)
            shutil.copytree(tiny_cifar, tmp_path, dirs_exist_ok=True)

    monkeypatch.setattr("torchvision.datasets.CIFAR10.download", download)
    with ThreadPoolExecutor() as pool:
        first, second = pool.map(pipeline.load_data, ["cifar10"] * 2, [tmp_path] * 2, ["train"] * 2)
    assert downloads == ["started"] and torch.equal(first.images, second.images)


def test_imagefolder_pixels_labels_and_paths_belong_together(class_folders):
    data = pipeline.load_data("imagefolder", class_folders, "train")
    assert data.class_names == ["cat", "grey owl", "äpfel"]
    assert data.images.shape == (15, 3, 32, 32)
    for image, label, path in zip(data.images, data.labels, data.paths, strict=True):
        assert f"/{data.class_names[label]}/" in path
        colour = np.asarray(Image.open(path))[0, 0]
        assert (image == torch.tensor(colour)[:, None, None]).all()


def test_images_are_resized_with_antialiasing(tmp_path):
    stripes = np.zeros((320, 320, 3), np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(stripes).save(tmp_path / "stripes.png")
    image = pipeline.read_image(tmp_path / "stripes.png")
    assert ((image > 120) & (image < 135)).all()


MODES = {
    "grey, 16 bits": (Image.fromarray(np.full((40, 50), 90 * 257, np.uint16)), (90, 90, 90)),
    "black and white": (Image.new("1", (40, 40), 1), (255, 255, 255)),
    "palette with a transparent colour": (
        Image.new("RGBA", (40, 40), (10, 200, 30, 0)).quantize(),
        (255, 255, 255),
    ),
    "half transparent": (Image.new("RGBA", (50, 30), (255, 0, 0, 128)), (255, 127, 127)),
    "grey, half transparent": (Image.new("LA", (40, 40), (0, 128)), (127, 127, 127)),
    "tiny": (Image.new("RGB", (1, 3), (1, 2, 3)), (1, 2, 3)),
}


@pytest.mark.parametrize("mode", MODES)
def test_images_of_any_mode_come_out_in_their_colours(tmp_path, mode):
    image, colour = MODES[mode]
    image.save(tmp_path / "image.png")
    (read,) = pipeline.read_images([f"{tmp_path}/image.png"], "train", None)
    assert read.shape == (32, 32, 3) and read.dtype == np.uint8
    assert np.abs(read.astype(int) - colour).max() <= 1


@pytest.mark.parametrize(
    ("brightest", "bits"), [(65535, 16), (23130, 16), (4095, 12), (1000, 12), (200, 8)]
)
def test_16_bits_of_grey_are_scaled_by_those_that_its_images_use(tmp_path, capsys, brightest, bits):
    """A dark image beside a bright one stays dark, and colours stay as they are."""
    for name, value in (("bright", brightest), ("dark", brightest // 10)):
        (tmp_path / f"{name}.pgm").write_bytes(
            b"P5 40 40 65535\n" + np.full(1600, value, ">u2").tobytes()
        )
    Image.new("RGB", (40, 40), (200, 30, 9)).save(tmp_path / "red.png")
    names = ("bright.pgm", "dark.pgm", "red.png")
    bright, dark, red = pipeline.read_images(
        [f"{tmp_path}/{name}" for name in names], "train", None
    )
    assert np.abs(bright.astype(int) - 255 * brightest / (2**bits - 1)).max() <= 1
    assert np.abs(dark.astype(int) - 25.5 * brightest / (2**bits - 1)).max() <= 1
    assert (
        red == (200, 30, 9)
    ).all() and f"by the {bits} bits that they use" in capsys.readouterr().out


def tag(number, kind, value):
    """An entry of EXIF: a short integer (kind 3) or text (kind 2)."""
    return struct.pack("<HHI4s", number, kind, 1 if kind == 3 else len(value), value)


@pytest.mark.parametrize(
    "beside",
    [b"", tag(0x128, 2, b"2\0")],
    ids=["alone", "beside a unit as text, which Pillow cannot write again"],
)
def test_a_photograph_taken_with_a_turned_camera_stands_upright(tmp_path, beside):
    upright = np.zeros((64, 64, 3), np.uint8)
    upright[:32] = 255  # the sky
    image = Image.fromarray(np.rot90(upright))  # as the sensor saw it
    tags = tag(0x112, 3, b"\6") + beside  # orientation: to be turned by 90 degrees clockwise
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(tags) // 12) + tags + bytes(4)
    image.save(tmp_path / "photo.jpg", exif=exif, quality=95)
    read = pipeline.read_image(tmp_path / "photo.jpg")
    assert read[:14].min() > 230 and read[18:].max() < 25


def test_an_image_with_a_malformed_exif_block_is_read(tmp_path):
    Image.new("RGB", (40, 40), (9, 99, 199)).save(
        tmp_path / "photo.png", exif=b"Exif\0\0II*\0 of no use"
    )
    assert (pipeline.read_image(tmp_path / "photo.png") == (9, 99, 199)).all()


def test_a_large_jpeg_is_scaled_as_its_full_resolution_would_be(tmp_path):
    random = np.random.default_rng(0)
    coarse = Image.fromarray(random.integers(256, size=(8, 8, 3), dtype=np.uint8)).resize(
        (1000, 800), 3
    )
    coarse.save(tmp_path / "photo.jpg", quality=95)
    expected = np.asarray(coarse.resize((32, 32), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(pipeline.read_image(tmp_path / "photo.jpg") - expected).mean() < 3


def test_what_systems_make_and_hide_is_passed_over_and_classes_are_counted(
    class_folders, folders, capsys
):
    expected = pipeline.load_data("imagefolder", class_folders, "train")
    for name in ("@eaDir", "#recycle", "lost+found", "__MACOSX", "$RECYCLE.BIN", ".thumbnails"):
        for place in ("train", "train/cat", "test/äpfel"):
            shutil.copytree(class_folders / "train" / "cat", folders / place / name)
    for name in ("Thumbs.db", ".DS_Store"):
        (folders / "train" / "cat" / name).write_bytes(b"")
    capsys.readouterr()
    found = pipeline.load_data("imagefolder", folders, "train")
    assert found.class_names == expected.class_names
    assert torch.equal(found.labels, expected.labels) and torch.equal(found.images, expected.images)
    *passed_over, classes = capsys.readouterr().out.splitlines()
    names = "#recycle, $RECYCLE.BIN, .thumbnails, @eaDir, __MACOSX, lost+found"
    assert passed_over == [
        f"Passed over in {folders}/{split}: {names}" for split in ("train", "test")
    ]
    assert classes == f"3 classes in {folders}: cat 5, grey owl 5, äpfel 5"


def test_of_many_classes_the_ten_largest_are_named():
    largest = [f"c{i} {i}" for i in range(13, 3, -1)]
    found = pipeline.ten_largest(Counter({f"c{i}": i for i in range(1, 14)}))
    assert found == ", ".join([*largest, "and 3 others down to c1 1"])


def test_class_folders_in_two_unicode_forms_are_one_class(folders):
    apart = unicodedata.normalize("NFD", "äpfel")
    (folders / "test" / "äpfel").rename(folders / "test" / apart)
    train, test = (pipeline.load_data("imagefolder", folders, split) for split in ("train", "test"))
    assert train.class_names == test.class_names == ["cat", "grey owl", "äpfel"]
    assert all(
        f"/{apart}/" in path
        for path, label in zip(test.paths, test.labels, strict=True)
        if label == 2
    )
    shutil.copytree(folders / "test" / apart, folders / "train" / apart)
    with pytest.raises(pipeline.UserError, match="has the same name as another class"):
        pipeline.load_data("imagefolder", folders, "train")


def test_links_in_a_circle_end(class_folders, folders):
    for name in ("up", "again"):
        (folders / "train" / "cat" / name).symlink_to(folders / "train" / "cat")
    (folders / "train" / "cat" / "beside").symlink_to(class_folders / "train" / "cat")
    assert len(pipeline.load_data("imagefolder", folders, "train")) == 20


def test_folders_inside_a_class_belong_to_it(folders):
    (folders / "train" / "cat" / "2019" / "may").mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(folders / "train" / "cat" / "2019" / "may" / "x.png")
    data = pipeline.load_data("imagefolder", folders, "train")
    (position,) = [i for i, path in enumerate(data.paths) if path.endswith("/2019/may/x.png")]
    assert len(data) == 16 and data.class_names[data.labels[position]] == "cat"


# ---- Class folders without a test folder ---------------------------------------------------------


@pytest.fixture
def without_test(tmp_path):
    """Training images only: 30 of one class, 7 of another, 1 of a third."""
    for name, count in (("many", 30), ("some", 7), ("one", 1)):
        (tmp_path / "train" / name).mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", (8, 8), (index, 0, 0)).save(tmp_path / "train" / name / f"{index}.png")
    return tmp_path


def test_a_tenth_of_each_class_is_held_out_where_there_is_no_test_folder(without_test, capsys):
    train = pipeline.load_data("imagefolder", without_test, "train")
    assert "4 images, a tenth of each class, are held out" in capsys.readouterr().out
    test = pipeline.load_data("imagefolder", without_test, "test")
    assert train.class_names == ["many", "one", "some"]
    assert train.labels.bincount().tolist() == [27, 1, 6] and test.labels.bincount().tolist() == [
        3,
        0,
        1,
    ]
    assert len({*train.paths, *test.paths}) == 38


def test_another_file_leaves_the_held_out_images_as_they_are(without_test):
    """Of 31 files a tenth is 3, as of 30; at most the new one takes the place of one, in its class."""
    before = pipeline.load_data("imagefolder", without_test, "test")
    Image.new("RGB", (8, 8)).save(without_test / "train" / "many" / "a new one.png")
    after = pipeline.load_data("imagefolder", without_test, "test")
    assert len({*before.paths} & {*after.paths}) >= 3 and after.labels.bincount().tolist() == [
        3,
        0,
        1,
    ]


# ---- Images that were read before ----------------------------------------------------------------


@pytest.fixture
def cached(folders, tmp_path, monkeypatch):
    """A function that loads a copy of the class folders and says how many images were decoded; the copy; the cache."""
    decoded = []
    read_image = pipeline.read_image
    monkeypatch.setattr(
        pipeline, "read_image", lambda path: decoded.append(path) or read_image(path)
    )

    def load(num_examples=None):
        decoded.clear()
        data = pipeline.load_data("imagefolder", folders, "train", num_examples, tmp_path / "cache")
        expected = pipeline.load_data(
            "imagefolder", folders, "train", num_examples
        )  # decodes each of them again
        assert torch.equal(data.images, expected.images) and data.paths == expected.paths
        return len(decoded) - len(data)

    return load, folders, tmp_path / "cache"


def test_images_are_decoded_once_and_nothing_is_written_among_them(cached):
    load, folders, cache = cached
    before = sorted(folders.rglob("*"))
    assert [load(), load(), load(7), load(7)] == [15, 0, 7, 0]
    assert sorted(folders.rglob("*")) == before and len(list(cache.rglob("*.safetensors"))) == 2


def trade_places(folders, name):
    """What is called `name` in two classes, files of one size and time of change, each under the other's name."""
    one, other = (folders / "train" / label / name for label in ("cat", "grey owl"))
    one.rename(folders / "aside")
    other.rename(one)
    (folders / "aside").rename(other)


FIRST = Path("train") / "cat" / "0.png"
CHANGES = {
    "another image": lambda folders, cache: Image.new("RGB", (11, 40), (9, 9, 9)).save(
        folders / FIRST
    ),
    "another time": lambda folders, cache: os.utime(folders / FIRST, (1, 1)),
    "another name": lambda folders, cache: (folders / FIRST).rename(
        folders / "train" / "cat" / "9.png"
    ),
    "two images that trade places": lambda folders, cache: trade_places(folders, "plain/0.bmp"),
    "two folders that trade places": lambda folders, cache: trade_places(folders, "plain"),
    "a truncated copy": lambda folders, cache: os.truncate(
        next(cache.rglob("*.safetensors")), 1000
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_outdated_or_damaged_cache_is_written_anew(cached, change):
    load, folders, cache = cached
    for name, colour in (("cat", 10), ("grey owl", 200)):
        (folders / "train" / name / "plain").mkdir()
        for index in range(5):
            path = folders / "train" / name / "plain" / f"{index}.bmp"
            Image.new("RGB", (32, 32), (colour,) * 3).save(path)
            os.utime(path, (1e9, 1e9))
    assert load() == 25
    CHANGES[change](folders, cache)
    assert [load(), load()] == [25, 0]


def test_without_torchvision_cifar10_ends_in_a_sentence_and_the_others_still_work(
    class_folders, monkeypatch
):
    for name in (
        "torchvision",
        "torchvision.datasets",
    ):  # their import fails, as beside a torch of another build
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(pipeline.UserError, match="torchvision cannot load it"):
        pipeline.load_data("cifar10", "nowhere", "train")
    assert not Path("nowhere").exists()
    assert (
        len(digits(3)) == 3 and len(pipeline.load_data("imagefolder", class_folders, "train")) == 15
    )


def test_synthetic_digits_are_fixed_balanced_and_different():
    once, again = (pipeline.load_data("synthetic", "", "train", 500) for _ in range(2))
    assert torch.equal(once.images, again.images) and torch.equal(once.labels, again.labels)
    assert once.class_names == [str(digit) for digit in range(10)]
    assert (once.labels.bincount(minlength=10) > 25).all()
    assert len(torch.cat([once.images, digits(50, "test").images]).flatten(1).unique(dim=0)) == 550


# ---- Label corruption ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fraction", "count"), [(0, 0), (0.1, 100), (0.1234, 123), (0.5, 500), (0.999, 999)]
)
def test_corruption_changes_exactly_the_fraction_and_always_the_label(fraction, count):
    labels = torch.arange(1000) % 10
    corrupted, is_corrupted = pipeline.corrupt_labels(labels, fraction, 10, seed=5)
    assert is_corrupted.sum() == count and torch.equal(corrupted != labels, is_corrupted)
    assert torch.equal(labels, torch.arange(1000) % 10)  # the argument is left alone
    assert not fraction or not torch.equal(
        corrupted, pipeline.corrupt_labels(labels, fraction, 10, seed=6)[0]
    )


def test_corruption_is_uniform_over_the_other_classes():
    counts = pipeline.corrupt_labels(torch.full((90_000,), 3), 0.5, 10, seed=5)[0].bincount(
        minlength=10
    )
    assert counts[3] == 45_000
    others = counts[torch.arange(10) != 3].double()
    chi_squared = ((others - 5000) ** 2 / 5000).sum()
    assert chi_squared < 20.1  # the 99th percentile with 8 degrees of freedom


def test_true_labels_stay_with_their_images():
    data = pipeline.training_examples(digits(50), 0.2)
    part = data.take(torch.tensor([7, 3, 30])).without([1])
    assert (
        part.is_corrupted.tolist() == data.is_corrupted[[7, 30]].tolist()
        and data.is_corrupted.sum() == 10
    )
    assert torch.equal(data.true_labels, digits(50).labels) and part.indices.tolist() == [7, 30]
    assert part.to("cpu").digest == part.digest != data.digest


# ---- Batches -------------------------------------------------------------------------------------


def test_crops_and_flips_equal_slicing_by_hand():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (81, 3, 32, 32), generator=generator, dtype=torch.uint8)
    offsets = torch.cartesian_prod(torch.arange(9), torch.arange(9))  # every crop there is
    flips = torch.rand(81, generator=generator) < 0.5
    result = train.crop_and_flip(images, offsets, flips)
    for image, (top, left), flip, crop in zip(images, offsets.tolist(), flips, result, strict=True):
        padded = torch.zeros(3, 40, 40, dtype=torch.uint8)
        padded[:, 4:36, 4:36] = image
        expected = padded[:, top : top + 32, left : left + 32]
        assert torch.equal(crop, expected.flip(2) if flip else expected)


def test_normalize_standardises_each_channel():
    pixel = torch.tensor([0, 128, 255], dtype=torch.uint8)
    expected = (pixel / 255 - torch.tensor(pipeline.CHANNEL_MEAN)) / torch.tensor(
        pipeline.CHANNEL_STD
    )
    found = digits(1).normalize(pixel.view(1, 3, 1, 1).expand(2, 3, 32, 32))
    assert torch.allclose(found[1, :, 5, 7], expected, atol=1e-6)
