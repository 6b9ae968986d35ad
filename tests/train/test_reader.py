"""Samples by position: what comes, what is refused before anything is loaded, and what happens to damaged ones."""

import json
import multiprocessing
import pickle
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from pipeline.decode import decode
from tests.conftest import configure
from tests.train.conftest import damage, image, write_corpus
from train import Corpus, CorpusError, Reader, Reading, TooManyCorrupt

READING = Reading(seed=3, window=2, weights={"hq": 40, "face": 5})


def keys(reader: Reader, positions) -> list[str]:
    return [reader[position].key for position in positions]


def test_a_sample_is_what_was_written(workspace):
    reader = Reader(Corpus.open(str(workspace)), READING)
    for position in range(60):
        sample = reader[position]
        assert sample.image == image(sample.key) and sample.extension == "jpg" and sample.position == position
        assert sample.text == f"caption of {sample.key}" and sample.metadata == {"key": sample.key}
        assert sample.key.startswith(sample.group) and sample.replaced is None


def test_every_sample_comes_once_in_each_epoch_of_its_group(workspace):
    reader = Reader(Corpus.open(str(workspace)), READING)
    found = Counter((sample.epoch, sample.key) for sample in map(reader.__getitem__, range(1024)))
    assert set(found.values()) == {1}
    assert len([key for epoch, key in found if epoch == 5 and key.startswith("hq")]) == 40
    assert len([key for epoch, key in found if epoch == 5 and key.startswith("face")]) == 5


def test_batches_of_ranks_are_the_global_batch_and_a_stream_goes_on_anywhere(workspace):
    reader = Reader(Corpus.open(str(workspace)), READING)
    whole = [sample.key for sample in reader.batch(5, 12)]
    assert [sample.key for rank in range(3) for sample in reader.batch(5, 12, rank, 3)] == whole
    stream = reader.stream(60)
    assert [next(stream).key for _ in range(12)] == whole


def test_threads_that_share_a_reader_get_the_same_samples(workspace):
    expected = keys(Reader(Corpus.open(str(workspace)), READING), range(400))
    shared = Reader(Corpus.open(str(workspace)), READING)
    with ThreadPoolExecutor(8) as pool:
        assert [sample.key for sample in pool.map(shared.__getitem__, range(400))] == expected
    assert shared.read == 400


class Dataset(torch.utils.data.Dataset):
    def __init__(self, reader: Reader) -> None:
        self.reader = reader

    def __len__(self) -> int:
        return 64

    def __getitem__(self, position: int) -> str:
        return self.reader[position].key


@pytest.mark.parametrize(("start", "workers"), [("fork", 2), ("spawn", 1)])
def test_workers_of_torch_get_the_same_samples_whichever_way_they_start(workspace, start, workers):
    reader = Reader(Corpus.open(str(workspace)), READING)
    expected = keys(reader, range(64))
    loader = torch.utils.data.DataLoader(Dataset(reader), batch_size=8, num_workers=workers,
                                         multiprocessing_context=multiprocessing.get_context(start))
    assert [key for batch in loader for key in batch] == expected
    assert pickle.loads(pickle.dumps(reader)).fingerprint() == reader.fingerprint()


def test_a_process_that_is_forked_while_a_thread_counts_reads_on(workspace):
    reader = Reader(Corpus.open(str(workspace)), READING)
    with reader._counting:
        child = multiprocessing.get_context("fork").Process(target=reader.batch, args=(0, 8))
        child.start()
        child.join(20)
        child.kill()
    assert child.exitcode == 0


def test_default_weights_are_the_samples_and_repeat_oversamples(workspace):
    corpus = Corpus.open(str(workspace))
    assert corpus.weights() == {"face": 5, "hq": 40} and corpus.weights({"face": 4}) == {"face": 20, "hq": 40}
    reader = Reader(corpus, Reading(window=2, weights=corpus.weights({"face": 4})))
    assert abs(Counter(reader[position].group for position in range(1024))["face"] - 1024 / 3) <= 2


def test_the_order_is_that_of_the_corpus_not_of_its_place(workspace, tmp_path):
    shutil.copytree(workspace, tmp_path / "elsewhere")
    here, there = (Reader(Corpus.open(str(place)), READING) for place in (workspace, tmp_path / "elsewhere"))
    assert keys(here, range(50)) == keys(there, range(50)) and here.fingerprint() == there.fingerprint()
    assert here.differences(json.loads(json.dumps(there.fingerprint()))) == []


