# draft: Qwen/Qwen3-0.6B, bfloat16, weights fp8, KV cache fp8, tensor parallel 1, pipeline parallel 1
# hf download Qwen/Qwen3-0.6B --local-dir checkpoints/Qwen/Qwen3-0.6B
/opt/venv/bin/python /src/TensorRT-LLM/examples/quantization/quantize.py --model_dir checkpoints/Qwen/Qwen3-0.6B --output_dir build/pair/converted/draft --dtype bfloat16 --qformat fp8 --calib_size 512 --calib_dataset /data/cnn_dailymail --tp_size 1 --pp_size 1 --kv_cache_dtype fp8
trtllm-build --checkpoint_dir build/pair/converted/draft --output_dir build/pair/draft --gemm_plugin auto --kv_cache_type paged --use_paged_context_fmha enable --use_fp8_context_fmha enable --tokens_per_block 32 --max_beam_width 1 --max_batch_size 64 --max_input_len 8192 --max_seq_len 8192 --max_num_tokens 8192 --input_timing_cache build/pair/timing.cache --output_timing_cache build/pair/timing.cache --workers 1
# target: Qwen/Qwen3-32B, bfloat16, weights fp8, KV cache fp8, tensor parallel 4, pipeline parallel 1
# hf download Qwen/Qwen3-32B --local-dir checkpoints/Qwen/Qwen3-32B
/opt/venv/bin/python /src/TensorRT-LLM/examples/quantization/quantize.py --model_dir checkpoints/Qwen/Qwen3-32B --output_dir build/pair/converted/target --dtype bfloat16 --qformat fp8 --calib_size 512 --calib_dataset /data/cnn_dailymail --tp_size 4 --pp_size 1 --kv_cache_dtype fp8
trtllm-build --checkpoint_dir build/pair/converted/target --output_dir build/pair/target --gemm_plugin auto --kv_cache_type paged --use_paged_context_fmha enable --use_fp8_context_fmha enable --tokens_per_block 32 --max_beam_width 1 --max_batch_size 64 --max_input_len 8192 --max_seq_len 8192 --max_num_tokens 8192 --speculative_decoding_mode draft_tokens_external --max_draft_len 8 --input_timing_cache build/pair/timing.cache --output_timing_cache build/pair/timing.cache --workers 1
# both loaded, a token from each, a draft token verified
/opt/venv/bin/python -m build_engines.tensorrt_llm.self_check build/pair/draft
mpirun -n 4 --allow-run-as-root /opt/venv/bin/python -m build_engines.tensorrt_llm.self_check build/pair/target
