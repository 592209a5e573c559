"""Influence in float32 and bfloat16 against per-sample gradients by torch.func, and the cache."""

import contextlib
import os
import shutil
from dataclasses import replace
from types import SimpleNamespace

import dense
import precision
import pytest
import torch
import torch.nn.functional as F
from conftest import digits, influence_run, minus_log_odds, relative_error, tiny_network
from dense import per_sample_gradients
from kronfluence.utils import constants
from safetensors.torch import load_file, save_file
from torch import nn

import pipeline

SEED, NUM_TRAIN, NUM_QUERY = 3, 10, 4


def network():
    """A tiny network in float32, for digits.

    Its rankings depend on the pseudo-labels as much as ResNet-9's rankings do.
    """
    return tiny_network(seed=3, channels=(8, 40)).float()


@pytest.fixture(scope="module")
def data():
    """Ten labelled digits for training."""
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


def test_identity_scores_of_resnet9_are_dot_products_of_per_sample_gradients(
    make_run, data, queries
):
    torch.manual_seed(0)
    model = pipeline.construct_model("resnet9", 10).eval()
    train_gradients = per_sample_gradients(model, data, F.cross_entropy)
    query_gradients = per_sample_gradients(model, queries, minus_log_odds)
    run = make_run("identity", model=model)
    pairwise, _ = run.pairwise_influence(queries, 3, 1e-8)
    self_influence, path = run.self_influence(1e-8)
    assert run.self_influence("heuristic")[1] == path  # `identity` has nothing to damp
    products = sum(query_gradients[layer] @ train.T for layer, train in train_gradients.items())
    assert relative_error(pairwise, products) < 1e-4
    squares = sum(train.square().sum(1) for train in train_gradients.values())
    assert relative_error(self_influence, squares) < 1e-4


@pytest.mark.parametrize(
    "num_queries, allowed, steps, chunk",
    [
        (51, 1000, 2, 26),
        (51, 51, 2, 26),
        (52, 51, 2, 25),
        (100, 1000, 2, 50),
        (2000, 235, 5, 47),
        (3, 1, 1, 1),
    ],
)
def test_all_queries_are_held_at_once_if_that_is_allowed(num_queries, allowed, steps, chunk):
    """Otherwise as many are held as fit into equal chunks, and no more than allowed."""
    found = []

    def compute_pairwise_scores(name, factors, queries, images, chunk, batch_size, *, score_args):
        found.append((score_args.query_gradient_accumulation_steps, chunk))

    run = SimpleNamespace(
        analyzer=SimpleNamespace(
            state=SimpleNamespace(num_processes=1),
            compute_pairwise_scores=compute_pairwise_scores,
        ),
        dataset=None,
        batch_size=64,
        phase=lambda *names: contextlib.nullcontext(),
    )
    args = pipeline.InfluenceArguments()
    pipeline.InfluenceRun.write_pairwise_scores(
        run, "factors", range(num_queries), allowed, args, "scores", 64
    )
    assert found == [(steps, chunk)]


def test_kfac_sets_negative_eigenvalues_to_zero(make_run, data):
    """Factors of three images have many eigenvalues that are zero.

    Rounding makes some of them negative.
    """
    torch.manual_seed(0)
    layers = nn.AdaptiveAvgPool2d(8), nn.Flatten(), nn.Linear(192, 10, bias=False)
    run = make_run("kfac", model=nn.Sequential(*layers).eval(), factor_examples=3)
    found, _ = run.self_influence(1e-8)
    paths = run.folder.glob("factors_*/*eigen*.safetensors")
    factors = {path.stem: load_file(path)["2"].double() for path in paths}
    values = [factors[f"{side}_eigenvalues"] for side in ("gradient", "activation")]
    assert (torch.outer(*values) < -1e-8).any()
    gradients = per_sample_gradients(run.model, data, F.cross_entropy)["2"].view(-1, 10, 192)
    q_g, q_a = factors["gradient_eigenvectors"], factors["activation_eigenvectors"]
    rotated = q_g.T @ gradients.double() @ q_a
    damped = torch.outer(*(value.clamp(min=0) for value in values)) + 1e-8
    assert relative_error(found, (rotated**2 / damped).sum((1, 2)).float()) < 1e-3


