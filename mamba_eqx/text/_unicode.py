"""The check of the texts that tokenizers encode."""


def check_text(text: str) -> str:
    """Returns a text that has an encoding in UTF-8.

    **Raises:** `ValueError` if the text contains a lone surrogate, which no encoding of Unicode can
    represent.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            "A text must consist of Unicode characters, but got the lone surrogate "
            f"U+{ord(text[error.start]):04X} at index {error.start}. Decode the bytes that it came "
            'from with `errors="replace"`.'
        ) from error
    return text
