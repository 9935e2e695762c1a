"""Programs of other tools: ONNX in onnxruntime, and CTranslate2 by its own converter."""

from __future__ import annotations

import pathlib
import shutil
import subprocess
import sys

import ctranslate2
import numpy as np
import onnxruntime
import pytest
from pages import block

from gptj.command.export import ELSEWHERE, FORMATS, write
from gptj.pt import GPTJForCausalLM


@pytest.fixture(scope="module", params=["float32", "float16"])
def session(request, folder, tmp_path_factory):
    """A session of onnxruntime, and how far its logits may be from the model's."""
    out = tmp_path_factory.mktemp("onnx") / "out"
    write(folder, out, FORMATS["onnx"], dtype=request.param, weights=None)
    assert {path.name for path in out.iterdir()} >= {"model.onnx", "model.onnx.data", "tokenizer.json", "config.json"}
    return onnxruntime.InferenceSession(str(out / "model.onnx")), request.param


def test_onnx_steps_over_a_cache_of_any_length(session, folder):
    runs, dtype = session
    model = GPTJForCausalLM.from_pretrained(folder, param_dtype=dtype)
    config, bound = model.config, 2e-5 if dtype == "float32" else 0.05
    outputs = [output.name for output in runs.get_outputs()]
    names = [f"past_key_values.{n}.{kind}" for n in range(config.n_layer) for kind in ("key", "value")]
    assert [given.name for given in runs.get_inputs()] == ["input_ids", "attention_mask", "position_ids", *names]
    assert outputs[0] == "logits" and outputs[1] == "present.0.key"
    assert [given.shape for given in runs.get_inputs()[:3]] == [
        ["batch", "new"],
        ["batch", "past + new"],
        ["batch", "new"],
    ]
    for b, t in ((1, 5), (2, 1), (3, 7), (1, 1)):
        ids = np.random.default_rng(t).integers(0, config.vocab_size, (b, t + 2))
        expected = model(ids).logits.detach().numpy()
        past = dict.fromkeys(names, np.zeros((b, config.n_head, 0, config.head_dim), dtype))
        for start, end in ((0, t), (t, t + 2)):
            given = {
                "input_ids": ids[:, start:end],
                "attention_mask": np.ones((b, end), np.int64),
                "position_ids": np.broadcast_to(np.arange(start, end), (b, end - start)),
            }
            found = dict(zip(outputs, runs.run(None, given | past), strict=True))
            assert np.abs(found["logits"] - expected[:, start:end]).max() <= bound
            past = {name: found[name.replace("past_key_values", "present")] for name in names}


def test_ctranslate2s_own_converter_reads_our_folder_by_the_line_that_we_give(folder, tokenizer, tmp_path):
    line = ELSEWHERE["ctranslate2"][1].format(DIR=folder, OUT=tmp_path / "ct2").split()
    program = shutil.which(line[0]) or shutil.which(line[0], path=str(pathlib.Path(sys.executable).parent))
    subprocess.run([program, *line[1:]], check=True, capture_output=True)
    generator = ctranslate2.Generator(str(tmp_path / "ct2"))
    prompt = tokenizer.encode("The quick brown")
    tokens = [tokenizer.id_to_token(token) for token in prompt]
    made = generator.generate_batch([tokens], max_length=12, sampling_topk=1, include_prompt_in_result=False)
    ours = GPTJForCausalLM.from_pretrained(folder).generate([prompt], max_new_tokens=12, do_sample=False)
    assert made[0].sequences_ids[0] == ours[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    ("to", "name", "heading"),
    [("onnx", "for-onnx", "In onnxruntime"), ("torch-export", "for-torch", "In torch.export")],
)
def test_the_pages_program_writes_the_models_own_text(folder, tokenizer, tmp_path, monkeypatch, to, name, heading):
    write(folder, tmp_path / name, FORMATS[to], dtype=None, weights=None)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(block("export.md", heading), names)
    prompt = tokenizer.encode("Hello, my dog is cute")
    ours = GPTJForCausalLM.from_pretrained(folder).generate(
        [prompt], max_new_tokens=20, do_sample=False, eos_token_id=None
    )
    assert names["ids"] == ours[0].tolist()
