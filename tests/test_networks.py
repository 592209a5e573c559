"""Networks: what an entry of MODELS must be, and that scores follow its code and settings.

Two networks go through all scripts: a narrow ResNet-18 and one with depthwise convolutions.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections import OrderedDict
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (
    ANALYZE,
    DETECT,
    ROOT,
    TRAIN,
    digits,
    influence_run,
    minus_log_odds,
    read_table,
    refused,
    relative_error,
    result_folder,
    results,
    succeed,
)
from dense import per_sample_gradients
from safetensors.torch import load_file
from torch import nn

import pipeline

# ---- The entries of MODELS -----------------------------------------------------------------------


def two_parts(features, head):
    """A network of the two parts that MODELS asks for."""
    return nn.Sequential(OrderedDict(features=features, head=head))


@pytest.mark.parametrize("name", pipeline.MODELS)
def test_logits_are_the_head_of_the_features(name):
    model = pipeline.construct_model(name, 7).eval()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    features = model.features(images)
    assert features.dim() == 2 and model(images).shape == (2, 7)
    assert torch.equal(model(images), model.head(features))
    assert torch.equal(model(images), model.logits(features))


@pytest.mark.parametrize("name", pipeline.MODELS)
def test_logits_of_every_network_are_float32_under_autocast(name):
    """Its other layers compute in bfloat16, and the logits are not rounded to it."""
    model = pipeline.construct_model(name, 10).eval()
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(images)
        assert next(iter(model.features.children()))(images).dtype == torch.bfloat16
    assert logits.dtype == torch.float32
    assert not torch.equal(logits, logits.bfloat16().float())


def test_the_head_of_resnet9_is_a_linear_layer_times_a_fifth():
    model = pipeline.construct_model("resnet9", 10)
    features = torch.randn(4, 128)
    assert torch.equal(model.logits(features), 0.2 * (features @ model.head[0].weight.T))


def test_resnet18_has_a_stem_for_small_images():
    """A 3x3 stem of stride 1 and no max-pool: the first stage sees 32x32 positions.

    11,173,962 parameters: torchvision's 11,689,512 for 1,000 classes, less the smaller stem and
    the smaller last layer.
    """
    model = pipeline.construct_model("resnet18", 10).eval()
    sizes = []
    hook = model.features.layer1.register_forward_hook(
        lambda _, inputs, output: sizes.extend([inputs[0].shape[1:], output.shape[1:]])
    )
    model(torch.zeros(1, 3, 32, 32))
    hook.remove()
    assert sizes == [(64, 32, 32), (64, 32, 32)]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    stem, last = 3 * 64 * (49 - 9), 513 * 990
    assert parameters == 11_689_512 - stem - last == 11_173_962
    assert model.features(torch.zeros(1, 3, 32, 32)).shape == (1, 512)


def test_only_resnet18_needs_torchvision(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    pipeline.construct_model("resnet9", 10)
    with pytest.raises(pipeline.UserError, match=r"torchvision cannot be imported .*resnet9"):
        pipeline.construct_model("resnet18", 10)


def flat_linear():
    return nn.Sequential(nn.Flatten(), nn.Linear(3072, 4))


class MethodAsFeatures(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 10)

    def features(self, images):
        return images.flatten(1)[:, :4]


class ScaledOutside(nn.Module):
    def __init__(self):
        super().__init__()
        self.features, self.head = flat_linear(), nn.Linear(4, 10)
        self.scale = nn.Parameter(torch.ones(()))


class RandomInEvalMode(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3072, 8)

    def forward(self, images):
        return nn.functional.dropout(self.linear(images.flatten(1)), 0.5)


class OtherForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.features, self.head = flat_linear(), nn.Linear(4, 10)

    def forward(self, images):
        return self.head(self.features(images).relu())


class OneMoreArgument(OtherForward):
    def forward(self, images, scale):
        return scale * self.head(self.features(images))


class ExtraState(nn.Linear):
    def get_extra_state(self):
        return {"a": 1}

    def set_extra_state(self, state):
        pass


class WeightOfForward(nn.Module):
    """Its weight is computed, as by the older weight_norm: such a network cannot be copied."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.weight = self.scale * torch.ones(4, 3072)

    def forward(self, images):
        return images.flatten(1) @ self.weight.T


