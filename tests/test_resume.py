"""A run that was killed and continued ends with the same bits as one that never stopped.

Runs happen in forked children, so that a real SIGKILL can hit them at a chosen moment: at an
environment step, half-way through the writing of a checkpoint, or just before its renaming.
"""

import os
import re
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import (
    COMPILER,
    is_same,
    load,
    only_run,
    run_forked,
    same,
    saved_args,
    wait_for_the_next_second,
)
from matplotlib.axes import Axes
from torture import difference

FLAGS = "--total-timesteps 200 --learning-starts 80 --batch-size 16 --checkpoint-frequency 40 "
FLAGS += "--log-frequency 20 --eval-frequency 100 --eval-episodes 2 --threads 1 --no-cuda"
# For what needs no long run: evaluations at 10, 20 and 30.
SHORT = "--total-timesteps 30 --learning-starts 12 --batch-size 4 --checkpoint-frequency 6 "
SHORT += "--log-frequency 2 --eval-frequency 10 --eval-episodes 1 --threads 1 --no-cuda"
slow = pytest.mark.slow
once = pytest.mark.only("sac_continuous")  # it takes long, and the lines are the same in each


@pytest.fixture(scope="module", autouse=True)
def short_episodes(sac):
    """The suite's episodes have 50 steps instead of 1000: their number does not matter here."""
    with pytest.MonkeyPatch.context() as patch:
        if sac.__name__ == "sac_dmc":
            from dm_control import suite

            load = suite.load

            def load_short(domain, task, task_kwargs):
                limit = {} if domain == "lqr" else {"time_limit": 0.5}
                return load(domain, task, task_kwargs | limit)

            patch.setattr(suite, "load", load_short)
        yield


def pendulum(sac) -> str:
    return "cartpole-balance" if sac.__name__ == "sac_dmc" else "Pendulum-v1"


# Ways to be killed --------------------------------------------------------------------------------


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def die_at_step(n):
    """A sabotage that kills the process at its n-th call of ReplayBuffer.add."""

    def sabotage(script):
        add = script.ReplayBuffer.add
        calls = []

        def dying(*args):
            calls.append(1)
            if len(calls) == n:
                die()
            add(*args)

        script.ReplayBuffer.add = dying

    return sabotage


def die_while_writing(n):
    """The n-th checkpoint is written in part to its temporary name, then the process dies."""

    def sabotage(script):
        write = torch.save
        calls = []

        def dying(state, file):
            calls.extend([1] * ("rows" in state))
            if len(calls) == n:
                file.write(b"half a checkpoint")
                file.flush()
                die()
            write(state, file)

        torch.save = dying

    return sabotage


def die_before_renaming(n):
    """The n-th checkpoint is whole on the disk but not in its place when the process dies."""

    def sabotage(script):
        replace = os.replace
        calls = []

        def dying(source, target):
            calls.extend([1] * (target.name == "checkpoint.pt"))
            if len(calls) == n:
                die()
            replace(source, target)

        os.replace = dying

    return sabotage


# Results ------------------------------------------------------------------------------------------


def result(sac, folder: Path) -> dict:
    """All that a run ends with: its files' content, and its curves but for the speed."""
    run_folder = only_run(folder)
    curves = sac.read_records(run_folder)
    del curves["charts/SPS"]
    files = {path.name: load(path) for path in run_folder.glob("*.pt")}
    assert "model.pt" in files
    assert files["checkpoint.pt"]["step"] > 0
    return files | {"curves": curves}


def run_through(sac, folder: Path, env: str, extra: str = "", flags: str = FLAGS) -> dict:
    folder.mkdir()
    ended = run_forked(folder, sac, f"--env-id {env} {flags} {extra}")
    assert ended.code == 0, ended.err
    return result(sac, folder)


def resume(sac, folder: Path, flags: str = "", sabotage=None):
    wait_for_the_next_second(only_run(folder))
    return run_forked(folder, sac, f"--resume {only_run(folder)} {flags}", sabotage)


