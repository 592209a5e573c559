"""Trains ResNet-9 and writes the checkpoint that analyze.py and detect_mislabeled_dataset.py explain.

SGD without momentum, random crops and flips, a learning rate that rises for a fifth of the steps and then falls to
zero. `python train.py --help` lists the flags; their defaults are the recipe for CIFAR-10.
"""

import csv
import io
import os
import time
from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import pipeline

RECIPE = ("train_batch_size", "learning_rate", "weight_decay", "num_train_epochs")


def parse_arguments():
    """Reads the command line."""
    positive_float = pipeline.number(
        float, "a number above 0", lambda value: 0 < value < float("inf")
    )
    positive_int, seed = pipeline.positive_int, pipeline.whole_number
    parser = pipeline.shared_parser(__doc__.splitlines()[0])
    parser.add_argument(
        "--checkpoint_dir", default=pipeline.CHECKPOINT_DIR, help="folder (default: %(default)s)"
    )
    recipe = parser.add_argument_group("recipe").add_argument
    recipe(
        "--train_batch_size",
        type=positive_int,
        default=512,
        help="images per step (default: %(default)s)",
    )
    recipe(
        "--learning_rate",
        type=positive_float,
        default=0.4,
        help="peak of the schedule (default: %(default)s)",
    )
    recipe(
        "--weight_decay",
        type=pipeline.non_negative_float,
        default=1e-3,
        help="L2 penalty (default: %(default)s)",
    )
    recipe(
        "--num_train_epochs",
        type=positive_int,
        default=25,
        help="passes over the images (default: %(default)s)",
    )
    recipe(
        "--seed",
        type=seed,
        default=1004,
        help="of weights, order, crops and flips (default: %(default)s)",
    )
    recipe(
        "--eval_batch_size",
        type=positive_int,
        default=1024,
        help="images per step when it is evaluated",
    )
    decided = "columns path or index, and new_label: a class, or empty to leave the image out"
    parser.add_argument("--corrections", metavar="CSV", help=decided)
    return parser.parse_args()


# ---- Labels and decisions in files ---------------------------------------------------------------