def test_a_fingerprint_says_in_words_what_has_changed(workspace, tmp_path):
    before = Reader(Corpus.open(str(workspace)), READING).fingerprint()
    more = write_corpus(tmp_path / "more", {"hq": [10, 3, 9, 0, 7, 11, 2], "negative": [3], "face": [3, 2]})
    now = Reader(Corpus.open(str(more)), Reading(seed=4, window=2, weights={"hq": 8, "face": 1}))
    assert now.differences(before) == [
        "group 'face' has as many samples as before, but some of its shards are others",
        "group 'hq' had 40 samples in 6 shards and has 42 in 7",
        "group 'negative' is new, with 3 samples in 1 shards",
        "seed was 3 and is 4"]
    assert Reader(Corpus.open(str(workspace)), READING).differences(now.fingerprint())[0] == "group 'negative' is gone"


def test_places_are_joined_by_group(workspace, tmp_path):
    other = write_corpus(tmp_path / "other", {"face": [4], "negative": [6]})
    corpus = Corpus.open(str(workspace), str(other))
    assert {group: int(sizes.sum()) for group, sizes in corpus.sizes.items()} == {"face": 9, "hq": 40, "negative": 6}
    reader = Reader(corpus, Reading(weights={"face": 1}))
    assert {sample.image == image(sample.key) for sample in map(reader.__getitem__, range(30))} == {True}


# Refusals ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("gone", "said"), [
    ("hq-000002.tar", r"1 of 8 tars are not in .*: hq-000002.tar"),
    ("face-000001.index.parquet", r"1 of 8 indexes are not in .*: face-000001.index.parquet"),
    ("corpus.json", "is not finished.*clearshard run"),
])
def test_what_is_missing_is_refused_when_the_corpus_is_opened(workspace, gone, said):
    (workspace / "shards" / gone).unlink()
    with pytest.raises(CorpusError, match=said):
        Corpus.open(str(workspace))


def test_an_empty_place_a_damaged_summary_and_a_tar_of_another_size_are_refused(workspace, tmp_path):
    with pytest.raises(CorpusError, match="holds no shards"):
        Corpus.open(str(tmp_path / "nothing"))
    with open(workspace / "shards" / "hq-000001.tar", "ab") as tar:
        tar.write(b"more")
    with pytest.raises(CorpusError, match=r"1 tars in .* changed since they were indexed: hq-000001"):
        Corpus.open(str(workspace))
    (workspace / "shards" / "corpus.json").write_text('{"shards": {"hq-000000": {}}}')
    with pytest.raises(CorpusError, match=r"corpus\.json is damaged"):
        Corpus.open(str(workspace))


@pytest.mark.parametrize(("weights", "said"), [
    ({"hq": 1, "faces": 1}, "no group 'faces'; did you mean 'face'?"),
    ({"hq": 1, "zebra": 1}, "no group 'zebra'; it has: empty, face, hq"),
    ({"hq": 1, "empty": 1}, "group 'empty' has no samples in its 1 shards"),
])
def test_weights_for_unknown_or_empty_groups_are_refused(tmp_path, weights, said):
    corpus = Corpus.open(str(write_corpus(tmp_path / "w", {"hq": [2], "face": [2], "empty": [0]})))
    with pytest.raises(CorpusError, match=said.replace("?", r"\?")):
        Reader(corpus, Reading(weights=weights))


def test_an_index_of_another_tar_is_refused(workspace):
    corpus = Corpus.open(str(workspace))
    for name in ("hq-000000", "hq-000002"):
        shutil.copy(workspace / "shards" / "hq-000005.index.parquet", workspace / "shards" / f"{name}.index.parquet")
    with pytest.raises(CorpusError, match=r"does not belong to the tar that corpus\.json describes"):
        keys(Reader(corpus, READING), range(200))


# Damage ------------------------------------------------------------------------------------------------------