NO_NETWORKS = {  # what a function returns, and what the sentence must say
    "no parts": (flat_linear, "but features is no module"),
    "no head": (
        lambda: nn.Sequential(OrderedDict(features=flat_linear())),
        "but head is no module",
    ),
    "a method as features": (MethodAsFeatures, "but features is no module"),
    "a parameter outside": (ScaledOutside, "scale is in neither"),
    "features that are images": (
        lambda: two_parts(nn.Conv2d(3, 4, 1), nn.Flatten()),
        r"features of shape \[B, D\], not \[2, 4, 32, 32\]",
    ),
    "another number of classes": (
        lambda: two_parts(flat_linear(), nn.Linear(4, 9)),
        r"logits of shape \[B, 10\], not \[2, 9\]",
    ),
    "parts that do not fit": (
        lambda: two_parts(flat_linear(), nn.Linear(5, 10)),
        "a head that takes these features",
    ),
    "a layer for other shapes": (
        lambda: two_parts(nn.Sequential(nn.Flatten(), nn.BatchNorm2d(3072)), nn.Linear(3072, 10)),
        r"features that take images \[B, 3, 32, 32\].*expected 4D input",
    ),
    "features that are a tuple": (
        lambda: two_parts(nn.MaxPool2d(2, return_indices=True), nn.Flatten()),
        "features returned a tuple",
    ),
    "a head that returns a tuple": (
        lambda: two_parts(nn.Flatten(), nn.MaxPool1d(2, return_indices=True)),
        "head returned a tuple",
    ),
    "a tuple between layers": (
        lambda: two_parts(
            nn.Sequential(nn.MaxPool2d(2, return_indices=True), nn.Flatten()), nn.Linear(768, 10)
        ),
        "features that take images",
    ),
    "random numbers in eval mode": (
        lambda: two_parts(RandomInEvalMode(), nn.Linear(8, 10)),
        "without random numbers in eval mode",
    ),
    "another step in forward": (OtherForward, r"whose forward is head\(features\(images\)\)"),
    "another argument of forward": (OneMoreArgument, r"whose forward is head"),
    "a layer without sizes": (
        lambda: two_parts(nn.Flatten(), nn.LazyLinear(10)),
        "layers whose sizes are given, but head.weight has none",
    ),
    "a layer for videos": (
        lambda: two_parts(flat_linear(), nn.Sequential(nn.Linear(4, 10), nn.Conv3d(1, 1, 1))),
        "layers for images, but head.1.weight has 5 dimensions",
    ),
    "a state that is no tensor": (
        lambda: two_parts(flat_linear(), ExtraState(4, 10)),
        "a module whose state_dict holds tensors, but head._extra_state is none",
    ),
    "a weight that is computed": (
        lambda: two_parts(WeightOfForward(), nn.Linear(4, 10)),
        "a module that can be copied",
    ),
    "no module": (
        lambda: SimpleNamespace(features=flat_linear(), head=nn.Linear(4, 10)),
        "must return a module of torch.nn",
    ),
}


@pytest.mark.parametrize("what", NO_NETWORKS)
def test_a_function_that_returns_no_network_is_refused(monkeypatch, what):
    function, words = NO_NETWORKS[what]
    monkeypatch.setitem(pipeline.MODELS, "mine", lambda num_classes: function())
    with pytest.raises(pipeline.UserError, match=f"--model mine: .*{words}"):
        pipeline.construct_model("mine", 10)


