"""`python -m minimind.doctor --prove` on a simulated GPU: the runs are on it, and the page says what it is."""

import json

from small_proof import prove_little


def test_a_device_is_proven_against_the_cpu(one_gpu, tmp_path):
    assert one_gpu.run(prove_little, str(tmp_path)) == [0]
    proof = json.loads((tmp_path / "prove.json").read_text())
    found = {check["name"]: check for check in proof["checks"]}
    assert {name: check["status"] for name, check in found.items()} == {
        **dict.fromkeys(("dense, fp32", "dense, bf16", "dense, fp16", "resume", "speed", "memory"), "passed"),
        **dict.fromkeys(("compiled", "two ranks"), "skipped"),
    }
    # Another way of adding, or the runs were not on the device.
    assert 0 < found["dense, fp32"]["figures"]["loss"] < found["dense, fp16"]["figures"]["loss"]
    assert "bf16" in found["speed"]["note"] and "data sheet of H100" in found["speed"]["note"]
    assert found["memory"]["figures"]["measured_over_planned"] > 0.5
    machine, page = proof["machine"], (tmp_path / "prove.md").read_text()
    assert machine["simulated"] and "A rehearsal on a simulated device" in page
    assert "H100" in machine["device"] and machine["device_type"] == "cuda" and machine["driver"]
