"""Computes how much each training image influences the network's answer to each chosen test image.

A positive score means that training on the image more would raise the margin of the query's label (helpful), a
negative one that it would lower it (harmful).
"""

import pipeline  # first of all, for Ctrl-C in the imports

import csv
import os
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tqdm import tqdm

DEFAULT_QUERIES = 2000
NUM_LISTED = 10  # most helpful and most harmful images per query in the csv file
COLUMNS = (
    *("query", "query_path", "query_label", "query_class_name", "direction", "rank"),
    *("train", "train_path", "train_label", "train_class_name", "score"),
)
NUM_PICTURED_QUERIES, NUM_PICTURED = 8, 5
EVAL_BATCH_SIZE = 1024  # of the retrained models
HELPFUL, HARMFUL = "#0b5394", "firebrick"


def parse_arguments():
    """Reads the command line."""
    parser = pipeline.influence_parser(__doc__.splitlines()[0], corrupt_default=None)
    flag = parser.add_argument
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--num_query_examples",
        type=pipeline.positive_int,
        metavar="N",
        help=f"score the first N test images (default: {DEFAULT_QUERIES}, or all where there are fewer)",
    )
    which.add_argument(
        "--query_indices",
        type=pipeline.number_list,
        metavar="LIST",
        help="score just these test images, such as 3,17,40-59",
    )
    flag(
        "--query_batch_size",
        type=pipeline.positive_int,
        default=1000,
        metavar="N",
        help="queries whose gradients are held at a time, of 9 MB in float32, half in bfloat16; on a CPU at most 2 GB",
    )
    flag(
        "--average_with",
        nargs="+",
        default=[],
        metavar="DIR",
        help="also explain the models of the same name in these folders, trained on the same images by the same "
        "recipe, and take the mean of the scores",
    )
    flag(
        "--retrained_dir",
        metavar="DIR",
        help="measure how far scores predict the answers of the models in this folder, by train.py --subset_fraction",
    )
    args = parser.parse_args()
    if args.cleaned and args.retrained_dir is not None:
        parser.error("argument --retrained_dir: not allowed with --cleaned, whose images are no random subsets")
    return args


def choose_queries(test, num_queries, indices):
    """Returns the test images at `indices`, or else the first `num_queries`, by default DEFAULT_QUERIES or all."""
    if indices is not None and max(indices) >= len(test):
        raise pipeline.UserError(f"--query_indices: there is no test image {max(indices)}, only 0 to {len(test) - 1}")
    if num_queries is not None and num_queries > len(test):
        raise pipeline.UserError(f"--num_query_examples {num_queries}: there are only {len(test)} test images")
    return test.take(torch.tensor(indices or range(min(num_queries or DEFAULT_QUERIES, len(test)))))


def require_recipe(models, metadata, recipe):
    """Raises UserError, naming the `models`, where one was trained by another recipe than the one to explain."""
    if different := [name for name, value in pipeline.recipe(metadata).items() if value != recipe[name]]:
        raise pipeline.UserError(f"{models} were trained with another --{different[0]}: train them alike")


def load_models(paths, device, clean, fraction):
    """Loads checkpoints of the same training. Returns models, recipe and training examples, ImageData on the CPU.

    clean and fraction: as of `load_trained`. Raises UserError where examples or recipes differ.
    """
    models, recipe, data = [], None, None
    for path in paths:
        model, metadata, found, _ = pipeline.load_trained(path, device, clean, fraction)
        recipe, data = recipe or pipeline.recipe(metadata), data or found
        if not (torch.equal(found.indices, data.indices) and torch.equal(found.labels, data.labels)):
            raise pipeline.UserError(f"--average_with: {path} was trained on other images or labels than {paths[0]}")
        require_recipe(f"--average_with: {path} and {paths[0]}", metadata, recipe)
        models.append(model)
    return models, recipe, data


def save_mean(runs, scores):
    """Writes the mean of several runs' scores, whole or not at all. Returns a folder of its own and the file in it."""
    first, names = runs[0].folder, [run.folder.name for run in runs]
    folder = first.with_name(f"{first.name.rsplit('-', 1)[0]}_mean_of_{len(runs)}-{pipeline.sha256(*names)[:8]}")
    path = pipeline.result_path(folder, "pairwise", runs[0].strategy, "safetensors")
    with pipeline.atomic_path(path) as temporary:
        save_file({pipeline.ALL_MODULE_NAME: scores}, temporary)
    return folder, path


def strongest(scores, count):
    """Returns the indices of the `count` most helpful and most harmful training images per query.

    scores: float32 [num_query, num_train]; both results int64 [num_query, count], strongest first.
    """
    count = min(count, scores.shape[1])
    return scores.topk(count, dim=1).indices, (-scores).topk(count, dim=1).indices


