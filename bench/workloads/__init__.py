"""What arrives when, how long it is, and what it says: traces, synthetic arrivals, prompts."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request of a trace; seconds since the trace's first."""

    arrival_s: float
    num_prompt_tokens: int
    num_output_tokens: int


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests in order of arrival, the first at 0.

    Attributes:
        note: what was left out of the file, if anything; part of every printed description.
    """

    name: str
    arrivals: list[Arrival]
    note: str = ""
