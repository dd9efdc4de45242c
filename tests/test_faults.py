"""What may go wrong with a run, injected into the real command, and what becomes of it. Names are
test_FAULT__OUTCOME; scripts/fault_table.py makes docs/faults.md of them."""

import argparse
import contextlib
import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    TINY,
    assert_same_run,
    command,
    final_path,
    final_state,
    metrics,
    random_batch,
    run_folder,
    step_options,
)
from PIL import Image

import Data
import IO
import TrainIMLE
import Utils
from internals import checkpoints
from Utils import RunError

RUN = [*TINY, "--steps_per_eval", 2, "--uid", "tiny"]  # the run of the fixture tiny_run
LINUX = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")
ENDED = {signal.SIGTERM: 0, signal.SIGUSR2: 0, signal.SIGINT: 130, signal.SIGKILL: -9}


def start(flags, save_folder, program=("TrainIMLE.py",), **options):
    """Starts a run; the process, whose lines can be read."""
    return subprocess.Popen(
        [sys.executable, *program, *map(str, flags), "--save_folder", str(save_folder)],
        cwd=ROOT,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONFAULTHANDLER": "1",  # for SIGABRT, see `end`
            **options.pop("env", {}),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def wait_for(process, line):
    """Reads what a process says until a line starts so."""
    for said in process.stdout:
        if said.startswith(line):
            return said
    raise AssertionError(f"{line} was not said: {process.stderr.read()}")


def end(process, seconds=300):
    """Waits for a process to end: (exit status, what it said, its errors). Of one that hangs, fails
    with the stacks of it and of the processes that it has started."""
    try:
        said, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        for pid in [*rank_processes(process.pid), process.pid]:
            os.kill(pid, signal.SIGABRT)
        raise AssertionError("hangs:\n" + "".join(process.communicate())) from None
    return process.returncode, said, errors


def stopped_run(save_folder, line, number, *flags):
    """The exit status of a run that gets a signal when it says a line that starts so."""
    process = start([*RUN, *flags], save_folder)
    wait_for(process, line)
    process.send_signal(number)
    return end(process)[0]


def goes_on(save_folder, *flags):
    """Starts RUN again where it stood, to its end; its folder."""
    done = command(*RUN, *flags, "--save_folder", save_folder)
    assert "going on after step" in done.stdout
    return run_folder(save_folder)


def faulty(fault, *flags, check=False, **environment):
    """The real command, after the Python code `fault` has changed its modules."""
    code = "import sys, os, signal, time, torch, Data, Models, TrainIMLE, Utils\n"
    code += f"from internals import checkpoints, processes, runs\n{fault}\n"
    program = (sys.executable, "-c", code + "TrainIMLE.main(sys.argv[1:])")
    return command(*flags, program=program, check=check, **environment)


NTH_CALL = """
def nth_call(module, name, n, action):
    whole, calls = getattr(module, name), []
    def counted(*args, **options):
        calls.append(0)
        if len(calls) == n:
            action()
        return whole(*args, **options)
    setattr(module, name, counted)
"""  # does something when a function is called for the n-th time


@pytest.fixture
def copied(tiny_run, tmp_path):
    """The finished tiny run in a folder of its own, for --save_folder."""
    shutil.copytree(tiny_run.parent.parent, tmp_path / "runs")
    return tmp_path / "runs"


# -------------------------------------------------------------------------------------------------
# Signals.


@pytest.mark.parametrize(
    "line, number",
    [
        pytest.param("step 0:", signal.SIGTERM, marks=pytest.mark.slow),
        ("step 2:", signal.SIGINT),  # inside an epoch
        pytest.param("step 4:", signal.SIGUSR2, marks=pytest.mark.slow),  # at its end
    ],
)
def test_a_stop_signal__saves_and_exits_0_or_130_for_SIGINT_and_goes_on_to_the_bit(
    tiny_run, tmp_path, line, number
):
    assert stopped_run(tmp_path, line, number) == ENDED[number]
    assert final_state(run_folder(tmp_path))["progress"]["step"] < 8
    assert_same_run(tiny_run, goes_on(tmp_path))


# An epoch has three chunks.
@pytest.mark.parametrize("call, n_chosen", [(5, 32), pytest.param(6, 40, marks=pytest.mark.slow)])
def test_a_stop_inside_sampling__the_chunks_that_are_done_are_not_sampled_again(
    tiny_run, tmp_path, call, n_chosen
):
    stop = "lambda: os.kill(os.getpid(), signal.SIGTERM)"
    fault = f"{NTH_CALL}\nnth_call(TrainIMLE, 'choose_codes', {call}, {stop})"
    done = faulty(fault, *RUN, "--save_folder", tmp_path, check=True)
    assert "stopped after step 4" in done.stdout
    codes = final_state(run_folder(tmp_path))["progress"]["codes"]
    assert (codes >= 0).sum() == n_chosen and (codes == -1).sum() == 40 - n_chosen
    fault = f"{NTH_CALL}\nnth_call(TrainIMLE, 'choose_codes', {7 - call}, {stop})"  # not called
    done = faulty(fault, *RUN, "--save_folder", tmp_path, check=True)
    assert "going on after step 4" in done.stdout and "done: " in done.stdout
    assert_same_run(tiny_run, run_folder(tmp_path))


@pytest.mark.slow
def test_a_stop_inside_sampling_of_two_processes__all_save_the_chunks_that_are_done(
    tiny_run, tmp_path
):
    fault = f"{NTH_CALL}\nif os.environ.get('RANK') == '1':\n"
    fault += "    nth_call(TrainIMLE, 'choose_codes', 2, lambda: os.kill(os.getpid(), 15))\n"
    script = tmp_path / "faulty.py"
    script.write_text(
        f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport TrainIMLE\n{fault}\n"
        "if __name__ == '__main__':\n    TrainIMLE.main(sys.argv[1:])\n"
    )
    flags = [*RUN, "--code_bs", 4, "--save_folder", tmp_path]
    torchrun = ["torchrun", "--standalone", "--nproc_per_node", 2, script, *flags]
    done = command(*torchrun[1:], program=torchrun[:1])
    assert "stopped after step 0" in done.stdout
    codes = final_state(run_folder(tmp_path))["progress"]["codes"]
    assert (codes >= 0).sum() == 16  # two chunks of each process
    assert_same_run(tiny_run, goes_on(tmp_path, "--code_bs", 4), tolerance=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "place, step",
    [
        ("TrainIMLE, 'choose_codes', 4", 4),  # of three chunks an epoch
        ("Validation, 'evaluate', 10", 4),  # six a validation
        ("LinearProbe, 'nearest_neighbors', 4", 4),
        ("runs, 'draw_curves', 1", 0),
        ("checkpoints, 'save_checkpoint', 6", 4),  # 3 in sampling
    ],
)
def test_a_stop_inside_sampling_validation_or_a_save__goes_on_to_the_bit(
    tiny_run, tmp_path, place, step
):
    fault = f"{NTH_CALL}\nimport LinearProbe, Validation\n"
    fault += f"nth_call({place}, lambda: os.kill(os.getpid(), signal.SIGTERM))"
    flags = [*RUN, "--save_minutes", 0, "--save_folder", tmp_path]
    done = faulty(fault, *flags)
    assert done.returncode == 0 and "stopped after step" in done.stdout, done.stderr
    assert final_state(run_folder(tmp_path))["progress"]["step"] == step
    assert_same_run(tiny_run, goes_on(tmp_path))


def test_a_second_SIGTERM__ends_a_run_that_hangs_at_once(tmp_path):
    fault = "checkpoints.save_checkpoint = lambda *_: time.sleep(100)\n"
    code = f"import TrainIMLE, time, sys\nfrom internals import checkpoints\n{fault}"
    code += "TrainIMLE.main(sys.argv[1:])"
    process = start(RUN, tmp_path, ("-c", code))
    wait_for(process, "step 0:")
    process.send_signal(signal.SIGTERM)
    wait_for(process, "asked to stop")
    time.sleep(1.5)
    process.send_signal(signal.SIGTERM)
    status, _, errors = end(process, 10)
    assert status == 128 + signal.SIGTERM and "ended without saving" in errors


def test_a_run_that_is_too_slow_to_stop__is_ended_after_a_deadline(tmp_path):
    fault = "processes.StopSignal.__init__.__defaults__ = (1.0,)\n"
    fault += "checkpoints.save_checkpoint = lambda *_: (os.kill(os.getpid(), 15), time.sleep(100))"
    done = faulty(fault, *RUN, "--save_minutes", 0, "--save_folder", tmp_path)
    assert done.returncode == 1 and "Timeout (0:00:01)!" in done.stderr
    assert "save_checkpoint" in done.stderr or "<lambda>" in done.stderr, "where it hangs"


def rank_processes(parent):
    """The pids of the processes that a launching one has started, by their ranks."""
    pids = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    commands = {int(pid): Path(f"/proc/{pid}/cmdline").read_bytes() for pid in pids}
    return sorted(pid for pid, command in commands.items() if b"spawn_main" in command)


@LINUX
@pytest.mark.slow
def test_SIGTERM_to_one_process_of_two__all_save_the_same_step_and_go_on(tiny_run, tmp_path):
    process = start([*RUN, "--processes", 2], tmp_path)
    wait_for(process, "step 2:")
    os.kill(rank_processes(process.pid)[1], signal.SIGTERM)
    status, said, errors = end(process)
    assert status == 0 and "stopped after step" in said and not errors
    assert_same_run(tiny_run, goes_on(tmp_path, "--processes", 2), tolerance=1e-5)


@pytest.mark.slow
def test_SIGTERM_to_the_command_of_two_processes__all_save_and_go_on(tiny_run, tmp_path):
    assert stopped_run(tmp_path, "step 2:", signal.SIGTERM, "--processes", 2) == 0
    assert 2 <= final_state(run_folder(tmp_path))["progress"]["step"] < 8
    assert_same_run(tiny_run, goes_on(tmp_path, "--processes", 2), tolerance=1e-5)


@pytest.mark.parametrize(
    "processes, number",
    [
        (1, signal.SIGINT),
        pytest.param(1, signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(2, signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(2, signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_Ctrl_C_or_SIGTERM_to_all_processes_and_loader_workers__saves_without_a_traceback(
    tmp_path, processes, number
):
    flags = [*RUN, "--num_workers", 2, "--processes", processes]
    process = start(flags, tmp_path, start_new_session=True)
    wait_for(process, "step 2:")
    os.killpg(process.pid, number)
    status, said, errors = end(process)
    assert status == ENDED[number] and "stopped after step" in said and not errors
    assert final_state(run_folder(tmp_path))["progress"]["step"] < 8


@LINUX
@pytest.mark.slow
def test_Ctrl_C_while_two_processes_start__all_end_with_one_line(tmp_path):
    process = start([*RUN, "--processes", 2], tmp_path, start_new_session=True)
    while len(rank_processes(process.pid)) < 2:
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    status, _, errors = end(process)
    assert (status, errors) == (130, "error: interrupted\n")


@pytest.mark.slow
def test_SIGHUP_to_all_processes_under_nohup__the_run_goes_on(tmp_path):
    nohup = {"preexec_fn": lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)}
    flags = [*RUN, "--num_workers", 1, "--processes", 2]
    process = start(flags, tmp_path, start_new_session=True, **nohup)
    wait_for(process, "step 2:")
    os.killpg(process.pid, signal.SIGHUP)
    status, said, errors = end(process)
    assert status == 0 and "done: " in said and not errors


@pytest.mark.slow
def test_five_requeues_in_a_row__the_steps_go_on_and_the_end_is_the_same(tiny_run, tmp_path):
    for line in ("step 0:", "step 2:", "epoch 1/2:", "step 6:", "step 8:"):
        assert stopped_run(tmp_path, line, signal.SIGUSR2, "--save_minutes", 0) == 0
    steps = [record["pretrain/step"] for record in metrics(run_folder(tmp_path))]
    assert steps == sorted(steps)
    assert_same_run(tiny_run, goes_on(tmp_path))


@pytest.mark.slow
def test_kill_9_at_random_moments_of_a_run__it_goes_on_to_the_bit(tiny_run, tmp_path):
    moments = random.Random(0)
    for _ in range(12):
        process = start([*RUN, "--save_minutes", 0, "--num_workers", 2], tmp_path)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(moments.uniform(3, 9))
        process.kill()
        end(process)
    command(*RUN, "--save_folder", tmp_path)
    assert_same_run(tiny_run, run_folder(tmp_path))


@LINUX
@pytest.mark.slow
def test_kill_9_of_the_command_of_two_processes__the_others_end_and_it_goes_on(tiny_run, tmp_path):
    process = start([*RUN, "--processes", 2, "--save_minutes", 0], tmp_path)
    wait_for(process, "step 2:")
    ranks = rank_processes(process.pid)
    process.kill()
    process.wait()
    folder = goes_on(tmp_path, "--processes", 2)
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)
    assert_same_run(tiny_run, folder, tolerance=1e-5)


# -------------------------------------------------------------------------------------------------
# Saving and loading.


class DyingFile:
    """A file that lets the process be killed when so many bytes were written, at `fsync`, or when
    it is closed."""

    def __init__(self, path, mode, at):
        self.file, self.at, self.written = open(path, mode), at, 0  # noqa: SIM115

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()
        if self.at == "closed":
            os.kill(os.getpid(), signal.SIGKILL)

    def __getattr__(self, name):
        if name == "fileno" and self.at == "fsync":
            os.kill(os.getpid(), signal.SIGKILL)
        return getattr(self.file, name)

    def write(self, content):
        content = bytes(content)
        if not isinstance(self.at, str) and self.written + len(content) >= self.at:
            self.file.write(content[: self.at - self.written])
            self.file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        self.written += len(content)
        return self.file.write(content)


def save_and_die(folder, state, at, monkeypatch):
    """Saves in a process of its own, which dies there; `at`: see DyingFile, or "renamed"."""
    pid = os.fork()
    if pid == 0:
        try:
            if at == "renamed":
                replace = os.replace
                dying = lambda *paths: (replace(*paths), os.kill(os.getpid(), signal.SIGKILL))  # noqa: E731
                monkeypatch.setattr(os, "replace", dying)
            else:
                dying = lambda path, mode: DyingFile(path, mode, at)  # noqa: E731
                monkeypatch.setattr(Utils, "open", dying, raising=False)
            checkpoints.save_checkpoint(
                folder / f"checkpoints/step_{state['progress']['step']:08d}.pt", state
            )
        finally:
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL


@pytest.mark.slow
def test_kill_9_at_20_points_of_a_save__the_newest_whole_checkpoint_loads_and_the_run_goes_on(
    copied, monkeypatch
):
    folder = run_folder(copied)
    path, state = final_path(folder), final_state(folder)
    size = path.stat().st_size
    state["progress"]["step"] = 9  # what is being saved
    points = [*(round(size * i / 16) for i in range(1, 17)), 1, "fsync", "closed", "renamed"]
    for at in points:
        save_and_die(folder, state, at, monkeypatch)
        _, found = checkpoints.newest_checkpoint(folder)
        assert found["progress"]["step"] == (9 if at == "renamed" else 8), at
    final_path(folder).unlink()
    assert len(list(folder.glob("checkpoints/.*.tmp"))) == len(points) - 1
    goes_on(copied, "--epochs", 3)
    assert not list(folder.glob("checkpoints/.*.tmp"))
    assert final_state(folder)["progress"]["step"] == 12


@contextlib.contextmanager
def small_disk(folder, size, *options):
    """A file system of `size` MB at `folder`; skips where none can be mounted."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", ",".join([f"size={size}m", *options]), "tmpfs", folder]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no small file system can be mounted here ({error})")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def remount(folder, *options):
    subprocess.run(["mount", "-o", ",".join(["remount", *options]), folder], check=True)


@pytest.mark.slow
def test_a_disk_that_is_full_for_a_while__is_told_of_and_the_next_save_is_tried(tiny_run, tmp_path):
    size = final_path(tiny_run).stat().st_size / 2**20
    with small_disk(tmp_path / "disk", round(2.5 * size)):  # two checkpoints, but not a third one
        process = start([*RUN, "--save_minutes", 0], tmp_path / "disk")
        assert "No space left" in wait_for(process, "warning: no checkpoint could be saved")
        remount(tmp_path / "disk", "size=1g")
        status, said, errors = end(process)
        assert status == 0, said + errors
        assert_same_run(tiny_run, run_folder(tmp_path / "disk"))


@pytest.mark.slow
def test_a_disk_that_stays_full__ends_the_run_non_zero_and_it_goes_on_from_the_save_before(
    tiny_run, tmp_path
):
    size = final_path(tiny_run).stat().st_size / 2**20
    disk = tmp_path / "disk"
    with small_disk(disk, round(2.5 * size)):
        done = command(*RUN, "--save_minutes", 0, "--save_folder", disk, check=False)
        assert done.returncode == 1 and done.stderr.startswith("error: the last checkpoint could")
        assert len(done.stderr.splitlines()) == 1 and "No space left" in done.stderr
        assert final_state(run_folder(disk))["progress"]["step"] == 2
        remount(disk, "size=1g")
        assert_same_run(tiny_run, goes_on(disk))


@pytest.mark.slow
def test_a_disk_without_room_for_metrics__they_wait_and_none_is_lost(tiny_run, tmp_path):
    fault = """
import builtins, errno
writing, since = Utils.os.fsync, time.monotonic()
class Full:
    def __init__(self, file): self.file, self.calls = file, 0
    def __getattr__(self, name): return getattr(self.file, name)
    def write(self, content):
        self.calls += 1
        if self.calls in (2, 3):
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.file.write(content[:100])  # and some of it only
def opened(path, *args, **options):
    file = open(path, *args, **options)
    return Full(file) if str(path).endswith("metrics.jsonl") else file
runs.open = opened
"""
    done = faulty(fault, *RUN, "--save_folder", tmp_path, check=True)
    assert done.stdout.count("metrics and pictures wait in memory") == 2
    assert_same_run(tiny_run, run_folder(tmp_path))


@pytest.mark.slow
def test_a_run_folder_that_is_read_only__is_refused_before_the_model_is_built(copied, tmp_path):
    disk = tmp_path / "disk"
    with small_disk(disk, 200):
        shutil.copytree(copied, disk, dirs_exist_ok=True)
        remount(disk, "ro")
        for flags in (["--epochs", 3], ["--uid", "other"]):
            fault = "TrainIMLE.make_model = None"
            done = faulty(fault, *RUN, *flags, "--save_folder", disk)
            assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
            assert "--save_folder: cannot write to" in done.stderr


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_save_folder_that_may_not_be_written__is_refused(tmp_path):
    tmp_path.chmod(0o500)
    done = command(*TINY, "--save_folder", tmp_path, check=False)
    assert done.returncode == 2 and "--save_folder" in done.stderr


def test_a_file_in_the_place_of_the_run_folder__is_refused_in_one_line(tmp_path):
    (tmp_path / "models").write_text("in the way")
    done = command(*TINY, "--save_folder", tmp_path, check=False)
    assert done.returncode == 2 and "--save_folder" in done.stderr
    assert len(done.stderr.splitlines()) == 1


class Hostile:
    """Creates a file when it is unpickled."""

    def __init__(self, canary):
        self.canary = str(canary)

    def __reduce__(self):
        return open, (self.canary, "w")


def cut(path, _):
    path.write_bytes(path.read_bytes()[:-1000])


def flip(path, _):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path, _):
    path.write_bytes(b"")


def hostile(path, canary):
    torch.save({**torch.load(path, weights_only=True), "args": Hostile(canary)}, path)


def foreign(path, _):
    torch.save({"model": {}, "epoch": 3}, path)


@pytest.mark.parametrize("damage", [cut, flip, empty, hostile, foreign])
def test_a_newest_checkpoint_cut_flipped_empty_hostile_or_foreign__the_one_before_is_used_loudly(
    copied, tmp_path, damage, capsys
):
    newest = final_path(run_folder(copied))
    before = newest.with_name("step_00000007.pt")
    content = torch.load(newest, weights_only=True)
    content["progress"]["step"] = 7
    checkpoints.save_checkpoint(before, content)
    damage(newest, tmp_path / "canary")
    assert checkpoints.newest_checkpoint(run_folder(copied))[0] == before
    said = capsys.readouterr().out
    assert str(newest) in said and "using the one before" in said
    assert not (tmp_path / "canary").exists()


def test_any_bit_flipped_in_a_checkpoint__is_noticed_or_changes_nothing(tmp_path):
    path, places = tmp_path / "x.pt", random.Random(0)
    state = {"weights": torch.randn(40, 40), "step": 3}
    checkpoints.save_checkpoint(path, state)
    whole, noticed = path.read_bytes(), 0
    for _ in range(400):
        content = bytearray(whole)
        content[places.randrange(len(content))] ^= 1 << places.randrange(8)
        path.write_bytes(content)
        try:
            found = checkpoints.read_checkpoint(path)
        except Utils.InputError:
            noticed += 1
        else:
            assert found.keys() == state.keys() and found["step"] == 3
            assert torch.equal(found["weights"], state["weights"])
    assert noticed > 300


def test_an_error_of_the_disk_while_a_checkpoint_is_read__is_told_and_sets_none_aside(
    copied, monkeypatch
):
    def broken(*_, **__):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(torch, "load", broken)
    with pytest.raises(RunError, match="can't be read: Input/output error"):
        checkpoints.newest_checkpoint(run_folder(copied))


def test_all_checkpoints_damaged__refused_rather_than_started_over(copied, tiny_run):
    final_path(run_folder(copied)).write_bytes(b"damaged")
    done = command(*RUN, "--save_folder", copied, check=False)
    assert done.returncode == 2 and "none of its 1 checkpoints can be read" in done.stderr
    assert metrics(run_folder(copied)) == metrics(tiny_run)


@pytest.mark.slow
def test_a_run_that_was_stopped_with_one_process__goes_on_with_two_and_the_same_batches(
    tiny_run, tmp_path
):
    assert stopped_run(tmp_path, "step 2:", signal.SIGTERM) == 0
    assert_same_run(tiny_run, goes_on(tmp_path, "--processes", 2), tolerance=1e-5)


def test_another_architecture__is_refused_with_the_difference_even_by_force(copied):
    for force in ([], ["--force_resume", 1]):
        flags = [*RUN, "--latent_dim", 9, "--save_folder", copied, *force]
        done = command(*flags, check=False)
        assert done.returncode == 2 and "--latent_dim was 8, is 9" in done.stderr
        assert len(done.stderr.splitlines()) == 1


def as_version_0_1_saved(content, model):
    """A checkpoint's content as version 0.1.0 saved it: the codes themselves, lists of losses."""
    progress, n = dict(content["progress"]), content["progress"]["epoch_step"]
    totals, counts = progress.pop("totals"), progress.pop("counts")
    for name in ("epoch_step", "code_losses"):
        del progress[name]
    pool = Data.draw_pool(
        Data.open_images(ROOT / TINY[1]), 40, progress["epoch"], n_patches=49, seed=0
    )
    progress["codes"] = model.numbered_codes(pool.seeds, progress["codes"][:, None])[:, 0]
    progress["sampled"] = progress.pop("epoch_metrics")
    progress["losses"] = [totals["pretrain/loss_tr"], *[0.0] * (n - 1)]
    progress["norms"] = [totals["pretrain/grad_norm"], *[0.0] * (n - 1)]
    assert counts["pretrain/grad_norm"] == n
    del content["data"]
    args = {k: v for k, v in content["args"].items() if k != "mae_loss_weight"}
    return {**content, "progress": progress, "args": {**args, "code_free_share": 0.0}}


@pytest.mark.slow
def test_a_checkpoint_of_version_0_1__goes_on_inside_its_epoch_to_the_bit(imle_alone_run, tmp_path):
    """The run then knows its images, as a run of this version does."""
    assert stopped_run(tmp_path, "step 2:", signal.SIGTERM, "--mae_loss_weight", 0) == 0
    path = final_path(run_folder(tmp_path))
    content = final_state(run_folder(tmp_path))
    assert 0 < content["progress"]["epoch_step"] < 4
    checkpoints.save_checkpoint(path, as_version_0_1_saved(content, IO.load_model(path)))
    folder = goes_on(tmp_path)
    assert_same_run(imle_alone_run, folder)
    assert final_state(folder)["data"] == final_state(imle_alone_run)["data"]


NEWER = {
    "config": {"gates": 3},
    "progress": {"ema_step": 7},
    "args": {"gates": 3},
    "ema": {"a": torch.zeros(1)},
}


@pytest.mark.slow
@pytest.mark.parametrize("part", NEWER)
def test_a_checkpoint_of_a_newer_version__is_refused_with_the_unknown_field(copied, part):
    path = final_path(run_folder(copied))
    content = torch.load(path, weights_only=True)
    content[part] = content.get(part, {}) | NEWER[part]
    checkpoints.save_checkpoint(path, content)
    if part == "args":  # the newer version wrote config.json, too
        config = json.loads((run_folder(copied) / "config.json").read_text())
        config["flags"] |= NEWER[part]
        (run_folder(copied) / "config.json").write_text(json.dumps(config))
    field = part if part == "ema" else next(iter(NEWER[part]))
    for flags in ([*RUN, "--save_folder", copied], ["--resume", path]):
        done = command(*flags, check=False)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
        assert f"unknown field {field}: a newer version of IMLE-SSL made" in done.stderr
    if part == "config":
        with pytest.raises(Utils.InputError, match=f"{path} has the unknown field gates"):
            IO.load_model(path)


def test_a_newer_checkpoint_whose_tensors_or_values_are_unknown__is_refused_in_one_line(copied):
    path = final_path(run_folder(copied))
    content = torch.load(path, weights_only=True)
    changes = (
        ("model", "blocks.0.gamma", torch.zeros(3), "model of the newest checkpoint does not fit"),
        ("args", "sampler", "beam", "--resume: --sampler: invalid choice: 'beam'"),
    )
    for part, name, value, reason in changes:
        checkpoints.save_checkpoint(path, {**content, part: {**content[part], name: value}})
        done = command("--resume", path, check=False)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
        assert reason in done.stderr


# -------------------------------------------------------------------------------------------------
# Images that changed.


@pytest.fixture
def on_folders(tmp_path):
    """A stopped run inside its second epoch: (save folder, flags of its data, training folder)."""
    train, val = tmp_path / "train", tmp_path / "val"
    shutil.unpack_archive(ROOT / TINY[1], train)
    shutil.unpack_archive(ROOT / TINY[3], val)
    data = ["--data_tr", train, "--data_val", val]
    assert stopped_run(tmp_path / "runs", "step 6:", signal.SIGTERM, *data) == 0
    assert final_state(run_folder(tmp_path / "runs"))["progress"]["codes"] is not None
    return tmp_path / "runs", data, train


@pytest.mark.slow
def test_other_images_at_the_same_path__are_refused_unless_forced_and_codes_are_chosen_anew(
    on_folders,
):
    save_folder, data, train = on_folders
    flags = [*RUN, *data, "--save_folder", save_folder]
    shutil.rmtree(train / "0")
    done = command(*flags, check=False)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    n = len(list(train.rglob("*.png")))
    assert f"images, has {n}, lacks the class 0;" in done.stderr
    assert "--data_tr had " in done.stderr and "--force_resume 1" in done.stderr
    # The last epoch's codes were chosen before the stop.
    fault = f"{NTH_CALL}\nnth_call(TrainIMLE, 'choose_codes', 1, lambda: print('chosen anew'))"
    done = faulty(fault, *flags, "--force_resume", 1, "--val_n_way", 2, check=True)
    assert "warning: going on with other images: --data_tr had " in done.stdout
    assert "chosen anew" in done.stdout
    assert final_state(run_folder(save_folder))["data"]["data_tr"]["images"] == n


def test_the_same_images_behind_a_link_or_in_an_archive__just_go_on(on_folders, tiny_run, tmp_path):
    save_folder, data, train = on_folders
    (tmp_path / "link").symlink_to(data[3])
    (tmp_path / "a").mkdir()
    archive = shutil.make_archive(tmp_path / "a" / "again", "tar", train)
    same = ["--data_tr", archive, "--data_val", f"{tmp_path}/link/"]
    assert_same_run(tiny_run, goes_on(save_folder, *same))


@pytest.mark.slow
def test_other_validation_images_by_another_path__are_told_of_and_the_run_goes_on(
    on_folders, tmp_path
):
    save_folder, data, _ = on_folders
    fewer = shutil.copytree(data[3], tmp_path / "fewer")
    for image in sorted(fewer.rglob("*.png"))[::2]:
        image.unlink()
    done = command(*RUN, *data[:3], fewer, "--save_folder", save_folder)
    assert "warning: going on with other images: --data_val had" in done.stdout
    shutil.rmtree(data[3])
    fewer.rename(data[3])
    done = command(*RUN, *data, "--save_folder", save_folder, check=False)
    assert done.returncode == 0, "the images are those of the newest checkpoint"


def test_other_training_flags__are_shown_and_need_force_resume(copied):
    folder = run_folder(copied)
    changed = ["--wd", 0.5, "--ipe", 5, "--ex_per_epoch", 30, "--epochs", 3, "--num_workers", 1]
    flags = [*RUN, *changed, "--save_folder", copied]
    done = command(*flags, check=False)
    shown = "--ex_per_epoch was 40, is 30, --ipe was 4, is 5, --wd was 0.01, is 0.5"
    assert done.returncode == 2 and shown in done.stderr and "--force_resume 1" in done.stderr
    assert "num_workers" not in done.stderr
    done = command(*flags, "--force_resume", 1)
    assert f"warning: going on with other flags: {shown}" in done.stdout
    assert final_state(folder)["progress"]["step"] == 8 + 5
    groups = final_state(folder)["optimizer"]["param_groups"]
    assert {group["weight_decay"] for group in groups} == {0, 0.5}
    assert json.loads((folder / "config.json").read_text())["flags"]["wd"] == 0.5


# -------------------------------------------------------------------------------------------------
# Numbers, memory, workers.


@pytest.mark.slow
def test_a_loss_that_is_no_number__no_update_the_images_named_and_it_goes_on_from_the_save_before(
    tiny_run, tmp_path
):
    fault = f"{NTH_CALL}\n"
    fault += "import Samplers\ndef broken(): Samplers.reconstruction_loss = nan\n"
    fault += "def nan(pred, *_): return pred.mean((-1, -2)) * float('nan')\n"
    fault += "nth_call(TrainIMLE, 'train_step', 4, broken)"
    done = faulty(fault, *RUN, "--save_minutes", 0, "--save_folder", tmp_path)
    assert done.returncode == 1
    first, *images = done.stderr.splitlines()
    assert first.startswith("error: after 3 gradient steps the training loss is nan; no update")
    assert len(images) == 12 and all(".png" in name for name in images)
    assert final_state(run_folder(tmp_path))["progress"]["step"] == 3
    assert_same_run(tiny_run, goes_on(tmp_path))


def broken_model(value):
    """A model one of whose gradients is `value` throughout."""
    model = IO.load_model(ROOT / "demo/imle_mnist.pt")
    model.cls_token.register_hook(lambda gradient: torch.full_like(gradient, value))
    return model, {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("clip_grad", [0.0, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_gradients_that_are_not_finite__no_update_and_the_images_named(value, clip_grad):
    model, before = broken_model(value)
    options = step_options(model, images_per_step=2, clip_grad=clip_grad)
    with pytest.raises(RunError, match="after 7 gradient steps the training gradient's norm is"):
        TrainIMLE.train_step(model, random_batch(2), **options)
    with pytest.raises(RunError, match="1.png"):
        TrainIMLE.train_step(model, random_batch(2), **options)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_overflow_in_float16__such_steps_are_left_out_counted_and_bounded():
    model, before = broken_model(float("inf"))
    scaler = torch.amp.GradScaler("cpu", enabled=True)
    options = step_options(model, images_per_step=2, scaler=scaler)
    progress, scale = TrainIMLE.Progress(), scaler.get_scale()
    with pytest.raises(RunError, match="norm is"):
        for _ in range(100):
            progress.step_done(TrainIMLE.train_step(model, random_batch(2), **options))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    metrics, _ = TrainIMLE.end_epoch(progress, options["rates"])
    assert metrics["pretrain/skipped_steps"] == progress.step == 20
    assert scaler.get_scale() == TrainIMLE.LEAST_SCALE == scale / 2**20


@pytest.mark.parametrize("error", ["torch.OutOfMemoryError", "MemoryError", "RuntimeError"])
def test_memory_that_does_not_suffice__a_line_names_code_bs_sp_and_mini_bs(tmp_path, error):
    text = "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you"
    fault = f'def full(*_): raise {error}("{text}")\nModels.ImplicitMAE.suffix = full'
    done = faulty(fault, *RUN, "--steps_per_eval", 0, "--save_folder", tmp_path)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert all(f"--{name} " in done.stderr for name in ("code_bs", "sp", "mini_bs", "accum"))


WORKER = """
whole = Data.SeededImages.__getitem__
def broken(self, key):
    if torch.utils.data.get_worker_info() and key[0] % 7 == 3:
        {}
    return whole(self, key)
Data.SeededImages.__getitem__ = broken
"""


def test_a_loader_worker_that_is_killed__an_error_names_it(tmp_path):
    fault = WORKER.format("os.kill(os.getpid(), signal.SIGKILL)")
    done = faulty(fault, *RUN, "--num_workers", 2, "--save_folder", tmp_path)
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("error: DataLoader worker (pid")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("how", ["time.sleep(1000)", "os.kill(os.getpid(), signal.SIGSTOP)"])
def test_a_loader_worker_that_hangs__an_error_names_its_images_and_nothing_waits(tmp_path, how):
    flags = ["--num_workers", 2, "--loader_timeout", 2, "--save_folder", tmp_path]
    begin = time.monotonic()
    done = faulty(WORKER.format(how), *RUN, *flags)
    assert time.monotonic() - begin < 60
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("error: --loader_timeout 2: ") and ".png" in done.stderr


@pytest.mark.slow
def test_a_surrogate_that_does_not_fit_into_memory__is_refused_with_what_to_lower(tmp_path):
    flags = [*RUN, "--sampler", "surrogate", "--save_folder", tmp_path]
    for sizes, advice in (
        ([10**6, "--code_bs", 16], "lower --ns"),
        ([10**5, "--code_bs", 400], "use --code_bs"),
    ):
        memory = "TrainIMLE.total_memory = lambda device: 100 * 2**30"
        done = faulty(memory, *flags, "--ex_per_epoch", 400, "--ipe", 40, "--ns", *sizes)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
        assert f"--ns {sizes[0]}" in done.stderr and f"--code_bs {sizes[2]}" in done.stderr
        assert advice in done.stderr and not (tmp_path / "models").exists()


PROBE = ["LinearProbe.py", "--model", "demo/imle_mnist.pt", "--gpus", "cpu", "--num_workers", "0"]


def probe_of(model, *flags, data, check=True):
    """LinearProbe.py, run on training and validation images."""
    arguments = [*PROBE[3:], "--model", model, "--data_tr", data[0], "--data_val", data[1], *flags]
    return command(*arguments, program=(sys.executable, PROBE[0]), check=check)


@pytest.mark.slow
def test_features_that_are_not_finite__a_probe_is_refused_and_a_run_goes_on_without_the_number(
    tiny_run, tmp_path
):
    content = torch.load(ROOT / "demo/imle_mnist.pt", weights_only=True)
    for value in (float("nan"), 1e30):  # 1e30: features are finite, their variances are not
        content["model"]["norm.weight"][3] = value
        torch.save(content, tmp_path / "model.pt")
        flags = ["--fast", 1, "--val_n_shot", 2, "--save_folder", tmp_path]
        done = probe_of(tmp_path / "model.pt", *flags, data=TINY[1:4:2], check=False)
        assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
        assert "the features of training images are not finite" in done.stderr
        assert not (tmp_path / "probes/results.csv").exists()
    fault = "from internals import encoders\nwhole = encoders.image_features\n"
    fault += "encoders.image_features = lambda *args: whole(*args) * float('inf')"
    done = faulty(fault, *RUN, "--save_folder", tmp_path, check=True)
    assert done.stdout.count("warning: no probe after 4 gradient steps: the features of") == 1
    judged = ("fast_linear_probe", "pretrain/rankme")
    expected = [
        {k: v for k, v in record.items() if not k.startswith(judged)}
        for record in metrics(tiny_run)
    ]
    assert metrics(run_folder(tmp_path)) == expected


# -------------------------------------------------------------------------------------------------
# Pictures.


@pytest.mark.slow
def test_MPLBACKEND_of_a_notebook_that_is_not_installed__pictures_are_drawn_all_the_same(
    tiny_run, tmp_path
):
    notebook = {"MPLBACKEND": "not_installed"}
    done = command(*RUN, "--save_folder", tmp_path, **notebook)
    assert "warning" not in done.stdout and (run_folder(tmp_path) / "curves.png").exists()
    picture = tmp_path / "runs.png"
    command(tmp_path, "--plot", picture, program=(sys.executable, "scripts/runs.py"), **notebook)
    assert picture.exists()


BROKEN_PEN = """
import LinearProbe, Validation
from internals import plots
def broken(*_, **__): raise TypeError("no pen")
plots.picture_grid = plots.import_matplotlib = Validation.completions = broken
"""


@pytest.mark.slow
def test_pictures_that_fail_to_be_drawn__cost_warnings_and_no_result(tiny_run, tmp_path):
    done = faulty(BROKEN_PEN, *RUN, "--save_folder", tmp_path, check=True)
    assert "warning: the picture pretrain_train was not drawn (no pen)" in done.stdout
    assert "curves.png was not drawn (no pen)" in done.stdout
    pictures = {key for record in metrics(tiny_run) for key in record if "images/" in key}
    without = [
        {**record, **dict.fromkeys(pictures & record.keys())} for record in metrics(tiny_run)
    ]
    assert metrics(run_folder(tmp_path)) == without and len(pictures) == 4
    code = f"import sys; sys.path.insert(0, '.'){BROKEN_PEN}LinearProbe.main(sys.argv[1:])"
    flags = [*PROBE[1:], *TINY[:4], "--train_n_shot", 4, "--epochs", 1, "--save_folder", tmp_path]
    done = command(*flags, program=(sys.executable, "-c", code))
    assert "probe.png was not drawn (no pen)" in done.stdout
    result = json.loads(done.stdout.splitlines()[-1])
    (file,) = tmp_path.glob("probes/*/result.json")
    assert json.loads(file.read_text())["top1"] == result["top1"]
    assert f",{result['top1']}," in (tmp_path / "probes/results.csv").read_text()


@pytest.mark.slow
def test_a_table_of_probes_that_can_t_be_written__costs_no_result(tmp_path):
    (tmp_path / "probes/results.csv").mkdir(parents=True)
    flags = ["--fast", 1, "--val_n_shot", 2, "--probe_epochs", 1, "--save_folder", tmp_path]
    done = probe_of("demo/imle_mnist.pt", *flags, data=TINY[1:4:2], check=False)
    assert done.returncode == 2 and "results.csv: Is a directory" in done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["probe"] == "fast"


@pytest.mark.slow
def test_a_folder_of_pictures_that_is_gone__costs_warnings_and_no_result(tiny_run, tmp_path):
    fault = f"{NTH_CALL}\nimport glob, shutil\n"
    fault += f"def gone(): shutil.rmtree(glob.glob('{tmp_path}/models/*/images')[0])\n"
    fault += "nth_call(TrainIMLE, 'train_step', 3, gone)"
    done = faulty(fault, *RUN, "--save_folder", tmp_path, check=True)
    assert "No such file or directory; 2 pictures are not written" in done.stdout
    assert metrics(run_folder(tmp_path)) == metrics(tiny_run)
    assert final_state(run_folder(tmp_path))["progress"]["step"] == 8


def test_class_names_that_are_no_UTF_8_or_hold_dollar_signs__are_drawn_as_text(tmp_path):
    for split in (b"tr", b"val"):
        for name in (b"caf\xe9", b"$x_", b"$\\frac{1}$"):
            folder = Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), split, name)))
            folder.mkdir(parents=True)
            for number in range(3):
                Image.new("RGB", (28, 28), (80 * number,) * 3).save(folder / f"{number}.png")
    flags = ["--epochs", 2, "--batch_size", 4, "--lrs", 1, "--save_folder", tmp_path]
    data = tmp_path / "tr", tmp_path / "val"
    done = probe_of("demo/imle_mnist.pt", *flags, data=data)
    assert "warning" not in done.stdout and not done.stderr
    assert list(tmp_path.glob("probes/*/probe.png")) and list(tmp_path.glob("probes/*/result.json"))


# -------------------------------------------------------------------------------------------------
# Weights of other programs.

STATE = torch.load(ROOT / "tests/golden/mae_tiny.pth", weights_only=True)["model"]
ENCODER = {n: x for n, x in STATE.items() if not n.startswith("decoder") and n != "mask_token"}
HEAD = {"head.weight": torch.zeros(5, 48), "head.bias": torch.zeros(5)}


def under(prefix, state=ENCODER):
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


FINE_TUNED = {re.sub("^norm", "fc_norm", name): tensor for name, tensor in ENCODER.items()} | HEAD
PROBED = {"head.0.running_mean": torch.zeros(48), "head.1.weight": torch.zeros(5, 48)} | ENCODER
DINO = {"student": under("module.backbone."), "teacher": under("backbone.")}


@pytest.mark.parametrize(
    "content, notes",
    [
        ({"state_dict": ENCODER | HEAD, "args": argparse.Namespace(lr=1)}, ["state_dict", "head"]),
        ({"state_dict": ENCODER, "state_dict_ema": ENCODER}, ["'state_dict'", "#state_dict_ema"]),
        ({"state_dict": under("model.", STATE) | {"loss.x": torch.zeros(2)}}, ["state_dict.model"]),
        ({"state_dict": under("backbone.") | HEAD}, ["'state_dict.backbone'"]),
        ({"model": under("module._orig_mod.", STATE)}, ["_orig_mod and module left out"]),
        ({n.replace("s.1.", "s.1._orig_mod."): x for n, x in STATE.items()}, ["_orig_mod left"]),
        ({"model": under("encoder.")}, ["'model.encoder'"]),
        ({"model": STATE, "model_ema": STATE}, ["#model_ema"]),
        ({"model_ema": under("module.", STATE)}, ["'model_ema'"]),
        ({"teacher": under("backbone.")}, ["'teacher.backbone'"]),
        ({"model": FINE_TUNED, "optimizer": {"state": {0: {}}}}, ["(head)", "fc_norm"]),
        ({"model": PROBED}, ["(head.0, head.1)"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_weights_as_other_programs_wrap_them__are_unwrapped_with_a_note(
    tmp_path, capsys, content, notes
):
    torch.save(content, tmp_path / "weights.pth")
    model = IO.load_model(tmp_path / "weights.pth", num_heads=4, decoder_num_heads=4)
    assert all(torch.equal(model.state_dict()[name], x) for name, x in ENCODER.items())
    said = capsys.readouterr().out
    assert "note: " in said and all(note in said for note in notes), said


def test_weights_of_several_networks__are_listed_with_how_to_choose(tmp_path):
    torch.save({**DINO, "epoch": 3}, path := tmp_path / "dino.pth")
    flags = ["--fast", 1, "--val_n_shot", 2, "--save_folder", tmp_path]
    done = probe_of(path, *flags, data=TINY[1:4:2], check=False)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "#student.backbone or #teacher.backbone" in done.stderr
    heads = {"num_heads": 4, "decoder_num_heads": 4}
    other = {**DINO, "teacher": {n: x + 1 for n, x in DINO["teacher"].items()}}
    torch.save(other, path)
    model = IO.load_model(f"{path}#teacher", **heads)
    assert torch.equal(model.cls_token, ENCODER["cls_token"] + 1)
    with pytest.raises(Utils.InputError, match="no network 'ema'; .*#student.backbone"):
        IO.load_model(f"{path}#ema", **heads)
    torch.save({"state_dict": {"conv1.weight": torch.zeros(3)}, "epoch": 3}, path)
    with pytest.raises(Utils.InputError, match="not the weights .*state_dict.conv1.weight"):
        IO.load_model(path)
    torch.save({"model": STATE, "folder": tmp_path}, path)
    with pytest.raises(Utils.InputError, match="holds pathlib.*save its state dict alone"):
        IO.load_model(path)


def test_the_folder_of_a_run_given_as_weights__is_taken_for_its_newest_checkpoint(
    tiny_run, tmp_path, monkeypatch, capsys
):
    for folder in (tiny_run, tiny_run / "checkpoints"):
        model = IO.load_model(folder)
        assert f"newest checkpoint, {final_path(tiny_run).name}" in capsys.readouterr().out
        for name, tensor in final_state(tiny_run)["model"].items():
            assert torch.equal(model.state_dict()[name], tensor)
    out = tmp_path / "small.pt"
    command(tiny_run, out, program=(sys.executable, "scripts/slim_checkpoint.py"))
    assert IO.load_model(out).config == model.config
    with pytest.raises(Utils.InputError, match="folder without weights: .* but small.pt"):
        IO.load_model(tmp_path)


# -------------------------------------------------------------------------------------------------
# Others.

FAKE_WANDB = """
class Settings:
    def __init__(self, **_): pass
def Image(_): pass
class Run:
    def log(self, *_, **__): raise OSError("disk on fire")
def init(**_): {}
"""


@pytest.mark.parametrize(
    "content, reason",
    [
        ("raise ImportError('not here')", "not here"),
        pytest.param(
            FAKE_WANDB.format("raise ValueError('no such project')"),
            "no such project",
            marks=pytest.mark.slow,
        ),
        (FAKE_WANDB.format("return Run()"), "disk on fire"),
    ],
)
def test_Weights_and_Biases_missing_or_raising_at_init_or_log__costs_one_warning(
    tmp_path, content, reason
):
    (tmp_path / "path/wandb").mkdir(parents=True)
    (tmp_path / "path/wandb/__init__.py").write_text(content)
    flags = [*TINY, "--wandb", "online", "--epochs", 1, "--save_folder", tmp_path / "runs"]
    done = command(*flags, PYTHONPATH=str(tmp_path / "path"))
    assert done.stdout.count("warning: Weights & Biases") == 1 and reason in done.stdout
    assert metrics(run_folder(tmp_path / "runs"))


@pytest.mark.slow
@pytest.mark.parametrize("key", ["", "0" * 40])
def test_Weights_and_Biases_without_key_or_network__costs_one_warning(tmp_path, key):
    flags = [*TINY, "--wandb", "online", "--epochs", 1, "--save_folder", tmp_path]
    environment = {"HOME": str(tmp_path), "WANDB_BASE_URL": "http://127.0.0.1:9"}
    environment |= {"WANDB_API_KEY": key} if key else {}
    done = command(*flags, **environment)
    assert done.stdout.count("warning: Weights & Biases") == 1
    assert metrics(run_folder(tmp_path))[-1]["pretrain/step"] == 4


@LINUX
@pytest.mark.slow
def test_one_process_of_two_is_killed__all_end_and_lines_say_which_and_by_what(tmp_path):
    process = start([*RUN, "--processes", 2], tmp_path)
    wait_for(process, "step 2:")
    os.kill(rank_processes(process.pid)[1], signal.SIGKILL)
    status, _, errors = end(process)
    assert status == 128 + signal.SIGKILL and "Traceback" not in errors
    assert "process 1 was ended by signal 9; was it short of memory?" in errors


@pytest.mark.slow
def test_standard_output_that_nobody_reads_any_more__the_run_goes_on(tiny_run, tmp_path):
    process = start(RUN, tmp_path)
    wait_for(process, "step 0:")
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait(60) == 0
    assert_same_run(tiny_run, run_folder(tmp_path))


@pytest.mark.parametrize("closed", [(1,), (0, 1, 2)])
def test_standard_streams_that_are_closed__the_run_goes_on(tmp_path, closed):
    flags = [*RUN, "--epochs", 1, "--steps_per_eval", 0, "--save_folder", tmp_path]
    done = subprocess.run(
        [sys.executable, "TrainIMLE.py", *map(str, flags)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        preexec_fn=lambda: [os.close(number) for number in closed],
    )
    assert done.returncode == 0 and not done.stderr
    assert len(metrics(run_folder(tmp_path))) == 1


@LINUX
@pytest.mark.parametrize("program", ["TrainIMLE.py", "LinearProbe.py", "scripts/complete.py"])
def test_Ctrl_C_while_modules_are_imported__exit_status_130_without_a_traceback(tmp_path, program):
    process = start([], tmp_path, (program,))
    while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert end(process) == (130, "", "")


@LINUX
@pytest.mark.slow
def test_names_that_are_no_UTF_8__are_written_with_escapes(tmp_path):
    model, data = tmp_path / "model\udce9.pt", tmp_path / "data\udce9.tar"
    model.symlink_to(ROOT / "demo/imle_mnist.pt")
    data.symlink_to(ROOT / TINY[1])
    flags = ["--model", model, "--data_tr", data, "--data_val", data, "--fast", 1]
    flags += "--gpus cpu --num_workers 0 --val_n_way 2 --val_n_shot 2 --probe_epochs 1".split()
    program = (sys.executable, "LinearProbe.py")
    done = command(*flags, "--save_folder", tmp_path, program=program, PYTHONIOENCODING="ascii")
    assert json.loads(done.stdout.splitlines()[-1])["model"] == str(model)
    row = (tmp_path / "probes/results.csv").read_text(encoding="utf-8").splitlines()[-1]
    assert "model\\udce9.pt" in row and "data\\udce9.tar" in row
    save_folder = tmp_path / "runs\udce9"
    flags = [*RUN, "--data_tr", data, "--epochs", 1, "--steps_per_eval", 0]
    done = command(*flags, "--save_folder", save_folder, PYTHONIOENCODING="ascii")
    assert "runs\\udce9/models" in done.stdout
    config = json.loads((run_folder(save_folder) / "config.json").read_text())
    assert config["flags"]["data_tr"] == str(data)


@pytest.mark.slow
def test_a_process_of_torchrun_is_killed__the_restart_goes_on_as_the_same_run(tiny_run, tmp_path):
    script = tmp_path / "faulty.py"
    script.write_text(
        f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport TrainIMLE\n{NTH_CALL}\n"
        "if os.environ['TORCHELASTIC_RESTART_COUNT'] + os.environ['RANK'] == '00':\n"
        "    nth_call(TrainIMLE, 'train_step', 3, lambda: os.kill(os.getpid(), 9))\n"
        "if __name__ == '__main__':\n    TrainIMLE.main(sys.argv[1:])\n"
    )
    flags = [*TINY, "--steps_per_eval", 2, "--save_minutes", 0, "--save_folder", tmp_path]
    torchrun = "torchrun --standalone --max_restarts 1 --nproc_per_node 2".split()
    done = command(*torchrun[1:], script, *flags, program=torchrun[:1])
    assert "going on after step 2" in done.stdout
    assert_same_run(tiny_run, run_folder(tmp_path), tolerance=1e-5)


def test_a_restart_by_torchrun_that_gives_no_id__is_refused_in_a_line_that_names_uid(tmp_path):
    environment = {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "1"}
    done = command(*TINY, "--save_folder", tmp_path, check=False, **environment)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "torchrun has restarted this run" in done.stderr and "--uid" in done.stderr


@pytest.mark.slow
def test_one_process_of_two_raises__all_end_within_30_seconds_and_its_traceback_is_the_one(
    tmp_path,
):
    fault = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import Data
{NTH_CALL}
def fault():
    if os.environ["RANK"] == "1":
        raise ValueError("one of two")
nth_call(Data, "minibatches", 2, fault)
"""
    (tmp_path / "sitecustomize.py").write_text(fault)  # every process runs it first
    environment = {"PYTHONPATH": str(tmp_path)}
    process = start([*RUN, "--processes", 2], tmp_path / "runs", env=environment)
    wait_for(process, "step 2:")
    begin = time.monotonic()
    status, _, errors = end(process)
    assert status == 1 and time.monotonic() - begin < 30
    assert errors.startswith("error: in process 1\n") and errors.count("Traceback") == 1
    assert errors.rstrip().endswith("ValueError: one of two")


@pytest.mark.slow
def test_the_same_uid_started_twice_at_once__the_second_refuses_and_the_first_goes_on(
    tiny_run, tmp_path
):
    fault = f"{NTH_CALL}\nnth_call(TrainIMLE, 'train_step', 3, lambda: time.sleep(25))\n"
    code = f"import sys, time, TrainIMLE\n{fault}TrainIMLE.main(sys.argv[1:])"
    first = start(RUN, tmp_path, ("-c", code))
    wait_for(first, "step 2:")
    second = command(*RUN, "--save_folder", tmp_path, check=False)
    assert second.returncode == 2 and len(second.stderr.splitlines()) == 1
    assert f"is in use by process {first.pid}" in second.stderr
    listed = command(tmp_path, program=(sys.executable, "scripts/runs.py")).stdout
    assert listed.splitlines()[1].split()[0] == "running"
    assert end(first)[0] == 0
    assert_same_run(tiny_run, run_folder(tmp_path))


@pytest.mark.parametrize("config", [None, "{}", '{"flags": {"uid": "another"}}'])
def test_the_folder_of_another_run_in_the_way__is_refused_and_left_as_it_is(copied, config):
    folder = run_folder(copied)
    shutil.rmtree(folder / "checkpoints")
    (folder / "config.json").unlink()
    if config:
        (folder / "config.json").write_text(config)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    done = command(*RUN, "--save_folder", copied, check=False)
    assert done.returncode == 2 and "is in the way" in done.stderr
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_table_of_faults_is_made_of_these_names():
    done = command(program=(sys.executable, "scripts/fault_table.py"))
    assert (ROOT / "docs/faults.md").read_text() == done.stdout


# -------------------------------------------------------------------------------------------------
# What real data hold.

QUICK = [*TINY, "--ignore_z", 1, "--epochs", 1, "--ex_for_vis_te", 0]
NO_PROBE = ["--fast_linear_probe", 0, "--steps_per_eval", 0]


def grey_images(root, numbers, names=("a/0.png", "a/1.png", "b/0.png", "b/1.png")):
    """A folder of images of these numbers (height, width)."""
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.roll(numbers, i, axis=1)).save(root / name)
    return root


@pytest.mark.slow
def test_grey_images_of_16_bits__train_as_the_same_in_8_bits_and_their_range_is_told_once(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (32, 32))
    folders = {
        8: grey_images(tmp_path / "8/data", values.astype(np.uint8)),
        16: grey_images(tmp_path / "16/data", (values * 257).astype(np.uint16)),
    }
    for bits, data in folders.items():
        flags = ["--data_tr", data, "--data_val", data, "--num_workers", 1, "--save_folder"]
        done = command(*QUICK, *flags, tmp_path / f"{bits}/runs")
        notes = [line for line in done.stdout.splitlines() if "grey values are 16 bits" in line]
        assert len(notes) == (2 if bits == 16 else 0)  # one for each of the data sets
        assert all(", here from 0 to 65,535; " in note for note in notes)
    assert_same_run(*(run_folder(tmp_path / f"{bits}/runs") for bits in folders))


@pytest.mark.slow
def test_one_damaged_image_of_thousands_in_the_probe_s_subset__is_replaced(tmp_path):
    names = [f"{c}/{i:04}.png" for c in "ab" for i in range(510)]
    data = grey_images(tmp_path / "data", np.zeros((2, 2), np.uint8), names)
    bad = Path(Data.few_shot(Data.open_images(data), 2, 3, 0).name(0))
    bad.write_bytes(b"")
    flags = ["--data_tr", data, "--data_val", data, "--val_n_shot", 3, "--save_folder", tmp_path]
    done = command(*QUICK, *flags, "--skip_bad_images", 1)
    assert f"{bad}: cannot identify" in done.stderr and "1 of 1020 images" in done.stderr


@pytest.mark.slow
def test_files_of_macOS_Jupyter_and_the_like__are_left_out_and_told_with_their_number(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (32, 32), dtype=np.uint8)
    clean, data = (grey_images(tmp_path / name / "data", values) for name in ("clean", "mac"))
    copies = [".ipynb_checkpoints/0.png", "a/.ipynb_checkpoints/0-checkpoint.png"]
    grey_images(data, values, [*copies, "__MACOSX/data/a/0.png"])
    for name in ("._a", "a/._0.png", "b/.DS_Store", "b/1.avif"):
        (data / name).write_bytes(b"Mac OS X")
    archive = tmp_path / "mac/data.tar"
    subprocess.run(["tar", "-C", data.parent, "-cf", archive, "data"], check=True)
    done = {}
    for name, path in {"clean": clean, "folder": data, "tar": archive}.items():
        flags = ["--data_tr", path, "--data_val", clean, "--save_folder", tmp_path / name / "runs"]
        done[name] = command(*QUICK, *NO_PROBE, *flags).stdout.splitlines()[0]
    assert done["clean"] == "training: 4 images, 2 classes (a, b)"
    for name in ("folder", "tar"):
        assert done[name].startswith(f"{done['clean']}; left out: 6 hidden (such as ")
        assert done[name].endswith("), 1 .avif")
        assert_same_run(run_folder(tmp_path / "clean/runs"), run_folder(tmp_path / name / "runs"))


@pytest.mark.slow
def test_data_laid_out_by_another_tool__are_refused_in_one_line_with_what_to_do(tmp_path):
    image = np.zeros((8, 8), np.uint8)
    splits = grey_images(tmp_path / "all", image, ["train/a/0.png", "val/a/0.png"])
    flat = grey_images(tmp_path / "flat", image, ["ILSVRC2012_val_00000001.png"])
    for flag, data, words in (
        ("--data_tr", splits, "name one of these folders"),
        ("--data_val", flat, "valprep.sh"),
    ):
        done = command(*QUICK, flag, data, "--save_folder", tmp_path, check=False)
        (line,) = done.stderr.splitlines()
        assert done.returncode == 2 and line.startswith(f"error: {flag}: {data} ")
        assert words in line


LOAD = """
import sys, torch, Augmentation, Data
images, transform = Data.open_images(sys.argv[1]), Augmentation.resize((512, 512))
loader, n = Data.ImageLoader(images, transform, num_workers=2), torch.arange(80) % 4
sizes = [batch.nbytes for _, batch in loader.chunks(n, n, 40)]
print(sizes)
"""


def in_small_memory(size, *program):
    """Runs a program of the repository where /dev/shm has this size, as in a container."""
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount")
    mount = f'mount -t tmpfs -o size={size} shm /dev/shm && exec {sys.executable} "$@"'
    return command(*program, program=("unshare", "-rm", "sh", "-c", mount, "sh"), check=False)


@LINUX
@pytest.mark.slow
def test_a_small_dev_shm__suffices_or_a_line_names_shm_size_and_num_workers(tmp_path):
    data = grey_images(tmp_path / "data", np.zeros((8, 8), np.uint8))
    done = in_small_memory("24m", "-c", LOAD, data)  # 31 MB in a batch, 17 MB in flight
    assert done.stdout == "[31457280, 31457280]\n", done.stderr
    flags = [*QUICK, *NO_PROBE, "--data_tr", data, "--data_val", data, "--save_folder", tmp_path]
    done = in_small_memory("100k", "TrainIMLE.py", *flags, "--num_workers", 2, "--input_size", 512)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith("error: ") and "--shm-size" in line and "--num_workers 0" in line
