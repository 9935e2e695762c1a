"""What PyTorch's fast path does with the weights, to what exactness, and what is over once it has them."""

import copy
import json
import pickle

import ml_dtypes
import numpy as np
import pytest
import torch
from adapter_samples import KINDS, sample_pairs, write_sample_adapter
from mutants import revealing_batch
from wings import close

from gptj.adapters import AdapterConfig
from gptj.checkpoint import write_checkpoint
from gptj.command.main import gptj_command
from gptj.errors import InputError
from gptj.parity.revealing import revealing_config, revealing_fill
from gptj.pt import Decoder, GPTJForCausalLM
from gptj.pt.kernels import (
    Int4Linear,
    Int8Linear,
    NarrowInt8Linear,
    PackedLinear,
    PlainLinear,
    TiledInt8Linear,
    TiledLinear,
    UnpackedLinear,
    WidenedLinear,
    amd_family,
    onednn_has,
    onednn_linear,
    x86_lacks_vnni,
)

CONFIG = revealing_config()
BATCH = revealing_batch(CONFIG)
CALL = {"attention_mask": BATCH.attention_mask, "position_ids": BATCH.position_ids}
SIZES = {"n_embd": 64, "n_inner": 160, "vocab_size": 224}
"""In which 4-bit groups fit."""


def logits(model, ids=BATCH.input_ids, **options):
    with torch.no_grad():
        return model(ids, **(options or CALL)).logits.float().numpy()


def rounded(folder, change, **changes):
    """The ordinary model, each of whose matrices has been put through `change`, (n, k) to (n, k)."""
    model = GPTJForCausalLM.from_pretrained(folder(**changes), mmap=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "wte" not in name:
                parameter.copy_(torch.from_numpy(change(parameter.numpy())))
    return model


def eight_bits(matrix):
    scale = np.abs(matrix).max(1, keepdims=True) / 127
    return np.rint(matrix / scale) * scale


def four_bits(matrix):
    groups = matrix.reshape(len(matrix), -1, 32)
    low, high = groups.min(2, keepdims=True), groups.max(2, keepdims=True)
    scale = in_bfloat16((high - low) / 15)
    middle = in_bfloat16(low + 8 * scale)
    return (np.clip(np.rint((groups - middle) / scale), -8, 7) * scale + middle).reshape(matrix.shape)


def in_bfloat16(array):
    return array.astype(ml_dtypes.bfloat16).astype(np.float32)


def joined(change):
    """`change` over out_proj and fc_out side by side, which share their scales as they share a matrix product."""

    def of(block):
        both = torch.cat((block.attn.out_proj.weight, block.mlp.fc_out.weight), 1)
        both = torch.from_numpy(change(both.detach().numpy()))
        width = block.attn.out_proj.in_features
        block.attn.out_proj.weight.data, block.mlp.fc_out.weight.data = both[:, :width], both[:, width:]

    return of


@pytest.fixture
def processor(monkeypatch):
    """Has the fast path believe that the processor is of this kind."""

    def become(*, tiles=False, overflow=False, halves=True, wide=True):
        def has(device, dtype):
            return dtype == torch.float32 or (halves and dtype == torch.bfloat16)

        monkeypatch.setattr("gptj.pt.kernels.has_amx", lambda: tiles)
        monkeypatch.setattr("gptj.pt.kernels.x86_lacks_vnni", lambda: overflow)
        monkeypatch.setattr("gptj.pt.kernels.x86_lacks_avx512", lambda: not wide)
        monkeypatch.setattr("gptj.pt.kernels.onednn_has", has)

    return become


INT8 = [TiledInt8Linear]
"""Those that are right on this processor: without VNNI, Int8Linear's sums overflow."""
if not x86_lacks_vnni():
    INT8.append(Int8Linear)
if "fbgemm" in torch.backends.quantized.supported_engines:
    INT8.append(NarrowInt8Linear)

BFLOAT16 = [TiledLinear, WidenedLinear]
if onednn_has(torch.device("cpu"), torch.bfloat16):
    BFLOAT16.append(PackedLinear)

ACTIVATION_BITS = {Int8Linear: 16, TiledInt8Linear: 16, NarrowInt8Linear: 14}


@pytest.mark.parametrize(
    ("quantize", "change", "kind", "bound"),
    [
        # 16-bit activations: steps of 3e-5 of the largest; 3.4e-4 in all. With two bits less, four times that.
        *(("int8", eight_bits, kind, 1e-3 * 2 ** (16 - ACTIVATION_BITS[kind])) for kind in INT8),
        ("int4", four_bits, Int4Linear, 6e-2),  # bfloat16 activations: steps of 4e-3 of logits of 5; 2.3e-2 in all
    ],
)
def test_quantised_weights_are_the_rounded_ones_and_nothing_else_is_lost(
    folder, processor, quantize, change, kind, bound
):
    processor(tiles=kind is TiledInt8Linear, overflow=kind is NarrowInt8Linear)
    model = GPTJForCausalLM.from_pretrained(folder(**SIZES), inference=True, quantize=quantize)
    assert type(model.transformer.h[0].out_of) is type(model.lm_head) is kind
    original = GPTJForCausalLM.from_pretrained(folder(**SIZES), mmap=False)
    expected = rounded(folder, change, **SIZES)
    for mine, theirs in zip(expected.transformer.h, original.transformer.h, strict=True):
        mine.attn.out_proj.weight, mine.mlp.fc_out.weight = theirs.attn.out_proj.weight, theirs.mlp.fc_out.weight
        joined(change)(mine)
    ids = revealing_batch(revealing_config(**SIZES)).input_ids
    off = np.abs(logits(model, ids) - logits(expected, ids)).max()
    lost = np.abs(logits(original, ids) - logits(expected, ids)).max()
    assert off < bound and off < lost


@pytest.mark.parametrize(("dtype", "kind"), [*(("bfloat16", kind) for kind in BFLOAT16), ("float16", WidenedLinear)])
def test_prepared_in_16_bits_is_as_near_the_oracle_as_the_ordinary_model(folder, oracle, processor, dtype, kind):
    processor(tiles=kind is TiledLinear, halves=kind is not WidenedLinear)
    expected = oracle().forward(BATCH.input_ids, BATCH.attention_mask, BATCH.position_ids).logits
    ordinary = GPTJForCausalLM.from_pretrained(folder(), dtype=dtype)
    prepared = GPTJForCausalLM.from_pretrained(folder(), dtype=dtype, inference=True)
    assert type(prepared.transformer.h[0].out_of) is type(prepared.lm_head) is kind
    off, allowed = (np.abs(logits(model) - expected).max() for model in (prepared, ordinary))
    assert off < 1.5 * allowed


ROWS = pytest.mark.parametrize("rows", [(1,), (2, 3), (70,)])


@ROWS
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        (UnpackedLinear, torch.float32),
        (TiledLinear, torch.float32),
        (TiledLinear, torch.bfloat16),
        (WidenedLinear, torch.float32),
        (WidenedLinear, torch.bfloat16),
        (WidenedLinear, torch.float16),
    ],
)
def test_products_in_parts_are_the_plain_ones(monkeypatch, rows, kind, dtype):
    monkeypatch.setattr(WidenedLinear, "at_once", 32 * 20)
    torch.manual_seed(0)
    weight, bias, x = (torch.randn(*shape, dtype=dtype) for shape in ((48, 32), (48,), (*rows, 32)))
    product = kind(weight, bias)(x)
    assert product.is_contiguous()
    torch.testing.assert_close(product, PlainLinear(weight, bias)(x))


