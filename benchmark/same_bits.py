"""Do two versions of the scripts compute the same bits?

    python -m benchmark.same_bits 29fa32f .             # commits, or folders that hold the scripts
    python -m benchmark.same_bits OLD NEW --jobs 2 --record benchmark/results/proofs/NAME.json

Each case trains with the old script and with the new one, each in an empty folder. The last
checkpoints must agree in every bit: weights, optimizers and temperature by name, the replay buffer,
the random state, the step. So must the scalars in TensorBoard that both record, but the speed.
So must the defaults and presets, as far as both have them: cases give some of these flags anew.
Results of the old script then count as the new one's: see benchmark/runs.py. Cases with flags that
the old script lacks are left out: none of its results can have these.
"""

import datetime
import importlib.util
import json
import platform
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import tyro

from benchmark.runs import ROOT, WITHOUT_EFFECT, Records, args_of, code_hash, fail, git, presets_of

SCRIPTS = ("sac_continuous.py", "sac_dmc.py", "sac_ablations.py")
# A fixed temperature needs no optimizer: older scripts have one that moves nothing.
OPTIONAL = "alpha_optimizer."
ROBOTICS = "gymnasium_robotics"  # of requirements-robotics.txt

FIELD = re.compile(r"^    (\w+): ", re.M)  # of Args
FLAG = re.compile(r"--([a-z][a-z0-9-]*)")


@dataclass
class Args:
    old: Annotated[str, tyro.conf.Positional]  # git commit, or folder with the scripts
    new: Annotated[str, tyro.conf.Positional]  # likewise
    cases: tuple[str, ...] = ()  # only those whose script and name contain one of these
    jobs: int = 1  # cases at a time, each with one thread
    record: Path | None = None  # JSON file for the outcome


class Case(NamedTuple):
    name: str
    script: str
    flags: str
    resumed_to: int = 0  # steps to which the finished run is resumed; 0: it is not


COMMON = "--threads 1 --learning-starts 200 --log-frequency 100 --eval-episodes 2"
SHORT = "--total-timesteps 1000 --checkpoint-frequency 400 --eval-frequency 500 --batch-size 64"
SHORT += " --compile off"
PENDULUM = f"--env-id Pendulum-v1 {SHORT}"
HOPPER = "--env-id Hopper-v4 --total-timesteps 3000"
HOPPER += " --checkpoint-frequency 1000 --eval-frequency 1000"
KNOBS = {
    "no knob": f"--env-id Hopper-v4 {SHORT}",
    "prioritized and combined replay": f"{PENDULUM} --prioritized-replay --combined-replay",
    "prioritized replay, compiled": f"{PENDULUM} --prioritized-replay --compile on",
    "value network": f"{PENDULUM} --value-network --reward-scale 5 --no-autotune --alpha 0.5",
    "normalized observations": f"{PENDULUM} --normalize-obs --num-envs 2",
    "REDQ": f"{PENDULUM} --n-critics 5 --critics-subset 2 --updates-per-step 3",
    "delayed policy": f"{PENDULUM} --policy-frequency 2 --update-interval 50",
    "delayed policy, not compensated": f"{PENDULUM} --policy-frequency 3 --no-compensate",
    "layer norm and dropout": f"{PENDULUM} --layer-norm --dropout 0.01",
    "log std by tanh": f"{PENDULUM} --log-std tanh --log-std-min -5 --heads separate",
    "densities of scaled actions": f"{PENDULUM} --scaled-log-prob --tanh-correction eps",
    "spectral norm": f"{PENDULUM} --spectral-norm --layers 3 --hidden 64",
    "stack and action repeat": f"{PENDULUM} --stack 3 --action-repeat 2",
    "temperature": f"{PENDULUM} --alpha-loss alpha --alpha-lr 1e-3 --target-entropy -0.5",
    "truncation": f"{PENDULUM} --gamma 0.9 --truncation-terminates --random-steps 300",
    "n-step returns": f"{PENDULUM} --n-step 3 --num-envs 2",
    "held random actions": f"{PENDULUM} --hold-noise 30",
    "hard targets": f"{PENDULUM} --tau 1 --target-network-frequency 100",
    "networks": f"{PENDULUM} --init orthogonal --activation Tanh --policy-l2 1e-3",
    "bfloat16": f"{PENDULUM} --matmul-precision medium",
    "preset haarnoja": f"{PENDULUM} --preset haarnoja",
    "preset stable-baselines": f"{PENDULUM} --preset stable-baselines",
    "preset spinningup": f"{PENDULUM} --preset spinningup",
    "preset yarats": f"{PENDULUM} --preset yarats --hidden 64",
    "hindsight": f"--env-id {ROBOTICS}:FetchReach-v4 {SHORT} --gamma 0.95 --hidden 64 "
    "--hindsight 4 --clip-targets",
}
DRAWS = "--prioritized-replay --normalize-obs --dropout 0.1 --n-critics 3 --critics-subset 2"
CASES = [
    Case("Hopper", "sac_continuous.py", f"{HOPPER} --compile off"),
    Case("Hopper, compiled", "sac_continuous.py", f"{HOPPER} --compile on"),
    Case("three environments", "sac_continuous.py", f"{PENDULUM} --num-envs 3"),
    Case(
        "full buffer and bfloat16",
        "sac_continuous.py",
        f"{PENDULUM} --buffer-size 500 --matmul-precision medium",
    ),
    Case("resumed", "sac_continuous.py", f"{PENDULUM} --total-timesteps 1500", 2500),
    Case("cartpole swingup", "sac_dmc.py", f"--env-id cartpole-swingup {SHORT} --action-repeat 2"),
    Case("walker walk", "sac_dmc.py", f"--env-id walker-walk {SHORT}"),
    *(Case(name, "sac_ablations.py", flags) for name, flags in KNOBS.items()),
    Case("resumed with knobs", "sac_ablations.py", f"{PENDULUM} {DRAWS}", 1500),
]


