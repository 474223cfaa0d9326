"""Ranks that own rows of every weight take the steps of a single process."""

import socket
import sys
import time
from dataclasses import dataclass, field

import pytest
import tiny
import torch
from ray import cloudpickle

from prefixquant.cluster.process_group import process_group
from prefixquant.cluster.worker_group import Membership, run_group
from prefixquant.tasks.losses import mse
from prefixquant.tasks.model.modules import SiteLinear
from prefixquant.tasks.model.quantizer import round_to_nearest
from prefixquant.tasks.model.spec import QuantizeConfig, WeightSpec
from prefixquant.tasks.model.trainable import make_trainable
from prefixquant.tasks.model.ways import StepWays
from prefixquant.tasks.parallel import ParameterGroup, Ranks
from prefixquant.tasks.rotate import RotateConfig
from prefixquant.tasks.sharded_steps import ShardedRanks
from prefixquant.tasks.steps import SingleRank
from prefixquant.tasks.train_block import BlockLoss

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test module
cloudpickle.register_pickle_by_value(tiny)

CLIP = 0.05
SIZES = (2, 1, 4)
STEPS = 6
SPECS = {
    "channel": WeightSpec(),
    "group-asymmetric": WeightSpec(bits=3, symmetric=False, granularity="group", group_size=16),
    "tensor": WeightSpec(granularity="tensor"),  # one scale for all rows: every rank holds the whole
    "unquantized": None,
    "frozen-weights": WeightSpec(),
}


def problem(spec, frozen=False):
    """Return a trainable tiny block as a loss, and its parameter groups: weights decay, the rest do not."""
    quantize = QuantizeConfig(weights=spec)
    block = tiny.build_blocks(tiny.tiny_variant("llama-biases"), RotateConfig(), quantize)[0]
    for name, site in block.sites.items():
        top = 0.01 if name in ("o_input", "down_input") else 0.1
        shape = site.quantizer.parameter_shape()
        site.quantizer.set_range(torch.full(shape, -top), torch.full(shape, 0.8 * top))
    weights = {role: block.linear(role).weight.data.clone() for role in block.family.linears}
    grids = {} if spec is None else {role: round_to_nearest(each, spec, 0.8) for role, each in weights.items()}
    trainables = make_trainable(block, weights, grids, spec)
    for each in trainables:
        each.parameter.requires_grad_(not (frozen and each.is_weight))
    trained = [each for each in trainables if each.parameter.requires_grad]
    groups = [ParameterGroup([each.parameter], 0.1 if each.is_weight else 0.0) for each in trained]
    return BlockLoss(block, None, mse), groups


def data():
    generator = torch.Generator().manual_seed(1)
    return [tuple(torch.randn(8, 9, 48, generator=generator) for _ in "xy") for _ in range(STEPS)]


def share(batch, ranks):
    size = len(batch[0]) // ranks.size
    return [each[ranks.rank * size :][:size] for each in batch]


def train(ranks, stepper, groups, steps):
    history = []
    for step in steps:
        stepper.set_learning_rates([1e-3 / (step + 1)] * groups)
        history.append([float(each) for each in stepper.step(*share(data()[step], ranks))])
    return history


def values(ranks, module):
    with ranks.whole(module):
        return {name: each.detach().clone() for name, each in module.named_parameters()}


@dataclass
class Outcome:
    history: list = field(default_factory=list)
    parameters: dict = field(default_factory=dict)
    state: dict = field(default_factory=dict)
    loss_between: float = 0.0
    rewound: list = field(default_factory=list)
    resumed: list = field(default_factory=list)
    resumed_state: list = field(default_factory=list)
    mean: float = 0.0
    cut: int = 0
    clean: bool = False


