"""The network, the schedule, the batches of an epoch, and checkpoints."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TRAIN, digits
from torch import nn

import pipeline
import train


def test_resnet9_parameter_count():
    """The sum of eight convolutions, their batch-norms, and the linear layer is 2,274,880."""
    convolutions = (
        3 * 64 * 9
        + 64 * 128 * 25
        + 2 * 128 * 128 * 9
        + 128 * 256 * 9
        + 2 * 256 * 256 * 9
        + 256 * 128 * 9
    )
    batch_norms = 2 * (64 + 128 + 2 * 128 + 256 + 2 * 256 + 128)
    parameters = sum(
        parameter.numel() for parameter in pipeline.construct_model("resnet9", 10).parameters()
    )
    assert parameters == convolutions + batch_norms + 128 * 10 == 2_274_880


def test_a_residual_block_adds_its_input():
    residual, x = (
        pipeline.construct_model("resnet9", 10).eval().features[2],
        torch.randn(2, 128, 8, 8),
    )
    assert torch.allclose(residual(x), x + residual[1](residual[0](x)))


def test_logits_stay_float32_under_autocast():
    model = pipeline.construct_model("resnet9", 10).eval()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    assert logits.dtype == torch.float32
    assert not torch.equal(logits, logits.bfloat16().float())


def test_the_default_schedule_peaks_after_a_fifth_and_ends_near_zero():
    total = 25 * 97
    rates = [train.schedule(step, total) for step in range(total)]
    assert max(range(total), key=rates.__getitem__) + 1 == 5 * 97 and max(rates) == 1
    assert rates[0] == pytest.approx(1 / 485) and rates[-1] == pytest.approx(1 / 1941)
    assert rates[242] == pytest.approx(243 / 485) and rates[-970] == pytest.approx(970 / 1941)


@pytest.mark.parametrize("total", [1, 2, 3, 4, 5, 12])
def test_no_step_of_a_schedule_has_the_learning_rate_zero(total):
    rates = [train.schedule(step, total) for step in range(total)]
    assert max(rates) == 1 and min(rates) > 0
    assert rates == sorted(rates[: rates.index(1) + 1]) + sorted(
        rates[rates.index(1) + 1 :], reverse=True
    )


def test_an_epoch_uses_each_example_once_and_drops_the_partial_batch():
    order, offsets, flips = train.epoch_batches(100, 30, torch.Generator().manual_seed(0))
    assert order.shape == flips.shape == (3, 30) and offsets.shape == (3, 30, 2)
    assert len(order.unique()) == 90
    assert offsets.min() == 0 and offsets.max() == 8
    assert 0 < flips.sum() < 90


@pytest.mark.parametrize("seed", [pipeline.CORRUPTION_SEED, 1004])
def test_the_first_epoch_does_not_begin_with_the_corrupted_labels(seed):
    _, is_corrupted = pipeline.corrupt_labels(torch.zeros(1000, dtype=torch.int64), 0.1, 10)
    order, _, _ = train.epoch_batches(1000, 100, train.batch_generator(seed))
    assert 0 < is_corrupted[order[0]].sum() < 30


def train_epochs(model, data, *, recipe="published", **changed):
    """Trains for one epoch in batches of twenty, or as `changed` says, and else by a recipe.

    Returns margins and snapshots by epoch.
    """
    hyperparameters = {
        "train_batch_size": 20,
        "learning_rate": 0.1,
        "weight_decay": 1e-4,
        "num_train_epochs": 1,
    }
    recipe = replace(train.RECIPES[recipe], **hyperparameters | changed)
    return train.train(model, data, recipe, seed=5, dtype=torch.float32)


def test_training_is_plain_sgd_at_the_scheduled_rate_on_crops_and_flips_of_its_seed():
    """Two epochs of two batches of a linear model, and the same steps in a plain loop."""
    data = digits(4)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))
    weights = [weight.detach().clone() for weight in model.parameters()]
    generator = torch.Generator().manual_seed(5)
    batches = []
    for _ in range(2):
        batches += zip(*train.epoch_batches(4, 2, generator), strict=True)
    for step, (order, offsets, flips) in enumerate(batches):
        images = data.normalize(train.crop_and_flip(data.images[order], offsets, flips)).flatten(1)
        weights = [weight.requires_grad_() for weight in weights]
        logits = nn.functional.linear(images, *weights)
        loss = nn.functional.cross_entropy(logits, data.labels[order])
        gradients = torch.autograd.grad(loss, weights)
        rate = 0.01 * train.schedule(step, 4)
        pairs = zip(weights, gradients, strict=True)
        weights = [
            weight.detach() * (1 - 0.5 * rate) - rate * gradient for weight, gradient in pairs
        ]
    train_epochs(
        model, data, train_batch_size=2, num_train_epochs=2, learning_rate=0.01, weight_decay=0.5
    )
    for found, expected in zip(model.parameters(), weights, strict=True):
        assert torch.allclose(found, expected, atol=1e-6)


def smoothed_cross_entropy(logits, labels, smoothing):
    """The mean cross-entropy with the labels, of which a share is spread over all ten classes."""
    targets = torch.full_like(logits, smoothing / 10)
    targets[torch.arange(len(labels)), labels] += 1 - smoothing
    return -(targets * logits.log_softmax(1)).sum(1).mean()


def test_robust_training_equals_its_rules_in_a_plain_loop():
    """Three epochs of two batches of a network with batch normalisation, in float32."""
    data = digits(8)
    model = normalized_network()
    loop_model = normalized_network()
    expected = dict(loop_model.named_parameters())
    velocities = {name: torch.zeros_like(weight) for name, weight in expected.items()}
    generator = torch.Generator().manual_seed(5)
    first_flips = torch.rand(8, generator=torch.Generator().manual_seed(10_005)) < 0.5
    step = 0
    for epoch in range(3):
        for order, offsets, _ in zip(*train.epoch_batches(8, 4, generator), strict=True):
            flips = first_flips[order] if epoch != 1 else ~first_flips[order]
            crops = train.crop_and_flip(data.images[order], offsets, flips, "reflect")
            logits = loop_model(data.normalize(crops))
            loss = smoothed_cross_entropy(logits, data.labels[order], 0.2)
            gradients = torch.autograd.grad(loss, list(expected.values()))
            for (name, weight), gradient in zip(expected.items(), gradients, strict=True):
                factor = 16 if name == "2.bias" else 1
                rate = factor * 0.02 * train.schedule(step, 6)
                gradient = gradient + 0.5 / factor * weight.detach()
                velocities[name] = 0.9 * velocities[name] + gradient
                weight.data -= rate * (gradient + 0.9 * velocities[name])  # Nesterov's method
            step += 1
    train_epochs(
        model,
        data,
        recipe="robust",
        train_batch_size=4,
        num_train_epochs=3,
        learning_rate=0.02,
        weight_decay=0.5,
    )
    for name, weight in model.state_dict().items():
        assert torch.allclose(weight, loop_model.state_dict()[name], atol=1e-5), name


def test_alternating_flips_show_both_sides_of_each_image_in_two_epochs():
    first, second, third = (train.alternating_flips(1000, epoch, 7) for epoch in range(3))
    assert torch.equal(second, ~first) and torch.equal(third, first)
    assert 400 < first.sum() < 600
    assert not torch.equal(first, train.alternating_flips(1000, 0, 8))


def test_a_mirrored_border_repeats_no_edge():
    images = digits(2).images
    expected = np.pad(images.numpy(), ((0, 0), (0, 0), (4, 4), (4, 4)), mode="reflect")
    found = train.pad_borders(images, "reflect")
    assert found.dtype == torch.uint8 and np.array_equal(found.numpy(), expected)


def parsed_recipe(monkeypatch, *flags):
    """The recipe of a command."""
    monkeypatch.setattr("sys.argv", [TRAIN, *flags])
    return train.choose_recipe(train.parse_arguments())


def test_flags_override_the_values_of_the_recipe(monkeypatch):
    assert parsed_recipe(monkeypatch) == train.RECIPES["published"]
    robust = train.RECIPES["robust"]
    assert parsed_recipe(monkeypatch, "--recipe", "robust") == robust
    flags = ("--recipe", "robust", "--weight_decay", "0", "--num_train_epochs", "3")
    expected = replace(robust, weight_decay=0.0, num_train_epochs=3)
    assert parsed_recipe(monkeypatch, *flags) == expected


class GrowingLogits(nn.Module):
    """Gives every image the logits (step, 0, 0). The step is 1 in the first batch."""

    def __init__(self):
        super().__init__()
        self.weight, self.step = nn.Parameter(torch.zeros(())), 0

    def forward(self, images):
        self.step += 1
        return torch.tensor([self.step, 0.0, 0.0]).expand(len(images), 3) + self.weight


def test_margins_are_kept_by_epoch():
    """In two epochs of two batches, an example is in step 1 or 2, and in step 3 or 4."""
    data = digits(4)
    data = replace(data, labels=torch.tensor([0, 1, 0, 2]))
    generator = torch.Generator().manual_seed(5)
    steps = torch.zeros(2, 4)
    for epoch in range(2):
        order, _, _ = train.epoch_batches(4, 2, generator)
        steps[epoch, order[0]], steps[epoch, order[1]] = 2 * epoch + 1, 2 * epoch + 2
    found, _ = train_epochs(GrowingLogits(), data, train_batch_size=2, num_train_epochs=2)
    sign = torch.tensor([1.0, -1.0, 1.0, -1.0])
    assert found.dtype == torch.float16 and torch.equal(found.float(), sign * steps)


def normalized_network():
    """A network with buffers, the running statistics of batch normalisation."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3072, 6), nn.BatchNorm1d(6), nn.Linear(6, 10))


