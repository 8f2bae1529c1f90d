"""Run the studies of benchmark/studies.py, several runs at a time.

    python -m benchmark.run --list         # the studies, and what they cost
    python -m benchmark.run F5 F4          # one after the other; what they share is run once
    python -m benchmark.run F1 --jobs 4    # four runs at a time, each with one thread
    python -m benchmark.run F1 --ray auto  # on the Ray cluster of this machine, as many at a time as that has room for
    python -m benchmark.run F1 --again     # whatever is in the committed results

Stop it with Ctrl-C, or lose it in any other way: started again, it continues. A run is known by its script's code,
comments apart, and by its settings: what is finished, here or in the committed results, is not run again; what was
stopped goes on from its checkpoint. A run that fails is tried once more and then reported, while the others go on.
"""

import csv
import ctypes
import fcntl
import functools
import hashlib
import importlib
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import tokenize
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Annotated, NamedTuple

import psutil
import tyro

from benchmark.studies import STUDIES, Study

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmark" / "results"
STEPS_PER_SECOND = 150  # of one run with one thread, for estimates before anything has run (results/speed.md)


@dataclass
class Args:
    studies: Annotated[tuple[str, ...], tyro.conf.Positional] = ()  # names, as --list prints them
    list: bool = False  # print the studies, with steps and hours, and stop
    variants: tuple[str, ...] = ()  # run these variants alone, by their labels
    jobs: int | None = None  # runs at a time; None: as many as this machine has cores for, or the cluster room
    threads: int = 1  # of each run
    ray: str = ""  # host:port of a Ray cluster, or auto, whose nodes share this folder and the repository, by path
    cpus: float | None = None  # share of CPUs that a run takes on the cluster; None: as many as threads
    gpus: float = 0  # share of GPUs that a run takes on the cluster
    again: bool = False  # repeat what is finished in the committed results alone, without a folder in runs/
    track: bool = False  # to Weights & Biases, grouped by study and tagged by variant


class Run(NamedTuple):
    study: str
    script: str
    env_id: str
    variant: str
    seed: int
    steps: int
    flags: tuple[str, ...]  # all but the seed

    @property
    def key(self) -> str:
        """What the run is known by: the same for all studies that share it, another when script or settings change."""
        return key_of(self.script, self.flags)

    @property
    def name(self) -> str:
        """How the script begins the name of its run folder."""
        return re.sub(r"[^\w.-]+", "-", f"{self.env_id}__{self.key}__{self.seed}")

    def folder(self, runs: Path) -> Path | None:
        return max(runs.glob(f"{self.name}__*"), default=None)

    def finished(self, runs: Path) -> bool:
        return bool((folder := self.folder(runs)) and (folder / "model.pt").exists())

    def committed(self) -> bool:
        return (self.env_id, self.key, str(self.seed)) in committed()

    def command(self, runs: Path) -> list[str]:
        """What begins the run, or continues it."""
        script = [sys.executable, str(ROOT / self.script)]
        if (folder := self.folder(runs)) and (folder / "checkpoint.pt").exists():
            return [*script, "--resume", f"runs/{folder.name}"]
        return [*script, *self.flags, "--seed", str(self.seed), "--exp-name", self.key]


@functools.cache
def code_of(script: str) -> str:
    """A script's text without comments and empty lines: what changes there changes no result."""
    lines = (ROOT / script).read_text().splitlines()
    for token in tokenize.generate_tokens(iter([line + "\n" for line in lines]).__next__):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    return "\n".join(line.rstrip() for line in lines if line.strip())


@functools.cache
def key_of(script: str, flags: tuple[str, ...]) -> str:
    settings = vars(tyro.cli(importlib.import_module(Path(script).stem).Args, args=flags))
    settings = {name: value for name, value in settings.items() if name not in ("seed", "threads", "exp_name")}
    return hashlib.sha256(f"{code_of(script)}{sorted(settings.items())}".encode()).hexdigest()[:10]


@functools.cache
def committed() -> set[tuple[str, str, str]]:
    """Environment, key and seed of the runs whose results are in the repository."""
    rows = (row for path in RESULTS.glob("[!.]*/returns.csv") for row in csv.DictReader(open(path)))
    return {(row["env_id"], row["key"], row["seed"]) for row in rows}


