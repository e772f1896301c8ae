"""Tests of the pair "smol" need its source model, and are collected by `make test-smol` alone."""

from __future__ import annotations

import os

import pytest

from nla_lens import NLA

if "NLA_LENS_TEST_SMOL" not in os.environ:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def smol() -> NLA:
    """The pair, on the model that `make smol` brings."""
    return NLA.from_pretrained("smol")
