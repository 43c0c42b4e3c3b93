"""Tokenizers of all kinds at random. Importing this module needs the package `tokenizers`."""

from typing import NamedTuple

import tokenizers
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors


# Special tokens that overlap, contain each other or have a single letter.
SPECIAL = ["<|a|>", "|a", "<|", "|>", "</s>", "<s>", "x", "ab", "<|im_end|>", "é", " s", "\n"]
LETTERS = "ab<|>/s xzé_imend▁\n"
# Pieces of several scripts, with characters of several bytes and combining marks.
SCRIPTS = [
    "Ada",
    " is",
    "ก",
    "ำลัง",
    "こ",
    "んに",
    "漢字",
    "🙂",
    "👩‍👩‍👧",
    "e\u0301",
    "\u0301",
    "ü",
    ".",
    "'s",
    "  ",
]
_WORDS = ["ab", "b</", "s>", "im", "_end", "bab", "zz", "</s>x", "▁a", "▁", "▁im", "a|", "|a|"]
UNKNOWN = "<unk>"


class RandomTokenizer(NamedTuple):
    """A tokenizer, and what was chosen."""

    file: str
    config: dict[str, object]
    special: list[str]
    in_vocabulary: bool  # whether the model's vocabulary has any of the special tokens


def _model(kind: str, draw: st.DrawFn, words: list[str]) -> models.Model:
    vocab = list(dict.fromkeys([UNKNOWN, *words, *LETTERS]))
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    if kind == "byte_level":
        vocab = sorted(pre_tokenizers.ByteLevel.alphabet()) + [w for w in words if len(w) > 1]
        vocab = list(dict.fromkeys([*vocab, UNKNOWN]))
    if kind == "word_level":
        return models.WordLevel({word: i for i, word in enumerate(vocab)}, unk_token=UNKNOWN)
    if kind == "word_piece":
        vocab += [f"##{word}" for word in vocab if draw(st.booleans()) or len(word) == 1]
        vocab = list(dict.fromkeys(vocab))
        return models.WordPiece({word: i for i, word in enumerate(vocab)}, unk_token=UNKNOWN)
    fallback = kind != "byte_level" and draw(st.booleans())
    vocab += byte_tokens * fallback
    if kind == "unigram":
        scores = [(word, -float(draw(st.integers(1, 9)))) for word in vocab]
        return models.Unigram(scores, unk_id=0, byte_fallback=fallback)
    merges: list[tuple[str, str]] = []
    numbers = {word: i for i, word in enumerate(vocab)}
    for word in draw(st.permutations([word for word in vocab if len(word) > 1])):
        cut = draw(st.integers(1, len(word) - 1))
        if word[:cut] in numbers and word[cut:] in numbers:
            merges.append((word[:cut], word[cut:]))
    return models.BPE(
        numbers,
        merges,
        unk_token=draw(st.sampled_from([None, UNKNOWN])),
        byte_fallback=fallback,
        fuse_unk=draw(st.booleans()),
        ignore_merges=draw(st.booleans()),
    )


_SENTENCEPIECE = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
DECODERS = {
    "byte_level": decoders.ByteLevel(),
    "llama": decoders.Sequence([*_SENTENCEPIECE, decoders.Strip(" ", 1, 0)]),
    "gemma": decoders.Sequence(_SENTENCEPIECE),
    "metaspace": decoders.Metaspace(),
    "metaspace_never": decoders.Metaspace(prepend_scheme="never"),
    "word_piece": decoders.WordPiece(),
    "bpe": decoders.BPEDecoder("</w>"),
    "fuse": decoders.Fuse(),
    "none": None,
}
_NORMALIZERS = {
    "none": None,
    "lowercase": normalizers.Lowercase(),
    "nfkc": normalizers.NFKC(),
    "llama": normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
    "bert": normalizers.BertNormalizer(),
    "strip_accents": normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]),
}
_PRE_TOKENIZERS = {
    "none": None,
    "metaspace": pre_tokenizers.Metaspace(),
    "metaspace_first": pre_tokenizers.Metaspace(prepend_scheme="first"),
    "metaspace_whole": pre_tokenizers.Metaspace(prepend_scheme="first", split=False),
    "whitespace": pre_tokenizers.Whitespace(),
    "whitespace_split": pre_tokenizers.WhitespaceSplit(),
    "punctuation": pre_tokenizers.Punctuation(),
}


@st.composite
def random_tokenizers(draw: st.DrawFn) -> RandomTokenizer:
    """Draws a tokenizer of one of the four kinds of models."""
    special = draw(st.lists(st.sampled_from(SPECIAL), min_size=1, max_size=5, unique=True))
    in_vocabulary = draw(st.booleans())
    words = draw(st.lists(st.sampled_from(_WORDS), unique=True))
    words = [word for word in words if word not in special]
    if in_vocabulary:
        words += draw(st.permutations(special))
    kind = draw(st.sampled_from(["bpe", "byte_level", "unigram", "word_piece", "word_level"]))
    model = _model(kind, draw, words)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = _NORMALIZERS[draw(st.sampled_from(sorted(_NORMALIZERS)))]
    tokenizer.pre_tokenizer = _PRE_TOKENIZERS[draw(st.sampled_from(sorted(_PRE_TOKENIZERS)))]
    tokenizer.decoder = DECODERS[draw(st.sampled_from(sorted(DECODERS)))]
    if kind == "byte_level":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=draw(st.booleans()))
        tokenizer.decoder = decoders.ByteLevel()
    flag = st.sampled_from([False, False, False, True])
    added = [
        AddedToken(
            content,
            special=True,
            normalized=draw(flag),
            lstrip=draw(flag),
            rstrip=draw(flag),
            single_word=draw(flag),
        )
        for content in special
    ]
    declared = draw(st.integers(0, 1))  # the last token may stand in the config only
    tokenizer.add_tokens(added[: len(added) - declared])
    if draw(st.booleans()):
        tokenizer.add_tokens(draw(st.lists(st.sampled_from(["zz", "  "]), unique=True)))
    first = tokenizer.token_to_id(special[0])
    if draw(st.booleans()) and first is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[special[0], "$A", special[0]], special_tokens=[(special[0], first)]
        )
    if draw(st.booleans()):
        tokenizer.enable_truncation(draw(st.integers(3, 5)))
        tokenizer.enable_padding(length=draw(st.integers(1, 9)), pad_token=special[0])
    config: dict[str, object] = {"eos_token": special[-1]}
    vocabulary = tokenizer.get_vocab(with_added_tokens=False)
    return RandomTokenizer(
        tokenizer.to_str(), config, special, any(content in vocabulary for content in special)
    )


def texts(special: list[str]) -> st.SearchStrategy[str]:
    """Returns texts with and without special tokens spelled out in them."""
    parts = st.sampled_from([*LETTERS, *_WORDS, *SCRIPTS, *special])
    return st.lists(parts, max_size=12).map("".join)
