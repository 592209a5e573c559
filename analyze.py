"""Computes how much each training image influences the network's answer to each chosen test image.

A positive score means that training on the image more would raise the log-odds of the query's label (helpful), a
negative one that it would lower them (harmful).
"""

import argparse

import torch
from safetensors.torch import save_file

import pipeline

DEFAULT_QUERIES = 2000
NUM_LISTED = 10  # most helpful and most harmful images per query in the csv file
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
NUM_PICTURED_QUERIES, NUM_PICTURED = 8, 5
HELPFUL, HARMFUL = "#0b5394", "firebrick"


def number_list(text):
    """Reads numbers such as `3,17,40-59` into a list without repetition, in the order given."""
    numbers = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        last = last if dash else first
        if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last) < 10**7):
            raise argparse.ArgumentTypeError(
                f"'{text}' is not a list of numbers such as 3,17,40-59"
            )
        numbers += range(int(first), int(last) + 1)
    return list(dict.fromkeys(numbers))


def parse_arguments():
    """Reads the command line."""
    parser = pipeline.influence_parser(__doc__)
    parser.set_defaults(
        damping_factor=1e-6
    )  # with thousands of images it predicts retraining better than heuristic
    number, flag = pipeline.positive_int, parser.add_argument
    which = parser.add_mutually_exclusive_group().add_argument
    which(
        "--num_query_examples",
        type=number,
        metavar="N",
        help=f"first N test images (default: {DEFAULT_QUERIES})",
    )
    which(
        "--query_indices",
        type=number_list,
        metavar="LIST",
        help="just these test images, such as 3,17,40-59",
    )
    flag(
        "--query_batch_size",
        type=number,
        default=1000,
        metavar="N",
        help="gradients held (default: %(default)s)",
    )
    return parser.parse_args()


def choose_queries(test, num_queries, indices):
    """Returns the test images at `indices`, or else the first `num_queries`, by default DEFAULT_QUERIES or all."""
    if indices is not None and max(indices) >= len(test):
        raise pipeline.UserError(
            f"--query_indices: there is no test image {max(indices)}, only 0 to {len(test) - 1}"
        )
    if num_queries is not None and num_queries > len(test):
        raise pipeline.UserError(
            f"--num_query_examples {num_queries}: there are only {len(test)} test images"
        )
    return test.take(torch.tensor(indices or range(min(num_queries or DEFAULT_QUERIES, len(test)))))


# ---- Table and picture ---------------------------------------------------------------------------


def strongest(scores, count):
    """Returns the indices of the `count` most helpful and most harmful training images per query.

    scores: float32 [num_query, num_train]; both results int64 [num_query, count], strongest first.
    """
    count = min(count, scores.shape[1])
    return scores.topk(count, dim=1).indices, (-scores).topk(count, dim=1).indices


def write_top_influences(path, scores, queries, data):
    """Writes the most helpful and the most harmful images of each query, as the score's sign says, to a csv file."""

    def examples(data):
        names = [data.class_names[label] for label in data.labels.tolist()]
        return list(zip(data.indices.tolist(), data.paths, names, strict=True))

    trained_on, rows = examples(data), []
    tops = [
        (scores.gather(1, indices).tolist(), indices.tolist())
        for indices in strongest(scores, NUM_LISTED)
    ]
    for query, example in enumerate(examples(queries)):
        for direction, sign, (values, indices) in zip(
            ("helpful", "harmful"), (1, -1), tops, strict=True
        ):
            for rank, (score, train) in enumerate(
                zip(values[query], indices[query], strict=True), start=1
            ):
                if sign * score > 0:
                    rows.append([*example, direction, rank, *trained_on[train], score])
    pipeline.write_table(path, COLUMNS, rows)


def plot_top_influences(path, scores, queries, data, strategy):
    """Draws some queries, each beside its most helpful and its most harmful training images with labels and scores."""
    helpful, harmful = strongest(scores[:NUM_PICTURED_QUERIES], NUM_PICTURED)
    images, texts, colours = [], [], []
    for query, trains in enumerate(torch.cat([helpful, harmful], 1).tolist()):
        images += [queries.images[query], *(data.images[train] for train in trains)]
        name = pipeline.shorten(queries.class_names[queries.labels[query]])
        texts.append(f"test image {queries.indices[query]}\n{name}")
        names = [pipeline.shorten(data.class_names[data.labels[train]]) for train in trains]
        texts += [
            f"{name}\n{scores[query, train]:+.3g}"
            for name, train in zip(names, trains, strict=True)
        ]
        colours += [
            "black",
            *(HELPFUL if scores[query, train] > 0 else HARMFUL for train in trains),
        ]
    title = (
        "Test images, each with the most helpful (blue, +) and most harmful (red, −) "
        f"of {len(data)} training images and their influence ({strategy})"
    )
    pipeline.draw_contact_sheet(
        path, images, texts, colours, 1 + helpful.shape[1] + harmful.shape[1], title
    )


def main():
    """Parses, loads, computes, reports."""
    args = parse_arguments()
    seconds = {}
    with pipeline.timed(seconds, "load"):
        test = pipeline.load_data(args.dataset, args.dataset_dir, "test", cache_dir=args.output_dir)
        queries = choose_queries(test, args.num_query_examples, args.query_indices)
        runs, _, data = pipeline.load_runs(args, seconds)
        on_device = queries.to(runs[0].data.images.device)

    found = [
        run.pairwise_influence(on_device, args.query_batch_size, args.damping_factor)
        for run in runs
    ]
    if not pipeline.is_main_process():
        return

    folder = pipeline.result_folder(runs)
    strategy = args.factor_strategy
    scores, scores_path = found[0]
    if len(runs) > 1:
        scores = sum(own for own, _ in found) / len(runs)
        scores_path = folder / f"pairwise_{strategy}.safetensors"
    top_csv = folder / f"top_influences_{strategy}.csv"
    top_png = folder / f"top_influences_{strategy}.png"
    record_json = folder / f"pairwise_{strategy}.json"

    with pipeline.timed(seconds, "report"):
        if len(runs) > 1:
            with pipeline.atomic_path(scores_path) as temporary:
                save_file({pipeline.constants.ALL_MODULE_NAME: scores}, temporary)
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
        plot_top_influences(top_png, scores, queries, data, strategy)

    pipeline.print_seconds(seconds)
    pipeline.print_paths([scores_path, top_csv, top_png, record_json])


if __name__ == "__main__":
    pipeline.run(main)
