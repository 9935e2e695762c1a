"""What is PyTorch's alone: compile, export, casts that leave the rotary table, and the fused attention."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from mutants import revealing_batch
from wings import close

from gptj.config.rotary import rotary_table
from gptj.errors import InputError, LimitError
from gptj.parity.revealing import revealing_config
from gptj.pt import GPTJForCausalLM
from gptj.pt.heads import cross_entropy
from gptj.pt.kernels import Linear, Product, onednn_linear

CONFIG = revealing_config()
IDS = torch.from_numpy(revealing_batch(CONFIG).input_ids[:2])
LOGITS = 3 * torch.randn(7, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([1, 2, -100, 10, 0, -100, 3])


@pytest.fixture(scope="module")
def expected(oracle):
    return oracle().forward(IDS.numpy()).logits


def test_loading_imports_no_compiler(folder):
    code = f"import gptj.pt, sys; gptj.pt.GPTJForCausalLM.from_pretrained({str(folder())!r}); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "gptj.pt.heads" in done.stdout.split() and "torch._dynamo" not in done.stdout.split()


@pytest.mark.feature("torch.compile in one graph, torch.export", "causal_lm")
def test_an_exported_program_computes_the_oracles_logits(folder, expected):
    program = torch.export.export(GPTJForCausalLM.from_pretrained(folder()), (IDS,), {"use_cache": False})
    got = program.module()(IDS, use_cache=False).logits
    assert close(got.detach().numpy(), expected, "float32")


@pytest.mark.feature("torch.compile in one graph, torch.export", "causal_lm")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_one_compiled_graph_computes_the_oracles_logits(folder, expected):
    # Warnings are torch's own, of its compiler's internals; aot_eager traces and differentiates without a C++ compiler.
    compiled = torch.compile(GPTJForCausalLM.from_pretrained(folder()), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert close(compiled(IDS, use_cache=False).logits.numpy(), expected, "float32")


@pytest.mark.feature(".half(), .bfloat16(), .to(), state_dict", "causal_lm")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_casting_the_model_leaves_its_rotary_table_in_its_own_precision(folder, dtype):
    rotary = GPTJForCausalLM.from_pretrained(folder()).to(dtype).transformer.rotary
    kept = "float64" if dtype == torch.float64 else "float32"
    sin, cos = rotary_table(CONFIG.n_positions, CONFIG.rotary_width, kept)
    assert np.array_equal(rotary.sin.numpy(), sin) and np.array_equal(rotary.cos.numpy(), cos)


@pytest.mark.feature('fused attention (attn_implementation="sdpa")', "causal_lm")
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_the_fused_attention_computes_the_oracles_logits(folder, oracle, dtype):
    batch = revealing_batch(CONFIG)
    call = {"attention_mask": batch.attention_mask, "position_ids": batch.position_ids}
    model = GPTJForCausalLM.from_pretrained(folder(), dtype=dtype, attn_implementation="sdpa")
    with torch.no_grad():
        got = model(batch.input_ids, **call).logits.numpy()
    assert close(got, oracle().forward(batch.input_ids, **call).logits, dtype)


@pytest.mark.feature(".half(), .bfloat16(), .to(), state_dict", "causal_lm")
@pytest.mark.parametrize("slow", [False, True])
def test_the_fused_products_have_the_eager_ones_gradients(folder, monkeypatch, slow):
    monkeypatch.setattr("gptj.pt.kernels.mkl_is_slow", lambda: slow)
    gradients = []
    for implementation in ("eager", "sdpa"):
        model = GPTJForCausalLM.from_pretrained(folder(), attn_implementation=implementation)
        model(IDS, labels=IDS).loss.backward()
        gradients.append({name: p.grad.numpy() for name, p in model.named_parameters()})
    eager, fused = gradients
    assert all(np.abs(fused[name] - eager[name]).max() <= 1e-5 * np.abs(eager[name]).max() for name in eager)


@pytest.fixture
def right(monkeypatch):
    """The right factors of oneDNN's products."""
    factors = []

    def watched(x, weight, bias=None):
        factors.append(weight)
        return onednn_linear(x, weight, bias)

    monkeypatch.setattr("gptj.pt.kernels.onednn_linear", watched)
    return factors


