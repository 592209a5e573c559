"""Ranks the training images so that mislabeled ones come first.

A mislabeled image has to be memorised: the margin of its label grows late in the training, its
nearest neighbours have another label, and after the training the image strongly influences its own
loss. The script writes the ranking, a contact sheet (grid) of the most suspicious images, and a
page to review them in a browser. If the true labels are known, it also reports the recall of each
ranking.
"""

import base64
import csv
import hashlib
import io
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import pipeline

# ---- Rankings ------------------------------------------------------------------------------------


class Ranking(NamedTuple):
    """One way to order the training images by suspicion.

    description: what the ranking measures, for --help
    caption: name of the ranking in figures
    colour, line: colour and style of its recall curve, as matplotlib names them
    suspicion: function of the signals that `measure` returns; its result is a float array [N] that
    is highest for the most suspicious image
    needs_influence: whether `suspicion` uses the signal `self_influence`
    """

    description: str
    caption: str
    colour: str
    line: str
    suspicion: Callable
    needs_influence: bool = False


def standardise(values):
    """Returns values [N] shifted to mean 0 and scaled to standard deviation 1.

    Equal values become zeros.
    """
    if values.min() == values.max():  # the deviation is 0, or a rounding error
        return np.zeros_like(values)
    return (values - values.mean()) / values.std()


# The weight of the k-NN vote is the test accuracy to this power: a poor network has poor features.
# tests/studies/README.md compares the powers.
VOTE_POWER = 3


def combine_aum_and_vote(signals):
    """Returns the suspicion [N] by the area under the margin and the weighted k-NN vote.

    Both signals are standardised. They are high for correct labels, so the sum is negated.
    """
    weight = signals["accuracy"] ** VOTE_POWER
    aum = standardise(signals["aum"])
    vote = standardise(signals["vote"])
    return -(aum + weight * vote)


RANKINGS = {
    "self_influence": Ranking(
        description="how strongly the image influences its own loss",
        caption="self-influence",
        colour="#0b5394",
        line="-",
        suspicion=lambda signals: signals["self_influence"],
        needs_influence=True,
    ),
    "aum": Ranking(
        description="how low the margin of the label was during the training",
        caption="area under the margin",
        colour="#d55e00",
        line="--",
        suspicion=lambda signals: -signals["aum"],
    ),
    "loss": Ranking(
        description="cross-entropy loss of the trained network",
        caption="loss",
        colour="#e69f00",
        line=":",
        suspicion=lambda signals: signals["loss"],
    ),
    "margin": Ranking(
        description="how far the trained network prefers another class",
        caption="margin",
        colour="#cc79a7",
        line="-.",
        suspicion=lambda signals: -signals["margin"],
    ),
    "vote": Ranking(
        description="among the nearest images, the largest share of any other label, minus the "
        "share of the image's own label (k-NN vote)",
        caption="k-NN vote",
        colour="#009e73",
        line="--",
        suspicion=lambda signals: -signals["vote"],
    ),
    "aum_vote": Ranking(
        description="aum and vote together; the better the network, the more the vote counts",
        caption="area under the margin + weighted k-NN vote",
        colour="#7b3294",
        line="-",
        suspicion=combine_aum_and_vote,
    ),
}
DEFAULT_METHOD = "aum_vote"
# The published ranking, the default, and the simplest ranking have thick lines in every figure.
MAIN_METHODS = ("self_influence", DEFAULT_METHOD, "loss")


def caption_of(name, strategy):
    """Returns the name of a ranking in figures; for self-influence it includes the strategy."""
    ranking = RANKINGS[name]
    if ranking.needs_influence:
        return f"{ranking.caption} ({strategy})"
    return ranking.caption


# ---- Command line --------------------------------------------------------------------------------


def parse_arguments():
    """Reads the command line."""
    strategies = (*pipeline.STRATEGIES, pipeline.NO_INFLUENCE)
    parser = pipeline.influence_parser(__doc__, strategies)
    parser.set_defaults(factor_examples=1000)
    pipeline.add_pairwise_flags(parser.groups["curvature"], purpose="for --explain")
    report = parser.groups["report"]
    meanings = "; ".join(f"{name}: {ranking.description}" for name, ranking in RANKINGS.items())
    report.add_argument(
        "--method",
        choices=RANKINGS,
        default=DEFAULT_METHOD,
        help=f"what to rank the images by. {meanings}. With --factor_strategy "
        f"{pipeline.NO_INFLUENCE}, there is no self_influence (default: %(default)s)",
    )
    report.add_argument(
        "--num_review",
        type=pipeline.whole_number,
        default=500,
        metavar="N",
        help="number of suspects on the page for review; 0 writes no page (default: %(default)s)",
    )
    report.add_argument(
        "--explain",
        type=pipeline.whole_number,
        default=0,
        metavar="N",
        help="for the N most suspicious images, show the training images that support or oppose "
        "the label (default: %(default)s)",
    )
    args = parser.parse_args()
    if args.factor_strategy == pipeline.NO_INFLUENCE:
        refuse_what_needs_influence(parser, args)
    if args.explain == 0:
        refuse_what_needs_explanations(parser, args.eigenvector_fraction, args.index)
    pipeline.check_pairwise_flags(parser, args)
    return args


def refuse_what_needs_influence(parser, args):
    """Ends the script with status 2 if a flag needs the influence that is not computed."""
    is_used = {
        "--explain": args.explain > 0,
        f"--method {args.method}": RANKINGS[args.method].needs_influence,
        "--eigenvector_fraction": args.eigenvector_fraction < 1,
        "--index": args.index,
    }
    for flag, flag_is_used in is_used.items():
        if flag_is_used:
            parser.error(
                f"{flag} needs influence, but --factor_strategy {pipeline.NO_INFLUENCE} skips it: "
                "choose another strategy"
            )


def refuse_what_needs_explanations(parser, eigenvector_fraction, with_index):
    """Ends the script with status 2 if a flag is of no use without `--explain`."""
    useless = "has an effect only with --explain: add it, or remove this flag"
    if eigenvector_fraction < 1:
        parser.error(f"argument --eigenvector_fraction {useless}")
    if with_index:
        parser.error(f"argument --index {useless}")


# ---- Signals: what rankings are computed from ----------------------------------------------------

# Number of neighbours in the k-NN vote among 50,000 images; `knn_vote` scales it for fewer images.
# It was chosen by the recall on 500 to 50,000 images.
NEIGHBOURS_OF_50_000 = 300


def measure(run, metadata, damping_factor):
    """Returns the signals of one model, its logits, and the file of its self-influence.

    The signals are a dictionary. All are float32 arrays [N], except `accuracy`:
    self_influence: influence of the image on its own loss; missing if influence is not computed
    aum: mean margin of the label in the training batches (Pleiss et al. 2020, section 3.1); for an
    image that was in no training batch, the margin of the trained network
    margin, loss: margin and cross-entropy loss of the trained network
    vote: see `knn_vote`
    accuracy: test accuracy, a number from 0 to 1

    The logits are float32 [N, num_classes]. The file is None if influence is not computed.
    """
    signals = {}
    scores_path = None
    if run.strategy != pipeline.NO_INFLUENCE:
        signals["self_influence"], scores_path = run.self_influence(damping_factor)
    with pipeline.timed(run.seconds, "report"):
        labels = run.data.labels
        epoch_margins = metadata["margins"].float()  # (epochs, N), NaN: not in a batch
        features, logits = compute_features(run)
        final_margin = pipeline.margin(logits, labels).cpu()
        was_in_no_batch = epoch_margins.isnan().all(0)
        signals["aum"] = torch.where(was_in_no_batch, final_margin, epoch_margins.nanmean(0))
        signals["margin"] = final_margin
        signals["loss"] = F.cross_entropy(logits, labels, reduction="none")
        signals["vote"] = knn_vote(features, labels, logits.shape[1])
        signals = {name: values.cpu().numpy() for name, values in signals.items()}
        signals["accuracy"] = metadata["accuracy"]["test"]
    return signals, logits.cpu(), scores_path


