"""What `specserve profile` measured, and of what: samples, a fingerprint, a file."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from specserve.config import build
from specserve.telemetry.reading import Clocks

FORMAT = 1
MORE_S = ("change_s", "draft_change_s", "host_s")  # not in every profile


@dataclass(frozen=True, slots=True)
class VerifySample:
    """Seconds of a verification of `num_tokens` with `context_tokens` read,
    the lower quartile of several.

    Attributes:
        num_logit_rows: tokens whose logits were computed; the rest were prompt tokens.
    """

    num_tokens: int
    num_logit_rows: int
    context_tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class DraftSample:
    """Seconds of a draft call of `num_rows` rows and `num_forwards` forwards.

    Attributes:
        num_catch_up_tokens: tokens of the first forward, all rows together.
    """

    num_rows: int
    num_forwards: int
    num_catch_up_tokens: int
    context_tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Profile:
    """A measured pair on a device.

    Attributes:
        fingerprint: what the numbers depend on: device, engine, precision, threads, versions, pair.
        source: "measured", or where an estimate comes from.
        change_s: seconds that a verification takes more when the one before was of another number
            of tokens; an engine with shapes of its own for every number has to prepare for them.
            Those with prompt tokens were timed with it.
        draft_change_s: the same of each forward of the draft model.
        host_s: seconds of a step beside the engines, see `specserve.rehearsal`.
        clocks: the device's, while it was measured; None if it did not say.
    """

    fingerprint: dict[str, str]
    verify: tuple[VerifySample, ...]
    draft: tuple[DraftSample, ...]
    source: str = "measured"
    format: int = FORMAT
    clocks: Clocks | None = None
    change_s: float = 0.0
    draft_change_s: float = 0.0
    host_s: float = 0.0

    def check(self, fingerprint: Mapping[str, str]) -> None:
        """Refuse numbers of something else.

        Raises:
            ValueError: naming what differs, and the fix.
        """
        for key in sorted({*fingerprint, *self.fingerprint}):
            mine, theirs = self.fingerprint.get(key), fingerprint.get(key)
            if mine != theirs:
                raise ValueError(
                    f"the profile was taken with {key} '{mine}', this is '{theirs}': "
                    "run `specserve profile` again"
                )

    def save(self, path: Path) -> None:
        """Write JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "Profile":
        """Read JSON.

        Raises:
            ValueError: missing file, wrong format, unknown or missing keys.
        """
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError) as error:
            raise ValueError(f"cannot read profile {path.name}: {error}") from error
        if tree.get("format") != FORMAT:
            raise ValueError(f"profile {path.name} has format {tree.get('format')}, not {FORMAT}")
        try:
            verify = tuple(build(VerifySample, sample, "verify") for sample in tree["verify"])
            draft = tuple(build(DraftSample, sample, "draft") for sample in tree["draft"])
            clocks = Clocks(*tree["clocks"]) if tree.get("clocks") else None
            change_s, draft_change_s, host_s = (float(tree.get(name, 0.0)) for name in MORE_S)
            return cls(
                tree["fingerprint"], verify, draft, tree["source"], clocks=clocks,
                change_s=change_s, draft_change_s=draft_change_s, host_s=host_s,
            )  # fmt: skip
        except (KeyError, TypeError) as error:
            raise ValueError(f"profile {path.name} is incomplete: {error}") from error
