"""The report of `check` as a page, and a contact sheet: images of patients, for this machine and its owner alone.

One file, no script, nothing from elsewhere. Out of scope: what is counted (client/intake/report).
"""

import base64
import io
import os
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from PIL import Image, ImageDraw, ImageFont

from client.intake.pixels import Square
from client.intake.report import Report, escaped
from client.intake.survey import SIZE, Row
from common.errors import StorageError
from common.files import make_folder, write_atomic

COLUMNS = 8
PAGE, SHEET = "report.html", "contact-sheet.png"
_GAP, _LABEL, _TITLE = 8, 18, 34

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Check of the images</title>
<meta name="viewport" content="width=device-width"><meta name="color-scheme" content="light">
<style>
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; color: #1a1a1a }
h1 { font-size: 1.5rem; margin: 0 } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem }
.secret { background: #fff4d6; border-left: 4px solid #d99a00; padding: .5rem .8rem }
.numbers { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .8rem; margin-top: 1rem }
.numbers div { border: 1px solid #ddd; border-radius: 6px; padding: .6rem .8rem }
.numbers b { display: block; font-size: 1.5rem }
table { border-collapse: collapse; width: 100% } tr { border-bottom: 1px solid #e5e5e5 }
td, th { text-align: left; padding: .3rem .8rem .3rem 0; vertical-align: top }
td.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; width: 3rem }
td.f, .muted { color: #666 } td.f { width: 30% } h3 { font-size: 1rem; margin: 1.2rem 0 .5rem }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(128px, 1fr)); gap: .8rem }
figure { margin: 0 } figcaption { color: #555; font-size: .8rem; overflow-wrap: anywhere }
img { width: 100%; max-width: 256px; border: 1px solid #999 }
</style></head><body>
<h1>Check of the images</h1>
<p class="muted">{{ r.source }}{% if path %}: {{ path }}{% endif %}; {{ moment }}</p>
<p class="secret">Exact counts and images of patients: for this site's eyes alone. Delete the folder when you have
looked.</p>
<div class="numbers">
<div>expected<b>{{ r.expected }}</b></div><div>read<b>{{ r.read }}</b></div><div>usable<b>{{ r.usable }}</b></div>
<div>patients<b>{{ r.patients }}</b></div>
<div>images per patient<b>{{ r.images_per_patient[0] }} to {{ r.images_per_patient[2] }}</b>
<span class="muted">median {{ "%g" % r.images_per_patient[1] }}</span></div>
{% if r.blanked %}<div>blanked in part<b>{{ r.blanked }}</b></div>{% endif %}
</div>
{% if not r.usable %}
<p class="secret">No usable image. What is not used, and why, stands below.</p>
{% elif r.min_patients and r.patients < r.min_patients %}
<p class="secret">Too few patients: {{ r.patients }} usable, the policy's min_patients is {{ r.min_patients }}. With
fewer this site takes no part.</p>
{% endif %}
<h2>Classes</h2>
{% if r.classes %}<table>{% for name, count in r.classes.items() %}
<tr><td class="n">{{ count }}</td><td>{{ name }}</td></tr>
{% endfor %}</table>{% elif r.classes is none %}<p>The labels are values of headers: the terminal alone shows them, and
this page with --classes.</p>{% else %}<p>No image is usable.</p>{% endif %}
<h2>Not used</h2>
{% if r.refused %}<table><tr><th></th><th>reason</th><th>for example</th></tr>
{% for g in r.refused %}
<tr><td class="n">{{ g.count }}</td><td>{{ g.said }}</td><td class="f">{{ g.examples | join(", ") }}</td></tr>
{% endfor %}
</table>{% else %}<p>Everything is used.</p>{% endif %}
{% for line in r.remedies %}<p>For want of a decoder: {{ line }}</p>{% endfor %}
<h2>Patients and pictures</h2>
<table>{% for g in r.warnings %}
<tr><td>{{ g.said }}</td><td class="f">{{ g.examples | join(", ") }}</td></tr>
{% endfor %}</table>
<h2>What a typical run costs</h2>
{% for line in r.cost_lines() %}<p>{{ line }}</p>{% endfor %}
<h2>Kinds</h2>
<table>{% for name, counts in r.kinds.items() %}
<tr><td>{{ name }}</td><td>{% for kind, count in counts.items() %}
{{ kind }} <span class="muted">{{ count }}</span>{{ "; " if not loop.last }}
{% endfor %}</td></tr>
{% endfor %}</table>
<h2>Contact sheet</h2>
<p class="muted">Look for names, dates and numbers in the pixels. Below the pictures: numbers of files in the order of
their paths, lines of an index, members of an archive and frames from 1, rows of an NPZ from 0. --show-files names
them.</p>
{% for title, pictures in rows %}<h3>{{ title }}</h3><div class="pictures">
{% for name, png in pictures %}<figure><img alt="" src="data:image/png;base64,{{ png }}"><figcaption>{{ name }}
</figcaption></figure>
{% endfor %}</div>
{% else %}<p>No image could be decoded.</p>{% endfor %}
</body></html>
"""


def make_page_folder(folder: Path) -> None:
    """Make the folder of the page, before hours of reading; one that is there is left as it is.

    Raises:
        StorageError: It cannot be made, or a folder stands where a file of it shall.
    """
    made = not os.path.isdir(folder)  # noqa: PTH112 - False also where nobody may look
    make_folder(folder, 0o700)
    if made:
        folder.chmod(0o700)  # whatever the umask leaves of it
    for name in (PAGE, SHEET):
        if os.path.isdir(folder / name) and not os.path.islink(folder / name):  # noqa: PTH112, PTH114 - as above
            raise StorageError(f"{folder / name} is a folder, where a file shall stand. Choose another folder.")


def save_page(folder: Path, report: Report, rows: Sequence[Row], path: str = "") -> list[Path]:
    """Write `report.html` and, of what could be decoded, `contact-sheet.png`, for their owner alone.

    Args:
        folder: Where; made if it is not there.
        report: What the page says.
        rows: Pictures.
        path: Of the source, where it may be shown.

    Raises:
        StorageError: They cannot be written.

    Guarantees:
        - owner_alone: The files have mode 0600, and a folder that was not there before has 0700.
        - self_contained: The page asks for nothing from elsewhere.
        - no_older_sheet: What an earlier check drew is not left beside a page that it does not belong to.
    """
    make_page_folder(folder)
    png = contact_sheet(rows) if rows else b""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    shown = [(row.title, [(name, _embedded(square)) for name, square in row.pictures]) for row in rows]
    text = environment.from_string(_PAGE).render(
        r=report, rows=shown, path=escaped(path), moment=f"{datetime.now().astimezone():%Y-%m-%d %H:%M %Z}"
    )
    files = {PAGE: text.encode(errors="backslashreplace")} | ({SHEET: png} if png else {})
    if not png:
        _remove(folder / SHEET)
    for name, content in files.items():
        write_atomic(folder / name, content, 0o600)
    return [folder / name for name in files]


def _remove(sheet: Path) -> None:
    try:
        sheet.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"Could not delete {sheet} of an earlier check: {error.strerror}. Delete it.") from error


def contact_sheet(rows: Sequence[Row]) -> bytes:
    """Return a PNG of all pictures under the titles of their kinds, each with the number of its file."""
    step, line = SIZE + _GAP, SIZE + _GAP + _LABEL
    heights = [_TITLE + -(-len(row.pictures) // COLUMNS) * line for row in rows]
    sheet = Image.new("RGB", (COLUMNS * step + _GAP, sum(heights) + _GAP), "#e4e4e4")  # white pictures show too
    draw, top = ImageDraw.Draw(sheet), 0
    large, small = ImageFont.load_default(18), ImageFont.load_default(11)
    for row, height in zip(rows, heights, strict=True):
        draw.text((_GAP, top + 6), row.title, fill="black", font=large)
        for place, (name, square) in enumerate(row.pictures):
            left, upper = _GAP + place % COLUMNS * step, top + _TITLE + place // COLUMNS * line
            draw.rectangle((left - 1, upper - 1, left + SIZE, upper + SIZE), outline="#888888")
            sheet.paste(Image.fromarray(square[0]), (left, upper))
            shown = name if len(name) <= 22 else f"…{name[-20:]}"
            draw.text((left, upper + SIZE + 1), shown, fill="#444444", font=small)
        top += height
    return _png(sheet)


def _embedded(square: Square) -> str:
    return base64.b64encode(_png(Image.fromarray(square[0]))).decode()


def _png(image: Image.Image) -> bytes:
    png = io.BytesIO()
    image.save(png, "PNG")
    return png.getvalue()
