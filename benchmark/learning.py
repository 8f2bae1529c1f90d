"""Train the seeds behind the README's learning figures, and collect their evaluations.

    python benchmark/learning.py                          # run what is missing, two at a time, then CSV and figure
    python benchmark/learning.py --suite dmc              # the same for the DeepMind Control Suite, with sac_dmc.py
    python benchmark/learning.py --suite knobs            # and for knobs of sac_ablations.py; or walker
    python benchmark/learning.py --reference NUMBERS.csv  # with published ones below or beside ours

NUMBERS.csv holds curves (env_id,seed,step,return) or means (env_id,implementation,steps,mean).

Stopped at any moment, it continues: finished runs are kept, unfinished ones resume from their checkpoint.
"""

import csv
import hashlib
import json
import platform
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal, NamedTuple

import tyro
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmark" / "results"
STEPS = "--total-timesteps 100000"


class Run(NamedTuple):
    env_id: str
    seeds: int
    flags: str


class Suite(NamedTuple):
    script: str
    results: str  # name of the CSV and of the figure
    runs: dict[str, Run]  # by their label: the environment, or what varies on the one environment there is
    watched: tuple[str, ...] = ()  # labels whose losses are drawn too


def variants(env_id: str, seeds: int, flags: str, changes: dict[str, str]) -> dict[str, Run]:
    """The same run with one thing changed at a time."""
    return {label: Run(env_id, seeds, f"{flags} {change}".strip()) for label, change in changes.items()}


DMC = ["walker-walk", "cartpole-swingup", "ball_in_cup-catch", "cartpole-balance"]
WALKER = {
    "default": "",
    "eps correction": "--tanh-correction eps",
    "one critic": "--n-critics 1",
    "truncation terminates": "--truncation-terminates",
    "learning rates 1e-3": "--policy-lr 1e-3 --q-lr 1e-3",
    "all four": "--tanh-correction eps --n-critics 1 --truncation-terminates --policy-lr 1e-3 --q-lr 1e-3",
}
SUITES = {  # one thread each, so that two runs share two cores without waiting
    "gymnasium": Suite(
        "sac_continuous.py",
        "learning",
        {
            "HalfCheetah-v4": Run("HalfCheetah-v4", 3, STEPS),
            "Hopper-v4": Run("Hopper-v4", 3, STEPS),
            "Pendulum-v1": Run(
                "Pendulum-v1",
                5,
                "--total-timesteps 10000 --learning-starts 1000 --eval-frequency 2000 --eval-episodes 100",
            ),
        },
    ),
    "dmc": Suite("sac_dmc.py", "dmc", {task: Run(task, 3, STEPS) for task in DMC}, watched=("walker-walk",)),
    "knobs": Suite(
        "sac_ablations.py",
        "knobs",
        variants(
            "shimmy:dm_control/cartpole-swingup-v0",
            3,
            "--total-timesteps 20000 --eval-frequency 2000 --compile on",
            {
                "default (2 critics, learned alpha, delay 1)": "",
                "1 critic": "--n-critics 1",
                "5 critics": "--n-critics 5",
                "alpha fixed at 0.2": "--no-autotune --alpha 0.2",
                "delay 2": "--policy-frequency 2",
            },
        ),
    ),
    "walker": Suite(
        "sac_ablations.py",
        "walker",
        variants("shimmy:dm_control/walker-walk-v0", 2, "--total-timesteps 50000", WALKER),
        watched=tuple(WALKER),
    ),
}
WATCHED = {  # key of a record, what the figure calls it
    "eval/episodic_return": "return, deterministic policy",
    "losses/alpha": "temperature alpha",
    "losses/entropy": "entropy of the policy, nats",
    "losses/qf1_values": "Q-value, first critic",
    "losses/qf_loss": "loss of the critics",
    "losses/actor_loss": "loss of the policy",
}


@dataclass
class Args:
    suite: Literal["gymnasium", "dmc", "knobs", "walker"] = "gymnasium"  # what to train
    jobs: int = 2  # runs at a time
    reference: Path | None = None  # CSV of published numbers to draw with ours


def experiment(suite: Suite, label: str) -> str:
    """Results of another version of the script are never mixed in: the runs carry the script's hash in their name."""
    name = "learning-" + hashlib.sha256((ROOT / suite.script).read_bytes()).hexdigest()[:8]
    return name if label == suite.runs[label].env_id else f"{name}-{re.sub(r'[^a-z0-9]+', '-', label)}"


