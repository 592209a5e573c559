"""Checkpoints along the way, subsets, several models, factors from fewer images: each against what it stands for."""

import csv
import json
import re
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import analyze
import pipeline

DATA = ("--dataset", "synthetic", "--num_train_examples", "40", "--device", "cpu", "--precision", "fp32")
TRAIN = (*DATA, "--train_batch_size", "8", "--num_train_epochs", "2", "--learning_rate", "0.05")
CORRUPTED = ("--corrupt_percentage", "0.2")
DIAGONAL = ("--factor_strategy", "diagonal")
QUERIES = ("--num_query_examples", "4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, script):
    """A folder with a model that kept the weights of both epochs, another seed's, and three of halves of the images."""
    root = tmp_path_factory.mktemp("retraining")
    for flags in (
        ("--save_epochs", "1,2"),
        ("--seed", 7, "--checkpoint_dir", "other"),
        *(("--subset_fraction", 0.5, "--subset_seed", seed, "--checkpoint_dir", "halves") for seed in range(3)),
    ):
        process = script(root, "train.py", *TRAIN, *CORRUPTED, *flags)
        assert process.returncode == 0, process.stderr
    assert "analyze.py" in process.stdout and "--retrained_dir halves" in process.stdout
    return root


def loaded(folder, name="checkpoints/model_corrupt_0.2.pth"):
    """Model, metadata, training examples and corrupted ones of a checkpoint."""
    return pipeline.load_trained(folder / name, "cpu", pipeline.load_train_data("synthetic", "", 40), 0.2)


def influence_run(folder, data, model, **settings):
    """An InfluenceRun in float32 with the pseudo-labels that are the scripts' default."""
    settings |= {"output_dir": folder, "dtype": torch.float32, "seed": 1004, "batch_size": 64}
    return pipeline.InfluenceRun(model, data, "model", phases=pipeline.Phases(), **settings)


def columns(folder, name):
    """The columns of a table in a folder, by name, in order of index."""
    with (folder / name).open(newline="", encoding="utf-8") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: int(row["index"]))
    return {name: [row[name] for row in rows] for name in rows[0]}


# --------------------------------------------------------------------------------------------------
# Subsets
# --------------------------------------------------------------------------------------------------


def test_subsets_follow_their_seed_and_nothing_else():
    """Halves of 2,000 share 500 give or take 11 with another half, and 100 give or take 7 with a tenth of them."""
    halves = [set(pipeline.draw_subset(2000, 0.5, seed).excluded) for seed in (0, 1, pipeline.CORRUPTION_SEED)]
    assert all(len(half) == 1000 for half in halves)
    assert halves[0] == set(pipeline.draw_subset(2000, 0.5, 0).excluded)
    wrong = set(pipeline.corrupt_labels(torch.zeros(2000, dtype=torch.int64), 0.1, 10)[1].nonzero().squeeze(1).tolist())
    for half in halves:
        assert 65 < len(half & wrong) < 135
        assert sorted(len(half & other) for other in halves)[:2] == pytest.approx([500, 500], abs=55)


def test_a_subset_model_is_trained_on_its_subset(folder):
    clean = pipeline.load_train_data("synthetic", "", 40)
    for seed in range(3):
        _, metadata = pipeline.load_checkpoint(folder / f"halves/model_corrupt_0.2_subset_0.5_{seed}.pth")
        subset = pipeline.draw_subset(40, 0.5, seed)
        assert metadata["cleaning"] == subset and metadata["num_train"] == 20
        data, _ = pipeline.training_examples(clean, 0.2, subset)
        assert metadata["labels_sha256"] == pipeline.sha256(data.labels)


# --------------------------------------------------------------------------------------------------
# Checkpoints along the way
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def detected(folder, script):
    """The table of a detection by the sum over checkpoints, and what it printed."""
    flags = (*DATA, *CORRUPTED, *DIAGONAL, "--method", "self_influence_checkpoints")
    process = script(folder, "detect_mislabeled_dataset.py", *flags)
    assert process.returncode == 0, process.stderr
    (table,) = folder.glob("influence_results/model*/suspects_diagonal.csv")
    return columns(table.parent, table.name), process.stdout


def test_the_sum_over_checkpoints_is_the_sum_of_single_runs(folder, detected, tmp_path):
    model, metadata, data, _ = loaded(folder)
    expected = torch.zeros(40)
    for epoch in (1, 2):
        model.load_state_dict(metadata["epoch_weights"][epoch])
        expected += influence_run(tmp_path, data, model.eval(), strategy="diagonal").self_influence(None)[0]
    found = [float(value) for value in detected[0]["self_influence_checkpoints"]]
    assert found == pytest.approx(expected.tolist(), rel=1e-5)
    order = np.argsort([int(rank) for rank in detected[0]["rank"]])
    assert [found[i] for i in order] == sorted(found, reverse=True)


def test_the_last_checkpoint_is_not_computed_twice(detected):
    assert detected[1].count("Reusing the scores") == 1


