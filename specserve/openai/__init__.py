"""The OpenAI endpoint: HTTP in the shapes of OpenAI's API, gRPC to a Triton server behind it.

A process of its own, started by `specserve openai` or beside the server by `specserve serve`. It
knows tensors by name and decides nothing: limits, admission and scheduling are the server's.
"""
