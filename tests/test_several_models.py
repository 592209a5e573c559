"""Means over several models, and models that must not be averaged."""

import shutil

import numpy as np
import pytest
import torch
from conftest import ANALYZE, DETECT, SYNTHETIC, TRAIN, read_table, refused, succeed
from safetensors.torch import load_file

import detect_mislabeled_dataset as detect
import pipeline

DATA = (*SYNTHETIC, "--num_train_examples", "40", "--precision", "fp32")
TRAINING = (
    TRAIN,
    *DATA,
    "--train_batch_size",
    "8",
    "--num_train_epochs",
    "2",
    "--learning_rate",
    "0.05",
)
ANALYSIS = (ANALYZE, *DATA, "--factor_strategy", "diagonal", "--num_query_examples", "4")
DETECTION = (DETECT, *DATA, "--factor_strategy", "diagonal")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with two models, trained with two seeds."""
    root = tmp_path_factory.mktemp("retraining")
    succeed(root, *TRAINING)
    succeed(root, *TRAINING, "--seed", 7, "--checkpoint_dir", "other")
    return root


def test_several_models_give_the_mean_of_their_scores(folder):
    succeed(folder, *ANALYSIS, "--checkpoint_dir", "checkpoints", "other")
    (results,) = folder.glob("influence_results/model_corrupt_0.1_mean_of_2-*")
    mean = load_file(results / "pairwise_diagonal.safetensors")["all_modules"]
    paths = folder.glob(
        "influence_results/model_corrupt_0.1-*/scores_pairwise_diagonal*/pairwise_scores.safetensors"
    )
    single = [load_file(path)["all_modules"] for path in paths]
    assert len(single) == 2 and not torch.equal(*single)
    assert torch.allclose(mean, (single[0] + single[1]) / 2)
    _, rows = read_table(results / "top_influences_diagonal.csv")
    for query, expected in (("mean", mean.mean(0)), ("0", mean[0])):
        row = next(row for row in rows if row["query"] == query)
        assert float(row["score"]) == pytest.approx(expected.max().item())


def scores_of(folder, *flags):
    """Runs analyze.py. Returns the scores in the file that it prints, [num_query, num_train]."""
    out = succeed(folder, *ANALYSIS, *flags)
    path = next(line for line in out.splitlines() if line.startswith("scores in ")).split()[-1]
    return load_file(folder / path)["all_modules"].clone()


def earlier_checkpoint(folder, name, epoch):
    """Writes the checkpoint of a training as if it had ended after an epoch; returns its folder."""
    path = folder / name / "model_corrupt_0.1.pth"
    model, metadata = pipeline.load_checkpoint(path)
    model.load_state_dict(metadata["snapshots"].pop(epoch))
    del metadata["logits_to_check"]  # those of the final network
    pipeline.save_checkpoint(folder / f"{name}_{epoch}" / path.name, model, metadata)
    return f"{name}_{epoch}"


def test_snapshots_give_the_mean_of_the_scores_of_each_network(folder):
    """A training of two epochs keeps two networks. The mean is over one or two such trainings."""
    singles = []
    for name in ("checkpoints", "other"):
        dirs = (earlier_checkpoint(folder, name, 1), name)
        singles += [scores_of(folder, "--checkpoint_dir", each) for each in dirs]
    assert not torch.allclose(singles[0], singles[1])
    for count in (1, 2):
        dirs = ("checkpoints", "other")[:count]
        found = scores_of(folder, "--snapshots", 2, "--checkpoint_dir", *dirs)
        expected = torch.stack(singles[: 2 * count]).mean(0)
        assert torch.allclose(found, expected, rtol=1e-5, atol=0)
    assert torch.equal(scores_of(folder, "--snapshots", 1), singles[1])


def test_more_snapshots_than_a_training_keeps_are_refused(folder, tmp_path):
    assert (
        "--snapshots 3: checkpoints/model_corrupt_0.1.pth keeps 2 networks of its training"
        in refused(folder, *ANALYSIS, "--snapshots", 3)
    )
    single = earlier_checkpoint(folder, "checkpoints", 1)
    path = folder / single / "model_corrupt_0.1.pth"
    model, metadata = pipeline.load_checkpoint(path)
    del metadata["snapshots"]  # as an earlier train.py left it
    pipeline.save_checkpoint(path, model, metadata)
    output = ("--output_dir", tmp_path, "--checkpoint_dir", single)
    assert "keeps 1 networks of its training" in refused(
        folder, *ANALYSIS, *output, "--snapshots", 2
    )
    assert not list(tmp_path.glob("model*"))
    succeed(folder, *ANALYSIS, *output)


def test_a_detection_takes_the_mean_over_several_models(folder):
    """This holds for every ranking except aum_vote, which standardises the means."""
    tables = []
    for dirs in (("checkpoints", "other"), ("checkpoints",), ("other",)):
        out = succeed(folder, *DETECTION, "--checkpoint_dir", *dirs)
        path = next(
            line.split()[1] for line in out.splitlines() if line.endswith("suspects_diagonal.csv")
        )
        tables.append(sorted(read_table(folder / path)[1], key=lambda row: int(row["index"])))
    for name in set(detect.RANKINGS) - {detect.DEFAULT_METHOD}:
        mean, first, second = [[float(row[name]) for row in table] for table in tables]
        assert mean == pytest.approx(np.mean([first, second], 0).tolist(), rel=1e-5, abs=1e-6)
        assert first != second


def test_models_with_other_hyperparameters_are_refused(folder, tmp_path):
    succeed(folder, *TRAINING, "--learning_rate", 0.06, "--checkpoint_dir", tmp_path)
    assert "differ in their hyperparameters" in refused(
        folder, *ANALYSIS, "--checkpoint_dir", "checkpoints", tmp_path
    )


def test_a_model_of_an_earlier_train_py_is_averaged_with_a_new_one(folder, tmp_path):
    """It knew no `--recipe`."""
    earlier = tmp_path / "earlier"
    shutil.copytree(folder / "other", earlier)
    path = earlier / "model_corrupt_0.1.pth"
    model, metadata = pipeline.load_checkpoint(path)
    del metadata["recipe"]["recipe"]
    pipeline.save_checkpoint(path, model, metadata)
    succeed(folder, *ANALYSIS, "--checkpoint_dir", "checkpoints", earlier)


def test_a_model_is_not_averaged_with_itself(folder, tmp_path):
    """The second checkpoint is the same folder under another name, or a copy."""
    shutil.copytree(folder / "checkpoints", tmp_path / "copy")
    for other in (folder / "checkpoints", tmp_path / "copy"):
        assert "the same model" in refused(
            folder, *ANALYSIS, "--checkpoint_dir", "checkpoints", other
        )


def test_models_cleaned_in_different_ways_are_not_averaged(tmp_path):
    for index in (3, 4):
        (tmp_path / "decided.csv").write_text(f"index,new_label\n{index},leave out\n")
        succeed(tmp_path, *TRAINING, "--corrections", "decided.csv", "--checkpoint_dir", index)
    sentence = refused(tmp_path, *ANALYSIS, "--cleaned", "--checkpoint_dir", "3", "4")
    assert "differ in their training images or labels" in sentence
    assert not list(tmp_path.glob("influence_results/model*"))
