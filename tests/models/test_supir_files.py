"""SUPIR's files: what goes in comes out, every tensor is accounted for, and what does not fit says why."""

import os
import re
import shutil

import pytest
import torch

from models.checkpoint import Checkpoint, CheckpointError
from models.fingerprint import fingerprint
from models.supir import SupirAdaptor
from models.supir_files import export_supir, import_supir, planned
from models.supir_folder import index_of, load, read_index, write
from models.supir_index import LICENCE
from models.tiny_supir import assemble
from tests.models.weights import configured, full_size, load_file, same, save_file, sparse, stored, trimmed

LEVEL2, MIDDLE = ("input_blocks.7.", "input_blocks.8."), "middle_block."


def parts(folder):
    return {name: tensor for name, tensor in stored(folder).items() if not name.startswith("prior/")}


@pytest.fixture
def change(here, tmp_path):
    """change(**tensors): the tiny SUPIR's file with tensors added, replaced, or, if None, removed."""
    def changed(tensors):
        kept = load_file(here.supir_file) | tensors
        save_file({name: tensor for name, tensor in kept.items() if tensor is not None},
                  tmp_path / "changed.safetensors")
        return tmp_path / "changed.safetensors"
    return changed


def refused(words, *arguments, **options):
    with pytest.raises(CheckpointError) as caught:
        import_supir(*arguments, **options)
    assert re.search(words, str(caught.value)), str(caught.value)
    return str(caught.value)


