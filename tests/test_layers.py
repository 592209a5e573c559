"""Networks of a user: scores of each kind of layer are exact, or refused before any computation.

Each network has a stem, the tested layer, and a head. Its scores are compared with per-sample
gradients by torch.func; `-rP` shows the errors.
"""

import shutil
from collections import OrderedDict

import dense
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    ANALYZE,
    DETECT,
    SYNTHETIC,
    TRAIN,
    influence_run,
    minus_log_odds,
    refused,
    relative_error,
    succeed,
)
from dense import (
    NUM_CLASSES,
    NUM_QUERY,
    QUERY_BATCH_SIZE,
    SIZE,
    TOLERANCE,
    Float32Data,
    dense_layers,
    dense_scores,
    make_run,
    per_sample_gradients,
    random_data,
    truncated_scores,
)
from torch import nn

import pipeline

NUM_TRAIN = 18
CHANNELS = 4  # in the input of the tested layer

pytestmark = [
    pytest.mark.usefixtures("small_parts"),
    pytest.mark.filterwarnings("ignore:.*GradScaler:FutureWarning"),
]


# ---- Networks ------------------------------------------------------------------------------------


class Tokens(nn.Module):
    """Calls a module on images whose pixels are tokens, [B, T, C]."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, images):  # (B, C, H, W) -> (B, O, H * W, 1)
        return self.module(images.flatten(2).mT).mT[..., None]


class ChannelsLast(nn.Module):
    """Calls a module on images with channels last, [B, H, W, C]."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, images):
        return self.module(images.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Attention(nn.Module):
    """Self-attention with one head, on tokens with positions, and a residual connection."""

    def __init__(self, width=CHANNELS):
        super().__init__()
        self.position = nn.Parameter(torch.randn(SIZE[0] * SIZE[1], width))
        self.norm = nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, tokens):  # (B, T, C) -> (B, T, C)
        x = self.norm(tokens + self.position)
        mixed = F.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x))
        return tokens + self.out(mixed)


def narrow(model, divisor):
    """Divides the width of a network's layers, to at least two channels. Returns the network."""

    def width(channels):
        return channels if channels in (3, NUM_CLASSES) else max(2, channels // divisor)

    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Conv2d):
                settings = layer.kernel_size, layer.stride, layer.padding
                channels = width(layer.in_channels), width(layer.out_channels)
                setattr(parent, name, nn.Conv2d(*channels, *settings, bias=layer.bias is not None))
            elif isinstance(layer, nn.BatchNorm2d):
                setattr(parent, name, nn.BatchNorm2d(width(layer.num_features)))
            elif isinstance(layer, nn.Linear):
                layer = nn.Linear(width(layer.in_features), width(layer.out_features))
                setattr(parent, name, layer)
    return model


def narrow_resnet18():
    """Returns torchvision's resnet18 for small images, 2 to 8 channels wide."""
    from torchvision.models import resnet18

    model = resnet18(num_classes=NUM_CLASSES)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return narrow(model, 64)


def around(middle):
    """Returns a network of a stem, `middle`, a mean over positions, and a head."""
    stem = nn.Conv2d(3, CHANNELS, 3, padding=1), nn.BatchNorm2d(CHANNELS), nn.ReLU()
    with torch.no_grad():
        width = middle(torch.zeros(1, CHANNELS, *SIZE)).shape[1]
    head = nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, NUM_CLASSES)
    return nn.Sequential(*stem, middle, *head)


def conv(*sizes, **settings):
    """Returns a convolution for the input of the tested layer."""
    return nn.Conv2d(CHANNELS, *sizes, **settings)


