"""Select: which rule an image fails, which of its copies stays, and what is said of a rule that cannot work."""

import re
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline import config, scores, selection
from pipeline.config import ConfigError
from pipeline.dedup import DedupJob
from pipeline.ingest import sources
from pipeline.score import metric_table, scores_table
from pipeline.selection import DEFAULTS, SelectJob, check_rules, query, rules
from pipeline.storage import Folder
from tests.conftest import REPOSITORY, configure, rows_of_table

GOOD = {"width": 2000, "height": 1500, "format": "jpeg", "mode": "RGB", "frames": 1, "bytes": 10**6, "jpeg_quality": 95,
        "bytes_per_pixel": 0.3, "sharpness": 20.0, "flat_share": 0.2, "noise": 1.0, "blockiness": 1.0, "upscale": 1.0,
        "entropy": 7.0, "clipped_dark": 0.0, "clipped_bright": 0.0, "colourfulness": 40.0, "grey": False, "border": 0.0}
FAR = 0x0123456789ABCDEF


def corpus_of(text="{}"):
    return config.parse(text)


def images(*changes):
    """Rows of scores: a good image each, with such differences; far from each other unless they say otherwise."""
    return [GOOD | {"ref": f"r{i:02}", "uid": f"u{i:02}", "phash": FAR * (2 * i + 1) % 2**64} | change
            for i, change in enumerate(changes)]


def selected(folder, rows, text="{}", parts=1, places=(), **metrics):
    """{ref: reason} after dedup and select; `places` are columns of the sources table, by ref."""
    workspace, corpus = Folder.at(str(folder)), corpus_of(text)
    places = dict(places)
    for number in range(parts):
        share = rows[number::parts]
        key = f"{number:06d}-{len(share)}-part"
        scores_table(workspace).write(key, "i", share)
        sources(workspace).write(key, "i", [
            {"ref": r["ref"], "uri": f"file:///{r['ref']}", "name": r["ref"], "group": "hq", "part": key}
            | places.get(r["ref"], {}) for r in share])
    for name, values in metrics.items():
        metric_table(workspace, name).write("000000-1-part", "i", [{"ref": r, "value": v} for r, v in values.items()])
    for job in (DedupJob(workspace, corpus.dedup), SelectJob(workspace, corpus)):
        for unit in job.pending():
            job.run(unit)
        assert job.pending() == []
    rows = selection.selection(workspace).dataset().to_table().to_pylist()
    assert all(row["kept"] == (row["reason"] is None) for row in rows)
    return {row["ref"]: row["reason"] for row in sorted(rows, key=lambda row: row["ref"])}


def reasons(*arguments, **options):
    return list(selected(*arguments, **options).values())


# Rules ------------------------------------------------------------------------------------------------------

def test_a_good_image_is_kept_and_each_default_takes_what_lies_beyond_it(tmp_path):
    within = {name: limits.max if limits.min is None else limits.min for name, limits in DEFAULTS.items()}
    step = {name: 1 if name == "jpeg_quality" else 0.01 for name in DEFAULTS}
    beyond = [{name: value + step[name] if DEFAULTS[name].min is None else value - step[name]}
              for name, value in within.items()]
    found = reasons(tmp_path, images({}, within, *beyond))
    assert found[:2] == [None, None]
    assert found[2:] == [f"{name}_{'high' if DEFAULTS[name].min is None else 'low'}" for name in DEFAULTS]


def test_sizes_aspects_and_grey(tmp_path):
    found = reasons(tmp_path, images({"width": 1024, "height": 4096}, {"width": 1023}, {"height": 1023},
                                     {"width": 1024, "height": 4097}, {"grey": True}), "select: {keep_grey: false}")
    assert found == [None, "too_small", "too_small", "aspect", "grey"]


def test_grey_images_are_kept_by_default(tmp_path):
    assert reasons(tmp_path, images({"grey": True})) == [None]


def test_the_first_rule_that_fails_is_the_reason(tmp_path):
    text = """
    select:
      keep_grey: false
      facts: {noise: {max: 2}, colourfulness: {min: 10}}
      where: {even: "width % 2 = 0"}
    """
    wrong = [("too_small", {"height": 11}), ("aspect", {"width": 9001}), ("grey", {"grey": True}),
             ("jpeg_quality_low", {"jpeg_quality": 20}), ("noise_high", {"noise": 3.0}),
             ("border_high", {"border": 0.5}), ("colourfulness_low", {"colourfulness": 1.0}), ("even", {"width": 2001})]
    assert [name for name in rules(corpus_of(text)) if name in dict(wrong)] == [name for name, _ in wrong]
    rows = []
    for start in range(len(wrong)):     # each fails one rule and all after it
        row = {}
        for _, change in reversed(wrong[start:]):
            row |= change
        rows.append(row)
    assert reasons(tmp_path, images(*rows), text) == [name for name, _ in wrong]


