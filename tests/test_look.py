"""The sheet of features that scripts/look.py draws."""

import dataclasses
import math
import shutil
import sys

import complete
import look
import numpy as np
import pytest
import torch
from conftest import ROOT, command
from exploring.completions import deviation_of
from PIL import Image

import Data
from Augmentation import normalize
from internals import plots
from internals.checkpoints import save_checkpoint
from internals.weights import load_model
from Models import ModelConfig, build
from Utils import fastest_dtype

DEMO, NO_CODES = str(ROOT / "demo/imle_mnist.pt"), str(ROOT / "tests/golden/hf_vitmae_tiny")
ALL = ["picture", "features", *[f"head {n}" for n in (1, 2, 3, 4)], "codes"]


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A data set of 40 digits, as a folder; four of each class."""
    folder, images = (
        tmp_path_factory.mktemp("digits"),
        Data.open_images(ROOT / "demo/mnist_val.tar"),
    )
    for index in range(0, len(images), 25):
        path = folder / images.classes[images.target(index)] / f"{index}.png"
        path.parent.mkdir(exist_ok=True)
        images.load(index).save(path)
    return folder


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draws a sheet by look.main(arguments); returns its columns, by header, and its caption."""
    seen = []

    def sheet(columns, caption, *rest):
        seen.append(({column.header: column for column in columns}, caption))
        return original(columns, caption, *rest)

    def draw(*arguments):
        look.main([*map(str, arguments), "--out", str(tmp_path / "sheet.png")])
        return seen[-1]

    original = look.sheet
    monkeypatch.setattr(look, "sheet", sheet)
    return draw


def random_images(n=3):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, 3, 28, 28), dtype=torch.uint8, generator=generator)


def test_the_command_draws_a_row_per_picture_with_all_columns(digits, tmp_path):
    pictures = sorted(digits.glob("*/*.png"))[:2]
    flags = ["--data", digits, "--neighbors", 2, "--codes", 3, "--out", tmp_path / "sheet.png"]
    command(DEMO, *pictures, *flags, program=(sys.executable, "scripts/look.py"))
    width, height = Image.open(tmp_path / "sheet.png").size
    assert width == 4 + (len(ALL) + 2) * (112 + 4)
    caption = height - (22 + 2 * (112 + 18 + 4) + 4)  # headers, and rows with labels, are above
    assert caption > 0 and caption % 18 == 0


@pytest.mark.parametrize(
    "flags, headers",
    [
        ([], ALL + ["neighbour 1", "neighbour 2"]),
        (["--what", "codes"], ["picture", "codes"]),
        (["--what", "neighbors", "pca"], ["picture", "features", "neighbour 1", "neighbour 2"]),
        (["--what", "attention"], ["picture", *ALL[2:6]]),
    ],
)
def test_the_columns_asked_for_are_drawn_and_only_these(flags, headers, digits, drawn, capsys):
    common = ["--images", 3, "--neighbors", 2, "--codes", 2]
    columns, caption = drawn(DEMO, "--data", digits, *common, *flags)
    assert list(columns) == headers and "note" not in capsys.readouterr().out
    assert ("Codes:" in caption) == ("codes" in columns)
    assert all(len(column.cells) == 3 for column in columns.values())


def test_columns_that_a_model_lacks_cost_a_notice(digits, drawn, capsys):
    picture = next(digits.glob("*/*.png"))
    columns, _ = drawn(NO_CODES, picture)
    assert list(columns)[:3] == ["picture", "features", "head 1"] and "codes" not in columns
    said = capsys.readouterr().out
    assert "no column codes" in said and "no column neighbors: needs --data" in said
    foreign = ["--data", digits, "--images", 2, "--neighbors", 1, "--input_size", 32]
    columns, _ = drawn("untrained:timm:vit_tiny_patch16_224", *foreign)
    assert list(columns) == ["picture", "features", "neighbour 1"]
    assert columns["features"].cells.shape == (2, 3, 2, 2)
    columns, _ = drawn("pixels", *foreign)
    assert list(columns) == ["picture", "neighbour 1"]


