"""Our own decoder: DeepSeek-V3, Llama, Qwen2, Qwen3, Qwen3-MoE."""
