"""Calibration: what a text does to a model's linears, one decoder layer at a time."""

from numfit.calibration.blocks import Blocks, watch_layer
from numfit.calibration.recorder import Recorder
from numfit.calibration.statistics import Key, Statistics, load_statistics, save_statistics
from numfit.calibration.streams import Stream

__all__ = ["Blocks", "Key", "Recorder", "Statistics", "Stream", "load_statistics", "save_statistics", "watch_layer"]
