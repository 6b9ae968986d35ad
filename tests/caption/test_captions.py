"""The caption job: every tile its own caption, once, whatever happens in between."""

import json
import shutil
import tarfile

import pyarrow.parquet as pq
import pytest

from caption.captions import CaptionJob, place, slices
from caption.config import captions_of
from models.fingerprint import fingerprint
from models.tiny_llava import PHOTOGRAPHS, QUESTIONS, sample_photographs
from pipeline import config
from pipeline.config import ConfigError
from pipeline.jobs import limited
from pipeline.plan import captions
from pipeline.storage import Folder
from pipeline.tables import QUARANTINE, Table
from tests.conftest import LOOSE, clearshard

OPEN = LOOSE[:-1] + ", clipped_dark: {max: 1}, clipped_bright: {max: 1}}"
STAGES = ("ingest", "score", "dedup", "select", "tile")
SENTENCE = '{name: sentence, question: "Describe this image in one sentence.", max_new_tokens: 40, min_words: 4}'
SHORT = {name: one.short for name, one in PHOTOGRAPHS.items()}
LONG = {name: one.long for name, one in PHOTOGRAPHS.items()}


@pytest.fixture(scope="session")
def photographs(tmp_path_factory):
    """The ten that the tiny model knows, small enough for quick tests."""
    folder = tmp_path_factory.mktemp("photographs")
    for name, image in sample_photographs().items():
        image.thumbnail((360, 360))
        image.save(folder / f"{name.partition('.')[0]}.png")
    return folder


def write(workspace, photographs, models, prompt=SENTENCE, extra="", more=""):
    """A corpus.yaml whose tiles are whole photographs."""
    workspace.mkdir(parents=True, exist_ok=True)
    (workspace / "corpus.yaml").write_text(f"""
sources: [{{uri: {str(photographs)!r}}}]
select: {{min_side: 64, facts: {OPEN}{more}}}
tile: {{mode: whole, size: 192, min_texture: 0}}
shard: {{samples: 4}}
caption:
  transformers: {{model: {models}/llava, batch_size: 4, device: cpu}}
  prompt: {prompt}
  {extra}
""")
    return workspace


def table(workspace):
    """Rows of the captions by photograph."""
    folder = Folder.at(str(workspace))
    rows = captions(folder, config.load(folder)).dataset().to_table().to_pylist()
    manifest = workspace / "shards" / "manifest.parquet"
    names = {row["key"]: row["uri"].rpartition("/")[2].partition(".")[0]
             for row in pq.read_table(manifest).to_pylist()} if manifest.exists() else {}
    return {names.get(row["key"], row["key"]): row for row in rows}, len(rows)


def quarantined(workspace):
    folder = Folder.at(str(workspace)) / "quarantine" / "caption"
    return {row["name"]: row["error"] for row in Table(folder, QUARANTINE).dataset().to_table().to_pylist()}


@pytest.fixture(scope="module")
def captioned(tmp_path_factory, photographs, tiny_models, ray_here):
    """A finished workspace, not to be changed."""
    workspace = write(tmp_path_factory.mktemp("w") / "corpus", photographs, tiny_models,
                      extra=f"tokenizer: {tiny_models}/sdxl/tokenizer")
    from clearshard import ORDER
    from pipeline.cluster import Cluster
    from pipeline.stages import Session
    folder = Folder.at(str(workspace))
    session = Session(folder, config.load(folder), Cluster())
    for stage in ORDER:
        if stage.configured(session.corpus):
            stage.run(session)
    return workspace


def job(workspace, **options):
    folder = Folder.at(str(workspace))
    corpus = config.load(folder)
    return CaptionJob(folder, corpus, fingerprint(captions_of(corpus).transformers.model), **options)


class Counted:
    """The real backend, with a count of what it is asked."""

    def __init__(self, backend):
        self.backend, self.asked = backend, []

    def answers(self, rows, sampling, one_by_one):
        self.asked += [row["name"] for row in rows]
        return self.backend.answers(rows, sampling, one_by_one)


@pytest.fixture
def counted(monkeypatch):
    """Runs the job in this process and says what the model was asked."""
    from caption import captions as module

    def run(workspace, limit=None, **options):
        done = job(workspace, **options)
        real = Counted(module.backend(done.config, done.corpus.score))
        monkeypatch.setattr(done, "_backend", lambda: real)
        for unit in limited(done.pending(), limit):
            done.run(unit)
        return sorted(real.asked)
    return run


