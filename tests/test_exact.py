"""Factors and scores against dense matrices in float64, EKFAC's claim, and what a score says about real retraining.

Nothing on the reference side comes from kronfluence or from the trackers of pipeline.py: per-sample gradients come from
torch.func, patches from plain tensor views, curvatures are dense matrices, and the models without an image are trained.
A weight [O, I] (the bias is its last column) is flattened row by row, so A and S, the covariances of patches and of
output gradients, stand for the block kron(S, A), [O*I, O*I]. `-rP` shows what was measured.
"""

import copy
import gc
from collections import OrderedDict
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from kronfluence.module.conv2d import TrackedConv2d
from kronfluence.module.linear import TrackedLinear
from safetensors.torch import load_file
from torch import nn
from torch.func import functional_call, grad, hessian, jacrev, vmap

import pipeline

SEED, NUM_TRAIN, NUM_QUERY, NUM_CLASSES = 3, 50, 7, 4
BATCH_SIZE, QUERY_BATCH_SIZE, QUERY_CHUNK = 8, 4, 2  # partial last batches: 50 = 6 * 8 + 2, 7 = 4 + 3, 3 = 2 + 1
POSITIONS = {"strided": 12, "padded": 12, "linear": 1}  # by layer of `tiny_network`
TOLERANCE = 1e-6
NUM_NETWORKS = 10


@pytest.fixture(scope="module", autouse=True)
def tiny_double_precision():
    """Images become float64, and what is done in parts is done in more than one part on tiny data, too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "normalize", as_float64)
        patch.setattr(pipeline, "QUERY_CHUNK", QUERY_CHUNK)
        patch.setattr(pipeline, "CACHED_ELEMENTS", 400)  # 3 gradients of `strided`, 2 of `padded`
        # kronfluence collects garbage around every stage; walking torch's own objects is most of the time of a tiny run.
        gc.freeze()
        yield
        gc.unfreeze()


def as_float64(images):
    """Converts uint8 images to float64 in [-1, 1]."""
    return images.to(torch.float64) / 127.5 - 1


def influence_run(folder, model, data, strategy):
    """An InfluenceRun as the scripts make it, in float64; kronfluence wraps the layers of a copy of the model."""
    return pipeline.InfluenceRun(
        copy.deepcopy(model),
        data,
        "model",
        output_dir=folder,
        strategy=strategy,
        dtype=torch.float64,
        seed=SEED,
        batch_size=BATCH_SIZE,
        profile=False,
        phases=pipeline.Phases("load", "covariance", "eigendecomposition", "lambda", "scores", "report"),
    )


def fitted_factor(run, name):
    """Returns a factor that `run` has fitted, by layer, as it lies on the disk."""
    return load_file(run.folder / f"factors_{run.factors_name}" / f"{name}.safetensors")


def relative_error(result, expected):
    """Norm of the difference over the norm of the expectation; both must be float64 and of one shape."""
    assert result.dtype == expected.dtype == torch.float64 and result.shape == expected.shape
    return ((result - expected).norm() / expected.norm()).item()


# --------------------------------------------------------------------------------------------------
# The network, and its dense matrices
# --------------------------------------------------------------------------------------------------


def tiny_network(seed):
    """A strided and a padded convolution, batch-norm, max-pooling as in ResNet-9, and a linear layer, in eval mode.

    Images are 7 x 9, so that height and width cannot be swapped unseen. Running statistics are those of random images,
    disturbed; the last weights are large enough for predictions of all degrees of confidence.
    """
    torch.manual_seed(seed)
    layers = OrderedDict(
        strided=nn.Conv2d(3, 4, kernel_size=3, stride=2, bias=False),
        norm1=nn.BatchNorm2d(4),
        relu1=nn.ReLU(),
        padded=nn.Conv2d(4, 5, kernel_size=3, padding=1),
        norm2=nn.BatchNorm2d(5),
        relu2=nn.ReLU(),
        pool=nn.AdaptiveMaxPool2d(1),
        flatten=nn.Flatten(),
        linear=nn.Linear(5, NUM_CLASSES),
    )
    model = nn.Sequential(layers).double()
    model(torch.randn(64, 3, 7, 9, dtype=torch.float64))
    for norm in (model.norm1, model.norm2):
        norm.running_mean.normal_(std=0.3)
        norm.running_var.uniform_(0.2, 1)
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.3)
    with torch.no_grad():
        model.linear.weight *= 3
    return model.eval()


def random_data(count, seed, shape=(3, 7, 9), num_classes=NUM_CLASSES):
    """Returns `count` images of noise with random labels."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, num_classes, (count,), generator=generator)
    return pipeline.ImageData(images, labels, [f"class {i}" for i in range(num_classes)], [])


