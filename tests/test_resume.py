"""A training that was interrupted continues, and ends as if it had not been."""

import errno
import io
import re
from collections import OrderedDict
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import DETECT, SYNTHETIC, TRAIN, content, digits, run, succeed
from torch import nn
from tqdm import tqdm

import pipeline
import train

EPOCHS, STEPS = 4, 3  # steps of an epoch
RECIPE = ("--train_batch_size", 20, "--num_train_epochs", EPOCHS)
FLAGS = (*SYNTHETIC, *RECIPE, "--model", "small", "--precision", "fp32")
STATE = Path("checkpoints/model_corrupt_0.1.unfinished")
CHECKPOINT = STATE.with_suffix(".pth")
# The settings in which `robust` differs from `published`, if both have the flags of RECIPE.
ROBUST = "learning_rate, weight_decay, momentum, label_smoothing, norm_bias_factor, border, "
ROBUST += "alternate_flips"
SENTENCE = "interrupted; no file is half-written, so run the same command again"


def small(num_classes):
    """Has all that an epoch changes: weights, statistics, and the random numbers of dropout."""
    features = nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=4), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2)
    )
    return nn.Sequential(OrderedDict(features=features, head=nn.Linear(256, num_classes)))


@pytest.fixture(autouse=True)
def small_network(monkeypatch):
    """Makes `--model small` known."""
    monkeypatch.setitem(pipeline.MODELS, "small", small)


def stop_at(patch, number, error=KeyboardInterrupt, owner=nn.functional, name="cross_entropy"):
    """Lets the `number`-th call of a function, from 1, raise an error; by default step `number`."""
    original, calls = getattr(owner, name), []

    def watched(*arguments, **settings):
        calls.append(1)
        if len(calls) == number:
            raise error
        return original(*arguments, **settings)

    patch.setattr(owner, name, watched)


def new_training(path, seed=5, recipe="published"):
    """Returns a function that trains four epochs of three steps, its network and its file."""
    data = digits(20)
    torch.manual_seed(1)
    model = pipeline.construct_model("small", 10)
    hyperparameters = {
        "train_batch_size": 6,
        "learning_rate": 0.1,
        "weight_decay": 1e-3,
        "num_train_epochs": EPOCHS,
    }
    recipe = replace(train.RECIPES[recipe], **hyperparameters)
    defining = train.describe_run({**asdict(recipe), "seed": seed}, model, data, torch.float32)
    saved = train.SavedTraining(path, defining)
    start = partial(train.train, model, data, recipe, seed=seed, dtype=torch.float32, saved=saved)
    return start, model, saved


def bits(model, result):
    """All numbers of a network and of what its training returned, as bytes: NaN equals NaN."""
    margins, snapshots = result
    tensors = [*model.state_dict().values(), margins]
    for weights in snapshots.values():
        tensors += weights.values()
    return [*snapshots, *(tensor.numpy().tobytes() for tensor in tensors)]


def interrupt(path, number, recipe="published", **stop):
    """Starts a training that ends at its `number`-th step, or as `stop` says."""
    start, _, _ = new_training(path, recipe=recipe)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, number, **stop)
        start()


# Steps 4 and 7 are the first ones of epochs 2 and 3, and step 8 is in the middle of epoch 3.
@pytest.mark.parametrize(
    ("step", "epochs_done"),
    [(4, 1), (7, 2), (8, 2), (12, 3)],
    ids=["after epoch 1", "after epoch 2", "in epoch 3", "in the last step"],
)
@pytest.mark.parametrize("recipe", train.RECIPES)
def test_continuing_equals_not_stopping_bit_for_bit(tmp_path, capsys, recipe, step, epochs_done):
    start, model, _ = new_training(tmp_path / "reference", recipe=recipe)
    expected = bits(model, start())
    interrupt(tmp_path / "state", step, recipe)
    capsys.readouterr()
    start, model, _ = new_training(tmp_path / "state", recipe=recipe)
    assert bits(model, start()) == expected
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"continuing after epoch {epochs_done} of {EPOCHS}"
    epochs = [int(epoch) for epoch in re.findall(r"epoch +(\d+)/4", "\n".join(lines))]
    assert epochs == list(range(epochs_done + 1, EPOCHS + 1))


