"""Computes how much each training image influences the prediction for each chosen test image.

A positive score is helpful: training on the image more would raise the log-odds of the query's
label. A negative score is harmful: it would lower them.
"""

import argparse

import torch
from safetensors.torch import save_file

import pipeline

DEFAULT_QUERIES = 2000
NUM_LISTED = 10  # most helpful and most harmful images of each query in the csv file
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
# The mean over all queries comes before them in the csv file; it has no path and no label.
MEAN_QUERY = ("mean", "", "")
NUM_PICTURED_QUERIES, NUM_PICTURED = 8, 5  # rows of the figure, and images on either side
HELPFUL_COLOUR, HARMFUL_COLOUR = "#0b5394", "firebrick"


def number_list(text):
    """Reads numbers such as `3,17,40-59` into a list without repetition, in the order given."""
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
    # With thousands of images this predicts retraining better than the heuristic.
    parser.set_defaults(damping_factor=1e-6)
    add_query_flags(parser.groups["data"])
    add_model_flags(parser.groups["model"])
    parser.groups["curvature"].add_argument(
        "--eigenvector_fraction",
        type=pipeline.kept_fraction,
        default=1.0,
        metavar="FRACTION",
        help="keep this fraction of the eigenvectors of each layer's input covariance, those with "
        "the largest eigenvalues: faster, with less memory (default: %(default)s, all)",
    )
    args = parser.parse_args()
    if (
        args.eigenvector_fraction < 1
        and args.factor_strategy not in pipeline.EIGENVECTOR_STRATEGIES
    ):
        parser.error(
            f"argument --eigenvector_fraction: {args.factor_strategy} has no eigenvectors; "
            "choose another strategy"
        )
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
    """Adds the flags that say which networks are averaged, and how many queries are held."""
    group.add_argument(
        "--snapshots",
        type=pipeline.positive_int,
        default=1,
        metavar="N",
        help="average the scores of the last N of the three networks that a training keeps "
        "(default: %(default)s, the final network)",
    )
    group.add_argument(
        "--query_batch_size",
        type=pipeline.positive_int,
        default=1000,
        metavar="N",
        help="hold the gradients of N queries in memory at a time (default: %(default)s)",
    )


def choose_queries(test, num_queries, indices):
    """Returns the test images at `indices`, or else the first `num_queries` of them.

    By default these are DEFAULT_QUERIES, or all where there are fewer. Raises UserError where there
    are not so many.
    """
    if indices is not None and max(indices) >= len(test):
        raise pipeline.UserError(
            f"--query_indices: there is no test image {max(indices)}, only 0 to {len(test) - 1}"
        )
    if num_queries is not None and num_queries > len(test):
        raise pipeline.UserError(
            f"--num_query_examples {num_queries}: there are only {len(test)} test images"
        )
    if indices is None:
        indices = range(min(num_queries or DEFAULT_QUERIES, len(test)))
    return test.take(torch.tensor(indices))


def mean_influence(found, folder, strategy):
    """Returns the mean scores of several models, float32 [num_query, num_train], and their file.

    found: scores and file of each model. The mean over several models gets a file of its own.
    """
    if len(found) == 1:
        return found[0]
    scores = sum(own for own, _ in found) / len(found)
    path = folder / f"pairwise_{strategy}.safetensors"
    with pipeline.atomic_path(path) as temporary:
        save_file({pipeline.constants.ALL_MODULE_NAME: scores}, temporary)
    return scores, path


# ---- Table and figure ----------------------------------------------------------------------------


def strongest(scores, count):
    """Returns the indices of the `count` most helpful and most harmful training images per query.

    scores: float32 [num_query, num_train]; both results int64 [num_query, count], strongest first.
    """
    count = min(count, scores.shape[1])
    return scores.topk(count, dim=1).indices, (-scores).topk(count, dim=1).indices


def describe_examples(data):
    """Returns what the table tells of each image: index, path and name of its class."""
    labels = [data.class_names[label] for label in data.labels.tolist()]
    return list(zip(data.indices.tolist(), data.paths, labels, strict=True))


