"""What a server must say: plain decoding of the same prompts and seeds, in this process."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from specserve.assemble import assemble
from specserve.config import Config
from specserve.request import Request
from specserve.sampling_params import SamplingParams
from specserve.text import TextStream, encode, load_tokenizer


@dataclass(frozen=True, slots=True)
class Reference:
    """One prompt with its sampling, and the tokens that plain decoding gives.

    Attributes:
        token_ids: of the output, as many as any request may ask for, or up to the end token.
    """

    prompt: str
    sampling: SamplingParams
    token_ids: Sequence[int]
    tokenizer: Tokenizer

    def text(self, max_tokens: int) -> str:
        """Return what a request for so many tokens must get."""
        stream = TextStream(self.tokenizer, (), self.sampling.end_id)
        return stream.push(self.token_ids[:max_tokens]) + stream.finish()


def decode_plainly(
    config: Config, prompts: Sequence[tuple[str, SamplingParams]], max_tokens: int
) -> list[Reference]:
    """Decode all of them; `config` must have policy `none` and the precision of the server."""
    assert config.policy.name == "none", "a reference must not speculate"
    core = assemble(config)
    tokenizer = load_tokenizer(Path(config.engine.dir) / "target")
    requests = [Request(encode(tokenizer, text), max_tokens, how) for text, how in prompts]
    for request in requests:
        core.scheduler.submit(request)
    while core.scheduler.has_work:
        core.step()
    return [
        Reference(text, how, request.token_ids[request.num_prompt_tokens :], tokenizer)
        for (text, how), request in zip(prompts, requests, strict=True)
    ]