@pytest.mark.parametrize("waits", [False, True], ids=["sums at once", "sums that wait"])
@pytest.mark.parametrize("rows", [(1,), (2, 1), (3,), (2, 2)])
def test_few_rows_of_packed_weights_are_filled_up_where_their_sums_wait(monkeypatch, rows, waits):
    multiplied = []

    def watched(x, *rest):
        multiplied.append(x.shape[:-1].numel())
        return onednn_linear(x, *rest)

    monkeypatch.setattr("gptj.pt.kernels.onednn_linear", watched)
    monkeypatch.setattr("gptj.pt.kernels.waits_for_sums", lambda: waits)
    torch.manual_seed(0)
    weight, bias, x = torch.randn(48, 32), torch.randn(48), torch.randn(*rows, 32)
    torch.testing.assert_close(PackedLinear(weight, bias)(x), PlainLinear(weight, bias)(x))
    count = x.shape[:-1].numel()
    assert multiplied == [4 if waits or count == 3 else count]


@pytest.mark.parametrize(
    ("told", "family"),
    [
        ("vendor_id\t: AuthenticAMD\ncpu family\t: 25\n", 25),
        ("AMD64 Family 26 Model 68 Stepping 0, AuthenticAMD", 26),
        ("vendor_id\t: GenuineIntel\ncpu family\t: 6\n", None),
        ("", None),
    ],
)
def test_a_processor_of_amd_is_known_by_its_family(monkeypatch, told, family):
    monkeypatch.setattr("gptj.pt.kernels.Path.exists", lambda path: False)
    monkeypatch.setattr("gptj.pt.kernels.platform.processor", lambda: told)
    assert amd_family() == family


