"""How the scripts meet their user: mistakes in the flags, Ctrl-C, full disks, little memory.

Most tests run the real main() in a forked child.
"""

import dataclasses
import errno
import importlib.machinery
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import psutil
import pytest
import torch
from gymnasium.spaces import Box, MultiDiscrete
from helpers import (
    Toy,
    command,
    load,
    needs_compiler,
    only_run,
    register,
    run,
    run_forked,
    saved_args,
    tensors,
)

# A run of half a second: where a mistake goes unnoticed, its test ends soon all the same.
QUICK = "--total-timesteps 60 --learning-starts 50 --batch-size 8 --buffer-size 100 "
QUICK += "--eval-frequency 50 --eval-episodes 1 --log-frequency 20 --checkpoint-frequency 40 "
QUICK += "--threads 1 --no-cuda"

by_gymnasium = pytest.mark.without("sac_dmc")  # a mistake that only Gymnasium's names allow
once = pytest.mark.only("sac_continuous")  # it takes long, and the lines are the same in each
repeats = pytest.mark.without("sac_continuous")  # it has no --action-repeat
not_thrice = pytest.mark.without("sac_ablations")  # likewise
toys = pytest.mark.usefixtures("gymnasium_only")  # Toy, around which the loop of each script runs

UNRENDERABLE = register("Unrenderable")
UNBOUNDED = register("Unbounded", action_space=Box(-math.inf, math.inf, (1,)))
HALF_BOUNDED = register("HalfBounded", action_space=Box(-1, math.inf, (1,)))
WHOLE_NUMBERS = register("WholeNumbers", action_space=Box(-1, 1, (1,), np.int64))
CHOICES = register("Choices", action_space=MultiDiscrete([2, 3]))


def quick_env(sac) -> str:
    return "cartpole-swingup" if sac.__name__ == "sac_dmc" else "Pendulum-v1"


def small(sac) -> str:
    return f"--env-id {quick_env(sac)} {QUICK}"


def content(folder: Path) -> dict:
    """Every file below `folder`, with its bytes, and every folder."""
    paths = sorted(folder.rglob("*"))
    return {str(path): path.is_file() and path.read_bytes() for path in paths}


def refusal(folder: Path, sac, arguments: str, sabotage=None) -> str:
    """The one line that a run which must not begin ends with, its contract checked."""
    before = content(folder / "runs")
    code, _, err = run_forked(folder, sac, arguments, sabotage)
    assert code == 2, err
    assert re.fullmatch("error: .*\n", err), err
    assert content(folder / "runs") == before
    return err


@pytest.fixture(autouse=True)
def no_screen(monkeypatch):
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")  # without it SDL has its own lines for stderr


@pytest.fixture(scope="module")
def trained(sac, tmp_path_factory):
    """A folder in which a run was finished."""
    folder = tmp_path_factory.mktemp("trained")
    ended = run_forked(folder, sac, small(sac))
    assert ended.code == 0, ended.err
    return folder


@pytest.fixture
def finished(sac, trained, tmp_path):
    """The folder of a finished run, to be damaged at will."""
    folder = Path(shutil.copytree(only_run(trained), tmp_path / "runs" / "finished"))
    assert (folder / f"{sac.__name__}.py").exists()  # a run of the script under test
    return folder


@pytest.fixture
def uninstall(monkeypatch):
    """A function after which a package is not installed, for the children of this test."""

    def uninstall(package):
        find = importlib.machinery.PathFinder.find_spec

        def hide(name, *rest):
            return None if name.split(".")[0] == package else find(name, *rest)

        monkeypatch.setattr(importlib.machinery.PathFinder, "find_spec", hide)
        # Whoever imported it has to try again.
        importers = re.compile(rf"{package}|shimmy|gymnasium\.envs\.(muj|box)")
        for name in [name for name in sys.modules if importers.match(name)]:
            monkeypatch.delitem(sys.modules, name)
        for name in [name for name in gym.registry if name.startswith("dm_control/")]:
            monkeypatch.delitem(gym.registry, name)

    return uninstall


# Mistakes in the flags ----------------------------------------------------------------------------


@by_gymnasium
def test_an_environment_of_the_user_is_not_taken_for_an_old_one_of_mujoco(sac):
    missing = ImportError('MuJoCo is not installed, run `pip install "gymnasium[mujoco]"`')
    assert sac.remedy(sac.Args(env_id="my_env:Robot-v0"), missing) == ""
    assert "Robot-v4 or Robot-v5" in sac.remedy(sac.Args(env_id="Robot-v0"), missing)


