"""SpecServe: speculative decoding that adapts to load and keeps each request's latency promise."""
