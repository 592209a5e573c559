"""Trains ResNet-9 and writes the checkpoint that analyze.py and detect_mislabeled_dataset.py explain.

SGD without momentum, random crops and flips, a learning rate that rises for a fifth of the steps and then falls to
zero. `python train.py --help` lists the flags; their defaults are the recipe for CIFAR-10.
"""

import pipeline  # first of all, for Ctrl-C in the imports

import csv
import dataclasses
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm


def parse_arguments():
    """Reads the command line."""
    parser = pipeline.shared_parser(__doc__.splitlines()[0], corrupt_default=None)
    flag = parser.add_argument
    flag("--train_batch_size", type=pipeline.positive_int, default=512, help="images per step")
    flag("--eval_batch_size", type=pipeline.positive_int, default=1024, help="images per step of the evaluation")
    flag("--learning_rate", type=pipeline.positive_float, default=0.4, help="peak of the schedule")
    flag("--weight_decay", type=pipeline.non_negative_float, default=1e-3, help="L2 penalty on all parameters")
    flag("--num_train_epochs", type=pipeline.positive_int, default=25, help="passes over the training images")
    flag("--seed", type=pipeline.whole_number, default=1004, help="initial weights, order, crops and flips")
    fraction = pipeline.number(float, "a fraction above 0 and below 1, such as 0.1", lambda value: 0 < value < 1)
    cleaning = parser.add_mutually_exclusive_group()
    cleaning.add_argument(
        "--exclude_suspects",
        metavar="CSV",
        help="leave out the top of this ranking by detect_mislabeled_dataset.py (suspects_*.csv)",
    )
    cleaning.add_argument(
        "--corrections",
        metavar="CSV",
        help="apply new labels by class name: columns path or index, and new_label (empty: leave the image out)",
    )
    flag(
        "--exclude_fraction",
        type=fraction,
        default=0.1,
        metavar="FRACTION",
        help="how much of its ranking --exclude_suspects leaves out",
    )
    cleaning.add_argument(
        "--subset_fraction",
        type=fraction,
        metavar="FRACTION",
        help="train on a random part of the images, for analyze.py --retrained_dir",
    )
    flag("--subset_seed", type=pipeline.whole_number, default=0, help="which part --subset_fraction takes")
    flag(
        "--save_epochs",
        type=pipeline.number_list,
        default=[],
        metavar="LIST",
        help="keep the weights after these epochs, such as 10,25; each but the last of the training makes "
        "a detection take as long once more",
    )
    args = parser.parse_args()
    for name, needed in (("exclude_fraction", "exclude_suspects"), ("subset_seed", "subset_fraction")):
        if getattr(args, name) != parser.get_default(name) and getattr(args, needed) is None:
            parser.error(f"argument --{name}: means nothing without --{needed}")
    if args.save_epochs and not 1 <= min(args.save_epochs) <= max(args.save_epochs) <= args.num_train_epochs:
        parser.error(f"argument --save_epochs: there are only the epochs 1 to {args.num_train_epochs}")
    return args


# --------------------------------------------------------------------------------------------------
# What was decided about suspects
# --------------------------------------------------------------------------------------------------


def read_rows(flag, path, columns):
    """Yields (place, row) of a csv file with a header: `<flag> <path>, line 2` and a dictionary of its cells.

    Raises UserError where the file cannot be read or lacks one of `columns`.
    """
    try:
        with Path(path).open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            missing = [name for name in columns if name not in (reader.fieldnames or ())]
            if missing:
                raise pipeline.UserError(f"{flag} {path}: its first line must name the column {missing[0]!r}")
            for row in reader:
                place = f"{flag} {path}, line {reader.line_num}"
                if None in row or None in row.values():
                    raise pipeline.UserError(f"{place}: has another number of cells than the first line")
                yield place, row
    except (OSError, ValueError, csv.Error) as error:
        raise pipeline.UserError(
            f"{flag} {path} cannot be read as a csv file in UTF-8 ({pipeline.first_line(error)})"
        ) from error


def find_example(place, row, data, by_path):
    """Returns the index of the training image that a row calls by `path` or, where that is empty, by `index`.

    Raises UserError where there is none, or where it has another label than the row says (if it has a `label`).
    """
    path, index = row.get("path", ""), row.get("index", "").strip()
    if path:
        if (found := by_path.get(Path(path).absolute())) is None:
            raise pipeline.UserError(f"{place}: {path} is not among the training images")
    elif index.isdecimal() and len(index) < 10 and int(index) < len(data):
        found = int(index)
    elif index:
        raise pipeline.UserError(f"{place}: there is no training image {index}, only 0 to {len(data) - 1}")
    else:
        raise pipeline.UserError(f"{place}: needs a path or an index")
    if row.get("label", "").strip() not in ("", str(data.labels[found].item())):
        raise pipeline.UserError(
            f"{place}: image {found} has the label {data.labels[found]} before any cleaning, not {row['label']}: "
            "give the data flags of the detection, or leave out the column label"
        )
    return found


