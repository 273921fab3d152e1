"""Shakespeare's plays, a client for each speaking role: guess the next character from those before it.

Roles as clients and 80 characters at a time are those of McMahan et al. 2017 and LEAF (Caldas et al. 2018). Theirs is
all of Shakespeare, with roles told apart by play; this is a shorter text that does not say where a play ends, so that
a name in two plays is one role. LEAF guesses one character after 80, here each place has its label.
"""

import re
from pathlib import Path

import numpy as np

from fedlib.errors import DataError

LENGTH = 80  # characters of a window
# All characters of the file; a character's place is its label.
CHARACTERS = "\n !$&',-.3:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
NO_LABEL = -100  # of a place in a sequence that is padding
NAMES = {"\n": "newline", " ": "space"}
CLASSES = tuple(NAMES.get(character, character) for character in CHARACTERS)

Owned = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""As `sets.Arrays`, then the owners of the training samples int64 [n]"""


def read_shakespeare(folder: Path) -> Owned:
    """Windows of every role: x uint8 [n,1,80,1] characters, y int64 [n,80] the character after each of them.

    Of a role with k windows the last k // 10 are for testing, so that what is tested was said after what is trained on.
    Owners are places in `roles`. Raises DataError as `roles` does.
    """
    cut = [windows(text) for text in roles(folder / "shakespeare" / "tinyshakespeare.txt").values()]
    kept = [len(x) - len(x) // 10 for x, _ in cut]
    in_training = np.concatenate([np.arange(len(x)) < k for (x, _), k in zip(cut, kept, strict=True)])
    x, y = (np.concatenate(parts) for parts in zip(*cut, strict=True))
    x = x[:, None, :, None]
    owners = np.repeat(np.arange(len(kept)), kept)
    return x[in_training], y[in_training], x[~in_training], y[~in_training], owners


def roles(path: Path) -> dict[str, str]:
    """Name and text of each role that says something, in the order of their first words.

    Speeches stand between blank lines: `NAME:` on a line, then what is said. A role's text is all it says, one newline
    between two speeches. A name without words, of which the file has 125, is left out. Raises DataError when a speech
    begins without such a line, or has a character that is not of CHARACTERS.
    """
    mend = "to mend it: python -m fedlib data get shakespeare"
    spoken: dict[str, list[str]] = {}
    text = path.read_bytes().decode(errors="replace")  # takes any bytes: the next line says what is wrong
    if foreign := sorted(set(text) - set(CHARACTERS)):
        raise DataError(f"{path}: has the character {foreign[0]!r}, which is none of the {len(CHARACTERS)}; {mend}")
    for speech in re.split("\n{2,}", text.strip("\n")):
        name, _, words = speech.partition("\n")
        if not name.endswith(":"):
            raise DataError(f"{path}: a speech begins with {name[:40]!r}, expected a name and a colon; {mend}")
        if words:
            spoken.setdefault(name[:-1], []).append(words)
    return {name: "\n".join(speeches) for name, speeches in spoken.items()}


def windows(text: str) -> tuple[np.ndarray, np.ndarray]:
    """Windows x uint8 [k,80] that do not overlap and the character after each place, y int64 [k,80].

    Text of m characters has m - 1 such places, so k = ceil((m - 1) / 80). What the last window lacks is 0 in x, which
    no place before it sees in a causal model, and NO_LABEL in y.
    """
    tokens = np.array([CHARACTERS.index(character) for character in text])
    places = len(tokens) - 1
    k = -(-places // LENGTH)
    x, y = np.zeros(k * LENGTH, np.uint8), np.full(k * LENGTH, NO_LABEL)
    x[:places], y[:places] = tokens[:-1], tokens[1:]
    return x.reshape(k, LENGTH), y.reshape(k, LENGTH)
