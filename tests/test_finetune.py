"""Fine-tuning, and scripts/downstream.sh."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys

import finetune
import pytest
import torch
from conftest import DEMO_DATA, PATH, ROOT, command

import IO
from Augmentation import normalize
from internals import runs
from internals.checkpoints import save_checkpoint
from internals.encoders import load_encoder, timm_network
from internals.processes import run_command
from Models import ModelConfig, build

CHECKPOINT = str(ROOT / "demo/imle_mnist.pt")
SMALL = "--gpus cpu --num_workers 0 --use_augs 0 --train_n_way 3 --train_n_shot 40"
RECIPE = f"{SMALL} --epochs 2 --batch_size 12 --lr 2e-2 --cutmix 0".split()


class Interrupted(Exception):
    pass


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    """In the same folder and with one thread, as a command of conftest."""
    monkeypatch.chdir(ROOT)
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.set_rng_state(state)


def run(*words, model=CHECKPOINT):
    """What the command does, in this process."""
    words = [model, *DEMO_DATA, *RECIPE, *map(str, words)]
    run_command(lambda: finetune.finetune(IO.parse_finetune_flags(words)))


def saved(path):
    return torch.load(path, weights_only=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The checkpoint of a fine-tuning by the real command, and the command's result."""
    out = tmp_path_factory.mktemp("finetuned") / "mine.pt"
    program = (sys.executable, "scripts/finetune.py")
    done = command(CHECKPOINT, *DEMO_DATA, *RECIPE, "--out", out, program=program)
    return out, json.loads(done.stdout.splitlines()[-1])


def test_the_command_learns_and_its_last_line_is_the_result(finished):
    _, result = finished
    assert result["model"] == CHECKPOINT and result["n_train"] == 120
    assert result["steps"] == 2 * 120 // 12 and result["seconds"] > 0
    assert result["accuracy"] > 0.6  # chance: a third


def test_an_interrupted_fine_tuning_goes_on_to_the_same_bits(finished, tmp_path, monkeypatch):
    out, steps = tmp_path / "mine.pt", []
    with monkeypatch.context() as patch:
        seed_step = finetune.timm.utils.random_seed

        def interrupt(seed):
            steps.append(seed)
            if len(steps) == 17:  # in the second of the epochs of ten steps
                raise Interrupted
            seed_step(seed)

        patch.setattr(finetune.timm.utils, "random_seed", interrupt)
        with pytest.raises(Interrupted):
            run("--out", out)
    assert len(saved(out)["history"]) == 1
    torch.manual_seed(5)  # as another process would have another state
    run("--out", out)
    whole, other = saved(finished[0]), saved(out)
    assert all(torch.equal(whole["model"][name], other["model"][name]) for name in whole["model"])
    for one, two in zip(whole["history"], other["history"], strict=True):
        assert (one["loss"], one["accuracy"]) == (two["loss"], two["accuracy"])


def test_a_finished_fine_tuning_prints_its_result_again(finished, capsys, monkeypatch):
    out, result = finished
    monkeypatch.delattr(finetune, "train_epoch")
    run("--out", out)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result


@pytest.mark.parametrize("prefix", ["", "untrained:"])
def test_fine_tuning_starts_from_the_encoder_s_weights(prefix, tmp_path, monkeypatch):
    networks = []

    def train_epoch(network, *_, **__):
        networks.append(network.eval())
        raise Interrupted

    monkeypatch.setattr(finetune, "train_epoch", train_epoch)
    with pytest.raises(Interrupted):
        run("--out", tmp_path / "mine.pt", model=prefix + CHECKPOINT)
    images = torch.randn(3, 3, 28, 28)
    with torch.no_grad():
        features = networks[0].forward_features(images)
        trained, same = (load_encoder(x + CHECKPOINT).encode(images) for x in ("", prefix))
    torch.testing.assert_close(features, same, atol=1e-5, rtol=1e-5)
    assert torch.allclose(features, trained, atol=0.1) == (not prefix)


