"""Training: data, losses, the papers' recipe, steps, checkpoints, metrics and fine-tuning."""

from ._checkpoints import Checkpoints as Checkpoints
from ._fit import Data as Data, Fit as Fit, fit as fit
from ._load_balance import (
    load_balancing_loss as load_balancing_loss,
    update_correction_bias as update_correction_bias,
)
from ._loss import (
    HasState as HasState,
    LossAux as LossAux,
    cross_entropy as cross_entropy,
    empty_carry as empty_carry,
    next_token_loss as next_token_loss,
)
from ._loss_scale import LossScale as LossScale
from ._metrics import read_metrics as read_metrics
from ._plots import plot_metrics as plot_metrics
from ._recipe import decay_mask as decay_mask, recipe as recipe
from ._step import Loss as Loss, TrainState as TrainState, TrainStep as TrainStep
from ._write_error import CheckpointWriteError as CheckpointWriteError
from .data import (
    Batch as Batch,
    Packed as Packed,
    Streams as Streams,
    document_starts as document_starts,
    hold_out_documents as hold_out_documents,
    hold_out_end as hold_out_end,
    read_tokens as read_tokens,
    write_tokens as write_tokens,
)
from .finetuning import (
    LoRA as LoRA,
    LoRAPair as LoRAPair,
    load_lora as load_lora,
    save_lora as save_lora,
)