def read_suspects(path, fraction, data):
    """Returns the Cleaning that leaves out the top `fraction` of a ranking, of the ImageData that it ranks.

    Raises UserError, naming the line, where it ranks something else or is no longer in its order.
    """
    by_path = examples_by_path(data)
    ranking = []
    for place, row in read_rows("--exclude_suspects", path, ("rank", "index", "path", "label")):
        if row["rank"] != str(len(ranking) + 1):
            raise pipeline.UserError(f"{place}: rank {row['rank']} where {len(ranking) + 1} is due: keep its order")
        ranking.append(find_example(place, row, data, by_path))
    if sorted(ranking) != list(range(len(data))):
        raise pipeline.UserError(
            f"--exclude_suspects {path} ranks {len(set(ranking))} of the {len(data)} training images: give the ranking "
            "of a model trained on all of them"
        )
    return pipeline.Cleaning(ranking[: round(fraction * len(ranking))], {})


def read_corrections(path, data):
    """Returns the Cleaning in a csv file with the columns `path` or `index`, and `new_label`, a class name or empty.

    Raises UserError, naming the line, for an unknown image or class, or one image twice, and where most images would
    be left out, as by a ranking to which a column was added and filled in for some rows.
    """
    by_path = examples_by_path(data)
    decided = {}
    for place, row in read_rows("--corrections", path, ("new_label",)):
        index, name = find_example(place, row, data, by_path), row["new_label"]
        if name not in data.class_names:
            name = name.strip()
        if name and name not in data.class_names:
            raise pipeline.UserError(f"{place}: {name!r} is none of the classes {', '.join(data.class_names)}")
        if index in decided:
            raise pipeline.UserError(f"{place}: image {index} was decided on before")
        decided[index] = data.class_names.index(name) if name else None
    excluded = [index for index, label in decided.items() if label is None]
    if len(excluded) > len(data) / 2:
        raise pipeline.UserError(
            f"--corrections {path} leaves out {len(excluded)} of the {len(data)} images, because an empty new_label "
            "does so: delete the rows of images that nothing was decided about"
        )
    return pipeline.Cleaning(excluded, {index: label for index, label in decided.items() if label is not None})


def examples_by_path(data):
    """Returns the index of each training image by its absolute path."""
    return {Path(path).absolute(): index for index, path in enumerate(data.paths) if path}


def choose_cleaning(args, data):
    """Returns the Cleaning that the flags ask for, or None, and what it adds to the name of the checkpoint."""
    if args.exclude_suspects is not None:
        return read_suspects(args.exclude_suspects, args.exclude_fraction, data), "cleaned"
    if args.corrections is not None:
        return read_corrections(args.corrections, data), "cleaned"
    if args.subset_fraction:
        subset = pipeline.draw_subset(len(data), args.subset_fraction, args.subset_seed)
        return subset, f"subset_{args.subset_fraction}_{args.subset_seed}"
    return None, ""


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------


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
    offsets = torch.randint(2 * pipeline.CROP_PADDING + 1, (*shape, 2), generator=generator)
    flips = torch.rand(shape, generator=generator) < 0.5
    return order, offsets, flips


def train(model, data, *, train_batch_size, learning_rate, weight_decay, num_train_epochs, seed, dtype, save_epochs=()):
    """Trains `model` in place on `data`, ImageData on the model's device. Prints a line per epoch.

    The last, partial batch of an epoch is dropped; `train_batch_size` must be len(data) at most. Returns what the
    training batches said of each example, as means over the epochs, float32 [N] by name: `aum`, the area under the
    margin between the logit of its label and the largest other one (Pleiss et al. 2020, section 3.1), and `mean_loss`;
    and a dictionary of the weights on the CPU after each of `save_epochs`. Raises NumericalError after an epoch in
    which the loss or a weight stopped being a number.
    """
    device = data.images.device
    generator = batch_generator(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate, weight_decay=weight_decay)
    steps_per_epoch = len(data) // train_batch_size
    total_steps = num_train_epochs * steps_per_epoch
    margin_sums, loss_sums, visits = torch.zeros(3, len(data), device=device)
    epoch_weights = {}
    with tqdm(total=total_steps, desc="Training", unit="step", leave=False) as progress:
        for epoch in range(num_train_epochs):
            start, epoch_loss = time.perf_counter(), torch.zeros((), device=device)
            model.train()
            plan = (tensor.to(device) for tensor in epoch_batches(len(data), train_batch_size, generator))
            for step, (order, offsets, flips) in enumerate(zip(*plan, strict=True), start=epoch * steps_per_epoch):
                rate = learning_rate * schedule(step, total_steps)
                optimizer.param_groups[0]["lr"] = rate
                images = pipeline.normalize(pipeline.crop_and_flip(data.images[order], offsets, flips))
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    logits, labels = model(images), data.labels[order]
                losses = F.cross_entropy(logits, labels, reduction="none")
                loss = losses.mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                epoch_loss += loss.detach()
                margin_sums[order] += pipeline.top_margin(logits.detach(), labels)
                loss_sums[order] += losses.detach()
                visits[order] += 1
                progress.update()
            mean_loss = (epoch_loss / steps_per_epoch).item()
            speed = steps_per_epoch * train_batch_size / (time.perf_counter() - start)
            progress.write(
                f"epoch {epoch + 1:3}/{num_train_epochs}   learning rate {rate:8.5f}   "
                f"loss {mean_loss:7.4f}   {speed:8.0f} images/s"
            )
            # The loss is that before the last step, hence the weights.
            if not (np.isfinite(mean_loss) and all(weight.isfinite().all() for weight in model.state_dict().values())):
                raise pipeline.NumericalError(f"the training diverged in epoch {epoch + 1}: lower --learning_rate")
            if epoch + 1 in save_epochs:
                epoch_weights[epoch + 1] = {name: tensor.cpu().clone() for name, tensor in model.state_dict().items()}
    # Partial batches are dropped, and with few epochs an example may have been among them each time.
    seen = visits > 0
    means = torch.where(seen, torch.stack([margin_sums, loss_sums]) / visits, 0)
    means = torch.where(seen, means, means[:, seen].mean(1, keepdim=True)).cpu()
    return {"aum": means[0], "mean_loss": means[1]}, epoch_weights


