"""Code that the scripts share. Its sections stand in the order in which a run needs them:

command line ► code as part of hashes ► files ► images and labels ► label corruption and cleaning ►
csv files ► networks ► code that scores depend on ► checkpoints ► influence ► results.
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
import unicodedata
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from importlib.metadata import version
from importlib.util import resolve_name
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote

# The text of this file when it is imported, since the file may be edited during a run. Caches of
# images and of scores depend on it (`code_of`, `code_digest`). It is None if there is only compiled
# code; `run` refuses that.
SOURCE = __spec__.loader.get_source(__name__)

import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock, Timeout
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.module.tracked_module import ModuleMode, TrackedModule
from kronfluence.module.tracker.factor import CovarianceTracker, LambdaTracker
from kronfluence.module.tracker.gradient import GradientTracker
from kronfluence.module.tracker.pairwise_score import PairwiseScoreTracker
from kronfluence.module.tracker.precondition import PreconditionTracker
from kronfluence.module.tracker.self_score import SelfScoreTracker
from kronfluence.module.utils import (
    get_tracked_module_names,
    prepare_modules,
    set_factors,
    set_mode,
    update_factor_args,
    update_score_args,
)
from kronfluence.task import Task
from kronfluence.utils import constants
from kronfluence.utils.dataset import DataLoaderKwargs, find_executable_batch_size
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

# ---- Command line --------------------------------------------------------------------------------

STRATEGIES = ("ekfac", "kfac", "diagonal", "identity")
EIGENVECTOR_STRATEGIES = ("ekfac", "kfac")
NO_INFLUENCE = "none"  # used in place of a strategy: no influence is computed
CHECKPOINT_DIR = "./checkpoints"
# Parts of messages about full memory. kronfluence raises the last one if even a single image does
# not fit.
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
    """A mistake that only the user can correct. Its text is one sentence that shows what to do."""

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
        read_own_sources()
        return main()
    except UserError as error:
        status = error.status
        message = f"error: {error}"
    except KeyboardInterrupt:
        status = 130
        message = "interrupted; no file is half-written, so run the same command again"
    except (OSError, SafetensorError) as error:  # a full disk, a file that may not be written
        status = 1
        message = f"error: {first_line(error)}; no file is half-written"
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
# A layer keeps at least one eigenvector. With fewer than 10,000 inputs, 0.0001 already keeps just
# one, so a smaller fraction would change nothing.
kept_fraction = number(float, "a fraction from 0.0001 to 1", lambda value: 1e-4 <= value <= 1)


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
        help="fraction of the training labels to corrupt, such as 0.1; give every script the same "
        "value (default: 0)",
    )
    labels.add_argument(
        "--noisy_labels",
        metavar="CSV",
        help="file with the labels to train on: columns path and label; if the images have no "
        "files, give the column index instead of path: the position in the complete data set, "
        "counted from 0 (default: the labels of the data set)",
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
        help="directory of the trained model; with several directories, results are means over "
        f"their models (default: {CHECKPOINT_DIR})",
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
        help="number of training images per step when scores are computed; it need not be that of "
        "train.py (default: 64, on a GPU 1024)",
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
        help="seed of the labels that are sampled to estimate the Fisher matrix "
        "(default: %(default)s)",
    )


def add_pairwise_flags(group, purpose):
    """Adds the flags that make pairwise scores faster; purpose: what the scores are for."""
    group.add_argument(
        "--eigenvector_fraction",
        type=kept_fraction,
        default=1.0,
        metavar="FRACTION",
        help=f"{purpose}, keep only this fraction of the eigenvectors of each layer's input "
        "covariance, those with the largest eigenvalues: faster, with less memory "
        "(default: %(default)s, all)",
    )
    group.add_argument(
        "--index",
        action="store_true",
        help=f"{purpose}, keep the gradients of all training images in files, in bfloat16: later "
        "runs, with another --damping_factor or other queries, read them in place of passing over "
        "the images; advisable with a low --eigenvector_fraction",
    )


def check_pairwise_flags(parser, args):
    """Ends the script with status 2 if the flags for pairwise scores cannot be combined."""
    has_eigenvectors = args.factor_strategy in EIGENVECTOR_STRATEGIES
    if args.eigenvector_fraction < 1 and not has_eigenvectors:
        parser.error(
            f"argument --eigenvector_fraction: {args.factor_strategy} has no eigenvectors; "
            "choose another strategy"
        )
    if args.index and number_of_processes() > 1:
        parser.error("argument --index: one process makes the index; start it without torchrun")


def command(script, args, **values):
    """Returns the command that runs a script with the shared flags of `args` and other `values`.

    It omits a flag whose value is None or False. It also omits a shared flag, and
    `--checkpoint_dir`, if the value is the default.
    """
    shared = vars(shared_parser("").parse_args([]))
    defaults = {**shared, "checkpoint_dir": CHECKPOINT_DIR}
    flags = {name: getattr(args, name) for name in shared}
    flags.update(values)
    words = ["python", script]
    for name, value in flags.items():
        if value is None or value is False or value == defaults.get(name):
            continue
        if value is True:
            words.append(f"--{name}")
        elif str(value).startswith("-"):  # argparse would take it for a flag
            words.append(f"--{name}={value}")
        else:
            words += [f"--{name}", str(value)]
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
    `cuda` without a usable GPU. With several processes, it is also raised if the run is on the CPU
    (kronfluence sums over processes only on GPUs), if the script cannot share its work, or if a
    process lacks its own GPU.
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
    if not on_gpu:
        return torch.device("cpu")
    if count == 1:
        # An earlier torchrun may have left LOCAL_RANK. With it, kronfluence waits for processes.
        os.environ.pop("LOCAL_RANK", None)
        return torch.device("cuda", 0)
    local_rank = os.environ.get("LOCAL_RANK")  # torchrun sets it: which GPU the process may use
    if not local_rank or int(local_rank) >= torch.cuda.device_count():
        raise UserError(
            "each process needs its own GPU: start them with torchrun, as many as there are GPUs"
        )
    return torch.device("cuda", int(local_rank))


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
    remedy = "install the torch for the driver of this GPU, and unset CUDA_VISIBLE_DEVICES"
    return f"torch cannot use the NVIDIA GPU ({reason}): {remedy}"


def print_machine(device, dtype):
    """Prints the hardware and the dtype of the computation.

    On the CPU, it also prints why torch cannot use the machine's GPU, if that is so.
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


# ---- Code as part of a hash ----------------------------------------------------------------------


def code_of(*names):
    """Returns one text: the syntax trees of functions and classes of this file, as imported.

    Decoded images and scores are cached by a hash that includes code (`read_images`,
    `score_code`). A changed comment or docstring leaves these caches valid.
    """
    definitions = parse_code(SOURCE).body
    kinds = (ast.FunctionDef, ast.ClassDef)
    code = {node.name: ast.dump(node) for node in definitions if isinstance(node, kinds)}
    return "\n".join(code[name] for name in names)


def parse_code(text):
    """Returns the syntax tree of Python code without docstrings; it never contains comments."""
    tree = ast.parse(text)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, documented) and ast.get_docstring(node) is not None:
            del node.body[0]
    return tree


# ---- Files: complete or not at all ---------------------------------------------------------------


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
            tensor = part.detach().cpu().contiguous()
            if tensor.dtype == torch.bfloat16:  # numpy does not have it
                tensor = tensor.view(torch.int16)
            digest.update(tensor.numpy())
    return digest.hexdigest()


# ---- Images and labels ---------------------------------------------------------------------------

IMAGE_SIZE = 32
# Seeds of random choices that must be the same in every script, so --seed does not change them.
ORDER_SEED, EXAMPLES_SEED, CORRUPTION_SEED = 11, 12, 13
# The seed of a digit is three numbers: these two and the index of the digit in its split.
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
    the labels without corruption: those of the data set, or of corrections. class_names: one per
    class. paths: one text per image, which is empty if images have no files of their own.
    indices: int64 [N] on the CPU, positions among the loaded images, for tables and corrections.
    dataset_indices: int64 [N] on the CPU, positions in the whole data set, for `--noisy_labels`.
    num_available: number of images in the whole data set.
    channel_mean, channel_std: of red, green and blue, by which images are standardised.
    """

    images: Tensor
    labels: Tensor
    true_labels: Tensor
    class_names: list
    paths: list
    indices: Tensor
    dataset_indices: Tensor
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

    def take(self, positions):
        """Returns the examples at `positions`, an int64 tensor [M], in that order."""
        return replace(
            self,
            images=self.images[positions],
            labels=self.labels[positions],
            true_labels=self.true_labels[positions],
            paths=[self.paths[position] for position in positions.tolist()],
            indices=self.indices[positions],
            dataset_indices=self.dataset_indices[positions],
        )

    def without(self, positions):
        """Returns all examples except those at `positions`."""
        is_kept = torch.ones(len(self), dtype=torch.bool)
        is_kept[positions] = False
        return self.take(is_kept.nonzero().squeeze(1))

    def to(self, device):
        """Returns a copy with images and labels on `device`."""
        moved = replace(
            self,
            images=self.images.to(device),
            labels=self.labels.to(device),
            true_labels=self.true_labels.to(device),
        )
        # Fills the cached property: it is slow to compute, and the same on every device.
        vars(moved)["digest"] = self.digest
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
        class_names=[same_form(name) for name in source.class_names],
        paths=[paths[i] for i in chosen.tolist()],
        indices=torch.arange(len(chosen)),
        dataset_indices=chosen,
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
    require(are_strings and len(names) >= 2, "at least two class_names, which are strings")
    are_different = len(set(map(same_form, names))) == len(names)
    has_line_break = any(map(contains_line_break, names))
    require(are_different, "class_names that all differ")
    require(not has_line_break, "class_names without line breaks")
    is_decision = LEAVE_OUT in [name.strip() for name in names]
    require(not is_decision, f"no class named '{LEAVE_OUT}', which in reviews excludes an image")
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


def count_examples(data):
    """Returns, as text, the number of training images, and of labels that are known to be wrong."""
    num_corrupted = int(data.is_corrupted.sum())
    if num_corrupted == 0:
        return f"{len(data)} training images"
    return f"{len(data)} training images ({num_corrupted} with a wrong label)"


def print_duplicates(data, test):
    """Prints the numbers of copies with another label, and of test images that are training images.

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
    if cache_dir is not None:
        refuse_inside_data("--output_dir", cache_dir, dataset_dir)
    samples, class_names = split_samples(Path(dataset_dir), split)
    if split == "train" and is_main_process():
        counts = Counter(class_names[label] for _, label in samples)
        # Every class is listed: a folder that is there by mistake is most likely a small one.
        listed = ", ".join(f"{name} {count}" for name, count in counts.most_common())
        print(f"{len(class_names)} classes in {dataset_dir}: {listed}")
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
    target = Path(os.path.realpath(folder))  # `resolve` fails for links in a circle
    for split in ("train", "test"):
        top = Path(dataset_dir) / split
        # `top` counts even if it does not exist yet: a file written there would create it.
        image_folders = {Path(os.path.realpath(top))}
        if top.is_dir():  # links inside may lead to folders elsewhere
            _, listed, _ = list_files(top)
            image_folders |= listed
        if any(target.is_relative_to(image_folder) for image_folder in image_folders):
            raise UserError(f"{flag} {folder} lies among the images of {top}: name another folder")


def ten_largest(counts):
    """Returns a Counter as text: the ten largest counts, the number of others, the smallest."""
    parts = [f"{name} {count}" for name, count in counts.most_common()]
    if len(parts) > 10:
        parts = [*parts[:10], f"and {len(parts) - 10} others down to {parts[-1]}"]
    return ", ".join(parts)


def same_form(name):
    """Returns a name in one Unicode form: a Mac writes an ä as two characters, others as one."""
    return unicodedata.normalize("NFC", str(name))


def list_samples(folder, verbose):
    """Returns (path, label) of every file in class folders, sorted, and the names of the classes.

    Hidden and system folders and files are skipped, and files outside classes. If `verbose`, what
    is skipped is printed. Raises UserError if there are fewer than two classes, or if a folder
    cannot be listed. Also raises it if a class has no file, if `check_class_name` refuses its name,
    or if a link puts a folder into two classes.
    """
    if not folder.is_dir():
        raise UserError(
            f"--dataset imagefolder: {folder} must be a folder with a folder of images per class"
        )
    _, class_folders, stray_files = next(os.walk(folder, onerror=refuse_unlisted))
    skipped = set(class_folders) - set(visible(class_folders))
    samples, class_names, listed = [], [], set()
    for name in visible(class_folders):
        files, listed_here, skipped_here = list_files(folder / name)
        if listed_here & listed:
            raise UserError(
                f"--dataset imagefolder: {min(listed_here & listed)} belongs to {name} and to "
                "another class, by a link: remove the link"
            )
        if not files:
            raise UserError(
                f"--dataset imagefolder: {folder / name} holds no image: fill or remove it"
            )
        check_class_name(folder, name, class_names)
        samples.extend((path, len(class_names)) for path in files)
        class_names.append(same_form(name))
        listed |= listed_here
        skipped |= skipped_here
    if len(class_names) < 2:
        raise UserError(
            f"--dataset imagefolder: {folder} must hold at least 2 class folders, "
            f"not {len(class_names)}"
        )
    if visible(stray_files):
        skipped.add(f"{len(visible(stray_files))} files beside the class folders")
    if skipped and verbose:
        print(f"Skipped in {folder}: {', '.join(sorted(skipped))}")
    return samples, class_names


