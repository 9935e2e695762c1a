"""A model's way from a folder and back to one, once for all three wings.

    Pretrained                       loading, saving, resizing and counting, for all models       base.py
    prepare, Loading                 the decisions of a load: config, rows, dtype, device         loading.py
    Tapped                           intermediate values by name                                  tapped.py
    Adapted                          LoRA adapters: held, switched, stored and merged             adapted.py
    saving_options                   the options of save_pretrained                               saving.py
    cut_model                        a model on several devices, from a reader of any format       placing.py
    FOREIGN_ARGUMENTS                arguments of transformers that cannot be had here            foreign_arguments.py

Arrays go to a framework one at a time, so that no more than the weights and one tensor are ever in memory.
"""

from gptj.pretrained.base import Pretrained
from gptj.pretrained.foreign_arguments import FOREIGN_ARGUMENTS
from gptj.pretrained.loading import FreshWeightsWarning, Loading, one_dtype, prepare
from gptj.pretrained.placing import cut_model
from gptj.pretrained.saving import saving_options

__all__ = [
    "FOREIGN_ARGUMENTS",
    "FreshWeightsWarning",
    "Loading",
    "Pretrained",
    "cut_model",
    "one_dtype",
    "prepare",
    "saving_options",
]