def test_a_training_may_be_interrupted_again_and_again(tmp_path):
    start, model, _ = new_training(tmp_path / "reference")
    expected = bits(model, start())
    for _ in range(3):
        interrupt(tmp_path / "state", 5)  # an epoch and two steps each
    start, model, saved = new_training(tmp_path / "state")
    assert saved.read()["state"]["epochs_done"] == 3
    assert bits(model, start()) == expected


def test_an_interruption_in_the_first_epoch_leaves_no_state(tmp_path, capsys):
    interrupt(tmp_path / "state", STEPS)
    assert not list(tmp_path.iterdir())
    start, model, _ = new_training(tmp_path / "state")
    found = bits(model, start())
    start, model, _ = new_training(tmp_path / "reference")
    assert found == bits(model, start())
    assert "continuing" not in capsys.readouterr().out


def test_an_interruption_while_the_state_is_written_leaves_that_of_the_epoch_before(tmp_path):
    interrupt(tmp_path / "state", 2, owner=Path, name="replace")
    assert [path.name for path in tmp_path.iterdir()] == ["state"]
    start, model, saved = new_training(tmp_path / "state")
    assert saved.read()["state"]["epochs_done"] == 1
    found = bits(model, start())
    start, model, _ = new_training(tmp_path / "reference")
    assert found == bits(model, start())


def test_the_state_of_another_training_is_not_used(tmp_path, capsys):
    """Nor is that of a training that was described by more, or by less, than this one."""
    interrupt(tmp_path / "state", 8)
    _, _, saved = new_training(tmp_path / "state")
    assert saved.read()
    defining = saved.run
    for changed in ({**defining, "seed": 6}, {**defining, "more": 1}, {"seed": 5}):
        saved.run = changed
        assert saved.read() is None
    found = re.findall(r"\(other (.*)\)", capsys.readouterr().out)
    assert found[:2] == ["seed", "more"] and "learning_rate" in found[2]


def test_the_progress_bar_counts_the_steps_before_the_interruption(tmp_path, monkeypatch):
    interrupt(tmp_path / "state", 8)
    bars = []

    class Bar(tqdm):
        def __init__(self, *arguments, **settings):
            super().__init__(*arguments, **settings)
            bars.append((self, self.n))

    monkeypatch.setattr(train, "tqdm", Bar)
    start, _, _ = new_training(tmp_path / "state")
    start()
    ((bar, at_first),) = bars
    assert (at_first, bar.n, bar.total) == (2 * STEPS, EPOCHS * STEPS, EPOCHS * STEPS)


# ---- What decides the result ---------------------------------------------------------------------


def described():
    """What decides the result of a training of the small network."""
    model = pipeline.construct_model("small", 10)
    return train.describe_run({}, model, digits(4), torch.float32)


@pytest.mark.parametrize(
    ("old", "new", "is_another"),
    [
        ("CROP_PADDING = 4", "CROP_PADDING = 3", True),
        ("training.optimizer.zero_grad()", "pass", True),
        ("CROP_PADDING = 4", "CROP_PADDING = 4  # black", False),
    ],
    ids=["a constant", "a statement", "a comment"],
)
def test_a_training_by_other_code_of_train_is_another_one(monkeypatch, old, new, is_another):
    before = described()
    source = pipeline.source_of("train")
    assert old in source
    monkeypatch.setitem(pipeline.MODULE_TEXTS, "train", source.replace(old, new))
    after = described()
    assert (before.pop("code") != after.pop("code")) == is_another and before == after


@pytest.mark.parametrize(
    ("old", "new"), [("others.amax(1)", "others.sum(1)"), ("(scaled - mean) / std", "scaled")]
)
def test_a_training_by_other_code_of_pipeline_is_another_one(monkeypatch, old, new):
    """The margin, and the standardisation of images."""
    before = described()
    assert old in pipeline.SOURCE
    monkeypatch.setattr(pipeline, "SOURCE", pipeline.SOURCE.replace(old, new))
    assert before["code"] != described()["code"]


def test_a_training_by_another_version_of_torch_is_another_one(monkeypatch):
    before = described()
    monkeypatch.setattr(torch, "__version__", "1.0")
    assert described() == {**before, "torch": "1.0"} != before


# ---- The script ----------------------------------------------------------------------------------


def files(folder):
    """The names of the files beside the checkpoint, hidden ones too, without the lock."""
    names = {path.name for path in (folder / STATE.parent).iterdir()}
    return sorted(names - {f".{CHECKPOINT.name}.lock"})


