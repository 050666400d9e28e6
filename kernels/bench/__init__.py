"""Measuring the kernels beside their references and the hardware."""
