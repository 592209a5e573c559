"""What cleaning the training labels is worth: test accuracy with the suspects left out, or given their true labels.

For every seed: trains on the true labels, on labels of which a part is wrong, and on what is left of those without
the top 10, 15 and 20 % of the ranking by self-influence, by loss, and of a random one; and with the wrong labels
among the top of the first ranking put right, as a person would who looks at them. Every result is a line in a file;
a study that was stopped goes on where it was, and a table of what is there ends each run:

    python tests/study.py --dataset imagefolder --dataset_dir DIR --num_train_examples 10000 --train_batch_size 128
"""

import argparse
import csv
import json
import statistics
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmark import call

import pipeline

ROOT = Path(pipeline.__file__).parent
FRACTIONS = (0.1, 0.15, 0.2)
RANKINGS = ("self_influence", "loss", "random")
RECIPE = ("train_batch_size", "num_train_epochs", "learning_rate", "weight_decay")
ASKED = ("dataset", "num_train_examples", "corrupt_percentage", *RECIPE)  # what a result depends on


def jobs(seeds):
    """Returns every training of the study, by what is done about the wrong labels, by which ranking, how far down."""
    for seed in seeds:
        yield {"seed": seed, "labels": "true"}
        yield {"seed": seed, "labels": "corrupted"}
        for fraction in FRACTIONS:
            for by in RANKINGS:
                yield {"seed": seed, "labels": "left out", "by": by, "fraction": fraction}
            yield {"seed": seed, "labels": "put right", "by": "self_influence", "fraction": fraction}


def run_job(job, data_flags, recipe, fraction, true_names, folder):
    """Trains as `job` says, after what it needs. Returns the test accuracy, from 0 to 1.

    true_names: the name of the true class of every training image.
    """
    corrupted = ("--corrupt_percentage", fraction)
    model, results = folder / f"seed{job['seed']}", folder / f"results{job['seed']}"
    flags = [*data_flags, *recipe, "--seed", job["seed"], "--output_dir", results]
    if job["labels"] == "true":
        return train(model, flags)
    if job["labels"] == "corrupted":
        return train(model, [*flags, *corrupted])
    if not pipeline.checkpoint_path(model, fraction).exists():
        train(model, [*flags, *corrupted])
    if not list(results.glob("*/suspects_ekfac.csv")):
        call(
            *(ROOT / "detect_mislabeled_dataset.py", *data_flags, *corrupted),
            *("--checkpoint_dir", model, "--output_dir", results),
        )
    table = folder / "decided.csv"
    write_decisions(table, next(results.glob("*/suspects_ekfac.csv")), job, true_names)
    if job["labels"] == "left out":
        decision = ("--exclude_suspects", table, "--exclude_fraction", job["fraction"])
    else:
        decision = ("--corrections", table)
    return train(folder / "cleaned", [*flags, *corrupted, *decision])


def train(checkpoint_dir, flags):
    """Runs train.py. Returns the test accuracy."""
    call(ROOT / "train.py", *flags, "--checkpoint_dir", checkpoint_dir)
    newest = max(Path(checkpoint_dir).glob("*.pth"), key=lambda path: path.stat().st_mtime)
    return torch.load(newest, weights_only=True)["metadata"]["accuracy"]["test"]


def write_decisions(path, suspects_csv, job, true_names):
    """Writes the table that train.py is given: the ranking by `job["by"]`, or the true labels of its top."""
    with suspects_csv.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if job["by"] == "random":
        scores = np.random.default_rng(job["seed"]).random(len(rows))
    else:
        scores = np.array([float(row[job["by"]]) for row in rows])
    order = np.argsort(-scores, kind="stable")
    ranking = [rows[i] | {"rank": rank} for rank, i in enumerate(order, start=1)]
    if job["labels"] == "put right":
        top = ranking[: round(job["fraction"] * len(ranking))]
        ranking = [row | {"new_label": true_names[int(row["index"])]} for row in top if row["is_corrupted"] == "1"]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(ranking[0]))
        writer.writeheader()
        writer.writerows(ranking)


def print_table(rows):
    """Prints mean and standard deviation of the test accuracy over the seeds that are there, in Markdown."""
    groups = {}
    for row in rows:
        groups.setdefault((row["labels"], row.get("by"), row.get("fraction")), []).append(100 * row["accuracy"])
    print("| labels | ranked by | top | test accuracy | seeds |\n|---|---|---|---|---|")
    for (labels, by, fraction), values in groups.items():
        top = f"{100 * fraction:.0f} %" if fraction else ""
        spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        print(f"| {labels} | {by or ''} | {top} | {statistics.mean(values):.2f} %{spread} | {len(values)} |")


def main():
    """Parses, runs what is not there yet, prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flag = parser.add_argument
    flag("--dataset", default="synthetic")
    flag("--dataset_dir", default="./data")
    flag("--num_train_examples", type=int, default=1500)
    flag("--corrupt_percentage", type=float, default=0.1)
    flag("--train_batch_size", type=int, default=32)
    flag("--num_train_epochs", type=int, default=25)
    flag("--learning_rate", type=float, default=0.4)
    flag("--weight_decay", type=float, default=1e-4)
    flag("--seeds", type=int, default=3)
    flag("--folder", type=Path, default=Path("study"), help="keeps the models and rankings, and results.jsonl")
    args = parser.parse_args()

    def flags(*names):
        return [text for name in names for text in (f"--{name}", getattr(args, name))]

    data_flags = flags("dataset", "dataset_dir", "num_train_examples")
    recipe = flags(*RECIPE)
    asked = {name: getattr(args, name) for name in ASKED}
    args.folder.mkdir(parents=True, exist_ok=True)
    results = args.folder / "results.jsonl"
    rows = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    rows = [row for row in rows if asked.items() <= row.items()]
    clean = pipeline.load_train_data(args.dataset, args.dataset_dir, args.num_train_examples, args.folder)
    true_names = [clean.class_names[label] for label in clean.labels]
    for job in jobs(range(args.seeds)):
        if any(job.items() <= row.items() for row in rows):
            continue
        accuracy = run_job(job, data_flags, recipe, args.corrupt_percentage, true_names, args.folder)
        rows.append(job | {"accuracy": accuracy} | asked)
        with results.open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
        print(rows[-1], flush=True)
    print_table(rows)


if __name__ == "__main__":
    main()
