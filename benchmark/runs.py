"""What a run is: what it is known by, its folder, what it recorded, and what of it is committed.

A run is known by what it computes: its script's code, comments apart, and its settings, as far as
they differ from the script's defaults. Another text of the script counts as the same where
benchmark/same_bits.py has shown that both compute the same bits; its records are in results/proofs.
"""

import contextlib
import csv
import functools
import hashlib
import importlib.util
import json
import logging
import re
import shlex
import statistics
import subprocess
import sys
import tokenize
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
import tyro
from tensorboard.backend.event_processing.directory_watcher import DirectoryDeletedError
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmark.studies import STUDIES, Study

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmark" / "results"
PROOFS = RESULTS / "proofs"
RETURN = "eval/episodic_return"
DIAGNOSTICS = {  # key of a record: what figures call it
    "losses/alpha": "temperature alpha",
    "losses/entropy": "entropy of the policy, nats",
    "losses/qf1_values": "Q-value, first critic",
    "losses/qf_loss": "loss of the critics",
    "losses/actor_loss": "loss of the policy",
    "eval/success_rate": "success rate, deterministic policy",
}
# These settings change no result, or only its rounding or, on a GPU, what is drawn at random.
# The seed stands beside the key.
WITHOUT_EFFECT = {"seed", "exp_name", "threads", "compile", "cuda", "log_frequency"}
WITHOUT_EFFECT |= {"capture_video", "track", "wandb_project_name", "wandb_entity"}
WITHOUT_EFFECT |= {"resume", "evaluate"}


def fail(message: str):
    """End the program for a mistake of its user: one line, exit code 2."""
    print("error:", message, file=sys.stderr)
    sys.exit(2)


# ---------------------------------------------------------------- what a run is known by


def code_of(text: str) -> str:
    """A script's text without comments and empty lines: what changes there changes no result."""
    lines = text.splitlines()
    for token in tokenize.generate_tokens(iter([line + "\n" for line in lines]).__next__):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    return "\n".join(line.rstrip() for line in lines if line.strip())


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:10]


@functools.cache
def code_hash(path: Path) -> str:
    return digest(code_of(path.read_text()))


@functools.cache
def same_as(code: str) -> frozenset[str]:
    """The hashes of all code that is proven to compute what this one does, through others too."""
    steps = set()  # from a code to another one whose rows are its own too
    for path in PROOFS.glob("*.json"):
        proof = json.loads(path.read_text())
        for script in proof["scripts"].values():
            old, new = script["old"]["code"], script["new"]["code"]
            if script["same"]:
                steps.add((new, old))
            # Where cases were left out, the new code has flags that the old one cannot vouch for.
            if script["same"] and not proof.get("left_out"):
                steps.add((old, new))
    known = {code}
    while more := {there for here, there in steps if here in known} - known:
        known |= more
    return frozenset(known)


@functools.cache
def load(script: str) -> ModuleType:
    """A script as a module. To import a script starts nothing."""
    name = f"script {script}"
    spec = importlib.util.spec_from_file_location(name, ROOT / script)
    sys.modules[name] = importlib.util.module_from_spec(spec)  # where tyro looks the types up
    spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def args_of(script: str) -> type:
    """The dataclass of a script's flags."""
    return load(script).Args


def presets_of(script: str) -> dict[str, str]:
    """The flags that each value of --preset stands for, if the script has any."""
    return getattr(load(script), "PRESETS", {})


@functools.cache
def hash_of_flags(script: str, flags: tuple[str, ...]) -> str:
    """Of the settings that differ from the script's defaults: a new flag orphans no run."""
    defaults = vars(args_of(script)())
    given = vars(tyro.cli(args_of(script), args=flags))
    if preset := presets_of(script).get(given.get("preset")):
        given = vars(tyro.cli(args_of(script), args=(*preset.split(), *flags)))
    own = {k: v for k, v in given.items() if k not in WITHOUT_EFFECT and v != defaults[k]}
    return digest(f"{Path(script).stem} {sorted(own.items())}")


