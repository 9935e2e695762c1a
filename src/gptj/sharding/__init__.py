"""A model on several devices: one table of what is cut where, and what each device then holds.

table.py    strategies, meshes, the part of each tensor that a process holds    Mesh, Strategy, Placement
processes.py which of how many processes this is                               Processes
watch.py    a process that is silent                                            Watch, silence_seconds
plan.py     memory of each device, per strategy: arithmetic alone               plan_memory
"""

from gptj.sharding.processes import (
    Processes,
    ReadTogether,
    environment_place,
    interface_of,
    join_seconds,
    leave_in_order,
    own_address,
    require_same,
)
from gptj.sharding.relay import Relay
from gptj.sharding.table import (
    MESH_AXES,
    STRATEGIES,
    Mesh,
    MeshAxis,
    Partition,
    Placement,
    ReadPart,
    Strategy,
    check_decodes,
    check_mesh,
    check_rows,
    check_strategy,
    choose_mesh,
    held_by_one,
    partition_of,
    slices,
)
from gptj.sharding.watch import Keys, Watch, silence_seconds

__all__ = [
    "MESH_AXES",
    "STRATEGIES",
    "Keys",
    "Mesh",
    "MeshAxis",
    "Partition",
    "Placement",
    "Processes",
    "ReadPart",
    "ReadTogether",
    "Relay",
    "Strategy",
    "Watch",
    "check_decodes",
    "check_mesh",
    "check_rows",
    "check_strategy",
    "choose_mesh",
    "environment_place",
    "held_by_one",
    "interface_of",
    "join_seconds",
    "leave_in_order",
    "own_address",
    "partition_of",
    "require_same",
    "silence_seconds",
    "slices",
]
