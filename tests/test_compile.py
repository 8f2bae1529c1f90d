"""Speed changes nothing that is learned: compiled updates, bfloat16 products, threads, GPUs.

And combinations of --compile, --num-envs, --track and --capture-video make real updates.
"""

import importlib
import itertools
import os
import sys
import threading
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from helpers import COMPILER, is_same, load, needs_compiler, only_run, run, same, saved_args

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
once = pytest.mark.only("sac_continuous")  # it takes long, and the lines are the same in each

FLAGS = "--env-id Pendulum-v1 --total-timesteps 60 --learning-starts 40 --batch-size 8 "
FLAGS += "--log-frequency 20 --eval-frequency 60 --eval-episodes 1 --threads 1 --no-cuda"
SUITE_FLAGS = "--env-id cartpole-swingup --action-repeat 50 --total-timesteps 3000 "
SUITE_FLAGS += "--learning-starts 2100 --batch-size 8 --log-frequency 1000 "
SUITE_FLAGS += "--eval-frequency 3000 --eval-episodes 1 --threads 1 --no-cuda"


@pytest.fixture(autouse=True)
def as_it_was():
    """Threads, compiled graphs and the folder of compiled code are the next test's own."""
    threads = torch.get_num_threads()
    precision = torch.get_float32_matmul_precision()
    folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    yield
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)
    torch._dynamo.reset()
    torch._dynamo.config.trace_autograd_ops = False
    os.environ.pop("TORCHINDUCTOR_CACHE_DIR", None)
    if folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder


@pytest.fixture
def traced(monkeypatch):
    """The graphs that torch.compile makes, run as they are: all of compiling but the C++."""
    graphs = []

    def keep(graph, inputs, **rest_of_the_options):
        graphs.append(graph)
        return graph

    compile = torch.compile

    def traced_compile(function, options=None, **how):
        guards = {"guard_filter_fn": (options or {}).get("guard_filter_fn")}
        options = {key: value for key, value in guards.items() if value}
        return compile(function, backend=keep, options=options, **how)

    monkeypatch.setattr(torch, "compile", traced_compile)
    return graphs


def make_agent(sac, obs_dim=3, **flags):
    """An agent as a run starts with it, and its flags."""
    args = sac.Args(**flags)
    torch.manual_seed(1)
    agent = sac.SAC(obs_dim, 1, args)
    if args.matmul_precision == "medium":
        sac.multiply_in_bfloat16(agent.critics)
        sac.multiply_in_bfloat16(agent.target_critics)
    return agent, args


def filled_buffer(sac, rows=1000, device="cpu"):
    """Replay of that many transitions as Pendulum might give them, some of them ends."""
    random = np.random.default_rng(0)
    buffer = sac.ReplayBuffer(rows, 3, 1, device)
    obs = random.normal(size=(rows, 3))
    action = np.tanh(random.normal(size=(rows, 1)))
    next_obs = random.normal(size=(rows, 3))
    buffer.add(obs, action, random.normal(size=rows), random.normal(size=rows) > 1, next_obs)
    return buffer


def draw(buffer, random, batch_size=64):
    """Indices and noise of one update."""
    noise = torch.randn((2, batch_size, 1), generator=random).to(buffer.rows.device)
    index = torch.randint(len(buffer), (batch_size,), generator=random)
    return index.to(buffer.rows.device), noise


def learner(sac, agent, args, buffer):
    """learn(index, noise) of the training loop; sac_ablations.py has a number of updates more."""
    learn, _ = sac.compile_update(args, agent, buffer)
    if sac.__name__ == "sac_ablations":
        return lambda index, noise: learn(index, noise, 1)
    return learn


# All flags together -------------------------------------------------------------------------------

