"""Loaders, label corruption and augmentation."""

import io
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import time
import unicodedata
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
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
    """The tiny archive; its checksums replace those in torchvision's class."""
    root, checksums = cifar_archive
    batches = [[f"data_batch_{i}", checksums[f"data_batch_{i}"]] for i in range(1, 6)]
    monkeypatch.setattr("torchvision.datasets.CIFAR10.train_list", batches)
    monkeypatch.setattr(
        "torchvision.datasets.CIFAR10.test_list", [["test_batch", checksums["test_batch"]]]
    )
    meta = {"filename": "batches.meta", "key": "label_names", "md5": checksums["batches.meta"]}
    monkeypatch.setattr("torchvision.datasets.CIFAR10.meta", meta)
    return root


def test_cifar10_keeps_the_pixels_and_the_order_of_the_archive(tiny_cifar):
    data = pipeline.load_data("cifar10", tiny_cifar, "train")
    first = pickle.loads((tiny_cifar / "cifar-10-batches-py" / "data_batch_1").read_bytes())
    assert data.images.shape == (20, 3, 32, 32) and data.images.dtype == torch.uint8
    assert np.array_equal(data.images[:4].numpy().reshape(4, 3072), first["data"])
    assert data.labels[:4].tolist() == first["labels"]
    assert data.class_names[3] == "class 3" and data.paths == [""] * 20


def test_one_process_downloads_cifar10_and_the_others_wait(tmp_path, tiny_cifar, monkeypatch):
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
def test_images_of_any_mode_keep_their_colours(tmp_path, mode):
    image, colour = MODES[mode]
    image.save(tmp_path / "image.png")
    (read,) = pipeline.read_images([f"{tmp_path}/image.png"], "train", None)
    assert read.shape == (32, 32, 3) and read.dtype == np.uint8
    assert np.abs(read.astype(int) - colour).max() <= 1