def require_finite(logits):
    """Raises NumericalError if a logit is NaN or infinite, because rankings then mean nothing."""
    if not logits.isfinite().all():
        raise pipeline.NumericalError(
            "logits of the network are NaN or infinite: train again, with a lower --learning_rate"
        )


@torch.no_grad()
def compute_features(run):
    """Returns the features and the logits of the training images.

    Both are float32, [N, D] and [N, num_classes]. Features are the inputs of the network's head,
    summed over an image and its mirror image, and scaled to unit length. Logits are those of the
    image itself.
    """
    run.model.eval()
    features, logits = [], []
    device = run.data.images.device.type
    with torch.autocast(device, run.dtype, enabled=run.dtype != torch.float32):
        for batch in tqdm(run.data.images.split(run.batch_size), "Features", leave=False):
            images = run.data.normalize(batch)
            upright = run.model.features(images)
            mirrored = run.model.features(images.flip(3))
            logits.append(run.model.logits(upright))
            features.append(upright.float() + mirrored.float())
    return F.normalize(torch.cat(features), dim=1), torch.cat(logits)


def knn_vote(features, labels, num_classes):
    """Returns the k-NN vote for each label, float32 [N], from -1 to 1.

    The vote is the share of the label among the k nearest images, minus the largest share of
    another label. features: float32 [N, D] of unit length; labels: int64 [N]. The nearest images
    have the highest cosine similarity. k is proportional to the square root of N.
    """
    k = round(NEIGHBOURS_OF_50_000 * (len(features) / 50_000) ** 0.5)
    k = max(1, min(len(features) - 1, k))
    indices_by_batch = torch.arange(len(features), device=features.device).split(1024)
    votes = []
    for batch in tqdm(indices_by_batch, "Neighbours", leave=False):
        similarity = features[batch] @ features.T  # (B, N)
        similarity.scatter_(1, batch[:, None], -torch.inf)  # an image is no neighbour of itself
        neighbours = similarity.topk(k, dim=1, sorted=False).indices  # (B, k)
        neighbour_labels = labels[neighbours]
        counts = features.new_zeros(len(batch), num_classes)
        counts.scatter_add_(1, neighbour_labels, features.new_ones(neighbour_labels.shape))
        shares = counts / k
        # The share of the label, minus the largest other share.
        votes.append(pipeline.margin(shares, labels[batch]))
    return torch.cat(votes)


def mean_of(values):
    """Returns the mean of numbers, or of arrays or tensors of the same shape."""
    return sum(values) / len(values)


def suspicion_by_ranking(signals_by_model):
    """Returns the suspicion of each image, a float array [N], by name of the ranking.

    signals_by_model: for each model the signals that `measure` returns; the rankings use the mean
    over the models. Without the signal `self_influence`, rankings that need influence are omitted.
    """
    mean_signals = {}
    for name in signals_by_model[0]:
        mean_signals[name] = mean_of([signals[name] for signals in signals_by_model])
    has_influence = "self_influence" in mean_signals
    return {
        name: ranking.suspicion(mean_signals)
        for name, ranking in RANKINGS.items()
        if has_influence or not ranking.needs_influence
    }


def most_suspicious_first(suspicion):
    """Returns the positions of suspicion, float [N], from the highest value to the lowest, int64.

    Equal values stay in the order of their position.
    """
    return np.argsort(-suspicion, kind="stable")


# ---- Explanations: which training images support or oppose a suspect's label ---------------------

NUM_EXPLAINING = 3  # images on either side
NUM_QUERIES_HELD = 1000


def explain(runs, data, suspects, damping_factor, **pairwise_flags):
    """Returns the training images that most oppose and most support the label of each suspect.

    data: ImageData on the CPU; suspects: positions in `data`, int64 array [M]; pairwise_flags:
    eigenvector_fraction and with_index of `InfluenceRun.pairwise_influence`. The result is a
    dictionary from a suspect's position to a list of (rank, position, score), opposing images
    first. A score is the influence on the log-odds of the label, averaged over the models. The
    influence of a suspect on itself is not used.
    """
    if len(suspects) == 0:
        return {}
    # Under torchrun, rounding can give each process another ranking. All need the same queries.
    positions = runs[0].from_main(suspects.tolist())
    queries = data.take(torch.tensor(positions))
    queries_on_device = queries.to(runs[0].data.images.device)
    influence_by_model = []
    for run in runs:
        scores, _ = run.pairwise_influence(
            queries_on_device, NUM_QUERIES_HELD, damping_factor, **pairwise_flags
        )
        influence_by_model.append(scores)
    explanations = {}
    for suspect, influence in zip(positions, mean_of(influence_by_model), strict=True):
        influence_of_others = influence.clone()
        influence_of_others[suspect] = 0  # `strongest` skips images without influence
        opposing = strongest(influence_of_others, sign=-1)
        supporting = strongest(influence_of_others, sign=1)
        explanations[suspect] = [*opposing, *supporting]
    return explanations


def strongest(influence, sign):
    """Returns the NUM_EXPLAINING images with the strongest influence of one sign.

    influence: float32 [N]; sign: 1 or -1. The result is a list of (rank, position, influence); it
    is shorter if fewer images have influence of this sign.
    """
    strength = sign * influence
    positions = strength.argsort(descending=True)[:NUM_EXPLAINING].tolist()
    return [
        (rank, position, influence[position].item())
        for rank, position in enumerate(positions, start=1)
        if strength[position] > 0
    ]


# ---- One detection -------------------------------------------------------------------------------


class Detection(NamedTuple):
    """The result of a detection.

    data: the training images, ImageData on the CPU
    method: name of the ranking that decides the order
    strategy: approximation of the curvature, one of pipeline.STRATEGIES, or pipeline.NO_INFLUENCE
    scores: suspicion by name of the ranking, float arrays [N]
    order: positions in `data`, int64 [N], the most suspicious image first
    logits: float32 [N, num_classes], averaged over the models
    explanations: see `explain`
    """

    data: pipeline.ImageData
    method: str
    strategy: str
    scores: dict
    order: np.ndarray
    logits: torch.Tensor
    explanations: dict

    @property
    def suspicion(self):
        """The suspicion that decides the order, float [N]."""
        return self.scores[self.method]

    @property
    def caption(self):
        """The name in figures of the ranking that decides the order."""
        return caption_of(self.method, self.strategy)

    @property
    def predicted(self):
        """The predicted classes, int64 [N]."""
        return self.logits.argmax(1)


def detect(runs, metadata, data, *, method, damping_factor, num_explained, **pairwise_flags):
    """Ranks the training images of the runs by a method of RANKINGS.

    runs, metadata, data: as `pipeline.load_runs` returns them; pairwise_flags: as for `explain`.
    Returns the Detection, and the files of self-influence that were computed.
    """
    signals_by_model, logits_by_model, influence_paths = [], [], []
    for run, model_metadata in zip(runs, metadata, strict=True):
        signals, logits, influence_path = measure(run, model_metadata, damping_factor)
        require_finite(logits)
        signals_by_model.append(signals)
        logits_by_model.append(logits)
        if influence_path is not None:
            influence_paths.append(influence_path)
    scores = suspicion_by_ranking(signals_by_model)
    order = most_suspicious_first(scores[method])
    explained = order[:num_explained]
    detection = Detection(
        data=data,
        method=method,
        strategy=runs[0].strategy,
        scores=scores,
        order=order,
        logits=mean_of(logits_by_model),
        explanations=explain(runs, data, explained, damping_factor, **pairwise_flags),
    )
    return detection, influence_paths


# ---- Evaluation against known labels -------------------------------------------------------------