def test_attention_is_the_softmax_of_queries_and_keys_which_timm_does_not_return():
    model, images = load_model(DEMO).eval(), normalize(random_images())
    with torch.no_grad():
        shares = look.class_attention(model, images)  # (3, 4, 50)
        block, heads = model.blocks[-1], model.config.num_heads
        tokens = model._embed(images, torch.arange(50).expand(3, -1))
        for other in model.blocks[:-1]:
            tokens = other(tokens)
        normed = block.norm1(tokens[:, 0])
        whole = block.attn(normed)[:, 0]  # of the class token, as timm computes it
        queries, keys, values = block.attn.qkv(normed).chunk(3, dim=-1)
    torch.testing.assert_close(shares.sum(-1), torch.ones(3, heads))
    size, outputs = queries.shape[-1] // heads, []
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        for n in range(3):
            scores = [
                float(queries[n, 0, part] @ keys[n, t, part]) / math.sqrt(size) for t in range(50)
            ]
            exps = [math.exp(score - max(scores)) for score in scores]
            expected = torch.tensor([e / sum(exps) for e in exps])
            torch.testing.assert_close(shares[n, head], expected, atol=1e-5, rtol=1e-4)
        outputs.append(torch.einsum("nt,ntc->nc", shares[:, head], values[..., part]))
    with torch.no_grad():
        mine = block.attn.proj(torch.cat(outputs, dim=-1))
    torch.testing.assert_close(mine, whole, atol=1e-4, rtol=1e-4)


def test_equal_tokens_have_equal_colours_and_colours_are_the_principal_components():
    generator = torch.Generator().manual_seed(0)
    scales = torch.tensor([9.0, 5, 3, 0.2, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1])
    tokens = torch.randn(2, 30, 10, generator=generator) * scales
    tokens[1, 7] = tokens[0, 3]
    state = torch.get_rng_state()
    colours = look.pca_colours(tokens)
    assert torch.equal(torch.get_rng_state(), state)
    assert colours.shape == (2, 30, 3) and colours.min() == 0 and colours.max() == 1
    torch.testing.assert_close(colours[1, 7], colours[0, 3])
    assert (colours[1, 6] - colours[0, 3]).abs().max() > 0.05
    points = tokens.flatten(0, 1).double()
    _, _, axes = torch.linalg.svd(points - points.mean(0), full_matrices=False)
    exact = (points - points.mean(0)) @ axes[:3].T
    inside = ((colours > 0) & (colours < 1)).flatten(0, 1)
    assert inside.double().mean() > 0.9
    for k in range(3):
        pair = torch.stack(
            [colours.flatten(0, 1)[inside[:, k], k].double(), exact[inside[:, k], k]]
        )
        assert torch.corrcoef(pair)[0, 1].abs() > 0.999
    assert look.pca_colours(torch.zeros(1, 2, 4)).shape == (1, 2, 3)  # fewer tokens than colours


def test_a_picture_of_the_data_set_is_its_own_nearest_neighbour(digits, drawn):
    path = sorted(digits.glob("7/*.png"))[1]
    flags = ["--data", digits, "--what", "neighbors", "--neighbors", 3]
    columns, _ = drawn(DEMO, path, *flags)
    assert columns["neighbour 1"].labels == ["1.00 7"]
    assert torch.equal(columns["neighbour 1"].cells, columns["picture"].cells)
    similarities = [float(columns[f"neighbour {n}"].labels[0][:4]) for n in (1, 2, 3)]
    assert similarities == sorted(similarities, reverse=True) and similarities[1] < 1
    assert columns["picture"].labels == [path.name]


def test_rows_of_the_data_set_are_spread_over_it_and_have_other_neighbours(digits, drawn):
    flags = ["--data", digits, "--what", "neighbors", "--neighbors", 39]
    columns, _ = drawn(DEMO, *flags, "--images", 10)
    assert columns["picture"].labels == list("0123456789")
    for row, own in enumerate(columns["picture"].cells):
        others = [columns[f"neighbour {n}"].cells[row] for n in range(1, 40)]
        assert not any(torch.equal(own, other) for other in others)


def test_unlabelled_images_are_named_by_their_files(digits, drawn, tmp_path):
    folder = tmp_path / "all"
    folder.mkdir()
    for path in digits.glob("[34]/*.png"):
        shutil.copy(path, folder)
    columns, _ = drawn(DEMO, "--data", folder, "--images", 2, "--what", "neighbors")
    names = {path.name for path in folder.iterdir()}
    assert set(columns["picture"].labels) < names
    assert columns["neighbour 1"].labels[0][5:] in names