def png(colour_type, channels, bits):
    """The bytes of a PNG file of 8 x 8 pixels. Colour types: 0 grey, 2 RGB, 4 and 6 with alpha."""

    def chunk(kind, content):
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checksum

    header = struct.pack(">IIBBBBB", 8, 8, bits, colour_type, 0, 0, 0)
    row = b"\0" + bytes([9]) * (8 * channels * bits // 8)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(row * 8)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def tiff(order, channels, bits, planes=False):
    """The bytes of a TIFF file of 8 x 8 pixels.

    order: the byte order, `<` or `>`; planes: whether each colour has a plane of its own.
    """
    strips = channels if planes else 1
    size = 8 * 8 * channels * bits // 8
    values = 8 + 2 + 12 * 9 + 4  # values longer than 4 bytes: bits, strips, sizes
    starts = values + 2 * channels
    pixels = starts + 8 * strips
    tags = [
        (256, 3, 1, 8),  # width
        (257, 3, 1, 8),  # height
        (258, 3, channels, bits if channels == 1 else values),
        (259, 3, 1, 1),  # no compression
        (262, 3, 1, 2 if channels == 3 else 1),  # RGB or grey
        (273, 4, strips, starts if strips > 1 else pixels),
        (277, 3, 1, channels),
        (279, 4, strips, starts + 4 * strips if strips > 1 else size),
        (284, 3, 1, 2 if planes else 1),
    ]
    content = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IH", 8, len(tags))
    for number, kind, count, value in tags:
        is_short = kind == 3 and count == 1
        last = struct.pack(order + "HH", value, 0) if is_short else struct.pack(order + "I", value)
        content += struct.pack(order + "HHI", number, kind, count) + last
    content += bytes(4) + struct.pack(order + "H" * channels, *[bits] * channels)
    parts = [pixels + part * size // strips for part in range(strips)]
    content += struct.pack(order + "I" * 2 * strips, *parts, *[size // strips] * strips)
    return content + bytes([9]) * size


def netpbm(kind, largest, channels):
    """The bytes of a portable pixmap of 8 x 8 pixels with values from 0 to `largest`."""
    width = 2 if largest > 255 else 1
    return f"{kind} 8 8 {largest}\n".encode() + bytes([0, 9][-width:]) * (64 * channels)


def saved(image, kind, **settings):
    """The bytes of an image file that Pillow writes."""
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


def deep_jpeg2000():
    """The bytes of a JPEG 2000 colour image whose header gives its first channel 16 bits."""
    content = bytearray(saved(Image.new("RGB", (8, 8)), "JPEG2000"))
    first_channel = content.index(b"\xff\x4f\xff\x51") + 42  # start marker and size marker
    assert content[first_channel] == 7  # number of bits minus 1
    content[first_channel] = 15
    return bytes(content)


DEEP = {  # files of more than 8 bits per channel
    "grey.png": png(0, 1, 16),
    "colour.png": png(2, 3, 16),
    "grey and alpha.png": png(4, 2, 16),
    "colour and alpha.png": png(6, 4, 16),
    "grey.tif": tiff("<", 1, 16),
    "colour.tif": tiff("<", 3, 16),
    "colour, big-endian.tif": tiff(">", 3, 16),
    "planes.tif": tiff("<", 3, 16, planes=True),
    "integers.tif": saved(Image.new("I", (8, 8), 9), "TIFF"),
    "numbers.tif": saved(Image.new("F", (8, 8), 9), "TIFF"),
    "packed.tif": saved(Image.new("I;16", (8, 8), 9), "TIFF", compression="tiff_lzw"),
    "10 bits.pgm": netpbm("P5", 1023, 1),
    "12 bits.ppm": netpbm("P6", 4095, 3),
    "16 bits.ppm": netpbm("P6", 65535, 3),
    "text.ppm": b"P3 8 8 1023\n" + b"300 " * 192,
    "float.pfm": b"Pf\n8 8\n-1.0\n" + bytes(256),
    "grey.jp2": saved(Image.new("I;16", (8, 8), 9), "JPEG2000"),
    "colour.jp2": deep_jpeg2000(),
    "colour.sgi": struct.pack(">hBBHHHH500x", 474, 0, 2, 3, 8, 8, 3) + bytes([0, 9]) * 192,
}
SHALLOW = {  # files of 8 bits and less per channel
    "grey.png": png(0, 1, 8),
    "colour.png": png(2, 3, 8),
    "grey and alpha.png": png(4, 2, 8),
    "4 bits.png": png(0, 1, 4),
    "colour.tif": tiff("<", 3, 8),
    "planes.tif": tiff(">", 3, 8, planes=True),
    "grey.tif": tiff(">", 1, 8),
    "black and white.tif": saved(Image.new("1", (8, 8)), "TIFF"),
    "7 bits.ppm": netpbm("P6", 100, 3),
    "8 bits.pgm": netpbm("P5", 255, 1),
    "bits.pbm": b"P4 8 8\n" + bytes(8),
    "colour.jp2": saved(Image.new("RGB", (8, 8)), "JPEG2000"),
    "colour.sgi": saved(Image.new("RGB", (8, 8)), "SGI"),
    "5 or 6 bits of a colour.bmp": struct.pack(
        "<2sIII IiiHHIIiiII III 128x",
        *(b"BM", 194, 0, 66, 40, 8, 8, 1, 16, 3, 128, 0, 0, 0, 0, 0xF800, 0x7E0, 0x1F),
    ),
}


@pytest.mark.parametrize("name", DEEP)
def test_more_than_8_bits_are_refused_in_a_sentence_that_names_the_file(tmp_path, name):
    """Pillow would keep only the upper byte: values up to 4,095 would become 0 to 15."""
    path = tmp_path / name
    path.write_bytes(DEEP[name])
    sentence = f"{name} has more than 8 bits per channel: convert all images alike to 8 bits"
    with pytest.raises(pipeline.UserError, match=re.escape(sentence)):
        pipeline.read_image(path)


@pytest.mark.parametrize("name", SHALLOW)
def test_8_bits_and_less_are_read(tmp_path, name):
    (tmp_path / name).write_bytes(SHALLOW[name])
    assert pipeline.read_image(tmp_path / name).shape == (32, 32, 3)


def tag(number, kind, value):
    """An EXIF entry: a short integer (kind 3) or text (kind 2)."""
    return struct.pack("<HHI4s", number, kind, 1 if kind == 3 else len(value), value)


@pytest.mark.parametrize(
    "beside",
    [b"", tag(0x128, 2, b"2\0")],
    ids=["alone", "beside a unit as text, which Pillow cannot write again"],
)
def test_a_photograph_of_a_rotated_camera_is_turned_upright(tmp_path, beside):
    upright = np.zeros((64, 64, 3), np.uint8)
    upright[:32] = 255  # the sky
    image = Image.fromarray(np.rot90(upright))  # as the sensor recorded it
    tags = tag(0x112, 3, b"\6") + beside  # orientation: rotate by 90 degrees clockwise
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(tags) // 12) + tags + bytes(4)
    image.save(tmp_path / "photo.jpg", exif=exif, quality=95)
    read = pipeline.read_image(tmp_path / "photo.jpg")
    assert read[:14].min() > 230 and read[18:].max() < 25


def test_an_image_with_a_malformed_exif_block_is_read(tmp_path):
    Image.new("RGB", (40, 40), (9, 99, 199)).save(
        tmp_path / "photo.png", exif=b"Exif\0\0II*\0 of no use"
    )
    assert (pipeline.read_image(tmp_path / "photo.png") == (9, 99, 199)).all()


def test_a_large_jpeg_is_scaled_like_its_full_resolution(tmp_path):
    random = np.random.default_rng(0)
    coarse = Image.fromarray(random.integers(256, size=(8, 8, 3), dtype=np.uint8)).resize(
        (1000, 800), 3
    )
    coarse.save(tmp_path / "photo.jpg", quality=95)
    expected = np.asarray(coarse.resize((32, 32), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(pipeline.read_image(tmp_path / "photo.jpg") - expected).mean() < 3


def test_hidden_and_system_folders_are_skipped_and_classes_are_counted(
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
    assert passed_over == [f"Skipped in {folders}/{split}: {names}" for split in ("train", "test")]
    assert classes == f"3 classes in {folders}: cat 5, grey owl 5, äpfel 5"


def test_all_of_many_classes_are_printed(tmp_path, capsys):
    for split in ("train", "test"):
        for i in range(12):
            folder = tmp_path / split / f"c{i:02}"
            folder.mkdir(parents=True)
            Image.new("RGB", (4, 4)).save(folder / "1.png")
    pipeline.load_data("imagefolder", tmp_path, "train")
    names = ", ".join(f"c{i:02} 1" for i in range(12))
    assert f"12 classes in {tmp_path}: {names}\n" in capsys.readouterr().out


def test_the_ten_largest_of_many_counts_are_printed():
    largest = [f"c{i} {i}" for i in range(13, 3, -1)]
    found = pipeline.ten_largest(Counter({f"c{i}": i for i in range(1, 14)}))
    assert found == ", ".join([*largest, "and 3 others down to c1 1"])


def test_class_folders_in_two_unicode_forms_are_one_class(folders):
    apart = unicodedata.normalize("NFD", "äpfel")
    (folders / "test" / "äpfel").rename(folders / "test" / apart)
    train, test = (pipeline.load_data("imagefolder", folders, split) for split in ("train", "test"))
    assert train.class_names == test.class_names == ["cat", "grey owl", "äpfel"]
    apples = [path for path, label in zip(test.paths, test.labels, strict=True) if label == 2]
    assert all(f"/{apart}/" in path for path in apples)
    shutil.copytree(folders / "test" / apart, folders / "train" / apart)
    with pytest.raises(pipeline.UserError, match="has the same name as another class"):
        pipeline.load_data("imagefolder", folders, "train")


def test_a_class_folder_with_a_line_break_is_refused(folders):
    """Its name could not stand in a row of corrections.csv."""
    (folders / "train" / "cat").rename(folders / "train" / "wild\ncat")
    with pytest.raises(pipeline.UserError, match=r"'.*wild\\ncat' has a line break in its name"):
        pipeline.load_data("imagefolder", folders, "train")


def test_a_class_folder_called_leave_out_is_refused(folders):
    """A review could not tell the class from the decision."""
    (folders / "train" / "cat").rename(folders / "train" / "leave out")
    with pytest.raises(pipeline.UserError, match="leave out' has the name by which a review"):
        pipeline.load_data("imagefolder", folders, "train")


@pytest.mark.parametrize("link", ["cat/more", "zebra", "cat/all"])
def test_a_folder_that_a_link_puts_into_two_classes_is_refused(folders, link):
    target = folders / "train" / "grey owl"
    if link == "cat/more":
        target = target / "young"
        target.mkdir()
        Image.new("RGB", (9, 9)).save(target / "x.png")
    (folders / "train" / link).symlink_to(target)
    with pytest.raises(pipeline.UserError, match=f"{target} belongs to .* by a link: remove the"):
        pipeline.load_data("imagefolder", folders, "train")


def test_files_beside_the_class_folders_are_counted(folders, capsys):
    for name in ("stray.png", "notes.txt", ".hidden"):
        (folders / "train" / name).write_bytes(b"")
    assert len(pipeline.load_data("imagefolder", folders, "train")) == 15
    skipped, _ = capsys.readouterr().out.splitlines()
    assert skipped == f"Skipped in {folders}/train: 2 files beside the class folders"


def test_links_in_a_circle_are_followed_only_once(class_folders, folders):
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
    """A folder without test/: three classes with 30, 7 and 1 training images."""
    for name, count in (("many", 30), ("some", 7), ("one", 1)):
        (tmp_path / "train" / name).mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", (8, 8), (index, 0, 0)).save(tmp_path / "train" / name / f"{index}.png")
    return tmp_path


def test_a_tenth_of_each_class_is_held_out_if_there_is_no_test_folder(without_test, capsys):
    train = pipeline.load_data("imagefolder", without_test, "train")
    sentence = "4 images, a tenth of each class, are held out as the test split"
    assert sentence in capsys.readouterr().out
    test = pipeline.load_data("imagefolder", without_test, "test")
    assert train.class_names == ["many", "one", "some"]
    assert train.labels.bincount().tolist() == [27, 1, 6]
    assert test.labels.bincount().tolist() == [3, 0, 1]
    assert len({*train.paths, *test.paths}) == 38


def test_an_added_file_changes_at_most_one_held_out_image(without_test):
    """A tenth of 31 files is 3, as of 30. Only the new file can replace another of its class."""
    before = pipeline.load_data("imagefolder", without_test, "test")
    Image.new("RGB", (8, 8)).save(without_test / "train" / "many" / "a new one.png")
    after = pipeline.load_data("imagefolder", without_test, "test")
    assert len({*before.paths} & {*after.paths}) >= 3
    assert after.labels.bincount().tolist() == [3, 0, 1]


# ---- Cached images -------------------------------------------------------------------------------


@pytest.fixture
def cached(folders, tmp_path, monkeypatch):
    """A function, a copy of the class folders, and the folder of the cache.

    The function loads the copy and returns the number of images that it decodes.
    """
    decoded = []
    read_image = pipeline.read_image
    monkeypatch.setattr(
        pipeline, "read_image", lambda path: decoded.append(path) or read_image(path)
    )

    def load(num_examples=None):
        decoded.clear()
        data = pipeline.load_data("imagefolder", folders, "train", num_examples, tmp_path / "cache")
        # Without a cache, so each image is decoded again.
        expected = pipeline.load_data("imagefolder", folders, "train", num_examples)
        assert torch.equal(data.images, expected.images) and data.paths == expected.paths
        return len(decoded) - len(data)

    return load, folders, tmp_path / "cache"


def test_images_are_decoded_once_and_no_file_is_written_beside_them(cached):
    load, folders, cache = cached
    before = sorted(folders.rglob("*"))
    assert [load(), load(), load(7), load(7)] == [15, 0, 7, 0]
    assert sorted(folders.rglob("*")) == before and len(list(cache.rglob("*.safetensors"))) == 2


def swap_files(folders, name):
    """Swaps the files called `name` of two classes; they have the same size and time."""
    one, other = (folders / "train" / label / name for label in ("cat", "grey owl"))
    one.rename(folders / "aside")
    other.rename(one)
    (folders / "aside").rename(other)


def code_with(monkeypatch, old, new):
    """Replaces a part of the imported text of pipeline.py."""
    assert pipeline.SOURCE.count(old) == 1
    monkeypatch.setattr(pipeline, "SOURCE", pipeline.SOURCE.replace(old, new))


def test_cached_images_depend_on_the_code_that_reads_them_but_not_on_comments(cached, monkeypatch):
    load, _, _ = cached
    assert [load(), load()] == [15, 0]
    resize = '            return np.asarray(image.convert("RGB")'
    code_with(monkeypatch, resize, f"            # to 32 x 32 pixels\n{resize}")
    code_with(monkeypatch, "def ten_largest(counts):", "def largest(counts):")
    assert load() == 0
    code_with(monkeypatch, "image.has_transparency_data", "False")
    assert load() == 15


def test_code_is_read_once_at_import(cached, monkeypatch):
    """The hash is that of the running code, even if the file changes meanwhile."""
    load, _, _ = cached
    assert load() == 15
    monkeypatch.setattr("inspect.getsource", lambda _: "another text")
    monkeypatch.setattr("linecache.getlines", lambda *_: ["another text"])
    assert load() == 0
    assert Path(pipeline.__file__).read_text(encoding="utf-8") == pipeline.SOURCE


def test_code_is_read_before_the_imports_that_take_seconds(tmp_path):
    """A fake numpy, the first import, prints the files that were read before."""
    shutil.copy(pipeline.__file__, tmp_path)
    program = "import pipeline, sys; print(hash(pipeline.SOURCE)); sys.exit()"
    (tmp_path / "numpy.py").write_text(program.replace("hash", "len"))
    found = subprocess.run(
        [sys.executable, "-c", "import pipeline"], cwd=tmp_path, capture_output=True, text=True
    )
    assert found.stdout.strip() == str(len(pipeline.SOURCE)), found.stderr


FIRST = Path("train") / "cat" / "0.png"
CHANGES = {
    "another image": lambda folders, cache: Image.new("RGB", (11, 40), (9, 9, 9)).save(
        folders / FIRST
    ),
    "another time": lambda folders, cache: os.utime(folders / FIRST, (1, 1)),
    "another name": lambda folders, cache: (folders / FIRST).rename(
        folders / "train" / "cat" / "9.png"
    ),
    "two images that trade places": lambda folders, cache: swap_files(folders, "plain/0.bmp"),
    "two folders that trade places": lambda folders, cache: swap_files(folders, "plain"),
    "a truncated copy": lambda folders, cache: os.truncate(
        next(cache.rglob("*.safetensors")), 1000
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_outdated_or_damaged_cache_is_written_again(cached, change):
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


def test_only_cifar10_needs_torchvision_and_says_so_in_a_sentence(class_folders, monkeypatch):
    # The import of torchvision fails if torch is another build.
    for name in ("torchvision", "torchvision.datasets"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(pipeline.UserError, match="torchvision cannot load it"):
        pipeline.load_data("cifar10", "nowhere", "train")
    assert not Path("nowhere").exists()
    assert len(digits(3)) == 3
    assert len(pipeline.load_data("imagefolder", class_folders, "train")) == 15


def test_synthetic_digits_are_fixed_balanced_and_different():
    once, again = (pipeline.load_data("synthetic", "", "train", 500) for _ in range(2))
    assert torch.equal(once.images, again.images) and torch.equal(once.labels, again.labels)
    assert once.class_names == [str(digit) for digit in range(10)]
    assert (once.labels.bincount(minlength=10) > 25).all()
    assert len(torch.cat([once.images, digits(50, "test").images]).flatten(1).unique(dim=0)) == 550


# ---- Loaders of one's own ------------------------------------------------------------------------


def stripes(dataset_dir, split, cache_dir, **changed):
    """A loader of 12 uniform images with brightness 0 to 11, in three classes."""
    images = np.arange(12, dtype=np.uint8)[:, None, None, None].repeat(32, 1).repeat(32, 2)
    source = {
        "labels": torch.arange(12) % 3,
        "class_names": ["cat", "grey owl", "äpfel"],
        "read": lambda indices: images[indices.numpy()].repeat(3, 3),
    }
    return pipeline.ImageSource(**source | changed)


def test_a_loader_of_a_user_is_one_entry_in_loaders(monkeypatch):
    def load(*place):
        scale = {"channel_mean": (0.5, 0.5, 0.5), "channel_std": (0.1, 0.2, 0.4)}
        return stripes(*place, paths=[f"{i}.png" for i in range(12)], **scale)

    monkeypatch.setitem(pipeline.LOADERS, "stripes", load)
    data = pipeline.load_data("stripes", "", "train", 5)
    assert data.images.shape == (5, 3, 32, 32) and data.num_available == 12
    assert torch.equal(data.dataset_indices, pipeline.draw_examples(12, 5))
    assert data.images[:, 1, 3, 4].tolist() == data.dataset_indices.tolist()
    assert data.labels.tolist() == [number % 3 for number in data.dataset_indices.tolist()]
    assert data.paths == [f"{number}.png" for number in data.dataset_indices.tolist()]
    found = data.normalize(torch.full((1, 3, 32, 32), 255, dtype=torch.uint8))[0, :, 0, 0]
    assert torch.allclose(found, torch.tensor([5.0, 2.5, 1.25]))
    assert data.digest != replace(data, channel_mean=(0.0, 0.5, 0.5)).digest


WRONG_LOADERS = {  # result of a loader, and part of the sentence
    "a tuple": (lambda *place: (1, 2), "labels, class_names and read"),
    "labels of another kind": ({"labels": torch.zeros(12)}, "labels as an int64 tensor [N]"),
    "a list of labels": ({"labels": [0] * 12}, "labels as an int64 tensor [N]"),
    "labels in a column": ({"labels": torch.zeros(12, 1).long()}, "labels as an int64 tensor [N]"),
    "no labels": ({"labels": torch.zeros(0).long()}, "not empty"),
    "labels from 1": ({"labels": torch.arange(12) % 3 + 1}, "labels from 0 to 2, since it has 3"),
    "a negative label": ({"labels": torch.arange(12) % 3 - 1}, "labels from 0 to 2"),
    "one class": ({"class_names": ["cat"]}, "at least two class_names"),
    "a class twice": ({"class_names": ["cat", "cat", "owl"]}, "class_names that all differ"),
    "a class in two forms": (
        {"class_names": ["\u00e4", "a\u0308", "owl"]},
        "class_names that all differ",
    ),
    "a line break": ({"class_names": ["cat", "wild\ncat", "owl"]}, "without line breaks"),
    "a line break at the end": ({"class_names": ["cat\n", "owl"]}, "without line breaks"),
    "a class called leave out": (
        {"class_names": ["cat", "leave out "]},
        "no class named 'leave out'",
    ),
    "numbers of classes": ({"class_names": [0, 1, 2]}, "class_names, which are strings"),
    "too few paths": ({"paths": ["1.png"]}, "one path for each of its 12 labels"),
    "one mean": ({"channel_mean": (0.5,)}, "three means and three positive deviations"),
    "a deviation of zero": ({"channel_std": (0.5, 0, 0.5)}, "three positive deviations"),
    "images as float": (
        {"read": lambda indices: np.zeros((len(indices), 32, 32, 3))},
        "must read images of uint8 [12, 32, 32, 3], but reads float64 [12, 32, 32, 3]",
    ),
    "channels first": (
        {"read": lambda indices: np.zeros((len(indices), 3, 32, 32), np.uint8)},
        "but reads uint8 [12, 3, 32, 32]",
    ),
    "an image too many": (
        {"read": lambda indices: np.zeros((len(indices) + 1, 32, 32, 3), np.uint8)},
        "but reads uint8 [13, 32, 32, 3]",
    ),
}


@pytest.mark.parametrize("wrong", WRONG_LOADERS)
def test_a_wrong_result_of_a_loader_is_refused_in_a_sentence(monkeypatch, wrong):
    returned, words = WRONG_LOADERS[wrong]
    load = returned if callable(returned) else lambda *place: stripes(*place, **returned)
    monkeypatch.setitem(pipeline.LOADERS, "stripes", load)
    with pytest.raises(pipeline.UserError, match=re.escape(words)) as raised:
        pipeline.load_data("stripes", "", "train")
    assert str(raised.value).startswith("the loader of --dataset stripes (train images) must ")


def test_class_names_of_a_loader_are_found_in_every_unicode_form(monkeypatch):
    names = ["a\u0308pfel", "cat", "owl"]
    load = partial(stripes, class_names=names)
    monkeypatch.setitem(pipeline.LOADERS, "stripes", load)
    found = pipeline.load_data("stripes", "", "train").class_names
    assert [pipeline.find_class("row", name, found) for name in (names[0], "\u00e4pfel")] == [0, 0]


def test_classes_in_another_order_are_named_as_the_difference_of_two_splits():
    data, test = digits(2), digits(2, "test")
    pipeline.check_splits(data, test)
    test = replace(test, class_names=test.class_names[::-1])
    with pytest.raises(
        pipeline.UserError, match=r"\(the same in another order\): .* a loader must"
    ):
        pipeline.check_splits(data, test)


# ---- Duplicates ----------------------------------------------------------------------------------


def test_duplicates_are_found_by_their_pixels(capsys):
    """Images 1, 4 and 5 are equal and have two labels. Images 2 and 3 have one. 0 is in test."""
    data = digits(6)
    images = data.images[[0, 1, 2, 2, 1, 1]]
    data = replace(data, images=images, labels=torch.tensor([3, 7, 5, 5, 7, 8]))
    data = replace(data, indices=torch.tensor([0, 10, 20, 30, 40, 50]))
    assert pipeline.duplicate_of(data) == [-1, -1, -1, 20, 10, 10]
    test = digits(4, "test")
    pipeline.print_duplicates(data, replace(test, images=torch.cat([test.images[:3], images[:1]])))
    assert capsys.readouterr().out.splitlines() == [
        "3 training images have an identical copy with another label",
        "1 test images are training images, too: test accuracy is too high",
    ]
    pipeline.print_duplicates(data.take(torch.tensor([0, 1, 2, 3])), test)
    assert capsys.readouterr().out == ""


# ---- Label corruption ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fraction", "count"), [(0, 0), (0.1, 100), (0.1234, 123), (0.5, 500), (0.999, 999)]
)
def test_corruption_changes_exactly_the_given_fraction_of_labels(fraction, count):
    labels = torch.arange(1000) % 10
    corrupted, is_corrupted = pipeline.corrupt_labels(labels, fraction, 10, seed=5)
    assert is_corrupted.sum() == count and torch.equal(corrupted != labels, is_corrupted)
    assert torch.equal(labels, torch.arange(1000) % 10)  # the argument does not change
    assert not fraction or not torch.equal(
        corrupted, pipeline.corrupt_labels(labels, fraction, 10, seed=6)[0]
    )


def test_symmetric_corruption_draws_the_other_classes_equally():
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
    assert data.is_corrupted.sum() == 10
    assert part.is_corrupted.tolist() == data.is_corrupted[[7, 30]].tolist()
    assert torch.equal(data.true_labels, digits(50).labels)
    assert part.indices.tolist() == [7, 30]
    assert part.to("cpu").digest == part.digest != data.digest


# ---- Batches -------------------------------------------------------------------------------------


def test_crops_and_flips_equal_slices_of_the_padded_image():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (81, 3, 32, 32), generator=generator, dtype=torch.uint8)
    offsets = torch.cartesian_prod(torch.arange(9), torch.arange(9))  # all 81 crops
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
