"""Dense references: per-sample gradients by torch.func, and curvatures as matrices.

Nothing here comes from kronfluence or from the trackers of pipeline.py. A layer's weight [O, I] is
flattened row by row, with a bias as its last column. So A and S, the covariances of input patches
and of output gradients, represent the curvature block kron(S, A), [O*I, O*I].
"""

import math
from dataclasses import fields
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from conftest import image_data, influence_run, minus_log_odds
from safetensors.torch import load_file
from torch import nn
from torch.func import functional_call, grad, vmap

import pipeline

SEED, NUM_TRAIN, NUM_QUERY, NUM_CLASSES = 3, 50, 7, 4
# Partial last batches: 50 = 6 * 8 + 2, 7 = 4 + 3, and 3 = 2 + 1 with the QUERY_CHUNK of 2 that
# `small_parts` sets.
BATCH_SIZE, QUERY_BATCH_SIZE = 8, 4
SIZE = (7, 9)  # of the images; a test fails if height and width are swapped
# Errors are 1e-14 to 1e-13. One step in float32 would give an error above 1e-8.
TOLERANCE = 1e-9


def as_float64(images):
    """Converts uint8 images to float64 in [-1, 1]."""
    return images.to(torch.float64) / 127.5 - 1


class Float64Data(pipeline.ImageData):
    """Images for a network that computes in float64."""

    def normalize(self, images):
        return as_float64(images)


class Float32Data(pipeline.ImageData):
    """The same images for a network that computes in float32."""

    def normalize(self, images):
        return as_float64(images).float()