def test_the_fused_products_gather_rows_with_gaps_between_them(right):
    """As a right factor such rows take oneDNN 400 times as long."""
    x, weight = torch.randn(8, 3, 32)[:, -1:].requires_grad_(), torch.randn(48, 32, requires_grad=True)
    Product.apply(x, weight, None).sum().backward()
    torch.testing.assert_close(weight.grad, x.detach().sum((0, 1)).expand(48, 32))
    assert len(right) == 3 and all(factor.is_contiguous() or factor.t().is_contiguous() for factor in right)


@pytest.fixture
def onednn(monkeypatch):
    """Has the model believe that this is an x86 on which oneDNN multiplies all dtypes, and MKL as well as it."""
    monkeypatch.setattr("gptj.pt.kernels.is_x86", lambda: True)
    monkeypatch.setattr("gptj.pt.kernels.onednn_has", lambda device, dtype: True)
    monkeypatch.setattr("gptj.pt.kernels.mkl_is_slow", lambda: False)


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("rows", "few"), [((3,), 0), ((2, 2), 1), ((1, 64), 1), ((65,), 0)])
@torch.inference_mode()
def test_a_few_rows_meet_the_weights_on_their_left(right, rows, few, bias):
    linear, x = Linear(32, 48, bias=bias, fused=False), torch.randn(*rows, 40)[..., :32]
    product = linear(x)
    assert len(right) == few and all(factor.is_contiguous() for factor in right) and product.is_contiguous()
    torch.testing.assert_close(product, torch.nn.functional.linear(x, linear.weight, linear.bias))


@pytest.mark.usefixtures("onednn")
def test_a_processor_that_was_not_measured_keeps_pytorchs_product(right, monkeypatch):
    monkeypatch.setattr("gptj.pt.kernels.is_x86", lambda: False)
    with torch.inference_mode():
        Linear(32, 48, fused=False)(torch.randn(6, 32))
    assert not right


class Named(torch.Tensor):
    """A tensor with rules of its own, as quantised and distributed ones have."""


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize(
    "see",
    [
        lambda linear, x: linear.double()(x.double()),
        lambda linear, x: linear.bfloat16()(x.bfloat16()),
        lambda linear, x: linear(x.as_subclass(Named)),
        lambda linear, x: torch.func.functional_call(linear, {"weight": linear.weight.as_subclass(Named)}, (x,)),
        lambda linear, x: torch.func.vmap(linear)(x),
        lambda linear, x: torch.compile(linear, fullgraph=True, backend="eager")(x),
        torch.autocast("cpu", torch.bfloat16)(lambda linear, x: linear(x)),
        torch.inference_mode(mode=False)(lambda linear, x: linear(x)),
    ],
    ids=["float64", "bfloat16", "subclass", "weight's subclass", "vmap", "compile", "autocast", "training"],
)
def test_whoever_must_see_the_product_done_sees_pytorchs(right, see):
    linear, x = Linear(32, 48, fused=False), torch.randn(6, 6, 32)
    plain = torch.nn.Linear(32, 48)
    plain.load_state_dict(linear.state_dict())
    with torch.inference_mode():
        got, expected = see(linear, x), see(plain, x)
    assert not right and type(got) is type(expected)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_a_state_dict_goes_from_one_model_to_another(folder):
    source, target = GPTJForCausalLM.from_pretrained(folder()), GPTJForCausalLM(CONFIG, seed=9)
    target.load_state_dict(source.state_dict())
    with torch.no_grad():
        assert torch.equal(source(IDS).logits, target(IDS).logits)


@pytest.mark.feature("torch.func: functional_call, grad, vmap", "causal_lm")
def test_gradients_as_a_function_are_those_of_backward(folder):
    model = GPTJForCausalLM.from_pretrained(folder())
    model(IDS, labels=IDS).loss.backward()

    def loss(parameters):
        return torch.func.functional_call(model, parameters, (IDS,), {"labels": IDS, "use_cache": False}).loss

    for name, gradient in torch.func.grad(loss)(dict(model.named_parameters())).items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad, rtol=1e-5, atol=1e-6)


@pytest.mark.feature("torch.func: functional_call, grad, vmap", "causal_lm")
def test_rows_mapped_one_by_one_have_the_oracles_logits(folder, expected):
    model = GPTJForCausalLM.from_pretrained(folder())
    with torch.no_grad():
        logits = torch.func.vmap(lambda row: model(row[None], use_cache=False).logits[0])(IDS)
    assert close(logits.numpy(), expected, "float32")


