"""Kill runs at random moments, resume them, and compare their ends with undisturbed runs.

    python -m tests.torture --minutes 10
    python -m tests.torture --kills 200

Every kill is a SIGKILL: at start-up, at a random moment, in the midst of the writing of a file, in
an evaluation, at the end. A run that was killed is resumed until it is done. Its agent, replay
rows, random stream and step must then be those of the undisturbed run, bit for bit. Exit code 1
where one differs.
"""

import argparse
import collections
import importlib
import multiprocessing
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
COMMON = "--total-timesteps 600 --learning-starts 150 --batch-size 16 --checkpoint-frequency 100 "
COMMON += "--log-frequency 50 --eval-frequency 200 --eval-episodes 1 --threads 1 --no-cuda "
REACH = "gymnasium_robotics:FetchReach-v4"


class Case(NamedTuple):
    script: str
    flags: str


# One more line is one more case.
CASES = [
    Case("sac_continuous", "--env-id Pendulum-v1"),
    Case("sac_continuous", "--env-id Pendulum-v1 --num-envs 3"),
    Case("sac_dmc", "--env-id cartpole-swingup"),
    Case("sac_dmc", "--env-id cartpole-swingup --num-envs 3 --action-repeat 2"),
    Case("sac_ablations", "--env-id Pendulum-v1 --prioritized-replay"),
    Case("sac_ablations", "--env-id Pendulum-v1 --prioritized-replay --num-envs 3"),
    Case("sac_ablations", "--env-id Pendulum-v1 --normalize-obs"),
    Case("sac_ablations", "--env-id Pendulum-v1 --normalize-obs --stack 2 --num-envs 3"),
    Case("sac_ablations", "--env-id Pendulum-v1 --value-network --critics-subset 1 --dropout 0.1"),
    Case("sac_ablations", f"--env-id {REACH} --hindsight 4"),
    Case("sac_ablations", f"--env-id {REACH} --hindsight 2 --num-envs 3"),
]


# Processes ----------------------------------------------------------------------------------------


def start_fresh(folder: Path, case: Case, flags: str) -> subprocess.Popen:
    """A run in an interpreter of its own, with all imports still to come."""
    command = [sys.executable, ROOT / f"{case.script}.py", *flags.split()]
    with open(folder / "log.txt", "a") as log:
        return subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)


def start_forked(folder: Path, case: Case, flags: str) -> "Forked":
    """A run in a fork of this process, which has the imports behind it."""
    process = multiprocessing.get_context("fork").Process(target=child, args=(folder, case, flags))
    process.start()
    return Forked(process)


def child(folder: Path, case: Case, flags: str):
    os.chdir(folder)
    # Its own lock: tqdm's is one semaphore for all forks, and a broken one may have kept it.
    tqdm.set_lock(threading.RLock())
    log = open("log.txt", "a", buffering=1)
    for name, number in (("stdout", 1), ("stderr", 2)):
        setattr(sys, name, log)
        os.dup2(log.fileno(), number)
    sys.argv = [f"{case.script}.py", *flags.split()]
    importlib.import_module(case.script).main()


class Forked:
    """A forked process with the methods of subprocess.Popen."""

    def __init__(self, process: multiprocessing.Process):
        self.process = process
        self.kill = process.kill

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self) -> int:
        self.process.join()
        return self.process.exitcode


# Moments: each function returns when it is time to kill, or when the process has ended -----------


def wait_while(process, condition):
    while process.poll() is None and condition():
        time.sleep(0.002)


def any_moment(process, folder: Path, seconds: float):
    end = time.time() + random.uniform(0, 0.8 * seconds)
    wait_while(process, lambda: time.time() < end)


def start_up(process, folder: Path, seconds: float):
    end = time.time() + random.uniform(0, 0.3 * seconds)
    wait_while(process, lambda: time.time() < end)


def writing(process, folder: Path, seconds: float):
    """While a file has its temporary name; a random number of those before it are let pass."""
    for _ in range(random.randint(1, 4)):
        wait_while(process, lambda: list(folder.glob("runs/*/*.tmp")))
        wait_while(process, lambda: not list(folder.glob("runs/*/*.tmp")))
    time.sleep(random.uniform(0, 0.004))


