"""Every command that the README and the pages in docs/ name is run, cut down, in a copy of the
repository."""

import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT
from PIL import Image

import Data

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SMALL = (
    "--input_size 28 --arch vit_demo --norm_pix_loss 0 --gpus cpu --num_workers 0 --ipe 4 "
    "--ex_per_epoch 12 --mini_bs 8 --epochs 2 --n_ramp 0 --ns 3 --z_per_ex_loss 2 "
    "--ex_for_mse_loss 8 --ex_for_vis_te 2 --ex_for_vis_tr 2 --z_per_ex_vis 2 --val_n_shot 3 "
    "--probe_epochs 1 --train_n_way 4 --train_n_shot 6"
)
SMALL_FINETUNING = "--gpus cpu --num_workers 0 --epochs 1 --batch_size 16"
PROBE = "--gpus cpu --num_workers 0 --input_size 28"
TINY = "--arch vit_demo --input_size 28 --repeats 1 --device cpu"
CUT = {  # how a command begins -> what is said behind it, to cut it down
    "bash scripts/demo.sh": SMALL,
    "bash scripts/figure.sh": SMALL,
    "bash scripts/ablations.sh": SMALL,
    "bash scripts/figure_cifar10.sh": SMALL
    + " --data_tr demo/mnist_train.tar --data_val demo/mnist_val.tar",
    "bash scripts/downstream.sh": SMALL_FINETUNING
    + " --data_tr data/imagenet/train --data_val data/imagenet/val",
    "bash scripts/figure_imagenet.sh": SMALL + " --ip_spec 3 adain",
    "bash scripts/imle_from_scratch.sh": SMALL + " --ip_spec 3 adain",
    "bash scripts/mae_from_scratch.sh": SMALL,
    "python TrainIMLE.py --help": "",
    "python TrainIMLE.py --config": "--gpus cpu",
    "python TrainIMLE.py --data_tr": SMALL + " --finetune 0",
    "python LinearProbe.py .* --fast 1": PROBE + " --val_n_shot 3",
    "python LinearProbe.py": PROBE + " --epochs 1 --lrs 1 --batch_size 16",
    "python scripts/finetune.py": SMALL_FINETUNING,
    "python scripts/complete.py": "",
    "python scripts/look.py": "",
    "python scripts/pack.py": "",
    "python scripts/runs.py": "",
    "python scripts/report.py": "",
    "python scripts/export_encoder.py": "",
    "python scripts/fault_table.py": "",
    "python scripts/how_it_works.py": "--images 8 --codes 4 --steps 1",
    "python scripts/slurm_submit.py": SMALL + " --finetune 0",
    "python scripts/benchmark.py sampling": TINY + " --ns 16 --regret_images 8 --regret_ns 16",
    "python scripts/benchmark.py frontier": TINY + " --ns 16 --regret_images 8 --tries 4",
    "python scripts/benchmark.py train": TINY,
    "python scripts/benchmark.py probe": TINY + " --images 8 --classes 5 --num_workers 1",
    "python scripts/benchmark.py data": "--entries 2000 --reads 1000 --repeats 1 --most 4 "
    "--input_size 32",
    "tar -cvf": "",
}
ELSEWHERE = {  # the beginnings of others -> why they are not run here
    "bash scripts/test.sh": "it runs this test",
    "torchrun": "test_training.py starts it on two nodes",
    "python -m pytest": "it is a test",
    "python scripts/explore.py": "test_explore.py opens its page in a browser",
    "(srun|scancel)": "test_slurm.py does it on a real SLURM",
    "until python TrainIMLE.py": "test_slurm.py has it",
    "(wandb sync|pip install)": "another program's, over a network",
}
WORDS = {  # what stands for a user's own
    "DATA/": "data/imagenet/",
    "data/cifar10/": "data/imagenet/",
    "--train_n_shot SHOT": "--train_n_shot 2",
    "SEED=1 bash scripts/downstream.sh": "bash scripts/downstream.sh",
    "bash scripts/downstream.sh": "RUNS=runs SHOTS=2 bash scripts/downstream.sh",
    "IMAGENET_TRAIN --data_val IMAGENET_VAL": "data/imagenet/train --data_val data/imagenet/val",
    "SOURCE": "demo/imle_mnist.pt",
    "MODEL": "demo/imle_mnist.pt",
    "PICTURE [PICTURE ...]": "picture.png",
    "--gpus_per_node 4": "--dry_run --gpus_per_node 0",
    "FOLDER": "runs",
    "RUN [RUN ...]": "runs",
    "BIRDS/": "data/imagenet/",
    "CARS/": "data/imagenet/",
    "models/RUN/config.json": "runs/models/*-mae-0/config.json",
    "--gpus 0 ": "",
    "--batch_size 16384": "",
}


