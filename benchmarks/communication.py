"""What the devices of a compiled program exchange, read off its text."""

import re
from typing import Any

import numpy as np

COLLECTIVE = re.compile(
    r" = (.*?) (all-reduce|all-gather|all-to-all|collective-\w+|reduce-scatter|"
    r"ragged-\S+)(?:-start)?[.\d]*\("
)
BYTES = {
    "f64": 8,
    "s64": 8,
    "f32": 4,
    "s32": 4,
    "u32": 4,
    "bf16": 2,
    "pred": 1,
    "u8": 1,
}


def collectives(compiled: Any) -> list[tuple[str, int]]:
    """The operations that exchange data: (name, bytes of the result), as they come.

    An operation in a loop counts once.
    """
    found = []
    for shapes, operation in COLLECTIVE.findall(compiled.as_text()):
        sizes = [
            BYTES[dtype] * int(np.prod([int(n) for n in dims.split(",") if n]))
            for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", shapes)
        ]
        found.append((operation, sum(sizes)))
    return found