def test_a_fact_that_an_image_does_not_have_lets_it_pass(tmp_path):
    nothing = dict.fromkeys(DEFAULTS)
    assert reasons(tmp_path, images(nothing, nothing | {"entropy": 1.0}),
                   "select: {facts: {colourfulness: {min: 1}}}") == [None, "entropy_low"]


def test_a_configured_range_replaces_the_default_and_an_empty_one_switches_it_off(tmp_path):
    rows = images({"noise": 9.0}, {"noise": 9.0, "blockiness": 9.0}, {"noise": 0.1})
    assert reasons(tmp_path / "a", rows, "select: {facts: {noise: {max: 10}}}") == [None, "blockiness_high", None]
    assert reasons(tmp_path / "b", rows, "select: {facts: {noise: {}, blockiness: {}}}") == [None, None, None]
    assert reasons(tmp_path / "c", rows, "select: {facts: {noise: {min: 1, max: 10}}}")[2] == "noise_low"


def test_metrics_have_ranges_and_where_they_are_missing_the_image_passes(tmp_path):
    text = """
    score: {metrics: [{name: musiq, kind: pyiqa, model: musiq}]}
    select: {metrics: {musiq: {min: 50}}, where: {"not great": 'metric_musiq."value" < 90'}}
    """
    found = reasons(tmp_path, images({}, {}, {}, {}), text, musiq={"r00": 49.0, "r01": 50.0, "r02": 95.0})
    assert found == ["musiq_low", None, "not great", None]


def test_own_rules_see_facts_and_sources(tmp_path):
    text = """
    select:
      where:
        licensed: "licence is not null and licence not in ('arr') -- all rights reserved"
        'it''s "small"': "bytes < 2000000 or width > 5000"
    """
    found = reasons(tmp_path, images({}, {}, {}, {"bytes": 3000000}), text, places={
        "r00": {"licence": "CC0"}, "r01": {"licence": "arr"}, "r03": {"licence": "CC0"}})
    assert found == [None, "licensed", "licensed", 'it\'s "small"']


def test_a_rule_that_is_null_lets_pass(tmp_path):
    assert reasons(tmp_path, images({}, {}), "select: {where: {free: \"licence = 'CC0'\"}}",
                   places={"r01": {"licence": "arr"}}) == [None, "free"]


# What is said of rules that cannot work ---------------------------------------------------------------------

@pytest.mark.parametrize(("text", "message"), [
    ("select: {facts: {sharpnes: {min: 3}}}", "select.facts: 'sharpnes' .*did you mean 'sharpness'"),
    ("select: {facts: {xyz: {min: 3}}}", "select.facts: 'xyz' .*there are: width, height"),
    ("select: {facts: {format: {min: 3}}}", "select.facts: 'format' is no number"),
    ("select: {facts: {grey: {max: 0}}}", "select.facts: 'grey' is no number"),
    ("select: {metrics: {musiq: {min: 3}}}", "select.metrics: 'musiq' .*there are: none"),
    ("score: {metrics: [{name: musiq, kind: pyiqa, model: musiq}]}\nselect: {metrics: {mussiq: {min: 3}}}",
     "select.metrics: 'mussiq' .*did you mean 'musiq'"),
    ("select: {where: {wide: 'widht > 3'}}", r"rule 'wide' \(widht > 3\): .*\"widht\" not found.*\n.*\"width\""),
    ("select: {where: {wide: 'width >'}}", r"rule 'wide' \(width >\): Parser Error"),
    ("select: {where: {ok: 'width > 3', odd: 'width > 3)'}}", "rule 'odd'"),
    ("select: {where: {wide: 'width + 1'}}", "rule 'wide' .*true or false.*INTEGER"),
    ("select: {where: {name: format}}", "rule 'name' .*true or false.*VARCHAR"),
    ("select: {where: {empty: ''}}", "rule 'empty'"),
    ("select: {where: {known: \"uid != 'x'\"}}", "rule 'known' .*[Aa]mbiguous.*scores.uid"),
    ("select: {where: {too_small: 'width > 3'}}", "'too_small' is the name of a built-in reason"),
    ("select: {where: {duplicate: 'width > 3'}}", "'duplicate' is the name of a built-in reason"),
    ("select: {where: {border_high: 'width > 3'}}", "'border_high' is the name of a built-in reason"),
])
def test_a_rule_that_cannot_work_is_named_before_anything_is_asked(text, message):
    with pytest.raises(ConfigError, match=message):
        check_rules(corpus_of(text))


