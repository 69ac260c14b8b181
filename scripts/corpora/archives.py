"""Reads Debian and PyPI packages in memory, without trust in them, and downloads them with apt-get and pip."""

import bz2
import gzip
import io
import lzma
import posixpath
import re
import stat
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from fat5.errors import DataError, FAT5Error
from fat5.files import file_sha256, write_atomically

METADATA = re.compile(r"^(\./)?control$|^[^/]+\.dist-info/METADATA$|^[^/]+/PKG-INFO$")
BY_HAND = "Put the files there by hand, or leave them out"
MOST_BYTES = 512 << 20
"""Of a package once decompressed, and of a compressed file in it."""


@dataclass(eq=False)
class Package:
    """Name, version and digest of a package, and the files that were asked for, by their path in it."""

    name: str
    version: str
    sha256: str
    files: dict[str, bytes]


class _Bounded:
    """A stream that ends in an error past MOST_BYTES, so that a small archive cannot fill the memory."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self._left = stream, MOST_BYTES

    def read(self, size: int) -> bytes:
        data = self._stream.read(min(size, self._left + 1))
        self._left -= len(data)
        if self._left < 0:
            raise DataError(f"more than {MOST_BYTES >> 20} MiB once decompressed")
        return data


def read_package(path: Path, wanted: re.Pattern[str]) -> Package:
    """Reads a .deb, .whl or .tar.gz in memory; keeps the files whose path matches `wanted`.

    Raises:
        DataError: damaged, of another name than its file, larger than MOST_BYTES, or with absolute paths, devices or
            links that leave the package.
    """
    import zstandard

    if path.name.startswith("Translation-"):
        index, _, release = path.name.partition("_")
        return Package(_plain(index), release, file_sha256(path), {f"/{index}": path.read_bytes()})
    faults = (tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, zlib.error, zstandard.ZstdError)
    try:
        files, described = {}, b""
        for member, content in _members(path, wanted):
            if METADATA.search(member):
                described = described or content
            else:
                files[member] = content
        text = described.decode()
        digest = file_sha256(path)
    except FAT5Error as error:
        raise DataError(str(error), where=path) from error
    except (*faults, EOFError, ValueError, RuntimeError, OSError) as error:
        raise DataError(f"cannot be read as a package ({error})", where=path) from error
    name = re.search(r"^(?:Package|Name): *(\S+)", text, re.MULTILINE)
    version = re.search(r"^Version: *(\S+)", text, re.MULTILINE)
    if not name or not version or _plain(name[1]) != package_name(path):
        raise DataError(f"is {name[1] if name else 'nothing'} by its metadata, not {package_name(path)}", where=path)
    return Package(package_name(path), version[1], digest, files)


def package_name(path: Path) -> str:
    """The name that a file of a package should have by its own: `a_b-1.0.whl` is a-b."""
    debian = path.suffix == ".deb" or path.name.startswith("Translation-")
    return _plain(path.name.split("_")[0] if debian else re.split(r"-\d", path.name)[0])


def _plain(name: str) -> str:
    return name.replace("_", "-").lower()


def _members(path: Path, wanted: re.Pattern[str]) -> Iterator[tuple[str, bytes]]:
    if path.suffix == ".whl":
        yield from _zip_members(path, wanted)
    elif path.suffix == ".deb":
        for name, content in _ar_members(path):
            if name.startswith(("control.tar", "data.tar")):
                yield from _tar_members(name, io.BytesIO(content), wanted)
    else:
        with path.open("rb") as file:
            yield from _tar_members(path.name, file, wanted)


def _ar_members(path: Path) -> Iterator[tuple[str, bytes]]:
    with path.open("rb") as file:
        if file.read(8) != b"!<arch>\n":
            raise DataError("no Debian package")
        while header := file.read(60):
            size = int(header[48:58])
            content = file.read(size + size % 2) if size >= 0 else b""
            if not 0 <= size <= len(content):
                raise DataError("ends in the middle")
            yield header[:16].decode().rstrip(" /"), content[:size]


def _tar_members(name: str, file: IO[bytes], wanted: re.Pattern[str]) -> Iterator[tuple[str, bytes]]:
    import zstandard

    openers: dict[str, Callable[[IO[bytes]], Any]] = {
        "xz": lzma.open,
        "gz": gzip.open,
        "bz2": bz2.open,
        "zst": zstandard.ZstdDecompressor().stream_reader,
    }
    stream = openers.get(name.rsplit(".", 1)[-1], lambda plain: plain)(file)
    with tarfile.open(fileobj=_Bounded(stream), mode="r|") as tar:  # type: ignore[call-overload]
        for member in tar:
            _check_name(member.name)
            _check_kind(member, wanted)
            if member.isfile() and (wanted.search(member.name) or METADATA.search(member.name)):
                content = tar.extractfile(member)
                assert content is not None
                yield member.name, content.read()


def _zip_members(path: Path, wanted: re.Pattern[str]) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(path) as archive:
        if sum(member.file_size for member in archive.infolist()) > MOST_BYTES:
            raise DataError(f"more than {MOST_BYTES >> 20} MiB once decompressed")
        for member in archive.infolist():
            _check_name(member.filename)
            if stat.S_ISLNK(member.external_attr >> 16):
                raise DataError(f"a link in a wheel: {member.filename!r}")
            if wanted.search(member.filename) or METADATA.search(member.filename):
                yield member.filename, archive.read(member)  # zipfile stops at file_size


def _check_kind(member: tarfile.TarInfo, wanted: re.Pattern[str]) -> None:
    # What tarfile.data_filter refuses, which Python 3.11 has from 3.11.4 on; but Debian's packages link to each other's
    # fonts by absolute paths, which does no harm here, where nothing is unpacked.
    if member.issym() and member.linkname.startswith("/") and not wanted.search(member.name):
        return
    base = posixpath.dirname(member.name) if member.issym() else ""
    target = posixpath.normpath(posixpath.join(base, member.linkname)) if member.issym() or member.islnk() else ""
    if target.startswith(("/", "..")):
        raise DataError(f"a link that leaves the package: {member.name!r}")
    if not (member.isfile() or member.isdir() or target):
        raise DataError(f"a device: {member.name!r}")


def _check_name(name: str) -> None:
    if name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", name):
        raise DataError(f"a path that leaves the package: {name!r}")


def decompress(package: Package, name: str) -> str:
    """The text of a .gz, .dz or .bz2 file in a package, of at most MOST_BYTES."""
    opener = bz2.open if name.endswith(".bz2") else gzip.open
    try:
        return _Bounded(opener(io.BytesIO(package.files[name]))).read(MOST_BYTES + 1).decode()  # type: ignore[arg-type]
    except (FAT5Error, OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError(f"cannot be read ({error})", where=f"{package.name}: {name}") from error


def download(debian: list[str], pypi: list[str], folder: Path, optional: bool = False) -> None:
    """Fetches packages into a folder from the sources that apt-get and pip are configured with; runs nothing of them.

    Packages that are `optional` are asked for one by one, and those that cannot be had are left out.

    Raises:
        DataError: a command is missing, or failed for a package that is not optional; its last line says why.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
    for command, names in ((["apt-get", "download"], debian), (pip, pypi)):
        for group in [[name] for name in names] if optional else filter(None, [names]):
            what = f"{command[0] if debian is names else 'pip'} download {' '.join(group)}"
            with suppress(DataError) if optional else nullcontext():
                _run([*command, *group], folder, what)


