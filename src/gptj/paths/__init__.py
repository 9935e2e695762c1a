"""The folder that a call names: a local one, or a repository of the Hugging Face hub in its local cache.

require_path, missing_folder     local folders, and which was meant                 folders.py
HubPlace, locate                 repositories, fetched by huggingface_hub           hub.py
"""

from gptj.paths.folders import (
    is_folder,
    likely_folder,
    missing_folder,
    require_path,
)

__all__ = [
    "is_folder",
    "likely_folder",
    "missing_folder",
    "require_path",
]
