"""Ranks: the processes that compute one model together, each on a device of its own with a share of every large weight
(Shoeybi et al., arXiv:1909.08053).

All ranks call the same collectives in the same order; nothing else keeps them together.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from pelton.errors import ConfigError
from pelton.ops import gpu
from pelton.ops.recording import refuse_to_record

c10d: Any = torch.distributed.distributed_c10d  # what its stubs leave out is used, too
TIMEOUT = timedelta(hours=1)  # a rank that is lost is noticed by its process; loading and compiling may last


class Ranks:
    """This process among `size`. A rank that is alone has no group, and its collectives do nothing."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank = rank
        self.size = size
        self.num_collectives = 0  # calls so far: where it is equal, ranks are in step
        self._group: Any = None
        self._peers: Any = None  # of ops.cuda.peers
        self._lock = threading.Lock()

    def connect(self, folder: Path, kind: str, through_memory: bool = True) -> None:
        """Meet the others, through a file in `folder` that all can see. kind: "cpu" (gloo) or "cuda" (NCCL, and what is
        few through the GPUs' memory, if asked to and if they reach each other's)."""
        if kind == "cuda" and not torch.distributed.is_nccl_available():
            raise ConfigError("--tensor-parallel-size: this torch comes without NCCL; use one that has it, or 1")
        store = torch.distributed.FileStore(str(folder / "ranks"), self.size)  # type: ignore[attr-defined]
        if kind == "cuda":
            options = c10d.ProcessGroupNCCL.Options()
            options._timeout = TIMEOUT
            options.global_ranks_in_group = list(range(self.size))
            self._group = c10d.ProcessGroupNCCL(store, self.rank, self.size, options)
        else:
            options = c10d.ProcessGroupGloo._Options()
            options._timeout = TIMEOUT
            options._devices = [c10d.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
            self._group = c10d.ProcessGroupGloo(store, self.rank, self.size, options)
        self.all_reduce_(torch.zeros(1, device=kind))  # the connections take memory when they are used first
        if kind == "cuda" and through_memory:
            self._meet()

    def _meet(self) -> None:
        """Find each other's memory, if all can."""
        device = torch.device("cuda", torch.cuda.current_device())

        def least(value: int) -> int:
            return self.least([value], device)[0]

        if least(int(not gpu.why_not() and os.environ.get("NCCL_P2P_DISABLE", "0") == "0")):
            from pelton.ops.cuda import peers  # its kernels need Triton

            self._peers = peers.meet(self.rank, self.size, device, self.all_gather, least)

    def share(self, size: int, unit: int = 1, *, what: str, or_same: bool = False) -> range:
        """This rank's part of `size` features, which are cut into whole units only.

        or_same: where there are fewer units than ranks, some ranks have the same. ConfigError, about `what`, if the
        units cannot be shared evenly.
        """
        count = size // unit
        if count % self.size == 0:
            first, num = self.rank * (count // self.size), count // self.size
        elif or_same and self.size % count == 0:
            first, num = self.rank // (self.size // count), 1
        else:
            raise ConfigError(
                f"--tensor-parallel-size {self.size} does not divide {what}, {count}; use a size that does"
            )
        return range(first * unit, (first + num) * unit)

    # --- collectives --------------------------------------------------------------------------------------------

    def all_reduce_(self, x: Tensor) -> Tensor:
        """The sum of every rank's x, in place."""
        if self._peers is not None and self._peers.accepts(x):
            self._check()
            self._peers.all_reduce_(x)
            self.num_collectives += 1
        elif self.size > 1:
            self._run("allreduce", c10d.AllreduceOptions(), [x])
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """Every rank's columns side by side: [M, n] -> [M, size * n]."""
        if self.size == 1:
            return x
        num_rows, num_columns = x.shape
        out = x.new_empty(self.size * num_rows, num_columns)
        self._run("_allgather_base", c10d.AllgatherOptions(), out, x.contiguous())
        return out.view(self.size, num_rows, num_columns).transpose(0, 1).flatten(1)

    def broadcast_(self, x: Tensor) -> Tensor:
        """Rank 0's x, in place."""
        if self.size > 1:
            self._run("broadcast", c10d.BroadcastOptions(), [x])
        return x

    def least(self, values: Sequence[int], device: torch.device) -> list[int]:
        """Of each number, the least that any rank has."""
        x = torch.tensor(values, dtype=torch.int64, device=device)
        options = c10d.AllreduceOptions()
        options.reduceOp = c10d.ReduceOp.MIN
        self._run("allreduce", options, [x])
        return x.tolist()

    def _check(self) -> Any:
        """The group, if no rank is lost."""
        if (group := self._group) is None:
            raise RuntimeError("a rank is lost")
        return group

    def _run(self, collective: str, options: Any, *tensors: Any) -> None:
        """On a GPU in the current stream, without waiting."""
        refuse_to_record("what ranks tell each other")
        options.asyncOp = False
        work = getattr(self._check(), collective)(*tensors, options)
        if work is not None:
            work.wait()
        self.num_collectives += 1

    def abort(self) -> None:
        """End collectives that wait for a rank that is lost; there can be no more. To be called from a thread of its
        own: NCCL keeps it until the last CUDA graph with a collective is gone."""
        with self._lock:
            group, self._group = self._group, None
        if self._peers is not None:
            self._peers.abort()
        if group is not None:
            group.abort()


ALONE = Ranks()
