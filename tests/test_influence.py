"""Influence in float32 and bfloat16 against per-sample gradients by torch.func, and the reuse of what was computed."""

import os
from dataclasses import replace

import precision
import pytest
import torch
import torch.nn.functional as F
from conftest import digits, influence_run, minus_margin, relative_error, tiny_network
from safetensors.torch import load_file
from torch.func import functional_call, grad, vmap

import pipeline

SEED, NUM_TRAIN, NUM_QUERY = 3, 10, 4


def network():
    """A tiny network in float32, for digits; other pseudo-labels change its rankings as much as those of ResNet-9."""
    return tiny_network(
        seed=3, channels=(8, 40), images=digits(20).normalize(digits(20).images)
    ).float()


@pytest.fixture(scope="module")
def data():
    """Ten labelled digits."""
    return digits(NUM_TRAIN)


@pytest.fixture(scope="module")
def queries():
    """Four other labelled digits."""
    return digits(NUM_QUERY, "test")


@pytest.fixture
def make_run(tmp_path, data):
    """Makes an InfluenceRun of the digits and the tiny network, in float32."""

    def make(strategy="ekfac", data=data, folder=tmp_path, model=None, **settings):
        return influence_run(folder, data, strategy, model=model or network(), **settings)

    return make


def gradients_by_torch_func(model, data, loss):
    """Per-sample gradients of `loss(logits, label)` in the convolutions and the linear layer, a list of [N, ...]."""
    layers = (torch.nn.Conv2d, torch.nn.Linear)
    names = [
        f"{name}.weight" for name, module in model.named_modules() if isinstance(module, layers)
    ]
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    tracked = {name: parameters.pop(name) for name in sorted(names)}
    rest = parameters | dict(model.named_buffers())

    def loss_of_one(tracked, image, label):
        return loss(functional_call(model, tracked | rest, (image[None],))[0], label)

    gradients = vmap(grad(loss_of_one), (None, 0, 0))(
        tracked, data.normalize(data.images), data.labels
    )
    return [gradient.flatten(1) for gradient in gradients.values()]


def test_identity_scores_of_resnet9_are_dot_products_of_per_sample_gradients(
    make_run, data, queries
):
    torch.manual_seed(0)
    model = pipeline.construct_model("resnet9", 10).eval()
    train_gradients = gradients_by_torch_func(model, data, F.cross_entropy)
    query_gradients = gradients_by_torch_func(model, queries, minus_margin)
    run = make_run("identity", model=model)
    pairwise, _ = run.pairwise_influence(queries, 3, 1e-8)
    self_influence, path = run.self_influence(1e-8)
    assert run.self_influence(None)[1] == path  # there is nothing to damp
    assert (
        relative_error(
            pairwise, sum(q @ t.T for q, t in zip(query_gradients, train_gradients, strict=True))
        )
        < 1e-4
    )
    assert relative_error(self_influence, sum(t.square().sum(1) for t in train_gradients)) < 1e-4


def test_kfac_takes_eigenvalues_that_rounding_left_below_zero_as_zero(make_run, data):
    """Factors of three images do not span the gradients of ten, and of what they leave out rounding makes the sign."""
    torch.manual_seed(0)
    layers = torch.nn.AdaptiveAvgPool2d(8), torch.nn.Flatten(), torch.nn.Linear(192, 10, bias=False)
    run = make_run("kfac", model=torch.nn.Sequential(*layers).eval(), factor_examples=3)
    found, _ = run.self_influence(1e-8)
    factors = {
        path.stem: load_file(path)["2"].double()
        for path in run.folder.glob("factors_*/*eigen*.safetensors")
    }
    values = [factors[f"{side}_eigenvalues"] for side in ("gradient", "activation")]
    assert (torch.outer(*values) < -1e-8).any()
    (gradients,) = gradients_by_torch_func(run.model, data, F.cross_entropy)
    rotated = (
        factors["gradient_eigenvectors"].T
        @ gradients.view(-1, 10, 192).double()
        @ factors["activation_eigenvectors"]
    )
    expected = (rotated**2 / (torch.outer(*(value.clamp(min=0) for value in values)) + 1e-8)).sum(
        (1, 2)
    )
    assert relative_error(found, expected.float()) < 1e-3


