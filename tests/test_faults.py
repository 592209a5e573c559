"""What goes wrong while the scripts run: kills, damaged files, full disks, rivals, little memory, Ctrl-C, torchrun.

A process that is killed may leave anything; the same command must then end as if nothing had happened. 8 moments of
death are tested by default, all 30 by

    KILL_MOMENTS=30 python -m pytest tests/test_faults.py -k killed

Importing torch takes longer than a run on 24 images. So most runs are forks of one process that has everything
imported and nothing computed: this file, started as a script (`serve`). What depends on how Python starts and ends
(Ctrl-C, two at once, torchrun) runs the scripts themselves.
"""

import collections
import contextlib
import faulthandler
import functools
import importlib
import json
import os
import pkgutil
import random
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SYNTHETIC
from filelock import FileLock, Timeout
from safetensors.torch import load_file

import pipeline

TRAIN, ANALYZE, DETECT = SCRIPTS = ("train.py", "analyze.py", "detect_mislabeled_dataset.py")
FLAGS = (*SYNTHETIC, "--num_train_examples", "24", "--precision", "fp32", "--train_batch_size", "8")
DIAGONAL = (*FLAGS, "--factor_strategy", "diagonal")  # no eigendecomposition, which would take most of the time
COMMANDS = {
    TRAIN: (*FLAGS, "--num_train_epochs", "1"),
    ANALYZE: (*DIAGONAL, "--num_query_examples", "4"),
    DETECT: DIAGONAL,
}
CHECKPOINT = Path("checkpoints/model_corrupt_0.1.pth")
SECONDS_UNTIL_HANGING = 240
# One thread: the results do not depend on the machine, and a fork has no pool of threads to miss.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONUTF8": "1"}


# --------------------------------------------------------------------------------------------------
# The process that forks
# --------------------------------------------------------------------------------------------------


def serve():
    """Answers each line of json on standard input, a call of `run_script`, by one line: status, stdout, stderr."""
    for name in ("matplotlib.pyplot", *(script.removesuffix(".py") for script in SCRIPTS)):
        importlib.import_module(name)
    pipeline.NUM_SYNTHETIC["test"] = 50  # because drawing and evaluating 1000 takes longer than all the rest
    for line in sys.stdin:
        (out, out_end), (err, err_end) = os.pipe(), os.pipe()
        process = os.fork()
        if process == 0:
            os.dup2(out_end, 1)
            os.dup2(err_end, 2)
            for descriptor in (out, out_end, err, err_end):
                os.close(descriptor)
            run_script(**json.loads(line))
        os.close(out_end)
        os.close(err_end)
        # One after the other, because a pipe holds more than these runs print.
        texts = [open(pipe, encoding="utf-8").read() for pipe in (out, err)]  # noqa: PTH123, SIM115, a descriptor
        _, status = os.waitpid(process, 0)
        print(json.dumps([os.waitstatus_to_exitcode(status), *texts]), flush=True)


def run_script(name, folder, flags, environment, file_limit, largest_batch, moment):
    """Runs a script in this process, which it ends, as `python <name> <flags>` in `folder` would.

    No file can grow beyond `file_limit` bytes; batches of more than `largest_batch` images find no CUDA memory;
    `moment` is where the process is killed, see `break_off`.
    """
    faulthandler.dump_traceback_later(SECONDS_UNTIL_HANGING, exit=True)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.chdir(folder)
    os.environ.update(environment)
    if file_limit is not None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    if largest_batch is not None:
        run_out_of_memory(largest_batch)
    counts = break_off(moment)
    sys.argv = [name, *flags]
    status = 0
    try:
        runpy.run_path(str(ROOT / name), run_name="__main__")
    except SystemExit as stop:
        status = stop.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    if moment == "count":
        Path(".operations.json").write_text(json.dumps(counts))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


