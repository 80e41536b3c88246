"""What this machine computes fastest in: `python -m bench.machine` prints it."""


def fast_precision() -> str:
    """Return bf16 where OpenVINO finds the arithmetic for it, else f32."""
    import openvino as ov

    has_bf16 = "BF16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return "bf16" if has_bf16 else "f32"


if __name__ == "__main__":
    print(fast_precision())
