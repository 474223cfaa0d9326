"""The model card of an exported folder: what it is, what was measured, how to load it."""

from collections.abc import Mapping
from typing import Any

import yaml

from prefixquant.tasks.profiles.folder import ExportedModel
from prefixquant.tasks.profiles.prefix import ADAPTER, TOKENIZER
from prefixquant.tasks.profiles.profile import Profile


def card_text(
    model: ExportedModel,
    profile: Profile,
    measured: Mapping[str, Any],
    described: Mapping[str, Any],
    origin: Mapping[str, Any],
) -> str:
    """Return the card, Markdown with the front matter that the Hugging Face hub reads.

    `measured`: `ProfileExport.to_json()`. `described`: what `write_profile` returned. `origin`: `recipe` and
    `perplexity` of the run, each if known.
    """
    sections = [
        _front(profile),
        _what(model, profile),
        _load(model, profile, described),
        _prefix(model, profile, described),
        _measured(profile, measured, origin),
        _recipe(model, origin),
    ]
    return "\n".join(sections)


def _front(profile: Profile) -> str:
    front = {
        "library_name": profile.engine,
        "pipeline_tag": "text-generation",
        "tags": ["compressed-tensors", "prefixquant", profile.name],
    }
    return f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n"


def _what(model: ExportedModel, profile: Profile) -> str:
    adapted, online = profile.adapted(model.quantize), profile.transforms(model.transforms)
    kinds = {"weights": adapted.weights, "activations": adapted.activations, "keys and values": adapted.keys}
    said = []
    for name, spec in kinds.items():
        if spec is None:
            said.append(f"{name} in full precision")
        else:
            mode = "" if name == "weights" else f"{getattr(spec, 'mode', '')} "
            said.append(f"{name} {mode}int{spec.bits}, a scale a {spec.granularity}")
    rotations = [name for name, on in (("R3", online.r3), ("R4", online.r4)) if on]
    return f"""# {model.family.architecture.removesuffix("ForCausalLM")}, quantized with PrefixQuant: {profile.name}

{"; ".join(said).capitalize()}. Rotations done at run time: {", ".join(rotations) or "none"}.

The method is PrefixQuant ([arXiv 2410.05265](https://arxiv.org/abs/2410.05265)): a few tokens carry activations far
larger than all others. They stand once in front of everything, and static scales fit the rest. Written by
`prefixquant`; what the engine really runs of this is in [LOSSES.md](LOSSES.md).
"""


def _load(model: ExportedModel, profile: Profile, described: Mapping[str, Any]) -> str:
    lines = ["## Loading", ""]
    adapter = f"\nmodel = PeftModel.from_pretrained(model, f'{{FOLDER}}/{ADAPTER}')" if model.prefix_token_ids else ""
    if profile.engine == "vllm":
        dtype = " --dtype bfloat16" if model.description["dtype"] == "float32" else ""
        flag = f" {profile.flag}" if profile.flag else ""
        lines += ["```", f"vllm serve FOLDER{flag}{dtype}", "```"]
        if described["loader"]:
            lines += ["", "Tensor parallelism must be 1: vLLM refuses online rotations with more.", ""]
            lines += ["In transformers, rotations need a call:", "", "```python", *_complete_call(), "```"]
        return "\n".join([*lines, ""])
    trust = ", trust_remote_code=True" if described["loader"] else ""
    lines += [
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        *(["from peft import PeftModel"] if adapter else []),
        "",
        f"model = AutoModelForCausalLM.from_pretrained(FOLDER{trust}){adapter}",
        "tokenizer = AutoTokenizer.from_pretrained(FOLDER)",
        "```",
        "",
    ]
    if described["loader"]:
        lines += [
            f"`trust_remote_code` runs `{described['loader']}` of this folder, which adds what transformers leaves",
            "out: codes in the KV cache (transformers before 5.24 needs no help with those) and online rotations.",
            "Without it the logits are others, and nothing says so. The same by one call:",
            "",
            "```python",
            *_complete_call(),
            "```",
            "",
        ]
    peft = f",peft=FOLDER/{ADAPTER}" if adapter else ""
    trusted = ",trust_remote_code=True" if described["loader"] else ""
    lines += ["With lm-eval:", "", "```", "lm_eval --model hf --tasks ... \\"]
    return "\n".join([*lines, f"  --model_args pretrained=FOLDER{peft}{trusted}", "```", ""])


