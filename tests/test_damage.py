"""Damaged files, full disks, impossible numbers, closed output: one line each, nothing half-made.

Where a run is refused, main() runs in this process. Where it begins and breaks, main() runs in a
forked child, so that whatever a test breaks ends with the child.
"""

import builtins
import contextlib
import errno
import faulthandler
import gc
import importlib
import io
import json
import math
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from functools import partial
from pathlib import Path
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Graph, Sequence
from helpers import suite_or_skip
from moviepy.config import FFMPEG_BINARY
from torch._inductor.exc import CppCompileError
from tqdm import tqdm

NAMES = ("sac_continuous", "sac_dmc", "sac_ablations")
TASKS = {"sac_dmc": "cartpole-swingup"}
# A run of half a second: where a mistake goes unnoticed, its test ends soon all the same.
SMALL = "--total-timesteps 60 --learning-starts 50 --batch-size 8 --buffer-size 100 "
SMALL += "--eval-frequency 50 --eval-episodes 1 --log-frequency 20 --checkpoint-frequency 40 "
SMALL += "--threads 1 --no-cuda "
PATIENCE = 120  # seconds after which a run is said to hang


class Script(NamedTuple):
    module: object
    small: str  # flags of a small run
    trained: Path  # a folder in which such a run was finished, as runs/finished