def test_a_rule_that_only_this_corpus_breaks_is_named_too(tmp_path):
    text = "select: {where: {fine: 'width > 3', year: 'licence::int > 2000'}}"
    check_rules(corpus_of(text))
    with pytest.raises(ConfigError, match=r"rule 'year' \(licence::int > 2000\): .*'CC0'"):
        selected(tmp_path, images({}), text, places={"r00": {"licence": "CC0"}})


def test_every_numeric_fact_can_have_a_range():
    for fact in scores.FACTS:
        if selection.is_number(fact):
            check_rules(corpus_of(f"select: {{facts: {{{fact.name}: {{min: 0, max: 1}}}}}}"))


# Duplicates -------------------------------------------------------------------------------------------------

def test_of_a_cluster_the_best_that_passes_every_rule_stays(tmp_path):
    near = {"phash": 5}
    rows = images(near | {"width": 4000, "noise": 50.0}, near | {"width": 3000}, near | {"width": 2500}, {})
    assert reasons(tmp_path, rows) == ["noise_high", None, "duplicate", None]


def test_a_cluster_of_which_none_passes_leaves_each_its_own_reason(tmp_path):
    rows = images({"phash": 5, "noise": 50.0}, {"phash": 5, "height": 3})
    assert reasons(tmp_path, rows) == ["noise_high", "too_small"]


def test_exact_copies_collapse_even_when_near_ones_are_kept(tmp_path):
    same, near = {"uid": "same", "phash": 5}, {"phash": 4, "width": 1900}
    rows = images(same, same, near, near | {"uid": "u02"})
    assert reasons(tmp_path / "a", rows) == [None, "duplicate", "duplicate", "duplicate"]
    found = reasons(tmp_path / "b", rows, "select: {keep_near_duplicates: true}")
    assert found == [None, "duplicate", None, "duplicate"]


@pytest.mark.parametrize("near", [True, False])
def test_a_copy_that_passes_stays_where_its_equal_is_refused(tmp_path, near):
    """The same bytes lie in two places, and only one of them has a licence."""
    rows = images({"phash": 5, "width": 3000}, *[{"phash": 4, "uid": "same"}] * 2)
    text = f"select: {{keep_near_duplicates: {str(near).lower()}, where: {{licensed: 'licence is not null'}}}}"
    places = {"r00": {"licence": "CC0"}, "r02": {"licence": "CC0"}}
    assert reasons(tmp_path, rows, text, places=places) == [None, "licensed", None if near else "duplicate"]


def test_an_older_version_of_a_file_steps_back_before_any_rule(tmp_path):
    places = {ref: {"uri": "file:///a.jpg", "modified": when} for ref, when in (("r00", 5.0), ("r01", 6.0))}
    assert reasons(tmp_path, images({"height": 3}, {}, {}), places=places) == ["replaced", None, None]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20, deadline=None)
@given(st.lists(st.fixed_dictionaries({}, optional={
    "noise": st.sampled_from([None, 1.0, 9.0]), "height": st.sampled_from([500, 1500]), "grey": st.booleans(),
    "phash": st.sampled_from([1, 2**40 - 1]), "border": st.sampled_from([0.0, 1.0])}), max_size=20),
    st.integers(1, 4), st.booleans())
def test_the_funnel_adds_up_and_does_not_depend_on_how_the_corpus_is_cut(tmp_path_factory, changes, parts, near):
    folder, rows = tmp_path_factory.mktemp("select"), images(*changes)
    text = f"select: {{keep_grey: false, keep_near_duplicates: {str(near).lower()}}}"
    found = selected(folder / "one", rows, text)
    assert found == selected(folder / "many", rows, text, parts)
    assert list(found) == [row["ref"] for row in rows]
    counts = {reason: list(found.values()).count(reason) for reason in set(found.values())}
    assert sum(counts.values()) == len(rows) and set(counts) <= {*rules(corpus_of(text)), None, "duplicate"}
    if not near:        # of each cluster at most one stays, and one does if any passes the rules
        for value in {row["phash"] for row in rows}:
            members = [found[row["ref"]] for row in rows if row["phash"] == value]
            assert members.count(None) == bool({None, "duplicate"} & set(members))


