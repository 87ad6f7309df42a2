#!/usr/bin/env python3
"""Downloads real data from the Hugging Face hub and writes it as the raw files that prepare_data.py takes.

What is fetched stands in one table, data_sources.py: repository, commit, files, rows, SHA-256 where known. The hub is
asked for the size and checksum of each file at that commit; what arrives must have them, must be what the table says,
and, from the second time on, what the first download found, which OUT/sources.lock.json holds: commit, sizes and
SHA-256 of the hub's files and of the written ones. So a file without a checksum in the table is trusted once, as the
hub gives it, and never changes unnoticed after that; the same goes for the commit where the table names a branch.
To take other contents on purpose, remove the data set's entry in sources.lock.json, or the whole file.

A data set whose written files are those of sources.lock.json is skipped without a question to the hub. Files are
written elsewhere, read by the readers that will use them, and then renamed. Downloads are kept in OUT/.cache: after an
interruption what arrived whole is not fetched again. A download that breaks off is tried again some times at once.

Exit status: 0 all there; 1 something the hub sent, or a file here, is not what it should be; 2 wrong arguments; 3 the
hub cannot be reached (one line says so); 130 interrupted. Data sets that were complete before stay as they are.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.atomic_files import folder_lock, sha256_of, write_atomically
from tools.data import data_conversions
from tools.data.data_conversions import read_table
from tools.data.data_sources import DATA_SETS, DataSet
from tools.data.raw_files import LOCK_FILE, DataError
from tools.hub import SECONDS, Unreachable, first_line, status_of

CACHE, STAGING = ".cache", ".staging"
UNREACHABLE = 3
INTERRUPTED = 130
SETTINGS = {  # of huggingface_hub, if not set by the user; it reads them when it is imported
    "HF_HUB_DISABLE_XET": "1",  # small files: nothing but OUT/.cache is to be written to
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_UPDATE_CHECK": "1",
}


def require_hub() -> None:
    from huggingface_hub.constants import ENDPOINT

    try:
        status_of(ENDPOINT)
    except Unreachable as error:
        raise Unreachable(f"{ENDPOINT} cannot be reached ({error})") from error


@contextlib.contextmanager
def errors_of_hub(what: str) -> Iterator[None]:
    import httpx2
    from huggingface_hub import errors

    try:
        yield
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, httpx2.HTTPError, ConnectionError) as error:
        cause = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ else error
        if isinstance(cause, errors.HfHubHTTPError):
            raise DataError(f"{what}: the hub answers with status {cause.response.status_code}") from error
        broken_off = isinstance(cause, httpx2.ProtocolError)
        if isinstance(cause, (httpx2.TransportError, ConnectionError)) and not broken_off:
            raise Unreachable(f"{what}: the hub does not answer any more ({first_line(cause)})") from error
        raise DataError(f"{what}: the answer is cut off or no answer of a hub ({first_line(cause)})") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{what}: {first_line(error)}") from error


def check(path: Path, what: str, size: int | None, git_id: str | None, wanted: dict[str, str | None]) -> dict[str, Any]:
    """Compares a downloaded file with what is known of it; a file that differs is removed from the cache."""
    data = path.read_bytes()
    sha256 = hashlib.sha256(data).hexdigest()
    found = ""
    if size is not None and len(data) != size:
        found = f"{len(data)} bytes, expected {size}"
    # The id that git gives to contents; the hub has a SHA-256 only of files kept with Git LFS.
    elif git_id and hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest() != git_id:
        found = f"contents are not those with the git id {git_id}"
    for by, digest in wanted.items():
        if digest and digest != sha256:
            found = found or f"SHA-256 is {sha256}, expected {digest} from {by}"
    if found:
        for file in {path.resolve(), path}:
            file.unlink(missing_ok=True)
        raise DataError(f"{what}: {found}; cut off, altered on the way, or changed on the hub. Nothing was written")
    return {"size": len(data), "sha256": sha256}


def fetch(source: DataSet, locked: dict[str, Any], cache: Path) -> tuple[str, dict[str, Any], list[Path]]:
    """Downloads the files. Returns the commit, their sizes and checksums, and where they are now."""
    from huggingface_hub import HfApi, hf_hub_download

    revision = locked.get("commit", source.revision)
    with errors_of_hub(f"{source.repo}@{revision}"):
        info = HfApi().dataset_info(source.repo, revision=revision, files_metadata=True, timeout=4 * SECONDS)
        commit, listed = str(info.sha), {file.rfilename: file for file in info.siblings or []}
        if len(revision) == 40 and commit != revision:
            raise ValueError(f"the hub answers with another commit, {commit}")
    contents: dict[str, Any] = {}
    paths: list[Path] = []
    for file in source.sources:
        what = f"{source.repo}/{file.path}@{commit[:12]}"
        known = listed.get(file.path)
        if known is None or known.size is None:
            raise DataError(f"{what}: not in the hub's list of the files at this commit")
        with errors_of_hub(what):
            path = hf_hub_download(source.repo, file.path, repo_type="dataset", revision=commit, cache_dir=cache)
        paths.append(Path(path))
        wanted = {
            "the hub": known.lfs.sha256 if known.lfs else None,
            "data_sources.py": file.sha256,
            LOCK_FILE: locked.get("sources", {}).get(file.path, {}).get("sha256"),
        }
        contents[file.path] = check(paths[-1], what, known.size, None if known.lfs else known.blob_id, wanted)
    return commit, contents, paths


def write(source: DataSet, paths: list[Path], staging: Path, out: Path) -> dict[str, Any]:
    """Converts, has the readers read what was written, and renames it. Returns sizes and checksums of the files."""
    tables = [read_table(path, source.columns, file.rows) for path, file in zip(paths, source.sources, strict=True)]
    contents: dict[str, Any] = {}
    for name, lines in source.convert(*tables).items():
        path = staging / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w", encoding="utf-8", newline="\n") as file:
            file.writelines(line + "\n" for line in lines)
        contents[name] = {"size": path.stat().st_size, "sha256": sha256_of(path)}
        expected = source.written.get(name, contents[name]["sha256"])
        if contents[name]["sha256"] != expected:
            raise DataError(f"{out / name}: would be written with SHA-256 {contents[name]['sha256']}, not {expected}")
    for reader, names in source.checks:
        reader(*(staging / name for name in names))
    for name in contents:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out / name, partial(os.replace, staging / name))
    return contents


def read_lock(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["data_sets"]
        for entry in entries.values():
            for part in ("sources", "files"):
                for file in entry[part].values():
                    int(file["size"]), str(file["sha256"])
            str(entry["repo"]), str(entry["revision"]), str(entry["commit"]), str(entry["recipe"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = first_line(error)
        raise DataError(f"{path}: not what this program wrote ({reason}); remove it to start anew") from error
    return entries


def write_lock(path: Path, entries: dict[str, Any]) -> None:
    text = json.dumps({"data_sets": entries}, indent=1, sort_keys=True) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8") and None)


def whole(entry: dict[str, Any], out: Path) -> bool:
    return all(
        (out / name).is_file() and sha256_of(out / name) == file["sha256"] for name, file in entry["files"].items()
    )


def download(name: str, entries: dict[str, Any], recipe: str, out: Path) -> None:
    source, locked = DATA_SETS[name], entries.get(name, {})
    if (locked.get("repo"), locked.get("revision")) != (source.repo, source.revision):
        locked = {}  # the table has changed since
    print(f"{name}: from {source.repo}@{source.revision[:12]}; licence: {source.licence}", flush=True)
    staging = out / STAGING
    shutil.rmtree(staging, ignore_errors=True)
    try:
        commit, sources, paths = fetch(source, locked, out / CACHE)
        files = write(source, paths, staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    entries[name] = {
        "repo": source.repo,
        "revision": source.revision,
        "commit": commit,
        "licence": source.licence,
        "recipe": recipe,
        "sources": sources,
        "files": files,
    }
    write_lock(out / LOCK_FILE, entries)
    written = [f"{file} ({known['size']} bytes)" for file, known in files.items()]
    print(f"{name}: {', '.join(written)}", flush=True)


def run(names: list[str], out: Path) -> int:
    recipe = sha256_of(Path(data_conversions.__file__))
    failed = False
    with folder_lock(out):
        entries = read_lock(out / LOCK_FILE)
        missing: list[str] = []
        for name in names:
            source, entry = DATA_SETS[name], entries.get(name)
            current = (source.repo, source.revision, recipe, {file.path for file in source.sources})
            known = entry and (entry["repo"], entry["revision"], entry["recipe"], set(entry["sources"]))
            if entry and known == current and whole(entry, out):
                print(f"{name}: already there, skipped; licence: {source.licence}", flush=True)
            else:
                missing.append(name)
        if missing:
            require_hub()
        for name in missing:
            try:
                download(name, entries, recipe, out)
            except DataError as error:
                print(f"download_data: {name}: {error}", file=sys.stderr, flush=True)
                failed = True
    return int(failed)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="DIR", required=True, help="where the raw data goes")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=DATA_SETS, help=f"of {', '.join(DATA_SETS)} [all]")
    options = parser.parse_args(arguments)
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    if not sys.stdout.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        return run(list(dict.fromkeys(options.only or DATA_SETS)), options.out)
    except Unreachable as error:
        print(f"download_data: {error}; what is missing can be fetched later with the same call", file=sys.stderr)
        return UNREACHABLE
    except (DataError, OSError) as error:
        print(f"download_data: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("download_data: interrupted; a next call goes on", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
