"""docs/variants.md keeps its word: diffs apply, compute what their flags do, are counted right."""

import difflib
import importlib
import importlib.util
import multiprocessing
import os
import re
import subprocess
import sys

import pytest
import torch

from docs import variants

PAGE = variants.PAGE.read_text()
SCRIPT = variants.SCRIPT.read_text()
ABLATIONS = variants.SCRIPT.with_name("sac_ablations.py")
VARIANTS = variants.read_variants(PAGE)
ROW = re.compile(
    r"^\| \[(?P<title>.+?)\]\(#(?P<anchor>.+?)\) \|.*?\| (?P<flags>.+?) "
    r"\| \+(?P<added>\d+) -(?P<removed>\d+) \|",
    re.M,
)
ROWS = {row["title"]: row for row in ROW.finditer(PAGE)}
FLAGS = {
    name: ROWS[variant.title]["flags"].strip("`")
    for name, variant in VARIANTS.items()
    if variant.title in ROWS and ROWS[variant.title]["flags"] != "none"
}
# What sac_ablations.py keeps beside the tensors of the copy.
UNUSED_BY_THE_COPY = {"value_network": "target_critics."}
# Long enough for the end of an episode, by its time limit of 200 steps, to be learned from.
SHORT_RUN = "--env-id Pendulum-v1 --total-timesteps 260 --learning-starts 160 --batch-size 16"
SHORT_RUN += " --eval-frequency 0 --threads 1 --compile off --no-cuda"
PENDULUM_STEPS = 6_000


def command(*names):
    """What docs/variants.py does in a process of its own."""
    return subprocess.run(
        [sys.executable, variants.__file__, *names], capture_output=True, text=True
    )


def child(folder, script, arguments):
    spec = importlib.util.spec_from_file_location(script.stem, script)
    module = importlib.util.module_from_spec(spec)
    sys.modules[script.stem] = module
    os.chdir(folder)
    sys.argv = [script.name, *arguments.split()]
    sys.stdout = sys.stderr = open("log.txt", "w", buffering=1)
    spec.loader.exec_module(module)
    module.plot_learning_curve = lambda folder: None  # it takes longer than the run
    module.main()


def train(folder, script, arguments):
    """The folder of a run in a process of its own."""
    folder.mkdir()
    process = multiprocessing.get_context("fork").Process(
        target=child, args=(folder, script, arguments)
    )
    process.start()
    process.join()
    assert process.exitcode == 0, (folder / "log.txt").read_text()
    (run_folder,) = folder.glob("runs/*")
    return run_folder


def checkpoint_of(run_folder):
    return torch.load(run_folder / "checkpoint.pt", weights_only=True)


def written(name, folder):
    """The path of the variant as a script of its own."""
    path = folder / f"sac_{name}.py"
    path.write_text(variants.write_script(VARIANTS[name], SCRIPT))
    return path


def section_of(variant):
    return PAGE.split(f"\n## {variant.title}\n")[1].split("\n## ")[0]


# The page


def nearest(hunk):
    """A hunk's old lines beside the lines of the script that resemble them most."""
    lines = SCRIPT.splitlines()
    length = len(hunk.old)
    windows = [lines[start : start + length] for start in range(len(lines) - length + 1)]
    likeness = [difflib.SequenceMatcher(None, hunk.old, window).ratio() for window in windows]
    if max(likeness) == 0:
        text = "\n".join(hunk.old)
        likeness = [
            difflib.SequenceMatcher(None, "\n".join(window), text).ratio() for window in windows
        ]
    start = likeness.index(max(likeness))
    difference = difflib.ndiff(windows[start], hunk.old)
    shown = "\n".join([f"@@ {hunk.place} @@", *hunk.lines])
    return f"{shown}\n\nnearest, line {start + 1} (- script, + page):\n" + "\n".join(difference)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_hunk_fits_the_script(name):
    assert VARIANTS[name].hunks
    for hunk in VARIANTS[name].hunks:
        try:
            variants.apply([hunk], SCRIPT)
        except variants.Misfit as misfit:
            pytest.fail(f"{name}: {misfit}\n\n{nearest(hunk)}", pytrace=False)
    variants.apply(VARIANTS[name].hunks, SCRIPT)  # in order, none over another