# Compiled or not, environments, --track, --capture-video: half of all, in which each three of the
# four meet in every way, and one more.
COMBINATIONS = [
    flags
    for flags in itertools.product([False, True], [1, 3], [False, True], [False, True])
    if sum([flags[0], flags[1] == 3, *flags[2:]]) % 2 == 1 or flags == (True, 3, True, True)
]
IN_EACH_SCRIPT = [(False, 3, False, False), (True, 1, True, True)]  # the others once
REALLY_COMPILED = (3, True, True)  # the other graphs are run as they are


@pytest.mark.slow
@pytest.mark.parametrize(
    "compiled, num_envs, track, video",
    [pytest.param(*flags, marks=() if flags in IN_EACH_SCRIPT else once) for flags in COMBINATIONS],
)
def test_all_flags_together_make_real_updates(
    sac, compiled, num_envs, track, video, tmp_path, monkeypatch, request
):
    if compiled and not COMPILER:
        pytest.skip("no C++ compiler, or no Python.h")
    if compiled and (num_envs, track, video) != REALLY_COMPILED:
        request.getfixturevalue("traced")
    in_suite = sac.__name__ == "sac_dmc"
    flags = (SUITE_FLAGS if in_suite else FLAGS).split()
    flags += [f"--num-envs={num_envs}", f"--compile={'on' if compiled else 'off'}"]
    flags += ["--track"] * track + ["--capture-video"] * video
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setattr(sys, "argv", [f"{sac.__name__}.py", *flags])

    try:
        sac.main()
    finally:
        if track:  # its process too, which the scripts that later tests start would share
            importlib.import_module("wandb").teardown()

    folder = only_run(tmp_path)
    assert saved_args(folder)["compile"] == ("on" if compiled else "off")
    agent, _ = make_agent(sac, obs_dim=5 if in_suite else 3)
    before = agent.state_dict()
    after = load(folder / "model.pt")["agent"]
    updates = 18 if in_suite else 20
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        assert not torch.equal(tensor, before[name]), f"{name} is what it was"
        assert tensor.isfinite().all(), name
    assert after["critic_optimizer.steps"] == after["actor_optimizer.steps"] == updates
    assert bool(list(folder.glob("wandb/offline-run-*/*.wandb"))) == track
    assert bool(list(folder.glob("videos/*.mp4"))) == video


# learn() and act() --------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", ["off", "on"])
def test_learn_is_the_update_of_the_rows_and_the_noise_that_it_is_given(sac, compiled, traced):
    agent, args = make_agent(sac, compile=compiled)
    expected = deepcopy(agent)
    buffer = filled_buffer(sac, 50)
    learn = learner(sac, agent, args, buffer)
    random = torch.Generator().manual_seed(0)
    for _ in range(3):
        index, noise = draw(buffer, random, batch_size=8)
        losses = learn(index, noise)
        same(losses, expected.update(buffer[index], noise), 1e-5)
    same(list(agent.parameters()), list(expected.parameters()), 1e-5)
    assert bool(traced) == (compiled == "on")


@pytest.mark.parametrize("compiled", ["off", "on"])
def test_act_is_that_of_the_agent_as_it_learns(sac, compiled, traced):
    agent, args = make_agent(sac, compile=compiled)
    _, act = sac.compile_update(args, agent, filled_buffer(sac, 50))
    obs = np.ones((2, 3), dtype=np.float32)
    noise = torch.tensor([[0.5], [-1.0]])
    for bias in (0.1, 0.4):
        torch.nn.init.constant_(agent.actor.layers[-1].bias, bias)
        same(act(obs, noise), agent.act(obs, noise), 1e-5)
    assert bool(traced) == (compiled == "on")


def test_an_update_is_one_graph_which_later_updates_use_again(sac, traced):
    agent, args = make_agent(sac, compile="on")
    buffer = filled_buffer(sac, 50)
    learn = learner(sac, agent, args, buffer)
    random = torch.Generator().manual_seed(0)
    for _ in range(4):
        learn(*draw(buffer, random, batch_size=8))
    assert len(traced) == 1


