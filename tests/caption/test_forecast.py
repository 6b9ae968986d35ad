"""`clearshard plan`: its arithmetic against published and reckoned figures, and its ratios against real workspaces."""

import io
import json
import math
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from caption import forecast_commands
from caption.arithmetic import CAPTIONERS, USABLE, replica, sdxl_tflop
from caption.assumptions import ARITHMETIC, ASSUMED, EFFICIENCY, MEASURED, Assumption
from caption.cards import CARDS, find_card
from caption.config import Negatives
from caption.forecast import NO_GPU, REMEDY, Forecast, JobPlan, Observation, Setting, forecast, tar_bytes
from caption.observed import observe, seconds_per_row
from caption.speeds import Captioning, Machine, Run
from degrade.strict import ConfigError
from pipeline import config
from pipeline.config import Corpus
from pipeline.dedup import DedupJob
from pipeline.ingest import ingest
from pipeline.manifest import publish
from pipeline.plan import PlanJob
from pipeline.score import ScoreJob
from pipeline.selection import SelectJob
from pipeline.shards import ShardJob
from pipeline.storage import Folder
from pipeline.tar import END, TarWriter
from pipeline.tile import TileJob
from tests.conftest import configure, rows_of_table, tars

H200, LLAVA_13B = CARDS["H200"], CAPTIONERS["llava-1.5-13b"]


# The arithmetic. The figures are those that the project plans with: H200 at 790 TFLOP/s and 4.8 TB/s.

@pytest.mark.parametrize(("tokens", "per_second", "hours"), [(100, 27.7, 200), (200, 18.6, 298), (256, 15.5, 359)])
def test_llava_13b_on_an_h200_captions_as_fast_as_reckoned(tokens, per_second, hours):
    ideal = replica(LLAVA_13B, tokens, H200)
    assert ideal.captions_per_s == pytest.approx(per_second, rel=0.02)
    assert 20e6 / ideal.captions_per_s / 3600 == pytest.approx(hours, rel=0.02)


def test_llava_13b_reads_an_image_in_16_tflop_and_keeps_0_82_megabytes_a_token():
    assert LLAVA_13B.vision.tflop == pytest.approx(0.38, rel=0.02)
    assert LLAVA_13B.prefill_tflop - LLAVA_13B.vision.tflop == pytest.approx(16.3, rel=0.01)
    assert LLAVA_13B.kv_bytes == pytest.approx(0.82e6, rel=0.01)
    assert 100 < replica(LLAVA_13B, 200, H200).batch < 200


@pytest.mark.parametrize(("name", "billions"), [
    ("llava-1.5-7b", 7.06), ("llava-1.5-13b", 13.35), ("llava-v1.6-mistral-7b", 7.57),
    ("llava-onevision-qwen2-7b", 8.03)])
def test_captioners_have_the_parameters_of_their_checkpoints(name, billions):
    assert CAPTIONERS[name].parameters == pytest.approx(billions * 1e9, rel=0.01)


@pytest.mark.parametrize(("mode", "steps", "hours"), [
    ("text_to_image", 30, 14.6), ("text_to_image", 50, 24.1),
    ("image_to_image", 30, 7.7), ("image_to_image", 50, 12.4)])
def test_a_hundred_thousand_sdxl_images_take_the_reckoned_h200_hours(mode, steps, hours):
    assert 100_000 * sdxl_tflop(mode, steps) / H200.tflops / 3600 == pytest.approx(hours, rel=0.01)


def test_sdxl_at_512_pixels_costs_what_was_counted_there():
    assert sdxl_tflop("text_to_image", 1, size=512) == pytest.approx(2 * 1.589 + 2.515)
    assert sdxl_tflop("image_to_image", 10, 1.0, 512) == pytest.approx(20 * 1.589 + 2.515 + 1.117)


@pytest.mark.parametrize("card", CARDS.values(), ids=lambda card: card.name)
@pytest.mark.parametrize("model", CAPTIONERS.values(), ids=lambda model: model.name)
def test_a_replica_is_the_fewest_cards_that_hold_it_and_longer_captions_take_longer(model, card):
    held = replica(model, 200, card)
    needed = held.weights_gb * 1e9 + model.kv_bytes * (model.prompt_tokens + 200)
    assert held.batch >= 1
    assert needed <= USABLE * held.gpus * card.memory_gb * 1e9
    assert needed > USABLE * (held.gpus - 1) * card.memory_gb * 1e9
    assert replica(model, 100, card).per_gpu > held.per_gpu > replica(model, 400, card, "none").per_gpu


