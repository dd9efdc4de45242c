"""The page to play with completions: without a browser, and in one."""

import argparse
import base64
import dataclasses
import io
import itertools
import json
import os
import re
import shlex
import signal
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zlib
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import complete
import explore
import numpy as np
import pytest
import torch
from conftest import PATH, ROOT
from exploring import completions, pieces, views
from exploring.completions import Explorer
from exploring.page import Changes, Library, Page
from exploring.views import DIFFERENT, DRAWN, NEAREST, View
from PIL import Image

import Models
import TrainIMLE
from Utils import InputError

CPU, GOLDEN = torch.device("cpu"), ROOT / "tests/golden"
DEMO, DIGITS = str(ROOT / "demo/imle_mnist.pt"), str(ROOT / "demo/mnist_val.tar")
HOSTILE = "<script>document.title = 'taken'</script>"


@pytest.fixture(scope="module")
def page():
    """The page of the demo's model and digits."""
    explorer = Explorer(DEMO, CPU)
    return Page(Library([DIGITS], explorer.config.image_size), [explorer])


@pytest.fixture
def view(page):
    """A view of a digit."""
    name, mask = page.library.name(3), views.random_mask(49, 0.75, 0)
    return View(page.library.encoded(3), name, mask, codes=6, model=DEMO)


def patches(cell):
    """A picture uint8 (3, 28, 28) as patches (49, 48)."""
    return Models.patchify(cell[None].float(), 4)[0]


def test_codes_complete_what_is_masked_and_leave_what_is_visible(page, view):
    done = page.main.complete(view)
    visible = list(view.visible)
    for cell in (*done.cells, done.plain, done.masked):
        assert torch.equal(patches(cell)[visible], patches(done.image)[visible])
    for a, b in itertools.combinations(done.cells, 2):
        assert (a.int() - b.int()).abs().max() > 8, "two codes give different pixels"
    assert len(done.losses) == 6 and len(set(done.losses)) == 6
    assert done.deviation().max() > 0.02 and not done.deviation()[0, :4].max()  # patch 0 is visible


@pytest.mark.parametrize("visible", [(), (7,), tuple(range(48)), tuple(range(49))])
def test_any_number_of_patches_may_be_visible(page, view, visible, tmp_path):
    parts = page.parts(view.changed(visible=visible, chosen=(0, 1, 2)), lambda done, total: None)
    assert f"{len(visible)} of 49 patches are visible" in parts["note"]
    assert ("far from what" in parts["note"]) == (len(visible) != 7)
    assert parts["grid"].count("data-code") == 6 and parts["plane"].count("<img") == 25
    assert bool(parts["command"]) == (len(visible) < 49)
    assert page.save(view.changed(visible=visible), tmp_path)


