# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "torch==2.13.0", "gymnasium[mujoco]==1.4.0", "gymnasium[box2d]==1.4.0; python_version < '3.14'", "mujoco==3.11.0",
#   "shimmy==2.0.1", "dm-control==1.0.44; python_version < '3.13'", "psutil==7.2.2", "tqdm==4.70.1", "tyro==1.0.17",
#   "numpy==2.4.6; python_version >= '3.11'", "numpy==2.2.6; python_version < '3.11'", "matplotlib==3.10.9",
#   "tensorboard==2.21.0", "wandb==0.31.0", "moviepy==2.2.1",
# ]
# ///
"""Soft Actor-Critic with a learned temperature (Haarnoja et al. 2018, arXiv 1812.05905), in one file.

    python sac_ablations.py --env-id Hopper-v4 --n-critics 5          # train; results in runs/
    python sac_ablations.py --evaluate runs/<folder> --capture-video  # see what was learned

A policy pi maximises reward plus alpha times its own entropy. Critics Q_1..Q_C learn the soft value of an action from
replayed transitions (s, a, r, s', d), d = 1 where the task itself ended; slow copies Q' of them make the targets:

    (1)  y       = r + gamma (1 - d) (min_c Q'_c(s', a') - alpha log pi(a'|s')),   a' ~ pi(.|s')
    (2)  L_Q     = mean over critics and batch of (Q_c(s, a) - y)^2
    (3)  L_pi    = mean of alpha log pi(a|s) - min_c Q_c(s, a),   a = tanh(mean(s) + std(s) * noise)
    (4)  L_alpha = mean of -log(alpha) (log pi(a|s) + H),   H = -dim(A), the target entropy

Shapes: B batch, N environments, C critics, O observation and A action dimensions. Every count is in environment steps.
Comments on lines that sac_continuous.py does not have name the knob of the literature that they are for.
"""

import copy, ctypes, importlib.util, json, math, os, re, shlex, shutil, signal, sys, time, warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium as gym, numpy as np, psutil, torch, torch.nn as nn, torch.nn.functional as F, tyro
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

@dataclass
class Args:
    env_id: str = "Hopper-v4"  # any Gymnasium environment with bounded Box actions (also "module:name")
    seed: int = 1  # of weights, noise, sampling and environments
    total_timesteps: int = 1_000_000  # environment steps in all, summed over --num-envs
    num_envs: int = 1  # environments stepped together; there is one update per environment step all the same
    buffer_size: int = 1_000_000  # transitions kept for replay
    gamma: float = 0.99  # discount per step
    tau: float = 0.005  # share of the critics that moves into the target critics at each update
    batch_size: int = 256  # transitions per update
    learning_starts: int = 5_000  # steps of uniformly random actions before the first update
    policy_lr: float = 3e-4  # Adam's learning rate of the policy and of the temperature
    q_lr: float = 1e-3  # Adam's learning rate of the critics
    eval_frequency: int = 10_000  # steps between evaluations of the deterministic policy; 0 for none
    eval_episodes: int = 10  # episodes per evaluation, cut at 10,000 steps if the environment has no end
    checkpoint_frequency: int = 50_000  # steps between checkpoints; environments start afresh at each, for exact resume
    log_frequency: int = 1_000  # steps between records of losses and speed
    resume: Path | None = None  # run folder to continue; its flags hold unless given anew
    evaluate: Path | None = None  # run folder whose policy to evaluate instead of training
    capture_video: bool = False  # record the first episode of each evaluation as mp4
    track: bool = False  # mirror the records to Weights & Biases
    wandb_project_name: str = "one-file-sac"  # project there
    wandb_entity: str | None = None  # team there
    exp_name: str = "sac_ablations"  # part of the run folder's name
    cuda: bool = True  # use a GPU when there is one
    threads: int = min(2, torch.get_num_threads())  # CPU threads of PyTorch, until other processes want the cores
    compile: Literal["auto", "on", "off"] = "auto"  # the update; auto: on a CPU, for 50,000 steps or more
    matmul_precision: Literal["auto", "highest", "high", "medium"] = "auto"  # auto: float32; medium: bfloat16 critics
    n_critics: int = 2  # critics: how many
    critics_subset: int = 0  # critics: so many, drawn anew, make the target; the policy follows the mean (REDQ); 0: no
    policy_frequency: int = 1  # delay: critic updates per policy update
    compensate: bool = True  # delay: as many policy updates at once make up for it
    autotune: bool = True  # temperature: learn it
    alpha: float = 1.0  # temperature: its fixed value, or where learning starts
    alpha_lr: float = 0.0  # temperature: Adam's learning rate; 0: that of the policy
    target_entropy: float | None = None  # temperature: nats, for actions in [-1, 1]; None: -dim(A) times the scale
    target_entropy_scale: float = 1.0  # temperature: multiplies -dim(A)
    alpha_loss: Literal["log-alpha", "alpha"] = "log-alpha"  # temperature: the factor in its loss
    log_std: Literal["clamp", "tanh"] = "clamp"  # head: how the log standard deviation is held within its bounds
    log_std_min: float = -20.0  # head: lower bound
    log_std_max: float = 2.0  # head: upper bound
    heads: Literal["joint", "separate"] = "joint"  # head: mean and log std start as one last layer, or as one each
    tanh_correction: Literal["softplus", "eps"] = "softplus"  # head: eps is log(1 - a^2 + 1e-6)
    scaled_log_prob: bool = False  # head: densities of actions as the environment has them, instead of in [-1, 1]
    policy_l2: float = 0.0  # head: factor of half the sum of the policy's squared parameters in its loss
    hidden: int = 256  # networks: width of the hidden layers
    layers: int = 2  # networks: hidden layers
    init: Literal["xavier", "torch", "orthogonal", "normal"] = "xavier"  # networks: initial weights; normal: N(0, 1)
    activation: Literal["ReLU", "Tanh", "ELU", "GELU", "SiLU"] = "ReLU"  # networks: after each hidden layer
    layer_norm: bool = False  # networks: in the critics, before each activation, without a learned gain
    dropout: float = 0.0  # networks: share of the critics' hidden units left out, drawn anew for each use (DroQ)
    spectral_norm: bool = False  # networks: the largest singular value of the critics' hidden weights is 1
    value_network: bool = False  # value: a network V and its slow copy make the targets (SAC of January 2018)
    reward_scale: float = 1.0  # reward: factor, before it is stored
    random_steps: int = -1  # data: steps of random actions; -1: as many as --learning-starts
    truncation_terminates: bool = False  # data: time limits end the task
    combined_replay: bool = False  # CER: each batch holds the newest transition of each environment
    prioritized_replay: bool = False  # PER: chance (|TD error| + 0.1)^0.7, weight's exponent from 0.5 to 1
    updates_per_step: float = 1.0  # updates: per action of each environment
    update_interval: int = 1  # updates: steps between blocks of updates
    target_network_frequency: int = 1  # updates: critic updates between those of the targets; with --tau 1 hard ones
    normalize_obs: bool = False  # normalizer: networks get (obs - mean) / std of all seen so far, within [-5, 5]
    stack: int = 1  # stack: newest observations fed together, zeros before the first
    action_repeat: int = 1  # repeat: environment steps per action, rewards summed
    preset: Literal["none", "haarnoja", "stable-baselines", "spinningup", "yarats"] = "none"  # preset: other defaults
    returns, fixed = "return of an episode", {"env_id", "buffer_size"}  # shown by the curve; flags that a resume keeps
    fixed |= {"n_critics", "hidden", "layers", "value_network", "spectral_norm", "prioritized_replay"}  # all
    fixed |= {"normalize_obs", "stack", "action_repeat"}  # all

