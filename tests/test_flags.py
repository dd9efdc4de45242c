"""The command line: defaults, what is refused and how, help."""

import argparse
import dataclasses
import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch

import IO
import Models
from internals import runs
from internals.checkpoints import RUN_PARTS, save_checkpoint
from Utils import InputError

ROOT = Path(IO.__file__).parent
DATA = "--data_tr tr --data_val val"
SCRATCH = f"{DATA} --finetune 0"
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")

DEFAULTS = """
    train_n_way=-1 train_n_shot=-1 arch=vit_base latent_dim=32 mapping_net_layers=3
    mapping_net_h_dim=64 mapping_net_lrmul=1 act_type=leakyrelu adain_init=identity finetune=1
    ignore_z=0 epochs=1024 ex_per_epoch=2048 ipe=64 mini_bs=32 accum=1 ns=128 code_bs=32 sp=64
    lr=1e-4 lr_z=1e-4 min_lr=0 clip_grad=0 scheduler=constant n_ramp=0 n_cycles=1 headstart_z=0
    wd=.01 beta1=.9 beta2=.95 mask_ratio=.75 fix_mask_noise=0 norm_pix_loss=1 use_augs=1
    shuffle_data=1 fast_linear_probe=1 val_n_way=32 val_n_shot=50 probe_lr=1e-3 probe_epochs=100
    probe_bs=16 probe_bs_val=256 probe_ignore_z=1 probe_augs_per_image=1 global_pool=1
    ex_for_mse_loss=2048 z_per_ex_loss=128 eval_bs=32 ex_for_vis_tr=8 ex_for_vis_te=8
    z_per_ex_vis=8 steps_per_eval=64 get_mae_baseline=1 save_iter=-1 save_minutes=10
    sample_dtype=auto processes=1 wandb=disabled save_folder=. seed=0 sampler=surrogate tries=25
    rs_epsilon=0 mae_loss_weight=1 decoder=self predict_ratio=1
    image_decoder=pillow skip_bad_images=0 loader_timeout=120 force_resume=0 channels=3
"""  # of DESIGN.md, section 3; further ones stand in the test
TWO_RUNS = """
    TrainIMLE.py --gpus 0 1 --suffix SUFFIX --data_tr IMAGENET_TRAIN --data_val IMAGENET_VAL
    --fast_linear_probe 1 --ex_for_mse_loss 2048 --ip_spec 11 adain --ex_per_epoch 2048 --code_bs 32
    --sp 64 --ns 128 --mini_bs 64 --ipe 32 --lr_z 1e-4 --lr 1e-4 --use_augs 1 --shuffle_data 1
    --scheduler linear_ramp_cosine_decay --n_ramp 8 --epochs 512 --save_iter 32 --train_n_way 32
    --train_n_shot 64 --steps_per_eval 256 --wandb offline --finetune 0 --ignore_z IGNORE_Z
    --no-fp16 --num_workers 8
"""  # the README names


@pytest.fixture(autouse=True)
def nothing_from_outside(monkeypatch):
    """SLURM has no say."""
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)


def parse(text):
    return IO.parse_flags(shlex.split(text))


def refusal(capsys, parse, text):
    """The one line on stderr with which the command ends, status 2."""
    with pytest.raises(SystemExit) as ended:
        parse(shlex.split(text))
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (2, "")
    (line,) = err.splitlines()
    return line


# -------------------------------------------------------------------------------------------------