def joined_weight(derivatives, layer):
    """Joins the derivatives by weight [..., O, (C, k, k)] and bias [..., O] of a layer to [..., O*I]; see the top."""
    bias = derivatives.get(f"{layer}.bias")
    if bias is None:
        return derivatives[f"{layer}.weight"].flatten(-4)
    weight = derivatives[f"{layer}.weight"]
    weight = weight.reshape(*bias.shape, -1)
    return torch.cat([weight, bias[..., None]], -1).flatten(-2)


def layer_derivatives(transform, model, layer, images, labels, output):
    """Returns torch.func's `transform` of `output(logits, label)` by one layer's weights, per example [N, ..., O*I]."""
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    weights = {name: parameters.pop(name) for name in list(parameters) if name.startswith(f"{layer}.")}
    rest = parameters | dict(model.named_buffers())

    def output_of_one(weights, image, label):
        return output(functional_call(model, rest | weights, (image[None],))[0], label)

    return joined_weight(vmap(transform(output_of_one), (None, 0, 0))(weights, images, labels), layer)


def minus_margin(logits, label):
    """Minus the log-odds of the label, from the definition."""
    return -torch.logit(logits.softmax(0).gather(0, label[None])[0])


def pseudo_labels(model, images):
    """Repeats the rule of ClassificationTask: the first class whose cumulative probability reaches the uniform."""
    uniforms = torch.rand(len(images), generator=torch.Generator().manual_seed(SEED)).double()
    with torch.no_grad():
        cumulative = model(images).softmax(1).cumsum(1)
    return torch.searchsorted(cumulative, uniforms[:, None]).squeeze(1).clamp(max=NUM_CLASSES - 1)


def patches(layer, inputs):
    """Returns what each output position of a layer sees, [N*T, I], by slicing; with a bias, a column of ones."""
    if isinstance(layer, nn.Conv2d):
        inputs = F.pad(inputs, [layer.padding[0]] * 4)
        (height, width), stride = layer.kernel_size, layer.stride[0]
        windows = inputs.unfold(2, height, stride).unfold(3, width, stride)  # (N, C, H', W', k, k)
        inputs = windows.permute(0, 2, 3, 1, 4, 5).flatten(0, 2).flatten(1)
    return inputs if layer.bias is None else F.pad(inputs, (0, 1), value=1)


def covariances(model, images, labels):
    """Returns A [I, I] and S [O, O] of each layer: means over examples and positions, as kronfluence defines them."""
    seen = {}
    hooks = [
        getattr(model, name).register_forward_hook(lambda _, i, o, name=name: seen.update({name: (i[0], o)}))
        for name in POSITIONS
    ]
    loss = F.cross_entropy(model(images), labels, reduction="sum")
    for hook in hooks:
        hook.remove()
    result = {}
    for name, (inputs, outputs) in seen.items():
        a = patches(getattr(model, name), inputs.detach())
        (g,) = torch.autograd.grad(loss, outputs, retain_graph=True)
        g = g.movedim(1, -1).flatten(0, -2)  # (N*T, O)
        assert len(a) == len(g) == len(images) * POSITIONS[name]
        result[name] = a.T @ a / len(a), g.T @ g / len(g)
    return result


