"""Ranks the training images by self-influence and so finds the mislabeled ones.

A mislabeled image is one the network has to memorise: it has a large influence on its own loss. The script writes
the ranking, a contact sheet of its top, and, where labels were corrupted on purpose, how much of that it finds.
"""

import csv

import numpy as np
import torch.nn.functional as F

import pipeline

NUM_PICTURED = 100


def parse_arguments():
    """Reads the command line."""
    return pipeline.influence_parser(__doc__.splitlines()[0], corrupt_default=0.1).parse_args()


# --------------------------------------------------------------------------------------------------
# Rankings and what they find
# --------------------------------------------------------------------------------------------------


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
    _, group, sizes = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(sizes) - (sizes - 1) / 2)[group]  # 1 is the lowest score; equal scores share their mean rank
    positives = is_corrupted.sum()
    above = ranks[is_corrupted].sum() - positives * (positives + 1) / 2  # the Mann-Whitney U statistic
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


def write_suspects(path, data, self_influence, losses, predicted, is_corrupted):
    """Writes every training image to a csv file, most suspicious first. Arguments are arrays [N]. Returns the order."""
    order = np.argsort(-self_influence, kind="stable")
    names = data.class_names
    with pipeline.atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(
            [
                "rank",
                "index",
                "path",
                "label",
                "class_name",
                "predicted_label",
                "predicted_class_name",
                "self_influence",
                "loss",
                "is_corrupted",
            ]
        )
        for rank, index in enumerate(order.tolist(), start=1):
            label, guess = data.labels[index].item(), predicted[index].item()
            writer.writerow(
                [
                    rank,
                    index,
                    data.paths[index] if data.paths else "",
                    label,
                    names[label],
                    guess,
                    names[guess],
                    self_influence[index],
                    losses[index],
                    int(is_corrupted[index]),
                ]
            )
    return order


