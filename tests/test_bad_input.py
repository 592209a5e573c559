"""Mistakes of the user: exit status 2, one sentence, no traceback, and no file written.

The scripts run in this process, because a process for each case would take minutes.
"""

import importlib
import io
import os
import py_compile
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ANALYZE, DETECT, SCRIPTS, SYNTHETIC, TRAIN, refused, succeed
from PIL import Image

import pipeline


@pytest.fixture
def fails(tmp_path):
    """Runs a script, which must refuse and write nothing. Returns the sentence."""

    def call(name, *flags):
        before = sorted(tmp_path.rglob("*"))
        sentence = refused(tmp_path, name, *flags)
        assert sorted(tmp_path.rglob("*")) == before
        return sentence

    return call


VALUES = {
    TRAIN: [  # one script for the flags that all scripts share
        ("--dataset", "mnist"),
        ("--corrupt_percentage", "1"),
        ("--corrupt_percentage", "-0.1"),
        ("--corrupt_percentage", "nan"),
        ("--num_train_examples", "0"),
        ("--num_train_examples", "2.5"),
        ("--train_batch_size", "99999999999999999999"),
        ("--precision", "fp8"),
        ("--device", "tpu"),
        ("--device", "cuda"),
        ("--seed", "-1"),
        ("--seed", str(2**32)),  # torch would treat it as seed 0
        ("--corrupt", "0.1"),  # no abbreviations
        ("--eval_batch_size", "many"),
        ("--learning_rate", "0"),
        ("--learning_rate", "inf"),
        ("--weight_decay", "-0.1"),
        ("--num_train_epochs", "0"),
    ],
    DETECT: [  # one script for the flags that it shares with analyze.py
        ("--factor_strategy", "newton"),
        ("--damping_factor", "-1"),
        ("--damping_factor", "nan"),
        ("--factor_examples", "0"),
        ("--method", "combined"),
        ("--num_review", "-1"),
        ("--explain", "all"),
    ],
    ANALYZE: [
        ("--num_query_examples", "0"),
        ("--query_batch_size", "-3"),
        ("--snapshots", "0"),
        *(("--eigenvector_fraction", value) for value in ("0", "1.1", "nan", "10 %")),
        *(("--query_indices", value) for value in ("", "3,", "3-", "5-3", "-1", "1.5", "all")),
    ],
}


@pytest.mark.parametrize(
    ("name", "flag", "value"),
    [(name, *case) for name, cases in VALUES.items() for case in cases],
    ids=lambda part: part,
)
def test_a_bad_value_is_named_with_its_flag(fails, monkeypatch, name, flag, value):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert flag in fails(name, flag, value)


ON_CPU = "WORLD_SIZE is 2, but a run on the CPU uses one process only"
PROCESSES = {  # script, number of GPUs, LOCAL_RANK of this process, and part of the sentence
    "training on the CPU": (TRAIN, 0, "1", ON_CPU),
    "detection on the CPU": (DETECT, 0, "1", ON_CPU),
    "training on GPUs": (TRAIN, 2, "1", "WORLD_SIZE is 2, but this script uses one process only"),
    "more than GPUs": (DETECT, 1, "1", "start them with torchrun"),
    "not by torchrun": (DETECT, 2, "", "start them with torchrun"),
    "not by torchrun, with more GPUs than processes": (DETECT, 8, "", "start them with torchrun"),
}


@pytest.mark.parametrize("processes", PROCESSES)
def test_a_wrong_number_of_processes_is_refused(fails, monkeypatch, processes):
    name, gpus, local_rank, words = PROCESSES[processes]
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpus > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    for variable, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": local_rank}.items():
        monkeypatch.setenv(variable, value)
    assert words in fails(name)


