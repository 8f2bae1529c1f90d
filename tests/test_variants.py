"""Every combination of compile, num-envs, track and video makes real updates; compiled and eager updates agree."""

import itertools
import json
import os
import shutil
import sys
import threading
from types import SimpleNamespace

import psutil
import pytest
import torch

import sac_continuous as sac  # the tests have each script in its place

SCRIPTS = ["sac_continuous", "sac_dmc", "sac_ablations"]
once = pytest.mark.only("sac_continuous")  # it takes long, and the lines are the same in each
COMPILER = shutil.which(os.environ.get("CXX", "g++"))
FLAGS = "--env-id Pendulum-v1 --total-timesteps 60 --learning-starts 40 --batch-size 8 --log-frequency 20 "
FLAGS += "--eval-frequency 60 --eval-episodes 1 --threads 1"
SUITE = "--env-id cartpole-swingup --action-repeat 50 --total-timesteps 3000 --learning-starts 2100 --batch-size 8 "
SUITE += "--log-frequency 1000 --eval-frequency 3000 --eval-episodes 1 --threads 1"


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch._dynamo.reset()


def initial_agent(obs_dim=3, **flags):
    torch.manual_seed(1)
    return sac.SAC(obs_dim, 1, sac.Args(**flags))


COMBINATIONS = list(itertools.product([False, True], [1, 3], [False, True], [False, True]))
EVERYWHERE = [(False, 3, False, False), (True, 1, True, True)]  # the others once


@pytest.mark.parametrize(
    "compiled, num_envs, track, video",
    [pytest.param(*flags, marks=() if flags in EVERYWHERE else once) for flags in COMBINATIONS],
)
def test_all_flags_together_make_real_updates(equipped, compiled, num_envs, track, video, tmp_path, monkeypatch):
    if compiled and not COMPILER:
        pytest.skip("no C++ compiler")
    if compiled and (num_envs, track, video) not in [(1, False, False), (3, True, True)]:
        # two cases go through the C++ compiler; in the others the same whole graph is traced and then run as it is
        compile = torch.compile
        monkeypatch.setattr(torch, "compile", lambda function, **_: compile(function, fullgraph=True, backend="eager"))
    flags = [f"--num-envs={num_envs}", f"--compile={'on' if compiled else 'off'}"]
    flags += ["--track"] * track + ["--capture-video"] * video
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    shared, obs_dim, updates = (SUITE, 5, 18) if sac.__name__ == "sac_dmc" else (FLAGS, 3, 20)
    monkeypatch.setattr(sys, "argv", [f"{sac.__name__}.py", *shared.split(), *flags])
    sac.main()
    if track:
        import wandb

        wandb.finish()

    (folder,) = tmp_path.glob("runs/*")
    before, after = initial_agent(obs_dim).state_dict(), torch.load(folder / "model.pt", weights_only=True)["agent"]
    for name, tensor in after.items():
        assert not torch.equal(tensor, before[name]), f"{name} is what it was"
        assert tensor.isfinite().all()
    assert after["critic_optimizer.steps"] == after["actor_optimizer.steps"] == updates
    assert bool(list(folder.glob("wandb/offline-run-*/*.wandb"))) == track
    assert bool(list(folder.glob("videos/*.mp4"))) == video


def a_batch(generator, batch_size=256):
    normal = lambda *shape: torch.randn(shape, generator=generator)
    obs, action, next_obs = normal(batch_size, 3), normal(batch_size, 1).tanh(), normal(batch_size, 3)
    return sac.Batch(obs, action, normal(batch_size), (normal(batch_size) > 1).float(), next_obs)


