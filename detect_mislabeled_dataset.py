"""Ranks the training images so that mislabeled ones come first.

A mislabeled image is one the network has to memorise: the margin of its label grows late in the training, its nearest
neighbours have another label, and in the end it has a large influence on its own loss. The script writes the ranking,
a contact sheet of its top, and a page in which a person decides about the suspects. Where labels were corrupted on
purpose, it also says how many each ranking finds.
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
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import pipeline

NUM_PICTURED = 100
# Chosen among 500 to 50,000 images; see tests/studies/README.md. The vote is weighted by accuracy to this power.
VOTE_POWER, NEIGHBOURS_OF_50_000 = 3, 300


class Ranking(NamedTuple):
    """What suspects can be ranked by: what pictures call it, colour and line of its curve, and the signal.

    suspicion: function of the dictionary that `measure` returns; an array [N], highest for the most suspicious.
    """

    caption: str
    colour: str
    line: str
    suspicion: Callable


RANKINGS = {
    "self_influence": Ranking(
        "self-influence", "#0b5394", "-", lambda found: found["self_influence"]
    ),
    "aum": Ranking("area under the margin", "#d55e00", "--", lambda found: -found["aum"]),
    "loss": Ranking("loss", "#e69f00", ":", lambda found: found["loss"]),
    "margin": Ranking("margin", "#cc79a7", "-.", lambda found: -found["margin"]),
    "vote": Ranking("neighbours' vote", "#009e73", "--", lambda found: -found["vote"]),
    "aum_vote": Ranking(
        *("area under the margin + weighted neighbours' vote", "#7b3294", "-"),
        lambda found: (
            -standardise(found["aum"])
            - found["accuracy"] ** VOTE_POWER * standardise(found["vote"])
        ),
    ),
}
DEFAULT = "aum_vote"
COLUMNS = ["rank", "index", "path", "label", "predicted_label", *RANKINGS, "is_corrupted"]


def parse_arguments():
    """Reads the command line."""
    parser = pipeline.influence_parser(__doc__)
    parser.set_defaults(factor_examples=1000)
    meanings = "; ".join(f"{name}: {ranking.caption}" for name, ranking in RANKINGS.items())
    parser.add_argument(
        "--method", choices=RANKINGS, default=DEFAULT, help=f"{meanings} (default: %(default)s)"
    )
    count = {"type": pipeline.whole_number, "metavar": "N"}
    explained = "say of N suspects which images speak for and against their label (default: none)"
    parser.add_argument(
        "--num_review", **count, default=500, help="suspects on the page (default: %(default)s)"
    )
    parser.add_argument("--explain", **count, default=0, help=explained)
    return parser.parse_args()


# ---- Rankings and what they find -----------------------------------------------------------------


def measure(run, metadata, damping_factor):
    """Returns what rankings are made of, a dictionary; logits, float32 [N, num_classes]; and the scores' file.

    It has float32 arrays [N]: the self-influence of each training image, its area under the margin, its loss and margin
    by the finished network, and its neighbours' vote. The area is the mean over the epochs of the margin in the
    training batch, or of images that were in none the margin in the end. `accuracy` is that on the test images, 0 to 1.
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
        found = {name: values.cpu().numpy() for name, values in found.items()}
        return found | {"accuracy": metadata["accuracy"]["test"]}, logits.cpu(), path


@torch.no_grad()
def compute_features(run):
    """Returns what the last layer sees of each training image, float32 [N, 128], of length one, and logits, [N, C].

    The features are the mean of those of an image and of its mirror image.
    """
    run.model.eval()
    features, logits = [], []
    with torch.autocast(run.data.images.device.type, run.dtype, enabled=run.dtype != torch.float32):
        for batch in tqdm(run.data.images.split(run.batch_size), "Features", leave=False):
            images = run.data.normalize(batch)
            features.append(run.model.features(images))
            logits.append(run.model.logits(features[-1]))
            features[-1] = features[-1].float() + run.model.features(images.flip(3)).float()
    return F.normalize(torch.cat(features), dim=1), torch.cat(logits)