def test_a_network_whose_forward_joins_its_parts_is_accepted(monkeypatch):
    class Joined(OtherForward):
        def forward(self, images):
            return self.head(self.features(images))

    monkeypatch.setitem(pipeline.MODELS, "mine", lambda num_classes: Joined())
    assert pipeline.construct_model("mine", 10)(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_construction_leaves_training_mode_and_random_numbers_alone(monkeypatch):
    """So that the published network gets the weights of its seed."""
    for model in ("resnet9", "resnet18"):
        torch.manual_seed(0)
        expected = pipeline.MODELS[model](10)
        state = torch.get_rng_state()
        torch.manual_seed(0)
        found = pipeline.construct_model(model, 10)
        assert torch.equal(torch.get_rng_state(), state)
        assert all(module.training for module in found.modules())
        for name, tensor in expected.state_dict().items():
            assert torch.equal(found.state_dict()[name], tensor)


# ---- The code of a network decides its scores ----------------------------------------------------

OWN_NETWORK = '''
from collections import OrderedDict
from functools import cached_property
import torch
from torch import nn
from torch.nn import functional as F

SLOPE = 0.1
KINDS = {"first": F.relu, "second": torch.tanh}

def activation(x):
    """Of the first layer."""
    return F.leaky_relu(x, SLOPE)

def smooth(x):
    return x

class Base(nn.Module):
    power = 2

    @property
    def offset(self):
        return 3

    @staticmethod
    def square(x):
        return x**2

class Block(Base):
    """A block."""

    def forward(self, x, shift=1):
        # the order matters
        parts = [f(x) for f in (torch.sin, torch.cos)]
        if "sin" in {"sin", "cos"}:
            x = parts[0] + activation(x) + self.offset
        return self.square(x) * shift

def build(num_classes, width=4):
    features = nn.Sequential(nn.Conv2d(3, width, 3, stride=2), Block(), nn.Flatten())
    return nn.Sequential(OrderedDict(features=features, head=nn.Linear(900, num_classes)))
'''


@pytest.fixture
def import_source(monkeypatch, tmp_path):
    """A function that imports a source as the module own_network, as a new run of a script does."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setattr(pipeline, "MODULE_TEXTS", {})
    path = tmp_path / "own_network.py"

    def import_source(source):
        path.write_text(source, encoding="utf-8")
        spec = importlib.util.spec_from_file_location("own_network", path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "own_network", module)
        spec.loader.exec_module(module)
        pipeline.MODULE_TEXTS.clear()
        pipeline.read_own_sources()
        return module

    return import_source


@pytest.fixture
def own_digest(import_source, monkeypatch):
    """A function that returns the hash of the code of the network of a source."""

    def own_digest(source, wrap=lambda build: build):
        monkeypatch.setitem(pipeline.MODELS, "own", wrap(import_source(source).build))
        return pipeline.code_digest(pipeline.construct_model("own", 10))

    return own_digest


SAME_SCORES = {  # what is replaced in OWN_NETWORK, by what
    "nothing": ("", ""),
    "a comment": ("# the order matters", "# the order does not matter"),
    "a line more": ("# the order matters", "# the order\n\n        # matters"),
    "a docstring": ("Of the first layer.", "Of each layer."),
    "the docstring of a class": ("A block.", "A block of my own."),
    "a layout": (
        "nn.Conv2d(3, width, 3, stride=2)",
        "nn.Conv2d(\n        3, width, 3, stride=2\n    )",
    ),
}
OTHER_SCORES = {
    "forward": ("parts[0] + activation(x)", "parts[0] - activation(x)"),
    "another part of a list": ("parts[0]", "parts[1]"),
    "a function in a comprehension": ("(torch.sin, torch.cos)", "(torch.tan, torch.cos)"),
    "a member of a set": ('{"sin", "cos"}', '{"sin", "tan"}'),
    "a default value": ("shift=1", "shift=2"),
    "a function that forward calls": ("F.leaky_relu(x", "F.leaky_relu(-x"),
    "a constant that this function uses": ("SLOPE = 0.1", "SLOPE = 0.2"),
    "a method of the base class": ("x**2", "x**3"),
    "a property": ("return 3", "return 4"),
    "a constant of the class": ("power = 2", "power = 3"),
    "a setting of torch's layer": ("3, stride=2)", "3, stride=2, padding_mode='reflect')"),
    "a helper function in the same file": ("return x\n", "return 2 * x\n"),
    "the function in MODELS": ("Block(), nn.Flatten()", "Block(), nn.ReLU(), nn.Flatten()"),
}


@pytest.mark.parametrize("change", SAME_SCORES)
def test_what_does_not_change_the_scores_leaves_the_hash_of_the_code(own_digest, change):
    old, new = SAME_SCORES[change]
    assert old in OWN_NETWORK
    changed = OWN_NETWORK.replace(old, new, 1) if old else OWN_NETWORK
    assert own_digest(changed) == own_digest(OWN_NETWORK)


@pytest.mark.parametrize("change", OTHER_SCORES)
def test_what_changes_the_scores_changes_the_hash_of_the_code(own_digest, change):
    old, new = OTHER_SCORES[change]
    assert OWN_NETWORK.count(old) == 1
    changed = OWN_NETWORK.replace(old, new)
    assert own_digest(changed) != own_digest(OWN_NETWORK)


IMPORTS = {  # how the file of the network imports `helper`: its first line, and a function's body
    "a module": ("import helper", "return helper.smooth(x)"),
    "a function": ("from helper import smooth", "return smooth(x)"),
    "in a function": ("", "import helper\n    return helper.smooth(x)"),
}


@pytest.mark.parametrize("how", IMPORTS)
def test_files_that_the_file_of_the_network_imports_are_part_of_the_hash(
    own_digest, monkeypatch, tmp_path, how
):
    first_line, body = IMPORTS[how]
    source = f"{first_line}\n" + OWN_NETWORK.replace("return x\n", f"{body}\n", 1)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "helper.py").write_text("from shared import SLOPE\nsmooth = lambda x: SLOPE * x\n")
    digests = set()
    for slope in ("SLOPE = 1", "SLOPE = 2", "SLOPE = 2  # a comment"):
        for name in ("helper", "shared"):
            monkeypatch.delitem(sys.modules, name, raising=False)
        (tmp_path / "shared.py").write_text(slope)
        importlib.invalidate_caches()
        importlib.import_module("helper")
        digests.add(own_digest(source))
    for name in ("helper", "shared"):
        monkeypatch.delitem(sys.modules, name)
    assert len(digests) == 2


ONLY_TORCH = """
from collections import OrderedDict
from torch import nn

def build(num_classes, width):
    features = nn.Sequential(nn.Flatten(), nn.Linear(3072, width))
    return nn.Sequential(OrderedDict(features=features, head=nn.Linear(width, num_classes)))
"""


def test_the_file_of_a_partial_function_in_models_is_part_of_the_hash(own_digest):
    """Also if no class of a module stands in it."""
    before = own_digest(ONLY_TORCH, lambda build: partial(build, width=3))
    changed = own_digest(ONLY_TORCH + "SLOPE = 1", lambda build: partial(build, width=3))
    assert changed != before


class Times(nn.Module):
    """Multiplies by a number that neither its weights nor its source contain."""

    def __init__(self, number):
        super().__init__()
        self.number = number

    def forward(self, x):
        return self.number * x


def scaled(build, factor, num_classes):
    """A network whose features are multiplied by a factor."""
    network = build(num_classes)
    return two_parts(nn.Sequential(network.features, Times(factor)), network.head)


FACTORS_OUTSIDE = {  # networks that differ in a value, and in no line of code
    "an argument of a partial function": lambda build, factor: partial(scaled, build, factor),
    "a closure": lambda build, factor: lambda num_classes: scaled(build, factor, num_classes),
}


@pytest.mark.parametrize("kind", FACTORS_OUTSIDE)
def test_values_that_are_bound_to_the_function_in_models_change_the_hash(own_digest, kind):
    digests = [
        own_digest(OWN_NETWORK, lambda build, f=f: FACTORS_OUTSIDE[kind](build, f))
        for f in (2, 2, 3)
    ]
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize(
    ("function", "is_part"),
    [
        ("rotated_gradient", True),
        ("patches", True),
        ("compute_measurement", True),
        ("log_odds", True),
        ("pairwise_influence", True),
        ("normalize", True),
        ("shorten", False),
        ("print_machine", False),
    ],
)
def test_code_of_pipeline_is_part_of_the_hash_if_scores_depend_on_it(
    monkeypatch, function, is_part
):
    """Trackers, task and standardisation are part of it; output is not."""
    model = pipeline.construct_model("resnet9", 10)
    before = pipeline.code_digest(model)
    assert pipeline.SOURCE.count(f"def {function}(") == 1
    changed = pipeline.SOURCE.replace(f"def {function}(", f"def other_{function}(")
    monkeypatch.setattr(pipeline, "SOURCE", changed)
    assert (pipeline.code_digest(model) != before) == is_part


def test_comments_and_docstrings_of_pipeline_are_no_part_of_the_hash(monkeypatch):
    model = pipeline.construct_model("resnet9", 10)
    before = pipeline.code_digest(model)
    changed = pipeline.SOURCE.replace('"""Residual block: x + f(x)."""', '"""x + f(x)"""  # sum')
    assert changed != pipeline.SOURCE
    monkeypatch.setattr(pipeline, "SOURCE", changed)
    assert pipeline.code_digest(model) == before


def test_the_hash_is_the_same_in_every_process():
    """Python's own hashes of strings, and with them the order of sets, differ between processes."""
    code = "import conftest, pipeline, test_networks\n"
    code += "pipeline.MODELS['own'] = test_networks.depthwise\n"
    code += "print(pipeline.code_digest(pipeline.construct_model('own', 10)))"
    digests = set()
    for seed in ("1", "2"):
        finished = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT / "tests")},
            capture_output=True,
            text=True,
        )
        assert finished.returncode == 0, finished.stderr
        digests.add(finished.stdout)
    assert len(digests) == 1


