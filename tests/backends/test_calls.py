"""The calls that users of transformers make, in all three wings: loading, configs that are assigned, embeddings."""

import dataclasses
import shutil

import numpy as np
import pytest

from gptj.config import GPTJConfig
from gptj.errors import ConfigError, InputError
from gptj.generation import GenerationConfig
from gptj.parity.revealing import revealing_config

IDS = np.array([[5, 9, 200, 31, 7, 64], [1, 2, 3, 4, 5, 6]])
SC = "sequence_classification"


@pytest.fixture
def fresh(wing, folder):
    """A model of one's own, to be changed."""
    return lambda head="causal_lm", **options: wing.model(head).from_pretrained(folder(head), **options)


# ---- from_pretrained


@pytest.mark.parametrize(
    "options",
    [
        {"revision": "float16", "cache_dir": "elsewhere", "token": "t", "local_files_only": True},
        {"force_download": True, "low_cpu_mem_usage": True, "use_safetensors": True, "trust_remote_code": False},
        {"device_map": "auto"},
        {"device_map": "cpu"},
        {"device_map": {"": "cpu"}},
        {"revision": None, "token": None, "device_map": None, "max_memory": None},
    ],
)
def test_what_is_so_anyway_is_accepted(wing, fresh, options):
    assert wing.call(fresh(**options), IDS).logits.shape == (2, 6, 216)


@pytest.mark.parametrize("name", ["dtype", "torch_dtype", "param_dtype"])
def test_the_parameters_dtype_has_its_names(wing, fresh, name):
    model = fresh(**{name: "bfloat16"})
    kept = "float32" if wing.name == "flax" and name == "dtype" else "bfloat16"
    assert kept in str(model.param_dtype)


def test_two_names_of_a_dtype_that_say_different_things_are_refused(fresh):
    with pytest.raises(InputError, match="contradicts"):
        fresh(torch_dtype="float16", param_dtype="bfloat16")


def test_a_constructor_takes_param_dtype(wing):
    model = wing.model("causal_lm")(revealing_config(n_layer=1), param_dtype="bfloat16")
    assert "bfloat16" in str(model.param_dtype)


@pytest.mark.parametrize("name", ["load_in_8bit", "from_tf", "quantization_config", "max_memory", "use_auth_token"])
def test_what_cannot_be_had_is_refused_with_the_way_to_go(fresh, name):
    with pytest.raises(InputError, match=rf"^{name}: not supported: .+\(expected .+, found .+\)\. \w+"):
        fresh(**{name: {"a": 1}})


@pytest.mark.parametrize("place", [{"wte": "cpu", "h": "disk"}, "balanced", "disk", 3.5, {}])
def test_a_device_map_of_several_places_is_refused(fresh, place):
    with pytest.raises(InputError, match="device_map"):
        fresh(device_map=place)


def test_a_device_that_is_not_there_is_named(fresh):
    with pytest.raises(InputError, match=r"sees no such device .*found cuda:77"):
        fresh(device_map="cuda:77")