@by_gymnasium
@pytest.mark.parametrize(
    "env_id, answer",
    [
        ("Hoper-v4", "Hopper"),  # the suggestion is Gymnasium's
        ("Hopper-v9", "v5"),
        ("Hopper-v3", "Use Hopper-v4 or Hopper-v5"),
        ("Hopper/v4/", "Malformed"),
        ("no_such_module:Hopper-v4", "No module named 'no_such_module'"),
        ("some-thing", "If it is a task of the DeepMind Control Suite: "),
        ("shimmy:dm_control/cartpole-balanced-v0", "cartpole-balance"),
        ("walker-walk", "shimmy:dm_control/walker-walk-v0, or sac_dmc.py --env-id walker-walk"),
        ("CartPole-v1", "continuous"),
        ("CartPole-v1", "for discrete ones take DQN or PPO"),
        (UNBOUNDED, "bound"),
        (HALF_BOUNDED, "bound"),
        (WHOLE_NUMBERS, "continuous"),
        (CHOICES, "continuous"),
    ],
)
def test_environments_that_cannot_be_learned(sac, tmp_path, env_id, answer):
    line = refusal(tmp_path, sac, f"{small(sac)} --env-id {env_id}")
    assert f"--env-id {env_id}" in line
    assert answer in line
    assert "pip install" not in line  # nothing is missing


@by_gymnasium
def test_the_widest_finite_bounds_get_one_line(sac):
    """Their difference overflows, of which NumPy warns."""
    widest = np.finfo(np.float32).max
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not sac.is_bounded_float_box(Box(-widest, widest, (1,)))


def test_a_video_of_no_evaluation_is_refused(sac, tmp_path):
    line = refusal(tmp_path, sac, f"{small(sac)} --capture-video --eval-frequency 0")
    assert "--capture-video records evaluations" in line
    assert "--eval-frequency 0" in line


@repeats
def test_learning_starts_within_the_first_action_is_refused(sac, tmp_path):
    line = refusal(tmp_path, sac, f"{small(sac)} --learning-starts 4 --action-repeat 8")
    assert "--learning-starts 4 must be at least 8, one action in each of --num-envs 1" in line


def test_mistakes_in_two_flags(sac, tmp_path):
    assert "--env-id" in refusal(tmp_path, sac, f"{small(sac)} --env-id Hoper-v4 --capture-video")


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
def test_missing_packages(sac, tmp_path, monkeypatch, uninstall, package, flags):
    if sac.__name__ == "sac_dmc":
        # OpenGL does not survive a fork.
        picture = np.zeros((480, 640, 3), np.uint8)
        monkeypatch.setattr("dm_control.mujoco.Physics.render", lambda *_, **__: picture)
    uninstall(package)
    line = refusal(tmp_path, sac, f"{small(sac)} {flags}")
    assert re.search(f"(?i){package}.*pip install", line)
    # What the suite itself needs, sac_dmc.py needs whatever the flags.
    always_needed = sac.__name__ == "sac_dmc" and package in ("shimmy", "dm_control")
    assert flags.split()[0] in line or always_needed


IMPOSSIBLE = {
    "--total-timesteps": "0 -1 2000000000000",
    "--num-envs": "0 -1 101 10001",  # 101: of a buffer for 100
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
    "--threads": "0 -1 257",
    "--seed": "-1 99999999999999999999",  # beyond 64 bits
}
NUMBERS = [(flag, value) for flag in IMPOSSIBLE for value in IMPOSSIBLE[flag].split()]


@pytest.mark.parametrize("flag, value", NUMBERS)
def test_impossible_numbers(sac, tmp_path, flag, value):
    line = refusal(tmp_path, sac, f"{small(sac)} {flag} {value}")
    assert flag in line
    assert value in line


@pytest.mark.parametrize(
    "flags",
    [
        "--num-envs 40 --buffer-size 30",
        "--batch-size 31 --buffer-size 30",
    ],
)
def test_numbers_that_must_not_exceed_each_other(sac, tmp_path, flags):
    one, value, other, limit = flags.split()
    line = refusal(tmp_path, sac, f"{small(sac)} {flags}")
    assert f"{one} {value} must not exceed {other} ({limit})" in line


@pytest.mark.parametrize(
    "flags", ["--batch-size abc", "--num-envs nan", "--seed 1.5", "--gamma x", "--width 3"]
)
def test_flags_that_cannot_be_read(sac, tmp_path, flags):
    code, _, err = run_forked(tmp_path, sac, f"{small(sac)} {flags}")
    assert code == 2
    assert flags.split()[0] in err
    assert "Traceback" not in err
    assert not (tmp_path / "runs").exists()


def test_learning_cannot_start_before_the_first_round_is_stored(sac, tmp_path):
    """An update would find an empty buffer."""
    line = refusal(tmp_path, sac, f"{small(sac)} --num-envs 5 --learning-starts 4")
    assert "--learning-starts 4 must be at least 5" in line
    if sac.__name__ != "sac_continuous":
        repeated = "--num-envs 3 --action-repeat 2 --learning-starts 5"
        assert "must be at least 6" in refusal(tmp_path, sac, f"{small(sac)} {repeated}")