@pytest.fixture(scope="module")
def exact():
    """The network with its data, and by layer: A, S, and per-sample gradients [N, O*I] of losses and of the margin."""
    model, data, queries = tiny_network(0), random_data(NUM_TRAIN, 1), random_data(NUM_QUERY, 2)
    train_images, query_images = as_float64(data.images), as_float64(queries.images)
    labels = pseudo_labels(model, train_images)
    layers = {
        name: SimpleNamespace(
            activation_covariance=a,
            gradient_covariance=s,
            pseudo=layer_derivatives(grad, model, name, train_images, labels, F.cross_entropy),
            train=layer_derivatives(grad, model, name, train_images, data.labels, F.cross_entropy),
            query=layer_derivatives(grad, model, name, query_images, queries.labels, minus_margin),
        )
        for name, (a, s) in covariances(model, train_images, labels).items()
    }
    return SimpleNamespace(model=model, data=data, queries=queries, layers=layers, pseudo_labels=labels)


def dense_curvature(strategy, layer):
    """Returns the matrix [O*I, O*I] that a strategy stands for, without damping."""
    if strategy == "identity":
        return torch.eye(layer.train.shape[1], dtype=torch.float64)
    if strategy == "diagonal":
        return layer.pseudo.square().mean(0).diag()
    if strategy == "kfac":
        return torch.kron(layer.gradient_covariance, layer.activation_covariance)
    basis = torch.kron(
        torch.linalg.eigh(layer.gradient_covariance).eigenvectors,
        torch.linalg.eigh(layer.activation_covariance).eigenvectors,
    )
    return basis @ (layer.pseudo @ basis).square().mean(0).diag() @ basis.T


def dense_damped(strategy, layer, damping):
    """Returns the damped matrix; None is 0.1 times the mean eigenvalue. The identity is never damped (kronfluence)."""
    matrix = dense_curvature(strategy, layer)
    if strategy == "identity":
        return matrix
    damping = 0.1 * matrix.trace() / len(matrix) if damping is None else damping
    return matrix + damping * torch.eye(len(matrix), dtype=torch.float64)


def dense_pairwise(exact, strategy, damping):
    """Returns the exact scores [num_query, num_train]: the sum over layers of q^T H^-1 g."""
    return sum(
        layer.query @ torch.linalg.solve(dense_damped(strategy, layer, damping), layer.train.T)
        for layer in exact.layers.values()
    )


def dense_self(exact, strategy, damping):
    """Returns the exact self-influence [num_train]: the sum over layers of g^T H^-1 g."""
    return sum(
        (layer.train.T * torch.linalg.solve(dense_damped(strategy, layer, damping), layer.train.T)).sum(0)
        for layer in exact.layers.values()
    )


# --------------------------------------------------------------------------------------------------
# Exactness
# --------------------------------------------------------------------------------------------------

DAMPINGS = pytest.mark.parametrize("damping", [1e-3, 1e-8, None], ids=["damping 1e-3", "damping 1e-8", "heuristic"])


@pytest.fixture(scope="module")
def fitted(exact, tmp_path_factory):
    """One InfluenceRun per strategy, factors fitted."""
    folder = tmp_path_factory.mktemp("fitted")
    runs = {name: influence_run(folder, exact.model, exact.data, name) for name in pipeline.STRATEGIES}
    for run in runs.values():
        run.fit_factors()
    return runs


def test_the_network_exercises_every_case(exact):
    """Pseudo-labels of every class that are not the labels, and no layer in which ReLU kills a channel."""
    assert set(exact.pseudo_labels.tolist()) == set(range(NUM_CLASSES))
    assert 0 < (exact.pseudo_labels == exact.data.labels).sum() < NUM_TRAIN
    for layer in exact.layers.values():
        assert (layer.activation_covariance.diag() > 1e-3).all() and (layer.gradient_covariance.diag() > 1e-9).all()


