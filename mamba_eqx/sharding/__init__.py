"""Models, batches and sequences on several devices."""

from ._context import context_scan as context_scan
from ._rules import (
    FSDP as FSDP,
    shard as shard,
    shard_rows as shard_rows,
    shardings as shardings,
)
from ._tensor import (
    TensorParallel as TensorParallel,
    TensorParallelMLP as TensorParallelMLP,
    gathered as gathered,
    tensor_parallel as tensor_parallel,
)


__all__ = [
    "FSDP",
    "TensorParallel",
    "TensorParallelMLP",
    "context_scan",
    "gathered",
    "shard",
    "shard_rows",
    "shardings",
    "tensor_parallel",
]
