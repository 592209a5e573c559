"""Faults during a run: kills, full disks, two runs at once, little memory, Ctrl-C.

Several processes of one run are tested too. These tests start the scripts as processes, on 24
images with diagonal curvature.
"""

import contextlib
import hashlib
import json
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from conftest import (
    ANALYZE,
    DETECT,
    ROOT,
    SCRIPTS,
    SYNTHETIC,
    TRAIN,
    result_folder,
    results,
    run,
    succeed,
)
from safetensors.torch import load_file, save_file

import analyze
import detect_mislabeled_dataset as detect
import pipeline

FLAGS = (*SYNTHETIC, "--num_train_examples", "24", "--precision", "fp32", "--train_batch_size", "8")
COMMANDS = {
    TRAIN: (*FLAGS, "--num_train_epochs", "1"),
    ANALYZE: (*FLAGS, "--factor_strategy", "diagonal", "--num_query_examples", "4"),
    DETECT: (*FLAGS, "--factor_strategy", "diagonal"),
}
CHECKPOINT = Path("checkpoints/model_corrupt_0.1.pth")
STATE = CHECKPOINT.with_suffix(".unfinished")
# One thread: results do not depend on the machine, and a fork needs no pool of threads.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "PYTHONUTF8": "1",
}


@contextlib.contextmanager
def started(folder, *command, environment=()):
    """Starts `python <command>` in a folder. Kills it at the end of the block if it still runs."""
    process = subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=folder,
        env={**os.environ, **ENVIRONMENT, "PYTHONUNBUFFERED": "1", **dict(environment)},
        # A shell lets background processes ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
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
    """Waits for a process; returns its exit status and remaining output like subprocess.run."""
    out, err = process.communicate(timeout=240)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The folder of an uninterrupted run, by script."""
    folders = {}
    for name in SCRIPTS:
        folders[name] = tmp_path_factory.mktemp("reference")
        if name != TRAIN:
            copy_checkpoint(folders[TRAIN], folders[name])
        with started(folders[name], ROOT / name, *COMMANDS[name]) as process:
            finished = finish(process)
        assert finished.returncode == 0, finished.stderr
    return folders


def copy_checkpoint(source, folder):
    """Copies the checkpoint of one folder into another folder."""
    (folder / CHECKPOINT).parent.mkdir()
    shutil.copy(source / CHECKPOINT, folder / CHECKPOINT)


# ---- kill -9 -------------------------------------------------------------------------------------


def kill_before_each_renaming(name, *flags):
    """Runs a script twice in each of the folders 1, 2, ...

    In folder n the first run is killed before its n-th renaming. In the last folder the first run
    ends before that. Prints the exit statuses.
    """
    number, killed = 0, True
    while killed:
        number += 1
        shutil.copytree("start", str(number))
        statuses = [
            fork_and_run(number, name, flags),
            fork_and_run(None, name, flags, folder=str(number)),
        ]
        killed = statuses[0] == -signal.SIGKILL
        print(json.dumps(statuses))


def fork_and_run(kill_at, name, flags, folder=None):
    """Runs a script in a fork of this process and returns its status.

    It is killed before its `kill_at`-th renaming, unless that is None.
    """
    if (process := os.fork()) > 0:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    os.chdir(folder or str(kill_at))
    renamed = []

    def watched(original):
        def rename(path, target):
            renamed.append(target)
            if len(renamed) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(path, target)

        return rename

    Path.rename, Path.replace = watched(Path.rename), watched(Path.replace)
    pipeline.NUM_SYNTHETIC["test"] = 500  # as in the fixture `reference`
    sys.argv, status = [name, *flags], 0
    try:
        runpy.run_path(str(ROOT / name), run_name="__main__")
    except SystemExit as stop:
        status = stop.code or 0
    sys.stdout.flush()
    os._exit(status)


@pytest.mark.parametrize(("name", "renamings"), [(TRAIN, 2), (ANALYZE, 6), (DETECT, 8)])
def test_a_killed_run_started_again_gives_the_uninterrupted_result(
    reference, tmp_path, name, renamings
):
    """It is killed before each renaming that publishes a result. Published results are complete."""
    (tmp_path / "start").mkdir()
    copy_checkpoint(reference[TRAIN], tmp_path / "start")
    with started(tmp_path, __file__, "kill", name, *COMMANDS[name]) as process:
        finished = finish(process)
    statuses = [json.loads(line) for line in finished.stdout.splitlines() if line.startswith("[")]
    assert statuses == [[-signal.SIGKILL, 0]] * renamings + [[0, 0]], finished.stderr
    for number in range(1, renamings + 2):
        assert results(tmp_path / str(number)) == results(reference[name]), number
    left = [path.name for path in tmp_path.glob("*/influence_results/*/*unfinished*")]
    assert len(left) == (0 if name == TRAIN else 2), (
        "a kill in either stage leaves its unfinished folder"
    )


# ---- A full disk, and two runs at once -----------------------------------------------------------


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_full_disk_ends_in_one_sentence_and_damages_no_result(reference, tmp_path, name):
    """A limit on the size of files is below the size of the smallest result."""
    copy_checkpoint(reference[TRAIN], tmp_path)
    before = results(tmp_path)
    limit = (
        "import resource, runpy, sys; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (90_000, 90_000)); "
        "sys.argv = sys.argv[1:]; "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    path = {"PYTHONPATH": str(ROOT)}
    with started(tmp_path, "-c", limit, ROOT / name, *COMMANDS[name], environment=path) as process:
        finished = finish(process)
    assert finished.returncode == 1, finished.stderr
    lines = [line for line in finished.stderr.splitlines() if line.strip()]
    (sentence,) = (line for line in lines if "%|" not in line)  # no progress bar
    assert sentence.startswith(f"{name}: error: ")
    hidden = [path for path in tmp_path.rglob(".*") if path.suffix != ".lock"]
    assert results(tmp_path) == before and not [*tmp_path.rglob("*unfinished*"), *hidden]


def test_two_processes_with_the_same_pid_may_write_a_file_at_once(tmp_path):
    with (
        pipeline.atomic_path(tmp_path / "file") as first,
        pipeline.atomic_path(tmp_path / "file") as second,
    ):
        first.write_text("first")
        second.write_text("second")
    assert (tmp_path / "file").read_text() == "first" and len(list(tmp_path.iterdir())) == 1


def test_two_detections_at_once_both_end_with_the_right_result(reference, tmp_path):
    copy_checkpoint(reference[TRAIN], tmp_path)
    command = (ROOT / DETECT, *COMMANDS[DETECT])
    with started(tmp_path, *command) as one, started(tmp_path, *command) as other:
        finished = [finish(process) for process in (one, other)]
    assert [process.returncode for process in finished] == [0, 0], [
        process.stderr for process in finished
    ]
    assert results(tmp_path) == results(reference[DETECT])
    assert not list(tmp_path.rglob("*unfinished*"))


# ---- Out of memory, Ctrl-C -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "sign",
    [
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when",
        "No executable batch size",
    ],
)
def test_a_full_gpu_ends_the_run_in_one_sentence(capsys, sign):
    def fail():
        raise RuntimeError(f"{sign}\nCompile with TORCH_USE_CUDA_DSA")

    with pytest.raises(SystemExit) as stop:
        pipeline.run(fail)
    assert stop.value.code == 1 and "error: out of memory: free some" in capsys.readouterr().err


def test_the_seconds_of_a_block_that_fails_count(monkeypatch):
    """Such as those of a phase whose memory was full, and which runs again."""
    seconds = {"scores": 1.0}
    times = iter([10.0, 15.0])
    monkeypatch.setattr(pipeline, "time", types.SimpleNamespace(perf_counter=lambda: next(times)))
    with pytest.raises(MemoryError), pipeline.timed(seconds, "scores"):
        raise MemoryError
    assert seconds == {"scores": 6.0}


def test_full_memory_is_not_reported_as_a_damaged_checkpoint(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")

    path = tmp_path / "model.pth"
    path.touch()
    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(MemoryError):
        pipeline.load_checkpoint(path)


def test_full_memory_is_named_where_an_image_is_read(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise MemoryError

    monkeypatch.setattr("PIL.Image.open", fail)
    with pytest.raises(
        pipeline.UserError, match=r"a.png is not .*\(MemoryError\): free some memory"
    ):
        pipeline.read_image("a.png")


@pytest.mark.parametrize("strategy", pipeline.STRATEGIES)
def test_a_higher_damping_is_proposed_where_there_is_a_damping(tmp_path, strategy):
    path = tmp_path / "self_scores.safetensors"
    save_file({"layer": torch.tensor([torch.nan])}, path)
    with pytest.raises(pipeline.NumericalError) as raised:
        pipeline.InfluenceRun.check_finite(types.SimpleNamespace(strategy=strategy), path, "scores")
    assert ("raise --damping_factor" in str(raised.value)) == (strategy != "identity")
    assert "lower --learning_rate" in str(raised.value)


def test_a_cpu_without_free_memory_ends_the_run_in_one_sentence(capsys):
    with pytest.raises(SystemExit) as stop:
        pipeline.run(lambda: torch.empty(2**60))
    assert stop.value.code == 1 and "error: out of memory: free some" in capsys.readouterr().err


def test_an_error_of_the_program_is_not_reported_as_lack_of_memory():
    with pytest.raises(RuntimeError, match="shape"):
        pipeline.run(lambda: torch.empty(2).view(3))


@pytest.mark.parametrize(
    ("name", "flags", "moment"),
    [
        pytest.param(TRAIN, ("--num_train_epochs", 10_000), "Training:", id="training"),
        pytest.param(DETECT, ("--train_batch_size", 1), "Fitting Lambda matrices", id="detection"),
    ],
)
def test_ctrl_c_ends_in_one_sentence_and_the_next_run_is_right(
    reference, tmp_path, name, flags, moment
):
    copy_checkpoint(reference[TRAIN], tmp_path)
    before = results(tmp_path)
    with started(tmp_path, ROOT / name, *COMMANDS[name], *flags) as process:
        assert any(moment in line for line in process.stderr)
        process.send_signal(signal.SIGINT)
        finished = finish(process)
    sentence = f"{name}: interrupted; no file is half-written, so run the same command again"
    assert finished.returncode == 130 and finished.stderr.splitlines()[-1] == sentence
    # A training that ended an epoch has left its state, which another training does not use.
    left = {path.name for path in tmp_path.rglob("*unfinished*")} - {STATE.name}
    assert results(tmp_path) == before and left == set()
    with started(tmp_path, ROOT / name, *COMMANDS[name]) as process:
        assert finish(process).returncode == 0
    assert results(tmp_path) == results(reference[name])
    assert not list(tmp_path.rglob("*unfinished*"))


def test_after_ctrl_c_the_training_continues_in_another_process(tmp_path):
    """Hashes of strings differ between processes, which must not make it another training."""
    folders = [tmp_path / "interrupted", tmp_path / "reference"]
    for folder in folders:
        folder.mkdir()
    command = (ROOT / TRAIN, *FLAGS, "--num_train_epochs", 6)
    with started(folders[0], *command, environment={"PYTHONHASHSEED": "1"}) as process:
        assert any("epoch   2/6" in line for line in process.stdout)
        process.send_signal(signal.SIGINT)
        assert finish(process).returncode == 130
    assert (folders[0] / STATE).exists() and not (folders[0] / CHECKPOINT).exists()
    for folder in folders:
        with started(folder, *command, environment={"PYTHONHASHSEED": "2"}) as process:
            finished = finish(process)
        assert finished.returncode == 0, finished.stderr
        continued = re.search(r"^continuing after epoch \d of 6$", finished.stdout, re.MULTILINE)
        assert bool(continued) == (folder == folders[0])
    assert results(folders[0]) == results(folders[1])
    assert not list(tmp_path.rglob("*unfinished*"))


# ---- Several processes ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "main"),
    [
        ({"RANK": "1"}, True),
        ({"RANK": "", "WORLD_SIZE": ""}, True),
        ({"RANK": "1", "WORLD_SIZE": "2"}, False),
    ],
)
def test_a_rank_without_other_processes_is_none(monkeypatch, environment, main):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert pipeline.is_main_process() == main


def test_a_process_on_its_own_uses_the_first_gpu(monkeypatch):
    """Whatever LOCAL_RANK an earlier torchrun left in the environment."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    device = pipeline.choose_device("auto", several_processes=False)
    assert device == torch.device("cuda", 0)
    assert "LOCAL_RANK" not in os.environ  # by which kronfluence would choose a GPU


