"""Trains a network and writes the checkpoint that the other scripts use.

It uses SGD, and random crops and flips. The learning rate rises for a fifth of the steps and then
falls to zero. `python train.py --help` lists the flags; their defaults are those with which the
published CIFAR-10 example trains for analysis. The same command continues a training that was
interrupted.
"""

import contextlib
import hashlib
import io
import time
from dataclasses import asdict, dataclass, field, replace

import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock, Timeout
from torch import nn
from tqdm import tqdm

import pipeline

DIGEST_BYTES = 32  # of a SHA-256
# Fractions of the epochs after which the weights are kept beside the final weights. analyze.py uses
# them with --snapshots: scores averaged over several networks of the second half of the training
# predict the effect of retraining better than the scores of one network.
SNAPSHOT_FRACTIONS = (0.6, 0.8)


@dataclass(frozen=True)
class Recipe:
    """How a network is trained. Flags of the same names override the hyperparameters.

    learning_rate: the largest one of the schedule. momentum: of Nesterov's method; 0 is plain SGD.
    label_smoothing: the share of the target that is spread evenly over all classes (Szegedy et al.
    2016, section 7). norm_bias_factor: multiplies the learning rate of the biases of batch
    normalisation. border: what crops show outside the image: `constant` is black, and `reflect`
    mirrors the image. alternate_flips: as `alternating_flips` describes.
    """

    train_batch_size: int
    learning_rate: float
    weight_decay: float
    num_train_epochs: int
    momentum: float = 0.0
    label_smoothing: float = 0.0
    norm_bias_factor: float = 1.0
    border: str = "constant"
    alternate_flips: bool = False


HYPERPARAMETERS = ("train_batch_size", "learning_rate", "weight_decay", "num_train_epochs")
RECIPES = {
    "published": Recipe(
        train_batch_size=512,
        learning_rate=0.4,
        weight_decay=1e-3,
        num_train_epochs=25,
    ),
    "robust": Recipe(
        train_batch_size=128,
        learning_rate=0.08,
        weight_decay=1.5e-3,
        num_train_epochs=25,
        momentum=0.9,
        label_smoothing=0.2,
        norm_bias_factor=16.0,
        border="reflect",
        alternate_flips=True,
    ),
}

positive_float = pipeline.number(float, "a number above 0", lambda value: 0 < value < float("inf"))


