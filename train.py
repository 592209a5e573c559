"""Trains a network and writes the checkpoint that the other scripts explain.

SGD without momentum, random crops and flips, a learning rate that rises for a fifth of the steps
and then falls to zero. `python train.py --help` lists the flags; their defaults are those for
CIFAR-10.
"""

import time

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import pipeline

RECIPE = ("train_batch_size", "learning_rate", "weight_decay", "num_train_epochs")

positive_float = pipeline.number(float, "a number above 0", lambda value: 0 < value < float("inf"))


def parse_arguments():
    """Reads the command line."""
    parser = pipeline.shared_parser(__doc__)
    parser.groups["data"].add_argument(
        "--corrections",
        metavar="CSV",
        help="file with the decisions of a review: columns path or index, and new_label, which is "
        f"a class or '{pipeline.LEAVE_OUT}' (default: none)",
    )
    parser.groups["model"].add_argument(
        "--checkpoint_dir",
        default=pipeline.CHECKPOINT_DIR,
        metavar="DIR",
        help="directory for the trained model (default: %(default)s)",
    )
    add_training_flags(parser.groups["training"])
    return parser.parse_args()


def add_training_flags(group):
    """Adds the hyperparameters."""
    group.add_argument(
        "--train_batch_size",
        type=pipeline.positive_int,
        default=512,
        metavar="N",
        help="training images per step (default: %(default)s)",
    )
    group.add_argument(
        "--learning_rate",
        type=positive_float,
        default=0.4,
        metavar="X",
        help="largest learning rate of the schedule (default: %(default)s)",
    )
    group.add_argument(
        "--weight_decay",
        type=pipeline.non_negative_float,
        default=1e-3,
        metavar="X",
        help="factor of the L2 penalty on the weights (default: %(default)s)",
    )
    group.add_argument(
        "--num_train_epochs",
        type=pipeline.positive_int,
        default=25,
        metavar="N",
        help="number of passes over the training images (default: %(default)s)",
    )
    group.add_argument(
        "--seed",
        type=pipeline.whole_number,
        default=1004,
        metavar="N",
        help="seed of weights, order, crops and flips (default: %(default)s)",
    )
    group.add_argument(
        "--eval_batch_size",
        type=pipeline.positive_int,
        default=1024,
        metavar="N",
        help="images per step of the evaluation (default: %(default)s)",
    )


# ---- Training ------------------------------------------------------------------------------------

CROP_PADDING = 4


def crop_and_flip(images, offsets, flips):
    """Shifts each image by its own offsets over a black border, and mirrors it if its flip says so.

    images: uint8 [B, 3, 32, 32]; offsets: int64 [B, 2], the crop's top and left in 0..8;
    flips: bool [B].
    """
    size = images.shape[3]
    padded = F.pad(images, [CROP_PADDING] * 4)  # (B, 3, 40, 40)
    windows = padded.unfold(2, size, 1).unfold(3, size, 1)  # (B, 3, 9, 9, 32, 32), a view
    rows = torch.arange(len(images), device=images.device)
    crops = windows[rows, :, offsets[:, 0], offsets[:, 1]]  # (B, 3, 32, 32)
    return torch.where(flips.view(-1, 1, 1, 1), crops.flip(3), crops)


def schedule(step, total_steps):
    """Returns the fraction of the largest learning rate at a step, counted from 0.

    Piecewise linear: 0 just before the first step, 1 after a fifth of the steps, 0 just after the
    last. So no step is wasted at a rate of zero, however few there are.
    """
    peak = max(1, round(total_steps / 5))
    return float(np.interp(step + 1, [0, peak, total_steps + 1], [0.0, 1.0, 0.0]))


def batch_generator(seed):
    """Returns what draws order, crops and flips, on the CPU: the same on every device.

    Avoids the corruption seed; otherwise the first batches would hold all corrupted labels.
    """
    return torch.Generator().manual_seed(-seed if seed == pipeline.CORRUPTION_SEED else seed)


def epoch_batches(num_examples, batch_size, generator):
    """Draws one epoch: order and flips [steps, batch_size] and crop offsets [steps, batch_size, 2].

    The last, partial batch is dropped.
    """
    steps = num_examples // batch_size
    shape = (steps, batch_size)
    order = torch.randperm(num_examples, generator=generator)[: steps * batch_size].view(shape)
    offsets = torch.randint(2 * CROP_PADDING + 1, (*shape, 2), generator=generator)
    flips = torch.rand(shape, generator=generator) < 0.5
    return order, offsets, flips