@pytest.mark.parametrize("name", VARIANTS)
def test_every_hunk_changes_something_and_keeps_what_it_shows_as_kept(name):
    for hunk in VARIANTS[name].hunks:
        assert hunk.old and hunk.old != hunk.new, hunk
        assert all(line[:1] in ("", " ", "+", "-") for line in hunk.lines), hunk
        removed = {line[1:] for line in hunk.lines if line.startswith("-")}
        added = {line[1:] for line in hunk.lines if line.startswith("+")}
        assert not (removed & added) - {""}, hunk


def test_the_page_has_the_variants_that_it_must_have():
    asked = {
        "five_critics",
        "one_critic",
        "fixed_alpha",
        "delayed_policy",
        "random_subset",
        "value_network",
    }
    asked |= {"tanh_log_std", "eps_correction", "time_limits", "layer_norm", "td3", "ddpg"}
    assert set(VARIANTS) == asked


def test_the_table_lists_every_variant_and_links_its_section():
    assert list(ROWS) == [variant.title for variant in VARIANTS.values()]
    for title, row in ROWS.items():
        assert row["anchor"] == re.sub(r"[^\w-]", "", title.lower().replace(" ", "-"))


@pytest.mark.parametrize("name", VARIANTS)
def test_the_table_counts_the_changed_lines(name):
    row = ROWS[VARIANTS[name].title]
    lines = [line for hunk in VARIANTS[name].hunks for line in hunk.lines]
    added = sum(line.startswith("+") for line in lines)
    removed = sum(line.startswith("-") for line in lines)
    assert (int(row["added"]), int(row["removed"])) == (added, removed)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_section_tells_the_commands_that_the_table_means(name):
    section = section_of(VARIANTS[name])
    assert f"\npython docs/variants.py {name} > sac_{name}.py\n" in section
    if name in FLAGS:
        assert f"\npython sac_ablations.py {FLAGS[name]}   # the same bits\n" in section
    else:
        assert "sac_ablations.py" not in section


# The command


@pytest.mark.parametrize("name", VARIANTS)
def test_the_command_writes_every_variant(name):
    done = command(name)
    assert done.returncode == 0 and done.stderr == ""
    docstring = compile(done.stdout, f"sac_{name}.py", "exec").co_consts[0]
    assert f'"{VARIANTS[name].title}" of docs/variants.md' in docstring
    assert f"python sac_{name}.py --env-id" in docstring
    assert f'exp_name: str = "sac_{name}"' in done.stdout
    assert done.stdout.count("sac_continuous") == 1  # where it comes from
    assert max(map(len, done.stdout.splitlines())) <= 100


def test_the_command_lists_the_variants():
    done = command()
    assert done.returncode == 0
    assert [line.split()[0] for line in done.stdout.splitlines()] == list(VARIANTS)


@pytest.mark.parametrize("names", [["td4"], ["td3", "ddpg"], ["--help"]], ids=" ".join)
def test_an_unknown_variant_is_one_line_and_exit_code_2(names):
    done = command(*names)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


COMMENT = "  # std in [2e-9, 7.4], as in Spinning Up"
OLD_LINE = f"        log_std = log_std.clamp(-20, 2){COMMENT}\n"
CHANGED_SCRIPTS = {
    "another line": SCRIPT.replace(OLD_LINE, OLD_LINE.replace("2)", "3)")),
    "twice": SCRIPT.replace(OLD_LINE, 2 * OLD_LINE),
    "no such function": SCRIPT.replace("class Actor(", "class Policy("),
    "elsewhere": SCRIPT.replace(OLD_LINE, "").replace(
        "        self.gamma", OLD_LINE + "        self.gamma"
    ),
}


