"""Measures prefill with random float32 weights in mamba-130m's shape, in tokens per second.

python benchmarks/model.py [--mixer mamba2] [--tokens 512] [--quick] [--no-peers]
"""

from collections.abc import Callable
from functools import partial

import jax
import numpy as np
import scan
import ssd
from _common import (
    Competitors,
    Run,
    arguments,
    compiled,
    medians,
    model_130m,
    print_facts,
    print_table,
    print_verdict,
    random_tokens,
    tiny_model,
)
from _llama import Llama, has_llama
from _peers import available, check_agrees, has, mambapy_model, transformers_model

import mamba_eqx as mbx


ALL, LAST = "all logits", "last logits"
Peer = Callable[[np.ndarray, bool], np.ndarray | None]
"""A function of the tokens, and of whether to compute all logits or the last ones only."""


def last_logits(model: mbx.LanguageModel, tokens: jax.Array) -> jax.Array:
    """Returns the logits after the last token only."""
    return model.logits(model.backbone(tokens)[0][-1])


def op(mixer: object, seq: int) -> Run | None:
    """Returns a call of the scan (or ssd) of a mixer alone, or `None` if the mixer has neither."""
    if isinstance(mixer, mbx.Mamba1):
        return compiled(scan.forward(), *scan.inputs(mixer.d_inner, seq))[0]
    if isinstance(mixer, mbx.Mamba2):
        config = mbx.Mamba2Config.of(mixer)
        return compiled(ssd.forward(), *ssd.inputs(config, seq))[0]
    return None


def torch_peers(model: mbx.LanguageModel, mixer: str) -> dict[str, Peer]:
    """Returns the peers on PyTorch by name."""
    import torch

    peers: dict[str, Peer] = {}
    if has("transformers", mixer):
        transformers = transformers_model(model)

        def run_transformers(tokens: np.ndarray, all_logits: bool) -> np.ndarray:
            with torch.inference_mode():
                out = transformers(
                    torch.from_numpy(tokens[None]),
                    use_cache=False,
                    logits_to_keep=0 if all_logits else 1,
                )
                return out.logits[0].numpy()

        peers["transformers"] = run_transformers
    if has("mambapy", mixer):
        mambapy = mambapy_model(model)

        def run_mambapy(tokens: np.ndarray, all_logits: bool) -> np.ndarray | None:
            with torch.inference_mode():
                return mambapy(torch.from_numpy(tokens[None]))[0].numpy() if all_logits else None

        peers["mamba.py"] = run_mambapy
    return peers


def main() -> None:
    args = arguments(__doc__, mixers=True, tokens=[64, 512, 2048])
    quick, with_peers, mixer = args.quick, not args.no_peers, args.mixer
    print_facts(f"Prefill, {mixer}", quick=quick)
    make = partial(tiny_model if quick else model_130m, mixer)
    lengths = [16, 64] if quick else args.tokens
    unrolled, stacked = make(), make(stacked=True)
    peers = torch_peers(unrolled, mixer) if with_peers and available("torch") else {}
    llama = None
    if with_peers and has_llama() and has("llama_cpp", mixer):
        llama = Llama(unrolled, seq=max(lengths))
    if llama is not None:
        peers["llama.cpp"] = lambda tokens, all_logits: llama.run(tokens, all_logits=all_logits)

    tokens = random_tokens(unrolled, 64)
    logits = unrolled(tokens)
    for name, run in peers.items():
        check_agrees(name, run(np.array(tokens, np.int64), True), logits)

    rows, speed, shares = [], {}, []
    for seq in lengths:
        tokens = random_tokens(unrolled, seq)
        numbers = np.array(tokens, np.int64)
        block = unrolled.layers.unstack()[0]
        assert isinstance(block, mbx.Block)
        alone = op(block.mixer, seq)
        runs: dict[tuple[str, str], Run] = {
            (ALL, "unrolled"): compiled(lambda model, t: model(t), unrolled, tokens)[0],
            (ALL, "stacked"): compiled(lambda model, t: model(t), stacked, tokens)[0],
            (LAST, "unrolled"): compiled(last_logits, unrolled, tokens)[0],
            (LAST, "stacked"): compiled(last_logits, stacked, tokens)[0],
        }
        for name, run in peers.items():
            # mamba.py and transformers are slow, and shorter prompts show the same ratio.
            if name != "mamba.py" or seq <= 512:
                runs[ALL, name] = partial(run, numbers, True)
            if name == "llama.cpp" or (name == "transformers" and seq <= 512):
                runs[LAST, name] = partial(run, numbers, False)
        competitors: Competitors = {" ".join(key): run for key, run in runs.items()}
        ops: Competitors = {} if alone is None else {"alone": alone}
        seconds = medians(ops | competitors, budget=6)
        speed |= {(key, seq): seq / seconds[" ".join(key)] for key in runs}
        if alone is not None:
            in_all = unrolled.layers.n_layer * seconds["alone"]
            for which in (ALL, LAST):
                shares.append((seq, which, in_all / seconds[f"{which} unrolled"]))

    for which in (ALL, LAST):
        for name in ("unrolled", "stacked", *peers):
            speeds = [speed.get(((which, name), seq)) for seq in lengths]
            ratios = [
                None if theirs is None else speed[(which, "unrolled"), seq] / theirs
                for seq, theirs in zip(lengths, speeds, strict=True)
            ]
            rows.append((which, name, *speeds, *ratios))
    print("Tokens per second, and the speed of `Unrolled` divided by each:\n")
    columns = [f"{seq} tokens" for seq in lengths]
    print_table(("", "", *columns, *(f"ratio {seq}" for seq in lengths)), rows)
    if shares:
        print("Time of the scan (or ssd) alone, as a share of the time of `Unrolled`:\n")
        print_table(("seq", "", "share"), shares)

    if quick or mixer != "mamba1":
        return
    for seq in [seq for seq in lengths if seq >= 512]:
        for name, wanted in (("transformers", 3.5), ("llama.cpp", 1.6)):
            theirs = speed.get(((ALL, name), seq))
            ratio = None if theirs is None else speed[(ALL, "unrolled"), seq] / theirs
            print_verdict(f"times the speed of {name}, {seq} tokens, all logits", ratio, wanted)
    for seq, which, share in shares:
        print_verdict(f"share of the scan, {seq} tokens, {which}", share, 1 / 3, at_most=True)


if __name__ == "__main__":
    main()
