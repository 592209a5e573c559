"""Rankings, recall, AUROC, average precision by hand; what a detection writes and refuses."""

from dataclasses import replace
from math import exp, log
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import DETECT, SYNTHETIC, digits, read_table, refused, run

import detect_mislabeled_dataset as detect
import pipeline
import train

# Ranked by score: clean, corrupted, corrupted, clean, corrupted.
SCORES = np.array([0.1, 0.9, 0.5, 0.3, 0.7])
CORRUPTED = np.array([True, False, True, False, True])


def fake_run(labels, strategy="ekfac"):
    """What `measure` needs of an InfluenceRun for images with the given labels."""
    return SimpleNamespace(
        strategy=strategy,
        self_influence=lambda damping_factor: (torch.tensor([4.0, 1.0, 9.0]), "path"),
        data=SimpleNamespace(labels=labels),
        seconds={},
    )


def measure(monkeypatch, strategy="ekfac"):
    """The signals of three images with the label 0, the logits that they were given, and the file.

    Image 1 is predicted wrongly, image 2 less so. Image 0 was in the batches of both epochs, image
    1 in one, and image 2 in none: its margin in the end counts.
    """
    logits = torch.tensor([[2.0, 0.0, -1.0], [0.0, 1.0, 0.5], [0.0, 0.4, 0.5]])
    margins = torch.tensor([[2.0, torch.nan, torch.nan], [4.0, -2.0, torch.nan]]).half()
    features = F.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, 1.0]]), dim=1)
    monkeypatch.setattr(detect, "compute_features", lambda run: (features, logits))
    metadata = {"margins": margins, "accuracy": {"test": 0.4}}
    labels = torch.tensor([0, 0, 0])
    signals, found_logits, path = detect.measure(fake_run(labels, strategy), metadata, None)
    assert torch.equal(found_logits, logits)
    return signals, path


def test_rankings_by_hand(monkeypatch):
    """Of the second model all signals are twice as large."""
    signals, path = measure(monkeypatch)
    assert path == "path"
    assert signals["aum"].tolist() == [3, -2, -0.5] and signals["vote"].tolist() == [1, 1, 1]
    found = detect.rank([signals])
    assert list(found) == list(detect.RANKINGS)
    assert found["self_influence"].tolist() == [4, 1, 9] and found["aum"].tolist() == [-3, 2, 0.5]
    assert found["margin"].tolist() == [-2, 1, 0.5]
    mean, deviation = 0.5 / 3, ((3**2 + 2**2 + 0.5**2) / 3 - (0.5 / 3) ** 2) ** 0.5
    assert found["aum_vote"] == pytest.approx([(mean - aum) / deviation for aum in (3, -2, -0.5)])
    others = (exp(-2) + exp(-3), exp(1) + exp(0.5), exp(0.4) + exp(0.5))
    assert found["loss"] == pytest.approx([log(1 + other) for other in others])
    mean = detect.rank([signals, {name: 2 * values for name, values in signals.items()}])
    for name in ("self_influence", "aum", "margin", "loss"):
        assert mean[name] == pytest.approx(1.5 * found[name])
    assert mean["aum_vote"] == pytest.approx(found["aum_vote"], abs=1e-6)
    # The mean accuracy is 0.5: a vote counts an eighth.
    other = signals | {"vote": np.array([1.0, -1.0, 0.0]), "accuracy": 0.6}
    expected = found["aum_vote"] - [1.5**0.5 / 8, -(1.5**0.5) / 8, 0]
    assert detect.rank([signals, other])["aum_vote"] == pytest.approx(expected)


def test_without_influence_all_other_rankings_are_as_with_it(monkeypatch):
    full, _ = measure(monkeypatch)
    signals, path = measure(monkeypatch, strategy="none")
    assert path is None and "self_influence" not in signals
    found, expected = detect.rank([signals]), detect.rank([full])
    assert list(found) == [name for name in detect.RANKINGS if name != "self_influence"]
    assert all(np.array_equal(values, expected[name]) for name, values in found.items())


