"""What a run leaves behind, and what it says on the way.

TensorBoard, Weights & Biases, learning curve, models, videos. One run of 600 steps on Pendulum-v1,
whose episodes have 200, serves most tests. On the suite, whose episodes have 1000, all these counts
are five times as large.
"""

import dataclasses
import fcntl
import json
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import termios
import time
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import helpers
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from helpers import command, load, only_run, register, run_forked, same, saved_args, words
from matplotlib.figure import Figure
from matplotlib.image import imread
from moviepy import VideoFileClip
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

import sac_continuous
from tests.wandb_files import finished_records, wandb_records

once = pytest.mark.only("sac_continuous")  # it takes long, and the lines are the same in each
not_thrice = pytest.mark.without("sac_ablations")  # likewise
slow = pytest.mark.slow

CHARTS = {"charts/episodic_return", "charts/episodic_length"}
LOSSES = {"losses/qf_loss", "losses/qf1_values", "losses/actor_loss", "losses/alpha"}
LOSSES |= {"losses/alpha_loss", "losses/entropy", "losses/target_q"}
EVALUATIONS = {"eval/episodic_return", "eval/episodic_return_std"}
KEYS = CHARTS | LOSSES | EVALUATIONS | {"charts/SPS"}

# The flags that are numbers of steps.
COUNTS = {"total_timesteps", "learning_starts", "log_frequency", "eval_frequency"}
COUNTS |= {"checkpoint_frequency"}
SHARED = dict(batch_size=8, threads=1, eval_episodes=2, cuda=False)
SHARED |= dict(total_timesteps=600, learning_starts=100, log_frequency=100, eval_frequency=200)


@pytest.fixture(scope="module")
def case(sac):
    """The shared run's environment, and what differs in its episodes."""
    if sac.__name__ == "sac_dmc":
        given = dict(env_id="cartpole-balance", action_repeat=50)
        # Few frames, as they take long without a GPU.
        return SimpleNamespace(scale=5, frames=20, returns=(0, 1000), given=given)
    return SimpleNamespace(
        scale=1, frames=200, returns=(-3300, 0), given=dict(env_id="Pendulum-v1")
    )


def flags(case, **changed) -> dict:
    """The shared run's flags, some of them changed, to counts as on Pendulum."""
    given = SHARED | changed
    return case.given | {
        key: value * case.scale if key in COUNTS else value for key, value in given.items()
    }


def run(sac, folder: Path, arguments: list[str]):
    """The end of one run; OpenGL, which renders the suite, does not survive a fork."""
    if sac.__name__ == "sac_dmc" and "--capture-video" in arguments:
        return helpers.run(folder, sac, arguments)
    return run_forked(folder, sac, " ".join(arguments), curve=True)


def tensorboard(folder: Path) -> dict:
    """Scalars of a run by key: lists of (step, value)."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    scalars = {}
    for key in events.Tags()["scalars"]:
        scalars[key] = [(event.step, event.value) for event in events.Scalars(key)]
    return scalars


def steps(case, scalars, key) -> list[float]:
    """When a key was recorded, in counts as on Pendulum."""
    return [step / case.scale for step, _ in scalars[key]]


def frames_of(path: Path) -> np.ndarray:
    """(T, height, width, 3)"""
    with VideoFileClip(str(path)) as clip:
        return np.stack(list(clip.iter_frames())).astype(np.int16)  # so that differences are right


def shows_an_episode(case, path: Path) -> bool:
    """Whether a video is as long as an episode, and more moves in it than compression moves."""
    video = frames_of(path)
    return abs(len(video) - case.frames) <= 2 and abs(video - video[0]).max() > 100


def has_videos(sac) -> bool:
    """Whether the shared run records: videos take long, and the lines are the same in each."""
    return sac.__name__ != "sac_ablations"


@pytest.fixture(scope="module")
def recorded(sac, case, tmp_path_factory):
    """The shared run: its folder, and what it said."""
    folder = tmp_path_factory.mktemp("recorded")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SDL_VIDEODRIVER", "dummy")
        ended = run(sac, folder, words(**flags(case), capture_video=has_videos(sac)))
    assert ended.code == 0, ended.err
    return SimpleNamespace(folder=only_run(folder), out=ended.out)


@pytest.fixture
def copied(recorded, tmp_path):
    """The shared run's folder, to be changed at will."""
    return Path(shutil.copytree(recorded.folder, tmp_path / "runs" / "copy"))


