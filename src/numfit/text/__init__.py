"""Files and data sets → token windows; shared by calibration and evaluation."""

from numfit.text.windows import bos_token, read_text, token_windows

__all__ = ["bos_token", "read_text", "token_windows"]
