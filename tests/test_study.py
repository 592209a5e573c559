"""The studies on forty digits: what they train on, what they write, and that a stopped one goes on."""

import json
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import study
import torch
from conftest import image_data

import detect_mislabeled_dataset as detect
import pipeline


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Runs a study in a folder of its own. Returns what it printed and the rows of its results."""

    def call(name, *flags):
        recipe = (
            "--num_train_examples",
            "40",
            "--train_batch_size",
            "10",
            "--num_train_epochs",
            "1",
        )
        more = (
            "--learning_rate",
            "0.05",
            "--num_query_examples",
            "3",
            "--seeds",
            "1",
            "--corruption_seeds",
            "1",
        )
        monkeypatch.setattr(
            "sys.argv", ["study.py", name, "--folder", str(tmp_path), *recipe, *more, *flags]
        )
        study.main()
        lines = (tmp_path / "results.jsonl").read_text().splitlines()
        return capsys.readouterr().out, [json.loads(line) for line in lines]

    return call


def test_similar_noise_flips_each_class_to_its_partner():
    names = [
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    ]
    true = [name for name in names for _ in range(10)]
    data = image_data(torch.zeros(100, 3, 32, 32), torch.arange(10).repeat_interleave(10), names)
    labels = study.similar_labels(data)
    flips = [pair for pair in zip(true, labels, strict=True) if pair[0] != pair[1]]
    assert len(flips) == 20 and set(flips) <= set(study.SIMILAR.items()) and len(set(flips)) > 5


def test_detection_and_cleaning_go_on_where_they_were(run, tmp_path):
    """The second time nothing is computed; the cleaning takes its rankings from the detection's scores."""
    flags = ("--num_noises", "1", "--folds", "2")
    output, rows = run("detection", *flags)
    assert [row["study"] for row in rows] == ["detection", "cross_validation"]
    assert rows[0]["methods"].keys() == {*detect.RANKINGS, "self_influence, heuristic"}
    assert "| aum |" in output
    assert rows[1]["methods"].keys() == {"2-fold cross-validation"}
    assert all(0 <= found["auroc"] <= 1 for row in rows for found in row["methods"].values())
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write('{"study": "detec')  # stopped there
    assert run("detection", *flags)[1] == rows
    output, cleaned = run("cleaning")
    cleaned = cleaned[2:]
    assert len(cleaned) == 3 + len(study.FRACTIONS) * (len(study.RANKINGS) + 3)
    found = {
        (row["labels"], row.get("by"), row.get("fraction")): 100 * row["accuracy"]
        for row in cleaned
    }
    assert found["corrupted", None, None] == 100 * rows[0]["accuracy"]
    accuracy = found["left out", "aum", 0.2]
    gain = accuracy - found["corrupted", None, None]
    line = f"| left out | aum | 20 % | {accuracy:.2f} % | {gain:.2f} | 1 |"
    assert line in output
    results = tmp_path / "results.jsonl"
    results.write_text(2 * results.read_text())  # as two that ran the same at once would leave it
    assert line in run("cleaning")[0]


def test_a_fold_is_judged_by_a_network_that_never_saw_it():
    """The network here is the set of images it was trained on; asked about another one, it knows the true label."""
    clean = image_data(torch.arange(60), torch.arange(60) % 10, list(range(10)))
    judged = []

    def logits(seen, part):
        assert not seen & set(part.images.tolist()) and len(seen) + len(part) == 60
        judged.extend(part.images.tolist())
        return 5 * torch.nn.functional.one_hot(part.images % 10, 10).float()

    fake = SimpleNamespace(
        clean=clean, logits=logits, train=lambda data, seed: (set(data.images.tolist()), None)
    )
    (found,) = study.Study.cross_validation(fake, 5, "uniform", 0.2, 1, seed=2)["methods"].values()
    assert sorted(judged) == list(range(60)) and found["auroc"] == 1 and found["recall_at_20"] == 1


# ---- The linear datamodeling score ---------------------------------------------------------------

