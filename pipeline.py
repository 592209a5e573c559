"""What train.py, analyze.py and detect_mislabeled_dataset.py share, in the order in which data meets it:
command line ► images and labels ► label corruption ► batches ► ResNet-9 ► files ► checkpoints ► influence ► results.
"""

import os
import sys


def end_in_one_line(kind, error, traceback):
    """Takes the place of Python's traceback where Ctrl-C was pressed: one line, exit status 130."""
    if not issubclass(kind, KeyboardInterrupt):
        return sys.__excepthook__(kind, error, traceback)
    sys.stdout.flush()
    name = os.path.basename(sys.argv[0])  # noqa: PTH119, nothing has been imported yet
    print(f"{name}: interrupted; nothing is half-written, the same command starts again", file=sys.stderr, flush=True)
    os._exit(130)


if not hasattr(sys, "ps1"):  # a session at the prompt goes on
    sys.excepthook = end_in_one_line  # first of all, because the imports take seconds

import argparse
import atexit
import contextlib
import copy
import ctypes
import gc
import hashlib
import io
import itertools
import json
import math
import platform
import secrets
import shlex
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib.metadata import version
from operator import attrgetter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock, Timeout
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.module.conv2d import TrackedConv2d
from kronfluence.module.linear import TrackedLinear
from kronfluence.module.tracked_module import ModuleMode, TrackedModule
from kronfluence.module.tracker.factor import CovarianceTracker, LambdaTracker
from kronfluence.module.tracker.pairwise_score import PairwiseScoreTracker
from kronfluence.module.tracker.precondition import PreconditionTracker
from kronfluence.module.tracker.self_score import SelfScoreTracker
from kronfluence.task import Task
from kronfluence.utils.constants import (
    ACCUMULATED_PRECONDITIONED_GRADIENT_NAME,
    ACTIVATION_COVARIANCE_MATRIX_NAME,
    ACTIVATION_EIGENVALUES_NAME,
    ACTIVATION_EIGENVECTORS_NAME,
    ALL_MODULE_NAME,
    GRADIENT_COVARIANCE_MATRIX_NAME,
    GRADIENT_EIGENVALUES_NAME,
    GRADIENT_EIGENVECTORS_NAME,
    LAMBDA_MATRIX_NAME,
    NUM_ACTIVATION_COVARIANCE_PROCESSED,
    NUM_GRADIENT_COVARIANCE_PROCESSED,
    NUM_LAMBDA_PROCESSED,
    PAIRWISE_SCORE_MATRIX_NAME,
    PRECONDITIONED_GRADIENT_NAME,
    SELF_SCORE_VECTOR_NAME,
)
from kronfluence.utils.dataset import DataLoaderKwargs
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

# --------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------

STRATEGIES = ("ekfac", "kfac", "diagonal", "identity")


class UserError(Exception):
    """A mistake only the user can put right; its text is one sentence that says what to do."""


class NumericalError(Exception):
    """A NaN or an infinity where a number was due; its text is one sentence that says where and why."""


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, without the usage text."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def keep_freed_memory():
    """Makes glibc keep the memory of freed tensors: fresh pages cost more than many operations on a CPU."""
    m_trim_threshold, m_mmap_max = -1, -4
    with contextlib.suppress(AttributeError, TypeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, 2**31 - 1)


def return_freed_memory():
    """Gives freed memory back after all: in a long run the pieces become too small for the next tensors."""
    with contextlib.suppress(AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


@cache
def spare_what_was_imported():
    """Takes what there is out of garbage collection, once: a second time would freeze what is left of a run.

    kronfluence collects garbage around every stage, and would walk all of torch's own objects each time.
    """
    gc.freeze()
    atexit.register(gc.unfreeze)


# Of errors that torch does not raise as OutOfMemoryError: another program has filled the GPU.
SIGNS_OF_A_FULL_GPU = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def run(main):
    """Calls `main` and turns what can go wrong into one line on standard error.

    Exit status 2 for a mistake of the user, 1 for a failure of the machine or a result that is not a number.
    """
    # kronfluence constructs a GradScaler by its old name, in float32 and bfloat16 too, where it does nothing.
    warnings.filterwarnings("ignore", message=r".*torch\.cuda\.amp\.GradScaler", category=FutureWarning)
    warnings.filterwarnings("ignore", message=r".*GradScaler is enabled, but CUDA is not available")
    with contextlib.suppress(AttributeError):  # a stream of a notebook
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files that the console has no letters for
    keep_freed_memory()
    try:
        main()
        return
    except UserError as error:
        status, message = 2, f"error: {error}"
    except NumericalError as error:
        status, message = 1, f"error: {error}"
    except (OSError, SafetensorError) as error:  # a full disk, a file that may not be written
        status, message = 1, f"error: {first_line(error)}; what earlier runs wrote is unharmed"
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in SIGNS_OF_A_FULL_GPU):
            status, message = 1, "error: out of GPU memory: free some, lower the batch sizes, or use --device cpu"
        elif isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):
            status, message = 1, "error: out of memory: free some, or lower the batch sizes"
        else:
            raise
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(status)


def first_line(error):
    """Returns the first line of an exception's text, or its type where it has none."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def number(kind, description, allowed):
    """Returns an argparse type: `kind(text)` where `allowed` holds of it, else an error that asks for `description`."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not allowed(value):
            raise argparse.ArgumentTypeError(f"'{text}' is not {description}")
        return value

    return parse


def is_non_negative(value):
    """Returns whether a number is finite and at least 0."""
    return 0 <= value < math.inf


positive_int = number(int, "a whole number of at least 1 and below 2**31", lambda value: 1 <= value < 2**31)
whole_number = number(int, "a whole number of at least 0 and below 2**32", lambda value: 0 <= value < 2**32)
positive_float = number(float, "a number above 0", lambda value: 0 < value < math.inf)
non_negative_float = number(float, "a number of at least 0", is_non_negative)
corrupt_fraction = number(float, "a fraction below 1, such as 0.1 (0 means none)", lambda value: 0 <= value < 1)


def number_list(text):
    """Reads numbers such as `3,17,40-59` into a list without repetition, in the order given."""
    numbers = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        last = last if dash else first
        if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last) < 10**7):
            raise argparse.ArgumentTypeError(f"'{text}' is not a list of numbers such as 3,17,40-59")
        numbers += range(int(first), int(last) + 1)
    return list(dict.fromkeys(numbers))


def damping(text):
    """Reads a damping factor: a number of at least 0, or None for `heuristic`."""
    if text == "heuristic":
        return None
    return number(float, "a number of at least 0, or 'heuristic'", is_non_negative)(text)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the default of every flag that has one."""

    def _get_help_string(self, action):
        has_default = action.default not in (None, []) and action.nargs != 0  # a switch takes no value
        return super()._get_help_string(action) if has_default else action.help


def shared_parser(description, corrupt_default):
    """Returns a parser with the flags that all scripts have."""
    parser = OneLineParser(description=description, formatter_class=HelpFormatter, allow_abbrev=False)
    flag = parser.add_argument
    flag("--dataset", choices=("cifar10", "imagefolder", "synthetic"), default="cifar10", help="which images to use")
    flag(
        "--dataset_dir",
        default="./data",
        help="folder of the images; class folders lie in its train/, and in test/ if that is there",
    )
    flag("--checkpoint_dir", default="./checkpoints", help="folder of the trained model")
    flag(
        "--output_dir",
        default="./influence_results",
        help="folder that gets a folder of results per model, and what was read from class folders of images",
    )
    flag(
        "--corrupt_percentage",
        type=corrupt_fraction,
        default=corrupt_default,
        metavar="FRACTION",
        help="fraction of the training labels that is replaced by wrong ones; 0 means none",
    )
    flag(
        "--num_train_examples",
        type=positive_int,
        metavar="N",
        help="use only N training images, the same ones in every script",
    )
    flag(
        "--precision",
        choices=("auto", "fp32", "bf16"),
        default="auto",
        help="auto computes in bfloat16 where that is fast; sums over images and layers are float32",
    )
    flag("--device", choices=("auto", "cuda", "cpu"), default="auto", help="auto takes CUDA where there is one")
    return parser


def influence_parser(description, corrupt_default):
    """Returns a parser with the flags that analyze.py and detect_mislabeled_dataset.py share."""
    parser = shared_parser(description, corrupt_default)
    flag = parser.add_argument
    flag(
        "--cleaned",
        action="store_true",
        help="explain the model that train.py trained with --exclude_suspects or --corrections",
    )
    flag("--factor_strategy", choices=STRATEGIES, default="ekfac", help="approximation of the curvature")
    flag(
        "--factor_examples",
        type=positive_int,
        metavar="N",
        help="fit the curvature on N training images, drawn at random, instead of on all of them",
    )
    flag(
        "--train_batch_size",
        type=positive_int,
        metavar="N",
        help="training images per step (default: 64 on the CPU, 1024 on CUDA)",
    )
    flag(
        "--damping_factor",
        type=damping,
        default="heuristic",
        metavar="X",
        help="added to every eigenvalue; heuristic means 0.1 x the mean eigenvalue of each layer",
    )
    flag("--seed", type=whole_number, default=1004, help="draws the pseudo-labels of the Fisher matrix")
    flag("--profile", action="store_true", help="print and save kronfluence's table of time per phase")
    return parser


def influence_settings(args, dtype, phases):
    """Returns what the flags of `influence_parser` mean to an InfluenceRun, its arguments by name."""
    return {
        "output_dir": args.output_dir,
        "strategy": args.factor_strategy,
        "dtype": dtype,
        "seed": args.seed,
        "batch_size": args.train_batch_size,
        "profile": args.profile,
        "phases": phases,
        "factor_examples": args.factor_examples,
    }


def command(script, args, **values):
    """Returns the command that runs a script with the flags of `args` that all scripts have, and others, `values`.

    Defaults are left out, and flags whose value is None or False.
    """
    defaults = vars(shared_parser("", corrupt_default=None).parse_args([]))
    flags = {name: getattr(args, name) for name in defaults} | values
    words = ["python", script]
    for name, value in flags.items():
        if value is not None and value is not False and value != defaults.get(name):
            words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return shlex.join(words)


def num_processes():
    """Returns how many processes torchrun started, 1 without it."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def is_main_process():
    """Returns whether this process is the one that prints and writes: the first one under torchrun."""
    return num_processes() == 1 or int(os.environ.get("RANK") or 0) == 0