FORMATS = {
    "safetensors": lambda tensors, path: save_file(tensors, path),
    "safetensors with a wrapper in its names":
        lambda tensors, path: save_file({f"state_dict.{name}": one for name, one in tensors.items()}, path),
    "ckpt": torch.save,
    "wrapped ckpt": lambda tensors, path: torch.save({"state_dict": tensors, "global_step": 3}, path),
    "old ckpt": lambda tensors, path: torch.save(tensors, path, _use_new_zipfile_serialization=False),
    "ckpt of a wrapper twice": lambda tensors, path: torch.save({"module": {"state_dict": tensors}}, path),
}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
def test_every_format_and_precision_comes_in_as_it_is(here, tmp_path, form, dtype):
    checkpoint = tmp_path / "SUPIR-v0F.any"
    FORMATS[form]({name: tensor.to(dtype) for name, tensor in load_file(here.supir_file).items()}, checkpoint)
    report = import_supir(checkpoint, here.sdxl, tmp_path / "out")
    want = {name: tensor.to(dtype) for name, tensor in parts(here.supir).items()}
    assert same(parts(tmp_path / "out"), want) and report.used == len(want)
    assert report.dropped == ({"global_step": "no tensor"} if form == "wrapped ckpt" else {})
    assert (report.depth[1:], report.preset, report.from_prior) == ([1, 2], "released", [])


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16], ids=["as it is", "fp16", "bf16"])
def test_importing_an_export_gives_the_same_folder(here, tmp_path, dtype):
    count = export_supir(here.supir, tmp_path / "a.safetensors", dtype)
    import_supir(tmp_path / "a.safetensors", here.sdxl, tmp_path / "one")
    assert count == len(parts(tmp_path / "one"))
    assert same(parts(tmp_path / "one"), {name: tensor.to(dtype or tensor.dtype)
                                          for name, tensor in parts(here.supir).items()})
    export_supir(tmp_path / "one", tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    import_supir(tmp_path / "b.safetensors", here.sdxl, tmp_path / "two")
    assert fingerprint(tmp_path / "one") == fingerprint(tmp_path / "two")
    assert read_index(tmp_path / "two")["licence"] == "none: random numbers"


def test_the_precision_asked_for_is_that_of_the_folder(here, tmp_path):
    import_supir(here.supir_file, here.sdxl, tmp_path / "out", dtype=torch.float16)
    assert {tensor.dtype for tensor in parts(tmp_path / "out").values()} == {torch.float16}


def test_published_weights_stay_under_the_authors_licence(here, tmp_path, change):
    import_supir(change({}), here.sdxl, tmp_path / "out")
    assert read_index(tmp_path / "out")["licence"] == LICENCE


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return configured(tmp_path_factory.mktemp("full") / "sdxl")


def plan_of(tmp_path, config, shapes, **options):
    return planned(Checkpoint(sparse(tmp_path / "full.safetensors", shapes)), config, **options)


def test_the_full_size_v0q_is_used_whole_and_its_mask_dropped_by_name(tmp_path, config):
    shapes = full_size("v0", "extra_in_v0Q")
    plan = plan_of(tmp_path, config, shapes)
    assert len(shapes) == 1035 and sum(torch.Size(shape).numel() for shape in shapes.values()) == 1_332_356_296
    assert list(plan.report.dropped) == ["model.control_model.mask_LQ"]
    assert (plan.report.used, plan.report.depth, plan.report.preset) == (1034, [1, 2, 10], "released")
    assert set(plan.wanted) == set(full_size("v0")) and plan.report.from_prior == []
    assert all(parameter.is_meta for parameter in plan.adaptor.parameters())
    assert (tmp_path / "full.safetensors").stat().st_blocks * 512 < 1 << 20        # nothing was on the disk either


def test_a_full_checkpoint_s_copy_of_the_prior_is_reported_and_not_used(tmp_path, config):
    text = {"conditioner.embedders.1.model.logit_scale": ()}
    plan = plan_of(tmp_path, config, full_size("v0", "base") | text | {
        "first_stage_model.denoise_encoder_s1.conv_in.bias": (128,)})
    assert plan.report.used == 1034 and len(plan.report.from_prior) == 1928 + 1
    assert list(plan.report.dropped) == ["first_stage_model.denoise_encoder_s1.conv_in.bias"]


def test_full_size_names_that_nobody_knows_are_an_error_that_lists_them(tmp_path, config):
    names = ["first_stage_model.denoise_encoder.extra.weight", "lora.up", "model.control_model.output_blocks.0.weight",
             "model.diffusion_model.new.weight"]
    with pytest.raises(CheckpointError, match=f"4 tensors are not known: {', '.join(names)}"):
        plan_of(tmp_path, config, full_size("v0", "base") | dict.fromkeys(names, (2,)))


@pytest.mark.parametrize(("levels", "depth", "preset"), [
    ({**dict.fromkeys(("input_blocks.4.", "input_blocks.5."), 1), **dict.fromkeys((*LEVEL2, MIDDLE), 5)}, [1, 1, 5],
     "paper"),
    ({**dict.fromkeys(("input_blocks.4.", "input_blocks.5."), 1), **dict.fromkeys((*LEVEL2, MIDDLE), 4)}, [1, 1, 4],
     None)])
def test_a_trimmed_control_copy_is_recognised_at_full_size(tmp_path, config, levels, depth, preset):
    shapes = trimmed(full_size("v0"), levels)
    plan = plan_of(tmp_path, config, shapes)
    assert (plan.report.depth, plan.report.preset, plan.report.used) == (depth, preset, len(shapes))
    assert plan_of(tmp_path, config, shapes, depth=depth).report.depth == depth
    with pytest.raises(CheckpointError, match=f"not 1,2,10 as --depth asks. --depth {preset or '1,1,4'} would fit"):
        plan_of(tmp_path, config, shapes, depth="released")


def test_a_depth_that_the_file_contradicts_says_which_would_fit(tmp_path, config):
    shapes = full_size("v0")
    for asked in ("paper", [1, 1, 4], [1, 2], [1, 2, 10, 10]):
        with pytest.raises(CheckpointError, match="--depth released would fit"):
            plan_of(tmp_path, config, shapes, depth=asked)
    assert plan_of(tmp_path, config, shapes, depth=[0, 2, 10]).report.preset == "released"      # level 0 has none


def test_blocks_that_are_missing_in_places_fit_no_depth(tmp_path, config):
    with pytest.raises(CheckpointError, match="so no depth fits: is the file whole"):
        plan_of(tmp_path, config, trimmed(full_size("v0"), {MIDDLE: 4}))


def test_weights_for_a_prior_of_other_widths_say_that_no_depth_helps(tmp_path, config):
    other = configured(tmp_path / "other", cross_attention_dim=1280)
    with pytest.raises(CheckpointError, match=r"attn2\.to_k\.weight is \(640, 2048\), not \(640, 1280\).*No depth"):
        plan_of(tmp_path, other, full_size("v0"))


def test_a_transposed_tensor_of_as_many_numbers_is_refused(here, tmp_path, change):
    name = "model.diffusion_model.project_modules.0.zero_mul.weight"
    tensor = load_file(here.supir_file)[name]
    refused(rf"1 tensors are of another shape: {re.escape(name)}",
            change({name: tensor.transpose(0, 1).contiguous()}), here.sdxl, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_projection_stored_as_a_linear_layer_is_the_convolution_that_it_means(here, tmp_path, change):
    name = "first_stage_model.denoise_encoder.mid.attn_1.q.weight"
    tensor = load_file(here.supir_file)[name]
    assert tensor.ndim == 4
    import_supir(change({name: tensor[..., 0, 0].contiguous()}), here.sdxl, tmp_path / "out")
    assert same(parts(tmp_path / "out"), parts(here.supir))


@pytest.mark.parametrize(("tensors", "words"), [
    ({"model.control_model.input_hint_block.0.bias": None}, "1 tensors are missing: model.control_model.input_hint"),
    ({"model.control_model.a": torch.zeros(1), "z": torch.zeros(1)}, "2 tensors are not known: model.control_model.a"),
    ({f"x{number}": torch.zeros(1) for number in range(9)}, "9 tensors are not known: x0, .* x5 and 3 more"),
])
def test_what_is_missing_or_unknown_is_listed_and_nothing_is_written(here, tmp_path, change, tensors, words):
    refused(words, change(tensors), here.sdxl, tmp_path / "deep" / "out")
    assert not (tmp_path / "deep").exists()


@pytest.mark.parametrize(("names", "words"), [
    (["model.diffusion_model.input_blocks.0.0.weight", "model.diffusion_model.label_emb.0.0.weight"],
     r"It is SDXL's, which is the prior \(--base\)"),
    (["model.diffusion_model.input_blocks.0.0.weight", "cond_stage_model.transformer.x"], "It is SD 1.5's"),
    (["blocks.0.weight"], "not known here; its first tensors: blocks.0.weight")])
def test_a_checkpoint_of_another_family_is_named(here, tmp_path, names, words):
    save_file({name: torch.zeros(1) for name in names}, tmp_path / "other.safetensors")
    refused(words, tmp_path / "other.safetensors", here.sdxl, tmp_path / "out")


class Malicious:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_asks_for_code_runs_none(here, tmp_path, zipped):
    checkpoint = tmp_path / "evil.ckpt"
    torch.save({"state_dict": load_file(here.supir_file), "x": Malicious(tmp_path / "ran")}, checkpoint,
               _use_new_zipfile_serialization=zipped)
    refused("holds more than tensors: it asks for posix.mkdir. Nothing of it was run", checkpoint, here.sdxl,
            tmp_path / "out")
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()
    with pytest.raises(FileExistsError):        # it would have
        (tmp_path / "ran").mkdir()
        torch.load(checkpoint, weights_only=False)


@pytest.mark.parametrize(("content", "words"), [
    (b"", "is empty"), (b"version https://git-lfs.github.com/spec/v1\noid", "a Git LFS pointer"),
    (b"<!DOCTYPE html><html>404</html>", "a web page"), (b"\x89PNG\r\n" + bytes(99), "is no checkpoint|cannot be read"),
    ("safetensors", "no whole .safetensors file .* cut short"), ("ckpt", "cut short"), ("old", "cut short")])
def test_a_file_that_is_cut_short_or_no_checkpoint_says_so(here, tmp_path, content, words):
    path = tmp_path / "SUPIR-v0Q.ckpt"
    if isinstance(content, str):
        torch.save(load_file(here.supir_file), path, _use_new_zipfile_serialization=content != "old")
        whole = here.supir_file.read_bytes() if content == "safetensors" else path.read_bytes()
        content = whole[:len(whole) // 2]
    path.write_bytes(content)
    refused(words, path, here.sdxl, tmp_path / "out")


def test_a_folder_in_shards_and_of_a_variant_loads_and_exports(here, tmp_path):
    adaptor, robust = assemble(here.sdxl)
    write(tmp_path / "shards", adaptor.half(), robust.half(), here.sdxl, variant="fp16", max_shard_size="500KB")
    assert len(list((tmp_path / "shards" / "adaptor").glob("*.fp16-*.safetensors"))) > 2
    net, vae, again = load(tmp_path / "shards", torch.float16)
    assert {net.unet.dtype, net.adaptor.dtype, vae.dtype, again.dtype} == {torch.float16}
    assert same(net.adaptor.state_dict(), adaptor.state_dict()) and same(again.state_dict(), robust.state_dict())
    export_supir(tmp_path / "shards", tmp_path / "a.safetensors")
    export_supir(here.supir, tmp_path / "b.safetensors", torch.float16)
    assert same(load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "b.safetensors"))
    next((tmp_path / "shards" / "adaptor").glob("*-00002-of-*")).unlink()
    with pytest.raises(CheckpointError, match=r"has \d of its \d files of weights"):
        export_supir(tmp_path / "shards", tmp_path / "c.safetensors")


def test_plain_weights_beside_a_variant_are_the_default(here, tmp_path):
    adaptor, robust = assemble(here.sdxl)
    write(tmp_path / "both", adaptor, robust, here.sdxl)
    write(tmp_path / "both", adaptor.bfloat16(), robust.bfloat16(), here.sdxl, variant="bf16")
    for variant, dtype in ((None, torch.float32), ("bf16", torch.bfloat16)):
        export_supir(tmp_path / "both", tmp_path / f"{variant}.safetensors", variant=variant)
        assert {one.dtype for one in load_file(tmp_path / f"{variant}.safetensors").values()} == {dtype}


def test_a_folder_loads_in_bf16_and_its_image_matters(here):
    net, vae, robust = load(here.supir, torch.bfloat16)
    assert {net.unet.dtype, net.adaptor.dtype, vae.dtype, robust.dtype} == {torch.bfloat16}
    torch.manual_seed(0)
    noise, text, pooled = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 80), torch.randn(1, 48)
    rest = (text.bfloat16(), pooled.bfloat16(), torch.full((1, 6), 64.0))
    with torch.no_grad():
        latents = robust.latent(torch.rand(2, 3, 64, 64).bfloat16() * 2 - 1, vae)
        outputs = [net(noise.bfloat16(), torch.tensor([500]), latent[None], *rest, control_scale=scale).float()
                   for latent, scale in ((latents[0], 1.0), (latents[1], 1.0), (latents[0], 0.0))]
    assert all(torch.isfinite(output).all() for output in outputs)
    assert (outputs[0] - outputs[1]).abs().mean() > 0.02 and (outputs[0] - outputs[2]).abs().mean() > 0.1


def test_an_adaptor_that_the_authors_layout_cannot_hold_stays_ours(here, tmp_path):
    net, _, robust = load(here.supir)
    for options, words in (({"gated": True}, "gates"), ({"connector": "zero_conv"}, "zero convolutions")):
        write(tmp_path / words, SupirAdaptor.from_unet(net.unet, **options), robust, here.sdxl)
        with pytest.raises(CheckpointError, match=f"no place for {words}"):
            export_supir(tmp_path / words, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_a_prior_beside_the_folder_moves_with_it_and_one_that_went_is_named(here, tmp_path):
    for part in ("sdxl", "supir"):
        shutil.copytree(here.folder / part, tmp_path / "first" / part)
    assert read_index(tmp_path / "first" / "supir")["prior"] == "../sdxl"
    (tmp_path / "first").rename(tmp_path / "second")
    assert same(load(tmp_path / "second" / "supir")[0].unet.state_dict(), load(here.supir)[0].unet.state_dict())
    (tmp_path / "second" / "sdxl").rename(tmp_path / "gone")
    with pytest.raises(CheckpointError, match=rf"as '../sdxl', .* is at {tmp_path}/second/sdxl. Put it there, or"):
        load(tmp_path / "second" / "supir")
    assert export_supir(tmp_path / "second" / "supir", tmp_path / "a.safetensors") == len(parts(here.supir))


def test_a_prior_elsewhere_is_referred_to_by_its_whole_path_and_an_included_one_lies_inside(here, tmp_path):
    import_supir(here.supir_file, here.sdxl, tmp_path / "out")
    assert read_index(tmp_path / "out")["prior"] == str(here.sdxl.resolve())
    import_supir(here.supir_file, here.sdxl, tmp_path / "with", include_prior=True)
    (tmp_path / "with").rename(tmp_path / "moved")
    assert index_of(tmp_path / "moved")["prior"] == tmp_path / "moved" / "prior"
    assert same(stored(tmp_path / "moved" / "prior"), stored(here.sdxl))


@pytest.mark.parametrize(("text", "words"), [(None, "has no supir.json: .* was stopped"), ("{", "is damaged"),
                                             ('{"format": 1}', "lacks 'prior'"), ('{"format": 2}', "a later version")])
def test_a_folder_whose_index_is_not_right_says_how(tmp_path, text, words):
    if text:
        (tmp_path / "supir.json").write_text(text)
    with pytest.raises(CheckpointError, match=words):
        index_of(tmp_path)
