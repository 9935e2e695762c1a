"""Each library behind the same four methods, as a user of that library would write them.

This runs in the contender's own process and environment, so it imports nothing that is not there: the standard
library, and inside the methods the library itself. A contender generates a fixed number of tokens.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

RATE = 1e-6
"""Of the training step's plain gradient descent, which has no state to hold: the step is what is measured."""


DRAWN: dict[str, dict[str, float]] = {
    "greedy": {},
    "nucleus": {"top_k": 0, "top_p": 0.9},
    "penalised": {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "repetition_penalty": 1.1},
}
"""How tokens are chosen, in the words of transformers' `generate`; all but the first draw them."""


class Engine:
    """A library that loads a folder, writes tokens, and maybe trains.

    Args:
        folder: the contender's copy of the weights.
        options: the contender's.
        threads: how many to compute with.
    """

    packages: tuple[str, ...] = ()
    """Whose versions are worth a note."""

    def __init__(self, folder: str, options: dict[str, Any], threads: int) -> None:
        self.folder, self.options, self.threads = folder, options, threads
        self.model: Any = None
        self._step: Any = None

    def bring_in(self) -> dict[str, str]:
        """Import the library. Returns its versions."""
        self.load_library()
        return {name: importlib.metadata.version(name) for name in self.packages}

    def load_library(self) -> None:
        raise NotImplementedError

    def load(self) -> None:
        """Make `model` of the folder."""
        raise NotImplementedError

    def generate(self, ids: list[list[int]], new: int, choice: str = "greedy") -> list[list[int]]:
        """The `new` tokens that follow each row, chosen as DRAWN says."""
        raise NotImplementedError

    def train(self, ids: list[list[int]]) -> float:
        """The loss, after whose gradient the weights went one step."""
        if self._step is None:
            self._step = self.make_step()
        return float(self._step(ids))

    def make_step(self) -> Any:
        raise NotImplementedError(f"{type(self).__name__} does not train")


def options_of(choice: str) -> dict[str, Any]:
    return {"do_sample": bool(DRAWN[choice]), **DRAWN[choice]}


def tail(sequences: Any, new: int) -> list[list[int]]:
    return [[int(token) for token in row[-new:]] for row in sequences]


class Ours(Engine):
    """A wing of gptj; `options["load"]` is what from_pretrained is given."""

    def load_library(self) -> None:
        self.family = self.options["family"]
        self.packages = {"pt": ("torch",), "tf": ("tensorflow-cpu", "keras"), "flax": ("jax", "flax")}[self.family]
        if self.family == "pt":
            import torch

            torch.set_num_threads(self.threads)
        elif self.family == "tf":
            limit_tensorflow(self.threads)
        self.wing = importlib.import_module(f"gptj.{self.family}")

    def load(self) -> None:
        self.model = self.wing.GPTJForCausalLM.from_pretrained(self.folder, **self.options["load"])

    def generate(self, ids: list[list[int]], new: int, choice: str = "greedy") -> list[list[int]]:
        made = self.model.generate(ids, max_new_tokens=new, **options_of(choice))
        return tail(self.wing.to_numpy(made), new)

    def make_step(self) -> Any:
        if self.family == "pt":
            return torch_step(self.model)
        if self.family == "tf":
            return tensorflow_step(self.model, lambda ids: self.model(ids, labels=ids, training=True).loss)
        return jax_step(self.model.params, lambda params, ids: self.model(ids, labels=ids, params=params).loss)


class TransformersPyTorch(Engine):
    packages = ("transformers", "torch")

    def load_library(self) -> None:
        import torch
        from transformers import GPTJForCausalLM

        torch.set_num_threads(self.threads)
        self.torch, self.kind = torch, GPTJForCausalLM

    def load(self) -> None:
        self.model = self.kind.from_pretrained(self.folder, dtype=getattr(self.torch, self.options["dtype"])).eval()

    def generate(self, ids: list[list[int]], new: int, choice: str = "greedy") -> list[list[int]]:
        prompt = self.torch.tensor(ids)
        made = self.model.generate(
            prompt,
            attention_mask=self.torch.ones_like(prompt),
            max_new_tokens=new,
            min_new_tokens=new,
            pad_token_id=0,
            **options_of(choice),
        )
        return tail(made, new)

    def make_step(self) -> Any:
        return torch_step(self.model)


class TransformersTensorFlow(Engine):
    """Eager, as `generate` of transformers' TensorFlow models is; the training step is compiled to a graph."""

    packages = ("transformers", "tensorflow")

    def load_library(self) -> None:
        limit_tensorflow(self.threads)
        import tensorflow
        from transformers import TFGPTJForCausalLM

        self.tensorflow, self.kind = tensorflow, TFGPTJForCausalLM

    def load(self) -> None:
        self.model = self.kind.from_pretrained(self.folder)

    def generate(self, ids: list[list[int]], new: int, choice: str = "greedy") -> list[list[int]]:
        prompt = self.tensorflow.constant(ids)
        made = self.model.generate(prompt, max_new_tokens=new, pad_token_id=0, **options_of(choice))
        return tail(made.numpy(), new)

    def make_step(self) -> Any:
        tensorflow = self.tensorflow

        def loss_of(ids: Any) -> Any:
            logits = self.model(ids, training=True).logits[:, :-1]
            losses = tensorflow.nn.sparse_softmax_cross_entropy_with_logits(ids[:, 1:], logits)
            return tensorflow.reduce_mean(losses)

        return tensorflow_step(self.model, loss_of)