@NO_GPU
def test_defaults_are_those_of_the_design():
    flags = vars(parse(DATA))
    for name, text in (pair.split("=") for pair in DEFAULTS.split()):
        assert flags[name] == type(flags[name])(text), name
    assert re.fullmatch("[0-9a-f]{8}", flags.pop("uid"))
    assert 1 <= flags["num_workers"] <= 8
    others = {
        "data_tr": "tr",
        "data_val": "val",
        "ip_spec": ["11", "adain"],
        "mae_weights": None,
        "input_size": [224, 224],
        "fp16": True,
        "gpus": ["cpu"],
        "suffix": "",
        "notes": "",
        "resume": None,
        "staged": None,
        "probe_data": None,
        **dict.fromkeys(("mean", "std", "show_bands")),
    }
    assert {name: flags[name] for name in others} == others
    named = {pair.split("=")[0] for pair in DEFAULTS.split()} | set(others) | {"num_workers"}
    assert named == set(flags)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("--arch vit_large", {"ip_spec": ["23", "adain"]}),
        ("--arch vit_huge", {"ip_spec": ["31", "adain"]}),
        ("--arch vit_base_vis", {"norm_pix_loss": 0}),
        ("--arch vit_base_vis --norm_pix_loss 1", {"norm_pix_loss": 1}),
        ("--adain_init identity", {"mapping_net_lrmul": 1.0}),
        ("--adain_init identity --mapping_net_lrmul .1", {"mapping_net_lrmul": 0.1}),
        ("--lr 1e-3", {"lr_z": 1e-3}),
        ("--lr 1e-3 --lr_z 0", {"lr_z": 0.0}),
        ("--ip_spec 0 add mask adain 19 local_adain", {"ip_spec": "0 add mask adain 19".split()}),
        ("--ignore_z 1 --ip_spec 3 add", {"ip_spec": []}),
        ("--input_size 64", {"input_size": [64, 64]}),
        ("--input_size 64 32", {"input_size": [64, 32]}),
        ("--gpus cpu --processes 3", {"gpus": ["cpu"] * 3}),
        ("--no-fp16", {"fp16": False}),
        ("--uid here.1", {"uid": "here.1"}),
        ("--ns 8 --sp 8", {"sp": 8}),
        ("--decoder cross", {"predict_ratio": 0.25}),
        ("--decoder cross --predict_ratio 1", {"predict_ratio": 1.0}),
        ("--ns 64", {"sampler": "surrogate", "tries": 12}),
        ("--ns 63 --sp 63", {"sampler": "exhaustive", "tries": -1}),
        ("--sampler exhaustive", {"sampler": "exhaustive", "tries": -1}),
        ("--ip_spec 3 adain 4 add", {"sampler": "exhaustive", "tries": -1}),
        ("--ignore_z 1", {"sampler": "exhaustive", "tries": -1}),
        ("--sampler auto --ignore_z 1", {"sampler": "exhaustive", "tries": -1}),
        ("--sampler surrogate", {"tries": 25}),
        ("--sampler surrogate --ns 4 --sp 4", {"tries": 1}),
        ("--sampler surrogate --tries 40", {"tries": 40}),
        ("--ipe 64 --mini_bs 32 --ex_per_epoch 2048", {"ipe": 64}),
    ],
)
def test_flags_that_depend_on_others_are_resolved(text, expected, capsys):
    flags = vars(parse(f"{SCRATCH} --gpus cpu {text}"))
    if "ip_spec" in expected:
        flags["ip_spec"] = flags["ip_spec"][: len(expected["ip_spec"])]
    assert {name: flags[name] for name in expected} == expected
    assert capsys.readouterr() == ("", "")


def test_sp_may_be_above_ns_as_validation_tries_more_codes(capsys):
    assert parse(f"{SCRATCH} --gpus cpu --ns 5 --sp 7").sp == 7
    assert capsys.readouterr() == ("", "")


