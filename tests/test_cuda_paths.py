"""Code for GPUs with fake CUDA tensors, which have devices, dtypes and shapes, but no values.

A wrong device or dtype is found on any machine. Some code needs values or a real GPU, and is not
traced here:

- autograd's backward pass: its engine needs a CUDA context. Gradients are zeros here;
- `.item()`, `.tolist()`, `nonzero` and `.numpy()`: the end of an epoch in train.train, the checks
  of find_tracked_layers, fingerprints, ImageData.take, and the use of scores;
- files: InfluenceRun's factors and scores, which kronfluence writes and reads;
- memory formats: a fake network cannot be moved to channels last.
"""

import ast
import contextlib
import itertools
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from kronfluence.module.conv2d import TrackedConv2d
from kronfluence.module.linear import TrackedLinear
from kronfluence.module.tracked_module import ModuleMode
from kronfluence.utils import constants
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import detect_mislabeled_dataset as detect
import pipeline
import train

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16)
BATCH, CLASSES = 6, 10


aten = torch.ops.aten
PRODUCTS = (aten.mm, aten.bmm, aten.addmm, aten.baddbmm, aten.mv, aten.addmv, aten.convolution)
INDEXING = (aten.index, aten.index_put, aten.index_put_)


class Strict(TorchDispatchMode):
    """Refuses two operations that CUDA refuses, but fake tensors accept.

    They are products of two dtypes, and indexing a tensor on the CPU by a tensor on the GPU.
    """

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        operation = function.overloadpacket
        if operation in PRODUCTS:
            dtypes = {value.dtype for value in args if isinstance(value, torch.Tensor)}
            if len(dtypes) > 1:
                raise RuntimeError(f"{operation} of two dtypes: {dtypes}")
        if operation in INDEXING:
            for index in args[1]:
                if index is not None and index.device not in (args[0].device, CPU):
                    raise RuntimeError(f"{operation} by an index on another device")
        return function(*args, **(kwargs or {}))


@pytest.fixture
def fake_cuda(monkeypatch):
    """All tensors of the test are fake, and autocast finds a GPU with bfloat16."""
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda *_, **__: True)
    with FakeTensorMode(allow_non_fake_inputs=True), Strict():
        yield


def fake_network(name):
    """A network of MODELS on the GPU."""
    with torch.device(CUDA):
        return pipeline.ImageClassifier(pipeline.MODELS[name](CLASSES))


def record_dtypes(model):
    """Returns a set; each call of the network adds the dtype of its features."""
    dtypes = set()
    model.features.register_forward_hook(lambda _, inputs, output: dtypes.add(output.dtype))
    return dtypes


def fake_data(count=BATCH):
    """ImageData on the GPU, with its indices on the CPU."""
    labels = torch.zeros(count, dtype=torch.int64, device=CUDA)
    return pipeline.ImageData(
        images=torch.zeros(count, 3, 32, 32, dtype=torch.uint8, device=CUDA),
        labels=labels,
        true_labels=labels,
        class_names=[str(label) for label in range(CLASSES)],
        paths=[""] * count,
        indices=torch.arange(count),
        dataset_indices=torch.arange(count),
        num_available=count,
    )


def assert_is(tensor, dtype, *shape, device=CUDA):
    """Checks the dtype, shape and device of a tensor."""
    assert (tensor.dtype, tuple(tensor.shape), tensor.device) == (dtype, shape, device)


