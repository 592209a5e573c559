"""Runs every script as a user does: files, fields, messages, exit status."""

import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import (
    ANALYZE,
    DETECT,
    ROOT,
    SYNTHETIC,
    TRAIN,
    digits,
    read_table,
    result_folder,
    run,
    succeed,
)
from safetensors.torch import load_file

import analyze
import detect_mislabeled_dataset as detect
import pipeline

SECONDS = {
    "load",
    "covariance",
    "eigendecomposition",
    "lambda",
    "index",
    "scores",
    "report",
    "total",
}
NUM_TRAIN = 60
NUM_CORRUPTED = 6
# Fields of both json files, before and after those of one script.
FIRST_FIELDS = ("flags", "num_train")
LAST_FIELDS = (
    "seconds",
    "peak_memory_bytes",
    "device",
    "device_name",
    "cpu_threads",
    "versions",
)


def check_record(record, **flags):
    """Checks the fields that both json files have."""
    assert set(record["seconds"]) == SECONDS
    assert record["seconds"]["total"] >= record["seconds"]["scores"] > 0
    assert record["num_train"] == NUM_TRAIN and record["peak_memory_bytes"] > 1e8
    assert record["device"] == "cpu" and record["versions"]["torch"] == str(torch.__version__)
    assert flags.items() <= record["flags"].items()


# ---- train.py ------------------------------------------------------------------------------------


def test_train_prints_epochs_and_results_and_writes_the_checkpoint(trained):
    folder, output = trained
    lines = output.splitlines()
    assert re.fullmatch(r"\d+ CPU threads, (float32|bfloat16)", lines[0])
    assert lines[1].startswith(
        "60 training images (6 with a wrong label), 50 test images, 10 classes"
    )
    for name in ("epoch   1/1", "train  ", "train, true labels", "test"):
        assert any(line.startswith(name) for line in lines), name
    assert any("wrote checkpoints/model_corrupt_0.1.pth" in line for line in lines)
    _, metadata = pipeline.load_checkpoint(folder / "checkpoints" / "model_corrupt_0.1.pth")
    assert metadata["corrupt_percentage"] == 0.1 and metadata["num_train"] == NUM_TRAIN
    assert metadata["class_names"] == [str(digit) for digit in range(10)]
    assert metadata["learning_rate"] == 0.4 and metadata["seed"] == 1004
    assert metadata["environment"]["versions"]["torch"] == str(torch.__version__)


def test_imagefolder_end_to_end(folders, tmp_path):
    """Names of files and folders contain spaces and umlauts."""
    flags = (
        "--dataset",
        "imagefolder",
        "--dataset_dir",
        folders,
        "--device",
        "cpu",
        "--checkpoint_dir",
        "ein Ordner",
    )
    succeed(tmp_path, TRAIN, *flags, "--train_batch_size", 5, "--num_train_epochs", 1)
    assert (tmp_path / "ein Ordner/model.pth").is_file()
    out = succeed(tmp_path, DETECT, *flags, "--factor_strategy", "identity")
    assert "No label is known to be wrong, so there is no recall" in out
    _, rows = read_table(result_folder(tmp_path) / "suspects_identity.csv")
    assert len(rows) == 15
    assert "3 classes in" in out and "cat 5, grey owl 5, äpfel 5" in out
    assert all(f"/{row['label']}/" in row["path"] for row in rows)
    assert {row["predicted_label"] for row in rows} <= {"cat", "grey owl", "äpfel"}
    assert not (result_folder(tmp_path) / "detection_curve_identity.png").exists()
    succeed(tmp_path, ANALYZE, *flags, "--factor_strategy", "diagonal")
    assert (
        json.loads((result_folder(tmp_path) / "pairwise_diagonal.json").read_text())["num_query"]
        == 6
    )


# ---- detect_mislabeled_dataset.py ----------------------------------------------------------------


@pytest.fixture(scope="module")
def detected(trained, tmp_path_factory):
    """The folder and output of a detection, on a copy of the trained folder."""
    folder = tmp_path_factory.mktemp("detected")
    shutil.copytree(trained[0], folder, dirs_exist_ok=True)
    return folder, succeed(folder, DETECT, *SYNTHETIC)


def printed_paths(folder, output):
    """The printed paths of written files, and those of score files, as two lists."""
    lines = output.splitlines()
    return [
        [folder / line.removeprefix(word) for line in lines if line.startswith(word)]
        for word in ("wrote ", "scores in ")
    ]


