"""A real PACS for tests: Orthanc on loopback, and what it holds."""

import json
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
from pydicom import dcmread
from pydicom.data import get_testdata_file
from pydicom.uid import UID

from client.paths import INCOMING

DICOMWEB = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")
ORTHANC = shutil.which("Orthanc", path="/usr/sbin:/usr/bin")
NEEDS_ORTHANC = pytest.mark.skipif(
    ORTHANC is None or not DICOMWEB.exists(), reason="needs the Debian packages orthanc and orthanc-dicomweb"
)
USER, PASSWORD = "puller", "canary-password"
START_S = 30
REPOSITORY = Path(__file__).parents[1]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass
class Orthanc:
    """A running PACS."""

    folder: Path
    http: int = field(default_factory=free_port)
    dicom: int = field(default_factory=free_port)
    ours: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http}"

    def start(self) -> None:
        configuration = {
            "Name": "test",
            "StorageDirectory": str(self.folder / "db"),
            "IndexDirectory": str(self.folder / "db"),
            "Plugins": [str(DICOMWEB)],
            "HttpPort": self.http,
            "DicomPort": self.dicom,
            "DicomAet": "ORTHANC",
            "DicomCheckCalledAet": True,
            "DicomAlwaysAllowEcho": False,
            "DicomAlwaysAllowStore": False,
            "DicomAlwaysAllowFind": True,
            "DicomAlwaysAllowGet": False,
            "DicomAlwaysAllowMove": True,
            "DicomModalities": {
                "us": {
                    "AET": "FEDMEDGAN", "Host": "127.0.0.1", "Port": self.ours, "AllowEcho": True, "AllowFind": True,
                    "AllowGet": True, "AllowMove": True, "AllowStore": False,
                },
                "wanderer": {"AET": "WANDERER", "Host": "127.0.0.1", "Port": 1, "AllowMove": True},
            },
            "RemoteAccessAllowed": True,
            "AuthenticationEnabled": True,
            "RegisteredUsers": {USER: PASSWORD},
            "DicomScuTimeout": 3,
            "StorageCompression": False,
            "SaveJobs": False,
            "OverwriteInstances": False,
        }  # fmt: skip
        self.folder.mkdir(exist_ok=True)
        path = self.folder / "orthanc.json"
        path.write_text(json.dumps(configuration))
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen([str(ORTHANC), str(path)], stdout=log, stderr=log)
        end = time.monotonic() + START_S
        while time.monotonic() < end:
            try:
                httpx.get(f"{self.url}/system", auth=(USER, PASSWORD), trust_env=False).raise_for_status()
                return
            except httpx.HTTPError:
                time.sleep(0.05)
        raise RuntimeError((self.folder / "log").read_text())

    def stop(self) -> None:
        """Kill it: on SIGTERM it waits for its connections."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(20)

    def put(self, files: list[Path]) -> None:
        with httpx.Client(auth=(USER, PASSWORD), trust_env=False) as client:
            for file in files:
                client.post(f"{self.url}/instances", content=file.read_bytes()).raise_for_status()

    def dimse(self, **more: object) -> dict[str, object]:
        """Return a source of pacs.toml."""
        values = {"kind": "dimse", "host": "127.0.0.1", "port": self.dicom, "aet": "ORTHANC", "our_aet": "FEDMEDGAN"}
        return {**values, "free_bytes": 0, "timeout_s": 10.0, **more}

    def move(self, **more: object) -> dict[str, object]:
        return self.dimse(method="move", listen="127.0.0.1", listen_port=self.ours, **more)

    def web(self, home: Path, **more: object) -> dict[str, object]:
        secret = home / "password"
        secret.touch(0o600)
        secret.write_text(f"{PASSWORD}\n")
        values = {"kind": "dicomweb", "url": f"{self.url}/dicom-web", "user": USER, "password_file": str(secret)}
        return {**values, "free_bytes": 0, "timeout_s": 10.0, **more}


SERIES = {
    # accession: [(series, modality, instances)]
    "CANARY-ACC-1": [("1", "CT", 6), ("2", "MR", 3)],
    "CANARY-ACC-2": [("3", "CT", 2)],
    "CANARY-ACC-3": [("4", "CT", 24)],
}
ROOT = "1.2.826.0.1.3680043.10.543"


def study_uid(accession: str) -> str:
    return f"{ROOT}.1.{accession[-1]}"


def instance_uids(accession: str, modality: str = "") -> list[str]:
    return [
        f"{ROOT}.3.{series}.{number}"
        for series, kind, count in SERIES[accession]
        for number in range(1, count + 1)
        if modality in ("", kind)
    ]


def make_files(folder: Path) -> list[Path]:
    """Write SERIES from two small files of pydicom's: CT plain, MR as RLE."""
    templates = {"CT": "CT_small.dcm", "MR": "MR_small_RLE.dcm"}
    files: list[Path] = []
    for accession, held in SERIES.items():
        for series, modality, count in held:
            dataset = dcmread(str(get_testdata_file(templates[modality])))
            for number in range(1, count + 1):
                dataset.StudyInstanceUID, dataset.SeriesInstanceUID = study_uid(accession), f"{ROOT}.2.{series}"
                dataset.SOPInstanceUID = UID(f"{ROOT}.3.{series}.{number}")
                dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
                dataset.AccessionNumber, dataset.Modality = accession, modality
                dataset.PatientID = "CANARY-PAT-B" if accession == "CANARY-ACC-2" else "CANARY-PAT-A"
                dataset.IssuerOfPatientID, dataset.PatientName = "HOSPITAL", "Canary^Name"
                dataset.StudyDate = f"2024010{accession[-1]}"
                path = folder / f"{accession}-{series}-{number}.dcm"
                dataset.save_as(path)
                files.append(path)
    return files


def write_home(home: Path, **sources: dict[str, object]) -> Path:
    """Make a home that holds pacs.toml alone."""
    home.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    for name, values in sources.items():
        lines += [f"[sources.{name}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items())]
    (home / "pacs.toml").write_text("\n".join(lines) + "\n")
    return home


def write_list(path: Path, *rows: str, header: str = "accession") -> Path:
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def kept(home: Path) -> list[Path]:
    """Return the files that stand in the inbox whole; what is on its way ends in .dcm too, in a folder of its own."""
    return [path for path in (home / "inbox").rglob("*.dcm") if path.parent.name != INCOMING]


def pulled(home: Path) -> dict[str, Path]:
    """Return the files that are kept in the inbox by their SOP instance."""
    files = kept(home)
    found = {str(dcmread(path, stop_before_pixels=True).SOPInstanceUID): path for path in files}
    assert len(found) == len(files), "an instance came twice"
    return found


def leftovers(home: Path) -> list[Path]:
    return [path for path in (home / "inbox" / ".incoming").rglob("*") if path.is_file()]


def command(home: Path, source: str, *more: str) -> list[str]:
    return [sys.executable, "-m", "client.entry", "pull", str(home), "--from", source, *more]


def run_pull(home: Path, source: str, *more: str) -> subprocess.CompletedProcess[str]:
    """Run a pull in a process of its own."""
    return subprocess.run(command(home, source, *more), capture_output=True, text=True, timeout=60, cwd=REPOSITORY)
