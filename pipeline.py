"""What train.py, analyze.py and detect_mislabeled_dataset.py share, in the order in which data meets it:
command line ► files ► images and labels ► label corruption ► checkpoints ► batches ► network ► influence ► results.
"""

import argparse
import contextlib
import copy
import csv
import ctypes
import hashlib
import inspect
import io
import itertools
import json
import math
import os
import platform
import secrets
import shlex
import shutil
import stat
import sys
import time
import unicodedata
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from importlib.metadata import version
from operator import itemgetter
from pathlib import Path
from types import SimpleNamespace

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
CHECKPOINT_DIR = "./checkpoints"
# How torch says that memory is full, and kronfluence that even a single image did not fit.
FULL_MEMORY = (
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "DefaultCPUAllocator",
    "No executable batch size",
)


class UserError(Exception):
    """A mistake only the user can put right; its text is one sentence that says what to do."""

    status = 2


class NumericalError(UserError):
    """A NaN or an infinity where a number was due; its text is one sentence that says where and why."""

    status = 1


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, without the usage text."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def run(main):
    """Calls `main` and turns what can go wrong into one line on standard error.

    Exit status 2 for a mistake of the user, 130 for Ctrl-C, 1 for a failure of the machine or a NaN.
    """
    # kronfluence constructs a GradScaler by its old name, in float32 and bfloat16 too, where it does nothing.
    warnings.filterwarnings("ignore", message=r".*GradScaler")
    with contextlib.suppress(AttributeError):  # a stream of a notebook
        sys.stdout.reconfigure(
            errors="backslashreplace"
        )  # names of files that the console has no letters for
    with contextlib.suppress(
        AttributeError, TypeError
    ):  # glibc keeps freed memory: saves 3 to 16 % on AVX2
        for option, value in ((-4, 0), (-1, 2**31 - 1)):  # M_MMAP_MAX, M_TRIM_THRESHOLD
            ctypes.CDLL(None).mallopt(option, value)
    try:
        return main()
    except UserError as error:
        status, message = error.status, f"error: {error}"
    except KeyboardInterrupt:
        status, message = 130, "interrupted; nothing is half-written, the same command starts again"
    except (OSError, SafetensorError) as error:  # a full disk, a file that may not be written
        status, message = 1, f"error: {first_line(error)}; what earlier runs wrote is unharmed"
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError) or any(sign in str(error) for sign in FULL_MEMORY)):
            raise
        status, message = (
            1,
            "error: out of memory: free some, lower the batch sizes, or leave a GPU by --device cpu",
        )
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(status)


def first_line(error):
    """Returns the first line of an exception's text, or its type where it has none."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def number(kind, description, allowed, word=None):
    """Returns an argparse type: `kind(text)` where `allowed` holds of it, else an error that asks for `description`.

    Where there is a `word` that stands for no number, that is None.
    """

    def parse(text):
        if text == word:
            return None
        with contextlib.suppress(ValueError):
            if allowed(value := kind(text)):
                return value
        raise argparse.ArgumentTypeError(f"'{text}' is not {description}")

    return parse


positive_int = number(
    int, "a whole number of at least 1 and below 2**31", lambda value: 1 <= value < 2**31
)
whole_number = number(
    int, "a whole number of at least 0 and below 2**32", lambda value: 0 <= value < 2**32
)
non_negative_float = number(float, "a number of at least 0", lambda value: 0 <= value < math.inf)
damping = number(
    float,
    "a number of at least 0, or 'heuristic'",
    lambda value: 0 <= value < math.inf,
    "heuristic",
)
some_or_all = number(
    int, "a whole number of at least 1, or 'all'", lambda value: 1 <= value < 2**31, "all"
)
corrupt_fraction = number(
    float, "a fraction below 1, such as 0.1 (0 means none)", lambda value: 0 <= value < 1
)


def shared_parser(description):
    """Returns a parser with the flags that all scripts have."""
    parser = OneLineParser(description=description, allow_abbrev=False)
    flag = parser.add_argument
    wrong = {"type": corrupt_fraction, "metavar": "FRACTION"}
    labels = parser.add_mutually_exclusive_group().add_argument
    flag(
        "--dataset", choices=LOADERS, default="cifar10", help="which images (default: %(default)s)"
    )
    flag(
        "--dataset_dir",
        default="./data",
        help="class folders lie in its train/ and test/ (default: %(default)s)",
    )
    flag(
        "--output_dir",
        default="./influence_results",
        help="gets the results (default: %(default)s)",
    )
    labels(
        "--corrupt_percentage",
        **wrong,
        help="fraction of wrong labels; 0 means none (default: %(default)s)",
    )
    labels(
        "--noisy_labels",
        metavar="CSV",
        help="labels to train on, by path or by index in the whole data set",
    )
    flag(
        "--num_train_examples",
        type=positive_int,
        metavar="N",
        help="use N training images, the same in every script",
    )
    flag(
        "--precision",
        choices=("auto", "fp32", "bf16"),
        default="auto",
        help="auto: bfloat16 where that is fast",
    )
    flag(
        "--device",
        choices=("auto", "cuda", "cpu"),
        default="auto",
        help="auto: CUDA where there is one",
    )
    return parser


def influence_parser(description):
    """Returns a parser with the flags that analyze.py and detect_mislabeled_dataset.py share."""
    parser = shared_parser(description)
    flag = parser.add_argument
    several = {"nargs": "+", "default": [CHECKPOINT_DIR], "metavar": "DIR"}
    eigenvalues = {"type": damping, "default": "heuristic", "metavar": "X"}
    part = {"type": some_or_all, "default": "all", "metavar": "N"}
    flag(
        "--checkpoint_dir",
        **several,
        help=f"the model's folder; of several, mean scores (default: {CHECKPOINT_DIR})",
    )
    flag("--cleaned", action="store_true", help="take the model of train.py --corrections")
    flag(
        "--factor_strategy",
        choices=STRATEGIES,
        default="ekfac",
        help="the curvature (default: %(default)s)",
    )
    flag(
        "--factor_examples",
        **part,
        help="fit the curvature on N random images, or on all (default: %(default)s)",
    )
    flag(
        "--train_batch_size",
        type=positive_int,
        metavar="N",
        help="images per step (default: 64, on CUDA 1024)",
    )
    rule = "added to each eigenvalue; heuristic: 0.1 x the layer's mean one (default: %(default)s)"
    flag("--damping_factor", **eigenvalues, help=rule)
    flag(
        "--seed",
        type=whole_number,
        default=1004,
        help="of the Fisher matrix's pseudo-labels (default: %(default)s)",
    )
    return parser


def command(script, args, **values):
    """Returns the command that runs a script with the flags of `args` that all scripts have, and others, `values`.

    Defaults are left out, and flags whose value is None or False.
    """
    defaults = vars(shared_parser("").parse_args([]))
    flags = {name: getattr(args, name) for name in defaults} | values
    defaults["checkpoint_dir"] = CHECKPOINT_DIR
    words = ["python", script]
    for name, value in flags.items():
        if value is not None and value is not False and value != defaults.get(name):
            words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return shlex.join(words)


def is_main_process():
    """Returns whether this process is the one that prints and writes: the first one under torchrun."""
    return int(os.environ.get("WORLD_SIZE") or 1) == 1 or int(os.environ.get("RANK") or 0) == 0


def choose_device(name, several_processes):
    """Returns the torch device for a `--device` value: under torchrun, each process's own GPU.

    Raises UserError for `cuda` where there is none. Several processes are refused where the script cannot use them, or
    has no GPU for each: kronfluence sums its factors over processes on CUDA only.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"argument --device: {unusable_gpu() or 'there is no NVIDIA GPU here'}; use cpu or auto"
        )
    on_gpu, count = (
        name != "cpu" and torch.cuda.is_available(),
        int(os.environ.get("WORLD_SIZE") or 1),
    )
    if count > 1 and not (on_gpu and several_processes):
        place = "this script" if on_gpu else "a run on the CPU"
        raise UserError(
            f"WORLD_SIZE is {count}, but {place} takes one process only: start it without torchrun"
        )
    if count > 1 and int(os.environ.get("LOCAL_RANK") or count) >= torch.cuda.device_count():
        raise UserError(
            "each process needs a GPU of its own: start them with torchrun, as many as there are GPUs"
        )
    return (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK") or 0))
        if on_gpu
        else torch.device("cpu")
    )


