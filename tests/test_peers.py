"""The peers on the demo pair: all of them do the same job, and the result says who was faster."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.peers import Load, Peer, Run
from bench.peers import __main__ as peers_main
from bench.prompts import held_out_prompts
from specserve.launch.installation import find_installation
from specserve.text import load_tokenizer

genai = pytest.importorskip("openvino_genai", reason="the extra `peers` is not installed")
MAX_TOKENS = 16
Peers = dict[str, Peer]


@pytest.fixture(scope="module")
def options(demo_engines: Path) -> Namespace:
    """What a run on the demo pair would be given; in f32 greedy texts are the same for all."""
    return peers_main.parse(
        f"--engines {demo_engines} --checkpoints {demo_engines.parent} --precision f32 "
        "--threads 1 --concurrency 1 2 --rounds 1 --warmup-rounds 0 --max-tokens 4 "
        "--requests 1 --min-requests 4".split()
    )


@pytest.fixture(scope="module")
def peers(options: Namespace, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peers]:
    """All peers, loaded."""
    if find_installation() is None:
        pytest.skip("nvidia-pytriton is not installed")
    with peers_main.loaded(options, tmp_path_factory.mktemp("peers")) as everything:
        yield everything


@pytest.mark.triton
@pytest.mark.openvino
@pytest.mark.torch
def test_every_arm_of_every_peer_writes_the_same_texts(peers: Peers, demo_engines: Path) -> None:
    prompts = held_out_prompts(load_tokenizer(demo_engines / "target"), 3, 24)
    load = Load(prompts, concurrency=2, max_tokens=MAX_TOKENS)
    expected = peers["specserve"].run("specserve", load).texts
    assert len(set(expected)) == len(prompts), "prompts are too alike to tell answers apart"
    for name, peer in peers.items():
        for arm in peer.arms:
            run = peer.run(arm, load)
            assert run.num_tokens == len(prompts) * MAX_TOKENS, f"{name} {arm}"
            assert run.texts == expected, f"{name} {arm}"


@pytest.mark.triton
@pytest.mark.openvino
@pytest.mark.torch
def test_result_is_one_json_line_printed_last(
    peers: Peers, options: Namespace, capsys: pytest.CaptureFixture[str]
) -> None:
    peers_main.compare({n: p for n, p in peers.items() if n != "transformers"}, options)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    rates = result["tokens_per_s"]
    assert rates["specserve"].keys() == rates["specserve_whole"].keys() == {"1", "2"}
    arms = {"plain", "fixed_2", "fixed_4", "fixed_6", "fixed_8", "threshold_0.4"}
    arms |= {"lookup_2", "lookup_4", "lookup_8"}
    assert all(rates["openvino_genai"][c].keys() == arms for c in ("1", "2"))
    for c, ratio in result["against_best_genai"].items():
        best = max(rates["openvino_genai"][c].values())
        assert ratio == pytest.approx(rates["specserve"][c] / best, abs=0.001)
        whole = result["whole_against_best_genai"][c]
        assert whole == pytest.approx(rates["specserve_whole"][c] / best, abs=0.001)


def test_medians_are_over_rounds_and_compared_with_the_best_arm() -> None:
    columns = {
        1: {("specserve", "specserve"): [30.0, 10.0, 20.0], ("openvino_genai", "plain"): [8.0],
            ("openvino_genai", "fixed_4"): [16.0], ("transformers", "default"): [4.0]},
        4: {("specserve", "specserve"): [50.0], ("openvino_genai", "plain"): [40.0]},
    }  # fmt: skip
    medians = peers_main._medians(columns)
    assert medians == {
        "specserve": {"1": 20.0, "4": 50.0},
        "openvino_genai": {"1": {"plain": 8.0, "fixed_4": 16.0}, "4": {"plain": 40.0}},
        "transformers": {"1": {"default": 4.0}},
    }
    assert peers_main._against(medians, "openvino_genai") == {"1": 1.25, "4": 1.25}


def test_peer_that_stops_early_is_refused() -> None:
    class Lazy:
        arms = ("plain",)
        max_concurrency = 1

        def run(self, arm: str, load: Load) -> Run:
            return Run(7, 1.0, [])

    with pytest.raises(RuntimeError, match="plain gave 7 tokens instead of 8"):
        peers_main._tokens_per_s(Lazy(), "plain", Load([[1], [2]], 1, 4))
