import os
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from ports import free_ports
from ray import cloudpickle
from torch import nn

from prefixquant.cluster.deepspeed_ranks import join, zero_stage
from prefixquant.cluster.errors import RanksError
from prefixquant.cluster.worker_group import Membership, run_group
from prefixquant.tasks.parallel import ParameterGroup, Ranks
from prefixquant.tasks.steps import SingleRank

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test module

CPU = torch.device("cpu")
CLIP = 0.05
STAGES = (1, 2, 3)
SIZES = (2, 1, 4)


class Regression(nn.Module):
    """A regression with a scalar and odd sizes, which no number of ranks divides; `idle` has no part in the loss."""

    def __init__(self, factor=1.0):
        super().__init__()
        torch.manual_seed(0)
        self.factor = factor
        self.first = nn.Linear(6, 33)
        self.last = nn.Linear(33, 5)
        self.idle = nn.Parameter(torch.ones(7))
        self.gain = nn.Parameter(torch.tensor(1.5))
        self.frozen = nn.Parameter(torch.full((1,), 2.0), requires_grad=False)

    def forward(self, x, y):
        hidden = torch.tanh(self.first(x) * self.gain) * self.frozen
        return (self.last(hidden) - y).float().square().mean() * self.factor

    def groups(self):
        weights = [self.first.weight, self.last.weight, self.idle]
        return [ParameterGroup(weights, 0.1), ParameterGroup([self.first.bias, self.last.bias, self.gain])]


def data(steps):
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(8, 6, generator=generator), torch.randn(8, 5, generator=generator)) for _ in range(steps)]


def train(ranks, stepper, steps):
    history = []
    size = 8 // ranks.size
    for step, batch in list(enumerate(data(max(steps) + 1)))[steps[0] : steps[-1] + 1]:
        stepper.set_learning_rates([1e-2 / (step + 1), 2e-2])
        loss, norm = stepper.step(*(each[ranks.rank * size :][:size] for each in batch))
        history.append([float(loss), float(norm)])
    return history


def values(ranks, module):
    with ranks.whole(module):
        return {name: each.detach().clone() for name, each in module.named_parameters()}


@dataclass
class Outcome:
    """What one stage gave on one number of ranks."""

    history: list = field(default_factory=list)
    parameters: dict = field(default_factory=dict)
    state: dict = field(default_factory=dict)
    fresh_state: dict = field(default_factory=dict)
    loss_between: float = 0.0
    rewound: list = field(default_factory=list)
    again: list = field(default_factory=list)
    again_loss: float = 0.0
    resumed: list = field(default_factory=list)
    clean: bool = False
    bf16: list = field(default_factory=list)
    fp16: list = field(default_factory=list)
    mean: float = 0.0


def make(ranks, module, precision="fp32"):
    return ranks.stepper(module, module.groups(), gradient_clip=CLIP, precision=precision)


@torch.no_grad()
def write(module, parameters):
    for name, each in module.named_parameters():
        each.copy_(parameters[name])


def scenario(ranks: Ranks, checkpoint=None):
    """Train; rewind by writing inside whole(); end the stepper and go on with a second one; resume a checkpoint."""
    out = Outcome(mean=float(ranks.mean(torch.tensor(float(ranks.rank)))))
    module = Regression()
    names = {name: set(vars(each)) for name, each in module.named_parameters()}
    start = {name: each.detach().clone() for name, each in module.named_parameters()}
    stepper = make(ranks, module)
    out.fresh_state = stepper.state_dict()
    out.history = train(ranks, stepper, range(6))
    out.parameters, out.state = values(ranks, module), stepper.state_dict()
    with torch.no_grad():
        out.loss_between = float(module(*data(1)[0]))
    with ranks.whole(module):
        write(module, start)
    stepper.load_state_dict(out.fresh_state)
    out.rewound = train(ranks, stepper, range(6))
    state = stepper.state_dict()
    stepper = make(ranks, module)
    stepper.load_state_dict(state)
    out.again = train(ranks, stepper, range(6, 9))
    if ranks.size > 1 or not isinstance(ranks, SingleRank):
        ranks.close()
    out.again_loss = module(*data(1)[0]).item()
    out.clean = names == {name: set(vars(each)) for name, each in module.named_parameters()} and not any(
        each._forward_hooks or each._forward_pre_hooks or each._backward_hooks for each in module.modules()
    )
    if checkpoint is not None:
        module = Regression()
        stepper = make(ranks, module)
        with ranks.whole(module):
            write(module, checkpoint[0])
        stepper.load_state_dict(checkpoint[1])
        out.resumed = train(ranks, stepper, range(6, 9))
    out.bf16 = train(ranks, make(ranks, Regression(), "bf16"), range(6))
    # A rank's gradients are the larger the smaller its share of the batch: made small here, so that none overflows.
    out.fp16 = train(ranks, make(ranks, Regression(1 / 16), "fp16"), range(6))
    return out