@pytest.fixture
def few_rows_at_once(monkeypatch):
    monkeypatch.setattr("gptj.pt.heads._rows_at_once", lambda logits: 2)


@pytest.mark.usefixtures("few_rows_at_once")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_loss_and_its_derivatives_are_those_of_torch():
    def derivatives(of):
        logits = LOGITS.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss := of(logits, LABELS), logits)
        return loss, gradient, torch.func.hessian(of)(LOGITS, LABELS)

    for ours, theirs in zip(derivatives(cross_entropy), derivatives(torch.nn.functional.cross_entropy), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-15)


@pytest.mark.usefixtures("few_rows_at_once")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_the_loss_is_differentiable_forward_backward_batched_and_twice():
    arguments = (lambda logits: cross_entropy(logits, LABELS), LOGITS.clone().requires_grad_())
    assert torch.autograd.gradcheck(*arguments, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(*arguments, check_fwd_over_rev=True)


@pytest.mark.usefixtures("few_rows_at_once")
@pytest.mark.parametrize("mapped", [(0, 0), (0, None)])
def test_each_rows_gradient_of_the_loss_is_its_own(mapped):
    batch = LOGITS[:6].view(3, 2, 11)
    labels = LABELS[:6].view(3, 2) if mapped[1] == 0 else LABELS[:2]
    got = torch.func.vmap(torch.func.grad(cross_entropy), mapped)(batch, labels)
    for row, gradient, its in zip(batch, got, labels if mapped[1] == 0 else [labels] * 3, strict=True):
        torch.testing.assert_close(gradient, torch.func.grad(torch.nn.functional.cross_entropy)(row, its))


@pytest.mark.parametrize("labels", [[0, 11], [-1, 0]])
def test_a_label_outside_the_rows_is_refused(labels):
    with pytest.raises(RuntimeError, match="out of bounds"):
        cross_entropy(LOGITS[:2], torch.tensor(labels))


@pytest.mark.feature("torch.compile in one graph, torch.export", "causal_lm")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_one_compiled_graph_has_the_loss_and_gradients(folder):
    model, again = (GPTJForCausalLM.from_pretrained(folder()) for _ in range(2))
    model(IDS, labels=IDS).loss.backward()
    torch.compile(again, fullgraph=True, backend="aot_eager")(IDS, labels=IDS, use_cache=False).loss.backward()
    for (name, expected), got in zip(model.named_parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"input_ids": [[10**6]]}, "input_ids"),
        ({"input_ids": torch.tensor([[10**6]])}, "input_ids"),
        ({"input_ids": [[1, 2]], "position_ids": [[0, 10**6]]}, "position_ids"),
        ({"input_ids": [[1, 2]], "attention_mask": [[1, 7]]}, "attention_mask"),
        ({"input_ids": [[1, 2]], "token_type_ids": [[0, -1]]}, "token_type_ids"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_is_on_the_host_is_checked_there(arguments, said):
    """Not on the model's device: that would be waited for. A device without values stands for one that is busy."""
    model = GPTJForCausalLM(revealing_config()).to("meta")
    with pytest.raises(InputError, match=said):
        model(**arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cache_that_was_made_without_gradients_is_filled_with_them(folder, dtype):
    model = GPTJForCausalLM.from_pretrained(folder(), param_dtype=dtype)
    with torch.no_grad():
        cache = model.init_cache(len(IDS), IDS.shape[1])
    assert {x.dtype for x in (*cache.keys, *cache.values)} == {dtype}
    first = model(IDS[:, :5], past_key_values=cache, use_cache=True)
    first.logits.float().square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


def test_a_cache_that_the_system_has_no_room_for_is_a_clear_error(folder, monkeypatch):
    def refuse(*arguments, **options):
        raise OSError(12, "Cannot allocate memory")

    model = GPTJForCausalLM.from_pretrained(folder())
    monkeypatch.setattr("gptj.pt.weights.mmap.mmap", refuse)
    with pytest.raises(LimitError, match=r"no memory for a cache \(found [0-9,]+ bytes asked for\)"):
        model.init_cache(1, 8)
    monkeypatch.undo()
    with pytest.raises(LimitError, match="no memory for a cache"):
        model.init_cache(10**17, 8)
