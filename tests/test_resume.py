"""A run that was killed and continued ends with the same bits as one that never stopped.

Runs happen in forked children, so that a real SIGKILL can hit them at a chosen moment: at an environment step, half-way
through the writing of a checkpoint, or just before its renaming.
"""

import importlib
import multiprocessing
import os
import shutil
import signal
import sys

import mujoco
import numpy as np
import pytest
import torch

import sac_continuous as sac

FLAGS = "--total-timesteps 300 --learning-starts 120 --batch-size 16 --checkpoint-frequency 60 --log-frequency 20 "
FLAGS += "--eval-frequency 100 --eval-episodes 2 --threads 1"


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def die_at_step(n, script):
    """Replaces ReplayBuffer.add by one that kills the process when it is called for the n-th time in it."""
    add, calls = script.ReplayBuffer.add, iter(range(n - 1))

    def sabotaged(*args):
        next(calls, None) is None and die()
        add(*args)

    script.ReplayBuffer.add = sabotaged


def die_while_writing(n, script):
    """The n-th checkpoint is written in part to its temporary file, then the process dies."""
    write, calls = torch.save, iter(range(n - 1))

    def sabotaged(state, file):
        if next(calls, None) is None:
            file.write(b"half a checkpoint")
            file.flush()
            die()
        write(state, file)

    torch.save = sabotaged


def die_before_renaming(n, script):
    """The n-th checkpoint is whole on the disk but not yet in its place when the process dies."""
    replace, calls = os.replace, iter(range(n - 1))

    def sabotaged(*args):
        next(calls, None) is None and die()
        replace(*args)

    os.replace = sabotaged


def child(folder, arguments, sabotage, name):
    script = importlib.import_module(name)
    os.chdir(folder)
    sys.argv = [f"{name}.py", *arguments.split()]
    sys.stdout = sys.stderr = open("log.txt", "a", buffering=1)
    if sabotage:
        how, n = sabotage
        how(n, script)
    script.main()


def run(folder, arguments, sabotage=None, script="sac_continuous"):
    """Exit code of one process that ran the script in `folder`; -9 where it was killed."""
    process = multiprocessing.get_context("fork").Process(target=child, args=(folder, arguments, sabotage, script))
    process.start()
    process.join()
    return process.exitcode


def result(folder):
    """The end of a run: its checkpoint, and its TensorBoard curves but for the speed."""
    (run_folder,) = folder.glob("runs/*")
    checkpoint = torch.load(run_folder / "checkpoint.pt", weights_only=True)
    records = sac.read_records(run_folder)
    del records["charts/SPS"]
    return checkpoint, records


def assert_same(a, b):
    (checkpoint_a, records_a), (checkpoint_b, records_b) = a, b
    assert checkpoint_a["step"] == checkpoint_b["step"] > 0
    assert checkpoint_a["agent"].keys() == checkpoint_b["agent"].keys()
    for name, tensor in checkpoint_a["agent"].items():  # weights, targets, log alpha, three optimizers
        assert torch.equal(tensor, checkpoint_b["agent"][name]), name
    assert torch.equal(checkpoint_a["rows"], checkpoint_b["rows"])
    assert torch.equal(checkpoint_a["random"], checkpoint_b["random"])
    np.testing.assert_equal(checkpoint_a["best"], checkpoint_b["best"])
    assert records_a.keys() == records_b.keys()
    for key in records_a:
        np.testing.assert_array_equal(records_a[key], records_b[key], err_msg=key)


def run_through(folder, env, extra="", script="sac_continuous"):
    folder.mkdir()
    assert run(folder, f"--env-id {env} {FLAGS} {extra}", script=script) == 0, (folder / "log.txt").read_text()
    return result(folder)


CASES = [("sac_continuous", env, n, "") for env in ("Pendulum-v1", "Hopper-v4", "BipedalWalker-v3") for n in (1, 4)]
CASES += [("sac_continuous", "Hopper-v4", 2, "--compile on")]
CASES += [("sac_dmc", "lqr-lqr_2_1", 1, ""), ("sac_dmc", "cartpole-swingup", 2, "--action-repeat 2")]


