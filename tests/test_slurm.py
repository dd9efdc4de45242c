"""The batch script, and the real thing: runs that a SLURM of two nodes on this machine cuts short,
requeues and finishes."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import slurm_submit  # noqa: E402 (the line above makes it importable)
from conftest import ROOT, TINY, command, metrics, run_folder
from test_training import assert_same_run, final_state

import IO
from Data import open_pair, staged_path
from internals import runs
from internals.processes import adopt_slurm_step

TRAINING = [str(ROOT / word) if word.startswith("demo/") else word for word in TINY]
ON_CPU = "--gpus_per_node 0 --cpus_per_task 1".split()


@pytest.fixture
def printed(capsys):
    """A function of a command line of slurm_submit.py: the batch script that --dry_run prints."""

    def printed(*words):
        capsys.readouterr()
        slurm_submit.main(["--dry_run", *words])
        script = capsys.readouterr().out
        assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
        assert "{{" not in script
        return script

    return printed


def asked_of_sbatch(script):
    """The options in a batch script."""
    return set(re.findall("^#SBATCH (.*)", script, re.M))


def test_the_batch_script_says_what_was_asked_for(printed):
    options = "--time 3 --nodes 2 --gpus_per_node 0 --account me --chunks 8 --mem 9G".split()
    script = printed(*options, "--sbatch", "exclusive", "qos=x", "--", *TRAINING)
    assert asked_of_sbatch(script) == {
        *"--job-name=imle-ssl --time=3:00:00 --nodes=2 --ntasks-per-node=1".split(),
        *"--cpus-per-task=8 --output=slurm-%j.out --open-mode=append --requeue".split(),
        *"--signal=USR2@300 --mem=9G --account=me --exclusive --qos=x".split(),
    }
    assert "\nchunks=8 " in script and "\ndata=() " in script
    told = script.split("TrainIMLE.py")[-1].split("\n}")[0].replace("\\\n", " ").split()
    assert told == TRAINING


def test_there_is_a_task_for_each_gpu_and_the_data_may_be_staged(printed):
    training = [word for word in TRAINING if word not in ("--gpus", "cpu")]
    script = printed(*"--time .5 --gpus_per_node 4 --stage --".split(), *training)
    expected = {"--ntasks-per-node=4", "--gpus-per-node=4", "--time=0:30:00"}
    assert asked_of_sbatch(script) >= expected
    assert f"\ndata=({TRAINING[1]} {TRAINING[3]}) " in script
    assert '--staged "$staged"\n}' in script


def test_a_config_is_written_out_in_the_job_and_data_of_probes_are_staged(printed, tmp_path):
    (config := tmp_path / "config.json").write_text('{"lr": 0.5}')
    training = [word for word in TRAINING if word not in ("--gpus", "cpu")]
    training += ["--config", str(config), "--probe_data", f"x={TRAINING[3]},{tmp_path}"]
    script = printed(*"--time .5 --gpus_per_node 4 --stage --".split(), *training)
    assert "--lr=0.5" in script and "--config" not in script
    assert f"\ndata=({TRAINING[1]} {TRAINING[3]} {tmp_path}) " in script


def test_words_of_the_training_reach_it_as_they_are(capsys):
    training = [*TRAINING, "--notes", 'it\'s --a "$HOME" {{TIME}}', "--wandb", "online"]
    slurm_submit.main([*ON_CPU, "--time", "1", "--dry_run", "--", *training])
    script, notes = capsys.readouterr()
    start = script.replace("srun", "printf '%s\\n'").split("each_node()")[0] + "train"
    said = subprocess.run(["bash", "-c", start], env={}, capture_output=True, text=True).stdout
    assert said.splitlines()[-len(training) - 2 :] == [*training, "--wandb", "offline"]
    assert "note: --wandb offline" in notes


@pytest.mark.parametrize(
    "text, reason",
    [
        ("--time 1", "behind `--`"),
        ("-- TRAINING", "--time"),
        ("--time 0 -- TRAINING", "--time"),
        ("--time .05 -- TRAINING", "--stop_before 300"),
        ("--time 1 --gpu_per_node 0 -- TRAINING", "did you mean --gpus_per_node"),
        ("--time 1 -- TRAINING", "--gpus cpu: needs --gpus_per_node 0"),
        ("--time 1 CPU -- TRAINING --gpus 0 1", "--gpus: leave it out"),
        ("--time 1 CPU -- TRAINING --resume x.pt", "--resume"),
        ("--time 1 CPU -- TRAINING --epoch 3", "did you mean --epochs"),
        ("--time 1 CPU -- TRAINING --mask_ratio 1", "--mask_ratio"),
        ("--time 1 CPU --nodes 13 -- TRAINING", "--mini_bs 12: each of the 13 processes needs"),
        ("--time 1 CPU --stage -- TRAINING --data_val /no/where", "--stage: /no/where"),
        ("--time 1 CPU -- TRAINING", "--dry_run"),  # without SLURM
    ],
)
def test_a_mistake_ends_in_one_line_before_anything_is_submitted(text, reason, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "")
    words = text.replace("CPU", "--gpus_per_node 0").replace("TRAINING", " ".join(TRAINING)).split()
    with pytest.raises(SystemExit) as ended:
        slurm_submit.main(words)
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (2, "")
    (line,) = err.splitlines()
    assert reason in line


def test_what_sbatch_refuses_is_told_and_what_it_takes_is_named(capsys, monkeypatch, tmp_path):
    """By an sbatch that stands in for the real one."""
    sbatch = tmp_path / "sbatch"
    sbatch.write_text(
        '#!/bin/sh\nif grep -q 42:00:00; then echo "17;here"; else echo no >&2; exit 1; fi'
    )
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.chdir(tmp_path)
    slurm_submit.main([*ON_CPU, "--time", "42", "--", *TRAINING, "--save_folder", "runs"])
    assert capsys.readouterr().out.splitlines() == [
        f"job 17; its output: {tmp_path}/slurm-17.out",
        f"its run: {tmp_path}/runs/models/",
    ]
    with pytest.raises(SystemExit) as ended:
        slurm_submit.main([*ON_CPU, "--time", "41", "--", *TRAINING])
    assert (ended.value.code, capsys.readouterr().err) == (2, "error: sbatch: no\n")


STEP = {
    "SLURM_JOB_ID": "1234567",
    "SLURM_STEP_ID": "1",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NODELIST": "gpu[003-005,9],other1",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
}
NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def environment(monkeypatch):
    """Nothing, which is what os.environ is meanwhile."""
    monkeypatch.setattr(os, "environ", {})
    yield os.environ
    monkeypatch.undo()


@pytest.mark.parametrize(
    "nodes, first",
    [("gpu[003-005,9],other1", "gpu003"), ("a-1.b,c2", "a-1.b"), ("r[1-2]n[05,7]", "r1n05")],
)
def test_a_task_of_a_step_of_several_is_told_what_torchrun_would_tell_it(environment, nodes, first):
    environment.update(STEP, SLURM_STEP_NODELIST=nodes)
    adopt_slurm_step()
    assert [environment[name] for name in NAMES[:4]] == ["5", "1", "8", first]
    assert 10000 <= int(environment["MASTER_PORT"]) < 30000


@pytest.mark.parametrize(
    "change",
    [
        {"SLURM_STEP_NUM_TASKS": "1"},  # srun of one task
        {"SLURM_STEP_NUM_TASKS": None},  # a batch script without srun
        {"RANK": "3", "WORLD_SIZE": "4"},  # torchrun, one in each task
    ],
)
def test_other_processes_inside_a_job_are_left_alone(environment, change):
    environment.update({k: v for k, v in {**STEP, **change}.items() if v is not None})
    before = dict(environment)
    adopt_slurm_step()
    assert environment == before


def test_an_interactive_shell_is_left_alone(environment):
    environment.update(STEP)
    terminal, ours = os.openpty()
    stdin = os.dup(0)
    try:
        os.dup2(ours, 0)
        adopt_slurm_step()
    finally:
        os.dup2(stdin, 0)
        for file in (terminal, ours, stdin):
            os.close(file)
    assert not set(NAMES) & set(environment)


def test_what_was_staged_is_read_and_the_run_is_still_named_by_the_original(tmp_path):
    original = tmp_path / "data/mnist_val.tar"
    original.parent.mkdir()
    copy = Path(staged_path(original, tmp_path / "node"))
    copy.parent.mkdir(parents=True)
    shutil.copy(ROOT / "demo/mnist_val.tar", copy)
    options = {"n_way": -1, "n_shot": -1, "seed": 0}
    images, _ = open_pair(original, original, staged=tmp_path / "node", **options)
    assert len(images) == 1000 and not original.exists()
    flags = [*TRAINING, "--data_tr", original, "--data_val", original, "--uid", "u"]
    flags += ["--epochs", 0, "--steps_per_eval", 0, "--save_folder", tmp_path]
    command(*flags, "--staged", tmp_path / "node")
    assert run_folder(tmp_path).name.startswith("TrainIMLE-data_mnist_val-")
    elsewhere = IO.parse_flags(list(map(str, [*flags, "--staged", "/elsewhere"])))
    rules = {"changeable": IO.changeable_flags(IO.training_parser()), "architecture": set()}
    checkpoint = runs.locate_run("TrainIMLE", elsewhere, **rules).checkpoint
    assert checkpoint["args"]["staged"] == str(tmp_path / "node")


# -------------------------------------------------------------------------------------------------
# A real SLURM.


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A SLURM of two nodes, `localhost` and this host, with two cores each; jobs of the partition
    `high` pre-empt those of `low`. Skips, with the reason, where it can't be had."""
    folder = tmp_path_factory.mktemp("slurm")
    program = ["bash", str(ROOT / "tests/slurm_cluster.sh")]
    if os.geteuid() != 0:
        if subprocess.run("sudo -n true", shell=True, capture_output=True).returncode:
            pytest.skip("a SLURM of our own needs root, or sudo without a password")
        program = ["sudo", "-n", *program]
    for action in ("install", "start"):
        done = subprocess.run([*program, action, folder], capture_output=True, text=True)
        if done.returncode:
            said = (done.stdout + done.stderr).strip().splitlines() or ["it says nothing"]
            subprocess.run([*program, "stop", folder], capture_output=True)
            pytest.skip(f"no SLURM here, {action} failed: {said[-1]}")
    yield Cluster(folder / "slurm.conf")
    subprocess.run([*program, "stop", folder], capture_output=True)