@pytest.fixture(scope="module")
def scalars(recorded):
    return tensorboard(recorded.folder)


# TensorBoard --------------------------------------------------------------------------------------


def test_keys(scalars):
    assert scalars.keys() == KEYS


def test_read_records_reads_what_tensorboard_reads(sac, recorded, scalars):
    records = sac.read_records(recorded.folder)
    assert records.keys() == scalars.keys()
    for key, points in scalars.items():
        np.testing.assert_array_equal(records[key], np.array(points).T)


def test_every_record_of_a_long_run_is_read(sac, tmp_path):
    """By default TensorBoard samples 10,000 of them."""
    with SummaryWriter(tmp_path) as writer:
        for step in range(10_050):
            writer.add_scalar("charts/SPS", 1, step)
    assert sac.read_records(tmp_path)["charts/SPS"].shape == (2, 10_050)


def test_what_a_resume_discards_is_not_read(sac, tmp_path):
    """TensorBoard keeps the name of a key of which it has discarded all points."""
    with SummaryWriter(tmp_path) as writer:
        writer.add_scalar("eval/episodic_return", 1, 100)
    time.sleep(1.1)  # TensorBoard reads files in the order of their seconds
    with SummaryWriter(tmp_path, purge_step=1, filename_suffix=".resumed") as writer:
        writer.add_scalar("charts/episodic_return", 2, 40)
    records = sac.read_records(tmp_path)
    assert records.keys() == {"charts/episodic_return"}
    np.testing.assert_array_equal(records["charts/episodic_return"], [[40], [2]])
    sac.plot_learning_curve(tmp_path)
    assert (tmp_path / "learning_curve.png").is_file()


@once
@pytest.mark.parametrize("key", sorted(KEYS))
def test_keys_are_explained_in_the_documentation(sac, key):
    pages = [helpers.ROOT / "README.md", *helpers.ROOT.glob("docs/*.md")]
    lines = [line for page in pages for line in page.read_text().splitlines()]
    rows = [line.split("|")[1:-1] for line in lines if line.startswith("|")]
    explained = [row for row in rows if f"`{key}`" in row[0]]
    assert explained
    assert re.search(r"\w{2,}", explained[0][1])


def test_speed_is_logged_with_each_log(case, scalars):
    assert steps(case, scalars, "charts/SPS") == [100, 200, 300, 400, 500, 600]


@pytest.mark.parametrize("key", sorted(LOSSES))
def test_losses_are_logged_from_the_first_update_on(case, scalars, key):
    assert steps(case, scalars, key) == [200, 300, 400, 500, 600]  # the first is in step 101


@pytest.mark.usefixtures("gymnasium_only")
def test_losses_are_those_of_the_last_update_before_the_log(sac, train):
    """Logged are the first update, each seventh step, each checkpoint and the end."""
    frequencies = dict(log_frequency=7, checkpoint_frequency=16)
    seen = train(sac, "Counting-mixed-v0", 40, learning_starts=20, **frequencies)
    for key in LOSSES:
        steps, values = seen.records[key]
        assert list(steps) == [21, 28, 32, 35, 40]
        # The update of a step comes before the environment makes it.
        last = [[u for u in seen.updates if u.made < step][-1] for step in steps]
        np.testing.assert_allclose(values, [u.losses[key].item() for u in last], rtol=1e-6)


@pytest.mark.parametrize("key", sorted(CHARTS | EVALUATIONS))
def test_episodes_and_evaluations_are_logged_when_they_end(case, scalars, key):
    assert steps(case, scalars, key) == [200, 400, 600]


@slow
def test_steps_of_several_environments(sac, case, tmp_path):
    """Two environments make two steps at a time: their first episodes end at step 400."""
    changed = dict(num_envs=2, total_timesteps=400, learning_starts=200)
    ended = run(sac, tmp_path, words(**flags(case, **changed)))
    assert ended.code == 0, ended.err
    scalars = tensorboard(only_run(tmp_path))
    assert scalars.keys() == KEYS
    assert steps(case, scalars, "charts/SPS") == [100, 200, 300, 400]
    expected = dict.fromkeys(LOSSES, [300, 400]) | dict.fromkeys(EVALUATIONS, [200, 400])
    expected |= dict.fromkeys(CHARTS, [400])
    assert {key: steps(case, scalars, key) for key in expected} == expected
    assert scalars["charts/episodic_length"] == [(400 * case.scale, 200 * case.scale)]


