"""Ranks the training images so that mislabeled ones come first.

A mislabeled image is one the network has to memorise: the margin of its label grows late in the training, and in the
end it has a large influence on its own loss. The script writes the ranking, a contact sheet of its top, and, where
labels were corrupted on purpose, how much of that it and the other rankings find.
"""

import pipeline  # first of all, for Ctrl-C in the imports

import csv
from copy import deepcopy
from functools import partial

import numpy as np
import torch.nn.functional as F

NUM_PICTURED = 100
AUM_SHARE = 0.75  # of aum_margin; chosen among 10,000 images, see README
METHODS = {  # by name: what pictures call it, colour and line of its curve
    "self_influence": ("self-influence", "#0b5394", "-"),
    "self_influence_checkpoints": ("self-influence over checkpoints", "#56b4e9", (0, (8, 2))),
    "grad_norm": ("gradient norm", "#7f6000", (0, (3, 1, 1, 1, 1, 1))),
    "aum": ("area under the margin", "#d55e00", "--"),
    "combined": ("self-influence and area under the margin, mean rank", "#009e73", "-."),
    "loss": ("loss", "#e69f00", (0, (1, 1))),
    "margin": ("margin", "#cc79a7", (0, (6, 1, 1, 1))),
    "aum_margin": (f"{AUM_SHARE} area under the margin + {1 - AUM_SHARE} margin", "#7b3294", (0, (4, 1))),
}
COLUMNS = ["rank", "index", "path", "label", "class_name", "predicted_label", "predicted_class_name"]
COLUMNS += [*METHODS, "is_corrupted"]  # of the ranking
WITH_CURVATURE = ("self_influence", "self_influence_checkpoints", "combined")


def parse_arguments():
    """Reads the command line."""
    parser = pipeline.influence_parser(__doc__.splitlines()[0], corrupt_default=0.1)
    parser.add_argument(
        "--method",
        choices=METHODS,
        default="aum_margin",
        help="what ranks the suspects: aum, the margin between the logit of the label and the largest other one, as a "
        "mean over the training; self-influence, or its sum over the checkpoints of train.py --save_epochs; the norm "
        "of the gradient; combined, the mean rank by aum and self-influence (over the checkpoints, if there are); loss "
        f"or that margin in the end; aum_margin, {AUM_SHARE} aum + {1 - AUM_SHARE} margin; self-influence is computed "
        "in any case, to compare with (quickest with --factor_strategy identity)",
    )
    return parser.parse_args()


# --------------------------------------------------------------------------------------------------
# Influence
# --------------------------------------------------------------------------------------------------


def sum_over_checkpoints(make_run, model, epoch_weights, last_epoch, name, damping_factor):
    """Returns the sum of self-influence over the weights that --save_epochs kept, float32 [N].

    After TracIn (Pruthi et al. 2020), without its weights, the learning rates, and with factors fitted anew for each.
    make_run: makes an InfluenceRun of a model and a name; that of the last epoch is `name`, so that its results are
    those of the finished model, and computed once. epoch_weights: state of `model` by epoch.
    """
    total = 0
    for epoch, weights in epoch_weights.items():
        checkpoint = deepcopy(model)
        checkpoint.load_state_dict(weights)
        run = make_run(checkpoint, name=name if epoch == last_epoch else f"{name}_epoch{epoch}")
        total = total + run.self_influence(damping_factor)[0]
    return total


def gradient_norm(make_run, model, name):
    """Returns the norm of each example's gradient, float32 [N]: its square is self-influence without curvature."""
    squared, _ = make_run(model, name=name, strategy="identity").self_influence(0.0)
    return squared.sqrt()


# --------------------------------------------------------------------------------------------------
# Rankings and what they find
# --------------------------------------------------------------------------------------------------


def suspicions(influence, logits, labels, aum):
    """Returns what each method ranks the examples by, the most suspicious highest: float arrays [N] by name.

    influence: float [N] by name, `self_influence` and what else of the kind there is; logits: float [N, num_classes] of
    the finished network; labels: int64 [N]; aum: float [N]. Methods without their inputs are left out.
    """
    influence = {name: values.numpy() for name, values in influence.items()}
    best = influence.get("self_influence_checkpoints", influence["self_influence"])
    found = influence | {
        "aum": -aum.numpy(),
        "combined": (pipeline.ranks(best) + pipeline.ranks(-aum.numpy())) / 2,
        "loss": F.cross_entropy(logits, labels, reduction="none").numpy(),
        "margin": -pipeline.top_margin(logits, labels).numpy(),
    }
    found["aum_margin"] = AUM_SHARE * found["aum"] + (1 - AUM_SHARE) * found["margin"]
    return {name: found[name] for name in METHODS if name in found}


def detection_curve(scores, is_corrupted):
    """Returns, at every 1 % of the images inspected in order of falling score, the fraction of corrupted ones found.

    scores: float [N]; is_corrupted: bool [N], at least one true. Equal scores are inspected in order of index.
    """
    found = np.cumsum(is_corrupted[np.argsort(-scores, kind="stable")]) / is_corrupted.sum()
    found = np.concatenate([[0.0], found])  # after inspecting 0, 1, ..., N images
    return [{"inspected": p / 100, "found": float(found[round(p / 100 * len(scores))])} for p in range(1, 101)]


