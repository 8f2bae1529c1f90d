"""Train the seeds behind the README's learning figure, and collect their evaluations.

    python benchmark/learning.py                          # run what is missing, two at a time, then CSV and figure
    python benchmark/learning.py --reference CURVES.csv   # with published curves (env_id,seed,step,return) below ours

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

import tyro
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "sac_continuous.py"
RESULTS = ROOT / "benchmark" / "results"
RUNS = {  # environment: seeds and flags; one thread each, so that two runs share two cores without waiting
    "HalfCheetah-v4": (3, "--total-timesteps 100000".split()),
    "Hopper-v4": (3, "--total-timesteps 100000".split()),
    "Pendulum-v1": (
        5,
        "--total-timesteps 10000 --learning-starts 1000 --eval-frequency 2000 --eval-episodes 100".split(),
    ),
}


@dataclass
class Args:
    jobs: int = 2  # runs at a time
    reference: Path | None = None  # CSV of published curves to draw below ours


def name_of_code() -> str:
    """Results of another version of the script are never mixed in: the runs carry the script's hash in their name."""
    return "learning-" + hashlib.sha256(SCRIPT.read_bytes()).hexdigest()[:8]


def folder_of(env_id: str, seed: int) -> Path | None:
    return max(ROOT.glob(f"runs/{env_id}__{name_of_code()}__{seed}__*"), default=None)


def command(env_id: str, seed: int, flags: list[str]) -> list[str]:
    flags = ["--env-id", env_id, "--seed", str(seed), *flags, "--threads", "1"]
    return ["python", SCRIPT.name, *flags]


def train(env_id: str, seed: int, flags: list[str]) -> int:
    """Run or resume one seed; returns the exit code."""
    folder = folder_of(env_id, seed)
    if folder and (folder / "model.pt").exists():
        return 0
    if folder:
        arguments = [SCRIPT.name, "--resume", str(folder)]
    else:
        arguments = [*command(env_id, seed, flags)[1:], "--exp-name", name_of_code()]
    code = subprocess.run([sys.executable, *arguments], cwd=ROOT, stdout=subprocess.DEVNULL).returncode
    print(env_id, "seed", seed, "finished" if code == 0 else f"failed with exit code {code}", flush=True)
    return code


def commit_of(folder: Path) -> str:
    """The commit that brought the code of this run, from the copy of the script in its folder."""
    blob = subprocess.check_output(["git", "hash-object", folder / SCRIPT.name], cwd=ROOT, text=True).strip()
    log = ["git", "log", "--format=%h", f"--find-object={blob}", "--", SCRIPT.name]
    return (subprocess.check_output(log, cwd=ROOT, text=True).split() or ["uncommitted"])[-1]


def collect() -> list[dict]:
    rows = []
    packages = ["torch", "gymnasium", "mujoco", "numpy"]
    versions = " ".join([f"python {platform.python_version()}", *(f"{name} {version(name)}" for name in packages)])
    cpus = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    for env_id, (seeds, flags) in RUNS.items():
        for seed in range(1, seeds + 1):
            folder = folder_of(env_id, seed)
            events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
            std = {event.step: event.value for event in events.Scalars("eval/episodic_return_std")}
            for event in events.Scalars("eval/episodic_return"):
                row = dict(env_id=env_id, seed=seed, step=event.step)
                row |= dict(return_mean=round(event.value, 2), return_std=round(std[event.step], 2))
                row |= dict(episodes=json.loads((folder / "args.json").read_text())["eval_episodes"])
                row |= dict(commit=commit_of(folder), versions=versions, hardware=f"{cpus[0]}, {len(cpus)} cores")
                rows.append(row | dict(command=" ".join(command(env_id, seed, flags))))
    return rows


def draw(rows: list[dict], reference: Path | None):
    """One panel per environment: a line per seed of ours, over the published seeds."""
    published = list(csv.DictReader(open(reference))) if reference else []
    figure = Figure(figsize=(13, 4), layout="constrained")
    for axes, env_id in zip(figure.subplots(1, len(RUNS)), RUNS):
        ours = [row for row in rows if row["env_id"] == env_id]
        end = max(int(row["step"]) for row in ours)
        theirs = [row | {"return_mean": row["return"]} for row in published if row["env_id"] == env_id]
        for curves, label, style in (
            (theirs, "published", dict(color="0.7", linestyle="--")),
            (ours, "this script", dict(color="C0", marker=".")),
        ):
            seeds = sorted({row["seed"] for row in curves}, key=int)
            for seed in seeds:
                points = [(int(row["step"]), float(row["return_mean"])) for row in curves if row["seed"] == seed]
                points = [point for point in points if point[0] <= 1.2 * end]
                axes.plot(*zip(*points), **style, label=f"{label} (n = {len(seeds)})" if seed == seeds[0] else None)
        axes.set(title=env_id, xlabel="environment steps", ylabel="return, deterministic policy", xlim=(0, 1.05 * end))
        axes.legend()
    figure.savefig(RESULTS / "learning.png", dpi=120)


def main():
    args = tyro.cli(Args)
    jobs = [(env_id, seed, flags) for env_id, (seeds, flags) in RUNS.items() for seed in range(1, seeds + 1)]
    with ThreadPoolExecutor(args.jobs) as pool:
        codes = list(pool.map(lambda job: train(*job), jobs))
    if any(codes):
        sys.exit("some runs failed: run this command again to continue them")
    rows = collect()
    RESULTS.mkdir(exist_ok=True)
    with open(RESULTS / "learning.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    draw(rows, args.reference)
    for env_id in RUNS:
        end = max(row["step"] for row in rows if row["env_id"] == env_id)
        final = [row["return_mean"] for row in rows if row["env_id"] == env_id and row["step"] == end]
        print(f"{env_id} at {end} steps: mean {sum(final) / len(final):.1f} of {final}")


if __name__ == "__main__":
    main()