# Three images, four models. Sums of the first query's scores (1, 2, 4): 3, 5, 6, 7.
TRAINED_ON = np.array([[1, 1, 0], [1, 0, 1], [0, 1, 1], [1, 1, 1]], bool)
SCORES = torch.tensor([[1.0, 2.0, 4.0], [1.0, 2.0, 4.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])


def test_the_linear_datamodeling_score_by_hand():
    """Ranks 1 2 3 4 against 1 2 3 4: 1; against 1 3 2 4: 1 - 6 * 2 / 60 = 0.8; no prediction: 0.

    The last query's sums 2, 2, 2, 3 have ranks 2 2 2 4, its margins 4 3 2 1: centred -.5 -.5 -.5 1.5 and 1.5 .5 -.5
    -1.5, whose product sums to -3, over the square root of 3 * 5.
    """
    margins = np.array(
        [[0.1, 0.1, 1.0, 4.0], [0.2, 0.3, 2.0, 3.0], [0.4, 0.2, 3.0, 2.0], [9.0, 0.4, 4.0, 1.0]]
    )
    found = study.linear_datamodeling_scores(SCORES, TRAINED_ON, margins)
    assert found.tolist() == pytest.approx([1.0, 0.8, 0.0, -3 / 15**0.5])


def test_halves_follow_their_number_and_nothing_else(monkeypatch):
    """Halves of 2,000 share 500 give or take 11 with another half, and 100 give or take 7 with a tenth of them."""
    data = image_data(torch.zeros(2000, 1), torch.zeros(2000, dtype=torch.int64), ["a", "b"])
    fake = SimpleNamespace(
        train=lambda part, seed: (part, None),
        logits=lambda part, queries: torch.tensor([[1.0, 3.0], [2.0, 2.0]]) * len(part) / 1000,
    )
    found = [
        study.Study.half(fake, data, data.take(torch.arange(2)), number, 7) for number in (0, 1, 0)
    ]
    first, other, again = (half["trained_on"] for half in found)
    wrong = pipeline.corrupt_labels(data.labels, 0.1, 10)[1].numpy()
    assert first.sum() == other.sum() == 1000 and np.array_equal(first, again)
    assert 445 < (first & other).sum() < 555 and 65 < (first & wrong).sum() < 135
    assert found[0]["margins"].tolist() == [-2, 0]


def test_each_half_is_trained_again_with_another_seed(tmp_path):
    """A training here makes the margins 10 x its seed + (0, 1, 2) for three queries; what is there is kept."""
    made = []

    def half(data, queries, number, seed):
        made.append((number, seed))
        return {
            "trained_on": np.arange(4) == number,
            "margins": 10 * seed + np.arange(3, dtype=np.float32),
        }

    fake = SimpleNamespace(folder=tmp_path, asked={}, half=half)
    fake.kept = partial(study.Study.kept, fake)
    data = image_data(torch.zeros(4, 1), torch.zeros(4, dtype=torch.int64), ["a"])
    for trainings in (1, 2, 2):
        chosen, margins = study.Study.retrained(fake, data, data, 2, trainings)
        assert chosen.tolist() == [[1, 0, 0, 0], [0, 1, 0, 0]] and margins.shape == (
            trainings,
            2,
            3,
        )
    seeds = np.array([[0, 1], [study.FIRST_SEED, study.FIRST_SEED + 1]])
    assert np.array_equal(margins, 10 * seeds[..., None] + np.arange(3))
    assert made == [(0, 0), (1, 1), (0, study.FIRST_SEED), (1, study.FIRST_SEED + 1)]


def test_predictions_of_halves_and_of_a_mean_of_networks(run, monkeypatch, tmp_path):
    """A network is scored once, for all means that it is part of, and the mean's seconds are those of its networks."""
    rows = [
        ("identity", 1e-8, 1, "all"),
        ("identity", 1e-8, 2, "all"),
        ("identity", 1e-8, 1, "halves"),
    ]
    monkeypatch.setattr(study, "PREDICTIONS", rows)
    half_of, numbers = study.half_of, []
    monkeypatch.setattr(
        study, "half_of", lambda data, number: numbers.append(number) or half_of(data, number)
    )
    output, found = run("retraining", "--halves", "3")
    assert [(row["models"], row["trained_on"]) for row in found] == [
        (1, "all"),
        (2, "all"),
        (1, "halves"),
    ]
    assert all(
        -1 <= row["lds"] <= 1 and row["halves"] == 3 and row["num_queries"] == 3 for row in found
    )
    assert sorted(numbers) == [0, 1, 2, 3]  # the last is scored and not predicted
    kept = [dict(np.load(path)) for path in tmp_path.glob("pairwise-*.npz")]
    assert [each["scores"].shape for each in kept] == [(3, 40)] * 3
    seconds = sum(row["score_seconds"] for row in found[1:])
    assert seconds == pytest.approx(sum(each["seconds"] for each in kept))
    assert (
        f"| identity | 1e-08 | 2 | all | {found[1]['lds']:.3f} ± {found[1]['standard_error']:.3f} |"
        in output
    )
    assert (
        run("retraining", "--halves", "3")[1]
        == run("retraining", "--halves", "4", "--seeds", "0")[1]
        == found
    )

    # Trained twice, the mean margin is predicted.
    seen = []
    monkeypatch.setattr(
        study,
        "linear_datamodeling_scores",
        lambda *parts: seen.append(parts) or np.array([0.5, 0.7]),
    )
    margins = np.array([[[1.0, 5.0], [2.0, 7.0], [3.0, 6.0]], [[4.0, 1.0], [5.0, 2.0], [6.0, 3.0]]])
    monkeypatch.setattr(study.Study, "retrained", lambda *sizes: (TRAINED_ON[:3], margins))
    output, found = run(
        "retraining", "--halves", "3", "--trainings", "2", "--num_query_examples", "2"
    )
    assert seen[-1][2].tolist() == [[2.5, 3], [3.5, 4.5], [4.5, 4.5]] and found[-1][
        "lds"
    ] == pytest.approx(0.6)
    assert found[-1]["agreement"] == pytest.approx(
        (1 + 0.5) / 2
    )  # ranks 1 2 3 twice, and 1 3 2 beside 1 2 3
    assert "Two trainings of a half agree by 0.750." in output


def test_factors_of_all_images_agree_with_themselves(run, monkeypatch):
    monkeypatch.setattr(study, "FACTOR_EXAMPLES", (50, 20))
    _, (full, other, half) = run("factors", "--halves", "2")
    assert full["pairwise_spearman"] == full["self_spearman"] == pytest.approx(1)
    assert all(0 < row["self_spearman"] < 1 and -1 <= row["lds"] <= 1 for row in (other, half))
    assert (other["examples"], half["examples"]) == (None, 20)
    assert other["pseudo_label_seed"] != half["pseudo_label_seed"] == full["pseudo_label_seed"]


def test_mistakes_end_in_one_sentence(run, capsys):
    with pytest.raises(pipeline.UserError, match="--train_batch_size: there are only 40 images"):
        run("detection", "--train_batch_size", "41")
    with pytest.raises(SystemExit, match="2"):
        run("detection", "--folds", "1")
    assert "argument --folds" in capsys.readouterr().err
