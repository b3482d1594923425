"""Fingerprints of public keys as words, which two people compare by phone. Out of scope: what a key signs."""

import hashlib
import sys
from typing import Literal

import typer

from common.crypto import VerifyKey
from common.errors import EnrolmentError

Holder = Literal["site", "coordinator"]

NUMBER_OF_WORDS = 8
"""64 bits: another key with the same words costs 2^64 key pairs, for one victim."""

_DOMAIN = b"fedmedgan fingerprint v1 "

_TEXT = """
acorn actor agent alarm album alpha anchor apple april armor arrow artist aspen atlas autumn avenue bacon badge
baker balcony bamboo banana barrel basket beetle bicycle birch bishop blanket blossom bonus bottle bread bridge
bronze brush bubble bucket budget buffalo bullet butter cabin cactus camel candle captain carpet castle cement
cherry cinema circle clock coffee comet coral cotton cradle cricket crystal curtain cycle dagger delta dentist
desert diamond dinner doctor dolphin donkey earth echo eclipse ember empire epic evening fabric falcon family farmer
father feather fence fiddle finger flute forest fossil frame fuel galaxy garden gazelle geyser giant ginger glacier
globe gold gorilla grape guitar gulf hammer harbor hazel helmet herring hockey honey hunter igloo insect iron island
ivory jacket jaguar jasmine jewel jockey journal judge jungle kayak kernel kettle kitchen kiwi koala ladder lagoon
lantern laser lemon library lizard lobster locket lotus lumber lunch lynx magnet marble meadow melon mentor metal
mirror monkey mosaic museum napkin needle nickel north nurse oasis ocean octopus office olive omega onion opera
orange orbit orchid otter oven oxygen oyster paddle palace parrot pastry peach pelican pencil piano picnic pigeon
pilot pirate planet pocket poster potato pumpkin puzzle pyramid rabbit radio river rocket rubber saddle salmon
saturn scarf school shadow shelf silver sister slipper soccer sofa song spoon square stone sugar summer symbol table
tailor temple tennis thunder tiger timber tomato torch train tulip tunnel turtle valley vanilla velvet village
violin visitor volcano voyage waffle wagon walnut water weasel willow window wizard yellow zebra zipper
pepper panda smoke wolf tower
"""

WORDS = tuple(_TEXT.split())
"""256 words, told apart by their first three letters."""


def words_of(key: VerifyKey, holder: Holder) -> str:
    """Return the fingerprint of a public key: eight words.

    Args:
        key: The identity of a site or of the coordinator; it signs everything else that the two exchange, so that to
            compare its words is enough.
        holder: Whose key it is said to be.

    Guarantees:
        - told_apart: No two words begin with the same three letters, and keys that differ have other words.

    >>> words_of(VerifyKey(bytes(32)), "site").count(" ")
    7
    """
    digest = hashlib.sha256(_DOMAIN + holder.encode() + b":" + key.to_bytes()).digest()
    return " ".join(WORDS[byte] for byte in digest[:NUMBER_OF_WORDS])


def require_words(key: VerifyKey, holder: Holder, given: str | None) -> None:
    """Let a person confirm the words of a key, or compare them with those that were typed.

    Args:
        key: The key that came with a file.
        holder: Whose key it is said to be; this person reads the words by phone.
        given: What was typed, or None to show the words and ask.

    Raises:
        EnrolmentError: They differ or are mistyped, or there is neither a terminal to ask on nor anything typed.
    """
    expected = words_of(key, holder)
    if given is None:
        if not sys.stdin.isatty():
            raise EnrolmentError(
                f"Nobody is here to ask. Let the {holder} read its words by phone, then type them: --words "
                f'"WORD ... WORD", {NUMBER_OF_WORDS} of them.'
            )
        print(f"words of the {holder} in this file: {expected}")
        if typer.confirm(f"Call the {holder} on a number that you knew before. Are these the words read to you?"):
            return
    else:
        typed = given.lower().replace(",", " ").split()
        if typed == expected.split():
            return
        _require_form(typed)
    raise EnrolmentError(
        f"The words are not those of the {holder} in this file: somebody may have exchanged the file on its way. "
        f"Nothing was changed here. Ask the {holder} for the file again, by another way."
    )


def _require_form(typed: list[str]) -> None:
    """Tell a slip of the pen from another key."""
    unknown = ", ".join(repr(word[:20]) for word in typed if word not in WORDS)
    if len(typed) != NUMBER_OF_WORDS or unknown:
        said = f"; not among the words that there are: {unknown}" if unknown else ""
        raise EnrolmentError(
            f"Expected {NUMBER_OF_WORDS} words, got {len(typed)}{said}. Type them again as they were read; nothing was "
            "changed here."
        )
