"""Computes how much each training image influences the prediction for each chosen test image.

The chosen test images are called queries. A positive score means that the training image is
helpful: more training on it would raise the log-odds of the query's label. A negative score means
that it is harmful: more training on it would lower them.
"""

import argparse
from types import SimpleNamespace

import torch
from safetensors.torch import save_file

import pipeline

DEFAULT_QUERIES = 2000
NUM_LISTED = 10  # helpful images, and harmful images, of each query in the csv file
COLUMNS = (
    "query",
    "query_path",
    "query_label",
    "direction",
    "rank",
    "train",
    "train_path",
    "train_label",
    "score",
)
# The csv file begins with the mean over all queries, which has no path and no label.
MEAN_QUERY = ("mean", "", "")
NUM_PICTURED_QUERIES = 8
NUM_PICTURED = 5  # helpful images, and harmful images, of each query in the figure
HELPFUL_COLOUR, HARMFUL_COLOUR = "#0b5394", "firebrick"


def number_list(text):
    """Parses a list of indices such as `3,17,40-59`: returns each once, in the order given."""
    numbers = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not dash:
            last = first
        if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last) < 10**7):
            raise argparse.ArgumentTypeError(
                f"'{text}' is not a list of numbers such as 3,17,40-59"
            )
        numbers += range(int(first), int(last) + 1)
    return list(dict.fromkeys(numbers))


def parse_arguments():
    """Reads the command line."""
    parser = pipeline.influence_parser(__doc__)
    # With thousands of images this predicts the effect of retraining better than the heuristic.
    parser.set_defaults(damping_factor=1e-6)
    add_query_flags(parser.groups["data"])
    add_model_flags(parser.groups["model"])
    pipeline.add_pairwise_flags(parser.groups["curvature"], purpose="for the influence on queries")
    args = parser.parse_args()
    pipeline.check_pairwise_flags(parser, args)
    return args


def add_query_flags(group):
    """Adds the flags that choose the test images."""
    queries = group.add_mutually_exclusive_group()
    queries.add_argument(
        "--num_query_examples",
        type=pipeline.positive_int,
        metavar="N",
        help=f"compute the influence on the first N test images (default: {DEFAULT_QUERIES})",
    )
    queries.add_argument(
        "--query_indices",
        type=number_list,
        metavar="LIST",
        help="compute the influence on these test images only, such as 3,17,40-59",
    )


def add_model_flags(group):
    """Adds the number of averaged networks, and the number of queries that are held in memory."""
    group.add_argument(
        "--snapshots",
        type=pipeline.positive_int,
        default=1,
        metavar="N",
        help="average the scores over the last N of the networks that a training keeps, which are "
        "three from four epochs on (default: %(default)s, the final network only)",
    )
    group.add_argument(
        "--query_batch_size",
        type=pipeline.number_or_word(pipeline.positive_int, "auto"),
        default="auto",
        metavar="N",
        help="number of queries whose gradients are held in memory; on a CPU, N is lowered if they "
        "need more than 2 GB; auto: on a CPU, as many as fit into 2 GB; on a GPU, "
        "1000 / eigenvector_fraction "
        "(default: %(default)s)",
    )


def choose_queries(test, num_queries, indices):
    """Returns the test images at `indices`; if these are None, the first `num_queries` test images.

    If both are None, returns the first DEFAULT_QUERIES test images, or all if there are fewer.
    Raises UserError if there are not as many test images as the user asked for.
    """
    if indices is not None and max(indices) >= len(test):
        raise pipeline.UserError(
            f"--query_indices: there is no test image {max(indices)}, only 0 to {len(test) - 1}"
        )
    if num_queries is not None and num_queries > len(test):
        raise pipeline.UserError(
            f"--num_query_examples {num_queries}: there are only {len(test)} test images"
        )
    if num_queries is None:
        num_queries = min(DEFAULT_QUERIES, len(test))
    if indices is None:
        indices = range(num_queries)
    return test.take(torch.tensor(indices))


def mean_influence(scores_and_paths, folder, strategy):
    """Returns the mean scores of several models, float32 [num_query, num_train], and their file.

    scores_and_paths: the scores and the file of each model. The mean over several models is written
    to a new file in `folder`.
    """
    if len(scores_and_paths) == 1:
        return scores_and_paths[0]
    mean = sum(scores for scores, _ in scores_and_paths) / len(scores_and_paths)
    path = folder / f"pairwise_{strategy}.safetensors"
    with pipeline.atomic_path(path) as temporary:
        save_file({pipeline.constants.ALL_MODULE_NAME: mean}, temporary)
    return mean, path


# ---- Table and figure ----------------------------------------------------------------------------


def most_helpful_and_harmful(scores, count):
    """Returns the indices of the `count` most helpful and most harmful training images per query.

    scores: float32 [num_query, num_train]; both results: int64 [num_query, count]. The helpful ones
    are sorted from the highest score down, the harmful ones from the lowest score up.
    """
    count = min(count, scores.shape[1])
    helpful = scores.topk(count, dim=1).indices
    harmful = scores.topk(count, dim=1, largest=False).indices
    return helpful, harmful