class Outcome(NamedTuple):
    case: Case
    tensors: int  # compared
    scalars: int
    difference: str  # the first one; empty: none


def unpack(source: str, scripts: list[str], folder: Path):
    """Scripts of a commit or of a folder, copied to `folder`."""
    folder.mkdir()
    for script in scripts:
        path = Path(source, script)
        text = path.read_text() if path.is_file() else git("show", f"{source}:{script}")
        if not text:
            fail(f"{source} is neither a folder nor a git commit that holds {script}")
        (folder / script).write_text(text)


def fields_of(script: Path) -> set[str]:
    return {"no_" * no + key for key in FIELD.findall(script.read_text()) for no in (0, 1)}


def flags_of(cases: Iterable[Case]) -> set[str]:
    return {flag.replace("-", "_") for case in cases for flag in FLAG.findall(case.flags)}


def takes(script: Path, case: Case) -> bool:
    """Whether a script has all flags of a case."""
    return flags_of([case]) <= fields_of(script)


def changed_defaults(script: str, old: Path, new: Path) -> list[str]:
    """What both scripts have of settings and presets, but with other values."""

    def defaults(folder: Path) -> dict:
        path = str(folder / script)
        presets = {f"--preset {name}": flags for name, flags in presets_of(path).items()}
        return vars(args_of(path)()) | presets

    before, after = defaults(old), defaults(new)
    shared = [key for key in before if key in after and key not in WITHOUT_EFFECT]
    return [key for key in shared if before[key] != after[key]]


def train(script: Path, case: Case, folder: Path) -> tuple[dict, dict]:
    """The last checkpoint of a case's run, and its scalars by key."""
    folder.mkdir(parents=True)

    def execute(*flags: str):
        command = [sys.executable, script, *flags]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            said = (done.stderr.strip() or "?").splitlines()
            raise RuntimeError(f"exit code {done.returncode}: {said[-1]}")

    execute(*shlex.split(f"{COMMON} {case.flags}"))
    (run,) = folder.glob("runs/*")
    if case.resumed_to:
        execute("--resume", str(run), "--total-timesteps", str(case.resumed_to))
    state = torch.load(run / "checkpoint.pt", map_location="cpu", weights_only=True)
    return state, Records(run).read()


def comparable(state: dict, other: dict) -> dict[str, torch.Tensor]:
    """The compared tensors of a checkpoint by name, but for an optimizer that `other` lacks."""
    # Older scripts call V critics.value, and its slow copy target_critics.value.
    agent = {name.replace("critics.value.", "value."): x for name, x in state["agent"].items()}
    if not any(name.startswith(OPTIONAL) for name in other["agent"]):
        agent = {name: x for name, x in agent.items() if not name.startswith(OPTIONAL)}
    rest = {key: torch.as_tensor(state[key]) for key in ("rows", "random", "step")}
    return {f"agent.{name}": x for name, x in agent.items()} | rest


def first_difference(old: dict, new: dict) -> str:
    """The first entry that one of two flat dictionaries lacks, or that differs, if any."""
    for name in old | new:
        if name not in old or name not in new:
            return f"{name} only in the {'old' if name in old else 'new'} one"
        a, b = old[name], new[name]
        if a.dtype != b.dtype or a.shape != b.shape:
            return f"{name}: {a.dtype} {tuple(a.shape)} against {b.dtype} {tuple(b.shape)}"
        if not torch.equal(a, b):
            return f"{name}: up to {(a.double() - b.double()).abs().max():.3g} apart"
    return ""


