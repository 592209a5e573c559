"""Labels that people gave, in a csv file in place of those that --corrupt_percentage draws."""

import csv

import pytest
import torch
from conftest import (
    ANALYZE,
    DETECT,
    SYNTHETIC,
    TRAIN,
    digits,
    read_table,
    result_folder,
    run,
    succeed,
)

import pipeline

DATA = [*SYNTHETIC[: SYNTHETIC.index("--corrupt_percentage")], "--device", "cpu"]
RECIPE = ("--train_batch_size", 20, "--num_train_epochs", 1)


@pytest.fixture(scope="module")
def noisy(tmp_path_factory):
    """A folder with labels.csv, of all 5,000 digits but the first that was drawn, and a training on it."""
    folder = tmp_path_factory.mktemp("noisy")
    data = pipeline.load_data("synthetic", "", "train", 60)
    labels = pipeline.training_examples(data, 0.1).labels
    given = dict.fromkeys(range(5000), 0) | dict(
        zip(data.numbers.tolist(), labels.tolist(), strict=True)
    )
    if labels[0] == data.labels[0]:
        del given[data.numbers[0].item()]
    with (folder / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("index", "label"), *given.items()])
    return folder, succeed(folder, TRAIN, *DATA, *RECIPE, "--noisy_labels", "labels.csv")


def test_labels_from_a_file_are_those_that_corruption_gives(trained, noisy):
    """From the training to the ranking; what the data set says counts as the truth."""
    (corrupted, _), (given, output) = trained, noisy
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
        "labels.csv: 59 rows, and 4940 of other images; " in output
        and "(6 with a wrong label)" in output
    )

    commands = [line.split()[1:] for line in output.splitlines() if line.startswith("  python")]
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
        ("index,new_label\n1,3\n", "its first line must name the column 'label'"),
    ],
)
def test_a_mistake_in_the_file_is_named(tmp_path, lines, message):
    data, path = digits(5), tmp_path / "labels.csv"
    path.write_text(lines)
    numbered = data.take(torch.arange(5))
    numbered.numbers[:] = torch.arange(5)
    with pytest.raises(pipeline.UserError, match=message):
        pipeline.read_noisy_labels(path, numbered, digits(0, "test"), "")


def test_files_call_images_by_path(class_folders, tmp_path, capsys):
    """Rows of images that are held out are passed over, and images without a row keep their label."""
    place = "imagefolder", class_folders
    data, test = (pipeline.load_data(*place, split) for split in ("train", "test"))
    path = tmp_path / "labels.csv"
    path.write_text(
        "path,label\ntrain/cat/1.png,äpfel\ntest/cat/0.png,äpfel\ntrain/cat/2.png,cat\n",
        encoding="utf-8",
    )
    labels = pipeline.read_noisy_labels(path, data, test, class_folders)
    (changed,) = (labels != data.labels).nonzero().flatten().tolist()
    assert (
        data.paths[changed].endswith("train/cat/1.png")
        and data.class_names[labels[changed]] == "äpfel"
    )
    assert "2 rows, and 1 of other images; cat → äpfel 1" in capsys.readouterr().out