def evaluate(logits, labels):
    """Returns mean cross-entropy and accuracy of logits [N, num_classes] against labels [N]."""
    return F.cross_entropy(logits, labels).item(), (logits.argmax(1) == labels).float().mean().item()


def print_next_steps(args, kind):
    """Prints the commands that take up what was trained."""
    corrupted = {"corrupt_percentage": args.corrupt_percentage or 0}
    if args.subset_fraction:
        print("With some 50 such models, and one that was trained on all images, see how far scores predict them:")
        print(f"  {pipeline.command('analyze.py', args, **corrupted, retrained_dir=args.checkpoint_dir)}")
        return
    print("Find mislabeled training images, or see which ones the answers to test images come from:")
    for script in ("detect_mislabeled_dataset.py", "analyze.py"):
        print(f"  {pipeline.command(script, args, **corrupted, cleaned=kind == 'cleaned')}")


def main():
    """Parses, loads, trains, evaluates, saves."""
    args = parse_arguments()
    start = time.perf_counter()
    device = pipeline.choose_device(args.device, several_processes=False)
    dtype = pipeline.choose_dtype(args.precision, device)
    clean = pipeline.load_train_data(args.dataset, args.dataset_dir, args.num_train_examples, args.output_dir)
    test = pipeline.load_test_data(args.dataset, args.dataset_dir, args.output_dir).to(device)
    data, is_corrupted = pipeline.training_examples(clean, args.corrupt_percentage)
    cleaning, kind = choose_cleaning(args, data)
    if cleaning is not None:
        data, is_corrupted = pipeline.training_examples(clean, args.corrupt_percentage, cleaning)
        print(f"{len(cleaning.excluded)} images are left out, {len(cleaning.new_labels)} get another label")
    if args.train_batch_size > len(data):
        raise pipeline.UserError(
            f"argument --train_batch_size: {args.train_batch_size} is more than the {len(data)} training images"
        )
    path = pipeline.checkpoint_path(args.checkpoint_dir, args.corrupt_percentage, kind)
    pipeline.lock(path, waiting=None)
    print(
        f"{len(data)} training images ({is_corrupted.sum()} with a wrong label), {len(test)} test images, "
        f"{len(data.class_names)} classes; loaded in {time.perf_counter() - start:.1f} s"
    )

    metadata = {
        **vars(args),
        **pipeline.describe(data),
        "corrupt_percentage": args.corrupt_percentage or 0.0,
        "corruption_seed": pipeline.CORRUPTION_SEED,
        "cleaning": cleaning and dataclasses.asdict(cleaning),
        "environment": pipeline.environment(device),
    }
    torch.manual_seed(args.seed)
    model = pipeline.construct_resnet9(len(data.class_names)).to(device)
    data = data.to(device)
    train_start = time.perf_counter()
    metadata["dynamics"], metadata["epoch_weights"] = train(
        model,
        data,
        **pipeline.recipe(vars(args)),
        seed=args.seed,
        dtype=dtype,
        save_epochs=args.save_epochs,
    )
    metadata["train_seconds"] = time.perf_counter() - train_start

    logits = pipeline.compute_logits(model, data.images, args.eval_batch_size, dtype)
    results = {"train": evaluate(logits, data.labels)}
    if is_corrupted.any():
        results["train, true labels"] = evaluate(logits, clean.labels[data.indices].to(device))
    results["test"] = evaluate(pipeline.compute_logits(model, test.images, args.eval_batch_size, dtype), test.labels)
    for name, (loss, accuracy) in results.items():
        print(f"{name:18}   loss {loss:7.4f}   accuracy {100 * accuracy:6.2f} %")
    metadata["accuracy"] = {name: accuracy for name, (_, accuracy) in results.items()}

    pipeline.save_checkpoint(path, model, metadata)
    total = time.perf_counter() - start
    print(f"trained in {metadata['train_seconds']:.1f} s ({total:.1f} s in all); wrote {path}")
    print_next_steps(args, kind)


if __name__ == "__main__":
    pipeline.run(main)