def evaluation(process, folder: Path, seconds: float):
    """Soon after the line of log that comes before an evaluation."""
    step = random.choice([200, 400, 600])
    log = folder / "log.txt"
    wait_while(process, lambda: f"step {step}/600" not in log.read_text())
    time.sleep(random.uniform(0, 0.3))


def end(process, folder: Path, seconds: float):
    wait_while(process, lambda: not list(folder.glob("runs/*/model.*")))
    time.sleep(random.uniform(0, 0.3))


# A moment that stands here twice comes twice as often.
MOMENTS = [any_moment, any_moment, start_up, writing, writing, writing, evaluation, end]


# Runs ---------------------------------------------------------------------------------------------


class Disturbed(NamedTuple):
    kills: list[str]  # the moment of each
    checkpoint: dict


def flags_for(folder: Path, case: Case) -> str:
    """To resume what is there, or to start."""
    checkpoints = list(folder.glob("runs/*/checkpoint.pt"))
    if checkpoints:
        return f"--resume {checkpoints[0].parent.relative_to(folder)}"
    for path in folder.glob("runs/*"):  # killed before it could be resumed
        path.rename(folder / f"killed-{time.time_ns()}")
    return f"{COMMON} {case.flags}"


def load_end(folder: Path) -> dict:
    (path,) = folder.glob("runs/*/checkpoint.pt")
    if not (path.parent / "model.pt").exists():
        raise FileNotFoundError(f"no model.pt in {path.parent}")
    return torch.load(path, weights_only=True)


def undisturbed(case: Case) -> tuple[dict, float]:
    """The end of a run, and the seconds that it took."""
    folder = Path(tempfile.mkdtemp(prefix="torture-"))
    started = time.time()
    code = start_forked(folder, case, flags_for(folder, case)).wait()
    if code != 0:
        sys.exit(f"an undisturbed run failed, see {folder / 'log.txt'}")
    return load_end(folder), time.time() - started


def disturbed(case: Case, seconds: float, most: int) -> Disturbed:
    """The end of a run that is killed up to `most` times."""
    folder = Path(tempfile.mkdtemp(prefix="torture-"))
    (folder / "log.txt").touch()
    kills = []
    while True:
        start = start_fresh if random.random() < 0.1 else start_forked
        process = start(folder, case, flags_for(folder, case))
        if len(kills) < most:
            moment = random.choice(MOMENTS)
            moment(process, folder, seconds)
            if process.poll() is None:
                process.kill()
        code = process.wait()
        if code == 0:
            return Disturbed(kills, load_end(folder))
        if code != -9:
            sys.exit(f"a run ended with code {code}, see {folder / 'log.txt'}")
        kills.append(moment.__name__)


def difference(state: dict, expected: dict) -> str:
    """The names of what differs in two checkpoints."""
    names = [name for name in ("step", "count") if state.get(name) != expected.get(name)]
    names += [name for name in ("rows", "random") if not torch.equal(state[name], expected[name])]
    one, other = state["agent"], expected["agent"]
    names += sorted(one.keys() ^ other.keys())
    names += [name for name in one.keys() & other.keys() if not torch.equal(one[name], other[name])]
    return ", ".join(names)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=10, help="start no run after that")
    parser.add_argument("--kills", type=int, default=10**9, help="or after as many kills")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    random.seed(args.seed)
    os.environ.setdefault("MUJOCO_GL", "egl")
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    sys.path.insert(0, str(ROOT))
    torch.set_num_threads(1)  # so that forks need none of this process's threads
    end_time = time.time() + 60 * args.minutes
    cases = random.sample(CASES, len(CASES))
    references = {}
    moments = collections.Counter()
    runs = identical = 0
    while time.time() < end_time and moments.total() < args.kills:
        case = cases[runs % len(cases)]
        if case not in references:
            importlib.import_module(case.script)
            references[case] = undisturbed(case)
        expected, seconds = references[case]
        run = disturbed(case, seconds, most=random.randint(3, 9))
        runs += 1
        moments.update(run.kills)
        differs = difference(run.checkpoint, expected)
        identical += not differs
        verdict = f"differs: {differs}" if differs else "identical"
        print(f"{case.script} {case.flags}: {len(run.kills)} kills, {verdict}", flush=True)
    print(f"runs {runs}, kills {moments.total()}, identical ends {identical}")
    print(*(f"{moment} {count}" for moment, count in moments.most_common()), sep=", ")
    sys.exit(identical != runs)


if __name__ == "__main__":
    main()
