"""The folder that a call names: a local one, or a repository of the Hugging Face hub in its local cache.

require_path, safe_path, ...     local folders and their files, and which was meant folders.py
HubPlace, locate                 repositories, fetched by huggingface_hub           hub.py
"""

from gptj.paths.folders import (
    find_beside,
    is_folder,
    kind_of_path,
    likely_folder,
    missing_folder,
    path_called,
    require_path,
    safe_path,
)

__all__ = [
    "find_beside",
    "is_folder",
    "kind_of_path",
    "likely_folder",
    "missing_folder",
    "path_called",
    "require_path",
    "safe_path",
]