def neighbours_vote(features, labels, num_classes):
    """Returns the share of an image's nearest neighbours that have its label, less the largest of another label, [N].

    features: float32 [N, D] of length one; labels: int64 [N]. They are 300 of 50,000 images, and of fewer in proportion
    to the square root.
    """
    count = max(
        1, min(len(features) - 1, round(NEIGHBOURS_OF_50_000 * (len(features) / 50_000) ** 0.5))
    )
    found = []
    for rows in tqdm(
        torch.arange(len(features), device=features.device).split(1024), "Neighbours", leave=False
    ):
        similarity = (features[rows] @ features.T).scatter_(
            1, rows[:, None], -torch.inf
        )  # not of itself
        votes = labels[similarity.topk(count, dim=1, sorted=False).indices]  # (B, count)
        counts = features.new_zeros(len(rows), num_classes).scatter_add_(
            1, votes, features.new_ones(votes.shape)
        )
        found.append(pipeline.margin(counts / count, labels[rows], torch.amax))
    return torch.cat(found)


def standardise(values):
    """Returns values [N] with a mean of zero and a standard deviation of one, or zeros where all are equal."""
    return (values - values.mean()) / (values.std() or 1)


def rank(measured):
    """Returns what each ranking orders the images by, the most suspicious highest: float arrays [N] by name.

    measured: dictionaries of `measure`, one a model, of which the mean is taken.
    """
    mean = {name: sum(found[name] for found in measured) / len(measured) for name in measured[0]}
    return {name: ranking.suspicion(mean) for name, ranking in RANKINGS.items()}


def detection_curve(scores, is_corrupted):
    """Returns, at every 1 % of the images inspected in order of falling score, the fraction of corrupted ones found.

    scores: float [N]; is_corrupted: bool [N], at least one true. Equal scores are inspected in order of index.
    """
    found = np.cumsum(is_corrupted[np.argsort(-scores, kind="stable")]) / is_corrupted.sum()
    found = np.concatenate([[0.0], found])  # after inspecting 0, 1, ..., N images
    return [
        {"inspected": p / 100, "recall": float(found[round(p / 100 * len(scores))])}
        for p in range(1, 101)
    ]


def ranks(scores):
    """Returns the place of each score [N] among the N, 1 for the lowest; equal scores share the mean of theirs."""
    _, group, sizes = np.unique(scores, return_inverse=True, return_counts=True)
    return (np.cumsum(sizes) - (sizes - 1) / 2)[group]


def auroc(scores, is_corrupted):
    """Returns the probability that a random corrupted image scores above a random clean one, ties counting half.

    scores: float [N]; is_corrupted: bool [N], both kinds present.
    """
    positives = is_corrupted.sum()
    above = (
        ranks(scores)[is_corrupted].sum() - positives * (positives + 1) / 2
    )  # the Mann-Whitney U statistic
    return float(above / (positives * (len(scores) - positives)))


def average_precision(scores, is_corrupted):
    """Returns the mean, over the corrupted images, of the precision down to each one's place in the ranking.

    scores: float [N]; is_corrupted: bool [N], at least one true. Equal scores are ranked in order of index.
    """
    hits = is_corrupted[np.argsort(-scores, kind="stable")]
    precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
    return float(precision[hits].mean())