def compare(case: Case, old: Path, new: Path, folder: Path) -> Outcome:
    """Train a case with both scripts; `old` and `new` are the folders that hold them."""
    try:
        (before, told), (after, tells) = (
            train(scripts / case.script, case, folder / scripts.name) for scripts in (old, new)
        )
        flat = [comparable(before, after), comparable(after, before)]
    except (RuntimeError, ValueError, OSError, KeyError) as error:
        return Outcome(case, 0, 0, f"no two runs to compare: {error}")
    common = [key for key in told if key in tells and key != "charts/SPS"]
    series = [
        {key: torch.tensor(scalars[key]).double() for key in common} for scalars in (told, tells)
    ]
    difference = first_difference(*flat) or first_difference(*series)
    return Outcome(case, len(flat[0]), sum(map(len, series[0].values())), difference)


def describe(source: str) -> str:
    """The commit of a source, "and changes" where its scripts are not as committed."""
    is_folder = Path(source).is_dir()
    where = Path(source).resolve() if is_folder else ROOT
    at = "HEAD" if is_folder else source
    commit = git("-C", where, "rev-parse", "--short=7", f"{at}^{{commit}}")
    if not commit:
        return "uncommitted"
    changed = is_folder and git("-C", where, "status", "--porcelain", *SCRIPTS)
    return commit + " and changes" * bool(changed)


def record(path: Path, args: Args, old: Path, new: Path, outcomes: list[Outcome]) -> list[str]:
    """Write what was compared. A script is the same if all cases that the old one takes agreed.

    They must have all flags of the others that it knows: those were compared nowhere else. Returns
    the scripts that are not the same by this.
    """
    scripts, left_out = {}, []
    for script in dict.fromkeys(outcome.case.script for outcome in outcomes):
        same = {outcome.case for outcome in outcomes if not outcome.difference}
        all_cases = [case for case in CASES if case.script == script]
        taken = [case for case in all_cases if takes(old / script, case)]
        others = [case for case in all_cases if case not in taken]
        left_out += [case.name for case in others]
        unseen = flags_of(others) & fields_of(old / script) - flags_of(taken)
        scripts[script] = {side.name: {"code": code_hash(side / script)} for side in (old, new)}
        changed = changed_defaults(script, old, new)
        scripts[script]["same"] = {*taken} <= same and not unseen and not changed
    packages = {name: version(name) for name in ("torch", "numpy", "gymnasium", "mujoco")}
    about = dict(
        old=describe(args.old),
        new=describe(args.new),
        date=datetime.date.today().isoformat(),
        versions=dict(python=platform.python_version(), **packages),
        processor=torch.cpu.get_capabilities()["cpu_name"],
        scripts=scripts,
        left_out=left_out,
        cases=[
            case._asdict() | dict(tensors=tensors, scalars=scalars, result=difference or "same")
            for case, tensors, scalars, difference in outcomes
        ],
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(about, indent=2) + "\n")
    return [script for script, found in scripts.items() if not found["same"]]


def main():
    args = tyro.cli(Args, description=__doc__)
    named = lambda case: any(word in f"{case.script}, {case.name}" for word in args.cases)
    chosen = [case for case in CASES if not args.cases or named(case)]
    if not chosen:
        fail(f"--cases {' '.join(args.cases)}: there are {', '.join(case.name for case in CASES)}")
    if args.jobs < 1:
        fail("--jobs must be at least 1")
    outcomes = []
    with tempfile.TemporaryDirectory() as folder:
        old, new = Path(folder, "old"), Path(folder, "new")
        scripts = list(dict.fromkeys(case.script for case in chosen))
        unpack(args.old, scripts, old)
        unpack(args.new, scripts, new)
        lacking = [case for case in chosen if not takes(old / case.script, case)]
        chosen = [case for case in chosen if case not in lacking]
        for case in lacking:
            print(f"{case.script}, {case.name}: left out, {args.old} lacks its flags", flush=True)
        if not chosen:
            fail(f"{args.old} lacks the flags of all these cases: there is nothing to compare")
        if not importlib.util.find_spec(ROBOTICS):
            for case in [case for case in chosen if ROBOTICS in case.flags]:
                chosen.remove(case)
                why = "it needs requirements-robotics.txt"
                print(f"{case.script}, {case.name}: left out, {why}", flush=True)
        changed = [(script, x) for script in scripts for x in changed_defaults(script, old, new)]
        for script, name in changed:
            print(f"{script}: {name} has another default", flush=True)
        with ThreadPoolExecutor(args.jobs) as pool:
            work = lambda case: compare(case, old, new, Path(folder, f"case {CASES.index(case)}"))
            for outcome in pool.map(work, chosen):
                outcomes.append(outcome)
                case, tensors, scalars, difference = outcome
                counts = f"{tensors} tensors, {scalars} scalars"
                print(f"{case.script}, {case.name}: {counts}: {difference or 'same'}", flush=True)
        unproven = record(args.record, args, old, new, outcomes) if args.record else []
    different = sum(bool(outcome.difference) for outcome in outcomes)
    print(f"{len(outcomes) - different} of {len(outcomes)} cases are the same")
    for script in unproven:
        print(f"{args.record} proves nothing of {script}")
    sys.exit(1 if different or changed or unproven else 0)


if __name__ == "__main__":
    main()
