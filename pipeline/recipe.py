"""The recipe of a run: what is read, quantized, searched, trained, written and measured."""

import difflib
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from prefixquant.cluster.refusals import holds_secrets, without_secrets
from prefixquant.pipeline.overrides import apply_overrides, read_yaml
from prefixquant.pipeline.schema import Key, build, schema_of
from prefixquant.tasks.calibrate import CalibrateConfig
from prefixquant.tasks.errors import ConfigError
from prefixquant.tasks.evaluate import PerplexityConfig
from prefixquant.tasks.find_prefix import FindPrefixConfig
from prefixquant.tasks.gptq import GptqConfig
from prefixquant.tasks.harness import check_counts
from prefixquant.tasks.model.sites import OnlineTransforms
from prefixquant.tasks.model.spec import QuantizeConfig
from prefixquant.tasks.profiles.export import ProfileExportConfig, wants_exemptions
from prefixquant.tasks.profiles.losses import Gpu, check_target
from prefixquant.tasks.profiles.profile import check_profile, find_profile
from prefixquant.tasks.rotate import RotateConfig
from prefixquant.tasks.search import SearchConfig
from prefixquant.tasks.texts import NAMED_SETS, TextConfig, WindowsConfig
from prefixquant.tasks.train_config import TrainConfig

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")  # run ids begin with it

TEXT_SUFFIXES = (".txt", ".jsonl", ".parquet")

_HIDDEN = (  # fields of the stage configs that no recipe sets
    "rotate.seed",  # filled from the recipe's own seed, so that one number seeds a run
    "quantize.values.before_rope",  # values pass no rotary embedding
)


def _check_windows(owner: str, sequences: int, length: int) -> None:
    if sequences < 1 or length < 2:
        raise ConfigError(f"{owner} needs sequences >= 1 and length >= 2, got {sequences} and {length}")