def torchrun(folder, processes, *command):
    """Runs a command under torchrun and returns the finished process."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    place = ("--master_addr", "127.0.0.1", "--master_port", port)
    with started(
        folder, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", *place, *command
    ) as process:
        return finish(process)


def test_torchrun_with_one_process_gives_the_same_result(reference, tmp_path):
    copy_checkpoint(reference[TRAIN], tmp_path)
    process = torchrun(tmp_path, 1, ROOT / DETECT, *COMMANDS[DETECT])
    assert process.returncode == 0, process.stderr
    assert results(tmp_path) == results(reference[DETECT])


def run_as_if_on_gpus(name, *flags):
    """Runs a script under torchrun on the CPU as on several GPUs, with gloo instead of NCCL.

    kronfluence sums factors and gathers queries only if CUDA is available, so that is faked.
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
    # gloo needs the parts concatenated, not stacked.
    gather = torch.distributed.all_gather_into_tensor
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
        pytest.param(DETECT, ("--factor_strategy", "ekfac"), id="detect, ekfac"),
        pytest.param(
            ANALYZE, ("--num_query_examples", 5, "--query_batch_size", 2), id="analyze, diagonal"
        ),
    ],
)
def test_two_processes_give_the_scores_of_one(reference, tmp_path, name, flags):
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
        copy_checkpoint(reference[TRAIN], folder)
    alone = succeed(one, name, *COMMANDS[name], *flags)
    together = torchrun(two, 2, __file__, "gpus", name, *COMMANDS[name], *flags)
    assert together.returncode == 0, together.stderr
    others = (
        " in all: ",
        " CPU threads, ",
        "[Gloo]",
        "peer ranks",
    )  # torch 2.9 prints the last two
    said = [
        [line for line in out.splitlines() if not any(other in line for other in others)]
        for out in (alone, together.stdout)
    ]
    assert said[0] == said[1], (
        "the first process must say what one alone says, and the other nothing"
    )
    (expected,), (found,) = (
        [
            load_file(path)["all_modules"]
            for path in result_folder(folder).glob("scores_*/*.safetensors")
        ]
        for folder in (one, two)
    )
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


