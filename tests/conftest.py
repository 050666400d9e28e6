"""Without a GPU, Triton's kernels run in its interpreter, and tests marked `gpu` are left out."""

import os

# Small tensors are computed faster by one thread than by several that wait for each other. Both variables are
# read when torch and triton are imported, also by the processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))