def folder_of(suite: Suite, label: str, seed: int) -> Path | None:
    env_id = re.sub(r"[^\w.-]+", "-", suite.runs[label].env_id)  # as the script names its folders
    return max(ROOT.glob(f"runs/{env_id}__{experiment(suite, label)}__{seed}__*"), default=None)


def command(suite: Suite, label: str, seed: int) -> list[str]:
    run = suite.runs[label]
    return ["python", suite.script, "--env-id", run.env_id, "--seed", str(seed), *run.flags.split(), "--threads", "1"]


def train(suite: Suite, label: str, seed: int) -> int:
    """Run or resume one seed; returns the exit code."""
    folder = folder_of(suite, label, seed)
    if folder and (folder / "model.pt").exists():
        return 0
    if folder:
        arguments = [suite.script, "--resume", str(folder)]
    else:
        arguments = [*command(suite, label, seed)[1:], "--exp-name", experiment(suite, label)]
    code = subprocess.run([sys.executable, *arguments], cwd=ROOT, stdout=subprocess.DEVNULL).returncode
    print(label, "seed", seed, "finished" if code == 0 else f"failed with exit code {code}", flush=True)
    return code


def commit_of(script: Path) -> str:
    """The commit that brought the code of a run, from the copy of the script in its folder."""
    blob = subprocess.check_output(["git", "hash-object", script], cwd=ROOT, text=True).strip()
    log = ["git", "log", "--format=%h", f"--find-object={blob}", "--", script.name]
    return (subprocess.check_output(log, cwd=ROOT, text=True).split() or ["uncommitted"])[-1]


def collect(suite: Suite) -> tuple[list[dict], list[dict]]:
    """Rows of all evaluations, and of the records of the runs that are watched."""
    rows, watched = [], []
    packages = ["torch", "gymnasium", "mujoco", "numpy"] + ["dm-control"] * (suite.script != "sac_continuous.py")
    versions = " ".join([f"python {platform.python_version()}", *(f"{name} {version(name)}" for name in packages)])
    cpus = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    for label, run in suite.runs.items():
        for seed in range(1, run.seeds + 1):
            folder = folder_of(suite, label, seed)
            events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
            std = {event.step: event.value for event in events.Scalars("eval/episodic_return_std")}
            for event in events.Scalars("eval/episodic_return"):
                row = dict(env_id=run.env_id) | (dict(variant=label) if label != run.env_id else {})
                row |= dict(seed=seed, step=event.step)
                row |= dict(return_mean=round(event.value, 2), return_std=round(std[event.step], 2))
                row |= dict(episodes=json.loads((folder / "args.json").read_text())["eval_episodes"])
                row |= dict(commit=commit_of(folder / suite.script), versions=versions)
                row |= dict(hardware=f"{cpus[0]}, {len(cpus)} cores", command=" ".join(command(suite, label, seed)))
                rows.append(row)
            for key in WATCHED if label in suite.watched else ():
                points = [(event.step, f"{event.value:.6g}") for event in events.Scalars(key)]
                watched += [dict(label=label, seed=seed, step=step, key=key, value=value) for step, value in points]
    return rows, watched


def draw(suite: Suite, rows: list[dict], reference: Path | None):
    """One panel per environment: a line per seed of ours, over the published seeds or beside the published means."""
    published = list(csv.DictReader(open(reference))) if reference else []
    figure = Figure(figsize=(4.4 * len(suite.runs), 4), layout="constrained")
    for axes, env_id in zip(figure.subplots(1, len(suite.runs)), suite.runs):
        ours = [row for row in rows if row["env_id"] == env_id]
        end = max(row["step"] for row in ours)
        theirs = [row for row in published if row["env_id"] == env_id]
        lines = [row | {"return_mean": row["return"]} for row in theirs if "return" in row]
        for curves, label, style in (
            (lines, "published", dict(color="0.7", linestyle="--")),
            (ours, "this script", dict(color="C0", marker=".")),
        ):
            seeds = sorted({row["seed"] for row in curves}, key=int)
            for seed in seeds:
                points = [(int(row["step"]), float(row["return_mean"])) for row in curves if row["seed"] == seed]
                points = [point for point in points if point[0] <= 1.2 * end]
                axes.plot(*zip(*points), **style, label=f"{label} (n = {len(seeds)})" if seed == seeds[0] else None)
        means = [row for row in theirs if "mean" in row and row["algorithm"] == "SAC" and int(row["steps"]) == end]
        for marker, row in zip("s^vDP", means):
            label = f"{row['implementation']} (n = {row['n_seeds']})"
            axes.plot(end, float(row["mean"]), marker, color="0.4", markersize=8, label=label, zorder=3)
        axes.set(title=env_id, xlabel="environment steps", ylabel="return, deterministic policy", xlim=(0, 1.05 * end))
        if suite.script == "sac_dmc.py":
            axes.set(xlabel="simulator steps", ylabel="return (0 to 1000), deterministic policy", ylim=(0, 1050))
        axes.legend(fontsize="small")
    figure.savefig(RESULTS / f"{suite.results}.png", dpi=120)


