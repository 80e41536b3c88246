"""Does a server keep its word for half an hour of everything at once?

Method: `specserve serve` with its OpenAI endpoint, the demo pair in f32. Clients come over gRPC,
HTTP and the OpenAI endpoint, greedy and sampled with a seed, with objectives, classes and draft
options; a third change their mind. Meanwhile processes are killed and stopped. Every text is
compared with plain decoding in this process, the part that a client got who left too. Every
process's own memory, threads and descriptors are read all the time; growth is the median of the
last quarter less that of the second quarter, of processes that lived half of the time; or a quarter
of it, for the draft and target processes, which are broken all the time but for the last third: in
them OpenVINO keeps kernels of the shapes that it has seen, and they grow until it keeps no more.
Server 2.51 keeps what it had for a model whose process died with a call in it (the idle threads of
the instance, and some memory; without a call nothing stays): `kept_per_fault` of that is taken off
tritonserver's growth for each.

Ends with status 1 unless every request ended in one of the ways it should, nothing runs or is held
at the end, nothing grew, and the server left no process and no shared memory.

Example: python -m bench.soak --minutes 30 --output bench/results/soak.jsonl
"""

import argparse
import asyncio
import contextlib
import re
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.crowd import MAX_TOKENS, Crowd, Tally, render
from bench.fault_injection import MODEL_FAULTS, FaultInjector
from bench.holdings import SHARED_MEMORY, Holdings, holdings, shared_bytes
from bench.prompts import held_out_prompts
from bench.record import emit
from bench.reference_texts import Reference, decode_plainly
from bench.supervised import SERVER_ID, Supervised, supervised
from specserve.config import load_config
from specserve.launch.marked_processes import MarkedProcesses
from specserve.openai.chat_template import load_chat_template
from specserve.sampling_params import SamplingParams
from specserve.text import load_tokenizer

NUM_PROMPTS = 12
PROMPT_TOKENS = (8, 24, 96)
END_ID = 1  # of the demo pair
# Exact in binary32, in which the server is told.
TEMPERATURES = (0.0, 0.75, 1.0)
SAMPLE_S = 5.0
IDLE_S = 30.0
FAULTY_SHARE = 2 / 3  # of the time
LIMITS = Holdings(memory_mib=16.0, num_threads=8, num_descriptors=8)
KEPT_PER_FAULT = Holdings(memory_mib=0.7, num_threads=35, num_descriptors=1)
_RESTARTS = re.compile(
    r"^(?:the process of model '\w+' died|tritonserver (?:was )?ended by [\w ]+"
    r"|model '\w+' (?:has given no answer|was not back)[\w ]*)",
    re.MULTILINE,
)
BAD_OUTCOMES = ("wrong", "broken", "hung")


class Sample(NamedTuple):
    """What a process held at a time, and how many models had been broken by then."""

    time_s: float
    held: Holdings
    num_faults: int


Samples = dict[tuple[str, int], list[Sample]]


def main() -> int:
    """Soak, print one JSON line last; return the exit status."""
    options = _parse()
    config = [f"engine.dir={options.engines}"] if options.engines else []
    plain = load_config(None, [*config, "policy.name=none", "scheduler.kv_cache_tokens=16384"])
    texts, chats = _references(plain)
    overrides = [
        *config, "scheduler.max_waiting_requests=12", "server.target_timeout_s=10",
        "slo.shares={interactive = 4, batch = 1}",
    ]  # fmt: skip
    with supervised(overrides) as server:
        ports = {
            "http": server.http_port, "grpc": server.grpc_port, "openai": server.openai_port
        }  # fmt: skip
        crowd = Crowd(texts, chats, options.seed, ports)
        injector = FaultInjector(server, options.seed)
        samples: Samples = defaultdict(list)
        started_s = time.monotonic()
        asyncio.run(_soak(server, crowd, injector, samples, options))
        seconds = time.monotonic() - started_s
        left = left_at_idle(server)
        shared_mib = shared_bytes(server.server_id()) / 2**20
        metrics, shown = server.metrics(), server.shown()
        left |= _left_after(server)
    growth = {name: _growth(name, lives, seconds) for name, lives in _by_name(samples).items()}
    problems = find_problems(crowd.tally, injector.failures, left, growth)
    emit(
        {
            "bench": "soak",
            "passed": not problems,
            "problems": problems,
            "minutes": round(seconds / 60, 1),
            "requests": crowd.tally.kinds.total(),
            "outcomes": dict(crowd.tally.outcomes),
            "kinds": dict(crowd.tally.kinds),
            "errors": dict(crowd.tally.errors.most_common(40)),
            "examples": crowd.tally.examples,
            "faults": dict(injector.done),
            "longest_repair_s": {name: round(s, 1) for name, s in injector.longest_s.items()},
            "restarts": _RESTARTS.findall(shown),
            "left": left,
            "kept_per_fault": KEPT_PER_FAULT._asdict(),
            "growth": {name: one._asdict() for name, one in growth.items() if one is not None},
            **_series(samples),
            "shared_mib": round(shared_mib, 1),
            "draft_failures": metrics.get("specserve_draft_failures_total"),
            "config": vars(options),
        },
        options.output,
    )
    return 1 if problems else 0