def choose_device(name, several_processes):
    """Returns the torch device for a `--device` value: under torchrun, each process's own GPU.

    Raises UserError for `cuda` where there is none, and for more than one process where the script cannot use
    `several_processes`, or has no GPU for them: kronfluence sums its factors over processes on CUDA only.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("argument --device: torch finds no CUDA device here; use cpu or auto")
    on_gpu = name != "cpu" and torch.cuda.is_available()
    world_size = num_processes()
    if world_size > 1 and not (on_gpu and several_processes):
        place = "this script" if on_gpu else "a run on the CPU"
        raise UserError(
            f"WORLD_SIZE is {world_size}, but {place} is right in one process only: start it without torchrun"
        )
    if world_size > 1 and not int(os.environ.get("LOCAL_RANK") or world_size) < torch.cuda.device_count():
        raise UserError("each process needs a GPU of its own: start them with torchrun, as many as there are GPUs")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK") or 0)) if on_gpu else torch.device("cpu")


def choose_dtype(precision, device):
    """Returns the compute dtype, torch.float32 or torch.bfloat16, of a `--precision` value on a device.

    Lets CUDA round what stays float32 to TF32 where that dtype is bfloat16, and never where it is float32; sums inside
    a product of bfloat16 matrices stay float32.
    """
    if precision == "auto":
        if device.type == "cuda":
            fast = torch.cuda.get_device_capability(device) >= (8, 0)
        else:
            fast = any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16"))
        precision = "bf16" if fast else "fp32"
    tensor_float = "tf32" if precision == "bf16" else "ieee"
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.conv.fp32_precision = tensor_float
    return torch.bfloat16 if precision == "bf16" else torch.float32


# --------------------------------------------------------------------------------------------------
# Images and labels
# --------------------------------------------------------------------------------------------------

IMAGE_SIZE = 32
# Seeds of what has to be the same in every script, whatever --seed says.
ORDER_SEED, EXAMPLES_SEED, CORRUPTION_SEED, HELD_OUT_SEED, FACTORS_SEED, SUBSET_SEED = 11, 12, 13, 16, 17, 18
SYNTHETIC_SEEDS = {"train": (14, 5), "test": (14, 4)}
NUM_SYNTHETIC = {"train": 5000, "test": 500}


@dataclass(frozen=True)
class ImageData:
    """Labelled images in memory.

    images: uint8 [N, 3, 32, 32]; labels: int64 [N]; class_names: one per class; paths: one per image, empty strings
    where images have no files of their own; indices: int64 [N] on the CPU, each one's place among those loaded, by
    which the tables call it.
    """

    images: Tensor
    labels: Tensor
    class_names: list
    paths: list
    indices: Tensor

    def __len__(self):
        return len(self.labels)

    def take(self, indices):
        """Returns the examples at `indices`, an int64 tensor [M], in that order."""
        return replace(
            self,
            images=self.images[indices],
            labels=self.labels[indices],
            paths=[self.paths[i] for i in indices.tolist()],
            indices=self.indices[indices],
        )

    def keep(self, kept):
        """Returns the examples where `kept`, bool [N] on the CPU, is true."""
        return self.take(kept.nonzero().squeeze(1))

    def without(self, indices):
        """Returns all examples but those at `indices`."""
        kept = torch.ones(len(self), dtype=torch.bool)
        kept[indices] = False
        return self.keep(kept)

    def to(self, device):
        """Returns the same data with its tensors on `device`."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))


def load_train_data(dataset, dataset_dir, num_examples=None, cache_dir=None):
    """Loads the training images of a `--dataset` as ImageData on the CPU, or `num_examples` of them.

    What is read from class folders is kept in `cache_dir`, if there is one, and read from there the next time.
    Raises UserError where they cannot be found or read, or where there are fewer.
    """
    return LOADERS[dataset](dataset_dir, "train", num_examples, cache_dir)


def load_test_data(dataset, dataset_dir, cache_dir=None):
    """Loads the test images, whose classes are those of the training images, in the same way."""
    return LOADERS[dataset](dataset_dir, "test", None, cache_dir)


def torchvision_datasets():
    """Imports torchvision.datasets, which fails where torch and torchvision were built for different hardware."""
    try:
        from torchvision import datasets
    except (ImportError, RuntimeError, OSError) as error:
        raise UserError(
            f"torchvision cannot be imported ({first_line(error)}): install the build that matches "
            f"torch {torch.__version__}, or use --dataset synthetic, which does not need it"
        ) from error
    return datasets


def draw_examples(total, num_examples):
    """Returns the indices of the images to use: all, or `num_examples` drawn by a fixed seed, int64 [M]."""
    if num_examples is None:
        return torch.arange(total)
    if num_examples > total:
        raise UserError(f"--num_train_examples {num_examples}: there are only {total} training images")
    return torch.randperm(total, generator=torch.Generator().manual_seed(EXAMPLES_SEED))[:num_examples]


def load_cifar10(dataset_dir, split, num_examples=None, cache_dir=None):
    """Loads CIFAR-10 through torchvision, which downloads it where it is missing and checks its files.

    Where several processes find it missing, one downloads it and the others wait.
    """
    datasets = torchvision_datasets()
    try:
        try:
            found = datasets.CIFAR10(dataset_dir, train=split == "train")
        except RuntimeError:  # missing or damaged
            make_folder(dataset_dir)
            with FileLock(Path(dataset_dir) / ".cifar10.lock"), contextlib.redirect_stdout(io.StringIO()):
                found = datasets.CIFAR10(dataset_dir, train=split == "train", download=True)
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise UserError(
            f"CIFAR-10 was not found whole in {dataset_dir} and cannot be downloaded ({first_line(error)}): name its "
            "folder with --dataset_dir, or use --dataset imagefolder for images of your own, or --dataset synthetic, "
            "which needs none"
        ) from error
    chosen = draw_examples(len(found.data), num_examples)
    return image_data(found.data[chosen.numpy()], torch.tensor(found.targets)[chosen], found.classes)


def load_imagefolder(dataset_dir, split, num_examples=None, cache_dir=None):
    """Loads `<dataset_dir>/<split>/<class>/**`, resized to 32x32 RGB, in a fixed shuffled order.

    Class folders come sorted, and a query set or a subset must not follow the classes, hence the shuffle.
    """
    samples, class_names = find_samples(Path(dataset_dir), split)
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(ORDER_SEED))
    paths, labels = zip(*(samples[i] for i in order[draw_examples(len(order), num_examples)]), strict=True)
    cache = None
    if cache_dir is not None:
        name = sha256(os.fsencode(Path(dataset_dir).resolve()).hex(), split, str(num_examples))[:8]
        cache = Path(cache_dir) / "images" / f"{split}-{name}.safetensors"
    return image_data(read_images(paths, split, cache), torch.tensor(labels), class_names, paths)


