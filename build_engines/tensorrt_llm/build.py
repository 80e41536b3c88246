"""The build of a pair: check, run the commands, check again, write manifests, run both engines."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from build_engines.tensorrt_llm import built, toolchain
from build_engines.tensorrt_llm.checks import check_folders, check_plans
from build_engines.tensorrt_llm.families import family_of
from build_engines.tensorrt_llm.models import Model
from build_engines.tensorrt_llm.options import Options
from build_engines.tensorrt_llm.plan import EnginePlan, make_plan
from specserve import manifest as manifests
from specserve.manifest import MANIFEST_FILE


def plan_pair(models: Mapping[str, Model], options: Options, output: Path) -> list[EnginePlan]:
    """Plan both engines, the draft's first, and check that they can be built and fit each other.

    Raises:
        ValueError: naming the value, the limit and the fix.
    """
    for model in models.values():
        family_of(model.checkpoint)  # first: another architecture has other keys
    plans = make_plan(models, options, output)
    check_plans(plans)
    return plans


def build(plans: list[EnginePlan], *, overwrite: bool = False) -> None:
    """Build both engines, write their manifests, load and run both.

    The draft comes first: what is wrong with the installation shows on the small model. Converted
    checkpoints are removed at the end and kept after a failure.

    Raises:
        ValueError: before anything is run if something is missing; if a command fails; or if an
            engine is not what was asked for.
    """
    check_folders(plans, overwrite=overwrite)
    versions = toolchain.check_toolchain(plans)
    for it in plans:
        _make_room(it)
        for command in it.commands:
            toolchain.run(command)
        built.check_built(it)
    tokenizer_dir = plans[-1].model.checkpoint.path
    draft, target = (built.finish(it, tokenizer_dir, versions) for it in plans)
    manifests.check_pair(draft=draft, target=target)
    for it in plans:
        toolchain.run(it.self_check)
    shutil.rmtree(plans[0].converted.parent)


def _make_room(plan: EnginePlan) -> None:
    """Remove an older engine, its manifest first: half of a new one must not look whole."""
    (plan.output / MANIFEST_FILE).unlink(missing_ok=True)
    for file in plan.output.glob("rank*.engine"):
        file.unlink()
    shutil.rmtree(plan.converted, ignore_errors=True)
    plan.output.mkdir(parents=True, exist_ok=True)
    plan.timing_cache.parent.mkdir(parents=True, exist_ok=True)