NETWORKS = {
    "bias": lambda: around(conv(5, 3, padding=1)),
    "no bias": lambda: around(conv(5, 3, padding=1, bias=False)),
    "1x1": lambda: around(conv(5, 1)),
    "strides": lambda: around(conv(5, (2, 3), stride=(2, 1), padding=(0, 2))),
    "two groups": lambda: around(conv(6, 3, padding=1, groups=2)),
    "two groups, dilation, no bias": lambda: around(
        conv(6, (2, 3), stride=2, dilation=2, groups=2, bias=False)
    ),
    "depthwise": lambda: around(conv(8, 3, padding=1, groups=CHANNELS)),
    "depthwise separable": lambda: around(
        nn.Sequential(conv(4, 3, groups=CHANNELS, bias=False), nn.ReLU(), conv(5, 1))
    ),
    "dilation": lambda: around(conv(5, 3, padding=(2, 0), dilation=(2, 1))),
    "padding same": lambda: around(conv(5, (2, 3), padding="same", dilation=(1, 2))),
    "padding valid": lambda: around(conv(5, 3, padding="valid")),
    "padding mode reflect": lambda: around(conv(5, 3, padding=(2, 1), padding_mode="reflect")),
    "padding mode circular, same": lambda: around(
        conv(6, (3, 2), padding="same", padding_mode="circular", groups=2)
    ),
    "tokens": lambda: around(Tokens(nn.Linear(CHANNELS, 5))),
    "tokens in rows and columns": lambda: around(ChannelsLast(nn.Linear(CHANNELS, 5))),
    "attention": lambda: around(Tokens(Attention())),
    "output changed in place": lambda: around(nn.Sequential(conv(5, 3), nn.ReLU(inplace=True))),
    "resnet18": narrow_resnet18,
}
EVERY_NETWORK = pytest.mark.parametrize("name", NETWORKS)


def make_network(name, dtype=torch.float64):
    """Returns a network of NETWORKS in eval mode, with batch-norm statistics of its data."""
    torch.manual_seed(5)
    model = NETWORKS[name]()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_(std=0.3)
            norm.running_var.uniform_(0.2, 1)
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.3)
    return model.to(dtype).eval()


# ---- Exact ---------------------------------------------------------------------------------------


@EVERY_NETWORK
def test_identity_scores_are_products_of_per_sample_gradients(tmp_path, name):
    """Like the scripts, this computes in float32."""
    model = make_network(name, torch.float32)
    data = random_data(NUM_TRAIN, 1, kind=Float32Data)
    queries = random_data(NUM_QUERY, 2, kind=Float32Data)
    train_gradients = per_sample_gradients(model, data, F.cross_entropy)
    query_gradients = per_sample_gradients(model, queries, minus_log_odds)
    run = influence_run(tmp_path, data, "identity", model=model)
    pairwise, _ = run.pairwise_influence(queries, QUERY_BATCH_SIZE, 0.0)
    self_influence, _ = run.self_influence(0.0)
    products = sum(query_gradients[layer] @ train.T for layer, train in train_gradients.items())
    squares = sum(train.square().sum(1) for train in train_gradients.values())
    errors = relative_error(pairwise, products), relative_error(self_influence, squares)
    print(f"{name:30}  identity, float32: pairwise {errors[0]:.0e}, self-influence {errors[1]:.0e}")
    assert max(errors) < 1e-5


@EVERY_NETWORK
def test_ekfac_scores_equal_the_dense_computation(tmp_path, name):
    check_against_dense(tmp_path, name, "ekfac")


@pytest.mark.parametrize("name", ["two groups", "depthwise", "attention"])
@pytest.mark.parametrize("strategy", ["kfac", "diagonal"])
def test_other_strategies_equal_the_dense_computation(tmp_path, strategy, name):
    check_against_dense(tmp_path, name, strategy)


def check_against_dense(folder, name, strategy):
    """Compares the scores of a network and a strategy with the dense reference, in float64."""
    model = make_network(name)
    data, queries = random_data(NUM_TRAIN, 1), random_data(NUM_QUERY, 2)
    layers = dense_layers(model, data, queries)
    run = make_run(folder, model, data, strategy)
    pairwise, _ = run.pairwise_influence(queries, QUERY_BATCH_SIZE, "heuristic")
    self_influence, _ = run.self_influence("heuristic")
    errors = (
        relative_error(pairwise, dense_scores(layers, strategy, "heuristic")),
        relative_error(self_influence, dense_scores(layers, strategy, "heuristic", "train").diag()),
    )
    print(f"{name:30}  {strategy}, float64: pairwise {errors[0]:.0e}, self {errors[1]:.0e}")
    assert max(errors) < TOLERANCE


