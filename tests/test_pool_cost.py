"""What the comparison with the paper's training prints; the figures themselves are of no concern here."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_both_ways_on_a_few_images() -> None:
    command = [sys.executable, "tools/bench/pool_cost.py", "--per-region", "1", "--images", "128", "--rates", "0.1"]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=400, check=False)
    assert done.returncode in (0, 1), done.stderr
    lines = [line for line in done.stdout.splitlines() if line]
    first = re.fullmatch(r"(\d+) candidates of (\d+) regions, epochs of 128 images", lines[0])
    assert first is not None
    assert first[1] == first[2], "one candidate each"
    assert re.fullmatch(r"paper at rate 0\.1: median error \d+\.\d{3}, \d+\.\d s", lines[1])
    pattern = r"(\d+) of (\d+) candidates as near to the teacher; ratio of compute ([\d.]+) \(.*\)"
    last = re.fullmatch(pattern, lines[-1])
    assert last is not None
    assert last[2] == first[1]
    met, ratio = int(last[1]) / int(last[2]), float(last[3])
    assert done.returncode == (0 if ratio <= 0.2 and met >= 0.95 else 1)
