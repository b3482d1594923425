import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from pydicom.encaps import encapsulate
from pydicom.uid import JPEG2000Lossless

from client.intake import IntakeRules, Reason, decode_records, isolation, scan
from client.intake.isolation import DecoderPool, number_of_workers, stop_idle
from client.intake.pixels import Square
from client.intake.requests import Asked, Form, Job, ask_pixels
from tests.client.intake.pictures import read

WriteDicom = Callable[..., Path]


# Dies, hangs, says too much or nonsense, or answers with the file's number, as the file's name says.
FAULTY = """
import json, os, sys, time
from multiprocessing.connection import Connection
connection = Connection(int(sys.argv[1]))
while True:
    what, size, channels, _ = json.loads(connection.recv_bytes())
    for frame in what["frames"]:
        name = what["path"]
        if name == "abort" and frame == 1:
            os.abort()
        if name == "hang":
            time.sleep(60)
        if name == "slow":
            time.sleep(0.5)
        if name == "nonsense":
            connection.send_bytes(b"?")
        pixels = bytes(10**6) if name == "long" else bytes([int(name) if name.isdigit() else 0]) * (channels * size**2)
        connection.send_bytes(b"+" + pixels)
"""


def jobs(*names: str, frames: tuple[int | None, ...] = (0, 1, 2)) -> list[Asked[Square]]:
    return [ask_pixels(Job(Path(name), None, frames, ("", "")), Form(28, 1, rules())) for name in names]


def rules(workers: int = 2, seconds: float = 20) -> IntakeRules:
    return IntakeRules(workers=workers, decode_seconds=seconds)


def numbers(squares: Iterator[np.ndarray | str]) -> list[int | str]:
    return [square if isinstance(square, str) else int(square[0, 0, 0]) for square in squares]


@pytest.mark.slow
def test_survives_abort() -> None:
    with DecoderPool(rules(), FAULTY) as pool:
        found = numbers(pool.answers(jobs("1", "abort", "2", "long", "nonsense", "3")))
    assert found == [1] * 3 + [0, Reason.DIED, Reason.DIED] + [2] * 3 + [Reason.DIED] * 6 + [3] * 3


@pytest.mark.slow
def test_survives_hang() -> None:
    with DecoderPool(rules(workers=1, seconds=1), FAULTY) as pool:
        assert numbers(pool.answers(jobs("1", frames=(0,)))) == [1]
        assert numbers(pool.answers(jobs("hang", "2", frames=(0,)))) == [Reason.TOO_SLOW, 2]


@pytest.mark.slow
def test_in_order() -> None:
    names = ["slow", *map(str, range(1, 30))]
    with DecoderPool(rules(), FAULTY) as pool:
        assert numbers(pool.answers(jobs(*names, frames=(0,)))) == list(range(30))


@pytest.mark.slow
def test_memory_is_bounded() -> None:
    """While the first job is slow, only a few others are begun."""
    begun: list[str] = []

    def source() -> Iterator[Asked[Square]]:
        for name in ["slow", *["7"] * 1000]:
            begun.append(name)
            yield from jobs(name, frames=(0,))

    with DecoderPool(rules(), FAULTY) as pool:
        assert next(pool.answers(source())).max() == 0
        assert 2 <= len(begun) <= 2 * isolation._AHEAD


@pytest.mark.slow
def test_every_record_once(tmp_path: Path, write_dicom: WriteDicom) -> None:
    write_dicom(tmp_path / "a", np.zeros((24, 16), np.uint16))
    write_dicom(tmp_path / "b", syntax=JPEG2000Lossless, PixelData=encapsulate([bytes(100)]))
    write_dicom(tmp_path / "c")
    found = scan(tmp_path, "none")
    (tmp_path / "c").unlink()
    got = list(decode_records(found.records, 28))
    assert [record for record, _ in got] == list(found.records)
    assert [one if isinstance(one, str) else one.shape for _, one in got] == [
        (1, 28, 28),
        Reason.PIXELS,
        Reason.MISSING,
    ]
    assert read(scan(tmp_path, "none"), ["all"], 28)[1] == {Reason.PIXELS: 1}


@pytest.mark.slow
def test_a_worker_that_died_between_two_uses_is_not_used(tmp_path: Path, write_dicom: WriteDicom) -> None:
    write_dicom(tmp_path / "a")
    stop_idle()
    read(scan(tmp_path, "none"), ["all"], 28)
    assert len(isolation._idle) == 1
    process = isolation._idle[0]._process
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert len(read(scan(tmp_path, "none"), ["all"], 28)[0].images) == 1


def test_number_of_workers() -> None:
    assert number_of_workers(3) == 3
    assert 1 <= number_of_workers(None) <= isolation.MAX_WORKERS
