"""What each process does in tests/backends/test_tf_parallel.py; it prints JSON.

parallel_tf.py cut FOLDER SAVED strategy:dp:tp ...   a model that is cut
parallel_tf.py copies FOLDER                         copies of it that Keras' own loop trains
parallel_tf.py workers FOLDER PAGE                   the page's loop over processes, after which the second one dies
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from watching import count_reads, refusal_of

IDS = np.random.default_rng(0).integers(0, 96, (4, 9))
LABELS = IDS.copy()
LABELS[0, 3:] = -100  # the copies have unlike numbers of labels
RATE = 8.0
"""Large, so that what is rounded of the weights counts little in the step."""


def cut(folder: str, saved: str, *meshes: str) -> None:
    from gptj.tf import parallel
    from gptj.tf import processes as talk

    if "DTENSOR_JOBS" not in os.environ:
        one = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(one, [tf.config.LogicalDeviceConfiguration()] * 4)
    processes = parallel.join_processes()
    found: dict[str, Any] = {"agreed": talk.share_number(2**61 + 12345 + processes.rank) - 2**61}
    with parallel.ending_together():
        for words in meshes:
            found[words] = facts(folder, Path(saved), words, alone=processes.size == 1)
    print(json.dumps(found))
    parallel.leave_processes()


def facts(folder: str, saved: Path, words: str, *, alone: bool) -> dict[str, Any]:
    import gptj.tf as gptj
    from gptj.config.schema import schema
    from gptj.reading import safetensors_file
    from gptj.sharding import Mesh, held_by_one, partition_of
    from gptj.tf import parallel

    strategy, dp, tp = words.split(":")
    mesh = Mesh(dp=int(dp), tp=int(tp))
    with count_reads(safetensors_file) as read:
        model = gptj.GPTJForCausalLM.from_pretrained(folder, mesh=mesh, strategy=strategy)
    whole = gptj.GPTJForCausalLM.from_pretrained(folder)
    rows = schema(model.config)
    layouts, held = [], []
    for row in rows:
        found = parameter(model, row.name)
        layout = parallel.dtensor.fetch_layout(found)
        layouts.append([None if cut == parallel.dtensor.UNSHARDED else cut for cut in layout.sharding_specs])
        held.append(int(np.prod(parallel.dtensor.unpack(found)[0].shape)))
    mask = np.ones(IDS.shape, int)
    mask[1, :4] = 0
    asked = {"output_attentions": True, "output_hidden_states": True, "head_mask": np.linspace(0, 1, 4)}
    mine, theirs = (m(IDS, attention_mask=mask, labels=LABELS, **asked) for m in (model, whole))
    pairs = [(mine.logits, theirs.logits), (mine.loss, theirs.loss)]
    pairs += [*zip(mine.attentions, theirs.attentions, strict=True)]
    pairs += [*zip(mine.hidden_states, theirs.hidden_states, strict=True)]
    ways: tuple[dict[str, Any], ...] = ({}, {"do_sample": True, "seed": 3})
    ways += ({"num_beams": 2}, {"attention_mask": mask}) if words == "tp:2:2" else ()
    made: dict[str, Any] = {
        "read": sum(read),
        "held": held,
        "table": [held_by_one(row, strategy, mesh) for row in rows],
        "layouts": layouts,
        "cuts": [[cut[0] if cut else None for cut in partition_of(row, strategy)] for row in rows],
        "difference": max(float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in pairs),
        "tokens": [bool(np.all(generate(model, **way) == generate(whole, **way))) for way in ways],
        "drawn": generate(model, do_sample=True).tolist(),
    }
    if alone:  # of several processes none may say more than a pipe holds: they wait for each other
        made["logits"] = np.asarray(mine.logits).tolist()
        cached = model._decoder(4, 16)
        made["cache"] = [str(cut) for cut in cached.layout.sharding_specs]
        made["sums"] = count_sums(model, saved / f"profile {words}")
        model.save_pretrained(saved / f"folder {words}")
        ends = [Path(place, "model.safetensors").read_bytes()[-1000:] for place in (saved / f"folder {words}", folder)]
        made["folder"] = ends[0] == ends[1]
        scores = [m.score(IDS[:3].tolist(), prefix_token_id=None) for m in (model, whole)]
        made["scores"] = max(
            float(np.abs(a.log_likelihoods - b.log_likelihoods).max()) for a, b in zip(*scores, strict=True)
        )
        made["refused"] = {name: refusal_of(act) for name, act in refusals(model).items()}
    return made


def generate(model: Any, **way: Any) -> Any:
    return np.asarray(model.generate(IDS, max_new_tokens=6, **way))


def parameter(model: Any, name: str) -> Any:
    place = model
    for part in name.split("."):
        place = place[int(part)] if part.isdecimal() else getattr(place, part)
    return place


def count_sums(model: Any, place: Path) -> dict[str, float]:
    """The collectives of a forward pass on each device, as TensorFlow's profiler sees them run.

    The profiler leaves out an operation whose thread has not come to its end when it is stopped, which may be a little
    after its result was used. It adds none: of several passes the fullest is the one that was seen whole.
    """
    return max((count_seen(model, place / str(n)) for n in range(4)), key=lambda seen: sum(seen.values()))


def count_seen(model: Any, place: Path) -> dict[str, float]:
    from tensorflow.tsl.profiler.protobuf import xplane_pb2

    from gptj.tf import parallel

    def logits(ids: Any) -> Any:
        return model.call(input_ids=ids, use_cache=False, return_dict=True).logits

    def run_on_all() -> None:
        for part in parallel.dtensor.unpack(parallel.run_over_mesh(model, "count", logits, IDS, batch=len(IDS))):
            part.numpy()

    run_on_all()
    tf.profiler.experimental.start(str(place))
    run_on_all()
    tf.profiler.experimental.stop()
    space = xplane_pb2.XSpace()
    space.ParseFromString(next(place.rglob("*.xplane.pb")).read_bytes())
    counted: Counter[str] = Counter()
    for plane in space.planes:
        for line in plane.lines:
            for event in line.events:
                counted[plane.event_metadata[event.metadata_id].name.rpartition(":")[2]] += 1
    devices = model.placement.mesh.size
    return {name: n / devices for name, n in counted.items() if name.startswith("Collective") and name.endswith("V2")}


def refusals(model: Any) -> dict[str, Any]:
    return {
        "training": lambda: model(IDS, training=True),
        "use_cache": lambda: model(IDS, use_cache=True),
        "past_key_values": lambda: model(IDS, past_key_values=model.init_cache(4, 16)),
        "tf.function": lambda: tf.function(lambda ids: model(ids).logits)(tf.constant(IDS)),
        "fit": lambda: model.fit(IDS, IDS),
        "save_weights": lambda: model.save_weights("nowhere.weights.h5"),
        "a gradient": lambda: model.loss_gradients(IDS, labels=IDS),
        "taps": lambda: model.taps(IDS),
    } | ({"batch": lambda: model(IDS[:3])} if model.placement.mesh.dp > 1 else {})


# ---- copies


def copies(folder: str) -> None:
    """In a process of its own: TensorFlow confuses the sums of two strategies, and of DTensor, in one."""
    one = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(one, [tf.config.LogicalDeviceConfiguration()] * 2)
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    found: dict[str, Any] = {kind: fit_copies(folder, kind, strategy) for kind in ("causal_lm", "regression")}
    print(json.dumps(found | {"one": step_alone(folder)}))


def fit_copies(folder: str, kind: str, copies: Any) -> dict[str, Any]:
    """Keras' fit on one device and on two: what it says, and how far apart the weights are after a step."""
    import gptj.tf as gptj

    results, moved = [], []
    for strategy in (tf.distribute.get_strategy(), copies):
        with strategy.scope():
            model: Any
            if kind == "causal_lm":
                model, labels = gptj.GPTJForCausalLM.from_pretrained(folder), LABELS
            else:
                model, labels = from_folder(folder), np.arange(4, dtype=np.float32)
            model.compile(optimizer=keras.optimizers.SGD(RATE))
        before = [np.array(weight.numpy()) for weight in model.weights]
        evaluated = model.evaluate(IDS, labels, batch_size=4, verbose=0)
        fitted = model.fit(IDS, labels, batch_size=4, shuffle=False, verbose=0)
        results.append([fitted.history["loss"][0], evaluated])
        moved.append([np.array(w.numpy()) - old for w, old in zip(model.weights, before, strict=True)])
    apart = [float(np.abs(a - b).max() / np.abs(a).max()) for a, b in zip(*moved, strict=True) if np.abs(a).max() > 0]
    return {"results": results, "gradients": max(apart), "moved": len(apart)}


