"""What the tests share: the project's root on the path, tiny data sets on disk, scripts as subprocesses."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # before site-packages, where kronfluence installs a package named `tests`

# What every end-to-end test trains on: 60 digits, 6 of them mislabeled.
SYNTHETIC = ("--dataset", "synthetic", "--num_train_examples", "60", "--corrupt_percentage", "0.1", "--device", "cpu")


@pytest.fixture(scope="session")
def script():
    """Runs a script of the project in a folder and returns the finished process, its output as text."""

    def call(folder, name, *arguments, environment=()):
        return subprocess.run(
            [sys.executable, str(ROOT / name), *map(str, arguments)],
            cwd=folder,
            env={**os.environ, **dict(environment)},
            capture_output=True,
            text=True,
            encoding="utf-8",
        )

    return call


@pytest.fixture(scope="session")
def trained(tmp_path_factory, script):
    """A folder with a checkpoint of one epoch on SYNTHETIC, and what train.py printed."""
    folder = tmp_path_factory.mktemp("trained")
    process = script(folder, "train.py", *SYNTHETIC, "--train_batch_size", 20, "--num_train_epochs", 1)
    assert process.returncode == 0, process.stderr
    return folder, process.stdout


@pytest.fixture(scope="session")
def class_folders(tmp_path_factory):
    """An `imagefolder` data set: 3 classes with 5 training and 2 test images each, plain colours of odd sizes."""
    root = tmp_path_factory.mktemp("class_folders")
    for split, count in (("train", 5), ("test", 2)):
        for label, name in enumerate(("cat", "grey owl", "äpfel")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                Image.new("RGB", (20 + 7 * index, 40), (100 * label, 40 * index, 200)).save(folder / f"{index}.png")
    return root


@pytest.fixture(scope="session")
def cifar_archive(tmp_path_factory):
    """CIFAR-10's official layout with 4 images per batch file, and the checksums torchvision would look for."""
    import hashlib

    root = tmp_path_factory.mktemp("cifar")
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    random = np.random.default_rng(0)
    checksums = {}
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        pixels = random.integers(256, size=(4, 3072), dtype=np.uint8)
        content = pickle.dumps({"data": pixels, "labels": random.integers(10, size=4).tolist()})
        (folder / name).write_bytes(content)
        checksums[name] = hashlib.md5(content).hexdigest()
    content = pickle.dumps({"label_names": [f"class {i}" for i in range(10)]})
    (folder / "batches.meta").write_bytes(content)
    checksums["batches.meta"] = hashlib.md5(content).hexdigest()
    return root, checksums