def check_class_name(folder, name, class_names):
    """Raises UserError if a class name is there twice, has a line break, or is LEAVE_OUT."""
    problem = ""
    if same_form(name) in class_names:
        problem = "has the same name as another class"
    elif contains_line_break(name):  # a row of a csv file could not contain it
        problem = "has a line break in its name"
    elif name.strip() == LEAVE_OUT:
        problem = "has the name by which a review leaves images out"
    if problem:
        raise UserError(
            f"--dataset imagefolder: {str(folder / name)!r} {problem}: rename or remove it"
        )


def contains_line_break(name):
    """Returns whether a name contains a line break, at its end too."""
    return len(f"{name}.".splitlines()) > 1  # the dot, because a break at the end is not counted


def list_files(folder):
    """Returns all files below a folder, the folders it lists, and the names of skipped folders.

    Files: a list of paths. Listed folders: a set of paths, with links resolved. Hidden and system
    folders are skipped. A folder that is reached again by a link is not listed again. Raises
    UserError if a folder cannot be listed.
    """
    paths, listed, skipped = [], set(), set()
    for parent, folders, files in os.walk(folder, onerror=refuse_unlisted, followlinks=True):
        real = Path(parent).resolve()
        if real in listed:
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
    # `lexists` is true for a broken link, which is a mistake: `list_samples` then reports it.
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
    for _, members in groupby(samples, key=itemgetter(1)):
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
    cache = None
    if cache_dir is not None:
        cache = Path(cache_dir) / "images" / f"{split}-{sha256(*listing)[:16]}.safetensors"
    if cache and cache.exists():
        require_readable(cache)
        try:
            return load_file(cache)["images"].numpy()
        except SafetensorError:
            print(f"{cache} is damaged: the images are read again")
    with ThreadPoolExecutor() as pool:  # Pillow decodes without holding Python's global lock
        decoded = pool.map(read_image, paths)
        progress = tqdm(decoded, f"Reading {split} images", len(paths), leave=False)
        images = np.stack(list(progress))
    if cache and is_main_process():
        with atomic_path(cache) as temporary:
            save_file({"images": torch.from_numpy(images)}, temporary)
    return images


def require_readable(path):
    """Raises an OSError if a file cannot be read, such as the file of another user.

    safetensors says of such a file that it does not exist.
    """
    with path.open("rb"):
        pass


def describe_file(path):
    """Returns path, size, times of change and inode of a file, as text.

    The inode shows that two files with equal sizes and times have swapped their names. Raises
    UserError if it is no regular file, or if its path is not UTF-8.
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
            # exif_transpose rewrites the EXIF bytes, and would fail if they are malformed. So they
            # are removed. Before that, getexif reads the tags into the image object, where
            # exif_transpose finds the orientation.
            with contextlib.suppress(Exception):
                image.getexif()
            for name in ("exif", "Raw profile type exif"):
                image.info.pop(name, None)
            ImageOps.exif_transpose(image, in_place=True)
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return np.asarray(image.convert("RGB").resize(size, Image.Resampling.BILINEAR))
    except UserError:
        raise
    except Exception as error:  # damaged files can raise any exception, even MemoryError
        advice = "remove or replace it"
        if is_out_of_memory(error):
            advice = f"free some memory, or {advice}"
        raise UserError(
            f"{path} is not a readable image ({first_line(error)}): {advice}"
        ) from error


def refuse_deep_colour(image, path):
    """Raises UserError if an opened, not yet loaded image has more than 8 bits per channel.

    Pillow silently keeps only the upper 8 bits of colour. If a camera used 12 of 16 bits, the image
    is then nearly black. Grey images are refused, too, because their brightest value is unknown.
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
        depth_offset = 2 + 2 + 8 * 4 + 2  # bytes of length, profile, 8 sizes, channel count
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
    if image_format != "PPM":
        return False
    largest = values[-1]  # the largest value that the header allows
    return isinstance(largest, int) and largest > 255


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


def training_examples(clean, fraction, given_labels=None, cleaning=None):
    """Returns the ImageData to train on.

    clean: the images with the labels of the data set. These are replaced by `given_labels`, int64
    [N], those of `--noisy_labels`. If that is None, a `fraction` of the labels is corrupted, as
    `--corrupt_percentage` requires. Then a `cleaning`, as `read_corrections` returns it, is
    applied. If it changes a label that was not corrupted, the new label counts as the true label.
    """
    if given_labels is None:
        given_labels, _ = corrupt_labels(clean.labels, fraction, len(clean.class_names))
    data = replace(clean, labels=given_labels)
    if cleaning is None:
        return data
    labels = data.labels.clone()
    for index, label in cleaning["new_labels"].items():
        labels[index] = label
    true_labels = torch.where(data.is_corrupted, data.true_labels, labels)
    return replace(data, labels=labels, true_labels=true_labels).without(cleaning["excluded"])


# ---- Labels and decisions in csv files -----------------------------------------------------------

LEAVE_OUT = "leave out"  # in the column new_label: excludes the image from the training
TEST_IMAGE = -1  # in place of the position of a training image: an image of the test split


class OtherImage(UserError):
    """A row names something that exists, but is not a loaded training image.

    It may be a test image, a training image that was not drawn, or another file.
    """


class NoSuchImage(UserError):
    """A row names a file or an index that does not exist."""


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
    stated = stated_delimiter(lines[0][1]) if lines else None
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