def test_base_classes_of_other_files_are_part_of_the_hash(import_source):
    def digest(power):
        base = import_source(OWN_NETWORK.replace("power = 2", f"power = {power}")).Base
        return pipeline.code_digest(type("Layer", (base,), {})())

    assert digest(2) == digest(2) != digest(3)


def test_settings_of_layers_are_part_of_the_hash_of_any_network():
    """Also of one that no function in MODELS constructed; the weights have one shape."""

    def digest(**settings):
        return pipeline.code_digest(nn.Sequential(nn.Conv2d(3, 4, 3, **settings)))

    assert digest(stride=2) == digest(stride=2) != digest(stride=1)


def test_training_mode_is_no_part_of_the_hash():
    model = pipeline.construct_model("resnet9", 10)
    assert pipeline.code_digest(model.train()) == pipeline.code_digest(model.eval())


def test_a_file_that_is_edited_during_the_run_does_not_change_the_hash(
    own_digest, import_source, tmp_path
):
    """The imported code still runs. The edit comes after the start, before the network is made."""
    before = own_digest(OWN_NETWORK)
    module = import_source(OWN_NETWORK)
    changed = OWN_NETWORK.replace("parts[0]", "parts[1]  # changed")
    (tmp_path / "own_network.py").write_text(changed)
    pipeline.MODELS["own"] = module.build
    assert pipeline.code_digest(pipeline.construct_model("own", 10)) == before
    assert own_digest(changed) != before