class TransformersFlax(Engine):
    """`generate` inside jax.jit, without which its loop would be compiled at every call."""

    packages = ("transformers", "jax", "flax")

    def load_library(self) -> None:
        import jax
        from transformers import FlaxGPTJForCausalLM

        self.jax, self.kind = jax, FlaxGPTJForCausalLM

    def load(self) -> None:
        self.model = self.kind.from_pretrained(self.folder)
        nothing = self.model.config.vocab_size  # it must have an id to end with; this one is never written

        def continued(params: Any, ids: Any, new: int, choice: str) -> Any:
            options = {"max_new_tokens": new, "pad_token_id": 0, "eos_token_id": nothing, **options_of(choice)}
            return self.model.generate(ids, params=params, **options).sequences

        self.compiled = self.jax.jit(continued, static_argnums=(2, 3))

    def generate(self, ids: list[list[int]], new: int, choice: str = "greedy") -> list[list[int]]:
        numpy = importlib.import_module("numpy")
        return tail(numpy.asarray(self.compiled(self.model.params, numpy.asarray(ids, "i4"), new, choice)), new)

    def make_step(self) -> Any:
        def loss_of(params: Any, ids: Any) -> Any:
            logits = self.model(ids, params=params).logits[:, :-1]
            chosen = self.jax.nn.log_softmax(logits)
            return -self.jax.numpy.take_along_axis(chosen, ids[:, 1:, None], axis=-1).mean()

        return jax_step(self.model.params, loss_of)


class CTranslate2(Engine):
    packages = ("ctranslate2",)

    def load_library(self) -> None:
        import ctranslate2

        self.ctranslate2 = ctranslate2

    def load(self) -> None:
        self.model = self.ctranslate2.Generator(
            self.folder, compute_type=self.options["compute_type"], inter_threads=1, intra_threads=self.threads
        )

    def generate(self, ids: list[list[int]], new: int, choice: str = "greedy") -> list[list[int]]:
        prompt = [[token_name(token) for token in row] for row in ids]
        asked = DRAWN[choice]
        names = {"top_k": "sampling_topk", "top_p": "sampling_topp", "temperature": "sampling_temperature"}
        options = {names.get(name, name): value for name, value in asked.items()} or {"sampling_topk": 1}
        made = self.model.generate_batch(
            prompt,
            max_length=new,
            min_length=new,
            beam_size=1,
            include_prompt_in_result=False,
            **options,
        )
        return [[int(token) for token in result.sequences_ids[0]] for result in made]

    @staticmethod
    def make_copy(source: str, destination: str, quantization: str | None) -> None:
        """Convert with CTranslate2's own converter, which wants a tokenizer: token n is called `<n>`."""
        from ctranslate2.converters import TransformersConverter

        class Named(TransformersConverter):
            def load_tokenizer(self, kind: Any, name: str, **options: Any) -> Any:
                return Names(self.size)

            def load_model(self, kind: Any, name: str, **options: Any) -> Any:
                model = super().load_model(kind, name, **options)
                self.size = model.config.vocab_size
                return model

        class Names:
            bos_token = eos_token = unk_token = token_name(0)

            def __init__(self, size: int) -> None:
                self.size = size

            def get_vocab(self) -> dict[str, int]:
                return {token_name(token): token for token in range(self.size)}

        Named(source).convert(destination, quantization=quantization, force=True)


def token_name(token: int) -> str:
    return f"<{token}>"


class OpenVINO(Engine):
    """Through optimum-intel, whose `generate` is transformers'."""

    packages = ("openvino", "optimum-intel", "transformers")

    def load_library(self) -> None:
        import torch
        from optimum.intel import OVModelForCausalLM

        self.torch, self.kind = torch, OVModelForCausalLM

    def load(self) -> None:
        config = {"INFERENCE_NUM_THREADS": str(self.threads), "PERFORMANCE_HINT": "LATENCY"}
        if "precision" in self.options:
            config["INFERENCE_PRECISION_HINT"] = self.options["precision"]
        self.model = self.kind.from_pretrained(self.folder, ov_config=config)

    generate = TransformersPyTorch.generate

    @staticmethod
    def make_copy(source: str, destination: str, quantization: str | None) -> None:
        from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

        quantized = None if quantization is None else OVWeightQuantizationConfig(bits=8)
        model = OVModelForCausalLM.from_pretrained(
            source, export=True, compile=False, load_in_8bit=False, quantization_config=quantized
        )
        model.save_pretrained(destination)


# ---- a training step: the loss, its gradient, and w -= RATE * gradient


