"""Soft Actor-Critic (Haarnoja et al. 2018, arXiv 1812.05905) with the variants of the literature.

    python sac_ablations.py --env-id Hopper-v4 --n-critics 5          # train; results in runs/
    python sac_ablations.py --evaluate runs/<folder> --capture-video  # see what was learned

This is sac_continuous.py with an `if` for each variant. With none chosen it computes the same bits.

A policy pi maximises the discounted sum of reward + alpha * entropy of pi. Two critics Q_c learn
the soft Q-value of an action: its reward, and gamma times that sum from the next state on. They
learn from replayed (s, a, r, s', d), d = 1 where the task itself ended. Target networks Q', slow
copies of the critics, make the targets:

    (1)  y       = r + gamma (1 - d) (min_c Q'_c(s', a') - alpha log pi(a'|s')),   a' ~ pi(.|s')
    (2)  L_Q     = mean over critics and batch of (Q_c(s, a) - y)^2
    (3)  L_pi    = mean of alpha log pi(a|s) - min_c Q_c(s, a),  a = tanh(mean(s) + std(s) * noise)
    (4)  L_alpha = log(alpha) (entropy - target),  entropy = mean of -log pi(a|s),  target = -dim(A)
    (5)  Q'_c   <- (1 - tau) Q'_c + tau Q_c

alpha, the temperature, is the reward for one nat (unit) of entropy. In (2) a is the replayed
action, in (3) and (4) a new one, drawn from pi. Why the minimum? A policy seeks out the errors of
a single critic. Why slow copies? A critic that makes its own targets moves them with each step.

No gradient flows into y, into alpha in (3) or into the entropy in (4). It does flow through the
action in (3), whose noise is held fixed (reparameterization).
The paper's (4) has alpha in place of log(alpha).

Read in this order: Batch, Actor, Critics, the equations in SAC, the loop in train(). Everything
below the line "Plumbing" may be skipped: Adam, environments, checkpoints, logs, checks, speed.
docs/walkthrough.md derives the equations, beside the lines that compute them.

Shapes: B batch, N environments, C critics, O observation and A action dimensions, H hidden units.
"""

import copy
import ctypes
import json
import logging
import math
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import typing
import warnings
import zipfile
import zlib
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C in the slow imports ends in silence

import gymnasium as gym
import numpy as np
import psutil
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    """Every count of steps is in environment steps, summed over the environments."""

    env_id: str = "Hopper-v4"  # Gymnasium environment with bounded Box actions (or "module:name")
    seed: int = 1  # seed of weights, noise, sampling and environments
    total_timesteps: int = 1_000_000  # length of the run
    num_envs: int = 1  # environments stepped together; one update for each of their actions

    # The algorithm
    buffer_size: int = 1_000_000  # transitions kept for replay
    gamma: float = 0.99  # discount per action
    tau: float = 0.005  # step of the target critics towards the critics at each update (Polyak)
    batch_size: int = 256  # transitions per update
    learning_starts: int = 5_000  # steps of uniformly random actions before the first update
    policy_lr: float = 3e-4  # Adam's learning rate of the policy and of the temperature
    q_lr: float = 1e-3  # Adam's learning rate of the critics, as in CleanRL

    # Evaluation, checkpoints and logs
    eval_frequency: int = 10_000  # steps between evaluations of the deterministic policy; 0: none
    eval_episodes: int = 10  # episodes per evaluation, each cut at 10,000 steps
    checkpoint_frequency: int = 50_000  # steps between checkpoints; each restarts the environments
    log_frequency: int = 1_000  # steps between logs of metrics and speed
    resume: Path | None = None  # run folder to continue; its flags hold unless given anew
    evaluate: Path | None = None  # run folder (last checkpoint, else model.pt), or best.pt in one
    capture_video: bool = False  # record the first episode of each evaluation as mp4
    track: bool = False  # log to Weights & Biases as well
    wandb_project_name: str = "one-file-sac"  # Weights & Biases project
    wandb_entity: str | None = None  # Weights & Biases team
    exp_name: str = "sac_ablations"  # part of the run folder's name

    # The machine
    cuda: bool = True  # use a GPU when there is one
    threads: int = min(2, torch.get_num_threads())  # CPU threads; on Linux 1 while cores are busy
    # compile the update; auto: in runs of 50,000 steps or more
    compile: Literal["auto", "on", "off"] = "auto"
    # precision of matrix products; auto: float32; medium: critics in bfloat16 (docs/speed.md)
    matmul_precision: Literal["auto", "highest", "high", "medium"] = "auto"

    # Variants: how many critics
    n_critics: int = 2  # number of critics
    critics_subset: int = 0  # REDQ: critics drawn per target, 0: all; the policy follows the mean

    # Variants: delayed policy updates
    policy_frequency: int = 1  # critic updates per policy update
    compensate: bool = True  # make up for the delay by as many policy updates at once

    # Variants: temperature
    autotune: bool = True  # learn the temperature
    alpha: float = 1.0  # fixed temperature, or where learning it starts
    alpha_lr: float = 0.0  # Adam's learning rate of the temperature; 0: that of the policy
    target_entropy: float | None = None  # nats; None: -dim(A) times the scale
    target_entropy_scale: float = 1.0  # factor of -dim(A)
    alpha_loss: Literal["log-alpha", "alpha"] = "log-alpha"  # factor in the temperature's loss

    # Variants: the policy's distribution
    log_std: Literal["clamp", "tanh"] = "clamp"  # how the log standard deviation is bounded
    log_std_min: float = -20.0  # lower bound
    log_std_max: float = 2.0  # upper bound
    heads: Literal["joint", "separate"] = "joint"  # last layer initialised as one or as two
    tanh_correction: Literal["softplus", "eps"] = "softplus"  # eps: log(1 - a^2 + 1e-6)
    scaled_log_prob: bool = False  # density of the environment's actions, not of those in [-1, 1]
    policy_l2: float = 0.0  # factor of half the policy's squared weights and biases in its loss

    # Variants: networks
    hidden: int = 256  # width of the hidden layers
    layers: int = 2  # number of hidden layers
    init: Literal["xavier", "torch", "orthogonal", "normal"] = "xavier"  # weights; normal: N(0, 1)
    activation: Literal["ReLU", "Tanh", "ELU", "GELU", "SiLU"] = "ReLU"  # after each hidden layer
    layer_norm: bool = False  # in the critics and V, before each activation, no learned gain
    dropout: float = 0.0  # dropout probability in critics and V; DroQ: --critics-subset 2
    spectral_norm: bool = False  # critics and V: largest singular value of hidden weights about 1
    value_network: bool = False  # as in the first SAC paper, V and its slow copy make the targets

    # Variants: reward and data
    reward_scale: float = 1.0  # factor of the stored rewards
    random_steps: int = -1  # steps of random actions; -1: as many as --learning-starts
    hold_noise: int = 1  # how often in a row each random action is taken
    truncation_terminates: bool = False  # treat truncation by a time limit as termination
    combined_replay: bool = False  # CER: each batch has the newest rows stored, --num-envs of them
    prioritized_replay: bool = False  # PER: sample by TD error, weight by importance
    n_step: int = 1  # rewards that a target sums before it bootstraps

    # Variants: goals
    hindsight: int = 0  # HER: copies of each transition stored with another goal; 0: none
    hindsight_strategy: Literal["future", "final"] = "future"  # when that goal was reached
    clip_targets: bool = False  # targets within what rewards in [-1, 0] can return

    # Variants: when updates come
    updates_per_step: float = 1.0  # updates per action of each environment (UTD ratio)
    update_interval: int = 1  # steps between blocks of updates
    target_network_frequency: int = 1  # critic updates per target update; hard ones with --tau 1

    # Variants: observations and actions
    normalize_obs: bool = False  # feed (obs - mean) / std of all stored so far, clipped to [-5, 5]
    stack: int = 1  # newest observations fed together, zeros before the first
    action_repeat: int = 1  # environment steps per action, rewards summed

    # other defaults, those of an implementation or a paper; flags given beside it win
    preset: Literal[
        "none", "haarnoja", "stable-baselines", "spinningup", "yarats", "deepunity", "lunarlander"
    ] = "none"


PRESETS = {
    # The first four are as a blog post tabulates them, "Soft Actor-Critic: Reimplementation and
    # Experiments". Haarnoja's first paper, with a reward scale of 5, has a value network, as has
    # Stable Baselines 2, which keeps 50,000 transitions and begins with 100 random steps. The code
    # of Yarats starts from orthogonal weights and has alpha in the loss of the temperature.
    "haarnoja": "--learning-starts 1000 --no-autotune --reward-scale 5 --q-lr 3e-4",
    "stable-baselines": "--random-steps 0 --learning-starts 100 --buffer-size 500000 "
    "--batch-size 64 --hidden 64 --q-lr 3e-4 --heads separate",
    "spinningup": "--random-steps 10000 --learning-starts 1000 --batch-size 100 --no-autotune "
    "--alpha 0.2 --policy-lr 1e-3 --update-interval 50 --init torch --heads separate",
    "yarats": "--batch-size 1024 --hidden 1024 --alpha 0.1 --log-std tanh --log-std-min -5 "
    "--init torch --policy-lr 1e-4 --q-lr 1e-4 --target-network-frequency 2",
    # Ciobanu 2024, Policy Gradient Methods: table 3.1, the defaults of a library for Unity.
    "deepunity": "--activation Tanh --hidden 64 --batch-size 128 --learning-starts 1024 "
    "--update-interval 64 --updates-per-step 0.015625 --no-autotune --alpha 0.2 --q-lr 3e-4",
    # Coupal 2020, Directed reading on SAC: LunarLanderContinuous.
    "lunarlander": "--value-network --hidden 200 --batch-size 200 --buffer-size 50000 "
    "--policy-lr 3e-3 --q-lr 3e-3 --reward-scale 40 --no-autotune --learning-starts 20000",
}


# Replay buffer ------------------------------------------------------------------------------------

class Batch(NamedTuple):
    obs: torch.Tensor  # (B, O)
    action: torch.Tensor  # (B, A) in [-1, 1]; make_env() rescales it to the task's own bounds
    reward: torch.Tensor  # (B,)
    terminated: torch.Tensor  # (B,) 1.0 where the task itself ended, else 0.0, even at a time limit
    next_obs: torch.Tensor  # (B, O) the true last observation where an episode ended


class ReplayBuffer:
    """Ring of the newest `capacity` transitions, one float32 row each, columns as in Batch."""

    def __init__(
        self, capacity: int, obs_dim: int, action_dim: int, device="cpu", args: Args = Args()
    ):
        self.args = args
        self.widths = [obs_dim, action_dim, 1, 1, obs_dim]
        if args.n_step > 1:
            self.widths.append(1)  # the steps that a transition spans
        if args.prioritized_replay:
            self.widths.append(1)  # a transition's priority
            # Of the batch drawn last.
            self.importance_weights = torch.ones(args.batch_size, device=device)
        # On a CPU, the memory of an empty tensor is handed out only as its rows are written.
        self.rows = torch.empty(capacity, sum(self.widths), device=device)
        self.count = 0  # transitions ever added

    def __len__(self) -> int:
        return min(self.count, len(self.rows))

    def add(self, obs, action, reward, terminated, next_obs, steps=None):
        """Store N transitions: arrays (N, O), (N, A), (N,), (N,), (N, O); with --n-step (N,)."""
        columns = (obs, action, reward[:, None], terminated[:, None], next_obs)
        if self.args.n_step > 1:
            columns += (steps[:, None],)
        if self.args.prioritized_replay:
            # New transitions get the highest priority in the buffer: each is probably drawn soon.
            highest = self.rows[: len(self), -1].max().item() if self.count else 1
            columns += (np.full((len(obs), 1), highest),)
        rows = np.concatenate(columns, axis=1, dtype=np.float32)
        for row in torch.from_numpy(rows):
            self.rows[self.count % len(self.rows)] = row
            self.count += 1

    def sample_index(self, batch_size: int, generator: torch.Generator) -> torch.Tensor:
        """Row indices (B,), drawn with replacement, uniformly or by priority.

        With PER the weights of their errors are then in `importance_weights`.
        """
        device = self.rows.device
        index = torch.randint(len(self), (batch_size,), generator=generator, device=device)
        if self.args.prioritized_replay:
            # PER (Schaul et al. 2015, arXiv 1511.05952), proportional. The exponents 0.7 and 0.5
            # and the offset 0.1 are those of study F17's source; the paper has 0.6 and 0.4.
            priority = self.rows[: len(self), -1].double() ** 0.7
            index = priority.multinomial(batch_size, replacement=True, generator=generator)
        if self.args.combined_replay:
            # CER (Zhang & Sutton 2017, arXiv 1712.01275).
            for i in range(min(self.args.num_envs, batch_size)):
                index[i] = (self.count - 1 - i) % len(self.rows)
        if self.args.prioritized_replay:
            # Importance weights over the batch's largest: size and sum of the buffer cancel.
            progress = self.count * self.args.action_repeat / self.args.total_timesteps
            progress /= 1 + self.args.hindsight
            beta = 0.5 + 0.5 * progress
            self.importance_weights.copy_((priority[index] / priority[index].min()) ** -beta)
        return index

    def set_priorities(self, index: torch.Tensor, td_error: torch.Tensor):
        # multinomial() refuses a NaN. Here it counts as 0, and the next log stops the run and says
        # what diverged.
        self.rows[index, -1] = td_error.nan_to_num() + 0.1

    def __getitem__(self, index: torch.Tensor) -> Batch:
        """The transitions in the rows `index` (B,)."""
        columns = self.rows[index].split(self.widths, dim=1)
        obs, action, reward, terminated, next_obs = columns[:5]
        return Batch(obs, action, reward.squeeze(1), terminated.squeeze(1), next_obs)

    def steps(self, index: torch.Tensor) -> torch.Tensor:
        """With --n-step: how many steps (B,) lie between obs and next_obs in these rows."""
        return self.rows[index, sum(self.widths[:5])]