def runs_of(name: str, study: Study, threads: int = 1, variants: tuple[str, ...] = ()) -> list[Run]:
    """All runs of a study: all first seeds, then all second ones, so that it is worth something wherever it stops."""
    grid = []
    for seed in range(1, study.seeds + 1):
        for env_id, steps in study.envs.items():
            for label, flags in study.variants.items():
                if not variants or label in variants:
                    flags = f"--env-id {env_id} --total-timesteps {steps} {study.flags} {flags} --threads {threads}"
                    grid.append(Run(name, study.script, env_id, label, seed, steps, tuple(shlex.split(flags))))
    return grid


def runs_of_all(names: tuple[str, ...], threads: int = 1, variants: tuple[str, ...] = ()) -> list[Run]:
    """The runs of one study after the other; what they share is the first one's."""
    runs = {}
    for name in names:
        for run in runs_of(name, STUDIES[name], threads, variants):
            runs.setdefault((run.key, run.seed), run)
    return list(runs.values())


def fail(message: str):
    print("error:", message, file=sys.stderr)
    sys.exit(2)


def check(names: tuple[str, ...]):
    """Fail if there are no such studies, or mistakes in them: before the hours of their runs."""
    if not names or (unknown := [name for name in names if name not in STUDIES]):
        fail(f"no study {unknown[0] if names else 'named'}; there are {', '.join(STUDIES)}")
    for name in names:
        if mistake := STUDIES[name].mistake():
            fail(f"study {name} {mistake}")


def print_list():
    for name, study in STUDIES.items():
        runs = runs_of(name, study)
        steps = sum(run.steps for run in runs)
        cost = f"{len(runs)} runs, {steps / 1e6:.1f}M steps, about {steps / STEPS_PER_SECOND / 3600:.0f} core-hours"
        print(f"{name:8} {cost}\n         {study.claim or study.note or 'a benchmark'}")