@once
@pytest.mark.skipif(not COMPILER, reason="no C++ compiler")
@pytest.mark.parametrize("precision, rounding", [("highest", 1e-5), ("medium", 4e-3)])  # float32's, bfloat16's
@torch._dynamo.config.patch(trace_autograd_ops=True)
def test_compiled_update_equals_the_eager_one(precision, rounding):
    eager, compiled = (initial_agent(matmul_precision=precision) for _ in range(2))
    update = torch.compile(compiled.update, fullgraph=True)
    generator = torch.Generator().manual_seed(0)
    for step in range(20):
        batch, noise = a_batch(generator), torch.randn((2, 256, 1), generator=generator)
        ours, theirs = eager.update(batch, noise), update(batch, noise)
        for name, loss in ours.items():  # rounding grows from step to step, since Adam divides by small numbers
            grown = rounding * (step + 1)
            torch.testing.assert_close(theirs[name], loss, rtol=grown, atol=grown, msg=name)
        if step == 0:  # Adam's first means are a tenth of the gradients
            for network in ("actor_optimizer", "critic_optimizer", "alpha_optimizer"):
                for a, b in zip(getattr(eager, network).mean, getattr(compiled, network).mean):
                    assert (b - a).norm() < 10 * rounding * a.norm()
    for (name, before), a, b in zip(initial_agent().named_parameters(), eager.parameters(), compiled.parameters()):
        assert (b - a).norm() < 10 * rounding * (a - before).norm(), name  # of the way that it went


def weights(agent):
    return torch.cat([parameter.detach().flatten() for parameter in agent.parameters()])


@once
@pytest.mark.skipif(not COMPILER, reason="no C++ compiler")
@torch._dynamo.config.patch(trace_autograd_ops=True)
def test_a_thousand_compiled_updates_stay_within_the_growth_of_rounding():
    """What starts as rounding grows, chaotically; so it is held against what a change of one part in 10^7 grows to."""
    eager, compiled, shaken = (initial_agent() for _ in range(3))
    with torch.no_grad():
        for parameter in shaken.parameters():
            parameter.mul_(1 + 1e-7)
    update = torch.compile(compiled.update, fullgraph=True, options={"cpp_wrapper": True})
    generator = torch.Generator().manual_seed(0)
    for _ in range(1000):
        batch, noise = a_batch(generator), torch.randn((2, 256, 1), generator=generator)
        losses = [function(batch, noise) for function in (eager.update, update, shaken.update)]
    compiled_off, shaken_off = (weights(compiled) - weights(eager)).norm(), (weights(shaken) - weights(eager)).norm()
    assert compiled_off < 2 * shaken_off
    for name, loss in losses[0].items():
        torch.testing.assert_close(losses[1][name], loss, rtol=0.01, atol=0.01, msg=name)


def train(folder, monkeypatch, *flags):
    """One run in `folder`; returns its final agent's state and its arguments."""
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["sac_continuous.py", *FLAGS.split(), *flags])
    sac.main()
    (run,) = folder.glob("runs/*")
    agent = torch.load(run / "model.pt", weights_only=True)["agent"]
    return agent, json.loads((run / "args.json").read_text()), run


@once
@pytest.mark.parametrize("precision", ["auto", "medium"])
@pytest.mark.parametrize("compile", ["off", "on"])
def test_the_number_of_threads_changes_no_bits(compile, precision, tmp_path, monkeypatch):
    flags = ["--env-id=Hopper-v4", "--batch-size=256", f"--compile={compile}", f"--matmul-precision={precision}"]
    one, two = (train(tmp_path / n, monkeypatch, *flags, f"--threads={n}")[0] for n in "12")
    assert all(torch.equal(one[name], two[name]) for name in one)


class Crowded(psutil.Process):
    """A process that the system interrupts more often at each look."""

    looks = 0

    def num_ctx_switches(self):
        Crowded.looks += 1
        return SimpleNamespace(voluntary=0, involuntary=10**6 * Crowded.looks)


