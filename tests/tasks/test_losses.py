import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import Tensor

from prefixquant.tasks.losses import CLAMP_RATIO, LOSSES, SKIPPED_TOKENS, LogitLoss
from prefixquant.tasks.rotate import Ends

EPS = 1e-3


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pair(tokens: int = 11) -> tuple[Tensor, Tensor]:
    """Return an output and a target [4, T, 6]; two tokens of each sequence err far more than the others."""
    target = random(4, tokens, 6)
    output = target + 0.1 * random(4, tokens, 6, seed=1)
    output[:, [2, 5]] += 3
    return output, target


def literal(name: str, output: Tensor, target: Tensor) -> float:
    """The definitions, token by token."""
    terms = []
    for sequence, wanted in zip(output.tolist(), target.tolist(), strict=True):
        tokens = list(zip(sequence, wanted, strict=True))
        squared = [sum((a - b) ** 2 for a, b in zip(x, y, strict=True)) for x, y in tokens]
        means = [each / len(wanted[0]) for each in squared]
        if name == "mse":
            terms += means
        elif name == "clamp_mse":
            cap = CLAMP_RATIO * sorted(means)[(len(means) - 1) // 2]
            terms += [min(each, cap) for each in means]
        elif name == "skip_mse":
            terms += sorted(means)[: max(1, len(means) - SKIPPED_TOKENS)]
        elif name == "normalized_mse":
            terms += [each / sum(b * b for b in y) for each, (_, y) in zip(squared, tokens, strict=True)]
        else:
            for x, y in tokens:
                product = sum(a * b for a, b in zip(x, y, strict=True))
                norms = sum(a * a for a in x) ** 0.5 * sum(b * b for b in y) ** 0.5
                terms.append(1 - product / norms)
    return sum(terms) / len(terms)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("tokens", [2, 11, 12])
def test_loss_is_its_definition(name, tokens):
    output, target = pair(max(tokens, 6))
    output, target = output[:, :tokens], target[:, :tokens]
    assert float(LOSSES[name](output, target)) == pytest.approx(literal(name, output, target), rel=1e-5)  # float32


@pytest.mark.parametrize("name", LOSSES)
def test_the_mean_over_shares_of_a_batch_is_the_loss_of_the_batch(name):
    output, target = pair()
    shares = [LOSSES[name](output[i : i + 1], target[i : i + 1]) for i in range(4)]
    torch.testing.assert_close(torch.stack(shares).mean(), LOSSES[name](output, target))


@pytest.mark.parametrize("name", LOSSES)
def test_a_perfect_output_costs_nothing_and_half_precision_is_read_as_float32(name):
    output, target = pair()
    assert float(LOSSES[name](target, target)) == pytest.approx(0, abs=1e-6)  # of a cosine in float32
    output, target = output.bfloat16(), target.bfloat16()
    loss = LOSSES[name](output, target)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, LOSSES[name](output.float(), target.float()))


def test_capped_and_skipped_tokens_do_not_pull():
    for name, pulled in {"mse": 11, "clamp_mse": 9, "skip_mse": 8}.items():
        output, target = pair()
        output.requires_grad_()
        LOSSES[name](output, target).backward()
        assert (output.grad.abs().sum(-1) > 0).sum(-1).tolist() == [pulled] * 4


def plain_divergence(output: Tensor, target: Tensor, ends: Ends) -> Tensor:
    logits = []
    for hidden in (output, target):
        normed = hidden / (hidden.square().mean(-1, keepdim=True) + EPS).sqrt() * ends.gain
        logits.append(normed @ ends.head.T)
    found, wanted = (F.softmax(each, dim=-1) for each in logits)
    return (wanted * (wanted.log() - found.log())).sum(-1).mean()


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_logit_loss_is_the_divergence_of_the_next_token(chunk):
    ends = Ends(embedding=random(20, 6), gain=random(6, seed=2) + 1, head=random(20, 6, seed=3))
    losses, gradients = [], []
    for function in (
        LogitLoss(ends, EPS, tiny.CPU, chunk_tokens=chunk),
        lambda output, target: plain_divergence(output, target, ends),
    ):
        output, target = pair()
        output.requires_grad_()
        loss = function(output, target)
        loss.backward()
        losses.append(loss.detach())
        gradients.append(output.grad)
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)  # sums over the vocabulary in float32
    assert float(LogitLoss(ends, EPS, tiny.CPU)(target, target)) == 0
