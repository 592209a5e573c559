"""Influence scores of all strategies against per-sample gradients computed by torch.func, and the reuse of results."""

import json
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import precision
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load, load_file
from torch.func import functional_call, grad, vmap

import pipeline

SEED, NUM_TRAIN, NUM_QUERY = 3, 10, 4


@pytest.fixture(scope="module")
def data():
    """Ten labelled digits."""
    return pipeline.generate_digits("", "train", NUM_TRAIN)


@pytest.fixture(scope="module")
def queries():
    """Four other labelled digits."""
    return pipeline.generate_digits("", "test").take(torch.arange(NUM_QUERY))


def tiny_network():
    """A network with a layer of more positions than channels, one of fewer, a batch-norm and a linear layer."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 5, stride=4, padding=2, bias=False),  # 64 positions
        torch.nn.BatchNorm2d(8),
        torch.nn.ReLU(),
        torch.nn.Conv2d(8, 40, 3, stride=4, padding=1, bias=False),  # 4 positions
        torch.nn.ReLU(),
        torch.nn.AdaptiveMaxPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(40, 10, bias=False),
    )
    with torch.no_grad():
        network(pipeline.normalize(pipeline.generate_digits("", "train", 20).images))  # moves the running statistics
    return network.eval()


def influence_run(folder, data, strategy="ekfac", dtype=torch.float32, seed=SEED, batch_size=4, model=None, **settings):
    """An InfluenceRun as the scripts make it, with a batch size that leaves a partial last batch."""
    return pipeline.InfluenceRun(
        model or tiny_network(),
        data,
        "model",
        output_dir=folder,
        strategy=strategy,
        dtype=dtype,
        seed=seed,
        batch_size=batch_size,
        phases=pipeline.Phases(),
        **settings,
    )


def gradients_by_torch_func(model, data, loss):
    """Per-sample gradients of `loss(logits, label)` in the convolutions and the linear layer, a list of [N, ...]."""
    layers = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear))
    }
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    tracked = {name: parameters.pop(name) for name in sorted(layers)}
    rest = parameters | dict(model.named_buffers())

    def loss_of_one(tracked, image, label):
        return loss(functional_call(model, tracked | rest, (image[None],))[0], label)

    gradients = vmap(grad(loss_of_one), (None, 0, 0))(tracked, pipeline.normalize(data.images), data.labels)
    return [gradient.flatten(1) for gradient in gradients.values()]


def minus_margin(logits, label):
    """Minus the log-odds of the label, written as log(1 - p) - log(p)."""
    log_p, is_label = F.log_softmax(logits, 0), torch.arange(len(logits)) == label
    return torch.where(is_label, -torch.inf, log_p).logsumexp(0) - torch.where(is_label, log_p, 0).sum()


def relative_error(result, expected):
    """Norm of the difference over the norm of the expectation."""
    return ((result - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("construct", [tiny_network, pipeline.construct_resnet9], ids=["tiny network", "ResNet-9"])
def test_identity_scores_are_dot_products_of_per_sample_gradients(tmp_path, data, queries, construct):
    model = construct().eval()
    train_gradients = gradients_by_torch_func(model, data, F.cross_entropy)
    query_gradients = gradients_by_torch_func(model, queries, minus_margin)
    run = influence_run(tmp_path, data, "identity", model=model)
    pairwise, _ = run.pairwise_influence(queries, 3, 1e-8)
    self_influence, path = run.self_influence(1e-8)
    assert run.self_influence(None)[1] == path  # there is nothing to damp
    assert relative_error(pairwise, sum(q @ t.T for q, t in zip(query_gradients, train_gradients, strict=True))) < 1e-4
    assert relative_error(self_influence, sum(t.square().sum(1) for t in train_gradients)) < 1e-4


def test_kfac_takes_eigenvalues_that_rounding_left_below_zero_as_zero(tmp_path, data):
    """Factors of three images do not span the gradients of ten, and of what they leave out rounding makes the sign."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.AdaptiveAvgPool2d(8), torch.nn.Flatten(), torch.nn.Linear(192, 10, bias=False)
    ).eval()
    run = influence_run(tmp_path, data, "kfac", model=model, factor_examples=3)
    found, _ = run.self_influence(1e-8)
    factors = {path.stem: load_file(path)["2"].double() for path in run.folder.glob("factors_*/*eigen*.safetensors")}
    values = [factors[f"{side}_eigenvalues"] for side in ("gradient", "activation")]
    assert (torch.outer(*values) < -1e-8).any()
    (gradients,) = gradients_by_torch_func(model, data, F.cross_entropy)
    rotated = (
        factors["gradient_eigenvectors"].T @ gradients.view(-1, 10, 192).double() @ factors["activation_eigenvectors"]
    )
    expected = (rotated**2 / (torch.outer(*(value.clamp(min=0) for value in values)) + 1e-8)).sum((1, 2))
    assert relative_error(found, expected) < 1e-3