def auroc(scores, is_corrupted):
    """Returns the probability that a random corrupted image scores above a random clean one, ties counting half.

    scores: float [N]; is_corrupted: bool [N], both kinds present.
    """
    positives = is_corrupted.sum()
    above = pipeline.ranks(scores)[is_corrupted].sum() - positives * (positives + 1) / 2  # the Mann-Whitney U statistic
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


# --------------------------------------------------------------------------------------------------
# Report
# --------------------------------------------------------------------------------------------------


def require_unedited(path):
    """Raises UserError where a ranking that would be replaced has columns of a person's own, such as new_label."""
    if path.exists():
        with path.open(newline="", encoding="utf-8", errors="replace") as file:
            columns = next(csv.reader(file), [])
        if columns != COLUMNS:
            raise pipeline.UserError(f"{path} was edited and would be replaced: move it, or name another --output_dir")


def write_suspects(path, data, order, scores, predicted, is_corrupted):
    """Writes every training image to a csv file, in the given order. scores: arrays [N] by method, empty if missing."""
    names = data.class_names
    with pipeline.atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for rank, position in enumerate(order.tolist(), start=1):
            label, guess = data.labels[position].item(), predicted[position].item()
            example = [data.indices[position].item(), data.paths[position], label, names[label], guess, names[guess]]
            values = [scores[name][position] if name in scores else "" for name in METHODS]
            writer.writerow([rank, *example, *values, int(is_corrupted[position])])


def plot_suspects(path, data, order, scores, predicted, images, by):
    """Draws the most suspicious images as a contact sheet, each under given label, predicted label and score.

    The title says which `images` these are, and what they are ranked `by`.
    """
    plt = pipeline.pyplot()
    shown = order[:NUM_PICTURED].tolist()
    columns = min(10, len(shown))
    rows = -(-len(shown) // columns)
    width = max(1.45 * columns, 6)  # of the title
    figure, axes = plt.subplots(rows, columns, figsize=(width, 1.75 * rows + 0.6), squeeze=False, layout="constrained")
    for cell in axes.flat[len(shown) :]:
        cell.axis("off")
    for cell, index in zip(axes.flat, shown, strict=False):
        labels = data.labels[index], predicted[index]
        given, guess = (pipeline.shorten(data.class_names[label]) for label in labels)
        text = f"{given} →\n{guess}\n{scores[index]:.3g}"
        pipeline.show_image(cell, data.images[index], text, "firebrick" if labels[0] != labels[1] else "black")
    title = (
        f"The {len(shown)} most suspicious of {images} by {by}:\n"
        "given label → predicted label (red where they differ), score"
    )
    figure.suptitle(title, fontsize=11, wrap=True)
    pipeline.save_figure(figure, path)


def plot_curves(path, rankings, fraction, images, strategy):
    """Draws what part of the corrupted labels is found against the part of the images inspected.

    The title says which `images` these are, and by which `strategy` the influence was computed.
    """
    plt = pipeline.pyplot()
    from matplotlib.ticker import PercentFormatter

    figure, axes = plt.subplots(figsize=(6.4, 6.2), layout="constrained")
    for name, ranking in rankings.items():
        caption, colour, style = METHODS[name]
        points = [(0, 0), *((point["inspected"], point["found"]) for point in ranking["curve"])]
        label = f"{caption}: {100 * ranking['found_at_10']:.1f} % at 10 %, AUROC {ranking['auroc']:.3f}"
        axes.plot(*zip(*points, strict=True), linestyle=style, color=colour, linewidth=2, label=label)
    axes.plot([0, fraction, 1], [0, 1, 1], ":", color="black", linewidth=1, label="perfect")
    axes.plot([0, 1], [0, 1], "-", color="grey", linewidth=1, label="random")
    axes.set(
        xlabel="training images inspected",
        ylabel="mislabeled images found",
        xlim=(0, 1),
        ylim=(0, 1.02),
        title=f"Mislabeled among {images},\nfound by inspecting the top of a ranking ({strategy})",
    )
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=1, fontsize=9, handlelength=4)
    pipeline.save_figure(figure, path)


def print_rankings(rankings, method):
    """Prints what each ranking finds, in percent, and the sentence that sums up that of `method`."""
    percents = (1, 5, 10, 20, 30, 50)
    print(f"{'inspected':26}" + "".join(f"{percent:6} %" for percent in percents) + "    AUROC")
    for name, ranking in rankings.items():
        found = "".join(f"{100 * ranking['curve'][percent - 1]['found']:6.1f} %" for percent in percents)
        print(f"{name:26}{found}   {ranking['auroc']:.4f}")
    chosen = rankings[method]
    print(
        f"Inspecting 10 % of the training set finds {100 * chosen['found_at_10']:.1f} % of the mislabeled images "
        f"(20 %: {100 * chosen['found_at_20']:.1f} %)."
    )


