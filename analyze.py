"""Computes how much each training image influences the network's answer to each of the first test images.

A positive score means that training on the image more would raise the margin of the query's label (helpful), a
negative one that it would lower it (harmful).
"""

import csv

import pipeline

NUM_LISTED = 10  # most helpful and most harmful images per query in the csv file
NUM_PICTURED_QUERIES, NUM_PICTURED = 8, 5


def parse_arguments():
    """Reads the command line."""
    parser = pipeline.influence_parser(__doc__.splitlines()[0], corrupt_default=None)
    flag = parser.add_argument
    flag(
        "--num_query_examples",
        type=pipeline.positive_int,
        metavar="N",
        help="score the first N test images (default: 2000, or all where there are fewer)",
    )
    flag(
        "--query_batch_size",
        type=pipeline.positive_int,
        default=1000,
        metavar="N",
        help="queries whose gradients, 9 MB each in float32, are held at a time; on the CPU at most 3 GB of them",
    )
    return parser.parse_args()


def strongest(scores, count):
    """Returns the indices of the `count` most helpful and most harmful training images per query.

    scores: float32 [num_query, num_train]; both results int64 [num_query, count], strongest first.
    """
    count = min(count, scores.shape[1])
    return scores.topk(count, dim=1).indices, (-scores).topk(count, dim=1).indices


def write_top_influences(path, scores, query_labels, train_labels):
    """Writes the most helpful and most harmful training images of each query to a csv file."""
    tops = dict(zip(("helpful", "harmful"), strongest(scores, NUM_LISTED), strict=True))
    with pipeline.atomic_path(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["query", "query_label", "direction", "rank", "train", "train_label", "score"])
        for query, query_label in enumerate(query_labels.tolist()):
            for direction, indices in tops.items():
                for rank, train in enumerate(indices[query].tolist(), start=1):
                    writer.writerow(
                        [
                            query,
                            query_label,
                            direction,
                            rank,
                            train,
                            train_labels[train].item(),
                            scores[query, train].item(),
                        ]
                    )


def plot_top_influences(path, scores, queries, data, strategy):
    """Draws some queries, each beside its most helpful and its most harmful training images with labels and scores."""
    import matplotlib.pyplot as plt

    rows, columns = min(NUM_PICTURED_QUERIES, len(queries)), min(NUM_PICTURED, len(data))
    helpful, harmful = strongest(scores[:rows], columns)
    figure, axes = plt.subplots(
        rows, 1 + 2 * columns, figsize=(1.2 * (1 + 2 * columns), 1.4 * rows + 0.7), squeeze=False, layout="constrained"
    )
    for query, cells in enumerate(axes):
        name = data.class_names[queries.labels[query]]
        pipeline.show_image(cells[0], queries.images[query], f"query {query}\n{name}")
        shown = [*helpful[query].tolist(), *harmful[query].tolist()]
        for position, (cell, train) in enumerate(zip(cells[1:], shown, strict=True)):
            title = f"{data.class_names[data.labels[train]]}\n{scores[query, train]:+.3g}"
            pipeline.show_image(cell, data.images[train], title, "#0b5394" if position < columns else "firebrick")
    figure.suptitle(
        f"Test images, each with its {columns} most helpful (blue) and {columns} most harmful (red) "
        f"training images and their influence ({strategy})",
        fontsize=10,
    )
    pipeline.save_figure(figure, path)


def main():
    """Parses, loads, computes, reports."""
    args = parse_arguments()
    phases = pipeline.Phases()
    device = pipeline.choose_device(args.device, several_processes=True)
    dtype = pipeline.choose_dtype(args.precision, device)

    with phases("load"):
        clean = pipeline.load_train_data(args.dataset, args.dataset_dir, args.num_train_examples)
        data, _ = pipeline.with_corrupted_labels(clean, args.corrupt_percentage)
        test = pipeline.load_test_data(args.dataset, args.dataset_dir, data.class_names)
        queries = pipeline.first_queries(test, args.num_query_examples)
        path = pipeline.checkpoint_path(args.checkpoint_dir, args.corrupt_percentage)
        model, metadata = pipeline.load_checkpoint(path, device)
        pipeline.require_same_data(path, metadata, data)
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
    if not influence.is_main_process:
        return

    with phases("report"):
        top_csv, top_png = influence.path("top_influences", "csv"), influence.path("top_influences", "png")
        write_top_influences(top_csv, scores, queries.labels, data.labels)
        plot_top_influences(top_png, scores, queries, data, args.factor_strategy)

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
