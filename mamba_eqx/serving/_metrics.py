"""What the server has done, in the text format of Prometheus."""

from ..generation import Engine


def metrics(engine: Engine, refused: int) -> str:
    """Returns the counters and gauges of an engine.

    **Arguments:**

    - `engine`: the engine.
    - `refused`: the number of requests that came while the server was full.
    """
    counts = engine.counts
    counters = {
        "requests_total": ("Texts asked for.", counts.submitted),
        "requests_ended_total": ("Texts that ended.", counts.ended),
        "requests_refused_total": ("Requests refused by a full server.", refused),
        "prompt_tokens_total": ("Tokens of prompts.", counts.prompt_tokens),
        "prompt_tokens_reused_total": (
            "Tokens of prompts taken from the prefix cache.",
            counts.reused_tokens,
        ),
        "generated_tokens_total": ("Tokens generated.", counts.generated_tokens),
        "prefix_lookups_total": ("Lookups in the prefix cache.", counts.lookups),
        "prefix_hits_total": ("Lookups that found a state.", counts.hits),
        "prefix_saved_seconds_total": ("Time saved by the prefix cache.", counts.saved_seconds),
        "prefill_seconds_total": ("Time spent on prompts.", counts.prefill_seconds),
        "decode_seconds_total": ("Time spent on generated tokens.", counts.decode_seconds),
    }
    gauges = {
        "requests_waiting": ("Texts that wait for a slot.", engine.waiting),
        "requests_prefilling": ("Texts whose prompts are read.", engine.prefilling),
        "requests_decoding": ("Texts that are generated.", engine.decoding),
        "prefix_states": ("States in the prefix cache.", engine.prefix_states),
        "prefix_bytes": ("Size of the states in the prefix cache.", engine.prefix_bytes),
    }
    lines: list[str] = []
    for kind, found in (("counter", counters), ("gauge", gauges)):
        for name, (text, value) in found.items():
            name = f"mamba_eqx_{name}"
            lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}", f"{name} {value}"]
    return "\n".join(lines) + "\n"