@ROWS
@pytest.mark.parametrize("kind", [PackedLinear, UnpackedLinear])
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_products_apply_the_gelu_that_is_asked_for(rows, kind, approximate):
    torch.manual_seed(0)
    weight, bias, x = torch.randn(48, 32), torch.randn(48), torch.randn(*rows, 32) / 4
    linear = kind(weight, bias)
    linear.gelu = approximate
    expected = torch.nn.functional.gelu(PlainLinear(weight, bias)(x), approximate=approximate)
    torch.testing.assert_close(linear(x), expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("kind", [UnpackedLinear, WidenedLinear])
def test_rows_with_gaps_between_them_are_gathered_first(monkeypatch, kind):
    """Of what is on the right, oneDNN multiplies such rows in a loop of its reference: they took 400 times as long."""
    multiplied = []

    def watched(x, weight, *rest):
        multiplied.append(weight.is_contiguous())
        return onednn_linear(x, weight, *rest)

    monkeypatch.setattr("gptj.pt.kernels.onednn_linear", watched)
    torch.manual_seed(0)
    weight, bias, x = torch.randn(48, 32), torch.randn(48), torch.randn(8, 3, 40)[:, -1:, :32]
    torch.testing.assert_close(kind(weight, bias)(x), PlainLinear(weight, bias)(x))
    assert multiplied and all(multiplied)


@ROWS
@pytest.mark.parametrize("fill", [torch.randn, torch.ones], ids=["random", "all at the largest"])
@pytest.mark.parametrize("kind", INT8)
def test_products_of_whole_numbers_are_those_of_the_rounded_weights(monkeypatch, rows, fill, kind):
    monkeypatch.setattr(Int8Linear, "at_once", 32)
    torch.manual_seed(0)
    weight, bias, x = fill(48, 32), torch.randn(48), fill(*rows, 32)
    product = kind(weight, bias)(x)
    assert product.is_contiguous()
    expected = PlainLinear(torch.from_numpy(eight_bits(weight.numpy())), bias)(x)
    off = 1e-4 * 2 ** (16 - ACTIVATION_BITS[kind])
    torch.testing.assert_close(product, expected, rtol=0, atol=off * expected.abs().max().item())


@pytest.mark.parametrize(
    ("dtype", "kind"), [("float64", PlainLinear), ("float32", PackedLinear), ("float32", UnpackedLinear)]
)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_embd": 45, "n_head": 3},
        {"n_inner": 161},
        {"tie_word_embeddings": True},
        {"activation_function": "gelu"},
        {"activation_function": "silu"},
    ],
    ids=["even", "odd heads", "odd inside", "tied", "exact GELU", "SiLU"],
)
def test_prepared_computes_the_oracles_logits(folder, oracle, processor, dtype, kind, changes):
    processor(wide=kind is not UnpackedLinear)
    model = GPTJForCausalLM.from_pretrained(folder(**changes), dtype=dtype, inference=True)
    assert type(model.lm_head) is kind
    expected = oracle(**changes).forward(BATCH.input_ids, BATCH.attention_mask, BATCH.position_ids)
    assert close(model(BATCH.input_ids, **CALL).logits.numpy(), expected.logits, dtype)


def test_a_model_prepared_later_computes_the_same_bits(folder):
    later = GPTJForCausalLM.from_pretrained(folder()).prepare_for_inference()
    assert np.array_equal(logits(later), logits(GPTJForCausalLM.from_pretrained(folder(), inference=True)))


def test_loading_prepares_a_block_before_it_reads_the_next(folder, monkeypatch):
    read = []
    pack = GPTJForCausalLM._pack_block

    def watched(model, n, quantize):
        unread = [block.mlp.fc_out.weight.is_meta for block in list(model.transformer.h)[n:]]
        read.append(unread)
        pack(model, n, quantize)

    monkeypatch.setattr(GPTJForCausalLM, "_pack_block", watched)
    GPTJForCausalLM.from_pretrained(folder(), inference=True)
    assert read == [[False, True, True], [False, True], [False]]


@pytest.mark.parametrize("inference", [False, True])
def test_only_the_last_position_of_a_prompt_meets_the_head(folder, inference):
    model = GPTJForCausalLM.from_pretrained(folder(), inference=inference)
    met = []
    model.lm_head.register_forward_pre_hook(lambda module, arguments: met.append(tuple(arguments[0].shape)))
    Decoder(model, 2, 10).prefill(BATCH.input_ids[:2, :8])
    assert met == [(2, CONFIG.n_embd)]


