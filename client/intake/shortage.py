"""What an import or a check says where there are fewer patients than there have to be. Out of scope: counting them."""

from collections.abc import Mapping

from client.intake.refusals import describe, for_want_of_an_extra, remedies
from common.errors import IntakeError, MissingExtra, TooFewPatients

STAYS = (
    "The images imported before stay in use as they were, those of patients who are gone too: if they were taken out "
    "on purpose, delete the folder of the vault (vault-* in the home)."
)


def too_few(
    patients: int,
    least: int,
    refused: Mapping[str, int],
    others: str = "",
    *,
    kept: bool = False,
    there: bool = False,
) -> IntakeError | TooFewPatients | MissingExtra:
    """Return the error for a source with fewer usable patients than there have to be, perhaps none.

    Args:
        patients: How many are usable.
        least: How many there have to be.
        refused: Images that are not used, by reason.
        others: What `other_labels` says.
        kept: Whether what was decoded is kept for the next import.
        there: Whether the vault holds images of an import before.
    """
    stays = STAYS if there else ""
    if patients:
        said = (
            f"Expected at least min_patients={least} usable patients at this site, found {patients} "
            f"({describe(refused) or 'no image was refused'}). Add patients, or lower privacy.min_patients and the "
            "policy's min_patients."
        )
        return TooFewPatients(_joined(said, "What was read is kept for then." if kept else "", others, stays))
    said = describe(refused) or "there is none"
    advice = "; ".join(remedies(refused)) or others or "Mend these and run again"
    missing = MissingExtra if any(map(for_want_of_an_extra, refused)) else IntakeError
    return missing(_joined(f"No image could be used ({said}). {advice.rstrip('.')}.", stays))


def _joined(*sentences: str) -> str:
    return " ".join(sentence for sentence in sentences if sentence)
