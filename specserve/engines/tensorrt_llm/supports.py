"""What of a request the executor cannot keep, said before it runs. Imports no engine.

Read from TensorRT-LLM's sources of the 1.2 era, for targets built with `draft_tokens_external`:

* A draft token is accepted iff the target drew the same. After a rejection the executor draws from
  the target's distribution once more, and not what it had drawn: a drafted token of probability p
  comes out with p + (1 - p) p. That is exact where p is 0 or 1, for greedy requests, and wrong for
  all others; so only greedy requests are speculated on, and a sampled one that asks for drafts by
  number is refused. Plainly decoded, output position i of a sampled request has a call and a seed
  of its own, so the same seed gives the same text here too.
* This mode's sampling knows no min-p, computes no log-probabilities, and cuts `top_k` to 1024.
* Presence and frequency count all tokens of a call but the first `prompt_ignore_length`; without
  that parameter the prompt would count too. The repetition penalty means prompt and output anyway.
"""

from collections.abc import Callable

from specserve.request import Request

MAX_TOP_K = 1024


def make_supports(prompt_ignore_length: bool) -> Callable[[Request], str | None]:
    """Return what names the parameter that cannot be kept, and why; None for a fine request."""

    def supports(request: Request) -> str | None:
        params = request.sampling
        if request.num_draft_tokens and not params.is_greedy:
            return (
                f"num_draft_tokens is {request.num_draft_tokens} with temperature "
                f"{params.temperature:g}: tensorrt_llm would change the distribution of sampled "
                "tokens by verifying drafts; leave num_draft_tokens out, or set temperature to 0"
            )
        if params.min_p > 0.0 and not params.is_greedy:
            return (
                f"min_p is {params.min_p:g}: tensorrt_llm ignores it in engines that verify "
                "drafts; use top_p or top_k"
            )
        if params.top_k > MAX_TOP_K and not params.is_greedy:
            return (
                f"top_k is {params.top_k}: tensorrt_llm keeps at most {MAX_TOP_K} tokens; "
                "lower it, or set 0 to keep all"
            )
        if params.return_log_probs:
            return (
                "return_log_probs is true: tensorrt_llm computes no log-probabilities in engines "
                "that verify drafts; leave it out"
            )
        return None if prompt_ignore_length else _counts_the_prompt(request)

    return supports


def _counts_the_prompt(request: Request) -> str | None:
    params = request.sampling
    for name in ("presence_penalty", "frequency_penalty"):
        value = getattr(params, name)
        if value != 0.0:
            return (
                f"{name} is {value:g}: this tensorrt_llm would count the prompt's tokens too; use "
                "repetition_penalty, or a version with prompt_ignore_length and set "
                "tensorrt_llm.prompt_ignore_length"
            )
    return None
