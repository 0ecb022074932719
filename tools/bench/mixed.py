"""A training step in mixed precision beside one in FP32: what `--train-precision bf16` gains on this CPU.

    python tools/bench/mixed.py MODEL.onnx [...] [--images 64] [--rounds 8] [--threads N]

For each model, forward and backward of the whole network on random images, in both precisions in turn; the least of
all rounds counts. Differences are of the gradients: 1 minus the cosine of all of them together.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, fx

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from hantc.backends.device import trains_in_bf16  # noqa: E402
from hantc.dialect.examples import example_inputs  # noqa: E402
from hantc.dialect.importer import import_file  # noqa: E402
from hantc.dialect.rewrites.normalize import normalize  # noqa: E402
from hantc.passes.engine import fast_layout, fast_module, first_output, multiplied_in_bf16, takes_bf16  # noqa: E402


def step(network: fx.GraphModule, x: Tensor, *, mixed: bool) -> tuple[float, Tensor]:
    """Seconds for forward and backward, and all gradients in a row."""
    network.zero_grad(set_to_none=True)
    begun = time.perf_counter()
    with multiplied_in_bf16(mixed):
        out = first_output(network(x))
    out.float().square().mean().backward()
    spent = time.perf_counter() - begun
    return spent, torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])


def row(path: Path, images: int, rounds: int) -> str:
    """One model's line of the table."""
    network = fast_module(normalize(import_file(path))[0])
    if not takes_bf16(network):
        return f"| {path.stem} | holds operators that may not take BF16 | | | |"
    network.requires_grad_(True)
    x = fast_layout(example_inputs(network.meta["info"], images)[0])
    best, grads = {False: math.inf, True: math.inf}, dict[bool, Tensor]()
    for _ in range(rounds):
        for mixed in (False, True):
            spent, grads[mixed] = step(network, x, mixed=mixed)
            best[mixed] = min(best[mixed], spent)
    apart = 1 - float(torch.nn.functional.cosine_similarity(grads[False].double(), grads[True].double(), dim=0))
    plain, half = (1000 * best[m] for m in (False, True))
    return f"| {path.stem} | {plain:.0f} ms | {half:.0f} ms | {plain / half:.2f}× | {apart:.1e} |"


def main() -> int:
    """Print the table."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("models", nargs="+", type=Path, metavar="MODEL.onnx")
    p.add_argument("--images", type=int, default=64)
    p.add_argument("--rounds", type=int, default=8)
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    print(f"training in BF16 by itself on this CPU: {'yes' if trains_in_bf16() else 'no'}\n")
    print("| model | FP32 | BF16 | gain | gradients apart |\n|---|---|---|---|---|")
    for path in args.models:
        print(row(path, args.images, args.rounds), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
