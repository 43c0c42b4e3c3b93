"""llama.cpp through llama_cpp's low-level functions: no sampler, one call from Python per token.

It should be built from its source archive, so that llama.cpp is compiled for this processor.
"""

import ctypes
import importlib
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ._serve import Contestant, Request, Task, config, serve, tensors


# Names in llama.cpp, by the names in transformers.
_LAYER = {
    "norm.weight": "attn_norm.weight",
    "mixer.in_proj.weight": "ssm_in.weight",
    "mixer.conv1d.weight": "ssm_conv1d.weight",
    "mixer.conv1d.bias": "ssm_conv1d.bias",
    "mixer.x_proj.weight": "ssm_x.weight",
    "mixer.dt_proj.weight": "ssm_dt.weight",
    "mixer.dt_proj.bias": "ssm_dt.bias",
    "mixer.A_log": "ssm_a",
    "mixer.D": "ssm_d",
    "mixer.out_proj.weight": "ssm_out.weight",
}

Wanted = Callable[[int], bool]


class LlamaCpp(Contestant):
    """A model in one of the forms of llama.cpp; its context is made for each task."""

    def __init__(self, request: Request):
        self._api: Any = importlib.import_module("llama_cpp")
        self._threads = request.threads
        self._context: Any = None
        self._api.llama_backend_init()
        # llama.cpp holds a pointer to the callback, so it must not be collected.
        self._silent = self._api.llama_log_callback(lambda *_: None)
        self._api.llama_log_set(self._silent, ctypes.c_void_p(0))
        values = config(request.folder)
        self._vocab = values["vocab_size"]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "float32.gguf"
            write_gguf(values, tensors(request.folder), path)
            if request.form != "float32":
                path = self._quantise(path, request.form)
            options = self._api.llama_model_default_params()
            options.use_mmap = False
            self._model = self._api.llama_model_load_from_file(str(path).encode(), options)
        if not self._model:
            raise RuntimeError("llama.cpp could not load the model.")
        self.weight_bytes = self._api.llama_model_size(self._model)

    def _quantise(self, path: Path, form: str) -> Path:
        options = self._api.llama_model_quantize_default_params()
        kind = {"bfloat16": "BF16"}.get(form, form)
        options.ftype = getattr(self._api, f"LLAMA_FTYPE_MOSTLY_{kind}")
        options.nthread = self._threads
        other = path.with_name("other.gguf")
        status = self._api.llama_model_quantize(
            str(path).encode(), str(other).encode(), ctypes.byref(options)
        )
        if status != 0:
            raise RuntimeError(f"llama.cpp failed to quantise (status {status}).")
        return other

    def _open(self, tokens: int, batch: int) -> None:
        if self._context is not None:
            self._api.llama_free(self._context)
        options = self._api.llama_context_default_params()
        options.n_ctx = max(tokens * batch, 256)
        options.n_batch = max(tokens * batch, 32)
        options.n_ubatch = min(512, options.n_batch)  # llama.cpp's default
        options.n_seq_max = batch
        options.n_threads = options.n_threads_batch = self._threads
        self._context = self._api.llama_init_from_model(self._model, options)
        if not self._context:
            raise RuntimeError("llama.cpp could not create a context.")

    def prefill(self, tokens: np.ndarray, *, all_logits: bool) -> Task:
        """See `Contestant.prefill`."""
        self._open(len(tokens), 1)

        def run() -> np.ndarray:
            self._forget()
            last = len(tokens) - 1
            positions, rows = range(len(tokens)), [0] * len(tokens)
            return self._decode(tokens, positions, rows, lambda i: all_logits or i == last)

        return Task(run, lambda y: {"logits": y})

    def decode(self, prompts: np.ndarray, new: int) -> Task:
        """See `Contestant.decode`."""
        batch = len(prompts)
        self._open(new + 1, batch)

        def run() -> np.ndarray:
            self._forget()
            token, tokens = prompts[:, 0], []
            for position in range(new):
                logits = self._decode(token, [position] * batch, range(batch), lambda _: True)
                token = logits.argmax(axis=-1)
                tokens.append(token)
            return np.stack(tokens, axis=1)

        return Task(run, lambda y: {"tokens": y})

    def train(self, tokens: np.ndarray) -> Task:
        """See `Contestant.train`."""
        raise NotImplementedError("llama.cpp does not train")

    def _forget(self) -> None:
        """Clears the states of all sequences."""
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)

    def _decode(
        self, tokens: np.ndarray, positions: Sequence[int], rows: Sequence[int], wanted: Wanted
    ) -> np.ndarray:
        batch = self._api.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        outputs = 0
        for i, (token, position, row) in enumerate(zip(tokens, positions, rows, strict=True)):
            batch.token[i] = int(token)
            batch.pos[i] = int(position)
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = int(row)
            batch.logits[i] = wanted(i)
            outputs += bool(wanted(i))
        status = self._api.llama_decode(self._context, batch)
        self._api.llama_batch_free(batch)
        if status != 0:
            raise RuntimeError(f"llama.cpp failed to decode (status {status}).")
        logits = self._api.llama_get_logits(self._context)
        return np.ctypeslib.as_array(logits, (outputs, self._vocab))


def write_gguf(values: dict[str, Any], arrays: dict[str, np.ndarray], path: Path) -> None:
    """Writes a model of Mamba-1 layers to a float32 GGUF file without a vocabulary."""
    gguf = importlib.import_module("gguf")
    writer = gguf.GGUFWriter(path, "mamba")
    writer.add_context_length(1 << 20)
    writer.add_embedding_length(values["hidden_size"])
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_block_count(values["num_hidden_layers"])
    writer.add_ssm_conv_kernel(values["conv_kernel"])
    writer.add_ssm_inner_size(values["intermediate_size"])
    writer.add_ssm_state_size(values["state_size"])
    writer.add_ssm_time_step_rank(values["time_step_rank"])
    writer.add_ssm_dt_b_c_rms(False)
    writer.add_layer_norm_rms_eps(values["layer_norm_epsilon"])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(values["vocab_size"])
    for name, array in arrays.items():
        if name.startswith("lm_head"):
            continue  # It is the embedding.
        if name.endswith("A_log"):
            array = -np.exp(array)
        elif name.endswith("conv1d.weight"):
            array = array[:, 0]
        writer.add_tensor(_name(name), np.ascontiguousarray(array, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _name(name: str) -> str:
    name = name.removeprefix("backbone.")
    if name.startswith("layers."):
        _, layer, rest = name.split(".", 2)
        return f"blk.{layer}.{_LAYER[rest]}"
    return {"embeddings.weight": "token_embd.weight", "norm_f.weight": "output_norm.weight"}[name]


if __name__ == "__main__":
    serve(LlamaCpp, ("llama_cpp_python",))
