"""How fast the script trains, beside Stable-Baselines3 and SBX, on one machine in the same minutes.

    python benchmark/speed.py                        # all, in half an hour; keep the machine quiet
    python benchmark/speed.py --parts whole --rounds 9
    python benchmark/speed.py --parts whole --beside "LeanRL=../env/bin/python ../sac.py --compile"

All variants are started once, warmed up beyond compilation, and paused. Then each in turn goes on
for some seconds, while its environment steps are counted: A B C A B C ... So what else the machine
does meets all of them alike. Everyone trains whole (act, step, store, sample, update, log) with
batch 256, two hidden layers of 256, one update per step and no evaluations. Results go to
benchmark/results/speed.{csv,md,png}.
"""

import contextlib
import itertools
import os
import platform
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmark.jobs import die_with_parent
from benchmark.peers import python_of_peers
from benchmark.runs import RESULTS, ROOT, fail
from benchmark.same_bits import describe
from benchmark.speed_parts import floor, memory, row, update

try:
    import pandas as pd

    from benchmark.markup import tabulate
except ImportError as error:
    fail(f"{error}: pip install -r benchmark/requirements.txt")

SCRIPT = "sac_continuous.py"
# variant: library and flags; each is measured with one and with two threads, on as many cores
VARIANTS = {
    "compiled": [str(ROOT / SCRIPT), "--compile", "on"],
    "compiled, bfloat16": [str(ROOT / SCRIPT), "--compile", "on", "--matmul-precision", "medium"],
    "eager": [str(ROOT / SCRIPT), "--compile", "off"],
    "SBX": ["sbx"],
    "Stable-Baselines3": ["stable_baselines3"],
    "environment alone": ["env"],
}
OURS = [name for name, words in VARIANTS.items() if words[0].endswith(".py")]
CASE = ["env_id", "variant", "threads", "setting", "unit"]  # what a row measures
FLAGS = ["--learning-starts", "100", "--total-timesteps", "100000000"]
Part = Literal["whole", "floor", "update", "start", "memory"]


@dataclass
class Args:
    # whole runs; matrix products alone; updates against sizes; seconds to the first step; memory
    parts: tuple[Part, ...] = get_args(Part)
    rounds: int = 5  # turns of each variant
    seconds: float = 6.0  # of each turn
    env_ids: tuple[str, ...] = ("Hopper-v4", "Humanoid-v4")  # MuJoCo environments
    # NAME=PYTHON SCRIPT [FLAGS]: scripts with CleanRL's flags, measured beside all others
    beside: tuple[str, ...] = ()


def scripts_beside(args: Args) -> dict[str, list[str]]:
    """Interpreter, script and flags of what --beside names, by name."""
    scripts = {}
    for text in args.beside:
        name, _, command = text.partition("=")
        words = shlex.split(command)
        if not name or len(words) < 2 or not all(map(os.path.isfile, words[:2])):
            fail(f"--beside {text}: must be NAME=PYTHON SCRIPT [FLAGS], the first two files")
        if name in [*VARIANTS, *scripts]:
            fail(f"--beside {text}: {name} is measured already, choose another name")
        # They start in another folder. What a link leads to is not the same interpreter.
        scripts[name] = [*map(os.path.abspath, words[:2]), *words[2:]]
    return scripts


class Trainer:
    """A training process that counts its environment steps, and runs only while it is measured.

    `library` is a script of ours, a package, or the interpreter of a script that begins `flags`.
    """

    def __init__(
        self, folder: Path, library: str, env_id: str, threads: int, flags=(), environ=None
    ):
        own = []
        if library.endswith(".py"):
            python = sys.executable
            own = [*FLAGS, "--eval-frequency", "0", "--threads", str(threads)]
        elif library in ("sbx", "stable_baselines3", "env"):
            python = python_of_peers()
        else:
            python = library
            library, *flags = flags
            own = FLAGS
        folder.mkdir()
        (folder / "count").write_bytes(bytes(8))
        self.log = folder / "log"
        self.began = time.time()
        worker = ROOT / "benchmark" / "speed_worker.py"
        command = [python, worker, library, env_id, threads, folder / "count"]
        gpus = {} if "--cuda" in flags else {"CUDA_VISIBLE_DEVICES": ""}
        self.process = subprocess.Popen(
            [*map(str, command), *own, *flags],
            cwd=folder,
            stdout=open(self.log, "w"),
            stderr=subprocess.STDOUT,
            env=os.environ | gpus | (environ or {}),
            start_new_session=True,
            preexec_fn=die_with_parent,  # they train without end
        )
        self.count = np.memmap(folder / "count", np.int64, "r")

    def wait_for(self, steps: int) -> float:
        """Seconds from the start until so many environment steps were made."""
        while self.count[0] < steps:
            self.fail_if_ended()
            time.sleep(0.02)
        return time.time() - self.began

    def fail_if_ended(self):
        if self.process.poll() is not None:
            sys.exit(f"error: {self.process.args[2:5]} ended: {self.log.read_text()[-2000:]}")

    def send(self, what: signal.Signals):
        with contextlib.suppress(ProcessLookupError):  # it may have ended by itself
            os.killpg(self.process.pid, what)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.send(signal.SIGKILL)
        self.process.wait()


