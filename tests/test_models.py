"""The network: parity with MAE, injections, the split into prefix and suffix, the loss."""

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import IO
import Models
from internals import checkpoints, weights
from Utils import InputError

GOLDEN = Path(__file__).parent / "golden"
TINY = Models.ModelConfig(
    (32, 32),
    patch_size=8,
    dim=48,
    depth=3,
    num_heads=4,
    decoder_dim=32,
    decoder_depth=2,
    decoder_num_heads=4,
    latent_dim=6,
    mapping_net_layers=2,
    mapping_net_h_dim=8,
)
IDENTITY = {"adain_init": "identity", "mapping_net_lrmul": 1.0}
PLACES = [
    [(place, method)]
    for method in ("adain", "local_adain", "add")
    for place in (0, 2, "mask", 3, 4)
]
CROSS = {"decoder": "cross"}
SEVERAL = [(4, "local_adain"), (1, "adain"), ("mask", "adain"), (2, "add")]


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("depth", 0, "whole numbers from 1 to 65536"),
        ("depth", True, "whole numbers"),
        ("latent_dim", 10**9, "whole numbers"),
        ("num_heads", "4", "whole numbers"),
        ("dim", 50, "multiples of 4 and of the number of heads"),
        ("decoder_dim", 18, "multiples of 4"),
        ("image_size", 32, "a height and a width"),
        ("image_size", (32, 30), "multiples of"),
        ("norm_eps", 0.0, "between 0 and 1"),
        ("norm_pix_loss", 1, "True and False"),
        ("mapping_net_lrmul", float("inf"), "finite numbers above 0"),
        ("mapping_net_lrmul", torch.ones(2), "finite numbers above 0"),
        ("decoder", "crossed", "self, cross"),
        ("act_type", ["relu"], "leakyrelu, relu, gelu"),
        ("adain_init", {}, "original, identity"),
        ("ip_spec", 3, "pairs"),
        ("ip_spec", (("mask", "adian"),), "unknown method adian; allowed are adain,"),
        ("ip_spec", ((99, "adain"),), "no place 99; allowed are 0 to"),
        ("ip_spec", (([], "adain"),), "no place"),
        ("ip_spec", ((1, "adain"), (1, "add")), "once only"),
    ],
)
def test_a_config_that_no_model_can_have_is_refused_by_its_field(field, value, reason):
    with pytest.raises(InputError, match=reason) as caught:
        dataclasses.replace(TINY, **{field: value})
    assert str(caught.value).startswith(f"{field} ") and "\n" not in str(caught.value)
    assert caught.value.field == field


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "mae_tiny_io.safetensors")


@pytest.fixture(scope="module")
def state():
    return torch.load(GOLDEN / "mae_tiny.pth", weights_only=True)["model"]


def tiny_model(state, ip_spec=(), **options):
    torch.manual_seed(0)
    model = Models.build(dataclasses.replace(TINY, ip_spec=tuple(ip_spec), **options))
    weights.load_weights(model, state, TINY.grid)
    return model


