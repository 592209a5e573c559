"""How far scores move with the precision they are computed in, against float64, and with the pseudo-labels' seed.

Takes the checkpoint that the README's first command leaves behind, and prints a table of README.md beside this file.
Exit status 1 where it breaks what is promised there:

    python tests/studies/precision.py --num_train_examples 1000
"""

import argparse
import contextlib
import io
import sys
import tempfile
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import detect_mislabeled_dataset as detect
import pipeline

PROMISED = {  # Spearman per query (mean) and of self-influence, at least; found at 10 % differs by half a point at most
    "fp32 against float64": (0.9999, 0.9999),
    "bf16 against float64": (0.995, 0.999),
}


def spearman(a, b):
    """Returns the rank correlation of two arrays [N]; equal values share their mean rank."""
    return float(np.corrcoef(detect.ranks(a), detect.ranks(b))[0, 1])


class Float64Data(pipeline.ImageData):
    """Images whose network computes in float64."""

    def normalize(self, images):
        return super().normalize(images).double()


def in_float64(data):
    """Returns the same images for a network that computes in float64."""
    return Float64Data(**{field.name: getattr(data, field.name) for field in fields(data)})


def compute_scores(load_model, data, queries, strategy, dtype, seed, batch_size):
    """Returns self-influence [N] and pairwise scores [Q, N] as float64 arrays, computed in `dtype`."""
    model = load_model()
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(io.StringIO()),
    ):
        if dtype == torch.float64:
            model = model.double()
            data, queries = map(in_float64, (data, queries))
        settings = {
            "strategy": strategy,
            "dtype": dtype,
            "seed": seed,
            "batch_size": batch_size,
            "seconds": {},
        }
        run = pipeline.InfluenceRun(model, data, Path(folder) / "model", **settings)
        self_influence, _ = run.self_influence(1e-8)
        pairwise, _ = run.pairwise_influence(queries, len(queries), 1e-8)
    return self_influence.double().numpy(), pairwise.double().numpy()


def compare(scores, reference, is_corrupted):
    """Returns how well `scores` agree with `reference`, each a pair as from compute_scores."""
    per_query = [
        spearman(row, expected) for row, expected in zip(scores[1], reference[1], strict=True)
    ]
    found = [
        detect.evaluate_ranking(pair[0], is_corrupted)["recall_at_10"]
        for pair in (scores, reference)
    ]
    return {
        "per_query_spearman_mean": float(np.mean(per_query)),
        "per_query_spearman_least": min(per_query),
        "self_influence_spearman": spearman(scores[0], reference[0]),
        "recall_at_10": found[0],
        "recall_at_10_difference": found[0] - found[1],
    }


def precision_table(load_model, data, queries, strategy="ekfac", batch_size=64):
    """Returns the comparisons by name: fp32 and bf16 with float64, fp32 with fp32 under another seed.

    load_model: called for a new copy of the model each time, because one is made float64.
    """

    def scores(dtype, seed=1004):
        return compute_scores(load_model, data, queries, strategy, dtype, seed, batch_size)

    is_corrupted = data.is_corrupted.numpy()
    exact, single = scores(torch.float64), scores(torch.float32)
    return {
        "fp32 against float64": compare(single, exact, is_corrupted),
        "bf16 against float64": compare(scores(torch.bfloat16), exact, is_corrupted),
        "fp32, another --seed, against fp32": compare(
            scores(torch.float32, seed=1005), single, is_corrupted
        ),
    }


def broken_promises(table):
    """Returns the names of the comparisons in a table that fall below what is promised."""
    return [
        name
        for name, (per_query, self_influence) in PROMISED.items()
        if not (
            table[name]["per_query_spearman_mean"] >= per_query
            and table[name]["self_influence_spearman"] >= self_influence
            and abs(table[name]["recall_at_10_difference"]) <= 0.005
        )
    ]


def main():
    """Parses, loads, computes, prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--checkpoint_dir", default="./checkpoints", help="where the README's first command left it"
    )
    parser.add_argument(
        "--num_train_examples", type=int, required=True, help="as in the README's first command"
    )
    parser.add_argument(
        "--num_scored_examples",
        type=int,
        default=300,
        help="fit and score the first so many of them",
    )
    parser.add_argument("--num_query_examples", type=int, default=50)
    args = parser.parse_args()
    checkpoint = pipeline.checkpoint_path(args.checkpoint_dir, 0.1)
    clean = pipeline.load_data("synthetic", "", "train", args.num_train_examples)
    _, _, data = pipeline.load_trained(checkpoint, "cpu", clean, model_name="resnet9", fraction=0.1)
    queries = pipeline.load_data("synthetic", "", "test").take(
        torch.arange(args.num_query_examples)
    )
    scored = data.take(torch.arange(min(args.num_scored_examples, len(data))))

    def load_model():
        return pipeline.load_checkpoint(checkpoint)[0]

    table = precision_table(load_model, scored, queries)
    print(
        "| | per-query Spearman, mean (least) | self-influence Spearman | found at 10 % | difference |"
    )
    print("|---|---|---|---|---|")
    for name, row in table.items():
        print(
            f"| {name} | {row['per_query_spearman_mean']:.5f} ({row['per_query_spearman_least']:.5f}) | "
            f"{row['self_influence_spearman']:.5f} | {100 * row['recall_at_10']:.1f} % | "
            f"{100 * row['recall_at_10_difference']:+.1f} points |"
        )
    if broken := broken_promises(table):
        sys.exit(f"Further off than promised: {', '.join(broken)}")


if __name__ == "__main__":
    pipeline.run(main)