@pytest.mark.parametrize("source", [DEMO, str(GOLDEN / "hf_vitmae_tiny")])
@pytest.mark.parametrize("order", [NEAREST, DRAWN])
def test_the_command_of_a_view_draws_the_same_pictures(source, order, tmp_path, monkeypatch):
    explorer = Explorer(source, CPU)
    picture = Image.open(ROOT / "demo/completions.png").crop((0, 22, 90, 100)).convert("RGB")
    picture = complete.fitted_picture(picture, explorer.config.image_size)
    visible = views.block_mask(explorer.config.grid, 3)
    view = View(views.encoded(picture), "mine", visible, seed=5, codes=4, order=order)
    view = view.changed(model=source)
    picture.save(tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    done = explorer.complete(view)
    numbers = done.order(order)
    words = shlex.split(views.command_of(view, numbers))
    assert words[:2] == ["python", "scripts/complete.py"]
    complete.main(words[2:])
    drawn = np.asarray(Image.open("completions.png").convert("RGB")).astype(int)
    side = explorer.config.image_size[0] * (96 // explorer.config.image_size[0])
    cells = [done.image, done.masked, *(done.cells[numbers] if numbers else [done.plain])]
    for column, cell in enumerate(cells):
        left = 4 + column * (side + 4)
        shown = drawn[22 : 22 + side, left : left + side]
        mine = enlarged(cell, side)
        assert np.abs(shown - mine).max() <= 6, f"column {column}"  # bfloat16, in other passes
        if column > 1:
            others = [enlarged(other, side) for other in cells if other is not cell]
            nearest = min(np.abs(shown - other).mean() for other in others)
            assert np.abs(shown - mine).mean() < nearest / 2


def enlarged(cell, side):
    """A picture uint8 (3, H, W), enlarged, as an array."""
    return np.asarray(completions.picture_of(cell).resize((side, side), Image.NEAREST)).astype(int)


def test_the_encoder_runs_once_per_mask_and_codes_once_per_seed(view):
    explorer = Explorer(DEMO, CPU)
    page = Page(Library([DIGITS], (28, 28)), [explorer])
    runs = {"prefix": 0, "suffix": 0}

    def counted(name, function, *arguments, **options):
        runs[name] += 1
        return function(*arguments, **options)

    for name in runs:
        function = partial(counted, name, getattr(explorer.model, name))
        setattr(explorer.model, name, function)
    page.parts(view, lambda done, total: None)
    assert runs == {"prefix": 1, "suffix": 4}, "no code, codes, and two passes of the walk"
    for changed in (view.changed(order=NEAREST), view):
        page.parts(changed, lambda done, total: None)
    assert runs == {"prefix": 1, "suffix": 4}
    page.parts(view.changed(seed=1), lambda done, total: None)
    assert runs["prefix"] == 1
    page.parts(view.changed(visible=(1,)), lambda done, total: None)
    assert runs["prefix"] == 2


def saved_model(path, **options):
    """Saves a fresh model for images of 16 x 24 pixels; returns the model."""
    config = Models.ModelConfig(
        image_size=(16, 24), patch_size=4, dim=16, depth=2, num_heads=2, decoder_dim=16,
        decoder_depth=2, decoder_num_heads=2, norm_pix_loss=False, latent_dim=4,
        mapping_net_layers=2, mapping_net_lrmul=1.0, **options,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Models.build(config)
    torch.save({"model": model.state_dict(), "config": dataclasses.asdict(config)}, path)
    return model


@pytest.mark.parametrize("decoder", ["self", "cross"])
@pytest.mark.parametrize("ip_spec", [((0, "local_adain"),), (("mask", "adain"), (3, "add")), ()])
def test_codes_may_enter_anywhere(ip_spec, decoder, tmp_path):
    model = saved_model(tmp_path / "model.pt", ip_spec=ip_spec, decoder=decoder)
    explorer = Explorer(str(tmp_path / "model.pt"), CPU)
    page = Page(Library([str(ROOT / "demo/completions.png")], (16, 24)), [explorer])
    view = page.first_view().changed(codes=3, chosen=(0, 1, 2) if ip_spec else ())
    for visible in ((), (3,), tuple(range(23)), tuple(range(24))):
        view = view.changed(visible=visible)
        assert len(page.parts(view, lambda done, total: None)["grid"]) > 1000
        done, noise = explorer.complete(view), torch.ones(1, 24)
        noise[0, list(visible)] = 0
        if len(visible) == 24:
            continue
        images, _ = explorer.prefix(view.picture, view.visible)
        codes = model.sample_codes(views.code_seed(0), 3) if ip_spec else None
        cells = Models.completions(
            model.eval(), images, noise, codes, 1 - (len(visible) + 0.5) / 24
        )
        shown = done.cells if ip_spec else done.plain[None]
        assert (cells[0, 2:].int() - shown.int()).abs().max() <= 6  # bfloat16


def test_grey_models_complete_in_grey_and_other_channels_are_refused(tmp_path):
    options = {"ip_spec": ((1, "adain"),), "mean": (0.4,), "std": (0.3,)}
    model = saved_model(tmp_path / "grey.pt", channels=1, **options).eval()
    explorer = Explorer(str(tmp_path / "grey.pt"), CPU)
    page = Page(Library([str(ROOT / "demo/completions.png")], (16, 24)), [explorer])
    view = page.first_view().changed(codes=2)
    page.parts(view, lambda done, total: None)
    done, grey = explorer.complete(view), views.decoded(view.picture).convert("L")
    assert np.array_equal(done.image, np.stack([np.asarray(grey)] * 3))
    images, noise = explorer.prefix(view.picture, view.visible)[0], torch.ones(1, 24)
    noise[0, list(view.visible)] = 0
    codes = model.sample_codes(views.code_seed(0), 2)
    cells = Models.completions(model, images, noise, codes, 1 - (len(view.visible) + 0.5) / 24)
    assert (cells[0, 2:].int() - done.cells.int()).abs().max() <= 6  # bfloat16
    saved_model(tmp_path / "bands.pt", channels=5, mean=(0.5,) * 5, std=(0.2,) * 5)
    with pytest.raises(InputError, match="5 channels"):
        Explorer(str(tmp_path / "bands.pt"), CPU)


def test_the_marked_code_is_the_one_that_IMLE_chooses(view):
    explorer = Explorer(DEMO, CPU)
    images, prefix = explorer.prefix(view.picture, view.visible)
    noise, ratio = complete.mask_of(view.visible, 49)
    chosen = TrainIMLE.choose_codes(
        explorer.model,
        images,
        noise,
        views.code_seed(view.seed),
        codes_per_image=6,
        codes_per_pass=6,
        mask_ratio=ratio,
    )
    done = explorer.complete(view)
    assert done.nearest() == int(chosen[1][0]) == int(np.argmin(done.losses))
    assert done.order(NEAREST)[0] == done.nearest() and done.order(DRAWN) == list(range(6))
    assert sorted(done.order(DIFFERENT)) == list(range(6)) and len(set(done.ends())) == 2
    parts = pieces.grid_html(done, explorer, range(6), ())
    assert re.search(rf"code {done.nearest() + 1}<br>loss [\d.]+<br>★", parts)


def test_a_walk_leads_from_one_completion_to_the_other(page, view):
    done = page.main.complete(view)
    frames = page.walk(view, (1, 4)).int()
    assert (frames[0] - done.cells[1].int()).abs().max() <= 6
    assert (frames[-1] - done.cells[4].int()).abs().max() <= 6
    steps = (frames[1:] - frames[:-1]).abs().float().mean((1, 2, 3))
    assert steps.max() < (frames[-1] - frames[0]).abs().float().mean()
    plane = page.plane(view, (1, 4, 0)).int()
    corners = {0: 1, completions.PLANE - 1: 4, completions.PLANE * (completions.PLANE - 1): 0}
    for place, code in corners.items():
        assert (plane[place] - done.cells[code].int()).abs().max() <= 6
    codes = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    mixed = completions.mix(codes, torch.tensor([[1.0, 0], [0.5, 0.5]]))
    torch.testing.assert_close(mixed[0], codes[0])
    torch.testing.assert_close(mixed[1].norm(), codes.norm(dim=1).mean())


def test_masks_are_those_of_the_command_and_of_their_names(page):
    seed = views.code_seed(4)
    model = page.main.model
    _, noise, _ = complete.prepare(model, torch.zeros(1, 3, 28, 28, dtype=torch.uint8), seed)
    expected = noise[0].argsort(stable=True)[:12].sort().values
    assert views.random_mask(49, 0.75, 4) == tuple(expected.tolist())
    assert views.random_mask(49, 1, 4) == () and len(views.random_mask(49, 0, 4)) == 49
    masked = set(range(49)) - set(views.centre_mask((7, 7)))
    assert masked == {7 * row + column for row in range(1, 6) for column in range(1, 6)}
    blocks = {views.block_mask((7, 7), seed) for seed in range(9)}
    assert len(blocks) > 3 and {len(block) for block in blocks} == {24}


def test_what_is_saved_opens_as_the_same_view(page, view, tmp_path):
    # Codes 0 and 3 differ enough: WebP joins successive frames that hardly differ.
    view = view.changed(order=NEAREST, chosen=(0, 3, 5), seed=3, mask_seed=9, name=HOSTILE)
    paths = {Path(path).name: Path(path) for path in page.save(view, tmp_path)}
    assert {"everything.zip", "view.json", "picture.png", "completions.png", "walk.webp"} < set(
        paths
    )
    assert views.read_settings(paths["view.json"], (28, 28), 49) == view
    assert Image.open(paths["walk.webp"]).n_frames == 2 * completions.FRAMES - 2
    assert f"--seed 3 --visible {view.visible[0]} " in paths["command.txt"].read_text()
    args = argparse.Namespace(open=paths["view.json"], model=None, compare=None, pictures=[DIGITS])
    args.input_size = args.norm_pix_loss = None
    again, opened = explore.make_page(args)
    assert opened == view and again.main.source == DEMO


def png(width, height):
    """A PNG of a few bytes that claims a size."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    file = b"\x89PNG\r\n\x1a\n"
    for chunk in (header, b"IDAT" + zlib.compress(b"")):
        file += struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return file


BROKEN = {
    "empty": b"",
    "text": b"no picture",
    "cut": png(9, 9),
    "large": png(8000, 8000),  # fewer pixels than Pillow warns of
    "bomb": png(2**31 - 1, 2**31 - 1),
    "program": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "bytes": b"\x89PNG\r\n\x1a\n" + b"0" * (views.LARGEST_FILE + 1),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_uploads_are_refused_in_one_line(kind, page, view, tmp_path, monkeypatch):
    path = tmp_path / "upload.png"
    path.write_bytes(BROKEN[kind])
    if kind != "cut":
        monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("decoded"))
    changes = Changes(page)
    reason = "it has .*million pixels" if kind in ("large", "bomb") else r"\w"
    with pytest.raises(InputError, match=rf"^cannot read upload.png: {reason}.*$"):
        changes.upload(view, None, str(path))
    with pytest.raises(InputError, match=r"^cannot open upload.png: \w.*$"):
        changes.reopen(view, None, str(path))
    picture = base64.b64encode(BROKEN[kind]).decode()
    path.write_text(view.changed(picture=picture).to_json())
    with pytest.raises(InputError, match=r"^cannot open upload.png: \w.*$"):
        changes.reopen(view, None, str(path))


@pytest.mark.parametrize(
    "fields",
    [
        {"visible": [49]},
        {"visible": [-1]},
        {"visible": [3, 3]},
        {"visible": "12"},
        {"visible": None},
        {"visible": [{}]},
        {"codes": 10**9},
        {"codes": "6"},
        {"codes": True},
        {"chosen": [9]},
        {"chosen": [0, 1, 2, 3]},
        {"order": "x"},
        {"order": []},
        {"ratio": "a"},
        {"ratio": float("nan")},
        {"seed": 2**70},
        {"name": 3},
        {"picture": "é"},
        {"model": []},
    ],
)
def test_settings_that_no_page_saved_are_refused(fields, view):
    with pytest.raises(InputError):
        views.from_json(json.dumps(json.loads(view.to_json()) | fields), (28, 28), 49)
    for text in ("", "[]", "7", "{}", "[" * 99999):
        with pytest.raises(InputError):
            views.from_json(text, (28, 28), 49)


def test_events_that_no_page_sends_are_refused(page, view):
    changes, event = Changes(page), SimpleNamespace
    for data in (None, [], {}, {"index": -1}, {"index": "1"}, {"index": True}, {"index": 1000}):
        with pytest.raises(InputError):
            changes.pick(view, event(_data=data))
    for visible in (None, 3, [49], ["a"], [[]]):
        data = {"visible": visible}
        with pytest.raises(InputError):
            changes.paint(view, event(_data=data))
    with pytest.raises(InputError):
        changes.choose(view, event(_data={"code": 6}))
    assert changes.paint(view, event(_data={"visible": [5, 2, 5]})).visible == (2, 5)
    chosen = view.changed(chosen=(0, 1, 2))
    assert changes.choose(chosen, event(_data={"code": 5})).chosen == (1, 2, 5)
    assert changes.choose(chosen, event(_data={"code": 1})).chosen == (0, 2)
    assert changes.draw(chosen, None).chosen == () and changes.count(chosen, None, 2).chosen == (
        0,
        1,
    )


def test_names_of_users_are_text(page, tmp_path):
    path = tmp_path / HOSTILE.replace("/", "_")
    Image.new("RGB", (40, 30)).save(path, "png")
    library = Library([str(path)], (28, 28))
    shown = pieces.thumbs_html(library, 0, "")
    assert "<script" not in shown and "&lt;script" in shown
    view = View(library.encoded(0), library.name(0), (1,), model=DEMO)
    assert library.path(view) == str(path) and not library.path(view.changed(picture="x"))
    assert shlex.quote(str(path)) in views.command_of(view, [1], library.path(view))


def test_damaged_pictures_can_not_be_picked(tmp_path):
    for number, content in enumerate((b"", (ROOT / "demo/completions.png").read_bytes())):
        (tmp_path / "class").mkdir(exist_ok=True)
        for copy in range(2):
            (tmp_path / f"class/{number}{copy}.png").write_bytes(content)
    library = Library([str(tmp_path)], (28, 28))
    assert len(library) == 4 and len(library.readable(0)) == 2
    assert pieces.thumbs_html(library, 0, "").count("<button") == 2
    assert Page(library, [Explorer(DEMO, CPU)]).first_view().picture == library.encoded(
        library.readable(0)[0]
    )


def test_normalised_predictions_are_named_and_a_model_without_codes_has_no_walk():
    explorer = Explorer(str(GOLDEN / "hf_vitmae_tiny"), CPU)
    page = Page(Library([str(ROOT / "demo/completions.png")], (32, 32)), [explorer])
    parts = page.parts(page.first_view(), lambda done, total: None)
    assert pieces.NORMALIZED in parts["grid"] and "has no codes" in parts["grid"]
    assert "no codes" in parts["walk"] and not parts["deviation"]


def test_two_models_are_compared_on_the_same_mask_and_codes(view):
    explorers = [Explorer(DEMO, CPU), Explorer(DEMO, CPU, norm_pix_loss=True)]
    page = Page(Library([DIGITS], (28, 28)), explorers)
    parts = page.parts(view.changed(order=NEAREST), lambda done, total: None)
    numbers = [re.findall(r"code (\d+)<br>", parts[name]) for name in ("grid", "compared")]
    assert numbers[0] == numbers[1] and len(numbers[0]) == 6
    a, b = (explorer.complete(view) for explorer in explorers)
    assert torch.equal(a.masked, b.masked) and torch.equal(a.points, b.points)
    assert "--norm_pix_loss 1" in views.command_of(view, [0], "p.png", explorers[1].overrides)


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["nowhere.pt"], "nowhere.pt"),
        ([DEMO, "README.md"], "README.md"),
        ([DEMO, "nowhere.tar"], "nowhere.tar"),
        ([DEMO, DIGITS, "--compare", GOLDEN / "hf_vitmae_tiny"], "--compare"),
        ([DEMO, DIGITS, "--open", "README.md"], "--open"),
        ([DEMO, DIGITS, "--port", "0"], "--port"),
        ([DEMO, DIGITS, "--host", "192.0.2.1"], "--host 192.0.2.1"),  # of no machine (RFC 5737)
        ([DEMO, DIGITS, "--host", "no host"], "--host no host"),
        ([DEMO, DIGITS, "--prot", "1"], "did you mean --port"),
        (["NO GRADIO"], "pip install 'gradio>=6'"),
        (["OLD GRADIO"], "gradio 6, here is 5.9"),
    ],
)
def test_exploring_refuses_bad_input_in_one_line(arguments, named, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    gradio = {"NO GRADIO": None, "OLD GRADIO": SimpleNamespace(__version__="5.9")}
    new = SimpleNamespace(__version__="6.1")
    monkeypatch.setitem(sys.modules, "gradio", gradio.get(arguments[0], new))
    with pytest.raises(SystemExit) as ended:
        explore.main([] if arguments[0] in gradio else [*map(str, arguments)])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and len(said.splitlines()) == 1 and named in said


@pytest.mark.parametrize(
    "flags, named",
    [
        ("--visible 49", "--visible 49: allowed are 0 to 48"),
        ("--visible " + " ".join(map(str, range(49))), "--visible: all 49"),
        ("--visible 1 --masks 2", "--visible"),
        ("--code_numbers -1", "--code_numbers"),
    ],
)
def test_completing_refuses_masks_and_codes_that_are_none(flags, named, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as ended:
        complete.main(["demo/imle_mnist.pt", "demo/completions.png", *flags.split()])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and len(said.splitlines()) == 1 and named in said


# -------------------------------------------------------------------------------------------------
# In a browser.


@pytest.fixture
def served(tmp_path):
    """The address of the page of the demo, and its process; ends it."""
    pytest.importorskip("gradio", reason="no gradio: pip install gradio")
    process = subprocess.Popen(
        [sys.executable, "scripts/explore.py", "--no_browser"],
        cwd=ROOT,
        env={**os.environ, "PATH": PATH, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
    )
    yield process.stdout.readline().split()[0], process
    process.kill()


def wait_for(condition, seconds=20):
    """What condition() returns, once that is true."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "nothing changed"
        time.sleep(0.05)
    return value


@pytest.mark.slow
def test_the_page_in_a_browser(served, browser, tmp_path):
    address, process = served
    assert address.startswith("http://127.0.0.1:")
    browser.get(address)
    find = lambda css: browser.find_elements("css selector", css)  # noqa: E731
    html = lambda css: browser.execute_script(  # noqa: E731
        "return document.querySelector(arguments[0])?.innerHTML ?? ''", css
    )
    wait_for(lambda: len(find("#grid [data-code]")) == 15)

    def change(action, watched="#grid"):
        """Does something, and waits until this part of the page has changed."""
        before = html(watched)
        action()
        wait_for(lambda: html(watched) not in ("", before))
        time.sleep(0.3)

    def cells(css="#grid figure"):
        """The pictures in the page, as arrays (28, 28, 3): image, masked, no code, codes."""
        sources = browser.execute_script(
            "return [...document.querySelectorAll(arguments[0] + ' img')].map(x => x.src)", css
        )
        data = [base64.b64decode(source.split(",")[1]) for source in sources]
        return [np.asarray(Image.open(io.BytesIO(d)).convert("RGB")).astype(int) for d in data]

    def button(text):
        return next(b for b in find("button") if b.text == text)

    # Clicked patches are visible, and no code changes them.
    change(button("hide all").click)
    for patch in (16, 17, 31):
        before = html("#note")
        find(f"[data-patch='{patch}']")[0].click()
        wait_for(lambda before=before: html("#note") != before)
    wait_for(lambda: "3 of 49 patches are visible" in html("#note"))
    image, masked, plain, *codes = cells()
    for row, column in ((2, 2), (2, 3), (4, 3)):
        square = np.s_[4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
        for cell in (masked, plain, *codes):
            assert np.array_equal(cell[square], image[square])
    assert (masked == 128).all(axis=2).sum() >= 46 * 16
    for a, b in itertools.combinations(codes, 2):
        assert np.abs(a - b).max() > 8, "two codes give different pixels"

    # New codes by the keyboard; a walk by the arrows; a third code opens a plane.
    body = find("body")[0]
    change(lambda: body.send_keys("r"))
    assert not np.array_equal(cells()[3], codes[0])
    frame = find(".walk .frame")[0].get_attribute("src")
    body.send_keys("\ue014" * 4)  # arrow right
    assert find(".walk .frame")[0].get_attribute("src") != frame
    assert find(".walk input")[0].get_attribute("value") == "4"
    other = next(f for f in find("#grid [data-code]") if "chosen" not in f.get_attribute("class"))
    change(other.click, "#plane")
    assert len(cells("#plane")) == 25

    # What is saved opens again as it was.
    button("save pictures and settings").click()
    links = wait_for(lambda: [a.get_attribute("href") for a in find("#files a")])
    saved = {link.rpartition("/")[2]: urllib.request.urlopen(link).read() for link in links}
    assert {"everything.zip", "view.json", "plane.png", "walk.webp", "command.txt"} <= set(saved)
    (tmp_path / "view.json").write_bytes(saved["view.json"])
    shown = html("#grid"), html("#plane")
    change(lambda: body.send_keys("r"))
    change(button("show all").click)
    change(lambda: find("#keep input[type=file]")[0].send_keys(str(tmp_path / "view.json")))
    wait_for(lambda: (html("#grid"), html("#plane")) == shown)
    assert len(find("[data-patch].visible")) == 3

    # Hostile files leave a line, and the page as it was.
    for kind in ("text", "cut", "large", "program"):
        path = tmp_path / f"{kind}{HOSTILE.replace('/', '')}.png"
        path.write_bytes(BROKEN[kind])
        find("#upload input[type=file]")[0].send_keys(str(path))
        wait_for(lambda kind=kind: f"cannot read {kind}" in find("#message")[0].text)
        assert len(find("#message")[0].text.splitlines()) == 1 and html("#grid") == shown[0]
    assert "completions" in browser.title
    Image.new("RGB", (90, 60), "red").save(tmp_path / "red.png")
    change(lambda: find("#upload input[type=file]")[0].send_keys(str(tmp_path / "red.png")))
    assert not find("#message")[0].text
    assert (cells()[0] == [255, 0, 0]).all()

    # It reads no other file, asks no other host, and leaves nothing behind.
    for name in ("README.md", "/etc/passwd", "demo/imle_mnist.pt"):
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(f"{address}gradio_api/file={name}")
    assert browser.hosts() - {""} == {"127.0.0.1"} and not browser.get_log("browser")
    width = browser.execute_script("return document.documentElement.scrollWidth")
    browser.set_window_size(500, 900)
    width, room = browser.execute_script(
        "return [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    )
    assert width <= room, "a phone scrolls down only"
    assert [path for path in tmp_path.iterdir() if path.is_dir()]
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
