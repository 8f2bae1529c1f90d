"""Every combination of compile, num-envs, track and video makes real updates; compiled and eager updates agree."""

import functools
import itertools
import os
import shutil
import sys

import pytest
import torch

import sac_continuous as sac

COMPILER = shutil.which(os.environ.get("CXX", "g++"))
FLAGS = "--env-id Pendulum-v1 --total-timesteps 60 --learning-starts 40 --batch-size 8 --log-frequency 20 "
FLAGS += "--eval-frequency 60 --eval-episodes 1 --threads 1"


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch._dynamo.reset()


def initial_agent(seed=1):
    torch.manual_seed(seed)
    return sac.SAC(3, 1, sac.Args())


@pytest.mark.parametrize(
    "compiled, num_envs, track, video", list(itertools.product([False, True], [1, 3], [False, True], [False, True]))
)
def test_all_flags_together_make_real_updates(compiled, num_envs, track, video, tmp_path, monkeypatch):
    if compiled and not COMPILER:
        pytest.skip("no C++ compiler")
    if compiled and (num_envs, track, video) not in [(1, False, False), (3, True, True)]:
        # two cases go through the C++ compiler; in the others the same whole graph is traced and then run as it is
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    flags = [f"--num-envs={num_envs}", *["--compile"] * compiled, *["--track"] * track, *["--capture-video"] * video]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setattr(sys, "argv", ["sac_continuous.py", *FLAGS.split(), *flags])
    sac.main()
    if track:
        import wandb

        wandb.finish()

    (folder,) = tmp_path.glob("runs/*")
    before, after = initial_agent().state_dict(), torch.load(folder / "model.pt", weights_only=True)["agent"]
    for name, tensor in after.items():
        assert not torch.equal(tensor, before[name]), f"{name} is what it was"
        assert tensor.isfinite().all()
    assert after["critic_optimizer.steps"] == after["actor_optimizer.steps"] == 20
    assert bool(list(folder.glob("wandb/offline-run-*/*.wandb"))) == track
    assert bool(list(folder.glob("videos/*.mp4"))) == video


def a_batch(generator, batch_size=256):
    normal = lambda *shape: torch.randn(shape, generator=generator)
    obs, action, next_obs = normal(batch_size, 3), normal(batch_size, 1).tanh(), normal(batch_size, 3)
    return sac.Batch(obs, action, normal(batch_size), (normal(batch_size) > 1).float(), next_obs)


@pytest.mark.skipif(not COMPILER, reason="no C++ compiler")
def test_compiled_update_equals_the_eager_one(monkeypatch):
    monkeypatch.setattr(torch._dynamo.config, "trace_autograd_ops", True)
    eager, compiled = initial_agent(), initial_agent()
    update = torch.compile(compiled.update, fullgraph=True)
    generator = torch.Generator().manual_seed(0)
    for step in range(20):
        batch, noise = a_batch(generator), torch.randn((2, 256, 1), generator=generator)
        ours, theirs = eager.update(batch, noise), update(batch, noise)
        for name, loss in ours.items():  # rounding grows from step to step, since Adam divides by small numbers
            torch.testing.assert_close(theirs[name], loss, rtol=1e-5 * (step + 1), atol=1e-5 * (step + 1), msg=name)
        if step == 0:  # Adam's first means are a tenth of the gradients
            for network in ("actor_optimizer", "critic_optimizer", "alpha_optimizer"):
                for a, b in zip(getattr(eager, network).mean, getattr(compiled, network).mean):
                    torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-7)
    for (name, a), b in zip(eager.named_parameters(), compiled.parameters()):
        torch.testing.assert_close(b, a, rtol=1e-2, atol=1e-4, msg=name)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_update_equals_the_cpu_one():
    cpu, gpu = initial_agent(), initial_agent().to("cuda")
    generator = torch.Generator().manual_seed(0)
    batch, noise = a_batch(generator), torch.randn((2, 256, 1), generator=generator)
    ours, theirs = cpu.update(batch, noise), gpu.update(sac.Batch(*(x.cuda() for x in batch)), noise.cuda())
    for name, loss in ours.items():
        torch.testing.assert_close(theirs[name].cpu(), loss, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("precision", ["auto", "highest"])
def test_products_are_true_float32(precision, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["sac_continuous.py", *FLAGS.split(), "--matmul-precision", precision])
    sac.main()
    x = torch.rand(256, 256, generator=torch.Generator().manual_seed(0))
    error = (x @ x - x.double() @ x.double()).abs().max()
    assert error < 1e-3, "the products of these numbers around 64 were rounded to fewer bits than float32 has"
