"""hantc as a pass of `torch.fx`: works inside torch's own `PassManager`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from hantc.core.atomic import write_bytes
from hantc.core.types import ModelInfo, untouched
from hantc.dialect.emitter import emit
from hantc.run import Run, compile


class HantPass(PassBase):
    """Graph module -> its hantc student, of equal input and output.

    Takes any exportable `torch.fx.GraphModule`; one made of hantc's own leaves (a student, or
    `hantc.dialect.importer.import_file`) needs no export. `example_input`: (1, …) for foreign modules;
    `options` as for `hantc.compile`. The last `Run` is at `.run`.
    """

    def __init__(
        self, *, out: str | os.PathLike[str], example_input: torch.Tensor | None = None, **options: Any
    ) -> None:
        super().__init__()
        self.out, self.example_input, self.options = out, example_input, options
        self.run: Run | None = None

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Compile; `modified` says whether any region was replaced."""
        if isinstance(graph_module.meta.get("info"), ModelInfo):
            path = Path(self.out) / "teacher.onnx"
            write_bytes(path, emit(graph_module).model.SerializeToString())
            self.run = compile(path, out=self.out, **self.options)
        else:
            self.run = compile(graph_module, example_input=self.example_input, out=self.out, **self.options)
        changed = any(not untouched(c.candidate, c.precision) for c in self.run.summary.choices)
        return PassResult(self.run.student, changed)
