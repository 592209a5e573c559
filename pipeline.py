"""What train.py, analyze.py and detect_mislabeled_dataset.py share, in the order data meets it.

Command line ► files ► images and labels ► label corruption and cleaning ► csv files ► networks ►
code that scores depend on ► checkpoints ► influence ► results.
"""
# ruff: noqa: E402 (SOURCE is read before the imports that take seconds)

import argparse
import ast
import contextlib
import copy
import csv
import ctypes
import hashlib
import io
import itertools
import json
import math
import os
import platform
import re
import secrets
import shlex
import shutil
import stat
import sys
import time
import types
import unicodedata
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from importlib.metadata import version
from operator import itemgetter
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote

# The text of this file when it is imported, since the file may be edited during a run. It serves
# the cache of decoded images, which depends on the code that reads them (`code_of`). It is None
# if there is only compiled code; `run` refuses that.
SOURCE = __spec__.loader.get_source(__name__)

import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.module.tracked_module import ModuleMode, TrackedModule
from kronfluence.module.tracker.factor import CovarianceTracker, LambdaTracker
from kronfluence.module.tracker.pairwise_score import PairwiseScoreTracker
from kronfluence.module.tracker.precondition import PreconditionTracker
from kronfluence.module.tracker.self_score import SelfScoreTracker
from kronfluence.task import Task
from kronfluence.utils import constants
from kronfluence.utils.dataset import DataLoaderKwargs, find_executable_batch_size
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

# ---- Command line --------------------------------------------------------------------------------

STRATEGIES = ("ekfac", "kfac", "diagonal", "identity")
NO_INFLUENCE = "none"  # used in place of a strategy: no influence is computed
CHECKPOINT_DIR = "./checkpoints"
# Parts of the messages by which torch reports that memory is full, and kronfluence that a batch of
# a single image did not fit.
FULL_MEMORY = (
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "DefaultCPUAllocator",
    "No executable batch size",
)
# Options of glibc's mallopt, as its malloc.h numbers them.
M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4
LARGEST_C_INT = 2**31 - 1


class UserError(Exception):
    """A mistake that only the user can correct. Its text is one sentence that states what to do."""

    status = 2


class NumericalError(UserError):
    """A NaN or an infinity. Its text is one sentence: where it arose, and what to do."""

    status = 1


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, and whose help shows the flags in groups."""

    def __init__(self, **settings):
        super().__init__(**settings)
        titles = ("data", "model", "curvature", "training", "report")  # in the order of --help
        self.groups = {title: self.add_argument_group(title) for title in titles}

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def run(main):
    """Calls `main`, and prints an expected failure as one line on standard error.

    Exit status: 2 for a mistake of the user, 130 for Ctrl-C, 1 for a failure of the machine or NaN.
    """
    prepare_process()
    try:
        if SOURCE is None:
            raise UserError("there is only compiled code: add the .py files beside it")
        return main()
    except UserError as error:
        status = error.status
        message = f"error: {error}"
    except KeyboardInterrupt:
        status = 130
        message = "interrupted; no file is half-written, so run the same command again"
    except (OSError, SafetensorError) as error:  # a full disk, a file that may not be written
        status = 1
        message = f"error: {first_line(error)}; the results of earlier runs are complete"
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        status = 1
        message = "error: out of memory: free some, lower the batch sizes, or use --device cpu"
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(status)


def prepare_process():
    """Sets warnings, the console's encoding and the memory allocator of this process."""
    # kronfluence constructs a GradScaler by its deprecated name, even if scaling is off.
    warnings.filterwarnings("ignore", message=r".*GradScaler")
    with contextlib.suppress(AttributeError):  # the output stream of a notebook has no reconfigure
        # File names may contain letters that the console's encoding lacks.
        sys.stdout.reconfigure(errors="backslashreplace")
    # With these options glibc keeps freed memory, which saves 3 to 16 % of the time on AVX2.
    with contextlib.suppress(AttributeError, TypeError):  # other C libraries have no mallopt
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, LARGEST_C_INT)


def is_out_of_memory(error):
    """Returns whether an exception was raised because memory is full."""
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in FULL_MEMORY)


def first_line(error):
    """Returns the first line of an exception's text, or its type if it has no text."""
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__


def number(kind, description, allowed):
    """Returns an argparse type that accepts a text if `allowed(kind(text))` is true.

    For any other text, argparse reports that it is not `description`.
    """

    def parse(text):
        try:
            value = kind(text)
            is_allowed = allowed(value)
        except ValueError:
            is_allowed = False
        if not is_allowed:
            raise argparse.ArgumentTypeError(f"'{text}' is not {description}")
        return value

    return parse


def number_or_word(parse, word):
    """Returns an argparse type that accepts `word`, and every text that the type `parse` accepts.

    The value is `word` itself, or what `parse` returns.
    """

    def parse_or_word(text):
        if text == word:
            return word
        try:
            return parse(text)
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentTypeError(f"{error}, nor '{word}'") from error

    return parse_or_word


positive_int = number(
    int, "a whole number of at least 1 and below 2**31", lambda value: 1 <= value < 2**31
)
whole_number = number(
    int, "a whole number of at least 0 and below 2**32", lambda value: 0 <= value < 2**32
)
non_negative_float = number(float, "a number of at least 0", lambda value: 0 <= value < math.inf)
corrupt_fraction = number(
    float, "a fraction below 1, such as 0.1 (0 means none)", lambda value: 0 <= value < 1
)


def shared_parser(docstring):
    """Returns a parser with the flags that all scripts share.

    docstring: the module docstring of a script, or None, as under `python -OO`.
    """
    description = docstring.partition("\n")[0] if docstring else None
    parser = OneLineParser(description=description, allow_abbrev=False)
    add_data_flags(parser.groups["data"])
    model = parser.groups["model"]
    model.add_argument(
        "--model",
        choices=MODELS,
        default="resnet9",
        help="network architecture (default: %(default)s)",
    )
    model.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16"),
        default="auto",
        help="number format of the computation; auto: bfloat16 if the device is fast at it, "
        "else float32 (default: %(default)s)",
    )
    model.add_argument(
        "--device",
        choices=("auto", "cuda", "cpu"),
        default="auto",
        help="device to compute on; auto: a GPU is used if one is available (default: %(default)s)",
    )
    parser.groups["report"].add_argument(
        "--output_dir",
        default="./influence_results",
        metavar="DIR",
        help="directory for results and for cached images (default: %(default)s)",
    )
    return parser


def add_data_flags(group):
    """Adds the flags that choose images and labels, the same in every script."""
    group.add_argument(
        "--dataset",
        choices=LOADERS,
        default="cifar10",
        help="data set to train on: cifar10 is downloaded once; imagefolder means your own images, "
        "one folder per class; synthetic means generated digits (default: %(default)s)",
    )
    group.add_argument(
        "--dataset_dir",
        default="./data",
        metavar="DIR",
        help="directory of the data set; for imagefolder, the directory that contains train/ and, "
        "optionally, test/ (default: %(default)s)",
    )
    group.add_argument(
        "--num_train_examples",
        type=positive_int,
        metavar="N",
        help="use N randomly drawn training images, the same ones in every script (default: all)",
    )
    labels = group.add_mutually_exclusive_group()
    labels.add_argument(
        "--corrupt_percentage",
        type=corrupt_fraction,
        default=0.0,
        metavar="FRACTION",
        help="fraction of the training labels to corrupt, such as 0.1 (default: 0)",
    )
    labels.add_argument(
        "--noisy_labels",
        metavar="CSV",
        help="file with the labels to train on: columns label, and path or index, which is the "
        "position in the whole data set, from 0 (default: the labels of the data set)",
    )


def influence_parser(docstring, strategies=STRATEGIES):
    """Returns a parser with the flags that analyze.py and detect_mislabeled_dataset.py share."""
    parser = shared_parser(docstring)
    model = parser.groups["model"]
    model.add_argument(
        "--checkpoint_dir",
        nargs="+",
        default=[CHECKPOINT_DIR],
        metavar="DIR",
        help="directory of the trained model; the scores of several models are averaged "
        f"(default: {CHECKPOINT_DIR})",
    )
    model.add_argument(
        "--cleaned",
        action="store_true",
        help="use the model that was trained with corrections",
    )
    model.add_argument(
        "--train_batch_size",
        type=positive_int,
        metavar="N",
        help="training images per step (default: 64, on a GPU 1024)",
    )
    add_curvature_flags(parser.groups["curvature"], strategies)
    return parser


def add_curvature_flags(group, strategies):
    """Adds the flags that choose how the curvature of the loss is approximated."""
    group.add_argument(
        "--factor_strategy",
        choices=strategies,
        default="ekfac",
        help="approximation of the curvature (default: %(default)s)",
    )
    group.add_argument(
        "--factor_examples",
        type=number_or_word(positive_int, "all"),
        default="all",
        metavar="N",
        help="fit the curvature on N random training images, or on all (default: %(default)s)",
    )
    group.add_argument(
        "--damping_factor",
        type=number_or_word(non_negative_float, "heuristic"),
        default="heuristic",
        metavar="X",
        help="number added to each eigenvalue of the curvature; heuristic: a tenth of the layer's "
        "mean eigenvalue (default: %(default)s)",
    )
    group.add_argument(
        "--seed",
        type=whole_number,
        default=1004,
        help="seed of the pseudo-labels that estimate the Fisher matrix (default: %(default)s)",
    )


def command(script, args, **values):
    """Returns the command that runs a script with the shared flags of `args` and other `values`.

    The command omits a flag whose value is its default, None or False.
    """
    shared = vars(shared_parser("").parse_args([]))
    defaults = {**shared, "checkpoint_dir": CHECKPOINT_DIR}
    flags = {name: getattr(args, name) for name in shared}
    flags.update(values)
    words = ["python", script]
    for name, value in flags.items():
        if value is None or value is False or value == defaults.get(name):
            continue
        words.append(f"--{name}")
        if value is not True:
            words.append(str(value))
    return shlex.join(words)


def number_of_processes():
    """Returns how many processes compute together: more than one under torchrun."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def is_main_process():
    """Returns whether this process prints and writes: the first process under torchrun."""
    return number_of_processes() == 1 or int(os.environ.get("RANK") or 0) == 0


def choose_device(name, several_processes):
    """Returns the torch device for a `--device` value: under torchrun, each process's own GPU.

    several_processes: whether the script can share its work between processes. Raises UserError for
    `cuda` without a usable GPU. Several processes also raise it if the script cannot share its
    work, or if a process lacks its own GPU: kronfluence sums over processes on CUDA only.
    """
    if name == "cuda" and not torch.cuda.is_available():
        reason = unusable_gpu() or "there is no NVIDIA GPU here"
        raise UserError(f"argument --device: {reason}; use cpu or auto")
    on_gpu = name != "cpu" and torch.cuda.is_available()
    count = number_of_processes()
    if count > 1 and not (on_gpu and several_processes):
        what = "this script" if on_gpu else "a run on the CPU"
        raise UserError(
            f"WORLD_SIZE is {count}, but {what} uses one process only: start it without torchrun"
        )
    local_rank = os.environ.get("LOCAL_RANK")  # torchrun sets it: which GPU the process may use
    has_own_gpu = bool(local_rank) and int(local_rank) < torch.cuda.device_count()
    if count > 1 and not has_own_gpu:
        raise UserError(
            "each process needs its own GPU: start them with torchrun, as many as there are GPUs"
        )
    if not on_gpu:
        return torch.device("cpu")
    return torch.device("cuda", int(local_rank or 0))


def unusable_gpu():
    """Returns why torch cannot use the NVIDIA GPU of this machine, as a sentence.

    The text is empty if torch can use the GPU, or if there is no GPU.
    """
    has_driver = shutil.which("nvidia-smi") or Path("/proc/driver/nvidia/version").exists()
    if torch.cuda.is_available() or not has_driver:
        return ""
    reason = "it finds none"
    try:
        torch.cuda.init()
    except Exception as error:  # torch states the reason in its own words
        reason = first_line(error).rstrip(".")
    remedy = "install torch for its driver, and unset CUDA_VISIBLE_DEVICES"
    return f"torch cannot use the NVIDIA GPU ({reason}): {remedy}"


def print_machine(device, dtype):
    """Prints the hardware and the dtype of the computation.

    On the CPU of a machine with a GPU, it also prints why the GPU cannot be used.
    """
    if not is_main_process():
        return
    if device.type == "cpu":
        name = f"{torch.get_num_threads()} CPU threads"
    else:
        name = torch.cuda.get_device_name(device)
    print(f"{name}, {str(dtype).removeprefix('torch.')}")
    reason = unusable_gpu() if device.type == "cpu" else ""
    if reason:
        print(f"On the CPU: {reason}")


# ---- Files: complete or not at all ---------------------------------------------------------------


def code_of(*names):
    """Returns the code of functions and classes of this file as it was imported, without comments.

    Caches are found by a hash of it: a changed comment leaves them valid, a changed statement not.
    """
    definitions = ast.parse(SOURCE).body
    kinds = (ast.FunctionDef, ast.ClassDef)
    code = {node.name: ast.unparse(node) for node in definitions if isinstance(node, kinds)}
    return "\n".join(code[name] for name in names)


def make_folder(path):
    """Creates a folder and its parents. Raises UserError if that is impossible."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{path} cannot be made a folder ({error.strerror}): name another folder"
        ) from error


