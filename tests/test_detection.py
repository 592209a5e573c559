"""Detection curve, AUROC and average precision against values worked out by hand."""

from math import exp, log
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch

import detect_mislabeled_dataset as detect
import pipeline

# Ranked by score: clean, corrupted, corrupted, clean, corrupted.
SCORES = np.array([0.1, 0.9, 0.5, 0.3, 0.7])
CORRUPTED = np.array([True, False, True, False, True])


def test_rankings_by_hand():
    """Image 1 is answered wrongly, image 2 less so; of the second model all signals are twice as large."""
    logits, labels = torch.tensor([[2.0, 0.0, -1.0], [0.0, 1.0, 0.5], [0.0, 0.4, 0.5]]), torch.zeros(3).long()
    run = SimpleNamespace(
        self_influence=lambda damping_factor: (torch.tensor([4.0, 1.0, 9.0]), "path"),
        data=pipeline.ImageData(None, labels, labels, [], [], None),
        **{"model": None, "batch_size": 2, "dtype": torch.float32, "seconds": {}},
    )
    with mock.patch.object(pipeline, "compute_logits", lambda *_: logits):
        measured, found_logits, path = detect.measure(run, {"aum": torch.tensor([3.0, -2.0, 1.0])}, None)
    assert path == "path" and torch.equal(found_logits, logits)
    found = detect.rank([measured])
    assert found["self_influence"].tolist() == [4, 1, 9] and found["aum"].tolist() == [-3, 2, -1]
    assert found["margin"].tolist() == [-2, 1, 0.5] and found["aum_margin"].tolist() == [-2.75, 1.75, -0.625]
    others = (exp(-2) + exp(-3), exp(1) + exp(0.5), exp(0.4) + exp(0.5))
    assert found["loss"] == pytest.approx([log(1 + other) for other in others])
    with mock.patch.object(pipeline, "compute_logits", lambda *_: logits):
        unvisited, _, _ = detect.measure(run, {"aum": torch.tensor([3.0, torch.nan, 1.0])}, None)
    assert unvisited["aum"].tolist() == [3, -1, 1], "an image in no batch has its margin in the end for its area"
    mean = detect.rank([measured, {name: 2 * values for name, values in measured.items()}])
    assert all(mean[name] == pytest.approx(1.5 * found[name]) for name in detect.RANKINGS)


def test_auroc_by_hand():
    """Of the 6 pairs (corrupted, clean), 0.7 and 0.5 each beat 0.3 and lose to 0.9, 0.1 loses to both: 2 of 6."""
    assert detect.auroc(SCORES, CORRUPTED) == pytest.approx(2 / 6)


def test_ranks_by_hand():
    """The two threes share the places 3 and 4."""
    assert detect.ranks(np.array([3.0, 1.0, 3.0, 2.0])).tolist() == [3.5, 1, 3.5, 2]


def test_auroc_counts_ties_half():
    """Pairs (1, 1) and (2, 1): half a win and a win, of two."""
    assert detect.auroc(np.array([1.0, 1.0, 2.0]), np.array([False, True, True])) == pytest.approx(0.75)


def test_average_precision_by_hand():
    """The corrupted stand at ranks 2, 3 and 5, where the precision is 1/2, 2/3 and 3/5."""
    assert detect.average_precision(SCORES, CORRUPTED) == pytest.approx((1 / 2 + 2 / 3 + 3 / 5) / 3)


def test_curve_by_hand():
    curve = detect.detection_curve(SCORES, CORRUPTED)
    assert [point["inspected"] for point in curve] == [p / 100 for p in range(1, 101)]
    found = {point["inspected"]: point["found"] for point in curve}
    assert found[0.01] == found[0.2] == 0
    assert [found[f] for f in (0.4, 0.6, 0.8, 1.0)] == pytest.approx([1 / 3, 2 / 3, 2 / 3, 1])


def test_perfect_and_reversed_rankings():
    corrupted = np.arange(100) < 10
    perfect = detect.evaluate_ranking(-np.arange(100.0), corrupted)
    assert perfect["auroc"] == perfect["average_precision"] == perfect["found_at_10"] == perfect["found_at_20"] == 1
    reversed_ = detect.evaluate_ranking(np.arange(100.0), corrupted)
    assert reversed_["auroc"] == reversed_["found_at_20"] == 0


def test_random_ranking_finds_what_it_inspects():
    random = np.random.default_rng(0)
    ranking = detect.evaluate_ranking(random.random(20_000), random.random(20_000) < 0.1)
    assert ranking["auroc"] == pytest.approx(0.5, abs=0.03)
    assert all(point["found"] == pytest.approx(point["inspected"], abs=0.03) for point in ranking["curve"])
