"""What the tests share: the repository on the path, and tiny runs of the real command."""

import contextlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch

import Data
import Models

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]


PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
DEMO_DATA = ["--data_tr", "demo/mnist_train.tar", "--data_val", "demo/mnist_val.tar"]
# Every size cut down, every code path kept; fp32 throughout, so that runs can be compared.
TINY = [
    *DEMO_DATA,
    *"--arch vit_demo --input_size 28 --norm_pix_loss 0 --use_augs 0 --gpus cpu".split(),
    *"--no-fp16 --sample_dtype float32 --finetune 0 --adain_init identity --latent_dim 8".split(),
    *"--mapping_net_layers 2 --mapping_net_h_dim 16 --lr 1e-3 --num_workers 0".split(),
    *"--ex_per_epoch 40 --ipe 4 --mini_bs 12 --epochs 2 --ns 5 --sp 3 --code_bs 16".split(),
    *"--ex_for_mse_loss 10 --z_per_ex_loss 4 --eval_bs 4 --ex_for_vis_tr 2".split(),
    *"--ex_for_vis_te 2 --z_per_ex_vis 2 --val_n_way 3 --val_n_shot 4 --probe_epochs 2".split(),
]


def command(
    *arguments, program=(sys.executable, "TrainIMLE.py"), check=True, cwd=ROOT, **environment
):
    """Runs a program of the repository as a user does; the finished process, with its output."""
    done = subprocess.run(
        [*program, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PATH": PATH, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def run_folder(save_folder):
    """The folder of the only run under a --save_folder."""
    (folder,) = (Path(save_folder) / "models").iterdir()
    return folder


def metrics(folder):
    """The records of metrics.jsonl, without what depends on time."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    timed = ("time/", "sampling/codes_per_sec")
    return [
        {k: v for k, v in json.loads(line).items() if not k.startswith(timed)} for line in lines
    ]


def final_path(folder):
    """A run's newest checkpoint."""
    return sorted(folder.glob("checkpoints/step_*.pt"))[-1]


def final_state(folder):
    """What it holds."""
    return torch.load(final_path(folder), weights_only=True)


def step_options(model, **options):
    """The keywords of TrainIMLE.train_step, for a minibatch of six in one part."""
    groups = Models.parameter_groups(model, 0.1)
    return {
        "optimizer": torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True),
        "scaler": torch.amp.GradScaler("cpu", enabled=False),
        "rates": {"mae": 1e-3, "z": 1e-3},
        "images_per_step": 6,
        **options,
    }


def random_batch(n):
    """A minibatch of n random images of 28 x 28 pixels, for gradient step 7."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, 3, 28, 28), dtype=torch.uint8, generator=generator)
    noise = torch.rand(n, 49, generator=generator)
    seeds, numbers = torch.arange(n), torch.arange(n) % 3
    return Data.Batch(images, noise, seeds, numbers, 7, lambda: [f"{i}.png" for i in range(n)])


def assert_same_run(folder, other, tolerance=0.0):
    """Metrics, weights and, with no tolerance, pictures of two finished runs are the same. Weights
    get 300 times the tolerance: Adam turns rounding errors of gradients near zero into steps."""
    a, b = final_state(folder), final_state(other)
    for name, weights in a["model"].items():
        torch.testing.assert_close(weights, b["model"][name], atol=300 * tolerance, rtol=0)
    for left, right in zip(metrics(folder), metrics(other), strict=True):
        assert left.keys() == right.keys()
        for key, value in left.items():
            if value != right[key]:
                assert value == pytest.approx(right[key], abs=tolerance, rel=tolerance), key
    if not tolerance:
        pictures = sorted(p.name for p in (folder / "images").iterdir())
        assert pictures == sorted(p.name for p in (other / "images").iterdir())
        for name in pictures:
            assert (folder / "images" / name).read_bytes() == (other / "images" / name).read_bytes()


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """The folder of a finished tiny run, by the real command."""
    save_folder = tmp_path_factory.mktemp("tiny")
    command(*TINY, "--steps_per_eval", 2, "--uid", "tiny", "--save_folder", save_folder)
    return run_folder(save_folder)


@pytest.fixture(scope="session")
def imle_alone_run(tmp_path_factory):
    """As tiny_run, but without the loss without code: a run of version 0.1.0."""
    save_folder = tmp_path_factory.mktemp("alone")
    flags = ["--mae_loss_weight", 0, "--steps_per_eval", 2, "--uid", "tiny"]
    command(*TINY, *flags, "--save_folder", save_folder)
    return run_folder(save_folder)


@contextlib.contextmanager
def server(files, answer=None):
    """An HTTP server with files {path: bytes or (bytes, announced size)}, as the Hugging Face Hub
    answers; yields its address and the list of the requests that it got. answer(path, body): the
    status and the JSON that a POST is answered with."""
    requests = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append((self.command, self.path))
            content = files.get(self.path)
            self.send_response(404 if content is None else 200)
            content, size = content if isinstance(content, tuple) else (content or b"", None)
            if not files.get(self.path):
                self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", str(len(content) if size is None else size))
            self.send_header("ETag", f'"{hash(content)}"')
            self.send_header("X-Repo-Commit", "0" * 40)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        do_HEAD = do_GET  # noqa: N815

        def do_POST(self):
            requests.append((self.command, self.path))
            body = self.rfile.read(int(self.headers["Content-Length"]))
            status, content = answer(self.path, body)
            content = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{running.server_port}", requests
    finally:
        running.shutdown()


@pytest.fixture
def browser():
    """Selenium's driver of a headless Chromium; its hosts() are the hosts that pages asked."""
    install = "apt-get install chromium chromium-driver; pip install selenium"
    selenium = pytest.importorskip("selenium.webdriver", reason=f"no selenium: {install}")
    paths = [
        shutil.which("chromium") or shutil.which("google-chrome"),
        shutil.which("chromedriver"),
    ]
    if not all(paths):
        pytest.skip(f"no Chromium with its driver: {install}")
    options = selenium.ChromeOptions()
    for flag in ("headless", "no-sandbox", "disable-gpu", "window-size=1300,2400"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    options.binary_location = paths[0]
    driver = selenium.Chrome(options=options, service=selenium.ChromeService(paths[1]))

    def hosts():
        """Hosts of all requests since the last call; "" for a file and for data."""
        events = [
            json.loads(entry["message"])["message"] for entry in driver.get_log("performance")
        ]
        requests = [e["params"] for e in events if e["method"] == "Network.requestWillBeSent"]
        return {urlsplit(request["request"]["url"]).hostname or "" for request in requests}

    driver.hosts = hosts
    yield driver
    driver.quit()