# Networks -----------------------------------------------------------------------------------------

def init_like_torch(weight: torch.Tensor):
    """As nn.Linear starts: U(-1, 1) / sqrt(fan_in), for a weight (out, in)."""
    nn.init.kaiming_uniform_(weight, math.sqrt(5))


INITS = {
    "xavier": nn.init.xavier_uniform_,
    "torch": init_like_torch,
    "orthogonal": nn.init.orthogonal_,
    "normal": nn.init.normal_,
}


class Actor(nn.Module):
    """Policy over actions in [-1, 1]^A: tanh of a Gaussian with state-dependent mean and std."""

    def __init__(self, obs_dim: int, action_dim: int, hidden: int = 256, args: Args = Args()):
        super().__init__()
        self.args = args
        self.log_scale = 0.0  # log of the volume that one unit of volume in [-1, 1]^A stands for
        layers = []
        for width in [obs_dim] + [hidden] * (args.layers - 1):
            layers += [nn.Linear(width, hidden), getattr(nn, args.activation)()]
        self.layers = nn.Sequential(*layers, nn.Linear(hidden, 2 * action_dim))
        for layer in self.layers[::2]:  # the linear ones
            heads = 1
            if args.heads == "separate" and layer is self.layers[-1]:
                heads = 2
            for weight in layer.weight.data.chunk(heads):
                INITS[args.init](weight)
            if args.init != "torch":
                nn.init.zeros_(layer.bias)

    def forward(self, obs: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Actions (B, A) and their log-densities (B,), from standard normal noise (B, A).

        The noise is an argument, so that an update is a function of its inputs: compiled or not, it
        sees the same random numbers. Zero noise gives the deterministic action tanh(mean).
        """
        mean, log_std = self.layers(obs).chunk(2, dim=-1)
        low, high = self.args.log_std_min, self.args.log_std_max
        if self.args.log_std == "tanh":
            # As in denisyarats/pytorch_sac.
            log_std = low + (high - low) / 2 * (log_std.tanh() + 1)
        else:
            log_std = log_std.clamp(low, high)  # by default std in [2e-9, 7.4], as in Spinning Up
        u = mean + log_std.exp() * noise
        # The log-density of the Gaussian at u, where (u - mean) / std is the noise itself.
        log_prob_u = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
        # Change of variables: the density of tanh(u) is that of u divided by the slope
        # 1 - tanh(u)^2. This form of the slope's logarithm neither overflows nor loses its gradient
        # where tanh saturates.
        log_slope = 2 * (math.log(2) - u - F.softplus(-2 * u))
        if self.args.tanh_correction == "eps":
            # Haarnoja et al. 2018, appendix C, with the usual guard against log(0).
            log_slope = (1 - u.tanh().square() + 1e-6).log()
        log_prob = (log_prob_u - log_slope).sum(-1)
        if self.args.scaled_log_prob:
            log_prob = log_prob - self.log_scale
        return u.tanh(), log_prob


class Critics(nn.Module):
    """C independent Q-networks as one: weights (C, in, out), so a layer is one batched product."""

    def __init__(
        self,
        obs_dim: int,
        action_dim: int,
        hidden: int = 256,
        n_critics: int = 2,
        args: Args = Args(),
    ):
        super().__init__()
        self.args = args
        self.activation = getattr(nn, args.activation)()
        widths = [obs_dim + action_dim, *[hidden] * args.layers, 1]
        sizes = list(zip(widths, widths[1:]))
        self.weights = nn.ParameterList([torch.empty(n_critics, *size) for size in sizes])
        self.biases = nn.ParameterList([torch.zeros(n_critics, 1, fan_out) for _, fan_out in sizes])
        for weight in self.weights:
            # One critic at a time: xavier_uniform_ would take all three dimensions for those of a
            # convolution, and misjudge the number of inputs.
            for one_critic in weight.data:
                INITS[args.init](one_critic.T)
        if args.init == "torch":
            for bias, (fan_in, _) in zip(self.biases, sizes):
                nn.init.uniform_(bias, -(fan_in**-0.5), fan_in**-0.5)
        if args.spectral_norm:
            # Singular vectors, found by a power iteration that each use carries on.
            for layer in range(args.layers):
                self.register_buffer(f"direction{layer}", torch.randn(n_critics, hidden, 1))

    def forward(self, obs: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        """Q-values (C, B) of observations (B, O) and actions (B, A)."""
        x = torch.cat([obs, action], dim=-1).expand(len(self.weights[0]), -1, -1)  # (C, B, O + A)
        for layer in range(self.args.layers):
            x = self.linear(x, layer)
            if self.args.dropout > 0:
                # DroQ (Hiraoka et al. 2022, arXiv 2110.02034).
                x = F.dropout(x, self.args.dropout)
            if self.args.layer_norm:
                x = F.layer_norm(x, x.shape[-1:])
            x = self.activation(x)
        # (C, B, H) * (C, 1, H), summed over the H hidden units: with one output this is faster
        # than a batched product.
        return (x * self.weights[-1].mT).sum(-1) + self.biases[-1].squeeze(-1)

    def linear(self, x: torch.Tensor, layer: int) -> torch.Tensor:
        """(C, B, in) to (C, B, out)."""
        return self.multiply(x, self.weight(layer)) + self.biases[layer]

    def multiply(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x @ weight

    def weight(self, layer: int) -> torch.Tensor:
        """The weights (C, in, out) of a hidden layer, divided by their norm if that is wanted."""
        weight = self.weights[layer]
        if self.args.spectral_norm:
            # Miyato et al. 2018 (arXiv 1802.05957). Each call is one more step of the power
            # iteration that finds the largest singular value.
            right = getattr(self, f"direction{layer}")
            constant = weight.detach()
            left = F.normalize(constant @ right, dim=1)
            right.copy_(F.normalize(constant.mT @ left, dim=1))
            weight = weight / (left.mT @ weight @ right)
        return weight


class StateValue(Critics):
    """One network V(s), with the critics' layers but without an action."""

    def __init__(self, obs_dim: int, hidden: int, args: Args):
        super().__init__(obs_dim, 0, hidden, 1, args)

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        """Values (B,) of observations (B, O)."""
        return super().forward(obs, obs[:, :0])[0]


# Soft Actor-Critic --------------------------------------------------------------------------------

class SAC(nn.Module):
    """The agent: every tensor that learning changes. Its state_dict() includes the optimizers."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.args = args
        self.obs_dim = obs_dim
        self.action_dim = action_dim
        self.gamma = args.gamma
        self.tau = args.tau
        self.target_entropy = -args.target_entropy_scale * action_dim
        if args.target_entropy is not None:
            self.target_entropy = args.target_entropy
        self.actor = Actor(obs_dim, action_dim, args.hidden, args)
        self.critics = Critics(obs_dim, action_dim, args.hidden, args.n_critics, args)
        self.target_critics = copy.deepcopy(self.critics).requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.tensor(math.log(args.alpha)))
        self.actor_optimizer = Adam(self.actor.parameters(), args.policy_lr)
        self.critic_optimizer = Adam(self.critics.parameters(), args.q_lr)
        if args.autotune:
            self.alpha_optimizer = Adam([self.log_alpha], args.alpha_lr or args.policy_lr)
        if args.value_network:
            self.value = StateValue(obs_dim, args.hidden, args)
            self.target_value = copy.deepcopy(self.value).requires_grad_(False)
            self.value_optimizer = Adam(self.value.parameters(), args.q_lr)
        if args.normalize_obs:
            # Number, sum and sum of squares of all observations seen.
            self.register_buffer("moments", torch.zeros(3, obs_dim).double())

    def observe(self, obs: np.ndarray):
        """Count observations (N, O) for the normalization."""
        moments = np.stack([obs**0, obs, obs.astype(float) ** 2]).sum(1)
        self.moments += torch.from_numpy(moments).to(self.moments.device)

    def normalize(self, obs: torch.Tensor) -> torch.Tensor:
        _, mean, square = self.moments / self.moments[0].clamp(min=1)
        std = (square - mean.square()).clamp(min=1e-12).sqrt()
        return ((obs - mean) / std).clamp(-5, 5).to(obs.dtype)

    def update(
        self,
        batch: Batch,
        noise: torch.Tensor,
        policy_updates: int = 1,
        weight: torch.Tensor = 1.0,
        steps: torch.Tensor = 1.0,
    ) -> dict[str, torch.Tensor]:
        """A step of critics, policy and temperature, from noise (1 + policy updates, B, A).

        Each optimizer's minimize(loss) is a step of Adam on its own parameters only. So the
        gradient of (3) passes through the critics to the action, and leaves their weights as they
        are. Returns 0-d tensors to log, and with prioritized replay td_error (B,). The critics'
        squared errors count by `weight` (B,), and next_obs is `steps` (B,) after obs.
        """
        if self.args.normalize_obs:
            obs, next_obs = self.normalize(batch.obs), self.normalize(batch.next_obs)
            batch = batch._replace(obs=obs, next_obs=next_obs)
        if self.args.value_network:
            self.update_value(batch, noise[0])
        alpha = self.log_alpha.detach().exp()  # the same for all policy updates
        metrics = self.update_critics(batch, noise[0], weight, steps)
        for i in range(policy_updates):
            metrics |= self.update_actor_and_alpha(batch, noise[1 + i], alpha)
        self.update_target_critics()
        return metrics

    def update_value(self, batch: Batch, noise: torch.Tensor):
        """V learns min_c Q_c(s, a) - alpha log pi(a|s) (Haarnoja et al. 2018, arXiv 1801.01290)."""
        alpha = self.log_alpha.detach().exp()
        with torch.no_grad():
            action, log_prob = self.actor(batch.obs, noise)
            soft_value = self.critics(batch.obs, action).amin(0) - alpha * log_prob
        value_loss = (self.value(batch.obs) - soft_value).square().mean()
        self.value_optimizer.minimize(value_loss)

    def update_critics(
        self, batch: Batch, noise: torch.Tensor, weight: torch.Tensor, steps: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        alpha = self.log_alpha.detach().exp()
        with torch.no_grad():
            next_action, next_log_prob = self.actor(batch.next_obs, noise)
            next_q = self.target_critics(batch.next_obs, next_action)
            if self.args.critics_subset:
                # REDQ (Chen et al. 2021, arXiv 2101.05982).
                order = torch.randperm(len(next_q), device=next_q.device)
                next_q = next_q[order[: self.args.critics_subset]]
            next_value = next_q.amin(0) - alpha * next_log_prob
            if self.args.value_network:
                next_value = self.target_value(batch.next_obs)
            gamma = self.gamma
            if self.args.n_step > 1:
                # N-step returns, uncorrected for old actions, as in Rainbow (Hessel et al. 2018,
                # arXiv 1710.02298). Entropy enters as in the one-step target, where it bootstraps:
                # the replayed actions in between add their rewards and no entropy of their own.
                gamma = gamma**steps
            target_q = batch.reward + gamma * (1 - batch.terminated) * next_value  # (1)
            if self.args.clip_targets:
                # Where rewards lie in [-1, 0] no return leaves these bounds (HER, appendix A).
                # A soft value may exceed 0 by its entropy: that is clipped too.
                lowest = -self.args.reward_scale * self.args.action_repeat / (1 - self.gamma)
                target_q = target_q.clamp(lowest, 0)
        q = self.critics(batch.obs, batch.action)  # (C, B): each critic has the same target (B,)
        critic_loss = (q - target_q).square().mean()  # (2)
        if self.args.prioritized_replay:
            critic_loss = (weight * (q - target_q).square()).mean()
        self.critic_optimizer.minimize(critic_loss)
        metrics = {
            "losses/qf_loss": critic_loss.detach(),
            "losses/qf1_values": q[0].mean().detach(),
            "losses/target_q": target_q.mean(),
            "losses/alpha": alpha,
        }
        if self.args.prioritized_replay:
            metrics["td_error"] = (q - target_q).abs().mean(0).detach()
        return metrics

    def update_actor_and_alpha(
        self, batch: Batch, noise: torch.Tensor, alpha: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        action, log_prob = self.actor(batch.obs, noise)
        q = self.critics(batch.obs, action)
        min_q = q.mean(0) if self.args.critics_subset else q.amin(0)
        actor_loss = (alpha * log_prob - min_q).mean()  # (3)
        if self.args.policy_l2 > 0:
            squares = sum(p.square().sum() for p in self.actor.parameters())
            actor_loss = actor_loss + self.args.policy_l2 / 2 * squares
        self.actor_optimizer.minimize(actor_loss)

        entropy = -log_prob.detach().mean()
        metrics = {
            "losses/actor_loss": actor_loss.detach(),
            "losses/entropy": entropy,
        }
        if self.args.autotune:
            # This loss lowers alpha while entropy is above its target, and raises it while below.
            factor = self.log_alpha
            if self.args.alpha_loss == "alpha":
                factor = self.log_alpha.exp()
            alpha_loss = factor * (entropy - self.target_entropy)  # (4)
            self.alpha_optimizer.minimize(alpha_loss)
            metrics["losses/alpha_loss"] = alpha_loss.detach()
        return metrics

    @torch.no_grad()
    def update_target_critics(self):
        tau = self.tau
        if self.args.target_network_frequency > 1:
            # A product with 0 or 1, so that this can be part of a compiled graph.
            tau = tau * (self.critic_optimizer.steps % self.args.target_network_frequency == 0)
        for target, source in zip(self.target_critics.parameters(), self.critics.parameters()):
            target.lerp_(source, tau)  # (5)
        if self.args.value_network:
            for target, source in zip(self.target_value.parameters(), self.value.parameters()):
                target.lerp_(source, tau)
        if self.args.spectral_norm and self.tau == 1:
            # Slow copies find their singular vectors as they move. Hard ones need the source's.
            copies, sources = self.target_critics, self.critics
            if self.args.value_network:
                copies, sources = self.target_value, self.value
            for target, source in zip(copies.buffers(), sources.buffers()):
                target.lerp_(source, tau)

    @torch.no_grad()
    def act(self, obs: np.ndarray, noise: torch.Tensor) -> np.ndarray:
        """Actions (N, A) in [-1, 1] for observations (N, O) and standard normal noise (N, A)."""
        obs = torch.as_tensor(obs, dtype=torch.float32, device=noise.device)
        if self.args.normalize_obs:
            obs = self.normalize(obs)
        action, _ = self.actor(obs, noise)
        return action.cpu().numpy()

    @property
    def device(self) -> torch.device:
        return self.critics.weights[0].device


# Training and evaluation --------------------------------------------------------------------------

def train(args: Args, agent: SAC, folder: Path, checkpoint: dict | None) -> int:
    """Act, learn, step and store, report, until --total-timesteps. Returns the step reached."""
    # All of training's randomness but that of the environments comes from this one stream.
    generator = torch.Generator(agent.device).manual_seed(args.seed)
    buffer = make_buffer(args, agent, checkpoint)
    step = 0 if checkpoint is None else restore_replay(checkpoint, buffer, generator)
    logger = Logger(args, folder, step)
    threads = Threads(args.threads, generator.device)
    learn, act = compile_update(args, agent, buffer)
    storage = make_storage(args, agent, buffer, generator)
    if checkpoint is None:
        save_checkpoint(folder, agent, buffer, generator, step)  # it can be resumed from now on
    envs, obs = start_envs(args, step)
    metrics = {}
    while step < args.total_timesteps:
        if args.normalize_obs:
            agent.observe(obs)
        # Act: uniformly at random at first, then as the policy says.
        if step < random_steps(args):
            if storage.rounds % args.hold_noise == 0:
                action = uniform_actions((args.num_envs, agent.action_dim), generator)
        else:
            action = act(obs, normal_noise((args.num_envs, agent.action_dim), generator))
        stop_if_diverged(action, metrics, agent, buffer, step, folder)

        # Learn, once learning has started: one update per action, or as many as are due. Most
        # implementations step first. This order lets a GPU learn while the environments step.
        for update in updates_due(args, step):
            metrics |= learn_once(args, agent, buffer, generator, learn, update)
        threads.give_way()  # if other processes want the cores

        # Step, and store what happened. Where an episode ended, the environment has reset itself:
        # next_obs begins the next episode (autoreset SAME_STEP), final_obs has the true last one.
        next_obs, reward, terminated, truncated, info = envs.step(action)
        done = terminated | truncated
        real_next_obs = next_obs.copy()
        if done.any():
            real_next_obs[done] = np.stack(info["final_obs"][done])
        storage.add(obs, action, reward, terminated, real_next_obs, done)
        obs = next_obs
        step += steps_per_round(args)

        # Report: finished episodes, metrics, evaluations, checkpoints.
        logger.log(finished_episodes(args, info), step)
        if due(args, args.log_frequency, step) or due(args, args.checkpoint_frequency, step):
            stop_unless_finite(metrics | agent.state_dict(), step, folder)
            logger.log_metrics(metrics, step)
        if due(args, args.eval_frequency, step):
            returns, success = evaluate(agent, args, step, video=video_path(args, folder, step))
            logger.log_evaluation(returns, success, step)
            save_if_best(folder, agent, step, returns.mean())
        if due(args, args.checkpoint_frequency, step):
            storage.cut()
            save_checkpoint(folder, agent, buffer, generator, step)
            # Environments cannot be saved: a resumed run begins with new ones. So does this one.
            envs.close()
            envs, obs = start_envs(args, step)
            threads.reset()
            metrics = {}  # as after a resume, until the next update
    envs.close()
    logger.close()
    return step


def random_steps(args: Args) -> int:
    return args.learning_starts if args.random_steps < 0 else args.random_steps


def learn_once(args, agent, buffer, generator, learn, update: int) -> dict[str, torch.Tensor]:
    """The update of the given number: its noise and its batch, and what PER learns from it."""
    policy_updates = policy_updates_at(args, update)
    noise = normal_noise((1 + policy_updates, args.batch_size, agent.action_dim), generator)
    if args.critics_subset or args.dropout:
        # These draw from PyTorch's global stream: so they draw the same after a resume.
        seed = torch.randint(2**62, (), generator=generator, device=generator.device)
        torch.manual_seed(seed.item())
    index = buffer.sample_index(args.batch_size, generator)
    metrics = learn(index, noise, policy_updates)
    if args.prioritized_replay:
        buffer.set_priorities(index, metrics.pop("td_error"))
    # Those of the policy wait to be logged until it moves again. On a GPU later calls overwrite
    # what this one returned.
    return {name: value.clone() for name, value in metrics.items()}


def updates_due(args: Args, step: int) -> range:
    """The numbers of the updates in the round that begins at `step`, counted from 0."""
    return range(updates_until(args, step), updates_until(args, step + steps_per_round(args)))


def updates_until(args: Args, step: int) -> int:
    """Updates in all by `step`: they come in blocks, --update-interval steps apart."""
    learning_steps = max(0, step - args.learning_starts)
    in_whole_blocks = learning_steps // args.update_interval * args.update_interval
    return int(in_whole_blocks * args.updates_per_step / args.action_repeat)


def policy_updates_at(args: Args, update: int) -> int:
    """Policy updates in the given update: one, or with delayed ones none or several."""
    if update % args.policy_frequency != 0:
        return 0
    return args.policy_frequency if args.compensate else 1


def make_storage(
    args: Args, agent: SAC, buffer: ReplayBuffer, generator: torch.Generator
) -> "Storage":
    if args.n_step > 1:
        return NStepSums(args, buffer)
    if args.hindsight:
        return Hindsight(args, agent, buffer, generator)
    return Storage(args, buffer)


class Storage:
    """What of each round reaches the replay buffer: its transitions as they are."""

    def __init__(self, args: Args, buffer: ReplayBuffer):
        self.args = args
        self.buffer = buffer
        self.rounds = 0  # since the environments were made
        self.running = [[] for _ in range(args.num_envs)]  # steps of running episodes, to be stored

    def add(self, obs, action, reward, terminated, next_obs, done):
        """Transitions of N environments, as in ReplayBuffer, and which episodes ended (N,)."""
        if self.args.truncation_terminates:
            terminated = done
        if self.args.clip_targets:
            self.check_bounds(reward)
        self.rounds += 1
        self.store(obs, action, self.args.reward_scale * reward, terminated, next_obs, done)

    def check_bounds(self, reward):
        """End the program where a reward is outside what --clip-targets can hold."""
        outside = reward[~((-self.args.action_repeat <= reward) & (reward <= 0))]
        if len(outside):
            fail(f"--clip-targets is for rewards in [-1, 0], not {outside[0]:g}: leave it out")

    def store(self, obs, action, reward, terminated, next_obs, done):
        self.buffer.add(obs, action, reward, terminated, next_obs)

    def cut(self):
        """Keep nothing back: the environments are about to be made anew."""
        self.rounds = 0
        for i in range(self.args.num_envs):
            self.end_episode(i)

    def end_episode(self, i: int):
        """Store what waited for the end of this environment's episode."""


class NStepSums(Storage):
    """Transitions that span --n-step steps, or those up to the end of the episode if it is nearer.

    Their reward is the discounted sum. Restarted environments cut an episode as a time limit does:
    the sums up to there are shorter, and bootstrap from the last observation.
    """

    def store(self, obs, action, reward, terminated, next_obs, done):
        for i, transition in enumerate(zip(obs, action, reward, terminated, next_obs)):
            self.running[i].append(transition)
            if len(self.running[i]) == self.args.n_step:
                self.store_oldest(i)
            if done[i]:
                self.end_episode(i)

    def end_episode(self, i: int):
        while self.running[i]:
            self.store_oldest(i)

    def store_oldest(self, i: int):
        """The environment's oldest transition, extended to its newest one."""
        obs, action, rewards, terminated, next_obs = zip(*self.running[i])
        total = sum(self.args.gamma**k * reward for k, reward in enumerate(rewards))
        row = (obs[0], action[0], total, terminated[-1], next_obs[-1], len(rewards))
        self.buffer.add(*(np.array([value]) for value in row))
        self.running[i].pop(0)


class Hindsight(Storage):
    """Hindsight experience replay (Andrychowicz et al. 2017, arXiv 1707.01495).

    Beside each transition, copies of it with a goal that its episode did reach, rewarded as the
    environment rewards that goal. They are stored when the episode ends or is cut.
    """

    def __init__(
        self, args: Args, agent: SAC, buffer: ReplayBuffer, generator: torch.Generator
    ):
        super().__init__(args, buffer)
        self.agent = agent
        self.generator = generator
        env = make_env(args)  # only asked for rewards
        self.compute_reward = outermost(env, "compute_reward")
        self.compute_terminated = outermost(env, "compute_terminated")
        self.goal_shape, self.achieved, self.desired = goal_columns(env.env.observation_space)

    def store(self, obs, action, reward, terminated, next_obs, done):
        self.buffer.add(obs, action, reward, terminated, next_obs)
        for i, transition in enumerate(zip(obs, action, reward, terminated, next_obs)):
            self.running[i].append(transition)
            if done[i]:
                self.end_episode(i)

    def end_episode(self, i: int):
        if not self.running[i]:
            return
        obs, action, reward, terminated, next_obs = map(np.array, zip(*self.running[i]))
        self.running[i] = []
        self.check_rewards(reward, next_obs, terminated)
        for _ in range(self.args.hindsight):
            goal = next_obs[self.when_reached(len(obs)), self.achieved]
            for observations in (obs, next_obs):
                observations[:, self.desired] = goal
            if self.args.normalize_obs:
                # Their goals too: where the task's own are all the same, their std is 0.
                self.agent.observe(obs)
            reward, ends = self.judge(next_obs[:, self.achieved], goal, terminated)
            if self.args.clip_targets:
                self.check_bounds(reward)
            self.buffer.add(obs, action, self.args.reward_scale * reward, ends, next_obs)

    def when_reached(self, length: int) -> np.ndarray:
        """For each step of an episode the step (length,) whose outcome becomes its goal."""
        if self.args.hindsight_strategy == "final":
            return np.full(length, length - 1)
        # Uniformly from the step itself to the last one.
        step = np.arange(length)
        uniform = torch.rand(length, generator=self.generator, device=self.generator.device)
        return step + (uniform.cpu().double().numpy() * (length - step)).astype(int)

    def check_rewards(self, reward, next_obs, terminated):
        """End the program where compute_reward contradicts the rewards of an episode."""
        said, _ = self.judge(next_obs[:, self.achieved], next_obs[:, self.desired], terminated)
        said = self.args.reward_scale * said
        # Observations are rounded to float32, and with them all distances.
        tolerance = 1e-3 * np.abs(reward).max()
        agree = np.isclose(said, reward, rtol=1e-3, atol=tolerance)
        # Rounded observations may put a distance on the other side of a limit: now and then, in
        # one step of an episode however short.
        if (~agree).sum() > max(1, 0.1 * len(agree)):
            first = agree.argmin()
            pair = f"{said[first]:g} where the environment returned {reward[first]:g}"
            mend = "make both agree, or leave --hindsight out"
            fail(f"--hindsight {self.args.hindsight}: compute_reward says {pair}: {mend}")

    def judge(self, achieved, goal, terminated) -> tuple[np.ndarray, np.ndarray]:
        """Reward and end (length,) that the environment gives for goals (length, G)."""
        achieved, goal = (x.reshape(-1, *self.goal_shape) for x in (achieved, goal))
        reward = self.compute_reward(achieved, goal, [{}] * len(goal))
        if self.compute_terminated:
            # Reaching a goal may end the task. This method takes one goal at a time.
            ends = [bool(self.compute_terminated(*pair, {})) for pair in zip(achieved, goal)]
            # The episode's own end, such as a fall, ends the copies too.
            terminated = terminated | np.array(ends)
        return np.asarray(reward), terminated


def evaluate(agent: SAC, args: Args, step: int, stochastic=False, video=None, stream=1):
    """Returns and successes (E,) of E = --eval-episodes episodes, in environments of their own.

    A success is 1, a failure 0, and nan where the environment does not say. The environments' seeds
    come from --seed, `step` and `stream`: 0 in training, 1 in its evaluations, 2 with --evaluate.
    """
    makers = [lambda: make_env(args, video)] + [lambda: make_env(args)] * (args.eval_episodes - 1)
    envs, obs = make_vector_env(makers, seed=(args.seed, step, stream))
    generator = torch.Generator(agent.device).manual_seed(args.seed)
    noise = torch.zeros(envs.action_space.shape, device=generator.device)
    returns = np.zeros(args.eval_episodes)
    success = np.full(args.eval_episodes, np.nan)
    running = np.ones(args.eval_episodes, dtype=bool)
    for _ in range(10_000 // steps_per_action(args)):
        if stochastic:
            noise = normal_noise(noise.shape, generator)
        obs, reward, terminated, truncated, info = envs.step(agent.act(obs, noise))
        # One episode each: an environment that has ended resets itself and plays on, uncounted.
        returns[running] += reward[running]
        ended = running & (terminated | truncated)
        success[ended] = reported_success(info, ended)
        running &= ~ended
        if not running.any():
            break
    success[running] = success_of_cut(success, info, running)
    envs.close()
    if video:
        check_video(video)
    return returns, success


def main():
    args, changed = parse_args()
    check_flags(args)
    checkpoint = load_checkpoint(args) if args.resume or args.evaluate else None
    # What cannot be made or recorded fails now, not hours later.
    env = make_env(args, Path("unused") if args.capture_video else None)
    args.env_id = full_name(args, env)
    device = device_of(args)
    check_memory(args, env, device)
    prepare_machine(args, device)
    torch.manual_seed(args.seed)
    agent = make_agent(args, env, device, checkpoint)
    env.close()
    if args.evaluate:
        print_evaluation(agent, args, checkpoint["step"])
        return

    check_wandb(args)
    check_episodes(args, env)
    choose_compilation(args, device)
    folder = args.resume or Path("runs", folder_name(args))
    with resumable(folder, is_new=not args.resume):
        open_folder(args, folder, checkpoint, changed)
        step = train(args, agent, folder, checkpoint)
        write_atomically({"agent": agent.state_dict(), "step": step}, folder / "model.pt")
        plot_learning_curve(folder)
        print_end(folder)


# ================================================================================================
# Plumbing. Nothing below is needed to understand SAC.
# ================================================================================================

# Optimizer ----------------------------------------------------------------------------------------

class Adam(nn.Module):
    """Adam (Kingma & Ba 2015, arXiv 1412.6980), the same steps as torch.optim.Adam.

    Written out because torch.optim's cannot be part of one compiled graph, and so that its moments
    are part of the agent's state_dict().
    """

    def __init__(self, parameters, lr: float):
        super().__init__()
        self.params = list(parameters)  # a plain list: these parameters belong to the network
        # In compiled code this is a constant. To schedule it, make it a buffer and fill_() that.
        self.lr = lr
        # The moments are parameters only so that state_dict() has them.
        self.mean = nn.ParameterList([torch.zeros_like(p) for p in self.params])
        self.square = nn.ParameterList([torch.zeros_like(p) for p in self.params])
        self.requires_grad_(False)
        self.register_buffer("steps", torch.zeros(()))

    @torch.no_grad()
    def minimize(self, loss: torch.Tensor, beta1=0.9, beta2=0.999, eps=1e-8):
        """One step down the gradient of `loss` in these parameters only. It sets no .grad."""
        gradients = torch.autograd.grad(loss, self.params)
        self.steps += 1
        step_size = self.lr / (1 - beta1**self.steps)
        square_scale = (1 - beta2**self.steps).sqrt()
        for p, gradient, mean, square in zip(self.params, gradients, self.mean, self.square):
            mean.lerp_(gradient, 1 - beta1)
            square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            denominator = square.sqrt().div_(square_scale).add_(eps)
            p.sub_((mean / denominator).mul_(step_size))


# Environments -------------------------------------------------------------------------------------

# A resumed run must keep these flags.
FIXED_FLAGS = ["env_id", "buffer_size", "n_critics", "hidden", "layers", "value_network"]
FIXED_FLAGS += ["spectral_norm", "prioritized_replay", "normalize_obs", "autotune"]
FIXED_FLAGS += ["activation", "layer_norm", "log_std", "log_std_min", "log_std_max"]
FIXED_FLAGS += ["stack", "action_repeat", "n_step", "hindsight", "hindsight_strategy"]
FIXED_FLAGS += ["reward_scale", "truncation_terminates"]  # the stored transitions contain them
FIXED_FLAGS += ["preset", "init", "heads", "alpha"]  # what only a new run begins with
# A resumed run computes the same bits whatever these are.
WATCHING_FLAGS = ["eval_frequency", "eval_episodes", "log_frequency", "capture_video", "exp_name"]
WATCHING_FLAGS += ["track", "wandb_project_name", "wandb_entity"]
RETURN_LABEL = "return of an episode"
LONGEST_VIDEO = 2_000  # frames


def make_env(args: Args, video: Path | None = None) -> gym.Env:
    """One environment with flat observations (O,) and actions (A,) in [-1, 1].

    With `video`, its first episode is recorded to that path. Ends the program with one line where
    there is no such environment or its actions are not a bounded Box.
    """
    # Set before MuJoCo and pygame look at them: recording works without a screen.
    if args.capture_video:
        os.environ.setdefault("MUJOCO_GL", "egl" if sys.platform == "linux" else "glfw")
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    expected = "is out of date|latest versioned|Overwriting|script_method|save last video"
    warnings.filterwarnings("ignore", message=f".*({expected})")
    try:
        render = {"render_mode": "rgb_array"} if video else {}
        env = PlainResults(gym.make(args.env_id, disable_env_checker=True, **render))
        if video:
            env = record_first_episode(env, video)
    except Exception as error:  # environments raise what they like
        flags = f"--env-id {args.env_id}" + " --capture-video" * bool(video)
        fail(f"{flags}: {in_one_line(error)}{remedy(args, error)}")
    box = env.action_space
    if not is_bounded_float_box(box):
        wanted = "SAC needs continuous actions (a float Box) with finite bounds"
        mend = "bound them in the environment; for discrete ones take DQN or PPO"
        fail(f"--env-id {args.env_id}: {wanted}, not {box}: {mend}")
    if args.hindsight:
        check_goals(args, env)
    env = Repeat(env, args.action_repeat)
    env = rescale_actions(env)
    try:
        if args.stack > 1:
            env = gym.wrappers.FlattenObservation(env)
            env = gym.wrappers.FrameStackObservation(env, args.stack, padding_type="zero")
        # Flattening copies, which flat observations need too: some environments reuse their arrays.
        env = gym.wrappers.FlattenObservation(env)
    except Exception as error:  # of a space that Gymnasium does not know, or that is empty
        fail(f"--env-id {args.env_id}: {in_one_line(error)}")
    for space in (env.observation_space, env.action_space):
        if not isinstance(space, gym.spaces.Box) or space.shape == (0,):
            fail(f"--env-id {args.env_id}: SAC needs vectors of one number or more, not {space}")
    return env


class PlainResults(gym.Wrapper):
    """Rewards as floats, and of `info` the success that evaluation reads.

    Gymnasium joins the `info` of several environments, and fails where shapes or types differ.
    An OSError of the environment becomes another error: it would pass for a full disk of ours.
    """

    def reset(self, **kwargs):
        obs, _ = self.call(self.env.reset, **kwargs)
        return obs, {}

    def step(self, action: np.ndarray):
        obs, reward, terminated, truncated, info = self.call(self.env.step, action)
        # Gymnasium-Robotics calls it is_success in Fetch and Hand, success in Maze and Adroit.
        try:
            said = info.get("is_success", info.get("success"))
            success = {"is_success": float(np.asarray(said).item())}
        except (AttributeError, TypeError, ValueError):  # none, a text, or several numbers
            success = {}
        if np.size(reward) != 1:
            raise ValueError(f"SAC needs a reward of one number, not of shape {np.shape(reward)}")
        return obs, float(np.asarray(reward).item()), terminated, truncated, success

    def call(self, function: Callable, *args, **kwargs):
        try:
            return function(*args, **kwargs)
        except OSError as error:
            raise RuntimeError(f"the environment failed: {error!r}") from error


def check_goals(args: Args, env: gym.Env):
    """End the program unless --hindsight can give this environment's transitions other goals."""
    what = f"--hindsight {args.hindsight}: {args.env_id}"
    parts = ("observation", "achieved_goal", "desired_goal")
    space = env.observation_space
    if not isinstance(space, gym.spaces.Dict) or not all(part in space.keys() for part in parts):
        fail(f"{what} has no goals (a Dict of {', '.join(parts)}): leave --hindsight out")
    compute_reward = outermost(env, "compute_reward")
    if not callable(compute_reward):
        fail(f"{what} has no compute_reward, which rewards other goals: leave --hindsight out")
    for part in parts[1:]:
        if not isinstance(space[part], gym.spaces.Box):
            fail(f"{what}: {part} is {space[part]}, and only a Box fits: leave --hindsight out")
    achieved, desired = (space[part].shape for part in parts[1:])
    if achieved != desired:
        shapes = f"achieved goals {achieved} and desired ones {desired}"
        fail(f"{what} has {shapes}, and one has to fit the other: leave --hindsight out")
    for n in (1, 2):
        goals = np.zeros((n, *desired))
        try:
            shape = np.shape(compute_reward(goals, goals, [{}] * n))
        except Exception as error:  # environments raise what they like
            fail(f"{what}: compute_reward must take arrays of goals, (n, ...): {error}")
        if shape != (n,):
            must = "must answer n goals with rewards (n,)"
            fail(f"{what}: compute_reward {must}, not {shape} for {n}")


def outermost(env: gym.Env, name: str) -> Callable | None:
    """The method of the first wrapper that has it, from without, or of the environment."""
    return env.get_wrapper_attr(name) if env.has_wrapper_attr(name) else None


def goal_columns(space: gym.spaces.Dict) -> tuple[tuple[int, ...], slice, slice]:
    """The shape of a goal, and where the achieved and the desired one are in flat observations."""
    columns = {}
    start = 0
    for key, part in space.spaces.items():
        end = start + gym.spaces.flatdim(part)
        columns[key] = slice(start, end)
        start = end
    return space["desired_goal"].shape, columns["achieved_goal"], columns["desired_goal"]


class Repeat(gym.Wrapper):
    """Each action held for `repeat` steps, rewards summed; an end of the episode cuts it short."""

    def __init__(self, env: gym.Env, repeat: int):
        super().__init__(env)
        self.repeat = repeat

    def step(self, action: np.ndarray):
        obs, total, terminated, truncated, info = self.env.step(action)
        for _ in range(self.repeat - 1):
            if terminated or truncated:
                break
            obs, reward, terminated, truncated, info = self.env.step(action)
            total += reward
        return obs, total, terminated, truncated, info


def full_name(args: Args, env: gym.Env) -> str:
    """--env-id with its version: Gymnasium takes the newest where none is given."""
    module, colon, name = args.env_id.rpartition(":")
    # Where this environment wraps another one of gym.make(), env.spec may be that of the other.
    found = env.unwrapped.spec.id
    if name != found:
        print(f"--env-id {args.env_id}: {found} is the newest version")
    return module + colon + found


def episode_limit(args: Args, env: gym.Env) -> int | None:
    """Steps after which an episode is cut; None: never, or unknown."""
    return env.spec.max_episode_steps if env.spec else None


def record_first_episode(env: gym.Env, video: Path) -> gym.Env:
    env.reset()
    shape = np.shape(env.render())  # fails here where it cannot
    if len(shape) != 3:
        raise TypeError(f"render() must return an array (height, width, 3), not of shape {shape}")
    return ShortVideo(
        env,
        str(video.parent),
        name_prefix=video.name,
        episode_trigger=lambda episode: episode == 0,
        disable_logger=True,
    )


class ShortVideo(gym.wrappers.RecordVideo):
    """At most LONGEST_VIDEO frames, because all of them are in memory until they are written."""

    def step(self, action: np.ndarray):
        result = super().step(action)
        if self.recording and len(self.recorded_frames) >= LONGEST_VIDEO:
            self.stop_recording()
        return result


def remedy(args: Args, error: Exception) -> str:
    """What would mend an error of Gymnasium that does not say so itself."""
    task = re.fullmatch(r"(?:dm_control/)?([a-z_]+-(?!v\d)[a-z0-9_]+?)(?:-v0)?", args.env_id)
    if task:
        also = f"shimmy:dm_control/{task[1]}-v0, or sac_dmc.py --env-id {task[1]}"
        return f" If it is a task of the DeepMind Control Suite: {also}."
    if "dm_control" in args.env_id and re.search("o module named|Namespace", str(error)):
        return " (pip install shimmy dm-control)"
    if "gymnasium_robotics" in args.env_id and isinstance(error, ImportError):
        return " (pip install gymnasium-robotics)"
    if re.match("Fetch|Hand|PointMaze|AntMaze|Adroit|FrankaKitchen", args.env_id):
        return f" Use gymnasium_robotics:{args.env_id} (pip install gymnasium-robotics)."
    if re.fullmatch(r"\w+-v[0-3]", args.env_id) and "mujoco" in str(error):
        return f" Use {args.env_id[:-1]}4 or {args.env_id[:-1]}5."
    if args.capture_video and re.search("EGL|'e?gl[A-Z]", str(error)):
        return " (MuJoCo draws with EGL: apt install libegl1 libgl1-mesa-dri, or set MUJOCO_GL)"
    return ""


def is_bounded_float_box(space: gym.Space) -> bool:
    if not isinstance(space, gym.spaces.Box) or space.dtype.kind != "f":
        return False
    with np.errstate(over="ignore"):
        return bool(np.isfinite(space.high - space.low).all())


def rescale_actions(env: gym.Env) -> gym.Env:
    """Actions (A,) in [-1, 1] in place of a Box of any shape and bounds."""
    box = env.action_space
    low, high = box.low, box.high

    def to_bounds(action: np.ndarray) -> np.ndarray:
        scaled = low + (action.reshape(box.shape) + 1) / 2 * (high - low)
        return np.clip(scaled, low, high).astype(box.dtype)  # rounding may overstep the bounds

    unit_box = gym.spaces.Box(-1, 1, (low.size,), np.float32)
    return gym.wrappers.TransformAction(env, to_bounds, unit_box)


def make_vector_env(
    makers: list[Callable], seed: tuple[int, ...]
) -> tuple[gym.vector.VectorEnv, np.ndarray]:
    """Environments stepped together and their first observations (N, O), each with its own seed."""
    # Gymnasium's default autoreset spends a step on the reset and ignores that step's action: a
    # transition that never was. SAME_STEP does not.
    same_step = gym.vector.AutoresetMode.SAME_STEP
    envs = gym.vector.SyncVectorEnv(makers, autoreset_mode=same_step)
    seeds = np.random.SeedSequence(seed).generate_state(len(makers)).tolist()
    obs, _ = envs.reset(seed=seeds)
    return envs, obs


def start_envs(args: Args, step: int) -> tuple[gym.vector.VectorEnv, np.ndarray]:
    """The environments from `step` to the next checkpoint, and their first observations."""
    makers = [lambda: make_env(args) for _ in range(args.num_envs)]
    envs, obs = make_vector_env(makers, seed=(args.seed, step, 0))
    return gym.wrappers.vector.RecordEpisodeStatistics(envs), obs


def finished_episodes(args: Args, info: dict) -> dict[str, float]:
    """Mean return and length of the episodes that ended in the last round, if any did."""
    if "episode" not in info:
        return {}
    ended = info["_episode"]
    returns = info["episode"]["r"][ended]
    actions = info["episode"]["l"][ended]
    return {
        "charts/episodic_return": returns.mean(),
        "charts/episodic_length": actions.mean() * steps_per_action(args),
    }


def reported_success(info: dict, ended: np.ndarray) -> np.ndarray:
    """1, 0, or nan where the environment does not say, of each episode that `ended` (E,)."""
    final = info.get("final_info", {})
    if "is_success" not in final:
        return np.full(ended.sum(), np.nan)
    return np.where(final["_is_success"], final["is_success"], np.nan)[ended]


def success_of_cut(success: np.ndarray, info: dict, cut: np.ndarray) -> np.ndarray:
    """Success of the episodes that evaluation has `cut` (E,): what their last step says.

    Where that says nothing: 0 if another one, also of those in `success` (E,), says it; else nan.
    """
    said = reported_success({"final_info": info}, cut)
    all_said = np.append(success, said)
    return said if np.isnan(all_said).all() else np.nan_to_num(said)


def steps_per_action(args: Args) -> int:
    """1, or --action-repeat where a script has it."""
    return args.action_repeat


def steps_per_round(args: Args) -> int:
    """Environment steps in one round of the training loop."""
    return args.num_envs * steps_per_action(args)


def uniform_actions(shape: tuple[int, ...], generator: torch.Generator) -> np.ndarray:
    """Actions drawn uniformly from [-1, 1]."""
    uniform = torch.rand(shape, generator=generator, device=generator.device)
    return (uniform * 2 - 1).cpu().numpy()


def normal_noise(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator, device=generator.device)


# Run folders and checkpoints ----------------------------------------------------------------------

def open_folder(args: Args, folder: Path, checkpoint: dict | None, changed: list[str]):
    """Make the folder of a new run, with the flags and this script; keep both up to date."""
    if not args.resume:
        try:
            folder.mkdir(parents=True)
        except OSError as error:
            fail(f"the run folder {folder} cannot be made: {error}")
    if changed or not args.resume:
        write_args(args, folder)
    copied = folder / Path(__file__).name
    if not copied.exists() or copied.read_bytes() != Path(__file__).read_bytes():
        shutil.copy(__file__, folder)
        changed = [*changed, "script"]
    if args.resume:
        print_resume(args, checkpoint, changed)
    print(f"results: {folder} (watch: tensorboard --logdir runs)", flush=True)


def folder_name(args: Args) -> str:
    """{env_id}__{exp_name}__{seed}__{milliseconds}, characters unsafe in paths replaced."""
    milliseconds = time.time_ns() // 10**6
    name = f"{args.env_id}__{args.exp_name}__{args.seed}__{milliseconds}"
    return re.sub(r"[^\w.-]+", "-", name)


def write_args(args: Args, folder: Path):
    saved = asdict(args) | {"resume": None, "evaluate": None}
    temporary = folder / "args.tmp"
    try:
        temporary.write_text(json.dumps(saved, indent=2))
        os.replace(temporary, folder / "args.json")
    finally:
        temporary.unlink(missing_ok=True)


def make_buffer(args: Args, agent: SAC, checkpoint: dict | None) -> ReplayBuffer:
    """A buffer with no more rows than the run can fill."""
    done = checkpoint["step"] if checkpoint else 0
    actions = max(args.total_timesteps, done) // steps_per_action(args) + args.num_envs
    capacity = min(args.buffer_size, actions * (1 + args.hindsight))
    return ReplayBuffer(capacity, agent.obs_dim, agent.action_dim, agent.device, args)


def make_agent(args: Args, env: gym.Env, device: torch.device, checkpoint: dict | None) -> SAC:
    """A new agent for the environment, or the one in the checkpoint."""
    agent = SAC(env.observation_space.shape[0], env.action_space.shape[0], args).to(device)
    if args.scaled_log_prob:
        while not isinstance(env, gym.wrappers.TransformAction):  # that of rescale_actions()
            env = env.env
        span = env.env.action_space.high - env.env.action_space.low
        agent.actor.log_scale = np.log(span[span > 0] / 2).sum().item()
    if args.matmul_precision == "medium":
        multiply_in_bfloat16(agent.critics)
        multiply_in_bfloat16(agent.target_critics)
        if args.value_network:
            multiply_in_bfloat16(agent.value)
            multiply_in_bfloat16(agent.target_value)
    if checkpoint:
        load_agent(args, checkpoint, agent)
    if args.resume:
        check_replay(args, checkpoint, agent)
    return agent


def save_checkpoint(
    folder: Path, agent: SAC, buffer: ReplayBuffer, generator: torch.Generator, step: int
):
    filled = buffer.rows[: len(buffer)]
    stop_unless_finite({IN_REPLAY: filled.sum()}, step, folder)
    state = {
        "agent": agent.state_dict(),
        # By way of numpy: torch.save of a slice would write the rows that are still empty too.
        "rows": torch.from_numpy(filled.cpu().numpy()),
        "count": buffer.count,
        "random": generator.get_state(),
        "step": step,
        "versions": versions(agent.device),
        "script": Path(__file__).name,
    }
    write_atomically(state, folder / "checkpoint.pt")


def restore_replay(checkpoint: dict, buffer: ReplayBuffer, generator: torch.Generator) -> int:
    """Fill the replay buffer and set the random stream; the step at which to go on."""
    # make_agent() has loaded the agent.
    buffer.rows[: len(checkpoint["rows"])] = checkpoint["rows"]
    buffer.count = checkpoint["count"]
    if len(checkpoint["random"]) == len(generator.get_state()):  # not so on another kind of device
        generator.set_state(checkpoint["random"])
    step = checkpoint["step"]
    checkpoint.clear()  # its tensors are mapped from a file that the next checkpoint replaces
    return step


def save_if_best(folder: Path, agent: SAC, step: int, mean_return: float):
    """Keep the agent with the highest evaluation so far in best.pt."""
    stop_unless_finite(agent.state_dict(), step, folder)
    path = folder / "best.pt"
    try:
        best = float(read_archive(path)["return"])
    except Exception:  # there is none yet, or it is damaged, which can raise almost anything
        best = -math.inf
    if mean_return > best or math.isnan(best):
        state = {"agent": agent.state_dict(), "step": step, "return": float(mean_return)}
        write_atomically(state, path)


def write_atomically(state: dict, path: Path):
    """Write to a temporary name, flush to disk, then rename: `path` is one whole file always."""
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        # torch.save wraps what ended it, a full disk or Ctrl-C, in one RuntimeError or more.
        cause = error
        while cause.__context__:
            cause = cause.__context__
        if isinstance(cause, KeyboardInterrupt):
            raise cause from None
        before = ", the one before it stays" * path.exists()
        raise OSError(f"{path} was not written{before}: {in_one_line(cause)}") from None
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(args: Args) -> dict:
    """What --resume or --evaluate names; ends the program with one line if it is no checkpoint."""
    path = args.resume or args.evaluate
    if path.is_dir():
        path = path / "checkpoint.pt"
        if args.evaluate and not path.exists():
            path = path.with_name("model.pt")
    try:
        checkpoint = read_archive(path)
    except Exception as error:  # a damaged file can raise almost anything
        refuse(args, f"{path.name} is missing or damaged: {error}")
    parts = {"agent": dict, "step": int}
    if args.resume:
        parts |= {"rows": torch.Tensor, "count": int, "random": torch.Tensor, "versions": dict}
    for name, kind in parts.items():
        if not isinstance(checkpoint.get(name), kind):
            refuse(args, f"{name!r} is missing or not of type {kind.__name__}")
    if checkpoint["step"] < 0:
        refuse(args, f"'step' is {checkpoint['step']}")
    script = Path(__file__).name
    if (trained_by := checkpoint.get("script", script)) != script:
        other = f"the algorithm of {script} may be another"
        print(f"warning: {trained_by} trained this agent, {other}", file=sys.stderr)
    return checkpoint


def read_archive(path: Path) -> dict:
    """What torch.save wrote. Reads all of it once, because torch.load does not check checksums."""
    with zipfile.ZipFile(path) as archive:
        if damaged := archive.testzip():
            raise ValueError(f"bad checksum of {damaged}")
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(content, dict):
        raise ValueError("it is no checkpoint of this program")
    return content


def load_agent(args: Args, checkpoint: dict, agent: SAC):
    """Load networks, temperature and optimizers; refuse those that do not fit or are not finite."""
    try:
        agent.load_state_dict(checkpoint["agent"])
    except Exception as error:  # names, shapes or types of another agent
        refuse(args, f"'agent' is not that of these flags: {error}")
    for name, value in agent.state_dict().items():
        if not value.isfinite().all():
            refuse(args, f"{name} of 'agent' is not finite")


def check_replay(args: Args, checkpoint: dict, agent: SAC):
    """Refuse what restore_replay() could not restore."""
    rows, state = checkpoint["rows"], checkpoint["random"]
    capacity, width = make_buffer(args, agent, checkpoint).rows.shape
    shape = (min(checkpoint["count"], args.buffer_size), width)
    if rows.shape != shape or rows.dtype != torch.float32 or len(rows) > capacity:
        found = f"{rows.dtype} of shape {[*rows.shape]}"
        refuse(args, f"'rows' is {found}, not torch.float32 of {[*shape]}")
    if state.dtype != torch.uint8 or state.dim() != 1:
        refuse(args, "'random' is no state of a random stream")
    try:
        if len(state) != 16:  # a GPU's state has 16 bytes and cannot be tried here
            torch.Generator().set_state(state)
    except RuntimeError as error:
        refuse(args, f"'random' is no state of a random stream: {error}")


def refuse(args: Args, fault: str):
    name = "--resume" if args.resume else "--evaluate"
    fail(f"{name} {args.resume or args.evaluate}: {fault}")


def versions(device: torch.device) -> dict[str, str | bool | None]:
    """What must be the same for a resumed run to compute the same bits."""
    used = [name for name in ("torch", "numpy", "gymnasium", "mujoco") if name in sys.modules]
    family = torch.cpu.get_capabilities().get("cpu_name", "unknown")
    return {
        "python": platform.python_version(),
        **{name: str(sys.modules[name].__version__) for name in used},
        # With other vector instructions, AVX2 or AVX512, sums are rounded in another order.
        "processor": f"{family}, {torch.backends.cpu.get_cpu_capability()}",
        "MKL_CBWR": os.environ.get("MKL_CBWR"),  # the instructions that matrix products use
        "gpu": device.type == "cuda" and torch.cuda.get_device_name(),
    }


# Logs and progress --------------------------------------------------------------------------------

class Logger:
    """Scalars to TensorBoard and Weights & Biases; progress as a bar, or as lines in a file."""

    def __init__(self, args: Args, folder: Path, step: int):
        self.args = args
        self.folder = folder
        self.wandb_run = None
        if args.track:
            # Weights & Biases keeps all it was sent, also what an earlier resume discarded from
            # TensorBoard's files. Only later steps are new to it, if the run was tracked before.
            tracked = (folder / "wandb").exists()
            logged = read_records(folder, discarded=True).values() if tracked else ()
            self.last_tracked = max((steps.max() for steps, _ in logged), default=-1)
            self.wandb_run = start_wandb(args, folder)
        self.writer = SummaryWriter(folder, purge_step=step + 1 if args.resume else None)
        threading.excepthook = report_no_disk_error
        self.bar = tqdm(
            total=args.total_timesteps,
            initial=step,
            bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps [{elapsed}{postfix}]",
            disable=None,
            dynamic_ncols=True,
        )
        self.last_timing = (step, time.perf_counter())
        self.latest_returns = {}  # for the bar: of training and of evaluation, in words

    def log(self, scalars: dict[str, float], step: int):
        self.bar.update(min(step, self.args.total_timesteps) - self.bar.n)
        if not scalars:
            return
        for key, value in scalars.items():
            self.writer.add_scalar(key, value, step)
        # Before Weights & Biases: its last step must never be later than TensorBoard's, which a
        # resume reads.
        self.writer.flush()
        if self.wandb_run and step > self.last_tracked:
            self.wandb_run.log(scalars | {"global_step": step}, step=step)
        for key, name in (("charts/episodic_return", "return"), ("eval/episodic_return", "eval")):
            if key in scalars:
                self.latest_returns[name] = f"{name} {scalars[key]:.1f}"

    def log_metrics(self, metrics: dict[str, torch.Tensor], step: int):
        """Metrics of the last update, and the speed since they were logged before."""
        last_step, last_time = self.last_timing
        self.last_timing = (step, time.perf_counter())
        speed = (step - last_step) / (self.last_timing[1] - last_time)
        scalars = {name: value.item() for name, value in metrics.items()}
        self.log(scalars | {"charts/SPS": speed}, step)
        self.show_progress(speed, step)

    def show_progress(self, speed: float, step: int):
        total = self.args.total_timesteps
        if step <= self.args.learning_starts:  # no estimate: these steps are faster
            status = [f"learning starts at step {self.args.learning_starts:,}"]
        else:
            hours, minutes = divmod(round((total - step) / speed / 60), 60)
            left = f"{hours} h {minutes} min" if hours else f"{minutes} min"
            status = [f"{speed:.0f} steps/s", f"{left} left"]
        status += self.latest_returns.values()
        self.bar.set_postfix_str("  ".join(status))
        if self.bar.disable:
            print(f"step {step:,}/{total:,}", *status, sep="  ", flush=True)

    def log_evaluation(self, returns: np.ndarray, success: np.ndarray, step: int):
        mean = returns.mean()
        std = returns.std()
        scalars = {"eval/episodic_return": mean, "eval/episodic_return_std": std}
        if not np.isnan(success).all():
            scalars["eval/success_rate"] = np.nanmean(success)
        self.log(scalars, step)
        result = f"evaluation return {mean:.1f} +- {std:.1f} ({len(returns)} episodes)"
        self.bar.write(f"step {step:,}: {result}{in_words(success)}")
        video = video_path(self.args, self.folder, step)
        if self.wandb_run and video and step > self.last_tracked:
            import wandb

            clip = wandb.Video(f"{video}-episode-0.mp4", format="mp4")
            self.wandb_run.log({"eval/video": clip}, step=step)

    def close(self):
        self.bar.close()
        self.writer.close()


def report_no_disk_error(failure):
    """TensorBoard's thread prints a traceback for a full disk; log() raises the same error."""
    if not issubclass(failure.exc_type, OSError):
        threading.__excepthook__(failure)


def start_wandb(args: Args, folder: Path):
    import wandb

    folder = folder.resolve()  # it may be named by a dot
    try:
        run = wandb.init(
            project=args.wandb_project_name,
            entity=args.wandb_entity,
            name=folder.name,
            id=folder.name,
            resume="allow",
            dir=folder,
            config=asdict(args),
        )
    except Exception as error:  # the network, an unknown team, no rights to the project
        raise OSError(f"Weights & Biases: {error}") from None
    run.save(folder / Path(__file__).name, base_path=folder, policy="now", glob=False)
    return run


def read_records(folder: Path, discarded: bool = False) -> dict[str, np.ndarray]:
    """Scalars of a run by key, from its TensorBoard files: arrays (2, n) of steps and values.

    With `discarded`, also those from a checkpoint to a kill, which a resume has made once more.
    """
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # a resumed run is no warning
    how = dict(size_guidance={"scalars": 0}, purge_orphaned_data=not discarded)
    events = EventAccumulator(str(folder), **how).Reload()
    records = {}
    for key in events.Tags()["scalars"]:
        points = [(event.step, event.value) for event in events.Scalars(key)]
        if points:  # a resume may have discarded all of a key
            records[key] = np.array(points).T
    return records


def video_path(args: Args, folder: Path, step: int, name: str = "") -> Path | None:
    if not args.capture_video:
        return None
    (folder / "videos").mkdir(exist_ok=True)
    return folder / "videos" / f"step-{step}{name}"


def check_video(video: Path):
    """ffmpeg is silent where the disk is full: a video without its index cannot be played."""
    path = Path(f"{video}-episode-0.mp4")
    if b"moov" not in path.read_bytes():
        raise OSError(f"{path} could not be written")


def plot_learning_curve(folder: Path):
    axes = Figure(figsize=(8, 5), layout="constrained").subplots()
    records = read_records(folder)
    for key in sorted(records.keys() & {"charts/episodic_return", "eval/episodic_return"}):
        axes.plot(*records[key], ".-", label=key)
        axes.legend()
    axes.set(title=folder.resolve().name, xlabel="environment steps", ylabel=RETURN_LABEL)
    axes.figure.savefig(folder / "learning_curve.png", dpi=120)


def print_resume(args: Args, checkpoint: dict, changed: list[str]):
    step = checkpoint["step"]
    total = args.total_timesteps
    if step >= total:
        longer = "to train longer: --total-timesteps N"
        print(f"already finished ({step:,} of {total:,} steps); {longer}")
    else:
        print(f"resuming at step {step:,}")
    changed = [key for key in changed if key not in WATCHING_FLAGS]
    now, before = versions(device_of(args)), checkpoint["versions"]
    changed += [name for name in now | before if now.get(name) != before.get(name)]
    if changed:
        what = ", ".join(sorted(changed))
        result = "the result may not be bit-identical to an uninterrupted run"
        print(f"warning: {what} changed: {result}", file=sys.stderr)


def print_evaluation(agent: SAC, args: Args, step: int):
    folder = run_folder(args.evaluate)
    for name in ("deterministic", "stochastic"):
        video = video_path(args, folder, step, f"-{name}")
        # Other episodes than those by which best.pt was chosen: they would flatter it.
        returns, success = evaluate(agent, args, step, name == "stochastic", video, stream=2)
        spread = f"{returns.mean():.2f} +- {returns.std():.2f}"
        result = f"return {spread} over {len(returns)} episodes{in_words(success)}"
        print(f"{name} policy at step {step:,}: {result}")
        if video:
            print(f"video: {video}-episode-0.mp4")


def in_words(success: np.ndarray) -> str:
    said = success[~np.isnan(success)]
    return f", success in {said.sum():.0f} of {len(said)}" if len(said) else ""


def print_end(folder: Path):
    print(f"done: {folder}")
    print(f"curve: {folder / 'learning_curve.png'}")
    print("evaluate:", command("--evaluate", folder))


@contextmanager
def resumable(folder: Path, is_new: bool):
    """End with one line, and how to continue, at Ctrl-C and where the disk is full."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    except (KeyboardInterrupt, OSError) as cause:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # pressed again, it ends at once
        if is_new and not list(folder.glob("*.pt")):
            shutil.rmtree(folder, ignore_errors=True)
        if isinstance(cause, BrokenPipeError):
            raise
        # The terminal shows Ctrl-C as ^C, so "stopped" begins a new line.
        what = f"error: {in_one_line(cause)}" if isinstance(cause, OSError) else "\nstopped"
        stop(f"{what}. {how_to_continue(folder)}")
    except RuntimeError as error:
        if not is_of_compiler(error):
            raise
        what = f"error: the update cannot be compiled, add --compile off ({in_one_line(error)})"
        stop(f"{what}. {how_to_continue(folder)}")
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def is_of_compiler(error: Exception) -> bool:
    """Known by its names: to import the compiler takes seconds."""
    return any(kind.__module__ == "torch._dynamo.exc" for kind in type(error).__mro__)


def how_to_continue(folder: Path) -> str:
    if not (folder / "checkpoint.pt").exists():
        return "Nothing was trained yet."
    state = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True, mmap=True)
    go_on = command("--resume", folder)
    return f"Last checkpoint: step {state['step']:,}. Continue with:\n  {go_on}"


def command(*words: str | Path) -> str:
    """This script with other words, called as it was."""
    caller = ["uv", "run"] if "UV" in os.environ else ["python"]
    join = subprocess.list2cmdline if os.name == "nt" else shlex.join  # cmd.exe knows no '
    return join([*caller, sys.argv[0], *map(str, words)])


def stop(message: str):
    """End the program for no mistake of its user, above the progress bar if there is one."""
    tqdm.write(message, file=sys.stderr)
    sys.exit(1)


@contextmanager
def closed_output_is_no_error():
    """End in silence when nobody reads the output (`| head`), in one line when it is full."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # they are None where closed (>&-)
    sys.stderr = sys.stderr or open(os.devnull, "w")
    try:
        yield
        sys.stdout.flush()
    except OSError as error:
        sys.exit(1 if isinstance(error, BrokenPipeError) else f"error: {in_one_line(error)}")
    finally:
        try:
            sys.stdout.flush()
        except OSError:  # what is still buffered would raise once more at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# Flags: every mistake is one line that names the flag and the fix, and exit code 2 ----------------

def fail(message: str):
    """End the program for a mistake of its user."""
    print("error:", in_one_line(message), file=sys.stderr)
    sys.exit(2)


def in_one_line(message: str | Exception) -> str:
    said = str(message).rpartition("Output:\n")[2]  # a compiler's words, after a long command
    line = " ".join((said or repr(message)).split())
    return line if len(line) <= 400 else f"{line[:396]} ..."


def parse_args() -> tuple[Args, list[str]]:
    """The flags, over those of the run folder if one is named; and which of these changed."""
    args = parse_flags()
    if args.resume and args.evaluate:
        fail("--resume or --evaluate, one at a time: leave one out")
    if args.resume and args.resume.is_file():
        fail(f"--resume {args.resume} is a file: name the run folder")
    path = args.resume or args.evaluate
    if not path:
        return args, []
    saved = asdict(Args()) | read_args(args, run_folder(path))
    args = parse_flags(default=Args(**saved))
    changed = [key for key in saved if saved[key] != getattr(args, key)]
    # The sums of --n-step contain the discount.
    for key in FIXED_FLAGS + ["gamma"] * (saved["n_step"] > 1):
        if key in changed:
            fail(f"{flag(key)} cannot change in a run: it was {saved[key]}, leave the flag out")
    if args.evaluate and args.track and "track" in changed:
        fail("--track logs training, and --evaluate trains nothing: leave it out")
    return args, [key for key in changed if key not in ("resume", "evaluate")]


def parse_flags(default: Args | None = None) -> Args:
    """The command line; a flag that counts may be given as 1e6."""
    words = sys.argv[1:]
    counts = {flag(key) for key, kind in typing.get_type_hints(Args).items() if kind is int}
    before = ""
    for i, word in enumerate(words):
        name, equals, number = word.rpartition("=")  # --flag=1e6, or 1e6 after --flag
        name_of_flag = (name or before).replace("_", "-")
        if name_of_flag in counts and re.fullmatch(r"\d+(\.\d+)?[eE]\+?\d\d?", number):
            if float(number).is_integer():
                words[i] = f"{name}{equals}{float(number):.0f}"
        before = word
    description = "\n\n".join(__doc__.split("\n\n")[:2])
    args = tyro.cli(Args, args=words, default=default, description=description)
    if args.preset != "none" and default is None:
        args = tyro.cli(Args, args=[*PRESETS[args.preset].split(), *words])  # the user's flags win
    return args


def run_folder(path: Path) -> Path:
    """The run that --resume or --evaluate means by a folder, or by a file in it."""
    return path if path.is_dir() else path.parent


def read_args(args: Args, folder: Path) -> dict:
    """The flags in args.json, whoever wrote them."""
    try:
        saved = json.loads((folder / "args.json").read_text())
    except FileNotFoundError:
        refuse(args, "no such run folder (no args.json in it)")
    except (OSError, ValueError, RecursionError) as error:
        refuse(args, f"args.json cannot be read: {error}")
    kinds = typing.get_type_hints(Args)
    if not isinstance(saved, dict):
        refuse(args, "args.json holds no flags")
    for key, value in saved.items():
        if key not in kinds:
            script = Path(sys.argv[0]).name
            refuse(args, f"args.json: {key} is no flag of {script}: use the script in that folder")
        if not fits(value, kinds[key]):
            refuse(args, f"args.json: {value!r} is no value of {key}")
    if missing := ", ".join(sorted(kinds.keys() - saved.keys())):
        print(f"warning: args.json lacks {missing}: defaults hold", file=sys.stderr)
    return saved


def fits(value, kind) -> bool:
    """Whether a value of args.json is one that the flag may have."""
    options = typing.get_args(kind) or (kind,)  # types of a union, values of a Literal, or one type
    if float in options and type(value) is int:  # JSON may write 1.0 as 1
        return True
    return value in options or type(value) in options


def flag(key: str) -> str:
    return "--" + key.replace("_", "-")


def within(args: Args, low: float, high: float, *keys: str):
    """Fail unless these flags lie in [low, high]; NaN lies nowhere."""
    for key in keys:
        value = getattr(args, key)
        if not low <= value <= high:
            fail(f"{flag(key)} {value}: must be between {low} and {high}")


MANY = 10**12  # more steps than anyone can wait for, and no overflow


def check_flags(args: Args):
    """Reject impossible values. This needs nothing but the flags, so it comes first."""
    within(args, 1, MANY, "total_timesteps", "learning_starts", "buffer_size", "batch_size")
    within(args, 1, MANY, "checkpoint_frequency", "log_frequency")
    within(args, 0, MANY, "eval_frequency")
    if args.capture_video and not args.eval_frequency and not args.evaluate:
        fail("--capture-video records evaluations, and --eval-frequency 0 makes none: raise it")
    within(args, 1, 10_000, "num_envs", "eval_episodes")
    within(args, 1, 256, "threads")
    within(args, 0, 1, "gamma")
    within(args, 1e-9, 1, "tau", "policy_lr", "q_lr")
    within(args, 0, 2**63 - 1, "seed")
    check_variants(args)
    if args.learning_starts < steps_per_round(args):  # the first update needs transitions
        bound = f"must be at least {steps_per_round(args)}"
        why = f"one action in each of --num-envs {args.num_envs}"
        fail(f"--learning-starts {args.learning_starts} {bound}, {why}: raise it")
    must_not_exceed(args, "num_envs", "buffer_size")
    must_not_exceed(args, "batch_size", "buffer_size")
    if args.total_timesteps <= args.learning_starts:
        least = args.n_step * steps_per_round(args)
        sooner = max(least, args.total_timesteps // 3)
        fix = "train longer"
        if sooner < args.total_timesteps:
            fix += f", or add --learning-starts {sooner}"
        must = f"must exceed --learning-starts ({args.learning_starts})"
        fail(f"--total-timesteps {args.total_timesteps} {must}: {fix}")
    check_updates(args)
    if len(folder_name(args).encode()) > 255:
        fail("--exp-name or --env-id is too long for the name of a folder: shorten it")


def check_variants(args: Args):
    within(args, 1, 1000, "n_critics", "layers", "stack", "action_repeat", "policy_frequency")
    within(args, 1, 1_000_000, "hidden")
    within(args, 1, MANY, "update_interval", "target_network_frequency")
    within(args, 0, 1000, "critics_subset")
    must_not_exceed(args, "critics_subset", "n_critics")
    within(args, 1e-9, 1e9, "alpha", "reward_scale")
    within(args, 1e-9, 1000, "updates_per_step")
    if args.target_entropy is not None and args.target_entropy_scale != Args.target_entropy_scale:
        fail("--target-entropy-scale scales the default target: leave it or --target-entropy out")
    within(args, 0, 1, "alpha_lr", "policy_l2")
    within(args, 0, 0.99, "dropout")
    within(args, -1, MANY, "random_steps")
    within(args, 1, 1000, "n_step", "hold_noise")
    within(args, 0, 1000, "hindsight")
    within(args, -1e9, 1e9, "target_entropy_scale")
    within(args, -100, 100, "log_std_min", "log_std_max")
    if args.target_entropy is not None:
        within(args, -1e9, 1e9, "target_entropy")
    must_not_exceed(args, "log_std_min", "log_std_max")
    if args.hold_noise > 1 and random_steps(args) == 0:
        fail("--hold-noise holds random actions, and there are none: raise --random-steps")
    if not args.compensate and args.policy_frequency == 1:
        fail("--no-compensate is for delayed policies: leave it out or add --policy-frequency 2")
    for key in ("alpha_lr", "target_entropy", "target_entropy_scale", "alpha_loss"):
        if not args.autotune and getattr(args, key) != getattr(Args, key):
            fail(f"{flag(key)} is for a learned temperature: leave it out or add --autotune")
    if args.value_network and args.critics_subset:
        fix = "leave it out or add --no-value-network"
        fail(f"--critics-subset with --value-network, which makes the targets: {fix}")
    check_storage(args)


COUNTED_EXACTLY = 2**24  # by float32, and the most that PyTorch's multinomial draws from


def check_updates(args: Args):
    """Fail where no update would come, or more than can be counted."""
    rounds = math.ceil(args.total_timesteps / steps_per_round(args))
    updates = updates_until(args, rounds * steps_per_round(args))
    if updates == 0:
        mend = "raise --updates-per-step or --total-timesteps"
        if args.update_interval > 1:
            mend = f"lower --update-interval ({args.update_interval}), or {mend}"
        fail(f"no update comes before the end: {mend}")
    if args.target_network_frequency > 1 and updates > COUNTED_EXACTLY:
        what = f"--target-network-frequency {args.target_network_frequency}"
        fail(f"{what} counts up to {COUNTED_EXACTLY} updates: leave it out or train for fewer")
    actions = args.total_timesteps // steps_per_action(args) + args.num_envs
    rows = min(args.buffer_size, actions * (1 + args.hindsight))
    if args.prioritized_replay and rows > COUNTED_EXACTLY:
        most = f"draws from at most {COUNTED_EXACTLY} transitions"
        fail(f"--prioritized-replay {most}: lower --buffer-size")


def check_storage(args: Args):
    """Fail on flags of --n-step and --hindsight that do not go together."""
    first_sum = args.n_step * steps_per_round(args)
    if args.n_step > 1 and args.learning_starts < first_sum:
        mend = f"--learning-starts {first_sum} or more"
        fail(f"--n-step {args.n_step}: nothing is stored when learning starts; add {mend}")
    if args.clip_targets and args.gamma == 1:
        fail("--clip-targets bounds targets by 1 / (1 - gamma): choose --gamma below 1")
    if not args.hindsight:
        if args.hindsight_strategy != Args.hindsight_strategy:
            fail("--hindsight-strategy needs copies: add --hindsight 1")
        return
    if args.hindsight_strategy == "final" and args.hindsight > 1:
        fail(f"--hindsight {args.hindsight}: --hindsight-strategy final knows 1 goal: choose 1")
    if args.combined_replay:
        fail("--combined-replay with --hindsight, whose copies are newer: leave one of them out")
    for key in ("n_step", "stack", "action_repeat"):
        if getattr(args, key) > 1:
            fail(f"--hindsight with {flag(key)} {getattr(args, key)}: leave one of them out")


def must_not_exceed(args: Args, key: str, limit: str):
    if getattr(args, key) > getattr(args, limit):
        bound = f"must not exceed {flag(limit)} ({getattr(args, limit)})"
        fail(f"{flag(key)} {getattr(args, key)} {bound}: lower it or raise that")


def check_episodes(args: Args, env: gym.Env):
    """Warn where checkpoints, which restart the environments, come before episodes can end."""
    steps_apart = args.checkpoint_frequency // args.num_envs
    limit = episode_limit(args, env)
    if limit and steps_apart < min(limit, args.total_timesteps // args.num_envs):
        cut = f"cuts episodes of up to {limit} steps after {steps_apart}: raise it"
        print(f"warning: --checkpoint-frequency {args.checkpoint_frequency} {cut}", file=sys.stderr)


# Limits on Linux: the groups of processes, and which one is ours. The limit of a batch job is that
# of a group, and so is that of a container.
GROUPS = Path("/sys/fs/cgroup")
OUR_GROUP = Path("/proc/self/cgroup")


def check_memory(args: Args, env: gym.Env, device: torch.device):
    """Fail if the replay buffer, or the arrays of one update, need more memory than is free."""
    free = free_memory(device)
    (obs_dim,), (action_dim,) = env.observation_space.shape, env.action_space.shape
    row_bytes = 4 * (2 * obs_dim + action_dim + 2 + args.prioritized_replay + (args.n_step > 1))
    actions = args.total_timesteps // steps_per_action(args)
    rows = 0 if args.evaluate else min(args.buffer_size, actions * (1 + args.hindsight))
    replay_bytes = rows * row_bytes
    # Some 8 arrays of hidden units live at once for each layer and critic.
    units = args.hidden * args.layers * args.n_critics
    update_bytes = 0 if args.evaluate else args.batch_size * (row_bytes + 4 * 8 * units)
    # Weights, slow copies, gradients and Adam's moments.
    inputs = obs_dim + action_dim + args.hidden * (args.layers - 1)  # of all hidden layers
    network_bytes = 4 * 5 * (args.n_critics + 1) * args.hidden * inputs
    limits = {"buffer_size": replay_bytes, "batch_size": update_bytes, "hidden": network_bytes}
    for key, needed in limits.items():
        if needed > free:
            fail(f"{flag(key)} takes {needed / 1e9:.1f} GB, {free / 1e9:.1f} are free: lower it")
    shapes = f"observations ({obs_dim},), actions ({action_dim},)"
    buffer = "" if args.evaluate else f", replay buffer up to {replay_bytes / 1e6:.1f} MB"
    print(f"{args.env_id} on {device}: {shapes}{buffer}")


def free_memory(device: torch.device) -> int:
    """Bytes free on the GPU, or on this machine; at most the limit of container or batch job.

    That is a limit of Linux's cgroup v2. What others use of it is not subtracted.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info()[0]
    free = psutil.virtual_memory().available
    try:
        ours = GROUPS / OUR_GROUP.read_text().strip().removeprefix("0::/")
    except OSError:  # it is no Linux
        return free
    for group in (ours, *ours.parents):
        try:
            free = min(free, int((group / "memory.max").read_text()))
        except (OSError, ValueError):  # it is no group, or has no limit ("max")
            pass
    return free


def check_wandb(args: Args):
    if not args.track:
        return
    mode = os.environ.get("WANDB_MODE", "online")
    if mode not in ("online", "offline", "disabled"):
        fail(f"WANDB_MODE={mode}: --track needs online, offline or disabled there")
    if not re.fullmatch(r"[^/\\#?%:]{1,128}", args.wandb_project_name):
        fail(f"--wandb-project-name {args.wandb_project_name}: leave out / \\ # ? % : and be brief")
    try:
        import wandb

        if mode == "online" and not wandb.login(prompt=False):
            fail("--track needs `wandb login`, or WANDB_MODE=offline")
    except ImportError:
        fail("--track needs wandb: pip install wandb")
    except Exception as error:
        fail(f"--track: {in_one_line(error)}")


def due(args: Args, frequency: int, step: int) -> bool:
    """Whether the last round reached a multiple of `frequency`, or the end of the run."""
    if frequency == 0:
        return False
    before = step - steps_per_round(args)
    return step // frequency > before // frequency or step >= args.total_timesteps


IN_REPLAY = "an observation or reward of the environment"


def stop_unless_finite(tensors: dict[str, torch.Tensor], step: int, folder: Path):
    """Never write NaN or infinity to a checkpoint."""
    for name, value in tensors.items():
        if not value.isfinite().all():
            kept = f"the last good checkpoint stays in {folder}"
            stop(f"error: {name} is not finite at step {step}; {kept}")


def stop_if_diverged(
    action: np.ndarray,
    metrics: dict,
    agent: SAC,
    buffer: ReplayBuffer,
    step: int,
    folder: Path,
):
    """Stop before an environment sees NaN, at which some raise errors of their own."""
    if not np.isfinite(action).all():
        # First what the environment returned, by which networks and losses become NaN too.
        named = {IN_REPLAY: buffer.rows[: len(buffer)].sum()} | metrics | agent.state_dict()
        stop_unless_finite(named | {"an action": torch.from_numpy(action)}, step, folder)


# Speed: nothing here changes the algorithm, only how numbers are rounded --------------------------

def device_of(args: Args) -> torch.device:
    return torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")


def prepare_machine(args: Args, device: torch.device):
    torch.set_num_threads(args.threads)
    precision = args.matmul_precision
    if precision == "auto":
        # On x86 without AMX "medium" is oneDNN in float32: twice as fast as MKL at these sizes and
        # as exact. With AMX it would round to bfloat16.
        cpu = torch.cpu.get_capabilities()
        amx = cpu.get("amx_tile", True)  # on some machines nothing is known
        exact = device.type == "cpu" and cpu["architecture"] == "x86_64" and not amx
        precision = "medium" if exact else "highest"
    torch.set_float32_matmul_precision(precision)
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        # Page faults can be half of an uncompiled update: keep freed memory (trim, mmap threshold).
        libc.mallopt(-1, 2**30)
        libc.mallopt(-3, 2**25)


def multiply_in_bfloat16(critics: Critics):
    """Hidden layers multiply in bfloat16, which is faster; the weights stay float32."""

    def multiply(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x.bfloat16() @ weight.bfloat16()

    critics.multiply = multiply


def choose_compilation(args: Args, device: torch.device):
    """Turn --compile auto into on or off, so that a resumed run goes on as it began."""
    if args.compile == "auto":
        args.compile = "on" if args.total_timesteps >= 50_000 else "off"
    if args.compile == "off":
        return
    print("compiling the update: once, up to a minute (--compile off to skip)", flush=True)
    keep_compiled_code()
    try:
        torch.compile(lambda x: x + 1)(torch.ones(64, device=device))
    except Exception as error:  # no compiler, no Python headers, no Triton, a full disk
        slower = "training goes on uncompiled, which is slower and rounds differently"
        lacking = "C++ compiler or Python headers" if device.type == "cpu" else "Triton"
        print(f"no working {lacking}: {slower} ({in_one_line(error)})", flush=True)
        args.compile = "off"


def keep_compiled_code():
    """Cache compiled code where it outlives a reboot, unless TORCHINDUCTOR_CACHE_DIR is set."""
    if "TORCHINDUCTOR_CACHE_DIR" in os.environ:
        return
    # PyTorch also takes code from its cache that was made for another processor. With vectors of
    # another width that does not compile, or computes nonsense. Machines may share a home, so each
    # kind of processor has a folder.
    kind = [torch.backends.cpu.get_cpu_capability(), *sorted(torch.cpu.get_capabilities().items())]
    folder = str(zlib.crc32(repr(kind).encode()))
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        cache = home / "one-file-sac" / folder
        cache.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # no home, or none that can be written
        return  # PyTorch's own choice, the system's temporary folder, has to do
    if os.access(cache, os.W_OK):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache)


def compile_update(args: Args, agent: SAC, buffer: ReplayBuffer) -> tuple[Callable, Callable]:
    """`learn(index, noise, policy_updates)` and `act(obs, noise)`, compiled with --compile on."""

    def learn(
        index: torch.Tensor, noise: torch.Tensor, policy_updates: int
    ) -> dict[str, torch.Tensor]:
        weight = buffer.importance_weights if args.prioritized_replay else 1.0
        steps = buffer.steps(index) if args.n_step > 1 else 1.0
        return agent.update(buffer[index], noise, policy_updates, weight, steps)

    if args.compile == "off":
        return learn, agent.act
    torch._dynamo.reset()  # the graphs of another run in this process would count against a limit
    torch._dynamo.config.trace_autograd_ops = True  # gradients inside the one graph
    torch._dynamo.mark_static_address(buffer.rows)  # CUDA graphs read it where it lies
    on_gpu = agent.device.type == "cuda"
    options = {"triton.cudagraphs" if on_gpu else "cpp_wrapper": True}  # cheaper calls
    how = dict(fullgraph=True, dynamic=False, options=options)
    return torch.compile(learn, **how), torch.compile(agent.act, **how)


class Threads:
    """PyTorch's CPU threads: `wanted`, or one while other processes want the cores.

    Threads that share a contended core wait for each other: that can be a hundred times slower
    than one thread. At these sizes the number of threads changes no bit of the result with
    AVX-512. With AVX2 it changes none if MKL_CBWR=AVX2 is set. tests/test_compile.py holds both.
    """

    def __init__(self, wanted: int, device: torch.device):
        self.wanted = wanted
        self.on_cpu = device.type == "cpu"  # else they only wait for the GPU
        # When it was last measured: seconds, CPU seconds, displacements.
        self.last_measured = (-math.inf, 0.0, 0)
        self.contended = 0  # measurements in a row that found the cores contended

    def reset(self):
        self.contended = 0
        torch.set_num_threads(self.wanted)

    def give_way(self):
        """Go down to one thread if much of the last seconds was spent in waiting for a core."""
        if not self.on_cpu or torch.get_num_threads() == 1:
            return
        if time.time() < self.last_measured[0] + 2:
            return
        try:
            displacements = psutil.Process().num_ctx_switches().involuntary
        except NotImplementedError:  # macOS and Windows say 0, some kernels do not count them
            displacements = 0
        now = (time.time(), time.process_time(), displacements)
        seconds, cpu_seconds, displaced = np.subtract(now, self.last_measured)
        self.last_measured = now
        # In a second of computing a run alone was displaced up to 23 times, one beside others 54 to
        # 155 times, however small its share of the cores.
        waited = cpu_seconds < 0.75 * self.wanted * seconds and displaced > 30 * cpu_seconds
        # A compilation or a video starts processes of its own: once is not enough.
        self.contended = self.contended + 1 if waited else 0
        if self.contended == 2:
            exact = torch.backends.cpu.get_cpu_capability() == "AVX512" or "MKL_CBWR" in os.environ
            rounding = "" if exact else ", which may round differently here"
            tqdm.write(f"CPU is busy: using 1 thread until the next checkpoint{rounding}")
            torch.set_num_threads(1)  # a compiled update is compiled once more, for one thread


if __name__ == "__main__":
    with closed_output_is_no_error():
        main()

# Requirements for `uv run sac_ablations.py` (PEP 723).
# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "torch==2.13.0",
#   "gymnasium[classic-control,mujoco]==1.4.0",
#   "gymnasium[box2d]==1.4.0; python_version < '3.14'",
#   "mujoco==3.11.0",
#   "shimmy==2.0.1",
#   "dm-control==1.0.44; python_version < '3.13'",
#   "psutil==7.2.2",
#   "tqdm==4.70.1",
#   "tyro==1.0.17",
#   "numpy==2.4.6; python_version >= '3.11'",
#   "numpy==2.2.6; python_version < '3.11'",
#   "matplotlib==3.10.9",
#   "tensorboard==2.21.0",
#   "wandb==0.31.0",
#   "moviepy==2.2.1",
# ]
# ///
