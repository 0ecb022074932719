"""A run that is killed and resumed decides as one that nobody disturbed (tools/bench/kills.py: fifty times)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_a_kill() -> None:
    done = subprocess.run(
        [sys.executable, "tools/bench/kills.py", "--kills", "1", "--seed", "5"],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=540,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("undisturbed: ")
    assert "killed at" in lines[-2] and "same outcome" in lines[-2]
    assert lines[-1] == "1 of 1 as undisturbed"
