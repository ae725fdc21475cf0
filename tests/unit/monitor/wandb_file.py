"""What wandb left: its processes, and its offline files (LevelDB log format after 7 bytes)."""

import json
import os
import struct
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

_BLOCK_BYTES, _HEADER = 32768, struct.Struct("<IHB")
_LAST_OF_RECORD = (1, 4)  # a whole record, or the last fragment of one


def read_records(folder: Path) -> list[Any]:
    """Every record of an offline run."""
    (path,) = folder.glob("*.wandb")
    data = path.read_bytes()
    records, position, fragments = [], 7, b""
    while position + _HEADER.size <= len(data):
        left = _BLOCK_BYTES - position % _BLOCK_BYTES
        _, length, kind = _HEADER.unpack_from(data, position) if left >= _HEADER.size else (0, 0, 0)
        if kind == 0:
            position += left
            continue
        start = position + _HEADER.size
        fragments += data[start : start + length]
        position = start + length
        if kind in _LAST_OF_RECORD:
            records.append(Record.FromString(fragments))
            fragments = b""
    return records


def wandb_processes() -> list[int]:
    """Process ids of wandb's writers that this process started and that have not ended."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = stat.read_text().partition("(")[2].rpartition(")")
        except OSError:  # ended since it was listed
            continue
        state, parent = rest.split()[:2]
        if name == "wandb-core" and parent == str(os.getpid()) and state != "Z":
            found.append(int(stat.parent.name))
    return found


def read_history(folder: Path) -> list[dict[str, Any]]:
    """Every logged row, without wandb's own keys."""
    rows = []
    for record in read_records(folder):
        if record.WhichOneof("record_type") == "history":
            items = {"/".join(item.nested_key): item.value_json for item in record.history.item}
            rows.append({k: json.loads(v) for k, v in items.items() if not k.startswith("_")})
    return rows
