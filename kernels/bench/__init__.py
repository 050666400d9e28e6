"""Measure the kernels: `python -m kernels.bench`. cases.py lists what; machine_code.py needs no GPU."""