@pytest.mark.parametrize("strategy", ["kfac", "ekfac"])
@pytest.mark.parametrize("layer", POSITIONS)
@pytest.mark.parametrize("side", ["activation", "gradient"])
def test_covariances_are_means_over_examples_and_positions(exact, fitted, strategy, layer, side):
    total = fitted_factor(fitted[strategy], f"{side}_covariance")[layer]
    count = fitted_factor(fitted[strategy], f"num_{side}_covariance_processed")[layer]
    assert count.item() == NUM_TRAIN * POSITIONS[layer]
    assert relative_error(total / count, getattr(exact.layers[layer], f"{side}_covariance")) < TOLERANCE


@pytest.mark.parametrize("strategy", ["kfac", "ekfac"])
@pytest.mark.parametrize("layer", POSITIONS)
@pytest.mark.parametrize("side", ["activation", "gradient"])
def test_eigendecomposition_gives_the_covariance_back(exact, fitted, strategy, layer, side):
    """Eigenvectors are defined only up to sign and rotation, so Q diag(s) Q^T is compared, and that Q is orthogonal."""
    q = fitted_factor(fitted[strategy], f"{side}_eigenvectors")[layer]
    s = fitted_factor(fitted[strategy], f"{side}_eigenvalues")[layer]
    assert relative_error(q @ s.diag() @ q.T, getattr(exact.layers[layer], f"{side}_covariance")) < TOLERANCE
    assert relative_error(q.T @ q, torch.eye(len(q), dtype=torch.float64)) < TOLERANCE


@pytest.mark.parametrize("strategy", ["diagonal", "ekfac"])
@pytest.mark.parametrize("layer", POSITIONS)
def test_lambda_is_the_mean_squared_pseudo_gradient_in_the_eigenbasis(exact, fitted, strategy, layer):
    total = fitted_factor(fitted[strategy], "lambda_matrix")[layer]  # (O, I)
    count = fitted_factor(fitted[strategy], "num_lambda_processed")[layer]
    assert count.item() == NUM_TRAIN
    matrix = (total / count).flatten().diag()
    if strategy == "ekfac":
        q_a, q_g = (
            fitted_factor(fitted["ekfac"], f"{side}_eigenvectors")[layer] for side in ("activation", "gradient")
        )
        basis = torch.kron(q_g, q_a)
        matrix = basis @ matrix @ basis.T
    assert relative_error(matrix, dense_curvature(strategy, exact.layers[layer])) < TOLERANCE


@DAMPINGS
@pytest.mark.parametrize("strategy", pipeline.STRATEGIES)
def test_pairwise_scores_equal_the_dense_computation(exact, fitted, strategy, damping):
    scores, _ = fitted[strategy].pairwise_influence(exact.queries, QUERY_BATCH_SIZE, damping)
    error = relative_error(scores, dense_pairwise(exact, strategy, damping))
    print(f"{strategy:8}  relative error of pairwise scores {error:.1e}")
    assert error < TOLERANCE


@DAMPINGS
@pytest.mark.parametrize("strategy", pipeline.STRATEGIES)
def test_self_influence_equals_the_dense_computation(exact, fitted, strategy, damping):
    scores, _ = fitted[strategy].self_influence(damping)
    error = relative_error(scores, dense_self(exact, strategy, damping))
    print(f"{strategy:8}  relative error of self-influence {error:.1e}")
    assert error < TOLERANCE


@pytest.mark.parametrize("strategy", pipeline.STRATEGIES)
def test_unmodified_kronfluence_agrees_with_the_dense_computation(tmp_path, monkeypatch, exact, strategy):
    """A second opinion on the reference: kronfluence's own modules, all of whose dtypes are set to float64."""
    monkeypatch.setattr(pipeline, "EigenbasisConv2d", TrackedConv2d)
    monkeypatch.setattr(pipeline, "EigenbasisLinear", TrackedLinear)
    factor_dtypes = dict.fromkeys(
        ("activation_covariance_dtype", "gradient_covariance_dtype", "lambda_dtype"), torch.float64
    )
    monkeypatch.setattr(pipeline, "FactorArguments", partial(pipeline.FactorArguments, **factor_dtypes))
    monkeypatch.setattr(pipeline, "ScoreArguments", partial(pipeline.ScoreArguments, score_dtype=torch.float64))
    run = influence_run(tmp_path, exact.model, exact.data, strategy)
    pairwise, _ = run.pairwise_influence(exact.queries, QUERY_BATCH_SIZE, None)
    self_influence, _ = run.self_influence(None)
    assert type(run.analyzer.model.linear) is TrackedLinear
    assert relative_error(pairwise, dense_pairwise(exact, strategy, None)) < TOLERANCE
    assert relative_error(self_influence, dense_self(exact, strategy, None)) < TOLERANCE


