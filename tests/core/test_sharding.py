"""The table of shardings and the memory plan: arithmetic, which no framework is asked."""

from __future__ import annotations

import contextlib
import itertools
import json
import socket
import sys
import types

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from watching import count_reads

from gptj import GPTJConfig
from gptj.command.demo.journey import SHAKESPEARE
from gptj.command.main import gptj_command
from gptj.command.together import Copies
from gptj.config.initial import initial_tensor
from gptj.config.schema import schema, schema_by_name
from gptj.errors import FormatError, InputError
from gptj.sharding import STRATEGIES, Mesh, check_mesh, check_strategy, held_by_one, partition_of, slices
from gptj.sharding.plan import MemoryPlan, Work, list_meshes, plan_memory
from gptj.sharding.processes import environment_place, interface_of, own_address, require_same

SMALL = GPTJConfig(vocab_size=96, n_positions=32, n_embd=48, n_layer=2, n_head=4, rotary_dim=4)
SIX = GPTJConfig()


@settings(deadline=None)
@given(strategy=st.sampled_from(STRATEGIES), dp=st.sampled_from((1, 2, 4)), tp=st.sampled_from((1, 2, 4)))
def test_the_parts_of_a_mesh_are_the_tensor_and_nothing_twice_but_copies(strategy, dp, tp):
    mesh = Mesh(dp=dp, tp=tp)
    for spec in schema(SMALL):
        seen = np.zeros(spec.shape, int)
        for rank in range(mesh.size):
            seen[slices(spec, strategy, mesh, mesh.coordinates(rank))] += 1
        cut = {axis for axes in partition_of(spec, strategy) for axis in axes}
        copies = mesh.size // mesh.along(cut)
        assert (seen == copies).all(), (spec.name, strategy)


@st.composite
def models(draw):
    """Sizes of every kind: heads, widths, vocabularies and labels that meshes divide, and some that they do not."""
    size = st.sampled_from((6, 7, 8, 12, 16, 24, 36, 48, 50, 60))
    heads, head_dim = draw(st.sampled_from((1, 2, 3, 4, 6, 8, 12))), 2 * draw(st.integers(1, 6))
    return GPTJConfig(
        vocab_size=draw(size), n_positions=8, n_embd=heads * head_dim, n_layer=draw(st.integers(1, 2)),
        n_head=heads, rotary_dim=2, n_inner=draw(st.none() | size), num_labels=draw(st.integers(1, 5)),
        **dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0),
    )  # fmt: skip


@settings(deadline=None, max_examples=150)
@given(config=models(), strategy=st.sampled_from(STRATEGIES), dp=st.sampled_from((1, 2, 3, 4, 6, 8)),
       tp=st.sampled_from((1, 2, 3, 4, 6, 8)), data=st.data())  # fmt: skip
