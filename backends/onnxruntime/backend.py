"""ONNX Runtime on the CPU, as a hantc backend."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from hantc.backends.device import channel_block, cpu_capabilities
from hantc.backends.feeds import timing_feeds
from hantc.core.backend_api import Artefact, BuildSpec, Capabilities, Deployed, Feeds
from hantc.core.errors import HantcError, ModelError
from hantc.core.timing import measure_artefacts
from hantc.core.types import Protocol, Timing

try:
    import onnxruntime as ort
except ImportError:  # a missing library is an answer of capabilities()
    ort = None

_PROVIDERS = ["CPUExecutionProvider"]
_LOG_ERROR = 3
OPTIMIZED = "model.optimized.onnx"


@dataclass(frozen=True)
class _Handle:
    session: Any  # onnxruntime.InferenceSession
    threads: int
    no_feeds: str  # why there are no timing feeds, or ""


class OnnxRuntimeBackend:
    """Runs ONNX models with ONNX Runtime's CPU provider; `handle` holds the session."""

    name = "onnxruntime"

    def capabilities(self) -> Capabilities:
        """FP32 and INT8 (QDQ) on this machine's CPU."""
        here = cpu_capabilities("ONNX Runtime", "onnxruntime", None if ort is None else ort.__version__)
        return replace(here, channel_block=channel_block(here.device))

    def supports(self, model: onnx.ModelProto) -> tuple[bool, str]:
        """Whether ONNX Runtime loads the model (graph optimisations off, so this is quick)."""
        try:
            _session(model.SerializeToString(), threads=1, optimise=False)
        except HantcError as e:
            return False, e.message
        return True, ""

    def build(self, model: onnx.ModelProto, spec: BuildSpec) -> Artefact:
        """A session with `spec.threads` threads. ModelError if ONNX Runtime refuses the model.

        A model with symbolic dims beside the batch gets no timing feeds: it runs, but `measure` refuses it.
        """
        data = model.SerializeToString()
        session = _session(data, spec.threads)
        feeds, problem = timing_feeds(model, spec.batch)
        return Artefact(handle=_Handle(session, spec.threads, problem), feeds=feeds, size_bytes=len(data))

    def optimized(self, model: onnx.ModelProto, spec: BuildSpec) -> Deployed:
        """The graph after all of ONNX Runtime's rewrites: starts without doing them again, on CPUs with the same
        instructions and with the same version. ModelError if ONNX Runtime refuses the model."""
        with tempfile.TemporaryDirectory(prefix="hantc-optimized-") as folder:
            path = Path(folder) / OPTIMIZED
            _session(model.SerializeToString(), spec.threads, save=path)
            data = path.read_bytes()
        ops = Counter(n.op_type for n in onnx.load_from_string(data).graph.node)
        here = self.capabilities().device
        facts = {"built_by": f"ONNX Runtime {ort.__version__}", "device": here.cpu, "nodes": dict(ops.most_common())}
        return Deployed(data, OPTIMIZED, facts)

    def measure(self, artefacts: Sequence[Artefact], protocol: Protocol) -> list[Timing]:
        """Interleaved latencies (`hantc.core.timing`)."""
        return measure_artefacts(
            artefacts, protocol, bound_run, lambda e: f"ONNX Runtime fails while running the model: {_first_line(e)}"
        )

    def run(self, artefact: Artefact, feeds: Feeds) -> list[np.ndarray[Any, Any]]:
        """Outputs in the graph's order. ModelError if the feeds do not fit the model."""
        try:
            return list(artefact.handle.session.run(None, dict(feeds)))
        except Exception as e:  # onnxruntime's own exceptions share no base class
            raise ModelError(f"ONNX Runtime cannot run the model: {_first_line(e)}") from e


def _session(data: bytes, threads: int, *, optimise: bool = True, save: Path | None = None) -> Any:
    if ort is None:
        raise HantcError("the package onnxruntime is not installed", hint="pip install onnxruntime")
    options = ort.SessionOptions()
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimise else level.ORT_DISABLE_ALL
    if save is not None:
        options.optimized_model_filepath = str(save)
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.enable_cpu_mem_arena = True
    options.log_severity_level = _LOG_ERROR
    options.add_session_config_entry("session.intra_op.allow_spinning", "1")
    # Without this, a session's idle workers spin for tens of ms after its run and take the cores of the next
    # session in the round: four interleaved sessions with 2 threads on 2 cores took 4.5× their time alone.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        return ort.InferenceSession(data, options, providers=_PROVIDERS)
    except Exception as e:  # onnxruntime's own exceptions share no base class
        raise ModelError(f"ONNX Runtime does not take the model: {_first_line(e)}") from e


def bound_run(artefact: Artefact) -> Callable[[], object]:
    """A call that runs the artefact once on its timing feeds. Through an IOBinding: 6 µs a call against 13 µs of
    `session.run`. ModelError if it has no feeds."""
    handle: _Handle = artefact.handle
    if handle.no_feeds:
        raise ModelError(f"the model cannot be timed: {handle.no_feeds}")
    session = handle.session
    binding = session.io_binding()
    for name, array in artefact.feeds.items():
        binding.bind_cpu_input(name, np.ascontiguousarray(array))
    for output in session.get_outputs():
        binding.bind_output(output.name)
    return lambda: session.run_with_iobinding(binding)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:400] if str(error).strip() else type(error).__name__