# Where a process can be killed: the kind of operation, the modules that see the function by this name, and, where the
# operation writes a file that can be left half-written, the position and name of the argument that holds its path.
OPERATIONS = {
    "training step": (("pipeline",), "crop_and_flip", None),
    "batch": (("pipeline.InfluenceDataset",), "__getitems__", None),
    "factor or score file": (
        tuple(f"kronfluence.{name}" for name in ("factor.covariance", "factor.eigen", "score.self", "score.pairwise")),
        "save_file",
        (None, "filename"),
    ),
    "arguments file": (("kronfluence.computer.computer",), "save_json", (1, "path")),
    "json file": (("pathlib.Path",), "write_text", (0, None)),
    "checkpoint file": (("pathlib.Path",), "write_bytes", (0, None)),
    "csv file": (("csv",), "writer", None),
    "picture": (("matplotlib.figure.Figure",), "savefig", (1, None)),
    "renaming": (("pathlib.Path",), "replace", None),
}

# How often each comes in an uninterrupted run of COMMANDS.
COUNTS = {
    TRAIN: {"training step": 3, "checkpoint file": 1, "renaming": 1},
    ANALYZE: {
        "arguments file": 8,
        "batch": 7,
        "factor or score file": 3,
        "json file": 5,
        "csv file": 1,
        "picture": 1,
        "renaming": 7,
    },
    DETECT: {
        "arguments file": 7,
        "batch": 6,
        "factor or score file": 3,
        "json file": 5,
        "csv file": 1,
        "picture": 2,
        "renaming": 8,
    },
}


def break_off(moment):
    """Kills this process at `moment`: [kind of OPERATIONS, which one of that kind (from 1), half-written or not].

    `half` lets the operation write its file, halves it and then kills; otherwise the kill comes before the operation.
    The kind "any" counts all operations. Returns the counter of the operations, by kind.
    """
    kind_at, number, half = moment if isinstance(moment, list) else (None, 0, False)
    counts = collections.Counter()

    def watched(kind, function, path_argument):
        @functools.wraps(function)
        def wrapper(*arguments, **named):
            counts[kind] += 1
            now = {kind: counts[kind], "any": counts.total()}.get(kind_at) == number
            half_now = now and half and path_argument is not None
            if now and not half_now:
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*arguments, **named)
            if half_now:
                position, name = path_argument
                path = named[name] if name in named else arguments[position]
                os.truncate(path, os.path.getsize(path) // 2)  # noqa: PTH202, kronfluence's path may be a string
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return wrapper

    for kind, (owners, name, path_argument) in OPERATIONS.items():
        for owner in map(pkgutil.resolve_name, owners):
            setattr(owner, name, watched(kind, getattr(owner, name), path_argument))
    return counts


def run_out_of_memory(largest_batch):
    """Makes every batch of more than `largest_batch` images fail as on a GPU without memory left."""
    whole = pipeline.InfluenceDataset.__getitems__

    def limited(dataset, indices):
        if len(indices) > largest_batch:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return whole(dataset, indices)

    pipeline.InfluenceDataset.__getitems__ = limited


@pytest.fixture(scope="module")
def forked():
    """Runs a script in a folder, in a fork of the serving process; returns the finished process."""
    server = subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        encoding="utf-8",
        env={**os.environ, **ENVIRONMENT},
    )

    def call(folder, name, *flags, environment=(), file_limit=None, largest_batch=None, moment=None):
        request = {
            "name": name,
            "folder": str(folder),
            "flags": [*map(str, flags or COMMANDS[name])],
            "environment": dict(environment),
            "file_limit": file_limit,
            "largest_batch": largest_batch,
            "moment": moment,
        }
        print(json.dumps(request), file=server.stdin, flush=True)
        status, out, err = json.loads(server.stdout.readline())
        return subprocess.CompletedProcess([name, *flags], status, out, err)

    yield call
    server.stdin.close()
    server.wait()


# --------------------------------------------------------------------------------------------------
# What a run leaves
# --------------------------------------------------------------------------------------------------

Reference = collections.namedtuple("Reference", "folder results counts")