def test_slices_of_any_model_on_any_mesh_that_is_allowed_cover_each_tensor_once(config, strategy, dp, tp, data):
    """Every number of every tensor is in as many processes as have copies; what is refused is what does not divide."""
    mesh, batch = Mesh(dp=dp, tp=tp), data.draw(st.integers(1, 12))
    cuts_tp, cuts_all = strategy in ("tp", "tp_fsdp"), strategy in ("fsdp", "tp_fsdp")
    divides = {
        "tp": cuts_tp or tp == 1,
        "n_head": not cuts_tp or config.n_head % tp == 0,
        "vocab_size": not cuts_tp or config.vocab_size % tp == 0,
        "n_inner": config.inner_width % ((tp if cuts_tp else 1) * (dp if cuts_all else 1)) == 0,
        "n_embd": not cuts_all or config.n_embd % dp == 0,
        "batch": batch % dp == 0,
    }
    broken = [name for name, fits in divides.items() if not fits]
    if broken:
        with pytest.raises(InputError) as caught:
            check_mesh(config, strategy, mesh, batch=batch)
        assert caught.value.where == broken[0] and caught.value.hint
        return
    check_mesh(config, strategy, mesh, batch=batch)
    for head in ("causal_lm", "sequence_classification"):
        for spec in schema(config, head):
            cut = {axis for axes in partition_of(spec, strategy) for axis in axes}
            seen = np.zeros(spec.shape, int)
            largest = 0
            for rank in range(mesh.size):
                part = slices(spec, strategy, mesh, mesh.coordinates(rank))
                assert all(0 <= one.start <= one.stop <= size for one, size in zip(part, spec.shape, strict=True))
                seen[part] += 1
                largest = max(largest, seen[part].size)
            assert (seen == mesh.size // mesh.along(cut)).all(), (spec.name, strategy)
            assert largest == held_by_one(spec, strategy, mesh), "the first process is the fullest"


def test_six_b_is_cut_for_as_many_devices_as_there_are():
    """50,400 tokens are no multiple of 64, and nothing but the head's bias is cut along dp by them."""
    for strategy, mesh in (("fsdp", Mesh(dp=64)), ("tp_fsdp", Mesh(dp=32, tp=8)), ("fsdp", Mesh(dp=256))):
        check_mesh(SIX, strategy, mesh)
        held = sum(held_by_one(row, strategy, mesh) for row in schema(SIX))
        assert held <= sum(row.size for row in schema(SIX)) / mesh.size * 1.01


def test_each_strategy_cuts_what_it_says():
    rows = schema_by_name(SIX)
    block = "transformer.h.0."
    expected = {
        ("tp", block + "attn.q_proj.weight"): (("tp",), ()),
        ("tp", block + "attn.out_proj.weight"): ((), ("tp",)),
        ("tp", block + "mlp.fc_in.bias"): (("tp",),),
        ("tp", block + "mlp.fc_out.bias"): ((),),
        ("tp", "transformer.wte.weight"): (("tp",), ()),
        ("fsdp", block + "mlp.fc_out.weight"): (("dp",), ()),
        ("fsdp", block + "mlp.fc_in.bias"): (("dp",),),
        ("tp_fsdp", block + "mlp.fc_in.weight"): (("tp",), ("dp",)),
        ("tp_fsdp", "lm_head.bias"): (("tp", "dp"),),
        ("dp", "transformer.wte.weight"): ((), ()),
    }
    assert {key: partition_of(rows[key[1]], key[0]) for key in expected} == expected


@pytest.mark.parametrize("strategy,mesh,most", [("tp", Mesh(tp=8), 1 / 8), ("fsdp", Mesh(dp=8), 1 / 8),
                                                 ("tp_fsdp", Mesh(dp=4, tp=4), 1 / 16)])  # fmt: skip
def test_a_device_holds_its_share_and_one_percent(strategy, mesh, most):
    held = sum(held_by_one(row, strategy, mesh) for row in schema(SIX))
    whole = sum(row.size for row in schema(SIX))
    assert most <= held / whole <= most + 0.01


@pytest.mark.parametrize(
    "changes,strategy,mesh,batch,where",
    [
        ({}, "tp", Mesh(tp=8), None, "n_head"),
        ({"vocab_size": 97}, "tp", Mesh(tp=2), None, "vocab_size"),
        ({"n_inner": 98}, "tp", Mesh(tp=4), None, "n_inner"),
        ({"n_embd": 44}, "fsdp", Mesh(dp=8), None, "vocab_size n_embd n_inner"),
        ({}, "dp", Mesh(dp=4), 2, "batch"),
        ({}, "dp", Mesh(dp=2, tp=2), None, "tp"),
        ({}, "fsdp", Mesh(dp=2, tp=2), None, "tp"),
    ],
)
def test_what_cannot_be_cut_is_refused_by_name(changes, strategy, mesh, batch, where):
    config = SMALL.replace(**changes)
    with pytest.raises(InputError) as caught:
        check_mesh(config, strategy, mesh, batch=batch)
    assert caught.value.where in where.split()
    assert "multiple" in str(caught.value) or "cuts nothing" in str(caught.value)


def test_names_and_numbers_that_are_none_are_refused():
    with pytest.raises(InputError, match="Did you mean fsdp"):
        check_strategy("fdsp")
    for size in (0, -1, True, 1.0):
        with pytest.raises(InputError, match="whole number"):
            Mesh(dp=size)
    with pytest.raises(InputError, match="0 to 3"):
        Mesh(dp=2, tp=2).coordinates(4)


def test_launch_variables_are_read_together_or_not_at_all(monkeypatch):
    for name in ("N", "I"):
        monkeypatch.delenv(name, raising=False)
    assert environment_place("N", "I") == (None, None)
    monkeypatch.setenv("N", "4")
    with pytest.raises(InputError, match="I"):
        environment_place("N", "I")
    monkeypatch.setenv("I", "4")
    with pytest.raises(InputError, match="below 4"):
        environment_place("N", "I")
    monkeypatch.setenv("I", "3")
    assert environment_place("N", "I") == (4, 3)


def test_a_host_is_known_by_the_address_that_others_reach():
    """Each says how it reaches the first; the first's own name often means an address of its own alone."""
    assert own_address("127.0.0.1", lambda mine: [mine, mine]) is None  # one host
    assert own_address("127.0.0.1", lambda mine: [mine, ""]) is None
    assert own_address("127.0.0.1", lambda mine: [mine, "127.0.0.9"]) is None
    assert own_address("127.0.0.1", lambda mine: [mine, "192.0.2.77"]) in (_way_to("192.0.2.77"), None)
    assert own_address("name.invalid", lambda mine: [mine, mine]) is None


def _way_to(address):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way:
        try:
            way.connect((address, 9))
        except OSError:  # a machine without a network
            return None
        return way.getsockname()[0]


@pytest.mark.skipif(sys.platform != "linux", reason="the question is Linux'")
def test_an_interface_is_found_by_its_address():
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("203.0.113.9") is None and interface_of("::1") is None and interface_of("name") is None


def test_what_is_another_than_the_first_processs_is_refused():
    require_same("0f" * 32, lambda number: number, problem="another", file="m", hint="Share it")
    with pytest.raises(InputError, match=r"m: another .expected the same.*Share it"):
        require_same("0f" * 32, lambda number: 5, problem="another", file="m", hint="Share it")


def test_other_prompts_than_the_first_processs_are_refused(monkeypatch):
    parallel = types.SimpleNamespace(copy_of=lambda model: (1, 2))
    talk = types.SimpleNamespace(share_number=lambda number: 7)
    monkeypatch.setitem(sys.modules, "gptj.other.parallel", parallel)
    monkeypatch.setitem(sys.modules, "gptj.other.processes", talk)
    with pytest.raises(InputError, match=r"the texts on .* are others than the first process"):
        Copies.of(types.SimpleNamespace(placement=1), "other", [[1, 2]])
    talk.share_number = lambda number: number
    assert Copies.of(types.SimpleNamespace(placement=1), "other", [[1, 2]]).count == 2


def test_a_plan_counts_weights_and_optimizer_exactly():
    work = Work(training=True, batch=4, length=8)
    whole = sum(row.size for row in schema(SMALL)) * 4
    alone = plan_memory(SMALL, "dp", Mesh(), work)
    assert (alone.weights, alone.gradients, alone.optimizer) == (whole, whole, 2 * whole)
    half = plan_memory(SMALL, "dp", Mesh(), Work(training=True, batch=4, length=8, dtype="bfloat16"))
    assert half.optimizer == whole  # torch keeps moments in the parameters' dtype
    assert alone.passing == 2 * 4 * 48 * 48 * 4  # AdamW works on the largest tensor in two copies
    assert alone.total == 3 * whole + max(whole + alone.passing, alone.activations)
    cut = plan_memory(SMALL, "fsdp", Mesh(dp=4), work)
    assert whole <= 4 * cut.weights <= 1.01 * whole + 4096
    assert plan_memory(SMALL, "dp", Mesh(), Work(batch=2, length=8)).cache == 2 * 2 * 2 * 48 * 8 * 4


def test_more_rows_tokens_and_devices_move_a_plan_as_they_should():
    def total(**changes):
        return plan_memory(
            SIX, "fsdp", Mesh(dp=2), Work(**{"training": True, "batch": 4, "length": 512, **changes})
        ).total

    assert total(batch=8) > total() and total(length=1024) > total()
    assert total(batch=32, recompute=True) < total(batch=32) and total(dtype="bfloat16") < total()
    sizes = [plan_memory(SIX, "tp", Mesh(tp=n), Work(batch=1)).total for n in (1, 2, 4, 8)]
    assert sizes == sorted(sizes, reverse=True)


def test_a_mesh_that_does_not_fit_is_a_line_of_the_plan():
    plans = [
        plan_memory(SMALL, strategy, mesh, Work(batch=8, length=8)) for strategy, mesh in list_meshes(8, training=False)
    ]
    problems = {(made.strategy, made.mesh.tp): made.problem for made in plans if made.problem}
    assert list(problems) == [("tp", 8)] and "n_head" in problems["tp", 8]
    assert not MemoryPlan("tp", Mesh(tp=8), problem="no").fits(10**15)


def test_the_command_prints_a_plan_and_the_line_that_starts_it(tmp_path):
    (tmp_path / "config.json").write_text(SIX.to_json())
    run = CliRunner().invoke(gptj_command, ["plan", str(tmp_path), "--devices", "8", "--dtype", "bfloat16"])
    assert run.exit_code == 0, run.output
    assert max(map(len, run.output.splitlines()[:-1])) <= 80
    assert "torchrun --nproc_per_node=8 -m gptj generate" in run.output and "--tp 8" in run.output
    run = CliRunner().invoke(
        gptj_command, ["plan", str(tmp_path / "config.json"), "--training", "--memory", "16GiB", "--json"]
    )
    (made,) = json.loads(run.output)["plans"]
    for words, line in (
        (["--devices", "2"], "torchrun --nproc_per_node=2 -m gptj finetune"),
        (["--devices", "2", "--recompute"], "DATA OUT --checkpoint-gradients --backend pt --strategy"),
        (["--devices", "2", "--dtype", "bfloat16"], 'dtype="bfloat16"'),
        (["--devices", "2", "--batch", "6"], " --batch 6 --length 2048"),
        ([], "gptj finetune"),
    ):
        words = ["plan", str(tmp_path), "--training", "--memory", "999GiB", *words]
        assert line in CliRunner().invoke(gptj_command, words).output
    assert made["fits"] is False and made["total"] > 90 * 2**30
    done = CliRunner().invoke(gptj_command, ["plan", str(tmp_path), "--memory", "many"])
    assert "--memory" in str(done.exception)
    done = CliRunner().invoke(gptj_command, ["plan", str(tmp_path), "--devices", "99999999999"])
    assert str(done.exception).startswith("devices: out of range")  # and not the batch, which is as many
    for wrong in (["--memory", "many"], ["--devices", "0"], ["--length", "4096"]):
        assert CliRunner().invoke(gptj_command, ["plan", str(tmp_path), *wrong]).exit_code != 0


def test_a_plan_of_what_is_no_models_folder_says_what_to_do(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(SIX.to_json())
    two = ["--devices", "2", "--memory", "999GiB"]
    done = CliRunner().invoke(gptj_command, ["plan", str(tmp_path / "config.json"), *two])
    assert f"-m gptj generate {tmp_path} " in done.output, "the folder, which generate takes"
    done = CliRunner().invoke(gptj_command, ["plan", str(tmp_path), *two, "--training", "--dtype", "bfloat16"])
    assert f'from_pretrained("{tmp_path}", strategy=' in done.output, "Python"
    done = CliRunner().invoke(gptj_command, ["plan", str(SHAKESPEARE)])
    assert isinstance(done.exception, FormatError) and "gptj convert" in str(done.exception)
    fetched = []

    def locate(self, name, *, patterns):
        fetched.append((str(name), patterns))
        return tmp_path

    monkeypatch.setattr("gptj.paths.hub.HubPlace.locate", locate)
    done = CliRunner().invoke(gptj_command, ["plan", "somebody/gpt-j", *two])
    assert fetched == [("somebody/gpt-j", ("config.json",))] and "-m gptj generate somebody/gpt-j " in done.output


@settings(deadline=None, max_examples=30)
@given(rows=st.integers(1, 40), columns=st.integers(1, 40), data=st.data())
def test_a_part_of_a_file_is_that_part_and_no_more_is_read(tmp_path_factory, rows, columns, data):
    from safetensors.numpy import save_file

    from gptj.reading import safetensors_file

    whole = np.arange(rows * columns, dtype=np.float32).reshape(rows, columns)
    path = tmp_path_factory.mktemp("part") / "x.safetensors"
    save_file({"before": np.zeros(3, np.float32), "x": whole}, path)
    part = tuple(slice(*sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n))))) for n in (rows, columns))
    file = safetensors_file.read_safetensors(path)
    with count_reads(safetensors_file) as read:
        found = file.read_part(file.tensors["x"], part)
    assert np.array_equal(found, whole[part]) and sum(read) == found.nbytes


