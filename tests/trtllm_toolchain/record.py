"""What each stand-in does first: write down how it was called."""

from __future__ import annotations

import json
import os


def record(name: str, arguments: list[str]) -> None:
    with open(os.environ["STAND_IN_LOG"], "a", encoding="utf-8") as log:
        log.write(json.dumps([name, *arguments]) + "\n")