@pytest.mark.parametrize("change", ["gamma", "actor_optimizer.lr"])
def test_a_number_that_changes_counts_at_once(sac, traced, change):
    """Who edits the update may schedule a number: compiled code must not keep the first one."""
    agent, args = make_agent(sac, compile="on")
    buffer = filled_buffer(sac, 50)
    learn = learner(sac, agent, args, buffer)
    random = torch.Generator().manual_seed(0)
    learn(*draw(buffer, random, batch_size=8))
    owner, _, name = change.rpartition(".")
    setattr(agent.get_submodule(owner), name, 0.5)
    index, noise = draw(buffer, random, batch_size=8)
    uncompiled = deepcopy(agent)
    expected = uncompiled.update(buffer[index], noise)
    same(learn(index, noise), expected, 1e-5)
    same(agent.state_dict(), uncompiled.state_dict(), 1e-5)
    assert len(traced) == 2


def test_a_number_that_changes_at_each_step_stops_the_run(sac, traced):
    """And is not compiled a million times."""
    agent, args = make_agent(sac, compile="on")
    buffer = filled_buffer(sac, 50)
    learn = learner(sac, agent, args, buffer)
    random = torch.Generator().manual_seed(0)
    assert torch._dynamo.config.recompile_limit == 8
    with torch._dynamo.config.patch(recompile_limit=3):  # each takes seconds
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            for step in range(100):
                agent.gamma = 1 / (2 + step)
                learn(*draw(buffer, random, batch_size=8))
    assert len(traced) == 3


def test_a_second_run_in_a_process_is_not_taken_for_the_first(sac, traced):
    index, noise = draw(filled_buffer(sac, 50), torch.Generator().manual_seed(0), batch_size=8)
    for gamma in (0.9, 0.5):
        agent, args = make_agent(sac, compile="on", gamma=gamma)
        buffer = filled_buffer(sac, 50)
        expected = deepcopy(agent).update(buffer[index], noise)
        losses = learner(sac, agent, args, buffer)(index, noise)
        same(losses, expected, 1e-5)
        assert agent.critic_optimizer.steps == 1


def test_a_copy_that_computes_in_bfloat16_has_its_own_weights(sac):
    agent, _ = make_agent(sac, matmul_precision="medium")
    batch = filled_buffer(sac)[torch.arange(8)]
    copied = deepcopy(agent)
    before = copied.critics(batch.obs, batch.action)
    with torch.no_grad():
        for weight in agent.critics.weights:
            weight.zero_()
    same(copied.critics(batch.obs, batch.action), before)
    assert not is_same(agent.critics(batch.obs, batch.action), before)


def gone(before, agent):
    """How far each parameter went."""
    return [(b - a).detach() for a, b in zip(before.parameters(), agent.parameters())]


@pytest.mark.slow
@once
@needs_compiler
# Rounding of float32 and of bfloat16.
@pytest.mark.parametrize("precision, rounding", [("highest", 1e-5), ("medium", 4e-3)])
def test_compiled_update_equals_the_eager_one(sac, precision, rounding):
    eager, args = make_agent(sac, matmul_precision=precision, compile="on")
    compiled, _ = make_agent(sac, matmul_precision=precision)
    start, _ = make_agent(sac)
    buffer = filled_buffer(sac)
    learn = learner(sac, compiled, args, buffer)
    random = torch.Generator().manual_seed(0)

    for step in range(20):
        index, noise = draw(buffer, random)
        expected = eager.update(buffer[index], noise)
        # Rounding grows from step to step, since Adam divides by small numbers.
        same(learn(index, noise), expected, rounding * (step + 1))
        if step == 0:
            # Adam's first means are a tenth of the gradients.
            for network in ("actor_optimizer", "critic_optimizer", "alpha_optimizer"):
                means = list(zip(getattr(eager, network).mean, getattr(compiled, network).mean))
                assert means
                for a, b in means:
                    assert (b - a).norm() < 10 * rounding * a.norm()

    ways = zip(gone(start, eager), gone(eager, compiled))
    for (name, _), (way, off) in zip(start.named_parameters(), ways):
        assert off.norm() < 10 * rounding * way.norm(), name


