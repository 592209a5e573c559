"""Ranks the training images so that mislabeled ones come first.

A network has to memorise a mislabeled image. The margin of its label grows late in the training.
Its nearest neighbours have another label. In the end it strongly influences its own loss. The
script writes the ranking, a contact sheet of the most suspicious images, and a page in which a
person reviews them. Where the true labels are known, it also reports the recall of each ranking.
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

    description: what it measures, for --help; caption: its name in figures; colour, line: those of
    its curve. suspicion: a function of the signals that `measure` returns; float array [N], highest
    for the most suspicious image. needs_influence: whether it uses the signal `self_influence`.
    """

    description: str
    caption: str
    colour: str
    line: str
    suspicion: Callable
    needs_influence: bool = False


def standardise(values):
    """Returns values [N] with mean 0 and standard deviation 1, or zeros where all are equal."""
    return (values - values.mean()) / (values.std() or 1)


# The k-NN vote is weighted by the test accuracy to this power; see tests/studies/README.md.
VOTE_POWER = 3


def combine_aum_and_vote(signals):
    """Returns minus the sum, [N], of the area under the margin and the weighted k-NN vote.

    Both are standardised before.
    """
    weight = signals["accuracy"] ** VOTE_POWER
    return -standardise(signals["aum"]) - weight * standardise(signals["vote"])


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
        description="how many of the most similar training images have another label (k-NN vote)",
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
# The published ranking, the default, and the simplest one have thick lines in every figure.
MAIN_METHODS = ("self_influence", DEFAULT_METHOD, "loss")


def caption_of(name, strategy):
    """Returns the name of a ranking in figures; that of self-influence tells the curvature."""
    ranking = RANKINGS[name]
    return f"{ranking.caption} ({strategy})" if ranking.needs_influence else ranking.caption


# ---- Command line --------------------------------------------------------------------------------