def unusable_gpu():
    """Returns why torch cannot use an NVIDIA GPU that is there, as a sentence; empty where it can or there is none."""
    there = shutil.which("nvidia-smi") or Path("/proc/driver/nvidia/version").exists()
    if torch.cuda.is_available() or not there:
        return ""
    reason = "it finds none"
    try:
        torch.cuda.init()
    except Exception as error:  # in torch's own words
        reason = first_line(error).rstrip(".")
    return f"torch cannot use the NVIDIA GPU ({reason}): install torch for its driver, and unset CUDA_VISIBLE_DEVICES"


def print_machine(device, dtype):
    """Prints where and how the script computes, and why not on a GPU that is there."""
    if is_main_process():
        on_cpu = device.type == "cpu"
        name = (
            f"{torch.get_num_threads()} CPU threads"
            if on_cpu
            else torch.cuda.get_device_name(device)
        )
        print(f"{name}, {str(dtype).removeprefix('torch.')}")
        if on_cpu and (reason := unusable_gpu()):
            print(f"On the CPU: {reason}")


# ---- Files: whole or not at all ------------------------------------------------------------------


def make_folder(path):
    """Creates a folder with its parents. Raises UserError where that is impossible."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{path} cannot be made a folder ({error.strerror}): name another one"
        ) from error


@contextlib.contextmanager
def atomic_path(path):
    """Yields a temporary path beside `path` that takes its place when the block succeeds, and vanishes otherwise."""
    path = Path(path)
    make_folder(path.parent)
    temporary = path.with_name(
        f".{secrets.token_hex(8)}.{path.name}"
    )  # containers share folders, but not their pids
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def sha256(*parts):
    """Returns the SHA-256, as hex digits, over tensors and strings in the order given."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(
            part.encode() if isinstance(part, str) else part.detach().cpu().contiguous().numpy()
        )
    return digest.hexdigest()


# ---- Images and labels ---------------------------------------------------------------------------

