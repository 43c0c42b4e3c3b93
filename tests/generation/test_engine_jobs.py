"""Jobs of an engine as other threads see them, and the states kept after them."""

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import pytest

import mamba_eqx as mbx
from mamba_eqx.generation import FinishReason
from tests.support.generation import MODEL, row


pytestmark = pytest.mark.usefixtures("compile_fast")


def run(engine: mbx.Engine) -> None:
    while engine.busy:
        engine.step()


def test_whoever_sees_a_token_sees_its_probabilities():
    """Other threads read jobs while the engine adds tokens to them."""

    class Tokens(list[int]):
        def append(self, token: int) -> None:
            super().append(token)
            assert len(job.log_probs) == len(job.top) == len(self)

    engine = mbx.Engine(MODEL, slots=1, max_len=32)
    job = engine.submit([1, 2], 5, top_log_probs=True)
    job.tokens = Tokens()
    run(engine)
    assert len(job.tokens) == 5


def test_no_state_is_kept_that_has_read_past_a_stop_string(monkeypatch):
    """Here the last token of the stop string gives logits that are not finite."""
    free = row(mbx.generate(MODEL, [1, 2], 6))
    last = next(i for i in range(1, 6) if free[i] not in [1, 2, *free[:i]])
    weight = MODEL.embedding.weight.at[free[last]].set(jnp.nan)
    model = eqx.tree_at(lambda model: model.embedding.weight, MODEL, weight)
    # Blocks are long though compiling takes a while.
    monkeypatch.setattr("mamba_eqx.generation.engine._batch._STEP_SECONDS", 1e9)
    tokenizer = mbx.ByteTokenizer()
    sampling = mbx.Sampling(stop_strings=[tokenizer.decode([free[last]])], tokenizer=tokenizer)
    engine = mbx.Engine(model, slots=1, max_len=32)
    job = engine.submit([1, 2], 9, sampling)
    run(engine)
    assert job.finish == FinishReason.STOP_STRING
    assert engine.prefix_states == 1  # The prompt's.


@pytest.mark.slow
def test_no_prompt_waits_for_a_program_after_warming_up(monkeypatch):
    traced: list[int] = []
    backbone = mbx.LanguageModel.backbone

    def counted(model, tokens, *args, **options):
        traced.append(len(tokens))
        return backbone(model, tokens, *args, **options)

    monkeypatch.setattr(mbx.LanguageModel, "backbone", counted)
    block = mbx.BlockConfig(mbx.Mamba1Config(5, d_inner=7, d_state=3))  # In no other test.
    model = mbx.LanguageModelConfig(11, (block,)).build(key=jr.key(0))
    engine = mbx.Engine(model, slots=1, max_len=100, piece=40)
    engine.warm_up()
    assert traced == [16, 32, 64]
    for size in (1, 2, 17, 18, 41, 90):
        engine.submit([1] * size, 2)
        run(engine)
    assert traced == [16, 32, 64]
