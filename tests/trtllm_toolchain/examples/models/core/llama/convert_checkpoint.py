from trtllm_toolchain.convert import convert_checkpoint

convert_checkpoint("llama")