def test_numbers_at_the_limit_work(sac, tmp_path):
    flags = "--gamma 1 --tau 1 --learning-starts 8 --eval-frequency 0 --buffer-size 8 "
    flags += "--num-envs 8 --seed 0"
    code, _, err = run_forked(tmp_path, sac, f"{small(sac)} {flags}")
    assert code == 0, err


def parsed(monkeypatch, sac, flags: str):
    monkeypatch.setattr(sys, "argv", [f"{sac.__name__}.py", *flags.split()])
    return sac.parse_args()[0]


@pytest.mark.parametrize(
    "flags, key, value",
    [
        ("--total-timesteps 1e6", "total_timesteps", 1_000_000),
        ("--buffer-size 2.5e5", "buffer_size", 250_000),
        ("--learning-starts 1e0", "learning_starts", 1),
        ("--num-envs 16", "num_envs", 16),
        ("--gamma 1e-1", "gamma", 0.1),
        ("--policy-lr 1e-3", "policy_lr", 0.001),
        ("--exp-name 1e6", "exp_name", "1e6"),
    ],
)
def test_counts_may_be_powers_of_ten(sac, monkeypatch, flags, key, value):
    args = parsed(monkeypatch, sac, flags)
    assert getattr(args, key) == value
    assert type(getattr(args, key)) is type(value)


@pytest.mark.parametrize("available", [1000, 10**10])
def test_buffers_larger_than_memory(sac, tmp_path, monkeypatch, available):
    memory = SimpleNamespace(available=available)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    flags = "--buffer-size 1e12 --total-timesteps 1e12"
    line = refusal(tmp_path, sac, f"{small(sac)} {flags}")
    assert "--buffer-size" in line
    assert "GB" in line


def test_the_part_of_a_buffer_that_the_run_cannot_fill_takes_no_memory(sac, tmp_path, monkeypatch):
    memory = SimpleNamespace(available=10**9)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    code, _, err = run_forked(tmp_path, sac, f"{small(sac)} --buffer-size 1e12")
    assert code == 0, err


def test_batches_larger_than_memory(sac, tmp_path, monkeypatch):
    memory = SimpleNamespace(available=10**9)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    flags = "--batch-size 1e6 --buffer-size 1e6"
    assert "--batch-size" in refusal(tmp_path, sac, f"{small(sac)} {flags}")


# Cheap checks come first: each of these mistakes is told before all that stand below it.
MISTAKES = {
    "--gamma": "--gamma 2",
    "--resume": "--resume runs/finished",
    "--env-id": "--capture-video",
    "--buffer-size": "",  # more than the memory that is free
    "--wandb-project-name": "--track --wandb-project-name a/b",
}


@pytest.mark.parametrize(
    "limit, fits", [("4000000\n", False), ("5000000000\n", True), ("max\n", True), (None, True)]
)
def test_a_container_has_no_more_memory_than_its_limit(sac, tmp_path, monkeypatch, limit, fits):
    if limit:
        (tmp_path / "memory.max").write_text(limit)
    monkeypatch.setattr(sac, "GROUPS", tmp_path)
    memory = SimpleNamespace(available=10**9)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    assert sac.free_memory(torch.device("cpu")) == (10**9 if fits else 4_000_000)


@pytest.mark.parametrize(
    "limits, free",
    [
        ({"job/step": "4000\n", "job": "max\n", ".": "9000\n"}, 4000),
        ({"job/step": "max\n", "job": "4000\n", ".": "9000\n"}, 4000),
        ({"job/step": "5000\n", "job": "9000\n", ".": "4000\n"}, 4000),
        ({"job/other": "4000\n", "job/step": "max\n"}, 10**9),  # of other processes
    ],
)
def test_a_batch_job_has_no_more_memory_than_its_groups(sac, tmp_path, monkeypatch, limits, free):
    for group, limit in limits.items():
        (tmp_path / group).mkdir(parents=True, exist_ok=True)
        (tmp_path / group / "memory.max").write_text(limit)
    (tmp_path / "ours").write_text("0::/job/step\n")
    monkeypatch.setattr(sac, "GROUPS", tmp_path)
    monkeypatch.setattr(sac, "OUR_GROUP", tmp_path / "ours")
    memory = SimpleNamespace(available=10**9)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    assert sac.free_memory(torch.device("cpu")) == free
    monkeypatch.setattr(sac, "OUR_GROUP", tmp_path / "none")  # as where it is no Linux
    assert sac.free_memory(torch.device("cpu")) == 10**9


def test_tracking_an_evaluation_is_refused(sac, tmp_path, finished):
    line = refusal(tmp_path, sac, "--evaluate runs/finished --track")
    assert "--track logs training, and --evaluate trains nothing: leave it out" in line


