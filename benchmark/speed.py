"""How fast the script trains, beside Stable-Baselines3 and SBX on the same machine in the same minutes.

    python benchmark/speed.py                        # everything, in about half an hour; keep the machine quiet
    python benchmark/speed.py --parts whole --rounds 9

All variants are started once, warmed up beyond compilation, and paused; then each in turn goes on for some seconds,
while the environment steps it makes are counted: A B C A B C ... So what else the machine does meets all of them alike.
Everyone trains whole (act, step, store, sample, update, log) with batch 256, two hidden layers of 256 and one update
per step. Evaluations are off, since the peers make none. Results go to benchmark/results/speed.{csv,md,png}.
"""

import contextlib
import csv
import itertools
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
import psutil
import torch
import tyro
from matplotlib.figure import Figure
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmark" / "results"
sys.path.insert(0, str(ROOT))
import sac_continuous as sac  # noqa: E402

SCRIPT = "sac_continuous.py"
ENV_IDS = ["Hopper-v4", "Humanoid-v4"]
# variant: library and flags; each is measured with one and with two threads, on as many cores
VARIANTS = {
    "compiled": [str(ROOT / SCRIPT), "--compile", "on"],
    "compiled, bfloat16": [str(ROOT / SCRIPT), "--compile", "on", "--matmul-precision", "medium"],
    "eager": [str(ROOT / SCRIPT), "--compile", "off"],
    "SBX": ["sbx"],
    "Stable-Baselines3": ["stable_baselines3"],
    "environment alone": ["env"],
}
if torch.cuda.is_available():
    VARIANTS |= {f"GPU, {name}": [*VARIANTS[name], "--cuda"] for name in ("compiled", "eager")}
FLAGS = ["--learning-starts", "100", "--eval-frequency", "0", "--total-timesteps", "100000000"]


@dataclass
class Args:
    parts: tuple[Literal["whole", "floor", "update", "start", "memory"], ...] = (
        "whole",
        "floor",
        "update",
        "start",
        "memory",
    )  # whole runs; GEMM floor; one update against its sizes; seconds to the first step; memory against rows
    rounds: int = 5  # turns of each variant
    seconds: float = 6.0  # of each turn
    env_ids: tuple[str, ...] = tuple(ENV_IDS)  # MuJoCo environments


def peers_python() -> str:
    """The peers' interpreter, in a virtual environment that is made on first use."""
    python = ROOT / ".venv-peers" / "bin" / "python"
    if not python.exists():
        print("making .venv-peers, once", flush=True)
        subprocess.run([sys.executable, "-m", "venv", ROOT / ".venv-peers"], check=True)
        requirements = ROOT / "benchmark" / "requirements-peers.txt"
        code = subprocess.run([python, "-m", "pip", "install", "--quiet", "-r", requirements]).returncode
        if code:
            python.unlink()
            sys.exit("error: the peers were not installed, see above; without them: --parts floor update start memory")
    return str(python)


class Trainer:
    """A training process that counts its environment steps, and runs only while it is measured."""

    def __init__(self, folder: Path, library: str, env_id: str, threads: int, flags: list[str] = (), environ=None):
        python = sys.executable if library.endswith(".py") else peers_python()
        own = FLAGS if library.endswith(".py") else []
        folder.mkdir()
        (folder / "count").write_bytes(bytes(8))
        self.log = folder / "log"
        self.began = time.time()
        command = [python, ROOT / "benchmark" / "speed_trainer.py", library, env_id, threads, folder / "count"]
        self.process = subprocess.Popen(
            [*map(str, command), *own, *flags],
            cwd=folder,
            stdout=open(self.log, "w"),
            stderr=subprocess.STDOUT,
            env=os.environ | ({} if "--cuda" in flags else {"CUDA_VISIBLE_DEVICES": ""}) | (environ or {}),
            start_new_session=True,
        )
        self.count = np.memmap(folder / "count", np.int64, "r")

    def wait_for(self, steps: int) -> float:
        """Seconds from the start until so many environment steps were made."""
        while self.count[0] < steps:
            if self.process.poll() is not None:
                sys.exit(f"error: {self.process.args[2:5]} ended: {self.log.read_text()[-2000:]}")
            time.sleep(0.02)
        return time.time() - self.began

    def send(self, what: signal.Signals):
        with contextlib.suppress(ProcessLookupError):  # it may have ended by itself
            os.killpg(self.process.pid, what)

    def steps_per_second(self, seconds: float) -> float:
        self.send(signal.SIGCONT)
        time.sleep(1)  # until the caches are its own again
        before, began = self.count[0], time.perf_counter()
        time.sleep(seconds)
        result = (self.count[0] - before) / (time.perf_counter() - began)
        self.send(signal.SIGSTOP)
        return float(result)


