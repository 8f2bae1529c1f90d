"""What a run leaves behind: TensorBoard, Weights & Biases, learning curve, model, videos; and what it says on the way.

One run of 600 steps on Pendulum-v1, whose episodes have 200, serves most tests. On the suite, whose episodes have 1000,
all these counts are five times as large.
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
import sys
import termios
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from moviepy import VideoFileClip
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import sac_continuous as sac  # the tests have each script in its place
import test_cli
from test_cli import Ended, load, only_run

SCRIPTS = ["sac_continuous", "sac_dmc", "sac_ablations"]
once = pytest.mark.only("sac_continuous")  # it takes long, and the lines are the same in each
not_thrice = pytest.mark.without("sac_ablations")  # likewise
CHARTS = {"charts/episodic_return", "charts/episodic_length"}
LOSSES = {f"losses/{name}" for name in "qf_loss qf1_values actor_loss alpha alpha_loss entropy target_q".split()}
EVALUATIONS = {"eval/episodic_return", "eval/episodic_return_std"}
KEYS = CHARTS | LOSSES | EVALUATIONS | {"charts/SPS"}

# the flags that are numbers of steps
COUNTS = {"total_timesteps", "learning_starts", "log_frequency", "eval_frequency", "checkpoint_frequency"}


@pytest.fixture(scope="module", autouse=True)
def names(equipped):
    """What the tests call the script under test, what differs in its episodes, and the shared run's flags."""
    global SCRIPT, SCALE, FRAMES, RETURNS, GIVEN
    SCRIPT, SCALE, FRAMES, RETURNS, GIVEN = Path(equipped.__file__), 1, 200, (-3300, 0), {"env_id": "Pendulum-v1"}
    if equipped.__name__ == "sac_dmc":
        SCALE, FRAMES, RETURNS = 5, 40, (0, 1000)  # few frames, as they take long without a GPU
        GIVEN = {"env_id": "cartpole-balance", "action_repeat": 25}
    GIVEN |= {"batch_size": 16, "threads": 1, "eval_episodes": 2}
    GIVEN |= scaled(total_timesteps=600, learning_starts=100, log_frequency=100, eval_frequency=200)


def scaled(**given):
    return {key: value * SCALE if key in COUNTS else value for key, value in given.items()}


def run(folder, arguments):
    """The end of one run; in a fresh interpreter where it renders the suite, as OpenGL does not survive a fork."""
    if "--capture-video" in arguments and sac.__name__ == "sac_dmc":
        ended = subprocess.run([sys.executable, SCRIPT, *arguments.split()], cwd=folder, capture_output=True, text=True)
        return Ended(ended.returncode, ended.stdout, ended.stderr)
    return test_cli.run(folder, arguments, sac)


def flags(**changed):
    """The shared run's flags as a command line, some of them changed, to counts as on Pendulum."""
    given = GIVEN | scaled(**changed)
    return " ".join(f"--{key.replace('_', '-')} {value}" for key, value in given.items()) + " --no-cuda"


