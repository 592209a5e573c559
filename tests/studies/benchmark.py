"""Compares the speed of the scripts with that of unmodified kronfluence, and the scores of both.

The reference is kronfluence with its defaults (float32, a data loader with per-image transforms)
and a given batch size. Training is compared with a float32 loop over such a loader. The reference
and the scripts run in turn, each in a process of its own, on the same checkpoint, images and
pseudo-labels. The tables contain medians over the repeats:

    python tests/studies/benchmark.py
    python tests/studies/benchmark.py --dataset imagefolder --dataset_dir DIR \
        --num_train_examples 512 --parts self
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
PARTS = ("training", "self", "pairwise")
DATA_FLAGS = ("dataset", "dataset_dir", "device", "num_train_examples", "corrupt_percentage")
MODEL_FLAGS = ("model",)
TRAINING_FLAGS = ("train_batch_size", "num_train_epochs", "learning_rate", "weight_decay")
REFERENCE_FLAGS = ("reference_batch_size", "reference_query_batch_size", "reference_examples")
PHASES = ("covariance", "eigendecomposition", "lambda", "scores")
ALL = ("--factor_examples", "all")  # the reference, too, fits its factors on all images
# Flags of each run of the scripts. `as-run` has the scripts' defaults: a detection then fits its
# factors on 1,000 images.
RUNS = {
    "auto": ALL,
    "fp32": ("--precision", "fp32", *ALL),
    "as-run": (),
    "as-run-fp32": ("--precision", "fp32"),
}


# ---- The reference -------------------------------------------------------------------------------


class TransformedImages(torch.utils.data.Dataset):
    """Images that torchvision transforms one by one, with the numbers that draw pseudo-labels."""

    def __init__(self, data, augmented=False, seed=1004):
        from torchvision import transforms

        steps = []
        if augmented:
            steps.append(transforms.RandomCrop(pipeline.IMAGE_SIZE, padding=train.CROP_PADDING))
            steps.append(transforms.RandomHorizontalFlip())
        steps.append(transforms.ToTensor())
        steps.append(transforms.Normalize(data.channel_mean, data.channel_std))
        self.transform = transforms.Compose(steps)
        self.images = data.images.permute(0, 2, 3, 1).numpy()  # (N, 32, 32, 3)
        self.labels = data.labels
        self.uniforms = pipeline.InfluenceDataset(data, seed).uniforms

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        from PIL import Image

        image = self.transform(Image.fromarray(self.images[index]))
        return image, self.labels[index], self.uniforms[index]


def reference_training(args, data, test, device):
    """Trains by the reference loop. Returns images per second and test accuracy.

    The time includes the start of the data loader's workers.
    """
    torch.manual_seed(args.seed)
    model = pipeline.construct_model(args.model, len(data.class_names))
    model = model.to(device, memory_format=torch.contiguous_format)
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
    steps = args.num_train_epochs * len(loader)
    step = 0
    start = time.perf_counter()
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
    """Computes EKFAC scores by unmodified kronfluence. Returns seconds and the file of the scores.

    If the reference scores only some images, its seconds are extrapolated to all images.
    """
    from kronfluence.arguments import FactorArguments

    analyzer = reference_analyzer(args, device)
    dataset, batch_size = TransformedImages(data), args.reference_batch_size
    settings = FactorArguments("ekfac")
    start = time.perf_counter()
    analyzer.fit_covariance_matrices("ekfac", dataset, batch_size, factor_args=settings)
    decomposition_start = time.perf_counter()
    analyzer.perform_eigendecomposition("ekfac", settings)
    fixed = time.perf_counter() - decomposition_start  # does not depend on the number of images
    analyzer.fit_lambda_matrices("ekfac", dataset, batch_size, factor_args=settings)
    if args.reference == "self":
        analyzer.compute_self_scores("self", "ekfac", dataset, batch_size)
    else:
        query_batch_size = min(args.reference_query_batch_size, len(queries))
        analyzer.compute_pairwise_scores(
            scores_name="pairwise",
            factors_name="ekfac",
            query_dataset=TransformedImages(queries),
            train_dataset=dataset,
            per_device_query_batch_size=query_batch_size,
            per_device_train_batch_size=batch_size,
        )
    growing = time.perf_counter() - start - fixed
    scores = next(Path(args.output_dir).rglob("*_scores.safetensors"))
    seconds = fixed + growing * args.num_train_examples / len(data)
    return {"seconds": seconds, "scores": str(scores)}


def reference_analyzer(args, device):
    """Returns kronfluence's Analyzer for the checkpoint, with kronfluence's own trackers."""
    from kronfluence.analyzer import Analyzer, prepare_model

    path = pipeline.checkpoint_path(args.checkpoint_dir, args.corrupt_percentage)
    model, _ = pipeline.load_checkpoint(path, device)
    model = model.to(memory_format=torch.contiguous_format)
    task = pipeline.ClassificationTask()
    on_cpu = device.type == "cpu"
    return Analyzer(
        "reference",
        prepare_model(model, task),
        task,
        cpu=on_cpu,
        output_dir=args.output_dir,
    )


def run_reference(args):
    """Runs one reference in this process, and writes `<output_dir>/reference.json`."""
    device = pipeline.choose_device(args.device, several_processes=False)
    cache_dir = Path(args.output_dir).parent  # images are decoded once, outside the measured time
    count = args.reference_examples or args.num_train_examples
    clean = pipeline.load_data(args.dataset, args.dataset_dir, "train", count, cache_dir)
    data = pipeline.training_examples(clean, args.corrupt_percentage)
    test = pipeline.load_data(args.dataset, args.dataset_dir, "test", cache_dir=cache_dir)
    queries = test.take(torch.arange(min(args.num_query_examples, len(test))))
    if args.reference == "training":
        measurements = reference_training(args, data, test, device)
    else:
        measurements = reference_scores(args, data, queries, device)
    measurements["peak_memory_bytes"] = pipeline.environment(device)["peak_memory_bytes"]
    pipeline.make_folder(args.output_dir)
    (Path(args.output_dir) / "reference.json").write_text(json.dumps(measurements))


# ---- The scripts ---------------------------------------------------------------------------------


def call(*command):
    """Runs a Python script without showing its output. Returns wall-clock seconds."""
    start = time.perf_counter()
    words = [sys.executable, *map(str, command)]
    process = subprocess.run(words, capture_output=True, text=True)
    if process.returncode:
        sys.exit(f"{command[0]} ended with {process.returncode}: {process.stderr[-2000:]}")
    return time.perf_counter() - start


def to_flags(args, names):
    """Returns the flags with these names and their values; None is omitted."""
    words = []
    for name in names:
        value = getattr(args, name)
        if value is not None:
            words += [f"--{name}", value]
    return words


def run_training(args, checkpoint_dir, precision, seed):
    """Runs train.py. Returns images per second and the test accuracy."""
    call(
        ROOT / "train.py",
        *to_flags(args, DATA_FLAGS + MODEL_FLAGS + TRAINING_FLAGS),
        *("--checkpoint_dir", checkpoint_dir),
        *("--precision", precision),
        *("--seed", seed),
        *("--output_dir", checkpoint_dir.parent),  # caches the decoded images
    )
    metadata = torch.load(next(checkpoint_dir.glob("*.pth")), weights_only=True)["metadata"]
    batch_size = metadata["train_batch_size"]
    steps = metadata["num_train_epochs"] * (metadata["num_train"] // batch_size)
    return {
        "images_per_second": steps * batch_size / metadata["train_seconds"],
        "accuracy": metadata["accuracy"]["test"],
    }


def run_script(args, part, flags, checkpoint_dir, output_dir):
    """Runs the script that computes self-influence or pairwise scores. Returns its measurements.

    seconds: the sum of PHASES; seconds_around: imports, loading, and the end of the process.
    """
    script = ROOT / "detect_mislabeled_dataset.py"
    if part == "pairwise":
        script = ROOT / "analyze.py"
        flags = [*flags, "--num_query_examples", args.num_query_examples]
    wall = call(
        script,
        *to_flags(args, DATA_FLAGS + MODEL_FLAGS),
        *flags,
        *("--checkpoint_dir", checkpoint_dir),
        *("--output_dir", output_dir),
        *("--damping_factor", "1e-8"),  # kronfluence's own default
    )
    record = json.loads(next(output_dir.glob("*/*.json")).read_text())
    phases = record["seconds"]
    return {
        "seconds": sum(phases[phase] for phase in PHASES),
        "seconds_by_phase": phases,
        "seconds_around": wall - phases["total"] + phases["load"],
        "start_to_exit": wall,
        "peak_memory_bytes": record["peak_memory_bytes"],
        "scores": str(next(output_dir.rglob("*_scores.safetensors"))),
    }


# ---- Side by side --------------------------------------------------------------------------------


def read_scores(path):
    """Returns the scores in a file as a float64 array, [N] or [Q, N]."""
    from safetensors.torch import load_file

    return load_file(path)["all_modules"].double().numpy()


def agreement(scores, reference, is_corrupted):
    """Returns the agreement of scores [N] or [Q, N] with the reference; for [N], also in recall.

    All values are NaN if the reference has scores of fewer images.
    """
    if scores.shape != reference.shape:
        return dict.fromkeys(("relative_error", "spearman", "recall_at_10_difference"), math.nan)
    rows = zip(np.atleast_2d(scores), np.atleast_2d(reference), strict=True)
    error = np.linalg.norm(scores - reference) / np.linalg.norm(reference)
    result = {
        "relative_error": float(error),
        "spearman": float(np.mean([spearman(row, expected) for row, expected in rows])),
    }
    if scores.ndim == 1:
        ours = detect.evaluate_ranking(scores, is_corrupted)["recall_at_10"]
        theirs = detect.evaluate_ranking(reference, is_corrupted)["recall_at_10"]
        result["recall_at_10_difference"] = ours - theirs
    return result


def median(rows, name):
    """Returns the median of a measurement over the repeats."""
    return statistics.median(row[name] for row in rows)


def product_speed(device, dtype, size=2048, repeats=10):
    """Returns floating-point operations per second in a product of square matrices."""
    matrix = torch.randn(size, size, device=device, dtype=dtype)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        (matrix @ matrix)[0, 0].item()  # waits for the device
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def measure(args, is_corrupted, folder):
    """Runs all parts `args.repeats` times. Yields part, name of the run, and measurements.

    All scores are those of the checkpoint of repeat 0. Only if trainings are compared, each repeat
    trains again.
    """
    checkpoint_dir = folder / f"checkpoints-{args.precision}-0"
    for repeat in range(args.repeats if args.parts else 0):
        precisions = ["auto", "fp32"] if "training" in args.parts else [args.precision]
        for precision in precisions:
            target = folder / f"checkpoints-{precision}-{repeat}"
            if "training" in args.parts or not checkpoint_dir.exists():
                yield "training", precision, run_training(args, target, precision, seed=repeat)
        for part in args.parts:
            reference_dir = folder / f"reference-{part}-{repeat}"
            reference = call_reference(args, part, repeat, checkpoint_dir, reference_dir)
            yield part, "reference", reference
            if part == "training":
                continue
            expected = read_scores(reference["scores"])
            for who in args.runs:
                output_dir = folder / f"{part}-{who}-{repeat}"
                ours = run_script(args, part, RUNS[who], checkpoint_dir, output_dir)
                ours |= agreement(read_scores(ours["scores"]), expected, is_corrupted)
                yield part, who, ours
            shutil.rmtree(reference_dir)


def call_reference(args, part, seed, checkpoint_dir, output_dir):
    """Runs a reference in a process of its own. Returns its measurements."""
    call(
        __file__,
        *("--reference", part),
        *to_flags(args, DATA_FLAGS + MODEL_FLAGS + TRAINING_FLAGS + REFERENCE_FLAGS),
        *("--num_query_examples", args.num_query_examples),
        *("--seed", seed),
        *("--checkpoint_dir", checkpoint_dir),
        *("--output_dir", output_dir),
    )
    return json.loads((output_dir / "reference.json").read_text())


# ---- Tables --------------------------------------------------------------------------------------


def print_scores(measured, part):
    """Prints the medians and ratios of one kind of scores; measured: lists by (part, who)."""
    columns = ["reference", "scripts", "ratio", "relative error", "Spearman"]
    columns += ["recall at 10 %", "GB, reference", "GB"]
    print(f"\n| {part} | {' | '.join(columns)} |")
    print("|---|---|---|---|---|---|---|---|---|")
    reference = measured[part, "reference"]
    theirs = median(reference, "seconds")
    runs = {who: measured[part, who] for who in RUNS if (part, who) in measured}
    for who, rows in runs.items():
        ours = median(rows, "seconds")
        cells = [who, f"{theirs:.1f} s", f"{ours:.1f} s", f"{theirs / ours:.1f} x"]
        cells.append(f"{median(rows, 'relative_error'):.1e}")
        cells.append(f"{median(rows, 'spearman'):.5f}")
        if part == "self":
            cells.append(f"{100 * median(rows, 'recall_at_10_difference'):+.2f} points")
        else:
            cells.append("")
        cells.append(f"{median(reference, 'peak_memory_bytes') / 1e9:.1f}")
        cells.append(f"{median(rows, 'peak_memory_bytes') / 1e9:.1f}")
        print(f"| {' | '.join(cells)} |")
    for who, rows in runs.items():
        by_phase = [row["seconds_by_phase"] for row in rows]
        phases = ", ".join(f"{phase} {median(by_phase, phase):.1f}" for phase in PHASES)
        whole, around = median(rows, "start_to_exit"), median(rows, "seconds_around")
        print(f"{who}: {whole:.1f} s from start to exit, of which {phases},")
        print(f"and {around:.1f} s for imports, loading and the end of the process")


def print_training(measured):
    """Prints the medians and ratios of the trainings; measured: lists by (part, who)."""
    print("\n| training | images/s | ratio | test accuracy, mean over seeds |\n|---|---|---|---|")
    theirs = median(measured["training", "reference"], "images_per_second")
    for who in ("reference", "auto", "fp32"):
        rows = measured["training", who]
        speed = median(rows, "images_per_second")
        accuracies = [100 * row["accuracy"] for row in rows]
        deviation = statistics.stdev(accuracies) if len(accuracies) > 1 else 0
        accuracy = f"{statistics.mean(accuracies):.2f} % ± {deviation:.2f}"
        print(f"| {who} | {speed:.0f} | {speed / theirs:.1f} x | {accuracy} |")


# ---- Command line --------------------------------------------------------------------------------


def parse_arguments():
    """Reads the command line."""
    parser = pipeline.OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flag = parser.add_argument_group("data and training").add_argument
    some = pipeline.number(float, "a fraction above 0 and below 1", lambda value: 0 < value < 1)
    flag("--dataset", choices=pipeline.LOADERS, default="synthetic", help="data set to train on")
    flag("--dataset_dir", default="./data", help="directory of the data set")
    flag("--device", default="auto", help="auto: a GPU is used if one is available")
    flag("--num_train_examples", type=int, default=400, help="number of training images")
    flag("--num_query_examples", type=int, default=200, help="number of test images as queries")
    flag("--corrupt_percentage", type=some, default=0.1, help="fraction of labels to corrupt")
    flag("--model", choices=pipeline.MODELS, default="resnet9", help="network to train")
    flag("--train_batch_size", type=int, default=32, help="images per training step")
    flag("--num_train_epochs", type=int, default=6, help="passes over the training images")
    flag("--learning_rate", type=float, default=0.2, help="peak of the schedule")
    flag("--weight_decay", type=float, default=1e-4, help="L2 penalty")
    add_benchmark_flags(parser.add_argument_group("benchmark").add_argument)
    hidden = {"help": argparse.SUPPRESS}  # for the process of a reference
    parser.add_argument("--reference", choices=PARTS, **hidden)
    parser.add_argument("--seed", type=int, default=0, **hidden)
    parser.add_argument("--checkpoint_dir", **hidden)
    parser.add_argument("--output_dir", **hidden)
    return parser.parse_args()


def add_benchmark_flags(flag):
    """Adds the flags that choose what is compared; `flag` is add_argument of a group."""
    flag("--parts", nargs="*", choices=PARTS, default=list(PARTS), help="what to compare")
    flag("--runs", nargs="*", choices=RUNS, default=["auto", "fp32"], help="runs of the scripts")
    flag(
        "--repeats",
        type=pipeline.positive_int,
        default=3,
        help="number of repeats, whose median is printed",
    )
    flag(
        "--precision",
        choices=("auto", "fp32"),
        default="auto",
        help="precision of the training of the model that is scored",
    )
    flag("--reference_batch_size", type=int, default=128, help="training images per step")
    flag("--reference_query_batch_size", type=int, default=200, help="queries per step")
    flag(
        "--reference_examples",
        type=int,
        metavar="N",
        help="run the reference on N images only, and extrapolate its seconds to all images",
    )


def main():
    """Parses, runs, prints."""
    args = parse_arguments()
    if args.reference:
        run_reference(args)
        return
    # Part of the time of pairwise scores does not depend on the number of training images.
    if args.reference_examples and args.parts != ["self"]:
        raise pipeline.UserError("argument --reference_examples: give --parts self")
    device = pipeline.choose_device(args.device, several_processes=False)
    dtypes = {torch.float32, pipeline.configure_precision(args.precision, device)}
    speeds = {str(dtype): product_speed(device, dtype) for dtype in dtypes}
    measured = {}
    with tempfile.TemporaryDirectory() as folder:
        count = args.num_train_examples
        clean = pipeline.load_data(args.dataset, args.dataset_dir, "train", count, folder)
        data = pipeline.training_examples(clean, args.corrupt_percentage)
        for part, who, row in measure(args, data.is_corrupted.numpy(), Path(folder)):
            measured.setdefault((part, who), []).append(row)
            print(f"{part:10}{who:10}", row, flush=True)
    print(f"\n{pipeline.environment(device) | {'product_speed': speeds}}")
    for part in args.parts:
        if part == "training":
            print_training(measured)
        else:
            print_scores(measured, part)


if __name__ == "__main__":
    if "--reference" in sys.argv:
        main()  # without pipeline.run, which would also speed up the reference's allocator
    else:
        pipeline.run(main)