def test_smaller_weights_need_fewer_cards():
    assert [replica(LLAVA_13B, 200, CARDS["L4"], held).gpus for held in ("none", "8bit", "4bit")] == [2, 1, 1]


# Cards

@pytest.mark.parametrize(("said", "name"), [
    ("NVIDIA H200", "H200"), ("h200", "H200"), ("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA H100 PCIe", "H100-PCIe"),
    ("NVIDIA A100-SXM4-80GB", "A100-80"), ("NVIDIA A100 80GB PCIe", "A100-80-PCIe"), ("NVIDIA RTX A6000", "A6000"),
    ("NVIDIA GeForce RTX 4090", "RTX 4090"), ("rtx4090", "RTX 4090"), ("NVIDIA L40S", "L40S"),
    ("GeForce-RTX-4090", "RTX 4090"), ("A100", "A100-80"), ("A100-40G", "A100-40"), ("RTX-A6000", "A6000")])
def test_a_card_is_known_by_what_its_driver_or_ray_calls_it(said, name):
    assert find_card(said).name == name


@pytest.mark.parametrize("said", ["H20", "", "A100-800", "TPU"])
def test_an_unknown_card_is_refused_with_all_that_are_known(said):
    with pytest.raises(ConfigError, match=r"not known.*There are: H200, H100,"):
        find_card(said)


def test_no_card_attains_more_than_is_printed_for_it():
    assert all(0.5 * card.printed_tflops < card.tflops < card.printed_tflops for card in CARDS.values())
    assert find_card("H200").tflops == 790


# The forecast, from numbers

def planned(corpus: Corpus | None = None, *, images: int = 1_000_000, cpus: int = 8, gpus: int = 4, card: str = "H200",
            captioning: bool = True, negatives: Negatives | None = None, **seen: object) -> Forecast:
    given = {"images": Assumption("images", images, "images", "given", "test")}
    return forecast(Setting(corpus or Corpus(), Observation(**seen), Machine(cpus, gpus, CARDS[card]),
                            Captioning(LLAVA_13B) if captioning else None, negatives, given))


def job(result: Forecast, name: str) -> JobPlan:
    return next(each for each in result.jobs if each.name == name)


def known(**values: float) -> dict[str, Assumption]:
    return {name.replace("_", " "): Assumption(name.replace("_", " "), value, "", MEASURED, "test")
            for name, value in values.items()}


def test_twenty_million_images_take_twenty_times_what_one_million_takes():
    one, twenty = planned(), planned(images=20_000_000)
    for small, large in zip(one.jobs, twenty.jobs, strict=True):
        assert (large.rows, large.shards) == (20 * small.rows, 20 * small.shards)
        assert large.hours == pytest.approx(20 * small.hours)
        assert large.bytes == pytest.approx(20 * small.bytes, rel=1e-6)


def test_a_cpu_job_gets_faster_with_cores_and_a_serial_one_does_not():
    runs = {name: Run(rows=640, seconds=20.0, cpus=2) for name in ("score", "select")}
    result = planned(runs=runs, cpus=8)
    assert (job(result, "score").rate, job(result, "select").rate) == (pytest.approx(128), pytest.approx(32))
    assert job(result, "score").cpu_hours == pytest.approx(8 * job(result, "score").hours)
    assert job(result, "select").cpu_hours == pytest.approx(job(result, "select").hours)
    assert "640 rows in 20.0 s on 2 cores" in [each.source for each in result.assumptions]


def test_few_shards_keep_few_cores_busy():
    runs = {"shard": Run(rows=100, seconds=10.0, cpus=1)}
    result = planned(images=1000, captioning=False, runs=runs, cpus=64,
                     known=known(kept_share=1, tiles_per_kept_image=2))
    assert (job(result, "shard").shards, job(result, "shard").rate) == (2, pytest.approx(20))


def test_an_unmeasured_gpu_job_takes_twice_the_ideal_time():
    result = planned(images=20_000_000, known=known(kept_share=1, tiles_per_kept_image=1))
    ideal = 20e6 / replica(LLAVA_13B, 200, H200).captions_per_s / 3600
    assert EFFICIENCY == 0.5
    assert job(result, "caption").gpu_hours == pytest.approx(2 * ideal)
    assert job(result, "caption").hours == pytest.approx(2 * ideal / 4)
    assert {each.name: each.origin for each in result.assumptions}["caption rate"] == ARITHMETIC