@pytest.mark.parametrize(
    ("act", "do"),
    [
        ("train", lambda model, path: model.train()),
        ("train", lambda model, path: model.transformer.train()),
        ("save_pretrained", lambda model, path: model.save_pretrained(path)),
        ("state_dict", lambda model, path: model.state_dict()),
        ("load_state_dict", lambda model, path: model.load_state_dict({})),
        ("resize_token_embeddings", lambda model, path: model.resize_token_embeddings(300)),
        ("set_input_embeddings", lambda model, path: model.set_input_embeddings(model.get_input_embeddings())),
        ("initialise", lambda model, path: model.initialise()),
        ("requires_grad_", lambda model, path: model.requires_grad_()),
        ("gradient_checkpointing_enable", lambda model, path: model.gradient_checkpointing_enable()),
        ("prepare_for_inference", lambda model, path: model.prepare_for_inference()),
        ("a cast or a move", lambda model, path: model.half()),
        ("a cast or a move", lambda model, path: model.transformer.to("meta")),
        ("a copy", lambda model, path: copy.deepcopy(model)),
        ("a copy", lambda model, path: pickle.dumps(model)),
        ("a gradient", lambda model, path: model(inputs_embeds=torch.zeros(1, 2, CONFIG.n_embd, requires_grad=True))),
    ],
)
def test_what_a_prepared_model_has_lost_is_named(folder, tmp_path, act, do):
    model = GPTJForCausalLM.from_pretrained(folder(), inference=True)
    with pytest.raises(InputError, match=f"^{act}: the model is prepared for inference.*Load the folder once more"):
        do(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("quantize", "bits"), [("int8", 8), ("int4", 4)])
def test_quantized_weights_take_their_own_bytes(folder, quantize, bits):
    sizes = {"n_embd": 64, "n_head": 4, "n_inner": 256, "vocab_size": 256, "rotary_dim": 8}
    model = GPTJForCausalLM.from_pretrained(folder(**sizes), inference=True, quantize=quantize)
    embedding = 256 * 64
    matrices, found = model.num_parameters() - embedding, model.get_memory_footprint(return_buffers=False)
    assert 4 * embedding + matrices * bits / 8 <= found <= 4 * embedding + matrices * (bits / 8 + 0.5)


def test_a_prepared_model_counts_its_numbers_as_before(folder):
    plain, fast = (GPTJForCausalLM.from_pretrained(folder(), inference=fast) for fast in (False, True))
    assert fast.num_parameters() == plain.num_parameters()
    assert fast.transformer.num_parameters() == plain.transformer.num_parameters()
    assert fast.num_parameters(only_trainable=True) == 0


def test_sizes_that_four_bits_do_not_fit_are_named(folder):
    with pytest.raises(InputError, match=r"quantize: .*inputs of 32, found a matrix of 280 outputs by 48 inputs"):
        GPTJForCausalLM.from_pretrained(folder(), inference=True, quantize="int4")


def test_the_command_line_decodes_with_quantised_weights(folder, capsys, monkeypatch):
    monkeypatch.setattr("gptj.command.main.ENVIRONMENT", {})
    words = ["generate", str(folder()), "--token-ids", "1 2 3", "--backend", "pt", "--max-new-tokens", "8", "--json"]
    gptj_command.main([*words, "--quantize", "int8"], standalone_mode=False)
    model = GPTJForCausalLM.from_pretrained(folder(), inference=True, quantize="int8")
    expected = model.generate([[1, 2, 3]], max_new_tokens=8)[0].tolist()
    assert json.loads(capsys.readouterr().out)["token_ids"] == expected
    with pytest.raises(InputError, match="inputs of 32"):
        gptj_command.main([*words, "--quantize", "int4"], standalone_mode=False)


@pytest.mark.parametrize("kind", ["all", "rslora", "patterns"])
@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_an_adapter_stands_beside_rounded_weights(quantize, kind, tmp_path):
    """A product is the rounded layer's own and scale B A x; loaded before the rounding or after it, the same bits."""
    config = revealing_config(**SIZES)
    write_checkpoint(tmp_path / "base", config, revealing_fill(0))
    adapter = write_sample_adapter(tmp_path / "adapter", kind, config=config)
    rounded, before = (GPTJForCausalLM.from_pretrained(tmp_path / "base") for _ in range(2))
    rounded.prepare_for_inference(quantize=quantize)
    block = rounded.transformer.h[0]
    x = torch.linspace(-1, 1, 2 * config.n_embd).reshape(1, 2, -1)
    with torch.inference_mode():
        base = block.into(x, block.beside)[0]
    rounded.load_adapter(adapter)
    before.load_adapter(adapter)
    before.prepare_for_inference(quantize=quantize)
    scale, a, b = sample_pairs(AdapterConfig(**KINDS[kind]), config).get("h.0.attn.q_proj", (0.0, [[0.0]], [[0.0]]))
    with torch.inference_mode():
        added = (block.into(x, block.beside)[0] - base)[..., : config.n_embd].double().numpy()
    expected = scale * (x.double().numpy() @ np.array(a).T @ np.array(b).T) if scale else np.zeros_like(added)
    assert np.abs(added - expected).max() <= 2e-5
    ids = BATCH.input_ids % config.vocab_size
    found = logits(rounded, ids)
    assert np.array_equal(logits(before, ids), found)
    rounded.set_adapter(None)
    assert np.abs(found - logits(rounded, ids)).max() > 1