def train_until(folder, step):
    """Runs train.py, which is interrupted at a step."""
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, step)
        stopped = run(folder, TRAIN, *FLAGS)
    assert stopped.status == 130 and stopped.err.endswith(f"{TRAIN}: {SENTENCE}\n")
    assert files(folder) == [STATE.name]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """What must be in the checkpoint of a training without interruption."""
    folder = tmp_path_factory.mktemp("reference")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(pipeline.MODELS, "small", small)
        succeed(folder, TRAIN, *FLAGS)
    return content(folder / CHECKPOINT)


# There is no step 13: this is the evaluation.
@pytest.mark.parametrize(("step", "epochs_done"), [(4, 1), (8, 2), (13, 4)])
def test_the_same_command_continues(reference, tmp_path, step, epochs_done):
    train_until(tmp_path, step)
    out = succeed(tmp_path, TRAIN, *FLAGS)
    assert f"\ncontinuing after epoch {epochs_done} of {EPOCHS}\n" in out
    assert content(tmp_path / CHECKPOINT) == reference
    assert files(tmp_path) == [CHECKPOINT.name], "the state is deleted when the training is done"
    assert "continuing" not in succeed(tmp_path, TRAIN, *FLAGS)


@pytest.mark.parametrize(
    ("flag", "value", "different"),
    [
        ("--learning_rate", 0.1, "learning_rate"),
        ("--weight_decay", 0.1, "weight_decay"),
        ("--train_batch_size", 15, "train_batch_size"),
        ("--num_train_epochs", 5, "num_train_epochs"),
        ("--recipe", "robust", ROBUST),
        ("--seed", 7, "seed"),
        ("--num_train_examples", 59, "data"),
        ("--precision", "bf16", "dtype"),
        ("--model", "other", "model"),
    ],
)
def test_another_training_does_not_continue(tmp_path, monkeypatch, flag, value, different):
    monkeypatch.setitem(pipeline.MODELS, "other", small)
    (tmp_path / "fresh").mkdir()
    succeed(tmp_path / "fresh", TRAIN, *FLAGS, flag, value)
    train_until(tmp_path, 8)
    out = succeed(tmp_path, TRAIN, *FLAGS, flag, value)
    assert f"{STATE} belongs to another training (other {different}): this one starts from" in out
    assert "continuing" not in out and files(tmp_path) == [CHECKPOINT.name]
    assert content(tmp_path / CHECKPOINT) == content(tmp_path / "fresh" / CHECKPOINT)


def test_the_state_of_another_training_is_replaced_after_the_first_epoch(reference, tmp_path):
    """Until then the other one can still continue."""
    train_until(tmp_path, 8)
    other = (*FLAGS, "--seed", 7)
    for step, seed in ((STEPS, 1004), (STEPS + 1, 7)):
        with pytest.MonkeyPatch.context() as patch:
            stop_at(patch, step)
            assert run(tmp_path, TRAIN, *other).status == 130
        written = (tmp_path / STATE).read_bytes()[train.DIGEST_BYTES :]
        saved = torch.load(io.BytesIO(written), weights_only=True)
        assert saved["run"]["seed"] == seed


