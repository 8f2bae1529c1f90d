"""One test for several scripts: a test that takes `sac` runs once with each of the three.

The marks `only` and `without`, on a module, a test or one of its parameters, name the scripts that
it is for or is not for. The mark `slow` keeps a test out of the fast tier: pytest -m "not slow".
"""

import importlib
import os
import signal

import pytest
import torch
from helpers import SCRIPTS, Watched, suite_or_skip

import sac_continuous

# The files that take longest begin first, so that all workers end at about the same time.
LONGEST = "cluster resume run compile variant_diffs cli outputs docs ablations damage tune learning"
LONGEST_FIRST = {f"test_{name}": place for place, name in enumerate(LONGEST.split())}
LONG = {"undisturbed", "tuned", "real"}  # the fixtures of benchmark/ that train for many seconds


def pytest_configure(config):
    # A shell has what runs in its background ignore Ctrl-C; what tests start would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Where uv runs the tests, the scripts would tell how to go on with it.
    os.environ.pop("UV", None)
    # To ask in the usual way whether there is a GPU begins its use, and forks cannot go on with it.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    # Four workers share the cores: a thread that waits for another one must not spin on its core.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    config.addinivalue_line("markers", "only(*scripts): the scripts that this is for")
    config.addinivalue_line("markers", "without(*scripts): the scripts that this is not for")


def is_meant(item) -> bool:
    """Whether the marks of a test, and of its parameters, let it run with its script."""
    for mark in [*item.iter_markers("only"), *item.iter_markers("without")]:
        assert mark.args and {*mark.args} <= {*SCRIPTS}, f"{item.nodeid}: {mark.name}{mark.args}"
    script = item.callspec.params.get("sac") if hasattr(item, "callspec") else None
    if script is None:
        return True
    named = all(script in mark.args for mark in item.iter_markers("only"))
    return named and not any(script in mark.args for mark in item.iter_markers("without"))


def pytest_collection_modifyitems(items):
    items[:] = [item for item in items if is_meant(item)]
    items.sort(key=lambda item: LONGEST_FIRST.get(item.path.stem, len(LONGEST_FIRST)))
    for item in items:
        if is_run_of_a_copy(item) or LONG & set(item.fixturenames):
            item.add_marker(pytest.mark.slow)


def is_run_of_a_copy(item) -> bool:
    """Whether a test has a copy of sac_continuous.py run: too long for the fast tier."""
    script = item.callspec.params.get("sac") if hasattr(item, "callspec") else None
    runs = {"train", "recorded", "tmp_path"} & set(item.fixturenames)
    return script in SCRIPTS[1:] and bool(runs)


@pytest.fixture(scope="module", params=SCRIPTS)
def sac(request):
    """The script under test, and what its environments need already imported.

    So no forked child has to import it again.
    """
    if request.param == "sac_dmc":
        suite_or_skip()
    return importlib.import_module(request.param)


@pytest.fixture
def gymnasium_only(sac, monkeypatch):
    """Gymnasium's environments for sac_dmc.py too, whose loop is its parent's."""
    if sac.__name__ == "sac_dmc":
        monkeypatch.setattr(sac, "make_env", sac_continuous.make_env)
        monkeypatch.setattr(sac, "full_name", sac_continuous.full_name)
        monkeypatch.setattr(sac, "episode_limit", sac_continuous.episode_limit)


@pytest.fixture(autouse=True)
def as_python_starts():
    """One thread, and signals as Python has them: some tests run programs that set these."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def train(monkeypatch, tmp_path):
    """train(sac, env_id, total_timesteps, **flags): a watched run of main() in an empty folder."""
    return Watched(monkeypatch, tmp_path)
