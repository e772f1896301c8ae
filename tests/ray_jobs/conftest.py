"""A Ray cluster of two nodes for the tests here, which `make test-ray` runs; else they are not
collected."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

if "NLA_LENS_TEST_RAY" not in os.environ:
    collect_ignore_glob = ["test_*.py"]

QUIET = {"include_dashboard": False}


@pytest.fixture(scope="session")
def cluster() -> Iterator[Any]:
    """Two nodes with a processor each; this process belongs to the first."""
    # Before Ray is imported: what starts here talks to itself alone.
    os.environ["RAY_AUTH_MODE"] = "disabled"
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray
    from ray.cluster_utils import Cluster

    # A node that is killed is noticed after seconds, not half a minute.
    soon = {"health_check_period_ms": 1000, "health_check_failure_threshold": 5}
    head = {"num_cpus": 1, "_system_config": soon, **QUIET}
    made = Cluster(initialize_head=True, head_node_args=head)
    made.add_node(num_cpus=1)
    made.wait_for_nodes()
    ray.init(address=made.address, log_to_driver=False, logging_level="warning")
    yield made
    ray.shutdown()
    made.shutdown()
