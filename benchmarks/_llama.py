"""llama.cpp with the weights of a model of ours, called through llama_cpp's low-level functions.

Optional. It needs `gguf` and `llama_cpp_python`, built from its source archive so that llama.cpp is
compiled for this processor.
"""

import ctypes
import importlib
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from _common import cores
from _peers import available, mamba1_config

import mamba_eqx as mbx


def has_llama() -> bool:
    """Returns whether llama.cpp and the writer of its files are installed."""
    return available("llama_cpp") and available("gguf")


def write_gguf(model: mbx.LanguageModel, path: Path) -> None:
    """Writes a model of Mamba-1 layers to a float32 GGUF file without a vocabulary."""
    gguf = importlib.import_module("gguf")
    config = mbx.LanguageModelConfig.of(model)
    mixer = mamba1_config(model)
    writer = gguf.GGUFWriter(path, "mamba")
    writer.add_context_length(1 << 20)
    writer.add_embedding_length(mixer.d_model)
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_block_count(len(config.layers))
    writer.add_ssm_conv_kernel(mixer.d_conv)
    writer.add_ssm_inner_size(mixer.d_inner)
    writer.add_ssm_state_size(mixer.d_state)
    writer.add_ssm_time_step_rank(mixer.dt_rank)
    writer.add_ssm_dt_b_c_rms(False)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(model.padded_vocab_size)

    def add(name: str, value: Any) -> None:
        writer.add_tensor(name, np.ascontiguousarray(value, np.float32))

    add("token_embd.weight", model.embedding.weight)
    add("output_norm.weight", model.norm_f.weight)
    for i, block in enumerate(model.layers.unstack()):
        assert isinstance(block, mbx.Block)
        mixer = block.mixer
        assert isinstance(mixer, mbx.Mamba1)
        add(f"blk.{i}.attn_norm.weight", block.norm.weight)
        add(f"blk.{i}.ssm_in.weight", mixer.in_proj.weight)
        add(f"blk.{i}.ssm_conv1d.weight", mixer.conv1d.weight.T)
        add(f"blk.{i}.ssm_conv1d.bias", mixer.conv1d.bias)
        add(f"blk.{i}.ssm_x.weight", mixer.x_proj.weight)
        add(f"blk.{i}.ssm_dt.weight", mixer.dt_proj.weight)
        add(f"blk.{i}.ssm_dt.bias", mixer.dt_bias)
        add(f"blk.{i}.ssm_a", -jnp.exp(mixer.A_log))
        add(f"blk.{i}.ssm_d", mixer.D)
        add(f"blk.{i}.ssm_out.weight", mixer.out_proj.weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Llama:
    """A context of llama.cpp with one thread per core."""

    def __init__(self, model: mbx.LanguageModel, *, seq: int, batch: int = 1):
        llama_cpp = importlib.import_module("llama_cpp")
        self._api = llama_cpp
        self._vocab = model.padded_vocab_size
        llama_cpp.llama_backend_init()
        # llama.cpp holds a pointer to the callback, so it must not be collected.
        self._silent = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._silent, ctypes.c_void_p(0))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.gguf"
            write_gguf(model, path)
            params = llama_cpp.llama_model_default_params()
            params.use_mmap = False
            self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        if not self._model:
            raise RuntimeError("llama.cpp could not load the model.")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = max(seq * batch, 256)
        params.n_batch = max(seq * batch, 32)
        params.n_ubatch = min(512, params.n_batch)  # llama.cpp's default
        params.n_seq_max = batch
        params.n_threads = params.n_threads_batch = cores()
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError("llama.cpp could not create a context.")

    def run(self, tokens: np.ndarray, *, all_logits: bool = True) -> np.ndarray:
        """Returns the logits of one sequence, for all tokens or for the last one only."""
        self.forget()
        return self._decode(
            tokens,
            range(len(tokens)),
            [0] * len(tokens),
            lambda i: all_logits or i == len(tokens) - 1,
        )

    def step(self, tokens: np.ndarray, position: int) -> np.ndarray:
        """Feeds one token to each sequence and returns the logits."""
        batch = len(tokens)
        return self._decode(tokens, [position] * batch, list(range(batch)), lambda _: True)

    def forget(self) -> None:
        """Clears the states of all sequences."""
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)

    def _decode(
        self,
        tokens: np.ndarray,
        positions: Sequence[int],
        sequences: Sequence[int],
        wanted: Callable[[int], bool],
    ) -> np.ndarray:
        batch = self._api.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        outputs = 0
        for i, (token, position, sequence) in enumerate(
            zip(tokens, positions, sequences, strict=True)
        ):
            batch.token[i] = int(token)
            batch.pos[i] = int(position)
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = int(sequence)
            batch.logits[i] = wanted(i)
            outputs += bool(wanted(i))
        status = self._api.llama_decode(self._context, batch)
        self._api.llama_batch_free(batch)
        if status != 0:
            raise RuntimeError(f"llama.cpp failed to decode (status {status}).")
        logits = self._api.llama_get_logits(self._context)
        return np.ctypeslib.as_array(logits, (outputs, self._vocab))

    def close(self) -> None:
        """Frees the context and the model."""
        self._api.llama_free(self._context)
        self._api.llama_model_free(self._model)