def evaluate_ranking(scores, is_corrupted):
    """Returns the json entry of one ranking: curve, recall_at_10, recall_at_20, auroc, average_precision."""
    curve = detection_curve(scores, is_corrupted)
    return {
        "curve": curve,
        "recall_at_10": curve[9]["recall"],
        "recall_at_20": curve[19]["recall"],
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
    examples, is_corrupted = (
        [column[order].tolist() for column in examples],
        data.is_corrupted.numpy()[order],
    )
    rankings = [
        scores[name][order] for name in RANKINGS
    ]  # float32, of which few digits are written
    rows = zip(
        range(1, len(data) + 1),
        *examples,
        *rankings,
        is_corrupted.astype(int).tolist(),
        strict=True,
    )
    pipeline.write_table(path, COLUMNS, rows)


def plot_suspects(path, data, order, scores, predicted, by):
    """Draws the most suspicious images as a contact sheet, each under given label, predicted label and score.

    The title says what they are ranked `by`.
    """
    shown = order[:NUM_PICTURED].tolist()
    labels = [(data.labels[position], predicted[position]) for position in shown]
    texts = [
        " →\n".join(pipeline.shorten(data.class_names[label]) for label in pair)
        + f"\n{scores[position]:.3g}"
        for pair, position in zip(labels, shown, strict=True)
    ]
    colours = ["firebrick" if given != guess else "black" for given, guess in labels]
    title = (
        f"The {len(shown)} most suspicious of {len(data)} training images by {by}:\n"
        "given label → predicted label (red where they differ), score"
    )
    pipeline.draw_contact_sheet(path, data.images[shown], texts, colours, 10, title)


def plot_curves(path, results, method, fraction, strategy):
    """Draws what part of the corrupted labels is found against the part of the images inspected.

    The published ranking, the default, the loss and the `method` are drawn in full strength.
    """
    end = min(1, max(0.2, 3 * fraction))
    with pipeline.figure_file(path, 6.4, 6.2) as figure:
        axes = figure.add_subplot(xlim=(0, end), ylim=(0, 1.02))
        for name, found in results.items():
            ranking, strong = RANKINGS[name], name in ("self_influence", DEFAULT, "loss", method)
            label = f"{ranking.caption}: {100 * found['recall_at_10']:.1f} % at 10 %, AUROC {found['auroc']:.3f}"
            points = [(0, 0), *((point["inspected"], point["recall"]) for point in found["curve"])]
            style = {
                "linestyle": ranking.line,
                "color": ranking.colour,
                "linewidth": 2.2 if strong else 0.8,
            }
            axes.plot(*zip(*points, strict=True), **style, label=label)
        axes.plot([0, fraction, 1], [0, 1, 1], ":", color="black", linewidth=1.5, label="perfect")
        axes.plot([0, 1], [0, 1], "-", color="grey", linewidth=1.5, label="random")
        axes.set_xlabel("training images inspected")
        axes.set_ylabel("mislabeled images found")
        axes.set_title(
            f"Mislabeled images found by inspecting the top of a ranking ({strategy})", fontsize=10
        )
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:.0%}")
        axes.grid(alpha=0.3)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), fontsize=9, handlelength=4)


def print_rankings(results, method):
    """Prints what each ranking finds, in percent, and the sentence that sums up that of `method`."""
    percents = (1, 5, 10, 20, 30, 50)
    print(f"{'inspected':16}" + "".join(f"{percent:6} %" for percent in percents) + "    AUROC")
    for name, found in results.items():
        cells = "".join(
            f"{100 * found['curve'][percent - 1]['recall']:6.1f} %" for percent in percents
        )
        print(f"{name:16}{cells}   {found['auroc']:.4f}")
    at_10, at_20 = (100 * results[method][f"recall_at_{percent}"] for percent in (10, 20))
    print(
        f"Inspecting 10 % of the training set finds {at_10:.1f} % of the mislabeled images (20 %: {at_20:.1f} %)."
    )


def print_next_steps(args, metadata, page_html):
    """Prints the command that trains as before, but with what the user decided about the suspects."""
    same = metadata["recipe"] | {name: metadata[name] for name in ("seed", "precision", "device")}
    same |= {
        "corrupt_percentage": args.corrupt_percentage or None,
        "checkpoint_dir": args.checkpoint_dir[0],
    }
    if args.num_review:
        print(
            f"Open {page_html} in a browser, decide, and save corrections.csv here. Then train with it:"
        )
    else:
        print(
            "Write a csv file of the columns path (or index) and new_label (empty: left out). Then train with it:"
        )
    print(f"  {pipeline.command('train.py', args, **same, corrections='corrections.csv')}")


