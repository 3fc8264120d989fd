"""The CUDA sources of `kernels/` compiled and loaded: PyTorch operators and TensorRT plugins."""