def test_the_slurm_job_is_the_uid_where_none_is_given(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    assert parse(f"{SCRATCH} --gpus cpu").uid == "4711"
    assert parse(f"{SCRATCH} --gpus cpu --uid mine").uid == "mine"


@pytest.mark.parametrize(("name", "ignore_z"), [("IMLE", 0), ("MAE", 1)])
def test_the_paper_s_two_runs_are_what_they_were(tmp_path, name, ignore_z):
    words = TWO_RUNS.replace("SUFFIX", f"{name}_FROM_SCRATCH")
    program, *words = words.replace("IGNORE_Z", str(ignore_z)).split()
    flags = IO.parse_flags([*words, "--gpus", "cpu", "--uid", "x"])
    assert (flags.ignore_z, flags.n_ramp, flags.fp16) == (ignore_z, 8, False)
    (tmp_path / "python").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')  # prints its arguments
    (tmp_path / "python").chmod(0o755)
    done = subprocess.run(
        ["bash", ROOT / f"scripts/{name.lower()}_from_scratch.sh", "--gpus", "cpu", "--uid", "x"],
        env={
            **os.environ,
            "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
            "IMAGENET_TRAIN": "IMAGENET_TRAIN",
            "IMAGENET_VAL": "IMAGENET_VAL",
        },
        capture_output=True,
        text=True,
        check=True,
    )
    script_program, *script_words = done.stdout.splitlines()
    assert script_program == program
    resolved = vars(IO.parse_flags(script_words))
    recorded = json.loads((ROOT / "tests/golden/paper_runs.json").read_text())[name]
    assert recorded.pop("code_free_share") == 0  # no flag of this version
    added = {"mae_loss_weight": 0.0, "channels": 3}  # since version 0.1.0
    added |= dict.fromkeys(("mean", "std", "probe_data", "show_bands"))
    assert resolved == {**recorded, **added, "num_workers": 8}
    names = "mae_loss_weight sampler tries adain_init latent_dim mapping_net_layers"
    names = {*names.split(), "mapping_net_h_dim", "mapping_net_lrmul"}
    assert {k for k, v in resolved.items() if v != getattr(flags, k)} <= names


# -------------------------------------------------------------------------------------------------

REFUSED = [  # flags, and what the line says
    ("--ip_spec 11", "--ip_spec 11: .* pairs"),
    ("--ip_spec 11 adain 3", "--ip_spec 11 adain 3: .* 3 words"),
    ("--ip_spec 11 adian", "--ip_spec .*unknown method adian.*adain, local_adain, add"),
    ("--ip_spec 20 adain", "--ip_spec .*no place 20; .* 0 to 19 and mask"),
    ("--ip_spec -1 adain", "--ip_spec"),
    ("--ip_spec 1.5 adain", "--ip_spec .*no place 1.5"),
    ("--arch vit_demo --input_size 32 --ip_spec 6 adain", "--ip_spec .*0 to 5 and mask"),
    ("--ip_spec 11 adain 11 add", "--ip_spec .* once"),
    ("--ip_spec 11 adain 011 add", "--ip_spec .* once"),
    ("--ipe 63", "--ipe 63: .*at least 64"),
    ("--ex_per_epoch 100 --mini_bs 33 --ipe 3", "--ipe 3: .*at least 4"),
    ("--n_ramp 3", "--n_ramp 3: .*constant"),
    ("--headstart_z 4 --ignore_z 1", "--headstart_z 4: with --ignore_z 1"),
    ("--min_lr 1e-3 --lr 1e-4", "--min_lr"),
    ("--min_lr 1e-5 --lr_z 1e-6", "--min_lr"),
    ("--input_size 225", "--input_size 225 225: .*16"),
    ("--input_size 224 30", "--input_size 224 30: .*16"),
    ("--input_size 224 224 224", "--input_size 224 224 224: "),
    ("--arch vit_huge --input_size 32", "--input_size 32 32: .*14"),
    ("--mask_ratio 0", "--mask_ratio"),
    ("--mask_ratio 1", "--mask_ratio"),
    ("--input_size 16", "--mask_ratio"),
    ("--mae_weights x", "--mae_weights x: --finetune 0"),
    ("--probe_augs_per_image 2 --use_augs 0", "--probe_augs_per_image 2: .*--use_augs 1"),
    ("--uid a/b", "--uid a/b: "),
    ("--uid " + "x" * 65, "--uid"),
    ("--epoch 3", "unknown argument --epoch; did you mean --epochs"),
    ("--learning_rte=3", "unknown argument --learning_rte"),
    ("--lrz 1e-4", "unknown argument --lrz; did you mean --lr_z"),
    ("stray", "unknown argument stray"),
    ("--arch vit_giant", "--arch: .*vit_giant.*vit_base.*vit_demo"),
    ("--scheduler cosine", "--scheduler: .*linear_ramp_cosine_decay"),
    ("--wandb on", "--wandb: .*offline"),
    ("--act_type tanh", "--act_type: .*leakyrelu"),
    ("--finetune 2", "--finetune: .*2"),
    ("--use_augs yes", "--use_augs: .*yes"),
    ("--epochs -1", "--epochs: '-1' is not a whole number of at least 0"),
    ("--ns 0", "--ns: '0' is not a whole number of at least 1"),
    ("--ns 1.5", "--ns: '1.5' is not a whole number of at least 1"),
    ("--mini_bs many", "--mini_bs: 'many' is not a whole number of at least 1"),
    ("--save_iter 0", "--save_iter: '0' is not a whole number of at least 1, or -1"),
    ("--train_n_way -2", "--train_n_way: '-2' .* or -1"),
    ("--num_workers -1", "--num_workers: "),
    ("--seed -1", "--seed: '-1'"),
    ("--lr -1", "--lr: '-1' is not a number of at least 0"),
    ("--lr=-1e-4", "--lr: '-1e-4' is not a number"),
    ("--lr -1e-4", "--lr: "),
    ("--lr fast", "--lr: 'fast' is not a number"),
    ("--lr nan", "--lr: 'nan' is not a number"),
    ("--lr inf", "--lr: 'inf' is not a number"),
    ("--lr_z -2", "--lr_z: '-2' .* or -1"),
    ("--wd inf", "--wd: "),
    ("--mask_ratio 1.5", "--mask_ratio: '1.5' is not a number from 0 to 1"),
    ("--beta1 1", "--beta1"),
    ("--beta2 1", "--beta2"),
    ("--mapping_net_lrmul 0", "--mapping_net_lrmul: "),
    ("--latent_dim", "--latent_dim: expected one argument"),
    ("--resume", "--resume: expected one argument"),
    ("--resume nothing.pt", "--resume: nothing.pt does not exist"),
    ("--gpus cpu --processes 0", "--processes: "),
    ("--gpus gpu", "--gpus gpu: .*cpu"),
    ("--gpus cpu --processes 4 --mini_bs 3 --ipe 999", "--mini_bs 3: "),
    ("--tries 8 --ns 63", "--tries 8: needs --sampler surrogate"),
    ("--sampler surrogate --tries 129", "--tries 129: allowed are 1 to --ns 128"),
    ("--sampler surrogate --tries 0", "--tries: '0' is not a whole number of at least 1, or -1"),
    ("--sampler surrogate --ip_spec 3 adain 4 add", "--sampler surrogate: .*add"),
    ("--sampler greedy", "--sampler: .*greedy.*exhaustive.*surrogate"),
    ("--sampler surrogate --ignore_z 1", "--sampler surrogate: with --ignore_z 1"),
    ("--rs_epsilon .1 --ignore_z 1", "--rs_epsilon 0.1: with --ignore_z 1"),
    ("--mae_loss_weight -1", "--mae_loss_weight: '-1' is not a number of at least 0"),
    ("--mae_loss_weight nan", "--mae_loss_weight: 'nan' is not a number of at least 0"),
    ("--channels 0", "--channels: '0' is not a whole number from 1 to 1024"),
    ("--mean .5 .5 .5", "--mean 0.5 0.5 0.5: give --mean and --std, or neither"),
    ("--std .5", "--std 0.5: give --mean and --std, or neither"),
    ("--mean .5 --std .5", "--mean 0.5: allowed are 3 finite numbers, one for each channel"),
    ("--channels 1 --mean .5 --std 0", "--std 0.0: allowed are 1 finite numbers above 0"),
    ("--show_bands 1 2", "--show_bands 1 2: allowed are three numbers, or one, from 0 to 2"),
    ("--channels 5 --show_bands 4 3 5", "--show_bands 4 3 5: allowed are three .*from 0 to 4"),
    ("--probe_data digits", "--probe_data digits: expected NAME=TRAIN,VAL"),
    ("--probe_data a=x", "--probe_data a=x: expected NAME=TRAIN,VAL"),
    ("--probe_data a=x,y,z", "--probe_data a=x,y,z: expected NAME=TRAIN,VAL"),
    ("--probe_data a/b=x,y", "--probe_data a/b=x,y: expected .* names have letters"),
    ("--probe_data a=x,y a=x,z", "--probe_data a=x,z: the name a twice"),
    ("--rs_epsilon -1", "--rs_epsilon: '-1' is not a number of at least 0"),
    ("--decoder crossed", "--decoder: .*crossed.*self.*cross"),
    ("--predict_ratio .5", "--predict_ratio 0.5: .*--decoder cross"),
    ("--decoder cross --predict_ratio .001", "--predict_ratio 0.001: .*at least one"),
    ("--decoder cross --finetune 1", "--finetune 1: the published weights have no --decoder cross"),
]


@pytest.mark.parametrize(("text", "message"), REFUSED)
def test_a_mistake_ends_in_one_line_that_names_the_flag(capsys, text, message):
    line = refusal(capsys, IO.parse_flags, f"{SCRATCH} {text}")
    assert line.startswith("TrainIMLE.py: error: ")
    assert re.search(message, line), line


@NO_GPU
@pytest.mark.parametrize("text", ["--gpus 0", "--gpus 0 1", "--gpus cuda:3"])
def test_a_gpu_that_is_not_there_is_refused(capsys, text):
    line = refusal(capsys, IO.parse_flags, f"{SCRATCH} {text}")
    assert f"{text}: no GPU" in line and "cpu" in line


@pytest.mark.parametrize("arch", ["vit_tiny", "vit_small", "vit_demo --input_size 32"])
def test_finetuning_without_published_weights_says_what_to_do(capsys, arch):
    line = refusal(capsys, IO.parse_flags, f"{DATA} --gpus cpu --arch {arch}")
    assert "--finetune 1: no weights are published" in line
    assert "--mae_weights" in line and "--finetune 0" in line


@pytest.mark.parametrize(
    ("program", "text"), [(IO.parse_flags, ""), (IO.parse_probe_flags, "--model x")]
)
def test_the_data_are_required(capsys, program, text):
    assert "required: --data_tr" in refusal(capsys, program, f"{text} --data_val val")
    assert "required: --data_val" in refusal(capsys, program, f"{text} --data_tr tr")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (DATA, "required: --model"),
        (f"{DATA} --model x --probe_lrr 1", "--probe_lrr; did you mean --probe_lr"),
        (f"{DATA} --model x --val_n_way 1", "--val_n_way: '1' .* at least 2"),
        (f"{DATA} --model x --gpus gpu", "--gpus gpu: no GPU"),
        (f"{DATA} --model x --use_augs 0 --probe_augs_per_image 2", "--probe_augs_per_image 2: "),
    ],
)
def test_the_probe_s_mistakes_end_in_one_line_too(capsys, text, message):
    line = refusal(capsys, IO.parse_probe_flags, text)
    assert line.startswith("LinearProbe.py: error: ")
    assert re.search(message, line), line


# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["", "--processes 2", "--ignore_z 1 --arch vit_large", "--ip_spec 3 add --uid x --sp 3"]
)
def test_resuming_takes_a_run_s_flags_where_none_are_given(tmp_path, text):
    first = vars(parse(f"{SCRATCH} --gpus cpu {text}"))
    path = tmp_path / "step.pt"
    torch.save({**dict.fromkeys(RUN_PARTS, {}), "args": first}, path)
    assert vars(parse(f"--resume {path}")) == {**first, "resume": str(path)}
    assert vars(parse(f"--epochs 9 --resume={path}"))["epochs"] == 9


def test_resuming_from_what_is_no_run_s_checkpoint_ends_in_one_line(tmp_path, capsys):
    whole = dict.fromkeys(RUN_PARTS, {})
    for content in {"model": {}, "foo": 1}, {**whole, "args": argparse.Namespace(lr=1.0)}:
        torch.save(content, tmp_path / "x.pt")
        for given in ("", SCRATCH):
            text = f"{given} --resume {tmp_path / 'x.pt'}"
            message = refusal(capsys, IO.parse_flags, text)
            assert "--resume" in message
            assert ("lacks args, config, metrics_size" in message) == ("foo" in content)
            assert ("it has foo" in message) == ("foo" in content)