def read_rows(flag, path, column):
    """Yields (place, row) of a csv file: `<flag> <path>, line 2` and a dictionary of its cells.

    Cells may stand between commas, semicolons or tabs, as spreadsheets of different countries write them; rows without
    any are passed over. Raises UserError where the file cannot be read or does not have the column.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        if "\0" in text:
            raise ValueError("it has a NUL")
        text, above = text.removeprefix("sep=;\n"), text.startswith("sep=;\n")  # a line for Excel
        first = text.partition("\n")[0]
        reader = csv.DictReader(io.StringIO(text), delimiter=max(",;\t", key=first.count))
        reader.fieldnames = [name.strip().lower() for name in reader.fieldnames or ()]
        if column not in reader.fieldnames:
            header = f"its first line must name the column '{column}', but is {first!r}"
            raise pipeline.UserError(f"{flag} {path}: {header}")
        for row in reader:
            place = f"{flag} {path}, line {reader.line_num + above}"
            if None in row or None in row.values():
                cells = "has another number of cells than the first line"
                raise pipeline.UserError(
                    f"{place}: {cells}; where the last is empty, put another column behind it"
                )
            if any(row.values()):
                yield place, row
    except (OSError, ValueError, csv.Error) as error:
        reason = pipeline.first_line(error)
        raise pipeline.UserError(
            f"{flag} {path} cannot be read as a csv file in UTF-8 ({reason})"
        ) from error


class ExampleFinder:
    """Finds the training images that rows of a csv file call by `path` or, where images have no files, by number.

    A path may be absolute, or relative to the working directory, to the csv file or to `--dataset_dir`, with links on
    the way. Where the file it names is gone, its last parts decide, such as `train/cat/1.png`: the data set was moved.
    `test` are the images held out; `numbers`, int64 [N], are what the column `index` holds.
    """

    def __init__(self, data, test, dataset_dir, csv_path, numbers):
        def below(path):
            return Path(os.path.relpath(path, dataset_dir)).as_posix()

        self.data, self.folders = data, ("", Path(csv_path).parent, dataset_dir)
        self.places, self.found = {}, set()
        self.numbered = {str(number): index for index, number in enumerate(numbers.tolist())}
        images = [
            *((path, i) for i, path in enumerate(data.paths)),
            *((path, None) for path in test.paths),
        ]
        for spelling in (os.path.abspath, os.path.realpath, below):
            for path, index in images:
                if path:
                    self.places.setdefault(pipeline.same_form(spelling(path)), index)

    def spellings(self, path):
        """Yields the ways to look a path up, the surest first."""
        files = [Path(folder) / path for folder in self.folders]
        for file in files:
            yield from (os.path.abspath(file), os.path.realpath(file))
        if not any(map(os.path.exists, files)):
            parts = path.replace("\\", "/").split("/")
            yield from ("/".join(parts[start:]) for start in range(len(parts)))

    def __call__(self, place, row, passes_over=False):
        """Returns the index of a row's image, or None where it is another image, if those are passed over.

        Raises UserError where the row calls no training image, or one that was called before.
        """
        path, number = row.get("path", ""), row.get("index", "").strip()
        if path.strip():
            spellings = map(
                pipeline.same_form, chain(self.spellings(path), self.spellings(path.strip()))
            )
            known = next((spelling for spelling in spellings if spelling in self.places), None)
            where = (
                "held out for the test"
                if known
                else f"not among the {len(self.data)} training images"
            )
            index, problem = self.places.get(known), f"{path} is {where}"
        elif any(self.data.paths):
            raise pipeline.UserError(
                f"{place}: needs a path; an index is another image once files come or go"
            )
        elif not number or (passes_over and not number.isdecimal()):  # such as 1.0
            raise pipeline.UserError(f"{place}: needs an index, a whole number from 0 on")
        else:
            problem = f"there is no training image {number:.20}, only 0 to {len(self.data) - 1}"
            index = self.numbered.get(number.lstrip("0") or "0")
        if index is None and not passes_over:
            raise pipeline.UserError(f"{place}: {problem}")
        if index in self.found:
            raise pipeline.UserError(f"{place}: image {index} has a row before this one")
        if index is not None:
            self.found.add(index)
        return index


def find_class(place, name, class_names):
    """Returns the number of the class of that name, in any Unicode form, also with blanks around it."""
    for spelled in map(pipeline.same_form, (name, name.strip())):
        if spelled in class_names:
            return class_names.index(spelled)
    raise pipeline.UserError(f"{place}: {name!r} is none of the classes {', '.join(class_names)}")


def read_noisy_labels(path, data, test, dataset_dir):
    """Returns the labels to train on, int64 [N]: those in a csv file, where it has a row of an image.

    Its columns are `label`, a class name, and `path` or `index`, the place in the whole data set. Rows of other images
    are passed over. Prints what differs. Raises UserError, naming the line, for an unknown class or one image twice,
    and where no row is about a training image.
    """
    find_example, others = ExampleFinder(data, test, dataset_dir, path, data.numbers), 0
    labels, changes = data.labels.clone(), Counter()
    for place, row in read_rows("--noisy_labels", path, "label"):
        index = find_example(place, row, passes_over=True)
        if index is None:
            others += 1
            continue
        labels[index] = find_class(place, row["label"], data.class_names)
        if labels[index] != data.labels[index]:
            changes[
                f"{data.class_names[data.labels[index]]} → {data.class_names[labels[index]]}"
            ] += 1
    if not (used := len(find_example.found)):
        raise pipeline.UserError(
            f"--noisy_labels {path}: none of its {others} rows is about a training image"
        )
    print(
        f"{path}: {used} rows, and {others} of other images; {pipeline.ten_largest(changes) or 'none differs'}"
    )
    return labels


def read_corrections(path, data, test, dataset_dir):
    """Returns the cleaning in a csv file with the columns `path` or `index`, and `new_label`, a class name or empty.

    Prints what it changes. Raises UserError, naming the line, for an unknown image or class, or one image twice, and
    where most images would be left out, as by a ranking to which a column was added and filled in for some rows.
    """
    find_example, decided, changes = (
        ExampleFinder(data, test, dataset_dir, path, data.indices),
        {},
        Counter(),
    )
    for place, row in read_rows("--corrections", path, "new_label"):
        index = find_example(place, row)
        old = data.class_names[data.labels[index]]
        if (
            row.get("label", "").strip()
            and find_class(place, row["label"], data.class_names) != data.labels[index]
        ):
            said = f"image {index} has the label {old} before any cleaning, not {row['label']}"
            flags = "give the data flags of that table, or drop its column label"
            raise pipeline.UserError(f"{place}: {said}: {flags}")
        new = row["new_label"]
        decided[index] = find_class(place, new, data.class_names) if new.strip() else None
        if decided[index] not in (None, data.labels[index]):
            changes[f"{old} → {data.class_names[decided[index]]}"] += 1
    excluded = [index for index, label in decided.items() if label is None]
    if len(excluded) > len(data) / 2:
        most = f"leaves out {len(excluded)} of the {len(data)} images, because an empty new_label does so"
        raise pipeline.UserError(
            f"--corrections {path} {most}: delete rows that nothing was decided about"
        )
    print(
        "Corrections: "
        + ", ".join([pipeline.ten_largest(changes)] * bool(changes) + [f"left out {len(excluded)}"])
    )
    return {
        "excluded": excluded,
        "new_labels": {i: label for i, label in decided.items() if label is not None},
    }


# ---- Training ------------------------------------------------------------------------------------

CROP_PADDING = 4


def crop_and_flip(images, offsets, flips):
    """Shifts each image by its own offsets over a black border, and mirrors it where its flip says so.

    images: uint8 [B, 3, 32, 32]; offsets: int64 [B, 2], the crop's top and left in 0..8; flips: bool [B].
    """
    size = images.shape[3]
    padded = F.pad(images, [CROP_PADDING] * 4)  # (B, 3, 40, 40)
    windows = padded.unfold(2, size, 1).unfold(3, size, 1)  # (B, 3, 9, 9, 32, 32), a view
    crops = windows[
        torch.arange(len(images), device=images.device), :, offsets[:, 0], offsets[:, 1]
    ]
    return torch.where(flips.view(-1, 1, 1, 1), crops.flip(3), crops)


def schedule(step, total_steps):
    """Returns the fraction of the peak learning rate at `step` (0-based): up over a fifth of the steps, then down.

    Piecewise linear between 0 just before the first step, 1 at the peak, and 0 just after the last, so that no step
    is wasted at a rate of zero, however few there are.
    """
    peak = max(1, round(total_steps / 5))
    return float(np.interp(step + 1, [0, peak, total_steps + 1], [0.0, 1.0, 0.0]))


def batch_generator(seed):
    """Returns what draws order, crops and flips, on the CPU: the same on every device.

    Its first order is never that of the corruption, which begins with all wrong labels.
    """
    return torch.Generator().manual_seed(-seed if seed == pipeline.CORRUPTION_SEED else seed)


def epoch_batches(num_examples, batch_size, generator):
    """Draws one epoch: order and flips [steps, batch_size] and crop offsets [steps, batch_size, 2].

    The last, partial batch is dropped.
    """
    shape = (num_examples // batch_size, batch_size)
    order = torch.randperm(num_examples, generator=generator)[: shape[0] * shape[1]].view(shape)
    offsets = torch.randint(2 * CROP_PADDING + 1, (*shape, 2), generator=generator)
    flips = torch.rand(shape, generator=generator) < 0.5
    return order, offsets, flips


def train(
    model, data, *, train_batch_size, learning_rate, weight_decay, num_train_epochs, seed, dtype
):
    """Trains `model` in place on `data`, ImageData on the model's device. Prints a line per epoch.

    The last, partial batch of an epoch is dropped; `train_batch_size` must be len(data) at most. Returns the margin of
    each example in its training batch, float16 [epochs, N], NaN where it was in none: the logit of its label minus the
    largest other one (Pleiss et al. 2020, section 3.1). Raises NumericalError after an epoch in which the loss or a
    weight stopped being a number.
    """
    device, generator = data.images.device, batch_generator(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate, weight_decay=weight_decay)
    steps_per_epoch = len(data) // train_batch_size
    total_steps = num_train_epochs * steps_per_epoch
    margins = torch.full(
        (num_train_epochs, len(data)), torch.nan, dtype=torch.float16, device=device
    )
    with tqdm(total=total_steps, desc="Training", unit="step", leave=False) as progress:
        for epoch in range(num_train_epochs):
            start, epoch_loss = time.perf_counter(), torch.zeros((), device=device)
            model.train()
            plan = (
                tensor.to(device)
                for tensor in epoch_batches(len(data), train_batch_size, generator)
            )
            for step, (order, offsets, flips) in enumerate(
                zip(*plan, strict=True), start=epoch * steps_per_epoch
            ):
                rate = optimizer.param_groups[0]["lr"] = learning_rate * schedule(step, total_steps)
                images = pipeline.normalize(crop_and_flip(data.images[order], offsets, flips))
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    logits, labels = model(images), data.labels[order]
                loss = F.cross_entropy(logits, labels)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                epoch_loss += loss.detach()
                margin = pipeline.margin(logits.detach(), labels, torch.amax)
                margins[epoch, order] = margin.clamp(-6e4, 6e4).to(
                    margins.dtype
                )  # which ends at 65,504
                progress.update()
            mean_loss = (epoch_loss / steps_per_epoch).item()
            speed = steps_per_epoch * train_batch_size / (time.perf_counter() - start)
            progress.write(
                f"epoch {epoch + 1:3}/{num_train_epochs}   learning rate {rate:8.5f}   "
                f"loss {mean_loss:7.4f}   {speed:8.0f} images/s"
            )
            # The loss was computed before the last step, so the weights are checked, too.
            if not (
                np.isfinite(mean_loss)
                and all(weight.isfinite().all() for weight in model.state_dict().values())
            ):
                raise pipeline.NumericalError(
                    f"the training diverged in epoch {epoch + 1}: lower --learning_rate"
                )
    if count := margins.isnan().all(0).sum():
        print(
            f"{count} images were in no batch: they are ranked by their margin in the end, since they have no aum"
        )
    return margins.cpu()


@torch.no_grad()
def compute_logits(model, images, batch_size, dtype):
    """Returns the logits, float32 [N, num_classes], of uint8 images [N, 3, 32, 32], without augmentation."""
    model.eval()
    batches = tqdm(images.split(batch_size), "Evaluating", leave=False)
    with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
        return torch.cat([model(pipeline.normalize(batch)) for batch in batches])


def evaluate(logits, labels):
    """Returns mean cross-entropy and accuracy of logits [N, num_classes] against labels [N]."""
    return F.cross_entropy(logits, labels).item(), (
        logits.argmax(1) == labels
    ).float().mean().item()


def print_accuracies(model, data, test, batch_size, dtype):
    """Prints and returns the accuracies, from 0 to 1, by name, on training images, ImageData, and on test images."""
    logits, of_test = (
        compute_logits(model, part.images, batch_size, dtype) for part in (data, test)
    )
    results = {"train": evaluate(logits, data.labels)}
    if data.is_corrupted.any():
        results["train, true labels"] = evaluate(logits, data.true_labels)
    results["test"] = evaluate(of_test, test.labels)
    for name, (loss, accuracy) in results.items():
        print(f"{name:18}   loss {loss:7.4f}   accuracy {100 * accuracy:6.2f} %")
    return {name: accuracy for name, (_, accuracy) in results.items()}


def print_next_steps(args):
    """Prints the commands that use the new model."""
    flags = {"checkpoint_dir": args.checkpoint_dir}
    if args.noisy_labels is None:
        flags["corrupt_percentage"] = args.corrupt_percentage or 0
    print(
        "Find mislabeled training images, or see which ones the answers to test images come from:"
    )
    for script in ("detect_mislabeled_dataset.py", "analyze.py"):
        print(f"  {pipeline.command(script, args, **flags, cleaned=args.corrections is not None)}")


def load_examples(args):
    """Returns training and test images, ImageData on the CPU, and what the checkpoint keeps about labels, a dict."""
    clean = pipeline.load_data(
        args.dataset, args.dataset_dir, "train", args.num_train_examples, args.output_dir
    )
    test = pipeline.load_data(args.dataset, args.dataset_dir, "test", cache_dir=args.output_dir)
    given = cleaning = None
    if args.noisy_labels is not None:
        given = read_noisy_labels(args.noisy_labels, clean, test, args.dataset_dir)
    data = pipeline.training_examples(clean, args.corrupt_percentage, given)
    if args.corrections is not None:
        cleaning = read_corrections(args.corrections, data, test, args.dataset_dir)
        data = pipeline.training_examples(clean, args.corrupt_percentage, given, cleaning)
    labels = {
        "given_labels": given,
        "labels_sha256": pipeline.file_digest(args.noisy_labels),
        "cleaning": cleaning,
    }
    return data, test, labels | {"num_loaded": len(clean)}


def main():
    """Parses, loads, trains, evaluates, saves."""
    args = parse_arguments()
    start = time.perf_counter()
    device = pipeline.choose_device(args.device, several_processes=False)
    dtype = pipeline.choose_dtype(args.precision, device)
    pipeline.print_machine(device, dtype)
    data, test, labels = load_examples(args)
    if args.train_batch_size > len(data):
        raise pipeline.UserError(
            f"--train_batch_size {args.train_batch_size}: there are only {len(data)} images"
        )
    which = {"noisy": args.noisy_labels is not None, "cleaned": args.corrections is not None}
    path = pipeline.checkpoint_path(args.checkpoint_dir, args.corrupt_percentage, **which)
    pipeline.make_folder(path.parent)
    wrong = f"{data.is_corrupted.sum()} with a wrong label"
    print(
        f"{len(data)} training images ({wrong}), {len(test)} test images, {len(data.class_names)} classes"
    )

    data, test = data.to(device), test.to(device)
    torch.manual_seed(args.seed)
    model = pipeline.construct_resnet9(len(data.class_names)).to(device)
    recipe, train_start = {name: getattr(args, name) for name in RECIPE}, time.perf_counter()
    margins = train(model, data, **recipe, seed=args.seed, dtype=dtype)
    train_seconds = time.perf_counter() - train_start
    metadata = {
        **vars(args),
        "corrupt_percentage": args.corrupt_percentage or 0.0,
        "recipe": recipe,
        **labels,
        "class_names": data.class_names,
        "num_train": len(data),
        "data_sha256": data.digest,
        "margins": margins,
        "accuracy": print_accuracies(model, data, test, args.eval_batch_size, dtype),
        "train_seconds": train_seconds,
        "environment": pipeline.environment(device),
    }
    pipeline.save_checkpoint(path, model, metadata)
    print(
        f"trained in {train_seconds:.1f} s ({time.perf_counter() - start:.1f} s in all); wrote {path}"
    )
    print_next_steps(args)


if __name__ == "__main__":
    pipeline.run(main)
