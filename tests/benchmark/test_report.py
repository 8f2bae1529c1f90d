"""benchmark.report: what it concludes from data whose answer is known, what it leaves out, and what it writes."""

import base64
import io
import json
import re
import resource
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from rliable import library, metrics

from benchmark import figures, judge, markup, report, runs
from benchmark.rules import SOURCES
from benchmark.runs import Records, runs_of
from benchmark.studies import STUDIES, Rule, Study
from tests.benchmark.helpers import ROOT, SMALL

ENV = "Pendulum-v1"
STEPS = range(200, 1001, 200)
VARIANTS = {"default": "", "better": "--tau 0.01", "equal": "--tau 0.02", "worse": "--tau 0.03"}
SHIFTS = {"default": 0, "better": 50, "equal": 0, "worse": -50}


def study(*rules, seeds=8, **kwargs):
    return Study({ENV: 1000}, VARIANTS, "a claim" if rules else "", rules, seeds=seeds, **kwargs)


PLAIN = study(Rule(ENV, "better", "above", "default"), Rule(ENV, "worse", "below", "default"))


def synthetic(study, seed=0):
    """Rows as from runs: each variant's returns at the end are normal, with a standard deviation of 10."""
    random, about, returns = np.random.default_rng(seed), [], []
    for one in runs_of("x", study):
        row = dict(env_id=one.env_id, variant=one.variant, seed=one.seed, key=one.key)
        about.append(
            row | dict(state="finished", steps_per_second=100.0 + one.seed, hours=0.5, commit="abc")
        )
        about[-1] |= dict(versions="torch 2.13.0", hardware="a processor", command="python ...")
        end = 100 + SHIFTS.get(one.variant, 0) + 10 * random.standard_normal()
        returns += [row | {"step": step, "return": end * step / 1000} for step in STEPS]
    return judge.Rows(pd.DataFrame(about), pd.DataFrame(returns), pd.DataFrame())


def lose(rows, variant, seed, state):
    """The same rows, had that run not been finished."""

    def gone(table):
        return (table.variant == variant) & (table.seed == seed)

    rows.runs.loc[gone(rows.runs), "state"] = state
    return rows._replace(returns=rows.returns[~gone(rows.returns)])


@pytest.fixture
def here(monkeypatch, tmp_path):
    """A repository of its own: results, runs and one study, x, with rows committed for it."""
    for module in (report, judge):
        monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(judge, "REPETITIONS", 200)
    studies = {"x": PLAIN}
    for module in (report, runs):
        monkeypatch.setattr(module, "STUDIES", studies)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def commit(rows, name="x"):
    for table, file in zip(rows, rows._fields):
        (report.RESULTS / name).mkdir(parents=True, exist_ok=True)
        if len(table):
            table.to_csv(report.RESULTS / name / f"{file}.csv", index=False)


def main(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["report", *flags])
    report.main()


def cells(text, label):
    """The row of the table of returns that begins with a label."""
    return [
        cell.strip()
        for cell in re.search(rf"^\| {label} \|.*", text, re.M)[0].strip("| ").split("|")
    ]


def test_means_and_intervals_are_those_of_rliable(monkeypatch):
    monkeypatch.setattr(judge, "REPETITIONS", 500)
    rows = synthetic(PLAIN)
    text, _ = report.write_text("x", PLAIN, rows, rows.where(lambda table: table.seed > 99))
    last = rows.returns[rows.returns.step == 1000]
    scores = {
        label: last[last.variant == label]["return"].to_numpy()[:, None] for label in VARIANTS
    }
    np.random.seed(0)
    iqm, interval = library.get_interval_estimates(
        {0: scores["better"]},
        lambda x: np.array([metrics.aggregate_iqm(x)]),
        reps=judge.REPETITIONS,
    )
    np.random.seed(0)
    better, chance = library.get_interval_estimates(
        {0: (scores["better"], scores["default"])},
        lambda x, y: np.array([metrics.probability_of_improvement(x, y)]),
        reps=judge.REPETITIONS,
    )
    low, high = interval[0][:, 0]
    assert cells(text, "better")[:5] == [
        "better",
        "8 of 8",
        f"{scores['better'].mean():.1f}",
        f"{scores['better'].std(ddof=1):.1f}",
        f"{iqm[0][0]:.1f} [{low:.1f}, {high:.1f}]",
    ]
    low, high = chance[0][:, 0]
    assert cells(text, "better")[5] == f"{better[0][0]:.2f} [{low:.2f}, {high:.2f}]"
    assert cells(text, "default")[7] == "104"  # steps/s: the median of 101 to 108


def test_of_equal_returns_half_count_as_better():
    assert report.improvement(np.array([[1.0], [2.0]]), np.array([[2.0], [3.0]])) == 1 / 8


@pytest.mark.parametrize("ours, theirs", [([1.0, np.nan], [0.0]), ([1.0], [np.nan, 0.0])])
def test_nothing_is_better_than_a_run_that_diverged(ours, theirs):
    assert np.isnan(report.improvement(np.array(ours)[:, None], np.array(theirs)[:, None]))


@pytest.mark.parametrize(
    "variant, relation, other, expected",
    [
        ("better", "above", "default", "confirmed"),
        ("worse", "above", "default", "refuted"),
        ("equal", "above", "default", "undecided"),
        ("worse", "below", "default", "confirmed"),
        ("better", "below", "default", "refuted"),
        ("equal", "below", "default", "undecided"),
        ("equal", "like", "default", "confirmed"),
        ("better", "like", "default", "refuted"),
        ("better", "above", 130.0, "confirmed"),
        ("better", "above", 170.0, "refuted"),
        ("better", "above", 150.0, "undecided"),
    ],
)
def test_what_is_known_is_found(variant, relation, other, expected):
    scores = judge.finals(PLAIN, synthetic(study(seeds=20), seed=1))
    assert judge.judge(Rule(ENV, variant, relation, other), scores).verdict == expected


