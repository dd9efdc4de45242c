"""What can be probed: encoders of every kind, and their features."""

import dataclasses
import sys

import pytest
import timm
import torch
import torchvision
from conftest import ROOT, command

import IO
from Augmentation import MEAN, STD, normalize
from internals import encoders
from internals.checkpoints import save_checkpoint
from Models import PRESETS, ModelConfig, build
from Utils import InputError, mix_seeds

CHECKPOINT = str(ROOT / "demo/imle_mnist.pt")


def random_images(n=2, size=(32, 32)):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, 3, *size), generator=generator, dtype=torch.uint8)


def scaled(images, mean, std):
    """uint8 images normalised by mean and std, written out."""
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (mean, std))
    return (images.float() / 255 - mean) / std


def features(encoder, images, parts=("cls", "mean"), n_codes=0, seed=0):
    seeds = mix_seeds(seed, torch.arange(len(images)))
    return encoders.image_features(encoder, images, seeds, parts, n_codes)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2"])
def test_timm_s_vit_gives_class_token_and_patches_as_timm_does(name):
    encoder = encoders.load_encoder(f"untrained:timm:{name}", size=(56, 56), seed=1)
    network, images = encoder.network, random_images(size=(56, 56))
    config = network.pretrained_cfg
    assert (encoder.mean, encoder.std) == (config["mean"], config["std"])
    assert ((encoder.mean, encoder.std) == (MEAN, STD)) == ("dino" in name)
    with torch.no_grad():
        tokens = network.forward_features(scaled(images, config["mean"], config["std"]))
    n_prefix = network.num_prefix_tokens
    expected = torch.stack([tokens[:, 0], tokens[:, n_prefix:].mean(1)], dim=1)
    torch.testing.assert_close(features(encoder, images), expected, atol=1e-4, rtol=1e-4)
    assert encoder.pools == ("cls", "mean", "both") and not encoder.training


@pytest.mark.parametrize("name", ["resnet10t", "vit_pwee_patch16_reg1_gap_256", "mixer_s32_224"])
def test_timm_s_other_models_give_what_their_classifier_sees(name):
    size = (224, 224) if "mixer" in name else (32, 32)
    encoder = encoders.load_encoder(f"untrained:timm:{name}", size=size)
    images = random_images(size=size)
    config = encoder.network.pretrained_cfg
    with torch.no_grad():
        expected = encoder.network(scaled(images, config["mean"], config["std"]))
    found = features(encoder, images)
    for part in found.unbind(1):
        torch.testing.assert_close(part, expected, atol=1e-4, rtol=1e-4)
    assert encoder.pools == ("vector",) and encoder.config.dim == expected.shape[1]


def test_torchvision_s_resnet_gives_what_its_classifier_sees(tmp_path):
    torch.manual_seed(0)
    whole = torchvision.models.resnet18(num_classes=7)  # another classifier than ImageNet's
    torch.save(whole.state_dict(), tmp_path / "mine.pth")
    encoder = encoders.load_encoder(f"torchvision:resnet18={tmp_path}/mine.pth", size=(32, 32))
    whole.fc = torch.nn.Identity()
    images = random_images()
    with torch.no_grad():
        expected = whole.eval()(normalize(images))
    torch.testing.assert_close(features(encoder, images, ("cls",))[:, 0], expected)
    assert encoder.pools == ("vector",) and encoder.config.dim == 512


def test_timm_s_weights_come_from_a_file(tmp_path):
    torch.manual_seed(0)
    whole = timm.create_model("resnet10t", num_classes=5)
    torch.save(whole.state_dict(), tmp_path / "mine.pth")
    encoder = encoders.load_encoder(f"timm:resnet10t={tmp_path}/mine.pth", size=(32, 32))
    assert torch.equal(encoder.network.conv1[0].weight, whole.conv1[0].weight)
    with pytest.raises(InputError, match="mine.pth.* does not fit: Missing key"):
        encoders.load_encoder(f"timm:resnet18={tmp_path}/mine.pth")


@pytest.mark.parametrize("kind", ["timm", "torchvision"])
def test_weights_that_can_t_be_fetched_end_in_what_to_do(kind, monkeypatch, tmp_path):
    def fail(*_, **__):
        raise OSError("no network\nat all")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("timm.create_model", fail)
    monkeypatch.setattr("torch.hub.urlopen", fail)
    with pytest.raises(InputError, match="could not fetch .*no network.*elsewhere and") as caught:
        encoders.load_encoder(f"{kind}:resnet18")
    assert "\n" not in str(caught.value)


def test_pixels_are_features_too():
    images = random_images(size=(5, 4))
    encoder = encoders.load_encoder("pixels", size=(5, 4))
    assert encoder.config.image_size == (5, 4) and encoder.config.dim == 60
    assert torch.equal(features(encoder, images, ("cls",))[:, 0], normalize(images).flatten(1))


@pytest.mark.parametrize("source", [CHECKPOINT, "vit_demo", "timm:resnet10t"])
def test_untrained_networks_are_the_same_by_seed_and_have_the_trained_ones_sizes(source):
    state = torch.get_rng_state()
    one, same, other = (
        encoders.load_encoder(f"untrained:{source}", size=(28, 28), seed=seed).state_dict()
        for seed in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)
    if source == CHECKPOINT:
        trained = IO.load_model(source).state_dict()
        shapes = {name: t.shape for name, t in trained.items() if "injections" not in name}
        assert {name: tensor.shape for name, tensor in one.items()} == shapes
        assert not torch.equal(trained["blocks.0.attn.qkv.weight"], one["blocks.0.attn.qkv.weight"])


@pytest.mark.parametrize("place", [1, 3, 5])  # in the encoder, at its end, in the decoder
def test_features_are_the_mean_over_codes(place):
    torch.manual_seed(0)
    sizes = {"image_size": (16, 16), "patch_size": 4, "dim": 24, "depth": 4, "num_heads": 2}
    sizes |= {"decoder_dim": 16, "decoder_depth": 2, "decoder_num_heads": 2, "latent_dim": 8}
    model = build(ModelConfig(**sizes, ip_spec=((place, "adain"),), mapping_net_layers=2)).eval()
    images, seeds = random_images(3, (16, 16)), mix_seeds(0, torch.arange(3))
    found = features(model, images, n_codes=11)
    codes = model.sample_codes(seeds, 11)
    with torch.no_grad():
        tokens = sum(model.encode(normalize(images), codes[:, i]) for i in range(11)) / 11
    expected = torch.stack([tokens[:, 0], tokens[:, 1:].mean(1)], dim=1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    changes = not torch.allclose(found, features(model, images), atol=1e-4)
    assert changes == (place < 4)


def test_timm_s_training_takes_an_exported_encoder_as_pretrained_weights(tmp_path):
    """As its train.py does with --pretrained --pretrained-path, which the README names."""
    model = build(dataclasses.replace(PRESETS["vit_tiny"], image_size=(32, 32))).eval()
    content = {"model": model.state_dict(), "config": dataclasses.asdict(model.config)}
    save_checkpoint(tmp_path / "model.pt", content)
    exported = tmp_path / "encoder.safetensors"
    command(tmp_path / "model.pt", exported, program=(sys.executable, "scripts/export_encoder.py"))
    overlay = {"file": str(exported), "num_classes": -1}
    options = {"pretrained": True, "pretrained_cfg_overlay": overlay, "num_classes": 3}
    network = timm.create_model("vit_tiny_patch16_224", img_size=(32, 32), **options).eval()
    images = normalize(random_images())
    with torch.no_grad():
        torch.testing.assert_close(network.forward_features(images), model.encode(images))
