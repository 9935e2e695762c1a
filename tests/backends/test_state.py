"""The state of a model: each public fact after it was made, made without values, loaded and prepared, in every wing.

The expected values are written once, so the three wings agree by agreeing with them. Names of dtypes and devices are
each framework's own objects, and are compared by name.
"""

import numpy as np
import pytest

from gptj.config import GPTJConfig
from gptj.config.rotary import rotary_table
from gptj.config.schema import HEADS, schema
from gptj.errors import InputError
from gptj.parity.revealing import revealing_config

CONFIG = revealing_config()
STATES = [(head, state) for head in HEADS for state in ("made", "without values", "loaded")]
PREPARED = [("causal_lm", "prepared"), ("causal_lm", "loaded for inference")]
EVERY_STATE = pytest.mark.parametrize(("head", "state"), [*STATES, *PREPARED])
IDS = np.arange(6).reshape(1, 6)

WORDS = (
    "the model is prepared for inference, which cannot be undone. Load the folder once more, without inference=True "
    "and without prepare_for_inference"
)
"""The refusal, true in every wing: in some the parameters are still there as the file has them, in some not."""


@pytest.fixture
def model_in(wing, folder):
    """A new model of a head in a state."""

    def make(head, state):
        model_class = wing.model(head)
        if state == "made":
            return model_class(revealing_config(), seed=3)
        if state == "without values":
            return model_class(revealing_config(), _do_init=False)
        if state == "prepared":
            return model_class.from_pretrained(folder(head)).prepare_for_inference()
        return model_class.from_pretrained(folder(head), inference=state == "loaded for inference")

    return make


def count(head):
    return sum(row.size for row in schema(CONFIG, head))


def name_of(dtype):
    return str(getattr(dtype, "name", dtype)).removeprefix("torch.")


@EVERY_STATE
def test_facts_are_the_same(wing, model_in, head, state):
    model = model_in(head, state)
    assert (model.head, model.base_model_prefix, model.main_input_name) == (head, "transformer", "input_ids")
    labels = 2 if (head, state) == ("question_answering", "loaded") else CONFIG.num_labels  # a folder's head says it
    assert model.config_class is GPTJConfig
    assert model.config == CONFIG.replace(extra=model.config.extra, num_labels=labels)
    assert model.can_generate() == (head == "causal_lm") and model.num_labels == labels
    assert type(model.base_model) is wing.model("base") and model.base_model.config is model.config
    assert name_of(model.dtype) == name_of(model.param_dtype) == "float32"
    assert model.tie_weights() is None
    if state != "without values":
        assert model.get_input_embeddings() is not None
        assert (model.get_output_embeddings() is not None) == (head == "causal_lm")


@EVERY_STATE
def test_numbers_are_counted(model_in, head, state):
    model, prepared = model_in(head, state), (head, state) in PREPARED
    for part, of in ((model, head), (model.base_model, "base")):
        assert part.num_parameters() == count(of)
        assert part.num_parameters(only_trainable=True) == (0 if prepared else count(of))


@EVERY_STATE
def test_memory_is_what_the_values_take(wing, model_in, head, state):
    model = model_in(head, state)
    found = model.get_memory_footprint(return_buffers=False)
    if state == "without values":
        assert found == 0
    elif (head, state) in PREPARED:  # fused layers have a bias where one of their parts has
        assert 4 * count(head) <= found <= 1.2 * 4 * count(head)
    else:
        assert found == 4 * count(head)
    table = sum(part.nbytes for part in rotary_table(CONFIG.n_positions, CONFIG.rotary_width, "float32"))
    # A Flax module has no buffers: the table is a constant of what is compiled.
    assert model.get_memory_footprint() == found + (0 if wing.name == "flax" else table)


@EVERY_STATE
def test_recomputation_is_off_and_can_be_switched_where_training_is_possible(model_in, head, state):
    model = model_in(head, state)
    assert not model.is_gradient_checkpointing and not model.base_model.is_gradient_checkpointing
    if (head, state) not in PREPARED:
        model.gradient_checkpointing_enable()
        assert model.is_gradient_checkpointing and model.base_model.is_gradient_checkpointing
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing and not model.base_model.is_gradient_checkpointing


