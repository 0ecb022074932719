"""Networks drawn at random keep what they compute (tools/fuzz/rewrites.py: thousands of them)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_drawn_networks() -> None:
    command = [sys.executable, "tools/fuzz/rewrites.py", "--count", "80", "--seed", "3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "80 networks, 0 findings" in done.stdout
    assert all(name in done.stdout for name in ("carry_norm", "stride_slice", "merge_branches", "fold_pad"))