def scenario(ranks: Ranks, name, checkpoint=None, precision="fp32", backend=None, ways=None):
    """Train; look at the loss in between; rewind by writing inside whole(); go on from a checkpoint of other ranks."""
    out = Outcome(mean=float(ranks.mean(torch.tensor(float(ranks.rank)))))
    module, groups = problem(SPECS[name], frozen=name == "frozen-weights")
    if ways is not None:
        module.block.take_ways(ways)
    if backend is not None:
        module._compiled = torch.compile(module._loss, backend=backend, fullgraph=True, dynamic=False)
    before = [(each, each.weight_quantizer) for each in module.modules() if isinstance(each, SiteLinear)]
    start = {name: each.detach().clone() for name, each in module.named_parameters()}
    stepper = ranks.stepper(module, groups, gradient_clip=CLIP, precision=precision)
    fresh = stepper.state_dict()
    out.history = train(ranks, stepper, len(groups), range(STEPS))
    with torch.no_grad():
        out.loss_between = float(module(*data()[0]))
    out.parameters, out.state = values(ranks, module), stepper.state_dict()
    with ranks.whole(module), torch.no_grad():
        for each, value in module.named_parameters():
            value.copy_(start[each])
    stepper.load_state_dict(fresh)
    out.rewound = train(ranks, stepper, len(groups), range(STEPS))
    if checkpoint is not None:
        module, groups = problem(SPECS[name], frozen=name == "frozen-weights")
        stepper = ranks.stepper(module, groups, gradient_clip=CLIP, precision=precision)
        with ranks.whole(module), torch.no_grad():
            for each, value in module.named_parameters():
                value.copy_(checkpoint[0][each])
        stepper.load_state_dict(checkpoint[1])
        out.resumed = train(ranks, stepper, len(groups), range(2))
    if isinstance(ranks, ShardedRanks):
        out.cut = len(ranks._stepper._cut)
        ranks.close()
    out.clean = not module._forward_pre_hooks and all(linear.weight_quantizer is each for linear, each in before)
    return out


def scenarios(member, checkpoints):
    torch.set_num_threads(1)
    with process_group(member, tiny.CPU):
        ranks = ShardedRanks()
        found = {name: scenario(ranks, name, checkpoints.get(name)) for name in SPECS}
        return found | {precision: scenario(ranks, "channel", precision=precision) for precision in ("bf16", "fp16")}


@pytest.fixture(scope="module")
def single():
    ranks = SingleRank()
    found = {name: scenario(ranks, name) for name in SPECS}
    return found | {precision: scenario(ranks, "channel", precision=precision) for precision in ("bf16", "fp16")}


def in_parts(member):
    torch.set_num_threads(1)
    with process_group(member, tiny.CPU):
        return scenario(ShardedRanks(parts=2), "channel").history


def compiled(member):
    torch.set_num_threads(1)
    torch._dynamo.reset()
    with process_group(member, tiny.CPU):
        ways = StepWays(attention="lower_right")
        return scenario(ShardedRanks(), "channel", backend="aot_eager", ways=ways).history


@pytest.fixture(scope="module")
def outcomes(ray_session, single):
    checkpoints = {name: (single[name].parameters, single[name].state) for name in SPECS}
    return {
        size: run_group(
            scenarios, (checkpoints,), ranks=size, cpus=min(1, 2 / size), gpus=0, name=f"rows over {size} ranks"
        )
        for size in SIZES
    }


each_run = pytest.mark.parametrize(("size", "name"), [(size, name) for size in SIZES for name in SPECS])


@each_run
def test_ranks_take_the_steps_of_a_single_process(outcomes, single, size, name):
    got, wanted = outcomes[size][name], single[name]
    assert min(norm for _, norm in wanted.history) > 2 * CLIP  # clipping is active throughout
    assert len(got.history) == STEPS
    # Sums in another order; Adam's first steps divide by |gradient| and amplify them.
    torch.testing.assert_close(torch.tensor(got.history), torch.tensor(wanted.history), rtol=1e-4, atol=0)
    for each, value in wanted.parameters.items():
        torch.testing.assert_close(got.parameters[each], value, rtol=0, atol=2e-4)  # a fifth of one step of 1e-3
    assert got.loss_between == pytest.approx(wanted.loss_between, rel=1e-4)
    assert got.mean == (size - 1) / 2


def test_a_share_that_passes_in_parts_gives_the_same_steps(ray_session, single):
    got = run_group(in_parts, (), ranks=2, cpus=1, gpus=0, name="rows in parts")
    torch.testing.assert_close(torch.tensor(got), torch.tensor(single["channel"].history), rtol=1e-4, atol=0)


