"""Training: losses, the papers' recipe, data, and a trainer that survives."""

from ._batch import Batch as Batch