def whole(args: Args) -> list[dict]:
    """Environment steps per second of whole training runs."""
    rows = []
    for env_id in args.env_ids:
        with tempfile.TemporaryDirectory() as folder:
            trainers = {}
            try:
                pairs = [(variant, n) for variant in VARIANTS for n in (1, 2)]
                pairs.remove(("environment alone", 2))
                for key in tqdm(pairs, desc=f"{env_id}: warming up"):
                    (variant, threads), (library, *flags) = key, VARIANTS[key[0]]
                    trainers[key] = Trainer(Path(folder, f"{variant}-{threads}"), library, env_id, threads, flags)
                    trainers[key].wait_for(1500)
                    trainers[key].send(signal.SIGSTOP)
                for turn in tqdm(range(args.rounds), desc=f"{env_id}: measuring"):
                    for (variant, threads), trainer in trainers.items():
                        value = trainer.steps_per_second(args.seconds)
                        rows.append(row("whole", env_id, variant, threads, "", turn, value, "steps/s"))
            finally:
                for trainer in trainers.values():
                    trainer.send(signal.SIGKILL)
                    trainer.process.wait()
    return rows


class Products(TorchDispatchMode):
    """Counts the matrix products that are made under it, by shape (batch, m, k, n)."""

    def __init__(self):
        super().__init__()
        self.shapes = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm):
            a, b = arguments[:2]
        elif function.overloadpacket in (torch.ops.aten.addmm, torch.ops.aten.baddbmm):
            a, b = arguments[1:3]
        else:
            return function(*arguments, **(kwargs or {}))
        self.shapes[(a.shape[0] if a.ndim == 3 else 1, *a.shape[-2:], b.shape[-1])] += 1
        return function(*arguments, **(kwargs or {}))


def sizes(env_id: str) -> tuple[int, int]:
    env = sac.make_env(sac.Args(env_id=env_id))
    return env.observation_space.shape[0], env.action_space.shape[0]


def prepared(obs_dim: int, action_dim: int, batch_size: int = 256, critics: int = 2, rows: int = 20_000):
    """An agent, its buffer of random transitions, and the update as main() compiles it, but for the guards."""
    original = sac.Critics
    sac.Critics = partial(original, count=critics)
    try:
        agent = sac.SAC(obs_dim, action_dim, sac.Args())
    finally:
        sac.Critics = original
    random = np.random.default_rng(0)
    buffer = sac.ReplayBuffer(rows, obs_dim, action_dim)
    obs, action, reward = random.normal(size=(rows, obs_dim)), random.uniform(-1, 1, (rows, action_dim)), np.ones(rows)
    buffer.add(obs, action, reward, 0 * reward, obs)
    generator = torch.Generator().manual_seed(0)
    torch._dynamo.config.trace_autograd_ops = True
    learning = lambda index, noise: agent.update(buffer[index], noise)
    update = torch.compile(learning, fullgraph=True, dynamic=False, options={"cpp_wrapper": True})

    def learn():
        noise = torch.randn((2, batch_size, action_dim), generator=generator)
        return update(buffer.sample(batch_size, generator), noise)

    return agent, buffer, learn


def milliseconds(function, seconds: float = 1.0) -> float:
    """Median duration of a call, over as many as fit into `seconds`."""
    durations, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end or len(durations) < 5:
        began = time.perf_counter()
        function()
        durations.append(time.perf_counter() - began)
    return 1e3 * statistics.median(durations)


