"""Questions for tasks."""

from pathlib import Path

import pytest

from tests.tasks import write_data


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory as `write_data` fills it; read it, do not write to it."""
    home = tmp_path_factory.mktemp("data")
    write_data(home)
    return home