def test_the_interval_is_of_the_difference():
    scores = judge.finals(PLAIN, synthetic(study(seeds=20)))
    found = judge.judge(Rule(ENV, "better", "above", "default"), scores)
    ours, theirs = scores[ENV, "better"], scores[ENV, "default"]
    assert found.difference == pytest.approx(ours.mean() - theirs.mean())
    error = np.sqrt(ours.var(ddof=1) / 20 + theirs.var(ddof=1) / 20)
    assert np.diff(found.interval) == pytest.approx(2 * 1.96 * error, rel=0.15)


def test_like_is_undecided_where_the_interval_has_only_a_part_of_the_ten_percent():
    scores = {
        (ENV, "a"): np.array([100.0, 105, 110, 115]),
        (ENV, "b"): np.array([100.0, 100, 100, 100]),
    }
    assert judge.judge(Rule(ENV, "a", "like", "b"), scores).verdict == "undecided"


@pytest.mark.slow
def test_student_holds_where_the_bootstrap_of_few_runs_does_not(here):
    """Of comparisons of equals, five runs a side, 12 in 100 seem decided by the bootstrap, and 5 by Student's t."""
    random, rule = np.random.default_rng(0), Rule(ENV, "a", "above", "b")
    pairs = [{(ENV, label): random.standard_normal(5) for label in "ab"} for _ in range(400)]
    found = [judge.judge(rule, scores) for scores in pairs]
    assert 0.08 < np.mean([one.verdict != "undecided" for one in found]) < 0.17
    assert 0.02 < np.mean([one.t_verdict != "undecided" for one in found]) < 0.08
    to_a_number = Rule(ENV, "a", "above", 0)
    numbers = [judge.judge(to_a_number, scores) for scores in pairs]
    assert 0.11 < np.mean([one.verdict != "undecided" for one in numbers]) < 0.21
    assert 0.02 < np.mean([one.t_verdict != "undecided" for one in numbers]) < 0.08


def test_the_second_opinion_is_students():
    x, y = np.array([1.0, 2, 3, 4, 5]), np.array([2.0, 4, 4, 6, 9, 11])
    scores = {(ENV, "x"): x, (ENV, "y"): y}
    error = np.hypot(x.std(ddof=1) / np.sqrt(5), y.std(ddof=1) / np.sqrt(6))
    found = judge.judge(Rule(ENV, "x", "above", "y"), scores)
    # Welch's degrees of freedom are 7.31, t at 97.5 % 2.344.
    assert found.t_interval == pytest.approx((-3 - 2.344 * error, -3 + 2.344 * error), abs=0.01)
    found = judge.judge(Rule(ENV, "x", "above", 2.0), scores)  # 4, and 2.776
    assert found.t_interval == pytest.approx((1 - 2.776 * 0.7071, 1 + 2.776 * 0.7071), abs=0.001)
    assert (found.verdict, found.t_verdict) == ("undecided", "undecided")
    found = judge.judge(Rule(ENV, "x", "above", 1.5), scores)
    assert (found.verdict, found.t_verdict) == ("confirmed", "undecided")
    constant = judge.judge(
        Rule(ENV, "c", "above", "d"), {(ENV, "c"): np.ones(3), (ENV, "d"): np.zeros(3)}
    )
    assert constant.t_interval == (1, 1) and constant.t_verdict == "confirmed"


def test_a_claim_stands_with_all_its_rules():
    def verdict(*words):
        return judge.verdict([judge.Judged(None, 0, (0, 0), word, (0, 0), word) for word in words])

    assert verdict("confirmed", "confirmed") == "confirmed"
    assert verdict("confirmed", "undecided") == "undecided"
    assert verdict("confirmed", "undecided", "open") == "open"
    assert verdict("confirmed", "open", "refuted") == "refuted"


def test_speeds_can_be_judged_as_returns_are(here, monkeypatch):
    rule = Rule(ENV, "better", "above", "default", "steps per second")
    monkeypatch.setitem(report.STUDIES, "x", study(rule))
    rows = synthetic(study(rule))
    rows.runs.loc[rows.runs.variant == "better", "steps_per_second"] += 50
    text, summary = report.write_text(
        "x", study(rule), rows, rows.where(lambda table: table.seed > 99)
    )
    assert (
        summary == "confirmed"
        and "50.0 [" in text
        and "steps per second of better is above that of default" in text
    )


def test_how_fast_a_variant_learns_can_be_judged(here):
    """By the mean of all evaluations: at the end both return the same."""
    rule = Rule(ENV, "equal", "above", "default", "return over training")
    rows = synthetic(study(rule))
    early = (rows.returns.variant == "equal") & (rows.returns.step < 1000)
    rows.returns.loc[early, "return"] += 50
    scores = judge.finals(study(rule), rows, rule.measure)
    mine = rows.returns[(rows.returns.variant == "equal") & (rows.returns.seed == 1)]
    assert scores[ENV, "equal"][0] == pytest.approx(mine["return"].mean())
    text, summary = report.write_text("x", study(rule), rows, rows.where(lambda t: t.seed > 99))
    assert summary == "confirmed"
    assert "return over training of equal is above that of default" in text
    rows.returns.loc[mine.index[0], "return"] = np.nan
    assert np.isnan(judge.finals(study(rule), rows, rule.measure)[ENV, "equal"][0])


