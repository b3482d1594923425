"""What `check` and `import` found, as counts and reasons: as text, JSON and data for a page. For the site's own eyes.

Files are shown by their number in the order of the source, and by name only where that is asked for.
Out of scope: the page itself (client/intake/page).
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, final

from client.intake.cautions import Caution
from client.intake.headers import syntax_name
from client.intake.records import Record, Refusal, Scan
from client.intake.refusals import was_read
from client.intake.selection import Choice

EXAMPLES = 3
MODALITIES = frozenset(
    "CR CT DG DX ECG ES GM IO IVOCT IVUS MG MR NM OCT OP OPT OT PT PX RF SC SM US XA XC".split()  # noqa: SIM905
)
"""Shown by name; anything else is text of a file."""


@final
@dataclass(frozen=True)
class Group:
    """Some files that share a reason or a warning."""

    said: str
    count: int
    examples: tuple[str, ...] = ()


@final
@dataclass(frozen=True)
class Report:
    """The counts.

    Attributes:
        expected: Images, and files that hold none: all that is there, or that an index names.
        read: Of these, whose header or row of an index is whole and names a patient.
        usable: Of these, that are decoded, labelled and allowed: what is trained on.
        patients: Who has usable images.
        images_per_patient: Least, median and most.
        opened: Images of files that were opened this time, which the kinds below are of.
        kinds: Modalities, sizes and transfer syntaxes with their counts.
        blanked: Usable images of which a part was made black.
        refused: Reasons with counts and examples.
        warnings: About patients and pictures.
        cost: What a typical run costs.
    """

    expected: int
    read: int
    usable: int
    patients: int
    images_per_patient: tuple[int, float, int]
    opened: int
    kinds: Mapping[str, Mapping[str, int]]
    blanked: int
    refused: tuple[Group, ...]
    warnings: tuple[Group, ...]
    cost: tuple[str, ...] = field(default=())

    def as_json(self) -> dict[str, Any]:
        """Return it for a JSON file."""
        return asdict(self)

    def lines(self) -> list[str]:
        """Return it as text."""
        least, middle, most = self.images_per_patient
        said = [
            f"expected: {self.expected}; read: {self.read}; usable: {self.usable}",
            f"patients: {self.patients}; images per patient: {least} to {most}, median {middle:g}",
        ]
        part = "" if self.opened >= self.read else f" of {self.opened} images in files that were opened now"
        for name, counts in self.kinds.items() if self.opened else ():
            said.append(
                f"{name}{part}: {', '.join(f'{kind} {count}' for kind, count in counts.items()) or 'not stated'}"
            )
        if self.blanked:
            said.append(f"blanked: {self.blanked} images in part")
        said.append("refused: " + ("" if self.refused else "nothing"))
        said += [f"  {_line(group)}" for group in self.refused]
        said += [f"warning: {_line(group, counted=False)}" for group in self.warnings]
        return [*said, *self.cost]


@final
class Listing:
    """Numbers of files in the order of the source, or their names."""

    def __init__(self, found: Scan, root: Path, show_files: bool) -> None:
        """Number the files of a scan."""
        paths = {item.path for item in (*found.records, *found.refusals)} | set(found.skipped)
        self._numbers = {path: number for number, path in enumerate(sorted(paths), 1)}
        self._root, self._show = root, show_files

    def number(self, path: Path) -> int:
        """Return the number of a file, from 1; 0 where the scan did not name it."""
        return self._numbers.get(path, 0)

    def name(self, path: Path) -> str:
        """Return how a file is shown."""
        return escaped(self._name(path)) if self._show else f"no. {self.number(path)}"

    def _name(self, path: Path) -> str:
        for root in (self._root, self._root.resolve()):
            if path.is_relative_to(root):
                return str(path.relative_to(root))
        return str(path)

    def examples(self, paths: Iterable[Path]) -> tuple[str, ...]:
        """Return how the first few different files are shown."""
        return tuple(self.name(path) for path in list(dict.fromkeys(paths))[:EXAMPLES])


def make_report(
    found: Scan,
    choice: Choice,
    lost: Sequence[Refusal],
    patients: Sequence[int],
    refused: Mapping[str, int],
    warnings: Sequence[Caution],
    listing: Listing,
    cost: Sequence[str] = (),
) -> Report:
    """Count.

    Args:
        found: The scan.
        choice: What was made of it.
        lost: What decoding refused.
        patients: Usable images of each patient.
        refused: All refusals by reason, those of files that were not opened included.
        warnings: To be shown.
        listing: How files are shown.
        cost: Lines about a run.

    Guarantees:
        - adds_up: `expected` is `usable` and all refused together.
        - no_identifier: Without `show_files` no name of a file and no value of a header but modality, size and
          registered transfer syntax is in it.
    """
    usable, gone = sum(patients), sum(refused.values())
    unread = sum(count for reason, count in refused.items() if not was_read(reason))
    by_reason: dict[str, list[Path]] = {}
    for refusal in (*choice.refusals, *lost):
        by_reason.setdefault(refusal.reason, []).append(refusal.path)
    groups = [
        Group(reason, count, listing.examples(by_reason.get(reason, ())))
        for reason, count in sorted(refused.items(), key=lambda item: (-item[1], item[0]))
    ]
    each = sorted(patients) or [0]
    return Report(
        usable + gone,
        usable + gone - unread,
        usable,
        len(patients),
        (each[0], float(median(each)), each[-1]),
        len(found.records),
        kinds_of(found.records),
        sum(bool(record.blank) for record in choice.records),
        tuple(groups),
        tuple(Group(one.said, len(one.files), listing.examples(one.files)) for one in warnings),
        tuple(cost),
    )


def kinds_of(records: Iterable[Record]) -> Mapping[str, Mapping[str, int]]:
    """Count modalities, sizes and transfer syntaxes; text that no standard lists is not shown."""
    counts = {name: Counter[str]() for name in ("modalities", "sizes", "syntaxes")}
    for record in records:
        header = record.header
        if modality := header.get("Modality"):
            counts["modalities"][modality if modality in MODALITIES else "other"] += 1
        if header.get("Rows", "").isdigit() and header.get("Columns", "").isdigit():
            counts["sizes"][f"{header['Columns']} x {header['Rows']}"] += 1
        if syntax := header.get("TransferSyntaxUID"):
            counts["syntaxes"][syntax_name(syntax)] += 1
    return {name: dict(counter.most_common(12)) for name, counter in counts.items()}


def escaped(name: str) -> str:
    r"""Return a name whose every letter can be written and shown: it may be no UTF-8, or command a terminal.

    >>> print(escaped("a\x1b[2Jb"))
    a\x1b[2Jb
    """
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in name)


def _line(group: Group, counted: bool = True) -> str:
    examples = f" (as {', '.join(group.examples)})" if group.examples else ""
    return f"{group.count} {group.said}{examples}" if counted else f"{group.said}{examples}"