def parse_arguments():
    """Reads the command line."""
    strategies = (*pipeline.STRATEGIES, pipeline.NO_INFLUENCE)
    parser = pipeline.influence_parser(__doc__, strategies)
    parser.set_defaults(factor_examples=1000)
    report = parser.groups["report"]
    meanings = "; ".join(f"{name}: {ranking.description}" for name, ranking in RANKINGS.items())
    needing = ", ".join(name for name, ranking in RANKINGS.items() if ranking.needs_influence)
    report.add_argument(
        "--method",
        choices=RANKINGS,
        default=DEFAULT_METHOD,
        help=f"what to rank the images by. {meanings}. --factor_strategy {pipeline.NO_INFLUENCE} "
        f"skips influence, and with it {needing} (default: %(default)s)",
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
        needs = f"--factor_strategy {pipeline.NO_INFLUENCE} computes no influence, which it needs"
        if args.explain:
            parser.error(f"argument --explain: {needs}; choose another strategy")
        if RANKINGS[args.method].needs_influence:
            parser.error(f"argument --method {args.method}: {needs}; choose another strategy")
    return args


# ---- Signals: what rankings are computed from ----------------------------------------------------

# The k-NN vote among 50,000 images; chosen among 500 to 50,000, see tests/studies/README.md.
NEIGHBOURS_OF_50_000 = 300


def measure(run, metadata, damping_factor):
    """Returns the signals of one model, its logits, and the file of its self-influence.

    The signals are float32 arrays [N]: `self_influence`; `aum`, the mean margin of the label in the
    training batches; `margin` and `loss` by the trained network; `vote`, of the nearest neighbours.
    `accuracy` is that on the test split, 0 to 1. An image that was in no training batch has its
    final margin as `aum`. logits: float32 [N, num_classes]. Without influence there is no
    `self_influence`, and the file is None. `aum`: Pleiss et al. 2020, section 3.1.
    """
    signals = {}
    scores_path = None
    if run.strategy != pipeline.NO_INFLUENCE:
        signals["self_influence"], scores_path = run.self_influence(damping_factor)
    with pipeline.timed(run.seconds, "report"):
        labels = run.data.labels
        epoch_margins = metadata["margins"].float()  # (epochs, N), NaN where an image was left out
        features, logits = compute_features(run)
        final_margin = pipeline.margin(logits, labels).cpu()
        was_never_drawn = epoch_margins.isnan().all(0)
        signals["aum"] = torch.where(was_never_drawn, final_margin, epoch_margins.nanmean(0))
        signals["margin"] = final_margin
        signals["loss"] = F.cross_entropy(logits, labels, reduction="none")
        signals["vote"] = knn_vote(features, labels, logits.shape[1])
        signals = {name: values.cpu().numpy() for name, values in signals.items()}
        signals["accuracy"] = metadata["accuracy"]["test"]
    return signals, logits.cpu(), scores_path


@torch.no_grad()
def compute_features(run):
    """Returns features, float32 [N, D], and logits, float32 [N, num_classes], of training images.

    Features are the inputs of the network's head, summed over an image and its mirror image, and
    scaled to unit length.
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

    It is the share of the k nearest images that have the label, less the largest share of another
    one. features: float32 [N, D] of unit length; labels: int64 [N]. Similarity is the cosine; k is
    300 of 50,000 images, and proportional to the square root of N.
    """
    k = round(NEIGHBOURS_OF_50_000 * (len(features) / 50_000) ** 0.5)
    k = max(1, min(len(features) - 1, k))
    rows_by_batch = torch.arange(len(features), device=features.device).split(1024)
    margins = []
    for rows in tqdm(rows_by_batch, "Neighbours", leave=False):
        similarity = features[rows] @ features.T  # (B, N)
        similarity.scatter_(1, rows[:, None], -torch.inf)  # an image is no neighbour of itself
        neighbours = similarity.topk(k, dim=1, sorted=False).indices  # (B, k)
        votes = labels[neighbours]
        counts = features.new_zeros(len(rows), num_classes)
        counts.scatter_add_(1, votes, features.new_ones(votes.shape))
        margins.append(pipeline.margin(counts / k, labels[rows]))
    return torch.cat(margins)


def rank(signals_by_model):
    """Returns the suspicion of each image, a float array [N], by name of the ranking.

    signals_by_model: the signals of each model, as `measure` returns them; their mean is ranked.
    Rankings that need influence are left out where it was not computed.
    """
    mean = {}
    for name in signals_by_model[0]:
        mean[name] = sum(signals[name] for signals in signals_by_model) / len(signals_by_model)
    return {
        name: ranking.suspicion(mean)
        for name, ranking in RANKINGS.items()
        if "self_influence" in mean or not ranking.needs_influence
    }


# ---- Explanations: which training images support or oppose a suspect's label ---------------------

NUM_EXPLAINING = 3  # images on either side
NUM_QUERIES_HELD = 1000


def explain(runs, data, suspects, damping_factor):
    """Returns the training images that most oppose and most support the label of each suspect.

    data: ImageData on the CPU; suspects: positions in it, int64 [M]. The result has a list of
    (rank, position, score) by suspect, opposing images first. A score is the influence on the
    log-odds of the label, the mean over the models; that of a suspect on itself is left out.
    """
    if len(suspects) == 0:
        return {}
    # Rounding might give each process other suspects, and all must share the same queries.
    positions = runs[0].from_main(suspects.tolist())
    queries = data.take(torch.tensor(positions)).to(runs[0].data.images.device)
    by_model = [
        run.pairwise_influence(queries, NUM_QUERIES_HELD, damping_factor)[0] for run in runs
    ]
    mean = sum(by_model) / len(by_model)  # (M, N)
    explanations = {}
    for suspect, influence in zip(positions, mean, strict=True):
        influence[suspect] = 0
        opposing = strongest(-influence, influence)
        supporting = strongest(influence, influence)
        explanations[suspect] = [*opposing, *supporting]
    return explanations


def strongest(strength, influence):
    """Returns (rank, position, influence) of the NUM_EXPLAINING images of greatest strength.

    strength, influence: float32 [N]. Images whose strength is not above 0 are left out.
    """
    positions = strength.argsort(descending=True)[:NUM_EXPLAINING].tolist()
    return [
        (place, position, influence[position].item())
        for place, position in enumerate(positions, start=1)
        if strength[position] > 0
    ]


# ---- One detection -------------------------------------------------------------------------------


class Detection(NamedTuple):
    """What was found out about the training images, `data`, ImageData on the CPU.

    scores: suspicion by ranking, float arrays [N]; method: the ranking that decides the order;
    order: positions in `data`, int64 [N], the most suspicious image first; logits: float32
    [N, num_classes], the mean over the models; explanations: see `explain`.
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


def detect(runs, metadata, data, *, method, damping_factor, num_explained):
    """Ranks the training images of the runs by a method of RANKINGS.

    runs, metadata, data: as `pipeline.load_runs` returns them. Returns the Detection, and the files
    of self-influence that were computed.
    """
    measured = [
        measure(run, of_run, damping_factor) for run, of_run in zip(runs, metadata, strict=True)
    ]
    signals, logits, score_paths = zip(*measured, strict=True)
    scores = rank(signals)
    order = np.argsort(-scores[method], kind="stable")
    detection = Detection(
        data=data,
        method=method,
        strategy=runs[0].strategy,
        scores=scores,
        order=order,
        logits=sum(logits) / len(logits),
        explanations=explain(runs, data, order[:num_explained], damping_factor),
    )
    return detection, [path for path in score_paths if path is not None]


# ---- Evaluation against known labels -------------------------------------------------------------


def detection_curve(scores, is_corrupted):
    """Returns the recall after inspecting 1 %, 2 %, ..., 100 % of the images, highest scores first.

    scores: float [N]; is_corrupted: bool [N], at least one true. Equal scores are inspected in the
    order of their index.
    """
    hits = is_corrupted[np.argsort(-scores, kind="stable")]
    recall = np.concatenate([[0.0], np.cumsum(hits) / hits.sum()])  # after 0, 1, ..., N images
    curve = []
    for percent in range(1, 101):
        num_inspected = round(percent / 100 * len(scores))
        curve.append({"inspected": percent / 100, "recall": float(recall[num_inspected])})
    return curve


def ranks(scores):
    """Returns the rank of each score [N], 1 for the lowest; equal scores share their mean rank."""
    _, group, sizes = np.unique(scores, return_inverse=True, return_counts=True)
    return (np.cumsum(sizes) - (sizes - 1) / 2)[group]


def auroc(scores, is_corrupted):
    """Returns the probability that a random corrupted image scores above a random clean one.

    Ties count half. scores: float [N]; is_corrupted: bool [N], both kinds present.
    """
    num_corrupted = is_corrupted.sum()
    rank_sum = ranks(scores)[is_corrupted].sum()
    u_statistic = rank_sum - num_corrupted * (num_corrupted + 1) / 2  # Mann-Whitney
    return float(u_statistic / (num_corrupted * (len(scores) - num_corrupted)))


def average_precision(scores, is_corrupted):
    """Returns the mean, over the corrupted images, of the precision down to each one's rank.

    scores: float [N]; is_corrupted: bool [N], at least one true. Equal scores are ranked in the
    order of their index.
    """
    hits = is_corrupted[np.argsort(-scores, kind="stable")]
    precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
    return float(precision[hits].mean())


def evaluate_ranking(scores, is_corrupted):
    """Returns the json entry of one ranking, a dictionary."""
    curve = detection_curve(scores, is_corrupted)
    return {
        "curve": curve,
        "recall_at_10": curve[9]["recall"],
        "recall_at_20": curve[19]["recall"],
        "auroc": auroc(scores, is_corrupted),
        "average_precision": average_precision(scores, is_corrupted),
    }


def evaluate_rankings(scores, is_corrupted):
    """Returns the json entry of each ranking by name.

    There are none where no label is corrupted, or all are.
    """
    if is_corrupted.all() or not is_corrupted.any():
        return {}
    return {name: evaluate_ranking(values, is_corrupted) for name, values in scores.items()}


def print_recall(results, method):
    """Prints the recall of each ranking, in percent, and that of `method` in a sentence."""
    if not results:
        print(
            "No label is known to be wrong, so there is no truth to compare with: "
            "review the suspects."
        )
        return
    percents = (1, 5, 10, 20, 30, 50)
    print(f"{'inspected':16}" + "".join(f"{percent:6} %" for percent in percents) + "    AUROC")
    for name, result in results.items():
        recalls = [100 * result["curve"][percent - 1]["recall"] for percent in percents]
        cells = "".join(f"{recall:6.1f} %" for recall in recalls)
        print(f"{name:16}{cells}   {result['auroc']:.4f}")
    at_10 = 100 * results[method]["recall_at_10"]
    at_20 = 100 * results[method]["recall_at_20"]
    print(
        f"Inspecting 10 % of the training set finds {at_10:.1f} % of the mislabeled images "
        f"(20 %: {at_20:.1f} %)."
    )


# ---- Tables and figures --------------------------------------------------------------------------

# Those of `suspects_<strategy>.csv`, in their order; the rankings stand between them.
FIRST_COLUMNS = ("rank", "index", "path", "label", "predicted_label")
LAST_COLUMNS = ("is_corrupted", "duplicate_of")
# All that this script has ever written there: any other column was added by a person.
OWN_COLUMNS = {*FIRST_COLUMNS, *RANKINGS, *LAST_COLUMNS, "class_name", "predicted_class_name"}
OWN_COLUMNS |= {"combined", "aum_margin", "margin_vote", "self_influence_checkpoints", "grad_norm"}
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


def require_unedited(path):
    """Raises UserError where the table to be replaced has a column that a person added."""
    if not path.exists():
        return
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        columns = next(csv.reader(file), [])
    added = [column for column in columns if column not in OWN_COLUMNS]
    if added:
        raise pipeline.UserError(
            f"{path} has columns that this script does not write ({', '.join(added):.100}), "
            "and would be replaced: move it, or name another --output_dir"
        )


def write_suspects(path, detection):
    """Writes every training image to a csv file, the most suspicious one first."""
    data = detection.data
    indices = data.indices.tolist()
    labels = data.labels.tolist()
    predicted = detection.predicted.tolist()
    is_corrupted = data.is_corrupted.tolist()
    duplicate_of = pipeline.duplicate_of(data)
    rows = []
    for place, position in enumerate(detection.order.tolist(), start=1):
        row = [
            place,
            indices[position],
            data.paths[position],
            data.class_names[labels[position]],
            data.class_names[predicted[position]],
        ]
        row += [values[position] for values in detection.scores.values()]
        first_copy = duplicate_of[position]
        row += [int(is_corrupted[position]), first_copy if first_copy >= 0 else ""]
        rows.append(row)
    pipeline.write_table(path, [*FIRST_COLUMNS, *detection.scores, *LAST_COLUMNS], rows)


def write_explanations(path, detection):
    """Writes the explanations to a csv file, or removes an earlier file if there are none."""
    if not detection.explanations:
        path.unlink(missing_ok=True)
        return
    data = detection.data
    rows = []
    for suspect, images in detection.explanations.items():
        for place, image, score in images:
            label = data.class_names[data.labels[image]]
            rows.append(
                [data.indices[suspect].item(), place, data.indices[image].item(), label, score]
            )
    pipeline.write_table(path, ["suspect", "rank", "image", "label", "score"], rows)


def plot_suspects(path, detection):
    """Draws a contact sheet of the most suspicious images with their labels and scores."""
    data, predicted = detection.data, detection.predicted
    shown = detection.order[:NUM_PICTURED].tolist()
    texts, colours = [], []
    for position in shown:
        given = data.class_names[data.labels[position]]
        guess = data.class_names[predicted[position]]
        score = f"{detection.suspicion[position]:.3g}"
        texts.append(f"{pipeline.shorten(given)} →\n{pipeline.shorten(guess)}\n{score}")
        colours.append("black" if given == guess else "firebrick")
    title = (
        f"The {len(shown)} most suspicious of {len(data)} training images by {detection.caption}:\n"
        "given label → predicted label (red where they differ), score"
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

    results: by ranking, of `evaluate_rankings`; if there are none, an earlier figure is removed.
    MAIN_METHODS and the chosen one have thick lines.
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
    """Returns a dictionary for each card of the page, and the positions of all images in it.

    cleaned: whether labels are those after corrections. A `tile` is the place of an image among all
    images of the page.
    """
    data, logits = detection.data, detection.logits
    names = data.class_names
    suggestions = logits.scatter(1, data.labels[:, None], -torch.inf).argmax(1)
    positions = detection.order[:num_review].tolist()
    tiles = {position: tile for tile, position in enumerate(positions)}
    cards = []
    for place, position in enumerate(positions, start=1):
        path, index = data.paths[position], data.indices[position].item()
        label, suggested = data.labels[position], suggestions[position]
        percent = 100 * logits[position].softmax(0)
        explaining = []
        for _, image, score in detection.explanations.get(position, ()):
            tile = tiles.setdefault(image, len(tiles))
            side = "supports" if score > 0 else "opposes"
            explaining.append({"tile": tile, "side": side, "label": names[data.labels[image]]})
        card = {
            "rank": place,
            "key": path or str(index),
            "name": Path(path).name or f"image {index}",
            "link": Path(path).absolute().as_uri() if path else "",
            "tile": tiles[position],
            "label": names[label],
            "labelPercent": f"{percent[label]:.1f}",
            "suggested": names[suggested],
            "suggestedPercent": f"{percent[suggested]:.1f}",
            "score": f"{detection.suspicion[position]:.3g}",
            # The column `label` of the saved file: train.py compares it with the uncleaned label.
            "fileLabel": "" if cleaned else names[label],
            "explaining": explaining,
        }
        cards.append(card)
    return cards, list(tiles)


def draw_tiles(images):
    """Returns images, uint8 [N, 3, 32, 32], in the rows of one square JPEG, as a data URI."""
    from PIL import Image

    size = pipeline.IMAGE_SIZE
    side = math.ceil(len(images) ** 0.5)
    tiles = np.zeros((side * side, size, size, 3), np.uint8)
    tiles[: len(images)] = images.permute(0, 2, 3, 1).numpy()
    rows = tiles.reshape(side, side, size, size, 3).swapaxes(1, 2)  # (side, size, side, size, 3)
    picture = Image.fromarray(rows.reshape(side * size, side * size, 3))
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=95, subsampling=0)  # a third of a PNG
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"


def digit_keys(class_names):
    """Returns (digit, class name) for the key that chooses each class; none for over ten classes.

    Classes that are called by digits are chosen by their own names.
    """
    if len(class_names) > 10:
        return []
    if all(re.fullmatch("[0-9]", name) for name in class_names):
        return [(name, name) for name in class_names]
    return list(zip("1234567890", class_names, strict=False))


def write_page(path, detection, num_review, cleaned):
    """Writes the page of the first `num_review` suspects, or removes an earlier one if that is 0.

    cleaned: whether labels are those after corrections. The browser keeps decisions under the hash
    of images, labels, paths and ranking. A page of another ranking begins without them.
    """
    if not num_review:
        path.unlink(missing_ok=True)
        return
    data = detection.data
    cards, positions = describe_suspects(detection, num_review, cleaned)
    ranking = torch.from_numpy(detection.order), torch.from_numpy(detection.suspicion)
    facts = {
        "fingerprint": pipeline.sha256(data.digest, json.dumps(data.paths), *ranking),
        "column": "path" if any(data.paths) else "index",
        "classes": data.class_names,
        "leaveOut": pipeline.LEAVE_OUT,
        "digits": digit_keys(data.class_names),
        "cards": cards,
    }
    title = f"The {len(cards)} most suspicious of {len(data):,} training images"
    hint = ""
    if cleaned:
        hint = "The labels are those after cleaning: load your earlier corrections.csv first."
    page = build_page(f"{title} by {detection.caption}", hint, data.images[positions], facts)
    with pipeline.atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def build_page(title, hint, images, facts):
    """Returns PAGE with its contents.

    Names stay data: no `<` is left in them, and only PAGE's own code may run.
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
.left {
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
<kbd>x</kbd> leaves the image out, <kbd>c</kbd> is for another class,
<kbd>u</kbd> undoes, arrows move<span id="digitHint">, and digits choose a class</span>.
On a keyboard with other letters, the keys in the same places work.
</p>
<select id="filter" aria-label="Show one class or one pair of classes">
<option value="">every class and pair (given → suggested)</option>
</select>
<label><input type="checkbox" id="undecided">undecided only</label>
</header>
<nav aria-label="Progress, file and classes">
<progress id="done" aria-label="Suspects decided"></progress>
<span id="counts"></span>
<button value="u">Undo</button>
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
const facts = JSON.parse(byId("data").textContent);
const { fingerprint, column, classes, leaveOut, digits, cards } = facts;

// ---- Decisions ----

// What the file holds, by path or index of an image: [label, new_label].
let decisions = new Map();
// For undo: the rows before each change, and the card at which it was made.
const earlier = [];
let storage = {};
let current = cards[0];

function say(text) {
    byId("notice").textContent = text;
}

// What remains true stays in sight beside the latest notice.
function warn(text) {
    byId("warning").textContent = text;
}

function count(number, noun) {
    return number === 1 ? `1 ${noun}` : `${number} ${noun}s`;
}

// Another window of this page may have decided in the meantime.
function readStorage() {
    const stored = storage[fingerprint];
    if (stored === undefined) {
        return;
    }
    try {
        decisions = new Map(JSON.parse(stored));
    } catch {
        warn("What the browser kept of earlier decisions is damaged: load your saved file.");
    }
}

function writeStorage() {
    const text = JSON.stringify([...decisions]);
    try {
        storage[fingerprint] = text;
    } catch {
        storage = { [fingerprint]: text };
        warn("The browser keeps no more: save the file before you close the page.");
    }
}

// Enters rows by path or index; a row that is undefined is removed.
function enter(rows) {
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

function change(rows) {
    readStorage();
    const before = [...rows.keys()].map((key) => [key, decisions.get(key)]);
    earlier.push({ rows: new Map(before), card: current });
    enter(rows);
    goToUndecided();
}

function undo() {
    const last = earlier.pop();
    if (last === undefined) {
        say("There is nothing to undo.");
        return;
    }
    readStorage();
    enter(last.rows);
    go(last.card);
}

function decide(newLabel) {
    if (isShown(current)) {
        say("");
        change(new Map([[current.key, [current.fileLabel, newLabel]]]));
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

// A name written from right to left must not turn the text around it.
function isolated(name) {
    return make("bdi", {}, name);
}

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
    return make("div", {}, `${text}: `, isolated(name), ` (${percent}\u00a0%)`);
}

function makeButton(value, title, ...children) {
    return make("button", { value, title }, ...children);
}

function makeCard(card) {
    const link = make("a", { title: card.key, target: "_blank" }, isolated(card.name));
    if (card.link) {
        link.href = card.link;
    }
    const texts = make("div", {},
        makeFact("given", card.label, card.labelPercent),
        makeFact("suggested", card.suggested, card.suggestedPercent),
        `score ${card.score}`,
        link);
    const explaining = card.explaining.map(({ tile, side, label }) => {
        const image = drawTile(tile, `image of ${label}`);
        return make("div", { class: side }, image, `${side}: `, isolated(label));
    });
    const buttons = [
        makeButton("enter", `→ ${card.suggested} (Enter)`, "→ ", isolated(card.suggested)),
        makeButton("k", `keep ${card.label} (k)`, "keep ", isolated(card.label)),
        makeButton("x", "leave out (x)", "leave out"),
        makeButton("c", "another class (c)", "other…"),
    ];
    return make("article", { tabindex: -1 },
        make("h2", {}),
        make("div", { class: "facts" }, drawTile(card.tile, `suspect ${card.rank}`), texts),
        make("div", { class: "explaining" }, ...explaining),
        make("div", { class: "buttons" }, ...buttons));
}

// The state of a card and its text: "changed" and "→ frog".
function describe(card) {
    const row = decisions.get(card.key);
    if (row === undefined) {
        return { state: "undecided", text: ["undecided"] };
    }
    const newLabel = row[1];
    if (newLabel === leaveOut) {
        return { state: "left out", text: ["left out"] };
    }
    if (newLabel === card.label) {
        return { state: "kept", text: ["kept"] };
    }
    return { state: "changed", text: ["→ ", isolated(newLabel)] };
}

function draw() {
    const counts = { undecided: 0, kept: 0, changed: 0, "left out": 0 };
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
        `${counts["left out"]} left out`,
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

// From the current card on, and from the first one when the end is reached.
function goToUndecided() {
    const start = cards.indexOf(current);
    const shown = [...cards.slice(start), ...cards.slice(0, start)].filter(isShown);
    const undecided = shown.find((card) => !decisions.has(card.key));
    if (shown.length === 0) {
        say("No suspect is left here: save the file, or show other suspects.");
    }
    go(undecided ?? shown[0] ?? current);
}

function move(step) {
    const shown = cards.filter(isShown);
    go(shown[shown.indexOf(current) + step] ?? current);
}

function countColumns() {
    return getComputedStyle(byId("cards")).gridTemplateColumns.split(" ").length;
}

// ---- The file: as train.py reads it ----

function fileText() {
    // A cell must end on its line: a name with a line break is percent-encoded.
    const encode = (key) => (/[\r\n]/.test(key) ? encodeURI(key) : key);
    const rows = [...decisions].map(([key, row]) => [encode(key), ...row]);
    const table = [[column, "label", "new_label"], ...rows];
    const needsQuotes = /[",;\t]|^ | $/;
    const quote = (cell) => (needsQuotes.test(cell) ? `"${cell.replaceAll('"', '""')}"` : cell);
    return table.map((cells) => `${cells.map(quote)}\n`).join("");
}

// A frame or a page without storage may be forbidden to save files, and is not told so.
function mayBeSandboxed() {
    return window !== window.top || Object.getPrototypeOf(storage) === Object.prototype;
}

function save() {
    const text = fileText();
    const url = URL.createObjectURL(new Blob([text]));
    make("a", { href: url, download: "corrections.csv" }).click();
    say(`Saved ${count(decisions.size, "decision")}.`);
    if (mayBeSandboxed()) {
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

// Returns the cells of a line, or null where its quotes are wrong.
function splitLine(line, separator) {
    const quoted = `"((?:[^"]|"")*)"`;
    const plain = `((?! *")[^\\${separator}]*)`;
    const nextCell = new RegExp(`(?:${quoted}|${plain})\\${separator}`, "y");
    const text = line + separator;
    const cells = [];
    while (nextCell.lastIndex < text.length) {
        const match = nextCell.exec(text);
        if (match === null) {
            return null;
        }
        cells.push(match[1] === undefined ? match[2] : match[1].replaceAll('""', '"'));
    }
    return cells;
}

// Returns the separator that divides the first line, and the names of the columns.
function findColumns(header, separators) {
    for (const separator of separators) {
        const cells = splitLine(header, separator) ?? [];
        const columns = cells.map((name) => name.trim().toLowerCase());
        if (!columns.includes(column) || !columns.includes("new_label")) {
            continue;
        }
        const doubled = columns.find((name, i) => name !== "" && columns.indexOf(name) !== i);
        if (doubled !== undefined) {
            throw new Error(`the column ${doubled} is there twice`);
        }
        return { separator, columns };
    }
    const needed = `the columns ${column} and new_label`;
    throw new Error(`its first line must name ${needed}, but is “${header}”`);
}

// Yields the place and the cells, by name, of each row. Throws a sentence about the first mistake.
function* readTable(text) {
    const lines = text.split(/\r\n|\r|\n/).map((line, i) => ({ line, place: `line ${i + 1}` }));
    const filled = lines.filter(({ line }) => line.trim() !== "");
    const declared = /^"?sep=([^\w"])"?[,;\t]*$/i.exec(filled[0]?.line ?? "");
    if (declared !== null) {
        filled.shift();
    }
    const header = filled.shift()?.line ?? "";
    const separators = declared === null ? [",", ";", "\t"] : [declared[1]];
    const { separator, columns } = findColumns(header, separators);
    for (const { line, place } of filled) {
        const cells = splitLine(line, separator);
        if (cells === null) {
            throw new Error(`${place}: a cell in quotes must end on its line, before a separator`);
        }
        if (cells.length !== columns.length) {
            const counts = `${cells.length} cells, but the first line has ${columns.length}`;
            throw new Error(`${place} has ${counts}`);
        }
        if (cells.some((cell) => cell.trim() !== "")) {
            yield { place, cells: Object.fromEntries(columns.map((name, i) => [name, cells[i]])) };
        }
    }
}

// In one Unicode form: Macs write an ä as two characters, others as one.
function sameForm(name) {
    return name.normalize("NFC");
}

function findClass(place, name) {
    for (const spelled of [sameForm(name), sameForm(name.trim())]) {
        if (classes.includes(spelled)) {
            return spelled;
        }
    }
    throw new Error(`${place}: “${name}” is no class`);
}

// The path in a URL, as label tools write it.
function decodePath(path) {
    try {
        return decodeURIComponent(path.replace(/^file:(\/\/(localhost)?)?/, ""));
    } catch {
        return path;
    }
}

function findKey(place, name, cardsByKey) {
    if (name.trim() === "") {
        throw new Error(`${place} has no ${column}`);
    }
    if (column === "index") {
        return name.trim().replace(/^0+(?=\d)/, "");
    }
    const spellings = [name, name.trim(), decodePath(name.trim())];
    const known = spellings.map(sameForm).find((spelled) => cardsByKey.has(spelled));
    return cardsByKey.get(known)?.key ?? name;
}

// The row of the file as this page keeps it. Throws where it does not fit the card.
function readRow(place, cells, card) {
    const label = cells.label?.trim() ? findClass(place, cells.label) : "";
    if (label && card?.fileLabel && label !== card.fileLabel) {
        throw new Error(`${place}: the label here is “${card.fileLabel}”, not “${label}”`);
    }
    const leavesOut = cells.new_label.trim() === leaveOut;
    const newLabel = leavesOut ? leaveOut : findClass(place, cells.new_label);
    return [card?.fileLabel || label, newLabel];
}

// Returns the rows by path or index, and how many others have an empty new_label: undecided ones.
function readDecisions(text) {
    const cardsByKey = new Map(cards.map((card) => [sameForm(card.key), card]));
    const rows = new Map();
    let numEmpty = 0;
    for (const { place, cells } of readTable(text)) {
        if (cells.new_label.trim() === "") {
            numEmpty += 1;
            continue;
        }
        const key = findKey(place, cells[column], cardsByKey);
        if (rows.has(key)) {
            throw new Error(`${place}: ${key} has a row before this one`);
        }
        rows.set(key, readRow(place, cells, cardsByKey.get(sameForm(key))));
    }
    return { rows, numEmpty };
}

function decode(bytes) {
    try {
        return new TextDecoder("utf-8", { fatal: true }).decode(bytes);
    } catch {
        throw new Error("it is not a text in UTF-8");
    }
}

async function load(file) {
    try {
        const { rows, numEmpty } = readDecisions(decode(await file.arrayBuffer()));
        change(rows);
        const numShown = cards.filter((card) => rows.has(card.key)).length;
        let notice = `Loaded ${count(rows.size, "decision")}, ${numShown} about images shown here.`;
        if (numEmpty > 0) {
            notice += ` Ignored ${count(numEmpty, "row")} whose new_label is empty.`;
            notice += ` To leave an image out, write “${leaveOut}”.`;
        }
        say(notice);
    } catch (error) {
        say(`Nothing was loaded: ${error.message}.`);
    }
}

// ---- Keys, buttons, and the start ----

const actions = {
    enter: () => decide(current.suggested),
    a: () => decide(current.suggested),
    k: () => decide(current.label),
    x: () => decide(leaveOut),
    c: () => byId("other").focus(),
    u: undo,
    "ctrl+z": undo,
    save,
    load: () => byId("file").click(),
    copy,
    close: () => byId("copy").close(),
    escape: () => go(current),
    arrowleft: () => move(-1),
    arrowright: () => move(1),
    arrowup: () => move(-countColumns()),
    arrowdown: () => move(countColumns()),
};

// A layout without Latin letters, or with digits behind Shift: there the place of the key decides.
function nameOfKey(event) {
    const key = event.key.toLowerCase();
    const place = /^(?:Key|Digit)(.)$/.exec(event.code);
    if (/^[a-z0-9]$/.test(key) || event.shiftKey || place === null) {
        return key;
    }
    return place[1].toLowerCase();
}

document.addEventListener("keydown", (event) => {
    if (event.altKey || byId("copy").open) {
        return;
    }
    const prefix = event.ctrlKey || event.metaKey ? "ctrl+" : "";
    const action = actions[prefix + nameOfKey(event)];
    const busy = event.key === "Enter" ? "button, a, select, #other" : "select, #other";
    if (!action || (event.target.matches(busy) && event.key !== "Escape")) {
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
    // The second click of a double click would decide about the card that has moved there.
    if (button && button.value !== "u" && event.detail > 1) {
        return;
    }
    if (card) {
        go(card);
    } else if (button && !byId("copy").contains(button)) {
        go(current);
    }
    if (button) {
        actions[button.value]();
    }
});

document.querySelector("header").addEventListener("change", () => {
    draw();
    goToUndecided();
});

byId("file").addEventListener("click", (event) => {
    event.target.value = "";
});

byId("file").addEventListener("change", (event) => {
    load(event.target.files[0]);
});

byId("other").addEventListener("change", (event) => {
    const name = event.target.value;
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

function fillLists() {
    const isolate = (name) => `\u2068${name}\u2069`;
    const texts = new Map();
    for (const card of cards) {
        texts.set(card.label, isolate(card.label));
        texts.set(pairOf(card), `${isolate(card.label)} → ${isolate(card.suggested)}`);
    }
    for (const value of [...texts.keys()].sort()) {
        byId("filter").append(make("option", { value }, texts.get(value)));
    }
    byId("classes").append(...classes.map((value) => make("option", { value })));
    for (const [digit, name] of digits) {
        actions[digit] = () => decide(name);
        const key = digit === name ? [] : [`${digit} `];
        byId("digits").append(makeButton(digit, `→ ${name} (${digit})`, ...key, isolated(name)));
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
        storage = localStorage;
    } catch {
        warn("This browser keeps nothing: save the file before you close the page.");
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
    """Prints the command that trains as before, but with the corrections of the user."""
    if args.num_review:
        print(
            f"Open {page_html} in a browser, decide, and save corrections.csv here. "
            "Then train with it:"
        )
    else:
        print(
            "Write corrections.csv with the columns path (or index) and new_label "
            f"(a class, or '{pipeline.LEAVE_OUT}'). Then train with it:"
        )
    same = {name: metadata[name] for name in ("seed", "precision", "device")}
    command = pipeline.command(
        "train.py",
        args,
        **metadata["recipe"],
        **same,
        checkpoint_dir=args.checkpoint_dir[0],
        corrections="corrections.csv",
    )
    print(f"  {command}")


def main():
    """Parses, loads, ranks, reports."""
    args = parse_arguments()
    seconds = {}
    with pipeline.timed(seconds, "load"):
        runs, metadata, data = pipeline.load_runs(args, seconds)
        files = result_files(pipeline.result_folder(runs), args.factor_strategy)
        require_unedited(files.suspects)

    detection, score_paths = detect(
        runs,
        metadata,
        data,
        method=args.method,
        damping_factor=args.damping_factor,
        num_explained=args.explain,
    )
    if not pipeline.is_main_process():
        return

    is_corrupted = data.is_corrupted.numpy()
    results = evaluate_rankings(detection.scores, is_corrupted)
    fields = {"num_train": len(data), "num_corrupted": int(is_corrupted.sum()), "rankings": results}
    with pipeline.timed(seconds, "report"):
        write_suspects(files.suspects, detection)
        write_explanations(files.explanations, detection)
        write_page(files.page, detection, args.num_review, args.cleaned)
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

    print_recall(results, args.method)
    pipeline.print_seconds(seconds)
    written = [path for path in vars(files).values() if path.exists()]
    pipeline.print_paths([*score_paths, *written])
    print_next_steps(args, metadata[0], files.page)


if __name__ == "__main__":
    pipeline.run(main)