def distance(agent, other):
    return torch.cat([way.flatten() for way in gone(agent, other)]).norm()


@pytest.mark.slow
@once
@needs_compiler
def test_a_thousand_compiled_updates_stay_within_the_growth_of_rounding(sac):
    """What starts as rounding grows, chaotically: as a change of one part in 10^7 grows."""
    eager, args = make_agent(sac, compile="on")
    compiled, _ = make_agent(sac)
    shaken, _ = make_agent(sac)
    with torch.no_grad():
        for parameter in shaken.parameters():
            parameter.mul_(1 + 1e-7)
    buffer = filled_buffer(sac, 10_000)
    learn = learner(sac, compiled, args, buffer)
    random = torch.Generator().manual_seed(0)

    for _ in range(1000):
        index, noise = draw(buffer, random)
        expected = eager.update(buffer[index], noise)
        losses = learn(index, noise)
        shaken.update(buffer[index], noise)

    assert distance(eager, compiled) < 2 * distance(eager, shaken)
    same(losses, expected, 0.01)


# Runs ---------------------------------------------------------------------------------------------


def train(sac, folder, monkeypatch, *flags):
    """One run in `folder`; the state of its final agent."""
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [f"{sac.__name__}.py", *FLAGS.split(), *flags])
    sac.main()
    return load(only_run(folder) / "model.pt")["agent"]


@pytest.mark.slow
@once
@pytest.mark.parametrize(
    "compiled, precision",
    [("off", "auto"), ("off", "medium"), pytest.param("on", "auto", marks=needs_compiler)],
)
def test_the_number_of_threads_changes_no_bits(sac, compiled, precision, tmp_path):
    """MKL promises it with MKL_CBWR, and keeps it with AVX-512 even without."""
    flags = f"{FLAGS} --env-id Hopper-v4 --batch-size 256 --compile {compiled} "
    flags += f"--matmul-precision {precision}"
    avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    text = Path(sac.__file__).read_text()
    steady = text.replace("threads.give_way()", "pass")  # however busy this machine is
    assert steady != text
    script = tmp_path / "steady.py"
    script.write_text(steady)
    agents = []
    for threads in (1, 2):
        folder = tmp_path / str(threads)
        folder.mkdir()
        # A fresh interpreter: MKL reads the variable once.
        mode = None if avx512 else "AVX2"
        ended = run(folder, script, f"{flags} --threads {threads}", MKL_CBWR=mode)
        assert ended.code == 0, ended.err
        assert saved_args(only_run(folder))["compile"] == compiled
        agents.append(load(only_run(folder) / "model.pt")["agent"])
    assert agents[0]["critic_optimizer.steps"] == 20
    same(*agents)


def test_each_number_of_threads_has_a_graph_of_its_own(sac, traced):
    """Compiled code holds the number of threads: that of two would use two where one is left."""
    agent, args = make_agent(sac, compile="on")
    buffer = filled_buffer(sac, 50)
    learn = learner(sac, agent, args, buffer)
    random = torch.Generator().manual_seed(0)
    graphs = []
    for number in (2, 1, 1, 2):
        torch.set_num_threads(number)
        learn(*draw(buffer, random, batch_size=8))
        graphs.append(len(traced))
    assert graphs == [1, 2, 2, 2]


class Crowded:
    """A process that the system interrupts a million times more at each look."""

    looks = 0

    def num_ctx_switches(self):
        Crowded.looks += 1
        return SimpleNamespace(voluntary=0, involuntary=10**6 * Crowded.looks)


# Two threads on two cores: seconds between two looks, cores used, times that the main thread was
# displaced in a second, and the threads that should be left. All but the last two were measured.
LOOKS = {
    "alone": (2.0, 1.99, 5, 2),
    "alone, displaced most often": (2.0, 1.99, 45, 2),
    "beside one busy process": (2.0, 1.4, 76, 1),
    "beside two runs": (2.1, 0.66, 85, 1),
    "with a tenth of a core, slow updates": (5.5, 0.1, 13, 1),
    "an evaluation, which one thread computes": (30.0, 1.0, 4, 2),
    "often displaced, but for short times": (2.0, 1.99, 90, 2),
}


