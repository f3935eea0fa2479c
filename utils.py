"""The published helpers, from tdpo.utils."""

from tdpo.utils import disable_dropout, formatted_dict, get_local_dir, pad_to_length

__all__ = ["disable_dropout", "formatted_dict", "get_local_dir", "pad_to_length"]
