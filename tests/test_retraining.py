"""Subsets, several models, and whether scores predict retraining: each against what it stands for."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import ANALYZE, DETECT, TRAIN, digits, read_table, run, succeed
from safetensors.torch import load_file

import analyze
import detect_mislabeled_dataset as detect
import pipeline
import train

DATA = ("--dataset", "synthetic", "--num_train_examples", "40", "--device", "cpu", "--precision", "fp32")
RECIPE = ("--train_batch_size", "8", "--num_train_epochs", "2", "--learning_rate", "0.05")
CORRUPTED = ("--corrupt_percentage", "0.2")
DIAGONAL = ("--factor_strategy", "diagonal")
QUERIES = ("--num_query_examples", "4")
BOTH = ("--checkpoint_dir", "checkpoints", "other")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a model, another seed's, and three of halves of the images."""
    root = tmp_path_factory.mktemp("retraining")
    succeed(root, TRAIN, *DATA, *RECIPE, *CORRUPTED)
    succeed(root, TRAIN, *DATA, *RECIPE, *CORRUPTED, "--seed", 7, "--checkpoint_dir", "other")
    for seed in range(3):
        flags = ("--subset_fraction", 0.5, "--subset_seed", seed, "--checkpoint_dir", "halves")
        out = succeed(root, TRAIN, *DATA, *RECIPE, *CORRUPTED, *flags)
    assert "analyze.py" in out and "--retrained_dir halves" in out
    return root


# ---- Subsets -------------------------------------------------------------------------------------


def test_subsets_follow_their_seed_and_nothing_else():
    """Halves of 2,000 share 500 give or take 11 with another half, and 100 give or take 7 with a tenth of them."""
    halves = [set(train.draw_subset(2000, 0.5, seed)["excluded"]) for seed in (0, 1, pipeline.CORRUPTION_SEED)]
    assert all(len(half) == 1000 for half in halves)
    assert halves[0] == set(train.draw_subset(2000, 0.5, 0)["excluded"])
    wrong = set(pipeline.corrupt_labels(torch.zeros(2000, dtype=torch.int64), 0.1, 10)[1].nonzero().squeeze(1).tolist())
    for half in halves:
        assert 65 < len(half & wrong) < 135
        assert sorted(len(half & other) for other in halves)[:2] == pytest.approx([500, 500], abs=55)


def test_a_subset_model_is_trained_on_its_subset(folder):
    for seed in range(3):
        _, metadata = pipeline.load_checkpoint(folder / f"halves/model_corrupt_0.2_subset_0.5_{seed}.pth")
        subset = train.draw_subset(40, 0.5, seed)
        assert metadata["cleaning"] == subset and metadata["num_train"] == 20
        assert metadata["data_sha256"] == pipeline.training_examples(digits(40), 0.2, subset).digest


# ---- The linear datamodeling score ---------------------------------------------------------------

