"""Ranks the training images so that mislabeled ones come first.

A mislabeled image is one the network has to memorise: the margin of its label grows late in the training, its nearest
neighbours have another label, and in the end it has a large influence on its own loss. The script writes the ranking
and a contact sheet of its top. Where labels were corrupted on purpose, it also says how many each ranking finds.
"""

import csv
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import pipeline
import train

NUM_PICTURED = 100
# Chosen among 50,000 images, and tried among 500; see tests/studies/README.md.
VOTE_SHARE, NEIGHBOURS_OF_50_000 = 0.75, 300


class Ranking(NamedTuple):
    """What suspects can be ranked by: what pictures call it, colour and line of its curve, and the signal.

    suspicion: function of a dictionary of float arrays [N], as of `measure`; highest for the most suspicious.
    """

    caption: str
    colour: str
    line: str
    uses_curvature: bool
    suspicion: Callable


RANKINGS = {
    "self_influence": Ranking("self-influence", "#0b5394", "-", True, lambda found: found["self_influence"]),
    "aum": Ranking("area under the margin", "#d55e00", "--", False, lambda found: -found["aum"]),
    "loss": Ranking("loss", "#e69f00", ":", False, lambda found: found["loss"]),
    "margin": Ranking("margin", "#cc79a7", "-.", False, lambda found: -found["margin"]),
    "vote": Ranking("neighbours' vote", "#009e73", "--", False, lambda found: -found["vote"]),
    "aum_vote": Ranking(
        f"area under the margin + {VOTE_SHARE} neighbours' vote",
        *("#7b3294", "-", False),
        lambda found: -standardise(found["aum"]) - VOTE_SHARE * standardise(found["vote"]),
    ),
}
DEFAULT = "aum_vote"
COLUMNS = ["rank", "index", "path", "label", "predicted_label", *RANKINGS, "is_corrupted"]


def parse_arguments():
    """Reads the command line."""
    parser = pipeline.influence_parser(__doc__.splitlines()[0], corrupt_default=0.1, factor_examples=1000)
    meanings = "; ".join(f"{name}: {ranking.caption}" for name, ranking in RANKINGS.items())
    parser.add_argument("--method", choices=RANKINGS, default=DEFAULT, help=f"{meanings} (default: %(default)s)")
    return parser.parse_args()


# ---- Rankings and what they find -----------------------------------------------------------------


def measure(run, metadata, damping_factor):
    """Returns what rankings are made of, float32 arrays [N] by name; logits, [N, num_classes]; and the scores' file.

    These are the self-influence of each training image, its area under the margin, its loss and margin by the finished
    network, and its neighbours' vote. The area is the mean over the epochs of the margin in the training batch, or of
    images that were in none the margin in the end.
    """
    self_influence, path = run.self_influence(damping_factor)
    with pipeline.timed(run.seconds, "report"):
        labels, margins = run.data.labels, metadata["margins"].float()
        features, logits = compute_features(run)
        margin = pipeline.margin(logits, labels, torch.amax).cpu()
        found = {
            "self_influence": self_influence,
            "aum": torch.where(margins.isnan().all(0), margin, margins.nanmean(0)),
            "margin": margin,
            "loss": F.cross_entropy(logits, labels, reduction="none"),
            "vote": neighbours_vote(features, labels, logits.shape[1]),
        }
        return {name: values.cpu().numpy() for name, values in found.items()}, logits.cpu(), path


@torch.no_grad()
def compute_features(run):
    """Returns what the last layer sees of each training image, float32 [N, 128], of length one, and logits, [N, C].

    The features are the mean of those of an image and of its mirror image.
    """
    run.model.eval()
    features, logits = [], []
    with torch.autocast(run.data.images.device.type, run.dtype, enabled=run.dtype != torch.float32):
        for batch in tqdm(run.data.images.split(run.batch_size), "Features", leave=False):
            images = pipeline.normalize(batch)
            features.append(run.model.features(images))
            logits.append(run.model.logits(features[-1]))
            features[-1] = features[-1].float() + run.model.features(images.flip(3)).float()
    return F.normalize(torch.cat(features), dim=1), torch.cat(logits)


def neighbours_vote(features, labels, num_classes):
    """Returns the share of an image's nearest neighbours that have its label, less the largest of another label, [N].

    features: float32 [N, D] of length one; labels: int64 [N]. They are 300 of 50,000 images, and of fewer in proportion
    to the square root.
    """
    count = max(1, min(len(features) - 1, round(NEIGHBOURS_OF_50_000 * (len(features) / 50_000) ** 0.5)))
    found = []
    for rows in tqdm(torch.arange(len(features), device=features.device).split(1024), "Neighbours", leave=False):
        similarity = (features[rows] @ features.T).scatter_(1, rows[:, None], -torch.inf)  # not of itself
        votes = labels[similarity.topk(count, dim=1, sorted=False).indices]  # (B, count)
        counts = features.new_zeros(len(rows), num_classes).scatter_add_(1, votes, features.new_ones(votes.shape))
        found.append(pipeline.margin(counts / count, labels[rows], torch.amax))
    return torch.cat(found)