class Stopped(Exception):
    """A training was stopped."""


def weights_after(num_batches, data, **settings):
    """Returns the weights and buffers of a training that is stopped before its next batch."""
    model, seen = normalized_network(), []

    def stop(*_):
        if len(seen) == num_batches:
            raise Stopped
        seen.append(True)

    model.register_forward_pre_hook(stop)
    with pytest.raises(Stopped):
        train_epochs(model, data, **settings)
    return model.state_dict()


def test_snapshots_are_the_networks_of_trainings_that_stop_after_their_epochs():
    """After three and four of five epochs, of two batches each."""
    data, model = digits(8), normalized_network()
    settings = {"train_batch_size": 4, "num_train_epochs": 5}
    _, snapshots = train_epochs(model, data, **settings)
    assert sorted(snapshots) == [3, 4]
    for epoch, weights in snapshots.items():
        expected = weights_after(2 * epoch, data, **settings)
        assert weights.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(weights[name], tensor)


def test_a_training_is_the_same_without_snapshots(monkeypatch):
    data, settings = digits(8), {"train_batch_size": 4, "num_train_epochs": 5}
    model, other = normalized_network(), normalized_network()
    margins, _ = train_epochs(model, data, **settings)
    monkeypatch.setattr(train, "SNAPSHOT_FRACTIONS", ())
    found, snapshots = train_epochs(other, data, **settings)
    assert torch.equal(found, margins) and not snapshots
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor)


