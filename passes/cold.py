"""What networks take behind other work: a server's request seldom finds the caches as the last one left them."""

from __future__ import annotations

from collections.abc import Sequence

from onnx import ModelProto

from hantc.core.backend_api import BuildSpec
from hantc.core.errors import UsageError
from hantc.core.types import Timing
from hantc.passes.state import Context


def check_cold(ctx: Context) -> None:
    """UsageError for backends that time nothing, or nothing that runs on this processor."""
    if not ctx.capabilities.measures or ctx.base == "fp16":
        raise UsageError(
            f"{ctx.backend.name} times nothing on this processor", where="--cold", hint="leave --cold away"
        )


def measure_cold(networks: Sequence[ModelProto], ctx: Context) -> list[Timing]:
    """Each network's latency where the processor's caches hold other data when it starts, interleaved."""
    spec = BuildSpec(ctx.threads, ctx.config.batch)
    protocol = ctx.protocol(warmup=5, samples=41, cold=True)
    with ctx.reporter.bar("measuring with cold caches", 1.0):
        return ctx.backend.measure([ctx.backend.build(m, spec) for m in networks], protocol)
