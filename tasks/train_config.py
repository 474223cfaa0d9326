"""Settings of block-wise training (PrefixQuant, arXiv:2410.05265, section 5)."""

from dataclasses import dataclass, field
from typing import Literal

from prefixquant.tasks.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """How a block is trained to reproduce the full-precision block."""

    epochs: int = 20
    """Passes over the training sequences."""

    sequences: int = 512
    """Training sequences."""

    validation_sequences: int = 64
    """Held-out sequences; they decide early stopping and the epoch that is kept."""

    sequence_length: int = 1024
    """Tokens of a sequence."""

    batch_size: int = 4
    """Sequences of an optimizer step, over all workers together."""

    scale_learning_rate: float = 5e-5
    """Learning rate of scales, zero points and clipping ratios."""

    weight_learning_rate: float = 5e-6
    """Learning rate of the weights; 0 freezes them."""

    relative_learning_rates: bool = False
    """True: learning rates are in units of the tensor: a weight's mean quantization step, a scale's own mean."""

    min_learning_rate_ratio: float = 0.1
    """Last learning rate over the first; cosine in between."""

    constant_weight_learning_rate: bool = False
    """Keep the weights' learning rate constant instead of on the cosine."""

    weight_decay: float = 0.0
    """AdamW's weight decay."""

    gradient_clip: float | None = 0.3
    """Largest gradient norm. None: no clipping."""

    loss: Literal["mse", "clamp_mse", "skip_mse", "normalized_mse", "cosine"] = "mse"
    """Distance between the outputs of the quantized and the full-precision block."""

    lookahead: int = 0
    """Full-precision blocks between the trained block and the loss: it then counts what the error does to them. Past
    the last block the loss is the divergence of the model's next-token distribution."""

    target: Literal["fp_input", "quant_input", "both"] = "fp_input"
    """Stream that the full-precision block sees when it makes the target."""

    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Autocast type; master weights are always float32."""

    early_stop_epochs: int | None = None
    """Stop after this many epochs without a better validation loss. None: never."""

    segments: int = 1
    """Runs of consecutive blocks that are trained at once, each starting from the full-precision stream."""

    polish: bool = False
    """With segments: train once more in one run over all blocks, starting from what the segments found."""

    sharding: Literal["rows", "zero"] = field(default="rows", metadata={"in_key": False})
    """How several ranks divide a block. rows: each owns rows of every weight, and quantized rows travel; on 4 H100s a
    batch of 4 sequences is 2.3 times as fast as on one, of 16 3.4 times. zero: DeepSpeed ZeRO of a stage chosen by the
    block's size. It changes speed and memory alone."""

    offload_to_disk: bool = field(default=False, metadata={"in_key": False})
    """Keep the streams on local disk instead of in host memory."""

    checkpoint_seconds: float = field(default=60.0, metadata={"in_key": False})
    """Seconds after which the state of an unfinished block is stored at the end of an epoch."""

    compile: Literal["auto", "always", "never"] = field(default="auto", metadata={"in_key": False})
    """Whether steps go through torch.compile; not with sharding=zero. Auto: on a GPU, for blocks wide enough to repay
    the minute that it takes once. Like the kind of device, it changes how values in between are rounded."""

    def __post_init__(self) -> None:
        counts = {
            name: getattr(self, name) for name in ("epochs", "sequences", "sequence_length", "batch_size", "segments")
        }
        for name, value in counts.items():
            if value < 1:
                raise ConfigError(f"train.{name} must be at least 1, got {value}")
        for name in ("sequences", "validation_sequences"):
            if getattr(self, name) % self.batch_size:
                raise ConfigError(
                    f"train.{name} must be a multiple of train.batch_size, "
                    f"got {getattr(self, name)} and {self.batch_size}"
                )
        if self.validation_sequences < 0:
            raise ConfigError(f"train.validation_sequences must not be negative, got {self.validation_sequences}")
        if min(self.scale_learning_rate, self.weight_learning_rate, self.weight_decay) < 0:
            raise ConfigError("train: learning rates and weight decay must not be negative")
        if self.checkpoint_seconds < 0:
            raise ConfigError(f"train.checkpoint_seconds must not be negative, got {self.checkpoint_seconds}")
        if self.polish and self.segments == 1:
            raise ConfigError("train.polish goes with segments: set train.segments to 2 or more, or train.polish=false")
        if not 0 <= self.min_learning_rate_ratio <= 1:
            raise ConfigError(f"train.min_learning_rate_ratio must lie in [0, 1], got {self.min_learning_rate_ratio}")
