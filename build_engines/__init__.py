"""Checkpoints to engines: everything that happens before serving.

    python -m build_engines openvino      one checkpoint -> one OpenVINO engine folder
    python -m build_engines torch         one checkpoint -> one torch engine folder
    python -m build_engines tensorrt_llm  target and draft -> a pair folder for NVIDIA GPUs
    python -m build_engines pair          target and draft -> a pair folder, checked
    python -m build_engines inflate       a wider, deeper checkpoint with the same logits
    python -m build_engines bench-target  the 0.4 G benchmark pair, made from the demo pair
    python -m build_engines gpu-pair      the 7 B benchmark pair for GPUs, made from the demo pair
    python -m build_engines train         the demo pair, from nothing but Python's own library
    python -m build_engines measure       held-out loss and acceptance of a pair

An engine folder holds the engine, its tokenizer and a `manifest.json` (`specserve/manifest.py`); a
pair folder holds `target/` and `draft/`. Each kind of engine has one module named after it:
`openvino.py` and `torch.py` with `build`, `describe` and `check_forward` for one engine, and
`tensorrt_llm/`, which builds pairs. The modules share their names with packages: absolute imports
only, and never run such a file as a script.
"""
