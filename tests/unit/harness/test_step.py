"""A step asks the device for nothing: every read would stop the host until all that was launched has run."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

import sbs
from harness.config import Recipe, TrainConfig, load_recipe
from harness.pressure import pressure_of
from harness.ranks import Ranks
from harness.step import Job, Stepper
from sbs import integer
from tests.unit.harness.reads import host_reads

ALONE = Ranks(0, 1, torch.device("cpu"), "none", "process")
META = torch.device("meta")
NETWORKS = ("resnet20", "resnet18", "mobilenetv2_cifar")
BATCH, SIZE = 2, 16


@pytest.fixture(autouse=True)
def _as_a_gpu_would_see_it(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(integer, "available", lambda: False)  # CPUs alone have this road
    before, threads = sbs.use_compiled(False), torch.get_num_threads()
    torch.set_num_threads(1)  # more of them would wait for one another on tensors as small as these
    yield
    torch.set_num_threads(threads)
    sbs.use_compiled(before)


def images() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(BATCH, 3, SIZE, SIZE, generator=generator).to(memory_format=torch.channels_last)


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    return sbs.models.build(name, 10)


def fixed(name: str) -> nn.Module:
    model = network(name)
    return sbs.compress(model, sbs.Policy.uniform(model, images(), 4, 4), example_input=images())


def searched(name: str) -> sbs.SuperNet:
    return sbs.prepare(network(name), sbs.SearchSpace(), images(), absorb_relus=True)


def reads_of(job: Job, recipe: Recipe) -> list[str]:
    """Of the second step; what is found out once and kept does no harm."""
    net = job.net.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    assert net is job.net
    stepper = Stepper(job, recipe, ALONE, None)
    stepper.step(images(), torch.arange(BATCH), 0, 10)
    with host_reads() as found:
        stepper.step(images(), torch.arange(BATCH), 1, 10)
    return found


def recipe(*overrides: str) -> Recipe:
    return load_recipe("digits_resnet20", overrides)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(("stage", "make"), [("pretrain", network), ("finetune", fixed)])
def test_a_step_reads_nothing(stage: str, make: Callable[[str], nn.Module], name: str):
    config: TrainConfig = getattr(recipe(), stage).model_copy(update={"ema_decay": 0.99, "clip_norm": 1.0})
    assert reads_of(Job(stage, "key", make(name), config, 0), recipe("run.precision=bf16")) == []


def test_parts_and_a_teacher_read_nothing_either():
    config = recipe().finetune.model_copy(update={"accumulate": 2, "distill": 0.5})
    teacher = network("resnet20").eval().requires_grad_(requires_grad=False)
    assert reads_of(Job("finetune", "key", fixed("resnet20"), config, 0, teacher=teacher), recipe()) == []


@pytest.fixture
def _without_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autocast knows nothing of a device that has no numbers, and asking would be an error."""
    ask = torch.is_autocast_enabled
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind="meta": kind != "meta" and ask(kind))


@pytest.mark.usefixtures("_without_numbers")
@pytest.mark.filterwarnings("ignore:this super-network trains from clips of 1")
@pytest.mark.parametrize(
    "drive",
    [
        "search.lambda=0.3",
        "search.budget=0.03",
    ],
)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_step_of_a_search_needs_no_number_on_the_host(name: str, drive: str):
    """On the device `meta`, which has none to give: on a CPU the masks of channels are looked at, as that is free.

    What is read would raise; what the host sends, and how many numbers there are, the recorder sees.
    """
    made, net = recipe(drive), searched(name)
    ranks = Ranks(0, 1, META, "none", "process")
    pressure = pressure_of(net, made, 10, ranks, lambda *_: None)  # its reach is counted on the host, once
    stepper = Stepper(Job("search", "key", net.to(META).train(), made.search, 0, pressure=pressure), made, ranks, None)
    batch = images().to(META), torch.arange(BATCH, device=META)
    stepper.step(*batch, 0, 10)
    with host_reads() as found:
        stepper.step(*batch, 1, 10)
    assert found == []


@pytest.mark.parametrize(
    "read", [lambda t: bool(t[0] > 0), lambda t: t.tolist(), lambda t: t[t > 0], lambda t: t.cpu()]
)
def test_numbers_of_meta_cannot_be_had(read: Callable[[torch.Tensor], object]):
    with host_reads() as found:
        try:
            read(torch.ones(2, device=META))
        except (RuntimeError, NotImplementedError):
            found.append("refused")
    assert found


@pytest.mark.parametrize(
    "read",
    [
        lambda t: bool(t[0, 0] > 0),
        lambda t: t.sum().item(),
        lambda t: t[t > 0],
        lambda t: t.nonzero(),
        lambda t: torch.equal(t, t),
        lambda t: t.cpu(),
        lambda t: t.to("cpu"),
        lambda t: t.tolist(),
        lambda t: t.masked_select(t > 0),
        lambda t: t.to("meta"),
        lambda t: torch.tensor([1.0, 2.0]) + t,
        torch.unique,
    ],
)
def test_the_recorder_sees_what_would_wait(read: Callable[[torch.Tensor], object]):
    tensor = torch.tensor([[1.0, -1.0]])
    with host_reads() as found:
        read(tensor)
    assert found
    assert all("test_step.py" in line for line in found)
