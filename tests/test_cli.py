"""How the scripts meet their user: mistakes in the flags, Ctrl-C, broken environments, full disks, little memory.

Most tests run the real main() in a forked child. That gives a real exit code and all that reached the terminal, at a
fraction of the time of a fresh interpreter, and whatever a test breaks ends with the child.
"""

import dataclasses
import errno
import importlib.machinery
import json
import math
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import psutil
import pytest
import torch
from gymnasium.spaces import Box, MultiDiscrete

import sac_continuous
import sac_continuous as sac  # the tests have each script in its place

SCRIPTS = ["sac_continuous", "sac_dmc", "sac_ablations"]
ENVIRONMENTS = {"sac_dmc": ("cartpole-swingup", "cartpole-balance")}  # one that is quickly stepped, and another
# A run of half a second: where a mistake goes unnoticed, its test ends soon all the same.
QUICK = "--total-timesteps 60 --learning-starts 50 --batch-size 8 --buffer-size 100 --eval-frequency 50 "
QUICK += "--eval-episodes 1 --log-frequency 20 --checkpoint-frequency 40 --threads 1 --no-cuda"

by_gymnasium = pytest.mark.without("sac_dmc")  # a mistake that only Gymnasium's names allow
once = pytest.mark.only("sac_continuous")  # it takes long, and the lines are the same in each
not_thrice = pytest.mark.without("sac_ablations")  # likewise


class Toy(gym.Env):
    """An environment that goes on for ever and pays 1 per step, until something odd happens in step `at`."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}
    steps = 0  # of all instances

    def __init__(self, width=2, action_space=None, odd=None, at=math.inf, render_mode=None):
        self.observation_space, self.action_space = Box(-1, 1, (width,)), action_space or Box(-1, 1, (1,))
        self.odd, self.at, self.render_mode = odd, at, render_mode

    def reset(self, seed=None, options=None):
        return np.ones(self.observation_space.shape, np.float32), {}

    def step(self, action):
        Toy.steps += 1
        odd = self.odd if Toy.steps >= self.at else 1.0
        return self.reset()[0], odd() if callable(odd) else odd, False, False, {}

    def render(self, *_, **__):
        raise RuntimeError("no screen here")


def register(name, entry_point=Toy, **kwargs):
    gym.registry.pop(f"Toy/{name}-v0", None)  # of another script's test
    gym.register(f"Toy/{name}-v0", entry_point, kwargs=kwargs)
    return f"Toy/{name}-v0"


UNRENDERABLE = register("Unrenderable")
UNBOUNDED = register("Unbounded", action_space=Box(-math.inf, math.inf, (1,)))
HALF_BOUNDED = register("HalfBounded", action_space=Box(-1, math.inf, (1,)))
WHOLE_NUMBERS = register("WholeNumbers", action_space=Box(-1, 1, (1,), np.int64))
CHOICES = register("Choices", action_space=MultiDiscrete([2, 3]))


@pytest.fixture(scope="module", autouse=True)
def names(equipped):
    """What the tests call the script under test, its environments, and a small run of it."""
    global SCRIPT, ENVIRONMENT, ANOTHER, SMALL
    SCRIPT = Path(equipped.__file__)
    ENVIRONMENT, ANOTHER = ENVIRONMENTS.get(equipped.__name__, ("Pendulum-v1", "MountainCarContinuous-v0"))
    SMALL = f"--env-id {ENVIRONMENT} {QUICK}"


@pytest.fixture
def toys(monkeypatch):
    """Toys as environments: sac_dmc.make_env knows the suite alone, but the loop runs around the parent's as well."""
    if sac.__name__ == "sac_dmc":
        monkeypatch.setattr(sac, "make_env", sac_continuous.make_env)


class Ended(NamedTuple):
    code: int
    out: str
    err: str


def child(script, folder, arguments):
    os.chdir(folder)
    for name, target in (("stdout", 1), ("stderr", 2)):  # both levels: libraries in C write past Python
        stream = open(f"{name}.txt", "w", buffering=1)
        setattr(sys, name, stream)
        os.dup2(stream.fileno(), target)
    sys.argv = [f"{script.__name__}.py", *arguments.split()]
    script.main()


