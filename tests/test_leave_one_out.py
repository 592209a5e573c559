"""EKFAC scores predict what retraining without an image changes (leave-one-out).

The model is softmax regression, one linear layer; a random teacher draws the labels. The damping is
the L2 strength, so the damped matrix that EKFAC approximates is the Hessian. Removing image n from
the mean loss moves the weights by about H^-1 grad L_n / N. It moves the log-odds of a query by
-score / N, and the image's own loss by self-influence / N. For each image, the tests train a model
without it; `-rP` shows the agreement.

EKFAC has two errors here: the Kronecker eigenbasis, and one pseudo-label per image with only 40
images. They matter less if L2 is larger, so it is 0.2. The bounds below come from 12 draws of data
each for 2, 3 and 4 classes. At L2 = 0.2, the correlation with the real changes was 0.969 to 0.999,
with slopes of 0.98 to 1.26 (at L2 = 0.1, the correlation was 0.945 to 0.995). For self-influence it
was 0.892 to 0.998, with slopes of 1.09 to 1.37.
"""

from collections import OrderedDict
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import minus_log_odds
from dense import QUERY_BATCH_SIZE, make_run, random_data
from torch import nn
from torch.func import grad, hessian, vmap

L2, NUM_TRAIN, NUM_QUERY, NUM_PIXELS = 0.2, 40, 5, 12

pytestmark = [
    pytest.mark.usefixtures("small_parts"),
    pytest.mark.filterwarnings("ignore:.*GradScaler:FutureWarning"),
]


def objective(weight, kept, inputs, labels):
    """Returns the L2-regularised loss of softmax regression, a mean over all images.

    weight: [C, I]; kept: [N], 1 for images in the training and 0 for other images;
    inputs: [N, I].
    """
    losses = F.cross_entropy(inputs @ weight.T, labels, reduction="none")
    return (losses * kept).mean() + L2 / 2 * weight.square().sum()


def derivatives(weights, kept, inputs, labels):
    """Returns gradients [R, C*I] and Hessians [R, C*I, C*I] of R objectives.

    weights: [R, C, I]; kept: [R, N].
    """
    gradients = vmap(grad(objective), (0, 0, None, None))(weights, kept, inputs, labels).flatten(1)
    hessians = vmap(hessian(objective), (0, 0, None, None))(weights, kept, inputs, labels)
    return gradients, hessians.view(*gradients.shape, -1)


def train_to_convergence(kept, inputs, labels, num_classes):
    """Returns the minimisers [R, C, I] of R objectives by Newton's method.

    Their gradient norms are below 1e-10.
    """
    weights = torch.zeros(len(kept), num_classes, inputs.shape[1], dtype=torch.float64)
    for _ in range(20):
        gradients, hessians = derivatives(weights, kept, inputs, labels)
        if gradients.norm(dim=1).max() < 1e-10:
            return weights
        weights = weights - torch.linalg.solve(hessians, gradients).view_as(weights)
    raise AssertionError(f"no convergence: gradient norm {gradients.norm(dim=1).max():.1e}")


def flat_inputs(data):
    """Returns images as rows with a column of ones for the bias, float64 [N, I]."""
    return F.pad(data.normalize(data.images).flatten(1), (0, 1), value=1)


def noisy_teachers_data(num_classes):
    """Returns images of 2 x 2 pixels, with labels drawn by a random teacher, and queries."""
    data = random_data(NUM_TRAIN, 20 + num_classes, (3, 2, 2), num_classes)
    queries = random_data(NUM_QUERY, 30 + num_classes, (3, 2, 2), num_classes)
    generator = torch.Generator().manual_seed(num_classes)
    teacher = 1.5 * torch.randn(num_classes, NUM_PIXELS, generator=generator, dtype=torch.float64)
    p = (flat_inputs(data)[:, :-1] @ teacher.T).softmax(1)
    labels = torch.multinomial(p, 1, generator=generator).squeeze(1)
    return replace(data, labels=labels), queries


