"""Makes the demo's data set: scikit-learn's handwritten digits, enlarged to 64×64, as one `.npz`.

    python tools/demo/data.py build/demo/digits.npz

The 1,797 images ship inside scikit-learn, so nothing is fetched. Keys: `x` (1297, 64, 64, 1) uint8,
`y` (1297,) int64, `x_val` (500, 64, 64, 1) uint8, `y_val` (500,) int64. The same seed gives the same split;
the teacher was trained on `x` alone.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

SIDE = 64
N_VAL = 500
SEED = 0

Array = np.ndarray[Any, Any]


def enlarge(image: Array) -> Array:
    """An 8×8 image with values 0…16 → (64, 64, 1) uint8 with values 0…255."""
    small = Image.fromarray(np.round(image * (255 / 16)).astype(np.uint8))
    return np.asarray(small.resize((SIDE, SIDE), Image.Resampling.BICUBIC))[..., None]


def make_digits() -> dict[str, Array]:
    """The data set as `x y x_val y_val`, the validation part stratified over the ten classes."""
    digits = load_digits()
    x = np.stack([enlarge(image) for image in digits.images])
    y = digits.target.astype(np.int64)
    x_train, x_val, y_train, y_val = train_test_split(x, y, test_size=N_VAL, random_state=SEED, stratify=y)
    return {"x": x_train, "y": y_train, "x_val": x_val, "y_val": y_val}


def write_digits(path: Path) -> None:
    """Write the data set to `path`; a run that is cut off leaves nothing under the final name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with part.open("wb") as f:
        np.savez_compressed(f, allow_pickle=False, **make_digits())
    os.replace(part, path)


def main() -> None:
    """Command line: the path to write."""
    parser = argparse.ArgumentParser(description="Write the demo's digits data set.")
    parser.add_argument("path", type=Path, nargs="?", default=Path("build/demo/digits.npz"))
    args = parser.parse_args()
    write_digits(args.path)
    print(f"{args.path}: {args.path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
