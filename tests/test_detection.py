"""Detection curve, AUROC and average precision against values worked out by hand."""

from dataclasses import replace
from math import exp, log
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import digits

import detect_mislabeled_dataset as detect
import pipeline
import train

# Ranked by score: clean, corrupted, corrupted, clean, corrupted.
SCORES = np.array([0.1, 0.9, 0.5, 0.3, 0.7])
CORRUPTED = np.array([True, False, True, False, True])


def test_rankings_by_hand():
    """Image 1 is answered wrongly, image 2 less so; of the second model all signals are twice as large.

    Image 0 was in the batches of both epochs, image 1 in one, and image 2 in none: its margin in the end counts.
    """
    logits, labels = (
        torch.tensor([[2.0, 0.0, -1.0], [0.0, 1.0, 0.5], [0.0, 0.4, 0.5]]),
        torch.tensor([0, 0, 0]),
    )
    margins = torch.tensor([[2.0, torch.nan, torch.nan], [4.0, -2.0, torch.nan]]).half()
    run = SimpleNamespace(
        self_influence=lambda damping_factor: (torch.tensor([4.0, 1.0, 9.0]), "path"),
        data=pipeline.ImageData(None, labels, labels, [], [], None, None),
        seconds={},
    )
    features = F.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, 1.0]]), dim=1)
    with mock.patch.object(detect, "compute_features", lambda run: (features, logits)):
        measured, found_logits, path = detect.measure(
            run, {"margins": margins, "accuracy": {"test": 0.4}}, None
        )
    assert path == "path" and torch.equal(found_logits, logits)
    assert measured["aum"].tolist() == [3, -2, -0.5] and measured["vote"].tolist() == [1, 1, 1]
    found = detect.rank([measured])
    assert found["self_influence"].tolist() == [4, 1, 9] and found["aum"].tolist() == [-3, 2, 0.5]
    assert found["margin"].tolist() == [-2, 1, 0.5]
    mean, deviation = 0.5 / 3, ((3**2 + 2**2 + 0.5**2) / 3 - (0.5 / 3) ** 2) ** 0.5
    assert found["aum_vote"] == pytest.approx([(mean - aum) / deviation for aum in (3, -2, -0.5)])
    others = (exp(-2) + exp(-3), exp(1) + exp(0.5), exp(0.4) + exp(0.5))
    assert found["loss"] == pytest.approx([log(1 + other) for other in others])
    mean = detect.rank([measured, {name: 2 * values for name, values in measured.items()}])
    assert all(
        mean[name] == pytest.approx(1.5 * found[name])
        for name in ("self_influence", "aum", "margin", "loss")
    )
    assert mean["aum_vote"] == pytest.approx(found["aum_vote"], abs=1e-6)
    other = measured | {
        "vote": np.array([1.0, -1.0, 0.0]),
        "accuracy": 0.6,
    }  # mean 0.5: a vote counts an eighth
    expected = found["aum_vote"] - [1.5**0.5 / 8, -(1.5**0.5) / 8, 0]
    assert detect.rank([measured, other])["aum_vote"] == pytest.approx(expected)


def test_the_neighbours_vote_by_hand(monkeypatch):
    """Eight directions and their labels; of the four nearest of each the shares are counted by an independent loop."""
    monkeypatch.setattr(detect, "NEIGHBOURS_OF_50_000", 4 * (50_000 / 8) ** 0.5)
    angles = np.array([0.0, 0.1, 0.25, 0.3, 1.5, 1.6, 1.8, 3.0])
    labels = [0, 0, 1, 0, 1, 1, 2, 2]
    features = torch.tensor(np.stack([np.cos(angles), np.sin(angles)], 1), dtype=torch.float32)
    expected = []
    for i in range(8):
        nearest = sorted((j for j in range(8) if j != i), key=lambda j: abs(angles[i] - angles[j]))[
            :4
        ]
        shares = [sum(labels[j] == c for j in nearest) / 4 for c in range(3)]
        expected.append(
            shares[labels[i]] - max(share for c, share in enumerate(shares) if c != labels[i])
        )
    assert detect.neighbours_vote(features, torch.tensor(labels), 3).tolist() == pytest.approx(
        expected
    )


def test_features_are_those_of_an_image_and_of_its_mirror_image():
    data = digits(5)
    model = pipeline.construct_model("resnet9", 10).train()  # as after a training
    run = SimpleNamespace(data=data, model=model, dtype=torch.float32, batch_size=2)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    features, logits = detect.compute_features(run)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    flipped = train.compute_logits(
        model, replace(data, images=data.images.flip(3)), 5, torch.float32
    )
    assert torch.allclose(logits, train.compute_logits(model, data, 5, torch.float32), atol=1e-6)
    together = (
        0.2 * features @ model.head[0].weight.T
    )  # the last layer is linear: in proportion to the sum of the logits
    assert F.cosine_similarity(together, logits + flipped).min() > 1 - 1e-5
    assert torch.allclose(features.norm(dim=1), torch.ones(5))


def test_auroc_by_hand():
    """Of the 6 pairs (corrupted, clean), 0.7 and 0.5 each beat 0.3 and lose to 0.9, 0.1 loses to both: 2 of 6."""
    assert detect.auroc(SCORES, CORRUPTED) == pytest.approx(2 / 6)


def test_auroc_counts_ties_half():
    """Pairs (1, 1) and (2, 1): half a win and a win, of two."""
    assert detect.auroc(np.array([1.0, 1.0, 2.0]), np.array([False, True, True])) == pytest.approx(
        0.75
    )


def test_average_precision_by_hand():
    """The corrupted stand at ranks 2, 3 and 5, where the precision is 1/2, 2/3 and 3/5."""
    assert detect.average_precision(SCORES, CORRUPTED) == pytest.approx((1 / 2 + 2 / 3 + 3 / 5) / 3)


def test_curve_by_hand():
    curve = detect.detection_curve(SCORES, CORRUPTED)
    assert [point["inspected"] for point in curve] == [p / 100 for p in range(1, 101)]
    found = {point["inspected"]: point["recall"] for point in curve}
    assert found[0.01] == found[0.2] == 0
    assert [found[f] for f in (0.4, 0.6, 0.8, 1.0)] == pytest.approx([1 / 3, 2 / 3, 2 / 3, 1])


def test_perfect_and_reversed_rankings():
    """The top tenth holds a fifth of 50 corrupted images of 100."""
    corrupted = np.arange(100) < 50
    perfect = detect.evaluate_ranking(-np.arange(100.0), corrupted)
    assert perfect["auroc"] == perfect["average_precision"] == 1
    assert (perfect["recall_at_10"], perfect["recall_at_20"]) == (0.2, 0.4)
    reversed_ = detect.evaluate_ranking(np.arange(100.0), corrupted)
    assert reversed_["auroc"] == reversed_["recall_at_20"] == 0
