"""What `bench.gpu` times of a kernel: its launches as a CUDA graph, ours and torch's; without a GPU."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install triton==3.6.0")

from bench import gpu_forms, gpu_times, gpu_training, gpu_tune
from bench.gpu_forms import Form, Probe
from bench.gpu_training_forms import training_forms

TIMES = (2.0, 1.0, 3.0)


def _form(call: Callable[[torch.Tensor, torch.Tensor], object], eager: Callable[[], object]) -> Form:
    def make(batch: int, kind: str, tile: object = None) -> Probe:
        x, out = torch.zeros(4, 5), torch.zeros(4, 5)
        return Probe(call, x, out, lambda: (out, out), eager, ())

    return Form("f", "8 to 8 s1", 7, 10**9, 3, make, "stem")


class Graphs:
    """Stand-ins for CUDA graphs: a graph holds nothing of what was captured, and counts its replays."""

    def __init__(self) -> None:
        self.capturing, self.captured, self.replays = False, 0, 0

    @contextlib.contextmanager
    def capture(self, graph: object) -> Iterator[None]:
        self.capturing, self.captured = True, self.captured + 1
        try:
            yield
        finally:
            self.capturing = False

    def replay(self) -> None:
        self.replays += 1


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Graphs:
    class Stream:
        def wait_stream(self, other: object) -> None:
            pass

    found = Graphs()
    for name, value in (
        ("Stream", Stream),
        ("current_stream", Stream),
        ("stream", lambda stream: contextlib.nullcontext()),
        ("CUDAGraph", lambda: found),
        ("graph", found.capture),
    ):
        monkeypatch.setattr(torch.cuda, name, value)
    return found


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Callable[[], object], float]]:
    """What was timed, and for how many ms; it is called thrice."""
    calls = []

    def once(call: Callable[[], object], rep: int = 100) -> tuple[float, float, float]:
        calls.append((call, rep))
        for _ in range(3):
            call()
        return TIMES

    monkeypatch.setattr(gpu_times, "timed", once)
    return calls


def test_a_graph_is_replayed_for_ours_and_torchs(graphs: Graphs, timed: list) -> None:
    """Each is called once before it is captured, for what compiles or is chosen then."""
    launched, theirs = [], []
    form = _form(lambda x, out: launched.append(graphs.capturing), lambda: theirs.append(graphs.capturing))
    assert gpu_times.time_form(form) == {
        "bytes": 160,
        gpu_times.OURS: TIMES,
        gpu_times.EAGER: TIMES,
        gpu_times.NO_GRAPH: {gpu_times.OURS: "", gpu_times.EAGER: ""},
    }
    assert launched == theirs == [False, True]
    assert graphs.replays == 6
    assert [rep for _, rep in timed] == [gpu_times.FORM_MS] * 2


def test_what_no_graph_takes_is_called(graphs: Graphs, timed: list) -> None:
    """And the reason is told, of torch's and of a tile."""
    calls = []

    def call(*_: object) -> None:
        if graphs.capturing:
            raise RuntimeError("first line\noperation not permitted when stream is capturing")
        calls.append(1)

    why = "RuntimeError: operation not permitted when stream is capturing"
    found = gpu_times.time_form(_form(lambda x, out: out, call))
    assert found[gpu_times.NO_GRAPH] == {gpu_times.OURS: "", gpu_times.EAGER: why}
    assert found[gpu_times.EAGER] == TIMES
    assert len(calls) == 4
    one = gpu_tune.Try("stem", "half", "", _form(call, lambda: None), "fp16", 1, (("m", 64),))
    assert gpu_tune.time_try(one) == (2.0, why)


def test_what_a_graph_reads_lives_as_long_as_it(graphs: Graphs) -> None:
    """A tile's probe is nobody's but the graph's."""
    read = torch.zeros(3)
    alive, run = weakref.ref(read), gpu_training.graphed(lambda read=read: read + 1)
    del read
    gc.collect()
    run()
    assert alive() is not None
    assert graphs.replays == 1
    del run
    gc.collect()
    assert alive() is None


def test_torchs_failure_is_its_own(graphs: Graphs, timed: list) -> None:
    def fails() -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    found = gpu_times.time_form(_form(lambda x, out: out, fails))
    assert found[gpu_times.OURS] == TIMES
    assert found[gpu_times.EAGER] == "OutOfMemoryError: CUDA out of memory"


def test_what_matters_is_timed_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the time ends before the kernels do. None is left out but shapes of the smallest kernels."""
    monkeypatch.setattr(gpu_times, "usable", lambda form: True)
    everything = [form for form in (*gpu_forms.forms(), *training_forms()) if "fp16" in form.kinds()]
    timed = [work.form for work in gpu_times.form_works() if work.form]
    parts = [
        {"depthwise", "depthwise input gradient", "depthwise weight gradient"},
        {"train depthwise", "train depthwise gradients"},
    ]
    first = [form.name for form in timed]
    for names in parts:
        part = [form for form in everything if form.name in names]
        assert len(part) > 15
        assert set(first[: len(part)]) == names
        first = first[len(part) :]
    products = [name.startswith("pointwise") for name in first]
    assert products == sorted(products)
    small = {"train normalize", "train norm gradient", "train activate", "train sums"}
    for name in {form.name for form in everything}:
        alike = [str(form) for form in everything if form.name == name]
        kept = [str(form) for form in timed if form.name == name]
        assert kept == ([alike[0], alike[len(alike) // 2], alike[-1]] if name in small else alike), name


def test_a_copy_is_measured(timed: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_forms, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_times, "COPY_BYTES", 2**20)
    copy = gpu_times.measure_copy()
    assert copy["gbs"] == pytest.approx(2 * 2**20 / 2e-3 / 1e9)
    assert copy["floors"] == {"layer by layer": pytest.approx(27.2e6, rel=0.02)}
