"""Training: losses, the papers' recipe, data, and a trainer that survives."""

from ._batch import Batch as Batch
from ._checkpoints import (
    Checkpoints as Checkpoints,
    CheckpointWriteError as CheckpointWriteError,
)
from ._data import Packed as Packed, Streams as Streams
from ._lora import LoRA as LoRA, LoRAPair as LoRAPair
from ._lora_file import load_lora as load_lora, save_lora as save_lora
from ._loss import (
    LossAux as LossAux,
    cross_entropy as cross_entropy,
    empty_carry as empty_carry,
    next_token_loss as next_token_loss,
)
from ._metrics import plot_metrics as plot_metrics, read_metrics as read_metrics
from ._recipe import decay_mask as decay_mask, recipe as recipe
from ._state_tuning import begin as begin
from ._step import Loss as Loss, TrainState as TrainState, TrainStep as TrainStep
from ._tokens import (
    document_starts as document_starts,
    hold_out_documents as hold_out_documents,
    hold_out_end as hold_out_end,
    read_tokens as read_tokens,
    write_tokens as write_tokens,
)
from ._trainer import Data as Data, Fit as Fit, fit as fit
