"""An H100 that isn't there: enough of one for Inductor to generate code for CUDA tensors on a machine without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from mla_ops.device import DeviceTraits

H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=80 << 30,
    warp_size=32,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    L2_cache_size=50 << 20,
    gcnArchName="",
    uuid="fake",
)
H100_TRAITS = DeviceTraits(
    "cuda", 90, H100.shared_memory_per_block_optin, H100.multi_processor_count, H100.L2_cache_size, H100.name
)
DRIVER = SimpleNamespace(
    get_current_target=lambda: SimpleNamespace(backend="cuda", arch=90, warp_size=32),
    get_current_device=lambda: 0,
    get_active_torch_device=lambda: torch.device("cuda", 0),
)


@contextmanager
def fake_h100() -> Iterator[None]:
    """Answer every question that torch, Inductor and Triton ask about device 0 as an H100 would."""
    import torch.utils._triton
    import triton
    from torch._dynamo import device_interface

    from mla_ops import device

    answers = {
        "_lazy_init": lambda: None,
        "get_device_properties": lambda *args: H100,
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "is_available": lambda: True,
        "get_device_capability": lambda *args: (9, 0),
    }
    interface = {
        **{name: staticmethod(answer) for name, answer in answers.items() if name != "_lazy_init"},
        "get_compute_capability": staticmethod(lambda *args: 90),
    }
    with ExitStack() as stack:
        stack.enter_context(patch.multiple(torch.cuda, **answers))
        stack.enter_context(patch.object(torch.version, "cuda", "13.0"))
        stack.enter_context(patch.multiple(device_interface.CudaInterface, **interface, create=True))
        stack.enter_context(patch.multiple(device_interface.CudaInterface.Worker, **interface, create=True))
        remembered = [device._cuda_traits, *vars(torch.utils._triton).values()]  # answers given before and in here
        for clear in (getattr(function, "cache_clear", None) for function in remembered):
            if clear is not None:
                clear()
                stack.callback(clear)
        stack.enter_context(patch.object(triton.runtime.driver, "_active", DRIVER))
        yield


def generate_code(function: Callable[..., Any], args: Sequence[Any], mode: FakeTensorMode) -> str:
    """Return the Python module that Inductor writes for `function` on fake CUDA tensors of `mode`."""
    from torch._inductor.debug import DebugContext
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V

    from mla_ops import lowering

    graph = make_fx(function, tracing_mode="fake")(*args)
    with mode, V.set_fake_mode(mode), fake_h100(), V.set_debug_handler(DebugContext()):
        lowering.prepare()
        lowered = GraphLowering(graph, shape_env=mode.shape_env)
        with V.set_graph_handler(lowered):
            lowered.run(*args)
            return lowered.codegen()[0].value


class LoweringBackend:
    """A torch.compile backend that lowers as if CPU tensors were on an H100, then runs the graph as it came.

    So Dynamo, AOT autograd, guards, post-grad passes and the lowering are the real ones, in training too, which fake
    CUDA tensors can't show: autograd needs a device behind them.
    """

    def __init__(self) -> None:
        from functorch.compile import min_cut_rematerialization_partition
        from torch._dynamo.backends.common import aot_autograd
        from torch._inductor.decomposition import select_decomp_table

        self.frames = 0
        self.graphs: list[torch.fx.GraphModule] = []  # post-grad; forward and backward
        self.operations: list[list[str]] = []  # for each graph: operators called, kinds of the rest
        self.launches: list[dict[str, Any]] = []  # the arguments of every inlined kernel, by name
        self._compile = aot_autograd(
            fw_compiler=self._lower,
            bw_compiler=self._lower,
            partition_fn=min_cut_rematerialization_partition,
            decompositions=select_decomp_table(),
        )

    def __call__(self, graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
        self.frames += 1
        return self._compile(graph, inputs)

    def is_inlined(self, operator: str = "mla.") -> bool:
        """Whether graphs have kernels where the operators were, of all names that start so; all must agree."""
        (answer,) = {"UserDefinedTritonKernel" in operations for operations in self.operations}
        (is_extern,) = {any(name.startswith(operator) for name in operations) for operations in self.operations}
        assert answer != is_extern
        return answer

    def _lower(self, graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
        import triton
        from functorch.compile import make_boxed_func
        from torch._guards import detect_fake_mode
        from torch._inductor.debug import DebugContext
        from torch._inductor.fx_passes.post_grad import post_grad_passes
        from torch._inductor.graph import GraphLowering
        from torch._inductor.virtualized import V

        from mla_ops.lowering import attn_mass, index_scores, index_topk, sparse_attn, sparse_attn_choices

        mode = detect_fake_mode(inputs)
        self.graphs.append(graph)
        with ExitStack() as stack:
            for module in (sparse_attn, sparse_attn_choices, index_topk, index_scores, attn_mass):
                stack.enter_context(patch.object(module, "traits_of", lambda device: H100_TRAITS))
            stack.enter_context(patch.object(triton.runtime.driver, "_active", DRIVER))
            stack.enter_context(V.set_fake_mode(mode))
            stack.enter_context(V.set_debug_handler(DebugContext()))
            post_grad_passes(graph, is_inference=True)
            lowered = GraphLowering(graph, shape_env=mode.shape_env)
            stack.enter_context(V.set_graph_handler(lowered))
            lowered.run(*inputs)
        self.operations.append(
            [
                str(getattr(operation, "op_overload", None) or type(operation).__name__)
                for operation in lowered.operations
            ]
        )
        self.launches += [
            operation.kwargs
            for operation in lowered.operations
            if type(operation).__name__ == "UserDefinedTritonKernel"
        ]
        return make_boxed_func(graph.forward)


def fake_mode() -> FakeTensorMode:
    """Return a mode whose tensors may have symbolic sizes."""
    return FakeTensorMode(shape_env=ShapeEnv())


def symbol(mode: FakeTensorMode, name: str, value: int) -> torch.SymInt:
    """Return a symbolic size with a hint."""
    from torch._dynamo.source import ConstantSource

    source = ConstantSource(name)
    env = mode.shape_env
    assert env is not None
    return env.create_symintnode(env.create_symbol(value, source), hint=value, source=source)
