"""The names that `import irdscale` gives."""

import pytest

import irdscale
from tests.cli.test_command_line import HEAVY, python


def test_import_is_light_and_the_public_names_are_known():
    code = (
        "import sys, irdscale\n"
        f"assert not [name for name in {HEAVY} if name in sys.modules]\n"
        "assert set(irdscale.__all__) <= set(dir(irdscale))\n"
        "assert all(name in irdscale._HOME or name in vars(irdscale) for name in irdscale.__all__)"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", [name for name in irdscale.__all__ if name in irdscale._HOME])
def test_public_names_come_from_their_modules(name):
    assert getattr(irdscale, name).__module__.startswith(irdscale._HOME[name])


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="accumulate_fishr"):
        _ = irdscale.accumulate_fishr
