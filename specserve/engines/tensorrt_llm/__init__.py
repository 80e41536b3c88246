"""TensorRT-LLM 1.2.1 on NVIDIA GPUs: two compiled engines behind the executor's Python bindings.

The executor owns its KV cache, batches and samples by itself. So here, unlike in other engines:

* Every call sends whole sequences, and lives on the executor's block reuse (`sequences`).
* Drafts are verified for greedy requests only; why, and what else is refused, says `supports`.
* Drafts are deterministic, and end as `step_stop` or `planned_stop` say.

Nothing of TensorRT-LLM is imported before an engine is made; `limits` and `supports` never do.
"""

from typing import TYPE_CHECKING

from specserve.config import Config

if TYPE_CHECKING:
    from specserve.engines.tensorrt_llm.draft import TensorRTLLMDraftEngine
    from specserve.engines.tensorrt_llm.target import TensorRTLLMTargetEngine


def make_draft(config: Config) -> "TensorRTLLMDraftEngine":
    """Load `draft/` of the pair."""
    from specserve.engines.tensorrt_llm import draft

    return draft.load(config)


def make_target(config: Config) -> "TensorRTLLMTargetEngine":
    """Load `target/` of the pair."""
    from specserve.engines.tensorrt_llm import target

    return target.load(config)
