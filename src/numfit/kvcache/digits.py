"""Dense streams of small integers: words of any width, and digits of a base that is not a power of two.

`formats.packing` packs words of up to 8 bits; here words may have up to 30, and a few digits of base k share a word (five
ternary digits in 8 bits, three of base 10 in 10). Same order: least significant bit first, each row padded to a byte.
"""

from __future__ import annotations

import torch
from torch import Tensor

from numfit.formats.packing import pack_bits, packed_bytes, unpack_bits

# digits a word holds, and its bits, for the bases that gain by it
_GROUPS = {3: (5, 8), 5: (3, 7), 6: (3, 8), 7: (5, 15), 9: (5, 16), 10: (3, 10), 11: (2, 7), 12: (5, 18), 13: (3, 12)}


def grouping(levels: int) -> tuple[int, int]:
    """(digits of a word, bits of a word) for codes below `levels`."""
    return _GROUPS.get(levels, (1, max(1, (levels - 1).bit_length())))


def digit_bytes(count: int, levels: int) -> int:
    """Bytes of a row of `count` codes."""
    digits, bits = grouping(levels)
    return packed_bytes(-(-count // digits), bits)


def pack_words(words: Tensor, bits: int) -> Tensor:
    """Integers [..., n] below 2**bits → uint8 [..., ceil(n · bits / 8)]."""
    if bits <= 8:
        return pack_bits(words, bits)
    single = (words.long().unsqueeze(-1) >> torch.arange(bits, device=words.device)) & 1
    return pack_bits(single.flatten(-2), 1)


def unpack_words(stream: Tensor, bits: int, count: int) -> Tensor:
    """Inverse of `pack_words`: int64 [..., count]."""
    if bits <= 8:
        return unpack_bits(stream, bits, count).long()
    single = unpack_bits(stream, 1, count * bits).long().unflatten(-1, (count, bits))
    return (single << torch.arange(bits, device=stream.device)).sum(-1)


def pack_digits(codes: Tensor, levels: int) -> Tensor:
    """Codes [..., n] below `levels` → uint8 [..., digit_bytes(n, levels)]."""
    digits, bits = grouping(levels)
    if digits == 1:
        return pack_words(codes, bits)
    codes = torch.nn.functional.pad(codes.long(), (0, -codes.shape[-1] % digits)).unflatten(-1, (-1, digits))
    return pack_words((codes * levels ** torch.arange(digits, device=codes.device)).sum(-1), bits)


def unpack_digits(stream: Tensor, levels: int, count: int) -> Tensor:
    """Inverse of `pack_digits`: integers [..., count]."""
    digits, bits = grouping(levels)
    if digits == 1:
        return unpack_bits(stream, bits, count)
    words = unpack_words(stream, bits, -(-count // digits)).unsqueeze(-1)
    return (words // levels ** torch.arange(digits, device=stream.device) % levels).flatten(-2)[..., :count]