def test_an_index_is_made_by_one_process_only(fails, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "--index: one process makes the index" in fails(ANALYZE, "--index")


# ---- Image folders -------------------------------------------------------------------------------


def one_class(root):
    for name in ("cat", "äpfel"):
        shutil.rmtree(root / "train" / name)


def a_truncated_image(root):
    random = np.random.default_rng(0).integers(256, size=(64, 64, 3), dtype=np.uint8)
    Image.fromarray(random).save(root / "train" / "cat" / "1.png")
    os.truncate(root / "train" / "cat" / "1.png", 2000)


def one_image_per_class_and_no_test(root):
    shutil.rmtree(root / "test")
    for path in (root / "train").glob("*/[1-9].png"):
        path.unlink()


def a_name_in_latin_1(root):
    (root / "train" / "cat" / "1.png").rename(root / "train" / "cat" / os.fsdecode(b"\xe4.png"))


SPOILED = {  # change of the folders, and what the sentence must name
    "a single class": (one_class, "at least 2 class folders"),
    "a class without images": (lambda root: (root / "train" / "zebra").mkdir(), "zebra"),
    "a truncated image": (a_truncated_image, "cat/1.png"),
    "a text file": (
        lambda root: (root / "train" / "äpfel" / "notes.txt").write_text("hello"),
        "äpfel/notes.txt",
    ),
    "colour of 16 bits": (
        lambda root: (root / "train" / "cat" / "1.ppm").write_bytes(
            b"P6 8 8 4095\n" + bytes([0, 9]) * 192
        ),
        "cat/1.ppm has more than 8 bits per channel",
    ),
    "grey of 32 bits": (
        lambda root: Image.new("F", (40, 40)).save(root / "train" / "cat" / "1.tiff"),
        "cat/1.tiff",
    ),
    "a link to nothing": (
        lambda root: (root / "train" / "cat" / "9.png").symlink_to("gone.png"),
        "cat/9.png",
    ),
    "a name that is not UTF-8": (a_name_in_latin_1, r"cat/\udce4.png' cannot be read"),
    "nothing to hold out": (one_image_per_class_and_no_test, "2 images or more"),
    "a class missing in test": (
        lambda root: shutil.rmtree(root / "test/cat"),
        ": my images/test lacks the classes",
    ),
    "a class missing in train": (
        lambda root: shutil.rmtree(root / "train/cat"),
        ": my images/train lacks",
    ),
    "a pipe": (
        lambda root: os.mkfifo(root / "train" / "cat" / "pipe.png"),
        "cannot be read (no regular file)",
    ),
    "no folder": (shutil.rmtree, "my images"),
    "a test folder that is a link to nothing": (
        lambda root: (root / "test").rename(root.parent / "t") and (root / "test").symlink_to("x"),
        "my images/test must be a folder with a folder of images per class",
    ),
}


@pytest.mark.parametrize("how", SPOILED)
def test_a_spoiled_image_folder_is_named(fails, folders, how, monkeypatch):
    spoil, named = SPOILED[how]
    spoil(folders)
    monkeypatch.chdir(folders.parent)
    assert named in fails(
        TRAIN, "--dataset", "imagefolder", "--dataset_dir", folders.name, "--train_batch_size", 4
    )


def test_a_folder_that_cannot_be_listed_is_named(fails, folders, monkeypatch):
    """The folder is inside a class, or contains classes. Hidden folders are skipped."""
    scandir, closed = os.scandir, ["2019"]

    def scan(path):
        if os.fspath(path).endswith(tuple(closed)):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", scan)
    (folders / "train" / "cat" / ".hidden" / "2019").mkdir(parents=True)
    pipeline.load_data("imagefolder", folders, "train")
    (folders / "train" / "cat" / "2019").mkdir()
    flags = TRAIN, "--dataset", "imagefolder", "--dataset_dir", folders, "--train_batch_size", 4
    assert "cat/2019" in fails(*flags)
    closed[:] = ["train"]
    assert "a folder cannot be listed" in fails(*flags)


INSIDE = {  # flag, folder among the images, and folder of the data set
    "beside the classes": ("--output_dir", "my images/train/results", "my images"),
    "in a class": ("--output_dir", "my images/train/cat/a/b", "my images"),
    "all training images": ("--output_dir", "my images/train", "my images"),
    "among test images": ("--output_dir", "my images/test/.results", "my images"),
    "by way of a link": ("--output_dir", "link/train/results", "my images"),
    "behind a link in a class": ("--output_dir", "deep/results", "my images"),
    "in a class that is a link": ("--output_dir", "elsewhere/results", "my images"),
    "checkpoints": ("--checkpoint_dir", "my images/test/models", "my images"),
    "checkpoints, by way of a parent": ("--checkpoint_dir", "x/../my images/train/m", "my images"),
    "a data set that is a link": ("--checkpoint_dir", "my images/train/m", "link"),
}


@pytest.mark.parametrize("flag", ["--checkpoint_dir", "--output_dir"])
def test_a_folder_to_write_into_is_not_the_missing_test_split(fails, folders, flag):
    """Its first file would turn it into a test split without classes."""
    shutil.rmtree(folders / "test")
    flags = ("--dataset", "imagefolder", "--dataset_dir", folders, "--train_batch_size", 4)
    assert f"{flag} {folders}/test lies among" in fails(TRAIN, *flags, flag, folders / "test")
    assert not (folders / "test").exists()


def test_a_test_split_that_is_a_link_in_a_circle_is_refused(fails, folders):
    (folders / "test").rename(folders.parent / "t")
    (folders / "test").symlink_to(folders / "other")
    (folders / "other").symlink_to(folders / "test")
    flags = ("--dataset", "imagefolder", "--dataset_dir", folders, "--train_batch_size", 4)
    assert f"{folders}/test must be a folder with a folder of images" in fails(TRAIN, *flags)


@pytest.mark.parametrize("where", INSIDE)
def test_a_folder_to_write_into_among_the_images_is_refused(fails, folders, tmp_path, where):
    flag, folder, dataset_dir = INSIDE[where]
    (tmp_path / "link").symlink_to(folders)
    (folders / "train" / "cat").rename(tmp_path / "elsewhere")
    (folders / "train" / "cat").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "deep").mkdir()
    (folders / "test" / "äpfel" / "more").symlink_to(tmp_path / "deep")
    flags = ("--dataset", "imagefolder", "--dataset_dir", dataset_dir, "--train_batch_size", 4)
    sentence = fails(TRAIN, *flags, flag, folder)
    assert f"{flag} {folder} lies among the images of {dataset_dir}/t" in sentence


