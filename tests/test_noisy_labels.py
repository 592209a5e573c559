"""Noisy labels from a csv file instead of --corrupt_percentage."""

import csv
import os
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import (
    ANALYZE,
    DETECT,
    SYNTHETIC,
    TRAIN,
    digits,
    printed_commands,
    read_table,
    refused,
    result_folder,
    run,
    succeed,
)

import pipeline

DATA = [*SYNTHETIC[: SYNTHETIC.index("--corrupt_percentage")], "--device", "cpu"]
RECIPE = ("--train_batch_size", 20, "--num_train_epochs", 1)


@pytest.fixture(scope="module")
def noisy(tmp_path_factory):
    """A folder with labels.csv, which omits the first drawn digit, and a model trained on it."""
    folder = tmp_path_factory.mktemp("noisy")
    data = pipeline.load_data("synthetic", "", "train", 60)
    labels = pipeline.training_examples(data, 0.1).labels
    given = dict.fromkeys(range(5000), 0) | dict(
        zip(data.dataset_indices.tolist(), labels.tolist(), strict=True)
    )
    assert labels[0] == data.labels[0]  # it is not corrupted, so it needs no row
    del given[data.dataset_indices[0].item()]
    with (folder / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("index", "label"), *given.items()])
    return folder, succeed(folder, TRAIN, *DATA, *RECIPE, "--noisy_labels", "labels.csv")


def test_labels_from_a_file_give_the_results_of_the_same_corruption(trained, noisy, tmp_path):
    """Training and ranking are equal. The labels of the data set are the true labels."""
    corrupted = shutil.copytree(trained[0], tmp_path / "corrupted")  # others share the original
    given, output = noisy
    models = (
        corrupted / "checkpoints" / "model_corrupt_0.1.pth",
        given / "checkpoints" / "model_noisy.pth",
    )
    (one, found), (two, other) = map(pipeline.load_checkpoint, models)
    assert all(
        torch.equal(tensor, two.state_dict()[name]) for name, tensor in one.state_dict().items()
    )
    assert found["data_sha256"] == other["data_sha256"]
    assert torch.equal(found["margins"].nan_to_num(), other["margins"].nan_to_num())
    assert (
        "labels.csv: 59 rows of training images, 4940 of others; " in output
        and "(6 with a wrong label)" in output
    )

    commands = printed_commands(output)
    assert [name for name, *_ in commands] == [DETECT, ANALYZE] and all(
        "labels.csv" in words for words in commands
    )
    summary = succeed(given, *commands[0])
    assert "Inspecting 10 % of the training set finds" in summary
    succeed(given, *commands[1], "--num_query_examples", 2)
    succeed(corrupted, DETECT, *SYNTHETIC)
    rankings = [
        read_table(result_folder(folder, model.stem) / "suspects_ekfac.csv")
        for folder, model in zip((corrupted, given), models, strict=True)
    ]
    assert rankings[0] == rankings[1]


def test_a_model_of_other_labels_is_refused(noisy, tmp_path):
    folder, _ = noisy
    (tmp_path / "labels.csv").write_text((folder / "labels.csv").read_text() + "\n")
    finished = run(folder, DETECT, *DATA, "--noisy_labels", tmp_path / "labels.csv")
    assert finished.status == 2 and "was trained on other images or labels" in finished.err
    assert "--noisy_labels labels.csv" in finished.err


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("index,label\n1,3\n1,4\n", "line 3: image 1 has a row before this one"),
        ("index,label\n1,eleven\n", "line 2: 'eleven' is none of the classes 0, 1, 2"),
        ("index,label\n77,3\n", "none of its 1 rows is about a training image"),
        ("index,label\n", "none of its 0 rows is about a training image"),
        ("index,new_label\n1,3\n", "its first line must name the column 'label'"),
    ],
)
def test_a_mistake_in_the_file_is_named(tmp_path, lines, message):
    data, path = digits(5), tmp_path / "labels.csv"
    path.write_text(lines)
    numbered = replace(data, dataset_indices=torch.arange(5))
    with pytest.raises(pipeline.UserError, match=message):
        pipeline.read_noisy_labels(path, numbered, digits(0, "test"), "")


def test_a_file_names_images_by_path(class_folders, tmp_path, capsys):
    """Rows of test images are only counted. Images without a row keep their label."""
    place = "imagefolder", class_folders
    data, test = (pipeline.load_data(*place, split) for split in ("train", "test"))
    path = tmp_path / "labels.csv"
    path.write_text(
        "path,label\ntrain/cat/1.png,äpfel\ntest/cat/0.png,äpfel\ntrain/cat/2.png,cat\n",
        encoding="utf-8",
    )
    labels, _ = pipeline.read_noisy_labels(path, data, test, class_folders)
    (changed,) = (labels != data.labels).nonzero().flatten().tolist()
    assert (
        data.paths[changed].endswith("train/cat/1.png")
        and data.class_names[labels[changed]] == "äpfel"
    )
    assert (
        "2 rows of training images, 1 of others; changed labels: cat → äpfel 1"
        in capsys.readouterr().out
    )


