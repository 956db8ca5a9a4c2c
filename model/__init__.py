"""DeepSeek-V2/V3 with MTP modules: configuration, checkpoints, and the model in torch, on the CPU engine, on GPUs."""