def detection_curve(scores, is_corrupted):
    """Returns the recall after inspecting the most suspicious 1 %, 2 %, ..., 100 % of the images.

    scores: suspicion, float [N]; is_corrupted: bool [N], at least one true. The result is a list of
    dictionaries with the fractions `inspected` and `recall`.
    """
    hits = is_corrupted[most_suspicious_first(scores)]
    recall = np.concatenate([[0.0], np.cumsum(hits) / hits.sum()])  # after 0, 1, ..., N images
    curve = []
    for percent in range(1, 101):
        num_inspected = round(percent / 100 * len(scores))
        curve.append({"inspected": percent / 100, "recall": float(recall[num_inspected])})
    return curve


def mean_ranks(scores):
    """Returns the rank of each score [N], 1 for the lowest; equal scores share their mean rank."""
    _, group, sizes = np.unique(scores, return_inverse=True, return_counts=True)
    last = np.cumsum(sizes)  # the ranks of a group of equal scores are first, ..., last
    first = last - sizes + 1
    return ((first + last) / 2)[group]


def auroc(scores, is_corrupted):
    """Returns the probability that a random corrupted image scores above a random clean image.

    Equal scores count half. scores: suspicion, float [N]; is_corrupted: bool [N], both kinds
    present. The formula is the Mann-Whitney U statistic, divided by the number of pairs.
    """
    num_corrupted = is_corrupted.sum()
    num_clean = len(scores) - num_corrupted
    rank_sum = mean_ranks(scores)[is_corrupted].sum()
    u_statistic = rank_sum - num_corrupted * (num_corrupted + 1) / 2
    return float(u_statistic / (num_corrupted * num_clean))


def average_precision(scores, is_corrupted):
    """Returns the average precision: the mean of the precision at the rank of each corrupted image.

    The precision at a rank is the share of corrupted images among all images down to this rank.
    scores: suspicion, float [N]; is_corrupted: bool [N], at least one true.
    """
    hits = is_corrupted[most_suspicious_first(scores)]
    precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
    return float(precision[hits].mean())


def evaluate_ranking(scores, is_corrupted):
    """Returns the json entry of one ranking, a dictionary."""
    curve = detection_curve(scores, is_corrupted)
    # The keys are k / 100, so 0.1 and 0.2 are exactly among them.
    recall = {point["inspected"]: point["recall"] for point in curve}
    return {
        "curve": curve,
        "recall_at_10": recall[0.1],
        "recall_at_20": recall[0.2],
        "auroc": auroc(scores, is_corrupted),
        "average_precision": average_precision(scores, is_corrupted),
    }


def evaluate_rankings(scores, is_corrupted):
    """Returns the json entries by name of the ranking.

    The dictionary is empty if no label is corrupted, or if all labels are corrupted.
    """
    if is_corrupted.all() or not is_corrupted.any():
        return {}
    return {name: evaluate_ranking(values, is_corrupted) for name, values in scores.items()}


def print_recall(results, method, num_corrupted):
    """Prints the recall of each ranking in percent, and a sentence about `method`.

    results: as `evaluate_rankings` returns them. If they are empty, prints the reason.
    """
    if not results and num_corrupted == 0:
        print("No label is known to be wrong, so there is no recall: review the suspects.")
        return
    if not results:
        print("All labels are known to be wrong: recall and AUROC need a correct label, too.")
        return
    percents = (1, 5, 10, 20, 30, 50)
    print(f"{'inspected':16}" + "".join(f"{percent:6} %" for percent in percents) + "    AUROC")
    for name, result in results.items():
        recall = {point["inspected"]: 100 * point["recall"] for point in result["curve"]}
        cells = "".join(f"{recall[percent / 100]:6.1f} %" for percent in percents)
        print(f"{name:16}{cells}   {result['auroc']:.4f}")
    at_10 = 100 * results[method]["recall_at_10"]
    at_20 = 100 * results[method]["recall_at_20"]
    print(
        f"Inspecting 10 % of the training set finds {at_10:.1f} % of the mislabeled images "
        f"(20 %: {at_20:.1f} %)."
    )


# ---- Tables and figures --------------------------------------------------------------------------

# Columns of `suspects_<strategy>.csv`, in this order; the rankings stand between both groups.
FIRST_COLUMNS = ("rank", "index", "path", "label", "predicted_label")
LAST_COLUMNS = ("is_corrupted", "duplicate_of")
# Columns that earlier versions wrote; a user has not added them.
OLD_COLUMNS = (
    "class_name",
    "predicted_class_name",
    "combined",
    "aum_margin",
    "margin_vote",
    "self_influence_checkpoints",
    "grad_norm",
)
NUM_PICTURED = 100


def result_files(folder, strategy):
    """Returns the paths of all files that a detection writes into a folder."""
    return SimpleNamespace(
        suspects=folder / f"suspects_{strategy}.csv",
        explanations=folder / f"explanations_{strategy}.csv",
        page=folder / f"suspects_{strategy}.html",
        contact_sheet=folder / f"suspects_{strategy}.png",
        curves=folder / f"detection_curve_{strategy}.png",
        record=folder / f"detection_{strategy}.json",
    )


def require_no_added_columns(path):
    """Raises UserError if the table that will be replaced has a column that a user added."""
    if not path.exists():
        return
    text = path.read_text(encoding="utf-8-sig", errors="replace")
    lines = [line for line in text.split("\n") if line.strip()]
    if lines and pipeline.stated_delimiter(lines[0]) is not None:
        del lines[0]
    if not lines:
        return
    # A spreadsheet may have saved the table with another separator.
    columns = re.split("[,;\t]", lines[0].replace('"', ""))
    written = {*FIRST_COLUMNS, *RANKINGS, *LAST_COLUMNS, *OLD_COLUMNS}
    added = [column or "unnamed" for column in columns if column not in written]
    separator = max(",;\t", key=lines[0].count)  # the most frequent one in the header
    for row in csv.reader(lines[1:], delimiter=separator):
        if any(row[len(columns) :]):  # more cells than the header: notes beside the table
            added.append(f"unnamed, in the row of rank {row[0]}")
            break
    if added:
        raise pipeline.UserError(
            f"{path} would be replaced, but it has columns that you added ({', '.join(added)}): "
            "move the file, or choose another --output_dir"
        )


def write_suspects(path, detection):
    """Writes all training images to a csv file, the most suspicious image first."""
    data = detection.data
    indices = data.indices.tolist()
    labels = data.labels.tolist()
    predicted = detection.predicted.tolist()
    is_corrupted = data.is_corrupted.tolist()
    duplicate_of = pipeline.duplicate_of(data)
    rows = []
    for rank, position in enumerate(detection.order.tolist(), start=1):
        row = [
            rank,
            indices[position],
            data.paths[position],
            data.class_names[labels[position]],
            data.class_names[predicted[position]],
        ]
        row += [suspicion[position] for suspicion in detection.scores.values()]
        first_copy = duplicate_of[position]
        row += [int(is_corrupted[position]), first_copy if first_copy >= 0 else ""]
        rows.append(row)
    pipeline.write_table(path, [*FIRST_COLUMNS, *detection.scores, *LAST_COLUMNS], rows)


def write_explanations(path, detection):
    """Writes the explanations to a csv file; if there are none, removes an earlier file."""
    if not detection.explanations:
        path.unlink(missing_ok=True)
        return
    data = detection.data
    rows = []
    for suspect, explaining in detection.explanations.items():
        for rank, position, score in explaining:
            row = [
                data.indices[suspect].item(),
                rank,
                data.indices[position].item(),
                data.class_names[data.labels[position]],
                score,
            ]
            rows.append(row)
    pipeline.write_table(path, ["suspect", "rank", "image", "label", "score"], rows)


