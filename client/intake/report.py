"""What `check` and `import` found, as counts and reasons: as text, JSON and data for a page. For the site's own eyes.

Files are shown by their number in the order of the source, and by name only where that is asked for.
Out of scope: the page itself (client/intake/page).
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, final

from client.intake.cautions import Caution
from client.intake.cost import Cost
from client.intake.headers import syntax_name
from client.intake.records import Record, Refusal, Scan
from client.intake.refusals import remedies, was_read
from client.intake.requests import is_npz
from client.intake.selection import Choice
from common.wording import counted

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
        read: Of these, whose header or row of an index is whole and names a patient; whatever the labels, and whatever
            decoding finds.
        usable: Of these, that are allowed, labelled and decoded: what is trained on.
        patients: Who has usable images.
        images_per_patient: Least, median and most.
        classes: Usable images of each class; None where the labels are values of headers and no class was named.
        opened: Images of files that were opened this time, which kinds, blanked, examples and warnings are of.
        unopened: Files that were known and not opened: of their images only counts are known.
        kinds: Modalities, sizes and transfer syntaxes with their counts.
        blanked: Usable images of which a part was made black.
        refused: Reasons with counts and examples.
        remedies: What makes images readable for which there is no decoder.
        warnings: About patients and pictures.
        source: What the source was taken for.
        cost: What a typical run costs; None with too few patients, or where nobody asked.
        min_patients: Fewer patients take no part, by the site's policy.
    """

    expected: int
    read: int
    usable: int
    patients: int
    images_per_patient: tuple[int, float, int]
    classes: Mapping[str, int] | None
    opened: int
    unopened: int
    kinds: Mapping[str, Mapping[str, int]]
    blanked: int
    refused: tuple[Group, ...]
    remedies: tuple[str, ...]
    warnings: tuple[Group, ...]
    source: str = ""
    cost: Cost | None = None
    min_patients: int | None = None

    def as_json(self) -> dict[str, Any]:
        """Return it for a JSON file."""
        return asdict(self)

    def lines(self) -> list[str]:
        """Return it as text."""
        least, middle, most = self.images_per_patient
        said = [
            f"source: {self.source}",
            f"expected: {self.expected}; read: {self.read}; usable: {self.usable}",
            f"patients: {self.patients}; images per patient: {least} to {most}, median {middle:g}",
        ]
        if self.unopened:
            said.append(
                "below, kinds, parts made black, examples and other warnings are of the files that were opened now "
                "alone: `check` shows them of all"
            )
        if self.classes:
            said.append(f"by class: {named_counts(self.classes)}")
        for name, counts in self.kinds.items() if self.opened else ():
            said.append(f"{name}: {named_counts(counts)}")
        if self.blanked:
            said.append(f"blanked: {counted(self.blanked, 'image')} in part")
        said.append("refused: " + ("" if self.refused else "nothing"))
        said += [f"  {_line(group)}" for group in self.refused]
        said += [f"for want of a decoder: {line}" for line in self.remedies]
        said += [f"warning: {_line(group, with_count=False)}" for group in self.warnings]
        return [*said, *self.cost_lines()]

    def cost_lines(self) -> list[str]:
        """Return what a typical run costs, as text; empty where that was not asked for."""
        if self.cost is None:
            return [] if self.min_patients is None else ["cost of a run: too few patients for one"]
        return self.cost.lines()