@pytest.mark.parametrize("key", sorted(KEYS))
def test_values_are_finite(scalars, key):
    assert np.isfinite([value for _, value in scalars[key]]).all()


def test_lengths_are_those_of_the_episodes(case, scalars):
    lengths = [value for _, value in scalars["charts/episodic_length"]]
    assert lengths == [200 * case.scale] * 3


@pytest.mark.parametrize("key", ["charts/episodic_return", "eval/episodic_return"])
def test_returns_are_those_that_the_task_can_pay(case, scalars, key):
    low, high = case.returns
    assert all(low < value < high for _, value in scalars[key])


@pytest.mark.parametrize("key", ["charts/SPS", "losses/alpha", "losses/qf_loss"])
def test_values_are_positive(scalars, key):
    assert all(value > 0 for _, value in scalars[key])


def test_speed_is_that_since_the_last_log(sac, tmp_path, monkeypatch, capsys):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(sac, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    logger = sac.Logger(sac.Args(total_timesteps=1_000_000, learning_starts=1), tmp_path, 1000)
    for step, now in ((1500, 101.0), (1600, 102.0), (2600, 112.0)):
        clock.now = now
        logger.log_metrics({}, step)
    logger.close()
    expected = [(1500, 500), (1600, 100), (2600, 100)]
    assert tensorboard(tmp_path)["charts/SPS"] == expected
    left = [line.rsplit("  ", 1)[1] for line in capsys.readouterr().out.splitlines()]
    assert left == ["33 min left", "2 h 46 min left", "2 h 46 min left"]


def test_the_bar_ends_full_where_the_last_round_oversteps(sac, tmp_path, monkeypatch):
    """Beyond its total tqdm would show no share at all."""
    bar = sac.tqdm
    shown = {"disable": False}  # as on a terminal
    monkeypatch.setattr(sac, "tqdm", lambda **kwargs: bar(**kwargs | shown))
    logger = sac.Logger(sac.Args(total_timesteps=1000, num_envs=3), tmp_path, 0)
    logger.log({}, 999)
    logger.log({}, 1002)
    logger.close()
    assert (logger.bar.n, logger.bar.total) == (1000, 1000)


# Files --------------------------------------------------------------------------------------------


def test_learning_curve_is_a_picture_with_colours(recorded):
    path = recorded.folder / "learning_curve.png"
    assert path.read_bytes().startswith(b"\x89PNG\r\n")
    colours = imread(path)[..., :3].reshape(-1, 3)
    assert len(np.unique(colours, axis=0)) > 1
    # The curves: frame, ticks and text are black and grey.
    assert (np.ptp(colours, axis=1) > 0.3).sum() > 100


def test_learning_curve_shows_the_returns(sac, recorded, scalars, monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    sac.plot_learning_curve(recorded.folder)
    (figure,) = figures
    lines = {line.get_label(): line.get_xydata() for line in figure.axes[0].lines}
    keys = {"charts/episodic_return", "eval/episodic_return"}
    same(lines, {key: np.array(scalars[key]) for key in keys})


def test_model_is_the_agent_of_the_end(sac, case, recorded):
    agent = sac.SAC(5 if sac.__name__ == "sac_dmc" else 3, 1, sac.Args())
    model = load(recorded.folder / "model.pt")
    agent.load_state_dict(model["agent"])
    checkpoint = load(recorded.folder / "checkpoint.pt")
    assert model["step"] == checkpoint["step"] == 600 * case.scale
    same(model["agent"], checkpoint["agent"])


@slow
def test_there_is_no_model_before_the_end(sac, case, tmp_path):
    def sabotage(script):
        evaluate = script.evaluate

        def stop(agent, args, step, **rest):
            if step == 400 * case.scale:
                os._exit(9)
            return evaluate(agent, args, step, **rest)

        script.evaluate = stop

    ended = run_forked(tmp_path, sac, " ".join(words(**flags(case))), sabotage)
    assert ended.code == 9
    assert (only_run(tmp_path) / "best.pt").exists()
    assert not (only_run(tmp_path) / "model.pt").exists()


def test_best_is_the_step_of_the_highest_evaluation(recorded, scalars):
    best = load(recorded.folder / "best.pt")
    step, highest = max(scalars["eval/episodic_return"], key=lambda point: point[1])
    assert best["step"] == step
    assert best["return"] == pytest.approx(highest, rel=1e-6)


def test_arguments(sac, case, recorded):
    expected = dataclasses.asdict(sac.Args()) | flags(case) | {"capture_video": has_videos(sac)}
    expected["compile"] = "off"  # what "auto" came to
    assert saved_args(recorded.folder) == expected


def test_script(sac, recorded):
    script = Path(sac.__file__)
    assert (recorded.folder / script.name).read_bytes() == script.read_bytes()


def test_the_end_says_where_everything_is(recorded):
    folder = f"runs/{recorded.folder.name}"
    end = recorded.out.splitlines()[-3:]
    assert end[0] == f"done: {folder}"
    assert end[1] == f"curve: {folder}/learning_curve.png"
    assert end[2].startswith("evaluate: python ")
    assert end[2].endswith(f" --evaluate {folder}")


def test_folder_names(sac, case, recorded):
    name = rf"{case.given['env_id']}__{sac.__name__}__1__\d+"
    assert re.fullmatch(name, recorded.folder.name)


@slow
def test_folder_names_hold_what_every_file_system_takes(sac, case, tmp_path, monkeypatch):
    entry_point = "gymnasium.envs.classic_control:PendulumEnv"
    toys = f"import gymnasium\ngymnasium.register('My/Swing-v1', '{entry_point}')"
    (tmp_path / "toys.py").write_text(toys)
    monkeypatch.syspath_prepend(tmp_path)
    env_id = "toys:My/Swing-v1"
    if sac.__name__ == "sac_dmc":
        env_id = "shimmy:dm_control/cartpole-swingup-v0"
    changed = dict(env_id=env_id, total_timesteps=30, learning_starts=20, eval_frequency=0, seed=7)
    arguments = words(**flags(case) | flags(case, **changed), exp_name="a:b/c*d?")
    for _ in range(2):
        ended = run(sac, tmp_path, arguments)
        assert ended.code == 0, ended.err
    names = [path.name for path in (tmp_path / "runs").iterdir()]
    assert len(names) == 2  # a new one each time, and none inside another
    for name in names:
        assert re.fullmatch(r".*__a.b.c.d.?__7__\d+", name)
        assert re.fullmatch(r"[\w.-]+", name)


# Videos and evaluation ----------------------------------------------------------------------------


@slow
@not_thrice
@pytest.mark.parametrize("step", [200, 400, 600])
def test_videos(sac, case, recorded, step):
    assert len(list(recorded.folder.rglob("*.mp4"))) == 3
    (path,) = recorded.folder.rglob(f"step-{step * case.scale}-*.mp4")
    assert shows_an_episode(case, path)


class Flashing(gym.Env):
    """A picture tells its instance (red), its episode (green) and its step (blue)."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}
    observation_space = Box(-1, 1, (1,))
    action_space = Box(-1, 1, (1,))
    instances = 0

    def __init__(self, render_mode=None):
        self.render_mode = render_mode
        self.instance = Flashing.instances
        Flashing.instances += 1
        self.episode = -1
        self.t = 0

    def reset(self, *, seed=None, options=None):
        # Only an episode with a seed is one of the evaluation, or follows one.
        self.episode = 0 if seed is not None else self.episode + 1
        self.t = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.t += 1
        length = 10 if self.instance == self.episode == 0 else 20
        return np.zeros(1, np.float32), 1.0, self.t == length, False, {}

    def render(self):
        colour = (100 * self.instance, 100 * self.episode, 20 * self.t)
        return np.full((64, 64, 3), np.minimum(colour, 255), np.uint8)


@pytest.mark.usefixtures("gymnasium_only")
def test_the_video_is_the_first_episode_of_the_first_environment(sac, tmp_path, monkeypatch):
    monkeypatch.setattr(Flashing, "instances", 0)
    args = sac.Args(env_id=register("Flashing", Flashing), eval_episodes=2)
    agent = sac.SAC(1, 1, args)
    sac.evaluate(agent, args, 0, video=tmp_path / "videos" / "step-0")
    (path,) = (tmp_path / "videos").iterdir()
    assert path.name == "step-0-episode-0.mp4"
    red, green, blue = frames_of(path).mean((1, 2)).T
    assert len(red) in (10, 11)
    assert red.max() < 30
    assert green.max() < 30
    assert (np.diff(blue) > 5).all()


class Unseen(Flashing):
    """Its render() returns nothing, or a picture without colours."""

    picture = None

    def render(self):
        return self.picture


@pytest.mark.usefixtures("gymnasium_only")
@pytest.mark.parametrize("picture", [None, np.zeros((64, 64), np.uint8)], ids=["none", "grey"])
def test_pictures_that_cannot_be_recorded_are_refused_at_once(
    sac, tmp_path, monkeypatch, capsys, picture
):
    monkeypatch.setattr(Unseen, "picture", picture)
    args = sac.Args(env_id=register("Unseen", Unseen), capture_video=True)
    with pytest.raises(SystemExit) as ended:
        sac.make_env(args, tmp_path / "videos" / "step-0")
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "--capture-video: render() must return an array (height, width, 3)" in said


@pytest.mark.usefixtures("gymnasium_only")
def test_a_video_has_no_more_frames_than_fit_in_memory(sac, tmp_path, monkeypatch):
    # sac_dmc.py has the environments of sac_continuous.py here.
    for script in (sac, sac_continuous):
        monkeypatch.setattr(script, "LONGEST_VIDEO", 6)
    monkeypatch.setattr(Flashing, "instances", 0)
    args = sac.Args(env_id=register("Flashing", Flashing), eval_episodes=1)
    returns, _ = sac.evaluate(sac.SAC(1, 1, args), args, 0, video=tmp_path / "videos" / "step-0")
    assert returns == 10  # the episode goes on
    (path,) = (tmp_path / "videos").iterdir()
    assert len(frames_of(path)) in (5, 6)


@pytest.fixture
def evaluated(sac, case, tmp_path, copied, monkeypatch):
    """The shared run, evaluated with videos: what was said, and what changed in its folder."""
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    flags = "--evaluate runs/copy --capture-video --eval-episodes 3"
    ended = run(sac, tmp_path, flags.split())
    assert ended.code == 0, ended.err
    assert only_run(tmp_path) == copied
    return SimpleNamespace(out=ended.out, before=before)


RESULT = r"{} policy at step ([\d,]+): return (-?\d+\.\d+) \+- (\d+\.\d+) over (\d+) episodes"


def results(out: str) -> dict:
    """Step, mean, spread and number of episodes that --evaluate printed, by policy."""
    found = {}
    for policy in ("deterministic", "stochastic"):
        ((step, *numbers),) = re.findall(RESULT.format(policy), out)
        found[policy] = [int(step.replace(",", "")), *map(float, numbers)]
    return found


@slow
@not_thrice
def test_evaluation_of_a_run(sac, case, tmp_path, evaluated, copied):
    found = results(evaluated.out)
    low, high = case.returns
    for step, mean, spread, episodes in found.values():
        assert step == 600 * case.scale
        assert low < mean < high
        assert spread > 0
        assert episodes == 3
    assert found["deterministic"] != found["stochastic"]
    changed = [path for path, data in evaluated.before.items() if path.read_bytes() != data]
    assert not changed
    new = {path.name for path in copied.rglob("*") if path.is_file()}
    new -= {path.name for path in evaluated.before}
    step = 600 * case.scale
    policies = ("deterministic", "stochastic")
    assert new == {f"step-{step}-{policy}-episode-0.mp4" for policy in policies}
    videos = [path for path in copied.rglob("*stic-episode-0.mp4")]
    assert all(shows_an_episode(case, path) for path in videos)


@slow
@pytest.mark.parametrize("policy", ["deterministic", "stochastic"])
def test_evaluation_prints_what_each_policy_is_paid(sac, case, tmp_path, copied, policy):
    """What is printed is what evaluate() returns, once by the mode and once by drawn actions."""
    ended = run_forked(tmp_path, sac, "--evaluate runs/copy --eval-episodes 3 --no-capture-video")
    args = sac.Args(**saved_args(copied))
    args.eval_episodes = 3
    sac.prepare_machine(args, torch.device("cpu"))
    checkpoint = load(copied / "checkpoint.pt")
    agent = sac.make_agent(args, sac.make_env(args), torch.device("cpu"), checkpoint)
    step = 600 * case.scale
    stochastic = policy == "stochastic"
    returns, _ = sac.evaluate(agent, args, step, stochastic, stream=2)
    step_said, mean, spread, episodes = results(ended.out)[policy]
    assert (step_said, episodes) == (step, 3)
    assert mean == pytest.approx(returns.mean(), abs=0.006)
    assert spread == pytest.approx(returns.std(), abs=0.006)


def test_what_one_would_share_can_be_evaluated(sac, case, tmp_path, copied):
    """model.pt and args.json are enough, and give what the whole folder gives."""
    shared = tmp_path / "shared"
    shared.mkdir()
    for name in ("model.pt", "args.json"):
        shutil.copy(copied / name, shared)
    arguments = "--eval-episodes 2 --no-capture-video"
    ended = run_forked(tmp_path, sac, f"--evaluate shared {arguments}")
    assert ended.code == 0, ended.err
    whole = run_forked(tmp_path, sac, f"--evaluate runs/copy {arguments}")
    assert results(ended.out) == results(whole.out)
    assert {path.name for path in shared.iterdir()} == {"model.pt", "args.json"}


@slow
@pytest.mark.parametrize("name", ["best.pt", "model.pt", "checkpoint.pt"])
def test_a_file_of_a_run_can_be_evaluated(sac, tmp_path, copied, name):
    state = load(copied / name)
    torch.save(state | {"step": 77}, copied / name)  # so that it is seen which was read
    arguments = "--eval-episodes 2 --no-capture-video"
    ended = run_forked(tmp_path, sac, f"--evaluate runs/copy/{name} {arguments}")
    assert ended.code == 0, ended.err
    assert [step for step, *_ in results(ended.out).values()] == [77, 77]


# Progress -----------------------------------------------------------------------------------------


def lines_of_progress(out: str) -> dict:
    """The lines that tell how far the run is, by step."""
    found = re.findall(r"^step ([\d,]+)/[\d,]+  (.*)$", out, re.M)
    return {int(step.replace(",", "")): line for step, line in found}


def test_progress_in_a_file_is_a_line_at_each_log(case, recorded):
    lines = lines_of_progress(recorded.out)
    assert list(lines) == [step * case.scale for step in (100, 200, 300, 400, 500, 600)]
    assert "\r" not in recorded.out


def test_progress_says_when_learning_starts(case, recorded):
    first, *rest = lines_of_progress(recorded.out).values()
    assert first.startswith(f"learning starts at step {100 * case.scale:,}")
    assert len(rest) == 5
    assert not any("learning starts" in line for line in rest)


def test_progress_tells_speed_time_left_and_returns(case, recorded, scalars):
    lines = lines_of_progress(recorded.out)
    *_, (_, train_return) = scalars["charts/episodic_return"]
    *_, (_, evaluation) = [p for p in scalars["eval/episodic_return"] if p[0] < 600 * case.scale]
    expected = rf"\d+ steps/s  \d+ min left  return {train_return:.1f}  eval {evaluation:.1f}"
    assert re.fullmatch(expected, lines[600 * case.scale])


def test_evaluations_are_printed(recorded, scalars):
    means = scalars["eval/episodic_return"]
    spreads = scalars["eval/episodic_return_std"]
    assert len(means) == len(spreads) == 3
    for (step, mean), (_, std) in zip(means, spreads):
        line = f"step {step:,}: evaluation return {mean:.1f} +- {std:.1f} (2 episodes)"
        assert line in recorded.out.splitlines()


@slow
@once
def test_progress_on_a_terminal(sac, case, tmp_path):
    """Where somebody watches, a bar in place of the lines."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 120, 0, 0))
    arguments = words(**flags(case, total_timesteps=300, eval_frequency=0))
    streams = dict(stdin=theirs, stdout=theirs, stderr=theirs)
    process = subprocess.Popen(command(sac, arguments), cwd=tmp_path, **streams)
    os.close(theirs)
    said = b""
    try:
        while part := os.read(ours, 4096):
            said += part
    except OSError:  # Linux's way to say that the other end is closed
        pass
    os.close(ours)
    said = said.decode()
    assert process.wait() == 0, said
    end = 300 * case.scale
    assert re.search(
        rf"\r[^\r\n]*\b{end}/{end} steps\b[^\r\n]*steps/s[^\r\n]*return -?[\d.]+", said
    )
    assert not lines_of_progress(said)


# Weights & Biases, offline ------------------------------------------------------------------------


def items(entries) -> dict:
    keys = [entry.key or ".".join(entry.nested_key) for entry in entries]
    return {key: json.loads(entry.value_json) for key, entry in zip(keys, entries)}


def histories(records) -> list[dict]:
    """What was logged, a dictionary for each step."""
    kept = [record for record in records if record.WhichOneof("record_type") == "history"]
    return [items(record.history.item) for record in kept]


def by_key(rows: list[dict]) -> dict:
    """Values by key and step, without wandb's own entries and the description of videos."""
    return {key: {r["_step"]: np.float32(r[key]) for r in rows if key in r} for key in KEYS}


@pytest.fixture(scope="class")
def offline(tmp_path_factory):
    """An empty folder to log in, offline."""
    folder = tmp_path_factory.mktemp("offline[1]")  # a pattern, to wandb
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("SDL_VIDEODRIVER", "dummy")
        patch.setenv("HOME", str(folder))
        patch.chdir(folder)
        yield folder


@slow
@once
class TestTracked:
    @pytest.fixture(scope="class")
    @classmethod
    def tracked(cls, sac, case, offline):
        given = flags(case, total_timesteps=400, exp_name="tracked", track=True)
        ended = helpers.run(offline, sac, words(**given, capture_video=True))
        assert ended.code == 0, ended.err
        folder = only_run(offline)
        (path,) = folder.rglob("*.wandb")
        records = finished_records(path)
        logged = histories(records)
        assert logged
        return SimpleNamespace(folder=folder, path=path, records=records, logged=logged)

    @pytest.mark.parametrize("key", sorted(KEYS))
    def test_wandb_holds_what_tensorboard_holds(self, tracked, key):
        expected = dict(tensorboard(tracked.folder)[key])
        assert expected
        assert by_key(tracked.logged)[key] == pytest.approx(expected, rel=1e-6)

    def test_every_scalar_has_its_global_step(self, tracked):
        rows = [row for row in tracked.logged if row.keys() & KEYS]
        assert rows
        assert [row["global_step"] for row in rows] == [row["_step"] for row in rows]

    def test_flags_are_the_config(self, sac, case, tracked):
        kinds = [record.WhichOneof("record_type") for record in tracked.records]
        begun = tracked.records[kinds.index("run")].run
        config = items(begun.config.update)
        given = flags(case, total_timesteps=400)
        assert {key: config[key] for key in given} == given
        assert config.keys() >= dataclasses.asdict(sac.Args()).keys()

    def test_the_script_is_uploaded(self, sac, tracked):
        script = Path(sac.__file__)
        uploaded = tracked.path.parent / "files" / script.name
        assert uploaded.read_bytes() == script.read_bytes()

    def test_videos_are_uploaded(self, tracked):
        wandb_folder = tracked.path.parent
        uploaded = list((wandb_folder / "files" / "media").rglob("*.mp4"))
        originals = list((tracked.folder / "videos").glob("*.mp4"))
        assert len(uploaded) == len(originals) == 2
        bits = [{path.read_bytes() for path in paths} for paths in (uploaded, originals)]
        assert bits[0] == bits[1]
        shown = [row["eval/video.path"] for row in tracked.logged if "eval/video.path" in row]
        assert {wandb_folder / "files" / path for path in shown} == set(uploaded)


def test_a_run_that_was_resumed_before_sends_no_step_twice(sac, tmp_path, monkeypatch):
    """Killed at step 90, resumed at 50, killed at 60, resumed at 50."""
    sent = []
    wandb_run = SimpleNamespace(log=lambda scalars, step: sent.append(step))
    monkeypatch.setattr(sac, "start_wandb", lambda *_: wandb_run)
    (tmp_path / "wandb").mkdir()
    for start, end in ((0, 90), (50, 60), (50, 100)):
        args = sac.Args(track=True, resume=tmp_path if start else None)
        logger = sac.Logger(args, tmp_path, start)
        for step in range(start + 10, end + 10, 10):
            logger.log({"charts/SPS": 1.0}, step)
        logger.close()
        time.sleep(1.1)  # TensorBoard reads files in the order of their seconds
    assert sent == list(range(10, 110, 10))


def test_a_run_that_is_tracked_from_a_resume_on_sends_all_that_follows(sac, tmp_path, monkeypatch):
    """Recorded without Weights & Biases until step 90, and resumed at 50: nothing was sent."""
    sent = []
    wandb_run = SimpleNamespace(log=lambda scalars, step: sent.append(step))
    monkeypatch.setattr(sac, "start_wandb", lambda *_: wandb_run)
    for track, start, end in ((False, 0, 90), (True, 50, 100)):
        args = sac.Args(track=track, resume=tmp_path if start else None)
        logger = sac.Logger(args, tmp_path, start)
        for step in range(start + 10, end + 10, 10):
            logger.log({"charts/SPS": 1.0}, step)
        logger.close()
        time.sleep(1.1)  # TensorBoard reads files in the order of their seconds
    assert sent == [60, 70, 80, 90, 100]


@slow
@once
class TestKilledAndResumed:
    """No step twice; none of TensorBoard's is missing but the last before the kill.

    Those were lost in wandb's buffer.
    """

    @pytest.fixture(scope="class")
    @classmethod
    def killed(cls, sac, case, offline):
        given = flags(case, checkpoint_frequency=200, log_frequency=5, eval_frequency=300)
        with open("log.txt", "w") as file:
            process = subprocess.Popen(
                command(sac, words(**given, track=True)), stdout=file, stderr=file
            )
            while "step 350/" not in Path("log.txt").read_text() and process.poll() is None:
                time.sleep(0.01)
            process.kill()
        assert process.wait() == -signal.SIGKILL, Path("log.txt").read_text()
        folder = only_run(offline)
        before = {step for points in tensorboard(folder).values() for step, _ in points}
        ended = helpers.run(offline, sac, f"--resume {folder}")
        assert ended.code == 0, ended.err
        first, second = sorted(folder.rglob("run-*.wandb"))
        records = wandb_records(first), finished_records(second)
        kept, added = [
            [row for row in histories(of_one) if row.keys() & KEYS] for of_one in records
        ]
        assert kept
        assert added
        final = tensorboard(folder)
        logged = {row["_step"] for row in kept + added}
        missing = {step for points in final.values() for step, _ in points} - logged
        seen = SimpleNamespace(folder=folder, before=before, records=[*records[0], *records[1]])
        seen.__dict__.update(kept=kept, added=added, final=final, missing=missing)
        return seen

    def test_is_one_run(self, killed):
        ids = {record.run.run_id for record in killed.records if record.HasField("run")}
        assert ids == {killed.folder.name}

    @pytest.mark.parametrize("key", sorted(KEYS))
    def test_has_no_step_twice_in_tensorboard(self, killed, key):
        logged = [step for step, _ in killed.final[key]]
        assert logged == sorted(set(logged))

    def test_has_no_step_twice_in_wandb(self, killed):
        logged = [row["_step"] for row in killed.kept + killed.added]
        assert len(set(logged)) == len(logged)

    def test_misses_only_the_last_steps_before_the_kill(self, killed):
        first = min(killed.missing, default=601)
        assert killed.missing <= killed.before
        assert all(row["_step"] < first for row in killed.kept)

    @pytest.mark.parametrize("key", sorted(KEYS))
    def test_has_tensorboards_values(self, killed, key):
        values = by_key(killed.kept + killed.added)[key]
        points = killed.final[key]
        expected = {step: value for step, value in points if step not in killed.missing}
        assert values.keys() == expected.keys()
        # The steps from the checkpoint to the kill were made twice, each at its own speed.
        if key != "charts/SPS":
            assert values == pytest.approx(expected, rel=1e-6)
