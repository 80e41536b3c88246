# draft: double7/vicuna-68m, float16, weights int8, KV cache fp16, tensor parallel 1, pipeline parallel 1
# upstream lists FP16, BF16 and FP8 for draft_tokens_external, not int8_wo
# hf download double7/vicuna-68m --local-dir checkpoints/double7/vicuna-68m
python3 /app/examples/models/core/llama/convert_checkpoint.py --model_dir checkpoints/double7/vicuna-68m --output_dir build/pair/converted/draft --dtype float16 --use_weight_only --weight_only_precision int8 --tp_size 1 --pp_size 1 --workers 1
trtllm-build --checkpoint_dir build/pair/converted/draft --output_dir build/pair/draft --gemm_plugin auto --kv_cache_type paged --use_paged_context_fmha enable --tokens_per_block 64 --max_beam_width 1 --max_batch_size 8 --max_input_len 1024 --max_seq_len 1024 --max_num_tokens 2048 --input_timing_cache /cache/h100.cache --output_timing_cache /cache/h100.cache --workers 1
# target: lmsys/vicuna-7b-v1.3, float16, weights int8, KV cache fp16, tensor parallel 1, pipeline parallel 1
# upstream lists FP16, BF16 and FP8 for draft_tokens_external, not int8_wo
# hf download lmsys/vicuna-7b-v1.3 --local-dir checkpoints/lmsys/vicuna-7b-v1.3
python3 /app/examples/models/core/llama/convert_checkpoint.py --model_dir checkpoints/lmsys/vicuna-7b-v1.3 --output_dir build/pair/converted/target --dtype float16 --use_weight_only --weight_only_precision int8 --tp_size 1 --pp_size 1 --workers 1
trtllm-build --checkpoint_dir build/pair/converted/target --output_dir build/pair/target --gemm_plugin auto --kv_cache_type paged --use_paged_context_fmha enable --tokens_per_block 64 --max_beam_width 1 --max_batch_size 8 --max_input_len 1024 --max_seq_len 1024 --max_num_tokens 2048 --speculative_decoding_mode draft_tokens_external --max_draft_len 5 --input_timing_cache /cache/h100.cache --output_timing_cache /cache/h100.cache --workers 1
# both loaded, a token from each, a draft token verified
python3 -m build_engines.tensorrt_llm.self_check build/pair/draft
python3 -m build_engines.tensorrt_llm.self_check build/pair/target
