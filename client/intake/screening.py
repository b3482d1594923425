"""Looking for text in pictures by OCR, where tesseract is installed. It misses much: a help to look, never a proof.

The picture goes to a process of its own through a pipe and the words that come back are counted, not kept.
Out of scope: refusing or blanking (client/intake/deidentify).
"""

import io
import shutil
import subprocess

import numpy as np
from jaxtyping import UInt8
from PIL import Image

SIDE = 1024
"""Pictures are screened at this size."""
SECONDS = 20.0
_CONFIDENCE = 60.0
_LETTERS = 3


def can_screen() -> bool:
    """Return whether tesseract is installed."""
    return shutil.which("tesseract") is not None


def words_in(square: UInt8[np.ndarray, "channels size size"], seconds: float = SECONDS) -> int | None:
    """Count what looks like words in a picture; None where tesseract failed or took too long.

    Guarantees:
        - screening_is_bounded: A picture that takes longer than `seconds` is given up.
    """
    png = io.BytesIO()
    Image.fromarray(square.mean(axis=0).astype(np.uint8)).save(png, "PNG")
    command = ["tesseract", "stdin", "stdout", "--psm", "11", "tsv"]
    try:
        done = subprocess.run(command, input=png.getvalue(), capture_output=True, timeout=seconds, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return sum(map(_is_word, done.stdout.decode("utf-8", "replace").splitlines()[1:]))


def _is_word(line: str) -> bool:
    columns = line.split("\t")
    if len(columns) != 12:
        return False
    text = "".join(letter for letter in columns[11] if letter.isalnum())
    try:
        return len(text) >= _LETTERS and float(columns[10]) >= _CONFIDENCE
    except ValueError:
        return False
