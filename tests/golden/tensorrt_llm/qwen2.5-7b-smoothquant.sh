# draft: Qwen/Qwen2.5-0.5B-Instruct, bfloat16, weights int4, KV cache bf16, tensor parallel 1, pipeline parallel 1
# upstream lists FP16, BF16 and FP8 for draft_tokens_external, not int4_wo
# hf download Qwen/Qwen2.5-0.5B-Instruct --local-dir checkpoints/Qwen/Qwen2.5-0.5B-Instruct
python3 /app/examples/models/core/qwen/convert_checkpoint.py --model_dir checkpoints/Qwen/Qwen2.5-0.5B-Instruct --output_dir build/pair/converted/draft --dtype bfloat16 --use_weight_only --weight_only_precision int4 --tp_size 1 --pp_size 1 --workers 1
trtllm-build --checkpoint_dir build/pair/converted/draft --output_dir build/pair/draft --gemm_plugin auto --kv_cache_type paged --use_paged_context_fmha enable --tokens_per_block 32 --max_beam_width 1 --max_batch_size 64 --max_input_len 8192 --max_seq_len 8192 --max_num_tokens 8192 --input_timing_cache build/pair/timing.cache --output_timing_cache build/pair/timing.cache --workers 1
# target: Qwen/Qwen2.5-7B-Instruct, bfloat16, weights int8, KV cache bf16, tensor parallel 1, pipeline parallel 1
# upstream lists FP16, BF16 and FP8 for draft_tokens_external, not int8_sq
# hf download Qwen/Qwen2.5-7B-Instruct --local-dir checkpoints/Qwen/Qwen2.5-7B-Instruct
python3 /app/examples/models/core/qwen/convert_checkpoint.py --model_dir checkpoints/Qwen/Qwen2.5-7B-Instruct --output_dir build/pair/converted/target --dtype bfloat16 --smoothquant 0.5 --per_token --per_channel --calib_dataset /data/cnn_dailymail --tp_size 1 --pp_size 1 --workers 1
trtllm-build --checkpoint_dir build/pair/converted/target --output_dir build/pair/target --gemm_plugin auto --kv_cache_type paged --use_paged_context_fmha enable --tokens_per_block 32 --max_beam_width 1 --max_batch_size 64 --max_input_len 8192 --max_seq_len 8192 --max_num_tokens 8192 --speculative_decoding_mode draft_tokens_external --max_draft_len 8 --input_timing_cache build/pair/timing.cache --output_timing_cache build/pair/timing.cache --workers 1
# both loaded, a token from each, a draft token verified
python3 -m build_engines.tensorrt_llm.self_check build/pair/draft
python3 -m build_engines.tensorrt_llm.self_check build/pair/target