def plot_suspects(path, detection):
    """Draws a contact sheet of the most suspicious images with their labels and scores."""
    data, predicted = detection.data, detection.predicted
    shown = detection.order[:NUM_PICTURED].tolist()
    texts, colours = [], []
    for position in shown:
        given_name = data.class_names[data.labels[position]]
        predicted_name = data.class_names[predicted[position]]
        score = f"{detection.suspicion[position]:.3g}"
        labels = f"{pipeline.shorten(given_name)} →\n{pipeline.shorten(predicted_name)}"
        texts.append(f"{labels}\n{score}")
        colours.append("black" if given_name == predicted_name else "firebrick")
    title = (
        f"The {len(shown)} most suspicious of {len(data)} training images by {detection.caption}:\n"
        "given label → predicted label (red if they differ), score"
    )
    pipeline.draw_contact_sheet(
        path,
        data.images[shown],
        texts=texts,
        colours=colours,
        columns=10,
        title=title,
    )


def plot_curves(path, detection, results):
    """Draws the recall of each ranking against the share of images inspected.

    results: as `evaluate_rankings` returns them; if they are empty, removes an earlier figure.
    MAIN_METHODS and the chosen ranking have thick lines.
    """
    if not results:
        path.unlink(missing_ok=True)
        return
    fraction = detection.data.is_corrupted.double().mean().item()
    with pipeline.figure_file(path, 6.4, 6.2) as figure:
        end = min(1, max(0.2, 3 * fraction))
        axes = figure.add_subplot(xlim=(0, end), ylim=(0, 1.02))
        for name, result in results.items():
            caption = caption_of(name, detection.strategy)
            at_10 = f"{100 * result['recall_at_10']:.1f} % at 10 %"
            axes.plot(
                [0, *(point["inspected"] for point in result["curve"])],
                [0, *(point["recall"] for point in result["curve"])],
                label=f"{caption}: {at_10}, AUROC {result['auroc']:.3f}",
                linestyle=RANKINGS[name].line,
                color=RANKINGS[name].colour,
                linewidth=2.2 if name in (*MAIN_METHODS, detection.method) else 0.8,
            )
        axes.plot([0, fraction, 1], [0, 1, 1], ":", color="black", linewidth=1.5, label="perfect")
        axes.plot([0, 1], [0, 1], "-", color="grey", linewidth=1.5, label="random")
        axes.set_xlabel("training images inspected")
        axes.set_ylabel("recall of mislabeled images")
        axes.set_title("Recall of mislabeled images, most suspicious images first", fontsize=10)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:.0%}")
        axes.grid(alpha=0.3)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), fontsize=9, handlelength=4)


# ---- The page for review -------------------------------------------------------------------------


def describe_suspects(detection, num_review, cleaned):
    """Returns a dictionary for the card of each suspect, and the positions of all images shown.

    cleaned: whether corrections were applied to the labels. The page has one picture with all
    images, in the order of the returned positions. A card names an image by its tile, the number of
    its place in the picture.
    """
    suspects = detection.order[:num_review].tolist()
    positions = list(suspects)
    for suspect in suspects:
        positions += [position for _, position, _ in detection.explanations.get(suspect, [])]
    positions = list(dict.fromkeys(positions))  # each image is drawn once
    tiles = {position: tile for tile, position in enumerate(positions)}
    # The suggestion is the most probable class other than the given label.
    other_logits = detection.logits.scatter(1, detection.data.labels[:, None], -torch.inf)
    suggestions = other_logits.argmax(1)
    cards = []
    for rank, suspect in enumerate(suspects, start=1):
        card = describe_suspect(detection, suspect, suggestions[suspect], cleaned)
        card["rank"] = rank
        card["tile"] = tiles[suspect]
        card["explaining"] = describe_explanation(detection, suspect, tiles)
        cards.append(card)
    return cards, positions


def describe_suspect(detection, suspect, suggestion, cleaned):
    """Returns a dictionary with the names, probabilities and score of a suspect.

    suspect: position of the image; suggestion: class index; cleaned: see `describe_suspects`.
    """
    data = detection.data
    path = data.paths[suspect]
    index = data.indices[suspect].item()
    label = data.labels[suspect]
    label_name = data.class_names[label]
    percent = 100 * detection.logits[suspect].softmax(0)
    return {
        "key": path or str(index),
        "name": Path(path).name or f"image {index}",
        "link": Path(path).absolute().as_uri() if path else "",
        "label": label_name,
        "labelPercent": f"{percent[label]:.1f}",
        "suggested": data.class_names[suggestion],
        "suggestedPercent": f"{percent[suggestion]:.1f}",
        "score": f"{detection.suspicion[suspect]:.3g}",
        # In corrections.csv, the column `label` is the label before all corrections: train.py
        # refuses a row whose image has another one. After --cleaned, that label is unknown here, so
        # the cell is empty.
        "fileLabel": "" if cleaned else label_name,
    }


def describe_explanation(detection, suspect, tiles):
    """Returns a dictionary for each training image that supports or opposes a suspect's label.

    suspect: position of the image; tiles: tile of each image by its position.
    """
    data = detection.data
    explaining = []
    for _, position, score in detection.explanations.get(suspect, []):
        image = {
            "tile": tiles[position],
            "side": "supports" if score > 0 else "opposes",
            "label": data.class_names[data.labels[position]],
        }
        explaining.append(image)
    return explaining


def draw_tiles(images):
    """Returns one JPEG that contains all images, as a data URI.

    images: uint8 [N, 3, 32, 32]. They fill the rows of a square from left to right, in order.
    """
    from PIL import Image

    size = pipeline.IMAGE_SIZE
    side = math.ceil(len(images) ** 0.5)  # images in a row
    tiles = np.zeros((side * side, size, size, 3), np.uint8)
    tiles[: len(images)] = images.permute(0, 2, 3, 1).numpy()
    rows = tiles.reshape(side, side, size, size, 3).swapaxes(1, 2)  # (side, size, side, size, 3)
    picture = Image.fromarray(rows.reshape(side * size, side * size, 3))
    content = io.BytesIO()
    # At this quality a JPEG looks like the image, and has a third of the size of a PNG.
    picture.save(content, "JPEG", quality=95, subsampling=0)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"


def digit_keys(class_names):
    """Returns a list of (digit, class name): the key that chooses each class.

    If at least one name is a single digit, only classes with such names have a key: their digit.
    The list is empty if there are more than ten classes.
    """
    if len(class_names) > 10:
        return []
    digits = [name for name in class_names if re.fullmatch("[0-9]", name)]
    if digits:  # the key 1 must not choose another class than 1
        return [(digit, digit) for digit in digits]
    return list(zip("1234567890", class_names, strict=False))


def write_page(path, detection, num_review, cleaned):
    """Writes the page to review the first `num_review` suspects; if 0, removes an earlier page.

    cleaned: whether corrections were applied to the labels. The browser stores decisions under the
    fingerprint, a hash of images, labels and paths. So pages of several rankings share decisions.
    The suspicion is not hashed: on a GPU its last bits differ between two runs.
    """
    if num_review == 0:
        path.unlink(missing_ok=True)
        return
    data = detection.data
    cards, positions = describe_suspects(detection, num_review, cleaned)
    facts = {
        "fingerprint": pipeline.sha256(data.digest, json.dumps(data.paths)),
        "column": "path" if any(data.paths) else "index",
        "classes": data.class_names,
        "leaveOut": pipeline.LEAVE_OUT,
        "digits": digit_keys(data.class_names),
        "cards": cards,
    }
    title = f"The {len(cards)} most suspicious of {len(data):,} training images"
    hint = ""
    if cleaned:
        hint = "The labels include your corrections: load your earlier corrections.csv first."
    page = build_page(f"{title} by {detection.caption}", hint, data.images[positions], facts)
    with pipeline.atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def build_page(title, hint, images, facts):
    """Returns PAGE with its placeholders filled.

    The content security policy permits only the style and the script of PAGE, by their hashes.
    Names of classes and files may contain html. They are embedded as JSON, and each `<` in it is
    escaped, so that no name can end the element.
    """
    policy = "default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'"
    for kind, code in re.findall(r"<(style|script)>(.*?)</\1>", PAGE, re.DOTALL):
        digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
        policy += f"; {kind}-src 'sha256-{digest}'"
    parts = {
        "policy": policy,
        "title": title,
        "hint": hint,
        "tiles": draw_tiles(images),
        "data": json.dumps(facts).replace("<", r"\u003c"),
    }
    return re.sub(r"{{(\w+)}}", lambda marker: parts[marker[1]], PAGE)


