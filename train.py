"""Trains ResNet-9 and writes the checkpoint that analyze.py and detect_mislabeled_dataset.py explain.

SGD without momentum, random crops and flips, a learning rate that rises for a fifth of the steps and then falls to
zero. `python train.py --help` lists the flags; their defaults are the recipe for CIFAR-10.
"""

import time

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
                images = data.normalize(crop_and_flip(data.images[order], offsets, flips))
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
def compute_logits(model, data, batch_size, dtype):
    """Returns the logits, float32 [N, num_classes], of ImageData, without augmentation."""
    model.eval()
    batches = tqdm(data.images.split(batch_size), "Evaluating", leave=False)
    with torch.autocast(data.images.device.type, dtype, enabled=dtype != torch.float32):
        return torch.cat([model(data.normalize(batch)) for batch in batches])


def evaluate(logits, labels):
    """Returns mean cross-entropy and accuracy of logits [N, num_classes] against labels [N]."""
    return F.cross_entropy(logits, labels).item(), (
        logits.argmax(1) == labels
    ).float().mean().item()


def print_accuracies(model, data, test, batch_size, dtype):
    """Prints and returns the accuracies, from 0 to 1, by name, on training images, ImageData, and on test images."""
    logits, of_test = (compute_logits(model, part, batch_size, dtype) for part in (data, test))
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
        given = pipeline.read_noisy_labels(args.noisy_labels, clean, test, args.dataset_dir)
    data = pipeline.training_examples(clean, args.corrupt_percentage, given)
    if args.corrections is not None:
        cleaning = pipeline.read_corrections(args.corrections, data, test, args.dataset_dir)
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
    dtype = pipeline.configure_precision(args.precision, device)
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
    model = pipeline.construct_model(args.model, len(data.class_names)).to(device)
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
