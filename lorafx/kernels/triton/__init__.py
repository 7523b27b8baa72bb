"""The Triton provider: fused LoRA kernels for CUDA (and AMD where they compile). Imported only when it is used."""
