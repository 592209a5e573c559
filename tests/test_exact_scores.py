"""Factors and scores of the four strategies against dense matrices; `-rP` shows the errors."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import relative_error, tiny_network
from dense import (
    NUM_CLASSES,
    NUM_QUERY,
    NUM_TRAIN,
    QUERY_BATCH_SIZE,
    TOLERANCE,
    dense_curvature,
    dense_layers,
    dense_scores,
    fitted_factor,
    make_run,
    pseudo_labels,
    random_data,
)

import pipeline

LAYERS = "strided", "padded", "linear"  # of `tiny_network`
DAMPINGS = pytest.mark.parametrize("damping", [1e-3, 1e-8, "heuristic"], ids="damping {}".format)

pytestmark = [
    pytest.mark.usefixtures("small_parts"),
    # of kronfluence; float64 needs no scaler
    pytest.mark.filterwarnings("ignore:.*GradScaler:FutureWarning"),
]


@pytest.fixture(scope="module")
def exact():
    """The network, its data, and the results of `dense_layers`."""
    model = tiny_network(6, NUM_CLASSES)
    data, queries = random_data(NUM_TRAIN, 1), random_data(NUM_QUERY, 2)
    layers = dense_layers(model, data, queries)
    return SimpleNamespace(model=model, data=data, queries=queries, layers=layers)


@pytest.fixture(scope="module")
def fitted(exact, tmp_path_factory):
    """One InfluenceRun per strategy, with fitted factors."""
    folder = tmp_path_factory.mktemp("fitted")
    runs = {name: make_run(folder, exact.model, exact.data, name) for name in pipeline.STRATEGIES}
    for run in runs.values():
        run.fit_factors()
    return runs


def test_pseudo_labels_cover_all_classes_and_no_channel_is_dead(exact):
    """Otherwise the tests of this file would not check every case."""
    labels = pseudo_labels(exact.model, exact.data.normalize(exact.data.images))
    assert set(labels.tolist()) == set(range(NUM_CLASSES))
    assert 0 < (labels == exact.data.labels).sum() < NUM_TRAIN
    for layer in exact.layers.values():
        assert (layer.activation_covariance.diag() > 1e-3).all()
        assert (layer.gradient_covariance.diag() > 1e-9).all()


@pytest.mark.parametrize("strategy", ["kfac", "ekfac"])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("side", ["activation", "gradient"])
def test_covariances_are_means_over_examples_and_positions(exact, fitted, strategy, layer, side):
    total = fitted_factor(fitted[strategy], f"{side}_covariance")[layer]
    count = fitted_factor(fitted[strategy], f"num_{side}_covariance_processed")[layer]
    assert count.item() == getattr(exact.layers[layer], f"{side}_count")
    expected = getattr(exact.layers[layer], f"{side}_covariance")
    assert relative_error(total / count, expected) < TOLERANCE


@pytest.mark.parametrize("strategy", ["diagonal", "ekfac"])
@pytest.mark.parametrize("layer", LAYERS)
def test_lambda_is_the_mean_squared_pseudo_gradient_in_the_eigenbasis(
    exact, fitted, strategy, layer
):
    total = fitted_factor(fitted[strategy], "lambda_matrix")[layer]  # (O, I)
    count = fitted_factor(fitted[strategy], "num_lambda_processed")[layer]
    assert count.item() == NUM_TRAIN
    matrix = (total / count).flatten().diag()
    if strategy == "ekfac":
        q_a = fitted_factor(fitted["ekfac"], "activation_eigenvectors")[layer]
        q_g = fitted_factor(fitted["ekfac"], "gradient_eigenvectors")[layer]
        basis = torch.kron(q_g, q_a)
        matrix = basis @ matrix @ basis.T
    assert relative_error(matrix, dense_curvature(strategy, exact.layers[layer])) < TOLERANCE


@DAMPINGS
@pytest.mark.parametrize("strategy", pipeline.STRATEGIES)
def test_pairwise_scores_equal_the_dense_computation(exact, fitted, strategy, damping):
    scores, _ = fitted[strategy].pairwise_influence(exact.queries, QUERY_BATCH_SIZE, damping)
    error = relative_error(scores, dense_scores(exact.layers, strategy, damping))
    print(f"{strategy:8}  relative error of pairwise scores {error:.1e}")
    assert error < TOLERANCE


@DAMPINGS
@pytest.mark.parametrize("strategy", pipeline.STRATEGIES)
def test_self_influence_equals_the_dense_computation(exact, fitted, strategy, damping):
    scores, _ = fitted[strategy].self_influence(damping)
    error = relative_error(scores, dense_scores(exact.layers, strategy, damping, "train").diag())
    print(f"{strategy:8}  relative error of self-influence {error:.1e}")
    assert error < TOLERANCE


@pytest.mark.parametrize("strategy", pipeline.STRATEGIES)
def test_unmodified_kronfluence_agrees_with_the_dense_computation(
    tmp_path, monkeypatch, exact, strategy
):
    """This checks the reference itself. kronfluence's own trackers run in float64."""
    monkeypatch.setattr(pipeline, "install_trackers", lambda *_: None)
    in_factors = ("activation_covariance", "gradient_covariance", "per_sample_gradient", "lambda")
    in_scores = ("per_sample_gradient", "score")
    for name, kinds in (("FactorArguments", in_factors), ("InfluenceArguments", in_scores)):
        dtypes = {f"{kind}_dtype": torch.float64 for kind in kinds}
        monkeypatch.setattr(pipeline, name, partial(getattr(pipeline, name), **dtypes))
    run = make_run(tmp_path, exact.model, exact.data, strategy)
    pairwise, _ = run.pairwise_influence(exact.queries, QUERY_BATCH_SIZE, "heuristic")
    self_influence, _ = run.self_influence("heuristic")
    expected = dense_scores(exact.layers, strategy, "heuristic", "train").diag()
    assert relative_error(self_influence, expected) < TOLERANCE
    expected = dense_scores(exact.layers, strategy, "heuristic")
    assert relative_error(pairwise, expected) < TOLERANCE
