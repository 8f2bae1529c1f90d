"""What is known of a study's runs, as tables, and what follows from it: statistics and verdicts."""

import itertools
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from rliable import library
from scipy import stats

from benchmark.rules import DECIDING
from benchmark.runs import RESULTS, Run, read, runs_of
from benchmark.studies import Rule, Study

REPETITIONS = 5_000  # of the bootstrap
NONE_PUBLISHED = pd.DataFrame(columns=["env_id", "seed", "step", "return", "label"])


def short(env_id: str) -> str:
    """The task's name as papers have it: without the module that registers it."""
    return re.sub(r"^\w+:", "", re.sub(r"^shimmy:dm_control/(.*)-v0$", r"\1", env_id))


class Rows(NamedTuple):
    """Tables of runs, as in the CSV files of a study; all begin with env_id, variant, seed, key."""

    runs: pd.DataFrame  # a row per run of the grid, begun or not
    returns: pd.DataFrame  # a row per evaluation of the finished ones
    diagnostics: pd.DataFrame  # a row per record, in studies that ask for it

    def where(self, keep) -> "Rows":
        return Rows(*(table[keep(table)] if len(table) else table for table in self))


def committed(file: str) -> pd.DataFrame:
    """The rows of all studies' results, with the name of the study."""
    how = dict(float_precision="round_trip", dtype={"commit": str, "key": str})  # not numbers
    tables = [
        pd.read_csv(path, **how).assign(study=path.parent.name)
        for path in sorted(RESULTS.glob(f"[!.]*/{file}.csv"))
    ]
    tables = [table for table in tables if "key" in table]
    empty = pd.DataFrame(columns=["env_id", "variant", "seed", "key", "study"])
    return pd.concat(tables) if tables else empty


def stored(run: Run, results: Rows) -> Rows:
    """A run's committed rows: its own study's, or those of one that shares it, under our label.

    One that finished it comes before one in which it failed.
    """
    # A key holds the environment.
    mine = results.where(lambda table: table.key.isin(run.keys) & (table.seed == run.seed))
    states = mine.runs.reindex(columns=["state"]).state.astype(str)
    ended = mine.runs[states.str.match("finished|failed")]
    order = lambda row: (row.state != "finished", row.study != run.study, row.key != run.key)
    best = min(ended.itertuples(), key=order, default=None)
    # Of one study and one version of the script, where others ran it too.
    chosen = lambda table: (table.study == best.study) & (table.key == best.key)
    rows = mine.where(chosen if best else lambda table: table.study.isna())
    return Rows(*(table.drop(columns="study").assign(variant=run.variant) for table in rows))


def collect(name: str, study: Study, runs: Path) -> tuple[Rows, Rows]:
    """All there is on a study's runs, and what its folder has of other versions of the script."""
    results, parts, current = Rows(*map(committed, Rows._fields)), [], set()
    for run in runs_of(name, study):
        current |= {(key, run.seed) for key in run.keys}
        before, found = stored(run, results), read(run, runs)
        now = Rows(*map(pd.DataFrame, ([found.about], found.returns, found.diagnostics)))
        here = found.about["state"] != "not run" and before.returns.empty
        parts.append(now if found.returns or here or before.runs.empty else before)
    others = set(zip(results.returns.key, results.returns.seed)) - current
    stray = lambda table: pd.Series(zip(table.key, table.seed), table.index).isin(others)
    older = results.where(lambda table: (table.study == name) & stray(table))
    return Rows(*map(join, zip(*parts))), Rows(*(table.drop(columns="study") for table in older))


def join(tables: tuple[pd.DataFrame, ...]) -> pd.DataFrame:
    filled = [table for table in tables if len(table)] or tables[:1]
    return pd.concat(filled, ignore_index=True)