def test_the_map_of_codes_is_the_deviation_of_complete_s_grid(digits, monkeypatch, tmp_path):
    pictures, seen = sorted(map(str, digits.glob("3/*.png")))[:2], []

    def grid(cells, *rest):
        seen.append(cells)
        return plots.picture_grid(cells, *rest)

    monkeypatch.setattr(complete, "picture_grid", grid)
    flags = ["--codes", "5", "--seed", "4", "--mask_ratio", "0.6"]
    complete.main([DEMO, *pictures, *flags, "--out", str(tmp_path / "grid.png")])
    images = Data.collate(
        [(complete.fitted(complete.open_picture(p), (28, 28)), 0) for p in pictures]
    )
    model = look.load_encoder(DEMO, dtype=fastest_dtype(torch.device("cpu")))
    maps = look.code_deviations(model, images[0], n_codes=5, mask_ratio=0.6, seed=4)
    for row, map_of_row in zip(seen[0], maps, strict=True):
        assert map_of_row.max() > 0.05
        torch.testing.assert_close(map_of_row, deviation_of(row[2:]), atol=0.02, rtol=0)


def test_a_larger_input_size_gives_maps_of_more_patches(digits, drawn):
    flags = ["--input_size", 56, "--what", "pca", "attention"]
    columns, caption = drawn(DEMO, next(digits.glob("*/*.png")), *flags)
    assert columns["features"].cells.shape == columns["head 1"].cells.shape == (1, 3, 14, 14)
    assert columns["picture"].cells.shape == (1, 3, 56, 56) and "56 x 56" in caption


def test_a_sheet_shows_each_patch_as_a_square_of_one_colour():
    maps = torch.arange(6, dtype=torch.uint8).view(1, 1, 2, 3).expand(-1, 3, -1, -1) * 40
    pictures = torch.zeros(1, 3, 8, 12, dtype=torch.uint8)
    columns = [look.Column("picture", pictures, ["name"]), look.Column("map", maps)]
    sheet = look.sheet(columns, "", (2, 3), 21)  # 10 pixels per patch
    shown = np.asarray(sheet)[22:42, 38:68, 0].reshape(2, 10, 3, 10)
    assert (shown.max((1, 3)) == maps[0, 0].numpy()).all()
    assert (shown.min((1, 3)) == maps[0, 0].numpy()).all()


def test_pictures_of_five_channels_and_16_bits_are_drawn(drawn, tmp_path):
    sizes = {"image_size": (16, 24), "patch_size": 8, "dim": 8, "depth": 1, "num_heads": 1}
    sizes |= {"decoder_dim": 8, "decoder_depth": 1, "decoder_num_heads": 1, "channels": 5}
    model = build(ModelConfig(**sizes, ip_spec=((0, "adain"),), mean=(0.1,) * 5, std=(0.1,) * 5))
    content = {"model": model.state_dict(), "config": dataclasses.asdict(model.config)}
    save_checkpoint(tmp_path / "model.pt", content)
    random, paths = np.random.default_rng(0), [tmp_path / "data/a" / f"{n}.npy" for n in range(3)]
    paths[0].parent.mkdir(parents=True)
    for path in paths:
        np.save(path, random.integers(0, 9999, (20, 24, 5), np.uint16))
    columns, _ = drawn(tmp_path / "model.pt", paths[1], "--data", tmp_path / "data")
    shown = columns["picture"].cells
    assert shown.shape == (1, 3, 16, 24) and torch.equal(shown, columns["neighbour 1"].cells)
    assert shown.max() > 60, "dark numbers are brightened"
    assert columns["head 1"].cells.shape == (1, 3, 2, 3)
    assert list(columns)[-3:] == ["neighbour 1", "neighbour 2", "neighbour 3"], "there are only 3"


PICTURE = "demo/completions.png"


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["nowhere.pt", PICTURE], "nowhere.pt"),
        ([DEMO, "README.md"], "README.md"),
        ([DEMO, "missing.png"], "missing.png"),
        ([DEMO], "--data"),
        ([DEMO, PICTURE, "--data", "nowhere"], "--data: nowhere"),
        ([DEMO, PICTURE, "--what", "colours"], "--what: invalid choice: 'colours'"),
        ([DEMO, PICTURE, "--what", "neighbors"], "--what neighbors: needs --data"),
        ([NO_CODES, PICTURE, "--what", "codes"], "--what codes: this model has no codes"),
        (["pixels", PICTURE, "--what", "pca"], "--what pca: this encoder has one vector"),
        (["pixels", PICTURE, "--what", "attention"], "--what attention"),
        ([DEMO, PICTURE, "--mask_ratio", "1"], "--mask_ratio"),
        ([DEMO, PICTURE, "--out", "no/where.png"], "--out"),
        ([DEMO, PICTURE, "--input_size", "30"], "multiples of 4"),
    ],
)
def test_bad_input_ends_in_one_line(arguments, named, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as ended:
        look.main(arguments)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and len(said.splitlines()) == 1 and named in said