def tensorboard(folder):
    """Scalars of a run by key: lists of (step, value)."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {key: [(event.step, event.value) for event in events.Scalars(key)] for key in events.Tags()["scalars"]}


def steps(scalars, key):
    """When a key was recorded, in counts as on Pendulum."""
    return [step / SCALE for step, _ in scalars[key]]


def all_steps(scalars):
    return {step for key in scalars for step in steps(scalars, key)}


def shows_an_episode(path):
    """Whether a video is as long as an episode and something moves in it, by more than what compression changes."""
    with VideoFileClip(str(path)) as clip:
        video = np.stack(list(clip.iter_frames())).astype(int)
    return abs(len(video) - FRAMES) <= 2 and abs(video - video[0]).max() > 100


@pytest.fixture(scope="module")
def recorded(names, tmp_path_factory):
    """The shared run: its folder, and what it said."""
    folder = tmp_path_factory.mktemp("recorded")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SDL_VIDEODRIVER", "dummy")
        code, out, err = run(folder, flags() + " --capture-video")
    assert code == 0, err
    return only_run(folder), out


@pytest.fixture(scope="module")
def scalars(recorded):
    return tensorboard(recorded[0])


# TensorBoard


def test_keys(scalars):
    assert scalars.keys() == KEYS


@pytest.mark.only("sac_continuous")  # one README for all of them
@pytest.mark.parametrize("key", sorted(KEYS))
def test_keys_are_explained_in_the_readme(key):
    rows = [line.split("|")[1:-1] for line in (SCRIPT.parent / "README.md").read_text().splitlines() if line[:1] == "|"]
    (row,) = [row for row in rows if f"`{key}`" in row[0]]
    assert len(row) >= 2 and re.search(r"\w{2,}", row[1])


def test_steps(scalars):
    assert steps(scalars, "charts/SPS") == [100, 200, 300, 400, 500, 600]
    assert all(steps(scalars, key) == [200, 300, 400, 500, 600] for key in LOSSES)  # the first update is in step 101
    assert all(steps(scalars, key) == [200, 400, 600] for key in CHARTS | EVALUATIONS)


def test_steps_of_several_environments(tmp_path):
    """Four environments make four steps at a time, so their first episodes end at step 800 together."""
    code, out, err = run(tmp_path, flags(num_envs=4, total_timesteps=800, learning_starts=600, eval_frequency=400))
    scalars = tensorboard(only_run(tmp_path))
    assert code == 0 and scalars.keys() == KEYS
    assert steps(scalars, "charts/SPS") == [100, 200, 300, 400, 500, 600, 700, 800]
    assert all(steps(scalars, key) == [700, 800] for key in LOSSES)
    assert all(steps(scalars, key) == [400, 800] for key in EVALUATIONS)
    assert all(steps(scalars, key) == [800] for key in CHARTS)
    assert scalars["charts/episodic_length"] == [(800 * SCALE, 200 * SCALE)]


def test_values(scalars):
    assert all(np.isfinite(value) for key in KEYS for _, value in scalars[key])
    assert [value for _, value in scalars["charts/episodic_length"]] == [200 * SCALE] * 3
    low, high = RETURNS
    assert all(low < value < high for key in ("charts", "eval") for _, value in scalars[f"{key}/episodic_return"])
    assert all(value > 0 for key in ("charts/SPS", "losses/alpha", "losses/qf_loss") for _, value in scalars[key])


# Files


def test_learning_curve(recorded):
    path = recorded[0] / "learning_curve.png"
    assert path.read_bytes().startswith(b"\x89PNG\r\n")
    colours = imread(path)[..., :3].reshape(-1, 3)
    assert len(np.unique(colours, axis=0)) > 1
    assert (np.ptp(colours, axis=1) > 0.3).sum() > 100  # the curves: frame, ticks and text are black and grey


def test_model(recorded):
    agent = sac.SAC(5 if sac.__name__ == "sac_dmc" else 3, 1, sac.Args())
    saved = load(recorded[0] / "model.pt")["agent"]
    agent.load_state_dict(saved)
    checkpoint = load(recorded[0] / "checkpoint.pt")
    assert checkpoint["step"] == 600 * SCALE and checkpoint["agent"].keys() == saved.keys()
    assert all(torch.equal(saved[key], checkpoint["agent"][key]) for key in saved)


def test_arguments(recorded):
    expected = dataclasses.asdict(sac.Args()) | GIVEN | {"capture_video": True, "cuda": False}
    expected["compile"] = "off"  # what "auto" came to
    assert json.loads((recorded[0] / "args.json").read_text()) == expected


def test_script(recorded):
    assert (recorded[0] / SCRIPT.name).read_bytes() == SCRIPT.read_bytes()


def test_folder_names(tmp_path, monkeypatch, recorded):
    assert re.fullmatch(rf"{GIVEN['env_id']}__{sac.__name__}__1__\d+", recorded[0].name)
    entry_point = "gymnasium.envs.classic_control:PendulumEnv"
    (tmp_path / "toys.py").write_text(f"import gymnasium\ngymnasium.register('My/Swing-v1', '{entry_point}')")
    monkeypatch.syspath_prepend(tmp_path)
    env_id = "shimmy:dm_control/cartpole-swingup-v0" if sac.__name__ == "sac_dmc" else "toys:My/Swing-v1"
    changed = dict(env_id=env_id, total_timesteps=30, learning_starts=20, eval_frequency=0, seed=7)
    for _ in range(2):
        assert run(tmp_path, flags(**changed, exp_name="a:b/c*d?")).code == 0
    names = [path.name for path in (tmp_path / "runs").iterdir()]
    assert len(names) == 2  # a new one each time, and none inside another
    parts = env_id.replace(":", ".").replace("/", ".")
    assert all(re.fullmatch(rf"{parts}__a.b.c.d.?__7__\d+", name) for name in names)
    assert all(re.fullmatch(r"[\w.-]+", name) for name in names)  # what every file system and shell takes


# Videos and evaluation


@not_thrice
def test_videos(recorded):
    paths = list(recorded[0].rglob("*.mp4"))
    assert len(paths) == 3
    assert all(any(f"step-{step * SCALE}-" in path.name for path in paths) for step in (200, 400, 600))
    assert all(shows_an_episode(path) for path in paths)


def test_evaluation_of_a_run(tmp_path, recorded, monkeypatch):
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    folder = Path(shutil.copytree(recorded[0], tmp_path / "runs" / "copy"))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    code, out, err = run(tmp_path, "--evaluate runs/copy --capture-video --eval-episodes 3")
    assert code == 0, err
    results = [re.search(rf"{policy}.*?(-?\d+\.\d+)\D+(\d+\.\d+)", out) for policy in ("deterministic", "stochastic")]
    low, high = RETURNS
    assert all(low < float(mean) < high and float(std) > 0 for mean, std in (result.groups() for result in results))
    assert results[0].groups() != results[1].groups()
    new = {path for path in tmp_path.rglob("*.mp4") if path not in before}
    assert len(new) == 2 and [any(policy in path.name for path in new) for policy in ("determ", "stoch")] == [True] * 2
    assert all(shows_an_episode(path) for path in new)
    assert all(path.read_bytes() == data for path, data in before.items())
    assert only_run(tmp_path) == folder


# Progress


def test_progress_in_a_file(recorded, scalars):
    """Where nobody watches, a line at each record."""
    lines = {int(line.split()[1].strip(",")): line for line in recorded[1].splitlines() if "steps/s" in line}
    assert list(lines) == [step * SCALE for step in (100, 200, 300, 400, 500, 600)]
    assert all(re.search(r"\d+ steps/s.* left.*return.*best", line) for line in lines.values())
    returns = [value for _, value in scalars["charts/episodic_return"]]
    assert re.search(rf"return {returns[-1]:.1f}\b.*best {max(returns):.1f}$", lines[600 * SCALE])
    assert "\r" not in recorded[1]


@not_thrice
def test_progress_on_a_terminal(tmp_path):
    """Where somebody does, a bar in place of the lines."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))
    command = [sys.executable, SCRIPT, *flags(total_timesteps=300, eval_frequency=0).split()]
    process = subprocess.Popen(command, cwd=tmp_path, stdin=theirs, stdout=theirs, stderr=theirs)
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
    assert re.search(rf"\r[^\r\n]*\b{300 * SCALE}/{300 * SCALE}\b[^\r\n]*return -?[\d.]+, best -?[\d.]+", said)
    assert "minutes left" not in said