def test_combined_is_the_mean_rank_by_margin_and_checkpoints(detected):
    values = {name: np.array(detected[0][name], dtype=float) for name in ("aum", "self_influence_checkpoints")}
    expected = sum(pipeline.ranks(scores) for scores in values.values()) / 2
    assert [float(value) for value in detected[0]["combined"]] == pytest.approx(expected.tolist())


def test_a_model_without_checkpoints_is_told_how_to_get_some(folder, script):
    flags = (*DATA, *CORRUPTED, "--checkpoint_dir", "other", "--method", "self_influence_checkpoints")
    process = script(folder, "detect_mislabeled_dataset.py", *flags)
    assert process.returncode == 2 and "--save_epochs" in process.stderr and "Traceback" not in process.stderr


def test_the_gradient_norm_squared_is_self_influence_without_curvature(folder, script):
    for flags in ((*DIAGONAL, "--method", "grad_norm"), ("--factor_strategy", "identity")):
        flags = (*DATA, *CORRUPTED, "--checkpoint_dir", "other", "--output_dir", "norms", *flags)
        process = script(folder, "detect_mislabeled_dataset.py", *flags)
        assert process.returncode == 0, process.stderr
    (results,) = folder.glob("norms/model*")
    norms = np.array(columns(results, "suspects_diagonal.csv")["grad_norm"], dtype=float)
    squares = np.array(columns(results, "suspects_identity.csv")["self_influence"], dtype=float)
    assert norms**2 == pytest.approx(squares, rel=1e-5)


# --------------------------------------------------------------------------------------------------
# The linear datamodeling score
# --------------------------------------------------------------------------------------------------

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
def analyzed(folder, script):
    """What analyze.py said and wrote with two strategies' scores, retrained models and the mean of two models."""
    one = script(folder, "analyze.py", *DATA, *CORRUPTED, *QUERIES, "--factor_strategy", "identity")
    assert one.returncode == 0, one.stderr
    more = ("--retrained_dir", "halves", "--average_with", "other")
    both = script(folder, "analyze.py", *DATA, *CORRUPTED, *QUERIES, *DIAGONAL, *more)
    assert both.returncode == 0, both.stderr
    (results,) = folder.glob("influence_results/model_corrupt_0.2_mean_of_2-*")
    return results, json.loads((results / "pairwise_diagonal.json").read_text()), both.stdout


def test_several_models_give_the_mean_of_their_scores(folder, analyzed):
    mean = load_file(analyzed[0] / "pairwise_diagonal.safetensors")["all_modules"]
    single = folder.glob("influence_results/model_corrupt_0.2-*/scores_pairwise*diagonal*/pairwise_scores.safetensors")
    single = [load_file(path)["all_modules"] for path in single]
    assert len(single) == 2 and not torch.equal(*single)
    assert torch.allclose(mean, (single[0] + single[1]) / 2)
    assert (analyzed[0] / "top_influences_diagonal.csv").is_file()


def test_the_linear_datamodeling_score_of_all_scores_that_there_are(folder, analyzed):
    results, record, output = analyzed
    found = record["linear_datamodeling_scores"]
    assert [
        re.sub(r"-[0-9a-f]{8} ", " ", name) for name in sorted(found, key=lambda name: ("mean" in name, name[26:]))
    ] == [
        "model_corrupt_0.2 diagonal-float32-seed1004-damping-heuristic",
        "model_corrupt_0.2 diagonal-float32-seed1004-damping-heuristic",
        "model_corrupt_0.2 identity-float32-seed1004-damping-0.0",
        "model_corrupt_0.2_mean_of_2 diagonal",
    ]
    queries = pipeline.load_test_data("synthetic", "").take(torch.arange(4))
    trained_on, margins = [], []
    for path in sorted(folder.glob("halves/*.pth")):
        model, metadata = pipeline.load_checkpoint(path)
        trained_on.append([i not in metadata["cleaning"].excluded for i in range(40)])
        with torch.no_grad():
            probability = model(pipeline.normalize(queries.images)).softmax(1).gather(1, queries.labels[:, None])[:, 0]
        margins.append((probability / (1 - probability)).log())
    mean = load_file(results / "pairwise_diagonal.safetensors")["all_modules"]
    expected = analyze.linear_datamodeling_scores(mean, torch.tensor(trained_on), torch.stack(margins))
    row = found[f"{results.name} diagonal"]
    assert row["mean"] == pytest.approx(expected.mean())
    assert row["standard_error"] == pytest.approx(expected.std(ddof=1) / 2)
    assert f"{row['mean']:7.4f} ± {row['standard_error']:.4f}   {results.name} diagonal" in output


def test_subsets_of_different_sizes_are_refused(folder, script, tmp_path):
    flags = ("--subset_fraction", 0.25, "--checkpoint_dir", tmp_path / "mixed")
    assert script(folder, "train.py", *TRAIN, *CORRUPTED, *flags).returncode == 0
    shutil.copy(folder / "halves/model_corrupt_0.2_subset_0.5_0.pth", tmp_path / "mixed")
    process = script(folder, "analyze.py", *DATA, *CORRUPTED, *QUERIES, "--retrained_dir", tmp_path / "mixed")
    assert process.returncode == 2 and "[10, 20]" in process.stderr


