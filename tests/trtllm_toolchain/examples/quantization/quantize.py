from trtllm_toolchain.convert import quantize

quantize()
