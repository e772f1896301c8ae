"""The scripts that trained the embedded NLA train another one, of the same form."""

import subprocess
import sys
from pathlib import Path

import pytest

from nla_lens import NLA

ROOT = Path(__file__).parents[1]
TRAIN = ROOT / "tutorials" / "tiny_nla" / "train.py"
SHIPPED = ROOT / "nla_lens" / "tiny"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_smoke_run_writes_what_is_shipped(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, TRAIN, "--quick", "--scale", "0.02", "--out", tmp_path / "made"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    for half in ("source", "av", "av_norm_matched", "ar"):
        made = {f.name for f in (tmp_path / "made" / half).iterdir()}
        # Fitted on a pair that is trained; its own test is in test_calibration.py.
        shipped = {f.name for f in (SHIPPED / half).iterdir()}
        assert made == shipped - {"nla_calibration.json"}
    for av in ("av", "av_norm_matched"):
        nla = NLA.from_pretrained(av=tmp_path / "made" / av, ar=tmp_path / "made" / "ar")
        shipped = NLA.from_pretrained(av=SHIPPED / av, ar=SHIPPED / "ar")
        assert nla.spec.injection == shipped.spec.injection
        assert nla.spec.av_template == shipped.spec.av_template
        assert len(nla.explain_text("Nora lives in Naples.", max_new_tokens=20)) == 6