@contextlib.contextmanager
def atomic_path(path):
    """Yields a temporary path: the file at `path` is either written completely or not changed.

    If the block succeeds, the temporary file replaces `path`; otherwise it is removed.
    """
    path = Path(path)
    make_folder(path.parent)
    # The name is random, because containers that share a folder may have the same process ids.
    temporary = path.with_name(f".{secrets.token_hex(8)}.{path.name}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def sha256(*parts):
    """Returns the SHA-256, as hex digits, over tensors and strings in the order given."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, str):
            digest.update(part.encode())
        else:
            digest.update(part.detach().cpu().contiguous().numpy())
    return digest.hexdigest()


# ---- Images and labels ---------------------------------------------------------------------------

IMAGE_SIZE = 32
# Seeds of random choices that must be the same in every script, so --seed does not change them.
ORDER_SEED, EXAMPLES_SEED, CORRUPTION_SEED = 11, 12, 13
# The seed of a digit is three numbers: these two and the position of the digit.
SYNTHETIC_SEEDS = {"train": (14, 5), "test": (14, 4)}
NUM_SYNTHETIC = {"train": 5000, "test": 500}
# Names, in lower case, of folders and files that operating systems create beside images. Hidden
# folders and files, whose names begin with a dot, are skipped as well.
SYSTEM_NAMES = {
    "@eadir",
    "@tmp",
    "#recycle",
    "#snapshot",
    "@recycle",
    "lost+found",
    "__macosx",
    "$recycle.bin",
    "system volume information",
    "thumbs.db",
    "ehthumbs.db",
    "desktop.ini",
    "icon\r",
}
# Mean and standard deviation of CIFAR-10's training images, with values scaled to 0..1.
CHANNEL_MEAN = (0.4914, 0.4822, 0.4465)
CHANNEL_STD = (0.2470, 0.2435, 0.2616)


@dataclass(frozen=True)
class ImageSource:
    """What a loader returns: the labels of one split, and a function that reads its images.

    labels: int64 [N]. class_names: names of all classes, at least two. read: a function of indices,
    int64 [M], that returns the images at these indices, uint8 [M, 32, 32, 3]. paths: one per image,
    or None if images have no files of their own. channel_mean, channel_std: of red, green and blue,
    with values scaled to 0..1.
    """

    labels: Tensor
    class_names: list
    read: Callable
    paths: list | None = None
    channel_mean: tuple = CHANNEL_MEAN
    channel_std: tuple = CHANNEL_STD


@dataclass(frozen=True)
class ImageData:
    """Labelled images in memory.

    images: uint8 [N, 3, 32, 32]. labels: int64 [N], the labels to train on. true_labels: int64 [N],
    the labels of the data set, without corruption. class_names: one per class. paths: one per
    image, empty if images have no files of their own.
    indices: int64 [N] on the CPU, positions among the loaded images, for tables and corrections.
    dataset_index: int64 [N] on the CPU, positions in the whole data set, for `--noisy_labels`.
    num_available: number of images in the whole data set.
    channel_mean, channel_std: of red, green and blue, by which images are standardised.
    """

    images: Tensor
    labels: Tensor
    true_labels: Tensor
    class_names: list
    paths: list
    indices: Tensor
    dataset_index: Tensor
    num_available: int
    channel_mean: tuple = CHANNEL_MEAN
    channel_std: tuple = CHANNEL_STD

    def __len__(self):
        return len(self.labels)

    @property
    def is_corrupted(self):
        """Which labels differ from the true labels, bool [N]."""
        return self.labels != self.true_labels

    @cached_property
    def digest(self):
        """SHA-256 over images, labels, class names and standardisation, as hex digits."""
        names_and_numbers = [self.class_names, self.channel_mean, self.channel_std]
        return sha256(self.images, self.labels, json.dumps(names_and_numbers))

    def normalize(self, images):
        """Converts uint8 images [B, 3, 32, 32] to standardised float32, channels last in memory."""
        mean = torch.tensor(self.channel_mean, device=images.device).view(1, 3, 1, 1)
        std = torch.tensor(self.channel_std, device=images.device).view(1, 3, 1, 1)
        scaled = images.to(torch.float32, memory_format=torch.channels_last) / 255
        return (scaled - mean) / std

    def take(self, indices):
        """Returns the examples at `indices`, an int64 tensor [M], in that order."""
        return replace(
            self,
            images=self.images[indices],
            labels=self.labels[indices],
            true_labels=self.true_labels[indices],
            paths=[self.paths[i] for i in indices.tolist()],
            indices=self.indices[indices],
            dataset_index=self.dataset_index[indices],
        )

    def without(self, indices):
        """Returns all examples except those at `indices`."""
        is_kept = torch.ones(len(self), dtype=torch.bool)
        is_kept[indices] = False
        return self.take(is_kept.nonzero().squeeze(1))

    def to(self, device):
        """Returns a copy with images and labels on `device`."""
        moved = replace(
            self,
            images=self.images.to(device),
            labels=self.labels.to(device),
            true_labels=self.true_labels.to(device),
        )
        vars(moved)["digest"] = self.digest  # slow to compute, and the same on every device
        return moved


def load_data(dataset, dataset_dir, split, num_examples=None, cache_dir=None):
    """Loads the `train` or `test` split of a `--dataset` as ImageData.

    With `num_examples`, it loads that many randomly drawn images. Images that are decoded from
    class folders are cached in `cache_dir`, unless it is None. Raises UserError if images cannot be
    found or read, or if there are fewer than `num_examples`.
    """
    source = LOADERS[dataset](dataset_dir, split, cache_dir)
    loader = f"the loader of --dataset {dataset} ({split} images)"
    check_source(source, loader)
    total = len(source.labels)
    chosen = draw_examples(total, num_examples)
    images = torch.as_tensor(source.read(chosen))  # (M, 32, 32, 3)
    check_images(images, len(chosen), loader)
    labels = source.labels[chosen]
    paths = source.paths or [""] * total
    return ImageData(
        images=images.permute(0, 3, 1, 2).contiguous(),
        labels=labels,
        true_labels=labels,
        class_names=list(source.class_names),
        paths=[paths[i] for i in chosen.tolist()],
        indices=torch.arange(len(chosen)),
        dataset_index=chosen,
        num_available=total,
        channel_mean=tuple(source.channel_mean),
        channel_std=tuple(source.channel_std),
    )


def check_source(source, loader):
    """Raises UserError if a loader does not return what ImageSource describes."""

    def require(holds, what):
        if not holds:
            raise UserError(f"{loader} must return an ImageSource with {what}")

    require(isinstance(source, ImageSource), "labels, class_names and read")
    labels, names = source.labels, list(source.class_names)
    is_vector = isinstance(labels, Tensor) and labels.dtype == torch.int64 and labels.dim() == 1
    require(is_vector and len(labels) > 0, "labels as an int64 tensor [N], not empty")
    are_strings = all(isinstance(name, str) for name in names)
    are_different = len(set(names)) == len(names)
    are_valid = are_strings and are_different and len(names) >= 2
    require(are_valid, "at least two class_names, different strings")
    in_range = labels.min() >= 0 and labels.max() < len(names)
    require(in_range, f"labels from 0 to {len(names) - 1}, since it has {len(names)} class_names")
    has_paths = source.paths is None or len(source.paths) == len(labels)
    require(has_paths, f"one path for each of its {len(labels)} labels, or None")
    has_three_each = len(source.channel_mean) == 3 and len(source.channel_std) == 3
    is_standardisable = has_three_each and min(source.channel_std) > 0
    require(is_standardisable, "three means and three positive deviations")


def check_images(images, count, loader):
    """Raises UserError if the images that a loader read are not uint8 [count, 32, 32, 3]."""
    expected = (count, IMAGE_SIZE, IMAGE_SIZE, 3)
    if images.dtype != torch.uint8 or images.shape != expected:
        actual = f"{str(images.dtype).removeprefix('torch.')} {list(images.shape)}"
        raise UserError(f"{loader} must read images of uint8 {list(expected)}, but reads {actual}")


def draw_examples(total, num_examples):
    """Returns the indices of the images to use: all, or `num_examples` drawn by a fixed seed."""
    if num_examples is None:
        return torch.arange(total)
    if num_examples > total:
        raise UserError(
            f"--num_train_examples {num_examples}: there are only {total} training images"
        )
    generator = torch.Generator().manual_seed(EXAMPLES_SEED)
    return torch.randperm(total, generator=generator)[:num_examples]


def check_splits(data, test):
    """Raises UserError if the loaded training and test images differ in their classes.

    Each split is listed on its own, and somebody may add or remove a folder between the two.
    """
    if data.class_names == test.class_names:
        return
    different = sorted(set(data.class_names).symmetric_difference(test.class_names))
    names = ", ".join(different) if different else "the same in another order"
    raise UserError(
        f"training and test images have different classes ({names}): do not change class folders "
        "while a script reads them; a loader must return the same class_names for both splits"
    )


def duplicate_of(data):
    """Returns for each training image the index of the first identical image, a list of N.

    It is -1 if no earlier image is identical. Two images are identical if all their decoded pixels
    are equal.
    """
    first_index = {}  # by hash
    duplicates = []
    for index, image_hash in zip(data.indices.tolist(), hash_images(data), strict=True):
        duplicates.append(first_index.get(image_hash, -1))
        first_index.setdefault(image_hash, index)
    return duplicates


def hash_images(data):
    """Returns a hash of each image's pixels."""
    return [hashlib.sha256(image).digest() for image in data.images.cpu().numpy()]


def print_duplicates(data, test):
    """Prints how many training images have a copy with another label, or are also test images.

    Identical images with different labels cannot all be labelled correctly. Images in both splits
    make the test accuracy too high. A line is omitted if its number is zero.
    """
    train_hashes = hash_images(data)
    labels_by_hash = {}
    for image_hash, label in zip(train_hashes, data.labels.tolist(), strict=True):
        labels_by_hash.setdefault(image_hash, set()).add(label)
    conflicting = sum(len(labels_by_hash[image_hash]) > 1 for image_hash in train_hashes)
    if conflicting:
        print(f"{conflicting} training images have an identical copy with another label")
    leaked = sum(image_hash in labels_by_hash for image_hash in hash_images(test))
    if leaked:
        print(f"{leaked} test images are training images, too: test accuracy is too high")


def load_cifar10(dataset_dir, split, cache_dir):
    """Loads CIFAR-10 through torchvision, which downloads it once and checks its files."""
    try:
        cifar10 = open_cifar10(dataset_dir, split == "train")
    except (ImportError, OSError, RuntimeError, EOFError, ValueError) as error:
        raise UserError(
            f"CIFAR-10 is not complete in {dataset_dir}, and torchvision cannot load it "
            f"({first_line(error)}): give --dataset_dir, or --dataset imagefolder or synthetic"
        ) from error
    return ImageSource(
        labels=torch.tensor(cifar10.targets),
        class_names=cifar10.classes,
        read=lambda indices: cifar10.data[indices.numpy()],
    )


def open_cifar10(dataset_dir, train):
    """Returns torchvision's CIFAR10; of several processes one downloads it, and the others wait."""
    # Imported here, since the import fails beside a torch that was built for other hardware.
    from torchvision.datasets import CIFAR10

    try:
        return CIFAR10(dataset_dir, train=train)
    except RuntimeError:  # files are missing or damaged
        make_folder(dataset_dir)
        lock = FileLock(Path(dataset_dir) / ".cifar10.lock")
        with lock, contextlib.redirect_stdout(io.StringIO()):
            return CIFAR10(dataset_dir, train=train, download=True)


def load_imagefolder(dataset_dir, split, cache_dir):
    """Loads `<dataset_dir>/<split>/<class>/**`, resized to 32x32 RGB, in a fixed random order."""
    if cache_dir:
        refuse_inside_data("--output_dir", cache_dir, dataset_dir)
    samples, class_names = split_samples(Path(dataset_dir), split)
    if split == "train" and is_main_process():
        counts = Counter(class_names[label] for _, label in samples)
        print(f"{len(class_names)} classes in {dataset_dir}: {ten_largest(counts)}")
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(ORDER_SEED))
    paths = [samples[i][0] for i in order.tolist()]

    def read(indices):
        return read_images([paths[i] for i in indices.tolist()], split, cache_dir)

    return ImageSource(
        labels=torch.tensor([label for _, label in samples])[order],
        class_names=class_names,
        read=read,
        paths=paths,
    )


def refuse_inside_data(flag, folder, dataset_dir):
    """Raises UserError if a folder to write into lies among the images of class folders.

    The next run would read the files written there as images, or as a class.
    """
    target = Path(folder).resolve()
    for split in ("train", "test"):
        top = Path(dataset_dir) / split
        if not top.is_dir():
            continue
        # All folders below are compared, since links may lead to folders elsewhere.
        _, image_folders, _ = list_files(top)
        if any(target.is_relative_to(image_folder) for image_folder in image_folders):
            raise UserError(f"{flag} {folder} lies among the images of {top}: name another folder")


def ten_largest(counts):
    """Returns a Counter as text: the ten largest counts, and how many others down to which one."""
    parts = [f"{name} {count}" for name, count in counts.most_common()]
    if len(parts) > 10:
        parts = [*parts[:10], f"and {len(parts) - 10} others down to {parts[-1]}"]
    return ", ".join(parts)


def same_form(name):
    """Returns a name in one Unicode form: a Mac writes an ä as two characters, others as one."""
    return unicodedata.normalize("NFC", str(name))


def list_samples(folder, verbose):
    """Returns (path, label) of every file in class folders, sorted, and the names of the classes.

    Hidden and system folders and files are skipped. If `verbose`, skipped folders are printed.
    Raises UserError if there are fewer than two classes, or if a folder cannot be listed. Also
    raises it if a class has no file, or if two classes have the same name.
    """
    if not folder.is_dir():
        raise UserError(
            f"--dataset imagefolder: {folder} must be a folder with a folder of images per class"
        )
    _, class_folders, _ = next(os.walk(folder, onerror=refuse_unlisted))
    skipped = set(class_folders) - set(visible(class_folders))
    samples, class_names, listed = [], [], set()
    for name in visible(class_folders):
        files, listed_here, skipped_here = list_files(folder / name, listed)
        if not files:
            raise UserError(
                f"--dataset imagefolder: {folder / name} holds no image of its own: "
                "fill or remove it"
            )
        if same_form(name) in class_names:
            raise UserError(
                f"--dataset imagefolder: {folder / name} has the same name as another class: "
                "rename or remove it"
            )
        samples.extend((path, len(class_names)) for path in files)
        class_names.append(same_form(name))
        listed |= listed_here
        skipped |= skipped_here
    if len(class_names) < 2:
        raise UserError(
            f"--dataset imagefolder: {folder} must hold at least 2 class folders, "
            f"not {len(class_names)}"
        )
    if skipped and verbose:
        print(f"Skipped in {folder}: {', '.join(sorted(skipped))}")
    return samples, class_names