def test_diagonal_scores_weigh_by_the_mean_squared_pseudo_gradient(tmp_path, data, queries):
    model, damping = tiny_network(), 1e-3
    with torch.no_grad():
        cumulative = model(pipeline.normalize(data.images)).softmax(1).cumsum(1)
    uniforms = torch.rand(NUM_TRAIN, generator=torch.Generator().manual_seed(SEED))
    pseudo = replace(data, labels=(cumulative < uniforms[:, None]).sum(1))
    fisher = [g.square().mean(0) for g in gradients_by_torch_func(model, pseudo, F.cross_entropy)]
    train_gradients = gradients_by_torch_func(model, data, F.cross_entropy)
    query_gradients = gradients_by_torch_func(model, queries, minus_margin)
    run = influence_run(tmp_path, data, "diagonal", model=model)
    pairwise, _ = run.pairwise_influence(queries, 3, damping)
    self_influence, _ = run.self_influence(damping)
    layers = list(zip(query_gradients, train_gradients, fisher, strict=True))
    assert relative_error(pairwise, sum((q / (f + damping)) @ t.T for q, t, f in layers)) < 1e-4
    assert relative_error(self_influence, sum((t.square() / (f + damping)).sum(1) for _, t, f in layers)) < 1e-4


@pytest.mark.parametrize("damping", [1e-3, None], ids=["fixed damping", "heuristic damping"])
@pytest.mark.parametrize("strategy", pipeline.STRATEGIES)
def test_scores_equal_those_of_unmodified_kronfluence(tmp_path, monkeypatch, data, queries, strategy, damping):
    """Same data, same pseudo-labels, kronfluence's own tracked modules: the same scores to float32 rounding."""
    ours = influence_run(tmp_path / "ours", data, strategy)
    pairwise, path = ours.pairwise_influence(queries, 3, damping)
    self_influence, _ = ours.self_influence(damping)
    assert pairwise.dtype == self_influence.dtype == torch.float32
    assert pairwise.shape == (NUM_QUERY, NUM_TRAIN) and self_influence.shape == (NUM_TRAIN,)
    assert path.is_file()

    monkeypatch.setattr(pipeline, "EigenbasisConv2d", pipeline.TrackedConv2d)
    monkeypatch.setattr(pipeline, "EigenbasisLinear", pipeline.TrackedLinear)
    theirs = influence_run(tmp_path / "theirs", data, strategy)
    assert relative_error(pairwise, theirs.pairwise_influence(queries, 3, damping)[0]) < 1e-4
    assert relative_error(self_influence, theirs.self_influence(damping)[0]) < 1e-4


@pytest.mark.parametrize("strategy", pipeline.STRATEGIES)
def test_scores_do_not_depend_on_the_batch_sizes(tmp_path, data, queries, strategy):
    small, large = (influence_run(tmp_path / str(size), data, strategy, batch_size=size) for size in (3, 10))
    assert (
        relative_error(small.pairwise_influence(queries, 1, 1e-3)[0], large.pairwise_influence(queries, 9, 1e-3)[0])
        < 1e-5
    )
    assert relative_error(small.self_influence(1e-3)[0], large.self_influence(1e-3)[0]) < 1e-5


@pytest.mark.parametrize(
    ("asked", "num_processes", "held"),
    [(1000, 1, 1000), (230, 1, 230), (60, 1, 60), (10, 1, 10), (1000, 4, 1000), (10, 8, 8), (3, 8, 8), (5000, 1, 220)],
)
def test_as_many_query_gradients_are_held_as_asked(monkeypatch, asked, num_processes, held):
    """One per process at least, and on a CPU at most what fits, here 220 of 9 MB."""
    monkeypatch.setattr(pipeline, "CPU_QUERY_BYTES", 220 * 9_000_000 if asked > 1000 else 2**40)
    queries = pipeline.ImageData(torch.zeros(2000, 1), torch.zeros(2000), [], [], None)
    run = SimpleNamespace(
        analyzer=SimpleNamespace(state=SimpleNamespace(num_processes=num_processes), compute_pairwise_scores=None),
        scores=lambda *arguments, **score_arguments: (arguments[3], score_arguments),
        gradient_bytes=9_000_000,
        seed=1,
    )
    arguments, score_arguments = pipeline.InfluenceRun.pairwise_influence(run, queries, asked, None)
    chunk, steps = arguments["per_device_query_batch_size"], score_arguments["query_gradient_accumulation_steps"]
    assert chunk * steps * num_processes == held and chunk <= pipeline.QUERY_CHUNK