def find_samples(dataset_dir, split):
    """Returns (path, label) of every image of a split of class folders, and the names of the classes.

    Where there is no `<dataset_dir>/test`, the test images are a tenth of each class of `<dataset_dir>/train`. Raises
    UserError where these are not two class folders or more, the same in both.
    """
    held_out = not (dataset_dir / "test").exists()
    folder = dataset_dir / ("train" if held_out else split)
    both = [folder] if held_out else [dataset_dir / "train", dataset_dir / "test"]
    try:
        names = [{path.name for path in folder.iterdir() if path.is_dir() and path.name[0] != "."} for folder in both]
        require_readable(folder)
        found = image_folder(folder)
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(
            f"--dataset imagefolder: {folder} must hold one folder of images per class ({first_line(error)})"
        ) from error
    if len(found.classes) < 2:
        raise UserError(f"--dataset imagefolder: {folder} must hold at least 2 class folders, but has 1")
    if differing := names[0] ^ names[-1]:
        raise UserError(
            f"--dataset_dir {dataset_dir}: train and test must have the same class folders, but only one has "
            + ", ".join(map(repr, sorted(differing)))
        )
    if not held_out:
        return found.samples, found.classes
    is_test = choose_held_out(found.samples, folder)
    if not any(is_test):
        raise UserError(f"--dataset imagefolder: without {dataset_dir / 'test'}, some class must have 2 images or more")
    if split == "train" and is_main_process():
        print(f"There is no {dataset_dir / 'test'}: {sum(is_test)} images, a tenth of each class, are held out for it")
    chosen = [in_test == (split == "test") for in_test in is_test]
    return list(itertools.compress(found.samples, chosen)), found.classes


def require_readable(folder):
    """Raises OSError where a folder in it, but for hidden ones, cannot be listed: torchvision would pass it over."""

    def refuse(error):
        raise error

    for _, names, _ in os.walk(folder, onerror=refuse, followlinks=True):
        names[:] = [name for name in names if name[0] != "."]


def image_folder(folder):
    """Returns torchvision's ImageFolder of all files but hidden ones: what is no image must not be missed unseen."""

    class ImageFolder(torchvision_datasets().ImageFolder):
        def find_classes(self, directory):
            names = [name for name in super().find_classes(directory)[0] if name[0] != "."]
            return names, {name: label for label, name in enumerate(names)}

    def is_hidden(path):
        return any(part[0] == "." for part in Path(path).relative_to(folder).parts)

    return ImageFolder(folder, is_valid_file=lambda path: not is_hidden(path))


def choose_held_out(samples, folder):
    """Returns which tenth of each class to hold out, one image at least of a class of two or more, a list of bools.

    samples: (path, label) pairs. The hash of its name below `folder` decides about a file, so that others may come and
    go and most of the held out ones remain.
    """
    by_class = {}
    for path, label in samples:
        name = Path(path).relative_to(folder).as_posix()
        by_class.setdefault(label, []).append((sha256(str(HELD_OUT_SEED), os.fsencode(name).hex()), path))
    held_out = set()
    for members in by_class.values():
        count = max(1, round(len(members) / 10)) if len(members) > 1 else 0
        held_out |= {path for _, path in sorted(members)[:count]}
    return [path in held_out for path, _ in samples]


def read_images(paths, split, cache):
    """Returns the images in files, uint8 [N, 32, 32, 3], from the file `cache` where it holds just these.

    The cache is known by what `describe_file` says of the files and by its own checksum, and written anew where these
    differ. None stands for no cache.
    """
    listing = sha256(CODE_VERSION, version("pillow"), *map(describe_file, paths))
    if cache is not None:
        with contextlib.suppress(OSError, SafetensorError), safe_open(cache, framework="np") as file:
            images = file.get_tensor("images")
            if file.metadata() == {"listing": listing, "sha256": sha256(torch.from_numpy(images))}:
                return images
    with ThreadPoolExecutor() as pool:  # Pillow decodes outside Python's lock
        images = np.stack(list(tqdm(pool.map(read_image, paths), f"Reading {split} images", len(paths), leave=False)))
    if cache is not None and is_main_process():
        tensor = torch.from_numpy(images)
        with atomic_path(cache) as temporary:
            save_file({"images": tensor}, temporary, metadata={"listing": listing, "sha256": sha256(tensor)})
    return images


def describe_file(path):
    """Returns what changes with what is in a file: name, size, times, and its number, as two might trade places.

    Raises UserError where it cannot be read or its name is not UTF-8.
    """
    try:
        path.encode()
        stat = os.stat(path)  # noqa: PTH116, pathlib takes seconds for as many as there are
    except (OSError, UnicodeError) as error:
        raise UserError(f"{path!r} cannot be read ({first_line(error)}): remove or rename it") from error
    return f"{path} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} {stat.st_ino}"


# By the orientation in a photograph's EXIF, what turns it upright. ImageOps.exif_transpose, which would do that, also
# writes the EXIF anew, and fails where any tag of it is malformed.
TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}


def read_image(path):
    """Returns the image in a file as RGB, uint8 [32, 32, 3], upright, transparency over white.

    Raises UserError, naming the file, where it cannot be read.
    """
    from PIL import ExifTags, Image

    try:
        with Image.open(path) as image:
            image.draft("RGB", (2 * IMAGE_SIZE, 2 * IMAGE_SIZE))  # lets a large JPEG be decoded at a lower resolution
            if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
                raise ValueError("32 bits per pixel, of unknown range; save it with 8 or 16")
            image.load()  # turns a TIFF by itself
            if turn := TURNS.get(image.getexif().get(ExifTags.Base.Orientation)):
                image = image.transpose(Image.Transpose[turn])
            if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip to 8
                image = Image.fromarray((np.asarray(image).astype(np.float32) / 257).clip(0, 255).astype(np.uint8))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return np.asarray(image.convert("RGB").resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BILINEAR))
    except Exception as error:  # a damaged file can fail in any way
        raise UserError(
            f"{path} is not an image that can be read ({first_line(error)}): remove or replace it"
        ) from error


def generate_digits(dataset_dir, split, num_examples=None, cache_dir=None):
    """Draws the digits 0 to 9 in random colours, places, sizes and rotations over textured backgrounds.

    Image i of a split is the same whichever others are drawn; neither `dataset_dir` nor `cache_dir` is used.
    """
    chosen = draw_examples(NUM_SYNTHETIC[split], num_examples)
    seeds = [(*SYNTHETIC_SEEDS[split], index) for index in chosen.tolist()]
    images, labels = zip(*map(draw_digit, seeds), strict=True)
    return image_data(np.stack(images), torch.tensor(labels), [str(digit) for digit in range(10)])


