"""Everything that speaks Triton: tensors to requests, responses, cancellation, BLS. No scheduling.

`triton_python_backend_utils` exists only inside Triton's stub process; modules import it at the top
because nothing else may import them.
"""
