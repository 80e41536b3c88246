"""One verification in which an error costs only the rows that cause it."""

import logging
from collections.abc import Sequence

from specserve.batch import Batch, Verified
from specserve.engines import EngineLost, TargetEngine

logger = logging.getLogger(__name__)

Chosen = Sequence[Sequence[int]]


def verify(engine: TargetEngine, batch: Batch, chosen: Chosen) -> list[Verified]:
    """Verify, and after an error verify halves of the batch until the rows at fault stand alone.

    Verifying again is harmless: it computes the same tokens at the same positions. See
    `TargetEngine` for arguments and result; a row at fault gets `Verified(failed=True)`.

    Raises:
        Exception: what the engine raised, if no row passes; EngineLost at once.
    """
    outputs, error = _verify_halves(engine, batch, chosen)
    if error is not None and all(output.failed for output in outputs):
        raise error
    return outputs


def _verify_halves(
    engine: TargetEngine, batch: Batch, chosen: Chosen
) -> tuple[list[Verified], Exception | None]:
    """Return the results and, if there was one, the last error."""
    try:
        return engine.verify(batch, chosen), None
    except EngineLost:
        raise
    except Exception as error:
        if len(batch.rows) == 1:
            logger.exception("verifying request %d failed", batch.rows[0].key)
            return [Verified(failed=True)], error
    middle = len(batch.rows) // 2
    first, error_first = _verify_halves(engine, Batch(batch.rows[:middle]), chosen[:middle])
    rest, error_rest = _verify_halves(engine, Batch(batch.rows[middle:]), chosen[middle:])
    return first + rest, error_rest or error_first
