"""Context parallel as a Lightning strategy, together with data parallel."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torchmetrics import Metric

from seqssm.errors import UserError
from seqssm.longcontext.parallel import LOST, LengthSplit, lost_peers_named

STARTED_BY = "SEQSSM_STARTED_BY"
"""Environment variable: the process that has started the others of a run on its machine."""


class ContextParallelStrategy(DDPStrategy):
    """Split each sequence over ``context`` processes, and the batches over groups of them.

    With n devices, n / context groups train data parallel; within a group all see the same batch, and each runs its
    part of the length. The weights are those of one device with a batch n / context times as large, whatever
    ``context``. ``context: 1`` is plain DDP.

    Args:
        context: processes that share a sequence, all on one machine; all of the machine's when None.
        timeout_minutes: how long a process waits for another before all stop. The first step, which compiles kernels,
            and a validation run must be shorter.
        **kwargs: as :class:`lightning.pytorch.strategies.DDPStrategy` and DistributedDataParallel take them.

    Raises:
        UserError: the devices do not split into such groups, or, before training, the task or its model needs
            sequences whole. During training: another process has gone.
    """

    def __init__(self, context: int | None = None, timeout_minutes: float = 10, **kwargs: Any) -> None:
        super().__init__(timeout=timedelta(minutes=timeout_minutes), **kwargs)
        self.context = context
        self._length_split: LengthSplit | None = None
        self._data_group: Any = None
        self._watch: threading.Event | None = None

    def _configure_launcher(self) -> None:
        super()._configure_launcher()
        assert self.cluster_environment is not None
        if not self.cluster_environment.creates_processes_externally:
            # This process is going to start the others, which take its environment.
            os.environ[STARTED_BY] = str(os.getpid())

    def setup_environment(self) -> None:
        context = self._context()
        if context < 1 or self.num_processes % context:
            raise UserError(
                f"context parallel over {context} processes needs a multiple of {context} devices on each machine, "
                f"there are {self.num_processes}: set strategy.context or trainer.devices"
            )
        super().setup_environment()
        if os.environ.get(STARTED_BY) == str(os.getppid()):
            self._watch = stop_with_parent()
        world = self.num_nodes * self.num_processes
        # Every process must make every group, in the same order.
        for first in range(0, world, context):
            group: Any = dist.new_group(list(range(first, first + context)), timeout=self._timeout)
            if first <= self.global_rank < first + context:
                self._length_split = LengthSplit(group)
        for position in range(context):
            group = dist.new_group(list(range(position, world, context)), timeout=self._timeout)
            if self.global_rank % context == position:
                self._data_group = group

    def _context(self) -> int:
        return self.num_processes if self.context is None else self.context

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        context = self._context()
        return {
            "num_replicas": self.num_nodes * self.num_processes // context,
            "rank": self.global_rank // context,
        }

    def setup(self, trainer: pl.Trainer) -> None:
        module: Any = trainer.lightning_module
        if self._context() > 1:
            if not hasattr(module, "split_length"):
                raise UserError(f"{type(module).__name__} has no split_length: it cannot run parts of sequences")
            module.split_length(self._length_split)
        for metric in module.modules():
            if isinstance(metric, Metric):
                # Processes that share their sequences count them once.
                metric.process_group = self._data_group
        super().setup(trainer)

    def teardown(self) -> None:
        if self._watch is not None:
            self._watch.set()
        super().teardown()

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        with lost_peers_named():
            return super().training_step(*args, **kwargs)

    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor:
        with lost_peers_named():
            return super().backward(closure_loss, optimizer, *args, **kwargs)

    def optimizer_step(self, optimizer: Any, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        with lost_peers_named():
            return super().optimizer_step(optimizer, closure, model, **kwargs)

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        with lost_peers_named():
            super().barrier(*args, **kwargs)

    def reduce(self, *args: Any, **kwargs: Any) -> Any:
        with lost_peers_named():
            return super().reduce(*args, **kwargs)


def stop_with_parent(every_s: float = 1.0) -> threading.Event:
    """End this process soon after the one that started it, unless the event that this returns is set before.

    It would wait for that one's part of an exchange until the timeout, and hold a GPU: while it waits in NCCL, Python
    handles neither signals nor exceptions.

    Args:
        every_s: seconds between two looks, in a thread.
    """
    parent, over = os.getppid(), threading.Event()

    def watch() -> None:
        while not over.wait(every_s):
            if os.getppid() != parent:
                print(f"seqssm: error: {LOST.format(reason='the first one has gone')}", file=sys.stderr, flush=True)
                os._exit(1)

    threading.Thread(target=watch, name="stop_with_parent", daemon=True).start()
    return over
