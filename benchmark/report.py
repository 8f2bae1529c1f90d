"""From the runs of studies to reports.

    python -m benchmark.report F5                        # in benchmark/results/F5
    python -m benchmark.report F5 F4 --reference N.csv   # several, beside published numbers
    python -m benchmark.report F5 --wandb TEAM/PROJECT   # and as a report there, of tracked runs

Runs are read from runs/ in the current folder and, where they are not there, from the committed
results of any study that shares them. N.csv holds means (env_id,algorithm,implementation,steps,
mean) or curves (env_id,seed,step,return), which go by the name of the file. A study may be reported
before it is finished: what is missing or failed is listed, and nothing else is concluded.
"""

import os
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from benchmark.rules import DECIDING, SOURCES
from benchmark.runs import RESULTS, check, fail, runs_of
from benchmark.studies import STUDIES, Rule, Study

try:
    import numpy as np
    import pandas as pd
    from rliable import metrics

    from benchmark import figures, judge
    from benchmark.judge import NONE_PUBLISHED, Rows, finals, short
    from benchmark.markup import page, tabulate
except ImportError as error:
    fail(f"{error}: pip install -r benchmark/requirements.txt")

HOW_JUDGED = (
    "A rule is confirmed where the interval lies wholly on the side it names, refuted where "
    "it lies wholly on the other, undecided elsewhere, and open with fewer than {deciding} "
    "runs on a side or where one failed. A rule that something is within 10 % of a mean is "
    "confirmed where the interval lies within that, refuted where it lies wholly outside. "
    "The claim is confirmed if all rules are, refuted if one is. The interval is the "
    "bootstrap's, which is too narrow for few runs. Student's t (Welch's where two variants are "
    "compared) has a wider interval, and shows how much of the verdict depends on that. No "
    "correction is made for testing several rules. Unless the note says otherwise, rules were "
    "written before the study's own runs; those it shares with earlier studies may be older."
)
HOW_MEASURED = """\
- Return: mean of the last evaluation, by the deterministic policy.
- IQM: mean of the runs without the lowest and the highest quarter (rounded down).
- Better than: probability that a run returns more than a run of that variant. At 0 or 1 its
  interval has no width, which with few runs is no certainty.
- Best evaluation: the highest evaluation of each run, averaged over the runs.
- Intervals: 95 % bootstrap over runs (rliable, stratified, {repetitions:,} repetitions). They are
  too narrow. For normal returns of 3, 5 or 10 runs they contain the true mean in 75, 83 or 90 % of
  all cases, and the true IQM in 75, 88 or 93 %.
- Bands in the figure: 95 % intervals of the mean.
- Hours in the figure: medians over the runs. Where only the length of a whole run is recorded, its
  hours are spread evenly over its steps.
- Steps/s: median over the records of a run, then over runs. Other work on the machine lowers it and
  adds to the hours: compare both only where the variants took turns."""


@dataclass
class Args:
    # names, as in benchmark.run --list
    studies: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    reference: tuple[Path, ...] = ()  # CSV files of published numbers to show beside ours
    wandb: str | None = None  # ENTITY/PROJECT on Weights & Biases, where the runs were tracked


# ---------------------------------------------------------------- tables and text


def bounds(low: float, high: float, digits: int = 1) -> str:
    return f"[{low:.{digits}f}, {high:.{digits}f}]"


def estimated(function, *scores: np.ndarray, digits: int = 1) -> str:
    """A statistic, with its interval where there are runs enough for one."""
    point, low, high = (value[0] for value in judge.estimate(function, *scores))
    interval = f" {bounds(low, high, digits)}" if min(map(len, scores)) >= DECIDING else ""
    return f"{point:.{digits}f}{interval}"