def test_the_k_nn_vote_by_hand(monkeypatch):
    """Eight directions with labels; an independent loop counts the labels of the four nearest."""
    monkeypatch.setattr(detect, "NEIGHBOURS_OF_50_000", 4 * (50_000 / 8) ** 0.5)
    angles = np.array([0.0, 0.1, 0.25, 0.3, 1.5, 1.6, 1.8, 3.0])
    labels = [0, 0, 1, 0, 1, 1, 2, 2]
    features = torch.tensor(np.stack([np.cos(angles), np.sin(angles)], 1), dtype=torch.float32)
    expected = []
    for i in range(8):
        others = sorted((abs(angles[i] - angles[j]), j) for j in range(8) if j != i)
        nearest = [labels[j] for _, j in others[:4]]
        shares = [nearest.count(label) / 4 for label in range(3)]
        of_label = shares.pop(labels[i])
        expected.append(of_label - max(shares))
    found = detect.knn_vote(features, torch.tensor(labels), 3)
    assert found.tolist() == pytest.approx(expected)


def test_features_are_those_of_an_image_and_of_its_mirror_image():
    data = digits(5)
    model = pipeline.construct_model("resnet9", 10).train()  # as after a training
    run = SimpleNamespace(data=data, model=model, dtype=torch.float32, batch_size=2)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    features, logits = detect.compute_features(run)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    mirrored = replace(data, images=data.images.flip(3))
    flipped = train.compute_logits(model, mirrored, 5, torch.float32)
    assert torch.allclose(logits, train.compute_logits(model, data, 5, torch.float32), atol=1e-6)
    # The head is linear without bias: its output is in proportion to the sum of both logits.
    together = model.logits(features)
    assert F.cosine_similarity(together, logits + flipped).min() > 1 - 1e-5
    assert torch.allclose(features.norm(dim=1), torch.ones(5))


def test_auroc_by_hand():
    """Of 6 pairs (corrupted, clean) 2 are won: 0.7 and 0.5 beat 0.3; 0.1 beats neither."""
    assert detect.auroc(SCORES, CORRUPTED) == pytest.approx(2 / 6)


def test_auroc_counts_ties_half():
    """Pairs (1, 1) and (2, 1): half a win and a win, of two."""
    assert detect.auroc(np.array([1.0, 1.0, 2.0]), np.array([False, True, True])) == pytest.approx(
        0.75
    )


def test_average_precision_by_hand():
    """The corrupted stand at ranks 2, 3 and 5, where the precision is 1/2, 2/3 and 3/5."""
    assert detect.average_precision(SCORES, CORRUPTED) == pytest.approx((1 / 2 + 2 / 3 + 3 / 5) / 3)


def test_curve_by_hand():
    curve = detect.detection_curve(SCORES, CORRUPTED)
    assert [point["inspected"] for point in curve] == [p / 100 for p in range(1, 101)]
    found = {point["inspected"]: point["recall"] for point in curve}
    assert found[0.01] == found[0.2] == 0
    assert [found[f] for f in (0.4, 0.6, 0.8, 1.0)] == pytest.approx([1 / 3, 2 / 3, 2 / 3, 1])


def test_perfect_and_reversed_rankings():
    """The top tenth holds a fifth of 50 corrupted images of 100."""
    corrupted = np.arange(100) < 50
    perfect = detect.evaluate_ranking(-np.arange(100.0), corrupted)
    assert perfect["auroc"] == perfect["average_precision"] == 1
    assert (perfect["recall_at_10"], perfect["recall_at_20"]) == (0.2, 0.4)
    reversed_ = detect.evaluate_ranking(np.arange(100.0), corrupted)
    assert reversed_["auroc"] == reversed_["recall_at_20"] == 0


# ---- What a detection writes, and refuses --------------------------------------------------------


def detection(data, **fields):
    """A Detection of images in their order, of which the second class is predicted."""
    scores = np.linspace(1, 0, len(data), dtype=np.float32)
    values = {
        "data": data,
        "method": "loss",
        "strategy": "ekfac",
        "scores": {"loss": scores},
        "order": np.arange(len(data)),
        "logits": torch.eye(10)[[1] * len(data)],
        "explanations": {},
    }
    return detect.Detection(**values | fields)