def test_results_may_be_written_beside_train_and_test(folders):
    for name in ("results", "train results", "."):
        pipeline.refuse_inside_data("--output_dir", folders / name, folders)


def test_classes_that_change_while_they_are_read_are_named(folders, monkeypatch):
    """A class that is added after the training images were listed would shift class indices."""
    read_images = pipeline.read_images

    def read(paths, split, cache_dir):
        images = read_images(paths, split, None)
        if split == "train":
            for place in ("train", "test"):
                shutil.copytree(folders / place / "cat", folders / place / "bird")
        return images

    monkeypatch.setattr(pipeline, "read_images", read)
    monkeypatch.setattr(pipeline, "make_folder", lambda path: pytest.fail("it writes"))
    flags = ("--dataset", "imagefolder", "--dataset_dir", folders, "--train_batch_size", 4)
    sentence = refused(folders.parent, TRAIN, *flags)
    assert "training and test images have different classes (bird)" in sentence


# ---- Values that do not fit the data, folders that are none --------------------------------------

MISTAKES = {  # script, flags, part of the sentence; the folder has a checkpoint on SYNTHETIC
    "batch above the images": (TRAIN, ["--train_batch_size", 61], "--train_batch_size"),
    "more images than there are": (
        TRAIN,
        ["--num_train_examples", 5001],
        "--num_train_examples 5001",
    ),
    "corrections without a name": (TRAIN, ["--corrections", ""], "--corrections"),
    "query index too high": (ANALYZE, ["--query_indices", "3,48-50"], "no test image 50"),
    "too many queries": (
        ANALYZE,
        ["--num_query_examples", 51],
        "--num_query_examples 51: there are only 50",
    ),
    "eigenvectors of the diagonal": (
        ANALYZE,
        ["--factor_strategy", "diagonal", "--eigenvector_fraction", 0.1],
        "--eigenvector_fraction: diagonal has no eigenvectors",
    ),
    "eigenvectors of the identity": (
        ANALYZE,
        ["--factor_strategy", "identity", "--eigenvector_fraction", 0.9],
        "--eigenvector_fraction: identity has no eigenvectors",
    ),
    "eigenvectors to explain by the identity": (
        DETECT,
        ["--factor_strategy", "identity", "--explain", 3, "--eigenvector_fraction", 0.9],
        "--eigenvector_fraction: identity has no eigenvectors",
    ),
    "a fraction without --explain": (
        DETECT,
        ["--eigenvector_fraction", 0.9],
        "--eigenvector_fraction has an effect only with --explain: add it, or",
    ),
    "an index without --explain": (
        DETECT,
        ["--index"],
        "--index has an effect only with --explain: add it, or",
    ),
    "no checkpoint": (DETECT, ["--checkpoint_dir", "nowhere"], "run train.py"),
    "no such checkpoint": (
        DETECT,
        ["--corrupt_percentage", 0],
        "model.pth, only model_corrupt_0.1.pth: run train.py",
    ),
    "no model that was cleaned": (DETECT, ["--cleaned"], "model_corrupt_0.1_cleaned.pth"),
    "other labels": (DETECT, ["--num_train_examples", 50], "other images or labels"),
    "checkpoints in a file": (
        TRAIN,
        ["--train_batch_size", 20, "--checkpoint_dir", "file"],
        "error: file cannot be",
    ),
    "checkpoint in a file": (
        ANALYZE,
        ["--checkpoint_dir", "file"],
        "no checkpoint file/model_corrupt_0.1.pth",
    ),
    "results in a file": (DETECT, ["--output_dir", "file"], "error: file/model_corrupt_0.1"),
    "results in no place": (
        ANALYZE,
        ["--output_dir", "/proc/nowhere"],
        "error: /proc/nowhere/model_corrupt_0.1",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named(fails, trained, tmp_path, mistake):
    shutil.copytree(trained[0], tmp_path, dirs_exist_ok=True)
    (tmp_path / "file").write_text("")
    name, flags, words = MISTAKES[mistake]
    assert words in fails(name, *SYNTHETIC, *flags)


def test_a_damaged_cifar10_archive_is_refused(fails, cifar_archive, tmp_path, monkeypatch):
    """The checksums of the tiny archive are wrong, and the real archive cannot be downloaded."""

    def no_network(self):
        raise OSError("no network")

    monkeypatch.setattr("torchvision.datasets.CIFAR10.download", no_network)
    shutil.copytree(cifar_archive[0], tmp_path / "data")
    (tmp_path / "data" / ".cifar10.lock").touch()  # a download leaves this file
    message = fails(TRAIN, "--dataset_dir", "data")
    assert "CIFAR-10 is not complete in data" in message and "or synthetic" in message


# ---- Python without docstrings, or without sources -----------------------------------------------


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_shows_flags_in_groups_even_without_docstrings(tmp_path, monkeypatch, name):
    """`python -OO` removes docstrings."""
    monkeypatch.setattr(importlib.import_module(name.removesuffix(".py")), "__doc__", None)
    out = succeed(tmp_path, name, "--help")
    titles = [line for line in out.splitlines() if re.fullmatch(r"\w+:", line)]
    third = "training:" if name == TRAIN else "curvature:"
    assert titles == ["options:", "data:", "model:", third, "report:"]


def test_compiled_code_without_sources_is_refused(fails, tmp_path, monkeypatch):
    py_compile.compile(pipeline.__file__, cfile=str(tmp_path / "pipeline.pyc"))
    (tmp_path / "numpy.py").write_text("import pipeline; print(pipeline.SOURCE); raise SystemExit")
    command = [sys.executable, "-c", "import pipeline"]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert found.stdout == "None\n", found.stderr
    monkeypatch.setattr(pipeline, "SOURCE", None)
    assert "add the .py files beside it" in fails(TRAIN, *SYNTHETIC)


# ---- What looks like a mistake and is none -------------------------------------------------------


def test_letters_that_the_console_cannot_print_are_printed_as_codes(monkeypatch):
    console = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr("sys.stdout", console)
    pipeline.run(lambda: print("wrote äpfel/写真.png"))
    console.flush()
    assert console.buffer.getvalue().decode("cp1252").strip() == r"wrote äpfel/\u5199\u771f.png"