# ---- The page for review -------------------------------------------------------------------------

NUM_EXPLAINING, HELD_QUERIES = 3, 1000


def explain(runs, data, suspects, damping_factor):
    """Returns what speaks against each suspect's label, and what for it: (rank, position, score) of images, by suspect.

    suspects: positions in `data`, ImageData on the CPU. A score is the influence on the log-odds of the label, the
    mean over the models; that of a suspect on itself is left out.
    """
    chosen, state = [suspects.tolist()], runs[0].analyzer.state
    if state.use_distributed:  # rounding might give each process other suspects
        torch.distributed.broadcast_object_list(chosen, device=state.device)
    queries, explanations = data.take(torch.tensor(chosen[0])).to(runs[0].data.images.device), {}
    scores = sum(
        run.pairwise_influence(queries, HELD_QUERIES, damping_factor)[0] for run in runs
    ) / len(runs)
    for suspect, influence in zip(chosen[0], scores, strict=True):
        influence[suspect] = 0
        explanations[suspect] = [
            (place, position, influence[position].item())
            for sign in (-1, 1)
            for place, position in enumerate(
                (sign * influence).argsort(descending=True)[:NUM_EXPLAINING].tolist(), 1
            )
            if sign * influence[position] > 0
        ]
    return explanations


def write_explanations(path, data, explanations):
    """Writes what `explain` returns to a csv file, or removes an earlier one where nothing was asked for."""
    if not explanations:
        return path.unlink(missing_ok=True)
    rows = [
        (
            data.indices[suspect].item(),
            place,
            data.indices[image].item(),
            data.class_names[data.labels[image]],
            score,
        )
        for suspect, images in explanations.items()
        for place, image, score in images
    ]
    pipeline.write_table(path, ("suspect", "rank", "image", "label", "score"), rows)


def describe_suspects(data, shown, scores, logits, explanations, cleaned):
    """Returns what the page says of suspects, dictionaries, and the positions of all images that it shows, in order.

    shown: positions of the suspects; scores: array [N]; logits: float32 [N, num_classes].
    """
    tiles, cards, names = (
        {position: tile for tile, position in enumerate(shown)},
        [],
        data.class_names,
    )
    second = logits.scatter(1, data.labels[:, None], -torch.inf).argmax(
        1
    )  # the first where that is not the label
    for place, position in enumerate(shown, start=1):
        path, index = data.paths[position], data.indices[position].item()
        label, other, percent = (
            data.labels[position],
            second[position],
            100 * logits[position].softmax(0),
        )
        card = {
            "rank": place,
            "key": path or str(index),
            "name": Path(path).name or f"image {index}",
        }
        card |= {
            "image": tiles[position],
            "link": {"href": Path(path).absolute().as_uri()} if path else {},
        }
        card |= {
            "label": names[label],
            "suggested": names[other],
            "was": "" if cleaned else names[label],
            "why": [],
        }
        card["facts"] = [f"given, {percent[label]:.1f} %", f"suggested, {percent[other]:.1f} %"]
        card["facts"].append(f"score {scores[position]:.3g}")
        for _, image, score in explanations.get(position, ()):
            tile, side = tiles.setdefault(image, len(tiles)), "for" if score > 0 else "against"
            card["why"].append((tile, side, names[data.labels[image]]))
        cards.append(card)
    return cards, list(tiles)