def plot_suspects(path, data, order, predicted, strategy):
    """Draws the most suspicious images as a contact sheet, each under `given label → predicted label`."""
    import matplotlib.pyplot as plt

    shown = order[:NUM_PICTURED].tolist()
    rows = -(-len(shown) // 10)
    figure, axes = plt.subplots(rows, 10, figsize=(13, 1.45 * rows + 0.6), squeeze=False, layout="constrained")
    for cell in axes.flat[len(shown) :]:
        cell.axis("off")
    for cell, index in zip(axes.flat, shown, strict=False):
        given, guess = data.class_names[data.labels[index]], data.class_names[predicted[index]]
        pipeline.show_image(cell, data.images[index], f"{given} → {guess}", "firebrick" if given != guess else "black")
    figure.suptitle(
        f"The {len(shown)} training images of the highest self-influence ({strategy}): given label → predicted label",
        fontsize=11,
    )
    pipeline.save_figure(figure, path)


def plot_curves(path, rankings, fraction, strategy):
    """Draws what part of the corrupted labels is found against the part of the images inspected."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import PercentFormatter

    figure, axes = plt.subplots(figsize=(6.4, 4.8), layout="constrained")
    names = {"self_influence": f"self-influence ({strategy})", "loss": "loss"}
    for (name, ranking), colour, style in zip(rankings.items(), ("#0b5394", "#e69f00"), ("-", "--"), strict=True):
        points = [(0, 0), *((point["inspected"], point["found"]) for point in ranking["curve"])]
        label = f"{names[name]}: {100 * ranking['found_at_10']:.1f} % at 10 %, AUROC {ranking['auroc']:.3f}"
        axes.plot(*zip(*points, strict=True), style, color=colour, linewidth=2, label=label)
    axes.plot([0, fraction, 1], [0, 1, 1], ":", color="black", label="perfect")
    axes.plot([0, 1], [0, 1], "-.", color="grey", label="random")
    axes.set(
        xlabel="training images inspected",
        ylabel="mislabeled images found",
        xlim=(0, 1),
        ylim=(0, 1.02),
        title="Mislabeled images found by inspecting the top of the ranking",
    )
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    pipeline.save_figure(figure, path)


def print_rankings(rankings):
    """Prints what each ranking finds, in percent, and the sentence that sums it up."""
    print("inspected   self-influence     loss   random")
    for percent in (1, 5, 10, 20, 30, 50):
        by_influence, by_loss = (100 * rankings[name]["curve"][percent - 1]["found"] for name in rankings)
        print(f"{percent:7} %   {by_influence:12.1f} %   {by_loss:4.1f} %   {percent:4.1f} %")
    best = rankings["self_influence"]
    print(
        f"Inspecting 10 % of the training set finds {100 * best['found_at_10']:.1f} % of the mislabeled images "
        f"(20 %: {100 * best['found_at_20']:.1f} %)."
    )


def report_rankings(curve_png, scores, is_corrupted, strategy):
    """Evaluates, draws and prints the rankings by `scores`, arrays [N] by name. Returns their json entries.

    Without a corrupted label there is no truth to compare with: says so, leaves no curve, and returns none.
    """
    if not is_corrupted.any():
        curve_png.unlink(missing_ok=True)
        print("No labels were corrupted on purpose, so there is no truth to compare with: look at the suspects.")
        return {}
    rankings = {name: evaluate_ranking(values, is_corrupted) for name, values in scores.items()}
    plot_curves(curve_png, rankings, is_corrupted.mean(), strategy)
    print_rankings(rankings)
    return rankings


def main():
    """Parses, loads, computes, reports."""
    args = parse_arguments()
    phases = pipeline.Phases()
    device = pipeline.choose_device(args.device, several_processes=True)
    dtype = pipeline.choose_dtype(args.precision, device)

    with phases("load"):
        clean = pipeline.load_train_data(args.dataset, args.dataset_dir, args.num_train_examples)
        data, is_corrupted = pipeline.with_corrupted_labels(clean, args.corrupt_percentage)
        path = pipeline.checkpoint_path(args.checkpoint_dir, args.corrupt_percentage)
        model, metadata = pipeline.load_checkpoint(path, device)
        pipeline.require_same_data(path, metadata, data)
        data = data.to(device)
        influence = pipeline.InfluenceRun(
            model,
            data,
            path.stem,
            output_dir=args.output_dir,
            strategy=args.factor_strategy,
            dtype=dtype,
            seed=args.seed,
            batch_size=args.train_batch_size,
            profile=args.profile,
            phases=phases,
        )

    scores, scores_path = influence.self_influence(args.damping_factor)
    if not influence.is_main_process:
        return

    with phases("report"):
        logits = pipeline.compute_logits(model, data.images, influence.batch_size, dtype)
        losses = F.cross_entropy(logits, data.labels, reduction="none").cpu().numpy()
        predicted, scores, is_corrupted = logits.argmax(1).cpu(), scores.numpy(), is_corrupted.numpy()
        data = data.to("cpu")
        suspects_csv, suspects_png = influence.path("suspects", "csv"), influence.path("suspects", "png")
        curve_png, record_json = influence.path("detection_curve", "png"), influence.path("detection", "json")
        order = write_suspects(suspects_csv, data, scores, losses, predicted, is_corrupted)
        plot_suspects(suspects_png, data, order, predicted, args.factor_strategy)
        rankings = report_rankings(
            curve_png, {"self_influence": scores, "loss": losses}, is_corrupted, args.factor_strategy
        )

    record = {
        "flags": vars(args),
        "num_train": len(data),
        "num_corrupted": int(is_corrupted.sum()),
        "rankings": rankings,
        **pipeline.run_record(phases, device),
    }
    pipeline.write_json(record_json, record)
    influence.report_profile()
    pipeline.report_files([suspects_csv, suspects_png, curve_png, record_json, scores_path], phases)


if __name__ == "__main__":
    pipeline.run(main)
