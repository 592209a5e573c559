"""How fast the scripts are beside the reference configuration of the same experiment, and how far scores agree.

The reference is unmodified kronfluence with its defaults (float32, a data loader with per-image transforms) but a
given batch size, and a float32 training loop over the same kind of loader. Each runs in a process of its own,
alternating with the scripts, on the same checkpoint, images and pseudo-labels; figures are medians over the repeats.
Prints the tables on speed of README.md beside this file:

    python tests/studies/benchmark.py
    python tests/studies/benchmark.py --parts --scaling 1000,2000,4000
    python tests/studies/benchmark.py --dataset imagefolder --dataset_dir DIR --num_train_examples 50000 \
        --num_query_examples 2000 --train_batch_size 512 --num_train_epochs 25 --reference_batch_size 512
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from precision import spearman

import detect_mislabeled_dataset as detect
import pipeline
import train

ROOT = Path(pipeline.__file__).parent
WORK = ("covariance", "eigendecomposition", "lambda", "scores")
ALL = ("--factor_examples", "all")  # as the reference has it
RUNS = {
    "auto": ALL,
    "fp32": ("--precision", "fp32", *ALL),
    "as-run": (),
    "as-run-fp32": ("--precision", "fp32"),
}

# ---- The reference configuration -----------------------------------------------------------------


class TransformedImages(torch.utils.data.Dataset):
    """Images that go through torchvision's transforms one by one; the pseudo-labels are those of the scripts."""

    def __init__(self, data, augmented=False, seed=1004):
        from torchvision import transforms

        augmentations = [transforms.RandomCrop(pipeline.IMAGE_SIZE, padding=train.CROP_PADDING)]
        augmentations += [transforms.RandomHorizontalFlip()]
        normalization = transforms.Normalize(pipeline.CHANNEL_MEAN, pipeline.CHANNEL_STD)
        self.transform = transforms.Compose(
            (augmentations * augmented) + [transforms.ToTensor(), normalization]
        )
        self.images, self.labels = data.images.permute(0, 2, 3, 1).numpy(), data.labels
        self.uniforms = pipeline.InfluenceDataset(data, seed).uniforms

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        from PIL import Image

        return (
            self.transform(Image.fromarray(self.images[index])),
            self.labels[index],
            self.uniforms[index],
        )


def reference_training(args, data, test, device):
    """Trains by the reference loop. Returns images per second, workers' start included, and the test accuracy."""
    torch.manual_seed(args.seed)
    model = pipeline.construct_model("resnet9", len(data.class_names)).to(
        device, memory_format=torch.contiguous_format
    )
    loader = torch.utils.data.DataLoader(
        TransformedImages(data, augmented=True),
        batch_size=args.train_batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=min(4, os.cpu_count()),
    )
    optimizer = torch.optim.SGD(
        model.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay
    )
    steps, step, start = args.num_train_epochs * len(loader), 0, time.perf_counter()
    for _ in range(args.num_train_epochs):
        model.train()
        for images, labels, _ in loader:
            optimizer.param_groups[0]["lr"] = args.learning_rate * train.schedule(step, steps)
            optimizer.zero_grad()
            F.cross_entropy(model(images.to(device)), labels.to(device)).backward()
            optimizer.step()
            step += 1
    if device.type == "cuda":
        torch.cuda.synchronize()
    speed = steps * args.train_batch_size / (time.perf_counter() - start)
    logits = train.compute_logits(model, test.to(device), 1000, torch.float32).cpu()
    return {"images_per_second": speed, "accuracy": train.evaluate(logits, test.labels)[1]}


def reference_scores(args, data, queries, device):
    """Computes EKFAC self-influence or pairwise scores by unmodified kronfluence. Returns seconds and the file."""
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments

    path = pipeline.checkpoint_path(args.checkpoint_dir, args.corrupt_percentage)
    model, _ = pipeline.load_checkpoint(path, device)
    task = pipeline.ClassificationTask()
    analyzer = Analyzer(
        "reference",
        prepare_model(model.to(memory_format=torch.contiguous_format), task),
        task,
        cpu=device.type == "cpu",
        output_dir=args.output_dir,
    )
    dataset, batch_size, settings = (
        TransformedImages(data),
        args.reference_batch_size,
        FactorArguments("ekfac"),
    )
    start = time.perf_counter()
    analyzer.fit_covariance_matrices("ekfac", dataset, batch_size, factor_args=settings)
    decomposition_start = time.perf_counter()
    analyzer.perform_eigendecomposition("ekfac", settings)
    fixed = time.perf_counter() - decomposition_start
    analyzer.fit_lambda_matrices("ekfac", dataset, batch_size, factor_args=settings)
    if args.reference == "self":
        analyzer.compute_self_scores("self", "ekfac", dataset, batch_size)
    else:
        analyzer.compute_pairwise_scores(
            "pairwise",
            "ekfac",
            TransformedImages(queries),
            dataset,
            min(args.reference_query_batch_size, len(queries)),
            batch_size,
        )
    seconds = fixed + (time.perf_counter() - start - fixed) * args.num_train_examples / len(data)
    return {
        "seconds": seconds,
        "scores": str(next(Path(args.output_dir).rglob("*_scores.safetensors"))),
    }