def test_a_detection_prints_recall_and_the_paths_of_its_files(detected):
    folder, output = detected
    lines = output.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("inspected"))
    assert " ".join(lines[start].split()) == "inspected 1 % 5 % 10 % 20 % 30 % 50 % AUROC"
    assert [line.split()[0] for line in lines[start + 1 : start + 7]] == [*detect.RANKINGS]
    assert any(line.startswith("Inspecting 10 % of the training set finds ") for line in lines)
    written, (scores,) = printed_paths(folder, output)
    assert [path.name for path in written] == [
        "suspects_ekfac.csv",
        "suspects_ekfac.html",
        "suspects_ekfac.png",
        "detection_curve_ekfac.png",
        "detection_ekfac.json",
    ]
    assert scores.name == "self_scores.safetensors"
    assert all(path.is_file() for path in [*written, scores])


def test_a_detection_without_influence_writes_the_same_other_rankings(detected, trained, tmp_path):
    """No influence is computed, and tables and json files contain no result of influence."""
    shutil.copytree(trained[0], tmp_path, dirs_exist_ok=True)
    output = succeed(tmp_path, DETECT, *SYNTHETIC, "--factor_strategy", "none")
    written, scores = printed_paths(tmp_path, output)
    results = result_folder(tmp_path)
    assert scores == [] and {path.name for path in results.iterdir()} == {
        "suspects_none.csv",
        "suspects_none.html",
        "suspects_none.png",
        "detection_curve_none.png",
        "detection_none.json",
    }
    assert sorted(written) == sorted(results.iterdir())
    header, rows = read_table(results / "suspects_none.csv")
    full_header, full_rows = read_table(result_folder(detected[0]) / "suspects_ekfac.csv")
    assert header == [name for name in full_header if name != "self_influence"]
    assert rows == [{name: row[name] for name in header} for row in full_rows]
    record, full = (
        json.loads(path.read_text())
        for path in (
            results / "detection_none.json",
            result_folder(detected[0]) / "detection_ekfac.json",
        )
    )
    del full["rankings"]["self_influence"]
    assert record["rankings"] == full["rankings"]
    assert record["seconds"]["scores"] == record["seconds"]["covariance"] == 0
    assert not any(line.startswith("self_influence") for line in output.splitlines())


def test_the_table_of_suspects_has_the_saved_scores_and_the_corrupted_labels(detected):
    header, rows = read_table(result_folder(detected[0]) / "suspects_ekfac.csv")
    assert header == [*detect.FIRST_COLUMNS, *detect.RANKINGS, *detect.LAST_COLUMNS]
    assert [int(row["rank"]) for row in rows] == list(range(1, NUM_TRAIN + 1))
    scores = [float(row["aum_vote"]) for row in rows]
    assert scores == sorted(scores, reverse=True)
    (path,) = result_folder(detected[0]).glob("scores_self*/self_scores.safetensors")
    saved = load_file(path)["all_modules"]
    assert saved.dtype == torch.float32
    rows.sort(key=lambda row: int(row["index"]))
    assert [float(row["self_influence"]) for row in rows] == pytest.approx(saved.tolist(), rel=1e-6)
    data = pipeline.training_examples(digits(NUM_TRAIN), 0.1)
    for row, label, is_corrupted in zip(
        rows, data.labels.tolist(), data.is_corrupted.tolist(), strict=True
    ):
        assert row["label"] == str(label) and row["is_corrupted"] == str(int(is_corrupted))
        assert (
            row["predicted_label"] in map(str, range(10))
            and row["path"] == ""
            and float(row["loss"]) > 0
        )
        assert (row["predicted_label"] == row["label"]) == (float(row["margin"]) < 0)


def test_the_json_file_has_the_recall_of_each_ranking_in_the_table(detected):
    record = json.loads((result_folder(detected[0]) / "detection_ekfac.json").read_text())
    defaults = {"factor_examples": 1000, "num_review": 500, "explain": 0}
    check_record(
        record,
        corrupt_percentage=0.1,
        factor_strategy="ekfac",
        damping_factor="heuristic",
        **defaults,
    )
    assert list(record) == [*FIRST_FIELDS, "num_corrupted", "rankings", *LAST_FIELDS]
    assert record["num_corrupted"] == NUM_CORRUPTED
    _, rows = read_table(result_folder(detected[0]) / "suspects_ekfac.csv")
    rows.sort(key=lambda row: int(row["index"]))
    is_corrupted = np.array([row["is_corrupted"] == "1" for row in rows])
    assert set(record["rankings"]) == set(detect.RANKINGS)
    for name, found in record["rankings"].items():
        assert found == detect.evaluate_ranking(
            np.array([np.float32(row[name]) for row in rows]), is_corrupted
        )