PAGE = r"""<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<title>Suspects</title>
<meta http-equiv="Content-Security-Policy" content="{{policy}}">
<meta name="viewport" content="width=device-width">
<style>
body {
    margin: 0;
    font: 15px/1.3 system-ui, sans-serif;
    color: #1a1a1a;
    background: #f1f1ee;
    color-scheme: light;
}
header, nav, main, .facts, .explaining:not(:empty), .buttons {
    padding: 8px;
}
header, nav, label, #digits {
    display: flex;
    flex-wrap: wrap;
    gap: 6px 10px;
    align-items: center;
}
h1 {
    margin: 0;
    font-size: 17px;
}
#keys {
    flex-basis: 100%;
    margin: 0;
}
kbd {
    padding: 0 5px;
    border: 1px solid #999;
    border-radius: 3px;
    background: #fff;
}
nav {
    position: sticky;
    top: 0;
    z-index: 1;
    max-height: 45vh;
    overflow: auto;
    background: #fff;
    border-bottom: 1px solid #999;
}
button, select, label, input {
    box-sizing: border-box;
    min-height: 40px;
    max-width: 100%;
    font: inherit;
}
button {
    overflow: hidden;
    text-overflow: ellipsis;
    white-space: nowrap;
    touch-action: manipulation;
}
#done, #other {
    flex: 1;
    min-width: 60px;
    max-width: 200px;
}
header b:empty, #warning:empty {
    display: none;
}
#digits button {
    max-width: 170px;
}
main {
    display: grid;
    grid-template-columns: repeat(auto-fill, minmax(min(100%, 290px), 1fr));
    gap: 12px;
}
article {
    align-self: start;
    scroll-margin: calc(var(--bar, 150px) + 8px) 0 30px;
    background: #fff;
    border: 3px solid var(--state, #ccc);
}
article:focus-within {
    outline: 4px solid #111;
}
.kept {
    --state: #7fb0e8;
}
.changed {
    --state: #5fc27e;
}
.excluded {
    --state: #f08a80;
}
h2 {
    margin: 0;
    padding: 2px 8px 4px;
    overflow-wrap: anywhere;
    background: var(--state, #ccc);
    font-size: 17px;
}
canvas {
    display: block;
    width: 128px;
    height: 128px;
    image-rendering: pixelated;
}
.facts, .explaining {
    display: grid;
    grid-template-columns: 128px 1fr;
    gap: 8px;
    overflow-wrap: anywhere;
}
.facts div bdi, .explaining bdi {
    display: inline-block;
    max-height: 2.6em;
    overflow: hidden;
    vertical-align: bottom;
}
.facts div div bdi {
    font-weight: bold;
}
.facts a {
    display: block;
    min-height: 40px;
    max-height: 40px;
    overflow: hidden;
    align-content: center;
}
.explaining {
    grid-template-columns: repeat(3, minmax(0, 1fr));
    font-size: 13px;
}
.explaining canvas {
    width: 64px;
    height: 64px;
}
.opposes {
    grid-row: 1;
    color: #b2182b;
}
.supports {
    grid-row: 2;
    color: #0b5394;
}
.buttons {
    display: grid;
    grid-template-columns: repeat(2, minmax(0, 1fr));
    gap: 6px;
}
dialog textarea {
    display: block;
    width: min(80vw, 700px);
    margin: 8px 0;
}
@media (max-width: 700px) {
    #keys, #digits {
        display: none;
    }
}
</style>
<header>
<h1>{{title}}</h1>
<b>{{hint}}</b>
<p id="keys">
<kbd>Enter</kbd> takes the suggestion, <kbd>k</kbd> keeps the label,
<kbd>x</kbd> leaves the image out<span id="digitHint">, a digit chooses a class</span>,
<kbd>c</kbd> goes to the field for another class, <kbd>Esc</kbd> goes back to the suspect,
<kbd>u</kbd> or <kbd>Ctrl+Z</kbd> undoes, arrows move.
On non-Latin keyboards, use the keys at the same positions.
The suggestion is the most probable class other than the given label.
</p>
<select id="filter" aria-label="Show one class or one pair of classes">
<option value="">all suspects (given → suggested)</option>
</select>
<label><input type="checkbox" id="undecided">undecided only</label>
</header>
<nav aria-label="Progress, file and classes">
<progress id="done" aria-label="Suspects decided"></progress>
<span id="counts"></span>
<button value="undo">Undo</button>
<button value="save">Save file</button>
<button value="load">Load file</button>
<input id="other" list="classes" placeholder="another class" aria-label="Another class">
<span id="digits"></span>
<b id="notice" role="status" aria-label="Notice"></b>
<b id="warning" role="alert"></b>
</nav>
<main id="cards"></main>
<datalist id="classes"></datalist>
<input id="file" type="file" accept=".csv,.tsv,.txt" aria-label="File to load" hidden>
<dialog id="copy" aria-label="Text of corrections.csv">
If your browser saved no file, copy this text into a file called corrections.csv:
<textarea id="text" rows="12" readonly aria-label="Text of corrections.csv"></textarea>
<button value="copy">Copy</button>
<button value="close">Close</button>
<span id="copied" role="status"></span>
</dialog>
<img id="sprite" alt="" hidden src="{{tiles}}">
<script type="application/json" id="data">{{data}}</script>
<script>
"use strict";
const byId = (id) => document.getElementById(id);
const facts = JSON.parse(byId("data").textContent); // `facts` of write_page
const { fingerprint, column, classes, leaveOut, digits, cards } = facts;

// ---- Decisions ----

// Maps the key of an image (its path, or else its index) to its row of corrections.csv.
let decisions = new Map();
// For each change: the rows before it, and the card that was current.
const undoStack = [];
// False if the browser cannot store decisions: in a sandboxed frame, or if its storage is full.
let isStored = true;
// How often the file was saved since the page was opened.
let numSaved = 0;
let current = cards[0];

function say(text) {
    byId("notice").textContent = text;
}

// A warning stays visible; the next notice does not replace it.
function warn(text) {
    byId("warning").textContent = text;
}

function count(number, noun) {
    return number === 1 ? `1 ${noun}` : `${number} ${noun}s`;
}

// Called at the start, before each change, and when another window has stored decisions.
function readStorage() {
    const stored = isStored ? localStorage.getItem(fingerprint) : null;
    if (stored === null) {
        return;
    }
    try {
        decisions = new Map(JSON.parse(stored));
    } catch {
        warn("The decisions stored in the browser are damaged: load your saved file.");
    }
}

function writeStorage() {
    if (!isStored) {
        return;
    }
    try {
        localStorage.setItem(fingerprint, JSON.stringify([...decisions]));
    } catch {
        isStored = false;
        warn("The browser storage is full: save the file before you close the page.");
    }
}

// Sets rows by key; the value undefined removes a row.
function setRows(rows) {
    for (const [key, row] of rows) {
        if (row === undefined) {
            decisions.delete(key);
        } else {
            decisions.set(key, row);
        }
    }
    writeStorage();
    draw();
}

// Sets rows by key so that they can be undone, and goes on.
function decideRows(rows) {
    readStorage();
    const before = [...rows.keys()].map((key) => [key, decisions.get(key)]);
    undoStack.push({ rows: new Map(before), card: current });
    setRows(rows);
    goToUndecided();
}

function undo() {
    const last = undoStack.pop();
    if (last === undefined) {
        say("There is nothing to undo.");
        return;
    }
    say("");
    readStorage();
    setRows(last.rows);
    current = last.card;
    if (isShown(current)) {
        go(current);
    } else {
        goToUndecided();
    }
}

function decide(newLabel) {
    if (isShown(current)) {
        say("");
        decideRows(new Map([[current.key, [current.fileLabel, newLabel]]]));
    }
}

// ---- Cards ----

function make(tag, attributes, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
        element.setAttribute(name, value);
    }
    element.append(...children);
    return element;
}

// An element for a name. It keeps a right-to-left name from reordering the text around it.
function bdi(name) {
    return make("bdi", {}, name);
}

// Draws one image of the JPEG of all images.
function drawTile(tile, description) {
    const size = { width: 32, height: 32 };
    const canvas = make("canvas", { ...size, role: "img", "aria-label": description });
    const sprite = byId("sprite");
    const tilesInRow = sprite.naturalWidth / 32;
    const left = 32 * (tile % tilesInRow);
    const top = 32 * Math.floor(tile / tilesInRow);
    canvas.getContext("2d").drawImage(sprite, -left, -top);
    return canvas;
}

function makeFact(text, name, percent) {
    return make("div", {}, `${text}: `, bdi(name), ` (${percent}\u00a0%)`);
}

function makeButton(value, title, ...children) {
    return make("button", { value, title }, ...children);
}

function makeCard(card) {
    const link = make("a", { title: card.key, target: "_blank" }, bdi(card.name));
    if (card.link) {
        link.href = card.link;
    }
    const texts = make(
        "div",
        {},
        makeFact("given", card.label, card.labelPercent),
        makeFact("suggested", card.suggested, card.suggestedPercent),
        `score ${card.score}`,
        link,
    );
    const explaining = card.explaining.map(({ tile, side, label }) => {
        const image = drawTile(tile, `image of ${label}`);
        return make("div", { class: side }, image, `${side}: `, bdi(label));
    });
    const buttons = [
        makeButton("accept", `→ ${card.suggested} (Enter)`, "→ ", bdi(card.suggested)),
        makeButton("keep", `keep ${card.label} (k)`, "keep ", bdi(card.label)),
        makeButton("exclude", "leave out (x)", "leave out"),
        makeButton("other", "another class (c)", "other…"),
    ];
    return make(
        "article",
        { tabindex: -1 },
        make("h2", {}),
        make("div", { class: "facts" }, drawTile(card.tile, `suspect ${card.rank}`), texts),
        make("div", { class: "explaining" }, ...explaining),
        make("div", { class: "buttons" }, ...buttons),
    );
}

// Returns the state of a card, which is its CSS class, and the text, such as "→ frog".
function describe(card) {
    const row = decisions.get(card.key);
    if (row === undefined) {
        return { state: "undecided", text: ["undecided"] };
    }
    const newLabel = row[1];
    if (newLabel === leaveOut) {
        return { state: "excluded", text: ["left out"] };
    }
    if (newLabel === card.label) {
        return { state: "kept", text: ["kept"] };
    }
    return { state: "changed", text: ["→ ", bdi(newLabel)] };
}

function draw() {
    const counts = { undecided: 0, kept: 0, changed: 0, excluded: 0 };
    for (const card of cards) {
        const { state, text } = describe(card);
        const heading = card.element.querySelector("h2");
        heading.replaceChildren(`${card.rank}. `, ...text);
        const labels = `given ${card.label}, suggested ${card.suggested}`;
        card.element.setAttribute("aria-label", `Suspect ${heading.textContent}; ${labels}`);
        card.element.className = state;
        card.element.hidden = !isShown(card);
        counts[state] += 1;
    }
    const decided = cards.length - counts.undecided;
    const parts = [
        `${decided} of ${cards.length} decided`,
        `${counts.changed} changed`,
        `${counts.excluded} left out`,
    ];
    byId("counts").textContent = parts.join(", ");
    byId("done").value = decided / cards.length;
}

function pairOf(card) {
    return `${card.label} → ${card.suggested}`;
}

function isShown(card) {
    const shown = byId("filter").value;
    const isOfClass = shown === "" || shown === card.label || shown === pairOf(card);
    return isOfClass && !(byId("undecided").checked && decisions.has(card.key));
}

function go(card) {
    current = card;
    card.element.focus({ preventScroll: true });
    card.element.scrollIntoView({ block: "nearest" });
}

// Searches the cards in a circle that begins with the current one. Goes to the first card that is
// shown and undecided, else to the first one that is shown; else it stays.
function goToUndecided() {
    const start = cards.indexOf(current);
    const cardsFromCurrent = [...cards.slice(start), ...cards.slice(0, start)];
    const candidates = cardsFromCurrent.filter(isShown);
    const undecided = candidates.find((card) => !decisions.has(card.key));
    if (candidates.length === 0) {
        say("No suspect matches the filter: save the file, or show other suspects.");
    }
    go(undecided ?? candidates[0] ?? current);
}

function move(step) {
    const shown = cards.filter(isShown);
    go(shown[shown.indexOf(current) + step] ?? current);
}

function countColumns() {
    return getComputedStyle(byId("cards")).gridTemplateColumns.split(" ").length;
}

// ---- The saved file: train.py reads the same format ----

// train.py refuses a cell with a line break. It understands percent-encoded names.
function encodeKey(key) {
    return /[\r\n]/.test(key) ? encodeURI(key) : key;
}

function quoteCell(cell) {
    // A separator, a quote, or a space at either end: `a,b.png`.
    const needsQuotes = /[",;\t]|^ | $/;
    return needsQuotes.test(cell) ? `"${cell.replaceAll('"', '""')}"` : cell;
}

function fileText() {
    const rows = [...decisions].map(([key, row]) => [encodeKey(key), ...row]);
    const table = [[column, "label", "new_label"], ...rows];
    const lines = table.map((cells) => cells.map(quoteCell).join(","));
    return lines.map((line) => `${line}\n`).join("");
}

function save() {
    const text = fileText();
    const url = URL.createObjectURL(new Blob([text]));
    make("a", { href: url, download: "corrections.csv" }).click();
    // A browser may forbid frames and sandboxed pages to save files, without an error. A page
    // without storage may be sandboxed.
    const isSurelySaved = window === window.top && isStored;
    if (isSurelySaved) {
        numSaved += 1;
        let notice = `Saved ${count(decisions.size, "decision")}.`;
        if (numSaved > 1) {
            notice += " The browser may have numbered the file: use the newest one.";
        }
        say(notice);
    } else {
        say("");
        byId("copied").textContent = "";
        byId("text").value = text;
        byId("copy").showModal();
        byId("text").select();
    }
}

function copy() {
    byId("text").select();
    const isCopied = document.execCommand("copy");
    byId("copied").textContent = isCopied ? "Copied." : "Press Ctrl+C to copy.";
}

// Returns the cells of a line, or null if its quotes are wrong.
function splitLine(line, separator) {
    // The separator, escaped for a regular expression.
    const escaped = "\\" + separator;
    // A cell in quotes: `"a ""b"", c"`.
    const quotedCell = '"(?<quoted>(?:[^"]|"")*)"';
    // Another cell: `a.png`. A quote at its start, or after blanks at its start, is a mistake.
    const plainCell = `(?<plain>(?! *")[^${escaped}]*)`;
    // Either cell with the separator behind it: `a.png,`.
    const nextCell = new RegExp(`(?:${quotedCell}|${plainCell})${escaped}`, "y");
    // The pattern needs a separator behind each cell, so one is added behind the last cell.
    const text = line + separator;
    const cells = [];
    while (nextCell.lastIndex < text.length) {
        const match = nextCell.exec(text);
        if (match === null) {
            return null;
        }
        const { quoted, plain } = match.groups;
        cells.push(plain ?? quoted.replaceAll('""', '"'));
    }
    return cells;
}

// Returns the first separator that gives the columns we need, and the names of all columns.
function findColumns(header, separators) {
    for (const separator of separators) {
        const cells = splitLine(header, separator) ?? [];
        const columns = cells.map((name) => name.trim().toLowerCase());
        if (!columns.includes(column) || !columns.includes("new_label")) {
            continue;
        }
        const repeated = columns.find((name, i) => name !== "" && columns.indexOf(name) !== i);
        if (repeated !== undefined) {
            throw new Error(`the column ${repeated} appears twice`);
        }
        return { separator, columns };
    }
    const needed = `the columns ${column} and new_label`;
    throw new Error(`the first line must contain ${needed}, but is “${header}”`);
}

// Yields each row: the name of its line, such as "line 2", and the cells by name of the column.
// Throws a sentence about the first mistake.
function* readTable(text) {
    // Lines end as in Windows, old Macs or Unix.
    const linesOfText = text.split(/\r\n|\r|\n/);
    const lines = linesOfText.map((line, i) => ({ line, lineName: `line ${i + 1}` }));
    const filled = lines.filter(({ line }) => line.trim() !== "");
    // Spreadsheets declare the separator before the header: `sep=;`.
    const declared = /^"?sep=([^\w"])"?[,;\t]*$/i.exec(filled[0]?.line ?? "");
    if (declared !== null) {
        filled.shift();
    }
    const header = filled.shift()?.line ?? "";
    const separators = declared === null ? [",", ";", "\t"] : [declared[1]];
    const { separator, columns } = findColumns(header, separators);
    for (const { line, lineName } of filled) {
        const cells = splitLine(line, separator);
        if (cells === null) {
            const expected = "a cell in quotes must end on its line, before a separator";
            throw new Error(`${lineName}: ${expected}`);
        }
        if (cells.length !== columns.length) {
            const counts = `${cells.length} cells, but the first line has ${columns.length}`;
            throw new Error(`${lineName} has ${counts}`);
        }
        if (cells.some((cell) => cell.trim() !== "")) {
            const namedCells = columns.map((name, i) => [name, cells[i]]);
            yield { lineName, cells: Object.fromEntries(namedCells) };
        }
    }
}

// Returns a name in one Unicode form: Macs write an ä as two characters, other systems as one.
function sameForm(name) {
    return name.normalize("NFC");
}

// source: where the name was read, such as "line 2".
function findClass(source, name) {
    for (const spelled of [sameForm(name), sameForm(name.trim())]) {
        if (classes.includes(spelled)) {
            return spelled;
        }
    }
    throw new Error(`${source}: “${name}” is no class`);
}

// Returns the path in a URL. Label tools write paths as URLs.
function decodePath(path) {
    // The scheme and the host: `file://localhost/photos/a%20b.png`.
    const schemeAndHost = /^file:(\/\/(localhost)?)?/;
    try {
        return decodeURIComponent(path.replace(schemeAndHost, ""));
    } catch {
        return path;
    }
}

// Whether `path`, from a loaded file, means the image `key` of this page. For the key
// `photos/train/cat/1.png`, a file may have the absolute path `/home/me/photos/train/cat/1.png`, or
// `train/cat/1.png`, which is relative to --dataset_dir.
function namesKey(path, key) {
    const isAbsolute = path.endsWith(`/${key}`);
    const isInDataset = path.startsWith("train/") && key.endsWith(`/${path}`);
    return isAbsolute || isInDataset;
}

// Returns the key of the image that a file calls `name`.
function findKey(lineName, name, cardsByKey) {
    if (name.trim() === "") {
        throw new Error(`${lineName} has no ${column}`);
    }
    if (column === "index") {
        // Zeros before an index: `007`.
        const leadingZeros = /^0+(?=\d)/;
        return name.trim().replace(leadingZeros, "");
    }
    const spellings = [name, name.trim(), decodePath(name.trim())].map(sameForm);
    const known = spellings.find((spelled) => cardsByKey.has(spelled));
    if (known !== undefined) {
        return cardsByKey.get(known).key;
    }
    const similar = [...cardsByKey.keys()].filter((key) =>
        spellings.some((spelled) => namesKey(spelled, key)),
    );
    if (similar.length === 1) {
        return cardsByKey.get(similar[0]).key;
    }
    return name; // an image that is not on this page
}

// Returns [label, new_label] of a row. card: that of the image, undefined if the page has none.
// Throws a sentence if the label is not that of the card.
function readRow(lineName, cells, card) {
    const label = cells.label?.trim() ? findClass(lineName, cells.label) : "";
    // Empty if the image is not on this page, or if corrections were applied.
    const known = card?.fileLabel ?? "";
    if (label && known && label !== known) {
        throw new Error(`${lineName}: the label here is “${known}”, not “${label}”`);
    }
    const isExcluded = cells.new_label.trim() === leaveOut;
    const newLabel = isExcluded ? leaveOut : findClass(lineName, cells.new_label);
    return [known || label, newLabel];
}

// Returns the rows by key, and the number of rows without a decision, whose new_label is empty.
function readDecisions(text) {
    const cardsByKey = new Map(cards.map((card) => [sameForm(card.key), card]));
    const rows = new Map();
    let numEmpty = 0;
    for (const { lineName, cells } of readTable(text)) {
        if (cells.new_label.trim() === "") {
            numEmpty += 1;
            continue;
        }
        const key = findKey(lineName, cells[column], cardsByKey);
        if (rows.has(key)) {
            throw new Error(`${lineName}: ${key} has an earlier row`);
        }
        rows.set(key, readRow(lineName, cells, cardsByKey.get(sameForm(key))));
    }
    return { rows, numEmpty };
}

function decode(bytes) {
    try {
        return new TextDecoder("utf-8", { fatal: true }).decode(bytes);
    } catch {
        throw new Error("the file is not UTF-8 text");
    }
}

// Returns how many decisions of this page differ from the rows of a loaded file.
function countReplaced(rows) {
    readStorage();
    const replaced = [...rows].filter(([key, row]) => {
        const decision = decisions.get(key);
        return decision !== undefined && decision[1] !== row[1];
    });
    return replaced.length;
}

async function load(file) {
    try {
        const { rows, numEmpty } = readDecisions(decode(await file.arrayBuffer()));
        const numReplaced = countReplaced(rows);
        decideRows(rows);
        const numOnPage = cards.filter((card) => rows.has(card.key)).length;
        let notice = `Loaded ${count(rows.size, "decision")}, `;
        notice += `${numOnPage} of them for images on this page.`;
        if (numEmpty > 0) {
            notice += ` Ignored ${count(numEmpty, "row")} whose new_label is empty.`;
            notice += ` To leave an image out, write “${leaveOut}”.`;
        }
        if (numReplaced > 0) {
            notice += ` Replaced ${count(numReplaced, "decision")} of this page;`;
            notice += " Undo restores what was there.";
        }
        say(notice);
    } catch (error) {
        say(`Nothing was loaded: ${error.message}.`);
    }
}

// ---- Keys, buttons, and the start ----

// By value of a button.
const actions = {
    accept: () => decide(current.suggested),
    keep: () => decide(current.label),
    exclude: () => decide(leaveOut),
    other: () => byId("other").focus(),
    undo,
    save,
    load: () => byId("file").click(),
    copy,
    close: () => byId("copy").close(),
};

const actionsOfKeys = {
    enter: actions.accept,
    k: actions.keep,
    x: actions.exclude,
    c: actions.other,
    u: undo,
    "ctrl+z": undo,
    escape: leaveField,
    arrowleft: () => move(-1),
    arrowright: () => move(1),
    arrowup: () => move(-countColumns()),
    arrowdown: () => move(countColumns()),
};

// Goes back to the suspect. First it empties the field: when a field with a class name loses the
// focus, the browser reports a change, which would decide for that class.
function leaveField() {
    byId("other").value = "";
    go(current);
}

// Returns the typed character, with one exception: if a letter or digit key types something else
// without Shift (a Cyrillic letter, or & on the French key 1), returns what a US keyboard has
// there. With Shift, the typed character counts: `!` must not mean 1.
function nameOfKey(event) {
    const key = event.key.toLowerCase();
    // The position of a letter or digit on a US keyboard: `KeyK`.
    const position = /^(?:Key|Digit)(.)$/.exec(event.code);
    // A Latin letter or a digit: `k`.
    if (/^[a-z0-9]$/.test(key) || event.shiftKey || position === null) {
        return key;
    }
    return position[1].toLowerCase();
}

document.addEventListener("keydown", (event) => {
    if (event.altKey || byId("copy").open) {
        return;
    }
    const isWithCtrl = event.ctrlKey || event.metaKey;
    if (isWithCtrl && event.shiftKey) {
        return; // Ctrl+Shift+Z means redo elsewhere, and must not undo
    }
    const prefix = isWithCtrl ? "ctrl+" : "";
    const action = actionsOfKeys[prefix + nameOfKey(event)];
    // Menus and the text field use all keys but Escape.
    const isForField = event.target.matches("select, #other") && event.key !== "Escape";
    // Buttons and links use Enter.
    const isForButton = event.target.matches("button, a") && event.key === "Enter";
    if (!action || isForField || isForButton) {
        return;
    }
    event.preventDefault();
    if (!event.repeat || event.key.startsWith("Arrow")) {
        action();
    }
});

document.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    const card = cards.find(({ element }) => element.contains(event.target));
    // If decided cards are hidden, the next card moves under the pointer: without this, the second
    // click of a double-click would decide it unseen. Two clicks on Undo undo two decisions.
    if (button && button.value !== "undo" && event.detail > 1) {
        return;
    }
    if (card) {
        go(card);
    } else if (button && !byId("copy").contains(button)) {
        go(current); // the focus returns from the button to the card
    }
    if (button) {
        actions[button.value]();
    }
});

document.querySelector("header").addEventListener("change", () => {
    say("");
    draw();
    goToUndecided();
});

byId("file").addEventListener("click", (event) => {
    // Otherwise there is no "change" if the user chooses the same file again.
    event.target.value = "";
});

byId("file").addEventListener("change", (event) => {
    load(event.target.files[0]);
});

byId("other").addEventListener("change", (event) => {
    const name = event.target.value;
    // The field is emptied, because a browser suggests only classes that match the text in it.
    event.target.value = "";
    try {
        decide(findClass("Another class", name));
    } catch (error) {
        say(`${error.message}.`);
    }
});

addEventListener("storage", () => {
    readStorage();
    draw();
    if (!isShown(current)) {
        goToUndecided();
    }
});

new ResizeObserver(() => {
    const height = document.querySelector("nav").offsetHeight;
    document.documentElement.style.setProperty("--bar", `${height}px`);
}).observe(document.querySelector("nav"));

// For options, which cannot contain elements: these characters do what `bdi` does.
function markDirection(name) {
    return `\u2068${name}\u2069`;
}

function fillLists() {
    const texts = new Map();
    for (const card of cards) {
        const label = markDirection(card.label);
        texts.set(card.label, label);
        texts.set(pairOf(card), `${label} → ${markDirection(card.suggested)}`);
    }
    for (const value of [...texts.keys()].sort()) {
        byId("filter").append(make("option", { value }, texts.get(value)));
    }
    byId("classes").append(...classes.map((value) => make("option", { value })));
    for (const [digit, name] of digits) {
        const action = () => decide(name);
        actions[digit] = action;
        actionsOfKeys[digit] = action;
        const digitBefore = digit === name ? "" : `${digit} `;
        byId("digits").append(makeButton(digit, `→ ${name} (${digit})`, digitBefore, bdi(name)));
    }
    byId("digitHint").hidden = digits.length === 0;
}

addEventListener("load", () => {
    for (const card of cards) {
        card.element = makeCard(card);
        byId("cards").append(card.element);
    }
    fillLists();
    try {
        localStorage.getItem(fingerprint);
    } catch {
        isStored = false;
        warn("This browser cannot store your decisions: save the file before you close the page.");
    }
    readStorage();
    draw();
    if (decisions.size > 0) {
        goToUndecided();
    } else {
        current.element.focus({ preventScroll: true });
    }
});
</script>
"""