def scenarios(member, checkpoint):
    torch.set_num_threads(1)
    outcomes = {}
    for stage in STAGES:
        os.environ["MASTER_PORT"] = "before"
        with join(member, CPU, stage=stage) as ranks:
            outcomes[stage] = scenario(ranks, checkpoint)
        assert os.environ.pop("MASTER_PORT") == "before"
        assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "DS_ACCELERATOR"} & os.environ.keys()
    return outcomes


@pytest.fixture(scope="module")
def single():
    return scenario(SingleRank())


@pytest.fixture(scope="module")
def outcomes(ray_session, single):
    found, checkpoint = {}, None
    for size in SIZES:
        run = {"ranks": size, "cpus": min(1, 2 / size), "gpus": 0, "name": f"{size} ranks"}
        found[size] = run_group(scenarios, (checkpoint,), **run)
        first = found[size][1]
        checkpoint = checkpoint or (first.parameters, first.state)
    return found


each_run = pytest.mark.parametrize(("size", "stage"), [(size, stage) for size in SIZES for stage in STAGES])


def assert_same(got, expected):
    """Equal up to the order of float32 sums, which 9 steps of Adam amplify: its first ones divide by |gradient|."""
    torch.testing.assert_close(torch.tensor(got), torch.tensor(expected), rtol=2e-5, atol=1e-6)


@each_run
def test_ranks_take_the_steps_of_a_single_process(outcomes, single, size, stage):
    got = outcomes[size][stage]
    assert min(norm for _, norm in single.history) > 2 * CLIP  # clipping is active throughout
    assert_same(got.history, single.history)
    for name, value in single.parameters.items():
        torch.testing.assert_close(got.parameters[name], value, rtol=2e-5, atol=2e-6)
    assert got.loss_between == pytest.approx(single.loss_between, rel=2e-5)
    assert got.mean == (size - 1) / 2


@each_run
def test_the_optimizer_state_is_that_of_a_single_process(outcomes, single, size, stage):
    got = outcomes[size][stage]
    for mine, expected in ((got.state, single.state), (got.fresh_state, single.fresh_state)):
        assert mine.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(mine[name], value, rtol=1e-4, atol=1e-7)
    assert (got.fresh_state["step"], got.state["step"]) == (0, 6)


@each_run
def test_what_is_written_inside_whole_is_what_is_trained(outcomes, size, stage):
    got = outcomes[size][stage]
    assert got.rewound == got.history


@each_run
def test_a_second_stepper_takes_the_module_over_and_close_leaves_it_as_it_was(outcomes, single, size, stage):
    got = outcomes[size][stage]
    assert_same(got.again, single.again)
    assert got.again_loss == pytest.approx(single.again_loss, rel=2e-5)
    assert got.clean


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("size", SIZES[1:])
def test_a_checkpoint_of_two_ranks_goes_on_with_another_number(outcomes, size, stage):
    assert_same(outcomes[size][stage].resumed, outcomes[2][1].again)


@each_run
def test_half_precision_is_that_of_a_single_process(outcomes, single, size, stage):
    got = outcomes[size][stage]
    # Same autocast, other sums: bf16 rounds to 0.4 %, fp16 to 0.05 %, of activations near 1.
    torch.testing.assert_close(torch.tensor(got.bf16), torch.tensor(single.bf16), rtol=0.02, atol=0)
    torch.testing.assert_close(torch.tensor(got.fp16), torch.tensor(single.fp16), rtol=0.005, atol=0)
    assert got.bf16[0] != got.history[0]
    assert got.fp16[0][0] != got.history[0][0] / 16


def train_in_parts(member):
    torch.set_num_threads(1)
    histories = {}
    for stage in STAGES:
        with join(member, CPU, stage=stage, parts=2) as ranks:
            histories[stage] = train(ranks, make(ranks, Regression()), range(6))
    return histories


@pytest.mark.parametrize("size", [1, 2])
def test_a_batch_that_passes_in_parts_takes_the_same_steps(ray_session, single, size):
    histories = run_group(train_in_parts, (), ranks=size, cpus=1, gpus=0, name="parts")
    for stage in STAGES:
        assert_same(histories[stage], single.history)


def listening(member):
    """Return the addresses, in the kernel's hex, on which this process listens while it trains."""
    torch.set_num_threads(1)
    with join(member, CPU, stage=1) as ranks:
        train(ranks, make(ranks, Regression()), range(1))
        links = [os.readlink(each.path) for each in os.scandir("/proc/self/fd") if os.path.islink(each.path)]
        inodes = {link.removeprefix("socket:[").removesuffix("]") for link in links if link.startswith("socket:[")}
        tables = (Path(f"/proc/self/net/{kind}").read_text().splitlines() for kind in ("tcp", "tcp6"))
        rows = [row.split() for table in tables for row in table]
        return {row[1].split(":")[0] for row in rows if row[3] == "0A" and row[9] in inodes}


@pytest.mark.skipif(not Path("/proc/self/net").exists(), reason="looks for sockets in /proc")
def test_ranks_on_one_machine_listen_on_loopback_only(ray_session):
    member = Membership(0, 1, "127.0.0.1", *free_ports(1))
    found = ray_session.result(ray_session.submit(listening, member, name="listening"))
    assert found
    assert found <= {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}