def steps_per_second(trainers: list[Trainer], seconds: float) -> float:
    """Environment steps per second of all these together, while all others are paused."""
    made = lambda: sum(int(trainer.count[0]) for trainer in trainers)
    for trainer in trainers:
        trainer.send(signal.SIGCONT)
    time.sleep(1)  # until the caches are theirs again
    before, began = made(), time.perf_counter()
    time.sleep(seconds)
    result = (made() - before) / (time.perf_counter() - began)
    for trainer in trainers:
        trainer.fail_if_ended()
        trainer.send(signal.SIGSTOP)
    return result


def whole(args: Args) -> Iterator[dict]:
    """Environment steps per second of whole training runs."""
    variants = VARIANTS | scripts_beside(args)
    pairs = [(variant, threads) for variant in variants for threads in (1, 2)]
    pairs.remove(("environment alone", 2))
    for env_id in args.env_ids:
        trainers = {}
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
            for variant, threads in tqdm(pairs, desc=f"{env_id}: warming up"):
                library, *flags = variants[variant]
                place = Path(folder, str(len(trainers)))
                trainer = stack.enter_context(Trainer(place, library, env_id, threads, flags))
                trainers[variant, threads] = trainer
                trainer.wait_for(1500)
                trainer.send(signal.SIGSTOP)
            for turn in tqdm(range(args.rounds), desc=f"{env_id}: measuring"):
                for (variant, threads), trainer in trainers.items():
                    value = steps_per_second([trainer], args.seconds)
                    yield row("whole", env_id, variant, threads, "", turn, value, "steps/s")


def start(args: Args) -> Iterator[dict]:
    """Seconds from the command to the first environment step, and to the first update."""
    cases = ["eager", "compiled, first time", "compiled, again", "SBX", "Stable-Baselines3"]
    for turn in tqdm(range(args.rounds), desc="starting"):
        with tempfile.TemporaryDirectory() as folder:
            cache = {"TORCHINDUCTOR_CACHE_DIR": str(Path(folder, "compiled"))}
            for number, name in enumerate(cases):
                library, *flags = VARIANTS[name.partition(",")[0]]
                place = Path(folder, str(number))
                with Trainer(place, library, "Hopper-v4", 2, flags, cache) as trainer:
                    for steps, setting in ((1, "first environment step"), (110, "first updates")):
                        value = trainer.wait_for(steps)
                        yield row("start", "Hopper-v4", name, 2, setting, turn, value, "s")


def versions(args: Args) -> dict:
    """What a figure holds for: commit, packages and hardware."""
    peers = (ROOT / "benchmark" / "requirements-peers.txt").read_text().split()
    packages = [f"python {platform.python_version()}", f"torch {version('torch')}"]
    named = ("stable", "sbx", "jax=", "mujoco")
    packages += [line.replace("==", " ") for line in peers if line.startswith(named)]
    packages += [f"beside `{text}`" for text in args.beside]
    processor = torch.cpu.get_capabilities()["cpu_name"]
    return dict(
        commit=describe(str(ROOT)),
        versions=", ".join(packages),
        hardware=f"{processor}, {os.cpu_count()} cores",
    )


def spread(values: pd.Series, form: str = ".0f") -> str:
    """The median, and in brackets the least and the greatest."""
    return f"{values.median():{form}} ({values.min():{form}} - {values.max():{form}})"


def ratio(rows: pd.DataFrame, threads: int, of: str, to: str) -> str:
    """Over the rounds in one environment, one variant's speed divided by another's."""
    speeds = rows[rows.threads == threads].pivot(index="round", columns="variant", values="value")
    return spread(speeds[of] / speeds[to], ".2f")