def die_with_parent():
    """In the child, before its program starts: a runner that is killed takes its runs along (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


@dataclass
class Job:
    run: Run
    tries: int = 0
    process: subprocess.Popen | None = None
    log: Path = field(init=False)

    def start(self, runs: Path, track: bool) -> bool:
        """Whether the run was started; not so while another runner has it, or if that has just finished it."""
        self.log = runs / "logs" / f"{self.run.name}.txt"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        lock = open(self.log.with_suffix(".lock"), "w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the child inherits it: it is held as long as that lives
        except BlockingIOError:
            return False
        with lock, open(self.log, "a") as log:
            if self.run.finished(runs):
                return False
            self.launch(runs, track, lock, log)
        self.tries += 1
        return True

    def launch(self, runs: Path, track: bool, lock: IO, log: IO):
        tag = self.run.variant.replace(",", "")  # commas part tags
        tracking = dict(WANDB_RUN_GROUP=self.run.study, WANDB_TAGS=tag) if track else {}
        self.process = subprocess.Popen(
            [*self.run.command(runs), *["--track"] * track],
            cwd=runs.parent,
            env=os.environ | tracking,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=[lock.fileno()],
            start_new_session=True,  # Ctrl-C at the terminal is for the runner alone
            preexec_fn=die_with_parent,
        )

    def progress(self) -> tuple[int, float, str]:
        """Step, steps per second and last return, from the end of the log."""
        with open(self.log, "rb") as file:
            file.seek(max(0, self.log.stat().st_size - 4000))
            said = file.read().decode(errors="replace")
        found = re.findall(r"step (\d+), (\d+) steps/s, .* return (\S+),", said)
        return (int(found[-1][0]), float(found[-1][1]), found[-1][2]) if found else (0, 0.0, "nan")

    def last_words(self) -> str:
        said = self.log.read_text(errors="replace").splitlines()
        return "\n".join(f"    {line}" for line in said[-5:] if not line.startswith("failed"))  # that is said already


class Cluster:
    """A Ray cluster, and the shares of it that each run takes."""

    def __init__(self, address: str, **shares: float):
        os.environ |= dict(RAY_DEDUP_LOGS_SKIP_REGEX=".", RAY_USAGE_STATS_ENABLED="0")  # skip all: told by the overview
        try:
            import ray
        except ImportError:
            fail("--ray needs Ray: pip install -r benchmark/requirements-ray.txt")
        probe = [sys.executable, "-c", "import ray, sys; ray.init(sys.argv[1])", address]
        try:  # first by a socket and apart: Ray itself waits for minutes, with many warnings
            if address != "auto":
                host, port = address.rsplit(":", 1)
                socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            subprocess.run(probe, capture_output=True, check=True, timeout=30)
        except subprocess.CalledProcessError as error:
            said = error.stderr.decode(errors="replace").strip().splitlines()
            fail(f"no Ray cluster answers at {address}: {said[-1] if said else error}")
        except (OSError, ValueError, subprocess.TimeoutExpired):
            fail(f"no Ray cluster answers at {address}")
        ray.init(address, log_to_driver=False, logging_level="ERROR")
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # Ray's own tells of stack frames
        self.ray, self.shares = ray, shares
        if self.room() < 1:
            fail(f"--ray {address}: no node has the {shares['CPU']:g} CPUs and {shares['GPU']:g} GPUs that a run takes")

    def room(self) -> int:
        """For how many runs at a time, on the nodes that are there now."""
        fits = lambda have: min((int(have.get(key, 0) / x + 1e-6) for key, x in self.shares.items() if x), default=0)
        return sum(fits(node["Resources"]) for node in self.ray.nodes() if node["Alive"])

    def submit(self, run: Run, runs: Path, track: bool):
        def on_node(root: str, run: tuple) -> int:  # defined here, so that Ray sends its code: a node need not find it
            sys.path.insert(0, root)
            from benchmark.run import Job, Run, execute

            if not (runs / "logs").is_dir():
                raise FileNotFoundError(f"{runs} is not on {socket.gethostname()}: all nodes must share it")
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # which Ray blocks, and the run would inherit
            # waits if what a lost node left still has the run; the second try after a failure is the sender's affair
            failed = execute([Job(Run(*run), tries=1)], lambda: 1, runs, track)
            return failed[0].process.returncode if failed else 0

        cpus, gpus = self.shares["CPU"], self.shares["GPU"]  # a task whose node dies begins anew on another
        return self.ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=-1)(on_node).remote(str(ROOT), tuple(run))


@dataclass
class ClusterJob(Job):
    """A run on some node of a cluster, a process as far as `execute` sees."""

    cluster: Cluster | None = None

    def launch(self, runs: Path, track: bool, lock: IO, log: IO):
        self.process, self.task = self, self.cluster.submit(self.run, runs, track)

    def poll(self) -> int | None:
        return self.wait() if self.cluster.ray.wait([self.task], timeout=0)[0] else None

    def send_signal(self, _):
        self.cluster.ray.cancel(self.task)  # `execute` on the node sees Ctrl-C

    def wait(self) -> int:
        try:
            return self.cluster.ray.get(self.task)
        except self.cluster.ray.exceptions.TaskCancelledError:
            return 1
        except Exception as error:  # what the node lacks, or trouble of Ray's own
            with open(self.log, "a") as log:
                print(error, file=log)
            return 1


@dataclass
class Board:
    """One overview, drawn anew on a terminal, and told line by line elsewhere."""

    total: int
    drawn: int = 0  # lines on the terminal
    told: float = 0.0  # when the last line was

    def say(self, message: str):
        self.clear()
        print(message, flush=True)

    def clear(self):
        if self.drawn:
            print(f"\033[{self.drawn}A\033[J", end="")
            self.drawn = 0

    def show(self, waiting: list[Job], running: list[Job], done: int, failed: list[Job]):
        progress = [job.progress() for job in running]
        speed = sum(speed for _, speed, _ in progress) or STEPS_PER_SECOND * max(1, len(running))
        left = sum(job.run.steps for job in [*waiting, *running]) - sum(step for step, *_ in progress)
        counts = f"done {done}, running {len(running)}, waiting {len(waiting)}, failed {len(failed)} of {self.total}"
        lines = [f"{counts}; {left / speed / 3600:.1f} hours left"]
        for job, (step, speed, last) in zip(running, progress):
            run = job.run
            lines.append(f"  {run.study} {run.env_id}, {run.variant}, seed {run.seed}: step {step} of {run.steps}")
            lines[-1] += f", {speed:.0f} steps/s, return {last}"
        if sys.stdout.isatty():
            self.clear()
            size = os.get_terminal_size()
            shown = [line[: size.columns - 1] for line in lines[: size.lines - 1]]  # what scrolled cannot be redrawn
            print(*shown, sep="\n", flush=True)
            self.drawn = len(shown)
        elif time.time() > self.told + 60:
            print(lines[0], flush=True)
            self.told = time.time()


def execute(jobs: list[Job], room: Callable[[], int], runs: Path, track: bool, done: int = 0) -> list[Job]:
    """Run all jobs, as many at a time as there is room for; those that failed twice."""
    board, waiting, running, failed = Board(len(jobs) + done), list(jobs), [], []
    try:
        while waiting or running:
            free = room() - len(running)
            for job in list(waiting):
                if free > 0 and job.run.finished(runs):  # by another runner
                    waiting.remove(job)
                    done += 1
                elif free > 0 and job.start(runs, track):
                    waiting.remove(job)
                    running.append(job)
                    free -= 1
            for job in list(running):
                if (code := job.process.poll()) is None:
                    continue
                running.remove(job)
                if code == 0:
                    done += 1
                    board.say(f"done: {job.run.study} {job.run.env_id}, {job.run.variant}, seed {job.run.seed}")
                elif job.tries < 2:
                    waiting.insert(0, job)
                else:
                    failed.append(job)
                    board.say(f"failed with exit code {code}: {job.log}\n{job.last_words()}")
                    with open(job.log, "a") as log:
                        print(f"failed with exit code {code}", file=log)  # for the report
            board.show(waiting, running, done, failed)
            time.sleep(0.5)
    finally:  # Ctrl-C, or a fault of this program
        for job in running:
            job.process.send_signal(signal.SIGINT)  # the script leaves at once, its last checkpoint is whole
        for job in running:
            job.process.wait()
    board.clear()
    return failed


def main():
    args = tyro.cli(Args, description=__doc__)
    if args.list:
        return print_list()
    check(args.studies)
    labels = {label for name in args.studies for label in STUDIES[name].variants}
    if unknown := set(args.variants) - labels:
        fail(f"--variants {unknown.pop()}: there are {', '.join(sorted(labels))}")
    if (args.jobs is not None and args.jobs < 1) or args.threads < 1:
        fail("--jobs and --threads must be at least 1")
    if args.gpus > 1 and args.gpus % 1:
        fail("--gpus must be a whole number, or a share of one")
    room, job = lambda: args.jobs or max(1, (psutil.cpu_count(logical=False) or 1) // args.threads), Job
    if args.ray:
        cluster = Cluster(args.ray, CPU=args.threads if args.cpus is None else args.cpus, GPU=args.gpus)
        room = lambda: min(cluster.room(), args.jobs or sys.maxsize)
        job = functools.partial(ClusterJob, cluster=cluster)
    sys.path.insert(0, str(ROOT))
    runs = Path.cwd() / "runs"
    grid = runs_of_all(args.studies, args.threads, args.variants)
    todo = [job(run) for run in grid if not (run.finished(runs) or run.committed() and not args.again)]
    print(f"{len(grid)} runs, {len(grid) - len(todo)} finished before")
    try:
        failed = execute(todo, room, runs, args.track, len(grid) - len(todo))
    except KeyboardInterrupt:
        sys.exit(f"stopped, to continue: {shlex.join(['python', '-m', 'benchmark.run', *sys.argv[1:]])}")
    except OSError as error:
        fail(f"{error}: {runs} must be a folder with space, where one may write; the same command continues")
    if failed:
        sys.exit(f"{len(failed)} runs failed, the others are finished: see {runs / 'logs'}")


if __name__ == "__main__":
    main()