def settle(threads: int):
    """What main() sets before it trains."""
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("highest" if torch.cpu.get_capabilities().get("amx_tile") else "medium")


def floor(args: Args) -> list[dict]:
    """The matrix products of one update alone, each as fast as PyTorch makes it: no update can take less."""
    rows = []
    for env_id in args.env_ids:
        obs_dim, action_dim = sizes(env_id)
        settle(1)
        agent = sac.SAC(obs_dim, action_dim, sac.Args())
        buffer = sac.ReplayBuffer(300, obs_dim, action_dim)
        buffer.rows.normal_()
        with Products() as products:
            agent.update(buffer[torch.arange(256)], torch.randn(2, 256, action_dim))
        flops = sum(n * 2 * np.prod(shape) for shape, n in products.shapes.items())
        rows.append(row("floor", env_id, "one update", 0, "", 0, flops / 1e9, "GFLOP"))
        for turn in range(args.rounds):
            for threads in (1, 2):
                settle(threads)
                total = 0.0
                for (batch, m, k, n), count in products.shapes.items():
                    a, b, out = torch.randn(batch, m, k), torch.randn(batch, k, n), torch.empty(batch, m, n)
                    total += count * milliseconds(partial(torch.bmm, a, b, out=out), 0.1)
                rows.append(row("floor", env_id, "products of one update", threads, "", turn, total, "ms"))
                rows.append(row("floor", env_id, "products", threads, "", turn, flops / 1e6 / total, "GFLOP/s"))
    return rows


def update(args: Args) -> list[dict]:
    """Compiled updates against the number of critics and the batch size; steps against environments and updates."""
    rows, threads = [], min(2, os.cpu_count())
    obs_dim, action_dim = sizes("Hopper-v4")
    settle(threads)
    torch._dynamo.config.recompile_limit = 100  # all the cases are of one function
    cases = {f"{n} critics": prepared(obs_dim, action_dim, critics=n)[2] for n in (2, 3, 5, 10)}
    cases |= {f"batch {n}": prepared(obs_dim, action_dim, batch_size=n)[2] for n in (64, 256, 1024, 4096)}
    agent, _, learn = prepared(obs_dim, action_dim)

    def stepper(n_envs: int, updates: int):
        envs, obs = sac.make_vector_env([lambda: sac.make_env(sac.Args())] * n_envs, (1, 0, 0))
        noise = torch.randn(n_envs, action_dim)

        def step():
            envs.step(agent.act(obs, noise))
            for _ in range(updates):
                learn()

        return step

    pairs = [(1, 1), (1, 2), (1, 4), (1, 8), (4, 4), (16, 16), (4, 1), (16, 1)]
    steps = {f"{n} envs stepped together, then {k} updates": (stepper(n, k), n) for n, k in pairs}
    for function in tqdm([*cases.values(), learn], desc="compiling"):
        function()
    for turn in tqdm(range(args.rounds), desc="updating"):
        for name, function in cases.items():
            rows.append(row("update", "Hopper-v4", "one update", threads, name, turn, milliseconds(function), "ms"))
        for name, (function, n_envs) in steps.items():
            speed = 1e3 * n_envs / milliseconds(function)
            rows.append(row("update", "Hopper-v4", "environment steps", threads, name, turn, speed, "steps/s"))
    return rows


def start(args: Args) -> list[dict]:
    """Seconds from the command to the first environment step, and to the first update."""
    rows = []
    cases = {
        "eager": ["eager", {}],
        "compiled, first time": ["compiled", {"TORCHINDUCTOR_CACHE_DIR": "new"}],
        "compiled, again": ["compiled", {}],
        "SBX": ["SBX", {}],
        "Stable-Baselines3": ["Stable-Baselines3", {}],
    }
    for turn in tqdm(range(args.rounds), desc="starting"):
        for name, (variant, environ) in cases.items():
            with tempfile.TemporaryDirectory() as folder:
                library, *flags = VARIANTS[variant]
                environ = {key: str(Path(folder, value)) for key, value in environ.items()}
                trainer = Trainer(Path(folder, "run"), library, "Hopper-v4", 2, flags, environ)
                try:
                    first, updated = trainer.wait_for(1), trainer.wait_for(110)
                finally:
                    trainer.send(signal.SIGKILL)
                    trainer.process.wait()
                rows.append(row("start", "Hopper-v4", name, 2, "first environment step", turn, first, "s"))
                rows.append(row("start", "Hopper-v4", name, 2, "first updates", turn, updated, "s"))
    return rows