@pytest.fixture(scope="module")
def reference(forked, tmp_path_factory):
    """The folder, the results and the number of operations of an uninterrupted run, by script."""
    references = {}
    for name in SCRIPTS:
        folder = tmp_path_factory.mktemp("reference")
        if name != TRAIN:
            copy_checkpoint(references[TRAIN].folder, folder)
        process = forked(folder, name, moment="count")
        assert process.returncode == 0, process.stderr
        counts = json.loads((folder / ".operations.json").read_text())
        references[name] = Reference(folder, results(folder), counts)
    return references


def copy_checkpoint(source, folder):
    """Puts the checkpoint of one folder into another."""
    (folder / CHECKPOINT).parent.mkdir()
    shutil.copy(source / CHECKPOINT, folder / CHECKPOINT)


def results(folder):
    """What of each file must be the same in every run, by path; hidden files (locks, leftovers) are no results."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name[0] != "."]
    return {str(path.relative_to(folder)): content(path) for path in files}


def content(path):
    """What of a file must be the same in every run: all but times, memory and the order of tensors in a file."""
    if path.suffix == ".safetensors":
        return {name: digest(tensor) for name, tensor in load_file(path).items()}
    if path.suffix == ".pth":
        checkpoint = torch.load(path, weights_only=True)
        weights = {name: digest(tensor) for name, tensor in checkpoint["weights"].items()}
        dynamics = {name: digest(tensor) for name, tensor in checkpoint["metadata"]["dynamics"].items()}
        return [weights, dynamics, without(checkpoint["metadata"], "train_seconds", "dynamics")]
    if path.suffix == ".json":
        found = json.loads(path.read_text())
        if path.name.endswith(".complete.json"):  # its checksums depend on the order of the tensors
            return sorted(found["files"])
        return without(found, "seconds", "peak_memory_bytes")
    return path.read_bytes()


def digest(tensor):
    """A tensor's type, shape and checksum."""
    return [str(tensor.dtype), list(tensor.shape), pipeline.sha256(tensor)]


def without(dictionary, *names):
    """A dictionary without some of its entries."""
    return {name: value for name, value in dictionary.items() if name not in names}


def result_folder(folder):
    """The one result folder below influence_results."""
    (found,) = (folder / "influence_results").glob("model*")
    return found


def only_error(process):
    """The one line on standard error that is no progress bar."""
    (line,) = (line for line in process.stderr.splitlines() if line.strip() and "%|" not in line)
    return line


# --------------------------------------------------------------------------------------------------
# kill -9
# --------------------------------------------------------------------------------------------------

ALL_MOMENTS = [
    (name, kind, number, half)
    for name, counts in COUNTS.items()
    for kind, count in counts.items()
    for number in range(1, count + 1)
    for half in ((False, True) if OPERATIONS[kind][2] else (False,))
]
CHOSEN_MOMENTS = [
    (TRAIN, "training step", 2, False),
    (TRAIN, "checkpoint file", 1, True),
    (ANALYZE, "factor or score file", 3, True),  # the scores
    (ANALYZE, "picture", 1, True),
    (DETECT, "arguments file", 3, True),  # of lambda, the first that is computed and not skipped
    (DETECT, "factor or score file", 2, True),  # of lambda, when the first has been written
    (DETECT, "batch", 5, False),  # of the scores
    (DETECT, "json file", 4, True),  # the record that the scores are whole
]
OTHER_MOMENTS = random.Random(0).sample([moment for moment in ALL_MOMENTS if moment not in CHOSEN_MOMENTS], 22)
MOMENTS = [*CHOSEN_MOMENTS, *OTHER_MOMENTS][: int(os.environ.get("KILL_MOMENTS", 8))]


def moment_id(moment):
    """A moment in words."""
    name, kind, number, half = moment
    return f"{name} {'half-way through' if half else 'before'} {kind} {number}"


def check_whole(folder):
    """What a killed analysis left under the name of a result is whole, and what is recorded as whole is unharmed."""
    for record_path in folder.glob("influence_results/*/*/[!.]*.complete.json"):  # but for half-written temporary ones
        paths = pipeline.stage_files(record_path.parent, record_path.name.removesuffix(".complete.json"))
        record = json.loads(record_path.read_text())
        assert record["files"] == pipeline.file_checksums(paths), record_path