@pytest.mark.parametrize(
    "damage",
    [
        lambda written: b"",
        lambda written: b"not a state",
        lambda written: written[: len(written) // 2],
        # One bit of a weight, which torch.load does not notice.
        lambda written: written.replace(b"\x3c", b"\x3d", 1),
    ],
    ids=["empty", "foreign", "half of it", "a bit"],
)
def test_a_damaged_state_is_not_used(reference, tmp_path, damage):
    train_until(tmp_path, 8)
    written = (tmp_path / STATE).read_bytes()
    (tmp_path / STATE).write_bytes(damage(written))
    assert damage(written) != written
    out = succeed(tmp_path, TRAIN, *FLAGS)
    assert f"\n{STATE} is damaged: the training starts from the beginning\n" in out
    assert "continuing" not in out
    assert content(tmp_path / CHECKPOINT) == reference and files(tmp_path) == [CHECKPOINT.name]


def test_a_training_that_diverged_is_not_continued(reference, tmp_path):
    """The loss of epoch 3 is NaN."""
    original, calls = nn.functional.cross_entropy, []

    def diverging(logits, labels, **settings):
        calls.append(1)
        return original(logits, labels, **settings) * (torch.nan if len(calls) == 8 else 1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.functional, "cross_entropy", diverging)
        stopped = run(tmp_path, TRAIN, *FLAGS)
    assert stopped.status == 1 and "the training diverged in epoch 3" in stopped.err
    assert files(tmp_path) == []
    assert "continuing" not in succeed(tmp_path, TRAIN, *FLAGS)
    assert content(tmp_path / CHECKPOINT) == reference


def test_a_network_that_diverged_in_the_last_step_is_not_saved(tmp_path, monkeypatch):
    """The losses of the three steps are finite; those of the evaluation are not."""
    original, calls = nn.functional.cross_entropy, []

    def diverging(logits, labels, **settings):
        calls.append(1)
        return original(logits, labels, **settings) * (torch.inf if len(calls) > 3 else 1)

    monkeypatch.setattr(nn.functional, "cross_entropy", diverging)
    stopped = run(tmp_path, TRAIN, *FLAGS, "--num_train_epochs", 1)
    assert stopped.status == 1 and "lower --learning_rate" in stopped.err
    assert "the loss of the trained network is" in stopped.err
    assert files(tmp_path) == []


def test_a_training_that_diverges_at_once_leaves_the_state_of_another_one(reference, tmp_path):
    train_until(tmp_path, 8)
    state = (tmp_path / STATE).read_bytes()
    stopped = run(tmp_path, TRAIN, *FLAGS, "--learning_rate", 1e30)
    assert stopped.status == 1 and "the training diverged in epoch 1" in stopped.err
    assert (tmp_path / STATE).read_bytes() == state
    assert f"\ncontinuing after epoch 2 of {EPOCHS}\n" in succeed(tmp_path, TRAIN, *FLAGS)
    assert content(tmp_path / CHECKPOINT) == reference


def test_a_second_training_of_a_checkpoint_is_refused_until_the_first_one_ends(tmp_path):
    """Each would delete what the other one wrote."""
    train_until(tmp_path, 8)
    state = (tmp_path / STATE).read_bytes()
    with train.require_one_training(tmp_path / CHECKPOINT):
        stopped = run(tmp_path, TRAIN, *FLAGS)
        assert stopped.status == 2 and "another training writes checkpoints/model" in stopped.err
        assert (tmp_path / STATE).read_bytes() == state
        succeed(tmp_path, TRAIN, *FLAGS, "--checkpoint_dir", "other")
    assert "continuing after epoch 2" in succeed(tmp_path, TRAIN, *FLAGS)


def test_a_detection_says_that_a_later_training_has_not_ended(tmp_path):
    succeed(tmp_path, TRAIN, *FLAGS)
    flags = (*SYNTHETIC, "--model", "small", "--factor_strategy", "none", "--num_review", 0)
    said = f"{STATE} is of a training that has not ended: it is not used"
    assert said not in succeed(tmp_path, DETECT, *flags)
    (tmp_path / STATE).write_bytes(b"")
    assert said in succeed(tmp_path, DETECT, *flags)


def test_after_a_full_disk_the_training_continues(reference, tmp_path):
    """There is no room for the state after epoch 3; that of epoch 2 is still there."""
    with pytest.MonkeyPatch.context() as patch:
        full = OSError(errno.ENOSPC, "No space left on device")
        stop_at(patch, 3, error=full, owner=Path, name="replace")
        stopped = run(tmp_path, TRAIN, *FLAGS)
    assert stopped.status == 1 and "No space left on device" in stopped.err
    assert files(tmp_path) == [STATE.name]
    assert f"\ncontinuing after epoch 2 of {EPOCHS}\n" in succeed(tmp_path, TRAIN, *FLAGS)
    assert content(tmp_path / CHECKPOINT) == reference


def test_the_seconds_of_both_parts_are_added(tmp_path, monkeypatch):
    """By a clock on which each step takes 100 s. Those of the epoch that is lost do not count."""
    now = [0]
    original = nn.functional.cross_entropy

    def slow(logits, labels, **settings):
        now[0] += 100
        return original(logits, labels, **settings)

    monkeypatch.setattr(nn.functional, "cross_entropy", slow)
    monkeypatch.setattr(train, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    train_until(tmp_path, 8)
    succeed(tmp_path, TRAIN, *FLAGS)
    _, metadata = pipeline.load_checkpoint(tmp_path / CHECKPOINT)
    assert metadata["train_seconds"] == 100 * EPOCHS * STEPS