# ---- The script ----------------------------------------------------------------------------------


def print_next_steps(args, metadata, page_html):
    """Prints for each model the command that trains it again with the user's corrections."""
    if args.num_review > 0:
        print(
            f"Open {page_html} in a browser, review the suspects, save corrections.csv, and "
            "move it to the folder in which you run the scripts. Then train with it:"
        )
    else:
        print(
            "Write corrections.csv with the columns path (index if there are no files) and "
            f"new_label (a class, or '{pipeline.LEAVE_OUT}'). Then train with it:"
        )
    for checkpoint_dir, model_metadata in zip(args.checkpoint_dir, metadata, strict=True):
        recipe_and_hyperparameters = model_metadata["recipe"]
        command = pipeline.command(
            "train.py",
            args,
            **recipe_and_hyperparameters,
            seed=model_metadata["seed"],
            precision=model_metadata["precision"],
            device=model_metadata["device"],
            checkpoint_dir=checkpoint_dir,
            corrections="corrections.csv",
        )
        print(f"  {command}")


def write_tables_and_page(files, detection, num_review, cleaned):
    """Writes the csv files, and the page for the review; files: as `result_files` returns them."""
    require_no_added_columns(files.suspects)  # a user may have added some while the run computed
    write_suspects(files.suspects, detection)
    pipeline.remove_results(files.page, files.contact_sheet, files.curves, files.record)
    write_explanations(files.explanations, detection)
    write_page(files.page, detection, num_review, cleaned)


