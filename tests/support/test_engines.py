"""The stand-ins of TensorRT's runtime and CUDA notice what a GPU would not forgive."""

import importlib

import numpy as np
import pytest
from support.cuda import CpuGpu, CpuPycuda, GpuFaultError, stand_in_device
from support.engines import (
    Allocation,
    CpuContext,
    CpuEngine,
    DataType,
    Diagnostics,
    Mode,
    Validity,
    fake_runtime,
)

from dbsam_deploy.core.errors import EngineError


def test_the_stand_in_notices_memory_that_is_gone():
    gpu = CpuGpu()
    pycuda = CpuPycuda(gpu)
    gpu.current = 1
    memory, stream, host = pycuda.mem_alloc(16), pycuda.Stream(), np.zeros(16, np.uint8)
    pycuda.memcpy_dtoh_async(host, int(memory), stream)
    assert not host.any()  # nothing happens before the stream is synchronised
    stream.synchronize()
    assert (host == 0xFF).all()
    pycuda.memcpy_dtoh_async(host, int(memory), stream)
    del memory
    with pytest.raises(GpuFaultError, match="no such allocation"):
        stream.synchronize()


def test_the_stand_in_notices_a_context_that_changed_under_its_recording(tiny_artefact):
    gpu = CpuGpu()
    device = stand_in_device(gpu)
    plan = tiny_artefact.path("decoder").read_bytes()
    with device.current():
        context = CpuEngine(gpu, plan, []).create_execution_context()
        memory = {n: device.allocate(2**18) for n in ("image_embeddings", "boxes")}
        memory |= {n: device.allocate(2**18) for n in ("low_res_masks", "iou_predictions")}
        assert not context.execute_async_v3(device.stream)  # nothing is set
        context.set_optimization_profile_async(0, device.stream)
        context.set_input_shape("image_embeddings", (1, 256, 8, 8))
        context.set_input_shape("boxes", (1, 3, 4))
        for name, item in memory.items():
            context.set_tensor_address(name, int(item))
        with pytest.raises(
            EngineError,
            match=r"recording a CUDA graph failed with CUDA error 901 \(cudaErrorStreamCapture",
        ):
            device.record(lambda: context.execute_async_v3(device.stream))  # never run before
        assert context.execute_async_v3(device.stream)
        graph = device.record(lambda: context.execute_async_v3(device.stream))
        graph.launch()
        device.synchronise()
        context.set_input_shape("boxes", (1, 2, 4))
        graph.launch()
        with pytest.raises(GpuFaultError, match="changed before"):
            device.synchronise()


@pytest.mark.rtx
def test_the_stand_ins_have_only_names_that_the_real_interfaces_have():
    trt = importlib.import_module("tensorrt_rtx")
    pairs = (
        (CpuEngine, trt.ICudaEngine),
        (CpuContext, trt.IExecutionContext),
        (Validity, trt.EngineValidity),
        (Diagnostics, trt.EngineInvalidityDiagnostics),
        (DataType, trt.DataType),
        (Mode, trt.TensorIOMode),
        (Allocation, trt.ExecutionContextAllocationStrategy),
    )
    for ours, real in pairs:
        mine = ours.__members__ if isinstance(ours, type(Allocation)) else vars(ours)
        assert {name for name in mine if not name.startswith("_")} <= set(dir(real)), ours
    runtime = fake_runtime(CpuGpu(), "1")
    assert set(vars(runtime)) <= set(dir(trt))
    assert set(vars(runtime.Runtime(None))) <= set(dir(trt.Runtime))
    config = vars(CpuEngine.create_runtime_config(None))
    assert set(config) <= set(dir(trt.IRuntimeConfig))
    for name in ("DynamicShapesKernelSpecializationStrategy", "CudaGraphStrategy"):
        assert set(vars(getattr(runtime, name))) <= set(dir(getattr(trt, name)))