@pytest.mark.parametrize(
    ("subset", "asked", "message"),
    [
        (
            ("--subset_fraction", 0.5),
            "--retrained_dir",
            "subset_0.5_0.pth and the model to explain were trained with another --learning_rate",
        ),
        ((), "--average_with", "model_corrupt_0.2.pth were trained with another --learning_rate"),
    ],
)
def test_models_of_another_recipe_are_refused(folder, script, tmp_path, subset, asked, message):
    shutil.copy(folder / "halves/model_corrupt_0.2_subset_0.5_1.pth", tmp_path)
    flags = (*subset, "--learning_rate", 0.06, "--checkpoint_dir", tmp_path)
    assert script(folder, "train.py", *TRAIN, *CORRUPTED, *flags).returncode == 0
    process = script(folder, "analyze.py", *DATA, *CORRUPTED, *QUERIES, asked, tmp_path)
    assert process.returncode == 2 and message in process.stderr


def test_a_model_is_not_averaged_with_itself(folder, script, tmp_path):
    """Neither in the same folder by another name, nor in a copy."""
    shutil.copytree(folder / "checkpoints", tmp_path / "copy")
    for other in (folder / "checkpoints", tmp_path / "copy"):
        process = script(folder, "analyze.py", *DATA, *CORRUPTED, *QUERIES, *DIAGONAL, "--average_with", other)
        assert process.returncode == 2 and "the same model" in process.stderr


def test_models_cleaned_in_different_ways_are_not_averaged(folder, script, tmp_path):
    for index in (3, 4):
        (tmp_path / "decided.csv").write_text(f"index,new_label\n{index},\n")
        flags = ("--corrections", tmp_path / "decided.csv", "--checkpoint_dir", tmp_path / str(index))
        assert script(tmp_path, "train.py", *TRAIN, *CORRUPTED, *flags).returncode == 0
    flags = ("--cleaned", "--checkpoint_dir", tmp_path / "3", "--average_with", tmp_path / "4")
    process = script(tmp_path, "analyze.py", *DATA, *CORRUPTED, *QUERIES, *flags)
    assert process.returncode == 2 and "other images or labels" in process.stderr
    assert not list(tmp_path.glob("influence_results/model*"))


def test_retrained_models_of_other_images_are_refused(folder, script):
    flags = ("--dataset", "synthetic", "--num_train_examples", "30", *CORRUPTED, "--checkpoint_dir", "thirty")
    assert script(folder, "train.py", *flags, "--train_batch_size", 8, "--num_train_epochs", 1).returncode == 0
    process = script(folder, "analyze.py", *flags, *QUERIES, "--retrained_dir", "halves")
    assert process.returncode == 2 and "model_corrupt_0.2_subset_0.5_0.pth was trained on other" in process.stderr


def test_one_retrained_model_is_too_few(folder, script, tmp_path):
    shutil.copy(folder / "halves/model_corrupt_0.2_subset_0.5_0.pth", tmp_path)
    process = script(folder, "analyze.py", *DATA, *CORRUPTED, *QUERIES, "--retrained_dir", tmp_path)
    assert process.returncode == 2 and "has 1 of the models" in process.stderr


# --------------------------------------------------------------------------------------------------
# Factors from fewer images
# --------------------------------------------------------------------------------------------------


def factors(folder, data, model, **settings):
    """The factors that an InfluenceRun fits, by file and layer."""
    run = influence_run(folder, data, model, strategy="ekfac", **settings)
    run.fit_factors()
    (place,) = run.folder.glob("factors_*")
    return {
        (path.stem, name): tensor for path in place.glob("*.safetensors") for name, tensor in load_file(path).items()
    }


def test_factors_of_fewer_images_are_those_of_a_random_subset(tmp_path, monkeypatch):
    """Of five of ten images: as fitted on these five, with their own pseudo-labels, and not as on all ten."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 5, stride=4, bias=False), torch.nn.Flatten(), torch.nn.Linear(196, 10, bias=False)
    )
    data = pipeline.generate_digits("", "train", 10)
    chosen = torch.randperm(10, generator=torch.Generator().manual_seed(pipeline.FACTORS_SEED))[:5]
    everything = factors(tmp_path / "all", data, model)
    found = factors(tmp_path / "flag", data, model, factor_examples=5)
    uniforms = pipeline.InfluenceDataset(data, 1004).uniforms[chosen]
    monkeypatch.setattr(torch, "rand", lambda *shape, generator: uniforms)
    expected = factors(tmp_path / "subset", data.take(chosen), model)
    assert found.keys() == expected.keys()
    assert not any(
        torch.allclose(found[name].float(), everything[name].float()) for name in found if "num" not in name[0]
    )
    for name, tensor in found.items():
        if "eigen" not in name[0]:  # of which the signs are free
            assert torch.allclose(tensor.float(), expected[name].float(), rtol=1e-3, atol=1e-6), name


def test_more_factor_examples_than_images(folder, script):
    process = script(folder, "analyze.py", *DATA, *CORRUPTED, "--factor_examples", 41)
    assert process.returncode == 2 and "there are only 40 training images" in process.stderr