def commands():
    """The commands in the pages' shell blocks and in their text, each once."""
    found = {}
    for page in PAGES:
        text = page.read_text()
        blocks = re.findall(r"^```bash\n(.*?)^```", text, re.S | re.M)
        lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
        lines = [line for line in lines if not re.match(r"\s|done|#|$", line)]
        text = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
        spans = re.findall(r"`((?:\w+=\S+ )?(?:python|bash|torchrun|srun|tar) [^`]+)`", text)
        for line in [*lines, *spans]:
            found[" ".join(re.sub(r"\s#.*", "", line).split())] = page.name
    return list(found)


def cut_down(command):
    """The command as it is run here; None where it is not."""
    for word, ours in WORDS.items():
        command = command.replace(word, ours)
    for start, flags in CUT.items():
        if re.match(rf"(\w+=\S+ )*{start}", command):
            into = " > " in command  # a file: flags stand before
            return command if into else f"{command} {flags}"
    return None


def test_every_command_of_the_readme_is_tested():
    named = commands()
    assert len(named) > 20
    for command in named:
        known = cut_down(command) or any(re.match(start, command) for start in ELSEWHERE)
        assert known, f"no test runs: {command}"


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M)
        for link in re.findall(r"\]\(([^)]+)\)", text):
            path, _, anchor = link.partition("#")
            if path.startswith("http"):
                continue
            target = page if not path else (page.parent / path).resolve()
            assert target.exists(), f"{page.name}: {link}"
            if anchor:
                heads = re.findall(r"^#+ (.*)", target.read_text(), re.M)
                anchors = [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in heads]
                assert anchor in anchors, f"{page.name}: {link}"


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A copy of the repository's files, with images where the README has them, and two runs."""
    folder = tmp_path_factory.mktemp("clone")
    left_out = ".* __pycache__ golden models probes runs wandb mae_checkpoints data".split()
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*left_out), dirs_exist_ok=True)
    for part in ("train", "val"):
        images = Data.open_images(ROOT / f"demo/mnist_{part}.tar")
        for index in range(0, len(images), 50 if part == "train" else 25):
            label = images.classes[images.targets[index]]
            path = folder / f"data/imagenet/{part}/{label}/{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            images.load(index).save(path)
        shutil.copy(ROOT / f"demo/mnist_{part}.tar", folder / f"data/imagenet/{part}.tar")
    Image.new("RGB", (60, 40), "red").save(folder / "picture.png")
    for name, flag in (("mae-0", "--ignore_z 1"), ("imle-0", "")):
        images = "--data_tr data/imagenet/train --data_val data/imagenet/val --finetune 0"
        flags = f"{images} {SMALL} {flag} --uid {name} --save_folder runs"
        run(folder, f"python TrainIMLE.py {flags}")
    return folder


def run(folder, command):
    """What a command says, run by bash in the folder."""
    environment = {
        **os.environ,
        "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}",
        "VIRTUAL_ENV": sys.prefix,
        "IMAGENET_TRAIN": "data/imagenet/train",
        "IMAGENET_VAL": "data/imagenet/val",
        "SEEDS": "0",
        "ONLY": "imle|mae",
    }
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=environment, text=True, capture_output=True
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in commands() if cut_down(c)])
def test_a_command_of_the_readme_runs(command, clone):
    run(clone, cut_down(command))