@pytest.fixture
def exact_index(monkeypatch):
    """An index in float64."""
    monkeypatch.setattr(pipeline, "INDEX_DTYPE", torch.float64)


@EVERY_NETWORK
def test_truncated_ekfac_equals_the_dense_computation_without_the_other_eigenvectors(
    tmp_path, name, exact_index
):
    check_truncated(tmp_path, name, "ekfac")


@pytest.mark.parametrize("name", ["two groups", "depthwise", "attention"])
def test_truncated_kfac_equals_the_dense_computation_without_the_other_eigenvectors(
    tmp_path, name, exact_index
):
    check_truncated(tmp_path, name, "kfac")


def check_truncated(folder, name, strategy):
    """Holds truncated scores to the dense reference, in float64, with both kinds of damping.

    They are computed without an index, and with an index.
    """
    model = make_network(name)
    data, queries = random_data(NUM_TRAIN, 1), random_data(NUM_QUERY, 2)
    layers = dense_layers(model, data, queries)
    run = make_run(folder, model, data, strategy)
    errors = []
    for damping, fraction in (("heuristic", 0.3), (1e-3, 0.3), ("heuristic", 0.8)):
        expected = truncated_scores(layers, strategy, damping, fraction)
        for with_index in (False, True):
            found, _ = run.pairwise_influence(
                queries, QUERY_BATCH_SIZE, damping, fraction, with_index=with_index
            )
            errors.append(relative_error(found, expected))
        full = dense_scores(layers, strategy, damping)
        assert relative_error(found, full) > 1e-3  # what is left out makes a difference
    print(f"{name:30}  {strategy}, truncated, float64: pairwise {max(errors):.0e}")
    assert max(errors) < TOLERANCE


@pytest.mark.parametrize("name", ["depthwise", "padding mode reflect", "attention"])
def test_bfloat16_scores_of_every_kind_of_input_are_close_to_float32(tmp_path, name):
    model, data = make_network(name, torch.float32), random_data(NUM_TRAIN, 1, kind=Float32Data)
    queries = random_data(NUM_QUERY, 2, kind=Float32Data)
    scores = []
    for dtype in (torch.float32, torch.bfloat16):
        run = influence_run(tmp_path, data, model=model, dtype=dtype)
        pairwise, _ = run.pairwise_influence(queries, QUERY_BATCH_SIZE, "heuristic")
        self_influence, _ = run.self_influence("heuristic")
        scores.append(torch.cat([pairwise.flatten(), self_influence]))
    assert not torch.equal(*scores)
    assert torch.corrcoef(torch.stack(scores))[0, 1] > 0.98


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@EVERY_NETWORK
def test_patches_are_those_of_torchs_unfold_in_every_memory_format(name, memory_format):
    for layer in dense.named_layers(make_network(name)).values():
        if isinstance(layer, nn.Conv2d):
            images = torch.randn(3, layer.in_channels, *SIZE, dtype=torch.float64)
            images = images.to(memory_format=memory_format)
            found = pipeline.patches(layer, images).flatten(0, -2)
            assert torch.equal(found, dense.patches(layer, images))


# ---- Refused -------------------------------------------------------------------------------------


class CalledTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.shared = conv(CHANNELS, 3, padding=1)

    def forward(self, x):
        return self.shared(self.shared(x).relu())