@pytest.mark.parametrize("strategy", pipeline.STRATEGIES)
def test_bfloat16_scores_are_float32_and_close(make_run, queries, strategy):
    exact, rounded = make_run(strategy), make_run(strategy, dtype=torch.bfloat16)
    for method, arguments in (
        ("pairwise_influence", (queries, 3, None)),
        ("self_influence", (None,)),
    ):
        (reference, _), (scores, _) = (getattr(run, method)(*arguments) for run in (exact, rounded))
        assert scores.dtype == torch.float32 and not torch.equal(scores, reference)
        assert torch.corrcoef(torch.stack([scores.flatten(), reference.flatten()]))[0, 1] > 0.98


def test_float32_and_bfloat16_give_the_ranking_of_float64(queries):
    """On a tiny network what tests/studies/precision.py holds a trained ResNet-9 to."""
    examples = pipeline.training_examples(digits(400), 0.1)
    table = precision.precision_table(network, examples, queries)
    assert precision.broken_promises(table) == []


@pytest.mark.parametrize(
    ("kernel_size", "stride", "padding"),
    [(1, 1, 0), (3, 1, 1), (5, 2, 2), ((4, 3), (2, 1), (1, 0)), ((2, 3), (3, 2), (0, 2))],
    ids=str,
)
def test_patches_and_their_covariance_are_those_of_torchs_unfold(
    monkeypatch, kernel_size, stride, padding
):
    monkeypatch.setitem(pipeline.SYMMETRIC_BLOCKS, "cpu", 4)
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(5, 2, kernel_size, stride, padding, bias=False)
    images = torch.randn(3, 5, 11, 8, dtype=torch.float64)
    expected = F.unfold(images, layer.kernel_size, 1, layer.padding, layer.stride)  # (B, C*k*k, T)
    expected = (
        expected.unflatten(1, (5, -1)).transpose(1, 2).flatten(1, 2).movedim(1, 2)
    )  # (B, T, k*k*C)
    found = pipeline.patches(layer, images)
    assert torch.equal(found, expected)
    rows = found.flatten(0, 1)
    assert relative_error(pipeline.symmetric_product(rows), rows.T @ rows) < 1e-12


def test_factors_of_fewer_images_are_those_of_a_random_subset(
    make_run, data, tmp_path, monkeypatch
):
    """Of five of ten images: as fitted on these five, with their own pseudo-labels, and not as on all ten."""

    def factors(run):
        paths = run.fit_factors().glob("*.safetensors")
        return {
            (path.stem, name): tensor.float()
            for path in paths
            for name, tensor in load_file(path).items()
        }

    chosen = torch.randperm(10, generator=torch.Generator().manual_seed(pipeline.FACTORS_SEED))[:5]
    everything, found = factors(make_run()), factors(make_run(factor_examples=5))
    uniforms = pipeline.InfluenceDataset(data, SEED).uniforms[chosen]
    monkeypatch.setattr(torch, "rand", lambda *shape, generator: uniforms)
    expected = factors(make_run(data=data.take(chosen)))
    for name, tensor in found.items():
        if "num" not in name[0]:
            assert not torch.allclose(tensor, everything[name]), name
        if "eigen" not in name[0]:  # of which the signs are free
            assert torch.allclose(tensor, expected[name], rtol=1e-3, atol=1e-6), name


# ---- Reuse ---------------------------------------------------------------------------------------