only_continuous = pytest.mark.only("sac_continuous")
only_dmc = pytest.mark.only("sac_dmc")
CASES = [
    # The ring is full, and its next row in the middle, when this run is resumed.
    pytest.param("Pendulum-v1", 1, 1, "--buffer-size 70", marks=[only_continuous]),
    pytest.param("Pendulum-v1", 4, 1, "", marks=[only_continuous, slow]),
    pytest.param("Hopper-v4", 1, 1, "", marks=[only_continuous, slow]),
    pytest.param("Hopper-v4", 4, 1, "", marks=[only_continuous, slow]),
    pytest.param("Hopper-v4", 2, 1, "--compile on", marks=[only_continuous, slow]),
    pytest.param("BipedalWalker-v3", 4, 1, "--eval-episodes 1", marks=[only_continuous, slow]),
    # Its episodes have no time limit. That evaluations cut them, test_evaluation.py shows.
    pytest.param("lqr-lqr_2_1", 1, 1, "--eval-frequency 0", marks=[only_dmc, slow]),
    pytest.param("cartpole-swingup", 2, 2, "--action-repeat 2", marks=[only_dmc, slow]),
]


@slow
@pytest.mark.parametrize("env, num_envs, repeat, extra", CASES)
def test_killed_and_resumed_is_never_killed(sac, tmp_path, env, num_envs, repeat, extra):
    if env == "BipedalWalker-v3":
        pytest.importorskip("Box2D")
    if "--compile on" in extra and not COMPILER:
        pytest.skip("no C++ compiler, or no Python.h")
    whole = run_through(sac, tmp_path / "whole", env, f"--num-envs {num_envs} {extra}")
    assert whole["curves"]["losses/qf_loss"].size > 0
    how = saved_args(only_run(tmp_path / "whole"))["compile"]
    assert how == ("on" if "--compile on" in extra else "off")
    if "--eval-frequency 0" not in extra:
        assert whole["curves"]["eval/episodic_return"].shape == (2, 2)
        assert "best.pt" in whole
    if env == "Hopper-v4":
        # The others' episodes are longer than the time between checkpoints.
        assert whole["curves"]["charts/episodic_return"].size > 0

    folder = tmp_path / "killed"
    folder.mkdir()
    per_round = num_envs * repeat
    kills = [
        die_at_step(30 // per_round),  # before the first scheduled checkpoint, back to step 0
        die_at_step(70 // per_round),  # before learning starts, back to step 40
        die_while_writing(2),  # in the second checkpoint of this process
        die_before_renaming(1),
        die_at_step(70 // per_round),  # while learning, back to step 120 with 40 updates
    ]
    if "--compile on" in extra:  # each process loads the compiled code, which takes long
        kills = [die_at_step(140 // per_round)]  # while learning, back to step 120
    flags = f"--env-id {env} {FLAGS} --num-envs {num_envs} {extra}"
    assert run_forked(folder, sac, flags, kills[0]).code == -signal.SIGKILL
    for kill in kills[1:]:
        ended = resume(sac, folder, sabotage=kill)
        assert ended.code == -signal.SIGKILL, ended.err
    last = load(only_run(folder) / "checkpoint.pt")
    assert last["step"] == 120
    assert last["agent"]["critic_optimizer.steps"] == 40 / repeat
    ended = resume(sac, folder)
    assert ended.code == 0, ended.err
    assert "bit-identical" not in ended.err
    same(result(sac, folder), whole)
    assert not list(only_run(folder).glob("*.tmp"))


@slow
@once
def test_one_seed_gives_one_result_and_another_seed_another(sac, tmp_path):
    first = run_through(sac, tmp_path / "first", "Pendulum-v1", "--seed 3", SHORT)
    again = run_through(sac, tmp_path / "again", "Pendulum-v1", "--seed 3", SHORT)
    other = run_through(sac, tmp_path / "other", "Pendulum-v1", "--seed 4", SHORT)
    same(again, first)
    assert not is_same(other["model.pt"], first["model.pt"])
    assert not is_same(other["curves"], first["curves"])


# A finished run -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_once(sac, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    run_through(sac, folder, pendulum(sac), flags=SHORT)
    return folder


@pytest.fixture
def finished(run_once, tmp_path):
    """A folder with a finished run, to be changed at will."""
    return Path(shutil.copytree(run_once, tmp_path / "copy"))


@pytest.fixture(scope="module")
def longer(sac, run_once, tmp_path_factory):
    """The finished run made longer: its folder, what it said, and all that it ended with."""
    folder = Path(shutil.copytree(run_once, tmp_path_factory.mktemp("longer") / "run"))
    ended = resume(sac, folder, "--total-timesteps 42")
    assert ended.code == 0, ended.err
    return SimpleNamespace(folder=folder, err=ended.err, **{"all": result(sac, folder)})


@slow
class TestLonger:
    def test_goes_on_to_the_new_end(self, longer):
        checkpoint = longer.all["checkpoint.pt"]
        assert checkpoint["step"] == checkpoint["count"] == len(checkpoint["rows"]) == 42
        assert longer.all["model.pt"]["step"] == 42

    def test_logs_no_step_twice(self, longer):
        steps, _ = longer.all["curves"]["losses/alpha"]
        assert steps[-1] == 42
        assert (np.diff(steps) > 0).all()

    def test_still_learns_the_temperature(self, longer):
        _, alphas = longer.all["curves"]["losses/alpha"]
        log_alpha = longer.all["checkpoint.pt"]["agent"]["log_alpha"].item()
        assert log_alpha == pytest.approx(np.log(alphas[-1]), abs=1e-3)
        assert alphas[-1] != alphas[-3]

    def test_says_that_it_is_another_run(self, longer):
        assert "total_timesteps changed" in longer.err

    def test_keeps_the_new_length(self, longer):
        assert saved_args(only_run(longer.folder))["total_timesteps"] == 42


def test_a_resumed_finished_run_says_so(sac, finished):
    before = (only_run(finished) / "model.pt").read_bytes()
    ended = resume(sac, finished)
    assert ended.code == 0, ended.err
    assert "already finished (30 of 30 steps); to train longer: --total-timesteps" in ended.out
    assert "bit-identical" not in ended.err
    assert (only_run(finished) / "model.pt").read_bytes() == before


def test_a_run_that_is_not_finished_does_not_say_so(sac, finished):
    ended = resume(sac, finished, "--total-timesteps 32")
    assert "resuming at step 30" in ended.out
    assert "already finished" not in ended.out


def test_a_resume_names_every_flag_that_changed(sac, finished):
    ended = resume(sac, finished, "--gamma 0.9 --batch-size 8")
    assert ended.code == 0, ended.err
    assert "warning: batch_size, gamma changed: " in ended.err
    saved = saved_args(only_run(finished))
    assert saved["gamma"] == 0.9
    assert saved["batch_size"] == 8


WATCHING = "--eval-frequency 7 --eval-episodes 3 --log-frequency 5 --exp-name other"


def test_flags_that_only_watch_change_no_bits_and_need_no_warning(sac, finished, tmp_path):
    other = Path(shutil.copytree(finished, tmp_path / "other"))
    longer = "--total-timesteps 42"
    for folder, flags in ((finished, longer), (other, f"{longer} {WATCHING}")):
        ended = resume(sac, folder, flags)
        assert ended.code == 0, ended.err
        assert "warning: total_timesteps changed: " in ended.err
    assert saved_args(only_run(other))["eval_episodes"] == 3
    one, two = (load(only_run(folder) / "checkpoint.pt") for folder in (finished, other))
    assert one["step"] == 42
    same(one, two)
    watching = "eval_frequency eval_episodes log_frequency capture_video exp_name track "
    watching += "wandb_project_name wandb_entity"
    assert {*sac.WATCHING_FLAGS} == {*watching.split()}


def test_an_agent_that_is_not_finite_is_never_the_best(sac, tmp_path, capsys):
    """The critics do not act, so an evaluation does not tell."""
    agent = sac.SAC(3, 1, sac.Args())
    torch.nn.init.constant_(agent.target_critics.biases[0], np.nan)
    with pytest.raises(SystemExit, match="^1$"):
        sac.save_if_best(tmp_path, agent, 7, 1.0)
    said = capsys.readouterr().err
    assert re.fullmatch("error: target_critics.* is not finite at step 7; .*\n", said)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("edit", [lambda path: path.write_text("# edited\n"), Path.unlink])
def test_a_resume_by_another_script_warns_and_keeps_it(sac, finished, edit):
    copied = only_run(finished) / f"{sac.__name__}.py"
    edit(copied)
    ended = resume(sac, finished)
    assert ended.code == 0, ended.err
    assert "warning: script changed: " in ended.err
    assert copied.read_bytes() == Path(sac.__file__).read_bytes()
    assert "changed" not in resume(sac, finished).err


def test_a_run_may_be_named_by_a_dot(sac, finished, monkeypatch):
    names = []
    monkeypatch.setattr(Axes, "set_title", lambda self, title, **_: names.append(title))
    wandb_run = SimpleNamespace(save=lambda *_, **__: None)
    wandb = SimpleNamespace(init=lambda id, name, **_: names.extend([id, name]) or wandb_run)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    folder = only_run(finished)
    monkeypatch.chdir(folder)
    sac.plot_learning_curve(Path("."))
    sac.start_wandb(sac.Args(), Path("."))
    assert names == [folder.name] * 3


def test_weights_and_biases_gets_the_project_and_the_team(sac, tmp_path, monkeypatch):
    asked = {}
    wandb_run = SimpleNamespace(save=lambda *_, **__: None)
    wandb = SimpleNamespace(init=lambda **given: asked.update(given) or wandb_run)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    sac.start_wandb(sac.Args(wandb_project_name="hoppers", wandb_entity="us"), tmp_path)
    assert (asked["project"], asked["entity"]) == ("hoppers", "us")


def test_a_changed_flag_holds_at_the_next_resume(sac, finished):
    resume(sac, finished, "--gamma 0.9 --total-timesteps 32")
    ended = resume(sac, finished, "--total-timesteps 34")
    assert "warning: total_timesteps changed: " in ended.err
    assert saved_args(only_run(finished))["gamma"] == 0.9


@slow
def test_a_resume_by_another_version_warns(sac, finished):
    path = only_run(finished) / "checkpoint.pt"
    checkpoint = load(path)
    versions = checkpoint["versions"] | {"torch": "of long ago"}
    torch.save(checkpoint | {"versions": versions}, path)
    ended = resume(sac, finished)
    assert ended.code == 0
    assert "warning: torch changed: " in ended.err


@pytest.mark.parametrize(
    "name",
    ["python", "torch", "numpy", "gymnasium", "processor", "MKL_CBWR", "gpu"]
    + [pytest.param("mujoco", marks=only_dmc)],  # noted where it is used
)
def test_each_version_is_noted_and_a_change_of_it_warned_of(sac, name, capsys):
    args = sac.Args(cuda=False)
    noted = sac.versions(torch.device("cpu"))
    assert name in noted
    sac.print_resume(args, {"step": 30, "versions": noted}, [])
    assert not capsys.readouterr().err
    sac.print_resume(args, {"step": 30, "versions": noted | {name: "of long ago"}}, [])
    assert f"warning: {name} changed: " in capsys.readouterr().err


def test_other_vector_instructions_are_another_processor(sac, monkeypatch, capsys):
    noted = sac.versions(torch.device("cpu"))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "of another machine")
    sac.print_resume(sac.Args(cuda=False), {"step": 30, "versions": noted}, [])
    assert "warning: processor changed: " in capsys.readouterr().err


def test_a_processor_of_which_nothing_is_known_is_noted_so(sac, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "s390x"})
    assert sac.versions(torch.device("cpu"))["processor"].startswith("unknown, ")


@pytest.mark.parametrize("name", ["--resume", "--evaluate"])
@pytest.mark.parametrize("script", ["sac_continuous", "sac_other"])
def test_another_script_is_warned_of_each_time(sac, finished, tmp_path, name, script, capsys):
    state = load(only_run(finished) / "checkpoint.pt")
    assert state["script"] == f"{sac.__name__}.py"
    torch.save(state | {"script": f"{script}.py"}, tmp_path / "checkpoint.pt")
    for _ in range(2):
        sac.load_checkpoint(sac.Args(**{name[2:]: tmp_path}))
        err = capsys.readouterr().err
        warned = f"warning: {script}.py trained this agent, the algorithm of {sac.__name__}.py may"
        assert (warned in err) == (script != sac.__name__)
        assert err.count("\n") == (script != sac.__name__)


def test_an_older_checkpoint_does_not_name_its_script(sac, finished, tmp_path, capsys):
    state = load(only_run(finished) / "checkpoint.pt")
    del state["script"]
    torch.save(state, tmp_path / "checkpoint.pt")
    sac.load_checkpoint(sac.Args(resume=tmp_path))
    assert not capsys.readouterr().err


@pytest.mark.parametrize("cuda", [True, False])
def test_a_gpu_is_noted_only_by_the_runs_that_use_it(sac, cuda, monkeypatch, capsys):
    noted = sac.versions(torch.device("cpu"))
    assert noted["gpu"] is False
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H200")
    sac.print_resume(sac.Args(cuda=cuda), {"step": 30, "versions": noted}, [])
    assert ("warning: gpu changed: " in capsys.readouterr().err) == cuda


@pytest.mark.parametrize("key", ["count", "random", "rows", "agent", "step"])
def test_a_checkpoint_holds(sac, finished, key):
    assert key in load(only_run(finished) / "checkpoint.pt")


@once
@pytest.mark.parametrize(
    "change, named",
    [
        ({}, ""),
        ({"step": 8}, "step"),
        ({"rows": torch.zeros(3)}, "rows"),
        ({"agent": {"a": torch.zeros(2), "b": torch.ones(2)}}, "a"),
        ({"agent": {"a": torch.ones(2)}}, "b"),  # one that is missing
    ],
)
def test_the_torture_names_what_differs(sac, change, named):
    agent = {"a": torch.ones(2), "b": torch.ones(2)}
    state = dict(step=7, count=7, rows=torch.ones(3), random=torch.ones(3), agent=agent)
    assert difference(state | change, state) == named
    assert difference(state, state | change) == named


# The best agent -----------------------------------------------------------------------------------


def evaluations(sac, means: list[float]):
    """A sabotage by which the evaluations, one after the other, have these mean returns."""

    def sabotage(script):
        left = iter(means)
        script.evaluate = lambda *_, **__: (np.full(2, next(left)), np.full(2, np.nan))

    return sabotage


def best_steps(sac, folder: Path, means, flags="") -> dict:
    """best.pt of a run of 30 steps whose evaluations, at 10, 20 and 30, are `means`."""
    folder.mkdir()
    flags = f"--env-id {pendulum(sac)} {SHORT} {flags}"
    ended = run_forked(folder, sac, flags, evaluations(sac, means))
    assert ended.code == 0, ended.err
    return load(only_run(folder) / "best.pt")


@pytest.mark.parametrize(
    "means, step",
    [([1, 2, 3], 30), ([3, 2, 1], 10), ([1, 3, 2], 20), ([-3, -1, -2], 20), ([2, 2, 2], 10)],
)
def test_the_best_is_replaced_only_by_a_better_one(sac, tmp_path, means, step):
    best = best_steps(sac, tmp_path / "run", means)
    assert best["step"] == step
    assert best["return"] == max(means)


def test_the_best_is_the_agent_of_its_step(sac, tmp_path):
    """A run that ends at step 20 has the bits of step 20 in its model.pt."""
    best = best_steps(sac, tmp_path / "run", [1, 3, 2])
    best_steps(sac, tmp_path / "shorter", [1, 3], "--total-timesteps 20")
    model = load(only_run(tmp_path / "shorter") / "model.pt")
    same(best["agent"], model["agent"])
    assert not is_same(load(only_run(tmp_path / "run") / "model.pt")["agent"], model["agent"])


@slow
@pytest.mark.parametrize("later, step", [([4, 1], 10), ([6, 7], 50), ([1, 6], 50)])
def test_the_best_outlives_a_resume(sac, tmp_path, later, step):
    best_steps(sac, tmp_path / "run", [5, 2, 1])
    ended = resume(sac, tmp_path / "run", "--total-timesteps 50", evaluations(sac, later))
    assert ended.code == 0, ended.err
    best = load(only_run(tmp_path / "run") / "best.pt")
    assert best["step"] == step
    assert best["return"] == max([5, *later])


@slow
@once
def test_a_damaged_best_is_replaced(sac, finished):
    path = only_run(finished) / "best.pt"
    path.write_bytes(b"damaged")
    ended = resume(sac, finished, "--total-timesteps 40")
    assert ended.code == 0, ended.err
    assert load(path)["step"] == 40


def test_a_run_without_evaluations_has_no_best(sac, tmp_path):
    flags = f"--env-id {pendulum(sac)} {SHORT} --eval-frequency 0"
    ended = run_forked(tmp_path, sac, flags)
    assert ended.code == 0, ended.err
    assert (only_run(tmp_path) / "model.pt").exists()
    assert not (only_run(tmp_path) / "best.pt").exists()
