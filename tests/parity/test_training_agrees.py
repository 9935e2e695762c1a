"""The backends learn alike: the gradient of every parameter, and the parameters after a step of SGD and of AdamW.

All the backends are in one process here, which they share in any order; each is held to the first.
"""

import numpy as np
import pytest
from mutants import revealing_batch
from wings import FLOAT64_RELATIVE, Wing, named_backends, stepped

from gptj.checkpoint import write_checkpoint
from gptj.parity.revealing import revealing_config, revealing_fill

CONFIG = revealing_config()
BATCH = revealing_batch(CONFIG)
IDS, MASK = BATCH.input_ids[:4], BATCH.attention_mask[:4]
CALL = {"input_ids": IDS, "attention_mask": MASK, "labels": np.where(MASK == 1, IDS, -100)}

FLOAT32_RELATIVE = 2e-4
"""Of a tensor's largest gradient. Some 100 float32 sums of 100 terms cost about 1e-6 of their largest term; where terms
cancel, as in a layer norm's scale, the sum may be a hundredth of it."""

ADAMW_ABSOLUTE = 1e-12
"""After a step: parameters near 1 in float64. AdamW's first step is a gradient over its own size, so where a gradient
is much larger than epsilon nothing of its rounding is left, and elsewhere 1e-9 of it times the rate of 1e-3."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("training") / "model", CONFIG, revealing_fill(0))


@pytest.fixture(scope="module")
def trained(folder):
    """For each dtype and backend: loss, gradients."""
    found = {}
    for dtype in ("float64", "float32"):
        for name in named_backends():
            wing = Wing(name)
            wing.allow_float64()
            model = wing.model("causal_lm").from_pretrained(folder, param_dtype=dtype)
            found[dtype, name] = wing.gradients(model, **CALL)
    return found


@pytest.mark.parametrize(("dtype", "relative"), [("float64", FLOAT64_RELATIVE), ("float32", FLOAT32_RELATIVE)])
def test_the_gradients_of_every_parameter_agree(trained, dtype, relative):
    first, *others = named_backends()
    loss, gradients = trained[dtype, first]
    assert others
    for other in others:
        found, theirs = trained[dtype, other]
        assert abs(found - loss) <= relative * loss
        assert theirs.keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert np.abs(theirs[name] - gradient).max() <= relative * np.abs(gradient).max(), (other, name)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("backend", named_backends())
def test_one_step_of_each_optimizer_is_the_papers(trained, folder, backend, kind):
    wing = Wing(backend)
    model = wing.model("causal_lm").from_pretrained(folder, param_dtype="float64")
    before = wing.parameters(model)
    before = {name: value.copy() for name, value in before.items()}
    after = wing.step(model, kind, **CALL)
    _, gradients = trained["float64", backend]
    for name, value in after.items():
        assert np.abs(value - stepped(before[name], gradients[name], kind)).max() <= ADAMW_ABSOLUTE, name
        assert np.abs(value - before[name]).max() > 0, name