IMAGE_SIZE = 32
# Seeds of what has to be the same in every script, whatever --seed says.
ORDER_SEED, EXAMPLES_SEED, CORRUPTION_SEED = 11, 12, 13
SYNTHETIC_SEEDS = {"train": (14, 5), "test": (14, 4)}
NUM_SYNTHETIC = {"train": 5000, "test": 500}
# What systems put beside images, in lower case; and all that begins with a dot.
SYSTEM_NAMES = {
    "@eadir",
    "@tmp",
    "#recycle",
    "#snapshot",
    "@recycle",
    "lost+found",
    "__macosx",
    "$recycle.bin",
}
SYSTEM_NAMES |= {"system volume information", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"}
# Of CIFAR-10's training images; values are scaled to 0..1 before.
CHANNEL_MEAN = (0.4914, 0.4822, 0.4465)
CHANNEL_STD = (0.2470, 0.2435, 0.2616)


@dataclass(frozen=True)
class ImageData:
    """Labelled images in memory.

    images: uint8 [N, 3, 32, 32]; labels: int64 [N], those to train on; true_labels: int64 [N], without the ones made
    wrong on purpose or given by --noisy_labels; class_names: one per class; paths: one per image, empty where images
    have no files of their own; indices: int64 [N] on the CPU, each one's place among those loaded, by which the tables
    call it; numbers: int64 [N] on the CPU, its place in the whole data set; channel_mean, channel_std: of red, green
    and blue, by which a network's input is standardised.
    """

    images: Tensor
    labels: Tensor
    true_labels: Tensor
    class_names: list
    paths: list
    indices: Tensor
    numbers: Tensor
    channel_mean: tuple = CHANNEL_MEAN
    channel_std: tuple = CHANNEL_STD

    def __len__(self):
        return len(self.labels)

    @property
    def is_corrupted(self):
        """Which labels are not the true ones, bool [N]."""
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
        names = "images", "labels", "true_labels", "indices", "numbers"
        tensors = {name: getattr(self, name)[indices] for name in names}
        return replace(self, **tensors, paths=[self.paths[i] for i in indices.tolist()])

    def without(self, indices):
        """Returns all examples but those at `indices`."""
        kept = torch.ones(len(self), dtype=torch.bool)
        kept[indices] = False
        return self.take(kept.nonzero().squeeze(1))

    def to(self, device):
        """Returns the same with images and labels on `device`, and with its digest, which takes long to compute."""
        tensors = {
            name: getattr(self, name).to(device) for name in ("images", "labels", "true_labels")
        }
        moved = replace(self, **tensors)
        vars(moved)["digest"] = self.digest
        return moved


def load_data(dataset, dataset_dir, split, num_examples=None, cache_dir=None):
    """Loads the `train` or `test` images of a `--dataset`, or `num_examples` of them, as ImageData on the CPU.

    What is decoded from class folders is kept in `cache_dir`, if there is one. Raises UserError where they cannot be
    found or read, or where there are fewer.
    """
    images, labels, class_names, paths, numbers = LOADERS[dataset](
        dataset_dir, split, num_examples, cache_dir
    )
    channels_first = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()  # (N, 3, 32, 32)
    return ImageData(
        channels_first,
        labels,
        labels,
        list(class_names),
        list(paths),
        torch.arange(len(labels)),
        numbers,
    )


def draw_examples(total, num_examples):
    """Returns the indices of the images to use: all, or `num_examples` drawn by a fixed seed, int64 [M]."""
    if num_examples is None:
        return torch.arange(total)
    if num_examples > total:
        raise UserError(
            f"--num_train_examples {num_examples}: there are only {total} training images"
        )
    return torch.randperm(total, generator=torch.Generator().manual_seed(EXAMPLES_SEED))[
        :num_examples
    ]


def load_cifar10(dataset_dir, split, num_examples, cache_dir):
    """Loads CIFAR-10 through torchvision, which checks its files, and downloads it once where it is missing.

    Like the other loaders it returns images, uint8 [N, 32, 32, 3], labels, names of the classes, paths, and numbers.
    """
    try:
        from torchvision.datasets import (
            CIFAR10,
        )  # fails beside a torch that was built for other hardware

        try:
            found = CIFAR10(dataset_dir, train=split == "train")
        except RuntimeError:  # missing or damaged
            make_folder(dataset_dir)
            with (
                FileLock(Path(dataset_dir) / ".cifar10.lock"),
                contextlib.redirect_stdout(io.StringIO()),
            ):
                found = CIFAR10(dataset_dir, train=split == "train", download=True)
    except (ImportError, OSError, RuntimeError, EOFError, ValueError) as error:
        reason = f"CIFAR-10 is not whole in {dataset_dir}, and torchvision cannot load it ({first_line(error)})"
        raise UserError(
            f"{reason}: give --dataset_dir, or --dataset imagefolder or synthetic"
        ) from error
    chosen = draw_examples(len(found.data), num_examples)
    return (
        found.data[chosen.numpy()],
        torch.tensor(found.targets)[chosen],
        found.classes,
        [""] * len(chosen),
        chosen,
    )


def load_imagefolder(dataset_dir, split, num_examples, cache_dir):
    """Loads `<dataset_dir>/<split>/<class>/**`, resized to 32x32 RGB, in a fixed random order, not class by class."""
    samples, class_names = split_samples(Path(dataset_dir), split)
    if split == "train" and is_main_process():
        counts = Counter(class_names[label] for _, label in samples)
        print(f"{len(class_names)} classes in {dataset_dir}: {ten_largest(counts)}")
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(ORDER_SEED))
    chosen = order[draw_examples(len(order), num_examples)]
    paths, labels = zip(*(samples[i] for i in chosen), strict=True)
    return read_images(paths, split, cache_dir), torch.tensor(labels), class_names, paths, chosen


def ten_largest(counts):
    """Returns the ten largest of a Counter as text, how many others there are, and the least of them."""
    parts = [f"{name} {count}" for name, count in counts.most_common()]
    return ", ".join(
        parts
        if len(parts) <= 10
        else [*parts[:10], f"and {len(parts) - 10} others down to {parts[-1]}"]
    )


def same_form(name):
    """Returns a name in one Unicode form: Macs write an ä as two characters, others as one."""
    return unicodedata.normalize("NFC", str(name))


def list_samples(folder, verbose):
    """Returns (path, label) of every file in class folders, sorted, and the names of the classes.

    Hidden files and folders and those of systems are passed over, and the names of such folders printed if `verbose`;
    any other file that is no image is an error when it is read. What is linked to twice is walked once. Raises
    UserError where there are not two classes or more, each with a file in it, where two have one name, or a folder
    cannot be listed.
    """

    def refuse(error):
        raise UserError(
            f"--dataset imagefolder: a folder cannot be listed ({error}): allow or remove it"
        )

    def made_by_people(names):
        return sorted(
            (name for name in names if name[0] != "." and name.lower() not in SYSTEM_NAMES),
            key=same_form,
        )

    if not folder.is_dir():
        raise UserError(
            f"--dataset imagefolder: {folder} must hold a folder of images per class, and is not there"
        )
    tops = set(next(os.walk(folder, onerror=refuse))[1])
    samples, class_names, walked, passed_over = [], [], set(), tops - set(made_by_people(tops))
    for name in made_by_people(tops):
        found = []
        for place, folders, files in os.walk(folder / name, onerror=refuse, followlinks=True):
            if (real := Path(place).resolve()) in walked:
                folders.clear()
                continue
            walked.add(real)
            passed_over |= set(folders) - set(made_by_people(folders))
            folders[:] = made_by_people(folders)
            found += [(f"{place}/{file}", len(class_names)) for file in made_by_people(files)]
        if not found or same_form(name) in class_names:
            reason = (
                "holds no image: fill"
                if not found
                else "has the same name as another class: rename"
            )
            raise UserError(f"--dataset imagefolder: {folder / name} {reason} or remove it")
        samples += found
        class_names.append(same_form(name))
    if len(class_names) < 2:
        raise UserError(
            f"--dataset imagefolder: {folder} must hold at least 2 class folders, not {len(class_names)}"
        )
    if passed_over and verbose:
        print(f"Passed over in {folder}: {', '.join(sorted(passed_over))}")
    return samples, class_names


