"""Texts end where transformers ends them, before and after we save or convert a checkpoint."""

import numpy as np
import pytest

import mamba_eqx as mbx
from mamba_eqx import _cli
from tests.support.checkpoints import edit_config
from tests.support.parity import load_theirs, their_model
from tests.support.parity_models import THEIRS


pytestmark = [pytest.mark.parity, pytest.mark.slow, pytest.mark.usefixtures("compile_fast")]

NAMES = {
    "mamba": ("odd", "MambaForCausalLM"),
    "falcon_mamba": ("published", "FalconMambaForCausalLM"),
    "mamba2": ("tied", "Mamba2ForCausalLM"),
    "bamba": ("bamba", "BambaForCausalLM"),
    "jamba": ("jamba", "JambaForCausalLM"),
}
# Without the tokens that pad texts, which transformers leaves out of prompts.
PROMPT, COUNT = [3, 11, 4, 11, 5], 12


def their_tokens(torch, model):
    out = model.generate(torch.tensor([PROMPT]), max_new_tokens=COUNT, do_sample=False)
    return out[0, len(PROMPT) :].tolist()


def our_tokens(folder):
    tokenizer = mbx.load_tokenizer(folder)
    sampling = mbx.Sampling(stop_tokens=tokenizer.stop_tokens)
    found = mbx.generate(mbx.from_pretrained(folder), PROMPT, COUNT, sampling)
    return np.asarray(found.tokens)[: int(found.length)].tolist()


@pytest.mark.parametrize("by_config", [False, True])
@pytest.mark.parametrize("model_type", NAMES)
def test_ends_where_transformers_does(model_type, by_config, torch, tmp_path, as_users_run):
    name, architecture = NAMES[model_type]
    there = tmp_path / "theirs"
    theirs = their_model(torch, THEIRS[model_type][name], model_type)
    theirs.generation_config.eos_token_id = theirs.generation_config.pad_token_id = None
    theirs.save_pretrained(there)
    every = their_tokens(torch, load_theirs(there, architecture))
    # The third token that is new ends the text, and one that does not occur.
    third = list(dict.fromkeys(every))[2]
    absent = next(i for i in range(30) if i not in (*every, *PROMPT))
    eos = [absent, third]
    if by_config:
        (there / "generation_config.json").unlink()
        edit_config(there, {"eos_token_id": eos})
    else:
        edit_config(there, {"eos_token_id": eos}, "generation_config.json")
        edit_config(there, {"eos_token_id": absent})
    (there / "tokenizer_config.json").write_text('{"tokenizer_class": "ByteTokenizer"}')
    want = their_tokens(torch, load_theirs(there, architecture))
    assert want == every[: every.index(third) + 1]
    assert our_tokens(there) == want

    tokenizer = mbx.load_tokenizer(there)
    mbx.save_pretrained(mbx.from_pretrained(there), tmp_path / "saved", tokenizer=tokenizer)
    for arguments in ([there, tmp_path / "converted"], [there, there, "--overwrite"]):
        assert _cli.main(["convert", *map(str, arguments)]) == 0
    for folder in (tmp_path / "saved", tmp_path / "converted", there):
        again = load_theirs(folder, architecture)
        assert again.generation_config.eos_token_id == eos
        assert their_tokens(torch, again) == want
        assert our_tokens(folder) == want