def test_a_rate_of_the_same_card_is_taken_as_it_was_measured():
    runs = {"caption": Run(rows=1000, seconds=50.0, gpus=2, card="NVIDIA H200")}
    assert job(planned(runs=runs), "caption").rate == pytest.approx(40)


def test_a_rate_of_another_card_is_scaled_by_the_arithmetic_and_said_so():
    runs = {"caption": Run(rows=1000, seconds=50.0, gpus=2, card="NVIDIA A100-SXM4-80GB")}
    result = planned(runs=runs)
    ratio = replica(LLAVA_13B, 200, H200).per_gpu / replica(LLAVA_13B, 200, CARDS["A100-80"]).per_gpu
    assert job(result, "caption").rate == pytest.approx(40 * ratio)
    rate = next(each for each in result.assumptions if each.name == "caption rate")
    assert f"times {ratio:.2f}, the arithmetic's ratio of H200" in rate.source


@pytest.mark.parametrize("run", [Run(rows=99, seconds=1.0, cpus=2), Run(rows=99, seconds=1.0, gpus=1, card="TPU v5")])
def test_a_run_that_says_nothing_about_cards_is_not_used_and_reported(run):
    result = planned(runs={"caption": run})
    assert job(result, "caption").rate == job(planned(), "caption").rate
    assert any(text.startswith("caption ") for text in result.warnings)


def test_a_metric_is_unknown_until_it_was_measured_and_the_total_says_so():
    corpus = Corpus.model_validate({"score": {"metrics": [{"name": "niqe", "kind": "pyiqa", "model": "niqe"}]}})
    unmeasured = planned(corpus)
    assert (job(unmeasured, "metric-niqe").hours, job(unmeasured, "metric-niqe").note) == (None, REMEDY)
    assert "metric-niqe" in unmeasured.totals.note
    measured = planned(corpus, runs={"metric-niqe": Run(rows=200, seconds=100.0, cpus=1)})
    assert job(measured, "metric-niqe").rate == pytest.approx(16)
    assert measured.totals.note == ""
    assert measured.totals.hours == pytest.approx(sum(each.hours for each in measured.jobs))


def test_without_gpus_the_other_jobs_are_planned_and_it_is_said():
    result = planned(gpus=0)
    assert (job(result, "caption").hours, job(result, "caption").note) == (None, NO_GPU)
    assert all(each.hours > 0 for each in result.jobs if each.name != "caption")
    assert any("caption: needs GPUs" in text for text in result.warnings)


def test_a_model_that_does_not_fit_gets_more_gpus_per_replica_and_a_remedy():
    result = planned(card="L4", gpus=5)
    assert any("does not fit into one L4" in text and "leaves 1 of 5 idle" in text and "8bit" in text
               for text in result.warnings)
    ideal = replica(LLAVA_13B, 200, CARDS["L4"])
    assert job(result, "caption").rate == pytest.approx(EFFICIENCY * 2 * ideal.captions_per_s)
    single = planned(card="L4", gpus=1)
    assert job(single, "caption").rate == pytest.approx(EFFICIENCY * ideal.captions_per_s)
    assert any("although --gpus is 1" in text for text in single.warnings)


def test_shards_are_counted_per_group_and_those_of_negatives_are_added():
    result = planned(images=1000, negatives=Negatives(model="SDXL", count=1500), groups={"hq": 0.7, "face": 0.3},
                     known=known(kept_share=1, tiles_per_kept_image=1))
    assert (job(result, "shard").shards, job(result, "shard").rows) == (1 + 1 + 2, 2500)


def test_finished_shards_say_what_a_sample_weighs_and_captions_come_on_top():
    size = {"bytes_per_sample": 100_000.0, "kept_share": 1.0, "tiles_per_kept_image": 1.0}
    bare, more = (job(planned(captioning=each, known=known(**size)), "shard").bytes for each in (False, True))
    with_captions = job(planned(known=known(caption_bytes=700, **size)), "shard").bytes
    assert more - bare == 1_000_000 * tar_bytes(200 * 4)
    assert with_captions == bare


def test_no_images_at_all_are_a_forecast_of_zero():
    result = planned(known=known(decoded_share=0))
    assert job(result, "shard").rows == job(result, "shard").shards == job(result, "shard").hours == 0
    assert math.isfinite(result.totals.hours)