@pytest.fixture
def look(sac, monkeypatch):
    """A function that goes on by seconds in which so many cores were used, and gives way or not."""
    now = SimpleNamespace(seconds=100.0, computed=9.0, displaced=0)
    counted = lambda self: SimpleNamespace(involuntary=now.displaced)  # noqa: E731
    monkeypatch.setattr(psutil.Process, "num_ctx_switches", counted)
    monkeypatch.setattr(sac.time, "time", lambda: now.seconds)
    monkeypatch.setattr(sac.time, "process_time", lambda: now.computed)
    threads = sac.Threads(2, torch.device("cpu"))
    threads.reset()
    threads.give_way()  # begins the measurement

    def look(seconds, cores, displaced):
        now.seconds += seconds
        now.computed += cores * seconds
        now.displaced += displaced * seconds
        threads.give_way()
        return torch.get_num_threads()

    return look


@pytest.mark.parametrize("seconds, cores, displaced, left", LOOKS.values(), ids=LOOKS)
def test_threads_give_way_however_small_their_share(look, seconds, cores, displaced, left):
    assert look(seconds, cores, displaced) == 2
    assert look(seconds, cores, displaced) == left
    assert look(seconds, cores, displaced) == left


def test_one_busy_look_is_not_enough(look):
    """A compilation is a long look in which a run's own processes displace it."""
    for _ in range(3):
        assert look(30, 1.0, 90) == 2
        assert look(2, 1.99, 5) == 2


def test_threads_stay_where_the_kernel_does_not_count_displacements(look, monkeypatch):
    def uncounted(self):
        raise NotImplementedError("its lines were not found in /proc/PID/status")

    monkeypatch.setattr(psutil.Process, "num_ctx_switches", uncounted)
    for _ in range(3):
        assert look(2, 1.0, 90) == 2


@pytest.mark.parametrize("kind, left", [("cpu", 1), ("cuda", 2)])
def test_threads_that_only_wait_for_a_gpu_do_not_give_way(sac, kind, left, monkeypatch):
    clock = itertools.count(step=2.1)
    main = threading.main_thread()
    tick = lambda: next(clock) if threading.current_thread() is main else 0.0  # noqa: E731
    monkeypatch.setattr(sac.time, "time", tick)
    monkeypatch.setattr(psutil, "Process", Crowded)
    torch.set_num_threads(2)
    threads = sac.Threads(2, torch.device(kind))
    threads.give_way()
    threads.give_way()
    assert torch.get_num_threads() == left


@pytest.mark.parametrize(
    "instructions, mode, told", [("AVX512", "", False), ("AVX2", "AVX2", False), ("AVX2", "", True)]
)
def test_giving_way_says_where_it_may_round_differently(
    sac, instructions, mode, told, monkeypatch, capsys
):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: instructions)
    monkeypatch.delenv("MKL_CBWR", raising=False)
    if mode:
        monkeypatch.setenv("MKL_CBWR", mode)
    clock = itertools.count(step=2.1)
    main = threading.main_thread()
    tick = lambda: next(clock) if threading.current_thread() is main else 0.0  # noqa: E731
    monkeypatch.setattr(sac.time, "time", tick)
    monkeypatch.setattr(psutil, "Process", Crowded)
    torch.set_num_threads(2)
    threads = sac.Threads(2, torch.device("cpu"))
    threads.give_way()
    threads.give_way()
    said = capsys.readouterr().out
    assert said.startswith("CPU is busy: using 1 thread until the next checkpoint")
    assert ("may round differently" in said) == told


class Quiet:
    """A process that is never interrupted."""

    def num_ctx_switches(self):
        return SimpleNamespace(voluntary=0, involuntary=0)