@pytest.mark.parametrize("rotated", [True, False], ids=["rotated", "not rotated"])
@pytest.mark.parametrize("positions", [1, 3, 4, 20], ids=lambda count: f"{count} positions")
def test_rotated_gradient_is_its_definition(positions, rotated):
    """Q_G^T (sum_t g_t a_t^T) Q_A; with 4 outputs, patches are rotated below 4 positions, gradients from 4 on."""
    generator = torch.Generator().manual_seed(positions)
    a, g, q_a, q_g = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in [(2, positions, 6), (2, positions, 4), (6, 6), (4, 4)]
    )
    result = pipeline.rotated_gradient(a, g, *((q_a, q_g) if rotated else (None, None)))
    for a_one, g_one, result_one in zip(a, g, result, strict=True):
        gradient = sum(torch.outer(g_t, a_t) for a_t, g_t in zip(a_one, g_one, strict=True))
        assert relative_error(result_one, q_g.T @ gradient @ q_a if rotated else gradient) < 1e-12


# --------------------------------------------------------------------------------------------------
# The claim: EKFAC is the closest of the four to the exact matrix
# --------------------------------------------------------------------------------------------------


class ExpectedLabelsTask(pipeline.ClassificationTask):
    """Every image comes once with every label; a weight takes the place of drawing, so that nothing is left to chance.

    The mean over num_classes labels must be the expectation over p(label), and factors are squares of gradients: hence
    the square root of num_classes * p.
    """

    def compute_train_loss(self, batch, model, sample=False):
        images, labels, _ = batch
        logits = model(images)
        p = logits.detach().softmax(1).gather(1, labels[:, None]).squeeze(1)
        return (F.cross_entropy(logits, labels, reduction="none") * (p * logits.shape[1]).sqrt()).sum()


def gauss_newton(model, layer, images):
    """Returns the mean of J^T (diag(p) - p p^T) J over images, dense [O*I, O*I]: Gauss-Newton, and Fisher, block."""
    labels = torch.zeros(len(images), dtype=torch.int64)
    jacobian = layer_derivatives(jacrev, model, layer, images, labels, lambda logits, label: logits)  # (N, C, O*I)
    with torch.no_grad():
        p = model(images).softmax(1)
    hessian_by_logits = p.diag_embed() - p[:, :, None] * p[:, None, :]
    return torch.einsum("nci,ncd,ndj->ij", jacobian, hessian_by_logits, jacobian) / len(images)


@pytest.fixture(scope="module")
def comparisons(tmp_path_factory):
    """By (network, layer): the exact block, EKFAC's and KFAC's matrices as fitted through pipeline.py, their basis."""
    folder, found = tmp_path_factory.mktemp("claim"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "ClassificationTask", ExpectedLabelsTask)
        for seed in range(NUM_NETWORKS):
            model, data = tiny_network(seed), random_data(32, 100 + seed)
            every_label = torch.arange(NUM_CLASSES).repeat(len(data))
            repeated = data.take(torch.arange(len(data)).repeat_interleave(NUM_CLASSES))
            repeated = pipeline.ImageData(repeated.images, every_label, data.class_names, [])
            run = influence_run(folder, model, repeated, "ekfac")
            run.fit_factors()
            for layer in POSITIONS:
                found[seed, layer] = compare(run, layer, gauss_newton(model, layer, as_float64(data.images)))
    return found