class Cluster:
    """What a user of the cluster does."""

    def __init__(self, conf):
        self.environment = {"SLURM_CONF": str(conf)}

    def run(self, *words, check=True):
        """Runs a command of SLURM's; its output."""
        return command(program=words, check=check, **self.environment).stdout

    def submit(self, folder, *options, training):
        """Submits a run from a folder by scripts/slurm_submit.py; the job's id."""
        program = (sys.executable, slurm_submit.__file__)
        words = [*ON_CPU, "--partition", "low", *options, "--", *training]
        done = command(*words, program=program, cwd=folder, **self.environment)
        (job, log) = re.match(r"job (\d+); its output: (.*)", done.stdout).groups()
        assert log == f"{folder}/slurm-{job}.out"
        return job

    def job(self, job):
        """A job's description: {name: value}."""
        text = self.run("scontrol", "--oneliner", "show", "job", job)
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def await_state(self, job, *states, restarts=0, seconds=120):
        """Waits until the job is in one of these states, after at least so many restarts."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            now = self.job(job)
            if now["JobState"] in states and int(now["Restarts"]) >= restarts:
                return now
            time.sleep(0.3)
        raise AssertionError(f"{now['JobState']} after {now['Restarts']} restarts, not {states}")


def await_steps(folder, n, seconds=60):
    """Waits until the run in a --save_folder has logged n steps."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for path in folder.glob("models/*/metrics.jsonl"):
            lines = path.read_text().rpartition("\n")[0].splitlines()
            if lines and (step := int(re.search(r'"pretrain/step": (\d+)', lines[-1])[1])) >= n:
                return step
        time.sleep(0.1)
    logs = [path.read_text() for path in folder.glob("slurm-*.out")]
    raise AssertionError(f"no {n} steps after {seconds} s; the output: {logs}")


def monotone(folder):
    """Whether the steps in metrics.jsonl never go back, nor come twice with the same content."""
    steps = [(r["pretrain/step"], "pretrain/loss_tr" in r) for r in metrics(folder)]
    return steps == sorted(set(steps)) and len(steps) > 0


@pytest.mark.slow
def test_a_run_that_is_cut_short_five_times_equals_one_that_is_not(cluster, tmp_path):
    """By a signal, SLURM's requeue, pre-emption, a signal again and the time limit; in one process,
    with staged data."""
    training = [*TRAINING, "--num_workers", 1, "--epochs", 50, "--steps_per_eval", 100]
    chunks = ["--time", 1 / 60, "--stop_before", 15, "--chunks", 9, "--stage"]
    job = cluster.submit(tmp_path, *chunks, training=training)
    cuts = [
        ["scancel", "--signal=USR2", job],
        ["scontrol", "requeue", job],
        ["sbatch", "--partition=high", "--nodes=2", "--ntasks=4", "--output=none", "--wrap=true"],
        ["scancel", "--signal=USR2", job],
    ]
    step = 0
    for number, cut in enumerate(cuts, start=1):
        step = await_steps(tmp_path, step + 5)
        cluster.run(*cut)
        cluster.await_state(job, "RUNNING", restarts=number)
        step = await_steps(tmp_path, step)  # the run may have gone on until the cut took effect
    # The time limit: SLURM asks 15 to 45 s before. Frozen until then, the run can't be too fast.
    await_steps(tmp_path, step + 5)
    cluster.run("scancel", "--signal=STOP", job, check=False)
    started = time.mktime(time.strptime(cluster.job(job)["StartTime"], "%Y-%m-%dT%H:%M:%S"))
    time.sleep(max(0, started + 48 - time.time()))
    cluster.run("scancel", "--signal=CONT", job, check=False)
    assert cluster.await_state(job, "COMPLETED", restarts=5)["ExitCode"] == "0:0"

    folder, uninterrupted = run_folder(tmp_path), tmp_path / "uninterrupted"
    command(*training, "--uid", "plain", "--save_folder", uninterrupted)
    assert folder.name == run_folder(uninterrupted).name.removesuffix("plain") + job
    assert monotone(folder)
    assert_same_run(folder, run_folder(uninterrupted))
    log = (tmp_path / f"slurm-{job}.out").read_text()
    assert log.count("new: ") == log.count("done: ") == 1
    assert log.count("going on after step ") >= 5
    assert not list(Path("/tmp").glob(f"imle-ssl-{job}")), "what was staged is gone"


@pytest.mark.slow
def test_tasks_on_two_nodes_stop_together_go_on_and_train_the_same_run(cluster, tmp_path):
    training = [*TRAINING, "--num_workers", 1, "--epochs", 5, "--steps_per_eval", 2]
    # Near the identity all codes have nearly the same loss: rounding could choose another code.
    training += ["--fast_linear_probe", 0, "--adain_init", "original"]
    job = cluster.submit(tmp_path, "--time", 1, "--nodes", 2, "--chunks", 2, training=training)
    await_steps(tmp_path, 2)
    cluster.run("scancel", "--signal=USR2", job)
    cluster.await_state(job, "COMPLETED", restarts=1)
    log = (tmp_path / f"slurm-{job}.out").read_text()
    assert log.count("stopped after step") == log.count("going on after") == 1
    command(*training, "--uid", "plain", "--save_folder", tmp_path / "plain")
    assert_same_run(run_folder(tmp_path), run_folder(tmp_path / "plain"), tolerance=1e-5)
    assert monotone(run_folder(tmp_path))


@pytest.mark.slow
def test_a_job_that_is_cancelled_stays_so_and_its_run_goes_on_by_uid(cluster, tmp_path):
    training = [*TRAINING, "--epochs", 1000, "--steps_per_eval", 0]
    job = cluster.submit(tmp_path, "--time", 1, "--chunks", 9, training=training)
    await_steps(tmp_path, 20)
    cluster.run("scancel", job)
    assert cluster.await_state(job, "CANCELLED")["Restarts"] == "0"
    step = final_state(run_folder(tmp_path))["progress"]["step"]
    assert step >= 20 and monotone(run_folder(tmp_path))

    # Another job goes on; its only chunk is cut short.
    training += ["--uid", job]
    second = cluster.submit(tmp_path, "--time", 1, "--chunks", 1, training=training)
    await_steps(tmp_path, step + 20)
    cluster.run("scancel", "--signal=USR2", second)
    assert cluster.await_state(second, "COMPLETED")["Restarts"] == "0"
    log = (tmp_path / f"slurm-{second}.out").read_text()
    assert f"going on after step {step}" in log
    assert f"all 1 chunks are over; to go on, submit the same command with --uid {job}" in log
    assert monotone(run_folder(tmp_path))


@pytest.mark.slow
def test_a_run_that_fails_is_not_requeued(cluster, tmp_path):
    (tmp_path / "bad.pth").write_bytes(b"no weights")
    training = [*TRAINING, "--finetune", 1, "--mae_weights", tmp_path / "bad.pth"]
    job = cluster.submit(tmp_path, "--time", 1, "--nodes", 2, "--chunks", 3, training=training)
    ended = cluster.await_state(job, "FAILED")
    assert ended["Restarts"] == "0"
    assert ended["ExitCode"] in ("2:0", "143:0"), "of the task that ended, or of one ended for it"
    assert "error: --mae_weights: " in (tmp_path / f"slurm-{job}.out").read_text()
