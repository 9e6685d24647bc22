"""Files and data sets → token windows; shared by calibration and evaluation."""

from numfit.text.windows import bos_token, calibration_windows, check_windows, read_dataset, read_text, token_windows

__all__ = ["bos_token", "calibration_windows", "check_windows", "read_dataset", "read_text", "token_windows"]
