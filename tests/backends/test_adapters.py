"""LoRA adapters in each backend: what they compute, which is at work, what is trained, and what is written."""

from __future__ import annotations

import numpy as np
import pytest
from adapter_samples import EVERY, KINDS, sample_pairs, write_sample_adapter
from click.testing import CliRunner
from wings import close

from gptj.adapters import AdapterConfig, adapter_rows, initial_arrays, merge_folder, read_adapter
from gptj.command.main import gptj_command
from gptj.errors import CheckpointWarning, ConfigError, InputError, LimitError, SchemaError, WriteError
from gptj.parity.oracle import Oracle
from gptj.parity.revealing import revealing_config, revealing_weights
from gptj.sharding import Mesh, Placement

CONFIG = revealing_config()
IDS = np.array([[5, 9, 200, 31, 7, 64], [3, 1, 4, 1, 5, 9]])


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """The folder of a sample adapter, written once."""

    def find(kind="all", seed=0):
        path = tmp_path_factory.getbasetemp() / f"{list(KINDS).index(kind)}-{seed}"
        return path if path.exists() else write_sample_adapter(path, kind, seed=seed)

    return find


@pytest.fixture
def fresh(wing, folder):
    """A model of its own, which may be changed."""

    def load(head="causal_lm", **options):
        wing.allow_float64()
        return wing.model(head).from_pretrained(folder(head), **options)

    return load


def expected_logits(kind=None, seed=0, head="causal_lm"):
    pairs = None if kind is None else sample_pairs(AdapterConfig(**KINDS[kind]), seed=seed)
    oracle = Oracle(CONFIG, revealing_weights(CONFIG, head=head), bare=head == "base", adapter=pairs)
    output = oracle.forward(IDS, logits=head == "causal_lm")
    return output.logits if head == "causal_lm" else output.hidden_states[-1]


def expected_text(kind):
    pairs = None if kind is None else sample_pairs(AdapterConfig(**KINDS[kind]))
    ids, _ = Oracle(CONFIG, revealing_weights(CONFIG), adapter=pairs).generate(IDS, max_new_tokens=4)
    assert CONFIG.eos_token_id not in ids[:, IDS.shape[1] :]
    return ids


def logits(wing, model):
    return wing.numpy(wing.call(model, IDS).logits)


def text(wing, model):
    return wing.numpy(model.generate(IDS, max_new_tokens=4))


@pytest.mark.parametrize(("kind", "dtype"), [*((kind, "float32") for kind in KINDS), ("all", "float64")])
def test_an_adapter_computes_what_its_equation_says(wing, fresh, adapter, kind, dtype):
    model = fresh(param_dtype=dtype)
    model.load_adapter(adapter(kind))
    assert close(logits(wing, model), expected_logits(kind), dtype)
    assert np.abs(expected_logits(kind) - expected_logits()).max() > 0.01  # else this would show nothing


@pytest.mark.parametrize("inference", [False, True])
def test_several_are_held_and_switched_in_calls_and_in_generation(wing, fresh, adapter, inference):
    """Compiled steps hold no adapter that is no longer at work."""
    made = {name: (expected_logits(kind), expected_text(kind)) for name, kind in KIND_OF.items()}
    assert len({text.tobytes() for _, text in made.values()}) == 3
    model = fresh(inference=inference)
    model.load_adapter(adapter("all"), "a")
    model.load_adapter(adapter("patterns"), name="b")
    assert [*model.adapters] == ["a", "b"] and model.active_adapters() == ["b"]
    for name in ("b", "a", None, "b"):
        model.set_adapter(name)
        assert model.active_adapter == name
        assert close(logits(wing, model), made[name][0], "float32")
        assert np.array_equal(text(wing, model), made[name][1])
    model.disable_adapters()
    assert model.active_adapter is None and close(logits(wing, model), made[None][0], "float32")
    model.enable_adapters()
    assert model.active_adapter == "b" and close(logits(wing, model), made["b"][0], "float32")
    model.delete_adapter("b")
    assert model.active_adapter is None and close(logits(wing, model), made[None][0], "float32")
    model.load_adapter(adapter("all"), "b")  # another one by the name of one that was compiled
    assert close(logits(wing, model), made["a"][0], "float32")
    assert not inference or np.array_equal(text(wing, model), made["a"][1])


KIND_OF = {"a": "all", "b": "patterns", None: None}


def test_a_prepared_model_counts_an_adapter_and_trains_nothing(fresh, adapter):
    model = fresh(inference=True)
    before = model.num_parameters()
    model.load_adapter(adapter())
    added = sum(row.size for row in adapter_rows(AdapterConfig(**KINDS["all"]), CONFIG))
    assert model.num_parameters() == before + added and model.num_parameters(only_trainable=True) == 0
    acts = lambda: model.add_adapter("new"), lambda: model.load_adapter(adapter(), "x", is_trainable=True)
    for act in (*acts, model.merge_adapter):
        with pytest.raises(InputError, match="prepared for inference"):
            act()


