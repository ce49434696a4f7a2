"""The code of a document, run from top to bottom."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

Variables = dict[str, Any]


def variables_after_each_block(document: Path) -> list[Variables]:
    variables: Variables = {}
    snapshots: list[Variables] = []
    for block in re.findall(r"```python\n(.*?)```", document.read_text(), re.DOTALL):
        exec(block, variables)
        snapshots.append(dict(variables))
    return snapshots