def list_files(folder, listed_before=frozenset()):
    """Returns all files below a folder, the folders it lists, and the names of skipped folders.

    Files: a list of paths. Listed folders: a set of paths without links; a folder that links lead
    to twice, or that is in `listed_before`, is listed only once. Raises UserError if a folder
    cannot be listed.
    """
    paths, listed, skipped = [], set(), set()
    for parent, folders, files in os.walk(folder, onerror=refuse_unlisted, followlinks=True):
        real = Path(parent).resolve()
        if real in listed or real in listed_before:
            folders.clear()  # os.walk then goes no deeper here
            continue
        listed.add(real)
        skipped |= set(folders) - set(visible(folders))
        folders[:] = visible(folders)  # os.walk then visits these folders, in this order
        paths.extend(f"{parent}/{file}" for file in visible(files))
    return paths, listed, skipped


def visible(names):
    """Returns the sorted names of files or folders that are neither hidden nor made by a system."""
    visible_names = [
        name for name in names if not name.startswith(".") and name.lower() not in SYSTEM_NAMES
    ]
    return sorted(visible_names, key=same_form)


def refuse_unlisted(error):
    """Raises UserError for the OSError of a folder that cannot be listed."""
    raise UserError(
        f"--dataset imagefolder: a folder cannot be listed ({error}): "
        "allow reading it, or remove it"
    )


def split_samples(dataset_dir, split):
    """Returns (path, label) of every image of a split of class folders, and the class names.

    Without a folder `test`, a tenth of each class of `train` is held out as the test split. Raises
    UserError if the classes of the two splits differ, or if nothing can be held out.
    """
    verbose = split == "train" and is_main_process()
    train_dir, test_dir = dataset_dir / "train", dataset_dir / "test"
    samples, class_names = list_samples(train_dir, verbose)
    # A link to nothing is a mistake, so it counts as a folder that is there.
    if os.path.lexists(test_dir):
        test_samples, test_names = list_samples(test_dir, verbose)
        require_same_classes(train_dir, class_names, test_dir, test_names)
        return (samples if split == "train" else test_samples), class_names
    held_out = hold_out(samples, dataset_dir)
    if verbose:
        print(
            f"There is no {test_dir}: {len(held_out)} images, a tenth of each class, "
            "are held out as the test split"
        )
    if split == "test":
        return [sample for sample in samples if sample in held_out], class_names
    return [sample for sample in samples if sample not in held_out], class_names


def require_same_classes(train_dir, train_names, test_dir, test_names):
    """Raises UserError if a split lacks classes of the other split."""
    for folder, names, other_names in (
        (test_dir, test_names, train_names),
        (train_dir, train_names, test_names),
    ):
        lacking = sorted(set(other_names) - set(names))
        if lacking:
            raise UserError(
                f"{folder} lacks the classes {', '.join(lacking)}: add them, or remove {test_dir} "
                "(then a tenth of train is held out as the test split)"
            )


def hold_out(samples, dataset_dir):
    """Returns a tenth of the (path, label) samples of each class, as a set: the test split.

    A hash of a file's path below `dataset_dir` decides, so most images stay in their split if files
    are added or removed. A class with a single image has none in the test split. Raises UserError
    if every class has a single image.
    """

    def path_hash(sample):
        path, _ = sample
        return hashlib.sha256(os.fsencode(os.path.relpath(path, dataset_dir))).digest()

    held_out = set()
    for _, members in itertools.groupby(samples, key=itemgetter(1)):
        ordered = sorted(members, key=path_hash)
        if len(ordered) > 1:
            held_out.update(ordered[: max(1, round(len(ordered) / 10))])
    if not held_out:
        raise UserError(
            f"--dataset imagefolder: without {dataset_dir}/test, "
            "some class must have 2 images or more"
        )
    return held_out


def read_images(paths, split, cache_dir):
    """Returns the images in files, uint8 [N, 32, 32, 3]; caches them in `cache_dir`, unless None.

    Raises UserError, naming the file, if an image cannot be read or its path is not UTF-8.
    """
    code = code_of("read_image", "refuse_deep_colour", "has_deep_colour", "is_deep_tile")
    listing = [code, str(IMAGE_SIZE), version("pillow"), *map(describe_file, paths)]
    cache = Path(cache_dir or "") / "images" / f"{split}-{sha256(*listing)[:16]}.safetensors"
    if cache_dir and cache.exists():
        try:
            return load_file(cache)["images"].numpy()
        except SafetensorError:
            print(f"{cache} is damaged: the images are read again")
    with ThreadPoolExecutor() as pool:  # Pillow decodes without holding Python's global lock
        decoded = pool.map(read_image, paths)
        progress = tqdm(decoded, f"Reading {split} images", len(paths), leave=False)
        images = np.stack(list(progress))
    if cache_dir and is_main_process():
        with atomic_path(cache) as temporary:
            save_file({"images": torch.from_numpy(images)}, temporary)
    return images


def describe_file(path):
    """Returns path, size, times of change and inode of a file, as text.

    The inode differs if two files of the same size and times swapped their names. Raises UserError
    if it is no regular file, or if its path is not UTF-8.
    """
    try:
        info = os.stat(path.encode())  # noqa: PTH116, pathlib is too slow for many files
        if not stat.S_ISREG(info.st_mode):  # reading a pipe might never end
            raise OSError("no regular file")
    except (OSError, UnicodeError) as error:
        raise UserError(
            f"{path!r} cannot be read ({first_line(error)}): remove or rename it"
        ) from error
    return f"{path} {info.st_size} {info.st_mtime_ns} {info.st_ctime_ns} {info.st_ino}"


def read_image(path):
    """Returns the image in a file as RGB, uint8 [32, 32, 3], upright, transparency over white.

    Raises UserError, naming the file, if it cannot be read or has more than 8 bits per channel.
    """
    from PIL import Image, ImageOps

    size = IMAGE_SIZE, IMAGE_SIZE
    try:
        with Image.open(path) as image:
            refuse_deep_colour(image, path)
            # A large JPEG is then decoded at a lower resolution, which is faster.
            image.draft("RGB", (2 * IMAGE_SIZE, 2 * IMAGE_SIZE))
            image.load()  # also rotates a TIFF as its orientation tag requires
            with contextlib.suppress(Exception):
                # Fails if the EXIF block is malformed. Pillow then keeps the tags read so far.
                image.getexif()
            # exif_transpose rotates by the tags read above. It also rewrites the EXIF block, and
            # fails if the block is malformed, so the block is removed first.
            for name in ("exif", "Raw profile type exif"):
                image.info.pop(name, None)
            ImageOps.exif_transpose(image, in_place=True)
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return np.asarray(image.convert("RGB").resize(size, Image.Resampling.BILINEAR))
    except UserError:
        raise
    except Exception as error:  # a damaged file can raise any exception
        raise UserError(
            f"{path} is not a readable image ({first_line(error)}): remove or replace it"
        ) from error


def refuse_deep_colour(image, path):
    """Raises UserError if an opened, not yet loaded image has more than 8 bits per channel.

    Pillow silently keeps only the upper 8 bits of colour. If a camera used 12 of 16 bits, the image
    is then nearly black. For grey images, the range of the values is unknown.
    """
    if has_deep_colour(image, path):
        raise UserError(
            f"{path} has more than 8 bits per channel: convert all images alike to 8 bits, for "
            "example by ImageMagick: magick mogrify -depth 8 FILES (with -level 0,6.25% before "
            "-depth if the largest value is 4095)"
        )


def has_deep_colour(image, path):
    """Returns whether the header of an image file states more than 8 bits per channel."""
    if image.mode.startswith(("I", "F")):  # integers or floating-point numbers
        return True
    if image.format == "TIFF":
        bits_per_sample = 258  # a tag of TIFF
        return max(image.tag_v2.get(bits_per_sample, (1,))) > 8
    if image.format == "JPEG2000":
        # The code stream begins with two markers: its start, and the image size (SIZ) segment.
        _, _, size_segment = Path(path).read_bytes().partition(b"\xff\x4f\xff\x51")
        depth_offset = 38  # of the first channel: behind length, profile, 8 sizes, channel count
        depth = size_segment[depth_offset]
        bits = (depth & 0x7F) + 1  # the highest bit states whether values have a sign
        return bits > 8
    return any(is_deep_tile(tile, image.format) for tile in image.tile)


def is_deep_tile(tile, image_format):
    """Returns whether a tile, Pillow's description of a part to decode, has more than 8 bits."""
    codec, _, _, arguments = tile
    values = arguments if isinstance(arguments, tuple) else (arguments,)
    if codec == "SGI16":
        return True
    raw_mode = str(values[0])
    if raw_mode.endswith((";16B", ";16L", ";16N")):
        return True
    largest = values[-1]  # of a portable pixmap: the largest value that its header allows
    return image_format == "PPM" and isinstance(largest, int) and largest > 255


def load_digits(dataset_dir, split, cache_dir):
    """Draws digits in random colours, positions, sizes and rotations, each from its own seed.

    The labels of all digits are needed before any image is drawn. So each digit is drawn twice from
    its seed: here for the label, and in draw_digit for the image.
    """
    seeds = [(*SYNTHETIC_SEEDS[split], index) for index in range(NUM_SYNTHETIC[split])]
    return ImageSource(
        labels=torch.tensor([digit_of(np.random.default_rng(seed)) for seed in seeds]),
        class_names=[str(digit) for digit in range(10)],
        read=lambda indices: np.stack([draw_digit(seeds[i]) for i in indices.tolist()]),
    )


def digit_of(generator):
    """Returns the digit of an image: the first number that its random generator draws."""
    return int(generator.integers(10))