def test_an_evaluation_takes_no_memory_for_updates(sac, monkeypatch, capsys):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=10**9))
    args = sac.Args(env_id=small(sac).split()[1], batch_size=10**6, buffer_size=10**6)
    env = sac.make_env(args)
    with pytest.raises(SystemExit):
        sac.check_memory(args, env, torch.device("cpu"))
    assert "--batch-size takes" in capsys.readouterr().err
    args.evaluate = Path("runs/finished")
    sac.check_memory(args, env, torch.device("cpu"))


@by_gymnasium
@pytest.mark.parametrize("first", range(len(MISTAKES)))
def test_checks_come_in_the_order_cheap_to_dear(sac, finished, tmp_path, monkeypatch, first):
    """All mistakes from the first on are made at once; the first is the one that is told."""
    monkeypatch.setattr(gym.Env, "render", Toy.render)
    monkeypatch.setattr("gymnasium.envs.classic_control.PendulumEnv.render", Toy.render)
    if first <= 3:
        memory = SimpleNamespace(available=1000)
        monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    (finished / "checkpoint.pt").write_bytes(b"damaged")
    flags = dict(list(MISTAKES.items())[first:])
    given = " ".join(flags.values())
    if "--resume" not in flags:
        given = f"{small(sac)} {given}"
    line = refusal(tmp_path, sac, given)
    assert line.startswith(f"error: {list(flags)[0]} "), line


@pytest.mark.parametrize("dear", ["make_env", "check_wandb", "choose_compilation", "open_folder"])
def test_a_wrong_number_is_told_before_anything_is_made(sac, tmp_path, dear):
    def sabotage(script):
        setattr(script, dear, lambda *_, **__: os._exit(3))

    assert "--gamma" in refusal(tmp_path, sac, f"{small(sac)} --gamma 2 --track", sabotage)


def test_nothing_is_compiled_for_a_run_that_cannot_be_tracked(sac, tmp_path):
    def sabotage(script):
        script.choose_compilation = lambda *_: os._exit(3)

    flags = f"{small(sac)} --track --wandb-project-name a/b"
    assert "--wandb-project-name" in refusal(tmp_path, sac, flags, sabotage)


def test_an_unknown_mode_of_wandb(sac, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "sometimes")
    line = refusal(tmp_path, sac, f"{small(sac)} --track")
    assert "WANDB_MODE=sometimes" in line
    assert "--track" in line


@pytest.mark.slow
@once
@pytest.mark.parametrize("name, value", [("CXX", "/no/such/compiler"), ("PATH", "/no/such/folder")])
def test_without_a_compiler_the_update_runs_uncompiled(sac, tmp_path, name, value):
    # An empty cache, else what another test compiled would do.
    environment = {"CXX": None, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), name: value}
    flags = f"{small(sac)} --eval-frequency 0 --compile on"
    code, out, err = run(tmp_path, sac, flags, **environment)
    assert code == 0, err
    said = [line for line in out.splitlines() if "no working C++ compiler" in line]
    assert len(said) == 1
    assert saved_args(only_run(tmp_path))["compile"] == "off"


@once
@pytest.mark.slow
@needs_compiler
def test_compiled_code_is_there_after_a_compilation(sac, tmp_path):
    """The compilation by which a run sees whether there is a compiler: the first of its own."""
    program = tmp_path / "program.py"
    choose = "choose_compilation(Args(compile='on'), torch.device('cpu'))"
    program.write_text(f"import torch\nfrom sac_continuous import *\n{choose}\n")
    folders = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "TMPDIR": str(tmp_path / "tmp")}
    folders |= {"PYTHONPATH": str(Path(sac.__file__).parent)}
    (tmp_path / "tmp").mkdir()
    code, out, err = run(tmp_path, program, "", TORCHINDUCTOR_CACHE_DIR=None, **folders)
    assert code == 0 and "no working" not in out, err
    kept = list((tmp_path / "cache" / "one-file-sac").rglob("*.so"))
    assert kept


def test_video_of_what_cannot_be_rendered(sac, tmp_path, monkeypatch):
    flags = f"{small(sac)} --capture-video"
    if sac.__name__ == "sac_dmc":
        monkeypatch.setattr("dm_control.mujoco.Physics.render", Toy.render)
    else:
        flags += f" --env-id {UNRENDERABLE}"
    line = refusal(tmp_path, sac, flags)
    assert "--capture-video" in line
    assert "no screen here" in line


# Damaged runs -------------------------------------------------------------------------------------


def cut(path: Path, share: float):
    os.truncate(path, int(share * path.stat().st_size))


def leave_arguments_alone(folder: Path):
    for path in folder.iterdir():
        if path.is_file() and path.name != "args.json":
            path.unlink()


