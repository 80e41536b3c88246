"""`specserve profile`: measure thoroughly, store, and show how well the model fits."""

from dataclasses import replace
from pathlib import Path

from rich.table import Table

from specserve import engines
from specserve.assemble import profiled
from specserve.config import Config
from specserve.predictor.measure import Effort
from specserve.predictor.profile import Profile
from specserve.predictor.prompts import Prompts
from specserve.predictor.step_time import StepTimeModel
from specserve.predictor.store import fingerprint, path_of
from specserve.telemetry import make_telemetry


def measure_and_describe(config: Config, output: Path | None) -> tuple[Table, Path]:
    """Measure the configured pair in this process and store the profile.

    Returns:
        Measured against predicted verification times, and where the profile is.

    Raises:
        ValueError: a pair or configuration that does not fit.
    """
    info = engines.describe(config)
    draft, target = engines.make_draft_engine(config), engines.make_target_engine(config)
    telemetry = make_telemetry(config)
    marks = fingerprint(config, telemetry.reading)
    profile = profiled(config, info, draft, target, marks, Effort())
    profile = replace(profile, clocks=telemetry.clocks)
    path = output or path_of(marks)
    profile.save(path)
    return _table(profile), path


def _table(profile: Profile) -> Table:
    model = StepTimeModel(profile)
    caption = (
        f"after one of another number of tokens: {profile.change_s * 1e3:.2f} ms more, "
        f"a draft forward {profile.draft_change_s * 1e3:.2f} ms; "
        f"beside the engines a step takes {profile.host_s * 1e3:.2f} ms"
    )
    table = Table(title="Verification: measured and predicted", caption=caption)
    for column in ("tokens", "of them prompt", "context", "measured ms", "predicted ms"):
        table.add_column(column, justify="right")
    for s in profile.verify:
        num_prompt = s.num_tokens - s.num_logit_rows
        chunk = Prompts.chunk(num_prompt, s.context_tokens)
        predicted_s = model.verify_s(s.num_tokens, s.context_tokens, chunk)
        table.add_row(
            str(s.num_tokens),
            str(num_prompt),
            str(s.context_tokens),
            f"{s.seconds * 1e3:.2f}",
            f"{predicted_s * 1e3:.2f}",
        )
    return table