if __name__ == "__main__":
    {"kill": kill_before_each_renaming, "gpus": run_as_if_on_gpus}[sys.argv[1]](*sys.argv[2:])


def test_a_file_of_another_user_is_not_taken_for_a_missing_one(tmp_path, monkeypatch):
    """safetensors says of a file that may not be read that it does not exist."""
    folder = tmp_path / "scores"
    folder.mkdir()
    save_file({"layer": torch.zeros(1)}, folder / "layer.safetensors")
    pipeline.write_listing(folder)
    readable = Path.open

    def forbidden(path, *arguments, **settings):
        if path.suffix == ".safetensors":
            raise PermissionError(13, "Permission denied", str(path))
        return readable(path, *arguments, **settings)

    monkeypatch.setattr(Path, "open", forbidden)
    with pytest.raises(PermissionError):
        pipeline.remove_if_damaged(folder)
    assert (folder / "layer.safetensors").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool, torch.bfloat16])
def test_the_hash_of_a_tensor_is_that_of_its_bytes(dtype):
    tensor = torch.tensor([[1, 0, 3], [0, 5, 6]]).to(dtype)
    expected = hashlib.sha256(bytes(tensor.flatten().view(torch.uint8).tolist())).hexdigest()
    assert pipeline.sha256(tensor) == expected == pipeline.sha256(tensor.T.contiguous().T)
    assert pipeline.sha256(tensor[0, 0]) == pipeline.sha256(tensor[:1, 0])


