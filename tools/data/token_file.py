"""Token files: the requests of one workload, tokenised, as safetensors. benchmarks/token_file.h, which reads them, says
what they hold. The same arrays and metadata give the same bytes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as serialize

from tools.atomic_files import write_atomically

FORMAT_VERSION = "2"
Arrays = dict[str, np.ndarray]


def content_digest(arrays: Arrays) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def save(path: Path, arrays: Arrays, metadata: dict[str, str]) -> None:
    metadata = {**metadata, "content_sha256": content_digest(arrays)}
    content = _with_sorted_header(serialize(arrays, metadata))
    write_atomically(path, lambda temporary: temporary.write_bytes(content))


def _with_sorted_header(content: bytes) -> bytes:
    """The safetensors library writes metadata in another order each time."""
    size = int.from_bytes(content[:8], "little")
    text = json.dumps(json.loads(content[8 : 8 + size]), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    header = text.encode()
    header += b" " * (-len(header) % 8)  # tensors start at a multiple of eight bytes
    return len(header).to_bytes(8, "little") + header + content[8 + size :]


def load(path: Path) -> tuple[Arrays, dict[str, str]] | None:
    """What is in a file that save() wrote, or None if it is missing, cut off or altered."""
    try:
        with safe_open(path, framework="numpy") as file:
            metadata: dict[str, str] = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return (arrays, metadata) if metadata.get("content_sha256") == content_digest(arrays) else None
    except (OSError, SafetensorError, KeyError, ValueError):
        return None
