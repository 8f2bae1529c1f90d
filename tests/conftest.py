"""One test for several scripts: where a module lists SCRIPTS, each of its tests runs once per script, as its `sac`.

The marks `only` and `without`, on a test or on one of its parameters, name the scripts that it is for or is not for.
What a module takes from the script when it is imported stays the first one's: names and runs that many tests share
come from fixtures of the module that depend on `tested`.
"""

import importlib
import os

import pytest


def pytest_configure(config):
    config.addinivalue_line("markers", "only(*scripts): the scripts that this is for")
    config.addinivalue_line("markers", "without(*scripts): the scripts that this is not for")


def pytest_generate_tests(metafunc):
    if scripts := getattr(metafunc.module, "SCRIPTS", None):
        metafunc.parametrize("tested", scripts, indirect=True)


def meant(item):
    """Whether the marks of a test, and of its parameters, let it run on its script."""
    script = item.callspec.params.get("tested") if hasattr(item, "callspec") else None
    only, without = ([mark.args for mark in item.iter_markers(name)] for name in ("only", "without"))
    return all(script in names for names in only) and not any(script in names for names in without)


def pytest_collection_modifyitems(items):
    items[:] = [item for item in items if meant(item)]


@pytest.fixture(scope="module", autouse=True)
def tested(request):
    """The script under test."""
    with pytest.MonkeyPatch.context() as patch:
        script = importlib.import_module(request.param) if hasattr(request, "param") else None
        if script:
            patch.setattr(request.module, "sac", script)
        yield script


@pytest.fixture(scope="module")
def equipped(tested):
    """The script under test, and what its environments need already imported: no forked child has to do it again."""
    if tested.__name__ == "sac_dmc":
        os.environ.setdefault("MUJOCO_GL", "egl")  # as main() does, before dm_control looks
        pytest.importorskip("dm_control.suite")
        pytest.importorskip("shimmy")
    return tested
