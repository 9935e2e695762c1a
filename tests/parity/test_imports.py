"""With all three frameworks installed, a wing loads its own alone."""

import subprocess
import sys

import pytest
from wings import named_backends

FRAMEWORK = {"pt": {"torch"}, "tf": {"tensorflow", "keras"}, "flax": {"jax", "flax"}}
EVERY = set().union(*FRAMEWORK.values())


def loaded_by(statement):
    """The frameworks that a fresh interpreter has after a statement."""
    code = f"{statement}\nimport sys\nprint(*({EVERY} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("backend", named_backends())
def test_a_wing_loads_what_its_own_framework_loads_and_no_more(backend):
    # TensorFlow itself imports jax where it is installed, so `import tensorflow` alone is the measure.
    own = loaded_by("import " + ", ".join(sorted(FRAMEWORK[backend])))
    assert loaded_by(f"import gptj.{backend}") == own
    assert backend == "tf" or own == FRAMEWORK[backend]


@pytest.mark.parametrize("backend", named_backends())
def test_the_environment_variable_chooses(backend):
    code = "from gptj import GPTJForCausalLM; print(GPTJForCausalLM.__module__)"
    environment = {"GPTJ_BACKEND": backend, "PATH": "", "KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == f"gptj.{backend}.heads"


def test_an_installed_framework_that_was_not_chosen_is_asked_for():
    code = "import gptj; gptj.GPTJModel"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PATH": ""})
    assert done.returncode == 1 and "several backends are installed and none was chosen" in done.stderr