@pytest.mark.parametrize("script, env, num_envs, extra", CASES)
def test_killed_and_resumed_is_never_killed(tmp_path, script, env, num_envs, extra):
    if env == "BipedalWalker-v3":
        pytest.importorskip("Box2D")
    if script == "sac_dmc":
        pytest.importorskip("dm_control")
    if "--compile on" in extra and not shutil.which(os.environ.get("CXX", "g++")):
        pytest.skip("no C++ compiler")
    whole = run_through(tmp_path / "whole", env, f"--num-envs {num_envs} {extra}", script)
    if env == "Hopper-v4":  # the others' episodes are longer than the time between checkpoints
        assert whole[1]["charts/episodic_return"].size > 0
    assert whole[1]["losses/qf_loss"].size > 0 and whole[1]["eval/episodic_return"].shape == (2, 3)

    folder = tmp_path / "killed"
    folder.mkdir()
    stride = num_envs * (2 if "--action-repeat 2" in extra else 1)
    kills = [
        (die_at_step, 45 // stride),  # before the first scheduled checkpoint, back to step 0
        (die_at_step, 100 // stride),  # before learning starts, back to step 60
        (die_while_writing, 2),  # in the second checkpoint of this process
        (die_before_renaming, 1),
        (die_at_step, 100 // stride),  # while learning, back to step 180: 60 updates are in that checkpoint
    ]
    first = f"--env-id {env} {FLAGS} --num-envs {num_envs} {extra}"
    assert run(folder, first, kills[0], script) == -signal.SIGKILL
    (run_folder,) = folder.glob("runs/*")
    again = f"--resume {run_folder}"
    for sabotage in kills[1:]:
        assert run(folder, again, sabotage, script) == -signal.SIGKILL, (folder / "log.txt").read_text()
    assert run(folder, again, script=script) == 0, (folder / "log.txt").read_text()
    assert "warning:" not in (folder / "log.txt").read_text()
    assert_same(whole, result(folder))
    assert not list(run_folder.glob("*.tmp"))


def test_one_seed_gives_one_result_and_another_seed_another(tmp_path):
    first, again = (run_through(tmp_path / name, "Pendulum-v1", "--seed 3") for name in ("first", "again"))
    other = run_through(tmp_path / "other", "Pendulum-v1", "--seed 4")
    assert_same(first, again)
    with pytest.raises(AssertionError):
        assert_same(first, other)


def test_a_finished_run_can_be_made_longer_and_says_that_it_is_another(tmp_path):
    run_through(tmp_path / "run", "Pendulum-v1")
    folder = tmp_path / "run"
    (run_folder,) = folder.glob("runs/*")
    assert run(folder, f"--resume {run_folder} --total-timesteps 420") == 0
    checkpoint, records = result(folder)
    assert checkpoint["step"] == 420 and len(checkpoint["rows"]) == 420
    assert (np.diff(records["losses/alpha"][0]) > 0).all()  # no step twice
    assert checkpoint["agent"]["log_alpha"] == pytest.approx(np.log(records["losses/alpha"][1][-1]), abs=1e-3)
    assert records["losses/alpha"][1][-1] != records["losses/alpha"][1][-3]  # the temperature still moves
    assert "changed: total_timesteps" in (folder / "log.txt").read_text()


def test_a_resume_by_another_version_warns(tmp_path):
    run_through(tmp_path / "run", "Pendulum-v1")
    (run_folder,) = tmp_path.glob("run/runs/*")
    checkpoint = torch.load(run_folder / "checkpoint.pt", weights_only=True)
    torch.save(checkpoint | {"versions": "of long ago"}, run_folder / "checkpoint.pt")
    assert run(tmp_path / "run", f"--resume {run_folder}") == 0
    assert "changed: versions" in (tmp_path / "run" / "log.txt").read_text()


@pytest.mark.parametrize(
    ("script", "env_id"),
    [
        ("sac_continuous", "InvertedPendulum-v4"),
        ("sac_dmc", "cartpole-balance"),
        ("sac_ablations", "InvertedPendulum-v4"),
    ],
)
def test_a_resume_with_another_mujoco_warns(tmp_path, script, env_id):
    run_through(tmp_path / "run", env_id, script=script)
    (run_folder,) = tmp_path.glob("run/runs/*")
    checkpoint = torch.load(run_folder / "checkpoint.pt", weights_only=True)
    for versions, warns in (
        (checkpoint["versions"], False),
        (checkpoint["versions"].replace(mujoco.__version__, "3.1.6"), True),
    ):
        torch.save(checkpoint | {"versions": versions}, run_folder / "checkpoint.pt")
        assert run(tmp_path / "run", f"--resume {run_folder}", script=script) == 0
        assert ("changed: versions" in (tmp_path / "run" / "log.txt").read_text()) == warns