def top_rows(queries, scores, trained_on):
    """Yields the table's rows of queries: the most helpful images of each, then the most harmful.

    Left out are images whose score has the other sign. queries and trained_on: what
    `describe_examples` tells; scores: float32 [num_query, num_train].
    """
    helpful, harmful = strongest(scores, NUM_LISTED)
    for query, own_scores, up, down in zip(queries, scores, helpful, harmful, strict=True):
        for direction, sign, top in (("helpful", 1, up), ("harmful", -1, down)):
            top_scores = own_scores[top].tolist()
            for rank, (train, score) in enumerate(zip(top.tolist(), top_scores, strict=True), 1):
                if sign * score > 0:
                    yield [*query, direction, rank, *trained_on[train], score]


def write_top_influences(path, scores, queries, data):
    """Writes the most helpful and most harmful training images of each query to a csv file.

    It begins with those of the mean over all queries.
    """
    trained_on = describe_examples(data)
    mean = scores.mean(0, keepdim=True)
    rows = [
        *top_rows([MEAN_QUERY], mean, trained_on),
        *top_rows(describe_examples(queries), scores, trained_on),
    ]
    pipeline.write_table(path, COLUMNS, rows)


def plot_top_influences(path, scores, queries, data, strategy):
    """Draws queries, each beside its most helpful and its most harmful training images.

    The first row is the mean over all queries, which has no image.
    """
    shown = queries.take(torch.arange(min(NUM_PICTURED_QUERIES, len(queries))))
    no_image = torch.full_like(queries.images[:1], 255)
    row_images = torch.cat([no_image, shown.images])
    row_scores = torch.cat([scores.mean(0, keepdim=True), scores[: len(shown)]])
    row_texts = [f"mean of\n{len(queries)} test images"]
    for index, _, label in describe_examples(shown):
        row_texts.append(f"test image {index}\n{pipeline.shorten(label)}")

    tops = torch.cat(strongest(row_scores, NUM_PICTURED), dim=1)  # (rows, 2 * NUM_PICTURED)
    images, texts, colours = [], [], []
    for image, text, own_scores, top in zip(row_images, row_texts, row_scores, tops, strict=True):
        images += [image, *data.images[top]]
        texts.append(text)
        colours.append("black")
        for train in top.tolist():
            name = pipeline.shorten(data.class_names[data.labels[train]])
            texts.append(f"{name}\n{own_scores[train]:+.3g}")
            colours.append(HELPFUL_COLOUR if own_scores[train] > 0 else HARMFUL_COLOUR)
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


def main():
    """Parses, loads, computes, reports."""
    args = parse_arguments()
    seconds = {}
    with pipeline.timed(seconds, "load"):
        test = pipeline.load_data(args.dataset, args.dataset_dir, "test", cache_dir=args.output_dir)
        queries = choose_queries(test, args.num_query_examples, args.query_indices)
        runs, _, data = pipeline.load_runs(args, seconds, args.snapshots)
        pipeline.check_splits(data, test)
        on_device = queries.to(runs[0].data.images.device)

    found = [
        run.pairwise_influence(
            on_device, args.query_batch_size, args.damping_factor, args.eigenvector_fraction
        )
        for run in runs
    ]
    if not pipeline.is_main_process():
        return

    folder = pipeline.result_folder(runs)
    top_csv = folder / f"top_influences_{args.factor_strategy}.csv"
    top_png = folder / f"top_influences_{args.factor_strategy}.png"
    record_json = folder / f"pairwise_{args.factor_strategy}.json"
    with pipeline.timed(seconds, "report"):
        scores, scores_path = mean_influence(found, folder, args.factor_strategy)
        write_top_influences(top_csv, scores, queries, data)
    with (
        pipeline.recorded(
            record_json,
            flags=vars(args),
            fields={"num_train": len(data), "num_query": len(queries)},
            device=on_device.images.device,
            seconds=seconds,
        ),
        pipeline.timed(seconds, "report"),
    ):
        plot_top_influences(top_png, scores, queries, data, args.factor_strategy)

    pipeline.print_seconds(seconds)
    pipeline.print_paths([scores_path, top_csv, top_png, record_json])


if __name__ == "__main__":
    pipeline.run(main)