def test_snapshots_are_kept_after_60_and_80_percent_of_the_epochs():
    kept = {count: train.snapshot_epochs(count) for count in (1, 2, 3, 4, 6, 10, 25)}
    few = {1: [], 2: [1], 3: [2]}
    assert kept == few | {4: [2, 3], 6: [4, 5], 10: [6, 8], 25: [15, 20]}


def test_an_image_in_no_batch_has_no_margin(capsys):
    data = replace(digits(3), labels=torch.tensor([0, 0, 0]))
    (found,), _ = train_epochs(GrowingLogits(), data, train_batch_size=2)
    assert found[~found.isnan()].tolist() == [1, 1]
    assert "1 images were in no batch" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("weight_decay", "batch_size"),
    [(1.0, 20), (1e20, 40)],
    ids=["loss", "weights of the last step"],
)
def test_a_diverging_training_stops_with_a_sentence(weight_decay, batch_size):
    diverging = {
        "learning_rate": 1e30,
        "weight_decay": weight_decay,
        "train_batch_size": batch_size,
    }
    with pytest.raises(pipeline.NumericalError, match="epoch 1: lower --learning_rate"):
        train_epochs(pipeline.construct_model("resnet9", 10), digits(40), **diverging)


# ---- Checkpoints ---------------------------------------------------------------------------------


def test_checkpoint_round_trip(tmp_path):
    model = pipeline.construct_model("resnet9", 3).eval()
    metadata = {
        "class_names": ["a", "b", "ü"],
        "seed": 3,
        "learning_rate": 0.1,
        "given_labels": None,
    }
    metadata |= {"model": "resnet9", "margins": [0.5], "data_sha256": ""}
    pipeline.save_checkpoint(tmp_path / "new" / "model.pth", model, metadata)
    loaded, loaded_metadata = pipeline.load_checkpoint(tmp_path / "new" / "model.pth")
    assert loaded_metadata == metadata and not loaded.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["model.pth"]


class WritesAFile:
    """Unpickling this would create a file."""

    def __reduce__(self):
        return open, ("executed", "w")


def test_a_checkpoint_that_contains_code_is_refused_without_running_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"weights": {}, "metadata": WritesAFile()}, "model.pth")
    with pytest.raises(pipeline.UserError, match="not a complete checkpoint"):
        pipeline.load_checkpoint("model.pth")
    assert not Path("executed").exists()


# ---- Where it computes ---------------------------------------------------------------------------


def test_a_sentence_explains_why_a_gpu_cannot_be_used(monkeypatch, capsys):
    def init():
        raise RuntimeError("The NVIDIA driver is too old (found version 11040).\nUpdate it")

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.init", init)
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/nvidia-smi")
    pipeline.print_machine(torch.device("cpu"), torch.float32)
    first, second = capsys.readouterr().out.splitlines()
    reason = "The NVIDIA driver is too old (found version 11040)"
    words = f"torch cannot use the NVIDIA GPU ({reason}): install the torch for"
    assert first == f"{torch.get_num_threads()} CPU threads, float32" and words in second
    with pytest.raises(pipeline.UserError, match=re.escape(words)):
        pipeline.choose_device("cuda", several_processes=False)
