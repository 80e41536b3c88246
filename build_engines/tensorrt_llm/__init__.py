"""The TensorRT-LLM engine folders of a pair, made by TensorRT-LLM 1.2.1's own scripts.

Both engines of a pair are built in one go, as their limits must agree. `plan.py` says which
commands make them, `checks.py` what must hold before, `built.py` after, and `build.py` does it. Not
run on hardware yet.
"""