def tabulate_returns(study: Study, rows: Rows, env_id: str, reference: pd.DataFrame) -> str:
    """What the runs in one environment ended with, and the published ones below them."""
    scores, speeds = finals(study, rows), finals(study, rows, "steps per second")
    bests = finals(study, rows, "best")
    labels = study.variants_in(env_id)
    default, lines = scores[env_id, labels[0]], []
    for label in labels:
        x = scores[env_id, label]
        planned = f"{len(x)} of {len(study.seeds_of(env_id))}"
        best = f"{bests[env_id, label].mean():.1f}" if len(x) else "-"
        recorded = pd.Series(speeds[env_id, label]).dropna()
        speed = f"{recorded.median():.0f}" if len(recorded) else "-"
        lines.append([label, planned, *summarize(x, default if lines else x[:0]), best, speed])
    for label, x in judge.published_finals(study, reference, env_id).items():
        lines.append([label, str(len(x)), *summarize(x, default), "-", "-"])
    head = ["", "runs", "mean", "std", "IQM, 95 % interval", f"better than {labels[0]}"]
    return tabulate([*head, "best evaluation, mean", "steps/s"], lines)


def summarize(x: np.ndarray, default: np.ndarray) -> list[str]:
    """Mean, standard deviation, IQM of returns, and the chance that one is above a default one."""
    if not len(x):
        return ["-"] * 4
    return [
        f"{x.mean():.1f}",
        f"{x.std(ddof=1):.1f}" if len(x) > 1 else "-",
        estimated(metrics.aggregate_iqm, x),
        estimated(improvement, x, default, digits=2) if len(default) else "-",
    ]