def test_missing_and_failed_runs_are_shown(here, monkeypatch):
    rows = lose(
        lose(synthetic(PLAIN), "worse", 8, "not finished, at step 400"),
        "equal",
        7,
        "failed with exit code 1",
    )
    text, summary = report.write_text("x", PLAIN, rows, rows.where(lambda table: table.seed > 99))
    assert summary == "confirmed so far" and "30 of 32 runs are finished" in text
    assert (
        cells(text, "worse")[1] == cells(text, "equal")[1] == "7 of 8"
        and cells(text, "better")[1] == "8 of 8"
    )
    assert (
        "| worse | 8 | not finished, at step 400 |" in text
        and "| equal | 7 | failed with exit code 1 |" in text
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "variant, verdicts", [("better", ["open", "confirmed"]), ("default", ["open", "open"])]
)
def test_what_failed_is_not_judged_by_the_runs_that_did_not(variant, verdicts, monkeypatch):
    monkeypatch.setattr(judge, "REPETITIONS", 500)
    rows = lose(synthetic(PLAIN), variant, 7, "failed with exit code 1")
    text, summary = report.write_text("x", PLAIN, rows, rows.where(lambda table: table.seed > 99))
    found = re.findall(r"^\| Pendulum-v1: .*", text, re.M)
    assert summary == "open so far" and len(found) == 2
    for line, word in zip(found, verdicts):
        shown = f"| open (a run of {variant} failed) |" if word == "open" else f"| {word} |"
        assert shown in line and ("[" in line) == (word != "open")


@pytest.mark.slow
def test_the_source_of_a_claim_is_named(monkeypatch):
    monkeypatch.setattr(judge, "REPETITIONS", 100)
    known, other = (
        Study({ENV: 1000}, VARIANTS, f"{mark} a claim", PLAIN.rules, seeds=8)
        for mark in ("[3]", "[x]")
    )

    def write(study):
        return report.write_text("x", study, synthetic(study), judge.Rows(*[pd.DataFrame()] * 3))[0]

    assert f"\n[3]: {SOURCES['[3]']}\n" in write(known) and not re.search(
        r"^\[.\]: ", write(other), re.M
    )
    assert all(
        re.match(r"\[\d\] ", study.claim)
        for name, study in STUDIES.items()
        if re.fullmatch(r"F\d+", name)
    )
    assert {
        mark for study in STUDIES.values() for mark in re.findall(r"\[\d\]", study.claim)
    } == SOURCES.keys()


def test_with_too_few_runs_nothing_is_concluded(here):
    rows = synthetic(PLAIN)
    for seed in range(3, 9):
        rows = lose(rows, "worse", seed, "not run")
    text, summary = report.write_text("x", PLAIN, rows, rows.where(lambda table: table.seed > 99))
    assert summary == "open so far" and cells(text, "worse")[1] == "2 of 8"
    assert "[" in cells(text, "better")[4] + cells(text, "better")[5] and "[" not in " ".join(
        cells(text, "worse")
    )
    assert "| - | open (2 runs a side, 3 needed) |" in text and "| confirmed |" in text


def test_rows_of_another_version_stand_apart(here, monkeypatch):
    rows, other = synthetic(PLAIN), synthetic(PLAIN)
    for table in other[:2]:
        table["key"] = "0123456789"
    other.runs["commit"] = "old"
    other.returns["return"] += 1000
    commit(rows)
    main(monkeypatch, "x")
    before = (report.RESULTS / "x" / "README.md").read_text()
    commit(judge.Rows(*(pd.concat(tables) for tables in zip(rows, other))))
    main(monkeypatch, "x")
    text = (report.RESULTS / "x" / "README.md").read_text()
    assert cells(text, "better") == cells(before, "better")
    apart = text[text.index("## With another version") :]
    assert (
        "another version" not in before
        and "| Pendulum-v1 | better | old | 1149" in apart.replace("1150", "1149")
    )
    assert len(pd.read_csv(report.RESULTS / "x" / "runs.csv")) == 64  # and they stay in the rows


def test_many_curves_are_told_apart_without_colours():
    found = [(str(style["linestyle"]), style["marker"]) for style in figures.STYLES]
    assert len(found) > 40 and len({*found}) == len(found)


def test_rows_of_seeds_that_are_no_longer_planned_are_kept(here):
    commit(synthetic(PLAIN))
    current, older = judge.collect("x", study(*PLAIN.rules, seeds=5), here / "runs")
    assert set(current.runs.seed) == {1, 2, 3, 4, 5} and set(older.runs.seed) == {6, 7, 8}
    assert len(current.returns) + len(older.returns) == len(synthetic(PLAIN).returns)


def test_a_run_that_ends_in_nan_is_not_judged_by_an_earlier_return(here):
    rows = synthetic(PLAIN)
    mine = (rows.returns.variant == "better") & (rows.returns.seed == 2)
    rows.returns.loc[mine & (rows.returns.step == 1000), "return"] = np.nan
    assert np.isnan(judge.finals(PLAIN, rows)[ENV, "better"]).sum() == 1
    text, summary = report.write_text("x", PLAIN, rows, rows.where(lambda table: table.seed > 99))
    assert summary == "open" and "| open (a run of better returned no number) |" in text


def test_the_seeds_of_each_environment_are_told(here):
    other = "MountainCarContinuous-v0"
    both = Study({ENV: 1000, other: 1000}, VARIANTS, seeds=3, seeds_in={other: 4})
    rows = synthetic(both)
    text, _ = report.write_text("x", both, rows, rows.where(lambda table: table.seed > 99))
    assert "which runs, with seeds 1 to 3, on MountainCarContinuous-v0 1 to 4:" in text


def test_a_study_may_begin_with_a_later_seed(here):
    both = Study({ENV: 1000, "E": 1000}, {"a": ""}, seeds=3, seeds_in={"E": 1}, first_seed=6)
    seeds = [(run.env_id, run.seed) for run in runs_of("x", both)]
    assert seeds == [(ENV, 6), ("E", 6), (ENV, 7), (ENV, 8)]
    rows = synthetic(both)
    text, _ = report.write_text("x", both, rows, rows.where(lambda table: table.seed > 99))
    assert "which runs, with seeds 6 to 8, on E 6 to 6:" in text
    assert text.count(" --seed 6\n") == 2 and "3 of 3" in text


