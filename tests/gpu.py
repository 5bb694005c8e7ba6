"""Marks of tests that need an NVIDIA GPU, and devices of tests that run on CPU and GPU."""

import pytest
import torch

GPU = torch.cuda.is_available()
ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="needs an NVIDIA GPU")]
DEVICES = ["cpu", pytest.param("cuda", marks=ON_GPU)]