def test_a_variant_names_the_weights_file(wing, folder, tmp_path):
    shutil.copytree(folder(), tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model" / "model.fp16.safetensors")
    model = wing.model("causal_lm").from_pretrained(tmp_path / "model", variant="fp16")
    assert model.config.architecture_sha256 == revealing_config().architecture_sha256


def test_a_misspelt_argument_is_still_refused(fresh):
    with pytest.raises(ConfigError, match="revison"):
        fresh(revison="main")


# ---- configs that are assigned


def test_the_padding_token_of_most_recipes_can_be_assigned(wing, fresh):
    model = fresh(SC, pad_token_id=None)
    with pytest.raises(InputError, match="pad_token_id"):
        wing.call(model, IDS)
    model.config.pad_token_id = 6
    assert np.array_equal(
        wing.numpy(wing.call(model, IDS).logits), wing.numpy(wing.call(fresh(SC, pad_token_id=6), IDS).logits)
    )


@pytest.mark.parametrize("how", ["field", "whole"])
def test_flags_of_a_call_take_effect_when_they_are_assigned(wing, fresh, how):
    model = fresh()
    assert wing.call(model, IDS).hidden_states is None
    if how == "field":
        model.config.output_hidden_states, model.config.use_cache = True, False
    else:
        model.config = model.config.replace(output_hidden_states=True, use_cache=False)
    out = wing.call(model, IDS)
    assert len(out.hidden_states) == 4 and out.past_key_values is None
    assert model.base_model.config == model.config


@pytest.mark.parametrize("how", ["field", "whole"])
def test_a_problem_type_takes_effect_when_it_is_assigned(wing, fresh, how):
    labels = np.zeros((2, 5), np.float32)
    labels[:, 2] = 1
    model = fresh(SC, pad_token_id=0, problem_type="regression")
    before = float(wing.call(model, IDS, labels=labels).loss)
    if how == "field":
        model.config.problem_type = "multi_label_classification"
    else:
        model.config = model.config.replace(problem_type="multi_label_classification")
    expected = fresh(SC, pad_token_id=0, problem_type="multi_label_classification")
    after = float(wing.call(model, IDS, labels=labels).loss)
    assert after == float(wing.call(expected, IDS, labels=labels).loss) != before


@pytest.mark.parametrize(
    ("field", "value", "line"),
    [
        ("vocab_size", 300, r"resize_token_embeddings\(300\)"),
        ("n_embd", 64, r"config.replace\(n_embd=64\)"),
        ("hidden_size", 64, r"config.replace\(n_embd=64\)"),
        ("activation_function", "relu", r"config.replace\(activation_function='relu'\)"),
        ("num_labels", 9, r"num_labels=9"),
    ],
)
def test_a_field_that_the_model_is_built_by_is_refused_with_the_line_that_works(fresh, field, value, line):
    model = fresh()
    before = model.config.to_dict()
    with pytest.raises(ConfigError, match=rf"{field}: cannot be assigned.*{line}"):
        setattr(model.config, field, value)
    assert model.config.to_dict() == before


@pytest.mark.parametrize("changes", [{"n_head": 2}, {"vocab_size": 300}, {"resid_pdrop": 0.1}])
def test_a_config_of_another_model_is_refused(wing, fresh, changes):
    model = fresh()
    with pytest.raises(ConfigError, match=rf"model.config: {next(iter(changes))}: of another model"):
        model.config = model.config.replace(**changes)
    with pytest.raises(ConfigError, match="not a GPTJConfig"):
        model.config = {"n_head": 4}
    assert model.config.architecture_sha256 == revealing_config().architecture_sha256


def test_a_fresh_model_has_a_generation_config_that_follows_its_config(wing):
    model = wing.model("causal_lm")(revealing_config(n_layer=1, eos_token_id=7, pad_token_id=None))
    assert isinstance(model.generation_config, GenerationConfig)
    model.config.pad_token_id = model.config.eos_token_id
    assert model.generation_config.pad_token_id == 7
    model.generation_config.max_new_tokens = 3
    model.config.pad_token_id = 5
    assert (model.generation_config.pad_token_id, model.generation_config.max_new_tokens) == (7, 3)
    assert wing.numpy(model.generate(IDS, eos_token_id=None)).shape == (2, 9)
    with pytest.raises(ConfigError, match="top_k: breaks its rule"):
        model.generation_config.top_k = -1
    model.generation_config = {"max_new_tokens": 4}
    assert model.generation_config.max_new_tokens == 4
    with pytest.raises(InputError, match="generation_config"):
        model.generation_config = 3


def test_a_loaded_model_without_the_file_has_a_generation_config(fresh):
    assert dataclasses.is_dataclass(fresh().generation_config)


def test_what_was_traced_follows_the_config_too(wing, fresh):
    """Keras' predict and a caller's own jit or torch.compile hold the flags that they were traced with."""
    model = fresh()
    if wing.name == "tf":
        assert model.predict(IDS, verbose=0).hidden_states is None
        model.config.output_hidden_states = True
        assert len(model.predict(IDS, verbose=0).hidden_states) == 4
    elif wing.name == "flax":
        before, kept = model.module, {model.config: 1}
        model.config.pad_token_id = 3
        assert model.module != before and before.config.pad_token_id == 214 and kept[model.config] == 1
    else:
        import torch

        run = torch.compile(model, backend="eager")
        assert run(torch.tensor(IDS)).hidden_states is None
        model.config.output_hidden_states = True
        assert len(run(torch.tensor(IDS)).hidden_states) == 4


# ---- what other libraries read


@pytest.mark.parametrize("head", ["base", "causal_lm", SC, "question_answering"])
def test_facts_that_other_libraries_ask_for(fresh, head):
    model = fresh(head)
    assert model.can_generate() == (head == "causal_lm")
    assert (model.main_input_name, model.base_model_prefix) == ("input_ids", "transformer")
    assert model.config_class is GPTJConfig and model.config.model_type == "gptj"
    assert model.get_memory_footprint(return_buffers=False) == 4 * model.num_parameters()
    assert not model.is_gradient_checkpointing
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert model.is_gradient_checkpointing
    with pytest.raises(InputError, match="use_reentrant"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})


