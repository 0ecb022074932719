"""Some hundred broken files through the importer, in a process of its own with a memory limit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

_TOOL = Path(__file__).resolve().parents[1] / "tools" / "fuzz" / "models.py"


@pytest.mark.parametrize("seed", [1, 2])
def test_broken_files(seed: int, tmp_path: Path) -> None:
    given = ["--count", "250", "--seed", str(seed), "--keep", str(tmp_path / "found")]
    done = subprocess.run([sys.executable, _TOOL, *given], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "250 files" in done.stdout and "'network'" in done.stdout and "'ModelError'" in done.stdout