def draw_digit(seed):
    """Returns the image of one digit, uint8 [32, 32, 3]."""
    from PIL import Image, ImageDraw, ImageFont

    generator = np.random.default_rng(seed)
    digit = digit_of(generator)
    # Digit and background always differ in brightness, and either of them can be the brighter one.
    dark, bright = generator.integers(0, 115, size=3), generator.integers(140, 256, size=3)
    colour, background_colour = generator.permutation([dark, bright])
    coarse = generator.integers(256, size=(5, 5, 3), dtype=np.uint8)
    texture = Image.fromarray(coarse).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
    texture = np.asarray(texture)
    noise = generator.normal(0, 15, texture.shape)
    background = background_colour + (texture - 127.5) * 0.7 + noise

    canvas = Image.new("L", (2 * IMAGE_SIZE, 2 * IMAGE_SIZE))
    centre = (IMAGE_SIZE, IMAGE_SIZE)
    font = ImageFont.load_default(size=int(generator.integers(18, 29)))
    ImageDraw.Draw(canvas).text(centre, str(digit), fill=255, font=font, anchor="mm")
    canvas = canvas.rotate(generator.uniform(-12, 12), Image.Resampling.BICUBIC)
    left, top = (IMAGE_SIZE // 2 + generator.integers(-4, 5, size=2)).tolist()
    window = canvas.crop((left, top, left + IMAGE_SIZE, top + IMAGE_SIZE))
    mask = np.asarray(window)[..., None] / 255
    return (background * (1 - mask) + colour * mask).clip(0, 255).astype(np.uint8)


# A loader is a function (dataset_dir, split, cache_dir) -> ImageSource; split: `train` or `test`.
LOADERS = {"cifar10": load_cifar10, "imagefolder": load_imagefolder, "synthetic": load_digits}


# ---- Label corruption and cleaning ---------------------------------------------------------------


def corrupt_labels(labels, fraction, num_classes, seed=CORRUPTION_SEED):
    """Gives exactly round(fraction * N) randomly chosen examples a label of another class.

    The new label is drawn uniformly: symmetric label noise. labels: int64 [N] on the CPU. Returns
    the new labels, int64 [N], and which labels were changed, bool [N].
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(labels), generator=generator)[: round(fraction * len(labels))]
    shift = torch.randint(1, num_classes, (len(chosen),), generator=generator)
    corrupted = labels.clone()
    corrupted[chosen] = (labels[chosen] + shift) % num_classes
    return corrupted, corrupted != labels


def training_examples(clean, fraction, noisy_labels=None, cleaning=None):
    """Returns the ImageData to train on.

    clean: the images as they were loaded. Their labels are replaced by `noisy_labels`, int64 [N];
    if that is None, a `fraction` of them is corrupted, as `--corrupt_percentage` requires. Then a
    `cleaning`, as `read_corrections` returns it, is applied. If it changes a label that was not
    corrupted, the new label counts as the true label.
    """
    if noisy_labels is None:
        noisy_labels, _ = corrupt_labels(clean.labels, fraction, len(clean.class_names))
    data = replace(clean, labels=noisy_labels)
    if cleaning is None:
        return data
    labels = data.labels.clone()
    for index, label in cleaning["new_labels"].items():
        labels[index] = label
    true_labels = torch.where(data.is_corrupted, data.true_labels, labels)
    return replace(data, labels=labels, true_labels=true_labels).without(cleaning["excluded"])


# ---- Labels and decisions in csv files -----------------------------------------------------------

LEAVE_OUT = "leave out"  # in the column new_label: excludes the image from the training
HELD_OUT = -1  # in place of the position of a training image: an image of the test split


class OtherImage(UserError):
    """A row names an image that is not trained on: a test image, or an image that was not drawn."""


class NoSuchImage(UserError):
    """A row names an image that does not exist."""


def read_csv(flag, path, column):
    """Returns the rows of a csv file and the SHA-256 of its bytes. The file is read only once.

    A row is a pair: its name for messages, such as `<flag> <path>, line 2`, and a dictionary of its
    cells by column name. The delimiter is a comma, a semicolon or a tab, or what a first line
    `sep=` states. Blank rows are skipped. Raises UserError if the file cannot be read, if it lacks
    `column` or has a column twice, or if the quotes or the number of cells of a row are wrong.
    """
    name = f"{flag} {path}"
    content, lines = read_lines(name, path)
    delimiters = ",;\t"
    stated = stated_delimiter(lines)
    if stated is not None:
        delimiters = stated
        lines = lines[1:]
    header = lines[0][1] if lines else ""
    delimiter, columns = find_columns(name, header, delimiters, column)
    rows = []
    for line_number, line in lines[1:]:
        row_name = f"{name}, line {line_number}"
        cells = split_cells(row_name, line, delimiter)
        if len(cells) != len(columns):
            raise UserError(
                f"{row_name}: has {len(cells)} cells, but the first line has {len(columns)}: "
                "give every row a cell for each column, which may be empty"
            )
        if any(cell.strip() for cell in cells):
            rows.append((row_name, dict(zip(columns, cells, strict=True))))
    return rows, hashlib.sha256(content).hexdigest()


def read_lines(name, path):
    """Returns the bytes of a text file, and pairs of line number and text of lines with a text.

    name: flag and path, for the message. Raises UserError if it is no text in UTF-8.
    """
    try:
        content = Path(path).read_bytes()
        text = content.decode().lstrip("\ufeff")  # some tools write the byte order mark twice
        if "\0" in text:
            raise ValueError("it has a NUL")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{name} cannot be read as a csv file in UTF-8 ({first_line(error)})"
        ) from error
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return content, [(number, line) for number, line in enumerate(lines, 1) if line.strip()]


def stated_delimiter(lines):
    """Returns the delimiter that the first line states to Excel, or None if it states none.

    lines: pairs of line number and text.
    """
    if not lines:
        return None
    _, first = lines[0]
    # Such as `sep=;`, or `"sep=;",,` after a spreadsheet saved the file again.
    match = re.fullmatch(r'"?sep=([^\w"])"?[,;\t]*', first, re.IGNORECASE)
    return match[1] if match else None


def find_columns(name, header, delimiters, column):
    """Returns the delimiter of a csv file and the names of its columns, lower-case and stripped.

    It is the first of the `delimiters` that splits the header so that `column` is among the names.
    Raises UserError if no delimiter does, or if a column is there twice.
    """
    for delimiter in delimiters:
        try:
            cells = split_cells(name, header, delimiter)
        except UserError:  # the quotes are wrong with this delimiter
            continue
        columns = [cell.strip().lower() for cell in cells]
        if column not in columns:
            continue
        doubled = [cell for cell, count in Counter(columns).items() if cell and count > 1]
        if doubled:
            raise UserError(f"{name}: the column '{doubled[0]}' is there twice: remove one")
        return delimiter, columns
    raise UserError(f"{name}: its first line must name the column '{column}', but is {header!r}")


def split_cells(row_name, line, delimiter):
    """Returns the cells of a line of a csv file. Raises UserError if its quotes are wrong."""
    try:
        (cells,) = csv.reader([line], delimiter=delimiter, strict=True)
    except csv.Error as error:
        raise UserError(
            f"{row_name}: a cell in quotes must end on its line, directly before {delimiter!r} "
            f"({error}): remove line breaks and stray quotes"
        ) from error
    for cell in cells:
        stripped = cell.lstrip()
        if stripped.startswith('"') and stripped != cell:
            raise UserError(f"{row_name}: a blank stands before a quote: remove the blank")
    return cells


class ExampleFinder:
    """Finds the training images that the rows of a csv file name.

    Images with files are named by `path`: absolute, or relative to the working directory or to
    `--dataset_dir`. If no such file exists, the data set may have been moved; then the last parts
    of the path decide, such as `train/cat/1.png`. Images without files are named by `index`.
    """

    def __init__(self, data, test, dataset_dir, indices, num_indices):
        """data, test: ImageData of both splits.

        indices: int64 [N], the `index` of each training image. num_indices: a row may name an index
        from 0 to num_indices - 1.
        """
        self.data = data
        self.dataset_dir = dataset_dir
        self.num_indices = num_indices
        self.position_of = {index: position for position, index in enumerate(indices.tolist())}
        self.images = [(path, position) for position, path in enumerate(data.paths) if path]
        self.images += [(path, HELD_OUT) for path in test.paths if path]
        self.used = set()  # positions of images that had a row
        self.matched_by_last_parts = []  # a text for each such row

    # The following dictionaries are slow to build, so each one is built when it is first needed.

    @cached_property
    def by_name(self):
        """Positions of images by path, with links to folders resolved."""
        return unique_positions(self.images, unlinked_folder)

    @cached_property
    def by_target(self):
        """Positions of images by path, with all links resolved, since an image may be a link."""
        return unique_positions(self.images, os.path.realpath)

    @cached_property
    def by_last_parts(self):
        """Positions of images by path relative to `--dataset_dir`."""

        def below(path):
            return Path(os.path.relpath(path, self.dataset_dir)).as_posix()

        return unique_positions(self.images, below)

    def find(self, row_name, row):
        """Returns the position in `data` of the training image that a row names.

        Raises OtherImage or NoSuchImage, or UserError if the row names nothing or the image had an
        earlier row.
        """
        path, index = row.get("path", ""), row.get("index", "").strip()
        if any(self.data.paths):
            named = path
            position = self.find_path(row_name, path)
        else:
            named = index
            position = self.find_index(row_name, path, index)
        if position == HELD_OUT:
            raise OtherImage(f"{row_name}: {path} is held out as the test split")
        if position in self.used:
            raise UserError(f"{row_name}: image {named} has a row before this one")
        self.used.add(position)
        return position

    def find_index(self, row_name, path, text):
        """Returns the position of the training image whose `index` is `text`.

        path: must be empty, since the images have no files. Raises OtherImage if the image was not
        drawn, NoSuchImage if a path is given or the index is out of range, and UserError without an
        index.
        """
        if path.strip():
            raise NoSuchImage(
                f"{row_name}: {path} is not among the {len(self.data)} training images, which "
                "have no files: name them by index"
            )
        if not text:
            raise UserError(f"{row_name}: needs an index, a whole number from 0 on")
        # Such as `17` or `017`. Longer numbers are no index, and int() fails above 4,300 digits.
        index = int(text) if re.fullmatch("[0-9]{1,18}", text) else None
        if index in self.position_of:
            return self.position_of[index]
        if index is None or index >= self.num_indices:
            raise NoSuchImage(
                f"{row_name}: there is no training image {text:.20}, only 0 to "
                f"{self.num_indices - 1}"
            )
        raise OtherImage(f"{row_name}: training image {index} was not drawn")

    def find_path(self, row_name, path):
        """Returns the position of the training image with a path, or HELD_OUT for a test image.

        Raises OtherImage for any other file, NoSuchImage if there is no such file, and UserError
        without a path.
        """
        if not path.strip():
            raise UserError(
                f"{row_name}: needs a path; an index would mean another image after files are "
                "added or removed"
            )
        files = []
        for spelled in spellings(path):
            files += [os.path.abspath(spelled), os.path.abspath(Path(self.dataset_dir) / spelled)]
        for file in files:
            position = self.look_up(file)
            if position is not None:
                return position
        problem = f"{row_name}: {path} is not among the {len(self.data)} training images"
        if any(map(os.path.isfile, files)):  # unlike pathlib, false for a name that is too long
            raise OtherImage(problem)
        return self.find_last_parts(path, problem)

    def find_last_parts(self, path, problem):
        """Returns the position of the image that the last parts of a path name, or HELD_OUT.

        problem: the first part of the message. Raises OtherImage if they name another file below
        `--dataset_dir`, and NoSuchImage if they name no file.
        """
        endings = [ending for spelled in spellings(path) for ending in last_parts(spelled)]
        for ending in endings:
            position = self.by_last_parts.get(same_form(ending))
            if position is not None:
                self.matched_by_last_parts.append(f"{path} as {ending}")
                return position
        files = [f"{self.dataset_dir}/{ending}" for ending in endings]
        if any(map(os.path.isfile, files)):
            raise OtherImage(problem)
        raise NoSuchImage(f"{problem}, and there is no such file")

    def look_up(self, file):
        """Returns the position of the image in a file, HELD_OUT for a test image, or None."""
        position = self.by_name.get(same_form(unlinked_folder(file)))
        if position is None:
            position = self.by_target.get(same_form(os.path.realpath(file)))
        return position

    def print_matches(self):
        """Prints how many rows were matched by their last parts, and the first of these rows."""
        if self.matched_by_last_parts:
            print(
                f"{len(self.matched_by_last_parts)} rows name files that do not exist and were "
                f"matched by the last parts of their paths, the first: "
                f"{self.matched_by_last_parts[0]}"
            )


def unique_positions(images, spelling):
    """Returns a dictionary from the spelling of each path, in one Unicode form, to its position.

    images: pairs of a path and a position. spelling: function of a path. A spelling that several
    images share is omitted, since it does not show which image is meant.
    """
    positions = {}
    for path, position in images:
        positions.setdefault(same_form(spelling(path)), []).append(position)
    return {spelled: shared[0] for spelled, shared in positions.items() if len(shared) == 1}


def unlinked_folder(path):
    """Returns the absolute path of a file, with links to folders resolved."""
    folder, name = os.path.split(os.path.abspath(path))
    return f"{os.path.realpath(folder)}/{name}"


def spellings(path):
    """Returns the ways to read a path: as written, without blanks around it, and as a URL.

    Labelling tools write URLs.
    """
    # Such as `file:///a/b%20c.png` or `file://localhost/a/b%20c.png`, which mean `/a/b c.png`.
    decoded = unquote(re.sub("^file:(//(localhost)?)?", "", path.strip()))
    return list(dict.fromkeys((path, path.strip(), decoded)))


def last_parts(path):
    """Returns all endings of a path, longest first: of `a\\b/c` these are `a/b/c`, `b/c`, `c`."""
    parts = path.replace("\\", "/").split("/")
    return ["/".join(parts[start:]) for start in range(len(parts))]


def find_class(row_name, name, class_names, hint=""):
    """Returns the class index of a class name, in any Unicode form, with or without blanks around.

    Raises UserError if there is no such class; `hint` is the end of its text.
    """
    for spelled in (same_form(name), same_form(name.strip())):
        if spelled in class_names:
            return class_names.index(spelled)
    raise UserError(f"{row_name}: {name!r} is none of the classes {', '.join(class_names)}{hint}")


def read_noisy_labels(path, data, test, dataset_dir):
    """Returns the labels to train on, int64 [N], and the SHA-256 of the csv file they come from.

    Its columns are `label`, a class name, and `path` or `index`, the position in the whole data
    set. Images without a row keep their label. Rows of images that are not trained on are only
    counted. Prints the number of rows and how many labels change between which classes.

    Raises UserError, naming the line, for an unknown class, for a row that names no image or the
    image of an earlier row, and if no row is about a training image.
    """
    rows, file_hash = read_csv("--noisy_labels", path, "label")
    finder = ExampleFinder(data, test, dataset_dir, data.dataset_index, data.num_available)
    labels = data.labels.clone()
    changes = Counter()
    num_others = 0
    missing = []
    for row_name, row in rows:
        try:
            position = finder.find(row_name, row)
        except OtherImage:
            num_others += 1
            continue
        except NoSuchImage as error:
            missing.append(error)
            continue
        labels[position] = find_class(row_name, row["label"], data.class_names)
        if labels[position] != data.labels[position]:
            old_name = data.class_names[data.labels[position]]
            new_name = data.class_names[labels[position]]
            changes[f"{old_name} → {new_name}"] += 1
    if missing:
        raise UserError(f"{missing[0]} ({len(missing)} such rows in all): correct or remove them")
    if not finder.used:
        raise UserError(
            f"--noisy_labels {path}: none of its {num_others} rows is about a training image"
        )
    finder.print_matches()
    summary = ten_largest(changes) if changes else "no label differs"
    print(f"{path}: {len(finder.used)} rows, and {num_others} of other images; {summary}")
    return labels, file_hash


def has_labels_of(metadata, path):
    """Returns whether a checkpoint was trained on the labels of a `--noisy_labels` file.

    metadata: of the checkpoint. path: None without the flag. The checkpoint keeps the labels, so
    the file is not needed if it cannot be read a second time. That is so for a pipe, such as
    `<(command)`, and for a file that was removed and that has the same name as for the training. A
    line is printed then. Raises UserError if the file cannot be read for another reason.
    """
    trained_on = metadata["noisy_labels"]
    if path is None or trained_on is None:
        return path is None and trained_on is None
    if Path(path).is_file():
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise unreadable_labels(path, error.strerror) from error
        return hashlib.sha256(content).hexdigest() == metadata["labels_sha256"]
    is_pipe = Path(path).exists()
    if not is_pipe and path != trained_on:
        raise unreadable_labels(path, "no such file")
    if is_main_process():
        print(f"{path} cannot be read again: the labels in the checkpoint are used")
    return True


def unreadable_labels(path, reason):
    """Returns the UserError for a `--noisy_labels` file that cannot be read."""
    return UserError(f"--noisy_labels {path} cannot be read ({reason}): name another file")


def read_corrections(path, data, test, dataset_dir):
    """Returns the corrections in a csv file, as a dictionary: the `cleaning` of training_examples.

    Its `excluded` is a list of indices among the loaded images, and `new_labels` a dictionary from
    such indices to class indices. The columns of the file are `path` or `index`, and `new_label`: a
    class name, or `leave out` to exclude the image from the training. Rows with an empty
    `new_label` are ignored. Prints what changes.

    Raises UserError, naming the line, for an unknown image or class, for the image of an earlier
    row, and if a column `label` differs from the label before any cleaning.
    """
    if LEAVE_OUT in [name.strip() for name in data.class_names]:
        raise UserError(
            f"--corrections {path}: '{LEAVE_OUT}' excludes an image, and a class has that name: "
            "rename the class"
        )
    rows, _ = read_csv("--corrections", path, "new_label")
    finder = ExampleFinder(data, test, dataset_dir, data.indices, len(data))
    excluded, new_labels = [], {}
    decided = [(row_name, row) for row_name, row in rows if row["new_label"].strip()]
    if not decided:
        raise UserError(
            f"--corrections {path} decides nothing: write a class or '{LEAVE_OUT}' in new_label"
        )
    for row_name, row in decided:
        index = finder.find(row_name, row)
        require_given_label(row_name, row.get("label", ""), index, data)
        if row["new_label"].strip() == LEAVE_OUT:
            excluded.append(index)
        else:
            hint = f", nor '{LEAVE_OUT}'"
            new_labels[index] = find_class(row_name, row["new_label"], data.class_names, hint)
    finder.print_matches()
    print_cleaning(excluded, new_labels, len(rows) - len(decided), data)
    return {"excluded": excluded, "new_labels": new_labels}


def require_given_label(row_name, name, index, data):
    """Raises UserError if a row's `label` is not the label of its image before any cleaning.

    name: the cell `label`; an empty cell is accepted.
    """
    if not name.strip():
        return
    given = data.labels[index]
    if find_class(row_name, name, data.class_names) != given:
        raise UserError(
            f"{row_name}: image {index} has the label {data.class_names[given]} before any "
            f"cleaning, not {name}: give the data flags of that table, or remove its column label"
        )


def print_cleaning(excluded, new_labels, num_ignored, data):
    """Prints how many labels change, stay and are left out, and how many rows are ignored."""
    changes = Counter()
    num_kept = 0
    for index, label in new_labels.items():
        if label == data.labels[index]:
            num_kept += 1
        else:
            changes[f"{data.class_names[data.labels[index]]} → {data.class_names[label]}"] += 1
    parts = []
    if changes:
        parts.append(ten_largest(changes))
    if num_kept:
        parts.append(f"kept {num_kept}")
    parts.append(f"left out {len(excluded)}")
    print(f"Corrections: {', '.join(parts)}")
    if num_ignored:
        print(
            f"Ignored {num_ignored} rows with an empty new_label, since nothing was decided there; "
            f"to leave an image out, write '{LEAVE_OUT}'"
        )


# ---- Networks ------------------------------------------------------------------------------------


class Residual(nn.Sequential):
    """Residual block: x + f(x)."""

    def forward(self, x):
        return x + super().forward(x)


class Scale(nn.Module):
    """Multiplies by a constant."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return self.factor * x

    def extra_repr(self):
        return str(self.factor)


def conv_block(in_channels, out_channels, kernel_size=3, stride=1, padding=1):
    """Convolution without bias, batch-norm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


def resnet9(num_classes):
    """The ResNet of the published example: 2.3 M parameters, 128 features."""
    features = nn.Sequential(
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
    head = nn.Sequential(nn.Linear(128, num_classes, bias=False), Scale(0.2))
    return nn.Sequential(OrderedDict(features=features, head=head))


def resnet18(num_classes):
    """ResNet-18 of torchvision with a 3x3 stem of stride 1, without max-pool; 512 features."""
    try:
        from torchvision import models
    except (ImportError, OSError, RuntimeError) as error:  # made for another build of torch
        raise UserError(
            f"--model resnet18: torchvision cannot be imported ({first_line(error)}): "
            "install the one for this torch, or use --model resnet9"
        ) from error
    features = models.resnet18(num_classes=num_classes)
    features.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
    nn.init.kaiming_normal_(features.conv1.weight, mode="fan_out", nonlinearity="relu")
    features.maxpool = nn.Identity()
    head = features.fc
    features.fc = nn.Identity()
    return nn.Sequential(OrderedDict(features=features, head=head))


# A network is a function of the number of classes. It returns a module with two parts, and nothing
# else: `features`, images [B, 3, 32, 32] to [B, D], and `head`, [B, D] to logits [B, num_classes].
MODELS = {"resnet9": resnet9, "resnet18": resnet18}


class ImageClassifier(nn.Module):
    """The two parts of a network of MODELS. Logits leave it in float32, also under autocast."""

    def __init__(self, network):
        super().__init__()
        self.features = network.features
        self.head = network.head

    def forward(self, images):  # (B, 3, 32, 32) -> (B, num_classes)
        return self.logits(self.features(images))

    def logits(self, features):  # (B, D) -> (B, num_classes)
        # Logits in bfloat16 would tie, and losses and margins with them.
        dtype = torch.promote_types(features.dtype, torch.float32)
        with torch.autocast(features.device.type, enabled=False):
            return self.head(features.to(dtype))


def construct_model(name, num_classes):
    """Returns the ImageClassifier of a `--model` with random weights, channels last in memory.

    Raises UserError where the function in MODELS does not return what a network has to be.
    """
    network = MODELS[name](num_classes)
    problem = problem_of_network(network, num_classes)
    if problem:
        raise UserError(f"--model {name}: its function in MODELS must return {problem}")
    model = ImageClassifier(network)
    model.constructed_by = MODELS[name]  # part of what the scores depend on
    return model.to(memory_format=torch.channels_last)


@torch.no_grad()
def problem_of_network(network, num_classes):
    """Returns what a network would have to be and is not, as part of a sentence; None if it is."""
    for part in ("features", "head"):
        if not isinstance(getattr(network, part, None), nn.Module):
            return f"a module with the parts features and head, modules both, but {part} is none"
    in_parts = {*network.features.parameters(), *network.head.parameters()}
    for name, parameter in network.named_parameters():
        if parameter not in in_parts:
            return f"features and head that hold all parameters, but {name} is in neither"
    was_training = network.training
    model = ImageClassifier(network).eval()
    try:
        features = model.features(torch.zeros(2, 3, IMAGE_SIZE, IMAGE_SIZE))
        logits = model.logits(features)
    except RuntimeError as error:  # shapes that do not fit
        return f"parts that take images [B, 3, 32, 32], one after the other ({first_line(error)})"
    network.train(was_training)
    if features.dim() != 2 or len(features) != 2:
        return f"features of shape [B, D], not {[*features.shape]} for 2 images"
    if logits.shape != (2, num_classes):
        return f"logits of shape [B, {num_classes}], not {[*logits.shape]} for 2 images"
    return None


def margin(logits, labels, of_others=torch.logsumexp):
    """Returns logit[label] - logsumexp(the other logits), [B]: the log-odds of the label.

    With `of_others=torch.amax` it is the difference to the largest of the others (Pleiss et al.
    2020, section 3.1).
    """
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return logits.gather(1, labels[:, None]).squeeze(1) - of_others(others, 1)


# ---- The code that scores depend on --------------------------------------------------------------
#
# Factors and scores are cached by a hash of the model, the data, the settings and this code. Hashed
# is what Python compiled, which runs, and not the files: somebody may have edited them since.
# Comments, layout and the docstrings of functions do not change it.

CONSTANTS = (bool, int, float, complex, str, bytes, type(None), torch.dtype)


def code_digest(model):
    """Returns the SHA-256, as hex digits, of the code that decides the scores of a network.

    That is InfluenceRun, the standardisation of images, the classes of the network's modules, the
    function in MODELS, and whatever these name in their own files. `str(model)` tells the rest:
    the settings of torch's own layers.
    """
    waiting = [InfluenceRun, ImageData.normalize, *network_code(model)]
    seen = {}  # by id; holds the values, so that no id is given twice
    texts = [str(model)]
    while waiting:
        value = waiting.pop()
        if isinstance(value, CONSTANTS):
            texts.append(repr(value))
        elif id(value) not in seen:
            seen[id(value)] = value
            waiting += parts_of(value)
    return sha256("\n".join(texts))


def network_code(model):
    """Returns the classes of a network's modules, and the function of MODELS that constructed it.

    Classes of torch and torchvision are left out: the version of torch tells their code.
    """
    classes = {}  # a dictionary keeps their order
    for module in model.modules():
        for cls in type(module).__mro__:
            if not is_of_library(cls):
                classes[cls] = None
    return [*classes, getattr(model, "constructed_by", None)]


def is_of_library(value):
    """Returns whether a function or class belongs to torch, torchvision or Python."""
    package = str(value.__module__).partition(".")[0]
    return package in {"torch", "torchvision", *sys.stdlib_module_names}


def is_code(value):
    """Returns whether a value is a function or a class."""
    return isinstance(value, (types.FunctionType, type))


def parts_of(value):
    """Returns what a function, class or container consists of; nothing of other values."""
    if is_code(value) and is_of_library(value):
        return []
    for kind, parts in PARTS.items():
        if isinstance(value, kind):
            return parts(value)
    return []


def parts_of_code(code, docstring=None):
    """Returns the instructions, names and constants of compiled code, without the docstring."""
    constants = [constant for constant in code.co_consts if constant != docstring]
    return [code.co_code, code.co_names, code.co_varnames, *constants]


def parts_of_function(function):
    """Returns the code, default values and closure of a function, and what it names in its file."""
    closure = [cell.cell_contents for cell in function.__closure__ or ()]
    values = [function.__defaults__, function.__kwdefaults__, *closure]
    for name in names_in(function.__code__):
        value = function.__globals__.get(name)
        if not is_code(value) or value.__module__ == function.__module__:
            values.append(value)
    return parts_of_code(function.__code__, function.__doc__) + values


def names_in(code):
    """Returns the global names and attributes in compiled code, and in functions inside it."""
    names = list(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names += names_in(constant)
    return names


def parts_of_class(cls):
    """Returns the methods and constants of a class, and its base classes of the same file."""
    parts = [base for base in cls.__bases__ if base.__module__ == cls.__module__]
    for name, member in vars(cls).items():
        if isinstance(member, types.FunctionType) or not name.startswith("__"):
            parts.append(member)
    return parts


PARTS = {
    types.CodeType: parts_of_code,
    types.FunctionType: parts_of_function,
    types.MethodType: lambda method: [method.__func__],
    (staticmethod, classmethod): lambda method: [method.__func__],
    property: lambda attribute: [attribute.fget],
    cached_property: lambda attribute: [attribute.func],
    partial: lambda call: [call.func, call.args, call.keywords],
    type: parts_of_class,
    (tuple, list): list,
    dict: lambda entries: [*entries.items()],
    (set, frozenset): lambda members: sorted(map(repr, members)),
    Tensor: lambda tensor: [sha256(tensor)],
}


# ---- Checkpoints ---------------------------------------------------------------------------------


def checkpoint_path(checkpoint_dir, fraction, noisy=False, cleaned=False):
    """Returns the path of the checkpoint of a training.

    It used the corruption `fraction` (None or 0: none), or `noisy` labels from a file. A `cleaned`
    one used corrections as well.
    """
    if noisy:
        name = "model_noisy"
    elif fraction:
        name = f"model_corrupt_{fraction}"
    else:
        name = "model"
    if cleaned:
        name += "_cleaned"
    return Path(checkpoint_dir) / f"{name}.pth"


def save_checkpoint(path, model, metadata):
    """Writes weights and `metadata` (numbers, strings, lists, dicts, tensors), whole or not at all.

    The metadata must tell `model`, the name in MODELS.
    """
    weights = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    content = io.BytesIO()  # so that a full disk fails as an OSError, not inside torch
    torch.save({"weights": weights, "metadata": metadata}, content)
    with atomic_path(path) as temporary:
        temporary.write_bytes(content.getbuffer())


def load_checkpoint(path, device="cpu"):
    """Returns the model in eval mode on `device`, and the metadata, of a checkpoint of train.py.

    Raises UserError where there is no checkpoint, where the file is something else, or where MODELS
    has no such network.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"there is no checkpoint {path}{checkpoints_beside(path)}: "
            "run train.py with the same data flags first"
        )
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        metadata = checkpoint["metadata"]
        if not metadata.keys() >= {"model", "margins", "given_labels"}:
            raise ValueError("written by an earlier train.py")
        if metadata["model"] not in MODELS:
            raise UserError(
                f"{path} holds a network '{metadata['model']}', which MODELS does not have: "
                "add it there, or train again"
            )
        model = construct_model(metadata["model"], len(metadata["class_names"]))
        model.load_state_dict(checkpoint["weights"])
    except (OSError, UserError):
        raise
    except Exception as error:  # a foreign file can fail in any way
        reason = f"{first_line(error):.100}"
        raise UserError(
            f"{path} is not a whole checkpoint of train.py ({reason}): train again"
        ) from error
    return model.to(device, memory_format=torch.channels_last).eval(), metadata