def draw_tiles(images):
    """Returns images, uint8 [N, 3, 32, 32], in the rows of one square picture, as the URI of a JPEG."""
    from PIL import Image

    side, size = math.ceil(len(images) ** 0.5), pipeline.IMAGE_SIZE
    tiles = np.zeros((side * side, size, size, 3), np.uint8)
    tiles[: len(images)] = images.permute(0, 2, 3, 1).numpy()
    picture = (
        tiles.reshape(side, side, size, size, 3).swapaxes(1, 2).reshape(side * size, side * size, 3)
    )
    Image.fromarray(picture).save(
        content := io.BytesIO(), "JPEG", quality=95, subsampling=0
    )  # a third of a PNG
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"


PAGE = r"""<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>Suspects</title>
<meta http-equiv="Content-Security-Policy" content="{{policy}}"><meta name="viewport" content="width=device-width">
<style>
body { margin: 0; font: 15px/1.3 system-ui, sans-serif; color: #1a1a1a; background: #f1f1ee; }
header, nav, main, article > div:not(:empty) { padding: 8px; }
nav { position: sticky; top: 0; background: #fff; border-bottom: 1px solid #999; }
header, nav, label, .buttons { display: flex; flex-wrap: wrap; gap: 6px; align-items: center; }
button, select, label, input { box-sizing: border-box; min-height: 40px; max-width: 100%; font: inherit; }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 290px), 1fr)); gap: 12px; }
article { align-self: start; scroll-margin: 150px 0 30px; background: #fff; border: 3px solid var(--state, #ccc); }
article:focus-within { outline: 4px solid #111; }
h2 { margin: 0; padding: 2px 8px 4px; background: var(--state, #ccc); font-size: 17px; }
.kept { --state: #7fb0e8; } .changed { --state: #5fc27e; } .left { --state: #f08a80; }
canvas { display: block; width: 128px; height: 128px; image-rendering: pixelated; }
.facts, .why { display: grid; grid-template-columns: 128px 1fr; gap: 8px; overflow-wrap: anywhere; }
.facts b, .facts a { display: block; max-height: 40px; overflow: hidden; unicode-bidi: isolate; }
.facts a { min-height: 40px; align-content: center; }
.why { grid-template-columns: repeat(3, minmax(0, 1fr)); font-size: 13px; }
.why canvas { width: 64px; height: 64px; }
.against { grid-row: 1; color: #b2182b; } .for { grid-row: 2; color: #0b5394; }
.buttons > * { flex: auto; padding: 0 2px; }
#done, #other { flex: 1; min-width: 60px; max-width: 200px; }
@media (max-width: 700px) { #keys, #digits { display: none; } }
</style>
<header><b>{{title}}</b> {{hint}}
    <i id="keys">Enter accepts the suggestion, k keeps the label, x leaves the image out, c is for others, u undoes.</i>
    <select id="filter"><option value="">every class and pair (given → suggested)</select>
    <label><input type="checkbox" id="undecided">undecided only</label></header>
<nav><progress id="done"></progress><span id="counts"></span><button value="u">Undo</button>
    <button value="save">Save file</button><button value="load">Load file</button>
    <input id="other" list="classes" placeholder="another class"><span id="digits"></span> <b id="notice"></b></nav>
<main id="cards"></main><datalist id="classes"></datalist><input id="file" type="file" accept=".csv" hidden>
<img id="sprite" alt="" hidden src="{{tiles}}"><script type="application/json" id="data">{{data}}</script>
<script>
const byId = (id) => document.getElementById(id), say = (text) => byId("notice").replaceChildren(text);
const { fingerprint, column, classes, digits, cards } = JSON.parse(byId("data").textContent);
const earlier = []; // what undo goes back to
let storage = {}, current = cards[0], rows; // [label, new_label] by path or index; an empty new_label: left out
const names = ({ label, suggested }) => [label, `${label} → ${suggested}`];
const inView = (card) => ["", ...names(card)].includes(byId("filter").value)
    && !(byId("undecided").checked && rows.has(card.key));

function show(newRows, next) { // and go on to the next card that is undecided
    const counts = { undecided: 0, kept: 0, changed: 0, "left out": 0 };
    if (newRows !== rows && !next) earlier.push([rows, current]);
    rows = newRows;
    try { storage[fingerprint] = JSON.stringify([...rows]); } catch { say("The browser keeps no more: save."); }
    for (const card of cards) {
        const choice = rows.get(card.key)?.[1] ?? null;
        const state = choice === null ? "undecided" : choice === card.label ? "kept" : choice ? "changed" : "left out";
        card.element.firstChild.textContent = `${card.rank}. ${state === "changed" ? `→ ${choice}` : state}`;
        Object.assign(card.element, { className: state, hidden: !inView(card) });
        counts[state] += 1;
    }
    const { undecided, changed, "left out": left } = counts, decided = cards.length - undecided;
    byId("counts").textContent = `${decided} of ${cards.length} decided, ${changed} changed, ${left} left out`;
    byId("done").value = decided / cards.length;
    const inTurn = [...cards.slice(cards.indexOf(current)), ...cards].filter(inView);
    go(next ?? inTurn.find(({ key }) => !rows.has(key)) ?? inTurn[0] ?? current);
}
function go(card) {
    current = card;
    card.element.focus({ preventScroll: true });
    card.element.scrollIntoView({ block: "nearest" });
}
const decide = (choice) => inView(current) && show(new Map(rows).set(current.key, [current.was, choice]));
function save() {
    const changed = [...rows].filter(([, [label, newLabel]]) => !label || label !== newLabel);
    const table = [[column, "label", "new_label"], ...changed.map(([key, labels]) => [key, ...labels])];
    const quote = (cell) => (/[",;\s]/.test(cell) ? `"${cell.replaceAll('"', '""')}"` : cell);
    const file = new Blob(table.map((cells) => `${cells.map(quote)}\n`));
    make("a", { href: URL.createObjectURL(file), download: "corrections.csv" }).click();
}
function load(text) {
    const mark = text.match(/[,;\t]/) ?? ",", cell = RegExp(`${mark}(?:"((?:[^"]|"")*)"|([^${mark}]*))`, "g");
    const read = (line) => [...`${mark}${line}`.matchAll(cell)].map(([, a, b]) => b ?? a.replaceAll('""', '"'));
    const [header, ...lines] = (text.replace(/\r|^[,;\t]+$/gm, "").match(/("([^"]|"")*"|[^"\n])+/g) ?? [""]).map(read);
    const places = [column, "label", "new_label"].map((name) => header.indexOf(name)), loaded = new Map(rows);
    for (const [key, label = "", newLabel] of lines.map((cells) => places.map((place) => cells[place]))) {
        const known = cards.find((card) => card.key === key)?.was || label;
        const fits = key && ["", ...classes].includes(newLabel) && ["", known].includes(label);
        if (!fits) return say(`Nothing was loaded, because a row does not fit: ${key}, ${label}, ${newLabel}`);
        loaded.set(key, [known, newLabel]);
    }
    show(loaded);
    say(`Loaded ${lines.length} rows; decided cards: ${cards.filter(({ key }) => rows.has(key)).length}.`);
}

function make(tag, properties, ...children) {
    const element = Object.assign(document.createElement(tag), properties);
    element.append(...children);
    return element;
}
function picture(tile) {
    const canvas = make("canvas", { width: 32, height: 32 }), sprite = byId("sprite"), row = sprite.naturalWidth / 32;
    canvas.getContext("2d").drawImage(sprite, -32 * (tile % row), -32 * Math.floor(tile / row));
    return canvas;
}
function build({ key, image, name, link, facts, label, suggested, why }) {
    const buttons = Object.entries({ a: "Accept", k: "Keep", x: "Leave out", c: "Other…" });
    const file = make("a", { title: key, target: "_blank", ...link }, name);
    const texts = make("div", {}, facts[0], make("b", {}, label), facts[1], make("b", {}, suggested), facts[2], file);
    return make("article", { tabIndex: -1 }, make("h2"),
        make("div", { className: "facts" }, picture(image), texts),
        make("div", { className: "why" }, ...why.map(([tile, side, name]) =>
            make("div", { className: side }, picture(tile), `${side}: ${name}`))),
        make("div", { className: "buttons" }, ...buttons.map(([value, text]) => make("button", { value }, text))));
}

const move = (step, shown = cards.filter(inView)) => go(shown[shown.indexOf(current) + step] ?? current);
const columns = () => getComputedStyle(byId("cards")).gridTemplateColumns.split(" ").length;
const undo = () => show(...(earlier.pop() ?? [rows]));
const accept = () => decide(current.suggested);
const keys = {
    enter: accept, a: accept, k: () => decide(current.label), x: () => decide(""), c: () => byId("other").focus(),
    u: undo, "ctrl+z": undo, save, load: () => byId("file").click(), escape: () => go(current),
    arrowleft: () => move(-1), arrowright: () => move(1), arrowup: () => move(-columns()),
    arrowdown: () => move(columns()),
};
document.addEventListener("keydown", (event) => {
    const elsewhere = event.target.matches(event.key === "Enter" ? "button, a, select, #other" : "select, #other");
    const action = keys[(event.ctrlKey || event.metaKey ? "ctrl+" : "") + event.key.toLowerCase()];
    if (!action || event.altKey || (elsewhere && event.key !== "Escape")) return;
    event.preventDefault();
    if (!event.repeat || event.key.startsWith("Arrow")) action();
});
document.addEventListener("click", ({ target }) => {
    if (target.matches("select, input, label")) return;
    go(cards.find(({ element }) => element.contains(target)) ?? current);
    if (target.matches("button")) keys[target.value]();
});
document.querySelector("header").addEventListener("change", () => show(rows));
byId("file").addEventListener("click", ({ target }) => { target.value = ""; });
byId("file").addEventListener("change", async ({ target }) => load(await target.files[0].text()));
byId("other").addEventListener("change", ({ target }) => {
    classes.includes(target.value) ? decide(target.value) : say(`There is no class “${target.value}”.`);
    target.value = "";
});
addEventListener("load", () => {
    const options = (texts) => texts.map((text) => make("option", { value: text }, text));
    byId("cards").append(...cards.map((card) => card.element = build(card)));
    byId("classes").append(...options(classes));
    byId("filter").append(...options([...new Set(cards.flatMap(names))].sort()));
    digits.forEach(([digit], place) => { keys[digit] = () => decide(classes[place]); });
    byId("digits").append(...digits.map(([digit, text]) => make("button", { value: digit }, text)));
    try { storage = localStorage; } catch { say("This browser keeps nothing: save before you close the page."); }
    rows = new Map(JSON.parse(storage[fingerprint] ?? "[]"));
    show(rows);
});
</script>
"""


