"""How many tokens a pass is padded to where CUDA graphs are captured: the steps of the staircase.

Knows no framework, so that the profile of step times can look at both sides of every step.
"""


def captured_sizes(max_tokens: int) -> tuple[int, ...]:
    """Return the sizes worth capturing, rising to `max_tokens`.

    From an eighth more to twice as many, one after the other, as the tiles of a GPU go.
    """
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, max_tokens, 64)]
    return (*(size for size in sizes if size < max_tokens), max_tokens)
