"""What benchmark/speed.py measures in its own process: updates, matrix products, and memory."""

import os
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from unittest import mock

import numpy as np
import psutil
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

import sac_continuous as sac

COLUMNS = ("part", "env_id", "variant", "threads", "setting", "round", "value", "unit")


def row(*values) -> dict:
    return dict(zip(COLUMNS, values, strict=True))


class Products(TorchDispatchMode):
    """Counts the matrix products that are made under it, by shape (batch, m, k, n)."""

    def __init__(self):
        super().__init__()
        self.shapes = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
        aten = torch.ops.aten
        if function.overloadpacket in (aten.mm, aten.bmm, aten.addmm, aten.baddbmm):
            a, b = arguments[-2:]  # What is added to the product, if anything, comes before them.
            self.shapes[(a.shape[0] if a.ndim == 3 else 1, *a.shape[-2:], b.shape[-1])] += 1
        return function(*arguments, **(kwargs or {}))


def sizes(env_id: str) -> tuple[int, int]:
    env = sac.make_env(sac.Args(env_id=env_id))
    return env.observation_space.shape[0], env.action_space.shape[0]


def prepared(obs_dim: int, action_dim: int, batch_size: int = 256, critics: int = 2):
    """An agent, and its update from random transitions, compiled as in training."""
    with mock.patch.object(sac, "Critics", partial(sac.Critics, n_critics=critics)):
        agent = sac.SAC(obs_dim, action_dim, sac.Args())
    random, rows = np.random.default_rng(0), 20_000
    buffer = sac.ReplayBuffer(rows, obs_dim, action_dim)
    obs = random.normal(size=(rows, obs_dim))
    action = random.uniform(-1, 1, (rows, action_dim))
    reward = np.ones(rows)
    buffer.add(obs, action, reward, 0 * reward, obs)
    generator = torch.Generator().manual_seed(0)
    torch._dynamo.config.trace_autograd_ops = True
    learning = lambda index, noise: agent.update(buffer[index], noise)
    update = torch.compile(learning, fullgraph=True, dynamic=False, options={"cpp_wrapper": True})

    def learn():
        noise = torch.randn((2, batch_size, action_dim), generator=generator)
        return update(buffer.sample_index(batch_size, generator), noise)

    return agent, learn


def milliseconds(function, seconds: float = 1.0) -> float:
    """Median duration of a call, over as many as fit into `seconds`."""
    durations, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end or len(durations) < 5:
        began = time.perf_counter()
        function()
        durations.append(time.perf_counter() - began)
    return 1e3 * statistics.median(durations)


def settle(threads: int):
    """What a script sets before it trains."""
    sac.prepare_machine(sac.Args(threads=threads), torch.device("cpu"))


def floor(args) -> Iterator[dict]:
    """The matrix products of one update alone, each as fast as PyTorch makes it."""
    for env_id in args.env_ids:
        obs_dim, action_dim = sizes(env_id)
        settle(1)
        agent = sac.SAC(obs_dim, action_dim, sac.Args())
        buffer = sac.ReplayBuffer(300, obs_dim, action_dim)
        buffer.rows.normal_()
        with Products() as products:
            agent.update(buffer[torch.arange(256)], torch.randn(2, 256, action_dim))
        flops = sum(n * 2 * np.prod(shape) for shape, n in products.shapes.items())
        yield row("floor", env_id, "one update", 0, "", 0, flops / 1e9, "GFLOP")
        for turn in range(args.rounds):
            for threads in (1, 2):
                settle(threads)
                total = 0.0
                for (batch, m, k, n), count in products.shapes.items():
                    a, b = torch.randn(batch, m, k), torch.randn(batch, k, n)
                    product = partial(torch.bmm, a, b, out=torch.empty(batch, m, n))
                    total += count * milliseconds(product, 0.1)
                speed = flops / 1e6 / total
                yield row("floor", env_id, "products of one update", threads, "", turn, total, "ms")
                yield row("floor", env_id, "products", threads, "", turn, speed, "GFLOP/s")


def update(args) -> Iterator[dict]:
    """Compiled updates against critics and batch size; steps against environments and updates."""
    threads = min(2, os.cpu_count())
    obs_dim, action_dim = sizes("Hopper-v4")
    settle(threads)
    torch._dynamo.config.recompile_limit = 100  # all the cases are of one function
    cases = {f"{n} critics": prepared(obs_dim, action_dim, critics=n)[1] for n in (2, 3, 5, 10)}
    for n in (64, 256, 1024, 4096):
        cases[f"batch {n}"] = prepared(obs_dim, action_dim, batch_size=n)[1]
    agent, learn = prepared(obs_dim, action_dim)

    def stepper(n_envs: int, updates: int):
        envs, obs = sac.make_vector_env([lambda: sac.make_env(sac.Args())] * n_envs, (1, 0, 0))
        noise = torch.randn(n_envs, action_dim)

        def step():
            envs.step(agent.act(obs, noise))
            for _ in range(updates):
                learn()

        return step

    pairs = [(1, 1), (1, 2), (1, 4), (1, 8), (4, 4), (16, 16), (4, 1), (16, 1)]
    steps = {f"{n} envs stepped together, then {k} updates": (stepper(n, k), n) for n, k in pairs}
    for function in tqdm([*cases.values(), learn], desc="compiling"):
        function()
    for turn in tqdm(range(args.rounds), desc="updating"):
        for name, function in cases.items():
            value = milliseconds(function)
            yield row("update", "Hopper-v4", "one update", threads, name, turn, value, "ms")
        for name, (function, n_envs) in steps.items():
            value, unit = 1e3 * n_envs / milliseconds(function), "steps/s"
            yield row("update", "Hopper-v4", "environment steps", threads, name, turn, value, unit)


def memory(args) -> Iterator[dict]:
    """Resident memory of a buffer for a million transitions, as it fills."""
    for env_id in args.env_ids:
        obs_dim, action_dim = sizes(env_id)
        before = psutil.Process().memory_info().rss
        buffer = sac.ReplayBuffer(1_000_000, obs_dim, action_dim)
        for filled in (0, 10_000, 50_000, 100_000):
            obs, reward = np.zeros((100, obs_dim)), np.zeros(100)
            action = np.zeros((100, action_dim))
            # in small pieces, as training does, so that no large temporary is counted
            while len(buffer) < filled:
                buffer.add(obs, action, reward, reward, obs)
            resident = (psutil.Process().memory_info().rss - before) / 2**20
            setting = f"{filled} of 1,000,000 rows"
            yield row("memory", env_id, "replay buffer", 0, setting, 0, resident, "MiB")
        del buffer