def describe_examples(data):
    """Returns the index, the path and the class name of each image of ImageData, for the table."""
    labels = [data.class_names[label] for label in data.labels.tolist()]
    return list(zip(data.indices.tolist(), data.paths, labels, strict=True))


def top_rows(queries, scores, trained_on):
    """Yields the table's rows: for each query its most helpful, then its most harmful images.

    Skips images whose score is zero or has the other sign. queries, trained_on: results of
    `describe_examples`; scores: float32 [num_query, num_train].
    """
    helpful, harmful = most_helpful_and_harmful(scores, NUM_LISTED)
    for query, query_scores, helpful_images, harmful_images in zip(
        queries, scores, helpful, harmful, strict=True
    ):
        for rank, train in enumerate(helpful_images.tolist(), start=1):
            score = query_scores[train].item()
            if score > 0:
                yield [*query, "helpful", rank, *trained_on[train], score]
        for rank, train in enumerate(harmful_images.tolist(), start=1):
            score = query_scores[train].item()
            if score < 0:
                yield [*query, "harmful", rank, *trained_on[train], score]


def write_top_influences(path, scores, queries, data):
    """Writes the most helpful and most harmful training images of each query to a csv file.

    The first rows are about the mean over all queries.
    """
    trained_on = describe_examples(data)
    mean = scores.mean(0, keepdim=True)
    rows = [
        *top_rows([MEAN_QUERY], mean, trained_on),
        *top_rows(describe_examples(queries), scores, trained_on),
    ]
    pipeline.write_table(path, COLUMNS, rows)


def plot_top_influences(path, scores, queries, data, strategy):
    """Draws the first queries, each beside its most helpful and most harmful training images.

    The first row is about the mean over all queries, which has no image.
    """
    shown = queries.take(torch.arange(min(NUM_PICTURED_QUERIES, len(queries))))
    no_image = torch.full_like(queries.images[:1], 255)
    row_images = torch.cat([no_image, shown.images])
    row_scores = torch.cat([scores.mean(0, keepdim=True), scores[: len(shown)]])
    row_texts = [f"mean of\n{len(queries)} test images"]
    for index, _, label in describe_examples(shown):
        row_texts.append(f"test image {index}\n{pipeline.shorten(label)}")

    tops = torch.cat(most_helpful_and_harmful(row_scores, NUM_PICTURED), dim=1)
    images, texts, colours = [], [], []
    for image, text, scores_of_row, top in zip(
        row_images, row_texts, row_scores, tops, strict=True
    ):
        images += [image, *data.images[top]]
        texts.append(text)
        colours.append("black")
        for train in top.tolist():
            name = pipeline.shorten(data.class_names[data.labels[train]])
            texts.append(f"{name}\n{scores_of_row[train]:+.3g}")
            colours.append(HELPFUL_COLOUR if scores_of_row[train] > 0 else HARMFUL_COLOUR)
    title = (
        "Test images, each with the most helpful (blue, +) and most harmful (red, −) "
        f"of {len(data)} training images and their influence ({strategy})"
    )
    pipeline.draw_contact_sheet(
        path,
        images=images,
        texts=texts,
        colours=colours,
        columns=1 + tops.shape[1],
        title=title,
    )


def result_files(folder, strategy):
    """Returns the paths of the files that an analysis writes into a folder, except the scores."""
    return SimpleNamespace(
        table=folder / f"top_influences_{strategy}.csv",
        figure=folder / f"top_influences_{strategy}.png",
        record=folder / f"pairwise_{strategy}.json",
    )


def main():
    """Parses, loads, computes, reports."""
    args = parse_arguments()
    seconds = {}
    with pipeline.timed(seconds, "load"):
        test = pipeline.load_data(args.dataset, args.dataset_dir, "test", cache_dir=args.output_dir)
        queries = choose_queries(test, args.num_query_examples, args.query_indices)
        runs, _, data = pipeline.load_runs(args, seconds, args.snapshots)
        pipeline.check_splits(data, test)
        queries_on_device = queries.to(runs[0].data.images.device)

    scores_and_paths = [
        run.pairwise_influence(
            queries_on_device,
            args.query_batch_size,
            args.damping_factor,
            eigenvector_fraction=args.eigenvector_fraction,
            with_index=args.index,
        )
        for run in runs
    ]
    if not pipeline.is_main_process():
        return

    folder = pipeline.result_folder(runs)
    files = result_files(folder, args.factor_strategy)
    with pipeline.timed(seconds, "report"):
        pipeline.remove_results(files.table, files.figure, files.record)
        scores, scores_path = mean_influence(scores_and_paths, folder, args.factor_strategy)
        write_top_influences(files.table, scores, queries, data)
    with (
        pipeline.recorded(
            files.record,
            flags=vars(args),
            fields={"num_train": len(data), "num_query": len(queries)},
            device=queries_on_device.images.device,
            seconds=seconds,
        ),
        pipeline.timed(seconds, "report"),
    ):
        plot_top_influences(files.figure, scores, queries, data, args.factor_strategy)

    pipeline.print_seconds(seconds)
    pipeline.print_paths([scores_path, files.table, files.figure, files.record])


if __name__ == "__main__":
    pipeline.run(main)