def overflow_at(member, stage):
    losses = []
    with join(member, CPU, stage=stage) as ranks:
        for precision in ("fp32", "fp16"):
            module = Regression()
            stepper = make(ranks, module, precision)
            stepper.set_learning_rates([1e-2, 1e-2])
            before = values(ranks, module)
            [(x, y)] = data(1)
            loss, norm = stepper.step(x, y * (float("inf") if precision == "fp32" else 1e6))
            kept = all(torch.equal(value, before[name]) for name, value in values(ranks, module).items())
            after, _ = stepper.step(x, y)
            losses.append((float(loss), float(norm), kept, float(after), float(stepper.state_dict()["step"])))
    return losses


@pytest.mark.parametrize("stage", STAGES)
def test_a_gradient_that_overflows_changes_nothing_and_shows(alone, stage):
    exact, half = alone[stage]
    assert torch.tensor(exact[0]).isnan()  # the caller learns that the step was not taken
    assert exact[1:3] == (float("inf"), True)
    assert torch.tensor(half[0]).isfinite()  # with a loss scale it is in the nature of things
    assert half[1:3] == (float("inf"), True)
    assert half[3] == pytest.approx(exact[3], rel=0.005)  # fp16 rounds to 0.05 %
    assert half[4] == 1


def refusals(member):
    said = []
    with join(member, CPU) as ranks:
        module = Regression()
        groups = module.groups()
        double = Regression().double()
        for wrong, wrong_groups, clip, precision in (
            (module, groups, CLIP, "fp8"),
            (module, groups, 0.0, "fp32"),
            (module, groups[:1], CLIP, "fp32"),
            (module, [*groups, ParameterGroup([])], CLIP, "fp32"),
            (module, [*groups, groups[0]], CLIP, "fp32"),
            (double, double.groups(), CLIP, "fp32"),
        ):
            try:
                ranks.stepper(wrong, wrong_groups, gradient_clip=clip, precision=precision)
            except RanksError as err:
                said.append(str(err))
        stepper = make(ranks, module)
        try:
            stepper.load_state_dict({"step": torch.tensor(0.0)})
        except RanksError as err:
            said.append(str(err))
    return said


def mishaps(member):
    return {stage: overflow_at(member, stage) for stage in STAGES} | {"refusals": refusals(member)}


@pytest.fixture(scope="module")
def alone(ray_session):
    return run_group(mishaps, (), ranks=1, cpus=1, gpus=0, name="mishaps")


def test_what_deepspeed_would_quietly_do_otherwise_is_refused(alone):
    for message, part in zip(
        alone["refusals"],
        (
            "precision",
            "above 0",
            "in no group: gain, first.bias, last.bias",
            "is empty",
            "once",
            "must be float32",
            "another module",
        ),
        strict=True,
    ):
        assert part in message


def test_join_refuses_what_cannot_be():
    with pytest.raises(RanksError, match="cuda:0"), join(Membership(0, 1, "127.0.0.1", 1), torch.device("cuda", 1)):
        pass
    with pytest.raises(RanksError, match="got 4"), join(Membership(0, 1, "127.0.0.1", 1), CPU, stage=4):
        pass


def train_and_die_once(member, directory):
    torch.set_num_threads(1)
    died = Path(directory) / "died"
    with join(member, CPU) as ranks:
        stepper = make(ranks, Regression())
        history = train(ranks, stepper, range(2))
        if member.rank == 1 and not died.exists():
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return history + train(ranks, stepper, range(2, 6))


def test_a_rank_killed_midway_costs_a_restart_and_no_digit(ray_session, single, tmp_path):
    got = run_group(train_and_die_once, (str(tmp_path),), ranks=2, cpus=1, gpus=0, name="dies midway")
    assert (tmp_path / "died").exists()
    assert_same(got, single.history)


def train_and_fail(member):
    torch.set_num_threads(1)
    with join(member, CPU) as ranks:
        stepper = make(ranks, Regression())
        train(ranks, stepper, range(2))
        if member.rank == 1:
            raise ValueError("block 3: the loss is nan")
        train(ranks, stepper, range(2, 6))


def test_an_error_in_one_rank_between_steps_is_the_one_that_is_raised(ray_session):
    with pytest.raises(ValueError, match=r"^block 3: the loss is nan$"):
        run_group(train_and_fail, (), ranks=2, cpus=1, gpus=0, name="fails midway")


def test_zero_stage_rises_as_memory_gets_scarce():
    block_8b, block_70b = 218_000_000, 856_000_000
    assert zero_stage(block_8b, 8, 80 * 2**30) == 1
    assert zero_stage(block_70b, 8, 80 * 2**30) == 1
    assert [zero_stage(block_70b, 8, gigabytes * 2**30) for gigabytes in (24, 20, 12)] == [1, 2, 3]
    assert zero_stage(block_70b, 1, 2**30) == 1
    assert zero_stage(block_70b, 4, None) == 1