def test_every_photograph_gets_its_own_caption_once_and_the_shards_have_it(captioned):
    rows, count = table(captioned)
    assert count == 10
    assert {name: rows[name.partition(".")[0]]["caption"] for name in SHORT} == SHORT
    one = rows["rocket"]
    assert one["flags"] == [] and one["attempts"] == 1 and one["finish_reason"] == "stop"
    assert one["short"] == one["caption"] and one["tokens"] > one["caption"].count(" ")
    written = {}
    for path in (captioned / "shards").glob("hq-*.tar"):
        with tarfile.open(path) as tar:
            texts = {m.name: tar.extractfile(m).read() for m in tar if not m.name.endswith(".jpg")}
        for about in (json.loads(texts[name]) for name in texts if name.endswith(".json")):
            written[about["name"].partition(".")[0]] = texts[about["key"] + ".txt"], about
    assert {name: text.decode() for name, (text, _) in written.items()} == {
        name.partition(".")[0]: text for name, text in SHORT.items()}
    provenance = written["rocket"][1]
    assert provenance["caption_model"].startswith("llava@") and provenance["caption_prompt"] == "sentence"
    assert provenance["caption_short"] == SHORT["rocket.jpg"] and provenance["caption_flags"] == []


def test_a_second_run_has_nothing_to_do(captioned):
    assert job(captioned).pending() == []


def test_another_prompt_asks_all_again_and_other_wording_none(tmp_path, photographs, tiny_models, run, counted):
    workspace = write(tmp_path / "w", photographs, tiny_models)
    run(workspace, *STAGES)
    assert len(counted(workspace)) == 10
    write(workspace, photographs, tiny_models, extra=f"tokenizer: {tiny_models}/sdxl/tokenizer")
    assert len(job(workspace).pending()) and counted(workspace) == []
    rows, _ = table(workspace)
    assert all(row["tokens"] and row["short"] for row in rows.values())
    write(workspace, photographs, tiny_models, prompt=SENTENCE.replace(QUESTIONS[1], QUESTIONS[0]))
    assert len(counted(workspace)) == 10
    assert {row["caption"] for row in table(workspace)[0].values()} == set(LONG.values())


def test_a_new_image_is_asked_about_and_no_other(tmp_path, photographs, tiny_models, run, counted):
    some = tmp_path / "some"
    some.mkdir()
    for name in ("rocket", "coffee"):
        (some / f"{name}.png").write_bytes((photographs / f"{name}.png").read_bytes())
    workspace = write(tmp_path / "w", some, tiny_models)
    run(workspace, *STAGES)
    assert counted(workspace) == ["coffee.png", "rocket.png"]
    (some / "retina.png").write_bytes((photographs / "retina.png").read_bytes())
    run(workspace, *STAGES)
    assert counted(workspace) == ["retina.png"]


def test_captions_under_another_name_leave_the_first_as_they_are(tmp_path, photographs, tiny_models, run, counted):
    workspace = write(tmp_path / "w", photographs, tiny_models)
    run(workspace, *STAGES)
    assert len(counted(workspace)) == 10
    write(workspace, photographs, tiny_models, extra="name: other")
    assert len(counted(workspace)) == 10
    write(workspace, photographs, tiny_models)
    assert counted(workspace) == []


def test_a_question_with_fields_of_the_row_is_filled_for_each(tmp_path, photographs, tiny_models, run, counted):
    (tmp_path / "images.csv").write_text(
        f"uri,alt,licence\n{photographs}/rocket.png,A <b>launch</b> pad,\n{photographs}/coffee.png,,CC0\n")
    workspace = write(tmp_path / "w", tmp_path / "images.csv", tiny_models,
                      prompt=SENTENCE.replace("in one sentence.", "in one sentence. [Its text: {alt_text}.]"))
    run(workspace, *STAGES)
    counted(workspace)
    assert {row["question"] for row in table(workspace)[0].values()} == {
        QUESTIONS[1], f"{QUESTIONS[1]} Its text: A blaunch/b pad."}


def test_flagged_answers_are_asked_again_and_keep_their_flag(tmp_path, photographs, tiny_models, run, counted):
    workspace = write(tmp_path / "w", photographs, tiny_models, prompt=SENTENCE.replace("tokens: 40", "tokens: 3"))
    run(workspace, *STAGES)
    assert len(counted(workspace)) == 20        # each twice
    rows = table(workspace)[0].values()
    assert all("truncated" in row["flags"] and row["attempts"] == 2 and row["caption"] for row in rows)


def test_select_keeps_flagged_tiles_out_of_the_shards_or_not(tmp_path, photographs, tiny_models, run, counted):
    workspace = write(tmp_path / "w", photographs, tiny_models, prompt=SENTENCE.replace("words: 4", "words: 8"),
                      extra="retry: null", more=", caption_flags: [too_short]")
    run(workspace, *STAGES)
    counted(workspace)
    run(workspace, "shard")
    flagged = {row["key"] for row in table(workspace)[0].values() if row["flags"]}
    samples = set(pq.read_table(workspace / "shards" / "manifest.parquet")["key"].to_pylist())
    assert 0 < len(flagged) < 10 and len(samples) == 10 - len(flagged) and not samples & flagged
    write(workspace, photographs, tiny_models, prompt=SENTENCE.replace("words: 4", "words: 8"), extra="retry: null",
          more=", caption_flags: []")
    run(workspace, "shard")
    assert pq.read_table(workspace / "shards" / "manifest.parquet").num_rows == 10