def standardise(values):
    """Returns values [N] with a mean of zero and a standard deviation of one, or zeros where all are equal."""
    return (values - values.mean()) / (values.std() or 1)


def rank(measured):
    """Returns what each ranking orders the images by, the most suspicious highest: float arrays [N] by name.

    measured: dictionaries as of `measure`, one a model, of which the mean is taken.
    """
    mean = {name: sum(found[name] for found in measured) / len(measured) for name in measured[0]}
    return {name: ranking.suspicion(mean) for name, ranking in RANKINGS.items()}


def detection_curve(scores, is_corrupted):
    """Returns, at every 1 % of the images inspected in order of falling score, the fraction of corrupted ones found.

    scores: float [N]; is_corrupted: bool [N], at least one true. Equal scores are inspected in order of index.
    """
    found = np.cumsum(is_corrupted[np.argsort(-scores, kind="stable")]) / is_corrupted.sum()
    found = np.concatenate([[0.0], found])  # after inspecting 0, 1, ..., N images
    return [{"inspected": p / 100, "found": float(found[round(p / 100 * len(scores))])} for p in range(1, 101)]


def ranks(scores):
    """Returns the place of each score [N] among the N, 1 for the lowest; equal scores share the mean of theirs."""
    _, group, sizes = np.unique(scores, return_inverse=True, return_counts=True)
    return (np.cumsum(sizes) - (sizes - 1) / 2)[group]


def auroc(scores, is_corrupted):
    """Returns the probability that a random corrupted image scores above a random clean one, ties counting half.

    scores: float [N]; is_corrupted: bool [N], both kinds present.
    """
    positives = is_corrupted.sum()
    above = ranks(scores)[is_corrupted].sum() - positives * (positives + 1) / 2  # the Mann-Whitney U statistic
    return float(above / (positives * (len(scores) - positives)))


def average_precision(scores, is_corrupted):
    """Returns the mean, over the corrupted images, of the precision down to each one's place in the ranking.

    scores: float [N]; is_corrupted: bool [N], at least one true. Equal scores are ranked in order of index.
    """
    hits = is_corrupted[np.argsort(-scores, kind="stable")]
    precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
    return float(precision[hits].mean())


def evaluate_ranking(scores, is_corrupted):
    """Returns the json entry of one ranking: curve, found_at_10, found_at_20, auroc, average_precision."""
    curve = detection_curve(scores, is_corrupted)
    return {
        "curve": curve,
        "found_at_10": curve[9]["found"],
        "found_at_20": curve[19]["found"],
        "auroc": auroc(scores, is_corrupted),
        "average_precision": average_precision(scores, is_corrupted),
    }


# ---- Report --------------------------------------------------------------------------------------


def require_unedited(path):
    """Raises UserError where a ranking that would be replaced has columns of a person's own, such as new_label."""
    if path.exists():
        with path.open(newline="", encoding="utf-8", errors="replace") as file:
            columns = next(csv.reader(file), [])
        if columns != COLUMNS:
            reason = "has other columns than this script writes, and would be replaced"
            raise pipeline.UserError(f"{path} {reason}: move it, or name another --output_dir")


def write_suspects(path, data, order, scores, predicted):
    """Writes every training image to a csv file, in the given order. scores: arrays [N] by ranking."""
    names, paths = np.array(data.class_names, object), np.array(data.paths, object)
    examples = [data.indices.numpy(), paths, names[data.labels.numpy()], names[predicted.numpy()]]
    examples, is_corrupted = [column[order].tolist() for column in examples], data.is_corrupted.numpy()[order]
    rankings = [scores[name][order] for name in RANKINGS]  # float32, of which few digits are written
    rows = zip(range(1, len(data) + 1), *examples, *rankings, is_corrupted.astype(int).tolist(), strict=True)
    pipeline.write_table(path, COLUMNS, rows)


def plot_suspects(path, data, order, scores, predicted, by):
    """Draws the most suspicious images as a contact sheet, each under given label, predicted label and score.

    The title says what they are ranked `by`.
    """
    shown = order[:NUM_PICTURED].tolist()
    labels = [(data.labels[position], predicted[position]) for position in shown]
    texts = [
        " →\n".join(pipeline.shorten(data.class_names[label]) for label in pair) + f"\n{scores[position]:.3g}"
        for pair, position in zip(labels, shown, strict=True)
    ]
    colours = ["firebrick" if given != guess else "black" for given, guess in labels]
    title = (
        f"The {len(shown)} most suspicious of {len(data)} training images by {by}:\n"
        "given label → predicted label (red where they differ), score"
    )
    pipeline.draw_sheet(path, data.images[shown], texts, colours, 10, title)