def flip_a_bit(path: Path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def change_args(folder: Path, **changed):
    (folder / "args.json").write_text(json.dumps(saved_args(folder) | changed))


DAMAGES = {
    "whole folder missing": shutil.rmtree,
    "arguments alone": leave_arguments_alone,
    "no arguments": lambda folder: (folder / "args.json").unlink(),
    "arguments empty": lambda folder: cut(folder / "args.json", 0),
    "arguments cut": lambda folder: cut(folder / "args.json", 0.5),
    "arguments of something else": lambda folder: (folder / "args.json").write_text('{"wid": 3}'),
    "arguments not a table": lambda folder: (folder / "args.json").write_text("[1, 2]"),
    "an argument of another kind": lambda folder: change_args(folder, gamma="much"),
    "an argument too many": lambda folder: change_args(folder, width=3),
    "checkpoint empty": lambda folder: cut(folder / "checkpoint.pt", 0),
    "checkpoint cut": lambda folder: cut(folder / "checkpoint.pt", 0.5),
    "checkpoint cut near its end": lambda folder: cut(folder / "checkpoint.pt", 0.999),
    "checkpoint with another bit": lambda folder: flip_a_bit(folder / "checkpoint.pt"),
    "checkpoint a text": lambda folder: (folder / "checkpoint.pt").write_text("hello"),
    "checkpoint of a list": lambda folder: torch.save([1], folder / "checkpoint.pt"),
}


@pytest.mark.parametrize("flag", ["--resume", "--evaluate"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_runs(sac, tmp_path, finished, damage, flag):
    DAMAGES[damage](finished)
    assert f"{flag} runs/finished: " in refusal(tmp_path, sac, f"{flag} runs/finished")


def without_a_weight(state: dict):
    del state["agent"]["log_alpha"]


def with_another_weight(state: dict):
    state["agent"]["log_beta"] = state["agent"]["log_alpha"]


def with_a_wider_weight(state: dict):
    state["agent"]["log_alpha"] = torch.zeros(2)


def with_fewer_rows(state: dict):
    state["rows"] = state["rows"][:-1]


def with_narrower_rows(state: dict):
    state["rows"] = state["rows"][:, :-1].contiguous()


def with_noise_for_a_random_state(state: dict):
    state["random"] = torch.full_like(state["random"], 7)


def without(key):
    return lambda state: state.pop(key)


CONTENTS = {f"no {key}": (without(key), key) for key in ("agent", "step", "rows", "count")}
CONTENTS |= {f"no {key}": (without(key), key) for key in ("random", "versions")}
CONTENTS |= {
    "a weight less": (without_a_weight, "log_alpha"),
    "a weight more": (with_another_weight, "log_beta"),
    "a weight of another shape": (with_a_wider_weight, "log_alpha"),
    "a row less": (with_fewer_rows, "rows"),
    "a column less": (with_narrower_rows, "rows"),
    "no random state": (with_noise_for_a_random_state, "random"),
    "a step that cannot be": (lambda state: state.update(step=-1), "step"),
}


@pytest.mark.parametrize("fault", CONTENTS)
def test_checkpoints_that_are_not_of_this_run(sac, tmp_path, finished, fault):
    change, name = CONTENTS[fault]
    state = load(finished / "checkpoint.pt")
    change(state)
    torch.save(state, finished / "checkpoint.pt")
    line = refusal(tmp_path, sac, "--resume runs/finished")
    assert "--resume runs/finished: " in line
    assert name in line


def test_a_run_without_its_checkpoint_cannot_be_resumed(sac, tmp_path, finished):
    (finished / "checkpoint.pt").unlink()
    assert "checkpoint.pt" in refusal(tmp_path, sac, "--resume runs/finished")


@pytest.mark.parametrize("flag", ["--resume", "--evaluate"])
def test_runs_of_another_environment(sac, tmp_path, finished, flag):
    another = "cartpole-balance" if sac.__name__ == "sac_dmc" else "MountainCarContinuous-v0"
    line = refusal(tmp_path, sac, f"{flag} runs/finished --env-id {another}")
    assert "--env-id" in line
    assert quick_env(sac) in line


def test_flags_that_a_resumed_run_must_keep(sac, tmp_path, finished):
    saved = saved_args(finished)
    assert {*sac.FIXED_FLAGS} >= {"env_id", "buffer_size"}
    if sac.__name__ == "sac_ablations":  # what acts at the start of a new run alone
        assert {*sac.FIXED_FLAGS} >= {"preset", "init", "heads", "alpha"}
        # What the stored transitions contain.
        assert {*sac.FIXED_FLAGS} >= {"n_step", "reward_scale", "truncation_terminates"}
        assert {*sac.FIXED_FLAGS} >= {"hindsight", "hindsight_strategy"}
        # What the networks compute from their weights.
        assert {*sac.FIXED_FLAGS} >= {"activation", "layer_norm", "log_std"}
        assert {*sac.FIXED_FLAGS} >= {"log_std_min", "log_std_max"}
        assert {*sac.FIXED_FLAGS} >= {"stack", "hidden", "layers"}
    if sac.__name__ != "sac_continuous":
        assert "action_repeat" in sac.FIXED_FLAGS
    others = dict(preset="haarnoja", init="torch", heads="separate", activation="Tanh")
    others |= dict(log_std="tanh", hindsight_strategy="final")
    for key in {*sac.FIXED_FLAGS} - {"env_id"}:
        flag = f"--{key.replace('_', '-')}"
        changed = f"{flag} {saved[key]}1"
        if isinstance(saved[key], bool):
            changed = f"--no-{flag[2:]}" if saved[key] else flag
        elif isinstance(saved[key], str):
            changed = f"{flag} {others[key]}"
        line = refusal(tmp_path, sac, f"--resume runs/finished {changed}")
        assert f"{flag} cannot change in a run: it was {saved[key]}" in line


def test_resume_and_evaluate_at_once(sac, tmp_path, finished):
    line = refusal(tmp_path, sac, "--resume runs/finished --evaluate runs/finished")
    assert "--resume" in line
    assert "--evaluate" in line


@pytest.mark.slow
@once
def test_track_without_login(sac, tmp_path):
    # A fresh interpreter: wandb reads its settings once, and what it leaves behind would fail to
    # end with a fork.
    environment = {name: None for name in os.environ if name.startswith("WANDB_")}
    environment |= dict(HOME=str(tmp_path), NETRC=str(tmp_path / "netrc"))
    environment |= dict(WANDB_CONFIG_DIR=str(tmp_path))
    code, _, err = run(tmp_path, sac, f"{small(sac)} --track", **environment)
    assert code == 2
    assert re.fullmatch("error: .*--track.*wandb login.*\n", err), err
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
@not_thrice
def test_a_mistake_in_a_fresh_interpreter(sac, tmp_path):
    # Gymnasium warns of Hopper-v3's age before it refuses it; a fresh interpreter would show that.
    # dm_control would warn where it finds no screen.
    code, _, err = run(tmp_path, sac, "--env-id Hopper-v3")
    assert code == 2
    assert re.fullmatch("error: .*\n", err), err
    assert not (tmp_path / "runs").exists()


# What the program says of itself ------------------------------------------------------------------


def test_help_has_text_for_every_flag(sac, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    code, out, _ = run_forked(tmp_path, sac, "--help")
    assert code == 0
    chunks = re.split(r"^\W*(?=--\w)", out.replace("│", " "), flags=re.MULTILINE)
    texts = {re.match(r"--[\w-]+", chunk)[0]: chunk for chunk in chunks[1:]}
    fields = dataclasses.fields(sac.Args)
    assert set(texts) == {"--" + field.name.replace("_", "-") for field in fields}
    for flag, text in texts.items():
        described, _ = re.sub(r"--[\w-]+", "", text).split("(default:")
        assert len(re.findall(r"\b[A-Za-z][a-z]+\b", described)) >= 2, f"{flag}: {text}"


@toys
@pytest.mark.parametrize(
    "repeat, megabytes", [("", "280.0"), pytest.param("--action-repeat 4", "70.0", marks=repeats)]
)
def test_the_plan_stands_in_one_line_at_the_start(sac, tmp_path, repeat, megabytes):
    env_id = register("Exits", odd=lambda: sys.exit(0), at=1)
    flags = f"--env-id {env_id} --total-timesteps 1e7 --buffer-size 1e7 --compile off {repeat}"
    code, out, err = run_forked(tmp_path, sac, f"{small(sac)} --learning-starts 1000 {flags}")
    assert code == 0, err
    plan, _ = out.splitlines()
    assert env_id in plan
    # 2 observations before and 2 after, 1 action, reward and end are 7 numbers of 4 bytes, ten
    # million times, or for every fourth step.
    assert re.findall(r"([\d.]+) MB", plan) == [megabytes]


@pytest.mark.only("sac_ablations")
@pytest.mark.parametrize("layers, fits", [(1, True), (2, False)])
def test_only_matrices_that_there_are_take_memory(sac, monkeypatch, capsys, layers, fits):
    """Two hidden layers of 30,000 units have a matrix of that size squared, one has none."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=10**9))
    args = sac.Args(env_id="Pendulum-v1", hidden=30_000, layers=layers, batch_size=8)
    args.buffer_size = 1000
    env = sac.make_env(args)
    if fits:
        sac.check_memory(args, env, torch.device("cpu"))
    else:
        with pytest.raises(SystemExit):
            sac.check_memory(args, env, torch.device("cpu"))
        assert "--hidden takes 54.0 GB" in capsys.readouterr().err


# Ends that are nobody's mistake -------------------------------------------------------------------


def interrupted(folder: Path, script: Path, flags: str, moment: str) -> tuple[int, str]:
    """Exit code and output of a run that gets Ctrl-C once it has said `moment`."""
    log = folder / "log.txt"
    with open(log, "w") as file:
        process = subprocess.Popen(command(script, flags), cwd=folder, stdout=file, stderr=file)
        while moment not in log.read_text() and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        code = process.wait(timeout=60)
    return code, log.read_text()


@pytest.mark.slow
@once
def test_interrupted_runs_say_how_to_go_on(sac, tmp_path):
    """Ctrl-C after the first checkpoint: the command printed, as it stands, finishes the run."""
    script = tmp_path / "my project" / f"{sac.__name__}.py"  # a space in it, as users have them
    script.parent.mkdir()
    shutil.copy(sac.__file__, script)
    flags = f"{small(sac)} --total-timesteps 800 --checkpoint-frequency 100 --log-frequency 50 "
    flags += "--eval-frequency 0"
    code, said = interrupted(tmp_path, script, flags, "step 150")
    folder = only_run(tmp_path)
    assert code == 1
    assert "Traceback" not in said, said
    assert not (folder / "model.pt").exists()
    assert load(folder / "checkpoint.pt")["step"] >= 100
    (line,) = re.findall(r"python .*--resume .*", said)
    assert folder.name in line

    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    kwargs = dict(cwd=tmp_path, env=os.environ | {"PATH": path}, capture_output=True, timeout=120)
    ended = subprocess.run(line, shell=True, **kwargs)
    assert ended.returncode == 0, ended.stderr
    assert only_run(tmp_path) == folder
    assert load(folder / "checkpoint.pt")["step"] == 800
    assert (folder / "model.pt").exists()
    assert (folder / "learning_curve.png").exists()


@pytest.mark.slow
def test_runs_go_on_with_their_own_copy_of_the_script(sac, tmp_path, finished):
    copied = finished / f"{sac.__name__}.py"
    code, _, err = run(tmp_path, copied, "--resume runs/finished --total-timesteps 80")
    assert code == 0, err
    assert load(finished / "checkpoint.pt")["step"] == 80


@pytest.mark.slow
@toys
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30])  # 1e30 squared overflows
def test_numbers_that_are_not_finite_stop_the_run(sac, tmp_path, value):
    env_id = register(f"Pays{value}".replace("+", ""), odd=value, at=130)
    flags = f"--env-id {env_id} --total-timesteps 1000 --buffer-size 1000 --batch-size 64 "
    flags += "--eval-frequency 0 --checkpoint-frequency 100 --log-frequency 50"
    code, _, err = run_forked(tmp_path, sac, f"{small(sac)} {flags}")
    assert code == 1
    # At the next log, or before an action that is no number.
    said, step = re.fullmatch(r"error: (.+) is not finite at step (\d+); .*\n", err).groups()
    assert 130 < int(step) <= 150
    # The environment is to blame, if what it returned is no number itself.
    assert said == sac.IN_REPLAY or (math.isfinite(value) and said.startswith("losses/"))
    state = load(only_run(tmp_path) / "checkpoint.pt")
    assert state["step"] == 100
    assert len(tensors(state)) > 10
    assert all(tensor.isfinite().all() for tensor in tensors(state))


@pytest.mark.slow
@toys
def test_weights_that_are_not_finite_reach_no_checkpoint(sac, tmp_path):
    """The losses of the last update do not know of what it did to a weight."""

    def sabotage(script):
        update = script.SAC.update

        def spoil(agent, *args):
            losses = update(agent, *args)
            if agent.critic_optimizer.steps == 10:
                with torch.no_grad():
                    next(agent.target_critics.parameters())[0, 0, 0] = math.nan
            return losses

        script.SAC.update = spoil

    env_id = register("Plain")
    flags = f"{small(sac)} --env-id {env_id} --total-timesteps 80 --checkpoint-frequency 20"
    flags += " --log-frequency 1000"  # a checkpoint looks at the agent by itself
    flags += " --eval-frequency 0"  # the episodes never end
    code, _, err = run_forked(tmp_path, sac, flags, sabotage)
    assert code == 1
    assert re.fullmatch("error: target_critics.* is not finite at step 60.*\n", err), err
    state = load(only_run(tmp_path) / "checkpoint.pt")
    assert state["step"] == 40
    assert not (only_run(tmp_path) / "model.pt").exists()


class Strict(Toy):
    """Fails at an action that is no number, as MuJoCo's and Box2D's tasks do."""

    def step(self, action):
        assert np.isfinite(action).all(), "a number, please"
        return super().step(action)


@toys
def test_an_action_that_is_no_number_reaches_no_environment(sac, tmp_path):
    def sabotage(script):
        update = script.SAC.update

        def spoil(agent, *args):
            losses = update(agent, *args)
            if agent.critic_optimizer.steps == 4:
                with torch.no_grad():
                    agent.actor.layers[0].bias[0] = math.nan
            return losses

        script.SAC.update = spoil

    flags = f"{small(sac)} --env-id {register('Strict', Strict)} --log-frequency 1000"
    flags += " --eval-frequency 0 --checkpoint-frequency 1000"
    code, _, err = run_forked(tmp_path, sac, flags, sabotage)
    assert code == 1
    assert re.fullmatch("error: actor.* is not finite at step 54; .*stays in runs.*\n", err), err


@toys
def test_checkpoints_from_before_learning_are_finite_too(sac, tmp_path):
    """What is not finite lies in the replay, and no loss knows of it, when a checkpoint is due."""
    env_id = register("PaysEarly", odd=math.nan, at=30)
    code, _, err = run_forked(tmp_path, sac, f"{small(sac)} --env-id {env_id}")
    assert code == 1
    assert re.fullmatch(f"error: {sac.IN_REPLAY} is not finite .*\n", err), err
    state = load(only_run(tmp_path) / "checkpoint.pt")
    assert len(tensors(state)) > 10
    assert all(tensor.isfinite().all() for tensor in tensors(state))


def no_space(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def limit_file_size(file):
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
    return file


def fail_to_flush(file):
    os.fsync = no_space
    return file


def fail_to_rename(file):
    os.replace = no_space
    return file


class Pressing:
    """A file that has Ctrl-C pressed while torch.save, in C++, is writing it."""

    def __init__(self, file):
        self.file = file
        self.flush = file.flush
        self.fileno = file.fileno

    def write(self, data):
        if len(data) > 1000:  # the numbers themselves
            signal.raise_signal(signal.SIGINT)
        return self.file.write(data)


def not_written(number: int) -> str:
    kept = "was not written, the one before it stays"
    return f"error: .*checkpoint.pt {kept}: .*{os.strerror(number)}.*"


# What the script says of each, and what makes it, of the file that is to be written.
TROUBLES = {
    # The system's own error, in the midst of the file.
    "a full disk while writing": (not_written(errno.EFBIG), limit_file_size),
    "a full disk while flushing": (not_written(errno.ENOSPC), fail_to_flush),
    "a full disk while renaming": (not_written(errno.ENOSPC), fail_to_rename),
    "Ctrl-C while writing": ("\nstopped. Last checkpoint: step 0. Continue .*\n.*", Pressing),
}


@pytest.mark.parametrize("trouble", TROUBLES)
def test_trouble_in_saving_leaves_the_previous_checkpoint(sac, tmp_path, trouble):
    says, make = TROUBLES[trouble]

    def sabotage(script):
        write = torch.save
        saves = []

        def save(state, file, *rest, **options):
            saves.append(state["step"])
            if saves == [0, 40]:
                shutil.copy(only_run(tmp_path) / "checkpoint.pt", tmp_path / "before.pt")
                file = make(file)
            write(state, file, *rest, **options)

        torch.save = save

    code, _, err = run_forked(tmp_path, sac, small(sac), sabotage)
    folder = only_run(tmp_path)
    assert code == 1
    assert re.search(f"^{says}$", err, re.M), err
    assert "Traceback" not in err
    assert (folder / "checkpoint.pt").read_bytes() == (tmp_path / "before.pt").read_bytes()
    assert load(folder / "checkpoint.pt")["step"] == 0
    assert not list(folder.rglob("*.tmp*"))


class Wide(Toy):
    """Each transition takes 32 kB of replay. Measures what a checkpoint adds to the memory used."""

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


@pytest.mark.slow
@once
@toys
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the peak is in other units")
def test_checkpoints_take_little_memory(sac, tmp_path):
    """A buffer filled to a quarter is saved without a copy of it, and without the empty rest."""
    env_id = register("Wide", Wide, width=4000)
    flags = f"--env-id {env_id} --total-timesteps 40000 --buffer-size 40000 "
    flags += "--learning-starts 39999 --eval-frequency 0 --checkpoint-frequency 10000 "
    flags += "--log-frequency 10000"
    code, _, err = run_forked(tmp_path, sac, f"{small(sac)} {flags}")
    assert code == 0, err
    path = only_run(tmp_path) / "checkpoint.pt"
    state = load(path)
    rows = 10_000 * (4000 + 1 + 1 + 1 + 4000) * 4
    agent = sum(tensor.nbytes for tensor in tensors(state["agent"]))
    assert state["step"] == 10_000
    assert json.loads((tmp_path / "memory.json").read_text())["rise"] <= 0.2 * rows
    assert rows < path.stat().st_size <= rows + agent + 2e6
