"""Train the seeds behind the README's learning figures, and collect their evaluations.

    python benchmark/learning.py                          # run what is missing, two at a time, then CSV and figure
    python benchmark/learning.py --suite dmc              # the same for the DeepMind Control Suite, with sac_dmc.py
    python benchmark/learning.py --reference NUMBERS.csv  # with published ones below or beside ours

NUMBERS.csv holds curves (env_id,seed,step,return) or means (env_id,algorithm,implementation,steps,mean,n_seeds).

Stopped at any moment, it continues: finished runs are kept, unfinished ones resume from their checkpoint.
"""

import csv
import hashlib
import json
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal, NamedTuple

import tyro
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmark" / "results"
STEPS = "--total-timesteps 100000"


class Run(NamedTuple):
    seeds: int
    flags: str


class Suite(NamedTuple):
    script: str
    results: str  # name of the CSV and of the figure
    runs: dict[str, Run]  # by environment
    watched: str = ""  # environment whose losses are drawn too


DMC = ["walker-walk", "cartpole-swingup", "ball_in_cup-catch", "cartpole-balance"]
SUITES = {  # one thread each, so that two runs share two cores without waiting
    "gymnasium": Suite(
        "sac_continuous.py",
        "learning",
        {
            "HalfCheetah-v4": Run(3, STEPS),
            "Hopper-v4": Run(3, STEPS),
            "Pendulum-v1": Run(
                5,
                "--total-timesteps 10000 --learning-starts 1000 --eval-frequency 2000 --eval-episodes 100",
            ),
        },
    ),
    "dmc": Suite("sac_dmc.py", "dmc", {task: Run(3, STEPS) for task in DMC}, watched="walker-walk"),
}
LINES = ["", "-", "--", "-.", ":"]  # by seed
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
    suite: Literal["gymnasium", "dmc"] = "gymnasium"  # what to train
    jobs: int = 2  # runs at a time
    reference: Path | None = None  # CSV of published numbers to draw with ours


def experiment(suite: Suite) -> str:
    """Results of another version of the script are never mixed in: the runs carry the script's hash in their name."""
    return "learning-" + hashlib.sha256((ROOT / suite.script).read_bytes()).hexdigest()[:8]


def folder_of(suite: Suite, env_id: str, seed: int) -> Path | None:
    return max(ROOT.glob(f"runs/{env_id}__{experiment(suite)}__{seed}__*"), default=None)


def command(suite: Suite, env_id: str, seed: int) -> list[str]:
    flags = suite.runs[env_id].flags.split()
    return ["python", suite.script, "--env-id", env_id, "--seed", str(seed), *flags, "--threads", "1"]


def train(suite: Suite, env_id: str, seed: int) -> int:
    """Run or resume one seed; returns the exit code."""
    folder = folder_of(suite, env_id, seed)
    if folder and (folder / "model.pt").exists():
        return 0
    if folder:
        arguments = [suite.script, "--resume", str(folder)]
    else:
        arguments = [*command(suite, env_id, seed)[1:], "--exp-name", experiment(suite)]
    code = subprocess.run([sys.executable, *arguments], cwd=ROOT, stdout=subprocess.DEVNULL).returncode
    print(env_id, "seed", seed, "finished" if code == 0 else f"failed with exit code {code}", flush=True)
    return code


def commit_of(script: Path) -> str:
    """The first commit that had this content of a script, from a copy of it."""
    blob = subprocess.check_output(["git", "hash-object", script], cwd=ROOT, text=True).strip()
    log = ["git", "log", "--format=%h", f"--find-object={blob}", "--", script.name]
    return (subprocess.check_output(log, cwd=ROOT, text=True).split() or ["uncommitted"])[-1]


def collect(suite: Suite) -> tuple[list[dict], list[dict]]:
    """Rows of all evaluations, and of the records of the runs that are watched."""
    rows, watched = [], []
    packages = ["torch", "gymnasium", "mujoco", "numpy"] + ["dm-control"] * (suite.script != "sac_continuous.py")
    versions = " ".join([f"python {platform.python_version()}", *(f"{name} {version(name)}" for name in packages)])
    cpus = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    for env_id, run in suite.runs.items():
        for seed in range(1, run.seeds + 1):
            folder = folder_of(suite, env_id, seed)
            events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
            std = {event.step: event.value for event in events.Scalars("eval/episodic_return_std")}
            for event in events.Scalars("eval/episodic_return"):
                row = dict(env_id=env_id, seed=seed, step=event.step)
                row |= dict(return_mean=round(event.value, 2), return_std=round(std[event.step], 2))
                row |= dict(episodes=json.loads((folder / "args.json").read_text())["eval_episodes"])
                row |= dict(commit=commit_of(folder / suite.script), versions=versions)
                row |= dict(hardware=f"{cpus[0]}, {len(cpus)} cores", command=" ".join(command(suite, env_id, seed)))
                rows.append(row)
            for key in WATCHED if env_id == suite.watched else ():
                points = [(event.step, f"{event.value:.6g}") for event in events.Scalars(key)]
                watched += [dict(env_id=env_id, seed=seed, step=step, key=key, value=value) for step, value in points]
    return rows, watched


def draw(suite: Suite, rows: list[dict], reference: Path | None):
    """One panel per environment: a line per seed of ours, over the published seeds or beside the published means."""
    published = list(csv.DictReader(open(reference))) if reference else []
    figure = Figure(figsize=(4.4 * len(suite.runs), 5), layout="constrained")
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
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.18))  # below: it hides no curve
    figure.savefig(RESULTS / f"{suite.results}.png", dpi=120)


def draw_watched(suite: Suite, watched: list[dict], name: str):
    """What to look at when learning diverges, over training: a panel per record, a line per seed."""
    figure = Figure(figsize=(13, 6.5), layout="constrained")
    for axes, (key, title) in zip(figure.subplots(2, 3).flat, WATCHED.items()):
        for seed in range(1, suite.runs[suite.watched].seeds + 1):
            rows = [row for row in watched if (row["seed"], row["key"]) == (seed, key)]
            axes.plot(*zip(*((row["step"], float(row["value"])) for row in rows)), LINES[seed], label=f"seed {seed}")
        axes.set(title=title, xlabel="simulator steps", yscale="log" if key == "losses/alpha" else "linear")
        axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.legend()
    figure.suptitle(suite.watched)
    figure.savefig(RESULTS / f"{name}.png", dpi=120)


def write(rows: list[dict], name: str):
    with open(RESULTS / f"{name}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def main():
    args = tyro.cli(Args)
    suite = SUITES[args.suite]
    jobs = [(env_id, seed) for env_id, run in suite.runs.items() for seed in range(1, run.seeds + 1)]
    jobs.sort(key=lambda job: job[1])  # a whole set of first seeds, then of second ones
    with ThreadPoolExecutor(args.jobs) as pool:
        codes = list(pool.map(lambda job: train(suite, *job), jobs))
    if any(codes):
        sys.exit("some runs failed: run this command again to continue them")
    rows, watched = collect(suite)
    RESULTS.mkdir(exist_ok=True)
    write(rows, suite.results)
    draw(suite, rows, args.reference)
    if watched:
        write(watched, f"{suite.results}-watched")
        draw_watched(suite, watched, f"{suite.results}-watched")
    for env_id in suite.runs:
        mine = [row for row in rows if row["env_id"] == env_id]
        final = [row["return_mean"] for row in mine if row["step"] == mine[-1]["step"]]
        print(f"{env_id} at {mine[-1]['step']} steps: mean {sum(final) / len(final):.1f} of {final}")


if __name__ == "__main__":
    main()