# Name in a row. True: it names an image that is not trained on, so the row is only counted. False:
# it names no image.
NOT_TRAINED_ON = {
    "of the test split": ("test/cat/0.png", True),
    "not drawn": ("{not_drawn}", True),
    "not drawn, of a data set that was moved": ("/gone/{not_drawn}", True),
    "encoded twice": ("%2563at/1.png", False),
    "no file": ("train/cat/99.png", False),
    "no file, as a URL": ("file:///gone/train/cat/%C3%A9%202.png", False),
    "a URL that no file has": ("file:///gone/%00.png", False),
    "a folder": ("train/cat", False),
}


@pytest.mark.parametrize("kind", NOT_TRAINED_ON)
def test_a_row_that_names_no_image_is_an_error_and_other_images_are_counted(
    class_folders, tmp_path, capsys, kind
):
    everything = pipeline.load_data("imagefolder", class_folders, "train")
    data = pipeline.load_data("imagefolder", class_folders, "train", 7)
    test = pipeline.load_data("imagefolder", class_folders, "test")
    absent = next(path for path in everything.paths if path not in data.paths)
    name, is_image = NOT_TRAINED_ON[kind]
    name = name.format(not_drawn=os.path.relpath(absent, class_folders))
    path = tmp_path / "labels.csv"
    path.write_text(f"path,label\n{data.paths[0]},cat\n{name},cat\n{name},cat\n")
    if is_image:
        pipeline.read_noisy_labels(path, data, test, class_folders)
        assert "1 rows of training images, 2 of others" in capsys.readouterr().out
    else:
        with pytest.raises(pipeline.UserError, match=r"line 3: .*there is no such file \(2 such"):
            pipeline.read_noisy_labels(path, data, test, class_folders)


def test_a_table_of_suspects_is_refused_because_its_index_counts_the_loaded_images(noisy, tmp_path):
    folder = shutil.copytree(noisy[0], tmp_path / "noisy")
    labels = ("--noisy_labels", "labels.csv")
    succeed(folder, DETECT, *DATA, *labels, "--factor_strategy", "none")
    table = result_folder(folder, "model_noisy-") / "suspects_none.csv"
    sentence = refused(folder, TRAIN, *DATA, *RECIPE, "--noisy_labels", table)
    assert "is a table of suspects, whose index counts only the loaded images" in sentence


def test_an_index_beyond_the_data_set_is_an_error(tmp_path):
    path = tmp_path / "labels.csv"
    data = digits(5)
    path.write_text(f"index,label\n{data.dataset_indices[0]},1\n5000,3\n")
    with pytest.raises(
        pipeline.UserError, match="line 3: there is no training image 5000, only 0 to 4999"
    ):
        pipeline.read_noisy_labels(path, data, digits(0, "test"), "")


# ---- Labels from a command -----------------------------------------------------------------------


def test_labels_from_a_command_are_read_once_and_kept_by_the_checkpoint(noisy, tmp_path):
    """An example is `--noisy_labels <(cat labels.csv)`. The printed command needs no file."""
    reader, writer = os.pipe()
    os.write(writer, (noisy[0] / "labels.csv").read_bytes())  # less than a pipe holds
    os.close(writer)
    name = f"/dev/fd/{reader}"
    output = succeed(tmp_path, TRAIN, *DATA, *RECIPE, "--noisy_labels", name)
    again = succeed(tmp_path, *printed_commands(output)[0], "--factor_strategy", "identity")
    os.close(reader)
    assert f"{name} cannot be read again: the labels in the checkpoint are used" in again
    models = [folder / "checkpoints" / "model_noisy.pth" for folder in (noisy[0], tmp_path)]
    (_, expected), (_, found) = map(pipeline.load_checkpoint, models)
    assert torch.equal(found["given_labels"], expected["given_labels"])
    assert found["labels_sha256"] == expected["labels_sha256"]


def test_a_deleted_file_is_not_needed_but_another_missing_file_is_refused(noisy, tmp_path):
    shutil.copytree(noisy[0] / "checkpoints", tmp_path / "checkpoints")
    flags = (DETECT, *DATA, "--factor_strategy", "identity", "--noisy_labels")
    assert "labels.csv cannot be read again" in succeed(tmp_path, *flags, "labels.csv")
    assert "lables.csv cannot be read (no such file)" in refused(tmp_path, *flags, "lables.csv")
    for name in (".", "checkpoints"):
        assert f"{name} cannot be read (it is a folder)" in refused(tmp_path, *flags, name)
