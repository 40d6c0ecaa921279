"""What is odd about a piece of text, for ``data lint``, and the scripts it is written in, for ``data stats``.

Own rules over Unicode: no model, no download. Languages of one script (English, German) are not told apart.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator

_MOJIBAKE = re.compile(
    "[ÂÃ][\u0080-\u00bf]"  # UTF-8 read as Latin-1
    "|â€[\u0098-\u009d™œ\u02dcžž“”¦]"  # quotation marks of UTF-8 read as Windows-1252
    "|ðŸ|ï»¿|锟斤拷|烫烫烫|�"
)
_INVISIBLE = re.compile("[\u200b\u2060\ufeff\u202a-\u202e\u2066-\u2069]")
_CONTROL = re.compile("[\u0000-\u0008\u000b\u000c\u000e-\u001f\u007f-\u009f]")
_SPECIAL = re.compile(r"<\|(?:im_start|im_end|endoftext|vision_\w+|image_pad|video_pad|box_\w+|object_ref_\w+)\|>")
_MEDIA_MARK = re.compile(r"<(?:image|video|audio)>")

_HAN = "Chinese"
_SCRIPTS = (
    ("LATIN", "Latin script"),
    ("CJK", _HAN),
    ("HIRAGANA", "Japanese"),
    ("KATAKANA", "Japanese"),
    ("HANGUL", "Korean"),
    ("CYRILLIC", "Cyrillic script"),
    ("ARABIC", "Arabic script"),
    ("DEVANAGARI", "Devanagari"),
    ("GREEK", "Greek"),
    ("HEBREW", "Hebrew"),
    ("THAI", "Thai"),
)
_LETTERS_OF_A_WORD = {"Latin script": 5.0, "Cyrillic script": 6.0, "Greek": 5.0, "Korean": 2.0}
_HAN_OF_A_WORD = 1.6
_SHARE = 0.75
_MOST_CHARACTERS = 4000


def oddities(text: str) -> Iterator[tuple[str, str]]:
    """(check, what was found) for each kind of oddity in the text."""
    for check, pattern in (
        ("mojibake", _MOJIBAKE),
        ("control_character", _CONTROL),
        ("invisible_character", _INVISIBLE),
        ("special_token", _SPECIAL),
        ("media_mark", _MEDIA_MARK),
    ):
        if found := pattern.search(text):
            around = text[max(0, found.start() - 20) : found.end() + 20]
            yield check, f"{found[0]!a} at character {found.start()}, in {around!a}"


def language_of(text: str) -> str:
    """The language or script that three quarters of the words are in; ``mixed``, or ``no words`` without letters.

    A Chinese word is taken for 1.6 characters and a Latin one for 5 letters, so that neither side outweighs. Kana make
    the Han characters beside them Japanese. The first 4,000 characters are looked at.
    """
    letters: Counter[str] = Counter(filter(None, map(_script, text[:_MOST_CHARACTERS])))
    if letters["Japanese"] * 10 > letters[_HAN]:
        letters["Japanese"] += letters.pop(_HAN, 0)
    words = {name: count / _LETTERS_OF_A_WORD.get(name, _HAN_OF_A_WORD) for name, count in letters.items() if count}
    if not words:
        return "no words"
    name = max(words, key=words.__getitem__)
    return name if words[name] >= _SHARE * sum(words.values()) else "mixed"


def _script(character: str) -> str | None:
    if not character.isalpha():
        return None
    if character.isascii():
        return "Latin script"
    name = unicodedata.name(character, "")
    return next((script for prefix, script in _SCRIPTS if name.startswith(prefix)), "other script")
