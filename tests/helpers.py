"""What several test files share: comparisons, runs of a script, tiny environments."""

import ctypes
import gc
import importlib
import json
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete
from matplotlib.figure import Figure

ROOT = Path(__file__).parent.parent
SCRIPTS = ("sac_continuous", "sac_dmc", "sac_ablations")
# What PyTorch compiles with: a C++ compiler, and Python's headers.
HEADERS = Path(sysconfig.get_path("include"), "Python.h").exists()
COMPILER = HEADERS and shutil.which(os.environ.get("CXX", "g++"))
needs_compiler = pytest.mark.skipif(not COMPILER, reason="no C++ compiler, or no Python.h")


def suite_or_skip() -> ModuleType:
    """dm_control.suite. Without it, or without EGL, the tests that need it are skipped."""
    given = os.environ.get("MUJOCO_GL")
    os.environ["MUJOCO_GL"] = given or "egl"  # as the script does, before dm_control looks
    try:
        importlib.import_module("shimmy")
        return importlib.import_module("dm_control.suite")
    except (ImportError, AttributeError, ctypes.ArgumentError) as error:  # the last two: no EGL
        if given is None:  # with the variable set, MuJoCo could not be imported either
            del os.environ["MUJOCO_GL"]
        pytest.skip(f"dm_control cannot be imported: {error}", allow_module_level=True)


# Comparisons --------------------------------------------------------------------------------------


def same(result, expected, tolerance: float = 0.0):
    """Fail unless two nested values are equal: dicts, lists, tensors, arrays, numbers, texts.

    Tensors and arrays must have the same type as well. NaN equals NaN.
    """
    if isinstance(expected, dict):
        assert isinstance(result, dict) and result.keys() == expected.keys()
        for key in expected:
            same(result[key], expected[key], tolerance)
    elif isinstance(expected, (torch.Tensor, np.ndarray)):
        result, expected = torch.as_tensor(result), torch.as_tensor(expected)
        kwargs = dict(rtol=tolerance, atol=tolerance, equal_nan=True)
        torch.testing.assert_close(result, expected, **kwargs)
    elif isinstance(expected, (str, bool, type(None))):
        assert result == expected
    elif isinstance(expected, (int, float, np.number)):
        assert result is not None
        np.testing.assert_allclose(result, expected, rtol=tolerance, atol=tolerance)
    else:
        result, expected = list(result), list(expected)
        assert len(result) == len(expected)
        for one, other in zip(result, expected):
            same(one, other, tolerance)


def is_same(result, expected) -> bool:
    try:
        same(result, expected)
    except AssertionError:
        return False
    return True


def tensors(state) -> list[torch.Tensor]:
    """All tensors of a nested state."""
    if isinstance(state, dict):
        return [tensor for value in state.values() for tensor in tensors(value)]
    return [state] if isinstance(state, torch.Tensor) else []


def load(path: Path) -> dict:
    """What torch.save wrote."""
    return torch.load(path, map_location="cpu", weights_only=True)


def in_columns(sac: ModuleType, rows: torch.Tensor, widths: list[int]):
    """Rows of a replay buffer as a Batch of arrays, one for each name."""
    obs, action, reward, terminated, next_obs = rows.split(widths[:5], dim=1)
    columns = (obs, action, reward[:, 0], terminated[:, 0], next_obs)
    return sac.Batch(*(column.numpy() for column in columns))


def oldest_first(sac: ModuleType, buffer):
    """The content of a replay buffer as a Batch of arrays, in the order in which it came."""
    order = torch.arange(buffer.count - len(buffer), buffer.count) % len(buffer.rows)
    return in_columns(sac, buffer.rows[order], buffer.widths)


# Runs of a script ---------------------------------------------------------------------------------


class Ended(NamedTuple):
    code: int
    out: str
    err: str


def words(**flags) -> list[str]:
    """Flags as words of a command line."""
    return [word(key.replace("_", "-"), value) for key, value in flags.items()]