def test_an_adapter_that_was_there_before_is_there_after_preparing(wing, fresh, adapter):
    model = fresh()
    model.load_adapter(adapter())
    model.prepare_for_inference()
    assert close(logits(wing, model), expected_logits("all"), "float32")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_an_adapter_of_a_16_bit_model_is_float32_and_merges(wing, fresh, adapter, dtype, tmp_path):
    model = fresh(param_dtype=dtype)
    model.load_adapter(adapter())
    apart = logits(wing, model)
    assert np.abs(apart - expected_logits("all")).max() < 0.3 < np.abs(apart - expected_logits()).max()
    stored = read_adapter(model.save_adapter(tmp_path / "again"))
    assert {tensor.dtype for tensor in stored.stored.values()} == {"float32"}
    model.merge_adapter()
    assert np.abs(logits(wing, model) - expected_logits("all")).max() < 0.3


def test_every_head_takes_one(wing, fresh, adapter):
    model = fresh("base")
    model.load_adapter(adapter())
    hidden = wing.numpy(wing.call(model, IDS).last_hidden_state)
    assert close(hidden, expected_logits("all", head="base"), "float32")
    for head in ("sequence_classification", "question_answering"):
        model = fresh(head)
        output = next(iter(wing.call(model, IDS).values()))
        model.load_adapter(adapter())
        assert not np.array_equal(wing.numpy(next(iter(wing.call(model, IDS).values()))), wing.numpy(output))


def test_a_new_one_adds_nothing_and_starts_with_the_same_bits(wing, fresh, tmp_path):
    model = fresh()
    before = logits(wing, model)
    model.add_adapter(r=4, target_modules=EVERY, seed=7)
    assert np.array_equal(logits(wing, model), before) and model.active_adapter == "default"
    stored = read_adapter(model.save_adapter(tmp_path / "a"))
    for row, a, b in stored.arrays(CONFIG):
        start = initial_arrays(row, 7)
        assert np.array_equal(a, start[0]) and not b.any() and np.abs(a).max() <= 1 / np.sqrt(a.shape[1])


def sum_of_logits(wing, model, **training):
    """The loss, and its gradient by what an optimizer would see, as a list of arrays."""
    if wing.name == "pt":
        model.train(bool(training))
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        return loss, [wing.numpy(p.grad) for p in model.parameters() if p.requires_grad]
    if wing.name == "tf":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            loss = model(IDS, labels=IDS, training=bool(training)).loss
        return loss, [wing.numpy(g) for g in tape.gradient(loss, model.trainable_variables)]
    import jax

    options = {"train": True, "dropout_rng": jax.random.key(0)} if training else {}

    def loss_of(tree):
        return model.with_adapter_params(tree)(IDS, labels=IDS, **options).loss

    loss, tree = jax.jit(jax.value_and_grad(loss_of))(model.adapter_params)
    return loss, [wing.numpy(g) for g in jax.tree.leaves(tree)]


def test_the_adapter_alone_is_trained(wing, fresh):
    model = fresh()
    whole = model.num_parameters(only_trainable=True)
    model.add_adapter("one", r=2, target_modules=EVERY)
    added = sum(row.size for row in adapter_rows(AdapterConfig(r=2, target_modules=EVERY), CONFIG))
    assert model.num_parameters(only_trainable=True) == added
    loss, slopes = sum_of_logits(wing, model)
    assert sum(slope.size for slope in slopes) == added
    assert np.isfinite(wing.numpy(loss)) and any(np.abs(slope).max() > 0 for slope in slopes)
    model.add_adapter("two", r=3)
    model.set_adapter("one")
    assert model.num_parameters(only_trainable=True) == added
    model.set_adapter(None)
    assert model.num_parameters(only_trainable=True) == 0
    model.delete_adapter(["one", "two"])
    assert model.num_parameters(only_trainable=True) == whole == model.num_parameters()


def test_the_gradient_of_an_adapter_is_that_of_its_equation(wing, fresh, adapter):
    """A step along it changes the loss by what it says."""
    model = fresh(param_dtype="float64")
    model.load_adapter(adapter(), is_trainable=True)
    loss, slopes = sum_of_logits(wing, model)
    squares, step = sum(float((slope**2).sum()) for slope in slopes), 1e-6
    if wing.name == "pt":
        import torch

        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p -= step * p.grad
                    p.grad = None
    elif wing.name == "tf":
        for variable, slope in zip(model.trainable_variables, slopes, strict=True):
            variable.assign_sub(step * slope)
    else:
        import jax

        leaves, shape = jax.tree.flatten(model.adapter_params)
        model.adapter_params = jax.tree.unflatten(shape, [x - step * g for x, g in zip(leaves, slopes, strict=True)])
    after, _ = sum_of_logits(wing, model)
    assert float(wing.numpy(loss)) - float(wing.numpy(after)) == pytest.approx(step * squares, rel=1e-3)