def _complete_call() -> list[str]:
    return [
        "from exact_loader import complete  # a file of this folder",
        "",
        "model = complete(AutoModelForCausalLM.from_pretrained(FOLDER), FOLDER)",
    ]


def _prefix(model: ExportedModel, profile: Profile, described: Mapping[str, Any]) -> str:
    ids = model.prefix_token_ids
    if not ids:
        return "## Prefix\n\nThere is none.\n"
    lines = ["## Prefix", "", f"Token ids {', '.join(map(str, ids))}. Carriers:", ""]
    lines += ["| carrier | where | exact |", "| --- | --- | --- |"]
    chats = "texts and chats" if described["prefix_in_chats"] else "texts; a chat template cannot carry it"
    if profile.prefix == "kv":
        lines += [
            "| keys and values | `prefix.safetensors`, [blocks, KV heads, tokens, channels] of each | yes |",
            f"| PEFT prefix-tuning adapter | `{ADAPTER}` | yes |",
            f"| tokenizer that puts the tokens first ({chats}) | `{TOKENIZER}` | no: they pass the quantizers |",
            "",
            "Use one of them, not two. Behind keys and values a BOS of the tokenizer's is one too many if the",
            "prefix ends with it: tokenize with `add_special_tokens=False`. In a batch padded on the left,",
            "`position_ids` must not count the padding, which moves tokens away from the prefix: `generate` sees",
            "to it, a plain forward does not.",
        ]
    else:
        lines.append(
            f"| the tokenizer puts the tokens first ({chats}) | this folder's | no: they pass the quantizers |"
        )
        if described["exempt_down_proj"]:
            blocks = ", ".join(map(str, described["exempt_down_proj"]))
            lines += ["", f"down_proj of blocks {blocks} stays in 16 bit, so that the tokens are not clipped there."]
        lines += ["", "Requests that bring token ids of their own must begin with these."]
    return "\n".join([*lines, ""])


def _measured(profile: Profile, measured: Mapping[str, Any], origin: Mapping[str, Any]) -> str:
    lines = ["## Measured", ""]
    lines += [
        f"- {each['model']}: perplexity {each['ppl']:.2f} on {each['text']}" for each in origin.get("perplexity", ())
    ]
    if measured["perplexity"] is not None:
        tokens = measured["measured_tokens"]
        exempted = measured["exemptions"]
        if exempted is not None:
            tried = ", ".join(f"{count}: {ppl:.2f}" for count, ppl in exempted["perplexity"].items())
            lines.append(f"- perplexity by number of exempt down_proj, over {tokens} tokens: {tried}")
        lines.append(
            f"- this profile, simulated over {tokens} tokens: {measured['perplexity']:.2f}; the model as it was "
            f"quantized, its prefix as keys and values: {measured['perplexity_prefix_kv']:.2f}"
        )
    parity = measured["parity"]
    if parity is not None:
        lines.append(
            f"- reloaded by transformers {parity['versions']['transformers']} in float32, {parity['logits']} logits "
            f"differ from the simulation's by at most {parity['largest_difference']:.3g}"
        )
    size, bf16 = measured["folder_bytes"] / 1e6, measured["bf16_bytes"] / 1e6
    lines.append(f"- {size:.1f} MB, against {bf16:.1f} MB in bfloat16 (embedding and head untied)")
    return "\n".join([*lines, ""])


def _recipe(model: ExportedModel, origin: Mapping[str, Any]) -> str:
    known = origin.get("recipe") or {key: model.description[key] for key in ("quantize", "transforms", "dtype")}
    return f"## Recipe\n\n```yaml\n{yaml.safe_dump(known, sort_keys=False)}```\n"