@pytest.mark.parametrize("state", ["made", "without values", "loaded", "prepared", "loaded for inference"])
def test_a_generation_config_is_there_and_follows_the_models(model_in, state):
    model = model_in("causal_lm", state)
    said = model.generation_config
    assert model.derives_generation_config and said is model.generation_config
    ids = CONFIG.bos_token_id, CONFIG.eos_token_id, CONFIG.pad_token_id
    assert (said.bos_token_id, said.eos_token_id, said.pad_token_id) == ids
    model.config.eos_token_id = 7
    assert model.generation_config.eos_token_id == 7


@EVERY_STATE
def test_an_empty_cache_has_the_same_state(model_in, head, state):
    cache = model_in(head, state).init_cache(2, 8)
    shape = (2, CONFIG.n_head, 8, CONFIG.head_dim)
    assert {tuple(x.shape) for side in (cache.keys, cache.values) for x in side} == {shape}
    assert (len(cache.keys), cache.length, cache.capacity, cache.fixed) == (CONFIG.n_layer, 0, 8, True)


@EVERY_STATE
@pytest.mark.parametrize("shape", [(0, 8), (2, 0), (2, CONFIG.n_positions + 1)])
def test_an_impossible_cache_is_refused(model_in, head, state, shape):
    with pytest.raises(InputError, match="no such cache"):
        model_in(head, state).init_cache(*shape)


@pytest.mark.parametrize(("capacity", "slots"), [(1, 64), (65, 128), (300, 512), (1030, 1280), (2050, 2056)])
def test_a_decoders_cache_is_rounded_up_the_same(wing, revealing, capacity, slots):
    # PyTorch compiles nothing, so its cache is as large as it must be.
    assert revealing()._decoder(1, capacity).slots == (capacity if wing.name == "pt" else slots)


# ---- what a state forbids, in the same words


NEEDS_PARAMETERS = {
    "gradient_checkpointing_enable": lambda model, path: model.gradient_checkpointing_enable(),
    "initialise": lambda model, path: model.initialise(),
    "prepare_for_inference": lambda model, path: model.prepare_for_inference(),
    "resize_token_embeddings": lambda model, path: model.resize_token_embeddings(300),
    "save_pretrained": lambda model, path: model.save_pretrained(path / "out"),
    "set_input_embeddings": lambda model, path: model.set_input_embeddings(model.get_input_embeddings()),
    "set_output_embeddings": lambda model, path: model.set_output_embeddings(None),
}


@pytest.fixture(scope="module")
def prepared(wing, folder):
    return wing.model("causal_lm").from_pretrained(folder(), inference=True)


@pytest.mark.parametrize(
    ("act", "part"),
    [
        *((act, "model") for act in NEEDS_PARAMETERS),
        *((act, "base_model") for act in NEEDS_PARAMETERS if act != "prepare_for_inference"),  # a GPTJModel has none
    ],
)
def test_a_prepared_model_refuses_in_the_same_words(prepared, tmp_path, act, part):
    model = prepared if part == "model" else prepared.base_model
    with pytest.raises(InputError) as raised:
        NEEDS_PARAMETERS[act](model, tmp_path)
    assert str(raised.value) == f"{act}: {WORDS}"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("act", ["prepare_for_inference", "resize_token_embeddings", "save_pretrained"])
def test_a_model_without_values_refuses_in_the_same_words(model_in, tmp_path, act):
    model = model_in("causal_lm", "without values")
    with pytest.raises(InputError, match=f"^{act}: the model was made without parameters"):
        NEEDS_PARAMETERS[act](model, tmp_path)
    assert model.config == CONFIG and list(tmp_path.iterdir()) == []


def test_a_part_of_a_model_refuses_to_be_resized(model_in):
    model = model_in("causal_lm", "made")
    with pytest.raises(InputError, match=r"a part of another.*Call model\.resize_token_embeddings"):
        model.base_model.resize_token_embeddings(300)
    assert model.config.vocab_size == CONFIG.vocab_size


@pytest.mark.parametrize("name", ["_do_init", "attn_implementation"])
def test_what_one_framework_alone_has_is_refused_in_the_others(wing, folder, name):
    owner, value = {"_do_init": ("flax", False), "attn_implementation": ("pt", "sdpa")}[name]
    load = wing.model("causal_lm").from_pretrained
    if wing.name == owner:
        assert load(folder(), **{name: value}) is not None
    else:
        with pytest.raises(InputError, match=f"^{name}: "):
            load(folder(), **{name: value})
    load(folder(), **{name: {"_do_init": True, "attn_implementation": "eager"}[name]})
