"""The studies, on forty digits: labels, results, tables, and continuing after a stop."""

import json
from collections import OrderedDict

import numpy as np
import pytest
import study
import torch
from conftest import image_data
from torch import nn

import detect_mislabeled_dataset as detect
import pipeline

FLAGS = ["--num_train_examples", "40", "--train_batch_size", "10", "--num_train_epochs", "1"]
FLAGS += ["--learning_rate", "0.05", "--num_query_examples", "3"]
FLAGS += ["--seeds", "1", "--corruption_seeds", "1"]


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Runs a study in a new folder. Returns its printed output and the rows of its results."""

    def call(name, *flags):
        argv = ["study.py", name, "--folder", str(tmp_path), *FLAGS, *flags]
        monkeypatch.setattr("sys.argv", argv)
        study.main()
        lines = (tmp_path / "results.jsonl").read_text().splitlines()
        return capsys.readouterr().out, [json.loads(line) for line in lines]

    return call


@pytest.fixture
def store(tmp_path):
    """An empty store."""
    return study.Store(tmp_path, {}, {"device": "cpu"})


class FakeTrainer:
    """Its network is the set of training images; its logits come from a function of the test."""

    def __init__(self, clean, logits):
        self.clean = self.test = clean
        self.logits = logits
        self.seeds = []

    def train(self, data, seed):
        self.seeds.append(seed)
        return set(data.images.flatten().tolist()), None, {}


def numbers(count):
    """Each image is its own index. The labels are 0 to 9, repeated."""
    names = [str(digit) for digit in range(10)]
    return image_data(torch.arange(count), torch.arange(count) % 10, names)


# ---- Label noise ---------------------------------------------------------------------------------


def test_asymmetric_noise_gives_each_class_the_label_of_its_partner():
    names = sorted(study.PARTNERS)
    data = image_data(torch.zeros(100, 3, 32, 32), torch.arange(10).repeat_interleave(10), names)
    corrupted = study.corrupt(data, "asymmetric", 0.2)
    flips = set()
    for true, label in zip(data.labels, corrupted.labels, strict=True):
        if true != label:
            flips.add((names[true], names[label]))
    assert corrupted.is_corrupted.sum() == 20
    assert flips <= set(study.PARTNERS.items()) and len(flips) > 5


def test_asymmetric_noise_takes_the_next_class_if_the_partner_is_missing():
    assert study.partner_of(0, ["cat", "ink", "owl"]) == 1  # there is no dog
    assert study.partner_of(2, ["cat", "ink", "owl"]) == 0


@pytest.mark.parametrize("seed", [13, 14])
@pytest.mark.parametrize(("noise", "fraction"), [("symmetric", 0.1), ("asymmetric", 0.2)])
def test_the_file_of_noisy_labels_contains_the_labels_of_a_draw(
    run, tmp_path, noise, fraction, seed
):
    (tmp_path / "results.jsonl").touch()
    run(noise, "--corruption_seed", str(seed))
    lines = (tmp_path / "labels.csv").read_text().split()
    assert lines[0] == "index,path,label"
    clean = pipeline.load_data("synthetic", "", "train", 40)
    expected = study.corrupt(clean, noise, fraction, seed).labels.tolist()
    assert expected != study.corrupt(clean, noise, fraction, seed + 1).labels.tolist()
    assert [int(line.split(",")[2]) for line in lines[1:]] == expected
    assert [int(line.split(",")[0]) for line in lines[1:]] == clean.dataset_indices.tolist()


# ---- Detection and cleaning ----------------------------------------------------------------------


def test_a_stopped_detection_continues(run, tmp_path):
    flags = ("--num_noises", "1", "--folds", "2", "--corruption_seed", "21")
    output, rows = run("detection", *flags)
    assert {row["corruption_seed"] for row in rows} == {21}
    assert [row["study"] for row in rows] == ["detection", "cross_validation"]
    assert rows[0]["methods"].keys() == {*detect.RANKINGS, "self_influence, heuristic"}
    assert rows[1]["methods"].keys() == {"2-fold cross-validation"}
    assert all(0 <= found["auroc"] <= 1 for row in rows for found in row["methods"].values())
    found = rows[0]["methods"]["aum"]
    recalls = f"{100 * found['recall_at_10']:.1f} % | {100 * found['recall_at_20']:.1f} %"
    assert f"| aum | {recalls} | {found['auroc']:.3f} |" in output
    assert f"symmetric noise, test accuracy {100 * rows[0]['accuracy']:.1f} %" in output
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write('{"study": "detec')  # the study stopped while it wrote this line
    assert run("detection", *flags)[1] == rows


def test_cleaning_starts_from_the_detection(run, monkeypatch, tmp_path):
    monkeypatch.setattr(study, "CLEANED_FRACTIONS", (0.2,))
    _, (detection,) = run("detection", "--num_noises", "1")
    output, (_, *cleaned) = run("cleaning")
    kinds = len(study.LEFT_OUT_BY) + len(study.CORRECTED_BY)
    assert len(cleaned) == 3 + kinds
    accuracies = {}
    for row in cleaned:
        accuracies[row["labels"], row.get("by"), row.get("fraction")] = 100 * row["accuracy"]
    start = accuracies["corrupted", None, None]
    assert start == 100 * detection["accuracy"]
    accuracy = accuracies["left out", "aum", 0.2]
    line = f"| left out | aum | 20 % | {accuracy:.2f} % | {accuracy - start:.2f} | 1 |"
    assert line in output
    results = tmp_path / "results.jsonl"
    results.write_text(2 * results.read_text())  # two studies at the same time write each row twice
    assert line in run("cleaning")[0]


def test_each_fold_is_ranked_by_a_network_that_was_not_trained_on_it():
    """The fake network knows the true label of every other image."""
    judged = []

    def logits(seen, part):
        images = part.images.tolist()
        assert not seen & set(images) and len(seen) + len(part) == 60
        judged.extend(images)
        return 5 * nn.functional.one_hot(part.images % 10, 10).float()

    job = {"noise": "symmetric", "fraction": 0.2, "corruption_seed": 1, "seed": 2}
    found = study.cross_validation(FakeTrainer(numbers(60), logits), 5, job)["methods"]
    assert sorted(judged) == list(range(60))
    (found,) = found.values()
    assert found["auroc"] == 1 and found["recall_at_20"] == 1


# ---- The linear datamodeling score ---------------------------------------------------------------

# Three images, four models. Sums of the first query's scores (1, 2, 4): 3, 5, 6, 7.
MEMBERS = np.array([[1, 1, 0], [1, 0, 1], [0, 1, 1], [1, 1, 1]], bool)
SCORES = np.array([[1.0, 2.0, 4.0], [1.0, 2.0, 4.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])


def test_the_linear_datamodeling_score_by_hand():
    """Ranks 1 2 3 4 against 1 2 3 4: 1; against 1 3 2 4: 1 - 6 * 2 / 60 = 0.8; no prediction: 0.

    The last query's sums 2, 2, 2, 3 have ranks 2 2 2 4, its log-odds 4 3 2 1.
    Centred, these are -.5 -.5 -.5 1.5 and 1.5 .5 -.5 -1.5: -3 over the square root of 3 * 5.
    """
    first, second, constant, last = [1, 2, 4, 9], [1, 3, 2, 4], [1, 2, 3, 4], [4, 3, 2, 1]
    log_odds = np.array([first, second, constant, last], float).T / 10
    found = study.linear_datamodeling_scores(SCORES, MEMBERS, log_odds)
    assert found.tolist() == pytest.approx([1.0, 0.8, 0.0, -3 / 15**0.5])


def test_a_half_depends_on_its_index_alone():
    """Two halves of 2,000 images share 500 ± 11 images; a half contains 100 ± 7 of 200 images."""
    first, other, again = (set(study.half_of(2000, number).tolist()) for number in (0, 1, 0))
    _, is_corrupted = pipeline.corrupt_labels(torch.zeros(2000, dtype=torch.int64), 0.1, 10)
    corrupted = set(is_corrupted.nonzero().flatten().tolist())
    assert first == again and len(first) == len(other) == 1000
    assert 445 < len(first & other) < 555 and 65 < len(first & corrupted) < 135


def test_each_half_is_trained_again_with_another_seed(store):
    """The fake logits give log-odds of 2 and 0 after each training."""

    def logits(seen, queries):
        assert len(seen) == 4
        return torch.tensor([[3.0, 1.0], [2.0, 2.0]])

    data = image_data(torch.arange(8), torch.tensor([0, 1] * 4), ["a", "b"])
    trainer = FakeTrainer(data, logits)
    sizes = {"num_queries": 2, "halves": 3}
    for trainings in (1, 2, 2):
        members, log_odds = study.retrained(trainer, store, data, trainings=trainings, **sizes)
        assert log_odds.shape == (trainings, 3, 2) and (log_odds == [2, 0]).all()
        for number in range(3):
            half = study.half_of(8, number).tolist()
            assert members[number].nonzero()[0].tolist() == half
    first = study.FIRST_SEED
    assert trainer.seeds == [0, 1, 2, first, first + 1, first + 2]  # each half once for each seed


def test_log_odds_of_two_trainings_are_averaged(store, monkeypatch):
    """The correlation of ranks is 1 for the first query, and 0.5 for the second."""
    log_odds = np.array(
        [[[1.0, 5.0], [2.0, 7.0], [3.0, 6.0]], [[4.0, 1.0], [5.0, 2.0], [6.0, 3.0]]]
    )
    seen = []

    def scores(*parts):
        seen.append(parts)
        return np.array([0.5, 0.7])

    monkeypatch.setattr(study, "linear_datamodeling_scores", scores)
    monkeypatch.setattr(study, "retrained", lambda *_, **sizes: (MEMBERS[:3], log_odds))
    monkeypatch.setattr(study, "pairwise", lambda *_: {"scores": SCORES, "seconds": np.array(1)})
    sizes = {"num_queries": 2, "halves": 3, "trainings": 2}
    settings = study.Prediction(models=2)
    found = study.prediction(FakeTrainer(numbers(8), None), store, settings, **sizes)
    assert len(seen) == 2  # also by the final networks with all eigenvectors, which are the same
    for _, _, means in seen:
        assert means.tolist() == [[2.5, 3], [3.5, 4.5], [4.5, 4.5]]
    assert found["lds"] == pytest.approx(0.6) and found["agreement"] == pytest.approx(0.75)
    assert found["seconds_of_scores"] == 2 and found["gain"] == found["gain_error"] == 0


def test_halves_and_means_of_networks_predict_log_odds(run, monkeypatch, tmp_path):
    """Each network is scored once, even if several means contain it."""
    rows = [(1, "all"), (2, "all"), (1, "halves")]
    predictions = [study.Prediction("identity", 1e-8, *row) for row in rows]
    monkeypatch.setattr(study, "PREDICTIONS", predictions)
    output, found = run("retraining", "--halves", "3")
    assert [(row["models"], row["trained_on"]) for row in found] == rows
    assert all(-1 <= row["lds"] <= 1 for row in found)
    assert all(row["halves"] == 3 and row["num_queries"] == 3 for row in found)
    kept = [dict(np.load(path)) for path in tmp_path.glob("pairwise-*.npz")]
    assert [each["scores"].shape for each in kept] == [(3, 40)] * 3
    seconds = sum(row["seconds_of_scores"] for row in found[1:])
    assert seconds == pytest.approx(sum(each["seconds"] for each in kept))
    score = f"{found[1]['lds']:.3f} ± {found[1]['standard_error']:.3f}"
    assert f"| identity | 100 % | 1e-08 | 2 | all | 1 | {score} |" in output
    assert run("retraining", "--halves", "3")[1] == found
    assert run("retraining", "--halves", "4", "--seeds", "0")[1] == found


def small_network(num_classes):
    """A network whose eigendecompositions take no time."""
    pool = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    features = nn.Sequential(nn.Conv2d(3, 4, kernel_size=3, stride=4), pool)
    return nn.Sequential(OrderedDict(features=features, head=nn.Linear(16, num_classes)))


def test_truncated_scores_and_snapshots_predict_retraining_too(run, monkeypatch, tmp_path):
    """The networks of a training are trained once, and each is scored once by each fraction."""
    rows = [study.Prediction(), study.Prediction(eigenvector_fraction=0.05)]
    rows.append(study.Prediction(eigenvector_fraction=0.05, snapshots=3))
    monkeypatch.setattr(study, "PREDICTIONS", rows)
    monkeypatch.setitem(pipeline.MODELS, "resnet9", small_network)
    output, found = run("retraining", "--halves", "2", "--num_train_epochs", "4")
    (full, truncated, of_three) = found
    assert full["full_spearman"] == pytest.approx(1) and full["full_helpful"] == 10
    for row in (truncated, of_three):
        assert 0 < row["full_spearman"] < 0.9999 and 0 < row["full_helpful"] <= 10
        assert row["gain"] == pytest.approx(row["lds"] - full["lds"]) and row["gain_error"] > 0
    assert full["gain"] == full["gain_error"] == 0
    assert truncated["full_spearman"] != of_three["full_spearman"]
    assert len(list(tmp_path.glob("networks-*.npz"))) == 1
    assert len(list(tmp_path.glob("pairwise-*.npz"))) == 6  # three networks by two fractions
    agreement = f"{of_three['full_spearman']:.3f} | {of_three['full_helpful']:.1f}"
    assert "| ekfac | 5 % | 1e-06 | 1 | all | 3 |" in output and agreement in output


def test_a_kept_network_is_the_one_after_its_epoch(store):
    """The fake training keeps its epoch as the weight of the network."""

    class Counted(FakeTrainer):
        def train(self, data, seed):
            model = self.new_model(data)
            model.weight.data[:] = 5
            return model, None, {epoch: {"weight": torch.full((1, 1), epoch)} for epoch in (3, 4)}

        def new_model(self, data):
            return nn.Linear(1, 1, bias=False)

    trainer = Counted(numbers(8), None)
    for back, epoch in enumerate((5, 4, 3)):
        model = study.trained_model(trainer, store, trainer.clean, 7, back)
        assert model.weight.item() == epoch and not model.training
    with pytest.raises(pipeline.UserError, match="--num_train_epochs: a training keeps fewer"):
        study.trained_model(trainer, store, trainer.clean, 7, 3)


def test_shared_helpful_images_by_hand(monkeypatch):
    """The two arrays share image 4 for the first query, and images 0 and 1 for the second query."""
    monkeypatch.setattr(study, "NUM_HELPFUL", 2)
    scores = np.array([[0.0, 1.0, 2.0, 3.0, 4.0], [9.0, 8.0, -9.0, 0.0, 1.0]])
    others = np.array([[0.0, 1.0, 4.0, 2.0, 3.0], [2.0, 3.0, -1.0, -9.0, 0.0]])
    assert study.shared_helpful(scores, others) == (1 + 2) / 2


def test_a_scored_half_is_not_predicted(store, monkeypatch):
    """Halves 0 to 2 are predicted, so half 3 is scored."""
    scored = []

    def trained_model(trainer, store, data, seed, back):
        scored.append((seed, data.images.flatten().tolist()))
        raise InterruptedError

    monkeypatch.setattr(study, "trained_model", trained_model)
    settings = study.Prediction(trained_on="halves")
    sizes = {"num_queries": 2, "halves": 3, "trainings": 1}
    with pytest.raises(InterruptedError):
        study.prediction(FakeTrainer(numbers(8), None), store, settings, **sizes)
    assert scored == [(3, study.half_of(8, 3).tolist())]


def test_scores_with_the_factors_of_all_images_agree_fully(run, monkeypatch):
    monkeypatch.setattr(study, "FACTOR_EXAMPLES", (50, 20))
    output, (full, other, half) = run("factors", "--halves", "2")
    assert full["pairwise_spearman"] == full["self_spearman"] == pytest.approx(1)
    assert all(0 < row["self_spearman"] < 1 and -1 <= row["lds"] <= 1 for row in (other, half))
    assert (other["examples"], half["examples"]) == ("all", 20)
    assert other["pseudo_label_seed"] != half["pseudo_label_seed"] == full["pseudo_label_seed"]
    assert f"| 20 | {half['pairwise_spearman']:.4f} | {half['self_spearman']:.5f} |" in output


def test_a_wrong_flag_ends_in_one_sentence(run, capsys):
    with pytest.raises(pipeline.UserError, match="--train_batch_size 41: there are only 40 images"):
        run("detection", "--train_batch_size", "41")
    with pytest.raises(pipeline.UserError, match="--halves: 1 networks have no order to predict"):
        run("retraining", "--halves", "1")
    with pytest.raises(SystemExit, match="2"):
        run("detection", "--folds", "1")
    assert "argument --folds" in capsys.readouterr().err
