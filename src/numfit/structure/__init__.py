"""What a decoder is, declaratively: one map, read by every room that needs to know what feeds what."""

from numfit.structure.decoder import Decoder, FeedForward, Layer, Norm, decoder_map, value_rows

__all__ = ["Decoder", "FeedForward", "Layer", "Norm", "decoder_map", "value_rows"]