def train(
    model, data, *, train_batch_size, learning_rate, weight_decay, num_train_epochs, seed, dtype
):
    """Trains `model` in place on `data`, ImageData on the model's device. Prints a line per epoch.

    The last, partial batch of an epoch is dropped; `train_batch_size` must be len(data) at most.
    Returns the margin of each example in its training batch, float16 [epochs, N], NaN where it was
    in none: the logit of its label minus the largest other one (Pleiss et al. 2020, section 3.1).
    Raises NumericalError after an epoch in which the loss or a weight stopped being finite.
    """
    device, generator = data.images.device, batch_generator(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate, weight_decay=weight_decay)
    steps_per_epoch = len(data) // train_batch_size
    total_steps = num_train_epochs * steps_per_epoch
    rates = [learning_rate * schedule(step, total_steps) for step in range(total_steps)]
    shape = (num_train_epochs, len(data))
    margins = torch.full(shape, torch.nan, dtype=torch.float16, device=device)
    with tqdm(total=total_steps, desc="Training", unit="step", leave=False) as progress:
        for epoch in range(num_train_epochs):
            start = time.perf_counter()
            drawn = epoch_batches(len(data), train_batch_size, generator)
            order, offsets, flips = (tensor.to(device) for tensor in drawn)
            model.train()
            epoch_loss = torch.zeros((), device=device)
            for step in range(steps_per_epoch):
                rate = rates[epoch * steps_per_epoch + step]
                optimizer.param_groups[0]["lr"] = rate
                chosen = order[step]
                images = crop_and_flip(data.images[chosen], offsets[step], flips[step])
                loss, margin = train_step(
                    model, optimizer, data.normalize(images), data.labels[chosen], dtype
                )
                epoch_loss += loss
                margins[epoch, chosen] = margin
                progress.update()
            mean_loss = (epoch_loss / steps_per_epoch).item()
            speed = steps_per_epoch * train_batch_size / (time.perf_counter() - start)
            progress.write(
                f"epoch {epoch + 1:3}/{num_train_epochs}   learning rate {rate:8.5f}   "
                f"loss {mean_loss:7.4f}   {speed:8.0f} images/s"
            )
            require_finite(model, mean_loss, epoch)
    print_without_margin(margins)
    return margins.cpu()