def _run(command: list[str], folder: Path, what: str) -> str:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except OSError as error:
        raise DataError(f"{what} cannot run ({error.strerror})", where=folder, hint=BY_HAND) from error
    lines = (done.stderr or done.stdout).strip().splitlines()
    said = next((line for line in lines if line.startswith(("E:", "ERROR:"))), lines[-1] if lines else "")
    if done.returncode:
        raise DataError(f"{what} failed ({said})", where=folder, hint=BY_HAND)
    return said


def download_descriptions(language: str, folder: Path) -> None:
    """Fetches apt's translated descriptions of packages, into lists of their own: the machine's stay as they are.

    Raises:
        DataError: apt-get is missing, failed, or knows no such language.
    """
    with tempfile.TemporaryDirectory() as room:
        lists = Path(room) / "lists"
        (lists / "partial").mkdir(parents=True)
        options = (f"Dir::State::Lists={lists}", f"Dir::Cache={room}", f"Acquire::Languages={language}")
        command = ["apt-get", "update", *(f"-o{one}" for one in (*options, "Acquire::GzipIndexes=false"))]
        done = _run(command, Path(room), f"apt-get update, for descriptions in {language},")
        found = sorted(lists.glob(f"*_Translation-{language}"))
        if not found:
            raise DataError(f"no descriptions in {language} came ({done})", where=folder, hint=BY_HAND)
        release = lists / (re.sub(r"_[^_]*_i18n_.*", "", found[0].name) + "_InRelease")
        version = re.search(r"^Version: (\S+)", release.read_text() if release.exists() else "", re.MULTILINE)
        path = folder / f"Translation-{language}_{version[1] if version else 'unknown'}"
        write_atomically(path, b"\n".join(one.read_bytes() for one in found))