def main():
    """Parses, loads, ranks, reports."""
    args = parse_arguments()
    seconds = {}
    with pipeline.timed(seconds, "load"):
        runs, metadata, data = pipeline.load_runs(args, seconds)
        files = result_files(pipeline.result_folder(runs), args.factor_strategy)
        require_no_added_columns(files.suspects)

    detection, influence_paths = detect(
        runs,
        metadata,
        data,
        method=args.method,
        damping_factor=args.damping_factor,
        num_explained=args.explain,
        eigenvector_fraction=args.eigenvector_fraction,
        with_index=args.index,
    )
    if not pipeline.is_main_process():
        return

    num_corrupted = int(data.is_corrupted.sum())
    results = evaluate_rankings(detection.scores, data.is_corrupted.numpy())
    fields = {"num_train": len(data), "num_corrupted": num_corrupted, "rankings": results}
    with pipeline.timed(seconds, "report"):
        write_tables_and_page(files, detection, args.num_review, args.cleaned)
    with (
        pipeline.recorded(
            files.record,
            flags=vars(args),
            fields=fields,
            device=runs[0].data.images.device,
            seconds=seconds,
        ),
        pipeline.timed(seconds, "report"),
    ):
        plot_suspects(files.contact_sheet, detection)
        plot_curves(files.curves, detection, results)

    print_recall(results, args.method, num_corrupted)
    pipeline.print_seconds(seconds)
    written = [path for path in vars(files).values() if path.exists()]
    pipeline.print_paths([*influence_paths, *written])
    print_next_steps(args, metadata, files.page)


if __name__ == "__main__":
    pipeline.run(main)