def write_top_influences(path, scores, queries, data):
    """Writes the most helpful and the most harmful images of each query, as the score's sign says, to a csv file."""
    tops = list(zip(("helpful", "harmful"), (1, -1), strongest(scores, NUM_LISTED), strict=True))
    with pipeline.atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for query in range(len(queries)):
            for direction, sign, indices in tops:
                for rank, train in enumerate(indices[query].tolist(), start=1):
                    score = scores[query, train].item()
                    if sign * score <= 0:
                        break
                    writer.writerow([*example(queries, query), direction, rank, *example(data, train), score])


def example(data, position):
    """Returns what the table says of one example: index, path, label, class name."""
    label = data.labels[position].item()
    return data.indices[position].item(), data.paths[position], label, data.class_names[label]


def plot_top_influences(path, scores, queries, data, source, strategy):
    """Draws some queries, each beside its most helpful and its most harmful training images with labels and scores.

    The title says that these are of a `source`, and by which `strategy` they were scored.
    """
    plt = pipeline.pyplot()
    rows, columns = min(NUM_PICTURED_QUERIES, len(queries)), min(NUM_PICTURED, len(data))
    helpful, harmful = strongest(scores[:rows], columns)
    figure, axes = plt.subplots(
        rows, 1 + 2 * columns, figsize=(1.3 * (1 + 2 * columns), 1.5 * rows + 0.9), squeeze=False, layout="constrained"
    )
    for query, cells in enumerate(axes):
        index, _, _, name = example(queries, query)
        pipeline.show_image(cells[0], queries.images[query], f"test image {index}\n{pipeline.shorten(name)}")
        shown = [*helpful[query].tolist(), *harmful[query].tolist()]
        for cell, train in zip(cells[1:], shown, strict=True):
            name, score = pipeline.shorten(data.class_names[data.labels[train]]), scores[query, train].item()
            colour = HELPFUL if score > 0 else HARMFUL
            pipeline.show_image(cell, data.images[train], f"{name}\n{score:+.3g}", colour)
    title = (
        f"Test images of {source}, each with the most helpful (blue, +) and most harmful (red, −) "
        f"of {len(data)} training images and their influence ({strategy})"
    )
    figure.suptitle(title, fontsize=11)
    pipeline.save_figure(figure, path)


# --------------------------------------------------------------------------------------------------
# Do the scores predict retraining?
# --------------------------------------------------------------------------------------------------


def load_retrained(folder, name, recipe, data, queries, dtype):
    """Loads the models `<folder>/<name>_subset_*.pth`, trained on random subsets of `data` by --subset_fraction.

    Returns which images each was trained on, bool [M, num_train], and its margins on the queries, float32
    [M, num_query]. Raises UserError where there are fewer than two, where one was trained on something else or by
    another recipe, or where the subsets differ in size.
    """
    paths = sorted(Path(folder).glob(f"{name}_subset_*.pth"))
    if len(paths) < 2:
        raise pipeline.UserError(
            f"--retrained_dir {folder} has {len(paths)} of the models {name}_subset_*.pth, by train.py "
            "--subset_fraction 0.5 --subset_seed K: train at least 2, better 50"
        )
    trained_on, margins = torch.ones(len(paths), len(data), dtype=torch.bool), []
    for path, kept in zip(tqdm(paths, "Evaluating retrained models", leave=False), trained_on, strict=True):
        model, metadata = pipeline.load_checkpoint(path, queries.images.device)
        excluded = metadata["cleaning"].excluded if metadata["cleaning"] else []
        kept[[index for index in excluded if index < len(data)]] = False
        subset = pipeline.describe(data.keep(kept))
        if any(metadata[field] != value for field, value in subset.items()):
            raise pipeline.UserError(
                f"--retrained_dir {folder}: {path.name} was trained on other images or labels than these: "
                "give the data flags it was trained with"
            )
        require_recipe(f"--retrained_dir {folder}: {path.name} and the model to explain", metadata, recipe)
        logits = pipeline.compute_logits(model, queries.images, EVAL_BATCH_SIZE, dtype)
        margins.append(pipeline.margin(logits, queries.labels).cpu())
    if len(sizes := trained_on.sum(1).unique().tolist()) > 1:
        raise pipeline.UserError(f"--retrained_dir {folder}: the subsets differ in size ({sizes}): use one folder each")
    return trained_on, torch.stack(margins)