def torch_step(model: Any) -> Any:
    import torch

    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    model.train()

    def step(ids: list[list[int]]) -> Any:
        tokens = torch.tensor(ids)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def tensorflow_step(model: Any, loss_of: Any) -> Any:
    import tensorflow as tf

    @tf.function
    def step(ids: Any) -> Any:
        variables = model.trainable_variables
        with tf.GradientTape() as tape:
            loss = loss_of(ids)
        for variable, gradient in zip(variables, tape.gradient(loss, variables), strict=True):
            variable.assign_sub(RATE * tf.convert_to_tensor(gradient))
        return loss

    return lambda ids: step(tf.constant(ids))


def jax_step(params: Any, loss_of: Any) -> Any:
    import jax
    import numpy as np

    def step(params: Any, ids: Any) -> Any:
        loss, gradient = jax.value_and_grad(loss_of)(params, ids)
        return loss, jax.tree.map(lambda w, g: w - RATE * g, params, gradient)

    compiled = jax.jit(step, donate_argnums=0)
    held = {"params": jax.tree.map(jax.numpy.array, params)}  # a copy, since the model's own are not ours to give away

    def run(ids: list[list[int]]) -> Any:
        loss, held["params"] = compiled(held["params"], np.asarray(ids, "i4"))
        return jax.block_until_ready(loss)

    return run


def limit_tensorflow(threads: int) -> None:
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(threads)


class Limits(Engine):
    """The machine itself: how fast it reads memory and multiplies, with the fastest library at hand."""

    packages = ("numpy",)

    def load_library(self) -> None:
        import numpy

        self.numpy = numpy
        try:
            import torch
        except ImportError:
            self.torch = None
        else:
            torch.set_num_threads(self.threads)
            self.torch = torch

    def load(self) -> None:
        """Make what is read and multiplied: 1 GiB, or `megabytes`, and square matrices."""
        numpy, size = self.numpy, int(self.options.get("matrix", 3072))
        self.array = numpy.ones(int(self.options.get("megabytes", 1024)) * 2**18, numpy.float32)
        pair = numpy.random.default_rng(0).standard_normal((2, size, size), numpy.float32)
        self.matrices: dict[str, Any] = {"float32": tuple(pair)}
        if self.torch is not None:
            tensors = self.torch.from_numpy(pair)
            self.matrices = {
                "float32": tuple(tensors),
                "bfloat16": tuple(tensors.bfloat16()),
                "int8": tuple((40 * tensors).to(self.torch.int8)),
            }

    def measure(self, kinds: list[str]) -> dict[str, float]:
        """Bytes "read" a second, and operations a second by dtype, of those asked for; each the best of three."""
        found = {"read": self.array.nbytes / min(map(best_s, self.reads()))} if "read" in kinds else {}
        for dtype in self.matrices.keys() & set(kinds):
            took_s = min(best_s(way, *self.matrices[dtype]) for way in self.ways(dtype))
            found[dtype] = 2.0 * len(self.matrices[dtype][0]) ** 3 / took_s
        return found

    def ways(self, dtype: str) -> list[Any]:
        """The functions that multiply two matrices: on AMD's with AVX-512 oneDNN is twice as fast as `@`.

        Where there are no instructions for a dtype, `@` takes hours; bfloat16 is then multiplied as float32, and bytes
        as oneDNN can.
        """
        torch = self.torch
        if torch is None:
            return [self.numpy.matmul]
        if dtype == "int8":
            return [torch._int_mm] if torch.cpu._is_vnni_supported() else [onednn_bytes]
        onednn = torch.ops.mkldnn
        if not hasattr(onednn, "_linear_pointwise"):
            return [torch.matmul]
        if dtype == "bfloat16" and not onednn._is_mkldnn_bf16_supported():
            return [lambda a, b: onednn._linear_pointwise(a.float(), b.float(), None, "none", [], "").bfloat16()]
        return [torch.matmul, lambda a, b: onednn._linear_pointwise(a, b, None, "none", [], "")]

    def reads(self) -> list[Any]:
        """The functions that read the array: a product with a vector may be a fifth faster than a sum (measured)."""
        if self.torch is None:
            return [self.sum_in_parts]
        tensor = self.torch.from_numpy(self.array)
        matrix = tensor.view(-1, 1024)
        vector = self.torch.ones(matrix.shape[1])
        return [tensor.sum, lambda: matrix @ vector]

    def sum_in_parts(self) -> None:
        """A part a thread."""
        with ThreadPoolExecutor(self.threads) as pool:
            list(pool.map(self.numpy.sum, self.numpy.array_split(self.array, self.threads)))


def onednn_bytes(a: Any, b: Any) -> Any:
    """a @ b.T in whole numbers, packing included."""
    import torch

    ones, zeros = torch.ones(len(b)), torch.zeros(len(b), dtype=torch.int32)
    onednn = torch.ops.onednn
    packed, unsigned = onednn.qlinear_prepack(b, None), a.view(torch.uint8)
    return onednn.qlinear_pointwise(
        unsigned, 1.0, 128, packed, ones, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )


def best_s(run: Any, *arguments: Any) -> float:
    took = []
    for _ in range(3):
        start = time.perf_counter()
        run(*arguments)
        took.append(time.perf_counter() - start)
    return min(took)
