"""The commands: what they say, what they refuse, and that a run that dies leaves nothing half-made."""

import hashlib
import json
import multiprocessing
import shutil
import signal
import subprocess
import time
from pathlib import Path

import huggingface_hub
import pytest
import torch
from typer.testing import CliRunner

from clearshard import app
from models import tiny_llava
from models.supir_folder import write
from models.supir_index import LICENCE
from models.tiny_supir import assemble
from models.whole import whole
from tests.models.weights import full_size, in_process, load_file, same, save_file, sparse, stored


def models(*arguments, status=0):
    """Runs a command; returns what it said."""
    result = CliRunner().invoke(app, ["models", *map(str, arguments)])
    assert result.exit_code == status, result.output
    return " ".join(result.output.split())


def imported(here, out, *more, status=0, checkpoint=None, base=None):
    return models("import-supir", "--checkpoint", checkpoint or here.supir_file, "--base", base or here.sdxl, "--out",
                  out, *more, status=status)


def test_an_import_says_what_became_of_every_tensor_and_the_licence_once(here, tmp_path):
    extra = {"model.control_model.mask_LQ": torch.zeros(1, 4, 64, 64),
             "first_stage_model.post_quant_conv.bias": torch.zeros(4)}
    save_file(load_file(here.supir_file) | extra, tmp_path / "SUPIR-v0Q.safetensors")
    said = imported(here, tmp_path / "out", checkpoint=tmp_path / "SUPIR-v0Q.safetensors")
    assert said.count("non-commercial") == 1 and LICENCE in said
    assert "dropped: model.control_model.mask_LQ, a mask that nothing reads" in said
    assert "1 tensors that the checkpoint repeats are from the prior" in said and "1,1,2, the preset released" in said
    assert same(stored(tmp_path / "out"), stored(here.supir))


def test_a_licence_that_is_stated_goes_with_the_weights_through_an_export(here, tmp_path):
    assert "Licence: mine" in imported(here, tmp_path / "one", "--licence", "mine")
    models("export", tmp_path / "one", tmp_path / "mine.safetensors")
    assert "Licence: mine" in imported(here, tmp_path / "two", checkpoint=tmp_path / "mine.safetensors")
    assert "Licence: mine" in models("inspect", tmp_path / "mine.safetensors")


@pytest.mark.parametrize(("depth", "status", "words"), [
    ("released", 0, "the preset released"), ("1,1,2", 0, "preset"), ("paper", 1, "--depth released would fit"),
    ("relased", 2, "neither released, nor paper, nor numbers")])
def test_a_depth_is_a_preset_or_numbers_and_must_be_the_files(here, tmp_path, depth, status, words):
    assert words in imported(here, tmp_path / "out", "--depth", depth, status=status)
    assert (tmp_path / "out").exists() == (status == 0)


def test_what_is_there_is_replaced_only_if_forced_and_ours(here, tmp_path):
    imported(here, tmp_path / "out", "--dtype", "fp16")
    before = stored(tmp_path / "out")
    assert "--force replaces it" in imported(here, tmp_path / "out", status=1)
    save_file({"a": torch.zeros(1)}, tmp_path / "wrong.safetensors")
    imported(here, tmp_path / "out", "--force", checkpoint=tmp_path / "wrong.safetensors", status=1)
    assert same(stored(tmp_path / "out"), before)           # an error lost nothing
    imported(here, tmp_path / "out", "--force")
    assert same(stored(tmp_path / "out"), stored(here.supir))
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    assert "is no SUPIR folder" in imported(here, tmp_path / "mine", "--force", status=1)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years"


def test_an_import_into_its_own_sources_is_refused(here, tmp_path):
    imported(here, tmp_path / "out", "--include-prior")
    before = stored(tmp_path / "out")
    assert "would replace" in imported(here, tmp_path / "out", "--force", base=tmp_path / "out" / "prior", status=1)
    assert "outside it" in imported(here, here.sdxl / "supir", status=1)
    assert same(stored(tmp_path / "out"), before) and not (here.sdxl / "supir").exists()


@pytest.mark.parametrize("option", ["--checkpoint", "--base"])
def test_a_source_that_is_not_there_is_named(here, tmp_path, option):
    none = {option.removeprefix("--"): tmp_path / "none"}
    said = imported(here, tmp_path / "out", status=1, **none)
    assert f"{option} {tmp_path / 'none'} is not there" in said


