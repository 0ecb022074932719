"""Preprocessing: files, presets, defaults, and what contradicts the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hantc.core.errors import DataError, UsageError
from hantc.core.types import TensorSpec
from hantc.data.preprocess import Preprocess, check_fits, infer_layout, load_preprocess


def spec(*shape: int | str | None, dtype: str = "float32") -> TensorSpec:
    return TensorSpec("input", dtype, ("N", *shape))


NCHW = spec(3, 32, 32)
GOOD: dict[str, Any] = {
    "layout": "NCHW",
    "color": "RGB",
    "resize": 32,
    "interpolation": "bilinear",
    "crop": None,
    "scale": 1 / 255,
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
}


def load_json(tmp_path: Path, content: Any, model: TensorSpec = NCHW) -> Preprocess:
    path = tmp_path / "p.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return load_preprocess(str(path), tmp_path / "m.onnx", model)


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((3, 32, 32), "NCHW"),
        ((32, 32, 3), "NHWC"),
        ((1, 28, 28), "NCHW"),
        ((None, None, 3), "NHWC"),
        ((3, "h", "w"), "NCHW"),
        ((64, 64, 4), "NHWC"),
        ((4, 64, 64), "NCHW"),
        (("c", "h", "w"), "NCHW"),
        ((3, 32, 3), "NCHW"),
        ((16,), "NCHW"),
    ],
)
def test_layout_is_inferred(shape: tuple[int | str | None, ...], layout: str) -> None:
    assert infer_layout(spec(*shape)) == layout


def test_file_round_trip_and_origin(tmp_path: Path) -> None:
    pre = load_json(tmp_path, GOOD)
    assert pre.output_size == (32, 32) and pre.std == (0.229, 0.224, 0.225)
    assert pre.origin.endswith("p.json") and "origin" not in pre.model_dump()


def test_default_is_the_file_beside_the_model(tmp_path: Path) -> None:
    (tmp_path / "net.v2.preprocess.json").write_text(json.dumps(GOOD))
    assert load_preprocess(None, tmp_path / "net.v2.onnx", NCHW).mean == (0.485, 0.456, 0.406)
    assert load_preprocess(None, tmp_path / "other.onnx", NCHW).mean == (0.0,)


def test_derived_default(tmp_path: Path) -> None:
    pre = load_preprocess(None, tmp_path / "m.onnx", spec(28, 20, 1))
    assert (pre.layout, pre.color, pre.resize, pre.origin) == ("NHWC", "GRAY", (28, 20), "derived")
    assert pre.scale == 1 / 255 and pre.mean == (0.0,) and pre.std == (1.0,)
    assert load_preprocess(None, tmp_path / "m.onnx", spec(3, 8, 8, dtype="uint8")).scale == 1.0
    assert load_preprocess(None, tmp_path / "m.onnx", spec(3, "h", "w")).resize is None
    assert load_preprocess(None, tmp_path / "m.onnx", spec(10)).resize is None


def test_presets(tmp_path: Path) -> None:
    tf = load_preprocess("tf", tmp_path / "m.onnx", NCHW)
    assert 0 * tf.scale - tf.mean[0] == -1 and 255 * tf.scale - tf.mean[0] == pytest.approx(1)
    big = load_preprocess("imagenet", tmp_path / "m.onnx", spec(3, 224, 224))
    assert (big.resize, big.crop, big.output_size) == (256, 224, (224, 224))
    small = load_preprocess("imagenet", tmp_path / "m.onnx", NCHW)
    assert (small.resize, small.crop) == (32, None)
    with pytest.raises(UsageError, match="three channels"):
        load_preprocess("imagenet", tmp_path / "m.onnx", spec(1, 28, 28))


def test_missing_keys_are_derived_and_scalars_broadcast(tmp_path: Path) -> None:
    pre = load_json(tmp_path, {"mean": 0.5, "std": [0.5], "color": "bgr"})
    assert (pre.mean, pre.std, pre.color, pre.resize) == ((0.5,), (0.5,), "BGR", 32)
    assert load_json(tmp_path, {"crop": 32}).resize is None


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"colour": "RGB"}, "unknown key 'colour'"),
        ({"origin": "me"}, "unknown key 'origin'"),
        ({"color": "CMYK"}, "key 'color'"),
        ({"resize": -3}, "key 'resize'"),
        ({"resize": 32.5}, "key 'resize'"),
        ({"interpolation": "magic"}, "key 'interpolation'"),
        ({"std": [0.2, 0, 0.2]}, "key 'std': must be greater than 0"),
        ({"std": []}, "key 'std'"),
        ({"scale": 0}, "key 'scale'"),
        ({"mean": ["a"]}, "key 'mean'"),
        ({"crop": 64}, "key 'crop': crop 64 is larger than resize 32"),
        ({"mean": [1, 2]}, "mean has 2 values for 3"),
        ({"layout": "NHWC"}, 'layout NHWC does not fit(.|\n)*"NCHW"'),
        ({"color": "GRAY", "mean": 0, "std": 1}, "color GRAY does not fit"),
        ({"resize": 48}, "resize gives 48x48"),
        ({"resize": 48, "crop": 40}, "crop gives 40x40"),
    ],
)
def test_bad_files_name_file_and_key(tmp_path: Path, change: dict[str, Any], text: str) -> None:
    with pytest.raises(DataError, match=text) as e:
        load_json(tmp_path, GOOD | change)
    assert "p.json" in str(e.value) and e.value.exit_code == 2


@pytest.mark.parametrize(
    ("content", "text"), [("{", "not JSON"), ("[1]", "one JSON object"), ('{"mean": NaN}', "'mean'")]
)
def test_bad_json(tmp_path: Path, content: str, text: str) -> None:
    with pytest.raises(DataError, match=text):
        load_json(tmp_path, content)


def test_unknown_option(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"imagnet.*neither a file nor one of imagenet, tf, none"):
        load_preprocess("imagnet", tmp_path / "m.onnx", NCHW)


def test_no_image_input_is_not_checked() -> None:
    check_fits(Preprocess(resize=7, mean=(1.0, 2.0)), spec(16))