def test_training_with_recomputed_blocks_gives_the_same_gradient(wing, fresh, adapter):
    model = fresh()
    model.load_adapter(adapter(), is_trainable=True)
    _, kept = sum_of_logits(wing, model, train=True)
    if wing.name == "pt":
        model.zero_grad()
    model.gradient_checkpointing_enable()
    _, again = sum_of_logits(wing, model, train=True)
    assert all(np.allclose(a, b, atol=1e-6) for a, b in zip(kept, again, strict=True))


def test_dropout_is_on_the_adapters_way_in_training_alone(wing, fresh, adapter):
    model = fresh()
    model.add_adapter(r=4, target_modules=EVERY, lora_dropout=0.5)
    plain, dropped = sum_of_logits(wing, model)[0], sum_of_logits(wing, model, train=True)[0]
    assert float(wing.numpy(plain)) == float(wing.numpy(dropped))  # B is zero: the base alone speaks
    if wing.name == "pt":
        for name, p in model.named_parameters():
            if name.endswith(".b"):
                p.data.fill_(0.1)
    elif wing.name == "tf":
        for variable in model.trainable_variables:
            if variable.path.endswith("/b"):
                variable.assign(np.full(variable.shape, 0.1, np.float32))
    else:
        import jax

        model.adapter_params = jax.tree.map(lambda x: x if x.shape[0] == 4 else x + 0.1, model.adapter_params)
    plain, again, dropped = (float(wing.numpy(sum_of_logits(wing, model, **o)[0])) for o in ({}, {}, {"train": True}))
    assert plain == again != dropped


def test_what_is_saved_is_what_was_loaded(wing, fresh, adapter, tmp_path):
    model = fresh()
    for kind in KINDS:
        model.load_adapter(adapter(kind), "one")
        model.save_adapter(tmp_path / "saved", overwrite=True)
        one, other = read_adapter(adapter(kind)), read_adapter(tmp_path / "saved")
        pairs = zip(one.arrays(CONFIG), other.arrays(CONFIG), strict=True)
        assert all(np.array_equal(x, y) for (_, *a), (_, *b) in pairs for x, y in zip(a, b, strict=True))
        assert one.config.to_dict() | {"task_type": "CAUSAL_LM"} == other.config.to_dict()
        model.delete_adapter("one")
    model.load_adapter(adapter())
    with pytest.raises(WriteError, match=r"adapter_(config|model)"):
        model.save_adapter(tmp_path / "saved")


def test_merging_makes_it_part_of_the_model(wing, fresh, adapter, folder, tmp_path):
    model = fresh()
    trainable = model.num_parameters(only_trainable=True)
    model.load_adapter(adapter("patterns"))
    model.merge_adapter()
    assert model.adapters == {} and model.num_parameters(only_trainable=True) == trainable
    assert close(logits(wing, model), expected_logits("patterns"), "float32")
    merged = wing.model("causal_lm").from_pretrained(merge_folder(folder(), adapter("patterns"), tmp_path / "merged"))
    assert np.array_equal(logits(wing, merged), logits(wing, model))


def test_the_command_line_puts_one_to_work(wing, adapter, folder, tmp_path):
    ids = "5 9 200 31"
    merged = merge_folder(folder(), adapter("patterns"), tmp_path / "merged")
    said = []
    for model, *more in ((folder(),), (folder(), "--adapter", adapter("patterns")), (merged,)):
        words = ("generate", model, "--token-ids", ids, "--backend", wing.name, "--max-new-tokens", "5", *more)
        done = CliRunner().invoke(gptj_command, [*map(str, words)])
        assert done.exit_code == 0, done.output
        said.append(done.stdout)
    assert said[1] == said[2] != said[0]


def test_saving_the_model_writes_the_base_and_says_so(wing, fresh, adapter, tmp_path):
    model = fresh()
    model.load_adapter(adapter(), "mine")
    with pytest.warns(CheckpointWarning, match="mine: an adapter, which is not written here"):
        model.save_pretrained(tmp_path / "base")
    again = wing.model("causal_lm").from_pretrained(tmp_path / "base")
    assert close(logits(wing, again), expected_logits(), "float32")


PEFT_FIELDS = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}