def left_whole(folder):
    """The results, by path, that lie directly in the result folder: those that are written whole or not at all."""
    files = [path for path in folder.glob("influence_results/*/*") if path.is_file() and path.name[0] != "."]
    return {str(path.relative_to(folder)): content(path) for path in files}


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_uninterrupted_run_has_the_operations_that_moments_are_drawn_from(reference, name):
    assert reference[name].counts == COUNTS[name]


@pytest.mark.parametrize("moment", MOMENTS, ids=moment_id)
def test_a_killed_run_started_again_gives_the_uninterrupted_result(forked, reference, tmp_path, moment):
    name, *place = moment
    copy_checkpoint(reference[TRAIN].folder, tmp_path)
    if name == TRAIN:
        (tmp_path / CHECKPOINT).write_bytes(b"of an earlier training")
    killed = forked(tmp_path, name, moment=place)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    if name == TRAIN:  # every moment is before the renaming
        assert (tmp_path / CHECKPOINT).read_bytes() == b"of an earlier training"
    else:
        check_whole(tmp_path)
        for path, value in left_whole(tmp_path).items():
            assert value == reference[name].results[path], path
    again = forked(tmp_path, name)
    assert again.returncode == 0, again.stderr
    assert results(tmp_path) == reference[name].results


def test_a_run_killed_five_times_in_a_row_ends_with_the_uninterrupted_result(forked, reference, tmp_path):
    """Each run starts from what the one before left, and is killed half-way through a file further on."""
    copy_checkpoint(reference[TRAIN].folder, tmp_path)
    for number in (4, 9, 16, 12, 7):  # arguments, lambda, scores, picture, json
        killed = forked(tmp_path, DETECT, moment=["any", number, True])
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        check_whole(tmp_path)
    assert len(list(tmp_path.rglob(".*.detection_diagonal.json"))) == 1, "the last kill left its temporary file"
    again = forked(tmp_path, DETECT)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("Reusing the ") == 2 and results(tmp_path) == reference[DETECT].results


# --------------------------------------------------------------------------------------------------
# Damaged files
# --------------------------------------------------------------------------------------------------


def truncate(path):
    """Cuts a file in half."""
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path):
    """Flips one bit in the last byte, which belongs to a number, so that the file can still be read."""
    found = bytearray(path.read_bytes())
    found[-1] ^= 1
    path.write_bytes(found)


@pytest.mark.parametrize(
    ("pattern", "damage"),
    [
        pytest.param("scores_self*/self_scores.safetensors", truncate, id="truncated scores"),
        pytest.param("scores_self*/self_scores.safetensors", flip_a_bit, id="scores with a flipped bit"),
        pytest.param("scores_self*/self_scores.safetensors", Path.unlink, id="deleted scores"),
        pytest.param("factors_*/lambda_matrix.safetensors", flip_a_bit, id="factor with a flipped bit"),
        pytest.param("factors_*/num_lambda_processed.safetensors", Path.unlink, id="deleted factor"),
    ],
)
def test_a_damaged_file_is_named_and_computed_anew(forked, reference, tmp_path, pattern, damage):
    shutil.copytree(reference[DETECT].folder, tmp_path, dirs_exist_ok=True)
    (path,) = result_folder(tmp_path).glob(pattern)
    damage(path)
    process = forked(tmp_path, DETECT)
    assert process.returncode == 0, process.stderr
    said = [line for line in process.stdout.splitlines() if line.startswith("Not using")]
    assert said == [f"Not using what is damaged in {path.parent.relative_to(tmp_path)}: {path.name}"]
    assert results(tmp_path) == reference[DETECT].results


@pytest.mark.parametrize("damage", [truncate, Path.unlink], ids=["truncated", "deleted"])
def test_damaged_arguments_of_the_factors_do_not_stop_new_scores(forked, reference, tmp_path, damage):
    """kronfluence reads them when it computes scores from factors of an earlier run."""
    shutil.copytree(reference[DETECT].folder, tmp_path, dirs_exist_ok=True)
    (path,) = result_folder(tmp_path).glob("factors_*/factor_arguments.json")
    damage(path)
    process = forked(tmp_path, ANALYZE)
    assert process.returncode == 0, process.stderr
    assert reference[ANALYZE].results.items() <= results(tmp_path).items()


