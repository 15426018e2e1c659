"""A corpus for the small runs of this folder."""

from pathlib import Path

import pytest

from tests.end_to_end.small_run import make_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))
