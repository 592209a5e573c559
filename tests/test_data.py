"""Loaders, label corruption and augmentation."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

import pipeline

# --------------------------------------------------------------------------------------------------
# Loaders
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_cifar(cifar_archive, monkeypatch):
    """The tiny archive, with its own checksums in torchvision's class."""
    from torchvision.datasets import CIFAR10

    root, checksums = cifar_archive
    batches = [[f"data_batch_{i}", checksums[f"data_batch_{i}"]] for i in range(1, 6)]
    monkeypatch.setattr(CIFAR10, "train_list", batches)
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", checksums["test_batch"]]])
    meta = {"filename": "batches.meta", "key": "label_names", "md5": checksums["batches.meta"]}
    monkeypatch.setattr(CIFAR10, "meta", meta)
    return root


def test_cifar10_has_the_archives_pixels_in_order(tiny_cifar):
    import pickle

    data = pipeline.load_train_data("cifar10", tiny_cifar)
    first = pickle.loads((tiny_cifar / "cifar-10-batches-py" / "data_batch_1").read_bytes())
    assert data.images.shape == (20, 3, 32, 32) and data.images.dtype == torch.uint8
    assert np.array_equal(data.images[:4].numpy().reshape(4, 3072), first["data"])
    assert data.labels[:4].tolist() == first["labels"]
    assert data.class_names[3] == "class 3" and data.paths == []


def test_cifar10_damaged_and_not_downloadable_names_folder_and_ways_out(tiny_cifar, tmp_path, monkeypatch):
    import shutil

    from torchvision.datasets import CIFAR10

    def no_network(self):
        raise OSError("no network")

    monkeypatch.setattr(CIFAR10, "download", no_network)
    shutil.copytree(tiny_cifar, tmp_path / "data")
    (tmp_path / "data" / "cifar-10-batches-py" / "data_batch_2").write_bytes(b"damaged")
    with pytest.raises(pipeline.UserError) as error:
        pipeline.load_train_data("cifar10", tmp_path / "data")
    for part in (str(tmp_path / "data"), "imagefolder", "synthetic"):
        assert part in str(error.value)


def test_imagefolder_pixels_labels_and_paths_belong_together(class_folders):
    data = pipeline.load_train_data("imagefolder", class_folders)
    assert data.class_names == ["cat", "grey owl", "äpfel"]
    assert data.images.shape == (15, 3, 32, 32)
    for image, label, path in zip(data.images, data.labels, data.paths, strict=True):
        assert f"/{data.class_names[label]}/" in path
        colour = np.asarray(Image.open(path))[0, 0]
        assert (image == torch.tensor(colour)[:, None, None]).all()


def test_imagefolder_order_is_shuffled_and_fixed(class_folders):
    once, again = (pipeline.load_train_data("imagefolder", class_folders) for _ in range(2))
    assert once.paths == again.paths
    assert once.labels.tolist() != sorted(once.labels.tolist())


def test_imagefolder_resizes_with_antialiasing(tmp_path):
    stripes = np.zeros((320, 320, 3), np.uint8)
    stripes[:, ::2] = 255
    for split in ("train", "test"):
        for name in "ab":
            (tmp_path / split / name).mkdir(parents=True)
            Image.fromarray(stripes).save(tmp_path / split / name / "stripes.png")
    image = pipeline.load_train_data("imagefolder", tmp_path).images[0]
    assert ((image > 120) & (image < 135)).all()


def test_without_torchvision_folders_end_in_a_sentence_and_digits_still_work(class_folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)  # its import fails, as beside a torch of another build
    with pytest.raises(pipeline.UserError, match="torchvision cannot be imported"):
        pipeline.load_train_data("imagefolder", class_folders)
    assert len(pipeline.load_train_data("synthetic", "", 3)) == 3


@pytest.mark.parametrize("number", [1, 7, 15])
def test_num_train_examples_draws_distinct_images_and_the_same_each_time(class_folders, number):
    once, again = (pipeline.load_train_data("imagefolder", class_folders, number) for _ in range(2))
    assert once.paths == again.paths and len(set(once.paths)) == number


def test_more_examples_than_there_are_is_an_error(class_folders):
    with pytest.raises(pipeline.UserError, match="only 15"):
        pipeline.load_train_data("imagefolder", class_folders, 16)