GIVING_WAY = ["--checkpoint-frequency=50", "--learning-starts=20", "--eval-frequency=0"]
GIVING_WAY += ["--compile=off"]


@pytest.fixture
def threads_of_updates(sac, monkeypatch, tmp_path, capsys, request):
    """Threads at each update of a run with two, where each step takes 2.1 seconds of waiting."""
    clock = itertools.count(step=2.1)
    main = threading.main_thread()
    threads = []
    update = sac.SAC.update

    def spy(*args):
        threads.append(torch.get_num_threads())
        return update(*args)

    def tick():
        # TensorBoard's thread, which asks when it likes, must not move the clock.
        return next(clock) if threading.current_thread() is main else 0.0

    with monkeypatch.context() as patch:
        patch.setattr(sac.time, "time", tick)
        patch.setattr(sac.time, "process_time", lambda: 0.0)  # all of it is waiting
        patch.setattr(psutil, "Process", request.param)
        patch.setattr(sac.SAC, "update", spy)
        agent = train(sac, tmp_path / "watched", monkeypatch, *GIVING_WAY, "--threads=2")
    said = capsys.readouterr().out
    assert said
    return SimpleNamespace(threads=threads, agent=agent, said=said)


@pytest.mark.slow
@once
@pytest.mark.parametrize("threads_of_updates", [Quiet], indirect=True)
def test_threads_stay_as_many_while_the_cores_are_free(threads_of_updates):
    assert threads_of_updates.threads == [2] * 40
    assert "using 1 thread" not in threads_of_updates.said


@pytest.mark.slow
@once
@pytest.mark.parametrize("threads_of_updates", [Crowded], indirect=True)
def test_threads_give_way_until_the_next_checkpoint(sac, threads_of_updates, tmp_path, monkeypatch):
    # One look begins the measurement, the next one ends it.
    assert threads_of_updates.threads == [1] * 30 + [2, 2] + [1] * 8
    assert threads_of_updates.said.count("using 1 thread until the next checkpoint") == 2
    alone = train(sac, tmp_path / "alone", monkeypatch, *GIVING_WAY, "--threads=1")
    same(threads_of_updates.agent, alone)


LONG = ["--total-timesteps=50000", "--learning-starts=49999"]
SHORT = ["--total-timesteps=49999", "--learning-starts=49998"]


@pytest.fixture
def compiled_functions(monkeypatch):
    """What was given to torch.compile: nothing is compiled."""
    functions = []

    def note(function, **_):
        functions.append(function)
        return function

    monkeypatch.setattr(torch, "compile", note)
    return functions


@pytest.mark.slow
@once
@pytest.mark.parametrize(
    "flags, compiles",
    [
        ([], False),
        (SHORT, False),
        (LONG, True),
        ([*LONG, "--compile=off"], False),
        (["--compile=on"], True),
    ],
)
def test_long_runs_compile_and_resumed_ones_go_on_as_they_began(
    sac, flags, compiles, tmp_path, monkeypatch, compiled_functions
):
    flags = [*flags, "--eval-frequency=0", "--checkpoint-frequency=100000"]
    monkeypatch.setattr(sac, "steps_per_action", lambda args: 20)  # as if actions were repeated
    train(sac, tmp_path / "run", monkeypatch, *flags, "--log-frequency=100000")
    first = len(compiled_functions)
    folder = only_run(tmp_path / "run")
    args = saved_args(folder)
    compiled_functions.clear()
    longer = max(50_000, args["total_timesteps"] + 1)
    again = [f"--resume={folder}", f"--total-timesteps={longer}", "--learning-starts=49999"]
    monkeypatch.setattr(sys, "argv", [f"{sac.__name__}.py", *again])
    sac.main()

    # A trial of the compiler, learn, act.
    assert first == len(compiled_functions) == 3 * compiles
    assert args["compile"] == ("on" if compiles else "off")


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize("steps, choice", [(49_999, "off"), (50_000, "on")])
def test_long_runs_compile_on_a_gpu_too(sac, kind, steps, choice, monkeypatch):
    """There a CUDA graph pays most. The trial of the compiler is left out: it needs the GPU."""
    monkeypatch.setattr(sac.torch, "compile", lambda function: lambda ones: ones)
    monkeypatch.setattr(sac.torch, "ones", lambda size, device: None)
    args = sac.Args(total_timesteps=steps)
    sac.choose_compilation(args, torch.device(kind))
    assert args.compile == choice