class Run(NamedTuple):
    study: str
    script: str
    env_id: str
    variant: str
    seed: int
    steps: int
    flags: tuple[str, ...]  # all but the seed

    @property
    def keys(self) -> set[str]:
        """All that this run's rows may go by: its settings, with each version of the script."""
        settings = hash_of_flags(self.script, self.flags)
        return {f"{settings}.{code}" for code in same_as(code_hash(ROOT / self.script))}

    @property
    def key(self) -> str:
        """What a new run goes by. Studies share a run if its key and seed are the same."""
        return f"{hash_of_flags(self.script, self.flags)}.{code_hash(ROOT / self.script)}"

    def log(self, runs: Path) -> Path:
        """What its processes print, one after the other."""
        name = re.sub(r"[^\w.-]+", "-", f"{self.env_id}__{self.key}__{self.seed}")
        return runs / "logs" / f"{name}.txt"

    def said(self, runs: Path) -> list[str]:
        """The lines of its log; the last one is the runner's if that gave the run up."""
        log = self.log(runs)
        return log.read_text(errors="replace").splitlines() if log.exists() else []

    def folder(self, runs: Path) -> Path | None:
        """The newest folder of this run, a finished one first."""
        # The key holds the environment; a folder's name has its version too where ours has none.
        found, keys = runs.glob(f"*__*__{self.seed}__*"), self.keys
        begun = lambda folder: folder.name.rsplit("__", 1)[1]
        mine = [x for x in found if key_of_folder(x) in keys and begun(x).isdigit()]  # no copies
        return max(mine, key=lambda x: ((x / "model.pt").exists(), int(begun(x))), default=None)

    def finished(self, runs: Path) -> bool:
        folder = self.folder(runs)
        return bool(folder and (folder / "model.pt").exists())

    def committed(self) -> bool:
        return any((key, str(self.seed)) in committed_runs() for key in self.keys)

    def command(self, runs: Path) -> list[str]:
        """What begins the run, or continues it."""
        script = [sys.executable, str(ROOT / self.script)]
        folder = self.folder(runs)
        if folder and (folder / "checkpoint.pt").exists():
            return [*script, "--resume", f"runs/{folder.name}"]
        return [*script, *self.flags, "--seed", str(self.seed), "--exp-name", self.key]

    def __str__(self) -> str:
        return f"{self.study} {self.env_id}, {self.variant}, seed {self.seed}"


def key_of_folder(folder: Path) -> str:
    """The key of the run in a folder: its experiment's name."""
    return folder.name.rsplit("__", 3)[-3]


@functools.cache
def committed_runs() -> set[tuple[str, str]]:
    """Keys and seeds of the runs whose results are in the repository."""
    paths = RESULTS.glob("[!.]*/returns.csv")
    tables = [csv.DictReader(path.read_text().splitlines()) for path in paths]
    return {(row["key"], row["seed"]) for table in tables for row in table}


# ---------------------------------------------------------------- the runs of studies


def runs_of(name: str, study: Study, threads: int = 1, variants: tuple[str, ...] = ()) -> list[Run]:
    """All runs of a study: all first seeds, then all second ones, so that it may stop anywhere."""
    grid = []
    for env_id, steps in study.envs.items():
        common = f"--env-id {env_id} --total-timesteps {steps} {study.flags}"
        common += f" {study.flags_in.get(env_id, '')}"
        for label in study.variants_in(env_id):
            if label not in (variants or [label]):
                continue
            words = shlex.split(study.variants[label])
            script = words.pop(0) if words and words[0].endswith(".py") else study.script
            flags = (*shlex.split(common), *words, "--threads", str(threads))
            for seed in study.seeds_of(env_id):
                grid.append(Run(name, script, env_id, label, seed, steps, flags))
    return sorted(grid, key=lambda run: run.seed)  # of one seed in this order


def runs_of_all(
    names: tuple[str, ...], threads: int = 1, variants: tuple[str, ...] = ()
) -> list[Run]:
    """The runs of one study after the other; what they share is the first one's."""
    runs = {}
    for name in names:
        for run in runs_of(name, STUDIES[name], threads, variants):
            runs.setdefault((run.key, run.seed), run)
    return list(runs.values())


def check(names: tuple[str, ...]):
    """Fail if there are no such studies, or mistakes in them: before the hours of their runs."""
    if not names or (unknown := [name for name in names if name not in STUDIES]):
        fail(f"no study {unknown[0] if names else 'named'}; there are {', '.join(STUDIES)}")
    for name in names:
        if mistake := STUDIES[name].mistake():
            fail(f"study {name} {mistake}")
        labels = {}
        for run in runs_of(name, STUDIES[name]):
            if not (ROOT / run.script).is_file():
                fail(f"study {name} names {run.script}, and there is no such script here")
            other = labels.setdefault((run.key, run.seed), run.variant)
            if other != run.variant:
                fail(f"study {name}: {other} and {run.variant} have the same settings")