def _check_text(key: str, source: str) -> None:
    if source in NAMED_SETS or source.endswith(TEXT_SUFFIXES):
        return
    near = difflib.get_close_matches(source, NAMED_SETS, n=1)
    advice = f"; did you mean {near[0]}?" if near else ""
    raise ConfigError(
        f"{key} takes a named set ({', '.join(NAMED_SETS)}) or the path of a {', '.join(TEXT_SUFFIXES)} file, "
        f"got {source!r}{advice}"
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The model that is quantized."""

    source: str
    """Hugging Face folder, local or at a URL (s3://...); hub id; or path of a .gguf file."""

    revision: str | None = None
    """Branch, tag or commit of a hub id. Off: its main branch."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type in which folded weights are kept and blocks run. auto: the checkpoint's; float32 for a GGUF file."""

    def __post_init__(self) -> None:
        if not self.source:
            raise ConfigError("model.source is empty; give a local folder, a hub id or a .gguf file")
        elsewhere = self.source.endswith(".gguf") or self.source[0] in "/.~" or "://" in self.source
        if self.revision is not None and elsewhere:
            raise ConfigError(f"model.revision is for hub ids; {self.source!r} is a local path, so leave it out")


@dataclass(frozen=True, kw_only=True, slots=True)
class StatisticsConfig:
    """Windows for the prefix search and the calibration statistics."""

    sequences: int = 64
    """Windows drawn from the calibration text."""

    length: int = 512
    """Tokens of a window."""

    ema: float = 0.99
    """Weight of the past in the running mean of the per-sequence extremes; 0 keeps the last sequence only."""

    def __post_init__(self) -> None:
        _check_windows("data.statistics", self.sequences, self.length)
        CalibrateConfig(ema=self.ema)


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchTextConfig:
    """Windows for the scale search."""

    sequences: int = 8
    """Windows drawn from the calibration text."""

    length: int = 1024
    """Tokens of a window."""

    def __post_init__(self) -> None:
        _check_windows("data.search", self.sequences, self.length)


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """The calibration text and how much of it each stage reads."""

    calibration: str
    """Named set (pile, wikitext2, c4, redpajama, python-docs), or path of a .txt, .jsonl or .parquet file."""

    revision: str | None = None
    """Dataset revision of a named set. Off: its main branch."""

    statistics: StatisticsConfig = field(default_factory=StatisticsConfig)
    """Windows for the prefix search and the calibration statistics."""

    search: SearchTextConfig = field(default_factory=SearchTextConfig)
    """Windows for the scale search."""

    def __post_init__(self) -> None:
        _check_text("data.calibration", self.calibration)
        if self.revision is not None and (self.calibration not in NAMED_SETS or self.calibration == "python-docs"):
            raise ConfigError(f"data.revision is for downloaded sets, {self.calibration!r} is none; leave it out")


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportConfig:
    """What the output folder gets."""

    profile: Literal["prefixquant"] = "prefixquant"
    """Layout of the folder. prefixquant: packed integer weights, scales and prefix, loadable by this project."""

    profiles: tuple[str, ...] = ()
    """Profiles for other tools, each a folder inside the output folder: hf-exact, vllm-w4a16, vllm-w8a8-static,
    vllm-w4a8-static, vllm-w4a4-static, vllm-w4a4-dynamic."""

    exempt: tuple[int, ...] | None = None
    """Blocks whose down_proj stays in 16 bit in static vLLM profiles. null: as few as measurements ask for."""

    verify: bool = True
    """Load each profile anew with stock tools, whole, and fail if its logits are not those of the simulation."""

    gpu: Gpu | None = None
    """GPU generation to serve on; a profile that an engine would silently run otherwise there is refused."""

    allow_downgrade: bool = False
    """Export such a profile nevertheless."""

    def __post_init__(self) -> None:
        self.warnings()
        if len(set(self.profiles)) < len(self.profiles):
            raise ConfigError(f"export.profiles names a profile twice: {', '.join(self.profiles)}; name each once")

    def warnings(self) -> list[str]:
        """Return where an engine silently runs something else than a profile says. Raises ConfigError if refused."""
        allowed = self.allow_downgrade
        found = [check_target(find_profile(each), self.gpu, allow_downgrade=allowed) for each in self.profiles]
        return [message for messages in found for message in messages]

    def of(self, profile: str) -> ProfileExportConfig:
        """Return how a profile is exported."""
        exempt = self.exempt if wants_exemptions(find_profile(profile)) else ()
        return ProfileExportConfig(
            exempt=exempt, verify=self.verify, gpu=self.gpu, allow_downgrade=self.allow_downgrade
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    """What is measured at the end."""

    texts: tuple[str, ...] = ("wikitext2",)
    """Named sets or paths whose perplexity is measured; [] measures nothing."""

    window: int = 2048
    """Tokens of a window, the prefix not counted."""

    max_windows: int | None = None
    """Use only the first so many windows of each text. Off: all."""

    tasks: tuple[str, ...] = ()
    """Tasks of lm-eval: piqa, arc_easy, arc_challenge, hellaswag, winogrande, lambada_openai or any other name."""

    shots: int | None = None
    """Solved examples in front of each question. Off: as the task says, else none."""

    limit: int | None = None
    """Use only the first so many documents of each task. Off: all."""

    task_folder: str | None = None
    """Folder of task files of your own, as for lm-eval's --include_path; relative paths in them are relative to it."""

    shards: int | None = None
    """Parts into which each measurement is cut; they run side by side and change no number. Off: as many as there are
    GPUs, or cores without GPUs."""

    gpus: int = 1
    """GPUs over which a model is spread that answers tasks. It is held whole, at the checkpoint's precision."""

    full_precision: bool = True
    """Measure the original model as well."""

    without_prefix: bool = False
    """Quantize once more without the prefix, in the same run, and measure that as well."""

    untrained: bool = True
    """With training: measure the quantized model before training as well."""

    sequential: bool = False
    """With train.segments: train once more, all blocks in sequence, in the same run, and measure that as well: what the
    segments cost in accuracy."""

    def __post_init__(self) -> None:
        PerplexityConfig(window=self.window, max_windows=self.max_windows)
        for text in self.texts:
            _check_text("evaluate.texts", text)
        if len(set(self.texts)) < len(self.texts):
            raise ConfigError(f"evaluate.texts names a text twice: {', '.join(self.texts)}; name each once")
        if len(set(self.tasks)) < len(self.tasks):
            raise ConfigError(f"evaluate.tasks names a task twice: {', '.join(self.tasks)}; name each once")
        check_counts(self.shots, self.limit)
        for name, least in (("shards", self.shards), ("gpus", self.gpus)):
            if least is not None and least < 1:
                raise ConfigError(f"evaluate.{name} must be at least 1, got {least}")
        of_tasks = {"shots": self.shots is not None, "limit": self.limit is not None, "gpus": self.gpus > 1}
        for name, is_set in (of_tasks | {"task_folder": self.task_folder is not None}).items():
            if is_set and not self.tasks:
                raise ConfigError(f"evaluate.{name} is for tasks, and evaluate.tasks names none; leave it out")
        if self.without_prefix and not self.texts and not self.tasks:
            raise ConfigError(
                "evaluate.without_prefix has nothing to measure: evaluate.texts and evaluate.tasks are empty; name a "
                "text or a task in them"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """A checked recipe. Its groups are the configs of the stages, and `parse_recipe` or `load_recipe` makes it."""

    name: str
    """Name of the run, on screen and in MLflow."""

    seed: int = 0
    """Seed of the rotations and of the windows drawn from the calibration text."""

    model: ModelConfig
    """The model that is quantized."""

    data: DataConfig
    """The calibration text and how much of it each stage reads."""

    rotate: RotateConfig = field(default_factory=RotateConfig)
    """Rotations folded into the weights or applied online."""

    prefix: FindPrefixConfig = field(default_factory=FindPrefixConfig)
    """The tokens whose KV goes in front of everything."""

    quantize: QuantizeConfig = field(default_factory=QuantizeConfig)
    """What is quantized, and how."""

    search: SearchConfig | None = field(default_factory=SearchConfig)
    """Grid search of the scales. Off: every scale stays at the extremes of its statistics."""

    gptq: GptqConfig | None = None
    """Round weights by GPTQ instead of to nearest."""

    train: TrainConfig | None = None
    """Block-wise training after the search."""

    export: ExportConfig = field(default_factory=ExportConfig)
    """What the output folder gets."""

    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    """What is measured at the end."""

    def __post_init__(self) -> None:
        if problems := _problems(self):
            raise ConfigError("\n".join(problems))

    @property
    def transforms(self) -> OnlineTransforms:
        """The transforms that the quantized model runs with."""
        return OnlineTransforms(r3=self.rotate.r3, r4=self.rotate.r4, r4_block=self.rotate.r4_block)

    @property
    def calibration_text(self) -> TextConfig:
        """The text that statistics and search read."""
        return TextConfig(source=self.data.calibration, split="calibration", revision=self.data.revision)

    @property
    def evaluation_texts(self) -> tuple[TextConfig, ...]:
        """The texts whose perplexity is measured, in the order of the recipe."""
        return tuple(TextConfig(source=text, split="evaluation") for text in self.evaluate.texts)

    @property
    def statistics_windows(self) -> WindowsConfig:
        """The windows of the prefix search and the statistics."""
        return WindowsConfig(count=self.data.statistics.sequences, length=self.data.statistics.length, seed=self.seed)

    @property
    def search_windows(self) -> WindowsConfig:
        """The windows of the scale search."""
        return WindowsConfig(count=self.data.search.sequences, length=self.data.search.length, seed=self.seed)

    @property
    def validation_text(self) -> TextConfig:
        """The text of the training's validation sequences: a part of the calibration set that nothing else reads."""
        return TextConfig(source=self.data.calibration, split="validation", revision=self.data.revision)

    @property
    def calibrate(self) -> CalibrateConfig:
        """How the statistics are averaged."""
        return CalibrateConfig(ema=self.data.statistics.ema)

    @property
    def perplexity(self) -> PerplexityConfig:
        """How perplexity is measured."""
        return PerplexityConfig(window=self.evaluate.window, max_windows=self.evaluate.max_windows)

    def resolved(self) -> dict[str, Any]:
        """Return the recipe as nested JSON values with every default written out; `parse_recipe` reads it back."""
        plain: dict[str, Any] = _plain(asdict(self))
        return plain


@cache
def recipe_schema() -> dict[str, Key]:
    """Return every group and key that a recipe may have, by dotted name."""
    return schema_of(Recipe, hidden=_HIDDEN)


def parse_recipe(data: object) -> Recipe:
    """Return nested plain data, as YAML or JSON gives it, as a recipe; `~` in paths becomes the home folder.

    Raises:
        ConfigError: a line for each thing that is wrong.
    """
    recipe = build(Recipe, data, hidden=_HIDDEN)
    return replace(
        recipe,
        model=replace(recipe.model, source=_expand(recipe.model.source)),
        data=replace(recipe.data, calibration=_expand(recipe.data.calibration)),
        evaluate=replace(
            recipe.evaluate,
            texts=tuple(map(_expand, recipe.evaluate.texts)),
            task_folder=None if recipe.evaluate.task_folder is None else _expand(recipe.evaluate.task_folder),
        ),
        rotate=replace(recipe.rotate, seed=recipe.seed),
    )


def load_recipe(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Return the recipe in a YAML file, or the shipped one of that name, with `dotted.path=value` overrides applied.

    Paths inside it are relative to the current folder, not to the file.

    Raises:
        ConfigError: there is no such recipe, it cannot be read, or something in it or in an override is wrong.
    """
    data = read_yaml(_read(source), where=f"recipe {source}")
    if not isinstance(data, dict):
        raise ConfigError(f"recipe {source} must hold keys (name, model, data, ...), got {data!r}")
    return parse_recipe(apply_overrides(data, overrides))


def shipped_recipes() -> tuple[str, ...]:
    """Return the names of the recipes that come with the package, sorted."""
    folder = resources.files("prefixquant.pipeline") / "recipes"
    return tuple(sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml")))


def _read(source: str | Path) -> str:
    path = Path(_expand(str(source)))
    name = str(source).removesuffix(".yaml")
    try:
        if path.is_file():
            return path.read_text(encoding="utf-8")
        if name in shipped_recipes():
            return (resources.files("prefixquant.pipeline") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"recipe {source} cannot be read: {error}; give a UTF-8 YAML file") from error
    near = difflib.get_close_matches(name, shipped_recipes(), n=1)
    advice = f"did you mean {near[0]}? " if near else ""
    raise ConfigError(
        f"recipe {source} is neither a file nor a shipped recipe; {advice}shipped: {', '.join(shipped_recipes())}"
    )


def _problems(recipe: Recipe) -> list[str]:
    """Return what is out of range in, or contradictory between, the groups of a recipe."""
    quantize, train = recipe.quantize, recipe.train
    problems = []
    for profile in recipe.export.profiles:
        try:
            check_profile(find_profile(profile), quantize, recipe.transforms)
        except ConfigError as err:
            problems.append(str(err))
    sources = {"model.source": (recipe.model.source,), "data.calibration": (recipe.data.calibration,)}
    for key, urls in (sources | {"evaluate.texts": recipe.evaluate.texts}).items():
        problems += [
            f"{key} {without_secrets(url)} holds a user name, a password or a signature, which the run's record would "
            f"show; take it out and give credentials by the environment"
            for url in urls
            if holds_secrets(url)
        ]
    if not _NAME.fullmatch(recipe.name):
        problems.append(
            f"name must be 1 to 100 letters, digits, '.', '_' or '-', the first a letter or digit, got {recipe.name!r}"
        )
    if recipe.seed < 0:
        problems.append(f"seed must not be negative, got {recipe.seed}")
    if quantize.keys is not None and quantize.keys.before_rope and recipe.rotate.r3:
        problems.append(
            "quantize.keys.before_rope contradicts rotate.r3, which rotates keys after the rotary embedding; "
            "set rotate.r3=off or quantize.keys.before_rope=false"
        )
    if recipe.gptq is not None and quantize.weights is None:
        problems.append("gptq rounds weights and quantize.weights is off; set gptq=off or quantize the weights")
    if recipe.evaluate.sequential and (train is None or train.segments == 1):
        problems.append(
            "evaluate.sequential compares training in segments with training in sequence, and there are no segments; "
            "set train.segments to 2 or more, or evaluate.sequential=false"
        )
    if train is not None:
        if train.polish and quantize.weights is None:
            problems.append(
                "train.polish starts from rounded weights and quantize.weights is off; set train.polish=false"
            )
        if not any((quantize.weights, quantize.activations, quantize.keys, quantize.values)):
            problems.append(
                "train has nothing to do: every group of quantize is off; set train=off or quantize something"
            )
        if train.scale_learning_rate == 0 and train.weight_learning_rate == 0:
            problems.append(
                "train.scale_learning_rate and train.weight_learning_rate are both 0, so nothing would be trained; "
                "set train=off or raise one of them"
            )
        if train.early_stop_epochs is not None and train.validation_sequences == 0:
            problems.append(
                "train.early_stop_epochs needs validation sequences and train.validation_sequences is 0; "
                "raise it or set train.early_stop_epochs=off"
            )
    if recipe.evaluate.without_prefix and recipe.prefix.tokens == ():
        problems.append(
            "evaluate.without_prefix contradicts prefix.tokens=[]: the run has no prefix to leave out; "
            "set evaluate.without_prefix=false"
        )
    return problems


def _expand(source: str) -> str:
    return os.path.expanduser(source)


def _plain(value: Any, path: str = "") -> Any:
    """Return nested dicts and tuples as nested dicts and lists, without what a recipe does not set."""
    if isinstance(value, dict):
        paths = {name: f"{path}.{name}" if path else name for name in value}
        return {name: _plain(inner, paths[name]) for name, inner in value.items() if paths[name] not in _HIDDEN}
    return [_plain(inner) for inner in value] if isinstance(value, tuple) else value