def test_results_are_shared_between_studies(here, monkeypatch):
    commit(synthetic(PLAIN))
    twin = Study({ENV: 1000}, {"tau 0.01": "--tau 0.01", "tau 0.02": "--tau 0.02"}, seeds=9)
    monkeypatch.setitem(report.STUDIES, "y", twin)
    main(monkeypatch, "y")
    text = (report.RESULTS / "y" / "README.md").read_text()
    assert (
        cells(text, "tau 0.01")[1] == "8 of 9"
        and "| Pendulum-v1 | tau 0.01 | 9 | not run |" in text
    )
    path = report.RESULTS / "y" / "runs.csv"
    path.write_text(path.read_text().replace("python ...", "python of y"))
    main(monkeypatch, "y")  # from its own rows now
    assert "python of y" in path.read_text() and "python ..." not in path.read_text()


def test_the_same_rows_make_the_same_report(here, monkeypatch, capsys):
    commit(synthetic(PLAIN))
    main(monkeypatch, "x")
    assert "x: confirmed; see" in capsys.readouterr().out
    files = {path.name: path.read_bytes() for path in (report.RESULTS / "x").iterdir()}
    assert files.keys() == {"README.md", "report.html", "returns.png", "runs.csv", "returns.csv"}
    main(monkeypatch, "x")
    assert {path.name: path.read_bytes() for path in (report.RESULTS / "x").iterdir()} == files
    assert sorted(path.name for path in report.RESULTS.iterdir()) == ["x"]


def test_the_page_needs_no_other_file(here, monkeypatch):
    commit(synthetic(PLAIN))
    main(monkeypatch, "x")
    page = (report.RESULTS / "x" / "report.html").read_text()
    (image,) = re.findall(r'src="([^"]*)"', page)
    picture = Image.open(io.BytesIO(base64.b64decode(image.removeprefix("data:image/png;base64,"))))
    assert picture.width > 800 and len(picture.convert("L").getcolors()) > 20
    assert (
        "<td>better</td>" in page
        and "<strong>Verdict: confirmed.</strong>" in page
        and "<code" in page
    )
    assert not re.search(r'<link|<script|href="http', page)


def test_published_numbers_are_drawn(here, monkeypatch):
    means = here / "means.csv"
    means.write_text(
        f"env_id,algorithm,implementation,steps,mean\n{ENV},SAC,theirs,800,77\n{ENV},PPO,no,800,1\n"
    )
    curves = here / "curves.csv"
    curves.write_text(f"env_id,seed,step,return\n{ENV},1,500,10\n{ENV},2,500,30\n{ENV},1,5000,1\n")
    for path, points, label in (
        (means, (800, 77), "theirs, published"),
        (curves, (500, 20), "curves, published"),
    ):
        axes = figures.draw_returns(PLAIN, synthetic(PLAIN), report.read_reference(path)).axes[0]
        lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
        assert lines[label] == [list(points)] and len(lines) == len(VARIANTS) + 1


def test_published_numbers_may_name_environments_in_full(here):
    path = here / "curves.csv"
    path.write_text("env_id,seed,step,return\nshimmy:dm_control/cartpole-swingup-v0,1,500,10\n")
    assert list(report.read_reference(path).env_id) == ["cartpole-swingup"]


def test_to_repeat_a_report_the_published_numbers_are_needed_too(here):
    rows = synthetic(PLAIN)
    older = rows.where(lambda t: t.seed > 99)
    alone, _ = report.write_text("x", PLAIN, rows, older)
    beside, _ = report.write_text("x", PLAIN, rows, older, published(here / "SBX.csv", [1, 2]))
    assert "\npython -m benchmark.report x\n```" in alone
    assert "\npython -m benchmark.report x --reference NUMBERS.csv  # " in beside


def test_a_study_without_records_leaves_no_table_that_cannot_be_read(here, monkeypatch):
    """A script of one's own may record returns alone; a file without columns ends every report."""
    told = study(diagnostics=True)
    monkeypatch.setitem(report.STUDIES, "x", told)
    commit(synthetic(told))
    for _ in range(2):
        main(monkeypatch, "x")
    assert not (report.RESULTS / "x" / "diagnostics.csv").exists()
    assert (report.RESULTS / "x" / "diagnostics.png").exists()