def run_reference(args):
    """Runs one reference in this process and leaves its figures in `<output_dir>/reference.json`."""
    device = pipeline.choose_device(args.device, several_processes=False)
    cache_dir = Path(args.output_dir).parent  # reading is not what is measured
    count = args.reference_examples or args.num_train_examples
    clean = pipeline.load_data(args.dataset, args.dataset_dir, "train", count, cache_dir)
    data = pipeline.training_examples(clean, args.corrupt_percentage)
    test = pipeline.load_data(args.dataset, args.dataset_dir, "test", cache_dir=cache_dir)
    queries = test.take(torch.arange(min(args.num_query_examples, len(test))))
    if args.reference == "training":
        figures = reference_training(args, data, test, device)
    else:
        figures = reference_scores(args, data, queries, device)
    figures["peak_memory_bytes"] = pipeline.environment(device)["peak_memory_bytes"]
    pipeline.make_folder(args.output_dir)
    (Path(args.output_dir) / "reference.json").write_text(json.dumps(figures))


# ---- The scripts ---------------------------------------------------------------------------------


def call(*command):
    """Runs a Python script to its end, its output out of sight. Returns the wall-clock seconds."""
    start = time.perf_counter()
    process = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True)
    if process.returncode:
        sys.exit(f"{command[0]} ended with {process.returncode}: {process.stderr[-2000:]}")
    return time.perf_counter() - start


