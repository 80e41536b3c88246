"""The process side of `specserve serve`: start the embedded Triton server, watch it, stop it.

Nothing here knows what the models do; scheduling and policy reach them through one config file.
"""