def published(path, ends, last=1000):
    """Curves of others, seed by seed, as read from a file."""
    rows = [
        f"{ENV},{seed},{step},{end * step / last}"
        for seed, end in enumerate(ends)
        for step in (last // 2, last)
    ]
    path.write_text("\n".join(["env_id,seed,step,return", *rows]) + "\n")
    return report.read_reference(path)


@pytest.mark.parametrize(
    "shift, said",
    [(-50, "ahead, +"), (0, "not significantly different, "), (50, "behind, -")],
    ids=lambda x: str(x)[:6],
)
def test_runs_published_seed_by_seed_are_compared_with(here, shift, said):
    rows = synthetic(PLAIN)
    ours = judge.finals(PLAIN, rows)[ENV, "default"]
    theirs = ours[:5] + shift
    reference = published(here / "SBX.csv", theirs, last=990)
    text, _ = report.write_text("x", PLAIN, rows, rows.where(lambda t: t.seed > 99), reference)
    row = cells(text, "SBX, published")
    assert row[1:4] == ["5", f"{theirs.mean():.1f}", f"{theirs.std(ddof=1):.1f}"]
    (sentence,) = re.findall(r"^default against SBX, published: (.*)$", text, re.M)
    assert sentence.startswith(said)
    assert f", {ours.mean() - theirs.mean():+.1f} [" in sentence and "by bootstrap." in sentence
    curves, over_hours, ends = figures.draw_returns(PLAIN, rows, reference).axes
    line = next(line for line in curves.lines if line.get_label() == "SBX, published")
    assert line.get_xydata()[-1] == pytest.approx((990, theirs.mean()))
    assert [tick.get_text() for tick in ends.get_yticklabels()] == [*VARIANTS, "SBX, published"]
    assert len(curves.collections) == len(VARIANTS) + 1 == len(over_hours.collections) + 1


def test_of_published_runs_the_wider_interval_decides(here):
    rows = synthetic(PLAIN)
    theirs = judge.finals(PLAIN, rows)[ENV, "default"].mean() - [15, 20, 70]
    reference = published(here / "SBX.csv", theirs)
    text, _ = report.write_text("x", PLAIN, rows, rows.where(lambda t: t.seed > 99), reference)
    sentence = r"SBX, published: not .* \[(.*), (.*)\] by Welch's t, \[(.*), .*\] by bootstrap\."
    low, high, by_bootstrap = map(float, re.search(sentence, text).groups())
    assert by_bootstrap > 0 and low < 0 < high


def test_published_runs_that_are_shorter_are_drawn_but_not_compared_with(here):
    rows = synthetic(PLAIN)
    reference = published(here / "SBX.csv", [1, 2, 3], last=900)
    text, _ = report.write_text("x", PLAIN, rows, rows.where(lambda t: t.seed > 99), reference)
    assert "SBX" not in text
    curves, _, ends = figures.draw_returns(PLAIN, rows, reference).axes
    line = next(line for line in curves.lines if line.get_label() == "SBX, published")
    assert line.get_xydata().tolist() == [[450, 1], [900, 2]]
    assert len(ends.get_yticklabels()) == len(VARIANTS)


@pytest.mark.parametrize(
    "rows, shown",
    [
        ("1,500,10 1,1000,20 2,400,30 2,990,40", [[400, 30], [500, 10], [990, 40], [1000, 20]]),
        ("1,500,10 1,1000,20 2,500,30", [[500, 20], [1000, 20]]),
        ("1,500,10 1,500,20 1,1000,30", [[500, 15], [1000, 30]]),
    ],
    ids=["other steps", "one stopped", "a row twice"],
)
def test_published_runs_without_common_steps_are_drawn_as_means(here, rows, shown):
    lines = [f"{ENV},{row}" for row in rows.split()]
    (here / "SBX.csv").write_text("\n".join(["env_id,seed,step,return", *lines]) + "\n")
    reference = report.read_reference(here / "SBX.csv")
    axes = figures.draw_returns(PLAIN, synthetic(PLAIN), reference).axes[0]
    line = next(line for line in axes.lines if line.get_label() == "SBX, published")
    assert line.get_xydata().tolist() == shown


def test_two_published_runs_are_listed_without_a_judgement(here):
    rows = synthetic(PLAIN)
    reference = published(here / "SBX.csv", [1, 2])
    text, _ = report.write_text("x", PLAIN, rows, rows.where(lambda t: t.seed > 99), reference)
    assert cells(text, "SBX, published")[1] == "2" and "against SBX" not in text


def test_the_best_evaluation_is_kept_apart_from_the_last(here):
    rows = synthetic(PLAIN)
    table = rows.returns
    middle = (table.step == 600) & (table.variant == "default")
    table.loc[middle, "return"] = 500.0 + table.seed[middle]
    text, _ = report.write_text("x", PLAIN, rows, rows.where(lambda t: t.seed > 99))
    last = table[(table.step == 1000) & (table.variant == "default")]["return"]
    row = cells(text, "default")
    assert row[2] == f"{last.mean():.1f}"
    assert row[6] == f"{table[middle]['return'].mean():.1f}" == "504.5"


def test_the_figure_shows_means_and_intervals(here):
    rows = synthetic(PLAIN)
    axes = figures.draw_returns(PLAIN, rows, judge.NONE_PUBLISHED).axes
    line = next(line for line in axes[0].lines if line.get_label() == "better")
    mean = rows.returns[rows.returns.variant == "better"].groupby("step")["return"].mean()
    assert np.allclose(line.get_xydata(), np.stack([mean.index, mean], axis=1))
    assert len(axes[0].collections) == len(VARIANTS)  # the bands


@pytest.mark.parametrize("seeds, shown", [(2, False), (3, True)])
def test_the_figure_shows_no_interval_of_two_runs_as_the_table_shows_none(here, seeds, shown):
    few = study(seeds=seeds)
    curves, _, ends = figures.draw_returns(few, synthetic(few), judge.NONE_PUBLISHED).axes
    heights = [path.vertices[:, 1] for band in curves.collections for path in band.get_paths()]
    means = [line.get_ydata() for line in curves.lines]
    assert len(heights) == len(means) == len(VARIANTS)
    wide = [np.ptp(segment[:, 0]) > 0 for bar in ends.collections for segment in bar.get_segments()]
    assert len(wide) == len(VARIANTS) and set(wide) == {shown}
    assert all(
        (set(height.round(9)) == set(mean.round(9))) != shown
        for height, mean in zip(heights, means)
    )


def test_no_variant_is_left_out_of_the_figure(here):
    many = Study(
        {ENV: 1000}, {f"tau {tau}": f"--tau {tau}" for tau in np.arange(1, 10) / 100}, seeds=1
    )
    axes = figures.draw_returns(many, synthetic(many), judge.NONE_PUBLISHED).axes[0]
    assert [line.get_label() for line in axes.lines] == list(many.variants)


def test_a_study_of_one_variant_shows_each_run_and_each_published_one(here, monkeypatch):
    one = Study({ENV: 1000}, {"default": ""}, seeds=3)
    rows = synthetic(one)
    text = f"env_id,algorithm,implementation,steps,mean\n{ENV},SAC,CleanRL,1000,7\n"
    (here / "means.csv").write_text(text)
    seeds = published(here / "SBX.csv", [1, 2], last=1000)
    others = published(here / "Tianshou.csv", [3], last=1000)
    reference = pd.concat([report.read_reference(here / "means.csv"), seeds, others])
    (axes,) = figures.draw_seeds(one, rows, reference).axes
    drawn = [(line.get_label(), line.get_xydata()[-1].tolist()) for line in axes.lines]
    finals = judge.finals(one, rows)[ENV, "default"]
    ours = [(f"this script, seed {seed}", [1000, end]) for seed, end in enumerate(finals, 1)]
    theirs = [("SBX, published", [1000, end]) for end in (1, 2)]
    theirs += [("Tianshou, published", [1000, 3])]
    # What is published of the last step stands beside ours.
    assert drawn == [*theirs, ("CleanRL, published", [1050, 7]), *ours]
    assert [line.get_linestyle() for line in axes.lines[:3]] == ["--", "--", ":"]

    monkeypatch.setattr(report, "STUDIES", {"x": one})
    monkeypatch.setattr(runs, "STUDIES", {"x": one})
    commit(rows)
    main(monkeypatch, "x")
    assert (report.RESULTS / "x" / "seeds.png").exists()
    assert "![Each run](seeds.png)" in (report.RESULTS / "x" / "README.md").read_text()


def test_returns_are_drawn_over_hours_too(here):
    rows = synthetic(PLAIN)
    _, over_hours, _ = figures.draw_returns(PLAIN, rows, judge.NONE_PUBLISHED).axes
    line = next(line for line in over_hours.lines if line.get_label() == "better")
    # Whole runs took 0.5 hours.
    assert line.get_xdata().tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    rows.returns["hours"] = rows.returns.step / 1e5
    _, over_hours, _ = figures.draw_returns(PLAIN, rows, judge.NONE_PUBLISHED).axes
    line = next(line for line in over_hours.lines if line.get_label() == "better")
    assert line.get_xdata().tolist() == pytest.approx([step / 1e5 for step in STEPS])


def test_no_empty_panel_is_drawn_where_no_run_says_how_long_it_took(here):
    rows = synthetic(PLAIN)
    _, over_hours, _ = figures.draw_returns(PLAIN, rows, judge.NONE_PUBLISHED).axes
    assert over_hours.axison
    rows.runs["hours"] = float("nan")
    _, over_hours, _ = figures.draw_returns(PLAIN, rows, judge.NONE_PUBLISHED).axes
    assert not over_hours.axison
    assert over_hours.get_title() == "hours were not recorded"


def test_an_environment_without_a_finished_run_has_a_table_and_no_panels(here):
    both = Study({"Hopper-v4": 1000, ENV: 1000}, VARIANTS, seeds=3)
    rows = synthetic(both)
    rows = rows._replace(returns=rows.returns[rows.returns.env_id == ENV])
    curves, *_ = axes = figures.draw_returns(both, rows, judge.NONE_PUBLISHED).axes
    assert len(axes) == 3 and curves.get_title() == ENV
    text, _ = report.write_text("x", both, rows, rows.where(lambda table: table.seed > 99))
    assert "**Hopper-v4**, 1,000 steps:\n\n|" in text


def test_a_variant_of_one_environment_has_no_row_in_the_others(here):
    other = "MountainCarContinuous-v0"
    both = Study(
        {ENV: 1000, other: 1000}, VARIANTS, seeds=3, only={"better": ENV}, seeds_in={other: 4}
    )
    rows = synthetic(both)
    text, _ = report.write_text("x", both, rows, rows.where(lambda table: table.seed > 99))
    before, after = text.split(f"**{other}**")
    assert cells(before, "better")[1] == "3 of 3" and "| better |" not in after
    assert cells(after, "worse")[1] == "4 of 4"
    _, _, first, _, _, second = figures.draw_returns(both, rows, judge.NONE_PUBLISHED).axes
    names = [[tick.get_text() for tick in ends.get_yticklabels()] for ends in (first, second)]
    assert names == [[*VARIANTS], ["default", "equal", "worse"]]


def test_a_source_has_one_marker_in_all_panels(here):
    other = "MountainCarContinuous-v0"
    both = Study({ENV: 1000, other: 1000}, VARIANTS)
    means = [(ENV, "a", 1), (ENV, "b", 2), (other, "b", 3)]
    reference = pd.DataFrame(
        [(env, np.nan, 500.0, float(mean), label) for env, label, mean in means],
        columns=judge.NONE_PUBLISHED.columns,
    )
    axes = figures.draw_returns(both, synthetic(both), reference).axes
    markers = {
        (line.get_label(), line.get_marker())
        for panel in (axes[0], axes[3])
        for line in panel.lines
        if line.get_label() in ("a", "b")
    }
    assert len(markers) == 2


def test_a_task_is_called_as_papers_call_it():
    named = {
        "shimmy:dm_control/walker-walk-v0": "walker-walk",
        "gymnasium_robotics:FetchReach-v4": "FetchReach-v4",
        "Hopper-v4": "Hopper-v4",
    }
    assert {env_id: judge.short(env_id) for env_id in named} == named


def test_diagnostics_draw_what_was_recorded_and_nothing_else():
    two = Study({ENV: 1000, "Hopper-v4": 1000}, {"default": ""}, diagnostics=True)
    rows = synthetic(two)
    hopper = rows.returns[rows.returns.env_id == "Hopper-v4"].drop(columns="return")
    made = [
        hopper.assign(record=record, value=np.arange(len(hopper)) / 100)
        for record in ("eval/success_rate", "losses/entropy", "losses/qf_loss", "unknown")
    ]
    axes = figures.draw_diagnostics(two, rows._replace(diagnostics=pd.concat(made))).axes
    shown = [panel for panel in axes if panel.axison]
    records = ["return, deterministic policy", "entropy of the policy, nats", "loss of the critics"]
    titles = [f"Hopper-v4: {record}" for record in records]
    titles += ["Hopper-v4: success rate, deterministic policy"]
    titles = [f"{ENV}: return, deterministic policy", *titles]
    assert [panel.get_title() for panel in shown] == titles and len(axes) == 6
    assert {len(panel.lines) for panel in shown} == {5}  # a line per seed
    lines = [line for panel in shown for line in panel.lines]
    styles = {(line.get_label(), line.get_color(), line.get_marker()) for line in lines}
    assert {label for label, *_ in styles} == {f"seed {seed}" for seed in range(1, 6)}
    assert len(styles) == 5  # a seed has the same one everywhere
    assert len({style[1:] for style in styles}) == 5
    assert [panel.get_yscale() for panel in shown[1:]] == ["linear", "linear", "log", "linear"]
    # From 0.01 to 0.24 there are two powers of ten, and labels between.
    critics = shown[3]
    critics.figure.draw_without_rendering()
    assert any(label.get_text() for label in critics.get_yticklabels(minor=True))
    assert "1k" in [label.get_text() for label in critics.get_xticklabels()]
    assert list(shown[-1].lines[0].get_ydata()) == pytest.approx(np.arange(5) / 100)


SHORT = (
    f"{SMALL} --checkpoint-frequency 300 --log-frequency 100 --eval-episodes 2 --eval-frequency 300"
)
REAL = Study({ENV: 600}, {"default": ""}, seeds=2, flags=SHORT, diagnostics=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with two real runs, the second as if it was stopped half-way."""
    folder = tmp_path_factory.mktemp("trained")
    for run, steps in zip(
        [*runs_of("real", REAL, threads=2)[:1], *runs_of("real", REAL)[1:]], ("600", "300")
    ):
        command = [flag.replace("600", steps) for flag in run.command(folder / "runs")]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
    (run.folder(folder / "runs") / "model.pt").unlink()
    return folder / "runs"


@pytest.fixture
def real(here, trained, monkeypatch):
    """The first of these runs, and in the results what the report makes of both."""
    monkeypatch.setitem(runs.STUDIES, "real", REAL)
    shutil.copytree(trained, here / "runs")
    main(monkeypatch, "real")
    return runs_of("real", REAL, threads=2)[0]


def written():
    """The rows in the folder of the study."""
    folder = report.RESULTS / "real"
    return judge.Rows(*(pd.read_csv(folder / f"{table}.csv") for table in judge.Rows._fields))


@pytest.mark.slow
def test_a_real_run_is_read(here, real):
    rows, records = written(), Records(real.folder(here / "runs")).read()
    evaluations = [(step, round(value, 3)) for step, value in records["eval/episodic_return"]]
    assert (
        list(zip(rows.returns.step, rows.returns["return"])) == evaluations
        and len(evaluations) == 2
    )
    assert list(rows.runs.state) == ["finished", "not finished, at step 300"]
    alphas = rows.diagnostics[rows.diagnostics.record == "losses/alpha"]
    assert list(alphas.step) == [step for step, _ in records["losses/alpha"]]
    assert list(alphas.value) == pytest.approx(
        [value for _, value in records["losses/alpha"]], rel=1e-4
    )
    assert {"torch", "numpy", "gymnasium"} <= set(
        rows.runs.versions[0].split()
    ) and rows.runs.hardware[0]
    speeds = [speed for _, speed in records["charts/SPS"]]  # one row each 100 steps
    assert len(speeds) == 6
    hours = np.cumsum([100 / speed for speed in speeds]) / 3600
    assert rows.runs.hours[0] == pytest.approx(hours[-1], abs=1e-6)
    assert list(rows.returns.hours) == pytest.approx([hours[2], hours[5]], abs=1e-5)
    as_run = ["--threads 2 --seed 1", "--threads 1 --seed 2"]
    assert list(rows.runs.command.str[-20:]) == as_run
    assert (
        "![What the networks did](diagnostics.png)"
        in (report.RESULTS / "real" / "README.md").read_text()
    )


@pytest.mark.slow
def test_without_the_runs_the_rows_are_all_there_is(here, real, monkeypatch):
    before = written()
    real.folder(here / "runs").rename(here / "elsewhere")
    main(monkeypatch, "real")
    after = written()
    assert after.returns.equals(before.returns) and list(after.runs.state) == [
        "finished",
        "not finished, at step 300",
    ]


def test_a_commit_that_looks_like_a_number_stays_as_it_is(here):
    rows = synthetic(PLAIN)
    rows.runs["commit"] = "0123456"
    commit(rows)
    again, _ = judge.collect("x", PLAIN, here / "runs")
    assert set(again.runs.commit) == {"0123456"}


def test_a_committed_failure_stays_one_where_the_runs_are_not(here):
    rows = lose(synthetic(PLAIN), "better", 3, "failed with exit code 1")
    commit(rows)
    again, _ = judge.collect("x", PLAIN, here / "runs")
    assert list(again.runs.state) == list(rows.runs.state)
    text, summary = report.write_text("x", PLAIN, again, again.where(lambda table: table.seed > 99))
    assert summary == "open so far" and "open (a run of better failed)" in text


def test_a_failure_gives_way_to_another_study_that_finished_the_run(here):
    failed = lose(synthetic(PLAIN), "better", 3, "failed with exit code 1")
    commit(failed)
    commit(synthetic(PLAIN), "y")
    again, _ = judge.collect("x", PLAIN, here / "runs")
    assert set(again.runs.state) == {"finished"} and len(again.returns) == 5 * 32


def test_a_run_that_was_made_with_two_equal_scripts_counts_once(here, monkeypatch):
    rows, older = synthetic(PLAIN), synthetic(PLAIN, seed=1)
    for table in older[:2]:
        table["key"] = table.key.str.replace(r"\..*", ".0123456789", regex=True)
    commit(judge.Rows(*(pd.concat(pair) for pair in zip(older, rows))))
    monkeypatch.setattr(runs, "same_as", lambda code: {code, "0123456789"})
    again, _ = judge.collect("x", PLAIN, here / "runs")
    assert set(again.returns.key) == {run.key for run in runs_of("x", PLAIN)}
    assert len(again.runs) == 32 and len(again.returns) == 5 * 32


def test_hours_and_speeds_are_told_where_runs_have_them(monkeypatch):
    monkeypatch.setattr(judge, "REPETITIONS", 100)
    rows = synthetic(PLAIN)
    nothing = rows.where(lambda table: table.seed > 99)
    assert "; 16.0 hours of runs. [" in report.write_text("x", PLAIN, rows, nothing)[0]
    rows.runs.loc[rows.runs.seed == 8, ["hours", "steps_per_second"]] = np.nan
    text, _ = report.write_text("x", PLAIN, rows, nothing)
    assert "; 14.0 hours of runs. [" in text and cells(text, "default")[7] == "104"
    rows.runs["hours"] = rows.runs["steps_per_second"] = np.nan
    text, _ = report.write_text("x", PLAIN, rows, nothing)
    assert "hours of runs" not in text and cells(text, "default")[7] == "-"


def test_a_page_is_whole_whatever_its_title(tmp_path):
    made = markup.page("# x: gamma < 0.9 & </title> more\n\nText.\n", tmp_path)
    assert "<title>x: gamma &lt; 0.9 &amp; &lt;/title&gt; more</title>" in made


@pytest.mark.slow
def test_without_pandas_one_line_says_what_to_install(tmp_path):
    code = "import sys; sys.modules['pandas'] = None; import benchmark.report"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (
        done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    )
    assert done.stderr.endswith("pip install -r benchmark/requirements.txt\n")


@pytest.mark.parametrize(
    "flags, answer",
    [
        ([], "no study named"),
        (["y"], "no study y; there are x"),
        (["x"], "x has no finished run with evaluations of this version of sac_ablations.py"),
        (["x", "--reference", "none.csv"], "--reference none.csv"),
        (["x", "--reference", "hoppers.csv"], "--reference hoppers.csv names no environment of x"),
        (["x", "--wandb", "team"], "--wandb team must be ENTITY/PROJECT"),
        (["x", "--wandb", "team/project"], "needs `wandb login`"),
    ],
)
def test_mistakes_get_one_line(flags, answer, here, monkeypatch, capsys):
    monkeypatch.setattr("wandb.login", lambda prompt: False)
    (here / "hoppers.csv").write_text("env_id,seed,step,return\nHopper-v4,1,500,10\n")
    with pytest.raises(SystemExit) as stop:
        main(monkeypatch, *flags)
    said = capsys.readouterr()
    assert (
        stop.value.code == 2
        and said.err.startswith("error:")
        and said.err.count("\n") == 1
        and answer in said.err
    )
    assert not list(here.rglob("*.md")) and not said.out


def test_old_rows_alone_are_no_finished_run(here, monkeypatch, capsys):
    rows = synthetic(PLAIN)
    for table in rows[:2]:
        table["key"] = "0123456789"
    commit(rows)
    with pytest.raises(SystemExit):
        main(monkeypatch, "x")
    assert "has those of another, of commit abc: python" in capsys.readouterr().err


def test_a_study_with_a_mistake_is_refused(here, monkeypatch, capsys):
    monkeypatch.setitem(report.STUDIES, "x", study(Rule(ENV, "bettre", "above", "default")))
    with pytest.raises(SystemExit) as stop:
        main(monkeypatch, "x")
    said = capsys.readouterr().err
    assert (
        stop.value.code == 2
        and said.startswith("error: study x has a rule for bettre")
        and said.count("\n") == 1
    )


def test_on_a_full_disk_nothing_is_left_behind(here, monkeypatch, capsys):
    commit(synthetic(PLAIN))
    before = {path: path.read_bytes() for path in report.RESULTS.rglob("*") if path.is_file()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(SystemExit) as stop:
            main(monkeypatch, "x")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = capsys.readouterr().err
    assert (
        stop.value.code == 2 and said.startswith("error: cannot write to") and said.count("\n") == 1
    )
    assert {
        path: path.read_bytes() for path in report.RESULTS.rglob("*") if path.is_file()
    } == before


def test_the_report_on_wandb_has_text_and_a_line_per_variant(here, monkeypatch):
    from wandb_workspaces.reports.v2 import interface

    from benchmark import wandb_report

    monkeypatch.setattr(interface, "_get_api", lambda: None)
    monkeypatch.setattr(interface, "execute_graphql", lambda *_: {"project": {"internalId": "1"}})
    rows = synthetic(PLAIN)
    text, _ = report.write_text("x", PLAIN, rows, rows.where(lambda table: table.seed > 99))
    made = wandb_report.build("team", "project", "x", PLAIN, text)
    assert (made.entity, made.project, made.title) == ("team", "project", "x: a claim")
    blocks = json.loads(made._to_model().spec.model_dump_json(by_alias=True, exclude_none=True))[
        "blocks"
    ]
    (said,) = [block for block in blocks if block["type"] == "markdown-block"]
    assert "**Verdict: confirmed.**" in said["content"] and "| better | 8 of 8 |" in said["content"]
    assert "![" not in said["content"]
    (grid,) = [block["metadata"] for block in blocks if block["type"] == "panel-grid"]
    keys = {one.variant: sorted(one.keys) for one in runs_of("x", PLAIN)}
    found = {one["name"]: one["filters"]["filters"] for one in grid["runSets"]}
    # One line a variant.
    assert all("env_id" in json.dumps(one["grouping"]) for one in grid["runSets"])
    assert found.keys() == keys.keys()
    for label, ((condition),) in found.items():
        assert (condition["key"]["name"], condition["op"], condition["value"]) == (
            "exp_name",
            "IN",
            keys[label],
        )
    (panel,) = grid["panelBankSectionConfig"]["panels"]
    assert (
        panel["config"]["metrics"] == ["eval/episodic_return"]
        and panel["config"]["groupAgg"] == "mean"
    )
