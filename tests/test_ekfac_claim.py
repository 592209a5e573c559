"""The claim of EKFAC: no other strategy is as close to the exact Gauss-Newton matrix.

Mean relative Frobenius errors over 10 random networks; `-rP` shows them:

            EKFAC   KFAC   T * KFAC   diagonal   identity (unscaled)
   strided  0.784  0.971      0.798      0.805     19.496
    padded  0.621  0.960      0.662      0.866      3.448
    linear  0.011  0.015      0.015      0.818      4.874

KFAC is that of kronfluence: kron(S, A), with means over the T positions. Grosse & Martens (2016,
section 3) sum A over the positions, so their block is T * kron(S, A). Without the T, the diagonal
is closer than kronfluence's KFAC in convolutions.
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import relative_error, tiny_network
from dense import (
    NUM_CLASSES,
    TOLERANCE,
    fitted_factor,
    layer_derivatives,
    make_run,
    random_data,
)
from torch.func import jacrev

import pipeline

NUM_NETWORKS = 10
POSITIONS = {"strided": 12, "padded": 12, "linear": 1}  # by layer of `tiny_network`

pytestmark = [
    pytest.mark.usefixtures("small_parts"),
    pytest.mark.filterwarnings("ignore:.*GradScaler:FutureWarning"),
]


class ExpectedLabelsTask(pipeline.ClassificationTask):
    """The data has every image once with every label. No label is drawn: losses are weighted.

    The mean over num_classes labels must be the expectation over p(label). Factors are squares of
    gradients, so the weight of a loss is the square root of num_classes * p.
    """

    def compute_train_loss(self, batch, model, sample=False):
        images, labels, _ = batch
        logits = model(images)
        p = logits.detach().softmax(1).gather(1, labels[:, None]).squeeze(1)
        losses = F.cross_entropy(logits, labels, reduction="none")
        return (losses * (p * logits.shape[1]).sqrt()).sum()


def gauss_newton(model, images):
    """Returns by layer the mean of J^T (diag(p) - p p^T) J over images, dense [O*I, O*I].

    This is the block of the Gauss-Newton matrix, which equals the Fisher matrix here.
    """
    labels = torch.zeros(len(images), dtype=torch.int64)
    jacobians = layer_derivatives(jacrev, model, images, labels, lambda logits, label: logits)
    with torch.no_grad():
        p = model(images).softmax(1)
    hessian_by_logits = p.diag_embed() - p[:, :, None] * p[:, None, :]
    return {
        layer: torch.einsum("nci,ncd,ndj->ij", jacobian, hessian_by_logits, jacobian) / len(images)
        for layer, jacobian in jacobians.items()  # (N, C, O*I)
    }


@pytest.fixture(scope="module")
def comparisons(tmp_path_factory):
    """The results of `compare` by (network, layer), for factors with expected labels."""
    folder, found = tmp_path_factory.mktemp("claim"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "ClassificationTask", ExpectedLabelsTask)
        for seed in range(NUM_NETWORKS):
            model, data = tiny_network(seed, NUM_CLASSES), random_data(32, 100 + seed)
            repeated = data.take(torch.arange(len(data)).repeat_interleave(NUM_CLASSES))
            every_label = torch.arange(NUM_CLASSES).repeat(len(data))
            run = make_run(folder, model, replace(repeated, labels=every_label), "ekfac")
            run.fit_factors()
            for layer, block in gauss_newton(model, data.normalize(data.images)).items():
                found[seed, layer] = compare(run, layer, block)
    return found


def compare(run, layer, exact):
    """Returns a layer's exact block, the fitted eigenbasis and eigenvalues, and relative errors.

    The errors are those of the matrix of each strategy, by strategy.
    """

    def factor(name):
        return fitted_factor(run, name)[layer]

    basis = torch.kron(factor("gradient_eigenvectors"), factor("activation_eigenvectors"))
    kfac_values = torch.kron(factor("gradient_eigenvalues"), factor("activation_eigenvalues"))
    kfac = basis @ kfac_values.diag() @ basis.T
    eigenvalues = (factor("lambda_matrix") / factor("num_lambda_processed")).flatten()
    matrices = {
        "ekfac": basis @ eigenvalues.diag() @ basis.T,
        "kfac": kfac,
        "kfac times positions": POSITIONS[layer] * kfac,
        # By definition. The strategy fits it with pseudo-labels, as test_exact_scores.py tests.
        "diagonal": exact.diag().diag(),
        "identity": torch.eye(len(exact), dtype=torch.float64),
    }
    errors = {strategy: relative_error(matrix, exact) for strategy, matrix in matrices.items()}
    return SimpleNamespace(exact=exact, basis=basis, eigenvalues=eigenvalues, errors=errors)


def mean_errors(comparisons, layer):
    """Prints and returns the mean relative Frobenius errors over networks, by strategy."""
    rows = [comparisons[seed, layer].errors for seed in range(NUM_NETWORKS)]
    means = {strategy: sum(row[strategy] for row in rows) / NUM_NETWORKS for strategy in rows[0]}
    print(f"{layer:8}" + "".join(f"  {strategy} {error:.3f}" for strategy, error in means.items()))
    return means


def test_ekfac_eigenvalues_are_the_diagonal_of_the_rotated_gauss_newton_block(comparisons):
    for found in comparisons.values():
        rotated = found.basis.T @ found.exact @ found.basis
        assert relative_error(found.eigenvalues, rotated.diag()) < TOLERANCE


@pytest.mark.parametrize("layer", POSITIONS)
def test_on_average_ekfac_is_closest_then_kfac_then_diagonal_then_identity(comparisons, layer):
    """KFAC includes the factor T here (T is 1 in the linear layer).

    The strategy `kfac` lacks this T, a known limit: it acts as if its damping were T times as
    large. EKFAC does not need T, because it fits the eigenvalues. If the last line fails,
    kronfluence has added the T.
    """
    means = mean_errors(comparisons, layer)
    assert means["ekfac"] < means["kfac times positions"] < means["diagonal"] < means["identity"]
    assert layer == "linear" or means["diagonal"] < means["kfac"]
