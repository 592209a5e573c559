"""Mistakes of the user: exit status 2, one sentence that names what is wrong, no traceback, and no file written.

The scripts run in this process, through their `main`, because a process per case would take minutes.
"""

import io
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import ANALYZE, DETECT, SYNTHETIC, TRAIN, run, succeed
from PIL import Image

import pipeline


def files(folder):
    """What is in a folder."""
    return sorted(folder.rglob("*"))


@pytest.fixture
def fails(tmp_path):
    """Runs a script in a folder that must stay as it is; checks how it ends, and returns the sentence."""

    def call(name, *flags, unchanged=tmp_path):
        before = files(unchanged)
        finished = run(tmp_path, name, *flags)
        err = finished.err.strip()
        assert finished.status == 2
        assert err.startswith(f"{name}: error: ") and "\n" not in err and "Traceback" not in err
        assert files(unchanged) == before
        return err

    return call


VALUES = {
    TRAIN: [  # which stands for the flags that all scripts share
        ("--dataset", "mnist"),
        ("--corrupt_percentage", "10"),
        ("--corrupt_percentage", "1"),
        ("--corrupt_percentage", "-0.1"),
        ("--corrupt_percentage", "nan"),
        ("--num_train_examples", "0"),
        ("--num_train_examples", "-5"),
        ("--num_train_examples", "2.5"),
        ("--train_batch_size", "99999999999999999999"),
        ("--precision", "fp8"),
        ("--device", "tpu"),
        ("--device", "cuda"),
        ("--seed", "-1"),
        ("--seed", str(2**32)),  # torch would draw as by 0
        ("--no_such_flag", "1"),
        ("--num_train", "10"),
        ("--eval_batch_size", "many"),
        ("--learning_rate", "0"),
        ("--learning_rate", "inf"),
        ("--weight_decay", "-0.1"),
        ("--num_train_epochs", "1.5"),
        ("--num_train_epochs", "0"),
    ],
    DETECT: [  # which stands for the flags that it shares with analyze.py
        ("--factor_strategy", "newton"),
        ("--damping_factor", "-1"),
        ("--damping_factor", "nan"),
        ("--damping_factor", "some"),
        ("--factor_examples", "0"),
        ("--method", "combined"),
        ("--num_review", "-1"),
        ("--explain", "all"),
        ("--device", "cuda"),
    ],
    ANALYZE: [
        ("--num_query_examples", "0"),
        ("--query_batch_size", "-3"),
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


def test_an_empty_name_of_a_file_is_not_none(fails):
    assert "--corrections" in fails(TRAIN, "--dataset", "synthetic", "--num_train_examples", 20, "--corrections", "")


@pytest.mark.parametrize("environment", [{}, {"LOCAL_RANK": "1"}], ids=["not by torchrun", "more than GPUs"])
def test_processes_without_a_gpu_of_their_own(fails, monkeypatch, environment):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    for name, value in ({"WORLD_SIZE": "2", "RANK": "1"} | environment).items():
        monkeypatch.setenv(name, value)
    assert "start them with torchrun" in fails(DETECT)


@pytest.mark.parametrize(("name", "flag"), [(TRAIN, "--learning_rate"), (DETECT, "--damping_factor")])
def test_a_flag_without_its_value_is_named(fails, name, flag):
    assert flag in fails(name, flag)


# ---- Image folders -------------------------------------------------------------------------------


@pytest.fixture
def folders(class_folders, tmp_path):
    """A copy of the class folders, to be spoiled."""
    return Path(shutil.copytree(class_folders, tmp_path / "my images"))


def no_classes(root):
    shutil.rmtree(root / "train")
    shutil.copytree(root / "test" / "cat", root / "train")


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


SPOILED = {  # what is done to the folders, and what must be named
    "images beside each other": (no_classes, "train"),
    "a single class": (one_class, "at least 2 class folders"),
    "a class without images": (lambda root: (root / "train" / "zebra").mkdir(), "zebra"),
    "a truncated image": (a_truncated_image, "cat/1.png"),
    "an empty file": (lambda root: (root / "train" / "grey owl" / "1.png").write_bytes(b""), "grey owl/1.png"),
    "a text file": (lambda root: (root / "train" / "äpfel" / "notes.txt").write_text("hello"), "äpfel/notes.txt"),
    "grey of 32 bits": (lambda root: Image.new("F", (40, 40)).save(root / "train" / "cat" / "1.tiff"), "cat/1.tiff"),
    "a link to nothing": (lambda root: (root / "train" / "cat" / "9.png").symlink_to("gone.png"), "cat/9.png"),
    "a name that is not UTF-8": (a_name_in_latin_1, "cat/"),
    "nothing to hold out": (one_image_per_class_and_no_test, "2 images or more"),
    "a class that is missing in test": (
        lambda root: shutil.rmtree(root / "test" / "cat"),
        "test lacks the classes cat",
    ),
    "a class that is missing in train": (
        lambda root: shutil.rmtree(root / "train" / "cat"),
        "train lacks the classes cat",
    ),
    "a pipe": (lambda root: os.mkfifo(root / "train" / "cat" / "pipe.png"), "cannot be read (no regular file)"),
    "a folder whose name is not UTF-8": (None, "rename it"),
    "no folder": (shutil.rmtree, "my images"),
}


@pytest.mark.parametrize("how", SPOILED)
def test_a_spoiled_image_folder_is_named(fails, folders, how):
    spoil, named = SPOILED[how]
    if spoil is None:
        folders = folders.rename(folders.with_name(os.fsdecode(b"\xe4")))
    else:
        spoil(folders)
    assert named in fails(TRAIN, "--dataset", "imagefolder", "--dataset_dir", folders, "--train_batch_size", 4)


def test_a_folder_that_cannot_be_listed_is_named(fails, folders, monkeypatch):
    """Such a one inside a class; a hidden one is passed over like all that is hidden."""
    scandir = os.scandir

    def scan(path):
        if os.fspath(path).endswith("2019"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", scan)
    (folders / "train" / "cat" / ".hidden" / "2019").mkdir(parents=True)
    pipeline.load_data("imagefolder", folders, "train")
    (folders / "train" / "cat" / "2019").mkdir()
    message = fails(TRAIN, "--dataset", "imagefolder", "--dataset_dir", folders, "--train_batch_size", 4)
    assert "cat/2019" in message


def test_a_decompression_bomb_is_named(fails, folders, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)
    message = fails(TRAIN, "--dataset", "imagefolder", "--dataset_dir", folders, "--train_batch_size", 4)
    assert ".png" in message and "decompression bomb" in message


# ---- Values that do not fit the data, folders that are none --------------------------------------

MISTAKES = {  # script, flags, and what the sentence must say; "THERE" is the folder of the checkpoint on SYNTHETIC
    "batch above the images": (TRAIN, ["--train_batch_size", 61], "--train_batch_size"),
    "more images than there are": (TRAIN, ["--num_train_examples", 5001], "--num_train_examples 5001"),
    "query index too high": (ANALYZE, ["--checkpoint_dir", "THERE", "--query_indices", "3,48-50"], "no test image 50"),
    "too many queries": (
        *(ANALYZE, ["--checkpoint_dir", "THERE", "--num_query_examples", 51]),
        "--num_query_examples 51: there are only 50",
    ),
    "no checkpoint": (DETECT, [], "run train.py"),
    "no checkpoint but others": (
        *(DETECT, ["--checkpoint_dir", "THERE", "--corrupt_percentage", 0]),
        "model.pth, only model_corrupt_0.1.pth: run train.py",
    ),
    "no model that was cleaned": (DETECT, ["--checkpoint_dir", "THERE", "--cleaned"], "model_corrupt_0.1_cleaned.pth"),
    "other labels": (DETECT, ["--checkpoint_dir", "THERE", "--num_train_examples", 50], "other images or labels"),
    "checkpoints in a file": (TRAIN, ["--train_batch_size", 20, "--checkpoint_dir", "file"], "file"),
    "checkpoint in a file": (ANALYZE, ["--checkpoint_dir", "file"], "no checkpoint file/model_corrupt_0.1.pth"),
    "results in a file": (DETECT, ["--checkpoint_dir", "THERE", "--output_dir", "file"], "file"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named(fails, trained, tmp_path, mistake):
    (tmp_path / "file").write_text("")
    name, flags, words = MISTAKES[mistake]
    flags = [trained[0] / "checkpoints" if flag == "THERE" else flag for flag in flags]
    assert words in fails(name, *SYNTHETIC, *flags)


def test_a_damaged_cifar10_archive(fails, cifar_archive, tmp_path, monkeypatch):
    """The tiny archive does not have the checksums of the real one, and there is no network to fetch that from."""
    from torchvision.datasets import CIFAR10

    def no_network(self):
        raise OSError("no network")

    monkeypatch.setattr(CIFAR10, "download", no_network)
    shutil.copytree(cifar_archive[0], tmp_path / "data")
    (tmp_path / "data" / ".cifar10.lock").touch()  # what a download leaves
    message = fails(TRAIN, "--dataset_dir", "data")
    assert "CIFAR-10 is not whole in data" in message and "or synthetic" in message


# ---- What looks like a mistake and is none -------------------------------------------------------


def test_names_that_the_console_has_no_letters_for_are_printed_as_codes(monkeypatch):
    console = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr("sys.stdout", console)
    pipeline.run(lambda: print("wrote äpfel/写真.png"))
    console.flush()
    assert console.buffer.getvalue().decode("cp1252").strip() == r"wrote äpfel/\u5199\u771f.png"


def test_names_with_spaces_and_a_query_batch_above_the_queries_work(folders, tmp_path):
    (folders / "train" / "cat" / ".DS_Store").write_bytes(b"hidden files are passed over")
    data = ("--dataset", "imagefolder", "--dataset_dir", folders, "--device", "cpu", "--checkpoint_dir", "ein Ordner")
    succeed(tmp_path, TRAIN, *data, "--train_batch_size", "5", "--num_train_epochs", "1")
    sizes = ("--query_batch_size", "5000", "--train_batch_size", "5000")
    out = succeed(tmp_path, ANALYZE, *data, "--factor_strategy", "identity", *sizes)
    assert "top_influences_identity.png" in out