def train_step(model, optimizer, images, labels, dtype):
    """Takes one step of the optimizer on images, float32 [B, 3, 32, 32], and their labels [B].

    Returns the loss before the step, and the margins, float16 [B].
    """
    with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
        logits = model(images)
    loss = F.cross_entropy(logits, labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    margin = pipeline.margin(logits.detach(), labels)
    return loss.detach(), margin.clamp(-6e4, 6e4).to(torch.float16)  # which ends at 65,504


def require_finite(model, mean_loss, epoch):
    """Raises NumericalError where the loss of an epoch or a weight after it is not finite.

    The loss was computed before the last step, so the weights are checked, too.
    """
    weights = model.state_dict().values()
    if not np.isfinite(mean_loss) or not all(weight.isfinite().all() for weight in weights):
        raise pipeline.NumericalError(
            f"the training diverged in epoch {epoch + 1}: lower --learning_rate"
        )


def print_without_margin(margins):
    """Prints how many images were in no training batch, by margins, [epochs, N], if any were."""
    count = margins.isnan().all(0).sum()
    if count:
        print(
            f"{count} images were in no batch: they are ranked by their margin in the end, "
            "since they have no aum"
        )


@torch.no_grad()
def compute_logits(model, data, batch_size, dtype):
    """Returns the logits, float32 [N, num_classes], of ImageData, without augmentation."""
    model.eval()
    batches = tqdm(data.images.split(batch_size), "Evaluating", leave=False)
    with torch.autocast(data.images.device.type, dtype, enabled=dtype != torch.float32):
        return torch.cat([model(data.normalize(batch)) for batch in batches])


def evaluate(logits, labels):
    """Returns mean cross-entropy and accuracy of logits [N, num_classes] against labels [N]."""
    loss = F.cross_entropy(logits, labels).item()
    accuracy = (logits.argmax(1) == labels).float().mean().item()
    return loss, accuracy


def print_accuracies(model, data, test, batch_size, dtype):
    """Prints and returns accuracies, from 0 to 1, by name, on training images and on test images.

    data, test: ImageData. With corrupted labels there is a second accuracy on training images.
    """
    train_logits = compute_logits(model, data, batch_size, dtype)
    test_logits = compute_logits(model, test, batch_size, dtype)
    results = {"train": evaluate(train_logits, data.labels)}
    if data.is_corrupted.any():
        results["train, true labels"] = evaluate(train_logits, data.true_labels)
    results["test"] = evaluate(test_logits, test.labels)
    for name, (loss, accuracy) in results.items():
        print(f"{name:18}   loss {loss:7.4f}   accuracy {100 * accuracy:6.2f} %")
    return {name: accuracy for name, (_, accuracy) in results.items()}


# ---- The script ----------------------------------------------------------------------------------


def choose_checkpoint(args):
    """Returns the path of the checkpoint to write. Raises UserError if it is among the images."""
    if args.dataset == "imagefolder":
        pipeline.refuse_inside_data("--checkpoint_dir", args.checkpoint_dir, args.dataset_dir)
    return pipeline.checkpoint_path(
        args.checkpoint_dir,
        args.corrupt_percentage,
        noisy=args.noisy_labels is not None,
        cleaned=args.corrections is not None,
    )


def load_examples(args):
    """Returns training and test images, ImageData on the CPU, and what the checkpoint keeps.

    The latter is a dictionary: the labels that were given and the hash of their file, None without
    one; what a person decided, or None; and the number of images before any was left out.
    """
    clean = pipeline.load_data(
        args.dataset, args.dataset_dir, "train", args.num_train_examples, args.output_dir
    )
    test = pipeline.load_data(args.dataset, args.dataset_dir, "test", cache_dir=args.output_dir)
    pipeline.check_splits(clean, test)
    given = file_hash = cleaning = None
    if args.noisy_labels is not None:
        given, file_hash = pipeline.read_noisy_labels(
            args.noisy_labels, clean, test, args.dataset_dir
        )
    data = pipeline.training_examples(clean, args.corrupt_percentage, given)
    if args.corrections is not None:
        cleaning = pipeline.read_corrections(args.corrections, data, test, args.dataset_dir)
        data = pipeline.training_examples(clean, args.corrupt_percentage, given, cleaning)
    kept = {
        "given_labels": given,
        "labels_sha256": file_hash,
        "cleaning": cleaning,
        "num_loaded": len(clean),
    }
    return data, test, kept


def print_examples(data, test):
    """Prints how many images, corrupted labels, classes and duplicates there are."""
    print(
        f"{len(data)} training images ({data.is_corrupted.sum()} with a wrong label), "
        f"{len(test)} test images, {len(data.class_names)} classes"
    )
    pipeline.print_duplicates(data, test)


def print_next_steps(args):
    """Prints the commands that use the new model."""
    print("Find mislabeled training images, or see which ones influence the test images most:")
    for script in ("detect_mislabeled_dataset.py", "analyze.py"):
        line = pipeline.command(
            script,
            args,
            checkpoint_dir=args.checkpoint_dir,
            cleaned=args.corrections is not None,
        )
        print(f"  {line}")


def main():
    """Parses, loads, trains, evaluates, saves."""
    args = parse_arguments()
    start = time.perf_counter()
    device = pipeline.choose_device(args.device, several_processes=False)
    dtype = pipeline.configure_precision(args.precision, device)
    pipeline.print_machine(device, dtype)
    path = choose_checkpoint(args)
    data, test, kept_labels = load_examples(args)
    if args.train_batch_size > len(data):
        raise pipeline.UserError(
            f"--train_batch_size {args.train_batch_size}: there are only {len(data)} images"
        )
    pipeline.make_folder(path.parent)
    print_examples(data, test)

    data, test = data.to(device), test.to(device)
    torch.manual_seed(args.seed)
    model = pipeline.construct_model(args.model, len(data.class_names)).to(device)
    recipe = {name: getattr(args, name) for name in RECIPE}
    train_start = time.perf_counter()
    margins = train(model, data, **recipe, seed=args.seed, dtype=dtype)
    train_seconds = time.perf_counter() - train_start
    accuracy = print_accuracies(model, data, test, args.eval_batch_size, dtype)
    metadata = vars(args) | kept_labels
    metadata |= {
        "corrupt_percentage": args.corrupt_percentage or 0.0,
        "recipe": recipe,
        "class_names": data.class_names,
        "num_train": len(data),
        "data_sha256": data.digest,
        "margins": margins,
        "accuracy": accuracy,
        "train_seconds": train_seconds,
        "environment": pipeline.environment(device),
    }
    pipeline.save_checkpoint(path, model, metadata)
    seconds = time.perf_counter() - start
    print(f"trained in {train_seconds:.1f} s ({seconds:.1f} s in all); wrote {path}")
    print_next_steps(args)


if __name__ == "__main__":
    pipeline.run(main)