def test_the_bytes_of_a_tar_are_those_that_the_writer_writes(tmp_path):
    sizes = np.random.default_rng(0).integers(0, 3000, (20, 3)).tolist()
    with TarWriter(str(tmp_path / "a.tar")) as writer:
        for number, sample in enumerate(sizes):
            writer.add([(f"{number}.{place}", bytes(size)) for place, size in enumerate(sample)])
    data = (tmp_path / "a.tar").read_bytes()
    assert len(data) == sum(tar_bytes(*sample) for sample in sizes) + len(END)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert len(tar.getnames()) == 60


# A workspace

def complete(workspace) -> None:
    """Every stage, in this process."""
    folder = Folder.at(str(workspace))
    corpus = config.load(folder)
    ingest(folder, corpus)
    jobs = (lambda: ScoreJob(folder, corpus.score), lambda: DedupJob(folder, corpus.dedup),
            lambda: SelectJob(folder, corpus), lambda: TileJob(folder, corpus), lambda: PlanJob(folder, corpus),
            lambda: ShardJob(folder, corpus))
    for make in jobs:
        stage = make()
        for unit in stage.pending():
            stage.run(unit)
    publish(folder, corpus)


@pytest.fixture
def corpus(pile, tmp_path):
    return configure(tmp_path / "corpus", pile)


