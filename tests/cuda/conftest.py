"""What needs a GPU: skipped, with a reason, where there is none."""

from pathlib import Path

import pytest
import torch

from pyrobust.ops import _cuda_module

FOLDER = Path(__file__).parent


def pytest_collection_modifyitems(items):
    reason = None
    if not torch.cuda.is_available():
        reason = "NO CUDA DEVICE: the kernels are tested on the CPU only (tests/native/test_cuda_*)"
    elif not _cuda_module.has_cuda_module():
        reason = "pyrobust._cuda IS NOT BUILT (PYROBUST_CUDA=ON)"
    if reason is not None:
        for item in items:
            if item.path.parent == FOLDER:
                item.add_marker(pytest.mark.skip(reason=reason))