def memory(args: Args) -> list[dict]:
    """Resident memory of a buffer for a million transitions, as it fills."""
    rows = []
    for env_id in args.env_ids:
        obs_dim, action_dim = sizes(env_id)
        before = psutil.Process().memory_info().rss
        buffer = sac.ReplayBuffer(1_000_000, obs_dim, action_dim)
        for filled in (0, 10_000, 50_000, 100_000):
            obs, action, reward = np.zeros((100, obs_dim)), np.zeros((100, action_dim)), np.zeros(100)
            while len(buffer) < filled:  # in small pieces, as training does, so that no large temporary is counted
                buffer.add(obs, action, reward, reward, obs)
            resident = (psutil.Process().memory_info().rss - before) / 2**20
            rows.append(row("memory", env_id, "replay buffer", 0, f"{filled} of 1,000,000 rows", 0, resident, "MiB"))
        del buffer
    return rows


def row(part, env_id, variant, threads, setting, turn, value, unit) -> dict:
    return dict(
        part=part, env_id=env_id, variant=variant, threads=threads, setting=setting, round=turn, value=value, unit=unit
    )


def versions() -> dict:
    """What a figure holds for: commit, packages and hardware."""
    status = subprocess.run(["git", "status", "--porcelain", SCRIPT], cwd=ROOT, capture_output=True, text=True)
    log = subprocess.run(["git", "log", "-1", "--format=%h"], cwd=ROOT, capture_output=True, text=True)
    peers = [line for line in (ROOT / "benchmark" / "requirements-peers.txt").read_text().split() if "==" in line]
    packages = [f"python {platform.python_version()}", f"torch {version('torch')}"]
    packages += [line.replace("==", " ") for line in peers if line.startswith(("stable", "sbx", "jax=", "mujoco"))]
    cpus = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    return dict(
        commit=log.stdout.strip() + (" and changes" if status.stdout else ""),
        versions=", ".join(packages),
        hardware=f"{cpus[0]}, {len(cpus)} cores",
    )


def medians(rows: list[dict], part: str) -> dict[tuple, tuple[float, float, float]]:
    """Median, least and greatest value by (environment, variant, threads, setting, unit)."""
    values = {}
    for r in rows:
        if r["part"] == part:
            key = r["env_id"], r["variant"], int(r["threads"]), r["setting"], r["unit"]
            values.setdefault(key, []).append(float(r["value"]))
    return {key: (statistics.median(v), min(v), max(v)) for key, v in values.items()}


def ratio(rows: list[dict], env_id: str, threads: int, of: str, to: str) -> str:
    """Median and range, over the rounds, of one variant's speed divided by another's."""
    speeds = {}
    for r in rows:
        if r["part"] == "whole" and r["env_id"] == env_id and int(r["threads"]) == threads:
            speeds.setdefault(r["variant"], []).append(float(r["value"]))
    ratios = [a / b for a, b in zip(speeds[of], speeds[to])]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f})"


