"""A fresh environment for `make test-release`, which alone collects the tests here."""

import os

if "NLA_LENS_TEST_RELEASE" not in os.environ:
    collect_ignore_glob = ["test_*.py"]
