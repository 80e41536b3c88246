"""Is what comes out distributed as plain decoding of the target, whoever drafts and selects?

Method: the demo pair in f32 serves requests of held-out prompts, each with a seed of its own, eight
at a time. Step times are those of a larger target, by a profile on a virtual clock, so that
policies that weigh time really speculate and really drop drafted tokens. Afterwards the target
reads every text again in one pass, alone, without draft and cache; bench/reference.py turns its
logits into the exact distribution of each token given those before it. One sample against the
truth, no two-sample test, and every output position counts. Two tests, of which the smaller p-value
counts, doubled:

* Each token's place in its distribution (randomised probability integral transform) is uniform and
  independent of the one before: chi-square over 64 cells of successive pairs.
* The likeliest token comes as often as its probability says: chi-square over five strata of that
  probability. A biased selection shows here first.

Sample: 96 requests of 32 tokens in a case, 3072 tokens; twice as many in a control. A case is
rejected below 0.001 over the number of cases (Bonferroni), so that a correct server fails the whole
table once in a thousand sets of seeds; the seeds are fixed, so a result repeats on the same
machine. At a border of top-p, top-k or min-p, rounding could make a token look impossible: its
probability and the border would have to agree to some 1e-6, less than once in ten thousand such
cases. Greedy texts must equal plain decoding token for token.

The check can fail: `control_p_values` holds what must be rejected. *token reader* is the paper's
rule, verify a sampled draft while the drawn token's own probability is above a half, under
rejection sampling by the book. *wrong temperature* judges texts of temperature 0.7 as if of 0.8.
Among the cases, rejection sampling by the book passes where nothing is selected, and our
verification passes even under that rule.

Exits with 1 if a case is rejected, a greedy text differs, or a control passes.

Example: python -m bench.lossless
         python -m bench.lossless --quick
"""

import argparse
import sys
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench.arms import PLAIN
from bench.bench_options import ASSETS
from bench.chi_square import independent_uniforms, likeliest_as_often_as_claimed, transform
from bench.lossless_cases import QUICK, Case, greedy_cases, sampled_cases
from bench.lossless_pair import Pair, Served
from bench.prompts import held_out_prompts
from bench.record import emit
from bench.reference import reference_logits, reference_probs
from bench.textbook import SampledDraftEngine, TextbookSampler, TokenReader, VerifyAll
from specserve.engines.model_target import ModelTargetEngine
from specserve.request import Request
from specserve.sampling_params import SamplingParams

PROMPT_TOKENS = 48
NUM_PROMPTS = 64
FALSE_ALARM = 1e-3  # of the whole table
BY_BOOK = Case("token reader, by the book, T 1", "", "model", [{"temperature": 1.0}])
COOL = Case("wrong temperature, 0.7 for 0.8", "fixed_4", "model", [{"temperature": 0.7}])


class Row(NamedTuple):
    """One line of the table."""

    p_value: float
    served: Served


class Look(NamedTuple):
    """One text against its exact distributions: [output tokens] each.

    Attributes:
        places: see `bench.chi_square.transform`.
        hits: whether the likeliest token was drawn.
        probs: its probability.
    """

    places: NDArray[np.float64]
    hits: NDArray[np.bool_]
    probs: NDArray[np.float64]


def main() -> None:
    """Run all cases, print a table, then one JSON line."""
    options = parse()
    started = time.perf_counter()
    check = Check(options)
    rows, controls = check.sampled(), check.controls()
    mismatches = check.greedy()
    bar = FALSE_ALARM / len(rows)
    rejected = [name for name, row in rows.items() if row.p_value < bar]
    _print(rows, controls, bar)
    emit(
        {
            "bench": "lossless",
            "p_values": {name: row.p_value for name, row in rows.items()},
            "control_p_values": {name: row.p_value for name, row in controls.items()},
            "rejected_below": bar,
            "rejected": rejected,
            "greedy_mismatches": sum(mismatches.values()),
            "greedy_texts": len(mismatches) * options.greedy_texts,
            "greedy_mismatches_by_case": {name: n for name, n in mismatches.items() if n},
            "draft_tokens": {name: row.served.draft_tokens for name, row in rows.items()},
            "wall_s": round(time.perf_counter() - started, 1),
            "config": vars(options),
        },
        options.output,
    )
    missed = [name for name, row in controls.items() if row.p_value >= bar]
    sys.exit(bool(rejected or missed or sum(mismatches.values())))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the options, of the command line if None are given."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="four cases, one greedy")
    parser.add_argument(
        "--requests", type=int, help="of each case, half as many as of a control; 96"
    )
    parser.add_argument("--greedy-texts", type=int, help="of each case; 64")
    parser.add_argument("--max-tokens", type=int, default=32, help="of each request")
    parser.add_argument("--threads", type=int, default=0, help="of each engine; 0 takes all cores")
    parser.add_argument("--profile", type=Path, default=ASSETS / "profile_cpu_0.4b.json")
    parser.add_argument("--output", type=Path, help="append the JSON line to this file")
    options = parser.parse_args(arguments)
    options.requests = options.requests or (32 if options.quick else 96)
    options.greedy_texts = options.greedy_texts or (8 if options.quick else 64)
    return options