@final
class Listing:
    """Numbers of files in the order of the source, or their names; within a file, of what stands in it.

    Frames and members count from 1, rows of an NPZ from 0, as NumPy does, and lines of an index as an editor does.

    Guarantees:
        - told_apart: Two images of one file, archive, NPZ or index are not shown alike.
    """

    def __init__(self, found: Scan, root: Path, show_files: bool) -> None:
        """Number the files of a scan."""
        items = (*found.records, *found.refusals)
        paths = {item.path for item in items} | set(found.skipped)
        self._numbers = {path: number for number, path in enumerate(sorted(paths), 1)}
        members = dict.fromkeys((item.path, item.member) for item in items if item.member is not None)
        self._members: dict[tuple[Path, str | None], int] = {}
        of_path = Counter[Path]()
        for path, member in members:
            of_path[path] += 1
            self._members[path, member] = of_path[path]
        self._root, self._show = root, show_files

    def name(self, item: Record | Refusal | Path) -> str:
        """Return how a file, or an image in it, is shown."""
        path = item if isinstance(item, Path) else item.path
        said = escaped(self._path(path)) if self._show else f"no. {self._numbers.get(path, 0)}"
        if isinstance(item, Path):
            return said
        if is_npz(path) and item.frame is not None:
            return f"row {item.frame}"
        if item.line:
            said = f"{said} line {item.line}" if self._show and said != "." else f"line {item.line}"
        if item.member is not None:
            member = escaped(item.member) if self._show else f"member {self._members.get((path, item.member), 0)}"
            said += f" {member}"
        return said if item.frame is None else f"{said} frame {item.frame + 1}"

    def examples(self, items: Iterable[Record | Refusal | Path]) -> tuple[str, ...]:
        """Return how the first few that are shown differently are shown."""
        named: dict[str, None] = {}
        for item in items:
            named[self.name(item)] = None
            if len(named) == EXAMPLES:
                break
        return tuple(named)

    def _path(self, path: Path) -> str:
        for root in (self._root, self._root.resolve()):
            if path.is_relative_to(root):
                return str(path.relative_to(root))
        return str(path)


def make_report(
    found: Scan,
    choice: Choice,
    lost: Sequence[Refusal],
    patients: Sequence[int],
    classes: Mapping[str, int] | None,
    refused: Mapping[str, int],
    warnings: Sequence[Caution],
    listing: Listing,
) -> Report:
    """Count.

    Args:
        found: The scan.
        choice: What was made of it.
        lost: What decoding refused.
        patients: Usable images of each patient.
        classes: Usable images of each class, where they may be named.
        refused: All refusals by reason, those of files that were not opened included.
        warnings: To be shown.
        listing: How files are shown.

    Guarantees:
        - adds_up: `expected` is `usable` and all refused together.
        - no_identifier: Without `show_files` no name of a file and no value of a header but modality, size,
          registered transfer syntax and the classes that the caller gives is in it.
    """
    usable, gone = sum(patients), sum(refused.values())
    unread = sum(count for reason, count in refused.items() if not was_read(reason))
    by_reason: dict[str, list[Refusal]] = {}
    for refusal in (*choice.refusals, *lost):
        by_reason.setdefault(refusal.reason, []).append(refusal)
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
        classes,
        len(found.records),
        len(found.skipped),
        kinds_of(found.records),
        sum(bool(record.blank) for record in choice.records),
        tuple(groups),
        tuple(remedies(refused)),
        tuple(Group(one.said, len(one.files), listing.examples(one.files)) for one in warnings),
        found.kind,
    )


def kinds_of(records: Iterable[Record]) -> Mapping[str, Mapping[str, int]]:
    """Count modalities, sizes and transfer syntaxes; text that no standard lists is not shown."""
    counts = {name: Counter[str]() for name in ("modalities", "sizes", "syntaxes")}
    for record in records:
        if modality := record.header.get("Modality"):
            counts["modalities"][modality if modality in MODALITIES else "other"] += 1
        if size := record.stated_size:
            counts["sizes"][f"{size[0]} x {size[1]}"] += 1
        if syntax := record.header.get("TransferSyntaxUID"):
            counts["syntaxes"][syntax_name(syntax)] += 1
    return {name: dict(counter.most_common(12)) for name, counter in counts.items() if counter}


def named_counts(counts: Mapping[str, int]) -> str:
    """Return counts with their names, which may be text of a file, as one phrase.

    >>> named_counts({"CT": 2, "MR": 1})
    'CT 2, MR 1'
    """
    return ", ".join(f"{escaped(name)} {count}" for name, count in counts.items())


def escaped(name: str) -> str:
    r"""Return a name whose every letter can be written and shown: it may be no UTF-8, or command a terminal.

    >>> print(escaped("a\x1b[2Jb"))
    a\x1b[2Jb
    """
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in name)


def _line(group: Group, with_count: bool = True) -> str:
    examples = f" (as {', '.join(group.examples)})" if group.examples else ""
    return f"{group.count} {group.said}{examples}" if with_count else f"{group.said}{examples}"