def compare(run, layer, exact):
    """Returns the exact block with what `run` has fitted of it: the eigenbasis, KFAC's matrix, and EKFAC's eigenvalues.

    KFAC comes as kronfluence has it and, as `kfac_expanded`, times the number of positions, see below.
    """
    name = dict.fromkeys(("activation", "gradient"))
    q_a, q_g = (fitted_factor(run, f"{side}_eigenvectors")[layer] for side in name)
    s_a, s_g = (fitted_factor(run, f"{side}_eigenvalues")[layer] for side in name)
    eigenvalues = fitted_factor(run, "lambda_matrix")[layer] / fitted_factor(run, "num_lambda_processed")[layer]
    basis = torch.kron(q_g, q_a)
    kfac = basis @ torch.kron(s_g, s_a).diag() @ basis.T
    matrices = {
        "ekfac": basis @ eigenvalues.flatten().diag() @ basis.T,
        "kfac_expanded": kfac * POSITIONS[layer],
        "kfac": kfac,
        "diagonal": exact.diag().diag(),  # what the strategy fits: the tests above compare it with the definition
        "identity": torch.eye(len(exact), dtype=torch.float64),
    }
    errors = {strategy: relative_error(matrix, exact) for strategy, matrix in matrices.items()}
    return SimpleNamespace(exact=exact, basis=basis, eigenvalues=eigenvalues.flatten(), errors=errors)


def mean_errors(comparisons, layer):
    """Returns the relative Frobenius errors by strategy, the mean over networks, and prints them."""
    rows = [comparisons[seed, layer].errors for seed in range(NUM_NETWORKS)]
    means = {strategy: sum(row[strategy] for row in rows) / NUM_NETWORKS for strategy in rows[0]}
    print(f"{layer:8}" + "".join(f"  {strategy} {error:.3f}" for strategy, error in means.items()))
    return means


def test_ekfac_eigenvalues_are_the_diagonal_of_the_rotated_gauss_newton_block(comparisons):
    for found in comparisons.values():
        rotated = found.basis.T @ found.exact @ found.basis
        assert relative_error(found.eigenvalues, rotated.diag()) < TOLERANCE


def test_ekfac_is_never_further_from_the_exact_block_than_kfac(comparisons):
    """In every network and layer: no other eigenvalues in the same basis, in whatever scale, are closer."""
    for found in comparisons.values():
        assert found.errors["ekfac"] <= found.errors["kfac"] + 1e-12
        assert found.errors["ekfac"] <= found.errors["kfac_expanded"] + 1e-12


@pytest.mark.parametrize("layer", POSITIONS)
def test_on_average_ekfac_is_closest_then_kfac_then_diagonal_then_identity(comparisons, layer):
    """Mean over 10 random networks; KFAC as Grosse & Martens 2016 (section 3) define it, the identity unscaled.

    For a convolution they sum the activation covariance over the positions, so the block is T * kron(S, A) in the means
    that kronfluence fits. The next test tells what becomes of kronfluence's KFAC, which lacks the T.
    """
    means = mean_errors(comparisons, layer)
    assert means["ekfac"] < means["kfac_expanded"] < means["diagonal"] < means["identity"]


@pytest.mark.parametrize("layer", ["strided", "padded"])
def test_kfac_of_kronfluence_underestimates_convolutions(comparisons, layer):
    """A known limit: without the T, the KFAC of a convolution is too small by it, and further off than the diagonal.

    The strategy `kfac` inherits that; it acts like T times the damping. EKFAC does not, as it fits the eigenvalues.
    """
    means = mean_errors(comparisons, layer)
    assert means["kfac_expanded"] < means["diagonal"] < means["kfac"] < means["identity"]
    for seed in range(NUM_NETWORKS):
        found = comparisons[seed, layer]
        assert found.exact.trace() / POSITIONS[layer] > 0


# --------------------------------------------------------------------------------------------------
# The meaning: what happens when an image is really removed
# --------------------------------------------------------------------------------------------------

L2, NUM_REMOVED, NUM_ASKED, NUM_PIXELS = 0.1, 40, 5, 12


