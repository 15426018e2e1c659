"""The stand-in of a cluster that the tests of launch/ share."""

import pytest

from tests.unit.launch.stand_ins import Cluster


@pytest.fixture
def cluster(tmp_path) -> Cluster:
    return Cluster(tmp_path)