# Weights & Biases, offline


def wandb_records(path):
    """Records of one run file: LevelDB's log format, after a header of seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, parts, records = path.read_bytes(), 7, b"", []
    while position + 7 <= len(data):
        if (room := 32768 - position % 32768) < 7:  # too little for a header at the end of a block is padding
            position += room
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        start, position = position + 7, position + 7 + length
        if position > len(data):  # cut by a kill, or still being written
            break
        parts += data[start:position]
        if kind in (1, 4):  # the whole of a record, or its last part; 2 and 3 are the parts before
            records.append(Record.FromString(parts))
            parts = b""
    return records


def finished_records(path):
    """The same, once wandb's own process has written the last."""
    for _ in range(600):
        records = wandb_records(path)
        if records and records[-1].WhichOneof("record_type") == "exit":
            return records
        time.sleep(0.1)
    raise AssertionError(f"{path} has no end")


def items(entries):
    return {entry.key or ".".join(entry.nested_key): json.loads(entry.value_json) for entry in entries}


def rows(records):
    """What was logged, a dictionary for each step, without wandb's own entries and the description of videos."""
    histories = [items(record.history.item) for record in records if record.WhichOneof("record_type") == "history"]
    return [(row["_step"], {key: row[key] for key in row.keys() & KEYS}) for row in histories]