# ---------------------------------------------------------------- what a run recorded


class Records:
    """The scalars that a run writes to TensorBoard; each look reads on where the last one ended."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.events = EventAccumulator(str(folder), {"scalars": 0})

    def read(self) -> dict[str, list[tuple[int, float]]]:
        """Steps and values by key."""
        logging.getLogger("tensorboard").setLevel(logging.ERROR)  # a resumed run is no warning
        try:
            tags = self.events.Reload().Tags()["scalars"]
        except DirectoryDeletedError:  # a script that ends before its first checkpoint does so
            return {}
        points = {key: [(e.step, e.value) for e in self.events.Scalars(key)] for key in tags}
        # A resume discards what came after its checkpoint, which may be all.
        return {key: found for key, found in points.items() if found}


class Recorded(NamedTuple):
    """What the folder of a run tells, as rows of the study's CSV files."""

    about: dict
    returns: list[dict] = []  # a row per evaluation, if the run is finished
    diagnostics: list[dict] = []  # a row per other record


def read(run: Run, runs: Path) -> Recorded:
    row = dict(env_id=run.env_id, variant=run.variant, seed=run.seed, key=run.key)
    folder, said = run.folder(runs), run.said(runs)
    # What the runner wrote last, if it gave the run up.
    state = said[-1] if said and said[-1].startswith("failed") else ""
    if not folder:
        return Recorded(row | dict(state=state or "not run"))
    scalars = Records(folder).read()
    row["key"] = key_of_folder(folder)
    steps, speeds = zip(*scalars.get("charts/SPS", [(0, float("nan"))]))
    lasted = [(b - a) / speed / 3600 for a, b, speed in zip((0, *steps), steps, speeds)]
    flags = shlex.join(run.flags)
    # Threads do not tell runs apart, and without its flags it may have been stopped at its start.
    with contextlib.suppress(OSError, ValueError, KeyError):
        threads = json.loads((folder / "args.json").read_text())["threads"]
        flags = re.sub(r"--threads \d+", f"--threads {threads}", flags)
    about = dict(
        state=state or f"not finished, at step {steps[-1]}",
        steps_per_second=round(statistics.median(speeds), 1),
        hours=round(sum(lasted), 6),
        commit=commit_of(folder / Path(run.script).name),
        **versions_of(folder),
        command=f"python {run.script} {flags} --seed {run.seed}",
    )
    if not (folder / "model.pt").exists():
        return Recorded(row | about)
    returns = []
    for step, value in scalars.get(RETURN, []):
        hours = sum(part for at, part in zip(steps, lasted) if at <= step)
        returns.append(row | {"step": step, "return": round(value, 3), "hours": round(hours, 5)})
    diagnostics = [
        row | dict(record=key, step=step, value=f"{value:.5g}")
        for key in DIAGNOSTICS
        for step, value in scalars.get(key, [])
    ]
    return Recorded(row | about | dict(state="finished"), returns, diagnostics)


def commit_of(script: Path) -> str:
    """The first commit that had this content of a script, from a copy of it."""
    blob = git("hash-object", script)
    found = git("log", "--format=%h", f"--find-object={blob}", "--", f":(glob)**/{script.name}")
    return (found.split() or ["uncommitted"])[-1]


def git(*words: str | Path) -> str:
    """What git says; nothing where there is none, or no history."""
    try:
        said = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout
    except OSError:
        return ""
    return said.strip()


def versions_of(folder: Path) -> dict[str, str | None]:
    """What the run noted: versions of Python and packages; the processor, and whether a GPU."""
    if (folder / "versions.json").exists():  # of a peer, whose checkpoints are not ours
        noted = json.loads((folder / "versions.json").read_text())
    elif (folder / "checkpoint.pt").exists():
        path = folder / "checkpoint.pt"
        noted = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["versions"]
    else:  # its checkpoint was deleted
        return dict(versions=None, hardware=None)
    processor, gpu = noted.pop("processor"), noted.pop("gpu")
    versions = " ".join(f"{package} {version}" for package, version in noted.items() if version)
    with_gpu = f" with {gpu if isinstance(gpu, str) else 'a GPU'}" if gpu else ""
    return dict(versions=versions, hardware=processor + with_gpu)