def report(rows: pd.DataFrame) -> str:
    """All results as Markdown."""
    commits = {part: "; ".join(of.commit.unique()) for part, of in rows.groupby("part", sort=False)}
    made = ", ".join(f"{part}: {commit}" for part, commit in commits.items())
    where = "; ".join([*rows.versions.unique(), *rows.hardware.unique()])
    text = [
        "# Speed",
        f"`python benchmark/speed.py` (commits: {made}); {where}.\n"
        "Medians over the rounds, with the least and the greatest in brackets.",
    ]
    for env_id, of in rows[rows.part == "whole"].groupby("env_id", sort=False):
        cells = of.groupby(["variant", "threads"]).value.apply(spread)
        names = of.variant.unique()
        lines = [[name, *(cells.get((name, n), "") for n in (1, 2))] for name in names]
        others = [name for name in names if name not in [*OURS, "environment alone"]]
        for pair in itertools.product(OURS[:2], others):
            lines.append([" / ".join(pair), *(ratio(of, n, *pair) for n in (1, 2))])
        text += [f"## {env_id}: whole training runs, environment steps per second"]
        text += [tabulate(["variant", "1 thread, 1 core", "2 threads, 2 cores"], lines)]
    for part, title in {
        "floor": "The floor: the matrix products of one update alone",
        "update": "One update and one step (Hopper-v4, compiled, 2 threads)",
        "start": "From the command to the first step",
        "memory": "Memory of the replay buffer as it fills",
    }.items():
        of = rows[rows.part == part].groupby(CASE, sort=False).value
        lines = [
            [f"{env_id}: {variant}", threads or "", setting, f"{spread(values, '.3g')} {unit}"]
            for (env_id, variant, threads, setting, unit), values in of
        ]
        if lines:
            text += [f"## {title}", tabulate(["what", "threads", "setting", "value"], lines)]
    return "\n\n".join(text) + "\n"


def draw(rows: pd.DataFrame):
    """A bar per variant, thread count and environment, with the range of the rounds."""
    whole = rows[(rows.part == "whole") & (rows.variant != "environment alone")]
    table = whole.groupby(["env_id", "variant", "threads"]).value.agg(["median", "min", "max"])
    # Not every environment need be measured beside the same scripts.
    variants = whole.groupby("env_id", sort=False).variant.unique()
    figure = Figure(figsize=(1.1 * variants.map(len).sum(), 4), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(variants)))
    for axes, (env_id, names) in zip(panels, variants.items()):
        for threads, color, hatch in ((1, "0.75", ""), (2, "C0", "//")):
            values = [table.loc[env_id, name, threads] for name in names]
            places = np.arange(len(names)) + 0.2 * (2 * threads - 3)
            ranges = [[m - a for m, a, _ in values], [b - m for m, _, b in values]]
            label = f"{threads} thread{'s' * (threads > 1)} on {threads} core{'s' * (threads > 1)}"
            style = dict(color=color, hatch=hatch, edgecolor="k", label=label)
            bars = axes.bar(places, [median for median, *_ in values], 0.38, yerr=ranges, **style)
            axes.bar_label(bars, fmt="%.0f", padding=3)
        owners = ["this script,\n" * (name in OURS) for name in names]
        broken = [name.replace(", ", ",\n").replace("-", "-\n") for name in names]
        axes.set_xticks(range(len(names)), map("".join, zip(owners, broken)))
        axes.set(
            title=env_id, ylabel="environment steps per second", ylim=(0, 1.2 * axes.get_ylim()[1])
        )
        axes.legend()
    figure.savefig(RESULTS / "speed.png", dpi=120)


def check_turns(rounds: int, seconds: float):
    if rounds < 1:
        fail(f"--rounds {rounds}: must be at least 1")
    if seconds <= 0:
        fail(f"--seconds {seconds}: must be above 0")


def main():
    args = tyro.cli(Args, description=__doc__)
    check_turns(args.rounds, args.seconds)
    scripts_beside(args)  # ends the program where they cannot be run
    parts = {"whole": whole, "floor": floor, "update": update, "start": start, "memory": memory}
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "speed.csv"
    kept = None
    if path.exists():  # a commit may look like a number
        kept = pd.read_csv(path, keep_default_na=False, dtype={"commit": str})
    for part in args.parts:
        about = versions(args)
        measured = pd.DataFrame(parts[part](args)).assign(**about)
        if kept is not None:
            # Ratios are taken within one measurement, so that no row of an earlier one may stay.
            again = (kept.part == part) & kept.env_id.isin(measured.env_id)
            measured = pd.concat([kept[~again], measured])
        kept = measured
        kept = kept.sort_values("part", key=lambda x: x.map([*parts].index), kind="stable")
        # After each part, so that what is measured is not lost.
        kept.to_csv(path, index=False, float_format="%.5g")
    (RESULTS / "speed.md").write_text(report(kept))
    if "whole" in kept.part.values:
        draw(kept)
    print(report(kept))


if __name__ == "__main__":
    main()