def find_problems(
    tally: Tally,
    not_repaired: Sequence[str],
    left: Mapping[str, float],
    growth: Mapping[str, Holdings | None],
) -> list[str]:
    """Say what is not as it should be, nothing if all is well."""
    problems = [f"{tally.outcomes[name]} {name}" for name in BAD_OUTCOMES if tally.outcomes[name]]
    problems += not_repaired
    problems += [f"{name} is {value:g} at the end" for name, value in left.items() if value]
    for process, one in growth.items():
        for name, value, limit in zip(Holdings._fields, one or (), LIMITS, strict=False):
            if value > limit:
                problems.append(f"{name} of {process} grew by {value:g}: the limit is {limit:g}")
    if not tally.outcomes["finished"]:
        problems.append("no request finished")
    return problems


async def _soak(
    server: Supervised,
    crowd: Crowd,
    injector: FaultInjector,
    samples: Samples,
    options: argparse.Namespace,
) -> None:
    seconds = 60.0 * options.minutes
    sampling = asyncio.create_task(_sample(server, injector, samples))
    faults = asyncio.create_task(injector.run(FAULTY_SHARE * seconds, options.fault_pause_s))
    await crowd.visit(options.clients, asyncio.get_running_loop().time() + seconds)
    await faults
    sampling.cancel()


async def _sample(server: Supervised, injector: FaultInjector, samples: Samples) -> None:
    faults = [f"{model} {number.name}" for model, number in MODEL_FAULTS]
    while True:
        with contextlib.suppress(OSError, IndexError):  # processes go while they are read
            pids = await asyncio.to_thread(server.pids)
            num_faults = sum(injector.done[fault] for fault in faults)
            for name, pid in pids.items():
                samples[name, pid].append(Sample(time.monotonic(), holdings(pid), num_faults))
        await asyncio.sleep(SAMPLE_S)


def _references(config: Any) -> tuple[list[Reference], list[Reference]]:
    """Decode what any request may ask for: texts, and chats in the template of the endpoint."""
    folder = Path(config.engine.dir) / "target"
    tokenizer, template = load_tokenizer(folder), load_chat_template(folder)
    prompts = [
        tokenizer.decode(ids)
        for index, length in enumerate(PROMPT_TOKENS)
        for ids in held_out_prompts(tokenizer, NUM_PROMPTS // len(PROMPT_TOKENS), length, index)
    ]
    hows = [
        SamplingParams(temperature=temperature, seed=seed, end_id=END_ID)
        for seed, temperature in enumerate(TEMPERATURES)
    ]
    chats = [render(template, prompt) for prompt in prompts]
    found = decode_plainly(
        config, [(text, how) for text in [*prompts, *chats] for how in hows], MAX_TOKENS
    )
    return found[: len(found) // 2], found[len(found) // 2 :]


def left_at_idle(server: Supervised) -> dict[str, float]:
    """Wait until the server is idle; return what runs, waits or is held, all 0 if it should."""
    names = ("requests_running", "requests_waiting", "kv_blocks_used")
    deadline = time.monotonic() + IDLE_S
    while True:
        metrics = server.metrics()
        left = {name: metrics[f"specserve_{name}"] for name in names}
        if not any(left.values()) or time.monotonic() > deadline:
            return left
        time.sleep(1.0)


def _left_after(server: Supervised) -> dict[str, float]:
    """Stop the server; return its exit status and what it left."""
    mark = server.server_id()
    status = server.stop()
    return {
        "exit_status": float(status),
        "processes": float(len(MarkedProcesses(SERVER_ID, mark).pids())),
        "shared_memory_regions": float(len(list(SHARED_MEMORY.glob(f"{mark}*")))),
    }


def _by_name(samples: Samples) -> dict[str, list[list[Sample]]]:
    lives = defaultdict(list)
    for (name, _), life in samples.items():
        lives[name].append(life)
    return lives


def _growth(name: str, lives: list[list[Sample]], seconds: float) -> Holdings | None:
    """Return the most that any process of a name grew in a life that was long enough."""
    enough_s = seconds / 4 if name in ("draft", "target") else seconds / 2
    long = [life for life in lives if life[-1].time_s - life[0].time_s >= enough_s]
    if name == "tritonserver":
        grown = [growth_of([without_kept(one) for one in life]) for life in long]
    else:
        grown = [growth_of([one.held for one in life]) for life in long]
    if not grown:
        return None
    return Holdings(*(max(values) for values in zip(*grown, strict=True)))


def without_kept(sample: Sample) -> Holdings:
    """Return what tritonserver held besides what it keeps of broken models."""
    pairs = zip(sample.held, KEPT_PER_FAULT, strict=True)
    return Holdings(*(held - sample.num_faults * kept for held, kept in pairs))


def growth_of(life: Sequence[Holdings]) -> Holdings:
    """Return the median of the last quarter of a life less that of the second quarter."""
    quarter = max(1, len(life) // 4)
    before, after = life[quarter : 2 * quarter], life[-quarter:]
    pairs = zip(zip(*before, strict=True), zip(*after, strict=True), strict=True)
    return Holdings(*(round(statistics.median(b) - statistics.median(a), 1) for a, b in pairs))


def _series(samples: Samples) -> dict[str, dict[str, list[float]]]:
    """Return about ten values of each kind over the longest life of each name."""
    found: dict[str, dict[str, list[float]]] = {field: {} for field in Holdings._fields}
    for name, lives in _by_name(samples).items():
        longest = max(lives, key=len)
        for one in longest[:: max(1, len(longest) // 10)]:
            for field, value in one.held._asdict().items():
                found[field].setdefault(name, []).append(round(value, 1))
    return found


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--fault-pause-s", type=float, default=30.0, help="on average")
    parser.add_argument("--engines", default="", help="folder of a pair; the demo pair if empty")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, help="append the JSON line to this file")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
