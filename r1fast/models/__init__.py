"""Single-device decoders (DeepSeek-V3, Llama, Qwen2, Qwen3, Qwen3-MoE), their key-value cache and checkpoints."""