def config_file(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_a_config_gives_defaults_that_the_command_line_overrides(tmp_path):
    by_hand = {"lr": 1e-3, "ip_spec": ["3", "adain"], "input_size": 64, "fp16": False, "ns": 16}
    by_hand |= {"data_tr": "tr", "finetune": False, "notes": "", "mae_weights": None, "sp": 8}
    path = config_file(tmp_path, by_hand)
    text = f"--config {path} --data_val val --gpus cpu --ns 8 --uid x"
    expected = f"{SCRATCH} --gpus cpu --lr 1e-3 --ip_spec 3 adain --input_size 64 --no-fp16 --ns 8"
    assert parse(text) == parse(f"{expected} --sp 8 --uid x")
    assert parse(f"{text} --fp16 --finetune 1 --input_size 32 --data_tr b").fp16


def test_a_run_s_config_gives_its_flags_but_not_its_identity_or_devices(tmp_path):
    text = f"{SCRATCH} --ignore_z 1 --lr 1e-3 --save_folder {tmp_path} --suffix s"
    first = parse(f"{text} --gpus cpu --processes 2 --uid first --force_resume 1 --staged /x")
    path = config_file(tmp_path, {"flags": vars(first), "versions": {}, "command": ""})
    again = parse(f"--config {path} --gpus cpu")
    differ = {k for k, v in vars(first).items() if v != getattr(again, k)}
    assert differ == {"uid", "gpus", "processes", "force_resume", "staged"}
    assert again.gpus == ["cpu"] and again.force_resume == 0 and again.staged is None


def test_a_run_s_config_serves_its_baseline_by_the_flags_that_the_errors_name(tmp_path, capsys):
    first = parse(f"{SCRATCH} --gpus cpu --ns 128")
    assert first.sampler == "surrogate" and first.tries == 25
    text = f"--config {config_file(tmp_path, {'flags': vars(first)})} --gpus cpu --ignore_z 1"
    for advice in ("--sampler auto", "--tries -1"):
        assert refusal(capsys, IO.parse_flags, text).endswith(f"; use {advice}")
        text += f" {advice}"
    assert parse(text).ip_spec == []


def test_resuming_gives_all_flags_of_the_run_but_not_those_of_its_start(tmp_path):
    args = vars(parse(f"{SCRATCH} --gpus cpu --lr 1e-3 --uid x --staged /x --force_resume 1"))
    content = dict.fromkeys(RUN_PARTS, {}) | {"args": args | {"gates": 3}}
    save_checkpoint(path := tmp_path / "step_1.pt", content)
    again = vars(parse(f"--resume {path}"))
    expected = args | {"resume": str(path), "staged": None, "force_resume": 0}
    assert again == expected, "flags that this version lacks are left to the run to refuse"


def test_under_a_launcher_its_processes_count_and_not_the_devices(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert parse(f"{SCRATCH} --gpus cpu --processes 16 --mini_bs 8 --ex_per_epoch 64").mini_bs == 8


def test_a_config_of_version_0_1_0_does_what_its_run_did(tmp_path, capsys):
    flags = {"data_tr": "tr", "data_val": "val", "finetune": 0, "code_free_share": 0.0}
    path = config_file(tmp_path, {"flags": flags})
    assert parse(f"--config {path} --gpus cpu").mae_loss_weight == 0
    path = config_file(tmp_path, {"flags": flags | {"code_free_share": 0.5}})
    line = refusal(capsys, IO.parse_flags, f"--config {path} --gpus cpu")
    assert f"--config {path}: --code_free_share 0.5" in line


def test_a_config_stands_for_flags_also_where_a_run_goes_on(tmp_path):
    """The run's own flags give way to those of --config, as to those of the command line."""
    folder = tmp_path / "models/a-x"
    folder.mkdir(parents=True)
    flags = vars(parse(f"{SCRATCH} --gpus cpu --uid x --lr 1e-3"))
    (folder / "config.json").write_text(json.dumps({"flags": flags}))
    path = config_file(tmp_path, {"save_folder": str(tmp_path), "wd": 0.5})
    again = parse(f"--config {path} --data_val val --uid x --gpus cpu")
    assert (again.lr, again.wd) == (1e-3, 0.5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"lrr": 1}, "unknown argument --lrr; did you mean --lr"),
        ({"lrr": None}, "unknown argument --lrr; did you mean --lr"),
        ({"flags": {"lrr": 1}}, "unknown argument --lrr; did you mean --lr"),
        ({"lr": "fast"}, "--lr: 'fast' is not a number of at least 0"),
        ({"lr": [1, 2]}, "--lr: expected one value, not a list"),
        ({"lr": {"mae": 1}}, "--lr: expected a number, a text, or a list"),
        ({"ns": 1.5}, "--ns: '1.5' is not a whole number"),
        ({"arch": "vit_giant"}, "--arch: .*vit_giant.*vit_base"),
        ({"fp16": "no"}, "--fp16: expected true or false"),
        ({"uid": "x"}, "--uid: allowed on the command line only"),
        ({"gpus": ["0"]}, "--gpus: allowed on the command line only"),
        ({"config": "y"}, "--config: allowed on the command line only"),
        ("[1]", "expected names of flags with their values"),
        ("{", "it is no JSON: Expecting"),
        (None, "it can't be read: No such file"),
    ],
)
def test_a_mistake_in_a_config_names_the_file_and_the_flag(tmp_path, capsys, content, message):
    path = config_file(tmp_path, content) if content else tmp_path / "nothing.json"
    line = refusal(capsys, IO.parse_flags, f"{SCRATCH} --config {path}")
    assert re.search(f"error: --config {re.escape(str(path))}: {message}", line), line


