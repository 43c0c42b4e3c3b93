"""Tokenizer files and chat templates. Importing this module needs the package `tokenizers`."""

import tokenizers


SPECIAL = ["<|endoftext|>", "<|user|>", "<|assistant|>"]
TEMPLATE = """{{ bos_token }}{% for m in messages %}
{%- if m['role'] not in ['user', 'assistant'] %}{{ raise_exception('no ' + m['role']) }}{% endif %}
<|{{ m['role'] }}|>
{{ m['content'] | trim }}{{ eos_token if m['role'] == 'assistant' }}
{% endfor %}
{% if add_generation_prompt %}
<|assistant|>
{% endif %}"""

CONFIG = {
    "bos_token": "<|endoftext|>",
    "eos_token": {"content": "<|endoftext|>", "special": True},
    "chat_template": TEMPLATE,
}

CORPUS = ["To be, or not to be, that is the question: é ü 漢字 🙂"] * 3


def byte_level() -> str:
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer.to_str()


def sentencepiece() -> str:
    from tokenizers import decoders, models, pre_tokenizers, processors

    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", *SPECIAL])}
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces += [*"\u2581abcdeTo,", "\u2581b", "be", "\u2581be", "To"]
    vocab |= {piece: len(vocab) + i for i, piece in enumerate(pieces)}
    merges = [("\u2581", "b"), ("b", "e"), ("\u2581b", "e"), ("T", "o")]
    model = models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens(["<unk>", "<s>", *SPECIAL])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocab["<s>"])]
    )
    return tokenizer.to_str()


FILES = {"byte_level": byte_level(), "sentencepiece": sentencepiece()}
CHAT = [
    {"role": "user", "content": "  To be? "},
    {"role": "assistant", "content": "Or not."},
    {"role": "user", "content": "That is é"},
]