def split_samples(dataset_dir, split):
    """Returns (path, label) of every image of a split of class folders, and the names of the classes.

    Where there is no `<dataset_dir>/test`, a tenth of each class of `<dataset_dir>/train` is held out for it. The hash
    of its name decides about a file, so that others may come and go and most of the held out ones remain. Raises
    UserError where the classes differ, or nothing can be held out.
    """
    verbose, test_dir = split == "train" and is_main_process(), dataset_dir / "test"
    samples, class_names = list_samples(dataset_dir / "train", verbose)
    if test_dir.exists():
        test_samples, test_names = list_samples(test_dir, verbose)
        for place, lacking in (
            ("test", {*class_names} - {*test_names}),
            ("train", {*test_names} - {*class_names}),
        ):
            if lacking:
                lacks = f"{dataset_dir / place} lacks the classes {', '.join(sorted(lacking))}"
                raise UserError(
                    f"{lacks}: add them, or remove {test_dir}, and a tenth of train is held out for it"
                )
        return (samples if split == "train" else test_samples), class_names

    def by_hash(sample):
        return hashlib.sha256(os.fsencode(os.path.relpath(sample[0], dataset_dir))).digest()

    held_out = set()
    for _, members in itertools.groupby(samples, key=itemgetter(1)):
        ordered = sorted(members, key=by_hash)
        held_out |= set(ordered[: max(1, round(len(ordered) / 10))] if len(ordered) > 1 else ())
    if not held_out:
        raise UserError(
            f"--dataset imagefolder: without {dataset_dir}/test, some class must have 2 images or more"
        )
    if verbose:
        print(
            f"There is no {dataset_dir}/test: {len(held_out)} images, a tenth of each class, are held out for it"
        )
    return [sample for sample in samples if (sample in held_out) == (split == "test")], class_names


def read_images(paths, split, cache_dir):
    """Returns the images in files, uint8 [N, 32, 32, 3]; in `cache_dir`, if there is one, they are kept.

    They are found there by the hash of names, sizes, times and numbers (two files might trade places) of the files.
    Raises UserError, naming the file, where one cannot be read or its name is not UTF-8.
    """
    listing = [inspect.getsource(read_images), inspect.getsource(read_image), version("pillow")]
    for path in paths:
        try:
            info = os.stat(path.encode())  # noqa: PTH116, pathlib takes seconds for as many as there are
            if not stat.S_ISREG(info.st_mode):  # a pipe would be read without an end
                raise OSError("no regular file")
        except (OSError, UnicodeError) as error:
            raise UserError(
                f"{path!r} cannot be read ({first_line(error)}): remove or rename it"
            ) from error
        listing.append(f"{path} {info.st_size} {info.st_mtime_ns} {info.st_ctime_ns} {info.st_ino}")
    cache = Path(cache_dir or "") / "images" / f"{split}-{sha256(*listing)[:16]}.safetensors"
    if cache_dir and cache.exists():
        try:
            return load_file(cache)["images"].numpy()
        except SafetensorError:
            print(f"{cache} is damaged: the images are read anew")
    with ThreadPoolExecutor() as pool:  # Pillow decodes outside Python's lock
        images = list(
            tqdm(pool.map(read_image, paths), f"Reading {split} images", len(paths), leave=False)
        )
    if brightest := max((image.max() for image in images if image.dtype == np.float32), default=0):
        bits = next((bits for bits in (8, 12) if brightest < 2**bits), 16)
        if is_main_process():
            print(
                f"Grey of 16 bits in the {split} images is scaled by the {bits} bits that they use, all alike"
            )
        scale = 255 / (2**bits - 1)
        images = [
            image if image.dtype == np.uint8 else np.rint(image * scale).clip(0, 255)
            for image in images
        ]
    images = np.stack(images).astype(np.uint8)
    if cache_dir and is_main_process():
        with atomic_path(cache) as temporary:
            save_file({"images": torch.from_numpy(images)}, temporary)
    return images


def read_image(path):
    """Returns the image in a file as RGB, uint8 [32, 32, 3], upright, transparency over white.

    Grey of 16 bits stays as it is, as float32. Raises UserError, naming the file, where it cannot be read.
    """
    from PIL import Image, ImageOps

    size = IMAGE_SIZE, IMAGE_SIZE
    try:
        with Image.open(path) as image:
            image.draft(
                "RGB", (2 * IMAGE_SIZE, 2 * IMAGE_SIZE)
            )  # lets a large JPEG be decoded at a lower resolution
            if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
                raise ValueError("32 bits per pixel, of unknown range; save it with 8 or 16")
            image.load()  # turns a TIFF by itself
            with contextlib.suppress(
                Exception
            ):  # of a malformed EXIF Pillow keeps what it could read
                image.getexif()
            for name in (
                "exif",
                "Raw profile type exif",
            ):  # Pillow would write it anew, and fail where malformed
                image.info.pop(name, None)
            ImageOps.exif_transpose(image, in_place=True)
            if image.mode.startswith("I"):  # Pillow would clip it to 8 bits
                grey = Image.fromarray(np.asarray(image).astype(np.float32)).resize(
                    size, Image.Resampling.BILINEAR
                )
                return np.asarray(grey)[..., None].repeat(3, 2)
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return np.asarray(image.convert("RGB").resize(size, Image.Resampling.BILINEAR))
    except Exception as error:  # a damaged file can fail in any way
        raise UserError(
            f"{path} is not a readable image ({first_line(error)}): remove or replace it"
        ) from error