def estimate(function, *scores: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A statistic of scores (runs, ...), or of two sets of them.

    Returns its value and its 95 % stratified-bootstrap interval.
    """
    np.random.seed(0)  # rliable draws from NumPy's global generator, whatever it is given
    # rliable wants (runs, tasks, ...); here each environment is judged by itself
    scores = [np.expand_dims(np.asarray(runs, dtype=float), axis=1) for runs in scores]
    whole = lambda *scores: np.atleast_1d(function(*scores))
    point, interval = library.get_interval_estimates(
        {0: scores[0] if len(scores) == 1 else scores}, whole, reps=REPETITIONS
    )
    return point[0], *interval[0]


def finals(study: Study, rows: Rows, measure: str = "return") -> dict[tuple[str, str], np.ndarray]:
    """Per environment and variant what each finished run ended with, in the order of the seeds.

    The measure is one of a rule's, or "best": the highest return of all evaluations.
    """
    run = ["env_id", "variant", "seed"]
    if measure == "best":
        numbers = rows.returns.groupby(run)["return"].max()
    elif measure == "return over training":
        numbers = rows.returns.groupby(run)["return"].agg(lambda of: of.mean(skipna=False))
    elif measure == "return":
        # A run whose last evaluation is NaN has diverged. By default last() would skip the NaN.
        numbers = rows.returns.sort_values("step").groupby(run)["return"].last(skipna=False)
    else:  # steps per second
        finished = rows.runs[rows.runs.state == "finished"]
        numbers = finished.groupby(run).steps_per_second.last()
    ends = {at: values.to_numpy() for at, values in numbers.groupby(["env_id", "variant"])}
    return {at: ends.get(at, np.array([])) for at in itertools.product(study.envs, study.variants)}


def published_finals(study: Study, published: pd.DataFrame, env_id: str) -> dict[str, np.ndarray]:
    """What runs of others ended with that were published seed by seed and are as long as ours."""
    steps = study.envs[env_id]
    mine = published[(published.env_id == short(env_id)) & published.seed.notna()]
    # They may have evaluated a little before the last step.
    mine = mine[(mine.step <= steps) & (mine.step > 0.98 * steps)].sort_values("step")
    last = mine.groupby(["label", "seed"])["return"].last()
    return {label: values.to_numpy() for label, values in last.groupby("label")}


def failures(rows: Rows) -> set[tuple[str, str]]:
    """Environments and variants of runs that failed."""
    failed = rows.runs[rows.runs.state.str.startswith("failed")]
    return set(zip(failed.env_id, failed.variant))


class Judged(NamedTuple):
    rule: Rule
    difference: float
    interval: tuple[float, float]  # by the bootstrap
    verdict: str  # by that: confirmed, refuted, undecided, or open
    t_interval: tuple[float, float]  # by Student
    t_verdict: str  # a second opinion
    reason: str = ""  # why it is open


def decide(rule: Rule, low: float, high: float, within: float) -> str:
    """The verdict on a rule from the interval of a difference; `within` is the margin of "like"."""
    confirmed, refuted = {
        "above": (low > 0, high < 0),
        "below": (high < 0, low > 0),
        "like": (-within <= low and high <= within, high < -within or low > within),
    }[rule.relation]
    if confirmed:
        return "confirmed"
    return "refuted" if refuted else "undecided"


def undecidable(rule: Rule, sides: list[np.ndarray], failed: set[tuple[str, str]]) -> str:
    """Why a rule stays open, or nothing.

    A run that fails may do so because of its variant: those that are left are no fair sample of it.
    """
    for label in (rule.variant, rule.other):
        if (rule.env_id, label) in failed:
            return f"a run of {label} failed"
    for label, side in zip((rule.variant, rule.other), sides):
        if np.isnan(side).any():
            return f"a run of {label} returned no number"
    fewest = min(map(len, sides))
    if fewest < DECIDING:
        return f"{fewest} run{'s' * (fewest != 1)} a side, {DECIDING} needed"
    return ""


def judge(
    rule: Rule,
    scores: dict[tuple[str, str], np.ndarray],
    failed: set[tuple[str, str]] = frozenset(),
) -> Judged:
    """By the bootstrap's interval of the difference of means; Student's (Welch's) says it again."""
    ours, number = scores[rule.env_id, rule.variant], not isinstance(rule.other, str)
    theirs = np.full(len(ours), float(rule.other)) if number else scores[rule.env_id, rule.other]
    if reason := undecidable(rule, [ours, theirs], failed):
        nothing = (np.nan, np.nan)
        return Judged(rule, np.nan, nothing, "open", nothing, "open", reason)
    point, *interval = (x[0] for x in estimate(lambda x, y: x.mean() - y.mean(), ours, theirs))
    t_interval = interval  # of constants: no width
    if ours.std() + theirs.std():
        welch = lambda: stats.ttest_ind(ours, theirs, equal_var=False)
        test = stats.ttest_1samp(ours - theirs, 0) if number else welch()
        t_interval = test.confidence_interval()
    within = 0.1 * abs(theirs.mean())
    verdicts = [decide(rule, *bounds, within) for bounds in (interval, t_interval)]
    return Judged(rule, point, tuple(interval), verdicts[0], tuple(t_interval), verdicts[1])


def verdict(judged: list[Judged]) -> str:
    """Of a claim: all its rules must hold, and one that is refuted refutes it."""
    found = {one.verdict for one in judged}
    return next(word for word in ("refuted", "open", "undecided", "confirmed") if word in found)