def test_a_vocabulary_is_rounded_up_to_a_multiple(fresh):
    model = fresh()
    model.resize_token_embeddings(217, pad_to_multiple_of=64)
    assert model.config.vocab_size == 256
    model.resize_token_embeddings(pad_to_multiple_of=100)
    assert model.config.vocab_size == 300
    with pytest.raises(InputError, match="pad_to_multiple_of"):
        model.resize_token_embeddings(pad_to_multiple_of=0)


def test_output_embeddings_can_be_set(wing, fresh):
    model, other = fresh(), fresh()
    before = wing.numpy(wing.call(model, IDS).logits)
    zero = wing.model("causal_lm")(revealing_config(), seed=4)
    model.set_output_embeddings(zero.get_output_embeddings())
    assert not np.array_equal(wing.numpy(wing.call(model, IDS).logits), before)
    model.set_output_embeddings(other.get_output_embeddings())
    if wing.name != "flax":  # whose lm_head is an array without the bias
        assert np.array_equal(wing.numpy(wing.call(model, IDS).logits), before)
    with pytest.raises(InputError, match="no lm_head"):
        fresh("base").set_output_embeddings(zero.get_output_embeddings())


def test_saving_takes_transformers_options(wing, fresh, tmp_path):
    model = fresh()
    model.save_pretrained(tmp_path / "a", max_shard_size="1MB", safe_serialization=True, push_to_hub=False)
    assert wing.model("causal_lm").from_pretrained(tmp_path / "a").config == model.config
    model.save_pretrained(tmp_path / "b", is_main_process=False)
    assert not (tmp_path / "b").exists()
    with pytest.raises(InputError, match=r"safe_serialization: not supported.*gptj convert"):
        model.save_pretrained(tmp_path / "c", safe_serialization=False)
    with pytest.raises(InputError, match="Did you mean overwrite"):
        model.save_pretrained(tmp_path / "c", overwrit=True)


def test_a_loop_of_ones_own_goes_on_from_the_cache(wing, fresh):
    model = fresh()
    whole = wing.numpy(wing.call(model, IDS).logits)
    past = wing.call(model, IDS[:, :4], use_cache=True).past_key_values
    arguments = model.prepare_inputs_for_generation(IDS, past, np.ones_like(IDS))
    assert arguments["input_ids"].shape == (2, 2)
    again = wing.numpy(wing.call(model, **arguments).logits)
    assert np.abs(again - whole[:, 4:]).max() < 2e-5