def run_training(flags, checkpoint_dir, precision, seed):
    """Runs train.py. Returns images per second and the test accuracy."""
    call(
        *(ROOT / "train.py", *flags),
        *("--checkpoint_dir", checkpoint_dir, "--precision", precision, "--seed", seed),
        *("--output_dir", Path(checkpoint_dir).parent),  # keeps what was read from class folders
    )
    metadata = torch.load(next(Path(checkpoint_dir).glob("*.pth")), weights_only=True)["metadata"]
    steps = metadata["num_train_epochs"] * (metadata["num_train"] // metadata["train_batch_size"])
    return {
        "images_per_second": steps * metadata["train_batch_size"] / metadata["train_seconds"],
        "accuracy": metadata["accuracy"]["test"],
    }


def run_script(name, flags, checkpoint_dir, output_dir):
    """Runs detect_mislabeled_dataset.py or analyze.py. Returns seconds, seconds to the first work, memory and file.

    seconds: of covariances, eigendecomposition, lambda and scores; seconds_to_start: from the call to the first of
    them, imports and loading included, and the end of the process, which is not timed by itself.
    """
    wall = call(
        *(ROOT / name, *flags),
        *("--checkpoint_dir", checkpoint_dir, "--output_dir", output_dir),
        *("--damping_factor", "1e-8"),  # kronfluence's own default
    )
    record = json.loads(next(Path(output_dir).glob("*/*.json")).read_text())
    phases = record["seconds"]
    return {
        "seconds": sum(phases[phase] for phase in WORK),
        "seconds_by_phase": phases,
        "seconds_to_start": wall - phases["total"] + phases["load"],
        "start_to_exit": wall,
        "peak_memory_bytes": record["peak_memory_bytes"],
        "scores": str(next(Path(output_dir).rglob("*_scores.safetensors"))),
    }


# ---- Side by side --------------------------------------------------------------------------------


def read_scores(path):
    """Returns the scores in a file as a float64 array, [N] or [Q, N]."""
    from safetensors.torch import load_file

    return load_file(path)["all_modules"].double().numpy()


def agreement(scores, reference, is_corrupted):
    """Returns how well scores [N] or [Q, N] agree with the reference's, NaN of others; [N] also by what they find."""
    if scores.shape != reference.shape:
        return dict.fromkeys(("relative_error", "spearman", "recall_at_10_difference"), math.nan)
    rows = list(zip(np.atleast_2d(scores), np.atleast_2d(reference), strict=True))
    result = {
        "relative_error": float(np.linalg.norm(scores - reference) / np.linalg.norm(reference)),
        "spearman": float(np.mean([spearman(row, expected) for row, expected in rows])),
    }
    if scores.ndim == 1:
        found = [
            detect.evaluate_ranking(values, is_corrupted)["recall_at_10"]
            for values in (scores, reference)
        ]
        result["recall_at_10_difference"] = found[0] - found[1]
    return result


def median(rows, name):
    """Returns the median of a figure over the repeats."""
    return statistics.median(row[name] for row in rows)


def product_speed(device, dtype, size=2048, repeats=10):
    """Returns the floating-point operations per second of a product of square matrices, which bounds all the rest."""
    matrix = torch.randn(size, size, device=device, dtype=dtype)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        (matrix @ matrix)[0, 0].item()  # waits for the device
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def measure(args, data_flags, recipe, is_corrupted, folder):
    """Runs everything `args.repeats` times, reference and scripts in turn. Yields (what, who, figures)."""
    scored = [*data_flags, "--num_query_examples", args.num_query_examples]
    checkpoint_dir = folder / f"checkpoints-{args.precision}-0"
    for repeat in range(args.repeats if args.parts else 0):
        needed = () if checkpoint_dir.exists() else (args.precision,)
        for precision in ("auto", "fp32") if "training" in args.parts else needed:
            target = folder / f"checkpoints-{precision}-{repeat}"
            yield (
                "training",
                precision,
                run_training([*data_flags, *recipe], target, precision, seed=repeat),
            )
        for what in args.parts:
            output_dir = folder / f"reference-{what}-{repeat}"
            call(
                *(
                    __file__,
                    "--reference",
                    what,
                    *scored,
                    *recipe,
                    "--seed",
                    repeat,
                    "--output_dir",
                    output_dir,
                ),
                *(
                    "--checkpoint_dir",
                    checkpoint_dir,
                    "--reference_batch_size",
                    args.reference_batch_size,
                ),
                *("--reference_query_batch_size", args.reference_query_batch_size),
                *("--reference_examples", args.reference_examples or args.num_train_examples),
            )
            figures = json.loads((output_dir / "reference.json").read_text())
            yield what, "reference", figures
            if what == "training":
                continue
            name, flags = (
                ("detect_mislabeled_dataset.py", data_flags)
                if what == "self"
                else ("analyze.py", scored)
            )
            expected = read_scores(figures["scores"])
            for who in args.runs:
                ours = run_script(
                    name, [*flags, *RUNS[who]], checkpoint_dir, folder / f"{what}-{who}-{repeat}"
                )
                yield (
                    what,
                    who,
                    ours | agreement(read_scores(ours["scores"]), expected, is_corrupted),
                )
            shutil.rmtree(output_dir)


def scaling(args, data_flags, recipe, folder):
    """Yields the figures of detect_mislabeled_dataset.py at each of `args.scaling` numbers of images."""
    for count in args.scaling:
        flags = [*data_flags, "--num_train_examples", count]  # the last one counts
        run_training(
            [*flags, *recipe, "--num_train_epochs", 1], folder / f"scaling-{count}", "auto", seed=0
        )
        yield (
            count,
            run_script(
                "detect_mislabeled_dataset.py",
                [*flags, *ALL],
                folder / f"scaling-{count}",
                folder / f"scaled-{count}",
            ),
        )


def print_scores(figures, what):
    """Prints the medians and ratios of one kind of scores in Markdown; figures: lists by (what, who)."""
    print(
        f"\n| {what} | reference | scripts | ratio | relative error | Spearman | found at 10 % | GB, reference | GB |"
        "\n|---|---|---|---|---|---|---|---|---|"
    )
    reference = figures[what, "reference"]
    theirs, runs = median(reference, "seconds"), [who for who in RUNS if (what, who) in figures]
    for who in runs:
        rows = figures[what, who]
        ours = median(rows, "seconds")
        difference = (
            f"{100 * median(rows, 'recall_at_10_difference'):+.2f} points" if what == "self" else ""
        )
        print(
            f"| {who} | {theirs:.1f} s | {ours:.1f} s | {theirs / ours:.1f} x | "
            f"{median(rows, 'relative_error'):.1e} | {median(rows, 'spearman'):.5f} | {difference} | "
            f"{median(reference, 'peak_memory_bytes') / 1e9:.1f} | {median(rows, 'peak_memory_bytes') / 1e9:.1f} |"
        )
    for who in runs:
        by_phase = [row["seconds_by_phase"] for row in figures[what, who]]
        phases = ", ".join(f"{phase} {median(by_phase, phase):.1f}" for phase in WORK)
        whole, start = (
            median(figures[what, who], name) for name in ("start_to_exit", "seconds_to_start")
        )
        print(f"{who}: {whole:.1f} s from start to exit, {start:.1f} before the first of {phases}")


def print_training(figures):
    """Prints the medians and ratios of the trainings in Markdown; figures: lists by (what, who)."""
    print("\n| training | images/s | ratio | test accuracy, mean over seeds |\n|---|---|---|---|")
    theirs = median(figures["training", "reference"], "images_per_second")
    for who in ("reference", "auto", "fp32"):
        rows = figures["training", who]
        speed = median(rows, "images_per_second")
        accuracies = [row["accuracy"] for row in rows]
        print(
            f"| {who} | {speed:.0f} | {speed / theirs:.1f} x | {100 * statistics.mean(accuracies):.2f} % "
            f"± {100 * statistics.stdev(accuracies) if len(accuracies) > 1 else 0:.2f} |"
        )


def main():
    """Parses, runs, prints."""
    parser = pipeline.OneLineParser(description=__doc__.splitlines()[0])
    flag = parser.add_argument
    some = pipeline.number(float, "a fraction above 0 and below 1", lambda value: 0 < value < 1)
    flag("--dataset", default="synthetic")
    flag("--dataset_dir", default="./data")
    flag("--device", default="auto")
    flag("--num_train_examples", type=int, default=400)
    flag("--num_query_examples", type=int, default=200)
    flag("--corrupt_percentage", type=some, default=0.1)
    flag("--train_batch_size", type=int, default=32)
    flag("--num_train_epochs", type=int, default=6)
    flag("--learning_rate", type=float, default=0.2)
    flag("--weight_decay", type=float, default=1e-4)
    flag("--reference_batch_size", type=int, default=128)
    flag("--reference_query_batch_size", type=int, default=200)
    flag(
        "--reference_examples",
        type=int,
        help="the reference takes so few images; its seconds are extrapolated",
    )
    flag(
        "--precision",
        choices=("auto", "fp32"),
        default="auto",
        help="of the training of the model that is scored",
    )
    flag("--repeats", type=int, default=3)
    flag(
        "--parts",
        nargs="*",
        choices=("training", "self", "pairwise"),
        default=["training", "self", "pairwise"],
    )
    flag(
        "--runs",
        nargs="*",
        choices=RUNS,
        default=["auto", "fp32"],
        help="what runs beside the reference",
    )
    flag(
        "--scaling",
        type=lambda text: [int(count) for count in text.split(",")],
        default=[],
        metavar="N,N,...",
    )
    hidden = {"help": argparse.SUPPRESS}
    flag("--reference", choices=("training", "self", "pairwise"), **hidden)
    flag("--seed", type=int, default=0, **hidden)
    flag("--checkpoint_dir", **hidden)
    flag("--output_dir", **hidden)
    args = parser.parse_args()
    if args.reference:
        return run_reference(args)
    if args.reference_examples and args.parts != [
        "self"
    ]:  # the gradients of queries do not grow with the images
        raise pipeline.UserError("argument --reference_examples: give --parts self")

    def flags(*names):
        return [text for name in names for text in (f"--{name}", getattr(args, name))]

    data_flags = flags(
        "dataset", "dataset_dir", "device", "num_train_examples", "corrupt_percentage"
    )
    recipe = flags("train_batch_size", "num_train_epochs", "learning_rate", "weight_decay")
    device = pipeline.choose_device(args.device, several_processes=False)
    dtypes = {torch.float32, pipeline.configure_precision(args.precision, device)}
    speeds = {str(dtype): product_speed(device, dtype) for dtype in dtypes}
    machine = pipeline.environment(device) | {"product_speed": speeds}
    figures, scaled = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        clean = pipeline.load_data(
            args.dataset, args.dataset_dir, "train", args.num_train_examples, folder
        )
        is_corrupted = pipeline.training_examples(
            clean, args.corrupt_percentage
        ).is_corrupted.numpy()
        for what, who, row in measure(args, data_flags, recipe, is_corrupted, Path(folder)):
            figures.setdefault((what, who), []).append(row)
            print(
                f"{what:10}{who:10}",
                {name: value for name, value in row.items() if name != "scores"},
                flush=True,
            )
        for count, row in scaling(args, data_flags, recipe, Path(folder)):
            scaled[count] = row
            print(
                f"{count:8} images: {row['seconds']:7.1f} s, {row['peak_memory_bytes'] / 1e9:.2f} GB",
                flush=True,
            )
    print(f"\n{machine}")
    for what in args.parts:
        print_training(figures) if what == "training" else print_scores(figures, what)


if __name__ == "__main__":
    main() if "--reference" in sys.argv else pipeline.run(
        main
    )  # the reference manages its memory as it always does
