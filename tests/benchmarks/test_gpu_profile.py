"""The split of a GPU step by class, on a trace of which every figure is known."""

import pytest

pytest.importorskip("torch")


def event(cat: str, name: str, start: float, duration: float, **arguments: object) -> dict[str, object]:
    return {"ph": "X", "cat": cat, "name": name, "ts": start, "dur": duration, "tid": 1, "args": arguments}


TRACE = [
    event("kernel", "nvjet_before", 50, 10, correlation=1),
    event("user_annotation", "fat5.profiled_step", 100, 1000),
    event("gpu_user_annotation", "fat5.profiled_step", 130, 900),
    event("cuda_driver", "cuLaunchKernel", 110, 5, correlation=2),
    event("kernel", "forward_kernel", 200, 100, correlation=2),
    event("cuda_runtime", "cudaLaunchKernel", 120, 5, correlation=3),
    event("kernel", "nvjet_sm90_tst_128x256", 300, 50, correlation=3),
    event("cpu_op", "fat5::linear_cross_entropy_summed", 130, 50),
    event("cuda_runtime", "cudaLaunchKernel", 140, 5, correlation=4),
    event("kernel", "nvjet_sm90_tst_128x256", 400, 30, correlation=4),
    event("cuda_runtime", "cudaLaunchKernel", 150, 5, correlation=5),
    event("kernel", "vectorized_elementwise_kernel", 430, 20, correlation=5),
    event("user_annotation", "Optimizer.step#AdamWScale.step", 200, 60),
    event("cuda_runtime", "cudaLaunchKernel", 210, 5, correlation=6),
    event("kernel", "multi_tensor_apply_kernel", 500, 40, correlation=6),
    event("cuda_runtime", "cudaLaunchKernel", 270, 5, correlation=7),
    event("kernel", "multi_tensor_apply_kernel", 540, 5, correlation=7),
    event("cuda_runtime", "cudaStreamSynchronize", 280, 300, correlation=8),
]


def test_every_microsecond_of_a_step_has_one_class(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest):
    monkeypatch.syspath_prepend(str(request.config.rootpath / "benchmarks"))
    from gpu_profile import read_trace

    found = read_trace(TRACE)
    assert found.milliseconds == pytest.approx(0.345)  # from the first kernel's start to the last one's end
    assert found.classes == pytest.approx(
        {
            "attention forward": 0.1,
            "GEMM": 0.05,
            "cross-entropy GEMM": 0.03,
            "cross-entropy": 0.02,
            "optimizer": 0.04,
            "gradient norm and clip": 0.005,
            "idle": 0.1,
        }
    )
    assert sum(found.classes.values()) == pytest.approx(found.milliseconds)
    assert found.waits == {"cudaStreamSynchronize": 1}
    assert "nvjet_sm90_tst_128x256" in found.text("one step")