def draw_digit(seed):
    """Returns one image, uint8 [32, 32, 3], and the digit it shows."""
    from PIL import Image, ImageDraw, ImageFont

    random = np.random.default_rng(seed)
    digit = int(random.integers(10))
    # Digit and background differ in brightness whatever their colours; which one is the brighter is random.
    colour, paper = random.permutation([random.integers(0, 115, size=3), random.integers(140, 256, size=3)])
    coarse = random.integers(256, size=(5, 5, 3), dtype=np.uint8)
    texture = np.asarray(Image.fromarray(coarse).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC))
    background = paper + (texture - 127.5) * 0.7 + random.normal(0, 15, texture.shape)

    canvas = Image.new("L", (2 * IMAGE_SIZE, 2 * IMAGE_SIZE))
    font = ImageFont.load_default(size=int(random.integers(18, 29)))
    ImageDraw.Draw(canvas).text((IMAGE_SIZE, IMAGE_SIZE), str(digit), fill=255, font=font, anchor="mm")
    canvas = canvas.rotate(random.uniform(-12, 12), Image.Resampling.BICUBIC)
    left, top = (IMAGE_SIZE // 2 + random.integers(-4, 5, size=2)).tolist()
    mask = np.asarray(canvas.crop((left, top, left + IMAGE_SIZE, top + IMAGE_SIZE)))[..., None] / 255
    return (background * (1 - mask) + colour * mask).clip(0, 255).astype(np.uint8), digit


def image_data(images, labels, class_names, paths=None):
    """Returns ImageData from images as Pillow and torchvision keep them, uint8 [N, 32, 32, 3]."""
    return ImageData(
        torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(),
        labels,
        list(class_names),
        [""] * len(labels) if paths is None else list(paths),
        torch.arange(len(labels)),
    )


LOADERS = {"cifar10": load_cifar10, "imagefolder": load_imagefolder, "synthetic": generate_digits}


# --------------------------------------------------------------------------------------------------
# Label corruption, and what was decided against it
# --------------------------------------------------------------------------------------------------


def corrupt_labels(labels, fraction, num_classes, seed=CORRUPTION_SEED):
    """Gives exactly round(fraction * N) randomly chosen examples a label drawn uniformly from the other classes.

    labels: int64 [N] on the CPU. Returns new labels, int64 [N], and is_corrupted, bool [N].
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(labels), generator=generator)[: round(fraction * len(labels))]
    shift = torch.randint(1, num_classes, (len(chosen),), generator=generator)
    labels, is_corrupted = labels.clone(), torch.zeros(len(labels), dtype=torch.bool)
    labels[chosen] = (labels[chosen] + shift) % num_classes
    is_corrupted[chosen] = True
    return labels, is_corrupted


@dataclass(frozen=True)
class Cleaning:
    """What --exclude_suspects, --corrections or --subset_fraction decided, by index among the loaded images."""

    excluded: list
    new_labels: dict  # label by index


def draw_subset(num_examples, fraction, seed):
    """Returns the Cleaning that leaves a random subset of round(fraction * N) examples, the same for the same seed.

    Subsets of different seeds, and the choice of corrupted labels, are independent of each other.
    """
    order = np.random.default_rng((SUBSET_SEED, seed)).permutation(num_examples)
    return Cleaning(sorted(order[round(fraction * num_examples) :].tolist()), {})


def training_examples(clean, fraction, cleaning=None):
    """Returns the examples to train on and is_corrupted, bool [N]: which labels were made wrong and still are.

    These are the images of `clean` with the labels that `--corrupt_percentage` stands for, less what a `cleaning`
    excludes, and with the labels that it gives.
    """
    labels, made_wrong = corrupt_labels(clean.labels, fraction or 0, len(clean.class_names))
    if cleaning is not None:
        labels[list(cleaning.new_labels)] = torch.tensor(list(cleaning.new_labels.values()), dtype=torch.int64)
    data = replace(clean, labels=labels).without(cleaning.excluded if cleaning else [])
    return data, made_wrong[data.indices] & (data.labels != clean.labels[data.indices])


# --------------------------------------------------------------------------------------------------
# Batches
# --------------------------------------------------------------------------------------------------

CHANNEL_MEAN, CHANNEL_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # of CIFAR-10's training images
CROP_PADDING = 4


def normalize(images):
    """Converts uint8 images [B, 3, 32, 32] to standardised float32, channels last in memory."""
    mean = torch.tensor(CHANNEL_MEAN, device=images.device).view(1, 3, 1, 1)
    std = torch.tensor(CHANNEL_STD, device=images.device).view(1, 3, 1, 1)
    return (images.to(torch.float32, memory_format=torch.channels_last) / 255 - mean) / std


def crop_and_flip(images, offsets, flips):
    """Shifts each image by its own offsets over a black border, and mirrors it where its flip says so.

    images: uint8 [B, 3, 32, 32]; offsets: int64 [B, 2], the crop's top and left in 0..8; flips: bool [B].
    """
    padded = F.pad(images, [CROP_PADDING] * 4)  # (B, 3, 40, 40)
    windows = padded.unfold(2, IMAGE_SIZE, 1).unfold(3, IMAGE_SIZE, 1)  # (B, 3, 9, 9, 32, 32), a view
    crops = windows[torch.arange(len(images), device=images.device), :, offsets[:, 0], offsets[:, 1]]
    return torch.where(flips.view(-1, 1, 1, 1), crops.flip(3), crops)


# --------------------------------------------------------------------------------------------------
# ResNet-9
# --------------------------------------------------------------------------------------------------


def conv_block(in_channels, out_channels, kernel_size=3, stride=1, padding=1):
    """Convolution without bias, batch-norm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


class Residual(nn.Sequential):
    """Adds its input to what its layers make of it."""

    def forward(self, x):
        return x + super().forward(x)


class ResNet9(nn.Module):
    """The 2.3 M parameter ResNet for 32x32 images. Logits leave it in float32, also under autocast."""

    def __init__(self, num_classes):
        super().__init__()
        self.features = nn.Sequential(
            conv_block(3, 64),
            conv_block(64, 128, kernel_size=5, stride=2, padding=2),
            Residual(conv_block(128, 128), conv_block(128, 128)),
            conv_block(128, 256),
            nn.MaxPool2d(2),
            Residual(conv_block(256, 256), conv_block(256, 256)),
            conv_block(256, 128, padding=0),
            nn.AdaptiveMaxPool2d(1),
            nn.Flatten(),
        )
        self.head = nn.Linear(128, num_classes, bias=False)

    def forward(self, images):  # (B, 3, 32, 32) -> (B, num_classes)
        features = self.features(images).to(self.head.weight.dtype)
        # Logits in bfloat16 would tie, and losses and margins with them.
        with torch.autocast(images.device.type, enabled=False):
            return 0.2 * self.head(features)


def construct_resnet9(num_classes=10):
    """Returns a ResNet-9 with random weights, channels last in memory."""
    return ResNet9(num_classes).to(memory_format=torch.channels_last)


@torch.no_grad()
def compute_logits(model, images, batch_size, dtype):
    """Returns the logits, float32 [N, num_classes], of uint8 images [N, 3, 32, 32], without augmentation."""
    model.eval()
    with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
        return torch.cat([model(normalize(batch)) for batch in images.split(batch_size)])


# --------------------------------------------------------------------------------------------------
# Files: whole or not at all, by one process at a time
# --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_path(path):
    """Yields a temporary path beside `path` that takes its place when the block succeeds, and vanishes otherwise."""
    path = Path(path)
    make_folder(path.parent)
    temporary = path.with_name(f".{secrets.token_hex(8)}.{path.name}")  # containers share folders, but not their pids
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def make_folder(path):
    """Creates a folder with its parents. Raises UserError where that is impossible."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path} cannot be made a folder ({error.strerror}): name another one") from error


HELD_LOCKS = []  # filelock gives up a lock that nothing refers to


def lock(path, waiting):
    """Takes the lock of `path`, a file or folder that this process is going to write, until the process ends.

    Where another process has it, prints the sentence `waiting` and waits; without one, raises UserError.
    """
    make_folder(path.parent)
    file_lock = FileLock(path.with_name(f".{path.name}.lock"), is_singleton=True)
    try:
        file_lock.acquire(timeout=0)
    except Timeout:
        if not waiting:
            raise UserError(f"another process is writing {path}: wait for it, or name another folder") from None
        print(waiting, flush=True)
        file_lock.acquire()
    except OSError as error:
        raise UserError(f"{path.parent} cannot be written to ({error.strerror}): name another folder") from error
    HELD_LOCKS.append(file_lock)


def sha256(*parts):
    """Returns the SHA-256, as hex digits, over tensors and strings in the order given."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part.detach().cpu().contiguous().numpy())
    return digest.hexdigest()


# What is computed into a file is reused by the same code only.
CODE_VERSION = sha256(Path(__file__).read_text(encoding="utf-8"), *map(version, ("torch", "kronfluence")))


# --------------------------------------------------------------------------------------------------
# Checkpoints
# --------------------------------------------------------------------------------------------------

RECIPE = ("train_batch_size", "learning_rate", "weight_decay", "num_train_epochs")


def recipe(flags):
    """Returns what defines a training but for images, labels and seed, from flags or the metadata of a checkpoint."""
    return {name: flags[name] for name in RECIPE}


def checkpoint_path(checkpoint_dir, fraction, kind=""):
    """Returns the path of the checkpoint trained with the corruption `fraction` (None or 0: labels as they are).

    `kind` is `cleaned` or `subset_<fraction>_<seed>` where it was trained on other examples than these.
    """
    name = f"model_corrupt_{fraction}" if fraction else "model"
    return Path(checkpoint_dir) / f"{name}{kind and '_'}{kind}.pth"


def save_checkpoint(path, model, metadata):
    """Writes weights and `metadata` (numbers, strings, lists, dicts) to `path`, whole or not at all.

    `metadata` must hold what `describe` says of the training data, the flags of train.py, and cleaning, dynamics,
    epoch_weights and accuracy, as that script makes them.
    """
    weights = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    content = io.BytesIO()  # so that a full disk fails as an OSError, not inside torch
    torch.save({"weights": weights, "metadata": metadata}, content)
    with atomic_path(path) as temporary:
        temporary.write_bytes(content.getbuffer())


def load_checkpoint(path, device="cpu"):
    """Returns the model in eval mode on `device`, and the metadata, of a checkpoint that train.py wrote.

    Of the metadata, `cleaning` becomes a Cleaning, or None.

    Raises UserError where there is none, or where the file is something else.
    """
    path = Path(path)
    if not path.is_file():
        others = sorted(other.name for other in path.parent.glob("model*.pth"))
        there = f", only {', '.join(others[:3])}{', …' * (len(others) > 3)}" if others else ""
        raise UserError(
            f"there is no checkpoint {path}{there}: run train.py with the same --checkpoint_dir, --dataset and "
            "--corrupt_percentage (and for --cleaned with --exclude_suspects or --corrections) first; "
            "--corrupt_percentage 0 takes model.pth"
        )
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        metadata = checkpoint["metadata"]
        if not metadata.keys() >= {"dynamics", "epoch_weights"}:
            raise ValueError("written by an earlier train.py")
        metadata["cleaning"] = metadata["cleaning"] and Cleaning(**metadata["cleaning"])
        model = construct_resnet9(len(metadata["class_names"]))
        model.load_state_dict(checkpoint["weights"])
    except OSError:
        raise
    except Exception as error:  # a foreign file can fail in any way
        raise UserError(
            f"{path} is not a whole checkpoint of train.py ({first_line(error):.100}): train again"
        ) from error
    return model.to(device, memory_format=torch.channels_last).eval(), metadata


def describe(data):
    """Returns what a checkpoint records of its training data."""
    return {
        "num_train": len(data),
        "class_names": data.class_names,
        "labels_sha256": sha256(data.labels),
        "images_sha256": sha256(data.images),
    }


def load_trained(path, device, clean, fraction):
    """Loads a checkpoint that was trained on `clean`, the training images with their true labels, ImageData.

    Prints which one it is. Returns model, metadata, the images as it was trained on them, ImageData, and is_corrupted
    [N]. Raises UserError where it was trained on others, or on other labels than these with `fraction` of them wrong.
    """
    model, metadata = load_checkpoint(path, device)
    try:
        data, is_corrupted = training_examples(clean, fraction, metadata["cleaning"])
        same = all(metadata[name] == value for name, value in describe(data).items())
    except IndexError:  # fewer images than there were
        same = False
    if not same:
        raise UserError(
            f"{path} was trained on other images or labels ({metadata['num_train']} of {metadata['dataset']}, "
            f"--corrupt_percentage {metadata['corrupt_percentage']}) than the {len(clean)} asked about: "
            "give the data flags it was trained with, or train again"
        )
    if is_main_process():
        wrong = f"{is_corrupted.sum()} with a wrong label"
        print(
            f"{path}: trained on {len(data)} images ({wrong}), test accuracy {100 * metadata['accuracy']['test']:.2f} %"
        )
    return model, metadata, data, is_corrupted


def fingerprint(model, data):
    """Returns 8 hex digits that change with any weight, training label or training image."""
    weights = [part for name, tensor in sorted(model.state_dict().items()) for part in (name, tensor)]
    return sha256(*weights, data.labels, data.images)[:8]


# --------------------------------------------------------------------------------------------------
# Influence: what is measured
# --------------------------------------------------------------------------------------------------


def margin(logits, labels):
    """Returns logit[label] - logsumexp(the other logits), [B]: the log-odds of the label."""
    label_logit = logits.gather(1, labels[:, None]).squeeze(1)
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return label_logit - others.logsumexp(1)


def top_margin(logits, labels):
    """Returns logit[label] - the largest of the other logits, [B] (Pleiss et al. 2020, section 3.1)."""
    label_logit = logits.gather(1, labels[:, None]).squeeze(1)
    return label_logit - logits.scatter(1, labels[:, None], -torch.inf).amax(1)


class ClassificationTask(Task):
    """Cross-entropy as training loss, and minus the margin as what influence is measured on.

    With that sign a positive score means: training on this image more would raise the query's margin.
    A batch is (images float [B, 3, 32, 32], labels int64 [B], uniforms float32 [B]).
    """

    def compute_train_loss(self, batch, model, sample=False):
        """Returns the summed cross-entropy, against labels drawn from the model's own distribution if `sample`.

        A pseudo-label is where the example's own uniform number falls in the cumulative distribution, so it
        depends neither on the batch it comes in nor on the process.
        """
        images, labels, uniforms = batch
        logits = model(images)
        if sample:
            cumulative = logits.detach().softmax(1).cumsum(1)  # (B, num_classes)
            labels = (cumulative < uniforms[:, None]).sum(1).clamp(max=logits.shape[1] - 1)
        return F.cross_entropy(logits, labels, reduction="sum")

    def compute_measurement(self, batch, model):
        """Returns minus the summed margin (Park et al. 2023, "TRAK", section 3.3, with the opposite sign)."""
        images, labels, _ = batch
        return -margin(model(images), labels).sum()


TRIM_INTERVAL = 16  # batches


class InfluenceDataset(torch.utils.data.Dataset):
    """ImageData as kronfluence takes it: whole batches by index, each example with its uniform random number."""

    def __init__(self, data, seed):
        self.data, self.num_batches = data, 0
        self.uniforms = torch.rand(len(data), generator=torch.Generator().manual_seed(seed)).to(data.labels.device)

    def __len__(self):
        return len(self.data)

    def __getitems__(self, indices):
        self.num_batches += 1
        if self.num_batches % TRIM_INTERVAL == 0:
            return_freed_memory()
        indices = torch.as_tensor(indices, device=self.data.labels.device)
        return normalize(self.data.images[indices]), self.data.labels[indices], self.uniforms[indices]


def whole_batch(batch):
    """The collate function for a data set that hands out whole batches."""
    return batch


# --------------------------------------------------------------------------------------------------
# Influence: per-sample gradients
#
# A layer with patches a [B, T, I] and output gradients g [B, T, O] (T positions) has the per-sample gradients
# G = sum_t g_t a_t^T, [B, O, I]. EKFAC (George et al. 2018, section 3) needs them in the eigenbasis Q_G, Q_A of the
# two covariances: Q_G^T G Q_A. kronfluence forms G and rotates it there and back; the trackers below form it where
# it is needed, multiply in the compute dtype and add up images and layers in float32. Forward and backward passes are
# float32, but for those that self-influence itself takes: rankings by pairwise scores do not survive bfloat16 ones.
# Whether a layer is rotated at all follows from the factors that the strategy loads: no eigenvectors (diagonal,
# identity), no rotation.
# --------------------------------------------------------------------------------------------------

CACHED_ELEMENTS = 2**20  # 4 MB in float32
SYMMETRIC_BLOCK = 256


def per_sample_gradient(a, g):
    """Returns G = sum_t g_t a_t^T, [B, O, I], of patches a [B, T, I] and output gradients g [B, T, O]."""
    return g.transpose(1, 2) @ a


def rotated_gradient(a, g, q_a, q_g):
    """Returns Q_G^T G Q_A, [B, O, I]; q_a [I, I] and q_g [O, O] hold eigenvectors in columns, None for no rotation."""
    if q_a is None:
        return per_sample_gradient(a, g)
    g = g @ q_g
    if a.shape[1] < g.shape[2]:  # T * I^2 multiplications for the patches, or O * I^2 for the gradient
        return per_sample_gradient(a @ q_a, g)
    return per_sample_gradient(a, g) @ q_a


def symmetric_product(rows):
    """Returns rows^T rows, [I, I], of rows [R, I]: the blocks from the diagonal on, and their mirror images."""
    product = rows.new_empty(rows.shape[1], rows.shape[1])
    for start in range(0, len(product), SYMMETRIC_BLOCK):
        end = start + SYMMETRIC_BLOCK
        torch.mm(rows[:, start:end].T, rows[:, start:], out=product[start:end, start:])
        product[end:, start:end] = product[start:end, end:].T
    return product


def patch_covariance(strips, height, stride, num_rows):
    """Returns the sum of a a^T over positions, [I, I], of patches a that are `height` strips one below the other.

    strips: [H, R, J], of each row of the images what the kernel's columns see at R = B*W' places; the patches of
    output row t are made of strips t*stride to t*stride + height - 1, so I = height * J. Block (i, j) of the sum is
    sum_t strips[t*stride + i]^T strips[t*stride + j] over t < num_rows: block (i - stride, j - stride), less the
    term of t = 0 there, plus the term of the last t here.
    """
    interleaved = [strips[start::stride].contiguous() for start in range(stride)]

    def strip_rows(i, first=0, count=num_rows):  # strip i of the patches of `count` output rows, [count*R, J]
        start = i // stride + first
        return interleaved[i % stride][start : start + count].flatten(0, 1)

    blocks = {}
    for i, j in itertools.combinations_with_replacement(range(height), 2):
        if i < stride:
            rows = strip_rows(i)
            blocks[i, j] = symmetric_product(rows) if i == j else rows.T @ strip_rows(j)
        else:
            first_term = strip_rows(i - stride, 0, 1).T @ strip_rows(j - stride, 0, 1)
            last_term = strip_rows(i, num_rows - 1, 1).T @ strip_rows(j, num_rows - 1, 1)
            blocks[i, j] = blocks[i - stride, j - stride] - first_term + last_term
        blocks[j, i] = blocks[i, j].T
    return torch.cat([torch.cat([blocks[i, j] for j in range(height)], 1) for i in range(height)])


@contextlib.contextmanager
def rounded_products(enabled):
    """Lets products of float32 matrices round their inputs, not their sums: to bfloat16 on a CPU, to TF32 on CUDA."""
    cpu, cuda = torch.backends.mkldnn.matmul, torch.backends.cuda.matmul
    before = cpu.fp32_precision, cuda.fp32_precision
    cpu.fp32_precision, cuda.fp32_precision = ("bf16", "tf32") if enabled else ("ieee", "ieee")
    try:
        yield
    finally:
        cpu.fp32_precision, cuda.fp32_precision = before


class BatchHooks:
    """Hands each batch's inputs [B, ...] and output gradients [B, T, O], in the compute dtype, to `update(inputs, g)`.

    A mixin for kronfluence's trackers; `compute_dtype` gets the dtype from a tracked module's arguments.
    """

    compute_dtype = attrgetter("score_args.per_sample_gradient_dtype")

    def register_hooks(self):
        def forward_hook(module, inputs, outputs):
            activation = inputs[0].detach()
            outputs.register_hook(lambda gradient: backward_hook(activation, gradient))

        @torch.no_grad()
        def backward_hook(activation, gradient):
            dtype = self.compute_dtype(self.module)
            g, _ = self.module.get_flattened_gradient(gradient.to(dtype))  # (B*T, O)
            self.update(activation.to(dtype), g.reshape(len(gradient), -1, g.shape[1]))

        self.registered_hooks.append(self.module.register_forward_hook(forward_hook))

    def patches(self, inputs):
        """Returns the patches [B, T, I] of a layer's inputs."""
        a, _ = self.module.get_flattened_activation(inputs)
        return a.view(len(inputs), -1, a.shape[1])

    def factor(self, name, like):
        """Returns a factor, moved once to the device (and dtype) of `like`; None where the strategy has none."""
        storage = self.module.storage
        if storage[name] is not None:
            storage[name] = storage[name].to(like)
        return storage[name]

    def eigenvectors(self, like):
        """Returns Q_A [I, I] and Q_G [O, O], or None twice."""
        return self.factor(ACTIVATION_EIGENVECTORS_NAME, like), self.factor(GRADIENT_EIGENVECTORS_NAME, like)

    def inverse_eigenvalues(self, like):
        """Returns 1 / (lambda + damping), [O, I] or [1, O, I], as kronfluence prepares it; None for the identity."""
        return self.factor(LAMBDA_MATRIX_NAME, like.device)

    def add(self, name, value):
        """Adds to a factor that is zero at first."""
        storage = self.module.storage
        storage[name] = value if storage[name] is None else storage[name].add_(value)


def accumulator(tensor):
    """Returns the tensor in the dtype that sums are kept in: float32, or float64 for a float64 model."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def squares(gradient):
    """Yields the squares of gradients [B, O, I] in the dtype of sums, on a CPU in parts that stay in its cache."""
    part = len(gradient) if gradient.is_cuda else max(1, CACHED_ELEMENTS // gradient[0].numel())
    for gradients in gradient.split(part):
        yield accumulator(gradients).square()


class CovarianceSums(BatchHooks, CovarianceTracker):
    """Sums a a^T and g g^T over examples and positions."""

    compute_dtype = attrgetter("factor_args.activation_covariance_dtype")

    def update(self, inputs, g):
        arguments = self.module.factor_args
        # EKFAC fits its eigenvalues anew; KFAC inverts the covariances, whose small ones rounding would drown.
        with rounded_products(arguments.strategy == "ekfac" and arguments.per_sample_gradient_dtype == torch.bfloat16):
            self.add(ACTIVATION_COVARIANCE_MATRIX_NAME, self.module.activation_covariance(inputs))
            self.add(GRADIENT_COVARIANCE_MATRIX_NAME, symmetric_product(g.flatten(0, 1)))
        for count in (NUM_ACTIVATION_COVARIANCE_PROCESSED, NUM_GRADIENT_COVARIANCE_PROCESSED):
            self.add(count, torch.tensor([g.shape[0] * g.shape[1]]))


class LambdaSums(BatchHooks, LambdaTracker):
    """Sums the squares of the rotated per-sample gradients over examples: EKFAC's eigenvalues times N."""

    compute_dtype = attrgetter("factor_args.per_sample_gradient_dtype")

    def update(self, inputs, g):
        gradient = rotated_gradient(self.patches(inputs), g, *self.eigenvectors(g))
        for squared in squares(gradient):
            self.add(LAMBDA_MATRIX_NAME, squared.sum(0))
        self.add(NUM_LAMBDA_PROCESSED, torch.tensor([len(gradient)]))


class SelfInfluence(BatchHooks, SelfScoreTracker):
    """G^T H^-1 G of each example: the squared rotated gradient, weighted by 1 / (lambda + damping)."""

    def update(self, inputs, g):
        gradient = rotated_gradient(self.patches(inputs), g, *self.eigenvectors(g))
        weights = self.inverse_eigenvalues(g)
        self.module.storage[SELF_SCORE_VECTOR_NAME] = torch.cat(
            [
                squared.sum((1, 2)) if weights is None else squared.flatten(1) @ weights.flatten()
                for squared in squares(gradient)
            ]
        )


class PreconditionedQuery(BatchHooks, PreconditionTracker):
    """H^-1 G of each query, rotated back, [Q, O, I], so that no training gradient needs a rotation."""

    def update(self, inputs, g):
        q_a, q_g = self.eigenvectors(g)
        gradient = rotated_gradient(self.patches(inputs), g, q_a, q_g)
        weights = self.inverse_eigenvalues(g)
        if weights is not None:
            gradient.mul_(weights)
        if q_a is not None:
            gradient = q_g @ gradient @ q_a.T
        self.module.storage[PRECONDITIONED_GRADIENT_NAME] = gradient

    def accumulate_iterations(self):
        """Keeps the batches of queries in a list: joining each to those before would copy and hold them all twice."""
        storage = self.module.storage
        held = storage[ACCUMULATED_PRECONDITIONED_GRADIENT_NAME] or []
        storage[ACCUMULATED_PRECONDITIONED_GRADIENT_NAME] = [*held, storage[PRECONDITIONED_GRADIENT_NAME]]
        storage[PRECONDITIONED_GRADIENT_NAME] = None


class PairwiseInfluence(BatchHooks, PairwiseScoreTracker):
    """Dot products [Q, B] of the preconditioned queries with the per-sample gradients: a matrix product per batch."""

    def update(self, inputs, g):
        gradient = per_sample_gradient(self.patches(inputs), g).flatten(1)  # (B, O*I)
        queries = self.module.storage[ACCUMULATED_PRECONDITIONED_GRADIENT_NAME]  # a list of (Q', O, I)
        scores = torch.cat([batch.flatten(1) @ gradient.T for batch in queries])
        self.module.storage[PAIRWISE_SCORE_MATRIX_NAME] = accumulator(scores)


class EigenbasisTrackers:
    """A mixin that gives kronfluence's tracked modules the trackers above, and KFAC no negative eigenvalues."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._trackers |= {
            ModuleMode.COVARIANCE: CovarianceSums(self),
            ModuleMode.LAMBDA: LambdaSums(self),
            ModuleMode.SELF_SCORE: SelfInfluence(self),
            ModuleMode.PRECONDITION_GRADIENT: PreconditionedQuery(self),
            ModuleMode.PAIRWISE_SCORE: PairwiseInfluence(self),
        }

    def prepare_storage(self, device):
        """Has kronfluence prepare the factors, with KFAC's eigenvalues that rounding left below zero at zero."""
        for name in (ACTIVATION_EIGENVALUES_NAME, GRADIENT_EIGENVALUES_NAME):
            if self.storage[name] is not None:
                self.storage[name].clamp_(min=0)
        super().prepare_storage(device)

    def activation_covariance(self, inputs):
        """Returns the sum of a a^T, [I, I], over the patches of a layer's inputs."""
        patches, _ = self.get_flattened_activation(inputs)
        return symmetric_product(patches)


class EigenbasisConv2d(EigenbasisTrackers, TrackedConv2d):
    """A convolution, neither dilated nor grouped, that kronfluence tracks by the trackers above.

    Patches, and with them the factors, are ordered (row, column, channel), not (channel, row, column) as
    kronfluence's are: so they are copied in runs of channels from images that are channels last in memory.
    """

    def padded(self, images):
        """Returns images [B, C, H, W] with their padding, channels last: [B, H, W, C]."""
        top, left = self.original_module.padding
        return F.pad(images.permute(0, 2, 3, 1), (0, 0, left, left, top, top))

    def get_flattened_activation(self, input_activation):
        """Returns the patches [B*T, I] of images [B, C, H, W], with a column of ones for a bias; and B*T."""
        layer = self.original_module
        (height, width), (stride, column_stride) = layer.kernel_size, layer.stride
        images = self.padded(input_activation)
        patches = images.unfold(1, height, stride).unfold(2, width, column_stride)  # (B, H', W', C, height, width)
        patches = patches.permute(0, 1, 2, 4, 5, 3).reshape(-1, height * width * images.shape[3])
        if layer.bias is not None:
            patches = F.pad(patches, (0, 1), value=1)
        return patches, len(patches)

    def activation_covariance(self, inputs):
        """Returns the sum of a a^T, [I, I], over the patches of images, which are not copied out for it."""
        layer = self.original_module
        if layer.bias is not None:
            return super().activation_covariance(inputs)
        (height, width), (stride, column_stride) = layer.kernel_size, layer.stride
        images = self.padded(inputs).transpose(0, 1)  # (H, B, W, C)
        strips = images.unfold(2, width, column_stride).transpose(3, 4)  # (H, B, W', width, C), a view
        strips = strips.reshape(len(images), -1, width * images.shape[3])
        return patch_covariance(strips, height, stride, (len(images) - height) // stride + 1)


class EigenbasisLinear(EigenbasisTrackers, TrackedLinear):
    """A linear layer that kronfluence tracks by the trackers above."""


# --------------------------------------------------------------------------------------------------
# Influence: factors and scores
# --------------------------------------------------------------------------------------------------

CPU_QUERY_BYTES = 2 * 2**30  # keeps a run on the CPU below 6 GB
QUERY_CHUNK = 50  # queries per backward pass; --query_batch_size says of how many the gradients are held

# The files of each stage. kronfluence reads the arguments again when it computes scores.
STAGE_FILES = {
    "covariance": ("*covariance*.safetensors",),
    "eigendecomposition": ("*eigen*.safetensors",),
    "lambda": ("*lambda*.safetensors", "factor_arguments.json"),
    "scores": ("*_scores.safetensors",),
}


class InfluenceRun:
    """kronfluence's Analyzer on one checkpoint and data set, with results that are reused only where they belong.

    Everything lies in `folder`, `<output_dir>/<checkpoint name>-<fingerprint>`, whose lock this process keeps until it
    ends. `model`, on the device of `data`, stays as it is. Factors are fitted on all of `data`, or on `factor_examples`
    of them, drawn at random; `dtype` is that of per-sample gradients, and of the passes that self-influence takes
    itself, `seed` that of the pseudo-labels. `batch_size` images are taken at a time, by default 64 on a CPU and 1,024
    on CUDA. `phases` gets the times, and with `profile` kronfluence keeps a table of its own. Raises UserError where
    there are fewer images than `factor_examples`.
    """

    def __init__(
        self,
        model,
        data,
        name,
        *,
        output_dir,
        strategy,
        dtype,
        seed,
        phases,
        batch_size=None,
        profile=False,
        factor_examples=None,
    ):
        if factor_examples is not None and factor_examples > len(data):
            raise UserError(f"--factor_examples {factor_examples}: there are only {len(data)} training images")
        TrackedModule.SUPPORTED_MODULES |= {nn.Conv2d: EigenbasisConv2d, nn.Linear: EigenbasisLinear}
        spare_what_was_imported()
        device = data.images.device
        self.folder = Path(output_dir) / f"{name}-{fingerprint(model, data)}"
        self.dataset = self.factor_dataset = InfluenceDataset(data, seed)
        layers = [module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
        self.gradient_bytes = sum(layer.weight.numel() for layer in layers) * dtype.itemsize
        self.strategy, self.dtype, self.seed, self.phases = strategy, dtype, seed, phases
        self.sums_dtype = torch.promote_types(dtype, torch.float32)
        self.batch_size = batch_size or (1024 if device.type == "cuda" else 64)
        self.factors_name = f"{strategy}-{str(dtype).removeprefix('torch.')}-seed{seed}"
        if factor_examples is not None:
            chosen = torch.randperm(len(data), generator=torch.Generator().manual_seed(FACTORS_SEED))[:factor_examples]
            self.factor_dataset = torch.utils.data.Subset(self.dataset, chosen.tolist())
            self.factors_name += f"-of{factor_examples}"
        if is_main_process():
            # Under torchrun the others would not wait, and NCCL gives up after ten minutes.
            waiting = f"Waiting for another process that writes {self.folder}" if num_processes() == 1 else None
            lock(self.folder, waiting)
        self.analyzer = Analyzer(
            analysis_name=self.folder.name,
            model=prepare_model(copy.deepcopy(model), ClassificationTask()),
            task=ClassificationTask(),
            cpu=device.type == "cpu",
            profile=profile,
            output_dir=str(output_dir),
        )
        self.analyzer.set_dataloader_kwargs(DataLoaderKwargs(collate_fn=whole_batch))

    def path(self, name, suffix):
        """Returns the path of a result file of this strategy, `<folder>/<name>_<strategy>.<suffix>`."""
        return result_path(self.folder, name, self.strategy, suffix)

    def stage(self, phase, folder, upstream, compute, **arguments):
        """Calls `compute(**arguments)`, which writes files into `folder`, unless an earlier run's are there unharmed.

        `upstream` is the hash that the stage before returned. Files are reused only where it is unchanged and their
        sizes and checksums still are what was recorded once they had been written. Returns the hash of that record.
        Under torchrun all processes compute, and the first one decides, checks and records.
        """
        record_path = folder / f"{phase}.complete.json"
        with self.phases(phase):
            record = None
            if is_main_process():
                record = intact_record(record_path, stage_files(folder, phase))
                if record is not None and record["upstream"] != upstream:
                    record = None
            record = self.from_main_process(record)
            if record is not None:
                if is_main_process() and any(name.endswith(".safetensors") for name in record["files"]):
                    print(f"Reusing the {phase} in {folder}")
                return sha256(json.dumps(record))
            if is_main_process():
                for path in [record_path, *stage_files(folder, phase)]:
                    path.unlink(missing_ok=True)
            self.analyzer.state.wait_for_everyone()
            if not self.analyzer.state.use_distributed:  # there, the other processes would go on without this one
                compute = partial(with_smaller_batches, compute)
            compute(overwrite_output_dir=True, **arguments)
            self.analyzer.state.wait_for_everyone()
            require_finite(phase, stage_files(folder, phase))
            if is_main_process():
                record = {
                    "code": CODE_VERSION,
                    "upstream": upstream,
                    "files": file_checksums(stage_files(folder, phase)),
                }
                write_json(record_path, record)
            return sha256(json.dumps(self.from_main_process(record)))

    def from_main_process(self, value):
        """Returns the first process's `value` in every process."""
        if not self.analyzer.state.use_distributed:
            return value
        values = [value]
        torch.distributed.broadcast_object_list(values, device=self.analyzer.state.device)
        return values[0]

    def fit_factors(self):
        """Fits what the strategy needs: covariances, their eigendecomposition, lambda. Returns the last one's hash."""
        factor_args = FactorArguments(
            strategy=self.strategy,
            covariance_max_examples=None,
            lambda_max_examples=None,
            activation_covariance_dtype=self.sums_dtype,
            per_sample_gradient_dtype=self.dtype,
        )
        common = {"factors_name": self.factors_name, "factor_args": factor_args}
        fitting = common | {"dataset": self.factor_dataset, "per_device_batch_size": self.batch_size}
        analyzer = self.analyzer
        folder = self.folder / analyzer.factors_output_dir(self.factors_name).name
        fitted = self.stage("covariance", folder, None, analyzer.fit_covariance_matrices, **fitting)
        fitted = self.stage("eigendecomposition", folder, fitted, analyzer.perform_eigendecomposition, **common)
        return self.stage("lambda", folder, fitted, analyzer.fit_lambda_matrices, **fitting)

    def self_influence(self, damping_factor):
        """Returns the self-influence of every training image, float32 [num_train], and the file that holds it.

        Raises NumericalError where a score is not a number.
        """
        amp_dtype = self.dtype if self.dtype == torch.bfloat16 else None
        return self.scores("self", self.analyzer.compute_self_scores, damping_factor, {}, amp_dtype=amp_dtype)

    def pairwise_influence(self, query_data, query_batch_size, damping_factor):
        """Returns the influence of each training image on each query, float32 [num_query, num_train], and the file.

        `query_batch_size` preconditioned query gradients (9 MB each in float32) are held at a time, fewer where they
        would fill a computer's memory; the training gradients are formed anew for every such batch. Raises
        NumericalError where a score is not a number.
        """
        if not query_data.images.is_cuda:
            query_batch_size = min(query_batch_size, max(1, CPU_QUERY_BYTES // self.gradient_bytes))
        held = max(1, query_batch_size // self.analyzer.state.num_processes)  # each process gets the others' too
        steps = math.ceil(held / QUERY_CHUNK)
        chunk = min(held // steps, len(query_data))
        arguments = {"query_dataset": InfluenceDataset(query_data, self.seed), "per_device_query_batch_size": chunk}
        return self.scores(
            pairwise_kind(query_data),
            self.analyzer.compute_pairwise_scores,
            damping_factor,
            arguments,
            query_gradient_accumulation_steps=steps,
        )

    def finished_pairwise(self, query_data):
        """Yields name and unharmed scores of all pairwise runs on these queries, by whatever strategy and settings."""
        start = f"scores_{pairwise_kind(query_data)}-"
        for folder in sorted(self.folder.glob(f"{start}*")):
            files = stage_files(folder, "scores")
            if intact_record(folder / "scores.complete.json", files) is not None:
                yield f"{self.folder.name} {folder.name.removeprefix(start)}", load_file(files[0])[ALL_MODULE_NAME]

    def scores(self, kind, compute, damping_factor, arguments, **score_arguments):
        """Computes or reuses the scores of one `kind`, by kronfluence's `compute`.

        Returns them, float32, in the shape of that kind, and the file that holds them.
        """
        fitted = self.fit_factors()
        if self.strategy == "identity":  # has nothing to damp: one result, whatever the damping
            damping_factor = 0.0
        damping_name = "heuristic" if damping_factor is None else damping_factor
        scores_name = f"{kind}-{self.factors_name}-damping-{damping_name}"
        folder = self.folder / self.analyzer.scores_output_dir(scores_name).name
        self.stage(
            "scores",
            folder,
            fitted,
            compute,
            scores_name=scores_name,
            factors_name=self.factors_name,
            train_dataset=self.dataset,
            per_device_train_batch_size=self.batch_size,
            score_args=ScoreArguments(
                damping_factor=damping_factor,
                per_sample_gradient_dtype=self.dtype,
                precondition_dtype=self.sums_dtype,
                **score_arguments,
            ),
            **arguments,
        )
        (path,) = stage_files(folder, "scores")
        return load_file(path)[ALL_MODULE_NAME], path

    def report_profile(self):
        """Prints and saves kronfluence's table of time per phase, if this run was asked to take it."""
        if table := self.analyzer.profiler.summary():
            with atomic_path(self.path("profile", "txt")) as temporary:
                temporary.write_text(table)
            print(table)


def result_path(folder, name, strategy, suffix):
    """Returns the path of a result file of a strategy."""
    return folder / f"{name}_{strategy}.{suffix}"


def pairwise_kind(query_data):
    """Returns what the scores on these queries are called."""
    return f"pairwise-{len(query_data)}-{sha256(query_data.images, query_data.labels)[:8]}"


def with_smaller_batches(compute, **arguments):
    """Calls `compute(**arguments)`, and again with every batch size halved when CUDA runs out of memory."""
    while True:
        try:
            return compute(**arguments)
        except torch.OutOfMemoryError:
            sizes = {name: size for name, size in arguments.items() if name.endswith("batch_size")}
            if max(sizes.values(), default=1) == 1:
                raise
            arguments |= {name: max(1, size // 2) for name, size in sizes.items()}
        torch.cuda.empty_cache()
        print("Out of GPU memory; going on with batches of half the size")


def require_finite(phase, paths):
    """Raises NumericalError, naming phase and layer, where a safetensors file holds a NaN or an infinity."""
    for path in (path for path in paths if path.suffix == ".safetensors"):
        with safe_open(path, framework="pt") as tensors:
            for layer in tensors.keys():  # noqa: SIM118, it is no dictionary
                if not tensors.get_tensor(layer).isfinite().all():
                    raise NumericalError(
                        f"NaN or infinity in the phase '{phase}' ({path.stem} of {layer}): the training has probably "
                        "diverged (lower its --learning_rate), or another --damping_factor is needed"
                    )


def stage_files(folder, phase):
    """Returns the paths in `folder` that belong to the stage of a phase, sorted."""
    return sorted(path for pattern in STAGE_FILES[phase] for path in folder.glob(pattern))


def intact_record(record_path, paths):
    """Returns the record of a stage that this code finished and whose files are unharmed, else None.

    Says which files are damaged, or that they are of another version of the code, if there is a record of them.
    """
    try:
        record = json.loads(record_path.read_text())
        if record["code"] != CODE_VERSION:
            print(f"Not using what another version of the code or its libraries computed in {record_path.parent}")
            return None
        expected, found = record["files"], file_checksums(paths)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    damaged = sorted(name for name in expected | found if expected.get(name) != found.get(name))
    if damaged:
        print(f"Not using what is damaged in {record_path.parent}: {', '.join(damaged)}")
    return None if damaged else record


def file_checksums(paths):
    """Returns size and SHA-256 of files, by name."""
    checksums = {}
    for path in paths:
        with path.open("rb") as file:
            checksums[path.name] = [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]
    return checksums


# --------------------------------------------------------------------------------------------------
# Results
# --------------------------------------------------------------------------------------------------


def ranks(scores):
    """Returns the place of each score [N] among the N, 1 for the lowest; equal scores share the mean of theirs."""
    _, group, sizes = np.unique(scores, return_inverse=True, return_counts=True)
    return (np.cumsum(sizes) - (sizes - 1) / 2)[group]


class Phases:
    """Wall-clock seconds by phase: `with phases("load"): ...`; phases of the same name add up."""

    def __init__(self):
        names = ("load", "covariance", "eigendecomposition", "lambda", "scores", "report")
        self.seconds = dict.fromkeys(names, 0.0)
        self.start = time.perf_counter()

    @contextlib.contextmanager
    def __call__(self, name):
        start = time.perf_counter()
        yield
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self.seconds[name] += time.perf_counter() - start

    def summary(self):
        """Returns the seconds by phase, and `total` since construction, to a millisecond."""
        seconds = self.seconds | {"total": time.perf_counter() - self.start}
        return {name: round(value, 3) for name, value in seconds.items()}


def peak_memory_bytes(device):
    """Returns the peak of allocated CUDA memory, or of the process's resident memory on a CPU (None on Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return None
    # In kilobytes on Linux, in bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def environment(device):
    """Returns what a figure depends on beside the code: hardware and versions."""
    cpu_name = torch.cpu.get_capabilities().get("cpu_name") or platform.machine()
    versions = {"torch": str(torch.__version__)} | {package: version(package) for package in ("kronfluence", "numpy")}
    return {
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name,
        "cpu_threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version()} | versions,
    }


def run_record(phases, device):
    """Returns what both json files say of the run itself: seconds by phase, peak memory, hardware, versions."""
    return {"seconds": phases.summary(), "peak_memory_bytes": peak_memory_bytes(device), **environment(device)}


def report_files(score_paths, paths, phases):
    """Prints the seconds by phase and where scores, and those of the files `paths` that exist, are."""
    seconds = phases.summary()
    total = seconds.pop("total")
    print(f"{total:.1f} s in all: " + ", ".join(f"{name} {value:.1f}" for name, value in seconds.items()))
    for path in score_paths:
        print(f"scores in {path}")
    for path in paths:
        if path.exists():
            print(f"wrote {path}")


def write_json(path, content):
    """Writes `content` to a json file, whole or not at all; NaN is refused."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")


def pyplot():
    """Imports matplotlib's pyplot for drawing into files, in any script of which a font is installed."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import font_manager
    from matplotlib import pyplot as plt

    installed = {font.name for font in font_manager.fontManager.ttflist}
    plt.rcParams["font.family"] = ["DejaVu Sans", *sorted(name for name in installed if "CJK" in name or "Uni" in name)]
    plt.rcParams["text.parse_math"] = False  # a dollar sign in the name of a class is a dollar sign
    return plt


def save_figure(figure, path):
    """Writes a matplotlib figure to a png file, whole or not at all, and closes it."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150, bbox_inches="tight")
    pyplot().close(figure)


def show_image(axes, image, title, colour="black"):
    """Draws one uint8 image [3, 32, 32] without ticks, under a small title."""
    axes.imshow(image.permute(1, 2, 0).cpu().numpy(), interpolation="nearest")
    axes.set_title(title, fontsize=8, color=colour, pad=3)
    axes.set_xticks([])
    axes.set_yticks([])


def shorten(name):
    """Returns a name of at most 16 characters: both ends of a longer one, since either may tell it apart."""
    return name if len(name) <= 16 else f"{name[:8]}…{name[-7:]}"


def data_name(dataset, dataset_dir):
    """Returns what a picture's title calls a `--dataset`."""
    return {"cifar10": "CIFAR-10", "synthetic": "synthetic digits"}.get(dataset) or Path(dataset_dir).resolve().name