def test_a_detection_that_fails_leaves_no_results_of_two_rankings(trained, tmp_path, monkeypatch):
    folder = shutil.copytree(trained[0], tmp_path / "trained")
    flags = (*SYNTHETIC, "--factor_strategy", "none")
    succeed(folder, DETECT, *flags, "--method", "aum")
    table = result_folder(folder, "model_corrupt_0.1-") / "suspects_none.csv"
    by_aum = table.read_text()

    def full_disk(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(detect, "write_page", full_disk)
    stopped = run(folder, DETECT, *flags, "--method", "loss")
    assert stopped.status == 1 and "No space left on device; no file is half-written" in stopped.err
    assert table.read_text() != by_aum
    assert list(table.parent.glob("*_none.*")) == [table]


def test_an_analysis_that_fails_leaves_no_table_of_other_scores(trained, tmp_path, monkeypatch):
    folder = shutil.copytree(trained[0], tmp_path / "trained")
    shutil.copytree(folder / "checkpoints", folder / "other")
    path = folder / "other" / "model_corrupt_0.1.pth"
    model, metadata = pipeline.load_checkpoint(path)
    with torch.no_grad():
        model.head[0].weight += 1e-4
    pipeline.save_checkpoint(path, model, metadata)
    flags = (
        *SYNTHETIC,
        "--factor_strategy",
        "identity",
        "--checkpoint_dir",
        "checkpoints",
        "other",
    )
    succeed(folder, ANALYZE, *flags, "--query_indices", "1,2")
    means = result_folder(folder, "model_corrupt_0.1_mean_of_2-")
    assert len(list(means.glob("*_identity.*"))) == 4

    def full_disk(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(analyze, "write_top_influences", full_disk)
    assert run(folder, ANALYZE, *flags, "--query_indices", "3,4").status == 1
    assert list(means.glob("*_identity.*")) == [means / "pairwise_identity.safetensors"]
