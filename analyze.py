"""Computes how much each training image influences the network's answer to each of the first test images.

A positive score means that training on the image more would raise the margin of the query's label (helpful), a
negative one that it would lower it (harmful).
"""

import pipeline  # first of all, for Ctrl-C in the imports

import csv

import torch

DEFAULT_QUERIES = 2000
NUM_LISTED = 10  # most helpful and most harmful images per query in the csv file
NUM_PICTURED_QUERIES, NUM_PICTURED = 8, 5
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
        type=pipeline.index_list,
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
    return parser.parse_args()


def choose_queries(test, num_queries, indices):
    """Returns the test images at `indices`, or else the first `num_queries`, by default DEFAULT_QUERIES or all."""
    if indices is not None and max(indices) >= len(test):
        raise pipeline.UserError(f"--query_indices: there is no test image {max(indices)}, only 0 to {len(test) - 1}")
    if num_queries is not None and num_queries > len(test):
        raise pipeline.UserError(f"--num_query_examples {num_queries}: there are only {len(test)} test images")
    return test.take(torch.tensor(indices or range(min(num_queries or DEFAULT_QUERIES, len(test)))))


def strongest(scores, count):
    """Returns the indices of the `count` most helpful and most harmful training images per query.

    scores: float32 [num_query, num_train]; both results int64 [num_query, count], strongest first.
    """
    count = min(count, scores.shape[1])
    return scores.topk(count, dim=1).indices, (-scores).topk(count, dim=1).indices


def write_top_influences(path, scores, queries, data):
    """Writes the most helpful and most harmful training images of each query to a csv file."""
    tops = dict(zip(("helpful", "harmful"), strongest(scores, NUM_LISTED), strict=True))
    with pipeline.atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        columns = [
            f"{side}{column}" for side in ("query", "train") for column in ("", "_path", "_label", "_class_name")
        ]
        writer.writerow([*columns[:4], "direction", "rank", *columns[4:], "score"])
        for query in range(len(queries)):
            for direction, indices in tops.items():
                for rank, train in enumerate(indices[query].tolist(), start=1):
                    score = scores[query, train].item()
                    writer.writerow([*example(queries, query), direction, rank, *example(data, train), score])


def example(data, position):
    """Returns what the table says of one example: index, path, label, class name."""
    label = data.labels[position].item()
    return data.indices[position].item(), data.paths[position], label, data.class_names[label]


def plot_top_influences(path, scores, queries, data, title):
    """Draws some queries, each beside its most helpful and its most harmful training images with labels and scores."""
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
        for position, (cell, train) in enumerate(zip(cells[1:], shown, strict=True)):
            name = pipeline.shorten(data.class_names[data.labels[train]])
            colour = HELPFUL if position < columns else HARMFUL
            pipeline.show_image(cell, data.images[train], f"{name}\n{scores[query, train]:+.3g}", colour)
    figure.suptitle(title, fontsize=11)
    pipeline.save_figure(figure, path)


def main():
    """Parses, loads, computes, reports."""
    args = parse_arguments()
    phases = pipeline.Phases()
    device = pipeline.choose_device(args.device, several_processes=True)
    dtype = pipeline.choose_dtype(args.precision, device)

    with phases("load"):
        path = pipeline.checkpoint_path(args.checkpoint_dir, args.corrupt_percentage, args.cleaned)
        model, _, data, _ = pipeline.load_trained(
            path,
            device,
            args.dataset,
            args.dataset_dir,
            args.corrupt_percentage,
            args.num_train_examples,
            args.output_dir,
        )
        test = pipeline.load_test_data(args.dataset, args.dataset_dir, args.output_dir)
        queries = choose_queries(test, args.num_query_examples, args.query_indices)
        influence = pipeline.InfluenceRun(
            model,
            data.to(device),
            path.stem,
            output_dir=args.output_dir,
            strategy=args.factor_strategy,
            dtype=dtype,
            seed=args.seed,
            batch_size=args.train_batch_size,
            profile=args.profile,
            phases=phases,
        )

    scores, scores_path = influence.pairwise_influence(queries.to(device), args.query_batch_size, args.damping_factor)
    if not pipeline.is_main_process():
        return

    with phases("report"):
        top_csv, top_png = influence.path("top_influences", "csv"), influence.path("top_influences", "png")
        write_top_influences(top_csv, scores, queries, data)
        source = pipeline.data_name(args.dataset, args.dataset_dir)
        title = (
            f"Test images of {source}, each with the most helpful (blue, +) and most harmful (red, −) "
            f"of {len(data)} training images and their influence ({args.factor_strategy})"
        )
        plot_top_influences(top_png, scores, queries, data, title)

    record = {
        "flags": vars(args),
        "num_train": len(data),
        "num_query": len(queries),
        **pipeline.run_record(phases, device),
    }
    record_json = influence.path("pairwise", "json")
    pipeline.write_json(record_json, record)
    influence.report_profile()
    pipeline.report_files([scores_path, top_csv, top_png, record_json], phases)


if __name__ == "__main__":
    pipeline.run(main)
