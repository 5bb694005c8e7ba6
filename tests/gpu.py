"""What a test carries that needs an NVIDIA GPU, and the devices of one that runs with and
without.
"""

import pytest
import torch

GPU = torch.cuda.is_available()
ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="needs an NVIDIA GPU")]
DEVICES = ["cpu", pytest.param("cuda", marks=ON_GPU)]
