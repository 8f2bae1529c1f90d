"""The trials of a search: their runs, scores and pruning, shared by processes through a journal."""

import contextlib
import functools
import io
import math
import os
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
from typing import IO, NamedTuple

import numpy as np
import optuna
import tyro
from optuna.distributions import BaseDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from optuna.trial import FrozenTrial, TrialState

from benchmark import tables
from benchmark.jobs import Job, lock
from benchmark.runs import RETURN, ROOT, Run, args_of, code_hash, digest, fail, same_as

POLL, OVERVIEW = 0.5, 60.0  # seconds between looks at the runs, and between overviews
MOST_FAILURES = 3  # in a row: then it is no setting that fails, but the machine
say = functools.partial(print, flush=True)


class Env(NamedTuple):
    steps: int
    low: float  # the return that scores 0, such as that of random actions
    high: float  # the return that scores 1


@dataclass(frozen=True)
class Space:
    envs: dict[str, Env]
    search: dict[str, BaseDistribution]  # flag: its values; True and False are --flag and --no-flag
    script: str = "sac_ablations.py"
    seeds: int = 2
    flags: str = ""  # of all its runs; their evaluations make the score
    # evaluations of a run that count, from its end; 0: all, so that learning fast counts
    last: int = 0


class RunFailed(Exception):
    pass


def flags_of(params: dict) -> list[str]:
    switch = lambda flag, on: [flag if on else f"--no-{flag[2:]}"]
    pairs = [switch(k, v) if isinstance(v, bool) else [k, str(v)] for k, v in params.items()]
    return sum(pairs, [])


# ---------------------------------------------------------------- one run of a trial


def follow(run: Run, frequency: int, runs: Path) -> Iterator[dict[int, float]]:
    """Carry out a run, or what is left of it; yields, now and then, its returns by evaluation."""
    job = Job(run)
    try:
        while True:
            # Asked first: then nothing that it wrote before its end is missed.
            over = not job.process or job.process.poll() is not None
            returns = {}
            for step, value in job.scalars(runs).get(RETURN, []):
                # Several environments step over the multiples of the frequency.
                step = run.steps if step >= run.steps else step // frequency * frequency
                returns[step] = value
            if over and run.finished(runs):
                yield returns
                return
            said = run.said(runs) if over else []
            if any(" is not finite at step " in line for line in said):  # as the scripts say it
                which = f"{run.variant}: {run.env_id}, seed {run.seed}"
                say(f"{which} diverged, what it had left counts 0")
                due = [*range(frequency, run.steps, frequency), run.steps]
                yield dict.fromkeys(due, -math.inf) | returns
                return
            if over and job.tries == 2:
                how = f"ended with exit code {job.process.returncode}: {(said or [''])[-1]}"
                raise RunFailed(f"{run.env_id}, seed {run.seed} {how} ({job.log})")
            if over:
                job.start(runs, track=False)  # nothing happens while another process has the run
            yield returns
    finally:
        if job.process and job.process.poll() is None:
            job.process.send_signal(signal.SIGINT)  # it leaves at once, its checkpoint is whole
            job.process.wait()


# ---------------------------------------------------------------- trials


def cut_to_whole_lines(journal: Path):
    """Take away a record that a full disk cut short, for Optuna would append to it."""
    if not journal.exists():
        return
    link = JournalFileSymlinkLock(str(journal))  # other processes may be writing
    link.acquire()
    try:
        whole, newline, rest = journal.read_bytes().rpartition(b"\n")
        if rest and not rest.startswith(b"{"):
            raise ValueError("it ends with no record of Optuna's")
        if rest:
            os.truncate(journal, len(whole + newline))
            say(f"{journal}: the last record was cut short, and is taken away")
    finally:
        link.release()