# --------------------------------------------------------------------------------------------------
# A full disk, and folders that cannot be
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "limit"),
    [
        pytest.param(TRAIN, 1_000_000, id="train.py, checkpoint"),
        pytest.param(ANALYZE, 100, id="analyze.py, arguments"),
        pytest.param(DETECT, 1_000_000, id="detect_mislabeled_dataset.py, factors"),
    ],
)
def test_a_full_disk_ends_in_one_sentence_and_harms_nothing(forked, reference, tmp_path, name, limit):
    copy_checkpoint(reference[TRAIN].folder, tmp_path)
    before = (tmp_path / CHECKPOINT).read_bytes()
    process = forked(tmp_path, name, file_limit=limit)
    assert process.returncode in (1, 2)
    assert only_error(process).startswith(f"{name}: error: ") and "Traceback" not in process.stderr
    assert (tmp_path / CHECKPOINT).read_bytes() == before
    assert left_whole(tmp_path) == {}
    check_whole(tmp_path)
    again = forked(tmp_path, name)
    assert again.returncode == 0, again.stderr
    assert results(tmp_path) == reference[name].results


def test_a_disk_that_fills_up_in_the_report_leaves_earlier_results_as_they_were(forked, reference, tmp_path):
    shutil.copytree(reference[DETECT].folder, tmp_path, dirs_exist_ok=True)
    process = forked(tmp_path, DETECT, file_limit=20_000)  # enough for the table, not for a picture
    assert process.returncode == 1
    assert only_error(process).startswith(f"{DETECT}: error: ")
    assert results(tmp_path) == reference[DETECT].results
    assert not list(result_folder(tmp_path).glob(".*")), "a temporary file was left"


NOWHERE = pytest.param("/proc/nowhere", marks=pytest.mark.skipif(not Path("/proc").exists(), reason="no /proc"))


@pytest.mark.parametrize("place", ["file/x", "file", NOWHERE])
@pytest.mark.parametrize(
    ("name", "flag"),
    [(TRAIN, "--checkpoint_dir"), (ANALYZE, "--output_dir"), (DETECT, "--output_dir"), (DETECT, "--checkpoint_dir")],
    ids=lambda value: value,
)
def test_a_folder_that_cannot_be_ends_in_one_sentence_and_status_2(forked, reference, tmp_path, name, flag, place):
    copy_checkpoint(reference[TRAIN].folder, tmp_path)
    (tmp_path / "file").write_text("no folder")
    process = forked(tmp_path, name, *COMMANDS[name], flag, place)
    assert process.returncode == 2
    assert only_error(process).startswith(f"{name}: error: ") and place in only_error(process)
    assert (tmp_path / "file").read_text() == "no folder" and not (tmp_path / "influence_results").exists()


