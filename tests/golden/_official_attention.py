"""The case of the official hybrid of Mamba-2 and attention (`mamba2attn`)."""

import importlib
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.golden._loop_hybrid import OFFICIAL, Sizes, loop, random_weight
from tests.golden._official import publish_official
from tests.golden._official_mamba2 import import_official_mamba2
from tests.golden._witness import check_size_of_values, loop_answers


class RotaryEmbedding(torch.nn.Module):
    """A stand-in for `flash_attn.layers.rotary.RotaryEmbedding`, which needs a GPU.

    It rotates queries and keys by the formula of flash-attn's reference (`apply_rotary_emb_torch`).
    """

    def __init__(self, dim, base, interleaved, device=None):
        super().__init__()
        del device
        self.dim, self.base, self.interleaved = dim, base, interleaved

    def forward(self, q, kv, seqlen_offset, max_seqlen):
        assert seqlen_offset == 0
        del max_seqlen
        inverse = 1.0 / self.base ** (torch.arange(0, self.dim, 2, dtype=q.dtype) / self.dim)
        freqs = torch.outer(torch.arange(q.shape[1], dtype=q.dtype), inverse)
        cos, sin = freqs.cos(), freqs.sin()
        if self.interleaved:
            cos, sin = (t.repeat_interleave(2, dim=-1)[:, None] for t in (cos, sin))
        else:
            cos, sin = (t.repeat(1, 2)[:, None] for t in (cos, sin))

        def half(x):
            if self.interleaved:
                return torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
            a, b = x.chunk(2, dim=-1)
            return torch.cat([-b, a], dim=-1)

        def turn(x):
            turned, rest = x[..., : self.dim], x[..., self.dim :]
            return torch.cat([turned * cos + half(turned) * sin, rest], dim=-1)

        k, v = kv.unbind(dim=2)
        return turn(q), torch.stack([turn(k), v], dim=2)


# The width of the MLP is rounded up to 128. Every option of `MHA` differs from its default.
SEED = 30
CONFIG = {
    "d_model": 5,
    "d_intermediate": 100,
    "n_layer": 2,
    "vocab_size": 21,  # 24 rows, the padding included
    "ssm_cfg": {
        "layer": "Mamba2",
        "d_state": 3,
        "d_conv": 4,
        "headdim": 5,
        "chunk_size": 4,
        "use_mem_eff_path": False,
    },
    "attn_layer_idx": [1],
    "attn_cfg": {
        "causal": True,
        "d_conv": 3,
        "head_dim": 6,
        "num_heads": 4,
        "num_heads_kv": 2,
        "out_proj_bias": True,
        "qkv_proj_bias": True,
        "rotary_emb_dim": 4,
        "rotary_emb_base": 50.0,
        "rotary_emb_interleaved": True,
        "softmax_scale": 0.3,
    },
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 8,
    "tie_embeddings": True,
}


def make_hybrid(case: str, out: Path, sdist: Path | None) -> None:
    """Makes the case from the plain loop and the official model."""
    assert sdist is not None
    config, cfg = CONFIG, CONFIG["attn_cfg"]
    d, width, channels = config["d_model"], 128, (4 + 2 * 2) * 6
    mlp = {"norm2.weight": (d,), "mlp.fc1.weight": (2 * width, d), "mlp.fc2.weight": (d, width)}
    mamba = {
        "mixer.dt_bias": (2,),
        "mixer.A_log": (2,),
        "mixer.D": (2,),
        "mixer.in_proj.weight": (2 * 10 + 2 * 3 + 2, d),
        "mixer.conv1d.weight": (10 + 2 * 3, 1, 4),
        "mixer.conv1d.bias": (10 + 2 * 3,),
        "mixer.norm.weight": (10,),
        "mixer.out_proj.weight": (d, 10),
    }
    attention = {
        "mixer.in_proj.weight": (channels, d),
        "mixer.in_proj.bias": (channels,),
        "mixer.conv1d.weight": (channels, 1, cfg["d_conv"]),
        "mixer.conv1d.bias": (channels,),
        "mixer.out_proj.weight": (d, 4 * 6),
        "mixer.out_proj.bias": (d,),
    }
    shapes: dict[str, tuple[int, ...]] = {"backbone.embeddings.weight": (24, d)}
    for i, mixer in enumerate([mamba, attention]):
        layer = {"norm.weight": (d,)} | mixer | mlp
        shapes |= {f"backbone.layers.{i}.{name}": shape for name, shape in layer.items()}
    shapes["backbone.norm_f.weight"] = (d,)

    rng = np.random.default_rng(SEED)
    weights = {name: random_weight(rng, name, shape) for name, shape in shapes.items()}
    tokens = torch.from_numpy(rng.integers(config["vocab_size"], size=12))
    sizes = Sizes(
        names=OFFICIAL,
        kinds="2a",
        eps=1e-5,
        d_inner=10,
        d_state=3,
        heads=(4, 2, 6),
        nheads=2,
        rotary=(4, 50.0, True),
        scale=cfg["softmax_scale"],
    )
    answer = loop_answers(loop, weights, tokens, sizes)
    check_size_of_values(answer)
    _import_official(sdist)
    publish_official(case, config, weights, tokens, answer, out, sdist)


def _import_official(sdist: Path) -> None:
    import_official_mamba2(sdist)
    rotary: Any = types.ModuleType("flash_attn.layers.rotary")
    rotary.RotaryEmbedding = RotaryEmbedding
    modules: dict[str, Any] = sys.modules
    modules["flash_attn"] = types.ModuleType("flash_attn")
    modules["flash_attn.layers"] = types.ModuleType("flash_attn.layers")
    modules["flash_attn.layers.rotary"] = rotary
    modules.pop("mamba_ssm.modules.mha")
    mha: Any = importlib.import_module("mamba_ssm.modules.mha")
    model: Any = importlib.import_module("mamba_ssm.models.mixer_seq_simple")
    model.MHA = mha.MHA
