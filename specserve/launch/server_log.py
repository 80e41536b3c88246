"""What a Triton server's log says went wrong; reads the file, knows nothing of the process."""

import re
from pathlib import Path

_ERROR = re.compile(r'^E\d{4} \S+ \d+ [\w.]+:\d+\] "?(.*?)"?$')
_LOAD_FAILURE = re.compile(r"failed to load '.*' version \d+: ")
_ROUTINE = re.compile(r"[IE]\d{4} |W\d{4} .*pinned system memory")
_TABLE = ("|", "+--")
_NOISE = ("CudaDriverHelper has not been initialized",)  # printed by every server without a GPU


class ServerLog:
    """The log file of one server, its models' output included."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def lines(self) -> list[str]:
        """Return the lines that are not part of a table; none before the file exists."""
        if not self.path.exists():
            return []
        text = self.path.read_text(encoding="utf-8", errors="replace")
        return [line for line in text.splitlines() if line and not line.startswith(_TABLE)]

    def load_failures(self) -> list[str]:
        """Return why models could not be loaded, one text per model; empty if none failed."""
        return [error for error in self.errors() if _LOAD_FAILURE.match(error)]

    def errors(self) -> list[str]:
        """Return Triton's error messages, each once, with their line breaks restored."""
        found = (match.group(1) for line in self.lines() if (match := _ERROR.match(line)))
        texts = dict.fromkeys(text.replace("\\n", "\n").rstrip() for text in found)
        return [text for text in texts if not text.startswith(_NOISE)]

    def cause(self, num_lines: int = 15) -> str:
        """Explain a failure: load failures if there are any, else errors and the last lines."""
        if failures := self.load_failures():
            return "\n".join(failures)
        lines = [line for line in self.lines() if not _ROUTINE.match(line)]
        return "\n".join([*self.errors()[-5:], "last lines of its log:", *lines[-num_lines:]])