def word(name: str, value) -> str:
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name}={value}"


def command(script: ModuleType | Path, arguments: str | list[str]) -> list[str]:
    path = script if isinstance(script, Path) else script.__file__
    arguments = arguments.split() if isinstance(arguments, str) else arguments
    return [sys.executable, str(path), *arguments]


def run(folder: Path, script: ModuleType | Path, arguments: str | list[str] = "", **environment):
    """A script in a fresh interpreter; variables given as None are unset."""
    kept = {key: value for key, value in os.environ.items() if key not in environment}
    given = {key: value for key, value in environment.items() if value is not None}
    kwargs = dict(cwd=folder, env=kept | given, capture_output=True, text=True, timeout=300)
    result = subprocess.run(command(script, arguments), **kwargs)
    return Ended(result.returncode, result.stdout, result.stderr)


def run_forked(
    folder: Path,
    script: ModuleType,
    arguments: str,
    sabotage: Callable | None = None,
    curve: bool = False,
):
    """main() of a script in a forked child, a fraction of a fresh interpreter's time.

    That gives a real exit code and all that reached the terminal; what a test or `sabotage(script)`
    breaks ends with the child. Only with `curve` is the learning curve drawn, which takes longer
    than most of these runs.
    """
    context = multiprocessing.get_context("fork")
    process = context.Process(target=child, args=(folder, script, arguments, sabotage, curve))
    process.start()
    process.join(300)
    if process.is_alive():
        process.kill()
        process.join()
    said = [(folder / name).read_text() for name in ("stdout.txt", "stderr.txt")]
    return Ended(process.exitcode, *said)


def child(folder: Path, script: ModuleType, arguments: str, sabotage: Callable | None, curve: bool):
    gc.freeze()  # Garbage of earlier tests may wait, when destroyed, for threads of the parent.
    os.chdir(folder)
    # Both levels: libraries in C write past Python.
    for name, target in (("stdout", 1), ("stderr", 2)):
        stream = open(f"{name}.txt", "w", buffering=1)
        setattr(sys, name, stream)
        os.dup2(stream.fileno(), target)
    sys.argv = [f"{script.__name__}.py", *arguments.split()]
    if not curve:
        script.plot_learning_curve = lambda folder: None
    if sabotage:
        sabotage(script)
    script.main()


def wait_for_the_next_second(folder: Path):
    """TensorBoard reads files in the order of their names, and these begin with the second.

    Within one second the number of the process decides, as a text: 10000 comes before 9999.
    """
    seconds = [int(path.name.split(".")[3]) for path in folder.glob("events.out.tfevents.*")]
    assert seconds
    while int(time.time()) <= max(seconds):
        time.sleep(0.01)


def only_run(folder: Path) -> Path:
    """The one run folder below `folder`."""
    (run_folder,) = (folder / "runs").iterdir()
    return run_folder


def saved_args(folder: Path) -> dict:
    return json.loads((folder / "args.json").read_text())


# A watched run ------------------------------------------------------------------------------------