# Three images, four models. Sums of the first query's scores (1, 2, 4): 3, 5, 6, 7.
TRAINED_ON = torch.tensor([[1, 1, 0], [1, 0, 1], [0, 1, 1], [1, 1, 1]], dtype=torch.bool)
SCORES = torch.tensor([[1.0, 2.0, 4.0], [1.0, 2.0, 4.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])


def test_the_linear_datamodeling_score_by_hand():
    """Ranks 1 2 3 4 against 1 2 3 4: 1; against 1 3 2 4: 1 - 6 * 2 / 60 = 0.8; no prediction: 0.

    The last query's sums 2, 2, 2, 3 have ranks 2 2 2 4, its margins 4 3 2 1: centred -.5 -.5 -.5 1.5 and 1.5 .5 -.5
    -1.5, whose product sums to -3, over the square root of 3 * 5.
    """
    margins = torch.tensor([[0.1, 0.1, 1.0, 4.0], [0.2, 0.3, 2.0, 3.0], [0.4, 0.2, 3.0, 2.0], [9.0, 0.4, 4.0, 1.0]])
    found = analyze.linear_datamodeling_scores(SCORES, TRAINED_ON, margins)
    assert found.tolist() == pytest.approx([1.0, 0.8, 0.0, -3 / 15**0.5])


@pytest.fixture(scope="module")
def analyzed(folder):
    """The results, the record and the output of analyze.py with retrained models and the mean of two models."""
    out = succeed(folder, ANALYZE, *DATA, *CORRUPTED, *QUERIES, *DIAGONAL, *BOTH, "--retrained_dir", "halves")
    (results,) = folder.glob("influence_results/model_corrupt_0.2_mean_of_2-*")
    return results, json.loads((results / "pairwise_diagonal.json").read_text()), out


def test_several_models_give_the_mean_of_their_scores(folder, analyzed):
    mean = load_file(analyzed[0] / "pairwise_diagonal.safetensors")["all_modules"]
    paths = folder.glob("influence_results/model_corrupt_0.2-*/scores_pairwise_diagonal*/pairwise_scores.safetensors")
    single = [load_file(path)["all_modules"] for path in paths]
    assert len(single) == 2 and not torch.equal(*single)
    assert torch.allclose(mean, (single[0] + single[1]) / 2)
    assert (analyzed[0] / "top_influences_diagonal.csv").is_file()


def test_a_detection_takes_the_mean_over_several_models(folder):
    """Every ranking's signal, image by image, is the mean of those of the single models."""
    tables = []
    for dirs in (BOTH, ("--checkpoint_dir", "checkpoints"), ("--checkpoint_dir", "other")):
        out = succeed(folder, DETECT, *DATA, *CORRUPTED, *DIAGONAL, *dirs)
        path = next(line.split()[1] for line in out.splitlines() if line.endswith("suspects_diagonal.csv"))
        tables.append(sorted(read_table(folder / path)[1], key=lambda row: int(row["index"])))
    for name in detect.RANKINGS:
        mean, *single = ([float(row[name]) for row in table] for table in tables)
        assert mean == pytest.approx(np.mean(single, 0).tolist(), rel=1e-5, abs=1e-6)
        assert single[0] != single[1]


def test_the_linear_datamodeling_score_of_each_model_and_of_their_mean(folder, analyzed):
    results, record, output = analyzed
    found = record["linear_datamodeling_scores"]
    names = [re.sub(r"-[0-9a-f]{8}$", "", name) for name in found]
    assert names == ["model_corrupt_0.2", "model_corrupt_0.2", "model_corrupt_0.2_mean_of_2"]
    queries = digits(4, "test")
    trained_on, margins = [], []
    for path in sorted(folder.glob("halves/*.pth")):
        model, metadata = pipeline.load_checkpoint(path)
        trained_on.append([i not in metadata["cleaning"]["excluded"] for i in range(40)])
        with torch.no_grad():
            probability = model(pipeline.normalize(queries.images)).softmax(1).gather(1, queries.labels[:, None])[:, 0]
        margins.append((probability / (1 - probability)).log())
    mean = load_file(results / "pairwise_diagonal.safetensors")["all_modules"]
    expected = analyze.linear_datamodeling_scores(mean, torch.tensor(trained_on), torch.stack(margins))
    row = found[results.name]
    assert row["mean"] == pytest.approx(expected.mean())
    assert row["standard_error"] == pytest.approx(expected.std(ddof=1) / 2)
    assert f"{row['mean']:7.4f} ± {row['standard_error']:.4f}   {results.name}" in output


# ---- Models that do not belong together ----------------------------------------------------------


def refused(folder, *flags):
    """Runs an analysis in the folder, which must be refused. Returns the sentence."""
    finished = run(folder, ANALYZE, *DATA, *CORRUPTED, *QUERIES, *flags)
    assert finished.status == 2 and finished.err.count("\n") == 1
    return finished.err


def test_subsets_of_different_sizes_are_refused(folder, tmp_path):
    flags = ("--subset_fraction", 0.25, "--checkpoint_dir", tmp_path / "mixed")
    succeed(folder, TRAIN, *DATA, *RECIPE, *CORRUPTED, *flags)
    shutil.copy(folder / "halves/model_corrupt_0.2_subset_0.5_0.pth", tmp_path / "mixed")
    assert "[10, 20]" in refused(folder, "--retrained_dir", tmp_path / "mixed")


@pytest.mark.parametrize("subset", [("--subset_fraction", 0.5), ()], ids=["retrained", "averaged"])
def test_models_of_another_recipe_are_refused(folder, tmp_path, subset):
    shutil.copy(folder / "halves/model_corrupt_0.2_subset_0.5_1.pth", tmp_path)
    flags = (*subset, "--learning_rate", 0.06, "--checkpoint_dir", tmp_path)
    succeed(folder, TRAIN, *DATA, *RECIPE, *CORRUPTED, *flags)
    asked = ("--retrained_dir",) if subset else ("--checkpoint_dir", "checkpoints")
    assert "differ in their recipe" in refused(folder, *asked, tmp_path)


def test_a_model_is_not_averaged_with_itself(folder, tmp_path):
    """Neither in the same folder by another name, nor in a copy."""
    shutil.copytree(folder / "checkpoints", tmp_path / "copy")
    for other in (folder / "checkpoints", tmp_path / "copy"):
        assert "the same model" in refused(folder, *DIAGONAL, "--checkpoint_dir", "checkpoints", other)


def test_models_cleaned_in_different_ways_are_not_averaged(tmp_path):
    for index in (3, 4):
        (tmp_path / "decided.csv").write_text(f"index,new_label\n{index},\n")
        flags = ("--corrections", tmp_path / "decided.csv", "--checkpoint_dir", str(index))
        succeed(tmp_path, TRAIN, *DATA, *RECIPE, *CORRUPTED, *flags)
    assert "differ in their training images or labels" in refused(tmp_path, "--cleaned", "--checkpoint_dir", "3", "4")
    assert not list(tmp_path.glob("influence_results/model*"))


def test_retrained_models_of_other_images_are_refused(folder):
    flags = ("--num_train_examples", "30", "--checkpoint_dir", "thirty")
    succeed(folder, TRAIN, *DATA, *RECIPE, *CORRUPTED, *flags)
    message = refused(folder, *flags, "--retrained_dir", "halves")
    assert (
        "model_corrupt_0.2_subset_0.5_0.pth and the model to explain differ in their training images or labels"
        in message
    )


def test_one_retrained_model_is_too_few(folder, tmp_path):
    shutil.copy(folder / "halves/model_corrupt_0.2_subset_0.5_0.pth", tmp_path)
    assert "has 1 of the models" in refused(folder, "--retrained_dir", tmp_path)


def test_more_factor_examples_than_images(folder):
    assert "there are only 40 training images" in refused(folder, "--factor_examples", 41)
