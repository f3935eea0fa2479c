"""Settings of PyTorch on GPUs, the same in every command. They have no effect on a CPU. This file imports torch alone."""

import os

import torch


def prepare_gpu() -> None:
    """Set how GPUs compute attention and float32 matrix products. Called before a model is built."""
    # cuDNN's attention gives NaN gradients at some lengths if there is a mask (pytorch#196678), and makes a plan for every new shape.
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cuda.matmul.allow_tf32 = True  # as published: float32 matrix products use TF32


def allocate_in_segments() -> None:
    """Let PyTorch's memory on a GPU grow in place: microbatches have other sizes every time, and would leave gaps. Called before a GPU is
    used; a setting that the user has made stays."""
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & set(os.environ):
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