def test_an_image_that_is_gone_or_changed_is_quarantined_and_retried(tmp_path, photographs, tiny_models, run, counted):
    some = tmp_path / "some"
    some.mkdir()
    for name in ("rocket", "coffee", "camera"):
        (some / f"{name}.png").write_bytes((photographs / f"{name}.png").read_bytes())
    workspace = write(tmp_path / "w", some, tiny_models)
    run(workspace, *STAGES)
    rocket = (some / "rocket.png").read_bytes()
    (some / "rocket.png").unlink()
    (some / "coffee.png").write_bytes(rocket)
    counted(workspace)
    assert quarantined(workspace) == {"rocket.png": "not_found", "coffee.png": "changed"}
    assert [row["caption"] for row in table(workspace)[0].values()] == [SHORT["camera.png"]]
    assert job(workspace).pending() == []
    (some / "rocket.png").write_bytes(rocket)
    assert counted(workspace, retry_errors=True) == ["coffee.png", "rocket.png"]
    assert quarantined(workspace) == {"coffee.png": "changed"}
    assert {row["caption"] for row in table(workspace)[0].values()} == {SHORT["camera.png"], SHORT["rocket.jpg"]}


def test_a_trial_of_another_prompt_keeps_what_it_does_not_reach(tmp_path, photographs, tiny_models, run, counted):
    workspace = write(tmp_path / "w", photographs, tiny_models)
    run(workspace, *STAGES)
    counted(workspace)
    write(workspace, photographs, tiny_models, prompt=SENTENCE.replace(QUESTIONS[1], QUESTIONS[0]))
    assert len(counted(workspace, limit=3)) == 3
    found = [row["caption"] for row in table(workspace)[0].values()]
    assert len(found) == 10 and len(set(found) & set(LONG.values())) == 3
    assert len(counted(workspace)) == 7
    assert {row["caption"] for row in table(workspace)[0].values()} == set(LONG.values())


@pytest.mark.parametrize(("broken", "words"), [
    ("transformers: {model: /nowhere}", "hf download"),
    ("transformers: {modle: x}", "did you mean 'model'"),
    ("openai: {url: 'http://127.0.0.1:1/v1'}", "openai.model"),
    ("prompt: supri\n  transformers: {model: x}", "did you mean 'supir'"),
])
def test_a_mistake_in_the_section_is_told_before_anything_starts(tmp_path, photographs, tiny_models, broken, words):
    workspace = write(tmp_path / "w", photographs, tiny_models)
    text = (workspace / "corpus.yaml").read_text()
    (workspace / "corpus.yaml").write_text(text[:text.index("caption:")] + f"caption:\n  {broken}\n")
    result = clearshard("caption", workspace, check=False)
    assert result.returncode == 2 and words in result.stderr and "Traceback" not in result.stderr


def test_a_corpus_without_the_section_says_how_it_looks_unless_it_may_be_missing(tmp_path, photographs, tiny_models):
    workspace = write(tmp_path / "w", photographs, tiny_models)
    text = (workspace / "corpus.yaml").read_text()
    (workspace / "corpus.yaml").write_text(text[:text.index("caption:")])
    result = clearshard("caption", workspace, check=False)
    assert result.returncode == 2 and "transformers: {model:" in " ".join(result.stderr.split())
    assert "nothing to do" in clearshard("caption", workspace, "--if-configured").stdout


@pytest.mark.slow
def test_a_model_that_lacks_a_file_is_one_clear_error(tmp_path, photographs, tiny_models, run):
    shutil.copytree(tiny_models / "llava", tmp_path / "llava")
    (tmp_path / "llava" / "chat_template.jinja").unlink()
    workspace = write(tmp_path / "w", photographs, tmp_path)
    run(workspace, *STAGES)
    with pytest.raises(ConfigError, match="no chat template"):
        run(workspace, "caption")
    assert not list((workspace / "captions").rglob("*.parquet"))


def test_images_are_spread_over_the_units_of_a_part_and_stay_there():
    key = "000003-1000-abc"
    refs = [f"{i * 2654435761 % 2**32:08x}ffff" for i in range(1000)]
    counts = [sum(place(ref, key) == number for ref in refs) for number in range(slices(key))]
    assert slices(key) == 8 and min(counts) > 60 and sum(counts) == 1000
    assert slices("000000-3-abc") == 1