PRESETS = {  # preset
    "haarnoja": "--learning-starts 1000 --no-autotune --reward-scale 5 --q-lr 3e-4",
    "stable-baselines": "--random-steps 0 --learning-starts 100 --buffer-size 500000 --batch-size 64 --hidden 64 "
    "--q-lr 3e-4 --heads separate",
    "spinningup": "--random-steps 10000 --learning-starts 1000 --batch-size 100 --no-autotune --alpha 0.2 "
    "--policy-lr 1e-3 --update-interval 50 --init torch --heads separate",
    "yarats": "--batch-size 1024 --hidden 1024 --alpha 0.1 --log-std tanh --log-std-min -5 --init torch "
    "--policy-lr 1e-4 --q-lr 1e-4 --target-network-frequency 2",
}

class Batch(NamedTuple):
    obs: torch.Tensor  # (B, O)
    action: torch.Tensor  # (B, A)
    reward: torch.Tensor  # (B,)
    terminated: torch.Tensor  # (B,) 1.0 where the task itself ended; a time limit is 0.0 and still bootstraps
    next_obs: torch.Tensor  # (B, O) the true last observation where an episode ended, never the next one's first

class ReplayBuffer:
    """Ring of the newest `capacity` transitions on `device`, one float32 row each, columns in the order of Batch."""

    def __init__(self, capacity: int, obs_dim: int, action_dim: int, device="cpu", knobs: Args = Args()):  # CER, PER
        self.knobs, self.weight = knobs, torch.ones(knobs.batch_size, device=device)  # CER, PER: of the last batch
        self.widths = [obs_dim, action_dim, 1, 1, obs_dim] + [1] * knobs.prioritized_replay  # PER
        self.rows = torch.empty(capacity, sum(self.widths), device=device)  # memory is taken as rows fill
        self.count = 0  # transitions ever added

    def __len__(self) -> int:
        return min(self.count, len(self.rows))

    def add(self, obs, action, reward, terminated, next_obs):
        """Store N transitions: arrays (N, O), (N, A), (N,), (N,), (N, O)."""
        columns = (obs, action, reward[:, None], terminated[:, None], next_obs)
        if self.knobs.prioritized_replay:  # PER: the new get the highest so far
            columns += (np.full((len(obs), 1), self.rows[: len(self), -1].max().item() if self.count else 1),)
        for row in torch.from_numpy(np.concatenate(columns, axis=1, dtype=np.float32)):
            self.rows[self.count % len(self.rows)] = row
            self.count += 1

    def sample(self, batch_size: int, generator: torch.Generator) -> torch.Tensor:
        """Places (B,) of transitions, drawn uniformly with replacement."""
        index = torch.randint(len(self), (batch_size,), generator=generator, device=self.rows.device)  # CER, PER
        if self.knobs.prioritized_replay:  # PER (Schaul et al. 2015, arXiv 1511.05952)
            chances = self.rows[: len(self), -1].double() ** 0.7
            index = chances.multinomial(batch_size, replacement=True, generator=generator)
        for i in range(min(self.knobs.num_envs, batch_size) * self.knobs.combined_replay):  # CER (arXiv 1712.01275)
            index[i] = (self.count - 1 - i) % len(self.rows)
        if self.knobs.prioritized_replay:  # PER: (N chance / sum)^-beta over its maximum, which takes N and sum out
            beta, self.drawn = 0.5 + 0.5 * self.count * self.knobs.action_repeat / self.knobs.total_timesteps, index
            self.weight.copy_((chances[index] / chances[index].min()) ** -beta)
        return index  # CER, PER

    def __getitem__(self, index: torch.Tensor) -> Batch:
        """The transitions at the places `index` (B,)."""
        obs, action, reward, terminated, next_obs, *_ = self.rows[index].split(self.widths, dim=1)  # PER
        return Batch(obs, action, reward.squeeze(1), terminated.squeeze(1), next_obs)

