"""SDXL as one file becomes the folder that it was made from; other families and half a configuration are refused."""

import json
import re
import shutil

import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from models import prior
from models.checkpoint import Checkpoint, CheckpointError
from models.supir_files import import_supir
from models.supir_folder import index_of, load
from tests.models.weights import configured, full_size, load_file, same, save_file, sparse, stored


def refused(words, act, *arguments):
    with pytest.raises(CheckpointError) as caught:
        act(*arguments)
    assert re.search(words, str(caught.value)), str(caught.value)


@pytest.mark.parametrize("form", ["safetensors", "ckpt", "wrapped ckpt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_one_file_becomes_the_folder_that_it_was_made_from(here, tmp_path, form, dtype):
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(here.sdxl_file).items()}
    file = tmp_path / f"sdxl.{form.split()[-1]}"
    if form == "safetensors":
        save_file(tensors, file)
    else:
        torch.save({"state_dict": tensors} if form == "wrapped ckpt" else tensors, file)
    prior.convert(file, tmp_path / "prior", here.sdxl)
    assert same(stored(tmp_path / "prior"), {name: one.to(dtype) for name, one in stored(here.sdxl).items()})
    for words in ("tokenizer/tokenizer.json", "tokenizer_2/tokenizer_config.json"):
        assert (tmp_path / "prior" / words).read_bytes() == (here.sdxl / words).read_bytes()
    assert isinstance(StableDiffusionXLPipeline.from_pretrained(tmp_path / "prior"), StableDiffusionXLPipeline)
    texts = [path for path in (tmp_path / "prior").rglob("*.json") if str(tmp_path) in path.read_text()]
    assert texts == []          # no place of this machine is in it


def test_an_import_over_one_file_holds_its_prior_and_can_be_moved(here, tmp_path):
    report = import_supir(here.supir_file, here.sdxl_file, tmp_path / "out", base_config=here.sdxl)
    (tmp_path / "out").rename(tmp_path / "moved")
    assert index_of(tmp_path / "moved")["prior"] == tmp_path / "moved" / "prior" and report.preset == "released"
    net, vae, _ = load(tmp_path / "moved")
    want = load(here.supir)
    assert same(net.state_dict(), want[0].state_dict()) and same(vae.state_dict(), want[1].state_dict())


@pytest.mark.slow
def test_at_full_size_every_published_name_of_sdxl_has_its_place(tmp_path):
    folder = configured(tmp_path / "sdxl")
    base = full_size("base")
    assert prior.network_shapes(folder).keys() == base.keys()
    for part, width, layers, act, heads in (("text_encoder", 768, 12, "quick_gelu", 12),
                                            ("text_encoder_2", 1280, 32, "gelu", 20)):
        (folder / part).mkdir()
        (folder / part / "config.json").write_text(json.dumps({
            "model_type": "clip_text_model", "vocab_size": 49408, "hidden_size": width, "hidden_act": act,
            "intermediate_size": 4 * width, "num_hidden_layers": layers, "num_attention_heads": heads,
            "projection_dim": width, "max_position_embeddings": 77}))
    text = prior.text_shapes(folder)
    # 2,515 tensors has sd_xl_base_1.0: the networks', a buffer and the logarithm of the temperature.
    assert len(base) + len(text) + 2 == 2515
    assert text["conditioner.embedders.1.model.transformer.resblocks.31.attn.in_proj_weight"] == (3840, 1280)
    for name in ("scheduler/scheduler_config.json", "tokenizer/tokenizer.json", "tokenizer_2/tokenizer.json",
                 "model_index.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    names = {name: tuple(shape) for name, shape in (base | text).items()}
    assert prior.check(sparse(tmp_path / "a.safetensors", names), folder) == folder
    lost = names.pop("model.diffusion_model.out.2.bias")
    refused(r"1 tensors are missing: model.diffusion_model.out.2.bias; 1 tensors are not known: v_pred", prior.check,
            sparse(tmp_path / "b.safetensors", names | {"v_pred": lost}), folder)


OTHERS = {"SD 1.5": ("cond_stage_model.transformer.text_model.x", 768), "SD 2": ("cond_stage_model.model.x", 1024),
          "SD 1.5 alone": ("none", 768), "SDXL refiner": ("conditioner.embedders.0.model.x", 1280)}


@pytest.mark.parametrize("kind", OTHERS)
def test_another_stable_diffusion_given_as_sdxl_is_named_and_nothing_is_written(here, tmp_path, kind):
    name, width = OTHERS[kind]
    unet = "model.diffusion_model."
    shapes = {name: (1,), f"{unet}input_blocks.0.0.weight": (320, 4, 3, 3),
              f"{unet}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, width)}
    shapes |= {f"{unet}label_emb.0.0.weight": (8, 8)} if kind == "SDXL refiner" else {}
    other = sparse(tmp_path / "other.safetensors", shapes)
    refused(f"no SDXL: it is {kind.removesuffix(' alone')}'s, with {width} numbers per token of text", import_supir,
            here.supir_file, other, tmp_path / "deep" / "out")
    assert not (tmp_path / "deep").exists()


def test_a_folder_of_sd_1_5_given_as_sdxl_is_named(here, tmp_path):
    shutil.copytree(here.sdxl, tmp_path / "sd")
    config = json.loads((tmp_path / "sd" / "unet" / "config.json").read_text())
    (tmp_path / "sd" / "unet" / "config.json").write_text(json.dumps(
        config | {"addition_embed_type": None, "cross_attention_dim": 768}))
    refused(r"is no SDXL: .*cross_attention_dim 768", import_supir, here.supir_file, tmp_path / "sd", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("lost", "words"), [
    ("tokenizer_2/tokenizer.json", "lacks tokenizer_2/vocab.json and merges.txt"),
    ("text_encoder/config.json", "lacks text_encoder/config.json"), ("model_index.json", "lacks model_index.json")])
def test_a_prior_or_a_configuration_that_lacks_something_says_what(here, tmp_path, lost, words):
    shutil.copytree(here.sdxl, tmp_path / "sdxl")
    (tmp_path / "sdxl" / lost).unlink()
    refused(words + ".*hf download", import_supir, here.supir_file, tmp_path / "sdxl", tmp_path / "out")
    refused(words + ".*--base-config", prior.convert, here.sdxl_file, tmp_path / "out", tmp_path / "sdxl")
    assert not (tmp_path / "out").exists()


def test_a_folder_without_weights_is_a_configuration_and_no_prior(here, tmp_path):
    shutil.copytree(here.sdxl, tmp_path / "config", ignore=shutil.ignore_patterns("*.safetensors"))
    refused(r"lacks unet/\*.safetensors", import_supir, here.supir_file, tmp_path / "config", tmp_path / "out")
    prior.convert(here.sdxl_file, tmp_path / "prior", tmp_path / "config")
    assert same(stored(tmp_path / "prior"), stored(here.sdxl))


def test_a_prior_that_has_only_the_fp16_variant_serves(here, tmp_path):
    StableDiffusionXLPipeline.from_pretrained(here.sdxl, torch_dtype=torch.float16).save_pretrained(
        tmp_path / "sdxl", variant="fp16")
    assert not (tmp_path / "sdxl" / "unet" / "diffusion_pytorch_model.safetensors").exists()
    import_supir(here.supir_file, tmp_path / "sdxl", tmp_path / "out")
    net, vae, _ = load(tmp_path / "out", torch.float16)
    want = load(here.supir, torch.float16)
    assert same(net.state_dict(), want[0].state_dict()) and same(vae.state_dict(), want[1].state_dict())


def test_a_file_of_another_width_than_its_configuration_is_refused(here, tmp_path):
    name = "conditioner.embedders.1.model.text_projection"
    tensors = load_file(here.sdxl_file) | {name: torch.zeros(48, 64)}
    save_file(tensors, tmp_path / "wide.safetensors")
    refused(rf"not the SDXL that .* describes. 1 tensors are of another shape: {name} is \(48, 64\), not \(48, 48\)",
            prior.convert, tmp_path / "wide.safetensors", tmp_path / "out", here.sdxl)
    assert len(Checkpoint(here.sdxl_file)) == len(tensors)
