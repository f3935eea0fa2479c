"""The helpers of the published code under their published module name; they live in tdpo/utils.py."""

from tdpo.utils import (
    TemporarilySeededRandom,
    all_gather_if_needed,
    disable_dropout,
    formatted_dict,
    get_block_class_from_model,
    get_local_dir,
    get_local_run_dir,
    get_open_port,
    pad_to_length,
    print_gpu_memory,
    rank0_print,
    slice_and_move_batch_for_device,
)

__all__ = [
    "TemporarilySeededRandom",
    "all_gather_if_needed",
    "disable_dropout",
    "formatted_dict",
    "get_block_class_from_model",
    "get_local_dir",
    "get_local_run_dir",
    "get_open_port",
    "pad_to_length",
    "print_gpu_memory",
    "rank0_print",
    "slice_and_move_batch_for_device",
]
