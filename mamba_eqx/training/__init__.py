"""Training: losses, the papers' recipe, data, and a trainer that survives."""

from ._batch import Batch as Batch
from ._loss import (
    LossAux as LossAux,
    cross_entropy as cross_entropy,
    empty_carry as empty_carry,
    next_token_loss as next_token_loss,
)
from ._recipe import decay_mask as decay_mask, recipe as recipe
from ._step import Loss as Loss, TrainState as TrainState, TrainStep as TrainStep
