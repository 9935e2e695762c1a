"""Names that other programs, and people, have for the commands of `gptj`."""

from __future__ import annotations

__all__ = ["CALLED"]

_WAYS = {
    "finetune DIR DATA OUT": "train fit tune sft fine_tune lora qlora pretrain continue-training",
    "adapter merge BASE ADAPTER OUT": "merge merge-lora merge_adapter merge_and_unload fuse",
    "generate DIR PROMPT": "run complete completion sample infer inference predict prompt text continue gen write",
    "generate DIR --interactive": "chat repl talk converse interactive shell console",
    "generate DIR --quantize int8": "quantize quantise quantization quant int8 int4",
    "serve DIR": "server api openai http web ui start launch deploy",
    "score DIR FILE": "perplexity ppl loss likelihood logprobs nll bits",
    "eval DIR --tasks TASKS": "evaluate evaluation harness lm-eval lm_eval lm-eval-harness tasks",
    "convert SRC DST": "import to-safetensors convert-weights from-tpu to-hf to-mesh reshard transform cast download "
    "fetch pull get",
    "inspect SRC": "info show describe stat header headers cat ls list tensors look config",
    "verify DIR": "check validate hash checksum fingerprint integrity",
    "parity DIR": "test compare proof prove agree cross-check selftest",
    "parity DIR DIR2": "diff cmp",
    "parity record DIR": "trace record",
    "parity matrix DIR": "matrix",
    "parity ladder DIR": "ladder precision",
    "parity report FINDINGS.json": "report html",
    "plan DIR": "memory estimate size fits vram devices",
    "doctor": "env environment diagnose debug report-bug system gpus",
    "demo": "example examples tour quickstart hello",
    "init DIR": "new create random make",
    "export DIR OUT --to FORMAT": "onnx savedmodel saved-model torchscript tflite compile to-onnx",
    "batch DIR OUT FILE": "bulk offline generate-batch map",
    "--version": "version",
    "--help": "help commands usage man",
}

_SAYINGS = {
    "benchmark": "There is no such command. From a clone of the project, for one: python -m benchmarks.cold --shape S",
    "tokenize": "There is no such command. In Python: gptj.GPTJTokenizer.from_pretrained(DIR).tokenize(TEXT)",
    "upload": "There is no such command. The hub's own uploads: hf upload OWNER/NAME DIR",
}

_SAID_OF = {
    "benchmark": "bench speed profile perf timing",
    "tokenize": "tokens tokenizer encode decode detokenize",
    "upload": "push push-to-hub publish share",
}

CALLED: dict[str, str] = {
    **{name: f"Did you mean gptj {way}?" for way, names in _WAYS.items() for name in names.split()},
    **{name: _SAYINGS[one] for one, names in _SAID_OF.items() for name in (one, *names.split())},
}
"""A sentence for each name that is no command's: the line that does it."""
