"""Whether a GPU pays: whole training runs with and without it, one and several at a time.

    python benchmark/speed_gpu.py    # some four minutes; needs a GPU, eight cores, and quiet

As in benchmark/speed.py, all runs are started once, warmed up and paused, and then take turns.
Every run has one thread on a core of its own. SBX needs a jax for the GPU in .venv-peers
(pip install "jax[cuda13]"). Results: benchmark/results/speed-gpu.{csv,md}.
"""

import contextlib
import os
import platform
import signal
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
import tyro
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmark.runs import RESULTS, ROOT, fail
from benchmark.speed import SCRIPT, Trainer, check_turns, pd, spread, steps_per_second, tabulate

WARM = 400  # environment steps before the first turn
GRAPHS, EAGER = "GPU, CUDA graphs", "GPU, eager"
ON, OFF = ["--cuda", "--compile", "on"], ["--cuda", "--compile", "off"]
VARIANTS = {  # name: library, flags, and how many runs at a time; "host" is the script below
    GRAPHS: (SCRIPT, ON, (1, 2, 4, 8)),
    EAGER: (SCRIPT, OFF, (1,)),
    f"{GRAPHS}, buffer on the host": ("host", ON, (1,)),
    f"{EAGER}, buffer on the host": ("host", OFF, (1,)),
    "CPU, compiled": (SCRIPT, ["--compile", "on"], (1,)),
    "GPU, Stable-Baselines3": ("stable_baselines3", ["--cuda"], (1,)),
    "GPU, SBX": ("sbx", ["--cuda"], (1,)),
}
ON_THE_HOST = {  # the script's lines, and those that keep the buffer in the computer's own memory
    "ReplayBuffer(capacity, agent.obs_dim, agent.action_dim, agent.device)": (
        "ReplayBuffer(capacity, agent.obs_dim, agent.action_dim)"
    ),
    "torch.randint(len(self), (batch_size,), generator=generator, device=self.rows.device)": (
        'self.rows[torch.randint(len(self), (batch_size,))].to("cuda")'
    ),
    "self.rows[index].split(": "index.split(",  # the index is the batch by now
}


@dataclass
class Args:
    rounds: int = 3  # turns of each variant
    seconds: float = 1.5  # of each turn
    env_id: str = "Hopper-v4"  # a MuJoCo environment


def script_with_its_buffer_on_the_host(folder: Path) -> Path:
    text = (ROOT / SCRIPT).read_text()
    for line, other in ON_THE_HOST.items():
        assert text.count(line) == 1, line
        text = text.replace(line, other)
    path = folder / SCRIPT
    path.write_text(text)
    return path


def start(args: Args, folder: Path, variant: str, number: int, cores: list[int]) -> Trainer:
    """The `number`-th run of a variant, on a core that no other run of the variant has."""
    library, flags, _ = VARIANTS[variant]
    script = {SCRIPT: str(ROOT / SCRIPT), "host": str(folder / SCRIPT)}.get(library, library)
    place = number + 2 * [*VARIANTS].index(variant)
    os.sched_setaffinity(0, [cores[place % len(cores)]])  # the trainer inherits them
    try:
        name = f"{variant} {number}".replace(" ", "-")
        # Else JAX takes the GPU's memory, or where it has no support for one goes on without.
        sharing = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "JAX_PLATFORMS": "cuda"}
        return Trainer(folder / name, script, args.env_id, 1, flags, sharing)
    finally:
        os.sched_setaffinity(0, cores)


def measure(args: Args) -> list[dict]:
    cores, rows = sorted(os.sched_getaffinity(0)), []
    trainers = {variant: [] for variant in VARIANTS}
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        script_with_its_buffer_on_the_host(folder)
        # The first ones compile, the others find it done.
        for first, end in ((0, 1), (1, 8)):
            for variant, (*_, counts) in VARIANTS.items():
                for number in range(first, min(end, max(counts))):
                    trainer = start(args, folder, variant, number, cores)
                    trainers[variant].append(stack.enter_context(trainer))
            for trainer in tqdm(sum(trainers.values(), []), desc="warming up"):
                trainer.wait_for(WARM)
                trainer.send(signal.SIGSTOP)
        for turn in tqdm(range(args.rounds), desc="measuring"):
            for variant, (*_, counts) in VARIANTS.items():
                for count in counts:
                    speed = steps_per_second(trainers[variant][:count], args.seconds)
                    rows.append(dict(variant=variant, runs=count, round=turn, value=speed))
    return rows


def report(rows: pd.DataFrame, about: str) -> str:
    """A line per variant and number of runs: medians over the rounds, with the range."""
    speeds = rows.groupby(["variant", "runs"], sort=False).value.apply(spread)
    lines = [[variant, count, speed] for (variant, count), speed in speeds.items()]
    text = ["# Speed on a GPU", f"`python benchmark/speed_gpu.py`; {about}."]
    text += ["Environment steps per second of all runs together: median (range) over the rounds."]
    return "\n\n".join([*text, tabulate(["variant", "runs at a time", "steps/s"], lines)]) + "\n"


def main():
    args = tyro.cli(Args, description=__doc__)
    check_turns(args.rounds, args.seconds)
    if not torch.cuda.is_available():
        fail("PyTorch sees no GPU, so there is nothing to measure")
    if len(os.sched_getaffinity(0)) < 8:
        fail("eight runs at a time need eight cores, so that each has its own")
    rows = pd.DataFrame(measure(args))
    processor = f"{os.cpu_count()} cores of {torch.cpu.get_capabilities()['cpu_name']}"
    about = f"{args.env_id}; {torch.cuda.get_device_name()}, {processor}"
    about += f", Python {platform.python_version()}"
    about += "".join(f", {name} {version(name)}" for name in ("torch", "numpy", "mujoco"))
    rows.assign(about=about).to_csv(RESULTS / "speed-gpu.csv", index=False, float_format="%.5g")
    text = report(rows, about)
    (RESULTS / "speed-gpu.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
