"""The cluster that the tests of this folder share, and a corpus for its jobs."""

from pathlib import Path

import pytest

from tests.end_to_end.small_run import make_corpus
from tests.slurm.cluster import Cluster, why_not


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """A SLURM of three nodes, started once for all tests of this folder."""
    if reason := why_not():
        pytest.skip(reason)
    with Cluster(Path(tmp_path_factory.mktemp("slurm"))) as running:
        yield running


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))