def from_folder(folder: str) -> Any:
    import warnings

    import gptj.tf as gptj

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return gptj.GPTJForSequenceClassification.from_pretrained(
            folder, num_labels=1, pad_token_id=0, problem_type="regression"
        )


def step_alone(folder: str) -> dict[str, Any]:
    """The same step on one device, of a loop of its own."""
    import gptj.tf as gptj

    model = gptj.GPTJForCausalLM.from_pretrained(folder)
    optimizer = keras.optimizers.SGD(RATE)
    with tf.GradientTape() as tape:
        loss = model(IDS, labels=IDS, training=True).loss
    optimizer.apply_gradients(
        zip(tape.gradient(loss, model.trainable_variables), model.trainable_variables, strict=True)
    )
    return {"loss": float(loss), "weights": sums(model)}


def sums(model: Any) -> list[float]:
    return [float(np.abs(weight.numpy().astype(np.float64)).sum()) for weight in model.trainable_variables]


def workers(folder: str, page: str) -> None:
    """The loop that the page has, and then again until somebody is missing."""
    code = next(
        block for block in re.findall(r"```python\n(.*?)```", Path(page).read_text(), re.S) if "Worker" in block
    )
    for words, ours in (
        ('"gpt-j-6b"', repr(folder)),
        ("keras.optimizers.AdamW(1e-5)", f"keras.optimizers.SGD({RATE})"),
    ):
        assert code.count(words) == 1
        code = code.replace(words, ours)
    said: list[float] = []
    inside: dict[str, Any] = {"ids": IDS, "print": said.append}
    exec(compile(code, page, "exec"), inside)
    print(json.dumps({"loss": said[0], "weights": sums(inside["model"])}), flush=True)
    with inside["strategy"].scope():
        inside["model"].compile(optimizer="sgd")
    print(json.dumps(said_of_fit(inside["model"])), flush=True)
    if json.loads(os.environ["TF_CONFIG"])["task"]["index"] == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    loop = code[code.index("rows = ") :].replace(".batch(4)", ".batch(4).repeat()")
    exec(compile(loop, page, "exec"), inside)


def said_of_fit(model: Any) -> str:
    return refusal_of(lambda: model.fit(IDS, IDS, verbose=0))


if __name__ == "__main__":
    {"cut": cut, "copies": copies, "workers": workers}[sys.argv[1]](*sys.argv[2:])