# ---- Figures and records -------------------------------------------------------------------------


def test_figures_do_not_depend_on_the_style_of_the_users_matplotlib(tmp_path):
    import matplotlib

    figures = []
    for style in ({}, {"font.size": 90, "savefig.facecolor": "red"}):
        with matplotlib.rc_context(style):
            pipeline.draw_contact_sheet(
                tmp_path / "s.png", digits(3).images, ["text"] * 3, ["black"] * 3, 10, "title"
            )
        figures.append((tmp_path / "s.png").read_bytes())
    assert figures[0] == figures[1]


# matplotlib reads MPLBACKEND when it is imported, so each name needs a new process. matplotlib
# refuses the first name if that package is missing, and it always refuses the second name.
DRAW = {
    "module://matplotlib_inline.backend_inline": (
        "pipeline.draw_contact_sheet(PATH, digits(3).images, 'abc', 'rgb', 10, 't')"
    ),
    "no_such_backend": "detect.plot_curves(PATH, DETECTION, RESULTS)",
}


@pytest.mark.parametrize("backend", DRAW)
def test_figures_are_drawn_whatever_backend_the_environment_names(tmp_path, backend):
    """Notebooks set MPLBACKEND for the processes that they start."""
    code = f"""
import os, pathlib, types
import numpy as np
import torch
import conftest
import detect_mislabeled_dataset as detect, pipeline
from conftest import digits
PATH = pathlib.Path({str(tmp_path / "figure.png")!r})
DATA = types.SimpleNamespace(is_corrupted=torch.tensor([True, False]))
DETECTION = types.SimpleNamespace(data=DATA, method="aum", strategy="ekfac")
RESULTS = {{"aum": detect.evaluate_ranking(np.array([2.0, 1.0]), np.array([True, False]))}}
{DRAW[backend]}
print(os.environ["MPLBACKEND"])
"""
    environment = {**os.environ, "MPLBACKEND": backend, "PYTHONPATH": str(ROOT / "tests")}
    finished = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == f"{backend}\n", "the variable of the user must not change"
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_a_record_is_written_before_figures_and_again_with_their_seconds(tmp_path):
    path, seconds = tmp_path / "record.json", {"load": 1.5}

    def recorded():
        return pipeline.recorded(
            path,
            flags={"seed": 3},
            fields={"num_train": 9},
            device=torch.device("cpu"),
            seconds=seconds,
        )

    def read():
        record = json.loads(path.read_text())
        return record["flags"], record["num_train"], record["seconds"]["total"]

    with pytest.raises(OSError, match="no font"), recorded():
        assert read() == ({"seed": 3}, 9, 1.5)
        seconds["report"] = 2.0
        raise OSError("no font")
    assert read() == ({"seed": 3}, 9, 1.5)
    with recorded():
        seconds["report"] = 4.0
    assert read() == ({"seed": 3}, 9, 5.5)