def checkpoints_beside(path):
    """Returns which checkpoints lie beside a missing one, as a part of a sentence."""
    names = sorted(other.name for other in path.parent.glob("model*.pth"))
    if not names:
        return ""
    if len(names) > 3:
        names = [*names[:3], "…"]
    return f", only {', '.join(names)}"


def load_trained(path, device, clean, *, model_name, fraction, labels_file=None):
    """Loads a checkpoint that was trained on `clean`, the images as loaded, and prints which one.

    `model_name` is the network in MODELS. `fraction` of the labels were corrupted, or they came
    from the `labels_file` of `--noisy_labels`. Returns the model, its metadata, and the
    ImageData that it was trained on. Raises UserError where any of these was another one.
    """
    model, metadata = load_checkpoint(path, device)
    if metadata["model"] != model_name:
        raise UserError(
            f"{path} was trained with --model {metadata['model']}, not {model_name}: "
            "give that, or train again"
        )
    data = clean
    is_same = metadata["num_loaded"] == len(clean) and has_labels_of(metadata, labels_file)
    if is_same:
        data = training_examples(clean, fraction, metadata["given_labels"], metadata["cleaning"])
        trained_on = metadata["data_sha256"], metadata["class_names"]
        is_same = trained_on == (data.digest, data.class_names)
    if not is_same:
        flag = "corrupt_percentage" if metadata["noisy_labels"] is None else "noisy_labels"
        raise UserError(
            f"{path} was trained on other images or labels ({metadata['num_train']} of "
            f"{metadata['dataset']}, --{flag} {metadata[flag]} as it was then): "
            "give its data flags, or train again"
        )
    if is_main_process():
        print(
            f"{path}: trained on {len(data)} images ({data.is_corrupted.sum()} corrupted labels), "
            f"test accuracy {100 * metadata['accuracy']['test']:.2f} %"
        )
    return model, metadata, data