def test_timm_s_network_has_the_encoder_s_channels_and_norm():
    sizes = {"image_size": (8, 12), "patch_size": 4, "dim": 24, "depth": 2, "num_heads": 2}
    sizes |= {"decoder_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2, "norm_eps": 0.1}
    model = build(ModelConfig(**sizes, channels=2, mean=(0.1, 0.2), std=(0.3, 0.4))).eval()
    images = normalize(torch.randint(255, (2, 2, 8, 12)), model.config.mean, model.config.std)
    with torch.no_grad():
        features = timm_network(model).eval().forward_features(images)
        torch.testing.assert_close(features, model.encode(images), atol=1e-5, rtol=1e-5)


def test_a_fine_tuned_network_is_a_source_of_weights_with_its_own_normalisation(tmp_path):
    model = load_encoder(CHECKPOINT)
    own = dataclasses.replace(model.config, mean=(0.1, 0.2, 0.3), norm_eps=1e-3)
    content = {"model": model.state_dict(), "config": dataclasses.asdict(own)}
    save_checkpoint(tmp_path / "own.pt", content)
    words = ["--epochs", 1, "--train_n_shot", 12, "--out", tmp_path / "mine.pt"]
    run(*words, model=str(tmp_path / "own.pt"))
    config = load_encoder(str(tmp_path / "mine.pt")).config
    assert (config.mean, config.norm_eps, config.ip_spec) == (own.mean, 1e-3, ())


def test_one_process_fine_tunes_into_a_file(tmp_path):
    held = runs.lock(tmp_path / ".mine.pt.lock", "the test")
    code = (
        "import sys, finetune as f; from internals import runs; runs.lock.__defaults__ = (0.0,)\n"
    )
    code += "f.run_command(lambda: f.finetune(f.parse_finetune_flags(sys.argv[1:])))"
    words = [CHECKPOINT, *DEMO_DATA, *RECIPE, "--out", tmp_path / "mine.pt"]
    paths = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'scripts'}"}
    done = command(*words, program=(sys.executable, "-c", code), check=False, **paths)
    held.close()
    assert done.returncode == 2 and "mine.pt is in use by process" in done.stderr


