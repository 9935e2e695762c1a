"""What a PyTorch model says its class is, where transformers is loaded; a class of ours stands in for theirs here."""

import copy
import pickle
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from gptj.parity.revealing import revealing_config
from gptj.pt import GPTJForCausalLM, GPTJModel

IDS = torch.arange(6)[None]


class PreTrainedModel(nn.Module):
    """As transformers': it cannot be made without a config of theirs, and has a from_pretrained of its own."""

    def __init__(self, config, *, theirs):
        super().__init__()

    @classmethod
    def from_pretrained(cls, directory):
        raise AssertionError("theirs was called")


@pytest.fixture(params=[False, True], ids=["alone", "beside transformers"])
def loaded(request, monkeypatch):
    if request.param:
        monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace(PreTrainedModel=PreTrainedModel))
    return request.param


@pytest.fixture
def model():
    return GPTJForCausalLM(revealing_config(n_layer=1)).eval()


def test_isinstance_says_what_trainers_ask_for_and_type_says_what_it_is(loaded, model):
    assert isinstance(model, PreTrainedModel) is loaded and isinstance(model, GPTJForCausalLM)
    assert type(model) is GPTJForCausalLM and not issubclass(type(model), PreTrainedModel)
    assert not isinstance(nn.Linear(1, 1), PreTrainedModel)
    told = model.__class__
    assert (told.__name__, told.__module__) == ("GPTJForCausalLM", GPTJForCausalLM.__module__)
    assert repr(model).startswith("GPTJForCausalLM(") and isinstance(model.transformer, GPTJModel)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, copy.copy, *(lambda m, n=n: pickle.loads(pickle.dumps(m, n)) for n in range(2, 6))],
    ids=["deepcopy", "copy", *(f"pickle {n}" for n in range(2, 6))],
)
def test_a_model_is_copied_and_pickled_as_what_it_is(loaded, model, copied):
    again = copied(model)
    assert type(again) is GPTJForCausalLM and not again.training
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_a_pickle_is_opened_where_transformers_is_not_loaded(monkeypatch, model):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "transformers", SimpleNamespace(PreTrainedModel=PreTrainedModel))
        data = pickle.dumps(model)
    assert b"PreTrainedModel" not in data and type(pickle.loads(data)) is GPTJForCausalLM


def test_torch_saves_and_loads_a_whole_model(loaded, model, tmp_path):
    torch.save(model, tmp_path / "whole.pt")
    again = torch.load(tmp_path / "whole.pt", weights_only=False)
    assert type(again) is GPTJForCausalLM and torch.equal(again(IDS).logits, model(IDS).logits)


def test_what_is_made_by_way_of_the_class_is_ours(loaded, model, tmp_path):
    assert type(model.__class__(model.config)) is GPTJForCausalLM
    model.save_pretrained(tmp_path / "model")
    opened = model.__class__.from_pretrained(tmp_path / "model")
    assert type(opened) is GPTJForCausalLM and torch.equal(opened(IDS).logits, model(IDS).logits)


def test_its_class_can_be_changed_in_place_as_fully_shard_does(loaded, model):
    own = model.__class__
    model.__class__ = type("Sharded" + own.__name__, (own,), {})
    assert type(model).__name__ == "ShardedGPTJForCausalLM" == model.__class__.__name__
    assert isinstance(model, GPTJForCausalLM) and isinstance(model, PreTrainedModel) is loaded
    assert model(IDS).logits.shape[1] == 6