# ---- Influence: what is measured, and in which precision -----------------------------------------


class ClassificationTask(Task):
    """Cross-entropy as training loss, and minus the margin as what influence is measured on.

    With that sign a positive score means: training on this image more would raise the query's
    margin. A batch is (images float [B, 3, 32, 32], labels int64 [B], uniforms float32 [B]).
    `layer_names` are those of the layers that kronfluence tracks, None for all that it can.
    """

    def __init__(self, layer_names=None):
        self.layer_names = layer_names

    def compute_train_loss(self, batch, model, sample=False):
        """Returns the summed cross-entropy, with `sample` against pseudo-labels.

        Pseudo-labels are drawn from the model's own distribution: the class in whose part of the
        cumulative distribution the example's uniform number falls. So a pseudo-label depends
        neither on the other images of the batch nor on the process.
        """
        images, labels, uniforms = batch
        logits = model(images)
        if sample:
            cumulative = logits.detach().softmax(1).cumsum(1)  # (B, num_classes)
            labels = (cumulative < uniforms[:, None]).sum(1).clamp(max=logits.shape[1] - 1)
        return F.cross_entropy(logits, labels, reduction="sum")

    def compute_measurement(self, batch, model):
        """Returns minus the summed margin (Park et al. 2023, "TRAK", section 3.3, sign changed)."""
        images, labels, _ = batch
        return -margin(model(images), labels).sum()

    def get_influence_tracked_modules(self):
        """Returns the names of the layers to track, for kronfluence."""
        return self.layer_names


class InfluenceDataset(torch.utils.data.Dataset):
    """ImageData as kronfluence reads it: whole batches by index.

    Each example comes with a uniform random number, which draws its pseudo-label.
    """

    def __init__(self, data, seed):
        self.data, self.seed = data, seed
        uniforms = torch.rand(len(data), generator=torch.Generator().manual_seed(seed))
        self.uniforms = uniforms.to(data.labels.device)

    def __len__(self):
        return len(self.data)

    def __getitems__(self, indices):
        indices = torch.as_tensor(indices, device=self.data.labels.device)
        images = self.data.normalize(self.data.images[indices])
        return images, self.data.labels[indices], self.uniforms[indices]


def cpu_features():
    """Returns the processor's capabilities by name; an older torch tells only those used here."""
    if hasattr(torch.cpu, "get_capabilities"):
        return torch.cpu.get_capabilities()
    return {
        "avx512_bf16": torch.cpu._is_avx512_bf16_supported(),
        "amx_bf16": torch.cpu._is_amx_tile_supported(),
    }


def configure_precision(precision, device):
    """Sets torch's global precision for a `--precision` value, and returns the compute dtype.

    That is torch.float32 or torch.bfloat16. CUDA may round what stays float32 to TF32 only beside
    bfloat16. Sums inside a product of bfloat16 matrices stay float32.
    """
    if precision == "auto":
        if device.type == "cuda":
            fast = torch.cuda.get_device_capability(device) >= (8, 0)
        else:
            fast = any(cpu_features().get(name) for name in ("avx512_bf16", "amx_bf16"))
        precision = "bf16" if fast else "fp32"
    float32 = "tf32" if precision == "bf16" else "ieee"
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.fp32_precision = float32
    torch.backends.cudnn.conv.fp32_precision = float32
    return torch.bfloat16 if precision == "bf16" else torch.float32


def computation_dtypes(dtype, strategy):
    """Returns the dtype of each kind of computation, by name, for a compute dtype and strategy."""
    sums = torch.promote_types(dtype, torch.float32)
    return SimpleNamespace(
        # Per-sample gradients, their rotations, a layer's part of a pairwise score, and the passes
        # of self-influence. Other passes are float32 (TF32 on CUDA beside bfloat16): rankings by
        # pairwise scores do not survive bfloat16.
        products=dtype,
        # The inputs of a covariance's product, which a CPU rounds inside the product. EKFAC fits
        # its eigenvalues anew. KFAC inverts the covariances, whose small eigenvalues rounding
        # would drown.
        covariances=dtype if strategy == "ekfac" else sums,
        # Over positions, images and layers. A sum in bfloat16 stops growing after some hundred
        # terms, and scores tie.
        sums=sums,
    )


# ---- Influence: per-sample gradients -------------------------------------------------------------
#
# A layer with input patches a [B, T, I] and output gradients g [B, T, O] (T positions) has the
# per-sample gradients G = sum_t g_t a_t^T, [B, O, I]. EKFAC (George et al. 2018, section 3) needs
# them in the eigenbasis Q_G, Q_A of the two covariances, R = Q_G^T G Q_A. kronfluence forms G and
# rotates it there and back; the trackers below form it where it is needed. Where the strategy has
# no eigenvectors (diagonal, identity), nothing is rotated.
#
# tracker              of a batch                                       shape
# CovarianceSums       sum over B and T of a a^T and of g g^T           [I, I], [O, O]
# LambdaSums           sum over B of R^2: EKFAC's eigenvalues times N   [O, I]
# SelfInfluence        sum over O and I of R^2 / (lambda + damping)     [B]
# PreconditionedQuery  P = Q_G (R / (lambda + damping)) Q_A^T           [Q, O, I]
# PairwiseInfluence    sum over O and I of P G                          [Q, B]
#
# In a convolution with `groups`, an output sees only the I inputs of its own group. Then patches
# are [B, groups, T, I], G is still [B, O, I], and the covariance of a is also summed over groups.

CACHED_ELEMENTS = 2**20  # 4 MB in float32
# Measured: smaller blocks leave less to compute, larger ones run faster.
SYMMETRIC_BLOCKS = {"cpu": 256, "cuda": 512}


def padding_sides(layer):
    """Returns a convolution's padding as torch's F.pad takes it: (left, right, top, bottom)."""
    if layer.padding == "valid":
        return 0, 0, 0, 0
    if layer.padding == "same":
        height, width = (
            dilation * (size - 1)
            for dilation, size in zip(layer.dilation, layer.kernel_size, strict=True)
        )
        left, top = width // 2, height // 2
        return left, width - left, top, height - top
    rows, columns = layer.padding
    return columns, columns, rows, rows


def patches(layer, inputs):
    """Returns the input patches (im2col) per output position, with a column of ones for a bias.

    inputs: [B, C, H, W] of a convolution, or [B, ..., I] of a linear layer, whose positions are all
    its middle dimensions. Returns [B, T, I], or [B, groups, T, I] of a convolution with groups.

    Patches, and with them the factors, are ordered (row, column, channel), not (channel, row,
    column) as kronfluence's: so they are copied in runs of channels from channels-last memory.
    """
    if isinstance(layer, nn.Linear):
        a = inputs.reshape(len(inputs), -1, inputs.shape[-1])
    else:
        a = convolution_patches(layer, inputs)
    return a if layer.bias is None else F.pad(a, (0, 1), value=1)


