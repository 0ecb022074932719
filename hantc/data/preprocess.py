"""From pixels to the network's input: what the user says (a file or a preset), checked against the model.

Without a file and without `--preprocess` the model's own input decides: layout, channel count and size come
from its shape, and pixels are divided by 255 (left alone where the input is not a float tensor). Mean and
standard deviation are then 0 and 1; hantc does not guess that a network wants ImageNet's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    ValidationError,
    field_validator,
    model_validator,
)

from hantc.core.errors import DataError, UsageError
from hantc.core.types import TensorSpec

Layout = Literal["NCHW", "NHWC"]
Color = Literal["RGB", "BGR", "GRAY"]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"]
Side = Annotated[int, Field(gt=0, strict=True)]
Size = tuple[int, int]

KEYS = ("layout", "color", "resize", "interpolation", "crop", "scale", "mean", "std")
PRESETS = ("imagenet", "tf", "none")
_IMAGE_CHANNELS = (1, 3)
# From this input size on, ImageNet recipes resize to 8/7 of it and crop the centre (256 → 224); below, they do not.
_CROP_FROM = 128


class Preprocess(BaseModel):
    """How an 8-bit image becomes input: colour, resize, centre crop, then (pixel · scale - mean) / std.

    `mean` and `std` are per channel in the order of `color` (for BGR: blue first); one value serves all
    channels. `resize` as an int is the shorter side when a crop follows, keeping the aspect; without a crop
    it is a square, so that all images come out alike. `[h, w]` is exact. `origin` says where this came from
    and is not part of the content.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    layout: Layout = "NCHW"
    color: Color = "RGB"
    resize: Side | tuple[Side, Side] | None = None
    interpolation: Interpolation = "bilinear"
    crop: Side | tuple[Side, Side] | None = None
    scale: FiniteFloat = 1 / 255
    mean: tuple[FiniteFloat, ...] = (0.0,)
    std: tuple[FiniteFloat, ...] = (1.0,)
    origin: str = Field(default="", exclude=True)

    @field_validator("layout", "color", mode="before")
    @classmethod
    def _upper(cls, value: Any) -> Any:
        return value.upper() if isinstance(value, str) else value

    @field_validator("interpolation", mode="before")
    @classmethod
    def _lower(cls, value: Any) -> Any:
        return value.lower() if isinstance(value, str) else value

    @field_validator("mean", "std", mode="before")
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        return (value,) if isinstance(value, int | float) else value

    @field_validator("mean", "std")
    @classmethod
    def _not_empty(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not value:
            raise ValueError("needs one value, or one per channel")
        return value

    @field_validator("std")
    @classmethod
    def _positive(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if min(value) <= 0:
            raise ValueError("must be greater than 0")
        return value

    @field_validator("scale")
    @classmethod
    def _not_zero(cls, value: float) -> float:
        if value == 0:
            raise ValueError("must not be 0")
        return value

    @model_validator(mode="after")
    def _crop_fits(self) -> Self:
        if self.crop is not None and self.resize is not None:
            (ch, cw), (rh, rw) = as_size(self.crop), as_size(self.resize)
            if ch > rh or cw > rw:
                raise ValueError(f"crop {self.crop} is larger than resize {self.resize}")
        return self

    @property
    def output_size(self) -> Size | None:
        """Height and width after resizing and cropping; None where the images keep their own."""
        final = self.crop if self.crop is not None else self.resize
        return None if final is None else as_size(final)


def as_size(value: int | tuple[int, int]) -> Size:
    """`n` → `(n, n)`; `(h, w)` as it is."""
    return (value, value) if isinstance(value, int) else value


def channel_dim(spec: TensorSpec, layout: Layout) -> int | str | None:
    """The channel count that a four-dimensional input declares under `layout` (None: unknown or no image)."""
    return spec.shape[1 if layout == "NCHW" else 3] if len(spec.shape) == 4 else None


def spatial_dims(spec: TensorSpec, layout: Layout) -> tuple[int | str | None, int | str | None]:
    """The height and width that a four-dimensional input declares under `layout`."""
    if len(spec.shape) != 4:
        return None, None
    first = 2 if layout == "NCHW" else 1
    return spec.shape[first], spec.shape[first + 1]


def infer_layout(spec: TensorSpec) -> Layout:
    """The layout that the input's shape suggests; NCHW where it leaves the question open."""
    first, last = channel_dim(spec, "NCHW"), channel_dim(spec, "NHWC")
    if (first in _IMAGE_CHANNELS) != (last in _IMAGE_CHANNELS):
        return "NCHW" if first in _IMAGE_CHANNELS else "NHWC"
    return "NHWC" if isinstance(first, int) and isinstance(last, int) and last < first else "NCHW"


def load_preprocess(option: str | None, model_path: Path, input_spec: TensorSpec) -> Preprocess:
    """The preprocessing for a model: `--preprocess`, else `MODEL.preprocess.json` beside it, else derived.

    Keys that a file leaves out are derived from the model's input, as described at the top of this module.
    Raises UsageError when `option` is neither a preset nor a file, and DataError, naming file and key, when
    the content is wrong or contradicts the model's input.
    """
    if option is None:
        beside = model_path.with_suffix(".preprocess.json")
        pre = _from_file(beside, input_spec) if beside.is_file() else _preset("none", input_spec, "derived")
    elif option in PRESETS:
        pre = _preset(option, input_spec, option)
    else:
        path = Path(option).expanduser()
        if not path.is_file():
            raise UsageError(
                f"--preprocess {option!r} is neither a file nor one of {', '.join(PRESETS)}",
                hint=f"write a JSON file with the keys {', '.join(KEYS)}",
            )
        pre = _from_file(path, input_spec)
    check_fits(pre, input_spec)
    return pre


def check_fits(pre: Preprocess, spec: TensorSpec) -> None:
    """Raise DataError, naming the key, where `pre` contradicts the model's input. Only images are checked:
    an input that is not four-dimensional takes float arrays, which no preprocessing touches."""
    if len(spec.shape) != 4:
        return
    where = f"preprocess ({pre.origin})" if pre.origin else "preprocess"
    shape = f"the model's input {spec.name} {_shape_text(spec)}"
    other: Layout = "NHWC" if pre.layout == "NCHW" else "NCHW"
    channels = channel_dim(spec, pre.layout)
    if channels not in _IMAGE_CHANNELS and channel_dim(spec, other) in _IMAGE_CHANNELS:
        raise DataError(f"layout {pre.layout} does not fit {shape}", where=where, hint=f'set "layout": "{other}"')
    if (channels == 1 and pre.color != "GRAY") or (channels == 3 and pre.color == "GRAY"):
        right = "GRAY" if channels == 1 else "RGB"
        raise DataError(
            f"color {pre.color} does not fit the {channels} channel(s) of {shape}",
            where=where,
            hint=f'set "color": "{right}"',
        )
    count = channels if isinstance(channels, int) else (1 if pre.color == "GRAY" else 3)
    for key in ("mean", "std"):
        values = getattr(pre, key)
        if len(values) not in (1, count):
            raise DataError(
                f"{key} has {len(values)} values for {count} channel(s)", where=where, hint=f"give 1 or {count} values"
            )
    if pre.output_size is None:
        return
    wanted = spatial_dims(spec, pre.layout)
    if any(isinstance(w, int) and w != got for w, got in zip(wanted, pre.output_size, strict=True)):
        key = "crop" if pre.crop is not None else "resize"
        h, w = pre.output_size
        raise DataError(f"{key} gives {h}x{w} images, which do not fit {shape}", where=where, hint=f"correct {key!r}")


def _shape_text(spec: TensorSpec) -> str:
    return "[" + ", ".join("?" if d is None else str(d) for d in spec.shape) + "]"


def _derived(spec: TensorSpec) -> dict[str, Any]:
    """What the model's input says about its preprocessing."""
    layout = infer_layout(spec)
    h, w = spatial_dims(spec, layout)
    size: Any = None
    if isinstance(h, int) and isinstance(w, int):
        size = h if h == w else (h, w)
    return {
        "layout": layout,
        "color": "GRAY" if channel_dim(spec, layout) == 1 else "RGB",
        "resize": size,
        "scale": 1 / 255 if spec.dtype.startswith("float") else 1.0,
    }


def _preset(name: str, spec: TensorSpec, origin: str) -> Preprocess:
    """`none`: scale alone. `tf`: pixels to -1…1. `imagenet`: ImageNet's mean and standard deviation, and from
    128 pixels on its resize to 8/7 of the input with a centre crop."""
    values = _derived(spec)
    if name == "tf":
        values |= {"scale": 1 / 127.5, "mean": 1.0}
    elif name == "imagenet":
        if values["color"] == "GRAY":
            raise UsageError(
                "--preprocess imagenet is for three channels, the model takes one",
                hint="write a JSON file with mean and std of one value each",
            )
        values |= {"scale": 1 / 255, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
        size = values["resize"]
        if isinstance(size, int) and size >= _CROP_FROM:
            values |= {"resize": round(size * 8 / 7), "crop": size}
    return Preprocess(origin=origin, **values)


def _from_file(path: Path, spec: TensorSpec) -> Preprocess:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as e:
        raise DataError(f"cannot be read ({e})", where=str(path)) from e
    except json.JSONDecodeError as e:
        raise DataError(f"is not JSON: {e.msg} in line {e.lineno}", where=str(path)) from e
    if not isinstance(content, dict):
        raise DataError("must hold one JSON object", where=str(path), hint=f"its keys are {', '.join(KEYS)}")
    if unknown := sorted(set(content) - set(KEYS)):
        raise DataError(f"unknown key {unknown[0]!r}", where=str(path), hint=f"the keys are {', '.join(KEYS)}")
    values = _derived(spec)
    if "crop" in content and "resize" not in content:
        values["resize"] = None  # the derived size is the network's input, which the crop already gives
    try:
        return Preprocess(**(values | content | {"origin": str(path)}))
    except ValidationError as e:
        first = e.errors()[0]
        key = str(first["loc"][0]) if first["loc"] else "crop"
        message = first["msg"].removeprefix("Value error, ")
        given = f" (given: {content[key]!r})" if key in content else ""
        raise DataError(f"key {key!r}: {message}{given}", where=str(path)) from e
