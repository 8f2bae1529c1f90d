"""Tune flags of a script with Optuna, over several environments and seeds: the search spaces of benchmark/spaces.py.

    python -m benchmark.tune --list                 # the spaces, and what a trial costs
    python -m benchmark.tune cartpole --trials 50   # until 50 trials are finished; then a table and figures

A trial is one setting, tried by a run per environment and seed. Its score is the mean over these runs of their
evaluations, scaled so that the environment's `low` is 0, which what is less counts too, and its `high` is 1. A trial
that lies below the median of the others at the same step of the same run is pruned. All trials are kept in
runs/tune-SPACE.journal, which processes started side by side in one folder share. Stopped with Ctrl-C or lost in any
other way, the same command continues: the trials that were at work too, their runs from their checkpoints.
"""

import contextlib
import fcntl
import hashlib
import importlib
import io
import math
import platform
import shlex
import signal
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import numpy as np
import optuna
import psutil
import tyro
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmark.run import RESULTS, ROOT, STEPS_PER_SECOND, Job, Run, code_of, fail
from benchmark.spaces import SPACES, Space
from benchmark.tune_report import flags_of, report, say

POLL, OVERVIEW = 0.5, 60.0  # seconds between looks at the runs, and between overviews


@dataclass
class Args:
    space: Annotated[str, tyro.conf.Positional] = ""  # what to search, as --list prints it
    trials: int = 0  # finished trials wanted in all; no more than there are: the table and figures of those
    jobs: int = psutil.cpu_count(logical=False) or 1  # trials at a time, each with one run at a time
    threads: int = 1  # of each run
    seed: int = 1  # of the sampler
    list: bool = False  # print the spaces, and stop


class RunFailed(Exception):
    pass


def follow(run: Run, frequency: int, runs: Path) -> Iterator[dict[int, float]]:
    """Carry out a run, or what is left of it; until its end yields, now and then, its returns by step of evaluation."""
    job, log, events = Job(run), runs / "logs" / f"{run.name}.txt", None
    try:
        while True:
            over = not job.process or job.process.poll() is not None  # asked first: then nothing it wrote is missed
            folder, returns = run.folder(runs), {}
            if folder and not (events and events.path == str(folder)):
                events = EventAccumulator(str(folder), {"scalars": 0})
            if events and "eval/episodic_return" in events.Reload().Tags()["scalars"]:
                for event in events.Scalars("eval/episodic_return"):  # several environments step over the multiples
                    step = run.steps if event.step >= run.steps else event.step // frequency * frequency
                    returns[step] = event.value
            said = log.read_text(errors="replace").splitlines()[-5:] if over and log.exists() else []
            diverged = folder and any("is not finite" in line for line in said)
            if over and diverged:
                say(f"{run.variant}: {run.env_id}, seed {run.seed} diverged, what it had left counts 0")
                returns = dict.fromkeys([*range(frequency, run.steps, frequency), run.steps], -math.inf) | returns
            if not over or diverged or (folder and (folder / "model.pt").exists()):
                yield returns
                if over:
                    return
            elif job.tries < 2:
                job.start(runs, track=False)  # nothing happens while another process has the run
                yield returns
            else:
                words = f"ended with exit code {job.process.returncode}: {said[-1] if said else ''} ({log})"
                raise RunFailed(f"{run.env_id}, seed {run.seed} {words}")
    finally:
        if job.process and job.process.poll() is None:
            job.process.send_signal(signal.SIGINT)  # the script leaves at once, its last checkpoint is whole
            job.process.wait()