def run(folder, arguments, script=None):
    """The end of one run in `folder` of the script under test, or of `script`."""
    process = multiprocessing.get_context("fork").Process(target=child, args=(script or sac, folder, arguments))
    process.start()
    process.join(120)
    if process.is_alive():
        process.kill()
        process.join()
    return Ended(process.exitcode, (folder / "stdout.txt").read_text(), (folder / "stderr.txt").read_text())


def content(folder):
    """Every file below `folder`, with its bytes, and every folder."""
    return {str(path): path.is_file() and path.read_bytes() for path in sorted(folder.rglob("*"))}


def refusal(folder, arguments):
    """The one line that a run which must not begin ends with, once the rest of its contract is checked."""
    before = content(folder / "runs")
    code, _, err = run(folder, arguments)
    assert code == 2, err
    assert err.startswith("error:") and err.count("\n") == 1 and err.endswith("\n"), err
    assert content(folder / "runs") == before
    return err


def only_run(folder):
    (run_folder,) = (folder / "runs").iterdir()
    return run_folder


def load(path):
    return torch.load(path, map_location="cpu", weights_only=True)


def tensors(state):
    """All tensors of a nested state."""
    if isinstance(state, dict):
        return [tensor for value in state.values() for tensor in tensors(value)]
    return [state] if isinstance(state, torch.Tensor) else []


@pytest.fixture(autouse=True)
def no_screen(monkeypatch):
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")  # without it SDL has its own lines for stderr


@pytest.fixture(scope="module")
def trained(names, tmp_path_factory):
    """A folder in which a run was finished."""
    folder = tmp_path_factory.mktemp("trained")
    assert run(folder, SMALL).code == 0
    return folder


@pytest.fixture
def finished(trained, tmp_path):
    """The folder of a finished run, to be damaged at will."""
    folder = Path(shutil.copytree(only_run(trained), tmp_path / "runs" / "finished"))
    assert (folder / SCRIPT.name).exists()  # a run of the script under test
    return folder


@pytest.fixture
def uninstall(monkeypatch):
    """A function after which a package is not installed, for the children of this test."""

    def uninstall(package):
        find = importlib.machinery.PathFinder.find_spec
        hide = lambda name, *rest: None if name.split(".")[0] == package else find(name, *rest)
        monkeypatch.setattr(importlib.machinery.PathFinder, "find_spec", hide)
        # whoever imported it has to try again
        for name in [name for name in sys.modules if re.match(rf"{package}|shimmy|gymnasium\.envs\.(muj|box)", name)]:
            monkeypatch.delitem(sys.modules, name)
        for name in [name for name in gym.registry if name.startswith("dm_control/")]:
            monkeypatch.delitem(gym.registry, name)

    return uninstall


# Mistakes in the flags


@by_gymnasium
@pytest.mark.parametrize(
    "env_id, answer",
    [
        ("Hoper-v4", "Hopper"),  # the suggestion is Gymnasium's
        ("Hopper-v9", "v5"),
        ("Hopper-v3", "gymnasium-robotics"),
        ("Hopper/v4/", "Malformed"),
        ("no_such_module:Hopper-v4", "No module named 'no_such_module'"),
        ("shimmy:dm_control/cartpole-balanced-v0", "cartpole-balance"),
        ("CartPole-v1", "continuous"),
        (UNBOUNDED, "bound"),
        (HALF_BOUNDED, "bound"),
        (WHOLE_NUMBERS, "continuous"),
        (CHOICES, "continuous"),
    ],
)
def test_environments_that_cannot_be_learned(tmp_path, env_id, answer):
    line = refusal(tmp_path, f"{SMALL} --env-id {env_id}")
    assert "--env-id" in line and env_id in line and answer in line
    assert "pip install" not in line  # nothing is missing


def test_mistakes_in_two_flags(tmp_path):
    assert "--env-id" in refusal(tmp_path, f"{SMALL} --env-id Hoper-v4 --capture-video")