def random_data(count, seed, shape=(3, *SIZE), num_classes=NUM_CLASSES, kind=Float64Data):
    """Returns `count` images of random pixels with random labels."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, num_classes, (count,), generator=generator)
    data = image_data(images, labels, [f"class {i}" for i in range(num_classes)])
    return kind(**{field.name: getattr(data, field.name) for field in fields(data)})


def make_run(folder, model, data, strategy):
    """An InfluenceRun in float64."""
    return influence_run(
        folder,
        data,
        strategy,
        model=model,
        dtype=torch.float64,
        seed=SEED,
        batch_size=BATCH_SIZE,
    )


def fitted_factor(run, name):
    """Returns a factor that `run` has fitted, by layer, as its file contains it."""
    return load_file(run.fit_factors() / f"{name}.safetensors")


def named_layers(model):
    """Returns the convolutions and linear layers of a model, by name."""
    kinds = (nn.Conv2d, nn.Linear)
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, kinds)}


def joined_weight(layer, weight, bias):
    """Joins derivatives by weight [..., O, (C, k, k)] and bias [..., O] to [..., O*I]."""
    if isinstance(layer, nn.Conv2d):
        weight = weight.movedim(-3, -1).flatten(-3)  # (..., O, k*k*C), in pipeline.py's order
    if bias is not None:
        weight = torch.cat([weight, bias[..., None]], -1)
    return weight.flatten(-2)


def layer_derivatives(transform, model, images, labels, output):
    """Returns derivatives of `output(logits, label)` with respect to each layer's weights.

    transform: the derivative, a function of torch.func. Returns [N, ..., O*I] by layer.
    """
    layers = named_layers(model)
    rest = {name: value.detach() for name, value in model.named_parameters()}
    names = [name for name in rest if name.rpartition(".")[0] in layers]
    weights = {name: rest.pop(name) for name in names}
    rest |= dict(model.named_buffers())

    def output_of_one(weights, image, label):
        return output(functional_call(model, rest | weights, (image[None],))[0], label)

    found = vmap(transform(output_of_one), (None, 0, 0))(weights, images, labels)
    return {
        name: joined_weight(layer, found[f"{name}.weight"], found.get(f"{name}.bias"))
        for name, layer in layers.items()
    }


def per_sample_gradients(model, data, loss):
    """Returns the gradients of `loss(logits, label)`, by layer, [N, O*I]."""
    return layer_derivatives(grad, model, data.normalize(data.images), data.labels, loss)


def pseudo_labels(model, images):
    """Returns the pseudo-labels that ClassificationTask draws.

    A pseudo-label is the first class whose cumulative probability reaches the uniform number.
    """
    uniforms = torch.rand(len(images), generator=torch.Generator().manual_seed(SEED)).double()
    with torch.no_grad():
        probabilities = model(images).softmax(1)
    found = torch.searchsorted(probabilities.cumsum(1), uniforms[:, None]).squeeze(1)
    return found.clamp(max=probabilities.shape[1] - 1)


def patches(layer, inputs):
    """Returns the input patches of all images, groups and positions, by torch's unfold.

    They are [N*groups*T, I]. If the layer has a bias, a column of ones is added.
    """
    if isinstance(layer, nn.Conv2d):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        inputs = F.pad(inputs, layer._reversed_padding_repeated_twice, mode=mode)
        inputs = inputs.unflatten(1, (layer.groups, -1)).flatten(0, 1)  # (N*groups, C, H, W)
        channels = inputs.shape[1]
        windows = F.unfold(inputs, layer.kernel_size, layer.dilation, 0, layer.stride)
        windows = windows.mT.unflatten(2, (channels, -1))  # (N*groups, T, C, k*k)
        inputs = windows.mT.flatten(2)
    rows = inputs.flatten(0, -2)
    return rows if layer.bias is None else F.pad(rows, (0, 1), value=1)


def covariances(model, images, labels):
    """Returns A [I, I] and S [O, O] of each layer, and the numbers of rows of both means.

    Both are means over examples and positions, as kronfluence defines them. A is also a mean over
    groups.
    """
    inputs, gradients = {}, {}

    def record(name):
        def hook(layer, layer_inputs, output):
            inputs[name] = layer_inputs[0].detach()
            # A hook, because the output may be changed in place afterwards.
            output.register_hook(lambda gradient: gradients.update({name: gradient}))

        return hook

    layers = named_layers(model)
    hooks = [layer.register_forward_hook(record(name)) for name, layer in layers.items()]
    loss = F.cross_entropy(model(images), labels, reduction="sum")
    torch.autograd.grad(loss, list(model.parameters()))
    for hook in hooks:
        hook.remove()
    result = {}
    for name, layer in layers.items():
        a, g = patches(layer, inputs[name]), gradients[name]
        if isinstance(layer, nn.Conv2d):
            g = g.movedim(1, -1)
        g = g.flatten(0, -2)  # (N*T, O)
        result[name] = a.T @ a / len(a), g.T @ g / len(g), len(a), len(g)
    return result


def dense_layers(model, data, queries):
    """Returns A, S, and per-sample gradients [N, O*I], by layer.

    The gradients are those of the loss with the labels (`train`), of the loss with the
    pseudo-labels (`pseudo`), and of minus the log-odds of queries (`query`).
    """
    images = data.normalize(data.images)
    labels = pseudo_labels(model, images)
    pseudo = layer_derivatives(grad, model, images, labels, F.cross_entropy)
    train = per_sample_gradients(model, data, F.cross_entropy)
    query = per_sample_gradients(model, queries, minus_log_odds)
    return {
        name: SimpleNamespace(
            activation_covariance=a,
            gradient_covariance=s,
            activation_count=a_count,
            gradient_count=s_count,
            pseudo=pseudo[name],
            train=train[name],
            query=query[name],
        )
        for name, (a, s, a_count, s_count) in covariances(model, images, labels).items()
    }


def dense_curvature(strategy, layer):
    """Returns the curvature matrix [O*I, O*I] of a strategy, without damping."""
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


def dense_damping(matrix, damping):
    """Returns the damping of a curvature: "heuristic" is 0.1 times its mean eigenvalue."""
    return 0.1 * matrix.trace() / len(matrix) if damping == "heuristic" else damping


def dense_damped(strategy, layer, damping):
    """Returns the damped matrix. The identity is never damped, as in kronfluence."""
    matrix = dense_curvature(strategy, layer)
    if strategy == "identity":
        return matrix
    identity = torch.eye(len(matrix), dtype=torch.float64)
    return matrix + dense_damping(matrix, damping) * identity


def truncated_scores(layers, strategy, damping, fraction):
    """Returns the exact scores [Q, N] of queries, computed without some eigenvectors of A.

    V are the kept eigenvectors of the curvature: Kronecker products of all eigenvectors of S with
    some of A. Of the I eigenvectors of A, those with the ceil(fraction * I) largest eigenvalues are
    kept. A score is the sum over layers of q^T V (V^T H V)^-1 V^T g.
    """
    scores = 0
    for layer in layers.values():
        matrix = dense_curvature(strategy, layer)
        _, q_a = torch.linalg.eigh(layer.activation_covariance)
        _, q_g = torch.linalg.eigh(layer.gradient_covariance)
        largest = q_a.flip(1)[:, : math.ceil(fraction * len(q_a))]
        kept = torch.kron(q_g, largest)  # (O*I, O*c)
        eigenvalues = ((matrix @ kept) * kept).sum(0)  # the diagonal of V^T H V
        eigenvalues = eigenvalues + dense_damping(matrix, damping)
        scores = scores + (layer.query @ kept / eigenvalues) @ (layer.train @ kept).T
    return scores


def dense_scores(layers, strategy, damping, of="query"):
    """Returns the exact scores [Q, N]: the sum over layers of q^T H^-1 g.

    of: whose gradients are q, "query" or "train", which are attributes of what `dense_layers`
    returns.
    """
    return sum(
        getattr(layer, of)
        @ torch.linalg.solve(dense_damped(strategy, layer, damping), layer.train.T)
        for layer in layers.values()
    )