def test_start_values_do_not_hang_on_the_mesh():
    spec = schema(SMALL)[0]
    whole = initial_tensor(spec, SMALL, 0)
    parts = [whole[slices(spec, "tp", Mesh(tp=4), {"tp": n})] for n in range(4)]
    assert np.array_equal(np.concatenate(parts), whole)
    assert len(list(itertools.chain(*parts))) == len(whole)


def test_a_refusal_names_the_sizes_that_every_field_would_fit():
    config = GPTJConfig(vocab_size=100, n_positions=32, n_embd=64, n_layer=1, n_head=16, rotary_dim=4, n_inner=96)
    cases = itertools.product(("tp", "fsdp", "tp_fsdp"), (1, 3, 4, 6), (1, 2, 5, 8, 16))
    hints = {}
    for strategy, dp, tp in cases:
        if strategy == "fsdp" and tp > 1:
            continue
        with contextlib.suppress(InputError):
            check_mesh(config, strategy, Mesh(dp=dp, tp=tp))
            continue
        with pytest.raises(InputError) as refused:
            check_mesh(config, strategy, Mesh(dp=dp, tp=tp))
        hints[strategy, dp, tp] = str(refused.value).rpartition("Choose ")[2]
    assert hints["tp", 1, 5] == "tp among 1, 2, 4"  # 16 heads go onto 8 devices, 100 tokens do not
    assert hints["fsdp", 3, 1] == "dp among 1, 2" and hints["tp_fsdp", 3, 2] == "dp among 1, 2"
    assert hints["tp_fsdp", 6, 8] == "tp among 1, 2, 4, and another dp"


@pytest.mark.parametrize("memory", ["16", "80000"])
def test_bytes_that_no_device_has_are_taken_for_a_forgotten_unit(tmp_path, memory):
    (tmp_path / "config.json").write_text(SMALL.to_json())
    with pytest.raises(InputError, match=f"--memory: too little for a device .*found '?{memory}"):
        gptj_command.main(["plan", str(tmp_path), "--memory", memory], standalone_mode=False)
