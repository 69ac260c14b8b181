"""What is read from Nsight Compute's table."""

import pytest

pytest.importorskip("torch")

LOG = """==PROF== Connected to process 7
"ID","Kernel Name","gpu__time_duration.sum","sm__warps_active.avg.pct_of_peak_sustained_active","{stall}x_per_issue_active.ratio","{stall}y_per_issue_active.ratio"
"","","us","%","inst","inst"
"0","forward_kernel","393.1","24.9","1.5","2,000.5"
"1","query_gradient_kernel","498.0","20.1","3","1"
==PROF== Disconnected
"""  # noqa: E501


def test_counters_are_read_by_name_with_the_greatest_stalls_first(monkeypatch, request):
    monkeypatch.syspath_prepend(str(request.config.rootpath / "benchmarks"))
    import gpu_counters

    rows = gpu_counters.read_counters(LOG.format(stall=gpu_counters.STALL))
    first = [(row["metric"], row["value"], row["unit"]) for row in rows if row["kernel"] == "forward"]
    assert first == [
        ("duration", "393.1", "us"),
        ("occupancy", "24.9", "%"),
        ("stalled: y", "2,000.5", "inst"),
        ("stalled: x", "1.5", "inst"),
    ]
    assert {row["case"] for row in rows} == {"D64 L1024"}
    assert gpu_counters.read_counters("==ERROR== no permission") == []
