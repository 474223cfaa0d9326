"""The product with a weight whose rows several processes own: an operator that torch.compile takes as it is.

It waits for the quantized rows of the others before the product, and in the backward it begins to send them the
gradients of theirs, while the rest of the block is still under way. Who does that, by number: `SHARDS`.
"""

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Shard(Protocol):
    """What the operator asks of the weight behind a number."""

    def arrived(self) -> Tensor:
        """Return the whole weight [O, I]; the stream, not the host, waits for it."""

    def send(self, gradient_OI: Tensor) -> None:
        """Take the gradient of the whole weight."""


SHARDS: dict[int, Shard] = {}
"""The weights of the block under training by the place of their linear: every block has the same numbers, so that one
compiled graph serves all."""


def sharded_product(x: Tensor, bias: Tensor | None, token: Tensor, shard: int, outputs: int) -> Tensor:
    """Return x @ W^T + bias [..., O] of a shard; under autocast in its type, which is then the weight's as well.

    `token`: a scalar that requires a gradient and gets zero, so that there is a backward whether or not x wants one.
    """
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        x = x.to(torch.get_autocast_dtype(kind))
    return _product(x, None if bias is None else bias.to(x.dtype), token, shard, outputs)


@torch.library.custom_op("prefixquant::sharded_product", mutates_args=())
def _product(x: Tensor, bias: Tensor | None, token: Tensor, shard: int, outputs: int) -> Tensor:
    return F.linear(x, SHARDS[shard].arrived(), bias)


@_product.register_fake
def _(x: Tensor, bias: Tensor | None, token: Tensor, shard: int, outputs: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], outputs)


@torch.library.custom_op("prefixquant::sharded_product_backward", mutates_args=())
def _product_backward(grad: Tensor, x: Tensor, token: Tensor, shard: int) -> tuple[Tensor, Tensor]:
    SHARDS[shard].send(grad.flatten(0, -2).T @ x.flatten(0, -2))  # first: it travels during the other product
    return grad @ SHARDS[shard].arrived(), torch.zeros_like(token)


@_product_backward.register_fake
def _(grad: Tensor, x: Tensor, token: Tensor, shard: int) -> tuple[Tensor, Tensor]:
    return grad.new_empty(x.shape), torch.empty_like(token)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, _, token, ctx.shard, _ = inputs
    ctx.save_for_backward(x, token)


def _back(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor, None, None]:
    dx, dtoken = _product_backward(grad, *ctx.saved_tensors, ctx.shard)
    return dx, None, dtoken, None, None


_product.register_autograd(_back, setup_context=_remember)