def stated_delimiter(line):
    """Returns the delimiter that a first line such as `sep=;` states to Excel, or None."""
    # A spreadsheet that saves the file again may write `"sep=;",,`.
    match = re.fullmatch(r'"?sep=([^\w"])"?[,;\t]*', line, re.IGNORECASE)
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
        # In `1, "x"`, the blank before the quote is most likely a mistake. In `1," ""x"""`, the
        # blank belongs to the cell, because it stands inside the outer quotes.
        has_blank_before_quote = cell[:1].isspace() and cell.lstrip().startswith('"')
        quoted_cell = '"' + cell.replace('"', '""') + '"'
        is_quoted_as_a_whole = quoted_cell in line
        if has_blank_before_quote and not is_quoted_as_a_whole:
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
        self.images += [(path, TEST_IMAGE) for path in test.paths if path]
        self.used = set()  # positions of images that had a row
        self.matched_by_last_parts = []  # a text for each row whose path was found by its end

    # The following dictionaries are slow to build, so each one is built when it is first needed.

    @cached_property
    def by_path(self):
        """Positions of images by path, with links to folders resolved."""
        return unique_positions(self.images, path_in_real_folder)

    @cached_property
    def by_target(self):
        """Positions of images by path, with all links resolved, since an image may be a link."""
        return unique_positions(self.images, os.path.realpath)

    @cached_property
    def by_relative_path(self):
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
        if position == TEST_IMAGE:
            raise OtherImage(f"{row_name}: {path} is a test image")
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
                "have an index in place of a file"
            )
        if not text:
            raise UserError(f"{row_name}: needs an index, a whole number from 0 on")
        # An index is `17` or `017`. Longer texts are refused, because int() fails for texts of more
        # than 4,300 digits.
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
        """Returns the position of the training image with a path, or TEST_IMAGE for a test image.

        Raises OtherImage for any other file, NoSuchImage if there is no such file, and UserError
        without a path.
        """
        if not path.strip():
            raise UserError(
                f"{row_name}: needs a path; an index is not accepted, since it means another image "
                "after files are added or removed"
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
        """Returns the position of the image that the last parts of a path name, or TEST_IMAGE.

        problem: the first part of the message. Raises OtherImage if they name another file below
        `--dataset_dir`, and NoSuchImage if they name no file.
        """
        endings = [ending for spelled in spellings(path) for ending in last_parts(spelled)]
        for ending in endings:
            position = self.by_relative_path.get(same_form(ending))
            if position is not None:
                self.matched_by_last_parts.append(f"{path} as {ending}")
                return position
        files = [f"{self.dataset_dir}/{ending}" for ending in endings]
        if any(map(os.path.isfile, files)):
            raise OtherImage(problem)
        raise NoSuchImage(f"{problem}, and there is no such file")

    def look_up(self, file):
        """Returns the position of the image in a file, TEST_IMAGE for a test image, or None."""
        if "\0" in file:  # a URL may encode it; no file has such a name
            return None
        position = self.by_path.get(same_form(path_in_real_folder(file)))
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


def path_in_real_folder(path):
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
    refuse_table_of_suspects(path, rows, data)
    finder = ExampleFinder(data, test, dataset_dir, data.dataset_indices, data.num_available)
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
    summary = f"changed labels: {ten_largest(changes)}" if changes else "no label is changed"
    print(f"{path}: {len(finder.used)} rows of training images, {num_others} of others; {summary}")
    return labels, file_hash


def refuse_table_of_suspects(path, rows, data):
    """Raises UserError if rows of suspects_*.csv would name other images than in that table.

    There, `index` is the position among the loaded images.
    """
    has_files = any(data.paths)
    is_table = any("duplicate_of" in row for _, row in rows)
    if is_table and not has_files and len(data) < data.num_available:
        raise UserError(
            f"--noisy_labels {path} is a table of suspects, whose index counts only the loaded "
            "images: write index as the position in the complete data set, and remove duplicate_of"
        )


def has_labels_of(metadata, path):
    """Returns whether a checkpoint was trained on the labels of a `--noisy_labels` file.

    metadata: of the checkpoint. path: None without the flag. The hash of a regular file is
    compared. Two cases cannot be compared: `path` is a pipe, such as `<(command)`, or it is the
    path that was given to train.py, and the file is gone. Then the labels in the checkpoint are
    used: a line is printed, and the result is True. Raises UserError if the file cannot be read for
    another reason.
    """
    trained_path = metadata["noisy_labels"]
    if path is None:
        return trained_path is None
    if trained_path is None:
        return False
    if Path(path).is_file():
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise unreadable_labels(path, error.strerror) from error
        return hashlib.sha256(content).hexdigest() == metadata["labels_sha256"]
    if Path(path).is_dir():
        raise unreadable_labels(path, "it is a folder")
    if not Path(path).exists() and path != trained_path:
        raise unreadable_labels(path, "no such file")
    # It is a pipe, or the file that train.py read and that is gone.
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
    row, and if a column `label` differs from the label before any cleaning. If images have no
    files, prints how many rows have no `label`, because nothing checks the index of these rows.
    """
    rows, _ = read_csv("--corrections", path, "new_label")
    finder = ExampleFinder(data, test, dataset_dir, data.indices, len(data))
    excluded, new_labels = [], {}
    decided = [(row_name, row) for row_name, row in rows if row["new_label"].strip()]
    if not decided:
        raise UserError(
            f"--corrections {path} decides nothing: write a class or '{LEAVE_OUT}' in new_label"
        )
    for row_name, row in decided:
        try:
            # The position is also the index: no image has been left out yet.
            index = finder.find(row_name, row)
        except (OtherImage, NoSuchImage) as error:
            raise UserError(f"{error}: correct or remove this row") from error
        require_given_label(row_name, row.get("label", ""), index, data)
        if row["new_label"].strip() == LEAVE_OUT:
            excluded.append(index)
        else:
            hint = f", nor '{LEAVE_OUT}'"
            new_labels[index] = find_class(row_name, row["new_label"], data.class_names, hint)
    finder.print_matches()
    print_cleaning(excluded, new_labels, len(rows) - len(decided), data)
    num_unchecked = sum(not row.get("label", "").strip() for _, row in decided)
    if num_unchecked and not any(data.paths):
        print(
            f"{num_unchecked} rows have no label, so their index is not checked: it must come from "
            "a run with the same data flags"
        )
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
            f"cleaning, not {name}: give the data flags that this file was made with, or remove "
            "its column label"
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


def conv_block(in_channels, out_channels, kernel_size=3, stride=1, padding=1):
    """Convolution without bias, batch-norm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


def resnet9(num_classes):
    """The ResNet-9 of the published example: 2.3 M parameters, 128 features."""
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
    """torchvision's ResNet-18 for small images: a 3x3 stem of stride 1, no max-pool; 512 features.

    Raises UserError if torchvision cannot be imported.
    """
    try:
        from torchvision import models
    except (ImportError, OSError, RuntimeError) as error:  # built for another version of torch
        raise UserError(
            f"--model resnet18: torchvision cannot be imported ({first_line(error)}): "
            "install the version for this torch, or use --model resnet9"
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
    """The two parts of a network of MODELS; the logits are float32, also under autocast."""

    def __init__(self, network):
        super().__init__()
        self.features = network.features
        self.head = network.head

    def forward(self, images):  # (B, 3, 32, 32) -> (B, num_classes)
        return self.logits(self.features(images))

    def logits(self, features):  # (B, D) -> (B, num_classes)
        # In bfloat16, logits of different images would be equal, and so would losses and margins.
        dtype = torch.promote_types(features.dtype, torch.float32)
        with torch.autocast(features.device.type, enabled=False):
            return self.head(features.to(dtype))


def construct_model(name, num_classes):
    """Returns the ImageClassifier of a `--model` with random weights, channels last in memory.

    Raises UserError if the function in MODELS returns something else than a network.
    """
    network = MODELS[name](num_classes)
    try:
        check_parts(network)
        check_tensors(network)
        check_logits(network, num_classes)
    except ValueError as error:
        raise UserError(f"--model {name}: its function in MODELS must return {error}") from error
    model = ImageClassifier(network)
    model.constructed_by = MODELS[name]  # for code_digest
    return model.to(memory_format=torch.channels_last)


def check_parts(network):
    """Raises ValueError if parts are missing.

    The error's text continues the sentence "must return ..." of `construct_model`.
    """
    if not isinstance(network, nn.Module):
        raise ValueError("a module of torch.nn")
    for part in ("features", "head"):
        if not isinstance(getattr(network, part, None), nn.Module):
            raise ValueError(
                f"a module with two modules, features and head, but {part} is no module"
            )


def check_tensors(network):
    """Raises ValueError if a parameter or a buffer cannot be used.

    The error's text continues the sentence "must return ..." of `construct_model`.
    """
    in_parts = {*network.features.parameters(), *network.head.parameters()}
    for name, parameter in network.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ValueError(f"layers whose sizes are given, but {name} has none yet")
        if parameter.dim() > 4:
            raise ValueError(f"layers for images, but {name} has {parameter.dim()} dimensions")
        if parameter not in in_parts:
            raise ValueError(
                f"features and head that hold all parameters, but {name} is in neither"
            )
    for name, value in network.state_dict().items():
        if not isinstance(value, Tensor):
            raise ValueError(f"a module whose state_dict holds tensors, but {name} is none")


@torch.no_grad()
def check_logits(network, num_classes):
    """Raises ValueError for logits of a wrong shape, and for logits that differ between passes.

    Also raises it if they differ from those of the network's own forward. The error's text
    continues the sentence "must return ..." of `construct_model`. The check uses a copy, because a
    forward pass may change the buffers of a module.
    """
    try:
        network = copy.deepcopy(network).eval()
    except RuntimeError as error:
        raise ValueError(f"a module that can be copied ({first_line(error)})") from error
    model = ImageClassifier(network)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    logits = compute_checked_logits(model, images, num_classes)
    if not computes(model, images, logits):
        raise ValueError(
            "a module without random numbers in eval mode (F.dropout needs training=self.training)"
        )
    has_forward = type(network).forward is not nn.Module.forward
    if has_forward and not computes(network, images, logits):
        raise ValueError("a module without a forward, or whose forward is head(features(images))")


def computes(network, images, logits):
    """Returns whether the forward of a network computes these logits of images."""
    try:
        found = network(images)
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return False
    is_comparable = isinstance(found, Tensor) and found.shape == logits.shape
    return is_comparable and torch.allclose(found, logits, rtol=1e-3, atol=1e-5)


def compute_checked_logits(model, images, num_classes):
    """Returns the logits of two images. Raises ValueError if a shape or a type is wrong."""
    try:
        features = model.features(images)
        if not isinstance(features, Tensor):
            raise ValueError(f"features returned a {type(features).__name__}")
        logits = model.logits(features)
        if not isinstance(logits, Tensor):
            raise ValueError(f"head returned a {type(logits).__name__}")
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:  # layers do not fit
        raise ValueError(
            "features that take images [B, 3, 32, 32], and a head that takes these features "
            f"({first_line(error)})"
        ) from error
    if features.dim() != 2 or len(features) != 2:
        raise ValueError(f"features of shape [B, D], not {[*features.shape]} for 2 images")
    if logits.shape != (2, num_classes):
        raise ValueError(f"logits of shape [B, {num_classes}], not {[*logits.shape]} for 2 images")
    return logits


def split_logits(logits, labels):
    """Returns the labels' logits, [B], and the other logits, [B, num_classes].

    The second result has -inf in place of the labels' logits.
    """
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return logits.gather(1, labels[:, None]).squeeze(1), others


def log_odds(logits, labels):
    """Returns the log-odds of each label, [B]: logit[label] - logsumexp(the other logits).

    logits: [B, num_classes]; labels: int64 [B]. Source: Park et al. 2023, "TRAK", section 3.3.
    """
    of_label, others = split_logits(logits, labels)
    return of_label - others.logsumexp(1)


def margin(logits, labels):
    """Returns the margin of each label, [B]: logit[label] minus the largest other logit.

    logits: [B, num_classes]; labels: int64 [B]. Source: Pleiss et al. 2020, section 3.1.
    """
    of_label, others = split_logits(logits, labels)
    return of_label - others.amax(1)


# ---- The code that scores depend on --------------------------------------------------------------
#
# Factors and scores are cached by a hash of the model, the data, the settings and the code. In
# pipeline.py, ImageData and the sections from "Networks" up to "Results" are hashed. If the classes
# of the network or its function in MODELS are in other files, these files are hashed completely,
# because helper functions and constants in them decide scores, too. So are the files that these
# files import, but not installed packages. Comments, layout and docstrings are not hashed.
#
# A file may be edited during a run, but the run keeps the code that it imported. So the files are
# read at the start of the run.

MODULE_TEXTS = {}  # the texts of Python files, by the name of the module
SETTING_TYPES = (bool, int, float, complex, str, bytes, type(None), torch.dtype)


def read_own_sources():
    """Reads the files of imported modules into MODULE_TEXTS, but not of installed packages."""
    for name, module in list(sys.modules.items()):
        if is_of_library(name):
            continue
        path = Path(getattr(module, "__file__", None) or "")
        is_installed = "site-packages" in path.parts or "dist-packages" in path.parts
        if path.suffix == ".py" and not is_installed:
            with contextlib.suppress(UserError):  # it may be a file that no score depends on
                source_of(name)


def is_of_library(module_name):
    """Returns whether a module belongs to torch, torchvision or Python.

    Only the version of torch is hashed; it determines the version of torchvision.
    """
    package = module_name.partition(".")[0]
    return package in {"torch", "torchvision", *sys.stdlib_module_names}


def code_digest(model, entry_points=()):
    """Returns the SHA-256, as hex digits, of the code and settings that decide a model's scores.

    Hashes `score_code`, the files of the network and of `entry_points` (functions and classes), the
    files that these import, and the settings of all layers. Raises UserError if a file cannot be
    read.
    """
    owners = [cls for module in model.modules() for cls in type(module).__mro__]
    owners += entry_points
    constructor = getattr(model, "constructed_by", None)
    if isinstance(constructor, partial):
        constructor = constructor.func
    if constructor is not None:
        owners.append(constructor)
    names = {owner.__module__ for owner in owners}
    names = with_imports({name for name in names if not is_of_library(name)})
    sources = [source_of(name) for name in sorted(names - {__name__})]
    files = [ast.dump(parse_code(source)) for source in sources]
    return sha256(score_code(), *files, settings_of(model))


def with_imports(names):
    """Returns the names of modules, and of all modules in MODULE_TEXTS that they import."""
    found, waiting = set(), {__name__, *names}  # a network in this file may use other files
    while waiting:
        name = waiting.pop()
        found.add(name)
        waiting |= imported_by(name) - found
    return found


def imported_by(name):
    """Returns the names of the modules in MODULE_TEXTS that a module imports, a set."""
    package = getattr(sys.modules.get(name), "__package__", None) or ""
    imported = set()
    for node in ast.walk(parse_code(source_of(name))):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parent = "." * node.level + (node.module or "")
            if node.level:
                parent = resolve_name(parent, package)
            imported.add(parent)
            imported |= {f"{parent}.{alias.name}" for alias in node.names}  # may be modules
    return imported & MODULE_TEXTS.keys()


def score_code():
    """Returns the code of pipeline.py that decides scores."""
    # str.index finds the two headings, because each follows a line break. It does not find the next
    # two lines: they contain a backslash and an n in place of the line break.
    start = SOURCE.index("\n# ---- Networks ---")
    end = SOURCE.index("\n# ---- Results ---")
    sections = ast.dump(parse_code(SOURCE[start:end]))
    return sections + code_of("ImageData")  # it standardises the images


def source_of(name):
    """Returns the text of a module's file, which is read only once.

    Raises UserError if the module has no readable file.
    """
    if name not in MODULE_TEXTS:
        path = Path(getattr(sys.modules.get(name), "__file__", None) or "")
        try:
            MODULE_TEXTS[name] = path.read_text(encoding="utf-8")
        except (OSError, UnicodeError) as error:
            raise UserError(
                f"the code of the network is part of a hash, but its module '{name}' has no "
                "readable file: put it into a .py file in UTF-8"
            ) from error
    return MODULE_TEXTS[name]


def settings_of(model):
    """Returns the names, classes and settings of all modules of a network, as text.

    Settings are attributes such as a stride or a constant factor.
    """
    lines = []
    for name, module in model.named_modules():
        settings = {key: value for key, value in vars(module).items() if is_setting(value)}
        settings.pop("training")  # influence is computed in eval mode
        lines.append(f"{name} {type(module).__qualname__} {settings}")
    return "\n".join(lines)


def is_setting(value):
    """Returns whether a value is a number, a string, None, a dtype, or a sequence of these."""
    if isinstance(value, (tuple, list)):
        return all(is_setting(item) for item in value)
    return isinstance(value, SETTING_TYPES)


# ---- Checkpoints ---------------------------------------------------------------------------------

# A checkpoint without one of these keys was written by an earlier train.py.
CHECKPOINT_KEYS = {"model", "margins", "given_labels"}
NUM_CHECKED_LOGITS = 8  # training images whose logits are kept in a checkpoint
LARGEST_LOGIT_ERROR = 0.05  # as a fraction of their norm; another device differs by less


def checkpoint_path(checkpoint_dir, fraction, noisy=False, cleaned=False):
    """Returns the path of the checkpoint of a training.

    `fraction` of the training labels were corrupted; None and 0 mean none. `noisy`: the labels came
    from a file. `cleaned`: the training used corrections.
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


def unfinished_path(checkpoint):
    """Returns the path of the state of an interrupted training, beside its checkpoint."""
    return Path(checkpoint).with_suffix(".unfinished")


def save_checkpoint(path, model, metadata):
    """Writes weights and `metadata` to a file. A failure leaves no incomplete file.

    The metadata may hold numbers, strings, lists, dictionaries and tensors. It must hold
    CHECKPOINT_KEYS; the value of "model" is the name in MODELS.
    """
    weights = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    content = io.BytesIO()  # if the disk is full, torch.save to a file raises no OSError
    torch.save({"weights": weights, "metadata": metadata}, content)
    with atomic_path(path) as temporary:
        temporary.write_bytes(content.getbuffer())


def load_weights(model, weights, path):
    """Puts the weights of a checkpoint into a network. Raises UserError if they do not fit."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(
            f"the weights in {path} do not fit its network, whose code may have changed since: "
            "train again, or undo the change"
        ) from error


def load_checkpoint(path, device="cpu"):
    """Returns the model of a checkpoint of train.py, in eval mode on `device`, and its metadata.

    Raises UserError if there is no checkpoint, if train.py did not write the file, or if MODELS
    does not contain the network.
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
        if not CHECKPOINT_KEYS.issubset(metadata):
            raise ValueError("written by an earlier train.py")
        if metadata["model"] not in MODELS:
            raise UserError(
                f"{path} holds a network '{metadata['model']}', which MODELS does not have: "
                "add it there, or train again"
            )
        model = construct_model(metadata["model"], len(metadata["class_names"]))
        load_weights(model, checkpoint["weights"], path)
    except (OSError, UserError):
        raise
    except Exception as error:  # torch.load may raise any exception for another kind of file
        if is_out_of_memory(error):
            raise MemoryError from error
        reason = f"{first_line(error):.100}"
        raise UserError(
            f"{path} is not a complete checkpoint of train.py ({reason}): train again"
        ) from error
    return model.to(device, memory_format=torch.channels_last).eval(), metadata


def checkpoints_beside(path):
    """Returns which checkpoints are in the folder of a missing checkpoint, as part of a sentence.

    The text is empty if there are none.
    """
    names = sorted(other.name for other in path.parent.glob("model*.pth"))
    if not names:
        return ""
    if len(names) > 3:
        names = [*names[:3], "…"]
    return f", only {', '.join(names)}"


def load_trained(path, device, clean, *, model_name, fraction, labels_file=None):
    """Returns a trained model, its metadata, and the ImageData that it was trained on.

    `clean` holds the training images with the labels of the data set. The model must be the network
    `model_name` of MODELS, trained on `clean` with a `fraction` of corrupted labels, or with the
    labels in the `labels_file` of `--noisy_labels`. Otherwise raises UserError. Prints a line.
    """
    model, metadata = load_checkpoint(path, device)
    if metadata["model"] != model_name:
        raise UserError(
            f"{path} was trained with --model {metadata['model']}, not {model_name}: "
            "give the flag that it was trained with, or train again"
        )
    if metadata["num_loaded"] != len(clean) or not has_labels_of(metadata, labels_file):
        raise other_data_error(path, metadata)
    data = training_examples(clean, fraction, metadata["given_labels"], metadata["cleaning"])
    if metadata["data_sha256"] != data.digest or metadata["class_names"] != data.class_names:
        raise other_data_error(path, metadata)
    require_same_logits(path, model, metadata, data)
    if is_main_process():
        print(
            f"{path}: trained on {count_examples(data)}, "
            f"test accuracy {100 * metadata['accuracy']['test']:.2f} %"
        )
        if unfinished_path(path).exists():
            print(f"{unfinished_path(path)} is of a training that has not ended: it is not used")
    return model, metadata, data


@torch.no_grad()
def logits_to_check(model, data):
    """Returns the logits of the first training images, float32 on the CPU, without autocast.

    model: in eval mode, on the device of `data`, ImageData.
    """
    images = data.normalize(data.images[:NUM_CHECKED_LOGITS].to(next(model.parameters()).device))
    return model(images).float().cpu()


def require_same_logits(path, model, metadata, data):
    """Raises UserError if a loaded model computes other logits than at the end of its training.

    The weights alone do not decide the logits: the code may have changed, or a tensor of the
    network may be no parameter and no persistent buffer, so that it is not in the checkpoint.
    """
    expected = metadata.get("logits_to_check")  # an earlier train.py did not keep them
    if expected is None:
        return
    error = (logits_to_check(model, data) - expected).norm()
    if error > LARGEST_LOGIT_ERROR * expected.norm():
        raise UserError(
            f"the network in {path} computes other logits than after its training: undo changes of "
            "its code, keep all its tensors in parameters or persistent buffers, or train again"
        )


def other_data_error(path, metadata):
    """Returns the UserError for a checkpoint that was trained on other images or labels."""
    if metadata["noisy_labels"] is None:
        labels = f"--corrupt_percentage {metadata['corrupt_percentage']}"
    else:
        labels = f"--noisy_labels {metadata['noisy_labels']}, a file that may have changed since"
    return UserError(
        f"{path} was trained on other images or labels ({metadata['num_train']} images of "
        f"{metadata['dataset']}, {labels}): give its data flags, or train again"
    )


def earlier_models(path, model, snapshots, num_wanted):
    """Returns the last `num_wanted` - 1 snapshots as networks, in the order of the training.

    model: the final network, which is one of those wanted. snapshots: a dictionary from epoch to
    weights by name. Raises UserError if there are too few.
    """
    num_kept = len(snapshots) + 1
    if num_wanted > num_kept:
        advice = f"give at most {num_kept}"
        if num_wanted <= 3:  # a training of four epochs or more keeps three networks
            advice += ", or train again, for four epochs or more"
        raise UserError(
            f"--snapshots {num_wanted}: {path} keeps {num_kept} networks of its training: {advice}"
        )
    num_skipped = num_kept - num_wanted  # the final network is among those kept and those wanted
    epochs = sorted(snapshots)[num_skipped:]
    if epochs and is_main_process():
        print(f"{path}: with the networks after epochs {', '.join(map(str, epochs))}")
    models = [copy.deepcopy(model) for _ in epochs]
    for earlier, epoch in zip(models, epochs, strict=True):
        earlier.load_state_dict(snapshots[epoch])
    return models


# ---- Influence: what is measured, and in which precision -----------------------------------------


class ClassificationTask(Task):
    """The training loss is the cross-entropy, and the measurement is minus the log-odds.

    With this sign, a positive score means: training on this image more would raise the log-odds of
    the query's label. A batch is (images float [B, 3, 32, 32], labels int64 [B], uniforms float32
    [B]). Uniforms are the random numbers that decide the pseudo-labels. `layer_names`: the layers
    that kronfluence tracks; None means all that it can track.
    """

    def __init__(self, layer_names=None):
        self.layer_names = layer_names

    def compute_train_loss(self, batch, model, sample=False):
        """Returns the summed cross-entropy; with `sample`, the labels are pseudo-labels.

        A pseudo-label is drawn from the model's predicted distribution: it is the first class whose
        cumulative probability is at least the example's uniform number. So a pseudo-label depends
        neither on the other images of the batch nor on the process.
        """
        images, labels, uniforms = batch
        logits = model(images)
        if sample:
            cumulative = logits.detach().softmax(1).cumsum(1)  # (B, num_classes)
            labels = (cumulative < uniforms[:, None]).sum(1).clamp(max=logits.shape[1] - 1)
        return F.cross_entropy(logits, labels, reduction="sum")

    def compute_measurement(self, batch, model):
        """Returns minus the summed log-odds of the labels.

        Source: Park et al. 2023, "TRAK", section 3.3; the sign is changed.
        """
        images, labels, _ = batch
        return -log_odds(model(images), labels).sum()

    def get_influence_tracked_modules(self):
        """Returns the names of the layers to track, for kronfluence."""
        return self.layer_names


class InfluenceDataset(torch.utils.data.Dataset):
    """ImageData as kronfluence reads it: a batch at a time, by the indices of its images.

    Each example has a uniform random number, which determines its pseudo-label.
    """

    def __init__(self, data, seed):
        self.data = data
        self.seed = seed
        uniforms = torch.rand(len(data), generator=torch.Generator().manual_seed(seed))
        self.uniforms = uniforms.to(data.labels.device)

    def __len__(self):
        return len(self.data)

    def __getitems__(self, indices):
        indices = torch.as_tensor(indices, device=self.data.labels.device)
        images = self.data.normalize(self.data.images[indices])
        return images, self.data.labels[indices], self.uniforms[indices]


def cpu_features():
    """Returns the processor's capabilities by name; with an older torch, only those used here."""
    if hasattr(torch.cpu, "get_capabilities"):
        return torch.cpu.get_capabilities()
    return {
        "avx512_bf16": torch.cpu._is_avx512_bf16_supported(),
        "amx_bf16": torch.cpu._is_amx_tile_supported(),
    }