def convolution_patches(layer, inputs):
    """Returns the patches of a convolution, [B, T, I] or [B, groups, T, I], as `patches` says."""
    left, right, top, bottom = padding_sides(layer)
    if layer.padding_mode == "zeros":
        images = F.pad(inputs.permute(0, 2, 3, 1), (0, 0, left, right, top, bottom))
    else:
        padded = F.pad(inputs, (left, right, top, bottom), mode=layer.padding_mode)
        images = padded.permute(0, 2, 3, 1)  # (B, H, W, C)
    windows = images
    for axis in (0, 1):
        size, stride, dilation = layer.kernel_size[axis], layer.stride[axis], layer.dilation[axis]
        windows = windows.unfold(axis + 1, dilation * (size - 1) + 1, stride)[..., ::dilation]
    # windows: (B, H', W', C, kernel height, kernel width)
    batch, height, width, channels = windows.shape[:4]
    if layer.groups == 1:
        return windows.permute(0, 1, 2, 4, 5, 3).reshape(batch, height * width, -1)
    windows = windows.unflatten(3, (layer.groups, channels // layer.groups))
    windows = windows.permute(0, 3, 1, 2, 5, 6, 4)  # (B, groups, H', W', height, width, C / groups)
    return windows.reshape(batch, layer.groups, height * width, -1)


def by_position(layer, gradient):
    """Returns the gradient of a layer's output, [B, O, H', W'] or [B, ..., O], as [B, T, O]."""
    if isinstance(layer, nn.Linear):
        return gradient.reshape(len(gradient), -1, gradient.shape[-1])
    return gradient.flatten(2).mT


def per_sample_gradient(a, g):
    """Returns G, [B, O, I], of g [B, T, O] and of a [B, T, I], or [B, groups, T, I]."""
    if a.dim() == 3:
        return g.mT @ a
    g = g.mT.unflatten(1, (a.shape[1], -1))  # (B, groups, O / groups, T)
    return (g @ a).flatten(1, 2)


def rotated_gradient(a, g, q_a, q_g):
    """Returns Q_G^T G Q_A, [B, O, I].

    q_a [I, I] and q_g [O, O] hold eigenvectors in columns; both are None for no rotation.
    """
    if q_a is None:
        return per_sample_gradient(a, g)
    if a.dim() == 4:  # Q_G mixes the outputs of all groups
        return q_g.T @ (per_sample_gradient(a, g) @ q_a)
    g = g @ q_g
    # T * I^2 multiplications for the patches, or O * I^2 for the gradient
    if a.shape[1] < g.shape[2]:
        return g.mT @ (a @ q_a)
    return g.mT @ a @ q_a


def symmetric_product(rows):
    """Returns rows^T rows, [I, I], of rows [R, I], on CUDA in float32 also of bfloat16 ones.

    Computes the blocks from the diagonal on, and mirrors them.
    """
    wide = {"out_dtype": torch.float32} if rows.dtype == torch.bfloat16 else {}
    product = rows.new_empty(rows.shape[1], rows.shape[1], dtype=wide.get("out_dtype", rows.dtype))
    block = SYMMETRIC_BLOCKS[rows.device.type]
    for start in range(0, len(product), block):
        end = start + block
        product[start:end, start:] = torch.mm(rows[:, start:end].T, rows[:, start:], **wide)
        product[end:, start:end] = product[start:end, end:].T
    return product


def squares(gradient, dtype):
    """Yields the squares of gradients [B, O, I] in `dtype`.

    On a CPU it yields parts that stay in its cache, which saves a fifth of the time.
    """
    part = len(gradient)
    if not gradient.is_cuda:
        part = max(1, CACHED_ELEMENTS // gradient[0].numel())
    for gradients in gradient.split(part):
        yield gradients.to(dtype).square()


@contextlib.contextmanager
def rounded_products(enabled):
    """Lets products of float32 matrices round their inputs to bfloat16 on a CPU, never on CUDA.

    Their sums stay float32.
    """
    cpu, cuda = torch.backends.mkldnn.matmul, torch.backends.cuda.matmul
    before = cpu.fp32_precision, cuda.fp32_precision
    cpu.fp32_precision = "bf16" if enabled else "ieee"
    cuda.fp32_precision = "ieee"
    try:
        yield
    finally:
        cpu.fp32_precision, cuda.fp32_precision = before


class BatchHooks:
    """Hands each batch's patches a and output gradients g to `update(a, g)`, in shapes as above.

    A mixin for kronfluence's trackers, whose modules carry the run's `dtypes`, as
    `computation_dtypes` returns them.
    """

    def input_dtype(self, is_cuda):
        return self.module.dtypes.products

    def register_hooks(self):
        layer = self.module.original_module

        def forward_hook(module, inputs, outputs):
            activation = inputs[0].detach()
            outputs.register_hook(lambda gradient: backward_hook(activation, gradient))

        @torch.no_grad()
        def backward_hook(activation, gradient):
            dtype = self.input_dtype(gradient.is_cuda)
            g = by_position(layer, gradient.to(dtype))
            self.update(patches(layer, activation.to(dtype)), g)

        self.registered_hooks.append(self.module.register_forward_hook(forward_hook))

    def factors(self, g):
        """Returns Q_A [I, I], Q_G [O, O] and 1 / (lambda + damping) [O, I].

        They are None where the strategy has none. They are moved once to the device of g,
        eigenvectors also to its dtype.
        """
        storage = self.module.storage
        places = {
            constants.ACTIVATION_EIGENVECTORS_NAME: g,
            constants.GRADIENT_EIGENVECTORS_NAME: g,
            constants.LAMBDA_MATRIX_NAME: g.device,
        }
        for name, place in places.items():
            if storage[name] is not None:
                storage[name] = storage[name].to(place)
        return [storage[name] for name in places]

    def add(self, name, value):
        """Adds to a factor that is zero at first."""
        storage = self.module.storage
        storage[name] = value if storage[name] is None else storage[name].add_(value)


class CovarianceSums(BatchHooks, CovarianceTracker):
    def input_dtype(self, is_cuda):
        return self.module.dtypes.covariances if is_cuda else self.module.dtypes.sums

    def update(self, a, g):
        activations = a.flatten(0, -2)  # (B * T, or B * groups * T, I)
        gradients = g.flatten(0, 1)  # (B * T, O)
        with rounded_products(self.module.dtypes.covariances == torch.bfloat16):
            a_product, g_product = symmetric_product(activations), symmetric_product(gradients)
        self.add(constants.ACTIVATION_COVARIANCE_MATRIX_NAME, a_product)
        self.add(constants.GRADIENT_COVARIANCE_MATRIX_NAME, g_product)
        a_count, g_count = torch.tensor([len(activations)]), torch.tensor([len(gradients)])
        self.add(constants.NUM_ACTIVATION_COVARIANCE_PROCESSED, a_count)
        self.add(constants.NUM_GRADIENT_COVARIANCE_PROCESSED, g_count)


class LambdaSums(BatchHooks, LambdaTracker):
    def update(self, a, g):
        q_a, q_g, _ = self.factors(g)
        for squared in squares(rotated_gradient(a, g, q_a, q_g), self.module.dtypes.sums):
            self.add(constants.LAMBDA_MATRIX_NAME, squared.sum(0))
        self.add(constants.NUM_LAMBDA_PROCESSED, torch.tensor([len(g)]))


class SelfInfluence(BatchHooks, SelfScoreTracker):
    def update(self, a, g):
        q_a, q_g, weights = self.factors(g)
        gradient = rotated_gradient(a, g, q_a, q_g)
        scores = [
            squared.sum((1, 2)) if weights is None else squared.flatten(1) @ weights.flatten()
            for squared in squares(gradient, self.module.dtypes.sums)
        ]
        self.module.storage[constants.SELF_SCORE_VECTOR_NAME] = torch.cat(scores)


class PreconditionedQuery(BatchHooks, PreconditionTracker):
    """Rotates back, so that no training gradient needs a rotation."""

    def update(self, a, g):
        q_a, q_g, weights = self.factors(g)
        gradient = rotated_gradient(a, g, q_a, q_g)
        if weights is not None:
            gradient.mul_(weights)
        if q_a is not None:
            gradient = q_g @ gradient @ q_a.T
        self.module.storage[constants.PRECONDITIONED_GRADIENT_NAME] = gradient

    def accumulate_iterations(self):
        """Keeps the batches of queries in a list: joining them would copy and hold them twice."""
        storage, held = self.module.storage, constants.ACCUMULATED_PRECONDITIONED_GRADIENT_NAME
        storage[held] = [*(storage[held] or []), storage[constants.PRECONDITIONED_GRADIENT_NAME]]
        storage[constants.PRECONDITIONED_GRADIENT_NAME] = None


class PairwiseInfluence(BatchHooks, PairwiseScoreTracker):
    def update(self, a, g):
        storage = self.module.storage
        gradient = per_sample_gradient(a, g).flatten(1)  # (B, O*I)
        # A list of (Q', O, I)
        queries = storage[constants.ACCUMULATED_PRECONDITIONED_GRADIENT_NAME]
        scores = torch.cat([batch.flatten(1) @ gradient.T for batch in queries])
        storage[constants.PAIRWISE_SCORE_MATRIX_NAME] = scores.to(self.module.dtypes.sums)


def install_trackers(module, dtypes):
    """Gives a TrackedModule the trackers above, and zero for eigenvalues rounded below zero."""

    def prepare_storage(device, prepare=module.prepare_storage):
        for name in (constants.ACTIVATION_EIGENVALUES_NAME, constants.GRADIENT_EIGENVALUES_NAME):
            if module.storage[name] is not None:
                module.storage[name].clamp_(min=0)
        prepare(device)

    module.dtypes, module.prepare_storage = dtypes, prepare_storage
    module._trackers |= {
        ModuleMode.COVARIANCE: CovarianceSums(module),
        ModuleMode.LAMBDA: LambdaSums(module),
        ModuleMode.SELF_SCORE: SelfInfluence(module),
        ModuleMode.PRECONDITION_GRADIENT: PreconditionedQuery(module),
        ModuleMode.PAIRWISE_SCORE: PairwiseInfluence(module),
    }


# ---- Influence: which layers are tracked ---------------------------------------------------------
#
# Influence is computed for the weights and biases of Conv2d and Linear layers. That their
# per-sample gradients are right is checked on two images of the data, before anything is computed.

CHECKED_IMAGES = 2
LARGEST_ERROR = 0.01  # of the norm of a gradient: far above rounding, also TF32's


class LayerCall:
    """One call of a layer: its input, and the gradient of its output, a sum over backward passes.

    Like the trackers, it gets the gradient by a hook: later the output may be changed in place.
    """

    def __init__(self, inputs, output):
        self.inputs = inputs.detach()
        self.gradient = torch.zeros_like(output, requires_grad=False)
        if output.requires_grad:
            output.register_hook(self.add)

    def add(self, gradient):
        self.gradient += gradient


def find_tracked_layers(model, images):
    """Returns the names of the layers that influence is computed for, in the order of the model.

    Those are the Conv2d and Linear layers (no subclasses) that `model` uses. One pass on `images`,
    [B, 3, 32, 32], compares their per-sample gradients, as the trackers form them, with autograd's.
    Raises UserError that names the layer where these differ, or where there is no layer.
    """
    kinds = (nn.Conv2d, nn.Linear)
    layers = {name: layer for name, layer in model.named_modules() if type(layer) in kinds}
    if not layers:
        raise UserError("the network has no Conv2d or Linear layer: influence needs at least one")
    calls, gradients = differentiate(model, layers, images)
    tracked = []
    for name, layer in layers.items():
        exact = [layer_gradient(of_image, name) for of_image in gradients]
        if exact[0] is None:  # the layer does not take part in the logits
            continue
        reason = refusal(model, layer, calls[name], exact)
        if reason:
            raise UserError(f"influence cannot be computed for the layer '{name}': {reason}")
        tracked.append(name)
    return tracked


def differentiate(model, layers, images):
    """Returns each layer's LayerCalls, by name, and each image's gradients by autograd.

    Differentiated is, for each image, a sum of its logits with different weights: unlike that of a
    loss, its gradient does not vanish where the network is certain of a class. The gradients are
    those of all parameters by name, None of those that take no part.
    """
    model.requires_grad_(True)
    calls = {name: [] for name in layers}

    def record(name):
        return lambda _, inputs, output: calls[name].append(LayerCall(inputs[0], output))

    hooks = [layer.register_forward_hook(record(name)) for name, layer in layers.items()]
    parameters = dict(model.named_parameters(remove_duplicate=False))
    with torch.enable_grad():
        logits = model(images)
        values = logits @ torch.linspace(1, 2, logits.shape[1]).to(logits)
    gradients = []
    for value in values:
        found = torch.autograd.grad(
            value, [*parameters.values()], retain_graph=True, allow_unused=True
        )
        gradients.append(dict(zip(parameters, found, strict=True)))
    for hook in hooks:
        hook.remove()
    return calls, gradients


def layer_gradient(gradients, name):
    """Returns a layer's gradient, [O, I], in the order of `patches`, from those by parameter.

    None where its weight takes no part.
    """
    weight, bias = gradients.get(f"{name}.weight"), gradients.get(f"{name}.bias")
    if weight is None:
        return None
    if weight.dim() == 4:
        weight = weight.permute(0, 2, 3, 1).flatten(1)
    return weight if bias is None else torch.cat([weight, bias[:, None]], 1)


def refusal(model, layer, calls, exact):
    """Returns why the trackers would be wrong for a layer, and what to do; None if they are right.

    calls: the layer's LayerCalls in one pass; exact: its gradients [O, I] by autograd, per image.
    """
    names = [name for name, other in model.named_modules(remove_duplicate=False) if other is layer]
    if len(names) > 1:
        return f"it is also registered as '{names[1]}'; register it once"
    if len(calls) != 1:
        return f"it is called {len(calls)} times in one pass; call each layer exactly once"
    (call,) = calls
    rows = len(call.inputs)
    if rows != len(exact):
        return (
            f"the first dimension of its input is {rows} for {len(exact)} images; "
            "keep the images in the first dimension"
        )
    found = per_sample_gradient(patches(layer, call.inputs), by_position(layer, call.gradient))
    for image, expected in zip(found, exact, strict=True):
        if (image - expected).norm() > LARGEST_ERROR * expected.norm():
            return (
                "its gradients are not those of its input and output; "
                "do not share or recompute its weight, and do not mix images"
            )
    return None


def fixed_parameters(model, tracked):
    """Returns what influence takes as fixed, as text: parameters that no tracked layer holds.

    Modules of torch.nn are counted by kind, other parameters named. Empty where there are none.
    """
    kinds, names = Counter(), []
    for name, module in model.named_modules():
        own = [parameter for parameter, _ in module.named_parameters(recurse=False)]
        if not own or name in tracked:
            continue
        if type(module).__module__.startswith("torch.nn"):
            kinds[type(module).__name__] += 1
        else:
            names += [f"{name}.{parameter}".removeprefix(".") for parameter in own]
    shown = [f"{count} {kind}" for kind, count in kinds.items()] + names[:3]
    if len(names) > 3:
        shown.append(f"{len(names) - 3} more")
    return ", ".join(shown)


# ---- Influence: factors and scores ---------------------------------------------------------------

FACTORS_SEED = 17  # draws --factor_examples
CPU_QUERY_BYTES = 2 * 2**30  # keeps a run on the CPU below 6 GB
# Queries per backward pass; --query_batch_size says of how many the gradients are held.
QUERY_CHUNK = 50


class InfluenceRun:
    """Influence by kronfluence's Analyzer, for one model and its training images.

    Factors and scores are cached in `folder`, `<path>-<fingerprint>`, by a hash of all that they
    depend on. `model`, on the device of `data`, stays as it is. Factors are fitted on
    `factor_examples` images drawn at random, a number or "all"; `seed` draws the pseudo-labels.
    `batch_size` is 64 by default, on CUDA 1,024. `seconds` gets the times by phase. `fixed` names
    the parameters that influence takes as fixed. With the strategy "none" there is only the folder,
    and any network will do. Raises UserError, before anything is written, where influence cannot be
    computed for a layer, or `folder` cannot be made.
    """

    def __init__(
        self,
        model,
        data,
        path,
        *,
        strategy,
        dtype,
        seed,
        seconds,
        batch_size=None,
        factor_examples="all",
    ):
        self.model, self.data, self.seconds = model, data, seconds
        self.strategy, self.dtype = strategy, dtype
        self.dtypes = computation_dtypes(dtype, strategy)
        self.batch_size = batch_size or (1024 if data.images.is_cuda else 64)
        weights = [
            part for name, tensor in sorted(model.state_dict().items()) for part in (name, tensor)
        ]
        fingerprint = sha256(*weights, data.digest)
        self.folder = Path(f"{path}-{fingerprint[:8]}")
        if strategy == NO_INFLUENCE:
            self.fixed = ""
            make_folder(self.folder)
            return
        self.dataset = InfluenceDataset(data, seed)
        self.factor_dataset = self.draw_factor_examples(factor_examples)
        tracked_model, layer_names = self.track_layers()
        self.fixed = fixed_parameters(model, layer_names)
        layers = [model.get_submodule(name) for name in layer_names]
        self.num_weights = sum(weight.numel() for layer in layers for weight in layer.parameters())
        self.depends_on = [fingerprint, code_digest(model), strategy, str(dtype), seed]
        self.depends_on += [len(self.factor_dataset), version("torch"), version("kronfluence")]
        make_folder(self.folder)
        self.analyzer = Analyzer(
            self.folder.name,
            tracked_model,
            ClassificationTask(),
            cpu=not data.images.is_cuda,
            output_dir=str(self.folder.parent),
        )
        self.analyzer.set_dataloader_kwargs(DataLoaderKwargs(collate_fn=lambda batch: batch))

    def draw_factor_examples(self, count):
        """Returns a data set of `count` random training images, or of all if there are no more."""
        total = len(self.dataset)
        if count == "all" or count >= total:
            return self.dataset
        generator = torch.Generator().manual_seed(FACTORS_SEED)
        chosen = torch.randperm(total, generator=generator)[:count]
        return torch.utils.data.Subset(self.dataset, chosen.tolist())

    def track_layers(self):
        """Returns a copy of the model whose layers have our trackers, and the layers' names."""
        images, _, _ = self.dataset.__getitems__(range(min(CHECKED_IMAGES, len(self.dataset))))
        model = copy.deepcopy(self.model).eval()
        layer_names = find_tracked_layers(model, images)
        tracked_model = prepare_model(model, ClassificationTask(layer_names))
        for module in tracked_model.modules():
            if isinstance(module, TrackedModule):
                install_trackers(module, self.dtypes)
        return tracked_model, layer_names

    def from_main(self, value):
        """Returns the main process's `value` in every process."""
        values, state = [value], self.analyzer.state
        if state.use_distributed:
            torch.distributed.broadcast_object_list(values, device=state.device)
        return values[0]

    def computed(self, kind, settings, compute):
        """Returns the folder of factors or scores, made by `compute(name, batch_size)` if missing.

        Its name holds the hash of all that it depends on. It is made under another name and renamed
        when complete, so a folder of that name is complete.
        """
        digest = sha256(json.dumps([*self.depends_on, *settings]))
        dtype = str(self.dtype).removeprefix("torch.")
        final = self.folder / f"{kind}_{self.strategy}-{dtype}-{digest[:16]}"
        main = is_main_process()
        if main:
            remove_if_damaged(final)
        if self.from_main(final.exists()):
            if main:
                print(f"Reusing {final}")
            return final
        unfinished = self.folder / self.from_main(f"{kind}_unfinished-{secrets.token_hex(8)}")
        try:
            # kronfluence puts "factors_" or "scores_" before the name that it is given.
            self.compute_in_batches(partial(compute, unfinished.name.partition("_")[2]))
            self.analyzer.state.wait_for_everyone()
            if main:
                with contextlib.suppress(OSError):  # another run was faster, with the same result
                    unfinished.rename(final)
            self.analyzer.state.wait_for_everyone()
        finally:
            if main:
                shutil.rmtree(unfinished, ignore_errors=True)
        return final

    def compute_in_batches(self, compute):
        """Calls `compute(batch_size)`, again with half the batch size while memory is full.

        Under torchrun a full memory is an error: the other processes would wait.
        """

        def attempt(batch_size):
            if batch_size < self.batch_size:
                print(f"Out of memory; going on with batches of {batch_size}")
            compute(batch_size)

        with no_compiler_reset():
            if self.analyzer.state.use_distributed:
                attempt(self.batch_size)
            else:
                find_executable_batch_size(attempt, self.batch_size)

    @contextlib.contextmanager
    def phase(self, phase, name):
        """Times the block as a phase.

        Raises NumericalError where factors or scores of that name are not finite.
        """
        with timed(self.seconds, phase):
            yield
            self.analyzer.state.wait_for_everyone()
            for path in sorted(self.folder.glob(f"*_{name}/*.safetensors")):
                for layer, tensor in load_file(path).items():
                    if not tensor.isfinite().all():
                        where = f"in the phase '{phase}' ({path.stem} of {layer})"
                        remedy = "raise --damping_factor, or train with a lower --learning_rate"
                        raise NumericalError(f"NaN or infinity {where}: {remedy}")

    def fit_factors(self):
        """Fits the factors that the strategy needs, and returns their folder.

        Those are covariances, their eigendecompositions, and lambda.
        """
        args = FactorArguments(
            strategy=self.strategy, covariance_max_examples=None, lambda_max_examples=None
        )

        def compute(name, batch_size):
            images = self.factor_dataset
            with self.phase("covariance", name):
                self.analyzer.fit_covariance_matrices(name, images, batch_size, factor_args=args)
            with self.phase("eigendecomposition", name):
                self.analyzer.perform_eigendecomposition(name, args)
            with self.phase("lambda", name):
                self.analyzer.fit_lambda_matrices(name, images, batch_size, factor_args=args)

        return self.computed("factors", [], compute)

    def score_arguments(self, damping_factor, **settings):
        """Returns kronfluence's ScoreArguments for a damping factor, a number or "heuristic".

        The identity has nothing to damp. Our trackers know the other dtypes.
        """
        if self.strategy == "identity":
            damping_factor = 0.0
        elif damping_factor == "heuristic":
            damping_factor = None  # kronfluence's word for it
        return ScoreArguments(
            damping_factor=damping_factor, precondition_dtype=self.dtypes.sums, **settings
        )

    def self_influence(self, damping_factor):
        """Returns the self-influence of every training image, float32 [num_train], and its file.

        `damping_factor` is a number or "heuristic". Raises NumericalError where a score is NaN.
        """
        factors_name = self.fit_factors().name.removeprefix("factors_")
        rounded = self.dtypes.products != self.dtypes.sums
        args = self.score_arguments(
            damping_factor, amp_dtype=self.dtypes.products if rounded else None
        )

        def compute(name, batch_size):
            with self.phase("scores", name):
                self.analyzer.compute_self_scores(
                    name, factors_name, self.dataset, batch_size, score_args=args
                )

        folder = self.computed("scores_self", ["self", args.damping_factor], compute)
        path = folder / "self_scores.safetensors"
        return load_file(path)[constants.ALL_MODULE_NAME], path

    def queries_held(self, query_batch_size):
        """Returns of how many queries this process holds the preconditioned gradients at a time.

        That is `query_batch_size`, on a CPU at most as many as fit into CPU_QUERY_BYTES. Each
        process also gets the gradients of the others.
        """
        if not self.data.images.is_cuda:
            fitting = CPU_QUERY_BYTES // (self.num_weights * self.dtype.itemsize)
            query_batch_size = min(query_batch_size, fitting)
        return max(1, query_batch_size // self.analyzer.state.num_processes)

    def pairwise_influence(self, query_data, query_batch_size, damping_factor):
        """Returns the influence of each training image on each query, and its file.

        Scores are float32 [num_query, num_train]. `query_batch_size` query gradients (9 MB each in
        float32) are held at a time, on a CPU at most 2 GB of them. The training gradients are
        formed anew for each such batch. `damping_factor` is a number or "heuristic". Raises
        NumericalError where a score is NaN.
        """
        factors_name = self.fit_factors().name.removeprefix("factors_")
        held = self.queries_held(query_batch_size)
        steps = math.ceil(held / QUERY_CHUNK)
        chunk = min(held // steps, len(query_data))
        queries = InfluenceDataset(query_data, self.dataset.seed)
        args = self.score_arguments(damping_factor, query_gradient_accumulation_steps=steps)

        def compute(name, batch_size):
            with self.phase("scores", name):
                self.analyzer.compute_pairwise_scores(
                    name,
                    factors_name,
                    queries,
                    self.dataset,
                    max(1, chunk * batch_size // self.batch_size),
                    batch_size,
                    score_args=args,
                )

        settings = ["pairwise", args.damping_factor, query_data.digest]
        folder = self.computed("scores_pairwise", settings, compute)
        path = folder / "pairwise_scores.safetensors"
        return load_file(path)[constants.ALL_MODULE_NAME], path


@contextlib.contextmanager
def no_compiler_reset():
    """Lets torch.compiler.reset do nothing in the block.

    kronfluence calls it after each stage. That imports the compiler, for nothing: it takes 0.8 s,
    from a slow disk 6 s.
    """
    reset = torch.compiler.reset
    torch.compiler.reset = lambda: None
    try:
        yield
    finally:
        torch.compiler.reset = reset


def remove_if_damaged(folder):
    """Removes the folder of factors or scores if one of its files was damaged, and says which.

    Of tensors only the header and the size of the file are checked. Files that a person added, of
    other kinds or hidden, are ignored.
    """
    for path in sorted([*folder.glob("[!.]*.safetensors"), *folder.glob("[!.]*.json")]):
        try:
            if path.suffix == ".json":
                json.loads(path.read_text())
            else:
                # Raises if the file is shorter or longer than its header says.
                with safe_open(path, "pt"):
                    pass
        except (SafetensorError, ValueError):
            print(f"{path} is damaged: it is computed again")
            shutil.rmtree(folder)
            return


def load_runs(args, seconds):
    """Returns what the flags of `influence_parser` name, ready to compute influence.

    That is an InfluenceRun for each model, the metadata of each, and their training images,
    ImageData on the CPU. Raises UserError where models were not trained alike, or one comes twice.
    """
    device = choose_device(args.device, several_processes=True)
    dtype = configure_precision(args.precision, device)
    print_machine(device, dtype)
    clean = load_data(
        args.dataset, args.dataset_dir, "train", args.num_train_examples, args.output_dir
    )
    noisy = args.noisy_labels is not None
    paths = [
        checkpoint_path(folder, args.corrupt_percentage, noisy, args.cleaned)
        for folder in args.checkpoint_dir
    ]
    models, metadata, data = load_models(
        paths,
        device,
        clean,
        model_name=args.model,
        fraction=args.corrupt_percentage,
        labels_file=args.noisy_labels,
    )
    on_device = data.to(device)
    runs = [
        InfluenceRun(
            model,
            on_device,
            Path(args.output_dir) / paths[0].stem,
            strategy=args.factor_strategy,
            dtype=dtype,
            seed=args.seed,
            seconds=seconds,
            batch_size=args.train_batch_size,
            factor_examples=args.factor_examples,
        )
        for model in models
    ]
    require_different_models(runs)
    if runs[0].fixed and is_main_process():
        print(f"Influence takes these parameters as fixed: {runs[0].fixed}")
    return runs, metadata, data


def require_different_models(runs):
    """Raises UserError where two InfluenceRuns have the same weights, and so the same folder."""
    if len({run.folder for run in runs}) < len(runs):
        raise UserError(
            "--checkpoint_dir: two of these folders hold the same model: name each model once"
        )


def load_models(paths, device, clean, *, model_name, fraction, labels_file):
    """Returns the models of several checkpoints, their metadata, and the images they trained on.

    The other arguments are those of `load_trained`. Raises UserError where models were not trained
    alike.
    """
    models, metadata = [], []
    for path in paths:
        model, of_model, data = load_trained(
            path,
            device,
            clean,
            model_name=model_name,
            fraction=fraction,
            labels_file=labels_file,
        )
        models.append(model)
        metadata.append(of_model)
    for path, of_model in zip(paths, metadata, strict=True):
        for key, words in (("data_sha256", "training images or labels"), ("recipe", "recipe")):
            if of_model[key] != metadata[0][key]:
                raise UserError(
                    f"--checkpoint_dir: {path} and {paths[0]} differ in their {words}: "
                    "give models that were trained alike"
                )
    return models, metadata, data


# ---- Results -------------------------------------------------------------------------------------

PHASES = ("load", "covariance", "eigendecomposition", "lambda", "scores", "report")
MAX_NAME = 16  # characters of a class name in a figure


@contextlib.contextmanager
def timed(seconds, phase):
    """Adds the wall-clock seconds of the block to those of one of PHASES in a dictionary."""
    start = time.perf_counter()
    yield
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - start


def result_folder(runs):
    """Returns the folder for tables and figures: that of the run, or a new one for several runs."""
    if len(runs) == 1:
        return runs[0].folder
    names = [run.folder.name for run in runs]
    model_name = names[0].rpartition("-")[0]
    return runs[0].folder.with_name(f"{model_name}_mean_of_{len(runs)}-{sha256(*names)[:8]}")


def peak_memory_bytes(device):
    """Returns the peak of CUDA memory, or of resident memory on a CPU; None on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    in_bytes = sys.platform == "darwin"  # elsewhere in kilobytes
    return peak if in_bytes else 1024 * peak


def environment(device):
    """Returns the peak of memory so far, the hardware and the versions, as a dictionary."""
    if device.type == "cuda":
        device_name = torch.cuda.get_device_name(device)
    else:
        device_name = cpu_features().get("cpu_name") or platform.machine()
    return {
        "peak_memory_bytes": peak_memory_bytes(device),
        "device": device.type,
        "device_name": device_name,
        "cpu_threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "kronfluence": version("kronfluence"),
            "numpy": version("numpy"),
        },
    }


def write_record(path, *, flags, fields, device, seconds):
    """Writes the json record of a run: flags, `fields`, seconds, memory, hardware, versions.

    Raises ValueError where a field is NaN or infinite.
    """
    by_phase = {phase: round(seconds.get(phase, 0.0), 3) for phase in PHASES}
    by_phase["total"] = round(sum(seconds.values()), 3)
    record = {"flags": flags, **fields, "seconds": by_phase, **environment(device)}
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n")


@contextlib.contextmanager
def recorded(path, *, flags, fields, device, seconds):
    """Writes the json record of a run before the block, and again after it with the final seconds.

    The block draws figures. Where one fails, the record is there already.
    """
    values = {"flags": flags, "fields": fields, "device": device, "seconds": seconds}
    write_record(path, **values)
    yield
    write_record(path, **values)


def print_seconds(seconds):
    """Prints the seconds by phase and their sum."""
    by_phase = ", ".join(f"{phase} {seconds.get(phase, 0.0):.1f}" for phase in PHASES)
    print(f"{sum(seconds.values()):.1f} s in all: {by_phase}")


def print_paths(paths):
    """Prints the paths of scores and of other results, one a line."""
    for path in paths:
        if path.suffix == ".safetensors":
            print(f"scores in {path}")
        else:
            print(f"wrote {path}")


def write_table(path, columns, rows):
    """Writes rows under the names of their columns to a csv file, whole or not at all."""
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)


def import_matplotlib():
    """Returns matplotlib, imported without the user's MPLBACKEND.

    matplotlib refuses to be imported where that names a backend which is not installed, as
    notebooks do for the processes that they start. Figures that are only saved need none.
    """
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    return matplotlib


@contextlib.contextmanager
def figure_file(path, width, height):
    """Yields a matplotlib figure, `width` by `height` inches, and saves it as a png file.

    The file is written whole or not at all. It does not depend on the user's matplotlib settings.
    Letters of other scripts are drawn where a font for them is installed.
    """
    matplotlib = import_matplotlib()
    from matplotlib import font_manager
    from matplotlib.figure import Figure

    installed = {font.name for font in font_manager.fontManager.ttflist}
    wide_fonts = sorted(name for name in installed if "CJK" in name or "Uni" in name)
    style = dict(matplotlib.rcParamsDefault)
    style["font.family"] = ["DejaVu Sans", *wide_fonts]
    style["text.parse_math"] = False  # a class name may hold a $
    with matplotlib.rc_context(style), atomic_path(path) as temporary:
        figure = Figure((width, height))
        yield figure
        figure.savefig(temporary, format="png", dpi=150, bbox_inches="tight")


# Pixels of a contact sheet's cell, and the height of the text at its top.
CELL_WIDTH, CELL_HEIGHT, TEXT_HEIGHT = 42, 54, 19
PIXELS_PER_INCH = 33


def draw_contact_sheet(path, images, texts, colours, columns, title):
    """Draws images as one png file, `columns` in a row, each below its text in its colour.

    images: uint8 [N, 3, 32, 32]; texts: at most three lines each.
    """
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    sheet = np.full((rows * CELL_HEIGHT, columns * CELL_WIDTH, 3), 255, np.uint8)
    width = columns * CELL_WIDTH / PIXELS_PER_INCH
    height = rows * CELL_HEIGHT / PIXELS_PER_INCH
    with figure_file(path, width, height) as figure:
        axes = figure.add_axes((0, 0, 1, 1))
        axes.axis("off")
        for place, (image, text, colour) in enumerate(zip(images, texts, colours, strict=True)):
            row, column = divmod(place, columns)
            top = row * CELL_HEIGHT + TEXT_HEIGHT
            left = column * CELL_WIDTH + (CELL_WIDTH - IMAGE_SIZE) // 2
            pixels = image.permute(1, 2, 0).cpu().numpy()  # (32, 32, 3)
            sheet[top : top + IMAGE_SIZE, left : left + IMAGE_SIZE] = pixels
            axes.text(
                left + IMAGE_SIZE / 2,
                top - 1,
                text,
                fontsize=8,
                color=colour,
                ha="center",
                va="bottom",
            )
        axes.imshow(sheet, interpolation="nearest")
        figure.text(0.5, 1.01, title, fontsize=11, ha="center", va="bottom")


def shorten(name):
    """Returns a name, or both ends of one that is longer than 16 characters."""
    if len(name) <= MAX_NAME:
        return name
    return f"{name[:8]}…{name[-7:]}"
