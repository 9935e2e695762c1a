"""LoRA adapters: low-rank additions to a model's matrices, held, trained, stored and merged apart from it.

    AdapterConfig                    the fields of PEFT's adapter_config.json that mean something here   config.py
    adapter_rows, AdapterRow         every pair of matrices that an adapter has for a model              rows.py
    initial_arrays                   their start values, the same bits in all three wings                rows.py
    read_adapter, write_adapter      a folder as PEFT writes and reads it                                files.py
    merge_kernel                     W + scale B A, rounded once                                         merge.py
    merge_folder                     a checkpoint with an adapter merged into it, tensor by tensor       merge.py

Hu et al. 2021, arXiv:2106.09685: y = W x + scale B (A x), with A (r, in), B (out, r) and scale = lora_alpha / r, or
lora_alpha / sqrt(r) with `use_rslora` (Kalajdzievski 2023, arXiv:2312.03732).
"""

from gptj.adapters.config import TARGETS, AdapterConfig
from gptj.adapters.files import ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE, Adapter, read_adapter, write_adapter
from gptj.adapters.merge import merge_folder, merge_kernel
from gptj.adapters.rows import AdapterRow, adapter_rows, initial_arrays

__all__ = [
    "ADAPTER_CONFIG_FILE",
    "ADAPTER_WEIGHTS_FILE",
    "TARGETS",
    "Adapter",
    "AdapterConfig",
    "AdapterRow",
    "adapter_rows",
    "initial_arrays",
    "merge_folder",
    "merge_kernel",
    "read_adapter",
    "write_adapter",
]