def test_a_damaged_sample_is_replaced_by_the_same_other_one_everywhere(workspace, caplog):
    corpus = Corpus.open(str(workspace))
    before = keys(Reader(corpus, READING), range(100))
    damage(workspace, "hq-000002-4")
    reader = Reader(corpus, READING.model_copy(update={"max_corrupt": 0.01}))
    after = [reader[position] for position in range(100)]
    changed = [position for position in range(100) if before[position] != after[position].key]
    assert changed == [position for position in range(100) if before[position] == "hq-000002-4"] != []
    assert {(after[p].replaced, after[p].group) for p in changed} == {("hq-000002-4", "hq")}
    assert all(after[p].image == image(after[p].key) and after[p].key != "hq-000002-4" for p in changed)
    assert reader.corrupt == len(changed) and reader.corrupt_keys == ["hq-000002-4"]
    assert "hq-000002-4 of group hq is damaged and replaced: its .jpg in" in caplog.text
    alone = Reader(corpus, READING)
    assert alone[changed[-1]] == after[changed[-1]]


def test_above_the_accepted_rate_the_run_stops_and_names_the_keys(workspace):
    corpus = Corpus.open(str(workspace))
    for sample in range(9):
        damage(workspace, f"hq-000002-{sample}")
    reader = Reader(corpus, READING.model_copy(update={"max_corrupt": 0.01}))
    with pytest.raises(TooManyCorrupt, match=r"11 of \d+ samples are damaged.*max_corrupt = 0.01.*hq-000002-\d"):
        keys(reader, range(1000))


def test_a_group_in_which_all_is_damaged_stops_at_once(workspace):
    corpus = Corpus.open(str(workspace))
    for key in ("face-000000-0", "face-000000-1", "face-000001-0", "face-000001-1", "face-000001-2"):
        damage(workspace, key)
    with pytest.raises(TooManyCorrupt, match=r"samples in its place are damaged: face-.*\(the first: its .jpg"):
        Reader(corpus, Reading(weights={"face": 1}, max_corrupt=1))[0]


def test_a_tar_that_is_cut_off_while_the_run_reads_costs_the_samples_that_are_gone(workspace):
    corpus = Corpus.open(str(workspace))
    path = workspace / "shards" / "hq-000005.tar"
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    reader = Reader(corpus, READING.model_copy(update={"max_corrupt": 0.5}))
    samples = [reader[position] for position in range(200)]
    gone = {sample.replaced for sample in samples} - {None}
    assert {key.rpartition("-")[0] for key in gone} == {"hq-000005"} and 3 <= len(gone) <= 7
    assert all(sample.image == image(sample.key) for sample in samples)


def test_what_the_callers_decoder_refuses_is_replaced_too(workspace):
    def picky(data: bytes) -> int:
        if data == image("hq-000004-3"):
            raise ValueError("no picture at all")
        return len(data)

    reader = Reader(Corpus.open(str(workspace)), READING.model_copy(update={"max_corrupt": 0.01}), decode=picky)
    samples = [reader[position] for position in range(100)]
    assert {sample.replaced for sample in samples} == {None, "hq-000004-3"}
    assert all(sample.decoded == len(sample.image) for sample in samples)
    assert {sample.reason for sample in samples} == {None, "no picture at all"}


def test_a_group_whose_only_sample_is_damaged_is_an_error_of_the_corpus(tmp_path):
    folder = write_corpus(tmp_path / "one", {"hq": [1]})
    damage(folder, "hq-000000-0")
    with pytest.raises(CorpusError, match="'hq' has one sample only, so nothing can stand in for it"):
        Reader(Corpus.open(str(folder)), Reading(max_corrupt=1))[0]


def test_a_tar_that_vanishes_stops_the_run_with_its_name(workspace):
    corpus = Corpus.open(str(workspace))
    (workspace / "shards" / "face-000001.tar").unlink()
    with pytest.raises(RuntimeError, match=r"face-000001.tar.*put it back"):
        keys(Reader(corpus, Reading(weights={"face": 1})), range(20))


# The whole way -----------------------------------------------------------------------------------------------

def test_a_workspace_of_the_pipeline_is_read_with_pixels(tmp_path, pile, run):
    workspace = configure(tmp_path / "w", pile)
    run(workspace)
    reader = Reader(Corpus.open(str(workspace)), Reading(window=1), decode=decode)
    samples = [reader[position] for position in range(40)]
    assert {sample.decoded.shape for sample in samples} == {(256, 256, 3)}
    assert len({sample.key for sample in samples}) == 8
    assert all(sample.metadata["key"] == sample.key for sample in samples) and reader.corrupt == 0
