"""Helpers of all tests: tiny data, tiny networks, and functions that run the scripts."""

import contextlib
import csv
import gc
import hashlib
import importlib
import io
import json
import os
import pickle
import shlex
import shutil
import sys
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

if "PYTEST_XDIST_WORKER" in os.environ:
    # Several test processes with several threads each would slow each other down.
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
# kronfluence installs a package named `tests` in site-packages, so the root must come first.
sys.path.insert(0, str(ROOT))
sys.path.insert(1, str(ROOT / "tests" / "studies"))

import pipeline

# The default of 500 test digits takes longer than most tests.
pipeline.NUM_SYNTHETIC["test"] = 50

TRAIN, ANALYZE, DETECT = SCRIPTS = ("train.py", "analyze.py", "detect_mislabeled_dataset.py")
# Training data of the end-to-end tests: 60 digits, 6 of them with corrupted labels.
SYNTHETIC = (
    "--dataset",
    "synthetic",
    "--num_train_examples",
    "60",
    "--corrupt_percentage",
    "0.1",
    "--device",
    "cpu",
)


def run(folder, name, *flags):
    """Runs `main` of a script in this process and in a folder. Returns status, output and error."""
    status, out, err = 0, io.StringIO(), io.StringIO()
    argv = mock.patch.object(sys, "argv", [name, *map(str, flags)])
    with (
        contextlib.chdir(folder),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        argv,
    ):
        try:
            pipeline.run(importlib.import_module(name.removesuffix(".py")).main)
        except SystemExit as stop:
            status = stop.code
    without_progress_bars = err.getvalue().split("\r")[-1]
    return SimpleNamespace(status=status, out=out.getvalue(), err=without_progress_bars)


def succeed(folder, name, *flags):
    """Runs a script, which must succeed. Returns its output."""
    finished = run(folder, name, *flags)
    assert finished.status == 0, finished.err
    return finished.out


def refused(folder, name, *flags):
    """Runs a script, which must end with status 2 and one sentence. Returns the sentence."""
    finished = run(folder, name, *flags)
    assert finished.status == 2, finished.err
    assert finished.err.startswith(f"{name}: error: ") and finished.err.count("\n") == 1
    return finished.err


def printed_commands(output):
    """The commands in the output of a script, as lists of words without `python`."""
    return [shlex.split(line)[1:] for line in output.splitlines() if line.startswith("  python ")]


def influence_run(
    folder, data, strategy="ekfac", *, model, dtype=torch.float32, seed=3, batch_size=4, **settings
):
    """An InfluenceRun with the settings of the scripts, but a batch size of 4."""
    return pipeline.InfluenceRun(
        model,
        data,
        folder / "model",
        strategy=strategy,
        dtype=dtype,
        seed=seed,
        seconds={},
        batch_size=batch_size,
        **settings,
    )


def tiny_network(seed=1, num_classes=10, channels=(4, 5)):
    """A strided and a padded convolution, batch-norm, max-pooling, and a linear layer, float64.

    It is in eval mode. Its running statistics are random. The last weights are enlarged, so that
    some predictions are confident and others are not.
    """
    torch.manual_seed(seed)
    layers = OrderedDict(
        strided=nn.Conv2d(3, channels[0], kernel_size=3, stride=2, bias=False),
        norm1=nn.BatchNorm2d(channels[0]),
        relu1=nn.ReLU(),
        padded=nn.Conv2d(*channels, kernel_size=3, padding=1),
        norm2=nn.BatchNorm2d(channels[1]),
        relu2=nn.ReLU(),
        pool=nn.AdaptiveMaxPool2d(1),
        flatten=nn.Flatten(),
        linear=nn.Linear(channels[1], num_classes),
    )
    model = nn.Sequential(layers).double()
    for norm in (model.norm1, model.norm2):
        norm.running_mean.normal_(std=0.3)
        norm.running_var.uniform_(0.2, 1)
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.3)
    with torch.no_grad():
        model.linear.weight *= 3
    return model.eval()


def minus_log_odds(logits, label):
    """Minus the log-odds of the label, by definition."""
    return -torch.logit(logits.softmax(0).gather(0, label[None])[0])


def relative_error(result, expected):
    """The norm of the difference, divided by the norm of `expected`.

    Both tensors must have the same dtype and shape.
    """
    assert result.dtype == expected.dtype and result.shape == expected.shape
    return ((result - expected).norm() / expected.norm()).item()