def test_a_stage_depends_on_all_that_it_is_made_of(make_run, data, queries, monkeypatch):
    """Beside what test_stale.py changes: factors and scores have another folder; a changed report changes none."""
    base, changed_weight, pixel = make_run(), network(), data.images.clone()
    changed_weight.linear.weight.data[0, 0] += 1e-3
    pixel[0, 0, 0, 0] ^= 1
    runs = [
        base,
        make_run(factor_examples=5),
        make_run(model=changed_weight),
        make_run(data=replace(data, labels=data.labels.roll(1))),
        make_run(data=replace(data, class_names=[*data.class_names[:9], "nine"])),
        make_run(data=replace(data, images=pixel)),
    ]
    assert len({run.fit_factors().name for run in runs}) == len(runs)
    others = [
        queries.take(torch.arange(3)),
        replace(queries, labels=queries.labels.roll(1)),
        queries,
    ]
    paths = [base.self_influence(damping)[1] for damping in (1e-3, 1.00000001e-3, None)]
    paths += [base.pairwise_influence(other, 3, 1e-3)[1] for other in others]
    assert len({path.parent for path in paths}) == len(paths)

    factors, source = base.fit_factors(), pipeline.inspect.getsource(pipeline)
    monkeypatch.setattr(
        pipeline.inspect, "getsource", lambda module: source + "\n# another chart\n"
    )
    assert make_run().fit_factors() == factors
    changed = source.replace("QUERY_CHUNK = 50", "QUERY_CHUNK = 49")
    monkeypatch.setattr(pipeline.inspect, "getsource", lambda module: changed)
    assert changed != source and make_run().fit_factors() != factors


@pytest.mark.parametrize(
    "name",
    [
        "factors_*/activation_eigenvectors.safetensors",
        "factors_*/factor_arguments.json",
        "scores_*/*.safetensors",
    ],
)
def test_a_truncated_file_is_named_and_its_stage_computed_anew(make_run, capsys, name):
    first = make_run().self_influence(1e-3)[0].clone()  # which would otherwise lie in the file
    (path,) = make_run().folder.glob(name)
    os.truncate(path, path.stat().st_size // 2)
    capsys.readouterr()
    again, _ = make_run().self_influence(1e-3)
    out = capsys.readouterr().out
    assert torch.equal(first, again) and f"{path} is damaged" in out and out.count("Reusing") == 1


def test_what_others_put_beside_scores_stays(make_run, capsys):
    folder = make_run().self_influence(1e-3)[1].parent
    (folder / ".ipynb_checkpoints").mkdir()
    for name in (".DS_Store", "notes.txt"):
        (folder / name).write_bytes(b"\xff")
    make_run().self_influence(1e-3)
    assert (folder / "notes.txt").exists() and capsys.readouterr().out.count("Reusing") == 2


@pytest.mark.parametrize(
    ("strategy", "phase", "left"),
    [("ekfac", "covariance", 0), ("diagonal", "lambda", 0), ("identity", "scores", 1)],
)
def test_a_nan_is_an_error_that_names_its_phase_and_leaves_what_was_whole(
    make_run, strategy, phase, left
):
    model = network()
    model.linear.weight.data[:] = torch.nan
    run = make_run(strategy, model=model)
    with pytest.raises(pipeline.NumericalError, match=f"phase '{phase}'"):
        run.self_influence(1e-3)
    folders = [path for path in run.folder.iterdir() if path.is_dir()]
    assert folders == list(run.folder.glob("factors_identity-float32-*")) and len(folders) == left


def test_without_memory_for_the_batch_it_is_halved(make_run, queries, monkeypatch, capsys):
    """A CPU says that it is a full GPU: the scores come from smaller batches."""
    expected = make_run().pairwise_influence(queries, 3, 1e-3)[0]
    whole = pipeline.InfluenceDataset.__getitems__

    def limited(dataset, indices):
        if len(indices) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return whole(dataset, indices)

    monkeypatch.setattr(pipeline.InfluenceDataset, "__getitems__", limited)
    found, _ = make_run(batch_size=8, folder=make_run().folder / "other").pairwise_influence(
        queries, 4, 1e-3
    )
    out = capsys.readouterr().out
    assert (
        out.count("going on with batches of 4\n") == out.count("going on with batches of 2\n") == 2
    )
    assert relative_error(found, expected) < 1e-5