# --------------------------------------------------------------------------------------------------
# Two at once
# --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def started(folder, *command, environment=()):
    """Starts `python <command>` in a folder and kills it, if it still runs, at the end of the block."""
    process = subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=folder,
        env={**os.environ, **ENVIRONMENT, "PYTHONUNBUFFERED": "1", **dict(environment)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # what runs in the background ignores Ctrl-C
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def finish(process):
    """Waits for a process and returns its exit status and its remaining output, as subprocess.run does."""
    out, err = process.communicate(timeout=SECONDS_UNTIL_HANGING)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def read_until(stream, text):
    """Reads a stream up to and with the first line that holds `text`."""
    lines = []
    for line in stream:
        lines.append(line)
        if text in line:
            return
    raise AssertionError(f"{text!r} never came: {lines}")


def lock_of(path):
    """A lock on what pipeline.lock locks for a path."""
    return FileLock(path.with_name(f".{path.name}.lock"))


def test_detect_waits_for_another_process_that_writes_the_same_folder(reference, tmp_path):
    shutil.copytree(reference[DETECT].folder, tmp_path, dirs_exist_ok=True)
    results_here = result_folder(tmp_path)
    (results_here / "suspects_diagonal.csv").unlink()
    with lock_of(results_here) as lock, started(tmp_path, ROOT / DETECT, *COMMANDS[DETECT]) as process:
        read_until(process.stdout, f"Waiting for another process that writes {results_here.relative_to(tmp_path)}")
        time.sleep(1)
        assert process.poll() is None and not (results_here / "suspects_diagonal.csv").exists()
        lock.release()
        finished = finish(process)
    assert finished.returncode == 0, finished.stderr
    assert results(tmp_path) == reference[DETECT].results


@pytest.mark.parametrize(
    ("environment", "main"),
    [({"RANK": "1"}, True), ({"RANK": "", "WORLD_SIZE": ""}, True), ({"RANK": "1", "WORLD_SIZE": "2"}, False)],
)
def test_a_rank_without_other_processes_is_none(monkeypatch, environment, main):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert pipeline.is_main_process() == main


def test_under_torchrun_a_run_does_not_wait_for_another_process(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "num_processes", lambda: 2)
    data = pipeline.generate_digits("", "train", 4)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 10))
    settings = {"output_dir": tmp_path, "strategy": "identity", "dtype": torch.float32, "seed": 1}
    with (
        lock_of(tmp_path / f"model-{pipeline.fingerprint(model, data)}"),
        pytest.raises(pipeline.UserError, match="another process is writing"),
    ):
        pipeline.InfluenceRun(model, data, "model", phases=pipeline.Phases(), **settings)


def test_train_ends_at_once_where_another_process_writes_the_same_checkpoint(forked, reference, tmp_path):
    copy_checkpoint(reference[TRAIN].folder, tmp_path)
    before = (tmp_path / CHECKPOINT).read_bytes()
    with lock_of(tmp_path / CHECKPOINT):
        process = forked(tmp_path, TRAIN)
    assert process.returncode == 2 and process.stdout == ""
    assert only_error(process).startswith(f"{TRAIN}: error: another process is writing {CHECKPOINT}")
    assert (tmp_path / CHECKPOINT).read_bytes() == before


def test_two_detections_at_once_both_end_with_the_right_result(reference, tmp_path):
    copy_checkpoint(reference[TRAIN].folder, tmp_path)
    command = (ROOT / DETECT, *COMMANDS[DETECT])
    with started(tmp_path, *command) as one, started(tmp_path, *command) as other:
        finished = [finish(process) for process in (one, other)]
    assert [process.returncode for process in finished] == [0, 0], [process.stderr for process in finished]
    assert results(tmp_path) == reference[DETECT].results


# --------------------------------------------------------------------------------------------------
# Out of memory
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [ANALYZE, DETECT])
def test_without_memory_for_the_batch_the_scores_come_from_smaller_ones(forked, reference, tmp_path, name):
    copy_checkpoint(reference[TRAIN].folder, tmp_path)
    process = forked(tmp_path, name, *COMMANDS[name], "--train_batch_size", 32, largest_batch=8)
    assert process.returncode == 0, process.stderr
    # All 24 images, 16, 8: twice for lambda, twice for the scores.
    assert process.stdout.count("Out of GPU memory; going on with batches of half the size") == 4
    (expected,), (found,) = (
        [load_file(path)["all_modules"] for path in result_folder(folder).glob("scores_*/*.safetensors")]
        for folder in (reference[name].folder, tmp_path)
    )
    # Not equal to the bit, because the batch of queries is halved too, and with it the order of sums.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6 * expected.abs().max().item())


def test_without_memory_for_a_single_image_the_run_ends_in_one_sentence(forked, reference, tmp_path):
    copy_checkpoint(reference[TRAIN].folder, tmp_path)
    process = forked(tmp_path, DETECT, largest_batch=0)
    assert process.returncode == 1
    assert process.stdout.count("going on with batches of half the size") == 3  # 8, 4, 2, 1
    assert only_error(process).startswith(f"{DETECT}: error: out of GPU memory: free some")


