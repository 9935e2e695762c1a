"""PEFT opens the adapters that are written here, and the other way round: the same logits within 2e-5."""

import itertools

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import check_target_module_exists
from transformers import GPTJForCausalLM as TheirGPTJ

from gptj.adapters import TARGETS, AdapterConfig, merge_folder, read_adapter
from gptj.pt import GPTJForCausalLM

IDS = torch.tensor([[5, 9, 200, 31, 7, 64], [1, 2, 3, 4, 5, 6]])
EVERY = ["q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_out"]

CONFIGS = {
    "default": {"r": 4, "lora_alpha": 6},
    "all": {"r": 3, "lora_alpha": 5, "target_modules": EVERY},
    "all-linear": {"r": 2, "target_modules": "all-linear"},
    "rslora": {"r": 4, "use_rslora": True, "target_modules": ["fc_in", "out_proj"]},
    "patterns": {
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj", "fc_in", "fc_out"],
        "rank_pattern": {"fc_in": 5, "h.1.attn.q_proj": 1},
        "alpha_pattern": {"fc_out": 9},
    },
    "one block": {"r": 2, "target_modules": ["q_proj", "fc_out"], "layers_to_transform": [1]},
    "blocks of a list": {
        "r": 2,
        "target_modules": ["q_proj", "h.0.mlp.fc_out"],
        "layers_to_transform": 1,
        "layers_pattern": ["layers", "h"],
    },
    "named": {"r": 2, "target_modules": ["transformer.h.0.attn.q_proj", "h.1.mlp.fc_in"]},
    "a regular expression": {"r": 2, "target_modules": r".*\.h\.1\.(attn\.v_proj|mlp\.fc_in)"},
    "all but": {"r": 2, "target_modules": ["q_proj", "v_proj"], "exclude_modules": ["h.0.attn.q_proj"]},
    "gaussian": {"r": 2, "init_lora_weights": "gaussian"},
    "fan in": {"r": 2, "lora_dropout": 0.1, "task_type": None},
}


def fill(model):
    """Give every matrix of the adapters values of size 0.15: B starts at zero, and would show nothing."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.normal_(0, 0.15)


def theirs(folder):
    return TheirGPTJ.from_pretrained(folder).eval()


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


LISTS = [
    None,
    "",
    "h",
    ["h"],
    ["layers", "h"],
    "layers",
    "transformer.h",
    r"transformer\.h",
    "h|layers",
    "(h|layers)",
    "[a-h]",
]


@pytest.mark.parametrize(
    "modules", [["q_proj", "attn.v_proj"], ["attn.q_proj", "h.1.mlp.fc_in"], ["transformer.h.0.attn.q_proj", "fc_out"]]
)
@pytest.mark.parametrize("lists", LISTS)
def test_the_matrices_are_those_that_peft_means(modules, lists):
    for chosen, left in itertools.product((0, 3, [0], [1, 3]), (None, ["fc_in"], ["h.1.attn.q_proj"], r".*h\.1\..*")):
        fields = {"target_modules": modules, "layers_to_transform": chosen, "layers_pattern": lists}
        config = LoraConfig(**fields, exclude_modules=left)
        every = [(n, target) for n in range(4) for target in TARGETS]
        found = {place: check_target_module_exists(config, "transformer.h.{}.{}".format(*place)) for place in every}
        meant = [place for place, one in found.items() if one and type(one).__name__ != "_ExcludedModule"]
        ours = AdapterConfig(**fields, exclude_modules=left).places(4)
        assert ours == meant if meant else all(place == (1, "mlp.fc_in") for place in ours)  # GPTJModel's whole name


@pytest.mark.parametrize("name", CONFIGS)
def test_an_adapter_of_peft_is_opened_here_and_what_is_saved_by_peft(folder, tmp_path, name):
    adapted = get_peft_model(theirs(folder), LoraConfig(**{"task_type": "CAUSAL_LM"} | CONFIGS[name]))
    fill(adapted)
    expected = logits(adapted)
    assert (expected - logits(theirs(folder))).abs().max() > 1e-3
    adapted.save_pretrained(tmp_path / "theirs")

    ours = GPTJForCausalLM.from_pretrained(folder)
    ours.load_adapter(tmp_path / "theirs")
    assert (logits(ours) - expected).abs().max() < 2e-5
    merged = GPTJForCausalLM.from_pretrained(merge_folder(folder, tmp_path / "theirs", tmp_path / "merged"))
    assert (logits(merged) - expected).abs().max() < 2e-5

    ours.save_adapter(tmp_path / "ours")
    again = PeftModel.from_pretrained(theirs(folder), tmp_path / "ours")
    assert (logits(again) - expected).abs().max() < 2e-5
    assert (logits(again.merge_and_unload()) - expected).abs().max() < 2e-5


@pytest.mark.parametrize("fields", [{"r": 3, "target_modules": EVERY}, {"r": 2, "use_rslora": True}])
def test_an_adapter_made_here_is_opened_by_peft_and_by_transformers(folder, tmp_path, fields):
    ours = GPTJForCausalLM.from_pretrained(folder)
    ours.add_adapter(**fields)
    fill(ours)
    ours.save_adapter(tmp_path / "ours")
    with_peft = PeftModel.from_pretrained(theirs(folder), tmp_path / "ours")
    with_transformers = theirs(folder)
    with_transformers.load_adapter(tmp_path / "ours")
    assert (logits(with_peft) - logits(ours)).abs().max() < 2e-5
    assert (logits(with_transformers) - logits(ours)).abs().max() < 2e-5


def test_a_config_of_pefts_makes_an_adapter_here(folder):
    ours = GPTJForCausalLM.from_pretrained(folder)
    ours.add_adapter(LoraConfig(r=5, lora_alpha=7, target_modules=["q_proj"]), "mine")
    assert ours.active_adapter == "mine" and ours.adapters["mine"].r == 5


def test_an_adapter_over_our_own_model_by_peft_is_opened_here(folder, tmp_path):
    adapted = get_peft_model(GPTJForCausalLM.from_pretrained(folder), LoraConfig(task_type="CAUSAL_LM", r=4))
    fill(adapted)
    expected = logits(adapted)
    adapted.save_pretrained(tmp_path / "a")
    ours = GPTJForCausalLM.from_pretrained(folder)
    ours.load_adapter(tmp_path / "a")
    assert (logits(ours) - expected).abs().max() < 2e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_models_are_adapted_in_float32_as_pefts(folder, tmp_path, dtype):
    model = TheirGPTJ.from_pretrained(folder, dtype=dtype)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4))
    fill(adapted)
    adapted.save_pretrained(tmp_path / "a")
    stored = {tensor.dtype for tensor in read_adapter(tmp_path / "a").stored.values()}
    ours = GPTJForCausalLM.from_pretrained(folder, dtype=dtype)
    ours.load_adapter(tmp_path / "a")
    assert {p.dtype for name, p in ours.named_parameters() if "lora" in name} == {torch.float32} == {torch.float32}
    assert stored == {"float32"}
    assert (logits(ours).float() - logits(adapted).float()).abs().max() < 0.1