def by_key(rows):
    return {key: {step: np.float32(row[key]) for step, row in rows if key in row} for key in KEYS}


@pytest.fixture
def offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)


def launch(arguments, **streams):
    return subprocess.Popen([sys.executable, SCRIPT, *arguments.split()], **streams)


@once
def test_wandb_holds_what_tensorboard_holds(tmp_path, offline):
    arguments = flags(total_timesteps=400, exp_name="tracked") + " --track --capture-video"
    assert launch(arguments).wait(timeout=240) == 0
    folder = only_run(tmp_path)
    (path,) = folder.rglob("*.wandb")
    records, expected = finished_records(path), tensorboard(folder)
    logged = by_key(rows(records))
    assert expected.keys() == KEYS
    for key in KEYS:
        assert list(logged[key]) == steps(expected, key)
        assert logged[key] == pytest.approx(dict(expected[key]), rel=1e-6)

    (begun,) = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    config = items(begun.config.update)
    assert {key: config[key] for key in GIVEN} == GIVEN | {"total_timesteps": 400}
    assert config.keys() >= dataclasses.asdict(sac.Args()).keys()
    videos = list((path.parent / "files" / "media").rglob("*.mp4"))
    originals = [video for video in folder.rglob("*.mp4") if path.parent not in video.parents]
    assert len(videos) == 2 and {v.read_bytes() for v in videos} == {v.read_bytes() for v in originals}


@once
def test_wandb_after_a_kill(tmp_path, offline):
    """No step twice; of TensorBoard's steps none is missing but the last before the kill, lost in wandb's buffer."""
    arguments = flags(checkpoint_frequency=200, log_frequency=5, eval_frequency=300) + " --track --capture-video"
    with open("log.txt", "w") as file:
        process = launch(arguments, stdout=file, stderr=file)
        while "step 350," not in Path("log.txt").read_text() and process.poll() is None:
            time.sleep(0.01)
        process.kill()
    assert process.wait() == -signal.SIGKILL
    folder = only_run(tmp_path)
    before = all_steps(tensorboard(folder))
    assert launch(f"--resume {folder}").wait(timeout=240) == 0

    first, second = sorted(folder.rglob("run-*.wandb"))
    first, second, final = wandb_records(first), finished_records(second), tensorboard(folder)
    assert {record.run.run_id for record in first + second if record.HasField("run")} == {folder.name}  # one run
    assert all(steps(final, key) == sorted(set(steps(final, key))) for key in final)
    kept, added = rows(first), rows(second)
    logged = [step for step, _ in kept + added]
    assert kept and added and len(set(logged)) == len(logged)
    missing = all_steps(final) - set(logged)
    assert missing <= before and all(step < min(missing, default=601) for step, _ in kept)
    for key, values in by_key(kept + added).items():
        expected = {step: value for step, value in final.get(key, []) if step not in missing}
        assert values.keys() == expected.keys()
        if key != "charts/SPS":  # the steps from the checkpoint to the kill were made twice, at their own speeds
            assert values == pytest.approx(expected, rel=1e-6)
