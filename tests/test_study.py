"""The studies on forty digits: what they train on, what they write, and that a stopped one goes on."""

import json
from types import SimpleNamespace

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
        recipe = ("--num_train_examples", "40", "--train_batch_size", "10", "--num_train_epochs", "1")
        more = ("--learning_rate", "0.05", "--num_query_examples", "3", "--seeds", "1", "--corruption_seeds", "1")
        monkeypatch.setattr("sys.argv", ["study.py", name, "--folder", str(tmp_path), *recipe, *more, *flags])
        study.main()
        lines = (tmp_path / "results.jsonl").read_text().splitlines()
        return capsys.readouterr().out, [json.loads(line) for line in lines]

    return call


def test_similar_noise_flips_each_class_to_its_partner():
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    labels = torch.arange(10).repeat(10)
    data = study.wrong_labels(image_data(torch.zeros(100, 3, 32, 32), labels, names), "similar", 0.3, seed=1)
    pairs = zip(labels[data.is_corrupted].tolist(), data.labels[data.is_corrupted].tolist(), strict=True)
    flips = {(names[a], names[b]) for a, b in pairs}
    assert data.is_corrupted.sum() == 30 and flips <= set(study.SIMILAR.items()) and len(flips) > 5


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
    found = {(row["labels"], row.get("by"), row.get("fraction")): 100 * row["accuracy"] for row in cleaned}
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

    fake = SimpleNamespace(clean=clean, logits=logits, train=lambda data, seed: (set(data.images.tolist()), None))
    (found,) = study.Study.cross_validation(fake, 5, "uniform", 0.2, 1, seed=2)["methods"].values()
    assert sorted(judged) == list(range(60)) and found["auroc"] == 1 and found["found_at_20"] == 1


def test_factors_of_all_images_agree_with_themselves(run, monkeypatch):
    monkeypatch.setattr(study, "FACTOR_PERCENTS", (100, 50))
    _, (full, other, half) = run("factors")
    assert full["pairwise_spearman"] == full["self_influence_spearman"] == pytest.approx(1)
    assert all(0 < row["self_influence_spearman"] < 1 for row in (other, half))
    assert other["pseudo_label_seed"] != half["pseudo_label_seed"] == full["pseudo_label_seed"]


def test_mistakes_end_in_one_sentence(run, capsys):
    with pytest.raises(pipeline.UserError, match="--train_batch_size: there are only 40 images"):
        run("detection", "--train_batch_size", "41")
    with pytest.raises(SystemExit, match="2"):
        run("detection", "--folds", "1")
    assert "argument --folds" in capsys.readouterr().err