@pytest.mark.parametrize("sign", ["CUDA error: out of memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"])
def test_a_gpu_that_another_program_has_filled_ends_the_run_in_one_sentence(capsys, sign):
    def fail():
        raise RuntimeError(f"{sign}\nCompile with TORCH_USE_CUDA_DSA")

    with pytest.raises(SystemExit) as stop:
        pipeline.run(fail)
    assert stop.value.code == 1 and "error: out of GPU memory: free some" in capsys.readouterr().err


def test_two_processes_of_one_pid_may_write_one_file_at_once(tmp_path):
    with pipeline.atomic_path(tmp_path / "file") as first, pipeline.atomic_path(tmp_path / "file") as second:
        first.write_text("first")
        second.write_text("second")
    assert (tmp_path / "file").read_text() == "first" and len(list(tmp_path.iterdir())) == 1


def test_without_memory_on_a_cpu_the_run_ends_in_one_sentence(capsys):
    with pytest.raises(SystemExit) as stop:
        pipeline.run(lambda: torch.empty(2**60))
    assert stop.value.code == 1 and "error: out of memory: free some" in capsys.readouterr().err


def test_a_fault_of_the_program_is_not_taken_for_one_of_memory():
    with pytest.raises(RuntimeError, match="shape"):
        pipeline.run(lambda: torch.empty(2).view(3))


# --------------------------------------------------------------------------------------------------
# Ctrl-C
# --------------------------------------------------------------------------------------------------

INTERRUPTED = "interrupted; nothing is half-written, the same command starts again"


@pytest.fixture(scope="module")
def interrupted_training(reference, tmp_path_factory):
    """A training interrupted in its first steps: folder, finished process, and whether it held its lock."""
    folder = tmp_path_factory.mktemp("interrupted")
    copy_checkpoint(reference[TRAIN].folder, folder)
    with started(folder, ROOT / TRAIN, *FLAGS, "--num_train_epochs", 10_000) as process:
        read_until(process.stderr, "Training:")
        lock = lock_of(folder / CHECKPOINT)
        try:
            lock.acquire(timeout=0)
            lock.release()
            held = False
        except Timeout:
            held = True
        process.send_signal(signal.SIGINT)
        return folder, finish(process), held


def test_ctrl_c_in_training_ends_in_one_sentence_and_keeps_the_checkpoint(reference, interrupted_training):
    folder, process, _ = interrupted_training
    assert process.returncode == 130, process.stderr
    assert only_error(process) == process.stderr.splitlines()[-1] == f"{TRAIN}: {INTERRUPTED}"
    assert results(folder) == reference[TRAIN].results


def test_train_holds_the_lock_of_its_checkpoint_while_it_trains(interrupted_training):
    assert interrupted_training[2], "another training could have written the same checkpoint"


def test_ctrl_c_in_detection_ends_in_one_sentence_and_the_next_run_is_right(forked, reference, tmp_path):
    copy_checkpoint(reference[TRAIN].folder, tmp_path)
    with started(tmp_path, ROOT / DETECT, *COMMANDS[DETECT], "--train_batch_size", 1) as process:
        read_until(process.stderr, "Fitting Lambda matrices")
        process.send_signal(signal.SIGINT)
        finished = finish(process)
    assert finished.returncode == 130, finished.stderr
    assert only_error(finished) == finished.stderr.splitlines()[-1] == f"{DETECT}: {INTERRUPTED}"
    assert left_whole(tmp_path) == {}
    check_whole(tmp_path)
    again = forked(tmp_path, DETECT)
    assert again.returncode == 0, again.stderr
    assert results(tmp_path) == reference[DETECT].results


@pytest.mark.parametrize("name", SCRIPTS)
def test_ctrl_c_in_the_imports_ends_in_one_sentence(tmp_path, name):
    """A module of the name torch, found first, stands for the seconds in which the real one is imported."""
    (tmp_path / "torch.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)")
    with started(tmp_path, ROOT / name, environment={"PYTHONPATH": str(tmp_path)}) as process:
        process = finish(process)
    assert process.returncode == 130
    assert process.stderr == f"{name}: {INTERRUPTED}\n" and process.stdout == ""