def build_page(title, hint, images, facts):
    """Returns PAGE with what it tells. Names stay data: no `<` is left, and only the page's own code may run."""
    policy = "default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'"
    for kind, code in re.findall(r"<(style|script)>(.*?)</\1>", PAGE, re.DOTALL):
        policy += f"; {kind}-src 'sha256-{base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()}'"
    parts = {"policy": policy, "title": title, "hint": hint, "tiles": draw_tiles(images)}
    parts["data"] = json.dumps(facts).replace("<", r"\u003c")
    return re.sub(r"{{(\w+)}}", lambda marker: parts[marker[1]], PAGE)


def write_page(path, data, order, scores, logits, explanations, *, num_review, by, cleaned):
    """Writes the page of the first `num_review` suspects, or removes an earlier one where there are to be none.

    The browser keeps decisions under the hash of ranking and paths: a page that has others begins without them.
    """
    if not num_review:
        return path.unlink(missing_ok=True)
    cards, shown = describe_suspects(
        data, order[:num_review].tolist(), scores, logits, explanations, cleaned
    )
    ranking = data.digest, json.dumps(data.paths), *map(torch.from_numpy, (order, scores))
    names, fingerprint = data.class_names, pipeline.sha256(*ranking)
    keys = names if all(re.fullmatch("[0-9]", name) for name in names) else "1234567890"
    digits = [
        (key, name if key == name else f"{key} {name}")
        for key, name in zip(keys, names, strict=False)
    ]
    facts = {
        "fingerprint": fingerprint,
        "column": "path" if any(data.paths) else "index",
        "classes": names,
    }
    facts |= {"digits": digits if len(names) <= 10 else [], "cards": cards}
    title = f"The {len(cards)} most suspicious of {len(data):,} training images by {by}."
    hint = (
        "The labels are those after cleaning: load your earlier corrections.csv first."
        if cleaned
        else ""
    )
    with pipeline.atomic_path(path) as temporary:
        temporary.write_text(build_page(title, hint, data.images[shown], facts), encoding="utf-8")


