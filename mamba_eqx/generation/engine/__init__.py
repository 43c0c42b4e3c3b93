"""Generating for many requests at once: continuous batching over slots, and a prefix cache."""

from ._engine import Engine as Engine
from ._job import (
    EngineCounts as EngineCounts,
    EngineFullError as EngineFullError,
    Job as Job,
    Progress as Progress,
)


__all__ = ["Engine", "EngineCounts", "EngineFullError", "Job", "Progress"]