STYLES = [
    dict(color=f"C{i}", linestyle=line) for i, line in enumerate(["-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), "-"])
]


def draw_variants(suite: Suite, rows: list[dict]):
    """One panel: the mean of the seeds of each variant, and the seeds themselves as points."""
    axes = (figure := Figure(figsize=(8, 5), layout="constrained")).subplots()
    for (label, run), style in zip(suite.runs.items(), STYLES):
        curves = [[row for row in rows if (row["variant"], row["seed"]) == (label, n + 1)] for n in range(run.seeds)]
        steps, returns = [row["step"] for row in curves[0]], [[row["return_mean"] for row in curve] for curve in curves]
        axes.plot(steps, [sum(column) / run.seeds for column in zip(*returns)], **style, label=label)
        axes.plot(steps * run.seeds, sum(returns, []), ".", color=style["color"], alpha=0.4)
    axes.set(title=f"{run.env_id}: mean of {run.seeds} seeds, seeds as points", xlabel="environment steps")
    axes.set(ylabel="return, deterministic policy")
    axes.legend()
    figure.savefig(RESULTS / f"{suite.results}.png", dpi=120)


def draw_watched(suite: Suite, watched: list[dict], name: str):
    """What to look at when learning diverges, over training: a panel per record, a line per seed, a style per label."""
    figure = Figure(figsize=(13, 6.5), layout="constrained")
    for axes, (key, title) in zip(figure.subplots(2, 3).flat, WATCHED.items()):
        for label, style in zip(suite.watched, STYLES):
            for seed in range(1, suite.runs[label].seeds + 1):
                rows = [row for row in watched if (row["label"], row["seed"], row["key"]) == (label, seed, key)]
                points = [(row["step"], float(row["value"])) for row in rows]
                axes.plot(*zip(*points), **style, label=label if seed == 1 else None)
        axes.set(title=title, xlabel="simulator steps", yscale="log" if key == "losses/alpha" else "linear")
    axes.legend()
    figure.savefig(RESULTS / f"{name}.png", dpi=120)


def write(rows: list[dict], name: str):
    with open(RESULTS / f"{name}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def main():
    args = tyro.cli(Args)
    suite = SUITES[args.suite]
    jobs = [(label, seed) for label, run in suite.runs.items() for seed in range(1, run.seeds + 1)]
    jobs.sort(key=lambda job: job[1])  # a whole set of first seeds, then of second ones
    with ThreadPoolExecutor(args.jobs) as pool:
        codes = list(pool.map(lambda job: train(suite, *job), jobs))
    if any(codes):
        sys.exit("some runs failed: run this command again to continue them")
    rows, watched = collect(suite)
    RESULTS.mkdir(exist_ok=True)
    write(rows, suite.results)
    if "variant" in rows[0]:
        draw_variants(suite, rows)
    else:
        draw(suite, rows, args.reference)
    if watched:
        write(watched, f"{suite.results}-watched")
        draw_watched(suite, watched, f"{suite.results}-watched")
    for label in suite.runs:
        mine = [row for row in rows if row.get("variant", row["env_id"]) == label]
        final = [row["return_mean"] for row in mine if row["step"] == mine[-1]["step"]]
        print(f"{label} at {mine[-1]['step']} steps: mean {sum(final) / len(final):.1f} of {final}")


if __name__ == "__main__":
    main()