def configure_precision(precision, device):
    """Sets torch's global precision for a `--precision` value, and returns the compute dtype.

    The dtype is torch.float32 or torch.bfloat16. If it is bfloat16, the products on CUDA that stay
    in float32 use TF32; otherwise they do not. Sums inside a product are always float32.
    """
    if precision == "auto":
        if device.type == "cuda":
            fast = torch.cuda.get_device_capability(device) >= (8, 0)
        else:
            fast = any(cpu_features().get(name) for name in ("avx512_bf16", "amx_bf16"))
        precision = "bf16" if fast else "fp32"
    float32_products = "tf32" if precision == "bf16" else "ieee"
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.fp32_precision = float32_products
    torch.backends.cudnn.conv.fp32_precision = float32_products
    return torch.bfloat16 if precision == "bf16" else torch.float32


def computation_dtypes(dtype, strategy):
    """Returns the dtypes `products`, `covariances`, `sums` for a compute dtype and a strategy."""
    sums = torch.promote_types(dtype, torch.float32)
    return SimpleNamespace(
        # `products` is the dtype of per-sample gradients, of rotated gradients, and of each layer's
        # pairwise scores.
        products=dtype,
        # `covariances` is the precision of the inputs of a covariance, which is a matrix product. A
        # GPU gets rounded inputs. A CPU gets float32 inputs, and rounds them during the product.
        # Rounding changes the small eigenvalues. This does no harm to EKFAC, which refits the
        # eigenvalues. KFAC inverts them, so it does not round.
        covariances=dtype if strategy == "ekfac" else sums,
        # `sums` is the dtype of factors, and of sums over positions, images and layers. After a few
        # hundred terms, a sum in bfloat16 stops growing, and scores become equal.
        sums=sums,
    )


# ---- Influence: per-sample gradients -------------------------------------------------------------
#
# A layer has input patches a [B, T, I] and output gradients g [B, T, O], with T positions. Its
# per-sample gradients are G = sum_t g_t a_t^T, [B, O, I]. EKFAC (George et al. 2018, section 3)
# needs them in the eigenbases Q_G, Q_A of the two covariances: R = Q_G^T G Q_A. kronfluence always
# computes G first, then R; our trackers choose the cheaper order of products. The strategies
# diagonal and identity have no eigenvectors, so R is G. M is the number of queries.
#
# tracker              result of a batch                                shape
# CovarianceSums       sum over B and T of a a^T and of g g^T           [I, I], [O, O]
# LambdaSums           sum over B of R^2                                [O, I]
# SelfInfluence        sum over O and I of R^2 / (lambda + damping)     [B]
# PreconditionedQuery  P = Q_G (R / (lambda + damping)) Q_A^T           [M, O, I]
# PairwiseInfluence    sum over O and I of P G                          [M, B]
# IndexedGradient      G, for a GradientIndex                           [B, O, I]
#
# The sum of LambdaSums over all batches is N times EKFAC's eigenvalues.
#
# Pairwise scores may keep only c columns of Q_A, those with the largest eigenvalues, and the same
# columns of lambda. Then P [M, O, c] is not rotated back on the input side, and PairwiseInfluence
# and IndexedGradient use G Q_A [B, O, c] in place of G. The result is EKFAC's score restricted to
# these eigenvectors. P takes c / I of the memory.
#
# In a convolution with `groups`, an output sees only the I inputs of its own group. Then patches
# are [B, groups, T, I], G is still [B, O, I], and the covariance of a is also summed over groups.

ELEMENTS_IN_CPU_CACHE = 2**20  # numbers that fit into the processor's cache, 4 MB in float32


def padding_sides(layer):
    """Returns a convolution's padding as torch's F.pad takes it: (left, right, top, bottom)."""
    if layer.padding == "valid":
        return 0, 0, 0, 0
    if layer.padding == "same":
        vertical = layer.dilation[0] * (layer.kernel_size[0] - 1)
        horizontal = layer.dilation[1] * (layer.kernel_size[1] - 1)
        left, top = horizontal // 2, vertical // 2
        return left, horizontal - left, top, vertical - top
    rows, columns = layer.padding
    return columns, columns, rows, rows


def patches(layer, inputs):
    """Returns the input patches (im2col) per output position, with a column of ones for a bias.

    inputs: [B, C, H, W] for a convolution; [B, ..., I] for a linear layer, whose positions are the
    middle dimensions. Returns [B, T, I], or [B, groups, T, I] for a convolution with groups.

    A patch is ordered (row, column, channel); kronfluence's order is (channel, row, column). In
    channels-last memory the channels are adjacent, so our order is faster to copy.
    """
    if isinstance(layer, nn.Linear):
        a = inputs.reshape(len(inputs), -1, inputs.shape[-1])
    else:
        a = convolution_patches(layer, inputs)
    return a if layer.bias is None else F.pad(a, (0, 1), value=1)


