"""vLLM's own choice of a scheme, run on the configs we write; needs vLLM or its wheel, and no GPU.

The methods that choose are taken out of vLLM's source and run alone: importing the package needs all that it serves
with. `PREFIXQUANT_TEST_VLLM_WHEEL` names a wheel (`pip download --no-deps vllm==0.33.0`).
"""

import ast
import os
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationStrategy,
    QuantizationType,
)

from prefixquant.tasks.model.families import LLAMA
from prefixquant.tasks.model.sites import OnlineTransforms
from prefixquant.tasks.model.spec import QuantizeConfig, WeightSpec
from prefixquant.tasks.profiles.codes import quantization_config
from prefixquant.tasks.profiles.losses import rules_for
from prefixquant.tasks.profiles.profile import PROFILES, find_profile

FOLDER = "vllm/model_executor/layers/quantization/compressed_tensors"
CHOSEN = {
    "vllm-w4a16": "CompressedTensorsWNA16",
    "vllm-w8a8-static": "CompressedTensorsW8A8Int8",
    "vllm-w4a4-dynamic": "CompressedTensorsWNA4Int",
    "vllm-w4a8-static": None,
    "vllm-w4a4-static": None,
}
"""Profile -> the class that runs it without a flag; None: NotImplementedError."""


def vllm_sources() -> tuple[str, dict[str, str]]:
    """The version, and the source files by name."""
    wheel = os.environ.get("PREFIXQUANT_TEST_VLLM_WHEEL")
    names = ("compressed_tensors.py", "utils.py")
    if wheel:
        with zipfile.ZipFile(wheel) as archive:
            return Path(wheel).name.split("-")[1], {name: archive.read(f"{FOLDER}/{name}").decode() for name in names}
    try:
        found = distribution("vllm")
    except PackageNotFoundError:
        pytest.skip("vLLM is not installed, and PREFIXQUANT_TEST_VLLM_WHEEL names no wheel of it")
    return found.version, {name: Path(str(found.locate_file(f"{FOLDER}/{name}"))).read_text() for name in names}


class Scheme:
    """Stands where a scheme's class would be: the choice is what counts."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, **settings: Any) -> "Scheme":
        return self

    def get_min_capability(self) -> int:
        return 75


@pytest.fixture(scope="module")
def chooser() -> tuple[str, Any]:
    """The version of vLLM, and an object with the methods that choose."""
    version, sources = vllm_sources()
    tree = ast.parse(sources["compressed_tensors.py"])
    original = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "CompressedTensorsConfig")
    wanted = [
        each
        for each in original.body
        if isinstance(each, ast.FunctionDef)
        and (each.name.startswith(("_is_", "_check_scheme")) or each.name == "_get_scheme_from_parts")
    ]
    helper = next(
        each
        for each in ast.parse(sources["utils.py"]).body
        if isinstance(each, ast.FunctionDef) and each.name == "is_activation_quantization_format"
    )
    alone = ast.ClassDef("Chooser", bases=[], keywords=[], body=wanted, decorator_list=[])
    future = ast.ImportFrom("__future__", [ast.alias("annotations")], 0)
    module = ast.fix_missing_locations(ast.Module([future, helper, alone], type_ignores=[]))
    used = {node.id for node in ast.walk(module) if isinstance(node, ast.Name)}
    schemes = {name: Scheme(name) for name in used if name.startswith("CompressedTensorsW")}
    capability = SimpleNamespace(to_int=lambda: 90)
    namespace = {
        "torch": torch,
        "CompressionFormat": CompressionFormat,
        "QuantizationArgs": QuantizationArgs,
        "QuantizationStrategy": QuantizationStrategy,
        "QuantizationType": QuantizationType,
        "current_platform": SimpleNamespace(
            get_device_capability=lambda: capability, is_cuda=lambda: True, is_rocm=lambda: False, is_xpu=lambda: False
        ),
        **schemes,
    }
    exec(compile(module, FOLDER, "exec"), namespace)
    found = namespace["Chooser"]()
    found.quant_format = None
    return version, found


@pytest.mark.parametrize("granularity", ["channel", "group"])
@pytest.mark.parametrize("name", CHOSEN)
def test_vllm_chooses_for_each_profile_what_the_table_says(chooser, name, granularity):
    version, vllm = chooser
    profile = find_profile(name)
    if granularity == "group" and not profile.weight_groups:
        pytest.skip("the profile refuses weights in groups")
    size = {"granularity": "group", "group_size": 16} if granularity == "group" else {}
    quantize = profile.adapted(QuantizeConfig(weights=WeightSpec(**size)))
    plain = OnlineTransforms(r3=False, r4=False)
    config = quantization_config(profile, quantize, plain, tiny.tiny_config("llama"), LLAMA)
    group = QuantizationConfig.model_validate(config).config_groups["group_0"]

    def choose() -> str:
        chosen = vllm._get_scheme_from_parts(group.weights, group.input_activations, format=group.format)
        return chosen.name

    rules = [rule for rule in rules_for("vllm", profile.scheme) if not rule.flag]
    if CHOSEN[name] is None:
        with pytest.raises(NotImplementedError):
            choose()
        assert [rule.verdict for rule in rules] == ["refused"]
    else:
        assert choose() == CHOSEN[name]
        assert CHOSEN[name] in rules[0].runs
    assert {rule.version for rule in rules} == {version}, "record what this version does in engines.yaml"


def test_every_vllm_profile_is_looked_at():
    assert set(CHOSEN) == {name for name, profile in PROFILES.items() if profile.engine == "vllm"}