class Ended(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture(scope="module", params=NAMES)
def script(request, tmp_path_factory):
    """A script, and what its environments need already imported: no forked child has to."""
    name = request.param
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    if name == "sac_dmc":
        suite_or_skip()
    module = importlib.import_module(name)
    folder = tmp_path_factory.mktemp(name)
    small = f"{SMALL} --env-id {TASKS.get(name, 'Pendulum-v1')}"
    ended = run(folder, module, small)
    assert ended.code == 0, ended.err
    only_run(folder).rename(folder / "runs" / "finished")
    return Script(module, small, folder)


def only(*names):
    """The scripts that a test is for."""
    return pytest.mark.parametrize("script", names, indirect=True, scope="module")


parent_only = only("sac_continuous")


@pytest.fixture
def finished(script, tmp_path, monkeypatch):
    """The folder of a finished run below the current folder, to be damaged at will."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(script.trained / "runs" / "finished", "runs/finished"))


def main(module):
    """As at the end of each script."""
    guard = getattr(module, "closed_output_is_no_error", contextlib.nullcontext)
    with guard():
        module.main()


def child(folder, module, words, sabotage):
    gc.freeze()  # Garbage of earlier tests may wait, when destroyed, for threads of the parent.
    os.chdir(folder)
    # Its own lock: tqdm's is one semaphore for all forks, and a broken one may have kept it.
    tqdm.set_lock(threading.RLock())
    # Both levels: libraries in C write past Python.
    for name, target in (("stdout", 1), ("stderr", 2)):
        stream = open(f"{name}.txt", "w", buffering=1)
        setattr(sys, name, stream)
        os.dup2(stream.fileno(), target)
    faulthandler.dump_traceback_later(PATIENCE - 5, file=sys.stderr)  # says where it hangs
    sys.argv = [f"{module.__name__}.py", *words]
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if sabotage:
        sabotage(module)
    main(module)


def run(folder, module, flags, sabotage=None):
    """The end of one run in `folder`, in a forked child in which sabotage(module) came first."""
    context = multiprocessing.get_context("fork")
    process = context.Process(target=child, args=(folder, module, flags.split(), sabotage))
    process.start()
    process.join(PATIENCE)
    if process.is_alive():
        process.kill()
        process.join()
        pytest.fail("it hangs: " + (folder / "stderr.txt").read_text())
    said = [(folder / name).read_text() for name in ("stdout.txt", "stderr.txt")]
    return Ended(process.exitcode, *said)


def content(folder):
    """Every file below `folder`, with its bytes, and every folder."""
    return {str(path): path.is_file() and path.read_bytes() for path in folder.rglob("*")}


@pytest.fixture
def refusal(script, monkeypatch, capfd):
    """refusal(words): the one line with which a run that must not begin ends in this process."""

    def refusal(words):
        words = words.split() if isinstance(words, str) else words
        before = content(Path("runs"))
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", [f"{script.module.__name__}.py", *words])
            patch.setattr(signal, "signal", lambda *_: None)  # Ctrl-C remains pytest's
            capfd.readouterr()
            with pytest.raises(SystemExit) as ended:
                main(script.module)
        line = capfd.readouterr().err
        assert ended.value.code == 2, line
        assert line.startswith("error: ") and line.count("\n") == 1, line
        assert len(line) < 700
        assert content(Path("runs")) == before
        return line

    return refusal


def only_run(folder):
    (run_folder,) = (folder / "runs").iterdir()
    return run_folder


def load(path):
    return torch.load(path, map_location="cpu", weights_only=True)


# 1. Damaged or foreign checkpoints ----------------------------------------------------------------


def content_bytes(path):
    """The offsets of the bytes of a zip archive that hold what its files contain."""
    offsets = []
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        for member in archive.infolist():
            file.seek(member.header_offset + 26)
            lengths = np.frombuffer(file.read(4), np.uint16)
            start = member.header_offset + 30 + int(lengths.sum())
            offsets += range(start, start + member.file_size)
    return offsets


def flip_bit(path, offset, bit):
    data = bytearray(path.read_bytes())
    data[offset] ^= 1 << bit
    path.write_bytes(data)


@parent_only
@pytest.mark.parametrize(
    "file, flags",
    [
        ("checkpoint.pt", "--resume runs/finished"),
        ("model.pt", "--evaluate runs/finished/model.pt"),
        ("best.pt", "--evaluate runs/finished/best.pt"),
    ],
)
def test_25_of_25_flipped_bits_are_noticed(finished, refusal, file, flags):
    path = finished / file
    whole = path.read_bytes()
    random = np.random.default_rng(0)
    places = random.choice(content_bytes(path), 25)
    for offset in places:
        flip_bit(path, offset, random.integers(8))
        assert file in refusal(flags)
        path.write_bytes(whole)


def cut(share):
    return lambda path: os.truncate(path, int(share * path.stat().st_size))


def as_folder(path):
    path.unlink()
    path.mkdir()


def archive_of_arrays(path):
    with open(path, "wb") as file:
        np.savez(file, agent=np.ones(3))


def malicious(path):
    class Shell:
        def __reduce__(self):
            return os.system, ("touch harmed",)

    torch.save({"agent": Shell(), "step": 1}, path)


FILES = {
    "empty": cut(0),
    "half": cut(0.5),
    "all but its end": cut(0.999),
    "missing": Path.unlink,
    "a folder": as_folder,
    "text": lambda path: path.write_text("checkpoint"),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "zip of arrays": archive_of_arrays,
    "empty zip": lambda path: zipfile.ZipFile(path, "w").close(),
    "list": lambda path: torch.save([1, 2], path),
    "tensor": lambda path: torch.save(torch.ones(3), path),
    "number": lambda path: torch.save(3, path),
    "nothing": lambda path: torch.save(None, path),
    "old format": lambda path: torch.save({"step": 1}, path, _use_new_zipfile_serialization=False),
    "dangling link": lambda path: (path.unlink(), path.symlink_to("nowhere")),
    "code that would run": malicious,
}


@parent_only
@pytest.mark.parametrize("flag, file", [("--resume", "checkpoint.pt"), ("--evaluate", "model.pt")])
@pytest.mark.parametrize("damage", FILES)
def test_files_that_are_no_checkpoint(finished, refusal, damage, flag, file):
    FILES[damage](finished / file)
    if flag == "--evaluate":
        (finished / "checkpoint.pt").unlink()
    line = refusal(f"{flag} runs/finished")
    assert flag in line and "runs/finished" in line and file in line
    assert not Path("harmed").exists()


def without(key):
    return lambda state: state.pop(key)


def with_value(key, value):
    return lambda state: state.update({key: value})


def in_agent(key, change):
    return lambda state: state["agent"].update({key: change(state["agent"][key])})


WEIGHT = "actor.layers.0.weight"
CONTENTS = {  # what is wrong in a checkpoint, and the name that the line says
    "no agent": (without("agent"), "'agent'"),
    "no step": (without("step"), "'step'"),
    "no rows": (without("rows"), "'rows'"),
    "no count": (without("count"), "'count'"),
    "no random": (without("random"), "'random'"),
    "no versions": (without("versions"), "'versions'"),
    "a list for agent": (with_value("agent", [1]), "'agent'"),
    "an empty agent": (with_value("agent", {}), "'agent'"),
    "numbers for names in agent": (with_value("agent", {1: torch.ones(1)}), "'agent'"),
    "negative step": (with_value("step", -1), "'step'"),
    "step as text": (with_value("step", "sixty"), "'step'"),
    "step as a fraction": (with_value("step", 60.0), "'step'"),
    "step as a tensor": (with_value("step", torch.tensor(60)), "'step'"),
    "step before the rows": (with_value("step", 0), "'rows'"),
    "negative count": (with_value("count", -60), "'rows'"),
    "count too small": (with_value("count", 6), "'rows'"),
    "count too large": (with_value("count", 99), "'rows'"),
    "count as text": (with_value("count", "60"), "'count'"),
    "rows as a list": (with_value("rows", [[1.0]]), "'rows'"),
    "rows of another width": (with_value("rows", torch.zeros(60, 3)), "'rows'"),
    "rows without width": (with_value("rows", torch.zeros(60)), "'rows'"),
    "rows as whole numbers": (with_value("rows", torch.zeros(60, 9).int()), "'rows'"),
    "random as a number": (with_value("random", 3), "'random'"),
    "random too short": (with_value("random", torch.zeros(7).byte()), "'random'"),
    "random as fractions": (with_value("random", torch.zeros(5056)), "'random'"),
    "random in a row": (with_value("random", torch.zeros(1, 5056).byte()), "'random'"),
    "random of zeros": (with_value("random", torch.zeros(5056).byte()), "'random'"),
    "versions as text": (with_value("versions", "2.13"), "'versions'"),
    "a weight missing": (lambda state: state["agent"].pop(WEIGHT), WEIGHT),
    "a weight more": (lambda state: state["agent"].update(more=torch.ones(1)), "more"),
    "a weight of another shape": (in_agent(WEIGHT, lambda weight: weight[:5]), WEIGHT),
    "a weight as text": (in_agent(WEIGHT, lambda _: "weight"), WEIGHT),
    "a weight that is not finite": (in_agent(WEIGHT, lambda w: w.fill_(math.nan)), WEIGHT),
}


@parent_only
@pytest.mark.parametrize("damage", CONTENTS)
def test_checkpoints_that_lack_or_mistype_something(finished, refusal, damage):
    path = finished / "checkpoint.pt"
    state = load(path)
    change, name = CONTENTS[damage]
    change(state)
    torch.save(state, path)
    # Shorter than the run was: that decides how many rows the buffer has.
    line = refusal("--resume runs/finished --total-timesteps 52")
    assert "--resume runs/finished" in line and name in line


@pytest.mark.parametrize("file", ["model.pt", "best.pt"])
def test_another_file_in_place_of_the_checkpoint(finished, refusal, file):
    shutil.copy(finished / file, finished / "checkpoint.pt")
    assert "'rows'" in refusal("--resume runs/finished")


@parent_only
@pytest.mark.parametrize("change", [{"return": "much"}, {"return": math.nan}, {"return": None}])
def test_a_best_agent_with_no_return_is_replaced(script, finished, tmp_path, change):
    (finished / "best.pt").unlink()
    torch.save(load(finished / "model.pt") | change, finished / "best.pt")
    ended = run(tmp_path, script.module, "--resume runs/finished --total-timesteps 110")
    assert ended.code == 0, ended.err
    assert math.isfinite(load(finished / "best.pt")["return"])


@only("sac_dmc", "sac_ablations")
@pytest.mark.parametrize("flag", ["--resume", "--evaluate"])
def test_a_run_of_another_script(script, refusal, finished, flag):
    saved = json.loads((finished / "args.json").read_text())
    assert set(saved) - {"seed"}
    (finished / "args.json").write_text(json.dumps(saved | {"of_another_script": 1}))
    line = refusal(f"{flag} runs/finished")
    assert "of_another_script" in line and script.module.__name__ in line
    assert line.endswith("use the script in that folder\n")


# 2. args.json by hand -----------------------------------------------------------------------------


def saved_with(**changes):
    return lambda saved: json.dumps(saved | changes)


ARGUMENTS = {  # the text of args.json by the saved flags, and what the line says
    "seed as text": (saved_with(seed="abc"), "seed"),
    "seed as a fraction": (saved_with(seed=1.5), "seed"),
    "seed as a truth": (saved_with(seed=True), "seed"),
    "seed as a list": (saved_with(seed=[1]), "seed"),
    "seed too large": (saved_with(seed=2**64), "--seed"),
    "negative seed": (saved_with(seed=-1), "--seed"),
    "no gamma": (saved_with(gamma=None), "gamma"),
    "gamma as text": (saved_with(gamma="0.99"), "gamma"),
    "gamma beyond 1": (saved_with(gamma=1.5), "--gamma"),
    "gamma not a number": (saved_with(gamma=math.nan), "--gamma"),
    "gamma infinite": (saved_with(gamma=math.inf), "--gamma"),
    "gamma as a table": (saved_with(gamma={}), "gamma"),
    "tau 0": (saved_with(tau=0), "--tau"),
    "batch of none": (saved_with(batch_size=0), "--batch-size"),
    "threads of a million": (saved_with(threads=10**6), "--threads"),
    "cuda as text": (saved_with(cuda="no"), "cuda"),
    "cuda as a number": (saved_with(cuda=0), "cuda"),
    "compile with a typo": (saved_with(compile="onn"), "compile"),
    "compile as a truth": (saved_with(compile=True), "compile"),
    "no env_id": (saved_with(env_id=None), "env_id"),
    "env_id as a number": (saved_with(env_id=4), "env_id"),
    "empty env_id": (saved_with(env_id=""), "--env-id"),
    "resume in itself": (saved_with(resume="runs"), "resume"),
    "unknown key": (saved_with(width=3), "width"),
    "unknown key alone": (lambda saved: '{"width": 3}', "width"),
    "key with a dash": (lambda saved: json.dumps(saved | {"q-lr": 1}), "q-lr"),
    "a list": (lambda saved: json.dumps([*saved]), "args.json"),
    "a number": (lambda saved: "3", "args.json"),
    "null": (lambda saved: "null", "args.json"),
    "empty": (lambda saved: "", "args.json"),
    "half": (lambda saved: json.dumps(saved)[:99], "args.json"),
    "not JSON": (lambda saved: "{'seed': 1}", "args.json"),
    "not UTF-8": (lambda saved: b'{"seed": "\xff"}', "args.json"),
    "UTF-16": (lambda saved: json.dumps(saved).encode("utf-16"), "args.json"),
    "too deep": (lambda saved: "[" * 100_000, "args.json"),
    "a number too long": (lambda saved: '{"seed": 1' + "0" * 5000 + "}", "args.json"),
    "binary": (lambda saved: bytes(range(256)), "args.json"),
}


@parent_only
@pytest.mark.parametrize("flag", ["--resume", "--evaluate"])
@pytest.mark.parametrize("case", ARGUMENTS)
def test_args_json_by_hand(finished, refusal, case, flag):
    path = finished / "args.json"
    make, says = ARGUMENTS[case]
    text = make(json.loads(path.read_text()))
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    line = refusal(f"{flag} runs/finished")
    assert says in line, line


@parent_only
def test_a_flag_that_args_json_lacks_has_its_default(script, finished, tmp_path):
    saved = json.loads((finished / "args.json").read_text())
    del saved["tau"]
    (finished / "args.json").write_text(json.dumps(saved))
    ended = run(tmp_path, script.module, "--resume runs/finished")
    assert ended.code == 0 and "warning: args.json lacks tau: defaults hold" in ended.err
    ended = run(tmp_path, script.module, "--resume runs/finished --tau 0.01")
    assert ended.code == 0 and "warning: tau changed: " in ended.err
    assert json.loads((finished / "args.json").read_text())["tau"] == 0.01


@only("sac_ablations")
def test_a_fixed_flag_that_args_json_lacks_cannot_change(script, finished, tmp_path):
    """A run of sac_continuous.py, say, whose rows hold rewards of scale 1."""
    saved = json.loads((finished / "args.json").read_text())
    del saved["reward_scale"]
    (finished / "args.json").write_text(json.dumps(saved))
    ended = run(tmp_path, script.module, "--resume runs/finished --reward-scale 5")
    assert ended.code == 2
    assert ended.err.endswith(
        "error: --reward-scale cannot change in a run: it was 1.0, leave the flag out\n"
    )


@parent_only
def test_a_missing_best_pt_is_named(refusal, finished):
    (finished / "best.pt").unlink()
    assert "best.pt is missing" in refusal("--evaluate runs/finished/best.pt")


# 3. Full disks and folders that cannot be written -------------------------------------------------


def full_disk(name, from_the=1, error=errno.ENOSPC):
    """A sabotage: no file whose path matches `name` opens for writing, from the n-th time on."""

    def sabotage(module):
        open_file = builtins.open
        times = iter(range(1, from_the))

        def open_or_fail(file, mode="r", *rest, **options):
            writes = isinstance(file, (str, bytes, os.PathLike)) and set(mode) & set("wax+")
            if writes and re.search(name, os.fsdecode(file)) and next(times, None) is None:
                raise OSError(error, os.strerror(error), os.fsdecode(file))
            return open_file(file, mode, *rest, **options)

        builtins.open = io.open = open_or_fail

    return sabotage


def cut_files(size):
    """A sabotage: the system itself refuses what would make any file longer than `size`."""

    def sabotage(module):
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))

    return sabotage


def without_folder(name):
    """A sabotage: no folder whose name matches can be made."""

    def sabotage(module):
        make = os.mkdir

        def make_or_fail(path, *rest, **options):
            if re.search(name, os.fsdecode(path)):
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), os.fsdecode(path))
            return make(path, *rest, **options)

        os.mkdir = make_or_fail

    return sabotage


BEFORE_TRAINING = {  # moments at which nothing was trained yet
    "run folder": without_folder("runs"),
    "copy of the script": full_disk(r"runs.*\.py$"),
    "args.json": full_disk("args"),
    "TensorBoard's file": full_disk("tfevents"),
    "first checkpoint": full_disk("checkpoint"),
    "files of 2 kB": cut_files(2000),
    "files of 70 kB": cut_files(70_000),
    "files of 200 kB": cut_files(200_000),
    "files of 1 MB": cut_files(1_000_000),
}
IN_TRAINING = {  # moments after the first checkpoint
    "TensorBoard, first record": full_disk("tfevents", from_the=3),
    "TensorBoard, later": full_disk("tfevents", from_the=12),
    "second checkpoint": full_disk("checkpoint", from_the=2),
    "last checkpoint": full_disk("checkpoint", from_the=3),
    "best.pt": full_disk("best"),
    "model.pt": full_disk("model"),
    "the log": full_disk("tfevents", from_the=6),
    "learning curve": full_disk("learning_curve"),
    "no quota for the curve": full_disk("learning_curve", error=errno.EDQUOT),
    "read-only for best.pt": full_disk("best", error=errno.EROFS),
}


def assert_one_line(ended, code=1):
    """An error of the system: one line, and perhaps the command with which to continue."""
    assert ended.code == code, ended
    lines = [line for line in ended.err.splitlines() if not line.startswith("warning: ")]
    assert lines and lines[0].startswith("error: "), ended.err
    rest = [line for line in lines[1:] if not re.match("  python .* --resume ", line)]
    assert not rest, ended.err


@parent_only
@pytest.mark.parametrize("moment", BEFORE_TRAINING)
def test_a_full_disk_before_training_leaves_nothing(script, tmp_path, moment):
    ended = run(tmp_path, script.module, script.small, BEFORE_TRAINING[moment])
    assert_one_line(ended, code=2 if moment == "run folder" else 1)
    assert not list(tmp_path.glob("runs/*")), ended.err


@pytest.mark.slow
@parent_only
@pytest.mark.parametrize("moment", IN_TRAINING)
def test_a_full_disk_in_training_leaves_a_run_to_resume(script, tmp_path, moment):
    ended = run(tmp_path, script.module, script.small, IN_TRAINING[moment])
    assert_one_line(ended)
    folder = only_run(tmp_path)
    assert not list(folder.glob("*.tmp"))
    step = load(folder / "checkpoint.pt")["step"]
    assert f"Last checkpoint: step {step}" in ended.err
    assert f"--resume runs/{folder.name}" in ended.err

    ended = run(tmp_path, script.module, f"--resume runs/{folder.name}")
    assert ended.code == 0, ended.err
    assert_same_end(folder, script.trained / "runs" / "finished")
    assert (folder / "learning_curve.png").exists()


def assert_same_end(folder, other):
    state, expected = load(folder / "checkpoint.pt"), load(other / "checkpoint.pt")
    assert state["step"] == expected["step"] == 60
    for name in ("rows", "random"):
        assert torch.equal(state[name], expected[name])
    assert state["agent"].keys() == expected["agent"].keys()
    for name, value in state["agent"].items():
        assert torch.equal(value, expected["agent"][name]), name


@parent_only
@pytest.mark.parametrize("moment", ["args", "tfevents", "checkpoint"])
def test_a_full_disk_at_a_resume_leaves_the_run_as_it_was(script, finished, tmp_path, moment):
    before = content(finished)
    flags = "--resume runs/finished --total-timesteps 110"
    ended = run(tmp_path, script.module, flags, full_disk(moment))
    assert_one_line(ended)
    after = content(finished)
    for name in before:
        if moment == "args" or not name.endswith("args.json"):
            assert after[name] == before[name]
    assert not [name for name in after if name.endswith(".tmp")]
    ended = run(tmp_path, script.module, flags)
    assert ended.code == 0 and load(finished / "checkpoint.pt")["step"] == 110, ended.err


@parent_only
def test_flags_are_written_beside_the_old_ones(script, finished, monkeypatch):
    before = content(finished)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        script.module.write_args(script.module.Args(), finished)
    assert content(finished) == before


def start(folder, module, flags, **environment):
    """A fresh interpreter, and a process group of its own as a shell makes it."""
    command = [sys.executable, module.__file__, *flags.split()]
    streams = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    environment = os.environ | environment
    return subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True, **streams)


def run_without_room_for_videos(folder, module, flags):
    """ffmpeg, a process of its own, can write a few hundred bytes and no more."""
    ffmpeg = folder / "ffmpeg"
    ffmpeg.write_text(f'#!/bin/sh\nulimit -f 1\nexec "{FFMPEG_BINARY}" "$@"\n')
    ffmpeg.chmod(0o755)
    process = start(folder, module, flags, IMAGEIO_FFMPEG_EXE=str(ffmpeg))
    out, err = process.communicate(timeout=PATIENCE)
    return Ended(process.returncode, out, err)


BLOCKED = [partial(run, sabotage=without_folder("videos")), run_without_room_for_videos]


@pytest.mark.slow
@parent_only
@pytest.mark.parametrize("run_blocked", BLOCKED, ids=["no folder", "no room"])
def test_a_video_that_cannot_be_written(script, finished, tmp_path, run_blocked):
    ended = run_blocked(tmp_path, script.module, "--evaluate runs/finished --capture-video")
    assert_one_line(ended)


@pytest.mark.slow
@parent_only
@pytest.mark.parametrize("run_blocked", BLOCKED, ids=["no folder", "no room"])
def test_a_video_in_training_that_cannot_be_written(script, tmp_path, run_blocked):
    ended = run_blocked(tmp_path, script.module, f"{script.small} --capture-video")
    assert_one_line(ended)
    assert "videos" in ended.err and "Last checkpoint: step 40" in ended.err


def runs_as_file(module):
    Path("runs").write_text("")


def runs_as_dangling_link(module):
    Path("runs").symlink_to("nowhere")


def runs_as_link_to_itself(module):
    Path("runs").symlink_to("runs")


def gone_folder(module):
    Path("gone").mkdir()
    os.chdir("gone")
    os.rmdir("../gone")


PLACES = [runs_as_file, runs_as_dangling_link, runs_as_link_to_itself, gone_folder]


@pytest.mark.parametrize("place", PLACES)
def test_places_where_no_run_folder_can_be_made(script, tmp_path, place):
    ended = run(tmp_path, script.module, script.small, place)
    assert_one_line(ended, code=2)
    assert "runs" in ended.err


@parent_only
def test_the_folder_of_another_run_is_left_alone(script, tmp_path):
    """Two runs that start in the same millisecond have one name: the second must not remove it."""

    def at_once(module):
        time.time_ns = lambda: 10**18

    folder = tmp_path / "runs" / f"Pendulum-v1__sac_continuous__1__{10**12}"
    folder.mkdir(parents=True)
    (folder / "args.json").write_text("of the other run")
    ended = run(tmp_path, script.module, script.small, at_once)
    assert_one_line(ended, code=2)
    assert content(folder) == {str(folder / "args.json"): b"of the other run"}


# Files that TensorBoard wrote may be damaged: the run goes on, and its curve is drawn.


def event_file(folder):
    (path,) = folder.glob("events.out.tfevents.*")
    return path


RECORDS = {
    "missing": lambda path: path.unlink(),
    "empty": cut(0),
    "half": cut(0.5),
    "text": lambda path: path.write_text("records"),
    "zeros": lambda path: path.write_bytes(bytes(500)),
    "zeros at the end": lambda path: path.write_bytes(path.read_bytes() + bytes(500)),
    "a record cut, more after it": lambda path: path.write_bytes(
        path.read_bytes()[:300] + path.read_bytes()[290:]
    ),
    "a flipped bit": lambda path: flip_bit(path, 200, 3),
    "a dangling link": lambda path: (path.unlink(), path.symlink_to("nowhere")),
}


@parent_only
@pytest.mark.parametrize("damage", RECORDS)
def test_damaged_records_of_tensorboard(script, finished, tmp_path, damage):
    RECORDS[damage](event_file(finished))
    ended = run(tmp_path, script.module, "--resume runs/finished --total-timesteps 110")
    assert ended.code == 0, ended.err
    assert "Traceback" not in ended.err
    assert load(finished / "model.pt")["step"] == 110


# 4. Numbers that are too large or no numbers, and other flags -------------------------------------

COUNTS = ["--total-timesteps", "--num-envs", "--batch-size", "--learning-starts"]
COUNTS += ["--eval-frequency", "--eval-episodes", "--checkpoint-frequency"]
COUNTS += ["--log-frequency", "--threads", "--seed"]
TOO_LARGE = ["2147483648000", "9223372036854775808", "1e30", "1e98"]
REALS = ["--gamma", "--tau", "--policy-lr", "--q-lr"]
NO_NUMBERS = ["nan", "inf", "-inf", "1e400", "-1", "1e9"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("flag", COUNTS)
@pytest.mark.parametrize("number", TOO_LARGE)
def test_counts_too_large(script, refusal, flag, number):
    if flag == "--seed" and number == "2147483648000":
        pytest.skip("a seed may have 63 bits")
    assert flag in refusal(f"{script.small} {flag} {number}")


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("flag", REALS)
@pytest.mark.parametrize("number", NO_NUMBERS)
def test_reals_that_are_none_or_out_of_range(script, refusal, flag, number):
    assert flag in refusal([*script.small.split(), f"{flag}={number}"])


VARIANTS = {  # of sac_ablations.py
    "--n-critics": "0 1001 1e6",
    "--critics-subset": "-1 3",
    "--policy-frequency": "0 1001 1e12",
    "--alpha": "0 -1 nan inf 1e-320 1e10",
    "--alpha-lr": "-1 nan inf 2",
    "--target-entropy": "nan inf -inf 1e10",
    "--target-entropy-scale": "nan inf -inf 1e10",
    "--log-std-min": "nan inf -inf -101 3",
    "--log-std-max": "nan inf -inf 101 -21",
    "--policy-l2": "-1 nan inf 2",
    "--hidden": "0 -1 1e6 1e12",
    "--layers": "0 1001 1e6",
    "--dropout": "1 -0.1 nan inf",
    "--reward-scale": "0 -1 nan inf 1e10",
    "--random-steps": "-2 1e13",
    "--updates-per-step": "0 -1 nan inf 1e-300 1001",
    "--update-interval": "0 1e13",
    "--target-network-frequency": "0 1e13",
    "--stack": "0 1001 1e6",
    "--action-repeat": "0 1001 1e6",
}


@only("sac_ablations")
@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    "flag, number", [(flag, number) for flag in VARIANTS for number in VARIANTS[flag].split()]
)
def test_numbers_of_variants(script, refusal, flag, number):
    # --log-std-max -21 is named by the flag that it is below.
    assert flag in refusal([*script.small.split(), f"{flag}={number}"])


@only("sac_dmc")
@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("number", ["0", "-1", "1001", "1e12"])
def test_action_repeat_of_the_suite(script, refusal, number):
    assert "--action-repeat" in refusal([*script.small.split(), f"--action-repeat={number}"])


class Odd(gym.Env):
    """An environment with other spaces than SAC takes, or one that cannot be made."""

    metadata = {"render_modes": [], "render_fps": 30}

    def __init__(self, obs=None, action=None, error=None, render_mode=None):
        if error:
            raise error
        self.observation_space = obs or Box(-1, 1, (2,))
        self.action_space = action or Box(-1, 1, (1,))


def odd(name, **kwargs):
    gym.registry.pop(f"Odd/{name}-v0", None)
    gym.register(f"Odd/{name}-v0", Odd, kwargs=kwargs)
    return f"Odd/{name}-v0"


GRAPH = Graph(Box(-1, 1, (1,)), None)
INFINITE = Box(-np.inf, np.inf, (1,), np.float32)
# What cannot be learned, by --env-id, and what the line says.
ENVIRONMENTS = {
    "empty": ("", "--env-id"),
    "a space": (" ", "--env-id"),
    "a slash": ("Pendulum-v1/", "Malformed"),
    "lower case": ("pendulum-v1", "Pendulum"),
    "negative version": ("Pendulum-v-1", "Pendulum"),
    "huge version": ("Pendulum-v99999999999999999999", "v1"),
    "no module": (":Pendulum-v1", "--env-id :Pendulum-v1"),
    "two modules": ("a:b:c", "--env-id a:b:c"),
    "a path": ("../Pendulum-v1", "--env-id"),
    "a script": ("sac_continuous.py", "--env-id"),
    "a line break": ("Pendulum-v1\nx", "--env-id"),
    "quotes": ("'Pendulum-v1'", "--env-id"),
    "not ASCII": ("Pendülum-v1", "Pendulum"),
    "not UTF-8": ("Pend\udcfflum-v1", "--env-id"),
    "300 letters": ("P" * 300 + "-v1", "too long"),
    "discrete actions": ("FrozenLake-v1", "continuous"),
    "observations in a tuple": ("Blackjack-v1", "continuous"),
    "observations of any length": (odd("Sequence", obs=Sequence(Box(-1, 1))), "--env-id"),
    "observations as a graph": (odd("Graph", obs=GRAPH), "--env-id"),
    "no observations": (odd("Blind", obs=Box(-1, 1, (0,))), "--env-id"),
    "no actions": (odd("Tied", action=Box(-1, 1, (0,))), "--env-id"),
    "actions without bounds": (odd("Unbounded", action=INFINITE), "bounds"),
    "an error without words": (odd("Silent", error=KeyError()), "KeyError"),
    "an error of the system": (odd("Lost", error=FileNotFoundError(2, "no mesh")), "no mesh"),
    "memory": (odd("Huge", error=MemoryError()), "MemoryError"),
}


@only("sac_continuous", "sac_ablations")
@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("case", ENVIRONMENTS)
def test_environments(script, refusal, case):
    env_id, says = ENVIRONMENTS[case]
    assert says in refusal([*script.small.split(), "--env-id", env_id])


NO_TASKS = ["", " ", "cartpole", "cartpole-swing-up", "Hopper-v4", "walker_walk", "-", "x" * 300]


@only("sac_dmc")
@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("env_id", NO_TASKS)
def test_tasks_of_the_suite(script, refusal, env_id):
    assert "--env-id" in refusal([*script.small.split(), "--env-id", env_id])


# Words that tyro refuses in its own way, in a box: what they are, and what the box names.
WORDS = {
    "a fraction": ("--total-timesteps 1.5", "1.5"),
    "a fraction with an exponent": ("--total-timesteps 1.5e0", "1.5e0"),
    "a negative exponent": ("--total-timesteps 1e-3", "1e-3"),
    "an infinite count": ("--total-timesteps 1e400", "1e400"),
    "a hexadecimal number": ("--total-timesteps 0x10", "0x10"),
    "thousands": ("--total-timesteps 1,000", "--total-timesteps"),
    "no value": ("--total-timesteps", "--total-timesteps"),
    "an empty value": ("--total-timesteps=", "--total-timesteps"),
    "a flag that is none": ("--lr 3", "--lr"),
    "half a flag": ("--total-timestep 60", "--total-timestep"),
    "an environment without its flag": ("Hopper-v4", "Hopper-v4"),
    "a value for a switch": ("--cuda true", "true"),
    "a choice that is none": ("--compile yes", "yes"),
    "a precision that is none": ("--matmul-precision low", "low"),
    "a real that is none": ("--gamma 0,99", "0,99"),
    "a dash too few": ("-seed 3", "seed"),
    "no run folder": ("--resume", "--resume"),
}


@parent_only
@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("case", WORDS)
def test_words_that_cannot_be_read(script, monkeypatch, capfd, case):
    flags, named = WORDS[case]
    monkeypatch.setattr(sys, "argv", ["sac_continuous.py", *script.small.split(), *flags.split()])
    with pytest.raises(SystemExit) as ended:
        main(script.module)
    assert ended.value.code == 2 and named in capfd.readouterr().err
    assert not Path("runs").exists()


FOLDERS = {  # what --resume and --evaluate may be given in place of a run folder
    "nothing": "",
    "no such folder": "nothing",
    "no such file": "nothing/best.pt",
    "no such file in a run": "runs/finished/nothing",
    "the root": "/",
    "a device": "/dev/null",
    "the folder of the runs": "runs",
    "a text": "runs/finished/args.json",
    "the script": "runs/finished/sac_continuous.py",
    "a picture": "runs/finished/learning_curve.png",
    "a file as a folder": "runs/finished/args.json/best.pt",
    "a word with a line break": "runs\nfinished",
}


@parent_only
@pytest.mark.parametrize("flag", ["--resume", "--evaluate"])
@pytest.mark.parametrize("case", FOLDERS)
def test_folders_that_are_no_runs(refusal, finished, case, flag):
    assert flag in refusal([flag, FOLDERS[case]])


@parent_only
def test_a_resume_of_the_checkpoint_itself_is_refused(refusal, finished):
    """The copy of the script would be written over it."""
    before = content(finished)
    said = refusal(["--resume", "runs/finished/checkpoint.pt"])
    assert "is a file: name the run folder" in said
    assert content(finished) == before


OTHERS = {  # other mistakes in flags, and what the line says
    "name of 250 letters": ("--exp-name " + "x" * 250, "--exp-name"),
    "name of 120 letters of two bytes": ("--exp-name " + "ü" * 120, "--exp-name"),
    "more environments than random steps": ("--num-envs 51 --buffer-size 60", "--num-envs"),
    "batch beyond the buffer": ("--batch-size 101", "--batch-size"),
    "buffer below the environments": ("--num-envs 9 --buffer-size 8", "--num-envs"),
    "batch beyond memory": ("--batch-size 1e11 --buffer-size 1e11", "--batch-size"),
    "as long as the random steps": ("--total-timesteps 50", "--learning-starts"),
    "resume and evaluate": ("--resume a --evaluate b", "one at a time"),
}


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("case", OTHERS)
def test_other_mistakes_in_flags(script, refusal, case):
    flags, says = OTHERS[case]
    assert says in refusal(f"{script.small} {flags}")


@parent_only
@pytest.mark.usefixtures("here")
def test_the_length_alone_is_refused_with_what_would_mend_it(script, refusal):
    line = refusal("--total-timesteps 3000 --env-id Pendulum-v1")
    assert "--total-timesteps 3000" in line and "--learning-starts (5000)" in line
    (mend,) = re.findall("add (--learning-starts [0-9]+)", line)
    mended = script.module.Args(total_timesteps=3000, learning_starts=int(mend.split()[1]))
    script.module.check_flags(mended)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("flags", ["--num-envs 64", "--num-envs 4 --n-step 10"])
def test_the_mend_of_the_length_fits_the_other_flags(script, refusal, flags):
    if "n-step" in flags and script.module.__name__ != "sac_ablations":
        pytest.skip("a flag of sac_ablations.py")
    length = f"--env-id {script.module.Args().env_id} {flags} --total-timesteps"
    line = refusal(f"{length} 100")
    (mend,) = re.findall("add --learning-starts ([0-9]+)", line)
    assert 33 < int(mend) < 100
    settings = dict(total_timesteps=100, learning_starts=int(mend))
    settings |= {word[2:].replace("-", "_"): int(n) for word, n in zip(*[iter(flags.split())] * 2)}
    script.module.check_flags(script.module.Args(**settings))
    assert refusal(f"{length} 20").endswith(": train longer\n")


@parent_only
@pytest.mark.parametrize("number", ["1e6", "1E6", "1e+6", "1.5e3", "1_000"])
def test_powers_of_ten_are_counts(script, monkeypatch, number):
    for words in (["--total-timesteps", number], [f"--total_timesteps={number}"]):
        monkeypatch.setattr(sys, "argv", ["sac_continuous.py", *words])
        args, _ = script.module.parse_args()
        assert args.total_timesteps == float(number)


# 5. Weights & Biases ------------------------------------------------------------------------------


class Wandb:
    """In place of the package: no process, no network."""

    def __init__(self, login=True, init=None):
        self.answers = {"login": login, "init": init}

    def answer(self, name):
        if isinstance(self.answers[name], Exception):
            raise self.answers[name]
        return self.answers[name]

    def login(self, **_):
        return self.answer("login")

    def init(self, **_):
        return self.answer("init")


@parent_only
@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("mode", ["", " ", "offlin", "OFFLINE", "on", "0", "true", "on,off"])
def test_modes_of_wandb_that_are_none(script, refusal, monkeypatch, mode):
    monkeypatch.setenv("WANDB_MODE", mode)
    assert f"WANDB_MODE={mode.strip()}" in refusal(f"{script.small} --track")


@parent_only
@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("name", ["", "a/b", "a\\b", "a#b", "a?b", "a%b", "a:b", "x" * 129])
def test_names_that_no_project_may_have(script, refusal, monkeypatch, name):
    monkeypatch.setenv("WANDB_MODE", "offline")
    flags = [*script.small.split(), "--track", f"--wandb-project-name={name}"]
    assert "--wandb-project-name" in refusal(flags)


LOGINS = {
    "a key that is none": ValueError("API key must have 40 characters\nor more"),
    "no network": OSError("no route"),
    "no words": RuntimeError(),
    "nobody": False,
}


@parent_only
@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("case", LOGINS)
def test_logins_that_fail(script, refusal, monkeypatch, case):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setitem(sys.modules, "wandb", Wandb(login=LOGINS[case]))
    assert "--track" in refusal(f"{script.small} --track")


@parent_only
@pytest.mark.parametrize("error", [ValueError("no such\nteam"), OSError("no network"), KeyError()])
def test_a_run_that_wandb_refuses(script, finished, tmp_path, monkeypatch, error):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setitem(sys.modules, "wandb", Wandb(init=error))
    ended = run(tmp_path, script.module, f"{script.small} --track")
    assert_one_line(ended)
    assert list(tmp_path.glob("runs/*")) == [tmp_path / "runs" / "finished"]
    ended = run(tmp_path, script.module, "--resume runs/finished --track --total-timesteps 110")
    assert_one_line(ended)
    assert "--resume runs/finished" in ended.err
    assert load(finished / "checkpoint.pt")["step"] == 60


# 6. Closed output ---------------------------------------------------------------------------------


def stream_to(name, path):
    """A sabotage: one of the standard streams goes to `path`, or is closed where there is none."""

    def sabotage(module):
        number = {"stdout": 1, "stderr": 2}[name]
        if path is None:
            setattr(sys, name, None)
            os.close(number)
        else:
            stream = open(path, "w")
            os.dup2(stream.fileno(), number)
            setattr(sys, name, open(number, "w", buffering=1, closefd=False))

    return sabotage


@parent_only
@pytest.mark.parametrize("name", ["stdout", "stderr"])
@pytest.mark.parametrize("path", ["/dev/full", None])
def test_output_that_is_full_or_closed(script, tmp_path, name, path):
    ended = run(tmp_path, script.module, script.small, stream_to(name, path))
    assert "Traceback" not in ended.err
    if path == "/dev/full":
        assert ended.code == 1
        assert name == "stderr" or ended.err.count("\n") == 1
        assert not list(tmp_path.glob("runs/*"))
    else:
        assert ended.code == 0
        assert_same_end(only_run(tmp_path), script.trained / "runs" / "finished")


@parent_only
@pytest.mark.parametrize("lines", [0, 1, 3])
def test_output_that_nobody_reads_on(script, tmp_path, lines):
    """As `| head -1` does: the reader goes after some lines."""

    def sabotage(module):
        reading, written = os.pipe()
        os.dup2(written, 1)
        os.close(written)
        sys.stdout = open(1, "w", closefd=False)
        if lines == 0:
            os.close(reading)
        write = builtins.print
        times = iter(range(lines))

        def print_and_perhaps_close(*words, **options):
            write(*words, **options)
            if "file" not in options and next(times, None) is None and lines:
                with contextlib.suppress(OSError):
                    os.close(reading)

        builtins.print = print_and_perhaps_close

    ended = run(tmp_path, script.module, script.small, sabotage)
    rest = [line for line in ended.err.splitlines() if not line.startswith("warning: ")]
    assert ended.code == 1 and not rest, ended.err
    folders = list(tmp_path.glob("runs/*"))
    assert len(folders) == (lines > 0)
    for folder in folders:
        load(folder / "checkpoint.pt")
        assert run(tmp_path, script.module, f"--resume runs/{folder.name}").code == 0
        assert_same_end(folder, script.trained / "runs" / "finished")


# 7. The first minute ------------------------------------------------------------------------------


def ctrl_c_in(name, from_the=1):
    """A sabotage: Ctrl-C is pressed as the function `name` of the script is called."""

    def sabotage(module):
        *outer, last = name.split(".")
        owner = getattr(module, outer[0]) if outer else module
        function = getattr(owner, last)
        times = iter(range(1, from_the))

        def press(*args, **options):
            if next(times, None) is None:
                signal.raise_signal(signal.SIGINT)
            return function(*args, **options)

        setattr(owner, last, press)

    return sabotage


BEFORE = ["check_flags", "make_env", "check_memory", "make_agent", "choose_compilation"]
BEFORE += ["open_folder", "write_args", "make_buffer", "Logger", "compile_update"]
BEFORE += ["write_atomically"]
DURING = {  # from here on there is a checkpoint: of step 0 or later
    "environments": ctrl_c_in("start_envs"),
    "random phase": ctrl_c_in("ReplayBuffer.add", 10),
    "random phase, second part": ctrl_c_in("ReplayBuffer.add", 45),
    "updates": ctrl_c_in("SAC.update", 3),
    "evaluation": ctrl_c_in("evaluate"),
    "best.pt": ctrl_c_in("save_if_best"),
    "second checkpoint": ctrl_c_in("save_checkpoint", 2),
    "as the second checkpoint is written": ctrl_c_in("write_atomically", 2),
    "model.pt": ctrl_c_in("write_atomically", 5),
    "learning curve": ctrl_c_in("plot_learning_curve"),
    "last lines": ctrl_c_in("print_end"),
}


@parent_only
@pytest.mark.parametrize("name", BEFORE)
def test_ctrl_c_before_training_leaves_nothing(script, tmp_path, name):
    ended = run(tmp_path, script.module, script.small, ctrl_c_in(name))
    assert ended.code in (1, -signal.SIGINT)
    said = [line for line in ended.err.splitlines() if line and not line.startswith("warning: ")]
    assert said in ([], ["stopped. Nothing was trained yet."])
    assert not list(tmp_path.glob("runs/*"))


def test_a_folder_with_an_agent_is_never_removed(script, tmp_path):
    """As where somebody took the checkpoint away while the run went on."""
    for name in ("empty", "trained"):
        (tmp_path / name).mkdir()
    (tmp_path / "trained" / "best.pt").touch()
    for name in ("empty", "trained"):
        with pytest.raises(SystemExit), script.module.resumable(tmp_path / name, is_new=True):
            raise OSError("no space")
    assert [path.name for path in tmp_path.iterdir()] == ["trained"]


def test_the_folder_of_a_resumed_run_is_never_removed(script, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended, script.module.resumable(tmp_path, is_new=False):
        raise OSError("no space")
    assert ended.value.code == 1
    assert capsys.readouterr().err == "error: no space. Nothing was trained yet.\n"
    assert tmp_path.is_dir()


@parent_only
def test_an_update_that_cannot_be_compiled_says_how_to_go_on(script, tmp_path):
    """After the trial compilation of the start: a full disk, or code that is kept for two hosts."""

    def sabotage(module):
        def learn(*_):
            raise torch._dynamo.exc.InternalTorchDynamoError("no Python.h")

        module.compile_update = lambda args, agent, buffer: (learn, agent.act)

    ended = run(tmp_path, script.module, script.small, sabotage)
    error, command = [x for x in ended.err.splitlines() if not x.startswith("warning: ")]
    assert ended.code == 1
    assert error.startswith("error: the update cannot be compiled, add --compile off (no Python.h")
    assert command == f"  python sac_continuous.py --resume runs/{only_run(tmp_path).name}"


def test_an_error_of_the_script_itself_is_no_matter_of_the_compiler(script, tmp_path):
    with pytest.raises(RuntimeError, match="shapes"):
        with script.module.resumable(tmp_path, is_new=False):
            raise RuntimeError("shapes cannot be multiplied")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_last_message_does_not_stand_in_the_line_of_the_bar(script, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with script.module.tqdm(total=10, disable=None) as bar:
        bar.update(3)
        bar.refresh()
        with pytest.raises(SystemExit):
            script.module.stop_unless_finite({"x": torch.tensor(math.nan)}, 3, Path("runs/x"))
    said = terminal.getvalue()
    assert "30%" in said
    assert re.search(r"[\r\n]error: x is not finite at step 3; [^\r]*\n", said)


def test_long_words_are_cut_and_not_lost(script):
    assert script.module.in_one_line("x" * 500) == "x" * 396 + " ..."
    assert script.module.in_one_line("a\n  b") == "a b"
    assert script.module.in_one_line(KeyError()) == "KeyError()"


def test_of_a_compiler_its_words_are_shown_and_not_its_command(script):
    error = CppCompileError(["g++"] + ["-I/some/folder"] * 50, "x.cpp:1: fatal error: no Python.h")
    error = RuntimeError(f"{error}\n")  # PyTorch wraps it
    assert script.module.in_one_line(error) == "x.cpp:1: fatal error: no Python.h"


def test_a_script_that_uv_runs_is_called_as_it_was(script, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["my sac.py"])
    for uv, caller in ((None, "python"), ("/bin/uv", "uv run")):
        monkeypatch.delenv("UV", raising=False)
        if uv:
            monkeypatch.setenv("UV", uv)
        said = script.module.command("--resume", Path("runs/x"))
        assert said == f"{caller} 'my sac.py' --resume runs/x"


def test_a_command_for_windows_has_no_single_quotes(script, monkeypatch):
    """cmd.exe would hand them on as part of the name."""
    monkeypatch.delenv("UV", raising=False)
    monkeypatch.setattr(sys, "argv", ["my sac.py"])
    with monkeypatch.context() as patch:
        patch.setattr(os, "name", "nt")
        said = script.module.command("--resume", "runs\\x")
    assert said == 'python "my sac.py" --resume runs\\x'


@parent_only
@pytest.mark.parametrize("flags", ["--evaluate", "--total-timesteps 62 --resume"])
def test_a_run_of_a_gpu_goes_on_without_one(script, finished, tmp_path, monkeypatch, flags):
    state = load(finished / "checkpoint.pt") | {"random": torch.zeros(16, dtype=torch.uint8)}
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        torch.save(state, finished / "checkpoint.pt")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    ended = run(tmp_path, script.module, f"{flags} runs/finished")
    assert ended.code == 0, ended.err


def test_a_run_of_a_gpu_says_elsewhere_too_how_to_continue(script, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        torch.save({"agent": torch.ones(3), "step": 4000}, tmp_path / "checkpoint.pt")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="CUDA"):
        torch.load(tmp_path / "checkpoint.pt")
    assert "Last checkpoint: step 4,000. " in script.module.how_to_continue(tmp_path)


@pytest.mark.slow
@parent_only
@pytest.mark.parametrize("moment", DURING)
def test_ctrl_c_promises_the_step_at_which_the_resume_goes_on(script, tmp_path, moment):
    ended = run(tmp_path, script.module, script.small, DURING[moment])
    folder = only_run(tmp_path)
    step = load(folder / "checkpoint.pt")["step"]
    assert ended.code == 1
    said = [line for line in ended.err.splitlines() if line and not line.startswith("warning: ")]
    command = f"python sac_continuous.py --resume runs/{folder.name}"
    assert said == [f"stopped. Last checkpoint: step {step}. Continue with:", f"  {command}"]
    assert not list(folder.glob("*.tmp"))

    ended = run(tmp_path, script.module, f"--resume runs/{folder.name}")
    assert ended.code == 0, ended.err
    promise = f"already finished ({step} of 60" if step == 60 else f"resuming at step {step}"
    assert promise in ended.out
    assert_same_end(folder, script.trained / "runs" / "finished")


@parent_only
def test_a_finished_run_says_so(script, finished, tmp_path):
    ended = run(tmp_path, script.module, "--resume runs/finished")
    assert ended.code == 0
    assert "already finished (60 of 60 steps); to train longer: --total-timesteps N" in ended.out


@parent_only
@pytest.mark.usefixtures("here")
def test_an_environment_in_lower_case_is_not_taken_for_another(script, refusal):
    assert "Hopper" in refusal(f"{script.small} --env-id hopper")


@only("sac_continuous", "sac_ablations")
def test_the_version_that_is_taken_is_said(script, tmp_path):
    ended = run(tmp_path, script.module, f"{script.small} --env-id Pendulum")
    assert ended.code == 0 and "--env-id Pendulum: Pendulum-v1 is the newest version" in ended.out
    assert only_run(tmp_path).name.startswith("Pendulum-v1__")


def test_help_describes_the_script(script, monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", [f"{script.module.__name__}.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        script.module.main()
    said = capfd.readouterr()
    assert ended.value.code == 0 and not said.err
    assert script.module.__doc__.split("\n")[0] in said.out
    assert "--total-timesteps" in said.out


@pytest.mark.slow
@parent_only
@pytest.mark.parametrize("seconds", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("flags", ["--compile off", "--compile on"])
def test_ctrl_c_soon_after_the_start(script, tmp_path, seconds, flags):
    """To the whole group of processes, as a terminal sends it: PyTorch's compilers have it too."""
    flags = f"{script.small} --total-timesteps 100000 {flags}"
    process = start(tmp_path, script.module, flags, TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
    # Python itself answers a Ctrl-C with a traceback until the script has told it not to, which is
    # before the slow imports. The first of these is NumPy.
    maps = Path(f"/proc/{process.pid}/maps")
    while process.poll() is None and "/numpy/" not in maps.read_text():
        time.sleep(0.01)
    time.sleep(seconds)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode in (1, -signal.SIGINT, 130), err
    assert "Traceback" not in err
    for folder in tmp_path.glob("runs/*"):
        assert f"Last checkpoint: step {load(folder / 'checkpoint.pt')['step']:,}." in err


SURROUNDINGS = {  # values that the environment variables of that kind cannot have
    "machine": dict(OMP_NUM_THREADS="many", MKL_NUM_THREADS="-1", CUDA_VISIBLE_DEVICES="none"),
    "terminal": dict(COLUMNS="wide", LINES="0", TERM="none", SDL_VIDEODRIVER="none"),
    "language": dict(LANG="xx_XX", PYTHONIOENCODING="ascii"),
    # Which not even root can make.
    "folders": dict(TMPDIR="/dev/null/folder", HOME="/dev/null/folder"),
    "caches": dict(XDG_CACHE_HOME="/dev/null", MPLCONFIGDIR="/dev/null"),
}


@pytest.mark.slow
@parent_only
@pytest.mark.parametrize("kind", SURROUNDINGS)
def test_variables_that_are_none(script, tmp_path, kind):
    process = start(tmp_path, script.module, script.small, **SURROUNDINGS[kind])
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and "Traceback" not in err, err


@pytest.mark.slow
@only("sac_dmc")
def test_a_way_of_opengl_that_is_none(script, tmp_path):
    process = start(tmp_path, script.module, script.small, MUJOCO_GL="nothing")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2 and err.startswith("error: ") and "MUJOCO_GL" in err
    assert err.count("\n") == 1