def load_digits(dataset_dir, split, num_examples, cache_dir):
    """Draws digits in random colours, places, sizes and rotations; each is the same whichever others are drawn."""
    chosen = draw_examples(NUM_SYNTHETIC[split], num_examples)
    images, labels = zip(
        *(draw_digit((*SYNTHETIC_SEEDS[split], index)) for index in chosen.tolist()), strict=True
    )
    return np.stack(images), torch.tensor(labels), map(str, range(10)), [""] * len(chosen), chosen


def draw_digit(seed):
    """Returns one image, uint8 [32, 32, 3], and the digit it shows."""
    from PIL import Image, ImageDraw, ImageFont

    random = np.random.default_rng(seed)
    digit = int(random.integers(10))
    # Digit and background differ in brightness whatever their colours; which one is the brighter is random.
    colour, paper = random.permutation(
        [random.integers(0, 115, size=3), random.integers(140, 256, size=3)]
    )
    coarse = random.integers(256, size=(5, 5, 3), dtype=np.uint8)
    texture = np.asarray(
        Image.fromarray(coarse).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
    )
    background = paper + (texture - 127.5) * 0.7 + random.normal(0, 15, texture.shape)

    canvas = Image.new("L", (2 * IMAGE_SIZE, 2 * IMAGE_SIZE))
    font = ImageFont.load_default(size=int(random.integers(18, 29)))
    ImageDraw.Draw(canvas).text(
        (IMAGE_SIZE, IMAGE_SIZE), str(digit), fill=255, font=font, anchor="mm"
    )
    canvas = canvas.rotate(random.uniform(-12, 12), Image.Resampling.BICUBIC)
    left, top = (IMAGE_SIZE // 2 + random.integers(-4, 5, size=2)).tolist()
    mask = (
        np.asarray(canvas.crop((left, top, left + IMAGE_SIZE, top + IMAGE_SIZE)))[..., None] / 255
    )
    return (background * (1 - mask) + colour * mask).clip(0, 255).astype(np.uint8), digit


LOADERS = {"cifar10": load_cifar10, "imagefolder": load_imagefolder, "synthetic": load_digits}


# ---- Label corruption, and what was decided against it -------------------------------------------


def corrupt_labels(labels, fraction, num_classes, seed=CORRUPTION_SEED):
    """Gives exactly round(fraction * N) randomly chosen examples a label drawn uniformly from the other classes.

    labels: int64 [N] on the CPU. Returns new labels, int64 [N], and which ones were changed, bool [N].
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(labels), generator=generator)[: round(fraction * len(labels))]
    shift = torch.randint(1, num_classes, (len(chosen),), generator=generator)
    corrupted = labels.clone()
    corrupted[chosen] = (labels[chosen] + shift) % num_classes
    return corrupted, corrupted != labels


def training_examples(clean, fraction, noisy_labels=None, cleaning=None):
    """Returns the ImageData to train on, of `clean`, the images as they were loaded.

    Their labels are `noisy_labels`, int64 [N], or else a `fraction` of them, as of `--corrupt_percentage`, is made
    wrong. Then the `new_labels` of a `cleaning`, a dictionary by index among the loaded images, are put in, and its
    `excluded` indices left out. What a person says of a label that was not wrong counts as true.
    """
    if noisy_labels is None:
        noisy_labels, _ = corrupt_labels(clean.labels, fraction or 0, len(clean.class_names))
    data = replace(clean, labels=noisy_labels)
    if cleaning is None:
        return data
    labels = data.labels.clone()
    for index, label in cleaning["new_labels"].items():
        labels[index] = label
    true_labels = torch.where(data.is_corrupted, data.true_labels, labels)
    return replace(data, labels=labels, true_labels=true_labels).without(cleaning["excluded"])


# ---- Labels and decisions in csv files ------------------------------------------------------------


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
            raise UserError(f"{flag} {path}: {header}")
        for row in reader:
            place = f"{flag} {path}, line {reader.line_num + above}"
            if None in row or None in row.values():
                cells = "has another number of cells than the first line"
                raise UserError(
                    f"{place}: {cells}; where the last is empty, put another column behind it"
                )
            if any(row.values()):
                yield place, row
    except (OSError, ValueError, csv.Error) as error:
        reason = first_line(error)
        raise UserError(
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
                    self.places.setdefault(same_form(spelling(path)), index)

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
                same_form, itertools.chain(self.spellings(path), self.spellings(path.strip()))
            )
            known = next((spelling for spelling in spellings if spelling in self.places), None)
            where = (
                "held out for the test"
                if known
                else f"not among the {len(self.data)} training images"
            )
            index, problem = self.places.get(known), f"{path} is {where}"
        elif any(self.data.paths):
            raise UserError(
                f"{place}: needs a path; an index is another image once files come or go"
            )
        elif not number or (passes_over and not number.isdecimal()):  # such as 1.0
            raise UserError(f"{place}: needs an index, a whole number from 0 on")
        else:
            problem = f"there is no training image {number:.20}, only 0 to {len(self.data) - 1}"
            index = self.numbered.get(number.lstrip("0") or "0")
        if index is None and not passes_over:
            raise UserError(f"{place}: {problem}")
        if index in self.found:
            raise UserError(f"{place}: image {index} has a row before this one")
        if index is not None:
            self.found.add(index)
        return index


def find_class(place, name, class_names):
    """Returns the number of the class of that name, in any Unicode form, also with blanks around it."""
    for spelled in map(same_form, (name, name.strip())):
        if spelled in class_names:
            return class_names.index(spelled)
    raise UserError(f"{place}: {name!r} is none of the classes {', '.join(class_names)}")


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
        raise UserError(
            f"--noisy_labels {path}: none of its {others} rows is about a training image"
        )
    print(
        f"{path}: {used} rows, and {others} of other images; {ten_largest(changes) or 'none differs'}"
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
            raise UserError(f"{place}: {said}: {flags}")
        new = row["new_label"]
        decided[index] = find_class(place, new, data.class_names) if new.strip() else None
        if decided[index] not in (None, data.labels[index]):
            changes[f"{old} → {data.class_names[decided[index]]}"] += 1
    excluded = [index for index, label in decided.items() if label is None]
    if len(excluded) > len(data) / 2:
        most = f"leaves out {len(excluded)} of the {len(data)} images, because an empty new_label does so"
        raise UserError(f"--corrections {path} {most}: delete rows that nothing was decided about")
    print(
        "Corrections: "
        + ", ".join([ten_largest(changes)] * bool(changes) + [f"left out {len(excluded)}"])
    )
    return {
        "excluded": excluded,
        "new_labels": {i: label for i, label in decided.items() if label is not None},
    }


# ---- Checkpoints ---------------------------------------------------------------------------------


def checkpoint_path(checkpoint_dir, fraction, noisy=False, cleaned=False):
    """Returns the path of the checkpoint trained with the corruption `fraction` (None or 0: labels as they are).

    A `noisy` one was trained on labels from a file, a `cleaned` one on what a person decided about them.
    """
    name = "model_noisy" if noisy else f"model_corrupt_{fraction}" if fraction else "model"
    return Path(checkpoint_dir) / f"{name}{'_cleaned' * cleaned}.pth"


def file_digest(path):
    """Returns the SHA-256 of the file of `--noisy_labels`, None where there is none. Raises UserError if unreadable."""
    try:
        return None if path is None else hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(
            f"--noisy_labels {path} cannot be read ({error.strerror}): name another file"
        ) from error


def save_checkpoint(path, model, metadata):
    """Writes weights and `metadata` (numbers, strings, lists, dicts, tensors) to `path`, whole or not at all."""
    weights = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    content = io.BytesIO()  # so that a full disk fails as an OSError, not inside torch
    torch.save({"weights": weights, "metadata": metadata}, content)
    with atomic_path(path) as temporary:
        temporary.write_bytes(content.getbuffer())


def load_checkpoint(path, device="cpu"):
    """Returns the model in eval mode on `device`, and the metadata, of a checkpoint that train.py wrote.

    Raises UserError where there is no checkpoint, or where the file is something else.
    """
    path = Path(path)
    if not path.is_file():
        others = sorted(other.name for other in path.parent.glob("model*.pth"))
        there = f", only {', '.join(others[:3])}{', …' * (len(others) > 3)}" if others else ""
        raise UserError(
            f"there is no checkpoint {path}{there}: run train.py with the same data flags first"
        )
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        metadata = checkpoint["metadata"]
        if not metadata.keys() >= {"margins", "given_labels"}:
            raise ValueError("written by an earlier train.py")
        model = construct_resnet9(len(metadata["class_names"]))
        model.load_state_dict(checkpoint["weights"])
    except OSError:
        raise
    except Exception as error:  # a foreign file can fail in any way
        reason = f"{first_line(error):.100}"
        raise UserError(
            f"{path} is not a whole checkpoint of train.py ({reason}): train again"
        ) from error
    return model.to(device, memory_format=torch.channels_last).eval(), metadata


def load_trained(path, device, clean, fraction, labels_file=None):
    """Loads a checkpoint of a training on `clean`, the images as they were loaded.

    It had a `fraction` of wrong labels, or those in the `labels_file` of `--noisy_labels`. Prints which one it is.
    Returns model, metadata, and the ImageData that it was trained on. Raises UserError where that was another one.
    """
    model, metadata = load_checkpoint(path, device)
    same = (metadata["num_loaded"], metadata["labels_sha256"]) == (
        len(clean),
        file_digest(labels_file),
    )
    data = (
        training_examples(clean, fraction, metadata["given_labels"], metadata["cleaning"])
        if same
        else clean
    )
    if not same or (data.digest, data.class_names) != (
        metadata["data_sha256"],
        metadata["class_names"],
    ):
        labels = "corrupt_percentage" if metadata["noisy_labels"] is None else "noisy_labels"
        was = f"{metadata['num_train']} of {metadata['dataset']}, --{labels} {metadata[labels]} as it was then"
        raise UserError(
            f"{path} was trained on other images or labels ({was}): give its data flags, or train again"
        )
    if is_main_process():
        wrong, accuracy = data.is_corrupted.sum(), 100 * metadata["accuracy"]["test"]
        print(
            f"{path}: trained on {len(data)} images ({wrong} with a wrong label), test accuracy {accuracy:.2f} %"
        )
    return model, metadata, data


# ---- Batches and the network ---------------------------------------------------------------------


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
        return self.logits(self.features(images))

    def logits(self, features):  # (B, 128) -> (B, num_classes)
        # Logits in bfloat16 would tie, and losses and margins with them.
        with torch.autocast(features.device.type, enabled=False):
            return 0.2 * self.head(features.to(self.head.weight.dtype))


def construct_resnet9(num_classes=10):
    """Returns a ResNet-9 with random weights, channels last in memory."""
    return ResNet9(num_classes).to(memory_format=torch.channels_last)


def margin(logits, labels, of_others=torch.logsumexp):
    """Returns logit[label] - logsumexp(the other logits), [B]: the log-odds of the label.

    With `of_others=torch.amax` it is the difference to the largest of the others (Pleiss et al. 2020, section 3.1).
    """
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return logits.gather(1, labels[:, None]).squeeze(1) - of_others(others, 1)


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
        rows, columns = (
            dilation * (size - 1)
            for dilation, size in zip(layer.dilation, layer.kernel_size, strict=True)
        )
        left, top = columns // 2, rows // 2
        return left, columns - left, top, rows - top
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
    model.requires_grad_(True)
    calls, values = record_calls(model, layers, images)
    exact = [layer_gradients(value, layers) for value in values]
    tracked = []
    for name, layer in layers.items():
        expected = [gradients[name] for gradients in exact]  # of each image
        if expected[0] is None:  # the layer does not take part in the logits
            continue
        reason = refusal(model, layer, calls[name], values, expected)
        if reason:
            raise UserError(f"influence cannot be computed for the layer '{name}': {reason}")
        tracked.append(name)
    return tracked


def record_calls(model, layers, images):
    """Returns each layer's calls by name, lists of (input, output), and a value per image, [B].

    The value is a sum of the logits with a different weight for each, so that its gradient does not
    vanish where the network is certain of a class.
    """
    calls = {name: [] for name in layers}

    def record(name):
        return lambda _, inputs, output: calls[name].append((inputs[0], output))

    hooks = [layer.register_forward_hook(record(name)) for name, layer in layers.items()]
    with torch.enable_grad():
        logits = model(images)
        values = logits @ torch.linspace(1, 2, logits.shape[1]).to(logits)
    for hook in hooks:
        hook.remove()
    return calls, values


def layer_gradients(value, layers):
    """Returns the gradient of a value by each layer's weights, [O, I], in the order of `patches`.

    It is None for a layer that does not take part in the value.
    """
    weights = [layer.weight for layer in layers.values()]
    biases = [layer.bias for layer in layers.values() if layer.bias is not None]
    found = torch.autograd.grad(value, weights + biases, retain_graph=True, allow_unused=True)
    of_weights, of_biases = found[: len(weights)], iter(found[len(weights) :])
    gradients = {}
    for (name, layer), gradient in zip(layers.items(), of_weights, strict=True):
        of_bias = None if layer.bias is None else next(of_biases)
        if gradient is not None and gradient.dim() == 4:
            gradient = gradient.permute(0, 2, 3, 1).flatten(1)
        if gradient is not None and of_bias is not None:
            gradient = torch.cat([gradient, of_bias[:, None]], 1)
        gradients[name] = gradient
    return gradients


def refusal(model, layer, calls, values, expected):
    """Returns why the trackers would be wrong for a layer, and what to do; None if they are right.

    calls: its (input, output) in one pass; values [B]: one per image; expected: the layer's
    gradient of each value, [O, I], by autograd.
    """
    names = [name for name, other in model.named_modules(remove_duplicate=False) if other is layer]
    if len(names) > 1:
        return f"it is also registered as '{names[1]}'; register it once"
    if len(calls) != 1:
        return f"it is called {len(calls)} times in one pass; call each layer exactly once"
    (inputs, outputs), batch = calls[0], len(values)
    if len(inputs) != batch:
        return f"its input has {len(inputs)} rows for {batch} images; keep a row for each image"
    (gradient,) = torch.autograd.grad(
        values.sum(), outputs, retain_graph=True, materialize_grads=True
    )
    with torch.no_grad():
        found = per_sample_gradient(patches(layer, inputs), by_position(layer, gradient))
    for image, exact in zip(found, expected, strict=True):
        if (image - exact).norm() > LARGEST_ERROR * exact.norm():
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
    the parameters that influence takes as fixed. Raises UserError, before anything is written,
    where influence cannot be computed for a layer, or `folder` cannot be made.
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
        self.dataset = InfluenceDataset(data, seed)
        self.factor_dataset = self.draw_factor_examples(factor_examples)
        tracked_model, layer_names = self.track_layers()
        self.fixed = fixed_parameters(model, layer_names)
        layers = [model.get_submodule(name) for name in layer_names]
        self.num_weights = sum(weight.numel() for layer in layers for weight in layer.parameters())
        weights = [
            part for name, tensor in sorted(model.state_dict().items()) for part in (name, tensor)
        ]
        fingerprint = sha256(*weights, data.digest)
        # Factors and scores depend on these sections of the code.
        source = inspect.getsource(sys.modules[__name__])
        code = source.partition("\n# ---- Batches")[2].partition("\n# ---- Results")[0]
        self.depends_on = [fingerprint, strategy, str(dtype), seed, len(self.factor_dataset), code]
        self.depends_on += [version("torch"), version("kronfluence")]
        self.folder = Path(f"{path}-{fingerprint[:8]}")
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
        if count in ("all", None) or count >= total:
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
                with safe_open(path, "pt"):  # raises if the file is shorter or longer than it says
                    pass
        except (SafetensorError, ValueError):
            print(f"{path} is damaged: it is computed anew")
            shutil.rmtree(folder)
            return


def load_runs(args, seconds):
    """Returns what the flags of `influence_parser` name, ready to compute influence.

    That is an InfluenceRun per model, the metadata of each, and their training images, ImageData on the CPU. Raises
    UserError where models were not trained alike, or one comes twice.
    """
    device = choose_device(args.device, several_processes=True)
    dtype = configure_precision(args.precision, device)
    print_machine(device, dtype)
    clean = load_data(
        args.dataset, args.dataset_dir, "train", args.num_train_examples, args.output_dir
    )
    if args.noisy_labels is not None:
        args.corrupt_percentage = None  # has a default in the detection
    which = {
        "fraction": args.corrupt_percentage,
        "noisy": args.noisy_labels is not None,
        "cleaned": args.cleaned,
    }
    paths = [checkpoint_path(path, **which) for path in args.checkpoint_dir]
    loaded = [
        load_trained(path, device, clean, args.corrupt_percentage, args.noisy_labels)
        for path in paths
    ]
    models, metadata, trained_on = zip(*loaded, strict=True)
    for name, words in (("data_sha256", "training images or labels"), ("recipe", "recipe")):
        for path, other in zip(paths, metadata, strict=True):
            if other[name] != metadata[0][name]:
                models = f"--checkpoint_dir: {path} and {paths[0]}"
                raise UserError(
                    f"{models} differ in their {words}: give models that were trained alike"
                )
    settings = {"strategy": args.factor_strategy, "dtype": dtype, "seed": args.seed}
    settings |= {
        "seconds": seconds,
        "batch_size": args.train_batch_size,
        "factor_examples": args.factor_examples,
    }
    on_device = trained_on[0].to(device)
    runs = [
        InfluenceRun(model, on_device, Path(args.output_dir) / paths[0].stem, **settings)
        for model in models
    ]
    if len({run.folder for run in runs}) < len(runs):
        raise UserError(
            "--checkpoint_dir: two of these folders hold the same model: name each model once"
        )
    if runs[0].fixed and is_main_process():
        print(f"Influence takes these parameters as fixed: {runs[0].fixed}")
    return runs, metadata, trained_on[0]


# ---- Results -------------------------------------------------------------------------------------

PHASES = ("load", "covariance", "eigendecomposition", "lambda", "scores", "report")


@contextlib.contextmanager
def timed(seconds, phase):
    """Adds the wall-clock seconds that the block takes to those of one of PHASES in a dictionary."""
    start = time.perf_counter()
    yield
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - start


def result_folder(runs):
    """Returns the folder of tables and pictures: that of the run, or one of their own for the mean over several."""
    names = [run.folder.name for run in runs]
    mean = f"{names[0].rpartition('-')[0]}_mean_of_{len(runs)}-{sha256(*names)[:8]}"
    return runs[0].folder if len(runs) == 1 else runs[0].folder.with_name(mean)


def environment(device):
    """Returns what a figure depends on beside the code, hardware and versions, and the peak of memory so far in bytes.

    That is allocated CUDA memory, or resident memory on a CPU (None on Windows).
    """
    peak, name = None, cpu_features().get("cpu_name") or platform.machine()
    if device.type == "cuda":
        peak, name = torch.cuda.max_memory_allocated(device), torch.cuda.get_device_name(device)
    else:
        with contextlib.suppress(ImportError):
            import resource  # in kilobytes on Linux, in bytes on macOS

            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
                1 if sys.platform == "darwin" else 1024
            )
    versions = {"python": platform.python_version(), "torch": str(torch.__version__)}
    versions |= {package: version(package) for package in ("kronfluence", "numpy")}
    where = {
        "device": device.type,
        "device_name": name,
        "cpu_threads": torch.get_num_threads(),
        "versions": versions,
    }
    return {"peak_memory_bytes": peak} | where


def write_record(path, args, fields, device, seconds):
    """Writes the json record of a run: flags, `fields`, seconds, peak memory, hardware and versions; NaN is refused.

    Returns the seconds by phase, rounded.
    """
    rounded = {phase: round(seconds.get(phase, 0.0), 3) for phase in PHASES}
    rounded["total"] = round(sum(seconds.values()), 3)
    record = {"flags": vars(args), **fields, "seconds": rounded, **environment(device)}
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n")
    return rounded


def print_paths(rounded, paths):
    """Prints seconds by phase, as of `write_record`, and the paths of scores and files."""
    print(
        f"{rounded['total']:.1f} s in all: "
        + ", ".join(f"{phase} {rounded[phase]:.1f}" for phase in PHASES)
    )
    for path in paths:
        print(f"{'scores in' if path.suffix == '.safetensors' else 'wrote'} {path}")


def write_table(path, columns, rows):
    """Writes rows under the names of their columns to a csv file, whole or not at all."""
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])


@contextlib.contextmanager
def figure_file(path, width, height):
    """Yields a matplotlib figure of so many inches, which becomes a png file, whole or not at all.

    It depends on no setting of the user's matplotlib, and has letters of any script that a font is installed for.
    """
    import matplotlib
    from matplotlib import font_manager
    from matplotlib.figure import Figure

    installed = {font.name for font in font_manager.fontManager.ttflist}
    fonts = ["DejaVu Sans", *sorted(name for name in installed if "CJK" in name or "Uni" in name)]
    style = {
        **matplotlib.rcParamsDefault,
        "font.family": fonts,
        "text.parse_math": False,
    }  # names may have a $
    with matplotlib.rc_context(style), atomic_path(path) as temporary:
        figure = Figure((width, height))
        yield figure
        figure.savefig(temporary, format="png", dpi=150, bbox_inches="tight")


def draw_contact_sheet(path, images, texts, colours, columns, title):
    """Draws images, uint8 [N, 3, 32, 32], as one png file, `columns` a row, each under its text, in its colour.

    The texts have three lines at most.
    """
    columns, rows = min(columns, len(images)), math.ceil(len(images) / columns)
    width, height, top = 42, 54, 19  # of a cell; top is the height of its text
    sheet = np.full((rows * height, columns * width, 3), 255, np.uint8)
    with figure_file(path, columns * width / 33, rows * height / 33) as figure:
        axes = figure.add_axes((0, 0, 1, 1))
        axes.axis("off")
        for place, (image, text, colour) in enumerate(zip(images, texts, colours, strict=True)):
            y, x = (
                place // columns * height + top,
                place % columns * width + (width - IMAGE_SIZE) // 2,
            )
            sheet[y : y + IMAGE_SIZE, x : x + IMAGE_SIZE] = image.permute(1, 2, 0).cpu().numpy()
            axes.text(
                x + IMAGE_SIZE / 2, y - 1, text, fontsize=8, color=colour, ha="center", va="bottom"
            )
        axes.imshow(sheet, interpolation="nearest")
        figure.text(0.5, 1.01, title, fontsize=11, ha="center", va="bottom")


def shorten(name):
    """Returns a name of at most 16 characters: both ends of a longer one, since either may tell it apart."""
    return name if len(name) <= 16 else f"{name[:8]}…{name[-7:]}"