PARSERS = IO.training_parser, IO.probe_parser, IO.finetune_parser


def declared(parser):
    flags = [action for action in parser._actions if action.option_strings]
    return [action for action in flags if action.dest != "help"]


def test_every_flag_is_read_somewhere():
    paths = [*ROOT.glob("*.py"), *ROOT.glob("internals/*.py"), ROOT / "scripts/finetune.py"]
    sources = "\n".join(path.read_text() for path in paths)
    in_models = {field.name for field in dataclasses.fields(Models.ModelConfig)}
    for parser in (make() for make in PARSERS):
        for name in (action.dest for action in declared(parser)):
            read = rf"\b(flags|args|new)(\.{name}\b|\[\"{name}\"\])(?! = )"
            assert name in in_models or re.search(read, sources), f"nothing reads --{name}"


@pytest.mark.parametrize(
    ("program", "parser"),
    [
        (IO.parse_flags, IO.training_parser),
        (IO.parse_probe_flags, IO.probe_parser),
        (IO.parse_finetune_flags, IO.finetune_parser),
    ],
)
def test_help_lists_every_flag_with_its_default(capsys, program, parser):
    with pytest.raises(SystemExit) as ended:
        program(["--help"])
    assert ended.value.code == 0
    _, *entries = re.split(r"\n  (?=--)", capsys.readouterr().out)
    entries = {re.match(r"--[\w-]+", entry)[0]: " ".join(entry.split()) for entry in entries}
    for action in declared(parser()):
        entry = entries[action.option_strings[0]]
        if action.default not in (None, "", argparse.SUPPRESS):
            stated = f"(default: {action.default})"
            assert stated in entry or re.search(r"default: \w+", action.help), entry
        assert len(entry.split("default")) <= 2, entry
        assert action.help and not action.help.startswith("%")