def report(rows: list[dict]) -> str:
    """All results as Markdown."""
    commits = ", ".join(f"{part}: {commit}" for part, commit in dict.fromkeys((r["part"], r["commit"]) for r in rows))
    text = [
        "# Speed",
        "",
        f"`python benchmark/speed.py` (commits: {commits}); {rows[0]['versions']}; {rows[0]['hardware']}.",
        "Medians over the rounds, with the least and the greatest in brackets.",
    ]
    table = medians(rows, "whole")
    for env_id in dict.fromkeys(key[0] for key in table):
        text += ["", f"## {env_id}: whole training runs, environment steps per second", ""]
        text += ["| variant | 1 thread, 1 core | 2 threads, 2 cores |", "|---|---|---|"]
        for variant in VARIANTS:
            cells = [table.get((env_id, variant, n, "", "steps/s")) for n in (1, 2)]
            cells = [f"{c[0]:.0f} ({c[1]:.0f} - {c[2]:.0f})" if c else "" for c in cells]
            text.append(f"| {variant} | {' | '.join(cells)} |")
        for of, to in itertools.product(("compiled", "compiled, bfloat16"), ("SBX", "Stable-Baselines3")):
            cells = [ratio(rows, env_id, n, of, to) for n in (1, 2)]
            text.append(f"| {of} / {to} | {' | '.join(cells)} |")
    for part, title in {
        "floor": "The floor: the matrix products of one update alone",
        "update": "One update and one step (Hopper-v4, compiled, 2 threads)",
        "start": "From the command to the first step",
        "memory": "Memory of the replay buffer as it fills",
    }.items():
        table = medians(rows, part)
        if table:
            text += ["", f"## {title}", "", "| what | threads | setting | value |", "|---|---|---|---|"]
            for (env_id, variant, threads, setting, unit), (middle, least, greatest) in table.items():
                value = f"{middle:.3g} ({least:.3g} - {greatest:.3g}) {unit}"
                text.append(f"| {env_id}: {variant} | {threads or ''} | {setting} | {value} |")
    return "\n".join(text) + "\n"


def draw(rows: list[dict]):
    """A bar per variant, thread count and environment, with the range of the rounds."""
    table = medians(rows, "whole")
    env_ids = list(dict.fromkeys(key[0] for key in table))
    names = [name for name in VARIANTS if name != "environment alone"]
    figure = Figure(figsize=(5.5 * len(env_ids), 4), layout="constrained")
    for axes, env_id in zip(np.atleast_1d(figure.subplots(1, len(env_ids))), env_ids):
        for threads, color, hatch in ((1, "0.75", ""), (2, "C0", "//")):
            values = [table[env_id, name, threads, "", "steps/s"] for name in names]
            places = np.arange(len(names)) + 0.2 * (2 * threads - 3)
            spread = [[m - a for m, a, _ in values], [b - m for m, _, b in values]]
            label = f"{threads} thread{'s' * (threads > 1)} on {threads} core{'s' * (threads > 1)}"
            bars = axes.bar(
                places, [v[0] for v in values], 0.38, yerr=spread, color=color, hatch=hatch, edgecolor="k", label=label
            )
            axes.bar_label(bars, fmt="%.0f", padding=3)
        owners = ["this script,\n" * VARIANTS[name][0].endswith(".py") for name in names]
        ticks = [owner + name.replace(", ", ",\n").replace("-", "-\n") for owner, name in zip(owners, names)]
        axes.set_xticks(range(len(names)), ticks)
        axes.set(title=env_id, ylabel="environment steps per second", ylim=(0, 1.2 * axes.get_ylim()[1]))
        axes.legend()
    figure.savefig(RESULTS / "speed.png", dpi=120)


def main():
    args = tyro.cli(Args)
    parts = {"whole": whole, "floor": floor, "update": update, "start": start, "memory": memory}
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "speed.csv"
    kept = list(csv.DictReader(open(path))) if path.exists() else []
    for part in args.parts:
        measured = [r | versions() for r in parts[part](args)]
        kept = [r for r in kept if r["part"] != part] + measured
        kept.sort(key=lambda r: list(parts).index(r["part"]))
        with open(path, "w", newline="") as file:  # after each part, so that what is measured is not lost
            writer = csv.DictWriter(file, kept[0])
            writer.writeheader()
            writer.writerows(r | {"value": f"{float(r['value']):.5g}"} for r in kept)
    (RESULTS / "speed.md").write_text(report(kept))
    draw(kept)
    print(report(kept))


if __name__ == "__main__":
    main()