class Watched:
    """train(sac, env_id, total_timesteps, **flags): a run of main() that tells what it saw."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path):
        self.monkeypatch = monkeypatch
        self.folder = folder

    def __call__(self, sac: ModuleType, env_id: str, total_timesteps: int, **flags):
        journal.clear()
        defaults = dict(learning_starts=total_timesteps - 1, eval_frequency=0)
        defaults |= dict(threads=1, batch_size=4, cuda=False)
        flags = defaults | flags | dict(env_id=env_id, total_timesteps=total_timesteps)
        seen = SimpleNamespace(updates=[], evaluations=[], agents=[])
        with self.monkeypatch.context() as patch:
            patch.chdir(tempfile.mkdtemp(dir=self.folder))
            patch.setattr(sys, "argv", [f"{sac.__name__}.py", *words(**flags)])
            # These two take longer than the training.
            patch.setattr(Figure, "savefig", lambda *_, **__: None)
            patch.setattr(os, "fsync", lambda *_: None)
            patch.setattr(signal, "signal", lambda *_: None)  # Ctrl-C remains pytest's
            watch(patch, sac, seen)
            sac.main()
            seen.folder = only_run(Path.cwd())
        seen.final = load(seen.folder / "model.pt")["agent"]
        seen.stored = oldest_first(sac, seen.buffer)
        seen.records = sac.read_records(seen.folder)
        return seen


def watch(patch: pytest.MonkeyPatch, sac: ModuleType, seen: SimpleNamespace):
    """Note the buffer, the updates and the evaluations of a run in `seen`."""
    update, evaluate = sac.SAC.update, sac.evaluate

    class Buffer(sac.ReplayBuffer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            seen.buffer = self

    def spy_update(agent, batch, noise, *rest):
        if not seen.updates:
            seen.initial = deepcopy(agent.state_dict())
        noted = SimpleNamespace(made=len(journal.made), batch=batch, noise=noise.clone())
        seen.updates.append(noted)
        noted.losses = update(agent, batch, noise, *rest)
        return noted.losses

    def spy_evaluate(agent, *args, **kwargs):
        seen.agents.append(deepcopy(agent.state_dict()))
        returns, success = evaluate(agent, *args, **kwargs)
        seen.evaluations.append(returns)
        return returns, success

    patch.setattr(sac, "ReplayBuffer", Buffer)
    patch.setattr(sac.SAC, "update", spy_update)
    patch.setattr(sac, "evaluate", spy_evaluate)


# Tiny environments --------------------------------------------------------------------------------


class Made(NamedTuple):
    """A transition as the environment saw it: flat observations, the action within the bounds."""

    obs: np.ndarray
    action: np.ndarray
    reward: float
    terminated: bool
    truncated: bool
    next_obs: np.ndarray
    episode: tuple[int, int]  # the instance, and the number of its episode
    length: int  # of the episode, this step included

    @property
    def done(self) -> bool:
        return self.terminated or self.truncated


class Journal:
    """What the instances of Counting did."""

    def __init__(self):
        self.instances = []
        self.made = []  # transitions
        self.seeds = []  # that they were given

    def clear(self):
        self.instances.clear()
        self.made.clear()
        self.seeds.clear()


journal = Journal()

LENGTHS = (4, 1, 7, 1, 1, 3)  # of one episode after the other
# Whether episodes are (terminated, truncated), one after the other. mixed has 5 ends against 6
# lengths, so that each meets each.
ENDINGS = {
    "terminated": [(True, False)],
    "truncated": [(False, True)],
    "both": [(True, True)],
    "mixed": [(True, False), (False, True), (True, True), (False, True), (True, False)],
}
LINE = Box(-np.inf, np.inf, (3,), np.float32)
SPACES = {
    "line": LINE,
    "double": Box(-np.inf, np.inf, (3,), np.float64),
    "grid": Box(-np.inf, np.inf, (3, 1), np.float64),
    "dict": Dict(place=LINE, phase=Discrete(4)),
    "reused": LINE,  # one array, written over at every step and reset, as environments in C do
}
BOUNDS = {
    "plain": Box(np.float32([0, -np.pi / 4]), np.float32([5, np.pi / 4])),
    # low + (high - low) exceeds high.
    "rounding": Box(np.float32([-0.1, -0.7, 0.3]), np.float32([0.7, 0.1, 1e3])),
    "double": Box(np.array([-0.1, -0.7]), np.array([0.7, 0.1]), dtype=np.float64),
    "matrix": Box(np.float32([[0, 1, 2], [3, 4, 5]]), np.float32([[1, 3, 5], [7, 9, 11]])),
}


class Counting(gym.Env):
    """Observes its own number, its episode's and its step's, and writes down what it did.

    The observations are thirds, which float32 and float64 round differently.
    """

    def __init__(
        self, endings="mixed", lengths=LENGTHS, view="line", bounds="plain", render_mode=None
    ):
        self.instance = len(journal.instances)
        self.episode = -1
        self.t = 0
        journal.instances.append(self)
        self.endings = ENDINGS[endings]
        self.lengths = lengths
        self.view = view
        self.memory = np.zeros(3, np.float32)
        self.observation_space = SPACES[view]
        self.action_space = BOUNDS[bounds]

    def observe(self):
        """The observation, and the float32 vector that is to be stored of it."""
        state = np.array([self.instance, self.episode, self.t]) / 3
        self.memory[:] = state
        flat = np.float32(state)
        if self.view == "dict":
            phase = self.t % 4
            one_hot = np.eye(4, dtype=np.float32)[phase]
            return {"place": flat, "phase": phase}, np.append(flat, one_hot)
        views = {"line": flat.copy(), "double": state, "grid": state[:, None]}
        return views.get(self.view, self.memory), flat

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            journal.seeds.append(seed)
        self.episode += 1
        self.t = 0
        obs, self.flat = self.observe()
        return obs, {}

    def step(self, action):
        assert self.action_space.contains(action), f"{action!r} is not in {self.action_space}"
        before = self.flat
        turn = self.instance + self.episode
        reward = len(journal.made) + 0.5  # a number for each transition
        self.t += 1
        obs, self.flat = self.observe()
        done = self.t == self.lengths[turn % len(self.lengths)]
        ends = [done and ending for ending in self.endings[turn % len(self.endings)]]
        episode = (self.instance, self.episode)
        made = Made(before, action.copy(), reward, *ends, self.flat, episode, self.t)
        journal.made.append(made)
        return obs, reward, *ends, {}


class Toy(gym.Env):
    """Goes on for ever and pays 1 per step, until something odd happens in step `at`."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}
    steps = 0  # of all instances

    def __init__(self, width=2, action_space=None, odd=None, at=math.inf, render_mode=None):
        self.observation_space = Box(-1, 1, (width,))
        self.action_space = action_space or Box(-1, 1, (1,))
        self.odd = odd
        self.at = at
        self.render_mode = render_mode

    def reset(self, seed=None, options=None):
        return np.ones(self.observation_space.shape, np.float32), {}

    def step(self, action):
        Toy.steps += 1
        odd = self.odd if Toy.steps >= self.at else 1.0
        reward = odd() if callable(odd) else odd
        return self.reset()[0], reward, False, False, {}

    def render(self, *_, **__):
        raise RuntimeError("no screen here")