class TwoNames(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = conv(CHANNELS, 1)
        self.layers = nn.Sequential(self.first, nn.ReLU())

    def forward(self, x):
        return self.layers(x)


class TiedWeights(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.other = conv(CHANNELS, 1), conv(CHANNELS, 1)
        self.other.weight = self.one.weight

    def forward(self, x):
        return self.other(self.one(x).relu())


class WeightUsedDirectly(nn.Module):
    def __init__(self):
        super().__init__()
        self.filters = conv(CHANNELS, 1)

    def forward(self, x):
        return F.conv2d(x, self.filters.weight, self.filters.bias)


class RowsAsImages(nn.Module):
    """Makes rows of images the first dimension, as window attention does with windows."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(CHANNELS, CHANNELS)

    def forward(self, x):
        rows = self.mix(x.permute(0, 2, 3, 1).flatten(0, 1))  # (B * H, W, C)
        return rows.unflatten(0, (len(x), -1)).permute(0, 3, 1, 2)


class KeywordInput(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(CHANNELS, CHANNELS)

    def forward(self, x):
        return self.mix(input=x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ImagesMixed(nn.Module):
    """Mixes the images of a batch, so that a gradient depends on several images."""

    def forward(self, x):
        return x - x.mean(0)


def with_pre_hook():
    middle = conv(5, 3)
    middle.register_forward_pre_hook(lambda layer, inputs: inputs[0] - 1)
    return middle


def with_frozen_bias():
    middle = conv(5, 3)
    middle.bias.requires_grad_(False)
    return middle


class KindDecides(nn.Module):
    """Its activation depends on the class of the layer, which kronfluence wraps."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([conv(5, 3), nn.BatchNorm2d(5)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
            if isinstance(layer, nn.Conv2d):
                x = F.silu(x)
        return x


class AttributeOfLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = conv(5, 3)

    def forward(self, x):
        return self.layer(x) / self.layer.stride[0]


class PlainListBeside(nn.Module):
    """Calls its layer past the attribute that kronfluence replaces."""

    def __init__(self):
        super().__init__()
        self.layer = conv(5, 3)
        self.steps = [self.layer]

    def forward(self, x):
        return self.steps[0](x)


REFUSED = {
    "a layer with a forward pre-hook": (with_pre_hook, "'3': it has a forward pre-hook"),
    "a layer with a frozen bias": (with_frozen_bias, "'3': its bias is frozen"),
    "a layer whose class decides": (KindDecides, "other logits if its layers are wrapped"),
    "an attribute of a layer": (AttributeOfLayer, "has no attribute 'stride'"),
    "a layer in a plain list": (PlainListBeside, "'3.layer' is called by another reference"),
    "a layer called twice": (CalledTwice, "'3.shared': it is called 2 times"),
    "a layer under two names": (TwoNames, "'3.first': it is also registered as '3.layers.0'"),
    "a weight of two layers": (TiedWeights, "'3.one': its gradients do not follow"),
    "a weight used without its layer": (WeightUsedDirectly, "'3.filters': it is called 0 times"),
    "another first dimension": (RowsAsImages, "'3.mix': the first dimension of its input is 14"),
    "an input by keyword": (KeywordInput, "'3.mix': its input is passed by keyword"),
    "images mixed": (ImagesMixed, "'0': its gradients do not follow"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_layer_whose_scores_would_be_wrong_is_refused_before_anything_is_written(tmp_path, name):
    middle, words = REFUSED[name]
    torch.manual_seed(0)
    model, data = around(middle()).eval(), random_data(5, 1, kind=Float32Data)
    with pytest.raises(pipeline.UserError) as refusal:
        influence_run(tmp_path / "results", data, "identity", model=model)
    assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert refusal.value.status == 2
    assert not (tmp_path / "results").exists()


class MixedInTraining(nn.Module):
    """Batch normalisation without running statistics: it mixes images in eval mode, too."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(CHANNELS, track_running_stats=False)

    def forward(self, x):
        return self.norm(x)


def test_mixed_images_are_refused_if_the_first_two_images_are_identical(tmp_path):
    torch.manual_seed(0)
    data = random_data(5, 1, kind=Float32Data)
    data.images[1] = data.images[0]
    with pytest.raises(pipeline.UserError, match="do not mix images"):
        influence_run(tmp_path, data, "identity", model=around(MixedInTraining()).eval())


def test_a_frozen_layer_is_a_constant_and_the_other_layers_stay_exact(tmp_path):
    torch.manual_seed(0)
    model = around(nn.Sequential(conv(5, 3), nn.ReLU(), nn.Conv2d(5, 5, 1))).eval()
    model[3][0].requires_grad_(False)
    data = random_data(NUM_TRAIN, 1, kind=Float32Data)
    run = influence_run(tmp_path, data, "identity", model=model)
    assert run.fixed == "1 BatchNorm2d, 1 Conv2d"
    gradients = per_sample_gradients(model, data, F.cross_entropy)
    found, _ = run.self_influence(0.1)
    expected = sum(
        gradient.square().sum(1) for name, gradient in gradients.items() if name != "3.0"
    )
    assert relative_error(found, expected) < 1e-5


def test_a_network_whose_layers_do_not_decide_its_logits_is_refused(tmp_path):
    model = nn.Sequential(Unused(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    with pytest.raises(pipeline.UserError, match="do not depend on the parameters"):
        influence_run(tmp_path, random_data(5, 1, (CHANNELS, *SIZE), kind=Float32Data), model=model)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("frozen", [False, True])
def test_a_network_without_a_trained_convolution_or_linear_layer_is_refused(tmp_path, frozen):
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(3 * SIZE[0] * SIZE[1])).eval()
    if frozen:
        model.append(nn.Linear(3 * SIZE[0] * SIZE[1], 4).requires_grad_(False))
    with pytest.raises(pipeline.UserError, match="no trained Conv2d or Linear layer"):
        influence_run(tmp_path, random_data(5, 1, kind=Float32Data), model=model)
    assert not list(tmp_path.iterdir())


def test_the_scripts_refuse_a_network_before_they_write_anything(tmp_path, monkeypatch):
    def called_twice(num_classes):
        stem = nn.Conv2d(3, CHANNELS, 3, stride=4)
        features = nn.Sequential(stem, CalledTwice(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        return nn.Sequential(OrderedDict(features=features, head=nn.Linear(4, num_classes)))

    monkeypatch.setitem(pipeline.MODELS, "called_twice", called_twice)
    model = (*SYNTHETIC, "--model", "called_twice")
    succeed(tmp_path, TRAIN, *model, "--train_batch_size", 20, "--num_train_epochs", 1)
    for script in (ANALYZE, DETECT):
        words = "the layer 'features.1.shared': it is called 2 times"
        assert words in refused(tmp_path, script, *model)
    assert not (tmp_path / "influence_results").exists()


# ---- Taken as fixed ------------------------------------------------------------------------------


class Unused(nn.Module):
    """Layers that are not called, not differentiated, or whose output is not used."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(CHANNELS, 1, 1))
        self.auxiliary, self.discarded = nn.Linear(3, 2), conv(2, 1)
        self.constant = nn.Linear(1, CHANNELS)

    def forward(self, x):
        self.discarded(x)
        with torch.no_grad():
            shift = self.constant(x.new_ones(len(x), 1))
        return x * self.scale + shift[:, :, None, None]


def test_parameters_outside_tracked_layers_are_named_as_fixed(tmp_path):
    middle = nn.Sequential(Tokens(Attention()), nn.BatchNorm2d(CHANNELS), Unused())
    run = influence_run(tmp_path, random_data(5, 1, kind=Float32Data), model=around(middle).eval())
    kinds = "2 BatchNorm2d, 1 LayerNorm, 2 Linear, 1 Conv2d"
    assert run.fixed == f"{kinds}, 3.0.module.position, 3.2.scale"


def test_unused_layers_are_not_tracked_and_the_other_layers_stay_exact(tmp_path):
    torch.manual_seed(0)
    model = around(nn.Sequential(Unused(), conv(5, 3))).eval()
    data = random_data(NUM_TRAIN, 1, kind=Float32Data)
    gradients = per_sample_gradients(model, data, F.cross_entropy)
    for strategy in ("identity", "ekfac"):
        found, _ = influence_run(tmp_path, data, strategy, model=model).self_influence(0.1)
        assert found.isfinite().all()
        if strategy == "identity":
            expected = sum(gradient.square().sum(1) for gradient in gradients.values())
            assert relative_error(found, expected) < 1e-5


def test_the_scripts_name_the_parameters_that_they_treat_as_fixed(trained, tmp_path):
    folder = shutil.copytree(trained[0], tmp_path / "trained")
    identity = ("--factor_strategy", "identity", "--num_query_examples", "2")
    lines = succeed(folder, ANALYZE, *SYNTHETIC, *identity).splitlines()
    assert lines.count("Influence takes these parameters as fixed: 8 BatchNorm2d") == 1