def convolution_patches(layer, inputs):
    """Returns a convolution's patches, [B, T, I] or [B, groups, T, I], without the bias's ones."""
    left, right, top, bottom = padding_sides(layer)
    # Zero padding works on any axes, so it keeps the channels-last memory. The other modes pad the
    # last two axes.
    if layer.padding_mode == "zeros":
        images = F.pad(inputs.permute(0, 2, 3, 1), (0, 0, left, right, top, bottom))
    else:
        padded = F.pad(inputs, (left, right, top, bottom), mode=layer.padding_mode)
        images = padded.permute(0, 2, 3, 1)  # (B, H, W, C)
    windows = images
    for axis in (0, 1):
        size, stride, dilation = layer.kernel_size[axis], layer.stride[axis], layer.dilation[axis]
        span = dilation * (size - 1) + 1  # pixels from one end of the kernel to the other
        windows = windows.unfold(axis + 1, span, stride)[..., ::dilation]
    # windows: (B, H', W', C, kernel height, kernel width)
    batch, height, width, channels = windows.shape[:4]
    if layer.groups == 1:
        return windows.permute(0, 1, 2, 4, 5, 3).reshape(batch, height * width, -1)
    windows = windows.unflatten(3, (layer.groups, channels // layer.groups))
    windows = windows.permute(0, 3, 1, 2, 5, 6, 4)  # (B, groups, H', W', height, width, C / groups)
    return windows.reshape(batch, layer.groups, height * width, -1)


def rotated_patches(layer, inputs, q_a):
    """Returns a Q_A: the patches in the basis of the eigenvectors, [B, T, c] or [B, groups, T, c].

    inputs, patches a: as for `patches`; the columns of q_a [I, c] are eigenvectors. A convolution
    with the eigenvectors as filters gives the same result, and is faster.
    """
    is_linear = isinstance(layer, nn.Linear)
    if is_linear or layer.groups > 1 or layer.padding_mode != "zeros":
        return patches(layer, inputs) @ q_a
    weights, bias = q_a, None
    if layer.bias is not None:  # then the last input is the column of ones
        weights, bias = q_a[:-1], q_a[-1]
    shape = (*layer.kernel_size, layer.in_channels)
    filters = weights.T.unflatten(1, shape)  # (c, rows, columns, channels)
    filters = filters.permute(0, 3, 1, 2)  # (c, channels, rows, columns)
    rotated = F.conv2d(inputs, filters, bias, layer.stride, layer.padding, layer.dilation)
    return by_position(layer, rotated)


def by_position(layer, output):
    """Reshapes a layer's output, or the gradient of its output, to [B, T, O].

    output: [B, O, H', W'] for a convolution, [B, ..., O] for a linear layer.
    """
    if isinstance(layer, nn.Linear):
        return output.reshape(len(output), -1, output.shape[-1])
    return output.flatten(2).mT


def gradient_size(layer):
    """Returns the number of rows O and the number of columns I of a layer's gradient."""
    return layer.weight.shape[0], layer.weight[0].numel() + (layer.bias is not None)


def per_sample_gradient(a, g):
    """Returns G, [B, O, I], from g [B, T, O] and a, which is [B, T, I] or [B, groups, T, I]."""
    if a.dim() == 3:
        return g.mT @ a
    g = g.mT.unflatten(1, (a.shape[1], -1))  # (B, groups, O / groups, T)
    return (g @ a).flatten(1, 2)


def input_rotated_gradient(a, g, q_a):
    """Returns G Q_A, [B, O, c]; the columns of q_a [I, c] are eigenvectors.

    Rotates the patches first, or the gradient last: whichever needs fewer multiplications. For
    grouped convolutions, it always rotates the gradient.
    """
    if a.dim() == 4:
        return per_sample_gradient(a, g) @ q_a
    if rotates_first(g, q_a):
        return g.mT @ (a @ q_a)
    return g.mT @ a @ q_a


def rotates_first(g, q_a):
    """Returns whether G Q_A needs fewer multiplications as g^T (a Q_A) than as (g^T a) Q_A.

    g: [B, T, O]; q_a: [I, c]. Groups are not considered.
    """
    positions, outputs = g.shape[1:]
    inputs, kept = q_a.shape
    rotation_first = positions * kept * (inputs + outputs)
    rotation_last = outputs * inputs * (positions + kept)
    return rotation_first < rotation_last


def rotated_gradient(a, g, q_a, q_g):
    """Returns Q_G^T G Q_A, [B, O, c].

    The columns of q_a [I, c] and q_g [O, O] are eigenvectors. If both are None, returns G.
    """
    if q_a is None:
        return per_sample_gradient(a, g)
    if a.dim() == 4:  # groups: Q_G mixes the outputs of all of them, so it comes last
        return q_g.T @ input_rotated_gradient(a, g, q_a)
    return input_rotated_gradient(a, g @ q_g, q_a)


def num_kept(inputs, fraction):
    """Returns how many of a layer's `inputs` eigenvectors are kept: a fraction, at least one."""
    return math.ceil(round(fraction * inputs, 6))  # in float64, 0.07 * 1600 is above 112


def keep_leading(storage, fraction):
    """Keeps the columns of Q_A with the largest eigenvalues of the input covariance.

    These are the last columns, because eigh sorts eigenvalues in ascending order. Keeps the same
    columns of 1 / (lambda + damping), which the storage holds in place of lambda.
    """
    q_a = storage[constants.ACTIVATION_EIGENVECTORS_NAME]
    kept = num_kept(q_a.shape[1], fraction)
    for name in (constants.ACTIVATION_EIGENVECTORS_NAME, constants.LAMBDA_MATRIX_NAME):
        storage[name] = storage[name][..., -kept:].contiguous()


def is_truncated(q_a):
    """Returns whether q_a [I, c] lacks some of the I eigenvectors."""
    return q_a is not None and q_a.shape[1] < q_a.shape[0]


# Columns per block of `symmetric_product`. A block on the diagonal is symmetric, but is computed as
# a whole, so smaller blocks waste less. Larger ones use the hardware better. The sizes
# were chosen by measuring.
SYMMETRIC_BLOCKS = {"cpu": 256, "cuda": 512}


def symmetric_product(rows):
    """Returns rows^T rows, [I, I], of rows [R, I]; on CUDA, rows may be bfloat16.

    The product of bfloat16 rows is float32. The blocks on the diagonal and right of it are
    computed; the blocks left of it mirror them.
    """
    dtype = torch.promote_types(rows.dtype, torch.float32)
    product = rows.new_empty(rows.shape[1], rows.shape[1], dtype=dtype)
    block = SYMMETRIC_BLOCKS[rows.device.type]
    for start in range(0, len(product), block):
        end = start + block
        left, right = rows[:, start:end].T, rows[:, start:]
        if rows.dtype == dtype:
            product[start:end, start:] = left @ right
        else:
            product[start:end, start:] = torch.mm(left, right, out_dtype=dtype)
        product[end:, start:end] = product[start:end, end:].T
    return product


def squares(gradient, dtype):
    """Yields the squares of per-sample gradients [B, O, I] in `dtype`, some samples at a time.

    On a CPU, the samples of one step fit into the cache, which saves a fifth of the time.
    """
    num_samples = len(gradient)
    if not gradient.is_cuda:
        num_samples = max(1, ELEMENTS_IN_CPU_CACHE // gradient[0].numel())
    for samples in gradient.split(num_samples):
        yield samples.to(dtype).square()


@contextlib.contextmanager
def covariance_product_precision(round_on_cpu):
    """Within `with`, a CPU rounds the inputs of float32 products to bfloat16 if `round_on_cpu`.

    Sums stay float32. On CUDA, `CovarianceSums.input_dtype` has already rounded the inputs, so only
    TF32 is turned off.
    """
    cpu, cuda = torch.backends.mkldnn.matmul, torch.backends.cuda.matmul
    before = cpu.fp32_precision, cuda.fp32_precision
    cpu.fp32_precision = "bf16" if round_on_cpu else "ieee"
    cuda.fp32_precision = "ieee"
    try:
        yield
    finally:
        cpu.fp32_precision, cuda.fp32_precision = before


class BatchHooks:
    """Calls `update(a, g)` for each batch, with its patches a and output gradients g, as above.

    A mixin for kronfluence's trackers. Their modules have an attribute `dtypes`, the result of
    `computation_dtypes`.
    """

    def input_dtype(self, is_cuda):
        """Returns the dtype of a and g."""
        return self.module.dtypes.products

    def register_hooks(self):
        layer = self.module.original_module

        @torch.no_grad()
        def backward_hook(activation, gradient):
            dtype = self.input_dtype(gradient.is_cuda)
            g = by_position(layer, gradient.to(dtype))
            a = self.layer_inputs(layer, activation.to(dtype), g)
            self.update(a, g)

        def forward_hook(module, inputs, outputs):
            activation = inputs[0].detach()
            outputs.register_hook(lambda gradient: backward_hook(activation, gradient))

        self.registered_hooks.append(self.module.register_forward_hook(forward_hook))

    def layer_inputs(self, layer, activation, g):
        """Returns what `update` gets besides g: the patches a of a layer's input."""
        return patches(layer, activation)

    def factor(self, name, target):
        """Returns a factor after `factor.to(target)`, or None if the strategy has no such factor.

        If `target` is a device, the factor moves there. If `target` is a tensor, the factor takes
        its device and dtype. The storage keeps the result for the next batches.
        """
        storage = self.module.storage
        if storage[name] is not None:
            storage[name] = storage[name].to(target)
        return storage[name]

    def eigenvectors(self, g):
        """Returns Q_A [I, c] and Q_G [O, O] in the dtype of g; None if the strategy has none.

        g: a tensor of the batch, of which only dtype and device matter.
        """
        q_a = self.factor(constants.ACTIVATION_EIGENVECTORS_NAME, g)
        q_g = self.factor(constants.GRADIENT_EIGENVECTORS_NAME, g)
        return q_a, q_g

    def inverse_eigenvalues(self, g):
        """Returns 1 / (lambda + damping), [O, c], for the stages of scores; None for the identity.

        Before these stages, kronfluence's `prepare_storage` replaces lambda by this inverse.
        """
        return self.factor(constants.LAMBDA_MATRIX_NAME, g.device)

    def add(self, name, value):
        """Adds to a factor in the storage, which is None before the first batch."""
        storage = self.module.storage
        if storage[name] is None:
            storage[name] = value
        else:
            storage[name].add_(value)


class CovarianceSums(BatchHooks, CovarianceTracker):
    def input_dtype(self, is_cuda):
        if is_cuda:
            return self.module.dtypes.covariances
        # On a CPU, `covariance_product_precision` lets the product round float32 to bfloat16.
        return self.module.dtypes.sums

    def update(self, a, g):
        activations = a.flatten(0, -2)  # (B * T, or B * groups * T, I)
        gradients = g.flatten(0, 1)  # (B * T, O)
        round_on_cpu = self.module.dtypes.covariances == torch.bfloat16
        with covariance_product_precision(round_on_cpu):
            a_product = symmetric_product(activations)
            g_product = symmetric_product(gradients)
        self.add(constants.ACTIVATION_COVARIANCE_MATRIX_NAME, a_product)
        self.add(constants.GRADIENT_COVARIANCE_MATRIX_NAME, g_product)
        a_count = torch.tensor([len(activations)])
        g_count = torch.tensor([len(gradients)])
        self.add(constants.NUM_ACTIVATION_COVARIANCE_PROCESSED, a_count)
        self.add(constants.NUM_GRADIENT_COVARIANCE_PROCESSED, g_count)


class LambdaSums(BatchHooks, LambdaTracker):
    def update(self, a, g):
        q_a, q_g = self.eigenvectors(g)
        gradient = rotated_gradient(a, g, q_a, q_g)
        for squared in squares(gradient, self.module.dtypes.sums):
            self.add(constants.LAMBDA_MATRIX_NAME, squared.sum(0))
        self.add(constants.NUM_LAMBDA_PROCESSED, torch.tensor([len(g)]))


class SelfInfluence(BatchHooks, SelfScoreTracker):
    def update(self, a, g):
        q_a, q_g = self.eigenvectors(g)
        weights = self.inverse_eigenvalues(g)
        gradient = rotated_gradient(a, g, q_a, q_g)
        scores = []
        for squared in squares(gradient, self.module.dtypes.sums):
            if weights is None:
                scores.append(squared.sum((1, 2)))
            else:
                scores.append(squared.flatten(1) @ weights.flatten())
        self.module.storage[constants.SELF_SCORE_VECTOR_NAME] = torch.cat(scores)


class PreconditionedQuery(BatchHooks, PreconditionTracker):
    """Rotates the query's gradient back, so that no training gradient needs a rotation.

    If only some eigenvectors are kept, the input side stays rotated, because it is smaller then.
    """

    def update(self, a, g):
        q_a, q_g = self.eigenvectors(g)
        weights = self.inverse_eigenvalues(g)
        gradient = rotated_gradient(a, g, q_a, q_g)
        if weights is not None:
            gradient.mul_(weights)
        if q_g is not None:
            gradient = q_g @ gradient
            if not is_truncated(q_a):
                gradient = gradient @ q_a.T
        self.module.storage[constants.PRECONDITIONED_GRADIENT_NAME] = gradient

    def accumulate_iterations(self):
        """Adds a batch of queries to those held; kronfluence would copy all of them each time."""
        storage = self.module.storage
        gradients = storage[constants.PRECONDITIONED_GRADIENT_NAME].flatten(1)
        held = storage[constants.ACCUMULATED_PRECONDITIONED_GRADIENT_NAME]
        if held is None:  # the first batch; no later one is larger
            num_batches = self.module.score_args.query_gradient_accumulation_steps
            rows = gradients.new_empty(num_batches * len(gradients), gradients.shape[1])
            held = HeldQueries(rows)
        held.append(gradients)
        storage[constants.ACCUMULATED_PRECONDITIONED_GRADIENT_NAME] = held
        storage[constants.PRECONDITIONED_GRADIENT_NAME] = None


class HeldQueries:
    """The gradients of the queries held: the first `count` of the rows [Q, D], allocated once."""

    def __init__(self, rows):
        self.rows = rows
        self.count = 0

    def append(self, gradients):
        """Copies gradients [B, D] into the next rows."""
        end = self.count + len(gradients)
        self.rows[self.count : end] = gradients
        self.count = end

    def gradients(self):
        """Returns the gradients, [count, D]."""
        return self.rows[: self.count]


class TruncatedHooks(BatchHooks):
    """Computes G, or G Q_A if only some eigenvectors are kept.

    G Q_A is g^T (a Q_A) or (g^T a) Q_A, whichever needs fewer multiplications. In the first case,
    `layer_inputs` returns the product of the patches a and Q_A, and `gradient` multiplies by g^T.
    """

    def layer_inputs(self, layer, activation, g):
        q_a, _ = self.eigenvectors(g)
        if is_truncated(q_a) and rotates_first(g, q_a):
            return rotated_patches(layer, activation, q_a)
        return super().layer_inputs(layer, activation, g)

    def gradient(self, a, g):
        """Returns G [B, O, I], or G Q_A [B, O, c]; a: what `layer_inputs` returned."""
        gradient = per_sample_gradient(a, g)
        q_a, _ = self.eigenvectors(g)
        if is_truncated(q_a) and not rotates_first(g, q_a):
            gradient = gradient @ q_a
        return gradient


class IndexedGradient(TruncatedHooks, GradientTracker):
    def update(self, a, g):
        self.module.storage[constants.AGGREGATED_GRADIENT_NAME] = self.gradient(a, g)


class PairwiseInfluence(TruncatedHooks, PairwiseScoreTracker):
    def update(self, a, g):
        gradient = self.gradient(a, g).flatten(1)  # (B, O*I), truncated (B, O*c)
        storage = self.module.storage
        queries = storage[constants.ACCUMULATED_PRECONDITIONED_GRADIENT_NAME].gradients()
        scores = (queries @ gradient.T).to(self.module.dtypes.sums)
        storage[constants.PAIRWISE_SCORE_MATRIX_NAME] = scores


def install_trackers(module, dtypes):
    """Gives a TrackedModule the trackers above and changes how it prepares its factors.

    Eigenvalues below zero are rounding errors and become zero. If only a fraction of the
    eigenvectors is kept, the others are dropped after the damping, because the heuristic needs the
    mean over all eigenvalues.
    """
    prepare_by_kronfluence = module.prepare_storage

    def prepare_storage(device):
        for name in (constants.ACTIVATION_EIGENVALUES_NAME, constants.GRADIENT_EIGENVALUES_NAME):
            if module.storage[name] is not None:
                module.storage[name].clamp_(min=0)
        prepare_by_kronfluence(device)
        if module.score_args.eigenvector_fraction < 1:
            keep_leading(module.storage, module.score_args.eigenvector_fraction)

    module.dtypes = dtypes
    module.prepare_storage = prepare_storage
    module._trackers |= {
        ModuleMode.COVARIANCE: CovarianceSums(module),
        ModuleMode.LAMBDA: LambdaSums(module),
        ModuleMode.SELF_SCORE: SelfInfluence(module),
        ModuleMode.PRECONDITION_GRADIENT: PreconditionedQuery(module),
        ModuleMode.PAIRWISE_SCORE: PairwiseInfluence(module),
        ModuleMode.GRADIENT_AGGREGATION: IndexedGradient(module),
    }


# ---- Influence: which layers are tracked ---------------------------------------------------------
#
# Influence is computed for the weights and biases of Conv2d and Linear layers. Before it is
# computed, their per-sample gradients on two images are compared with autograd's.

CHECKED_IMAGES = 2
# The largest error, as a fraction of the gradient's norm. Rounding to TF32 stays far below it.
LARGEST_ERROR = 0.01


class LayerCall:
    """The input of one call of a layer, and the gradient of its output for all images.

    arguments: the positional arguments of the call. `inputs` is the first one, or None.
    `differentiate` runs one backward pass for each image. The pass of image i gives a gradient that
    is zero except in row i. So the sum over the passes holds the gradient of image i in row i.
    """

    def __init__(self, arguments, output):
        self.inputs = arguments[0].detach() if arguments else None
        self.gradient = torch.zeros_like(output.detach())
        if output.requires_grad:
            output.register_hook(self.add)

    def add(self, gradient):
        self.gradient += gradient


def find_tracked_layers(model, images):
    """Returns the names of the layers for which influence is computed, in the order of the model.

    They are the Conv2d and Linear layers (no subclasses) that are not frozen, and on which the
    logits depend. images: [B, 3, 32, 32]. On them, the trackers' per-sample gradients are compared
    with autograd's. Raises UserError if these differ for a layer, or if there is no layer.
    """
    kinds = (nn.Conv2d, nn.Linear)
    layers = {}
    for name, layer in model.named_modules():
        if type(layer) in kinds and layer.weight.requires_grad:
            layers[name] = layer
    if not layers:
        raise UserError(
            "the network has no trained Conv2d or Linear layer: influence needs at least one"
        )
    calls, image_gradients = differentiate(model, layers, images)
    tracked = []
    for name, layer in layers.items():
        exact = [layer_gradient(gradients, name) for gradients in image_gradients]
        if exact[0] is None:  # the logits do not depend on the layer
            continue
        reason = reason_to_refuse(model, layer, calls[name], exact)
        if reason:
            raise UserError(f"influence cannot be computed for the layer '{name}': {reason}")
        tracked.append(name)
    if not tracked:
        raise UserError("the logits do not depend on the parameters of any Conv2d or Linear layer")
    return tracked


@torch.no_grad()
def check_wrapped_layers(tracked_model, images, expected):
    """Raises UserError if a network does not work with layers that kronfluence has wrapped.

    expected: its logits of `images` before. A wrapped layer is a TrackedModule, no nn.Conv2d or
    nn.Linear, and lacks some of their attributes.
    """
    remedy = "in its forward, call each layer by its attribute, and use nothing else of the layer"
    was_called = {}

    def note(module, arguments, output):
        was_called[module.name] = True

    wrapped = [module for module in tracked_model.modules() if isinstance(module, TrackedModule)]
    hooks = [module.register_forward_hook(note) for module in wrapped]
    try:
        logits = tracked_model(images)
    except AttributeError as error:
        reason = first_line(error)
        raise UserError(
            f"influence cannot be computed for the network ({reason}): {remedy}"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    uncalled = [module.name for module in wrapped if module.name not in was_called]
    if uncalled:
        raise UserError(
            f"the layer '{uncalled[0]}' is called by another reference than its attribute: {remedy}"
        )
    # A NaN is reported later, with its phase.
    if not torch.allclose(logits, expected, rtol=1e-3, atol=1e-5, equal_nan=True):
        raise UserError(f"the network computes other logits if its layers are wrapped: {remedy}")


def differentiate(model, layers, images):
    """Returns the LayerCalls of each layer, and the gradients of each image by autograd.

    The calls are a dictionary from layer name to list. The gradients are a list with a dictionary
    per image, from parameter name to gradient; None if the logits do not depend on the parameter.

    An image's gradient is that of a weighted sum of its logits. The gradient of the loss would be
    zero if the network were certain of the class.

    The gradient of a layer's output comes from the tensor hook of its LayerCall, once for each
    image. In each backward pass, it is zero except in the row of that image. autograd.grad could
    not compute this gradient if a later in-place layer overwrites the output.
    """
    calls = {name: [] for name in layers}

    def record(name):
        def forward_hook(module, arguments, output):
            calls[name].append(LayerCall(arguments, output))

        return forward_hook

    hooks = [layer.register_forward_hook(record(name)) for name, layer in layers.items()]
    with torch.enable_grad():
        logits = model(images)
        weights = torch.linspace(1, 2, logits.shape[1]).to(logits)
        values = logits @ weights  # (B,)
    for hook in hooks:
        hook.remove()

    named_parameters = model.named_parameters(remove_duplicate=False)
    parameters = {name: value for name, value in named_parameters if value.requires_grad}
    image_gradients = []
    for value in values:
        # This backward pass also calls the hook of each LayerCall.
        gradients = torch.autograd.grad(
            value,
            list(parameters.values()),
            retain_graph=True,
            allow_unused=True,
        )
        image_gradients.append(dict(zip(parameters, gradients, strict=True)))
    return calls, image_gradients


def layer_gradient(gradients, name):
    """Returns a layer's gradient, [O, I], in the order of `patches`.

    gradients: of one image, by parameter name. Returns None if the layer's weight has no gradient.
    """
    weight, bias = gradients.get(f"{name}.weight"), gradients.get(f"{name}.bias")
    if weight is None:
        return None
    if weight.dim() == 4:
        weight = weight.permute(0, 2, 3, 1).flatten(1)
    return weight if bias is None else torch.cat([weight, bias[:, None]], 1)


def reason_to_refuse(model, layer, calls, exact):
    """Returns why the trackers would compute wrong gradients for a layer, and what to do.

    Returns None if they are right. calls: the LayerCalls of the layer in one forward pass;
    exact: the layer's gradient [O, I] by autograd, for each image.
    """
    reason = reason_before_calls(model, layer)
    if reason:
        return reason
    if len(calls) != 1:
        return f"it is called {len(calls)} times in one pass; call each layer exactly once"
    call = calls[0]
    if call.inputs is None:
        return "its input is passed by keyword; pass it as the first argument, without a keyword"
    rows = len(call.inputs)
    if rows != len(exact):
        return (
            f"the first dimension of its input is {rows} for {len(exact)} images; "
            "keep the images in the first dimension"
        )
    a = patches(layer, call.inputs)
    g = by_position(layer, call.gradient)
    for gradient, expected in zip(per_sample_gradient(a, g), exact, strict=True):
        if (gradient - expected).norm() > LARGEST_ERROR * expected.norm():
            return (
                "its gradients do not follow from its input and the gradient of its output; "
                "do not share or recompute its weight, and do not mix images"
            )
    return None


def reason_before_calls(model, layer):
    """Returns why a layer is refused however it is called, or None."""
    names = [name for name, other in model.named_modules(remove_duplicate=False) if other is layer]
    if len(names) > 1:
        return f"it is also registered as '{names[1]}'; register it once"
    if layer.bias is not None and not layer.bias.requires_grad:
        return "its bias is frozen, but its weight is not; freeze both or none"
    if layer._forward_pre_hooks:
        return "it has a forward pre-hook; change its input in the network's forward instead"
    return None


def fixed_parameters(model, tracked):
    """Returns, as text, the parameters that influence takes as fixed: those outside tracked layers.

    The text counts the modules of torch.nn by class, such as "8 BatchNorm2d", and names up to three
    other parameters. It is empty if there are none. tracked: names of layers.
    """
    counts = Counter()
    names = []
    for module_name, module in model.named_modules():
        parameters = [name for name, _ in module.named_parameters(recurse=False)]
        if not parameters or module_name in tracked:
            continue
        if type(module).__module__.startswith("torch.nn"):
            counts[type(module).__name__] += 1
        else:
            names += [f"{module_name}.{name}".removeprefix(".") for name in parameters]
    shown = [f"{count} {kind}" for kind, count in counts.items()]
    shown += names[:3]
    if len(names) > 3:
        shown.append(f"{len(names) - 3} more")
    return ", ".join(shown)


# ---- Influence: factors and scores ---------------------------------------------------------------

FACTORS_SEED = 17  # draws the images of --factor_examples
CPU_QUERY_BYTES = 2 * 2**30  # with this limit, a run on the CPU stays below 6 GB
GPU_QUERIES = 1000  # held on a GPU by default: 9 GB in float32
INDEX_DTYPE = torch.bfloat16
INDEX_ROWS = 64  # images per file of an index
QUERY_CHUNK = 50  # queries per backward pass; --query_batch_size is the number held in memory


@dataclass
class InfluenceArguments(ScoreArguments):
    """kronfluence's arguments, and the fraction of a layer's input eigenvectors to keep."""

    eigenvector_fraction: float = 1.0


class TrainedModel:
    """A model, the images that it was trained on, and the folder for its results.

    `model`, on the device of `data`, is not changed. `folder` is `<path>-<hash>`, with the first
    eight digits of the fingerprint; it is not created. The fingerprint is a hash of weights, images
    and labels. `batch_size` is 64 by default, on CUDA 1,024. `seconds` collects the seconds by
    phase. `fixed` is empty here; in an InfluenceRun, it names the parameters that influence takes
    as fixed.
    """

    strategy = NO_INFLUENCE
    fixed = ""

    def __init__(self, model, data, path, *, dtype, seconds, batch_size=None):
        self.model = model
        self.data = data
        self.dtype = dtype
        self.seconds = seconds
        if batch_size is None:
            batch_size = 1024 if data.images.is_cuda else 64
        self.batch_size = batch_size
        names_and_weights = []
        for name, weight in sorted(model.state_dict().items()):
            names_and_weights += [name, weight]
        self.fingerprint = sha256(*names_and_weights, data.digest)
        self.folder = Path(f"{path}-{self.fingerprint[:8]}")


class InfluenceRun(TrainedModel):
    """Influence by kronfluence's Analyzer, for one model and its training images.

    Factors and scores are cached in `folder`, by a hash of weights, images, labels, code, settings
    and versions, but not of the device: a run on the CPU finds the scores of a GPU that computed in
    the same dtype. Factors are fitted on `factor_examples` random training images, a number or
    "all". `seed` draws the pseudo-labels. Other arguments are those of TrainedModel. Raises
    UserError if influence cannot be computed for a layer, or if `folder` cannot be created; then
    nothing is written.
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
        super().__init__(model, data, path, dtype=dtype, seconds=seconds, batch_size=batch_size)
        self.strategy = strategy
        self.dtypes = computation_dtypes(dtype, strategy)
        self.checked_files = set()
        self.dataset = InfluenceDataset(data, seed)
        self.factor_dataset = self.draw_factor_examples(factor_examples)
        tracked_model, layer_names = self.track_layers()
        self.fixed = fixed_parameters(model, layer_names)
        layers = [model.get_submodule(name) for name in layer_names]
        self.layer_sizes = [gradient_size(layer) for layer in layers]
        self.depends_on = [
            self.fingerprint,
            code_digest(model),
            strategy,
            str(dtype),
            seed,
            len(self.factor_dataset),
            version("torch"),
            version("kronfluence"),
        ]
        make_folder(self.folder)
        self.analyzer = Analyzer(
            self.folder.name,
            tracked_model,
            ClassificationTask(),
            cpu=not data.images.is_cuda,
            output_dir=str(self.folder.parent),
        )
        # The data set's __getitems__ already returns a batch.
        self.analyzer.set_dataloader_kwargs(DataLoaderKwargs(collate_fn=lambda batch: batch))

    def draw_factor_examples(self, count):
        """Returns a data set of `count` random training images, or of all if `count` is "all"."""
        total = len(self.dataset)
        if count == "all" or count >= total:
            return self.dataset
        generator = torch.Generator().manual_seed(FACTORS_SEED)
        indices = torch.randperm(total, generator=generator)[:count]
        return torch.utils.data.Subset(self.dataset, indices.tolist())

    def track_layers(self):
        """Returns a copy of the model whose layers have our trackers, and the layers' names."""
        images, _, _ = self.dataset.__getitems__(range(min(CHECKED_IMAGES, len(self.dataset))))
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(images.shape, generator=generator).to(images)
        images = images + 0.1 * noise  # so that no two images are identical
        model = copy.deepcopy(self.model).eval()
        layer_names = find_tracked_layers(model, images)
        with torch.no_grad():
            expected = model(images)
        tracked_model = prepare_model(model, ClassificationTask(layer_names))
        check_wrapped_layers(tracked_model, images, expected)
        for module in tracked_model.modules():
            if isinstance(module, TrackedModule):
                install_trackers(module, self.dtypes)
        return tracked_model, layer_names

    def from_main(self, value):
        """Returns the `value` of the main process in every process."""
        values = [value]
        state = self.analyzer.state
        if state.use_distributed:
            torch.distributed.broadcast_object_list(values, device=state.device)
        return values[0]

    def cached_folder(self, prefix, kind, settings, compute):
        """Returns a folder in the cache; calls `compute(name, batch_size)` if needed.

        The folder's name is `<prefix><kind><strategy>-<dtype>-<hash>`: `prefix` is "factors_",
        "scores_" or "index_", `kind` is "self_", "pairwise_" or nothing, and the hash is that of
        `settings` and `depends_on`. `compute` gets a name without `prefix`, because kronfluence
        adds that itself (a GradientIndex does, too). The folder gets its final name when it is
        complete, so a folder with the final name is always complete.
        """
        digest = sha256(json.dumps([*self.depends_on, *settings]))
        dtype = str(self.dtype).removeprefix("torch.")
        final = self.folder / f"{prefix}{kind}{self.strategy}-{dtype}-{digest[:16]}"
        main = is_main_process()
        if main:
            remove_if_damaged(final)
        if self.from_main(final.exists()):
            if main:
                print(f"Reusing {final}")
            return final
        name = self.from_main(f"{kind}unfinished-{secrets.token_hex(8)}")
        unfinished = self.folder / f"{prefix}{name}"
        try:
            self.compute_in_batches(partial(compute, name))
            self.analyzer.state.wait_for_everyone()
            if main:
                write_listing(unfinished)
                with contextlib.suppress(OSError):  # another run was faster, with the same result
                    unfinished.rename(final)
            self.analyzer.state.wait_for_everyone()
        finally:
            if main:
                shutil.rmtree(unfinished, ignore_errors=True)
        return final

    def compute_in_batches(self, compute):
        """Calls `compute(batch_size)`, and again with half the batch size while memory is full.

        With several processes, full memory is an error, because the other processes would wait.
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
        """Adds the seconds of the block to a phase, and checks the files that the block wrote.

        name: the one that `cached_folder` gave to `compute`; the files are in `factors_<name>` or
        `scores_<name>`. Raises NumericalError if they contain a NaN or an infinity.
        """
        with timed(self.seconds, phase):
            yield
            self.analyzer.state.wait_for_everyone()
            # The folder also holds the files of earlier phases, which were checked then.
            paths = set(self.folder.glob(f"*_{name}/*.safetensors")) - self.checked_files
            for path in sorted(paths):
                self.check_finite(path, phase)
            self.checked_files |= paths

    def check_finite(self, path, phase):
        """Raises NumericalError if a file of a phase contains a NaN or an infinity."""
        remedy = "train with a lower --learning_rate"
        # The damping has no effect on the phases before, and none with `identity`.
        if phase == "scores" and self.strategy != "identity":
            remedy = f"raise --damping_factor, or {remedy}"
        for layer, tensor in load_file(path).items():
            if not tensor.isfinite().all():
                raise NumericalError(
                    f"NaN or infinity in the phase '{phase}' ({path.stem} of {layer}): {remedy}"
                )

    def fit_factors(self):
        """Fits the factors that the strategy needs, and returns their folder.

        The factors are the covariances, their eigendecompositions, and lambda.
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

        return self.cached_folder("factors_", "", [], compute)

    def fit_and_name_factors(self):
        """Fits the factors, and returns the name by which kronfluence loads them."""
        return self.fit_factors().name.removeprefix("factors_")

    def gradient_sizes(self, eigenvector_fraction):
        """Returns how many numbers the gradient of one image has in each layer, a list."""
        return [
            outputs * num_kept(inputs, eigenvector_fraction) for outputs, inputs in self.layer_sizes
        ]

    def index_bytes(self, eigenvector_fraction):
        """Returns the size of a GradientIndex of this run in bytes."""
        numbers = sum(self.gradient_sizes(eigenvector_fraction))
        return len(self.dataset) * numbers * INDEX_DTYPE.itemsize

    def score_arguments(self, damping_factor, **settings):
        """Returns the InfluenceArguments for a damping factor, a number or "heuristic".

        `precondition_dtype` is the dtype of the factors that precondition gradients. Our trackers
        choose the dtypes of the products.
        """
        if self.strategy == "identity":  # it has no eigenvalues, so damping has no effect
            damping_factor = 0.0
        elif damping_factor == "heuristic":
            damping_factor = None  # kronfluence's value for its heuristic
        return InfluenceArguments(
            damping_factor=damping_factor, precondition_dtype=self.dtypes.sums, **settings
        )

    def self_influence(self, damping_factor):
        """Returns the self-influence of every training image, float32 [num_train], and its file.

        `damping_factor` is a number or "heuristic". Raises NumericalError if a score is NaN.
        """
        factors_name = self.fit_and_name_factors()
        # Forward and backward passes may run in bfloat16 here. For pairwise scores they run in
        # float32, because passes in bfloat16 would change the order of these scores.
        is_bfloat16 = self.dtypes.products == torch.bfloat16
        autocast_dtype = torch.bfloat16 if is_bfloat16 else None  # None: no autocast
        args = self.score_arguments(damping_factor, amp_dtype=autocast_dtype)

        def compute(name, batch_size):
            with self.phase("scores", name):
                self.analyzer.compute_self_scores(
                    name, factors_name, self.dataset, batch_size, score_args=args
                )

        folder = self.cached_folder("scores_", "self_", ["self", args.damping_factor], compute)
        path = folder / "self_scores.safetensors"
        return load_file(path)[constants.ALL_MODULE_NAME], path

    def queries_at_once(self, query_batch_size, eigenvector_fraction):
        """Returns the number of queries whose gradients this process computes at a time.

        On a CPU, as many queries are held as fit into CPU_QUERY_BYTES, and at most
        `query_batch_size` if that is a number. On a GPU, `query_batch_size` queries are held, or
        GPU_QUERIES / `eigenvector_fraction` for "auto". Each process computes an equal share of the
        held queries, and receives the gradients of the other processes. The result is this share.
        """
        if self.data.images.is_cuda and query_batch_size == "auto":
            held = round(GPU_QUERIES / eigenvector_fraction)
        elif self.data.images.is_cuda:
            held = query_batch_size
        else:
            numbers = sum(self.gradient_sizes(eigenvector_fraction))
            held = CPU_QUERY_BYTES // (numbers * self.dtype.itemsize)
            if query_batch_size != "auto":
                held = min(held, query_batch_size)
        return max(1, held // self.analyzer.state.num_processes)

    def pairwise_influence(
        self,
        query_data,
        query_batch_size,
        damping_factor,
        eigenvector_fraction=1.0,
        with_index=False,
    ):
        """Returns the influence of each training image on each query, and its file.

        Scores are float32 [num_query, num_train]. The gradients of `query_batch_size` queries (9 MB
        each in float32) are held at a time, on a CPU at most 2 GB of them; `queries_at_once`
        describes "auto". For each of these batches, all training gradients are computed again, or
        read from a GradientIndex (`with_index`). `damping_factor` is a number or "heuristic".
        `eigenvector_fraction` is the fraction of each layer's input eigenvectors to keep, those
        with the largest eigenvalues; the gradients of queries need this fraction of the memory. A
        fraction below 1 needs one of EIGENVECTOR_STRATEGIES. Raises NumericalError if a score is
        NaN, and UserError if the disk has no space for the index.
        """
        queries = InfluenceDataset(query_data, self.dataset.seed)
        queries_at_once = self.queries_at_once(query_batch_size, eigenvector_fraction)
        args = self.score_arguments(damping_factor, eigenvector_fraction=eigenvector_fraction)
        settings = ["pairwise", args.damping_factor, eigenvector_fraction, query_data.digest]
        if with_index:
            index = GradientIndex(self, args)
            settings += ["index", index.basis]
            compute = partial(index.write_scores, queries, queries_at_once)
        else:
            factors_name = self.fit_and_name_factors()

            def compute(name, batch_size):
                self.write_pairwise_scores(
                    factors_name, queries, queries_at_once, args, name, batch_size
                )

        folder = self.cached_folder("scores_", "pairwise_", settings, compute)
        path = folder / "pairwise_scores.safetensors"
        return load_file(path)[constants.ALL_MODULE_NAME], path

    def write_pairwise_scores(self, factors_name, queries, queries_at_once, args, name, batch_size):
        """Computes pairwise scores by kronfluence, in the folder `scores_<name>`.

        queries_at_once: the number of queries whose gradients are held at a time;
        args: InfluenceArguments; batch_size: number of training images.
        """
        # kronfluence holds the gradients of steps * chunk queries at a time. A chunk has at most
        # QUERY_CHUNK queries.
        share = math.ceil(len(queries) / self.analyzer.state.num_processes)
        queries_at_once = min(queries_at_once, share)
        steps = math.ceil(queries_at_once / QUERY_CHUNK)
        # Example: 51 out of 1,000 queries may be held. Then 2 chunks of 25 are held, because 2
        # chunks of 26 would be too many.
        chunk = queries_at_once // steps
        # If all queries may be held, the last chunk can be smaller: 51 are held as 26 and 25.
        if queries_at_once == share:
            chunk = math.ceil(share / steps)
        # If memory is full, batches of queries shrink as batches of training images do.
        chunk = max(1, chunk * batch_size // self.batch_size)
        with self.phase("scores", name):
            self.analyzer.compute_pairwise_scores(
                name,
                factors_name,
                queries,
                self.dataset,
                chunk,
                batch_size,
                score_args=replace(args, query_gradient_accumulation_steps=steps),
            )


def require_index_space(runs, eigenvector_fraction):
    """Raises UserError if the disk has no space for the gradient indexes of all these runs.

    It is called before factors are fitted, which take minutes. A run whose folder has an index is
    not counted: that index may be the one that is needed.
    """
    size = 0
    for run in runs:
        if not any(run.folder.glob("index_*")):
            size += run.index_bytes(eigenvector_fraction)
    require_space(runs[0].folder, size)


def require_space(folder, size):
    """Raises UserError if the disk of a folder has no space for an index of `size` bytes."""
    free = shutil.disk_usage(folder).free
    if size > free:
        raise UserError(
            f"--index needs {size / 1e9:.1f} GB in {folder}, but only {free / 1e9:.1f} GB are "
            "free: free space, or choose another --output_dir, or for ekfac and kfac a lower "
            "--eigenvector_fraction"
        )


class GradientIndex:
    """The gradients of an InfluenceRun's training images, in files.

    A file holds the gradients of some images, INDEX_DTYPE [rows, D]. D is the sum of O x c over the
    layers, with c kept eigenvectors. A score is the dot product of such a row with the
    preconditioned gradient of a query, so the training images are needed once for all queries.

    args: InfluenceArguments. The constructor fits the factors; `write_scores` computes all else.
    `basis` is a hash of the eigenvectors: an index is valid only for those that it was built with.
    Raises UserError if the disk has no space for the index.
    """

    def __init__(self, run, args):
        self.run = run
        self.args = args
        self.row_sizes = run.gradient_sizes(args.eigenvector_fraction)
        self.factors_name = run.fit_and_name_factors()
        self.basis = None  # for a strategy without eigenvectors
        factors = run.folder / f"factors_{self.factors_name}"
        eigenvectors = factors / "activation_eigenvectors.safetensors"
        if eigenvectors.exists():
            with eigenvectors.open("rb") as file:
                self.basis = hashlib.file_digest(file, "sha256").hexdigest()

    def built(self):
        """Returns the folder of the index, which is built if it is missing."""
        folder = self.run.folder
        lock = FileLock(folder / ".index.lock", mode=0o666)  # for other users of the folder
        try:
            lock.acquire(timeout=0)
        except Timeout:
            print("Another run builds an index; waiting for it")
            lock.acquire()
        try:
            for leftover in folder.glob("index_unfinished-*"):  # of a run that was killed
                shutil.rmtree(leftover)
            settings = [self.args.eigenvector_fraction, self.basis]
            return self.run.cached_folder("index_", "", settings, self.build)
        finally:
            lock.release()

    def build(self, name, batch_size):
        """Writes the files to the folder `index_<name>`. Raises NumericalError for a NaN."""
        folder = self.run.folder / f"index_{name}"
        shutil.rmtree(folder, ignore_errors=True)  # frees the space of an attempt before
        size = self.run.index_bytes(self.args.eigenvector_fraction)
        require_space(self.run.folder, size)
        make_folder(folder)
        print(f"The index takes {size / 1e9:.1f} GB in {self.run.folder}")
        batches = self.gradients(self.run.dataset, batch_size, ModuleMode.GRADIENT_AGGREGATION)
        number = 0
        with timed(self.run.seconds, "index"):
            for gradients in batches:
                if not gradients.isfinite().all():
                    remedy = "train with a lower --learning_rate"
                    raise NumericalError(f"NaN or infinity in the phase 'index': {remedy}")
                for rows in gradients.to("cpu", INDEX_DTYPE).split(INDEX_ROWS):
                    path = folder / f"gradients_{number:06d}.safetensors"
                    save_file({"gradients": rows}, path)
                    number += 1

    def gradients(self, dataset, batch_size, mode):
        """Yields the gradients of a data set's images, [B, D] for each batch.

        mode: GRADIENT_AGGREGATION, for gradients of the training loss; PRECONDITION_GRADIENT, for
        preconditioned gradients of the measurement.
        """
        model, task = self.run.analyzer.model, self.run.analyzer.task
        compute, name = task.compute_train_loss, constants.AGGREGATED_GRADIENT_NAME
        if mode == ModuleMode.PRECONDITION_GRADIENT:
            compute, name = task.compute_measurement, constants.PRECONDITIONED_GRADIENT_NAME
        self.load_factors(mode)
        layers = [module for module in model.modules() if isinstance(module, TrackedModule)]
        starts = range(0, len(dataset), batch_size)
        for start in tqdm(starts, "Computing gradients", unit="batch", leave=False):
            end = min(start + batch_size, len(dataset))
            batch = dataset.__getitems__(range(start, end))
            model.zero_grad(set_to_none=True)
            compute(batch, model).backward()  # the trackers write to the storage of their layers
            yield torch.cat([layer.storage[name].flatten(1) for layer in layers], 1)
        set_mode(model, ModuleMode.DEFAULT, release_memory=True)

    def load_factors(self, mode):
        """Loads the factors into the storage of the layers, for trackers of a ModuleMode."""
        analyzer = self.run.analyzer
        model = analyzer.model
        update_factor_args(model, FactorArguments(strategy=self.run.strategy))
        update_score_args(model, self.args)
        set_mode(model, mode, release_memory=True)
        for name, factors in analyzer.load_all_factors(self.factors_name).items():
            set_factors(model, name, factors, clone=True)
        prepare_modules(model, get_tracked_module_names(model), analyzer.state.device)

    def write_scores(self, queries, queries_at_once, name, batch_size):
        """Writes the scores of queries, a data set, to the folder `scores_<name>`.

        queries_at_once: the number of queries whose gradients are held at a time. If memory is
        full, fewer are held, in the same proportion as batches of training images shrink.
        """
        index = self.built()
        folder = self.run.folder / f"scores_{name}"
        make_folder(folder)
        held = max(1, queries_at_once * batch_size // self.run.batch_size)
        with self.run.phase("scores", name):
            rows = []
            for start in range(0, len(queries), held):
                indices = range(start, min(start + held, len(queries)))
                some_queries = torch.utils.data.Subset(queries, indices)
                rows.append(self.scores(index, self.query_gradients(some_queries)))
            scores = {constants.ALL_MODULE_NAME: torch.cat(rows)}
            save_file(scores, folder / "pairwise_scores.safetensors")

    def query_gradients(self, queries):
        """Returns the preconditioned gradients of queries in a data set, [num_query, D]."""
        rows = torch.empty(
            len(queries),
            sum(self.row_sizes),
            dtype=self.run.dtypes.products,
            device=self.run.data.images.device,
        )
        held = HeldQueries(rows)
        for gradients in self.gradients(queries, QUERY_CHUNK, ModuleMode.PRECONDITION_GRADIENT):
            held.append(gradients)
        return held.gradients()

    def scores(self, index, query_gradients):
        """Returns scores, float32 [num_query, num_train], on the CPU; index: its folder."""
        queries_by_layer = query_gradients.split(self.row_sizes, 1)
        columns = []
        files = sorted(index.glob("gradients_*.safetensors"))
        for path in tqdm(files, "Reading the index", unit="file", leave=False):
            gradients = load_file(path)["gradients"].to(query_gradients)
            sums = 0
            rows_by_layer = gradients.split(self.row_sizes, 1)
            for queries, rows in zip(queries_by_layer, rows_by_layer, strict=True):
                sums += (queries @ rows.T).to(self.run.dtypes.sums)
            columns.append(sums.cpu())
        return torch.cat(columns, 1)


@contextlib.contextmanager
def no_compiler_reset():
    """Replaces torch.compiler.reset in the block by a function that does nothing.

    kronfluence calls torch.compiler.reset after each stage. That call imports the compiler, which
    is not used here. The import takes 0.8 s, or 6 s from a slow disk.
    """
    reset = torch.compiler.reset
    torch.compiler.reset = lambda: None
    try:
        yield
    finally:
        torch.compiler.reset = reset


LISTING = "files.json"  # in a folder of the cache: the names of its other files


def write_listing(folder):
    """Writes the names of the files in a folder of the cache, so that a missing one is noticed."""
    names = sorted(path.name for path in folder.glob("[!.]*"))
    (folder / LISTING).write_text(json.dumps(names))


def remove_if_damaged(folder):
    """Removes a folder of the cache if a file is missing or damaged, and prints that file.

    For tensors, only the file's header and size are checked. Files that a person may have added are
    ignored.
    """
    if not folder.exists():
        return
    path = folder / LISTING
    try:
        for name in json.loads(path.read_text()):
            path = folder / name
            check_file(path)
    except (SafetensorError, ValueError, FileNotFoundError):
        removed = folder.with_name(f"damaged-{secrets.token_hex(8)}")
        try:
            # It is renamed before it is deleted: if the deletion is interrupted, what remains is
            # not taken for a complete folder.
            folder.rename(removed)
        except FileNotFoundError:  # another run was faster
            return
        print(f"{path} is missing or damaged: it is computed again")
        shutil.rmtree(removed)


def check_file(path):
    """Raises an exception if a file of the cache is missing or damaged."""
    require_readable(path)
    if path.suffix == ".json":
        json.loads(path.read_text())
    if path.suffix == ".safetensors":
        with safe_open(path, "pt"):  # raises if the file has another size than its header states
            pass


def load_runs(args, seconds, models_per_checkpoint=1):
    """Returns an InfluenceRun for each model of `--checkpoint_dir`.

    With `--factor_strategy none`, returns a TrainedModel for each. Also returns the metadata of
    each checkpoint, and the training images, ImageData on the CPU. `models_per_checkpoint`: as in
    `load_models`. Raises UserError if the disk has no space for `--index`.
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
        models_per_checkpoint=models_per_checkpoint,
    )
    runs = construct_runs(
        models,
        data.to(device),
        Path(args.output_dir) / paths[0].stem,
        strategy=args.factor_strategy,
        seed=args.seed,
        factor_examples=args.factor_examples,
        dtype=dtype,
        seconds=seconds,
        batch_size=args.train_batch_size,
    )
    if runs[0].fixed and is_main_process():
        print(f"Influence takes these parameters as fixed: {runs[0].fixed}")
    if args.index:
        require_index_space(runs, args.eigenvector_fraction)
    return runs, metadata, data


def construct_runs(models, data, path, *, strategy, seed, factor_examples, **settings):
    """Returns an InfluenceRun for each model, or a TrainedModel if the strategy is "none".

    The arguments, `settings` too, are those of InfluenceRun. Creates the folders of the runs.
    """
    if strategy == NO_INFLUENCE:
        runs = [TrainedModel(model, data, path, **settings) for model in models]
    else:
        runs = [
            InfluenceRun(
                model,
                data,
                path,
                strategy=strategy,
                seed=seed,
                factor_examples=factor_examples,
                **settings,
            )
            for model in models
        ]
    require_different_models(runs)
    for run in runs:
        make_folder(run.folder)  # for a TrainedModel; an InfluenceRun has already created it
    return runs


def require_different_models(runs):
    """Raises UserError if two runs have the same weights, and so the same folder."""
    if len({run.folder for run in runs}) < len(runs):
        raise UserError(
            "--checkpoint_dir: two of these folders hold the same model: name each model once"
        )


def load_models(paths, device, clean, *, model_name, fraction, labels_file, models_per_checkpoint):
    """Returns the models of several checkpoints, their metadata, and the images they trained on.

    Of each training, the last `models_per_checkpoint` networks are used: the final one and the
    snapshots before it. The other arguments are those of `load_trained`. Raises UserError if the
    models were not trained alike.
    """
    models = []
    metadata = []
    for path in paths:
        model, model_metadata, data = load_trained(
            path,
            device,
            clean,
            model_name=model_name,
            fraction=fraction,
            labels_file=labels_file,
        )
        snapshots = model_metadata.get("snapshots", {})  # an earlier train.py kept none
        models += [*earlier_models(path, model, snapshots, models_per_checkpoint), model]
        metadata.append(model_metadata)
    for path, model_metadata in zip(paths, metadata, strict=True):
        words = ""
        if model_metadata["data_sha256"] != metadata[0]["data_sha256"]:
            words = "training images or labels"
        elif training_flags_of(model_metadata) != training_flags_of(metadata[0]):
            words = "hyperparameters"
        if words:
            raise UserError(
                f"--checkpoint_dir: {path} and {paths[0]} differ in their {words}: "
                "give models that were trained alike"
            )
    return models, metadata, data


def training_flags_of(metadata):
    """Returns the flags that decide how a network is trained, from the metadata of a checkpoint.

    An earlier train.py had no `--recipe`, so its checkpoints lack the recipe's name. It trained by
    what is now `published`.
    """
    training_flags = dict(metadata["recipe"])
    training_flags.setdefault("recipe", "published")
    return training_flags


# ---- Results -------------------------------------------------------------------------------------

PHASES = ("load", "covariance", "eigendecomposition", "lambda", "index", "scores", "report")
MAX_NAME = 16  # characters of a class name in a figure


@contextlib.contextmanager
def timed(seconds, phase):
    """Adds the wall-clock seconds of the block to `seconds[phase]`; `phase` is one of PHASES."""
    start = time.perf_counter()
    try:
        yield
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    finally:  # the time also counts if memory was full, and the block runs again
        seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - start


def result_folder(runs):
    """Returns the folder for tables and figures.

    That is the folder of a single run. Several runs share another folder, named after all of them.
    """
    if len(runs) == 1:
        return runs[0].folder
    names = sorted(run.folder.name for run in runs)  # so their order does not matter
    model_name = names[0].rpartition("-")[0]
    return runs[0].folder.with_name(f"{model_name}_mean_of_{len(runs)}-{sha256(*names)[:8]}")


def peak_memory_bytes(device):
    """Returns the peak of CUDA memory, or of resident memory on a CPU.

    Returns None on Windows, where Python has no module `resource`.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux kilobytes
    return peak * unit


def environment(device):
    """Returns the peak memory so far, the hardware and the versions, for the record of a run."""
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

    `seconds` contains the seconds by phase. Raises ValueError if a field is NaN or infinite.
    """
    by_phase = {phase: round(seconds.get(phase, 0.0), 3) for phase in PHASES}
    by_phase["total"] = round(sum(seconds.values()), 3)
    record = {"flags": flags, **fields, "seconds": by_phase, **environment(device)}
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n")


@contextlib.contextmanager
def recorded(path, *, flags, fields, device, seconds):
    """Writes the json record of a run before the block, and again after it.

    The block draws figures. If that fails, the first record remains. The second record has the
    final seconds. Put `timed` inside this block: it then adds the seconds of the figures before the
    second record is written.
    """
    write = partial(
        write_record,
        path,
        flags=flags,
        fields=fields,
        device=device,
        seconds=seconds,
    )
    write()
    yield
    write()


def remove_results(*paths):
    """Removes files of an earlier run, so that a run that fails leaves no mixture of two runs."""
    for path in paths:
        path.unlink(missing_ok=True)


def print_seconds(seconds):
    """Prints the seconds by phase and their sum."""
    by_phase = ", ".join(f"{phase} {seconds.get(phase, 0.0):.1f}" for phase in PHASES)
    print(f"{sum(seconds.values()):.1f} s in all: {by_phase}")


def print_paths(paths):
    """Prints the paths of results, one per line."""
    for path in paths:
        if path.suffix == ".safetensors":
            print(f"scores in {path}")
        else:
            print(f"wrote {path}")


def write_table(path, columns, rows):
    """Writes column names and rows to a csv file. A failure leaves no incomplete file."""
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)


def import_matplotlib():
    """Returns matplotlib, imported without the user's environment variable MPLBACKEND.

    Notebooks set it for the programs that they start. If it names a backend that is not installed,
    the import of matplotlib fails. Saving a figure to a file needs no such backend.
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

    A failure leaves no incomplete file. The user's matplotlib settings have no effect. Letters that
    the font DejaVu Sans lacks, such as Chinese ones, need another installed font.
    """
    matplotlib = import_matplotlib()
    from matplotlib import font_manager
    from matplotlib.figure import Figure

    installed = {font.name for font in font_manager.fontManager.ttflist}
    # Such as Noto Sans CJK, Unifont and Arial Unicode MS.
    fallback_fonts = sorted(name for name in installed if "CJK" in name or "Uni" in name)
    style = dict(matplotlib.rcParamsDefault)
    style["font.family"] = ["DejaVu Sans", *fallback_fonts]
    style["text.parse_math"] = False  # a class name may contain a $
    with matplotlib.rc_context(style), atomic_path(path) as temporary:
        figure = Figure((width, height))
        yield figure
        figure.savefig(temporary, format="png", dpi=150, bbox_inches="tight")


# The size of a contact sheet's cell in pixels, and the height of the text at the cell's top.
CELL_WIDTH, CELL_HEIGHT, TEXT_HEIGHT = 42, 54, 19
SHEET_PIXELS_PER_INCH = 33  # how many pixels of the sheet an inch of the figure shows


def draw_contact_sheet(path, images, texts, colours, columns, title):
    """Draws a contact sheet, a grid of images, as a png file. Each image is below its own text.

    images: uint8 [N, 3, 32, 32]; texts: of at most three lines each; colours: of the texts;
    columns: images per row.
    """
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    sheet = np.full((rows * CELL_HEIGHT, columns * CELL_WIDTH, 3), 255, np.uint8)
    width = columns * CELL_WIDTH / SHEET_PIXELS_PER_INCH
    height = rows * CELL_HEIGHT / SHEET_PIXELS_PER_INCH
    with figure_file(path, width, height) as figure:
        axes = figure.add_axes((0, 0, 1, 1))
        axes.axis("off")
        for cell, (image, text, colour) in enumerate(zip(images, texts, colours, strict=True)):
            row, column = divmod(cell, columns)
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
    """Returns a name, or only its two ends if it is longer than MAX_NAME characters."""
    if len(name) <= MAX_NAME:
        return name
    head = MAX_NAME // 2
    tail = MAX_NAME - head - 1  # the … is one character, too
    return f"{name[:head]}…{name[-tail:]}"