# Without images ---------------------------------------------------------------------------------------------

def test_new_thresholds_read_no_image(tmp_path, pile, run):
    workspace = configure(tmp_path / "w", pile)
    run(workspace, "ingest", "score", "dedup", "select")
    before = {row["ref"]: row["reason"] for row in rows_of_table(workspace, "selection")}
    shutil.rmtree(pile)
    text = Path(workspace, "corpus.yaml").read_text()
    Path(workspace, "corpus.yaml").write_text(text.replace("min_side: 256", "min_side: 300"))
    lines = run(workspace, "score", "dedup", "select")
    assert [line.split(":")[1].split()[0] for line in lines] == ["nothing", "nothing", "8"]
    after = {row["ref"]: row["reason"] for row in rows_of_table(workspace, "selection")}
    assert set(after) == set(before) and list(before.values()).count(None) == 6
    assert sorted(after.values(), key=str) == [None, *["too_small"] * 7]


def test_a_change_of_reason_alone_makes_no_tile_again(tmp_path):
    workspace = Folder.at(str(tmp_path))
    rows = images({}, {"height": 700, "noise": 9.0})
    assert reasons(tmp_path, rows) == [None, "too_small"]
    before = {key: part.content for key, part in selection.selection(workspace).parts().items()}
    assert reasons(tmp_path, rows, "select: {min_side: 300}") == [None, "noise_high"]
    assert {key: part.content for key, part in selection.selection(workspace).parts().items()} == before


def test_the_query_is_the_same_text_for_the_same_configuration():
    assert query(corpus_of("select: {min_side: 99}")) == query(corpus_of("select: {min_side: 99}"))
    assert query(corpus_of("select: {min_side: 99}")) != query(corpus_of())


# The page about it ------------------------------------------------------------------------------------------

def documented():
    """The rows of the table of facts in docs/scores.md: {fact: (unit, threshold)}."""
    text = (REPOSITORY / "docs" / "scores.md").read_text()
    rows = [line.split("|")[1:-1] for line in text.partition("## What the thresholds")[0].splitlines() if "| `" in line]
    return {name.strip().strip("`"): (row[1].strip(), row[2].strip()) for row in rows for name in row[0].split(",")}


def test_the_documentation_names_every_fact_with_its_unit_and_default_threshold():
    page = documented()
    assert list(page) == [fact.name for fact in scores.FACTS]
    for fact in scores.FACTS:
        assert page[fact.name][0] == fact.unit
        limits = DEFAULTS.get(fact.name)
        if limits is not None:
            stated = [f"≥ {limits.min:g}"] if limits.min is not None else []
            stated += [f"≤ {limits.max:g}"] if limits.max is not None else []
            assert page[fact.name][1] == ", ".join(stated)
        else:
            assert "≥" not in page[fact.name][1] or fact.name in ("width", "height")
    defaults = config.Select()
    assert page["width"][1] == f"shorter side ≥ {defaults.min_side}, longer ≤ {defaults.max_aspect:g} × shorter"


def test_the_examples_of_the_documentation_are_valid():
    text = (REPOSITORY / "docs" / "scores.md").read_text()
    examples = re.findall(r"```yaml\n(.*?)```", text, re.S)
    assert len(examples) == 3
    for example in examples:
        check_rules(corpus_of(example))


def test_its_example_of_own_rules_does_what_it_says(tmp_path):
    text = (REPOSITORY / "docs" / "scores.md").read_text()
    example, = re.findall(r"```yaml\n(select:\n  where:.*?)```", text, re.S)
    good = {"licence": "CC0", "extra": '{"category": "landscape"}'}
    places = {"r00": good, "r01": good | {"licence": "ARR"}, "r02": good | {"name": "Screenshot 1"}, "r03": good,
              "r04": good | {"extra": '{"category": "x"}'}}
    rows = images({}, {}, {"format": "png"}, {"bytes_per_pixel": 0.1}, {})
    assert reasons(tmp_path, rows, example, places=places) == [
        None, "licensed", "not a screenshot", "rich", "tagged"]