@pytest.mark.parametrize("change", CHANGED_SCRIPTS)
def test_a_hunk_that_no_longer_fits_is_one_line_and_no_script(
    change, monkeypatch, tmp_path, capsys
):
    path = tmp_path / "sac_continuous.py"
    path.write_text(CHANGED_SCRIPTS[change])
    assert CHANGED_SCRIPTS[change] != SCRIPT
    monkeypatch.setattr(variants, "SCRIPT", path)
    monkeypatch.setattr(sys, "argv", ["variants.py", "tanh_log_std"])
    with pytest.raises(SystemExit) as caught:
        variants.main()
    assert caught.value.code.startswith("error: tanh_log_std: ") and "\n" not in caught.value.code
    assert "Actor.forward" in caught.value.code
    assert capsys.readouterr().out == ""


def test_a_hunk_replaces_its_lines_where_it_says():
    script = "def f():\n    a\n    b\n\n\ndef g():\n    a\n    b\n"
    hunk = variants.Hunk("g", ["     a", "-    b", "+    c", "+    d"])
    assert variants.apply([hunk], script) == script[:-6] + "    c\n    d\n"


def test_hunks_out_of_order_do_not_apply():
    first, second, *_ = VARIANTS["td3"].hunks
    with pytest.raises(variants.Misfit):
        variants.apply([second, first], SCRIPT)


# What the copies compute


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    """The checkpoint of sac_continuous.py after the short run."""
    importlib.import_module("sac_continuous")  # the forked children have what it imports
    folder = tmp_path_factory.mktemp("parent")
    return checkpoint_of(train(folder / "run", variants.SCRIPT, SHORT_RUN))


def same(a, b):
    """Whether two checkpoints hold the same bits: tensors by name, rows, random stream, step."""
    if a["agent"].keys() != b["agent"].keys() or (a["step"], a["count"]) != (b["step"], b["count"]):
        return False
    pairs = [(a["agent"][name], b["agent"][name]) for name in a["agent"]]
    pairs += [(a[key], b[key]) for key in ("rows", "random")]
    return all(x.shape == y.shape and torch.equal(x, y) for x, y in pairs)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "more"),
    [*((name, "") for name in FLAGS), ("value_network", " --matmul-precision medium")],
)
def test_a_copy_computes_the_bits_of_its_flag(name, more, parent, tmp_path):
    run = SHORT_RUN + more
    copy = checkpoint_of(train(tmp_path / "copy", written(name, tmp_path), run))
    flagged = checkpoint_of(train(tmp_path / "flagged", ABLATIONS, f"{run} {FLAGS[name]}"))
    assert copy["step"] == 260
    assert copy["agent"]["critic_optimizer.steps"] == 100
    if name in UNUSED_BY_THE_COPY:
        prefix = UNUSED_BY_THE_COPY[name]
        unused = [key for key in flagged["agent"] if key.startswith(prefix)]
        assert unused
        for key in unused:
            del flagged["agent"][key]
    assert copy["agent"].keys() == flagged["agent"].keys()
    differing = [
        key for key, value in copy["agent"].items() if not torch.equal(value, flagged["agent"][key])
    ]
    assert not differing
    assert same(copy, flagged)
    assert not same(copy, parent)  # the variant is one


@pytest.mark.slow
@pytest.mark.parametrize("name", ["td3", "ddpg"])
def test_the_ancestors_swing_up_the_pendulum(name, tmp_path):
    flags = f"--env-id Pendulum-v1 --total-timesteps {PENDULUM_STEPS} --learning-starts 1000"
    flags += f" --eval-frequency {PENDULUM_STEPS} --batch-size 64"
    flags += " --threads 1 --compile off --no-cuda"
    run_folder = train(tmp_path / "run", written(name, tmp_path), flags)
    evaluation = torch.load(run_folder / "best.pt", weights_only=True)
    assert evaluation["step"] == PENDULUM_STEPS
    assert evaluation["return"] > -500  # a random policy gets about -1200, a perfect one -150
