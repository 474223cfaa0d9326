import pytest
import torch
from torch import nn

from prefixquant.tasks.errors import CheckpointError, ConfigError
from prefixquant.tasks.parallel import ParameterGroup, Ranks
from prefixquant.tasks.steps import SingleRank

CLIP = 0.05


class Regression(nn.Module):
    """A small regression; `idle` has no part in the loss."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 33)
        self.last = nn.Linear(33, 5)
        self.idle = nn.Parameter(torch.ones(7))
        self.frozen = nn.Parameter(torch.full((1,), 2.0), requires_grad=False)

    def forward(self, x, y):
        return (self.last(torch.tanh(self.first(x)) * self.frozen) - y).float().square().mean()

    def groups(self):
        weights = [self.first.weight, self.last.weight, self.idle]
        return [ParameterGroup(weights, 0.1), ParameterGroup([self.first.bias, self.last.bias])]


def data(steps):
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(8, 6, generator=generator), torch.randn(8, 5, generator=generator)) for _ in range(steps)]


def train(stepper, batches, start=0):
    history = []
    for step, batch in enumerate(batches, start=start):
        stepper.set_learning_rates([1e-2 / (step + 1), 2e-2])
        loss, norm = stepper.step(*batch)
        history.append((float(loss), float(norm)))
    return history


def stepper_of(module, precision="fp32", clip=CLIP, **options):
    ranks: Ranks = SingleRank(**options)
    return ranks.stepper(module, module.groups(), gradient_clip=clip, precision=precision)


@pytest.mark.parametrize("clip", [None, CLIP, 1e6], ids=["no-clip", "clips", "clip-out-of-reach"])
def test_a_step_is_adamw_on_the_clipped_gradient_by_hand(clip):
    module = Regression()
    [batch] = data(1)
    before = {name: each.detach().clone() for name, each in module.named_parameters()}
    module(*batch).backward()
    gradients = {name: each.grad.clone() for name, each in module.named_parameters() if each.grad is not None}
    norm = torch.cat([each.flatten() for each in gradients.values()]).norm()
    factor = min(1.0, clip / (float(norm) + 1e-6)) if clip else 1.0

    stepper = stepper_of(module, clip=clip)
    stepper.set_learning_rates([1e-2, 2e-2])
    _, measured = stepper.step(*batch)

    torch.testing.assert_close(measured, norm)
    for name, parameter in module.named_parameters():
        gradient = gradients.get(name, torch.zeros_like(parameter)) * factor
        rate, decay = (2e-2, 0.0) if name.endswith("bias") else (1e-2, 0.1)
        if name == "frozen":
            rate = 0.0
        # Step 1 with its bias corrections: both moments are those of this one gradient.
        update = rate * gradient / (gradient.abs() + 1e-8)
        torch.testing.assert_close(parameter.detach(), before[name] * (1 - rate * decay) - update)
    state = stepper.state_dict()
    torch.testing.assert_close(state["first.weight.exp_avg"], 0.1 * factor * gradients["first.weight"])
    assert state["step"] == 1


def test_state_dict_lets_another_stepper_go_on_identically():
    batches = data(6)
    whole = Regression()
    expected = train(stepper_of(whole), batches)

    begun = Regression()
    first = stepper_of(begun)
    history = train(first, batches[:3])
    resumed = Regression()
    resumed.load_state_dict(begun.state_dict())
    second = stepper_of(resumed)
    second.load_state_dict(first.state_dict())
    history += train(second, batches[3:], start=3)

    assert history == expected
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_load_state_dict_refuses_the_state_of_another_module():
    stepper = stepper_of(Regression())
    state = stepper.state_dict()
    state["other.exp_avg"] = state.pop("idle.exp_avg")
    with pytest.raises(CheckpointError, match=r"idle.exp_avg, other.exp_avg"):
        stepper.load_state_dict(state)


@pytest.mark.parametrize("parts", [2, 3])
def test_a_batch_that_passes_in_parts_takes_the_same_steps(parts):
    whole, cut = Regression(), Regression()
    expected, got = train(stepper_of(whole), data(6)), train(stepper_of(cut, parts=parts), data(6))
    # Sums in another order, which six steps of Adam amplify: its first ones divide by |gradient|.
    torch.testing.assert_close(torch.tensor(got), torch.tensor(expected), rtol=2e-5, atol=1e-6)
    for mine, other in zip(cut.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_follows_full_precision(precision):
    # The loss is near 1: half precision rounds activations by 0.4 %, and fp16 may skip its first steps for overflow.
    expected, got = (train(stepper_of(Regression(), each), data(8)) for each in ("fp32", precision))
    assert abs(got[-1][0] - expected[-1][0]) < 0.05 * expected[0][0]
    assert abs(got[0][0] - expected[0][0]) < 0.01 * expected[0][0]
    assert got[0] != expected[0]


def test_fp16_skips_an_update_that_overflows_and_goes_on():
    module = Regression()
    stepper = stepper_of(module, "fp16")
    before = module.first.weight.detach().clone()
    [(x, y)] = data(1)
    stepper.set_learning_rates([1e-2, 1e-2])
    stepper.step(x, y * 1e6)  # its gradient, times the loss scale of 65536, is beyond 65504
    assert torch.equal(module.first.weight, before)
    assert stepper.state_dict()["step"] == 0
    stepper.step(x, y)
    assert stepper.state_dict()["step"] == 1


@pytest.mark.parametrize(("clip", "precision"), [(0.0, "fp32"), (None, "fp8")])
def test_settings_without_a_meaning_are_refused(clip, precision):
    with pytest.raises(ConfigError, match=r"^train\."):
        stepper_of(Regression(), precision, clip)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_cuda_graph_takes_the_same_steps_as_the_eager_loop(precision):
    results = []
    for graph in (True, False):
        module = Regression().cuda()
        stepper = stepper_of(module, precision, cuda_graph=graph)
        history = train(stepper, [(x.cuda(), y.cuda()) for x, y in data(6)])
        results.append((history, [each.detach().cpu() for each in module.parameters()], stepper.state_dict()))
    (history, parameters, state), (expected, wanted, wanted_state) = results
    # The same kernels in the same order; only atomics in a reduction could differ.
    torch.testing.assert_close(torch.tensor(history), torch.tensor(expected), rtol=1e-5, atol=0)
    torch.testing.assert_close(parameters, wanted, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(state, wanted_state, rtol=1e-4, atol=1e-9)
    assert state["step"] == 6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_cuda_graph_follows_what_is_written_to_parameters_and_state():
    batches = [(x.cuda(), y.cuda()) for x, y in data(6)]
    results = []
    for graph in (True, False):
        module = Regression().cuda()
        stepper = stepper_of(module, cuda_graph=graph)
        start = [each.detach().clone() for each in module.parameters()]
        state = stepper.state_dict()
        train(stepper, batches[:3])
        with torch.no_grad():
            for each, value in zip(module.parameters(), start, strict=True):
                each.copy_(value)
        stepper.load_state_dict(state)
        history = train(stepper, batches)
        x, y = batches[0]
        loss, _ = stepper.step(x[:5], y[:5])  # of another shape than the recorded step
        results.append([*history, (float(loss), 0.0)])
    torch.testing.assert_close(torch.tensor(results[0]), torch.tensor(results[1]), rtol=1e-5, atol=0)