def register(name: str, entry_point=Toy, **kwargs) -> str:
    """The name of a new environment, in place of one that another test called the same."""
    env_id = f"Toy/{name}-v0"
    gym.registry.pop(env_id, None)
    gym.register(env_id, entry_point, kwargs=kwargs)
    return env_id


VARIANTS = {name: dict(endings=name) for name in ENDINGS}
VARIANTS |= {name: dict(view=name) for name in SPACES}
VARIANTS |= {f"{name}-actions": dict(bounds=name, lengths=(10**9,)) for name in BOUNDS}
VARIANTS |= {"thirty": dict(lengths=(30,))}
for _variant, _kwargs in VARIANTS.items():
    gym.register(f"Counting-{_variant}-v0", entry_point=Counting, kwargs=_kwargs)


def made_columns(sac: ModuleType, bounds: Box = BOUNDS["plain"]):
    """The Batch of arrays that replay should hold, had it endless room."""
    span = bounds.high.astype(float) - bounds.low
    made = journal.made
    assert made
    return sac.Batch(
        obs=np.array([m.obs for m in made]),
        action=np.array([(2 * (m.action - bounds.low) / span - 1).ravel() for m in made]),
        reward=np.array([m.reward for m in made]),
        terminated=np.array([float(m.terminated) for m in made]),
        next_obs=np.array([m.next_obs for m in made]),
    )
