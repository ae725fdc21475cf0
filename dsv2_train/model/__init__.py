"""The model: DeepSeek-V2 in megatron-core's slots."""