@pytest.mark.parametrize(
    "package, flags",
    [
        ("wandb", "--track"),
        ("moviepy", "--capture-video"),
        pytest.param("Box2D", "--env-id BipedalWalker-v3", marks=by_gymnasium),
        pytest.param("mujoco", "--env-id Hopper-v4", marks=by_gymnasium),
        ("shimmy", "--env-id shimmy:dm_control/cartpole-balance-v0"),
        ("dm_control", "--env-id shimmy:dm_control/cartpole-balance-v0"),
    ],
)
def test_missing_packages(tmp_path, monkeypatch, uninstall, package, flags):
    if sac.__name__ == "sac_dmc":  # OpenGL does not survive a fork
        monkeypatch.setattr("dm_control.mujoco.Physics.render", lambda *_, **__: np.zeros((480, 640, 3), np.uint8))
    uninstall(package)
    line = refusal(tmp_path, f"{SMALL} {flags}")
    # what the suite itself needs, sac_dmc.py needs whatever the flags
    assert flags.split()[0] in line or (sac.__name__ == "sac_dmc" and package in ("shimmy", "dm_control"))
    assert re.search(f"(?i){package}.*pip install", line)


IMPOSSIBLE = {
    "--total-timesteps": "0 -1",
    "--num-envs": "0 -1 101",  # of a buffer for 100
    "--buffer-size": "0 -1 7",  # 7: a batch has 8
    "--batch-size": "0 -1 101",
    "--gamma": "-0.1 1.1 nan inf",
    "--tau": "0 -0.1 1.5 nan inf",
    "--policy-lr": "0 -1 nan inf",
    "--q-lr": "0 -1 nan inf",
    "--learning-starts": "-1 0 60 61",  # of 60 steps in all
    "--eval-frequency": "-1",
    "--eval-episodes": "0 -1",
    "--checkpoint-frequency": "0 -1",
    "--log-frequency": "0 -1",
    "--threads": "0 -1",
    "--seed": "-1 99999999999999999999",  # beyond 64 bits
}


@pytest.mark.parametrize("flag, value", [(flag, value) for flag in IMPOSSIBLE for value in IMPOSSIBLE[flag].split()])
def test_impossible_numbers(tmp_path, flag, value):
    assert flag in refusal(tmp_path, f"{SMALL} {flag} {value}")


@pytest.mark.parametrize("flags", ["--batch-size abc", "--num-envs nan", "--seed 1.5", "--gamma x", "--width 3"])
def test_flags_that_cannot_be_read(tmp_path, flags):
    code, out, err = run(tmp_path, f"{SMALL} {flags}")
    assert code == 2 and flags.split()[0] in err and "Traceback" not in err
    assert not (tmp_path / "runs").exists()


def test_numbers_at_the_limit_work(tmp_path):
    flags = "--gamma 1 --tau 1 --learning-starts 8 --eval-frequency 0 --buffer-size 8 --num-envs 8 --seed 0"
    assert run(tmp_path, f"{SMALL} {flags}").code == 0


@pytest.mark.parametrize("flags, available", [("", 1000), ("--total-timesteps 10000000000000", 10**10)])
def test_buffers_larger_than_memory(tmp_path, monkeypatch, flags, available):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=available))
    line = refusal(tmp_path, f"{SMALL} --buffer-size 10000000000000 {flags}")
    assert "--buffer-size" in line and "GB" in line


@once
@pytest.mark.parametrize("name, value", [("CXX", "/no/such/compiler"), ("PATH", "/no/such/folder")])
@pytest.mark.parametrize("flags", ["--compile on", "--total-timesteps 50000 --learning-starts 49990"])
def test_without_a_compiler_the_update_runs_uncompiled(tmp_path, monkeypatch, name, value, flags):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))  # else what another test compiled would do
    command = [sys.executable, SCRIPT, *f"{SMALL} --eval-frequency 0 --checkpoint-frequency 50000 {flags}".split()]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert len([line for line in result.stdout.splitlines() if "no C++ compiler" in line]) == 1
    assert json.loads((only_run(tmp_path) / "args.json").read_text())["compile"] == "off"


