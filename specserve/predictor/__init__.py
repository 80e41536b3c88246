"""One predictor for every decision: how long a step takes, and what is accepted in it."""