INITS = dict(xavier=nn.init.xavier_uniform_, orthogonal=nn.init.orthogonal_, normal=nn.init.normal_)  # networks
INITS["torch"] = lambda weight: nn.init.kaiming_uniform_(weight, math.sqrt(5))  # networks: weight (out, in)

class Actor(nn.Module):
    """Policy over actions in (-1, 1)^A: tanh of a Gaussian with state-dependent mean and standard deviation."""

    def __init__(self, obs_dim: int, action_dim: int, hidden: int = 256, knobs: Args = Args()):  # head, networks
        super().__init__()
        self.knobs, self.log_scale, widths = knobs, 0.0, [obs_dim] + [hidden] * (knobs.layers - 1)  # head, networks
        hidden_layers = [m for n in widths for m in (nn.Linear(n, hidden), getattr(nn, knobs.activation)())]  # networks
        self.layers = nn.Sequential(*hidden_layers, nn.Linear(hidden, 2 * action_dim))
        for layer in self.layers[::2]:
            for weight in layer.weight.data.chunk(1 + (knobs.heads == "separate" and layer is self.layers[-1])):  # head
                INITS[knobs.init](weight)  # networks
            nn.init.zeros_(layer.bias) if knobs.init != "torch" else None  # networks

    def forward(self, obs: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Actions (B, A) and their log-densities (B,) from standard normal noise (B, A); zero noise: the mean."""
        mean, log_std = self.layers(obs).chunk(2, dim=-1)
        low, high = self.knobs.log_std_min, self.knobs.log_std_max  # head
        squashed = low + (high - low) / 2 * (log_std.tanh() + 1)  # head
        log_std = squashed if self.knobs.log_std == "tanh" else log_std.clamp(low, high)  # head
        u = mean + log_std.exp() * noise
        log_prob_u = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
        # log(1 - tanh(u)^2), in the form that neither overflows nor loses its gradient where tanh saturates
        log_slope = 2 * (math.log(2) - u - F.softplus(-2 * u))
        log_slope = (1 - u.tanh().square() + 1e-6).log() if self.knobs.tanh_correction == "eps" else log_slope  # head
        return u.tanh(), (log_prob_u - log_slope).sum(-1) - self.log_scale  # head

class Critics(nn.Module):
    """C independent Q-networks in one: each layer is a single batched product."""

    def __init__(self, obs_dim, action_dim, hidden: int = 256, count: int = 2, knobs: Args = Args()):  # networks
        super().__init__()
        widths = [obs_dim + action_dim, *[hidden] * knobs.layers, 1]  # networks
        self.weights = nn.ParameterList([torch.empty(count, *fans) for fans in zip(widths, widths[1:])])
        self.biases = nn.ParameterList([torch.zeros(count, 1, width) for width in widths[1:]])
        self.product_dtype = None  # of the hidden layers' products; None: that of the weights, which stay as they are
        for critic_weight in (w for weight in self.weights for w in weight.data):  # by itself: Xavier is for matrices
            INITS[knobs.init](critic_weight.T)  # networks
        for bias, fan_in in zip(self.biases, widths * (knobs.init == "torch")):  # networks
            nn.init.uniform_(bias, -(fan_in**-0.5), fan_in**-0.5)
        norm = nn.LayerNorm(hidden, elementwise_affine=False) if knobs.layer_norm else nn.Identity()  # networks
        self.between = nn.Sequential(nn.Dropout(knobs.dropout), norm, getattr(nn, knobs.activation)())  # networks
        for i in range(knobs.layers * knobs.spectral_norm):  # networks: singular vectors, better with each use
            self.register_buffer(f"direction{i}", torch.randn(count, hidden, 1))

    def forward(self, obs: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        """Q-values (C, B) of observations (B, O) and actions (B, A)."""
        x = torch.cat([obs, action], dim=-1).expand(len(self.weights[0]), -1, -1)
        for i, (weight, bias) in enumerate(list(zip(self.weights, self.biases))[:-1]):  # networks
            if hasattr(self, f"direction{i}"):  # networks (Miyato et al. 2018, arXiv 1802.05957)
                u, fixed = getattr(self, f"direction{i}"), weight.detach()
                v = F.normalize(fixed @ u, dim=1)
                u.copy_(F.normalize(fixed.mT @ v, dim=1))
                weight = weight / (v.mT @ weight @ u)
            x = self.between(x.to(self.product_dtype) @ weight.to(self.product_dtype) + bias)  # networks
        return (x * self.weights[-1].mT).sum(-1) + self.biases[-1].squeeze(-1)  # for one output faster than a product

class Adam(nn.Module):
    """Adam (Kingma & Ba 2015, arXiv 1412.6980). torch.optim's cannot be part of one compiled graph; this one can."""

    def __init__(self, parameters, lr: float):
        super().__init__()
        self.targets, self.lr = list(parameters), lr
        self.mean, self.square = (nn.ParameterList(map(torch.zeros_like, self.targets)) for _ in range(2))
        self.requires_grad_(False).register_buffer("steps", torch.zeros(()))

    @torch.no_grad()
    def minimize(self, loss: torch.Tensor, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8):
        """One step down the gradient of `loss` in these parameters alone: no other network gets a gradient."""
        gradients = torch.autograd.grad(loss, self.targets)
        self.steps += 1
        step_size, square_scale = self.lr / (1 - beta1**self.steps), (1 - beta2**self.steps).sqrt()
        for p, gradient, mean, square in zip(self.targets, gradients, self.mean, self.square):
            mean.lerp_(gradient, 1 - beta1)
            square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            p.sub_((mean / square.sqrt().div_(square_scale).add_(eps)).mul_(step_size))

class SAC(nn.Module):
    """The agent: every tensor that learning changes; state_dict() is all of it, optimizers included."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.gamma, self.tau, scaled = args.gamma, args.tau, -args.target_entropy_scale * action_dim  # temperature
        self.target_entropy = scaled if args.target_entropy is None else args.target_entropy  # temperature
        self.knobs, self.actor = args, Actor(obs_dim, action_dim, args.hidden, args)  # networks
        self.critics = Critics(obs_dim, action_dim, args.hidden, args.n_critics, args)  # critics, networks
        self.critics.product_dtype = torch.bfloat16 if args.matmul_precision == "medium" else None
        self.target_critics = copy.deepcopy(self.critics).requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.tensor(math.log(args.alpha)))  # temperature
        self.actor_optimizer = Adam(self.actor.parameters(), args.policy_lr)
        self.critic_optimizer = Adam(self.critics.parameters(), args.q_lr)
        self.alpha_optimizer = Adam([self.log_alpha], args.autotune * (args.alpha_lr or args.policy_lr))  # temperature
        if args.value_network:  # value: a critic of no action; as a part of the critics it moves its slow copy as well
            for critics in (self.critics, self.target_critics):
                critics.value = Critics(obs_dim, 0, args.hidden, 1, args)
            self.target_critics.requires_grad_(False).load_state_dict(self.critics.state_dict())
            self.value_optimizer = Adam(self.critics.value.parameters(), args.q_lr)
        self.register_buffer("moments", torch.zeros(3, obs_dim).double() if args.normalize_obs else None)  # normalizer

    def normalize(self, obs: torch.Tensor) -> torch.Tensor:  # normalizer
        if self.moments is None:
            return obs
        _, mean, square = self.moments / self.moments[0].clamp(min=1)  # of all seen: number, sum, sum of squares
        return ((obs - mean) / (square - mean.square()).clamp(min=1e-12).sqrt()).clamp(-5, 5).to(obs.dtype)

    def update(self, batch: Batch, noise: torch.Tensor, weight=1.0) -> dict[str, torch.Tensor]:  # PER
        """One step of all networks, with standard normal noise (2, B, A); returns 0-d tensors to log, on the device."""
        batch = batch._replace(obs=self.normalize(batch.obs), next_obs=self.normalize(batch.next_obs))  # normalizer
        alpha = self.log_alpha.detach().exp()
        if self.knobs.value_network:  # value: V learns min Q - alpha log pi (Haarnoja et al. 2018, arXiv 1801.01290)
            with torch.no_grad():
                action, log_prob = self.actor(batch.obs, noise[0])
                soft_value = self.critics(batch.obs, action).amin(0) - alpha * log_prob
            self.value_optimizer.minimize((self.critics.value(batch.obs, action[:, :0]) - soft_value).square().mean())
        with torch.no_grad():
            next_action, next_log_prob = self.actor(batch.next_obs, noise[0])
            next_q, subset = self.target_critics(batch.next_obs, next_action), self.knobs.critics_subset  # critics
            next_q = next_q[torch.randperm(len(next_q), device=next_q.device)[:subset]] if subset else next_q  # critics
            next_value = next_q.amin(0) - alpha * next_log_prob  # critics
            if self.knobs.value_network:  # value
                next_value = self.target_critics.value(batch.next_obs, next_action[:, :0])[0]
            target_q = batch.reward + self.gamma * (1 - batch.terminated) * next_value  # (1)
        q = self.critics(batch.obs, batch.action)
        critic_loss = (weight * (q - target_q).square()).mean()  # (2)  # PER
        self.critic_optimizer.minimize(critic_loss)
        losses = {"qf_loss": critic_loss, "qf1_values": q[0].mean(), "target_q": target_q.mean(), "alpha": alpha}

        losses |= {"td_error": (q - target_q).abs().mean(0)} if self.knobs.prioritized_replay else {}  # PER
        for actor_noise in noise[1:]:  # delay: as much of it as there are updates of the policy
            action, log_prob = self.actor(batch.obs, actor_noise)
            q = getattr(self.critics(batch.obs, action), "mean" if self.knobs.critics_subset else "amin")(0)  # critics
            actor_loss = (alpha * log_prob - q).mean()  # (3)
            if (l2 := self.knobs.policy_l2) > 0:  # head
                actor_loss = actor_loss + l2 / 2 * sum(p.square().sum() for p in self.actor.parameters())
            self.actor_optimizer.minimize(actor_loss)
            entropy = -log_prob.detach().mean()
            factor = self.log_alpha if self.knobs.alpha_loss == "log-alpha" else self.log_alpha.exp()  # temperature
            alpha_loss = factor * (entropy - self.target_entropy)  # (4)  # temperature
            self.alpha_optimizer.minimize(alpha_loss)
            losses |= {"actor_loss": actor_loss, "alpha_loss": alpha_loss, "entropy": entropy}
        with torch.no_grad():
            tau = self.tau * (self.critic_optimizer.steps % self.knobs.target_network_frequency == 0)  # updates
            for target, source in zip(self.target_critics.parameters(), self.critics.parameters()):
                target.lerp_(source, tau)  # updates
        return {f"losses/{name}": value.detach() for name, value in losses.items()}

    @torch.no_grad()
    def act(self, obs: np.ndarray, noise: torch.Tensor) -> np.ndarray:
        """Actions (N, A) in (-1, 1) for observations (N, O) and standard normal noise (N, A)."""
        obs = self.normalize(torch.as_tensor(obs, dtype=torch.float32, device=noise.device))  # normalizer
        return self.actor(obs, noise)[0].cpu().numpy()  # normalizer

def fail(message: str):
    """End the program for a mistake of its user: one line, exit code 2."""
    print("error:", " ".join(message.split()), file=sys.stderr)
    sys.exit(2)

def make_env(args: Args, video: Path | None = None) -> gym.Env:
    """One environment with flat observations (O,) and actions (A,) in [-1, 1]; first episode to mp4 at path `video`."""
    warnings.filterwarnings("ignore", message=".*(is out of date|Overwriting|script_method)")  # v4 is meant
    try:
        env = gym.make(args.env_id, disable_env_checker=True, **({"render_mode": "rgb_array"} if video else {}))
        if video:
            env.reset()
            env.render()
            once = dict(episode_trigger=lambda episode: episode == 0, name_prefix=video.name, disable_logger=True)
            env = gym.wrappers.RecordVideo(env, str(video.parent), **once)
    except Exception as error:  # third parties raise what they like; Gymnasium's own errors suggest the right name
        lacks = "dm_control" in args.env_id and re.search("o module named|Namespace", str(error))
        error = f"{error} (pip install shimmy dm-control)" if lacks else error
        fail(f"--env-id {args.env_id}{' --capture-video' if video else ''}: {error}")
    box = env.action_space
    if not (isinstance(box, gym.spaces.Box) and box.dtype.kind == "f" and np.isfinite(box.high - box.low).all()):
        fail(f"--env-id {args.env_id}: SAC needs continuous actions (a float Box) with finite bounds, not {box}")
    low, high = box.low, box.high  # the clip takes away what rounding adds at the bounds
    rescale = lambda a: np.clip(low + (a.reshape(box.shape) + 1) / 2 * (high - low), low, high).astype(box.dtype)
    class Repeat(gym.Wrapper):  # repeat
        def step(self, action: np.ndarray):
            steps = [self.env.step(action)]
            while len(steps) < args.action_repeat and not any(steps[-1][2:4]):  # terminated, truncated
                steps.append(self.env.step(action))
            return steps[-1][0], sum(reward for _, reward, *_ in steps), *steps[-1][2:]
    env = Repeat(env)  # repeat
    env = gym.wrappers.TransformAction(env, rescale, gym.spaces.Box(-1, 1, (math.prod(box.shape),), np.float32))
    env = gym.wrappers.FlattenObservation(env) if args.stack > 1 else env  # stack
    env = gym.wrappers.FrameStackObservation(env, args.stack, padding_type="zero") if args.stack > 1 else env  # stack
    return gym.wrappers.FlattenObservation(env)  # flat ones too: it copies, and some environments reuse their arrays

def make_vector_env(makers: list, seed: tuple[int, ...]) -> tuple[gym.vector.VectorEnv, np.ndarray]:
    """Environments stepped together and their first observations (N, O), each with its own seed drawn from `seed`."""
    # Gymnasium's default autoreset spends a step on the reset, with the action ignored: a transition that never was
    envs = gym.vector.SyncVectorEnv(makers, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)
    return envs, envs.reset(seed=np.random.SeedSequence(seed).generate_state(len(makers)).tolist())[0]

def evaluate(agent: SAC, args: Args, step: int, stochastic: bool = False, video: Path | None = None) -> np.ndarray:
    """Returns (E,) of one episode in each of E = --eval-episodes new environments; touches nothing that trains."""
    makers = [lambda: make_env(args, video)] + [lambda: make_env(args)] * (args.eval_episodes - 1)
    envs, obs = make_vector_env(makers, (args.seed, step, 1))
    generator = torch.Generator(agent.log_alpha.device).manual_seed(args.seed)
    returns, running, steps = np.zeros(envs.num_envs), np.ones(envs.num_envs, dtype=bool), 0
    while running.any() and steps < 10_000:
        noise = torch.randn(envs.action_space.shape, generator=generator, device=generator.device) * stochastic
        obs, reward, terminated, truncated, _ = envs.step(agent.act(obs, noise))
        returns, running, steps = returns + reward * running, running & ~(terminated | truncated), steps + 1
    envs.close()
    return returns

def save(state: dict, path: Path):
    """Write to a temporary name, flush to disk, then rename: at every instant one whole file stands at `path`."""
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file), file.flush(), os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save wraps what ended it, a disk or Ctrl-C, in a RuntimeError
        said = f"error: {path} was not written, the one before it stays: {error.__context__ or error}".splitlines()[0]
        sys.exit(error.__context__.code if isinstance(error.__context__, SystemExit) else said)
    finally:
        temporary.unlink(missing_ok=True)

def read_records(folder: Path) -> dict[str, np.ndarray]:
    """Scalars of a run by key, from its TensorBoard files, resumes accounted for: arrays of steps and values (2, n)."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {key: np.array([(e.step, e.value) for e in events.Scalars(key)]).T for key in events.Tags()["scalars"]}

def main():
    args, state = tyro.cli(Args), {"step": 0, "best": math.nan}
    args = tyro.cli(Args, args=[*PRESETS.get(args.preset, "").split(), *sys.argv[1:]])  # preset: the user's flags win
    if folder := args.resume or args.evaluate:
        mode = "--resume" if args.resume else "--evaluate"
        try:
            saved = json.loads((folder / "args.json").read_text())
            args = tyro.cli(Args, default=Args(**saved))  # flags given anew win
            state = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # a damaged file shows itself as almost anything
            fail(f"{mode} {folder} is missing or damaged, name another or start anew: {error}".splitlines()[0])
        changed = {key for key in saved if saved[key] != getattr(args, key)} - {"resume", "evaluate"}
        for key in changed & args.fixed:
            fail(f"{mode} {folder}: --{key.replace('_', '-')} {saved[key]} must stay")

    os.environ.setdefault("MUJOCO_GL", "egl" if sys.platform == "linux" else "glfw")  # renders without a screen
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    env = make_env(args, Path("probe") if args.capture_video else None)
    cpu, gpu, mujoco = torch.cpu.get_capabilities(), torch.cuda.is_available(), sys.modules.get("mujoco")  # if used
    versions = f"{sys.version} {' '.join(m.__version__ for m in (torch, np, gym, mujoco) if m)} {cpu['cpu_name']} {gpu}"
    another = versions != state.setdefault("versions", versions)
    if args.resume and (changed or another):
        print("warning: not bit for bit the run begun, changed:", *sorted(changed) or ["versions"], file=sys.stderr)
    device = torch.device("cuda" if args.cuda and gpu else "cpu")
    obs_dim, action_dim, n_envs = env.observation_space.shape[0], env.action_space.shape[0], args.num_envs
    stride = n_envs * args.action_repeat  # environment steps per round of the loop
    gigabytes = min(args.buffer_size, args.total_timesteps) * (2 * obs_dim + action_dim + 2) * 4e-9
    free = 1e-9 * (psutil.virtual_memory().available if device.type == "cpu" else torch.cuda.mem_get_info()[0])
    track, online = args.track and not args.evaluate, os.environ.get("WANDB_MODE", "online") == "online"
    wandb = importlib.import_module("wandb") if track and importlib.util.find_spec("wandb") else None
    counts = "total_timesteps learning_starts buffer_size num_envs batch_size eval_episodes log_frequency threads"
    limits = dict.fromkeys(counts.split(), (1, math.inf)) | dict.fromkeys(["tau", "policy_lr", "q_lr"], (1e-9, 1))
    limits |= dict(gamma=(0, 1), seed=(0, 2**63 - 1), checkpoint_frequency=(1, math.inf), eval_frequency=(0, math.inf))
    limits |= dict.fromkeys(["n_critics", "policy_frequency", "hidden", "layers", "stack"], (1, math.inf))  # all
    limits |= dict.fromkeys(["update_interval", "target_network_frequency", "action_repeat"], (1, math.inf))  # all
    limits |= dict.fromkeys(["alpha", "reward_scale", "updates_per_step"], (1e-9, math.inf))  # all
    limits |= dict(dropout=(0, 0.99), policy_l2=(0, 1), critics_subset=(0, args.n_critics), alpha_lr=(0, 1))  # all
    limits["learning_starts"] = (1, args.total_timesteps - 1)
    limits["num_envs"] = (1, min(args.learning_starts, args.buffer_size))  # the first update needs transitions
    for holds, message in [
        *((a <= vars(args)[k] <= b, f"--{k.replace('_', '-')} must lie in [{a}, {b}]") for k, (a, b) in limits.items()),
        (not (args.resume and args.evaluate), "--resume or --evaluate, one at a time: leave one out"),
        (args.batch_size <= args.buffer_size, "--batch-size must not exceed --buffer-size: lower it or raise that"),
        (args.evaluate or gigabytes <= free, f"--buffer-size takes {gigabytes:.1f} GB, {free:.1f} are free: lower it"),
        (not track or wandb, "--track needs wandb: pip install wandb"),
        (not (wandb and online) or wandb.login(prompt=False), "--track needs `wandb login`, or WANDB_MODE=offline"),
    ]:
        if not holds:
            fail(message)

    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):  # page faults can be half of an eager update:
        ctypes.CDLL(None).mallopt(-1, 2**30), ctypes.CDLL(None).mallopt(-3, 2**25)  # keep freed memory (trim, mmap)
    # "medium" is oneDNN on a CPU, twice as fast as MKL at these sizes and as exact, but with AMX it rounds to bfloat16
    auto = "medium" if device.type == "cpu" and cpu["architecture"] == "x86_64" and not cpu["amx_tile"] else "highest"
    torch.set_float32_matmul_precision(auto if args.matmul_precision == "auto" else args.matmul_precision)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    agent = SAC(obs_dim, action_dim, args).to(device)
    agent.load_state_dict(state.get("agent", agent.state_dict()))
    scale = np.log((env.unwrapped.action_space.high - env.unwrapped.action_space.low) / 2).sum().item()  # head
    agent.actor.log_scale = scale if args.scaled_log_prob else 0.0  # head
    step, best, last, losses = state["step"], state["best"], math.nan, {}
    if args.evaluate:
        for name in ("deterministic", "stochastic"):
            video = args.evaluate / "videos" / f"step-{step}-{name}" if args.capture_video else None
            returns = evaluate(agent, args, step, name == "stochastic", video)
            print(f"{name} policy: return {returns.mean():.2f} +- {returns.std():.2f} over {len(returns)} episodes")
        return
    print(f"{args.env_id}: {obs_dim} observations, {action_dim} actions, up to {gigabytes:.2f} GB of replay, {device}")
    compiled = args.compile == "on" or args.compile == "auto" and device.type == "cpu" and args.total_timesteps >= 50000
    if compiled:
        print("compiling the update, for up to a minute", flush=True)
        try:
            torch.compile(lambda x: x + 1)(torch.ones(64, device=device))
        except Exception:  # no compiler, no Python headers, no Triton: each has its own way to say so
            compiled = False
            print("no C++ compiler that works: the update runs uncompiled, which is slower", flush=True)
    args.compile = "on" if compiled else "off"  # resumed, a run goes on as it began, whatever its new length
    capacity = min(args.buffer_size, max(args.total_timesteps, step) + n_envs)  # CER, PER
    buffer = ReplayBuffer(capacity, obs_dim, action_dim, device, args)  # CER, PER
    random = torch.Generator(device).manual_seed(args.seed)  # of everything random but the environments
    name = f"{args.env_id}__{args.exp_name}__{args.seed}__{time.time_ns() // 10**6}"
    folder = args.resume or Path("runs", re.sub(r"[^\w.-]+", "-", name))
    if args.resume:
        buffer.rows[: len(state["rows"])], buffer.count = state["rows"], step // args.action_repeat
        if len(state["random"]) == len(random.get_state()):  # not so on another kind of device
            random.set_state(state["random"])
    else:
        folder.mkdir(parents=True)
        shutil.copy(__file__, folder)
    if not args.resume or changed:
        (folder / "args.json").write_text(json.dumps(vars(args) | {"resume": None, "evaluate": None}, indent=2))
    if wandb:
        tracked = max((steps[-1] for steps, _ in read_records(folder).values()), default=-1)
        names = dict(project=args.wandb_project_name, entity=args.wandb_entity, name=folder.name, id=folder.name)
        run = wandb.init(**names, resume="allow", dir=folder.resolve(), config=vars(args))
        run.save(folder / Path(__file__).name, base_path=folder, policy="now")
    writer = SummaryWriter(folder, purge_step=step + 1 if args.resume else None)
    learn, act = lambda index, noise: agent.update(buffer[index], noise, buffer.weight), agent.act  # PER
    if compiled:
        torch._dynamo.reset()  # with guards skipped, the graph of another run in this process would pass for ours
        torch._dynamo.config.trace_autograd_ops = True  # gradients inside the one graph
        torch._dynamo.mark_static_address(buffer.rows)  # CUDA graphs read it where it lies
        options = {"triton.cudagraphs" if device.type == "cuda" else "cpp_wrapper": True}  # what it costs to call them
        learn, act = (torch.compile(f, fullgraph=True, dynamic=False, options=options) for f in (learn, act))
    bar = tqdm(total=args.total_timesteps, initial=step, unit="step", disable=None, dynamic_ncols=True)
    timer, envs, seen = (step, time.time()), None, np.full(3, -math.inf)
    resume = shlex.join(["python", sys.argv[0], "--resume", str(folder)])
    signal.signal(signal.SIGINT, lambda *_: (bar.close(), sys.exit(f"stopped, to continue: {resume}")))

    def due(frequency: int) -> bool:
        return frequency > 0 and (step // frequency > (step - stride) // frequency or step >= args.total_timesteps)

    def record(scalars: dict):
        for key, value in scalars.items():
            writer.add_scalar(key, value, step)
        writer.flush()  # first, so that TensorBoard's last step, read at a resume, is never before wandb's
        if wandb and step > tracked:
            run.log(scalars, step=step)

    # how many threads compute changes no bits, but graphs are compiled for one number of them
    use = lambda threads: (torch.set_num_threads(threads), torch._dynamo.reset())
    rounds = lambda step: max(0, step - args.learning_starts) // args.update_interval * args.update_interval  # updates
    updates = lambda step: int(rounds(step) * args.updates_per_step / args.action_repeat)  # updates: due by then in all
    while True:
        if envs is None or due(args.checkpoint_frequency):
            if envs is not None or not args.resume:
                rows = torch.from_numpy(buffer.rows[: len(buffer)].cpu().numpy())  # the filled rows alone, no copy
                state |= dict(agent=agent.state_dict(), rows=rows, random=random.get_state(), step=step, best=best)
                save(state, folder / "checkpoint.pt")
            if step >= args.total_timesteps:
                break
            # environments cannot be saved: every run, resumed or not, makes them anew at its checkpoints
            envs, obs = make_vector_env([lambda: make_env(args)] * n_envs, (args.seed, step, 0))
            returns, lengths = np.zeros((2, n_envs))
            if torch.get_num_threads() != args.threads:
                use(args.threads)
        if args.normalize_obs:  # normalizer
            agent.moments += torch.from_numpy(np.stack([obs**0, obs, obs.astype(float) ** 2]).sum(1)).to(device)
        if step < (args.learning_starts if args.random_steps < 0 else args.random_steps):  # data
            action = (torch.rand((n_envs, action_dim), generator=random, device=device) * 2 - 1).cpu().numpy()
        else:
            action = act(obs, torch.randn((n_envs, action_dim), generator=random, device=device))
        for update in range(updates(step), updates(step + stride)):  # updates
            policy = (args.policy_frequency if args.compensate else 1) * (update % args.policy_frequency == 0)  # delay
            noise = torch.randn((1 + policy, args.batch_size, action_dim), generator=random, device=device)  # delay
            if args.critics_subset or args.dropout:  # critics, networks: so that a resumed run draws what they drew
                torch.manual_seed(torch.randint(2**62, (), generator=random, device=device).item())
            losses |= learn(buffer.sample(args.batch_size, random), noise)  # a GPU does it while the environments step
            if args.prioritized_replay:  # PER
                buffer.rows[buffer.drawn, -1] = losses.pop("losses/td_error") + 0.1
        if torch.get_num_threads() > 1 and time.time() > seen[0] + 2:  # 100 times slower than one if others work
            now = np.array([time.time(), time.process_time(), psutil.Process().num_ctx_switches().involuntary])
            (seconds, computed, displaced), seen = now - seen, now
            if seconds < 5 and computed < 0.75 * args.threads * seconds and displaced > 50 * seconds:
                bar.write("other processes want the cores: one thread until the next checkpoint")
                use(1)
        next_obs, reward, terminated, truncated, infos = envs.step(action)
        done, true_next_obs = terminated | truncated, next_obs.copy()
        step, returns, lengths = step + stride, returns + reward, lengths + args.action_repeat
        if done.any():
            true_next_obs[done] = np.stack(infos["final_obs"][done])
            last, best = returns[done].mean(), np.fmax(best, returns[done].mean()).item()
            record({"charts/episodic_return": last, "charts/episodic_length": lengths[done].mean()})
            returns[done] = lengths[done] = 0
        terminated = terminated | truncated & args.truncation_terminates  # data
        buffer.add(obs, action, args.reward_scale * reward, terminated, true_next_obs)  # reward
        obs = next_obs
        bar.update(stride)
        if due(args.log_frequency) or due(args.checkpoint_frequency):
            replay = {"replay": buffer.rows[: len(buffer)].sum()} if due(args.checkpoint_frequency) else {}
            for name, value in (losses | agent.state_dict() | replay).items():
                if not value.isfinite().all():
                    sys.exit(f"error: {name} is not finite at step {step}; the last good checkpoint stays in {folder}")
            speed, timer = (step - timer[0]) / (time.time() - timer[1]), (step, time.time())
            record({name: value.item() for name, value in losses.items()} | {"charts/SPS": speed})
            bar.set_postfix_str(news := f"return {last:.1f}, best {best:.1f}")
            if bar.disable:
                minutes = (args.total_timesteps - step) / speed / 60
                print(f"step {step}, {speed:.0f} steps/s, {minutes:.0f} minutes left, {news}", flush=True)
        if due(args.eval_frequency):
            video = folder / "videos" / f"step-{step}" if args.capture_video else None
            result = evaluate(agent, args, step, video=video)
            record({"eval/episodic_return": result.mean(), "eval/episodic_return_std": result.std()})
            if wandb and video and step > tracked:
                run.log({"eval/video": wandb.Video(f"{video}-episode-0.mp4", format="mp4")}, step=step)
            bar.write(f"step {step}: evaluation {result.mean():.1f} +- {result.std():.1f}")
    bar.close()
    save({"agent": agent.state_dict()}, folder / "model.pt")
    axes, records = Figure(figsize=(8, 5), layout="constrained").subplots(), read_records(folder)
    for key in sorted(records.keys() & {"charts/episodic_return", "eval/episodic_return"}):
        axes.plot(*records[key], ".-", label=key)
        axes.legend()
    axes.set(title=folder.name, xlabel="environment steps", ylabel=args.returns)
    axes.figure.savefig(folder / "learning_curve.png", dpi=120)
    print(f"done: {folder}")

if __name__ == "__main__":
    main()
