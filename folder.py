"""An artifact is a folder: written whole or not at all, read back only if every byte is as it was written.

    manifest.json     format version, model, cluster, workload, plan, sha256 of every other file,
                      and a digest of itself
    ir/  kernels/  schedule/  cost.py  report.html  launch/

`schedule/<role>.py` is called once per micro-batch as `step(w, kv, batch, comm)`; `microbatch` has what it
receives.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .artifact import FORMAT, Manifest
from .codec import from_json, to_json
from .errors import BadInput
from .whole import whole_folder

MANIFEST = "manifest.json"
_REPLAN = "the plan cannot be trusted: make it again with `mnemoc plan`"


def write_artifact(directory: Path, manifest: Manifest, files: Mapping[str, bytes]) -> Manifest:
    """Write an artifact folder, whole or not at all.

    An existing artifact is replaced; any other existing non-empty folder is refused.
    Returns the manifest with the hashes of `files` filled in.
    """
    refuse_if_taken(directory)
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in sorted(files.items())}
    manifest = dataclasses.replace(manifest, files=hashes)
    with whole_folder(directory) as aside:
        for name, data in {**files, MANIFEST: _seal(manifest)}.items():
            path = aside / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            path.chmod(0o755 if name.endswith(".sh") else 0o644)
        if directory.exists():
            shutil.rmtree(directory)
    return manifest


def refuse_if_taken(directory: Path) -> None:
    """BadInput if something lies there that is neither a plan nor an empty folder."""
    if not directory.exists():
        return
    if not directory.is_dir() or (not (directory / MANIFEST).exists() and any(directory.iterdir())):
        raise BadInput(
            "the output folder exists and is not a plan", where=directory, do="choose another -o"
        )


def read_manifest(directory: Path) -> bytes:
    """The bytes that seal an artifact; BadInput if it is none."""
    try:
        return (directory / MANIFEST).read_bytes()
    except OSError as error:
        raise BadInput(
            f"not a plan: no readable {MANIFEST}",
            where=directory,
            do="make one with `mnemoc plan MODEL ... -o DIR`",
        ) from error


def load_artifact(directory: Path) -> tuple[Manifest, dict[str, bytes]]:
    """Read an artifact and check every byte of it against its manifest. Executes nothing.

    Returns the manifest and the verified contents of each file, by relative path: run these bytes,
    not the files, which may change after the check.
    """
    manifest = _unseal(read_manifest(directory), directory / MANIFEST)
    present = {str(p.relative_to(directory)) for p in directory.rglob("*") if not p.is_dir()}
    if extra := sorted(present - manifest.files.keys() - {MANIFEST}):
        raise BadInput(
            "a file that the manifest does not list", where=directory / extra[0], do=_REPLAN
        )
    contents = {}
    for name, digest in manifest.files.items():
        if name not in present:
            raise BadInput("the file is missing from the plan", where=directory / name, do=_REPLAN)
        contents[name] = (directory / name).read_bytes()
        if hashlib.sha256(contents[name]).hexdigest() != digest:
            raise BadInput("changed since it was planned", where=directory / name, do=_REPLAN)
    return manifest, contents


def _seal(manifest: Manifest) -> bytes:
    body = to_json(manifest)
    digest = hashlib.sha256(_dump(body)).hexdigest()
    return _dump({**body, "digest": digest})


def _unseal(sealed: bytes, path: Path) -> Manifest:
    try:
        body = json.loads(sealed)
    except ValueError as error:
        raise BadInput("not valid JSON", where=path, do=_REPLAN) from error
    if not isinstance(body, dict) or "format" not in body:
        raise BadInput("not a mnemoc manifest", where=path, do=_REPLAN)
    if body["format"] != FORMAT:
        raise BadInput(
            f"format {body['format']!r} of the plan is not format {FORMAT}, which this mnemoc reads",
            where=path,
            do="plan again with this version of mnemoc",
        )
    digest = body.pop("digest", None)
    dumped = _dump(body)
    if digest != hashlib.sha256(dumped).hexdigest() or _dump({**body, "digest": digest}) != sealed:
        raise BadInput("changed since it was planned", where=path, do=_REPLAN)
    return from_json(Manifest, body, str(path))


def _dump(body: Any) -> bytes:
    return (json.dumps(body, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()