def test_a_record_with_a_nan_is_refused_and_not_written(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        pipeline.write_record(
            tmp_path / "record.json",
            flags={},
            fields={"recall": float("nan")},
            device=torch.device("cpu"),
            seconds={},
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("script", "files"), [(DETECT, ("suspects", "detection")), (ANALYZE, ("top_infl", "pairwise"))]
)
def test_other_files_are_written_if_a_figure_fails(trained, tmp_path, monkeypatch, script, files):
    def draw(*_, **__):
        raise OSError("no font")

    shutil.copytree(trained[0], tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(pipeline, "draw_contact_sheet", draw)
    finished = run(tmp_path, script, *SYNTHETIC, "--factor_strategy", "identity")
    assert finished.status == 1 and "no font" in finished.err
    names = [path.name for path in result_folder(tmp_path).glob("*_identity.*")]
    assert all(any(name.startswith(file) for name in names) for file in files)


# ---- analyze.py ----------------------------------------------------------------------------------


def test_analyze_reuses_the_factors_of_detect_and_writes_its_files(detected):
    folder, _ = detected
    out = succeed(folder, ANALYZE, *SYNTHETIC, "--num_query_examples", 7, "--query_batch_size", 3)
    assert out.count("Reusing") == out.count("/factors_ekfac") == 1
    results = result_folder(folder)
    record = json.loads((results / "pairwise_ekfac.json").read_text())
    check_record(record, num_query_examples=7, query_batch_size=3, damping_factor=1e-6)
    (path,) = results.glob("scores_pairwise*/pairwise_scores.safetensors")
    scores = load_file(path)["all_modules"]
    assert scores.dtype == torch.float32 and scores.shape == (7, NUM_TRAIN)
    assert f"scores in {path.relative_to(folder)}\n" in out

    header, rows = read_table(results / "top_influences_ekfac.csv")
    assert header == [*analyze.COLUMNS]
    assert list(record) == [*FIRST_FIELDS, "num_query", *LAST_FIELDS]
    check_top_influences(rows, scores, digits(7, "test"))


def check_top_influences(rows, scores, queries):
    """Checks that each query has its ten highest positive and ten lowest negative scores.

    The first query is the mean over all queries. It has no path and no label.
    """
    assert rows[0]["query"] == "mean"
    assert list(dict.fromkeys(row["query"] for row in rows))[1:] == [
        str(index) for index in queries.indices.tolist()
    ]
    assert {row["query_path"] for row in rows} == {""}
    expected_scores = {"mean": scores.mean(0)}
    labels = {}
    for index, label, row in zip(queries.indices.tolist(), queries.labels, scores, strict=True):
        expected_scores[str(index)] = row
        labels[str(index)] = str(label.item())
    data = pipeline.training_examples(digits(NUM_TRAIN), 0.1)
    for query, expected in expected_scores.items():
        for direction, sign in (("helpful", -1), ("harmful", 1)):
            listed = [row for row in rows if (row["query"], row["direction"]) == (query, direction)]
            assert [int(row["rank"]) for row in listed] == list(range(1, len(listed) + 1))
            strongest = (sign * expected[sign * expected < 0]).sort().values[:10] * sign
            found = [float(row["score"]) for row in listed]
            assert found == pytest.approx(strongest.tolist(), rel=1e-5)
            for row, score in zip(listed, found, strict=True):
                index = int(row["train"])
                assert row["query_label"] == labels.get(query, "")
                assert row["train_label"] == str(data.labels[index].item())
                assert score == pytest.approx(expected[index].item(), rel=1e-5)


def test_with_query_indices_the_mean_is_over_these_queries(detected):
    folder, _ = detected
    flags = ("--factor_strategy", "identity", "--query_indices", "9,3-4")
    out = succeed(folder, ANALYZE, *SYNTHETIC, *flags)
    path = next(line for line in out.splitlines() if line.startswith("scores in ")).split()[-1]
    scores = load_file(folder / path)["all_modules"]
    _, rows = read_table(result_folder(folder) / "top_influences_identity.csv")
    check_top_influences(rows, scores, digits(10, "test").take(torch.tensor([9, 3, 4])))


def test_no_image_is_listed_with_a_direction_that_its_score_contradicts():
    """Scores of two queries on three images; the mean over the queries is (2, -1, 1)."""
    scores = torch.tensor([[1.0, -2.0, 3.0], [3.0, 0.0, -1.0]])
    rows = list(analyze.top_rows([analyze.MEAN_QUERY], scores.mean(0, keepdim=True), "abc"))
    expected = [("helpful", 1, "a", 2.0), ("helpful", 2, "c", 1.0), ("harmful", 1, "b", -1.0)]
    assert rows == [["mean", "", "", *row] for row in expected]


def test_the_figure_of_influences_begins_with_the_mean(monkeypatch, tmp_path):
    """The first row has no query image. It shows the two highest and two lowest mean scores."""
    drawn = []
    monkeypatch.setattr(pipeline, "draw_contact_sheet", lambda path, **cells: drawn.append(cells))
    monkeypatch.setattr(analyze, "NUM_PICTURED", 2)
    queries, data = digits(2, "test"), digits(4)
    scores = torch.tensor([[4.0, 0.0, 1.0, -8.0], [2.0, 4.0, -3.0, -2.0]])  # mean 3, 2, -1, -5
    analyze.plot_top_influences(tmp_path / "figure.png", scores, queries, data, "ekfac")
    (cells,) = drawn
    images, texts, colours = cells["images"], cells["texts"], cells["colours"]
    assert cells["columns"] == 5 and len(images) == len(texts) == len(colours) == 15
    assert images[0].eq(255).all() and images[5].equal(queries.images[0])
    assert torch.stack(images[1:5]).equal(data.images[[0, 1, 3, 2]])
    assert texts[0] == "mean of\n2 test images"
    assert [text.split("\n")[1] for text in texts[1:5]] == ["+3", "+2", "-5", "-1"]
    assert colours[1:5] == [analyze.HELPFUL_COLOUR] * 2 + [analyze.HARMFUL_COLOUR] * 2
