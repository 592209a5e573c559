"""No stale results: after any change, a second run gives the results of a clean folder.

The scripts run in this process, on 40 digits with diagonal curvature.
"""

import pickle
import shutil

import pytest
import torch
from conftest import ANALYZE, DETECT, TRAIN, refused, results, succeed

import pipeline

DATA = (
    "--dataset",
    "synthetic",
    "--num_train_examples",
    "40",
    "--device",
    "cpu",
    "--precision",
    "fp32",
)
RECIPE = ("--train_batch_size", "8", "--num_train_epochs", "1", "--learning_rate", "0.05")
SCORE = ("--factor_strategy", "diagonal")
QUERIES = (*SCORE, "--num_query_examples", "4")


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A folder with model.pth, trained on DATA, and the results of an analysis and a detection."""
    folder = tmp_path_factory.mktemp("pretrained")
    succeed(folder, TRAIN, *DATA, *RECIPE)
    succeed(folder, ANALYZE, *DATA, *QUERIES)
    succeed(folder, DETECT, *DATA, *SCORE, "--corrupt_percentage", "0")
    return folder


@pytest.fixture
def used(pretrained, tmp_path):
    """A copy of `pretrained`, in which every script has run once."""
    shutil.copytree(pretrained, tmp_path / "used")
    return tmp_path / "used"


CHANGES = {
    "retrained with another seed": (("--seed", "7"), ()),
    "other corruption": (("--corrupt_percentage", "0.2"), ("--corrupt_percentage", "0.2")),
    "other number of training images": (
        ("--num_train_examples", "32"),
        ("--num_train_examples", "32"),
    ),
    "other damping": (None, ("--damping_factor", "1e-5")),
    "small damping": (None, ("--damping_factor", "1e-8")),
    "other precision": (None, ("--precision", "bf16")),
    "other pseudo-labels": (None, ("--seed", "5")),
    "other strategy": (None, ("--factor_strategy", "identity")),
    "other queries": (None, ("--num_query_examples", "3")),
}


@pytest.mark.parametrize("change", CHANGES)
def test_after_a_change_analyze_gives_the_results_of_a_clean_folder(used, tmp_path, change):
    retrain, flags = CHANGES[change]
    clean = tmp_path / "clean"
    shutil.copytree(used, clean, ignore=shutil.ignore_patterns("influence_results"))
    for folder in (used, clean):
        if retrain is not None:
            succeed(folder, TRAIN, *DATA, *RECIPE, *retrain)
        succeed(folder, ANALYZE, *DATA, *QUERIES, *flags)
    expected, found = (results(folder / "influence_results") for folder in (clean, used))
    assert expected and expected.items() <= found.items()


@pytest.mark.parametrize(
    ("flags", "reused"),
    [
        (("--damping_factor", "1e-5"), ["factors"]),
        (("--num_query_examples", "3"), ["factors"]),
        (("--train_batch_size", "3"), ["factors", "scores"]),
    ],
    ids=["other damping", "other queries", "other batch size"],
)
def test_valid_results_are_reused_and_the_output_says_so(used, flags, reused):
    out = succeed(used, ANALYZE, *DATA, *QUERIES, *flags)
    lines = [line for line in out.splitlines() if line.startswith("Reusing ")]
    assert [line.split("/")[-1].split("_")[0] for line in lines] == reused


# ---- Foreign checkpoints -------------------------------------------------------------------------


# Content of the wrong checkpoint: another network, and the metadata to change or the key to delete;
# or a function of the right content.
FOREIGN = {
    "another network": (torch.nn.Linear(3, 3), {}),
    "another number of classes": (
        pipeline.construct_model("resnet9", 3),
        {"class_names": ["a", "b", "c"]},
    ),
    "another data set": (pipeline.construct_model("resnet9", 10), {"data_sha256": "0" * 64}),
    "an earlier train.py": (pipeline.construct_model("resnet9", 10), "margins"),
    "half a file": lambda content: content[: len(content) // 2],
    "an empty file": lambda content: b"",
    "a pickle": lambda content: pickle.dumps({"weights": {}}),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_a_checkpoint_of_another_program_is_refused_in_one_sentence(used, what):
    path = used / "checkpoints" / "model.pth"
    if callable(FOREIGN[what]):
        path.write_bytes(FOREIGN[what](path.read_bytes()))
    else:
        model, changed = FOREIGN[what]
        metadata = pipeline.load_checkpoint(path)[1]
        if changed == "margins":
            del metadata["margins"]
        else:
            metadata |= changed
        pipeline.save_checkpoint(path, model, metadata)
    before = results(used / "influence_results")
    assert "model.pth" in refused(used, ANALYZE, *DATA, *QUERIES)
    assert results(used / "influence_results") == before


def test_weights_that_do_not_fit_the_code_of_the_network_are_named(used):
    """As after a change of a network in MODELS: the file is complete, and the sentence says so."""
    path = used / "checkpoints" / "model.pth"
    _, metadata = pipeline.load_checkpoint(path)
    pipeline.save_checkpoint(path, pipeline.construct_model("resnet9", 3), metadata)
    assert "do not fit its network" in refused(used, ANALYZE, *DATA, *QUERIES)