@pytest.mark.parametrize(
    "kind, lacking", [("cpu", "C++ compiler or Python headers"), ("cuda", "Triton")]
)
def test_what_compilation_lacks_is_named(sac, kind, lacking, monkeypatch, capsys):
    def compile(function):
        raise RuntimeError("it lacks a header")

    monkeypatch.setattr(sac.torch, "compile", compile)
    args = sac.Args(compile="on")
    sac.choose_compilation(args, torch.device(kind))
    assert args.compile == "off"
    said = capsys.readouterr().out
    assert f"no working {lacking}: " in said
    assert said.endswith(" (it lacks a header)\n")


# The folder of compiled code ----------------------------------------------------------------------


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home without settings."""
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_compiled_code_is_kept_in_the_users_cache(sac, home, compiled_functions):
    sac.choose_compilation(sac.Args(compile="on"), torch.device("cpu"))
    folder = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    assert folder.parent == home / ".cache" / "one-file-sac"
    assert folder.is_dir()


def test_each_kind_of_processor_keeps_its_own_code(sac, home, monkeypatch):
    """Machines may share a home, and PyTorch takes what was compiled for another processor."""
    known = torch.cpu.get_capabilities()
    newer = known | dict(avx512_bf16=not known.get("avx512_bf16"))
    kinds = [("AVX2", known), ("AVX512", known), ("AVX512", newer), ("AVX512", newer)]
    folders = []
    for vectors, capabilities in kinds:
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda v=vectors: v)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda c=capabilities: c)
        sac.keep_compiled_code()
        folders.append(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    assert len({*folders[:3]}) == 3 and folders[2] == folders[3]


@pytest.mark.slow
@once
@needs_compiler
def test_code_for_other_vectors_is_not_taken_from_the_cache(sac, home):
    """In one folder the second of these finds the first one's code, which it cannot compile."""
    program = home / "program.py"
    choose = "choose_compilation(Args(compile='on'), torch.device('cpu'))"
    program.write_text(f"import torch\nfrom {Path(sac.__file__).stem} import *\n{choose}\n")
    for vectors in ("", "default"):
        environment = dict(PYTHONPATH=str(Path(sac.__file__).parent), ATEN_CPU_CAPABILITY=vectors)
        code, out, err = run(home, program, "", **environment)
        assert code == 0 and "no working" not in out, out + err


def test_the_users_cache_may_be_elsewhere(sac, home, monkeypatch, compiled_functions):
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "elsewhere"))
    sac.choose_compilation(sac.Args(compile="on"), torch.device("cpu"))
    folder = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    assert folder.parent == home / "elsewhere" / "one-file-sac"


def test_a_folder_of_the_users_choice_stays(sac, home, monkeypatch, compiled_functions):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/of/my/own")
    sac.choose_compilation(sac.Args(compile="on"), torch.device("cpu"))
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/of/my/own"
    assert not list(home.iterdir())


def test_where_no_cache_can_be_made_pytorch_chooses(sac, home, compiled_functions):
    (home / ".cache").write_text("a file")
    args = sac.Args(compile="on")
    sac.choose_compilation(args, torch.device("cpu"))
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
    assert args.compile == "on"