@pytest.mark.skipif(not Path("/sys").is_dir(), reason="needs a place that nobody may write to")
def test_an_output_without_permission_is_one_line(here, tmp_path):
    (tmp_path / "file").write_text("x")
    for place in ("/sys/kernel/supir", tmp_path / "file" / "supir"):
        said = imported(here, place, status=1)
        assert said.startswith("error: [Errno") and str(Path(place).parent) in said and "Traceback" not in said
        assert "error:" in models("export", here.supir, f"{place}.safetensors", status=1)


def left(folder):
    return [path.name for path in folder.iterdir() if "unfinished" in path.name]


@pytest.fixture(scope="module")
def server():
    """Processes in which the libraries are loaded already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["models.supir_files", "tests.models.weights"])
    return context


@pytest.fixture
def started(here, server, tmp_path):
    """started(base, largest_file=None): an import into tmp_path/place/out, in a process; `said` is its file."""
    (tmp_path / "place").mkdir()

    def start(base, largest_file=None):
        process = server.Process(target=in_process, args=([
            "import-supir", "--checkpoint", str(here.supir_file), "--base", str(base), "--base-config", str(here.sdxl),
            "--out", str(tmp_path / "place" / "out")], str(tmp_path / "said"), largest_file))
        process.start()
        return process
    return start


def wait_for_its_folder(process, place):
    while not left(place) and process.is_alive():
        time.sleep(0.001)


@pytest.mark.slow
def test_a_killed_import_leaves_no_folder_and_the_next_one_cleans_up_after_it(here, tmp_path, started):
    process, place = started(here.sdxl_file), tmp_path / "place"
    wait_for_its_folder(process, place)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL and not (place / "out").exists() and len(left(place)) == 1
    imported(here, place / "out")
    assert [path.name for path in place.iterdir()] == ["out"]


@pytest.mark.slow
def test_a_told_stop_leaves_nothing(here, tmp_path, started):
    process, place = started(here.sdxl_file), tmp_path / "place"
    wait_for_its_folder(process, place)
    process.terminate()
    process.join()
    assert process.exitcode == 130 and list(place.iterdir()) == []
    assert "nothing half-made is left" in (tmp_path / "said").read_text()


@pytest.mark.slow
def test_a_disk_that_fills_up_is_one_line_and_leaves_nothing(here, tmp_path, started):
    process = started(here.sdxl, 1 << 20)           # the adaptor is larger
    process.join()
    said = (tmp_path / "said").read_text()
    assert process.exitcode == 1 and said.count("\n") == 1 and "error:" in said and "too large" in said
    assert list((tmp_path / "place").iterdir()) == []


def test_a_kill_between_two_renames_loses_neither_folder(here, tmp_path):
    imported(here, tmp_path / "out", "--dtype", "fp16")
    before, dead = stored(tmp_path / "out"), subprocess.Popen(["true"])
    dead.wait()
    unfinished = tmp_path / f".out-unfinished-{dead.pid}-x"
    unfinished.mkdir()
    (tmp_path / "out").rename(unfinished / "replaced")      # as far as the killed one came
    with whole(tmp_path / "out"):
        assert same(stored(tmp_path / "out"), before)
    assert not unfinished.exists()


def test_without_a_configuration_an_offline_machine_says_what_to_fetch(here, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    said = imported(here, tmp_path / "out", base=here.sdxl_file, status=1)
    assert "hf download stabilityai/stable-diffusion-xl-base-1.0" in said and "--base-config sdxl-config" in said
    assert not (tmp_path / "out").exists()
    cache = tmp_path / "hub" / "models--stabilityai--stable-diffusion-xl-base-1.0"
    shutil.copytree(here.sdxl, cache / "snapshots" / "0123abc", ignore=shutil.ignore_patterns("*.safetensors"))
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0123abc")
    imported(here, tmp_path / "out", base=here.sdxl_file)
    assert same(stored(tmp_path / "out" / "prior"), stored(here.sdxl))


def test_an_export_is_not_written_over_unless_forced(here, tmp_path):
    file = tmp_path / "deep" / "supir.safetensors"
    assert "tensors" in models("export", here.supir, file)
    assert file.read_bytes() == here.supir_file.read_bytes()
    assert "--force replaces it" in models("export", here.supir, file, "--dtype", "bf16", status=1)
    assert file.read_bytes() == here.supir_file.read_bytes()
    models("export", here.supir, file, "--dtype", "bf16", "--force")
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.bfloat16}
    assert "only .safetensors" in models("export", here.supir, tmp_path / "a.ckpt", status=1)
    assert "has no supir.json" in models("export", here.sdxl, tmp_path / "a.safetensors", status=1)
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_a_folder_of_ours_is_described_with_its_prior(here, tmp_path):
    about = json.loads(models("inspect", here.supir, "--json"))
    assert about["family"] == "SUPIR" and about["licence"] == "none: random numbers"
    assert (about["prior"], about["prior_there"], about["prior_changed"]) == ("../sdxl", True, False)
    for part, name in (("adaptor", "SupirAdaptor"), ("robust_encoder", "RobustEncoder")):
        tensors = load_file(here.supir / part / "diffusion_pytorch_model.safetensors").values()
        one = about["parts"][part]
        assert one["parameters"] == sum(tensor.numel() for tensor in tensors) and one["class"] == name
        assert one["dtypes"] == ["float32"] and len(one["fingerprint"]) == 12
    said = models("inspect", here.supir)
    assert "prior: ../sdxl, as it was" in said and f"{about['parts']['adaptor']['parameters']:,} parameters" in said
    for part in ("sdxl", "supir"):
        shutil.copytree(here.folder / part, tmp_path / part)
    (tmp_path / "sdxl" / "unet" / "config.json").open("a").write("\n")
    assert "../sdxl, changed since the import" in models("inspect", tmp_path / "supir")
    shutil.rmtree(tmp_path / "sdxl")
    assert "../sdxl, not there" in models("inspect", tmp_path / "supir")


def test_a_variant_beside_plain_weights_is_named_and_not_counted_twice(here, tmp_path):
    adaptor, robust = assemble(here.sdxl)
    write(tmp_path / "both", adaptor, robust, here.sdxl)
    write(tmp_path / "both", adaptor.half(), robust.half(), here.sdxl, variant="fp16", max_shard_size="500KB")
    one = json.loads(models("inspect", tmp_path / "both", "--json"))["parts"]["adaptor"]
    assert one["parameters"] == sum(tensor.numel() for tensor in adaptor.parameters())
    assert (one["dtypes"], one["variants"]) == (["float32"], ["fp16"])


def test_a_file_of_supir_is_described_part_by_part(here, tmp_path):
    sizes = full_size("v0", "extra_in_v0Q")
    about = json.loads(models("inspect", sparse(tmp_path / "small.safetensors", {
        name: shape for name, shape in sizes.items() if torch.Size(shape).numel() < 5000}), "--json"))
    assert about["family"] == "SUPIR v0 layout" and about["licence"] == LICENCE
    assert set(about["parts"]) == {"control copy", "connectors", "robust encoder"}
    assert about["sha256"] == hashlib.sha256((tmp_path / "small.safetensors").read_bytes()).hexdigest()
    said = models("inspect", here.supir_file)
    assert "SUPIR v0 layout" in said and "none: random numbers" in said


def test_other_models_are_named_by_family(here, tmp_path):
    tiny_llava.untrained()[0].save_pretrained(tmp_path / "llava")
    torch.save(load_file(here.sdxl_file), tmp_path / "sdxl.ckpt")
    save_file({"a": torch.zeros(2, 3)}, tmp_path / "odd.safetensors")
    for place, family in ((here.sdxl, "SDXL"), (here.sdxl / "unet", "SDXL"), (tmp_path / "llava", "LLaVA"),
                          (here.sdxl_file, "SDXL"), (tmp_path / "sdxl.ckpt", "SDXL"), (tmp_path / "odd.safetensors",
                                                                                        "unknown")):
        assert json.loads(models("inspect", place, "--json"))["family"] == family
    assert "OpenRAIL++-M" in models("inspect", here.sdxl)
    assert "others: tensors, 6 parameters, float32" in models("inspect", tmp_path / "odd.safetensors")
    (tmp_path / "empty").mkdir()
    assert "no folder of a model" in models("inspect", tmp_path / "empty", status=1)
    assert "is not there" in models("inspect", tmp_path / "none", status=1)