def test_video_of_what_cannot_be_rendered(tmp_path, monkeypatch):
    if sac.__name__ == "sac_dmc":
        monkeypatch.setattr("dm_control.mujoco.Physics.render", Toy.render)
    flags = "" if sac.__name__ == "sac_dmc" else f"--env-id {UNRENDERABLE}"
    line = refusal(tmp_path, f"{SMALL} {flags} --capture-video")
    assert "--capture-video" in line and "no screen here" in line


def cut(share):
    return lambda path: os.truncate(path, int(share * path.stat().st_size))


DAMAGES = {
    "whole folder missing": lambda folder: shutil.rmtree(folder),
    "arguments alone": lambda folder: [path.unlink() for path in folder.iterdir() if path.name != "args.json"],
    "no arguments": lambda folder: (folder / "args.json").unlink(),
    "arguments empty": lambda folder: cut(0)(folder / "args.json"),
    "arguments cut": lambda folder: cut(0.5)(folder / "args.json"),
    "arguments of something else": lambda folder: (folder / "args.json").write_text('{"width": 3}'),
    "arguments not a table": lambda folder: (folder / "args.json").write_text("[1, 2]"),
    "checkpoint missing": lambda folder: (folder / "checkpoint.pt").unlink(),
    "checkpoint empty": lambda folder: cut(0)(folder / "checkpoint.pt"),
    "checkpoint cut": lambda folder: cut(0.5)(folder / "checkpoint.pt"),
    "checkpoint cut near its end": lambda folder: cut(0.999)(folder / "checkpoint.pt"),
}


