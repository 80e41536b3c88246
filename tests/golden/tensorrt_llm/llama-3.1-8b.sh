# draft: meta-llama/Llama-3.2-1B-Instruct, bfloat16, weights bf16, KV cache bf16, tensor parallel 1, pipeline parallel 1
# hf download meta-llama/Llama-3.2-1B-Instruct --local-dir checkpoints/meta-llama/Llama-3.2-1B-Instruct
python3 /app/examples/models/core/llama/convert_checkpoint.py --model_dir checkpoints/meta-llama/Llama-3.2-1B-Instruct --output_dir build/pair/converted/draft --dtype bfloat16 --tp_size 1 --pp_size 1 --workers 1
trtllm-build --checkpoint_dir build/pair/converted/draft --output_dir build/pair/draft --gemm_plugin auto --kv_cache_type paged --use_paged_context_fmha enable --tokens_per_block 32 --max_beam_width 1 --max_batch_size 64 --max_input_len 8192 --max_seq_len 8192 --max_num_tokens 8192 --input_timing_cache build/pair/timing.cache --output_timing_cache build/pair/timing.cache --workers 1
# target: meta-llama/Llama-3.1-8B-Instruct, bfloat16, weights bf16, KV cache bf16, tensor parallel 1, pipeline parallel 1
# hf download meta-llama/Llama-3.1-8B-Instruct --local-dir checkpoints/meta-llama/Llama-3.1-8B-Instruct
python3 /app/examples/models/core/llama/convert_checkpoint.py --model_dir checkpoints/meta-llama/Llama-3.1-8B-Instruct --output_dir build/pair/converted/target --dtype bfloat16 --tp_size 1 --pp_size 1 --workers 1
trtllm-build --checkpoint_dir build/pair/converted/target --output_dir build/pair/target --gemm_plugin auto --kv_cache_type paged --use_paged_context_fmha enable --tokens_per_block 32 --max_beam_width 1 --max_batch_size 64 --max_input_len 8192 --max_seq_len 8192 --max_num_tokens 8192 --speculative_decoding_mode draft_tokens_external --max_draft_len 8 --input_timing_cache build/pair/timing.cache --output_timing_cache build/pair/timing.cache --workers 1
# both loaded, a token from each, a draft token verified
python3 -m build_engines.tensorrt_llm.self_check build/pair/draft
python3 -m build_engines.tensorrt_llm.self_check build/pair/target