def objective(weight, kept, inputs, labels):
    """Returns the loss of L2-regularised softmax regression, always divided by the number of all images.

    weight: [C, I]; kept: [N], 1 for the images that are trained on and 0 for the others; inputs: [N, I].
    """
    losses = F.cross_entropy(inputs @ weight.T, labels, reduction="none")
    return (losses * kept).mean() + L2 / 2 * weight.square().sum()


def newton_steps(weights, kept, inputs, labels):
    """Returns Newton's step for each of R trainings [R, C, I], and the norms of their gradients [R].

    weights: [R, C, I]; kept: [R, N].
    """
    gradients = vmap(grad(objective), (0, 0, None, None))(weights, kept, inputs, labels).flatten(1)
    hessians = vmap(hessian(objective), (0, 0, None, None))(weights, kept, inputs, labels)
    hessians = hessians.view(len(weights), gradients.shape[1], -1)
    return -torch.linalg.solve(hessians, gradients).view_as(weights), gradients.norm(dim=1)


def train_to_convergence(kept, inputs, labels, num_classes):
    """Returns the minimisers [R, C, I] of the objectives that keep the images kept [R, N]."""
    weights = torch.zeros(len(kept), num_classes, inputs.shape[1], dtype=torch.float64)
    for _ in range(20):
        steps, norms = newton_steps(weights, kept, inputs, labels)
        if norms.max() < 1e-10:
            return weights
        weights = weights + steps
    raise AssertionError(f"Newton's method has not converged: gradient norm {norms.max():.1e}")


def margins(weights, inputs, labels):
    """Returns the margins [R, N] of N inputs under R weights [R, C, I]."""
    return torch.stack([-vmap(minus_margin)(inputs @ weight.T, labels) for weight in weights])


@pytest.fixture(scope="module", params=[2, 3, 4], ids=lambda count: f"{count} classes")
def regression(request, tmp_path_factory):
    """Softmax regression on images labelled by a noisy teacher: scores, and what removing each image does.

    change: [num_query, N], margins of the queries without image n, minus those with it; own_loss_change: [N], the
    same of the loss of image n itself.
    """
    num_classes = request.param
    data = random_data(NUM_REMOVED, 20 + num_classes, (3, 2, 2), num_classes)
    queries = random_data(NUM_ASKED, 30 + num_classes, (3, 2, 2), num_classes)
    generator = torch.Generator().manual_seed(num_classes)
    teacher = 1.5 * torch.randn(num_classes, NUM_PIXELS, generator=generator, dtype=torch.float64)
    p = (as_float64(data.images).flatten(1) @ teacher.T).softmax(1)
    labels = torch.multinomial(p, 1, generator=generator).squeeze(1)
    data = pipeline.ImageData(data.images, labels, data.class_names, [])

    inputs, query_inputs = (F.pad(as_float64(part.images).flatten(1), (0, 1), value=1) for part in (data, queries))
    everything = torch.ones(1, NUM_REMOVED, dtype=torch.float64)
    all_but_one = 1 - torch.eye(NUM_REMOVED, dtype=torch.float64)
    weight = train_to_convergence(everything, inputs, labels, num_classes)  # (1, C, I)
    without = train_to_convergence(all_but_one, inputs, labels, num_classes)  # (N, C, I)

    before = F.cross_entropy(inputs @ weight[0].T, labels, reduction="none")
    after = torch.stack([F.cross_entropy(inputs[n] @ without[n].T, labels[n]) for n in range(NUM_REMOVED)])
    model = nn.Sequential(OrderedDict(flatten=nn.Flatten(), linear=nn.Linear(NUM_PIXELS, num_classes))).double()
    model.linear.weight.data, model.linear.bias.data = weight[0, :, :-1].contiguous(), weight[0, :, -1].contiguous()
    return SimpleNamespace(
        **{"data": data, "queries": queries, "model": model, "weight": weight, "all_but_one": all_but_one},
        inputs=inputs,
        query_inputs=query_inputs,
        change=(margins(without, query_inputs, queries.labels) - margins(weight, query_inputs, queries.labels)).T,
        own_loss_change=after - before,
        folder=tmp_path_factory.mktemp("regression"),
    )