def test_a_compiled_block_gives_the_same_steps_in_other_ways(ray_session, single):
    got = run_group(compiled, (), ranks=2, cpus=1, gpus=0, name="compiled rows")
    torch.testing.assert_close(torch.tensor(got), torch.tensor(single["channel"].history), rtol=1e-4, atol=0)


@each_run
def test_the_optimizer_state_is_that_of_a_single_process(outcomes, single, size, name):
    got, wanted = outcomes[size][name].state, single[name].state
    assert got.keys() == wanted.keys()
    assert got["step"] == STEPS
    largest = max(float(value.abs().max()) for each, value in wanted.items() if each.endswith("exp_avg"))
    for each, value in wanted.items():
        torch.testing.assert_close(got[each], value, rtol=1e-3, atol=1e-3 * largest)


@each_run
def test_what_is_written_inside_whole_is_what_is_trained(outcomes, size, name):
    assert outcomes[size][name].rewound == outcomes[size][name].history


@each_run
def test_a_checkpoint_of_one_rank_goes_on_with_another_number(outcomes, size, name):
    wanted = outcomes[1][name].resumed
    torch.testing.assert_close(torch.tensor(outcomes[size][name].resumed), torch.tensor(wanted), rtol=1e-4, atol=0)


@each_run
def test_rows_are_owned_where_they_can_be_and_the_module_is_left_as_it_was(outcomes, size, name):
    grid = {"channel": 14, "group-asymmetric": 21, "tensor": 0, "unquantized": 7, "frozen-weights": 7}[name]
    assert outcomes[size][name].cut == grid
    assert outcomes[size][name].clean


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_that_of_a_single_process(outcomes, single, size, precision):
    got, wanted = (torch.tensor(each[precision].history) for each in (outcomes[size], single))
    # Same autocast, other sums: bf16 rounds activations and the gradients that travel by 0.4 %, fp16 by 0.05 %.
    torch.testing.assert_close(got, wanted, rtol={"bf16": 0.02, "fp16": 0.005}[precision], atol=0)
    assert got.tolist() != outcomes[size]["channel"].history


def left_alone(member):
    torch.set_num_threads(1)
    module, groups = problem(SPECS["channel"])  # which imports for a while, before the ranks meet
    with process_group(member, tiny.CPU, timeout_s=8):
        ranks = ShardedRanks()
        stepper = ranks.stepper(module, groups, gradient_clip=CLIP, precision="fp32")
        if member.rank == 1:
            time.sleep(20)
            return None
        try:
            stepper.step(*share(data()[0], ranks))
        except RuntimeError as err:
            return stepper.collectives.last, err.__notes__


def test_a_rank_whose_others_stay_away_says_in_which_collective(ray_session):
    last, notes = run_group(left_alone, (), ranks=2, cpus=1, gpus=0, name="a rank alone")
    gathered = "all_gather of quantized rows of block.model.layers.0.self_attn.q_proj"
    assert last.startswith("all_gather of quantized rows of block.model.layers.0.")
    assert notes == [f"on rank 0 of 2, in {gathered}"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_graph_with_its_collectives_takes_the_steps_of_the_eager_loop(precision):
    device, histories = torch.device("cuda"), []
    for ranks in (None, False, True):
        module, groups = problem(SPECS["channel"])
        module.to(device)
        with socket.create_server(("127.0.0.1", 0)) as place:
            port = place.getsockname()[1]
        with process_group(Membership(0, 1, "127.0.0.1", port), device):
            chosen = SingleRank(cuda_graph=False) if ranks is None else ShardedRanks(cuda_graph=ranks)
            stepper = chosen.stepper(module, groups, gradient_clip=CLIP, precision=precision)
            history = []
            for step, batch in enumerate(data()):
                stepper.set_learning_rates([1e-3 / (step + 1)] * len(groups))
                history.append([float(each) for each in stepper.step(*(each.to(device) for each in batch))])
            if ranks is not None:
                chosen.close()  # before the process group is left, which waits for the graph to be gone
        histories.append(torch.tensor(history))
    single, eager, graphed = histories
    torch.testing.assert_close(graphed, eager, rtol=1e-5, atol=0)
    torch.testing.assert_close(eager, single, rtol={"fp32": 1e-4, "bf16": 0.02}[precision], atol=0)
