"""Curves of a few runs, with what they were run with, in a folder of benchmark/results.

    python benchmark/curves.py eval/success_rate benchmark/results/hindsight runs/*hindsight*

Writes curves.csv, runs.csv and curves.png there. What tells runs apart is their --exp-name.
"""

import csv
import importlib.metadata
import json
import platform
import re
import shlex
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

NOT_IN_COMMANDS = ("resume", "evaluate", "compile")  # what a new run does not need


def read(run: Path, key: str) -> list[tuple[int, float]]:
    """Steps and values of a record."""
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    return [(event.step, round(event.value, 4)) for event in events.Scalars(key)]


def command(args: dict) -> str:
    """The command line of a run, without what is the default of the script's text beside it."""
    words = ["python", f"{args['script']}.py"]
    defaults = args["defaults"]
    for key, value in args["flags"].items():
        if key not in NOT_IN_COMMANDS and value != defaults.get(key, value):
            flag = "--" + key.replace("_", "-")
            words += [flag, str(value)] if not isinstance(value, bool) else [flag]
    return shlex.join(words)


def defaults_of(script: Path) -> dict:
    """Each flag's default, from the lines `name: type = value` of the script."""
    found = re.findall(r"^    (\w+): [^=\n]+ = ([^#\n]+?)(?:  #.*)?$", script.read_text(), re.M)
    values = {}
    for name, text in found:
        try:
            values.setdefault(name, json.loads(text.replace("_", "")))
        except ValueError:
            values.setdefault(name, {"True": True, "False": False, "None": None}.get(text))
    return values


def processor() -> str:
    names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return f"{names[0] if names else platform.processor()}, {len(names)} shared cores"


def commit_of(script: Path) -> str:
    """The oldest commit that has this text of the script."""
    blob = git("hash-object", script.resolve())
    commits = git("log", "--reverse", "--format=%h", "--", script.name).split()
    same = [c for c in commits if git("rev-parse", f"{c}:{script.name}") == blob]
    return same[0] if same else "unknown"


def git(*words) -> str:
    root = Path(__file__).parent
    result = subprocess.run(["git", *map(str, words)], cwd=root.parent, capture_output=True)
    return result.stdout.decode().strip()


def versions(run: Path) -> str:
    noted = torch.load(run / "checkpoint.pt", weights_only=True, mmap=True)["versions"]
    used = ("python", "torch", "numpy", "gymnasium", "mujoco")
    parts = [f"{name} {noted[name]}" for name in used if name in noted]
    if "robotics" in json.loads((run / "args.json").read_text())["env_id"]:
        parts.append(f"gymnasium-robotics {importlib.metadata.version('gymnasium-robotics')}")
    return " ".join(parts)


def write(path: Path, header: list[str], rows: list):
    with open(path, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])


def plot(path: Path, key: str, curves: dict[str, dict[int, list]]):
    """Each variant's mean over seeds, and each seed beside it."""
    axes = Figure(figsize=(6, 4), layout="constrained").subplots()
    for i, (variant, seeds) in enumerate(sorted(curves.items())):
        steps = [step for step, _ in next(iter(seeds.values()))]
        values = np.array([[value for _, value in points] for points in seeds.values()])
        axes.plot(steps, values.T, f"C{i}", lw=0.7, alpha=0.5)
        axes.plot(steps, values.mean(0), f"C{i}.-", lw=2, label=f"{variant} (n = {len(seeds)})")
    axes.set(xlabel="environment steps", ylabel=key)
    axes.legend()
    axes.figure.savefig(path, dpi=120)


def main(key: str, target: str, *runs: str):
    folder = Path(target)
    folder.mkdir(parents=True, exist_ok=True)
    curves = defaultdict(dict)
    points, described = [], []
    for run in map(Path, sorted(runs)):
        flags = json.loads((run / "args.json").read_text())
        (script,) = run.glob("sac_*.py")
        curve = read(run, key)
        name = (flags["env_id"], flags["exp_name"], flags["seed"])
        curves[flags["exp_name"]][flags["seed"]] = curve
        points += [[*name, *point] for point in curve]
        args = {"script": script.stem, "defaults": defaults_of(script), "flags": flags}
        described.append([*name, commit_of(script), versions(run), processor(), command(args)])
    write(folder / "curves.csv", ["env_id", "variant", "seed", "step", key], points)
    header = ["env_id", "variant", "seed", "commit", "versions", "hardware", "command"]
    write(folder / "runs.csv", header, described)
    plot(folder / "curves.png", key, curves)


if __name__ == "__main__":
    main(*sys.argv[1:])
