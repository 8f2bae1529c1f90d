"""From the runs of studies to reports.

    python -m benchmark.report F5                        # benchmark/results/F5: text, page, figures, rows
    python -m benchmark.report F5 F4 --reference N.csv   # several, and published numbers in the figures
    python -m benchmark.report F5 --wandb TEAM/PROJECT   # and as a report there, of runs that were tracked

Runs are read from runs/ in the current folder and, where they are not there, from the committed results of any study
that shares them. N.csv holds means (env_id,algorithm,implementation,steps,mean) or curves (env_id,seed,step,return).
A study may be reported before it is finished: what is missing or failed is listed, and nothing else is concluded.
"""

import base64
import itertools
import json
import os
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import markdown
import numpy as np
import pandas as pd
import torch
import tyro
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rliable import library, metrics
from scipy import stats
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmark.learning import WATCHED, commit_of
from benchmark.run import RESULTS, ROOT, Run, check, fail, runs_of
from benchmark.studies import SOURCES, STUDIES, Rule, Study

REPETITIONS = 5_000  # of the bootstrap
DECIDING = 3  # runs of a variant, without which no rule is judged
DIAGNOSTICS = {key: title for key, title in WATCHED.items() if key.startswith("losses/")}
STYLES = [  # told apart without colours too
    dict(color=f"C{i}", linestyle=line, marker=marker, markersize=4)
    for i, (line, marker) in enumerate(
        zip(["-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)), "-"], "os^vDPX")
    )
]
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.5rem; }}
table {{ border-collapse: collapse; display: block; overflow-x: auto; font-size: .9rem; }}
th, td {{ border: 1px solid #bbb; padding: .2rem .5rem; text-align: left; }}
img {{ max-width: 100%; }}
pre {{ background: #f4f4f4; padding: .6rem; white-space: pre-wrap; font-size: .8rem; }}
</style></head><body>
{body}
</body></html>
"""


@dataclass
class Args:
    studies: Annotated[tuple[str, ...], tyro.conf.Positional] = ()  # names, as `python -m benchmark.run --list` prints
    reference: Path | None = None  # CSV of published numbers to draw beside ours
    wandb: str | None = None  # ENTITY/PROJECT on Weights & Biases, where the runs were tracked and the report goes


class Rows(NamedTuple):
    """Tables of runs, as a study's folder holds them in CSV files; all begin with env_id, variant, seed, key."""

    runs: pd.DataFrame  # a row per run of the grid, begun or not
    returns: pd.DataFrame  # a row per evaluation of the finished ones
    diagnostics: pd.DataFrame  # a row per record, in studies that ask for it

    def where(self, keep) -> "Rows":
        return Rows(*(table[keep(table)] if len(table) else table for table in self))


class Judged(NamedTuple):
    rule: Rule
    difference: float
    interval: tuple[float, float]  # by the bootstrap
    verdict: str  # by that: confirmed, refuted, undecided, or open: too few runs, or one that failed
    t_interval: tuple[float, float]  # by Student
    t_verdict: str  # a second opinion


def read(run: Run, runs: Path, diagnostics: bool) -> Rows:
    """What the folder of a run tells."""
    row = dict(env_id=run.env_id, variant=run.variant, seed=run.seed, key=run.key)
    about, returns, records = dict(state=failure(run, runs) or "not run"), [], []
    if folder := run.folder(runs):
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
        scalars = {key: [(e.step, e.value) for e in events.Scalars(key)] for key in events.Tags()["scalars"]}
        step, speed = np.array(scalars.get("charts/SPS", [(0, np.nan)])).T
        about = dict(state=failure(run, runs) or f"stopped at step {step[-1]:.0f}")
        about |= dict(steps_per_second=round(np.median(speed), 1))
        about |= dict(hours=round((np.diff(step, prepend=0) / speed).sum() / 3600, 6))
        about |= dict(commit=commit_of(folder / run.script), **versions_of(folder))
        threads = json.loads((folder / "args.json").read_text())["threads"]  # which do not tell runs apart
        flags = re.sub(r"--threads \d+", f"--threads {threads}", " ".join(run.flags))
        about |= dict(command=f"python {run.script} {flags} --seed {run.seed}")
        if (folder / "model.pt").exists():
            about["state"] = "finished"
            returns = [
                row | {"step": at, "return": round(value, 3)} for at, value in scalars.get("eval/episodic_return", [])
            ]
            for key in DIAGNOSTICS if diagnostics else ():
                records += [row | dict(record=key, step=at, value=f"{value:.5g}") for at, value in scalars[key]]
    return Rows(pd.DataFrame([row | about]), pd.DataFrame(returns), pd.DataFrame(records))


def failure(run: Run, runs: Path) -> str:
    """What the runner wrote last into a run's log, if it gave the run up."""
    log = runs / "logs" / f"{run.name}.txt"
    said = log.read_text(errors="replace").splitlines() if log.exists() else []
    return said[-1] if said and said[-1].startswith("failed") else ""


def versions_of(folder: Path) -> dict[str, str]:
    """What the run itself noted: versions of Python and packages; the processor, and whether a GPU."""
    if not (path := folder / "checkpoint.pt").exists():
        return {}
    noted = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["versions"]
    pattern = r"(\S+) .*\] (\S+) (\S+) (\S+) (?:(\d+\.\d\S*) )?(.*) (?:True|False)"  # MuJoCo's where it was used
    *found, processor = re.fullmatch(pattern, noted, re.DOTALL).groups()
    packages = zip(["python", "torch", "numpy", "gymnasium", "mujoco"], found)
    versions = " ".join(f"{package} {version}" for package, version in packages if version)
    return dict(versions=versions, hardware=processor + " with a GPU" * noted.endswith("True"))


def committed(file: str) -> pd.DataFrame:
    """The rows of all studies' results, with the name of the study."""
    read = lambda path: pd.read_csv(path, float_precision="round_trip").assign(study=path.parent.name)
    tables = [read(path) for path in RESULTS.glob(f"[!.]*/{file}.csv")]
    tables = [table for table in tables if "key" in table]
    return pd.concat(tables) if tables else pd.DataFrame(columns=["env_id", "variant", "seed", "key", "study"])


def stored(run: Run, results: Rows) -> Rows:
    """A run's rows in the committed results of its study, or else of one that shares it; its variant's name is ours."""
    mine = results.where(lambda table: (table.env_id == run.env_id) & (table.key == run.key) & (table.seed == run.seed))
    study = min(mine.returns.study.unique(), key=lambda name: (name != run.study, name), default=None)
    return Rows(*(table[table.study == study].drop(columns="study").assign(variant=run.variant) for table in mine))


def collect(name: str, study: Study, runs: Path) -> Rows:
    """All there is on the runs of a study, and what its folder has of other versions of the script."""
    results, parts, grid = Rows(*map(committed, Rows._fields)), [], runs_of(name, study)
    for run in grid:
        part, before = read(run, runs, study.diagnostics), stored(run, results)
        parts.append(part if len(part.returns) or before.returns.empty else before)
    finished = set(results.returns.key) - {run.key for run in grid}
    older = results.where(lambda table: (table.study == name) & table.key.isin(finished))
    parts.append(Rows(*(table.drop(columns="study") for table in older)))
    return Rows(*(pd.concat([t for t in tables if len(t)] or tables[:1], ignore_index=True) for tables in zip(*parts)))


def estimate(function, *scores: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A statistic of scores (runs, ...), or of two sets of them: value and 95 % stratified-bootstrap interval."""
    np.random.seed(0)  # rliable draws from NumPy's global generator, whatever it is given
    scores = [np.expand_dims(np.asarray(runs, dtype=float), axis=1) for runs in scores]  # (runs, tasks = 1, ...)
    whole = lambda *scores: np.atleast_1d(function(*scores))
    point, interval = library.get_interval_estimates(
        {0: scores[0] if len(scores) == 1 else scores}, whole, reps=REPETITIONS
    )
    return point[0], *interval[0]


def finals(study: Study, rows: Rows, column: str = "return") -> dict[tuple[str, str], np.ndarray]:
    """Per environment and variant what each finished run ended with, in the order of the seeds."""
    table = rows.runs[rows.runs.state == "finished"] if column != "return" else rows.returns.sort_values("step")
    last = table.groupby(["env_id", "variant", "seed"])[column].last()
    ends = {at: values.to_numpy() for at, values in last.groupby(["env_id", "variant"])}
    return {at: ends.get(at, np.array([])) for at in itertools.product(study.envs, study.variants)}


def failures(rows: Rows) -> set[tuple[str, str]]:
    """Environments and variants of runs that failed."""
    failed = rows.runs[rows.runs.state.str.startswith("failed")]
    return set(zip(failed.env_id, failed.variant))


def judge(rule: Rule, scores: dict[tuple[str, str], np.ndarray], failed: set[tuple[str, str]] = frozenset()) -> Judged:
    """By the bootstrap's interval of the difference of means; Student's (Welch's, of two variants) says it again."""
    ours, number = scores[rule.env_id, rule.variant], not isinstance(rule.other, str)
    theirs = np.full(len(ours), float(rule.other)) if number else scores[rule.env_id, rule.other]
    # a run that fails may do so because of its variant: those that are left are no fair sample of it
    if min(len(ours), len(theirs)) < DECIDING or {(rule.env_id, rule.variant), (rule.env_id, rule.other)} & failed:
        return Judged(rule, np.nan, (np.nan, np.nan), "open", (np.nan, np.nan), "open")
    point, *interval = (x[0] for x in estimate(lambda x, y: x.mean() - y.mean(), ours, theirs))
    t_interval = interval  # of constants: no width
    if ours.std() + theirs.std():
        test = stats.ttest_1samp(ours - theirs, 0) if number else stats.ttest_ind(ours, theirs, equal_var=False)
        t_interval = test.confidence_interval()

    def decide(low: float, high: float) -> str:
        within = 0.1 * abs(theirs.mean())
        confirmed, refuted = {
            "above": (low > 0, high < 0),
            "below": (high < 0, low > 0),
            "like": (-within <= low and high <= within, high < -within or low > within),
        }[rule.relation]
        return "confirmed" if confirmed else "refuted" if refuted else "undecided"

    return Judged(rule, point, tuple(interval), decide(*interval), tuple(t_interval), decide(*t_interval))


def verdict(judged: list[Judged]) -> str:
    """Of a claim: all its rules must hold, and one that is refuted refutes it."""
    found = {one.verdict for one in judged}
    return next(word for word in ("refuted", "open", "undecided", "confirmed") if word in found)


def short(env_id: str) -> str:
    """The task's name as papers have it."""
    return re.sub(r"^shimmy:dm_control/(.*)-v0$", r"\1", env_id)


def draw_returns(study: Study, rows: Rows, reference: pd.DataFrame) -> Figure:
    """A row per environment: learning curves, and beside them what each run ended with."""
    figure = Figure(figsize=(12, 1 + 3.6 * len(study.envs)), layout="constrained")
    for (curves, ends), env_id in zip(figure.subplots(len(study.envs), 2, squeeze=False), study.envs):
        mine = rows.returns[rows.returns.env_id == env_id]
        for row, (label, style) in enumerate(zip(study.variants, itertools.cycle(STYLES))):
            runs = mine[mine.variant == label].pivot(index="step", columns="seed", values="return").dropna()
            if runs.empty:
                continue
            mean, low, high = estimate(lambda x: x.mean(axis=(0, 1)), runs.to_numpy().T)
            if len(runs.columns) < DECIDING:  # no interval, as in the table
                low = high = mean
            curves.plot(runs.index, mean, **style, label=label)
            curves.fill_between(runs.index, low, high, color=style["color"], alpha=0.15, linewidth=0)
            last = runs.iloc[-1]
            ends.plot(last, [row] * len(last), "o", markerfacecolor="none", color="0.5")
            ends.errorbar(mean[-1], row, xerr=[[mean[-1] - low[-1]], [high[-1] - mean[-1]]], fmt="|k", capsize=4, ms=14)
        published = reference[(reference.env_id == short(env_id)) & (reference.step <= study.envs[env_id])]
        for marker, (label, points) in zip("*hpH8", published.groupby("label")):
            curves.plot(points.step, points["return"], marker, color="0.4", label=label)
        curves.xaxis.set_major_locator(MaxNLocator(5))
        curves.set(title=short(env_id), xlabel="environment steps", ylabel="return, deterministic policy")
        ends.set(
            title="at the end", xlabel="return: runs, their mean, its 95 % interval", yticks=range(len(study.variants))
        )
        ends.set_yticklabels(study.variants)
        ends.set_ylim(len(study.variants) - 0.5, -0.5)
        if "dm_control" in env_id or study.script == "sac_dmc.py":
            curves.set(ylabel="return (0 to 1000), deterministic policy", ylim=(0, 1050))
    labels = {label: line for axes in figure.axes for line, label in zip(*axes.get_legend_handles_labels())}
    figure.legend(labels.values(), labels, loc="outside lower center", ncols=3)
    return figure


def draw_diagnostics(study: Study, rows: Rows) -> Figure:
    """What to look at when learning diverges: a panel per record, a line per run."""
    figure = Figure(figsize=(14, 1 + 6.5 * len(study.envs)), layout="constrained")
    panels = iter(figure.subplots(2 * len(study.envs), 3).flat)
    for env_id in study.envs:
        returns = rows.returns.rename(columns={"return": "value"}).assign(record="return, deterministic policy")
        table = pd.concat([returns, rows.diagnostics.replace({"record": DIAGNOSTICS})])
        for record, axes in zip(["return, deterministic policy", *DIAGNOSTICS.values()], panels):
            for label, style in zip(study.variants, itertools.cycle(STYLES)):
                mine = table[(table.env_id == env_id) & (table.variant == label) & (table.record == record)]
                for _, run in mine.groupby("seed"):
                    axes.plot(run.step, run.value.astype(float), **style | dict(markersize=2), linewidth=1, label=label)
            axes.set(title=f"{short(env_id)}: {record}", xlabel="environment steps")
            axes.xaxis.set_major_locator(MaxNLocator(5))
            axes.set_yscale("log" if "alpha" in record or "critics" in record else "linear")
    labels = {label: line for axes in figure.axes for line, label in zip(*axes.get_legend_handles_labels())}
    figure.legend(labels.values(), labels, loc="outside lower center", ncols=4)
    return figure


def tabulate(header: list[str], rows: list[list]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', '/') for cell in line)} |" for line in lines)


def bounds(low: float, high: float, digits: int = 1) -> str:
    return f"[{low:.{digits}f}, {high:.{digits}f}]"


def spread(point: float, low: float, high: float, digits: int = 1) -> str:
    return f"{point:.{digits}f} {bounds(low, high, digits)}"


def estimated(function, *scores: np.ndarray, digits: int = 1) -> str:
    """A statistic, with its interval where there are runs enough for one."""
    found = [value[0] for value in estimate(function, *scores)]
    return spread(*found, digits) if min(map(len, scores)) >= DECIDING else f"{found[0]:.{digits}f}"


def tabulate_returns(study: Study, rows: Rows, env_id: str) -> str:
    """What the runs in one environment ended with."""
    scores, speeds = finals(study, rows), finals(study, rows, "steps_per_second")
    default, lines = scores[env_id, next(iter(study.variants))], []
    for label in study.variants:
        x = scores[env_id, label]
        line = [label, f"{len(x)} of {study.seeds}", *["-"] * 5]
        if len(x):
            line[2:4] = f"{x.mean():.1f}", f"{x.std(ddof=1):.1f}" if len(x) > 1 else "-"
            line[4] = estimated(metrics.aggregate_iqm, x)
            if len(default) and lines:
                line[5] = estimated(metrics.probability_of_improvement, x, default, digits=2)
            line[6] = f"{np.median(speeds[env_id, label]):.0f}"
        lines.append(line)
    head = ["", "runs", "mean", "std", "IQM, 95 % interval", f"better than {lines[0][0]}", "steps/s"]
    return tabulate(head, lines)


def tabulate_older(older: Rows) -> str:
    """What runs ended with that are not of this version of the study."""
    ends = older.returns.sort_values("step").groupby(["env_id", "variant", "key", "seed"])["return"].last()
    commits = older.runs.groupby("key").commit.first()
    lines = [
        [short(env_id), label, commits[key], f"{of.mean():.1f}", len(of)]
        for (env_id, label, key), of in ends.groupby(["env_id", "variant", "key"])
    ]
    return tabulate(["environment", "variant", "commit", "mean return", "runs"], lines)


def describe(rule: Rule) -> str:
    relation = {"above": "is above", "below": "is below", "like": "is within 10 % of"}[rule.relation]
    other = rule.other if isinstance(rule.other, str) else f"{rule.other:g}"
    return (
        f"{short(rule.env_id)}: {rule.measure} of {rule.variant} {relation} {'that of ' * (other == rule.other)}{other}"
    )


def write_text(name: str, study: Study, rows: Rows, older: Rows) -> tuple[str, str]:
    """The report in Markdown, and the verdict."""
    parts, summary = [f"# {name}: {study.claim or study.note or 'a benchmark'}"], "no claim to judge"
    sources = [f"{mark}: {source}" for mark, source in SOURCES.items() if mark in study.claim + study.note]
    finished = (rows.runs.state == "finished").sum()
    if study.claim:
        measured = {"return": finals(study, rows), "steps per second": finals(study, rows, "steps_per_second")}
        judged = [judge(rule, measured[rule.measure], failures(rows)) for rule in study.rules]
        summary = verdict(judged) + ("" if finished == len(rows.runs) else " so far")
        parts += [f"**Verdict: {summary}.** {finished} of {len(rows.runs)} runs are finished.", study.note, *sources]
        head = ["rule, fixed before the first run", "difference of means, 95 % interval", "verdict", "by Student's t"]
        lines = []
        for one in judged:
            found = [spread(one.difference, *one.interval), one.verdict, f"{bounds(*one.t_interval)} {one.t_verdict}"]
            lines.append([describe(one.rule), *(["-", "open", "-"] if one.verdict == "open" else found)])
        parts += [tabulate(head, lines)]
        parts += [
            "A rule is confirmed where the interval lies wholly on the side it names, refuted where it lies wholly on "
            f"the other, undecided elsewhere, and open with fewer than {DECIDING} runs on a side or where one failed. "
            "The claim is confirmed if all rules are, refuted if one is. The interval is the bootstrap's, which is too "
            "narrow for few runs; Student's t, Welch's where two variants are compared, is wider and says how much of "
            "the verdict hangs on that. Neither makes up for the number of rules."
        ]
    else:
        parts += [f"{finished} of {len(rows.runs)} runs are finished.", *sources]
    parts += ["## Returns", "![Learning curves, and returns at the end](returns.png)"]
    for env_id, steps in study.envs.items():
        parts += [f"**{short(env_id)}**, {steps:,} steps:", tabulate_returns(study, rows, env_id)]
    parts += [
        "Returns are means of the deterministic policy's last evaluation; IQM: mean of the middle half of the runs; "
        "better than: chance that a run beats one of that variant. Intervals are rliable's stratified bootstrap over "
        f"runs, {REPETITIONS:,} repetitions; with few runs they tend to be too narrow. Bands in the figure: "
        "95 % intervals of the mean. steps/s: median over the records of a run, then over runs; it varies with what "
        "else the machine did."
    ]
    if study.diagnostics:
        parts += ["## Temperature, entropy, Q and losses", "![What the networks did](diagnostics.png)"]
    missing = rows.runs[rows.runs.state != "finished"]
    if len(missing):
        lines = [[short(row.env_id), row.variant, row.seed, row.state] for row in missing.itertuples()]
        parts += ["## Runs that are missing", tabulate(["environment", "variant", "seed", "state"], lines)]
    if len(older.returns):
        parts += ["## Made by another version of the script, or with other settings", "No part of what stands above."]
        parts += [tabulate_older(older)]
    done = rows.runs[rows.runs.state == "finished"]
    noted = lambda column: "; ".join(sorted(done[column].dropna().astype(str).unique()))
    commands = [
        f"python {study.script} {' '.join(run.flags)} --seed {run.seed}"
        for run in runs_of(name, study)
        if run.seed == 1
    ]
    parts += [
        "## How it was made",
        f"`{study.script}` of commit {noted('commit')}, {noted('versions')}, on {noted('hardware')}; "
        f"{done.hours.sum():.1f} hours of runs. [`runs.csv`](runs.csv) has each run, [`returns.csv`](returns.csv) each "
        "evaluation. Again, with the script as it is there:",
        f"```bash\npython -m benchmark.run {name} --again\npython -m benchmark.report {name}\n```",
        f"which runs, with seeds 1 to {study.seeds}:",
        "```bash\n" + "\n".join(commands) + "\n```",
    ]
    return "\n\n".join(part for part in parts if part) + "\n", summary


def page(text: str, folder: Path) -> str:
    """The same as one HTML page that needs no other file."""
    body = markdown.markdown(text, extensions=["tables", "fenced_code"])
    embed = lambda found: f'src="data:image/png;base64,{base64.b64encode((folder / found[1]).read_bytes()).decode()}"'
    body = re.sub(r'src="([\w.-]+\.png)"', embed, body)
    return PAGE.format(title=text.split("\n")[0].lstrip("# "), body=body)


def read_reference(path: Path | None) -> pd.DataFrame:
    """Published numbers as env_id, step, return, label."""
    if path is None:
        return pd.DataFrame(columns=["env_id", "step", "return", "label"])
    try:
        table = pd.read_csv(path)
        if "mean" in table:
            table = table[table.algorithm == "SAC"].rename(columns={"steps": "step", "mean": "return"})
            return table.assign(label=table.implementation + ", published")
        return table.groupby(["env_id", "step"], as_index=False)["return"].mean().assign(label="published")
    except (OSError, ValueError, KeyError, AttributeError) as error:
        fail(f"--reference {path}: {error}")


def report(name: str, study: Study, rows: Rows, reference: pd.DataFrame) -> str:
    """Write all files of a study's folder, or none; returns the verdict."""
    keys = {run.key for run in runs_of(name, study)}
    current, older = rows.where(lambda table: table.key.isin(keys)), rows.where(lambda table: ~table.key.isin(keys))
    making = RESULTS / f".{name}-{os.getpid()}"
    try:
        making.mkdir(parents=True)
        draw_returns(study, current, reference).savefig(making / "returns.png", dpi=110)
        if study.diagnostics:
            draw_diagnostics(study, current).savefig(making / "diagnostics.png", dpi=110)
            rows.diagnostics.to_csv(making / "diagnostics.csv", index=False)
        rows.runs.to_csv(making / "runs.csv", index=False)
        rows.returns.to_csv(making / "returns.csv", index=False)
        text, summary = write_text(name, study, current, older)
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


def main():
    args = tyro.cli(Args, description=__doc__)
    check(args.studies)
    reference = read_reference(args.reference)
    sys.path.insert(0, str(ROOT))  # where the scripts are, whose settings are part of what a run is known by
    if args.wandb:
        from benchmark import wandb_report  # which takes seconds

        target = wandb_report.log_in(args.wandb)
    for name in args.studies:
        rows = collect(name, STUDIES[name], Path.cwd() / "runs")
        keys = {run.key for run in runs_of(name, STUDIES[name])}
        if rows.returns.empty or not rows.returns.key.isin(keys).any():
            commits = ", ".join(rows.runs[~rows.runs.key.isin(keys)].get("commit", pd.Series(dtype=str)).unique())
            other = f", and {RESULTS / name} has those of another, of commit {commits}" if commits else ""
            version = f"this version of {STUDIES[name].script}{other}"
            fail(f"{name} has no finished run with evaluations of {version}: python -m benchmark.run {name}")
        print(f"{name}: {report(name, STUDIES[name], rows, reference)}; see {RESULTS / name / 'README.md'}", flush=True)
        if args.wandb:
            text = (RESULTS / name / "README.md").read_text()
            print(wandb_report.publish(wandb_report.build(*target, name, STUDIES[name], text)))


if __name__ == "__main__":
    main()
