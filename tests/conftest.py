"""One test for several scripts: where a module lists SCRIPTS, each of its tests runs once per script, as its `sac`.

The marks `only` and `without`, on a test or on one of its parameters, name scripts: those it is for, those it is not for.
What a module takes from the script when it is imported would stay the first one's: fixtures of the module that depend
on `tested` are the place for it, and for runs that are shared.
"""

import importlib

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