def lock(path: Path, wait: bool = False):
    """The file at `path`, locked until it is closed or this process ends; None if another has it."""
    file = open(path, "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        return file
    except BlockingIOError:
        file.close()


@dataclass
class Tuning:
    name: str
    space: Space
    args: Args
    runs: Path  # the folder

    def __post_init__(self):
        space = self.space
        if not (ROOT / space.script).is_file() or not space.envs or space.seeds < 1:
            fail(f"space {self.name}: needs a script that exists ({space.script}), an environment and a seed at least")
        self.flags = shlex.split(space.flags)
        self.grid = [(env_id, seed) for seed in range(1, space.seeds + 1) for env_id in space.envs]
        self.steps = sum(space.envs[env_id].steps for env_id, _ in self.grid)
        self.defaults = self.settings(self.flags)
        if self.defaults.get("eval_frequency", 0) < 1:
            fail(f"space {self.name}: evaluations make the score, its flags must have --eval-frequency 1 or more")
        for flag, values in space.search.items():
            for value in getattr(values, "choices", None) or (values.low, values.high):
                self.settings(flags_of({flag: value}))
        for env_id, env in space.envs.items():
            if env.low >= env.high:
                fail(f"space {self.name}: {env_id} needs low < high, the returns that score 0 and 1")

    def settings(self, flags: list[str]) -> dict:
        """Those of the script under these flags, all of which it must know."""
        script = self.space.script
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                return vars(tyro.cli(importlib.import_module(Path(script).stem).Args, args=flags))
        except SystemExit:
            fail(f"space {self.name}: {script} does not take {shlex.join(flags)}, see its --help")

    def own(self) -> dict | None:
        """The script's own settings, if the space holds them all."""
        own = {flag: self.defaults.get(flag[2:].replace("-", "_")) for flag in self.space.search}
        for value, values in zip(own.values(), self.space.search.values()):
            if choices := getattr(values, "choices", None):
                held = value in choices
            else:
                held = isinstance(value, float | int) and values.low <= value <= values.high
            if not held or "--preset" in self.flags:
                return None
        return own

    def lock(self, *number: int, wait: bool = False):
        return lock(self.runs / "logs" / f"{'-'.join(map(str, ['tune', self.name, *number]))}.lock", wait)

    def open(self):
        """Take the study from the journal, or begin it; its name says of what it is."""
        path = self.runs / f"tune-{self.name}.journal"  # absolute: Optuna links its lock to it
        texts = code_of(self.space.script), str(self.space)
        self.hashes = [hashlib.sha256(text.encode()).hexdigest()[:10] for text in texts]
        name = " ".join([self.name, *self.hashes])
        try:
            storage = JournalStorage(JournalFileBackend(str(path)))
        except (ValueError, KeyError) as error:
            fail(f"{path} is damaged ({error}): move it away to begin anew")
        for other in optuna.get_all_study_names(storage):
            if other != name:
                what = "search space" if self.hashes[0] in other else f"version of {self.space.script}"
                fail(f"{path} is of another {what}: bring that back, or move the journal away to begin anew")
        # half of the first run is too early to judge by
        pruner = optuna.pruners.MedianPruner(5, n_warmup_steps=next(iter(self.space.envs.values())).steps // 2)
        self.study = optuna.create_study(
            storage=storage, pruner=pruner, study_name=name, direction="maximize", load_if_exists=True
        )

    def claim(self):
        """A trial to work on, and its lock: one a killed process left, or a new one; None if no more are wanted."""
        study, search = self.study, self.space.search
        with self.lock(wait=True):
            left, wanted = None, self.args.trials
            for trial in study.trials:
                mine = trial.state == TrialState.RUNNING and self.lock(trial.number)
                if mine and study.trials[trial.number].state == TrialState.RUNNING:  # else it was finished just now
                    left = left or (trial, mine)
                elif trial.state != TrialState.WAITING:
                    wanted -= 1
            if wanted < 1:
                return None
            if not study.trials and (own := self.own()):
                study.enqueue_trial(own, user_attrs={"note": "the script's own settings"})
            # a generator of its own for each trial: started again, the sampler must not repeat what it drew at first
            seed = int(np.random.SeedSequence([self.args.seed, len(study.trials)]).generate_state(1)[0])
            study.sampler = optuna.samplers.TPESampler(multivariate=True, constant_liar=True, seed=seed)
            trial = optuna.Trial(study, left[0]._trial_id) if left else study.ask()
            for flag, values in search.items():
                trial._suggest(flag, values)  # what a trial has already, stays
            versions = [f"{package} {version(package)}" for package in ("torch", "gymnasium", "optuna")]
            trial.set_user_attr("versions", ", ".join([f"python {platform.python_version()}", *versions]))
            return trial, left[1] if left else self.lock(trial.number)

    def carry_out(self, trial: optuna.Trial) -> Iterator[str]:
        """Work on a trial, one piece at each next(): yields where it is, returns its score.

        Reported after each evaluation is the score so far, the runs to come counted 0: so the last report is the score.
        """
        before, scores = 0, {}
        reported = set(self.study.trials[trial.number].intermediate_values)  # if it is taken up again
        for env_id, seed in self.grid:  # all environments with the first seed, then with the next
            steps, low, high = self.space.envs[env_id]
            flags = ["--env-id", env_id, "--total-timesteps", str(steps), *self.flags, *flags_of(trial.params)]
            flags = (*flags, "--threads", str(self.args.threads))
            run = Run(f"tune-{self.name}", self.space.script, env_id, f"trial {trial.number}", seed, steps, flags)
            values, score = {}, 0.0
            with contextlib.closing(follow(run, self.defaults["eval_frequency"], self.runs)) as following:
                for returns in following:
                    for step in sorted(returns.keys() - values.keys()):
                        values[step] = max(0.0, (returns[step] - low) / (high - low))
                        score = statistics.fmean([*values.values()][-self.space.last :])
                        if before + step not in reported:
                            trial.report((sum(scores.values()) + score) / len(self.grid), before + step)
                            if before + step < self.steps and trial.should_prune():
                                raise optuna.TrialPruned
                    yield f"{run.variant}, {env_id}, seed {seed}: step {max(values, default=0)} of {steps}"
            before += steps
            scores[f"{env_id} seed {seed}"] = score
            trial.set_user_attr("scores", scores)
        return sum(scores.values()) / len(self.grid)

    def tell(self, trial: optuna.Trial, failure: object = "", **outcome):
        """End a trial, and say so in one line."""
        trial = self.study.tell(trial, **outcome)
        best = max((t.value for t in self.study.trials if t.state == TrialState.COMPLETE), default=0)
        said = {
            TrialState.COMPLETE: f"score {trial.value or 0:.3f}, best so far {best:.3f}",
            TrialState.PRUNED: f"pruned at step {trial.last_step} of {self.steps}",
            TrialState.FAIL: f"failed, {failure}",
        }
        rounded = {k: float(f"{v:.3g}") if isinstance(v, float) else v for k, v in trial.params.items()}
        say(f"trial {trial.number}: {said[trial.state]}: {shlex.join(flags_of(rounded))}")

    def work(self):
        """Trials, some at a time, until as many as wanted are finished or with other processes."""
        working, told = [], time.time()
        try:
            while True:
                while len(working) < self.args.jobs and (claimed := self.claim()):
                    working.append((*claimed, self.carry_out(claimed[0])))
                if not working:
                    return
                news = []
                for item in list(working):
                    trial, mine, pieces = item
                    try:
                        news.append(next(pieces))
                        continue
                    except StopIteration as end:
                        self.tell(trial, values=end.value)
                    except optuna.TrialPruned:
                        self.tell(trial, state=TrialState.PRUNED)
                    except RunFailed as failure:
                        self.tell(trial, failure, state=TrialState.FAIL)
                    working.remove(item)
                    mine.close()
                if time.time() > told + OVERVIEW:
                    done = sum(trial.state.is_finished() for trial in self.study.trials)
                    say("\n  ".join([f"{done} of {self.args.trials} trials finished; at work:", *news]))
                    told = time.time()
                time.sleep(POLL)
        finally:  # Ctrl-C, or a fault of this program: the runs stop
            for *_, pieces in working:
                pieces.close()


def print_list():
    for name, space in SPACES.items():
        steps = space.seeds * sum(env.steps for env in space.envs.values())
        cost = f"{space.seeds * len(space.envs)} runs, {steps} steps, {steps / STEPS_PER_SECOND / 3600:.1f} core-hours"
        say(f"{name}: {space.script} {space.flags}; a trial that is not pruned: {cost}")
        for key, value in [*space.envs.items(), *space.search.items()]:
            say(f"    {key}: {value}")


def main():
    args = tyro.cli(Args, description=__doc__)
    if args.list:
        return print_list()
    if args.space not in SPACES:
        fail(f"no search space {args.space or 'named'}; there are {', '.join(SPACES)}")
    for flag, least in [("trials", 1), ("jobs", 1), ("threads", 1), ("seed", 0)]:
        if vars(args)[flag] < least:
            hint = ", the number of finished trials wanted in all" if flag == "trials" else ""
            fail(f"--{flag} must be at least {least}{hint}")
    space, runs = SPACES[args.space], Path.cwd() / "runs"
    sys.path.insert(0, str((ROOT / space.script).parent))
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    tuning = Tuning(args.space, space, args, runs)
    try:
        (runs / "logs").mkdir(parents=True, exist_ok=True)
        with tuning.lock(wait=True):
            tuning.open()
        tuning.work()
        with tuning.lock(wait=True):  # one process at a time writes
            report(args.space, tuning.study, space, RESULTS / f"tune-{args.space}")
    except KeyboardInterrupt:
        sys.exit(f"stopped, to continue: {shlex.join(['python', '-m', 'benchmark.tune', *sys.argv[1:]])}")
    except OSError as error:
        where = f"{runs} and {RESULTS} must be folders with space, where one may write"
        fail(f"{error}: {where}; the same command continues")


if __name__ == "__main__":
    main()
