"""CUDA kernels without a GPU: compiled to PTX by NVRTC, and run by a C++ compiler's code on NumPy arrays."""
