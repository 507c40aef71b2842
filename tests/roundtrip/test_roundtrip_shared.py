"""The large real models that lie beside a developer's checkout."""

from pathlib import Path

import pytest

from .cases import file_case
from .judge import CONVERSIONS, Tally, judge

FOLDERS = ("models", "robust")

# Sizes of symbolic dimensions that the networks can work with.
DIMS = {
    "efficientnet_lite0": {"N": 1},
    "minilm_l6": {"batch": 2, "sequence": 8},
    "ppocr_cls_paddle_opset11": {"None": 1, "?": 48},
    "ppocr_v4_det": {"p2o.DynamicDimension.0": 1, "p2o.DynamicDimension.1": 64,
                     "p2o.DynamicDimension.2": 64},
    "ppocr_v4_rec": {"p2o.DynamicDimension.0": 1, "?": 48, "p2o.DynamicDimension.1": 64},
    "silero_vad_16k_op15": {"batch": 1, "sequence": 576},
    "silero_vad_op18_ifless": {"batch": 1, "sequence": 576},
    "espcn_x3": {"batch_size": 1},
    "eeg_spindle_unet1d_gelu_erf": {"batch_size": 1},
}  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("conversion", CONVERSIONS)
@pytest.mark.parametrize("folder", FOLDERS)
def test_real_models_survive(folder: str, conversion: str, shared_models: Path) -> None:
    tally = Tally()
    paths = sorted((shared_models / folder).glob("*.onnx"))
    for path in paths:
        judge(file_case(path, DIMS.get(path.stem)), CONVERSIONS[conversion], tally)
    print(f"{folder}, {conversion}: {tally}")
    assert tally.judged == len(paths) > 0
    assert not tally.problems, "\n".join(tally.problems)
    assert not tally.not_run