@pytest.mark.parametrize("strategy", pipeline.STRATEGIES)
def test_bfloat16_scores_are_float32_and_close(make_run, queries, strategy):
    exact, rounded = make_run(strategy), make_run(strategy, dtype=torch.bfloat16)
    for method, arguments in (
        ("pairwise_influence", (queries, 3, "heuristic")),
        ("self_influence", ("heuristic",)),
    ):
        (reference, _), (scores, _) = (getattr(run, method)(*arguments) for run in (exact, rounded))
        assert scores.dtype == torch.float32 and not torch.equal(scores, reference)
        assert torch.corrcoef(torch.stack([scores.flatten(), reference.flatten()]))[0, 1] > 0.98


def test_float32_and_bfloat16_give_the_ranking_of_float64(queries):
    """tests/studies/precision.py makes the same comparison for a trained ResNet-9."""
    examples = pipeline.training_examples(digits(400), 0.1)
    table = precision.precision_table(network, examples, queries)
    assert precision.broken_promises(table) == []


@pytest.mark.parametrize(
    ("kernel_size", "stride", "padding"),
    [(1, 1, 0), (3, 1, 1), (5, 2, 2), ((4, 3), (2, 1), (1, 0)), ((2, 3), (3, 2), (0, 2))],
    ids=str,
)
def test_patches_and_their_covariance_equal_those_of_unfold(
    monkeypatch, kernel_size, stride, padding
):
    monkeypatch.setitem(pipeline.SYMMETRIC_BLOCKS, "cpu", 4)
    torch.manual_seed(0)
    layer = nn.Conv2d(5, 2, kernel_size, stride, padding, bias=False)
    images = torch.randn(3, 5, 11, 8, dtype=torch.float64)
    rows = pipeline.patches(layer, images).flatten(0, 1)
    assert torch.equal(rows, dense.patches(layer, images))
    assert relative_error(pipeline.symmetric_product(rows), rows.T @ rows) < 1e-12


def test_factors_of_fewer_images_are_those_of_a_random_subset(
    make_run, data, tmp_path, monkeypatch
):
    """Factors of five random images equal those fitted on a data set of these five."""

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
        if "eigen" not in name[0]:  # the signs of eigenvectors are arbitrary
            assert torch.allclose(tensor, expected[name], rtol=1e-3, atol=1e-6), name


# ---- The cache -----------------------------------------------------------------------------------


def test_the_hashes_of_factors_and_scores_depend_on_all_their_inputs(
    make_run, data, queries, monkeypatch
):
    """test_stale.py changes further inputs. The code of the report does not change the hashes."""
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
    paths = [base.self_influence(damping)[1] for damping in (1e-3, 1.00000001e-3, "heuristic")]
    paths += [base.pairwise_influence(other, 3, 1e-3)[1] for other in others]
    paths += [base.pairwise_influence(queries, 3, 1e-3, fraction)[1] for fraction in (0.5, 0.2)]
    assert len({path.parent for path in paths}) == len(paths)

    factors = base.fit_factors()
    source = pipeline.SOURCE
    assert source.count("\nQUERY_CHUNK = 50") == source.count("\nMAX_NAME = 16") == 1
    monkeypatch.setattr(pipeline, "SOURCE", source.replace("\nMAX_NAME = 16", "\nMAX_NAME = 15"))
    assert make_run().fit_factors() == factors
    changed = source.replace("\nQUERY_CHUNK = 50", "\nQUERY_CHUNK = 49")
    monkeypatch.setattr(pipeline, "SOURCE", changed)
    assert make_run().fit_factors() != factors


@pytest.mark.parametrize("strategy", pipeline.STRATEGIES)
def test_the_eigenvector_fraction_1_computes_the_default_scores(make_run, queries, strategy):
    """Computed a second time, after the first scores were deleted."""
    expected, path = make_run(strategy).pairwise_influence(queries, 3, 1e-3)
    expected = expected.clone()
    shutil.rmtree(path.parent)
    found, again = make_run(strategy).pairwise_influence(queries, 3, 1e-3, 1.0)
    assert torch.equal(found, expected) and again == path