def improvement(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The chance that a run of ours (n, 1) returns more than one of theirs (m, 1); ties are half.

    rliable's own function gives the same, and takes twenty times as long.
    """
    return np.mean(1 + np.sign(ours - theirs.T)) / 2


def compare_with_published(study: Study, rows: Rows, env_id: str, reference: pd.DataFrame) -> str:
    """How far the first variant is ahead of each set of published runs, or behind."""
    label, ours, sentences = next(iter(study.variants)), finals(study, rows), []
    for other, theirs in judge.published_finals(study, reference, env_id).items():
        rule = Rule(env_id, label, "above", other)
        one = judge.judge(rule, ours | {(env_id, other): theirs}, judge.failures(rows))
        if one.verdict != "open":
            places = {"confirmed": "ahead", "refuted": "behind"}
            # By Welch's t: no rule fixed beforehand says that the bootstrap decides this.
            place = places.get(one.t_verdict, "not significantly different")
            welch, bootstrap = bounds(*one.t_interval), bounds(*one.interval)
            difference = f"{one.difference:+.1f} {welch} by Welch's t, {bootstrap} by bootstrap"
            sentences.append(f"{label} against {other}: {place}, {difference}.")
    return " ".join(sentences)


def tabulate_older(older: Rows) -> str:
    """What runs ended with that are not of this version of the study."""
    ends = older.returns.sort_values("step").groupby(["env_id", "variant", "key", "seed"])
    commits = older.runs.groupby("key").commit.first()
    lines = [
        [short(env_id), label, commits[key], f"{of.mean():.1f}", len(of)]
        for (env_id, label, key), of in ends["return"].last().groupby(["env_id", "variant", "key"])
    ]
    return tabulate(["environment", "variant", "commit", "mean return", "runs"], lines)


def describe(rule: Rule) -> str:
    relation = "is within 10 % of" if rule.relation == "like" else f"is {rule.relation}"
    other = f"that of {rule.other}" if isinstance(rule.other, str) else f"{rule.other:g}"
    return f"{short(rule.env_id)}: {rule.measure} of {rule.variant} {relation} {other}"


def write_verdict(study: Study, rows: Rows, done: str) -> tuple[list[str], str]:
    """The part of the report on the claim, and the verdict."""
    scores = {rule.measure: finals(study, rows, rule.measure) for rule in study.rules}
    judged = [judge.judge(rule, scores[rule.measure], judge.failures(rows)) for rule in study.rules]
    summary = judge.verdict(judged)
    if (rows.runs.state != "finished").any():
        summary += " so far"
    lines = []
    for one in judged:
        cells = ["-", f"open ({one.reason})", "-"]
        if one.verdict != "open":
            by_t = f"{bounds(*one.t_interval)} {one.t_verdict}"
            cells = [f"{one.difference:.1f} {bounds(*one.interval)}", one.verdict, by_t]
        lines.append([describe(one.rule), *cells])
    head = ["rule", "difference of means, 95 % interval", "verdict"]
    table = tabulate([*head, "by Student's t"], lines)
    text = [f"**Verdict: {summary}.** {done}", study.note, *sources_of(study), table]
    return [*text, HOW_JUDGED.format(deciding=DECIDING)], summary


def sources_of(study: Study) -> list[str]:
    return [f"{mark}: {text}" for mark, text in SOURCES.items() if mark in study.claim + study.note]


def how_it_was_made(name: str, study: Study, rows: Rows, published: bool) -> list[str]:
    done = rows.runs[rows.runs.state == "finished"]
    noted = lambda column: "; ".join(sorted(done[column].dropna().astype(str).unique()))
    grid = runs_of(name, study)
    scripts = ", ".join(f"`{script}`" for script in dict.fromkeys(run.script for run in grid))
    made = f"{scripts} of commit {noted('commit')}, {noted('versions')}, on {noted('hardware')}"
    hours = done.hours.sum(min_count=1)  # early rows do not say
    spent = "" if np.isnan(hours) else f"; {hours:.1f} hours of runs"
    first = study.first_seed
    seeds = lambda count: f"{first} to {first + count - 1}"
    others = "".join(f", on {short(env)} {seeds(n)}" for env, n in study.seeds_in.items())
    commands = [
        f"python {run.script} {shlex.join(run.flags)} --seed {first}"
        for run in grid
        if run.seed == first
    ]
    beside = " --reference NUMBERS.csv  # the published numbers, files of your own" * published
    return [
        "## How it was made",
        f"{made}{spent}. [`runs.csv`](runs.csv) has each run, [`returns.csv`](returns.csv) each "
        "evaluation. To repeat it, with the script as it is there:",
        f"```bash\npython -m benchmark.run {name} --again\n"
        f"python -m benchmark.report {name}{beside}\n```",
        f"which runs, with seeds {seeds(study.seeds)}{others}:",
        "```bash\n" + "\n".join(commands) + "\n```",
    ]


def write_text(
    name: str, study: Study, rows: Rows, older: Rows, reference: pd.DataFrame = NONE_PUBLISHED
) -> tuple[str, str]:
    """The report in Markdown, and the verdict."""
    parts = [f"# {name}: {study.claim or study.note or 'a benchmark'}"]
    summary = "no claim to judge"
    finished = (rows.runs.state == "finished").sum()
    done = f"{finished} of {len(rows.runs)} runs are finished."
    if study.claim:
        text, summary = write_verdict(study, rows, done)
        parts += text
    else:
        parts += [done, *sources_of(study)]
    parts += ["## Returns"]
    if len(study.variants) == 1:
        parts += ["![Each run](seeds.png)"]
    parts += ["![Learning curves, and returns at the end](returns.png)"]
    for env_id, steps in study.envs.items():
        parts += [f"**{short(env_id)}**, {steps:,} steps:"]
        parts += [tabulate_returns(study, rows, env_id, reference)]
        parts += [compare_with_published(study, rows, env_id, reference)]
    parts += [HOW_MEASURED.format(repetitions=judge.REPETITIONS)]
    if study.diagnostics:
        figure = "![What the networks did](diagnostics.png)"
        parts += ["## Temperature, entropy, Q and losses", figure]
    missing = rows.runs[rows.runs.state != "finished"]
    if len(missing):
        lines = [[short(x.env_id), x.variant, x.seed, x.state] for x in missing.itertuples()]
        table = tabulate(["environment", "variant", "seed", "state"], lines)
        parts += ["## Runs that are missing", table]
    if len(older.returns):
        parts += ["## With another version of the script, other settings or other seeds"]
        parts += ["No part of what stands above.", tabulate_older(older)]
    parts += how_it_was_made(name, study, rows, bool(of_study(study, reference).any()))
    return "\n\n".join(part for part in parts if part) + "\n", summary


# ---------------------------------------------------------------- files


def read_reference(path: Path) -> pd.DataFrame:
    """Published numbers, as in NONE_PUBLISHED, by short names of environments.

    Means of many runs have no seed.
    """
    try:
        table = pd.read_csv(path).assign(label=f"{path.stem}, published")
        if "mean" in table:
            table = table.rename(columns={"steps": "step", "mean": "return"})
            table["label"] = table.implementation + ", published"
            table = table[table.algorithm == "SAC"].assign(seed=np.nan)
        table["env_id"] = table.env_id.map(short)
        return table[[*NONE_PUBLISHED]].astype({"step": float, "return": float})
    except (OSError, ValueError, KeyError, AttributeError) as error:
        fail(f"--reference {path}: {error}")


def of_study(study: Study, reference: pd.DataFrame) -> pd.Series:
    """Which published numbers are of a study's environments."""
    return reference.env_id.isin([*map(short, study.envs)])


def report(name: str, study: Study, current: Rows, older: Rows, reference: pd.DataFrame) -> str:
    """Write all files of a study's folder, or none; returns the verdict."""
    rows = Rows(*map(judge.join, zip(current, older)))
    making = RESULTS / f".{name}-{os.getpid()}"
    try:
        making.mkdir(parents=True)
        figures.draw_returns(study, current, reference).savefig(making / "returns.png", dpi=110)
        if len(study.variants) == 1:
            figures.draw_seeds(study, current, reference).savefig(making / "seeds.png", dpi=110)
        if study.diagnostics:
            figures.draw_diagnostics(study, current).savefig(making / "diagnostics.png", dpi=110)
            if len(rows.diagnostics):
                rows.diagnostics.to_csv(making / "diagnostics.csv", index=False)
        rows.runs.to_csv(making / "runs.csv", index=False)
        # Early rows have no hours: no empty column for them.
        returns = rows.returns.dropna(axis="columns", how="all")
        returns.to_csv(making / "returns.csv", index=False)
        text, summary = write_text(name, study, current, older, reference)
        (making / "README.md").write_text(text)
        (making / "report.html").write_text(page(text, making))
        (RESULTS / name).mkdir(exist_ok=True)
        for file in making.iterdir():
            file.replace(RESULTS / name / file.name)
    except OSError as error:
        fail(f"cannot write to {RESULTS}: {error.strerror}")
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return summary


def explain_nothing(name: str, study: Study, older: Rows):
    """Fail, as there is nothing to report."""
    commits = ", ".join(older.runs.get("commit", pd.Series(dtype=str)).dropna().unique())
    other = f", and {RESULTS / name} has those of another, of commit {commits}" if commits else ""
    version = f"this version of {study.script}{other}"
    lacking = f"{name} has no finished run with evaluations of {version}"
    fail(f"{lacking}: python -m benchmark.run {name}")


def main():
    args = tyro.cli(Args, description=__doc__)
    check(args.studies)
    tables = {path: read_reference(path) for path in args.reference}
    for path, table in tables.items():
        if not any(of_study(STUDIES[name], table).any() for name in args.studies):
            fail(f"--reference {path} names no environment of {', '.join(args.studies)}")
    reference = pd.concat([*tables.values()] or [NONE_PUBLISHED])
    if args.wandb:
        from benchmark import wandb_report  # which takes seconds

        target = wandb_report.log_in(args.wandb)
    for name in args.studies:
        study = STUDIES[name]
        current, older = judge.collect(name, study, Path.cwd() / "runs")
        if current.returns.empty:
            explain_nothing(name, study, older)
        summary = report(name, study, current, older, reference)
        print(f"{name}: {summary}; see {RESULTS / name / 'README.md'}", flush=True)
        if args.wandb:
            text = (RESULTS / name / "README.md").read_text()
            print(wandb_report.publish(wandb_report.build(*target, name, study, text)))


if __name__ == "__main__":
    main()