def test_the_sources_are_read_before_main_runs(import_source):
    import_source(OWN_NETWORK)
    pipeline.MODULE_TEXTS.clear()
    assert pipeline.run(lambda: pipeline.MODULE_TEXTS["own_network"]) == OWN_NETWORK


def test_a_network_without_a_file_is_refused(monkeypatch):
    """As in a notebook: nobody could see there that its code was changed."""
    kind = type("Layer", (nn.Module,), {"__module__": "not_in_a_file"})
    with pytest.raises(pipeline.UserError, match=r"'not_in_a_file' has no readable file: put it"):
        pipeline.code_digest(kind())


MINE = """
from torch import nn

class Mine(nn.Sequential):
    def forward(self, images):
        return super().forward(images).relu()
"""


def test_a_changed_forward_with_the_same_weights_does_not_find_the_old_scores(
    capsys, import_source, tmp_path
):
    """It finds the folder of the same weights, but neither its factors nor its scores."""
    data = digits(6)
    folder = tmp_path / "results"
    scores = []
    for source in (MINE, MINE.replace("super()", "-super()"), MINE):
        torch.manual_seed(0)
        kind = import_source(source).Mine
        layers = kind(nn.Conv2d(3, 4, 5, stride=4), nn.Flatten(), nn.Linear(196, 10))
        run = influence_run(folder, data, "identity", model=layers)
        scores.append(run.self_influence(0.1)[0])
    assert torch.equal(scores[0], scores[2]) and not torch.equal(scores[0], scores[1])
    assert len(list(folder.iterdir())) == 1
    assert len(list(folder.glob("*/scores_self_*"))) == 2
    assert capsys.readouterr().out.count("Reusing") == 2  # factors and scores of the third run


# ---- The checkpoint knows its network ------------------------------------------------------------

DATA = ("--dataset", "synthetic", "--num_train_examples", "64", "--device", "cpu")
DATA += ("--corrupt_percentage", "0.1", "--precision", "fp32")
TRAINING = ("--train_batch_size", "16", "--num_train_epochs", "1", "--learning_rate", "0.05")


