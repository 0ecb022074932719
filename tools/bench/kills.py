"""Kill a small run at random moments, resume it, and compare with one that nobody disturbed.

    python tools/bench/kills.py [--kills 50] [--seed 0]

The machine is `roofline`, so that costs are the same in every run; training ends by steps, not by the clock.
Each time: a fresh store, SIGKILL after a random share of an undisturbed run's time, then the same command again
to its end. The plan, the student's size and its figures must be those of the undisturbed run, and nothing that
was in the store may have been written anew. (Training of this size lasts less than the minute between two
checkpoints, so that it is done again; tests/passes/test_checkpoint.py takes up half a training.) Prints one line a
kill; exit code 1 if any differs.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hantc.dialect.activation import activation
from hantc.dialect.conv import Conv
from hantc.dialect.elementwise import Add
from hantc.dialect.emitter import emit
from hantc.dialect.graph import trace
from hantc.dialect.linear import Linear
from hantc.dialect.pool import GlobalPool
from hantc.dialect.shape import Flatten

_SIDE, _WIDTH, _CLASSES = 16, 32, 4
_REWRITTEN = ("partial",)  # kinds of the store that are written again by design


class Block(nn.Module):
    """Two 3×3 convolutions beside the identity."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.relu, self.second = Conv(_WIDTH, _WIDTH, 3), activation("relu"), Conv(_WIDTH, _WIDTH, 3)
        self.add, self.last = Add(), activation("relu")

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → the same."""
        out: Tensor = self.last(self.add(self.second(self.relu(self.first(x))), x))
        return out


def make(folder: Path) -> tuple[Path, Path]:
    """A small network with random weights, and images labelled by it."""
    torch.manual_seed(0)
    head = Linear(_WIDTH, _CLASSES)
    body = [Conv(3, _WIDTH, 3), activation("relu"), Block(), Block(), GlobalPool(), Flatten(), head]
    network = trace(nn.Sequential(*body).eval(), (3, _SIDE, _SIDE), (_CLASSES,))
    images = np.random.default_rng(0).integers(0, 256, (320, _SIDE, _SIDE, 3), dtype=np.uint8)
    with torch.no_grad():
        x = torch.from_numpy(images.transpose(0, 3, 1, 2) / np.float32(255)).float()
        head.weight.mul_(50)  # so that classes lie apart
        assert head.bias is not None
        head.bias.sub_(network(x).mean(0))
        labels = network(x).argmax(1).numpy()
    model, data = folder / "small.onnx", folder / "small.npz"
    model.write_bytes(emit(network).model.SerializeToString())
    np.savez(data, x=images[:240], y=labels[:240], x_val=images[240:], y_val=labels[240:])
    return model, data


def command(model: Path, data: Path, place: Path) -> list[str]:
    """The run; its limit is far more than it needs, so that nothing depends on the clock."""
    given = [str(model), "--target", "roofline", "--data", str(data), "--budget", "0.6", "--effort", "quick"]
    options = ["--time-limit", "30m", "--threads", "1", "--out", str(place / "run"), "--store", str(place / "store")]
    return [sys.executable, "-m", "hantc.cli", *given, *options]


def run(argv: Sequence[str], kill_after: float | None = None) -> tuple[int, float]:
    """(exit code, seconds); SIGKILL after so many seconds if it still runs."""
    started = time.monotonic()
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            process.wait(kill_after)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
    return process.returncode, time.monotonic() - started


def contents(store: Path) -> dict[str, int]:
    """What tells whether a finished piece of work in a store was written anew: its file's inode (reading touches
    the time, for the least recently used go first)."""
    files = [p for p in store.rglob("*") if p.is_file() and p.suffix in (".json", ".safetensors")]
    return {
        str(p.relative_to(store)): p.stat().st_ino for p in files if p.relative_to(store).parts[0] not in _REWRITTEN
    }


def outcome(place: Path) -> Any:
    """What the run decided, without the solver's seconds, and what came of it."""
    plan = json.loads((place / "run" / "plan.json").read_text())
    summary = json.loads((place / "run" / "summary.json").read_text())
    figures = [summary["accuracy_drop"], summary["agreement"], summary["student"]["size_bytes"]]
    return {k: v for k, v in plan.items() if k != "solver"}, figures


def main(argv: Sequence[str]) -> int:
    """Print a line for each kill and a summary."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    p.add_argument("--kills", type=int, default=50)
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args(argv)
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        model, data = make(Path(folder))
        whole = Path(folder) / "whole"
        code, seconds = run(command(model, data, whole))
        if not (whole / "run" / "plan.json").exists():
            print(f"the undisturbed run ended with {code} and left no plan", file=sys.stderr)
            return 3
        wanted, units = outcome(whole), Counter(Path(name).parts[0] for name in contents(whole / "store"))
        print(f"undisturbed: {seconds:.0f} s; {', '.join(f'{n} {kind}' for kind, n in sorted(units.items()))}")
        bad = done = 0
        while done < args.kills:
            place = Path(folder) / f"k{done}"
            after = rng.uniform(0.05, 1.0) * seconds
            if run(command(model, data, place), after)[0] != -signal.SIGKILL:
                print(f"ended before {after:.1f} s: does not count", flush=True)
                shutil.rmtree(place)
                seconds *= 0.9
                continue
            done += 1
            before = contents(place / "store") if (place / "store").exists() else {}
            again, took = run(command(model, data, place))
            now = contents(place / "store")
            redone = [name for name, at in before.items() if now.get(name) != at]
            same = again == code and outcome(place) == wanted
            bad += not same or bool(redone)
            verdict = "same outcome" if same else "OTHER OUTCOME"
            facts = f"{len(before)} kept, {len(redone)} redone, resumed in {took:.1f} s"
            print(f"{done}: killed at {after:.1f} s, {facts}, {verdict}", flush=True)
            shutil.rmtree(place)
    print(f"{done - bad} of {done} as undisturbed")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