@pytest.mark.parametrize("strategy", pipeline.STRATEGIES)
def test_bfloat16_scores_are_float32_and_close(tmp_path, data, queries, strategy):
    exact = influence_run(tmp_path, data, strategy)
    rounded = influence_run(tmp_path, data, strategy, dtype=torch.bfloat16)
    for method, arguments in (("pairwise_influence", (queries, 3, None)), ("self_influence", (None,))):
        reference, _ = getattr(exact, method)(*arguments)
        scores, _ = getattr(rounded, method)(*arguments)
        assert scores.dtype == torch.float32
        assert torch.corrcoef(torch.stack([scores.flatten(), reference.flatten()]))[0, 1] > 0.98


def test_float32_and_bfloat16_give_the_ranking_of_float64(data, queries):
    """On a tiny network what tests/precision.py holds a trained ResNet-9 to."""
    examples, is_corrupted = pipeline.training_examples(pipeline.load_train_data("synthetic", "", 400), 0.1)
    table = precision.precision_table(tiny_network, examples, is_corrupted.numpy(), queries)
    assert precision.broken_promises(table) == []


@pytest.mark.parametrize("strategy", pipeline.STRATEGIES)
def test_scores_do_not_depend_on_the_number_of_data_partitions(tmp_path, monkeypatch, data, queries, strategy):
    whole = influence_run(tmp_path / "whole", data, strategy)
    pairwise, _ = whole.pairwise_influence(queries, 3, 1e-3)
    self_influence, _ = whole.self_influence(1e-3)
    in_two = {"covariance_data_partitions": 2, "lambda_data_partitions": 2}
    monkeypatch.setattr(pipeline, "FactorArguments", partial(pipeline.FactorArguments, **in_two))
    monkeypatch.setattr(pipeline, "ScoreArguments", partial(pipeline.ScoreArguments, data_partitions=2))
    parts = influence_run(tmp_path / "parts", data, strategy)
    assert relative_error(parts.pairwise_influence(queries, 3, 1e-3)[0], pairwise) < 1e-5
    assert relative_error(parts.self_influence(1e-3)[0], self_influence) < 1e-5


@pytest.mark.parametrize(
    ("kernel_size", "stride", "padding"),
    [(1, 1, 0), (3, 1, 1), (3, 1, 0), (5, 2, 2), (3, 2, 0), ((4, 3), (2, 1), (1, 0)), ((2, 3), (3, 2), (0, 2))],
    ids=str,
)
def test_activation_covariance_equals_the_sum_over_patches(monkeypatch, kernel_size, stride, padding):
    """From strips of the images, where rows that patches share are multiplied once; patches by torch's own unfold."""
    monkeypatch.setattr(pipeline, "SYMMETRIC_BLOCK", 4)
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(5, 2, kernel_size, stride, padding, bias=False)
    images = torch.randn(3, 5, 11, 8, dtype=torch.float64)
    patches = F.unfold(images, layer.kernel_size, 1, layer.padding, layer.stride)  # (B, C*k*k, T)
    patches = patches.unflatten(1, (5, -1)).transpose(1, 2).flatten(1, 2).movedim(1, 2).flatten(0, 1)  # (B*T, k*k*C)
    tracked = pipeline.EigenbasisConv2d("layer", layer)
    assert relative_error(tracked.activation_covariance(images), patches.T @ patches) < 1e-12
    assert torch.equal(tracked.get_flattened_activation(images)[0], patches)


def test_margin_is_the_log_odds_of_the_label():
    logits = torch.tensor([[1.0, 2.0, 0.5], [0.0, 0.0, 3.0]], dtype=torch.float64)
    labels = torch.tensor([1, 0])
    p = logits.softmax(1).gather(1, labels[:, None]).squeeze(1)
    assert torch.allclose(pipeline.margin(logits, labels), (p / (1 - p)).log())