def depthwise(num_classes):
    """A small network with a depthwise convolution."""
    features = nn.Sequential(
        nn.Conv2d(3, 8, kernel_size=3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, kernel_size=3, padding=1, groups=8, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 12, kernel_size=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    return two_parts(features, nn.Linear(12, num_classes))


def narrow_resnet18(num_classes):
    """torchvision's ResNet-18 with a block a stage, and an eighth of the channels."""
    from torchvision.models.resnet import BasicBlock, ResNet

    class NarrowResNet(ResNet):
        def _make_layer(self, block, planes, *settings, **more):
            return super()._make_layer(block, planes // 8, *settings, **more)

    network = NarrowResNet(BasicBlock, [1, 1, 1, 1], num_classes=num_classes)
    network.fc = nn.Linear(512 // 8, num_classes)
    return network


@pytest.fixture(scope="module", params=["resnet18", "depthwise"])
def explained(request, tmp_path_factory):
    """The name of a network, and a folder in which it was trained on 64 digits."""
    folder = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(pipeline.MODELS, "depthwise", depthwise)
        patch.setattr("torchvision.models.resnet18", narrow_resnet18)
        succeed(folder, TRAIN, "--model", request.param, *DATA, *TRAINING)
        yield request.param, folder


def test_another_network_than_that_of_the_checkpoint_is_refused(explained):
    name, folder = explained
    before = results(folder)
    sentence = refused(folder, ANALYZE, *DATA)
    assert f"model_corrupt_0.1.pth was trained with --model {name}, not resnet9: give" in sentence
    assert results(folder) == before


def test_a_network_that_is_gone_from_models_is_refused(explained, monkeypatch):
    name, folder = explained
    monkeypatch.delitem(pipeline.MODELS, name)
    sentence = refused(folder, ANALYZE, *DATA)
    assert f"holds a network '{name}', which MODELS does not have: add it" in sentence


def test_the_command_that_train_prints_names_the_network(explained):
    name, folder = explained
    flags = (*DATA, *TRAINING, "--checkpoint_dir", "again")
    out = succeed(folder, TRAIN, "--model", name, *flags)
    commands = [line for line in out.splitlines() if line.startswith("  python ")]
    assert len(commands) == 2 and all(f"--model {name}" in line for line in commands)


# ---- A loaded network computes the logits of the trained one ---------------------------------


class NotSaved(nn.Module):
    """Features with a random tensor that is no persistent buffer: a checkpoint does not hold it."""

    def __init__(self, kind):
        super().__init__()
        self.linear = nn.Linear(3072, 8)
        matrix = torch.randn(8, 8)
        if kind == "buffer":
            self.register_buffer("matrix", matrix, persistent=False)
        elif kind == "attribute":
            self.matrix = matrix
        else:
            self.layers = [nn.Linear(8, 8)]
        self.kind = kind

    def forward(self, images):
        features = self.linear(images.flatten(1))
        if self.kind == "list":
            return self.layers[0](features)
        return features @ self.matrix


@pytest.mark.parametrize("kind", ["buffer", "attribute", "list"])
def test_a_network_with_tensors_that_are_not_saved_is_refused(tmp_path, monkeypatch, kind):
    def mine(num_classes):
        return two_parts(NotSaved(kind), nn.Linear(8, num_classes))

    monkeypatch.setitem(pipeline.MODELS, "mine", mine)
    succeed(tmp_path, TRAIN, *DATA, *TRAINING, "--model", "mine")
    for script in (ANALYZE, DETECT):
        sentence = refused(tmp_path, script, *DATA, "--model", "mine")
        assert "computes other logits than after its training" in sentence
    assert not list(tmp_path.glob("influence_results/model*"))


def test_a_network_whose_code_changed_after_its_training_is_refused(tmp_path, monkeypatch):
    def mine(num_classes, activation):
        features = nn.Sequential(nn.Flatten(), nn.Linear(3072, 8), activation)
        return two_parts(features, nn.Linear(8, num_classes))

    monkeypatch.setitem(pipeline.MODELS, "mine", partial(mine, activation=nn.ReLU()))
    succeed(tmp_path, TRAIN, *DATA, *TRAINING, "--model", "mine")
    monkeypatch.setitem(pipeline.MODELS, "mine", partial(mine, activation=nn.Tanh()))
    sentence = refused(tmp_path, DETECT, *DATA, "--model", "mine", "--factor_strategy", "none")
    assert "undo changes of its code" in sentence


# ---- Other networks, end to end ------------------------------------------------------------------


@pytest.mark.parametrize("strategy", pipeline.STRATEGIES)
def test_a_network_goes_through_all_scripts(explained, strategy):
    name, folder = explained
    flags = ("--model", name, *DATA, "--factor_strategy", strategy)
    out = succeed(folder, DETECT, *flags, "--explain", 2, "--num_review", 9)
    place = result_folder(folder)
    _, rows = read_table(place / f"suspects_{strategy}.csv")
    assert len(rows) == 64 and len({row["self_influence"] for row in rows}) > 32
    assert (place / f"suspects_{strategy}.html").stat().st_size > 10_000
    _, rows = read_table(place / f"explanations_{strategy}.csv")
    assert len({row["suspect"] for row in rows}) == 2
    record = json.loads((place / f"detection_{strategy}.json").read_text())
    assert record["num_train"] == 64 and record["flags"]["model"] == name
    out = succeed(folder, ANALYZE, *flags, "--num_query_examples", 3)
    assert out.count("Reusing") == out.count("/factors_") == 1
    path = next(line for line in out.splitlines() if line.startswith("scores in ")).split()[-1]
    scores = load_file(folder / path)["all_modules"]
    assert scores.shape == (3, 64) and scores.isfinite().all()
    if strategy == "identity":
        assert_products_of_gradients(folder, scores)


def explanation_scores(folder, *flags):
    """Explains two suspects. Returns the suspects and their scores, and what was printed."""
    explain = ("--explain", 2, "--method", "aum", "--factor_examples", "all")
    printed = succeed(folder, DETECT, *flags, *explain)
    _, rows = read_table(result_folder(folder) / "explanations_ekfac.csv")
    suspects = [row["suspect"] for row in rows]
    return suspects, np.array([float(row["score"]) for row in rows]), printed


def test_explanations_keep_a_fraction_and_read_the_index_of_an_analysis(explained, tmp_path):
    name, trained = explained
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    flags = ("--model", name, *DATA)
    fraction = ("--eigenvector_fraction", 0.2)
    suspects, full, _ = explanation_scores(tmp_path, *flags)
    same, truncated, _ = explanation_scores(tmp_path, *flags, *fraction)
    assert same == suspects and abs(truncated / full - 1).max() > 0.01
    printed = succeed(tmp_path, ANALYZE, *flags, *fraction, "--num_query_examples", 3, "--index")
    assert "The index takes" in printed
    same, indexed, printed = explanation_scores(tmp_path, *flags, *fraction, "--index")
    assert same == suspects and indexed == pytest.approx(truncated, rel=0.01)
    assert not (indexed == truncated).all()
    assert "The index takes" not in printed and len(list(tmp_path.rglob("index_*"))) == 1


@pytest.mark.parametrize("script", [DETECT, ANALYZE])
def test_an_index_without_space_is_refused_before_anything_is_computed(
    explained, tmp_path, monkeypatch, script
):
    name, trained = explained
    shutil.copytree(trained / "checkpoints", tmp_path / "checkpoints")
    monkeypatch.setattr(pipeline.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    flags = ["--model", name, *DATA, "--index"]
    if script == DETECT:
        flags += ["--explain", 2]
    assert "--index needs" in refused(tmp_path, script, *flags)
    assert not list(tmp_path.rglob("factors_*")) and not list(tmp_path.rglob("scores_*"))


def assert_products_of_gradients(folder, scores):
    """The scores are the products of per-sample gradients by torch.func, of the trained network."""
    model, _ = pipeline.load_checkpoint(folder / "checkpoints/model_corrupt_0.1.pth")
    data, queries = pipeline.training_examples(digits(64), 0.1), digits(3, "test")
    of_train = per_sample_gradients(
        model, data, lambda logits, label: nn.functional.cross_entropy(logits, label)
    )
    of_queries = per_sample_gradients(model, queries, minus_log_odds)
    expected = sum(of_queries[layer] @ of_train[layer].T for layer in of_train)
    # A few activations so close to zero that rounding decides about their ReLU are off by more.
    assert relative_error(scores, expected.detach()) < 1e-3