def correlation(predicted, actual):
    """Returns Pearson's correlation over all elements."""
    return torch.corrcoef(torch.stack([predicted.flatten(), actual.flatten()]))[0, 1].item()


def slope(predicted, actual):
    """Returns the factor by which the actual change exceeds the predicted one, by least squares."""
    return ((predicted * actual).sum() / predicted.square().sum()).item()


def report(title, predicted, actual):
    """Prints and returns correlation, slope, and the fraction of equal signs."""
    found = correlation(predicted, actual), slope(predicted, actual), (predicted * actual > 0).double().mean().item()
    print(f"{title:24}  correlation {found[0]:.4f}  slope {found[1]:.3f}  same sign {found[2]:.3f}")
    return found


def test_pairwise_scores_predict_the_change_in_margin_when_an_image_is_removed(regression):
    """A positive score is a helpful image: without it the margin falls, by about score / N.

    What is removed takes its own curvature with it, which a first-order score leaves out: the change is somewhat larger
    than predicted (slope above 1), with the exact Hessian as with EKFAC.
    """
    run = influence_run(regression.folder, regression.model, regression.data, "ekfac")
    scores, _ = run.pairwise_influence(regression.queries, QUERY_BATCH_SIZE, L2)
    pearson, factor, same_sign = report("EKFAC", -scores / NUM_REMOVED, regression.change)
    assert pearson > 0.95 and 0.9 < factor < 1.35 and same_sign > 0.85
    run = influence_run(regression.folder, regression.model, regression.data, "identity")
    dot_products, _ = run.pairwise_influence(regression.queries, QUERY_BATCH_SIZE, L2)
    assert report("identity", -dot_products / NUM_REMOVED / L2, regression.change)[0] < pearson


def test_scores_by_the_exact_hessian_predict_the_change_in_margin(regression):
    """The same with the dense Hessian, which leaves only the error of the first order; no pseudo-labels are drawn."""
    gradient = exact_influence_direction(regression, torch.ones_like(regression.all_but_one))
    pearson, factor, same_sign = report("exact Hessian", gradient, regression.change)
    assert pearson > 0.99 and 1 < factor < 1.35 and same_sign > 0.95


def test_the_slope_is_the_curvature_of_the_removed_image(regression):
    """With the Hessian without the removed image (one Newton step) the slope is 1: the theory is complete."""
    predicted = exact_influence_direction(regression, regression.all_but_one)
    pearson, factor, _ = report("one Newton step", predicted, regression.change)
    assert pearson > 0.999 and 0.97 < factor < 1.03


def exact_influence_direction(regression, curved):
    """Returns the predicted change in margin [num_query, N], with the Hessian over the images `curved`, [N, N]."""
    labels, query_labels = regression.data.labels, regression.queries.labels
    flat = regression.weight.expand(NUM_REMOVED, -1, -1)
    removed = vmap(grad(objective), (0, 0, None, None))(flat, regression.all_but_one, regression.inputs, labels)
    hessians = vmap(hessian(objective), (0, 0, None, None))(flat, curved, regression.inputs, labels)
    removed = removed.flatten(1)  # (N, C*I): the gradient of all but image n, where that of all is zero
    steps = -torch.linalg.solve(hessians.view(NUM_REMOVED, removed.shape[1], -1), removed)
    minus = vmap(grad(lambda w, x, y: minus_margin(x @ w.T, y)), (None, 0, 0))
    return -minus(regression.weight[0], regression.query_inputs, query_labels).flatten(1) @ steps.T


def test_self_influence_predicts_the_loss_of_an_image_that_was_not_trained_on(regression):
    """Without it, the loss of the image itself rises, by about self-influence / N."""
    run = influence_run(regression.folder, regression.model, regression.data, "ekfac")
    scores, _ = run.self_influence(L2)
    pearson, factor, same_sign = report("self-influence", scores / NUM_REMOVED, regression.own_loss_change)
    assert pearson > 0.95 and 0.9 < factor < 1.5 and same_sign == 1
