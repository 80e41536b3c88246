"""Result files into the READMEs: every table between two marks is written anew from its file.

    <!-- results: grid bench/results/grid.jsonl -->      kind and file
    <!-- /results -->

Example: python -m bench.readme
"""

import argparse
import re
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from bench.cells import read_lines
from bench.policy_arms import OURS_WITH_MODEL
from bench.record import ROOT
from bench.report import style
from bench.report.results import ATTAINMENT, LATENCY, OURS, Place, Results, read
from bench.report.tables import Verdict, number, verdict

READMES = (ROOT / "README.md", ROOT / "bench" / "README.md")
RELEASED = "adaspec_released"
SECTION = re.compile(
    r"(?P<head><!-- results: (?P<kind>\w+) (?P<file>\S+) -->\n).*?(?P<end><!-- /results -->)", re.S
)


def main() -> None:
    """Rewrite the files in place."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--readme", type=Path, nargs="+", default=READMES)
    for path in parser.parse_args().readme:
        try:
            text = rewritten(path.read_text(encoding="utf-8"), ROOT)
        except (OSError, ValueError) as error:
            raise SystemExit(f"error: {path}: {error}") from error
        path.write_text(text, encoding="utf-8")
        print(f"rewritten: {path}")


def rewritten(text: str, root: Path) -> str:
    """Return a README with every marked section made from its file, if that is there already.

    Args:
        root: what the files are named from.

    Raises:
        ValueError: no section, an unknown kind, or a file that holds something else.
    """
    if SECTION.search(text) is None:
        raise ValueError("no section between `<!-- results: KIND FILE -->` and `<!-- /results -->`")

    def section(match: re.Match[str]) -> str:
        kind = match["kind"]
        if kind not in KINDS:
            raise ValueError(f"section '{kind}': known are {', '.join(KINDS)}")
        if not (root / match["file"]).is_file():
            return match[0]
        lines = "\n".join(KINDS[kind](root / match["file"]))
        return f"{match['head']}{lines}\n{match['end']}"

    return SECTION.sub(section, text)


def grid(path: Path) -> Iterator[str]:
    """Yield the grid of a file: what was sent, a table, where we are not ahead."""
    for results in read([path]).values():
        yield _workload(results)
        yield ""
        yield from _grid_table(results)
        yield ""
        yield " ".join(_standing(verdict(results, metric)) for metric in (LATENCY, ATTAINMENT))


def peers(path: Path) -> Iterator[str]:
    """Yield the last result of `python -m bench.peers` in a file."""
    tree = _last(path, "peers")
    rates: dict[str, dict[str, Any]] = tree["tokens_per_s"]
    ours, whole = rates["specserve"], rates.get("specserve_whole")
    config = tree["config"]
    yield (
        f"{_machine(tree)}, {config['precision']}, {config['threads']} threads, "
        f"{config['max_tokens']} tokens a request, commit {tree['commit']}, median of "
        f"{config['rounds']} rounds: `{tree['command']}`."
    )
    yield ""
    yield from _row("output tokens/s, requests at once", ours, str)
    yield "|---" * (len(ours) + 1) + "|"
    yield from _row("**specserve**, through Triton gRPC", ours, lambda c: f"**{ours[c]:.0f}**")
    if whole:
        yield from _row("**specserve**, whole answers", ours, lambda c: f"**{whole[c]:.0f}**")
    for name in (name for name in rates if not name.startswith("specserve")):
        arms = dict.fromkeys(arm for row in rates[name].values() for arm in row)
        for arm in arms:
            cells = {c: rates[name].get(c, {}).get(arm) for c in ours}
            texts = {c: "-" if rate is None else f"{rate:.0f}" for c, rate in cells.items()}
            yield from _row(f"{name} {arm}".replace("_", " "), ours, texts.__getitem__)
    against = tree["against_best_genai"]
    yield from _row("specserve / best of OpenVINO GenAI", ours, lambda c: f"{against[c]:.2f}x")
    if whole:
        against = tree["whole_against_best_genai"]
        yield from _row("whole answers / best of GenAI", ours, lambda c: f"{against[c]:.2f}x")


def policies(path: Path) -> Iterator[str]:
    """Yield the last result of `python -m bench.policies` in a file, relative to plain decoding."""
    tree = _last(path, "policies")
    rates: dict[str, dict[str, float]] = tree["tokens_per_s"]
    plain, config = rates["plain"], tree["config"]
    pair = "simulated" if tree["engine"] == "simulated" else config["precision"]
    yield f"{_machine(tree)}, {pair}, commit {tree['commit']}: `{tree['command']}`."
    yield ""
    yield from _row("requests at once", plain, str)
    yield "|---" * (len(plain) + 1) + "|"
    yield from _row("plain decoding, tokens/s", plain, lambda c: f"{plain[c]:.0f}")
    fixed = {arm: row for arm, row in rates.items() if arm.startswith("fixed_")}
    yield from _row("best fixed length", plain, lambda c: _best_fixed(fixed, c, plain[c]))
    for arm, row in rates.items():
        if arm not in ("plain", OURS, *fixed):
            yield from _ratios(style.label(arm), row, plain, "{:.2f}x")
    yield from _ratios(f"**{OURS}**", rates[OURS], plain, "**{:.2f}x**")
    others = [row for arm, row in rates.items() if arm not in (OURS, OURS_WITH_MODEL)]
    best = {c: max(row[c] for row in others) for c in plain}
    yield from _ratios(f"{OURS} / best of all others", rates[OURS], best, "{:.2f}")
    yield from _ratios(f"{OURS} / AdaSpec as released", rates[OURS], rates[RELEASED], "{:.2f}")


def _last(path: Path, bench: str) -> dict[str, Any]:
    """Return the last result of a benchmark in a file."""
    trees = [tree for _, tree in read_lines(path) if tree.get("bench") == bench]
    if not trees:
        raise ValueError(f"{path} has no line of `python -m bench.{bench}`")
    return trees[-1]


def _best_fixed(fixed: dict[str, dict[str, float]], concurrency: str, plain: float) -> str:
    arm, row = max(fixed.items(), key=lambda item: item[1][concurrency])
    return f"{row[concurrency] / plain:.2f}x (k = {arm.removeprefix('fixed_')})"


def _ratios(
    name: str, ours: dict[str, float], theirs: dict[str, float], form: str
) -> Iterator[str]:
    yield from _row(name, theirs, lambda c: form.format(ours[c] / theirs[c]))


KINDS: dict[str, Callable[[Path], Iterator[str]]] = {
    "grid": grid,
    "peers": peers,
    "policies": policies,
}


def _row(name: str, columns: dict[str, Any], entry: Callable[[str], str]) -> Iterator[str]:
    yield f"| {name} | {' | '.join(entry(column) for column in columns)} |"


def _grid_table(results: Results) -> Iterator[str]:
    """Yield a table at the middle SLO scale: mean latency and attainment, the best ones bold."""
    places = [
        Place(trace, scale, load)
        for trace in results.traces
        for scale in [results.middle_scale(trace)]
        for load in results.loads(trace, scale)
    ]
    heads = [f"{trace.removeprefix('azure_2023_')} {load:g}" for trace, _, load in places]
    yield f"| mean latency s, SLO attainment | {' | '.join(heads)} |"
    yield "|---" * (len(places) + 1) + "|"
    best = {(p, m.name): results.best(m, p) for p in places for m in (LATENCY, ATTAINMENT)}
    for policy in results.policies:
        entries = []
        for place in places:
            latency, attained = (results.value(m, place, policy) for m in (LATENCY, ATTAINMENT))
            texts = [
                (LATENCY, "-" if latency is None else number(latency)),
                (ATTAINMENT, "-" if attained is None else f"{attained:.0f}%"),
            ]
            entries.append(
                ", ".join(
                    f"**{text}**" if policy in best[place, metric.name] else text
                    for metric, text in texts
                )
            )
        yield f"| {style.label(policy)} | {' | '.join(entries)} |"


def _workload(results: Results) -> str:
    """Say in a sentence or two what was sent where, by which command."""
    cells = results.all_cells
    first = cells[0]
    info = first.workload
    counts = [cell.workload.num_requests for cell in cells]
    commits = ", ".join(sorted({str(cell.context["commit"]) for cell in cells}))
    seconds = f"{info.window_s:g} s"
    return (
        f"{_machine(first.context)}, commit {commits}: {len(cells)} windows of {seconds} with "
        f"{min(counts)} to {max(counts)} requests; output lengths x {info.length_scale:g}, prompt "
        f"lengths x {info.prompt_scale:g}; arrivals in the trace's rhythm, stretched to loads of "
        f"plain decoding's capacity; {_objective(results)}: `{first.context['command']}`."
    )


def _objective(results: Results) -> str:
    """Say what the TPOT objective of a request was, trace by trace."""
    texts = []
    for trace in results.traces:
        scale = results.middle_scale(trace)
        cell = next(
            c for c in results.all_cells if (c.key.trace, c.key.slo_scale) == (trace, scale)
        )
        slos = "; ".join(
            f"{name} {slo['tpot_ms']:.0f} ms" if slo["tpot_ms"] else f"{name} none"
            for name, slo in cell.workload.slo.items()
        )
        texts.append(f"{trace.removeprefix('azure_2023_')} {slos}")
    return f"TPOT objective {', '.join(texts)}"


def _standing(result: Verdict) -> str:
    """Say where our policy is ahead and where it is not."""
    name, num = result.metric.name, len(result.duels)
    text = f"{OURS} has the best {name} in {result.num_won()} of {num} cells"
    if not result.lost:
        return f"{text}."
    clear = sum(bool(duel.is_clear) for duel in result.lost)
    sure = (
        f"{clear} of them by more than chance"
        if result.has_intervals
        else "too few repeats to say how much of it is chance"
    )
    others = [
        f"{other} in {len(list(duels))}"
        for other, duels in groupby(sorted(duel.other for duel in result.lost))
    ]
    return f"{text}; ahead of it: {', '.join(others)}; {sure}."


def _machine(tree: dict[str, Any]) -> str:
    machine = tree["machine"]
    devices = [device["name"] for device in (tree.get("gpu") or {}).get("devices", [])]
    return ", ".join([*devices, f"{machine['num_cores']} cores ({machine['cpu']})"])


if __name__ == "__main__":
    main()
