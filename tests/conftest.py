"""Small tensors are computed faster by one thread than by several that wait for each other."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, and for the processes that tests start
