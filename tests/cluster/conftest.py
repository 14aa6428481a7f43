"""What the tests of several hosts share: the modules of this folder on the path, and who may run them."""

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for the modules beside the tests


@pytest.fixture(scope="session")
def require_commands() -> Callable[..., None]:
    """Skip a test in one line unless root runs it and finds the commands that it names."""

    def require(*names: str) -> None:
        if os.geteuid() != 0:
            pytest.skip("needs root, for daemons and namespaces")
        path = os.pathsep.join((os.environ["PATH"], "/usr/sbin", "/sbin"))
        missing = [name for name in names if not shutil.which(name, path=path)]
        if missing:
            pytest.skip(f"needs {', '.join(missing)}: bash tests/cluster/install.sh, as root")

    return require
