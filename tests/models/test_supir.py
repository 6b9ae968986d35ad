"""SUPIR's networks against the released ones at a tiny width, and what must hold at any width."""

import gzip
import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from models import published
from models.connectors import ZeroCrossAttention, ZeroSFT
from models.robust import RobustEncoder
from models.supir import SupirAdaptor, SupirUNet, depths, prior_config, sites
from tests.golden.supir import fill

GOLDEN = Path(__file__).parent.parent / "golden" / "supir"


class Golden:
    """A golden file: weights by name, inputs, wanted outputs."""

    def __init__(self, name):
        self.side = json.loads((GOLDEN / f"{name}.json").read_text())
        self.want = load_file(GOLDEN / f"{name}.safetensors")
        self.shapes = {key: tuple(shape) for key, shape in self.side["shapes"].items()}

    def input(self, name):
        about = self.side["inputs"][name]
        normal = fill.inputs(name, tuple(about["shape"]), self.side["salt"])
        return {"normal": normal, "signed": (0.5 * normal).clamp(-1, 1)}[about["map"]]

    def fill(self, module, modules):
        """Fills a module with the golden weights; returns the published name of each of its tensors."""
        own = module.state_dict()
        names = published.names(own, modules)
        module.load_state_dict({key: fill.fill(name, self.shapes[name], self.side["salt"]).reshape(own[key].shape)
                                for key, name in names.items()})
        return names

    def check(self, name, value, tolerance=1e-4):
        want = self.want[name]
        assert value.shape == want.shape
        assert (value - want).abs().max() <= tolerance * max(1.0, want.abs().max())


