"""Real topologies: the models that come with the onnx package, whose weights are one number each."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import onnx
import pytest

from hantc.dialect.importer import load_onnx
from hantc.dialect.rewrites.normalize import normalize
from hantc.passes.match import match_regions

if TYPE_CHECKING:
    from tests.dialect.conftest import Models

_FOLDER = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
_LARGE = {"bvlc_alexnet", "vgg19", "zfnet512"}  # hundreds of MB once their weights are made
# regions that are no spans, by kind: ResNet-50's bottlenecks, DenseNet-121's layers, blocks and transitions, ...
_KINDS = {
    "densenet121": {"stem": 1, "dense_layer": 58, "dense_block": 4, "plain_conv": 4},
    "inception_v1": {"stem": 1, "plain_conv": 11},
    "inception_v2": {"stem": 1, "plain_conv": 12},
    "resnet50": {"stem": 1, "residual": 16},
    "shufflenet": {"stem": 1, "inverted_residual": 13, "plain_conv": 3},
    "squeezenet": {"stem": 1, "plain_conv": 17},
    "bvlc_alexnet": {"stem": 1, "plain_conv": 4},
    "vgg19": {"stem": 1, "plain_conv": 15},
    "zfnet512": {"stem": 1, "downsample": 1, "plain_conv": 3},
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in _LARGE else n for n in sorted(_KINDS)]
)
def test_round_trip_and_regions(models: Models, name: str) -> None:
    trip = models.trip(load_onnx(_FOLDER / f"light_{name}.onnx"), batch=1)
    assert not trip.opaque
    kinds = Counter(r.kind for r in match_regions(normalize(trip.module)[0]).regions if r.kind != "span")
    assert kinds == _KINDS[name]


def test_all_of_them() -> None:
    assert {f"light_{n}.onnx" for n in _KINDS} == {f.name for f in _FOLDER.glob("*.onnx")}
