"""A process of its own that loads an exported folder with stock tools and writes the logits it computes.

Run by path, `python -P reload.py JOB`, so that nothing of the package is imported; what was imported is reported.
JOB is a JSON file: {folder, adapter, loader, dtype, ids, out, report}.
"""

import importlib.util
import json
import sys
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM


def main(path: str) -> None:
    """Do the job that a file describes."""
    with open(path) as file:
        job = json.load(file)
    torch.set_num_threads(job["threads"])
    model: Any = AutoModelForCausalLM.from_pretrained(job["folder"], dtype=getattr(torch, job["dtype"]))
    if job["loader"]:
        spec = importlib.util.spec_from_file_location("exact_loader", job["loader"])
        assert spec is not None
        assert spec.loader is not None
        loader = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loader)
        model = loader.complete(model, job["folder"])
    if job["adapter"]:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, job["adapter"])
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=load_file(job["ids"])["ids"]).logits
    save_file({"logits": logits.float().contiguous()}, job["out"])
    ours = sorted(name for name in sys.modules if name == "prefixquant" or name.startswith("prefixquant."))
    import compressed_tensors
    import transformers

    versions = {module.__name__: module.__version__ for module in (torch, transformers, compressed_tensors)}
    with open(job["report"], "w") as file:
        json.dump({"ours": ours, "versions": versions}, file)


if __name__ == "__main__":
    main(sys.argv[1])
