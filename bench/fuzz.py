"""Does a server survive a hundred thousand inputs that no sane client sends?

Method: `specserve serve` with its OpenAI endpoint. Each way in gets its share of the inputs from a
process of its own, drawn by hypothesis: tensors of every name with other types, shapes, values and
bytes over gRPC; JSON that is none; protobuf that is none; HTTP that is none. Bad is an answer that
blames the server for what the client did, silence, and one that tells something internal. Server
2.51's own front end answers some broken JSON with 500 before any code of ours: that is counted by
itself. What the schema of the OpenAI endpoint allows is tried by
`SPECSERVE_FUZZ_EXAMPLES=20000 pytest tests/test_openai_fuzz.py`.

Ends with status 1 unless there is nothing bad, no process was started again, nothing runs or is
held at the end, and nothing grew.

Example: python -m bench.fuzz --inputs 100000 --output bench/results/fuzz.jsonl
"""

import argparse
import multiprocessing
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import grpc

from bench.fuzz_targets import Findings, Target, ways
from bench.holdings import Holdings, holdings
from bench.record import emit
from bench.soak import left_at_idle
from bench.supervised import Supervised, supervised

SHARES = (0.3, 0.25, 0.15, 0.15, 0.15)  # in the order of `ways`
WARM_UP_SHARE = 0.1
# OpenVINO keeps a kernel for each shape it has seen, so that its processes grow for a while.
LIMITS = Holdings(memory_mib=24.0, num_threads=8, num_descriptors=8)
ENGINES = ("draft", "target")


def main() -> int:
    """Send everything, print one JSON line last; return the exit status."""
    options = _parse()
    with supervised([f"engine.dir={options.engines}"] if options.engines else []) as server:
        started_s = time.monotonic()
        findings = Findings()
        pids = server.pids()
        _send(server, options.inputs * WARM_UP_SHARE, findings)
        before = _held(server, pids)
        _send(server, options.inputs * (1.0 - WARM_UP_SHARE), findings)
        seconds = time.monotonic() - started_s
        left = left_at_idle(server)
        after = _held(server, pids)
        restarts = sorted(pids.keys() - after.keys())
        said = server.shown()[-2000:] if restarts else ""
    grown = {name: _growth(before[name], held) for name, held in after.items() if name in before}
    problems = find_problems(findings, restarts, left, grown)
    emit(
        {
            "bench": "fuzz",
            "passed": not problems,
            "problems": problems,
            "inputs": sum(answers.total() for answers in findings.answers.values()),
            "minutes": round(seconds / 60, 1),
            "answers": {kind: dict(answers) for kind, answers in findings.answers.items()},
            "bad": findings.num_bad,
            "examples": findings.examples,
            "left": left,
            "said": said,
            "growth": {name: one._asdict() for name, one in grown.items()},
            "config": vars(options),
        },
        options.output,
    )
    return 1 if problems else 0


def find_problems(
    findings: Findings,
    restarts: Sequence[str],
    left: Mapping[str, float],
    grown: Mapping[str, Holdings],
) -> list[str]:
    """Say what is not as it should be, nothing if all is well."""
    problems = [f"{findings.num_bad} bad answers"] if findings.num_bad else []
    problems += [f"the process of {name} is another one" for name in restarts]
    problems += [f"{name} is {value:g} at the end" for name, value in left.items() if value]
    for process, one in grown.items():
        for name, value, limit in zip(Holdings._fields, one, LIMITS, strict=True):
            if value > limit and not (process in ENGINES and name == "memory_mib"):
                problems.append(f"{name} of {process} grew by {value:g}: the limit is {limit:g}")
    return problems


def _send(server: Supervised, num_inputs: float, findings: Findings) -> None:
    """Send so many inputs over all ways at once; hypothesis is for one thread of a process."""
    ports = (server.http_port, server.grpc_port, server.openai_port)
    jobs = [(*ports, index, round(share * num_inputs)) for index, share in enumerate(SHARES)]
    spawn = multiprocessing.get_context("spawn")  # gRPC does not survive a fork
    with ProcessPoolExecutor(len(jobs), mp_context=spawn) as pool:
        for one in pool.map(_send_one_way, jobs):
            for kind, answers in one.answers.items():
                findings.answers.setdefault(kind, type(answers)()).update(answers)
            findings.examples += one.examples
            findings.num_bad += one.num_bad


def _send_one_way(job: tuple[int, int, int, int, int]) -> Findings:
    http_port, grpc_port, openai_port, index, num_inputs = job
    with grpc.insecure_channel(f"127.0.0.1:{grpc_port}") as channel:
        target = Target(http_port, openai_port, channel)
        ways(target)[index](max(1, num_inputs))
        return target.findings


def _held(server: Supervised, pids: Mapping[str, int]) -> dict[str, Holdings]:
    """Look at those of the processes that still run."""
    now = server.pids()
    return {name: holdings(pid) for name, pid in pids.items() if now.get(name) == pid}


def _growth(before: Holdings, after: Holdings) -> Holdings:
    return Holdings(*(round(b - a, 1) for a, b in zip(before, after, strict=True)))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--engines", default="", help="folder of a pair; the demo pair if empty")
    parser.add_argument("--output", type=Path, help="append the JSON line to this file")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