@once
@pytest.mark.parametrize("crowded", [False, True])
def test_threads_give_way_to_other_processes_until_the_next_checkpoint(crowded, tmp_path, monkeypatch, capsys):
    clock, main = itertools.count(step=2.1), threading.main_thread()  # a look at each step
    # TensorBoard's thread, which asks when it likes, must not move the clock
    monkeypatch.setattr(sac.time, "time", lambda: next(clock) if threading.current_thread() is main else 0.0)
    quiet = SimpleNamespace(num_ctx_switches=lambda: SimpleNamespace(voluntary=0, involuntary=0))
    monkeypatch.setattr(psutil, "Process", Crowded if crowded else lambda: quiet)
    seen, update = [], sac.SAC.update
    monkeypatch.setattr(sac.SAC, "update", lambda *a: (seen.append(torch.get_num_threads()), update(*a))[1])
    flags = ["--checkpoint-frequency=50", "--learning-starts=20", "--eval-frequency=0", "--compile=off"]
    agent, *_ = train(tmp_path / "a", monkeypatch, *flags, "--threads=2")
    assert capsys.readouterr().out.count("one thread until the next checkpoint") == 2 * crowded
    if not crowded:
        assert seen == [2] * 40
        return
    assert seen == [1] * 30 + [2, 2] + [1] * 8  # one look begins the measurement, the next one ends it
    monkeypatch.undo()
    alone, *_ = train(tmp_path / "b", monkeypatch, *flags, "--threads=1")
    assert all(torch.equal(agent[name], alone[name]) for name in alone)


@once
@pytest.mark.parametrize(
    "flags, compiles",
    [
        ([], False),
        (["--total-timesteps=49999", "--learning-starts=49998"], False),
        (["--total-timesteps=50000", "--learning-starts=49999"], True),
        (["--total-timesteps=50000", "--learning-starts=49999", "--compile=off"], False),
        (["--compile=on"], True),
    ],
)
def test_long_runs_compile_and_resumed_ones_go_on_as_they_began(flags, compiles, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(torch, "compile", lambda function, **_: made.append(function) or function)
    flags = [*flags, "--eval-frequency=0", "--checkpoint-frequency=100000", "--log-frequency=100000"]
    _, args, run = train(tmp_path / "run", monkeypatch, *flags)
    assert len(made) == 3 * compiles  # a trial of the compiler, learn, act
    assert args["compile"] == ("on" if compiles else "off")
    made.clear()
    longer = [f"--total-timesteps={50_000 if args['total_timesteps'] < 50_000 else 50_001}"]
    monkeypatch.setattr(sys, "argv", ["sac_continuous.py", f"--resume={run}", *longer, "--learning-starts=49999"])
    sac.main()
    assert len(made) == 3 * compiles


@once
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_update_equals_the_cpu_one():
    cpu, gpu = initial_agent(), initial_agent().to("cuda")
    generator = torch.Generator().manual_seed(0)
    batch, noise = a_batch(generator), torch.randn((2, 256, 1), generator=generator)
    ours, theirs = cpu.update(batch, noise), gpu.update(sac.Batch(*(x.cuda() for x in batch)), noise.cuda())
    for name, loss in ours.items():
        torch.testing.assert_close(theirs[name].cpu(), loss, rtol=1e-4, atol=1e-5, msg=name)


@once
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@torch._dynamo.config.patch(trace_autograd_ops=True)
def test_a_captured_update_equals_the_eager_one():
    """With the options of main(): one compiled graph, replayed as a CUDA graph."""
    eager, captured = initial_agent().to("cuda"), initial_agent().to("cuda")
    options = {"triton.cudagraphs": True, "guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
    update = torch.compile(captured.update, fullgraph=True, options=options)
    generator = torch.Generator().manual_seed(0)
    for step in range(20):
        batch = sac.Batch(*(x.cuda() for x in a_batch(generator)))
        noise = torch.randn((2, 256, 1), generator=generator).cuda()
        ours, theirs = eager.update(batch, noise), update(batch, noise)
        for name, loss in ours.items():
            torch.testing.assert_close(theirs[name], loss, rtol=1e-5 * (step + 1), atol=1e-5 * (step + 1), msg=name)


@once
@pytest.mark.parametrize("precision", ["auto", "highest"])
def test_products_are_true_float32(precision, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["sac_continuous.py", *FLAGS.split(), "--matmul-precision", precision])
    sac.main()
    x = torch.rand(256, 256, generator=torch.Generator().manual_seed(0))
    error = (x @ x - x.double() @ x.double()).abs().max()
    assert error < 1e-3, "the products of these numbers around 64 were rounded to fewer bits than float32 has"