def test_a_fraction_that_leaves_nothing_out_gives_the_full_scores(make_run, queries):
    """0.99 of 27, 73 or 41 inputs is all of them, rounded up."""
    full, path = make_run().pairwise_influence(queries, 3, 1e-3)
    found, other = make_run().pairwise_influence(queries, 3, 1e-3, 0.99)
    assert torch.equal(found, full) and other != path


@pytest.mark.parametrize("strategy", pipeline.STRATEGIES)
def test_scores_by_an_index_are_those_without_it(make_run, queries, monkeypatch, strategy):
    """The index is in float32. The gradients of three queries are held, then that of the last."""
    monkeypatch.setattr(pipeline, "INDEX_DTYPE", torch.float32)
    expected, path = make_run(strategy).pairwise_influence(queries, 3, 1e-3)
    found, other = make_run(strategy).pairwise_influence(queries, 3, 1e-3, with_index=True)
    assert relative_error(found, expected) < 1e-6 and other != path


def test_scores_by_an_index_in_bfloat16_are_close(make_run, queries):
    expected, _ = make_run().pairwise_influence(queries, 3, 1e-3, 0.3)
    found, _ = make_run().pairwise_influence(queries, 3, 1e-3, 0.3, with_index=True)
    assert 0 < relative_error(found, expected) < 1e-2
    files = sorted(make_run().folder.glob("index_*/*.safetensors"))
    gradients = torch.cat([load_file(file)["gradients"] for file in files])
    assert gradients.dtype == torch.bfloat16
    assert gradients.shape == (NUM_TRAIN, sum(make_run().gradient_sizes(0.3)))


def test_an_index_is_read_for_other_queries_and_dampings(make_run, queries, monkeypatch):
    """Training gradients are computed once for each fraction of the eigenvectors."""
    computed = []

    class Counted(pipeline.IndexedGradient):
        def update(self, a, g):
            computed.append(len(g))
            super().update(a, g)

    monkeypatch.setattr(pipeline, "IndexedGradient", Counted)
    others = queries.take(torch.arange(2))
    for fraction, calls in ((0.3, 1), (0.2, 2)):
        for damping in (1e-3, "heuristic"):
            for data in (queries, others):
                make_run().pairwise_influence(data, 3, damping, fraction, with_index=True)
                assert sum(computed) == 3 * NUM_TRAIN * calls  # of three layers