def test_without_codes_the_model_is_the_published_mae(golden, state):
    model = IO.load_model(GOLDEN / "mae_tiny.pth", num_heads=4, decoder_num_heads=4)
    torch.testing.assert_close(model.pos_embed, state["pos_embed"])
    fresh = Models.build(TINY)  # its position embeddings, which MAE computes as well
    torch.testing.assert_close(fresh.pos_embed, state["pos_embed"])
    torch.testing.assert_close(fresh.decoder_pos_embed, state["decoder_pos_embed"])
    names = (GOLDEN / "mae_tiny_params.txt").read_text().split()
    for norm_pix_loss, key in ((False, "raw"), (True, "normpix")):
        model.zero_grad()
        pred, mask = model(golden["imgs"], golden["noise"])
        torch.testing.assert_close(pred, golden["pred"], atol=1e-4, rtol=0)
        assert torch.equal(mask, golden["mask"])
        loss = Models.reconstruction_loss(pred, golden["imgs"], mask, norm_pix_loss).mean()
        torch.testing.assert_close(loss, golden[f"{key}.loss"].squeeze(), rtol=1e-5, atol=0)
        loss.backward()
        parameters = dict(model.named_parameters())
        norms = [-1.0 if parameters[n].grad is None else parameters[n].grad.norm() for n in names]
        expected = golden[f"{key}.gradnorms"]
        torch.testing.assert_close(torch.tensor(norms), expected, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("ip_spec", [*PLACES, SEVERAL], ids=str)
def test_prefix_and_suffix_equal_the_whole_network_run_for_every_code(golden, state, ip_spec):
    model = tiny_model(state, ip_spec)
    images, noise = golden["imgs"], golden["noise"]
    codes = model.sample_codes(torch.arange(3), 4)
    plain = [model(images, noise, codes[:, k : k + 1])[0][:, 0] for k in range(4)]
    plain = torch.stack(plain, dim=1)  # (N, K, L, P*P*3)
    assert plain.std(1).mean() > 1e-3, "codes change the predictions"
    together, mask = model(images, noise, codes)
    torch.testing.assert_close(together, plain, atol=1e-5, rtol=1e-5)
    masked = model.suffix(model.prefix(images, noise), codes)
    removed = mask.bool()
    for n in range(3):
        torch.testing.assert_close(masked[n], plain[n][:, removed[n]], atol=1e-5, rtol=1e-5)
    losses = Models.reconstruction_loss(masked, images, mask)
    torch.testing.assert_close(losses, Models.reconstruction_loss(plain, images, mask))


@pytest.mark.parametrize("ip_spec", [[], *PLACES, SEVERAL], ids=str)
@pytest.mark.parametrize("decoder", Models.DECODERS)
@pytest.mark.parametrize("masked_only", [False, True])
def test_a_forward_with_codes_also_gives_the_completion_without_code(
    golden, ip_spec, decoder, masked_only
):
    torch.manual_seed(0)
    model = Models.build(dataclasses.replace(TINY, ip_spec=tuple(ip_spec), decoder=decoder))
    inputs, options = (golden["imgs"], golden["noise"]), {"masked_only": masked_only}
    without = model(*inputs, **options)[0]  # (N, L or M, P*P*3)
    alone = model(*inputs, **options, also_without_code=True)[0]
    assert torch.equal(alone, without), "without codes there is nothing to add"
    for n_codes in (1, 4) if ip_spec else ():
        codes = model.sample_codes(torch.arange(3), n_codes)
        both, mask = model(*inputs, codes, **options, also_without_code=True)
        with_codes, same_mask = model(*inputs, codes, **options)
        assert torch.equal(mask, same_mask)
        torch.testing.assert_close(both[:, :-1], with_codes, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(both[:, -1], without, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("ip_spec", [*PLACES, SEVERAL], ids=str)
def test_the_cross_decoder_splits_and_predicts_a_share_alike(golden, ip_spec):
    torch.manual_seed(0)
    model = Models.build(dataclasses.replace(TINY, ip_spec=tuple(ip_spec), **CROSS))
    images, noise = golden["imgs"], golden["noise"]
    codes = model.sample_codes(torch.arange(3), 4)
    plain = [model(images, noise, codes[:, k : k + 1])[0][:, 0] for k in range(4)]
    plain = torch.stack(plain, dim=1)  # (N, K, L, P*P*3)
    assert plain.std(1).mean() > 1e-3, "codes change the predictions"
    for share, n_predicted in ((1.0, 12), (0.25, 4)):
        prefix = model.prefix(images, noise, predict_ratio=share)
        some = model.suffix(prefix, codes)
        first = noise.argsort(dim=1)[:, 4 : 4 + n_predicted].sort(dim=1).values
        assert torch.equal(prefix.mask.nonzero()[:, 1].view(3, -1), first)
        torch.testing.assert_close(some, Models.pick(plain, first), atol=1e-5, rtol=1e-5)
        expected = (some - Models.pick(Models.patchify(images, 8)[:, None], first)).square()
        losses = Models.reconstruction_loss(some, images, prefix.mask, norm_pix_loss=False)
        torch.testing.assert_close(losses, expected.mean((2, 3)))


def test_in_the_cross_decoder_masked_patches_do_not_see_each_other(golden):
    model = Models.build(dataclasses.replace(TINY, **CROSS))
    prefix = model.prefix(golden["imgs"], golden["noise"])
    alone = prefix._replace(positions=prefix.positions[:, : 1 + prefix.n_visible + 1])
    pred, one = model.suffix(prefix, None), model.suffix(alone, None)
    torch.testing.assert_close(pred[:, :1], one)
    attended = dataclasses.replace(TINY, decoder="self")
    model = Models.build(attended)
    prefix = model.prefix(golden["imgs"], golden["noise"])
    alone = prefix._replace(positions=alone.positions)
    difference = model.suffix(prefix, None)[:, :1] - model.suffix(alone, None)
    assert difference.abs().max() > 1e-4, "MAE's do"


def test_a_model_in_lower_precision_is_a_copy_that_computes_nearly_the_same(golden, state):
    model = tiny_model(state, SEVERAL)
    low = Models.in_precision(model, torch.bfloat16)
    assert Models.in_precision(model, torch.float32) is model
    codes = model.sample_codes(torch.arange(3), 2)
    pred = low(golden["imgs"], golden["noise"], codes)[0]
    assert pred.dtype == torch.bfloat16 and model.pos_embed.dtype == torch.float32
    exact = model(golden["imgs"], golden["noise"], codes)[0]
    assert (pred - exact).norm() < 0.03 * exact.norm()
    features = low.encode(golden["imgs"], codes[:, 0]).float()
    assert (features - model.encode(golden["imgs"], codes[:, 0])).norm() < 0.03 * features.norm()


@pytest.mark.parametrize("ip_spec", [*PLACES, SEVERAL], ids=str)
def test_without_codes_every_injection_is_skipped(golden, state, ip_spec):
    pred, _ = tiny_model(state, ip_spec)(golden["imgs"], golden["noise"])
    torch.testing.assert_close(pred, golden["pred"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("method", Models.INJECTIONS)
@pytest.mark.parametrize("place", [0, 2, "mask", 3, 4])
def test_identity_injections_change_nothing_at_first_and_then_learn(golden, state, place, method):
    model = tiny_model(state, [(place, method)], **IDENTITY)
    codes = model.sample_codes(torch.arange(3), 2)
    pred, mask = model(golden["imgs"], golden["noise"], codes)
    torch.testing.assert_close(pred[:, 0], golden["pred"], atol=1e-6, rtol=1e-6)
    tokens = torch.randn(3, 1, 4, 48 if place in (0, 2) else 32)
    positions = torch.arange(4).expand(3, -1)
    injected = model.injections[str(place)](tokens, codes, positions)
    assert torch.equal(injected, tokens.expand(-1, 2, -1, -1))
    Models.reconstruction_loss(pred, golden["imgs"], mask).sum().backward()
    assert any(p.grad.abs().sum() > 0 for p in model.injections.parameters())


def test_local_injections_mean_the_same_position_at_every_mask_ratio(state):
    model = tiny_model(state, [(2, "add")])
    injection, codes = model.injections["2"], model.sample_codes(torch.arange(1), 1)
    everything = injection(torch.zeros(1, 1, 17, 48), codes, torch.arange(17)[None])
    some = torch.tensor([[0, 5, 3, 16]])
    part = injection(torch.zeros(1, 1, 4, 48), codes, some)
    assert torch.equal(part, everything[:, :, some[0]])


@pytest.mark.parametrize("mask_ratio, n_removed", [(0.75, 12), (0.5, 8), (0.9, 15)])
def test_the_mask_removes_the_highest_noise(state, mask_ratio, n_removed):
    noise = torch.rand(2, 16)
    _, mask = tiny_model(state)(torch.zeros(2, 3, 32, 32), noise, mask_ratio=mask_ratio)
    expected = torch.zeros(2, 16).scatter_(1, noise.argsort(1)[:, 16 - n_removed :], 1)
    assert torch.equal(mask, expected)


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_the_loss_is_an_average_over_the_masked_patches_of_each_image(norm_pix_loss):
    torch.manual_seed(0)
    images, pred = torch.randn(2, 3, 16, 24), torch.randn(2, 3, 6, 192)
    mask = torch.tensor([[1, 0, 1, 1, 0, 1], [0, 1, 1, 1, 1, 0.0]])
    losses = Models.reconstruction_loss(pred, images, mask, norm_pix_loss)
    for n in range(2):
        for k in range(3):
            errors = []
            for i in mask[n].nonzero().flatten().tolist():
                row, column = divmod(i, 3)
                patch = images[n, :, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8]
                patch = patch.permute(1, 2, 0).flatten()
                if norm_pix_loss:
                    patch = (patch - patch.mean()) / (patch.var() + 1e-6).sqrt()
                errors.append((pred[n, k, i] - patch).square().mean())
            torch.testing.assert_close(losses[n, k], torch.stack(errors).mean())


def test_patches_become_the_image_again():
    images = torch.randn(2, 3, 16, 24)
    patches = Models.patchify(images, 8)
    assert patches.shape == (2, 6, 192)
    assert torch.equal(Models.unpatchify(patches, (2, 3)), images)


@pytest.mark.parametrize("place, blocks_once", [(0, 1), (2, 3), ("mask", 3), (3, 4), (4, 5)])
def test_what_comes_before_the_first_injection_runs_once_per_image(
    golden, state, place, blocks_once
):
    model, seen = tiny_model(state, [(place, "adain")]), []
    for number, block in enumerate([*model.blocks, *model.decoder_blocks]):
        hook = lambda module, args, number=number: seen.append((number, len(args[0])))  # noqa: E731
        block.norm1.register_forward_pre_hook(hook)
    prefix = model.prefix(golden["imgs"], golden["noise"])
    assert seen == [(number, 3) for number in range(blocks_once)]
    seen.clear()
    model.suffix(prefix, model.sample_codes(torch.arange(3), 4))
    assert seen == [(number, 12) for number in range(blocks_once, 5)]
    seen.clear()
    codes = model.sample_codes(torch.arange(3), 1)
    model(golden["imgs"], golden["noise"], codes, also_without_code=True)
    assert seen == [(number, 3 if number < blocks_once else 6) for number in range(5)]


@pytest.mark.parametrize("place", [3, 4])
def test_a_cross_decoder_runs_once_for_both_losses_up_to_the_first_injection(golden, place):
    model, seen = Models.build(dataclasses.replace(TINY, ip_spec=[(place, "adain")], **CROSS)), []
    for block in [*model.blocks, *model.decoder_blocks]:
        count = lambda module, args: seen.append(args[0].shape[:-2].numel())  # noqa: E731
        block.mlp.register_forward_pre_hook(count)
    codes = model.sample_codes(torch.arange(3), 1)
    model(golden["imgs"], golden["noise"], codes, also_without_code=True)
    assert seen == [3] * (place + 1) + [6] * (4 - place)


def test_predictions_of_a_share_of_the_masked_patches_are_masked_only(golden):
    model = Models.build(dataclasses.replace(TINY, **CROSS))
    with pytest.raises(ValueError, match="predict_ratio"):
        model(golden["imgs"], golden["noise"], predict_ratio=0.25)


@pytest.mark.parametrize("ip_spec", [[], *PLACES], ids=str)
def test_the_last_decoder_block_and_the_head_compute_masked_positions_only(golden, state, ip_spec):
    model, rows = tiny_model(state, ip_spec), {}
    last = model.decoder_blocks[-1]
    for name, module in (("mlp", last.mlp), ("head", model.decoder_pred)):
        hook = lambda module, args, name=name: rows.__setitem__(name, args[0].shape[-2])  # noqa: E731
        module.register_forward_pre_hook(hook)
    codes = model.sample_codes(torch.arange(3), 2) if ip_spec else None
    pred, mask = model(golden["imgs"], golden["noise"], codes, masked_only=True)
    # An injection behind the last block leaves that block to the prefix, once per image.
    assert rows == {"mlp": 17 if ip_spec and ip_spec[0][0] == 4 else 12, "head": 12}
    full, _ = model(golden["imgs"], golden["noise"], codes)
    removed = mask.bool()
    for n in range(3):
        expected = full[n][..., removed[n], :]
        torch.testing.assert_close(pred[n], expected, atol=1e-5, rtol=1e-5)
    gradients = []
    for masked_only in (True, False):
        model.zero_grad()
        pred, mask = model(golden["imgs"], golden["noise"], codes, masked_only=masked_only)
        Models.reconstruction_loss(pred, golden["imgs"], mask).sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_a_method_of_injection_is_one_class_and_one_line(golden, state, monkeypatch):
    class Shift(Models.Injection):
        def __init__(self, config, channels, n_positions):
            super().__init__()
            self.code_dim = 5
            self.out = torch.nn.Linear(5, channels)

        def forward(self, tokens, codes, positions):
            return tokens + self.out(codes)[:, :, None]

    monkeypatch.setitem(Models.INJECTIONS, "shift", Shift)
    for place in (1, "mask", 4):
        model = tiny_model(state, [(place, "shift")])
        assert model.code_dim == 5
        codes = model.sample_codes(torch.arange(3), 2)
        pred, _ = model(golden["imgs"], golden["noise"], codes)
        assert pred.std(1).mean() > 1e-4
        assert torch.equal(model.code_features(codes), codes), "what the surrogate goes by"


@pytest.mark.parametrize("method", Models.INJECTIONS)
def test_the_surrogate_goes_by_the_features_of_all_injections(state, method):
    model = tiny_model(state, [(1, "adain"), ("mask", method)])
    codes = model.sample_codes(torch.arange(3), 4)
    own = model.injections["mask"].features(codes[..., 6:])
    features = model.code_features(codes)
    assert torch.equal(features[..., -own.shape[-1] :], own)
    assert torch.equal(
        features[..., : -own.shape[-1]], model.injections["1"].mapping(codes[..., :6])
    )


@pytest.mark.parametrize("training", [True, False])
def test_some_outputs_of_a_block_are_the_same_as_of_the_whole_block(training):
    torch.manual_seed(0)
    block, tokens = Models.build(TINY).train(training).blocks[0], torch.randn(2, 3, 7, 48)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    torch.testing.assert_close(block(tokens, first=4), block(tokens)[:, :, 4:])


@pytest.mark.parametrize("option", ["qk_norm", "scale_attn_norm", "drop_path", "attn_drop"])
def test_options_of_timm_s_block_that_ours_does_not_honour_are_refused(option):
    with pytest.raises(TypeError, match=option):
        Models.SelfBlock(24, 4, torch.nn.LayerNorm, **{option: 1})


def test_codes_are_a_pure_function_of_the_image_seed(state):
    model = tiny_model(state, SEVERAL)
    seeds = torch.tensor([3, 8, 3])
    codes = model.sample_codes(seeds, 5)
    assert codes.shape == (3, 5, model.code_dim)
    assert torch.equal(codes[0], codes[2]) and not torch.equal(codes[0], codes[1])
    numbers = torch.tensor([[2, 3], [4, 0], [1, 1]])
    assert torch.equal(
        model.numbered_codes(seeds, numbers), codes[torch.arange(3)[:, None], numbers]
    )
    many = model.sample_codes(torch.arange(200), 8)
    assert abs(many.mean()) < 0.01 and abs(many.std() - 1) < 0.01


def test_encode_gives_unmasked_tokens_and_follows_codes(golden, state):
    model = tiny_model(state, [(1, "adain")])
    plain = model.encode(golden["imgs"])
    assert plain.shape == (3, 17, 48)
    everything = model.prefix(golden["imgs"], golden["noise"], mask_ratio=0)
    order = everything.positions.argsort(1)
    reference = tiny_model(state)
    for block in [*reference.blocks[2:], reference.norm]:
        everything = everything._replace(tokens=block(everything.tokens))
    expected = torch.take_along_dim(everything.tokens[:, 0], order[..., None], 1)
    torch.testing.assert_close(plain, expected, atol=1e-5, rtol=1e-5)
    codes = model.sample_codes(torch.arange(3), 1)[:, 0]
    assert (model.encode(golden["imgs"], codes) - plain).abs().mean() > 1e-3


def test_completions_keep_visible_patches_and_undo_the_normalisation(golden, state):
    images = golden["imgs"].clamp(-1, 1)
    for norm_pix_loss in (False, True):
        model = tiny_model(state, [(2, "adain")], norm_pix_loss=norm_pix_loss)
        codes = model.sample_codes(torch.arange(3), 4)
        cells = Models.completions(model, images, golden["noise"], codes, 0.75)
        assert cells.shape == (3, 6, 3, 32, 32) and cells.dtype == torch.uint8
        mask = golden["mask"].view(3, 1, 1, 4, 4).bool()
        removed = mask.repeat_interleave(8, -1).repeat_interleave(8, -2).expand_as(cells)
        seen = cells[:, :1].expand_as(cells)
        assert torch.equal(cells[~removed], seen[~removed])
        assert (cells[:, 1][removed[:, 1]] == 128).all()
    # A network that predicts the normalised patches exactly gives the image back.
    target = Models.target_patches(images, 8, norm_pix_loss=True)
    model = tiny_model(state, norm_pix_loss=True)
    model.forward = lambda *_: (target, golden["mask"])
    cells = Models.completions(model, images, golden["noise"], None, 0.75)
    assert (cells[:, 2].int() - cells[:, 0].int()).abs().max() <= 1


def test_parameter_groups_hold_every_trained_parameter_once(state):
    model = tiny_model(state, SEVERAL)
    groups = Models.parameter_groups(model, 0.1)
    held = [p for group in groups for p in group["params"]]
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(held) == len(trained) and {id(p) for p in held} == {id(p) for p in trained}
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    for name, parameter in model.named_parameters():
        exempt = parameter.ndim < 2 or name in ("cls_token", "mask_token")
        assert (id(parameter) in decayed) == (parameter.requires_grad and not exempt), name


def test_checkpoints_rebuild_the_model_with_its_injections(tmp_path, state):
    model = tiny_model(state, SEVERAL)
    path = tmp_path / "ours.pt"
    content = {"model": model.state_dict(), "config": dataclasses.asdict(model.config)}
    checkpoints.save_checkpoint(path, content)
    again = IO.load_model(path)
    assert again.config == model.config
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    assert IO.load_model(path, ip_spec=()).code_dim == 0