def report_rankings(curve_png, scores, is_corrupted, method, images, strategy):
    """Evaluates, draws and prints the rankings by `scores`, arrays [N] by name. Returns their json entries.

    Where labels are not known to be partly wrong there is nothing to compare with: says so, leaves no curve, and
    returns none.
    """
    if is_corrupted.all() or not is_corrupted.any():
        curve_png.unlink(missing_ok=True)
        print("No part of the labels is known to be wrong, so there is no truth to compare with: look at the suspects.")
        return {}
    rankings = {name: evaluate_ranking(values, is_corrupted) for name, values in scores.items()}
    plot_curves(curve_png, rankings, is_corrupted.mean(), images, strategy)
    print_rankings(rankings, method)
    return rankings


def print_next_steps(args, metadata, num_train, suspects_csv):
    """Prints the commands that train as before, but with what the user decided about the suspects or without them.

    The batch is as large as before, or as what a tenth less of `num_train` images leaves.
    """
    if args.cleaned:
        return
    same = pipeline.recipe(metadata) | {name: metadata[name] for name in ("seed", "precision", "device")}
    same["save_epochs"] = ",".join(map(str, metadata["save_epochs"])) or None
    same["corrupt_percentage"] = args.corrupt_percentage or None
    fraction = 0.1
    same["train_batch_size"] = min(same["train_batch_size"], num_train - round(fraction * num_train))

    def retrain(**flags):
        return pipeline.command("train.py", args, **same, **flags)

    print(f"Look at {suspects_csv.with_suffix('.png')}, then train with what you decide, in a csv file of the columns")
    print("path (or index) and new_label (empty: leave it out):")
    print(f"  {retrain(corrections='corrections.csv')}")
    print("or, where images are plenty, without the most suspicious tenth:")
    print(f"  {retrain(exclude_suspects=suspects_csv, exclude_fraction=fraction)}")


def main():
    """Parses, loads, computes, reports."""
    args = parse_arguments()
    phases = pipeline.Phases()
    with phases("load"):
        device = pipeline.choose_device(args.device, several_processes=True)
        dtype = pipeline.choose_dtype(args.precision, device)
        path = pipeline.checkpoint_path(args.checkpoint_dir, args.corrupt_percentage, "cleaned" * args.cleaned)
        clean = pipeline.load_train_data(args.dataset, args.dataset_dir, args.num_train_examples, args.output_dir)
        model, metadata, data, is_corrupted = pipeline.load_trained(path, device, clean, args.corrupt_percentage)
        if args.method == "self_influence_checkpoints" and not metadata["epoch_weights"]:
            raise pipeline.UserError(f"--method {args.method}: {path} has no checkpoints, train with --save_epochs")
        data = data.to(device)
        make_run = partial(pipeline.InfluenceRun, data=data, **pipeline.influence_settings(args, dtype, phases))
        run = make_run(model, name=path.stem)
        suspects_csv = run.path("suspects", "csv")
        require_unedited(suspects_csv)

    influence = {}
    influence["self_influence"], scores_path = run.self_influence(args.damping_factor)
    if metadata["epoch_weights"]:
        influence["self_influence_checkpoints"] = sum_over_checkpoints(
            make_run, model, metadata["epoch_weights"], metadata["num_train_epochs"], path.stem, args.damping_factor
        )
    if args.method == "grad_norm":
        influence["grad_norm"] = gradient_norm(make_run, model, path.stem)
    if not pipeline.is_main_process():
        return

    with phases("report"):
        logits = pipeline.compute_logits(model, data.images, run.batch_size, dtype)
        scores = suspicions(influence, logits.cpu(), data.labels.cpu(), metadata["dynamics"]["aum"].cpu())
        predicted, is_corrupted, data = logits.argmax(1).cpu(), is_corrupted.numpy(), data.to("cpu")
        order = np.argsort(-scores[args.method], kind="stable")
        suspects_png = run.path("suspects", "png")
        curve_png, record_json = run.path("detection_curve", "png"), run.path("detection", "json")
        write_suspects(suspects_csv, data, order, scores, predicted, is_corrupted)
        images = f"{len(data)} training images of {pipeline.data_name(args.dataset, args.dataset_dir)}"
        by = METHODS[args.method][0] + f" ({args.factor_strategy})" * (args.method in WITH_CURVATURE)
        plot_suspects(suspects_png, data, order, scores[args.method], predicted, images, by)
        rankings = report_rankings(curve_png, scores, is_corrupted, args.method, images, args.factor_strategy)

    record = {
        "flags": vars(args),
        "num_train": len(data),
        "num_corrupted": int(is_corrupted.sum()),
        "rankings": rankings,
        **pipeline.run_record(phases, device),
    }
    pipeline.write_json(record_json, record)
    run.report_profile()
    pipeline.report_files([scores_path], [suspects_csv, suspects_png, curve_png, record_json], phases)
    print_next_steps(args, metadata, len(data), suspects_csv)


if __name__ == "__main__":
    pipeline.run(main)