@dataclass
class Tuning:
    name: str
    space: Space
    args: object  # of benchmark.tune: trials, jobs, threads, seed
    runs: Path  # the folder of runs
    results: Path  # that of the tables

    def __post_init__(self):
        space = self.space
        if not (ROOT / space.script).is_file() or not space.envs or space.seeds < 1:
            needs = f"a script that exists ({space.script}), an environment and a seed at least"
            fail(f"space {self.name}: needs {needs}")
        self.failed_in_a_row = 0
        self.flags = shlex.split(space.flags)
        self.grid = [(env_id, seed) for seed in range(1, space.seeds + 1) for env_id in space.envs]
        self.steps = sum(space.envs[env_id].steps for env_id, _ in self.grid)
        self.defaults = self.settings(self.flags)
        if self.defaults.get("eval_frequency", 0) < 1:
            needs = "its flags must have --eval-frequency 1 or more"
            fail(f"space {self.name}: evaluations make the score, {needs}")
        for flag, values in space.search.items():
            for value in getattr(values, "choices", None) or (values.low, values.high):
                self.settings(flags_of({flag: value}))
        for env_id, env in space.envs.items():
            if env.low >= env.high:
                needs = "needs low < high, the returns that score 0 and 1"
                fail(f"space {self.name}: {env_id} {needs}")

    def settings(self, flags: list[str]) -> dict:
        """Those of the script under these flags, all of which it must know."""
        script = self.space.script
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                return vars(tyro.cli(args_of(script), args=flags))
        except SystemExit:
            fail(f"space {self.name}: {script} does not take {shlex.join(flags)}, see its --help")

    def own(self) -> dict | None:
        """The script's own settings, if the space holds them all."""
        search = self.space.search
        own = {flag: self.defaults.get(flag[2:].replace("-", "_")) for flag in search}
        try:
            optuna.create_trial(state=TrialState.WAITING, params=own, distributions=search)
        except ValueError:
            return None
        return None if "--preset" in self.flags else own

    def lock(self, *number: int, wait: bool = False):
        name = "-".join(map(str, ["tune", self.name, *number]))
        return lock(self.runs / "logs" / f"{name}.lock", wait)

    def open(self):
        """Take the study from the journal, or begin it; and from the tables what it lacks.

        Its name says of what it is: hashes of the script, or of one proven equal, and the space.
        """
        path = self.runs / f"tune-{self.name}.journal"  # absolute: Optuna links its lock to it
        self.code, space = code_hash(ROOT / self.space.script), digest(str(self.space))
        known = {f"{self.name} {code} {space}" for code in same_as(self.code)}
        name = f"{self.name} {self.code} {space}"
        try:
            cut_to_whole_lines(path)
            storage = JournalStorage(JournalFileBackend(str(path)))
        except (ValueError, KeyError) as error:
            fail(f"{path} is damaged ({error}): move it away; {self.results} has what was finished")
        for other in optuna.get_all_study_names(storage):
            if other not in known:
                of_space = {*other.split()} & same_as(self.code)
                what = "search space" if of_space else f"version of {self.space.script}"
                mend = f"bring that back, or move it and {self.results} away to begin anew"
                fail(f"{path} is of another {what}: {mend}")
            name = other
        # Half of the first run is too early to judge by. Trials read from a table may lack reports.
        warm_up = next(iter(self.space.envs.values())).steps // 2
        pruner = optuna.pruners.MedianPruner(5, n_warmup_steps=warm_up, n_min_trials=5)
        how = dict(pruner=pruner, direction="maximize", load_if_exists=True)
        self.study = optuna.create_study(storage=storage, study_name=name, **how)
        self.take_over()

    def take_over(self):
        """Take from the tables the trials that the journal lacks."""
        here, taken = [trial.params for trial in self.study.trials], 0
        for trial in tables.read(self.space, self.results):
            if trial.params in here:
                here.remove(trial.params)
            else:
                self.study.add_trial(trial)
                taken += 1
        if taken:
            say(f"{taken} trials are taken from {self.results}")

    def claim(self):
        """A trial and its lock: one that was left, or a new one; None if no more are wanted."""
        study, search = self.study, self.space.search
        with self.lock(wait=True):
            left = self.abandoned()
            taken = sum(trial.state != TrialState.WAITING for trial in study.trials) - len(left)
            enough = taken >= self.args.trials
            for _, unused in left if enough else left[1:]:
                unused.close()
            if enough:
                return None
            if not study.trials and (own := self.own()):
                study.enqueue_trial(own, user_attrs={"note": "the script's own settings"})
            # Each trial has its own generator: started again, the sampler must not repeat itself.
            entropy = np.random.SeedSequence([self.args.seed, len(study.trials)])
            how = dict(multivariate=True, constant_liar=True)
            how |= dict(seed=int(entropy.generate_state(1)[0]))
            study.sampler = optuna.samplers.TPESampler(**how)
            trial = optuna.Trial(study, left[0][0]._trial_id) if left else study.ask()
            for flag, values in search.items():
                trial._suggest(flag, values)  # what a trial has already, stays
            packages = [f"{name} {version(name)}" for name in ("torch", "gymnasium", "optuna")]
            versions = [f"python {platform.python_version()}", *packages]
            trial.set_user_attr("versions", ", ".join(versions))
            trial.set_user_attr("script_hash", self.code)
            return trial, left[0][1] if left else self.lock(trial.number)

    def abandoned(self) -> list[tuple[FrozenTrial, IO]]:
        """The trials of processes that are gone, with their locks."""
        found = []
        for trial in self.study.trials:
            if trial.state == TrialState.RUNNING and (mine := self.lock(trial.number)):
                # It may have been finished just now.
                if self.study.trials[trial.number].state == TrialState.RUNNING:
                    found.append((trial, mine))
                else:
                    mine.close()
        return found

    def carry_out(self, trial: optuna.Trial) -> Iterator[str]:
        """Work on a trial, one piece at each next(): yields where it is, returns its score.

        Reported after each evaluation is the score so far, the runs to come counted 0: so the last
        report is the score.
        """
        before, scores = 0, {}
        # Not empty if the trial is taken up again.
        reported = set(self.study.trials[trial.number].intermediate_values)
        for env_id, seed in self.grid:  # all environments with the first seed, then with the next
            steps, low, high = self.space.envs[env_id]
            flags = ["--env-id", env_id, "--total-timesteps", str(steps), *self.flags]
            flags += [*flags_of(trial.params), "--threads", str(self.args.threads)]
            study, label = f"tune-{self.name}", f"trial {trial.number}"
            run = Run(study, self.space.script, env_id, label, seed, steps, tuple(flags))
            values, score = {}, 0.0
            following = follow(run, self.defaults["eval_frequency"], self.runs)
            with contextlib.closing(following):
                for returns in following:
                    for step in sorted(returns.keys() - values.keys()):
                        values[step] = max(0.0, (returns[step] - low) / (high - low))
                        score = statistics.fmean([*values.values()][-self.space.last :])
                        so_far = (sum(scores.values()) + score) / len(self.grid)
                        if before + step not in reported:
                            trial.report(so_far, before + step)
                            if before + step < self.steps and trial.should_prune():
                                raise optuna.TrialPruned
                    at = f"step {max(values, default=0)} of {steps}"
                    yield f"{label}, {env_id}, seed {seed}: {at}"
            before += steps
            scores[f"{env_id} seed {seed}"] = score
            trial.set_user_attr("scores", scores)
        return sum(scores.values()) / len(self.grid)

    def tell(self, trial: optuna.Trial, failure: object = "", **outcome):
        """End a trial, tabulate it, and say so in one line."""
        trial = self.study.tell(trial, **outcome)
        with self.lock(wait=True):
            tables.write(self.study, self.space, self.results)
        complete = [t.value for t in self.study.trials if t.state == TrialState.COMPLETE]
        best = max(complete, default=0)
        said = {
            TrialState.COMPLETE: f"score {trial.value or 0:.3f}, best so far {best:.3f}",
            TrialState.PRUNED: f"pruned at step {trial.last_step} of {self.steps}",
            TrialState.FAIL: f"failed, {failure}",
        }
        shown = lambda x: float(f"{x:.3g}") if isinstance(x, float) else x
        flags = flags_of({flag: shown(value) for flag, value in trial.params.items()})
        say(f"trial {trial.number}: {said[trial.state]}: {shlex.join(flags)}")

    def go_on(self, trial: optuna.Trial, pieces: Iterator[str]) -> str | None:
        """Where a trial is now; None if it has ended."""
        try:
            return next(pieces)
        except StopIteration as end:
            self.tell(trial, values=end.value)
        except optuna.TrialPruned:
            self.tell(trial, state=TrialState.PRUNED)
        except RunFailed as failure:
            self.tell(trial, failure, state=TrialState.FAIL)
            self.failed_in_a_row += 1
            return
        self.failed_in_a_row = 0

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
                    if (piece := self.go_on(trial, pieces)) is not None:
                        news.append(piece)
                        continue
                    working.remove(item)
                    mine.close()
                    if self.failed_in_a_row == MOST_FAILURES:
                        logs = f"see {self.runs / 'logs'}; when that is mended, the same command"
                        sys.exit(f"error: {MOST_FAILURES} trials in a row failed, {logs} continues")
                if time.time() > told + OVERVIEW:
                    done = sum(trial.state.is_finished() for trial in self.study.trials)
                    head = f"{done} of {self.args.trials} trials finished; at work:"
                    say("\n  ".join([head, *news]))
                    told = time.time()
                time.sleep(POLL)
        finally:  # Ctrl-C, or a fault of this program: the runs stop
            for *_, pieces in working:
                pieces.close()