def test_the_table_names_the_first_of_identical_images(tmp_path):
    """Of images 0 to 5, numbers 2 and 5 are copies of 1, and 4 of 0; ranked backwards."""
    data = digits(6)
    data = replace(data, images=data.images[[0, 1, 1, 3, 0, 1]])
    detect.write_suspects(tmp_path / "s.csv", detection(data, order=np.arange(6)[::-1]))
    header, rows = read_table(tmp_path / "s.csv")
    assert header[-2:] == ["is_corrupted", "duplicate_of"]
    assert [row["index"] for row in rows] == [*"543210"]
    assert [row["duplicate_of"] for row in rows] == ["1", "0", "", "1", "", ""]


@pytest.mark.parametrize("added", [["new_label"], ["note"], ["Rank"], ["rank", "seen by me"]])
def test_a_table_with_a_column_of_a_person_is_not_replaced(tmp_path, added):
    path = tmp_path / "suspects_ekfac.csv"
    path.write_text(",".join([*detect.FIRST_COLUMNS, *detect.RANKINGS, *added]))
    with pytest.raises(pipeline.UserError, match=f"does not write .{added[-1]}.*: move it, or"):
        detect.require_unedited(path)


@pytest.mark.parametrize(
    "columns",
    [
        "rank,index,path,label,predicted_label,self_influence,aum,loss,margin,vote,aum_vote,is_corrupted",
        "rank,index,path,label,predicted_label,self_influence,aum,loss,margin,aum_margin,is_corrupted",
        "rank,index,path,label,class_name,predicted_label,predicted_class_name,combined,is_corrupted",
        "",
    ],
)
def test_a_table_of_an_earlier_version_is_replaced(tmp_path, columns):
    detect.require_unedited(tmp_path / "suspects_ekfac.csv")
    (tmp_path / "suspects_ekfac.csv").write_text(columns)
    detect.require_unedited(tmp_path / "suspects_ekfac.csv")


@pytest.mark.parametrize(
    "flags", [("--explain", 3), ("--method", "self_influence"), ("--method=self_influence",)]
)
def test_what_needs_influence_is_refused_without_it(tmp_path, monkeypatch, flags):
    """Before anything is loaded."""
    monkeypatch.setattr(pipeline, "load_runs", None)
    sentence = refused(tmp_path, DETECT, *SYNTHETIC, "--factor_strategy", "none", *flags)
    name = flags[0].partition("=")[0]
    assert f"argument {name}" in sentence and "computes no influence" in sentence
    assert not list(tmp_path.iterdir())


def test_no_network_is_refused_for_a_ranking_without_influence(tmp_path):
    """Its layers are not checked, and no parameter is named as fixed."""
    model = torch.nn.BatchNorm2d(3)
    path = tmp_path / "model"
    trained = pipeline.TrainedModel(model, digits(3), path, dtype=torch.float32, seconds={})
    assert trained.strategy == pipeline.NO_INFLUENCE and not trained.fixed
    assert trained.folder.parent == tmp_path


def test_without_the_flag_no_label_is_corrupted_in_the_detection(tmp_path, monkeypatch):
    """The model of the labels as they are is looked for, as train.py names it."""
    monkeypatch.setattr("sys.argv", [DETECT])
    assert detect.parse_arguments().corrupt_percentage == 0
    sentence = refused(tmp_path, DETECT, *SYNTHETIC[:-4], "--device", "cpu")
    assert "there is no checkpoint checkpoints/model.pth" in sentence


def test_the_help_explains_each_ranking_in_words(tmp_path):
    finished = run(tmp_path, DETECT, "--help")
    text = " ".join(finished.out.split())
    for name, ranking in detect.RANKINGS.items():
        assert f"{name}: {ranking.description}" in text
    titles = ["data:", "model:", "curvature:", "report:"]
    assert sorted(titles, key=text.index) == titles