def test_of_several_gpus_the_first_is_taken(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    words = [CHECKPOINT, *DEMO_DATA, *"--out finetuned.pt".split()]
    assert IO.parse_finetune_flags(words).gpus == "cuda:0"


def test_each_layer_learns_with_a_share_of_the_next_one_s_rate(finished):
    groups = saved(finished[0])["optimizer"]["param_groups"]
    scales = sorted({group["lr_scale"] for group in groups}, reverse=True)
    assert scales == pytest.approx([0.65**i for i in range(6)])  # head, four blocks, patches
    assert {group["weight_decay"] for group in groups} == {0, 0.05}


def refused(words, capsys, reason, **options):
    """Checks that the command ends in one line, with status 2."""
    with pytest.raises(SystemExit) as ended:
        run(*words, **options)
    lines = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and re.search(reason, lines[-1]), lines
    assert "Traceback" not in "".join(lines)


@pytest.mark.parametrize(
    "words, reason",
    [
        (["--batch_size", 7], "--batch_size 7: .*an even number"),
        (["--batch_size", 122], "--batch_size 122: .*at most 120"),
        (["--out", "missing/mine.pt"], "--out missing/mine.pt: its folder does not exist"),
        (["--gpus", "99"], "--gpus 99: no GPU 99"),
        (["--layer_decay", 2], "--layer_decay: '2' is not a number"),
        (["--train_n_way", 1], "--data_tr: a probe|at least two classes"),
        (["--learning_rate", 1], "unknown .*--learning_rate"),
    ],
)
def test_a_wrong_flag_is_refused_in_one_line(words, reason, tmp_path, capsys):
    refused(
        [*(["--out", tmp_path / "mine.pt"] if "--out" not in words else []), *words], capsys, reason
    )


@pytest.mark.parametrize(
    "model, reason",
    [
        ("missing.pt", "MODEL: missing.pt does not exist"),
        ("untrained:timm:resnet10t", "MODEL: untrained:timm:resnet10t is no MAE"),
        ("pixels", "MODEL: pixels is no MAE"),
    ],
)
def test_a_wrong_model_is_refused_in_one_line(model, reason, tmp_path, capsys):
    refused(["--out", tmp_path / "mine.pt"], capsys, reason, model=model)


def test_a_checkpoint_of_other_flags_or_a_damaged_one_is_refused(finished, tmp_path, capsys):
    out = tmp_path / "mine.pt"
    shutil.copy(finished[0], out)
    refused(["--out", out, "--epochs", 4], capsys, "other flags or images")
    content = saved(out)
    content["command"][1]["data_tr"]["images"] += 1
    save_checkpoint(out, content)
    refused(["--out", out], capsys, "other flags or images")
    out.write_bytes(b"no checkpoint")
    refused(["--out", out], capsys, "is damaged, or no checkpoint|was refused")
    shutil.copy(CHECKPOINT, out)
    refused(["--out", out], capsys, "is no checkpoint of")


@pytest.mark.slow
def test_a_disk_that_is_full_ends_in_one_line_and_the_epoch_before_stays(tmp_path):
    out, small = tmp_path / "mine.pt", "import finetune, resource, sys, IO\n"
    small += "from internals.processes import run_command\n"
    small += "save = finetune.save_checkpoint\n"
    small += "def limited(path, content):\n"
    small += "    if len(content['history']) == 2:\n"
    small += "        resource.setrlimit(resource.RLIMIT_FSIZE, (10000, 10000))\n"
    small += "    save(path, content)\n"
    small += "finetune.save_checkpoint = limited\n"
    small += "run_command(lambda: finetune.finetune(IO.parse_finetune_flags(sys.argv[1:])))"
    words = [CHECKPOINT, *DEMO_DATA, *RECIPE, "--out", out]
    paths = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'scripts'}"}
    done = command(*words, program=(sys.executable, "-c", small), check=False, **paths)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: a file could not be written (")
    assert len(saved(out)["history"]) == 1


@pytest.mark.slow
def test_downstream_makes_each_row_once(tiny_run, tmp_path):
    """With one run, cut down; started again, it computes only what is missing."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models/x-mine-0").symlink_to(tiny_run)
    settings = {"OUT": tmp_path / "out", "RUNS": tmp_path, "ARMS": "mine", "SHOTS": "4"}
    settings |= {"FINETUNE": "--epochs 1 --batch_size 8", "PROBE": "--epochs 1 --lrs 1"}
    environment = {**os.environ, "PATH": PATH, "VIRTUAL_ENV": sys.prefix, "OMP_NUM_THREADS": "1"}
    environment |= {name: str(value) for name, value in settings.items()}
    flags = [*DEMO_DATA, *"--gpus cpu --num_workers 0 --train_n_way 2".split()]

    def downstream():
        words = ["bash", "scripts/downstream.sh", *flags]
        done = subprocess.run(words, cwd=ROOT, env=environment, text=True, capture_output=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.splitlines()

    table = downstream()[-4:]
    results = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("out/*.json")}
    parts = [f"{arm}-{part}" for arm in ("mine", "untrained") for part in ("finetuned", "probe4")]
    assert sorted(results) == parts and results["mine-probe4"]["n_train"] == 8
    assert results["untrained-finetuned"]["model"].startswith("untrained:")
    for row, arm in zip(table[2:], ("mine", "untrained"), strict=True):
        tuned, probe = results[f"{arm}-finetuned"], results[f"{arm}-probe4"]
        assert row.split()[1:6:2] == [arm, f"{tuned['accuracy']:.3f}", f"{probe['top1']:.3f}"]
    (tmp_path / "out/mine-probe4.json").unlink()
    again = downstream()
    assert again[-4:] == table
    assert [line.split()[0] for line in again if ".py" in line] == ["mine-probe4:"]
