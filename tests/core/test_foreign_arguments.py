"""The table of transformers' arguments: what is so anyway passes, everything else says why not and what to do."""

import pytest

from gptj.errors import InputError
from gptj.pretrained import saving_options
from gptj.pretrained.foreign_arguments import FOREIGN_ARGUMENTS, place_of, take_foreign_arguments
from gptj.writing.shards import shard_bytes


@pytest.mark.parametrize("name", FOREIGN_ARGUMENTS)
def test_each_is_accepted_with_what_is_so_anyway_and_else_refused_with_a_way_to_go(name):
    foreign = FOREIGN_ARGUMENTS[name]
    for value in (None, *foreign.so_anyway):
        assert take_foreign_arguments({name: value, "n_layer": 2}) == {"n_layer": 2}
    with pytest.raises(InputError) as caught:
        take_foreign_arguments({name: "something else"})
    message = str(caught.value)
    assert message.startswith(f"{name}: not supported: {foreign.reason}") and message.endswith(foreign.hint)
    assert "found something else" in message.replace("'", "") and "\n" not in message


@pytest.mark.parametrize(
    ("name", "way"),
    [("tp_plan", "strategy="), ("device_mesh", "mesh="), ("max_memory", "mesh="), ("torchscript", "gptj export"),
     ("adapter_kwargs", "model.load_adapter"), ("use_fast", "Leave it out")],
)  # fmt: skip
def test_the_way_to_go_is_what_the_wings_have(name, way):
    assert way in FOREIGN_ARGUMENTS[name].hint


@pytest.mark.parametrize(
    ("given", "place"),
    [(None, None), ("auto", "auto"), ("cpu", "cpu"), ("cuda", "cuda"), (1, "cuda:1"), ({"": "cpu"}, "cpu"),
     ({"": 0}, "cuda:0"), ({"transformer": "cuda:1", "lm_head": "cuda:1"}, "cuda:1"), ("gpu:0", "cuda:0")],
)  # fmt: skip
def test_a_device_map_is_one_place(given, place):
    assert place_of(given) == place


@pytest.mark.parametrize("given", ["meta", "disk", True, -1, "cuda:x", {}, {"a": 0, "b": 1}, "sequential"])
def test_another_device_map_is_refused(given):
    with pytest.raises(InputError, match="device_map"):
        place_of(given)


@pytest.mark.parametrize(("size", "expected"), [("5GB", 5 * 10**9), ("200MB", 2 * 10**8), ("1GiB", 2**30), (77, 77)])
def test_a_size_of_shards_is_read(size, expected):
    assert shard_bytes(size) == saving_options(1, {"max_shard_size": size}) == expected


@pytest.mark.parametrize("size", ["", "GB", "-1GB", "5 parsecs", True, 0, "0MB"])
def test_what_is_no_size_is_refused(size):
    with pytest.raises(InputError, match="max_shard_size"):
        shard_bytes(size)
