"""Asking clients whether they have gone: fair, and within a share of the time."""

from __future__ import annotations

from collections import Counter

import pytest

from python_backend.turns import Turns
from specserve.engines.simulated import VirtualClock

EVERY_S = 0.01
SHARE = 0.05


def ask_for(seconds: float, num_members: int, ask_s: float) -> Counter[int]:
    """Take turns for a while; return how often each member was asked."""
    clock, asked = VirtualClock(), Counter[int]()
    turns = Turns[int](EVERY_S, SHARE, clock)

    def ask(member: int) -> None:
        asked[member] += 1
        clock.advance(ask_s)

    while clock() < seconds:
        if turns.is_due():
            turns.take(range(num_members), ask)
        clock.advance(0.001)
    return asked


@pytest.mark.parametrize("num_members", [1, 16, 64])
@pytest.mark.parametrize("ask_s", [0.0, 0.0001, 0.001, 0.02])
def test_asking_is_fair_and_takes_its_share_at_most(num_members: int, ask_s: float) -> None:
    asked = ask_for(20.0, num_members, ask_s)
    assert asked.total() * ask_s <= SHARE * 20.0 * 1.05 + ask_s
    assert max(asked.values()) - min(asked[i] for i in range(num_members)) <= 1


def test_what_takes_no_time_is_asked_every_time() -> None:
    assert min(ask_for(1.0, 64, 0.0).values()) >= 0.9 / EVERY_S


def test_nobody_to_ask_is_no_reason_to_ask_all_the_time() -> None:
    clock = VirtualClock()
    turns = Turns[int](EVERY_S, SHARE, clock)
    turns.take([], lambda _: None)
    assert not turns.is_due()
    clock.advance(EVERY_S)
    assert turns.is_due()
