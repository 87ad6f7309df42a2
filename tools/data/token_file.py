"""Token files: the requests of one workload, tokenised, as safetensors (version "2").

  tokens            int32   [all tokens]
  sequence_offsets  int64   [sequences + 1], into tokens
  request_offsets   int64   [requests + 1], into sequences; a request is a batch of ragged sequences
What the task needs, where it applies:
  labels            int64   [sequences]: classification: the class (also in the fill part); choice: 1 right, 0 wrong
  scored            int64   [sequences, 2]: tokens [begin, end) of the sequence whose log-likelihood is scored, begin
                            at least 1; begin = end where nothing is scored (an unanswerable question)
  scored_bytes      int64   [sequences]: choice: length in bytes of the text that is scored
  group             int64   [requests]: answer: number of the gold answer, equal answers have equal numbers, -1 none
  partner           int64   [requests]: duplicates: the fill request that the asking pair names; -1 in the fill part
  pair_label        int64   [requests]: duplicates: 1 duplicate, 0 not; -1 in the fill part
  pair_score        float32 [requests]: similarity: gold score of the pair
What says more about sequences or tokens, where it applies:
  pool              int64   [all tokens]: 1 where the output is to be read (the pooling mask), else 0
  edit_kind         int64   [sequences]: number in edit_kinds of how the sequence differs from the last one before it
                            that is as it is (0)
  edit_percent      float32 [sequences]: share of its words that were changed, in percent
Of answers that are looked for in a passage (task answer, encoders), texts by SQuAD's rule for equal answers
(squad_rule.py):
  passage             int64 [sequences, 2]: tokens [begin, end) of the passage; from its beginning on the token type is 1
  token_text          uint8 [bytes]: the text of each token of a passage, with the white space in front; UTF-8
  token_text_offsets  int64 [all tokens + 1], into token_text
  gold                uint8 [bytes]: all gold answers, each ended by a newline; UTF-8
  gold_offsets        int64 [requests + 1], into gold; nothing for a request: it cannot be answered
Where text is generated (task generation), a request is a conversation: its sequences are the user's parts of it, each
answered by the model with new_tokens tokens, or until it says stop_token.
Metadata (all texts): version, workload, tokenizer, source, description, order, max_tokens, task, fill_requests (the
first that many requests only fill the cache and are not measured), label_names (classification: a JSON list),
new_tokens and stop_token (generation; the latter where there is one), edit_kinds (with edit_kind: a JSON list of
names), recipe and content_sha256 (what it was made from, and its content). The same arrays and metadata give the same
bytes."""

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