def test_each_help_text_is_whole_sentences():
    for parser in (make() for make in PARSERS):
        for action in declared(parser):
            text = action.help
            assert re.match("[A-Z01]", text) and text.endswith((".", ")")), text
            assert len(text.split()) > 3, text
            assert not re.match("(Its?|Of|In|The same|Likewise|With)\\b", text), text
            assert "likewise" not in text and "AdamW's." not in text, text


# -------------------------------------------------------------------------------------------------


def test_a_flag_says_itself_whether_it_may_change_when_a_run_goes_on():
    parser = IO.training_parser()
    changeable = IO.changeable_flags(parser)
    assert {"gpus", "sp", "val_n_way", "data_val", "uid"} <= changeable
    assert not changeable & {"lr", "ns", "seed", "epochs", "data_tr", "use_augs", "finetune"}
    parser.group("a group of measurements", changeable=True)("--bins", default=1)
    parser.group("another group")("--width", default=1)
    assert IO.changeable_flags(parser) == changeable | {"bins"}


def test_the_probe_goes_on_with_another_value_of_flags_that_do_not_change_its_result():
    changeable = IO.changeable_flags(IO.probe_parser())
    assert {"gpus", "save_minutes", "keep_gb", "num_workers", "probe_lr"} <= changeable
    assert not changeable & {"data_val", "lrs", "global_pool", "sample_dtype", "skip_bad_images"}