def plot_curves(path, results, method, fraction, strategy):
    """Draws what part of the corrupted labels is found against the part of the images inspected.

    The published ranking, the default, the loss and the `method` are drawn in full strength.
    """
    from matplotlib.ticker import PercentFormatter

    end = min(1, max(0.2, 3 * fraction))
    with pipeline.picture(path, 6.4, 6.2) as figure:
        axes = figure.add_subplot(xlim=(0, end), ylim=(0, 1.02))
        for name, found in results.items():
            ranking, strong = RANKINGS[name], name in ("self_influence", DEFAULT, "loss", method)
            label = f"{ranking.caption}: {100 * found['found_at_10']:.1f} % at 10 %, AUROC {found['auroc']:.3f}"
            points = [(0, 0), *((point["inspected"], point["found"]) for point in found["curve"])]
            style = {"linestyle": ranking.line, "color": ranking.colour, "linewidth": 2.2 if strong else 0.8}
            axes.plot(*zip(*points, strict=True), **style, label=label)
        axes.plot([0, fraction, 1], [0, 1, 1], ":", color="black", linewidth=1.5, label="perfect")
        axes.plot([0, 1], [0, 1], "-", color="grey", linewidth=1.5, label="random")
        axes.set_xlabel("training images inspected")
        axes.set_ylabel("mislabeled images found")
        axes.set_title(f"Mislabeled images found by inspecting the top of a ranking ({strategy})", fontsize=10)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.grid(alpha=0.3)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), fontsize=9, handlelength=4)


def print_rankings(results, method):
    """Prints what each ranking finds, in percent, and the sentence that sums up that of `method`."""
    percents = (1, 5, 10, 20, 30, 50)
    print(f"{'inspected':16}" + "".join(f"{percent:6} %" for percent in percents) + "    AUROC")
    for name, found in results.items():
        cells = "".join(f"{100 * found['curve'][percent - 1]['found']:6.1f} %" for percent in percents)
        print(f"{name:16}{cells}   {found['auroc']:.4f}")
    at_10, at_20 = (100 * results[method][f"found_at_{percent}"] for percent in (10, 20))
    print(f"Inspecting 10 % of the training set finds {at_10:.1f} % of the mislabeled images (20 %: {at_20:.1f} %).")


def print_next_steps(args, metadata, suspects_csv):
    """Prints the command that trains as before, but with what the user decided about the suspects."""
    same = metadata["recipe"] | {name: metadata[name] for name in ("seed", "precision", "device")}
    same |= {"corrupt_percentage": args.corrupt_percentage or None, "checkpoint_dir": args.checkpoint_dir[0]}
    print(f"Look at {suspects_csv.with_suffix('.png')}, then train with what you decide, in a csv file of the columns")
    print("path (or index) and new_label (empty: leave it out):")
    print(f"  {train.command('train.py', args, **same, corrections='corrections.csv')}")


def main():
    """Parses, loads, computes, reports."""
    args = parse_arguments()
    seconds, strategy, method = {}, args.factor_strategy, args.method
    with pipeline.timed(seconds, "load"):
        runs, metadata, data = pipeline.load_runs(args, seconds)
        folder = pipeline.result_folder(runs)
        suspects_csv, suspects_png = (folder / f"suspects_{strategy}.{suffix}" for suffix in ("csv", "png"))
        curve_png, record_json = folder / f"detection_curve_{strategy}.png", folder / f"detection_{strategy}.json"
        require_unedited(suspects_csv)

    found = [measure(run, described, args.damping_factor) for run, described in zip(runs, metadata, strict=True)]
    if not pipeline.is_main_process():
        return

    with pipeline.timed(seconds, "report"):
        measured, logits, score_paths = zip(*found, strict=True)
        scores, predicted = rank(measured), sum(logits).argmax(1)
        order, is_corrupted = np.argsort(-scores[method], kind="stable"), data.is_corrupted.numpy()
        write_suspects(suspects_csv, data, order, scores, predicted)
        truth = is_corrupted.any() and not is_corrupted.all()
        results = {name: evaluate_ranking(values, is_corrupted) for name, values in scores.items()} if truth else {}
        fields = {"num_train": len(data), "num_corrupted": int(is_corrupted.sum()), "rankings": results}
        record = record_json, args, fields, runs[0].data.images.device, seconds
        pipeline.write_record(*record)  # before the pictures, so that nothing is lost where one fails
        by = RANKINGS[method].caption + f" ({strategy})" * RANKINGS[method].uses_curvature
        plot_suspects(suspects_png, data, order, scores[method], predicted, by)
        curve_png.unlink(missing_ok=True)
        if truth:
            plot_curves(curve_png, results, method, is_corrupted.mean(), strategy)
            print_rankings(results, method)
        else:
            print("No labels are known to be wrong, so there is no truth to compare with: look at the suspects.")

    paths = [*score_paths, suspects_csv, suspects_png, *([curve_png] if truth else []), record_json]
    pipeline.print_paths(pipeline.write_record(*record), paths)
    if not args.cleaned:
        print_next_steps(args, metadata[0], suspects_csv)


if __name__ == "__main__":
    pipeline.run(main)