REFUSALS = [
    (lambda m, a: m.load_adapter(a, "a/b"), InputError, "adapter_name"),
    (lambda m, a: m.load_adapter(a, ""), InputError, "adapter_name"),
    (lambda m, a: m.set_adapter("defaul"), InputError, "Did you mean default"),
    (lambda m, a: m.load_adapter(a), InputError, "has an adapter of that name"),
    (lambda m, a: m.delete_adapter(["default", "x"]), InputError, "'x'"),
    (lambda m, a: m.add_adapter("n", rr=3), ConfigError, "rr"),
    (lambda m, a: m.add_adapter("n", r=0), ConfigError, "r:"),
    (lambda m, a: m.add_adapter("n", r=True), ConfigError, "r:"),
    (lambda m, a: m.add_adapter("n", lora_alpha="16"), ConfigError, "lora_alpha"),
    (lambda m, a: m.add_adapter("n", lora_dropout=1.0), ConfigError, "lora_dropout"),
    (lambda m, a: m.add_adapter("n", use_dora=True), ConfigError, "use_dora"),
    (lambda m, a: m.add_adapter("n", bias="all"), ConfigError, "bias"),
    (lambda m, a: m.add_adapter("n", modules_to_save=["lm_head"]), ConfigError, "modules_to_save"),
    (lambda m, a: m.add_adapter("n", target_modules=["q_proj", "lm_head"]), ConfigError, "lm_head"),
    (lambda m, a: m.add_adapter("n", target_modules=["q_prj"]), ConfigError, "Did you mean q_proj"),
    (lambda m, a: m.add_adapter("n", target_modules=[]), ConfigError, "target_modules"),
    (lambda m, a: m.add_adapter("n", rank_pattern={"q_prj": 4}), ConfigError, "rank_pattern: 'q_prj'"),
    (
        lambda m, a: m.add_adapter("n", target_modules=["q_proj"], rank_pattern={"h.0.attn.v_proj": 4}),
        ConfigError,
        "v_proj'.*Targets and blocks that are chosen leave it out",
    ),
    (lambda m, a: m.add_adapter("n", init_lora_weights="gaussian"), ConfigError, "init_lora_weights: not how"),
    (lambda m, a: m.add_adapter({**PEFT_FIELDS, "init_lora_weights": False}, "n"), ConfigError, "init_lora_weights"),
    (lambda m, a: m.add_adapter({**PEFT_FIELDS, "inference_mode": True}, "n"), ConfigError, "inference_mode"),
    (lambda m, a: m.add_adapter("n", peft_type="IA3"), ConfigError, "peft_type"),
    (lambda m, a: m.add_adapter("n", layers_to_transform=[3]), ConfigError, "layers_to_transform"),
    (lambda m, a: m.add_adapter("n", name="m"), InputError, "given twice"),
    (
        lambda m, a: m.add_adapter("n", r=2**40),
        LimitError,
        "r: matrices larger than the memory .*found rank 1099511627776: ",
    ),
    (lambda m, a: m.add_adapter("n", rank_pattern={"q_proj": 2**70}), LimitError, "rank_pattern: matrices larger"),
]


def test_what_cannot_be_meant_is_refused_by_name_and_changes_nothing(wing, fresh, adapter):
    model = fresh()
    model.load_adapter(adapter())
    for act, error, names in REFUSALS:
        with pytest.raises(error, match=names):
            act(model, adapter())
    assert [*model.adapters] == ["default"] and model.active_adapter == "default"
    assert close(logits(wing, model), expected_logits("all"), "float32")


def test_what_a_cut_model_does_not_with_an_adapter_says_the_way(fresh, adapter, monkeypatch, tmp_path):
    model = fresh()
    model.load_adapter(adapter(), "there")
    monkeypatch.setattr(type(model), "placement", Placement("fsdp", Mesh(dp=2), {}, None), raising=False)
    for act in (
        lambda: model.load_adapter(adapter()),
        lambda: model.load_adapter(adapter(), is_trainable=True),
        lambda: model.add_adapter(r=2),
        lambda: model.merge_adapter(),
        lambda: model.save_adapter(tmp_path / "saved"),
    ):
        with pytest.raises(InputError, match=r"_adapter: this process holds a part.*adapter merge DIR ADAPTER OUT"):
            act()
    assert [*model.adapters] == ["there"] and not (tmp_path / "saved").exists()


def test_an_adapter_of_another_model_is_refused(fresh, tmp_path):
    write_sample_adapter(tmp_path / "wide", config=revealing_config(n_embd=64, rotary_dim=8))
    model = fresh()
    with pytest.raises(SchemaError, match="misshapen"):
        model.load_adapter(tmp_path / "wide")
    assert model.adapters == {} and model.num_parameters(only_trainable=True) == model.num_parameters()
