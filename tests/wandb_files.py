"""What Weights & Biases recorded offline: its file holds what it would have sent."""

import os
import struct
import time
from pathlib import Path

from wandb.proto.wandb_internal_pb2 import Record


def wandb_records(path: Path) -> list:
    """Records of one run file: LevelDB's log format, after a header of seven bytes."""
    data = path.read_bytes()
    position = 7
    parts = b""
    records = []
    while position + 7 <= len(data):
        room = 32768 - position % 32768
        if room < 7:  # too little for a header at the end of a block is padding
            position += room
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        start = position + 7
        position = start + length
        if position > len(data):  # cut by a kill, or still being written
            break
        parts += data[start:position]
        if kind in (1, 4):  # a whole record, or its last part; 2 and 3 are the parts before
            records.append(Record.FromString(parts))
            parts = b""
    return records


def finished_records(path: Path) -> list:
    """The same, once wandb's own process, which may outlive the run, has written the last."""
    for _ in range(600):
        records = wandb_records(path)
        if records and records[-1].WhichOneof("record_type") == "exit":
            return records
        time.sleep(0.1)
    shared = os.environ.get("WANDB_SERVICE")  # what a process writes that outlives the run
    raise AssertionError(f"{path} has no end; WANDB_SERVICE is {shared}")
