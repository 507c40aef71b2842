"""A report to look at."""

from onnxslim_passes.report.records import Decision, PassRecord, Report


def report(**changes):
    figures = {
        "file_bytes": 10_900_000,
        "zstd_bytes": None,
        "parameters": 2_700_000,
        "nonzero_parameters": 2_700_000,
        "macs": None,
    }
    decisions = [
        Decision(where="conv1.weight", taken=True, reason="half of it is zero"),
        Decision(where="conv1.bias", taken=False, reason="a bias is never pruned"),
        Decision(where="conv2.bias", taken=False, reason="a bias is never pruned"),
        Decision(where="w[0]", taken=False, reason="too small: 12 elements"),
    ]
    record = PassRecord(
        name="prune-magnitude",
        options={"sparsity": 0.8},
        changed=True,
        seconds=0.25,
        before_bytes=10_900_000,
        after_bytes=2_900_000,
        decisions=tuple(decisions),
    )
    output = {
        "name": "scores",
        "sqnr_db": 19.84,
        "cosine": 0.995,
        "max_error": 0.25,
        "agreement": None,
    }
    known = {
        "source": "model.onnx",
        "source_sha256": "0" * 64,
        "versions": {},
        "seed": 0,
        "target": "cpu",
        "samples": "64 feeds of calib.npz",
        "passes": (record,),
        "fidelity": {"sqnr_db": 19.84, "cosine": 0.995, "max_error": 0.25, "outputs": [output]},
        "before": figures,
        "after": {**figures, "file_bytes": 2_900_000, "nonzero_parameters": 540_000},
        "latency": {"reference_s": 0.0135, "candidate_s": 0.01, "speedup": 1.35},
    }
    return Report(**{**known, **changes})