def test_each_field_of_the_model_s_config_is_a_flag_that_can_never_change():
    flags = IO.architecture_flags()
    assert {"arch", "input_size", "ignore_z", "latent_dim", "decoder", "norm_pix_loss"} <= flags
    assert not flags & IO.changeable_flags(IO.training_parser())
    more = dataclasses.make_dataclass(
        "More", [("gates", int, 0)], bases=(Models.ModelConfig,), frozen=True
    )
    assert IO.architecture_flags(more) == flags | {"gates"}


def test_a_run_without_uid_takes_the_id_that_its_launcher_gives(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert len(IO.parse_flags([*DATA.split(), "--finetune", "0"]).uid) == 8, "random"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "my job/7")
    assert IO.parse_flags([*DATA.split(), "--finetune", "0"]).uid == "my_job_7"
    monkeypatch.setenv("SLURM_JOB_ID", "123")
    assert IO.parse_flags([*DATA.split(), "--finetune", "0"]).uid == "123"


RULES = {"changeable": {"gpus", "uid"}, "architecture": {"arch"}}
OLD = {"uid": "u", "gpus": 1, "arch": "a", "lr": 1.0, "epochs": 4, "scheduler": "constant"}
DECAY = {"scheduler": "linear_ramp_cosine_decay"}


def test_changes_of_flags_are_allowed__forced_or_refused_by_their_kind(capsys):
    def check(old=OLD, force=False, **changes):
        return runs.check_changes({**old, **changes, "force_resume": force}, old, **RULES)

    assert not check() and not check(gpus=2) and not check(newer=1) and not check(epochs=5)
    for changes in ({"lr": 2.0}, {"old": {**OLD, **DECAY}, "epochs": 5}):
        with pytest.raises(InputError, match="--(lr|epochs) was .*--force_resume 1"):
            check(**changes)
        assert check(force=True, **changes)
    for force in (False, True):
        with pytest.raises(InputError, match="another model.*--arch was a, is b"):
            check(force=force, arch="b")
    assert capsys.readouterr().out.count("warning: going on with other flags") == 2
