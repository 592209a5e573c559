"""Rankings, recall, AUROC and average precision, computed by hand.

Further tests check what a detection writes, and what it refuses.
"""

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
    """An object with the attributes of an InfluenceRun that `measure` uses."""
    return SimpleNamespace(
        strategy=strategy,
        self_influence=lambda damping_factor: (torch.tensor([4.0, 1.0, 9.0]), "path"),
        data=SimpleNamespace(labels=labels),
        seconds={},
    )


def measure(monkeypatch, strategy="ekfac"):
    """The signals of three images with the label 0, and the file of self-influence.

    The predictions of images 1 and 2 are wrong. Image 0 was in batches of both epochs, image 1 in a
    batch of one epoch. Image 2 was in no batch, so its final margin counts.
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
    """All signals of the second model are twice those of the first."""
    signals, path = measure(monkeypatch)
    assert path == "path"
    assert signals["aum"].tolist() == [3, -2, -0.5] and signals["vote"].tolist() == [1, 1, 1]
    found = detect.suspicion_by_ranking([signals])
    assert list(found) == list(detect.RANKINGS)
    assert found["self_influence"].tolist() == [4, 1, 9] and found["aum"].tolist() == [-3, 2, 0.5]
    assert found["margin"].tolist() == [-2, 1, 0.5]
    mean, deviation = 0.5 / 3, ((3**2 + 2**2 + 0.5**2) / 3 - (0.5 / 3) ** 2) ** 0.5
    assert found["aum_vote"] == pytest.approx([(mean - aum) / deviation for aum in (3, -2, -0.5)])
    exp_of_others = (exp(-2) + exp(-3), exp(1) + exp(0.5), exp(0.4) + exp(0.5))
    assert found["loss"] == pytest.approx([log(1 + others) for others in exp_of_others])
    mean = detect.suspicion_by_ranking(
        [signals, {name: 2 * values for name, values in signals.items()}]
    )
    for name in ("self_influence", "aum", "margin", "loss"):
        assert mean[name] == pytest.approx(1.5 * found[name])
    assert mean["aum_vote"] == pytest.approx(found["aum_vote"], abs=1e-6)
    # The mean accuracy is 0.5, so the weight of the vote is 1/8.
    other = signals | {"vote": np.array([1.0, -1.0, 0.0]), "accuracy": 0.6}
    expected = found["aum_vote"] - [1.5**0.5 / 8, -(1.5**0.5) / 8, 0]
    assert detect.suspicion_by_ranking([signals, other])["aum_vote"] == pytest.approx(expected)


def test_rankings_without_influence_do_not_change_if_influence_is_skipped(monkeypatch):
    full, _ = measure(monkeypatch)
    signals, path = measure(monkeypatch, strategy="none")
    assert path is None and "self_influence" not in signals
    found, expected = detect.suspicion_by_ranking([signals]), detect.suspicion_by_ranking([full])
    assert list(found) == [name for name in detect.RANKINGS if name != "self_influence"]
    assert all(np.array_equal(values, expected[name]) for name, values in found.items())


@pytest.mark.parametrize("count", [1, 3, 10])
def test_equal_values_are_standardised_to_zeros(count):
    """The standard deviation of three times 0.1 is not 0, but a rounding error."""
    assert not detect.standardise(np.full(count, 0.1)).any()


def test_the_k_nn_vote_by_hand(monkeypatch):
    """Features are eight unit vectors. A loop counts the labels of the four nearest vectors."""
    monkeypatch.setattr(detect, "NEIGHBOURS_OF_50_000", 4 * (50_000 / 8) ** 0.5)
    angles = np.array([0.0, 0.1, 0.25, 0.3, 1.5, 1.6, 1.8, 3.0])
    labels = [0, 0, 1, 0, 1, 1, 2, 2]
    features = torch.tensor(np.stack([np.cos(angles), np.sin(angles)], 1), dtype=torch.float32)
    expected = []
    for i in range(8):
        others = sorted((abs(angles[i] - angles[j]), j) for j in range(8) if j != i)
        nearest = [labels[j] for _, j in others[:4]]
        shares = [nearest.count(label) / 4 for label in range(3)]
        share_of_label = shares.pop(labels[i])
        expected.append(share_of_label - max(shares))
    found = detect.knn_vote(features, torch.tensor(labels), 3)
    assert found.tolist() == pytest.approx(expected)


def test_features_are_the_sum_over_an_image_and_its_mirror_image():
    data = digits(5)
    model = pipeline.construct_model("resnet9", 10).train()  # as after a training
    run = SimpleNamespace(data=data, model=model, dtype=torch.float32, batch_size=2)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    features, logits = detect.compute_features(run)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    mirrored = replace(data, images=data.images.flip(3))
    flipped = train.compute_logits(model, mirrored, 5, torch.float32)
    assert torch.allclose(logits, train.compute_logits(model, data, 5, torch.float32), atol=1e-6)
    # The head is linear without bias: its output is proportional to the sum of both logits.
    together = model.logits(features)
    assert F.cosine_similarity(together, logits + flipped).min() > 1 - 1e-5
    assert torch.allclose(features.norm(dim=1), torch.ones(5))


def test_auroc_by_hand():
    """In 2 of 6 pairs the corrupted score is higher: 0.7 and 0.5 are above 0.3."""
    assert detect.auroc(SCORES, CORRUPTED) == pytest.approx(2 / 6)


def test_auroc_counts_ties_half():
    """The pairs (corrupted, clean) are (1, 1) and (2, 1). The first counts half."""
    auroc = detect.auroc(np.array([1.0, 1.0, 2.0]), np.array([False, True, True]))
    assert auroc == pytest.approx(0.75)


def test_average_precision_by_hand():
    """Corrupted images have ranks 2, 3 and 5. The precision there is 1/2, 2/3 and 3/5."""
    assert detect.average_precision(SCORES, CORRUPTED) == pytest.approx((1 / 2 + 2 / 3 + 3 / 5) / 3)


def test_recall_curve_by_hand():
    curve = detect.detection_curve(SCORES, CORRUPTED)
    assert [point["inspected"] for point in curve] == [p / 100 for p in range(1, 101)]
    found = {point["inspected"]: point["recall"] for point in curve}
    assert found[0.01] == found[0.2] == 0
    assert [found[f] for f in (0.4, 0.6, 0.8, 1.0)] == pytest.approx([1 / 3, 2 / 3, 2 / 3, 1])


def test_perfect_and_reversed_rankings():
    """50 of 100 images are corrupted: the 10 first images of a perfect ranking are 20 % of them."""
    corrupted = np.arange(100) < 50
    perfect = detect.evaluate_ranking(-np.arange(100.0), corrupted)
    assert perfect["auroc"] == perfect["average_precision"] == 1
    assert (perfect["recall_at_10"], perfect["recall_at_20"]) == (0.2, 0.4)
    reversed_ = detect.evaluate_ranking(np.arange(100.0), corrupted)
    assert reversed_["auroc"] == reversed_["recall_at_20"] == 0


@pytest.mark.parametrize(
    ("is_corrupted", "sentence"),
    [([False, False], "No label is known to be wrong"), ([True, True], "All labels are known to")],
)
def test_a_detection_without_recall_prints_the_reason(capsys, is_corrupted, sentence):
    results = detect.evaluate_rankings({"loss": np.array([1.0, 2.0])}, np.array(is_corrupted))
    assert results == {}
    detect.print_recall(results, "loss", num_corrupted=sum(is_corrupted))
    assert capsys.readouterr().out.startswith(sentence)


# ---- What a detection writes, and refuses --------------------------------------------------------


def detection(data, **fields):
    """A Detection that ranks images in their order and predicts the second class for all."""
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
    """Images 2 and 5 are copies of image 1, image 4 is a copy of image 0. Image 5 ranks first."""
    data = digits(6)
    data = replace(data, images=data.images[[0, 1, 1, 3, 0, 1]])
    detect.write_suspects(tmp_path / "s.csv", detection(data, order=np.arange(6)[::-1]))
    header, rows = read_table(tmp_path / "s.csv")
    assert header[-2:] == ["is_corrupted", "duplicate_of"]
    assert [row["index"] for row in rows] == [*"543210"]
    assert [row["duplicate_of"] for row in rows] == ["1", "0", "", "1", "", ""]


@pytest.mark.parametrize("added", [["new_label"], ["note"], ["Rank"], ["rank", "seen by me"], [""]])
def test_a_table_with_a_column_that_the_user_added_is_not_replaced(tmp_path, added):
    path = tmp_path / "suspects_ekfac.csv"
    path.write_text(",".join([*detect.FIRST_COLUMNS, *detect.RANKINGS, *added]))
    with pytest.raises(
        pipeline.UserError, match=f"columns that you added .*{added[-1]}.: move the file, or"
    ):
        detect.require_no_added_columns(path)


@pytest.mark.parametrize("separator", ",;\t")
@pytest.mark.parametrize("first_lines", ["", "\n", "sep={}\n"])
def test_a_table_with_a_note_in_a_column_without_a_name_is_not_replaced(
    tmp_path, separator, first_lines
):
    path = tmp_path / "suspects_ekfac.csv"
    header = separator.join([*detect.FIRST_COLUMNS, *detect.LAST_COLUMNS])
    cells = ["1", "5", f'"a{separator}b.png"', "cat", "dog", "1", ""]
    first_row = separator.join(cells)
    start = first_lines.format(separator)
    for others in ("", separator, f"{separator}{separator}"):  # empty cells are no notes
        path.write_text(f"{start}{header}\n{first_row}{others}\n")
        detect.require_no_added_columns(path)
    path.write_text(f"{start}{header}\n{first_row}\n{first_row}{separator}look again\n")
    with pytest.raises(pipeline.UserError, match="unnamed, in the row of rank 1"):
        detect.require_no_added_columns(path)


DIGIT_KEYS = {  # names of classes, and the class that each key chooses
    "cat dog": {"1": "cat", "2": "dog"},
    "0 1 2": {"0": "0", "1": "1", "2": "2"},
    "0 1 2 other": {"0": "0", "1": "1", "2": "2"},
    "1 10 2 3": {"1": "1", "2": "2", "3": "3"},
    "a b c d e f g h i j": dict(zip("1234567890", "abcdefghij", strict=True)),
    "a b c d e f g h i j k": {},
}


@pytest.mark.parametrize("names", DIGIT_KEYS)
def test_a_digit_key_never_chooses_a_class_of_another_digit(names):
    assert dict(detect.digit_keys(names.split())) == DIGIT_KEYS[names]


def test_a_network_with_nan_logits_is_not_ranked(tmp_path):
    model = pipeline.construct_model("resnet9", 10).eval()
    with torch.no_grad():
        model.head[0].weight.fill_(torch.nan)
    run = pipeline.TrainedModel(
        model, digits(4), tmp_path / "model", dtype=torch.float32, seconds={}
    )
    metadata = {"margins": torch.zeros(1, 4), "accuracy": {"test": 0.5}}
    settings = {"method": "aum", "damping_factor": "heuristic", "num_explained": 0}
    with pytest.raises(pipeline.NumericalError, match="logits of the network are NaN"):
        detect.detect([run], [metadata], digits(4), **settings)


def test_a_column_that_the_user_adds_during_a_detection_is_not_lost(tmp_path):
    files = detect.result_files(tmp_path, "ekfac")
    files.suspects.write_text("rank,index,new_label\n1,0,cat\n")
    with pytest.raises(pipeline.UserError, match="columns that you added"):
        detect.write_tables_and_page(files, None, num_review=1, cleaned=False)
    assert list(tmp_path.iterdir()) == [files.suspects]
    assert files.suspects.read_text().endswith("1,0,cat\n")


@pytest.mark.parametrize("start", ["", "\ufeff"], ids=["", "byte order mark"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_table_that_a_spreadsheet_saved_without_a_new_column_is_replaced(
    tmp_path, separator, start
):
    path = tmp_path / "suspects_ekfac.csv"
    columns = [*detect.FIRST_COLUMNS, *detect.RANKINGS, *detect.LAST_COLUMNS]
    path.write_text(start + separator.join(columns) + "\n")
    detect.require_no_added_columns(path)
    for first_line in (f"sep={separator}", f'"sep={separator}"{separator}{separator}'):
        path.write_text(f"{start}{first_line}\n{separator.join(columns)}\n")
        detect.require_no_added_columns(path)


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
    detect.require_no_added_columns(tmp_path / "suspects_ekfac.csv")
    (tmp_path / "suspects_ekfac.csv").write_text(columns)
    detect.require_no_added_columns(tmp_path / "suspects_ekfac.csv")


@pytest.mark.parametrize(
    "flags",
    [
        ("--explain", 3),
        ("--method", "self_influence"),
        ("--method=self_influence",),
        ("--index",),
        ("--eigenvector_fraction", 0.5),
    ],
)
def test_flags_that_need_influence_are_refused_without_it(tmp_path, monkeypatch, flags):
    """The refusal comes before anything is loaded."""
    monkeypatch.setattr(pipeline, "load_runs", None)
    sentence = refused(tmp_path, DETECT, *SYNTHETIC, "--factor_strategy", "none", *flags)
    name = flags[0].partition("=")[0]
    assert f"error: {name} " in sentence
    assert "needs influence, but --factor_strategy none skips it: choose another" in sentence
    assert not list(tmp_path.iterdir())


def test_any_network_is_accepted_if_influence_is_skipped(tmp_path):
    """Its layers are not tracked, and no parameter is reported as fixed."""
    model = torch.nn.BatchNorm2d(3)
    path = tmp_path / "model"
    trained = pipeline.TrainedModel(model, digits(3), path, dtype=torch.float32, seconds={})
    assert trained.strategy == pipeline.NO_INFLUENCE and not trained.fixed
    assert trained.folder.parent == tmp_path


def test_by_default_a_detection_corrupts_no_label(tmp_path, monkeypatch):
    """It expects the model of the uncorrupted labels, under the name that train.py gives it."""
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
