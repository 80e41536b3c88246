"""The arithmetic that a benchmark takes unless told otherwise: bf16 where this CPU has it.

python -m bench.precision        prints it
"""


def native_precision() -> str:
    """Return the smallest precision that OpenVINO runs on this CPU; bf16 without OpenVINO."""
    try:
        from specserve.engines.openvino import supported_precisions
    except ModuleNotFoundError:  # torch on a GPU
        return "bf16"
    return supported_precisions()[-1]


if __name__ == "__main__":
    print(native_precision())