# --------------------------------------------------------------------------------------------------
# Several processes
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCRIPTS)
def test_several_processes_on_the_cpu_are_refused(forked, tmp_path, name):
    environment = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}
    process = forked(tmp_path, name, environment=environment)
    assert process.returncode == 2 and process.stdout == ""
    assert only_error(process).startswith(f"{name}: error: WORLD_SIZE is 2")
    assert list(tmp_path.iterdir()) == []


def torchrun(folder, processes, *command):
    """Runs a command under torchrun and returns the finished process."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    place = ("--master_addr", "127.0.0.1", "--master_port", port)
    with started(folder, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", *place, *command) as process:
        return finish(process)


def test_torchrun_with_one_process_gives_the_same_result(reference, tmp_path):
    copy_checkpoint(reference[TRAIN].folder, tmp_path)
    process = torchrun(tmp_path, 1, ROOT / DETECT, *COMMANDS[DETECT])
    assert process.returncode == 0, process.stderr
    assert results(tmp_path) == reference[DETECT].results


def run_as_if_on_gpus(name, *flags):
    """Runs a script under torchrun on the CPU as it runs on several GPUs: gloo in place of NCCL.

    kronfluence adds up factors and gathers queries only where CUDA is there, so it is told that it is.
    """
    from kronfluence.computer import computer
    from kronfluence.module.tracker import factor, precondition
    from kronfluence.utils.state import State

    class TorchWithCuda:
        cuda = types.SimpleNamespace(is_available=lambda: True)

        def __getattr__(self, attribute):
            return getattr(torch, attribute)

    class DataParallel(torch.nn.parallel.DistributedDataParallel):
        def __init__(self, module, device_ids, output_device):
            super().__init__(module)

    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    State(cpu=True)
    State._shared_state.update(num_processes=2, process_index=rank, local_process_index=rank)
    computer.DDP, factor.torch, precondition.torch = DataParallel, TorchWithCuda(), TorchWithCuda()
    torch.Tensor.cuda, torch.cuda.synchronize = lambda tensor: tensor, lambda: None
    gather = torch.distributed.all_gather_into_tensor  # gloo wants the parts one after the other, and not stacked
    torch.distributed.all_gather_into_tensor = lambda output_tensor, input_tensor: gather(
        output_tensor.flatten(0, 1), input_tensor
    )
    pipeline.choose_device = lambda *_, **__: torch.device("cpu")
    sys.argv = [name, *flags]
    runpy.run_path(str(ROOT / name), run_name="__main__")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        pytest.param(
            DETECT,
            ("--factor_strategy", "ekfac", "--method", "grad_norm"),
            id="detect, ekfac and gradient norm",
        ),
        pytest.param(ANALYZE, ("--num_query_examples", 5, "--query_batch_size", 2), id="analyze, diagonal"),
    ],
)
def test_two_processes_give_the_scores_of_one(forked, reference, tmp_path, name, flags):
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
        copy_checkpoint(reference[TRAIN].folder, folder)
    alone = forked(one, name, *COMMANDS[name], *flags)
    assert alone.returncode == 0, alone.stderr
    together = torchrun(two, 2, __file__, name, *COMMANDS[name], *flags)
    assert together.returncode == 0, together.stderr
    said = [
        [line for line in process.stdout.replace(str(folder), "").splitlines() if " in all: " not in line]
        for folder, process in ((one, alone), (two, together))
    ]
    assert said[0] == said[1], "the first process must say what one alone says, and the other nothing"
    expected, found = (
        {
            path.parent.name: load_file(path)["all_modules"]
            for path in result_folder(folder).glob("scores_*/*.safetensors")
        }
        for folder in (one, two)
    )
    assert found.keys() == expected.keys() and len(found) == 1 + ("grad_norm" in flags)
    for kind, scores in expected.items():
        torch.testing.assert_close(found[kind], scores, rtol=1e-3, atol=1e-4 * scores.abs().max().item())


if __name__ == "__main__":
    run_as_if_on_gpus(*sys.argv[1:]) if len(sys.argv) > 1 else serve()