def main():
    """Parses, loads, computes, reports."""
    args = parse_arguments()
    seconds, strategy, method = {}, args.factor_strategy, args.method
    with pipeline.timed(seconds, "load"):
        runs, metadata, data = pipeline.load_runs(args, seconds)
        folder = pipeline.result_folder(runs)
        suspects_csv, page_html, suspects_png = (
            folder / f"suspects_{strategy}{s}" for s in (".csv", ".html", ".png")
        )
        curve_png, record_json = (
            folder / f"detection_curve_{strategy}.png",
            folder / f"detection_{strategy}.json",
        )
        explanations_csv = folder / f"explanations_{strategy}.csv"
        require_unedited(suspects_csv)

    found = [
        measure(run, described, args.damping_factor)
        for run, described in zip(runs, metadata, strict=True)
    ]
    measured, logits, score_paths = zip(*found, strict=True)
    scores, predicted = rank(measured), sum(logits).argmax(1)
    order, is_corrupted = np.argsort(-scores[method], kind="stable"), data.is_corrupted.numpy()
    explanations = (
        explain(runs, data, order[: args.explain], args.damping_factor) if args.explain else {}
    )
    if not pipeline.is_main_process():
        return

    with pipeline.timed(seconds, "report"):
        write_suspects(suspects_csv, data, order, scores, predicted)
        write_explanations(explanations_csv, data, explanations)
        truth = is_corrupted.any() and not is_corrupted.all()
        results = (
            {name: evaluate_ranking(values, is_corrupted) for name, values in scores.items()}
            if truth
            else {}
        )
        fields = {
            "num_train": len(data),
            "num_corrupted": int(is_corrupted.sum()),
            "rankings": results,
        }
    with (
        pipeline.recorded(
            record_json,
            flags=vars(args),
            fields=fields,
            device=runs[0].data.images.device,
            seconds=seconds,
        ),
        pipeline.timed(seconds, "report"),
    ):
        by = RANKINGS[method].caption + f" ({strategy})" * (method == "self_influence")
        about = {"num_review": args.num_review, "by": by, "cleaned": args.cleaned}
        write_page(
            page_html, data, order, scores[method], sum(logits) / len(logits), explanations, **about
        )
        plot_suspects(suspects_png, data, order, scores[method], predicted, by)
        curve_png.unlink(missing_ok=True)
        if truth:
            plot_curves(curve_png, results, method, is_corrupted.mean(), strategy)
            print_rankings(results, method)
        else:
            print(
                "No labels are known to be wrong, so there is no truth to compare with: look at the suspects."
            )

    tables, pictures = [suspects_csv, explanations_csv], [page_html, suspects_png, curve_png]
    pipeline.print_seconds(seconds)
    pipeline.print_paths([*score_paths, *filter(Path.exists, tables + pictures), record_json])
    print_next_steps(args, metadata[0], page_html)


if __name__ == "__main__":
    pipeline.run(main)