def parse_arguments():
    """Reads the command line."""
    parser = pipeline.shared_parser(__doc__)
    parser.groups["data"].add_argument(
        "--corrections",
        metavar="CSV",
        help="file with the decisions of a review: columns path and new_label, which is a class or "
        f"'{pipeline.LEAVE_OUT}'; if the images have no files, the column index of suspects_*.csv "
        "in place of path (default: none)",
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
    """Adds the recipe, the hyperparameters that override its values, the seed, and others."""
    group.add_argument(
        "--recipe",
        choices=RECIPES,
        default="published",
        help="how to train: as the published example, or robust to wrong labels, with Nesterov "
        "momentum, label smoothing, mirrored borders and alternating flips (default: %(default)s)",
    )
    add_hyperparameters(group)
    group.add_argument(
        "--seed",
        type=pipeline.whole_number,
        default=1004,
        metavar="N",
        help="seed of initial weights, batch order, crops and flips (default: %(default)s)",
    )
    group.add_argument(
        "--eval_batch_size",
        type=pipeline.positive_int,
        default=1024,
        metavar="N",
        help="images per step of the evaluation (default: %(default)s)",
    )


def add_hyperparameters(group):
    """Adds the hyperparameters. Without a flag, the recipe decides."""
    group.add_argument(
        "--train_batch_size",
        type=pipeline.positive_int,
        metavar="N",
        help=f"training images per step ({defaults_of('train_batch_size')})",
    )
    group.add_argument(
        "--learning_rate",
        type=positive_float,
        metavar="X",
        help=f"largest learning rate of the schedule ({defaults_of('learning_rate')})",
    )
    group.add_argument(
        "--weight_decay",
        type=pipeline.non_negative_float,
        metavar="X",
        help=f"factor of the L2 penalty on the weights ({defaults_of('weight_decay')})",
    )
    group.add_argument(
        "--num_train_epochs",
        type=pipeline.positive_int,
        metavar="N",
        help=f"number of passes over the training images ({defaults_of('num_train_epochs')})",
    )


def defaults_of(name):
    """Returns the default of a hyperparameter in each recipe, as part of a help text."""
    published = getattr(RECIPES["published"], name)
    robust = getattr(RECIPES["robust"], name)
    if published == robust:
        return f"default: {published}"
    return f"default: {published}; with --recipe robust: {robust}"


def choose_recipe(args):
    """Returns the Recipe of `--recipe`, with the hyperparameters of the command line."""
    values = {name: getattr(args, name) for name in HYPERPARAMETERS}
    given = {name: value for name, value in values.items() if value is not None}
    return replace(RECIPES[args.recipe], **given)


def hyperparameters_of(recipe):
    """Returns the hyperparameters of a Recipe that flags can override, by name."""
    return {name: getattr(recipe, name) for name in HYPERPARAMETERS}


def used_flags(args, recipe):
    """Returns all flags with the values that are used, a dictionary.

    The entry "recipe" is what decides how a network is trained, a dictionary: the recipe's name,
    with the key "recipe", and the HYPERPARAMETERS. These have their own entries, too.
    """
    hyperparameters = hyperparameters_of(recipe)
    flags = {**vars(args), **hyperparameters}
    flags["recipe"] = {"recipe": args.recipe, **hyperparameters}  # in place of the name alone
    return flags


# ---- Training ------------------------------------------------------------------------------------

CROP_PADDING = 4
LARGEST_MARGIN = 6e4  # float16 is finite up to 65,504
# Alternating flips are drawn with the training's seed plus this number, so that they do not use
# the random numbers of the batch order.
FLIP_SEED = 10_000


def pad_borders(images, border):
    """Adds 4 pixels on each side of images, uint8 [B, 3, H, W]. border: as in Recipe."""
    padding = [CROP_PADDING] * 4
    if border == "reflect":
        # torch reflects only floating-point tensors; float32 holds all values of uint8 exactly.
        return F.pad(images.float(), padding, mode="reflect").to(images.dtype)
    return F.pad(images, padding)


def crop_and_flip(images, offsets, flips, border="constant"):
    """Crops each image at its own offsets, and flips it if its flip is true.

    images: uint8 [B, 3, 32, 32]. offsets: int64 [B, 2], the crop's top and left in 0..8. flips:
    bool [B]. border: as in Recipe. Returns uint8 [B, 3, 32, 32].
    """
    size = images.shape[3]
    padded = pad_borders(images, border)  # (B, 3, 40, 40)
    windows = padded.unfold(2, size, 1).unfold(3, size, 1)  # (B, 3, 9, 9, 32, 32), a view
    windows = windows.permute(0, 2, 3, 1, 4, 5)  # (B, 9, 9, 3, 32, 32)
    rows = torch.arange(len(images), device=images.device)
    crops = windows[rows, offsets[:, 0], offsets[:, 1]]  # (B, 3, 32, 32)
    return torch.where(flips.view(-1, 1, 1, 1), crops.flip(3), crops)


def schedule(step, total_steps):
    """Returns the fraction of the largest learning rate at a step, counted from 0.

    Piecewise linear: 0 just before the first step, 1 after a fifth of the steps, and 0 just after
    the last step. So no step has a rate of zero, even in a training of few steps.
    """
    peak = max(1, round(total_steps / 5))
    return float(np.interp(step + 1, [0, peak, total_steps + 1], [0.0, 1.0, 0.0]))


def batch_generator(seed):
    """Returns the generator of batch order, crops and flips.

    It draws on the CPU, so the batches are the same on every device.
    """
    if seed == pipeline.CORRUPTION_SEED:
        # The corruption takes the first images of a permutation. A training with the corruption's
        # seed would draw the same permutation for its first epoch, so all corrupted labels would be
        # in the first batches.
        seed = -seed
    return torch.Generator().manual_seed(seed)


def num_batches(num_examples, batch_size):
    """Returns the number of steps of an epoch. The last, partial batch is dropped."""
    return num_examples // batch_size


def epoch_batches(num_examples, batch_size, generator):
    """Draws the order, the crop offsets and the flips of one epoch.

    order: positions of examples, int64 [steps, batch_size]. offsets: int64 [steps, batch_size, 2].
    flips: bool [steps, batch_size].
    """
    steps = num_batches(num_examples, batch_size)
    shape = (steps, batch_size)
    order = torch.randperm(num_examples, generator=generator)[: steps * batch_size].view(shape)
    offsets = torch.randint(2 * CROP_PADDING + 1, (*shape, 2), generator=generator)
    flips = torch.rand(shape, generator=generator) < 0.5
    return order, offsets, flips


def alternating_flips(num_examples, epoch, seed):
    """Returns which examples are flipped in an epoch, counted from 0: bool [N].

    The first epoch flips random examples. Each later epoch flips those that the epoch before did
    not flip, so that two epochs show both sides of each image (Jordan 2024, arXiv 2404.00498).
    """
    generator = torch.Generator().manual_seed(seed + FLIP_SEED)
    first = torch.rand(num_examples, generator=generator) < 0.5
    if epoch % 2 == 0:
        return first
    return ~first


def augmented_batches(data, recipe, generator, *, epoch, seed):
    """Draws one epoch of ImageData, and yields its batches, cropped, flipped and standardised.

    A batch is a triple: positions of examples, int64 [B], images, float32 [B, 3, 32, 32], and
    labels, int64 [B].
    """
    order, offsets, flips = epoch_batches(len(data), recipe.train_batch_size, generator)
    if recipe.alternate_flips:
        flips = alternating_flips(len(data), epoch, seed)[order]
    device = data.images.device
    batches = zip(order.to(device), offsets.to(device), flips.to(device), strict=True)
    for chosen, batch_offsets, batch_flips in batches:
        images = crop_and_flip(data.images[chosen], batch_offsets, batch_flips, recipe.border)
        yield chosen, data.normalize(images), data.labels[chosen]


def make_optimizer(model, recipe):
    """Returns SGD with two groups: the biases of batch normalisation, and all other parameters.

    `rate_factor` multiplies a group's learning rate and divides its weight decay, so that weight
    decay shrinks all parameters equally.
    """
    biases = []
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and module.bias is not None:
            biases.append(module.bias)
    bias_ids = {id(bias) for bias in biases}
    others = [parameter for parameter in model.parameters() if id(parameter) not in bias_ids]
    groups = []
    for parameters, factor in ((others, 1.0), (biases, recipe.norm_bias_factor)):
        decay = recipe.weight_decay / factor
        groups.append({"params": parameters, "weight_decay": decay, "rate_factor": factor})
    return torch.optim.SGD(
        groups,
        lr=recipe.learning_rate,
        momentum=recipe.momentum,
        nesterov=recipe.momentum > 0,
    )


def snapshot_epochs(num_train_epochs):
    """Returns after which epochs, counted from 1, the weights are kept beside the final weights.

    A training of two or three epochs keeps one snapshot, and a training of one epoch keeps none.
    """
    epochs = {round(fraction * num_train_epochs) for fraction in SNAPSHOT_FRACTIONS}
    return sorted(epochs - {num_train_epochs})


def copy_weights(model):
    """Returns a copy of a network's weights and buffers on the CPU, by name."""
    return {name: tensor.cpu().clone() for name, tensor in model.state_dict().items()}


@dataclass
class Training:
    """The state of a training after a whole number of epochs, and what each step needs.

    generator: draws the batches. margins: float16 [epochs, N], NaN for epochs that are still to
    come. label_smoothing: as in Recipe. snapshots: for each epoch of `snapshot_epochs`, what
    `copy_weights` returned after it.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    generator: torch.Generator
    margins: torch.Tensor
    dtype: torch.dtype
    label_smoothing: float = 0.0
    epochs_done: int = 0
    snapshots: dict = field(default_factory=dict)

    @property
    def num_epochs(self):
        """The number of epochs of the whole training."""
        return len(self.margins)

    def generators(self):
        """Returns all random generators: that of the batches, and those that dropout layers use."""
        device = self.margins.device
        generators = [self.generator, torch.default_generator]
        if device.type == "cuda":
            generators.append(torch.cuda.default_generators[device.index])
        return generators

    def state_dict(self):
        """Returns all that an epoch changes, as tensors, numbers, lists and dictionaries."""
        return {
            "epochs_done": self.epochs_done,
            "weights": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generators": [generator.get_state() for generator in self.generators()],
            "margins": self.margins,
            "snapshots": self.snapshots,
        }

    def load_state_dict(self, state):
        """Sets the state to what `state_dict` returned. Its tensors may be on any device."""
        self.epochs_done = state["epochs_done"]
        self.snapshots = state["snapshots"]
        self.model.load_state_dict(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        pairs = zip(self.generators(), state["generators"], strict=True)
        for generator, generator_state in pairs:
            generator.set_state(generator_state)
        self.margins.copy_(state["margins"])


def new_training(model, data, recipe, *, seed, dtype):
    """Returns the Training of a model before its first epoch. Arguments: as of `train`."""
    shape = (recipe.num_train_epochs, len(data))
    return Training(
        model,
        make_optimizer(model, recipe),
        batch_generator(seed),
        margins=torch.full(shape, torch.nan, dtype=torch.float16, device=data.images.device),
        dtype=dtype,
        label_smoothing=recipe.label_smoothing,
    )


def train(model, data, recipe, *, seed, dtype, saved=None):
    """Trains `model` in place on `data`, ImageData on the model's device. Prints a line per epoch.

    The last, partial batch of an epoch is dropped. recipe: a Recipe, whose train_batch_size is at
    most len(data). saved: None, or the SavedTraining from which the training continues, and to
    which each epoch is saved.
    Returns the margin of each example in its training batch, float16 [epochs, N], NaN if it was in
    no batch. The margin is the logit of the label minus the largest other logit (Pleiss et al.
    2020, section 3.1). Also returns the snapshots: a dictionary from each epoch of
    `snapshot_epochs` to what `copy_weights` returned after it.
    Raises NumericalError after an epoch in which the loss or a weight stopped being finite.
    """
    training = new_training(model, data, recipe, seed=seed, dtype=dtype)
    if saved:
        saved.load(training)
    done = training.epochs_done
    num_epochs = recipe.num_train_epochs
    steps = num_batches(len(data), recipe.train_batch_size)  # of an epoch
    total_steps = num_epochs * steps
    rates = [recipe.learning_rate * schedule(step, total_steps) for step in range(total_steps)]
    with tqdm(
        total=total_steps, initial=done * steps, desc="Training", unit="step", leave=False
    ) as progress:
        for epoch in range(done, num_epochs):
            batches = augmented_batches(data, recipe, training.generator, epoch=epoch, seed=seed)
            train_epoch(training, batches, rates[epoch * steps : (epoch + 1) * steps], progress)
            if training.epochs_done in snapshot_epochs(num_epochs):
                training.snapshots[training.epochs_done] = copy_weights(model)
            if saved:
                saved.save(training)
    print_images_without_margin(training.margins)
    return training.margins.cpu(), training.snapshots


def train_epoch(training, batches, rates, progress):
    """Takes a step on each batch at its learning rate, and prints a line.

    batches: as augmented_batches yields them. progress: the bar that counts steps. Raises
    NumericalError if the loss or a weight is not finite after the epoch.
    """
    start = time.perf_counter()
    epoch = training.epochs_done
    num_images = 0
    training.model.train()
    epoch_loss = torch.zeros((), device=training.margins.device)
    for rate, (chosen, images, labels) in zip(rates, batches, strict=True):
        for group in training.optimizer.param_groups:
            group["lr"] = rate * group["rate_factor"]
        loss, margin = train_step(training, images, labels)
        epoch_loss += loss
        training.margins[epoch, chosen] = margin
        num_images += len(chosen)
        progress.update()
    mean_loss = (epoch_loss / len(rates)).item()
    speed = num_images / (time.perf_counter() - start)
    progress.write(
        f"epoch {epoch + 1:3}/{training.num_epochs}   learning rate {rate:8.5f}   "
        f"loss {mean_loss:7.4f}   {speed:8.0f} images/s"
    )
    require_finite(training.model, mean_loss, epoch)
    training.epochs_done += 1


def train_step(training, images, labels):
    """Takes one step of the optimizer on images, float32 [B, 3, 32, 32], and their labels [B].

    Returns the loss before the step, and the margins, float16 [B]. The margins are those of the
    labels as given, without label smoothing.
    """
    dtype = training.dtype
    with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
        logits = training.model(images)
    loss = F.cross_entropy(logits, labels, label_smoothing=training.label_smoothing)
    loss.backward()
    training.optimizer.step()
    training.optimizer.zero_grad()
    margin = pipeline.margin(logits.detach(), labels)
    return loss.detach(), margin.clamp(-LARGEST_MARGIN, LARGEST_MARGIN).to(torch.float16)


def require_finite(model, mean_loss, epoch):
    """Raises NumericalError if the loss of an epoch, or a weight after the epoch, is not finite.

    The loss was computed before the last step, so the weights are checked as well.
    """
    weights = model.state_dict().values()
    are_finite = all(weight.isfinite().all() for weight in weights)
    if not np.isfinite(mean_loss) or not are_finite:
        raise pipeline.NumericalError(
            f"the training diverged in epoch {epoch + 1}: lower --learning_rate"
        )


def print_images_without_margin(margins):
    """Prints how many images were in no training batch, unless there are none.

    margins: [epochs, N].
    """
    count = margins.isnan().all(0).sum()
    if count:
        print(
            f"{count} images were in no batch and have no aum: they are ranked by their margin "
            "after the training"
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
    """Prints loss and accuracy on training images and on test images. Returns the accuracies.

    data, test: ImageData. Returns a dictionary of fractions from 0 to 1: `train`, `test`, and with
    corrupted labels also `train, true labels`. Raises NumericalError if a loss is not finite.
    """
    train_logits = compute_logits(model, data, batch_size, dtype)
    test_logits = compute_logits(model, test, batch_size, dtype)
    results = {"train": evaluate(train_logits, data.labels)}
    if data.is_corrupted.any():
        results["train, true labels"] = evaluate(train_logits, data.true_labels)
    results["test"] = evaluate(test_logits, test.labels)
    for name, (loss, accuracy) in results.items():
        print(f"{name:18}   loss {loss:7.4f}   accuracy {100 * accuracy:6.2f} %")
        if not np.isfinite(loss):
            raise pipeline.NumericalError(
                f"the loss of the trained network is {loss}: lower --learning_rate"
            )
    return {name: accuracy for name, (_, accuracy) in results.items()}


# ---- A training that was interrupted -------------------------------------------------------------


class SavedTraining:
    """The file beside a checkpoint from which the same command continues an interrupted training.

    On the CPU of one machine, the result is the same as without an interruption, bit for bit. The
    file is written completely or not at all. `require_one_training` keeps a second training of the
    same checkpoint away.
    """

    def __init__(self, path, run):
        """path: of the file. run: what decides the result, as describe_run returns it."""
        self.path = path
        self.run = run
        self.start = time.perf_counter()
        self.seconds_before = 0.0
        self.holds_this_run = False  # whether the state in the file is one of this training

    @property
    def seconds(self):
        """Seconds that the training has taken, including the parts before interruptions."""
        return self.seconds_before + time.perf_counter() - self.start

    def load(self, training):
        """Sets `training` to the saved state if there is one of this run, and prints its epoch."""
        content = self.read()
        if content is None:
            return
        training.load_state_dict(content["state"])
        self.holds_this_run = True
        self.seconds_before = content["seconds"]
        print(f"continuing after epoch {training.epochs_done} of {training.num_epochs}")

    def read(self):
        """Returns what `save` wrote, or None without a file. Prints why a file is not used."""
        try:
            written = self.path.read_bytes()
        except FileNotFoundError:
            return None
        digest, body = written[:DIGEST_BYTES], written[DIGEST_BYTES:]
        if hashlib.sha256(body).digest() != digest:  # torch.load does not notice all damage
            print(f"{self.path} is damaged: the training starts from the beginning")
            return None
        content = torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)
        saved_run = content["run"]
        names = dict.fromkeys([*self.run, *saved_run])  # names in either one, without repetition
        different = [name for name in names if saved_run.get(name) != self.run.get(name)]
        if different:
            print(
                f"{self.path} belongs to another training (other {', '.join(different)}): "
                "this one starts from the beginning, and replaces the file after its first epoch"
            )
            return None
        return content

    def save(self, training):
        """Writes the state of `training`."""
        content = {"run": self.run, "seconds": self.seconds, "state": training.state_dict()}
        # If the disk is full, write_bytes below raises OSError; torch.save to a file would not.
        body = io.BytesIO()
        torch.save(content, body)
        digest = hashlib.sha256(body.getbuffer()).digest()
        with pipeline.atomic_path(self.path) as temporary:
            temporary.write_bytes(digest + body.getvalue())
        self.holds_this_run = True

    def delete(self):
        """Removes the file, after the training is complete or has diverged.

        If the file is still that of another training, because `save` was not called, it stays.
        """
        if self.holds_this_run:
            self.path.unlink(missing_ok=True)


@contextlib.contextmanager
def require_one_training(path):
    """Holds the lock of the checkpoint `path` in a block; raises UserError if it is held elsewhere.

    Each of two trainings would delete what the other one wrote.
    """
    lock_path = path.with_name(f".{path.name}.lock")
    lock = FileLock(lock_path, mode=0o666)  # other users of the folder may train later
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise pipeline.UserError(
            f"another training writes {path}: wait until it ends, choose another "
            f"--checkpoint_dir, or delete {lock_path} if none runs"
        ) from None
    try:
        yield
    finally:
        lock.release()


def describe_run(settings, model, data, dtype):
    """Returns what decides the result of a training, by name: numbers and strings.

    settings: seed, model name and hyperparameters. model: before the training. data: ImageData.
    """
    return {
        **settings,
        "dtype": str(dtype),
        "device": data.images.device.type,
        "data": data.digest,
        "torch": str(torch.__version__),
        # The hash includes the whole file that defines `train`.
        "code": pipeline.code_digest(model, entry_points=[train]),
    }


# ---- The script ----------------------------------------------------------------------------------


def choose_checkpoint(args):
    """Returns the path of the checkpoint to write.

    Raises UserError if `--checkpoint_dir` lies among the images.
    """
    if args.dataset == "imagefolder":
        pipeline.refuse_inside_data("--checkpoint_dir", args.checkpoint_dir, args.dataset_dir)
    return pipeline.checkpoint_path(
        args.checkpoint_dir,
        args.corrupt_percentage,
        noisy=args.noisy_labels is not None,
        cleaned=args.corrections is not None,
    )


def load_examples(args):
    """Returns training and test images, ImageData on the CPU, and a part of the metadata.

    The metadata is a dictionary. given_labels, labels_sha256: the labels of `--noisy_labels`, int64
    [N], and the hash of their file, both None without the flag. cleaning: what `--corrections`
    decides, or None. num_loaded: number of training images before any was left out.
    """
    loaded = pipeline.load_data(
        args.dataset, args.dataset_dir, "train", args.num_train_examples, args.output_dir
    )
    test = pipeline.load_data(args.dataset, args.dataset_dir, "test", cache_dir=args.output_dir)
    pipeline.check_splits(loaded, test)
    given_labels = file_hash = None
    if args.noisy_labels is not None:
        given_labels, file_hash = pipeline.read_noisy_labels(
            args.noisy_labels, loaded, test, args.dataset_dir
        )
    cleaning = None
    if args.corrections is not None:
        uncorrected = pipeline.training_examples(loaded, args.corrupt_percentage, given_labels)
        cleaning = pipeline.read_corrections(args.corrections, uncorrected, test, args.dataset_dir)
    data = pipeline.training_examples(loaded, args.corrupt_percentage, given_labels, cleaning)
    metadata = {
        "given_labels": given_labels,
        "labels_sha256": file_hash,
        "cleaning": cleaning,
        "num_loaded": len(loaded),
    }
    return data, test, metadata


def initial_model(args, num_classes, device):
    """Returns the network of `--model` with the initial weights of `--seed`."""
    torch.manual_seed(args.seed)
    return pipeline.construct_model(args.model, num_classes).to(device)


def require_full_batch(batch_size, data):
    """Raises UserError if there are fewer training images than a batch needs."""
    if batch_size > len(data):
        raise pipeline.UserError(
            f"--train_batch_size {batch_size}: there are only {len(data)} images"
        )


def print_examples(data, test):
    """Prints how many images, corrupted labels, classes and duplicates there are."""
    print(
        f"{pipeline.count_examples(data)}, {len(test)} test images, {len(data.class_names)} classes"
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


def train_checkpoint(path, data, test, label_metadata, args, recipe, dtype):
    """Trains a network, evaluates it and writes it to `path`. Returns the seconds of the training.

    data, test: ImageData on the device of the training.
    """
    model = initial_model(args, len(data.class_names), data.images.device)
    settings = {**asdict(recipe), "seed": args.seed, "model": args.model}
    run = describe_run(settings, model, data, dtype)
    saved = SavedTraining(pipeline.unfinished_path(path), run)
    try:
        margins, snapshots = train(model, data, recipe, seed=args.seed, dtype=dtype, saved=saved)
        train_seconds = saved.seconds
        accuracy = print_accuracies(model, data, test, args.eval_batch_size, dtype)
    except pipeline.NumericalError:
        saved.delete()  # otherwise the next run would continue a training that diverged
        raise
    metadata = {
        **used_flags(args, recipe),
        **label_metadata,
        "class_names": data.class_names,
        "num_train": len(data),
        "data_sha256": data.digest,
        "margins": margins,
        "snapshots": snapshots,
        "accuracy": accuracy,
        "logits_to_check": pipeline.logits_to_check(model, data),
        "train_seconds": train_seconds,
        "environment": pipeline.environment(data.images.device),
    }
    pipeline.save_checkpoint(path, model, metadata)
    saved.delete()
    return train_seconds


def main():
    """Parses, loads, trains, evaluates, saves."""
    args = parse_arguments()
    recipe = choose_recipe(args)
    start = time.perf_counter()
    device = pipeline.choose_device(args.device, several_processes=False)
    dtype = pipeline.configure_precision(args.precision, device)
    pipeline.print_machine(device, dtype)
    path = choose_checkpoint(args)
    data, test, label_metadata = load_examples(args)
    require_full_batch(recipe.train_batch_size, data)
    pipeline.make_folder(path.parent)
    print_examples(data, test)

    data, test = data.to(device), test.to(device)
    with require_one_training(path):
        train_seconds = train_checkpoint(path, data, test, label_metadata, args, recipe, dtype)
    seconds = time.perf_counter() - start
    print(f"trained in {train_seconds:.1f} s; this run took {seconds:.1f} s; wrote {path}")
    print_next_steps(args)


if __name__ == "__main__":
    pipeline.run(main)