@pytest.mark.parametrize("flag", ["--resume", "--evaluate"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_runs(tmp_path, finished, damage, flag):
    DAMAGES[damage](finished)
    line = refusal(tmp_path, f"{flag} runs/finished")
    assert flag in line and "runs/finished" in line


@pytest.mark.parametrize("flag", ["--resume", "--evaluate"])
def test_runs_of_another_environment(tmp_path, finished, flag):
    line = refusal(tmp_path, f"{flag} runs/finished --env-id {ANOTHER}")
    assert "--env-id" in line and ENVIRONMENT in line


def test_flags_that_a_resumed_run_must_keep(tmp_path, finished):
    saved = json.loads((finished / "args.json").read_text())
    assert sac.Args.fixed >= {"env_id", "buffer_size"}
    for key in sac.Args.fixed - {"env_id"}:
        flag = f"--{key.replace('_', '-')}"
        changed = flag if saved[key] is False else f"{flag} {saved[key] + 1}"
        line = refusal(tmp_path, f"--resume runs/finished {changed}")
        assert f"{flag} {saved[key]} must stay" in line


def test_resume_and_evaluate_at_once(tmp_path, finished):
    line = refusal(tmp_path, "--resume runs/finished --evaluate runs/finished")
    assert "--resume" in line and "--evaluate" in line


@once
def test_track_without_login(tmp_path):
    # A fresh interpreter: wandb reads its settings once, and what it leaves behind would fail to end with a fork.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment |= dict(HOME=str(tmp_path), NETRC=str(tmp_path / "netrc"), WANDB_CONFIG_DIR=str(tmp_path))
    command = [sys.executable, SCRIPT, *SMALL.split(), "--track"]
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2 and re.fullmatch("error: .*--track.*wandb login.*\n", ended.stderr), ended.stderr
    assert not (tmp_path / "runs").exists()


@not_thrice
def test_a_mistake_in_a_fresh_interpreter(tmp_path):
    # Gymnasium warns of Hopper-v3's age before it refuses it; a fresh interpreter would show that.
    # dm_control would warn where it finds no screen.
    command = [sys.executable, SCRIPT, "--env-id", "Hopper-v3"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2 and re.fullmatch("error: .*\n", ended.stderr), ended.stderr
    assert not (tmp_path / "runs").exists()


# What the program says of itself


def test_help_has_text_for_every_flag(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    code, out, err = run(tmp_path, "--help")
    assert code == 0
    chunks = re.split(r"^\W*(?=--\w)", out.replace("│", " "), flags=re.MULTILINE)
    texts = {re.match(r"--[\w-]+", chunk)[0]: chunk for chunk in chunks[1:]}
    assert set(texts) == {"--" + field.name.replace("_", "-") for field in dataclasses.fields(sac.Args)}
    for flag, text in texts.items():
        words, default = re.sub(r"--[\w-]+", "", text).split("(default:")
        assert len(re.findall(r"\b[a-z]{2,}\b", words)) >= 2, f"{flag}: {text}"


@pytest.mark.usefixtures("toys")
def test_the_plan_stands_in_one_line_at_the_start(tmp_path):
    env_id = register("Exits", odd=lambda: sys.exit(0), at=1)
    flags = f"--env-id {env_id} --total-timesteps 10000000 --buffer-size 10000000 --learning-starts 1000 --compile off"
    code, out, err = run(tmp_path, f"{SMALL} {flags}")
    (line,) = out.splitlines()
    assert code == 0 and env_id in line
    # 2 observations before and 2 after, 1 action, reward and end are 7 numbers of 4 bytes, ten million times
    assert re.findall(r"([\d.]+) GB", line) == ["0.28"]


# Ends that are nobody's mistake


@not_thrice
def test_interrupted_runs_say_how_to_go_on(tmp_path):
    """Ctrl-C after the first checkpoint: the command printed, as it stands, finishes the run."""
    script = tmp_path / "my project" / SCRIPT.name  # a space in the path, as users have them
    script.parent.mkdir()
    shutil.copy(SCRIPT, script)
    flags = f"{SMALL} --total-timesteps 800 --checkpoint-frequency 100 --log-frequency 50 --eval-frequency 0"
    log = tmp_path / "log.txt"
    with open(log, "w") as file:
        process = subprocess.Popen([sys.executable, script, *flags.split()], cwd=tmp_path, stdout=file, stderr=file)
        while "step 150" not in log.read_text() and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        code = process.wait(timeout=60)
    said, folder = log.read_text(), only_run(tmp_path)
    assert code > 0 and "Traceback" not in said, said
    assert not (folder / "model.pt").exists() and load(folder / "checkpoint.pt")["step"] >= 100
    (command,) = re.findall(r"python .*--resume .*", said)
    assert folder.name in command

    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    kwargs = dict(cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    ended = subprocess.run(command, shell=True, **kwargs)
    assert ended.returncode == 0, ended.stderr
    assert only_run(tmp_path) == folder and load(folder / "checkpoint.pt")["step"] == 800
    assert (folder / "model.pt").exists() and (folder / "learning_curve.png").exists()


def test_runs_go_on_with_their_own_copy_of_the_script(tmp_path, finished, monkeypatch):
    monkeypatch.setattr(sac, "__file__", str(finished / SCRIPT.name))
    code, out, err = run(tmp_path, "--resume runs/finished --total-timesteps 80")
    assert code == 0 and load(finished / "checkpoint.pt")["step"] == 80, err


@pytest.mark.usefixtures("toys")
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30])  # the square of the last overflows
def test_numbers_that_are_not_finite_stop_the_run(tmp_path, value):
    env_id = register(f"Pays{value}".replace("+", ""), odd=value, at=130)
    flags = f"--env-id {env_id} --total-timesteps 1000 --buffer-size 1000 --batch-size 64 --eval-frequency 0"
    code, out, err = run(tmp_path, f"{SMALL} {flags} --checkpoint-frequency 100 --log-frequency 50")
    assert code > 0 and re.fullmatch("error: .*losses/.*150.*\n", err), err
    state = load(only_run(tmp_path) / "checkpoint.pt")
    assert state["step"] == 100 and len(tensors(state)) > 10
    assert all(tensor.isfinite().all() for tensor in tensors(state))


@pytest.mark.usefixtures("toys")
def test_checkpoints_from_before_learning_are_finite_too(tmp_path):
    """A number that is not finite lies in the replay, and no loss knows of it yet, when a checkpoint is due."""
    code, out, err = run(tmp_path, f"{SMALL} --env-id {register('PaysEarly', odd=math.nan, at=30)}")
    assert code > 0 and re.fullmatch("error: .*\n", err), err
    state = load(only_run(tmp_path) / "checkpoint.pt")
    assert all(tensor.isfinite().all() for tensor in tensors(state))


def no_space(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def limit_file_size(file):
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    return file


class Pressing:
    """A file that has Ctrl-C pressed while torch.save, in C++, is writing it."""

    def __init__(self, file):
        self.file, self.flush = file, file.flush

    def write(self, data):
        if len(data) > 1000:  # the numbers themselves
            signal.raise_signal(signal.SIGINT)
        return self.file.write(data)


NO_SPACE, TOO_LARGE = (f"error: .*checkpoint.pt.*{os.strerror(number)}.*" for number in (errno.ENOSPC, errno.EFBIG))
TROUBLES = {  # what the script says of each, and what makes it, of the file that is to be written
    "a full disk while writing": (TOO_LARGE, limit_file_size),  # the system's own error, in the midst of the file
    "a full disk while flushing": (NO_SPACE, lambda file: setattr(os, "fsync", no_space) or file),
    "a full disk while renaming": (NO_SPACE, lambda file: setattr(os, "replace", no_space) or file),
    "Ctrl-C while writing": ("stopped, to continue: .*", Pressing),
}


@pytest.mark.parametrize("trouble", TROUBLES)
def test_trouble_in_saving_leaves_the_previous_checkpoint(tmp_path, monkeypatch, trouble):
    write, saves = torch.save, []
    says, make = TROUBLES[trouble]

    def save(state, file, *rest, **options):
        saves.append(state["step"])
        if saves == [0, 40]:
            shutil.copy(only_run(tmp_path) / "checkpoint.pt", tmp_path / "before.pt")
            file = make(file)
        write(state, file, *rest, **options)

    monkeypatch.setattr(torch, "save", save)
    code, out, err = run(tmp_path, SMALL)
    folder = only_run(tmp_path)
    assert code > 0 and re.fullmatch(f"{says}\n", err), err
    assert (folder / "checkpoint.pt").read_bytes() == (tmp_path / "before.pt").read_bytes()
    assert load(folder / "checkpoint.pt")["step"] == 0
    assert not list(folder.rglob("*.tmp*"))


class Wide(Toy):
    """Each transition takes 32 kB of replay. Measures what a checkpoint adds to the memory in use."""

    resets = 0

    def reset(self, seed=None, options=None):
        Wide.resets += 1
        if Wide.resets == 2:  # the first checkpoint after the start has just been written
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            Path("memory.json").write_text(json.dumps({"rise": peak - Wide.before}))
            sys.exit(0)
        return np.ones(4000, np.float32), {}

    def step(self, action):
        Wide.before = psutil.Process().memory_info().rss
        return np.ones(4000, np.float32), 1.0, False, False, {}


@not_thrice
@pytest.mark.usefixtures("toys")
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the peak is in other units")
def test_checkpoints_take_little_memory(tmp_path):
    """A buffer filled to a quarter is saved without a copy of it, and without the three quarters that are empty."""
    env_id = register("Wide", Wide, width=4000)
    flags = f"--env-id {env_id} --total-timesteps 40000 --buffer-size 40000 --learning-starts 39999 --eval-frequency 0"
    code, out, err = run(tmp_path, f"{SMALL} {flags} --checkpoint-frequency 10000 --log-frequency 10000")
    assert code == 0, err
    path = only_run(tmp_path) / "checkpoint.pt"
    state, rows = load(path), 10_000 * (4000 + 1 + 1 + 1 + 4000) * 4
    assert state["step"] == 10_000
    assert json.loads((tmp_path / "memory.json").read_text())["rise"] <= 0.2 * rows
    assert rows < path.stat().st_size <= rows + sum(tensor.nbytes for tensor in tensors(state["agent"])) + 2e6