def test_test_classes_must_be_the_training_classes(class_folders):
    with pytest.raises(pipeline.UserError, match="'dog'"):
        pipeline.load_test_data("imagefolder", class_folders, ["cat", "dog", "grey owl", "äpfel"])


def test_synthetic_digits_are_fixed_balanced_and_different():
    once, again = (pipeline.load_train_data("synthetic", "", 500) for _ in range(2))
    assert torch.equal(once.images, again.images) and torch.equal(once.labels, again.labels)
    assert once.class_names == [str(digit) for digit in range(10)]
    assert (once.labels.bincount(minlength=10) > 25).all()
    assert len(once.images.flatten(1).unique(dim=0)) == 500


def test_synthetic_splits_do_not_overlap():
    train = pipeline.generate_digits("", "train", 50).images
    test = pipeline.generate_digits("", "test", 50).images
    assert len(torch.cat([train, test]).flatten(1).unique(dim=0)) == 100


# --------------------------------------------------------------------------------------------------
# Label corruption
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fraction", "count"), [(0, 0), (0.1, 100), (0.1234, 123), (0.5, 500), (0.999, 999)])
def test_corruption_changes_exactly_the_fraction_and_always_the_label(fraction, count):
    labels = torch.arange(1000) % 10
    corrupted, is_corrupted = pipeline.corrupt_labels(labels, fraction, 10, seed=5)
    assert is_corrupted.sum() == count
    assert torch.equal(corrupted != labels, is_corrupted)
    assert torch.equal(labels, torch.arange(1000) % 10)  # the argument is left alone


def test_corruption_is_uniform_over_the_other_classes():
    corrupted, is_corrupted = pipeline.corrupt_labels(torch.full((90_000,), 3), 0.5, 10, seed=5)
    counts = corrupted[is_corrupted].bincount(minlength=10)
    assert counts[3] == 0
    others = counts[torch.arange(10) != 3].double()
    chi_squared = ((others - 5000) ** 2 / 5000).sum()
    assert chi_squared < 20.1  # the 99th percentile with 8 degrees of freedom


def test_corruption_depends_on_its_seed_alone():
    labels = torch.arange(1000) % 10
    torch.manual_seed(1)
    first, _ = pipeline.corrupt_labels(labels, 0.1, 10)
    torch.manual_seed(2)
    second, _ = pipeline.corrupt_labels(labels, 0.1, 10)
    other, _ = pipeline.corrupt_labels(labels, 0.1, 10, seed=pipeline.CORRUPTION_SEED + 1)
    assert torch.equal(first, second) and not torch.equal(first, other)


def test_two_classes_are_swapped():
    corrupted, is_corrupted = pipeline.corrupt_labels(torch.tensor([0, 1] * 10), 0.5, 2, seed=0)
    assert is_corrupted.sum() == 10
    assert torch.equal(corrupted[is_corrupted], 1 - torch.tensor([0, 1] * 10)[is_corrupted])


# --------------------------------------------------------------------------------------------------
# Batches
# --------------------------------------------------------------------------------------------------


def test_crops_and_flips_equal_slicing_by_hand():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (81, 3, 32, 32), generator=generator, dtype=torch.uint8)
    offsets = torch.cartesian_prod(torch.arange(9), torch.arange(9))  # every crop there is
    flips = torch.rand(81, generator=generator) < 0.5
    result = pipeline.crop_and_flip(images, offsets, flips)
    for image, (top, left), flip, crop in zip(images, offsets.tolist(), flips, result, strict=True):
        padded = torch.zeros(3, 40, 40, dtype=torch.uint8)
        padded[:, 4:36, 4:36] = image
        expected = padded[:, top : top + 32, left : left + 32]
        assert torch.equal(crop, expected.flip(2) if flip else expected)


def test_normalize_standardises_each_channel():
    images = torch.tensor([0, 128, 255], dtype=torch.uint8).view(1, 3, 1, 1).expand(2, 3, 32, 32)
    expected = [
        (value / 255 - m) / s
        for value, m, s in zip((0, 128, 255), pipeline.CHANNEL_MEAN, pipeline.CHANNEL_STD, strict=True)
    ]
    assert torch.allclose(pipeline.normalize(images)[1, :, 5, 7], torch.tensor(expected), atol=1e-6)