def linear_model(weight):
    """Returns the network with the weight [C, I], whose last column is the bias."""
    linear = nn.Linear(NUM_PIXELS, len(weight))
    model = nn.Sequential(OrderedDict(flatten=nn.Flatten(), linear=linear)).double()
    with torch.no_grad():
        linear.weight.copy_(weight[:, :-1])
        linear.bias.copy_(weight[:, -1])
    return model


@pytest.fixture(scope="module", params=[2, 3, 4], ids=lambda count: f"{count} classes")
def regression(request, tmp_path_factory):
    """A converged softmax regression, and the changes after retraining without each image.

    change: [num_query, N], log-odds of each query without image n, minus those with it;
    own_loss_change: [N], loss of image n without image n, minus the loss with it.
    """
    num_classes = request.param
    data, queries = noisy_teachers_data(num_classes)
    inputs, query_inputs = flat_inputs(data), flat_inputs(queries)
    everything = torch.ones(1, NUM_TRAIN, dtype=torch.float64)
    all_but_one = 1 - torch.eye(NUM_TRAIN, dtype=torch.float64)
    weight = train_to_convergence(everything, inputs, data.labels, num_classes)
    without = train_to_convergence(all_but_one, inputs, data.labels, num_classes)  # (N, C, I)

    own_logits = torch.einsum("nci,ni->nc", without, inputs)
    loss_without = F.cross_entropy(own_logits, data.labels, reduction="none")
    loss_with = F.cross_entropy(inputs @ weight[0].T, data.labels, reduction="none")
    log_odds_without = log_odds(without, query_inputs, queries.labels)
    log_odds_with = log_odds(weight, query_inputs, queries.labels)
    return SimpleNamespace(
        folder=tmp_path_factory.mktemp("regression"),
        model=linear_model(weight[0]),
        data=data,
        queries=queries,
        change=log_odds_without - log_odds_with,
        own_loss_change=loss_without - loss_with,
    )


def log_odds(weights, inputs, labels):
    """Returns the log-odds [N, R] of N inputs [N, I] under R weights [R, C, I]."""
    return torch.stack([-vmap(minus_log_odds)(inputs @ weight.T, labels) for weight in weights], 1)


def agreement(title, predicted, actual):
    """Prints and returns Pearson's correlation, the slope, and the fraction of equal signs.

    The slope belongs to `actual` as a function of `predicted`.
    """
    correlation = torch.corrcoef(torch.stack([predicted.flatten(), actual.flatten()]))[0, 1].item()
    slope = ((predicted * actual).sum() / predicted.square().sum()).item()
    same_sign = (predicted * actual > 0).double().mean().item()
    print(f"{title:16}  correlation {correlation:.4f}  slope {slope:.3f}  signs {same_sign:.3f}")
    return correlation, slope, same_sign


def test_pairwise_scores_predict_the_change_of_log_odds_when_an_image_is_removed(regression):
    """A positive score means a helpful image: without it, the log-odds fall by about score / N.

    Removing an image also removes its curvature, which a first-order score neglects. So most slopes
    are above 1. Dot products of gradients, without the curvature, predict less.
    """
    found = {}
    for strategy in ("ekfac", "identity"):
        run = make_run(regression.folder, regression.model, regression.data, strategy)
        scores, _ = run.pairwise_influence(regression.queries, QUERY_BATCH_SIZE, L2)
        found[strategy] = agreement(strategy, -scores / NUM_TRAIN, regression.change)
    correlation, slope, same_sign = found["ekfac"]
    assert correlation > 0.95
    assert 0.9 < slope < 1.35
    assert same_sign > 0.85
    assert found["identity"][0] < correlation


def test_self_influence_predicts_the_loss_of_an_image_that_was_not_trained_on(regression):
    """Without an image, its own loss rises more than predicted.

    The neglected curvature of an image matters most for its own loss.
    """
    run = make_run(regression.folder, regression.model, regression.data, "ekfac")
    scores, _ = run.self_influence(L2)
    predicted = scores / NUM_TRAIN
    correlation, slope, same_sign = agreement("own loss", predicted, regression.own_loss_change)
    assert correlation > 0.85
    assert 1 < slope < 1.45
    assert same_sign == 1