def plan(*arguments: object):
    app = typer.Typer()
    forecast_commands.register(app)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def data(*arguments: object) -> dict:
    result = plan(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def by_name(found: dict) -> dict[str, dict]:
    return {each["name"]: each for each in found["jobs"]}


def test_the_forecast_of_a_finished_corpus_is_that_corpus(corpus):
    complete(corpus)
    jobs = by_name(data(corpus))
    tiles = [tile for row in rows_of_table(corpus, "tiles") for tile in row["tiles"]]
    assert jobs["ingest"]["rows"] == len(rows_of_table(corpus, "sources"))
    assert jobs["dedup"]["rows"] == len(rows_of_table(corpus, "scores")) < jobs["ingest"]["rows"]
    assert jobs["tile"]["rows"] == sum(row["kept"] for row in rows_of_table(corpus, "selection"))
    assert jobs["shard"]["rows"] == len(tiles) > 0
    assert jobs["shard"]["shards"] == len(tars(corpus))
    weight = sum(map(len, tars(corpus).values()))
    assert weight < jobs["shard"]["bytes"] < weight + (300 * len(tiles) + len(END) * len(tars(corpus))) + 1
    assert all(jobs[name]["hours"] > 0 for name in ("score", "tile", "shard"))


def test_planning_writes_nothing(corpus):
    complete(corpus)
    def files() -> dict:
        return {path: path.stat().st_mtime_ns for path in corpus.rglob("*")}
    before = files()
    data(corpus, "--images", 20_000_000, "--gpus", 8)
    assert files() == before


def test_rates_of_a_sample_are_timed_where_no_run_was_recorded(corpus):
    complete(corpus)
    origins = {each["name"]: each["origin"] for each in data(corpus)["assumptions"]}
    assert [origins[f"{name} rate"] for name in ("score", "tile", "shard")] == [MEASURED] * 3
    (corpus / "reports").mkdir(exist_ok=True)
    (corpus / "reports" / "rates.json").write_text(json.dumps({"score": {"rows": 300, "seconds": 10, "cpus": 3}}))
    found = data(corpus, "--cpus", 6)
    assert by_name(found)["score"]["rate"] == pytest.approx(60)
    assert data(corpus)["machine"]["cpus"] == 3


def test_rows_that_fail_are_not_timed():
    def fails(row: dict) -> None:
        raise FileNotFoundError(row)
    assert seconds_per_row(fails, [{}] * 9) is None
    assert seconds_per_row(lambda row: None, []) is None
    assert 0 <= seconds_per_row(lambda row: None, [{}] * 9) < 0.1


def test_a_sample_that_was_cut_off_by_a_limit_is_not_taken_for_losses(corpus):
    folder = Folder.at(str(corpus))
    ingest(folder, config.load(folder))
    stage = ScoreJob(folder, config.load(folder).score)
    for unit in stage.pending()[:3]:
        stage.run(unit)
    scored, failed = len(rows_of_table(corpus, "scores")), len(rows_of_table(corpus, "quarantine/score"))
    share = observe(folder, config.load(folder)).known["decoded share"].value
    assert scored + failed == 3
    assert share == pytest.approx(scored / 3)


def test_a_workspace_with_nothing_but_its_configuration_gets_a_forecast_from_stated_assumptions(corpus):
    found = data(corpus)
    assert by_name(found)["ingest"]["rows"] == 1_000_000
    assert {each["origin"] for each in found["assumptions"]} == {ASSUMED}
    assert all(each["source"] for each in found["assumptions"])
    assert by_name(found)["score"]["note"] == REMEDY
    assert "caption" not in by_name(found)


def test_asking_for_gpus_plans_captions_and_negatives_that_are_not_configured(corpus):
    found = data(corpus, "--images", 20_000_000, "--gpus", 8, "--card", "h100", "--caption-tokens", 100)
    jobs = by_name(found)
    assert jobs["negatives"]["rows"] == 100_000
    assert jobs["caption"]["gpu_hours"] == pytest.approx(8 * jobs["caption"]["hours"])
    assert found["machine"]["card"] == "H100"
    assert found["totals"]["gpu_hours"] == pytest.approx(jobs["caption"]["gpu_hours"] + jobs["negatives"]["gpu_hours"])


def test_configured_captions_and_negatives_are_planned_as_configured(pile, tmp_path):
    workspace = configure(tmp_path / "corpus", pile, extra=(
        "caption: {transformers: {model: /models/llava-1.5-7b-hf, quantisation: 8bit}, prompt: short}\n"
        "negatives: {model: /models/sdxl, count: 700, mode: text_to_image, steps: 20}\n"))
    found = data(workspace)
    values = {each["name"]: each["value"] for each in found["assumptions"]}
    assert (values["caption model"], values["caption tokens"], found["machine"]["gpus"]) == ("llava-1.5-7b", 80, 1)
    assert values["operations of a negative"] == pytest.approx(sdxl_tflop("text_to_image", 20))
    assert by_name(found)["negatives"]["rows"] == 700
    held = replica(CAPTIONERS["llava-1.5-7b"], 80, H200, "8bit")
    assert by_name(found)["caption"]["rate"] == pytest.approx(EFFICIENCY * held.captions_per_s)
    without = plan(workspace, "--gpus", 0)
    assert (without.exit_code, "needs GPUs, and --gpus is 0" in without.stderr) == (0, True)


@pytest.mark.parametrize("text", [
    "{", "[]", "\xff", '{"score": 5}', '{"score": {"rows": 0, "seconds": 1}}', '{"score": {"rows": 9, "seconds": 0}}',
    '{"score": {"rows": 9}}', '{"score": {"rows": "many", "seconds": 1}}', '{"score": {"rows": 9, "seconds": NaN}}'])
def test_damaged_rates_are_a_warning_that_names_the_file(corpus, text):
    (corpus / "reports").mkdir()
    (corpus / "reports" / "rates.json").write_text(text, encoding="latin-1")
    result = plan(corpus)
    assert result.exit_code == 0, result.output
    assert "rates.json" in result.stderr
    assert "not used" in result.stderr


@pytest.mark.parametrize(("options", "said"), [
    (["--card", "H20"], "did you mean 'H200'"),
    (["--caption-model", "llava-1.5-31b"], "did you mean 'llava-1.5-13b'"),
    (["--images", "0"], "--images"),
    (["--gpus", "-1"], "--gpus")])
def test_a_wrong_option_is_refused_with_what_would_be_right(corpus, options, said):
    result = plan(corpus, *options)
    assert (result.exit_code, said in result.stderr) == (2, True), result.output


@pytest.mark.parametrize(("extra", "said"), [
    ("caption: {transformers: {modell: x}}", "modell"), ("negatives: {model: x, step: 3}", "steps"),
    ("caption: {transformers: {model: x}, prompt: supri}", "supir")])
def test_a_wrong_section_is_refused_with_the_nearest_key(pile, tmp_path, extra, said):
    result = plan(configure(tmp_path / "corpus", pile, extra=extra))
    assert (result.exit_code, said in result.stderr) == (2, True), result.output


def test_the_table_shows_every_job_the_total_and_what_was_assumed(corpus):
    result = plan(corpus, "--images", 20_000_000, "--gpus", 8, "--cpus", 64)
    assert result.exit_code == 0
    starts = [line.split()[0] for line in result.stdout.splitlines() if line.strip()]
    for name in ("ingest", "score", "dedup", "select", "tile", "caption", "negatives", "plan", "shard", "total"):
        assert name in starts
    assert "20,000,000 images on 64 cores and 8 x H200" in result.stdout
    assert "790  TFLOP/s" in result.stdout
    assert REMEDY in result.stdout


def test_planning_loads_no_torch():
    program = "import sys, caption.forecast_commands; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
