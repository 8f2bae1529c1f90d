"""A process a run, as many at a time as there is room for, and one overview of them all."""

import contextlib
import ctypes
import fcntl
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import psutil

from benchmark.runs import RETURN, ROOT, Records, Run, args_of, code_hash, fail

STEPS_PER_SECOND = 80  # of one thread beside another one, for estimates before anything has run


def die_with_parent():
    """In the child, before its program starts: a killed runner takes its runs along (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def cores() -> int:
    """Physical cores that this process may use."""
    physical = psutil.cpu_count(logical=False) or 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else physical
    return min(physical, allowed)


def lock(path: Path, wait: bool = False) -> IO | None:
    """The file at `path`, locked until it is closed or this process ends; None if it is taken."""
    file = open(path, "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        return file
    except BlockingIOError:
        file.close()
    except OSError as error:  # some file systems of clusters have no locks
        file.close()
        fail(f"{path}: {error.strerror}: runs/ must be on a file system with file locks")


@contextlib.contextmanager
def continuable(module: str, where: str):
    """End with one line, and how to go on, at Ctrl-C and where nothing can be written."""
    try:
        yield
    except KeyboardInterrupt:
        command = shlex.join(["python", "-m", module, *sys.argv[1:]])
        sys.exit(f"stopped, to continue: {command}")
    except BrokenPipeError:  # nobody reads on: | head
        sys.exit(1)
    except OSError as error:
        fail(f"{error}: {where}, where one may write; the same command continues")


@dataclass
class Job:
    run: Run
    tries: int = 0
    process: subprocess.Popen | None = None
    log: Path = field(init=False)
    records: Records | None = None

    def start(self, runs: Path, track: bool) -> bool:
        """Whether the run was started; not so if another runner has it, or has finished it."""
        self.log = self.run.log(runs)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        # The child inherits the lock, which is held for as long as that lives.
        if not (mine := lock(self.log.with_suffix(".lock"))):
            return False
        with mine, open(self.log, "a") as log:
            if self.run.finished(runs):
                return False
            # Its key is that of the code as it was.
            if code_hash.__wrapped__(script := ROOT / self.run.script) != code_hash(script):
                fail(f"{self.run.script} has changed since this runner started: start it again")
            self.launch(runs, track, mine, log)
        self.tries += 1
        return True

    def launch(self, runs: Path, track: bool, lock: IO, log: IO):
        tag = self.run.variant.replace(",", "")  # commas part tags
        track = track and hasattr(args_of(self.run.script), "track")  # peers have no such flag
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

    def scalars(self, runs: Path) -> dict[str, list[tuple[int, float]]]:
        """What the run has recorded, by key; a second try may have another folder."""
        folder = self.run.folder(runs)
        if folder and not (self.records and self.records.folder == folder):
            self.records = Records(folder)
        return self.records.read() if folder else {}

    def progress(self, runs: Path) -> tuple[int, float, float]:
        """Step, steps per second and last return, as far as the run has recorded them."""
        scalars = self.scalars(runs)
        step, speed = scalars.get("charts/SPS", [(0, 0.0)])[-1]
        training = scalars.get("charts/episodic_return")
        returns = scalars.get(RETURN) or training or [(0, float("nan"))]
        return step, speed, returns[-1][1]


@dataclass
class Board:
    """One overview, drawn anew on a terminal, and told line by line elsewhere."""

    total: int
    runs: Path
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
        terminal = sys.stdout.isatty()
        if not terminal and time.time() < self.told + 60:
            return
        progress = [job.progress(self.runs) for job in running]
        speed = sum(speed for _, speed, _ in progress) or STEPS_PER_SECOND * max(1, len(running))
        made = sum(step for step, *_ in progress)
        left = sum(job.run.steps for job in [*waiting, *running]) - made
        counts = f"done {done}, running {len(running)}, waiting {len(waiting)}"
        counts += f", failed {len(failed)}"
        lines = [f"{counts} of {self.total}; {left / speed / 3600:.1f} hours left"]
        for job, (step, speed, last) in zip(running, progress):
            numbers = f"step {step} of {job.run.steps}, {speed:.0f} steps/s, return {last:.1f}"
            lines.append(f"  {job.run}: {numbers}")
        if terminal:
            self.clear()
            size = os.get_terminal_size()
            # What has scrolled out of the terminal cannot be drawn anew.
            shown = [line[: size.columns - 1] for line in lines[: size.lines - 1]]
            print(*shown, sep="\n", flush=True)
            self.drawn = len(shown)
        else:
            print(lines[0], flush=True)
            self.told = time.time()


@dataclass
class Pool:
    """The jobs that wait, run, and have failed."""

    waiting: list[Job]
    room: Callable[[], int]
    runs: Path
    track: bool
    done: int  # finished before
    running: list[Job] = field(default_factory=list)
    failed: list[Job] = field(default_factory=list)

    def start(self):
        """As many of those that wait as there is room for, but for what other runners have."""
        room = self.room()
        for job in list(self.waiting):
            if len(self.running) >= room:
                return
            if job.run.finished(self.runs):
                self.waiting.remove(job)
                self.done += 1
            elif job.start(self.runs, self.track):
                self.waiting.remove(job)
                self.running.append(job)

    def collect(self, board: Board):
        """Those that have ended; whoever fails is tried once more."""
        for job in list(self.running):
            if (code := job.process.poll()) is None:
                continue
            self.running.remove(job)
            if job.run.finished(self.runs):
                self.done += 1
                board.say(f"done: {job.run}")
            elif job.tries < 2:
                self.waiting.insert(0, job)
            else:
                self.failed.append(job)
                # That it failed before is no news.
                said = [x for x in job.run.said(self.runs)[-5:] if not x.startswith("failed")]
                board.say("\n    ".join([f"failed with exit code {code}: {job.log}", *said]))
                with open(job.log, "a") as log:
                    print(f"failed with exit code {code}", file=log)  # for the report

    def stop(self):
        for job in self.running:
            # The script leaves at once, its last checkpoint is whole.
            job.process.send_signal(signal.SIGINT)
        for job in self.running:
            job.process.wait()


def execute(jobs: list[Job], room: Callable[[], int], runs: Path, track: bool, done=0) -> list[Job]:
    """Run all jobs, as many at a time as there is room for; those that failed twice."""
    board = Board(len(jobs) + done, runs)
    pool = Pool(list(jobs), room, runs, track, done)
    try:
        while pool.waiting or pool.running:
            pool.start()
            pool.collect(board)
            board.show(pool.waiting, pool.running, pool.done, pool.failed)
            time.sleep(0.5)
    finally:  # Ctrl-C, or a fault of this program
        pool.stop()
    board.clear()
    return pool.failed