class Check:
    """The pair, its prompts, and the cases on them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._pair = Pair(options.profile, options.threads)
        self._prompts = held_out_prompts(self._pair.tokenizer, NUM_PROMPTS, PROMPT_TOKENS)

    def sampled(self) -> dict[str, Row]:
        """Return a row for each case."""
        cases = list(sampled_cases(self._prompts))
        if self._options.quick:
            cases = [case for case in cases if case.name in QUICK]
        rows = {case.name: self.judge(case) for case in track(cases, "sampled", transient=True)}
        return rows | self._by_the_book()

    def controls(self) -> dict[str, Row]:
        """Return what must be rejected."""
        cool = self._pair.serve(self._requests(COOL, 2 * self._options.requests), COOL.arm)
        return {
            BY_BOOK.name: self.token_reader(),
            COOL.name: Row(self.p_value(cool, SamplingParams(temperature=0.8)), cool),
        }

    def token_reader(self) -> Row:
        """Return the control of the paper's rule."""
        draft, by_book = self._textbook()
        requests = self._requests(BY_BOOK, 4 * self._options.requests)
        served = self._pair.serve_with(requests, TokenReader(), draft, by_book)
        return Row(self.p_value(served), served)

    def greedy(self) -> dict[str, int]:
        """Return how many texts differ from plain decoding in each case."""
        cases = list(greedy_cases(self._prompts))[: 1 if self._options.quick else None]
        num_texts = self._options.greedy_texts
        plain = self._pair.serve(self._requests(cases[0], num_texts), PLAIN, num_rows=1)
        mismatches = {}
        for case in track(cases, "greedy", transient=True):
            served = self._serve(case, num_texts)
            pairs = zip(served.output_token_ids, plain.output_token_ids, strict=True)
            mismatches[case.name] = sum(text != expected for text, expected in pairs)
        return mismatches

    def p_value(self, served: Served, claimed: SamplingParams | None = None) -> float:
        """Return how well texts fit the target's distribution.

        Args:
            claimed: what they are judged by; None is what they were asked for.
        """
        random = np.random.default_rng(0)
        texts = [self._look(r, claimed or r.sampling, random) for r in served.requests]
        hits, probs = (np.concatenate(column) for column in list(zip(*texts, strict=True))[1:])
        places = independent_uniforms([text.places for text in texts])
        return min(1.0, 2.0 * min(places, likeliest_as_often_as_claimed(hits, probs)))

    def _look(self, request: Request, params: SamplingParams, random: np.random.Generator) -> Look:
        """Hold each output token against its exact distribution."""
        places, hits, best = [], [], []
        num_prompt = request.num_prompt_tokens
        for i, logits in enumerate(self._pair.logits_of(request), num_prompt):
            known, token_id = request.token_ids[:i], request.token_ids[i]
            probs = reference_probs(reference_logits(logits, params, known, num_prompt), params)
            places.append(transform(probs, token_id, random.random()))
            hits.append(probs.argmax() == token_id)
            best.append(probs.max())
        return Look(np.array(places), np.array(hits), np.array(best))

    def judge(self, case: Case) -> Row:
        served = self._serve(case)
        return Row(self.p_value(served), served)

    def _serve(self, case: Case, num_requests: int = 0) -> Served:
        served = self._pair.serve(self._requests(case, num_requests), case.arm)
        if case.arm != PLAIN and not served.draft_tokens[2]:
            raise RuntimeError(f"{case.name}: no draft token was accepted, which proves nothing")
        return served

    def _by_the_book(self) -> dict[str, Row]:
        """Return the cases whose drafts are drawn independently of the target."""
        draft, by_book = self._textbook()
        requests = self._requests(BY_BOOK), self._requests(BY_BOOK)
        blind = self._pair.serve_with(requests[0], VerifyAll(), draft, by_book)
        ours = self._pair.serve_with(requests[1], TokenReader(), draft, self._pair.target)
        return {
            "by the book, all verified, T 1": Row(self.p_value(blind), blind),
            "token reader, our verification, T 1": Row(self.p_value(ours), ours),
        }

    def _textbook(self) -> tuple[SampledDraftEngine, ModelTargetEngine]:
        draft, target = SampledDraftEngine(self._pair.draft_model), self._pair.target_model
        return draft, ModelTargetEngine(target, TextbookSampler(target, draft))

    def _requests(self, case: Case, num_requests: int = 0) -> list[Request]:
        """Make a case's requests, each with a seed that no other case has."""
        first_seed = zlib.crc32(case.name.encode()) << 32
        return [
            Request(
                self._prompts[i % NUM_PROMPTS],
                self._options.max_tokens,
                SamplingParams(**case.params[i % len(case.params)], seed=first_seed + i),
                draft_source=case.source,
            )
            for i in range(num_requests or self._options.requests)
        ]


def _print(rows: Mapping[str, Row], controls: Mapping[str, Row], bar: float) -> None:
    table = Table(title=f"Rejected below {bar:.1e}; controls must be")
    for column in ("case", "p", "drafted", "verified", "accepted"):
        table.add_column(column, justify="left" if column == "case" else "right")
    for name, row in [*rows.items(), *((f"control: {n}", r) for n, r in controls.items())]:
        mark = " rejected" if row.p_value < bar else ""
        table.add_row(name, f"{row.p_value:.2g}{mark}", *map(str, row.served.draft_tokens))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