def digits(count, split="train"):
    """The first test digits, or a random sample of the training digits."""
    data = pipeline.load_data("synthetic", "", split, count if split == "train" else None)
    return data.take(torch.arange(count))


def image_data(images, labels, class_names, paths=None):
    """ImageData whose labels are the true labels."""
    indices = torch.arange(len(labels))
    return pipeline.ImageData(
        images=images,
        labels=labels,
        true_labels=labels,
        class_names=class_names,
        paths=paths or [""] * len(labels),
        indices=indices,
        dataset_indices=indices,
        num_available=len(labels),
    )


def read_table(path):
    """The header of a csv file, and its rows as dictionaries."""
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        return reader.fieldnames, list(reader)


def result_folder(folder, name="model"):
    """The only folder in influence_results whose name begins with `name`."""
    (found,) = (folder / "influence_results").glob(f"{name}*")
    return found


def results(folder):
    """By path, the contents of files that must be the same in every run.

    Hidden and unfinished files are skipped, and so are times.
    """
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name[0] != "."]
    return {
        str(path.relative_to(folder)): content(path)
        for path in paths
        if "unfinished" not in str(path)
    }


def content(path):
    """The part of a file that must be the same in every run."""
    if path.suffix == ".safetensors":
        return {name: pipeline.sha256(tensor) for name, tensor in load_file(path).items()}
    if path.suffix == ".pth":
        checkpoint = torch.load(path, weights_only=True)
        names = ("margins", "logits_to_check")
        tensors = checkpoint["weights"] | {name: checkpoint["metadata"].pop(name) for name in names}
        for epoch, weights in checkpoint["metadata"].pop("snapshots").items():
            tensors |= {f"{name} after epoch {epoch}": weights[name] for name in weights}
        del (
            checkpoint["metadata"]["train_seconds"],
            checkpoint["metadata"]["environment"]["peak_memory_bytes"],
        )
        return [
            checkpoint["metadata"],
            {name: pipeline.sha256(tensor) for name, tensor in tensors.items()},
        ]
    if path.suffix == ".json":
        found = json.loads(path.read_text())
        if path.name == pipeline.LISTING:
            return found
        return {
            name: value
            for name, value in found.items()
            if name not in ("seconds", "peak_memory_bytes")
        }
    return path.read_bytes()


@pytest.fixture(scope="module")
def small_parts():
    """Limits so small that even tiny data is computed in several parts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "QUERY_CHUNK", 2)
        # A few gradients of a tiny convolution.
        patch.setattr(pipeline, "ELEMENTS_IN_CPU_CACHE", 400)
        # kronfluence collects garbage around every stage. Frozen objects make this fast.
        gc.freeze()
        yield
        gc.unfreeze()


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder with a checkpoint of one epoch on SYNTHETIC, and the output of train.py."""
    folder = tmp_path_factory.mktemp("trained")
    return folder, succeed(
        folder, TRAIN, *SYNTHETIC, "--train_batch_size", 20, "--num_train_epochs", 1
    )


@pytest.fixture(scope="session")
def class_folders(tmp_path_factory):
    """Class folders: 3 classes with 5 training and 2 test images each, of several sizes."""
    root = tmp_path_factory.mktemp("class_folders")
    for split, count in (("train", 5), ("test", 2)):
        for label, name in enumerate(("cat", "grey owl", "äpfel")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                Image.new("RGB", (20 + 7 * index, 40), (100 * label, 40 * index, 200)).save(
                    folder / f"{index}.png"
                )
    return root


@pytest.fixture
def folders(class_folders, tmp_path):
    """A copy of the class folders that a test may change."""
    return Path(shutil.copytree(class_folders, tmp_path / "my images"))


@pytest.fixture(scope="session")
def cifar_archive(tmp_path_factory):
    """Four images per file in the official layout of CIFAR-10, and checksums for torchvision."""
    root = tmp_path_factory.mktemp("cifar")
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    random = np.random.default_rng(0)
    contents = {"batches.meta": {"label_names": [f"class {i}" for i in range(10)]}}
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        pixels = random.integers(256, size=(4, 3072), dtype=np.uint8)
        contents[name] = {"data": pixels, "labels": random.integers(10, size=4).tolist()}
    checksums = {}
    for name, content in contents.items():
        (folder / name).write_bytes(pickle.dumps(content))
        checksums[name] = hashlib.md5(pickle.dumps(content)).hexdigest()
    return root, checksums