MISTAKES = {  # operations of a GPU tensor, float32 or bfloat16 [2, 2], with another tensor
    "a product with the CPU": (lambda a: a @ torch.zeros(2, 2, dtype=a.dtype), "devices"),
    "a sum with the CPU": (lambda a: a + torch.zeros(2, 2, dtype=a.dtype), "devices"),
    "a product of two dtypes": (lambda a: a @ torch.zeros(2, 2, device=CUDA).double(), "dtypes"),
    "a convolution of two dtypes": (
        lambda a: F.conv2d(a[None, None], torch.zeros(1, 1, 1, 1, device=CUDA).double()),
        "dtypes",
    ),
    "a CPU tensor by an index on the GPU": (
        lambda a: torch.zeros(2)[torch.zeros(2, dtype=torch.int64, device=CUDA)],
        "another device",
    ),
    "a value": (lambda a: a.sum().item(), "local_scalar_dense"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mistakes_of_device_and_dtype_are_found_without_a_gpu(fake_cuda, dtype, mistake):
    """The other tests of this file rely on it."""
    make, words = MISTAKES[mistake]
    with pytest.raises(Exception, match=words):
        make(torch.zeros(2, 2, dtype=dtype, device=CUDA))


# ---- Training and evaluation ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", pipeline.MODELS)
def test_a_training_step_runs_on_the_gpu(fake_cuda, monkeypatch, name, dtype):
    model, data = fake_network(name), fake_data()
    computed_in = record_dtypes(model)

    def backward(loss):
        assert_is(loss, torch.float32)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    recipe = train.RECIPES["robust"]
    margins = torch.full((1, BATCH), torch.nan, dtype=torch.float16, device=CUDA)
    training = train.Training(
        model, train.make_optimizer(model, recipe), torch.Generator(), margins, dtype
    )
    drawn = train.epoch_batches(BATCH, 4, torch.Generator().manual_seed(0))
    order, offsets, flips = (tensor.to(CUDA)[0] for tensor in drawn)
    images = train.crop_and_flip(data.images[order], offsets, flips, recipe.border)
    assert_is(images, torch.uint8, 4, 3, 32, 32)
    normalized = data.normalize(images)
    assert_is(normalized, torch.float32, 4, 3, 32, 32)
    model.train()
    loss, margin = train.train_step(training, normalized, data.labels[order])
    assert_is(loss, torch.float32)
    assert_is(margin, torch.float16, 4)
    assert computed_in == {dtype}
    margins[0, order] = margin
    assert {parameter.device for parameter in model.parameters()} == {CUDA}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", pipeline.MODELS)
def test_evaluation_runs_on_the_gpu(fake_cuda, name, dtype):
    model = fake_network(name)
    computed_in = record_dtypes(model)
    logits = train.compute_logits(model, fake_data(), 4, dtype)
    assert computed_in == {dtype}
    assert_is(logits, torch.float32, BATCH, CLASSES)
    assert_is(pipeline.log_odds(logits, fake_data().labels), torch.float32, BATCH)
    assert_is(pipeline.margin(logits, fake_data().labels), torch.float32, BATCH)


# ---- Detection -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_signals_and_logits_are_returned_on_the_cpu(fake_cuda, monkeypatch, dtype):
    """`.numpy()` returns the tensor itself here, so that its device can be checked."""
    monkeypatch.setattr(torch.Tensor, "numpy", lambda tensor: tensor)
    data = fake_data(BATCH)
    metadata = {"margins": torch.zeros(3, BATCH, dtype=torch.float16), "accuracy": {"test": 0.5}}
    for name in pipeline.MODELS:
        run = SimpleNamespace(
            model=fake_network(name),
            data=data,
            batch_size=4,
            dtype=dtype,
            strategy="ekfac",
            seconds={},
            self_influence=lambda damping: (torch.zeros(BATCH), Path("self.safetensors")),
        )
        signals, logits, _ = detect.measure(run, metadata, 0.1)
        assert_is(logits, torch.float32, BATCH, CLASSES, device=CPU)
        assert signals.pop("accuracy") == 0.5
        assert {"self_influence", "aum", "margin", "loss", "vote"} == signals.keys()
        for values in signals.values():
            assert_is(values, torch.float32, BATCH, device=CPU)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_features_are_float32_and_stay_on_the_gpu(fake_cuda, dtype):
    model = fake_network("resnet9")
    computed_in = record_dtypes(model)
    run = SimpleNamespace(model=model, data=fake_data(), batch_size=4, dtype=dtype)
    features, logits = detect.compute_features(run)
    assert computed_in == {dtype}
    assert_is(features, torch.float32, BATCH, 128)
    assert_is(logits, torch.float32, BATCH, CLASSES)


def test_the_queries_of_explanations_are_moved_to_the_gpu(fake_cuda, monkeypatch):
    """The test ends before the pairwise scores, which kronfluence reads from a file."""

    class Asked(Exception):
        pass

    def pairwise_influence(queries, num_held, damping):
        assert_is(queries.images, torch.uint8, 2, 3, 32, 32)
        assert_is(queries.labels, torch.int64, 2)
        assert queries.indices.device.type == "cpu"
        raise Asked

    monkeypatch.setattr(pipeline.ImageData, "digest", "")
    data = fake_data().to("cpu")
    monkeypatch.setattr(pipeline.ImageData, "take", lambda data, indices: fake_data(2).to("cpu"))
    run = SimpleNamespace(
        data=fake_data(),
        pairwise_influence=pairwise_influence,
        from_main=lambda value: value,
        analyzer=SimpleNamespace(state=SimpleNamespace(use_distributed=False)),
    )
    with pytest.raises(Asked):
        detect.explain([run], data, np.array([4, 1]), 0.1)


# ---- Influence -----------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_task_and_the_data_set_of_kronfluence_stay_on_the_gpu(fake_cuda, dtype, sample):
    data_set = pipeline.InfluenceDataset(fake_data(), seed=3)
    images, labels, uniforms = batch = data_set.__getitems__([4, 0, 2])
    assert_is(images, torch.float32, 3, 3, 32, 32)
    assert_is(labels, torch.int64, 3)
    assert_is(uniforms, torch.float32, 3)
    task = pipeline.ClassificationTask()
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        assert_is(task.compute_train_loss(batch, fake_network("resnet9"), sample), torch.float32)
        assert_is(task.compute_measurement(batch, fake_network("resnet18")), torch.float32)


# A layer, the shape of its input, and the shape of the gradient of its output.
LAYERS = {
    "convolution": (
        lambda: nn.Conv2d(4, 6, kernel_size=3, stride=2, padding=1, bias=False),
        (BATCH, 4, 8, 8),
        (BATCH, 6, 4, 4),
    ),
    "grouped convolution": (
        lambda: nn.Conv2d(4, 6, kernel_size=3, padding="same", groups=2),
        (BATCH, 4, 8, 8),
        (BATCH, 6, 8, 8),
    ),
    "linear layer": (lambda: nn.Linear(7, 5), (BATCH, 7), (BATCH, 5)),
    "linear layer on tokens": (lambda: nn.Linear(7, 5), (BATCH, 3, 7), (BATCH, 3, 5)),
}


class Layer:
    """A layer on the GPU with pipeline's trackers, and a pass through it."""

    def __init__(self, kind, dtype, strategy):
        construct, self.input_shape, self.output_shape = LAYERS[kind]
        with torch.device(CUDA):
            layer = construct()
        tracked = TrackedConv2d if isinstance(layer, nn.Conv2d) else TrackedLinear
        self.module = tracked("layer", layer)
        self.dtypes = pipeline.computation_dtypes(dtype, strategy)
        pipeline.install_trackers(self.module, self.dtypes)
        self.outputs = self.output_shape[1 if isinstance(layer, nn.Conv2d) else -1]
        self.inputs = layer.weight[0].numel() + (layer.bias is not None)
        self.storage = self.module.storage

    def add_factors(self, strategy):
        """Gives the layer the factors that kronfluence reads from files: on the CPU, in float32."""
        if strategy == "identity":
            return
        sizes = {"ACTIVATION": self.inputs, "GRADIENT": self.outputs}
        if strategy != "diagonal":
            for side, size in sizes.items():
                name = getattr(constants, f"{side}_EIGENVECTORS_NAME")
                self.storage[name] = torch.zeros(size, size)
        self.storage[constants.LAMBDA_MATRIX_NAME] = torch.ones(self.outputs, self.inputs)

    def train_on_batch(self, mode, activation_dtype):
        """Runs the tracker of a mode on a batch, as in a forward and a backward pass."""
        tracker = self.module._trackers[mode]
        tracker.register_hooks()
        (hook,) = self.module._forward_hooks.values()
        backward = []
        inputs = torch.zeros(self.input_shape, dtype=activation_dtype, device=CUDA)
        hook(self.module, (inputs,), SimpleNamespace(register_hook=backward.append))
        backward[0](torch.zeros(self.output_shape, dtype=activation_dtype, device=CUDA))
        tracker.release_hooks()


def each_layer():
    """All kinds of layers, compute dtypes and strategies."""
    return pytest.mark.parametrize(
        ("kind", "dtype", "strategy"),
        list(itertools.product(LAYERS, DTYPES, pipeline.STRATEGIES)),
    )


@pytest.mark.parametrize("strategy", ["ekfac", "kfac"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_covariances_are_float32_on_the_gpu(fake_cuda, monkeypatch, kind, dtype, strategy):
    """They are float32 even if the products use bfloat16, as in EKFAC."""
    rows_of, multiply = [], pipeline.symmetric_product
    monkeypatch.setattr(
        pipeline, "symmetric_product", lambda rows: rows_of.append(rows.dtype) or multiply(rows)
    )
    layer = Layer(kind, dtype, strategy)
    for _ in range(2):
        layer.train_on_batch(ModuleMode.COVARIANCE, torch.float32)
    assert rows_of == [dtype if strategy == "ekfac" else torch.float32] * 4
    for side, size in (("ACTIVATION", layer.inputs), ("GRADIENT", layer.outputs)):
        covariance = layer.storage[getattr(constants, f"{side}_COVARIANCE_MATRIX_NAME")]
        assert_is(covariance, torch.float32, size, size)
        assert layer.storage[getattr(constants, f"NUM_{side}_COVARIANCE_PROCESSED")].numel() == 1


@each_layer()
def test_lambda_is_float32_on_the_gpu(fake_cuda, kind, dtype, strategy):
    layer = Layer(kind, dtype, strategy)
    layer.add_factors(strategy)
    layer.storage[constants.LAMBDA_MATRIX_NAME] = None  # not fitted yet
    for _ in range(2):
        layer.train_on_batch(ModuleMode.LAMBDA, torch.float32)
    found = layer.storage[constants.LAMBDA_MATRIX_NAME]
    assert_is(found, torch.float32, layer.outputs, layer.inputs)


@each_layer()
def test_self_influence_is_float32_on_the_gpu(fake_cuda, kind, dtype, strategy):
    layer = Layer(kind, dtype, strategy)
    layer.add_factors(strategy)
    for _ in range(2):  # at the second batch the factors are already on the GPU
        layer.train_on_batch(ModuleMode.SELF_SCORE, dtype)
        assert_is(layer.storage[constants.SELF_SCORE_VECTOR_NAME], torch.float32, BATCH)


@each_layer()
def test_pairwise_influence_is_float32_on_the_gpu(fake_cuda, kind, dtype, strategy):
    """There are two batches of queries. Their gradients are held in the dtype of the run."""
    layer = Layer(kind, dtype, strategy)
    layer.add_factors(strategy)
    layer.module.score_args.query_gradient_accumulation_steps = 2
    tracker = layer.module._trackers[ModuleMode.PRECONDITION_GRADIENT]
    for _ in range(2):
        layer.train_on_batch(ModuleMode.PRECONDITION_GRADIENT, torch.float32)
        gradient = layer.storage[constants.PRECONDITIONED_GRADIENT_NAME]
        assert_is(gradient, dtype, BATCH, layer.outputs, layer.inputs)
        tracker.accumulate_iterations()
    layer.train_on_batch(ModuleMode.PAIRWISE_SCORE, torch.float32)
    scores = layer.storage[constants.PAIRWISE_SCORE_MATRIX_NAME]
    assert_is(scores, torch.float32, 2 * BATCH, BATCH)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_truncated_pairwise_scores_are_float32_on_the_gpu(fake_cuda, kind, dtype):
    """Of queries, only the kept columns are held, in the compute dtype."""
    layer = Layer(kind, dtype, "ekfac")
    layer.add_factors("ekfac")
    pipeline.keep_leading(layer.storage, 0.3)
    kept = math.ceil(0.3 * layer.inputs)
    layer.train_on_batch(ModuleMode.PRECONDITION_GRADIENT, torch.float32)
    gradient = layer.storage[constants.PRECONDITIONED_GRADIENT_NAME]
    assert_is(gradient, dtype, BATCH, layer.outputs, kept)
    layer.module._trackers[ModuleMode.PRECONDITION_GRADIENT].accumulate_iterations()
    layer.train_on_batch(ModuleMode.PAIRWISE_SCORE, torch.float32)
    scores = layer.storage[constants.PAIRWISE_SCORE_MATRIX_NAME]
    assert_is(scores, torch.float32, BATCH, BATCH)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_symmetric_product_is_float32_for_rows_of_any_dtype(fake_cuda, dtype):
    """This holds also for several blocks of columns."""
    columns = pipeline.SYMMETRIC_BLOCKS["cuda"] + 1
    rows = torch.zeros(3, columns, dtype=dtype, device=CUDA)
    assert_is(pipeline.symmetric_product(rows), torch.float32, columns, columns)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_squares_are_taken_in_one_part_on_the_gpu(fake_cuda, monkeypatch, dtype):
    monkeypatch.setattr(pipeline, "ELEMENTS_IN_CPU_CACHE", 1)
    gradient = torch.zeros(BATCH, 2, 3, dtype=dtype, device=CUDA)
    (squared,) = pipeline.squares(gradient, torch.float32)
    assert_is(squared, torch.float32, BATCH, 2, 3)


def test_the_memory_of_a_cpu_does_not_limit_the_queries_of_a_gpu(fake_cuda):
    run = SimpleNamespace(
        data=fake_data(),
        gradient_sizes=lambda fraction: [2**40],
        dtype=torch.float32,
        analyzer=SimpleNamespace(state=SimpleNamespace(num_processes=2)),
    )
    assert pipeline.InfluenceRun.queries_at_once(run, 1000, 1.0) == 500
    assert pipeline.InfluenceRun.queries_at_once(run, 1000, 0.1) == 500
    assert pipeline.InfluenceRun.queries_at_once(run, "auto", 1.0) == 500
    assert pipeline.InfluenceRun.queries_at_once(run, "auto", 0.1) == 5000
    run.data = run.data.__class__(**{**vars(run.data), "images": torch.zeros(1)})
    assert pipeline.InfluenceRun.queries_at_once(run, 1000, 1.0) == 1


@pytest.mark.parametrize(("on_gpu", "batch_size"), [(True, 1024), (False, 64)])
def test_the_batch_size_and_device_of_a_run_follow_its_images(
    fake_cuda, monkeypatch, tmp_path, on_gpu, batch_size
):
    """Hashes and the check of the layers need values, so they are replaced."""
    asked = {}
    monkeypatch.setattr(pipeline, "sha256", lambda *_: "0" * 64)
    monkeypatch.setattr(pipeline.ImageData, "digest", "")
    monkeypatch.setattr(pipeline.InfluenceRun, "track_layers", lambda run: (None, []))
    analyzer = SimpleNamespace(set_dataloader_kwargs=lambda kwargs: None)
    monkeypatch.setattr(pipeline, "Analyzer", lambda *_, **flags: asked.update(flags) or analyzer)
    data = fake_data() if on_gpu else fake_data().to("cpu")
    run = pipeline.InfluenceRun(
        fake_network("resnet9"),
        data,
        tmp_path / "model",
        strategy="ekfac",
        dtype=torch.float32,
        seed=3,
        seconds={},
    )
    assert run.batch_size == batch_size and asked["cpu"] == (not on_gpu)


def functions_that_ask_for_the_device(path):
    """The names of functions in a file whose code reads `is_cuda`."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, functions)
        for part in ast.walk(node)
        if isinstance(part, ast.Attribute) and part.attr == "is_cuda"
    }


def test_every_function_that_reads_is_cuda_is_tested_here():
    """A new function of this kind needs a test here.

    The hooks pass `is_cuda` on to `input_dtype`, which has tests of its own.
    """
    names = set()
    for path in ("pipeline.py", "train.py", "analyze.py", "detect_mislabeled_dataset.py"):
        names |= functions_that_ask_for_the_device(path)
    hooks = {"register_hooks", "backward_hook"}
    assert names - hooks == {"squares", "queries_at_once", "__init__"}


# ---- Settings and records ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("precision", "capability", "dtype", "rounding"),
    [
        ("auto", (8, 0), torch.bfloat16, "tf32"),
        ("auto", (7, 5), torch.float32, "ieee"),
        ("fp32", (9, 0), torch.float32, "ieee"),
        ("bf16", (7, 5), torch.bfloat16, "tf32"),
    ],
)
def test_precision_follows_the_gpu(monkeypatch, precision, capability, dtype, rounding):
    """TF32 is used only together with bfloat16."""
    with backend_settings() as settings:
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
        assert pipeline.configure_precision(precision, CUDA) == dtype
        assert settings() == (rounding, rounding, False)


@contextlib.contextmanager
def backend_settings():
    """Yields a function that reads the settings of configure_precision. Restores the settings."""
    matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn.conv

    def read():
        reduced = matmul.allow_bf16_reduced_precision_reduction
        return matmul.fp32_precision, conv.fp32_precision, reduced

    before = read()
    try:
        yield read
    finally:
        matmul.fp32_precision, conv.fp32_precision = before[:2]
        matmul.allow_bf16_reduced_precision_reduction = before[2]


def test_a_record_names_the_gpu_and_its_memory(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: f"GPU {device.index}")
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda device: 12345)
    found = pipeline.environment(CUDA)
    assert (found["device"], found["device_name"], found["peak_memory_bytes"]) == (
        "cuda",
        "GPU 0",
        12345,
    )
    pipeline.print_machine(CUDA, torch.bfloat16)
    assert capsys.readouterr().out == "GPU 0, bfloat16\n"


def test_each_phase_waits_for_the_gpu(monkeypatch):
    waited = []
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    monkeypatch.setattr("torch.cuda.synchronize", lambda: waited.append(True))
    seconds = {}
    with pipeline.timed(seconds, "scores"):
        assert not waited
    assert waited and seconds["scores"] >= 0
