"""Every script end to end, as a user runs it: files, fields, messages, exit status."""

import csv
import json
import re

import pytest
import torch
from conftest import ROOT, SYNTHETIC
from PIL import Image
from safetensors.torch import load_file

import pipeline

SECONDS = {"load", "covariance", "eigendecomposition", "lambda", "scores", "report", "total"}
NUM_TRAIN, NUM_CORRUPTED = 60, 6


def rows(path):
    """The header and the rows of a csv file."""
    with path.open(newline="", encoding="utf-8") as file:
        header, *body = csv.reader(file)
    return header, body


def result_folder(folder):
    """The one result folder below influence_results."""
    (found,) = (folder / "influence_results").glob("model*")
    return found


def check_record(record, **flags):
    """The fields that both json files have."""
    assert set(record["seconds"]) == SECONDS
    assert record["seconds"]["total"] >= record["seconds"]["scores"] > 0
    assert record["num_train"] == NUM_TRAIN and record["peak_memory_bytes"] > 1e8
    assert record["device"] == "cpu" and record["versions"]["torch"] == str(torch.__version__)
    assert flags.items() <= record["flags"].items()


def documented(name):
    """The columns or fields in the README's table of a result file, in order."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = text[text.index(f"\n`{name}`") :].split("\n\n")[1].splitlines()
    return [word for row in table[2:] for word in re.findall(r"`(\w+)`", row.split("|")[1])]


# --------------------------------------------------------------------------------------------------
# train.py
# --------------------------------------------------------------------------------------------------


def test_train_prints_epochs_and_results_and_writes_the_checkpoint(trained):
    folder, output = trained
    lines = output.splitlines()
    assert lines[0].startswith("60 training images (6 with a wrong label), 500 test images, 10 classes")
    for name in ("epoch   1/1", "train  ", "train, true labels", "test"):
        assert any(line.startswith(name) for line in lines), name
    assert any("wrote checkpoints/model_corrupt_0.1.pth" in line for line in lines)
    _, metadata = pipeline.load_checkpoint(folder / "checkpoints" / "model_corrupt_0.1.pth")
    assert metadata["corrupt_percentage"] == 0.1 and metadata["num_train"] == NUM_TRAIN
    assert metadata["class_names"] == [str(digit) for digit in range(10)]
    assert metadata["learning_rate"] == 0.4 and metadata["seed"] == 1004
    assert metadata["environment"]["versions"]["torch"] == str(torch.__version__)


def test_training_twice_gives_identical_checkpoints_but_for_the_clock(trained, script, tmp_path):
    folder, _ = trained
    script(tmp_path, "train.py", *SYNTHETIC, "--train_batch_size", 20, "--num_train_epochs", 1)
    once, again = (
        pipeline.load_checkpoint(path / "checkpoints/model_corrupt_0.1.pth")[0] for path in (folder, tmp_path)
    )
    for name, tensor in once.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_imagefolder_end_to_end(script, class_folders, tmp_path):
    flags = ("--dataset", "imagefolder", "--dataset_dir", class_folders, "--device", "cpu")
    process = script(tmp_path, "train.py", *flags, "--train_batch_size", 5, "--num_train_epochs", 1)
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "checkpoints/model.pth").is_file()
    process = script(
        tmp_path, "detect_mislabeled_dataset.py", *flags, "--corrupt_percentage", 0, "--factor_strategy", "identity"
    )
    assert process.returncode == 0, process.stderr
    assert "no truth to compare with" in process.stdout
    _, body = rows(result_folder(tmp_path) / "suspects_identity.csv")
    assert len(body) == 15
    for _, _, path, label, name, *_ in body:
        assert f"/{name}/" in path and ["cat", "grey owl", "äpfel"][int(label)] == name
    assert not (result_folder(tmp_path) / "detection_curve_identity.png").exists()
    process = script(tmp_path, "analyze.py", *flags, "--factor_strategy", "diagonal")
    assert process.returncode == 0, process.stderr
    assert json.loads((result_folder(tmp_path) / "pairwise_diagonal.json").read_text())["num_query"] == 6


# --------------------------------------------------------------------------------------------------
# detect_mislabeled_dataset.py
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def detected(trained, script, tmp_path_factory):
    """The folder and output of a detection with --profile, on a copy of the trained folder."""
    import shutil

    folder = tmp_path_factory.mktemp("detected")
    shutil.copytree(trained[0], folder, dirs_exist_ok=True)
    process = script(folder, "detect_mislabeled_dataset.py", *SYNTHETIC, "--profile")
    assert process.returncode == 0, process.stderr
    return folder, process


def test_detect_prints_table_sentence_and_paths(detected):
    folder, process = detected
    lines = process.stdout.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("inspected"))
    assert " ".join(lines[start].split()) == "inspected 1 % 5 % 10 % 20 % 30 % 50 % AUROC"
    table = [line.split()[0] for line in lines[start + 1 : start + 7]]
    assert table == ["self_influence", "aum", "combined", "loss", "margin", "aum_margin"]
    assert any(line.startswith("Inspecting 10 % of the training set finds ") for line in lines)
    written = [folder / line.removeprefix("wrote ") for line in lines if line.startswith("wrote ")]
    assert {path.name for path in written} == {
        "suspects_ekfac.csv",
        "suspects_ekfac.png",
        "detection_curve_ekfac.png",
        "detection_ekfac.json",
    }
    (scores,) = [folder / line.removeprefix("scores in ") for line in lines if line.startswith("scores in ")]
    assert scores.name == "self_scores.safetensors" and all(path.is_file() for path in [*written, scores])
    assert "Traceback" not in process.stderr and "Warning" not in process.stderr


def test_detect_suspects_csv(detected):
    header, body = rows(result_folder(detected[0]) / "suspects_ekfac.csv")
    assert header == documented("suspects_<strategy>.csv")
    assert [int(row[0]) for row in body] == list(range(1, NUM_TRAIN + 1))
    scores = [float(row[header.index("aum_margin")]) for row in body]
    assert scores == sorted(scores, reverse=True)
    (path,) = result_folder(detected[0]).glob("scores_self*/self_scores.safetensors")
    saved = load_file(path)["all_modules"]
    assert saved.dtype == torch.float32
    assert [float(row[7]) for row in sorted(body, key=lambda row: int(row[1]))] == pytest.approx(
        saved.tolist(), rel=1e-6
    )
    data = pipeline.load_train_data("synthetic", "", NUM_TRAIN)
    labels, is_corrupted = pipeline.corrupt_labels(data.labels, 0.1, 10)
    for _, index, file, label, name, guess, guess_name, _, checkpoints, norm, _, _, loss, _, _, corrupted in body:
        assert checkpoints == norm == "", "methods that were not asked for"
        assert int(label) == labels[int(index)] and name == str(label) and guess_name == str(guess)
        assert bool(int(corrupted)) == is_corrupted[int(index)] and file == "" and float(loss) > 0


def test_detect_json_agrees_with_its_csv(detected):
    import numpy as np

    import detect_mislabeled_dataset as detect

    record = json.loads((result_folder(detected[0]) / "detection_ekfac.json").read_text())
    check_record(record, corrupt_percentage=0.1, factor_strategy="ekfac", damping_factor=None, profile=True)
    assert list(record) == documented("detection_<strategy>.json") and record["num_corrupted"] == NUM_CORRUPTED
    assert set(record["rankings"]) == {"self_influence", "aum", "combined", "loss", "margin", "aum_margin"}
    _, body = rows(result_folder(detected[0]) / "suspects_ekfac.csv")
    body.sort(key=lambda row: int(row[1]))
    is_corrupted = np.array([row[15] == "1" for row in body])
    for name, column in (("self_influence", 7), ("aum", 10), ("loss", 12), ("margin", 13), ("aum_margin", 14)):
        scores = np.array([np.float32(row[column]) for row in body])
        assert record["rankings"][name] == detect.evaluate_ranking(scores, is_corrupted)


def test_detect_pictures_are_pictures(detected):
    for name, least in (("suspects_ekfac.png", (1500, 900)), ("detection_curve_ekfac.png", (800, 600))):
        size = Image.open(result_folder(detected[0]) / name).size
        assert size >= least and size[1] >= least[1]


def test_detect_profile_is_printed_and_saved(detected):
    folder, process = detected
    table = (result_folder(folder) / "profile_ekfac.txt").read_text()
    assert "Fit Lambda" in table and table.strip() in process.stdout


def test_analyze_reuses_the_factors_of_detect_and_writes_its_files(detected, script):
    folder, _ = detected
    process = script(folder, "analyze.py", *SYNTHETIC, "--num_query_examples", 7, "--query_batch_size", 3)
    assert process.returncode == 0, process.stderr
    reused = [line.split()[2] for line in process.stdout.splitlines() if line.startswith("Reusing the ")]
    assert reused == ["covariance", "eigendecomposition", "lambda"]
    results = result_folder(folder)
    record = json.loads((results / "pairwise_ekfac.json").read_text())
    check_record(record, num_query_examples=7, query_batch_size=3)
    (path,) = results.glob("scores_pairwise*/pairwise_scores.safetensors")
    scores = load_file(path)["all_modules"]
    assert scores.dtype == torch.float32 and scores.shape == (7, NUM_TRAIN)
    assert f"scores in {path.relative_to(folder)}\n" in process.stdout

    header, body = rows(results / "top_influences_ekfac.csv")
    assert header == documented("top_influences_<strategy>.csv")
    assert list(record) == documented("pairwise_<strategy>.json")
    test = pipeline.generate_digits("", "test")
    data = pipeline.load_train_data("synthetic", "", NUM_TRAIN)
    labels, _ = pipeline.corrupt_labels(data.labels, 0.1, 10)
    assert len(body) == 7 * 20
    for query in range(7):
        for direction, sign in (("helpful", -1), ("harmful", 1)):
            listed = [row for row in body if int(row[0]) == query and row[4] == direction]
            assert [int(row[5]) for row in listed] == list(range(1, 11))
            expected = (sign * scores[query]).sort().values[:10] * sign
            assert [float(row[10]) for row in listed] == pytest.approx(expected.tolist(), rel=1e-6)
            for _, _, query_label, _, _, _, train, _, train_label, _, score in listed:
                assert int(query_label) == test.labels[query] and int(train_label) == labels[int(train)]
                assert float(score) == pytest.approx(scores[query, int(train)].item(), rel=1e-6)
    assert Image.open(results / "top_influences_ekfac.png").size[0] > 1000