def test_pseudo_labels_follow_the_models_distribution():
    """With constant logits the pseudo-labels of uniform numbers on a grid have the softmax's frequencies."""
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
    uniforms = (torch.arange(1000) + 0.5) / 1000
    labels = torch.zeros(1000, dtype=torch.int64)
    task = pipeline.ClassificationTask()
    loss = task.compute_train_loss((labels, labels, uniforms), lambda images: logits.expand(1000, 4), sample=True)
    expected = -(100 * logits[0] + 400 * logits[1] + 200 * logits[2] + 300 * logits[3])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


# --------------------------------------------------------------------------------------------------
# Reuse
# --------------------------------------------------------------------------------------------------


def test_results_are_reused_and_say_so(tmp_path, data, queries, capsys):
    first, _ = influence_run(tmp_path, data).self_influence(1e-3)
    assert "Reusing" not in capsys.readouterr().out
    again, _ = influence_run(tmp_path, data).self_influence(1e-3)
    out = capsys.readouterr().out
    assert torch.equal(first, again)
    assert [line.split()[2] for line in out.splitlines()] == ["covariance", "eigendecomposition", "lambda", "scores"]
    influence_run(tmp_path, data).pairwise_influence(queries, 3, 1e-3)
    assert [line.split()[2] for line in capsys.readouterr().out.splitlines()] == [
        "covariance",
        "eigendecomposition",
        "lambda",
    ]


@pytest.mark.parametrize("damage", ["flipped bit", "truncated", "missing", "no record"])
def test_damaged_factors_are_computed_again(tmp_path, data, damage, capsys):
    first, _ = influence_run(tmp_path, data).self_influence(1e-3)
    path = next(tmp_path.glob("*/factors_*/activation_eigenvectors.safetensors"))
    content = path.read_bytes()
    if damage == "flipped bit":
        path.write_bytes(content[:-9] + bytes([content[-9] ^ 64]) + content[-8:])
    elif damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "missing":
        path.unlink()
    else:
        next(tmp_path.glob("*/factors_*/eigendecomposition.complete.json")).unlink()
    capsys.readouterr()
    again, _ = influence_run(tmp_path, data).self_influence(1e-3)
    assert torch.equal(first, again)
    for name, tensor in load(content).items():
        assert torch.equal(tensor, load_file(path)[name])
    assert "Reusing the covariance" in (out := capsys.readouterr().out) and "the eigendecomposition" not in out


def test_other_pseudo_labels_damping_or_data_do_not_reuse_scores(tmp_path, data, capsys):
    """Nor does a damping so little larger that the scores can be the same, and on some machines are."""
    base, _ = influence_run(tmp_path, data).self_influence(1e-3)
    flipped = replace(data, labels=data.labels.roll(1))
    for run, damping in (
        (influence_run(tmp_path, data, seed=SEED + 1), 1e-3),
        (influence_run(tmp_path, data), 1.001e-3),
        (influence_run(tmp_path, flipped), 1e-3),
    ):
        assert not torch.equal(base, run.self_influence(damping)[0])
    influence_run(tmp_path, data).self_influence(1.00000001e-3)
    assert "Reusing the lambda" in (out := capsys.readouterr().out) and "Reusing the scores" not in out


def test_fingerprint_changes_with_a_weight_a_label_or_a_pixel(data):
    model = tiny_network()
    names = {pipeline.fingerprint(model, data)}
    with torch.no_grad():
        model[-1].weight[0, 0] += 1e-3
    names.add(pipeline.fingerprint(model, data))
    names.add(pipeline.fingerprint(model, replace(data, labels=data.labels.roll(1))))
    pixel = data.images.clone()
    pixel[0, 0, 0, 0] ^= 1
    names.add(pipeline.fingerprint(model, replace(data, images=pixel)))
    assert len(names) == 4 and all(len(name) == 8 and int(name, 16) >= 0 for name in names)


@pytest.mark.parametrize(
    ("strategy", "phase"), [("ekfac", "covariance"), ("diagonal", "lambda"), ("identity", "scores")]
)
def test_a_nan_is_an_error_that_names_its_phase(tmp_path, data, strategy, phase):
    model = tiny_network()
    with torch.no_grad():
        model[-1].weight[:] = torch.nan
    with pytest.raises(pipeline.NumericalError, match=f"phase '{phase}'"):
        influence_run(tmp_path, data, strategy, model=model).self_influence(1e-3)


def test_records_name_sizes_and_checksums(tmp_path, data):
    import hashlib

    run = influence_run(tmp_path, data, "diagonal")
    _, path = run.self_influence(1e-3)
    record = json.loads((path.parent / "scores.complete.json").read_text())
    content = path.read_bytes()
    assert record["files"] == {path.name: [len(content), hashlib.sha256(content).hexdigest()]}