def test_an_index_that_the_disk_has_no_space_for_is_refused_before_it_is_written(
    make_run, queries, monkeypatch
):
    run = make_run()
    size = 2 * NUM_TRAIN * sum(run.gradient_sizes(0.3))
    usage = SimpleNamespace(free=size - 1)
    monkeypatch.setattr(pipeline.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(pipeline.UserError, match="for ekfac and kfac a lower --eigenvector"):
        run.pairwise_influence(queries, 3, 1e-3, 0.3, with_index=True)
    assert not list(run.folder.glob("index_*"))
    usage.free = size
    run.pairwise_influence(queries, 3, 1e-3, 0.3, with_index=True)


def test_space_for_the_indices_of_all_runs_is_required_before_factors_are_fitted(
    make_run, queries, monkeypatch
):
    runs = [make_run(), make_run(folder=make_run().folder / "other")]
    size = 2 * NUM_TRAIN * sum(runs[0].gradient_sizes(0.3))
    usage = SimpleNamespace(free=2 * size - 1)
    monkeypatch.setattr(pipeline.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(pipeline.UserError, match=r"--index needs .*: free space, or choose"):
        pipeline.require_index_space(runs, 0.3)
    runs[0].pairwise_influence(queries, 3, 1e-3, 0.3, with_index=True)
    pipeline.require_index_space(runs, 0.3)  # the first run has an index


def test_an_index_in_another_basis_is_not_used(make_run, queries):
    """Another fit of the factors may find the eigenvectors with other signs."""
    expected, path = make_run().pairwise_influence(queries, 3, 1e-3, 0.3, with_index=True)
    expected = expected.clone()
    shutil.rmtree(path.parent)
    eigenvectors = make_run().fit_factors() / "activation_eigenvectors.safetensors"
    negated = {name: -tensor for name, tensor in load_file(eigenvectors).items()}
    save_file(negated, eigenvectors)
    found, _ = make_run().pairwise_influence(queries, 3, 1e-3, 0.3, with_index=True)
    assert relative_error(found, expected) < 1e-2
    assert len(list(make_run().folder.glob("index_*"))) == 2


def test_an_index_is_built_only_for_scores_that_are_missing(make_run, queries):
    make_run().pairwise_influence(queries, 3, 1e-3, 0.3, with_index=True)
    (index,) = make_run().folder.glob("index_*")
    (index / "._gradients_000000.safetensors").write_bytes(b"\xff")  # by a network drive
    make_run().pairwise_influence(queries.take(torch.arange(2)), 3, 1e-3, 0.3, with_index=True)
    shutil.rmtree(index)
    make_run().pairwise_influence(queries, 3, 1e-3, 0.3, with_index=True)
    assert not index.exists()


def test_files_of_a_killed_run_are_removed_before_an_index_is_built(make_run, queries):
    leftover = make_run().folder / "index_unfinished-0"
    leftover.mkdir()
    make_run().pairwise_influence(queries, 3, 1e-3, 0.3, with_index=True)
    assert not leftover.exists()


def test_a_nan_stops_an_index_and_leaves_nothing(make_run, queries):
    model = network()
    model.linear.weight.data[:] = torch.nan
    run = make_run("identity", model=model)
    with pytest.raises(pipeline.NumericalError, match="phase 'index'"):
        run.pairwise_influence(queries, 3, 1e-3, with_index=True)
    assert not list(run.folder.glob("index_*")) and not list(run.folder.glob("scores_*"))


@pytest.mark.parametrize("missing", ["one byte", "the file"])
def test_a_damaged_index_is_computed_again(make_run, queries, capsys, missing):
    first, path = make_run().pairwise_influence(queries, 3, 1e-3, 0.3, with_index=True)
    first = first.clone()
    shutil.rmtree(path.parent)
    file = next(make_run().folder.glob("index_*/*.safetensors"))
    if missing == "one byte":
        os.truncate(file, file.stat().st_size - 1)
    else:
        file.unlink()
    again, _ = make_run().pairwise_influence(queries, 3, 1e-3, 0.3, with_index=True)
    assert torch.equal(first, again) and f"{file} is missing or damaged" in capsys.readouterr().out


def test_self_influence_keeps_all_eigenvectors(make_run, queries):
    expected = make_run().self_influence(1e-3)[0].clone()
    run = make_run(folder=make_run().folder / "other")
    run.pairwise_influence(queries, 3, 1e-3, 0.1)
    assert torch.equal(run.self_influence(1e-3)[0], expected)


@pytest.mark.parametrize("fraction", [1.0, 0.25, 0.001])
def test_only_as_many_queries_are_held_as_fit_into_memory(make_run, monkeypatch, fraction):
    """Of the tiny network's layers [8, 27], [40, 73] with a bias, and [10, 41] with a bias."""
    columns = {1.0: (27, 73, 41), 0.25: (7, 19, 11), 0.001: (1, 1, 1)}[fraction]
    held = 4 * (8 * columns[0] + 40 * columns[1] + 10 * columns[2])  # bytes of a query
    monkeypatch.setattr(pipeline, "CPU_QUERY_BYTES", 5 * held + held - 1)
    run = make_run()
    assert run.queries_at_once(1000, fraction) == 5
    assert run.queries_at_once("auto", fraction) == 5
    assert run.queries_at_once(3, fraction) == 3


def test_held_gradients_of_truncated_queries_have_the_counted_size(make_run, queries, monkeypatch):
    sizes = []

    class Recorded(pipeline.PreconditionedQuery):
        def accumulate_iterations(self):
            sizes.append(self.module.storage[constants.PRECONDITIONED_GRADIENT_NAME].shape)
            super().accumulate_iterations()

    monkeypatch.setattr(pipeline, "PreconditionedQuery", Recorded)
    make_run().pairwise_influence(queries, 4, 1e-3, 0.25)
    assert set(sizes) == {(4, 8, 7), (4, 40, 19), (4, 10, 11)}


def test_kronfluence_does_not_reset_the_compiler_and_reset_works_afterwards(make_run, monkeypatch):
    def reset():
        raise AssertionError("the compiler was reset, which imports it")

    monkeypatch.setattr(torch.compiler, "reset", reset)
    make_run("identity").self_influence(0.0)
    assert torch.compiler.reset is reset


def test_every_process_gets_the_value_of_the_main_one(make_run, monkeypatch):
    run = make_run("identity")
    assert run.from_main("own") == "own"
    run.analyzer.state = SimpleNamespace(use_distributed=True, device="cpu")

    def broadcast(values, device):
        values[0] = "that of the main process"

    monkeypatch.setattr(torch.distributed, "broadcast_object_list", broadcast)
    assert run.from_main("own") == "that of the main process"


@pytest.mark.parametrize("count", ["all", NUM_TRAIN, 99])
def test_factors_of_all_examples_or_more_are_those_of_the_training_images(make_run, count):
    run = make_run(factor_examples=count)
    assert run.factor_dataset is run.dataset


@pytest.mark.parametrize(
    "name",
    [
        "factors_*/activation_eigenvectors.safetensors",
        "factors_*/factor_arguments.json",
        "scores_*/*.safetensors",
        "factors_*/files.json",
    ],
)
@pytest.mark.parametrize("missing_bytes", ["one", "half", "all"])
def test_a_truncated_or_missing_file_is_named_and_computed_again(
    make_run, capsys, name, missing_bytes
):
    first = make_run().self_influence(1e-3)[0].clone()  # a copy: the tensor is mapped to the file
    (path,) = make_run().folder.glob(name)
    size = path.stat().st_size
    if missing_bytes == "all":
        path.unlink()
    else:
        os.truncate(path, size - 1 if missing_bytes == "one" else size // 2)
    capsys.readouterr()
    again, _ = make_run().self_influence(1e-3)
    out = capsys.readouterr().out
    assert (
        torch.equal(first, again)
        and f"{path} is missing or damaged" in out
        and out.count("Reusing") == 1
    )


def test_other_files_beside_scores_are_kept(make_run, capsys):
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
def test_a_nan_is_an_error_that_names_its_phase_and_keeps_complete_results(
    make_run, strategy, phase, left
):
    model = network()
    model.linear.weight.data[:] = torch.nan
    run = make_run(strategy, model=model)
    with pytest.raises(pipeline.NumericalError, match=f"phase '{phase}'"):
        run.self_influence(1e-3)
    folders = [path for path in run.folder.iterdir() if path.is_dir()]
    assert folders == list(run.folder.glob("factors_identity-float32-*")) and len(folders) == left


def test_the_batch_is_halved_if_it_does_not_fit_into_memory(make_run, queries, monkeypatch, capsys):
    """The CPU raises the error of a full GPU. Scores of smaller batches are the same."""
    expected = make_run().pairwise_influence(queries, 3, 1e-3)[0]
    monkeypatch.setattr(pipeline, "INDEX_DTYPE", torch.float32)
    whole = pipeline.InfluenceDataset.__getitems__

    def limited(dataset, indices):
        if len(indices) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return whole(dataset, indices)

    monkeypatch.setattr(pipeline.InfluenceDataset, "__getitems__", limited)
    run = make_run(batch_size=8, folder=make_run().folder / "other")
    found, _ = run.pairwise_influence(queries, 4, 1e-3)
    out = capsys.readouterr().out
    assert (
        out.count("going on with batches of 4\n") == out.count("going on with batches of 2\n") == 2
    )
    assert relative_error(found, expected) < 1e-5
    found, _ = run.pairwise_influence(queries, 4, 1e-3, with_index=True)
    assert relative_error(found, expected) < 1e-5
    assert len(list(run.folder.glob("index_*/*.safetensors"))) == NUM_TRAIN / 2
