"""The captured step: on a CPU, a model's forward pass and its logits as recorded programs, replayed in one call.

The programs are recorded once, for as many rows as a step can have, and replayed for any number of them: every buffer
has its rows outermost. Eager and captured steps run the same kernels on the same numbers.
"""

from __future__ import annotations

from torch import Tensor

from pelton import ops
from pelton.models import Model
from pelton.ops.native import native
from pelton.ops.recording import Recorder
from pelton.runner.batch import BatchBuffers


class Graph:
    """A model's two programs over the buffers of its batches."""

    def __init__(self, model: Model, buffers: BatchBuffers) -> None:
        """Records; raises NotRecordable if the model does something that is no kernel call."""
        with Recorder(len(buffers.token_ids)) as forward:
            self.hidden = model.forward(buffers.whole())  # [T, d_model]
        with Recorder(len(buffers.sampled_rows)) as logits:
            self.logits = model.logits(ops.select_rows(self.hidden, buffers.sampled_rows))  # [M, V]
        self._forward, self._logits = forward, logits  # they own the programs' memory

    def run(self, num_tokens: int, num_sampled: int) -> tuple[Tensor, Tensor]:
        """Compute the filled batch: its hidden states [T, d_model], and the logits [M, V] of the sampled rows."""
        parts = [(self._forward.program, num_tokens), (self._logits.program, num_sampled)]
        native.replay(parts)  # type: ignore[union-attr]
        return self.hidden[:num_tokens], self.logits[:num_sampled]