def linear_datamodeling_scores(scores, trained_on, margins):
    """Returns the linear datamodeling score of each query, float64 [num_query] (Park et al. 2023, "TRAK", section 2).

    That is Spearman's correlation, over retrained models, of a query's margin, margins [M, num_query], and the sum of
    its scores [num_query, num_train] over the images which that model was trained on, trained_on [M, num_train];
    0 where one of them is the same for all models.
    """
    predicted = trained_on.double() @ scores.double().T  # (M, num_query)
    predicted, measured = (np.apply_along_axis(pipeline.ranks, 0, values.numpy()) for values in (predicted, margins))
    predicted, measured = predicted - predicted.mean(0), measured - measured.mean(0)
    norms = np.sqrt((predicted**2).sum(0) * (measured**2).sum(0))
    return np.divide((predicted * measured).sum(0), norms, out=np.zeros_like(norms), where=norms > 0)


def report_retrained(all_scores, trained_on, margins):
    """Prints the linear datamodeling score of each of `all_scores`, pairs of a name and scores [num_query, num_train].

    Returns them by name: `mean` over the queries and its `standard_error`.
    """
    found = {}
    print(f"Linear datamodeling score, {len(margins)} retrained models, mean over {margins.shape[1]} queries:")
    for name, scores in all_scores:
        values = linear_datamodeling_scores(scores, trained_on, margins)
        error = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else 0.0
        found[name] = {"mean": float(values.mean()), "standard_error": float(error)}
        print(f"  {values.mean():7.4f} ± {error:.4f}   {name}")
    return found


def main():
    """Parses, loads, computes, reports."""
    args = parse_arguments()
    phases = pipeline.Phases()
    with phases("load"):
        device = pipeline.choose_device(args.device, several_processes=True)
        dtype = pipeline.choose_dtype(args.precision, device)
        test = pipeline.load_test_data(args.dataset, args.dataset_dir, args.output_dir)
        queries = choose_queries(test, args.num_query_examples, args.query_indices)
        checkpoints = [
            pipeline.checkpoint_path(folder, args.corrupt_percentage, "cleaned" * args.cleaned)
            for folder in sorted([*args.average_with, args.checkpoint_dir], key=os.path.realpath)
        ]  # in one order for all commands, because these wait for each other's models
        clean = pipeline.load_train_data(args.dataset, args.dataset_dir, args.num_train_examples, args.output_dir)
        models, recipe, data = load_models(checkpoints, device, clean, args.corrupt_percentage)
        name, on_device, queries_on_device = checkpoints[0].stem, data.to(device), queries.to(device)
        if args.retrained_dir is not None:
            retrained = load_retrained(args.retrained_dir, name, recipe, data, queries_on_device, dtype)
        settings = pipeline.influence_settings(args, dtype, phases)
        runs = [pipeline.InfluenceRun(model, on_device, name, **settings) for model in models]
        if len({run.folder for run in runs}) < len(runs):
            raise pipeline.UserError("--average_with: two of these folders hold the same model: name each model once")

    all_scores, score_paths = zip(
        *(run.pairwise_influence(queries_on_device, args.query_batch_size, args.damping_factor) for run in runs),
        strict=True,
    )
    if not pipeline.is_main_process():
        return

    with phases("report"):
        scores, folder = all_scores[0], runs[0].folder
        if len(runs) > 1:
            scores = sum(all_scores) / len(runs)
            folder, mean_path = save_mean(runs, scores)
            score_paths = [mean_path]
        top_csv = pipeline.result_path(folder, "top_influences", args.factor_strategy, "csv")
        top_png = pipeline.result_path(folder, "top_influences", args.factor_strategy, "png")
        record_json = pipeline.result_path(folder, "pairwise", args.factor_strategy, "json")
        write_top_influences(top_csv, scores, queries, data)
        source = pipeline.data_name(args.dataset, args.dataset_dir)
        plot_top_influences(top_png, scores, queries, data, source, args.factor_strategy)
        datamodeling = {}
        if args.retrained_dir is not None:
            mean = [(f"{folder.name} {args.factor_strategy}", scores)] if len(runs) > 1 else []
            finished = chain.from_iterable(run.finished_pairwise(queries) for run in runs)
            datamodeling = report_retrained(chain(finished, mean), *retrained)

    record = {
        "flags": vars(args),
        "num_train": len(data),
        "num_query": len(queries),
        "linear_datamodeling_scores": datamodeling,
        **pipeline.run_record(phases, device),
    }
    pipeline.write_json(record_json, record)
    for run in runs:
        run.report_profile()
    pipeline.report_files(score_paths, [top_csv, top_png, record_json], phases)


if __name__ == "__main__":
    pipeline.run(main)