def test_where_the_cache_cannot_be_written_pytorch_chooses(
    sac, home, monkeypatch, compiled_functions
):
    asked = []
    monkeypatch.setattr(os, "access", lambda path, mode: asked.append((path, mode)))
    sac.choose_compilation(sac.Args(compile="on"), torch.device("cpu"))
    ((folder, how),) = asked
    assert folder.parent == home / ".cache" / "one-file-sac" and how == os.W_OK
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ


def test_without_compilation_nothing_is_kept(sac, home, compiled_functions):
    sac.choose_compilation(sac.Args(compile="off"), torch.device("cpu"))
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
    assert not list(home.iterdir())


# GPUs ---------------------------------------------------------------------------------------------


@once
@needs_gpu
def test_a_gpu_update_equals_the_cpu_one(sac):
    on_cpu, _ = make_agent(sac)
    on_gpu, _ = make_agent(sac)
    on_gpu.to("cuda")
    buffer = filled_buffer(sac)
    index, noise = draw(buffer, torch.Generator().manual_seed(0), 256)
    batch = buffer[index]

    expected = on_cpu.update(batch, noise)
    losses = on_gpu.update(sac.Batch(*(column.cuda() for column in batch)), noise.cuda())

    assert losses
    same({name: loss.cpu() for name, loss in losses.items()}, expected, 1e-4)


@pytest.mark.slow
@once
@needs_gpu
def test_a_captured_update_equals_the_eager_one(sac):
    """One compiled graph, replayed as a CUDA graph."""
    eager, args = make_agent(sac, compile="on")
    captured, _ = make_agent(sac)
    eager.to("cuda")
    captured.to("cuda")
    buffer = filled_buffer(sac, device="cuda")
    learn = learner(sac, captured, args, buffer)
    random = torch.Generator().manual_seed(0)
    for step in range(20):
        index, noise = draw(buffer, random, 256)
        expected = eager.update(buffer[index], noise)
        same(learn(index, noise), expected, 1e-5 * (step + 1))


# Precision ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["auto", "highest"])
def test_products_are_true_float32(sac, precision):
    sac.prepare_machine(sac.Args(matmul_precision=precision, threads=1), torch.device("cpu"))
    x = torch.rand(256, 256, generator=torch.Generator().manual_seed(0))
    error = (x @ x - x.double() @ x.double()).abs().max()
    assert error < 1e-3, "products around 64 were rounded to fewer bits than float32 has"


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_a_precision_is_set_as_it_is_asked_for(sac, precision):
    sac.prepare_machine(sac.Args(matmul_precision=precision, threads=1), torch.device("cpu"))
    assert torch.get_float32_matmul_precision() == precision


@pytest.mark.parametrize(
    "device, processor, precision",
    [
        ("cpu", dict(architecture="x86_64", amx_tile=False), "medium"),  # which is exact there
        ("cpu", dict(architecture="x86_64", amx_tile=True), "highest"),
        ("cpu", dict(architecture="x86_64"), "highest"),  # nothing else is known of it
        ("cpu", dict(architecture="aarch64", amx_tile=False), "highest"),
        ("cuda", dict(architecture="x86_64", amx_tile=False), "highest"),
    ],
)
def test_auto_never_rounds_to_fewer_bits(sac, device, processor, precision, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: processor)
    sac.prepare_machine(sac.Args(matmul_precision="auto", threads=1), torch.device(device))
    assert torch.get_float32_matmul_precision() == precision


def test_main_prepares_the_machine(sac, tmp_path, monkeypatch):
    """What the tests above ask for is what a run does, before it makes the agent."""
    prepared = []

    class Prepared(Exception):
        pass

    def make_agent(*_):
        raise Prepared

    def note(args, device):
        prepared.append(args.matmul_precision)

    flags = (SUITE_FLAGS if sac.__name__ == "sac_dmc" else FLAGS).split()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sac, "prepare_machine", note)
    monkeypatch.setattr(sac, "make_agent", make_agent)
    monkeypatch.setattr(sys, "argv", [sac.__name__, *flags, "--matmul-precision", "high"])
    with pytest.raises(Prepared):
        sac.main()
    assert prepared == ["high"]