def prior(channels=(32, 64, 128), layers=2, depth=(1, 1, 2), kinds="DCC", context=40, pooled=48):
    """A small SDXL prior with random weights."""
    names = {"D": ("DownBlock2D", "UpBlock2D"), "C": ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D")}
    return UNet2DConditionModel(
        sample_size=16, block_out_channels=channels, layers_per_block=layers, norm_num_groups=32,
        down_block_types=[names[kind][0] for kind in kinds],
        up_block_types=[names[kind][1] for kind in reversed(kinds)],
        transformer_layers_per_block=depth, attention_head_dim=[width // 32 for width in channels],
        use_linear_projection=True, cross_attention_dim=context, addition_embed_type="text_time",
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=pooled + 48).eval()


@pytest.fixture(scope="module")
def net():
    """The golden networks."""
    torch.set_num_threads(1)
    golden, unet = Golden("supir_net"), prior()
    adaptor = SupirAdaptor.from_unet(unet)
    names = golden.fill(adaptor, list(published.adaptor(adaptor)))
    of_unet = golden.fill(unet, list(published.prefixed(published.unet(prior_config(unet)), "model.diffusion_model.")))
    golden.names, golden.used = names, {*names.values(), *of_unet.values()}
    golden.net = SupirUNet(unet, adaptor).eval()
    golden.arguments = (golden.input("xt"), torch.tensor(golden.side["timesteps"]), golden.input("lq_latent"),
                        golden.input("context"), golden.input("pooled"), torch.tensor(golden.side["time_ids"]).float())
    return golden


def test_every_published_tensor_has_its_place(net):
    assert net.used == set(net.shapes)


def test_the_control_branch_gives_the_released_features(net):
    with torch.no_grad():
        features = net.net.adaptor.control(*net.arguments)
    assert len(features) == 10
    for i, feature in enumerate(features):
        net.check(f"control.{i}", feature)


@pytest.mark.parametrize("scale", [1.0, 0.5, 0.0])
def test_the_unet_gives_the_released_output_at_every_control_scale(net, scale):
    with torch.no_grad():
        net.check(f"unet_out.{scale}", net.net(*net.arguments, control_scale=scale))


def test_control_scales_differ_per_image(net):
    with torch.no_grad():
        both = net.net(*net.arguments, control_scale=torch.tensor([1.0, 0.5]))
    assert (both[0] - net.want["unet_out.1.0"][0]).abs().max() < 1e-4
    assert (both[1] - net.want["unet_out.0.5"][1]).abs().max() < 1e-4


@pytest.mark.parametrize("index", range(12))
def test_each_connector_alone_gives_the_released_output(net, index):
    connector, scale = net.net.adaptor.connectors[str(index)], net.side["alone"]["control_scale"]
    for gain in net.side["alone"]["scales"]:
        control, h = (net.input(f"connector.{index}.{name}") * gain for name in ("control", "h"))
        decoder = net.input(f"connector.{index}.decoder") * gain if index not in (3, 7, 11) else None
        inputs = (control, h) if index in (3, 7) else (control, h, decoder)
        with torch.no_grad():
            net.check(f"connector.{index}.alone.{gain}", connector(*inputs, scale=scale))


def test_gradients_are_the_released_ones_and_reach_the_adaptor_alone(net):
    loss = ((net.net(*net.arguments) - net.input("target")) ** 2).mean()
    assert loss.item() == pytest.approx(net.want["loss"].item(), abs=1e-5)
    loss.backward()
    own = {name: key for key, name in net.names.items()}
    parameters = dict(net.net.adaptor.named_parameters())
    for i, name in enumerate(net.side["grad_names"]):
        gradient, norm = parameters[own[name]].grad, net.want["grad_norm"][i]
        probe = fill.inputs(f"probe:{name}", net.shapes[name], net.side["salt"]).reshape(gradient.shape)
        room = 1e-3 * norm + 1e-7
        assert (gradient.norm() - norm).abs() <= room, name
        assert ((gradient * probe).sum() - net.want["grad_probe"][i]).abs() <= room, name
    assert len(net.side["grad_names"]) == len(parameters)
    assert all(parameter.grad is None for parameter in net.net.unet.parameters())


def test_both_encoders_and_the_decoder_give_the_released_values():
    golden = Golden("supir_vae")
    vae = AutoencoderKL(
        block_out_channels=(32, 64, 128, 128), layers_per_block=2, norm_num_groups=32, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        scaling_factor=0.13025).eval()
    robust = RobustEncoder.from_vae(vae)
    assert all(map(torch.equal, robust.encoder.state_dict().values(), vae.encoder.state_dict().values()))
    golden.fill(vae, list(published.prefixed(published.vae(vae.config), "first_stage_model.")))
    golden.fill(robust, [(one.replace(".encoder", ".denoise_encoder"), other, kind) for one, other, kind in
                         published.prefixed(published.vae_half(vae.config, "encoder"), "first_stage_model.")])
    image = golden.input("image")
    with torch.no_grad():
        golden.check("moments_denoise_encoder", robust(image, vae).parameters)
        plain = vae.encode(image).latent_dist
        golden.check("moments_encoder", plain.parameters)
        drawn = plain.mean + plain.std * golden.input("posterior_noise")
        golden.check("z_encoder_sample_scaled", 0.13025 * drawn)
        golden.check("z_lq_mode_scaled", robust.latent(image, vae))
        golden.check("decoded_from_z_lq", vae.decode(robust.latent(image, vae) / 0.13025).sample)


def full_size(what):
    with gzip.open(GOLDEN / "official_keys_supir.json.gz", "rt") as file:
        return {name: tuple(shape) for name, shape in json.load(file)[what].items()}


@pytest.fixture(scope="module")
def full():
    """SDXL's prior and a released adaptor at full size, without memory."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=(320, 640, 1280), layers_per_block=2, norm_num_groups=32, sample_size=128,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=2048,
            transformer_layers_per_block=(1, 2, 10), attention_head_dim=(5, 10, 20), use_linear_projection=True,
            addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816)
        config = prior_config(unet)
        return unet, {name: SupirAdaptor(config, depths(config, name)) for name in ("released", "paper")}


def test_at_full_size_every_name_and_shape_is_the_published_one(full):
    unet, adaptors = full
    released = adaptors["released"]
    names = published.names(released.state_dict(), published.adaptor(released))
    ours = {names[key]: tuple(tensor.shape) for key, tensor in released.state_dict().items()}
    wanted = {name: shape for name, shape in full_size("v0").items() if not name.startswith("first_stage_model.")}
    assert ours == wanted and len(ours) == 810 + 118
    base = full_size("base")
    of_unet = published.names(unet.state_dict(), published.prefixed(published.unet(prior_config(unet)),
                                                                    "model.diffusion_model."))
    shapes = {of_unet[key]: tuple(tensor.shape) for key, tensor in unet.state_dict().items()}
    assert shapes == {name: shape for name, shape in base.items() if name.startswith("model.diffusion_model.")}


def test_at_full_size_the_counts_of_parameters_are_the_published_ones(full):
    def count(module):
        return sum(parameter.numel() for parameter in module.parameters())
    released, paper = full[1]["released"], full[1]["paper"]
    assert count(released.control) == 1_243_378_880 and count(released.connectors) == 54_797_440
    assert round(count(paper.control) / 1e6, 1) == 702.0
    assert count(full[0]) == 2_567_463_684


@settings(max_examples=6, deadline=None)
@given(st.sampled_from([(32, 64, 128), (64, 64), (32, 64)]), st.integers(1, 2), st.integers(1, 2),
       st.sampled_from([(8, 12), (7, 9), (5, 8)]), st.booleans())
def test_at_any_width_scale_zero_is_plain_sdxl_and_a_fresh_gate_is_too(channels, layers, depth, size, gated):
    torch.manual_seed(0)
    unet = prior(channels, layers, [depth] * len(channels), "D" + "C" * (len(channels) - 1))
    adaptor = SupirAdaptor.from_unet(unet, depth=[1] * len(channels), gated=gated)
    inputs = (torch.randn(2, 4, *size), torch.tensor([999, 3]), torch.randn(2, 4, *size), torch.randn(2, 5, 40),
              torch.randn(2, 48), torch.rand(2, 6) * 1000)
    net = SupirUNet(unet, adaptor)
    with torch.no_grad():
        added = {"text_embeds": inputs[4], "time_ids": inputs[5]}
        plain = unet(inputs[0], inputs[1], inputs[3], added_cond_kwargs=added)
        assert torch.equal(net(*inputs, control_scale=0.0), plain.sample)
        fresh = net(*inputs)
    assert torch.allclose(fresh, plain.sample, atol=1e-5) == gated


def test_how_far_a_fresh_adaptor_is_from_plain_sdxl(net):
    """ZeroSFT keeps its normalisation, and the cross-attentions are no zeros. RMS of the difference, relative."""
    torch.manual_seed(0)
    unet, deviation = net.net.unet, {}
    for connector in ("zero_sft", "zero_conv"):
        fresh = SupirUNet(unet, SupirAdaptor.from_unet(unet, connector=connector)).eval()
        with torch.no_grad():
            plain = fresh(*net.arguments, control_scale=0.0)
            deviation[connector] = ((fresh(*net.arguments) - plain).pow(2).mean() / plain.pow(2).mean()).sqrt().item()
    assert deviation["zero_conv"] == 0
    assert deviation["zero_sft"] == pytest.approx(0.832, abs=0.002)


@pytest.mark.parametrize(("depth", "connector", "gated"), [("released", "zero_sft", False), ("paper", "zero_sft", True),
                                                           ([1, 1, 1], "zero_conv", False)])
def test_a_saved_adaptor_is_loaded_as_it_was(tmp_path, depth, connector, gated):
    unet = prior()
    adaptor = SupirAdaptor.from_unet(unet, depth, connector, gated)
    for parameter in adaptor.parameters():
        torch.nn.init.normal_(parameter)
    adaptor.save_pretrained(tmp_path, max_shard_size="500KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again = SupirAdaptor.from_pretrained(tmp_path)
    assert again.config.depth == depths(prior_config(unet), depth)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in adaptor.state_dict().items())
    half = SupirAdaptor.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16


def test_a_trimmed_copy_starts_with_the_first_blocks_of_the_prior():
    unet = prior(depth=(1, 2, 4))
    adaptor = SupirAdaptor.from_unet(unet, "paper")
    assert adaptor.config.depth == [1, 1, 2]
    own, theirs = adaptor.control.state_dict(), unet.state_dict()
    assert "mid_block.attentions.0.transformer_blocks.2.norm1.weight" not in own
    assert all(torch.equal(own[name], theirs[name]) for name in own if not name.startswith("hint"))


def test_a_depth_that_does_not_fit_is_an_error_that_says_how_many_levels():
    with pytest.raises(ValueError, match="names 2 levels, and the prior has 3"):
        SupirAdaptor.from_unet(prior(), [1, 1])
    with pytest.raises(ValueError, match="'released', 'paper'"):
        SupirAdaptor.from_unet(prior(), "relased")
    with pytest.raises(ValueError, match="heads of 64"):
        ZeroCrossAttention(64, 96)


def test_the_sites_are_those_of_the_published_table():
    table = {site.index: (site.kind, site.control, site.channels, site.decoder_channels) for site in sites(
        {"block_out_channels": [320, 640, 1280], "layers_per_block": 2})}
    assert table == {
        11: ("skip", 9, 1280, 0), 10: ("skip", 8, 1280, 1280), 9: ("skip", 7, 1280, 1280), 8: ("skip", 6, 640, 1280),
        7: ("attention", 6, 1280, 1280), 6: ("skip", 5, 640, 1280), 5: ("skip", 4, 640, 640), 4: ("skip", 3, 320, 640),
        3: ("attention", 3, 640, 640), 2: ("skip", 2, 320, 640), 1: ("skip", 1, 320, 320), 0: ("skip", 0, 320, 320)}


def test_a_connector_forgets_nothing_when_its_scale_is_a_tensor_of_zeros():
    connector = ZeroSFT(32, 32, 32)
    control, skip, decoder = torch.randn(3, 2, 32, 4, 4)
    plain = torch.cat([decoder, skip], 1)
    assert torch.allclose(connector(control, skip, decoder, torch.zeros(2)), plain)
