"""Triton kernels for NVIDIA GPUs, sm_80 and newer. Each has its launcher and its float64 twin beside it.

Installed as `mnv2_fast.kernels`; a bare checkout may import it as `kernels`. Imports torch and triton only.
"""
